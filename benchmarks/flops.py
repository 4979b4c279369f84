"""How many operations and parameters a preset takes: the one place where they are counted.

Everything is a function of a trainer's ModelConfig, the vocabulary and the documents' lengths. No torch. A
FLOP is a multiplication or an addition, so a product of (M, K) and (K, N) is 2 M K N. Backward is twice
forward: one product for the gradient of either factor (tests/test_benchmarks.py checks it against torch's own
counter on the real model). Flash attention's recomputation of the scores is not counted, nor are norms,
softmax, rotary, softcap and embedding lookups (value and n-gram tables cost memory traffic, no FLOP). The
loss on several next tokens reads the same logits, so the head counts once.
"""

import math
from typing import NamedTuple

import numpy as np

VOCAB_MULTIPLE = 128  # as in the trainers
GATE_CHANNELS = 12
POLAR_STEPS = 5


def padded_vocab(vocab: int) -> int:
    """Rows of the head and of every table that a token indexes."""
    return math.ceil(vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# ---------------------------------------------------------------------------------------------------
# The model's products
# ---------------------------------------------------------------------------------------------------


def visible_pairs(lengths, window: int) -> int:
    """Pairs (query, key) with 0 <= query - key <= window, over all documents of these lengths in tokens."""
    lengths = np.atleast_1d(np.asarray(lengths, dtype=np.int64))
    rising = np.minimum(lengths, window + 1)  # queries that see all that came before them
    return int((rising * (rising + 1) // 2 + (lengths - rising) * (window + 1)).sum())


def visible_keys(lengths, window: int) -> float:
    """Keys that a query sees, the mean over all tokens of documents of these lengths."""
    return visible_pairs(lengths, window) / int(np.sum(lengths))


def layer_windows(c, windows: tuple[int, int]) -> list[int | None]:
    """Each layer's window in tokens, None where it has no attention. windows: (short, long) in blocks."""
    return [
        None if i in c.no_attention else windows[i in c.long_layers] * c.window_block
        for i in range(c.num_layers)
    ]


def keys_per_token(c, lengths, windows: tuple[int, int]) -> float:
    """Keys seen by one token's queries, summed over layers and query heads. A paired layer has half as many
    heads on documents twice as long, with the same window."""
    total = 0.0
    for i, window in enumerate(layer_windows(c, windows)):
        if window is not None:
            times = 2 if i in c.paired_layers else 1
            total += c.num_heads * visible_keys(np.multiply(lengths, times), window)
    return total


class Forward(NamedTuple):
    """FLOP of the forward pass for one token."""

    matrices: float  # attention's four and the MLP's two, or a token's experts' and the router
    head: float
    attention: float  # scores and mixing
    gates: float  # from 12 channels, a head each

    @property
    def total(self) -> float:
        return sum(self)


def forward_flop(c, lengths, vocab: int, windows: tuple[int, int] | None = None) -> Forward:
    """For one token of such documents. windows: (short, long) in blocks; None: those of the first stage."""
    with_attention = [i for i in range(c.num_layers) if i not in c.no_attention]
    gates = len(with_attention) * c.num_heads * c.attn_gate
    gates += c.num_kv_heads * len(set(with_attention) & set(c.value_embed_layers))
    return Forward(
        matrices=2 * active_matrix_params(c),
        head=2 * padded_vocab(vocab) * c.width,
        attention=4 * c.head_dim * keys_per_token(c, lengths, windows or c.windows[0]),
        gates=2 * GATE_CHANNELS * gates,
    )


def flop_per_token(c, lengths, vocab: int, windows: tuple[int, int] | None = None) -> float:
    """Of forward and backward."""
    return 3 * forward_flop(c, lengths, vocab, windows).total


# ---------------------------------------------------------------------------------------------------
# Parameters, and the optimizer's products
# ---------------------------------------------------------------------------------------------------


def matrix_shapes(c) -> dict[tuple[int, int], int]:
    """{(rows, columns) as stored: how many matrices}; each entry is one bucket of the optimizer."""
    queries, keys, shapes = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, {}
    attention = [(queries, c.width), (keys, c.width), (keys, c.width), (c.width, queries)]
    for i in range(c.num_layers):
        mlp = [(c.expert_hidden, c.width)] * 2 * c.num_experts or [(4 * c.width, c.width)] * 2
        for shape in [*(attention if i not in c.no_attention else ()), *mlp]:
            shapes[shape] = shapes.get(shape, 0) + 1
    return shapes


def table_sizes(c, vocab: int) -> dict[str, int]:
    """{name: numbers} of head, embedding, n-gram and value tables."""
    V = padded_vocab(vocab)
    sizes = {"head": V * c.width}
    if c.untie_frac < 1:
        sizes["embed"] = V * c.width
    if c.ngram_rows:
        sizes["ngram"] = c.ngram_rows * c.width
    sizes.update({f"value_embeds.{i}": V * c.num_kv_heads * c.head_dim for i in c.value_embed_layers})
    return sizes


def num_matrix_params(c) -> int:
    return sum(n * rows * columns for (rows, columns), n in matrix_shapes(c).items())


def active_matrix_params(c) -> int:
    """Those that one token is multiplied with: of a mixture of experts its k experts', and the router's."""
    if not c.num_experts:
        return num_matrix_params(c)
    idle = (c.num_experts - c.moe_top_k) * 2 * c.expert_hidden * c.width
    return num_matrix_params(c) + c.num_layers * (c.num_experts * c.width - idle)


def polar_flop(rows: int, columns: int, gram: bool = False) -> int:
    """Of one matrix's Polar Express steps, X = a X + (b A + c A A) X with A = X X^T: two long products and a
    short one a step. gram: the CPU's way for long matrices, where all steps work on X X^T."""
    m, n = sorted((rows, columns))
    long, short = 2 * m * m * n, 2 * m**3
    if not gram:
        return POLAR_STEPS * (2 * long + short)
    # X X^T and the last product; each step's square, and but for the first P S P and P Q
    return 2 * long + POLAR_STEPS * short + (POLAR_STEPS - 1) * 3 * short
