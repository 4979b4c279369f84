"""Write the report of a sweep, or of any logs: REPORT.md, summary.json and pictures, in logs/SWEEP/.

    python report_sweep.py sweeps/residual_scale.toml                # from its manifest and logs in logs/
    python report_sweep.py sweeps/spectral_lr.toml --target 3.28     # with the speedrun's proof
    python report_sweep.py records/logs --target 3.28 --out report   # public logs, and a folder of one's own
    python report_sweep.py sweeps/muon_decay.toml --target-on train  # when the smoothed training loss met it

The table ranks the arms by their mean final loss, with the difference to the control (without one, to the
best arm), its interval, p corrected for the number of arms (by Holm's method; without a control, by Tukey's),
the effect's size, and how many more runs would settle it. The lines above it say what may be concluded and
what may not. Runs that failed count as runs; runs of other source code are kept apart unless --pool-sources.
Tokens and minutes to a target loss are read on a grid common to all runs. The same logs give the same report,
byte for byte.
"""

import math
import shlex
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line, style
from analysis.conclusion import conclusion
from analysis.files import write_atomically
from analysis.reaching import SMOOTH, Target, all_at_target, choose_target, find_reaches
from analysis.read_results import read_results
from analysis.results import Attempt, Results, SweepArm
from analysis.run_log import format_value
from analysis.stats import (
    ALPHA,
    MAX_RUNS,
    SPEEDRUN_P,
    SQRT_N_MARGIN,
    Summary,
    TargetTest,
    holm,
    runs_needed_for_target,
    summarize,
    target_test,
)
from analysis.sweep_pictures import picture_of_curves, picture_of_forest
from analysis.tables import (
    as_json,
    format_count,
    format_difference,
    format_interval,
    format_loss,
    format_markdown,
    format_number,
    format_p,
)

MAX_COLUMNS = 3  # settings that vary get a column each; of more, the arm's name must do


# ------------------------------------------------------------------------------------------------
# Rows: one an arm
# ------------------------------------------------------------------------------------------------


@dataclass
class ArmRow:
    """One arm of the report."""

    arm: SweepArm
    result: Summary
    verdict: str  # better, worse or undecided, against the control; without one, the best arm
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


def rows_of(results: Results, target: Target) -> list[ArmRow]:
    """A row for each arm, ranked by mean final loss."""
    find_reaches(results, target)
    rows = []
    for arm in results.ranked():
        reached = sum(attempt.reach is not None for attempt in arm.attempts)
        ended = arm.count("done") + arm.count("failed")
        whole = reached == ended  # a mean of those that reached it would be that of the lucky ones
        pair = results.comparison(arm.label)
        row = ArmRow(
            arm=arm,
            result=results.summary(arm),
            verdict=results.call(arm.label),
            more_runs=results.verdict.more_runs(pair) if pair else None,
            x_to_target=summarize(arm.samples(lambda a: a.reach.x)[0] if whole else []),
            minutes_to_target=summarize(arm.samples(lambda a: a.reach.minutes)[0] if whole else []),
            reached=reached,
            first_step_all=all_at_target(arm, target.loss),
            test=target_test(arm.samples()[0], target.loss),
        )
        rows.append(row)
    tested = [row for row in rows if not row.arm.foreign]
    for row, p in zip(tested, holm([row.test.p for row in tested]), strict=True):
        row.test_p_holm = p
    return rows


# ------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------


