"""report_sweep, results, conclusion: numbers equal scipy's, and claims do not exceed the evidence."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from logs_for_tests import SEPARATOR, SOURCE, make_log, step_lines
from matplotlib.colors import to_rgb
from scipy import stats as scipy_stats
from sweeps_for_tests import STEPS, make_sweep, spectral_arms

import report_sweep
from analysis import stats, style
from analysis.conclusion import conclusion
from analysis.reaching import choose_target, common_grid, reach
from analysis.read_results import read_results
from analysis.results import Attempt, Results, SweepArm
from analysis.run_log import parse_log
from analysis.sweep_pictures import VERDICTS, picture_of_curves, picture_of_forest, verdict_words
from analysis.tables import without_nan

SEEDS = (1, 2, 3, 4, 5)


def report_of(paths, target=None, **kwargs):
    """Report a sweep without pictures: (results, rows by label, REPORT.md, summary)."""
    results = read_results([paths] if isinstance(paths, (str, Path)) else paths, **kwargs)
    goal = choose_target(results, target)
    rows = report_sweep.rows_of(results, goal)
    text = report_sweep.report(results, rows, goal, [])
    numbers = without_nan(report_sweep.summary(results, rows, goal))
    json.dumps(numbers, allow_nan=False)  # any reader of JSON can read it
    return results, {row.arm.label: row for row in rows}, text, numbers


def sweep(tmp_path, arms, target=None, pool_sources=False, **kwargs):
    file = make_sweep(tmp_path, "sweep", arms, **kwargs)
    return report_of(file, target, logs=tmp_path / "logs", pool_sources=pool_sources)


def made_up(losses, seeds=None, control=None):
    """Make Results from these final losses, without logs."""
    arms = []
    for name, values in losses.items():
        numbers = seeds or [None] * len(values)
        attempts = [
            Attempt(f"{name}-{i}", seed, "finished", float(loss))
            for i, (seed, loss) in enumerate(zip(numbers, values, strict=True))
        ]
        arms.append(SweepArm(name, name, [], attempts))
    return Results("made-up", arms, control)


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def test_paired_sweep_equals_scipy(tmp_path):
    """Same seeds in all arms: differences are paired by seed, in any order of the runs."""
    results, _, text, numbers = sweep(
        tmp_path, spectral_arms(0, 0.1, 0.5), target=3.28, seeds=SEEDS, control="spectral_lr_0"
    )
    losses = {
        arm.label: np.array([a.loss for a in sorted(arm.attempts, key=lambda a: a.seed)])
        for arm in results.arms
    }
    control = losses["spectral_lr_0"]
    tests = {n: scipy_stats.ttest_rel(x, control) for n, x in losses.items() if n != "spectral_lr_0"}
    ordered = sorted(tests, key=lambda n: tests[n].pvalue)  # Holm, written out
    holm, running = {}, 0.0
    for i, name in enumerate(ordered):
        running = max(running, min(1.0, tests[name].pvalue * (len(ordered) - i)))
        holm[name] = running
    for arm in numbers["arms"]:
        x, final, difference = losses[arm["arm"]], arm["final_val_loss"], arm["difference"]
        low, high = scipy_stats.t.interval(0.95, 4, x.mean(), scipy_stats.sem(x))
        got = [final[key] for key in ("mean", "sd", "low", "high")]
        assert got == pytest.approx([x.mean(), x.std(ddof=1), low, high]) and final["n"] == 5
        proof = scipy_stats.ttest_1samp(x, 3.28, alternative="less").pvalue
        assert arm["target_test"]["p"] == pytest.approx(proof)
        assert arm["target_test"]["proven"] == (proof < 0.01)
        assert arm["target_test"]["score"] == pytest.approx((3.28 - x.mean()) * math.sqrt(5))
        if arm["arm"] == "spectral_lr_0":
            assert difference is None
            continue
        want, interval = tests[arm["arm"]], tests[arm["arm"]].confidence_interval(0.95)
        got = [difference[key] for key in ("difference", "low", "high", "p", "p_holm", "effect_size")]
        pairs = x - control
        effect = pairs.mean() / pairs.std(ddof=1)
        assert got == pytest.approx(
            [pairs.mean(), interval.low, interval.high, want.pvalue, holm[arm["arm"]], effect], rel=1e-9
        )
        row = next(line for line in text.splitlines() if line.startswith(f"| {arm['arm']} "))
        assert f"{pairs.mean():+.4f} | [{interval.low:+.4f}, {interval.high:+.4f}]" in row and "paired" in row


def test_different_seeds_are_compared_by_welch(tmp_path):
    """Once a run is lost the seeds differ: dropping its partner as well would be a choice."""
    arms = {"a": (3.30, {"SPECTRAL_LR_MUL": 0.0}), "b": (3.27, {"SPECTRAL_LR_MUL": 0.2})}
    results, _, _, numbers = sweep(tmp_path, arms, seeds=SEEDS, control="a", ends={("b", 3): "crashed"})
    b = next(arm for arm in numbers["arms"] if arm["arm"] == "b")["difference"]
    a_losses, b_losses = ([x.loss for x in arm.attempts if x.state == "finished"] for arm in results.arms)
    want = scipy_stats.ttest_ind(b_losses, a_losses, equal_var=False)
    assert (b["method"], b["n_arm"], b["n_control"]) == ("Welch", 4, 5)
    assert b["p"] == pytest.approx(want.pvalue) and b["p_holm"] == pytest.approx(want.pvalue)


@pytest.mark.parametrize(
    "control, paired, num_arms, n",
    [(control, paired, 6, 5) for control in ("a0", None) for paired in (True, False)] + [(None, True, 26, 3)],
)
def test_no_winner_where_there_is_no_effect(control, paired, num_arms, n):
    """1,000 sweeps of arms that do not differ: a winner, or a loser, is called in at most 5% of them.

    They come from the verdict that the report prints. Without correction every fifth sweep would have one.
    """
    rng = np.random.default_rng(20260206)
    called = raw = 0
    for _ in range(1000):
        luck = rng.normal(size=n) if paired else 0.0  # of each seed, shared by all arms
        losses = {f"a{i}": 3.27 + 0.0013 * (luck + rng.normal(size=n)) for i in range(num_arms)}
        seeds = list(SEEDS)[:n] if paired else None
        verdict = made_up(losses, seeds, control).verdict
        called += bool(verdict.better or verdict.worse)
        first = control or verdict.best
        others = (
            stats.compare(losses[name], losses[first], seeds, seeds) for name in losses if name != first
        )
        raw += min(pair.p for pair in others) < 0.05
    assert called / 1000 <= 0.05
    assert raw / 1000 > 0.12  # else the study could not detect a useless correction


# Detection rate of an arm worse by 1, 2 and 3 standard deviations of a run, with paired seeds.
POWER = [
    ("a0", 6, 5, (0.06, 0.27, 0.60)),
    ("a0", 6, 8, (0.15, 0.71, 0.98)),
    (None, 6, 5, (0.09, 0.45, 0.88)),
    (None, 6, 8, (0.24, 0.91, 1.00)),
    (None, 26, 3, (0.03, 0.23, 0.63)),
]


@pytest.mark.parametrize("control, num_arms, n, wanted", POWER)
def test_the_table_of_power_in_docs_is_kept(control, num_arms, n, wanted):
    """A rule that never claims anything makes no false claims either."""
    for size, chance in zip((1, 2, 3), wanted, strict=True):
        rng, found = np.random.default_rng(size), 0
        for _ in range(400):
            luck = 5 * rng.normal(size=n)
            losses = {f"a{i}": luck + rng.normal(size=n) for i in range(num_arms)}
            losses["a1"] = losses["a1"] + size
            found += "a1" in made_up(losses, list(range(n)), control).verdict.worse
        assert abs(found / 400 - chance) < 0.08


def test_without_a_control_the_words_the_table_and_the_colours_agree():
    """A picture once called an arm undecided that the sentence beside it called worse."""
    rng = np.random.default_rng(5)
    for number in range(60):
        losses = {f"a{i}": 3.27 + 0.001 * rng.normal(size=4) for i in range(4)}
        losses["a2"] = losses["a2"] - (0.02 if number % 3 == 1 else 0.0)
        losses["a3"] = losses["a3"] + (0.02 if number % 3 == 2 else 0.0)
        results = made_up(losses)
        text, verdict = "\n".join(conclusion(results)), results.verdict
        assert set(verdict.ties.names) == set(losses) - set(verdict.worse)
        for name, pair in verdict.versus_best.items():
            assert (results.call(name) == "worse") == (name in verdict.worse) == (pair.p < 0.05)
            assert (pair.low > 0) == (pair.p < 0.05)
        assert ("Better than every other arm: " in text) == bool(verdict.better)
        assert bool(verdict.better) == (len(verdict.worse) == 3)
        assert ("Lowest mean, perhaps by luck: " in text) == (not verdict.better)
        assert ("Worse than " in text) == bool(verdict.worse)
        assert (f"Undecided against {verdict.best}: " in text) == (len(verdict.worse) < 3)


def test_an_arm_about_to_diverge_does_not_drown_the_others():
    """A loss of 1.40 was once tied with 4.51, because the wildest of 26 rates set the noise."""
    rng = np.random.default_rng(11)
    luck = rng.normal(size=3)
    losses = {f"a{i}": 0.1 * (luck + rng.normal(size=3)) + (3 if i > 3 else 0) for i in range(8)}
    losses["wild"] = 60 + 30 * rng.normal(size=3)
    verdict = made_up(losses, [1, 2, 3]).verdict
    assert {"a4", "a5", "a6", "a7"} <= set(verdict.worse) and not {"a0", "a1", "a2", "a3"} & set(
        verdict.worse
    )
    assert verdict.detectable(verdict.versus_best["a4"]) < 1


def test_a_real_effect_is_found():
    """An effect of 4 sd is found about as often as its power predicts, in the right arm."""
    rng, found, false = np.random.default_rng(7), 0, 0
    size, sd = 0.0052, 0.0013
    for _ in range(300):
        losses = {f"a{i}": 3.27 + sd * rng.normal(size=5) for i in range(6)}
        losses["a3"] = losses["a3"] - size
        results = made_up(losses, None, "a0")
        found += "a3" in results.verdict.better
        false += bool(set(results.verdict.better) - {"a3"})
        if results.verdict.better == ("a3",):
            assert conclusion(results)[0].startswith("Better than a0: a3 (-0.00")
    limit = scipy_stats.t.isf(0.05 / 5 / 2, 8)  # Holm's first step is the strictest
    least = scipy_stats.nct.sf(limit, 8, size / sd * math.sqrt(5 / 2))
    assert found / 300 > least - 0.04 and least > 0.9
    assert false / 300 <= 0.065


def test_the_sentence_says_what_the_verdict_says():
    """No arm is called better that the test did not find better, in 200 sweeps, half with an effect."""
    rng = np.random.default_rng(3)
    for number in range(200):
        losses = {f"a{i}": 3.27 + 0.001 * rng.normal(size=4) for i in range(4)}
        losses["a2"] = losses["a2"] + (0.006 if number % 2 else 0.0)
        results = made_up(losses, None, "a0")
        verdict = results.verdict
        undecided = sorted({"a1", "a2", "a3"} - set(verdict.better) - set(verdict.worse))
        wanted = {
            "Better than a0": verdict.better,
            "Worse than a0": verdict.worse,
            "Undecided against a0": undecided,
        }
        found = dict(line.split(": ", 1) for line in conclusion(results))
        found.pop("Lowest mean, perhaps by luck", None)
        assert {name: re.findall(r"a\d", arms) for name, arms in found.items()} == {
            name: list(arms) for name, arms in wanted.items() if arms
        }


def test_more_runs_and_unseen_differences_follow_from_power(tmp_path):
    """Fails if the number of runs said to be needed is not enough, or one less would be."""
    _, rows, text, numbers = sweep(
        tmp_path, spectral_arms(0, 0.01, baseline=False), seeds=SEEDS, control="spectral_lr_0"
    )
    results = read_results([tmp_path / "sweeps/sweep.toml"], tmp_path / "logs")
    pair = results.comparison("spectral_lr_0.01")
    more = rows["spectral_lr_0.01"].more_runs
    enough, too_few = (stats.detectable(pair.sd, 5 + more - less, pairs=True) for less in (0, 1))
    assert enough <= abs(pair.difference) < too_few and f"| {more} |" in text
    seen = stats.detectable(pair.sd, 5, 0.05, pairs=True)
    limit, shift = scipy_stats.t.isf(0.025, 4), seen / pair.sd * math.sqrt(5)
    assert scipy_stats.nct.sf(limit, 4, shift) == pytest.approx(0.8, abs=1e-5)
    assert f"differences below about {seen:.2g} can go unseen" in " ".join(numbers["conclusion"])
    assert math.isnan(stats.detectable(math.nan, 5)) and math.isnan(stats.detectable(0.1, 1))


# ------------------------------------------------------------------------------------------------
# Runs that are missing, failed, single, repeated, or of other code
# ------------------------------------------------------------------------------------------------


def test_an_arm_that_loses_runs_is_not_called_better(tmp_path):
    """The survivors' mean flatters: an arm that diverges for one seed in five is no improvement."""
    arms = {
        "base": (3.30, {"MUON_LR": 0.02}),
        "risky": (3.20, {"MUON_LR": 0.05}),
        "dead": (3.0, {"MUON_LR": 0.9}),
    }
    ends = {("risky", 2): "diverged", **{("dead", seed): "diverged" for seed in SEEDS}, ("base", 4): "hung"}
    results, rows, text, numbers = sweep(tmp_path, arms, target=3.28, seeds=SEEDS, control="base", ends=ends)
    assert numbers["arms"][0]["difference"]["p_holm"] < 0.001  # it would win by its survivors
    assert not numbers["better"] and not numbers["worse"]
    assert numbers["conclusion"][0].startswith("Not claimed against base, because runs failed: risky (-0.")
    assert numbers["conclusion"][1] == "All runs failed: dead"
    assert numbers["runs"] == {"done": 8, "failed": 7, "missing": 0}
    assert numbers["arms"][0]["target_test"]["p"] == 1 and rows["risky"].result.failed == 1
    assert "5 of 5 failed" in text and "Failed (7)" in text and "No arm is proven" in text
    assert "* risky, seed 2: diverged at step 100 - the loss is not a finite number" in text
    assert "* base, seed 4: hung at step 100 - no new log line" in text
    assert rows["risky"].first_step_all is None and results.verdict.best is None


