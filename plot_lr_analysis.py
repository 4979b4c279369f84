"""Analyses a sweep over the learning rate, or any other number: what learns, what fails, what is best.

    python plot_lr_analysis.py sweeps/moe_lr.toml                         # writes to logs/moe_lr/lr_analysis/
    python plot_lr_analysis.py sweeps/residual_scale.toml                 # whatever varies
    python plot_lr_analysis.py sweeps/muon_decay.toml --where MUON_DECAY_MODE=param
    python plot_lr_analysis.py logs --setting MUON_LR --out analysis      # any logs

Written are results.md and results.csv (one line a value), final_results.json (the same with every run),
comprehensive_insights.json (best, ranges, divergence threshold, labels with their rules), and as pictures
combined_lr_analysis.png, detailed_lr_analysis.png, all_lr_loss_vs_steps.png and individual_plots/. The same
logs give the same tables, byte for byte.

Losses are those of the last validation, in nats a token, means over seeds; perplexity is exp(mean loss).
Every value gets a label. With "the fall" for how far the best value's loss fell from where training began:
{rules}
Values that cannot be told from the best are those of stats.contenders: the truly best one is among them in
95% of such sweeps. Where every value is a single run, how much runs differ by luck is unknown, and the output
says so.
"""

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

import plot_loss
import report_sweep
from analysis import style
from analysis.run_log import format_value
from analysis.stats import Contenders, Summary, contenders, summarize
from analysis.sweep_results import Attempt, Results, SweepArm, format_interval, read_results

RATES = ("muon_lr", "adam_lr", "router_lr")  # looked at first, if no setting is named
GOOD = 0.98  # share of the best's fall that a good value keeps
LOST = 0.05  # share of the fall that an unstable run lost again on its way
SPREAD = 5.0  # an unstable value's runs differ by so many times the noise, and by 1 - GOOD of the fall
TOP = 0.2
MIN_INTERVAL = report_sweep.MIN_INTERVAL
RULES = {
    "optimal": f"good, and it cannot be told from the best value ({1 - 0.05:.0%} confidence)",
    "good": f"its mean loss fell by at least {GOOD:.0%} of the fall",
    "too low": "not good, and lower than the best value",
    "declining": "not good, and higher than the best value",
    "unstable": "some but not all of its runs diverged; or a run's validation loss stood at some time more "
    f"than {LOST:.0%} of the fall above its lowest until then; or its runs' sd exceeds {SPREAD:g} times the "
    f"sweep's noise and {1 - GOOD:.0%} of the fall",
    "diverged": "all its runs diverged, or ended no lower than they began",
    "no result": "no run has finished and none diverged: they crashed, hung or have not ended",
}
PICTURES = ("combined_lr_analysis", "detailed_lr_analysis", "all_lr_loss_vs_steps")
LOOKS = {  # colour and marker of a label
    "optimal": ("#009E73", "*"),
    "good": ("#0072B2", "o"),
    "too low": ("#56B4E9", "v"),
    "declining": ("#E69F00", "^"),
    "unstable": ("#D55E00", "s"),
    "diverged": ("#000000", "X"),
    "no result": (style.GREY, "P"),
}
if __doc__:  # python -OO has none
    __doc__ = __doc__.format(rules="\n".join(f"  * {label}: {rule}" for label, rule in RULES.items()))


# ------------------------------------------------------------------------------------------------
# What is measured of a run
# ------------------------------------------------------------------------------------------------


def loss_of(attempt: Attempt) -> float:
    return attempt.loss


def accuracy_of(attempt: Attempt) -> float:
    """Share of validation tokens predicted right at the last validation; NaN if it is not logged."""
    val = attempt.log.val if attempt.log else ()
    return float(val.acc[-1]) if len(val) else math.nan


def minutes_of(attempt: Attempt) -> float:
    """Training time."""
    return attempt.log.last_time_ms / 60000 if attempt.log else math.nan


def start_of(attempt: Attempt) -> float:
    """The first validation's loss, before the first step if that was measured."""
    losses = attempt.log.val.loss if attempt.log else np.zeros(0)
    return float(losses[0]) if len(losses) else math.nan


def diverged(attempt: Attempt) -> bool:
    """It was stopped as diverged, its loss is no number, or it ended no lower than it began."""
    if attempt.outcome == "done":
        return attempt.log is not None and len(attempt.log.val) > 1 and attempt.loss >= start_of(attempt)
    return attempt.state in ("diverged", "finished")


def largest_rise(attempt: Attempt) -> float:
    """The most that a run's validation loss stood above its lowest until then, NaN if it has none."""
    losses = attempt.log.val.loss if attempt.log else np.zeros(0)
    losses = losses[np.isfinite(losses)]
    return float((losses - np.minimum.accumulate(losses)).max()) if len(losses) else math.nan


# ------------------------------------------------------------------------------------------------
# The values of a sweep
# ------------------------------------------------------------------------------------------------


