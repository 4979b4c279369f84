"""Show a live table of the runs in logs/: how far each is, its losses, its speed, and what went wrong.

    python monitor_runs.py                  # until Ctrl-C; in a pipe or a file, one plain table
    python monitor_runs.py --once           # one table
    python monitor_runs.py --json | jq      # one list of objects, losses in nats a token, times in s or ms
    python monitor_runs.py --control a=0    # difference from the runs whose name has a=0

Runs are called by their sweep's tags, or by the fewest settings that tell them apart. Those of a sweep are
compared with the control that its manifest (logs/SWEEP.sweep.json) names: with the run of the same seed if
there is one, else with the mean of the controls, at the last validation that both have. A run has stalled if
its log says that it runs but has not grown for --stalled-after seconds. Only what is new in the logs is read,
so a thousand of them are no burden.
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis.arms import arm_key, name_arms
from analysis.command_line import complain, make_parser
from analysis.manifest import Manifest, ManifestFolder, Run
from analysis.run_log import Column, LogFollower, RunLog
from analysis.style import format_time, shorten, shorten_apart

RECENT_LINES = 50  # speed is that of the last lines, as batch sizes change during training
WARM_UP_FACTOR = 4  # before its first step a run compiles, which takes longer than any step
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
# A killed process writes no event, but the launcher sees it end.
LAUNCHER_STATES = {"crashed": "crashed", "hung": "crashed", "diverged": "diverged", "stopped": "stopped"}


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What is shown of a run. NaN means not known, or not yet. Units are in the names."""

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
    age_s: float = math.nan  # since the log was written to
    unread_lines: int = 0
    message: str = ""

    @property
    def share(self) -> float:
        """The part of training that is done, 0 to 1."""
        return min(1.0, self.step / self.num_steps) if self.num_steps else 0.0


def speed(run: RunLog) -> tuple[float, float]:
    """Return recent milliseconds a step, and tokens a second; NaN if the log does not say."""
    times = run.columns.get("train_time")
    if times is None or times.value.dtype == object or len(times.step) < 2:
        return math.nan, math.nan
    first = max(0, len(times.step) - RECENT_LINES)
    ms = float(times.value[-1] - times.value[first])
    steps = int(times.step[-1] - times.step[first])
    if not ms > 0 or not steps:
        return math.nan, math.nan
    tokens = tokens_between(run.columns.get("tokens"), times.step[first], times.step[-1])
    return ms / steps, tokens / ms * 1000


def tokens_between(column: Column | None, first_step: int, last_step: int) -> float:
    """Return the tokens trained on between two steps, NaN if they are not logged at both."""
    if column is None or column.value.dtype == object:
        return math.nan
    at = np.searchsorted(column.step, [first_step, last_step])
    if at[1] >= len(column.step) or (column.step[at] != [first_step, last_step]).any():
        return math.nan
    return float(column.value[at[1]] - column.value[at[0]])


