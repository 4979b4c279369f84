"""Read a sweep, by its file and manifest, or any logs, into Results.

    from analysis.read_results import read_results
    results = read_results(["sweeps/spectral_lr.toml"])                  # as planned in its manifest
    results = read_results(["logs/a.txt", "logs/b.txt"], control="a=0")  # or any logs, or folders of them

Whatever a reader of the numbers must know about the runs is in `results.notes`.
"""

import hashlib
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from analysis.arms import group_by_arm, repeats, sweep_beside
from analysis.files import read_text
from analysis.manifest import Manifest, Run, find_manifest, read_manifest, sweep_among
from analysis.results import FAILED, Attempt, Results, SweepArm
from analysis.run_log import RunLog, find_log, format_value, log_stem, read_log, read_runs
from analysis.style import looks_of, shorten


def read_results(
    paths: Sequence[str | Path],
    logs: str | Path = "logs",
    control: str | None = None,
    pool_sources: bool = False,
    stopped_early: bool = False,
) -> Results:
    """Read a sweep, given its file or manifest, or logs and folders of logs. Raises ValueError or OSError.

    `control` names the arm to compare with, if the sweep names none or to override it.
    """
    paths = [Path(path) for path in paths]
    sweep = sweep_among(paths)
    if sweep:
        manifest = _read_plan(find_manifest(sweep, Path(logs)), sweep)
        results = _read_sweep(manifest, sweep, pool_sources)
    else:
        results, manifest = _read_logs(paths, pool_sources, stopped_early)
    _mark_foreign(results, control or (manifest.control if manifest else None))
    results.control = _find_control(results, control, manifest)
    if manifest and control is None:
        results.versus = _find_versus(results, manifest)
    results.looks = _looks(results, manifest)
    results.notes += _remarks(results)
    return results


def _read_sweep(manifest: Manifest, file: Path, pool_sources: bool) -> Results:
    path = manifest.path
    attempts = [_attempt(record, path.parent) for record in manifest.runs]
    records = {record.run_id: record for record in manifest.runs}
    arms = []
    for (label, source), members in _groups(attempts, pool_sources).items():
        record, runs = records[members[0].run_id], [attempt.log for attempt in members if attempt.log]
        arm = SweepArm(label, record.tag, runs, members, Path(record.script).name, source)
        arm.settings = {key.lower(): value for key, value in record.settings.items()}
        arms.append(arm)
    asked = set().union(*(arm.settings for arm in arms))
    _resolve_settings(arms)
    found = Results(manifest.sweep, arms, folder=path.parent, planned=True, scale=manifest.scale)
    unasked = [name for name in found.varied() if name not in asked]
    if unasked:
        values = (f"{name.upper()} ({_some(_values(arms, name))})" for name in unasked)
        found.notes.append(f"arms differ in settings that the sweep does not set: {', '.join(values)}")
    found.earlier = [_attempt(record, path.parent) for record in manifest.earlier]
    found.question = _question(file if file.suffix == ".toml" else Path(manifest.file))
    if pool_sources:
        found.notes.append(_pooled([attempt.source for attempt in attempts if attempt.source]))
    found.notes += [
        note for attempt in attempts for note in _contradictions(attempt, records[attempt.run_id])
    ]
    return found


def _groups(attempts: Sequence[Attempt], pool_sources: bool) -> dict[tuple[str, str], list[Attempt]]:
    """Group runs by tag, source and data, with key (label, source).

    A run without event:started in its log has no reliable source or data; it joins its tag's most common
    group.
    """
    usual = _usual_place(attempts)
    groups: dict[tuple, list[Attempt]] = {}
    for attempt in attempts:
        place = attempt.source, attempt.data
        if not attempt.has_started:
            place = usual.get(attempt.tag, place)
        source, data = place
        groups.setdefault((attempt.tag, "" if pool_sources else source, data), []).append(attempt)
    labelled = {}
    for (tag, source, data), members in groups.items():
        same_tag = [key for key in groups if key[0] == tag]
        sources = {key[1] for key in same_tag}
        label = tag
        if len(sources) > 1:
            label += f" (source {source[:8] or 'unknown'})"
        if len(same_tag) > len(sources):  # one source was trained on several data
            label += f" (data {hashlib.sha256(data.encode()).hexdigest()[:8]})"
        labelled[label, source] = members
    return labelled


