"""Draws an ORD sweep: validation loss, rho, and the U-curve of final loss against the strength a.

    python plot_spectral_sweep.py sweeps/spectral_lr.toml     # a sweep, by its manifest in logs/
    python plot_spectral_sweep.py --logs logs                 # every log in a folder; the default
    python plot_spectral_sweep.py logs/a.txt logs/b.txt --control spectral_lr_mul=0

Four panels: validation loss with the target; final loss against a = SPECTRAL_LR_MUL with 95% intervals and
the control's band; the mean over layers of rho = <G,W> / ||W||^2 of attention and of MLP matrices, with its
sign. Runs that differ only in their seed are one arm. The ranked table, with differences to the best arm and
to the control (a = 0 unless the sweep or --control names another), is printed and saved as .md and .csv
beside logs/spectral_sweep_{n}runs_{YYYYmmdd-HHMMSS}.png.
"""

import argparse
import csv
import io
import math
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import plot_loss
from analysis import style
from analysis.run_log import format_value
from analysis.stats import Summary, summarize
from analysis.sweep_results import (
    Results,
    SweepArm,
    conclusion,
    format_difference,
    format_interval,
    format_p,
    read_results,
    strength,
)

MAX_TICKS = 9  # values of a that can be written below the U-curve
MIN_INTERVAL = 3  # an interval from two runs is wider than the plot: the two are shown instead
DODGE = 5.0  # points between arms of one a and different families


# ------------------------------------------------------------------------------------------------
# Arms in order
# ------------------------------------------------------------------------------------------------


def drawn_arms(results: Results) -> list[SweepArm]:
    """The arms that have something to draw: those without an a first, then by a within their family."""
    arms = [arm for arm in results.arms if any(run.last_step >= 0 for run in arm.runs)]
    family = families(results)
    return sorted(arms, key=lambda arm: (strength(arm) is not None, family[arm.label], strength(arm) or 0.0))


def families(results: Results) -> dict[str, str]:
    """By arm, the settings other than a in which it differs from most: arms of one family are one curve."""
    with_a = [arm for arm in results.arms if strength(arm) is not None]
    usual = {
        name: Counter(format_value(arm.settings.get(name)) for arm in with_a).most_common(1)[0][0]
        for name in results.varied()
        if name != "spectral_lr_mul" and with_a
    }
    found = {}
    for arm in results.arms:
        own = {name: format_value(arm.settings.get(name)) for name in usual}
        parts = [f"{name}={value}" for name, value in own.items() if value != usual[name]]
        found[arm.label] = " ".join([*parts, *filter(None, [arm.foreign])])
    return found


def summary_of(results: Results, arm: SweepArm) -> Summary:
    """The verdict's; of an arm that is not compared, its own."""
    return results.verdict.summaries.get(arm.label) or summarize(arm.samples()[0])


def briefly(results: Results, arms: Sequence[SweepArm]) -> list[SweepArm]:
    """The arms with labels that fit beside a line: a=0.1 where that tells them apart."""
    family = families(results)
    alike = len({family[arm.label] for arm in arms if strength(arm) is not None}) == 1
    names = [
        f"a={format_value(strength(arm))}"
        if alike and strength(arm) is not None
        else style.shorten(arm.label, plot_loss.MAX_NAME)
        for arm in arms
    ]
    if len(set(names)) < len(names):
        return list(arms)
    return [replace(arm, label=name) for arm, name in zip(arms, names, strict=True)]


def legend_label(results: Results, arm: SweepArm) -> str:
    name, result = style.shorten(arm.label, 48), summary_of(results, arm)
    failed, missing = arm.count("failed"), arm.count("missing")
    lost = [f"{failed} failed"] * bool(failed) + [f"{missing} not ended"] * bool(missing)
    n = ", ".join([f"n={result.n}" if result.n != 1 else "a single run", *lost])
    if not result.n:
        return f"{name}: {', '.join(lost)}"
    interval = f" ± {(result.high - result.low) / 2:.4f}" if result.n >= MIN_INTERVAL else ""
    return f"{name}: {style.format_loss(result.mean)}{interval} ({n})"


# ------------------------------------------------------------------------------------------------
# Panels
# ------------------------------------------------------------------------------------------------


