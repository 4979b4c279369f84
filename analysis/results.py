"""Results of a sweep: its runs, planned or found, by arm, and the verdict on the arms.

    from analysis.read_results import read_results
    results = read_results(["sweeps/spectral_lr.toml"])
    results.arms[0].samples()     # losses and seeds; failed runs are NaN
    results.verdict.better        # stats.judge; all that plots and reports claim comes from here

Losses are those of the last validation, in nats per token.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from analysis.arms import DATA, Arm
from analysis.run_log import RunLog, not_training
from analysis.stats import Comparison, Summary, Verdict, judge, mean_by_seed, summarize

FAILED = ("crashed", "diverged", "hung")  # these count as runs; other unfinished runs are missing


@dataclass(frozen=True)
class Reach:
    """Interpolated point where a run reached the target; x is in tokens or steps, NaN if not logged."""

    x: float
    minutes: float


@dataclass
class Attempt:
    """Run, planned or found, and its outcome. `loss` is NaN unless it finished.

    `reach` is where it reached the target, set by `reaching.find_reaches`.
    """

    run_id: str
    seed: int | None
    state: str
    loss: float = math.nan
    tag: str = ""
    reason: str = ""
    source: str = ""
    log: RunLog | None = None
    reach: Reach | None = None

    @property
    def outcome(self) -> str:
        """Outcome: done, failed (counts as a run) or missing (has not ended)."""
        if self.state == "finished":
            return "done" if math.isfinite(self.loss) else "failed"
        return "failed" if self.state in FAILED else "missing"

    @property
    def has_started(self) -> bool:
        """True if its log has event:started; one cut before it has no reliable source or data."""
        return bool(self.log and self.log.started)

    @property
    def data(self) -> str:
        """Data that the log says the run used; empty if it does not say."""
        parts = [self.log.started.get(name, "") for name in DATA] if self.log else []
        return " ".join(part for part in parts if part)


def loss_of(attempt: Attempt) -> float:
    return attempt.loss


def accuracy_of(attempt: Attempt) -> float:
    """Fraction of tokens predicted correctly at the last validation; NaN if not logged."""
    val = attempt.log.val if attempt.log else ()
    return float(val.acc[-1]) if len(val) else math.nan


@dataclass
class SweepArm(Arm):
    """Runs that differ only in their seed. `runs` are their logs; `foreign` says why it is not compared."""

    attempts: list[Attempt] = field(default_factory=list)
    script: str = ""
    source: str = ""
    settings: dict = field(default_factory=dict)
    foreign: str = ""

    def samples(self, measure: Callable[[Attempt], float] = loss_of) -> tuple[list[float], list[int | None]]:
        """Return losses (or another measure) and seeds: one per finished seed, NaN per failed run."""
        done = [attempt for attempt in self.attempts if attempt.outcome == "done"]
        failed = [attempt for attempt in self.attempts if attempt.outcome == "failed"]
        losses, seeds = mean_by_seed([measure(a) for a in done], [a.seed for a in done])
        return losses + [math.nan] * len(failed), seeds + [attempt.seed for attempt in failed]

    def values(self, measure: Callable[[Attempt], float] = loss_of) -> list[float]:
        """Return the finite values among the samples."""
        return [value for value in self.samples(measure)[0] if math.isfinite(value)]

    def count(self, outcome: str) -> int:
        return sum(attempt.outcome == outcome for attempt in self.attempts)

    @property
    def unfinished(self) -> list[str]:
        """Say how many runs failed or have not ended; nothing if all have finished."""
        counts = {"failed": self.count("failed"), "not ended": self.count("missing")}
        return [f"{count} of {len(self.attempts)} {word}" for word, count in counts.items() if count]

    @property
    def strength(self) -> float | None:
        """ORD's a; None if the update has no single a, as in the baseline or with ORD_MODE=post."""
        split = any(self.settings.get(f"spectral_lr_mul_{part}") is not None for part in ("attn", "mlp"))
        if split or self.settings.get("ord_mode") in ("post", "off"):
            return None
        value = self.settings.get("spectral_lr_mul")
        return float(value) if isinstance(value, (int, float)) else None


def samples_of(
    arms: Iterable[SweepArm], measure: Callable[[Attempt], float] = loss_of
) -> tuple[dict[str, list[float]], dict[str, list[int | None]]]:
    """Return losses (or another measure) and seeds, each by the arms' labels."""
    losses, seeds = {}, {}
    for arm in arms:
        losses[arm.label], seeds[arm.label] = arm.samples(measure)
    return losses, seeds