@dataclass
class Rate:
    """One value of the setting, and what its runs gave; means are over seeds."""

    value: float
    arm: SweepArm
    loss: Summary
    accuracy: Summary
    minutes: Summary
    label: str = ""
    sure: bool | None = None  # whether the noise leaves it on its side of good's limit; None: unknown

    @property
    def name(self) -> str:
        """By which the statistics know it."""
        return self.arm.label

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss.mean) if self.loss.mean < 700 else math.inf

    @property
    def efficiency(self) -> float:
        """Percentage points of accuracy a minute of training."""
        return 100 * self.accuracy.mean / self.minutes.mean if self.minutes.mean > 0 else math.nan

    @property
    def num_diverged(self) -> int:
        return sum(map(diverged, self.arm.attempts))

    @property
    def status(self) -> str:
        """3 finished, or 2 finished, 1 diverged, and so on; a run that ended no lower has diverged."""
        words = [
            "diverged" if diverged(a) else "not ended" if a.outcome == "missing" else a.state
            for a in self.arm.attempts
        ]
        order = sorted(set(words), key=lambda word: (word != "finished", word))
        return ", ".join(f"{words.count(word)} {word}" for word in order)


@dataclass
class Analysis:
    """A sweep over one setting (in lower case); rates in order of value, only those that can be compared."""

    results: Results
    setting: str
    rates: list[Rate]
    by_loss: Contenders
    by_accuracy: Contenders
    start: float  # loss where training began, mean over runs
    notes: list[str] = field(default_factory=list)

    @property
    def fall(self) -> float:
        best = self.best()
        return self.start - best.loss.mean if best else math.nan

    def best(self, by: str = "loss") -> Rate | None:
        """The rate of lowest loss (highest accuracy) among those none of whose runs failed; None if none."""
        found = self.by_loss if by == "loss" else self.by_accuracy
        return next((rate for rate in self.rates if rate.name == found.lowest), None)

    def near_best(self, by: str = "loss") -> list[Rate]:
        """The rates that cannot be told from the best, the best among them."""
        found = self.by_loss if by == "loss" else self.by_accuracy
        return [rate for rate in self.rates if rate.name in found.names]

    def top(self) -> list[Rate]:
        """The fifth of the rates whose mean loss is lowest, in order of value."""
        known = sorted((r for r in self.rates if r.loss.n), key=lambda rate: (rate.loss.mean, rate.value))
        chosen = known[: math.ceil(TOP * len(known))]
        return [rate for rate in self.rates if rate in chosen]

    def stable(self) -> list[Rate]:
        """The rates around the best up to the next that is unstable, diverged or has no result."""
        best = self.best()
        if best is None or best.label in ("unstable", "diverged"):
            return []
        place = self.rates.index(best)
        bad = [i for i, rate in enumerate(self.rates) if rate.label in ("unstable", "diverged", "no result")]
        low = max((i + 1 for i in bad if i < place), default=0)
        high = min((i for i in bad if i > place), default=len(self.rates))
        return self.rates[low:high]

    def threshold(self) -> Rate | None:
        """The lowest rate above the best at which a run diverged."""
        best = self.best()
        start = self.rates.index(best) + 1 if best else 0
        return next((rate for rate in self.rates[start:] if rate.num_diverged), None)

    @property
    def noise_known(self) -> bool:
        return bool(self.by_loss.df)


def select(results: Results, conditions: Sequence[str]) -> Results:
    """The arms for which all of NAME=VALUE hold."""
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


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choose_setting(results: Results, asked: str | None) -> str:
    """The setting to look at, in lower case: as asked, else a learning rate, else what varies most."""
    varied = [
        name
        for name in results.varied()
        if all(is_number(arm.settings[name]) for arm in results.arms if name in arm.settings)
    ]
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
    return report_sweep.by_value(results) or varied[0]


def analyse(results: Results, asked: str | None = None, conditions: Sequence[str] = ()) -> Analysis:
    """Everything computed. ValueError if the sweep has no such setting, or several arms for one value."""
    results = select(results, conditions)
    setting = choose_setting(results, asked)
    results.by = setting
    arms = [arm for arm in results.arms if setting in arm.settings and not arm.foreign]
    notes = [
        f"{arm.label} is left out: {arm.foreign or f'it has no {setting.upper()}'}"
        for arm in results.arms
        if arm not in arms
    ]
    results.arms = arms
    check_one_arm_a_value(results, setting)
    others = report_sweep.beside(results, setting)
    if others:
        notes.append(f"values differ also in {', '.join(name.upper() for name in others)}")
    rates = [
        Rate(float(arm.settings[setting]), arm, *(summarize(arm.samples(m)[0]) for m in MEASURES.values()))
        for arm in sorted(arms, key=lambda arm: float(arm.settings[setting]))
    ]
    samples = {rate.name: rate.arm.samples() for rate in rates}
    by_loss = contenders(*({name: sample[i] for name, sample in samples.items()} for i in (0, 1)))
    samples = {rate.name: rate.arm.samples(lambda a: -accuracy_of(a)) for rate in rates}
    by_accuracy = contenders(*({name: sample[i] for name, sample in samples.items()} for i in (0, 1)))
    starts = [start_of(attempt) for attempt in results.attempts]
    starts = [start for start in starts if math.isfinite(start)]
    start = math.fsum(starts) / len(starts) if starts else math.nan
    analysis = Analysis(results, setting, rates, by_loss, by_accuracy, start, notes)
    for rate in rates:
        rate.label, rate.sure = label_of(rate, analysis)
    return analysis


