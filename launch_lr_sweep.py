"""Run a sweep: arms x seeds, one training run each, resumable, several at a time.

    python launch_lr_sweep.py sweeps/spectral_lr.toml --dry-run      # the plan
    python launch_lr_sweep.py sweeps/spectral_lr.toml                # on GPUs, each run on all of them
    python launch_lr_sweep.py sweeps/spectral_lr.toml --parallel 4   # 4 runs at a time, GPUs shared out
    python launch_lr_sweep.py sweeps/smoke.toml --scale tiny         # as its [scale.tiny] has it
    python launch_lr_sweep.py sweeps/spectral_lr.toml --slurm        # write a SLURM job array instead

A sweep file names a trainer, seeds and what varies:

    script = "train_gpt_muon_ord.py"      # relative to where you are, else beside this file
    seeds = [1, 2, 3]
    control = "a_0-muon_lr_0.023"         # optional: the arm (tag, then grid values) to compare others with
    [env]                                 # settings common to all arms in which they do anything
    NUM_SCHEDULED_ITERATIONS = 1560
    [grid]                                # optional: all combinations, times the arms
    MUON_LR = [0.021, 0.023]
    [[arms]]                              # optional: tag, and any settings; also its own script or seeds
    tag = "a_0"
    SPECTRAL_LR_MUL = 0
    [[arms]]
    tag = "a_1"
    SPECTRAL_LR_MUL = 1
    versus = "a_0"                        # optional: its own control (in a grid, that of the same values)
    [scale.tiny]                          # what --scale tiny puts in place of [env] and seeds
    NUM_SCHEDULED_ITERATIONS = 300
    seeds = [1, 2]                        # for all arms
    arms = ["a_0"]                        # only these; or [[scale.tiny.arms]], others instead
    [scale.tiny.grid]
    MUON_LR = [0.023]

The trainer itself checks the settings of every arm before anything runs. Settings come from the
file, never from the environment, except those that say where to run (DATA_PATH, DEVICE and the like).
Seeds are interleaved across arms. `logs/SWEEP.sweep.json`, the manifest, says what is planned and done;
`logs/RUN_ID.out` has a run's console output. `monitor_runs.py SWEEP.toml` shows the runs under way. A
run whose loss exceeds DIVERGED_ABOVE ends as diverged. Launching again runs only what is missing: a run
counts as done if it finished or diverged with the same seed, source code and settings. Settings that change
only what is recorded do not count, but are named. A run that the trainer refuses to begin is the last one
that is started. Ctrl-C stops all runs. Exit code: 0 all runs finished, 1 some did not, 2 refused, 128 + n
after signal n.
"""

import argparse
import contextlib
import fcntl
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis.command_line import complain, make_parser, say
from analysis.files import write_atomically
from analysis.manifest import LOGS, Manifest, Run, now
from analysis.processes import adopt_orphans, processes_of, reap_orphans, start_process, stop_processes
from analysis.run_environment import (
    LAUNCHER_DEFAULTS,
    Slot,
    command_of,
    environment_of,
    settings_of,
    share_out,
)
from analysis.run_log import RunLog, format_value, read_log
from analysis.shown import console
from analysis.style import format_time
from analysis.sweep_files import Sweep, read_sweep
from analysis.sweep_plan import end_log, how_it_ended, note_source, plan_runs, sizes
from analysis.trainers import TORCHRUN_SETS, env_text, read_trainer

POLL_S = 0.2  # seconds between checks; too often to parse the logs each time
SLURM_SAVE_EVERY = "100"  # steps between checkpoints, for runs that may be preempted
CORES_PER_GPU = 4  # asked of SLURM: for the rank, its threads and the compiler's workers


# ------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A running job; its log may not exist yet."""

    run: Run
    process: subprocess.Popen
    slot: Slot
    before: list[int]  # sizes of the log and the console before it

    def __post_init__(self):
        self.log_size = self.before[0]
        self.begin = self.last_growth = time.monotonic()

    def note_growth(self) -> None:
        """Note the time if the log has grown since the last look, without reading it: see POLL_S."""
        with contextlib.suppress(OSError):  # it does not exist yet
            size = os.stat(self.run.log).st_size
            if size != self.log_size:
                self.log_size, self.last_growth = size, time.monotonic()

    def read_log(self) -> RunLog | None:
        """Read the log; None if there is none, or it cannot be read."""
        try:
            return read_log(self.run.log)[-1]
        except OSError:
            return None

    def roots(self) -> list[int]:
        """Return the process that was started for the run, while it lives."""
        return [self.process.pid] if self.process.poll() is None else []

    def find(self) -> set[int]:
        """Return all living processes of the run."""
        return processes_of([self.run.console], self.roots())


