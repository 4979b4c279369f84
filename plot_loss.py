"""Draw the curves of one or more runs and print a summary of each.

    python plot_loss.py                               # the newest log in logs/
    python plot_loss.py logs/a.txt logs/b.txt         # compared
    python plot_loss.py logs --x time --out all.svg   # every log in a folder, against training time

Six panels: validation loss with its end enlarged, training time, learning rate, betas, batch size, and rho,
the signed radial part of the gradient. Runs that differ only in their seed are one arm: three or more are
drawn as their mean with its 95% interval, two as both runs and their mean. --separate draws every run on its
own. The target is the runs' own TARGET_LOSS, else 3.28; a star marks the first validation at which all runs
of an arm have met it.
"""

import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line, style
from analysis.arms import Arm, group_by_arm, one_arm_a_run
from analysis.curves import (
    FINISHED,
    X_LABELS,
    Axis,
    Drawn,
    Line,
    add_legend,
    all_met,
    has_x,
    line_of,
    name_ends,
    panel_loss,
    panel_rho,
    plan_legend,
    result_label,
    runs_of,
)
from analysis.run_log import RunLog, newest_log, read_runs
from analysis.stats import summarize
from analysis.tables import format_loss, format_number, format_table

PANELS = (("loss", "time", "lr"), ("rho", "betas", "batch"))  # where they are; `figure` fills them
WIDTHS, HEIGHTS = (1.7, 1, 1), (1.35, 1)  # of their columns and rows, in proportion
SCHEDULES = {  # by panel: its title, and the name in the legend of each logged key
    "lr": ("learning rate, times its base", {"lr_mul": "lr"}),
    "betas": (
        "betas and momentum",
        {"beta1": "beta1", "beta2": "beta2", "muon_momentum": "Muon momentum"},
    ),
    "batch": ("batch size, tokens", {"batch_size": "batch size"}),
}
RHO_TITLE = "mean ρ = ⟨G,W⟩ / ‖W‖² over layers, signed"


# ------------------------------------------------------------------------------------------------
# What is drawn
# ------------------------------------------------------------------------------------------------


def final_losses(arm: Arm) -> list[float]:
    """Final losses of an arm's finished runs; NaN for those that failed, none for those under way."""
    ended = [run for run in arm.runs if run.state in (*FINISHED, "crashed", "diverged")]
    return [run.final_val_loss if run.state in FINISHED else math.nan for run in ended]


def legend_label(arm: Arm, name: str = "") -> str:
    """Name (as given, else the arm's label) and result of an arm."""
    name = name or arm.label
    if len(arm.runs) == 1:
        run = arm.runs[0]
        state = "" if run.state in FINISHED else f", {run.state} at step {run.last_step}"
        return f"{name}: {format_loss(run.final_val_loss)}{state}"
    result = summarize(final_losses(arm))
    unfinished = len(arm.runs) - result.n
    return result_label(name, result, [f"{unfinished} unfinished"] if unfinished else [])


def what_to_draw(arms: Sequence[Arm]) -> list[Drawn]:
    """The arms with their looks and names."""
    names = style.shorten_apart([arm.label for arm in arms], 60)
    drawn = [
        Drawn(arm, style.arm_style(number), arm.label, legend_label(arm, name))
        for number, (arm, name) in enumerate(zip(arms, names, strict=True))
    ]
    name_ends(drawn)
    return drawn


# ------------------------------------------------------------------------------------------------
# Panels
# ------------------------------------------------------------------------------------------------


def panel_time(ax, drawn: Sequence[Drawn], axis: Axis) -> None:
    """Training time over steps or tokens. If time is the x axis: steps over training time."""
    runs = [(item.line_look, run) for item in drawn for run in item.arm.runs]
    lines = [(look, line) for look, run in runs if (line := line_of(run, "train_time", axis))]
    if axis.kind == "time":
        ax.set_title("steps done")
        for look, line in lines:
            ax.plot(line.x, line.step, **look)
        return
    longest = max((run.last_time_ms for _, run in runs if math.isfinite(run.last_time_ms)), default=None)
    if longest is None:
        style.say_nothing_logged(ax, "training time")
        return
    scale, unit = style.time_unit(longest)
    ax.set_title(f"training time, {unit}")
    for look, line in lines:
        ax.plot(line.x, line.y / scale, **{**look, "linewidth": 1.2})


def panel_schedule(ax, drawn: Sequence[Drawn], axis: Axis, title: str, names: dict[str, str]) -> None:
    """Scheduled quantities, logged key -> name. One that is the same in all arms is drawn once, in grey."""
    ax.set_title(title)
    logged: dict[str, list[Line]] = {}
    all_same = len(drawn) > 1
    for key, name in names.items():
        found = [(item.line_look, line_of(item.arm.runs[0], key, axis)) for item in drawn]
        found = [(look, line) for look, line in found if line]
        if not found:
            continue
        same = len(drawn) > 1 and len(found) == len(drawn) and agree([line for _, line in found])
        all_same = all_same and same
        dashes = style.LINES[len(logged)]
        logged[name] = [line for _, line in found]
        for look, line in found[:1] if same else found:
            if same:
                look = {**look, "color": "#444444"}
            if same or len(names) > 1:
                look = {**look, "linestyle": dashes}
            ax.plot(line.x, line.y, **look, drawstyle="steps-post")
    if not logged:
        style.say_nothing_logged(ax, title)
        return
    if all_same:
        ax.set_title("the same in all", loc="right", fontsize=9, fontweight="normal", color=style.GREY)
    if len(names) > 1:
        style.line_legend(ax, list(logged), loc="center right")
    if "batch_size" in names:
        label_batch_sizes(ax, np.concatenate([line.y for line in logged["batch size"]]))


