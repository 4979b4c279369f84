"""The only reader of training logs: text -> RunLog. Needs only numpy, so that commands start fast.

    from analysis.run_log import read_log, read_runs, LogFollower
    run = read_log("logs/my-run.txt")[0]        # a list: some public logs hold several trials
    run.val.step, run.val.loss, run.val.time_ms, run.final_val_loss, run.state, run.config["seed"]
    run.columns["lr_mul"].step, run.columns["lr_mul"].value, run.columns["spec_attn"].value.shape
    run.last("tokens")                          # the last number logged under that key, NaN if none
    run.first_at(3.28)                          # first validation at or below 3.28, or None

It reads our own logs, all generations of the public speedrun's logs (several trials in a file, times in ms or
s, `step_avg:nanms`), keys in any order, and llm.c's lines (`s:250 tel:3.45`, `s:250 trl:3.6`). A log may be
compressed (run.txt.xz, run.txt.gz), as in records/.

A log begins with the source code of its trainer, which contains lines that look like steps;
`_LogParser._read_chunk` distinguishes them, and analysis/step_lines.py reads the steps. No content makes the
reader fail: unreadable lines are counted in `RunLog.unread_lines`. Times are in milliseconds, losses in nats
per token, steps are integers.
"""

import contextlib
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from analysis.shown import clean
from analysis.step_lines import Column, Curve, StepColumns, StepLine, parse_step

# Settings that change what is recorded, or where a run happens, but not the training; for logs without an
# `affects:{...}` line.
_RECORDING = ["run_id", "resume", "save_every", "save_model", "manifold_every", "target_loss"]
_RECORDING += ["diverged_above", "val_loss_every", "val_loss_every_last", "val_loss_last_steps"]
_MACHINE = ["data_path", "nproc_per_node", "compile", "kernels", "attn_backend", "dist_timeout", "rehearse"]
AFFECTS = {"recording": _RECORDING, "machine": _MACHINE}
OPENERS = {".xz": lzma.open, ".gz": gzip.open}  # for compressed logs, by suffix
END_EVENTS = ("finished", "stopped", "crashed", "diverged")
FINISHED = ("finished", "unknown")  # states; llm.c's logs do not say whether they are complete: assume so
SEPARATOR_WIDTH = 80  # our logs and the public ones write 100 '='; no other line of '=' is this long
MAX_EXAMPLES = 3  # distinct unreadable lines kept as examples
EXAMPLE_LETTERS = 200  # kept of each
_SOURCE_OPENING = re.compile(rb"""^(?:r?\"{3}|'{3}|#|import |from |def |class )""", re.MULTILINE)
_EMBEDDED_FILE = re.compile(rb"\n?# file: (\S+), (\d{1,9}) bytes\n")
_SOURCES_MOVED = re.compile(rb"The source code that stood here is in (sources/\w+\.txt\.xz)[^\n]*\n")