def _usual_place(attempts: Sequence[Attempt]) -> dict[str, tuple[str, str]]:
    """Return the source and data of most runs of each tag, of those whose logs have event:started."""
    counts: dict[str, Counter] = {}
    for attempt in attempts:
        if attempt.has_started:
            counts.setdefault(attempt.tag, Counter())[attempt.source, attempt.data] += 1
    return {tag: places.most_common(1)[0][0] for tag, places in counts.items()}


def _values(arms: Sequence[SweepArm], name: str) -> list[str]:
    return sorted({format_value(arm.settings[name]) for arm in arms if name in arm.settings})


def _read_plan(path: Path, file: Path) -> Manifest:
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        raise ValueError(
            f"no {path}, which says what was planned and done: launch the sweep first "
            f"(python launch_lr_sweep.py {file}), name its folder with --logs, or give the logs themselves"
        ) from None
    if not manifest.runs:
        raise ValueError(f"{path} plans no runs")
    return manifest


def _attempt(record: Run, folder: Path) -> Attempt:
    """Make an Attempt of a planned run and its log, if any; the log decides how it ended."""
    log = None
    for place in (folder, Path(record.log).parent):
        path = find_log(place, Path(record.log).name) if record.log else None
        if path:
            log = read_log(path)[-1]
            break
    attempt = Attempt(record.run_id, record.seed, record.state, math.nan, record.tag, record.reason)
    attempt.source, attempt.log = record.source_hash, log
    if log:
        if attempt.has_started:
            attempt.source = log.source_hash or record.source_hash
        attempt.seed = record.seed if log.seed is None else log.seed
        ends = ("finished", "diverged")  # also of a run that crashed, if it was resumed by hand
        if record.state not in FAILED:
            ends += ("crashed",)
        if log.state in ends and log.state != record.state:
            attempt.state, attempt.reason = log.state, ""
    elif attempt.state == "finished":
        attempt.state, attempt.reason = "log gone", "it finished, but its log is not there any more"
    return _with_loss(attempt)


def _with_loss(attempt: Attempt) -> Attempt:
    if attempt.state == "finished":
        attempt.loss = attempt.log.final_val_loss if attempt.log else math.nan
        if not math.isfinite(attempt.loss):
            attempt.reason = "it finished without a validation loss that is a number"
    return attempt


def _contradictions(attempt: Attempt, record: Run) -> Iterable[str]:
    """Yield a note if a log's own configuration is not what the manifest planned."""
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
    """Complete each arm's settings, in place, with those that the sweep leaves to the trainer.

    An arm with a log gets the log's. One without gets those of another arm of its script, except settings
    that the sweep sets for any arm of that script: there, the arms may differ.
    """
    shared: dict[str, dict] = {}
    asked: dict[str, set] = {}
    for arm in arms:
        asked.setdefault(arm.script, set()).update(arm.settings)
        logged = next((run.settings for run in arm.runs if run.config), {})
        if logged:
            shared.setdefault(arm.script, logged)
            arm.settings = {**arm.settings, **logged}
    for arm in arms:
        unset = {k: v for k, v in shared.get(arm.script, {}).items() if k not in asked[arm.script]}
        arm.settings = {**unset, **arm.settings}


