"""Conclusion from a sweep's final losses, in lines: what may be claimed, what not, and why.

    from analysis.conclusion import conclusion
    print("\n".join(conclusion(results)))

It claims only what `results.verdict` (stats.judge) claims.
"""

import math
from itertools import product

from analysis.results import Results
from analysis.stats import ALPHA, Verdict
from analysis.tables import format_difference, format_interval, state_p

FINDINGS = {  # what was found about arms -> how the line on them begins, in the order of the lines
    "better": "Better than {}",
    "worse": "Worse than {}",
    "undecided": "Undecided against {}",
    "withheld": "Not claimed against {}, because runs failed",
    "same": "The very losses of {}",
    "untested": "Not tested against {} (single runs, failed runs, or no spread)",
}


def conclusion(results: Results) -> list[str]:
    """Say what may be concluded from the final losses: a line for each finding and control."""
    verdict, missing, total = results.verdict, results.count("missing"), len(results.attempts)
    if not verdict.lowest:
        which = "no run that can be compared" if results.count("done") else f"none of {total} runs"
        return [f"Nothing may be concluded: {which} has finished."]
    found = f"{verdict.lowest}, {verdict.summaries[verdict.lowest]}"
    if missing:
        runs = f"{missing} of {total} {'planned ' if results.planned else ''}runs"
        have = "has" if missing == 1 else "have"
        why = f"{runs} {have} not ended, and who tests until something is found will find something"
        lines = [f"Nothing may be concluded yet: {why}."]
    else:
        lines = _findings(verdict)
    claimed = verdict.better or (verdict.control and verdict.worse)
    if not verdict.controls:
        lines.append(f"There is nothing to compare with {found}")
    elif missing or not claimed:
        lines.append(f"Lowest mean, perhaps by luck: {found}")
    if foreign := [arm.label for arm in results.arms if arm.foreign]:
        lines.append(f"Not compared (other source code or data): {', '.join(foreign)}")
    return lines


def _findings(verdict: Verdict) -> list[str]:
    """Return a line for each finding and control, with the arms of which it is true."""
    found = {name: _finding(verdict, name) for name in verdict.controls if verdict.summaries[name].n}
    lines = []
    if verdict.better and not verdict.control:
        others = (
            "every other arm" if set(verdict.controls) == set(verdict.worse) else "every other arm tested"
        )
        lines.append(f"Better than {others}: {verdict.best}, {verdict.summaries[verdict.best]}")
    for finding, control in product(FINDINGS, dict.fromkeys(verdict.controls.values())):
        names = [name for name in found if found[name] == finding and verdict.controls[name] == control]
        if not names:
            continue
        has_evidence = finding in ("better", "worse", "withheld")
        arms = [name + _evidence(verdict, name) if has_evidence else name for name in names]
        line = f"{FINDINGS[finding].format(control)}: {', '.join(arms)}"
        if finding == "undecided":
            sizes = [size for name in names if math.isfinite(size := verdict.detectable(verdict.pairs[name]))]
            if sizes:
                line += f" (differences below about {max(sizes):.2g} can go unseen in so few runs)"
        lines.append(line)
    lost = [name for name, summary in verdict.summaries.items() if summary.failed and not summary.n]
    return [*lines, f"All runs failed: {', '.join(lost)}"] if lost else lines


def _finding(verdict: Verdict, name: str) -> str:
    """Return what was found about an arm, a key of FINDINGS."""
    pair = verdict.pairs[name]
    if name in verdict.better:
        return "better"
    if name in verdict.worse:
        return "worse"
    if pair.difference == 0 and pair.sd == 0:
        return "same"
    if math.isnan(pair.p):
        return "untested"
    return "withheld" if pair.p_corrected < ALPHA else "undecided"


def _evidence(verdict: Verdict, name: str) -> str:
    pair = verdict.pairs[name]
    interval = format_interval(pair.low, pair.high)
    return f" ({format_difference(pair.difference)} {interval}, {state_p(pair.p_corrected)})"