# ------------------------------------------------------------------------------------------------
# Contents of a log
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Line `event:NAME key:value ...`. Values are strings; `after_step` is the last step before it."""

    name: str
    fields: dict[str, str]
    after_step: int


@dataclass(frozen=True)
class Point:
    """Validation: step, loss, training time in ms, and tokens (NaN if not logged)."""

    step: int
    loss: float
    time_ms: float
    tokens: float


@dataclass
class RunLog:
    """Training run, as read from its log.

    `state` is running, finished, stopped, crashed, diverged, or unknown (a log without events and number of
    steps). A run that hangs or was killed still says running; only the age of its file shows it.
    `affects` maps "recording" and "machine" to the settings that change these, but not the training.
    """

    path: Path | None
    run_id: str
    trial: int = 0
    script: str = ""
    config: dict = field(default_factory=dict)
    affects: Mapping[str, Sequence[str]] = field(default_factory=lambda: AFFECTS)
    source_hash: str = ""
    seed: int | None = None
    num_steps: int | None = None
    last_step: int = -1
    state: str = "unknown"
    val: Curve = field(default_factory=Curve.empty)
    train: Curve = field(default_factory=Curve.empty)
    columns: Mapping[str, Column] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    unread_lines: int = 0
    unread_examples: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """User's run_id, without the number that distinguishes trials in one file."""
        return self.run_id.removesuffix(f"#{self.trial + 1}")

    @property
    def settings(self) -> dict:
        """Configuration without its nested parts: setting name in lower case -> value."""
        return {key: value for key, value in self.config.items() if not isinstance(value, dict)}

    @property
    def flat_config(self) -> dict:
        """Configuration with its nested parts beside the settings: model_facts.width."""
        flat = {}
        for name, value in self.config.items():
            if isinstance(value, dict):
                flat |= {f"{name}.{key}": item for key, item in value.items()}
            else:
                flat[name] = value
        return flat

    @property
    def not_training(self) -> frozenset[str]:
        """Names of the settings that do not distinguish arms: seed, recording, machine."""
        return not_training(self.affects)

    @property
    def final_val_loss(self) -> float:
        """Loss of the last validation, NaN if there is none. Unfinished runs have one, too: check `state`."""
        return float(self.val.loss[-1]) if len(self.val) else math.nan

    @property
    def best_val_loss(self) -> float:
        """Lowest validation loss, NaN if there is none."""
        finite = self.val.loss[np.isfinite(self.val.loss)]
        return float(finite.min()) if len(finite) else math.nan

    @property
    def target_loss(self) -> float | None:
        """Run's own TARGET_LOSS, None if it has none."""
        value = self.config.get("target_loss")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def last_time_ms(self) -> float:
        """Last logged training time in ms; NaN if there is none."""
        return self.last("train_time")

    def numbers(self, key: str) -> Column | None:
        """Return a quantity logged as one number per step; None if it is not logged, or as lists or words."""
        column = self.columns.get(key)
        return column if column is not None and column.is_numeric else None

    def last(self, key: str) -> float:
        """Return the last number logged under `key`; NaN if there is none."""
        column = self.numbers(key)
        return math.nan if column is None else float(column.value[-1])

    def first_at(self, target: float) -> Point | None:
        """Return the first validation with a loss at or below `target`, or None."""
        met = np.flatnonzero(self.val.loss <= target)
        if not len(met):
            return None
        i, val = met[0], self.val
        return Point(int(val.step[i]), float(val.loss[i]), float(val.time_ms[i]), float(val.tokens[i]))

    def event(self, name: str) -> Event | None:
        """Return the last event of that name, or None."""
        return next((event for event in reversed(self.events) if event.name == name), None)

    @property
    def started(self) -> dict[str, str]:
        """Fields of the last `event:started`: versions, device, data; empty if the log has none."""
        event = self.event("started")
        return event.fields if event else {}


def not_training(affects: Mapping[str, Sequence[str]] = AFFECTS) -> frozenset[str]:
    """Return the names of the settings that do not distinguish arms: seed, recording, machine."""
    return frozenset(["seed"]).union(*affects.values())


# ------------------------------------------------------------------------------------------------
# Reading files
# ------------------------------------------------------------------------------------------------


def parse_log(data: bytes | str, path: str | Path | None = None) -> list[RunLog]:
    """Parse the runs in a log's text, at least one (perhaps empty). No content makes it fail."""
    return _LogParser(path).parse(data.encode(errors="replace") if isinstance(data, str) else bytes(data))


def read_log(path: str | Path) -> list[RunLog]:
    """Read the runs in a log file. Raises OSError, such as FileNotFoundError, if the file cannot be read."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a log: name a file in it, as {path}/RUN_ID.txt")
    try:
        data = read_unpacked(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no log {path}: logs are logs/RUN_ID.txt; see `ls {path.parent}`") from None
    return parse_log(data, path)


def read_unpacked(path: Path) -> bytes:
    """Read a file, decompressed if its name ends in .xz or .gz. Raises OSError if that fails."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            return file.read()
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise OSError(f"{path} is damaged, or not compressed as its name says: {error}") from None


