"""Draw an ORD sweep: each arm's difference from the control, at the end and over training, and rho.

    python plot_spectral_sweep.py sweeps/spectral_lr.toml     # a sweep, by its manifest in logs/
    python plot_spectral_sweep.py --logs logs                 # every log in a folder; the default
    python plot_spectral_sweep.py logs/a.txt logs/b.txt --control spectral_lr_mul=0

Panels: the final loss minus the control's, paired by seed, with its 95% interval and the verdict, arms in
the order of the plan; the same over training; the mean over layers of rho = <G,W> / ||W||^2 of
attention and of MLP matrices, with its sign. Runs that differ only in their seed are one arm. The ranked
table, with differences to the lowest mean and to the control (a = 0 unless the sweep or --control names
another), is printed and saved as .md beside logs/spectral_sweep_{n}runs_{YYYYmmdd-HHMMSS}.png.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line, style
from analysis.conclusion import conclusion
from analysis.curves import differences, is_logged, panel_differences, panel_loss, panel_rho
from analysis.files import write_atomically
from analysis.read_results import read_results
from analysis.results import Results, SweepArm
from analysis.run_log import format_value
from analysis.sweep_pictures import axis_of, draw_forest, forest_inches, what_to_draw
from analysis.tables import (
    format_difference,
    format_interval,
    format_loss,
    format_markdown,
    format_p,
    format_table,
)

RHO = {"spec_attn": "attention matrices", "spec_mlp": "MLP matrices"}  # as logged


def figure(results: Results):
    """The forest; below it losses over training, and rho where it is logged."""
    plt = style.load_matplotlib()
    drawn = what_to_draw(results)
    axis = axis_of(drawn)
    found = differences(drawn, results.verdict.controls, axis)
    rho = {key: what for key, what in RHO.items() if is_logged(drawn, [key], axis)}
    heights = [forest_inches(results), 5] if results.has_differences else [5]
    fig = plt.figure(figsize=(15, sum(heights)))
    rows = fig.add_gridspec(len(heights), 1, height_ratios=heights)
    below = rows[-1].subgridspec(1, 1 + len(rho), width_ratios=[1.15, *[1] * len(rho)])
    ax = fig.add_subplot(below[0])
    if results.has_differences:  # in a grid of its own, or its margins would be those of the panels below
        draw_forest(fig.add_subplot(rows[0].subgridspec(1, 1)[0]), results)
    if found:
        panel_differences(ax, found, axis, results.compared_with)
    else:
        panel_loss(ax, drawn, axis)
    for number, (key, what) in enumerate(rho.items(), 1):
        panel_rho(fig.add_subplot(below[number]), drawn, axis, f"mean ρ of {what}", {key: what})
    return fig


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows, ranked by mean final loss."""
    verdict = results.verdict
    header = ["rank", "arm", "a", "n", "mean", "sd", "to lowest", "95% interval", "p"]
    if results.control:
        header += ["to a=0" if _is_zero(results) else "to control", "95% interval", "p (Holm)", "test"]
    rows = []
    for arm in results.ranked():
        result, a = results.summary(arm), arm.strength
        ranked = arm.label in verdict.summaries and result.n
        row = [str(len(rows) + 1) if ranked else "-", arm.label, "-" if a is None else format_value(a)]
        row += [str(result.n), format_loss(result.mean), format_loss(result.sd)]
        row += _cells(verdict.versus_best.get(arm.label))
        if results.control:
            pair = verdict.versus_control.get(arm.label)
            tested = pair is not None and not math.isnan(pair.p)
            row += [*_cells(pair), pair.method if tested else "-"]
        rows.append([*row, remark(results, arm)])
    return [*header, "remark"], rows


def _is_zero(results: Results) -> bool:
    return any(arm.label == results.control and arm.strength == 0 for arm in results.arms)


def _cells(pair) -> list[str]:
    if pair is None:
        return ["-", "-", "-"]
    interval = format_interval(pair.low, pair.high)
    return [format_difference(pair.difference), interval, format_p(pair.p_corrected)]


def remark(results: Results, arm: SweepArm) -> str:
    """Lowest mean, control, a single run, failed, not ended."""
    parts, verdict = [], results.verdict
    if arm.label == verdict.best == verdict.lowest and len(verdict.summaries) > 1:
        parts.append("lowest mean")
    if arm.label == results.control:
        parts.append("control")
    return ", ".join([*parts, *results.remarks(arm)])


def explanation(results: Results) -> str:
    """An explanation of the table's columns."""
    verdict = results.verdict
    text = "Differences are final losses, arm minus the other: negative is better. n counts seeds. "
    if verdict.best:
        text += (
            f"To lowest: to {verdict.best}, the lowest mean of several runs, none of which failed, with "
            "Tukey's interval and p, for all pairs of arms at once. "
        )
    elif verdict.lowest:
        text += (
            f"To lowest: to {verdict.lowest}, untested: no arm has two finished runs and none that failed. "
        )
    if results.control:
        controls = dict.fromkeys([results.control, *verdict.controls.values()])
        text += (
            f"To control: to {' or '.join(controls)}, with the interval of each difference by itself, and p "
            f"after Holm's correction for the arms compared with {'one' if results.versus else 'it'}; paired "
            "by seed where both have the same seeds, else Welch's test."
        )
    return text.rstrip()


def markdown(results: Results, picture: str) -> str:
    header, rows = table(results)
    found = "\n".join(f"* {line}" for line in conclusion(results))
    parts = [f"# {results.name}: final validation loss", found, f"![the sweep]({picture})"]
    parts += [format_markdown(header, rows), explanation(results)]
    parts += ["\n".join(f"* {note}" for note in results.notes)] if results.notes else []
    return "\n\n".join(parts) + "\n"


def default_out(results: Results, now: float) -> Path:
    """logs/spectral_sweep_{n}runs_{time}.png, in the folder of the logs."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return results.folder / f"spectral_sweep_{len(results.runs)}runs_{stamp}.png"


def draw_sweep(options: Namespace) -> None:
    if options.out:
        style.check_suffix(options.out)
    if not options.paths and not options.logs.is_dir():
        raise ValueError(f"there is no folder {options.logs}/: train first, or name logs or a sweep")
    paths = options.paths or [options.logs]
    results = read_results(paths, options.logs, options.control, options.pool_sources, options.stopped_early)
    if not results.has_steps:
        raise ValueError(f"none of the {len(results.attempts)} runs has logged a step yet: nothing to draw")
    out = options.out or default_out(results, time.time())
    style.save(figure(results), out)
    write_atomically(out.with_suffix(".md"), markdown(results, out.name))
    print(f"{format_table(*table(results))}\n\n{explanation(results)}\n")
    print(*conclusion(results), sep="\n")
    for note in results.notes:
        print(f"note: {note}")
    print(f"\n{out}\n{out.with_suffix('.md')}")


def main(arguments: Sequence[str] | None = None) -> int:
    out = "where to write the picture, .png .svg or .pdf"
    parser = command_line.make_sweep_parser(__doc__, out, paths="*")
    parser.add_argument("--control", help="the arm to compare with (default: the sweep's, else a = 0)")
    return command_line.run(draw_sweep, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
