"""What the Triton kernels compute, in plain torch: the same arguments and results as in kernels/cuda.py."""

import torch
from torch import Tensor

from kernels.cuda import num_next
from runtime.sharding import read_master
from train_gpt import nesterov


def mlp(x_BTC: Tensor, up_FC: Tensor, down_FC: Tensor) -> Tensor:
    return (x_BTC @ up_FC.T).relu().square() @ down_FC


def quantize(x_RC: Tensor, scale: float, dtype=torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    limit = torch.finfo(dtype).max
    x8 = (x_RC.float() / scale).clamp(-limit, limit).to(dtype)
    return x8, x8.T.contiguous()


def softcapped_loss(z_MV, targets_BT, weights, gain, shift, width, prefixes_BT=None):
    logits = gain * torch.sigmoid((z_MV.float() + shift) / width)
    T, lse = targets_BT.shape[1], logits.logsumexp(-1)
    losses, entropies = torch.zeros_like(lse), []
    for k in range(num_next(weights, prefixes_BT)):
        has = torch.arange(len(lse), device=lse.device) % T < T - k
        target = targets_BT.flatten().roll(-k)
        entropies.append(lse - logits.gather(-1, target[:, None]).squeeze(-1))
        losses = losses + torch.where(has, weights[k] * entropies[k], 0.0)
    if prefixes_BT is not None:
        prefix = prefixes_BT.flatten()
        entropy = lse - logits.gather(-1, prefix.clamp_min(0)[:, None]).squeeze(-1)
        losses = losses + torch.where(prefix >= 0, weights[-1] * entropy, 0.0)
    return losses, entropies[0], lse


def softcapped_loss_backward(z_MV, lse_M, targets_BT, weights, grad, gain, shift, width, prefixes_BT=None):
    """The gradient by the formula, fp32; tests compare it with autograd of softcapped_loss."""
    T, M = targets_BT.shape[1], z_MV.shape[0]
    s = torch.sigmoid((z_MV.float() + shift) / width)
    probability = (gain * s - lse_M[:, None]).exp()
    total = torch.zeros_like(s)
    for k in range(num_next(weights, prefixes_BT)):
        has = torch.arange(M, device=s.device) % T < T - k
        one_hot = torch.nn.functional.one_hot(targets_BT.flatten().roll(-k), s.shape[1])
        total += weights[k] * has[:, None] * (probability - one_hot)
    if prefixes_BT is not None:
        prefix = prefixes_BT.flatten()
        one_hot = torch.nn.functional.one_hot(prefix.clamp_min(0), s.shape[1])
        total += weights[-1] * (prefix >= 0)[:, None] * (probability - one_hot)
    return total * s * (1 - s) * (grad * gain / width)


def momentum_sums(grad, momentum, weight, mantissa, mu):
    G = nesterov(grad, momentum, mu)
    W = read_master(weight, mantissa)
    return torch.stack([(x * y).sum((-2, -1)) for x, y in ((G, G), (G, W), (W, W))], -1)


def polar_input(grad, momentum, weight, mantissa, removed_N, scale_N, mu):
    G = grad.float().lerp(momentum, mu)
    if removed_N is not None:
        G = G - removed_N[:, None, None] * read_master(weight, mantissa)
    return (G * scale_N[:, None, None]).to(grad.dtype)


def row_scales(U_NRK, second_moment, beta2):
    U = U_NRK.float()
    mean_square = U.square().mean(-1 if U.size(-2) >= U.size(-1) else -2, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    reduced = U * scale
    size = lambda x: x.square().sum((-2, -1), keepdim=True).sqrt()
    return scale * size(U) / size(reduced).clamp_min(1e-15), U.square().sum((-2, -1))


def apply_update(weight, mantissa, U_NRK, scales, added_N, lr_N, decay, mode):
    W, P = read_master(weight, mantissa), U_NRK.float()
    P = P if scales is None else P * scales
    U = P if added_N is None else P + added_N[:, None, None] * W
    sums = torch.stack([(x * y).sum((-2, -1)) for x, y in ((U, W), (U, U), (P, P))], -1)
    decays = {"none": 0 * W, "cautious": W * (U * W >= 0), "param": W, "update": U, "both": W + U}
    value = (W - lr_N[:, None, None] * (U + decay * decays[mode])).view(torch.int32)
    mantissa.copy_(value.short())
    weight.view(torch.int16).copy_((value >> 16).short())
    return sums
