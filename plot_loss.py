"""Draw the curves of one or more runs and print a summary of each.

    python plot_loss.py                               # the newest log in logs/
    python plot_loss.py logs/a.txt logs/b.txt         # compared
    python plot_loss.py logs --x time --out all.svg   # every log in a folder, against training time
    python plot_loss.py sweeps/spectral_lr.toml       # the runs of a sweep

The first panel is the validation loss, from the first validation after step 0 on. Of several arms, the second
is their loss minus that of the control: the sweep's, if a manifest beside the logs has all these runs; else
the arm with a = 0 or the baseline, as in all commands; else the arm of lowest loss. An arm looks the same as
in all pictures of its sweep. Below: rho, the signed radial part of the gradient, training time, learning
rate, betas and batch size, as far as they are logged and vary. Runs that differ only in their seed are one
arm: three or more are drawn as their mean with its 95% interval, two as both runs and their mean. --separate
draws every run on its own. A target is drawn if --target gives one, if the runs have one TARGET_LOSS, or for
the speedrun's own logs, which have no settings; a star marks the first validation at which all runs of an arm
have met it.
"""

import math
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line, style
from analysis.arms import unique_names
from analysis.curves import (
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
    result_label,
    runs_of,
)
from analysis.reaching import target_of
from analysis.read_results import read_results
from analysis.results import Results, SweepArm
from analysis.run_log import FINISHED, RunLog, log_stem, newest_log
from analysis.sweep_pictures import what_to_draw
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


def separated(results: Results) -> Results:
    """Make an arm of each run, named by its arm and seed; by its run_id, if two runs share a seed."""
    if all(len(arm.runs) == 1 for arm in results.arms):
        return results
    attempt_of, arms = {id(attempt.log): attempt for attempt in results.attempts}, []
    for arm in results.arms:
        seeds = Counter(arm.seeds)
        for run in arm.runs:
            label = run.run_id if run.seed is None or seeds[run.seed] > 1 else f"{arm.label} seed={run.seed}"
            label = arm.label if len(arm.runs) == 1 else label
            arms.append(SweepArm(label, arm.key, [run], [attempt_of[id(run)]]))
    names = unique_names([arm.label for arm in arms], [arm.runs[0] for arm in arms])
    arms = [replace(arm, label=name) for arm, name in zip(arms, names, strict=True)]
    looks = style.looks_of([arm.label for arm in arms])
    return replace(results, arms=arms, control=None, versus={}, looks=looks)


def controls_of(results: Results) -> dict[str, str]:
    """Map each arm to the one it is compared with: its control, else the arm of lowest loss.

    Arms of other source code are compared, too. If some arms have controls of their own but the sweep's
    control has no log, the other arms are not compared.
    """
    means = {arm.label: results.summary(arm).mean for arm in results.arms}
    usual = results.control
    if usual is None and not results.versus:
        usual = min(means, key=lambda label: np.nan_to_num(means[label], nan=math.inf))
    found = {label: results.versus.get(label, usual) for label in means}
    return {label: other for label, other in found.items() if other not in (None, label)}


