"""Runs that belong together: the same training with other seeds, recorded or run in another way.

from analysis.arms import group_by_arm
arms, notes = group_by_arm(read_runs("logs"))
arms[0].label, arms[0].runs, arms[0].seeds
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from analysis.run_log import RunLog, format_value


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
    """A key that is equal for two runs of the same arm. The source hash is not part of it.

    The same file names with other data in them are another training. Logs without configuration (public
    ones) are told apart by source and number of steps, so that trials of one script are one arm; without
    source, by path.
    """
    if run.config:
        started = run.event("started")
        data = [started.fields.get(name) for name in ("train_data", "val_data")] if started else []
        training = {key: value for key, value in run.config.items() if key not in run.not_training}
        return json.dumps([run.script, training, data], sort_keys=True, default=str)
    return json.dumps([run.source_hash, run.num_steps] if run.source_hash else [str(run.path)])


def group_by_arm(runs: Iterable[RunLog]) -> tuple[list[Arm], list[str]]:
    """Arms in order of first appearance, labelled by the settings that differ, and notes for the user.

    Runs of equal settings but different source code are kept apart, and a note says so: the same settings
    may mean another training there.
    """
    groups: dict[tuple[str, str], list[RunLog]] = {}
    for run in runs:
        groups.setdefault((arm_key(run), run.source_hash), []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    sources: dict[str, list[str]] = {}
    for key, source in groups:
        sources.setdefault(key, []).append(source)
    arms, notes = [], []
    for (key, source), members, label in zip(groups, groups.values(), labels, strict=True):
        if len(sources[key]) > 1 and members[0].config:
            label = f"{label} (source {source[:8] or 'unknown'})"
        elif labels.count(label) > 1:
            label = f"{label} ({members[0].run_id})"
        arms.append(Arm(label, key, members))
    for key, hashes in sources.items():
        if len(hashes) > 1:
            names = ", ".join(groups[key, source][0].run_id for source in hashes)
            notes.append(f"equal settings but {len(hashes)} different sources, not pooled: {names}")
    for arm in arms:
        for seed, count in Counter(seed for seed in arm.seeds if seed is not None).items():
            if count > 1:
                notes.append(
                    f"{arm.label}: {count} runs of seed {seed}; repeats show the machine's noise alone"
                )
    return arms, notes


def _labels(runs: list[RunLog]) -> list[str]:
    """A label for each run: the settings that differ, else its script, else its name."""
    trainings = [{k: v for k, v in run.settings.items() if k not in run.not_training} for run in runs]
    known = [training for training in trainings if training]  # public logs have none
    names = sorted(set().union(*known))
    missing = object()
    differing = [n for n in names if len({repr(training.get(n, missing)) for training in known}) > 1]
    scripts_differ = len({run.script for run in runs if run.config}) > 1
    labels = []
    for run, training in zip(runs, trainings, strict=True):
        parts = [Path(run.script).stem] if scripts_differ and run.script else []
        parts += [f"{name}={format_value(training[name])}" for name in differing if name in training]
        labels.append(" ".join(parts) if parts and run.config else run.run_id)
    return labels
