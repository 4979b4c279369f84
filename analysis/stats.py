"""Statistics of runs: means and intervals, comparisons of arms, tests against a target.

    from analysis.stats import summarize, compare, holm, judge, target_test
    summarize([3.2703, 3.2705, 3.2727])        # n, mean, sd, 95% interval of the mean
    compare(arm, control, arm_seeds, control_seeds)  # paired if the seeds are the same, else Welch
    target_test(losses, 3.28)                  # the speedrun's proof: is the mean below the target?
    judge({"a": [...], "b": [...]}, control="a").better    # the arms of a sweep, with Holm's correction
    contenders({"a": [...], "b": [...]}).names      # without a control: which arms may be the best

Losses are values per run. Pass NaN or inf for a run that crashed or diverged: it is left out of means and
counted in `failed`, for reports. scipy.special is used because it loads ten times faster than scipy.stats;
tests compare the two.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import scipy

ALPHA = 0.05  # chance of any false claim in a sweep
CONFIDENCE = 1 - ALPHA  # of intervals
POWER = 0.8  # chance of finding a true difference, where numbers of runs are given
MAX_RUNS = 10000  # more is "no number of runs"
SPEEDRUN_P = 0.01  # the speedrun accepts a record if p < 0.01 that the mean loss is at or below the target
# The optimization track's rule: about three standard errors, for its known sd of 0.0013.
SQRT_N_MARGIN = 0.004
ROUNDING = 1e-12  # a spread below this fraction of the losses is only their rounding


@dataclass(frozen=True)
class Summary:
    """Summary of an arm's runs; `low` to `high` is the mean's interval, NaN (like `sd`) below two runs."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    confidence: float
    failed: int = 0

    def __str__(self) -> str:
        lost = f", {self.failed} failed" if self.failed else ""
        if self.n == 0:
            return f"no finished run{lost}"
        if self.n == 1:
            return f"{self.mean:.4f} (a single run{lost})"
        half = (self.high - self.low) / 2
        interval = f"{self.mean:.4f} ± {half:.4f} ({self.confidence:.0%} interval"
        return f"{interval}, sd {self.sd:.4f}, n={self.n}{lost})"


@dataclass(frozen=True)
class Comparison:
    """Comparison of an arm with its control: `difference` (arm - control), interval, two-sided p, Cohen's d.

    A negative difference of losses is an improvement. p and interval are NaN for fewer than two runs or zero
    spread (repeats of one deterministic run are not a sample).
    """

    method: str  # "paired", "Welch", or "Tukey": all arms at once, with one sd and corrected p and interval
    n_arm: int
    n_control: int
    difference: float
    low: float
    high: float
    p: float
    effect_size: float
    sd: float  # of the pairs' differences, or of one run (pooled)
    confidence: float
    failed_arm: int = 0
    failed_control: int = 0
    p_corrected: float = math.nan  # for the number of comparisons


@dataclass(frozen=True)
class TargetTest:
    """Test against a target: `p` of the one-sided t test, `score` for the sqrt(n) rule (at least 0.004)."""

    n: int
    mean: float
    sd: float
    target: float
    t: float
    p: float
    score: float
    failed: int = 0

    @property
    def proven(self) -> bool:
        """True by the speedrun's criterion: p < 0.01."""
        return bool(self.p < SPEEDRUN_P)

    @property
    def sqrt_n_rule(self) -> bool:
        """True if (target - mean) * sqrt(n) >= 0.004, up to rounding."""
        return bool(self.score >= SQRT_N_MARGIN - 1e-12)


def _split(values: Sequence[float]) -> tuple[np.ndarray, int]:
    """Return the finite values, and the number of others."""
    values = np.asarray(list(values), dtype=float)
    finite = values[np.isfinite(values)]
    return finite, len(values) - len(finite)


def _sd(values: np.ndarray) -> float:
    """Standard deviation (n - 1); exactly 0 for equal values, despite rounding."""
    return _unless_rounding(float(values.std(ddof=1)), values) if len(values) > 1 else math.nan


