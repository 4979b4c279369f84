"""analysis/style.draw_mean and analysis/tables: means and unknown numbers are drawn and written correctly."""

import csv
import io
import json
import math

import pytest

from analysis import style
from analysis.stats import summarize
from analysis.style import draw_mean
from analysis.tables import as_csv, as_json, format_difference, format_interval, format_loss, format_p

LOSSES = [3.1, 3.2, 3.3, 3.2]


@pytest.fixture
def ax():
    plt = style.load_matplotlib()
    yield plt.subplots()[1]
    plt.close("all")


def points(ax, horizontal=False):
    """Return marker and place of every single mark, as (where, value)."""
    found = []
    for line in ax.lines:
        x, y = list(line.get_xdata()), list(line.get_ydata())
        if len(x) == 1 and line.get_marker() != "None":
            found.append((line.get_marker(), *((y[0], x[0]) if horizontal else (x[0], y[0]))))
    return found


def draw(ax, losses, **kwargs):
    found = summarize(losses)
    look = {"color": "#0072B2", "marker": "o"}
    draw_mean(ax, 2.0, found.mean, found.low, found.high, found.n, look, losses, **kwargs)
    return found


@pytest.mark.parametrize("horizontal", [False, True])
def test_a_mean_with_its_interval_and_runs(ax, horizontal):
    """Fails if the interval is not the statistics', on the axis of values, or a run is missing."""
    found = draw(ax, LOSSES, horizontal=horizontal)
    assert ("o", 2.0, pytest.approx(found.mean)) in points(ax, horizontal)
    values = [list(line.get_xdata() if horizontal else line.get_ydata()) for line in ax.lines]
    assert [found.low, found.high] in values and LOSSES in values


@pytest.mark.parametrize(
    "losses, bars, hollow", [([3.2], 0, True), ([3.1, 3.3], 0, False), (LOSSES, 1, False)]
)
def test_few_runs_have_no_interval(ax, losses, bars, hollow):
    """An interval of two runs would be wider than the plot; a single run is hollow."""
    draw(ax, losses)
    assert sum(line.get_linestyle() == "-" for line in ax.lines) == bars
    face = next(line for line in ax.lines if line.get_marker() == "o").get_markerfacecolor()
    assert (face == "white") == hollow


@pytest.mark.parametrize(
    "values, scale", [([-0.0002, 0.001, 0.35], "symlog"), ([-0.02, 0.01, 0.03], "linear"), ([], "linear")]
)
def test_small_and_large_differences_share_an_axis(ax, values, scale):
    """A linear axis that shows +0.35 hides -0.0002; signs are written."""
    step = style.scale_signed(ax, "x", values)
    assert ax.get_xscale() == scale and (not values or step <= min(map(abs, values)))
    ax.set_xlim(-0.5, 0.5)
    ax.figure.canvas.draw()
    labels = {label.get_text() for label in ax.get_xticklabels()}
    assert "0" in labels and all(text[:1] in "0+-" for text in labels)


def test_unknown_numbers_are_written_so():
    """NaN is not a number in CSV, and not valid JSON."""
    rows = list(csv.reader(io.StringIO(as_csv(["a", "b", "c"], [["x, y", math.nan, None], ["z", 0.1, 3]]))))
    assert rows == [["a", "b", "c"], ["x, y", "", ""], ["z", "0.1", "3"]]
    text = as_json({"a": [math.nan, 1.5, (math.inf,)], "b": "ρ"})
    assert json.loads(text) == {"a": [None, 1.5, [None]], "b": "ρ"} and "ρ" in text and text.endswith("\n")
    assert [format_loss(math.nan), format_difference(math.nan), format_p(math.nan)] == ["-"] * 3
    assert format_interval(math.nan, 1.0) == "-" and format_interval(-0.5, 1.0) == "[-0.5000, +1.0000]"
    assert [format_p(p) for p in (0.034, 0.00012, 0.00001)] == ["0.034", "0.00012", "< 0.0001"]
