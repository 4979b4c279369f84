"""Draw the curves of one or more runs and print a summary of each.

    python plot_loss.py                               # the newest log in logs/
    python plot_loss.py logs/a.txt logs/b.txt         # compared
    python plot_loss.py logs --x time --out all.svg   # every log in a folder, against training time

The first panel is the validation loss, from the first validation on. Of several arms, the second is their
loss minus that of the control (the sweep's, if a manifest beside the logs names it, else the arm of lowest
loss), and an arm looks the same as in all pictures of its sweep. Below: rho, the signed radial part of the
gradient, training time, learning rate, betas and batch size, as far as they are logged and vary. Runs that
differ only in their seed are one arm: three or more are drawn as their mean with its 95% interval, two as
both runs and their mean. --separate draws every run on its own. A target is drawn if --target gives one, if
the runs have one TARGET_LOSS, or for the speedrun's own logs, which have no settings; a star marks the first
validation at which all runs of an arm have met it.
"""

import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
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
    differences,
    has_x,
    is_logged,
    line_of,
    panel_differences,
    panel_loss,
    panel_rho,
    plan_legend,
    result_label,
    runs_of,
)
from analysis.looks import looks_of, sweep_beside
from analysis.run_log import RunLog, newest_log, read_runs
from analysis.stats import mean_by_seed, summarize
from analysis.tables import format_loss, format_number, format_table

SCHEDULES = {  # by panel: its title, and the name in the legend of each logged key
    "lr": ("lr / base lr", {"lr_mul": "lr"}),
    "betas": ("betas", {"beta1": "beta1", "beta2": "beta2", "muon_momentum": "Muon momentum"}),
    "batch": ("batch, tokens", {"batch_size": "batch size"}),
}
MAX_LABEL = 100  # letters of a name in the legend
LEGEND_WIDTH = 190  # letters of the legend's size across the figure
RHO = {"spec_attn": "attention", "spec_mlp": "MLP"}
RHO_TITLE = "mean ρ = ⟨G,W⟩ / ‖W‖²"


# ------------------------------------------------------------------------------------------------
# What is drawn
# ------------------------------------------------------------------------------------------------


def finished_runs(arm: Arm) -> list[RunLog]:
    return [run for run in arm.runs if run.state in FINISHED and math.isfinite(run.final_val_loss)]


def final_losses(arm: Arm) -> list[float]:
    """Final losses of an arm's finished seeds, NaN for each failed run; runs under way are left out."""
    done = finished_runs(arm)
    ended = sum(run.state in (*FINISHED, "crashed", "diverged") for run in arm.runs)
    losses, _ = mean_by_seed([run.final_val_loss for run in done], [run.seed for run in done])
    return losses + [math.nan] * (ended - len(done))


def legend_label(arm: Arm, name: str = "") -> str:
    """Name (as given, else the arm's label) and result of an arm."""
    name = name or arm.label
    if len(arm.runs) == 1:
        run = arm.runs[0]
        state = "" if run.state in FINISHED else f", {run.state} at step {run.last_step}"
        return f"{name}: {format_loss(run.final_val_loss)}{state}"
    result = summarize(final_losses(arm))
    unfinished = len(arm.runs) - len(finished_runs(arm))
    return result_label(name, result, [f"{unfinished} unfinished"] if unfinished else [])


def what_to_draw(arms: Sequence[Arm]) -> tuple[list[Drawn], dict[str, str]]:
    """The arms with their looks and names, and the label of each arm's control.

    Both are those of the sweep that all runs belong to, if its manifest is beside them.
    """
    labels = [arm.label for arm in arms]
    sweep = sweep_beside(arms)
    planned = list(dict.fromkeys(run.tag for run in sweep.runs)) if sweep else labels
    looks = looks_of(planned, sweep.control if sweep else None)
    names = dict(zip(labels, style.shorten_apart(labels, MAX_LABEL), strict=True))
    in_order = sorted(arms, key=lambda arm: planned.index(arm.label))
    drawn = [Drawn(arm, looks[arm.label], legend_label(arm, names[arm.label])) for arm in in_order]
    lowest = min(arms, key=lambda arm: np.nan_to_num(summarize(final_losses(arm)).mean, nan=math.inf)).label
    controls = {label: sweep.control_of(label) if sweep else None for label in labels}
    controls = {label: other if other in labels else lowest for label, other in controls.items()}
    return drawn, {label: other for label, other in controls.items() if label != other}


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
    longest = max(run.last_time_ms for _, run in runs if math.isfinite(run.last_time_ms))
    scale, unit = style.time_unit(longest)
    ax.set_title(f"training time, {unit}")
    for look, line in lines:
        ax.plot(line.x, line.y / scale, **{**look, "linewidth": 1.2})


def panel_schedule(ax, drawn: Sequence[Drawn], axis: Axis, title: str, names: dict[str, str]) -> None:
    """Scheduled quantities, logged key -> name, of each arm's first run: its seeds share a schedule.

    One that is the same in all arms is drawn once, in grey.
    """
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
    if all_same:
        ax.set_title(f"{title}: all alike")
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


