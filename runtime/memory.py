"""Forecast of a GPU's memory in training, so that a run says before its first step what will not fit.

Beside what it holds all the time (weights, gradients, the optimizer's state), a rank needs memory for one
pass at a time. A pass of training keeps activations of every token until its backward pass has used them. So
the tokens of a pass decide: slices are stacked as far as memory goes, and SLICES makes them shorter.

The counts are those of the twins' model in bfloat16 as it is compiled; tests/test_fullgraph.py compares them
with the tensors that torch's compiler keeps. On an H100, steps of gpt2-small took 2.8% more than forecast.
"""

import contextlib
import math

import torch

from kernels.signals import HIDDEN
from runtime.flops import matrix_shapes, network_outputs, num_matrix_params, padded_vocab, table_sizes
from runtime.ranks import Ranks

GIB = 1 << 30
MOST_TOKENS = 65_536  # tokens of a pass; twice as many save 2% of a step (records/2026-11-26_first_hour_h100)
SLICES = (8, 16, 32, 64)
RESERVED = 1.25 * GIB  # CUDA's context, NCCL's and cuBLAS's buffers
MUDD_WIDTHS = 13  # its sources, and streams and branches around its coefficients
USABLE = 0.92  # share of the rest; freed blocks do not always fit what is wanted next


class OutOfMemory(RuntimeError):
    """Device memory ran out; the message says which setting should help. Exit code 1."""