class Launcher:
    """Starts runs as slots become free, watches them, records how they end."""

    def __init__(
        self,
        manifest: Manifest,
        todo: Iterable[Run],
        slots: Sequence[Slot],
        nproc: int,
        hang_s: float,
    ):
        self.manifest, self.nproc, self.hang_s = manifest, nproc, hang_s
        self.todo, self.free = list(todo), list(slots)
        self.num_todo, self.num_slots = len(self.todo), len(slots)
        self.jobs: list[Job] = []
        self.seconds: list[float] = []  # of the runs made here from beginning to end
        self.signal = 0

    def run_all(self) -> None:
        """Make all runs; end early on a signal."""
        try:
            while (self.todo or self.jobs) and not self.signal:
                while self.todo and self.free and not self.signal:
                    self.start(self.todo.pop(0))
                for job in list(self.jobs):
                    self.look_after(job)
                time.sleep(POLL_S)
        finally:  # also after an error of our own, nothing is left behind
            self.stop_all()

    def start(self, run: Run) -> None:
        """Start a run on a free slot."""
        slot, before = self.free.pop(0), sizes(run)
        run.state, run.started, run.host = "running", now(), platform.node()
        try:
            self.save()  # before it starts: a launcher killed here is known to have wanted it
            command = command_of(read_trainer(run.script).path, self.nproc)
            process = start_process(command, environment_of(run, slot), run.console, slot.cores)
        except (OSError, subprocess.SubprocessError) as error:
            run.state, run.ended, run.reason = "crashed", now(), f"it could not be started: {error}"
            self.free.append(slot)
            self.save()
            self.say_end(run, math.nan, 0.0)
            return
        self.jobs.append(Job(run, process, slot, before))
        self.say_start(self.jobs[-1])

    def look_after(self, job: Job) -> None:
        """Act if a run has ended or hangs."""
        job.note_growth()
        if job.process.poll() is not None:
            self.finish(job)
        elif self.hang_s and time.monotonic() - job.last_growth > self.hang_s:
            self.finish(job, "hung", f"no new log line for {self.hang_s / 60:g} minutes")

    def finish(self, job: Job, state: str = "", reason: str = "") -> None:
        """Stop what is left of a run, see how it ended unless the caller knows, and record that."""
        run = job.run
        left = job.find()
        if left and not stop_processes(job.find):
            say(f"{run.run_id}: process {min(left)} cannot be killed")
        run.exit_code, run.ended = job.process.poll(), now()
        reap_orphans()
        log = job.read_log()
        if not state or (log and log.state == "finished"):
            state, reason = how_it_ended(run, log, job.before)
        run.state, run.reason = state, reason
        note_source(run, log)
        self.jobs.remove(job)
        self.free.append(job.slot)
        try:
            end_log(run)
        except OSError as error:
            say(f"{run.log}: {error}")
        self.save()
        seconds = time.monotonic() - job.begin
        if state == "finished" and not job.before[0]:  # one that was resumed took only part of its time
            self.seconds.append(seconds)
        self.say_end(run, log.final_val_loss if log else math.nan, seconds)
        if state == "refused" and self.todo:  # the others would be refused, too
            say(f"{len(self.todo)} run(s) not started: the trainer refused this one")
            self.todo.clear()

    def stop_all(self) -> None:
        """Stop every run that is still running, and every orphan that nothing ties to a run."""
        name = signal.Signals(self.signal).name if self.signal else "an error of the launcher"
        if self.jobs:
            say(f"stopping {len(self.jobs)} run(s)")
            jobs, consoles = list(self.jobs), [job.run.console for job in self.jobs]
            # all at once, so that the time of grace passes once
            stop_processes(lambda: processes_of(consoles, [pid for job in jobs for pid in job.roots()]))
            for job in jobs:
                self.finish(job, "stopped", f"stopped by {name}")
        stop_processes(lambda: processes_of(set(), [os.getpid()]))

    def save(self) -> None:
        """Write the manifest; a full disk is only a warning."""
        try:
            self.manifest.save()
        except OSError as error:  # the logs say how runs ended, and the next launch reads them
            say(f"warning: {self.manifest.path} could not be written: {error}")

    def say_start(self, job: Job) -> None:
        """Print that a run has started, and where."""
        where = f" on GPU {','.join(job.slot.gpus)}" if job.slot.gpus else ""
        number, run = self.num_todo - len(self.todo), job.run
        say(f"[{number}/{self.num_todo}] {run.tag} seed {run.seed}{where} -> {run.log}")

    def say_end(self, run: Run, loss: float, seconds: float) -> None:
        """Print how a run ended, how many have ended, and the time left."""
        text = f"    {run.tag} seed {run.seed}: {run.state} after {format_time(1000 * seconds)}"
        if math.isfinite(loss):
            text += f", validation loss {loss:.4f}"
        text += f"; {self.num_todo - len(self.todo) - len(self.jobs)} of {self.num_todo} ended"
        left = self.seconds_left()
        if left > 0 and not self.signal:
            text += f", about {format_time(1000 * left)} left"
        say(f"{text} - {run.reason}" if run.reason else text)

    def seconds_left(self) -> float:
        """Estimate the rest from the runs that this launch made from start to end; NaN without any."""
        if not self.seconds:
            return math.nan
        running = sum(min(time.monotonic() - job.begin, max(self.seconds)) for job in self.jobs)
        mean = sum(self.seconds) / len(self.seconds)
        return max(0.0, mean * (len(self.todo) + len(self.jobs)) - running) / self.num_slots


