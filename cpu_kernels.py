"""Passes of the model with hand-written backward passes, for eager torch on a CPU, which walks memory once an
operation; these walk it about half as often. Plain torch, no compiler. What each computes stands beside its
call in the trainers, as the path that CUDA and compiled code take, and tests/test_model.py compares the two,
gradients included. records/2026-11-24_tiny_speed has what they gain.

B sequences, T tokens, H heads, D head dim, C width, F rotary frequencies
E experts, P rows, an expert's together
"""
import ctypes
import functools
import math

import torch
from torch import Tensor

QUERY_BLOCK = 64  # queries that attention takes at once; 32 and 128 were slower with a window of 64


def keep_freed_memory():
    """Tells the C library (glibc; others are left alone) to keep what tensors free for the next ones.

    It gives large blocks back to the system at once and asks for them again, page by page, each zeroed by the
    kernel: a quarter of the processor time of 40 steps of `tiny` with three evaluations (10.6 of 40.3 s; so
    1.4 of 31.0 s).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
        libc.mallopt(M_MMAP_MAX, 0)  # and have everything in it


class Norm(torch.autograd.Function):
    """F.rms_norm in two passes forward and three backward."""

    @staticmethod
    def scale(x):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
        return mean_square.add_(torch.finfo(x.dtype).eps).rsqrt_()

    @staticmethod
    def across(grad, y):
        """grad without its part along y, row by row; times scale this is x's gradient."""
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(-y.size(-1))
        return torch.addcmul(grad, y, along)

    @staticmethod
    def forward(ctx, x):
        scale = Norm.scale(x)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        return Norm.across(grad, y).mul_(scale)


class MLP(torch.autograd.Function):
    """x + relu(norm(x) up^T)^2 down, the second half of a block; up, down (4C, C)."""

    @staticmethod
    def forward(ctx, x_BTC, up, down):
        x = x_BTC.flatten(0, 1)
        scale = Norm.scale(x)
        n = x * scale
        positive = (n @ up.T).relu_()
        hidden = positive * positive
        ctx.save_for_backward(n, scale, positive, hidden, up, down)
        return torch.addmm(x, hidden, down).view_as(x_BTC)

    @staticmethod
    def backward(ctx, grad_BTC):
        n, scale, positive, hidden, up, down = ctx.saved_tensors
        grad = grad_BTC.flatten(0, 1)
        grad_hidden = (grad @ (2 * down).T).mul_(positive)
        grad_x = torch.addcmul(grad, Norm.across(grad_hidden @ up, n), scale)
        return grad_x.view_as(grad_BTC), grad_hidden.T @ n, hidden.T @ grad


