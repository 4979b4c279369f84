"""Fast forms for a CPU: hand-written passes, because a step of a small model is memory-bound there.

kernels.fast_forms puts them in the place of a trainer's own functions. Each make_ function takes the trainer
and returns the fast form, with the arguments of the function that it replaces.

Channels in capitals as in the trainers: B slices, T tokens, C width; N matrices of R rows and K columns
"""

import torch
from torch import Tensor


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


# ---------------------------------------------------------------------------------------------------
# In place of the trainer's functions
# ---------------------------------------------------------------------------------------------------


def make_mlp_forward(module):
    def forward(self, x_BTC, out_scale: float):
        down = self.down if out_scale == 1 else self.down * out_scale
        return MLP.apply(x_BTC, self.up, down, self.adds_input)

    return forward


def make_polar_express(module):
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
