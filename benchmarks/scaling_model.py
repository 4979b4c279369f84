"""Model a training step on 1, 8, 16, 64, ... GPUs: its time, what bounds it, where sharding stops paying.

    python benchmarks/scaling_model.py                                   # three presets, 1 to 256 GPUs
    python benchmarks/scaling_model.py --preset gpt2-1b --gpus 8,64 --table markdown --csv out.csv
    python benchmarks/scaling_model.py --set memory_bytes=4.33e12 --set memory_gib=139.8  # H200s
    python benchmarks/scaling_model.py --set network_bytes=25e9 --set matmul_flops=500e12

This is a model, not a measurement. Products run at measured rates; elementwise work and tables move counted
bytes at the rate of a copy; collectives are rings, in the trainers' order; launches cost a fixed time. Every
assumption is a field of Machine below; the tables print them and --set changes them. "H100" in its reason
marks what was measured on one H100 with FlashAttention-2, mostly by kernel in stage 1 of gpt2-small
(records/2026-11-26_first_hour_h100), before rotary was rewritten, which should save 6% of a step
(records/2026-11-26_bytes_between_products). Only gap_s is fitted to the time of a step. Other measured steps,
this project's and the public code's, are printed beside the model's.

The trainers split the work as follows. The global batch has 8 slices, or one per rank if there are more. The
gradients of a bucket are reduce-scattered over all ranks, and the new weights are all-gathered. Matrices of
one shape form a bucket, in which a rank owns whole matrices. A bucket with fewer matrices than ranks is
padded to one per rank: padding is sent, too, and ranks that own only padding wait.
"""

import argparse
import dataclasses
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analysis.tables import as_csv, format_markdown, format_table  # noqa: E402
from runtime.flops import (  # noqa: E402
    active_matrix_params,
    flop_per_token,
    forward_flop,
    keys_per_token,
    matrix_shapes,
    num_matrix_params,
    padded_vocab,
    polar_flop,
    table_sizes,
)
from runtime.memory import GIB, MOST_TOKENS, SLICES, Memory, usable_bytes  # noqa: E402
from train_gpt import (  # noqa: E402
    ADAM_EVERY,
    PRESETS,
    VAL_SLICES,
    NorMuonSettings,
    Settings,
    count_slices,
)

VOCAB = 50257
NUM_SLICES = SLICES[0]  # the default
ATTENTION_TILE = 128
ATTENTION_PRODUCTS = 7  # per tile: two forward; backward repeats one and adds four
SMALL_BUCKETS = 2  # scalars in fp32, gates in bf16; all-reduced
PARTS = (
    "matmul",
    "head",
    "attention",
    "elementwise",
    "logits",
    "tables",
    "adds",
    "gaps",
    "launches",
    "polar",
    "updates",
    "communication",
)


def assumed(default: float, why: str):
    return dataclasses.field(default=default, metadata={"why": why})


