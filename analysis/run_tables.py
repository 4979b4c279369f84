"""Tables of runs for other programs: one row per run, or per run and step.

    origin_of(run), state_of(run)     # {"muon_lr": 0.023, ...}, {"state": "finished", "val_loss": 3.27, ...}
    series_of(run)["val_loss"]        # a Column; of a list of numbers "spec_attn.0", "spec_attn.1", ...
    steps_table({"a": run})           # header and rows
    NewPoints().take("a", run)        # points logged since the last call: [(step, {name: number})]

Names are those of the log; list entries are numbered from 0. Times are in ms, losses in nats per token.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from analysis.run_log import RunLog, format_value, log_stem
from analysis.shown import clean
from analysis.step_lines import Column

ABOUT_START = ("time", "torch", "device", "world_size", "git", "train_data", "val_data")  # of event:started


def flat_config(run: RunLog) -> dict[str, object]:
    """Flatten the configuration: model_config.width beside muon_lr."""
    flat = {}
    for name, value in run.config.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def origin_of(run: RunLog, tag: str = "") -> dict[str, object]:
    """Return what was known of a run at its start, including settings: numbers, booleans, texts or None.

    tag: the run's in its sweep.
    """
    origin = {"tag": tag, "script": run.script, "seed": run.seed, "source_hash": run.source_hash}
    origin |= {name: run.started[name] for name in ABOUT_START if name in run.started}
    for name, value in flat_config(run).items():
        plain = isinstance(value, (int, float, str)) or value is None
        origin.setdefault(name, value if plain else format_value(value))
    return origin


def state_of(run: RunLog) -> dict[str, object]:
    """Return the state, progress and losses of a run so far."""
    return {
        "state": run.state,
        "num_steps": run.num_steps,
        "last_step": run.last_step,
        "val_loss": run.final_val_loss,
        "best_val_loss": run.best_val_loss,
        "train_time": run.last_time_ms,
        "log": str(run.path),
    }


def series_of(run: RunLog) -> dict[str, Column]:
    """Return everything that the run logged as numbers over steps."""
    found = {}
    for name, column in run.columns.items():
        if column.is_numeric:
            found[name] = column
        elif column.value.ndim == 2:
            for place, values in enumerate(column.value.T):
                found[f"{name}.{place}"] = Column(column.step, values)
    return found


def steps_table(runs: Mapping[str, RunLog]) -> tuple[list[str], list[list]]:
    """Return header and rows: run, step, and each quantity that any run logged; NaN if not logged."""
    series = {name: series_of(run) for name, run in runs.items()}
    quantities = list(dict.fromkeys(quantity for columns in series.values() for quantity in columns))
    rows = []
    for name, columns in series.items():
        steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(c.step for c in columns.values())]))
        table = np.full((len(steps), len(quantities)), np.nan)
        for quantity, column in columns.items():
            table[np.searchsorted(steps, column.step), quantities.index(quantity)] = column.value
        rows += [[name, step, *values] for step, values in zip(steps.tolist(), table.tolist(), strict=True)]
    return ["run", "step", *quantities], rows


def facts_table(runs: Mapping[str, RunLog], tags: Mapping[str, str]) -> tuple[list[str], list[list]]:
    """Return header and rows: run, and each fact or setting that any run has; None if it lacks it."""
    facts = {name: state_of(run) | origin_of(run, tags.get(run.name, "")) for name, run in runs.items()}
    header = list(dict.fromkeys(key for row in facts.values() for key in row))
    return ["run", *header], [[name, *(row.get(key) for key in header)] for name, row in facts.items()]


class RunNames:
    """Unique names of runs, fit for files: the log's name, prefixed by its folder's if another log has it."""

    def __init__(self):
        self._path_of: dict[str, Path] = {}
        self._name_of: dict[Path, str] = {}

    def __getitem__(self, run: RunLog) -> str:
        path = Path(run.path).resolve()  # one name, however the log was given
        if path not in self._name_of:
            name = clean(log_stem(path))
            for folder in (path.parent, *path.parent.parents):
                if name not in self._path_of:
                    break
                name = f"{clean(folder.name)}.{name}"
            self._path_of[name], self._name_of[path] = path, name
        return self._name_of[path] + (f"#{run.trial + 1}" if run.trial else "")


class NewPoints:
    """Return each number of a run once, without the steps that a resumed run repeats."""

    def __init__(self):
        self._last: dict[tuple[str, str], int] = {}  # run and quantity -> the last step returned

    def take(self, name: str, run: RunLog) -> list[tuple[int, dict[str, float]]]:
        """Return a run's new finite numbers by step, in order."""
        by_step: dict[int, dict[str, float]] = {}
        for quantity, column in series_of(run).items():
            key = name, quantity
            new = column.step > self._last.get(key, -1)
            for step, value in zip(column.step[new].tolist(), column.value[new].tolist(), strict=True):
                if math.isfinite(value):
                    by_step.setdefault(step, {})[quantity] = value
            if new.any():
                self._last[key] = int(column.step[-1])
        return sorted(by_step.items())
