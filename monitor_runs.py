"""Show a live table of runs: progress, losses, speed, and what went wrong.

    python monitor_runs.py                          # the logs in logs/; in a pipe or a file, one plain table
    python monitor_runs.py sweeps/spectral_lr.toml  # the runs of a sweep; or name folders and logs
    python monitor_runs.py --arms --by-loss         # a line for each arm, the best first
    python monitor_runs.py --filter crashed         # runs whose name, run id, sweep or state contains this
    python monitor_runs.py --once                   # one table
    python monitor_runs.py --json | jq              # objects, losses in nats per token, times in s or ms
    python monitor_runs.py --control a=0            # difference from the runs whose run id contains this

In the live table, `a` and `l` switch --arms and --by-loss on and off; `q` or Ctrl-C ends it.

Runs are called by their sweep's tags, or by the settings that tell them apart. Those of a sweep are
compared with the control that its manifest (logs/SWEEP.sweep.json) names: with the control of the same seed
if there is one, else with the mean of the controls, at the last validation that both have reached. An arm's
line has the means of its n finished runs; if none has finished, of its n runs under way, their validation
loss and difference at the last validation that all of them have reached. A run has stalled if it has not
ended and its log has not grown for --stalled-after seconds. Compressed logs, as in records/, are not shown:
`plot_loss.py` reads them.
"""

import argparse
import contextlib
import io
import math
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line
from analysis.arms import group_by_arm, unique_names
from analysis.manifest import LOGS, Manifest, Run, find_manifest, manifests_in, sweep_among
from analysis.run_log import OPENERS, LogFollower, RunLog, find_log
from analysis.shown import clean
from analysis.style import format_time, shorten_apart
from analysis.tables import as_json, format_count, format_difference, format_loss, format_number

RECENT_LINES = 50  # speed is measured over the last lines, because batch sizes change during training
WARM_UP_FACTOR = 4  # a run that has not taken a step may be silent this much longer: it compiles
SILENT_STEPS = 20  # a run of slow steps may be silent for so many of them
# The worst first.
STATE_COLOURS = {"crashed": "bold red", "diverged": "bold red", "unreadable": "red", "stalled": "yellow"}
STATE_COLOURS |= {"stopped": "magenta", "running": "green", "finished": "blue", "unknown": "dim"}
UNDER_WAY = ("running", "stalled")
LAST_LOGGED = ("peak_mem_mb", "mfu", "grad_norm")  # fields of the log whose last values are shown
# Our state for the launcher's: a killed process writes no event to its log, but the launcher sees it end.
LAUNCHER_STATES = {"crashed": "crashed", "hung": "crashed", "diverged": "diverged", "stopped": "stopped"}


# ------------------------------------------------------------------------------------------------
# Runs, and what is shown of them
# ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A run, with what its sweep and the time add to its log."""

    run: RunLog
    state: str
    message: str = ""  # what went wrong
    sweep: str = ""
    tag: str = ""
    source: str = ""  # hash of the source code of a sweep's run
    control_tag: str | None = None
    arm: str = ""  # its tag; else the settings that tell it from the others, or the run_id of the first
    name: str = ""  # its arm's, with which its seed tells it from the others; without a seed, its run_id
    controls: Sequence[RunLog] = ()
    is_control: bool = False
    age_s: float = math.nan  # since the log was last written to

    def is_asked_for(self, text: str) -> bool:
        return is_asked_for(text, self.name, self.run.run_id, self.sweep, self.state)


def record_of(rows: Sequence[Row], is_arm: bool) -> dict:
    """Return what is shown of a run, or of the runs of an arm; NaN is not known (yet). Names give units."""
    first = rows[0]
    if is_arm:
        meant = averaged(rows)
        own = {"n": len(meant), "state": states_of(rows)}
    else:
        meant = rows
        own = {
            "path": str(first.run.path),
            "run_id": first.run.run_id,
            "seed": first.run.seed,
            "state": first.state,
            "train_time_s": first.run.last_time_ms / 1000,
            "control": ", ".join(control.run_id for control in first.controls),
            "unread_lines": first.run.unread_lines,
            "message": first.message,
        }
    val_step, val_loss = last_mean([losses_by_step(row.run) for row in meant])
    compared = [curve for row in meant if (curve := differences(row))]
    paces = [pace_of(row.run) for row in meant]
    left = [seconds for seconds in map(seconds_left, rows) if math.isfinite(seconds)]
    return own | {
        "sweep": first.sweep,
        "tag": first.tag,
        "name": first.arm if is_arm else first.name,
        "step": min(max(row.run.last_step, 0) for row in meant or rows),
        "num_steps": first.run.num_steps,
        "val_step": val_step,
        "val_loss": val_loss,
        "best_val_loss": mean(row.run.best_val_loss for row in meant),
        "train_loss": mean(row.run.last("train_loss") for row in meant),
        "is_control": first.is_control,
        "difference": last_mean(compared)[1],  # negative is better
        "ms_per_step": mean(ms for ms, _ in paces),
        "tokens_per_s": mean(tokens for _, tokens in paces),
        "seconds_left": max(left, default=math.nan),
        **{key: mean(row.run.last(key) for row in meant) for key in LAST_LOGGED},
        "age_s": min(row.age_s for row in rows),
    }


