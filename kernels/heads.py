"""Parts of attention in later records: heads in groups; XSA and composition, before the heads' gates.

Plain torch. The public record runs the composition in a kernel of its own; docs/differences.md says what that
would bring.

B slices, T tokens, H query heads of D channels, C width; n blocks of i queries and j keys
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

XSA_EPS, COMPOSE_EPS = 1e-8, 1e-6


def grouped_shape(num_heads: int, c) -> tuple[int, ...]:
    """Shape of q or k: (H D, C), or one matrix for each group of qk_group heads."""
    if not c.qk_group:
        return num_heads * c.head_dim, c.width
    return num_heads // c.qk_group, c.qk_group * c.head_dim, c.width


def in_head_order(w: Tensor, head_dim: int) -> Tensor:
    """(H D, C) of a q or k that may be stored in n groups.

    Group g holds heads g, g + n, g + 2n, ...: two heads in a group are those that a paired layer joins.
    """
    if w.ndim == 2:
        return w
    return w.unflatten(1, (-1, head_dim)).transpose(0, 1).flatten(0, 2)


def without_own_value(y_BTHD: Tensor, v_BTHD: Tensor, alpha: Tensor) -> Tensor:
    """y less tanh(alpha) of its part along the token's own value: XSA (arXiv 2603.09078).

    alpha: one number per head, or per token and head.
    """
    v = v_BTHD.repeat_interleave(y_BTHD.shape[2] // v_BTHD.shape[2], dim=2)
    along = (y_BTHD * v).sum(-1) / (v * v).sum(-1).clamp_min(XSA_EPS)
    return y_BTHD - (torch.tanh(alpha) * along).unsqueeze(-1) * v


def compose_heads(q, k, v, doc_BT, scale: float, reach: int, from_BTH: Tensor, into_BTH: Tensor) -> Tensor:
    """The part of all heads' attention that each head gets: dynamic composition (arXiv 2405.08553), trimmed.

    q, k, v: (B, T, H, D). doc_BT: the document of each token. The heads' probabilities over the last `reach`
    positions of the document add up, weighted by the token's `from_BTH`; each head gets the values under that
    sum, times `into_BTH`. Each block of `reach` queries sees its own keys and those of the block before.
    """
    T, pad = q.shape[1], -q.shape[1] % reach
    q, doc = token_blocks(q, reach, pad), token_blocks(doc_BT, reach, pad, fill=-1)
    k, v = (with_previous_block(token_blocks(x, reach, pad), dim=2) for x in (k, v))
    scores = torch.einsum("bnihd,bnjhd->bnhij", q, k) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    ago = torch.arange(reach, device=q.device)[:, None] + reach - torch.arange(2 * reach, device=q.device)
    same = doc[..., None] == with_previous_block(doc, dim=2, fill=-2)[..., None, :]
    seen = ((ago >= 0) & (ago < reach) & same).unsqueeze(2)
    p = scores.masked_fill(~seen, -math.inf).softmax(-1)
    weights = F.rms_norm(from_BTH.to(p.dtype), (from_BTH.shape[-1],), eps=COMPOSE_EPS)
    mixture = torch.einsum("bnih,bnhij->bnij", token_blocks(weights, reach, pad), p).to(v.dtype)
    y = torch.einsum("bnij,bnjhd->bnihd", mixture, v).flatten(1, 2)[:, :T]
    return into_BTH.unsqueeze(-1) * y


def token_blocks(x: Tensor, block: int, pad: int, fill: int = 0) -> Tensor:
    """(B, n, block, ...) of (B, T, ...), T lengthened by `pad`."""
    return padded(x, 0, pad, fill).unflatten(1, (-1, block))


def with_previous_block(x: Tensor, dim: int, fill: int = 0) -> Tensor:
    """Join each block, dimension 1, with the one before it along `dim`; `fill` stands before the first."""
    before = padded(x, 1, 0, fill)[:, :-1]
    return torch.cat((before, x), dim)


def padded(x: Tensor, before: int, after: int, fill: int) -> Tensor:
    """Lengthen dimension 1 by `fill` at both ends."""
    later = [0, 0] * (x.ndim - 2)  # F.pad counts dimensions from the last one
    return F.pad(x, (*later, before, after), value=fill)