@pytest.mark.parametrize("cut", ["", SOURCE[:60], SOURCE + SEPARATOR, "event:started"])
def test_a_run_killed_before_its_first_event_is_a_failure_of_its_arm(tmp_path, cut):
    """Fails if it becomes an arm of its own, so that the survivors are called better."""
    arms = {"base": (3.30, {"vocab_size": 256}), "risky": (3.20, {"vocab_size": 256, "MUON_LR": 0.05})}
    file = make_sweep(tmp_path, "sweep", arms, seeds=SEEDS, control="base", ends={("risky", 5): "crashed"})
    (log,) = (tmp_path / "logs").glob("*-risky-*seed5-*")
    log.write_text(log.read_text().partition(cut)[0] if cut == "event:started" else cut)
    results, rows, text, numbers = report_of(file, logs=tmp_path / "logs")
    assert set(rows) == {"base", "risky"} and rows["risky"].result.failed == 1 and not numbers["better"]
    assert numbers["conclusion"][0].startswith("Not claimed against base, because runs failed: risky (-0.")
    assert style.loss_unit(results.runs) == "nats per byte" and "nats per token" not in text


def test_arms_with_their_own_controls(tmp_path):
    """Each arm is compared with its own control, by name; p is corrected over all; --control overrides."""
    arms = {"slow_0": (3.30, {"MUON_LR": 0.01}), "slow_1": (3.28, {"MUON_LR": 0.01, "SPECTRAL_LR_MUL": 0.5})}
    arms |= {"fast_0": (3.20, {"MUON_LR": 0.02}), "fast_1": (3.24, {"MUON_LR": 0.02, "SPECTRAL_LR_MUL": 0.5})}
    given = {"seeds": SEEDS, "control": "slow_0", "versus": {"fast_1": "fast_0"}}
    results, rows, text, numbers = sweep(tmp_path, arms, **given)
    losses = {name: arm.samples()[0] for name, arm in ((arm.label, arm) for arm in results.arms)}
    wanted = {"slow_1": "slow_0", "fast_0": "slow_0", "fast_1": "fast_0"}
    assert results.verdict.controls == wanted and results.verdict.num_comparisons == 3
    for name, control in wanted.items():
        pair = results.verdict.versus_control[name]
        assert pair.difference == pytest.approx(np.mean(np.subtract(losses[name], losses[control])))
        assert pair.p == pytest.approx(scipy_stats.ttest_rel(losses[name], losses[control]).pvalue)
    assert (numbers["better"], numbers["worse"]) == (["slow_1", "fast_0"], ["fast_1"])
    assert re.match("Better than slow_0: slow_1 \\(-0.0.*\\), fast_0 \\(-0.1", numbers["conclusion"][0])
    assert numbers["conclusion"][1].startswith("Worse than fast_0: fast_1 (+0.0")
    assert numbers["versus"] == given["versus"] and "The difference is to the control" in text
    assert re.search(r"\| fast_1 \|.*\| fast_0 \| \+0\.0", text)
    to_target = re.search(r"\| fast_0 \| 5 of 5 \|.*?\| ([-+.\d]+%)", text)
    assert to_target and to_target[1].startswith("-")
    other = read_results([tmp_path / "sweeps/sweep.toml"], tmp_path / "logs", control="fast_0")
    assert set(other.verdict.controls.values()) == {"fast_0"}