def states_of(rows: Sequence[Row]) -> str:
    counts = Counter(row.state for row in rows)
    return ", ".join(f"{counts[state]} {state}" for state in STATE_COLOURS if counts[state])


def is_asked_for(text: str, name: str, run_id: str, sweep: str, state: str) -> bool:
    """Return whether --filter `text` shows a run."""
    return text in f"{name} {run_id} {sweep} {state}"


def averaged(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the runs that an arm's means are taken over: the finished ones, else those under way."""
    finished = [row for row in rows if row.state == "finished"]
    return finished or [row for row in rows if row.state in UNDER_WAY and len(row.run.val)]


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are known; NaN if there are none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def losses_by_step(run: RunLog) -> dict[int, float]:
    return dict(zip(run.val.step.tolist(), run.val.loss.tolist(), strict=True))


def last_mean(curves: Sequence[Mapping[int, float]]) -> tuple[int | None, float]:
    """Return the last step that all curves have, and their mean there; None and NaN if there is none."""
    step = max(set.intersection(*map(set, curves)), default=None) if curves else None
    return step, math.nan if step is None else mean(curve[step] for curve in curves)


def differences(row: Row) -> dict[int, float]:
    """Return loss minus the mean of the controls' by step, at validations after step 0 that a control has."""
    controls = [losses_by_step(control) for control in row.controls]
    losses = {step: loss for step, loss in losses_by_step(row.run).items() if step}
    means = {step: mean(curve.get(step, math.nan) for curve in controls) for step in losses}
    return {step: loss - means[step] for step, loss in losses.items() if math.isfinite(means[step])}


def pace_of(run: RunLog) -> tuple[float, float]:
    """Return recent milliseconds per step and tokens per second; NaN if the log does not tell."""
    curve = run.train if len(run.train) > 1 else run.val
    if len(curve) < 2:
        return math.nan, math.nan
    begin = max(0, len(curve) - RECENT_LINES)
    steps, ms, tokens = (float(a[-1] - a[begin]) for a in (curve.step, curve.time_ms, curve.tokens))
    return (ms / steps, 1000 * tokens / ms) if ms > 0 else (math.nan, math.nan)


def seconds_left(row: Row) -> float:
    """Return how long a run under way will take at its recent pace; NaN for others."""
    if row.state != "running" or row.run.num_steps is None:
        return math.nan
    return max(0, row.run.num_steps - max(row.run.last_step, 0)) * pace_of(row.run)[0] / 1000


def is_stalled(row: Row, limit: float) -> bool:
    """Return whether a run under way has been silent for too long, which is longer if its steps are slow."""
    if row.state != "running" or row.age_s <= limit:
        return False
    if row.run.last_step <= 0:
        return row.age_s > WARM_UP_FACTOR * limit
    return not row.age_s <= SILENT_STEPS * pace_of(row.run)[0] / 1000  # also if the pace is not known


def last_words(run: RunLog) -> str:
    """Return what the log says about a crash or a divergence; empty if there was none."""
    event = run.event(run.state) if run.state in ("crashed", "diverged") else None
    prose = ("error", "message", "reason")
    fields = event.fields.items() if event else ()
    return ", ".join(value if name in prose else f"{name} {value}" for name, value in fields)


def began_after(run: RunLog, ended: str | None) -> bool:
    """Return whether a run was started or resumed, by hand, after its launcher saw it end."""
    times = [event.fields.get("time", "") for event in run.events if event.name in ("started", "resumed")]
    try:
        return datetime.fromisoformat(times[-1]) > datetime.fromisoformat(ended)
    except (IndexError, TypeError, ValueError):  # one of the times is not known
        return False


# ------------------------------------------------------------------------------------------------
# Logs and sweeps
# ------------------------------------------------------------------------------------------------


class Monitor:
    """The runs in folders and logs, or of one sweep, kept up to date. ValueError if `paths` are neither.

    Folders and logs may come later.
    """

    def __init__(self, *paths: Path, logs: Path = LOGS, stalled_after: float = 300, control: str = ""):
        sweep = sweep_among(paths)
        self.name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} paths"
        self.sweep = find_manifest(sweep, logs) if sweep else None  # its manifest, which may come later
        places = [self.sweep] if sweep else paths
        self.folders = {path.parent if path.suffix in (".json", ".txt") else path for path in places}
        self.follower = LogFollower(*paths)  # a sweep's paths come with its manifest
        self.stalled_after, self.control = stalled_after, control
        self.manifests: list[Manifest] = []
        self.errors: list[str] = []  # of manifests
        self._rows: list[Row] = []

    def poll(self) -> list[Row]:
        """Return the runs as of now: those under way first, then those whose logs were written to last."""
        found = [manifests_in(folder) for folder in sorted(self.folders)]
        manifests = [manifest for readable, _ in found for manifest in readable]
        self.errors = [error for _, errors in found for error in errors]
        if self.sweep:
            manifests = [manifest for manifest in manifests if manifest.path == self.sweep]
            run_ids = [run.run_id for manifest in manifests for run in manifest.runs]
            self.follower.paths = [self.sweep.parent / f"{run_id}.txt" for run_id in run_ids]
        if self.follower.poll() or manifests != self.manifests:
            self.manifests = manifests
            self._rows = self._all_rows()
        now = time.time()
        for row in self._rows:
            row.age_s = max(0.0, now - self.follower.logs[row.run.path].mtime)
            if is_stalled(row, self.stalled_after):
                row.state = "stalled"
        return sorted(self._rows, key=place_of)

    def _all_rows(self) -> list[Row]:
        """Return the runs with all but their age, which alone changes while nothing is written."""
        planned = {run.run_id: (manifest, run) for manifest in self.manifests for run in manifest.runs}
        rows = []
        for log in self.follower.logs.values():
            for run in log.runs or [RunLog(log.path, clean(log.path.stem))]:
                rows.append(row_of(run, log.error, *planned.get(run.name, (None, None))))
        name_rows(rows)
        find_controls(rows, self.control)
        return rows

    def notes(self, rows: Sequence[Row], text: str = "") -> list[str]:
        """Return the lines below the table: failures, unread lines, errors, runs without a log.

        text: what --filter asks for.
        """
        notes, found = [], [row for row in rows if row.is_asked_for(text)]
        for row in found:
            silence = f"no line for {format_time(1000 * row.age_s)}" if row.state == "stalled" else ""
            if silence or (row.message and row.state != "stopped"):
                seed = "" if row.run.seed is None else f" seed {row.run.seed}"
                notes.append(f"{row.name}{seed} {row.state}: {row.message or silence}")
        unread = [row.run for row in found if row.run.unread_lines]
        if unread:
            lines = format_count(sum(run.unread_lines for run in unread), "line")
            logs = format_count(len(unread), "log")
            notes.append(f"{lines} could not be read in {logs}, such as {unread[0].path}")
        if self.sweep and not self.manifests:
            notes.append(f"there is no {self.sweep} yet: launch the sweep")
        sweeps, started = {row.sweep for row in rows}, {row.run.name for row in rows}
        asked = [m for m in self.manifests if self.sweep or m.sweep in sweeps or not has_ended(m)]
        return notes + self.errors + [note for m in asked if (note := note_without_logs(m, started, text))]