def agree(lines: Sequence[Line]) -> bool:
    """True if lines agree at the steps they have in common (runs may be logged more or less often)."""
    first = lines[0]
    for other in lines[1:]:
        _, here, there = np.intersect1d(first.step, other.step, return_indices=True)
        if len(here) < min(len(first.step), len(other.step)) / 2:
            return False
        if not np.array_equal(first.y[here], other.y[there]):
            return False
    return True


def label_batch_sizes(ax, values: np.ndarray) -> None:
    """Start the y axis at zero and put a tick at each size; write multiples of 1024 as 64k."""
    ax.set_ylim(0, 1.08 * np.nanmax(values))
    sizes = np.unique(values)
    if len(sizes) <= 6:
        names = [f"{v / 1024:g}k" if v >= 1024 and v % 128 == 0 else f"{v:g}" for v in sizes]
        ax.set_yticks(sizes, names)


def figure(arms: Sequence[Arm], axis_kind: str, target: float):
    """The six panels with one legend below."""
    plt = style.load_matplotlib()
    drawn = what_to_draw(arms)
    axis = Axis(axis_kind, runs_of(drawn))
    columns, inches = plan_legend([item.label for item in drawn], 190)
    inches += 0.35
    height = 9.4 + inches
    size = (16, height)
    fig, panels = plt.subplot_mosaic(PANELS, figsize=size, width_ratios=WIDTHS, height_ratios=HEIGHTS)
    panel_loss(panels["loss"], drawn, axis, target)
    panel_time(panels["time"], drawn, axis)
    for name, (title, names) in SCHEDULES.items():
        panel_schedule(panels[name], drawn, axis, title, names)
    panel_rho(panels["rho"], drawn, axis, RHO_TITLE, {"spec_attn": "attention", "spec_mlp": "MLP"})
    for ax in panels.values():
        axis.fit(ax)
    add_legend(fig, drawn, columns, "final validation loss")
    fig.tight_layout(rect=(0, inches / height, 1, 1))
    return fig


# ------------------------------------------------------------------------------------------------
# The summary in words
# ------------------------------------------------------------------------------------------------


def summary(runs: Sequence[RunLog], arms: Sequence[Arm], target: float) -> str:
    """A table of the runs and, if any were pooled, one of the arms."""
    rows = []
    for run, name in zip(runs, style.shorten_apart([run.run_id for run in runs], 70), strict=True):
        met = run.first_at(target)
        per_step = run.last_time_ms / run.last_step if run.last_step > 0 else math.nan
        rows.append(
            [
                name,
                run.state,
                "-" if run.seed is None else run.seed,
                f"{max(run.last_step, 0)}/{run.num_steps or '?'}",
                format_loss(run.final_val_loss),
                format_loss(run.best_val_loss),
                style.format_time(run.last_time_ms),
                format_number(per_step, ".1f"),
                met.step if met else "not met",
                style.format_time(met.time_ms) if met else "-",
            ]
        )
    header = ["run", "state", "seed", "steps", "final loss", "best", "time", "ms/step"]
    header += [f"{target:g} at step", "in"]
    text = format_table(header, rows)
    pooled = [arm for arm in arms if len(arm.runs) > 1]
    if pooled:
        arm_rows = []
        names = style.shorten_apart([arm.label for arm in arms], 70)
        for arm, name in zip(arms, names, strict=True):
            met = all_met(arm, target)
            steps = f"{met[0]}, {style.format_time(met[1])}" if met else "not by all"
            arm_rows.append([name, summarize(final_losses(arm)), steps])
        header = ["arm", "final validation loss", f"all runs at {target:g}"]
        text += "\n\n" + format_table(header, arm_rows)
    return text


def order_of(arm: Arm) -> float:
    """The place of an arm: the number that its name ends in (muon_lr=0.1, lr_0.1); 0 if there is none."""
    number = re.fullmatch(r"\S*?[=_](-?\d+\.?\d*(?:e[-+]?\d+)?)", arm.label)
    return float(number[1]) if number else 0.0


def choose(runs: Sequence[RunLog], axis: str) -> tuple[list[RunLog], list[str]]:
    """The runs that can be drawn on this axis, and why the others cannot."""
    drawn, left_out = [], []
    for run in runs:
        if run.last_step < 0:
            left_out.append(f"{run.path}: no step in this log yet, nothing to draw")
        elif not has_x(run, axis):
            left_out.append(f"{run.path}: no {X_LABELS[axis]} in this log; draw it with --x steps")
        else:
            drawn.append(run)
    return drawn, left_out


def remarks(runs: Sequence[RunLog]) -> list[str]:
    """Notes on lines that could not be read."""
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


def draw_runs(options: Namespace) -> None:
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
        arms = one_arm_a_run(arms)
    target = style.target_of(drawn, options.target)
    out = options.out or default_out(drawn, time.time())
    style.save(figure(arms, options.x, target), out)
    print(summary(runs, arms, target))
    for note in [*notes, *left_out, *remarks(runs)]:
        print(f"note: {note}")
    print(f"\n{out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.make_parser(__doc__)
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
    return command_line.run(draw_runs, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
