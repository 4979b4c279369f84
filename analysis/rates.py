"""Values of a sweep over one number, such as the learning rate: which learn, which fail, which do best.

    from analysis.rates import analyse
    analysis = analyse(results)              # or analyse(results, "MUON_LR", ["MUON_DECAY_MODE=param"])
    analysis.rates[0].label, analysis.lowest().value, analysis.near_best(), analysis.most_accurate()

RULES gives every value a label. "The fall" is how far the lowest mean loss fell from the start of training.
Labels and ranges are relative to the value with that loss. Values statistically tied with it are those of
stats.contenders; a single run is not tested. Only losses are tested; accuracies are described.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from analysis.results import Attempt, Results, SweepArm, accuracy_of, loss_of, samples_of
from analysis.run_log import format_value
from analysis.stats import CONFIDENCE, Contenders, Summary, contenders, summarize

RATES = ("muon_lr", "adam_lr", "router_lr")  # preferred, if no setting is named
GOOD = 0.98  # fraction of the best's fall that a good value reaches
LOST = 0.05  # fraction of the fall that an unstable run lost again on the way
SPREAD = 5.0  # an unstable value's runs differ by this many times the noise, and by 1 - GOOD of the fall
TOP = 0.2
RULES = {
    "optimal": "good, tested, and not told from the value with the lowest loss "
    f"({CONFIDENCE:.0%} confidence)",
    "good": f"its mean loss fell by at least {GOOD:.0%} of the fall",
    "too low": "not good, and below the value with the lowest loss",
    "declining": "not good, and above the value with the lowest loss",
    "unstable": "some but not all of its runs diverged; or a run's validation loss stood at some time more "
    f"than {LOST:.0%} of the fall above its lowest until then; or its runs' sd exceeds {SPREAD:g} times the "
    f"sweep's noise and {1 - GOOD:.0%} of the fall",
    "diverged": "all its runs diverged, or ended no lower than they began",
    "no result": "no run has finished and none diverged: they crashed, hung or have not ended; or all "
    "values with finished runs have failed ones too, so that there is nothing to compare with",
}


# ------------------------------------------------------------------------------------------------
# Measures of a run
# ------------------------------------------------------------------------------------------------


def minutes_of(attempt: Attempt) -> float:
    return attempt.log.last_time_ms / 60000 if attempt.log else math.nan


def start_of(attempt: Attempt) -> float:
    """First loss logged: in validation, or in training if the first validation came later."""
    curves = [attempt.log.val, attempt.log.train] if attempt.log else []
    first = min(filter(len, curves), key=lambda curve: curve.step[0], default=None)
    return float(first.loss[0]) if first else math.nan


def diverged(attempt: Attempt) -> bool:
    """True if it was stopped as diverged, has a non-finite loss, or ended no lower than it began."""
    if attempt.outcome == "done":
        several = attempt.log is not None and len(attempt.log.val) + len(attempt.log.train) > 1
        return several and attempt.loss >= start_of(attempt)
    return attempt.state in ("diverged", "finished")


def largest_rise(attempt: Attempt) -> float:
    """Largest rise of a run's validation loss above its lowest so far; NaN without validations."""
    losses = attempt.log.val.loss if attempt.log else np.zeros(0)
    losses = losses[np.isfinite(losses)]
    return float((losses - np.minimum.accumulate(losses)).max()) if len(losses) else math.nan


# ------------------------------------------------------------------------------------------------
# The values of a sweep
# ------------------------------------------------------------------------------------------------


@dataclass
class Rate:
    """Value of the setting with its runs' results; means are over seeds."""

    value: float
    arm: SweepArm
    loss: Summary
    accuracy: Summary
    minutes: Summary
    label: str = ""
    sure: bool | None = None  # whether noise could not move it across the limit of "good"; None: not tested

    @property
    def name(self) -> str:
        """Label of its arm, which the statistics use."""
        return self.arm.label

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss.mean)

    @property
    def efficiency(self) -> float:
        """Percentage points of accuracy per minute of training."""
        return 100 * self.accuracy.mean / self.minutes.mean if self.minutes.mean > 0 else math.nan

    @property
    def num_diverged(self) -> int:
        return sum(map(diverged, self.arm.attempts))

    @property
    def status(self) -> str:
        """Counts such as "2 finished, 1 diverged"; a run that ended no lower than it began has diverged."""
        words = []
        for attempt in self.arm.attempts:
            if diverged(attempt):
                words.append("diverged")
            else:
                words.append("not ended" if attempt.outcome == "missing" else attempt.state)
        order = sorted(set(words), key=lambda word: (word != "finished", word))
        return ", ".join(f"{words.count(word)} {word}" for word in order)