def row_of(run: RunLog, error: str, manifest: Manifest | None, plan: Run | None) -> Row:
    """Make the row of a run. error: of its log. manifest, plan: its sweep and what that planned, if any."""
    if plan and not run.started:  # its header is incomplete: no seed, source cut short
        run = replace(run, seed=plan.seed, source_hash="")
    row = Row(run, "unreadable" if error else run.state, error or last_words(run))
    if plan:
        row.sweep, row.tag, row.control_tag = manifest.sweep, plan.tag, manifest.control_of(plan.tag)
        row.source = run.source_hash or plan.source_hash
        is_open = row.state in ("running", "unknown")  # unknown: its log has no header yet
        if is_open and plan.state in LAUNCHER_STATES and not began_after(run, plan.ended):
            row.state = LAUNCHER_STATES[plan.state]
            row.message = plan.reason or f"launcher: {plan.state}"
    return row


def name_rows(rows: Sequence[Row]) -> None:
    """Set each row's arm and name."""
    arms, _ = group_by_arm([row.run for row in rows if not row.tag], tags={})
    labels = {id(run): arm.label for arm in arms for run in arm.runs}
    sources: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        sources.setdefault((row.sweep, row.tag), set()).add(row.source)
    for row in rows:
        row.name = row.arm = row.tag or labels[id(row.run)]
        if row.tag and len(sources[row.sweep, row.tag]) > 1:
            row.name = row.arm = f"{row.arm} (source {row.source[:8] or 'unknown'})"
    counts = Counter(row.arm for row in rows)
    unnamed = [row for row in rows if not row.tag and row.run.seed is None and counts[row.arm] > 1]
    names = unique_names([row.run.run_id for row in unnamed], [row.run for row in unnamed])
    for row, name in zip(unnamed, names, strict=True):
        row.name = name


