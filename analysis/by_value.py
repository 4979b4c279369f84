"""Arms ordered and coloured by the numeric setting that varies, and told apart by what else varies.

from analysis.by_value import by_value, beside, ordered, looks_of
by_value(results)           # "muon_lr", or None
ordered(results)            # arms in order of that setting
"""

import math
from collections.abc import Sequence

import numpy as np

from analysis import style
from analysis.results import Results, SweepArm
from analysis.run_log import format_value

DASHES = [*style.LINES, (0, (5, 1.2, 1, 1.2))]  # one a kind of arm, where colours tell the value


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers_that_vary(results: Results) -> list[str]:
    """The settings that vary, in lower case, whose values are all numbers."""
    return [
        name
        for name in results.varied()
        if all(is_number(arm.settings[name]) for arm in results.arms if name in arm.settings)
    ]


def by_value(results: Results) -> str | None:
    """The numeric setting that varies most, by which arms are ordered and coloured; None if there is none.

    Among settings tied to each other it is the one that `results.by` names, else the last by name.
    """
    if results.by:
        return results.by
    counts = {}
    for name in numbers_that_vary(results):
        counts[name] = len({repr(arm.settings[name]) for arm in results.arms if name in arm.settings})
    best = max(counts, key=lambda name: (counts[name], name), default=None)
    if best is None or counts[best] < 3 or len(kinds_of(results, best)) > len(DASHES):
        return None
    return best


def beside(results: Results, name: str) -> list[str]:
    """Settings that vary beside this one and are not tied to it."""
    return [other for other in results.varied() if other not in (name, *results.tied(name))]


def kinds_of(results: Results, name: str) -> dict[str, str]:
    """The kinds of arm: equal settings beside this one, as key -> words. Each kind has its dashes."""
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
    """The arms by value, if there is one; as planned, otherwise and where values are equal."""
    name = by_value(results)
    if name is None:
        return list(results.arms)
    return sorted(results.arms, key=lambda arm: arm.settings.get(name, -math.inf))


def looks_of(results: Results, arms: Sequence[SweepArm]) -> tuple[list[dict], list[float]]:
    """A look for each arm, and the values that they are coloured by, in order; no values if none varies."""
    name = by_value(results)
    looks = [style.arm_style(number) for number in range(len(arms))]
    if name is None:
        return looks, []
    values = sorted({float(arm.settings[name]) for arm in arms if name in arm.settings})
    others, kinds = beside(results, name), list(kinds_of(results, name))
    for arm, look in zip(arms, looks, strict=True):
        look.update(color=style.GREY, linestyle=style.LINES[1])
        if name in arm.settings:
            look["color"] = colour_of(values.index(float(arm.settings[name])), len(values))
            look["linestyle"] = DASHES[kinds.index(_kind_of(arm, others))]
    return looks, values


def colour_of(number: int, count: int):
    """The colour of the n-th of `count` values: lighter for higher ones, but never as light as the paper."""
    return _colour_map()(number / max(1, count - 1))


def _colour_map():
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))


def add_colour_bar(fig, ax, name: str, values: Sequence[float]) -> None:
    """Add a bar with a step of colour for each value; values are written as far as they fit."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    steps = ListedColormap([colour_of(i, len(values)) for i in range(len(values))])
    norm = BoundaryNorm(np.arange(len(values) + 1) - 0.5, len(values))
    bar = fig.colorbar(ScalarMappable(norm, steps), ax=ax, fraction=0.025, pad=0.03)
    shown = range(0, len(values), math.ceil(len(values) / 24))
    bar.set_ticks(list(shown), labels=[format_value(values[i]) for i in shown])
    bar.ax.minorticks_off()
    bar.set_label(name.upper())
