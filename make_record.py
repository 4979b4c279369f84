"""Makes a record's tables and pictures again from its logs, checks them, or starts one from a finished sweep.

    python make_record.py records/2026-11-22_spectral_lr_tiny            # all again, in place
    python make_record.py records/2026-11-22_spectral_lr_tiny --check    # elsewhere, and compared
    python make_record.py records/2026-12-01_moe_lr --new sweeps/moe_lr.toml --also plot_lr_analysis.py

A record is a folder with a README.md written by hand, the sweep's file, its manifest and logs in logs/, and
record.toml, whose `commands` are the tools of this project that make the rest, called in that folder:

    commands = [
        "report_sweep.py spectral_lr.toml --out .",
        "plot_spectral_sweep.py spectral_lr.toml --out spectral_sweep.png",
    ]

--new copies a sweep's file, manifest and logs from logs/ into a new record, writes its record.toml, and calls
the commands. Logs, and the RUN_ID.manifold.jsonl beside them, are compressed (.xz, which every tool here
reads); the source code at the heads of logs, the same in all runs, is kept once, in
logs/sources/HASH.txt.xz, if its hash is the one that the run logged.
--also adds a command; the sweep's file, if it names none, is put in, and `--out .` if it has no --out. --new
never overwrites anything.

--check changes nothing, and exits with 1 if a table (.md .json .csv) is not what the commands make of the
logs, byte for byte. The bytes of pictures change with matplotlib's version and the fonts of a machine: they
are compared, too, but differences are only told.
"""

import argparse
import json
import lzma
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from analysis import style
from analysis.run_log import SEPARATOR_WIDTH, find_log, log_stem, read_log, read_unpacked

HERE = Path(__file__).resolve().parent
RECIPE = "record.toml"
TABLES = (".md", ".json", ".csv")  # what must be the same byte for byte
HEAD = "The source code that stood here is in sources/{}.txt.xz, without its last line break."


# ------------------------------------------------------------------------------------------------
# Making again
# ------------------------------------------------------------------------------------------------


