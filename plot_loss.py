"""Draw the curves of one or more runs and print a summary of each.

    python plot_loss.py                               # the newest log in logs/
    python plot_loss.py logs/a.txt logs/b.txt         # compared
    python plot_loss.py logs --x time --out all.svg   # every log in a folder, against training time

Six panels: validation loss with its end enlarged, training time, learning rate, betas, batch size, and rho,
the signed radial part of the gradient. Runs that differ only in their seed are drawn as a mean with its 95%
interval (from three runs on; of two, both are drawn); --separate draws each run for itself. The target is the
runs' own TARGET_LOSS, else 3.28; a star marks the first validation at which all runs of an arm have met it.
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
    add_legend,
    all_met,
    curve_of,
    name_ends,
    panel_loss,
    panel_rho,
    plan_legend,
    result_label,
    runs_of,
    x_of,
)
from analysis.run_log import RunLog, newest_log, read_runs
from analysis.stats import summarize
from analysis.tables import format_loss, format_number, format_table

SCHEDULES = (
    ("learning rate, times its base", {"lr_mul": "lr"}),
    ("betas and momentum", {"beta1": "beta1", "beta2": "beta2", "muon_momentum": "Muon momentum"}),
    ("batch size, tokens", {"batch_size": "batch size"}),
)
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
    """Training time over steps or tokens; steps over training time, if that is the x axis."""
    runs = [(item.line_look, run) for item in drawn for run in item.arm.runs]
    if axis.kind == "time":
        ax.set_title("steps done")
        for look, run in runs:
            step, x, _ = curve_of(run, "train_time", "time")
            ax.plot(x / axis.scale, step, **look)
        return
    longest = max((run.last_time_ms for _, run in runs if math.isfinite(run.last_time_ms)), default=None)
    if longest is None:
        style.say_nothing_logged(ax, "training time")
        return
    scale, unit = style.time_unit(longest)
    ax.set_title(f"training time, {unit}")
    for look, run in runs:
        _, x, y = curve_of(run, "train_time", axis.kind)
        ax.plot(x / axis.scale, y / scale, **{**look, "linewidth": 1.2})


def panel_schedule(ax, drawn: Sequence[Drawn], axis: Axis, title: str, keys: dict[str, str]) -> None:
    """Scheduled quantities by key; drawn once, in grey, where they are the same in all arms."""
    ax.set_title(title)
    logged, all_same = {}, True
    for key, name in keys.items():
        curves = [curve_of(item.arm.runs[0], key, axis.kind) for item in drawn]
        known = [y for step, _, y in curves if len(step)]
        if not known:
            continue
        dashes = style.LINES[len(logged)]
        logged[name] = known
        same = len(drawn) > 1 and len(known) == len(drawn) and agree(curves)
        all_same = all_same and same
        for item, (_, x, y) in zip(drawn[:1] if same else drawn, curves, strict=False):
            look = {**item.line_look, "drawstyle": "steps-post"}
            if same:
                look["color"] = "#444444"
            if same or len(keys) > 1:
                look["linestyle"] = dashes
            if len(y):
                ax.plot(x / axis.scale, y, **look)
    if not logged:
        style.say_nothing_logged(ax, title)
        return
    if all_same:
        ax.set_title("the same in all", loc="right", fontsize=9, fontweight="normal", color=style.GREY)
    if len(keys) > 1:
        style.line_legend(ax, list(logged), loc="center right")
    if "batch_size" in keys:
        label_batch_sizes(ax, np.concatenate(logged["batch size"]))


def agree(curves: Sequence[tuple]) -> bool:
    """True if curves agree at the steps they have in common (runs may be logged more or less often)."""
    step, _, y = curves[0]
    for other_step, _, other in curves[1:]:
        _, here, there = np.intersect1d(step, other_step, return_indices=True)
        if len(here) < min(len(step), len(other_step)) / 2 or not np.array_equal(y[here], other[there]):
            return False
    return True


def label_batch_sizes(ax, values: np.ndarray) -> None:
    """Start the axis at zero and put a tick at each size, in multiples of 1024 where that is short."""
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
    fig, axes = plt.subplots(2, 3, figsize=(16, height), width_ratios=(1.7, 1, 1), height_ratios=(1.35, 1))
    panel_loss(axes[0, 0], drawn, axis, target)
    panel_time(axes[0, 1], drawn, axis)
    for place, (title, keys) in zip([axes[0, 2], axes[1, 1], axes[1, 2]], SCHEDULES, strict=True):
        panel_schedule(place, drawn, axis, title, keys)
    panel_rho(axes[1, 0], drawn, axis, RHO_TITLE, {"spec_attn": "attention", "spec_mlp": "MLP"})
    for ax in axes.flat:
        ax.set_xlabel(axis.label)
        ax.set_xlim(-0.01 * axis.end, 1.01 * axis.end)
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
        try:
            if run.last_step < 0:
                raise ValueError(f"{run.path}: no step in this log yet, nothing to draw")
            x_of(run, np.zeros(1), axis)
            drawn.append(run)
        except ValueError as reason:
            left_out.append(str(reason))
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