def find_controls(rows: Sequence[Row], wanted: str) -> None:
    """Set what each row is compared with: the runs whose run id contains `wanted`, else as its sweep says."""
    chosen = [row.run for row in rows if wanted and wanted in row.run.run_id]
    by_arm: dict[tuple[str, str], list[RunLog]] = {}
    for row in rows:
        by_arm.setdefault((row.sweep, row.tag), []).append(row.run)
    for row in rows:
        controls = chosen or by_arm.get((row.sweep, row.control_tag), [])
        row.is_control = any(row.run is control for control in controls)
        if not row.is_control:
            controls = [control for control in controls if len(control.val)]
            same_seed = [run for run in controls if run.seed is not None and run.seed == row.run.seed]
            row.controls = same_seed[:1] or controls


def has_ended(manifest: Manifest) -> bool:
    """Return whether no run of a sweep is still to come or under way."""
    return all(run.state not in ("planned", "submitted", "running") for run in manifest.runs)


def note_without_logs(manifest: Manifest, started: Collection[str], text: str) -> str:
    """Count a sweep's runs without a log by state, and say why one ended; empty if there are none.

    text: what --filter asks for. started: run ids that have a row.
    """
    folder, sweep = manifest.path.parent, manifest.sweep
    runs = [run for run in manifest.runs if run.run_id not in started]
    runs = [run for run in runs if is_asked_for(text, run.tag, run.run_id, sweep, run.state)]
    runs = [run for run in runs if find_log(folder, f"{run.run_id}.txt") is None]
    if not runs:
        return ""
    states = ", ".join(f"{number} {state}" for state, number in Counter(run.state for run in runs).items())
    note = f"sweep {sweep}: {format_count(len(runs), 'run')} without a log: {states}"
    ended = sorted((run for run in runs if run.reason), key=lambda run: run.state == "stopped")
    if not ended:
        return note
    return f"{note}; {ended[0].tag} seed {ended[0].seed} {ended[0].state}: {ended[0].reason}"


def place_of(row: Row) -> tuple:
    """Return the key that sorts runs: those under way by name, then the others, the last written first."""
    if row.state in UNDER_WAY:
        return (0, row.sweep, row.name, row.run.run_id)
    return (1, row.age_s, row.run.run_id)


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


class TableColumn(NamedTuple):
    """A column of the table.

    In a narrow terminal, the columns of the lowest `rank` are left out first (of equal ranks, the left one),
    those of rank ALWAYS never.
    """

    name: str
    rank: int
    cell: Callable[[dict], str]
    justify: str = "right"


def control_cell(record: dict) -> str:
    return "control" if record["is_control"] else format_difference(record["difference"])


