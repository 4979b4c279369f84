"""The one reader of training logs: text -> RunLog. numpy only, so that tools which use it start at once.

    from analysis.run_log import read_log, read_runs, group_by_arm, LogFollower
    run = read_log("logs/my-run.txt")[0]        # a list: some public logs hold several trials
    run.val.step, run.val.loss, run.val.time_ms, run.final_val_loss, run.state, run.config["seed"]
    run.columns["lr_mul"].step, run.columns["lr_mul"].value, run.columns["spec_attn"].value.shape
    run.first_at(3.28)                          # first validation at or below 3.28, or None

Understood are our own logs, the public speedrun's logs of every age (several trials in a file, times in ms
or s, `step_avg:nanms`), any other order of keys, and llm.c's lines (`s:250 tel:3.45`, `s:250 trl:3.6`).
A log may be compressed (run.txt.xz, run.txt.gz), as in records/.
A log begins with the source code of its trainer, which contains lines that look like steps; see
`LogParser._read_chunk` for how they are told apart. No content makes the reader fail: what it cannot read is
counted in `RunLog.unread_lines`. Times are in milliseconds, losses in nats a token, steps are integers.
"""

import gzip
import hashlib
import json
import lzma
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# Settings that say what is recorded, not what is trained; two runs that differ only here are repeats.
NOT_TRAINING = frozenset(
    ["seed", "run_id", "resume", "save_every", "manifold_every", "target_loss", "nproc_per_node", "rehearse"]
    + ["val_loss_every", "val_loss_last_steps", "val_loss_every_last"]
)
OPENERS = {".xz": lzma.open, ".gz": gzip.open}  # how a compressed log is read, by its suffix
END_EVENTS = ("finished", "stopped", "crashed", "diverged")
SEPARATOR_WIDTH = 80  # ours and the public logs write 100 '='; nothing else in them is this long
BLOCK_LINES = 2048  # lines parsed at once: a line that cannot be read slows down its block only
MIN_LAYOUT_LINES = 32  # fewer lines of one layout are not worth an array


# ------------------------------------------------------------------------------------------------
# What a log becomes
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """One `event:NAME key:value ...` line. Values are strings; `after_step` is the last step before it."""

    name: str
    fields: dict[str, str]
    after_step: int


@dataclass(frozen=True)
class Column:
    """One logged quantity: `value[i]` (a row for a list) was logged at `step[i]`; steps strictly increase."""

    step: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Curve:
    """Losses over steps (strictly increasing); arrays of one length, NaN where a log does not say."""

    step: np.ndarray
    loss: np.ndarray
    time_ms: np.ndarray
    tokens: np.ndarray
    acc: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    @staticmethod
    def empty() -> "Curve":
        none = np.zeros(0)
        return Curve(none.astype(np.int64), none, none, none, none)


@dataclass(frozen=True)
class Point:
    """One validation: step, loss, and training time in ms and tokens (NaN if not logged)."""

    step: int
    loss: float
    time_ms: float
    tokens: float


@dataclass
class RunLog:
    """One trial of one log.

    `state` is what the log itself says: running, finished, stopped, crashed, diverged, or unknown (a log
    without events and without a number of steps). Whether a running one has stalled its file's age can tell.
    """

    path: Path | None
    run_id: str
    trial: int = 0
    script: str = ""
    config: dict = field(default_factory=dict)
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
        """The run_id as it was given: without the number of the trial that sets trials of one file apart."""
        return self.run_id.removesuffix(f"#{self.trial + 1}")

    @property
    def settings(self) -> dict:
        """The configuration without its nested parts: setting name in lower case -> value."""
        return {key: value for key, value in self.config.items() if not isinstance(value, dict)}

    @property
    def final_val_loss(self) -> float:
        """The last validation's loss, NaN if there is none. Of an unfinished run too: look at `state`."""
        return float(self.val.loss[-1]) if len(self.val) else float("nan")

    @property
    def best_val_loss(self) -> float:
        """The lowest validation loss, NaN if there is none."""
        finite = self.val.loss[np.isfinite(self.val.loss)]
        return float(finite.min()) if len(finite) else float("nan")

    @property
    def target_loss(self) -> float | None:
        """The run's own TARGET_LOSS, None if it has none."""
        value = self.config.get("target_loss")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def last_time_ms(self) -> float:
        """Training time at the last line that gives one, in ms; NaN if none does."""
        times = self.columns.get("train_time")
        return float(times.value[-1]) if times is not None and len(times.value) else float("nan")

    def first_at(self, target: float) -> Point | None:
        """The first validation whose loss is at or below `target`, or None."""
        met = np.flatnonzero(self.val.loss <= target)
        if not len(met):
            return None
        i, val = met[0], self.val
        return Point(int(val.step[i]), float(val.loss[i]), float(val.time_ms[i]), float(val.tokens[i]))

    def event(self, name: str) -> Event | None:
        """The last event of that name, or None."""
        return next((event for event in reversed(self.events) if event.name == name), None)


# ------------------------------------------------------------------------------------------------
# Reading files
# ------------------------------------------------------------------------------------------------


def parse_log(data: bytes | str, path: str | Path | None = None) -> list[RunLog]:
    """The runs in the text of one log, at least one (perhaps empty). Never fails on content."""
    parser = LogParser(path)
    parser.feed(data.encode(errors="replace") if isinstance(data, str) else bytes(data))
    parser.finish()
    return parser.runs()


