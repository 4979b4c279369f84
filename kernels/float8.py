"""Products in float8 with fixed scales, for GPUs from sm_89 on. The idea is the speedrun's of 2025-01."""

import torch
from torch import Tensor


class Float8Linear(torch.autograd.Function):
    """x @ w.T with activations and weights in e4m3 and the incoming gradient in e5m2.

    x_MC, w_VC in bfloat16; the result, (M, V), in bfloat16. scales: of x, w and the gradient; a value divided
    by its scale must fit the type.
    """

    @staticmethod
    def forward(ctx, x_MC, w_VC, scales: tuple[float, float, float]):
        x_scale, w_scale, _ = scales
        x8, w8 = to_float8(x_MC, x_scale), to_float8(w_VC, w_scale)
        ctx.save_for_backward(x8, w8)
        ctx.scales = scales
        return product(x8, w8.T, x_scale, w_scale, fast=True)

    @staticmethod
    def backward(ctx, grad_MV):
        x8, w8 = ctx.saved_tensors
        x_scale, w_scale, grad_scale = ctx.scales
        g8 = to_float8(grad_MV, grad_scale, torch.float8_e5m2)
        grad_x = product(g8, w8.T.contiguous().T, grad_scale, w_scale)
        grad_w = product(g8.T.contiguous(), x8.T.contiguous().T, grad_scale, x_scale)
        return grad_x, grad_w, None


def product(a: Tensor, b: Tensor, a_scale: float, b_scale: float, fast: bool = False) -> Tensor:
    """a @ b in bfloat16; a by rows and b by columns, as the hardware reads them."""
    scale_a, scale_b = (torch.full((), scale, device=a.device) for scale in (a_scale, b_scale))
    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def to_float8(x: Tensor, scale: float, dtype=torch.float8_e4m3fn) -> Tensor:
    """x / scale, clamped: e5m2 would overflow to inf, e4m3 to nan."""
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)
