"""Order arms by the numeric setting that varies, and group them by what else varies.

from analysis.by_value import by_value, beside, ordered
by_value(results)           # "muon_lr", or None
ordered(results)            # arms in order of that setting
"""

from collections.abc import Sequence

from analysis.results import Results, SweepArm
from analysis.run_log import format_value

MAX_KINDS = 4  # with more kinds of arm, no value orders them


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers_that_vary(results: Results) -> list[str]:
    """Return the settings that vary and whose values are all numbers, in lower case."""
    return [
        name
        for name in results.varied()
        if all(is_number(arm.settings[name]) for arm in results.arms if name in arm.settings)
    ]


def by_value(results: Results) -> str | None:
    """Return the numeric setting that varies most, to order arms by; None if there is none.

    Among settings tied to each other it is the one that `results.by` names, else the last by name.
    """
    if results.by:
        return results.by
    counts = {}
    for name in numbers_that_vary(results):
        counts[name] = len({repr(arm.settings[name]) for arm in results.arms if name in arm.settings})
    best = max(counts, key=lambda name: (counts[name], name), default=None)
    if best is None or counts[best] < 3 or len(kinds_of(results, best)) > MAX_KINDS:
        return None
    return best


def beside(results: Results, name: str) -> list[str]:
    """Return the other settings that vary and are not tied to this one."""
    return [other for other in results.varied() if other not in (name, *results.tied(name))]


def kinds_of(results: Results, name: str) -> dict[str, str]:
    """Return the kinds of arm, with equal settings besides this one, as key -> words."""
    others = beside(results, name)
    found = {}
    for arm in results.arms:
        if name in arm.settings:
            words = " ".join(f"{o}={format_value(arm.settings[o])}" for o in others if o in arm.settings)
            found.setdefault(_kind_of(arm, others), words)
    return found


def _kind_of(arm: SweepArm, names: Sequence[str]) -> str:
    return repr([arm.settings.get(name) for name in names])


def ordered(results: Results) -> list[SweepArm]:
    """Sort the arms by kind and value; without such a setting, and for ties, keep the planned order."""
    name = by_value(results)
    if name is None:
        return list(results.arms)
    others, kinds = beside(results, name), list(kinds_of(results, name))

    def place(arm: SweepArm) -> tuple[int, float]:
        if name not in arm.settings:
            return -1, 0.0
        return kinds.index(_kind_of(arm, others)), arm.settings[name]

    return sorted(results.arms, key=place)
