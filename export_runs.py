"""Export runs as tables, or to a program that shows curves: python export_runs.py logs --to csv

    python export_runs.py logs --to csv --out tables           # tables/settings.csv, tables/steps.csv
    python export_runs.py logs --to tensorboard --follow       # then: tensorboard --logdir export/tensorboard
    python export_runs.py logs/A.txt logs/B.txt --to trackio   # then: trackio show
    python export_runs.py logs --to wandb --project tiny --follow

csv is two tables: settings has a row for each run, with its settings, state and last losses; steps has a row
for each run and step, with all that was logged as a number. Names are those of the log (a list's places from
0: spec_attn.0); times are in ms, losses in nats per token. Packed logs, as in records/, are read too.

--follow goes on until Ctrl-C: every few seconds, what running logs have got meanwhile is added. tensorboard,
trackio and wandb are not in requirements.txt. tensorboard and trackio keep everything on this machine; wandb
does with WANDB_MODE=offline.
"""

import contextlib
import contextvars
import math
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line
from analysis.arms import tags_beside
from analysis.command_line import import_optional
from analysis.files import write_atomically
from analysis.run_log import (
    OPENERS,
    LogFollower,
    RunLog,
    format_value,
    log_stem,
    named_logs,
    read_log,
    read_runs,
)
from analysis.shown import clean
from analysis.step_lines import Column
from analysis.tables import as_csv

EVERY_S = 5.0  # between two looks at logs that are followed
ABOUT_START = ("time", "torch", "device", "world_size", "git", "train_data", "val_data")  # of event:started
EVENTS_SUFFIX = ".export_runs"  # of the event files that are ours to replace

Runs = Mapping[str, RunLog]  # by name


# ------------------------------------------------------------------------------------------------
# Runs as tables and points
# ------------------------------------------------------------------------------------------------


def origin_of(run: RunLog, tag: str = "") -> dict[str, object]:
    """Return what was known of a run at its start, including settings: numbers, booleans, texts or None.

    tag: the run's in its sweep.
    """
    origin = {"tag": tag, "script": run.script, "seed": run.seed, "source_hash": run.source_hash}
    origin |= {name: run.started[name] for name in ABOUT_START if name in run.started}
    for name, value in run.flat_config.items():
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


def name_runs(runs: Sequence[RunLog], given: Sequence[Path]) -> dict[str, RunLog]:
    """Name runs, fit for files: a log's path below the common folder of all that is given, joined by dots.

    A log that is given twice is named once. ValueError if two logs would have one name.
    """
    top = os.path.commonpath([(path if path.is_dir() else path.parent).resolve() for path in given])
    named, seen = {}, set()
    for run in runs:
        log, key = Path(run.path), (Path(run.path).resolve(), run.trial)
        if key in seen:
            continue
        seen.add(key)
        name = clean(".".join([*log.parent.resolve().relative_to(top).parts, log_stem(log)]))
        name += f"#{run.trial + 1}" if run.trial else ""
        if name in named:
            raise ValueError(f"{named[name].path} and {run.path} would both be {name}: rename one")
        named[name] = run
    return named


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


# ------------------------------------------------------------------------------------------------
# Destinations: each has update(runs, tags), given new and changed runs, and close()
# ------------------------------------------------------------------------------------------------


class Tables:
    """Two tables in a folder, settings.csv and steps.csv; rewritten whenever a run has changed."""

    def __init__(self, folder: Path):
        self.settings, self.steps, self.runs = folder / "settings.csv", folder / "steps.csv", {}
        self.goal = f"{self.settings}, {self.steps}"

    def update(self, runs: Runs, tags: Mapping[str, str]) -> None:
        self.runs |= runs
        write_atomically(self.settings, as_csv(*facts_table(self.runs, tags)))
        write_atomically(self.steps, as_csv(*steps_table(self.runs)))

    def close(self) -> None:
        pass


