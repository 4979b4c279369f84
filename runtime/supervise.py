"""Start a run, end it cleanly, and log why it ended: signals, hangs, dead ranks, exit codes.

A trainer is a module that offers:
    SCRIPT                               its path
    SETTINGS                             the dataclasses of its settings
    PRESETS                              {name: (model config, {setting: default that the preset changes})};
                                         the first is MODEL=auto on a GPU
    ORD_DEFAULTS                         if it has one: {ORD_MODE: {setting: default that the mode changes}}
    VAL_SLICES                           if it has one: slices of a validation batch (16 tokens at least)
    read_settings(env)                   -> (settings, optimizer settings, model config); raises SettingsError
    open_data(settings, world_size)      -> (training shards, validation shards); raises ValueError
    count_slices(settings, world_size)   -> slices of a global batch
    ModelConfig                          the model config's dataclass
    Schedule(settings, model config)     with .num_steps
    Run(start, stop)                     with .session, rehearse(), which compiles what the run will need, and
                                         train() -> the step that it reached
"""

import contextlib
import dataclasses
import gc
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from kernels import attention, fast_forms
from runtime import checking, checkpoints
from runtime.compiling import CACHE_HELP, choose_allocator, graphs_compiled
from runtime.log_writer import LogWriter, beginnings, last_event, provenance, show, source_hash
from runtime.ranks import Ranks, check_launch, refuse_together
from runtime.session import Diverged
from runtime.settings import SettingsError, help_text, not_training, settings_json


