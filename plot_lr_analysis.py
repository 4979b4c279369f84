"""Analyse a sweep over the learning rate, or any other number: what learns, what fails, what is best.

    python plot_lr_analysis.py sweeps/moe_lr.toml                         # writes to logs/moe_lr/lr_analysis/
    python plot_lr_analysis.py sweeps/residual_scale.toml                 # whatever varies
    python plot_lr_analysis.py sweeps/muon_decay.toml --where MUON_DECAY_MODE=param
    python plot_lr_analysis.py logs --setting MUON_LR --out analysis      # any logs

Written are results.md and results.csv (one line a value), final_results.json (the same with every run),
comprehensive_insights.json (best, ranges, divergence threshold, labels with their rules), and as pictures
combined_lr_analysis.png, detailed_lr_analysis.png, all_lr_loss_vs_steps.png and individual_plots/. The same
logs give the same tables, byte for byte.

Losses are those of the last validation, in nats a token, means over seeds; perplexity is exp(mean loss).
Every value gets a label by the rules below, in which "the fall" is how far the best value's loss fell from
where training began. Values that cannot be told from the best are those of stats.contenders: the truly best
one is among them in 95% of such sweeps. Where every value is a single run, how much runs differ by luck is
unknown, and the output says so.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line, style
from analysis.by_value import add_colour_bar, colour_of
from analysis.curves import FINISHED, lines_of
from analysis.files import write_atomically
from analysis.intervals import Mark, draw_mark, explain, limits_of, mark_of
from analysis.rates import (
    RULES,
    TOP,
    Analysis,
    Rate,
    accuracy_of,
    analyse,
    diverged,
    efficiency_of,
    minutes_of,
    perplexity,
)
from analysis.read_results import read_results
from analysis.results import Attempt, loss_of
from analysis.run_log import format_value
from analysis.stats import summarize
from analysis.tables import (
    as_csv,
    as_json,
    format_interval,
    format_loss,
    format_markdown,
    format_number,
    format_table,
)

LOOKS = {  # colour and marker of a label
    "optimal": ("#009E73", "*"),
    "good": ("#0072B2", "o"),
    "too low": ("#56B4E9", "v"),
    "declining": ("#E69F00", "^"),
    "unstable": ("#D55E00", "s"),
    "diverged": ("#000000", "X"),
    "no result": (style.GREY, "P"),
}
RULES_TEXT = "\n".join(f"* {label}: {rule}" for label, rule in RULES.items())


# ------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------


def name_values(rates: Sequence[Rate]) -> str:
    """0.01, 0.02 and 0.03."""
    values = [format_value(rate.value) for rate in rates]
    return f"{', '.join(values[:-1])} and {values[-1]}" if len(values) > 1 else "".join(values)


def edge_of(rate: Rate, analysis: Analysis) -> str | None:
    """lowest or highest, if the best value is at that end of those tried: a better one may lie beyond."""
    if len(analysis.rates) < 2 or rate not in (analysis.rates[0], analysis.rates[-1]):
        return None
    return "lowest" if rate is analysis.rates[0] else "highest"


def best_sentence(analysis: Analysis, by: str) -> str:
    best, near = analysis.best(by), analysis.near_best(by)
    if best is None:
        return f"no value can be called best by {by}: none has finished runs, none of which failed"
    factor, summary = (1, best.loss) if by == "loss" else (100, best.accuracy)
    unit = "" if by == "loss" else "%"
    name = f"{analysis.setting.upper()} = {format_value(best.value)}"
    text = f"best by {by}: {name} ({factor * summary.mean:.4f}{unit}"
    if summary.n == 1:
        text += ", a single run)"
    else:
        interval = format_interval(factor * summary.low, factor * summary.high, signed=False)
        text += f", 95% interval {interval}, sd {factor * summary.sd:.4f}, n = {summary.n})"
    others = [rate for rate in near if rate is not best]
    if not analysis.contenders(by).df:
        text += "; how much runs differ by luck is unknown, so that none may be called better than another"
    elif others:
        text += f"; it cannot be told from {name_values(others)}"
    else:
        text += "; every other value is worse"
    edge = edge_of(best, analysis)
    return text + (f"; it is the {edge} value tried, so that a better one may lie beyond" if edge else "")


def sentences(analysis: Analysis) -> list[str]:
    """The findings in words."""
    missing = analysis.results.count("missing")
    total = len(analysis.results.attempts)
    lines = []
    if missing:
        lines.append(f"{missing} of {total} runs have not ended: this is how it stands so far")
    lines.append(best_sentence(analysis, "loss"))
    if any(rate.accuracy.n for rate in analysis.rates):
        lines.append(best_sentence(analysis, "accuracy"))
    stable, threshold = analysis.stable(), analysis.threshold()
    if stable:
        low, high = format_value(stable[0].value), format_value(stable[-1].value)
        lines.append(f"stable from {low} to {high}" if len(stable) > 1 else f"stable at {low} only")
    lines.append(
        f"the lowest value above the best at which a run diverged is {format_value(threshold.value)}"
        if threshold
        else "no run above the best value diverged"
    )
    if analysis.noise_known:
        found = analysis.by_loss
        apart = ", what the runs of a seed share taken out," if found.paired else ""
        lines.append(
            f"noise: a run's loss varies by {found.sd:.4f} (sd{apart} of the better half of the values, "
            f"{found.df} degrees of freedom)"
        )
    return lines


def remark(rate: Rate, analysis: Analysis) -> str:
    parts = []
    for by in ("loss", "accuracy"):
        if rate is analysis.best(by):
            parts.append(f"best by {by}")
    if analysis.noise_known and rate in analysis.near_best() and rate is not analysis.best():
        parts.append("not told from the best")
    if rate.sure is False:
        parts.append("near the limit of good")
    if rate.loss.n == 1:
        parts.append("a single run")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def table(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    tied = analysis.results.tied(analysis.setting)
    header = [analysis.setting.upper(), *(name.upper() for name in tied)]
    header += ["n", "loss", "sd", "95% interval", "accuracy", "sd", "perplexity", "minutes", "label"]
    header += ["status", "remark"]
    rows = []
    for rate in analysis.rates:
        loss, accuracy = rate.loss, rate.accuracy
        row = [format_value(rate.value)]
        row += [format_value(rate.arm.settings[name]) for name in tied]
        row += [str(loss.n), format_loss(loss.mean), format_loss(loss.sd)]
        row += [format_interval(loss.low, loss.high, signed=False)]
        row += [format_number(accuracy.mean, ".2%"), format_number(accuracy.sd, ".2%")]
        row += [f"{rate.perplexity:.4g}" if loss.n else "-", format_number(rate.minutes.mean, ".3g")]
        rows.append([*row, rate.label, rate.status, remark(rate, analysis)])
    return header, rows


def markdown(analysis: Analysis) -> str:
    """The table with what was found, the rules and the pictures."""
    header, rows = table(analysis)
    scale = f" at scale `{analysis.results.scale}`" if analysis.results.scale else ""
    found = "\n".join(f"* {text[0].upper()}{text[1:]}." for text in sentences(analysis))
    notes = "\n".join(f"* {note}" for note in analysis.results.notes + analysis.notes)
    parts = [f"# {analysis.results.name}{scale}: {analysis.setting.upper()}", found]
    parts += [format_markdown(header, rows)]
    parts += [
        "Loss is that of the last validation, in nats a token; perplexity is exp(mean loss); means and "
        "intervals are over seeds; minutes are of training on the machine that ran."
    ]
    parts += [f"![{name}]({name}.png)" for name in PICTURES]
    parts += [
        f"Labels, with the fall = {analysis.fall:.4f}, how far the best value's loss fell from where "
        f"training began ({analysis.start:.4f}):\n\n{RULES_TEXT}"
    ]
    if notes:
        parts.append(notes)
    return "\n\n".join(parts) + "\n"


def rate_record(rate: Rate, analysis: Analysis) -> dict:
    """A value's entry in final_results.json."""
    return {
        "rate": rate.value,
        **{name: rate.arm.settings[name] for name in analysis.results.tied(analysis.setting)},
        "loss": rate.loss.mean,
        "accuracy": rate.accuracy.mean,
        "perplexity": rate.perplexity,
        "time_minutes": rate.minutes.mean,
        "status": rate.status,
        "label": rate.label,
        "label_is_sure": rate.sure,
        "accuracy_percent_per_minute": rate.efficiency,
        "not_told_from_best": analysis.noise_known and rate.name in analysis.by_loss.names,
        "n": rate.loss.n,
        "single_run": rate.loss.n == 1,
        "loss_sd": rate.loss.sd,
        "loss_interval": [rate.loss.low, rate.loss.high],
        "accuracy_sd": rate.accuracy.sd,
        "accuracy_interval": [rate.accuracy.low, rate.accuracy.high],
        "perplexity_interval": [perplexity(rate.loss.low), perplexity(rate.loss.high)],
        "time_minutes_sd": rate.minutes.sd,
    }