def test_nothing_is_worse_than_a_control_that_loses_runs(tmp_path):
    arms = {"base": (3.20, {"MUON_LR": 0.02}), "other": (3.30, {"MUON_LR": 0.01})}
    _, _, _, numbers = sweep(tmp_path, arms, seeds=SEEDS, control="base", ends={("base", 1): "crashed"})
    assert not numbers["worse"]
    assert numbers["conclusion"][0].startswith("Not claimed against base, because runs failed: other (+0.")


def test_an_unfinished_sweep_allows_no_conclusion(tmp_path):
    """Checking after each run until p < 0.05 finds something in most sweeps."""
    arms = spectral_arms(0, 0.1, 1)
    ends = {("spectral_lr_1", 5): "planned", ("baseline_std_0", 4): "gone", ("spectral_lr_0.1", 2): "stopped"}
    results, rows, text, numbers = sweep(tmp_path, arms, seeds=SEEDS, control="spectral_lr_0", ends=ends)
    assert results.verdict.worse == ("spectral_lr_1",)  # something had to be held back
    wanted = "Nothing may be concluded yet: 3 of 20 planned runs have not ended"
    assert conclusion(results)[0].startswith(wanted)
    assert not numbers["worse"] and "**worse**" not in text and rows["spectral_lr_1"].verdict == "undecided"
    assert "Planned: 20; 17 finished, 1 log gone, 1 planned, 1 stopped." in text
    assert "| spectral_lr_0.1 | 5 | 4 | 0 | 1 | 1 3 4 5 |" in text
    assert "* baseline_std_0, seed 4: log gone - it finished, but its log is not there any more" in text
    assert [arm["runs"]["missing"] for arm in numbers["arms"]].count(1) == 3


def test_no_finished_run_at_all(tmp_path):
    ends = {(tag, seed): "planned" for tag in ("a", "b") for seed in (1, 2)}
    arms = {"a": (3.3, {"MUON_LR": 0.1}), "b": (3.3, {"MUON_LR": 0.2})}
    _, _, text, numbers = sweep(tmp_path, arms, seeds=(1, 2), control="a", ends=ends)
    assert numbers["conclusion"] == ["Nothing may be concluded: none of 4 runs has finished."]
    assert "| a | 0.1 | 0 | - |" in text