@dataclass
class Analysis:
    """Sweep over one setting (in lower case); its comparable rates, in order of value."""

    results: Results
    setting: str
    rates: list[Rate]
    ties: Contenders  # the test of their losses
    start: float  # loss at the start of training, mean over runs
    notes: list[str] = field(default_factory=list)

    @property
    def fall(self) -> float:
        lowest = self.lowest()
        return self.start - lowest.loss.mean if lowest else math.nan

    def lowest(self) -> Rate | None:
        """Rate of lowest loss, perhaps a lucky single run; None if no rate's runs all finished."""
        return next((rate for rate in self.rates if rate.name == self.ties.lowest), None)

    def most_accurate(self) -> Rate | None:
        """Rate of highest mean accuracy of those whose runs all finished; not tested."""
        known = [rate for rate in self.rates if rate.accuracy.n and not rate.accuracy.failed]
        return max(known, key=lambda rate: rate.accuracy.mean, default=None)

    def may_claim(self) -> bool:
        """True if rates may be called worse than the lowest or tied with it.

        Not while runs are missing, and not if the lowest is a single run, which is not tested.
        """
        tested = self.ties.tested
        return self.ties.lowest in tested and len(tested) > 1 and not self.results.count("missing")

    def is_tested(self, rate: Rate) -> bool:
        return self.may_claim() and rate.name in self.ties.tested

    def near_best(self) -> list[Rate]:
        """Rates statistically tied with the lowest, including it; none while runs are missing.

        None either if the lowest is a single run and others have several.
        """
        if self.results.count("missing") or self.ties.lowest != self.ties.reference:
            return []
        return [rate for rate in self.rates if rate.name in self.ties.names]

    def top(self) -> list[Rate]:
        """Fifth of the rates with the lowest mean loss, in order of value."""
        known = sorted((rate for rate in self.rates if rate.loss.n), key=lambda rate: rate.loss.mean)
        return sorted(known[: math.ceil(TOP * len(known))], key=lambda rate: rate.value)

    def stable(self) -> list[Rate]:
        """Rates around the lowest, up to the next that is unstable, diverged or without a result."""
        lowest = self.lowest()
        if lowest is None or lowest.label in ("unstable", "diverged"):
            return []
        place = self.rates.index(lowest)
        bad = [i for i, rate in enumerate(self.rates) if rate.label in ("unstable", "diverged", "no result")]
        low = max((i + 1 for i in bad if i < place), default=0)
        high = min((i for i in bad if i > place), default=len(self.rates))
        return self.rates[low:high]

    def threshold(self) -> Rate | None:
        """First rate above that of the lowest loss at which a run diverged; None without such a loss."""
        lowest = self.lowest()
        above = self.rates[self.rates.index(lowest) + 1 :] if lowest else []
        return next((rate for rate in above if rate.num_diverged), None)

    @property
    def noise_known(self) -> bool:
        return bool(self.ties.df)


def select(results: Results, conditions: Sequence[str]) -> Results:
    """Return the results with only the arms for which all conditions NAME=VALUE hold."""
    arms = results.arms
    for condition in conditions:
        name, _, wanted = condition.partition("=")
        values = sorted({format_value(a.settings[name.lower()]) for a in arms if name.lower() in a.settings})
        arms = [a for a in arms if format_value(a.settings.get(name.lower(), "")) == wanted]
        if not arms:
            known = f"{name} is one of {', '.join(values)}" if values else f"no arm has a setting {name}"
            raise ValueError(f"--where {condition}: no such arm; {known}")
    labels = {arm.label for arm in arms}
    control = results.control if results.control in labels else None
    versus = {a: b for a, b in results.versus.items() if control and labels >= {a, b}}
    return replace(results, arms=arms, control=control, versus=versus, notes=list(results.notes))


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def numbers_that_vary(results: Results) -> list[str]:
    """Return the settings that vary and whose values are all numbers, in lower case."""

    def is_number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    return [
        name
        for name in results.varied()
        if all(is_number(arm.settings[name]) for arm in results.arms if name in arm.settings)
    ]


def beside(results: Results, name: str) -> list[str]:
    """Return the other settings that vary and are not tied to this one."""
    return [other for other in results.varied() if other not in (name, *results.tied(name))]


