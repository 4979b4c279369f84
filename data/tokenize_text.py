"""Make shards from your own text: any mix of .txt, .jsonl and .parquet files.

    python data/tokenize_text.py books/*.txt wiki.jsonl --out data/mine
    python data/tokenize_text.py corpus.txt --separator '<|endoftext|>' --out data/mine --val-frac 0.05
    python data/tokenize_text.py notes.txt --separator '' --bytes --out data/mine      # blank lines separate
    TRAIN_FILES='data/mine/text_train_*.bin' VAL_FILES='data/mine/text_val_*.bin' ./run.sh

Writes DIR/NAME_val_000000.bin ... and DIR/NAME_train_000001.bin ...: the mark of each document, then its
tokens. A document is a .txt file (or the text between two separator lines), a line of a .jsonl file, or a row
of a .parquet file. Documents keep the order given. Shuffle them first if that order is not random, because a
short training run sees only the beginning.

A hash of its text decides whether a document is for validation. Equal documents are therefore never on both
sides, and adding files does not move the others.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from shards import run_script
from tokenizing import Progress, ShardWriter, Tokenizer, add_options, check_options

SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 1000  # rows per read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .txt, .jsonl or .parquet file")
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
        help="line that separates documents in .txt files; '' means a blank line; "
        "write --separator=--- if it begins with - (default: a file is one document)",
    )
    parser.add_argument(
        "--val-frac",
        type=float,
        default=0.01,
        metavar="F",
        help="fraction of documents for validation; 0 for none (default: 0.01)",
    )
    parser.add_argument("--force", action="store_true", help="replace existing shards of that name in DIR")
    add_options(parser)
    args = parser.parse_args()
    check_options(args)
    check_inputs(args.files)
    if not 0 <= args.val_frac < 1:
        raise ValueError(f"--val-frac {args.val_frac}: must be at least 0 and below 1")
    # Readers tell the two parts apart by _train_ and _val_ in the name.
    if not re.fullmatch(r"[\w.-]+", args.name) or re.search(r"_(train|val)(_|$)", args.name):
        raise ValueError(f"--name {args.name!r}: letters, digits and _ . - only, and neither _train nor _val")
    with Tokenizer(args.as_bytes, args.workers) as tokenizer:
        make_room(args.out, args.name, args.force)
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


def make_room(folder: Path, name: str, force: bool) -> None:
    """Refuse or delete old shards of this name, which would be trained on together with the new ones."""
    old = sorted(folder.glob(f"{name}_train_*.bin")) + sorted(folder.glob(f"{name}_val_*.bin"))
    if old and not force:
        raise ValueError(
            f"{old[0]} already exists ({len(old)} shards): --force replaces them; another --out keeps both"
        )
    for path in old:
        path.unlink()


def write_split(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    def writer(part: str, first: int) -> ShardWriter:
        return ShardWriter(
            lambda number: args.out / f"{args.name}_{part}_{number:06d}.bin",
            tokenizer.vocabulary,
            args.shard_tokens,
            first,
        )

    train, val = writer("train", 1), writer("val", 0)
    progress = Progress()
    lowest, highest = 1.0, 0.0  # hashes of the documents, as fractions of the largest possible hash
    try:
        for tokens, digest in tokenizer.stream(read_all(args, progress)):
            if not tokens.size:
                continue
            fraction = digest / 2**64
            part = val if fraction < args.val_frac else train
            part.add(tokens)
            lowest, highest = min(lowest, fraction), max(highest, fraction)
            progress.add(tokens.size)
        progress.show(end=True)
        check_split(args.val_frac, train, val, lowest, highest)
        for part in (train, val):
            part.flush()
    except BaseException:  # half a corpus must not pass for a complete one
        for path in train.written + val.written:
            path.unlink(missing_ok=True)
        raise
    for path in val.written + train.written:
        print(path)
    print(f"{train.num_tokens:,} tokens for training, {val.num_tokens:,} for validation")


def check_split(val_frac: float, train: ShardWriter, val: ShardWriter, lowest: float, highest: float) -> None:
    """Refuse an empty part, unless no validation was asked for."""
    if not train.num_tokens and not val.num_tokens:
        raise ValueError("the files hold no text")
    if lowest == highest and val_frac:
        raise ValueError(
            "there is only one document, so none is left for validation: --separator cuts a .txt "
            "file into documents, --val-frac 0 makes training shards only"
        )
    if not val.num_tokens and val_frac:
        raise ValueError(
            f"no document was chosen for validation with --val-frac {val_frac}; "
            f"--val-frac {lowest + 1e-4:.4f} takes at least one"
        )
    if not train.num_tokens:
        raise ValueError(
            f"every document was chosen for validation with --val-frac {val_frac}; "
            f"--val-frac {highest - 1e-4:.4f} leaves at least one for training"
        )


def read_all(args: argparse.Namespace, progress: Progress) -> Iterator[str]:
    for number, path in enumerate(args.files, 1):
        progress.where = f"(file {number} of {len(args.files)}: {path.name})"
        suffix = path.suffix.lower()
        try:
            if suffix == ".txt":
                yield from read_txt(path, args.separator)
            elif suffix == ".jsonl":
                yield from read_jsonl(path, args.field)
            else:
                yield from read_parquet(path, args.field)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"{path}: not UTF-8 (found byte {byte:#04x}); convert it with iconv") from None


def read_txt(path: Path, separator: str | None) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:  # -sig: skips the byte order mark that some editors write
        if separator is None:
            yield file.read()
            return
        lines = []
        for line in file:
            if line.strip() == separator.strip():
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
        yield "".join(lines)


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: want an object with the field {field!r}, "
                    f"found {type(row).__name__}"
                )
            if field not in row:
                raise ValueError(
                    f"{path}, line {number}: no field {field!r} among {sorted(row)}; choose with --field"
                )
            yield as_text(row[field], f"{path}, line {number}", field)


def read_parquet(path: Path, field: str, first_row: int = 0) -> Iterator[str]:
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
                for text in batch.column(0).to_pylist()[max(0, first_row - row) :]:
                    yield as_text(text, str(path), field)
                row += batch.num_rows
        except pyarrow.ArrowException as error:
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