def _unless_rounding(sd: float, losses: Sequence[float]) -> float:
    """Return a standard deviation, or 0 if the rounding of these losses explains it."""
    return sd if sd > ROUNDING * np.max(np.abs(losses)) else 0.0


def mean_by_seed(values: Sequence, seeds: Sequence[Hashable]) -> tuple[list, list]:
    """Average the values (numbers or arrays) of each seed; return the means and their seeds.

    Repeats of a seed differ only by the machine and are no sample. Unknown seeds (None) count as different.
    """
    by_seed: dict = {}
    for number, (value, seed) in enumerate(zip(values, seeds, strict=True)):
        by_seed.setdefault(("run", number) if seed is None else seed, []).append(value)
    means = [sum(group) / len(group) for group in by_seed.values()]
    return means, [None if isinstance(key, tuple) else key for key in by_seed]


def summarize(values: Sequence[float]) -> Summary:
    """Mean, sd (n - 1) and Student's interval of the mean."""
    finite, failed = _split(values)
    n, sd = len(finite), _sd(finite)
    mean = float(finite.mean()) if n else math.nan
    half = scipy.special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * sd / math.sqrt(n) if n > 1 else math.nan
    return Summary(n, mean, sd, mean - half, mean + half, CONFIDENCE, failed)


def compare(
    arm: Sequence[float],
    control: Sequence[float],
    arm_seeds: Sequence[Hashable] | None = None,
    control_seeds: Sequence[Hashable] | None = None,
) -> Comparison:
    """Use a paired t test if both arms have finite values for the same seeds, each once; else Welch's."""
    a, b = _by_seed(arm, arm_seeds), _by_seed(control, control_seeds)
    if a is not None and b is not None and a.keys() == b.keys() and len(a) > 1:
        pairs = np.array([(a[seed], b[seed]) for seed in a])
        return _paired(pairs, len(arm) - len(a), len(control) - len(b))
    return welch(arm, control)


def _by_seed(values: Sequence[float], seeds: Sequence[Hashable] | None) -> dict[Hashable, float] | None:
    """Map each seed to its finite value; None if a seed is unknown or repeated."""
    if seeds is None:
        return None
    if len(seeds) != len(values):
        raise ValueError(f"{len(values)} values but {len(seeds)} seeds; one seed a value is needed")
    found = [(seed, value) for seed, value in zip(seeds, values, strict=True) if math.isfinite(value)]
    table = dict(found)
    return None if None in table or len(table) < len(found) else table


def _paired(pairs: np.ndarray, failed_arm: int, failed_control: int) -> Comparison:
    """Student's t test of the differences of at least two pairs of losses, one a row."""
    differences = pairs[:, 0] - pairs[:, 1]
    n, mean = len(pairs), float(differences.mean())
    sd = _unless_rounding(float(differences.std(ddof=1)), pairs)
    low, high, p = _t_test(mean, sd / math.sqrt(n), n - 1)
    effect = mean / sd if sd else math.nan
    return Comparison("paired", n, n, mean, low, high, p, effect, sd, CONFIDENCE, failed_arm, failed_control)


def welch(arm: Sequence[float], control: Sequence[float]) -> Comparison:
    """Welch's t test, for unequal spreads. The effect size divides by the pooled standard deviation."""
    (a, failed_a), (b, failed_b) = _split(arm), _split(control)
    difference = float(a.mean() - b.mean()) if len(a) and len(b) else math.nan
    if len(a) < 2 or len(b) < 2:
        low = high = p = effect = sd = math.nan
    else:
        va, vb = _sd(a) ** 2 / len(a), _sd(b) ** 2 / len(b)
        spread = (va + vb) ** 2
        df = spread / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if spread else math.nan
        low, high, p = _t_test(difference, math.sqrt(va + vb), df)
        squares = _sd(a) ** 2 * (len(a) - 1) + _sd(b) ** 2 * (len(b) - 1)
        sd = math.sqrt(squares / (len(a) + len(b) - 2))
        effect = difference / sd if sd else math.nan
    ends, counts = (low, high), (len(a), len(b))
    return Comparison("Welch", *counts, difference, *ends, p, effect, sd, CONFIDENCE, failed_a, failed_b)


