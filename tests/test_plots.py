"""plot_loss and analysis/style: plots show what was logged, legibly."""

import lzma
import math
import os
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from logs_for_tests import SEPARATOR, SOURCE, make_log
from matplotlib.figure import Figure
from matplotlib.text import Text
from sweeps_for_tests import make_sweep, spectral_arms

import plot_loss
from analysis import curves, style
from analysis.reaching import target_of
from analysis.read_results import read_results
from analysis.run_log import read_runs
from analysis.stats import summarize
from analysis.tables import format_table

STEPS = 200  # short logs: the tests look at the drawing, not at the reader


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text)
    return folder / f"{name}.txt"


def write_arms(folder, values, seeds=(1,), spread=0.02, **kwargs):
    """Write a log for each value of spectral_lr_mul and each seed."""
    for i, value in enumerate(values):
        for seed in seeds:
            name, final = f"a{value}-s{seed}", 3.25 + spread * i
            settings = {"spectral_lr_mul": value}
            text = make_log(name, seed, settings, STEPS, val_every=10, final=final, **kwargs)
            write(folder, name, text)
    return folder


def draw(folder, x="steps", target=(3.28, "--target")):
    """Draw the figure of a folder of logs; return it and its arms."""
    results = read_results([folder])
    return plot_loss.figure(results, x, target), results.arms


def panel(figure, name):
    """Return a panel of plot_loss.figure by its name."""
    return next(ax for ax in figure.axes if ax.get_label() == name)


def texts(figure):
    return [text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


# ------------------------------------------------------------------------------------------------
# What is drawn
# ------------------------------------------------------------------------------------------------


def test_panels_of_one_run(tmp_path):
    """Fails if a panel does not show the logged numbers, or the star is not where the target is first met."""
    write_arms(tmp_path / "logs", [0.1])
    figure, arms = draw(tmp_path / "logs")
    figure.draw_without_rendering()
    run = arms[0].runs[0]
    names = ("loss", "rho", "time", "lr", "betas", "batch")
    assert [ax.get_label() for ax in figure.axes] == list(names)
    loss, rho, clock, rate, betas, batch = figure.axes
    assert loss.get_title(loc="left") == "validation loss, nats per token"
    val = next(line for line in loss.lines if len(line.get_xdata()) == len(run.val) - 1)
    np.testing.assert_array_equal(val.get_xdata(), run.val.step[1:])  # not from before the first step
    np.testing.assert_array_equal(val.get_ydata(), run.val.loss[1:])
    assert 0 < loss.get_xlim()[0] <= run.val.step[1] and loss.get_xscale() == "log"
    assert loss.get_ylim()[1] < 0.8 * run.val.loss[0]  # the first drop does not flatten the rest
    assert loss.get_window_extent().width > 0.8 * figure.bbox.width
    np.testing.assert_allclose(clock.lines[0].get_ydata()[-1], run.last_time_ms / 1000)
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), run.columns["lr_mul"].value)
    np.testing.assert_array_equal(batch.lines[0].get_ydata(), run.columns["batch_size"].value)
    np.testing.assert_allclose(rho.lines[0].get_ydata(), run.columns["spec_attn"].value.mean(1))
    np.testing.assert_allclose(rho.lines[1].get_ydata(), run.columns["spec_mlp"].value.mean(1))
    assert max(rho.lines[0].get_ydata()) < 0 and rho.get_yscale() == "symlog"  # the sign is shown
    assert {line.get_ydata()[0] for line in betas.lines[:2]} == {0.5, 0.95}
    stars = [line for line in loss.lines if line.get_marker() == "*"]
    met = run.first_at(3.28)
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in stars] == [(met.step, met.loss)]
    after = f"met at step {met.step}, after {style.format_time(met.time_ms)}"
    assert f"target 3.28 (--target), {after}" in texts(figure)
    assert any(line.get_ydata()[0] == 3.28 and len(line.get_ydata()) == 2 for line in loss.lines)


