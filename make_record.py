"""Make a record's tables and pictures again from its logs, check them, or start a record from a sweep.

    python make_record.py records/2026-11-22_spectral_lr_tiny            # all again, in place
    python make_record.py records/2026-11-22_spectral_lr_tiny --check    # elsewhere, and compared
    python make_record.py records/mine --new sweeps/mine.toml --also "plot_lr_analysis.py mine.toml --out ."

A record is a folder with a README.md written by hand, the sweep's file, its manifest and logs in logs/, and
record.toml. Its `commands` are tools of this project, called in that folder, which make all the rest:

    commands = [
        "report_sweep.py spectral_lr.toml --out .",
        "plot_spectral_sweep.py spectral_lr.toml --out spectral_sweep.png",
    ]

--new copies a sweep's file, manifest and logs from logs/ into a new record, writes its record.toml with
report_sweep.py and the commands that --also gives, and calls them. Logs, and RUN_ID.manifold.jsonl beside
them, are compressed (.xz, which every tool here reads). The source code at the head of logs is kept only
once, in logs/sources/HASH.txt.xz. --new never overwrites anything, and leaves no folder behind if a command
fails.

--check changes nothing. It exits with 1 if a table (.md .json .csv) is not, byte for byte, what the commands
make of the logs, and with 2 if the source code of a log was changed. The bytes of pictures change with
matplotlib's version and the fonts of a machine, so differences in them are reported but are no failure.
"""

import json
import lzma
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from argparse import Namespace
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line
from analysis.files import read_text, write_atomically
from analysis.manifest import Run, manifest_path, read_manifest
from analysis.run_log import SEPARATOR_WIDTH, find_log, log_stem, read_unpacked, read_with_sources

HERE = Path(__file__).resolve().parent
RECIPE = "record.toml"
TABLES = (".md", ".json", ".csv")  # what must be the same byte for byte
HEAD = "The source code that stood here is in sources/{}.txt.xz, without its last line break."


# ------------------------------------------------------------------------------------------------
# Making again
# ------------------------------------------------------------------------------------------------