def with_losses(results: Results) -> list[Drawn]:
    """Name each arm and its final loss for the legend."""
    drawn = what_to_draw(results)
    names = style.shorten_apart([item.label for item in drawn], MAX_LABEL)

    def label(name: str, arm: SweepArm) -> str:
        run, result = arm.runs[0], results.summary(arm)
        if len(arm.runs) == 1 and not result.n:
            state = "" if run.state in FINISHED else f", {run.state} at step {run.last_step}"
            return f"{name}: {format_loss(run.final_val_loss)}{state}"
        return result_label(name, result, arm.unfinished)

    return [replace(item, label=label(name, item.arm)) for item, name in zip(drawn, names, strict=True)]


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

    One that is the same in all arms, as far as they have come, is drawn once, in grey.
    """
    logged: dict[str, list[Line]] = {}
    common = 0
    for key, name in names.items():
        found = [(item.line_look, line_of(item.arm.runs[0], key, axis)) for item in drawn]
        found = [(look, line) for look, line in found if line]
        if not found:
            continue
        dashes, logged[name] = style.LINES[len(logged)], [line for _, line in found]
        longest = max(logged[name], key=lambda line: len(line.y))
        alike = all(np.array_equal(line.y, longest.y[: len(line.y)]) for line in logged[name])
        if alike and len(found) == len(drawn) > 1:
            common += 1
            found = [({"color": style.GREY}, longest)]
        for look, line in found:
            ax.plot(line.x, line.y, **look, linestyle=dashes, drawstyle="steps-post")
    ax.set_title(f"{title}: all alike" if common == len(logged) else title)
    if len(names) > 1:
        style.line_legend(ax, list(logged), loc="center right")
    if "batch_size" in names:
        label_batch_sizes(ax, np.concatenate([line.y for line in logged["batch size"]]))


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


def figure(results: Results, axis_kind: str, target: tuple[float, str] | None):
    """The losses, below them whatever else has something to show, and one legend."""
    plt = style.load_matplotlib()
    drawn, controls = with_losses(results), controls_of(results)
    axis = Axis(axis_kind, results.runs)
    compared = differences(drawn, controls, axis) if axis_kind != "time" else []
    below = small_panels(drawn, axis)
    fig = plt.figure(figsize=(16, 9.4 if below else 6.5))
    rows = fig.add_gridspec(2 if below else 1, 1, height_ratios=(1.5, 1) if below else (1,))
    top = rows[0].subgridspec(1, 2 if compared else 1)
    panel_loss(fig.add_subplot(top[0], label="loss"), drawn, axis, target)
    if compared:
        others = {controls[item.arm.label] for item, _ in compared}
        ax = fig.add_subplot(top[1], label="differences")
        panel_differences(ax, compared, axis, others.pop() if len(others) == 1 else "its control")
    if below:
        widths = [1.6 if name == "rho" else 1 for name in below]
        bottom = rows[1].subgridspec(1, len(below), width_ratios=widths)
        for place, (name, draw) in zip(bottom, below.items(), strict=True):
            ax = fig.add_subplot(place, label=name)
            axis.fit(ax)
            draw(ax, drawn, axis)
    pooled = any("±" in item.label for item in drawn)
    interval = ", mean ± half its 95% interval" if pooled else ""
    add_legend(fig, drawn, LEGEND_WIDTH, f"final validation loss{interval}")
    return fig


# ------------------------------------------------------------------------------------------------
# The summary in words
# ------------------------------------------------------------------------------------------------


def summary(results: Results, target: float | None) -> str:
    """A table of the runs and, if any were pooled, one of the arms; with a target, when it was met."""
    arms, single, rows = results.arms, separated(results).arms, []
    for arm, name in zip(single, style.shorten_apart([arm.label for arm in single], 70), strict=True):
        (run,) = arm.runs
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
    header += [f"loss {target:g} at step", "in"] if target is not None else []
    text = format_table(header, rows)
    if not any(len(arm.runs) > 1 for arm in arms):
        return text
    arm_rows = []
    for arm, name in zip(arms, style.shorten_apart([arm.label for arm in arms], 70), strict=True):
        arm_rows.append([name, results.summary(arm)])
        if target is not None:
            met = all_met(arm, target)
            arm_rows[-1].append(f"{met[0]}, {style.format_time(met[1])}" if met else "not by all")
    header = ["arm", "final validation loss"]
    header += [f"all runs at loss {target:g}"] if target is not None else []
    return f"{text}\n\n{format_table(header, arm_rows)}"


def why_not_drawn(run: RunLog, axis: str) -> str:
    """Say why a run cannot be drawn on this axis; nothing if it can."""
    if run.last_step < 0:
        return f"{run.path}: no step in this log yet, nothing to draw"
    return "" if has_x(run, axis) else f"{run.path}: no {X_LABELS[axis]} in this log; draw it with --x steps"


def leave_out(results: Results, axis: str) -> list[str]:
    """Take runs that cannot be drawn, and arms that have no other, out of the results; return the reasons."""
    reasons = [reason for run in results.runs if (reason := why_not_drawn(run, axis))]
    if len(reasons) == len(results.runs):
        raise ValueError(reasons[0] if reasons else "none of the planned runs has a log yet")
    for arm in results.arms:
        arm.runs = [run for run in arm.runs if not why_not_drawn(run, axis)]
    results.arms = [arm for arm in results.arms if arm.runs]
    labels = {arm.label for arm in results.arms}
    results.control = results.control if results.control in labels else None
    results.versus = {arm: other for arm, other in results.versus.items() if {arm, other} <= labels}
    return reasons


def default_out(runs: Sequence[RunLog], now: float) -> Path:
    """logs/RUN_ID.png for one run; for several, a name with their number and the time, beside the first."""
    folder = runs[0].path.parent
    if len({run.path for run in runs}) == 1:
        return folder / f"{log_stem(runs[0].path)}.png"
    return folder / f"loss_{len(runs)}runs_{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}.png"


def draw_runs(options: Namespace) -> None:
    paths = options.paths or [newest_log(options.logs)]
    if paths == [None]:
        raise ValueError(f"there is no log in {options.logs}/ yet: train first, or name a log")
    if options.out:
        style.check_suffix(options.out)
    results = read_results(paths, options.logs, None, options.pool_sources, options.stopped_early)
    left_out = leave_out(results, options.x)
    if options.separate:
        results = separated(results)
    target = target_of(results.runs, options.target)
    out = options.out or default_out(results.runs, time.time())
    style.save(figure(results, options.x, target), out)
    print(summary(results, target[0] if target else None))
    for note in [*results.notes, *left_out]:
        # runs of other source code or data are drawn and compared here; only report_sweep.py leaves them out
        print(f"note: {note.replace('is not compared: it has', 'has')}")
    print(f"\n{out}")


def main(arguments: Sequence[str] | None = None) -> int:
    out = "where to write, .png .svg or .pdf (default: logs/RUN_ID.png)"
    parser = command_line.make_sweep_parser(__doc__, out, paths="*")
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
