"""Run trainers by forking a process that has imported torch, which saves more than a second each.

This cannot test what only a new interpreter reads: PYTHON* variables, the hash seed, OMP_NUM_THREADS (read
on importing torch; conftest.py sets it to 1). Disturbed runs (jobs.Job) and torchrun are started normally.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch"])
PATIENCE_S = 300  # timeout of waiting loops: far longer than a busy machine needs


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(condition, what: str = "condition"):
    """Poll until the condition holds; AssertionError after PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.02)


def become(script: str, cwd: Path, env: dict[str, str], outputs: list[Path]):
    """Run a script in folder cwd. outputs: the files that get its stdout and stderr."""
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(cwd)
    sys.modules.pop(__name__)  # else the run's log lists it as a source
    os.environ.clear()
    os.environ.update(env)
    ours = {"", *(str(ROOT / folder) for folder in (".", "benchmarks", "tests", "tests/offgpu"))}
    sys.argv, sys.path[:] = [script], [str(Path(script).parent), *(p for p in sys.path if p not in ours)]
    runpy.run_path(script, run_name="__main__")


def run_forked(cwd: Path, script: str, env: dict | list[dict], ranks: int) -> subprocess.CompletedProcess:
    """Run a script to its end, on `ranks` ranks with torchrun's variables; ranks=0: without them.

    env: that of all ranks, or each rank's own. No restarts; no signals are forwarded. The exit code is the
    largest of the ranks'; a death by signal counts as the signal's number. Raises TimeoutExpired after
    PATIENCE_S.
    """
    envs = env if isinstance(env, list) else max(1, ranks) * [env]
    if ranks:
        launch = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        launch |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
        envs = [{**launch, "RANK": str(i), "LOCAL_RANK": str(i), **own} for i, own in enumerate(envs)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        processes = [CONTEXT.Process(target=become, args=(script, cwd, env, outputs)) for env in envs]
        end = time.monotonic() + PATIENCE_S
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(end - time.monotonic())
            hang = any(process.is_alive() for process in processes)
        finally:
            for process in processes:
                if process.pid:
                    process.kill()
                    process.join()
        said = [path.read_text() for path in outputs]
    if hang:
        raise subprocess.TimeoutExpired(script, PATIENCE_S, *said)
    return subprocess.CompletedProcess(script, max(abs(p.exitcode) for p in processes), *said)
