"""Rebuild a run from its log alone: write out the source files that it used, and print the command to repeat
it.

    python unpack_run.py logs/RUN_ID.txt FOLDER

A log holds every source file of the project that its run used, and every setting. Packages and data are not
in it: requirements.txt pins the former, and the log names the latter (file, tokens, hash), which DATA_PATH
must hold.
"""

import argparse
import glob
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis.command_line import make_parser, run
from analysis.run_environment import command_of
from analysis.run_log import RunLog, embedded_sources, read_log
from analysis.trainers import env_text

# in the log's config, but derived, or the business of that one run
DERIVED = {"model_config", "vocab_size", "mark", "num_slices", "train_data", "val_data"}
NOT_REPEATED = {"run_id", "resume"}


def write_sources(sources: dict[str, bytes], folder: Path):
    """Write the files below `folder`, which must be new or empty. Raises ValueError if it is not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; give a new folder")
    for name, code in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(code)
        if path.parent != folder:
            (path.parent / "__init__.py").touch()  # a log does not hold empty files


def run_folder(run: RunLog) -> Path:
    """Folder that holds the log's logs/ folder: where the run was started, unless the log was moved."""
    return run.path.absolute().parent.parent


def data_folder(run: RunLog) -> Path | None:
    """The run's DATA_PATH as a whole path; None if the training files are not there."""
    folder = run_folder(run) / run.config["data_path"]  # an absolute data_path wins
    return folder if glob.glob(run.config["train_files"], root_dir=folder) else None


def command(run: RunLog, folder: Path) -> str:
    """Shell command that repeats the run in `folder`, with its ranks and all settings but the machine's.

    DATA_PATH is among them if the training files are there.
    """
    skipped = DERIVED | NOT_REPEATED | set(run.affects["machine"])
    settings = {k.upper(): v for k, v in run.config.items() if k not in skipped and v not in (None, "")}
    if data := data_folder(run):
        settings["DATA_PATH"] = data
    words = [f"{name}={shlex.quote(env_text(value))}" for name, value in settings.items()]
    start = command_of(Path(run.started["script"]), int(run.started["world_size"]))
    return " ".join(["cd", shlex.quote(str(folder)), "&&", *words, shlex.join(start)])


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 if the log cannot be unpacked."""
    parser = make_parser(__doc__)
    parser.add_argument("log", type=Path, help="a run's log, logs/RUN_ID.txt")
    parser.add_argument("folder", type=Path, help="a new folder for the source files")
    return run(unpack, parser, argv)


def unpack(args: argparse.Namespace) -> None:
    """Write the source files, and print the command that repeats the run."""
    sources, found = embedded_sources(args.log), read_log(args.log)[0]
    if not found.started:
        raise ValueError(f"{args.log} has no event:started: it was cut, or is not a log of these trainers")
    write_sources(sources, args.folder)
    print(f"{len(sources)} files written to {args.folder}. The run again:\n")
    print(command(found, args.folder))
    had, place = found.config["data_path"], "as the run had it"
    if data_folder(found) is None:
        place = f"to be set to the folder that has {found.config['train_files']}; the run had {had!r}"
    elif not Path(had).is_absolute():
        place = f"the run's {had!r}, relative to {run_folder(found)}, the parent of its logs/ folder"
    print(f"\nDATA_PATH is {place}; its data were {found.started['train_data']}")
    print(f"and {found.started['val_data']}; packages: torch {found.started['torch']}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