# ------------------------------------------------------------------------------------------------
# What the user sees
# ------------------------------------------------------------------------------------------------


def print_plan(sweep: Sweep, manifest: Manifest, why: dict[str, str], slots: list[Slot], nproc: int) -> None:
    """Print arms with their settings, what runs and what is done. `why`: runs to make -> the reason."""
    runs = manifest.runs
    scale = f", scale {sweep.scale}" if sweep.scale else ""
    say(f"{sweep.name} ({sweep.file}{scale}): {len(sweep.arms)} arms, {len(runs)} runs, {len(why)} to run")
    common = common_settings(sweep)
    width = max(len(arm.tag) for arm in sweep.arms)
    for arm in sweep.arms:
        parts = [f"  {arm.tag:<{width}}", f"{arm.script} seeds {','.join(map(str, arm.seeds))}"]
        done = [r for r in runs if r.tag == arm.tag and r.run_id not in why and r.state != "running"]
        if done:
            parts.append(f"({len(done)} done)")
        if arm.tag == sweep.control:
            parts.append("control")
        if arm.versus:
            parts.append(f"versus {arm.versus}")
        parts += [f"{name}={format_value(v)}" for name, v in arm.settings.items() if name not in common]
        say("  ".join(parts))
    if common:
        say("common: " + " ".join(f"{name}={value}" for name, value in common.items()))
    for note in sweep.notes:
        say(note)
    again = [reason for reason in why.values() if reason != "new"]
    if again:
        say("again: " + ", ".join(f"{again.count(r)} ({r})" for r in dict.fromkeys(again)))
    last = {(run.tag, run.seed): run.state for run in manifest.earlier}
    replaced = [run for run in runs if run.run_id in why and last.get((run.tag, run.seed)) == "finished"]
    if replaced:
        say(f"{len(replaced)} of these had finished: from the launch on, reports leave those out")
    elsewhere = [run.run_id for run in runs if run.state == "running" and run.run_id not in why]
    if elsewhere:
        say(f"running already, not started again: {', '.join(elsewhere)}")
    if why and slots:
        where = f"{nproc} GPU(s) each" if slots[0].gpus else f"{nproc} rank(s) each on CPU"
        say(f"{len(slots)} at a time, {where}")
    if why:
        say(f"the first: {next(iter(why))}")


