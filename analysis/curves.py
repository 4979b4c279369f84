"""Curves of arms and their panels: means over seeds with intervals, differences from a control.

    from analysis.curves import Axis, Drawn, draw_lines, lines_of, panel_loss
    axis = Axis("steps", runs)
    drawn = [Drawn(arm, looks[arm.label], arm.label) for arm in arms]
    panel_loss(ax, drawn, axis, target=(3.28, "--target"))
    panel_differences(ax, differences(drawn, {"a_1": "base"}, axis), axis, "base")
    for item in drawn:                       # a panel of any other logged quantity
        draw_lines(ax, *lines_of(item.arm, "val_acc", axis), item.line_look)

A picture makes one list of Drawn for all its panels. A panel with another x axis makes its own Axis.
Matplotlib is not imported here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby

import numpy as np

from analysis import style
from analysis.arms import Arm
from analysis.run_log import FINISHED, RunLog
from analysis.stats import Summary, compare, mean_by_seed, summarize
from analysis.tables import format_loss

X_LABELS = {"steps": "step", "tokens": "training tokens", "time": "training time"}
MAX_MARKED = 12  # with more arms, stars at the target would cover each other
MAX_BANDS = 5  # with more arms, bands of intervals would hide each other
MAX_NAME = 40  # characters beside the end of a line


# ------------------------------------------------------------------------------------------------
# Numbers to draw
# ------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """Curve to draw: `y` at each `step`, at `x` on the x axis.

    `low` to `high` is the interval around y; None for a single run.
    """

    step: np.ndarray
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    def since(self, x: float) -> "Line":
        """Return the part of the curve from `x` on."""
        parts = (self.step, self.x, self.y, self.low, self.high)
        return Line(*(None if part is None else part[self.x >= x] for part in parts))

    def without_interval(self) -> "Line":
        return replace(self, low=None, high=None)


def x_of(run: RunLog, step: np.ndarray, kind: str) -> np.ndarray:
    """Convert a run's steps to x values: tokens or ms of training, by kind of axis; NaN if not logged."""
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
    """An x axis: its kind (a key of X_LABELS), its unit and its label.

    `end` is where the last run ends. `begin` is the first validation after the first step: before it the
    weights are random, and a line down from their loss would hide all that follows.
    """

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
        self.end = self.end / self.scale or 1.0  # if step 0 is all there is, an axis needs a width
        firsts = [
            self.place(run, run.val.step[run.val.step > 0].min()) for run in started if run.val.step.any()
        ]
        self.begin = min([first for first in firsts if first < self.end], default=0.0)

    def places(self, run: RunLog, step: np.ndarray) -> np.ndarray:
        """Convert a run's steps to this axis, in its unit; NaN if the log does not give them."""
        return x_of(run, step, self.kind) / self.scale

    def place(self, run: RunLog, step: int) -> float:
        return float(self.places(run, np.array([step]))[0])

    def fit(self, ax) -> None:
        """Label a panel's x axis and show all of training."""
        ax.set_xlabel(self.label)
        ax.set_xlim(-0.01 * self.end, 1.01 * self.end)

    def fit_losses(self, ax) -> None:
        """Label a panel's x axis and show training from the first validation after step 0 on."""
        ax.set_xlabel(self.label)
        style.scale_positive(ax, self.begin, self.end)