def read_log(path: str | Path) -> list[RunLog]:
    """The runs in one log file. An OSError, such as FileNotFoundError, if the file cannot be read."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a log: name a file in it, as {path}/RUN_ID.txt")
    try:
        data = read_unpacked(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no log {path}: logs are logs/RUN_ID.txt; see `ls {path.parent}`") from None
    return parse_log(data, path)


def read_unpacked(path: Path) -> bytes:
    """A file's bytes, unpacked if its name ends in .xz or .gz; OSError if it cannot be read or unpacked."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            return file.read()
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise OSError(f"{path} is damaged, or not compressed as its name says: {error}") from None


def log_stem(path: Path) -> str:
    """The name of a log's file without .txt, .txt.xz or .txt.gz."""
    return Path(path.stem).stem if path.suffix in OPENERS else path.stem


def find_log(folder: str | Path, name: str) -> Path | None:
    """The file of that name (RUN_ID.txt) in a folder, plain or compressed; None if there is none."""
    paths = [Path(folder) / f"{name}{suffix}" for suffix in ("", *OPENERS)]
    return next((path for path in paths if path.is_file()), None)


def read_runs(paths: str | Path | Iterable[str | Path]) -> list[RunLog]:
    """The runs of a folder (see `list_logs`), of a file, or of several of either."""
    if isinstance(paths, (str, Path)):
        paths = [paths]
    runs = []
    for path in map(Path, paths):
        for log in list_logs(path) if path.is_dir() else [path]:
            runs += read_log(log)
    return runs


def list_logs(folder: str | Path) -> list[Path]:
    """The logs directly in a folder, by name: its .txt, and its .txt.xz and .txt.gz that lie there alone."""
    endings = (".txt", *(f".txt{suffix}" for suffix in OPENERS))
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if entry.name.endswith(endings) and entry.is_file()}
    plain = {name for name in names if name.endswith(".txt")}
    alone = {name for name in names - plain if os.path.splitext(name)[0] not in plain}
    return [Path(folder) / name for name in sorted(plain | alone)]


def newest_log(folder: str | Path) -> Path | None:
    """The log written to last, or None if the folder is missing or has none."""
    logs = list_logs(folder) if Path(folder).is_dir() else []
    return max(logs, key=lambda log: log.stat().st_mtime, default=None)


# ------------------------------------------------------------------------------------------------
# Runs that belong together
# ------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """Runs that differ only in what does not change the training: the seed, names, how often is measured."""

    label: str
    key: str
    runs: list[RunLog]

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]


def arm_key(run: RunLog) -> str:
    """Equal for two runs that differ only in the seed and in what is recorded. The source hash is not in it.

    The same file names with other data in them are another training. A log without configuration (a public
    one) is known by its source and length: trials of one script are one arm. Without source, by its path.
    """
    if run.config:
        started = run.event("started")
        data = [started.fields.get(name) for name in ("train_data", "val_data")] if started else []
        training = {key: value for key, value in run.config.items() if key not in NOT_TRAINING}
        return json.dumps([run.script, training, data], sort_keys=True, default=str)
    return json.dumps([run.source_hash, run.num_steps] if run.source_hash else [str(run.path)])