def main_table(results: Results, rows: Sequence[ArmRow]) -> str:
    varied = results.varied()
    names = varied if len(varied) <= MAX_COLUMNS else []
    header = ["arm", *[name.upper() for name in names], "n", "mean", "95% interval", "sd"]
    if results.versus:
        header.append("control")
    p_name = "p (Holm)" if results.control else "p (Tukey)"
    header += ["difference", "95% interval", p_name, "effect", "test", "more runs", "remark"]
    cells = []
    for row in rows:
        result, pair = row.result, results.comparison(row.arm.label)
        values = [format_value(row.arm.settings.get(name, "-")) for name in names]
        line = [row.arm.label, *values, result.n, format_loss(result.mean)]
        line += [format_interval(result.low, result.high, signed=False), format_loss(result.sd)]
        if results.versus:
            line.append(results.verdict.controls.get(row.arm.label, "-"))
        if pair is None:
            line += ["-"] * 6
        else:
            tested = not math.isnan(pair.p)
            line += [format_difference(pair.difference), format_interval(pair.low, pair.high)]
            line.append(format_p(pair.p_corrected))
            line += [f"{pair.effect_size:+.2f}" if tested else "-", pair.method if tested else "-"]
            more = f"> {MAX_RUNS}" if row.more_runs is None else str(row.more_runs)
            line.append(more if tested and row.verdict == "undecided" else "-")
        cells.append([*line, remark(row, results)])
    return format_markdown(header, cells)


def remark(row: ArmRow, results: Results) -> str:
    parts = []
    if row.arm.label == results.reference and len(results.arms) > 1:
        parts.append("control" if results.control else "lowest mean")
    if row.verdict != "undecided":
        parts.append(f"**{row.verdict}**")
    return ", ".join([*parts, *results.remarks(row.arm)])


def table_notes(results: Results) -> str:
    verdict = results.verdict
    unit = style.loss_unit(results.runs)
    what = f"Mean and interval are of the last validation loss, in {unit}; n counts seeds."
    if len(verdict.summaries) < 2 or results.reference is None:
        return what
    what += (
        f" The difference is to {'the control' if results.versus else results.reference}: negative is better."
    )
    if not verdict.num_comparisons:
        several = sum(summary.n > 1 for summary in verdict.summaries.values()) > 1
        why = "the arms to compare have single runs, failed runs or no spread"
        return f"{what} Nothing can be tested: {why if several else 'no two arms have two runs each'}."
    ending = (
        f"where nothing differs, an arm is called better or worse in at most {ALPHA:.0%} of such "
        "sweeps. {} More runs: how many more an arm would find a true difference of this size with 80% "
        "chance."
    )
    if results.control:
        effect = (
            "Arms with the same seeds are compared in pairs, others by Welch's test. The effect is the "
            "difference in standard deviations, of the pairs' differences or of one run (pooled)."
        )
        return (
            f"{what} Its interval is that of each difference by itself; p is two-sided, after Holm's "
            f"correction for {format_count(verdict.num_comparisons, 'comparison')}: {ending.format(effect)}"
        )
    ties = verdict.ties
    noise = (
        f"The noise, an sd of {ties.sd:.4f} between runs{', of one seed' if ties.paired else ''}, is that of "
        "the better half of the arms; an arm whose own runs vary more keeps its own. The effect is the "
        "difference in such standard deviations."
    )
    return (
        f"{what} Its interval and p are Tukey's, for all pairs of {len(ties.means)} arms at once: "
        f"{ending.format(noise)}"
    )


def target_section(results: Results, rows: Sequence[ArmRow], target: Target) -> str:
    header = ["arm", "runs that reached it", f"{results.x_unit}_to_target_loss"]
    if results.control:
        header.append("to control")
    header += ["minutes_to_target_loss", "first step at which all had"]
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
            line.append(format_number(change, "+.1%"))
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
        f"are those of the machine that ran.\n\n{format_markdown(header, cells)}"
    )


def reach_text(row: ArmRow, summary: Summary, form: str, half_form: str) -> str:
    if not row.reached:
        return "not reached"
    if not summary.n:
        return f"not reached by {row.ended - row.reached}" if row.reached < row.ended else "-"
    half = (summary.high - summary.low) / 2
    return f"{summary.mean:{form}}" + (f" ± {half:{half_form}}" if summary.n >= style.MIN_INTERVAL else "")


