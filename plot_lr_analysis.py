"""Analyse a sweep over the learning rate, or any other number: what learns, what fails, what is best.

    python plot_lr_analysis.py sweeps/moe_lr.toml                         # writes to logs/moe_lr/lr_analysis/
    python plot_lr_analysis.py sweeps/residual_scale.toml                 # whatever varies
    python plot_lr_analysis.py sweeps/muon_decay.toml --where MUON_DECAY_MODE=param
    python plot_lr_analysis.py logs --setting MUON_LR --out analysis      # any logs

Written are results.md and results.csv (one line a value), final_results.json (the same with every run),
comprehensive_insights.json (best, ranges, divergence threshold, labels with their rules), and as pictures
combined_lr_analysis.png (loss and accuracy against the value) and all_lr_loss_vs_steps.png (a sheet with the
curves of each value). The same logs give the same tables, byte for byte.

Losses are those of the last validation, in nats per token, means over seeds; perplexity is exp(mean loss).
Every value gets a label by the rules below, in which "the fall" is how far the lowest mean loss fell from
where training began. Values that cannot be told from the lowest are those of stats.contenders: among the
values tested, the truly best is in this set in 95% of sweeps. The lowest is called best only if every other
value tested is worse. Values of single or failed runs are not tested; if a single run is lowest, nothing is
compared with it. Where every value is a single run, how much runs differ by luck is unknown, and the output
says so. Accuracies are not tested.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line, style
from analysis.files import write_atomically
from analysis.rate_pictures import PICTURES
from analysis.rates import (
    RULES,
    Analysis,
    Rate,
    analyse,
    diverged,
    minutes_of,
    perplexity,
)
from analysis.read_results import read_results
from analysis.results import accuracy_of
from analysis.run_log import format_value
from analysis.stats import ALPHA, Summary
from analysis.tables import (
    as_csv,
    as_json,
    format_interval,
    format_loss,
    format_markdown,
    format_number,
    format_table,
    join_words,
)

RULES_TEXT = "\n".join(f"* {label}: {rule}" for label, rule in RULES.items())


# ------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------


def name_values(rates: Sequence[Rate]) -> str:
    """0.01, 0.02 and 0.03."""
    return join_words([format_value(rate.value) for rate in rates])


def edge_of(rate: Rate, analysis: Analysis) -> str | None:
    """lowest or highest, if the value is at that end of those tried: a better one may lie beyond."""
    if len(analysis.rates) < 2 or rate not in (analysis.rates[0], analysis.rates[-1]):
        return None
    return "lowest" if rate is analysis.rates[0] else "highest"


def evidence(summary: Summary, factor: float = 1, unit: str = "") -> str:
    """3.2741, 95% interval [3.2722, 3.2760], sd 0.0012, n = 4."""
    mean = f"{factor * summary.mean:.4f}{unit}"
    if summary.n == 1:
        return f"{mean}, a single run"
    interval = format_interval(factor * summary.low, factor * summary.high, signed=False)
    return f"{mean}, 95% interval {interval}, sd {factor * summary.sd:.4f}, n = {summary.n}"


def title_of_lowest(analysis: Analysis) -> str:
    """best by loss, if every other value tested is worse; else, as it may be luck: lowest loss."""
    return "best by loss" if analysis.may_claim() and len(analysis.near_best()) == 1 else "lowest loss"


def best_sentence(analysis: Analysis) -> str:
    lowest = analysis.lowest()
    if lowest is None:
        return "no value can be called best by loss: none has finished runs, none of which failed"
    name = f"{analysis.setting.upper()} = {format_value(lowest.value)}"
    text = f"{title_of_lowest(analysis)}: {name} ({evidence(lowest.loss)}){claims(analysis)}"
    edge = edge_of(lowest, analysis)
    if edge:
        text += f"; it is the {edge} value tried, so that a better one may lie beyond"
    return text


def claims(analysis: Analysis) -> str:
    """Say what the test of the values shows, after the name of the lowest; nothing while runs are missing."""
    if not analysis.noise_known:
        return "; how much runs differ by luck is unknown, so that none may be called better than another"
    if analysis.results.count("missing"):
        return ""
    untested = [rate for rate in analysis.rates if rate.name not in analysis.ties.tested]
    others = [rate for rate in analysis.near_best() if rate is not analysis.lowest()]
    text = ""
    if others:
        text = f"; it cannot be told from {name_values(others)}"
    elif analysis.may_claim():
        text = f"; every other value{' tested' if untested else ''} is worse"
    if untested:
        text += f"; not tested (single or failed runs): {name_values(untested)}"
    return text


def sentences(analysis: Analysis) -> list[str]:
    """The findings in words."""
    missing = analysis.results.count("missing")
    total = len(analysis.results.attempts)
    lines = []
    if missing:
        have = "has" if missing == 1 else "have"
        lines.append(f"{missing} of {total} runs {have} not ended: this is how it stands so far")
    lines.append(best_sentence(analysis))
    most = analysis.most_accurate()
    if most:
        name = f"{analysis.setting.upper()} = {format_value(most.value)}"
        lines.append(f"highest mean accuracy, untested: {name} ({evidence(most.accuracy, 100, '%')})")
    stable = analysis.stable()
    if stable:
        low, high = format_value(stable[0].value), format_value(stable[-1].value)
        lines.append(f"stable from {low} to {high}" if len(stable) > 1 else f"stable at {low} only")
    lowest, threshold = analysis.lowest(), analysis.threshold()
    if threshold:
        value = format_value(threshold.value)
        lines.append(f"above {format_value(lowest.value)}, a run first diverged at {value}")
    elif lowest:
        lines.append(f"no run above {format_value(lowest.value)} diverged")
    if analysis.noise_known:
        found = analysis.ties
        apart = ", what the runs of a seed share taken out," if found.paired else ""
        lines.append(
            f"noise: a run's loss varies by {found.sd:.4f} (sd{apart} of the better half of the values, "
            f"{found.df} degrees of freedom)"
        )
    return lines


def remark(rate: Rate, analysis: Analysis) -> str:
    parts = []
    if rate is analysis.lowest():
        parts.append(title_of_lowest(analysis))
    if rate is analysis.most_accurate():
        parts.append("highest mean accuracy")
    if rate in analysis.near_best() and rate is not analysis.lowest():
        parts.append("not told from the lowest")
    if rate.sure is False:
        parts.append("near the limit of good")
    if rate.loss.n == 1:
        parts.append("a single run")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def table(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    tied = analysis.results.tied(analysis.setting)
    header = [analysis.setting.upper(), *(name.upper() for name in tied)]
    header += ["n", "loss", "sd", "95% interval", "accuracy", "sd", "perplexity", "minutes", "label"]
    header += ["status", "remark"]
    rows = []
    for rate in analysis.rates:
        loss, accuracy = rate.loss, rate.accuracy
        row = [format_value(rate.value)]
        row += [format_value(rate.arm.settings[name]) for name in tied]
        row += [str(loss.n), format_loss(loss.mean), format_loss(loss.sd)]
        row += [format_interval(loss.low, loss.high, signed=False)]
        row += [format_number(accuracy.mean, ".2%"), format_number(accuracy.sd, ".2%")]
        row += [f"{rate.perplexity:.4g}" if loss.n else "-", format_number(rate.minutes.mean, ".3g")]
        rows.append([*row, rate.label, rate.status, remark(rate, analysis)])
    return header, rows


def markdown(analysis: Analysis) -> str:
    """The table with what was found, the rules and the pictures."""
    header, rows = table(analysis)
    scale = f" at scale `{analysis.results.scale}`" if analysis.results.scale else ""
    found = "\n".join(f"* {text[0].upper()}{text[1:]}." for text in sentences(analysis))
    notes = "\n".join(f"* {note}" for note in analysis.results.notes + analysis.notes)
    parts = [f"# {analysis.results.name}{scale}: {analysis.setting.upper()}", found]
    parts += [format_markdown(header, rows)]
    parts += [
        f"Loss is that of the last validation, in {style.loss_unit(analysis.results.runs)}; perplexity is "
        "exp(mean loss); means and intervals are over seeds; minutes are of training on the machine that ran."
    ]
    parts += [f"![{name}]({name}.png)" for name in PICTURES]
    fall = ""
    lowest = analysis.lowest()
    if lowest:
        fall = f", with the fall = {analysis.fall:.4f}, how far the loss of {format_value(lowest.value)}"
        fall += f" fell from where training began ({analysis.start:.4f})"
    parts.append(f"Labels{fall}:\n\n{RULES_TEXT}")
    if notes:
        parts.append(notes)
    return "\n\n".join(parts) + "\n"


def rate_record(rate: Rate, analysis: Analysis) -> dict:
    """A value's entry in final_results.json and line in results.csv."""
    loss, accuracy = rate.loss, rate.accuracy
    return {
        "rate": rate.value,
        **{name: rate.arm.settings[name] for name in analysis.results.tied(analysis.setting)},
        "loss": loss.mean,
        "accuracy": accuracy.mean,
        "perplexity": rate.perplexity,
        "time_minutes": rate.minutes.mean,
        "status": rate.status,
        "label": rate.label,
        "label_is_sure": rate.sure,
        "accuracy_percent_per_minute": rate.efficiency,
        "not_told_from_best": rate in analysis.near_best() if analysis.is_tested(rate) else None,
        "n": loss.n,
        "single_run": loss.n == 1,
        "loss_sd": loss.sd,
        "loss_low": loss.low,
        "loss_high": loss.high,
        "accuracy_sd": accuracy.sd,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "perplexity_low": perplexity(loss.low),
        "perplexity_high": perplexity(loss.high),
        "time_minutes_sd": rate.minutes.sd,
        "remark": remark(rate, analysis),
    }