def _question(file: Path) -> str:
    """Return the first paragraph of the comment at the top of a sweep file."""
    try:
        text = read_text(file)
        tomllib.loads(text)
    except (OSError, ValueError):
        return ""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def _read_logs(
    paths: Sequence[Path], pool_sources: bool, stopped_early: bool
) -> tuple[Results, Manifest | None]:
    """Return the logs' arms, and the manifest beside them if it plans them all: it gives their order."""
    runs = read_runs(paths)
    if not runs:
        places = ", ".join(map(str, paths))
        raise ValueError(f"no log in {places}: logs are files that end in .txt or .txt.xz")
    notes = []
    early = [run for run in runs if _ends_early(run)]
    if early and stopped_early:
        notes.append(
            f"{len(early)} public runs end before their last step, and count as --stopped-early asked"
        )
        runs = [replace(run, state="finished") if _ends_early(run) else run for run in runs]
    elif early:
        notes.append(
            f"{len(early)} public runs end in a validation before their last step; if they were stopped on "
            "purpose, --stopped-early counts them"
        )
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
    manifest = sweep_beside(arms)
    if manifest:
        tags = [run.tag for run in manifest.runs]
        arms.sort(key=lambda arm: tags.index(arm.label))
        for arm in arms:
            arm.key = arm.label
    else:
        arms.sort(key=lambda arm: _words_and_numbers(arm.label))
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    name = log_stem(paths[0]) + (f"-and-{len(paths) - 1}-more" if len(paths) > 1 else "")
    return Results(name, arms, folder=folder, notes=[*notes, *said]), manifest


def _words_and_numbers(label: str) -> list:
    """Return the key that sorts names with their numbers by value: lr_2 before lr_10."""
    parts = re.split(r"((?:(?<![\w.])-)?\d+(?:\.\d+)?(?:e-?\d+)?)", label)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _ends_early(run: RunLog) -> bool:
    """Return whether a public log, which has no events, ends in a validation before its last step."""
    is_public = not run.config and run.state in ("running", "stopped")  # stopped: another trial follows
    return is_public and run.last_step > 0 and len(run.val) > 0 and run.val.step[-1] == run.last_step


def _found(run: RunLog) -> Attempt:
    """Make an Attempt of a log without a plan. llm.c's, which may be incomplete, count as finished."""
    finished = run.state == "finished" or (run.state == "unknown" and math.isfinite(run.final_val_loss))
    attempt = Attempt(run.run_id, run.seed, "finished" if finished else run.state)
    attempt.source, attempt.log = run.source_hash, run
    return _with_loss(attempt)


def _pooled(sources: Sequence[str]) -> str:
    different = sorted(set(sources))
    if len(different) < 2:
        return "--pool-sources changed nothing: all runs have the same source code"
    return f"runs of {len(different)} different source codes were pooled, as --pool-sources asked"


def _mark_foreign(results: Results, wanted: str | None) -> None:
    """Mark the arms that cannot be compared, because their source code or data differs.

    The standard is the source and data of the control, if one is `wanted`, else those of most runs.
    """
    _mark_other_sources(results, wanted)
    _mark_other_data(results, wanted)


def _mark_other_sources(results: Results, wanted: str | None) -> None:
    """Mark arms whose source code is not the usual one of their script.

    Public logs, which have no settings, each have their own source code; they are compared all the same.
    """
    by_script: dict[str, list[SweepArm]] = {}
    for arm in results.arms:
        if arm.settings:
            by_script.setdefault(arm.script, []).append(arm)
    for script, arms in by_script.items():
        preferred = [arm for arm in arms if wanted in (arm.label, arm.key)] or arms
        sources = Counter()
        for arm in preferred:
            sources[arm.source] += len(arm.runs)
        usual = max(sources, key=lambda source: (sources[source], source))
        for arm in arms:
            if arm.source != usual:
                arm.foreign = f"other source code than the other runs of {script or 'its script'}"
                if f"(source {arm.source[:8]}" not in arm.label:
                    arm.label += f" (source {arm.source[:8] or 'unknown'})"


def _mark_other_data(results: Results, wanted: str | None) -> None:
    """Mark arms trained or validated on different data from the rest."""
    arms = [arm for arm in results.arms if not arm.foreign and _data_of(arm)]
    preferred = [arm for arm in arms if wanted in (arm.label, arm.key)]
    counts = Counter()
    for arm in preferred[:1] or arms:
        counts[_data_of(arm)] += len(arm.runs)
    usual = max(counts, key=lambda data: (counts[data], data), default="")
    for arm in arms:
        if _data_of(arm) != usual:
            arm.foreign = f"other data ({shorten(_data_of(arm), 60)}) than the other runs"


def _data_of(arm: SweepArm) -> str:
    return next((attempt.data for attempt in arm.attempts if attempt.data), "")