def test_a_run_without_a_step_yet_takes_nothing_from_its_arm(tmp_path, monkeypatch, capsys):
    """Fails if a log that has just begun hides its arm's schedule, its target or the differences."""
    logs = write_arms(tmp_path / "logs", [0, 0.1], seeds=(2, 3))
    write(logs, "a0-s1", make_log("a0-s1", 1, {"spectral_lr_mul": 0}, STEPS, end=-1, end_event=""))
    monkeypatch.chdir(tmp_path)
    assert plot_loss.main(["logs", "--target", "3.5", "--out", "all.png"]) == 0
    out = capsys.readouterr().out
    assert "no step in this log yet" in out and "not by all" not in out
    results = read_results([logs])
    plot_loss.leave_out(results, "steps")
    figure = plot_loss.figure(results, "steps", None)
    assert panel(figure, "differences").lines and len(panel(figure, "lr").lines) == 1  # all alike


def test_a_run_under_way_shows_how_far_it_is(tmp_path):
    """Fails if the legend of a log that is still written does not give its last loss and step."""
    path = write(tmp_path / "logs", "run", make_log(num_steps=STEPS, end=120, end_event=""))
    figure, arms = draw(path)
    loss = f"{arms[0].runs[0].final_val_loss:.4f}"
    assert any(text.endswith(f": {loss}, running at step 120") for text in texts(figure))


def test_several_arms_are_compared_with_the_sweeps_control(tmp_path):
    """Arms and control have the sweep's looks, even if only some of its runs are drawn."""
    file = make_sweep(tmp_path, "lr", spectral_arms(0, 0.01, 0.1, 1), control="spectral_lr_0", val_every=20)
    results = read_results([file], tmp_path / "logs")
    runs = [run for arm in results.arms if arm.label != "spectral_lr_0.01" for run in arm.runs]
    some = read_results([run.path for run in runs])
    assert {item.arm.label: item.look for item in plot_loss.with_losses(some)} == {
        label: look for label, look in results.looks.items() if label != "spectral_lr_0.01"
    }
    controls = plot_loss.controls_of(some)
    assert set(controls.values()) == {"spectral_lr_0"} and len(controls) == 3
    ax = panel(plot_loss.figure(some, "steps", None), "differences")
    assert ax.get_title(loc="left").startswith("validation loss minus that of spectral_lr_0,")
    ends = {line.get_color(): line.get_ydata()[-1] for line in ax.lines if len(line.get_xdata()) > 2}
    for label, pair in results.verdict.versus_control.items():
        if label in controls:
            assert ends[results.looks[label]["color"]] == pytest.approx(pair.difference)


def test_without_a_log_of_the_control_only_arms_with_their_own_are_compared(tmp_path):
    """Fails if an arm is compared with the one whose control it is: a difference with its sign turned."""
    ends = {("base", seed): "planned" for seed in (1, 2, 3)}
    arms = {"base": (3.3, {}), "p": (3.28, {"MUON_LR": 1}), "q": (3.27, {"MUON_LR": 2})}
    file = make_sweep(tmp_path, "own", arms, control="base", ends=ends, versus={"q": "p"}, val_every=20)
    results = read_results([file], tmp_path / "logs")
    plot_loss.leave_out(results, "steps")
    assert plot_loss.controls_of(results) == {"q": "p"}
    ax = panel(plot_loss.figure(results, "steps", None), "differences")
    assert ax.get_title(loc="left").startswith("validation loss minus that of p,")


def test_seeds_are_pooled_with_an_interval(tmp_path):
    """Fails if mean or band differ from the statistics module's at any step, or arms are mixed."""
    write_arms(tmp_path / "logs", [0.0, 0.5], seeds=(1, 2, 3))
    figure, arms = draw(tmp_path / "logs")
    assert [len(arm.runs) for arm in arms] == [3, 3]
    line, thin = curves.lines_of(arms[0], "val_loss", curves.Axis("steps", []))
    at = len(line.x) // 2
    want = summarize([run.val.loss[at] for run in arms[0].runs])
    assert (line.y[at], line.low[at], line.high[at]) == pytest.approx((want.mean, want.low, want.high))
    assert line.x.tolist() == arms[0].runs[0].val.step.tolist() and not thin
    assert len(panel(figure, "loss").collections) == 2  # a band for each arm
    final = summarize([run.final_val_loss for run in arms[0].runs])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any(f"{final.mean:.4f} ± {final.high - final.mean:.4f} (n=3)" in text for text in legend)
    assert len(legend) == 2


