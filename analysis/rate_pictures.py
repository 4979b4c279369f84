"""Pictures of a sweep over one number: a comparison of all values, and a sheet with each one's curves.

    from analysis.rate_pictures import PICTURES
    for name, draw in PICTURES.items():
        style.save(draw(analysis), folder / f"{name}.png")

A value has its arm's colour and marker, as in all pictures of the sweep; its label is written above it.
"""

import math
from collections.abc import Callable
from itertools import groupby

from analysis import style
from analysis.curves import FINISHED, Axis, draw_lines, line_of, lines_of, loss_limits
from analysis.rates import Analysis, Rate
from analysis.results import Attempt, accuracy_of, loss_of
from analysis.run_log import format_value


def scale_x(ax, analysis: Analysis) -> None:
    """Make the x axis logarithmic if values span a factor of ten; label the values tried, as they fit."""
    values = [rate.value for rate in analysis.rates]
    if min(values) > 0 and max(values) >= 10 * min(values):
        ax.set_xscale("log")
        ax.set_xlim(min(values) / 1.25, max(values) * 1.25)
    else:
        margin = 0.04 * (max(values) - min(values)) or abs(values[0]) * 0.1 or 1
        ax.set_xlim(min(values) - margin, max(values) + margin)
    in_panel = (ax.transScale + ax.transLimits).transform([(value, 1) for value in values])
    place = dict(zip(values, in_panel[:, 0], strict=True))
    lowest, kept = analysis.lowest(), []
    for value in sorted(values, key=lambda value: (lowest is None or value != lowest.value, value)):
        if all(abs(place[value] - place[other]) >= 0.055 for other in kept):
            kept.append(value)
    names = [format_value(value) for value in kept]
    ax.set_xticks(kept, names, rotation=60 if len(kept) > 7 else 0, fontsize=8)
    ax.set_xticks(values, minor=True, labels=[""] * len(values))
    ax.set_xlabel(analysis.setting.upper())


def draw_seeds(ax, analysis: Analysis, measure: Callable[[Attempt], float], factor: float) -> None:
    """Join the runs of each seed by a thin line, to show what a seed's runs have in common."""
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for rate in analysis.rates:
        for value, seed in zip(*rate.arm.samples(measure), strict=True):
            if seed is not None and math.isfinite(value):
                by_seed.setdefault(seed, []).append((rate.value, factor * value))
    for points in by_seed.values():
        ax.plot(*zip(*points, strict=True), color="#bbbbbb", linewidth=0.7, zorder=1)


def draw_values(ax, analysis: Analysis, by: str) -> None:
    """Draw all values' means with their own 95% intervals, their runs, and the labels."""
    measure, factor = (loss_of, 1) if by == "loss" else (accuracy_of, 100)
    draw_seeds(ax, analysis, measure, factor)
    means = []
    for rate in analysis.rates:
        found, look = getattr(rate, by), analysis.results.looks[rate.name]
        if found.n:
            runs = [factor * value for value in rate.arm.values(measure)]
            ends = factor * found.low, factor * found.high
            style.draw_mean(ax, rate.value, factor * found.mean, *ends, found.n, look, runs)
            means.append(found.mean)
    if means and by == "loss":
        style.scale_losses(ax, min(means), max(means))
    scale_x(ax, analysis)
    draw_labels(ax, analysis)


def draw_differences(ax, analysis: Analysis) -> None:
    """Draw mean losses minus the lowest; if that was tested, intervals of values tied with it reach 0."""
    lowest, sizes, halves = analysis.lowest(), [], []
    for rate in analysis.rates:
        mean = rate.loss.mean - lowest.loss.mean
        half = analysis.ties.half_width(lowest.name, rate.name) if rate is not lowest else math.nan
        if math.isfinite(mean):
            shown_n, look = rate.loss.n, analysis.results.looks[rate.name]
            if shown_n > 1:  # however few its runs, if it is tested: noise is estimated from all values' runs
                shown_n = max(style.MIN_INTERVAL, shown_n)
            style.draw_mean(ax, rate.value, mean, mean - half, mean + half, shown_n, look)
            sizes += [mean, mean - half, mean + half]
            halves.append(half)
    ax.axhline(0, color="black", linewidth=1, zorder=1)
    style.scale_signed(ax, "y", sizes, halves)
    scale_x(ax, analysis)


