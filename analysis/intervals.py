"""Draw a mean with its interval and runs, the same way in all pictures.

    from analysis.intervals import draw_mean, ends_of
    draw_mean(ax, 0, pair.difference, pair.low, pair.high, n, look, runs, horizontal=True)

The interval is the statistics' 95% interval, never a standard deviation.
"""

import math
from collections.abc import Sequence

MIN_INTERVAL = 3  # the interval of two runs is wider than the plot; show the two runs instead
KEY = "mark: mean with its 95% interval; ticks: single seeds; hollow: a single run"


def ends_of(low: float, high: float, n: int) -> tuple[float, float] | None:
    """Return the interval's ends, if there are enough runs to show it."""
    return (low, high) if n >= MIN_INTERVAL and math.isfinite(low + high) else None


def draw_mean(
    ax,
    at: float,
    mean: float,
    low: float,
    high: float,
    n: int,
    look: dict,
    runs: Sequence[float] = (),
    horizontal: bool = False,
) -> None:
    """Draw the mean of n runs with its interval at a place on the other axis, and the runs as ticks."""
    ends, colour = ends_of(low, high, n), look["color"]
    if len(runs) > 1:
        across = [at] * len(runs)
        xy = (runs, across) if horizontal else (across, runs)
        dot = {"marker": "|" if horizontal else "_", "markersize": 6}
        ax.plot(*xy, **dot, color=colour, linestyle="none", alpha=0.55, zorder=2)
    if ends:
        xy = (ends, (at, at)) if horizontal else ((at, at), ends)
        ax.plot(*xy, color=colour, linewidth=1.6, solid_capstyle="butt", zorder=3)
    ax.plot(
        [mean if horizontal else at],
        [at if horizontal else mean],
        **look,
        markersize=9 if look["marker"] == "*" else 6.5,
        markerfacecolor="white" if n == 1 else colour,
        linestyle="none",
        zorder=4,
    )
