"""plot_lr_analysis and make_record: labels follow their rules, luck is not a win, records restore exactly."""

import contextlib
import csv
import importlib
import io
import json
import lzma
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from logs_for_tests import make_log, with_files
from sweeps_for_tests import STEPS, make_sweep

import make_record
import plot_lr_analysis
from analysis import rates
from analysis.rate_pictures import PICTURES
from analysis.rates import analyse as analyse_results
from analysis.rates import diverged, start_of
from analysis.reaching import smoothed
from analysis.read_results import read_results
from analysis.results import Attempt, Results, SweepArm
from analysis.run_log import Curve, format_value, list_logs, parse_log, read_log, read_runs, read_with_sources
from analysis.stats import contenders
from analysis.tables import as_json

ROOT = Path(plot_lr_analysis.__file__).parent
LOSSES = {0.001: 6.0, 0.01: 4.0, 0.03: 3.3, 0.05: 3.3005, 0.08: 3.4, 0.2: 5.0, 0.5: 6.0, 0.8: 7.0, 1.0: 8.0}
ENDS = {("lr_0.5", 2): "diverged", **{("lr_1", seed): "diverged" for seed in (1, 2, 3)}}
ENDS |= {("lr_0.8", seed): "crashed" for seed in (1, 2, 3)}


def arms_of(losses, **more):
    return {
        f"lr_{rate:g}": (loss, {"script": "train_gpt.py", "MUON_LR": rate, "ADAM_LR": 0.1 * rate, **more})
        for rate, loss in losses.items()
    }


def analyse(tmp_path, losses=LOSSES, ends=ENDS, asked=None, conditions=(), **kwargs):
    file = make_sweep(tmp_path, "lr", arms_of(losses), ends=ends, val_every=40, **kwargs)
    return analyse_results(read_results([file], tmp_path / "logs"), asked, conditions)


def test_labels_follow_their_rules(tmp_path):
    """The fall is from 10.8 to 3.3: good is at most 0.15 above the best; crashes are not divergence."""
    analysis = analyse(tmp_path)
    labels = {rate.value: rate.label for rate in analysis.rates}
    assert labels == {
        0.001: "too low",
        0.01: "too low",
        0.03: "optimal",
        0.05: "optimal",
        0.08: "good",
        0.2: "declining",
        0.5: "unstable",
        0.8: "no result",
        1.0: "diverged",
    }
    assert analysis.setting == "muon_lr" and analysis.results.tied("muon_lr") == ["adam_lr"]
    assert analysis.fall == pytest.approx(7.5, abs=0.02)
    found = json.loads(as_json(plot_lr_analysis.insights(analysis)))
    assert found["stable_range"] == [0.001, 0.2] and found["divergence_threshold"] == 0.5
    assert found["good_range"] == [0.03, 0.08] and found["range_tested"] == [0.001, 1.0]
    assert found["top_20_percent"]["rates"] == [0.03, 0.05] and found["counts"]["diverged"] == 4
    best = found["best_by_loss"]
    assert found["found"][0].startswith("lowest loss: "), "not the best: two are tied"
    others = {0.03, 0.05} - {best["rate"]}
    assert set(best["cannot_be_told_from"]) == others and best["n"] == 3 and not best["single_run"]
    rate = next(rate for rate in analysis.rates if rate.value == best["rate"])
    losses = [attempt.loss for attempt in rate.arm.attempts]
    assert best["mean"] == pytest.approx(np.mean(losses)) and best["sd"] == pytest.approx(
        np.std(losses, ddof=1)
    )
    assert rate.perplexity == pytest.approx(np.exp(np.mean(losses)))
    assert rate.status == "3 finished" and analysis.rates[6].status == "2 finished, 1 diverged"