ALWAYS = 100
# From left to right. A new column is a value in `record_of`, or a field in LAST_LOGGED, and a line here.
COLUMNS = (
    TableColumn("run", ALWAYS, lambda record: record["name"], "left"),
    TableColumn("sweep", ALWAYS, lambda record: record["sweep"], "left"),  # if there are several
    TableColumn("n", ALWAYS, lambda record: str(record.get("n", ""))),
    TableColumn("state", ALWAYS, lambda record: record["state"], "left"),
    TableColumn("seed", 14, lambda record: "-" if record.get("seed") is None else str(record["seed"])),
    TableColumn("step", 13, lambda record: f"{record['step']}/{record['num_steps'] or '?'}"),
    TableColumn("val loss", ALWAYS, lambda record: format_loss(record["val_loss"])),
    TableColumn("vs control", 12, control_cell),
    TableColumn("best", 4, lambda record: format_loss(record["best_val_loss"])),
    TableColumn("train", 7, lambda record: format_number(record["train_loss"], ".3f")),
    TableColumn("ms/step", 10, lambda record: format_number(record["ms_per_step"], ".1f")),
    TableColumn("tokens/s", 9, lambda record: format_number(record["tokens_per_s"], ".0f")),
    # at the last step, nothing is known of the validation that is left
    TableColumn("left", 11, lambda record: format_time(1000 * record["seconds_left"] or math.nan)),
    TableColumn("peak MiB", 6, lambda record: format_number(record["peak_mem_mb"], ".0f")),
    TableColumn("MFU", 5, lambda record: format_number(record["mfu"], ".3g")),
    TableColumn("grad norm", 3, lambda record: format_number(record["grad_norm"], ".3g")),
)
GAP = 2
WHOLE_NAME = 28  # characters of a name that go before other columns
KEYS = "q end   a arms or runs   l lowest loss first"


def fit(records: Sequence[dict], width: int) -> dict[str, list[str]]:
    """Return the cells by column, of the columns that fit in `width`. A column without values is left out."""
    cells = {column.name: [column.cell(record) for record in records] for column in COLUMNS}
    cells = {name: texts for name, texts in cells.items() if set(texts) - {"", "-"}}
    if len(set(cells.get("sweep", ()))) == 1:
        del cells["sweep"]

    def needed(name: str) -> int:
        widest = max(map(len, [name, *cells[name]]))
        return GAP + (min(widest, WHOLE_NAME) if name == "run" else widest)

    for column in sorted(COLUMNS, key=lambda column: column.rank):
        if column.rank < ALWAYS and sum(map(needed, cells)) - GAP > width:
            cells.pop(column.name, None)
    room = width - sum(needed(name) for name in cells if name != "run")
    return cells | {"run": shorten_apart(cells["run"], max(room, 1))}


def colour_of(name: str, record: dict) -> str:
    """Return the colour of a cell in the column `name`."""
    if name == "state":
        return next((colour for state, colour in STATE_COLOURS.items() if state in record["state"]), "")
    if name == "vs control" and math.isfinite(record["difference"]):
        return "green" if record["difference"] < 0 else "red"
    return ""


