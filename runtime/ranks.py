"""The processes of a run: their devices, their collectives, and how they agree.

One rank per GPU, or per group of CPU cores, started by torchrun; or a single process without it. All
collectives are in one class: NCCL on CUDA, gloo elsewhere.
"""

import contextlib
import datetime
import json
import os
import threading
import time

import torch
import torch.distributed as dist
from torch import Tensor

from data.cores import usable_cores
from runtime.compiling import keep_freed_memory
from runtime.settings import SettingsError

# torch 2.13 renamed both; 2.11 and 2.12 have only the old names
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def check_launch(script: str, starts_ranks: bool = False):
    """Raise SettingsError if this process was started as one of several in a way that cannot work.

    That is: with some of torchrun's variables but not all, or by srun without torchrun. starts_ranks: this
    process trains nothing itself, so that only srun's own word counts, not the size of the job.
    """
    env = os.environ
    single = f"python {script}"
    several = f"torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 {script}"
    found = {name: env[name] for name in TORCHRUN if name in env}
    if found:
        wrong = [n for n in TORCHRUN if not env.get(n, "").isdecimal()]
        wrong += [n for n in ("MASTER_ADDR", "MASTER_PORT") if not env.get(n)]
        if not wrong and int(env["RANK"]) < int(env["WORLD_SIZE"]):
            return
        shown = " ".join(f"{name}={value!r}" for name, value in found.items())
        lacks = f", without a usable {', '.join(wrong)}" if wrong else ""
        raise SettingsError(
            f"found {shown}{lacks}: half of what torchrun sets. For one process `unset {' '.join(TORCHRUN)}; "
            f"{single}`; for several `{several}`"
        )
    tasks = env.get("SLURM_STEP_NUM_TASKS") or ("" if starts_ranks else env.get("SLURM_NTASKS", ""))
    if tasks.isdecimal() and int(tasks) > 1:
        raise SettingsError(
            f"found {tasks} tasks of SLURM, but no torchrun that joins them: each would train for itself. "
            "Start one task on each machine: srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES "
            "--nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=HOST:29500 "
            f"{script}; or one process: srun --ntasks=1 {single}"
        )