def embedded_sources(path: str | Path) -> dict[str, bytes]:
    """Extract the source files at the beginning of a log, name -> exact bytes.

    Each follows a line `# file: NAME, N bytes`. Raises ValueError if the log has no such line, ends within a
    file, or names a file outside the folder it would be unpacked to.
    """
    path = Path(path)
    data, found, at = read_with_sources(path), {}, 0
    while match := _EMBEDDED_FILE.match(data, at):
        name, size = match[1].decode(errors="replace"), int(match[2])
        source = data[match.end() : match.end() + size]
        if len(source) < size:
            raise ValueError(
                f"{path} ends within {name}: {len(source)} bytes, wanted {size}; the log was cut"
            )
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path} names a source file {name!r}; wanted a path inside the project")
        found[name] = source
        at = match.end() + size
    if not found:
        raise ValueError(
            f"{path} does not say which source files it embeds: wanted a first line `# file: NAME, N bytes`; "
            "older logs have all source code in one piece, up to the first line of '='"
        )
    if not data[at : at + SEPARATOR_WIDTH + 1].lstrip(b"\n").startswith(b"=" * (SEPARATOR_WIDTH - 1)):
        raise ValueError(f"{path}: no line of '=' after {list(found)[-1]}; the counts of bytes are wrong")
    return found


def read_with_sources(path: Path) -> bytes:
    """Read a log's bytes, decompressed, and restore source code that a record keeps beside its logs.

    Raises OSError if that source code is missing or does not match its name, the start of its SHA-256.
    """
    data = read_unpacked(path)
    moved = _SOURCES_MOVED.match(data)
    if not moved:
        return data
    kept = path.parent / moved[1].decode()
    source = read_unpacked(kept)
    found, wanted = hashlib.sha256(source).hexdigest()[:16], log_stem(kept)
    if found != wanted:
        raise OSError(f"{kept} was changed: its SHA-256 starts with {found}, not {wanted} as in its name")
    return source + b"\n" + data[moved.end() :]


def log_stem(path: Path) -> str:
    """Return a log's file name without .txt, .txt.xz or .txt.gz."""
    return Path(path.stem).stem if path.suffix in OPENERS else path.stem


def find_log(folder: str | Path, name: str) -> Path | None:
    """Find the log of this name (RUN_ID.txt) in a folder, plain or compressed; None if there is none."""
    paths = [Path(folder) / f"{name}{suffix}" for suffix in ("", *OPENERS)]
    return next((path for path in paths if path.is_file()), None)


def read_runs(paths: str | Path | Iterable[str | Path]) -> list[RunLog]:
    """Read the runs in a folder, in a file, or in several folders and files (see `named_logs`)."""
    return [run for log in named_logs(paths) for run in read_log(log)]


def named_logs(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """List the logs named and those in the folders named; one that is named twice, or also packed, once."""
    found: dict[tuple[Path, str], Path] = {}
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        for log in list_logs(path) if path.is_dir() else [path]:
            found.setdefault((log.parent.resolve(), log_stem(log)), log)
    return list(found.values())


def list_logs(folder: str | Path) -> list[Path]:
    """List the logs directly in a folder by name; a compressed one only if its .txt is missing."""
    endings = (".txt", *(f".txt{suffix}" for suffix in OPENERS))
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if entry.name.endswith(endings) and entry.is_file()}
    plain = {name for name in names if name.endswith(".txt")}
    alone = {name for name in names - plain if os.path.splitext(name)[0] not in plain}
    return [Path(folder) / name for name in sorted(plain | alone)]


def newest_log(folder: str | Path) -> Path | None:
    """Return the most recently written log; None if the folder is missing or has no log."""
    logs = list_logs(folder) if Path(folder).is_dir() else []
    return max(logs, key=lambda log: log.stat().st_mtime, default=None)


