"""Show a live table of the runs in logs/: progress, losses, speed, and what went wrong.

    python monitor_runs.py                  # until Ctrl-C; in a pipe or a file, one plain table
    python monitor_runs.py --once           # one table
    python monitor_runs.py --json | jq      # one list of objects, losses in nats per token, times in s or ms
    python monitor_runs.py --control a=0    # difference from the runs whose name contains a=0

Runs are called by their sweep's tags, or by the fewest settings that tell them apart. Those of a sweep are
compared with the control that its manifest (logs/SWEEP.sweep.json) names: with the control of the same seed
if there is one, else with the mean of the controls, at the last validation that both have reached. A run has
stalled if it has not ended and its log has not grown for --stalled-after seconds. Only new lines are read, so
watching a thousand logs is cheap; compressed logs, as in records/, are not shown.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis.arms import arm_key, name_arms
from analysis.command_line import complain, make_parser
from analysis.manifest import Manifest, ManifestFolder, Run
from analysis.run_log import LogFollower, RunLog
from analysis.shown import clean, console
from analysis.style import format_time, shorten, shorten_apart
from analysis.tables import format_difference, format_loss, format_number, without_nan

RECENT_LINES = 50  # speed is measured over the last lines, because batch sizes change during training
WARM_UP_FACTOR = 4  # a run that has not taken a step may be silent this much longer: it compiles
SILENT_STEPS = 20  # a run of slow steps may be silent for so many of them
STATE_COLOURS = {
    "running": "green",
    "stalled": "yellow",
    "finished": "blue",
    "stopped": "magenta",
    "crashed": "bold red",
    "diverged": "bold red",
    "unreadable": "red",
    "unknown": "dim",
}
PROBLEMS = ("crashed", "diverged", "stalled", "unreadable")
# Our state for the launcher's: a killed process writes no event to its log, but the launcher sees it end.
LAUNCHER_STATES = {"crashed": "crashed", "hung": "crashed", "diverged": "diverged", "stopped": "stopped"}


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The values shown of a run; --json prints all but `run`. NaN means not known (yet). Names give units.

    `row_of` fills in what the run's log says, `Monitor` what depends on the time, the sweep and other runs.
    """

    run: RunLog = field(repr=False)
    path: str
    run_id: str
    state: str
    sweep: str = ""
    tag: str = ""
    name: str = ""  # of its arm: its tag, or the settings that tell it from the others; else its run_id
    seed: int | None = None
    step: int = 0
    num_steps: int | None = None
    val_loss: float = math.nan
    val_step: int | None = None
    best_val_loss: float = math.nan
    train_loss: float = math.nan
    difference: float = math.nan  # from the control, at the last validation both have; negative is better
    control: str = ""
    is_control: bool = False
    ms_per_step: float = math.nan
    tokens_per_s: float = math.nan
    seconds_left: float = math.nan
    train_time_s: float = math.nan
    age_s: float = math.nan  # since the log was last written to
    unread_lines: int = 0
    message: str = ""

    @property
    def share(self) -> float:
        """The part of training that is done, 0 to 1."""
        return min(1.0, self.step / self.num_steps) if self.num_steps else 0.0


def row_of(run: RunLog) -> Row:
    """Return a run's row, as far as its log tells."""
    ms_per_step, tokens_per_s = speed(run)
    left = math.nan
    if run.state == "running" and run.num_steps is not None:
        left = max(0, run.num_steps - max(run.last_step, 0)) * ms_per_step / 1000
    return Row(
        run=run,
        path=str(run.path),
        run_id=run.run_id,
        state=run.state,
        seed=run.seed,
        step=max(run.last_step, 0),
        num_steps=run.num_steps,
        val_loss=run.final_val_loss,
        val_step=int(run.val.step[-1]) if len(run.val) else None,
        best_val_loss=run.best_val_loss,
        train_loss=float(run.train.loss[-1]) if len(run.train) else math.nan,
        ms_per_step=ms_per_step,
        tokens_per_s=tokens_per_s,
        seconds_left=left,
        train_time_s=run.last_time_ms / 1000,
        unread_lines=run.unread_lines,
        message=last_words(run),
    )