def row_of(run: RunLog) -> Row:
    """Return a run's row, without what depends on the time or on other runs."""
    ms_per_step, tokens_per_s = speed(run)
    left = math.nan
    if run.state == "running" and run.num_steps is not None:
        left = max(0, run.num_steps - max(run.last_step, 0)) * ms_per_step / 1000
    return Row(
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


def last_words(run: RunLog) -> str:
    """Return what the log says about a crash or a divergence, empty if it ended otherwise."""
    event = run.event(run.state) if run.state in ("crashed", "diverged") else None
    if event is None:
        return ""
    prose = ("error", "message", "reason")
    return ", ".join(value if name in prose else f"{name} {value}" for name, value in event.fields.items())


def is_stalled(row: Row, limit: float) -> bool:
    """Return whether a run that says it runs has been silent for too long, given its own pace."""
    if row.state != "running":
        return False
    if not row.step:
        return row.age_s > WARM_UP_FACTOR * limit
    pace = row.ms_per_step / 1000 if math.isfinite(row.ms_per_step) else 0.0
    return row.age_s > max(limit, 20 * pace)


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
        self._rows: dict[Path, list[tuple[RunLog, Row]]] = {}
        self._members: dict[str, tuple[Manifest, Run]] = {}  # by run_id
        self._named: tuple[object, dict[tuple, str]] = (None, {})

    def poll(self) -> list[Row]:
        """Return the rows now: what runs first, then what ended last."""
        for path in self.follower.poll():
            log = self.follower.logs.get(path)
            if log is None:
                self._rows.pop(path, None)
            elif log.error:
                row = Row(str(path), path.stem, "unreadable", message=log.error)
                self._rows[path] = [(RunLog(path, path.stem), row)]
            else:
                self._rows[path] = [(run, row_of(run)) for run in log.runs]
        manifests = self.manifests.poll()
        self._members = {run.run_id: (manifest, run) for manifest in manifests for run in manifest.runs}
        now = time.time()
        rows = []
        for path, entries in self._rows.items():
            age_s = max(0.0, now - self.follower.logs[path].mtime)
            rows += [dataclasses.replace(row, age_s=age_s) for _, row in entries]
        self._place(rows)
        for row in rows:
            if is_stalled(row, self.stalled_after):
                row.state = "stalled"
        return sorted(rows, key=lambda row: (row.state not in ("running", "stalled"), row.age_s, row.run_id))

    def _place(self, rows: list[Row]) -> None:
        """Fill in each row's sweep, tag and difference from the control, and how the launcher saw it end."""
        runs = [run for entries in self._rows.values() for run, _ in entries]
        by_arm: dict[tuple[str, str | None], list[RunLog]] = {}
        for run in runs:
            if run.name in self._members:
                manifest, planned = self._members[run.name]
                by_arm.setdefault((manifest.sweep, planned.tag), []).append(run)
        chosen = [run for run in runs if self.control and self.control in run.run_id]
        for run, row in zip(runs, rows, strict=True):
            others = chosen
            if run.name in self._members:
                manifest, planned = self._members[run.name]
                row.sweep, row.tag = manifest.sweep, planned.tag
                others = chosen or by_arm.get((manifest.sweep, manifest.control_of(planned.tag)), [])
                if row.state == "running" and planned.state in LAUNCHER_STATES:
                    row.state = LAUNCHER_STATES[planned.state]
                    row.message = planned.reason or f"launcher: {planned.state}"
            row.is_control = any(run is other for other in others)
            if not row.is_control:
                row.difference, row.control = difference_to(run, others)
        self._name(runs, rows)

    def _name(self, runs: Sequence[RunLog], rows: Sequence[Row]) -> None:
        """Name rows by their arms; worked out again only when there are other runs or tags."""
        tags = {run_id: planned.tag for run_id, (_, planned) in self._members.items()}
        state = tags, [(run.path, run.run_id, bool(run.config)) for run in runs]
        if self._named[0] != state:
            arms: dict[tuple, list[RunLog]] = {}
            for run, row in zip(runs, rows, strict=True):
                key = (row.sweep, row.tag) if row.tag else (arm_key(run), run.source_hash)
                arms.setdefault(key, []).append(run)
            names = zip(arms.values(), name_arms(list(arms.values()), tags), strict=True)
            self._named = state, {(run.path, run.run_id): name for runs, name in names for run in runs}
        for run, row in zip(runs, rows, strict=True):
            row.name = self._named[1][run.path, run.run_id]

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """Return what the user should know besides: failures, unread lines, runs yet to come."""
        notes = []
        for row in rows:
            if row.state in PROBLEMS and (row.message or row.state == "stalled"):
                reason = row.message or f"no line for {format_time(1000 * row.age_s)}"
                notes.append(f"{row.run_id} {row.state}: {reason}")
        unread = [row for row in rows if row.unread_lines]
        if unread:
            total = sum(row.unread_lines for row in unread)
            notes.append(f"{total} lines could not be read in {len(unread)} logs, such as {unread[0].path}")
        started = {run.name for entries in self._rows.values() for run, _ in entries}
        sweeps = {run_id: manifest.sweep for run_id, (manifest, _) in self._members.items()}
        planned = Counter(sweeps.values())
        missing = Counter(sweep for run_id, sweep in sweeps.items() if run_id not in started)
        notes += [f"sweep {s}: {n} of {planned[s]} runs have not started" for s, n in missing.items()]
        return notes + self.manifests.errors

    def curve(self, row: Row) -> np.ndarray:
        """Return a row's validation losses after the first tenth of training, which dwarfs the rest."""
        for run, _ in self._rows.get(Path(row.path), []):
            if run.run_id == row.run_id:
                return run.val.loss[run.val.step >= 0.1 * max(run.last_step, 1)]
        return np.zeros(0)


# ------------------------------------------------------------------------------------------------
# Showing them
# ------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float], width: int, plain: bool = False) -> str:
    """Return values as little bars, from the lowest to the highest of them; `plain` in ASCII."""
    bars = "_.-=+*#%" if plain else "▁▂▃▄▅▆▇█"
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return ""
    if len(values) > width:
        values = values[np.linspace(0, len(values) - 1, width).round().astype(int)]
    low, high = values.min(), values.max()
    levels = np.zeros(len(values)) if high == low else (values - low) / (high - low) * (len(bars) - 1)
    return "".join(bars[int(level)] for level in levels.round())


def progress(share: float, width: int, plain: bool = False) -> str:
    """Return a bar of `width` characters, of which `share` is full."""
    done = round(share * width)
    full, empty = ("#", ".") if plain else ("━", "╌")
    return full * done + empty * (width - done)


def number(value: float, form: str) -> str:
    """Return a number as text, "-" if it is not known."""
    return format(value, form) if math.isfinite(value) else "-"


def cells(row: Row, curve: Sequence[float], plain: bool) -> dict[str, str]:
    """Return the text of each column, from left to right. A new column is a new line here."""
    total = "?" if row.num_steps is None else str(row.num_steps)
    left = format_time(1000 * row.seconds_left) if row.state == "running" else ""
    thousand = "k" if math.isfinite(row.tokens_per_s) else ""
    return {
        "run": row.name,
        "state": row.state,
        "seed": "-" if row.seed is None else str(row.seed),
        "progress": f"{progress(row.share, 8, plain)} {row.step}/{total}",
        "val loss": number(row.val_loss, ".4f"),
        "best": number(row.best_val_loss, ".4f"),
        "to control": "control" if row.is_control else number(row.difference, "+.4f"),
        "train": number(row.train_loss, ".3f"),
        "ms/step": number(row.ms_per_step, ".1f"),
        "tokens/s": number(row.tokens_per_s / 1000, ".0f") + thousand,
        "left": left,
        "curve": sparkline(curve, 10, plain),
    }


ALWAYS = ("run", "state", "val loss")
# The order in which the others give way when the terminal is narrow; one that is not named here goes first.
EXPENDABLE = ("curve", "tokens/s", "best", "train", "ms/step", "left", "to control", "seed", "progress")
LEFT_ALIGNED = ("run", "state", "progress", "curve")
LEAST_NAME = 16
GAP = 2


def layout(contents: Sequence[dict[str, str]], width: int) -> dict[str, int]:
    """Return the columns that fit in `width`, with their widths. A column without any value is not shown."""
    widths = {}
    for name in contents[0] if contents else ():
        known = any(content[name] not in ("", "-") for content in contents)
        if known or name in ALWAYS:
            widths[name] = max(len(name), *(len(content[name]) for content in contents))
    if not widths:
        return {}
    whole_name = widths["run"] = max(LEAST_NAME, widths["run"])
    expendable = [name for name in widths if name not in (*ALWAYS, *EXPENDABLE)]
    expendable += [name for name in EXPENDABLE if name in widths]

    def spare() -> int:
        return width - sum(widths.values()) - GAP * (len(widths) - 1)

    while spare() < 0 and spare() + whole_name < LEAST_NAME and expendable:
        del widths[expendable.pop(0)]
    widths["run"] = max(LEAST_NAME, whole_name + min(0, spare()))
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
    contents = [cells(row, monitor.curve(row), plain) for row in shown]
    widths = layout(contents, width)
    names = shorten_apart([content["run"] for content in contents], widths.get("run", width))
    contents = [{**content, "run": name} for content, name in zip(contents, names, strict=True)]
    lines = [[(shorten(heading(rows, monitor.follower.folder), width), "bold")]]
    if not rows:
        lines.append([("no logs here yet: they appear as soon as a run starts", "dim")])
    else:
        lines.append([(aligned(name, name, size), "dim") for name, size in widths.items()])
    for row, content in zip(shown, contents, strict=True):
        line = []
        for name, size in widths.items():
            style = STATE_COLOURS.get(row.state, "") if name in ("state", "progress") else ""
            if name == "to control" and math.isfinite(row.difference):
                style = "green" if row.difference < 0 else "red"
            line.append((aligned(name, shorten(content[name], size), size), style))
        lines.append(line)
    if len(shown) < len(rows):
        rest = Counter(row.state for row in rows[len(shown) :])
        lines.append([("and " + ", ".join(f"{n} {state}" for state, n in rest.items()) + " more", "dim")])
    lines += [[(shorten(note, width), "yellow")] for note in notes]
    if plain:
        lines = [[(text.replace("…", "~"), style) for text, style in line] for line in lines]
    return lines


def aligned(name: str, text: str, size: int) -> str:
    """Return the text of a column as wide as the column, and the gap after it."""
    padded = text.ljust(size) if name in LEFT_ALIGNED else text.rjust(size)
    return padded + " " * GAP


def print_plain(rows: Sequence[Row], monitor: Monitor, width: int, plain: bool) -> None:
    """Print one table."""
    for line in text_lines(rows, monitor, width, plain=plain):
        print("".join(text for text, _ in line).rstrip())


def watch(monitor: Monitor, interval: float) -> None:
    """Draw the table again and again, until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(Text(f"reading the logs in {monitor.follower.folder} ..."), refresh=True)
        while True:
            rows = monitor.poll()
            lines = text_lines(rows, monitor, console.width, console.height, plain=not speaks_unicode())
            live.update(Text("\n").join(Text.assemble(*line) for line in lines), refresh=True)
            time.sleep(interval)


def speaks_unicode() -> bool:
    """Return whether the output can hold any character."""
    return (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")


def as_json(rows: Sequence[Row]) -> str:
    """Return a list of objects, with null for what is not known, as JSON has no NaN."""
    objects = []
    for row in rows:
        content = dataclasses.asdict(row)
        for key, value in content.items():
            if isinstance(value, float) and not math.isfinite(value):
                content[key] = None
        objects.append(content)
    return json.dumps(objects, indent=1)


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
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a name in letters that the terminal does not have
    monitor = Monitor(options.logs, options.stalled_after, options.control)
    try:
        if options.json:
            print(as_json(monitor.poll()))
        elif options.once or not sys.stdout.isatty():
            width = shutil.get_terminal_size((160, 50)).columns
            print_plain(monitor.poll(), monitor, width, plain=not speaks_unicode())
        else:
            watch(monitor, options.interval)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
