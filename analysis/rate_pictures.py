"""The pictures of a sweep over one number: all values compared, and the curves of each.

    from analysis.rate_pictures import figures_of
    for name, draw in figures_of(analysis).items():
        style.save(draw(), folder / name)

A value has the colour and marker of its label, see LOOKS.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from analysis import style
from analysis.by_value import add_colour_bar, colour_of
from analysis.curves import FINISHED, Axis, lines_of
from analysis.intervals import Mark, draw_mark, explain, limits_of, mark_of
from analysis.rates import TOP, Analysis, Rate, accuracy_of, efficiency_of
from analysis.results import Attempt, loss_of
from analysis.run_log import format_value
from analysis.stats import summarize

LOOKS = {  # colour and marker of a label
    "optimal": ("#009E73", "*"),
    "good": ("#0072B2", "o"),
    "too low": ("#56B4E9", "v"),
    "declining": ("#E69F00", "^"),
    "unstable": ("#D55E00", "s"),
    "diverged": ("#000000", "X"),
    "no result": (style.GREY, "P"),
}


def scale_x(ax, analysis: Analysis) -> None:
    """Logarithmic where values span a factor of ten; ticks are values that were tried, as far as they fit."""
    values = [rate.value for rate in analysis.rates]
    if min(values) > 0 and max(values) >= 10 * min(values):
        ax.set_xscale("log")
        ax.set_xlim(min(values) / 1.25, max(values) * 1.25)
    else:
        margin = 0.04 * (max(values) - min(values)) or abs(values[0]) * 0.1 or 1
        ax.set_xlim(min(values) - margin, max(values) + margin)
    on_screen = ax.transData.transform([(value, 1) for value in values])
    place = dict(zip(values, ax.transAxes.inverted().transform(on_screen)[:, 0], strict=True))
    best, kept = analysis.best(), []
    for value in sorted(values, key=lambda value: (best is None or value != best.value, value)):
        if all(abs(place[value] - place[other]) >= 0.055 for other in kept):
            kept.append(value)
    names = [format_value(value) for value in kept]
    ax.set_xticks(kept, names, rotation=60 if len(kept) > 7 else 0, fontsize=8)
    ax.set_xticks(values, minor=True, labels=[""] * len(values))
    ax.set_xlabel(analysis.setting.upper())
    if best:
        ax.axvline(best.value, color=LOOKS["optimal"][0], linewidth=1, linestyle=(0, (2, 2)), zorder=0.5)


def marks_of(
    rates: Sequence[Rate], measure: Callable[[Attempt], float], factor: float = 1, in_a_row: bool = False
) -> list[Mark]:
    """A mark for each value with a result, at the value itself or, `in_a_row`, at 0, 1, 2, ..."""
    marks = []
    for place, rate in enumerate(rates):
        found = summarize(rate.arm.samples(measure)[0])
        if found.n:
            at = place if in_a_row else rate.value
            marks.append(mark_of(at, found, rate.arm.values(measure), *LOOKS[rate.label], factor))
    return marks


def draw_values(ax, analysis: Analysis, marks: Sequence[Mark], limits: tuple[float, float] | None) -> None:
    """Draw all values' marks, joined by a line, and a cross at the top for a value without a result."""
    scale_x(ax, analysis)
    ax.plot(
        [mark.at for mark in marks], [mark.mean for mark in marks], color="#bbbbbb", linewidth=1, zorder=1
    )
    if limits:
        ax.set_ylim(*limits)
    for mark in marks:
        draw_mark(ax, mark, limits)
    known = {mark.at for mark in marks}
    place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 9}
    for rate in analysis.rates:
        if rate.value not in known:
            ax.text(rate.value, 0.985, "×", color=LOOKS[rate.label][0], **place)


def label_legend(fig, analysis: Analysis) -> None:
    """The labels in use, and what bars, dots and hollow marks are."""
    from matplotlib.lines import Line2D

    handles = []
    for label, (colour, marker) in LOOKS.items():
        if any(rate.label == label for rate in analysis.rates):
            look = {"color": colour, "marker": marker, "markersize": 10 if marker == "*" else 6}
            handles.append(Line2D([], [], linestyle="none", label=label, **look))
    key = explain(marks_of(analysis.rates, loss_of))
    key += ["▲▼ beyond this range", "× no result", "dashed: the best by loss"]
    place = {"loc": "lower center", "ncols": len(handles), "fontsize": 9}
    fig.legend(handles=handles, title=", ".join(key), title_fontsize=8, **place)


