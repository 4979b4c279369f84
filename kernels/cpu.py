"""Fast forms for a CPU: hand-written passes, because a step of a small model is memory-bound there.

kernels.fast_forms puts them in the place of a trainer's own functions. Each make_ function takes the trainer
and returns the fast form, with the arguments of the function that it replaces.

Channels in capitals as in the trainers: B slices, T tokens, H heads, K key and value heads, D head dim, C
width; P positions a token (2 in a paired layer)
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

QUERY_BLOCK = 64  # queries that attention takes at once; 32 and 128 were slower with a window of 64


def norm_scale(x: Tensor) -> Tensor:
    """1 / rms(x) over the last dimension."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
    return mean_square.add_(torch.finfo(x.dtype).eps).rsqrt_()


def norm_across(grad: Tensor, y: Tensor) -> Tensor:
    """grad without its part along y = x / rms(x), row by row; times norm_scale(x) it is x's gradient."""
    along = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(-y.size(-1))
    return torch.addcmul(grad, y, along)


class MLP(torch.autograd.Function):
    """x + relu(norm(x) up^T)^2 down, the second half of a block; up, down (4C, C). adds_x: with x, or not."""

    @staticmethod
    def forward(ctx, x_BTC, up, down, adds_x):
        x = x_BTC.flatten(0, 1)
        scale = norm_scale(x)
        n = x * scale
        positive = (n @ up.T).relu_()
        hidden = positive * positive
        ctx.save_for_backward(n, scale, positive, hidden, up, down)
        ctx.adds_x = adds_x
        y = torch.addmm(x, hidden, down) if adds_x else hidden @ down
        return y.view_as(x_BTC)

    @staticmethod
    def backward(ctx, grad_BTC):
        n, scale, positive, hidden, up, down = ctx.saved_tensors
        grad = grad_BTC.flatten(0, 1)
        grad_hidden = (grad @ (2 * down).T).mul_(positive)
        grad_x = norm_across(grad_hidden @ up, n)
        grad_x = torch.addcmul(grad, grad_x, scale) if ctx.adds_x else grad_x.mul_(scale)
        return grad_x.view_as(grad_BTC), grad_hidden.T @ n, hidden.T @ grad, None