def test_a_single_validation_is_visible(tmp_path):
    """Runs that validate only at the end have a one-point line."""
    for seed in (1, 2, 3):
        write(tmp_path / "logs", f"s{seed}", f"step:99/99 val_loss:3.{seed} train_time:9s\n")
    figure, _ = draw(tmp_path / "logs")
    points = [line for line in panel(figure, "loss").lines if line.get_marker() not in ("None", "*")]
    assert sorted(line.get_ydata()[0] for line in points) == [3.1, 3.2, 3.3]


def test_repeats_of_a_seed_are_one_curve(tmp_path):
    """Four runs of each of two seeds would give legend and curves the narrow interval of eight samples; that
    of two is 13 sd wide on either side, so the runs themselves are shown."""
    for number in range(4):
        for seed in (1, 2):
            for value in (0.0, 0.1):
                text = make_log("r", seed, {"spectral_lr_mul": value}, STEPS, final=3.2 + number / 1e4)
                write(tmp_path / "logs", f"a{value}-s{seed}-{number}", text)
    figure, arms = draw(tmp_path / "logs")
    axis = curves.Axis("steps", [])
    line, thin = curves.lines_of(arms[0], "val_loss", axis)
    assert line.low is None and len(thin) == 2
    np.testing.assert_allclose(line.y, np.mean([other.y for other in thin], axis=0))
    assert curves.difference_of(arms[1], arms[0], axis).low is None
    assert [text.get_text()[-5:] for text in figure.legends[0].get_texts()] == ["(n=2)"] * 2


def test_the_main_line_is_of_a_finished_run(tmp_path):
    """A first run that diverged would be the arm's thick line."""
    for seed, end in ((1, 100), (2, None)):
        last = "event:diverged" if end else "event:finished"
        text = make_log(f"s{seed}", seed, {}, STEPS, last, val_every=10, end=end)
        write(tmp_path / "logs", f"s{seed}", text)
    _, arms = draw(tmp_path / "logs")
    line, thin = curves.lines_of(arms[0], "val_loss", curves.Axis("steps", []))
    assert line.x[-1] == STEPS and [other.x[-1] for other in thin] == [100]


def test_unfinished_runs_do_not_enter_the_mean(tmp_path):
    """A run that diverged at step 100 would cut the mean short, or bend it there."""
    write_arms(tmp_path / "logs", [0.1], seeds=(1, 2, 3))
    text = make_log(
        "lost", 4, {"spectral_lr_mul": 0.1}, STEPS, val_every=10, end=100, end_event="event:diverged step:100"
    )
    write(tmp_path / "logs", "lost", text)
    figure, arms = draw(tmp_path / "logs")
    line, thin = curves.lines_of(arms[0], "val_loss", curves.Axis("steps", []))
    assert line.x[-1] == STEPS and [other.x[-1] for other in thin] == [100]
    (label,) = figure.legends[0].get_texts()
    assert label.get_text().endswith("(n=3, 1 of 4 failed)")  # it counts, as a failure
    assert curves.all_met(arms[0], 3.28) is None  # not all of its runs have met the target


def test_target_is_met_when_all_runs_of_an_arm_have_met_it(tmp_path):
    for seed, final in ((1, 3.20), (2, 3.22), (3, 3.24)):
        text = make_log(f"s{seed}", seed, {}, STEPS, val_every=10, final=final)
        write(tmp_path / "logs", f"s{seed}", text)
    arms = read_results([tmp_path / "logs"]).arms
    points = [run.first_at(3.26) for run in arms[0].runs]
    step, ms = curves.all_met(arms[0], 3.26)
    assert points[0].step < points[1].step < points[2].step == step and ms == step * 62
    assert curves.all_met(arms[0], 3.0) is None


