"""House style of pictures: colours, looks, units, limits, saving. Importing it loads no matplotlib."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.files import replacing

# Okabe and Ito's colours, distinct with any colour blindness, without yellow, which is too faint for a line,
# and black, which is the control's.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
LINES = ["-", (0, (5, 2)), (0, (1, 1.2))]  # solid, dashed, dotted: several quantities of one arm
MARKERS = ["s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]
CONTROL = {"color": "#000000", "marker": "o"}  # no other arm has either
MAX_COLOURS = 18  # arms with distinct colour and marker; with more, the colour is the place in the plan
GREY = "#777777"
MIN_INTERVAL = 3  # the interval of two runs is wider than a plot of losses; show the two runs instead
MEAN_KEY = "mark: mean with its 95% interval; ticks: single seeds; hollow: a single run"
NUM_COLOURS = 128  # in a PNG's palette
PANEL_INCHES = 3.0  # least width of a panel beside long names
SUFFIXES = (".png", ".svg", ".pdf")
SHARED_LETTERS = 8  # letters shown before the first difference
BYTES = 256  # vocabulary size of byte tokens


def load_matplotlib():
    """Load matplotlib.pyplot without a display, in the house style."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's would be inherited, and may not be installed here
    import matplotlib

    matplotlib.rcdefaults()  # the user's matplotlibrc may set TeX or other sizes
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.1,  # inches
            "figure.constrained_layout.w_pad": 0.1,
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


def looks_of(labels: Sequence[str], control: str | None = None) -> dict[str, dict]:
    """Return each arm's colour and marker, given all arms of its sweep in the order of the plan."""
    others = [label for label in labels if label != control]
    colours = COLOURS if len(others) <= MAX_COLOURS else _shades(len(others))
    found = {
        label: {"color": colours[number % len(colours)], "marker": MARKERS[number % len(MARKERS)]}
        for number, label in enumerate(others)
    }
    return {**found, control: CONTROL} if control in labels else found


def _shades(count: int) -> list[str]:
    """Return shades from dark to light, all darker than the paper."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.88 * number / (count - 1))) for number in range(count)]


def time_unit(longest_ms: float) -> tuple[float, str]:
    """Choose a unit for a duration: its length in ms, and its name (s, min or h)."""
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


def scale_signed(ax, which: str, values: Sequence[float], small: Sequence[float] = ()) -> float:
    """Make the axis `which`, x or y, linear around zero and logarithmic beyond, if the values span decades.

    `small` are sizes indistinguishable from zero, such as half-widths of intervals; by default the lower
    quarter of the values. Returns the size up to which the axis is linear.
    """
    sizes, small = (np.abs(np.asarray(x, float)) for x in (values, small if len(small) else values))
    sizes, small = (x[np.isfinite(x) & (x > 0)] for x in (sizes, small))
    largest = sizes.max(initial=0)
    least = max(np.quantile(small, 0.25), 1e-4 * largest) if len(small) else 1.0
    threshold = 10.0 ** math.floor(math.log10(least))
    if largest > 10 * least:
        getattr(ax, f"set_{which}scale")("symlog", linthresh=threshold, linscale=0.9)
        ax.autoscale(axis=which)
    getattr(ax, f"{which}axis").set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    return threshold


def scale_losses(ax, low: float, high: float) -> None:
    """Make the y axis logarithmic, with plain numbers as ticks, if losses span a factor of two."""
    from matplotlib.ticker import LogLocator, NullLocator

    if high > 2 * low > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def scale_positive(ax, low: float, high: float) -> None:
    """Make the x axis span low to high, logarithmic if a factor of ten apart, with plain numbers as ticks."""
    from matplotlib.ticker import LogLocator, NullLocator

    if 0 < 10 * low <= high:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xlim(low / 1.03, high * 1.03)
    else:
        ax.set_xlim(low - 0.02 * (high - low or 1), high + 0.02 * (high - low or 1))


def shorten(text: str, width: int) -> str:
    """Cut a text in the middle to `width` characters: both ends of a run's name help to identify it."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def shorten_apart(texts: Sequence[str], width: int) -> list[str]:
    """Shorten texts so that different ones stay different.

    If they would look alike, their common prefix is cut first, then what stands before the place where each
    differs; if that does not help, they stay whole.
    """
    begin = re.match(r"(.*[ _-])?", os.path.commonprefix(list(texts)))[0]
    rests = [f"…{text[len(begin) :]}" for text in texts] if begin else texts
    candidates = [[shorten(text, width) for text in some] for some in (texts, rests)]
    candidates.append(_around_differences(texts, width))
    return next((short for short in candidates if len(set(short)) == len(set(texts))), list(texts))


