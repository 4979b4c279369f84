"""Make shards from your own text: any mix of .txt, .md, .rst, .jsonl and .parquet files.

    python data/tokenize_text.py books/*.txt wiki.jsonl --out data/mine
    python data/tokenize_text.py corpus.txt --separator '<|endoftext|>' --out data/mine --val-frac 0.05
    python data/tokenize_text.py notes.txt --separator '' --bytes --out data/mine      # blank lines separate
    DATA_PATH=data/mine ./run.sh

Writes DIR/NAME_val_000000.bin ... and DIR/NAME_train_000001.bin ...: the mark of each document, then its
tokens. A document is a text file, in pieces of at most 100,000 characters (or the text between two
separator lines), a line of a .jsonl file, or a row of a .parquet file. Documents keep the order given.
Shuffle them first if that order is not random, because a short training run sees only the beginning.

A hash of its text decides whether a document is for validation. Equal documents are therefore never on both
sides, and adding files does not move the others. Where there are too few documents to choose from, the end of
the text is for validation. What was finished when the command was interrupted is kept: run it again to go on.
"""

import argparse
import codecs
import functools
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under PYTHONSAFEPATH=1

from data.shards import check_shard, find_shards, run_script
from data.tokenizing import (
    PIECE_CHARACTERS,
    Progress,
    ShardWriter,
    Tokenizer,
    add_options,
    check_options,
)

PLAIN = (".txt", ".md", ".rst")
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")
PARQUET_ROWS = 1000  # rows per read
FIRST_NUMBER = {"train": 1, "val": 0}  # of a part's shards
LEAST_TOKENS = 1025  # the trainers validate on 1,024 at least, and the last is only a target
SMALL_BYTES = 100_000_000  # a corpus below this gives a tenth to validation, else it would be noise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="a .txt, .md, .rst, .jsonl or .parquet file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--name", default="text", help="how the shards' names begin (default: text)")
    parser.add_argument(
        "--field",
        default="text",
        help="field of .jsonl or column of .parquet that holds the text (default: text)",
    )
    parser.add_argument(
        "--separator",
        metavar="LINE",
        help="line that separates documents in text files; '' means a blank line; "
        "write --separator=--- if it begins with - (default: a file is one document)",
    )
    parser.add_argument(
        "--val-frac",
        type=float,
        metavar="F",
        help="fraction of documents for validation; 0 for none (default: 0.1 of up to 100 MB, 0.01 of more)",
    )
    parser.add_argument("--force", action="store_true", help="replace existing shards of that name in DIR")
    add_options(parser)
    args = parser.parse_args()
    check_options(args)
    check_inputs(args.files)
    if args.val_frac is None:
        args.val_frac = 0.1 if sum(path.stat().st_size for path in args.files) <= SMALL_BYTES else 0.01
    if not 0 <= args.val_frac < 1:
        raise ValueError(f"--val-frac {args.val_frac}: must be at least 0 and below 1")
    # Readers tell the two parts apart by _train_ and _val_ in the name.
    if not re.fullmatch(r"[\w.-]+", args.name) or re.search(r"_(train|val)(_|$)", args.name):
        raise ValueError(f"--name {args.name!r}: letters, digits and _ . - only, and neither _train nor _val")
    old = old_shards(args.out, args.name)
    if old and not args.force:
        raise ValueError(
            f"{old[0]} already exists ({len(old)} shards): --force replaces them; another --out keeps both"
        )
    with Tokenizer(args.as_bytes, args.workers) as tokenizer:
        write_split(args, tokenizer)


def check_inputs(paths: list[Path]) -> None:
    """Refuse a missing file or an unknown suffix now, before hours of work."""
    for path in paths:
        if not path.is_file():
            problem = "a folder; name its files" if path.is_dir() else "no such file"
            raise ValueError(f"{path}: {problem}")
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{path}: its name must end in {', '.join(SUFFIXES)}: rename it to match its content"
            )


