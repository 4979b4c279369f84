"""Groups of runs that differ only in seed, or in how they are recorded or run.

from analysis.arms import group_by_arm
arms, notes = group_by_arm(read_runs("logs"))
arms[0].label, arms[0].runs, arms[0].seeds
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.manifest import Manifest, manifests_in
from analysis.run_log import FINISHED, RunLog, format_value
from analysis.shown import clean

DATA = ("train_data", "val_data")  # fields of event:started
MAX_SETTINGS = 3  # of an arm's own; with more, its name has those alone that are unlike most arms'


@dataclass
class Arm:
    """Runs that differ only in the seed and in settings that do not change the training."""

    label: str
    key: str
    runs: list[RunLog]

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]


def arm_key(run: RunLog) -> str:
    """Return a key that is equal for runs of the same arm. The source hash is not part of it.

    Different data under the same file names is another arm. Logs without configuration (public ones) are
    distinguished by source and number of steps, so that trials of one script are one arm; without source, by
    path.
    """
    if run.config:
        data = [run.started.get(name) for name in DATA] if run.started else []
        others = run.not_training
        training = {key: value for key, value in run.config.items() if key not in others}
        return json.dumps([run.script, training, data], sort_keys=True, default=str)
    return json.dumps([run.source_hash, run.num_steps] if run.source_hash else [str(run.path)])


def group_by_arm(
    runs: Iterable[RunLog], tags: Mapping[str, str] | None = None
) -> tuple[list[Arm], list[str]]:
    """Return arms in order of first appearance, named by `name_arms`, and notes for the user.

    `tags` maps run names to their tags in sweeps; None: those of the manifests beside the logs. Runs with
    equal settings but different source code are kept apart, with a note: the same settings may train
    differently there.
    """
    runs = list(runs)
    by_key: dict[str, list[RunLog]] = {}
    by_source: dict[tuple[str, str], list[RunLog]] = {}
    for run in runs:
        key = arm_key(run)
        by_key.setdefault(key, []).append(run)
        by_source.setdefault((key, run.source_hash), []).append(run)
    found = name_arms(list(by_key.values()), tags_beside(runs) if tags is None else tags)
    names = dict(zip(by_key, found, strict=True))
    arms, notes = [], []
    for (key, source), members in by_source.items():
        label = names[key]
        if len(members) < len(by_key[key]):  # the other runs with these settings have another source
            label += f" (source {source[:8] or 'unknown'})"
        arms.append(Arm(label, key, members))
    for members in by_key.values():
        first: dict[str, str] = {}  # source -> its first run
        for run in members:
            first.setdefault(run.source_hash, run.run_id)
        if len(first) > 1:
            text = ", ".join(first.values())
            notes.append(f"equal settings but {len(first)} different sources, not pooled: {text}")
    notes += _left_out(arms)
    for arm in arms:
        notes += repeats(arm.label, [run.seed for run in arm.runs if run.state in FINISHED])
    return arms, notes


def repeats(label: str, seeds: Iterable[int | None]) -> list[str]:
    """Return a note if several of an arm's finished runs, whose seeds these are, have the same seed."""
    counts = Counter(seed for seed in seeds if seed is not None)
    repeated = [f"{count} runs of seed {seed}" for seed, count in counts.items() if count > 1]
    if not repeated:
        return []
    return [f"{label}: {', '.join(repeated)} count as one in a mean, as they differ by the machine alone"]


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------


def tags_beside(runs: Iterable[RunLog]) -> dict[str, str]:
    """Return the runs' tags by name, from the manifests beside their logs."""
    folders = {run.path.parent for run in runs if run.path}
    manifests = [manifest for folder in sorted(folders) for manifest in manifests_in(folder)[0]]
    return {run.run_id: run.tag for manifest in manifests for run in manifest.runs}


def sweep_beside(arms: Sequence[Arm]) -> Manifest | None:
    """Return the manifest beside the logs that plans all runs of these arms under these names."""
    for folder in sorted({run.path.parent for arm in arms for run in arm.runs if run.path}):
        for manifest in manifests_in(folder)[0]:
            tags = {run.run_id: run.tag for run in manifest.runs}
            if all(tags.get(run.name) == arm.label for arm in arms for run in arm.runs):
                return manifest
    return None