def final_results(analysis: Analysis) -> dict:
    """The content of final_results.json: every value, with every run."""
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
                "perplexity": perplexity(attempt.loss),
                "time_minutes": minutes_of(attempt),
            }
            for attempt in rate.arm.attempts
        ]
        records.append({**rate_record(rate, analysis), "runs": runs})
    return {"sweep": analysis.results.name, "setting": analysis.setting.upper(), "results": records}


def ends(rates: Sequence[Rate]) -> list[float] | None:
    return [rates[0].value, rates[-1].value] if rates else None


def best_by_loss(analysis: Analysis) -> dict | None:
    lowest, tied = analysis.lowest(), None
    if lowest is None:
        return None
    if analysis.may_claim():
        tied = [rate.value for rate in analysis.near_best() if rate is not lowest]
    return record_of(lowest, lowest.loss, analysis) | {"cannot_be_told_from": tied}


def record_of(rate: Rate, summary: Summary, analysis: Analysis) -> dict:
    """A value's entry in comprehensive_insights.json, with its loss or accuracy."""
    return {
        "rate": rate.value,
        **{key: value for key, value in asdict(summary).items() if key != "failed"},
        "single_run": summary.n == 1,
        "edge_of_the_range": edge_of(rate, analysis),
    }


def insights(analysis: Analysis) -> dict:
    """The content of comprehensive_insights.json: everything computed."""
    results, top, stable = analysis.results, analysis.top(), analysis.stable()
    threshold, most = analysis.threshold(), analysis.most_accurate()
    good = [rate for rate in analysis.rates if rate.label in ("good", "optimal")]
    return {
        "sweep": results.name,
        "scale": results.scale,
        "setting": analysis.setting.upper(),
        "tied_to_it": [name.upper() for name in results.tied(analysis.setting)],
        "found": sentences(analysis),
        "best_by_loss": best_by_loss(analysis),
        "highest_mean_accuracy": record_of(most, most.accuracy, analysis) if most else None,
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
            "sd_of_a_run": analysis.ties.sd,
            "degrees_of_freedom": analysis.ties.df,
            "without_what_a_seed_shares": analysis.ties.paired and analysis.noise_known,
            "alpha": ALPHA,
        },
        "start_loss": analysis.start,
        "fall": analysis.fall,
        "labels": {format_value(rate.value): rate.label for rate in analysis.rates},
        "rules": RULES,
        "notes": results.notes + analysis.notes,
    }