@pytest.mark.parametrize("x", ["tokens", "time"])
def test_other_axes(tmp_path, x):
    """Against tokens or time, a loss is drawn where the log says the run was."""
    write_arms(tmp_path / "logs", [0.1])
    figure, arms = draw(tmp_path / "logs", x)
    run = arms[0].runs[0]
    line = next(line for line in panel(figure, "loss").lines if len(line.get_xdata()) == len(run.val) - 1)
    want = (run.val.tokens / 1e6 if x == "tokens" else run.val.time_ms / 1000)[1:]
    np.testing.assert_allclose(line.get_xdata(), want)
    assert panel(figure, "loss").get_xlim()[1] == pytest.approx(want[-1], rel=0.04)
    assert all({"tokens": "millions", "time": "time, s"}[x] in ax.get_xlabel() for ax in figure.axes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("x", ["steps", "tokens", "time"])
def test_a_log_of_step_0_alone(tmp_path, x):
    """Fails if matplotlib is asked for an axis from 0 to 0, of which it warns."""
    text = make_log(num_steps=STEPS, end=0, end_event="")
    draw(write(tmp_path / "logs", "run", text), x)[0].draw_without_rendering()


def test_schedules_that_agree_are_drawn_once(tmp_path):
    """Twelve equal lines on top of each other would show only the last run's colour."""
    write_arms(tmp_path / "logs", [0.0, 0.1])
    text = make_log("other", 1, {"batch_sizes": [1]}, STEPS).replace("batch_size:131072", "batch_size:65536")
    figure, _ = draw(tmp_path / "logs")
    assert sum("all alike" in text for text in texts(figure)) == 3
    write(tmp_path / "logs", "other", text)
    figure, _ = draw(tmp_path / "logs")
    assert sum("all alike" in text for text in texts(figure)) == 2 and len(panel(figure, "batch").lines) == 3
    assert "64k" in [label.get_text() for label in panel(figure, "batch").get_yticklabels()]


def test_an_arm_without_rho_is_named_below_its_panel(tmp_path):
    """Fails if "not logged" is printed over the lines, or over the text at zero."""
    write_arms(tmp_path / "logs", [0.1])
    write_arms(tmp_path / "logs", [0.2, 0.3], spec=False)
    figure, _ = draw(tmp_path / "logs")
    rho = panel(figure, "rho")
    assert rho.get_xlabel() == "step\nnot logged: spectral_lr_mul=0.2 and 1 more"
    assert all(text.get_text().startswith("ρ") for text in rho.texts)


def test_public_log_without_schedules(tmp_path):
    """Quantities not logged have no panel, the loss fills the page, and the target is the speedrun's."""
    head = SOURCE + SEPARATOR + "\nRunning\n" + SEPARATOR + "\n"
    steps = "".join(
        f"step:{s}/500 val_loss:{4 - s / 600} train_time:{s}s step_avg:9ms\n" for s in range(0, 501, 50)
    )
    write(tmp_path / "logs", "public", head + steps)
    runs = read_runs(tmp_path / "logs")
    assert target_of(runs, None) == (3.28, "the speedrun's")
    figure, _ = draw(tmp_path / "logs", target=target_of(runs, None))
    assert [ax.get_label() for ax in figure.axes] == ["loss", "time"]
    assert "training time, min" in texts(figure)
    write(tmp_path / "logs", "public", "step:10/10 val_loss:3.1\n")
    figure, _ = draw(tmp_path / "logs")
    assert [ax.get_label() for ax in figure.axes] == ["loss"]


def test_no_target_without_a_reason(tmp_path):
    """3.28 means nothing for a run on other data."""
    runs = read_runs(write_arms(tmp_path / "logs", [0.1]))
    assert target_of(runs, None) is None and target_of(runs, 3.0) == (3.0, "--target")
    figure, _ = draw(tmp_path / "logs", target=None)
    assert not any("target" in text for text in texts(figure))


# ------------------------------------------------------------------------------------------------
# Legibility
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_arms", [1, 4, 12, 30])
def test_nothing_overlaps(tmp_path, num_arms):
    """Legend, titles and axis labels keep clear of each other and of the edge of the picture."""
    values = [round(0.01 * i, 2) for i in range(num_arms)]
    write_arms(tmp_path / "logs", values, spread=0.0004)  # the ends of the lines are close together
    figure, arms = draw(tmp_path / "logs")
    figure.draw_without_rendering()
    assert len(arms) == num_arms
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    boxes.append(figure.legends[0].get_window_extent())
    for i, a in enumerate(boxes):
        assert a.x0 >= 0 and a.y0 >= 0 and a.x1 <= figure.bbox.x1 and a.y1 <= figure.bbox.y1, i
        for b in boxes[i + 1 :]:
            assert not a.overlaps(b)
    if num_arms > 1:
        ax = panel(figure, "differences")
        ends = sorted((Text.get_window_extent(text) for text in ax.texts), key=lambda box: box.y0)
        assert len(ends) == num_arms  # the control's, too
        for below, above in zip(ends[:-1], ends[1:], strict=True):
            assert above.y0 >= below.y0 + 0.6 * below.height
        assert ends[-1].y1 < ax.get_tightbbox().y1 and ends[0].y0 > ax.get_tightbbox().y0 - 1
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(legend)) == num_arms