def speed(run: RunLog) -> tuple[float, float]:
    """Return recent milliseconds per step and tokens per second; NaN if the log does not tell."""
    times = run.numbers("train_time")
    if times is None:
        return math.nan, math.nan
    step, time_ms = times.step[-RECENT_LINES:], times.value[-RECENT_LINES:]
    ms = float(time_ms[-1] - time_ms[0])
    if not ms > 0:
        return math.nan, math.nan
    return ms / int(step[-1] - step[0]), tokens_between(run, step[0], step[-1]) / ms * 1000


def tokens_between(run: RunLog, first_step: int, last_step: int) -> float:
    """Return the tokens trained on between two steps; NaN if they are not logged at both."""
    tokens = run.numbers("tokens")
    if tokens is None or not np.isin([first_step, last_step], tokens.step).all():
        return math.nan
    first, last = np.searchsorted(tokens.step, [first_step, last_step])
    return float(tokens.value[last] - tokens.value[first])


def last_words(run: RunLog) -> str:
    """Return what the log says about a crash or a divergence; empty if there was none."""
    event = run.event(run.state) if run.state in ("crashed", "diverged") else None
    if event is None:
        return ""
    prose = ("error", "message", "reason")
    return ", ".join(value if name in prose else f"{name} {value}" for name, value in event.fields.items())


def is_stalled(row: Row, limit: float) -> bool:
    """Return whether a run under way has been silent for too long, which is longer if its steps are slow."""
    if row.state != "running":
        return False
    if not row.step:
        return row.age_s > WARM_UP_FACTOR * limit
    pace = row.ms_per_step / 1000 if math.isfinite(row.ms_per_step) else 0.0
    return row.age_s > max(limit, SILENT_STEPS * pace)


def difference_to(run: RunLog, controls: Sequence[RunLog]) -> tuple[float, str]:
    """Return loss minus the control's at the last validation both have, and the control's name; NaN if none.

    The control is the run of the same seed; if there is none, the mean of those that have come that far.
    """
    others = [other for other in controls if len(other.val)]
    same_seed = [other for other in others if other.seed == run.seed and run.seed is not None]
    others = same_seed[:1] or others
    common = [np.intersect1d(run.val.step, other.val.step) for other in others]
    last = max((int(steps[-1]) for steps in common if len(steps)), default=None)
    if last is None:
        return math.nan, ""
    there = [other for other, steps in zip(others, common, strict=True) if last in steps]
    loss = np.mean([other.val.loss[np.searchsorted(other.val.step, last)] for other in there])
    name = there[0].run_id if len(there) == 1 else f"mean of {len(there)}"
    return float(run.val.loss[np.searchsorted(run.val.step, last)] - loss), name


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------


