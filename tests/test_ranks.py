"""Ranks in processes of their own: the exchange through shared memory against gloo's."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train_gpt import process_state

ROOT = Path(__file__).resolve().parent.parent

EXCHANGE = """
import torch
from train_gpt import Ranks

ranks = Ranks("cpu")
n = 6 * ranks.world_size
like = torch.zeros(1)
pairs = [[ranks.zeros(n, like, common) for common in (False, True)] for _ in range(2)]
for trial in range(50):
    for grads, _ in pairs:  # two at once, as the optimizer has it
        grads.copy_(torch.randn(n, generator=torch.Generator().manual_seed(100 * trial + ranks.rank)))
    plain = pairs[0][0].clone()
    works = [ranks.reduce_scatter(grads) for grads, _ in pairs]
    ranks.reduce_scatter(plain).wait()
    for (grads, weights), work in zip(pairs, works):
        work.wait()
        work.wait()  # a second wait must not add anything
        torch.testing.assert_close(ranks.shard(grads), ranks.shard(plain))
        ranks.shard(weights).copy_(ranks.shard(plain))
    works = [ranks.all_gather(weights) for _, weights in pairs]
    ranks.all_gather(plain).wait()
    for (_, weights), work in zip(pairs, works):
        work.wait()
        assert torch.equal(weights, plain)
with open(f"rank{ranks.rank}", "w") as file:  # the console mixes the ranks' lines
    file.write("through memory" if ranks.everyones else "through gloo")
ranks.close()
"""

CLOSED_HOST = """
import os
open_file = os.open
def refuse(path, *rest):  # as a host does that does not let a process open another's files
    if os.environ["RANK"] == "1" and str(path).startswith("/proc/"):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *rest)
os.open = refuse
"""

LEFT_ALONE = """
import os, time
import torch
from train_gpt import Ranks

ranks = Ranks("cpu")
full = ranks.zeros(ranks.world_size, torch.zeros(1))
if ranks.rank == 1:
    time.sleep(1)
    os._exit(0)
start = time.monotonic()
try:
    ranks.all_gather(full).wait()
except torch.distributed.DistError as error:
    with open("said", "w") as file:
        file.write(f"{error} after {time.monotonic() - start:.0f} s")
"""


def launch(tmp_path, num_ranks, arguments, code=EXCHANGE):
    script = tmp_path / "exchange.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(script)], env=env, text=True, cwd=tmp_path, stderr=subprocess.PIPE)


def ways(tmp_path, num_ranks) -> set[str]:
    return {(tmp_path / f"rank{rank}").read_text() for rank in range(num_ranks)}


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_exchange_through_memory_equals_gloos(num_ranks, tmp_path):
    """Fails if a rank reads before another has written, sums a shard twice, or takes somebody else's."""
    done = launch(tmp_path, num_ranks, ["--standalone"])
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert ways(tmp_path, num_ranks) == {"through memory"}


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_if_one_rank_may_not_open_the_others_files_all_use_gloo(tmp_path):
    done = launch(tmp_path, 2, ["--standalone"], CLOSED_HOST + EXCHANGE)
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert ways(tmp_path, 2) == {"through gloo"}


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_nobody_waits_for_a_rank_that_has_left(tmp_path):
    """Fails if a rank waits on for one that ended without arriving, here without an error."""
    done = launch(tmp_path, 2, ["--standalone"], LEFT_ALONE)
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 0, errors
    said = (tmp_path / "said").read_text()
    assert said in ("rank 1 has left after 1 s", "rank 1 has left after 2 s")


def test_ranks_of_two_hosts_use_gloo(tmp_path):
    """Fails if ranks that no memory joins (here two agents, as on two hosts) take that way."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    both = [
        launch(
            tmp_path,
            1,
            ["--nnodes=2", f"--node-rank={node}", f"--master-port={port}", "--master-addr=localhost"],
        )
        for node in (0, 1)
    ]
    for agent in both:
        _, errors = agent.communicate(timeout=120)
        assert agent.returncode == 0, errors
    assert ways(tmp_path, 2) == {"through gloo"}


def test_who_waits_for_the_others_leaves_with_its_launcher(tmp_path):
    """Fails if a rank whose torchrun was killed while the group came together waits for long."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    waits = "import os; from train_gpt import Ranks; print(os.getpid(), flush=True); Ranks('cpu')"
    shell = subprocess.Popen(
        ["sh", "-c", f'{sys.executable} -c "{waits}"; true'],
        env=env,
        text=True,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    pid = int(shell.stdout.readline())
    time.sleep(1)
    assert process_state(pid) == "alive"
    shell.kill()
    shell.wait()
    end = time.monotonic() + 30
    while process_state(pid) == "alive" and time.monotonic() < end:
        time.sleep(0.1)
    assert process_state(pid) == "gone"