@dataclass(frozen=True)
class Machine:
    """Cluster of H100s with FlashAttention-2. Rates in FLOP/s or bytes/s, times in seconds."""

    square_flops: float = assumed(796e12, "H100: a large square product in bf16; 989e12 on paper")
    matmul_flops: float = assumed(683e12, "H100: products with the matrices, the MLP's with their relu^2")
    head_flops: float = assumed(1388e12, "H100: the head's products in float8")
    attention_flops: float = assumed(293e12, "H100: FlashAttention-2, on the tiles of 128 x 128 computed")
    attention_tiles: float = assumed(
        1, "time that a block of queries takes beside its tiles, in tiles; chosen after three stages"
    )
    attention_bytes: float = assumed(
        15.6, "H100: traffic a number of q, kernels before and after the backward"
    )
    polar_flops: float = assumed(475e12, "H100: batches of 40 and 22 matrices; smaller batches are slower")
    memory_bytes: float = assumed(3.02e12, "H100: a copy; 3.35e12 on paper")
    memory_gib: float = assumed(79.1, "an 80 GB card, as torch reports it")
    crossings: float = assumed(
        71,
        "H100: times that a token's vector of width C crosses memory in a layer, beside products' operands",
    )
    logit_bytes: float = assumed(7.8, "H100: traffic a logit in the loss and its gradient; 6 are counted")
    table_bytes: float = assumed(10, "traffic a table entry and pass: gradient zeroed in fp32, cast; counted")
    add_bytes: float = assumed(6, "traffic a parameter and pass: gradient added to those before; counted")
    adam_bytes: float = assumed(26, "H100: traffic an entry and Adam update")
    matrix_bytes: float = assumed(39, "H100: traffic an entry and NorMuon update")
    gap_s: float = assumed(
        1.4e-3, "H100: of a pass in which no kernel runs: step less profile, both of stage 1"
    )
    nvlink_bytes: float = assumed(370e9, "bus bandwidth of large NCCL rings in a node (450e9 on paper)")
    network_bytes: float = assumed(50e9, "a GPU's network card, 400 Gb/s")
    network_share: float = assumed(0.85, "of that, reached by NCCL; a ring crosses nodes by all cards")
    gpus_per_node: int = assumed(8, "")
    collective_s: float = assumed(15e-6, "to start a collective")
    hop_s: float = assumed(1.5e-6, "a ring's hop inside a node")
    network_hop_s: float = assumed(6e-6, "a ring's hop between nodes")
    launch_s: float = assumed(4e-6, "of CPU time a kernel; no CUDA graphs")
    layer_kernels: float = assumed(66, "H100: kernels a layer and pass; 810 a pass, with the next line's")
    pass_kernels: float = assumed(80, "kernels of a pass beside the layers: embedding, head, loss, tables")
    bucket_kernels: float = assumed(12, "kernels of a bucket's update beside the polar steps' three each")
    mean_doc_tokens: float = assumed(700, "FineWeb's, about; lengths are log-normal")
    median_doc_tokens: float = assumed(420, "FineWeb's, about")
    max_doc_tokens: int = assumed(2048, "longer documents are cut")

    def ring(self, num_bytes: float, ranks: int) -> float:
        """Seconds of a reduce-scatter or all-gather of num_bytes over `ranks` GPUs.

        A ring over whole nodes uses all network cards of a node.
        """
        if ranks == 1:
            return 0.0
        nodes = math.ceil(ranks / self.gpus_per_node)
        rate, hops = self.nvlink_bytes, ranks * self.hop_s
        if nodes > 1:
            rate = min(rate, self.network_bytes * self.network_share * self.gpus_per_node)
            hops = (ranks - nodes) * self.hop_s + nodes * self.network_hop_s
        return self.collective_s + hops + num_bytes * (ranks - 1) / ranks / rate


# ---------------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------------


class Slices(NamedTuple):
    lengths: np.ndarray  # lengths of the document pieces that are trained on
    dropped: float  # share of the tokens read that fit into no slice


@functools.cache
def draw_slices(slice_tokens: int, m: Machine) -> Slices:
    """Fill slices of this size with random whole documents, the same each time; each slice's last is cut."""
    sigma = math.sqrt(2 * math.log(m.mean_doc_tokens / m.median_doc_tokens))
    drawn = np.random.default_rng(0).lognormal(math.log(m.median_doc_tokens), sigma, 20_000)
    pieces, filled, dropped = [], 0, 0
    for length in np.clip(drawn, 16, m.max_doc_tokens).astype(int).tolist():
        take = min(length, slice_tokens - filled)
        pieces.append(take)
        filled, dropped = filled + take, dropped + length - take
        filled = 0 if filled == slice_tokens else filled
    return Slices(np.array(pieces), dropped / (dropped + sum(pieces)))


# ---------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------


def owned(matrices: int, ranks: int) -> int:
    """Number of matrices of one shape per rank, padding included."""
    return math.ceil(matrices / ranks)


def busy_share(matrices: int, ranks: int) -> float:
    """Fraction of the ranks' time in a bucket's update that is real work, not padding or waiting."""
    return matrices / (ranks * owned(matrices, ranks))


