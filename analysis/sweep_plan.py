"""Plan of a sweep: the runs still to be made, and the fate of those started before."""

import math
import platform
import re
import signal
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from analysis.command_line import say
from analysis.manifest import LOGS, Manifest, Run, manifest_path, now, read_manifest
from analysis.processes import is_being_written, processes_of, stop_processes
from analysis.run_environment import given_settings
from analysis.run_log import RunLog, format_value, read_log
from analysis.sweep_files import Sweep, run_name
from analysis.trainers import read_trainer


def open_manifest(sweep: Sweep) -> Manifest:
    """Return the sweep's manifest, updated from the sweep file; a new one if there is none yet."""
    path = manifest_path(sweep.name)
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        manifest = Manifest(path, created=now())
    except ValueError as error:
        raise ValueError(f"{error}; move it away to begin the sweep anew") from None
    manifest.file, manifest.scale, manifest.control = sweep.file, sweep.scale, sweep.control
    manifest.versus = {arm.tag: arm.versus for arm in sweep.arms if arm.versus}
    return manifest


def plan_runs(sweep: Sweep, hang_minutes: float, act: bool) -> tuple[Manifest, dict[str, str]]:
    """Return the manifest with all runs of the sweep, and the run_id of each to be made, with the reason.

    With `act`, end what earlier launches left, and save the manifest; else only look.
    """
    manifest = open_manifest(sweep)
    for run in [*manifest.runs, *manifest.earlier]:
        settle(run, hang_minutes, act)
    why = plan(sweep, manifest)
    pairs = zip(sweep.runs(), manifest.runs, strict=True)
    sweep.notes += recorded_otherwise([(new, old) for new, old in pairs if old.run_id not in why])
    if act:
        manifest.save()
    return manifest, why


def plan(sweep: Sweep, manifest: Manifest) -> dict[str, str]:
    """Put the sweep's runs into the manifest; return the run_id of each to be made, with the reason.

    A finished run with the same training settings, seed and source is kept, whatever its scale.
    """
    old = [*manifest.earlier, *manifest.runs]
    done = {run.key: run for run in old if is_done(run)}
    attempts = {(run.tag, run.seed): run for run in old if run.state != "planned"}
    runs, todo = [], []
    for run in sweep.runs():
        kept, before = done.get(run.key), attempts.get((run.tag, run.seed))
        if kept:
            kept.tag = run.tag
            runs.append(kept)
            continue
        reason, unchanged = reason_to_run(run, before), before is not None and before.key == run.key
        if unchanged and before.state == "submitted":
            # its job may still start; it then goes on with this run, or is refused
            run.run_id, run.log, run.state = before.run_id, before.log, "submitted"
        elif unchanged and left_a_checkpoint(before):
            run.run_id, run.log = before.run_id, before.log
            reason += ", goes on from its checkpoint"
        runs.append(run)
        todo.append((run, reason))
    new = [run for run, _ in todo if not run.run_id]
    stamp = free_stamp(new)
    for run in new:
        run.run_id = run_name(run, stamp)
        run.log = str(LOGS / f"{run.run_id}.txt")
    current = {run.run_id for run in runs}
    manifest.earlier = [run for run in old if run.run_id not in current and run.state != "planned"]
    manifest.runs = runs
    return {run.run_id: reason for run, reason in todo}


def is_done(run: Run) -> bool:
    """Return whether a run need not be repeated. A crash may be the machine's fault; divergence is not."""
    return run.state == "running" or (run.state in ("finished", "diverged") and Path(run.log).exists())


def reason_to_run(run: Run, before: Run | None) -> str:
    """Return why a run must be made, given the last attempt with its arm and seed."""
    if before is None:
        return "new"
    if before.key != run.key:
        return f"{', '.join(what_changed(run, before))} changed"
    if before.state in ("finished", "diverged"):
        return "log is gone"
    return f"{before.state} before"


def what_changed(run: Run, before: Run) -> list[str]:
    """Return what makes this run another training: settings of the sweep file, source code."""
    trainer = read_trainer(run.script)
    was, wanted = (trainer.affecting("training", given.settings) for given in (before, run))
    changed = [name for name in run.settings | before.settings if was.get(name) != wanted.get(name)]
    if before.source_hash != run.source_hash:  # also if a setting is new, or has another default
        changed.append("source code")
    return changed or ["settings not in the file"]


def free_stamp(runs: Sequence[Run]) -> str:
    """Return the time, moved on to a second that is in no log's name: logs are never overwritten."""
    at = time.time()
    while True:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(at))
        if not any((LOGS / f"{run_name(run, stamp)}.txt").exists() for run in runs):
            return stamp
        at += 1


def left_a_checkpoint(run: Run) -> bool:
    """Return whether the trainer can resume this attempt where it stopped or crashed."""
    log = Path(run.log)
    ended_early = run.state in ("stopped", "crashed", "hung", "refused")
    return ended_early and log.exists() and any(log.with_suffix("").glob("step_*.pt"))


