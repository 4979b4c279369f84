"""Means with their intervals and runs, drawn the same way in all pictures.

    from analysis.intervals import mark_of, draw_mark, limits_of, explain
    marks = [mark_of(x, summary, losses, "#0072B2", "o"), ...]
    limits = limits_of(marks)
    ax.set_ylim(*limits)
    for mark in marks:
        draw_mark(ax, mark, limits, value="{:.4f}")
    ax.set_xlabel(", ".join(explain(marks)))

A mark is the mean with its 95% interval and its runs as dots; it is hollow for a single run, and an arrow at
the edge where the mean lies beyond the limits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from analysis import style
from analysis.stats import Summary

MIN_INTERVAL = 3  # an interval from two runs is wider than the plot: the two runs are shown instead


@dataclass(frozen=True)
class Mark:
    """A mean with its interval and its runs, at a place on the other axis. `n` counts the runs behind it."""

    at: float
    mean: float
    low: float
    high: float
    n: int
    colour: str
    marker: str
    runs: Sequence[float] = field(default_factory=list)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval, if there are enough runs to show one."""
        enough = self.n >= MIN_INTERVAL and math.isfinite(self.low + self.high)
        return (self.low, self.high) if enough else None


def mark_of(
    at: float, summary: Summary, runs: Sequence[float], colour: str, marker: str, factor: float = 1
) -> Mark:
    """The mark of a summary and its runs, all multiplied by `factor`."""
    mean, low, high = factor * summary.mean, factor * summary.low, factor * summary.high
    return Mark(at, mean, low, high, summary.n, colour, marker, [factor * value for value in runs])


def limits_of(marks: Sequence[Mark], higher_is_better: bool = False) -> tuple[float, float]:
    """Limits that show the better marks whole, with their intervals and runs."""
    known = [mark for mark in marks if mark.n]
    ends = [[mark.mean, *mark.runs, *(mark.interval or ())] for mark in known]
    means, lows, highs = [mark.mean for mark in known], [min(x) for x in ends], [max(x) for x in ends]
    if not higher_is_better:
        return style.bulk_limits(means, lows, highs)
    low, high = style.bulk_limits([-x for x in means], [-x for x in highs], [-x for x in lows])
    return -high, -low


def draw_mark(
    ax,
    mark: Mark,
    limits: tuple[float, float] | None = None,
    value: str = "",
    horizontal: bool = False,
    transform=None,
) -> None:
    """Draw a mark on a vertical axis of values, or on a horizontal one.

    `value` is the format of the number that is written beside an arrow, "" for none. `transform` places the
    mark, if not by the axes' data.
    """
    if limits and not limits[0] <= mark.mean <= limits[1]:
        _draw_arrow(ax, mark, limits, value, horizontal, transform)
        return
    place = {"transform": transform or ax.transData, "color": mark.colour}
    if len(mark.runs) > 1:
        across = [mark.at] * len(mark.runs)
        xy = (mark.runs, across) if horizontal else (across, mark.runs)
        dot = {"marker": "|", "markersize": 7} if horizontal else {"marker": ".", "markersize": 4}
        ax.plot(*xy, **dot, **place, linestyle="none", alpha=0.7, zorder=2)
    bar = None
    if mark.interval:
        bar = [[mark.mean - mark.low], [mark.high - mark.mean]]
    ax.errorbar(
        [mark.mean if horizontal else mark.at],
        [mark.at if horizontal else mark.mean],
        **{"xerr" if horizontal else "yerr": bar},
        **place,
        marker=mark.marker,
        markersize=10 if mark.marker == "*" else 6.5,
        markerfacecolor="white" if mark.n == 1 else mark.colour,
        capsize=0 if horizontal else 3,  # a cap would look like one of the runs
        linestyle="none",
        zorder=3,
    )


def _draw_arrow(ax, mark: Mark, limits: tuple[float, float], value: str, horizontal: bool, transform) -> None:
    """Draw an arrow at the edge of the limits, with the mean beside it."""
    above = mark.mean > limits[1]
    inset = 0.02 * (limits[1] - limits[0])
    edge = limits[1] - inset if above else limits[0] + inset
    inward = -7 if above else 7
    x, y = (edge, mark.at) if horizontal else (mark.at, edge)
    marker = (">" if above else "<") if horizontal else ("^" if above else "v")
    ax.plot([x], [y], marker, color=mark.colour, markersize=7, transform=transform or ax.transData, zorder=4)
    if not value:
        return
    align = {"ha": "right" if above else "left", "va": "center"}
    if not horizontal:
        align = {"ha": "center", "va": "top" if above else "bottom"}
    offset = (inward, 0) if horizontal else (0, inward)
    text = {"textcoords": "offset points", "fontsize": 8, "color": mark.colour, **align}
    ax.annotate(value.format(mark.mean), (x, y), offset, **text)


def explain(marks: Sequence[Mark]) -> list[str]:
    """An explanation of bars, dots and hollow marks, as far as these marks show them."""
    counts = [mark.n for mark in marks]
    parts = []
    if any(n >= MIN_INTERVAL for n in counts):
        parts.append("bars: 95% interval")
    if any(n > 1 for n in counts):
        parts.append("dots: runs")
    if any(n == 2 for n in counts):
        parts.append("no interval from two")
    if any(n == 1 for n in counts):
        parts.append("hollow: a single run")
    return parts