class Layout(NamedTuple):
    """Head layout of one layer. Attention walks the heads as (B, H/P, T, P, D), with P = 2 positions a token
    where heads h and h + H/2 are paired, else 1."""

    num_heads: int
    num_kv_heads: int
    paired: bool
    offset: bool  # the half of a key that rotary leaves standing comes one token later

    def walked(self, x_BTHD: Tensor) -> Tensor:
        """The same numbers in that order, a view."""
        return x_BTHD.unflatten(2, (1 + self.paired, -1)).permute(0, 3, 1, 2, 4)

    def split(self, x_BTHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of one product's (B, T, H + 2K, D), each as walked; views."""
        sizes = self.num_heads, self.num_kv_heads, self.num_kv_heads
        return tuple(self.walked(x) for x in x_BTHD.split(sizes, dim=2))


def turn(x: Tensor, cis: Tensor):
    """Rotary embedding in place, of x as walked: pairs of the first half of D as complex numbers, times cis
    (T * P, F)."""
    pairs = x[..., : 2 * cis.size(-1)].unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(cis.view(*x.shape[2:4], -1))


def split_heads(raw_BTHD: Tensor, cis: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as walked, q and k normed and turned, the keys offset; and what norm multiplied by."""
    scale_BTH1 = norm_scale(raw_BTHD[:, :, : layout.num_heads + layout.num_kv_heads])
    factors = scale_BTH1.split((layout.num_heads, layout.num_kv_heads), dim=2)
    raws = layout.split(raw_BTHD)
    q, k, v = (x.new_empty(x.shape) for x in raws)
    for x, raw, factor in zip((q, k), raws, factors):
        torch.mul(raw, layout.walked(factor), out=x)
    if layout.offset:
        still = k[..., k.size(-1) // 2 :]
        still[:, :, 1:] = still[:, :, :-1].clone()
    turn(q, cis), turn(k, cis)
    return q, k, v.copy_(raws[2]), scale_BTH1


def split_heads_backward(dq, dk, dv, raw_BTHD, scale_BTH1, cis, layout: Layout) -> Tensor:
    """The gradient of raw_BTHD."""
    grad_BTHD = torch.empty_like(raw_BTHD)
    q, k, v = layout.split(grad_BTHD)
    dq, dk, dv = dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
    q.copy_(dq), k.copy_(dk), v.copy_(dv)
    if layout.offset:  # the first key's half went to two tokens, the last one's to none
        still, late = (x[..., x.size(-1) // 2 :] for x in (k, dk))
        still[:, :, :-1], still[:, :, -1] = late[:, :, 1:], 0
        still[:, :, 0] += late[:, :, 0]
    turn(q, cis.conj()), turn(k, cis.conj())
    grad, raw = (x[:, :, : scale_BTH1.size(2)] for x in (grad_BTHD, raw_BTHD))
    along = torch.linalg.vecdot(grad, raw).unsqueeze(-1).mul_(scale_BTH1 * scale_BTH1).div_(-raw.size(-1))
    grad.addcmul_(raw, along).mul_(scale_BTH1)
    return grad_BTHD


def attend(q_BHTD, k_BKTD, v_BKTD, masks, scale: float) -> tuple[Tensor, list[Tensor]]:
    """Softmax attention in blocks of queries, each against the keys that its window reaches (query_blocks);
    and its probabilities, kept for backward: they are few here, and torch's kernel computes them anew."""
    q, k, v = share_keys(q_BHTD, k_BKTD, v_BKTD)
    y, probabilities = torch.empty_like(q), []
    for queries, keys, bias in masks:
        scores = torch.bmm(q[:, queries], k[:, keys].mT).unflatten(0, (len(bias), -1))
        p = torch.add(bias, scores, alpha=scale, out=scores).softmax(-1).flatten(0, 1)
        y[:, queries] = torch.bmm(p, v[:, keys])
        probabilities.append(p)
    return y.view(q_BHTD.shape), probabilities


def attend_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, blocks, scale: float, probabilities):
    """Gradients of q, k, v. blocks: (queries, keys) of each mask."""
    q, k, v = share_keys(q_BHTD, k_BKTD, v_BKTD)
    grad = grad_BHTD.flatten(0, 1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (queries, keys), p in zip(blocks, probabilities):
        dv[:, keys] += torch.bmm(p.mT, grad[:, queries])
        dp = torch.bmm(grad[:, queries], v[:, keys].mT)
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq[:, queries] = torch.bmm(dscores, k[:, keys])
        dk[:, keys] += torch.bmm(dscores.mT, q[:, queries])
    dq, dk = dq.mul_(scale).view(q_BHTD.shape), dk.mul_(scale)
    B, K, T, D = k_BKTD.shape
    if len(k) > B * K:  # a shared head's gradients add up
        return dq, dk.view(B, K, -1, T, D).sum(2), dv.view(B, K, -1, T, D).sum(2)
    return dq, dk.view(B, K, T, D), dv.view(B, K, T, D)


def share_keys(q_BHTD, k_BKTD, v_BKTD) -> tuple[Tensor, Tensor, Tensor]:
    """The three as (B * H, T, D): a key head serves H/K query heads."""
    times = q_BHTD.size(1) // k_BKTD.size(1)
    if times > 1:
        k_BKTD, v_BKTD = k_BKTD.repeat_interleave(times, 1), v_BKTD.repeat_interleave(times, 1)
    return q_BHTD.flatten(0, 1), k_BKTD.flatten(0, 1), v_BKTD.flatten(0, 1)


class Attention(torch.autograd.Function):
    """x + attention(norm(x)), the first half of a block. w_qkv is ((H + 2K) D, C), w_out (C, H D). attn_gate
    (heads, channels) is that of attention's output, value_gate that of value_BTC, which joins the values; all
    three may be None. One function, and each tensor written at once where the next product wants it: at 128
    channels, walking memory between the products takes a good part of a block's time."""

    @staticmethod
    def forward(ctx, x_BTC, w_qkv, w_out, attn_gate, value_gate, value_BTC, cis, masks, scale, layout):
        B, T, _ = x_BTC.shape
        x, gates_BTH1 = x_BTC.flatten(0, 1), [None, None]
        x_scale = norm_scale(x)
        n = x * x_scale
        for i, gate in enumerate((attn_gate, value_gate)):
            if gate is not None:
                gates_BTH1[i] = torch.sigmoid(n[:, : gate.size(1)] @ gate.T).view(B, T, -1, 1)
        raw = (n @ w_qkv.T).view(B, T, -1, w_out.size(1) // layout.num_heads)
        q, k, v, head_scale = split_heads(raw, cis, layout)
        if value_BTC is not None:
            value = layout.walked(value_BTC.view(B, T, layout.num_kv_heads, -1))
            v.addcmul_(value, layout.walked(gates_BTH1[1]), value=2)
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        y, probabilities = attend(q, k, v, masks, scale)
        gated = torch.empty_like(raw[:, :, : layout.num_heads])
        target = layout.walked(gated)
        if attn_gate is None:
            target.copy_(y.view(target.shape))
        else:
            torch.mul(y.view(target.shape), layout.walked(gates_BTH1[0]), out=target)
        gated = gated.view(B * T, -1)
        ctx.save_for_backward(
            w_qkv,
            w_out,
            attn_gate,
            value_gate,
            value_BTC,
            cis,
            x_scale,
            n,
            raw,
            head_scale,
            *gates_BTH1,
            q,
            k,
            v,
            y,
            gated,
            *probabilities,
        )
        ctx.blocks, ctx.scale, ctx.layout = [mask[:2] for mask in masks], scale, layout
        return torch.addmm(x, gated, w_out.T).view_as(x_BTC)

    @staticmethod
    def backward(ctx, grad_BTC):
        (
            w_qkv,
            w_out,
            attn_gate,
            value_gate,
            value_BTC,
            cis,
            x_scale,
            n,
            raw,
            head_scale,
            attn_gate_BTH1,
            value_gate_BTH1,
            q,
            k,
            v,
            y,
            gated,
            *probabilities,
        ) = ctx.saved_tensors
        layout, (B, T, _, D) = ctx.layout, raw.shape
        grad, along_attn, along_value, d_value = grad_BTC.flatten(0, 1), None, None, None
        dy = layout.walked((grad @ w_out).view(B, T, -1, D))
        if attn_gate is not None:
            dy = torch.mul(dy, layout.walked(attn_gate_BTH1), out=y.new_empty(dy.shape))
            along_attn = torch.empty_like(attn_gate_BTH1)  # the gate times its gradient, then the sigmoid's
            layout.walked(along_attn).squeeze(-1).copy_(torch.linalg.vecdot(dy, y.view(dy.shape)))
            along_attn.mul_(1 - attn_gate_BTH1)
        dq, dk, dv = attend_backward(dy.flatten(2, 3), q, k, v, ctx.blocks, ctx.scale, probabilities)
        d_raw = split_heads_backward(dq, dk, dv, raw, head_scale, cis, layout)
        if value_BTC is not None:
            dv = d_raw[:, :, -layout.num_kv_heads :] * (2 * value_gate_BTH1)
            along_value = torch.linalg.vecdot(dv, value_BTC.view(dv.shape)).unsqueeze(-1)
            along_value.mul_(1 - value_gate_BTH1)
            d_value = dv.view_as(value_BTC)
        d_raw = d_raw.view(B * T, -1)
        dn = d_raw @ w_qkv
        d_gates = [
            Attention.gate_backward(*x, n, dn) for x in ((along_attn, attn_gate), (along_value, value_gate))
        ]
        dx = torch.addcmul(grad, norm_across(dn, n), x_scale).view_as(grad_BTC)
        return dx, d_raw.T @ n, grad.T @ gated, *d_gates, d_value, None, None, None, None

    @staticmethod
    def gate_backward(grad_BTH1, gate, n, dn):
        """The gate's gradient, from that before the sigmoid; dn gets its share."""
        if gate is None:
            return None
        grad, channels = grad_BTH1.view(len(n), -1), gate.size(1)
        dn[:, :channels] += grad @ gate
        return grad.T @ n[:, :channels]


def query_blocks(doc_BT: Tensor, window: int) -> list[tuple[slice, slice, Tensor]]:
    """(queries, keys, bias) for attend, from the document of each token: query i sees key j of its
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


# ---------------------------------------------------------------------------------------------------
# In place of the trainer's functions
# ---------------------------------------------------------------------------------------------------


def covers_attention(o, c) -> bool:
    """Return whether make_attention_forward knows this model's attention."""
    return not (c.branch_factors or c.qk_group or c.value_gate_reads_table or c.xsa_layers)


def make_attention_forward(module, compiler):
    def forward(self, x_BTC, value_BTC, signals: dict, common):
        plan, docs, rotary = self.plan, common.docs, common.rotary
        window = common.windows[int(plan.long_window)]
        key = window, plan.paired
        later_parts = signals or self.gate_reads_table or plan.xsa or self.q.ndim == 3
        assert self.adds_input and not later_parts, "covers_attention lets another model pass"
        if key not in docs.query_blocks:
            docs.query_blocks[key] = query_blocks(docs.doc_ids(plan.paired), window)
        num_positions = x_BTC.shape[1] * (2 if plan.paired else 1)
        cis = torch.complex(rotary.cos[:num_positions], rotary.sin[:num_positions])
        return Attention.apply(
            x_BTC,
            torch.cat((self.q, self.k, self.v)) * self.qkv_lambda,
            self.o * (common.out_scale * self.o_lambda),
            self.attn_gate,
            self.value_gate,
            value_BTC,
            cis.to(x_BTC.dtype.to_complex()),
            docs.query_blocks[key],
            rotary.scale,
            Layout(self.num_heads, self.num_kv_heads, plan.paired, plan.long_window),
        )

    return forward


def make_mlp_forward(module, compiler):
    def forward(self, x_BTC, out_scale: float):
        down = self.down if out_scale == 1 else self.down * out_scale
        return MLP.apply(x_BTC, self.up, down, self.adds_input)

    return forward


def make_polar_express(module, compiler):
    """Tall matrices are multiplied from the right, by polynomials in X^T X: transposing is slow here."""

    def polar_express(G_NRK, dtype):
        tall = G_NRK.size(-2) > G_NRK.size(-1)
        norm = G_NRK.norm(dim=(-2, -1), keepdim=True)
        X = (G_NRK / (module.POLAR_SAFETY * norm + module.POLAR_EPS)).to(dtype)
        if max(X.shape[-2:]) >= 2 * min(X.shape[-2:]):
            Q = gram_space(X.mT @ X if tall else X @ X.mT, module.POLAR_COEFFICIENTS)
            return (X @ Q.mT if tall else Q @ X).float()
        for a, b, c in module.POLAR_COEFFICIENTS:
            A = X.mT @ X if tall else X @ X.mT
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)
            X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
        return X.float()

    return polar_express


def gram_space(S_NRR: Tensor, coefficients) -> Tensor:
    """Q such that the steps take X to Q X for S = X X^T, and X to X Q^T for S = X^T X.

    Each step multiplies X by a polynomial in S, so a long X is touched twice in all, not in every step. S has
    the squares of the singular values, hence fp32. All its polynomials commute but for rounding, which Q's
    order keeps small.
    """
    Q = P = polynomial(S_NRR, *coefficients[0])
    for step in coefficients[1:]:
        S_NRR = P @ S_NRR @ P
        P = polynomial(S_NRR, *step)
        Q = P @ Q
    return Q


def polynomial(S_NRR: Tensor, a: float, b: float, c: float) -> Tensor:
    """a I + b S + c S S."""
    P = torch.baddbmm(S_NRR, S_NRR, S_NRR, beta=b, alpha=c)
    P.diagonal(dim1=-2, dim2=-1).add_(a)
    return P
