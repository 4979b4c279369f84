"""Curves of arms: means over seeds with intervals, their panels and their names.

    from analysis.curves import Axis, Drawn, name_ends, panel_loss
    axis = Axis("steps", runs)
    drawn = [Drawn(arm, style.arm_style(i), arm.label, arm.label) for i, arm in enumerate(arms)]
    name_ends(drawn)
    panel_loss(ax, drawn, axis, target=3.28)

A picture builds one list of what is drawn; every panel gets that list. Matplotlib is not imported here.
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
END_SHARES = (0.03, 0.05, 0.1, 0.2, 0.4)  # the smallest part of the end with enough validations is enlarged
END_POINTS = 5
INSET = (0.30, 0.34, 0.56, 0.62)  # where: left, bottom, width and height in parts of the panel
MAX_MARKED = 12  # more arms than this get no stars and no names at their ends: they would cover each other
MAX_NAME = 12  # letters that fit beside the enlarged end
FINISHED = ("finished", "unknown")  # llm.c's logs do not say whether they are whole: taken for it


# ------------------------------------------------------------------------------------------------
# Numbers to draw
# ------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """A curve of an arm: x, y, and the interval around y (None for a single run)."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def x_of(run: RunLog, step: np.ndarray, axis: str) -> np.ndarray:
    """Places of a run's steps on the axis, in steps, tokens or ms. ValueError if they are not logged."""
    if axis == "steps":
        return step.astype(float)
    column = run.columns.get("tokens" if axis == "tokens" else "train_time")
    if column is None or not np.isfinite(column.value).any():
        raise ValueError(f"{run.path}: no {X_LABELS[axis]} in this log; draw it with --x steps")
    known = np.isfinite(column.value)
    return np.interp(step, column.step[known], column.value[known])


def curve_of(run: RunLog, key: str, axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, x and value of a logged quantity; lists are averaged over layers. Empty if it is not logged."""
    column = run.columns.get(key)
    if column is None or column.value.dtype == object or not len(column.step):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    value = column.value
    if value.ndim == 2:
        known = np.isfinite(value)
        value = np.where(known, value, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
    return column.step, x_of(run, column.step, axis), value


def lines_of(arm: Arm, key: str, axis: str) -> tuple[Line | None, list[Line]]:
    """An arm's line (its only run, or the mean of its finished runs), and runs to be drawn thinly."""
    curves = [(run, *curve_of(run, key, axis)) for run in arm.runs]
    curves = [curve for curve in curves if len(curve[1])]
    whole = [curve for curve in curves if curve[0].state in FINISHED]
    common = reduce(np.intersect1d, [step for _, step, _, _ in whole]) if len(whole) > 1 else []
    if not len(common):
        lines = [Line(x, y) for _, _, x, y in curves]
        return (lines[0], lines[1:]) if lines else (None, [])
    at = [np.searchsorted(step, common) for _, step, _, _ in whole]
    x = np.mean([x[i] for (_, _, x, _), i in zip(whole, at, strict=True)], axis=0)
    y = np.array([y[i] for (_, _, _, y), i in zip(whole, at, strict=True)])
    thin = [Line(x, y) for run, _, x, y in curves if run.state not in FINISHED]
    if len(y) < MIN_INTERVAL:  # show the two runs
        return Line(x, y.mean(0)), [Line(x, y[0]), Line(x, y[1]), *thin]
    summaries = [summarize(column) for column in y.T]
    low, high = np.array([[s.low, s.high] for s in summaries]).T
    return Line(x, y.mean(0), low, high), thin


def all_met(arm: Arm, target: float) -> tuple[int, float] | None:
    """First step at which all runs of an arm have met the target, and their mean training time in ms."""
    points = [run.first_at(target) for run in arm.runs]
    if any(point is None for point in points):
        return None
    step = max(point.step for point in points)
    return step, float(np.mean([np.interp(step, run.val.step, run.val.time_ms) for run in arm.runs]))


class Axis:
    """The x axis that all panels share: its unit and label."""

    def __init__(self, kind: str, runs: Sequence[RunLog]):
        self.kind, self.scale, self.label = kind, 1.0, X_LABELS[kind]
        ends = [x_of(run, np.array([run.last_step]), kind)[0] for run in runs if run.last_step >= 0]
        self.end = max(ends, default=1.0)
        if kind == "time":
            self.scale, unit = style.time_unit(self.end)
            self.label = f"training time, {unit}"
        elif kind == "tokens":
            units = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, ""))
            self.scale, unit = next(unit for unit in units if self.end >= unit[0] or not unit[1])
            self.label = f"training tokens, {unit}" if unit else "training tokens"
        self.end /= self.scale


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
    """Make all names fit beside their lines: the value of the one setting that differs, else a letter.

    A letter also goes before the label in the legend.
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
    """An arm in one panel: its line (None if nothing is logged), and single runs, drawn thinly."""

    drawn: Drawn
    line: Line | None
    thin: list[Line]


def draw(ax, line: Line | None, thin: Sequence[Line], look: dict, axis: Axis, **more) -> None:
    """Draw one arm's line with its interval, and its single runs thinly."""
    look = {**look, **more}
    if line is None:
        return
    if line.low is not None:
        ax.fill_between(line.x / axis.scale, line.low, line.high, color=look["color"], alpha=0.2, linewidth=0)
    for other in thin:
        dot = {"marker": ".", "markersize": 5} if len(other.y) == 1 else {}
        ax.plot(other.x / axis.scale, other.y, color=look["color"], linewidth=0.7, alpha=0.7, **dot)
    if len(line.y) == 1:  # a line of one point would not be seen
        look["marker"] = "o"
    ax.plot(line.x / axis.scale, line.y, **look)


