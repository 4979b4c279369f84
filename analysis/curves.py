"""Curves of arms: means over seeds with intervals, their panels and their names.

    from analysis.curves import Axis, Drawn, draw_lines, lines_of, name_ends, panel_loss
    axis = Axis("steps", runs)
    drawn = [Drawn(arm, style.arm_style(i), arm.label, arm.label) for i, arm in enumerate(arms)]
    name_ends(drawn)
    panel_loss(ax, drawn, axis, target=3.28)
    for item in drawn:                       # a panel of any other logged quantity
        draw_lines(ax, *lines_of(item.arm, "val_acc", axis), item.line_look)

A picture makes one list of what is drawn, and every panel gets that list. A panel with another x axis makes
its own Axis. Matplotlib is not imported here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np

from analysis import style
from analysis.arms import Arm
from analysis.intervals import MIN_INTERVAL
from analysis.run_log import RunLog
from analysis.stats import Summary, summarize
from analysis.tables import format_loss

X_LABELS = {"steps": "step", "tokens": "training tokens", "time": "training time"}
END_SHARES = (0.03, 0.05, 0.1, 0.2, 0.4)  # the smallest of these that holds enough validations is enlarged
END_POINTS = 5  # enough validations
INSET = (0.30, 0.34, 0.56, 0.62)  # of the enlarged end: left, bottom, width, height as fractions of the panel
MAX_MARKED = 12  # with more arms, stars and names at the ends of lines would cover each other
MAX_NAME = 12  # letters that fit beside the enlarged end
FINISHED = ("finished", "unknown")  # llm.c's logs do not say whether they are complete; assume that they are


# ------------------------------------------------------------------------------------------------
# Numbers to draw
# ------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """A curve to draw: `y` at each `step`, whose place on the x axis is `x`.

    `low` to `high` is the interval around y; None for a single run.
    """

    step: np.ndarray
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def x_of(run: RunLog, step: np.ndarray, kind: str) -> np.ndarray:
    """Steps of a run in steps, training tokens or ms of training time; NaN if the log does not give these."""
    if kind == "steps":
        return step.astype(float)
    column = run.numbers("tokens" if kind == "tokens" else "train_time")
    known = np.zeros(0, bool) if column is None else np.isfinite(column.value)
    if not known.any():
        return np.full(len(step), np.nan)
    return np.interp(step, column.step[known], column.value[known])


def has_x(run: RunLog, kind: str) -> bool:
    """True if a run can be drawn against steps, tokens or time."""
    return bool(np.isfinite(x_of(run, np.zeros(1), kind)).all())


class Axis:
    """An x axis: its kind (a key of X_LABELS), its unit and its label. `end` is where the last run ends."""

    def __init__(self, kind: str, runs: Sequence[RunLog]):
        self.kind, self.scale, self.label = kind, 1.0, X_LABELS[kind]
        started = [run for run in runs if run.last_step >= 0 and has_x(run, kind)]
        self.end = max((self.place(run, run.last_step) for run in started), default=1.0)
        if kind == "time":
            self.scale, unit = style.time_unit(self.end)
            self.label = f"training time, {unit}"
        elif kind == "tokens":
            units = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, ""))
            self.scale, unit = next(unit for unit in units if self.end >= unit[0] or not unit[1])
            self.label = f"training tokens, {unit}" if unit else "training tokens"
        self.end /= self.scale

    def places(self, run: RunLog, step: np.ndarray) -> np.ndarray:
        """Places of a run's steps on this axis, in its unit; NaN if the log does not give them."""
        return x_of(run, step, self.kind) / self.scale

    def place(self, run: RunLog, step: int) -> float:
        return float(self.places(run, np.array([step]))[0])

    def fit(self, ax) -> None:
        """Label a panel's x axis, and show all of training."""
        ax.set_xlabel(self.label)
        ax.set_xlim(-0.01 * self.end, 1.01 * self.end)