def format_value(value: object) -> str:
    """Format a setting as the user typed it: 0.1; 1,1.52,1.73,1; true as 1."""
    if isinstance(value, (list, tuple)):
        return ",".join(format_value(item) for item in value)
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------
# A whole log
# ------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """Run whose log is being read."""

    config: dict
    header: dict = field(default_factory=dict)  # "source_hash" and "seed" of a log without configuration
    lines: list[StepLine] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    num_steps: int = -1  # from its last step line
    last_val: int = -1  # step of the last validation line
    last_other: int = -1  # step of the last line of any other kind

    @property
    def last_step(self) -> int:
        return max(self.last_val, self.last_other)

    def starts_over(self, line: StepLine) -> bool:
        """True if a line belongs to the next trial: its step goes back, or the number of steps changes.

        A validation may repeat the step of the training line before it, so each kind of line is compared
        with its own.
        """
        is_val = "val_loss" in line.values
        last = self.last_val if is_val else self.last_other
        falls_back = last >= 0 and (line.step <= last if is_val else line.step < last)
        return falls_back or (self.last_step >= 0 and line.num_steps != self.num_steps)

    def add(self, line: StepLine) -> None:
        self.lines.append(line)
        if "val_loss" in line.values:
            self.last_val = max(self.last_val, line.step)
        else:
            self.last_other = max(self.last_other, line.step)

    def drop_after(self, step: int) -> None:
        """Forget the lines after `step`, where training resumes and repeats these steps."""
        old, self.lines, self.last_val, self.last_other = self.lines, [], -1, -1
        for line in old:
            if line.step <= step:
                self.add(line)

    def planned_steps(self) -> int | None:
        """Number of steps from the step lines, else from the configuration; None if neither gives it."""
        if self.num_steps >= 0:
            return self.num_steps
        value = self.config.get("num_steps")
        if value is None:
            parts = [self.config.get(f"num_{name}_iterations") for name in ("scheduled", "extension")]
            value = sum(parts) if all(type(part) is int for part in parts) else None
        return value if type(value) is int else None

    def state(self, is_last: bool) -> str:
        """Return the state of a RunLog. `is_last`: no other trial follows in the log."""
        state = None
        for event in self.events:
            if event.name in END_EVENTS:
                state = event.name
            elif event.name in ("started", "resumed"):
                state = None
        if state:
            return state
        if not self.config and self.num_steps >= 0 and self.last_step >= self.num_steps:
            return "finished"  # a public log has no events, only its last step
        if not is_last:
            return "stopped"
        return "running" if self.config or self.num_steps >= 0 else "unknown"


@dataclass
class _Chunk:
    """State of the text since the last line of '='."""

    is_blank: bool = True
    has_steps: bool = False
    unread: list[str] = field(default_factory=list)  # lines