def recorded_otherwise(pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    """Return a line for each difference in recording settings; pairs are planned and finished runs."""
    logs: dict[str, list[str]] = {}
    for new, old in pairs:
        trainer = read_trainer(new.script)
        was, wanted = (trainer.affecting("recording", given_settings(run)) for run in (old, new))
        for name in wanted:
            if was[name] != wanted[name]:
                change = f"{name}={format_value(was[name])} (now {format_value(wanted[name])})"
                logs.setdefault(change, []).append(old.log)
    return [
        f"recorded with {change}, and not run again: {', '.join(paths)}; delete a log to run it again"
        for change, paths in logs.items()
    ]


# ------------------------------------------------------------------------------------------------
# How runs ended
# ------------------------------------------------------------------------------------------------


def settle(run: Run, hang_minutes: float, act: bool) -> None:
    """Determine the fate of a run that was started or submitted; one whose log is being written is running.

    With `act`, stop what is left of it and end its log; else only look.
    """
    here, log = run.host == platform.node(), Path(run.log)
    if run.state == "running" and here and processes_of([run.console]):
        if not act:
            return
        say(f"stopping {run.run_id}, left over from a launcher that was killed")
        stop_processes(lambda: processes_of([run.console]))
    if run.state != "planned" and is_being_written(log):  # it was resumed by hand, or runs elsewhere
        run.state = "running"
        note_source(run, read_log(log)[-1])
        return
    if run.state in ("planned", "finished"):
        return
    if not log.exists():
        if run.state == "running":
            run.state, run.reason = "stopped", "it wrote no log"
        return
    found, written = read_log(log)[-1], log.stat().st_mtime
    state, has_ended = found.state, run.state not in ("running", "submitted")
    if has_ended and (state == run.state or state not in ("finished", "diverged")):
        return  # else it was resumed by hand
    limit = hang_minutes * 60 if hang_minutes else math.inf  # 0: it never hangs
    if state == "running" and not here and time.time() - written < limit:
        run.state = "running"  # on another machine
        return
    run.state = state if state in ("finished", "diverged", "crashed") else "stopped"
    run.started = run.started or found.started.get("time")
    run.ended = datetime.fromtimestamp(written).astimezone().isoformat(timespec="seconds")
    run.reason = "" if run.state in ("finished", "diverged") else "its launcher was killed"
    note_source(run, found)
    if act:
        end_log(run)


def note_source(run: Run, log: RunLog | None) -> None:
    """Take a run's source from its log, because the trainer may have changed after the plan."""
    if log:
        run.source_hash = log.started.get("source_hash", run.source_hash)


def end_log(run: Run) -> None:
    """Record in a run's log how it ended, if the trainer could not, so that no reader waits for more."""
    path = Path(run.log)
    event = "crashed" if run.state == "hung" else run.state
    if event not in ("crashed", "diverged", "stopped") or not path.exists():
        return
    log = read_log(path)[-1]
    if log.config and log.state == "running":
        line = f"event:{event} reason:{run.reason}\n"
        if not path.read_bytes().endswith(b"\n"):  # the last line was cut short
            line = "\n" + line
        with path.open("a", encoding="utf-8") as file:
            file.write(line)


def sizes(run: Run) -> list[int]:
    """Return the sizes of a run's log and console, 0 if absent. See `how_it_ended`."""
    return [path.stat().st_size if path.exists() else 0 for path in (Path(run.log), run.console)]


def how_it_ended(run: Run, log: RunLog | None, before: Sequence[int]) -> tuple[str, str]:
    """Return state and reason, preferably from the log: torchrun turns every nonzero exit code into 1.

    `before`: `sizes` before this attempt; what the files held then is an earlier attempt's.
    """
    if log and log.state == "finished":
        return "finished", ""
    logged, console = map(text_after, (Path(run.log), run.console), before)
    if not re.search("^event:(started|resumed) ", logged, re.M):
        log = None
    if run.exit_code == 3 or (log and log.state == "diverged"):
        return "diverged", "the loss is not a number, or above DIVERGED_ABOVE"
    lines = console.strip().splitlines()
    refusal = [] if log else [line for line in lines if line.startswith(f"{Path(run.script).name}: ")]
    last_words = (refusal or lines or [""])[-1]
    if refusal or (not log and run.exit_code == 2):  # torchrun turns 2 into 1
        return "refused", last_words[:1000]  # its end says what to do
    if run.exit_code is not None and run.exit_code < 0:
        return "crashed", f"killed by signal {-run.exit_code} ({signal.strsignal(-run.exit_code)})"
    if log and log.state == "crashed":  # not one that it resumed after
        last_words = log.event("crashed").fields.get("error", "")
    return "crashed", f"exit code {run.exit_code}: {last_words[:300]}"


def text_after(path: Path, offset: int) -> str:
    """Return what a file has from `offset` on; nothing if it cannot be read."""
    try:
        return path.read_bytes()[offset:].decode(errors="replace")
    except OSError:
        return ""
