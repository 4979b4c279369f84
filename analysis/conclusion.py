"""Conclusion in a sentence from a sweep's final losses.

    from analysis.conclusion import conclusion
    print(conclusion(results))

It claims only what `results.verdict` (stats.judge) claims, and says what is undecided or untested.
"""

import math
from collections.abc import Sequence

from analysis.results import Results
from analysis.stats import ALPHA, Comparison, Verdict
from analysis.tables import join_words, state_p

MAX_NAMED = 4  # arms named in a sentence, before "and 3 more"


def _names(names: Sequence[str]) -> str:
    """Join names as "a, b and c"; of many, only the first ones."""
    shown = list(names[:MAX_NAMED])
    if len(names) > len(shown):
        return f"{', '.join(shown)} and {len(names) - len(shown)} more"
    return join_words(shown)


def _evidence(pair: Comparison, p: float) -> str:
    size, low, high = abs(pair.difference), *sorted((abs(pair.low), abs(pair.high)))
    n = f"n = {pair.n_arm}" + ("" if pair.n_arm == pair.n_control else f" and {pair.n_control}")
    return f"{size:.4f}, {pair.confidence:.0%} interval {low:.4f} to {high:.4f}, {state_p(p)}, {n}"


def conclusion(results: Results) -> str:
    """Say in a sentence what may be concluded from the final losses, and what may not."""
    verdict, missing, done = results.verdict, results.count("missing"), results.count("done")
    total = len(results.attempts)
    lowest = verdict.lowest
    if not lowest:
        which = "no run that can be compared" if done else f"none of {total} runs"
        return f"Nothing may be concluded: {which} has finished."
    if missing:
        runs = f"{'planned ' if results.planned else ''}runs {'has' if missing == 1 else 'have'}"
        so_far = ""
        if len(verdict.summaries) > 1:
            so_far = f"; so far the lowest mean is that of {lowest} ({verdict.summaries[lowest]})"
        return (
            f"Nothing may be concluded yet, as {missing} of {total} {runs} not ended, and who tests until "
            f"something is found will find something{so_far}."
        )
    if len(verdict.summaries) == 1:
        found = verdict.summaries[lowest]
        return f"There is nothing to compare {lowest} with, whose final loss is {found}."
    if all(summary.n <= 1 for summary in verdict.summaries.values()):
        failed = any(summary.failed for summary in verdict.summaries.values())
        why = "no arm has two finished runs" if failed else "every arm is a single run"
        text = (
            f"No difference may be concluded, as {why}, and how much repeats of one arm differ is not known; "
            f"the lowest loss is that of {lowest}, {verdict.summaries[lowest]}"
        )
        return "; ".join([text, *_facts(results)]) + "."
    may, may_not = _with_control(results) if verdict.control else _without_control(results)
    parts = [f"it may be concluded that {', and that '.join(may)}"] if may else []
    if verdict.control and not (verdict.better or verdict.worse):
        than = "its control" if results.versus else verdict.control
        parts.append(f"no arm may be called better or worse than {than}")
    if not (verdict.control or verdict.better):
        parts.append("no arm may be called the best")
    if may_not:
        parts.append(f"it may not be concluded {', nor '.join(may_not)}")
    if untested := _untested(results):
        parts.append(f"nothing may be concluded from {', nor from '.join(untested)}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _with_control(results: Results) -> tuple[list[str], list[str]]:
    verdict = results.verdict
    may = []
    for names, word in ((verdict.better, "better"), (verdict.worse, "worse")):
        for control, group in _by_control(verdict, names):
            most = max(group, key=lambda name: abs(verdict.versus_control[name].difference))
            found = _evidence(verdict.versus_control[most], verdict.p_control[most])
            by = f"by {found}" if len(group) == 1 else f"{most} by {found}"
            may.append(f"{_names(group)} {_is(group)} {word} than {control} ({by})")
    may += _facts(results)
    may_not = []
    undecided = [
        name
        for name, p in verdict.p_control.items()
        if not math.isnan(p) and name not in verdict.better + verdict.worse and not (p < ALPHA)
    ]
    for control, group in _by_control(verdict, undecided):
        unseen = _unseen([verdict.versus_control[name] for name in group], verdict)
        may_not.append(
            f"that {_names(group)} {'differs' if len(group) == 1 else 'differ'} from "
            f"{control} or that {'it does' if len(group) == 1 else 'they do'} not{unseen}"
        )
    if len(verdict.better) > 1:
        first = min(verdict.better, key=lambda name: verdict.summaries[name].mean)
        others = [name for name in verdict.better if name != first]
        proven = first == verdict.best and all(verdict.p_best[name] < ALPHA for name in others)
        if not proven:
            may_not.append(f"that {first} is better than {_names(others)}")
    for name, p in verdict.p_control.items():
        if p < ALPHA and name not in verdict.better + verdict.worse:
            word = "better" if verdict.versus_control[name].difference < 0 else "worse"
            loser = name if word == "better" else verdict.controls[name]
            may_not.append(f"that {name} is {word} ({_lost(verdict, loser)})")
    return may, may_not


def _by_control(verdict: Verdict, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Group arms by the control that each was compared with."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(verdict.controls[name], []).append(name)
    return list(groups.items())


def _without_control(results: Results) -> tuple[list[str], list[str]]:
    verdict, best = results.verdict, results.verdict.best
    may, may_not = _facts(results), []
    nearest = min(verdict.worse, key=lambda name: verdict.summaries[name].mean, default=None)
    found = _evidence(verdict.versus_best[nearest], verdict.p_best[nearest]) if nearest else ""
    if verdict.better:
        every = "every other arm tested" if _untested(results) else "every other arm"
        may = [f"{best} is better than {every} (than {nearest}, the next, by {found})", *may]
        return may, may_not
    if nearest:
        by = f"by {found}" if len(verdict.worse) == 1 else f"{nearest}, the nearest, by {found}"
        worse = sorted(verdict.worse, key=lambda name: -verdict.summaries[name].mean)
        may = [f"{_names(worse)} {_is(worse)} worse than {best} ({by})", *may]
    tied = [name for name, p in verdict.p_best.items() if not math.isnan(p) and name not in verdict.worse]
    if tied:
        unseen = _unseen([verdict.versus_best[name] for name in tied], verdict)
        lowest = "lowest" if best == verdict.lowest else "lowest of those tested"
        may_not.append(f"that {best}, whose mean is {lowest}, differs from {_names(tied)}{unseen}")
    return may, may_not


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _lost(verdict: Verdict, name: str) -> str:
    summary = verdict.summaries[name]
    return f"{summary.failed} of {summary.n + summary.failed} runs of {name} failed"


def _facts(results: Results) -> list[str]:
    """State facts that need no test: arms with exactly the control's losses, arms whose runs all failed."""
    verdict = results.verdict
    equal = [n for n, pair in verdict.versus_control.items() if pair.difference == 0 and pair.sd == 0]
    lost = [n for n, summary in verdict.summaries.items() if not summary.n and summary.failed]
    groups = _by_control(verdict, equal)
    facts = [f"{_names(group)} gave the very losses of {control}" for control, group in groups]
    return facts + ([f"all runs of {_names(lost)} failed"] if lost else [])


def _unseen(pairs: Sequence[Comparison], verdict: Verdict) -> str:
    """State the size below which a difference can go undetected."""
    sizes = [size for pair in pairs if math.isfinite(size := verdict.detectable(pair))]
    return f" (differences below about {max(sizes):.2g} can go unseen in so few runs)" if sizes else ""


def _untested(results: Results) -> list[str]:
    """List arms about which the runs say nothing, with the reason."""
    verdict, parts = results.verdict, []
    single = [name for name, summary in verdict.summaries.items() if summary.n == 1]
    if single:
        parts.append(f"{_names(single)} ({'a single run' if len(single) == 1 else 'single runs'})")
    no_p = [
        name
        for name, pair in verdict.pairs.items()
        if min(pair.n_arm, pair.n_control) > 1 and math.isnan(verdict.p[name]) and pair.difference
    ]
    lossy = [name for name in no_p if not verdict.control and verdict.summaries[name].failed]
    flat = [name for name in no_p if name not in lossy]
    if lossy:
        parts.append(f"{_names(lossy)} ({'some of its' if len(lossy) == 1 else 'some of their'} runs failed)")
    if flat:
        parts.append(f"{_names(flat)} (runs or differences do not vary)")
    foreign = [arm.label for arm in results.arms if arm.foreign]
    if foreign:
        parts.append(f"{_names(foreign)} (other source code or data)")
    return parts
