"""Gauges of a run beside its losses: peak memory, and how much of the device's arithmetic it uses."""

import resource
import sys
import time

import numpy as np
import torch

from runtime.ranks import Ranks

SIDE_CUDA, SIDE_CPU = 8192, 1024  # sides of the square matrices whose product is timed
REPEATS = 20


class Timer:
    """Marks in time: of the CPU, or events on the current CUDA stream, which cost no synchronisation."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start, end) -> float:
        """Time between two marks; call sync() first."""
        return start.elapsed_time(end) if self.cuda else 1000 * (end - start)

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()


def matmul_flops(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of a square product of this type on this device; the median."""
    timer, marks = Timer(device), []
    n = SIDE_CUDA if timer.cuda else SIDE_CPU
    a = torch.randn(n, n, device=device).to(dtype)  # constants take less power on a GPU: faster
    for _ in range(repeats):
        start = timer.mark()
        a @ a
        marks.append((start, timer.mark()))
    timer.sync()
    return 2 * n**3 / (float(np.median([timer.ms(*m) for m in marks])) / 1000)


def peak_memory_mib(ranks: Ranks) -> dict[str, float]:
    """Peak of any rank so far, in MiB: resident on the host and, on CUDA, allocated there. A collective."""
    found = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if sys.platform == "darwin":  # bytes there
        found["peak_rss_mib"] /= 1024
    if ranks.device.type == "cuda":
        found["cuda_max_allocated_mib"] = torch.cuda.max_memory_allocated() / 2**20
    largest = torch.tensor(list(found.values()), dtype=torch.float64, device=ranks.device)
    ranks.all_reduce(largest, op=torch.distributed.ReduceOp.MAX).wait()
    return dict(zip(found, largest.tolist()))


class Utilization:
    """Model FLOP utilization (MFU): FLOP of the model over what the ranks' measured products would have done.

    The FLOP are those of runtime/flops.py, forward and backward; the optimizer's count as time alone.
    """

    def __init__(self, flops: float, ms: float):
        """flops: FLOP/s of all ranks together. ms: training time so far."""
        self.flops, self.flop, self.since_ms = flops, 0.0, ms

    def add(self, flop: float):
        """Count a step of all ranks."""
        self.flop += flop

    def take(self, ms: float) -> float | None:
        """Share of the rate since the last call, at `ms` of training time; None if there was no step."""
        spent_s, flop = (ms - self.since_ms) / 1000, self.flop
        self.flop, self.since_ms = 0.0, ms
        return flop / spent_s / self.flops if flop else None