def padded_matrix_params(c, ranks: int) -> int:
    """Number of entries stored and sent for all buckets of matrices, padding included."""
    return sum(owned(n, ranks) * ranks * math.prod(shape) for shape, n in matrix_shapes(c).items())


class Bucket(NamedTuple):
    """Seconds of each step of one bucket."""

    reduce_s: float
    update_s: float
    gather_s: float
    polar_s: float  # part of update_s


def bucket_times(m: Machine, entries: float, ranks: int, update_s: float, polar_s: float = 0.0) -> Bucket:
    """Time a bf16 bucket of `entries` numbers, padding included."""
    transfer, zeroing = m.ring(2 * entries, ranks), 2 * entries / m.memory_bytes
    return Bucket(transfer, update_s + zeroing, transfer, polar_s)


def buckets_due(c, m: Machine, ranks: int, adam: bool, tied: bool) -> list[Bucket]:
    """List buckets in the trainers' order: small ones and tables (on Adam's steps), then matrices by size."""
    due = []
    overhead = m.bucket_kernels * m.launch_s
    if adam:
        small = 2 * m.ring(2**14, ranks)  # so few bytes that latency alone counts
        due += [Bucket(small, overhead, 0.0, 0.0)] * SMALL_BUCKETS
        for name, entries in sorted(table_sizes(c, VOCAB).items(), key=lambda item: item[1]):
            if name != "embed" or not tied:
                traffic = entries / ranks * m.adam_bytes / m.memory_bytes
                due.append(bucket_times(m, entries, ranks, max(overhead, traffic)))
    for (rows, columns), n in sorted(matrix_shapes(c).items(), key=lambda item: item[1] * math.prod(item[0])):
        mine = owned(n, ranks)
        polar = mine * polar_flop(rows, columns) / m.polar_flops
        polar = max(polar, 15 * m.launch_s)  # five iterations of three kernels
        traffic = max(overhead, mine * rows * columns * m.matrix_bytes / m.memory_bytes)
        entries = mine * ranks * rows * columns
        due.append(bucket_times(m, entries, ranks, polar + traffic, polar))
    return due


def optimizer_seconds(due: list[Bucket]) -> tuple[float, float]:
    """Return (total seconds, seconds that the GPU waits for transfers).

    All reductions are queued first. A bucket is updated when it has arrived, then gathered. The network does
    one transfer at a time.
    """
    arrived = np.cumsum([b.reduce_s for b in due])
    now, network = 0.0, float(arrived[-1])
    for bucket, here in zip(due, arrived):
        now = max(now, float(here)) + bucket.update_s
        network = max(network, now) + bucket.gather_s
    end = max(now, network)
    return end, end - sum(b.update_s for b in due)