def varies(drawn: Sequence[Drawn], keys: Sequence[str], axis: Axis) -> bool:
    """True if a schedule is logged and is more than one number for all of training."""
    for key in keys:
        lines = [line for run in runs_of(drawn) if (line := line_of(run, key, axis))]
        if lines and len(np.unique(np.concatenate([line.y for line in lines]))) > 1:
            return True
    return False


def small_panels(drawn: Sequence[Drawn], axis: Axis) -> dict[str, Callable]:
    """The panels below that have something to show, each as a function that draws it.

    A new panel is a function like `panel_time` and an entry here. `curves.draw_lines` draws the mean over
    seeds of a measured quantity; a panel of SCHEDULES draws one seed only.
    """
    panels = {}
    if is_logged(drawn, list(RHO), axis):
        panels["rho"] = partial(panel_rho, title=RHO_TITLE, keys=RHO)
    if is_logged(drawn, ["train_time"], axis):
        panels["time"] = panel_time
    for name, (title, keys) in SCHEDULES.items():
        if varies(drawn, list(keys), axis):
            panels[name] = partial(panel_schedule, title=title, names=keys)
    return panels


def figure(arms: Sequence[Arm], axis_kind: str, target: tuple[float, str] | None):
    """The losses, below them whatever else has something to show, and one legend."""
    plt = style.load_matplotlib()
    drawn, controls = what_to_draw(arms)
    axis = Axis(axis_kind, runs_of(drawn))
    compared = differences(drawn, controls, axis) if axis_kind != "time" else []
    below = small_panels(drawn, axis)
    columns, inches = plan_legend([item.label for item in drawn], LEGEND_WIDTH)
    inches += 0.35  # the legend's title
    height = (9.4 if below else 6.5) + inches
    fig = plt.figure(figsize=(16, height))
    rows = fig.add_gridspec(2 if below else 1, 1, height_ratios=(1.5, 1) if below else (1,))
    top = rows[0].subgridspec(1, 2 if compared else 1, wspace=0.2)
    panel_loss(fig.add_subplot(top[0], label="loss"), drawn, axis, target)
    if below:
        widths = [1.6 if name == "rho" else 1 for name in below]
        bottom = rows[1].subgridspec(1, len(below), width_ratios=widths, wspace=0.35)
        for place, (name, draw) in zip(bottom, below.items(), strict=True):
            ax = fig.add_subplot(place, label=name)
            draw(ax, drawn, axis)
            axis.fit(ax)
    pooled = any("±" in item.label for item in drawn)
    add_legend(
        fig, drawn, columns, "final validation loss" + (", mean ± half its 95% interval" if pooled else "")
    )
    fig.tight_layout(rect=(0, inches / height, 1, 1))
    if compared:  # its names are spread apart by the panel's size, so only now; then they want room
        others = {controls[item.arm.label] for item, _ in compared}
        ax = fig.add_subplot(top[1], label="differences")
        panel_differences(ax, compared, axis, others.pop() if len(others) == 1 else "its control")
        fig.tight_layout(rect=(0, inches / height, 1, 1))
    return fig


# ------------------------------------------------------------------------------------------------
# The summary in words
# ------------------------------------------------------------------------------------------------


def summary(runs: Sequence[RunLog], arms: Sequence[Arm], target: float | None) -> str:
    """A table of the runs and, if any were pooled, one of the arms; with a target, when it was met."""
    rows = []
    for run, name in zip(runs, style.shorten_apart([run.run_id for run in runs], 70), strict=True):
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
            ]
        )
        if target is not None:
            met = run.first_at(target)
            rows[-1] += [met.step, style.format_time(met.time_ms)] if met else ["not met", "-"]
    header = ["run", "state", "seed", "steps", "final loss", "best", "time", "ms/step"]
    header += [f"{target:g} at step", "in"] if target is not None else []
    text = format_table(header, rows)
    if not any(len(arm.runs) > 1 for arm in arms):
        return text
    arm_rows = []
    for arm, name in zip(arms, style.shorten_apart([arm.label for arm in arms], 70), strict=True):
        arm_rows.append([name, summarize(final_losses(arm))])
        if target is not None:
            met = all_met(arm, target)
            arm_rows[-1].append(f"{met[0]}, {style.format_time(met[1])}" if met else "not by all")
    header = ["arm", "final validation loss"] + ([f"all runs at {target:g}"] if target is not None else [])
    return f"{text}\n\n{format_table(header, arm_rows)}"


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
    print(summary(runs, arms, target[0] if target else None))
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
        "--target", type=float, help="target loss (default: the runs' TARGET_LOSS; public logs: 3.28)"
    )
    parser.add_argument(
        "--separate", action="store_true", help="do not pool runs that differ only in their seed"
    )
    return command_line.run(draw_runs, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