def panel_loss(ax, drawn: Sequence[Drawn], axis: Axis, target: float) -> None:
    """Validation loss with the target, where it is met, and the end of training enlarged."""
    ax.set_title("validation loss")
    curves = [ArmLines(item, *lines_of(item.arm, "val_loss", axis.kind)) for item in drawn]
    everything = every_line(curves)
    if not everything:
        style.say_nothing_logged(ax, "validation loss")
        return
    if len(runs_of(drawn)) == 1:
        _, x, y = curve_of(drawn[0].arm.runs[0], "train_loss", axis.kind)
        ax.plot(x / axis.scale, y, color="#bbbbbb", linewidth=0.6, zorder=1)
        note = {"xycoords": "axes fraction", "fontsize": 8, "color": style.GREY}
        ax.annotate("grey: training loss", (0.02, 0.02), **note)
    for item, line, thin in curves:
        draw(ax, line, thin, item.line_look, axis)
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
    """Limits from below the lowest loss to the loss after 5% of training: the first fall dwarfs the rest."""
    every = np.concatenate([line.y for line in lines])
    every = every[np.isfinite(every)]
    if not len(every):
        return 0.0, 1.0
    early = [np.interp(0.05 * axis.end, line.x / axis.scale, line.y) for line in lines]
    low, top = every.min(), max([y for y in early if math.isfinite(y)], default=every.max())
    top = max(top, low + 1e-3)
    low = min(low, target) if low - target < 0.3 * (top - low) else low
    return low - 0.06 * (top - low), top + 0.02 * (top - low)


def room_for_inset(lines: Sequence[Line], axis: Axis, low: float, top: float) -> float:
    """The upper limit that keeps the lines below the enlarged end; a runaway run may pass behind it."""
    highest = low
    for line in lines:
        late = line.x / axis.scale >= 0.9 * INSET[0] * axis.end
        y = line.y if line.high is None else line.high
        highest = max(highest, np.nanmax(y[late], initial=low))
    wanted = low + (highest - low) / (INSET[1] - 0.07)
    return max(top, min(wanted, low + 2.5 * (top - low)))