def proof_section(results: Results, rows: Sequence[ArmRow], target: Target) -> str:
    """The speedrun's proof: one-sided t test, p < 0.01; and the optimization track's rule."""
    header = ["arm", "n", "mean", "sd", f"p (mean < {target.loss:g})", f"p < {SPEEDRUN_P:g}", "p (Holm)"]
    header += ["(target - mean) √n", f">= {SQRT_N_MARGIN:g}", "more runs for p"]
    cells = []
    for row in rows:
        test = row.test
        line = [row.arm.label, test.n, format_loss(test.mean), format_loss(test.sd)]
        line += [format_p(test.p), "proven" if test.proven else "no", format_p(row.test_p_holm)]
        line += [format_loss(test.score), "yes" if test.sqrt_n_rule else "no"]
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
        f"a standard deviation of 0.0013 between runs.\n\n{format_markdown(header, cells)}"
    )


def audit_section(results: Results) -> str:
    """The runs that were planned, and those that finished, failed or are missing."""
    states = Counter(attempt.state for attempt in results.attempts)
    planned = "planned" if results.planned else "found"
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    total = f"{planned.capitalize()}: {len(results.attempts)}; {counts}."
    parts = [f"## Runs: {planned} and done\n\n{total}"]
    header = ["arm", planned, "finished", "failed", "not ended", "seeds finished", "source"]
    cells = []
    for arm in results.arms:
        seeds = sorted({a.seed for a in arm.attempts if a.outcome == "done" and a.seed is not None})
        row = [arm.label, len(arm.attempts), arm.count("done"), arm.count("failed"), arm.count("missing")]
        cells.append(
            [
                *row,
                " ".join(map(str, seeds)) or "-",
                f"{arm.script or 'unknown'} {arm.source[:8] or 'unknown'}",
            ]
        )
    parts.append(format_markdown(header, cells))
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


def attempt_line(arm: SweepArm, attempt: Attempt) -> str:
    at = f" at step {attempt.log.last_step}" if attempt.log and attempt.log.last_step >= 0 else ""
    why = f" - {attempt.reason}" if attempt.reason else ""
    return f"* {arm.label}, seed {attempt.seed}: {attempt.state}{at}{why} (`{attempt.run_id}`)"


