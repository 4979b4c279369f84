"""The picture of an ORD sweep: validation loss, the U-curve of final loss against a, and rho.

    from analysis.spectral_picture import figure
    figure(results, target=3.28)

`drawn_points` builds the one list of what is drawn; all panels draw that list. a is SPECTRAL_LR_MUL.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis import style
from analysis.curves import (
    MAX_NAME,
    Axis,
    Drawn,
    add_legend,
    name_ends,
    panel_loss,
    panel_rho,
    plan_legend,
    result_label,
    runs_of,
)
from analysis.intervals import MIN_INTERVAL, Mark, draw_mark, explain, limits_of, mark_of
from analysis.results import Results, SweepArm
from analysis.run_log import format_value
from analysis.stats import Summary

MAX_TICKS = 9  # values of a that can be written below the U-curve
DODGE = 5.0  # points between arms of the same a and different families
RHO = {"spec_attn": "attention matrices", "spec_mlp": "MLP matrices"}  # as logged


@dataclass
class Point(Drawn):
    """An arm in the picture, with its a (None: it has none), its family, and its mark on the U-curve."""

    a: float | None
    family: str
    mark: Mark


def families(results: Results) -> dict[str, str]:
    """The family of each arm: its settings other than a that differ from most arms'; a curve each."""
    with_a = [arm for arm in results.arms if arm.strength is not None]
    usual = {
        name: Counter(format_value(arm.settings.get(name)) for arm in with_a).most_common(1)[0][0]
        for name in results.varied()
        if name != "spectral_lr_mul" and with_a
    }
    found = {}
    for arm in results.arms:
        own = {name: format_value(arm.settings.get(name)) for name in usual}
        parts = [f"{name}={value}" for name, value in own.items() if value != usual[name]]
        found[arm.label] = " ".join([*parts, arm.foreign] if arm.foreign else parts)
    return found


def drawn_points(results: Results) -> list[Point]:
    """The arms that have logged a step: those without an a first, then by family and a."""
    family = families(results)
    arms = [arm for arm in results.arms if any(run.last_step >= 0 for run in arm.runs)]
    arms.sort(key=lambda arm: (arm.strength is not None, family[arm.label], arm.strength or 0.0))
    others = [arm for arm in arms if arm.strength is None and results.summary(arm).n]
    points = []
    for number, (arm, name) in enumerate(zip(arms, brief_names(arms, family), strict=True)):
        look, result = style.arm_style(number), results.summary(arm)
        at = arm.strength
        if at is None:
            at = others.index(arm) if arm in others else np.nan
        mark = mark_of(at, result, arm.values(), look["color"], look["marker"])
        label = legend_label(arm, result)
        points.append(Point(arm, look, name, label, arm.strength, family[arm.label], mark))
    name_ends(points)
    return points


def brief_names(arms: Sequence[SweepArm], family: dict[str, str]) -> list[str]:
    """Names that fit beside a line: a=0.1 where that tells arms apart."""
    alike = len({family[arm.label] for arm in arms if arm.strength is not None}) == 1
    names = [
        f"a={format_value(arm.strength)}"
        if alike and arm.strength is not None
        else style.shorten(arm.label, MAX_NAME)
        for arm in arms
    ]
    return names if len(set(names)) == len(names) else [arm.label for arm in arms]


def legend_label(arm: SweepArm, result: Summary) -> str:
    lost = [
        f"{arm.count(outcome)} {word}"
        for outcome, word in (("failed", "failed"), ("missing", "not ended"))
        if arm.count(outcome)
    ]
    return result_label(style.shorten(arm.label, 48), result, lost)


# ------------------------------------------------------------------------------------------------
# The U-curve
# ------------------------------------------------------------------------------------------------


def panel_u_curve(ax, other, points: Sequence[Point], control: Summary | None) -> None:
    """Final loss against a; in `other`, if there is one, that of the arms without an a."""
    ended = [point for point in points if point.mark.n]
    with_a = [point for point in ended if point.a is not None]
    limits = limits_of([point.mark for point in ended])
    if with_a:
        draw_families(ax, with_a, limits)
        draw_frame(ax, limits, control)
    else:
        style.say_nothing_logged(ax, "final loss against a (no finished run with SPECTRAL_LR_MUL)")
    if other is not None:
        draw_others(other, [point for point in ended if point.a is None], limits)
        draw_frame(other, limits, control)
    ax.set_title("final validation loss against a")
    key = explain([point.mark for point in ended])
    if any(point.mark.mean > limits[1] for point in ended):
        key.append("▲ above this range")
    # lines are broken between the parts, not in them: there is a neighbour to the right
    key = textwrap.fill(", ".join(part.replace(" ", "~") for part in key), 44).replace("~", " ")
    ax.set_xlabel(f"a = SPECTRAL_LR_MUL, symmetric-logarithmic\n{key}")