MEASURES: dict[str, Callable[[Attempt], float]] = {
    "loss": loss_of,
    "accuracy": accuracy_of,
    "minutes": minutes_of,
}


def check_one_arm_a_value(results: Results, setting: str) -> None:
    arms: dict[float, SweepArm] = {}
    for arm in results.arms:
        value = float(arm.settings[setting])
        if value in arms:
            names = report_sweep.beside(results, setting)
            hints = [
                f"--where {name.upper()}={format_value(arm.settings[name])}"
                for name in names
                if arm.settings.get(name) != arms[value].settings.get(name) and name in arm.settings
            ]
            raise ValueError(
                f"{arms[value].label} and {arm.label} both have {setting.upper()}={value:g}: choose between "
                f"them{f', as with {hints[0]}' if hints else ' by naming another --setting'}"
            )
        arms[value] = arm


def label_of(rate: Rate, analysis: Analysis) -> tuple[str, bool | None]:
    """The label by RULES, and whether it is on its side of good's limit beyond noise (None: unknown)."""
    done = [a for a in rate.arm.attempts if a.outcome == "done"]
    learnt = [attempt for attempt in done if not diverged(attempt)]
    best, fall = analysis.best(), analysis.fall
    if not learnt:
        return ("diverged" if rate.num_diverged else "no result"), None
    if rate.num_diverged or best is None or is_unstable(rate, learnt, analysis):
        return "unstable", None
    short = rate.loss.mean - best.loss.mean
    limit = (1 - GOOD) * fall
    sure = None
    if analysis.noise_known:
        width = analysis.by_loss.half_width(rate.name, best.name)
        sure = rate is best or abs(short - limit) > width
    if not short <= limit:
        return ("too low" if rate.value < best.value else "declining"), sure
    return ("optimal" if rate.name in analysis.by_loss.names else "good"), sure


def is_unstable(rate: Rate, learnt: Sequence[Attempt], analysis: Analysis) -> bool:
    fall = analysis.fall
    if any(largest_rise(attempt) > LOST * fall for attempt in learnt):
        return True
    wide = max(SPREAD * analysis.by_loss.sd, (1 - GOOD) * fall)  # NaN if the noise is unknown: never wider
    return analysis.noise_known and rate.loss.sd > wide


# ------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------


def name_values(rates: Sequence[Rate]) -> str:
    """0.01, 0.02 and 0.03."""
    values = [format_value(rate.value) for rate in rates]
    return f"{', '.join(values[:-1])} and {values[-1]}" if len(values) > 1 else "".join(values)


def edge_of(rate: Rate, analysis: Analysis) -> str | None:
    """Whether the best is the lowest or highest value tried, so that a better one may lie beyond."""
    if len(analysis.rates) < 2 or rate not in (analysis.rates[0], analysis.rates[-1]):
        return None
    return "lowest" if rate is analysis.rates[0] else "highest"


def best_sentence(analysis: Analysis, by: str) -> str:
    best, near = analysis.best(by), analysis.near_best(by)
    if best is None:
        return f"no value can be called best by {by}: none has finished runs, none of which failed"
    factor, summary = (1, best.loss) if by == "loss" else (100, best.accuracy)
    unit = "" if by == "loss" else "%"
    name = f"{analysis.setting.upper()} = {format_value(best.value)}"
    text = f"best by {by}: {name} ({factor * summary.mean:.4f}{unit}"
    if summary.n == 1:
        text += ", a single run)"
    else:
        interval = format_interval(factor * summary.low, factor * summary.high, signed=False)
        text += f", 95% interval {interval}, sd {factor * summary.sd:.4f}, n = {summary.n})"
    others = [rate for rate in near if rate is not best]
    found = analysis.by_loss if by == "loss" else analysis.by_accuracy
    if not found.df:
        text += "; how much runs differ by luck is unknown, so that none may be called better than another"
    elif others:
        text += f"; it cannot be told from {name_values(others)}"
    else:
        text += "; every other value is worse"
    edge = edge_of(best, analysis)
    return text + (f"; it is the {edge} value tried, so that a better one may lie beyond" if edge else "")


def sentences(analysis: Analysis) -> list[str]:
    """What was found, in words."""
    missing = analysis.results.count("missing")
    total = len(analysis.results.attempts)
    lines = [f"{missing} of {total} runs have not ended: this is how it stands so far"] * bool(missing)
    lines.append(best_sentence(analysis, "loss"))
    if any(rate.accuracy.n for rate in analysis.rates):
        lines.append(best_sentence(analysis, "accuracy"))
    stable, threshold = analysis.stable(), analysis.threshold()
    if stable:
        low, high = (format_value(stable[i].value) for i in (0, -1))
        lines.append(f"stable from {low} to {high}" if len(stable) > 1 else f"stable at {low} only")
    lines.append(
        f"the lowest value above the best at which a run diverged is {format_value(threshold.value)}"
        if threshold
        else "no run above the best value diverged"
    )
    if analysis.noise_known:
        found = analysis.by_loss
        apart = ", what the runs of a seed share taken out," if found.paired else ""
        lines.append(
            f"noise: a run's loss varies by {found.sd:.4f} (sd{apart} of the better half of the values, "
            f"{found.df} degrees of freedom)"
        )
    return lines


