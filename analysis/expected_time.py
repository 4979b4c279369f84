"""Predict how long planned runs take from those of the same kind that this machine has finished."""

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from analysis.devices import Slot
from analysis.manifest import LOGS, Run, manifests_in
from analysis.run_log import read_log
from analysis.style import format_time
from analysis.trainers import read_trainer

MAX_LOGS = 100  # newest logs that are read
SHAPE = ("model", "batch_sizes", "batch_tokens", "row_tokens")  # settings that determine the time of a step


def expected_time(runs: Sequence[Run], slots: Sequence[Slot], nproc: int) -> str:
    """Say in words how long these runs will take."""
    past, total = finished_runs(slots[0].size(nproc)), 0.0
    for run in runs:
        settings = read_trainer(run.script).resolve(run.settings)
        shape = shape_of(run.script, {name.lower(): value for name, value in settings.items()})
        fits = [step_s * num_steps(settings) + other_s for of, step_s, other_s in past if of == shape]
        if not fits:
            return "expected time unknown: the launcher has finished no run of this kind on this host yet"
        total += mean(fits)
    each, rounds = 1000 * total / len(runs), math.ceil(len(runs) / len(slots))
    return f"expected time about {format_time(each * rounds)} ({format_time(each)} a run)"


def finished_runs(size: str) -> list[tuple[list, float, float]]:
    """Return (shape, seconds per step, other seconds: start, compiling) of runs finished on such a slot."""
    manifests, _ = manifests_in(LOGS)
    runs = [run for manifest in manifests for run in [*manifest.earlier, *manifest.runs]]
    here = [run for run in runs if run.state == "finished" and run.host == platform.node()]
    here = [run for run in here if run.slot == size and Path(run.log).exists()]
    found = []
    for run in sorted(here, key=lambda run: run.ended)[-MAX_LOGS:]:
        log = read_log(Path(run.log))[-1]
        train_s = log.last_time_ms / 1000
        if log.last_step > 0 and math.isfinite(train_s):
            other_s = max(0.0, run.wall_s - train_s)
            found.append((shape_of(log.script, log.config), train_s / log.last_step, other_s))
    return found


def shape_of(script: str, settings: Mapping[str, object]) -> list:
    """Return what determines the time of a step: script, model and batch sizes."""
    return [Path(script).name, *map(settings.get, SHAPE)]


def num_steps(settings: dict) -> float:
    """Return the number of steps of a run from its resolved settings."""
    scheduled, batches = settings.get("NUM_SCHEDULED_ITERATIONS", 0), settings.get("BATCH_SIZES")
    if settings.get("TRAIN_TOKENS"):  # the last batch size is that of the extension
        scheduled = settings["TRAIN_TOKENS"] * (len(batches) - 1) / sum(batches[:-1])
    return scheduled + settings.get("NUM_EXTENSION_ITERATIONS", 0)
