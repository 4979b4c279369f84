"""What a sweep found: its runs by arm, the arms compared, and a sentence on what that allows to conclude.

    from analysis.sweep_results import read_results, conclusion
    results = read_results(["sweeps/spectral_lr.toml"])                 # as planned in logs/SWEEP.sweep.json
    results = read_results(["logs/a.txt", "logs/b.txt"], control="a=0")  # or any logs, or folders of them
    results.arms[0].samples()     # losses and seeds; failed runs are NaN
    results.verdict.better        # stats.judge; what plots and reports claim, they claim from here
    print(conclusion(results))

Shared by the tools that plot and report sweeps. Losses are those of the last validation, in nats a token.
"""

import hashlib
import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from analysis.arms import Arm, group_by_arm
from analysis.run_log import RunLog, find_log, format_value, not_training, read_log, read_runs
from analysis.stats import Comparison, Verdict, detectable, judge
from analysis.style import shorten
from launch_lr_sweep import Run

FAILED = ("crashed", "diverged", "hung")  # they count as runs; all other states but finished: not ended (yet)
MAX_NAMED = 4  # arms named in a sentence, before "and 3 more"
UPDATE_ONLY = "MUON_DECAY_MODE=update is only a learning-rate change, lr (1 + wd), and no decay"


# ------------------------------------------------------------------------------------------------
# Runs and arms
# ------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One run, planned or found, and what became of it. `loss` is NaN unless it finished."""

    run_id: str
    seed: int | None
    state: str
    loss: float = math.nan
    tag: str = ""
    reason: str = ""
    source: str = ""
    log: RunLog | None = None

    @property
    def outcome(self) -> str:
        """done, failed (counts as a run) or missing (has not ended)."""
        if self.state == "finished":
            return "done" if math.isfinite(self.loss) else "failed"
        return "failed" if self.state in FAILED else "missing"


@dataclass
class SweepArm(Arm):
    """Runs that differ only in their seed. `runs` are their logs; `foreign` says why it is not compared."""

    attempts: list[Attempt] = field(default_factory=list)
    script: str = ""
    source: str = ""
    settings: dict = field(default_factory=dict)
    foreign: str = ""

    def samples(
        self, measure: Callable[[Attempt], float] = lambda attempt: attempt.loss
    ) -> tuple[list[float], list[int | None]]:
        """A loss (or what else is measured) and a seed for each seed that finished, NaN for each failed run.

        Repeats of one seed differ by the machine alone: they are no sample of runs, and averaged to one.
        Runs whose seed is unknown are taken for different ones.
        """
        by_seed: dict = {}
        for number, attempt in enumerate(self.attempts):
            if attempt.outcome == "done":
                key = ("run", number) if attempt.seed is None else attempt.seed
                by_seed.setdefault(key, []).append(measure(attempt))
        losses = [math.fsum(values) / len(values) for values in by_seed.values()]
        seeds = [None if isinstance(key, tuple) else key for key in by_seed]
        failed = [attempt for attempt in self.attempts if attempt.outcome == "failed"]
        return losses + [math.nan] * len(failed), seeds + [attempt.seed for attempt in failed]

    def count(self, outcome: str) -> int:
        return sum(attempt.outcome == outcome for attempt in self.attempts)