def remark(rate: Rate, analysis: Analysis) -> str:
    parts = ["best by loss"] * (rate is analysis.best())
    parts += ["best by accuracy"] * (rate is analysis.best("accuracy"))
    if analysis.noise_known and rate in analysis.near_best() and rate is not analysis.best():
        parts.append("not told from the best")
    parts += ["near the limit of good"] * (rate.sure is False)
    parts += ["a single run"] * (rate.loss.n == 1)
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def table(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    header = [analysis.setting.upper(), *(name.upper() for name in analysis.results.tied(analysis.setting))]
    tied = len(header) - 1
    header += ["n", "loss", "sd", "95% interval", "accuracy", "sd", "perplexity", "minutes", "label"]
    header += ["status", "remark"]
    rows = []
    for rate in analysis.rates:
        loss, accuracy = rate.loss, rate.accuracy
        row = [format_value(rate.value)]
        row += [format_value(rate.arm.settings[name.lower()]) for name in header[1 : 1 + tied]]
        row += [str(loss.n), style.format_loss(loss.mean), style.format_loss(loss.sd)]
        row += [format_interval(loss.low, loss.high, signed=False)]
        row += [percent(accuracy.mean), percent(accuracy.sd)]
        row += [f"{rate.perplexity:.4g}" if loss.n else "-", number(rate.minutes.mean)]
        rows.append([*row, rate.label, rate.status, remark(rate, analysis)])
    return header, rows


def percent(share: float) -> str:
    return f"{100 * share:.2f}%" if math.isfinite(share) else "-"


def number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def markdown(analysis: Analysis) -> str:
    """The table with what was found, the rules and the pictures."""
    header, rows = table(analysis)
    scale = f" at scale `{analysis.results.scale}`" if analysis.results.scale else ""
    found = "\n".join(f"* {text[0].upper()}{text[1:]}." for text in sentences(analysis))
    rules = "\n".join(f"* {label}: {rule}" for label, rule in RULES.items())
    notes = "\n".join(f"* {note}" for note in analysis.results.notes + analysis.notes)
    parts = [f"# {analysis.results.name}{scale}: {analysis.setting.upper()}", found]
    parts += [style.format_markdown(header, rows)]
    parts += [
        "Loss is that of the last validation, in nats a token; perplexity is exp(mean loss); means and "
        "intervals are over seeds; minutes are of training on the machine that ran."
    ]
    parts += [f"![{name}]({name}.png)" for name in PICTURES]
    parts += [
        f"Labels, with the fall = {analysis.fall:.4f}, how far the best value's loss fell from where "
        f"training began ({analysis.start:.4f}):\n\n{rules}"
    ]
    return "\n\n".join([*parts, notes] if notes else parts) + "\n"


def rate_record(rate: Rate, analysis: Analysis) -> dict:
    """One value as final_results.json has it."""
    return {
        "rate": rate.value,
        **{name: rate.arm.settings[name] for name in analysis.results.tied(analysis.setting)},
        "loss": rate.loss.mean,
        "accuracy": rate.accuracy.mean,
        "perplexity": rate.perplexity,
        "time_minutes": rate.minutes.mean,
        "status": rate.status,
        "label": rate.label,
        "label_is_sure": rate.sure,
        "accuracy_percent_per_minute": rate.efficiency,
        "not_told_from_best": analysis.noise_known and rate.name in analysis.by_loss.names,
        "n": rate.loss.n,
        "single_run": rate.loss.n == 1,
        "loss_sd": rate.loss.sd,
        "loss_interval": [rate.loss.low, rate.loss.high],
        "accuracy_sd": rate.accuracy.sd,
        "accuracy_interval": [rate.accuracy.low, rate.accuracy.high],
        "perplexity_interval": [_exp(rate.loss.low), _exp(rate.loss.high)],
        "time_minutes_sd": rate.minutes.sd,
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def final_results(analysis: Analysis) -> dict:
    """final_results.json: every value, and every run of it."""
    records = []
    for rate in analysis.rates:
        runs = [
            {
                "run_id": attempt.run_id,
                "seed": attempt.seed,
                "status": "diverged" if diverged(attempt) else attempt.state,
                "reason": attempt.reason,
                "loss": attempt.loss,
                "accuracy": accuracy_of(attempt),
                "perplexity": _exp(attempt.loss),
                "time_minutes": minutes_of(attempt),
            }
            for attempt in rate.arm.attempts
        ]
        records.append({**rate_record(rate, analysis), "runs": runs})
    return {"sweep": analysis.results.name, "setting": analysis.setting.upper(), "results": records}


def ends(rates: Sequence[Rate]) -> list[float] | None:
    return [rates[0].value, rates[-1].value] if rates else None


def best_record(analysis: Analysis, by: str) -> dict | None:
    best = analysis.best(by)
    if best is None:
        return None
    summary = best.loss if by == "loss" else best.accuracy
    found = analysis.by_loss if by == "loss" else analysis.by_accuracy
    others = [rate.value for rate in analysis.near_best(by) if rate is not best]
    return {
        "rate": best.value,
        **{key: value for key, value in asdict(summary).items() if key != "failed"},
        "single_run": summary.n == 1,
        "cannot_be_told_from": others if found.df else None,
        "edge_of_the_range": edge_of(best, analysis),
    }


def insights(analysis: Analysis) -> dict:
    """comprehensive_insights.json: all computed."""
    results, top, stable = analysis.results, analysis.top(), analysis.stable()
    threshold = analysis.threshold()
    good = [rate for rate in analysis.rates if rate.label in ("good", "optimal")]
    return {
        "sweep": results.name,
        "scale": results.scale,
        "setting": analysis.setting.upper(),
        "tied_to_it": [name.upper() for name in results.tied(analysis.setting)],
        "found": sentences(analysis),
        "best_by_loss": best_record(analysis, "loss"),
        "best_by_accuracy": best_record(analysis, "accuracy"),
        "top_20_percent": {"rates": [rate.value for rate in top], "range": ends(top)},
        "good_range": ends(good),
        "stable_range": ends(stable),
        "divergence_threshold": threshold.value if threshold else None,
        "range_tested": ends(analysis.rates),
        "counts": {
            "rates": len(analysis.rates),
            "runs": len(results.attempts),
            **{outcome: results.count(outcome) for outcome in ("done", "failed", "missing")},
            "diverged": sum(rate.num_diverged for rate in analysis.rates),
            "labels": {label: sum(rate.label == label for rate in analysis.rates) for label in RULES},
        },
        "noise": {
            "sd_of_a_run": analysis.by_loss.sd,
            "degrees_of_freedom": analysis.by_loss.df,
            "without_what_a_seed_shares": analysis.by_loss.paired and analysis.noise_known,
            "alpha": analysis.by_loss.alpha,
        },
        "start_loss": analysis.start,
        "fall": analysis.fall,
        "labels": {format_value(rate.value): rate.label for rate in analysis.rates},
        "rules": RULES,
        "notes": results.notes + analysis.notes,
    }


def as_csv(analysis: Analysis) -> str:
    """One line a value, numbers to the last digit; empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for number, rate in enumerate(analysis.rates):
        record = rate_record(rate, analysis)
        for name in ("loss", "accuracy", "perplexity"):
            record[f"{name}_low"], record[f"{name}_high"] = record.pop(f"{name}_interval")
        record["remark"] = remark(rate, analysis)
        if not number:
            writer.writerow(record)
        finite = report_sweep.without_nan(record)
        writer.writerow(["" if value is None else value for value in finite.values()])
    return out.getvalue()


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def scale_x(ax, analysis: Analysis) -> None:
    """Logarithmic where values span a factor of ten; ticks are values that were tried, as far as they fit."""
    values = [rate.value for rate in analysis.rates]
    if min(values) > 0 and max(values) >= 10 * min(values):
        ax.set_xscale("log")
        ax.set_xlim(min(values) / 1.25, max(values) * 1.25)
    else:
        margin = 0.04 * (max(values) - min(values)) or abs(values[0]) * 0.1 or 1
        ax.set_xlim(min(values) - margin, max(values) + margin)
    place = dict(
        zip(
            values,
            ax.transAxes.inverted().transform(ax.transData.transform([(value, 1) for value in values]))[:, 0],
            strict=True,
        )
    )
    best, kept = analysis.best(), []
    for value in sorted(values, key=lambda value: (best is None or value != best.value, value)):
        if all(abs(place[value] - place[other]) >= 0.055 for other in kept):
            kept.append(value)
    names = [format_value(value) for value in kept]
    ax.set_xticks(kept, names, rotation=60 if len(kept) > 7 else 0, fontsize=8)
    ax.set_xticks(values, minor=True, labels=[""] * len(values))
    ax.set_xlabel(analysis.setting.upper())
    if best:
        ax.axvline(best.value, color=LOOKS["optimal"][0], linewidth=1, linestyle=(0, (2, 2)), zorder=0.5)


def draw_values(ax, analysis: Analysis, measure, factor: float, limits: tuple[float, float] | None) -> None:
    """Each value's mean with its interval and its runs as dots; beyond the limits, a mark at their edge."""
    drawn = [(rate, summarize(rate.arm.samples(measure)[0])) for rate in analysis.rates]
    known = [(rate, found) for rate, found in drawn if found.n]
    ax.plot(
        [rate.value for rate, _ in known],
        [factor * found.mean for _, found in known],
        color="#bbbbbb",
        linewidth=1,
        zorder=1,
    )
    if limits:
        ax.set_ylim(*limits)
    for rate, found in drawn:
        colour, marker = LOOKS[rate.label]
        mean = factor * found.mean
        if not found.n or (limits and not limits[0] <= mean <= limits[1]):
            up = bool(found.n) and mean > (limits or (0, 0))[1]
            y, text = (0.985, "▲" if up else "×" if not found.n else "▼")
            y = 0.015 if text == "▼" else y
            ax.text(
                rate.value,
                y,
                text,
                color=colour,
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom" if y < 0.5 else "top",
                fontsize=9,
            )
            continue
        losses = [factor * x for x in rate.arm.samples(measure)[0] if math.isfinite(x)]
        if len(losses) > 1:
            ax.plot([rate.value] * len(losses), losses, ".", color=colour, markersize=4, alpha=0.6, zorder=2)
        half = factor * (found.high - found.low) / 2 if found.n >= MIN_INTERVAL else None
        face = {"markerfacecolor": "white"} if found.n == 1 else {}
        ax.errorbar(
            [rate.value],
            [mean],
            half,
            color=colour,
            marker=marker,
            capsize=2.5,
            linestyle="none",
            markersize=10 if marker == "*" else 6,
            zorder=3,
            **face,
        )


def label_legend(fig, analysis: Analysis) -> None:
    """The labels in use, and what bars, dots and hollow marks are."""
    from matplotlib.lines import Line2D

    used = [label for label in LOOKS if any(rate.label == label for rate in analysis.rates)]
    handles = [
        Line2D(
            [],
            [],
            color=LOOKS[label][0],
            marker=LOOKS[label][1],
            linestyle="none",
            label=label,
            markersize=10 if label == "optimal" else 6,
        )
        for label in used
    ]
    counts = [rate.loss.n for rate in analysis.rates]
    key = ["bars: 95% interval over seeds"] * any(n >= MIN_INTERVAL for n in counts)
    key += ["dots: runs"] * any(n > 1 for n in counts)
    key += ["no interval from two runs"] * any(n == 2 for n in counts)
    key += ["hollow: a single run"] * any(n == 1 for n in counts)
    key += ["▲▼ beyond this range", "× no result", "dashed: the best by loss"]
    fig.legend(
        handles=handles,
        loc="lower center",
        ncols=len(handles),
        fontsize=9,
        title=", ".join(key),
        title_fontsize=8,
    )


def loss_limits(analysis: Analysis) -> tuple[float, float]:
    known = [rate for rate in analysis.rates if rate.loss.n]
    bounds = [report_sweep.interval_or(rate.loss, rate.arm.samples()[0]) for rate in known]
    lows, highs = zip(*bounds, strict=True) if known else ([], [])
    return style.bulk_limits([rate.loss.mean for rate in known], lows, highs)


def accuracy_limits(analysis: Analysis) -> tuple[float, float]:
    """As for losses, upside down."""
    known = [rate for rate in analysis.rates if rate.accuracy.n]
    bounds = [report_sweep.interval_or(r.accuracy, r.arm.samples(accuracy_of)[0]) for r in known]
    lows, highs = zip(*bounds, strict=True) if known else ([], [])
    low, high = style.bulk_limits(
        [-100 * rate.accuracy.mean for rate in known], [-100 * x for x in highs], [-100 * x for x in lows]
    )
    return -high, -low


def picture_combined(analysis: Analysis):
    """Loss and accuracy against the value; a heatmap of all that is measured, best = green in every row."""
    plt = style.load_matplotlib()
    fig = plt.figure(figsize=(15, 10))
    grid = fig.add_gridspec(2, 2, height_ratios=(1.5, 1))
    left, right, below = fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, :])
    scale_x(left, analysis)
    draw_values(left, analysis, loss_of, 1, loss_limits(analysis))
    left.set_title("final validation loss, nats a token")
    if any(rate.accuracy.n for rate in analysis.rates):
        scale_x(right, analysis)
        draw_values(right, analysis, accuracy_of, 100, accuracy_limits(analysis))
        right.set_title("validation accuracy, % of tokens")
    else:
        style.say_nothing_logged(right, "accuracy")
    draw_heatmap(below, analysis)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    label_legend(fig, analysis)
    return fig


