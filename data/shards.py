"""The shard format: the one place that reads, checks and writes a shard. Needs numpy only.

llm.c's format, so that other speedrun code reads these files and these scripts read theirs:

    256 int32   magic 20240520, version 1, number of tokens, vocabulary (0 means 50257), 0 ...
    N uint16    the tokens; little-endian, like the header

Each document begins with its vocabulary's mark (50256 for GPT-2, 0 for bytes); nothing ends it.
"""

import errno
import functools
import glob
import hashlib
import os
import secrets
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = HEADER_WORDS * 4
TOKEN_BYTES = 2

GPT2_VOCABULARY = 50257
GPT2_MARK = 50256  # <|endoftext|>, which the public shards put before each document
BYTE_VOCABULARY = 256
BYTE_MARK = 0  # no text contains a zero byte

# How files that are not shards at all begin; a download can leave each of them under a shard's name.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data: run `git lfs pull` or download it again"),
    (b"<", "seems to be a web page, perhaps a server's error message: delete it and download again"),
)


class DataError(ValueError):
    """A data file that cannot be used: which, what was found, what was wanted. Exit code 2."""


class ShardInfo(NamedTuple):
    num_tokens: int
    vocabulary: int


def write_shard(path: Path | str, tokens: np.ndarray, vocabulary: int = GPT2_VOCABULARY) -> None:
    """Write 1-d integer `tokens`, all in [0, vocabulary), so that `path` either is whole or does not exist.

    The GPT-2 vocabulary is written as 0, as in the public shards: some readers refuse anything else there.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"{path}: tokens must be a 1-d array of integers, not {tokens.ndim}-d {tokens.dtype}")
    if not 0 < vocabulary <= 1 << 16:
        raise DataError(f"{path}: a vocabulary of {vocabulary} does not fit 16-bit tokens; 1 to 65,536 does")
    if not 0 < tokens.size < 1 << 31:
        raise DataError(f"{path}: a shard holds 1 to {(1 << 31) - 1:,} tokens, not {tokens.size:,}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise DataError(f"{path}: tokens from {low} to {high} do not fit a vocabulary of {vocabulary}")
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:4] = MAGIC, VERSION, tokens.size, 0 if vocabulary == GPT2_VOCABULARY else vocabulary
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name must not match a reader's *.bin, and two writers at once must not share it.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too: leave no half-written file behind
        temporary.unlink(missing_ok=True)
        raise


def check_shard(path: Path | str, every_token: bool = False) -> ShardInfo:
    """Check a shard and return its size and vocabulary; DataError says what was found and what was wanted.

    Reads the header and the file's size; `every_token` also reads all tokens and compares them with the
    vocabulary (a tenth of a second for 100M of them).
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would make us wait for ever
            raise DataError(f"{path}: no regular file; a token shard is wanted")
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    info = parse_header(path, head, size)
    if every_token:
        tokens = map_tokens(path, info)
        if int(tokens.max()) >= info.vocabulary:
            where = int(np.argmax(tokens >= info.vocabulary))
            raise DataError(
                f"{path}: token {tokens[where]} at position {where:,} is beyond the "
                f"vocabulary of {info.vocabulary}; the file is damaged or its header is wrong"
            )
    return info