@dataclass
class Results:
    """A sweep's arms in the order planned (or found); `notes` are what its reader must be told."""

    name: str
    arms: list[SweepArm]
    control: str | None = None
    folder: Path = Path("logs")
    planned: bool = False  # whether there is a manifest that says what should have been run
    scale: str | None = None
    question: str = ""
    earlier: list[Attempt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    by: str | None = None  # the setting, in lower case, to order and colour arms by, if one was asked for
    versus: dict[str, str] = field(default_factory=dict)  # an arm's label -> its own control's

    @cached_property
    def verdict(self) -> Verdict:
        samples = {arm.label: arm.samples() for arm in self.arms if not arm.foreign}
        losses, seeds = ({name: sample[i] for name, sample in samples.items()} for i in (0, 1))
        return judge(losses, seeds, self.control, self.versus)

    @property
    def attempts(self) -> list[Attempt]:
        return [attempt for arm in self.arms for attempt in arm.attempts]

    @property
    def runs(self) -> list[RunLog]:
        return [run for arm in self.arms for run in arm.runs]

    def count(self, outcome: str) -> int:
        return sum(arm.count(outcome) for arm in self.arms)

    def ranked(self) -> list[SweepArm]:
        """By mean final loss; those that are not compared, and those without a finished run, come last."""
        means = {name: summary.mean for name, summary in self.verdict.summaries.items()}
        places = {arm.label: means.get(arm.label, math.nan) for arm in self.arms}
        return sorted(
            self.arms, key=lambda arm: (math.isnan(places[arm.label]), places[arm.label], arm.label)
        )

    def varied(self) -> list[str]:
        """Settings, in lower case, in which arms differ; an arm whose script lacks one says nothing of it."""
        hidden = set().union(*(run.not_training for run in self.runs)) if self.runs else not_training()
        names = sorted(set().union(*(arm.settings for arm in self.arms)) - hidden)
        values = {name: {repr(a.settings[name]) for a in self.arms if name in a.settings} for name in names}
        return [name for name in names if len(values[name]) > 1]

    def tied(self, name: str) -> list[str]:
        """Settings that vary with this one alone, as ADAM_LR = 0.1 x MUON_LR does: each of its values comes
        with one of theirs, and the other way round. Two values of each are no rule."""
        found = []
        for other in self.varied():
            both = [arm.settings for arm in self.arms if name in arm.settings and other in arm.settings]
            pairs = {(repr(settings[name]), repr(settings[other])) for settings in both}
            firsts, seconds = ({pair[i] for pair in pairs} for i in (0, 1))
            if other != name and len(pairs) == len(firsts) == len(seconds) > 2:
                found.append(other)
        return found


def strength(arm: SweepArm) -> float | None:
    """ORD's a, or None where no single a is in the update: the baseline, ORD_MODE=post and the like."""
    settings = arm.settings
    split = any(settings.get(f"spectral_lr_mul_{part}") is not None for part in ("attn", "mlp"))
    if split or settings.get("ord_mode") in ("post", "off"):
        return None
    value = settings.get("spectral_lr_mul")
    return float(value) if isinstance(value, (int, float)) else None


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def read_results(
    paths: Sequence[str | Path],
    logs: str | Path = "logs",
    control: str | None = None,
    pool_sources: bool = False,
) -> Results:
    """A sweep by its file (or manifest), else logs and folders of logs; ValueError or OSError if it cannot.

    `control` names the arm to compare with, if the sweep does not or another is wanted.
    """
    paths = [Path(path) for path in paths]
    sweeps = [path for path in paths if path.suffix in (".toml", ".json")]
    if sweeps and len(paths) > 1:
        raise ValueError(f"{sweeps[0]} is a sweep; give one sweep, or logs, not both")
    results = _of_manifest(sweeps[0], Path(logs), pool_sources) if sweeps else _of_logs(paths, pool_sources)
    _mark_foreign(results, control)
    results.control = _find_control(results, control)
    if control is None:
        results.versus = _find_versus(results)
    results.notes += _remarks(results)
    return results


def _of_manifest(file: Path, logs: Path, pool_sources: bool) -> Results:
    name = file.name.removesuffix(".toml").removesuffix(".sweep.json")
    path = file if file.suffix == ".json" else logs / f"{name}.sweep.json"
    if file.suffix == ".toml" and not file.exists():
        known = ", ".join(sorted(map(str, file.parent.glob("*.toml")))) or f"none in {file.parent}/"
        raise ValueError(f"no sweep file {file}; there: {known}")
    data = _read_manifest(path, file)
    attempts = [_attempt(record, path.parent) for record in data["runs"]]
    records = {record.run_id: record for record in data["runs"]}
    arms = []
    for (label, source), members in _groups(attempts, pool_sources).items():
        record, runs = records[members[0].run_id], [attempt.log for attempt in members if attempt.log]
        arm = SweepArm(label, record.tag, runs, members, Path(record.script).name, source)
        arm.settings = {key.lower(): value for key, value in record.settings.items()}
        arms.append(arm)
    asked = set().union(*(arm.settings for arm in arms))
    _resolve_settings(arms)
    found = Results(name, arms, data.get("control"), path.parent, True, data.get("scale"))
    found.versus = data.get("versus", {})
    unasked = [name for name in found.varied() if name not in asked]
    if unasked:
        values = (f"{name.upper()} ({_some(_values(arms, name))})" for name in unasked)
        found.notes.append(f"arms differ in settings that the sweep does not set: {', '.join(values)}")
    found.earlier = [_attempt(record, path.parent) for record in data["earlier"]]
    found.question = _question(file if file.suffix == ".toml" else Path(str(data.get("file"))))
    if pool_sources:
        found.notes.append(_pooled([attempt.source for attempt in attempts if attempt.source]))
    found.notes += [
        note for attempt in attempts for note in _contradictions(attempt, records[attempt.run_id])
    ]
    return found


def _groups(attempts: Sequence[Attempt], pool_sources: bool) -> dict[tuple[str, str], list[Attempt]]:
    """Runs of one tag, source code and data, by label and source; those without a log go with their tag's."""
    known: dict[str, Counter] = {}
    for attempt in attempts:
        if attempt.log:
            known.setdefault(attempt.tag, Counter())[attempt.source, _data(attempt)] += 1
    groups: dict[tuple, list[Attempt]] = {}
    for attempt in attempts:
        source, data = attempt.source, _data(attempt)
        if not attempt.log and attempt.tag in known:
            source, data = known[attempt.tag].most_common(1)[0][0]
        groups.setdefault((attempt.tag, "" if pool_sources else source, data), []).append(attempt)
    tags, sources = Counter(tag for tag, _, _ in groups), {key[:2] for key in groups}
    labelled = {}
    for (tag, source, data), members in groups.items():
        label = tag
        if sum(other == tag for other, _ in sources) > 1:
            label += f" (source {source[:8] or 'unknown'})"
        if tags[tag] > sum(other == tag for other, _ in sources):
            label += f" (data {hashlib.sha256(data.encode()).hexdigest()[:8]})"
        labelled[label, source] = members
    return labelled


def _values(arms: Sequence[SweepArm], name: str) -> list[str]:
    return sorted({format_value(arm.settings[name]) for arm in arms if name in arm.settings})


def _read_manifest(path: Path, file: Path) -> dict:
    try:
        data = json.loads(path.read_text())
        for key in ("runs", "earlier"):
            data[key] = [Run.from_record(record) for record in data.get(key, [])]
    except FileNotFoundError:
        raise ValueError(
            f"no {path}, which says what was planned and done: launch the sweep first "
            f"(python launch_lr_sweep.py {file}), name its folder with --logs, or give the logs themselves"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a sweep's manifest: {error}") from None
    if not data["runs"]:
        raise ValueError(f"{path} plans no runs")
    return data


def _attempt(record: Run, folder: Path) -> Attempt:
    """A planned run with its log, if there is one. Where the two disagree on how it ended, the log knows."""
    log = None
    for place in (folder, Path(record.log).parent):
        path = find_log(place, Path(record.log).name) if record.log else None
        if path:
            log = read_log(path)[-1]
            break
    attempt = Attempt(record.run_id, record.seed, record.state, math.nan, record.tag, record.reason)
    attempt.source, attempt.log = record.source_hash, log
    if log:
        attempt.source = log.source_hash or record.source_hash
        attempt.seed = record.seed if log.seed is None else log.seed
        if log.state in ("finished", "crashed", "diverged") and record.state not in FAILED:
            attempt.state = log.state
    elif attempt.state == "finished":
        attempt.state, attempt.reason = "log gone", "it finished, but its log is not there any more"
    return _with_loss(attempt)


def _with_loss(attempt: Attempt) -> Attempt:
    if attempt.state == "finished":
        attempt.loss = attempt.log.final_val_loss if attempt.log else math.nan
        if not math.isfinite(attempt.loss):
            attempt.reason = "it finished without a validation loss that is a number"
    return attempt


def _data(attempt: Attempt) -> str:
    """The data a run says that it used; empty if it does not."""
    started = attempt.log.event("started") if attempt.log else None
    parts = [started.fields.get(name, "") for name in ("train_data", "val_data")] if started else []
    return " ".join(part for part in parts if part)


def _contradictions(attempt: Attempt, record: Run) -> Iterable[str]:
    """Where a log's own configuration is not what the manifest planned."""
    if not attempt.log or not attempt.log.config:
        return
    planned = {key.lower(): value for key, value in record.settings.items() if value != "auto"}
    planned["seed"] = record.seed
    logged = attempt.log.config
    differing = [
        f"{key.upper()}={format_value(logged[key])} (planned {format_value(value)})"
        for key, value in planned.items()
        if key in logged and format_value(logged[key]) != format_value(value)
    ]
    if differing:
        yield f"the log of {attempt.run_id} has other settings than were planned: {', '.join(differing)}"


def _resolve_settings(arms: Sequence[SweepArm]) -> None:
    """All settings of each arm, defaults too, from its logs; without logs, from others of its script."""
    shared: dict[str, dict] = {}
    for arm in arms:
        logged = next((run.settings for run in arm.runs if run.config), {})
        if logged:
            shared.setdefault(arm.script, logged)
            arm.settings = {**arm.settings, **logged}
    for arm in arms:
        arm.settings = {**shared.get(arm.script, {}), **arm.settings}


def _question(file: Path) -> str:
    """The first paragraph of comment at the head of a sweep file."""
    try:
        text = file.read_text()
        tomllib.loads(text)
    except (OSError, ValueError):
        return ""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def _of_logs(paths: Sequence[Path], pool_sources: bool) -> Results:
    runs = read_runs(paths)
    if not runs:
        places = ", ".join(map(str, paths))
        raise ValueError(f"no log in {places}: logs are files that end in .txt or .txt.xz")
    notes = []
    if pool_sources:
        notes.append(_pooled([run.source_hash for run in runs if run.source_hash]))
        runs = [replace(run, source_hash="pooled" if run.source_hash else "") for run in runs]
    groups, said = group_by_arm(runs)
    arms = []
    for group in groups:
        first = group.runs[0]
        attempts = [_found(run) for run in group.runs]
        arm = SweepArm(group.label, group.key, group.runs, attempts, Path(first.script).name)
        arm.source, arm.settings = first.source_hash, first.settings
        arms.append(arm)
    _shorten_labels(arms)
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    name = paths[0].stem if len(paths) == 1 else f"{paths[0].stem}-and-{len(paths) - 1}-more"
    return Results(name, arms, None, folder, notes=[*notes, *said])


def _shorten_labels(arms: Sequence[SweepArm]) -> None:
    """Scripts are left out of labels which are unique without them."""
    bare = [arm.label.removeprefix(f"{Path(arm.script).stem} ") if arm.script else arm.label for arm in arms]
    if len(set(bare)) == len(bare):
        for arm, label in zip(arms, bare, strict=True):
            arm.label = label


def _found(run: RunLog) -> Attempt:
    """A log without a plan. llm.c's logs do not say whether they are whole: they are taken for it."""
    finished = run.state == "finished" or (run.state == "unknown" and math.isfinite(run.final_val_loss))
    attempt = Attempt(run.run_id, run.seed, "finished" if finished else run.state)
    attempt.source, attempt.log = run.source_hash, run
    return _with_loss(attempt)


def _pooled(sources: Sequence[str]) -> str:
    different = sorted(set(sources))
    if len(different) < 2:
        return "--pool-sources changed nothing: all runs have the same source code"
    return f"runs of {len(different)} different source codes were pooled, as --pool-sources asked"


def _mark_foreign(results: Results, control: str | None) -> None:
    """Arms whose source code or data is not that of the others of their script cannot be compared with them.

    The control's count for its script, else those of most runs. Logs without settings (public ones) differ in
    their source by nature, and are compared.
    """
    wanted = control or results.control
    by_script: dict[str, list[SweepArm]] = {}
    for arm in results.arms:
        if arm.settings:
            by_script.setdefault(arm.script, []).append(arm)
    for script, arms in by_script.items():
        preferred = [arm for arm in arms if wanted in (arm.label, arm.key)] or arms
        sources = Counter({arm.source: 0 for arm in preferred})
        for arm in preferred:
            sources[arm.source] += len(arm.runs)
        usual = max(sources, key=lambda source: (sources[source], source))
        for arm in arms:
            if arm.source != usual:
                arm.foreign = f"other source code than the other runs of {script or 'its script'}"
                if f"(source {arm.source[:8]}" not in arm.label:
                    arm.label += f" (source {arm.source[:8] or 'unknown'})"
    data = Counter()
    for arm in results.arms:
        data[_data_of(arm)] += 0 if arm.foreign else len(arm.runs)
    known = {text: count for text, count in data.items() if text and count}
    preferred = [_data_of(arm) for arm in results.arms if wanted in (arm.label, arm.key) and not arm.foreign]
    usual = next(filter(None, preferred), max(known, key=lambda text: (known[text], text), default=""))
    for arm in results.arms:
        if _data_of(arm) not in ("", usual) and not arm.foreign:
            arm.foreign = f"other data ({shorten(_data_of(arm), 60)}) than the other runs"


def _data_of(arm: SweepArm) -> str:
    return next(filter(None, map(_data, arm.attempts)), "")


def _find_control(results: Results, wanted: str | None) -> str | None:
    """The control arm's label: as asked for or planned, else that of a = 0, else the baseline's, or None."""
    arms = [arm for arm in results.arms if not arm.foreign]
    if wanted is not None:
        exact = [arm for arm in arms if wanted in (arm.label, arm.key)]
        fitting = exact or [a for a in arms if wanted in a.label or any(wanted in r.run_id for r in a.runs)]
        if len(fitting) != 1:
            found = "none of" if not fitting else f"{len(fitting)} of"
            names = ", ".join(arm.label for arm in fitting or arms)
            raise ValueError(f"control {wanted!r} fits {found} the arms, wanted one: {names}")
        return fitting[0].label
    if results.planned:
        named = [arm.label for arm in arms if arm.key == results.control]
        return named[0] if named else None
    zero = [arm for arm in arms if strength(arm) == 0]
    if zero and any(strength(arm) for arm in arms):
        return max(zero, key=lambda arm: len(arm.attempts)).label
    other = [arm for arm in arms if arm.settings and "spectral_lr_mul" not in arm.settings]
    with_ord = [arm for arm in arms if "spectral_lr_mul" in arm.settings]
    return other[0].label if len(other) == 1 and with_ord else None


def _find_versus(results: Results) -> dict[str, str]:
    """The planned controls of single arms, from tags to labels; one that is not comparable is a note."""
    labels = {arm.key: arm.label for arm in results.arms if not arm.foreign}
    found = {labels[key]: labels.get(other) for key, other in results.versus.items() if key in labels}
    for label in [label for label, other in found.items() if other is None or results.control is None]:
        results.notes.append(
            f"{label}: its own control is not among the arms that can be compared; compared with "
            f"{results.control or 'the lowest mean'} instead"
        )
        del found[label]
    return found


def _remarks(results: Results) -> list[str]:
    """What a reader of the numbers must know about the runs behind them."""
    notes = [f"{arm.label} is not compared: it has {arm.foreign}" for arm in results.arms if arm.foreign]
    for arm in results.arms:
        repeats = Counter(a.seed for a in arm.attempts if a.outcome == "done" and a.seed is not None)
        repeated = [f"{count} runs of seed {seed}" for seed, count in repeats.items() if count > 1]
        if repeated:
            notes.append(
                f"{arm.label}: {', '.join(repeated)} count as one, their mean, as they differ by the machine "
                "alone"
            )
    lengths = {int(run.val.step[-1]) for run in _finished(results) if len(run.val)}
    tokens = {float(run.val.tokens[-1]) for run in _finished(results) if len(run.val)}
    if len(lengths) > 1:
        notes.append(f"the runs' last validations are at different steps: {_some(sorted(lengths))}")
    elif len(tokens) > 1 and all(map(math.isfinite, tokens)):
        notes.append(
            f"runs of equal steps were trained on different numbers of tokens: {_some(sorted(tokens))}"
        )
    for name in ("device", "world_size", "torch"):
        started = [run.event("started") for run in results.runs]
        values = sorted({event.fields[name] for event in started if event and name in event.fields})
        if len(values) > 1:
            notes.append(f"runs differ in {name}: {_some(values)}; times cannot be compared")
    unread = [run for run in results.runs if run.unread_lines]
    notes += [f"{run.run_id}: {run.unread_lines} lines of its log could not be read" for run in unread]
    return list(dict.fromkeys(notes))


def _finished(results: Results) -> list[RunLog]:
    return [attempt.log for attempt in results.attempts if attempt.log and attempt.outcome == "done"]


def _some(values: Sequence[object]) -> str:
    texts = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "")


# ------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------


def format_p(p: float) -> str:
    """0.034, 0.00012, < 0.0001; - if nothing was tested."""
    if math.isnan(p):
        return "-"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def format_difference(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "-"


def format_interval(low: float, high: float, signed: bool = True) -> str:
    """[-0.0057, -0.0021]; - if it is not known."""
    if not math.isfinite(low + high):
        return "-"
    return f"[{low:+.4f}, {high:+.4f}]" if signed else f"[{low:.4f}, {high:.4f}]"


def _names(names: Sequence[str]) -> str:
    """a, b and c; of many, the first ones."""
    shown = list(names[:MAX_NAMED])
    if len(names) > len(shown):
        return f"{', '.join(shown)} and {len(names) - len(shown)} more"
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)


def _evidence(pair: Comparison, p: float) -> str:
    size, low, high = abs(pair.difference), *sorted((abs(pair.low), abs(pair.high)))
    n = f"n = {pair.n_arm}" + ("" if pair.n_arm == pair.n_control else f" and {pair.n_control}")
    p = format_p(p)
    p = p if p.startswith("<") else f"= {p}"
    return f"{size:.4f}, {pair.confidence:.0%} interval {low:.4f} to {high:.4f}, p {p}, {n}"


def conclusion(results: Results) -> str:
    """One sentence: what may be concluded from the final losses, and what may not."""
    verdict, missing, done = results.verdict, results.count("missing"), results.count("done")
    total = len(results.attempts)
    update = any(arm.settings.get("muon_decay_mode") == "update" for arm in results.arms)
    ending = f"; {UPDATE_ONLY}." if update else "."
    if not done:
        return f"Nothing may be concluded: none of {total} runs has finished{ending}"
    lowest = verdict.best or verdict.lowest
    if missing:
        runs = f"{'planned ' * results.planned}runs {'has' if missing == 1 else 'have'}"
        so_far = ""
        if lowest and len(verdict.summaries) > 1:
            so_far = f"; so far the lowest mean is that of {lowest} ({verdict.summaries[lowest]})"
        return (
            f"Nothing may be concluded yet, as {missing} of {total} {runs} not ended, and who tests until "
            f"something is found will find something{so_far}{ending}"
        )
    if len(verdict.summaries) == 1:
        found = verdict.summaries[lowest]
        return f"There is nothing to compare {lowest} with, whose final loss is {found}{ending}"
    if all(summary.n <= 1 for summary in verdict.summaries.values()):
        return (
            "No difference may be concluded, as every arm is a single run, and how much repeats of one arm "
            f"differ is not known; the lowest loss is that of {lowest}, {verdict.summaries[lowest]}{ending}"
        )
    may, may_not = _with_control(results) if verdict.control else _without_control(results)
    parts = [f"it may be concluded that {', and that '.join(may)}"] if may else []
    if not (verdict.better or verdict.worse):
        than = "its control" if results.versus else verdict.control
        kind = f"better or worse than {than}" if verdict.control else "the best"
        parts.append(f"no arm may be called {kind}")
    if may_not:
        parts.append(f"it may not be concluded {', nor '.join(may_not)}")
    if untested := _untested(results):
        parts.append(f"nothing may be concluded from {', nor from '.join(untested)}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + ending


def _with_control(results: Results) -> tuple[list[str], list[str]]:
    verdict = results.verdict
    may = []
    for names, word in ((verdict.better, "better"), (verdict.worse, "worse")):
        for control, group in _by_control(verdict, names):
            most = max(group, key=lambda name: abs(verdict.versus_control[name].difference))
            found = _evidence(verdict.versus_control[most], verdict.p_control[most])
            by = f"by {found}" if len(group) == 1 else f"{most} by {found}"
            may.append(f"{_names(group)} {_is(group)} {word} than {control} ({by})")
    may += _facts(results)
    may_not = []
    undecided = [
        name
        for name, p in verdict.p_control.items()
        if not math.isnan(p) and name not in verdict.better + verdict.worse and not (p < verdict.alpha)
    ]
    for control, group in _by_control(verdict, undecided):
        unseen = _unseen([verdict.versus_control[name] for name in group], verdict)
        may_not.append(
            f"that {_names(group)} {'differs' if len(group) == 1 else 'differ'} from "
            f"{control} or that {'it does' if len(group) == 1 else 'they do'} not{unseen}"
        )
    if len(verdict.better) > 1:
        first = min(verdict.better, key=lambda name: verdict.summaries[name].mean)
        others = [name for name in verdict.better if name != first]
        if not (first == verdict.best and all(verdict.p_best[name] < verdict.alpha for name in others)):
            may_not.append(f"that {first} is better than {_names(others)}")
    for name, p in verdict.p_control.items():
        if p < verdict.alpha and name not in verdict.better + verdict.worse:
            word = "better" if verdict.versus_control[name].difference < 0 else "worse"
            loser = name if word == "better" else verdict.controls[name]
            may_not.append(f"that {name} is {word} ({_lost(verdict, loser)})")
    return may, may_not


def _by_control(verdict: Verdict, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Arms together with what they were compared with."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(verdict.controls[name], []).append(name)
    return list(groups.items())


def _without_control(results: Results) -> tuple[list[str], list[str]]:
    verdict, best = results.verdict, results.verdict.best
    may, may_not = _facts(results), []
    if verdict.better:
        runner_up = min(verdict.versus_best, key=lambda name: _mean_or_last(verdict, name))
        found = _evidence(verdict.versus_best[runner_up], verdict.p_best[runner_up])
        may = [f"{best} is better than every other arm (than {runner_up}, the next, by {found})", *may]
    elif best:
        near = [name for name, p in verdict.p_best.items() if p >= verdict.alpha]
        if near:
            unseen = _unseen([verdict.versus_best[name] for name in near], verdict)
            may_not.append(f"that {best}, whose mean is lowest, differs from {_names(near)}{unseen}")
    return may, may_not


def _mean_or_last(verdict: Verdict, name: str) -> float:
    mean = verdict.summaries[name].mean
    return math.inf if math.isnan(mean) else mean


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _lost(verdict: Verdict, name: str) -> str:
    summary = verdict.summaries[name]
    return f"{summary.failed} of {summary.n + summary.failed} runs of {name} failed"


def _facts(results: Results) -> list[str]:
    """What needs no test: arms that gave the control's very losses, arms all of whose runs failed."""
    verdict = results.verdict
    equal = [n for n, pair in verdict.versus_control.items() if pair.difference == 0 and pair.sd == 0]
    lost = [n for n, summary in verdict.summaries.items() if not summary.n and summary.failed]
    groups = _by_control(verdict, equal)
    facts = [f"{_names(group)} gave the very losses of {control}" for control, group in groups]
    return facts + ([f"all runs of {_names(lost)} failed"] if lost else [])


def _unseen(pairs: Sequence[Comparison], verdict: Verdict) -> str:
    """Below which size a difference can go unseen."""
    alpha = verdict.alpha / max(1, verdict.num_comparisons)
    sizes = [
        detectable(pair.sd, min(pair.n_arm, pair.n_control), alpha, pairs=pair.method == "paired")
        for pair in pairs
    ]
    sizes = [size for size in sizes if math.isfinite(size)]
    return f" (differences below about {max(sizes):.2g} can go unseen in so few runs)" if sizes else ""


def _untested(results: Results) -> list[str]:
    """Arms about which the runs say nothing, and why."""
    verdict, parts = results.verdict, []
    single = [name for name, summary in verdict.summaries.items() if summary.n == 1]
    if single:
        parts.append(f"{_names(single)} ({'a single run' if len(single) == 1 else 'single runs'})")
    tested = verdict.versus_control if verdict.control else verdict.versus_best
    p_values = verdict.p_control if verdict.control else verdict.p_best
    flat = [
        name
        for name, pair in tested.items()
        if min(pair.n_arm, pair.n_control) > 1 and math.isnan(p_values[name]) and pair.difference
    ]
    if flat:
        parts.append(f"{_names(flat)} (whose runs do not vary)")
    foreign = [arm.label for arm in results.arms if arm.foreign]
    if foreign:
        parts.append(f"{_names(foreign)} (other source code or data)")
    return parts