def picture_combined(analysis: Analysis):
    """Loss and accuracy against the value; a heatmap of all that is measured, best = green in every row."""
    plt = style.load_matplotlib()
    fig = plt.figure(figsize=(15, 10))
    grid = fig.add_gridspec(2, 2, height_ratios=(1.5, 1))
    left, right, below = fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, :])
    losses = marks_of(analysis.rates, loss_of)
    draw_values(left, analysis, losses, limits_of(losses))
    left.set_title("final validation loss, nats a token")
    accuracies = marks_of(analysis.rates, accuracy_of, 100)
    if accuracies:
        draw_values(right, analysis, accuracies, limits_of(accuracies, higher_is_better=True))
        right.set_title("validation accuracy, % of tokens")
    else:
        style.say_nothing_logged(right, "accuracy")
    draw_heatmap(below, analysis)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    label_legend(fig, analysis)
    return fig


def draw_heatmap(ax, analysis: Analysis) -> None:
    """Draw all that is measured, coloured by the rank in its row; a value that is not known is grey."""
    rates = analysis.rates
    rows = [
        ("loss", [rate.loss.mean for rate in rates], 1, "{:.3f}"),
        ("accuracy, %", [100 * rate.accuracy.mean for rate in rates], -1, "{:.2f}"),
        ("perplexity", [rate.perplexity for rate in rates], 1, "{:.4g}"),
        ("minutes", [rate.minutes.mean for rate in rates], 1, "{:.3g}"),
    ]
    ranks = np.array([rank(values, sign) for _, values, sign, _ in rows])
    ax.imshow(np.ma.masked_invalid(ranks), cmap=rank_colours(), aspect="auto", vmin=0, vmax=1)
    look = {"ha": "center", "va": "center", "rotation": 90 if len(rates) > 30 else 0}
    look["fontsize"] = max(5, min(9, 210 / len(rates)))
    for row, (_, values, _, form) in enumerate(rows):
        for column, value in enumerate(values):
            text = form.format(value) if math.isfinite(value) else "–"
            dark = not 0.12 < ranks[row, column] < 0.85 and math.isfinite(value)
            weight = "bold" if ranks[row, column] == 0 else "normal"
            ax.text(column, row, text, color="white" if dark else "black", weight=weight, **look)
    labels = [format_value(rate.value) for rate in rates]
    ax.set_xticks(range(len(rates)), labels, rotation=60 if len(rates) > 12 else 0, fontsize=8)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set_xlabel(analysis.setting.upper())
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("means over seeds, coloured by rank in the row: green is the best (bold), purple the worst")


def rank(values: Sequence[float], sign: int) -> np.ndarray:
    """Ranks of the values from 0, the best, to 1; with `sign` 1 the lowest is best, with -1 the highest."""
    known = sorted({sign * value for value in values if math.isfinite(value)})
    ranks = np.full(len(values), np.nan)
    for place, value in enumerate(values):
        if math.isfinite(value):
            ranks[place] = known.index(sign * value) / max(1, len(known) - 1)
    return ranks