def num_passes(batch_tokens: int, ranks: int, pass_tokens: int = MOST_TOKENS) -> int:
    """Number of passes per rank and step, with slices stacked as in TrainData: at least one per pass."""
    slices = max(NUM_SLICES, ranks)
    return math.ceil(slices // ranks / max(1, pass_tokens * slices // batch_tokens))


def attention_seconds(c, m: Machine, tokens: float, lengths, windows) -> float:
    """Seconds of the tiles computed, each query block's overhead in tiles, and memory traffic."""
    heads = c.num_heads * (c.num_layers - len(c.no_attention))
    keys = keys_per_token(c, lengths, windows, ATTENTION_TILE) + heads * ATTENTION_TILE * m.attention_tiles
    flop = ATTENTION_PRODUCTS * 2 * c.head_dim * keys
    return tokens * (flop / m.attention_flops + heads * c.head_dim * m.attention_bytes / m.memory_bytes)


def step_seconds(
    c,
    m: Machine,
    batch_tokens: int,
    windows,
    ranks: int,
    tied: bool = True,
    pass_tokens: int = MOST_TOKENS,
) -> dict[str, float]:
    """Seconds of each of PARTS, which sum to a mean step. ValueError if the ranks do not fit."""
    slices = max(NUM_SLICES, ranks)
    if slices % ranks or batch_tokens % slices:
        raise ValueError(
            f"{ranks} ranks do not divide {slices} slices of {batch_tokens} tokens; use powers of two"
        )
    tokens, count = batch_tokens / ranks, num_passes(batch_tokens, ranks, pass_tokens)
    lengths = draw_slices(batch_tokens // slices, m).lengths
    forward, sizes = forward_flop(c, lengths, VOCAB, windows), table_sizes(c, VOCAB)
    looked_up = sum(sizes.values()) - sizes.get("embed", 0)  # the head or, if untied, the embedding
    trained = num_matrix_params(c) + (looked_up if tied else sum(sizes.values()))
    parts = {
        "matmul": 3 * tokens * forward.matrices / m.matmul_flops,
        "head": 3 * tokens * forward.head / m.head_flops,
        "attention": attention_seconds(c, m, tokens, lengths, windows),
        "elementwise": tokens * c.num_layers * c.width * 2 * m.crossings / m.memory_bytes,
        "logits": tokens * padded_vocab(VOCAB) * m.logit_bytes / m.memory_bytes,
        "tables": count * looked_up * m.table_bytes / m.memory_bytes,
        "adds": count * trained * m.add_bytes / m.memory_bytes,
        "gaps": count * m.gap_s,
    }
    launches = count * (c.num_layers * m.layer_kernels + m.pass_kernels) * m.launch_s
    parts["launches"] = max(0.0, launches - sum(parts.values()))  # only the part that GPU work does not hide
    parts.update(polar=0.0, updates=0.0, communication=0.0)
    for step in range(ADAM_EVERY):
        due = buckets_due(c, m, ranks, step == 0, tied)
        seconds, waiting = optimizer_seconds(due)
        polar = sum(b.polar_s for b in due)
        parts["polar"] += polar / ADAM_EVERY
        parts["updates"] += (seconds - waiting - polar) / ADAM_EVERY
        parts["communication"] += waiting / ADAM_EVERY
    return parts


# ---------------------------------------------------------------------------------------------------
# A whole schedule
# ---------------------------------------------------------------------------------------------------


class Preset(NamedTuple):
    """Preset on GPUs: the model's config and the trainer's settings."""

    name: str
    config: object
    settings: Settings

    @property
    def steps(self) -> tuple[float, ...]:
        """Number of steps of each stage; the last is the extension."""
        third = self.settings.num_scheduled_iterations / 3
        return third, third, third, self.settings.num_extension_iterations


def read_presets() -> dict[str, Preset]:
    """Read the presets from the trainer's own table."""
    names, presets = {f.name for f in dataclasses.fields(Settings)}, {}
    for name, (config, changed) in PRESETS.items():
        ours = {k: v for k, v in changed.items() if k in names}  # the others are the optimizer's
        presets[name] = Preset(name, config, Settings(**ours, kernels="triton"))
    return presets


def forecast_gib(p: Preset, ranks: int) -> float:
    """Forecast a rank's memory as the trainer does, with the largest passes that still help."""
    slices = count_slices(p.settings, ranks), max(VAL_SLICES, ranks)
    sharing = SimpleNamespace(world_size=ranks, device=torch.device("cpu"))
    memory = Memory(p.settings, NorMuonSettings(), p.config, VOCAB, *slices, sharing)
    return max(memory.wanted(memory.largest_pass()), memory.validation()) / GIB


class Run(NamedTuple):
    """Whole schedule on `ranks` GPUs."""

    preset: str
    ranks: int
    seconds: float
    steps: float
    tokens: float
    parts: dict[str, float]  # seconds
    flop: float
    dropped: float  # share of tokens read and not trained on
    gib: float

    @property
    def ms_step(self) -> float:
        return 1000 * self.seconds / self.steps

    @property
    def bound(self) -> str:
        return max(self.parts, key=self.parts.get)


def run_schedule(p: Preset, m: Machine, ranks: int) -> Run:
    """Model a whole schedule."""
    c, parts, tokens, flop, dropped = p.config, dict.fromkeys(PARTS, 0.0), 0.0, 0.0, 0.0
    for stage, (steps, batch) in enumerate(zip(p.steps, p.settings.batch_sizes)):
        tied = (stage + 0.5) / 3 < c.untie_frac
        seconds = step_seconds(c, m, batch, c.windows[stage], ranks, tied)
        for name, s in seconds.items():
            parts[name] += steps * s
        slices = draw_slices(batch // max(NUM_SLICES, ranks), m)
        tokens += steps * batch
        flop += steps * batch * flop_per_token(c, slices.lengths, VOCAB, c.windows[stage])
        dropped += steps * batch * slices.dropped
    gib = forecast_gib(p, ranks)
    return Run(p.name, ranks, sum(parts.values()), sum(p.steps), tokens, parts, flop, dropped / tokens, gib)


# ---------------------------------------------------------------------------------------------------
# Timed steps, and predictions
# ---------------------------------------------------------------------------------------------------

FA3 = {"attention_flops": 5 / 3 * Machine.attention_flops}  # assumed: its authors found 1.5 to 2 times FA2's
H200 = {"memory_bytes": 4.8 / 3.35 * Machine.memory_bytes, "memory_gib": 139.8}  # same fraction of paper
MIX = {"mean_doc_tokens": 1690, "median_doc_tokens": 957}  # the text on which this project's steps were timed


class Timed(NamedTuple):
    """Measured ms per step of gpt2-small on H100s, in the first stages."""

    what: str
    ranks: int
    ms: tuple[float, ...]
    kind: str
    pass_tokens: int = 1  # one slice a pass
    changes: dict = FA3


TIMED = (  # ours: records/2026-11-26_first_hour_h100; others: logs of the speedrun's public records
    Timed("this project", 1, (216.9,), "set from its profile", MOST_TOKENS, MIX),
    Timed("this project", 1, (math.nan, 448.5, 693.8), "held out", MOST_TOKENS, MIX),
    Timed("PASS_TOKENS=131072", 1, (211.8,), "held out", 2 * MOST_TOKENS, MIX),
    Timed("public, 2026-01-24", 1, (244.7, 447.6, 656.7), "the same model"),
    Timed("public, 2026-01-24", 8, (33.02, 59.12, 84.99), "the same model"),
    Timed("public, 2026-01-19", 8, (33.92, 60.90, 86.78), "other head kernels"),
    Timed("public, before 2026-01-24", 1, (253.9, 466.8, 677.6), "other head kernels"),
    Timed("public, 2026-07-13", 1, (231.0, 430.1, 634.1), "another model"),
    Timed("public, 2026-07-13", 8, (31.38, 56.28, 82.31), "another model"),
)


def modelled_ms(p: Preset, timed: Timed) -> np.ndarray:
    """Model the ms per step of the timed stages; head and embedding are tied in the first two."""
    m, c, ms = dataclasses.replace(Machine(), **timed.changes), p.config, []
    for stage in range(len(timed.ms)):
        batch, windows = p.settings.batch_sizes[stage], c.windows[stage]
        parts = step_seconds(c, m, batch, windows, timed.ranks, stage < 2, pass_tokens=timed.pass_tokens)
        ms.append(1000 * sum(parts.values()))
    return np.array(ms)


def predictions(p: Preset) -> list[tuple[str, str, Run]]:
    """Return rows of (GPUs, attention, schedule)."""
    return [
        (f"{ranks} x {gpu}", code, run_schedule(p, dataclasses.replace(Machine(), **more, **changes), ranks))
        for code, changes in (("FA2", {}), ("FA3", FA3))
        for gpu, more in (("H100", {}), ("H200", H200))
        for ranks in (1, 8)
    ]


def arithmetic_limit(c, flops: float) -> float:
    """Tokens/s if only products with the matrices and the head took time, all at this rate."""
    return flops / (6 * (active_matrix_params(c) + padded_vocab(VOCAB) * c.width))


# ---------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------

PAYS = 1.5  # doubling the GPUs pays if it makes the run this many times as fast


def table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    return format_markdown(header, rows) if markdown else format_table(header, rows)


def run_row(run: Run, one: Run, m: Machine) -> list[str]:
    speedup = one.seconds / run.seconds
    return [
        str(run.ranks),
        f"{run.ms_step:.1f}",
        f"{run.seconds / 60:.2f}",
        f"{run.tokens / run.seconds:,.0f}",
        f"{speedup:.1f}",
        f"{speedup / run.ranks:.0%}",
        f"{run.flop / run.seconds / run.ranks / m.square_flops:.0%}",
        run.bound,
        f"{run.dropped:.0%}",
        f"{run.gib:.0f}" + ("" if run.gib * GIB <= usable_bytes(m.memory_gib * GIB) else " (too much)"),
    ]


RUN_HEADER = [
    "GPUs",
    "ms a step",
    "minutes",
    "tokens/s",
    "speed-up",
    "of linear",
    "of matmul rate",
    "most time",
]
RUN_HEADER += ["tokens dropped", "GiB a GPU"]


def parts_row(run: Run) -> list[str]:
    return [str(run.ranks), *(f"{1000 * run.parts[name] / run.steps:.2f}" for name in PARTS)]


def sharding_row(c, ranks: int) -> list[str]:
    """Describe each matrix bucket's sharding: matrices per rank, fraction of real work, total sent."""
    row = [str(ranks)]
    for n in matrix_shapes(c).values():
        row += [f"{owned(n, ranks)}", f"{busy_share(n, ranks):.0%}"]
    return [*row, f"{padded_matrix_params(c, ranks) / num_matrix_params(c):.2f}"]


def stops_paying(runs: list[Run]) -> str:
    """Describe the first doubling of GPUs that does not pay."""
    for a, b in zip(runs, runs[1:]):
        gain = (a.seconds / b.seconds) ** (1 / math.log2(b.ranks / a.ranks))
        if gain < PAYS:
            return (
                f"from {a.ranks} to {b.ranks} GPUs a doubling makes it only {gain:.3f} times as fast (less "
                f"than {PAYS}); at {b.ranks} most time goes to {b.bound} "
                f"({b.parts[b.bound] / b.seconds:.0%})"
            )
    return f"every doubling shown makes the run at least {PAYS} times as fast"


def print_preset(p: Preset, m: Machine, gpus: list[int], markdown: bool) -> list[Run]:
    c, heading = p.config, "### " if markdown else ""
    runs = [run_schedule(p, m, ranks) for ranks in gpus]
    one = run_schedule(p, m, 1)
    print(
        f"\n{heading}{p.name}: {num_matrix_params(c) / 1e6:.1f}M in matrices, "
        f"{sum(table_sizes(c, VOCAB).values()) / 1e6:.1f}M in tables and head, {one.steps:.0f} steps, "
        f"{one.tokens / 1e6:,.0f}M tokens\n"
    )
    active = active_matrix_params(c) + padded_vocab(VOCAB) * c.width
    print(
        f"arithmetic limit, {active / 1e6:.0f}M matrix parameters in bf16: "
        f"{arithmetic_limit(c, 790e12):,.0f} tokens/s a GPU at 790 TFLOP/s, "
        f"{arithmetic_limit(c, 990e12):,.0f} at 990\n"
    )
    print(table(RUN_HEADER, [run_row(run, one, m) for run in runs], markdown))
    print("\nms of a mean step:\n")
    print(table(["GPUs", *PARTS], [parts_row(run) for run in runs], markdown))
    print(
        "\nmatrices that a rank owns, share of ranks' polar work that is real, and what is sent over what "
        "there is:\n"
    )
    header = [text for (r, k), n in matrix_shapes(c).items() for text in (f"of {n} {r}x{k}", "real")]
    rows = [sharding_row(c, ranks) for ranks in gpus]
    print(table(["GPUs", *header, "sent"], rows, markdown))
    print(f"\n{stops_paying(runs)}")
    return runs


def print_assumptions(m: Machine):
    print("Assumptions (--set NAME=VALUE changes one):")
    for f in dataclasses.fields(m):
        why = f.metadata["why"]
        print(f"  {f.name} = {getattr(m, f.name):g}" + (f": {why}" if why else ""))
    print("  stragglers, data and evaluation cost no time of their own")


def print_timed(p: Preset, markdown: bool):
    print(f"\n{'### ' if markdown else ''}Against steps of gpt2-small that were timed, before any --set\n")
    rows = []
    for timed in TIMED:
        pairs = list(zip(timed.ms, modelled_ms(p, timed)))
        cells = ["" if math.isnan(ms) else f"{ms:.1f} ({x:.1f}, {x / ms - 1:+.1%})" for ms, x in pairs]
        rows.append([f"{timed.ranks} x H100", timed.what, *(cells + ["", ""])[:3], timed.kind])
    header = ["GPUs", "code", *(f"stage {i}, ms (model, error)" for i in (1, 2, 3)), "kind"]
    print(table(header, rows, markdown))


def print_predictions(p: Preset, markdown: bool):
    print(f"\n{'### ' if markdown else ''}Predictions for gpt2-small's whole schedule, before any --set\n")
    rows = [
        [gpus, code, f"{run.ms_step:.1f}", f"{run.tokens / run.seconds:,.0f}", f"{run.seconds:.1f}"]
        for gpus, code, run in predictions(p)
    ]
    print(table(["GPUs", "attention", "ms a step", "tokens/s", "seconds"], rows, markdown))


def write_csv(path: Path, runs: list[Run]):
    header = ["preset", "gpus", "steps", "ms_step", "minutes", "tokens_per_s", "dropped_share", "gib_a_gpu"]
    rows = []
    for r in runs:
        rates = f"{r.ms_step:.4f}", f"{r.seconds / 60:.4f}", f"{r.tokens / r.seconds:.0f}"
        parts = [f"{1000 * r.parts[name] / r.steps:.4f}" for name in PARTS]
        rows.append([r.preset, r.ranks, round(r.steps), *rates, f"{r.dropped:.4f}", f"{r.gib:.2f}", *parts])
    path.write_text(as_csv([*header, *(f"{name}_ms" for name in PARTS)], rows), encoding="utf-8")


def changed(m: Machine, changes: list[str]) -> Machine:
    """Apply NAME=VALUE changes to m; a ValueError names the one that is wrong."""
    fields = {f.name: type(f.default) for f in dataclasses.fields(Machine)}
    values = {}
    for text in changes:
        name, _, value = text.partition("=")
        if name not in fields:
            raise ValueError(f"--set {text}: wanted NAME=VALUE with one of {', '.join(fields)}")
        try:
            values[name] = int(value) if fields[name] is int else float(value)
        except ValueError:
            raise ValueError(f"--set {text}: {value!r} is not a number") from None
        if not values[name] > 0:
            raise ValueError(f"--set {text}: wanted a number above 0")
    return dataclasses.replace(m, **values)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2-small,gpt2-medium,gpt2-1b", help="comma-separated")
    parser.add_argument("--gpus", default="1,8,16,32,64,128,256", help="default %(default)s")
    parser.add_argument("--table", choices=("text", "markdown"), default="text")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change an assumption"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print the tables; return exit code 0, or 2 for unusable options."""
    args = parse(argv)
    markdown = args.table == "markdown"
    try:
        presets = read_presets()
        m = changed(Machine(), args.set)
        names = args.preset.split(",")
        if not set(names) <= set(presets):
            raise ValueError(f"--preset {args.preset}: wanted some of {', '.join(presets)}")
        gpus = sorted({int(part) for part in args.gpus.split(",")})
        if gpus[0] < 1:
            raise ValueError("--gpus wants numbers above 0")
        print_assumptions(m)
        print_timed(presets["gpt2-small"], markdown)
        print_predictions(presets["gpt2-small"], markdown)
        runs = []
        for name in names:
            runs += print_preset(presets[name], m, gpus, markdown)
    except ValueError as error:
        print(f"scaling_model.py: {error}", file=sys.stderr)
        return 2
    if args.csv:
        write_csv(args.csv, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