def parse_header(path: Path, head: bytes, size: int) -> ShardInfo:
    if size == 0:
        raise DataError(f"{path}: an empty file; a shard begins with a header of {HEADER_BYTES:,} bytes")
    for beginning, meaning in IMPOSTORS:
        if head.startswith(beginning):
            raise DataError(f"{path}: {meaning}")
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path}: cut short within the header: {len(head):,} bytes of {HEADER_BYTES:,}")
    magic, version, num_tokens, vocabulary = (int(word) for word in np.frombuffer(head, dtype="<i4")[:4])
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard: it begins with {magic}, an llm.c shard with {MAGIC}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}; this code reads {VERSION} (16-bit tokens)")
    if num_tokens <= 0:
        raise DataError(f"{path}: its header promises {num_tokens} tokens; a shard holds at least one")
    wanted = HEADER_BYTES + TOKEN_BYTES * num_tokens
    if size != wanted:
        fault = "cut short" if size < wanted else "too long"
        raise DataError(
            f"{path}: {fault}: its header promises {num_tokens:,} tokens, which makes "
            f"{wanted:,} bytes; the file has {size:,}"
        )
    if not 0 <= vocabulary <= 1 << 16:
        raise DataError(
            f"{path}: header word 3 gives a vocabulary of {vocabulary}; 16-bit tokens allow "
            f"up to 65,536, and 0 means {GPT2_VOCABULARY}"
        )
    return ShardInfo(num_tokens, vocabulary or GPT2_VOCABULARY)


def map_tokens(path: Path | str, info: ShardInfo) -> np.memmap:
    """The tokens of a checked file, mapped rather than loaded."""
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(info.num_tokens,))