def draw_heatmap(ax, analysis: Analysis) -> None:
    """Coloured by the rank in its row; a value that is not known is grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    rates = analysis.rates
    rows = [
        ("loss", [rate.loss.mean for rate in rates], 1, "{:.3f}"),
        ("accuracy, %", [100 * rate.accuracy.mean for rate in rates], -1, "{:.2f}"),
        ("perplexity", [rate.perplexity for rate in rates], 1, "{:.4g}"),
        ("minutes", [rate.minutes.mean for rate in rates], 1, "{:.3g}"),
    ]
    ranks = np.full((len(rows), len(rates)), np.nan)
    for row, (_, values, sign, _) in enumerate(rows):
        known = sorted({sign * value for value in values if math.isfinite(value)})
        for column, value in enumerate(values):
            if math.isfinite(value):
                ranks[row, column] = known.index(sign * value) / max(1, len(known) - 1)
    # from green to purple, which the colour-blind tell apart; light enough for black text on it
    colours = LinearSegmentedColormap.from_list("good", colormaps["PRGn"](np.linspace(0.88, 0.15, 64)))
    colours = colours.with_extremes(bad="#dddddd")
    ax.imshow(np.ma.masked_invalid(ranks), cmap=colours, aspect="auto", vmin=0, vmax=1)
    many = len(rates) > 30
    for row, (_, values, _, form) in enumerate(rows):
        for column, value in enumerate(values):
            text = form.format(value) if math.isfinite(value) else "–"
            dark = not 0.12 < ranks[row, column] < 0.85 and math.isfinite(value)
            ax.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                rotation=90 if many else 0,
                fontsize=max(5, min(9, 210 / len(rates))),
                color="white" if dark else "black",
                weight="bold" if ranks[row, column] == 0 else "normal",
            )
    labels = [format_value(rate.value) for rate in rates]
    ax.set_xticks(range(len(rates)), labels, rotation=60 if len(rates) > 12 else 0, fontsize=8)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set_xlabel(analysis.setting.upper())
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("means over seeds, coloured by rank in the row: green is the best (bold), purple the worst")


def picture_detailed(analysis: Analysis):
    """Accuracy and loss over their whole range, accuracy a minute, and the runs of the top 20%."""
    plt = style.load_matplotlib()
    fig, panels = plt.subplots(2, 2, figsize=(15, 10))
    known = any(rate.accuracy.n for rate in analysis.rates)
    for ax, title, measure, factor in (
        (panels[0, 0], "validation accuracy, % of tokens, whole range", accuracy_of, 100),
        (panels[0, 1], "final validation loss, nats a token, whole range", loss_of, 1),
        (panels[1, 0], "efficiency: accuracy a minute of training, %", efficiency_of, 100),
    ):
        if measure is not loss_of and not known:
            style.say_nothing_logged(ax, "accuracy")
            continue
        scale_x(ax, analysis)
        draw_values(ax, analysis, measure, factor, None)
        ax.set_title(title)
    draw_top(panels[1, 1], analysis)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    label_legend(fig, analysis)
    return fig


def efficiency_of(attempt: Attempt) -> float:
    minutes = minutes_of(attempt)
    return accuracy_of(attempt) / minutes if minutes > 0 else math.nan


def draw_top(ax, analysis: Analysis) -> None:
    """Every run of the fifth of the values that is best: is it the value, or luck?"""
    top = analysis.top()
    if not top:
        style.say_nothing_logged(ax, "final losses")
        return
    for x, rate in enumerate(top):
        colour, marker = LOOKS[rate.label]
        losses = [loss for loss in rate.arm.samples()[0] if math.isfinite(loss)]
        if len(losses) > 1:
            ax.plot([x] * len(losses), losses, ".", color=colour, markersize=6, alpha=0.7)
        half = (rate.loss.high - rate.loss.low) / 2 if rate.loss.n >= MIN_INTERVAL else None
        face = {"markerfacecolor": "white"} if rate.loss.n == 1 else {}
        ax.errorbar(
            [x],
            [rate.loss.mean],
            half,
            color=colour,
            marker=marker,
            capsize=4,
            linestyle="none",
            markersize=10 if marker == "*" else 6,
            **face,
        )
    best = analysis.best()
    if best and analysis.noise_known:
        for x, rate in enumerate(top):
            width = analysis.by_loss.half_width(best.name, rate.name, len(analysis.by_loss.means) - 1)
            if math.isfinite(width):
                ax.fill_between(
                    [x - 0.4, x + 0.4],
                    best.loss.mean,
                    best.loss.mean + width,
                    color=style.GREY,
                    alpha=0.15,
                    linewidth=0,
                    zorder=0,
                )
        ax.set_xlabel(
            f"{analysis.setting.upper()}; grey: means here are too near the best to be told from it"
        )
    else:
        ax.set_xlabel(analysis.setting.upper())
    ax.set_xticks(range(len(top)), [format_value(rate.value) for rate in top])
    ax.set_xlim(-0.6, len(top) - 0.4)
    ax.set_title(f"the top {TOP:.0%} by loss: final losses of all their runs")


def plot_names(analysis: Analysis) -> dict[float, str]:
    """lr_0.0650_loss_vs_steps.png; of other settings with their name; more digits where four do not do."""
    setting, values = analysis.setting, [rate.value for rate in analysis.rates]
    prefix = "lr" if setting.endswith("lr") else setting
    names = [f"{value:.4f}" for value in values]
    if any(abs(float(name) - value) > 1e-12 for name, value in zip(names, values, strict=True)):
        names = [format(value, ".10g") for value in values]
    return {v: f"{prefix}_{name}_loss_vs_steps.png" for v, name in zip(values, names, strict=True)}


def picture_of_rate(rate: Rate, analysis: Analysis):
    """Training and validation loss of one value's runs, with the best value's in grey."""
    plt = style.load_matplotlib()
    fig, ax = plt.subplots(figsize=(8, 5))
    runs = [run for run in rate.arm.runs if run.last_step >= 0]
    best = analysis.best()
    if best and best is not rate:
        line, _ = plot_loss.lines_of(best.arm, "val_loss", "steps")
        if line:
            name = f"the best, {format_value(best.value)}"
            ax.plot(line.x, line.y, color="#999999", linewidth=2.5, label=name)
    for number, run in enumerate(runs):
        look = style.arm_style(number)
        name = f"seed {run.seed}" if run.seed is not None else run.run_id
        name += "" if run.state in plot_loss.FINISHED else f", {run.state} at step {run.last_step}"
        ax.plot(run.train.step, run.train.loss, color=look["color"], linewidth=0.6, alpha=0.45)
        ax.plot(run.val.step, run.val.loss, color=look["color"], marker="o", markersize=3, label=name)
    if not runs:
        style.say_nothing_logged(ax, "losses")
    else:
        found = f"{rate.loss.mean:.4f}" if rate.loss.n else "no final loss"
        name = f"{analysis.setting.upper()} = {format_value(rate.value)}"
        ax.set_title(f"{name}: {rate.label}, {found} ({rate.status})")
        ax.set_xlabel("step; thin: training loss, dots: validation")
        ax.set_ylabel("nats a token")
        ax.set_ylim(*curve_limits(analysis))
        ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


def curve_limits(analysis: Analysis) -> tuple[float, float]:
    """One scale for the curves of all values: from the lowest loss to above the start."""
    losses = np.concatenate([run.val.loss for run in analysis.results.runs] or [np.zeros(0)])
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return 0.0, 1.0
    low, high = float(losses.min()), analysis.start if math.isfinite(analysis.start) else float(losses.max())
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + 2 * margin


def picture_all(analysis: Analysis):
    """All values' validation losses on one plot, coloured by value, the best in black; their end enlarged."""
    plt = style.load_matplotlib()
    fig, (whole, end) = plt.subplots(1, 2, figsize=(15, 6.5), width_ratios=(1.25, 1))
    best = analysis.best()
    values = [rate.value for rate in analysis.rates]
    for number, rate in enumerate(analysis.rates):
        line, thin = plot_loss.lines_of(rate.arm, "val_loss", "steps")
        if line is None:
            continue
        look = {"color": report_sweep.colour_map()(number / max(1, len(values) - 1)), "linewidth": 1.3}
        if rate is best:
            look.update(color="black", linewidth=2.2, zorder=4, label=f"the best by loss, {best.value:g}")
        for ax in (whole, end):
            for other in thin:
                ax.plot(other.x, other.y, color=look["color"], linewidth=0.5, alpha=0.6)
            ax.plot(line.x, line.y, **look)
    whole.set_ylim(*curve_limits(analysis))
    whole.set_title("validation loss, nats a token: means over seeds, thin: single runs")
    steps = max((run.last_step for run in analysis.results.runs), default=0)
    end.set_xlim(0.6 * steps, steps)
    end.set_ylim(*loss_limits(analysis))
    end.set_title("its end, without the worst")
    for ax in (whole, end):
        ax.set_xlabel("step")
    if best:
        whole.legend(loc="upper right", fontsize=9)
    report_sweep.add_colour_bar(fig, end, analysis.setting, values)
    fig.tight_layout()
    return fig


