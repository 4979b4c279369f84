"""GPUs and cores of this machine, found without torch."""

import os
from dataclasses import dataclass

from data.cores import usable_cores


def gpu_names(count: int) -> tuple[str, ...]:
    """Return the first `count` GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return tuple(part.strip() for part in chosen.split(",") if part.strip())[:count]


def core_ids() -> tuple[int, ...]:
    """Return cores that runs may be pinned to: of this process's, as many as its quota allows."""
    ids = range(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        ids = sorted(os.sched_getaffinity(0))
    return tuple(ids)[: usable_cores()]


@dataclass(frozen=True)
class Slot:
    """Devices that one run may use. No cores means any."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


def share_out(parallel: int, nproc: int, gpus: tuple[str, ...]) -> tuple[list[Slot], int]:
    """Return disjoint slots for `parallel` runs at a time, and the number of ranks per run.

    nproc 0 means all GPUs of a slot; without GPUs, one rank. ValueError if the machine is too small.
    """
    if gpus:
        nproc = nproc or max(1, len(gpus) // parallel)
        if parallel * nproc > len(gpus):
            raise ValueError(
                f"{parallel} runs at a time x {nproc} ranks want {parallel * nproc} GPUs, found "
                f"{len(gpus)} ({', '.join(gpus)}); lower --parallel or --nproc-per-run"
            )
        return [Slot(gpus=gpus[i * nproc : (i + 1) * nproc]) for i in range(parallel)], nproc
    cores = core_ids()
    if parallel > len(cores):
        raise ValueError(
            f"{parallel} runs at a time want {parallel} CPU cores at least, found {len(cores)}; "
            "lower --parallel"
        )
    nproc = nproc or 1
    if parallel == 1:
        return [Slot()], nproc
    share = len(cores) // parallel
    return [Slot(cores=cores[i * share : (i + 1) * share]) for i in range(parallel)], nproc