def test_runs_that_differ_in_much_go_by_one_setting(tmp_path):
    """Ten settings make no label; one suffices for two runs, and a note names the others, and the script."""
    for number, name in enumerate(("first", "second")):
        settings = {"muon_weight_decay": number, "residual_scale": 0.7 + number, "warmup_steps": number}
        text = make_log(name, 1, settings, STEPS, script=("train_gpt.py", "train_gpt_muon_ord.py")[number])
        write(tmp_path / "logs", name, text)
    figure, _ = draw(tmp_path / "logs")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.split(":")[0] for text in legend] == ["warmup_steps=0", "warmup_steps=1"]
    (note,) = read_results([tmp_path / "logs"]).notes
    assert "muon_weight_decay, residual_scale, script," in note and "warmup_steps" not in note


def test_a_failed_run_does_not_flatten_the_others(tmp_path):
    """Fails if differences of 0.02 and of 3.7 are not both visible on one axis."""
    write_arms(tmp_path / "logs", [0.0, 0.1, 0.2])
    bad = make_log("bad", 1, {"spectral_lr_mul": 9.0}, STEPS, val_every=10, final=7.0)
    write(tmp_path / "logs", "bad", bad)
    figure, _ = draw(tmp_path / "logs")
    ax = panel(figure, "differences")
    places = {
        text.get_text(): text.xyann[1] for text in ax.texts
    }  # heights of the names beside the ends of the lines
    assert ax.get_yscale() == "symlog" and places["spectral_lr_mul=0.1"] - places["spectral_lr_mul=0"] > 0.1


def test_styles_are_distinct_also_for_the_colour_blind():
    """Arms differ in colour or marker, from the control in both; colours are distinct for every dichromat."""
    names = [f"a{number}" for number in range(19)]
    looks = style.looks_of(names, "a3")
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 19
    assert [name for name in names if looks[name]["color"] == "#000000" or looks[name]["marker"] == "o"] == [
        "a3"
    ]
    many = [look["color"] for look in style.looks_of([f"a{number}" for number in range(30)]).values()]
    lightness = [int(c[1:3], 16) * 0.3 + int(c[3:5], 16) * 0.59 + int(c[5:], 16) * 0.11 for c in many]
    assert lightness == sorted(lightness) and len(set(many)) == 30 and lightness[-1] < 210
    colours = [*style.COLOURS, looks["a3"]["color"]]
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    protan = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]  # Machado et al. 2009
    deutan = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    tritan = [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]
    for matrix in (np.eye(3), protan, deutan, tritan):
        seen = np.clip(linear @ np.transpose(matrix), 0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=2) + np.eye(len(seen))
        assert distance.min() > 0.11  # least for blue and green without blue cones; markers differ, too
    assert all(seen.max() < 0.97 for seen in rgb)  # visible on white


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, monkeypatch, capsys):
    """The newest log is drawn to logs/RUN_ID.png; the summary has its numbers."""
    write_arms(tmp_path / "logs", [0.1])
    log = write(tmp_path / "logs", "newest", make_log("newest", 5, num_steps=STEPS) + "some noise\n")
    os.utime(log, (2e9, 2e9))
    monkeypatch.chdir(tmp_path)
    assert plot_loss.main([]) == 0
    out = capsys.readouterr().out
    run = read_runs(log)[0]
    assert (tmp_path / "logs" / "newest.png").read_bytes().startswith(b"\x89PNG")
    row = next(line for line in out.splitlines() if line.startswith("newest")).split()
    assert row[1:6] == ["finished", "5", "200/200", f"{run.final_val_loss:.4f}", f"{run.best_val_loss:.4f}"]
    assert "at step" not in out and "newest.txt: 1 lines could not be read, such as" in out
    assert not [path.name for path in (tmp_path / "logs").iterdir() if path.name.startswith(".")]