def save_pictures(analysis: Analysis, folder: Path) -> list[Path]:
    """All pictures; their paths."""
    figures = {
        "combined_lr_analysis": lambda: picture_combined(analysis),
        "detailed_lr_analysis": lambda: picture_detailed(analysis),
        "all_lr_loss_vs_steps": lambda: picture_all(analysis),
    }
    figures = {f"{name}.png": figures[name] for name in PICTURES}
    names = plot_names(analysis)
    for rate in analysis.rates:
        figures[f"individual_plots/{names[rate.value]}"] = lambda rate=rate: picture_of_rate(rate, analysis)
    for name, draw in figures.items():
        style.save(draw(), folder / name)
    return [folder / name for name in figures]


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def as_json(value: dict) -> str:
    return json.dumps(report_sweep.without_nan(value), indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="SWEEP.toml|LOG", help="a sweep, or logs")
    parser.add_argument("--setting", help="the setting to look at (default: the learning rate that varies)")
    parser.add_argument("--where", action="append", default=[], metavar="NAME=VALUE", help="only these arms")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of logs and manifests")
    parser.add_argument("--pool-sources", action="store_true", help="pool runs of different source code")
    parser.add_argument("--out", type=Path, help="folder to write to (default: logs/SWEEP/lr_analysis/)")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.paths, options.logs, None, options.pool_sources)
        analysis = analyse(results, options.setting, options.where)
        if not any(run.last_step >= 0 for run in analysis.results.runs):
            raise ValueError(f"none of the {len(analysis.results.attempts)} runs has logged a step yet")
        folder = options.out or results.folder / results.name / "lr_analysis"
        pictures = save_pictures(analysis, folder)
        style.write_text(markdown(analysis), folder / "results.md")
        style.write_text(as_csv(analysis), folder / "results.csv")
        style.write_text(as_json(final_results(analysis)), folder / "final_results.json")
        style.write_text(as_json(insights(analysis)), folder / "comprehensive_insights.json")
    except (ValueError, OSError) as error:
        return style.complain(error)
    print(style.format_table(*table(analysis)))
    for text in [*sentences(analysis), *analysis.notes]:
        print(f"* {text}")
    print(f"\n{folder / 'results.md'}, and {len(pictures)} pictures beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
