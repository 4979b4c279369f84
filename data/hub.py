"""Downloads from the Hugging Face hub, shared by cached_*.py and fineweb.py.

huggingface_hub resumes partial files. This module skips complete files and checks each file on arrival.
"""

import argparse
import errno
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from data.shards import check_shard

SHARD_BYTES = 200_001_024  # a full public shard: 100M tokens
DISK_ERRORS = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS}
ABOUT_SHARDS = (
    "Each is checked as it arrives. An interrupted download resumes when the command is run again: complete\n"
    "shards are skipped."
)


class PublicShards(NamedTuple):
    """A data set of GPT-2 shards on the hub: PREFIX_val_000000.bin and PREFIX_train_000001.bin onwards."""

    repo: str
    folder: str  # destination, beside the scripts
    prefix: str
    num_train: int


def download_main(description: str, shards: PublicShards) -> None:
    parser = argparse.ArgumentParser(
        description=description + ABOUT_SHARDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "num_shards",
        nargs="?",
        type=int,
        default=shards.num_train,
        metavar="N",
        help=f"training shards, 1 to {shards.num_train} (default: all)",
    )
    default = Path(__file__).resolve().parent / shards.folder
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        metavar="DIR",
        help=f"folder for the shards (default: {shards.folder}/ beside this script)",
    )
    args = parser.parse_args()
    if not 1 <= args.num_shards <= shards.num_train:
        raise ValueError(f"{args.num_shards} training shards: the data set has 1 to {shards.num_train}")
    download_shards(shards, args.num_shards, args.out)


def download_shards(shards: PublicShards, num_train: int, folder: Path) -> None:
    """Fetch missing shards, validation first, so that an interrupted download can already be trained on."""
    names = [f"{shards.prefix}_val_000000.bin"]
    names += [f"{shards.prefix}_train_{number:06d}.bin" for number in range(1, num_train + 1)]
    missing = [name for name in names if not is_sound(folder / name)]
    print(f"{folder}: {len(names) - len(missing)} of {len(names)} shards are there")
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = len(missing) * SHARD_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        print(
            f"warning: the missing shards need {needed / 1e9:.1f} GB; the disk has {free / 1e9:.1f} GB free"
        )
    for name in missing:
        print(f"{name} ...", flush=True)
        path = download(shards.repo, name, folder)
        try:
            info = check_shard(path, every_token=True)
        except ValueError as error:
            # Remove it: the hub's client would count it as downloaded and never fetch it again.
            path.unlink(missing_ok=True)
            raise OSError(f"the downloaded file was refused and removed: {error}. Run this again") from None
        print(f"{name}: {info.num_tokens:,} tokens")
    print(f"done; train with DATA_PATH={shlex.quote(str(folder.resolve()))} ./run.sh")


def is_sound(path: Path) -> bool:
    """Return True if the shard exists and is valid; remove a damaged one, so that it is fetched again."""
    if not path.exists():
        return False
    try:
        check_shard(path)
    except ValueError as error:
        print(f"{error}; removed, will be downloaded again")
        path.unlink()
        return False
    return True


def download(repo: str, name: str, folder: Path) -> Path:
    """Fetch one file of a data set into `folder` and return its path there."""
    import huggingface_hub  # imported late: it takes a second, and --help does not need it

    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", local_dir=folder))
    except Exception as error:
        raise _explained(error, repo, name) from error


def list_files(repo: str, folder: str) -> list[str]:
    """List the files directly inside a folder of a data set, sorted."""
    import huggingface_hub

    try:
        tree = huggingface_hub.HfApi().list_repo_tree(repo, folder, repo_type="dataset")
        return sorted(entry.path for entry in tree if hasattr(entry, "size"))
    except Exception as error:
        raise _explained(error, repo, folder) from error


def _explained(error: Exception, repo: str, name: str) -> OSError:
    """Return the error to raise for a failed download, a sentence that says what to do."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error  # run_script explains it
    if "No space left" in str(error):  # wording of the hub's faster transfer library
        return OSError(errno.ENOSPC, str(error))
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return OSError(
        f"downloading {name} of {repo} failed ({type(error).__name__}: {reason}): check the network, "
        "HF_HUB_OFFLINE and HF_TOKEN; finished files are kept, run this again"
    )
