"""Pictures of a sweep: each arm's difference from the control, in a forest plot and over training."""

import math
from collections.abc import Sequence

import numpy as np

from analysis import style
from analysis.curves import (
    Axis,
    Drawn,
    differences,
    has_x,
    label_ends,
    lines_of,
    panel_differences,
    panel_loss,
    runs_of,
)
from analysis.results import Results, SweepArm
from analysis.stats import Comparison
from analysis.tables import format_difference, format_interval, format_loss, state_p

MAX_LABEL = 44  # characters of an arm's name beside a picture
MAX_OTHER = 24  # characters of the control's name in an arm's verdict
VERDICTS = {"better": "#0072B2", "worse": "#D55E00"}
# Columns beside the forest: heading, and right edge in points from the panel.
COLUMNS = (("mean loss", 54), ("runs", 80), ("difference", 132), ("95% interval", 238))
VERDICT_AT = 248


# ------------------------------------------------------------------------------------------------
# The forest
# ------------------------------------------------------------------------------------------------


def forest_inches(results: Results) -> float:
    """Height that a forest plot needs."""
    return 1.2 + 0.26 * max(3, len(results.arms))


def draw_forest(ax, results: Results) -> None:
    """Draw a row for each arm: its difference from the control, with interval, numbers and verdict.

    Ticks are single seeds' paired differences. All arms share an axis, logarithmic beyond small values.
    """
    arms, values, noise = results.arms, [0.0], []
    for y, arm in enumerate(arms):
        pair = results.comparison(arm.label)
        if pair and math.isfinite(pair.difference):
            look, n = results.looks[arm.label], min(pair.n_arm, pair.n_control)
            if math.isfinite(pair.low):  # of two pairs, too: two ticks beside 0 would look like a finding
                n = max(n, style.MIN_INTERVAL)
            each = pair_by_pair(results, arm) if pair.method == "paired" else []
            style.draw_mean(ax, y, pair.difference, pair.low, pair.high, n, look, each, horizontal=True)
            values += [pair.difference, *each, *(style.ends_of(pair.low, pair.high, n) or ())]
            noise.append((pair.high - pair.low) / 2)
        elif arm.label == results.reference and (n := results.summary(arm).n):
            style.draw_mean(ax, y, 0.0, math.nan, math.nan, n, results.looks[arm.label], horizontal=True)
        write_row(ax, y, results, arm)
    ax.axvline(0, color="black", linewidth=1, zorder=1)
    step = style.scale_signed(ax, "x", values, noise if len(noise) > 1 else ())
    low, high = min(values), max(values)
    if ax.get_xscale() == "linear":
        step = 0.05 * (high - low) or 1.0
    ax.set_xlim(1.2 * low - step, 1.2 * high + step)
    names = style.shorten_apart([arm.label for arm in arms], MAX_LABEL)
    ax.set_yticks(range(len(arms)), names, fontsize=9)
    ax.set_ylim(len(arms) - 0.4, -1.4)
    ax.grid(False, axis="y")
    ax.set_title(f"final validation loss minus that of {style.shorten(results.compared_with, 40)}")
    ax.set_xlabel(f"{style.loss_unit(results.runs)}; to the left is better\n{style.MEAN_KEY}", fontsize=9)
    for heading, at in COLUMNS:
        write(ax, -0.9, at, heading, ha="right", color=style.GREY)
    if results.verdict.num_comparisons:
        method = "after Holm's correction" if results.control else "of Tukey's test"
        write(ax, -0.9, VERDICT_AT, f"verdict, with p {method}", color=style.GREY)
    style.make_room(ax)


def pair_by_pair(results: Results, arm: SweepArm) -> list[float]:
    """Return single seeds' differences from the arm's control."""
    control = next(other for other in results.arms if other.label == results.verdict.controls[arm.label])
    theirs = {seed: loss for loss, seed in zip(*control.samples(), strict=True) if math.isfinite(loss)}
    return [loss - theirs[seed] for loss, seed in zip(*arm.samples(), strict=True) if math.isfinite(loss)]