class TensorBoard:
    """An event file for each run, in a folder of the run's name; those of an earlier export are replaced."""

    def __init__(self, folder: Path):
        self.folder, self.writers, self.points = folder, {}, NewPoints()
        self.goal = f"{folder}; tensorboard --logdir {folder}"
        self.files = import_optional("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self.hparams = import_optional("tensorboard.plugins.hparams.summary_v2", "tensorboard")
        self.event = import_optional("tensorboard.compat.proto.event_pb2", "tensorboard").Event
        self.summary = import_optional("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary

    def update(self, runs: Runs, tags: Mapping[str, str]) -> None:
        for name, run in runs.items():
            if name not in self.writers:
                self.writers[name] = self.start(self.folder / name, run, tags.get(run.name, ""))
            start_s = start_time(run)
            for step, values in self.points.take(name, run):
                points = [
                    self.summary.Value(tag=in_group(quantity), simple_value=value)
                    for quantity, value in values.items()
                ]
                summary = self.summary(value=points)
                when = start_s + values.get("train_time", 0) / 1000
                self.writers[name].add_event(self.event(wall_time=when, step=step, summary=summary))
            self.writers[name].flush()

    def start(self, folder: Path, run: RunLog, tag: str):
        """Open a run's event file and write its settings there."""
        for old in folder.glob(f"events.out.tfevents.*{EVENTS_SUFFIX}"):
            old.unlink()
        writer = self.files.EventFileWriter(str(folder), filename_suffix=EVENTS_SUFFIX)
        facts = {name: value for name, value in origin_of(run, tag).items() if value is not None}
        summary = self.hparams.hparams_pb(facts, trial_id=folder.name, start_time_secs=start_time(run))
        writer.add_event(self.event(wall_time=start_time(run), summary=summary))
        return writer

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def in_group(quantity: str) -> str:
    """Name of a quantity in tensorboard, which shows groups by the alphabet: the losses come first."""
    if "." in quantity:  # a place in a list: most lists have a number for each layer
        return f"per_layer/{quantity}"
    return f"loss/{quantity}" if quantity.endswith("_loss") else f"more/{quantity}"


def start_time(run: RunLog) -> float:
    """Time of the run's start by its log, in s since 1970; now, if the log does not say."""
    try:
        return datetime.strptime(run.started["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (KeyError, ValueError):
        return time.time()


class Tracker:
    """trackio or wandb, which have the same calls."""

    def __init__(self, kind: str, project: str):
        self.kind, self.project, self.open, self.points = kind, project, {}, NewPoints()
        self.library = import_optional(kind, kind)
        self.goal = f"project {project} of {kind}"

    def update(self, runs: Runs, tags: Mapping[str, str]) -> None:
        for name, run in runs.items():
            if name not in self.open:
                with contextlib.redirect_stdout(sys.__stdout__):  # trackio speaks in colours
                    self.open[name] = self.start(name, origin_of(run, tags.get(run.name, "")))
            for step, values in self.points.take(name, run):
                self.open[name].log(values, step=step)

    def start(self, name: str, facts: dict):
        if self.kind == "trackio":
            return self.start_trackio(name, facts)
        run_id = re.sub(r"[^\w.-]", "-", name)
        return self.library.init(
            project=self.project, name=name, id=run_id, resume="allow", config=facts, reinit="create_new"
        )

    def start_trackio(self, name: str, facts: dict):
        """Begin a run of trackio in place of one of that name.

        In a context of its own, because init() would finish the run of the current one.
        """
        with contextlib.suppress(ValueError):  # no such project yet
            for run in self.library.Api().runs(self.project):
                if run.name == name:
                    run.delete()
        logged = dict(auto_log_gpu=False, auto_log_cpu=False)  # they would be this machine's, not the run's
        given = dict(project=self.project, name=name, config=facts, embed=False, **logged)
        return contextvars.Context().run(lambda: self.library.init(**given))

    def close(self) -> None:
        for run in self.open.values():
            run.finish()


# ------------------------------------------------------------------------------------------------
# Which runs
# ------------------------------------------------------------------------------------------------


def follow(logs: Sequence[Path]) -> Iterator[list[RunLog]]:
    """Yield all runs, then, for ever, the runs of the logs that have changed since the last time."""
    follower = LogFollower(*logs)
    follower.poll()
    packed = [path for path in named_logs(logs) if path.suffix in OPENERS]
    yield [run for path in packed for run in read_log(path)] + runs_in(follower, list(follower.logs))
    while True:
        time.sleep(EVERY_S)
        yield runs_in(follower, follower.poll())


def runs_in(follower: LogFollower, paths: Sequence[Path]) -> list[RunLog]:
    """Runs of these logs; logs that are gone are left out."""
    return [run for path in paths if path in follower.logs for run in follower.logs[path].runs]


def make_exporter(options: Namespace) -> Tables | TensorBoard | Tracker:
    """Return what --to asks for."""
    if options.to == "csv":
        return Tables(options.out)
    if options.to == "tensorboard":
        return TensorBoard(options.out / "tensorboard")
    return Tracker(options.to, options.project)


def export_runs(options: Namespace) -> None:
    for path in options.logs:
        if path.suffix in (".toml", ".json"):
            raise ValueError(
                f"{path} is no log; wanted logs (logs/RUN_ID.txt) or folders of logs, such as logs"
            )
    if not options.follow and not named_logs(options.logs):
        raise ValueError(f"no logs in {', '.join(map(str, options.logs))}; wanted RUN_ID.txt, maybe packed")
    exporter = make_exporter(options)
    rounds = follow(options.logs) if options.follow else [read_runs(options.logs)]
    command_line.say(f"writing {exporter.goal}" + ("; Ctrl-C ends it" if options.follow else ""))
    try:
        for runs in rounds:
            if runs:
                exporter.update(name_runs(runs, options.logs), tags_beside(runs))
    except KeyboardInterrupt:
        pass
    finally:
        exporter.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.make_parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOGS", help="logs, or folders of logs")
    choices = ("csv", "tensorboard", "trackio", "wandb")
    parser.add_argument("--to", choices=choices, required=True, help="what to make")
    parser.add_argument("--out", type=Path, default=Path("export"), help="folder of what is made (export)")
    parser.add_argument("--project", default="ord", help="project of trackio or wandb (ord)")
    parser.add_argument("--follow", action="store_true", help="go on with running logs until Ctrl-C")
    return command_line.run(export_runs, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