def final_results(analysis: Analysis) -> dict:
    """The content of final_results.json: every value, with every run."""
    records = []
    for rate in analysis.rates:
        runs = [
            {
                "run_id": attempt.run_id,
                "seed": attempt.seed,
                "status": "diverged" if diverged(attempt) else attempt.state,
                "reason": attempt.reason,
                "loss": attempt.loss,
                "accuracy": accuracy_of(attempt),
                "perplexity": perplexity(attempt.loss),
                "time_minutes": minutes_of(attempt),
            }
            for attempt in rate.arm.attempts
        ]
        records.append({**rate_record(rate, analysis), "runs": runs})
    return {"sweep": analysis.results.name, "setting": analysis.setting.upper(), "results": records}


def ends(rates: Sequence[Rate]) -> list[float] | None:
    return [rates[0].value, rates[-1].value] if rates else None


def best_record(analysis: Analysis, by: str) -> dict | None:
    best = analysis.best(by)
    if best is None:
        return None
    summary = best.loss if by == "loss" else best.accuracy
    others = [rate.value for rate in analysis.near_best(by) if rate is not best]
    return {
        "rate": best.value,
        **{key: value for key, value in asdict(summary).items() if key != "failed"},
        "single_run": summary.n == 1,
        "cannot_be_told_from": others if analysis.contenders(by).df else None,
        "edge_of_the_range": edge_of(best, analysis),
    }