def rank_colours():
    """Colours from green to purple, told apart by the colour-blind, light enough for black text on them."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("good", colormaps["PRGn"](np.linspace(0.88, 0.15, 64)))
    return colours.with_extremes(bad="#dddddd")


def picture_detailed(analysis: Analysis):
    """Accuracy and loss over their whole range, accuracy a minute, and the runs of the top 20%."""
    plt = style.load_matplotlib()
    fig, panels = plt.subplots(2, 2, figsize=(15, 10))
    for ax, title, measure, factor in (
        (panels[0, 0], "validation accuracy, % of tokens, whole range", accuracy_of, 100),
        (panels[0, 1], "final validation loss, nats a token, whole range", loss_of, 1),
        (panels[1, 0], "efficiency: accuracy a minute of training, %", efficiency_of, 100),
    ):
        marks = marks_of(analysis.rates, measure, factor)
        if not marks and measure is not loss_of:
            style.say_nothing_logged(ax, "accuracy")
            continue
        draw_values(ax, analysis, marks, None)
        ax.set_title(title)
    draw_top(panels[1, 1], analysis)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    label_legend(fig, analysis)
    return fig


def draw_top(ax, analysis: Analysis) -> None:
    """Draw every run of the best fifth of the values, to show whether it is the value or luck."""
    top = analysis.top()
    if not top:
        style.say_nothing_logged(ax, "final losses")
        return
    for mark in marks_of(top, loss_of, in_a_row=True):
        draw_mark(ax, mark)
    best = analysis.best()
    if best and analysis.noise_known:
        for x, rate in enumerate(top):
            width = analysis.by_loss.half_width(best.name, rate.name)
            if math.isfinite(width):
                ends = best.loss.mean, best.loss.mean + width
                grey = {"color": style.GREY, "alpha": 0.15, "linewidth": 0, "zorder": 0}
                ax.fill_between([x - 0.4, x + 0.4], *ends, **grey)
        note = "; grey: means here are too near the best to be told from it"
    else:
        note = ""
    ax.set_xlabel(analysis.setting.upper() + note)
    ax.set_xticks(range(len(top)), [format_value(rate.value) for rate in top])
    ax.set_xlim(-0.6, len(top) - 0.4)
    ax.set_title(f"the top {TOP:.0%} by loss: final losses of all their runs")


def plot_names(analysis: Analysis) -> list[str]:
    """File names of the values' own pictures: lr_0.0650_loss_vs_steps.png.

    Settings that are no learning rate have their own name in it, and values as many digits as they need.
    """
    setting, values = analysis.setting, [rate.value for rate in analysis.rates]
    prefix = "lr" if setting.endswith("lr") else setting
    names = [f"{value:.4f}" for value in values]
    if any(abs(float(name) - value) > 1e-12 for name, value in zip(names, values, strict=True)):
        names = [format(value, ".10g") for value in values]
    return [f"{prefix}_{name}_loss_vs_steps.png" for name in names]


def picture_of_rate(rate: Rate, analysis: Analysis):
    """Training and validation loss of one value's runs, with the best value's in grey."""
    plt = style.load_matplotlib()
    fig, ax = plt.subplots(figsize=(8, 5))
    runs = [run for run in rate.arm.runs if run.last_step >= 0]
    best = analysis.best()
    if best and best is not rate:
        line, _ = lines_of(best.arm, "val_loss", Axis("steps", runs))
        if line:
            name = f"the best, {format_value(best.value)}"
            ax.plot(line.x, line.y, color="#999999", linewidth=2.5, label=name)
    for number, run in enumerate(runs):
        look = style.arm_style(number)
        name = f"seed {run.seed}" if run.seed is not None else run.run_id
        name += "" if run.state in FINISHED else f", {run.state} at step {run.last_step}"
        ax.plot(run.train.step, run.train.loss, color=look["color"], linewidth=0.6, alpha=0.45)
        ax.plot(run.val.step, run.val.loss, color=look["color"], marker="o", markersize=3, label=name)
    if not runs:
        style.say_nothing_logged(ax, "losses")
    else:
        found = f"{rate.loss.mean:.4f}" if rate.loss.n else "no final loss"
        name = f"{analysis.setting.upper()} = {format_value(rate.value)}"
        ax.set_title(f"{name}: {rate.label}, {found} ({rate.status})")
        ax.set_xlabel("step; thin: training loss, dots: validation")
        ax.set_ylabel("nats a token")
        ax.set_ylim(*curve_limits(analysis))
        ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


def curve_limits(analysis: Analysis) -> tuple[float, float]:
    """One scale for the curves of all values: from the lowest loss to above the start."""
    losses = np.concatenate([run.val.loss for run in analysis.results.runs] or [np.zeros(0)])
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return 0.0, 1.0
    low, high = float(losses.min()), analysis.start if math.isfinite(analysis.start) else float(losses.max())
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + 2 * margin


def picture_all(analysis: Analysis):
    """Validation losses of all values, coloured by value, the best in black; and their end enlarged."""
    plt = style.load_matplotlib()
    fig, (whole, end) = plt.subplots(1, 2, figsize=(15, 6.5), width_ratios=(1.25, 1))
    best, axis = analysis.best(), Axis("steps", analysis.results.runs)
    values = [rate.value for rate in analysis.rates]
    for number, rate in enumerate(analysis.rates):
        line, thin = lines_of(rate.arm, "val_loss", axis)
        if line is None:
            continue
        look = {"color": colour_of(number, len(values)), "linewidth": 1.3}
        if rate is best:
            look.update(color="black", linewidth=2.2, zorder=4, label=f"the best by loss, {best.value:g}")
        for ax in (whole, end):
            for other in thin:
                ax.plot(other.x, other.y, color=look["color"], linewidth=0.5, alpha=0.6)
            ax.plot(line.x, line.y, **look)
    whole.set_ylim(*curve_limits(analysis))
    whole.set_title("validation loss, nats a token: means over seeds, thin: single runs")
    steps = max((run.last_step for run in analysis.results.runs), default=0)
    end.set_xlim(0.6 * steps, steps)
    end.set_ylim(*limits_of(marks_of(analysis.rates, loss_of)))
    end.set_title("its end, without the worst")
    for ax in (whole, end):
        ax.set_xlabel("step")
    if best:
        whole.legend(loc="upper right", fontsize=9)
    add_colour_bar(fig, end, analysis.setting, values)
    fig.tight_layout()
    return fig


PICTURES = {
    "combined_lr_analysis": picture_combined,
    "detailed_lr_analysis": picture_detailed,
    "all_lr_loss_vs_steps": picture_all,
}


def figures_of(analysis: Analysis) -> dict[str, Callable[[], object]]:
    """The pictures by file name, each as a function that draws it."""
    figures = {f"{name}.png": partial(draw, analysis) for name, draw in PICTURES.items()}
    for rate, name in zip(analysis.rates, plot_names(analysis), strict=True):
        figures[f"individual_plots/{name}"] = partial(picture_of_rate, rate, analysis)
    return figures
