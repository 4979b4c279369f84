"""Model a training step on 1 to 256 H100s: its time, its memory, and where more GPUs stop paying.

    python benchmarks/scaling_model.py                                  # three presets
    python benchmarks/scaling_model.py --preset gpt2-1b --gpus 8 64 --set network_bytes=21e9

    ms per step = token_us * thousands of tokens / GPUs + pass_ms * passes + transfers

token_us and pass_ms are fitted to the public code's steps on one H100; its steps on eight are held out.
Transfers are rings that nothing hides. Other presets have not been timed: for them, token_us grows with the
FLOP per token, and pass_ms with the parameters, because much of it zeroes, casts and adds gradients. pass_ms
includes an eighth of the optimizer's work (0.8 ms of gpt2-small's), which is right on eight GPUs. Stragglers,
data and evaluation cost nothing. An H100 holds 80 GB: rows above some 70 GiB, and speed-ups over them, are of
runs that do not fit.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analysis.tables import format_table  # noqa: E402
from runtime.flops import flop_per_token, matrix_shapes, num_matrix_params, table_sizes  # noqa: E402
from runtime.memory import GIB, MOST_TOKENS, Memory  # noqa: E402
from train_gpt import (  # noqa: E402
    ADAM_EVERY,
    PRESETS,
    NorMuonSettings,
    Settings,
    count_slices,
    count_val_slices,
)

VOCAB = 50257
DOC_LENGTHS = np.random.default_rng(0).lognormal(math.log(420), math.sqrt(2 * math.log(700 / 420)), 20_000)
DOC_LENGTHS = DOC_LENGTHS.clip(16, 2048).astype(int)  # as FineWeb's, about: mean 700, median 420, cut at 2048
PAYS = 1.5  # doubling the GPUs pays if it makes the run this many times as fast

# ms per step of gpt2-small in stages 1, 2, 3, on one and on eight H100s, from logs of the speedrun's public
# records: FlashAttention-3, one slice per pass. Compare within a row; hosts differ.
PUBLIC = {
    "public, 2026-01-24": ((244.7, 447.6, 656.7), (33.02, 59.12, 84.99)),
    "public, older head kernels": ((253.9, 466.8, 677.6), (33.92, 60.90, 86.78)),
    "public, 2026-07-13, later model": ((231.0, 430.1, 634.1), (31.38, 56.28, 82.31)),
}
FITTED = "public, 2026-01-24"  # its constants are the machine's
# This project on one H100, by PASS_TOKENS (records/2026-11-26_first_hour_h100): FlashAttention-2, and
# documents of 1,690 tokens on average, so more attention (records/2026-11-26_scaling_model_h100).
OURS = {65_536: (216.9, 448.5, 693.8), 131_072: (211.8,)}


@dataclass(frozen=True)
class Machine:
    """H100s in nodes of eight. The rates and latencies of rings are assumed."""

    token_us: float  # per token of gpt2-small, on one GPU
    pass_ms: float  # per pass of gpt2-small, however many tokens it has
    nvlink_bytes: float = 370e9  # per second, large NCCL rings in a node; 450e9 on paper
    network_bytes: float = 42.5e9  # per second and GPU: 85% of 400 Gb/s; a ring uses all cards of a node
    collective_us: float = 15.0  # to start one
    hop_us: float = 1.5  # of a ring inside a node
    network_hop_us: float = 6.0  # of a ring between nodes
    gpus_per_node: int = 8

    def ring_ms(self, num_bytes: float, ranks: int) -> float:
        """Time a reduce-scatter or an all-gather of num_bytes over `ranks` GPUs."""
        if ranks == 1:
            return 0.0
        rate, latency = self.nvlink_bytes, self.collective_us + ranks * self.hop_us
        if ranks > self.gpus_per_node:
            rate = min(rate, self.network_bytes * self.gpus_per_node)
            latency += math.ceil(ranks / self.gpus_per_node) * (self.network_hop_us - self.hop_us)
        return latency / 1e3 + 1e3 * num_bytes * (ranks - 1) / ranks / rate


class Preset(NamedTuple):
    """Preset as it trains on GPUs: the model's config and the trainer's settings."""

    config: object
    settings: Settings

    def num_params(self) -> int:
        """Number of parameters in matrices and tables."""
        return num_matrix_params(self.config) + sum(table_sizes(self.config, VOCAB).values())


def read_preset(name: str) -> Preset:
    """Read a preset from the trainer's own table."""
    config, changes = PRESETS[name]
    names = {f.name for f in dataclasses.fields(Settings)}  # the other changes are the optimizer's
    return Preset(config, Settings(**{k: v for k, v in changes.items() if k in names}, kernels="triton"))