def enlarge_end(ax, curves: Sequence[ArmLines], axis: Axis, target: float):
    """The end of training in an inset, on the scale that tells arms apart; None if it has too few points."""
    whole = [line for item, line, _ in curves if line and any_finished(item.arm)]
    everything = every_line(curves)
    begin = end_begin(whole or everything, axis, 0.0 if len(curves) > 1 else 0.1)
    if begin is None:
        return None
    zoom = ax.inset_axes(INSET)
    for item, line, thin in curves:
        draw(zoom, line, thin, item.look, axis, markersize=4 if len(curves) < 5 else 3)
    zoom.set_xlim(begin, axis.end + 0.01 * (axis.end - begin))
    low, high = end_limits(everything, axis, begin, target)
    zoom.set_ylim(low, high)
    zoom.set_title(f"the last {1 - begin / axis.end:.0%}", fontsize=8, fontweight="normal", pad=2)
    above = sum(line is not None and line.y[-1] > high for _, line, _ in curves)
    if above:
        note = f"{above} above this range"
        zoom.set_title(note, loc="right", fontsize=8, fontweight="normal", color=style.GREY, pad=2)
    zoom.tick_params(labelsize=8)
    label_ends(zoom, curves, axis)
    return zoom


def any_finished(arm: Arm) -> bool:
    return any(run.state in FINISHED for run in arm.runs)


def end_begin(lines: Sequence[Line], axis: Axis, least: float) -> float | None:
    """The place where the enlarged part begins; None if there are too few validations to enlarge anything.

    The smaller it is, the better arms are told apart; but it needs some points, and every arm's end.
    """
    longest = max(lines, key=lambda line: line.x[-1])
    first_end = min(line.x[-1] for line in lines) / axis.scale
    for share in END_SHARES:
        begin = (1 - share) * first_end
        points = (longest.x / axis.scale >= begin).sum()
        if share >= least and points >= (END_POINTS if share < END_SHARES[-1] else 3):
            return max(begin, 0.4 * axis.end)
    return None


def end_limits(lines: Sequence[Line], axis: Axis, begin: float, target: float) -> tuple[float, float]:
    """Limits of the enlarged end, by the bulk of the lines, so that a failed run flattens no others."""
    ranges = []
    for line in lines:
        late = line.x / axis.scale >= begin
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
        x = np.mean([x_of(run, np.array([step]), axis.kind)[0] for run in item.arm.runs])
        y = np.interp(x, line.x, line.y)
        star = {"color": item.look["color"], "markersize": 12 if len(curves) < 4 else 9}
        for panel in panels:
            panel.plot(x / axis.scale, y, "*", **star, markeredgecolor="black", markeredgewidth=0.7, zorder=6)
        if len(curves) == 1:
            text = f"{target:g} met at step {step}, {style.format_time(time_ms)}"
            panels[0].set_title(text, loc="right", fontsize=9, fontweight="normal")


def label_ends(zoom, curves: Sequence[ArmLines], axis: Axis) -> None:
    """Name the lines beside their right ends, far enough apart to be read, in order of their losses."""
    if not 1 < len(curves) <= MAX_MARKED:
        return
    low, high = zoom.get_ylim()
    ends = []
    for item, line, _ in curves:
        known = np.flatnonzero(np.isfinite(line.y)) if line is not None else []
        if not len(known):
            continue
        x, y = line.x[known[-1]] / axis.scale, line.y[known[-1]]
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
    """Mean rho over layers: linear around zero, logarithmic beyond, so that sign and magnitude both show.

    `keys` maps a logged key to its name; several are told apart by the dashes of their lines.
    """
    ax.set_title(title)
    sizes, logged = [], set()
    for number, key in enumerate(keys):
        for item in drawn:
            line, thin = lines_of(item.arm, key, axis.kind)
            if line is None:
                continue
            look = item.line_look
            if len(keys) > 1:
                look |= {"linestyle": style.LINES[number], "linewidth": 1.3}
            draw(ax, line, thin if len(item.arm.runs) < MIN_INTERVAL else [], look, axis)
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
