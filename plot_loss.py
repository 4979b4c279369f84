"""Draws the curves of one or more runs and prints a summary of each.

    python plot_loss.py                               # the newest log in logs/
    python plot_loss.py logs/a.txt logs/b.txt         # compared
    python plot_loss.py logs --x time --out all.svg   # every log in a folder, against training time

Six panels: validation loss with its end enlarged, training time, learning rate, betas, batch size, and rho,
the signed radial part of the gradient. Runs that differ only in their seed are drawn as a mean with its 95%
interval (from three runs on; of two, both are drawn); --separate draws each run for itself. The target is the
runs' own TARGET_LOSS, else 3.28; a star marks the first validation at which all runs of an arm have met it.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from analysis import style
from analysis.arms import Arm, group_by_arm
from analysis.run_log import RunLog, newest_log, read_runs
from analysis.stats import summarize

X_LABELS = {"steps": "step", "tokens": "training tokens", "time": "training time"}
END_SHARES = (0.03, 0.05, 0.1, 0.2, 0.4)  # the smallest part of the end with enough validations is enlarged
END_POINTS = 5
INSET = (0.30, 0.34, 0.56, 0.62)  # where: left, bottom, width and height in parts of the panel
MAX_MARKED = 12  # more arms than this get no stars and no names at their ends: they would cover each other
MAX_NAME = 12  # letters that fit beside the enlarged end
FINISHED = ("finished", "unknown")  # llm.c's logs do not say whether they are whole: taken for it
SCHEDULES = (
    ("learning rate, times its base", [("lr_mul", "lr")]),
    ("betas and momentum", [("beta1", "beta1"), ("beta2", "beta2"), ("muon_momentum", "Muon momentum")]),
    ("batch size, tokens", [("batch_size", "batch size")]),
)


# ------------------------------------------------------------------------------------------------
# Numbers to draw
# ------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """A curve of an arm: x, y, and the interval around y (None if it is a single run)."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def x_of(run: RunLog, step: np.ndarray, axis: str) -> np.ndarray:
    """Where steps of a run stand on the axis: steps, tokens, or ms. ValueError if the log does not say."""
    if axis == "steps":
        return step.astype(float)
    column = run.columns.get("tokens" if axis == "tokens" else "train_time")
    if column is None or not np.isfinite(column.value).any():
        raise ValueError(f"{run.path}: no {X_LABELS[axis]} in this log; draw it with --x steps")
    known = np.isfinite(column.value)
    return np.interp(step, column.step[known], column.value[known])


