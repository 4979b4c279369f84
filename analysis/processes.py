"""The processes of a sweep's runs: starting them, finding all that belong to one, stopping them.

torchrun starts its workers in sessions of their own, and a killed process leaves its children to others.
Hence a run's processes are those that descend from the one started for it, and all that have its RUN_ID in
their environment; and on Linux this process takes in every orphan (see `adopt_orphans`).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

GRACE_S = 30.0  # between SIGTERM and SIGKILL: a run finishes its step and saves
GIVE_UP_S = 70.0  # no more attempts after this: a process in uninterruptible sleep cannot be killed
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

_started: list[subprocess.Popen] = []  # their exit codes belong to whoever started them


def start_process(
    command: list[str], env: dict[str, str], console: Path, cores: tuple[int, ...]
) -> subprocess.Popen:
    """Start a process on `cores` (none: any), its output appended to the file `console`.

    It has a session of its own, so that Ctrl-C reaches this process alone. On Linux it gets SIGTERM if this
    process dies.
    """
    with console.open("a") as file:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_child_setup(cores),
        )
    _started.append(process)
    return process


def _child_setup(cores: tuple[int, ...]) -> Callable[[], None]:
    """Return what a child does before it becomes the command."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def setup() -> None:
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        if libc:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # torchrun then ends its workers, too

    return setup


def processes_of(run_ids: set[str], roots: Iterable[int] = ()) -> set[int]:
    """Return the living processes with one of these RUN_IDs, `roots`, and all that descend from either.

    This process is never among them.
    """
    table = {process.pid: process.info for process in psutil.process_iter(["ppid", "status", "environ"])}
    found = {pid for pid, info in table.items() if (info["environ"] or {}).get("RUN_ID") in run_ids}
    found.update(roots)
    children: dict[int, list[int]] = {}
    for pid, info in table.items():
        children.setdefault(info["ppid"], []).append(pid)
    queue = list(found)
    while queue:
        new = [pid for pid in children.get(queue.pop(), []) if pid not in found]
        found.update(new)
        queue += new
    return {pid for pid in found if pid in table and table[pid]["status"] not in ENDED and pid != os.getpid()}


def stop_processes(find: Callable[[], set[int]]) -> bool:
    """SIGTERM all that `find` finds, SIGKILL them after GRACE_S, until it finds none; False if some remain.

    `find` is called again and again, because processes may start others while they end.
    """
    begin, told = time.monotonic(), set()
    while left := find():
        spent = time.monotonic() - begin
        if spent > GIVE_UP_S:
            return False
        for pid in left:
            if spent >= GRACE_S or pid not in told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if spent >= GRACE_S else signal.SIGTERM)
        reap_orphans()
        time.sleep(0.05)
    reap_orphans()
    return True


def adopt_orphans() -> None:
    """Make every process whose parent dies a child of this one, so that it can be found (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans() -> None:
    """Collect the exit codes of adopted processes that have ended; otherwise they would stay zombies."""
    ours = {process.pid for process in _started if process.returncode is None}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in ours and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