class _LogParser:
    """Parser of one log, for `parse_log`."""

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path is not None else None
        self._header: dict = {}  # of the next trial
        self._reset()

    def _reset(self) -> None:
        self._config: dict = {}
        self._affects: dict[str, list[str]] = {}
        self._trials = [_Trial({}, self._header)]
        self._chunk = _Chunk()
        self._unread: list[str] = []  # lines in earlier chunks

    def parse(self, data: bytes) -> list[RunLog]:
        """Return the runs in a log, at least one.

        A last line without a newline may be half written. It counts if it is surely complete: a step line
        that ends in a unit or a bracket and has the keys of an earlier line. After `val_loss:3.27` a digit
        may be missing.
        """
        end = data.rfind(b"\n") + 1
        data, last_line = data[:end], data[end:].decode(errors="replace").rstrip("\r")
        begin = 0
        for line_begin, line_end in _separators(data):
            self._read_chunk(data[begin:line_begin], True)
            begin = line_end
        self._read_chunk(data[begin:], False)
        last = parse_step(last_line) if last_line.endswith(("s", "]", "%")) else None
        earlier = (line.values.keys() for trial in self._trials for line in trial.lines)
        if last and any(keys == last.values.keys() for keys in earlier):
            self._add_step(last)
        return [self._run(number, trial) for number, trial in enumerate(self._trials)]

    def _read_chunk(self, text: bytes, closed: bool) -> None:
        """Read text after a line of '='. `closed`: another such line follows it.

        Text is source code if it has lines that begin with imports and with definitions. From its first line
        to the closing separator all is source, even lines that look like steps. In a log that was appended
        to, steps precede that source in the same chunk.
        """
        begin = _source_begin(text)
        text, source = text[:begin], text[begin:]
        self._read_lines(text)
        if source and closed:
            self._read_header({"source_hash": hashlib.sha256(source).hexdigest()[:16]})
        elif source:
            message = "(the log ends inside the source code at its head)"
            self._chunk.unread += [message] * source.count(b"\n")
        if closed:
            self._close_chunk(text)

    def _close_chunk(self, text: bytes) -> None:
        """End a chunk; `text` is its text outside of source code."""
        if self._chunk.has_steps:
            self._unread += self._chunk.unread
        else:  # a header, with versions, nvidia-smi and the like, which need not be readable
            if seed := re.search(rb"^(?:Using )?seed[:=] ?(\d{1,12})$", text, re.MULTILINE):
                self._read_header({**self._header, "seed": int(seed[1])})
        self._chunk = _Chunk()

    def _read_header(self, header: dict) -> None:
        """Keep a header for the next trial; it is also the last one's, if that has no step yet."""
        self._header = header
        if self._trials[-1].last_step < 0:
            self._trials[-1].header = header

    def _read_lines(self, text: bytes) -> None:
        """Read whole lines that are not source."""
        for line in text.decode(errors="replace").split("\n"):
            if step_line := parse_step(line):
                self._add_step(step_line)
            elif line and not line.isspace():
                self._read_line(line)

    def _read_line(self, line: str) -> None:
        """Read a line that is not a step line."""
        if line.startswith("event:"):
            self._read_event(line)
        elif line.startswith("config:"):
            self._read_config(line)
        elif line.startswith("affects:") and self._config and not self._chunk.has_steps:
            self._read_affects(line)
        elif not line.startswith("peak memory "):
            self._chunk.unread.append(line)
            self._chunk.is_blank = False

    def _add_step(self, line: StepLine) -> None:
        """Add a step line to its trial; in a log without configuration, steps start over in a new trial."""
        self._chunk.is_blank, self._chunk.has_steps = False, True
        if not self._config and self._trials[-1].starts_over(line):
            self._trials.append(_Trial({}, self._header))
        self._trials[-1].num_steps = line.num_steps
        self._trials[-1].add(line)

    def _read_config(self, line: str) -> None:
        """Read a configuration, which must directly follow a line of '='."""
        config = _json_object(line[len("config:") :])
        if config is None or not self._chunk.is_blank:
            self._unread.append(line)  # counts even if its chunk is a header
            return
        if not self._config:
            self._reset()  # our first header: earlier step-like lines were source
        elif self._trials[-1].last_step >= 0:  # another log was appended: resumed runs write no header
            self._trials.append(_Trial(config, self._header))
        self._config, self._chunk.is_blank = config, False
        if self._trials[-1].last_step < 0:
            self._trials[-1].config = config

    def _read_affects(self, line: str) -> None:
        affects = _json_object(line[len("affects:") :])
        if affects is None or not all(map(_is_list_of_words, affects.values())):
            self._chunk.unread.append(line)
            return
        self._affects = affects

    def _read_event(self, line: str) -> None:
        name, fields = _event_parts(line)
        self._chunk.is_blank = False
        if not name:
            self._chunk.unread.append(line)
            return
        trial = self._trials[-1]
        if name == "resumed":
            step = fields.get("step", "").partition("/")[0]
            if re.fullmatch("[0-9]{1,12}", step):
                trial.drop_after(int(step))
        trial.events.append(Event(name, fields, trial.last_step))

    def _run(self, number: int, trial: _Trial) -> RunLog:
        config, header, columns = trial.config, trial.header, StepColumns(trial.lines)
        started = next((event.fields for event in trial.events if event.name == "started"), {})
        stem = log_stem(self.path) if self.path else ""
        run_id = str(config.get("run_id") or clean(stem))
        source_hash = config.get("source_hash") or started.get("source_hash") or header.get("source_hash")
        seed = config.get("seed", started.get("seed", header.get("seed")))
        unread = self._unread + self._chunk.unread
        examples = list(dict.fromkeys(line[:EXAMPLE_LETTERS] for line in unread))[:MAX_EXAMPLES]
        return RunLog(
            path=self.path,
            run_id=run_id if len(self._trials) == 1 else f"{run_id}#{number + 1}",
            trial=number,
            script=str(config.get("script") or started.get("script") or ""),
            config=config,
            affects=self._affects or AFFECTS,
            source_hash=str(source_hash or ""),
            seed=int(seed) if re.fullmatch(r"-?\d{1,18}", str(seed)) else None,
            num_steps=trial.planned_steps(),
            last_step=trial.last_step,
            state=trial.state(is_last=trial is self._trials[-1]),
            val=columns.curve("val_loss"),
            train=columns.curve("train_loss"),
            columns=columns,
            events=trial.events,
            unread_lines=len(unread),
            unread_examples=[clean(line) for line in examples],
        )