def line_of(run: RunLog, key: str, axis: Axis) -> Line | None:
    """The curve of a logged quantity; None if it is not logged. Lists are averaged over layers."""
    column = run.columns.get(key)
    if column is None or column.value.dtype == object or not has_x(run, axis.kind):
        return None
    value = column.value
    if value.ndim == 2:
        known = np.isfinite(value)
        value = np.where(known, value, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
    return Line(column.step, axis.places(run, column.step), value)


def lines_of(arm: Arm, key: str, axis: Axis) -> tuple[Line | None, list[Line]]:
    """The line of an arm (None if nothing is logged), and lines of single runs to draw thinly beside it.

    An arm's line is that of its only run, or the mean of its finished runs.
    """
    found = [(run, line_of(run, key, axis)) for run in arm.runs]
    found = [(run, line) for run, line in found if line]
    finished = [line for run, line in found if run.state in FINISHED]
    common = reduce(np.intersect1d, [line.step for line in finished]) if len(finished) > 1 else []
    if not len(common):
        lines = [line for _, line in found]
        return (lines[0], lines[1:]) if lines else (None, [])
    at = [np.searchsorted(line.step, common) for line in finished]
    x = np.mean([line.x[i] for line, i in zip(finished, at, strict=True)], axis=0)
    y = np.array([line.y[i] for line, i in zip(finished, at, strict=True)])
    thin = [line for run, line in found if run.state not in FINISHED]
    if len(y) < MIN_INTERVAL:  # two runs: show both
        return Line(common, x, y.mean(0)), [Line(common, x, y[0]), Line(common, x, y[1]), *thin]
    summaries = [summarize(column) for column in y.T]
    low, high = np.array([[s.low, s.high] for s in summaries]).T
    return Line(common, x, y.mean(0), low, high), thin


def all_met(arm: Arm, target: float) -> tuple[int, float] | None:
    """First step at which all runs of an arm have met the target, and their mean training time in ms.

    None if one of them has not met it.
    """
    points = [run.first_at(target) for run in arm.runs]
    if any(point is None for point in points):
        return None
    step = max(point.step for point in points)
    return step, float(np.mean([np.interp(step, run.val.step, run.val.time_ms) for run in arm.runs]))


# ------------------------------------------------------------------------------------------------
# What is drawn, and what it is called
# ------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """An arm in a picture: its look, its name beside its line, and its label in the legend."""

    arm: Arm
    look: dict
    name: str
    label: str

    @property
    def line_look(self) -> dict:
        """The look without markers, for curves of many points."""
        return {key: value for key, value in self.look.items() if key != "marker"}


def runs_of(drawn: Sequence[Drawn]) -> list[RunLog]:
    return [run for item in drawn for run in item.arm.runs]


def name_ends(drawn: Sequence[Drawn]) -> None:
    """Shorten names so that they fit beside their lines.

    If arms differ in one setting, a name is its value. Names that are still too long become letters, which
    are also put before the labels in the legend.
    """
    words = [item.name.split() for item in drawn]
    one_setting = all(len(w) == 1 and "=" in w[0] for w in words)
    if one_setting and len({w[0].split("=")[0] for w in words}) == 1:
        for item in drawn:
            item.name = item.name.split("=", 1)[1]
    if 1 < len(drawn) <= MAX_MARKED and max(len(item.name) for item in drawn) > MAX_NAME:
        for number, item in enumerate(drawn):
            item.name = chr(ord("A") + number)
            item.label = f"{item.name}  {item.label}"


def result_label(name: str, result: Summary, remarks: Sequence[str]) -> str:
    """An arm's name and final loss for a legend: a=0.1: 3.2705 ± 0.0012 (n=3, 1 failed)."""
    if not result.n:
        return f"{name}: {', '.join(remarks)}"
    interval = f" ± {(result.high - result.low) / 2:.4f}" if result.n >= MIN_INTERVAL else ""
    count = f"n={result.n}" if result.n > 1 else "a single run"
    return f"{name}: {format_loss(result.mean)}{interval} ({', '.join([count, *remarks])})"


def plan_legend(labels: Sequence[str], width: int, gap: int = 8) -> tuple[int, float]:
    """Columns, and inches of their lines, of a legend below a figure that is `width` letters wide."""
    longest = max(map(len, labels), default=0)
    columns = max(1, min(len(labels), width // (longest + gap)))
    return columns, 0.2 * math.ceil(len(labels) / columns)


def add_legend(fig, drawn: Sequence[Drawn], columns: int, title: str) -> None:
    """Add a legend with all that is drawn below the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **{**item.look, "markersize": 5}, label=item.label) for item in drawn]
    bold = {"weight": "bold"}
    fig.legend(
        handles=handles,
        loc="lower center",
        ncols=columns,
        fontsize=9,
        title=title,
        title_fontproperties=bold,
    )


# ------------------------------------------------------------------------------------------------
# Panels
# ------------------------------------------------------------------------------------------------


class ArmLines(NamedTuple):
    """An arm in one panel, with what `lines_of` gives for it."""

    drawn: Drawn
    line: Line | None
    thin: list[Line]


def draw_lines(ax, line: Line | None, thin: Sequence[Line], look: dict) -> None:
    """Draw an arm's line with its interval, and its single runs thinly."""
    if line is None:
        return
    if line.low is not None:
        ax.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.2, linewidth=0)
    for other in thin:
        dot = {"marker": ".", "markersize": 5} if len(other.y) == 1 else {}
        ax.plot(other.x, other.y, color=look["color"], linewidth=0.7, alpha=0.7, **dot)
    if len(line.y) == 1:  # a line of one point would not be seen
        look = {**look, "marker": "o"}
    ax.plot(line.x, line.y, **look)


def panel_loss(ax, drawn: Sequence[Drawn], axis: Axis, target: float) -> None:
    """Validation loss with the target, where it is met, and the end of training enlarged."""
    ax.set_title("validation loss")
    ax.set_xlabel(axis.label)
    curves = [ArmLines(item, *lines_of(item.arm, "val_loss", axis)) for item in drawn]
    everything = every_line(curves)
    if not everything:
        style.say_nothing_logged(ax, "validation loss")
        return
    if len(runs_of(drawn)) == 1:
        train = line_of(drawn[0].arm.runs[0], "train_loss", axis)
        if train:
            ax.plot(train.x, train.y, color="#bbbbbb", linewidth=0.6, zorder=1)
        note = {"xycoords": "axes fraction", "fontsize": 8, "color": style.GREY}
        ax.annotate("grey: training loss", (0.02, 0.02), **note)
    for item, line, thin in curves:
        draw_lines(ax, line, thin, item.line_look)
    low, top = loss_limits(everything, axis, target)
    zoom = enlarge_end(ax, curves, axis, target)
    if zoom:
        top = room_for_inset(everything, axis, low, top)
    ax.set_ylim(low, top)
    if low < target < top:
        note = {"xycoords": ("axes fraction", "data"), "fontsize": 8, "va": "bottom"}
        ax.annotate(f"target {target:g}", (0.01, target), **note)
    panels = [ax, zoom] if zoom else [ax]
    for panel in panels:
        panel.axhline(target, color=style.GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    mark_target(panels, curves, axis, target)


def every_line(curves: Sequence[ArmLines]) -> list[Line]:
    lines = []
    for _, line, thin in curves:
        lines += [line, *thin] if line else thin
    return lines


def loss_limits(lines: Sequence[Line], axis: Axis, target: float) -> tuple[float, float]:
    """Limits from below the lowest loss to the loss after 5% of training: the first drop dwarfs the rest."""
    every = np.concatenate([line.y for line in lines])
    every = every[np.isfinite(every)]
    if not len(every):
        return 0.0, 1.0
    early = [np.interp(0.05 * axis.end, line.x, line.y) for line in lines]
    low, top = every.min(), max([y for y in early if math.isfinite(y)], default=every.max())
    top = max(top, low + 1e-3)
    low = min(low, target) if low - target < 0.3 * (top - low) else low
    return low - 0.06 * (top - low), top + 0.02 * (top - low)


def room_for_inset(lines: Sequence[Line], axis: Axis, low: float, top: float) -> float:
    """The upper limit that keeps the lines below the inset; a run that diverges may pass behind it."""
    highest = low
    for line in lines:
        late = line.x >= 0.9 * INSET[0] * axis.end
        y = line.y if line.high is None else line.high
        highest = max(highest, np.nanmax(y[late], initial=low))
    wanted = low + (highest - low) / (INSET[1] - 0.07)
    return max(top, min(wanted, low + 2.5 * (top - low)))


def enlarge_end(ax, curves: Sequence[ArmLines], axis: Axis, target: float):
    """Draw the end of training in an inset, enlarged to tell arms apart. None if it has too few points."""
    whole = [line for item, line, _ in curves if line and any_finished(item.arm)]
    everything = every_line(curves)
    begin = end_begin(whole or everything, axis, 0.0 if len(curves) > 1 else 0.1)
    if begin is None:
        return None
    zoom = ax.inset_axes(INSET)
    for item, line, thin in curves:
        draw_lines(zoom, line, thin, {**item.look, "markersize": 4 if len(curves) < 5 else 3})
    zoom.set_xlim(begin, axis.end + 0.01 * (axis.end - begin))
    low, high = end_limits(everything, begin, target)
    zoom.set_ylim(low, high)
    zoom.set_title(f"the last {1 - begin / axis.end:.0%}", fontsize=8, fontweight="normal", pad=2)
    above = sum(line is not None and line.y[-1] > high for _, line, _ in curves)
    if above:
        note = f"{above} above this range"
        zoom.set_title(note, loc="right", fontsize=8, fontweight="normal", color=style.GREY, pad=2)
    zoom.tick_params(labelsize=8)
    label_ends(zoom, curves)
    return zoom


def any_finished(arm: Arm) -> bool:
    return any(run.state in FINISHED for run in arm.runs)


def end_begin(lines: Sequence[Line], axis: Axis, least: float) -> float | None:
    """The x at which the enlarged end begins; None if there are too few validations to enlarge anything.

    It is as short as possible, at least `least` of training, but long enough to hold some points and the end
    of every arm.
    """
    longest = max(lines, key=lambda line: line.x[-1])
    first_end = min(line.x[-1] for line in lines)
    for share in END_SHARES:
        begin = (1 - share) * first_end
        points = (longest.x >= begin).sum()
        if share >= least and points >= (END_POINTS if share < END_SHARES[-1] else 3):
            return max(begin, 0.4 * axis.end)
    return None


def end_limits(lines: Sequence[Line], begin: float, target: float) -> tuple[float, float]:
    """Limits of the enlarged end, by the bulk of the lines: a failed run must not flatten the others."""
    ranges = []
    for line in lines:
        late = line.x >= begin
        low, high = (line.y, line.y) if line.low is None else (line.low, line.high)
        y = np.concatenate([line.y[late], low[late][-1:], high[late][-1:]])
        if np.isfinite(y).any():
            ranges.append((np.nanmin(y), np.nanmax(y)))
    if not ranges:
        return 0.0, 1.0
    low = min(low for low, _ in ranges)
    highs = sorted(high for _, high in ranges)
    usual = highs[(len(highs) - 1) // 2]
    high = max(h for h in highs if h <= low + 3 * max(usual - low, 1e-3))
    if low - 0.6 * (high - low) < target < low:
        low = target
    margin = 0.08 * (high - low) or 0.01
    return low - margin, high + margin


def mark_target(panels, curves: Sequence[ArmLines], axis: Axis, target: float) -> None:
    """Put a star on each arm's line where all of its runs have met the target; for one arm, words too."""
    if len(curves) > MAX_MARKED:
        return
    for item, line, _ in curves:
        met = all_met(item.arm, target)
        if met is None or line is None:
            continue
        step, time_ms = met
        x = np.mean([axis.place(run, step) for run in item.arm.runs])
        y = np.interp(x, line.x, line.y)
        star = {"color": item.look["color"], "markersize": 12 if len(curves) < 4 else 9}
        for panel in panels:
            panel.plot(x, y, "*", **star, markeredgecolor="black", markeredgewidth=0.7, zorder=6)
        if len(curves) == 1:
            text = f"{target:g} met at step {step}, {style.format_time(time_ms)}"
            panels[0].set_title(text, loc="right", fontsize=9, fontweight="normal")


def label_ends(zoom, curves: Sequence[ArmLines]) -> None:
    """Name the lines beside their right ends, far enough apart to be read, in order of their losses."""
    if not 1 < len(curves) <= MAX_MARKED:
        return
    low, high = zoom.get_ylim()
    ends = []
    for item, line, _ in curves:
        known = np.flatnonzero(np.isfinite(line.y)) if line is not None else []
        if not len(known):
            continue
        x, y = line.x[known[-1]], line.y[known[-1]]
        if x >= zoom.get_xlim()[0] and low <= y <= high:
            ends.append((y, x, item.name, item.look["color"]))
    ends.sort()
    places, gap = [(y - low) / (high - low) for y, _, _, _ in ends], 0.062
    for i in range(1, len(places)):  # push up, then as far back down as the top demands
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else 1.0)
    for (y, x, name, colour), place in zip(ends, places, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "linestyle": ":", "relpos": (0, 0.5)}
        text = {"color": colour, "fontsize": 8, "va": "center", "annotation_clip": False, "arrowprops": arrow}
        zoom.annotate(name, (x, y), (1.07, place), textcoords="axes fraction", **text)


def panel_rho(ax, drawn: Sequence[Drawn], axis: Axis, title: str, keys: Mapping[str, str]) -> None:
    """Mean rho over layers: linear around zero, logarithmic beyond, to show both sign and magnitude.

    `keys` maps a logged key to its name; several are told apart by the dashes of their lines.
    """
    ax.set_title(title)
    sizes, logged = [], set()
    for number, key in enumerate(keys):
        for item in drawn:
            line, thin = lines_of(item.arm, key, axis)
            if line is None:
                continue
            look = item.line_look
            if len(keys) > 1:
                look |= {"linestyle": style.LINES[number], "linewidth": 1.3}
            draw_lines(ax, line, thin if len(item.arm.runs) < MIN_INTERVAL else [], look)
            sizes.append(np.abs(line.y[np.isfinite(line.y) & (line.y != 0)]))
            logged.add(id(item))
    sizes = np.concatenate(sizes) if sizes else np.zeros(0)
    if not len(sizes):
        style.say_nothing_logged(ax, "ρ (only runs with ORD log it)")
        return
    least = max(np.quantile(sizes, 0.05), sizes.max() * 1e-5)
    threshold = 10.0 ** math.floor(math.log10(least))
    ax.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # matplotlib's own wants text.parse_math
    ax.axhline(0, color="black", linewidth=1)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -1.5 * threshold), max(high, 1.5 * threshold))
    note = {"textcoords": "offset points", "fontsize": 8, "color": style.GREY, "ha": "right"}
    at = {"xy": (0.995, 0), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
    ax.annotate("ρ > 0: stepping along −G_par shrinks W", xytext=(0, 3), va="bottom", **at, **note)
    ax.annotate("ρ < 0: it grows W", xytext=(0, -3), va="top", **at, **note)
    if len(keys) > 1:
        style.line_legend(ax, list(keys.values()), loc="lower right")
    silent = [item.arm.label for item in drawn if id(item) not in logged]
    if silent:
        names = ", ".join(style.shorten(name, 24) for name in silent[:3])
        names += f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        ax.set_title(f"not logged: {names}", loc="right", fontsize=8, fontweight="normal", color=style.GREY)
    ax.set_xlabel(axis.label)
