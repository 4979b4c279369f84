"""stats: equal to scipy on known samples, and NaN where nothing can be concluded."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis import stats

A = [3.2703, 3.2705, 3.2689, 3.2711]
B = [3.2727, 3.2743, 3.2731, 3.2719]
SEEDS = [1, 2, 3, 4]


@pytest.mark.parametrize("n", [2, 3, 12])
def test_summary_equals_scipy(n):
    values = np.random.default_rng(n).normal(3.27, 0.0013, n)
    got = stats.summarize(values)
    low, high = scipy_stats.t.interval(0.95, n - 1, values.mean(), scipy_stats.sem(values))
    assert (got.n, got.failed) == (n, 0)
    assert (got.mean, got.sd) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-12)


def test_summary_of_few_and_failed_runs():
    """One run has no spread; a diverged run is counted, never averaged."""
    one = stats.summarize([3.27])
    assert one.n == 1 and math.isnan(one.sd) and math.isnan(one.low) and "single run" in str(one)
    got = stats.summarize([3.27, math.nan, 3.29, math.inf])
    assert (got.n, got.failed) == (2, 2) and got.mean == pytest.approx(3.28) and "2 failed" in str(got)
    assert stats.summarize([]).n == 0 and "no finished run" in str(stats.summarize([math.nan]))


@pytest.mark.parametrize("a, b", [(A, B), (A[:2], B), (A, B[:3]), ([1, 2, 3, 9], [2.0, 2.1])])
def test_welch_equals_scipy(a, b):
    got, want = stats.welch(a, b), scipy_stats.ttest_ind(a, b, equal_var=False)
    assert got.method == "Welch" and (got.n_arm, got.n_control) == (len(a), len(b))
    assert got.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert got.p == pytest.approx(want.pvalue, rel=1e-9)
    interval = want.confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_equals_scipy():
    got, want = stats.compare(A, B, SEEDS, SEEDS), scipy_stats.ttest_rel(A, B)
    interval = want.confidence_interval(0.95)
    assert got.p == pytest.approx(want.pvalue, rel=1e-9) and got.method == "paired"
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    differences = np.subtract(A, B)
    assert got.effect_size == pytest.approx(differences.mean() / differences.std(ddof=1))


def test_compare_pairs_only_what_shares_its_seeds():
    """Pairing by position would compare different seeds; pairing only some runs would silently drop some."""
    shuffled = [B[i] for i in (2, 0, 3, 1)]
    assert stats.compare(A, shuffled, SEEDS, [3, 1, 4, 2]) == stats.compare(A, B, SEEDS, SEEDS)
    assert stats.compare(A, B, SEEDS, [1, 2, 3, 5]) == stats.welch(A, B)
    assert stats.compare(A, B, [1, 1, 2, 3], [1, 1, 2, 3]) == stats.welch(A, B)
    assert stats.compare(A, B) == stats.welch(A, B)
    assert stats.compare(A, B, [None] * 4, [None] * 4) == stats.welch(A, B)
    with pytest.raises(ValueError, match="one seed a value"):
        stats.compare(A, B, [1], SEEDS)
    with pytest.raises(ValueError, match="one seed a value"):
        stats.contenders({"a": A, "b": B}, {"a": [1], "b": SEEDS})
    # A failed run leaves its partner unpaired, so the seeds are no longer the same.
    assert stats.compare([*A[:3], math.nan], B, SEEDS, SEEDS).method == "Welch"
    both = stats.compare([*A[:3], math.nan], [*B[:3], math.inf], SEEDS, SEEDS)
    assert both.method == "paired" and both.n_arm == 3 and (both.failed_arm, both.failed_control) == (1, 1)


def test_nothing_is_claimed_from_nothing():
    """No p value from one run, from repeats of one deterministic run, nor from rounding.

    Differences that are all -0.0001 to the last digit vary by 1e-16 in floating point: once p < 0.0001.
    """
    control = [2.13421, 2.11873, 2.15002]
    arm = [2.13411, 2.11863, 2.14992]
    for got in (
        stats.welch([1.0], [2.0, 3.0]),
        stats.welch([1.0, 1.0], [2.0, 2.0]),
        stats.compare([1.0, 1.0], [2.0, 2.0], [1, 2], [1, 2]),
        stats.compare(arm, control, [1, 2, 3], [1, 2, 3]),
    ):
        assert math.isnan(got.p) and math.isnan(got.low) and got.difference < 0
    equal = [0.1 + 0.2] * 3  # numpy's standard deviation of it is not quite 0
    assert stats.summarize(equal).sd == 0 and math.isnan(stats.target_test(equal, 0.4).p)
    assert math.isnan(stats.welch([], [1.0, 2.0]).difference)


def test_target_test_equals_scipy():
    got = stats.target_test(A, 3.2725)
    want = scipy_stats.ttest_1samp(A, 3.2725, alternative="less")
    assert (got.p, got.t) == pytest.approx((want.pvalue, want.statistic), rel=1e-9)
    assert got.proven == (want.pvalue < 0.01)
    above = stats.target_test(A, 3.26)
    assert above.p > 0.99 and not above.proven and not above.sqrt_n_rule


def test_a_failed_run_fails_the_proof():
    """Leaving out the runs that diverged would prove any record."""
    got = stats.target_test([*A, math.nan], 3.28)
    assert got.p == 1 and not got.proven and not got.sqrt_n_rule and got.failed == 1
    assert not stats.target_test([3.0], 3.28).proven


@pytest.mark.parametrize(
    "n, mean, met", [(1, 3.2760, True), (4, 3.2780, True), (4, 3.27801, False), (16, 3.279, True)]
)
def test_sqrt_n_rule(n, mean, met):
    assert stats.target_test([mean] * n, 3.28).sqrt_n_rule is met


def test_holm():
    """Worked by hand: 0.01 * 4, 0.02 * 3, then never less than the previous one, never above 1."""
    assert stats.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == [] and stats.holm([0.03]) == [0.03]
    got = stats.holm([math.nan, 0.01, 0.02])
    assert math.isnan(got[0]) and got[1:] == pytest.approx([0.02, 0.02])


def test_all_pairs_at_once_equal_scipys_tukey():
    """Without a control, p and intervals are those of scipy.stats.tukey_hsd, if arms are equally noisy."""
    rest = [-0.002, 0.0005, 0.0015]
    losses = {
        name: [mean + value for value in rest] for name, mean in (("a", 3.27), ("b", 3.275), ("c", 3.273))
    }
    want = scipy_stats.tukey_hsd(*losses.values())
    interval, found = want.confidence_interval(), stats.contenders(losses)
    for i, a in enumerate(losses):
        for j, b in enumerate(losses):
            if a != b:
                pair = found.compare(a, b)
                got = pair.difference, pair.p, pair.low, pair.high
                wanted = want.statistic[i, j], want.pvalue[i, j], interval.low[i, j], interval.high[i, j]
                assert got == pytest.approx(wanted, rel=1e-6)
    assert found.names == ("a", "c") and stats.judge(losses).worse == ("b",)
    two = stats.contenders({"a": A, "b": B}, {"a": SEEDS, "b": SEEDS}).compare("a", "b")
    paired = stats.compare(A, B, SEEDS, SEEDS)
    assert two.p == pytest.approx(paired.p, rel=1e-6)  # of two arms, a paired t test


def test_single_runs_and_survivors_are_not_tested_without_a_control():
    losses = {"a": A, "b": [value + 1 for value in B], "one": [9.0], "lost": [9.0, 9.1, math.nan]}
    verdict = stats.judge(losses)
    assert verdict.worse == ("b",) and verdict.better == ("a",)
    assert all(math.isnan(verdict.versus_best[name].p) for name in ("one", "lost"))
    assert stats.contenders({**losses, "one": [1.0]}).names == ("a",)
    assert stats.contenders({"one": [1.0], "two": [2.0, 2.0]}).names == ("two",), "as the reference is"
    lower = stats.judge({**losses, "one": [1.0]})  # a single run below the best: nothing is the best
    assert lower.better == () and lower.worse == ("b",)


@pytest.mark.parametrize("n, alpha, pairs", [(4, 0.01, True), (6, 0.05, True), (6, 0.05, False)])
def test_detectable_by_simulation(n, alpha, pairs):
    """Fails unless 80% of simulated tests detect the difference that is said to be detectable."""
    rng, size = np.random.default_rng(1), stats.detectable(0.0013, n, alpha, pairs)
    a, b = rng.normal(size, 0.0013, (20_000, n)), rng.normal(0, 0.0013, (20_000, n))
    test = scipy_stats.ttest_1samp(a, 0, axis=1) if pairs else scipy_stats.ttest_ind(a, b, axis=1)
    assert abs((test.pvalue < alpha).mean() - 0.8) < 0.01


@pytest.mark.parametrize("pairs", [False, True])
def test_runs_needed_are_the_fewest_that_detect(pairs):
    """Fails if the number of runs has less than 80% power by scipy.stats, or one run less has it, too."""
    n = stats.runs_needed(0.002, 0.0013, pairs=pairs)
    enough, too_few = (t_test_power(0.002, 0.0013, m, pairs) for m in (n, n - 1))
    assert too_few < 0.8 <= enough


def t_test_power(difference, sd, n, pairs):
    df = n - 1 if pairs else 2 * (n - 1)
    shift = difference / sd * math.sqrt(n if pairs else n / 2)
    limit = scipy_stats.t.isf(0.025, df)
    return scipy_stats.nct.sf(limit, df, shift) + scipy_stats.nct.cdf(-limit, df, shift)


def test_more_runs():
    sure = stats.judge({"a": [1.0, 1.1, 0.9, 1.0] * 3, "b": [9.0, 9.1, 8.9, 9.0] * 3}, control="b")
    assert sure.more_runs(sure.versus_control["a"]) == 0
    weak = stats.judge({"a": A, "b": [value - 0.0002 for value in A]}, control="b")
    pair = weak.versus_control["a"]
    needed = weak.more_runs(pair)
    assert needed > 50 and t_test_power(abs(pair.difference), pair.sd, needed + 4, pairs=False) >= 0.8
    assert weak.more_runs(stats.welch([1.0], [2.0])) is None
    assert stats.runs_needed(1e-9, 1.0) is None and stats.runs_needed(0.0, 1.0) is None


def test_runs_needed_for_target():
    n = stats.runs_needed_for_target(3.2787, 0.0013, 3.28)
    assert scipy_stats.t.cdf((3.2787 - 3.28) / 0.0013 * math.sqrt(n), n - 1) < 0.01
    assert scipy_stats.t.cdf((3.2787 - 3.28) / 0.0013 * math.sqrt(n - 1), n - 2) >= 0.01
    assert stats.runs_needed_for_target(3.281, 0.0013, 3.28) is None