class StopRequest:
    """Request to stop the run: `reason` is empty until there is one.

    The first SIGTERM, SIGINT or SIGHUP is a request, on which the ranks then agree. Others within TOGETHER_S
    belong to it (for one Ctrl-C, a terminal's and torchrun's). A later one ends the process at once.
    """

    TOGETHER_S = 5.0

    def __init__(self):
        self.reason, self.since = "", 0.0

    def listen(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.reason = self.reason or signal.Signals(number).name  # Watch may have given one
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Watch(threading.Thread):
    """Ends this process, with a line in the log, when the run cannot go on.

    That is: no sign of progress for DIST_TIMEOUT (a collective hangs), or a rank on this host is gone and the
    main thread does not notice (NCCL waits for ever). A thread, because the main one is inside C code then.
    Without its launcher a rank stops.
    """

    POLL_S, GRACE_S = 0.5, 15.0  # torchrun kills after 30 s

    def __init__(self, ranks: Ranks, timeout_s: float, stop: StopRequest, on_crash):
        super().__init__(daemon=True)
        self.ranks, self.timeout_s, self.stop_request, self.on_crash = ranks, timeout_s, stop, on_crash
        everybody = enumerate(ranks.all_gather_object((host(), os.getpid())))
        self.pids = {rank: pid for rank, (where, pid) in everybody if where == host()}
        self.over = threading.Event()
        ranks.beat()
        ranks.watched.set()

    def missing(self) -> dict[int, str]:
        """Ranks of this host that are dead or stopped, each with a description."""
        states = {rank: process_state(pid) for rank, pid in self.pids.items() if rank != self.ranks.rank}
        return {
            rank: f"rank {rank} (process {self.pids[rank]}) is {state}"
            for rank, state in states.items()
            if state != "alive"
        }

    def speaks_for_all(self, missing: dict) -> bool:
        """Return whether this is the first rank left beside the log, which reports for the others."""
        return 0 in self.pids and all(rank in missing for rank in self.pids if rank < self.ranks.rank)

    def run(self):
        complete_at = polled = time.monotonic()  # complete_at: when last no rank was gone
        while not self.over.wait(self.POLL_S):
            now, missing = time.monotonic(), self.missing()
            was_asleep = now - polled > 10 * self.POLL_S  # SIGSTOP, or a suspended machine
            if was_asleep:
                self.ranks.last_beat += now - polled
            polled = now
            if self.ranks.is_orphan() and not self.stop_request.reason:
                self.stop_request.reason = "its launcher is gone"
            gone = [text for text in missing.values() if text.endswith("gone")]
            if was_asleep or not gone:
                complete_at = now
            silent_s = now - self.ranks.last_beat
            if silent_s > self.timeout_s:
                self.on_crash(missing, self.why_silent(silent_s, missing))
            elif min(now - complete_at, silent_s) > self.GRACE_S:
                self.on_crash(missing, ", ".join(gone))

    def why_silent(self, silent_s: float, missing: dict[int, str]) -> str:
        elsewhere = self.ranks.world_size - len(self.pids)
        if missing:
            why = ", ".join(missing.values())
        elif elsewhere:
            why = f"{elsewhere} on other hosts may not answer"
        else:
            why = "all ranks are alive"
        return f"no progress for {silent_s:.0f} s (DIST_TIMEOUT={self.timeout_s:g}): {why}"


def host() -> str:
    """Identify this host by node name, PID and network namespaces: two containers may bear one name."""
    with contextlib.suppress(OSError):
        namespaces = (os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self/ns/net"))
        return " ".join((platform.node(), *namespaces))
    return platform.node()


def process_state(pid: int) -> str:
    """State of a process: "alive", "stopped" (by SIGSTOP) or "gone"."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:
        return "gone"
    except OSError:  # no /proc on this system: alive is all that can be said
        return "alive"
    state = stat.rpartition(")")[2].split()[0]  # follows the name, which may hold anything
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "alive")


# ---------------------------------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """All that is known before the first step."""

    script: Path
    s: object  # the trainer's settings
    o: object  # the optimizer's
    model_config: object
    config: dict  # all that decides the numbers of the run, as logs and checkpoints hold it
    train_shards: list
    val_shards: list
    ranks: Ranks
    origin: checkpoints.Origin
    log: LogWriter | None  # None if the run is over already
    notes: tuple[str, ...] = ()  # remarks on the data, for the log


def prepare(module, env) -> Start:
    """Refuse everything that can be refused, on all ranks together, before the first step."""
    choose_allocator()
    try:
        s, o, model_config, notes = checking.read_run(module, env)
    except SettingsError as error:
        refuse_together(error)
    run_id = env.get("RUN_ID", "")
    config = checking.describe_settings(s, o, model_config)
    ranks = Ranks(s.device, s.dist_timeout, {**config, "run_id": run_id})
    train_shards, val_shards = ranks.run_on_all(lambda: module.open_data(s, ranks.world_size))
    config = checking.describe_run(module, s, o, model_config, train_shards, val_shards, ranks.world_size)
    origin = ranks.run_on_all(
        lambda: checkpoints.find_origin(module, s, config, run_id) if ranks.rank == 0 else None
    )
    shared = None  # what the other ranks get: without the tensors, which rank 0 hands out
    if ranks.rank == 0:
        shared = origin._replace(contents=None)
    shared = ranks.broadcast_object(shared)
    if ranks.rank != 0:
        origin = shared
    s = dataclasses.replace(s, run_id=origin.run_id)
    config["run_id"] = s.run_id
    log = None
    if origin.exit_code is None:
        num_steps = module.Schedule(s, model_config).num_steps
        log = ranks.run_on_all(lambda: LogWriter(s.log, ranks.rank, num_steps, origin.resumed))
    return Start(
        module.SCRIPT, s, o, model_config, config, train_shards, val_shards, ranks, origin, log, notes
    )


def write_beginning(module, start: Start):
    """Write the log's header, its line about going on, or both."""
    log, origin, config = start.log, start.origin, start.config
    started = {
        **provenance(start.script, start.ranks),
        **{k: config[k] for k in ("train_data", "val_data")},
    }
    begun = beginnings(log.path)
    step, hashed = 0, started["source_hash"]
    if origin.has_checkpoint:
        step, hashed = origin.contents["step"], origin.contents["source_hash"]
    elif begun:
        hashed = begun[-1]["source_hash"]
    resumed = None
    if origin.resumed:
        checkpoints.set_aside(origin, start.s.folder)
        resumed = {"step": step, "path": origin.path, **started}
    if log.existed:
        log.event("resumed", **resumed)
    else:
        affects = not_training(module.SETTINGS)
        log.header(config, affects, {"run_id": start.s.run_id, **started}, resumed)
    for _, text in origin.damaged:
        log.warn(f"{text}; falling back to the one before it", "checkpoint_damaged", error=json.dumps(text))
    if hashed != started["source_hash"]:
        what = "checkpoint" if origin.has_checkpoint else "run so far"
        log.warn(f"the code is not that of the {what} (source_hash {hashed})")
    if origin.resumed:
        log.say(f"going on from step {step} ({origin.path})")


# ---------------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------------


def main(module, argv: list[str], env=os.environ) -> int:
    """Exit code: 0 trained or stopped, 1 crashed or could not write, 2 refused, 3 diverged."""
    name = module.SCRIPT.name
    if "--help" in argv or "-h" in argv:
        show(help_text(module.__doc__, module.SETTINGS, module.PRESETS, CACHE_HELP))
        return 0
    if "--settings-json" in argv:
        described = module.PRESETS, getattr(module, "ORD_DEFAULTS", {}), source_hash(module.SCRIPT)
        print(settings_json(name, module.SETTINGS, *described, torch.cuda.device_count()))
        return 0
    try:
        if argv in (["--check-settings"], ["--check-arms"]):
            check_launch(name, starts_ranks=True)
            choose_allocator()
            check = checking.check_arms if "--check-arms" in argv else checking.check_settings
            return check(module, env)
        if argv:
            raise SettingsError(f"arguments {argv}: settings are environment variables instead, see --help")
        check_launch(name)
        start = prepare(module, env)
    except ValueError as error:
        return exit_refused(name, error)
    if start.log is None:
        if start.ranks.rank == 0:
            show(f"{name}: {start.s.log} is of a run that is over; nothing to do")
        start.ranks.close()
        return start.origin.exit_code
    return Supervisor(module, start).run()


def leave(code: int):
    """End the process now: threads of torch that outlive the run can abort the interpreter's own way out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a full disk
            stream.flush()
    os._exit(code)


def exit_refused(name: str, error: ValueError) -> int:
    is_launched = os.environ.get("RANK") and os.environ.get("LOCAL_RANK")
    if not is_launched or os.environ["LOCAL_RANK"] == "0":  # once on each machine
        show(f"{name}: {error}", file=sys.stderr)
    Ranks.close()
    return 2


class Supervisor:
    """Trains and, whatever happens, leaves a last line in the log."""

    def __init__(self, module, start: Start):
        self.module, self.start, self.log, self.ranks = module, start, start.log, start.ranks
        self.stop = StopRequest()
        self.watch = Watch(self.ranks, start.s.dist_timeout, self.stop, self.give_up)
        self.stop.listen()
        self.watch.start()

    def run(self) -> int:
        """Exit code."""
        try:
            code = self.train()
        except checkpoints.CheckpointError as error:  # these parameters cannot take it: all ranks found out
            self.watch.over.set()
            self.log.end("crashed", error=json.dumps(str(error)))
            self.log.close()
            return exit_refused(self.module.SCRIPT.name, error)
        except Diverged as error:
            self.log.end("diverged", step=error.step, **{error.name: f"{error.value:g}"})
            self.log.say(f"diverged: {error}")
            code = 3
        except BaseException as error:
            self.on_error(error)
            raise
        finally:
            self.watch.over.set()
            self.ranks.close()
        lost_lines = self.log.close()
        return lost_lines or code

    def train(self) -> int:
        """Exit code."""
        s, log, start = self.start.s, self.log, self.start
        if s.kernels == "triton":
            fast_forms.cuda_forms()  # imports its source, which the log is to hold
        if self.ranks.rank == 0:
            write_beginning(self.module, start)
        attention_name, warnings = attention.activate(s.attn_backend)
        with fast_forms.installed(self.module, s, start.o) as (names, stepped_aside):
            log.event("kernels", attn=attention_name, fast_forms=",".join(names) or "none")
            for text in [*start.notes, *warnings, *stepped_aside]:
                log.warn(text)
            log.say(
                f"{start.script.name}: {s.model} on {self.ranks.world_size} rank(s) of "
                f"{self.ranks.device.type}, log {log.path}"
            )
            if s.compile == "1" or s.device == "cuda":
                self.rehearse()
            run = self.module.Run(start, self.stop)
            if start.origin.has_checkpoint:
                run.session.resume(start.origin.contents)
            with short_collections():
                step = run.train()
            self.watch.over.set()
            return run.session.end(step)

    def rehearse(self):
        """Compile what the run will need, and log how long that took."""
        self.log.say("rehearsing every stage (compiles; not counted as training time)")
        began, before = time.monotonic(), graphs_compiled()
        self.module.Run(self.start, self.stop).rehearse()
        gc.collect()  # frees that run, whose parts refer to each other, before the real one is built
        if self.start.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        seconds, graphs = time.monotonic() - began, graphs_compiled() - before
        self.log.event("rehearsed", seconds=f"{seconds:.1f}", graphs=graphs)
        self.log.say(f"rehearsed in {seconds:.0f} s: {graphs} graphs compiled, or read from the cache")

    def on_error(self, error: BaseException):
        """Say in the log what happened, from the rank whose error it is."""
        self.watch.over.set()
        missing = {}
        if isinstance(error, RuntimeError) and self.ranks.world_size > 1:
            time.sleep(1)  # a rank that was killed needs a moment to be gone
            missing = self.watch.missing()
        reason = ", ".join([*missing.values(), f"{type(error).__name__}: {error}"])
        self.note_crash(missing, reason, "unknown" if is_cut_off(error) else self.ranks.rank)
        self.log.close()
        if self.ranks.device.type == "cuda" and self.ranks.world_size > 1:
            traceback.print_exc()  # closing the group would wait for collectives that the others never join
            sys.stderr.flush()
            os._exit(1)

    def give_up(self, missing: dict[int, str], reason: str):
        """End the process from Watch's thread: the main thread hangs inside a collective."""
        self.note_crash(missing, reason, "unknown")
        show(f"rank {self.ranks.rank} gives up: {reason}", file=sys.stderr)
        self.log.close()
        os._exit(1)

    def note_crash(self, missing: dict[int, str], reason: str, culprit: int | str):
        """Write event:crashed, once over all ranks. culprit: whose error it is if nobody is missing here."""
        if missing and not self.watch.speaks_for_all(missing):
            return
        if last_event(self.log.path) != "crashed":
            rank = next(iter(missing), culprit)
            self.log.end("crashed", from_any_rank=True, rank=rank, error=json.dumps(reason))


@contextlib.contextmanager
def short_collections():
    """Spare the garbage collector what exists now: modules, model, compiled code.

    A full collection looks at every object, 0.2 s once the compiler's modules are loaded, and one rank's
    makes all ranks wait. What a step leaves behind is still collected.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_cut_off(error: BaseException) -> bool:
    """Return whether a collective failed because of another host. gloo's errors are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
