"""Writes the report of a sweep, or of any logs: REPORT.md, summary.json and pictures, in logs/SWEEP/.

    python report_sweep.py sweeps/residual_scale.toml                # from its manifest and logs in logs/
    python report_sweep.py sweeps/spectral_lr.toml --target 3.28     # with the speedrun's proof
    python report_sweep.py records/logs --target 3.28 --out report   # public logs, and a folder of one's own
    python report_sweep.py sweeps/muon_decay.toml --target-on train  # when the smoothed training loss met it

The table ranks the arms by their mean final loss, with the difference to the control (without one, to the
best arm), its interval, p after Holm's correction, the effect's size, and how many more runs would settle it.
One computed sentence says what may be concluded and what may not. Runs that failed count as runs; runs of
other source code are kept apart unless --pool-sources. Tokens and minutes to a target loss are read on a grid
common to all runs. The same logs give the same report, byte for byte.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import plot_loss
from analysis import style
from analysis.run_log import Curve, RunLog, format_value
from analysis.stats import (
    SPEEDRUN_P,
    SQRT_N_MARGIN,
    Summary,
    TargetTest,
    holm,
    more_runs_needed,
    runs_needed_for_target,
    summarize,
    target_test,
)
from analysis.sweep_results import (
    UPDATE_ONLY,
    Results,
    SweepArm,
    conclusion,
    format_difference,
    format_interval,
    format_p,
    read_results,
    strength,
)

SMOOTH = 0.02  # share of a run's steps that a training loss is averaged over
MAX_COLUMNS = 3  # settings that vary get a column each; of more, the arm's name must do
MAX_LEGEND = 21  # arms that are told apart by their looks
MIN_INTERVAL = 3  # as in the plots: an interval from two runs is wider than the plot
DASHES = [*style.LINES, (0, (5, 1.2, 1, 1.2))]  # one a kind of arm, where colours tell the value
VERDICTS = {"better": ("#0072B2", "v"), "worse": ("#D55E00", "^"), "undecided": (style.GREY, "o")}


# ------------------------------------------------------------------------------------------------
# Tokens and minutes to a target loss
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """Where a run reached the target, interpolated; NaN for what its log does not say. x: tokens or steps."""

    x: float
    minutes: float


@dataclass(frozen=True)
class Target:
    """A loss to reach, and why this one."""

    loss: float
    reason: str
    proof: bool = False  # whether the user asked for the speedrun's proof
    on: str = "val"  # or train: the smoothed training loss


def choose_target(results: Results, given: float | None, on: str = "val") -> Target:
    """The one given, else the runs' TARGET_LOSS if one of them met it, else what the control reaches."""
    if given is not None:
        return Target(given, "as --target asked", True, on)
    own = {run.target_loss for run in results.runs if run.target_loss}
    done = [attempt for attempt in results.attempts if attempt.outcome == "done"]
    if len(own) == 1 and any(attempt.log.first_at(min(own)) for attempt in done):
        return Target(own.pop(), "the runs' TARGET_LOSS", on=on)
    arms = [arm for arm in results.ranked() if arm.count("done")]
    reference = next(
        (arm for arm in arms if arm.label == results.control), arms[len(arms) // 2] if arms else None
    )
    if reference is None:
        return Target(style.SPEEDRUN_TARGET, "the speedrun's", on=on)
    highest = max(attempt.loss for attempt in reference.attempts if attempt.outcome == "done")
    reason = f"what every finished run of {reference.label} reaches{' in validation' * (on == 'train')}"
    return Target(math.ceil(highest * 1000) / 1000, reason, on=on)


def common_grid(positions: Sequence[np.ndarray]) -> np.ndarray:
    """Points between any two of which every run that is still going was validated at least once.

    A run validated more often would otherwise seem to reach a loss sooner. Positions strictly increase.
    """
    grid = [max(x[0] for x in positions)]
    while ahead := [x[np.searchsorted(x, grid[-1], side="right")] for x in positions if x[-1] > grid[-1]]:
        grid.append(max(ahead))
    return np.array(grid)


def in_tokens(results: Results) -> bool:
    """Whether all finished runs log their tokens, so that they can be compared by them."""
    runs = [attempt.log for attempt in results.attempts if attempt.outcome == "done"]
    return bool(runs) and all(np.isfinite(run.val.tokens).all() for run in runs)


def reaches(results: Results, target: Target) -> dict[str, Reach | None]:
    """By run_id of the finished runs, where each reached the target; None if it did not."""
    tokens, curves = in_tokens(results), {}
    for attempt in results.attempts:
        if attempt.outcome == "done":
            curve = attempt.log.val if target.on == "val" else smoothed(attempt.log.train)
            known = np.isfinite(curve.loss)
            x = (curve.tokens if tokens else curve.step.astype(float))[known]
            fresh = np.concatenate([[True], np.diff(x) > 0])[: len(x)]
            curves[attempt.run_id] = x[fresh], curve.loss[known][fresh], curve.time_ms[known][fresh]
    lacking = [run_id for run_id, (x, _, _) in curves.items() if not len(x)]
    if lacking:
        raise ValueError(f"{lacking[0]} logs too few training losses for --target-on train")
    grid = common_grid([x for x, _, _ in curves.values()]) if curves else np.zeros(0)
    return {run_id: reach(*curve, grid, target.loss) for run_id, curve in curves.items()}


def smoothed(curve: Curve) -> Curve:
    """A training curve's mean over the last SMOOTH of the run's steps, from where that many have been seen.

    Steps, not lines: a run that logs every 10th step is smoothed over as long a time as one that logs all.
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
    """Where a curve, seen on the grid up to its own end, first meets the target."""
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
    """First step at which all runs of an arm have met the target; None if one has not, or failed."""
    if arm.count("done") < len(arm.attempts) or not arm.runs:
        return None
    met = plot_loss.all_met(arm, target)
    return met[0] if met else None


# ------------------------------------------------------------------------------------------------
# What is said of each arm
# ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One arm of the report."""

    arm: SweepArm
    result: Summary
    verdict: str  # better, worse or undecided, against the control
    more_runs: int | None
    x_to_target: Summary
    minutes_to_target: Summary
    reached: int
    first_step_all: int | None
    test: TargetTest
    test_p_holm: float = math.nan

    @property
    def ended(self) -> int:
        return self.arm.count("done") + self.arm.count("failed")


def rows_of(results: Results, target: Target) -> list[Row]:
    """Ranked by mean final loss."""
    verdict, where = results.verdict, reaches(results, target)
    rows = []
    for arm in results.ranked():
        losses = arm.samples()[0]
        found = [where.get(attempt.run_id) for attempt in arm.attempts if attempt.outcome == "done"]
        found = [place for place in found if place]
        whole = len(found) == arm.count("done") + arm.count(
            "failed"
        )  # else a mean would be of the lucky ones
        name = arm.label
        kind = "better" if name in verdict.better else "worse" if name in verdict.worse else "undecided"
        if results.count("missing"):
            kind = "undecided"
        rows.append(
            Row(
                arm,
                verdict.summaries.get(name) or summarize(losses),
                kind,
                more_runs(results, name),
                summarize([place.x for place in found] if whole else []),
                summarize([place.minutes for place in found] if whole else []),
                len(found),
                all_at_target(arm, target.loss),
                target_test(losses, target.loss),
            )
        )
    tested = [row for row in rows if not row.arm.foreign]
    for row, p in zip(tested, holm([row.test.p for row in tested]), strict=True):
        row.test_p_holm = p
    return rows


def reference_of(results: Results) -> str | None:
    """What arms are compared with: the control, else the arm of lowest mean."""
    return results.control or results.verdict.best or results.verdict.lowest


def comparison(results: Results, name: str):
    """An arm against the reference, and its corrected p; (None, nan) for the reference and foreign arms."""
    verdict = results.verdict
    pairs, p = (
        (verdict.versus_control, verdict.p_control)
        if results.control
        else (verdict.versus_best, verdict.p_best)
    )
    return pairs.get(name), p.get(name, math.nan)


def compared_with(results: Results) -> str:
    """For headings: the arm that all are compared with, or that each has its own."""
    return "its control" if results.versus else reference_of(results) or "nothing"


def more_runs(results: Results, name: str) -> int | None:
    """How many more runs an arm would settle the difference found, at the strictest of Holm's levels."""
    pair, _ = comparison(results, name)
    alpha = results.verdict.alpha / max(1, results.verdict.num_comparisons)
    return more_runs_needed(pair, alpha) if pair else None


# ------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------


def value_columns(results: Results) -> list[str]:
    """The settings that get a column, in lower case."""
    varied = results.varied()
    return varied if len(varied) <= MAX_COLUMNS else []


def value_cells(arm: SweepArm, names: Sequence[str]) -> list[str]:
    return [format_value(arm.settings[name]) if name in arm.settings else "-" for name in names]


def main_table(results: Results, rows: Sequence[Row]) -> str:
    names, reference = value_columns(results), reference_of(results)
    header = ["arm", *[name.upper() for name in names], "n", "mean", "95% interval", "sd"]
    header += ["control"] * bool(results.versus)
    header += ["difference", "95% interval", "p (Holm)", "effect", "test", "more runs", "remark"]
    cells = []
    for row in rows:
        result, (pair, p) = row.result, comparison(results, row.arm.label)
        line = [row.arm.label, *value_cells(row.arm, names), result.n, style.format_loss(result.mean)]
        line += [format_interval(result.low, result.high, signed=False), style.format_loss(result.sd)]
        if results.versus:
            line.append(results.verdict.controls.get(row.arm.label, "-"))
        if pair is None:
            line += ["-"] * 6
        else:
            tested = not math.isnan(pair.p)
            line += [format_difference(pair.difference), format_interval(pair.low, pair.high), format_p(p)]
            line += [f"{pair.effect_size:+.2f}" if tested else "-", pair.method if tested else "-"]
            line += [more_text(row, tested)]
        cells.append([*line, remark(row, reference, results)])
    return style.format_markdown(header, cells)


def more_text(row: Row, tested: bool) -> str:
    if not tested or row.verdict != "undecided":
        return "-"
    return "> 10000" if row.more_runs is None else str(row.more_runs)


def remark(row: Row, reference: str | None, results: Results) -> str:
    word = "control" if results.control else "lowest mean"
    parts = [word] * (row.arm.label == reference and len(results.arms) > 1)
    parts += [f"**{row.verdict}**"] * (row.verdict != "undecided")
    parts += ["a single run"] * (row.result.n == 1)
    for outcome, text in (("failed", "failed"), ("missing", "not ended")):
        if row.arm.count(outcome):
            parts.append(f"{row.arm.count(outcome)} of {len(row.arm.attempts)} {text}")
    parts += ["not compared"] * bool(row.arm.foreign)
    return ", ".join(parts)


def table_notes(results: Results) -> str:
    reference, verdict = reference_of(results), results.verdict
    what = "Mean and interval are of the last validation loss, in nats a token; n counts seeds."
    if len(verdict.summaries) < 2:
        return what
    what += f" The difference is to {'the control' if results.versus else reference}: negative is better."
    if not verdict.num_comparisons:
        return f"{what} Nothing can be tested: no two arms have two runs each."
    how = (
        f"p is two-sided, after Holm's correction for {verdict.num_comparisons} comparisons"
        f"{'' if results.control else ', all pairs of arms'}: where nothing differs, an arm is called better "
        f"or worse in at most {verdict.alpha:.0%} of such sweeps"
    )
    return (
        f"{what} Its interval is that of each difference by itself; {how}. "
        "Arms with the same seeds are compared in pairs, others by Welch's test. The effect is the "
        "difference in standard deviations, of the pairs' differences or of one run (pooled). More runs: how "
        "many more an arm would find a true difference of this size with 80% chance."
    )


def target_section(results: Results, rows: Sequence[Row], target: Target) -> str:
    unit = "tokens" if in_tokens(results) else "steps"
    header = [
        "arm",
        "runs that reached it",
        f"{unit}_to_target_loss",
        "to control" if results.control else "",
    ]
    header += ["minutes_to_target_loss", "first step at which all had"]
    header = [name for name in header if name]
    by_label, controls = {row.arm.label: row for row in rows}, results.verdict.controls
    cells = []
    for row in rows:
        line = [
            row.arm.label,
            f"{row.reached} of {row.ended}",
            reach_text(row, row.x_to_target, ",.0f", ",.0f"),
        ]
        if results.control:
            control = by_label.get(controls.get(row.arm.label))
            usual = control.x_to_target.mean if control else math.nan
            change = row.x_to_target.mean / usual - 1 if usual else math.nan
            line.append(f"{change:+.1%}" if math.isfinite(change) else "-")
        line += [reach_text(row, row.minutes_to_target, ".4g", ".2g")]
        first = "not all ended" if row.arm.count("missing") else "not reached"
        first = first if row.first_step_all is None else row.first_step_all
        cells.append([*line, "-" if target.on == "train" else first])  # that one is of validations
    where = "validations"
    if target.on == "train":
        where = f"steps (training loss, its mean over the last {SMOOTH:.0%} of all steps)"
    return (
        f"## Reaching {target.loss:g}\n\nThe target is {target.reason}. Losses are read at {where} "
        "common to all runs and interpolated between them, so that a run that was validated more often does "
        "not seem faster. Where not every run reached it, there is no mean. None of this is tested; minutes "
        f"are those of the machine that ran.\n\n{style.format_markdown(header, cells)}"
    )


def reach_text(row: Row, summary: Summary, form: str, half_form: str) -> str:
    if not row.reached:
        return "not reached"
    if not summary.n:
        return f"not reached by {row.ended - row.reached}" if row.reached < row.ended else "-"
    half = (summary.high - summary.low) / 2
    return f"{summary.mean:{form}}" + (f" ± {half:{half_form}}" if summary.n >= MIN_INTERVAL else "")


def proof_section(results: Results, rows: Sequence[Row], target: Target) -> str:
    """The speedrun's proof: one-sided t test, p < 0.01; and the optimization track's rule."""
    header = ["arm", "n", "mean", "sd", f"p (mean < {target.loss:g})", f"p < {SPEEDRUN_P:g}", "p (Holm)"]
    header += ["(target - mean) √n", f">= {SQRT_N_MARGIN:g}", "more runs for p"]
    cells = []
    for row in rows:
        test = row.test
        line = [row.arm.label, test.n, style.format_loss(test.mean), style.format_loss(test.sd)]
        line += [format_p(test.p), "proven" if test.proven else "no", format_p(row.test_p_holm)]
        line += [
            f"{test.score:.4f}" if math.isfinite(test.score) else "-",
            "yes" if test.sqrt_n_rule else "no",
        ]
        needed = runs_needed_for_target(test.mean, test.sd, target.loss)
        more = "-" if needed is None or test.failed else max(0, needed - test.n)
        cells.append([*line, more])
    proven = [row.arm.label for row in rows if row.test.proven]
    sentence = (
        f"Proven to be below {target.loss:g} (one-sided t test, p < {SPEEDRUN_P:g}): {', '.join(proven)}."
        if proven
        else f"No arm is proven to be below {target.loss:g} (one-sided t test, p < {SPEEDRUN_P:g})."
    )
    if results.count("missing"):
        sentence += f" {results.count('missing')} runs have not ended: the proof is of those that have."
    return (
        f"## Proof against {target.loss:g}\n\n{sentence} A run that failed fails its arm's proof. Each arm "
        "is tested by itself; where an arm is picked out of several, p (Holm) counts. The rule of √n assumes "
        f"a standard deviation of 0.0013 between runs.\n\n{style.format_markdown(header, cells)}"
    )


def update_section(results: Results) -> str:
    """What MUON_DECAY_MODE=update is."""
    arms = [arm for arm in results.arms if arm.settings.get("muon_decay_mode") in ("update", "both")]
    if not any(arm.settings["muon_decay_mode"] == "update" for arm in arms):
        return ""
    cells = []
    for arm in arms:
        mode, wd = arm.settings["muon_decay_mode"], float(arm.settings.get("muon_weight_decay", 0))
        decay = wd / (1 + wd) if mode == "both" and wd != -1 else 0.0
        cells.append([arm.label, mode, f"{wd:g}", f"{1 + wd:g}", f"{decay:.4g}" if decay else "none"])
    header = ["arm", "mode", "wd", "learning rate x", "decay of W beside it"]
    return (
        f"## What `update` is\n\n{UPDATE_ONLY}: with D = wd O, the step W -= lr (O + D) is W -= lr (1 + wd) "
        "O. A win there is a win of the learning rate. `both` is that rate with a decay of wd / (1 + wd).\n\n"
        + style.format_markdown(header, cells)
    )


def audit_section(results: Results) -> str:
    """What was planned, what is done, what failed, what is missing."""
    states = Counter(attempt.state for attempt in results.attempts)
    planned = "planned" if results.planned else "found"
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    total = f"{planned.capitalize()}: {len(results.attempts)}; {counts}."
    parts = [f"## Runs: {planned} and done\n\n{total}"]
    header = ["arm", planned, "finished", "failed", "not ended", "seeds finished", "source"]
    cells = []
    for arm in results.arms:
        seeds = sorted(
            {str(a.seed) for a in arm.attempts if a.outcome == "done" and a.seed is not None}, key=_by_size
        )
        row = [arm.label, len(arm.attempts), arm.count("done"), arm.count("failed"), arm.count("missing")]
        cells.append(
            [*row, " ".join(seeds) or "-", f"{arm.script or 'unknown'} {arm.source[:8] or 'unknown'}"]
        )
    parts.append(style.format_markdown(header, cells))
    for title, outcome in (("Failed", "failed"), ("Not ended", "missing")):
        lines = [attempt_line(arm, a) for arm in results.arms for a in arm.attempts if a.outcome == outcome]
        if lines:
            parts.append(f"{title} ({len(lines)}):\n\n" + "\n".join(lines))
    if results.earlier:
        lines = [f"* {a.run_id}: {a.state}{f' - {a.reason}' if a.reason else ''}" for a in results.earlier]
        parts.append(
            f"Earlier attempts that are no longer in the plan, and not counted ({len(lines)}):\n\n"
            + "\n".join(lines)
        )
    if results.notes:
        parts.append("To be known:\n\n" + "\n".join(f"* {note}" for note in results.notes))
    return "\n\n".join(parts)


def _by_size(text: str) -> tuple[int, str]:
    return len(text), text


def attempt_line(arm: SweepArm, attempt) -> str:
    at = f" at step {attempt.log.last_step}" if attempt.log and attempt.log.last_step >= 0 else ""
    why = f" - {attempt.reason}" if attempt.reason else ""
    return f"* {arm.label}, seed {attempt.seed}: {attempt.state}{at}{why} (`{attempt.run_id}`)"


def report(results: Results, rows: Sequence[Row], target: Target, pictures: Sequence[str]) -> str:
    scale = f" at scale `{results.scale}`" if results.scale else ""
    parts = [f"# {results.name}{scale}"]
    parts += [f"> {results.question}"] if results.question else []
    parts += [f"**{conclusion(results)}**", "## Final validation loss", main_table(results, rows)]
    parts += [table_notes(results)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    parts += [proof_section(results, rows, target)] if target.proof else []
    parts += [target_section(results, rows, target), update_section(results), audit_section(results)]
    if results.planned:
        parts.append(f"Written by `python report_sweep.py sweeps/{results.name}.toml`.")
    return "\n\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------
# summary.json
# ------------------------------------------------------------------------------------------------


def summary(results: Results, rows: Sequence[Row], target: Target) -> dict:
    """All numbers of the report, unrounded; null where there is none."""
    verdict, where = results.verdict, reaches(results, target)
    return {
        "sweep": results.name,
        "scale": results.scale,
        "question": results.question,
        "conclusion": conclusion(results),
        "control": results.control,
        **({"versus": results.versus} if results.versus else {}),
        "reference": reference_of(results),
        "better": list(verdict.better) if not results.count("missing") else [],
        "worse": list(verdict.worse) if not results.count("missing") else [],
        "alpha": verdict.alpha,
        "num_comparisons": verdict.num_comparisons,
        "target": {
            "loss": target.loss,
            "reason": target.reason,
            "x": "tokens" if in_tokens(results) else "steps",
            **({"on": f"training loss, mean over {SMOOTH:.0%} of the steps"} if target.on == "train" else {}),
        },
        "runs_planned": len(results.attempts) if results.planned else None,
        "runs": {outcome: results.count(outcome) for outcome in ("done", "failed", "missing")},
        "notes": results.notes,
        "arms": [arm_summary(results, row, target) for row in rows],
        "all_runs": [
            run_summary(arm, a, where.get(a.run_id), results) for arm in results.arms for a in arm.attempts
        ],
    }


def arm_summary(results: Results, row: Row, target: Target) -> dict:
    arm, (pair, p) = row.arm, comparison(results, row.arm.label)
    difference = {**asdict(pair), "p_holm": p, "more_runs": row.more_runs} if pair else None
    x = "tokens" if in_tokens(results) else "steps"
    out = {
        "arm": arm.label,
        "script": arm.script,
        "source_hash": arm.source,
        "values": {name: arm.settings[name] for name in results.varied() if name in arm.settings},
        "not_compared": arm.foreign or None,
        "runs": {outcome: arm.count(outcome) for outcome in ("done", "failed", "missing")},
        "final_val_loss": asdict(row.result),
        "difference": difference,
        f"{x}_to_target_loss": reach_summary(row, row.x_to_target),
        "minutes_to_target_loss": reach_summary(row, row.minutes_to_target),
        "first_step_all_runs_at_target": row.first_step_all,
    }
    if target.proof:
        test = row.test
        out["target_test"] = {
            **asdict(test),
            "proven": test.proven,
            "sqrt_n_rule": test.sqrt_n_rule,
            "p_holm": row.test_p_holm,
        }
    return out


def reach_summary(row: Row, found: Summary) -> dict:
    return {"reached": row.reached, "of": row.ended, "mean": found.mean, "low": found.low, "high": found.high}


def run_summary(arm: SweepArm, attempt, place: Reach | None, results: Results) -> dict:
    x = "tokens" if in_tokens(results) else "steps"
    return {
        "run_id": attempt.run_id,
        "arm": arm.label,
        "seed": attempt.seed,
        "state": attempt.state,
        "reason": attempt.reason,
        "final_val_loss": attempt.loss,
        f"{x}_to_target_loss": place.x if place else None,
        "minutes_to_target_loss": place.minutes if place else None,
    }


def without_nan(value: object) -> object:
    """NaN and infinities are no JSON: null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def by_value(results: Results) -> str | None:
    """The numeric setting that varies most, by which arms are ordered and coloured; None if there is none.

    Of settings tied to each other the one that `results.by` names or, if it names none, the last by name.
    """
    if results.by:
        return results.by
    counts = {}
    for name in results.varied():
        values = {
            repr(arm.settings[name]): arm.settings[name] for arm in results.arms if name in arm.settings
        }
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values.values()):
            counts[name] = len(values)
    best = max(counts, key=lambda name: (counts[name], name), default=None)
    if best is None or counts[best] < 3 or len(kinds_of(results, best)) > len(DASHES):
        return None
    return best


def kinds_of(results: Results, name: str) -> dict[str, str]:
    """What arms share beside that setting's value, as key -> words: arms of one kind have one line style."""
    others = beside(results, name)
    found = {}
    for arm in results.arms:
        if name in arm.settings:
            words = " ".join(f"{o}={format_value(arm.settings[o])}" for o in others if o in arm.settings)
            found.setdefault(kind_of(arm, others), words)
    return found


def beside(results: Results, name: str) -> list[str]:
    """What varies beside that setting and is not tied to it."""
    return [other for other in results.varied() if other not in (name, *results.tied(name))]


def kind_of(arm: SweepArm, names: Sequence[str]) -> str:
    return repr([arm.settings.get(name) for name in names])


def ordered(results: Results) -> list[SweepArm]:
    """By value, if there is one; as planned, otherwise and where values are equal."""
    name = by_value(results)
    return sorted(results.arms, key=lambda arm: arm.settings.get(name, -math.inf) if name else 0)


def picture_of_bars(results: Results, rows: Sequence[Row]):
    """Means with intervals, and differences to the control with theirs; one line an arm."""
    plt = style.load_matplotlib()
    by_label = {row.arm.label: row for row in rows}
    lines = [by_label[arm.label] for arm in ordered(results) if by_label[arm.label].result.n]
    height = 1.5 + 0.28 * max(4, len(lines))
    compared = len(results.verdict.summaries) > 1
    fig, panels = plt.subplots(1, 1 + compared, figsize=(13, height), sharey=True, squeeze=False)
    left = panels[0, 0]
    draw_means(left, lines)
    if compared:
        draw_differences(panels[0, 1], results, lines)
    names = [style.shorten(row.arm.label, 44) for row in lines]
    left.set_yticks(range(len(lines)), names, fontsize=9 if len(lines) < 40 else 7)
    left.set_ylim(len(lines) - 0.4, -0.6)
    small = {row.result.n for row in lines if row.result.n < MIN_INTERVAL}
    if small:
        text = "no interval is drawn for fewer than 3 seeds; hollow: a single run"
        fig.text(0.995, 0.01, text, ha="right", fontsize=8, color=style.GREY)
    fig.tight_layout(rect=(0, 0.3 / height if small else 0, 1, 1))
    return fig


def draw_means(ax, lines: Sequence[Row]) -> None:
    ends = [(row.result.mean, *interval_or(row.result, row.arm.samples()[0])) for row in lines]
    limits = style.bulk_limits(*zip(*ends, strict=True)) if ends else (0, 1)
    ax.set_xlim(*limits)
    for y, row in enumerate(lines):
        losses = [loss for loss in row.arm.samples()[0] if math.isfinite(loss)]
        mark_line(ax, y, row.result.mean, row.result.low, row.result.high, row, limits, losses)
    ax.set_title("final validation loss: mean, 95% interval, runs")
    ax.set_xlabel("nats a token")
    ax.locator_params(axis="x", nbins=6)


def interval_or(result: Summary, losses: Sequence[float]) -> tuple[float, float]:
    """The interval, or the range of the runs if there are too few for one; runs beyond it are in sight."""
    known = [loss for loss in losses if math.isfinite(loss)]
    known += [result.low, result.high] if result.n >= MIN_INTERVAL else []
    return min(known), max(known)


def draw_differences(ax, results: Results, lines: Sequence[Row]) -> None:
    reference = reference_of(results)
    found = [(row, comparison(results, row.arm.label)[0]) for row in lines]
    found = [(y, row, pair) for y, (row, pair) in enumerate(found) if pair and math.isfinite(pair.difference)]
    ends = [(p.difference, *(drawn_interval(p) or (p.difference, p.difference))) for _, _, p in found]
    limits = style.bulk_limits(*zip(*[(0.0, 0.0, 0.0), *ends], strict=True))
    reach_out = max(map(abs, limits))
    limits = (max(limits[0], -reach_out), limits[1]) if found else (-1, 1)
    ax.set_xlim(*limits)
    ax.axvline(0, color="black", linewidth=1)
    for y, row, pair in found:
        low, high = drawn_interval(pair) or (math.nan, math.nan)
        mark_line(ax, y, pair.difference, low, high, row, limits, [], signed=True)
    for y, row in enumerate(lines):
        if row.arm.label == reference:
            word = "control" if results.control else "lowest mean"
            ax.annotate(word, (0, y), (4, 0), textcoords="offset points", fontsize=8, va="center")
    ax.set_title(f"difference to {style.shorten(compared_with(results), 40)}, 95% interval")
    ax.set_xlabel("nats a token; to the left is better")
    ax.locator_params(axis="x", nbins=6)
    kinds = [kind for kind in VERDICTS if any(row.verdict == kind for _, row, _ in found)]
    handles = [
        ax.plot([], [], marker=VERDICTS[kind][1], color=VERDICTS[kind][0], linestyle="none", label=kind)[0]
        for kind in kinds
    ]
    if handles:
        ax.figure.legend(handles=handles, loc="lower left", fontsize=8, ncols=3)


def drawn_interval(pair) -> tuple[float, float] | None:
    enough = min(pair.n_arm, pair.n_control) >= MIN_INTERVAL and math.isfinite(pair.low)
    return (pair.low, pair.high) if enough else None


def mark_line(ax, y, mean, low, high, row: Row, limits, dots, signed: bool = False) -> None:
    """One arm: a mark, its interval and its runs; beyond the range, an arrow with the value."""
    colour, marker = VERDICTS[row.verdict]
    if mean > limits[1]:
        text = f"{mean:+.4f} →" if signed else f"{mean:.4f} →"
        ax.annotate(
            text,
            (limits[1], y),
            (-3, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            color=colour,
        )
        return
    if row.result.n >= MIN_INTERVAL and math.isfinite(low):
        ax.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    ax.plot(dots, [y] * len(dots), "|", color=colour, markersize=7, alpha=0.8)
    face = {"markerfacecolor": "white"} if row.result.n == 1 else {}
    ax.plot([mean], [y], marker, color=colour, markersize=6.5, zorder=3, **face)


def picture_of_curves(results: Results, target: float):
    """All validation losses, coloured by the value that varies."""
    plt = style.load_matplotlib()
    arms = [arm for arm in ordered(results) if any(run.last_step >= 0 for run in arm.runs)]
    runs = [run for arm in arms for run in arm.runs]
    looks, values = looks_of(results, arms)
    axis = plot_loss.Axis("tokens" if all(map(has_tokens, runs)) else "steps", runs)
    brief, letters = briefly(results, arms)
    handles = legend_of(results, arms, looks, letters)
    columns = max(1, min(len(handles), 150 // (max([len(h.get_label()) for h in handles], default=0) + 10)))
    legend_inches = 0.3 + 0.2 * math.ceil(len(handles) / columns) if handles else 0
    height = 7 + legend_inches
    fig, ax = plt.subplots(figsize=(13, height))
    plot_loss.panel_loss(ax, brief, looks, axis, target)
    ax.set_xlabel(axis.label)
    if values:
        add_colour_bar(fig, ax, by_value(results), values)
    if handles:
        fig.legend(handles=handles, loc="lower center", ncols=columns, fontsize=9, handlelength=3.2)
    fig.tight_layout(rect=(0, legend_inches / height, 1, 1))
    return fig


def briefly(results: Results, arms: Sequence[SweepArm]) -> tuple[list[SweepArm], list[str]]:
    """The arms with names that fit beside a line; where they do not, letters to be put before their names."""
    name = by_value(results)
    if name and not beside(results, name):
        names = [format_value(arm.settings[name]) if name in arm.settings else arm.label for arm in arms]
    else:
        names = [arm.label for arm in arms]
    names = [style.shorten(text, plot_loss.MAX_NAME) for text in names]
    unique = len(set(names)) == len(names)
    brief = (
        [replace(arm, label=text) for arm, text in zip(arms, names, strict=True)] if unique else list(arms)
    )
    shown = 1 < len(arms) <= plot_loss.MAX_MARKED
    lettered = shown and plot_loss.short_names(brief)[0] == plot_loss.letter(0)
    return brief, [f"{plot_loss.letter(i)}  " if lettered else "" for i in range(len(arms))]


def legend_of(
    results: Results, arms: Sequence[SweepArm], looks: Sequence[dict], letters: Sequence[str]
) -> list:
    """Handles of what colours do not say: all arms; the kinds; or only the arms that have no value."""
    from matplotlib.lines import Line2D

    name = by_value(results)
    shown = [
        (f"{before}{style.shorten(arm.label, 44)}", {**look, "markersize": 5})
        for arm, look, before in zip(arms, looks, letters, strict=True)
        if name is None or len(arms) <= MAX_LEGEND or name not in arm.settings
    ]
    if name and not beside(results, name) and not any(letters):
        lacking = {style.shorten(arm.label, 44) for arm in arms if name not in arm.settings}
        shown = [(label, look) for label, look in shown if label in lacking]
    elif name and len(arms) > MAX_LEGEND:
        for line, words in zip(DASHES, kinds_of(results, name).values(), strict=False):
            shown.append((words, {"color": style.GREY, "linestyle": line}))
    return [Line2D([], [], label=label, **look) for label, look in shown]


def has_tokens(run: RunLog) -> bool:
    column = run.columns.get("tokens")
    return column is not None and bool(np.isfinite(column.value).any())


def looks_of(results: Results, arms: Sequence[SweepArm]) -> tuple[list[dict], list[float]]:
    """A look for each arm, and the values by which they are coloured, in order; none if none varies."""
    name = by_value(results)
    looks = [style.arm_style(number) for number in range(len(arms))]
    if name is None:
        return looks, []
    values = sorted({float(arm.settings[name]) for arm in arms if name in arm.settings})
    others, kinds = beside(results, name), list(kinds_of(results, name))
    for arm, look in zip(arms, looks, strict=True):
        look.update(color=style.GREY, linestyle=style.LINES[1])
        if name in arm.settings:
            look["color"] = colour_map()(values.index(float(arm.settings[name])) / max(1, len(values) - 1))
            look["linestyle"] = DASHES[kinds.index(kind_of(arm, others))]
    return looks, values


def colour_map():
    """Ordered in lightness, told apart by the colour-blind, never as light as the paper."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))


def add_colour_bar(fig, ax, name: str, values: Sequence[float]) -> None:
    """One step of colour a value; the values are written as far as they fit."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    steps = ListedColormap([colour_map()(i / max(1, len(values) - 1)) for i in range(len(values))])
    norm = BoundaryNorm(np.arange(len(values) + 1) - 0.5, len(values))
    bar = fig.colorbar(ScalarMappable(norm, steps), ax=ax, fraction=0.025, pad=0.03)
    shown = range(0, len(values), math.ceil(len(values) / 24))
    bar.set_ticks(list(shown), labels=[format_value(values[i]) for i in shown])
    bar.ax.minorticks_off()
    bar.set_label(name.upper())


def save_pictures(results: Results, rows: Sequence[Row], target: float, folder: Path) -> list[str]:
    """Draws what there is to draw; the names of the files."""
    names = []
    if any(row.result.n for row in rows):
        style.save(picture_of_bars(results, rows), folder / "bars.png")
        names.append("bars.png")
    if any(run.last_step >= 0 for run in results.runs):
        style.save(picture_of_curves(results, target), folder / "curves.png")
        names.append("curves.png")
        if len({strength(arm) for arm in results.arms} - {None}) > 1:
            from plot_spectral_sweep import figure

            style.save(figure(results, target), folder / "spectral.png")
            names.append("spectral.png")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="SWEEP.toml|LOG", help="a sweep, or logs")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of logs and manifests")
    parser.add_argument("--target", type=float, help="target loss; adds the speedrun's proof")
    on = {"choices": ("val", "train"), "default": "val"}
    parser.add_argument("--target-on", **on, help="reached in validation, or in the smoothed training loss")
    parser.add_argument("--control", help="the arm to compare with (default: the sweep's)")
    parser.add_argument("--pool-sources", action="store_true", help="pool runs of different source code")
    parser.add_argument("--out", type=Path, help="folder to write to (default: logs/SWEEP/)")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.paths, options.logs, options.control, options.pool_sources)
        target = choose_target(results, options.target, options.target_on)
        rows = rows_of(results, target)
        folder = options.out or results.folder / results.name
        pictures = save_pictures(results, rows, target.loss, folder)
        style.write_text(report(results, rows, target, pictures), folder / "REPORT.md")
        numbers = json.dumps(without_nan(summary(results, rows, target)), indent=1, ensure_ascii=False)
        style.write_text(numbers + "\n", folder / "summary.json")
    except (ValueError, OSError) as error:
        return style.complain(error)
    print(f"{conclusion(results)}\n\n{folder / 'REPORT.md'}\n{folder / 'summary.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
