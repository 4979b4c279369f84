"""analysis/intervals and analysis/tables: a mean is drawn and written for what it is, unknown numbers too."""

import csv
import io
import json
import math

import pytest

from analysis import style
from analysis.intervals import Mark, draw_mark, explain, limits_of, mark_of
from analysis.stats import summarize
from analysis.tables import as_csv, as_json, format_difference, format_interval, format_loss, format_p

LOSSES = [3.1, 3.2, 3.3, 3.2]


@pytest.fixture
def ax():
    plt = style.load_matplotlib()
    yield plt.subplots()[1]
    plt.close("all")


def points(ax, horizontal=False):
    """Marker and place of every single mark, as (where, value)."""
    found = []
    for line in ax.lines:
        x, y = list(line.get_xdata()), list(line.get_ydata())
        if len(x) == 1 and line.get_marker() != "None":
            found.append((line.get_marker(), *((y[0], x[0]) if horizontal else (x[0], y[0]))))
    return found


def mark(losses, at=2.0):
    return mark_of(at, summarize(losses), losses, "#0072B2", "o")


@pytest.mark.parametrize("horizontal", [False, True])
def test_a_mean_with_its_interval_and_runs(ax, horizontal):
    """The interval is that of the statistics, on the axis of values; all runs are there."""
    draw_mark(ax, mark(LOSSES), (3.0, 3.5), horizontal=horizontal)
    found = summarize(LOSSES)
    assert ("o", 2.0, pytest.approx(found.mean)) in points(ax, horizontal)
    (bar,) = [b for collection in ax.collections for b in collection.get_segments()]
    assert bar[:, 0 if horizontal else 1].tolist() == pytest.approx([found.low, found.high])
    runs = next(line for line in ax.lines if len(line.get_xdata()) == len(LOSSES))
    assert list(runs.get_xdata() if horizontal else runs.get_ydata()) == LOSSES


@pytest.mark.parametrize(
    "losses, bars, hollow", [([3.2], 0, True), ([3.1, 3.3], 0, False), (LOSSES, 1, False)]
)
def test_few_runs_have_no_interval(ax, losses, bars, hollow):
    """An interval of two runs would be wider than the plot; a single run is hollow."""
    draw_mark(ax, mark(losses))
    assert sum(len(c.get_segments()) for c in ax.collections) == bars
    face = next(line for line in ax.lines if line.get_marker() == "o").get_markerfacecolor()
    assert (face == "white") == hollow


@pytest.mark.parametrize(
    "horizontal, mean, marker", [(False, 9, "^"), (False, 1, "v"), (True, 9, ">"), (True, 1, "<")]
)
def test_beyond_the_limits_there_is_an_arrow_with_the_value(ax, horizontal, mean, marker):
    """Drawn at its place, it would flatten all others; left out, it would be forgotten."""
    lost = Mark(2.0, float(mean), math.nan, math.nan, 1, "black", "o")
    draw_mark(ax, lost, (3.0, 4.0), "{:+.2f}", horizontal)
    ((shape, at, value),) = points(ax, horizontal)
    assert (shape, at) == (marker, 2.0) and 3.0 < value < 4.0
    assert [text.get_text() for text in ax.texts] == [f"{mean:+.2f}"]


def test_limits_show_the_better_half():
    """Losses: low is better. Accuracies: high is. One lost value flattens nobody."""
    values = [mark([x]) for x in (3.0, 3.1, 3.2, 9.0)]
    low, high = limits_of(values)
    assert low < 3.0 and 3.2 < high < 4
    low, high = limits_of([mark([-x]) for x in (3.0, 3.1, 3.2, 9.0)], higher_is_better=True)
    assert high > -3.0 and -4 < low < -3.2
    assert limits_of([]) == (0, 1) and limits_of([mark([])]) == (0, 1)


def test_the_key_names_what_is_there():
    assert explain([mark([3.2])]) == ["hollow: a single run"]
    assert explain([mark([3.1, 3.3])]) == ["dots: runs", "no interval from two"]
    assert explain([mark(LOSSES), mark([3.2])]) == [
        "bars: 95% interval",
        "dots: runs",
        "hollow: a single run",
    ]


def test_unknown_numbers_are_written_so():
    """NaN is no number in CSV, and no JSON at all."""
    rows = list(csv.reader(io.StringIO(as_csv(["a", "b", "c"], [["x, y", math.nan, None], ["z", 0.1, 3]]))))
    assert rows == [["a", "b", "c"], ["x, y", "", ""], ["z", "0.1", "3"]]
    text = as_json({"a": [math.nan, 1.5, (math.inf,)], "b": "ρ"})
    assert json.loads(text) == {"a": [None, 1.5, [None]], "b": "ρ"} and "ρ" in text and text.endswith("\n")
    assert [format_loss(math.nan), format_difference(math.nan), format_p(math.nan)] == ["-"] * 3
    assert format_interval(math.nan, 1.0) == "-" and format_interval(-0.5, 1.0) == "[-0.5000, +1.0000]"
    assert [format_p(p) for p in (0.034, 0.00012, 0.00001)] == ["0.034", "0.00012", "< 0.0001"]