class Monitor:
    """The rows of a folder of logs, kept up to date."""

    def __init__(self, folder: Path, stalled_after: float = 300, control: str = ""):
        self.follower = LogFollower(folder, RECENT_LINES)
        self.manifests = ManifestFolder(folder)
        self.stalled_after, self.control = stalled_after, control
        self._rows: dict[Path, list[Row]] = {}  # as their logs tell
        self._planned: dict[str, tuple[Manifest, Run]] = {}  # by run_id
        self._named: tuple[object, dict[tuple, str]] = (None, {})  # what was named, and its names

    def poll(self) -> list[Row]:
        """Return the rows as of now: runs under way first, then those whose logs were written to last."""
        for path in self.follower.poll():
            log = self.follower.logs.get(path)
            if log is None:
                self._rows.pop(path, None)
            elif log.error:
                empty = RunLog(path, path.stem)
                self._rows[path] = [Row(empty, str(path), path.stem, "unreadable", message=log.error)]
            else:
                self._rows[path] = [row_of(run) for run in log.runs]
        manifests = self.manifests.poll()
        self._planned = {run.run_id: (manifest, run) for manifest in manifests for run in manifest.runs}
        now = time.time()
        rows = []
        for path, known in self._rows.items():
            age_s = max(0.0, now - self.follower.logs[path].mtime)
            rows += [dataclasses.replace(row, age_s=age_s) for row in known]
        self._add_plan(rows)
        self._compare(rows)
        self._name(rows)
        for row in rows:
            if is_stalled(row, self.stalled_after):
                row.state = "stalled"
        return sorted(rows, key=lambda row: (row.state not in ("running", "stalled"), row.age_s, row.run_id))

    def _add_plan(self, rows: Sequence[Row]) -> None:
        """Fill in what manifests say: sweep, tag, and how a run ended if its log does not say."""
        for row in rows:
            if row.run.name not in self._planned:
                continue
            manifest, planned = self._planned[row.run.name]
            row.sweep, row.tag = manifest.sweep, planned.tag
            if row.state == "running" and planned.state in LAUNCHER_STATES:
                row.state = LAUNCHER_STATES[planned.state]
                row.message = planned.reason or f"launcher: {planned.state}"

    def _compare(self, rows: Sequence[Row]) -> None:
        """Fill in each row's difference from its control: the runs of --control, else those of its sweep."""
        chosen = [row.run for row in rows if self.control and self.control in row.run_id]
        by_arm: dict[tuple[str, str | None], list[RunLog]] = {}
        for row in rows:
            by_arm.setdefault((row.sweep, row.tag), []).append(row.run)
        for row in rows:
            controls = chosen
            if not chosen and row.run.name in self._planned:
                manifest, planned = self._planned[row.run.name]
                controls = by_arm.get((manifest.sweep, manifest.control_of(planned.tag)), [])
            row.is_control = any(row.run is control for control in controls)
            if not row.is_control:
                row.difference, row.control = difference_to(row.run, controls)

    def _name(self, rows: Sequence[Row]) -> None:
        """Name the rows by their arms; worked out again only when there are other runs or tags."""
        state = [(row.path, row.run_id, row.sweep, row.tag, bool(row.run.config)) for row in rows]
        if self._named[0] != state:
            arms: dict[tuple, list[RunLog]] = {}
            for row in rows:
                key = (row.sweep, row.tag) if row.tag else (arm_key(row.run), row.run.source_hash)
                arms.setdefault(key, []).append(row.run)
            tags = {row.run.name: row.tag for row in rows if row.tag}
            named = zip(arms.values(), name_arms(list(arms.values()), tags), strict=True)
            names = {(str(run.path), run.run_id): name for runs, name in named for run in runs}
            self._named = state, names
        for row in rows:
            row.name = self._named[1][row.path, row.run_id]

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """Return the lines below the table: failures, unread lines, runs that have not started."""
        notes = []
        for row in rows:
            if row.state in PROBLEMS and (row.message or row.state == "stalled"):
                reason = row.message or f"no line for {format_time(1000 * row.age_s)}"
                notes.append(f"{row.run_id} {row.state}: {reason}")
        unread = [row for row in rows if row.unread_lines]
        if unread:
            total = sum(row.unread_lines for row in unread)
            notes.append(f"{total} lines could not be read in {len(unread)} logs, such as {unread[0].path}")
        started = {row.run.name for row in rows}
        sweeps = {run_id: manifest.sweep for run_id, (manifest, _) in self._planned.items()}
        planned = Counter(sweeps.values())
        missing = Counter(sweep for run_id, sweep in sweeps.items() if run_id not in started)
        notes += [f"sweep {s}: {n} of {planned[s]} runs have not started" for s, n in missing.items()]
        return notes + self.manifests.errors


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as little bars, from the lowest to the highest of them."""
    bars = "▁▂▃▄▅▆▇█"
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return ""
    if len(values) > width:
        values = values[np.linspace(0, len(values) - 1, width).round().astype(int)]
    low, high = values.min(), values.max()
    levels = np.zeros(len(values)) if high == low else (values - low) / (high - low) * (len(bars) - 1)
    return "".join(bars[int(level)] for level in levels.round())


def progress(share: float, width: int) -> str:
    """Return a bar of `width` characters, of which `share` is full."""
    done = round(share * width)
    return "━" * done + "╌" * (width - done)


PLAIN = str.maketrans("▁▂▃▄▅▆▇█━╌…", "_.-=+*#%#.~")  # for terminals that can print ASCII only


def progress_cell(row: Row) -> str:
    total = "?" if row.num_steps is None else str(row.num_steps)
    return f"{progress(row.share, 8)} {row.step}/{total}"


def control_cell(row: Row) -> str:
    return "control" if row.is_control else format_difference(row.difference)


def left_cell(row: Row) -> str:
    return format_time(1000 * row.seconds_left) if row.state == "running" else ""


def tokens_per_s_cell(row: Row) -> str:
    return f"{row.tokens_per_s / 1000:.0f}k" if math.isfinite(row.tokens_per_s) else "-"


def late_losses(run: RunLog) -> np.ndarray:
    """Return the validation losses after the first tenth of training, in which the loss drops the most."""
    return run.val.loss[run.val.step >= 0.1 * max(run.last_step, 1)]


@dataclass(frozen=True)
class TableColumn:
    """A column of the table.

    In a narrow terminal, the columns of the lowest `rank` are left out first, those of rank ALWAYS never.
    """

    name: str
    rank: int
    cell: Callable[[Row], str]
    align_left: bool = False


ALWAYS = 100
# From left to right. A new column is a field of Row, its value in `row_of`, and a line here.
COLUMNS = (
    TableColumn("run", ALWAYS, lambda row: row.name, align_left=True),
    TableColumn("state", ALWAYS, lambda row: row.state, align_left=True),
    TableColumn("seed", 8, lambda row: "-" if row.seed is None else str(row.seed)),
    TableColumn("progress", 9, progress_cell, align_left=True),
    TableColumn("val loss", ALWAYS, lambda row: format_loss(row.val_loss)),
    TableColumn("best", 3, lambda row: format_loss(row.best_val_loss)),
    TableColumn("to control", 7, control_cell),
    TableColumn("train", 4, lambda row: format_number(row.train_loss, ".3f")),
    TableColumn("ms/step", 5, lambda row: format_number(row.ms_per_step, ".1f")),
    TableColumn("tokens/s", 2, tokens_per_s_cell),
    TableColumn("left", 6, left_cell),
    TableColumn("curve", 1, lambda row: sparkline(late_losses(row.run), 10), align_left=True),
)
LEAST_NAME = 16  # characters of a run's name
GAP = 2


def layout(contents: Sequence[dict[str, str]], width: int) -> dict[str, int]:
    """Return the columns that fit in `width`, with their widths. A column without any value is left out."""
    widths = {}
    for column in COLUMNS:
        texts = [content[column.name] for content in contents]
        if column.rank == ALWAYS or any(text not in ("", "-") for text in texts):
            widths[column.name] = max(map(len, [column.name, *texts]))
    whole_name = max(LEAST_NAME, widths["run"])
    widths["run"] = LEAST_NAME

    def spare() -> int:
        return width - sum(widths.values()) - GAP * (len(widths) - 1)

    for column in sorted(COLUMNS, key=lambda column: column.rank):
        if spare() < 0 and column.rank < ALWAYS:
            widths.pop(column.name, None)
    widths["run"] = min(whole_name, LEAST_NAME + max(0, spare()))
    return widths


def heading(rows: Sequence[Row], folder: Path) -> str:
    """Return the first line: the folder, how many runs are in which state, the time."""
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{counts[state]} {state}" for state in STATE_COLOURS if counts[state])
    text = f"{folder}: {len(rows)} runs"
    if states:
        text += f" ({states})"
    return text + time.strftime(", %H:%M:%S")


def text_lines(
    rows: Sequence[Row], monitor: Monitor, width: int, height: int | None = None, plain: bool = False
) -> list[list[tuple[str, str]]]:
    """Return the whole display as lines of (text, style), at most `height` of them."""
    notes = monitor.notes(rows)
    limit = len(rows)
    if height is not None:
        notes = notes[: max(1, height // 4)]
        limit = max(1, height - 4 - len(notes))
    shown = rows[:limit] if len(rows) <= limit else rows[: max(1, limit - 1)]
    contents = [{column.name: column.cell(row) for column in COLUMNS} for row in shown]
    widths = layout(contents, width)
    names = shorten_apart([content["run"] for content in contents], widths.get("run", width))
    contents = [{**content, "run": name} for content, name in zip(contents, names, strict=True)]
    lines = [[(shorten(heading(rows, monitor.follower.folder), width), "bold")]]
    if not rows:
        lines.append([("no logs here yet (only .txt counts): they appear as soon as a run starts", "dim")])
    else:
        lines.append([(aligned(name, name, size), "dim") for name, size in widths.items()])
    for row, content in zip(shown, contents, strict=True):
        cells = [(name, shorten(content[name], size), size) for name, size in widths.items()]
        lines.append([(aligned(*cell), colour_of(cell[0], row)) for cell in cells])
    if len(shown) < len(rows):
        rest = Counter(row.state for row in rows[len(shown) :])
        lines.append([("and " + ", ".join(f"{n} {state}" for state, n in rest.items()) + " more", "dim")])
    lines += [[(shorten(note, width), "yellow")] for note in notes]
    if plain:
        lines = [[(text.translate(PLAIN), style) for text, style in line] for line in lines]
    return lines


def colour_of(name: str, row: Row) -> str:
    """Return the colour of a row's cell in the column `name`."""
    if name in ("state", "progress"):
        return STATE_COLOURS.get(row.state, "")
    if name == "to control" and math.isfinite(row.difference):
        return "green" if row.difference < 0 else "red"
    return ""


