"""Start, find and stop the processes of a sweep's runs.

torchrun starts its workers in their own sessions, and a killed process leaves orphans. Hence a run's
processes are all descendants of the one started for it, and all whose environment variable MARK names its
console file; on Linux this process also adopts every orphan (see `adopt_orphans`). RUN_ID would not do: a run
resumed by hand has it, too.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

GRACE_S = 30.0  # between SIGTERM and SIGKILL, for a run to finish its step and save
GIVE_UP_S = 70.0  # then stop trying: a process in uninterruptible sleep cannot be killed
MARK = "LAUNCHER_CONSOLE"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # Linux's prctl options
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

_started: list[subprocess.Popen] = []  # their exit codes belong to whoever started them


def start_process(
    command: list[str], env: dict[str, str], console: Path, cores: tuple[int, ...]
) -> subprocess.Popen:
    """Start a process on `cores` (none: any), with its output appended to the file `console`.

    It has its own session, so that Ctrl-C reaches only this process. On Linux it gets SIGTERM if this process
    dies.
    """
    with console.open("a") as file:
        process = subprocess.Popen(
            command,
            env={**env, MARK: str(console.resolve())},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_child_setup(cores),
        )
    _started.append(process)
    return process


def _child_setup(cores: tuple[int, ...]) -> Callable[[], None]:
    """Return the function that a child runs before exec."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def setup() -> None:
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        if libc:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # torchrun then ends its workers, too

    return setup


def processes_of(consoles: Iterable[Path], roots: Iterable[int] = ()) -> set[int]:
    """Return the living processes started with one of these consoles, `roots`, and all their descendants.

    This process is never among them.
    """
    marks = {str(console.resolve()) for console in consoles}
    table = {process.pid: process.info for process in psutil.process_iter(["ppid", "status", "environ"])}
    found = {pid for pid, info in table.items() if (info["environ"] or {}).get(MARK) in marks}
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
    """SIGTERM all that `find` finds, SIGKILL after GRACE_S, until it finds none; False if some remain.

    `find` is called repeatedly, because processes may start others while they end.
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


def is_being_written(log: Path) -> bool:
    """Return whether a process holds the lock that a trainer has on its log while it runs."""
    try:
        with log.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no log, or a file system without locks
        return False
    return False


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process, so that it can find them (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans() -> None:
    """Collect the exit codes of adopted processes that have ended, which otherwise stay zombies."""
    ours = {process.pid for process in _started if process.returncode is None}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in ours and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