def curve_of(run: RunLog, key: str, axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, x and value of a logged quantity; of a list, its mean over layers. Empty if it is not logged."""
    column = run.columns.get(key)
    if column is None or column.value.dtype == object or not len(column.step):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    value = column.value
    if value.ndim == 2:
        known = np.isfinite(value)
        value = np.where(known, value, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
    return column.step, x_of(run, column.step, axis), value


def lines_of(arm: Arm, key: str, axis: str) -> tuple[Line | None, list[Line]]:
    """An arm's line (its only run, or the mean of the finished ones), and runs to be drawn thinly."""
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
    if len(y) == 2:  # an interval from two runs is wider than the plot: show the two
        return Line(x, y.mean(0)), [Line(x, y[0]), Line(x, y[1]), *thin]
    summaries = [summarize(column) for column in y.T]
    low, high = np.array([[s.low, s.high] for s in summaries]).T
    return Line(x, y.mean(0), low, high), thin


def final_losses(arm: Arm) -> list[float]:
    """Final losses of an arm's finished runs; NaN for those that failed, none for those under way."""
    ended = [run for run in arm.runs if run.state in (*FINISHED, "crashed", "diverged")]
    return [run.final_val_loss if run.state in FINISHED else math.nan for run in ended]


def name_of(arm: Arm) -> str:
    """What sets the arm apart; for a run with a long list of that, the name its user gave it."""
    return arm.runs[0].run_id if len(arm.runs) == 1 and len(arm.label) > 40 else arm.label


def legend_label(arm: Arm) -> str:
    """Name and result of an arm."""
    name = style.shorten(name_of(arm), 60)
    if len(arm.runs) == 1:
        run = arm.runs[0]
        state = "" if run.state in FINISHED else f", {run.state} at step {run.last_step}"
        return f"{name}: {style.format_loss(run.final_val_loss)}{state}"
    result = summarize(final_losses(arm))
    half = (result.high - result.low) / 2
    interval = f" ± {half:.4f}" if result.n > 2 else ""
    lost = f", {len(arm.runs) - result.n} unfinished" if len(arm.runs) > result.n else ""
    return f"{name}: {style.format_loss(result.mean)}{interval} (n={result.n}{lost})"


# ------------------------------------------------------------------------------------------------
# Panels
# ------------------------------------------------------------------------------------------------


class Axis:
    """The x axis common to all panels: its unit, and how to label it."""

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


def draw(ax, line: Line | None, thin: Sequence[Line], look: dict, axis: Axis, **more) -> None:
    """One arm's line with its interval, and its single runs thinly."""
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


def plain(look: dict) -> dict:
    """A look without markers, for curves of many points."""
    return {key: value for key, value in look.items() if key != "marker"}


def all_met(arm: Arm, target: float) -> tuple[int, float] | None:
    """First step at which all runs of an arm have met the target, and their mean training time, in ms."""
    points = [run.first_at(target) for run in arm.runs]
    if any(point is None for point in points):
        return None
    step = max(point.step for point in points)
    return step, float(np.mean([np.interp(step, run.val.step, run.val.time_ms) for run in arm.runs]))


def panel_loss(ax, arms: Sequence[Arm], looks: Sequence[dict], axis: Axis, target: float) -> None:
    """Validation loss with the target, where it is met, and the end of training enlarged."""
    ax.set_title("validation loss")
    lines = [lines_of(arm, "val_loss", axis.kind) for arm in arms]
    everything = [line for first, thin in lines for line in ([first] if first else []) + thin]
    if not everything:
        style.say_nothing_logged(ax, "validation loss")
        return
    if len(arms) == 1 and len(arms[0].runs) == 1:
        _, x, y = curve_of(arms[0].runs[0], "train_loss", axis.kind)
        ax.plot(x / axis.scale, y, color="#bbbbbb", linewidth=0.6, zorder=1)
        note = {"xycoords": "axes fraction", "fontsize": 8, "color": style.GREY}
        ax.annotate("grey: training loss", (0.02, 0.02), **note)
    for (line, thin), look in zip(lines, looks, strict=True):
        draw(ax, line, thin, plain(look), axis)
    low, top = loss_limits(everything, axis, target)
    zoom = enlarge_end(ax, arms, lines, looks, axis, target)
    if zoom:  # the scale leaves it room above the lines
        late = [line.x / axis.scale >= 0.9 * INSET[0] * axis.end for line in everything]
        ends = [line.y if line.high is None else line.high for line in everything]
        highest = max((np.nanmax(y[x], initial=low) for x, y in zip(late, ends, strict=True)), default=low)
        wanted = low + (highest - low) / (INSET[1] - 0.07)
        top = max(top, min(wanted, low + 2.5 * (top - low)))  # a runaway run may pass behind it
    ax.set_ylim(low, top)
    if low < target < top:
        note = {"xycoords": ("axes fraction", "data"), "fontsize": 8, "va": "bottom"}
        ax.annotate(f"target {target:g}", (0.01, target), **note)
    panels = [ax, zoom] if zoom else [ax]
    for panel in panels:
        panel.axhline(target, color=style.GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    mark_target(panels, arms, lines, looks, axis, target)


def loss_limits(lines: Sequence[Line], axis: Axis, target: float) -> tuple[float, float]:
    """From below the lowest loss to that after the first 5% of training, whose fall would dwarf the rest."""
    every = np.concatenate([line.y for line in lines])
    every = every[np.isfinite(every)]
    if not len(every):
        return 0.0, 1.0
    early = [np.interp(0.05 * axis.end, line.x / axis.scale, line.y) for line in lines]
    low, top = every.min(), max([y for y in early if math.isfinite(y)], default=every.max())
    top = max(top, low + 1e-3)
    low = min(low, target) if low - target < 0.3 * (top - low) else low
    return low - 0.06 * (top - low), top + 0.02 * (top - low)


def enlarge_end(ax, arms, lines, looks, axis: Axis, target: float):
    """The end of training in an inset, on the scale that tells arms apart; None if it has too few points."""
    whole = [line for arm, (line, _) in zip(arms, lines, strict=True) if line and any_finished(arm)]
    everything = [line for first, thin in lines for line in ([first] if first else []) + thin]
    begin = end_begin(whole or everything, axis, 0.0 if len(arms) > 1 else 0.1)
    if begin is None:
        return None
    zoom = ax.inset_axes(INSET)
    for (line, thin), look in zip(lines, looks, strict=True):
        draw(zoom, line, thin, look, axis, markersize=4 if len(arms) < 5 else 3)
    zoom.set_xlim(begin, axis.end + 0.01 * (axis.end - begin))
    low, high = end_limits(everything, axis, begin, target)
    zoom.set_ylim(low, high)
    zoom.set_title(f"the last {1 - begin / axis.end:.0%}", fontsize=8, fontweight="normal", pad=2)
    above = sum(first is not None and first.y[-1] > high for first, _ in lines)
    if above:
        note = f"{above} above this range"
        zoom.set_title(note, loc="right", fontsize=8, fontweight="normal", color=style.GREY, pad=2)
    zoom.tick_params(labelsize=8)
    label_ends(zoom, arms, lines, looks, axis)
    return zoom


def any_finished(arm: Arm) -> bool:
    return any(run.state in FINISHED for run in arm.runs)


def end_begin(lines: Sequence[Line], axis: Axis, least: float) -> float | None:
    """Where the part to enlarge begins; None if there are too few validations to enlarge anything.

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
    """Limits for the enlarged end: the bulk of the lines decides, so that a failed one flattens no others."""
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


def mark_target(panels, arms, lines, looks, axis: Axis, target: float) -> None:
    """A star on each arm's line where all of its runs have met the target; of one arm, in words too."""
    if len(arms) > MAX_MARKED:
        return
    for arm, (line, _), look in zip(arms, lines, looks, strict=True):
        met = all_met(arm, target)
        if met is None or line is None:
            continue
        x = np.mean([x_of(run, np.array([met[0]]), axis.kind)[0] for run in arm.runs])
        y = np.interp(x, line.x, line.y)
        star = {"color": look["color"], "markersize": 12 if len(arms) < 4 else 9, "markeredgecolor": "black"}
        for panel in panels:
            panel.plot(x / axis.scale, y, "*", **star, markeredgewidth=0.7, zorder=6)
        if len(arms) == 1:
            text = f"{target:g} met at step {met[0]}, {style.format_time(met[1])}"
            panels[0].set_title(text, loc="right", fontsize=9, fontweight="normal")


def label_ends(zoom, arms, lines, looks, axis: Axis) -> None:
    """Names the lines beside their right ends, apart enough to be read, in order of their losses."""
    if not 1 < len(arms) <= MAX_MARKED:
        return
    low, high = zoom.get_ylim()
    ends = []
    for name, (line, _), look in zip(short_names(arms), lines, looks, strict=True):
        known = np.flatnonzero(np.isfinite(line.y)) if line is not None else []
        if (
            len(known)
            and line.x[known[-1]] / axis.scale >= zoom.get_xlim()[0]
            and low <= line.y[known[-1]] <= high
        ):
            ends.append((line.y[known[-1]], line.x[known[-1]] / axis.scale, name, look["color"]))
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


def short_names(arms: Sequence[Arm]) -> list[str]:
    """Names that fit beside a line: the value of the one setting that differs, the label, else a letter."""
    words = [arm.label.split() for arm in arms]
    if all(len(w) == 1 and "=" in w[0] for w in words) and len({w[0].split("=")[0] for w in words}) == 1:
        names = [w[0].split("=", 1)[1] for w in words]
    else:
        names = [name_of(arm) for arm in arms]
    return names if max(map(len, names)) <= MAX_NAME else [letter(number) for number in range(len(arms))]


def letter(number: int) -> str:
    return chr(ord("A") + number)


def panel_time(ax, arms: Sequence[Arm], looks: Sequence[dict], axis: Axis) -> None:
    """Training time over steps or tokens; steps over training time, if that is the x axis."""
    if axis.kind == "time":
        ax.set_title("steps done")
        for arm, look in zip(arms, looks, strict=True):
            for run in arm.runs:
                _, x, _ = curve_of(run, "train_time", "time")
                step = run.columns["train_time"].step
                ax.plot(x / axis.scale, step, **plain(look))
        return
    longest = max(
        (run.last_time_ms for run in _runs(arms) if math.isfinite(run.last_time_ms)), default=math.nan
    )
    if not math.isfinite(longest):
        style.say_nothing_logged(ax, "training time")
        return
    scale, unit = style.time_unit(longest)
    ax.set_title(f"training time, {unit}")
    for arm, look in zip(arms, looks, strict=True):
        for run in arm.runs:
            _, x, y = curve_of(run, "train_time", axis.kind)
            ax.plot(x / axis.scale, y / scale, **{**plain(look), "linewidth": 1.2})


def _runs(arms: Sequence[Arm]) -> list[RunLog]:
    return [run for arm in arms for run in arm.runs]


def panel_schedule(
    ax, arms: Sequence[Arm], looks: Sequence[dict], axis: Axis, title: str, keys: list
) -> None:
    """Scheduled quantities; drawn once, in grey, where they are the same in all arms."""
    ax.set_title(title)
    names, all_same, seen = [], True, []
    for number, (key, name) in enumerate(keys):
        curves = [curve_of(arm.runs[0], key, axis.kind) for arm in arms]
        logged = [curve for curve in curves if len(curve[0])]
        if not logged:
            continue
        line = style.LINES[number % len(style.LINES)]
        same = len(arms) > 1 and len(logged) == len(arms) and _same(curves)
        for (step, x, y), look in zip(curves[:1] if same else curves, looks, strict=False):
            if len(step):
                look = {**plain(look), "drawstyle": "steps-post"}
                look["linestyle"] = line if len(keys) > 1 or same else look["linestyle"]
                ax.plot(x / axis.scale, y, **{**look, "color": "#444444" if same else look["color"]})
        seen += [y for _, _, y in logged]
        names.append((name, line))
        all_same = all_same and same
    if not names:
        style.say_nothing_logged(ax, title)
        return
    if all_same:
        ax.set_title("the same in all", loc="right", fontsize=9, fontweight="normal", color=style.GREY)
    if len(keys) > 1:
        handles = [ax.plot([], [], color=style.GREY, linestyle=line, label=name)[0] for name, line in names]
        ax.legend(
            handles=handles, fontsize=8, loc="center right", framealpha=0.8, frameon=True, edgecolor="none"
        )
    if title.startswith("batch"):
        ax.set_ylim(0, 1.08 * max(np.nanmax(y) for y in seen))
        sizes = np.unique(np.concatenate(seen))
        if len(sizes) <= 6:
            ax.set_yticks(
                sizes, [f"{v / 1024:g}k" if v >= 1024 and v % 128 == 0 else f"{v:g}" for v in sizes]
            )


def _same(curves: list) -> bool:
    """Whether curves agree at the steps they have in common (runs may be logged more or less often)."""
    step, _, y = curves[0]
    for other_step, _, other in curves[1:]:
        _, here, there = np.intersect1d(step, other_step, return_indices=True)
        if len(here) < min(len(step), len(other_step)) / 2 or not np.array_equal(y[here], other[there]):
            return False
    return True


def panel_rho(ax, arms: Sequence[Arm], looks: Sequence[dict], axis: Axis) -> None:
    """Signed mean rho of attention and MLP matrices, on an axis that is linear around zero."""
    title = "mean ρ = ⟨G,W⟩ / ‖W‖² over layers, signed"
    ax.set_title(title)
    sizes = []
    kinds = [("spec_attn", "attention", style.LINES[0]), ("spec_mlp", "MLP", style.LINES[1])]
    for key, _, dashes in kinds:
        for arm, look in zip(arms, looks, strict=True):
            line, thin = lines_of(arm, key, axis.kind)
            draw(
                ax,
                line,
                thin if len(arm.runs) < 4 else [],
                plain(look),
                axis,
                linestyle=dashes,
                linewidth=1.3,
            )
            if line is not None:
                sizes.append(np.abs(line.y[np.isfinite(line.y) & (line.y != 0)]))
    sizes = np.concatenate(sizes) if sizes else np.zeros(0)
    if not len(sizes):
        style.say_nothing_logged(ax, "ρ (only runs with ORD log it)")
        return
    threshold = 10.0 ** math.floor(math.log10(max(np.quantile(sizes, 0.1), sizes.max() * 1e-4)))
    ax.set_yscale("symlog", linthresh=threshold)
    ax.axhline(0, color="black", linewidth=0.8)
    handles = [ax.plot([], [], color=style.GREY, linestyle=line, label=name)[0] for _, name, line in kinds]
    ax.legend(handles=handles, fontsize=8, loc="lower right", framealpha=0.8, frameon=True, edgecolor="none")


def figure(arms: Sequence[Arm], axis_kind: str, target: float):
    """The six panels with one legend below."""
    plt = style.load_matplotlib()
    axis = Axis(axis_kind, _runs(arms))
    looks = [style.arm_style(number) for number in range(len(arms))]
    labels = [legend_label(arm) for arm in arms]
    if 1 < len(arms) <= MAX_MARKED and short_names(arms)[0] == letter(0):
        labels = [f"{letter(number)}  {label}" for number, label in enumerate(labels)]
    columns = max(1, min(len(arms), 190 // (max(map(len, labels)) + 8)))
    legend_inches = 0.35 + 0.2 * math.ceil(len(arms) / columns)
    height = 9.4 + legend_inches
    fig, axes = plt.subplots(2, 3, figsize=(16, height), width_ratios=(1.7, 1, 1), height_ratios=(1.35, 1))
    panel_loss(axes[0, 0], arms, looks, axis, target)
    panel_time(axes[0, 1], arms, looks, axis)
    for place, (title, keys) in zip([axes[0, 2], axes[1, 1], axes[1, 2]], SCHEDULES, strict=True):
        panel_schedule(place, arms, looks, axis, title, keys)
    panel_rho(axes[1, 0], arms, looks, axis)
    for ax in axes.flat:
        ax.set_xlabel(axis.label)
        ax.set_xlim(-0.01 * axis.end, 1.01 * axis.end)
    handles = [
        plt.Line2D([], [], **{**look, "markersize": 5}, label=label)
        for look, label in zip(looks, labels, strict=True)
    ]
    fig.legend(
        handles=handles,
        loc="lower center",
        ncols=columns,
        fontsize=9,
        title="final validation loss",
        title_fontproperties={"weight": "bold"},
    )
    fig.tight_layout(rect=(0, legend_inches / height, 1, 1))
    return fig


# ------------------------------------------------------------------------------------------------
# The summary in words
# ------------------------------------------------------------------------------------------------


def summary(runs: Sequence[RunLog], arms: Sequence[Arm], target: float) -> str:
    """A table of the runs and, if any were pooled, one of the arms."""
    rows = []
    for run in runs:
        met = run.first_at(target)
        per_step = run.last_time_ms / run.last_step if run.last_step > 0 else math.nan
        rows.append(
            [
                style.shorten(run.run_id, 70),
                run.state,
                "-" if run.seed is None else run.seed,
                f"{max(run.last_step, 0)}/{run.num_steps or '?'}",
                style.format_loss(run.final_val_loss),
                style.format_loss(run.best_val_loss),
                style.format_time(run.last_time_ms),
                f"{per_step:.1f}" if math.isfinite(per_step) else "-",
                met.step if met else "not met",
                style.format_time(met.time_ms) if met else "-",
            ]
        )
    header = [
        "run",
        "state",
        "seed",
        "steps",
        "final loss",
        "best",
        "time",
        "ms/step",
        f"{target:g} at step",
        "in",
    ]
    text = style.format_table(header, rows)
    pooled = [arm for arm in arms if len(arm.runs) > 1]
    if pooled:
        arm_rows = []
        for arm in arms:
            met = all_met(arm, target)
            steps = f"{met[0]}, {style.format_time(met[1])}" if met else "not by all"
            arm_rows.append([style.shorten(name_of(arm), 70), summarize(final_losses(arm)), steps])
        header = ["arm", "final validation loss", f"all runs at {target:g}"]
        text += "\n\n" + style.format_table(header, arm_rows)
    return text


def order_of(arm: Arm) -> float:
    """Arms of one numeric setting are drawn in its order; any others as they come."""
    name, _, value = arm.label.partition("=")
    try:
        return float(value) if " " not in name else 0.0
    except ValueError:
        return 0.0


def choose(runs: Sequence[RunLog], axis: str) -> tuple[list[RunLog], list[str]]:
    """The runs that can be drawn on this axis, and why the others cannot."""
    drawn, left_out = [], []
    for run in runs:
        try:
            if run.last_step < 0:
                raise ValueError(f"{run.path}: no step in this log yet, nothing to draw")
            x_of(run, np.zeros(1), axis)
            drawn.append(run)
        except ValueError as reason:
            left_out.append(str(reason))
    return drawn, left_out


def remarks(runs: Sequence[RunLog]) -> list[str]:
    """What the reader could not read."""
    unread = {run.path: run for run in runs if run.unread_lines}
    return [
        f"{path}: {run.unread_lines} lines could not be read, such as {run.unread_examples[0].strip()[:90]!r}"
        for path, run in unread.items()
        if run.unread_examples
    ]


def default_out(runs: Sequence[RunLog], now: float) -> Path:
    """logs/RUN_ID.png for one run; for several, a name with their number and the time, beside the first."""
    folder = runs[0].path.parent
    if len({run.path for run in runs}) == 1:
        return folder / f"{runs[0].path.stem}.png"
    return folder / f"loss_{len(runs)}runs_{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}.png"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "logs", nargs="*", type=Path, help="logs or folders of logs (default: the newest in logs/)"
    )
    parser.add_argument(
        "--out", type=Path, help="where to write, .png .svg or .pdf (default: logs/RUN_ID.png)"
    )
    parser.add_argument("--x", choices=X_LABELS, default="steps", help="what curves are drawn against")
    parser.add_argument(
        "--target", type=float, help="target loss (default: the runs' TARGET_LOSS, else 3.28)"
    )
    parser.add_argument(
        "--separate", action="store_true", help="do not pool runs that differ only in their seed"
    )
    options = parser.parse_args(arguments)
    try:
        logs = options.logs or [newest_log("logs")]
        if logs == [None]:
            raise ValueError("there is no log in logs/ yet: train first, or name a log")
        if options.out:
            style.check_suffix(options.out)
        runs = read_runs(logs)
        drawn, left_out = choose(runs, options.x)
        if not drawn:
            raise ValueError(left_out[0] if left_out else f"no log in {', '.join(map(str, logs))}")
        arms, notes = group_by_arm(drawn)
        arms.sort(key=order_of)
        if options.separate:
            arms = [Arm(run.run_id, "", [run]) for run in drawn]
        target = style.target_of(drawn, options.target)
        out = options.out or default_out(drawn, time.time())
        style.save(figure(arms, options.x, target), out)
    except (ValueError, OSError) as error:
        return style.complain(error)
    print(summary(runs, arms, target))
    for note in [*notes, *left_out, *remarks(runs)]:
        print(f"note: {note}")
    print(f"\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
