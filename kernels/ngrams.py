"""Hashed n-grams: which row of a table stands for a token and those before it, and with which signs.

B slices, T tokens
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Factors of an n-gram's last token, the one before, ... Primes; the first two are the public record's. Times
# any token of GPT-2 they fit int32.
HASH_MULTIPLIERS = (36313, 27191, 40693, 32467, 24281)
SIGN_SEED = 0  # the table of signs is the same in every run


def embed_ngrams(tokens_BT: Tensor, table: Tensor, lengths: tuple[int, ...], signs: Tensor | None) -> Tensor:
    """Sum of the rows of each token's n-grams, (B, T, C); signs, a sign_table(), multiply them."""
    found = []
    for length, rows_BT in zip(lengths, hash_ngrams(tokens_BT, lengths, len(table))):
        x_BTC = F.embedding(rows_BT, table)
        if signs is not None:
            x_BTC = x_BTC * signs[sign_rows(tokens_BT, length, len(signs))].to(x_BTC.dtype)
        found.append(x_BTC)
    return sum(found)


def hash_ngrams(tokens_BT: Tensor, lengths: tuple[int, ...], num_rows: int) -> list[Tensor]:
    """Rows of the hash embedding at each token, for each length; the last row at the beginning of a slice.

    N-grams may span documents. Several lengths in one table are an idea of arXiv 2412.09871; the record has
    bigrams.
    """
    last = num_rows - 1
    return [mix_ngram(tokens_BT, HASH_MULTIPLIERS[:length], last, fill=last) for length in lengths]


def sign_rows(tokens_BT: Tensor, length: int, num_rows: int) -> Tensor:
    """Rows of the table of signs: the n-gram's tokens, exclusive or; 0 where too few precede.

    n-grams that share a row of the hash embedding then differ in half of its signs, so that their gradients
    do not add up alike (the public speedrun's record of 2026-05-20).
    """
    return mix_ngram(tokens_BT, (1,) * length, num_rows, fill=0)


def mix_ngram(tokens_BT: Tensor, multipliers: tuple[int, ...], modulus: int, fill: int) -> Tensor:
    """Exclusive or of each token and those before it, each times its multiplier, modulo `modulus`.

    multipliers: for the token, the one before it, and so on. `fill` where too few tokens come before.
    """
    reach = len(multipliers) - 1
    mixed = multipliers[0] * tokens_BT[:, reach:]
    for back in range(1, reach + 1):
        mixed = mixed ^ (multipliers[back] * tokens_BT[:, reach - back : -back])
    return F.pad(mixed % modulus, (reach, 0), value=fill)[:, : tokens_BT.shape[1]]


def sign_table(num_rows: int, width: int) -> Tensor:
    """Random signs, int8, never trained."""
    drawn = np.random.default_rng(SIGN_SEED).integers(0, 2, (num_rows, width), dtype=np.int8)
    return torch.from_numpy(2 * drawn - 1)
