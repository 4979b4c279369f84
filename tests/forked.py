"""Runs of a trainer, forked from one process that has imported torch, which takes more than a second."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch"])
PATIENCE_S = 300


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become(script: str, cwd: Path, env: dict[str, str], outputs: tuple[str, str]):
    """Run a script as `python script` does in folder cwd; outputs: files for what it says. Never returns.

    torch has read OMP_NUM_THREADS before: it is 1 in all tests.
    """
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tests = Path(__file__).resolve().parent
    elsewhere = [path for path in sys.path if path not in ("", str(tests), str(tests.parent))]
    sys.argv, sys.path[:] = [script], [str(Path(script).parent), *elsewhere]
    runpy.run_path(script, run_name="__main__")


def run_forked(cwd: Path, script: str, env: dict[str, str], ranks: int) -> subprocess.CompletedProcess:
    """Run a script to its end, on ranks with torchrun's variables; ranks=0: without them.

    No restarts, no signals passed on. The exit code is the largest of the ranks'.
    """
    envs = [env]
    if ranks:
        port, count = str(free_port()), str(ranks)
        env = dict(env, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        envs = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = os.path.join(folder, "stdout"), os.path.join(folder, "stderr")
        processes = [CONTEXT.Process(target=become, args=(script, cwd, env, outputs)) for env in envs]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE_S)
            process.kill()  # if it still runs
            process.join()
        said = [Path(path).read_text() if os.path.exists(path) else "" for path in outputs]
    return subprocess.CompletedProcess(script, max(abs(p.exitcode) for p in processes), *said)