def old_shards(folder: Path, name: str) -> list[Path]:
    """Return the shards of this name, which would be trained on together with the new ones."""
    return find_shards(str(folder), f"{name}_train_*.bin") + find_shards(str(folder), f"{name}_val_*.bin")


class Unfinished:
    """The shards of a corpus that is being made, in a folder where no reader looks for shards.

    Whenever a shard is finished, the tokens that are in none yet are saved beside it: after an interruption,
    the same command goes on from there.
    """

    def __init__(self, args: argparse.Namespace, vocabulary: int):
        self.args, self.folder = args, args.out / f".{args.name}.unfinished"
        self.state_path = self.folder / "progress.npz"
        files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in args.files]
        kept = ("field", "separator", "val_frac", "shard_tokens", "as_bytes")
        self.choices = json.dumps({"files": files, **{name: getattr(args, name) for name in kept}})
        saved = self.saved_state()
        if not saved and self.folder.exists():  # else a kill before the first save would leave both kinds
            print(f"starting over: nothing in {self.folder} can be used with these files and options")
            self.remove()
        self.num_documents = int(saved.get("num_documents", 0))
        self.parts = {}
        for part, first in FIRST_NUMBER.items():
            path_of = functools.partial(self.path_of, part)
            num_written = saved.get(f"{part}_shards", 0)
            self.parts[part] = ShardWriter(path_of, vocabulary, args.shard_tokens, first, num_written)
            self.parts[part].add(saved.get(f"{part}_rest", np.empty(0)))

    def saved_state(self) -> dict[str, np.ndarray]:
        """Return what an interrupted run saved; nothing after other choices or if a file is not whole."""
        try:
            with np.load(self.state_path) as file:
                saved = dict(file)
            for part, first in FIRST_NUMBER.items():
                for number in range(first, first + saved[f"{part}_shards"]):
                    check_shard(self.path_of(part, number))
        except Exception:  # a damaged file raises many kinds
            return {}
        return saved if saved["choices"] == self.choices else {}

    def path_of(self, part: str, number: int) -> Path:
        return self.folder / f"{self.args.name}_{part}_{number:06d}.bin"

    def add(self, part: str, tokens: np.ndarray) -> None:
        """Add the next document to a part; if that finishes a shard, save where to go on."""
        before = len(self.parts[part].written)
        self.parts[part].add(tokens)
        self.num_documents += 1
        if len(self.parts[part].written) > before:
            self.save()

    def save(self) -> None:
        shards = {f"{part}_shards": len(writer.written) for part, writer in self.parts.items()}
        rests = {f"{part}_rest": writer.rest for part, writer in self.parts.items()}
        temporary = self.folder / "new.npz"
        np.savez(temporary, choices=self.choices, num_documents=self.num_documents, **shards, **rests)
        temporary.replace(self.state_path)

    def finish(self) -> list[Path]:
        """Move all shards to their folder, in place of older ones; return their paths."""
        for writer in self.parts.values():
            writer.flush()
        for path in old_shards(self.args.out, self.args.name):
            path.unlink()
        moved = []
        for path in self.parts["val"].written + self.parts["train"].written:
            moved.append(path.replace(self.args.out / path.name))
        self.remove()
        return moved

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def write_split(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    work, progress = Unfinished(args, tokenizer.vocabulary), Progress()
    train, val = work.parts["train"], work.parts["val"]
    if work.num_documents:
        print(f"going on after {work.num_documents:,} documents")
    try:
        documents = itertools.islice(read_all(args, progress), work.num_documents, None)
        for found in tokenizer.stream(documents):
            work.add("val" if found.fraction < args.val_frac else "train", found.tokens)
            progress.add(found.tokens.size)
        progress.show()
        if args.val_frac:
            split_small(train, val, args.val_frac)
        if not train.num_tokens + val.num_tokens:
            raise ValueError("the files hold no text")
        least = min(train.num_tokens, val.num_tokens)
        if not train.num_tokens or (args.val_frac and least < LEAST_TOKENS):
            raise ValueError(
                f"{train.num_tokens:,} tokens for training, {val.num_tokens:,} for validation; each needs at "
                f"least {LEAST_TOKENS:,}: add text or documents, or let more fit a shard (--shard-tokens)"
            )
        paths = work.finish()
    except ValueError:  # the input is to be changed, and what was made of it with it
        work.remove()
        raise
    for path in paths:
        print(path)
    print(f"{train.num_tokens:,} tokens for training, {val.num_tokens:,} for validation")


def split_small(train: ShardWriter, val: ShardWriter, val_frac: float) -> None:
    """Give the end of the text to validation, where documents are too few to choose from."""
    total = train.num_tokens + val.num_tokens
    enough = min(train.num_tokens, val.num_tokens) >= LEAST_TOKENS
    if enough or total < 2 * LEAST_TOKENS or train.written or val.written:
        return
    tokens = np.concatenate([train.take(), val.take()])
    mark, cut = tokens[:1], total - min(max(LEAST_TOKENS, int(total * val_frac)), total - LEAST_TOKENS)
    train.add(tokens[:cut])
    val.add(tokens[cut:] if tokens[cut] == mark[0] else np.concatenate([mark, tokens[cut:]]))
    print("there are too few documents to choose from: the end of the text is for validation")


def read_all(args: argparse.Namespace, progress: Progress) -> Iterator[str]:
    for number, path in enumerate(args.files, 1):
        progress.where = f"(file {number} of {len(args.files)}: {path.name})"
        suffix = path.suffix.lower()
        if suffix in PLAIN:
            yield from read_plain(path, args.separator)
        elif suffix == ".jsonl":
            yield from read_jsonl(path, args.field)
        else:
            yield from read_parquet(path, args.field)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a text file in UTF-8 or UTF-16, without a byte order mark."""
    with open(path, "rb") as file:
        begins = file.read(2)
    encoding = "utf-16" if begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    number = 0
    try:
        with open(path, encoding=encoding) as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except UnicodeDecodeError as error:  # decoding reads ahead of the lines
        byte = error.object[error.start]
        raise ValueError(
            f"{path}: not UTF-8 (found byte {byte:#04x} near line {number + 1}); convert it with iconv"
        ) from None


def read_plain(path: Path, separator: str | None) -> Iterator[str]:
    """Yield what stands between separator lines; without a separator, pieces of whole lines.

    A piece has at most PIECE_CHARACTERS, and a longer line is cut: training cuts documents much shorter.
    """
    lines, size = [], 0
    longest = PIECE_CHARACTERS if separator is None else sys.maxsize
    for _, line in read_lines(path):
        if separator is not None and line.strip() == separator.strip():
            yield "".join(lines)
            lines, size = [], 0
            continue
        for start in range(0, len(line), longest):
            piece = line[start : start + longest]
            if size + len(piece) > longest:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(piece)
            size += len(piece)
    yield "".join(lines)


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in read_lines(path):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: want an object with the field {field!r}, found {type(row).__name__}")
        if field not in row:
            raise ValueError(f"{place}: no field {field!r} among {sorted(row)}; choose with --field")
        yield as_text(row[field], place, field)


def read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow  # imported late: it takes half a second, and only .parquet needs it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from None
    with file:
        if field not in file.schema_arrow.names:
            raise ValueError(
                f"{path}: no column {field!r} among {file.schema_arrow.names}; choose with --field"
            )
        row = 0
        try:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield as_text(text, f"{path}, row {row}", field)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged near row {row:,} ({error})") from None


def as_text(value: object, where: str, field: str) -> str:
    """Return the text: empty for None; any other type means that --field names the wrong field."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} is {type(value).__name__}, not text; choose with --field")
    return value


if __name__ == "__main__":
    sys.exit(run_script(main))
