"""Prefix tokens: for each token the longest proper prefix of its bytes that is a token itself.

A trainer may predict the next token's prefix beside the token (the public speedrun's record of 2026-07-13).
"""

import functools

import numpy as np

from data.shards import BYTE_VOCABULARY, GPT2_MARK, GPT2_VOCABULARY, DataError

NONE = -1  # the token has no prefix


def longest_prefixes(strings: list[bytes]) -> np.ndarray:
    """The prefix of each of these different strings among them, int64; NONE where there is none.

    In sorted order, a stack holds the prefixes of the current string that are tokens, the longest on top.
    """
    found, stack = np.full(len(strings), NONE, dtype=np.int64), []
    for token in sorted(range(len(strings)), key=strings.__getitem__):
        while stack and not strings[token].startswith(strings[stack[-1]]):
            stack.pop()
        if stack:
            found[token] = stack[-1]
        stack.append(token)
    return found


@functools.cache
def prefix_tokens(vocabulary: int) -> np.ndarray:
    """The prefix of each token of a vocabulary, (vocabulary,) int64; NONE for single bytes and the mark.

    Raises ValueError for GPT-2's where tiktoken has no copy of it, and DataError for one whose bytes nobody
    knows.
    """
    if vocabulary == BYTE_VOCABULARY:
        return np.full(vocabulary, NONE, dtype=np.int64)
    if vocabulary != GPT2_VOCABULARY:
        raise DataError(
            f"MODEL predicts prefixes of tokens, but the data's vocabulary, {vocabulary}, is an unknown one; "
            f"use data with GPT-2's ({GPT2_VOCABULARY}) or with bytes ({BYTE_VOCABULARY}), or another MODEL"
        )
    return np.append(longest_prefixes(gpt2_token_bytes()), NONE)


def gpt2_token_bytes() -> list[bytes]:
    """Bytes of GPT-2's tokens by their numbers, without the mark, which is the last."""
    from data.tokenizing import load_gpt2  # late: other models need no tokenizer

    encoding = load_gpt2()
    return [encoding.decode_single_token_bytes(token) for token in range(GPT2_MARK)]
