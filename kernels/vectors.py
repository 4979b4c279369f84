"""Inner products, norms, averages and Adam's direction, as update rules use them."""

import torch
from torch import Tensor

WHOLE, ROW, COLUMN = (-2, -1), (-1,), (-2,)  # dimensions of a matrix, of each row, of each column
DIMS = {"global": WHOLE, "row": ROW, "col": COLUMN}  # SPECTRAL_RHO_MODE


def inner(x: Tensor, y: Tensor, dims=WHOLE) -> Tensor:
    """<x, y> over these dimensions, which are kept."""
    return (x * y).sum(dims, keepdim=True)


def norm(x: Tensor, dims=WHOLE) -> Tensor:
    """Euclidean norm over these dimensions, which are kept; the Frobenius norm by default."""
    return inner(x, x, dims).sqrt()


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, 0 where y is 0."""
    return torch.where(y == 0, 0.0, x / torch.where(y == 0, 1.0, y))


def hold(x: Tensor, length: Tensor, dims=WHOLE) -> Tensor:
    """x, scaled to a norm; where x is 0, 0."""
    return x * ratio(length, norm(x, dims))


def nesterov(grad: Tensor, momentum: Tensor, mu: float) -> Tensor:
    """The gradient averaged with its momentum, which is updated in place."""
    momentum.lerp_(grad, 1 - mu)
    return grad.lerp(momentum, mu)


def adam(grad: Tensor, m: Tensor, v: Tensor, count: Tensor, betas: tuple, eps: float) -> Tensor:
    """Bias-corrected Adam direction (arXiv 1412.6980); m, v change in place, count is the update's number."""
    m.lerp_(grad, 1 - betas[0])
    v.lerp_(grad.square(), 1 - betas[1])
    return m / (1 - betas[0] ** count) / ((v / (1 - betas[1] ** count)).sqrt() + eps)


def reduce_variance(U_NRK: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Divide rows (of a wide matrix, columns) by the root of their running mean square: NorMuon (arXiv
    2510.05491).

    Each matrix keeps its norm. second_moment is updated in place.
    """
    dim = -1 if U_NRK.size(-2) >= U_NRK.size(-1) else -2
    second_moment.lerp_(U_NRK.square().mean(dim, keepdim=True), 1 - beta2)
    return hold(U_NRK * second_moment.clamp_min(1e-10).rsqrt(), norm(U_NRK))


def scalar(x: float) -> Tensor:
    """A 0-d tensor on the CPU: an argument of compiled code, whose new values need no new code."""
    return torch.tensor(x, dtype=torch.float32)
