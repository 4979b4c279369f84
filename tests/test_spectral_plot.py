"""plot_spectral_sweep: pictures and ranks show what was logged, legibly."""

import math
import re

import numpy as np
import pytest
from logs_for_tests import SEPARATOR, make_log
from scipy import stats as scipy_stats
from sweeps_for_tests import STEPS, make_sweep, spectral_arms

import plot_spectral_sweep
from analysis.read_results import read_results


def draw(tmp_path, arms, control="spectral_lr_0", **kwargs):
    """Draw the figure of a sweep; return it and the results."""
    kwargs = {"val_every": 20, **kwargs}
    file = make_sweep(tmp_path, "sweep", arms, control=control, **kwargs)
    results = read_results([file], tmp_path / "logs")
    figure = plot_spectral_sweep.figure(results)
    figure.draw_without_rendering()
    return figure, results


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title(loc="left").startswith(title))


def texts(figure):
    return [text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


def points(ax):
    """Return x and y of every single mark in a panel."""
    lines = [line for line in ax.lines if len(line.get_xdata()) == 1]
    return {(round(float(line.get_xdata()[0]), 9), round(float(line.get_ydata()[0]), 9)) for line in lines}


# ------------------------------------------------------------------------------------------------
# Panels
# ------------------------------------------------------------------------------------------------


def test_rho_is_signed_and_spans_magnitudes(tmp_path):
    """|rho| would hide its negative sign; a linear axis, its fall by orders of magnitude."""
    figure, results = draw(tmp_path, spectral_arms(0.1), control=None, seeds=(1,), val_every=10)
    run = next(arm for arm in results.arms if arm.label == "spectral_lr_0.1").runs[0]
    for what, key in (("attention", "spec_attn"), ("MLP", "spec_mlp")):
        ax = panel(figure, f"mean ρ of {what} matrices")
        line = next(line for line in ax.lines if len(line.get_xdata()) == len(run.val))
        np.testing.assert_allclose(line.get_ydata(), run.columns[key].value.mean(1))
        assert max(line.get_ydata()) < 0 and ax.get_yscale() == "symlog"
        assert ax.get_ylim()[0] < min(line.get_ydata()) and ax.get_ylim()[1] > 0
        assert ax.get_xlabel().endswith("\nnot logged: baseline_std_0"), "in the panel it may hide the rest"
        assert any(text.get_text().startswith("ρ < 0") for text in ax.texts)


def test_both_signs_of_rho(tmp_path):
    """Fails if a rho that changes sign does not have both halves on the same scale."""
    file = make_sweep(tmp_path, "sweep", spectral_arms(0, baseline=False), seeds=(1,), val_every=20)
    log = next((tmp_path / "logs").glob("*.txt"))
    head, steps = log.read_text().rsplit(SEPARATOR, 1)
    steps = re.sub(r"(step:1\d\d/.*spec_attn:)(\[.*?\])", lambda m: m[1] + m[2].replace("-", ""), steps)
    log.write_text(head + SEPARATOR + steps)
    figure = plot_spectral_sweep.figure(read_results([file], tmp_path / "logs"))
    ax = panel(figure, "mean ρ of attention")
    y = next(line for line in ax.lines if len(line.get_xdata()) > 2).get_ydata()
    assert min(y) < 0 < max(y) and ax.get_ylim()[0] < min(y) and max(y) < ax.get_ylim()[1]


def test_panels_without_anything_to_show_are_left_out(tmp_path):
    figure, _ = draw(tmp_path, {"x": (3.3, {"script": "train_gpt.py"})}, control=None, seeds=(1, 2))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["validation loss, nats per token"]
    assert figure.axes[0].get_window_extent().width > 0.75 * figure.bbox.width


# ------------------------------------------------------------------------------------------------
# Legibility
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_arms, seeds", [(1, (1,)), (4, (1, 2)), (12, (1, 2, 3))])
def test_nothing_overlaps(tmp_path, num_arms, seeds):
    """Panels, titles, labels and legend keep clear of each other and of the picture's edge."""
    values = [0, *[round(0.01 * 1.4**i, 3) for i in range(num_arms)]]
    arms = {f"spectral_lr_{a}": (3.27 + 0.0003 * i, {"SPECTRAL_LR_MUL": a}) for i, a in enumerate(values)}
    arms = dict(list(arms.items())[: num_arms - 1]) | {"baseline_std_0": (3.27, {"script": "train_gpt.py"})}
    if num_arms == 1:
        arms = {"spectral_lr_0.1": (3.27, {"SPECTRAL_LR_MUL": 0.1})}
    figure, results = draw(tmp_path, arms, control=None, seeds=seeds)
    assert len(results.arms) == num_arms
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    for i, a in enumerate(boxes):
        assert a.x0 >= 0 and a.y0 >= 0 and a.x1 <= figure.bbox.x1 and a.y1 <= figure.bbox.y1, i
        for b in boxes[i + 1 :]:
            assert not a.overlaps(b)
    if num_arms > 1:
        forest = figure.axes[1]
        names = [label.get_window_extent() for label in forest.get_yticklabels()]
        assert all(a.y0 >= b.y1 - 1 for a, b in zip(names[:-1], names[1:], strict=True))
        assert len({label.get_text() for label in forest.get_yticklabels()}) == num_arms
        single = [text.get_text() for text in forest.texts if "a single run" in text.get_text()]
        assert len(single) == (num_arms if len(seeds) == 1 else 0)


def test_long_names_end_within_the_page(tmp_path):
    """Fails if a name beside the end of a curve is cut by the page's edge where no panel of rho follows."""
    tag = "normuon_with_weight_decay_0.025_and_cooldown_0.7_and_lr_0.0"
    arms = {f"{tag}{i}": (3.27 + i / 100, {"script": "train_gpt.py", "MUON_LR": i}) for i in (1, 2)}
    figure, _ = draw(tmp_path, arms, control=f"{tag}1", seeds=(1, 2))
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    assert len(boxes) == 2 and all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


def test_ranked_table(tmp_path):
    """Fails if ranks, differences from lowest and a = 0, or p are not scipy's, or the control has its own.

    The lowest mean is never called best: only the test against the control makes claims.
    """
    file = make_sweep(
        tmp_path, "s", spectral_arms(0, 0.01, 0.1, 0.5), control="spectral_lr_0", seeds=(1, 2, 3, 4)
    )
    results = read_results([file], tmp_path / "logs")
    header, rows = plot_spectral_sweep.table(results)
    cells = [dict(zip(header[:9], row[:9], strict=True)) for row in rows]
    means = [float(cell["mean"]) for cell in cells]
    assert means == sorted(means) and [cell["rank"] for cell in cells] == ["1", "2", "3", "4", "5"]
    assert header[9:] == ["to a=0", "95% interval", "p (Holm)", "test", "remark"]
    losses = {arm.label: np.array(arm.samples()[0]) for arm in results.arms}
    best = cells[0]["arm"]
    assert best == "spectral_lr_0.1" and rows[0][-1] == "lowest mean" and cells[0]["to lowest"] == "-"
    for row, cell in zip(rows, cells, strict=True):
        if cell["arm"] != best:
            assert cell["to lowest"] == f"{np.mean(losses[cell['arm']] - losses[best]):+.4f}"
        if cell["arm"] == "spectral_lr_0":
            assert row[9:13] == ["-"] * 4 and row[-1] == "control"
        else:
            assert row[9] == f"{np.mean(losses[cell['arm']] - losses['spectral_lr_0']):+.4f}"
    worst = scipy_stats.ttest_rel(losses["spectral_lr_0.5"], losses["spectral_lr_0"])
    interval = worst.confidence_interval(0.95)
    assert rows[-1][10] == f"[{interval.low:+.4f}, {interval.high:+.4f}]"
    assert results.verdict.versus_control["spectral_lr_0.5"].p == pytest.approx(worst.pvalue)


def test_single_runs_are_never_best(tmp_path):
    """The lowest of single runs may be lucky rather than good."""
    file = make_sweep(tmp_path, "s", spectral_arms(0, 0.1, 0.5), control="spectral_lr_0", seeds=(1,))
    results = read_results([file], tmp_path / "logs")
    header, rows = plot_spectral_sweep.table(results)
    assert "to lowest" in header and not any("lowest mean" in cell for row in [header, *rows] for cell in row)
    assert all("a single run" in row[-1] for row in rows) and {row[8] for row in rows} == {"-"}
    text = plot_spectral_sweep.markdown(results, "x.png")
    assert ", untested: no arm has two" in text and "* Not tested against spectral_lr_0 (single runs" in text


def test_command_line(tmp_path, monkeypatch, capsys):
    """Logs are grouped by settings; picture and table are side by side; the table is also printed."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for a in (0.0, 0.1):
        for seed in (1, 2, 3):
            settings = {"spectral_lr_mul": a, "val_loss_every": 10 * seed}
            text = make_log(
                f"a{a}-{seed}", 10 * seed + int(10 * a), settings, STEPS, val_every=20, final=3.27 + a / 10
            )
            (logs / f"a{a}-{seed}.txt").write_text(
                text.replace(f'"seed": {10 * seed + int(10 * a)}', f'"seed": {seed}')
            )
    monkeypatch.chdir(tmp_path)
    assert plot_spectral_sweep.main([]) == 0
    out = capsys.readouterr().out
    picture, table = (next(logs.glob(f"spectral_sweep_*.{kind}")) for kind in ("png", "md"))
    assert re.fullmatch(r"spectral_sweep_6runs_\d{8}-\d{6}", picture.stem) and table.stem == picture.stem
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture.relative_to(tmp_path)) in out
    text, rows = table.read_text(), plot_spectral_sweep.table(read_results([logs]))[1]
    assert [(row[1], row[3]) for row in rows] == [("spectral_lr_mul=0", "3"), ("spectral_lr_mul=0.1", "3")]
    assert all(cell in text and cell in out for row in rows for cell in row)
    assert f"![the sweep]({picture.name})" in text and "Worse than spectral_lr_mul=0: " in text


def test_failed_and_missing_runs_are_in_the_table(tmp_path):
    ends = {("spectral_lr_0.1", 2): "diverged", ("spectral_lr_0", 1): "planned"}
    figure, results = draw(tmp_path, spectral_arms(0, 0.1, baseline=False), ends=ends, seeds=(1, 2, 3, 4))
    rows = {row[1]: row for row in plot_spectral_sweep.table(results)[1]}
    assert rows["spectral_lr_0.1"][-1] == "1 of 4 failed" and rows["spectral_lr_0.1"][3] == "3"
    assert "1 of 4 not ended" in rows["spectral_lr_0"][-1]
    words = texts(figure)
    assert any("1 of 4 failed" in text for text in words) and any(
        "1 of 4 not ended" in text for text in words
    )
    assert math.isnan(results.arms[1].samples()[0][-1])