def name_arms(arms: Sequence[Sequence[RunLog]], tags: Mapping[str, str]) -> list[str]:
    """Return a unique name for each arm.

    It is the arm's tag, if all its runs have that tag and no other arm does. Else it is settings that
    distinguish the arm, such as "muon_lr=0.1"; else, and for logs without settings, its run_id, with as many
    folders before it as it takes.
    """
    own = [{tags.get(run.name) for run in runs} for runs in arms]
    times = Counter(tag for found in own for tag in found)
    names = []
    for runs, found, settings in zip(arms, own, _by_settings(arms), strict=True):
        tag = next(iter(found))
        tagged = len(found) == 1 and tag and times[tag] == 1
        names.append(tag if tagged else settings or runs[0].run_id)
    return unique_names(names, [runs[0] for runs in arms])


def unique_names(names: Sequence[str], runs: Sequence[RunLog]) -> list[str]:
    """Add its run_id to a name that several arms have, with folders if need be; at last, a number."""
    counts = Counter(names)
    folders = [run.path.parent.parts if run.path else () for run in runs]
    for depth in range(max(map(len, folders), default=0) + 1):
        found = []
        for name, run, parts in zip(names, runs, folders, strict=True):
            place = "/".join([*map(clean, parts[max(0, len(parts) - depth) :]), run.run_id])
            longer = place if name == run.run_id else f"{name} ({place})"
            found.append(longer if counts[name] > 1 else name)
        if len(set(found)) == len(found):
            return found
    counts = Counter(found)
    return [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(found, start=1)]


def _by_settings(arms: Sequence[Sequence[RunLog]]) -> list[str]:
    """Name each arm by the settings that tell all apart; if they are many, by those unlike most arms'.

    An arm without any of these is named by its script.
    """
    parts = [_parts(runs[0]) for runs in arms]
    chosen, names = _telling_apart(parts), []
    if not chosen:
        return [""] * len(arms)
    usual = {name: Counter(p[name] for p in parts if name in p).most_common(1)[0][0] for name in chosen}
    for part in parts:
        own = [name for name in chosen if name in part]
        shown = own if len(own) <= MAX_SETTINGS else [name for name in own if part[name] != usual[name]]
        names.append(" ".join(part[name] for name in shown) or part.get("script", ""))
    return names


def _parts(run: RunLog) -> dict[str, str]:
    """Candidate names of a run, by setting: "muon_lr=0.1"; last the data, and the script by its bare name."""
    if not run.config:
        return {}
    others = run.not_training
    settings = {name: value for name, value in run.settings.items() if name not in others}
    settings |= {name: run.started[name] for name in DATA if name in run.started}
    parts = {name: f"{name}={format_value(settings[name])}" for name in sorted(settings, reverse=True)}
    return {**parts, "script": Path(run.script).stem} if run.script else parts


def _varying(parts: Sequence[dict[str, str]]) -> list[str]:
    """Return the settings that vary among the arms that have them.

    ORD's, which the baseline lacks, do not tell ORD from the baseline; the script does.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return [name for name in names if len({part[name] for part in parts if name in part}) > 1]


def _left_out(arms: Sequence[Arm]) -> list[str]:
    """Return a note if arms named by settings differ in more than their names say."""
    if not any("=" in arm.label for arm in arms):
        return []
    parts = [_parts(arm.runs[0]) for arm in arms]
    named = {n for arm, part in zip(arms, parts, strict=True) for n in part if part[n] in arm.label}
    silent = [n for n in _varying(parts) if n not in named]
    return [f"arms differ also in {', '.join(sorted(silent))}, which their names leave out"] if silent else []


def _telling_apart(parts: Sequence[dict[str, str]]) -> list[str]:
    """Choose few settings that together distinguish all arms, as far as possible.

    Those of most values come first, of equals the shortest to write. Of settings that vary together (ADAM_LR
    = 0.1 x MUON_LR) one is chosen.
    """

    def num_groups(*names):
        return len({tuple(part.get(name) for name in names) for part in parts})

    by_length = sorted(_varying(parts), key=lambda name: sum(len(part.get(name, "")) for part in parts))
    chosen = []
    for name in sorted(by_length, key=lambda name: (name == "script", -num_groups(name))):
        if num_groups(*chosen, name) > num_groups(*chosen):
            chosen.append(name)
    return chosen