@dataclass
class Shard:
    """An open token file: its tokens, mapped, and the size of their vocabulary."""

    path: Path
    tokens: np.ndarray
    vocab_size: int
    kept: np.ndarray | None = None

    def read(self) -> np.ndarray:
        """All tokens, in memory: a mapped file that somebody cuts short ends the process with SIGBUS."""
        try:
            tokens = np.fromfile(self.path, dtype="<u2", offset=HEADER_BYTES)
        except OSError as error:
            raise DataError(
                f"{self.path} was there when the run began and cannot be read now ({error.strerror}); put it "
                "back, then RESUME=auto goes on"
            ) from None
        if len(tokens) != len(self.tokens):
            raise DataError(
                f"{self.path} had {len(self.tokens)} tokens when the run began and has {len(tokens)} now; "
                "put the old file back, then RESUME=auto goes on"
            )
        return tokens

    def head(self, num_tokens: int) -> np.ndarray:
        """The first tokens, read once."""
        if self.kept is None or len(self.kept) < min(num_tokens, len(self.tokens)):
            self.kept = np.array(self.tokens[:num_tokens])
        return self.kept[:num_tokens]

    @functools.cached_property
    def mark(self) -> int:
        """The token that begins every document.

        In a shard whose vocabulary is neither GPT-2's nor bytes, the first token is the mark; public GPT-2
        shards may begin in the middle of a document.
        """
        known = {GPT2_VOCABULARY: GPT2_MARK, BYTE_VOCABULARY: BYTE_MARK}
        return known.get(self.vocab_size, int(self.tokens[0]))

    def documents(self, tokens: np.ndarray, longest: int, split: bool) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of the documents in this shard's tokens, in their order, as training reads them.

        None is longer than `longest`: the rest is dropped or, with `split`, read as further documents.
        """
        starts = np.flatnonzero(tokens == self.mark)  # a beginning without a mark is no document
        if not len(starts):
            raise DataError(
                f"{self.path} has no document mark (token {self.mark}), with which every document begins; "
                "make it again with data/tokenize_text.py"
            )
        lengths = np.diff(starts, append=len(tokens))
        if split:
            pieces = -(-lengths // longest)
            nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            starts = np.repeat(starts, pieces) + nth * longest
            lengths = np.repeat(lengths, pieces) - nth * longest
        return starts, np.minimum(lengths, longest)


def open_shard(path: Path | str) -> Shard:
    """Map a shard, checked to its last token; DataError says what is wrong with it."""
    info = check_shard(path, every_token=True)
    return Shard(Path(path), map_tokens(path, info), info.vocabulary)


def find_shards(root: str, pattern: str) -> list[Path]:
    """The files that match a pattern under a folder, in order. ~ is the user's home.

    [ ] * ? are a pattern's only where no folder or file has them in its name.
    """
    root, pattern = os.path.expanduser(root), os.path.expanduser(pattern)
    whole = os.path.join(root, pattern)
    folder, name = os.path.split(whole)
    if os.path.isfile(whole):
        return [Path(whole)]
    if os.path.isdir(folder):
        return sorted(Path(folder, found) for found in glob.glob(name, root_dir=folder))
    return sorted(Path(root, found) for found in glob.glob(pattern, root_dir=root))


def own_shards(folder: str) -> tuple[str, str] | None:
    """Patterns of the training and validation shards that lie in a folder itself; None without both."""
    parts = {part: find_shards(folder, f"*_{part}_*.bin") for part in ("train", "val")}
    names = {part: {path.name.rpartition(f"_{part}_")[0] for path in paths} for part, paths in parts.items()}
    both = sorted(names["train"] & names["val"])
    if len(both) > 1:
        raise DataError(
            f"DATA_PATH={folder!r} holds shards of several corpora ({', '.join(both)}); set TRAIN_FILES and "
            f"VAL_FILES to those of one, such as {both[0]}_train_*.bin and {both[0]}_val_*.bin"
        )
    if not both:
        return None
    return f"{glob.escape(both[0])}_train_*.bin", f"{glob.escape(both[0])}_val_*.bin"


def count_tokens(root: str, pattern: str) -> int:
    """Tokens in the shards that match, by their headers; 0 if one cannot be read, as open_shards will say."""
    try:
        return sum(check_shard(path).num_tokens for path in find_shards(root, pattern))
    except DataError:
        return 0


def open_shards(root: str, pattern: str, name: str) -> list[Shard]:
    """The shards that match a pattern, all of one vocabulary. name: the setting that gave the pattern."""
    paths = find_shards(root, pattern)
    if not paths:
        fetch = "data/embedded_corpus.py" if "embedded" in pattern else "data/cached_fineweb10B.py 9"
        raise DataError(
            f"{name}={pattern!r} under DATA_PATH={root!r} matches no file; `.venv/bin/python {fetch}` makes "
            "it, or set DATA_PATH to the folder of your own shards (docs/data.md)"
        )
    shards = [open_shard(p) for p in paths]
    if len({s.vocab_size for s in shards}) > 1:
        found = ", ".join(f"{s.path.name} {s.vocab_size}" for s in shards)
        raise DataError(f"{name} mixes vocabularies ({found}); all must come from one tokenizer")
    return shards


def open_pair(root: str, train_files: str, val_files: str) -> tuple[list[Shard], list[Shard]]:
    """Training and validation shards, of one vocabulary and document mark."""
    train = open_shards(root, train_files, "TRAIN_FILES")
    val = open_shards(root, val_files, "VAL_FILES")
    if train[0].vocab_size != val[0].vocab_size:
        raise DataError(
            f"training shards have a vocabulary of {train[0].vocab_size}, validation shards of "
            f"{val[0].vocab_size}; both must come from one tokenizer"
        )
    for shard in train + val:
        if shard.mark != val[0].mark:
            raise DataError(
                f"{shard.path} begins with token {shard.mark}, {val[0].path} with {val[0].mark}: a shard of "
                f"vocabulary {shard.vocab_size} must begin with the mark of a document, the same in all"
            )
    return train, val


class Ahead:
    """One result that a thread computes before it is needed, so that no step waits for a whole shard.

    A failure of the thread counts for nothing: take() then computes the result itself, and fails if it must.
    """

    def __init__(self):
        self.worker, self.begun, self.coming = ThreadPoolExecutor(1), None, None

    def start(self, function, *args):
        """Begin function(*args) in the thread."""
        self.begun, self.coming = args, self.worker.submit(function, *args)

    def take(self, function, *args):
        """Result of function(*args): the thread's if start() was given the same arguments."""
        if self.begun != args or self.coming.exception():  # waits for the thread
            return function(*args)
        return self.coming.result()