def _find_control(results: Results, wanted: str | None, manifest: Manifest | None) -> str | None:
    """Return the control's label: as asked or planned, else that of a = 0, else the baseline's; or None."""
    arms = [arm for arm in results.arms if not arm.foreign]
    if wanted is not None:
        exact = [arm for arm in arms if wanted in (arm.label, arm.key)]
        fitting = exact or [a for a in arms if wanted in a.label or any(wanted in r.run_id for r in a.runs)]
        if len(fitting) != 1:
            found = "none of" if not fitting else f"{len(fitting)} of"
            names = ", ".join(arm.label for arm in fitting or arms)
            raise ValueError(f"control {wanted!r} fits {found} the arms, wanted one: {names}")
        return fitting[0].label
    if manifest:
        named = [arm.label for arm in arms if arm.key == manifest.control]
        return named[0] if named else None
    zero = [arm for arm in arms if arm.strength == 0]
    if zero and any(arm.strength for arm in arms):
        return max(zero, key=lambda arm: len(arm.attempts)).label
    other = [arm for arm in arms if arm.settings and "spectral_lr_mul" not in arm.settings]
    with_ord = [arm for arm in arms if "spectral_lr_mul" in arm.settings]
    return other[0].label if len(other) == 1 and with_ord else None


def _find_versus(results: Results, manifest: Manifest) -> dict[str, str]:
    """Return the labels of single arms' own controls; add a note for one that cannot be compared."""
    labels = {arm.key: arm.label for arm in results.arms if not arm.foreign}
    if len(labels) < 2:
        return {}
    found = {labels[key]: labels.get(other) for key, other in manifest.versus.items() if key in labels}
    for label in [label for label, other in found.items() if other is None or results.control is None]:
        results.notes.append(
            f"{label}: its own control is not among the arms that can be compared; compared with "
            f"{results.control or 'the lowest mean'} instead"
        )
        del found[label]
    return found


def _looks(results: Results, manifest: Manifest | None) -> dict[str, dict]:
    """Return the arms' looks by label: those that they have in all pictures of their sweep."""
    labels = [arm.label for arm in results.arms]
    if manifest is None or results.planned:
        return looks_of(labels, results.control)
    label_of = {run.tag: run.tag for run in manifest.runs}  # all the sweep's arms; the logs may be of few
    label_of |= {arm.key: arm.label for arm in results.arms}
    return looks_of(list(label_of.values()), label_of.get(manifest.control))


def _remarks(results: Results) -> list[str]:
    """Return what a reader of the numbers must know about the runs."""
    notes = [f"{arm.label} is not compared: it has {arm.foreign}" for arm in results.arms if arm.foreign]
    if results.planned:  # for logs alone, group_by_arm has noted repeats
        for arm in results.arms:
            done = [attempt.seed for attempt in arm.attempts if attempt.outcome == "done"]
            notes += repeats(arm.label, done)
    lengths = {int(run.val.step[-1]) for run in _finished(results) if len(run.val)}
    tokens = {float(run.val.tokens[-1]) for run in _finished(results) if len(run.val)}
    if len(lengths) > 1:
        notes.append(f"the runs' last validations are at different steps: {_some(sorted(lengths))}")
    elif len(tokens) > 1 and all(map(math.isfinite, tokens)):
        notes.append(
            f"runs of equal steps were trained on different numbers of tokens: {_some(sorted(tokens))}"
        )
    for name in ("device", "world_size", "torch"):
        values = sorted({run.started[name] for run in results.runs if name in run.started})
        if len(values) > 1:
            notes.append(f"runs differ in {name}: {_some(values)}; times cannot be compared")
    for run in results.runs:
        if run.unread_lines:
            text = f"{run.unread_lines} lines could not be read, such as {run.unread_examples[0]!r}"
            notes.append(f"{run.path or run.run_id}: {text}")
    return list(dict.fromkeys(notes))


def _finished(results: Results) -> list[RunLog]:
    return [attempt.log for attempt in results.attempts if attempt.log and attempt.outcome == "done"]


def _some(values: Sequence[object]) -> str:
    texts = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "")
