"""Ranks in separate processes: collectives against plain sums; how ranks agree, refuse and leave."""

import datetime
import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from forked import free_port, wait_until
from helpers import ROOT

from runtime.ranks import Ranks, agree_on_settings
from runtime.settings import SettingsError
from runtime.supervise import process_state

EVERY_COLLECTIVE = """
import sys
import torch

from runtime.ranks import Ranks

ranks = Ranks("cpu", settings={"seed": 1})
n = 5 * ranks.world_size
seeds = range(ranks.world_size)
numbers = [torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
total = sum(numbers)

pair = [numbers[ranks.rank].clone(), 2 * numbers[ranks.rank]]
works = [ranks.reduce_scatter(full) for full in pair]  # two at once, as the optimizer has it
for factor, full, work in zip((1, 2), pair, works):
    work.wait()
    torch.testing.assert_close(ranks.shard(full), factor * ranks.shard(total))
    ranks.shard(full).copy_(ranks.shard(factor * total))
for factor, full, work in zip((1, 2), pair, [ranks.all_gather(full) for full in pair]):
    work.wait()
    assert torch.equal(full, factor * total)

ranks.device = torch.device("cuda")  # takes NCCL's branch, which gloo can run, too
scattered = numbers[ranks.rank].clone()
ranks.reduce_scatter(scattered).wait()
torch.testing.assert_close(ranks.shard(scattered), ranks.shard(total))
ranks.device = torch.device("cpu")

summed = numbers[ranks.rank].clone()
ranks.all_reduce(summed).wait()
torch.testing.assert_close(summed, total)
assert torch.equal(ranks.gather_shards(ranks.shard(total).flatten()), total.flatten())
ours = numbers[ranks.rank].clone()
ranks.broadcast(ours)
assert torch.equal(ours, numbers[0])
assert ranks.broadcast_object(f"from {ranks.rank}") == "from 0"
assert ranks.all_gather_object(ranks.rank) == list(range(ranks.world_size))

def fails():
    if ranks.rank == 1:
        raise FileNotFoundError(2, "No such file", "a.bin")

try:
    ranks.run_on_all(fails)
except ValueError as error:
    with open(f"rank{ranks.rank}", "w") as file:  # the console mixes the ranks' lines
        file.write(str(error))
ranks.close()
"""


def test_collectives_equal_plain_sums_and_an_error_reaches_all(tmp_path):
    """Fails if a rank gets another's shard, or does not learn that another one failed."""
    script = tmp_path / "collectives.py"
    script.write_text(EVERY_COLLECTIVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], env=env, text=True, cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    said = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    own = "a.bin cannot be used: No such file"
    assert said == {"rank0": f"rank 1: {own}", "rank1": own, "rank2": f"rank 1: {own}"}


@pytest.mark.parametrize(
    "settings, said",
    [
        (({"seed": 0}, {"seed": 0}), None),
        (({"seed": 0}, {"seed": 1}), "rank 1 has SEED=1 instead of 0; give all machines the same ones"),
        (({"seed": 0}, {"seed": 0, "new": 2}), "rank 1 has NEW=2 instead of None"),
        (({"refused": "SEED='x': wanted int"}, {"seed": 0}), "SEED='x': wanted int"),
        (({"seed": 0}, {"refused": "SEED='x': wanted int"}), "SEED='x': wanted int"),
    ],
)
def test_settings_must_be_good_and_the_same_on_all_ranks(settings, said):
    """Fails if a rank trains with other settings than the rest, or waits for a rank without any."""
    store, found = dist.HashStore(), [None, None]

    def agree(rank):
        try:
            agree_on_settings(store, rank, 2, settings[rank])
        except SettingsError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=agree, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if said is None:
        assert found == [None, None]
    else:
        assert all(said in text for text in found)


def test_each_rank_of_a_machine_takes_its_own_gpu(monkeypatch):
    """Fails if all ranks of a machine share GPU 0, or join a group that is not NCCL's. Rank 11: the second
    machine's fourth."""
    taken, joined = [], {}
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: joined.update(how, by=backend))
    for name, value in dict(RANK=11, WORLD_SIZE=16, LOCAL_RANK=3, LOCAL_WORLD_SIZE=8).items():
        monkeypatch.setenv(name, str(value))
    ranks = Ranks.__new__(Ranks)  # without the rendezvous
    ranks.find_place("cuda")
    ranks.join(dist.HashStore(), 5)
    mine = torch.device("cuda", 3)
    assert taken == [mine] and ranks.device == mine
    assert (joined["by"], joined["device_id"], joined["rank"], joined["world_size"]) == ("nccl", mine, 11, 16)


def test_ranks_that_do_not_start_are_named():
    """Fails if a failed start on several machines only prints the keys of a store."""
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.1))
    store.set("settings2", "{}")
    with pytest.raises(TimeoutError, match="of 4 ranks, 1, 3 did not start in time"):
        agree_on_settings(store, 0, 4, {})


def test_a_rank_that_waits_for_the_others_leaves_with_its_launcher(tmp_path):
    """Fails if a rank waits long after its torchrun was killed while the group was forming."""
    port = free_port()
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    waits = "import os; from runtime.ranks import Ranks; print(os.getpid(), flush=True); Ranks('cpu')"
    shell = subprocess.Popen(
        ["sh", "-c", f'{sys.executable} -c "{waits}"; true'],
        env=env,
        text=True,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    pid = int(shell.stdout.readline())
    wait_until(lambda: answers(port))  # its store answers: it has its parent's PID and waits for rank 1
    assert process_state(pid) == "alive"
    shell.kill()
    shell.wait()
    wait_until(lambda: process_state(pid) == "gone")


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("localhost", port)) == 0