def draw_families(ax, points: Sequence[Point], limits: tuple[float, float]) -> None:
    """A line for each family, the largest first, each moved a little to the right of the one before."""
    from matplotlib.transforms import ScaledTranslation

    scale_of_a(ax, [point.a for point in points])
    sizes = Counter(point.family for point in points)
    names, handles = sorted(sizes, key=lambda name: (-sizes[name], name)), []
    for number, name in enumerate(names):
        members = sorted((point for point in points if point.family == name), key=lambda point: point.a)
        shift = ScaledTranslation(DODGE * number / 72, 0, ax.figure.dpi_scale_trans)
        place = ax.transData + shift
        if len(members) > 1:
            handles += ax.plot(
                [point.a for point in members],
                [point.mark.mean for point in members],
                transform=place,
                label=style.shorten(name, 44) or "as most arms",
                color=style.GREY,
                linewidth=1,
                linestyle=style.LINES[number % len(style.LINES)],
                zorder=1,
            )
        for point in members:
            draw_mark(ax, point.mark, limits, "{:.4f}", transform=place)
    if len(handles) > 1:
        ax.legend(handles=handles, fontsize=8, loc="best", frameon=True, framealpha=0.85, edgecolor="none")


def scale_of_a(ax, values: Sequence[float]) -> None:
    """Symmetric-logarithmic from the smallest a on, ticks at the values themselves, as far as they fit."""
    sizes = sorted({abs(value) for value in values if value})
    distinct = sorted(set(values))
    if not sizes:
        ax.set_xlim(-1, 1)
    else:
        ax.set_xscale("symlog", linthresh=sizes[0], linscale=0.6)
        reach = 1.6 * sizes[-1]
        ax.set_xlim(-reach if min(values) < 0 else -0.35 * sizes[0], reach if max(values) > 0 else sizes[0])
    place = ax.transData.transform([(value, 0) for value in distinct])[:, 0]
    width = np.ptp(ax.transData.transform([(value, 0) for value in ax.get_xlim()])[:, 0])
    kept = []
    for value, x in sorted(zip(distinct, place, strict=True), key=lambda item: item[0] != 0):  # 0 first
        if all(abs(x - other) >= width / MAX_TICKS / 1.4 for _, other in kept):
            kept.append((value, x))
    ax.set_xticks([value for value, _ in kept], [format_value(float(value)) for value, _ in kept])
    ax.set_xticks(distinct, minor=True, labels=[""] * len(distinct))


def draw_others(ax, points: Sequence[Point], limits: tuple[float, float]) -> None:
    """The arms without an a, side by side."""
    for point in points:
        draw_mark(ax, point.mark, limits, "{:.4f}")
    names = [style.shorten(point.arm.label, 18) for point in points]
    ax.set_xticks(range(len(points)), names, rotation=90 if len(points) > 1 else 0, fontsize=8)
    ax.set_xlim(-0.7, len(points) - 0.3)
    ax.tick_params(labelleft=False)
    ax.grid(False, axis="x")
    ax.set_title("no a" if len(points) < 3 else "arms without an a", fontweight="normal", fontsize=9)


def draw_frame(ax, limits: tuple[float, float], control: Summary | None) -> None:
    """Limits, and the control's mean and interval as a band, over which arms are compared."""
    ax.set_ylim(*limits)
    if control is None or not control.n:
        return
    ax.axhline(control.mean, color=style.GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    if control.n >= MIN_INTERVAL:
        ax.axhspan(control.low, control.high, color=style.GREY, alpha=0.15, linewidth=0, zorder=0.4)


# ------------------------------------------------------------------------------------------------
# The picture
# ------------------------------------------------------------------------------------------------


def figure(results: Results, target: float):
    """The four panels with one legend below."""
    plt = style.load_matplotlib()
    points = drawn_points(results)
    axis = Axis("steps", runs_of(points))
    control = results.verdict.summaries[results.control] if results.control else None
    columns, inches = plan_legend([point.label for point in points], 170)
    inches += 0.45
    height = 10.4 + inches
    fig = plt.figure(figsize=(15, height))
    num_others = sum(point.a is None and point.mark.n > 0 for point in points)
    grid = fig.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1.25, 1))
    widths = (1, min(0.8, 0.1 + 0.09 * num_others)) if num_others else (1,)
    right = grid[0, 1].subgridspec(1, len(widths), width_ratios=widths, wspace=0.04)
    loss, curve = fig.add_subplot(grid[0, 0]), fig.add_subplot(right[0])
    other = fig.add_subplot(right[1]) if num_others else None
    panel_loss(loss, points, axis, target)
    panel_u_curve(curve, other, points, control)
    for place, (key, what) in enumerate(RHO.items()):
        panel_rho(fig.add_subplot(grid[1, place]), points, axis, f"mean ρ of {what}", {key: what})
    title = "final validation loss"
    if any(point.mark.n >= MIN_INTERVAL for point in points):
        title += ": mean ± half its 95% interval"
    if control and control.n:
        title += f"; grey: the control, {style.shorten(results.control, 48)}"
    add_legend(fig, points, columns, title)
    fig.tight_layout(rect=(0, inches / height, 1, 1))
    return fig
