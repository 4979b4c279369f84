"""Tokens (or steps) and minutes to reach a target loss, measured the same way for all runs.

    from analysis.reaching import choose_target, find_reaches
    target = choose_target(results, given=3.28)
    find_reaches(results, target)
    results.attempts[0].reach.x      # tokens, interpolated; reach is None if it did not reach the target

More frequent validation would make a run seem to reach a loss sooner, so all are compared on a common grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.curves import all_met
from analysis.results import Reach, Results, SweepArm
from analysis.run_log import Curve, RunLog

SPEEDRUN_TARGET = 3.28
SMOOTH = 0.02  # fraction of a run's steps that a training loss is averaged over


@dataclass(frozen=True)
class Target:
    """Loss to reach, and the reason for it."""

    loss: float
    reason: str
    proof: bool = False  # whether the user asked for the speedrun's proof
    on: str = "val"  # or train: the smoothed training loss


def target_of(runs: Sequence[RunLog], given: float | None) -> tuple[float, str] | None:
    """Return a target loss and its source: the one asked for, else the runs' TARGET_LOSS if they agree on it.

    If no log has settings, all are the speedrun's and have its target. None if there is no target.
    """
    if given is not None:
        return given, "--target"
    own = {run.target_loss for run in runs if run.config}
    if len(own) == 1 and None not in own:
        return own.pop(), "the runs' TARGET_LOSS"
    return (SPEEDRUN_TARGET, "the speedrun's") if runs and not own else None


def choose_target(results: Results, given: float | None, on: str = "val") -> Target:
    """Choose the target: the one given, else the runs' own if a run met it, else what the control reached.

    Its loss is NaN while no run has finished.
    """
    if given is not None:
        return Target(given, "as --target asked", True, on)
    done = [attempt for attempt in results.attempts if attempt.outcome == "done"]
    own = target_of(results.runs, None)
    if own and any(attempt.log.first_at(own[0]) for attempt in done):
        return Target(*own, on=on)
    arms = [arm for arm in results.ranked() if arm.count("done")]
    if not arms:
        return Target(math.nan, "none: no run has finished", on=on)
    controls = [arm for arm in arms if arm.label == results.control]
    reference = controls[0] if controls else arms[len(arms) // 2]
    highest = max(attempt.loss for attempt in reference.attempts if attempt.outcome == "done")
    where = " in validation" if on == "train" else ""
    reason = f"what every finished run of {reference.label} reaches{where}"
    return Target(math.ceil(highest * 1000) / 1000, reason, on=on)


def common_grid(positions: Sequence[np.ndarray]) -> np.ndarray:
    """Return points between any two of which every run still going has a validation.

    `positions` are those of each run's validations and strictly increase.
    """
    grid = [max(x[0] for x in positions)]
    end = max(x[-1] for x in positions)
    while grid[-1] < end:
        going_on = [x for x in positions if x[-1] > grid[-1]]
        grid.append(max(x[np.searchsorted(x, grid[-1], side="right")] for x in going_on))
    return np.array(grid)


def find_reaches(results: Results, target: Target) -> None:
    """Set where each finished run reached the target; None if it did not."""
    done, curves = [attempt for attempt in results.attempts if attempt.outcome == "done"], []
    for attempt in done:
        curve = attempt.log.val if target.on == "val" else smoothed(attempt.log.train)
        known = np.isfinite(curve.loss)
        x = (curve.tokens if results.x_unit == "tokens" else curve.step.astype(float))[known]
        if not len(x):
            raise ValueError(f"{attempt.run_id} logs too few training losses for --target-on train")
        fresh = np.concatenate([[True], np.diff(x) > 0])
        curves.append((x[fresh], curve.loss[known][fresh], curve.time_ms[known][fresh]))
    grid = common_grid([x for x, _, _ in curves]) if curves else np.zeros(0)
    for attempt, curve in zip(done, curves, strict=True):
        attempt.reach = reach(*curve, grid, target.loss)


def smoothed(curve: Curve) -> Curve:
    """Average a training curve over a window of SMOOTH of the run's steps, from the first full one on.

    The window counts steps, not lines: a run that logs every 10th step is smoothed over the same span.
    """
    known = np.isfinite(curve.loss)
    step, loss = curve.step[known], curve.loss[known]
    if not len(step):
        return curve
    window = max(1, round(SMOOTH * int(step[-1])))
    sums = np.concatenate([[0.0], np.cumsum(loss)])
    first = np.searchsorted(step, step - window, side="right")
    means = (sums[1:] - sums[first]) / (np.arange(len(step)) + 1 - first)
    whole = step - window >= step[0] - 1
    fields = {name: getattr(curve, name)[known][whole] for name in ("step", "time_ms", "tokens", "acc")}
    return Curve(loss=means[whole], **fields)


def reach(
    x: np.ndarray, loss: np.ndarray, time_ms: np.ndarray, grid: np.ndarray, target: float
) -> Reach | None:
    """Return where a curve, sampled on the grid up to its own end, first meets the target."""
    seen = np.append(grid[(grid >= x[0]) & (grid < x[-1])], x[-1])
    seen_loss = np.interp(seen, x, loss)
    met = np.flatnonzero(seen_loss <= target)
    if not len(met):
        return None
    at, i = seen[met[0]], met[0]
    if i > 0:
        share = (seen_loss[i - 1] - target) / (seen_loss[i - 1] - seen_loss[i])
        at = seen[i - 1] + share * (seen[i] - seen[i - 1])
    return Reach(float(at), float(np.interp(at, x, time_ms)) / 60000)


def all_at_target(arm: SweepArm, target: float) -> int | None:
    """First step by which all runs of an arm have met the target; None if one has not, or failed."""
    if arm.count("done") < len(arm.attempts) or not arm.runs:
        return None
    met = all_met(arm, target)
    return met[0] if met else None
