"""The pictures of a sweep's report: means and differences as bars, and all curves."""

from collections.abc import Sequence

import numpy as np

from analysis import style
from analysis.by_value import DASHES, add_colour_bar, beside, by_value, kinds_of, looks_of, ordered
from analysis.curves import MAX_NAME, Axis, Drawn, has_x, name_ends, panel_loss, plan_legend, runs_of
from analysis.intervals import MIN_INTERVAL, Mark, draw_mark, limits_of, mark_of
from analysis.results import Results, SweepArm
from analysis.run_log import format_value

MAX_LABEL = 44  # characters of an arm's name beside a picture
MAX_LEGEND = 21  # arms that are told apart by their looks
VERDICTS = {"better": ("#0072B2", "v"), "worse": ("#D55E00", "^"), "undecided": (style.GREY, "o")}


# ------------------------------------------------------------------------------------------------
# Bars
# ------------------------------------------------------------------------------------------------


def picture_of_bars(results: Results):
    """Means with intervals, and differences from the control with theirs; a line for each arm."""
    plt = style.load_matplotlib()
    arms = [arm for arm in ordered(results) if results.summary(arm).n]
    height = 1.5 + 0.28 * max(4, len(arms))
    compared = len(results.verdict.summaries) > 1
    fig, panels = plt.subplots(1, 2 if compared else 1, figsize=(13, height), sharey=True, squeeze=False)
    left = panels[0, 0]
    draw_means(left, results, arms)
    if compared:
        draw_differences(panels[0, 1], results, arms)
    names = style.shorten_apart([arm.label for arm in arms], MAX_LABEL)
    left.set_yticks(range(len(arms)), names, fontsize=9 if len(arms) < 40 else 7)
    left.set_ylim(len(arms) - 0.4, -0.6)
    few = any(results.summary(arm).n < MIN_INTERVAL for arm in arms)
    if few:
        text = f"no interval is drawn for fewer than {MIN_INTERVAL} seeds; hollow: a single run"
        fig.text(0.995, 0.01, text, ha="right", fontsize=8, color=style.GREY)
    fig.tight_layout(rect=(0, 0.3 / height if few else 0, 1, 1))
    return fig


def draw_means(ax, results: Results, arms: Sequence[SweepArm]) -> None:
    marks = [
        mark_of(y, results.summary(arm), arm.values(), *VERDICTS[results.call(arm.label)])
        for y, arm in enumerate(arms)
    ]
    limits = limits_of(marks)
    ax.set_xlim(*limits)
    for mark in marks:
        draw_mark(ax, mark, limits, "{:.4f}", horizontal=True)
    ax.set_title("final validation loss: mean, 95% interval, runs")
    ax.set_xlabel("nats a token")
    ax.locator_params(axis="x", nbins=6)


def draw_differences(ax, results: Results, arms: Sequence[SweepArm]) -> None:
    marks = []
    for y, arm in enumerate(arms):
        pair, _ = results.comparison(arm.label)
        if pair and np.isfinite(pair.difference):
            n = min(pair.n_arm, pair.n_control)
            look = VERDICTS[results.call(arm.label)]
            marks.append(Mark(y, pair.difference, pair.low, pair.high, n, *look))
        if arm.label == results.reference:
            word = "control" if results.control else "lowest mean"
            ax.annotate(word, (0, y), (4, 0), textcoords="offset points", fontsize=8, va="center")
    limits = (-1.0, 1.0)
    if marks:
        low, high = limits_of([Mark(0, 0.0, 0.0, 0.0, MIN_INTERVAL, "", ""), *marks])
        limits = max(low, -max(abs(low), abs(high))), high
    ax.set_xlim(*limits)
    ax.axvline(0, color="black", linewidth=1)
    for mark in marks:
        draw_mark(ax, mark, limits, "{:+.4f}", horizontal=True)
    ax.set_title(f"difference to {style.shorten(results.compared_with, 40)}, 95% interval")
    ax.set_xlabel("nats a token; to the left is better")
    ax.locator_params(axis="x", nbins=6)
    used = {mark.colour for mark in marks}
    handles = [
        ax.plot([], [], marker=marker, color=colour, linestyle="none", label=kind)[0]
        for kind, (colour, marker) in VERDICTS.items()
        if colour in used
    ]
    if handles:
        ax.figure.legend(handles=handles, loc="lower left", fontsize=8, ncols=3)


# ------------------------------------------------------------------------------------------------
# Curves
# ------------------------------------------------------------------------------------------------


def picture_of_curves(results: Results, target: float):
    """All validation losses, coloured by the value that varies."""
    plt = style.load_matplotlib()
    drawn, values = what_to_draw(results)
    runs = runs_of(drawn)
    axis = Axis("tokens" if all(has_x(run, "tokens") for run in runs) else "steps", runs)
    handles = legend_of(results, drawn)
    columns, inches = plan_legend([handle.get_label() for handle in handles], 150, gap=10)
    inches = inches + 0.3 if handles else 0
    height = 7 + inches
    fig, ax = plt.subplots(figsize=(13, height))
    panel_loss(ax, drawn, axis, target)
    if values:
        add_colour_bar(fig, ax, by_value(results), values)
    if handles:
        fig.legend(handles=handles, loc="lower center", ncols=columns, fontsize=9, handlelength=3.2)
    fig.tight_layout(rect=(0, inches / height, 1, 1))
    return fig


def what_to_draw(results: Results) -> tuple[list[Drawn], list[float]]:
    """The arms with something to draw, and the values that they are coloured by, if there are any."""
    arms = [arm for arm in ordered(results) if any(run.last_step >= 0 for run in arm.runs)]
    looks, values = looks_of(results, arms)
    name = by_value(results)
    names = [arm.label for arm in arms]
    if name and not beside(results, name):
        names = [format_value(arm.settings[name]) if name in arm.settings else arm.label for arm in arms]
    names = style.shorten_apart(names, MAX_NAME)
    labels = style.shorten_apart([arm.label for arm in arms], MAX_LABEL)
    drawn = [Drawn(*parts) for parts in zip(arms, looks, names, labels, strict=True)]
    name_ends(drawn)
    return drawn, values


def legend_of(results: Results, drawn: Sequence[Drawn]) -> list:
    """Legend entries for what colours do not say: all arms, the kinds of arm, or arms without a value."""
    from matplotlib.lines import Line2D

    name = by_value(results)
    shown = list(drawn)
    kinds = []
    if name and len(drawn) > MAX_LEGEND:
        shown = [item for item in drawn if name not in item.arm.settings]
        kinds = [] if not beside(results, name) else list(kinds_of(results, name).values())
    lettered = any(item.label.startswith(f"{item.name}  ") for item in drawn)
    if name and not beside(results, name) and not lettered:
        shown = [item for item in drawn if name not in item.arm.settings]
    handles = [Line2D([], [], label=item.label, **{**item.look, "markersize": 5}) for item in shown]
    return handles + [
        Line2D([], [], label=words, color=style.GREY, linestyle=line)
        for line, words in zip(DASHES, kinds, strict=False)
    ]