def aligned(name: str, text: str, size: int) -> str:
    """Return the text of a column padded to the column's width, and the gap after it."""
    to_left = any(column.align_left for column in COLUMNS if column.name == name)
    return (text.ljust(size) if to_left else text.rjust(size)) + " " * GAP


def print_plain(rows: Sequence[Row], monitor: Monitor, width: int, plain: bool) -> None:
    """Print one table."""
    for line in text_lines(rows, monitor, width, plain=plain):
        print("".join(text for text, _ in line).rstrip())


def watch(monitor: Monitor, interval: float) -> None:
    """Redraw the table every `interval` seconds, until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(Text(f"reading the logs in {monitor.follower.folder} ..."), refresh=True)
        while True:
            rows = monitor.poll()
            lines = text_lines(rows, monitor, console.width, console.height, plain=not speaks_unicode())
            shown = [Text.assemble(*((clean(text), look) for text, look in line)) for line in lines]
            live.update(Text("\n").join(shown), refresh=True)
            time.sleep(interval)


def speaks_unicode() -> bool:
    """Return whether the output can take any character."""
    return (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")


def as_json(rows: Sequence[Row]) -> str:
    """Return a list of objects, with null for what is not known, as JSON has no NaN."""
    names = [f.name for f in dataclasses.fields(Row) if f.name != "run"]
    return json.dumps(without_nan([{name: getattr(row, name) for name in names} for row in rows]), indent=1)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--logs", type=Path, default=Path("logs"), metavar="DIR", help="folder of logs (logs)"
    )
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--json", action="store_true", help="print the runs as JSON and end")
    parser.add_argument(
        "--control", default="", metavar="NAME", help="compare with runs whose name contains this"
    )
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between updates (2)"
    )
    parser.add_argument(
        "--stalled-after", type=float, default=300.0, metavar="S", help="silence of a stalled run (300)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the table; return the exit code."""
    options = parse_args(arguments)
    if not options.logs.is_dir():
        return complain(f"{options.logs} is no folder; say where the logs are with --logs DIR")
    if not options.interval > 0:
        return complain(f"--interval {options.interval:g} is not above 0 seconds")
    monitor = Monitor(options.logs, options.stalled_after, options.control)
    with contextlib.suppress(KeyboardInterrupt):
        if sys.stdout.isatty() and not (options.once or options.json):
            watch(monitor, options.interval)
            return 0
        with console():
            if options.json:
                print(as_json(monitor.poll()))
            else:
                width = shutil.get_terminal_size((160, 50)).columns
                print_plain(monitor.poll(), monitor, width, plain=not speaks_unicode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