def common_settings(sweep: Sweep) -> dict[str, str]:
    """Return the settings that have one value in all arms, at least two, whose script has them."""
    common = {}
    for name in dict.fromkeys(name for arm in sweep.arms for name in arm.settings):
        scripts = {arm.script for arm in sweep.arms if name in arm.settings}
        arms = [arm for arm in sweep.arms if arm.script in scripts]
        values = {format_value(arm.settings[name]) if name in arm.settings else None for arm in arms}
        if len(arms) > 1 and len(values) == 1:
            common[name] = values.pop()
    return common


def say_result(manifest: Manifest, signal_number: int) -> int:
    """Say how all runs of the sweep stand; return the exit code."""
    states = [run.state for run in manifest.runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    say(f"{manifest.sweep}: {counts}")
    for run in manifest.runs:
        if run.state not in ("finished", "planned", "submitted", "running"):
            say(f"  {run.state}: {run.tag} seed {run.seed} - {run.reason} ({run.console})")
    if any(state not in ("finished", "diverged") for state in states):
        say("launch again to run what is missing")
    ended = [run for run in manifest.runs if run.state in ("finished", "diverged")]
    for script in dict.fromkeys(run.script for run in ended):
        if len({run.source_hash for run in ended if run.script == script}) > 1:
            say(f"{script} changed during the sweep: launch again to repeat the runs of other source code")
    if signal_number:
        return 128 + signal_number
    if "refused" in states:
        return 2
    return int(states.count("finished") < len(states))


# ------------------------------------------------------------------------------------------------
# SLURM
# ------------------------------------------------------------------------------------------------


def slurm_options(sweep: Sweep, num_runs: int, nproc: int, parallel: int) -> list[str]:
    """Return what a job array asks of SLURM: GPUs, unless all runs are for a CPU; to be requeued."""
    on_cpu = all(is_for_cpu(arm.settings) for arm in sweep.arms)
    at_once = f"%{parallel}" if parallel > 1 else ""
    options = [
        f"job-name={sweep.name}",
        f"array=0-{num_runs - 1}{at_once}",
        "nodes=1",
        "ntasks=1",
        f"cpus-per-task={nproc if on_cpu else CORES_PER_GPU * nproc}",
        *([] if on_cpu else [f"gpus-per-node={nproc}"]),
        "time=24:00:00",
        "signal=B:TERM@120",  # s before its time is up: a run then saves, and resumes when requeued
        "requeue",
        "open-mode=append",
        f"output={LOGS}/{sweep.name}.slurm-%a.out",
    ]
    return [f"#SBATCH --{option}" for option in options]


def is_for_cpu(settings: dict) -> bool:
    """Return whether a run is to be on a CPU, or may be and has a model that a CPU trains in minutes."""
    device, model = settings.get("DEVICE", "auto"), str(settings.get("MODEL", ""))
    return device == "cpu" or (device == "auto" and "tiny" in model)


def write_slurm(sweep: Sweep, runs: list[Run], nproc: int, parallel: int) -> Path:
    """Write a job array, one task a run, that needs no launcher: the manifest already says what each is.

    A run that is preempted goes on, requeued, from its last checkpoint.
    """
    foreign = {*TORCHRUN_SETS}.union(*(read_trainer(run.script).settings for run in runs))
    lines = [
        "#!/bin/bash",
        f"# {len(runs)} runs of {sweep.file}, written by launch_lr_sweep.py --slurm. Submit it from the same",
        f"# folder: sbatch [--partition=...] [--time=...] {LOGS}/{sweep.name}.slurm.sh",
        *slurm_options(sweep, len(runs), nproc, parallel),
        'cd "${SLURM_SUBMIT_DIR:-.}" || exit 1',
        "unset " + " ".join(sorted(foreign)) + "  # sbatch passes on the environment that it is called in",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for number, run in enumerate(runs):
        values = settings_of(run)
        if "SAVE_EVERY" in read_trainer(run.script).settings and values.get("SAVE_EVERY", "0") == "0":
            values["SAVE_EVERY"] = SLURM_SAVE_EVERY
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
        command = shlex.join(command_of(read_trainer(run.script).path, nproc))
        lines.append(f"{number}) export {settings}")
        lines.append(f"    exec {command} >> {shlex.quote(str(run.console))} 2>&1 ;;")
    lines += ['*) echo "no run number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac", ""]
    path = LOGS / f"{sweep.name}.slurm.sh"
    write_atomically(path, "\n".join(lines))
    return path


def submit(sweep: Sweep, manifest: Manifest, todo: list[Run], nproc: int, parallel: int) -> int:
    """Mark the runs as submitted and write their job array; return the exit code."""
    if not todo:
        return say_result(manifest, 0)
    for run in todo:
        run.state = "submitted"
    manifest.save()
    path = write_slurm(sweep, todo, nproc, parallel)
    say(f"wrote {path}; submit it with: sbatch {path}")
    return 0


# ------------------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("sweep", metavar="SWEEP.toml")
    parser.add_argument("--scale", metavar="NAME", help="apply the file's [scale.NAME]")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.add_argument(
        "--nproc-per-run",
        type=int,
        default=0,
        metavar="K",
        help="ranks of a run (default: its share of the GPUs; on CPU 1)",
    )
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="M", help="runs at a time, on GPUs or cores of their own"
    )
    parser.add_argument(
        "--hang-minutes",
        type=float,
        default=30,
        metavar="X",
        help="stop a run that logs nothing for so long (default 30; 0: never)",
    )
    parser.add_argument("--slurm", action="store_true", help="write a SLURM job array instead of running")
    args = parser.parse_args(argv)
    for name, low in (("nproc_per_run", 0), ("parallel", 1), ("hang_minutes", 0)):
        if not low <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted {low} or more")
    return args


@contextlib.contextmanager
def locked(sweep: Sweep) -> Iterator[None]:
    """Hold the sweep for this process; the system frees it, however we end."""
    LOGS.mkdir(exist_ok=True)
    with (LOGS / f".{sweep.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another launcher is running the sweep {sweep.name} in {LOGS.resolve()}; "
                "wait for it or stop it"
            ) from None
        yield


@contextlib.contextmanager
def signals_to(launcher: Launcher) -> Iterator[None]:
    """Have the launcher stop its runs when this process is told to end."""

    def on_signal(number, frame):
        launcher.signal = number

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup asks us to ignore one
            before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check(args: argparse.Namespace) -> tuple[Sweep, list[Slot], int, list[str]]:
    """Return the sweep, the devices of its runs, ranks per run, and what is missing here: data or devices.

    ValueError if the sweep file is wrong.
    """
    given = {name: env_text(value) for name, value in LAUNCHER_DEFAULTS.items()}
    given["NPROC_PER_NODE"] = str(args.nproc_per_run)
    sweep = read_sweep(args.sweep, args.scale, given, elsewhere=args.slurm)
    if args.slurm:  # a cluster's machines are others
        return sweep, [], args.nproc_per_run or 1, []
    missing = [f"arm {arm.tag!r}: {arm.lacks}" for arm in sweep.arms if arm.lacks][:1]
    gpus = [read_trainer(arm.script).gpus for arm in sweep.arms if arm.settings.get("DEVICE") != "cpu"]
    try:
        slots, nproc = share_out(args.parallel, args.nproc_per_run, gpus[0] if gpus else ())
    except ValueError as error:
        return sweep, [], args.nproc_per_run or 1, [str(error), *missing]
    return sweep, slots, nproc, missing


def main(argv: list[str]) -> int:
    """Plan, then run; return the exit code."""
    args = parse_args(argv)
    with console(), contextlib.ExitStack() as held:
        try:
            sweep, slots, nproc, missing = check(args)
            if not args.dry_run:
                if missing:
                    raise ValueError(missing[0])
                held.enter_context(locked(sweep))
            manifest, why = plan_runs(sweep, args.hang_minutes, act=not args.dry_run)
        except (ValueError, OSError) as error:
            return complain(error)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        print_plan(sweep, manifest, why, slots, nproc)
        if args.dry_run:
            for text in missing:
                say(f"before it can run: {text}")
            return 0
        todo = [run for run in manifest.runs if run.run_id in why]
        if args.slurm:
            return submit(sweep, manifest, todo, nproc, args.parallel)
        launcher = Launcher(manifest, todo, slots, nproc, args.hang_minutes * 60)
        with signals_to(launcher):
            adopt_orphans()
            launcher.run_all()
        return say_result(manifest, launcher.signal)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