def read_commands(record: Path) -> list[list[str]]:
    """Return a record's commands, split into words; ValueError unless all are tools of this project."""
    path = record / RECIPE
    try:
        commands = tomllib.loads(read_text(path)).get("commands")
    except FileNotFoundError:
        raise ValueError(
            f"no {path}, whose commands make the record: `python make_record.py --help`"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    if not isinstance(commands, list) or not commands or not all(isinstance(c, str) for c in commands):
        raise ValueError(f'{path}: wanted commands = ["report_sweep.py SWEEP.toml --out .", ...]')
    return [split(command, path) for command in commands]


def split(command: str, place: object) -> list[str]:
    """Split a command into words; ValueError, naming its place, unless it calls a tool of this project."""
    try:
        words = shlex.split(command)
    except ValueError as error:  # an unbalanced quote
        raise ValueError(f"{place}: {command}: {error}") from None
    tool = words[0] if words else "''"
    if Path(tool).name != tool or not tool.endswith(".py") or not (HERE / tool).is_file():
        raise ValueError(f"{place}: {tool} is none of the tools beside {Path(__file__).name}")
    return words


def make(record: Path) -> list[Path]:
    """Call the commands in the record's folder; return the files they wrote. ValueError if one fails."""
    return call(read_commands(record), record, record)


def call(commands: Sequence[Sequence[str]], folder: Path, record: Path) -> list[Path]:
    """Call a record's commands in a folder, the record itself or a copy; see `make`."""
    before = times(folder)
    for tool, *arguments in commands:
        done = subprocess.run(
            [sys.executable, str(HERE / tool), *arguments], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"{record}: `{shlex.join([tool, *arguments])}` failed: {done.stderr.strip()}")
    return [path for path, time in times(folder).items() if before.get(path) != time]


def times(folder: Path) -> dict[Path, int]:
    """Return when each file was written, in order of name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in files}


def check(record: Path) -> dict[Path, str]:
    """Make everything in a copy; for each file, return "the same", "differs" or "not in the record".

    OSError if a log's source code is missing or was changed.
    """
    commands = read_commands(record)
    for log in record.glob("logs/*.txt*"):
        read_with_sources(log)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / record.resolve().name
        shutil.copytree(record, copy)
        found = {}
        for path in call(commands, copy, record):
            if not (record / path).exists():
                found[path] = "not in the record"
            else:
                same = (record / path).read_bytes() == (copy / path).read_bytes()
                found[path] = "the same" if same else "differs"
        return found


# ------------------------------------------------------------------------------------------------
# A new record
# ------------------------------------------------------------------------------------------------


def start(record: Path, sweep: Path, logs: Path, also: Sequence[str]) -> list[Path]:
    """Make a record of a sweep, or nothing if that fails; return the files that the commands wrote."""
    path = manifest_path(sweep.stem, logs)
    commands = [shlex.join(["report_sweep.py", sweep.name, "--out", "."]), *also]
    for command in also:
        split(command, "--also")
    if record.exists():
        raise ValueError(f"{record} exists already; without --new its tables and pictures are made again")
    if not sweep.is_file() or not path.is_file():
        raise ValueError(f"a record is made of {sweep} and {path}: launch the sweep first")
    manifest = read_manifest(path)
    unended = sum(run.state in ("planned", "running", "submitted") for run in manifest.runs)
    if unended:
        print(f"note: {unended} of {len(manifest.runs)} runs have not ended; the record will say so")
    if b'"/' in path.read_bytes():
        print(f"note: {path.name} and the logs name folders of this machine, as in DATA_PATH")
    (record / "logs" / "sources").mkdir(parents=True)
    try:
        shutil.copyfile(sweep, record / sweep.name)
        shutil.copyfile(path, record / "logs" / path.name)
        for run in [*manifest.runs, *manifest.earlier]:
            pack_run(run, logs, record / "logs")
        lines = [f"    {json.dumps(command)}," for command in commands]
        comment = (
            f"# `python make_record.py records/{record.resolve().name}` makes all this again but README.md"
        )
        write_atomically(record / RECIPE, "\n".join([comment, "commands = [", *lines, "]", ""]))
        return make(record)
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(record)
        raise


def pack_run(run: Run, logs: Path, folder: Path) -> None:
    """Compress a run's log, and its measurements of the manifold, into a folder, if it has them."""
    log = find_log(logs, Path(run.log).name) if run.log else None
    if log is None:
        return
    pack_log(log, folder)
    measured = find_log(logs, f"{log_stem(log)}.manifold.jsonl")
    if measured:
        pack(read_unpacked(measured), folder / f"{log_stem(log)}.manifold.jsonl")


def pack_log(path: Path, folder: Path) -> Path:
    """Write a log, compressed, into a folder; its source code, if it names its files, into folder/sources."""
    data = read_with_sources(path)  # of a log packed before, too
    source, line, rest = data.partition(b"\n" + b"=" * SEPARATOR_WIDTH)
    if line and data.startswith(b"# file: "):
        name = sha256(source).hexdigest()[:16]
        kept = folder / "sources" / f"{name}.txt.xz"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            pack(source, kept.with_suffix(""))
        data = HEAD.format(name).encode() + line + rest
    return pack(data, folder / f"{log_stem(path)}.txt")


def pack(data: bytes, path: Path) -> Path:
    """Write path.xz."""
    packed = path.with_name(f"{path.name}.xz")
    packed.write_bytes(lzma.compress(data, preset=9))
    return packed


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def report_check(record: Path) -> int:
    """Print what `check` found; return 1 if a table is not what the logs give."""
    found = check(record)
    wrong = [path for path, word in found.items() if word != "the same" and path.suffix in TABLES]
    for path, word in found.items():
        if word == "differs" and path not in wrong:
            word += " (a picture: another matplotlib, or other fonts?)"
        print(f"{path}: {word}")
    if wrong:
        print(f"{len(wrong)} tables are not what `python make_record.py {record}` makes of the logs")
    return int(bool(wrong))


def make_record(options: Namespace) -> int:
    """Make, check or start a record; return the exit code."""
    if options.check and options.new:
        raise ValueError("--check is of a record that exists, --new of one that does not")
    if options.also and not options.new:
        raise ValueError(f"--also goes with --new; later, add commands to {options.record / RECIPE}")
    if options.check:
        return report_check(options.record)
    if options.new:
        made = start(options.record, options.new, options.logs, options.also)
    else:
        made = make(options.record)
    for path in made:
        print(options.record / path)
    readme = options.record / "README.md"
    if not readme.exists():
        print(f"{readme} is yours to write: what was asked, run, found, and not shown")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.make_parser(__doc__)
    parser.add_argument("record", type=Path, help="the record's folder, records/YYYY-MM-DD_NAME")
    parser.add_argument(
        "--check", action="store_true", help="compare, change nothing; exit code 1: a table differs"
    )
    parser.add_argument("--new", type=Path, metavar="SWEEP.toml", help="start the record from this sweep")
    parser.add_argument(
        "--also", action="append", default=[], metavar="COMMAND", help="another command, with --new"
    )
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="where --new finds manifest and logs")
    return command_line.run(make_record, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