def test_a_run_that_lost_and_learnt_again_is_unstable(tmp_path):
    """Near the limit the loss rises by nats and falls again with the cooldown: not a rate to recommend."""
    file = make_sweep(tmp_path, "lr", arms_of({0.01: 3.4, 0.02: 3.3, 0.04: 3.35}), val_every=40)
    log = next(path for path in list_logs(tmp_path / "logs") if "lr_0.04" in path.name)
    lines = log.read_text().split("\n")
    place = next(i for i, line in enumerate(lines) if line.startswith(f"step:120/{STEPS} val_loss:"))
    lines[place] = lines[place].replace(lines[place].split()[1], "val_loss:5.50000")
    log.write_text("\n".join(lines))
    analysis = analyse_results(read_results([file], tmp_path / "logs"))
    assert [rate.label for rate in analysis.rates] == ["good", "optimal", "unstable"]


@pytest.mark.parametrize("loss, is_lost", [(3.3, False), (12.0, True)])
def test_a_run_first_validated_late_began_where_its_training_began(loss, is_lost):
    """A run whose last validations are level would count as diverged with VAL_LOSS_EVERY=0."""
    text = make_log(num_steps=STEPS, val_every=STEPS, last=20)
    (run,) = parse_log(re.sub(r"^step:0/.*\n", "", text, flags=re.M))
    assert run.val.step.tolist() == [STEPS - 10, STEPS] and run.train.step[0] == 1
    attempt = Attempt("x", 1, "finished", loss, log=run)
    assert start_of(attempt) == run.train.loss[0] and diverged(attempt) == is_lost


def test_a_value_with_a_failed_run_is_not_tested(tmp_path):
    """Fails if survivors with a lower mean are worse than the best, near a limit, or the most accurate."""
    losses, ends = {0.01: 3.4, 0.02: 3.3, 0.04: 3.2}, {("lr_0.04", 2): "crashed"}
    analysis = analyse(tmp_path, losses, ends)
    text = plot_lr_analysis.markdown(analysis)
    assert "every other value tested is worse; not tested (single or failed runs): 0.04" in text
    assert analysis.rates[2].sure is None and "near the limit" not in text
    assert "* Highest mean accuracy, untested: MUON_LR = 0.02 (" in text
    assert (
        plot_lr_analysis.insights(analysis)["highest_mean_accuracy"]["mean"]
        == analysis.rates[1].accuracy.mean
    )
    assert analysis.rates[2].accuracy.mean > analysis.rates[1].accuracy.mean


def test_single_runs_are_called_so(tmp_path):
    """Single runs say nothing about luck: the lowest rate is named, with the remark that it may be luck."""
    analysis = analyse(tmp_path, {0.01: 3.4, 0.02: 3.3, 0.04: 3.3001}, {}, seeds=(1,))
    best = plot_lr_analysis.insights(analysis)["best_by_loss"]
    assert best["single_run"] and best["cannot_be_told_from"] is None
    assert "optimal" not in {rate.label for rate in analysis.rates} and analysis.rates[0].sure is None
    text = plot_lr_analysis.markdown(analysis)
    assert "a single run); how much runs differ by luck is unknown" in text
    combined = PICTURES["combined_lr_analysis"](analysis)
    assert not any(ax.patches for ax in combined.axes), "no value is shaded as optimal"
    (caption,) = combined.texts
    assert "below" not in caption.get_text(), "there are no panels below"


def test_a_single_run_is_not_the_best_of_several(tmp_path):
    """Fails if a lucky run is called the best, tied with the best, or drawn as a mean with an interval."""
    file = make_sweep(tmp_path, "lr", arms_of({0.01: 3.4, 0.02: 3.3, 0.04: 3.2}), val_every=40)
    results = read_results([file], tmp_path / "logs")
    lucky = results.arms[2]
    lucky.attempts, lucky.runs = lucky.attempts[:1], lucky.runs[:1]
    analysis = analyse_results(results)
    text = plot_lr_analysis.markdown(analysis)
    assert [rate.label for rate in analysis.rates] == ["too low", "good", "good"]
    assert not re.search("(cannot be|not) told from|is worse|(?i:best by)", text.partition("Labels,")[0])
    said = "Lowest loss: MUON_LR = 0.04 (3.1994, a single run); not tested (single or failed runs): 0.04"
    assert said in text and "no run above 0.04 diverged" in text.lower() and "the loss of 0.04 fell" in text
    best = plot_lr_analysis.insights(analysis)["best_by_loss"]
    assert (best["rate"], best["single_run"], best["cannot_be_told_from"]) == (0.04, True, None)
    for record in plot_lr_analysis.final_results(analysis)["results"]:
        assert record["not_told_from_best"] is None and record["label_is_sure"] is None
    combined = PICTURES["combined_lr_analysis"](analysis)
    assert "tied with" not in combined.texts[0].get_text()
    ax = next(ax for ax in combined.axes if "minus" in ax.get_title("left"))
    assert "0.04, a single run" in ax.get_title("left")
    (mark,) = [line for line in ax.lines if list(line.get_xdata()) == [0.04]]
    assert mark.get_markerfacecolor() == "white"
    assert not [line for line in ax.lines if list(line.get_xdata()) == [0.04] * 2]