def csv_of(analysis: Analysis) -> str:
    """A line for each value, with numbers to the last digit."""
    records = [rate_record(rate, analysis) for rate in analysis.rates]
    return as_csv(list(records[0]), [list(record.values()) for record in records])


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def write_analysis(options: Namespace) -> None:
    results = read_results(options.paths, options.logs, None, options.pool_sources, options.stopped_early)
    analysis = analyse(results, options.setting, options.where)
    if not analysis.results.has_steps:
        raise ValueError(f"none of the {len(analysis.results.attempts)} runs has logged a step yet")
    folder = options.out or results.folder / results.name / "lr_analysis"
    for name, draw in PICTURES.items():
        style.save(draw(analysis), folder / f"{name}.png")
    write_atomically(folder / "results.md", markdown(analysis))
    write_atomically(folder / "results.csv", csv_of(analysis))
    write_atomically(folder / "final_results.json", as_json(final_results(analysis)))
    write_atomically(folder / "comprehensive_insights.json", as_json(insights(analysis)))
    print(format_table(*table(analysis)))
    for text in [*sentences(analysis), *analysis.notes]:
        print(f"* {text}")
    print(f"\n{folder / 'results.md'}, and {len(PICTURES)} pictures beside it")


def main(arguments: Sequence[str] | None = None) -> int:
    out = "folder to write to (default: logs/SWEEP/lr_analysis/)"
    parser = command_line.make_sweep_parser(f"{__doc__ or ''}\n{RULES_TEXT}", out)
    parser.add_argument("--setting", help="the setting to look at (default: the learning rate that varies)")
    parser.add_argument("--where", action="append", default=[], metavar="NAME=VALUE", help="only these arms")
    return command_line.run(write_analysis, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