def _around_differences(texts: Sequence[str], width: int) -> list[str]:
    """Keep each text's beginning and where it first differs from its neighbours in sorted order."""
    ordered = sorted(set(texts))
    head = width // 3
    found = {}
    for number, text in enumerate(ordered):
        beside = ordered[max(0, number - 1) : number] + ordered[number + 1 : number + 2]
        shared = max((len(os.path.commonprefix([text, other])) for other in beside), default=0)
        start = max(head, shared - SHARED_LETTERS)
        short = f"{text[:head]}…{text[start:]}" if start > head else text
        found[text] = short if len(short) <= width else f"{short[: max(0, width - 1)]}…"
    return [found[text] for text in texts]


def loss_unit(runs) -> str:
    """Unit of loss: nats per byte if all runs' tokens are bytes, else nats per token."""
    return f"nats per {token_name(runs)}"


def token_name(runs) -> str:
    """Name of a token: byte if all runs use bytes, else token. A log cut before its settings says nothing."""
    known = [run for run in runs if run.config or run.last_step >= 0]
    sizes = {run.config.get("vocab_size", _vocabulary_of_old(run)) for run in known}
    return "byte" if sizes == {BYTES} else "token"


def _vocabulary_of_old(run) -> int | None:
    """Vocabulary size for logs from before 2026-11-23, which lack it: bytes, if the data is embedded."""
    return BYTES if run.started.get("train_data", "").startswith("embedded_") else None


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
    """Draw the mean of n runs with its interval at a place on the other axis, and the runs as ticks.

    The interval is the statistics' 95% interval, never a standard deviation. A mean looks so in all pictures.
    """
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


def line_legend(ax, names: Sequence[str], **place) -> None:
    """Add a small legend for the dashes of lines, in the order of LINES."""
    handles = [
        ax.plot([], [], color=GREY, linestyle=LINES[number % len(LINES)], label=name)[0]
        for number, name in enumerate(names)
    ]
    ax.legend(handles=handles, fontsize=8, framealpha=0.8, frameon=True, edgecolor="none", **place)


def make_room(ax) -> None:
    """Widen the page if a panel and what is written beside it need more."""
    page, beside = ax.figure, ax.get_tightbbox().width - ax.get_window_extent().width
    page.set_figwidth(max(page.get_figwidth(), PANEL_INCHES + beside / page.dpi))


def check_suffix(path: Path) -> None:
    """Raise ValueError if a picture cannot be written under this name."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a plot is written as one of {', '.join(SUFFIXES)}; give --out such a name")


def save(fig, path: Path) -> None:
    """Write the figure atomically, making its folder; the same figure is the same bytes."""
    import matplotlib.pyplot as plt
    from PIL import Image  # required by matplotlib

    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    for ax in fig.axes:  # the layout's last bits vary from call to call, and with them the names in an SVG
        ax.set_position(np.round(ax.get_position().bounds, 6))
    with replacing(path) as temporary:
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        fig.savefig(temporary, metadata=dates.get(path.suffix.lower()))
        if path.suffix.lower() == ".png":  # a palette saves two thirds of the bytes
            with Image.open(temporary) as image:
                small = image.convert("RGB").quantize(NUM_COLOURS, Image.Quantize.FASTOCTREE, dither=0)
            small.save(temporary, format="png", optimize=True)
    plt.close(fig)