def row_products(x_PK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """(P, N): rows up to each end times that expert's matrix; the last end is P."""
    out, start = x_PK.new_empty(x_PK.shape[0], w_EKN.shape[-1]), 0
    for w, end in zip(w_EKN, ends_E.tolist()):
        torch.mm(x_PK[start:end], w, out=out[start:end])
        start = end
    return out


def group_products(x_PK: Tensor, y_PN: Tensor, ends_E: Tensor) -> Tensor:
    """(E, K, N): x^T y over the rows up to each end."""
    out, start = x_PK.new_empty(len(ends_E), x_PK.shape[1], y_PN.shape[1]), 0
    for matrix, end in zip(out, ends_E.tolist()):
        torch.mm(x_PK[start:end].T, y_PN[start:end], out=matrix)
        start = end
    return out


# the same for compiled code, which could not look into ends_E
custom_op = functools.partial(torch.library.custom_op, mutates_args=())
compiled_row_products = custom_op("cpu_kernels::row_products", row_products)
compiled_group_products = custom_op("cpu_kernels::group_products", group_products)
compiled_row_products.register_fake(lambda x, w, ends: x.new_empty(x.shape[0], w.shape[-1]))
compiled_group_products.register_fake(lambda x, y, ends: x.new_empty(len(ends), x.shape[1], y.shape[1]))


class Mix(torch.autograd.Function):
    """The sum of streams, each times a scalar that learns: mix(scalar, stream, scalar, stream, ...)."""

    @staticmethod
    def forward(ctx, *pairs):
        ctx.save_for_backward(*pairs)
        out = pairs[0] * pairs[1]
        for factor, x in zip(pairs[2::2], pairs[3::2]):
            out.add_(x, alpha=factor.item())
        return out

    @staticmethod
    def backward(ctx, grad):
        pairs, flat = ctx.saved_tensors, grad.flatten()
        return tuple(g for factor, x in zip(pairs[::2], pairs[1::2])
                     for g in (flat @ x.flatten(), grad * factor))


class Rotate(torch.autograd.Function):
    """Rotary embedding of the first half of the last dimension, pairs as complex numbers turned in place."""

    @staticmethod
    def turn(x, cis):
        y = x.clone(memory_format=torch.contiguous_format)
        torch.view_as_complex(y.unflatten(-1, (-1, 2))[..., :cis.size(-1), :]).mul_(cis)
        return y

    @staticmethod
    def forward(ctx, x_BTHD, cis_T1F):
        ctx.save_for_backward(cis_T1F)
        return Rotate.turn(x_BTHD, cis_T1F)

    @staticmethod
    def backward(ctx, grad):
        return Rotate.turn(grad, ctx.saved_tensors[0].conj()), None


class Attention(torch.autograd.Function):
    """Softmax attention in blocks of QUERY_BLOCK queries, each against the keys that its window reaches. The
    probabilities are kept for backward: they are few here, and torch's kernel computes them anew."""

    @staticmethod
    def forward(ctx, q_BTHD, k_BTHD, v_BTHD, masks, scale):
        B, T, H, D = q_BTHD.shape
        q, k, v = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q_BTHD, k_BTHD, v_BTHD))
        y, probabilities = torch.empty_like(q), []
        for queries, keys, bias in masks:
            scores = torch.bmm(q[:, queries], k[:, keys].mT).unflatten(0, (B, H))
            p = torch.add(bias, scores, alpha=scale, out=scores).softmax(-1).flatten(0, 1)
            y[:, queries] = torch.bmm(p, v[:, keys])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.blocks, ctx.scale = [mask[:2] for mask in masks], scale
        return y.view(B, H, T, D).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad_BTHD):
        q, k, v, *probabilities = ctx.saved_tensors
        grad = grad_BTHD.transpose(1, 2).reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), p in zip(ctx.blocks, probabilities):
            dv[:, keys] += torch.bmm(p.mT, grad[:, queries])
            dp = torch.bmm(grad[:, queries], v[:, keys].mT)
            dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, queries] = torch.bmm(dscores, k[:, keys])
            dk[:, keys] += torch.bmm(dscores.mT, q[:, queries])
        grads = dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv
        return *(x.unflatten(0, (len(grad_BTHD), -1)).transpose(1, 2) for x in grads), None, None


def query_blocks(doc_BT: Tensor, window: int) -> list[tuple[slice, slice, Tensor]]:
    """(queries, keys, bias) for Attention, from the document of each token: query i sees key j of its
    document where 0 <= i - j <= window. bias is 0 or -inf, (B, 1, queries, keys)."""
    blocks, T = [], doc_BT.shape[1]
    for start in range(0, T, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, T))
        keys = slice(max(0, start - window), queries.stop)
        same = doc_BT[:, queries, None] == doc_BT[:, None, keys]
        bias = band_bias(queries.stop - start, start - keys.start, window)
        blocks.append((queries, keys, torch.where(same, bias, -math.inf).unsqueeze(1)))
    return blocks


@functools.cache
def band_bias(num_queries: int, num_before: int, window: int) -> Tensor:
    """0 where a query sees a key, else -inf; the keys are num_before earlier ones and the queries' own."""
    ago = torch.arange(num_queries)[:, None] + num_before - torch.arange(num_before + num_queries)
    return torch.zeros(ago.shape).masked_fill_((ago < 0) | (ago > window), -math.inf)
