"""Predict how long planned runs take from earlier runs of the same script, model, batch sizes and machine."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.devices import Slot, device_name
from analysis.manifest import LOGS, Run, manifests_in
from analysis.run_log import list_logs, read_log
from analysis.style import format_time
from analysis.trainers import read_trainer
from data.cores import usable_cores

HISTORY_LOGS = 100  # number of newest logs to read
SHAPE = ("model", "batch_sizes", "batch_tokens", "row_tokens")  # settings that determine the time of a step


@dataclass(frozen=True)
class Past:
    """A finished run: its shape, seconds per step, and seconds spent outside the steps."""

    run_id: str
    shape: tuple
    step_s: float
    other_s: float  # start, compiling, validation


def shape_of(script: str, settings: Mapping[str, object]) -> tuple:
    """Return what determines the time of a step: script, model and batch sizes."""
    return Path(script).name, *map(settings.get, SHAPE)


def expected_time(runs: Sequence[Run], slots: Sequence[Slot], nproc: int) -> str:
    """Say in words how long these runs will take."""
    history = read_history(slots[0], nproc)
    total, used = 0.0, set()
    for run in runs:
        settings = read_trainer(run.script).resolve(run.settings)
        shape = shape_of(run.script, {name.lower(): value for name, value in settings.items()})
        fits = [past for past in history if past.shape == shape]
        if not fits:
            return "expected time unknown: no finished log of this script, model, batch sizes and device yet"
        total += sum(past.step_s * num_steps(settings) + past.other_s for past in fits) / len(fits)
        used.update(past.run_id for past in fits)
    each, rounds = 1000 * total / len(runs), math.ceil(len(runs) / len(slots))
    source = "1 earlier log" if len(used) == 1 else f"{len(used)} earlier logs"
    return f"expected time about {format_time(each * rounds)} ({format_time(each)} a run, from {source})"


def num_steps(settings: dict) -> float:
    """Return the number of steps of a run from its resolved settings."""
    scheduled, batches = settings.get("NUM_SCHEDULED_ITERATIONS", 0), settings.get("BATCH_SIZES")
    if settings.get("TRAIN_TOKENS"):  # the last batch size is that of the extension
        scheduled = settings["TRAIN_TOKENS"] * (len(batches) - 1) / sum(batches[:-1])
    return scheduled + settings.get("NUM_EXTENSION_ITERATIONS", 0)


def read_history(slot: Slot, nproc: int) -> list[Past]:
    """Return the finished runs on a slot like this one."""
    machine = {"device": device_name(bool(slot.gpus)), "world_size": str(nproc)}
    if not slot.gpus:
        threads = str(max(1, (len(slot.cores) or usable_cores()) // nproc))
        if nproc == 1:  # several ranks set it themselves
            threads = os.environ.get("OMP_NUM_THREADS", threads)
        machine["threads"] = threads
    manifests, _ = manifests_in(LOGS)
    walls = {run.run_id: run.wall_s for manifest in manifests for run in manifest.runs}
    logs = list_logs(LOGS) if LOGS.is_dir() else []
    history = []
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True)[:HISTORY_LOGS]:
        log = read_log(path)[-1]
        started, train_s = log.started, log.last_time_ms / 1000
        if log.state != "finished" or not started or log.last_step < 1 or not math.isfinite(train_s):
            continue
        if all(started.get(name) == value for name, value in machine.items()):
            wall_s = walls.get(log.run_id, math.nan)
            other_s = max(0.0, wall_s - train_s) if math.isfinite(wall_s) else 0.0
            shape = shape_of(log.script, log.config)
            history.append(Past(log.run_id, shape, train_s / log.last_step, other_s))
    return history