def test_the_worst_value_is_not_best_for_being_repeated(tmp_path):
    """Fails if labels are held against the only value of several runs, as the default's often is."""
    losses = {0.001: 6.0, 0.01: 3.4, 0.02: 3.0, 0.04: 3.1}
    once = {(f"lr_{rate:g}", seed): "planned" for rate in losses for seed in (2, 3)}
    del once["lr_0.001", 2]
    under_way = analyse(tmp_path, losses, once)
    whole = under_way.results
    for arm in whole.arms:
        arm.attempts = [attempt for attempt in arm.attempts if attempt.state == "finished"]
    for analysis in (under_way, analyse_results(whole)):
        assert [rate.label for rate in analysis.rates] == ["too low", "too low", "good", "good"]
        found = plot_lr_analysis.insights(analysis)
        assert found["good_range"] == [0.02, 0.04] and found["fall"] == pytest.approx(7.8, abs=0.02)
        assert found["best_by_loss"]["rate"] == 0.02 and found["best_by_loss"]["single_run"]
        assert "Best by" not in plot_lr_analysis.markdown(analysis)


def test_nothing_is_worse_while_runs_are_missing(tmp_path):
    """Fails if a sweep under way makes claims, which checking after every run turns up in most sweeps."""
    losses, ends = {0.01: 3.4, 0.02: 3.3, 0.03: 3.3, 0.04: 3.5}, {("lr_0.04", 3): "planned"}
    analysis = analyse(tmp_path, losses, ends)
    text = plot_lr_analysis.markdown(analysis)
    assert not re.search("optimal|not told|near the limit", text.partition("Labels,")[0])
    assert plot_lr_analysis.insights(analysis)["best_by_loss"]["cannot_be_told_from"] is None
    for record in plot_lr_analysis.final_results(analysis)["results"]:
        assert record["not_told_from_best"] is None and record["label_is_sure"] is None
    assert "1 of 12 runs has not ended: this is how it stands so far" in text
    assert "Lowest loss: MUON_LR = 0.0" in text
    assert not re.search("is worse|cannot be told from|not tested", text.partition("|")[0])