def line_of(run: RunLog, key: str, axis: Axis) -> Line | None:
    """Return the curve of a logged quantity; None if it is not logged. Lists are averaged over layers."""
    column = run.columns.get(key)
    if column is None or column.value.dtype == object or not has_x(run, axis.kind):
        return None
    value = column.value
    if value.ndim == 2:
        known = np.isfinite(value)
        value = np.where(known, value, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
    return Line(column.step, axis.places(run, column.step), value)


def lines_of(arm: Arm, key: str, axis: Axis) -> tuple[Line | None, list[Line]]:
    """Return an arm's line (None if nothing is logged), and lines of single runs to draw thinly.

    An arm's line is that of its only run, or the mean of its finished seeds.
    """
    found = [(run, line) for run in arm.runs if (line := line_of(run, key, axis))]
    finished = [line for run, line in found if run.state in FINISHED]
    others = [line for run, line in found if run.state not in FINISHED]
    if not found:
        return None, []
    common = reduce(np.intersect1d, [line.step for line in finished]) if finished else np.zeros(0)
    if len(finished) < 2 or not len(common):  # no mean: the line is a finished run's, if there is one
        first, *rest = finished + others
        return first, rest
    at = [np.searchsorted(line.step, common) for line in finished]
    x = np.mean([line.x[i] for line, i in zip(finished, at, strict=True)], axis=0)
    losses = [line.y[i] for line, i in zip(finished, at, strict=True)]
    seeds = [run.seed for run, _ in found if run.state in FINISHED]
    y = np.array(mean_by_seed(losses, seeds)[0])
    if len(y) < style.MIN_INTERVAL:  # two seeds: show both
        return Line(common, x, y.mean(0)), [*(Line(common, x, each) for each in y), *others]
    summaries = [summarize(column) for column in y.T]
    low, high = np.array([[s.low, s.high] for s in summaries]).T
    return Line(common, x, y.mean(0), low, high), others


def all_met(arm: Arm, target: float) -> tuple[int, float] | None:
    """Return the first step at which all runs of an arm have met the target, and their mean time in ms.

    None if one of them has not met it.
    """
    points = [run.first_at(target) for run in arm.runs]
    if any(point is None for point in points):
        return None
    step = max(point.step for point in points)
    return step, float(np.mean([np.interp(step, run.val.step, run.val.time_ms) for run in arm.runs]))


# ------------------------------------------------------------------------------------------------
# Arms and their labels
# ------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Arm in a picture: its look, and its label in the legend."""

    arm: Arm
    look: dict
    label: str

    @property
    def line_look(self) -> dict:
        """Look without markers, for curves of many points."""
        return {"color": self.look["color"]}


def runs_of(drawn: Sequence[Drawn]) -> list[RunLog]:
    return [run for item in drawn for run in item.arm.runs]


def result_label(name: str, result: Summary, remarks: Sequence[str]) -> str:
    """Format an arm's name and final loss for a legend: a=0.1: 3.2705 ± 0.0012 (n=3, 1 failed)."""
    if not result.n:
        return f"{name}: {', '.join(remarks)}"
    interval = f" ± {(result.high - result.low) / 2:.4f}" if result.n >= style.MIN_INTERVAL else ""
    count = f"n={result.n}" if result.n > 1 else "a single run"
    return f"{name}: {format_loss(result.mean)}{interval} ({', '.join([count, *remarks])})"


def add_legend(fig, drawn: Sequence[Drawn], letters: int, title: str) -> None:
    """Add a legend of all that is drawn below the panels, `letters` wide, and its height to the page."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **item.look, markersize=5, label=item.label) for item in drawn]
    longest = max(len(item.label) for item in drawn) + 8  # with its mark
    place = {"loc": "outside lower center", "ncols": max(1, min(len(drawn), letters // longest))}
    bold = {"title_fontproperties": {"weight": "bold"}}
    legend = fig.legend(handles=handles, title=title, fontsize=9, **place, **bold)
    fig.set_figheight(fig.get_figheight() + legend.get_window_extent().height / fig.dpi)


# ------------------------------------------------------------------------------------------------
# Panels
# ------------------------------------------------------------------------------------------------


def draw_lines(ax, line: Line | None, thin: Sequence[Line], look: dict) -> None:
    """Draw an arm's line with its interval, and its single runs thinly; some points get its marker."""
    if line is None:
        return
    if line.low is not None:
        width, alpha = (2, 0.4) if line.y.size == 1 else (0, 0.15)  # a point's band is a bar
        ax.fill_between(line.x, line.low, line.high, color=look["color"], alpha=alpha, linewidth=width)
    for other in thin:
        dot = {"marker": ".", "markersize": 5} if len(other.y) == 1 else {}
        ax.plot(other.x, other.y, color=look["color"], linewidth=0.7, alpha=0.7, **dot)
    if line.y.size == 1:  # a line of one point would not be seen
        look = {"marker": "o", **look}
    ax.plot(line.x, line.y, **look, markersize=4.5, markevery=marker_step(line))


def marker_step(line: Line) -> int:
    """Number of points between a line's markers."""
    return max(1, len(line.y) // 8)


def is_logged(drawn: Sequence[Drawn], keys: Sequence[str], axis: Axis) -> bool:
    """True if any run logs one of these quantities, so that a panel of them is not empty."""
    return any(line_of(run, key, axis) for key in keys for run in runs_of(drawn))


def panel_loss(ax, drawn: Sequence[Drawn], axis: Axis, target: tuple[float, str] | None = None) -> None:
    """Draw validation loss from the first validation after step 0 on, with the target and where it is met.

    A single run's training loss is drawn, too. A target is a loss and its source.
    """
    runs, lines = runs_of(drawn), []
    ax.set_title(f"validation loss, {style.loss_unit(runs)}")
    if len(runs) == 1 and (train := line_of(runs[0], "train_loss", axis)):
        ax.plot(train.x, train.y, color="#cccccc", linewidth=0.6, zorder=1)
        ax.set_title("grey: training loss", loc="right", fontsize=9, fontweight="normal", color=style.GREY)
        lines = [] if is_logged(drawn, ["val_loss"], axis) else [train]
    lines += draw_since(ax, drawn, "val_loss", axis)
    axis.fit_losses(ax)
    low, high = loss_limits(lines)
    if target and 0 < low - target[0] < 0.1 * (high - low):
        low = target[0] - 0.04 * (high - low)
    ax.set_ylim(low, high)
    if target and low < target[0] < high:
        draw_target(ax, drawn, axis, *target)


def draw_since(ax, drawn: Sequence[Drawn], key: str, axis: Axis) -> list[Line]:
    """Draw a logged quantity of all arms from the first validation after step 0 on; return the lines."""
    found = []
    for item in drawn:
        line, thin = lines_of(item.arm, key, axis)
        if line:
            line, thin = line.since(axis.begin), [other.since(axis.begin) for other in thin]
            draw_lines(ax, line, thin, {**item.look, "label": item.label})
            found += [line, *thin]
    return found


def loss_limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Limits from below the lowest loss to the highest first one; later rises may leave the panel."""
    shown = [line.y[np.isfinite(line.y)] for line in lines]
    shown += [np.append(line.high, line.low) for line in lines if line.low is not None and line.y.size == 1]
    shown = [y for y in shown if len(y)]
    if not shown:
        return 0.0, 1.0
    low, top = min(y.min() for y in shown), max(y[0] for y in shown)
    margin = 0.06 * (top - low) or 0.01
    return low - margin, top + margin


def draw_target(ax, drawn: Sequence[Drawn], axis: Axis, target: float, reason: str) -> None:
    """Draw the target with its reason, and a star on each line where all of the arm's runs have met it."""
    ax.axhline(target, color=style.GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    text = f"target {target:g} ({reason})"
    for item in drawn if len(drawn) <= MAX_MARKED else ():
        met, (line, _) = all_met(item.arm, target), lines_of(item.arm, "val_loss", axis)
        if met is None or line is None:
            continue
        x = np.mean([axis.place(run, met[0]) for run in item.arm.runs])
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.7, "zorder": 6}
        ax.plot(x, np.interp(x, line.x, line.y), "*", color=item.look["color"], markersize=12, **edge)
        if len(drawn) == 1:
            text += f", met at step {met[0]}, after {style.format_time(met[1])}"
    note = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 9}
    ax.annotate(text, (0.01, target), (0, 3), color=style.GREY, **note)


def differences(drawn: Sequence[Drawn], controls: Mapping[str, str], axis: Axis) -> list[tuple[Drawn, Line]]:
    """Return each arm's validation loss minus its control's, where both exist; `controls` are labels."""
    arms = {item.arm.label: item.arm for item in drawn}
    found = []
    for item in drawn:
        other = arms.get(controls.get(item.arm.label))
        line = difference_of(item.arm, other, axis) if other else None
        if line:
            found.append((item, line))
    return found


def difference_of(arm: Arm, control: Arm, axis: Axis) -> Line | None:
    """Return an arm's validation loss minus another's, paired by seed if both have the same seeds.

    Finished runs are used, if there are any, at the steps where all were validated; None without such a step.
    """
    ours, theirs = _measured(arm, axis), _measured(control, axis)
    if not ours or not theirs:
        return None
    common = reduce(np.intersect1d, [line.x for _, line in (*ours, *theirs)])
    common = common[common > 0]  # before the first step only the seeds differ
    if not len(common):
        return None
    (a, a_seeds), (b, b_seeds) = (_losses_by_seed(side, common) for side in (ours, theirs))
    pairs = [compare(x, y, a_seeds, b_seeds) for x, y in zip(a, b, strict=True)]
    line = Line(ours[0][1].step, common, np.array([pair.difference for pair in pairs]))
    last = pairs[-1]
    if style.ends_of(last.low, last.high, min(last.n_arm, last.n_control)):
        line.low, line.high = np.array([[pair.low, pair.high] for pair in pairs]).T
    return line


def _losses_by_seed(measured: Sequence[tuple[RunLog, Line]], x: np.ndarray) -> tuple[np.ndarray, list]:
    """Return losses at these places on the axis, a column a seed, and the seeds."""
    losses = [line.y[np.searchsorted(line.x, x)] for _, line in measured]
    means, seeds = mean_by_seed(losses, [run.seed for run, _ in measured])
    return np.transpose(means), seeds


def _measured(arm: Arm, axis: Axis) -> list[tuple[RunLog, Line]]:
    """Validation losses of an arm's finished runs; of all, if none has finished."""
    found = [(run, line) for run in arm.runs if (line := line_of(run, "val_loss", axis))]
    return [(run, line) for run, line in found if run.state in FINISHED] or found


def panel_differences(ax, found: Sequence[tuple[Drawn, Line]], axis: Axis, control: str) -> None:
    """Draw losses minus the control's over training, on an axis for both small and large ones."""
    few = len(found) <= MAX_BANDS
    title = f"validation loss minus that of {style.shorten(control, 26)}"
    bands = few and any(line.low is not None for _, line in found)
    ax.set_title(f"{title}, 95% interval" if bands else title)
    values, noise, ends = [], [], [(axis.end, 0.0, style.shorten(control, MAX_NAME), "black")]
    names = style.shorten_apart([item.arm.label for item, _ in found], MAX_NAME)
    for (item, line), name in zip(found, names, strict=True):
        values.append(line.y)
        if line.low is not None:
            noise.append((line.high - line.low) / 2)
            values += [line.low, line.high] if few else []
        if few:
            draw_lines(ax, line, [], item.look)
        else:
            draw_lines(ax, line.without_interval(), [], {**item.look, "markerfacecolor": "white"})
            fill_clear(ax, line, item.look)
        if math.isfinite(line.y[-1]):
            ends.append((float(line.x[-1]), line.y[-1], name, item.look["color"]))
    ax.axhline(0, color="black", linewidth=1.2, zorder=1)
    style.scale_signed(ax, "y", np.concatenate(values), np.concatenate(noise) if noise else ())
    ax.set_ylabel(f"{style.loss_unit(runs_of([item for item, _ in found]))}; below 0 is better")
    axis.fit_losses(ax)
    if not few:
        key = (
            "filled: the 95% interval, by itself, is clear of 0" if noise else "hollow: too few runs to tell"
        )
        ax.set_xlabel(f"{axis.label}\n{key}")
    label_ends(ax, ends)


def fill_clear(ax, line: Line, look: dict) -> None:
    """Fill a line's markers only where its interval excludes zero, so that noise does not look real."""
    if line.low is not None:
        shown = np.arange(0, len(line.y), marker_step(line))
        clear = shown[(line.low * line.high > 0)[shown]]
        ax.plot(line.x[clear], line.y[clear], **look, linestyle="none", markersize=4.5, zorder=3)


def label_ends(ax, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside the ends of lines, spread apart; ends are (x, y, name, colour).

    Lines that reach the last end have their names to the right of the panel.
    """
    last, to_panel = max((x for x, *_ in ends), default=0.0), ax.transScale + ax.transLimits
    ax.figure.draw_without_rendering()  # gives the panel its height
    inches = ax.get_window_extent().height / ax.figure.dpi
    for x, together in groupby(sorted(ends), key=lambda end: end[0]):
        group = list(together)
        size = min(9.0, 0.8 * inches * 72 / len(group))
        places, gap = to_panel.transform([(x, y) for _, y, *_ in group])[:, 1], 1.25 * size / 72 / inches
        for i in range(1, len(places)):  # push up, then back down as far as the top requires
            places[i] = max(places[i], places[i - 1] + gap)
        for i in reversed(range(len(places))):
            places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else 1.0)
        across = to_panel.transform((x, 1))[0] + 0.03 if x < last else 1.04
        for (_, y, name, colour), place in zip(group, places, strict=True):
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "linestyle": ":"}
            text = {"color": colour, "fontsize": size, "va": "center", "annotation_clip": False}
            at = {"textcoords": "axes fraction", "arrowprops": {**arrow, "relpos": (0, 0.5)}}
            ax.annotate(name, (x, y), (across, place), **at, **text)
    style.make_room(ax)


def panel_rho(ax, drawn: Sequence[Drawn], axis: Axis, title: str, keys: Mapping[str, str]) -> None:
    """Draw mean rho over layers: linear around zero, logarithmic beyond, to show sign and magnitude.

    `keys` maps a logged key to its name; several are distinguished by dashes.
    """
    ax.set_title(title)
    sizes, logged = [], set()
    for number, key in enumerate(keys):
        for item in drawn:
            line, thin = lines_of(item.arm, key, axis)
            if line is None:
                continue
            look = item.look
            if len(keys) > 1:
                look = {**item.line_look, "linestyle": style.LINES[number], "linewidth": 1.3}
            if len(drawn) > MAX_BANDS:
                line, thin = line.without_interval(), []
            draw_lines(ax, line, thin if len(item.arm.runs) < style.MIN_INTERVAL else [], look)
            sizes.append(line.y)
            logged.add(id(item))
    sizes = np.concatenate(sizes)
    known = np.abs(sizes[np.isfinite(sizes) & (sizes != 0)])
    step = style.scale_signed(ax, "y", sizes, np.quantile(known, [0.05]) if len(known) else ())
    ax.axhline(0, color="black", linewidth=1)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.6 * step), max(high, 0.6 * step))  # room for the text at zero
    note = {"textcoords": "offset points", "fontsize": 8, "color": style.GREY, "ha": "right"}
    at = {"xy": (0.995, 0), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
    ax.annotate("ρ > 0: stepping along −G_par shrinks W", xytext=(0, 3), va="bottom", **at, **note)
    ax.annotate("ρ < 0: it grows W", xytext=(0, -3), va="top", **at, **note)
    if len(keys) > 1:
        style.line_legend(ax, list(keys.values()), loc="lower right")
    silent = [style.shorten(item.arm.label, 24) for item in drawn if id(item) not in logged]
    more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
    ax.set_xlabel(f"{axis.label}\nnot logged: {silent[0]}{more}" if silent else axis.label)