class TokenStream:
    """Endless batches of consecutive tokens: shards in the order of their names, nothing shuffled.

    A batch that would cross a shard's end is skipped. `position`, (epoch, shard, token), is all its state.
    """

    def __init__(self, shards: list[Shard], batch_tokens: int):
        self.shards, self.batch_tokens, self.shard_index = shards, batch_tokens, None
        self.next_shard = Ahead()
        self.seek((0, 0, 0))

    def seek(self, position: tuple[int, int, int]):
        self.position = tuple(position)

    def next(self) -> np.ndarray:
        """The tokens of the next batch, and the one after them."""
        epoch, index, start = self.position
        while start + self.batch_tokens + 1 > len(self.shards[index].tokens):
            index, start = index + 1, 0
            if index == len(self.shards):
                epoch, index = epoch + 1, 0
        if self.shard_index != index:
            self.tokens, self.shard_index = self.next_shard.take(self.read, index), index
            if len(self.shards) > 1:
                self.next_shard.start(self.read, (index + 1) % len(self.shards))
        end = start + self.batch_tokens
        self.position = epoch, index, end
        return self.tokens[start : end + 1]

    def read(self, index: int) -> np.ndarray:
        """All tokens of a shard."""
        return self.shards[index].read()


def first_batches(shards: list[Shard], num_tokens: int, batch_tokens: int) -> list[np.ndarray]:
    """The first num_tokens tokens in batches, each with the token after it."""
    tokens = np.concatenate([shard.head(num_tokens + 1) for shard in shards])
    return [tokens[start : start + batch_tokens + 1] for start in range(0, num_tokens, batch_tokens)]


def check_stream(train: list[Shard], val: list[Shard], batch_tokens: int, val_tokens: int):
    """Raise DataError unless there is a batch in the training shards, and val_tokens in the others."""
    longest = max(len(shard.tokens) for shard in train)
    if longest < batch_tokens + 1:
        raise DataError(
            f"BATCH_TOKENS={batch_tokens}, but the largest training shard has {longest} tokens, one of them "
            "only a target; use larger shards or a smaller batch"
        )
    check_validation(val, val_tokens, "BATCH_TOKENS", batch_tokens)


def check_validation(val: list[Shard], val_tokens: int, unit_name: str, unit: int):
    """Raise DataError unless the shards hold val_tokens tokens and the last one's target.

    unit_name, unit: the setting that val_tokens is a multiple of, and its value, for the message.
    """
    # read now: a file cut short later would end the process with SIGBUS
    have = sum(len(shard.head(val_tokens + 1)) for shard in val)
    if have < val_tokens + 1:
        way_out = f"set it to a multiple of {unit_name}={unit} below that"
        if have <= unit:
            way_out = f"set it and {unit_name}={unit}, of which it is a multiple, to less than that"
        raise DataError(
            f"VAL_TOKENS={val_tokens}, but the validation shards hold {have}, one of them only a target; "
            f"{way_out}"
        )


def describe_shards(shards: list[Shard]) -> str:
    """name/tokens/hash of each file, for the log."""
    return ",".join(
        f"{s.path.name.replace(' ', '_')}/{len(s.tokens)}/{content_hash(s.tokens)}" for s in shards
    )


def content_hash(tokens: np.ndarray) -> str:
    """The first 16 digits of the sha256 of the tokens as they lie in the file, whatever its header.

    Of a file over 64 MiB only the first and last MiB are hashed.
    """
    whole = tokens.nbytes <= 64 << 20
    parts = [tokens] if whole else [tokens[: 1 << 19], tokens[-(1 << 19) :]]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's main and return its exit status; an error that a person can put right is one sentence.

    2: something is wrong with what was given (ValueError). 1: the machine or the network failed (OSError).
    """
    try:
        return main() or 0
    except ValueError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = str(error), 1
        if error.errno == errno.ENOSPC:
            message = "the disk is full: free some space and run the same command again"
    except KeyboardInterrupt:
        message, status = "stopped", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status