def _t_test(difference: float, error: float, df: float) -> tuple[float, float, float]:
    """Interval and two-sided p of a difference with a standard error; NaN if that is 0 or unknown."""
    if not error > 0 or not df > 0:
        return math.nan, math.nan, math.nan
    half = scipy.special.stdtrit(df, 0.5 + CONFIDENCE / 2) * error
    p = 2 * scipy.special.stdtr(df, -abs(difference) / error)
    return float(difference - half), float(difference + half), float(p)


def target_test(losses: Sequence[float], target: float) -> TargetTest:
    """Test whether the mean loss is below `target` (one-sided t test). A failed run fails the proof.

    With fewer than two runs, p is NaN and nothing is proven.
    """
    finite, failed = _split(losses)
    n, sd = len(finite), _sd(finite)
    mean = float(finite.mean()) if n else math.nan
    if failed:
        return TargetTest(n, mean, sd, target, math.nan, 1.0, -math.inf, failed)
    t = (mean - target) / (sd / math.sqrt(n)) if n > 1 and sd > 0 else math.nan
    p = float(scipy.special.stdtr(n - 1, t)) if n > 1 and sd > 0 else math.nan
    return TargetTest(n, mean, sd, target, t, p, (target - mean) * math.sqrt(n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order; NaN (not tested) stays NaN and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Contenders:
    """Simultaneous comparison of all arms with each other, and the arms that may be the best.

    `means` are sorted, lowest first. `noise` is each arm's standard deviation of one run, in units of the
    loss; `sd` (NaN: unknown) is the pooled one, with `df` degrees of freedom. `shared` is each seed's mean
    loss, which the noise does not include; it is empty unless all arms have the same seeds.
    """

    means: dict[str, float]
    counts: dict[str, int]
    noise: dict[str, float]
    sd: float
    df: int
    shared: dict[Hashable, float]

    @property
    def paired(self) -> bool:
        return bool(self.shared)

    @property
    def lowest(self) -> str | None:
        return next(iter(self.means), None)

    @cached_property
    def reference(self) -> str | None:
        """Arm that all are compared with: the lowest mean of several runs, or of single runs if all are."""
        return next((name for name in self.means if self.counts[name] > 1), self.lowest)

    @cached_property
    def tested(self) -> tuple[str, ...]:
        """Arms with several runs, sorted by mean; none if the spread is unknown."""
        return tuple(name for name in self.means if self.df and self.counts[name] > 1)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Arms statistically tied with `reference`, sorted by mean; single runs are not tested.

        The truly best of the arms tested is among them in at least 95% of sweeps. If the spread is unknown,
        they are only the reference.
        """
        best = self.reference
        if not self.df:
            return (best,) if self.means else ()
        return tuple(
            name
            for name in self.tested
            if not self.means[name] - self.means[best] > self.half_width(name, best)
        )

    @cached_property
    def limit(self) -> float:
        """Number of standard errors by which two arms must differ."""
        return _tukey_limit(len(self.means), self.df) if self.df else math.nan

    @property
    def level(self) -> float:
        """Level of the two-sided t test of one pair that has the same limit."""
        return float(2 * scipy.special.stdtr(self.df, -self.limit)) if self.df else math.nan

    def error(self, a: str, b: str) -> float:
        """Standard error of the difference of two arms' means."""
        return math.hypot(*(self.noise[name] / math.sqrt(self.counts[name]) for name in (a, b)))

    def half_width(self, a: str, b: str) -> float:
        """Half-width of the simultaneous interval of the difference of two arms' means."""
        known = self.df and a in self.noise and b in self.noise
        return self.limit * self.error(a, b) if known else math.nan

    def compare(self, a: str, b: str) -> Comparison:
        """Compare two arms' means; p and interval are simultaneous for all pairs."""
        difference = self.means[a] - self.means[b]
        half, p, sd = self.half_width(a, b), math.nan, math.nan
        if math.isfinite(half):
            from scipy.stats import studentized_range

            statistic = math.sqrt(2) * abs(difference) / self.error(a, b)
            p = float(studentized_range.sf(statistic, len(self.means), self.df))
            sd = math.hypot(self.noise[a], self.noise[b]) / math.sqrt(2)
        effect = difference / sd if sd else math.nan
        ends, counts = (difference - half, difference + half), (self.counts[a], self.counts[b])
        return Comparison("Tukey", *counts, difference, *ends, p, effect, sd, CONFIDENCE, p_corrected=p)


@lru_cache
def _tukey_limit(num_arms: int, df: int) -> float:
    """Standard errors of a difference. scipy.stats is imported only when needed, because it loads slowly."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, num_arms, df)) / math.sqrt(2)


def contenders(
    losses: Mapping[str, Sequence[float]], seeds: Mapping[str, Sequence[Hashable]] | None = None
) -> Contenders:
    """Compare all arms with each other, for a sweep without a control: the rule for "tied with the best".

    Tukey's honestly significant differences (see scipy.stats.tukey_hsd) keep the chance of any false claim at
    ALPHA, whichever arm looks best. A few runs say little about an arm's noise, so noise is pooled, but only
    over the better half of the arms: one that is about to diverge would drown all others. (In a normal
    sample, mean and spread are independent.) If all arms have the same seeds, the effect of the seed is
    removed. An arm whose own runs vary more keeps its own noise. Arms with failed runs are left out; an arm
    with a single run gets the others' noise.
    """
    finite = {name: _split(values)[0] for name, values in losses.items() if not _split(values)[1]}
    finite = {name: values for name, values in finite.items() if len(values)}
    order = sorted(finite, key=lambda name: (finite[name].mean(), name))
    means = {name: float(finite[name].mean()) for name in order}
    counts = {name: len(finite[name]) for name in order}
    several = [name for name in order if counts[name] > 1]
    pool = several[: max(3, (len(several) + 1) // 2)]
    seeds = seeds or {}
    tables = [_by_seed(losses[name], seeds.get(name)) for name in order]
    paired = len(pool) > 1 and None not in tables and all(t.keys() == tables[0].keys() for t in tables)
    if paired:
        rows = [np.array([table[seed] for seed in tables[0]]) for table in tables]
        by_seed = dict(zip(order, rows, strict=True))
        seed_means = np.array([by_seed[name] for name in pool]).mean(0)
        left = {name: by_seed[name] - seed_means for name in order}
        shared = dict(zip(tables[0], seed_means, strict=True))
        df = (len(pool) - 1) * (counts[order[0]] - 1)
    else:
        left, shared = finite, {}
        df = sum(counts[name] - 1 for name in pool)
    squares = sum(((left[name] - left[name].mean()) ** 2).sum() for name in pool)
    sd = _unless_rounding(math.sqrt(squares / df), list(means.values())) if df else 0.0
    if not sd or len(order) < 2:
        sd, df = math.nan, 0
    own = {name: _sd(left[name]) for name in several}
    noise = {name: max(sd, own.get(name, 0.0)) for name in order} if df else {}
    return Contenders(means, counts, noise, sd, df, shared)


@dataclass(frozen=True)
class Verdict:
    """Comparison of a sweep's arms, keyed by name; differences are arm minus the other.

    `better` and `worse` are all that may be claimed, by one rule per sweep. With a control, each arm is
    compared with its control, and p is corrected by Holm's method. Without one, all pairs are compared by
    Tukey's (see `contenders`); `worse` are the arms worse than `best`, and `best` is `better` if no arm is,
    or may be, tied with it. If nothing differs, the chance of any claim is at most ALPHA, however many arms
    there are.
    """

    control: str | None
    controls: dict[str, str]  # what each arm is compared with: its own control, else `reference`
    best: str | None  # lowest mean of the arms with two runs or more, none failed; None if there is none
    lowest: str | None  # lowest mean of all, perhaps of a single run or of survivors
    summaries: dict[str, Summary]
    versus_control: dict[str, Comparison]  # empty without a control
    ties: Contenders
    better: tuple[str, ...]
    worse: tuple[str, ...]
    num_comparisons: int  # pairs that claims are drawn from

    @property
    def reference(self) -> str | None:
        """Arm that all are compared with, except those with controls of their own."""
        return self.control or self.best or self.lowest

    @property
    def pairs(self) -> dict[str, Comparison]:
        """Comparisons that claims are drawn from: with the controls, else with the best."""
        return self.versus_best if self.control is None else self.versus_control

    @cached_property
    def versus_best(self) -> dict[str, Comparison]:
        """Each arm against `best`, else `lowest`; p and interval are simultaneous for all pairs."""
        first = self.best or self.lowest
        return {name: self._to(name, first) for name in self.summaries if first not in (None, name)}

    def _to(self, name: str, first: str) -> Comparison:
        """Compare an arm with the first one; single runs and survivors are not tested."""
        if self._testable(name) and self._testable(first):
            return self.ties.compare(name, first)
        arm, other, no = self.summaries[name], self.summaries[first], math.nan
        counts, failed = (arm.n, other.n), (arm.failed, other.failed)
        difference = arm.mean - other.mean
        return Comparison("Tukey", *counts, difference, no, no, no, no, no, CONFIDENCE, *failed)

    def _testable(self, name: str) -> bool:
        return self.ties.counts.get(name, 0) > 1

    def detectable(self, pair: Comparison) -> float:
        """Smallest true difference that such a comparison detects with 80% power."""
        n = min(pair.n_arm, pair.n_control)
        return detectable(pair.sd, n, self.level, pair.method == "paired", self._pooled(pair))

    def more_runs(self, pair: Comparison) -> int | None:
        """Number of further runs per arm that would settle a difference of this size; 0 if there are enough.

        None if no number would: no difference, unknown spread, or more than MAX_RUNS.
        """
        pairs = pair.method == "paired"
        n = runs_needed(pair.difference, pair.sd, self.level, pairs, self._pooled(pair))
        return None if n is None else max(0, n - min(pair.n_arm, pair.n_control))

    @property
    def level(self) -> float:
        """Level that one comparison has to meet: the strictest of Holm's, or Tukey's."""
        return self.ties.level if self.control is None else ALPHA / max(1, self.num_comparisons)

    def _pooled(self, pair: Comparison) -> float:
        """Number of arms whose runs estimate the noise."""
        n = max(self.ties.counts.values(), default=2)
        return self.ties.df / (n - 1) if pair.method == "Tukey" and n > 1 else 2


def judge(
    losses: Mapping[str, Sequence[float]],
    seeds: Mapping[str, Sequence[Hashable]] | None = None,
    control: str | None = None,
    versus: Mapping[str, str] | None = None,
) -> Verdict:
    """Compare arms with the control, with Holm's correction; without one, with each other (`contenders`).

    `versus` maps some arms to controls of their own. The mean of an arm with failed runs is that of its
    survivors, which flatters it: no such arm is called better, and nothing is called worse than it.
    """
    versus = dict(versus or {})
    _check_controls(losses, control, versus)
    seeds = seeds or {}
    summaries = {name: summarize(values) for name, values in losses.items()}
    means = {name: found.mean for name, found in summaries.items() if found.n}
    sound = [name for name in means if summaries[name].n >= 2 and not summaries[name].failed]
    best = min(sound, key=means.get, default=None)
    lowest = min(means, key=means.get, default=None)
    controls = {name: versus.get(name, control or best or lowest) for name in losses}
    controls = {name: other for name, other in controls.items() if other not in (None, name)}
    versus_control, ties = {}, contenders(losses, seeds)
    if control is not None:
        pairs = [
            compare(losses[name], losses[other], seeds.get(name), seeds.get(other))
            for name, other in controls.items()
        ]
        corrected = zip(pairs, holm([pair.p for pair in pairs]), strict=True)
        pairs = [replace(pair, p_corrected=p) for pair, p in corrected]
        versus_control = dict(zip(controls, pairs, strict=True))
        better, worse = _claims(versus_control)
        num_tested = sum(not math.isnan(pair.p) for pair in pairs)
    else:
        better, worse = _claims_without_control(ties, sound, summaries)
        num_tested = len(sound) * (len(sound) - 1) // 2 if ties.df else 0
    return Verdict(
        control=control,
        controls=controls,
        best=best,
        lowest=lowest,
        summaries=summaries,
        versus_control=versus_control,
        ties=ties,
        better=better,
        worse=worse,
        num_comparisons=num_tested,
    )


def _claims_without_control(
    ties: Contenders, sound: Sequence[str], summaries: Mapping[str, Summary]
) -> tuple[tuple, tuple]:
    """Return the best arm, if none is tied with it or may be, and the arms worse than the best.

    An arm that is not tested may be tied unless its mean is so high that a single run would be found worse.
    """
    if not ties.df:
        return (), ()
    tied = [name for name in ties.names if name in sound]
    worse = tuple(name for name in sound if name not in tied)
    best = summaries[tied[0]]
    clear = best.mean + ties.limit * max(ties.sd, best.sd) * math.sqrt(1 + 1 / best.n)
    may_be_tied = any(found.mean <= clear for name, found in summaries.items() if name not in sound)
    return (tuple(tied) if len(tied) == 1 and worse and not may_be_tied else ()), worse


def _check_controls(losses: Mapping, control: str | None, versus: Mapping[str, str]) -> None:
    for other in (control, *versus, *versus.values()):
        if other is not None and other not in losses:
            raise ValueError(f"control {other!r} is none of the arms: {', '.join(losses)}")
    if versus and control is None:
        raise ValueError(f"{', '.join(versus)}: controls of their own, but the other arms have none")


def _claims(versus: Mapping[str, Comparison]) -> tuple[tuple, tuple]:
    """Return the arms that are better and those that are worse than their control."""
    found = {name: pair for name, pair in versus.items() if pair.p_corrected < ALPHA}
    better = tuple(name for name, pair in found.items() if pair.difference < 0 and not pair.failed_arm)
    worse = tuple(name for name, pair in found.items() if pair.difference > 0 and not pair.failed_control)
    return better, worse


def runs_needed(
    difference: float, sd: float, alpha: float = ALPHA, pairs: bool = False, pooled: float = 2
) -> int | None:
    """Runs per arm (pairs) that detect a difference of this size with 80% power; None: over MAX_RUNS."""
    if not sd > 0 or not abs(difference) > 0:
        return None
    return _smallest(lambda n: detectable(sd, n, alpha, pairs, pooled) <= abs(difference))


def detectable(sd: float, n: int, alpha: float = ALPHA, pairs: bool = False, pooled: float = 2) -> float:
    """Smallest true difference that n runs per arm (n pairs) detect with 80% power; NaN if unknown.

    The test is a two-sided t test; the chance of a significant difference of the wrong sign is neglected.
    `pooled` is the number of arms whose runs estimate the sd: two, unless all arms are compared at once.
    """
    if n < 2 or not sd > 0:
        return math.nan
    df = n - 1 if pairs else pooled * (n - 1)
    limit = scipy.special.stdtrit(df, 1 - alpha / 2)
    shift = scipy.special.nctdtrinc(df, 1 - POWER, limit)
    return float(shift * sd / math.sqrt(n if pairs else n / 2))


def runs_needed_for_target(mean: float, sd: float, target: float) -> int | None:
    """Number of runs with which this mean and sd prove a mean below `target`; None if it is not."""
    if not mean < target or not sd > 0:
        return None
    return _smallest(lambda n: scipy.special.stdtr(n - 1, (mean - target) * math.sqrt(n) / sd) < SPEEDRUN_P)


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """Smallest number of runs, from 2 to MAX_RUNS, that is enough; more runs are never worse."""
    numbers = range(2, MAX_RUNS + 1)
    place = bisect_left(numbers, True, key=enough)
    return numbers[place] if place < len(numbers) else None