def write(ax, y: float, points: float, text: str, **look) -> None:
    """Write beside a row, `points` to the right of the panel."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    ax.annotate(text, (1, y), (points, 0), fontsize=8.5, annotation_clip=False, **place, **look)


def write_row(ax, y: float, results: Results, arm: SweepArm) -> None:
    """Write an arm's numbers and verdict; tint the row if it is better or worse."""
    found, pair = results.summary(arm), results.comparison(arm.label)
    cells = [format_loss(found.mean), str(found.n), "", ""]
    if pair:
        cells[2:] = format_difference(pair.difference), format_interval(pair.low, pair.high)
    for text, (_, at) in zip(cells, COLUMNS, strict=True):
        write(ax, y, at, text, ha="right")
    call = results.call(arm.label)
    look = {"color": VERDICTS.get(call, "#333333"), "weight": "bold" if call in VERDICTS else "normal"}
    write(ax, y, VERDICT_AT, verdict_words(results, arm, pair), **look)
    if call in VERDICTS:
        ax.axhspan(y - 0.5, y + 0.5, color=VERDICTS[call], alpha=0.08, linewidth=0, zorder=0)


def verdict_words(results: Results, arm: SweepArm, pair: Comparison | None) -> str:
    """Format the verdict with its p; if undecided, note an interval that by itself excludes zero."""
    remarks = results.remarks(arm)
    if arm.label == results.reference:
        return ", ".join(["control" if results.control else "lowest mean", *remarks])
    if pair is None:
        return ", ".join(remarks)
    words, other = results.call(arm.label), results.verdict.controls[arm.label]
    if other != results.reference:
        others = sorted(set(results.verdict.controls.values()))
        other = style.shorten_apart(others, MAX_OTHER)[others.index(other)]
        words += f" against {other}" if words == "undecided" else f" than {other}"
    if pair.difference == 0 and pair.sd == 0:
        words = "the same losses, bit for bit"
    elif not math.isfinite(pair.p):
        words = "not tested"
    else:
        words += f", {state_p(pair.p_corrected)}"
        if words.startswith("undecided") and results.control and pair.low * pair.high > 0:
            words += " (by itself clear of 0)"
    return ", ".join([words, *remarks])


def picture_of_forest(results: Results):
    """Draw the forest plot, filling the page."""
    fig, ax = style.load_matplotlib().subplots(figsize=(13.5, forest_inches(results)))
    draw_forest(ax, results)
    return fig


# ------------------------------------------------------------------------------------------------
# Over training
# ------------------------------------------------------------------------------------------------


def what_to_draw(results: Results) -> list[Drawn]:
    """Return the arms with something to draw, in the order of the forest."""
    arms = [arm for arm in results.arms if any(run.last_step >= 0 for run in arm.runs)]
    return [Drawn(arm, results.looks[arm.label], arm.label) for arm in arms]


def axis_of(drawn: Sequence[Drawn]) -> Axis:
    """Return a token axis if all runs log tokens, else a step axis."""
    runs = runs_of(drawn)
    return Axis("tokens" if all(has_x(run, "tokens") for run in runs) else "steps", runs)


def picture_of_curves(results: Results):
    """Draw losses minus the control's over training; plain losses if nothing can be compared."""
    plt = style.load_matplotlib()
    drawn = what_to_draw(results)
    axis = axis_of(drawn)
    fig, ax = plt.subplots(figsize=(12, 5.5 if len(drawn) < 16 else 7.5))
    found = differences(drawn, results.verdict.controls, axis)
    if found:
        panel_differences(ax, found, axis, results.compared_with)
    else:
        panel_loss(ax, drawn, axis)
        lines = [(lines_of(item.arm, "val_loss", axis)[0], item) for item in drawn]
        ends = []
        for line, item in lines:
            known = np.flatnonzero(np.isfinite(line.y)) if line else ()  # a diverged run may end in NaN
            if len(known):
                ends.append((line.x[known[-1]], line.y[known[-1]], item.label, item.look["color"]))
        label_ends(ax, ends)
    return fig
