"""The house style of pictures: colours, looks, units, limits, saving. Importing it loads no matplotlib."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from analysis.files import replacing

# Okabe and Ito's colours, told apart with any kind of colour blindness; their yellow is too faint for a line.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
LINES = ["-", (0, (5, 2)), (0, (1, 1.2))]  # solid, dashed, dotted: the second and third round of colours
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]
GREY = "#777777"
SUFFIXES = (".png", ".svg", ".pdf")
SPEEDRUN_TARGET = 3.28


def load_matplotlib():
    """matplotlib.pyplot without a display, in the house style."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's own would be inherited, and is not installed here
    import matplotlib

    matplotlib.rcdefaults()  # the user's matplotlibrc may want TeX, or other sizes
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.6,
            "legend.frameon": False,
            "text.parse_math": False,  # a $ in a name is a $
            "svg.hashsalt": "plot",  # the same plot twice is the same file
        }
    )
    return plt


def arm_style(number: int) -> dict:
    """Colour, line and marker of the n-th arm; 21 arms differ in colour or line."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def time_unit(longest_ms: float) -> tuple[float, str]:
    """The unit that suits a duration: its milliseconds, and its name s, min or h."""
    for ms, name in ((3_600_000, "h"), (60_000, "min")):
        if longest_ms >= 3 * ms:
            return ms, name
    return 1000, "s"


def format_time(ms: float) -> str:
    """Format a duration: 830 ms, 12.3 s, 4 min 05 s, 3 h 20 min; - if it is not known."""
    if not math.isfinite(ms):
        return "-"
    if ms < 1000:
        return f"{ms:.0f} ms"
    if ms < 99_950:
        return f"{ms / 1000:.1f} s"
    seconds = round(ms / 1000)
    if seconds < 7200:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def bulk_limits(
    centres: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> tuple[float, float]:
    """Limits of an axis of losses, by the better half, so that one bad arm does not flatten all others.

    Shown are all arms up to 5 times the span from the lowest centre to the median one, with their intervals.
    """
    arms = sorted(arm for arm in zip(centres, lows, highs, strict=True) if math.isfinite(arm[0]))
    if not arms:
        return 0.0, 1.0
    lowest, usual = arms[0][0], arms[(len(arms) - 1) // 2][0]
    top = max(lowest + 5 * (usual - lowest), arms[:2][-1][0])
    while True:
        ends = [end for arm in arms if arm[0] <= top for end in arm if math.isfinite(end)]
        margin = 0.08 * (max(ends) - min(ends)) or 0.01
        limits = min(ends) - margin, max(ends) + margin
        if not any(top < arm[0] <= limits[1] for arm in arms):
            return limits
        top = limits[1]  # an interval brought another arm into sight: show it whole


def shorten(text: str, width: int) -> str:
    """Cut a text in the middle to at most `width` characters: both ends of a run's name tell it apart."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def shorten_apart(texts: Sequence[str], width: int) -> list[str]:
    """Cut texts as `shorten` does, but so that different ones stay different.

    Where they would look alike, their common beginning is cut first; if that does not help, they stay whole.
    """
    begin = re.match(r"(.*[ _-])?", os.path.commonprefix(list(texts)))[0]
    rests = [f"…{text[len(begin) :]}" for text in texts] if begin else texts
    for candidates in (texts, rests):
        short = [shorten(text, width) for text in candidates]
        if len(set(short)) == len(set(texts)):
            return short
    return list(texts)


def target_of(runs, target: float | None) -> float:
    """The target loss as given, else the runs' own if they agree on one, else the speedrun's 3.28."""
    if target is not None:
        return target
    own = {run.target_loss for run in runs if run.target_loss}
    return own.pop() if len(own) == 1 else SPEEDRUN_TARGET


def say_nothing_logged(ax, what: str) -> None:
    """Empty a panel and say why it is empty."""
    ax.text(
        0.5, 0.5, f"{what}:\nnot in these logs", transform=ax.transAxes, ha="center", va="center", color=GREY
    )
    ax.set_yticks([])
    ax.tick_params(bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.grid(False)


def line_legend(ax, names: Sequence[str], **place) -> None:
    """A small legend that explains the dashes of lines, in the order of LINES."""
    handles = [
        ax.plot([], [], color=GREY, linestyle=LINES[number % len(LINES)], label=name)[0]
        for number, name in enumerate(names)
    ]
    ax.legend(handles=handles, fontsize=8, framealpha=0.8, frameon=True, edgecolor="none", **place)


def check_suffix(path: Path) -> None:
    """Raise ValueError if a picture cannot be written under this name."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a plot is written as one of {', '.join(SUFFIXES)}; give --out such a name")


def save(fig, path: Path) -> None:
    """Write the figure and make its folder; a reader never sees half a file."""
    import matplotlib.pyplot as plt

    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with replacing(path) as temporary:
        fig.savefig(temporary, metadata=metadata)
    plt.close(fig)