@dataclass
class Results:
    """Arms of a sweep in the order planned, else by name; `notes` are what a reader must know."""

    name: str
    arms: list[SweepArm]
    control: str | None = None
    folder: Path = Path("logs")
    planned: bool = False  # whether a manifest says what should have been run
    scale: str | None = None
    question: str = ""
    earlier: list[Attempt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versus: dict[str, str] = field(default_factory=dict)  # an arm's label -> its own control's
    looks: dict[str, dict] = field(default_factory=dict)  # an arm's label -> its colour and marker

    @cached_property
    def verdict(self) -> Verdict:
        losses, seeds = samples_of(arm for arm in self.arms if not arm.foreign)
        return judge(losses, seeds, self.control, self.versus)

    @property
    def reference(self) -> str | None:
        """Arm that all are compared with: the control, else the arm of lowest mean."""
        return self.verdict.reference

    @property
    def compared_with(self) -> str:
        """Other side of all comparisons, for headings."""
        return "its control" if self.versus else self.reference or "nothing"

    @property
    def attempts(self) -> list[Attempt]:
        return [attempt for arm in self.arms for attempt in arm.attempts]

    @property
    def runs(self) -> list[RunLog]:
        return [run for arm in self.arms for run in arm.runs]

    @cached_property
    def x_unit(self) -> str:
        """Unit in which the runs' training is measured: tokens if all finished runs log them, else steps."""
        runs = [attempt.log for attempt in self.attempts if attempt.outcome == "done"]
        return "tokens" if runs and all(np.isfinite(run.val.tokens).all() for run in runs) else "steps"

    @property
    def has_steps(self) -> bool:
        """True if any run has logged a step."""
        return any(run.last_step >= 0 for run in self.runs)

    @property
    def has_curves(self) -> bool:
        """True if any run was validated more than once."""
        return any(len(run.val.step) > 1 for run in self.runs)

    def count(self, outcome: str) -> int:
        return sum(arm.count(outcome) for arm in self.arms)

    def summary(self, arm: SweepArm) -> Summary:
        """Return the summary of an arm's final losses, whether it is compared or not."""
        return summarize(arm.samples()[0])

    def comparison(self, label: str) -> Comparison | None:
        """Compare an arm with its control or the reference; None for that itself and arms not compared."""
        return self.verdict.pairs.get(label)

    @property
    def has_differences(self) -> bool:
        """True if any arm's final loss can be compared with another's."""
        pairs = [self.comparison(arm.label) for arm in self.arms]
        return any(pair and math.isfinite(pair.difference) for pair in pairs)

    def call(self, label: str) -> str:
        """Call an arm better, worse or undecided; undecided as long as runs are missing."""
        if self.count("missing"):
            return "undecided"
        if label in self.verdict.better:
            return "better"
        return "worse" if label in self.verdict.worse else "undecided"

    def ranked(self) -> list[SweepArm]:
        """Sort arms by mean final loss; those not compared or without a finished run come last."""
        means = {name: summary.mean for name, summary in self.verdict.summaries.items()}
        places = {arm.label: means.get(arm.label, math.nan) for arm in self.arms}
        return sorted(
            self.arms, key=lambda arm: (math.isnan(places[arm.label]), places[arm.label], arm.label)
        )

    def varied(self) -> list[str]:
        """Return settings (lower case) in which arms differ, among arms whose scripts have them."""
        hidden = set().union(*(run.not_training for run in self.runs)) if self.runs else not_training()
        names = sorted(set().union(*(arm.settings for arm in self.arms)) - hidden)
        values = {name: {repr(a.settings[name]) for a in self.arms if name in a.settings} for name in names}
        return [name for name in names if len(values[name]) > 1]

    def tied(self, name: str) -> list[str]:
        """Return settings that follow from this one, such as ADAM_LR = 0.1 x MUON_LR.

        Their values correspond one to one; at least three are required, as two may be chance.
        """
        found = []
        for other in self.varied():
            both = [arm.settings for arm in self.arms if name in arm.settings and other in arm.settings]
            pairs = {(repr(settings[name]), repr(settings[other])) for settings in both}
            own, others = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
            if other != name and len(pairs) == len(own) == len(others) > 2:
                found.append(other)
        return found

    def remarks(self, arm: SweepArm) -> list[str]:
        """Return remarks on an arm: a single run, runs that failed or have not ended, not compared."""
        single = ["a single run"] if self.summary(arm).n == 1 else []
        return [*single, *arm.unfinished, *(["not compared"] if arm.foreign else [])]