def insights(analysis: Analysis) -> dict:
    """The content of comprehensive_insights.json: everything computed."""
    results, top, stable = analysis.results, analysis.top(), analysis.stable()
    threshold = analysis.threshold()
    good = [rate for rate in analysis.rates if rate.label in ("good", "optimal")]
    return {
        "sweep": results.name,
        "scale": results.scale,
        "setting": analysis.setting.upper(),
        "tied_to_it": [name.upper() for name in results.tied(analysis.setting)],
        "found": sentences(analysis),
        "best_by_loss": best_record(analysis, "loss"),
        "best_by_accuracy": best_record(analysis, "accuracy"),
        "top_20_percent": {"rates": [rate.value for rate in top], "range": ends(top)},
        "good_range": ends(good),
        "stable_range": ends(stable),
        "divergence_threshold": threshold.value if threshold else None,
        "range_tested": ends(analysis.rates),
        "counts": {
            "rates": len(analysis.rates),
            "runs": len(results.attempts),
            **{outcome: results.count(outcome) for outcome in ("done", "failed", "missing")},
            "diverged": sum(rate.num_diverged for rate in analysis.rates),
            "labels": {label: sum(rate.label == label for rate in analysis.rates) for label in RULES},
        },
        "noise": {
            "sd_of_a_run": analysis.by_loss.sd,
            "degrees_of_freedom": analysis.by_loss.df,
            "without_what_a_seed_shares": analysis.by_loss.paired and analysis.noise_known,
            "alpha": analysis.by_loss.alpha,
        },
        "start_loss": analysis.start,
        "fall": analysis.fall,
        "labels": {format_value(rate.value): rate.label for rate in analysis.rates},
        "rules": RULES,
        "notes": results.notes + analysis.notes,
    }