def test_a_packed_log_names_its_files_like_a_plain_one(tmp_path, capsys):
    """Fails if the picture of run.txt.xz is run.txt.png, or its report is in run.txt/."""
    log = write(tmp_path / "logs", "run", make_log("run", 5, num_steps=STEPS))
    packed = log.with_name("run.txt.xz")
    packed.write_bytes(lzma.compress(log.read_bytes()))
    log.unlink()
    assert plot_loss.main([str(packed)]) == 0 and (tmp_path / "logs" / "run.png").exists()
    assert read_results([packed]).name == "run"


def test_own_target_and_different_sources(tmp_path, capsys):
    """The runs' own TARGET_LOSS is used if they agree; runs of edited code are compared, not pooled."""
    for seed, source in ((1, SOURCE), (2, SOURCE + "# edited\n")):
        text = make_log(f"s{seed}", seed, {"target_loss": 3.5}, STEPS, source=source)
        write(tmp_path / "logs", f"s{seed}", text)
    figure, _ = draw(tmp_path / "logs")
    assert len(figure.legends[0].get_texts()) == 2 and panel(figure, "differences").lines
    assert plot_loss.main([str(tmp_path / "logs"), "--out", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "3.5 at step" in out and "not pooled: s1, s2" in out and "n=2" not in out


def test_runs_without_the_axis_are_left_out_and_named(tmp_path, capsys):
    folder = write_arms(tmp_path / "logs", [0.1])
    write(folder, "llmc", "s:0 tel:9.0\ns:1 trl:8.5\ns:2 tel:8.0\n")
    write(folder, "empty", "")
    assert plot_loss.main([str(folder), "--x", "time", "--out", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "llmc.txt: no training time in this log" in out and "empty.txt: no step in this log yet" in out


def test_every_run_on_its_own_and_the_runs_of_a_sweep(tmp_path, capsys):
    """Fails if --separate pools, a sweep's file gives another picture than its logs, or the same picture
    twice is not the same file, which would change a plot in version control."""
    file = make_sweep(tmp_path, "lr", spectral_arms(0, 0.1), control="spectral_lr_0", val_every=50)
    logs = tmp_path / "logs"
    for name, more in (("pooled.pdf", []), ("single.svg", ["--separate"])):
        pictures = [tmp_path / f"{number}{name}" for number in (1, 2)]
        assert plot_loss.main([str(logs), "--out", str(pictures[0]), *more]) == 0
        assert plot_loss.main([str(file), "--logs", str(logs), "--out", str(pictures[1]), *more]) == 0
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
    out = capsys.readouterr().out
    assert out.count("\nspectral_lr_0.1 seed=2 ") == 4, "a table of the runs each, by the pictures' names"
    assert len(re.findall(r"\nspectral_lr_0\.1 +3\.", out)) == 2, "two tables of arms"
    assert ElementTree.parse(pictures[0]).getroot().tag.endswith("svg")


# ------------------------------------------------------------------------------------------------
# Units and names
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ms, text",
    [
        (830, "830 ms"),
        (12_340, "12.3 s"),
        (245_000, "4 min 05 s"),
        (12_000_000, "3 h 20 min"),
        (math.nan, "-"),
    ],
)
def test_format_time(ms, text):
    assert style.format_time(ms) == text


def test_shorten_keeps_both_ends():
    name = "lrmul-1-1.52-spectral_lr_0.1-20260206-seed2"
    for width in range(1, 60):
        assert len(style.shorten(name, width)) == min(width, len(name))
    assert style.shorten(name, 21) == "lrmul-1-1.…0206-seed2"


def test_format_table():
    table = format_table(["run", "loss"], [["a", 3.25], ["long name", "-"]])
    assert table.splitlines() == ["run        loss", "---------  ----", "a          3.25", "long name     -"]


def test_the_interval_of_a_single_validation_is_drawn_and_within_the_limits():
    """Else a picture promises an interval that nobody sees."""
    one = np.array([1.0])
    line = curves.Line(np.array([290]), 290 * one, one, 0.9 * one, 1.2 * one)
    low, high = curves.loss_limits([line])
    assert low < 0.9 and high > 1.2
    ax = Figure().subplots()
    curves.draw_lines(ax, line, [], {"color": "black"})
    assert ax.collections[0].get_linewidth() > 0
