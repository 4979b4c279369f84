"""Mixture of experts, in place of an MLP: each token goes to the k experts with the largest router logits.

E experts of F hidden channels, B slices of T tokens, M tokens of a pass, C width, k experts per token; P
rows: the (token, expert) pairs, sorted by expert
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE_STREAM = 3  # random stream of the seed; train_gpt.py lists all of them
GROUP_MULTIPLE = 8  # rows of a group on CUDA: 16 bytes of bfloat16, which grouped_mm asks for


class Routing:
    """Router noise that goes into a pass, and router statistics that come out, one entry per layer."""

    def __init__(self, noise_LBTE: Tensor | None = None):
        self.noise_LBTE = noise_LBTE
        # E sum_i f_i P_i of MixtureOfExperts, summed over the slices; an even load is 1 per slice
        self.balance = []
        self.loads_E = []  # tokens that went to each expert


class MixtureOfExperts(nn.Module):
    """Experts weighted by the softmax of their k router logits (arXiv 1701.06538, 2401.04088).

    No expert has a limit, so no token is dropped. The balance loss (arXiv 2101.03961) is taken slice by
    slice: f_i is expert i's share of a slice's pairs, P_i the slice's mean router probability. So the loss
    does not depend on the number of ranks; over the global batch it would need a collective in forward.
    """

    def __init__(self, width: int, num_experts: int, hidden: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Parameter(torch.empty(num_experts, width))  # fp32 everywhere
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, n_BTC: Tensor, out_scale: float, routing: Routing) -> Tensor:
        num_experts = len(self.router)
        logits_BTE = F.linear(n_BTC.type_as(self.router), self.router)
        if routing.noise_LBTE is not None:
            logits_BTE = logits_BTE + routing.noise_LBTE[len(routing.loads_E)]
        experts_BTk = logits_BTE.topk(self.top_k).indices
        chosen_BTkE = experts_BTk.unsqueeze(-1) == torch.arange(num_experts, device=n_BTC.device)
        # topk's own values would do, but torch 2.13's inductor loses their gradient beside the balance loss's
        gates_BTk = torch.where(chosen_BTkE, logits_BTE.unsqueeze(-2), 0).sum(-1).softmax(-1)
        load_BE = chosen_BTkE.sum((1, 2))
        share_BE = load_BE.type_as(logits_BTE) / (n_BTC.shape[1] * self.top_k)
        routing.balance.append(num_experts * (share_BE * logits_BTE.softmax(-1).mean(1)).sum())
        routing.loads_E.append(load_BE.sum(0))
        rows = sort_by_expert(
            experts_BTk.flatten(0, 1), routing.loads_E[-1], GROUP_MULTIPLE if is_grouped(n_BTC) else 1
        )
        down = self.down if out_scale == 1 else self.down * out_scale
        y_MC = ExpertMLPs.apply(n_BTC.flatten(0, 1), gates_BTk.flatten(0, 1), self.up, down, *rows)
        return y_MC.view_as(n_BTC)


def draw_noise(seed: int, step: int, slices: range, shape: tuple[int, int, int]) -> Tensor:
    """Normal noise for the router logits of a pass, (L, B, T, E) for shape (L, T, E).

    Each step and slice of the global batch has a stream of its own: the ranks agree, and a resumed run needs
    no state for it.
    """
    streams = (np.random.default_rng([seed, NOISE_STREAM, step, i]) for i in slices)
    return torch.from_numpy(np.stack([stream.standard_normal(shape, np.float32) for stream in streams], 1))


def load_fields(load_LE: Tensor, top_k: int) -> dict[str, str]:
    """Share of all tokens that each layer's busiest and idlest expert got, as fields of the log.

    A token counts with each of its k experts: even is k / E.
    """
    share = load_LE / load_LE.sum(1, keepdim=True) * top_k
    ends = {"moe_load_max": share.amax(1), "moe_load_min": share.amin(1)}
    return {key: "[" + ",".join(f"{x:.4f}" for x in value.tolist()) + "]" for key, value in ends.items()}


def sort_by_expert(experts_Mk: Tensor, counts_E: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arrange the (token, expert) pairs as rows, an expert's together.

    Returns (token of each row, M in padding; row of each pair; where groups end, int32). Shapes do not depend
    on the routing and nothing waits for a device. multiple > 1: groups are filled up to it, empty ones too,
    and some rows follow the last group.
    """
    M, k = experts_Mk.shape
    flat = experts_Mk.flatten()
    order = flat.argsort(stable=True)
    if multiple == 1:
        ends = counts_E.cumsum(0)
        rows, num_rows = torch.arange(M * k, device=flat.device), M * k
    else:
        sizes = (counts_E + multiple - 1).clamp_min(multiple) // multiple * multiple
        ends, num_rows = sizes.cumsum(0), M * k + multiple * (len(counts_E) + 1)
        shift = (ends - sizes) - (counts_E.cumsum(0) - counts_E)  # each group moves by the padding before it
        rows = torch.arange(M * k, device=flat.device) + shift[flat[order]]
    token_P = torch.full((num_rows,), M, device=flat.device).scatter(0, rows, order // k)
    row_Mk = torch.empty_like(rows).scatter(0, order, rows).view(M, k)
    return token_P, row_Mk, ends.int()


class ExpertMLPs(torch.autograd.Function):
    """y_t = sum_j gate_tj W2_e relu(W1_e n_t)^2 over the experts e of token t, for every pair of them.

    up, down (E, F, C); token_P, row_Mk, ends_E as sort_by_expert gives them.
    """

    @staticmethod
    def forward(ctx, n_MC, gates_Mk, up, down, token_P, row_Mk, ends_E):
        ctx.padded = len(token_P) != row_Mk.numel()
        x_PC = take_rows(n_MC, token_P, ctx.padded)
        positive_PF = row_products(x_PC, up.mT, ends_E).relu()
        hidden_PF = positive_PF * positive_PF
        y_PC = row_products(hidden_PF, down, ends_E)
        ctx.save_for_backward(x_PC, positive_PF, gates_Mk, up, down, token_P, row_Mk, ends_E)
        y_MC = (y_PC[row_Mk] * gates_Mk.unsqueeze(-1)).sum(1)
        # compiled by torch 2.11, a Function that returns what a cast to the same type gives has no gradient
        return y_MC if y_MC.dtype == n_MC.dtype else y_MC.to(n_MC.dtype)

    @staticmethod
    def backward(ctx, grad_MC):
        x_PC, positive_PF, gates_Mk, up, down, token_P, row_Mk, ends_E = ctx.saved_tensors
        grad_PC = take_rows(grad_MC, token_P, ctx.padded)
        gate_P = gates_Mk.new_zeros(len(token_P)).scatter(0, row_Mk.flatten(), gates_Mk.flatten())
        gate_P1 = gate_P.unsqueeze(-1)
        hidden_PF = positive_PF * positive_PF
        back_PF = row_products(grad_PC, down.mT, ends_E)  # hidden's gradient, but for the gate
        grad_gates = (back_PF * hidden_PF).sum(-1, dtype=gates_Mk.dtype)[row_Mk]
        grad_down = group_products((hidden_PF * gate_P1).to(grad_PC.dtype), grad_PC, ends_E)
        pre_PF = (back_PF * positive_PF * (2 * gate_P1)).to(grad_PC.dtype)
        grad_n = row_products(pre_PF, up, ends_E)[row_Mk].sum(1)
        return grad_n, grad_gates, group_products(pre_PF, x_PC, ends_E), grad_down, None, None, None


def take_rows(x_MC: Tensor, token_P: Tensor, padded: bool) -> Tensor:
    """Rows of x; zeros where token_P is M."""
    if not padded:
        return x_MC[token_P]
    M = x_MC.shape[0]
    return torch.where((token_P < M).unsqueeze(-1), x_MC[token_P.clamp(max=M - 1)], 0)


def is_grouped(x: Tensor) -> bool:
    """Return whether products are torch's grouped ones, which wait for nothing, or one per expert."""
    return x.is_cuda


def row_products(x_PK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """(P, N): each expert's group of rows times its matrix. ends_E: where the groups end, int32."""
    if is_grouped(x_PK):
        return F.grouped_mm(x_PK, w_EKN, offs=ends_E)  # rows after the last group are not written
    return row_products_cpu(x_PK, w_EKN, ends_E)


def group_products(x_PK: Tensor, y_PN: Tensor, ends_E: Tensor) -> Tensor:
    """(E, K, N): the sum over each expert's rows of x_p y_p^T, the gradient of its matrix."""
    if is_grouped(x_PK):
        return F.grouped_mm(x_PK.T, y_PN, offs=ends_E)
    return group_products_cpu(x_PK, y_PN, ends_E)


# Custom ops, because compiled code could not look into ends_E


@torch.library.custom_op("speedrun_ord::row_products", mutates_args=())
def row_products_cpu(x_PK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """row_products with one product per expert; the last end is P."""
    out, start = x_PK.new_empty(x_PK.shape[0], w_EKN.shape[-1]), 0
    for w, end in zip(w_EKN, ends_E.tolist()):
        torch.mm(x_PK[start:end], w, out=out[start:end])
        start = end
    return out


@row_products_cpu.register_fake
def _(x_PK, w_EKN, ends_E):
    return x_PK.new_empty(x_PK.shape[0], w_EKN.shape[-1])


@torch.library.custom_op("speedrun_ord::group_products", mutates_args=())
def group_products_cpu(x_PK: Tensor, y_PN: Tensor, ends_E: Tensor) -> Tensor:
    """group_products with one product per expert."""
    out, start = x_PK.new_empty(len(ends_E), x_PK.shape[1], y_PN.shape[1]), 0
    for matrix, end in zip(out, ends_E.tolist()):
        torch.mm(x_PK[start:end].T, y_PN[start:end], out=matrix)
        start = end
    return out


@group_products_cpu.register_fake
def _(x_PK, y_PN, ends_E):
    return x_PK.new_empty(len(ends_E), x_PK.shape[1], y_PN.shape[1])