def read_commands(record: Path) -> list[list[str]]:
    """The commands of a record, in words; ValueError if there are none, or one is no tool of this project."""
    path = record / RECIPE
    try:
        commands = tomllib.loads(path.read_text()).get("commands")
    except FileNotFoundError:
        raise ValueError(
            f"no {path}, whose commands make the record: `python make_record.py --help`"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    if not isinstance(commands, list) or not commands or not all(isinstance(c, str) for c in commands):
        raise ValueError(f'{path}: wanted commands = ["report_sweep.py SWEEP.toml --out .", ...]')
    words = [shlex.split(command) for command in commands]
    for word, *_ in words:
        if Path(word).name != word or not word.endswith(".py") or not (HERE / word).is_file():
            raise ValueError(f"{path}: {word} is none of the tools beside {Path(__file__).name}")
    return words


def make(record: Path) -> list[Path]:
    """Calls the commands in the record's folder; the files they wrote. ValueError if one fails."""
    commands, before = read_commands(record), times(record)
    for tool, *arguments in commands:
        done = subprocess.run(
            [sys.executable, str(HERE / tool), *arguments], cwd=record, capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"{record}: `{shlex.join([tool, *arguments])}` failed: {done.stderr.strip()}")
    return [path for path, time in times(record).items() if before.get(path) != time]


def times(folder: Path) -> dict[Path, int]:
    """When each file was written, in order of name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in files}


def check(record: Path) -> dict[Path, str]:
    """Makes everything in a copy: by file, whether it is "the same", "differs" or is "not in the record"."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / record.resolve().name
        shutil.copytree(record, copy)
        found = {}
        for path in make(copy):
            if not (record / path).exists():
                found[path] = "not in the record"
            else:
                same = (record / path).read_bytes() == (copy / path).read_bytes()
                found[path] = "the same" if same else "differs"
        return found


# ------------------------------------------------------------------------------------------------
# A new record
# ------------------------------------------------------------------------------------------------


def start(record: Path, sweep: Path, logs: Path, also: Sequence[str]) -> list[str]:
    """Copies a sweep's file, manifest and logs, and writes the recipe; remarks for the user."""
    manifest = logs / f"{sweep.stem}.sweep.json"
    if record.exists():
        raise ValueError(f"{record} exists already; without --new its tables and pictures are made again")
    if not sweep.is_file() or not manifest.is_file():
        raise ValueError(f"a record is made of {sweep} and {manifest}: launch the sweep first")
    data = json.loads(manifest.read_text())
    runs, remarks = [*data["runs"], *data.get("earlier", [])], []
    unended = sum(run.get("state") in ("planned", "running", "submitted") for run in data["runs"])
    if unended:
        remarks.append(f"{unended} of {len(data['runs'])} runs have not ended; the record will say so")
    (record / "logs" / "sources").mkdir(parents=True)
    shutil.copyfile(sweep, record / sweep.name)
    shutil.copyfile(manifest, record / "logs" / manifest.name)
    for run in runs:
        log = find_log(logs, Path(run["log"]).name) if run.get("log") else None
        if log:
            pack_log(log, record / "logs")
            measurement = f"{log_stem(log)}.manifold.jsonl"
            if measured := find_log(logs, measurement):
                pack(read_unpacked(measured), record / "logs" / measurement)
    if b'"/' in manifest.read_bytes():
        remarks.append(f"{manifest.name} and the logs name folders of this machine, as in DATA_PATH")
    commands = [f"report_sweep.py {sweep.name} --out .", *(complete(c, sweep.name) for c in also)]
    lines = [f"    {json.dumps(command)}," for command in commands]
    comment = f"# `python make_record.py records/{record.resolve().name}` makes all this again but README.md"
    style.write_text("\n".join([comment, "commands = [", *lines, "]", ""]), record / RECIPE)
    return remarks


def complete(command: str, sweep: str) -> str:
    """A command with the sweep's file and a place to write to."""
    tool, *arguments = shlex.split(command)
    if not any(word.endswith(".toml") for word in arguments):
        arguments.insert(0, sweep)
    return shlex.join([tool, *arguments, *(() if "--out" in arguments else ("--out", "."))])


def pack_log(path: Path, folder: Path) -> Path:
    """A log, compressed, in a folder; its source code, if its hash is the log's, once in folder/sources."""
    data = read_unpacked(path)
    source, line, rest = data.partition(b"\n" + b"=" * SEPARATOR_WIDTH)
    name = sha256(source).hexdigest()[:16]
    if line and name == read_log(path)[-1].source_hash:
        kept = folder / "sources" / f"{name}.txt.xz"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            pack(source, kept.with_suffix(""))
        data = HEAD.format(name).encode() + line + rest
    return pack(data, folder / f"{log_stem(path)}.txt")


def pack(data: bytes, path: Path) -> Path:
    """Written to path.xz, compressed."""
    packed = path.with_name(f"{path.name}.xz")
    packed.write_bytes(lzma.compress(data, preset=9))
    return packed


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def report_check(record: Path) -> int:
    """Prints what `check` found; 1 if a table is not what the logs give."""
    found = check(record)
    wrong = [path for path, word in found.items() if word != "the same" and path.suffix in TABLES]
    for path, word in found.items():
        picture = word == "differs" and path not in wrong
        print(f"{path}: {word}{' (a picture: another matplotlib, or other fonts?)' if picture else ''}")
    if wrong:
        print(f"{len(wrong)} tables are not what `python make_record.py {record}` makes of the logs")
    return int(bool(wrong))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="the record's folder, records/YYYY-MM-DD_NAME")
    parser.add_argument(
        "--check", action="store_true", help="compare, change nothing; exit code 1: a table differs"
    )
    parser.add_argument("--new", type=Path, metavar="SWEEP.toml", help="start the record from this sweep")
    parser.add_argument(
        "--also", action="append", default=[], metavar="COMMAND", help="another tool, with --new"
    )
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="where --new finds manifest and logs")
    options = parser.parse_args(arguments)
    try:
        if options.check and options.new:
            raise ValueError("--check is of a record that exists, --new of one that does not")
        if options.also and not options.new:
            raise ValueError(f"--also goes with --new; later, add commands to {options.record / RECIPE}")
        if options.new:
            for remark in start(options.record, options.new, options.logs, options.also):
                print(f"note: {remark}")
        if options.check:
            return report_check(options.record)
        for path in make(options.record):
            print(options.record / path)
        if not (options.record / "README.md").exists():
            print(
                f"{options.record / 'README.md'} is yours to write: what was asked, run, found, and not shown"
            )
    except (ValueError, OSError) as error:
        return style.complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