def csv_of(analysis: Analysis) -> str:
    """A line for each value, with numbers to the last digit."""
    records = []
    for rate in analysis.rates:
        record = rate_record(rate, analysis)
        for name in ("loss", "accuracy", "perplexity"):
            record[f"{name}_low"], record[f"{name}_high"] = record.pop(f"{name}_interval")
        records.append({**record, "remark": remark(rate, analysis)})
    return as_csv(list(records[0]), [list(record.values()) for record in records])


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


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
    """Coloured by the rank in its row; a value that is not known is grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    rates = analysis.rates
    rows = [
        ("loss", [rate.loss.mean for rate in rates], 1, "{:.3f}"),
        ("accuracy, %", [100 * rate.accuracy.mean for rate in rates], -1, "{:.2f}"),
        ("perplexity", [rate.perplexity for rate in rates], 1, "{:.4g}"),
        ("minutes", [rate.minutes.mean for rate in rates], 1, "{:.3g}"),
    ]
    ranks = np.full((len(rows), len(rates)), np.nan)
    for row, (_, values, sign, _) in enumerate(rows):
        known = sorted({sign * value for value in values if math.isfinite(value)})
        for column, value in enumerate(values):
            if math.isfinite(value):
                ranks[row, column] = known.index(sign * value) / max(1, len(known) - 1)
    # from green to purple, which the colour-blind tell apart; light enough for black text on it
    colours = LinearSegmentedColormap.from_list("good", colormaps["PRGn"](np.linspace(0.88, 0.15, 64)))
    colours = colours.with_extremes(bad="#dddddd")
    ax.imshow(np.ma.masked_invalid(ranks), cmap=colours, aspect="auto", vmin=0, vmax=1)
    many = len(rates) > 30
    for row, (_, values, _, form) in enumerate(rows):
        for column, value in enumerate(values):
            text = form.format(value) if math.isfinite(value) else "–"
            dark = not 0.12 < ranks[row, column] < 0.85 and math.isfinite(value)
            ax.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                rotation=90 if many else 0,
                fontsize=max(5, min(9, 210 / len(rates))),
                color="white" if dark else "black",
                weight="bold" if ranks[row, column] == 0 else "normal",
            )
    labels = [format_value(rate.value) for rate in rates]
    ax.set_xticks(range(len(rates)), labels, rotation=60 if len(rates) > 12 else 0, fontsize=8)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set_xlabel(analysis.setting.upper())
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("means over seeds, coloured by rank in the row: green is the best (bold), purple the worst")


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
    """Every run of the fifth of the values that is best: is it the value, or luck?"""
    top = analysis.top()
    if not top:
        style.say_nothing_logged(ax, "final losses")
        return
    for mark in marks_of(top, loss_of, in_a_row=True):
        draw_mark(ax, mark)
    best = analysis.best()
    if best and analysis.noise_known:
        for x, rate in enumerate(top):
            width = analysis.by_loss.half_width(best.name, rate.name, len(analysis.by_loss.means) - 1)
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


def plot_names(analysis: Analysis) -> dict[float, str]:
    """lr_0.0650_loss_vs_steps.png; of other settings with their name; more digits where four do not do."""
    setting, values = analysis.setting, [rate.value for rate in analysis.rates]
    prefix = "lr" if setting.endswith("lr") else setting
    names = [f"{value:.4f}" for value in values]
    if any(abs(float(name) - value) > 1e-12 for name, value in zip(names, values, strict=True)):
        names = [format(value, ".10g") for value in values]
    return {v: f"{prefix}_{name}_loss_vs_steps.png" for v, name in zip(values, names, strict=True)}


def picture_of_rate(rate: Rate, analysis: Analysis):
    """Training and validation loss of one value's runs, with the best value's in grey."""
    plt = style.load_matplotlib()
    fig, ax = plt.subplots(figsize=(8, 5))
    runs = [run for run in rate.arm.runs if run.last_step >= 0]
    best = analysis.best()
    if best and best is not rate:
        line, _ = lines_of(best.arm, "val_loss", "steps")
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
    best = analysis.best()
    values = [rate.value for rate in analysis.rates]
    for number, rate in enumerate(analysis.rates):
        line, thin = lines_of(rate.arm, "val_loss", "steps")
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


def save_pictures(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw and write all pictures; their paths."""
    figures = {f"{name}.png": partial(draw, analysis) for name, draw in PICTURES.items()}
    names = plot_names(analysis)
    for rate in analysis.rates:
        figures[f"individual_plots/{names[rate.value]}"] = partial(picture_of_rate, rate, analysis)
    for name, draw in figures.items():
        style.save(draw(), folder / name)
    return [folder / name for name in figures]


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def write_analysis(options: Namespace) -> None:
    results = read_results(options.paths, options.logs, None, options.pool_sources)
    analysis = analyse(results, options.setting, options.where)
    if not analysis.results.has_steps:
        raise ValueError(f"none of the {len(analysis.results.attempts)} runs has logged a step yet")
    folder = options.out or results.folder / results.name / "lr_analysis"
    pictures = save_pictures(analysis, folder)
    write_atomically(folder / "results.md", markdown(analysis))
    write_atomically(folder / "results.csv", csv_of(analysis))
    write_atomically(folder / "final_results.json", as_json(final_results(analysis)))
    write_atomically(folder / "comprehensive_insights.json", as_json(insights(analysis)))
    print(format_table(*table(analysis)))
    for text in [*sentences(analysis), *analysis.notes]:
        print(f"* {text}")
    print(f"\n{folder / 'results.md'}, and {len(pictures)} pictures beside it")


def main(arguments: Sequence[str] | None = None) -> int:
    out = "folder to write to (default: logs/SWEEP/lr_analysis/)"
    parser = command_line.make_sweep_parser(f"{__doc__ or ''}\n{RULES_TEXT}", out)
    parser.add_argument("--setting", help="the setting to look at (default: the learning rate that varies)")
    parser.add_argument("--where", action="append", default=[], metavar="NAME=VALUE", help="only these arms")
    return command_line.run(write_analysis, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
