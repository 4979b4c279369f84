"""Count the FLOP and the parameters of a preset, for the logs' MFU, the forecast of memory, and benchmarks.

Every count is a function of a trainer's ModelConfig, the vocabulary and the document lengths.
A FLOP is a multiplication or an addition, so a product of (M, K) and (K, N) is 2 M K N. The backward pass
counts twice the forward pass: one product for the gradient of each factor. tests/test_benchmarks.py checks
this against torch's own counter on the real model. Not counted: flash attention's recomputation of the
scores, norms, softmax, rotary embedding, softcap, and embedding lookups (value and n-gram tables cost memory
traffic, not FLOP). The loss on several next tokens reads the same logits, so the head counts once.
"""

import math
from typing import NamedTuple

import numpy as np

from kernels.signals import HIDDEN, gate_signals, mudd_signals

VOCAB_MULTIPLE = 128  # as in the trainers
GATE_CHANNELS = 12


def padded_vocab(vocab: int) -> int:
    """Number of rows of the head and of every table indexed by a token."""
    return math.ceil(vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# ---------------------------------------------------------------------------------------------------
# The model's products
# ---------------------------------------------------------------------------------------------------


def visible_pairs(lengths, window: int) -> int:
    """Count the pairs (query, key) with 0 <= query - key <= window in documents of these lengths."""
    lengths = np.asarray(lengths, dtype=np.int64)
    first = np.minimum(lengths, window + 1)  # queries that see their document from its beginning
    return int((first * (first + 1) // 2 + (lengths - first) * (window + 1)).sum())


def visible_keys(lengths, window: int) -> float:
    """Mean number of keys of a query, over all tokens of documents of these lengths."""
    return visible_pairs(lengths, window) / int(np.sum(lengths))


def keys_per_token(c, lengths, windows: tuple[int, int]) -> float:
    """Number of keys that one token's queries see, summed over layers and query heads.

    windows: (short, long) in blocks. A paired layer has half as many heads on documents twice as long, with
    the same window.
    """
    total = 0.0
    for i in range(c.num_layers):
        if i not in c.no_attention:
            window = windows[1] if i in c.long_layers else windows[0]
            times = 2 if i in c.paired_layers else 1
            total += c.num_heads * visible_keys(np.multiply(lengths, times), window * c.window_block)
    return total


class Forward(NamedTuple):
    """FLOP of the forward pass for one token."""

    matrices: float  # attention's four and the MLP's two, or those of a token's experts and the router
    head: float
    attention: float  # scores and mixing
    gates: float  # one per head, from 12 channels
    networks: float  # that make gates and MUDD's coefficients for each token
    composition: float  # mixing of the last layer's heads

    @property
    def total(self) -> float:
        return sum(self)


def forward_flop(c, lengths, vocab: int, windows: tuple[int, int] | None = None) -> Forward:
    """Count one token's forward pass. windows: (short, long) in blocks; None: those of the first stage."""
    with_attention = [i for i in range(c.num_layers) if i not in c.no_attention]
    gates = composition = 0
    if c.attn_gate and not c.gate_layers:
        gates = len(with_attention) * c.num_heads
    by_network = {c.num_layers - 1} if c.mudd else set()
    gates += c.num_kv_heads * len(set(with_attention) & set(c.value_embed_layers) - by_network)
    if c.compose_tokens:
        composition = composition_flop(c, visible_keys(lengths, c.compose_tokens - 1))
    return Forward(
        matrices=2 * active_matrix_params(c),
        head=2 * padded_vocab(vocab) * c.width,
        attention=4 * c.head_dim * keys_per_token(c, lengths, windows or c.windows[0]),
        gates=2 * GATE_CHANNELS * gates,
        networks=2 * HIDDEN * sum(c.width + n for n in network_outputs(c)),
        composition=composition,
    )


def network_outputs(c) -> list[int]:
    """Numbers for each token that each of a model's small networks makes."""
    return [sum(s.size for s in signals) for signals in (*gate_signals(c), *mudd_signals(c))]


def composition_flop(c, keys: float) -> float:
    """Count one token's composition of heads over so many keys: scores, their mixture, and its values."""
    return 2 * c.num_heads * keys * (2 * c.head_dim + 1)


def flop_per_token(c, lengths, vocab: int, windows: tuple[int, int] | None = None) -> float:
    """FLOP of the forward and backward pass for one token."""
    return 3 * forward_flop(c, lengths, vocab, windows).total


def plain_flop_per_token(c, row_tokens: int, vocab: int) -> float:
    """FLOP of the same for train_gpt_simple.py's model, whose tokens see all before them in a row."""
    width = c.num_heads * c.head_dim
    weights = c.num_layers * (4 * width + 8 * c.width) * c.width + padded_vocab(vocab) * c.width
    keys = (row_tokens + 1) / 2
    return 3 * (2 * weights + 4 * c.num_layers * width * keys)


# ---------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------


def matrix_shapes(c) -> dict[tuple[int, int], int]:
    """Count the matrices by stored shape (rows, columns); each entry is one bucket of the optimizer."""
    queries, keys, shapes = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, {}
    attention = [(keys, c.width), (c.width, queries)]
    for num_heads in (c.num_heads, c.num_kv_heads):  # of q and k, in groups of qk_group heads
        group = c.qk_group or num_heads
        attention += [(group * c.head_dim, c.width)] * (num_heads // group)
    for i in range(c.num_layers):
        mlp = [(4 * c.width, c.width)] * 2
        if c.num_experts:
            mlp = [(c.expert_hidden, c.width)] * 2 * c.num_experts
        for shape in [*(attention if i not in c.no_attention else ()), *mlp]:
            shapes[shape] = shapes.get(shape, 0) + 1
    return shapes


def table_sizes(c, vocab: int) -> dict[str, int]:
    """Sizes, in numbers, of the head and of the embedding, n-gram and value tables, by name."""
    V = padded_vocab(vocab)
    sizes = {"head": V * c.width}
    if c.untie_frac < 1:
        sizes["embed"] = V * c.width
    if c.ngram_rows:
        sizes["ngram_table"] = c.ngram_rows * c.width
    sizes.update({f"value_embeds.{i}": V * c.num_kv_heads * c.head_dim for i in c.value_embed_layers})
    return sizes


def num_matrix_params(c) -> int:
    return sum(n * rows * columns for (rows, columns), n in matrix_shapes(c).items())


def active_matrix_params(c) -> int:
    """Parameters that multiply one token; in a mixture of experts, those of its k experts and the router."""
    if not c.num_experts:
        return num_matrix_params(c)
    idle = (c.num_experts - c.moe_top_k) * 2 * c.expert_hidden * c.width
    return num_matrix_params(c) + c.num_layers * (c.num_experts * c.width - idle)