def analyse_losses(losses):
    """Analyse made-up final losses, by value and seed, of runs that began at 10; NaN: the run crashed."""
    arms = []
    for rate, few in losses.items():
        states = ["finished" if np.isfinite(loss) else "crashed" for loss in few]
        attempts = [Attempt("", seed, *end) for seed, end in enumerate(zip(states, few, strict=True))]
        arms.append(SweepArm(f"{rate}", f"{rate}", [], attempts, settings={"muon_lr": rate}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "start_of", lambda attempt: 10.0)
        return analyse_results(Results("made-up", arms))


def labels_of(losses):
    return [rate.label for rate in analyse_losses(losses).rates]


def test_what_the_runs_of_a_seed_share_makes_no_value_unstable():
    """Fails if spreads with the seeds' effect are held against a noise without it, or seeds are mixed up."""
    luck = np.array([3.0, 3.5, 4.0])
    losses = {0.01: luck + [0, 0.001, 0], 0.02: luck + [0, 0, 0.001], 0.03: luck + [0.001, 0, 0]}
    losses |= {0.04: luck + [0, 0.5, 0], 0.05: luck + [np.nan, 0.001, 0], 0.06: luck + [0.5, np.nan, 0]}
    assert [label == "unstable" for label in labels_of(losses)] == [False, False, False, True, False, True]


def test_a_value_with_a_failed_run_is_unstable_by_its_spread():
    """Fails if a crashed run hides that the others are far apart."""
    losses = {0.01: [3.0, 3.004, 3.002], 0.02: [3.1, 3.101, 3.106], 0.04: [2.75, 3.25, np.nan]}
    assert labels_of(losses) == ["optimal", "good", "unstable"]


def test_nothing_to_compare_with_makes_no_value_unstable():
    """Fails if a crash in each value, as of one bad machine, reads as instability of all learning rates."""
    assert labels_of({0.01: [3.0, 3.1, np.nan], 0.02: [np.nan, 3.1, 3.2]}) == ["no result"] * 2


def test_what_was_not_tested_is_null():
    """Fails if final_results.json says `false` of single and failed runs, as if a test had found it."""
    analysis = analyse_losses({0.01: [3.0, 3.01], 0.02: [3.5, 3.51], 0.04: [3.6], 0.08: [3.7, np.nan]})
    records = plot_lr_analysis.final_results(analysis)["results"]
    assert [record["label_is_sure"] for record in records] == [True, True, None, None]
    assert [record["not_told_from_best"] for record in records] == [True, False, None, None]


def test_without_a_best_value_nothing_is_above_it(tmp_path):
    """Fails if a sentence names the lowest value above the best where no value can be called best."""
    losses = {0.01: 3.4, 0.02: 3.3, 0.04: 9.0}
    ends = {("lr_0.01", 1): "crashed", ("lr_0.02", 1): "diverged"}
    ends |= {("lr_0.04", seed): "diverged" for seed in (1, 2, 3)}
    analysis = analyse(tmp_path, losses, ends)
    text = plot_lr_analysis.markdown(analysis)
    assert "No value can be called best" in text and not re.search("run above|first diverged", text)
    assert plot_lr_analysis.insights(analysis)["divergence_threshold"] is None


def test_pictures_without_a_finished_run(tmp_path):
    """Fails if a sweep whose runs all crashed has no picture of how far they came."""
    ends = {(f"lr_{rate}", seed): "crashed" for rate in (0.01, 0.02) for seed in (1, 2)}
    analysis = analyse(tmp_path, {0.01: 3.4, 0.02: 3.3}, ends, seeds=(1, 2))
    for draw in PICTURES.values():
        draw(analysis).draw_without_rendering()
    text = plot_lr_analysis.markdown(analysis)
    assert "Labels:" in text and not re.search(r"\bnan\b", text), "how far no loss fell is left out"


def test_the_best_at_the_edge_is_said(tmp_path):
    analysis = analyse(tmp_path, {0.01: 3.4, 0.02: 3.3, 0.04: 3.2}, {})
    assert plot_lr_analysis.insights(analysis)["best_by_loss"]["edge_of_the_range"] == "highest"
    assert "a better one may lie beyond" in plot_lr_analysis.markdown(analysis)


@pytest.mark.parametrize("luck", [0.0, 0.014])
def test_the_true_best_is_among_the_contenders(luck):
    """Fails if it is missed in over 5% (plus a margin) of 150 sweeps of 12 arms, or a bad arm is included."""
    rng = np.random.default_rng(20261124)
    means = {f"a{i}": 3.3 + 0.002 * abs(i - 5) for i in range(12)} | {"far": 3.5}
    missed, far = 0, 0
    for _ in range(150):
        shared = luck * rng.normal(size=3)
        losses = {name: mean + shared + 0.005 * rng.normal(size=3) for name, mean in means.items()}
        found = contenders(losses, dict.fromkeys(means, (1, 2, 3)) if luck else None)
        missed += "a5" not in found.names
        far += "far" in found.names
        assert found.paired == bool(luck) and found.names[0] == found.lowest
    assert missed <= 13 and far == 0


def test_contenders_without_noise_or_with_failures():
    """Failed arms cannot be best; with unknown spread, only the lowest is named and df is 0."""
    found = contenders({"a": [3.0, np.nan], "b": [3.1, 3.12], "c": [3.11, 3.13], "d": [9.0, 9.1]})
    assert found.lowest == "b" and "a" not in found.names and "c" in found.names and "d" not in found.names
    single = contenders({"a": [3.0], "b": [3.0001]})
    assert single.names == ("a",) and single.df == 0 and np.isnan(single.half_width("a", "b"))
    assert contenders({}).lowest is None


def test_everything_is_written_and_the_same_again(tmp_path, monkeypatch, capsys):
    """Fails if an output listed in EXPERIMENTS.md is missing, or tables depend on time or folder."""
    arms = arms_of({0.015: 3.4, 0.065: 3.3, 1.0: 6})
    make_sweep(tmp_path, "lr", arms, val_every=40, ends={("lr_1", 1): "diverged"})
    monkeypatch.chdir(tmp_path)
    files = {}
    for _ in range(2):
        assert plot_lr_analysis.main(["sweeps/lr.toml"]) == 0
        for path in sorted((tmp_path / "logs" / "lr" / "lr_analysis").rglob("*.*")):
            name = str(path.relative_to(tmp_path / "logs" / "lr" / "lr_analysis"))
            assert files.setdefault(name, path.read_bytes()) == path.read_bytes(), name
            path.unlink()
    assert set(files) == {
        "results.md",
        "results.csv",
        "final_results.json",
        "comprehensive_insights.json",
        *(f"{name}.png" for name in PICTURES),
    }
    for name, data in files.items():
        assert data.startswith(b"\x89PNG") if name.endswith(".png") else str(tmp_path).encode() not in data
    rows = list(csv.DictReader(files["results.csv"].decode().splitlines()))
    records = json.loads(files["final_results.json"])["results"]
    for row, record in zip(rows, records, strict=True):
        assert float(row["loss"]) == record["loss"] and row["label"] == record["label"]
        assert f"{record['loss']:.4f}" in files["results.md"].decode()
        assert {"rate", "loss", "accuracy", "perplexity", "time_minutes", "status"} <= set(record)
    assert "best by loss: MUON_LR = 0.065" in capsys.readouterr().out


def test_values_look_as_in_the_report_and_differ_from_the_best(tmp_path):
    """A colour per label would conflict with the arms' colours in other pictures."""
    analysis = analyse(tmp_path, ends={})
    combined, sheet = (draw(analysis) for draw in PICTURES.values())
    panels = combined.axes
    marks = {
        (line.get_xdata()[0], line.get_color()) for line in panels[0].lines if len(line.get_xdata()) == 1
    }
    assert marks == {(rate.value, analysis.results.looks[rate.name]["color"]) for rate in analysis.rates}
    best = analysis.lowest()
    below = next(ax for ax in panels if "the lowest mean" in ax.get_title(loc="left"))
    drawn = {line.get_xdata()[0]: line.get_ydata()[0] for line in below.lines if len(line.get_xdata()) == 1}
    for rate in analysis.rates:
        assert drawn[rate.value] == pytest.approx(rate.loss.mean - best.loss.mean)
    titles = [ax.get_title() or ax.get_title(loc="left") for ax in sheet.axes]
    assert titles == [f"{format_value(r.value)}: {r.label}, {r.loss.mean:.3f}" for r in analysis.rates]


@pytest.mark.parametrize("num_values", [2, 9])
def test_captions_are_whole(tmp_path, num_values):
    """Fails if the line below narrow pictures, of losses alone or of few values, is cut at both ends."""
    arms = arms_of(dict(list(LOSSES.items())[:num_values]))
    file = make_sweep(tmp_path, "lr", arms, seeds=(1, 2), val_every=40)
    for log in list_logs(tmp_path / "logs"):
        log.write_text(re.sub(r" val_acc:\S+", "", log.read_text()))
    analysis = analyse_results(read_results([file], tmp_path / "logs"))
    for draw in PICTURES.values():
        figure = draw(analysis)
        figure.draw_without_rendering()
        (caption,) = figure.texts
        assert draw is PICTURES["all_lr_loss_vs_steps"] or "two runs are drawn without" in caption.get_text()
        box = caption.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        panels = [ax.get_tightbbox().y0 for ax in figure.axes]
        assert 0 <= box.y0 and box.y1 <= min(panels), "below all panels"


def test_any_setting_and_what_to_choose(tmp_path, monkeypatch, capsys):
    """Two arms of one value are not mixed: the message names the condition that distinguishes them."""
    arms = {
        f"{mode}_{wd}": (3.3 + wd, {"MUON_DECAY_MODE": mode, "MUON_WEIGHT_DECAY": wd})
        for mode in ("param", "update")
        for wd in (-0.1, 0.0, 0.1)
    }
    file = make_sweep(tmp_path, "decay", arms, val_every=100)
    results = read_results([file], tmp_path / "logs")
    with pytest.raises(
        ValueError, match="both have MUON_WEIGHT_DECAY=-0.1: .*--where MUON_DECAY_MODE=update"
    ):
        analyse_results(results)
    analysis = analyse_results(results, None, ["MUON_DECAY_MODE=param"])
    assert [rate.value for rate in analysis.rates] == [-0.1, 0.0, 0.1]
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--setting", "MUON_LR"], "it is not a number that varies in decay; numbers that vary: MUON_WEIGHT"),
        (["--where", "MUON_DECAY_MODE=none"], "MUON_DECAY_MODE is one of param, update"),
    ):
        assert plot_lr_analysis.main(["sweeps/decay.toml", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_tied_settings_are_one(tmp_path):
    """Fails if a sweep of MUON_LR with ADAM_LR = 0.1 x says that its values differ also in ADAM_LR."""
    analysis = analyse(tmp_path, ends={})
    assert analysis.setting == "muon_lr" and not any("differ also" in note for note in analysis.notes)


def test_smoothed_training_loss_by_hand():
    """Fails if the mean is not over 2% of the run's steps, however often they were logged."""
    step = np.arange(1, 101)
    curve = Curve(step, step.astype(float), 10.0 * step, 100.0 * step, np.full(100, np.nan))
    found = smoothed(curve)
    assert found.step.tolist() == list(range(2, 101)) and found.loss.tolist() == (found.step - 0.5).tolist()
    sparse = Curve(*(getattr(curve, name)[9::10] for name in ("step", "loss", "time_ms", "tokens", "acc")))
    assert smoothed(sparse).loss.tolist() == list(range(20, 101, 10))


# ------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------


RECORDS = sorted(path.parent for path in (ROOT / "records").glob("*/record.toml"))


@pytest.fixture
def tools_here(monkeypatch):
    """Let make_record call its tools in this process, which has scipy and matplotlib already."""

    def call(command, cwd, **_):
        _, script, *arguments = command
        with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()):
            code = importlib.import_module(Path(script).stem).main(arguments)
        return subprocess.CompletedProcess(command, code, stderr="")

    monkeypatch.setattr(make_record, "subprocess", SimpleNamespace(run=call))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_comes_back_byte_for_byte(record, tools_here, capsys):
    """Fails if a tool's output for committed logs changed, or a table was edited by hand."""
    assert make_record.main([str(record), "--check"]) == 0
    out = capsys.readouterr().out
    tables = {path.relative_to(record) for path in record.rglob("*") if path.suffix in make_record.TABLES}
    made = {path for path in tables if path.parts[0] != "logs" and path.name != "README.md"}
    assert Path("REPORT.md") in made and Path("summary.json") in made
    assert [f"{path}: the same" for path in sorted(made) if f"{path}: the same" not in out] == []


def test_a_new_record_of_packed_logs(tmp_path, monkeypatch, capsys):
    """Fails if packed logs read differently from plain ones, or a changed table or source goes unnoticed."""
    make_sweep(tmp_path, "lr", arms_of({0.01: 3.4, 0.02: 3.3, 0.04: 3.35}), val_every=100, seeds=(1, 2))
    monkeypatch.chdir(tmp_path)
    logs = list_logs("logs")
    # two logs that name their files, and others, which stay whole
    files = {"train_gpt.py": "import os\n\n\ndef f():\n    pass\n", "runtime/ranks.py": "x = 1\n"}
    for log in logs[:2]:
        log.write_text(with_files(log.read_text(), files))
        files = {**files, "runtime/ranks.py": "x = 2\n"}
    new = ["records/x", "--new", "sweeps/lr.toml", "--also", "plot_lr_analysis.py lr.toml --out ."]
    assert make_record.main(new) == 0
    record = Path("records/x")
    packed = list_logs(record / "logs")
    assert [path.name for path in packed] == [f"{path.name}.xz" for path in logs]
    for before, after in zip(read_runs("logs"), read_runs(record / "logs"), strict=True):
        np.testing.assert_array_equal(before.val.loss, after.val.loss)
        assert (before.run_id, before.config, before.events) == (after.run_id, after.config, after.events)
        assert (before.source_hash, after.unread_lines) == (after.source_hash, 0)
    assert len(list((record / "logs" / "sources").iterdir())) == 2
    for before, after in zip(logs, packed, strict=True):
        stripped = lzma.decompress(after.read_bytes())
        assert (len(stripped) < before.stat().st_size) == (before in logs[:2])
        assert read_with_sources(after) == before.read_bytes()
    assert (record / "results.md").exists() and (record / "REPORT.md").exists()
    assert make_record.main(["records/y", "--new", "sweeps/lr.toml", "--logs", "records/x/logs"]) == 0
    for before, after in zip(logs, list_logs("records/y/logs"), strict=True):
        assert read_with_sources(after) == before.read_bytes(), "as the first record's"
    shutil.rmtree("logs")
    kept = next((record / "logs" / "sources").iterdir())
    source = lzma.decompress(kept.read_bytes())
    kept.write_bytes(lzma.compress(source.replace(b"def", b"fed", 1)))
    assert make_record.main(["records/x", "--check"]) == 2
    assert f"{kept.name} was changed" in capsys.readouterr().err
    kept.write_bytes(lzma.compress(source))
    table = record / "results.csv"
    table.write_text(table.read_text().replace("good", "best"))
    assert make_record.main(["records/x", "--check"]) == 1
    assert "results.csv: differs" in capsys.readouterr().out
    assert make_record.main(["records/x", "--new", "sweeps/lr.toml"]) == 2


@pytest.mark.parametrize("also", ["export_runs.py none --to csv", "plot_loss.py 'lr", "rm -r .", ""])
def test_a_record_that_fails_leaves_no_folder(tmp_path, monkeypatch, tools_here, capsys, also):
    """Fails if `--new`, called again with the mistake mended, says that the record exists already."""
    make_sweep(tmp_path, "lr", arms_of({0.01: 3.4, 0.02: 3.3}), val_every=100, seeds=(1, 2))
    monkeypatch.chdir(tmp_path)
    assert make_record.main(["records/x", "--new", "sweeps/lr.toml", "--also", also]) == 2
    assert capsys.readouterr().err and not Path("records/x").exists()


@pytest.mark.parametrize(
    "recipe, message",
    [
        (None, "no records/x/record.toml"),
        ("commands = 3", "wanted commands ="),
        ('commands = ["rm -r ."]', "rm is none of the tools"),
        ('commands = ["../x.py"]', "../x.py is none of the tools"),
        ("commands = [", "is not valid TOML"),
        ('commands = ["report_sweep.py none.toml"]', "no sweep file none.toml"),
    ],
)
def test_errors_speak_to_a_person(tmp_path, monkeypatch, capsys, recipe, message):
    monkeypatch.chdir(tmp_path)
    Path("records/x").mkdir(parents=True)
    if recipe:
        Path("records/x/record.toml").write_text(recipe)
    for check in ([], ["--check"]):
        assert make_record.main(["records/x", *check]) == 2
        error = capsys.readouterr().err
        assert message in error and "records/x" in error and "/tmp" not in error, "the copy is gone"


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.txt.xz").write_bytes(b"step:1/2 val_loss:3")
    (tmp_path / "b.txt.gz").write_bytes(b"\x1f\x8b\x08\x00")
    for name in ("a.txt.xz", "b.txt.gz"):
        with pytest.raises(OSError, match=f"{name} is damaged"):
            read_log(tmp_path / name)
