"""Tokenize FineWeb yourself: turn the hub's parquet files into shards of 100M GPT-2 tokens. Takes hours.

    python data/fineweb.py                      # sample-10BT:  31 GB of parquet, 20 GB of shards
    python data/fineweb.py --sample 100BT --workers 64
    python data/fineweb.py --shards 3           # stop after the validation shard and two of training

data/cached_fineweb10B.py fetches nearly the same data in a fraction of the time. Use this script for another
shard size or vocabulary (--bytes), or to see where the shards come from. As in the public data set, the first
shard is for validation and the others are for training. Unlike there, no document straddles two shards.

Only one parquet file (2 GB) is on disk at a time. Run the command again to resume after the last whole shard.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under PYTHONSAFEPATH=1

from data.hub import download, list_files
from data.shards import check_shard, run_script
from data.tokenize_text import read_parquet
from data.tokenizing import Progress, ShardWriter, Tokenizer, add_options, check_options

REPO = "HuggingFaceFW/fineweb"
PROGRESS_NAME = "progress.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sample", choices=("10BT", "100BT"), default="10BT", help="FineWeb sample (default: 10BT)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the shards (default: fineweb_sample_10BT/ beside this script)",
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="stop after N shards, validation included (default: all)"
    )
    add_options(parser)
    args = parser.parse_args()
    check_options(args)
    if args.shards is not None and args.shards < 1:
        raise ValueError(f"--shards {args.shards}: at least 1")
    args.out = args.out or Path(__file__).resolve().parent / f"fineweb_sample_{args.sample}"
    with Tokenizer(args.as_bytes, args.workers) as tokenizer:
        make_shards(args, tokenizer)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"


def make_shards(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    # Saved beside the shards: resuming with other choices would mix two corpora.
    choices = {"sample": args.sample, "shard_tokens": args.shard_tokens, "vocabulary": tokenizer.vocabulary}
    state = load_state(args.out, choices)
    writer = ShardWriter(
        lambda number: shard_path(args.out, number), tokenizer.vocabulary, args.shard_tokens, state["shards"]
    )
    has_enough = args.shards is not None and state["shards"] >= args.shards
    if state["finished"] or has_enough:
        print(f"{args.out}: {state['shards']} shards are there; nothing left to do")
        return
    save_state(args.out, choices, state)  # from here on, the shards are known to be ours
    progress = Progress()
    for name, row, tokens in tokenized_rows(args, tokenizer, dict(state), progress):
        num_written = len(writer.written)
        writer.add(tokens)
        progress.add(tokens.size)
        if len(writer.written) == num_written:
            continue
        progress.note(f"{writer.written[-1]} is written")
        if tokens.size <= args.shard_tokens:  # then this row is the first of the next shard: resume here
            state |= {"file": name, "row": row, "shards": writer.next_number}
            save_state(args.out, choices, state)
        if args.shards is not None and writer.next_number >= args.shards:
            return
    writer.flush()
    save_state(args.out, choices, state | {"shards": writer.next_number, "finished": True})
    progress.show(end=True)
    print(f"{args.out}: {writer.next_number} shards")


def tokenized_rows(
    args: argparse.Namespace, tokenizer: Tokenizer, state: dict, progress: Progress
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield (parquet file, row, tokens) of every document from `state` on, in the hub's order."""
    names = [name for name in list_files(REPO, f"sample/{args.sample}") if name.endswith(".parquet")]
    if not names:
        raise ValueError(f"{REPO} has no parquet files in sample/{args.sample}; has it been rearranged?")
    if state["file"] not in (None, *names):
        raise ValueError(f"{REPO} has lost {state['file']}, where the last run stopped: use another --out")
    start = names.index(state["file"]) if state["file"] else 0
    for number, name in enumerate(names[start:], start + 1):
        progress.where = f"(file {number} of {len(names)}: {name})"
        first_row = state["row"] if name == state["file"] else 0
        path = download(REPO, name, args.out / "parquet")
        documents = tokenizer.stream(read_parquet(path, "text", first_row))
        for row, found in enumerate(documents, first_row):
            yield name, row, found.tokens
        path.unlink()


def load_state(folder: Path, choices: dict) -> dict:
    """Read where the last run stopped, and check its shards: a missing or damaged one is an error."""
    state = {"file": None, "row": 0, "shards": 0, "finished": False}
    path = folder / PROGRESS_NAME
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}): use another --out") from None
        if saved["choices"] != choices:
            raise ValueError(f"{folder} was begun with {saved['choices']}, not {choices}: use another --out")
        state = saved["state"]
        for number in range(state["shards"]):
            check_shard(shard_path(folder, number))
    elif any(folder.glob("fineweb_*.bin")):
        raise ValueError(f"{folder} holds shards that this script did not make: use another --out")
    return state


def save_state(folder: Path, choices: dict, state: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{PROGRESS_NAME}.tmp"
    temporary.write_text(json.dumps({"choices": choices, "state": state}), encoding="utf-8")
    temporary.replace(folder / PROGRESS_NAME)


if __name__ == "__main__":
    sys.exit(run_script(main))