def _separators(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield begin and end (with newline) of each line of many '='."""
    position = data.find(b"=" * SEPARATOR_WIDTH)
    while position >= 0:
        begin, end = data.rfind(b"\n", 0, position) + 1, data.index(b"\n", position) + 1
        if not data[begin:end].strip().strip(b"="):
            yield begin, end
        position = data.find(b"=" * SEPARATOR_WIDTH, end)


def _source_begin(text: bytes) -> int:
    """Return where Python source begins in `text`; its length if there is none."""

    def has(*openings: bytes) -> bool:
        return text.startswith(openings) or any(b"\n" + word in text for word in openings)

    # the first test excludes steps, most of a log, from the slower ones
    if b"import" in text and has(b"import ", b"from ") and has(b"def ", b"class "):
        return _SOURCE_OPENING.search(text).start()
    return len(text)


def _json_object(text: str) -> dict | None:
    """Parse a JSON object; None if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return clean(value) if isinstance(value, dict) else None


def _is_list_of_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_EVENT_FIELD = re.compile(
    r"""(?:^|\ )(?: (\w+):("(?:[^"\\]|\\.)*")(?=\ |$)  # a JSON string
      | (error|message|reason|text):(.*)                 # prose: to the end of the line
      | (\w+):(\S*(?:\ +(?!\w+:)\S+)*) )               # anything else: up to the next key""",
    re.VERBOSE,
)


def _event_parts(line: str) -> tuple[str, dict[str, str]]:
    """Parse the name and fields of an event line; the name is empty if it is not one."""
    name, _, rest = line[len("event:") :].strip().partition(" ")
    if not re.fullmatch(r"\w+", name):
        return "", {}
    fields = {}
    for quoted_key, quoted, prose_key, prose, key, value in _EVENT_FIELD.findall(rest):
        if quoted_key:
            try:
                value = str(json.loads(quoted))
            except ValueError:
                value = quoted.strip('"')
        fields.setdefault(quoted_key or prose_key or key, clean((value or prose).strip()))
    return name, fields


# ------------------------------------------------------------------------------------------------
# Logs that are still being written
# ------------------------------------------------------------------------------------------------


@dataclass
class FollowedLog:
    """Log being followed: its runs so far, its modification time in s, and an error if it is unreadable."""

    path: Path
    runs: list[RunLog]
    mtime: float
    # inode, size, mtime of the file as read; () after an error, so that the next poll retries
    identity: tuple = ()
    error: str = ""


class LogFollower:
    """Follow logs that are being written. One that has changed is read again, whole: 40 ms for 5,000 steps.

    `paths` are folders, whose logs (.txt) are all followed, and logs, which need not exist yet. Compressed
    logs, which do not grow, are skipped. Logs may be replaced at any time.

    >>> follower = LogFollower("logs")
    >>> changed = follower.poll()       # paths that are new, changed or gone
    >>> follower.logs[path].runs        # [RunLog, ...]
    """

    def __init__(self, *paths: str | Path):
        self.paths = [Path(path) for path in paths]
        self.logs: dict[Path, FollowedLog] = {}

    def poll(self) -> list[Path]:
        """Read the logs that have changed since the last call; return them, and those that are gone."""
        before, self.logs = self.logs, {}
        for path in dict.fromkeys(self._list()):
            with contextlib.suppress(OSError):  # not written yet, or deleted since the listing
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    self.logs[path] = _read_if_changed(path, status, before.get(path))
        gone = [path for path in before if path not in self.logs]
        return gone + [path for path, log in self.logs.items() if log is not before.get(path)]

    def _list(self) -> Iterator[Path]:
        """List the logs, those of a folder by name."""
        for path in self.paths:
            for log in list_logs(path) if path.is_dir() else [path]:
                if log.suffix not in OPENERS:
                    yield log


def _read_if_changed(path: Path, status: os.stat_result, before: FollowedLog | None) -> FollowedLog:
    """Return the log as it is now; `before` itself if the file is still the same."""
    identity = (status.st_ino, status.st_size, status.st_mtime_ns)
    if before and before.identity == identity:
        return before
    try:
        return FollowedLog(path, read_log(path), status.st_mtime, identity)
    except OSError as error:
        runs = before.runs if before else []
        return FollowedLog(path, runs, status.st_mtime, error=str(error))