def group_by_arm(runs: Iterable[RunLog]) -> tuple[list[Arm], list[str]]:
    """Arms in order of first appearance, labelled by what sets them apart, and notes for the user.

    Runs of equal settings whose source code differs are kept apart, and a note says so: the same settings may
    mean another training there.
    """
    groups: dict[tuple[str, str], list[RunLog]] = {}
    for run in runs:
        groups.setdefault((arm_key(run), run.source_hash), []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    sources: dict[str, list[str]] = {}
    for key, source in groups:
        sources.setdefault(key, []).append(source)
    arms, notes = [], []
    for (key, source), members, label in zip(groups, groups.values(), labels, strict=True):
        if len(sources[key]) > 1 and members[0].config:
            label = f"{label} (source {source[:8] or 'unknown'})"
        elif labels.count(label) > 1:
            label = f"{label} ({members[0].run_id})"
        arms.append(Arm(label, key, members))
    for key, hashes in sources.items():
        if len(hashes) > 1:
            names = ", ".join(groups[key, source][0].run_id for source in hashes)
            notes.append(f"equal settings but {len(hashes)} different sources, not pooled: {names}")
    for arm in arms:
        for seed, count in Counter(seed for seed in arm.seeds if seed is not None).items():
            if count > 1:
                notes.append(
                    f"{arm.label}: {count} runs of seed {seed}; repeats show the machine's noise alone"
                )
    return arms, notes


def _labels(runs: list[RunLog]) -> list[str]:
    """What sets each run apart: the settings that differ, else its script, else its name."""
    trainings = [{k: v for k, v in run.settings.items() if k not in NOT_TRAINING} for run in runs]
    known = [
        training for training in trainings if training
    ]  # a public log has none: it is called by its name
    names = sorted(set().union(*known))
    missing = object()
    differing = [n for n in names if len({repr(training.get(n, missing)) for training in known}) > 1]
    scripts_differ = len({run.script for run in runs if run.config}) > 1
    labels = []
    for run, training in zip(runs, trainings, strict=True):
        parts = [Path(run.script).stem] if scripts_differ and run.script else []
        parts += [f"{name}={format_value(training[name])}" for name in differing if name in training]
        labels.append(" ".join(parts) if parts and run.config else run.run_id)
    return labels


def format_value(value: object) -> str:
    """A setting as the user typed it: 0.1, 1,1.52,1.73,1, true as 1."""
    if isinstance(value, (list, tuple)):
        return ",".join(format_value(item) for item in value)
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------
# Step lines, many at once
# ------------------------------------------------------------------------------------------------

_NUMBER = rb"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|[nN][aA][nN]|[iI][nN][fF])"
_FIELD = re.compile(rb" +([A-Za-z_][\w./-]*):(\[[^\[\]]*\]|[^\s\[\]]\S*)")
_SCALAR = re.compile(rb"(%s)(ms|s|%%)?" % _NUMBER)
_LIST = re.compile(rb"\[ *(%s(?: *, *%s)*) *\]" % (_NUMBER, _NUMBER))
_ITEM = re.compile(_NUMBER)
_STEP = re.compile(rb"step:(\d{1,12})/(\d{1,12})(?= )")
_LLMC_STEP = re.compile(rb"s:(\d{1,12})(?= (?:tel|trl|eval):)")
_TORN = re.compile(rb"step:\d+/\d+ |event:")  # where a whole line begins within a torn one
_LLMC_NAMES = {b"tel": "val_loss", b"trl": "train_loss"}
_TO_MS = {b"ms": 1.0, b"s": 1000.0, b"%": 1.0, b"": 1.0}
_BLANKS = bytes.maketrans(b"/ms%[],\n", b" " * 8)
_NUMERALS = b"0123456789.-+"
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_EMPTY_SLOTS = (b"  ", b" \n", b" m", b" s", b" %", b" /", b"/ ")
_EMPTY_LIST_SLOTS = (b"[,", b",,", b",]", b"[]", b", ")


@dataclass
class _Field:
    """One `key:value` of a line: its key as written, its value (float, list of floats or str), its unit.

    `spans` are the begin and end of each of its numbers in the line.
    """

    raw: bytes
    value: float | list[float] | str
    unit: bytes = b""
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Rows:
    """Lines with the same keys, as arrays: their line numbers, steps, totals (-1: not given), and values."""

    order: np.ndarray
    step: np.ndarray
    total: np.ndarray
    values: dict[str, np.ndarray]

    def take(self, chosen: np.ndarray) -> "_Rows":
        values = {key: value[chosen] for key, value in self.values.items()}
        return _Rows(self.order[chosen], self.step[chosen], self.total[chosen], values)

    @property
    def is_val(self) -> bool:
        return "val_loss" in self.values


def _split_line(line: bytes) -> tuple[int, int, list[_Field]] | None:
    """Step, number of steps (-1: not given) and fields of one line; None if any part of it cannot be read."""
    head = _STEP.match(line) or _LLMC_STEP.match(line)
    if head is None or _TORN.search(line, 1):
        return None
    fields, position, end = [], head.end(), len(line.rstrip())
    while position < end:
        match = _FIELD.match(line, position)
        if match is None:
            return None
        raw, text = match.groups()
        scalar = _SCALAR.fullmatch(text)
        begin = match.start(2)
        if scalar:
            unit = scalar[2] or b""
            span = (begin, begin + len(scalar[1]))
            fields.append(_Field(raw, float(scalar[1]) * _TO_MS[unit], unit, [span]))
        elif text.startswith(b"["):
            numbers = _LIST.fullmatch(text)
            if numbers is None:
                return None
            spans = [(begin + item.start(), begin + item.end()) for item in _ITEM.finditer(text)]
            fields.append(_Field(raw, [float(line[a:b]) for a, b in spans], b"", spans))
        else:
            fields.append(_Field(raw, text.decode(errors="replace")))
        position = match.end()
    total = int(head[2]) if head.re is _STEP else -1
    return (int(head[1]), total, fields) if fields else None


def _name(raw: bytes) -> str:
    return _LLMC_NAMES.get(raw) or raw.decode(errors="replace")


def _rows_of_line(line: bytes, order: int) -> _Rows | None:
    """One line, read with care: the reference for `_rows_of_alike`, and what it falls back on."""
    parts = _split_line(line)
    if parts is None:
        return None
    step, total, fields = parts
    values = {}
    for item in fields:
        kind = object if isinstance(item.value, str) else np.float64
        values[_name(item.raw)] = np.array([item.value], dtype=kind)
    return _Rows(np.array([order]), np.array([step]), np.array([total]), values)


def _rows_of_same_layout(lines: list[bytes], order: list[int]) -> _Rows | None:
    """Lines which differ only in which digit stands where, at once: every number has its fixed place.

    None if there is something but numbers in them. Digits are read as one integer below 2**53 and divided by
    a power of ten, which rounds exactly as reading the number does.
    """
    parts = _split_line(lines[0])
    if parts is None or any(not item.spans for item in parts[2]):
        return None
    table = np.frombuffer(b"".join(lines), np.uint8).reshape(len(lines), -1)
    first, fields = lines[0], parts[2]
    spans = [span for item in fields for span in item.spans]
    head = _STEP.match(first) or _LLMC_STEP.match(first)
    spans += [head.span(number) for number in range(1, head.re.groups + 1)]
    is_number = np.zeros(table.shape[1], bool)
    for begin, end in spans:
        is_number[begin:end] = True
    if not (table[:, ~is_number] == table[0, ~is_number]).all():  # a digit in a key differs
        return None
    values = {}
    for item in fields:
        columns = [_read_digits(table, lines, *span) for span in item.spans]
        columns = [_to_ms(column, item.unit) for column in columns]
        values[_name(item.raw)] = np.stack(columns, 1) if isinstance(item.value, list) else columns[0]
    step = _read_digits(table, lines, *head.span(1)).astype(np.int64)
    total = np.full(len(lines), -1)
    if head.re is _STEP:
        total = _read_digits(table, lines, *head.span(2)).astype(np.int64)
    return _Rows(np.array(order), step, total, values)


def _to_ms(values: np.ndarray, unit: bytes) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values * _TO_MS[unit]


def _read_digits(table: np.ndarray, lines: list[bytes], begin: int, end: int) -> np.ndarray:
    """The numbers that stand at bytes `begin` to `end` of each line."""
    text = lines[0][begin:end]
    whole, _, decimals = text.lstrip(b"+-").partition(b".")
    digits = whole + decimals
    if not digits.isdigit() or len(digits) > 15:  # an exponent, nan, inf, or too long to be exact
        return np.array([float(line[begin:end]) for line in lines])
    places = [i for i in range(begin, end) if table[0, i] >= 48]
    powers = 10.0 ** np.arange(len(digits) - 1, -1, -1)
    values = (table[:, places] - 48.0) @ powers / 10.0 ** len(decimals)
    return -values if text.startswith(b"-") else values


def _rows_of_alike(lines: list[bytes], order: list[int]) -> _Rows | None:
    """Lines which are equal but for their numerals, at once; None if that cannot be shown to be safe.

    Keys are struck out, units and brackets blanked, and numpy reads the numbers that remain. This is sound:
    no colon is left, so every key was one of the first line's; no place for a number is empty, even if digits
    slipped past a unit (`a:1ms2 b:`); and so, if the count is right, each place holds exactly one number.
    """
    parts = _split_line(lines[0])
    if parts is None or any(not item.spans for item in parts[2]):
        return None
    num_lines, fields, num_fixed = len(lines), parts[2], 2 if parts[1] >= 0 else 1
    text = b"\n".join(lines) + b"\n"
    for item in fields:
        text = text.replace(b" " + item.raw + b":", b" ")
    text = text.replace(b"step:" if num_fixed == 2 else b"s:", b"")
    slots = _EMPTY_SLOTS + (_EMPTY_LIST_SLOTS if b"[" in text else ())
    if b":" in text or any(slot in text for slot in slots):
        return None
    numbers = _numbers(text.translate(_BLANKS))
    if numbers is None or len(numbers) != num_lines * (num_fixed + sum(len(item.spans) for item in fields)):
        return None
    return _rows_of_table(numbers.reshape(num_lines, -1), order, num_fixed, fields)


def _numbers(text: bytes) -> np.ndarray | None:
    """The numbers of a blank-separated text; None if it holds anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # older numpy only warns of what it could not read
        try:
            return np.fromstring(text, dtype=np.float64, sep=" ")
        except (ValueError, DeprecationWarning):
            return None


def _rows_of_table(table: np.ndarray, order: list[int], num_fixed: int, fields: list[_Field]) -> _Rows | None:
    fixed = table[:, :num_fixed]
    if not ((fixed >= 0) & (fixed < 1e12) & (fixed == np.floor(fixed))).all():
        return None
    step = fixed[:, 0].astype(np.int64)
    total = fixed[:, 1].astype(np.int64) if num_fixed == 2 else np.full(len(table), -1)
    values, at = {}, num_fixed
    for item in fields:
        columns = _to_ms(table[:, at : at + len(item.spans)], item.unit)
        values[_name(item.raw)] = columns if isinstance(item.value, list) else columns[:, 0]
        at += len(item.spans)
    return _Rows(np.array(order), step, total, values)


def _rows_of_group(lines: list[bytes], order: list[int]) -> tuple[list[_Rows], list[int]]:
    """Rows of lines that are equal but for their numerals, and the places of those that could not be read.

    Three ways, each slower and more general than the one before; they agree, and a test says so.
    """
    batches, unread, rest = [], [], list(range(len(lines)))
    if len(lines) >= MIN_LAYOUT_LINES:
        layouts: dict[bytes, list[int]] = {}
        for i, layout in enumerate(b"\n".join(lines).translate(_DIGITS_TO_ZERO).split(b"\n")):
            layouts.setdefault(layout, []).append(i)
        rest = []
        for places in layouts.values():
            rows = None
            if len(places) >= MIN_LAYOUT_LINES:
                rows = _rows_of_same_layout([lines[i] for i in places], [order[i] for i in places])
            if rows is None:
                rest += places
            else:
                batches.append(rows)
        rest.sort()
    for begin in range(0, len(rest), BLOCK_LINES):
        block = rest[begin : begin + BLOCK_LINES]
        rows = None
        if len(block) > 3:
            rows = _rows_of_alike([lines[i] for i in block], [order[i] for i in block])
        if rows is not None:
            batches.append(rows)
            continue
        for i in block:
            rows = _rows_of_line(lines[i], order[i])
            if rows is None:
                unread.append(order[i])
            else:
                batches.append(rows)
    return batches, unread


def _merge(batches: list[_Rows]) -> list[_Rows]:
    """As few batches as there are sets of keys (and kinds of value)."""
    groups: dict[tuple, list[_Rows]] = {}
    for rows in batches:
        shape = tuple((key, value.dtype, value.shape[1:]) for key, value in sorted(rows.values.items()))
        groups.setdefault(shape, []).append(rows)
    merged = []
    for group in groups.values():
        if len(group) > 1:
            values = {key: np.concatenate([rows.values[key] for rows in group]) for key in group[0].values}
            fixed = [
                np.concatenate([getattr(rows, name) for rows in group]) for name in ("order", "step", "total")
            ]
            group = [_Rows(*fixed, values)]
        merged.append(group[0])
    return merged


class _Columns(Mapping):
    """Key -> Column, put together when asked for: a plot needs few of the thirty columns of a log."""

    def __init__(self, batches: list[_Rows]):
        self._batches = batches
        self._known: dict[str, Column] = {}
        self._keys = list(dict.fromkeys(key for rows in batches for key in rows.values))

    def __getitem__(self, key: str) -> Column:
        if key not in self._known:
            batches = [rows for rows in self._batches if key in rows.values]
            if not batches:
                raise KeyError(key)
            step, chosen = _sorted_steps(batches)
            self._known[key] = Column(step, _stack([rows.values[key] for rows in batches])[chosen])
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _sorted_steps(batches: list[_Rows]) -> tuple[np.ndarray, np.ndarray]:
    """Steps in increasing order, and which row gives each: the last written where several do."""
    if not batches:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    step = np.concatenate([rows.step for rows in batches])
    if (step[1:] > step[:-1]).all():
        return step, np.arange(len(step))
    by_line = np.argsort(np.concatenate([rows.order for rows in batches]), kind="stable")
    by_step = by_line[np.argsort(step[by_line], kind="stable")]
    step = step[by_step]
    last = np.append(step[1:] != step[:-1], True)
    return step[last], by_step[last]


def _stack(values: list[np.ndarray]) -> np.ndarray:
    """One array of several. Short lists are filled up with NaN, and so is a word among numbers."""
    words = [value.dtype == object for value in values]
    if all(words):
        return np.concatenate(values)
    values = [np.full(len(v), np.nan) if is_word else v for v, is_word in zip(values, words, strict=True)]
    if len({value.shape[1:] for value in values}) > 1:
        width = max(value.shape[1] if value.ndim == 2 else 1 for value in values)
        wide = []
        for value in values:
            value = value if value.ndim == 2 else value[:, None]
            wide.append(np.pad(value, ((0, 0), (0, width - value.shape[1])), constant_values=np.nan))
        values = wide
    return np.concatenate(values)


def _curve(batches: list[_Rows], loss: str) -> Curve:
    """The rows that give `loss`, with their time, tokens and accuracy."""
    batches = [rows for rows in batches if loss in rows.values and rows.values[loss].dtype != object]
    batches = [rows for rows in batches if rows.values[loss].ndim == 1]
    step, chosen = _sorted_steps(batches)

    def gather(key: str) -> np.ndarray:
        parts = []
        for rows in batches:
            value = rows.values.get(key)
            known = value is not None and value.ndim == 1 and value.dtype != object
            parts.append(value if known else np.full(len(rows.step), np.nan))
        return np.concatenate(parts)[chosen] if parts else np.zeros(0)

    return Curve(step, gather(loss), gather("train_time"), gather("tokens"), gather("val_acc"))


# ------------------------------------------------------------------------------------------------
# A whole log
# ------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    config: dict
    batches: list[_Rows] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    num_steps: int = -1
    last_val: int = -1  # last step of a validation line, and of any other step line
    last_other: int = -1

    @property
    def last_step(self) -> int:
        return max(self.last_val, self.last_other)

    def drop_after(self, step: int) -> None:
        """Forget what was done after `step`: training went back there and does it again."""
        kept = [rows.take(rows.step <= step) for rows in self.batches]
        self.batches = [rows for rows in kept if len(rows.step)]
        self.last_val = max((int(rows.step.max()) for rows in self.batches if rows.is_val), default=-1)
        self.last_other = max((int(rows.step.max()) for rows in self.batches if not rows.is_val), default=-1)


class LogParser:
    """Reads a log piece by piece: `feed` bytes as they come, `runs()` at any time.

    A last line without its newline is kept for later; `finish` says that no more will come. With `recent`,
    only that many of the lines without a validation are read of each feed, the last ones: twice as fast, for
    who needs no training curve.
    """

    def __init__(self, path: str | Path | None = None, recent: int | None = None):
        self.path = Path(path) if path is not None else None
        self._recent = recent
        self._partial = b""  # a line whose end has not come yet
        self._held = b""  # source code whose closing separator has not come yet
        self._source = b""
        self._header_seed: int | None = None
        self._line_number = 0
        self._last_skeletons: set[bytes] = set()
        self._reset()

    def _reset(self) -> None:
        self._config: dict = {}
        self._trials = [_Trial({})]
        self._restart_at: int | None = None  # events from here on belong to the next trial, if one begins
        self._resumed_unknown = False
        self._chunk_empty = True  # no line but blank ones since the last separator
        self._chunk_steps = False
        self._chunk_unread = 0
        self._chunk_examples = 0
        self._unread = 0
        self._examples: list[str] = []

    def feed(self, data: bytes) -> None:
        """Reads what has come since: any bytes, cut anywhere."""
        data = self._partial + data
        end = data.rfind(b"\n") + 1
        self._partial, data = data[end:], data[:end]
        begin = 0
        for line_begin, line_end in _separators(data):
            self._read_chunk(data[begin:line_begin], True)
            begin = line_end
        self._read_chunk(data[begin:], False)

    def finish(self) -> None:
        """No more will come: takes a last line without newline if it is surely whole, counts what is held.

        Surely whole is a step line that ends in a unit or a bracket and has the form of an earlier one: of
        `val_loss:3.27` nobody knows whether a digit is missing.
        """
        line, self._partial = self._partial.rstrip(b"\r"), b""
        if line.endswith((b"s", b"]", b"%")) and line.translate(None, _NUMERALS) in self._last_skeletons:
            self._read_lines(line)
        if self._held:  # cut off inside its own source: nothing in there is a step
            self._count_unread(b"(the log ends inside the source code at its head)", self._held.count(b"\n"))
            self._held = b""

    def _read_chunk(self, chunk: bytes, closed: bool) -> None:
        """Reads the text between two lines of '='; `closed`: the second one has come.

        Source code is known by having both imports and definitions at the beginning of lines. From its first
        line on, everything up to the closing separator is source and never steps, whatever it looks like. In
        a log that was appended to, steps come before that source in the same chunk.
        """
        text, self._held = self._held + chunk, b""
        begin = _source_begin(text)
        self._read_lines(text if begin < 0 else text[:begin])
        if begin >= 0 and closed:
            self._source = text[begin:]
        elif begin >= 0:
            self._held = text[begin:]
        if not closed:
            return
        if not self._chunk_steps:  # versions, nvidia-smi and the like: a header, not unread steps
            self._unread -= self._chunk_unread
            del self._examples[self._chunk_examples :]
            seed = re.search(rb"^(?:Using )?seed[:=] ?(\d{1,12})$", text, re.MULTILINE)
            self._header_seed = int(seed[1]) if seed else self._header_seed
        self._chunk_empty, self._chunk_steps = True, False
        self._chunk_unread, self._chunk_examples = 0, len(self._examples)

    def _read_lines(self, text: bytes) -> None:
        """Reads whole lines that are not source. Step lines wait to be read together until an event comes."""
        if not text:
            return
        lines = text.split(b"\n")
        skeletons = text.translate(None, _NUMERALS).split(b"\n")
        groups: dict[bytes, list[int]] = {}
        if not lines[-1]:
            lines.pop()
            skeletons.pop()
        for i, skeleton in enumerate(skeletons):
            if skeleton in groups:
                groups[skeleton].append(i)
            elif _is_special(skeleton, lines[i]):
                self._read_steps(groups, lines)
                groups = {}
                self._read_special(lines[i], i + self._line_number)
            elif skeleton.startswith((b"step:/ ", b"s: t", b"s: e")) and not _is_torn(skeleton):
                groups[skeleton] = [i]
            elif skeleton and not skeleton.isspace() and not lines[i].startswith(b"peak memory "):
                self._count_unread(lines[i])
                self._chunk_empty = False
        self._read_steps(groups, lines)
        self._line_number += len(lines)

    def _read_steps(self, groups: dict[bytes, list[int]], lines: list[bytes]) -> None:
        batches: list[_Rows] = []
        for skeleton, places in groups.items():
            if self._recent is not None and b" val_loss:" not in skeleton and b" tel:" not in skeleton:
                places = places[-self._recent :]
            group, unread = _rows_of_group(
                [lines[i] for i in places], [i + self._line_number for i in places]
            )
            batches += group
            if group:
                self._last_skeletons.add(skeleton)
            for place in unread:
                self._count_unread(lines[place - self._line_number])
        self._file(batches)

    def _count_unread(self, line: bytes, count: int = 1) -> None:
        self._unread += count
        self._chunk_unread += count
        if len(self._examples) < 3:
            self._examples.append(line[:200].decode(errors="replace"))

    def _read_special(self, line: bytes, place: int) -> None:
        """A line that must not wait: an event, a configuration, or a line torn by a crash.

        To a torn line the first line of the resumed run was appended; that one is saved.
        """
        if line.startswith(b"event:"):
            self._read_event(line)
        elif line.startswith(b"config:"):
            self._read_config(line)
        else:
            self._count_unread(line)
            whole = line[list(_TORN.finditer(line, 1))[-1].start() :]
            if whole.startswith(b"event:"):
                self._read_event(whole)
            else:
                rows = _rows_of_line(whole, place)  # None if that one is torn, too
                self._file([rows] if rows else [])

    def _read_config(self, line: bytes) -> None:
        try:
            config = json.loads(line[len(b"config:") :])
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict) or not self._chunk_empty:  # it opens a header, or is none
            self._count_unread(line)
            self._chunk_unread -= 1  # this one counts in a header, too
            self._chunk_examples = len(self._examples)
            return
        if not self._config:
            self._reset()  # the first header of a log of ours: what seemed steps before it was source
        self._config, self._chunk_empty = config, False
        if self._trials[-1].last_step < 0:
            self._trials[-1].config = config

    def _read_event(self, line: bytes) -> None:
        name, fields = _event_parts(line.decode(errors="replace"))
        self._chunk_empty = False
        if not name:
            self._count_unread(line)
            return
        trial = self._trials[-1]
        if name == "started" and trial.last_step >= 0 and self._restart_at is None:
            self._restart_at = len(trial.events)
        if name == "resumed":
            self._restart_at = None
            trial.config = self._config or trial.config
            step = fields.get("step", "").partition("/")[0]
            self._resumed_unknown = not re.fullmatch("[0-9]{1,12}", step)
            if not self._resumed_unknown:
                trial.drop_after(int(step))
        trial.events.append(Event(name, fields, trial.last_step))

    def _file(self, batches: list[_Rows]) -> None:
        """Files rows under their trial, opening a new one wherever the steps begin anew."""
        if not batches:
            return
        self._chunk_empty, self._chunk_steps = False, True
        first = min(batches, key=lambda rows: rows.order[0])
        trial = self._trials[-1]
        if self._resumed_unknown:
            trial.drop_after(int(first.step[0]) - 1)
            self._resumed_unknown = False
        if self._config:  # only a second start that did not resume begins anew
            anew = self._restart_at is not None and int(first.step[0]) <= trial.last_step
            borders = [int(first.order[0])] if anew else []
            self._restart_at = self._restart_at if anew else None
        else:
            borders = _new_trials(batches, trial)
        pieces = [batches]
        if borders:
            pieces = [[] for _ in range(len(borders) + 1)]
            for rows in batches:
                which = np.searchsorted(borders, rows.order, side="right")
                for number in np.unique(which):
                    pieces[number].append(rows.take(which == number))
        for number, piece in enumerate(pieces):
            if number:
                self._open_trial()
            trial = self._trials[-1]
            trial.batches += piece
            for rows in piece:
                trial.num_steps = int(rows.total[-1])
                last = "last_val" if rows.is_val else "last_other"
                setattr(trial, last, max(getattr(trial, last), int(rows.step.max())))

    def _open_trial(self) -> None:
        old, new = self._trials[-1], _Trial(self._config)
        if self._restart_at is not None:
            old.events, new.events = old.events[: self._restart_at], old.events[self._restart_at :]
            self._restart_at = None
        self._trials.append(new)

    def runs(self) -> list[RunLog]:
        """The runs read so far, at least one."""
        return [self._run(number, trial) for number, trial in enumerate(self._trials)]

    def _run(self, number: int, trial: _Trial) -> RunLog:
        trial.batches = _merge(trial.batches)
        config = trial.config
        started = next((event.fields for event in trial.events if event.name == "started"), {})
        stem = log_stem(self.path) if self.path else ""
        run_id = str(config.get("run_id") or stem)
        source_hash = str(config.get("source_hash") or started.get("source_hash") or "")
        if not source_hash and self._source:
            source_hash = hashlib.sha256(self._source).hexdigest()[:16]
        seed = config.get("seed", started.get("seed", self._header_seed))
        return RunLog(
            path=self.path,
            run_id=run_id if len(self._trials) == 1 else f"{run_id}#{number + 1}",
            trial=number,
            script=str(config.get("script") or started.get("script") or ""),
            config=config,
            source_hash=source_hash,
            seed=int(seed) if re.fullmatch(r"-?\d{1,18}", str(seed)) else None,
            num_steps=self._num_steps(trial),
            last_step=trial.last_step,
            state=self._state(trial, is_last=number == len(self._trials) - 1),
            val=_curve(trial.batches, "val_loss"),
            train=_curve(trial.batches, "train_loss"),
            columns=_Columns(trial.batches),
            events=list(trial.events),
            unread_lines=self._unread,
            unread_examples=list(self._examples) if self._unread else [],
        )

    def _num_steps(self, trial: _Trial) -> int | None:
        if trial.num_steps >= 0:
            return trial.num_steps
        value = trial.config.get("num_steps")
        if value is None:
            parts = [trial.config.get(f"num_{name}_iterations") for name in ("scheduled", "extension")]
            value = sum(parts) if all(type(part) is int for part in parts) else None
        return value if type(value) is int else None

    def _state(self, trial: _Trial, is_last: bool) -> str:
        state = None
        for event in trial.events:
            if event.name in END_EVENTS:
                state = event.name
            elif event.name in ("started", "resumed"):
                state = None
        if state:
            return state
        if not trial.config and trial.num_steps >= 0 and trial.last_step >= trial.num_steps:
            return "finished"  # a public log has no events, only its last step
        if not is_last:
            return "stopped"
        return "running" if trial.config or trial.num_steps >= 0 else "unknown"


def _separators(data: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end (with newline) of each line that is nothing but many '='."""
    position = data.find(b"=" * SEPARATOR_WIDTH)
    while position >= 0:
        begin, end = data.rfind(b"\n", 0, position) + 1, data.index(b"\n", position) + 1
        if not data[begin:end].strip().strip(b"="):
            yield begin, end
        position = data.find(b"=" * SEPARATOR_WIDTH, end)


def _is_torn(skeleton: bytes) -> bool:
    """Whether a step line without its digits holds the beginning of another line."""
    return skeleton.startswith(b"s") and (b"event:" in skeleton or b"step:/ " in skeleton[1:])


def _is_special(skeleton: bytes, line: bytes) -> bool:
    """Whether a line, given without and with its digits, must be read before those that follow."""
    if skeleton.startswith((b"event:", b"config:")):
        return line.startswith((b"event:", b"config:"))
    return _is_torn(skeleton) and _TORN.search(line, 1) is not None


def _source_begin(text: bytes) -> int:
    """Where Python source begins in `text`, -1 if it holds none."""

    def first(*openings: bytes) -> int:
        places = [0 if text.startswith(word) else text.find(b"\n" + word) + 1 or -1 for word in openings]
        return min((place for place in places if place >= 0), default=-1)

    if first(b"import ", b"from ") < 0 or first(b"def ", b"class ") < 0:
        return -1
    return first(b'"""', b'r"""', b"'''", b"#", b"import ", b"from ", b"def ", b"class ")


_EVENT_FIELD = re.compile(
    r"""(?:^|\ )(?: (\w+):("(?:[^"\\]|\\.)*")(?=\ |$)  # a JSON string
      | (error|message|reason|text):(.*)                 # prose: to the end of the line
      | (\w+):(\S*(?:\ +(?!\w+:)\S+)*) )               # anything else: up to the next key""",
    re.VERBOSE,
)


def _event_parts(line: str) -> tuple[str, dict[str, str]]:
    """Name and fields of an event line; an empty name if it is none."""
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
        fields.setdefault(quoted_key or prose_key or key, (value or prose).strip())
    return name, fields


def _new_trials(batches: list[_Rows], trial: _Trial) -> list[int]:
    """Line numbers at which a log without events starts over: steps fall back, or their total changes.

    A validation line may repeat the step of the training line before it, so the two kinds are followed apart.
    """
    order = np.concatenate([rows.order for rows in batches])
    rows_in_order = np.argsort(order)
    order = order[rows_in_order]
    step = np.concatenate([rows.step for rows in batches])[rows_in_order]
    total = np.concatenate([rows.total for rows in batches])[rows_in_order]
    is_val = np.concatenate([np.full(len(rows.step), rows.is_val) for rows in batches])[rows_in_order]
    has_rows = trial.last_step >= 0
    candidates = [(order[i], -1) for i in np.flatnonzero(total[1:] != total[:-1]) + 1]
    if has_rows and total[0] != trial.num_steps:
        candidates.append((order[0], -1))
    for chosen, last, margin in ((is_val, trial.last_val, 0), (~is_val, trial.last_other, -1)):
        lines, steps = order[chosen], step[chosen]
        previous = np.concatenate([[last], steps[:-1]])
        before = np.concatenate([[-1], lines[:-1]])
        back = (steps - previous <= margin) & (previous >= 0)
        candidates += zip(lines[back], before[back], strict=True)
    borders: list[int] = []
    for line, line_before in sorted(candidates):
        if not borders or (line > borders[-1] and (line_before < 0 or line_before >= borders[-1])):
            borders.append(int(line))
    return borders


# ------------------------------------------------------------------------------------------------
# Logs that are still being written
# ------------------------------------------------------------------------------------------------


@dataclass
class FollowedLog:
    """One file under watch: its runs so far, its time of writing (s since 1970), why it is unreadable."""

    path: Path
    runs: list[RunLog] = field(default_factory=list)
    mtime: float = 0.0
    error: str = ""
    parser: LogParser = field(default_factory=LogParser)
    identity: tuple = ()  # device and inode: another file of the same name is another log
    offset: int = 0
    tail: bytes = b""  # what stood before `offset`: if it changed, the file was rewritten


class LogFollower:
    """Follows the logs of a folder, reading only what is new.

    >>> follower = LogFollower("logs")
    >>> changed = follower.poll()       # paths that are new, longer, rewritten or gone
    >>> follower.logs[path].runs        # [RunLog, ...]
    """

    TAIL = 256

    def __init__(self, folder: str | Path, recent: int | None = None):
        self.folder = Path(folder)
        self._recent = recent  # as for LogParser
        self.logs: dict[Path, FollowedLog] = {}

    def poll(self) -> list[Path]:
        """Reads what has been written since the last call; a missing folder has no logs."""
        try:
            with os.scandir(self.folder) as entries:
                found = {Path(entry.path): entry for entry in entries if entry.name.endswith(".txt")}
        except (FileNotFoundError, NotADirectoryError):
            found = {}
        changed = [path for path in self.logs if path not in found]
        for path in changed:
            del self.logs[path]
        for path in sorted(found):
            try:
                status = os.stat(path)
                if not os.path.isfile(path):
                    continue
            except OSError:
                continue  # gone between the listing and now
            if self._read_new(path, status):
                changed.append(path)
        return changed

    def _read_new(self, path: Path, status: os.stat_result) -> bool:
        log = self.logs.get(path)
        identity = (status.st_dev, status.st_ino)
        if log and log.identity == identity and log.offset == status.st_size and log.mtime == status.st_mtime:
            return False
        if log is None or log.identity != identity:
            log = FollowedLog(path, parser=LogParser(path, self._recent), identity=identity)
        try:
            with open(path, "rb") as file:
                file.seek(log.offset - len(log.tail))
                data = file.read()
                if not data.startswith(log.tail):  # rewritten in place, or cut
                    log = FollowedLog(path, parser=LogParser(path, self._recent), identity=identity)
                    file.seek(0)
                    data = file.read()
        except OSError as error:
            self.logs[path] = FollowedLog(path, log.runs, status.st_mtime, str(error))
            return True
        new = data[len(log.tail) :]
        log.parser.feed(new)
        log.offset += len(new)
        log.tail = data[-self.TAIL :]
        log.mtime, log.error = status.st_mtime, ""
        log.runs = log.parser.runs()
        self.logs[path] = log
        return True