def report(
    results: Results, rows: Sequence[ArmRow], target: Target, pictures: Sequence[str], given: str = ""
) -> str:
    """Return REPORT.md; `given` are the command's options, which its last line repeats."""
    scale = f" at scale `{results.scale}`" if results.scale else ""
    parts = [f"# {results.name}{scale}"]
    if results.question:
        parts.append(f"> {results.question}")
    parts.append("\n".join(f"* {line}" for line in conclusion(results)))
    parts += ["## Final validation loss", main_table(results, rows), table_notes(results)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    if target.proof:
        parts.append(proof_section(results, rows, target))
    if target.proof or (results.has_curves and math.isfinite(target.loss)):
        parts.append(target_section(results, rows, target))
    parts.append(audit_section(results))
    if results.planned:
        parts.append(f"Written by `python report_sweep.py sweeps/{results.name}.toml{given}`.")
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------
# summary.json
# ------------------------------------------------------------------------------------------------


def summary(results: Results, rows: Sequence[ArmRow], target: Target) -> dict:
    """The numbers of the report, unrounded; null where there is none."""
    verdict = results.verdict
    return {
        "sweep": results.name,
        "scale": results.scale,
        "question": results.question,
        "conclusion": conclusion(results),
        "control": results.control,
        **({"versus": results.versus} if results.versus else {}),
        "reference": results.reference,
        "better": list(verdict.better) if not results.count("missing") else [],
        "worse": list(verdict.worse) if not results.count("missing") else [],
        "alpha": ALPHA,
        "num_comparisons": verdict.num_comparisons,
        "target": {
            "loss": target.loss,
            "reason": target.reason,
            "x": results.x_unit,
            **({"on": f"training loss, mean over {SMOOTH:.0%} of the steps"} if target.on == "train" else {}),
        },
        "runs_planned": len(results.attempts) if results.planned else None,
        "runs": {outcome: results.count(outcome) for outcome in ("done", "failed", "missing")},
        "notes": results.notes,
        "arms": [arm_summary(results, row, target) for row in rows],
        "all_runs": [run_summary(arm, a, results.x_unit) for arm in results.arms for a in arm.attempts],
    }


def arm_summary(results: Results, row: ArmRow, target: Target) -> dict:
    arm, pair, difference = row.arm, results.comparison(row.arm.label), None
    if pair:
        difference = asdict(pair)
        difference["p_holm" if results.control else "p_tukey"] = difference.pop("p_corrected")
        difference["more_runs"] = row.more_runs
    out = {
        "arm": arm.label,
        "script": arm.script,
        "source_hash": arm.source,
        "values": {name: arm.settings[name] for name in results.varied() if name in arm.settings},
        "not_compared": arm.foreign or None,
        "runs": {outcome: arm.count(outcome) for outcome in ("done", "failed", "missing")},
        "final_val_loss": asdict(row.result),
        "difference": difference,
        f"{results.x_unit}_to_target_loss": reach_summary(row, row.x_to_target),
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


def reach_summary(row: ArmRow, found: Summary) -> dict:
    return {"reached": row.reached, "of": row.ended, "mean": found.mean, "low": found.low, "high": found.high}


def run_summary(arm: SweepArm, attempt: Attempt, x_unit: str) -> dict:
    return {
        "run_id": attempt.run_id,
        "arm": arm.label,
        "seed": attempt.seed,
        "state": attempt.state,
        "reason": attempt.reason,
        "final_val_loss": attempt.loss,
        f"{x_unit}_to_target_loss": attempt.reach.x if attempt.reach else None,
        "minutes_to_target_loss": attempt.reach.minutes if attempt.reach else None,
    }


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def save_pictures(results: Results, folder: Path) -> list[str]:
    """Draw what there is to draw; the names of the files."""
    figures = {}
    if results.has_differences:
        figures["forest.png"] = picture_of_forest(results)
    if results.has_curves:
        figures["curves.png"] = picture_of_curves(results)
    for name, figure in figures.items():
        style.save(figure, folder / name)
    return list(figures)


def options_given(options: Namespace) -> str:
    """Return the options that change a planned sweep's report, as on the command line."""
    defaults = {"control": None, "target": None, "target_on": "val"}
    words = []
    for name, default in defaults.items():
        value = getattr(options, name)
        if value != default:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.pool_sources:
        words.append("--pool-sources")
    return "".join(f" {shlex.quote(word)}" for word in words)


def write_report(options: Namespace) -> None:
    results = read_results(
        options.paths, options.logs, options.control, options.pool_sources, options.stopped_early
    )
    target = choose_target(results, options.target, options.target_on)
    rows = rows_of(results, target)
    folder = options.out or results.folder / results.name
    pictures = save_pictures(results, folder)
    write_atomically(folder / "REPORT.md", report(results, rows, target, pictures, options_given(options)))
    write_atomically(folder / "summary.json", as_json(summary(results, rows, target)))
    print(*conclusion(results), "", sep="\n")
    print(f"{folder / 'REPORT.md'}\n{folder / 'summary.json'}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.make_sweep_parser(__doc__, "folder to write to (default: logs/SWEEP/)")
    parser.add_argument("--target", type=float, help="target loss; adds the speedrun's proof")
    on = {"choices": ("val", "train"), "default": "val"}
    parser.add_argument("--target-on", **on, help="reached in validation, or in the smoothed training loss")
    parser.add_argument("--control", help="the arm to compare with (default: the sweep's)")
    return command_line.run(write_report, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