def arrange(rows: Sequence[Row], options: argparse.Namespace) -> list[list[Row]]:
    """Return the runs that are asked for, one by one or by arm, in the order that is asked for."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if row.is_asked_for(options.filter):
            groups.setdefault((row.sweep, row.arm) if options.arms else len(groups), []).append(row)
    found = [groups[key] for key in sorted(groups)]
    if options.by_loss:
        found.sort(key=loss_of_arm if options.arms else loss_of_run)
    return found


def loss_of_run(rows: Sequence[Row]) -> tuple:
    loss = rows[0].run.final_val_loss
    return math.isnan(loss), loss


def loss_of_arm(rows: Sequence[Row]) -> tuple:
    _, loss = last_mean([losses_by_step(row.run) for row in averaged(rows)])
    return math.isnan(loss), loss


def display(monitor: Monitor, rows: Sequence[Row], options: argparse.Namespace, width: int, height: int):
    """Return heading, table and notes for rich to print, at most `height` lines of them."""
    from rich.console import Group  # slow to import, and not needed for --help or --json
    from rich.table import Table
    from rich.text import Text

    def line(text: str, style: str = "") -> Text:
        # "~" marks a cut: in the locale C, Python writes an ellipsis that terminals show as garbage
        return Text(clean(text).replace("…", "~"), style, no_wrap=True, overflow="crop")

    notes = monitor.notes(rows, options.filter)[: max(1, height // 4)]
    groups = arrange(rows, options)
    shown = groups[: max(1, height - 3 - len(notes))]
    records = [record_of(group, options.arms) for group in shown]
    heading = f"{monitor.name} at {time.strftime('%H:%M:%S')}: {format_count(len(rows), 'run')}"
    lines = [line(f"{heading} ({states_of(rows)})" if rows else heading, "bold")]
    if records:
        cells = fit(records, width)
        lines.append(Table(box=None, pad_edge=False, header_style="dim"))
        for column in COLUMNS:
            if column.name in cells:
                lines[-1].add_column(column.name, justify=column.justify, no_wrap=True, overflow="crop")
        for i, record in enumerate(records):
            lines[-1].add_row(*[line(texts[i], colour_of(name, record)) for name, texts in cells.items()])
    elif rows:
        lines.append(line(f"none of them contains {options.filter!r}", "dim"))
    else:
        lines.append(line("no .txt logs here yet: they appear as soon as a run starts", "dim"))
    if len(groups) > len(shown):
        lines.append(line(f"and {len(groups) - len(shown)} more", "dim"))
    return Group(*lines, *[line(note, "yellow") for note in notes])


# ------------------------------------------------------------------------------------------------
# The live table
# ------------------------------------------------------------------------------------------------


def watch(monitor: Monitor, options: argparse.Namespace) -> None:
    """Redraw the table every --interval seconds, until `q` or Ctrl-C; leave the last one behind."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    screen, last, key = Console(file=sys.__stdout__), "", ""
    live = Live(console=screen, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with single_keys(), live, contextlib.suppress(KeyboardInterrupt):
        live.update(Text(clean(f"reading the logs of {monitor.name} ...")), refresh=True)
        while key != "q":
            rows, size = monitor.poll(), screen.size
            last = display(monitor, rows, options, size.width, size.height - 1)
            live.update(Group(last, Text(KEYS, "dim", no_wrap=True)), refresh=True)
            key, end = "", time.monotonic() + options.interval
            while not key and screen.size == size and time.monotonic() < end:
                key = pressed(min(options.interval, 0.2))
            options.arms ^= key == "a"
            options.by_loss ^= key == "l"
    screen.print(last)


@contextlib.contextmanager
def single_keys() -> Iterator[None]:
    """Let keys be read as they are pressed; restore the terminal afterwards, also on SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)


def pressed(seconds: float) -> str:
    """Wait for a key for at most `seconds`; return it, or an empty text."""
    ready, _, _ = select.select([sys.stdin] if sys.stdin.isatty() else [], [], [], seconds)
    if not ready:
        return ""
    return os.read(sys.stdin.fileno(), 1).decode(errors="replace") or "q"  # the terminal has gone


def show(options: argparse.Namespace) -> None:
    """Show the runs in the way that is asked for."""
    if not options.interval > 0:
        raise ValueError(f"--interval {options.interval:g} is not above 0 seconds")
    places = options.paths or [options.logs]
    monitor = Monitor(
        *places, logs=options.logs, stalled_after=options.stalled_after, control=options.control
    )
    missing = [path for path in places if not path.exists()]
    if missing:
        raise ValueError(f"there is no {missing[0]}; name a folder of logs, logs, or a sweep's file")
    packed = [path for path in places if path.suffix in OPENERS]
    if packed:
        raise ValueError(f"{packed[0]} is compressed, so its run is over; plot_loss.py reads it")
    with contextlib.suppress(KeyboardInterrupt):
        if options.json:
            groups = arrange(monitor.poll(), options)
            print(as_json([record_of(rows, options.arms) for rows in groups]), end="")
        elif options.once or not sys.stdout.isatty():
            print_once(monitor, options)
        else:
            watch(monitor, options)


def print_once(monitor: Monitor, options: argparse.Namespace) -> None:
    """Print the whole table, without colours."""
    from rich.console import Console

    width, text = shutil.get_terminal_size((160, 50)).columns, io.StringIO()
    table = display(monitor, monitor.poll(), options, width, sys.maxsize)
    Console(file=text, width=width, color_system=None).print(table)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line; return the exit code."""
    parser = command_line.make_parser(__doc__)
    option = parser.add_argument
    places = "one sweep, or folders and logs (logs)"
    option("paths", nargs="*", type=Path, metavar="SWEEP.toml | LOG", help=places)
    option("--logs", type=Path, default=LOGS, metavar="DIR", help="folder of logs and manifests (logs)")
    option("--once", action="store_true", help="print one table and end")
    option("--json", action="store_true", help="print the runs as JSON and end")
    option("--arms", action="store_true", help="show arms: means of their n runs")
    option("--by-loss", action="store_true", help="show the lowest validation loss first")
    option("--filter", default="", metavar="TEXT", help="show only runs whose name or state contains this")
    option("--control", default="", metavar="NAME", help="compare with runs whose run id contains this")
    option("--interval", type=float, default=2.0, metavar="S", help="seconds between updates (2)")
    option("--stalled-after", type=float, default=300.0, metavar="S", help="silence of a stalled run (300)")
    return command_line.run(show, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