def find_device(env) -> str:
    """Resolve DEVICE to "cuda" or "cpu"; SettingsError if this machine lacks what it takes."""
    wanted = env.get("DEVICE", "auto")
    if wanted != "cpu" and not torch.cuda.is_available() and torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise SettingsError(
            f"torch {torch.__version__} finds {found} CUDA devices here, but cannot use them: is the driver "
            "too old for it? Install a torch for this driver, or set DEVICE=cpu"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SettingsError("DEVICE='cuda', but torch finds no CUDA device here; use DEVICE=cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return "cpu"
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if num_local > torch.cuda.device_count():
        raise SettingsError(
            f"{num_local} ranks on this machine, but torch finds {torch.cuda.device_count()} CUDA devices "
            "here; start one rank per device, or set DEVICE=cpu"
        )
    return "cuda"


def is_amd() -> bool:
    """Return whether this torch is built for AMD's GPUs, which it calls CUDA devices too."""
    return torch.version.hip is not None


def capability() -> tuple[int, int]:
    """(major, minor) compute capability of this rank's own GPU: 9, 0 for sm_90.

    0, 0 for AMD's: its numbers mean other things. An MI300 says 9, 4, has no Hopper kernels, and another
    format of float8.
    """
    return (0, 0) if is_amd() else torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", 0)))


class Done:
    """Handle of a collective of a single rank: there is nothing to wait for."""

    def wait(self):
        pass


class Ranks:
    """This process among the others. Tensor collectives return a handle with .wait()."""

    last_beat = 0.0  # time.monotonic() of the last sign of progress

    def __init__(self, device: str, timeout_s: float = 900.0, settings: dict | None = None):
        """Join the others. SettingsError on all ranks unless all have the same settings."""
        self.find_place(device)
        if self.launched:
            store = self.rendezvous(1.5 * timeout_s)
            agree_on_settings(store, self.rank, self.world_size, settings or {})
            self.join(store, 1.5 * timeout_s)

    def find_place(self, device: str):
        """Read torchrun's variables; choose the device and the number of threads."""
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = torch.device("cuda", self.local_rank) if device == "cuda" else torch.device("cpu")
        if device == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
            threads = os.environ.get("OMP_NUM_THREADS")
            if not threads or (threads == "1" and self.local_world_size > 1):  # torchrun's own default
                torch.set_num_threads(max(1, usable_cores() // self.local_world_size))
        self.parent = os.getppid()  # read before its store answers, which proves that it is alive
        self.launched = "RANK" in os.environ  # torchrun started this process, maybe as its only rank
        self.watched = threading.Event()  # set once supervise.Watch looks after this process

    def rendezvous(self, timeout_s: float) -> dist.Store:
        """torchrun's key-value store, with keys of this attempt alone."""
        threading.Thread(target=self.leave_with_launcher, daemon=True).start()
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout_s)))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps one store for all its restarts, with the addresses of dead ranks in it
            # (pytorch#135712). Agents on several machines count restarts separately, so they share no prefix.
            store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        return store

    def join(self, store: dist.Store, timeout_s: float):
        """Form the process group. supervise.Watch gives up earlier: NCCL's watchdog kills without a word."""
        cuda = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=self.device if cuda else None,
        )

    def is_orphan(self) -> bool:
        """Return whether torchrun is gone. Any other parent is a shell, whose end means nothing."""
        return self.launched and os.getppid() != self.parent

    def leave_with_launcher(self):
        """Exit if torchrun dies while this rank waits for ranks that nobody will start."""
        while not self.watched.wait(0.5):
            if self.is_orphan():
                os._exit(1)

    def all_reduce(self, x: Tensor, op=dist.ReduceOp.SUM):
        """Sum over the ranks, in place."""
        return dist.all_reduce(x, op=op, async_op=True) if self.world_size > 1 else Done()

    def reduce_scatter(self, full: Tensor):
        """Sum over the ranks, in place; afterwards only this rank's shard(full) is defined.

        gloo's own reduce_scatter takes 2.6 times as long as its all_reduce (1M numbers, 2 ranks).
        """
        if self.world_size == 1 or self.device.type == "cpu":
            return self.all_reduce(full)
        return reduce_scatter_single(self.shard(full), full, async_op=True)

    def all_gather(self, full: Tensor):
        """Send every rank's shard(full) to all, in place."""
        if self.world_size == 1:
            return Done()
        return all_gather_single(full, self.shard(full), async_op=True)

    def shard(self, full: Tensor) -> Tensor:
        """This rank's view of its equal part of full's first dimension."""
        n = full.shape[0] // self.world_size
        return full[self.rank * n : (self.rank + 1) * n]

    def gather_shards(self, mine: Tensor) -> Tensor:
        """Every rank's equal part of a flat tensor, joined in the order of the ranks."""
        full = mine.new_empty(mine.numel() * self.world_size)
        self.shard(full).copy_(mine)
        self.all_gather(full).wait()
        return full

    def broadcast(self, x: Tensor):
        """Overwrite x with rank 0's."""
        if self.world_size > 1:
            dist.broadcast(x, 0)

    def broadcast_object(self, value):
        """Rank 0's value, small and picklable, on all ranks."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def all_gather_object(self, value) -> list:
        """Every rank's value, small and picklable, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def run_on_all(self, function):
        """Run function() on every rank; if any rank fails, raise ValueError on all, so that none hangs."""
        value = error = None
        try:
            value = function()
        except ValueError as found:
            error = found
        except OSError as found:
            error = ValueError(f"{found.filename or 'a file'} cannot be used: {found.strerror or found}")
        texts = self.all_gather_object(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise ValueError(f"rank {rank}: {text}")
        return value

    def beat(self):
        """Note a sign of progress, for supervise.Watch."""
        self.last_beat = time.monotonic()

    @staticmethod
    def close():
        if dist.is_initialized():
            dist.destroy_process_group()


def refuse_together(error: SettingsError):
    """Publish this rank's settings error, so that the others fail too; then raise it."""
    ranks = Ranks.__new__(Ranks)
    ranks.find_place("cpu")
    if ranks.launched:
        # what the others say, or a store that is gone, matters less than this rank's own error
        with contextlib.suppress(dist.DistError, SettingsError, TimeoutError):
            settings = {"refused": str(error)}
            agree_on_settings(ranks.rendezvous(60), ranks.rank, ranks.world_size, settings)
    raise error


def agree_on_settings(store: dist.Store, rank: int, world_size: int, settings: dict):
    """Raise SettingsError on all ranks if one has no settings, or others than the rest.

    Raises TimeoutError if a rank does not start. Uses the store alone, before a process group forms: ranks
    with wrong settings, or on different devices, would make that hang.

    settings: this rank's, or {"refused": why it has none}.
    """
    soon = datetime.timedelta(seconds=30)
    store.set(f"settings{rank}", json.dumps(settings))
    keys = [f"settings{rank}" for rank in range(world_size)]
    try:
        if "refused" in settings:
            store.wait(keys, soon)  # one that ends anyway waits less for the others
        else:
            store.wait(keys)
    except dist.DistError as error:
        absent = [str(i) for i, key in enumerate(keys) if not store.check([key])]
        raise TimeoutError(
            f"of {world_size} ranks, {', '.join(absent)} did not start in time (1.5 x DIST_TIMEOUT); look "
            "for their messages, and on several machines for the same torchrun command on each"
        ) from error
    found = [json.loads(text) for text in store.multi_get(keys)]
    texts = [theirs.get("refused") or settings_apart(i, theirs, found[0]) for i, theirs in enumerate(found)]
    if any(texts):
        with contextlib.suppress(dist.DistError):  # the store may go with this rank: let all read first
            store.set(f"read{rank}", "")
            store.wait([f"read{rank}" for rank in range(world_size)], soon)
        raise SettingsError(next(filter(None, texts)))


def settings_apart(rank: int, theirs: dict, first: dict) -> str:
    """Describe how a rank's settings differ from rank 0's; empty if they do not."""
    names = [name for name in sorted({*theirs, *first}) if theirs.get(name) != first.get(name)]
    if not names:
        return ""
    found = ", ".join(f"{name.upper()}={theirs.get(name)} instead of {first.get(name)}" for name in names)
    return (
        f"the ranks were started with different settings: rank {rank} has {found}; give all machines the "
        "same ones"
    )