SMALL = read_preset("gpt2-small")

# ---------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------


def num_passes(batch_tokens: int, slices: int, ranks: int, pass_tokens: int = MOST_TOKENS) -> int:
    """Number of passes per rank and step. As in TrainData, a pass stacks slices, and has one at least."""
    return math.ceil(slices // ranks / max(1, pass_tokens * slices // batch_tokens))


def compute_counts(p: Preset, stage: int, ranks: int, pass_tokens: int = MOST_TOKENS) -> tuple[float, float]:
    """Count a GPU's thousands of tokens, and its passes, in a step, as if they were gpt2-small's.

    ValueError if the batch cannot be divided among the ranks.
    """
    batch, slices = p.settings.batch_sizes[stage], count_slices(p.settings, ranks)
    if ranks < 1 or slices % ranks or batch % slices:
        raise ValueError(f"{ranks} GPUs do not divide {slices} slices of {batch} tokens; use powers of two")
    flop, small = (flop_per_token(q.config, DOC_LENGTHS, VOCAB, q.config.windows[stage]) for q in (p, SMALL))
    passes = num_passes(batch, slices, ranks, pass_tokens)
    return batch / ranks / 1000 * flop / small, passes * p.num_params() / SMALL.num_params()


def padded_matrices(c, ranks: int) -> list[int]:
    """Numbers sent for each shape: a rank owns whole matrices, or padding where there are too few."""
    return [math.ceil(n / ranks) * ranks * math.prod(shape) for shape, n in matrix_shapes(c).items()]


def transfer_ms(p: Preset, stage: int, ranks: int, m: Machine) -> float:
    """Time a mean step's transfers in bfloat16: gradients are reduce-scattered, new weights all-gathered."""
    tied = (stage + 0.5) / 3 < p.config.untie_frac
    tables = [n for name, n in table_sizes(p.config, VOCAB).items() if name != "embed" or not tied]
    every_step = sum(m.ring_ms(2 * n, ranks) for n in padded_matrices(p.config, ranks))
    adam_steps = sum(m.ring_ms(2 * n, ranks) for n in tables)
    return 2 * (every_step + adam_steps / ADAM_EVERY)


def step_ms(p: Preset, stage: int, ranks: int, m: Machine, pass_tokens: int = MOST_TOKENS) -> float:
    tokens, passes = compute_counts(p, stage, ranks, pass_tokens)
    return m.token_us * tokens + m.pass_ms * passes + transfer_ms(p, stage, ranks, m)


# ---------------------------------------------------------------------------------------------------
# Measured steps
# ---------------------------------------------------------------------------------------------------


def fit(ms: tuple[float, ...]) -> Machine:
    """Fit steps of gpt2-small on one H100, one slice per pass, with the least squares of relative errors."""
    counts = np.array([compute_counts(SMALL, stage, 1, pass_tokens=1) for stage in range(len(ms))])
    token_us, pass_ms = np.linalg.lstsq(counts / np.array(ms)[:, None], np.ones(len(ms)), rcond=None)[0]
    return Machine(float(token_us), float(pass_ms))


def measured_rows() -> list[list]:
    """Rows of the public code, each with its own constants, and of this project with those of FITTED."""
    steps = []
    for code, (one, eight) in PUBLIC.items():
        m = fit(one)
        kind = f"fitted: {m.token_us:.3f} us a token, {m.pass_ms:.2f} ms a pass"
        steps += [(code, 1, one, m, 1, kind), (code, 8, eight, m, 1, "held out")]
    for pass_tokens, ms in OURS.items():
        kind = f"not fitted; FlashAttention-2, longer documents, PASS_TOKENS={pass_tokens}"
        steps.append(("this project", 1, ms, fit(PUBLIC[FITTED][0]), pass_tokens, kind))
    rows = []
    for code, ranks, ms, m, pass_tokens, kind in steps:
        modelled = [step_ms(SMALL, stage, ranks, m, pass_tokens) for stage in range(len(ms))]
        cells = [f"{a:.1f} ({b:.1f}, {b / a - 1:+.1%})" for a, b in zip(ms, modelled)]
        rows.append([code, ranks, *(cells + ["", ""])[:3], kind])
    return rows


# ---------------------------------------------------------------------------------------------------
# A whole schedule
# ---------------------------------------------------------------------------------------------------


def over_schedule(p: Preset, of_stage: Callable[[int], float]) -> float:
    """Sum of_stage(stage) over all steps: three stages of equal length, and the extension."""
    third = p.settings.num_scheduled_iterations / 3
    steps = (third, third, third, p.settings.num_extension_iterations)
    return sum(n * of_stage(stage) for stage, n in enumerate(steps))


def run_ms(p: Preset, ranks: int, m: Machine) -> float:
    return over_schedule(p, lambda stage: step_ms(p, stage, ranks, m))


@functools.cache
def dropped_share(slice_tokens: int) -> float:
    """Share of the tokens read that no slice has: it takes whole documents, and its last one is cut."""
    filled = dropped = 0
    for length in DOC_LENGTHS:
        taken = min(length, slice_tokens - filled)
        filled, dropped = (filled + taken) % slice_tokens, dropped + length - taken
    return dropped / DOC_LENGTHS.sum()


def forecast_gib(p: Preset, ranks: int) -> float:
    """Forecast a rank's memory as the trainer does, with the largest passes that still help."""
    slices = count_slices(p.settings, ranks), count_val_slices(ranks)
    sharing = SimpleNamespace(world_size=ranks, device=torch.device("cpu"))
    memory = Memory(p.settings, NorMuonSettings(), p.config, VOCAB, *slices, sharing)
    return max(memory.wanted(memory.largest_pass()), memory.validation()) / GIB


def run_row(p: Preset, ranks: int, m: Machine) -> dict[str, object]:
    """Describe a whole run as a row of the table."""
    batches, slices = p.settings.batch_sizes, count_slices(p.settings, ranks)
    ms, steps = run_ms(p, ranks, m), over_schedule(p, lambda stage: 1)
    tokens = over_schedule(p, lambda stage: batches[stage])
    dropped = over_schedule(p, lambda stage: batches[stage] * dropped_share(batches[stage] // slices))
    speedup = run_ms(p, 1, m) / ms
    return {
        "GPUs": ranks,
        "ms a step": f"{ms / steps:.1f}",
        "minutes": f"{ms / 60_000:.2f}",
        "tokens/s": f"{1000 * tokens / ms:,.0f}",
        "speed-up": f"{speedup:.1f}",
        "of linear": f"{speedup / ranks:.0%}",
        "communication": f"{over_schedule(p, lambda stage: transfer_ms(p, stage, ranks, m)) / ms:.0%}",
        "tokens dropped": f"{dropped / tokens:.0%}",
        "GiB a GPU": f"{forecast_gib(p, ranks):.0f}",
    }


def stops_paying(ms: dict[int, float]) -> str:
    """Name the first doubling of GPUs that does not pay. ms: of a run, by GPUs."""
    for (a, slow), (b, fast) in itertools.pairwise(ms.items()):
        gain = (slow / fast) ** (1 / math.log2(b / a))
        if gain < PAYS:
            return f"from {a} to {b} GPUs, a doubling makes it only {gain:.2f} times as fast"
    return f"every doubling makes it at least {PAYS} times as fast"


# ---------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------


def change(text: str) -> tuple[str, float]:
    (name, _, value), fields = text.partition("="), [f.name for f in dataclasses.fields(Machine)]
    if name not in fields or not float(value) > 0:
        raise argparse.ArgumentTypeError(f"{text}: wanted NAME=VALUE, above 0, of {', '.join(fields)}")
    return name, float(value)


def main(argv: list[str]):
    """Print the tables. Exit code 2 for unusable options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", nargs="+", choices=PRESETS, default=["gpt2-small", "gpt2-medium", "gpt2-1b"]
    )
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--set", type=change, action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    gpus = sorted(set(args.gpus))
    print("Measured steps of gpt2-small, ms (model, error):\n")
    print(format_table(["code", "GPUs", "stage 1", "stage 2", "stage 3", "model"], measured_rows()))
    m = dataclasses.replace(fit(PUBLIC[FITTED][0]), **dict(args.set))
    print("\nMachine, to be changed with --set:", *(f"{k}={v:g}" for k, v in dataclasses.asdict(m).items()))
    for name in args.preset:
        p = read_preset(name)
        try:
            rows = [run_row(p, ranks, m) for ranks in gpus]
        except ValueError as error:
            parser.error(f"--gpus with --preset {name}: {error}")
        print(f"\n{name}: {p.num_params() / 1e6:,.0f}M parameters\n")
        print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
        print(f"\n{stops_paying({ranks: run_ms(p, ranks, m) for ranks in gpus})}")


if __name__ == "__main__":
    main(sys.argv[1:])