@pytest.mark.parametrize("state", ["crashed", "hung", "stopped"])
def test_a_run_that_was_resumed_by_hand_to_its_end_is_done(tmp_path, state):
    """Fails if a run counts as failed because the launcher saw it end before it was resumed."""
    arms = {"a": (3.27, {}), "b": (3.28, {"MUON_LR": 1})}
    file = make_sweep(tmp_path, "sweep", arms, control="a", ends={("a", 2): state})
    (log,) = (tmp_path / "logs").glob("*-a-*seed2-*")
    with log.open("a") as text:
        text.write(f"event:resumed step:{STEPS // 2}\n" + step_lines(2, STEPS, begin=STEPS // 2 + 1))
        text.write("event:finished\n")
    results, rows, text, _ = report_of(file, logs=tmp_path / "logs")
    assert results.count("done") == 6 and "Failed" not in text and "out of memory" not in text
    assert rows["a"].result.n == 3 and rows["a"].result.mean == pytest.approx(3.27, abs=0.01)


def test_single_runs_are_called_single(tmp_path):
    """Two runs of one setting differ, too: the lower of two single runs is not the better arm."""
    results, rows, text, numbers = sweep(tmp_path, spectral_arms(0, 0.1), seeds=(1,), control="spectral_lr_0")
    untested, lowest = numbers["conclusion"]
    assert untested.startswith("Not tested against spectral_lr_0 (single runs, failed runs, or no spread): ")
    assert lowest.startswith("Lowest mean, perhaps by luck: ")
    assert results.verdict.best is None and "best" not in text.replace("best arm", "")
    assert text.count("a single run") >= 4 and not numbers["better"]
    assert all(row.result.n == 1 and math.isnan(row.result.low) for row in rows.values())
    alone = sweep(tmp_path / "alone", {"a": (3.27, {})}, seeds=(1,))[3]
    assert alone["conclusion"] == [f"There is nothing to compare with a, {_loss(alone)} (a single run)"]


def _loss(numbers):
    return f"{numbers['all_runs'][0]['final_val_loss']:.4f}"


def test_one_single_run_among_arms(tmp_path):
    ends = {("spectral_lr_0.1", seed): "crashed" for seed in (2, 3, 4, 5)}
    _, _, _, numbers = sweep(
        tmp_path, spectral_arms(0, 0.1, 1), seeds=SEEDS, control="spectral_lr_0", ends=ends
    )
    assert numbers["conclusion"][-1].endswith("(single runs, failed runs, or no spread): spectral_lr_0.1")
    assert numbers["worse"] == ["spectral_lr_1"]


def test_survivors_are_no_single_runs_and_lost_arms_are_named():
    """Fails if arms of three runs, most of which failed, are said to be single runs."""
    lost = math.nan
    results = made_up({"a": [3.27, lost, lost], "b": [lost, lost, lost], "c": [3.3]})
    assert conclusion(results) == [
        "Not tested against a (single runs, failed runs, or no spread): c",
        "All runs failed: b",
        "Lowest mean, perhaps by luck: a, 3.2700 (a single run, 2 failed)",
    ]
    several = made_up({"a": [3.27, 3.28, 3.29], "b": [3.3, 3.31, 3.33], "c": [lost] * 3}, None, "c")
    assert "All runs failed: c" in conclusion(several), "a control that is lost is named, too"


@pytest.mark.parametrize("runs", [[3.2735], [3.272, 3.272, math.nan], [3.9], [3.9, 3.9, math.nan]])
def test_an_arm_that_is_not_tested_may_be_as_good_as_the_best(runs):
    """Fails if an arm is called better than every other although one of a like mean was not tested."""
    results = made_up({"a": [3.27, 3.271, 3.272], "b": [3.3, 3.301, 3.302], "few": runs})
    text, is_near = "\n".join(conclusion(results)), runs[0] < 3.3
    assert ("Lowest mean, perhaps by luck" in text) == (results.call("a") == "undecided") == is_near
    assert ("Better than every other arm tested: a, " in text) == (not is_near)
    assert results.call("b") == "worse" and "no spread): few" in text


def test_arms_that_are_the_same_bit_for_bit(tmp_path):
    """a = 0 is bit-identical to the baseline: that is a fact, not a test, and gets no p."""
    arms = {"x": (3.27, {"MUON_LR": 0.1}), "y": (3.27, {"MUON_LR": 0.2}), "z": (3.4, {"MUON_LR": 0.3})}
    _, _, _, numbers = sweep(tmp_path, arms, seeds=SEEDS, control="x", noise=0.0)
    assert "The very losses of x: y" in numbers["conclusion"]
    by_name = {arm["arm"]: arm["difference"] for arm in numbers["arms"]}
    assert by_name["y"]["p"] is None and by_name["y"]["difference"] == 0
    assert by_name["y"]["more_runs"] is None


@pytest.mark.parametrize("control", ["x", None])
def test_the_reason_why_nothing_can_be_tested(control):
    """Fails if arms of two runs each are said to have fewer, where it is the spread that is lacking."""
    several = made_up({"x": [3.27, 3.27], "y": [3.28, 3.28]}, control=control)
    assert "failed runs or no spread" in report_sweep.table_notes(several)
    assert conclusion(several)[0].startswith("Not tested against x (") and " y" in conclusion(several)[0]
    single = made_up({"x": [3.27, 3.28], "y": [3.28]}, control=control)
    assert "no two arms have two runs each" in report_sweep.table_notes(single)


def test_repeats_of_one_seed_count_once(tmp_path):
    """Three runs of seed 1 differ only by the machine; as three samples they would prove anything."""
    folder = tmp_path / "logs"
    folder.mkdir()
    finals = {0.0: [3.2741, 3.2742, 3.2743], 0.1: [3.2731, 3.2732, 3.2733]}
    for a, losses in finals.items():
        for number, final in enumerate(losses):
            text = make_log(f"a{a}-{number}", 1, {"spectral_lr_mul": a}, STEPS, final=final, val_every=20)
            (folder / f"a{a}-{number}.txt").write_text(text)
    results, rows, text, _ = report_of(folder, 3.3)
    for row in rows.values():
        assert (row.result.n, row.x_to_target.n, row.minutes_to_target.n, row.reached) == (1, 1, 1, 3)
    assert conclusion(results)[0].startswith("Not tested against ")
    assert text.count("3 runs of seed 1 count as one") == 2 and text.count("of seed 1") == 2  # an arm, a note
    last = [arm.runs[0].val.loss[-1] for arm in results.arms]
    assert results.arms[0].samples()[0] == pytest.approx([last[0] + 0.0001])


def test_other_source_code_is_kept_apart(tmp_path):
    """Runs from before and after an edit are not one sample, and different code is not compared."""
    arms = spectral_arms(0, 0.1, baseline=False)
    file = make_sweep(tmp_path, "sweep", arms, seeds=SEEDS, control="spectral_lr_0")
    for log in (tmp_path / "logs").glob("*spectral_lr_0.1-*-seed[45]-*.txt"):
        log.write_text(log.read_text().replace(SOURCE, SOURCE + "# edited\n").replace("00000249", "deadbeef"))
    results, rows, text, numbers = report_of(file, logs=tmp_path / "logs")
    labels = [arm.label for arm in results.arms]
    assert labels == [
        "spectral_lr_0",
        "spectral_lr_0.1 (source 00000249)",
        "spectral_lr_0.1 (source deadbeef)",
    ]
    assert [arm.count("done") for arm in results.arms] == [5, 3, 2]
    other = rows["spectral_lr_0.1 (source deadbeef)"]
    assert other.arm.foreign and "not compared" in text and other.arm.label not in results.verdict.summaries
    wanted = "Not compared (other source code or data): spectral_lr_0.1 (source deadbeef)"
    assert wanted in numbers["conclusion"]
    assert results.comparison(other.arm.label) is None
    pooled, _, text, _ = report_of(file, logs=tmp_path / "logs", pool_sources=True)
    assert [arm.count("done") for arm in pooled.arms] == [5, 5]
    assert "runs of 2 different source codes were pooled, as --pool-sources asked" in text


@pytest.mark.parametrize("others", [{}, {"c": (3.2, {"MUON_LR": 0.3})}])
def test_only_runs_that_are_not_compared_have_finished(tmp_path, others):
    """Fails if there is no report where all comparable runs diverged, as no arm has the lowest mean."""
    arms = {
        "a": (3.2, {"MUON_LR": 0.1}),
        **others,
        "b": (3.3, {"MUON_LR": 0.2, "source": SOURCE + "# new\n"}),
    }
    ends = {(tag, seed): "diverged" for tag in ("a", *others) for seed in SEEDS}
    text = sweep(tmp_path, arms, seeds=SEEDS, control="a", ends=ends)[2]
    assert "* Nothing may be concluded: no run that can be compared has finished." in text


def test_other_data_is_kept_apart(tmp_path):
    arms = {"a": (3.3, {"MUON_LR": 0.1}), "b": (3.2, {"MUON_LR": 0.2})}
    file = make_sweep(tmp_path, "sweep", arms, seeds=SEEDS, control="a")
    for log in (tmp_path / "logs").glob("*-b-*.txt"):
        log.write_text(log.read_text().replace("fineweb_train_000001.bin", "elsewhere.bin"))
    results, _, text, _ = report_of(file, logs=tmp_path / "logs")
    assert "b is not compared: it has other data (elsewhere.bin" in text and not results.verdict.better


def test_logs_that_contradict_the_plan_are_named(tmp_path):
    """Logs with settings other than planned, and defaults that differ between scripts, are both reported."""
    arms = spectral_arms(0, 0.1)
    file = make_sweep(tmp_path, "sweep", arms, control="spectral_lr_0")
    log = next((tmp_path / "logs").glob("*spectral_lr_0.1-*-seed2-*.txt"))
    log.write_text(log.read_text().replace('"spectral_lr_mul": 0.1', '"spectral_lr_mul": 0.9'))
    for log in (tmp_path / "logs").glob("*baseline*.txt"):
        log.write_text(log.read_text().replace('"muon_weight_decay": 1.2', '"muon_weight_decay": 0.7'))
    text = report_of(file, logs=tmp_path / "logs")[2]
    assert re.search(
        r"the log of \S+seed2\S+ has other settings .* SPECTRAL_LR_MUL=0.9 \(planned 0.1\)", text
    )
    assert "settings that the sweep does not set: MUON_WEIGHT_DECAY (0.7, 1.2)" in text


def test_an_arm_without_logs_has_no_setting_that_others_set(tmp_path):
    """Fails if an arm that has not run is shown with the learning rate of an arm that sets its own."""
    arms = {"fast": (3.2, {"MUON_LR": 0.05}), "slow": (3.2, {"MUON_LR": 0.01}), "base": (3.3, {})}
    results, _, text, _ = sweep(tmp_path, arms, seeds=(1,), ends={("base", 1): "planned"})
    base = results.arms[2].settings
    assert "muon_lr" not in base and base["cooldown_frac"] == 0.55 and "| base | - | 0 |" in text


# ------------------------------------------------------------------------------------------------
# The target
# ------------------------------------------------------------------------------------------------


def line_log(name, seed, settings, slope, every, total=1000):
    """Write a run whose loss falls linearly from 5, so that it meets a target at a known place."""
    text = make_log(name, seed, settings, total, end=0, val_every=10**9).replace("event:finished\n", "")
    text = text[: text.rindex("=" * 100)] + "=" * 100 + "\n"
    for step in range(0, total + 1, every):
        text += f"step:{step}/{total} val_loss:{5 - slope * step:.6f} train_time:{step * 60}ms "
        text += f"tokens:{step * 1000}\n"
    return text + "event:finished\n"


def test_tokens_to_target_by_hand(tmp_path):
    """Interpolation must give runs validated every 10, 50 and 250 steps the same answer."""
    for every in (10, 50, 250):
        text = line_log(f"every{every}", every, {"val_loss_every": every}, 0.002, every)
        (tmp_path / f"every{every}.txt").write_text(text)
    slow = line_log("slow", 1, {"muon_weight_decay": 9.0}, 0.001, 10)
    (tmp_path / "slow.txt").write_text(slow)
    results, rows, text, numbers = report_of(tmp_path, 3.9)
    fast = next(row for row in rows.values() if len(row.arm.runs) == 3)
    assert fast.x_to_target.mean == pytest.approx(550_000) and fast.x_to_target.sd == pytest.approx(
        0, abs=1e-3
    )
    assert fast.minutes_to_target.mean == pytest.approx(550 * 60 / 60000)
    assert fast.first_step_all == 750  # the first common validation; two of them were there sooner
    other = next(row for row in rows.values() if row is not fast)
    assert other.reached == 0 and math.isnan(other.x_to_target.mean) and other.first_step_all is None
    by_run = {run["run_id"]: run for run in numbers["all_runs"]}
    assert by_run["slow"]["tokens_to_target_loss"] is None
    assert by_run["every10"]["tokens_to_target_loss"] == pytest.approx(550_000)
    assert f"| {other.arm.label} | 0 of 1 | not reached | not reached | not reached |" in text
    assert results.count("done") == 4


def test_runs_of_one_name_in_two_folders(tmp_path):
    """Fails if a run gets the tokens to the target of its namesake in another folder."""
    for folder, slope in (("A", 0.002), ("B", 0.004)):
        (tmp_path / folder).mkdir()
        text = line_log("0", 1, {"muon_lr": slope}, slope, 50)
        (tmp_path / folder / "0.txt").write_text(text)
    _, rows, _, numbers = report_of([tmp_path / "A", tmp_path / "B"], 3.9)
    found = {label: row.x_to_target.mean for label, row in rows.items()}
    assert found == pytest.approx({"muon_lr=0.002": 550_000, "muon_lr=0.004": 275_000})
    tokens = [run["tokens_to_target_loss"] for run in numbers["all_runs"]]
    assert tokens == pytest.approx([550_000, 275_000])


@pytest.mark.parametrize("validations", [1, 2])
def test_runs_validated_once_have_no_curves(tmp_path, validations):
    """Fails if a picture shows single points as curves, or a table says that no arm was faster."""
    for seed in (1, 2):
        text = line_log(f"run{seed}", seed, {}, 0.001, 1000)
        first = re.search(r"^step:0/.*\n", text, re.M)[0]
        (tmp_path / f"run{seed}.txt").write_text(text.replace(first, "") if validations == 1 else text)
    results, _, text, _ = report_of(tmp_path)
    names = report_sweep.save_pictures(results, tmp_path)
    assert ("curves.png" in names) == ("## Reaching" in text) == (validations == 2)
    assert "## Reaching" in report_of(tmp_path, 4.5)[2], "where a target is asked for"


@pytest.mark.parametrize("losses", [(5.5, 3.0, math.nan), (math.nan,) * 3])
def test_a_run_that_diverged_to_nan_has_a_report(tmp_path, losses):
    """Fails if a picture needs the last loss to be a number; the run's name stands at its last number."""
    lines = [f"step:{50 * i}/200 val_loss:{loss:.4f} train_time:{i}ms\n" for i, loss in enumerate(losses)]
    text = make_log("run", end=-1, end_event="") + "".join(lines) + "event:diverged step:100\n"
    (tmp_path / "run.txt").write_text(text)
    assert report_sweep.main([str(tmp_path), "--out", str(tmp_path)]) == 0
    assert "1 diverged" in (tmp_path / "REPORT.md").read_text()
    names = [text.xy for text in picture_of_curves(read_results([tmp_path])).axes[0].texts]
    assert names == ([(50.0, 3.0)] if losses[0] == 5.5 else [])


def test_a_curve_is_seen_on_the_common_grid_only():
    """A dip between other runs' validations would make a run with more validations seem faster."""
    x = np.arange(0, 101, 10.0)
    dip = np.where(x == 30, 1.0, 5 - x / 50)
    grid = common_grid([x, np.array([0.0, 50.0, 100.0])])
    assert grid.tolist() == [0, 50, 100]
    assert reach(x, dip, x, grid, 3.5).x == pytest.approx(75)
    assert reach(x, dip, x, x, 3.5).x < 30
    assert reach(x, dip, x, grid, 2.9) is None
    assert reach(x, dip, x, grid, 6.0).x == 0


@pytest.mark.parametrize(
    "positions, grid",
    [
        ([[0, 50, 100], [0, 50, 100]], [0, 50, 100]),
        ([[0, 10, 20, 30, 40], [0, 20, 40]], [0, 20, 40]),
        ([[0, 30, 60], [0, 20, 40, 60]], [0, 30, 60]),
        ([[0, 50], [0, 25, 50, 75, 100]], [0, 50, 75, 100]),
        ([[5, 10, 15]], [5, 10, 15]),
    ],
)
def test_common_grid(positions, grid):
    """Fails if a run that has not ended has no validation between two neighbours on the grid."""
    assert common_grid([np.array(p, float) for p in positions]).tolist() == grid


def test_a_mean_is_not_taken_of_the_lucky_runs(tmp_path):
    """The mean of two runs of five that reach the target says nothing about the arm."""
    arms = {"a": (3.2795, {"MUON_LR": 0.1}), "b": (3.2, {"MUON_LR": 0.2})}
    results, rows, text, numbers = sweep(tmp_path, arms, target=3.28, seeds=SEEDS, control="b")
    met = sum(run.first_at(3.28) is not None for run in results.arms[0].runs)
    assert 0 < met < 5 and rows["a"].reached == met
    entry = next(arm for arm in numbers["arms"] if arm["arm"] == "a")["tokens_to_target_loss"]
    assert (entry["reached"], entry["of"], entry["mean"]) == (met, 5, None)
    assert f"| a | {met} of 5 | not reached by {5 - met} |" in text
    assert rows["b"].first_step_all == max(run.first_at(3.28).step for run in results.arms[1].runs)


def test_the_target_if_none_is_given(tmp_path):
    """TARGET_LOSS is used if a run met it, else what all the control's runs reach; 3.28 would be too low."""
    arms = {
        "a": (4.2, {"MUON_LR": 0.1, "TARGET_LOSS": 3.28}),
        "b": (4.1, {"MUON_LR": 0.2, "TARGET_LOSS": 3.28}),
    }
    results, rows, text, numbers = sweep(tmp_path, arms, control="a")
    worst = max(attempt.loss for attempt in results.arms[0].attempts)
    assert worst <= numbers["target"]["loss"] <= worst + 0.001 and rows["a"].reached == 3
    assert "what every finished run of a reaches" in text and "Proof" not in text
    arms = {name: (final, {**settings, "TARGET_LOSS": 4.3}) for name, (final, settings) in arms.items()}
    assert sweep(tmp_path / "own", arms, control="a")[3]["target"]["loss"] == 4.3


@pytest.mark.parametrize("control", ["a", None])
def test_while_no_run_has_finished_there_is_no_target(tmp_path, control):
    """Fails if runs at 1.5 nats per byte are said not to reach 3.28, or differ from an arm called None."""
    arms = {"a": (1.5, {"MUON_LR": 0.1}), "b": (1.6, {"MUON_LR": 0.2})}
    ends = {(tag, seed): "running" for tag in arms for seed in SEEDS}
    _, _, text, numbers = sweep(tmp_path, arms, control=control, seeds=SEEDS, ends=ends)
    assert numbers["target"]["loss"] is None
    assert not any(word in text for word in ("Reaching", "3.28", "None"))


def test_public_logs_and_the_proof(tmp_path, capsys):
    """Logs without settings: trials of one script are one arm, and the proof is the speedrun's."""
    losses = [3.2779, 3.2791, 3.2786, 3.2770, 3.2775, 3.2783]
    for trial, loss in enumerate(losses):
        lines = "".join(
            f"step:{step}/500 val_loss:{loss + (500 - step) / 300:.4f} train_time:{step * 70}ms\n"
            for step in range(0, 501, 125)
        )
        (tmp_path / f"run{trial}.txt").write_text(f"{SOURCE}{SEPARATOR}\nRunning\n{SEPARATOR}\n{lines}")
    out = tmp_path / "report"
    assert report_sweep.main([str(tmp_path), "--target", "3.28", "--out", str(out)]) == 0
    numbers = json.loads((out / "summary.json").read_text())
    (arm,) = numbers["arms"]
    want = scipy_stats.ttest_1samp(losses, 3.28, alternative="less")
    assert arm["target_test"]["p"] == pytest.approx(want.pvalue) and arm["target_test"]["proven"]
    assert arm["target_test"]["score"] == pytest.approx((3.28 - np.mean(losses)) * 6**0.5)
    assert numbers["target"]["x"] == "steps" and arm["steps_to_target_loss"]["reached"] == 6
    text = (out / "REPORT.md").read_text()
    assert "Proven to be below 3.28" in text and "Runs: found and done" in text
    assert "nothing to compare" in capsys.readouterr().out.lower()
    assert report_of(tmp_path)[3]["target"]["reason"] == "the speedrun's"  # as plot_loss.py has it


# ------------------------------------------------------------------------------------------------
# ORD in a sweep
# ------------------------------------------------------------------------------------------------


def test_strength_is_a_where_there_is_one():
    """ORD_MODE=post has SPECTRAL_LR_MUL=0.1 among its settings but not in its update."""
    for settings, a in [
        ({"spectral_lr_mul": 0.1}, 0.1),
        ({"spectral_lr_mul": 0, "ord_mode": "project"}, 0.0),
        ({"spectral_lr_mul": 0.1, "ord_mode": "post"}, None),
        ({"spectral_lr_mul": 0.1, "spectral_lr_mul_attn": 0.05}, None),
        ({"spectral_lr_mul": 0.1, "spectral_lr_mul_mlp": None}, 0.1),
        ({}, None),
    ]:
        assert SweepArm("x", "x", [], settings=settings).strength == a


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def test_the_same_logs_give_the_same_bytes(tmp_path, monkeypatch, capsys):
    """A report in version control must not change unless its runs did, nor know where it was made."""
    make_sweep(
        tmp_path,
        "lr",
        spectral_arms(0, 0.1, 1),
        control="spectral_lr_0",
        ends={("spectral_lr_1", 2): "crashed"},
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["sweeps/lr.toml", "--target", "3.28"]
    files = {}
    for _ in range(2):
        assert report_sweep.main(arguments) == 0
        for path in sorted((tmp_path / "logs" / "lr").iterdir()):
            content = path.read_bytes()
            assert files.setdefault(path.name, content) == content, path.name
            path.unlink()
    assert set(files) == {"REPORT.md", "summary.json", "forest.png", "curves.png"}
    text = files["REPORT.md"].decode()
    for name in re.findall(r"!\[\w+\]\((.+?)\)", text):
        assert files[name].startswith(b"\x89PNG")
    assert text.count("![") == 2 and str(tmp_path) not in text + files["summary.json"].decode()
    assert text.startswith("# lr\n\n> Does it help? Nobody knows.\n") and "2 hours" not in text
    assert text.endswith("Written by `python report_sweep.py sweeps/lr.toml --target 3.28`.\n")
    assert "logs/lr/REPORT.md" in capsys.readouterr().out


def test_the_last_line_is_the_command_that_made_the_report(tmp_path, monkeypatch):
    """Fails if that command, called again, compares with another control."""
    make_sweep(tmp_path, "lr", spectral_arms(0, 0.1), val_every=50)
    monkeypatch.chdir(tmp_path)
    given = "--control spectral_lr_0 --target 3.3 --target-on train --pool-sources"
    command = f"report_sweep.py sweeps/lr.toml {given}"
    assert report_sweep.main([*command.split()[1:], "--out", "made"]) == 0
    assert Path("made/REPORT.md").read_text().endswith(f"\nWritten by `python {command}`.\n")


def words_of(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("num_arms, seeds", [(2, SEEDS), (4, SEEDS), (12, SEEDS), (4, (1, 2))])
def test_the_forest_shows_the_numbers(tmp_path, num_arms, seeds):
    """Fails if differences or intervals are not the statistics', inside the picture, in plan order."""
    arms = {f"s_{i}": (3.27 + 0.002 * i, {"RESIDUAL_SCALE": 1 + i / 10}) for i in reversed(range(num_arms))}
    if num_arms == 12:
        arms["s_11"] = (9.0, {"RESIDUAL_SCALE": 2.1})
    file = make_sweep(tmp_path, "sweep", arms, seeds=seeds, control="s_0", val_every=50)
    results, rows, _, _ = report_of(file, logs=tmp_path / "logs")
    figure = picture_of_forest(results)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == list(arms)
    lines = [(list(line.get_xdata()), set(line.get_ydata()), line.get_color()) for line in ax.lines]
    for y, label in enumerate(names):
        pair = results.comparison(label)
        if pair is None:
            assert ([0.0], {float(y)}, "#000000") in [(x, set(map(float, at)), c) for x, at, c in lines]
            continue
        look = results.looks[label]["color"]
        assert ([pair.difference], {y}, look) in lines and ([pair.low, pair.high], {y}, look) in lines
        ours, theirs = (dict(zip(*arm.samples()[::-1])) for arm in (rows[label].arm, rows["s_0"].arm))
        assert ([ours[seed] - theirs[seed] for seed in seeds], {y}, look) in lines
        assert f"{pair.difference:+.4f}" in words_of(ax)
    low, high = ax.get_xlim()
    assert all(low < x < high for xs, at, _ in lines if at <= set(range(num_arms)) for x in xs)
    boxes = [text.get_window_extent() for text in (*ax.texts, *ax.get_yticklabels())]
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert sum(word.startswith("worse, p ") for word in words_of(ax)) == len(results.verdict.worse)
    tints = [patch.get_facecolor()[:3] for patch in ax.patches]
    assert len(tints) == len(results.verdict.worse) + len(results.verdict.better)
    assert num_arms < 12 or ax.get_xscale() == "symlog"


@pytest.mark.parametrize("length", [48, 80, 160])
def test_a_forest_of_long_tags_is_readable(length):
    """Fails if names leave no room for the panel, run off the page or are cut to the same."""
    tag = ("muon_weight_decay_0.025_and_warmup_300_" * 5)[:length]
    middle = length // 2
    tags = ["base", tag, tag[:middle] + "X" + tag[middle + 1 :], tag[:middle] + "Y" + tag[middle + 1 :]]
    results = made_up(
        {name: [3.2 + i / 10, 3.21 + i / 10, 3.25] for i, name in enumerate(tags)}, [1, 2, 3], "base"
    )
    results.versus, results.looks = dict.fromkeys(tags[2:], tag), style.looks_of(tags, "base")
    results.arms[2].attempts.append(Attempt("x", 4, "crashed"))
    figure = picture_of_forest(results)
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert ax.get_window_extent().width > 2 * figure.dpi
    assert len({label.get_text() for label in ax.get_yticklabels()}) == len(tags)
    boxes = [text.get_window_extent() for text in (*ax.texts, *ax.get_yticklabels(), ax.title)]
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert figure.get_figwidth() < 18, "whole names would be wider than a screen"


def test_names_that_cannot_be_shortened_widen_the_page(tmp_path):
    """Fails if names of 150 letters beside the curves are cut by the page's edge, or leave no panel."""
    part = "_muon_weight_decay_0.025_warmup_300_"
    tags = [f"{part}{x}{part}{y}{part}{z}{part}" for x in "12" for y in "12" for z in "12"]
    arms = {tag: (3.27 + i / 100, {"SPECTRAL_LR_MUL": i / 10}) for i, tag in enumerate(tags)}
    file = make_sweep(tmp_path, "sweep", arms, control=tags[0], val_every=50)
    results = read_results([file], tmp_path / "logs")
    for draw in (picture_of_forest, picture_of_curves):
        figure = draw(results)
        figure.draw_without_rendering()
        (ax,) = figure.axes
        box = ax.get_tightbbox()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert ax.get_window_extent().width > 2 * figure.dpi


def test_arms_of_bare_logs_are_in_order_of_their_numbers(tmp_path):
    """Fails if lr_10 stands between lr_1 and lr_2."""
    names = ["base", "lr_2e-05", "lr_0.5", "lr_2", "lr_10"]
    for name in names:
        (tmp_path / f"{name}.txt").write_text("step:1/1 val_loss:1 train_time:1ms\n")
    assert [arm.label for arm in read_results([tmp_path]).arms] == names


def test_the_logs_of_a_sweep_are_compared_as_its_file_says(tmp_path):
    """Fails if plot_loss and the report compare the same logs with different controls."""
    arms = {tag: (3.27, {"SPECTRAL_LR_MUL": a}) for tag, a in (("c", 0.2), ("b", 0.1), ("a", 0.0))}
    file = make_sweep(tmp_path, "sweep", arms, control="c", versus={"a": "b"})
    planned, found = read_results([file], tmp_path / "logs"), read_results([tmp_path / "logs"])
    assert found.control == "c" and found.verdict.controls == {"a": "b", "b": "c"}
    assert (found.looks, found.verdict.controls) == (planned.looks, planned.verdict.controls)
    assert [arm.label for arm in found.arms] == [arm.label for arm in planned.arms]
    other = read_results([file], tmp_path / "logs", control="a")
    assert other.verdict.controls == {"c": "a", "b": "a"}, "--control replaces the arms' own controls, too"
    some = read_results([arm.runs[0].path for arm in planned.arms if arm.label != "c"])
    assert some.control is None and some.looks.keys() > {"a", "b"} and not some.planned
    assert any("compared with the lowest mean instead" in note for note in some.notes)


def test_a_control_that_failed_and_was_run_again_is_paired_by_its_losses():
    """Fails if a seed's tick is missing because its control also has a failed run of that seed."""
    losses = {"base": [3.0, 3.1, 3.2], "a": [2.9, 3.01, 3.12]}
    results = made_up(losses, SEEDS[:3], "base")
    results.arms[0].attempts.append(Attempt("again", 1, "crashed"))
    results.looks = style.looks_of(list(losses), "base")
    (ticks,) = [line for line in picture_of_forest(results).axes[0].lines if line.get_marker() == "|"]
    assert list(ticks.get_xdata()) == pytest.approx([-0.1, -0.09, -0.08])


def test_a_control_without_a_finished_run_has_no_mark():
    """Fails if a solid mark at 0 stands for a mean that does not exist."""
    losses = {"base": [math.nan] * 3, "own": [3.0, 3.1, 3.2], "a": [2.9, 3.01, 3.12]}
    results = made_up(losses, SEEDS[:3], "base")
    results.versus, results.looks = {"a": "own"}, style.looks_of(list(losses), "base")
    ax = picture_of_forest(results).axes[0]
    assert not [line for line in ax.lines if line.get_marker() == style.CONTROL["marker"]]


@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3)])
def test_a_title_speaks_of_intervals_where_there_are_any(tmp_path, seeds):
    file = make_sweep(tmp_path, "sweep", spectral_arms(0, 0.1), seeds=seeds, control="spectral_lr_0")
    ax = picture_of_curves(read_results([file], tmp_path / "logs")).axes[0]
    assert ("95% interval" in ax.get_title("left")) == bool(ax.collections) == (len(seeds) == 3)


def test_an_interval_clear_of_zero_that_holm_rejects_says_so():
    """Fails if a picture shows a finding that the sentence beside it denies."""
    losses = {"base": [3.0, 3.1, 3.2, 3.3], "a": [2.95, 3.02, 3.16, 3.27]}
    losses |= {f"b{i}": [3.0 + 0.01 * (-1) ** (i + j) + 0.1 * j for j in range(4)] for i in range(8)}
    results = made_up(losses, [1, 2, 3, 4], "base")
    pair = results.comparison("a")
    assert pair.high < 0 and pair.p_corrected > 0.05
    results.looks = style.looks_of(list(losses), "base")
    words = words_of(picture_of_forest(results).axes[0])
    assert [word for word in words if "clear" in word] == [
        f"undecided, p = {pair.p_corrected:.2g} (by itself clear of 0)"
    ]
    assert set(VERDICTS.values()).isdisjoint({results.looks["base"]["color"]})


def test_losses_over_training_are_minus_the_controls(tmp_path):
    """Six overlapping lines show nothing; their paired differences and intervals are scipy's."""
    file = make_sweep(tmp_path, "sweep", spectral_arms(0, 0.1, 1), seeds=SEEDS, control="spectral_lr_0")
    results = read_results([file], tmp_path / "logs")
    ax = picture_of_curves(results).axes[0]
    runs = {arm.label: sorted(arm.runs, key=lambda run: run.seed) for arm in results.arms}
    steps = runs["spectral_lr_0"][0].val.step
    look = results.looks["spectral_lr_0.1"]["color"]
    line = next(line for line in ax.lines if line.get_color() == look and len(line.get_xdata()) > 2)
    sides = [
        np.stack([run.val.loss for run in runs[name]])[:, steps > 0]
        for name in ("spectral_lr_0.1", "spectral_lr_0")
    ]
    np.testing.assert_allclose(line.get_ydata(), (sides[0] - sides[1]).mean(0))
    want = scipy_stats.ttest_rel(*sides).confidence_interval(0.95)
    band = next(c for c in ax.collections if np.allclose(c.get_facecolor()[0][:3], to_rgb(look)))
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((want.low.min(), want.high.max()))
    assert "tokens" in ax.get_xlabel() and ax.get_ylabel() == "nats per token; below 0 is better"
    assert {"baseline_std_0", "spectral_lr_0", "spectral_lr_0.1", "spectral_lr_1"} == set(words_of(ax))


def test_among_many_arms_a_filled_point_has_an_interval_clear_of_zero(tmp_path):
    """Bands of fifteen arms hide each other; without any, luck looks like an effect."""
    arms = {f"s_{i}": (3.27 + 0.0006 * i, {"RESIDUAL_SCALE": 1 + i / 10}) for i in range(8)}
    file = make_sweep(tmp_path, "sweep", arms, seeds=SEEDS, control="s_0", val_every=50)
    results = read_results([file], tmp_path / "logs")
    ax = picture_of_curves(results).axes[0]
    filled = [line for line in ax.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    last = {(line.get_color(), line.get_marker()): line.get_xdata()[-1] for line in filled}
    clear = {name: pair.low * pair.high > 0 for name, pair in results.verdict.versus_control.items()}
    assert {True, False} == set(clear.values())
    for label in clear:
        look = results.looks[label]
        assert clear[label] == (last.get((look["color"], look["marker"])) == max(last.values())), label
    assert "filled" in ax.get_xlabel() and not ax.collections


@pytest.mark.parametrize("fields, unit", [({"vocab_size": 256}, "byte"), ({"vocab_size": 50257}, "token")])
def test_the_unit_is_that_of_the_data(tmp_path, fields, unit):
    """A loss of 1.2 nats means different things per byte and per token."""
    log = tmp_path / "a.txt"
    log.write_text(make_log("a", 1, fields, STEPS))
    results = read_results([log])
    target = choose_target(results, None)
    text = report_sweep.report(results, report_sweep.rows_of(results, target), target, [])
    assert f"in nats per {unit}; n counts" in text and style.loss_unit(results.runs) == f"nats per {unit}"


def test_a_public_log_beside_bytes_counts_tokens():
    """Fails if a log without settings, whose losses are per token, is not counted."""
    steps = [f"step:{step}/90 val_loss:3.2 train_time:{step}ms" for step in range(0, 91, 10)]
    public, own = parse_log("\n".join([*steps, ""])), parse_log(make_log("b", 1, {"vocab_size": 256}, STEPS))
    assert style.loss_unit(own) == "nats per byte" and style.loss_unit([*public, *own]) == "nats per token"


def test_own_controls_look_different_in_verdicts():
    """Fails if two long names of controls are cut to the same text."""
    names = [f"muon_weight_decay_0.0{size}_and_warmup_300" for size in ("25", "50")]
    losses = {
        "base": [3.0, 3.1],
        names[0]: [3.0, 3.11],
        names[1]: [3.1, 3.12],
        "a": [2.9, 3.0],
        "b": [2.9, 3.0],
    }
    arms = [
        SweepArm(name, name, [], [Attempt(name, seed, "finished", loss) for seed, loss in enumerate(few)])
        for name, few in losses.items()
    ]
    results = Results("made-up", arms, "base", versus=dict(zip("ab", names, strict=True)))
    words = [verdict_words(results, arm, results.comparison(arm.label)) for arm in arms[3:]]
    assert len({text.partition(",")[0] for text in words}) == 2