def held_bytes(c, vocab_size: int, world_size: int, adamw: bool = False) -> float:
    """Weights, gradients and the optimizer's state of one rank, with bfloat16 weights.

    adamw: whether AdamW trains the matrices, too.
    """
    tables = sum(table_sizes(c, vocab_size).values())
    matrices = sum(
        -(-n // world_size) * world_size * rows * columns for (rows, columns), n in matrix_shapes(c).items()
    )
    # the low halves of fp32 masters; Adam's m and v, Muon's momentum
    state = (2 + 8) * tables + (2 + (8 if adamw else 4)) * matrices
    return (2 + 2) * (tables + matrices) + state / world_size


def kept_bytes(c, vocab_size: int, fused: bool) -> float:
    """Bytes that the forward pass of a token keeps for its backward pass.

    fused: with the Triton kernels, whose MLP keeps its hidden layer once.
    """
    width, queries, keys = c.width, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden = 4 * width * (1 if fused else 2)
    if c.num_experts:  # a token's copies for its experts too; never compared with the compiler
        hidden = c.moe_top_k * (2 * c.expert_hidden + 2 * width)
    embeddings = 2 if c.ngram_rows else 1
    kept = embeddings * width + len(c.value_embed_layers) * keys
    for layer in range(c.num_layers):
        kept += hidden
        if layer in c.no_attention:
            kept += 3 * width  # the stream before and after mixing, and its norm
        else:
            # the stream twice more; queries and keys before and after their norm, values, outputs twice
            kept += 5 * width + 4 * queries + 3 * keys
    return 2 * (kept + kept_by_later_parts(c) + padded_vocab(vocab_size))  # and the logits


def kept_by_later_parts(c) -> float:
    """Numbers in bfloat16 that a token keeps for the parts of later records.

    MUDD's share is not derived but taken from what the compiler keeps with 6 and with 11 layers.
    """
    kept = c.num_heads * c.head_dim * len(c.xsa_layers)
    if c.mudd:
        kept += MUDD_WIDTHS * c.width
    if c.compose_tokens:  # probabilities in fp32 over two blocks of keys, and the heads' shares
        kept += 2 * c.num_heads * 2 * c.compose_tokens + c.num_heads * c.head_dim
    return kept + 2 * HIDDEN * len(network_outputs(c))


def usable_bytes(device_bytes: float) -> float:
    """Bytes of a device's memory that a forecast may fill."""
    return USABLE * (device_bytes - RESERVED)


def stacked(slice_tokens: int, num_slices: int, most_tokens: int) -> int:
    """Tokens of a pass that stacks up to so many slices, and one slice at least."""
    return slice_tokens * max(1, min(num_slices, most_tokens // slice_tokens))


class Memory:
    """Forecast for one run, and how many tokens a pass may have.

    pass_tokens: limit of a pass of several slices; a pass has one slice at least. forecasts: False on a CPU,
    for which there is no forecast; passes are then as large as helps.
    """

    def __init__(self, s, o, c, vocab_size: int, num_slices: int, val_slices: int, ranks: Ranks):
        """s, o, c: the twins' settings and model config.

        num_slices, val_slices: numbers of slices in a training and in a validation batch.
        """
        self.s, self.c, self.world_size = s, c, ranks.world_size
        self.slice_tokens = [batch // num_slices for batch in s.batch_sizes]  # by stage
        self.slices_per_rank = num_slices // ranks.world_size
        self.held = held_bytes(c, vocab_size, ranks.world_size, adamw=o.optimizer == "adamw")
        # the logits' gradient takes as much as they do: in float8 it is written by rows and by columns
        self.per_token = kept_bytes(c, vocab_size, s.kernels == "triton") + 2 * padded_vocab(vocab_size)
        # what a pass's gradients take until they are added to those before, one table in fp32 too
        tables = table_sizes(c, vocab_size)
        self.gradients = 2 * (num_matrix_params(c) + sum(tables.values())) + 4 * max(tables.values())
        # compiled, a pass of validation keeps a few layers' outputs, and its logits in pieces
        hidden = 4 * c.width * (1 if s.kernels == "triton" else 2)
        val_slice = s.val_batch_tokens // val_slices
        self.val_tokens = stacked(val_slice, val_slices // ranks.world_size, MOST_TOKENS)  # one pass's
        self.per_val_token = 2 * (7 * c.width + hidden)
        self.logits = 4 * padded_vocab(vocab_size)
        self.device_bytes = self.usable = math.inf
        self.forecasts = ranks.device.type == "cuda"
        if self.forecasts:
            self.device_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
            self.usable = usable_bytes(self.device_bytes)
        room = self.usable - self.held
        fit_pass = room / self.per_token  # tokens of training
        fit_head = (room - self.per_val_token * self.val_tokens) / self.logits  # of validation with logits
        self.pass_tokens = s.pass_tokens or max(1, int(min(MOST_TOKENS, fit_pass, fit_head)))
        # tokens per piece of the validation head
        self.head_tokens = max(self.pass_tokens, *self.slice_tokens)

    def largest_pass(self) -> int:
        """Tokens of the largest pass of any stage."""
        return max(stacked(n, self.slices_per_rank, self.pass_tokens) for n in self.slice_tokens)

    def wanted(self, tokens: int) -> float:
        """Bytes that training with passes of so many tokens takes."""
        return self.held + max(self.per_token * tokens, self.gradients)

    def validation(self) -> float:
        """Bytes that validation takes."""
        logits = self.logits * min(self.head_tokens, self.val_tokens)
        return self.held + self.per_val_token * self.val_tokens + logits

    def fitting_slices(self) -> int | None:
        """Least SLICES beyond the run's own whose slices fit; None if no number of them does."""
        largest = max(self.s.batch_sizes)
        for slices in SLICES:
            fits = self.wanted(largest // max(slices, self.world_size)) <= self.usable
            if slices > self.s.slices and fits and not any(b % (slices * 16) for b in self.s.batch_sizes):
                return slices
        return None

    def advice(self) -> str:
        """Setting that helps a run that does not fit."""
        if self.wanted(self.largest_pass()) <= self.usable < self.validation():
            return f"set VAL_BATCH_TOKENS={self.s.val_batch_tokens // 2}, whose slices are shorter"
        if self.largest_pass() > max(self.slice_tokens):
            smaller = max(*self.slice_tokens, self.largest_pass() // 2)
            return f"set PASS_TOKENS={smaller}, which changes the losses by rounding alone"
        slices = self.fitting_slices()
        if slices:
            return f"set SLICES={slices}, whose shorter slices train on the same number of tokens a step"
        return "set smaller BATCH_SIZES, or take more GPUs: the longest slice of a batch does not fit"

    def announce(self, log):
        """Log the forecast of a run on a GPU, and warn if it exceeds the device."""
        if not self.forecasts:
            return
        tokens = self.largest_pass()
        wanted = max(self.wanted(tokens), self.validation())
        sizes = {"forecast_gib": wanted, "held_gib": self.held, "device_gib": self.device_bytes}
        log.event("memory", **{k: f"{v / GIB:.1f}" for k, v in sizes.items()}, pass_tokens=tokens)
        if wanted > self.usable:
            log.warn(
                f"passes of {tokens:,} tokens, and validation, should take {wanted / GIB:.1f} GiB, and this "
                f"GPU has {self.device_bytes / GIB:.1f}; if they do not fit, {self.advice()}"
            )

    @contextlib.contextmanager
    def explained(self):
        """Raise OutOfMemory, which says what to set, where the device's memory is not enough."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            wanted = max(self.wanted(self.largest_pass()), self.validation()) / GIB
            raise OutOfMemory(
                f"the GPU's memory is too small for passes of {self.largest_pass():,} tokens (forecast: "
                f"{wanted:.1f} GiB of {self.device_bytes / GIB:.1f}); {self.advice()}"
            ) from error
