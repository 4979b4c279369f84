"""Tokenize FineWeb yourself: turn the hub's parquet files into shards of GPT-2 tokens. Takes hours.

    python data/fineweb.py                      # sample-10BT:  31 GB of parquet, 20 GB of shards
    python data/fineweb.py --sample 100BT --workers 64
    python data/fineweb.py --shards 3           # stop after the parquet file with the third shard

data/cached_fineweb10B.py fetches nearly the same data in a fraction of the time. Use this script for another
shard size or vocabulary (--bytes), or to see where the shards come from.

Each parquet file (2 GB, on disk only while it is tokenized) becomes shards of its own, which no document
straddles: fineweb_10BT_train_FILE_SHARD.bin. The very first shard is for validation. Run the command again
after an interruption: files that have their shards are skipped.
"""

import argparse
import functools
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under PYTHONSAFEPATH=1

from data.hub import download, list_files
from data.shards import check_shard, run_script
from data.tokenize_text import read_parquet
from data.tokenizing import Progress, ShardWriter, Tokenizer, add_options, check_options

REPO = "HuggingFaceFW/fineweb"


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
        "--shards",
        type=int,
        default=sys.maxsize,
        metavar="N",
        help="stop once N shards exist, validation included (default: all)",
    )
    add_options(parser)
    args = parser.parse_args()
    check_options(args)
    args.out = args.out or Path(__file__).resolve().parent / f"fineweb_sample_{args.sample}"
    with Tokenizer(args.as_bytes, args.workers) as tokenizer:
        make_shards(args, tokenizer)


def shard_path(folder: Path, sample: str, file: int, number: int) -> Path:
    part = "train" if file or number else "val"
    return folder / f"fineweb_{sample}_{part}_{file:03d}_{number:05d}.bin"


def make_shards(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    for path in args.out.glob("*.bin"):
        ours = path.name.startswith(f"fineweb_{args.sample}_")
        if not ours or check_shard(path).vocabulary != tokenizer.vocabulary:
            raise ValueError(f"{path} is not of this sample and vocabulary: use another --out")
    names = [name for name in list_files(REPO, f"sample/{args.sample}") if name.endswith(".parquet")]
    if not names:
        raise ValueError(f"{REPO} has no parquet files in sample/{args.sample}; has it been rearranged?")
    progress, work = Progress(), args.out / "unfinished"
    for file, name in enumerate(names):
        if shard_path(args.out, args.sample, file, 0).exists():
            continue
        for shard in args.out.glob(f"*_{file:03d}_?????.bin"):  # moves, below, that were interrupted
            shard.unlink()
        if len(list(args.out.glob("*.bin"))) >= args.shards:
            break
        progress.where = f"(file {file + 1} of {len(names)}: {name})"
        path_of = functools.partial(shard_path, work, args.sample, file)
        writer = ShardWriter(path_of, tokenizer.vocabulary, args.shard_tokens)
        parquet = download(REPO, name, work)
        for found in tokenizer.stream(read_parquet(parquet, "text")):
            writer.add(found.tokens)
            progress.add(found.tokens.size)
        writer.flush()
        for shard in reversed(writer.written):  # the first one last: where it is, its file is finished
            shard.replace(args.out / shard.name)
        shutil.rmtree(work)
    progress.show()
    print(f"{args.out}: {len(list(args.out.glob('*.bin')))} shards")


if __name__ == "__main__":
    sys.exit(run_script(main))