def draw_labels(ax, analysis: Analysis) -> None:
    """Write the label above each stretch of values; green marks the optimal ones."""
    values = [rate.value for rate in analysis.rates]
    log = ax.get_xscale() == "log"
    middles = [math.sqrt(a * b) if log else (a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    edges = [ax.get_xlim()[0], *middles, ax.get_xlim()[1]]
    stretches = groupby(range(len(values)), key=lambda place: analysis.rates[place].label)
    for number, (label, places) in enumerate(stretches):
        places = list(places)
        low, high = edges[places[0]], edges[places[-1] + 1]
        middle = math.sqrt(low * high) if log else (low + high) / 2
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
        ax.annotate(label, (middle, 1), (0, 3 + 10 * (number % 2)), fontsize=8.5, color="#444444", **place)
        ax.axvline(high, color="#bbbbbb", linewidth=0.8, zorder=0.5)
        if label == "optimal":
            ax.axvspan(low, high, color="#009E73", alpha=0.1, linewidth=0, zorder=0)


def picture_combined(analysis: Analysis):
    """Plot loss and accuracy against the value; below, differences from the lowest loss, with intervals."""
    plt = style.load_matplotlib()
    measures = [by for by in ("loss", "accuracy") if any(getattr(rate, by).n for rate in analysis.rates)]
    measures = measures or ["loss"]
    rows = [measures, ["differences"] * len(measures)] if analysis.noise_known else [measures]
    size = (7.2 * len(measures), 0.8 + 4.2 * len(rows))
    fig, panels = plt.subplot_mosaic(rows, figsize=size)
    word = style.token_name(analysis.results.runs)
    units = {"loss": f"nats per {word}", "accuracy": f"% of {word}s"}
    for by in measures:
        draw_values(panels[by], analysis, by)
        panels[by].set_title(f"final validation {by}, {units[by]}", pad=26)
    more = ""
    if analysis.noise_known:
        ax = panels["differences"]
        draw_differences(ax, analysis)
        ax.set_title(f"loss minus that of {name_lowest(analysis)}; lower is better")
        if any(rate.loss.n == 2 for rate in analysis.rates):
            more = "; values with two runs are drawn without interval above"
        if analysis.may_claim():
            more += "; below: a value tied with the lowest reaches 0"
    fig.supxlabel(f"{style.MEAN_KEY}; grey: runs of one seed{more}", fontsize=9, wrap=True)
    return fig


def name_lowest(analysis: Analysis) -> str:
    """0.02, the lowest mean; or: 0.02, a single run."""
    lowest = analysis.lowest()
    return f"{format_value(lowest.value)}, {'a single run' if lowest.loss.n == 1 else 'the lowest mean'}"


def picture_of_each_rate(analysis: Analysis):
    """Plot a small panel of runs per value, with the lowest value's mean in grey; one scale for all."""
    plt = style.load_matplotlib()
    axis, lowest = Axis("steps", analysis.results.runs), analysis.lowest()
    columns = min(6, math.ceil(math.sqrt(1.5 * len(analysis.rates))))
    rows = math.ceil(len(analysis.rates) / columns)
    size = (2.5 * columns + 0.8, 2.1 * rows + 0.6)
    fig, panels = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    grey = lines_of(lowest.arm, "val_loss", axis)[0].since(axis.begin) if lowest else None
    for ax, rate in zip(panels.flat, analysis.rates, strict=False):
        if grey and rate is not lowest:
            ax.plot(grey.x, grey.y, color="#bbbbbb", linewidth=2.5)
        draw_rate(ax, rate, axis, analysis.results.looks[rate.name]["color"])
    for place, ax in list(enumerate(panels.flat))[len(analysis.rates) :]:
        ax.remove()
        panels.flat[place - columns].tick_params(labelbottom=True)
    lines = [line for run in analysis.results.runs if (line := line_of(run, "val_loss", axis))]
    low, high = loss_limits([line.since(axis.begin) for line in lines])
    style.scale_losses(panels[0, 0], low, high)
    panels[0, 0].set_ylim(low, high)
    style.scale_positive(panels[0, 0], axis.begin, axis.end)
    known = f"; grey: {analysis.setting.upper()} = {name_lowest(analysis)}" if lowest else ""
    unit = style.loss_unit(analysis.results.runs)
    text = f"step; validation loss in {unit}, a line a run, × where it broke off{known}"
    fig.supxlabel(text, fontsize=10, wrap=True)
    return fig


def draw_rate(ax, rate: Rate, axis: Axis, colour: str) -> None:
    """Draw one value's runs, with its label and mean final loss as the title."""
    for run in rate.arm.runs:
        line = line_of(run, "val_loss", axis)
        if line:
            draw_lines(ax, line.since(axis.begin), [], {"color": colour, "linewidth": 1.2})
            if run.state not in FINISHED:
                ax.plot(line.x[-1], line.y[-1], "x", color=colour, markersize=7)
    mean = f"{rate.loss.mean:.3f}" if rate.loss.n else "-"
    ax.set_title(f"{format_value(rate.value)}: {rate.label}, {mean}", fontsize=9, fontweight="normal")
    ax.tick_params(labelsize=8)


PICTURES = {"combined_lr_analysis": picture_combined, "all_lr_loss_vs_steps": picture_of_each_rate}