def choose_setting(results: Results, asked: str | None) -> str:
    """Choose the setting, in lower case: as asked, else a learning rate, else the number that varies most."""
    varied = numbers_that_vary(results)
    known = f"numbers that vary: {', '.join(name.upper() for name in varied) or 'none'}"
    if asked is not None:
        if asked.lower() not in varied:
            raise ValueError(f"--setting {asked}: it is not a number that varies in {results.name}; {known}")
        return asked.lower()
    for name in RATES:
        if name in varied:
            return name
    if not varied:
        raise ValueError(f"no setting that is a number varies in {results.name}: there is nothing to compare")
    values = {name: {a.settings[name] for a in results.arms if name in a.settings} for name in varied}
    return max(varied, key=lambda name: (len(values[name]), name))


def analyse(results: Results, asked: str | None = None, conditions: Sequence[str] = ()) -> Analysis:
    """Analyse a sweep. Raises ValueError if no such setting varies, or several arms share a value."""
    results = select(results, conditions)
    setting = choose_setting(results, asked)
    arms = [arm for arm in results.arms if setting in arm.settings and not arm.foreign]
    notes = [
        f"{arm.label} is left out: {arm.foreign or f'it has no {setting.upper()}'}"
        for arm in results.arms
        if arm not in arms
    ]
    results.arms = arms
    check_one_arm_a_value(results, setting)
    others = beside(results, setting)
    if others:
        notes.append(f"values differ also in {', '.join(name.upper() for name in others)}")
    rates = sorted((rate_of(arm, setting) for arm in arms), key=lambda rate: rate.value)
    starts = [start for start in map(start_of, results.attempts) if math.isfinite(start)]
    start = math.fsum(starts) / len(starts) if starts else math.nan
    analysis = Analysis(results, setting, rates, contenders(*samples_of(arms)), start, notes)
    for rate in rates:
        rate.label, rate.sure = label_of(rate, analysis)
    return analysis


def rate_of(arm: SweepArm, setting: str) -> Rate:
    loss, accuracy, minutes = (
        summarize(arm.samples(measure)[0]) for measure in (loss_of, accuracy_of, minutes_of)
    )
    return Rate(float(arm.settings[setting]), arm, loss, accuracy, minutes)


def check_one_arm_a_value(results: Results, setting: str) -> None:
    arms: dict[float, SweepArm] = {}
    for arm in results.arms:
        value = float(arm.settings[setting])
        other = arms.setdefault(value, arm)
        if other is arm:
            continue
        hint = "by naming another --setting"
        for name in beside(results, setting):
            if name in arm.settings and arm.settings[name] != other.settings.get(name):
                hint = f"as with --where {name.upper()}={format_value(arm.settings[name])}"
                break
        both = f"{other.label} and {arm.label} both have {setting.upper()}={value:g}"
        raise ValueError(f"{both}: choose between them, {hint}")


def label_of(rate: Rate, analysis: Analysis) -> tuple[str, bool | None]:
    """Return the label by RULES, and whether being good, or not, is certain (None: not tested)."""
    learnt = [a for a in rate.arm.attempts if a.outcome == "done" and not diverged(a)]
    lowest = analysis.lowest()
    if not learnt:
        return ("diverged" if rate.num_diverged else "no result"), None
    if rate.num_diverged or is_unstable(rate, learnt, analysis):
        return "unstable", None
    if lowest is None:
        return "no result", None
    short, limit = rate.loss.mean - lowest.loss.mean, (1 - GOOD) * analysis.fall
    sure = None
    if analysis.is_tested(rate):
        sure = rate is lowest or abs(short - limit) > analysis.ties.half_width(rate.name, lowest.name)
    if short <= limit:
        tied = analysis.is_tested(rate) and rate in analysis.near_best()
        return ("optimal" if tied else "good"), sure
    return ("too low" if rate.value < lowest.value else "declining"), sure


def is_unstable(rate: Rate, learnt: Sequence[Attempt], analysis: Analysis) -> bool:
    fall, ties = analysis.fall, analysis.ties
    if any(largest_rise(attempt) > LOST * fall for attempt in learnt):
        return True
    losses, seeds = rate.arm.samples()
    if ties.shared:  # the noise is without what the runs of a seed share
        losses = [loss - ties.shared.get(seed, math.nan) for loss, seed in zip(losses, seeds, strict=True)]
    sd = summarize(losses).sd
    return sd > SPREAD * ties.sd and sd > (1 - GOOD) * fall  # False if the noise is unknown (NaN)