def panel_rho(ax, arms: Sequence[SweepArm], looks: Sequence[dict], axis, key: str, what: str) -> None:
    """Mean rho over layers: linear around zero, logarithmic beyond, so that sign and magnitude both show."""
    ax.set_title(f"mean ρ of {what}")
    sizes, silent = [], []
    for arm, look in zip(arms, looks, strict=True):
        line, thin = plot_loss.lines_of(arm, key, axis.kind)
        if line is None:
            silent.append(arm)
            continue
        plot_loss.draw(ax, line, thin if len(arm.runs) < 3 else [], plot_loss.plain(look), axis)
        sizes.append(np.abs(line.y[np.isfinite(line.y) & (line.y != 0)]))
    sizes = np.concatenate(sizes) if sizes else np.zeros(0)
    if not len(sizes):
        style.say_nothing_logged(ax, f"ρ of {what} (only runs with ORD log it)")
        return
    least = max(np.quantile(sizes, 0.05), sizes.max() * 1e-5)
    ax.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(least)), linscale=0.5)
    ax.axhline(0, color="black", linewidth=1)
    low, high = ax.get_ylim()
    threshold = 10.0 ** math.floor(math.log10(least))
    ax.set_ylim(min(low, -1.5 * threshold), max(high, 1.5 * threshold))
    note = {"textcoords": "offset points", "fontsize": 8, "color": style.GREY, "ha": "right"}
    at = {"xy": (0.995, 0), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
    ax.annotate("ρ > 0: stepping along −G_par shrinks W", xytext=(0, 3), va="bottom", **at, **note)
    ax.annotate("ρ < 0: it grows W", xytext=(0, -3), va="top", **at, **note)
    if silent:
        names = ", ".join(style.shorten(arm.label, 24) for arm in silent[:3])
        names += f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        ax.set_title(f"not logged: {names}", loc="right", fontsize=8, fontweight="normal", color=style.GREY)
    ax.set_xlabel(axis.label)


def panel_u_curve(ax, other, results: Results, arms: Sequence[SweepArm], looks: Sequence[dict]) -> None:
    """Final loss against a, and in `other` (if there is one) that of the arms without an a."""
    import matplotlib.transforms as transforms

    family = families(results)
    look_of = {arm.label: look for arm, look in zip(arms, looks, strict=True)}
    with_a = [arm for arm in arms if strength(arm) is not None and summary_of(results, arm).n]
    if not with_a:
        style.say_nothing_logged(ax, "final loss against a (no finished run with SPECTRAL_LR_MUL)")
    else:
        scale_of_a(ax, [strength(arm) for arm in with_a])
    names = sorted(
        {family[arm.label] for arm in with_a}, key=lambda name: (-_size(with_a, family, name), name)
    )
    limits = u_limits(results, arms)
    handles = []
    for number, name in enumerate(names):
        members = sorted((arm for arm in with_a if family[arm.label] == name), key=strength)
        shift = transforms.ScaledTranslation(DODGE * number / 72, 0, ax.figure.dpi_scale_trans)
        place = ax.transData + shift
        dashes = style.LINES[number % len(style.LINES)]
        joint = {"color": style.GREY, "linewidth": 1, "linestyle": dashes, "zorder": 1}
        means = [summary_of(results, arm).mean for arm in members]
        if len(members) > 1:
            label = style.shorten(name, 44) or "as most arms"
            x = [strength(arm) for arm in members]
            handles += ax.plot(x, means, transform=place, label=label, **joint)
        for arm in members:
            draw_result(ax, strength(arm), results, arm, look_of[arm.label], place, limits)
    panels = [ax] if with_a else []
    if other is not None:
        panels.append(other)
        strip_of_others(other, results, arms, look_of, limits)
    for panel in panels:
        panel.set_ylim(*limits)
        draw_control(panel, results)
    if len(handles) > 1:
        ax.legend(handles=handles, fontsize=8, loc="best", frameon=True, framealpha=0.85, edgecolor="none")
    ax.set_title("final validation loss against a")
    drawn = [summary_of(results, arm) for arm in arms]
    key = ["bars: 95% interval"] * any(result.n >= MIN_INTERVAL for result in drawn)
    key += ["dots: runs"] * any(result.n > 1 for result in drawn)
    key += ["no interval from two"] * any(result.n == 2 for result in drawn)
    key += ["hollow: a single run"] * any(result.n == 1 for result in drawn)
    key += ["▲ above this range"] * any(result.mean > limits[1] for result in drawn)
    # lines are broken between the parts, not in them: there is a neighbour to the right
    key = textwrap.fill(", ".join(part.replace(" ", "~") for part in key), 44).replace("~", " ")
    ax.set_xlabel(f"a = SPECTRAL_LR_MUL, symmetric-logarithmic\n{key}")


def _size(arms: Sequence[SweepArm], family: dict[str, str], name: str) -> int:
    return sum(family[arm.label] == name for arm in arms)


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


def u_limits(results: Results, arms: Sequence[SweepArm]) -> tuple[float, float]:
    """Of final losses with their intervals; single runs where there is no interval."""
    centres, lows, highs = [], [], []
    for arm in arms:
        result = summary_of(results, arm)
        ends = [loss for loss in arm.samples()[0] if math.isfinite(loss)]
        if result.n:
            ends += [result.low, result.high] if result.n >= MIN_INTERVAL else []
            centres.append(result.mean)
            lows.append(min(ends))
            highs.append(max(ends))
    return style.bulk_limits(centres, lows, highs)


def draw_result(ax, x: float, results: Results, arm: SweepArm, look: dict, place, limits) -> None:
    """Mean with interval, and the runs as small dots; above the range, a triangle with the value."""
    result, losses = summary_of(results, arm), arm.samples()[0]
    colour = look["color"]
    if result.mean > limits[1]:
        y = limits[1] - 0.02 * (limits[1] - limits[0])
        ax.plot([x], [y], "^", color=colour, markersize=8, transform=place, zorder=4)
        note = {"textcoords": "offset points", "fontsize": 8, "color": colour, "ha": "center", "va": "top"}
        ax.annotate(f"{result.mean:.4f}", (x, y), (0, -7), **note)
        return
    known = [loss for loss in losses if math.isfinite(loss)]
    if len(known) > 1:
        ax.plot(
            [x] * len(known), known, ".", color=colour, markersize=4, alpha=0.6, transform=place, zorder=2
        )
    bar = [[result.mean - result.low], [result.high - result.mean]] if result.n >= MIN_INTERVAL else None
    hollow = {"markerfacecolor": "white"} if result.n == 1 else {}
    ax.errorbar(
        [x],
        [result.mean],
        bar,
        color=colour,
        marker=look["marker"],
        markersize=6.5,
        capsize=3,
        transform=place,
        zorder=3,
        linestyle="none",
        **hollow,
    )


def strip_of_others(ax, results: Results, arms: Sequence[SweepArm], look_of: dict, limits) -> None:
    """The arms without an a, side by side."""
    others = [arm for arm in arms if strength(arm) is None and summary_of(results, arm).n]
    for x, arm in enumerate(others):
        draw_result(ax, x, results, arm, look_of[arm.label], ax.transData, limits)
    names = [style.shorten(arm.label, 18) for arm in others]
    ax.set_xticks(range(len(others)), names, rotation=90 if len(others) > 1 else 0, fontsize=8)
    ax.set_xlim(-0.7, len(others) - 0.3)
    ax.tick_params(labelleft=False)
    ax.grid(False, axis="x")
    ax.set_title("no a" if len(others) < 3 else "arms without an a", fontweight="normal", fontsize=9)


def draw_control(ax, results: Results) -> None:
    """The control's mean and interval as a band, over which arms are compared."""
    if results.control is None:
        return
    result = results.verdict.summaries[results.control]
    if not result.n:
        return
    ax.axhline(result.mean, color=style.GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    if result.n >= MIN_INTERVAL:
        ax.axhspan(result.low, result.high, color=style.GREY, alpha=0.15, linewidth=0, zorder=0.4)


def figure(results: Results, target: float):
    """The four panels with one legend below."""
    plt = style.load_matplotlib()
    arms = drawn_arms(results)
    axis = plot_loss.Axis("steps", [run for arm in arms for run in arm.runs])
    looks = [style.arm_style(number) for number in range(len(arms))]
    labels = [legend_label(results, arm) for arm in arms]
    brief = briefly(results, arms)
    if 1 < len(arms) <= plot_loss.MAX_MARKED and plot_loss.short_names(brief)[0] == plot_loss.letter(0):
        labels = [f"{plot_loss.letter(number)}  {label}" for number, label in enumerate(labels)]
    columns = max(1, min(len(arms), 170 // (max(map(len, labels)) + 8)))
    legend_inches = 0.45 + 0.2 * math.ceil(len(arms) / columns)
    height = 10.4 + legend_inches
    fig = plt.figure(figsize=(15, height))
    num_others = sum(strength(arm) is None and summary_of(results, arm).n > 0 for arm in arms)
    grid = fig.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1.25, 1))
    widths = (1, min(0.8, 0.1 + 0.09 * num_others)) if num_others else (1,)
    right = grid[0, 1].subgridspec(1, len(widths), width_ratios=widths, wspace=0.04)
    loss, curve = fig.add_subplot(grid[0, 0]), fig.add_subplot(right[0])
    other = fig.add_subplot(right[1]) if num_others else None
    plot_loss.panel_loss(loss, brief, looks, axis, target)
    loss.set_xlabel(axis.label)
    panel_u_curve(curve, other, results, arms, looks)
    for place, key, what in ((0, "spec_attn", "attention matrices"), (1, "spec_mlp", "MLP matrices")):
        panel_rho(fig.add_subplot(grid[1, place]), arms, looks, axis, key, what)
    handles = [
        plt.Line2D([], [], **{**look, "markersize": 5}, label=label)
        for look, label in zip(looks, labels, strict=True)
    ]
    title = "final validation loss"
    if any(summary_of(results, arm).n >= MIN_INTERVAL for arm in arms):
        title += ": mean ± half its 95% interval"
    if results.control and results.verdict.summaries[results.control].n:
        title += f"; grey: the control, {style.shorten(results.control, 48)}"
    fig.legend(
        handles=handles,
        loc="lower center",
        ncols=columns,
        fontsize=9,
        title=title,
        title_fontproperties={"weight": "bold"},
    )
    fig.tight_layout(rect=(0, legend_inches / height, 1, 1))
    return fig


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows, ranked by mean final loss."""
    verdict = results.verdict
    best = "to best" if verdict.best else "to lowest"
    header = ["rank", "arm", "a", "n", "mean", "sd", best, "95% interval", "p"]
    if results.control:
        header += ["to a=0" if _is_zero(results) else "to control", "95% interval", "p (Holm)", "test"]
    rows = []
    for arm in results.ranked():
        result, a = summary_of(results, arm), strength(arm)
        ranked = arm.label in verdict.summaries and result.n
        row = [str(len(rows) + 1) if ranked else "-", arm.label, "-" if a is None else format_value(a)]
        row += [str(result.n), style.format_loss(result.mean), style.format_loss(result.sd)]
        row += _cells(verdict.versus_best.get(arm.label), verdict.p_best.get(arm.label))
        if results.control:
            pair = verdict.versus_control.get(arm.label)
            tested = pair is not None and not math.isnan(pair.p)
            row += [*_cells(pair, verdict.p_control.get(arm.label)), pair.method if tested else "-"]
        rows.append([*row, remark(results, arm)])
    return [*header, "remark"], rows


def _is_zero(results: Results) -> bool:
    return any(arm.label == results.control and strength(arm) == 0 for arm in results.arms)


def _cells(pair, p: float | None) -> list[str]:
    if pair is None:
        return ["-", "-", "-"]
    return [format_difference(pair.difference), format_interval(pair.low, pair.high), format_p(p)]


def remark(results: Results, arm: SweepArm) -> str:
    """Best, control, a single run, failed, not ended."""
    verdict, result = results.verdict, summary_of(results, arm)
    parts = ["best"] * (arm.label == verdict.best and len(verdict.summaries) > 1)
    parts += ["control"] * (arm.label == results.control)
    parts += ["a single run"] * (result.n == 1)
    for outcome, word in (("failed", "failed"), ("missing", "not ended")):
        if arm.count(outcome):
            parts.append(f"{arm.count(outcome)} of {len(arm.attempts)} {word}")
    if arm.foreign:
        parts.append("not compared")
    return ", ".join(parts)


def explanation(results: Results) -> str:
    """What the table's columns are."""
    verdict = results.verdict
    text = (
        "Differences are final losses, arm minus the other: negative is better. n counts seeds. Intervals "
        "are those of each difference by itself. "
    )
    if verdict.best:
        text += f"To best: to {verdict.best}, with p after Holm's correction for all pairs of arms. "
    elif verdict.lowest:
        text += (
            f"To lowest: to {verdict.lowest}; no arm has two finished runs and none failed, so none is best. "
        )
    if results.control:
        controls = dict.fromkeys([results.control, *verdict.controls.values()])
        text += (
            f"To control: to {' or '.join(controls)}, p after Holm's correction for the arms compared with "
            f"{'one' if results.versus else 'it'}; paired by seed where both have the same seeds, else "
            "Welch's test."
        )
    return text.rstrip()


def markdown(results: Results, picture: str) -> str:
    header, rows = table(results)
    parts = [f"# {results.name}: final validation loss", conclusion(results), f"![the sweep]({picture})"]
    parts += [style.format_markdown(header, rows), explanation(results)]
    parts += ["\n".join(f"* {note}" for note in results.notes)] if results.notes else []
    return "\n\n".join(parts) + "\n"


def as_csv(results: Results) -> str:
    """One line an arm, numbers to the last digit; empty where there is none."""
    verdict = results.verdict
    header = ["rank", "arm", "a", "n", "failed", "missing", "mean", "sd", "low", "high"]
    for other in ("best", "control"):
        header += [f"to_{other}", f"to_{other}_low", f"to_{other}_high", f"to_{other}_p"]
    header += ["to_control_test", "remark"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for rank, arm in enumerate(results.ranked(), 1):
        result = summary_of(results, arm)
        row = [rank if result.n and not arm.foreign else None, arm.label, strength(arm), result.n]
        row += [arm.count("failed"), arm.count("missing"), result.mean, result.sd, result.low, result.high]
        for pairs, p in ((verdict.versus_best, verdict.p_best), (verdict.versus_control, verdict.p_control)):
            pair = pairs.get(arm.label)
            row += [pair.difference, pair.low, pair.high, p[arm.label]] if pair else [None] * 4
        pair = verdict.versus_control.get(arm.label)
        row += [pair.method if pair and not math.isnan(pair.p) else None, remark(results, arm)]
        writer.writerow(["" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in row])
    return out.getvalue()


def default_out(results: Results, now: float) -> Path:
    """logs/spectral_sweep_{n}runs_{time}.png, in the folder of the logs."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return results.folder / f"spectral_sweep_{len(results.runs)}runs_{stamp}.png"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="LOG|SWEEP.toml", help="a sweep, or logs")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of logs and manifests")
    parser.add_argument("--out", type=Path, help="where to write the picture, .png .svg or .pdf")
    parser.add_argument("--target", type=float, help="target loss (default: the runs' own, else 3.28)")
    parser.add_argument("--control", help="the arm to compare with (default: the sweep's, else a = 0)")
    parser.add_argument("--pool-sources", action="store_true", help="pool runs of different source code")
    options = parser.parse_args(arguments)
    try:
        if options.out:
            style.check_suffix(options.out)
        if not options.paths and not options.logs.is_dir():
            raise ValueError(f"there is no folder {options.logs}/: train first, or name logs or a sweep")
        results = read_results(
            options.paths or [options.logs], options.logs, options.control, options.pool_sources
        )
        if not drawn_arms(results):
            raise ValueError(
                f"none of the {len(results.attempts)} runs has logged a step yet: nothing to draw"
            )
        out = options.out or default_out(results, time.time())
        style.save(figure(results, style.target_of(results.runs, options.target)), out)
        style.write_text(markdown(results, out.name), out.with_suffix(".md"))
        style.write_text(as_csv(results), out.with_suffix(".csv"))
    except (ValueError, OSError) as error:
        return style.complain(error)
    print(f"{style.format_table(*table(results))}\n\n{explanation(results)}\n\n{conclusion(results)}")
    for note in results.notes:
        print(f"note: {note}")
    print(f"\n{out}\n{out.with_suffix('.md')}\n{out.with_suffix('.csv')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
