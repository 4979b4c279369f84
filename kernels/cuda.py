"""Fast forms for a GPU, in Triton. tests/offgpu/kernel_references.py has each in plain torch.

    KERNELS=auto python train_gpt.py     # these on CUDA from sm_80 on, where triton is installed
    KERNELS=torch python train_gpt.py    # plain torch everywhere

| what | replaces | why |
|---|---|---|
| mlp | relu(x W^T)^2, forward and backward | the elementwise halves ride on the products |
| quantize | two casts and a transposition for a float8 product | one read |
| head_loss | head, softcap, cross-entropy of K tokens and prefix | no fp32 logits; gradient born in float8 |
| momentum_sums ... apply_update | the tail of a Muon step | reads gradient and weight as rarely as it can |

Nothing uses atomics: sums over blocks are stored and added in a fixed order, so two runs agree bit for bit.
What compiled code must trace is a torch.library custom op; the optimizer's kernels are called as they are.
tests/test_triton_interpreter.py compares each with its reference, tests/test_triton_compile.py compiles
every launch for sm_80 to sm_120, both without a GPU. Predicted gains: records/2026-11-24_kernels/README.md.

M rows (tokens), C width, F hidden width, V vocabulary, B slices of T tokens, K predicted tokens;
N matrices of R rows and K columns
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import float8
from kernels.vectors import ratio

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by the tests; it knows no assembly
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)  # else max and clamp would hide that a run has diverged
NAMESPACE = "speedrun_ord"


# ---------------------------------------------------------------------------------------------------
# MLP: W2 relu(W1 x)^2
# ---------------------------------------------------------------------------------------------------

# The sums of a block, 128 x 256 in fp32, are 128 registers of each of 256 threads: half of what one may have
MLP_BLOCKS = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP=8)
# Bytes of shared memory: 3 stages of (128 + 256) x 64 bfloat16 are mlp_kernel's; mlp_hopper_kernel has two
# half blocks more, one of hidden and one to store, and 40 bytes for barriers
HOPPER_SHARED, WIDE_SHARED = 213_032, 147_456


@triton.jit
def grouped(tile, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Row and column of a block: GROUP rows of blocks at a time, column by column, so that what is read at
    the same time stays in the L2 cache."""
    first = tile // (GROUP * blocks_n) * GROUP
    height = min(blocks_m - first, GROUP)
    within = tile % (GROUP * blocks_n)
    return first + within % height, within // height


@triton.jit
def activation(acc):
    positive = tl.maximum(acc, 0.0, propagate_nan=KEEP_NAN)
    return positive * positive


@triton.jit
def activation_backward(acc, hidden):
    """acc times the derivative of relu(x)^2, by its value: 2 relu(x) = 2 sqrt(hidden)."""
    return acc * (2.0 * tl.sqrt(hidden.to(tl.float32)))


@triton.jit
def mlp_kernel(
    a,
    b,
    hidden,
    out,
    M,
    N,
    K,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """relu(a b^T)^2 or, backward, (a b^T) 2 sqrt(hidden); before Hopper. a (M, K), b (N, K), hidden and out
    (M, N), all contiguous; N a multiple of BLOCK_N, K of BLOCK_K."""
    row, col = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), N // BLOCK_N, GROUP)
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col * BLOCK_N + tl.arange(0, BLOCK_N)
    at_k = tl.arange(0, BLOCK_K)
    left = a + rows.to(tl.int64)[:, None] * K + at_k[None, :]
    right = b + cols[None, :] * K + at_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(left, mask=rows[:, None] < M, other=0.0), tl.load(right), acc)
        left += BLOCK_K
        right += BLOCK_K
    place = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if BACKWARD:
        value = activation_backward(acc, tl.load(hidden + place, mask=rows[:, None] < M, other=0.0))
    else:
        value = activation(acc)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=rows[:, None] < M)


@triton.jit
def mlp_hopper_kernel(
    a,
    b,
    hidden,
    out,
    M,
    N,
    K,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The same by tensor descriptors, which copy whole blocks in the background; each program works on one
    block after another, so that the next one's copies start while this one is finished, in halves that need
    less shared memory. Blocks that reach beyond M are filled with zeros and cut when stored."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), N // BLOCK_N
    HALF: tl.constexpr = BLOCK_N // 2
    # flatten: one loop for the compiler, over blocks and k, so that copies run ahead across blocks, too
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, PROGRAMS, flatten=True):
        row, col = grouped(tile, blocks_m, blocks_n, GROUP)
        m, n = row * BLOCK_M, col * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        if BACKWARD:
            out.store([m, n], activation_backward(left, hidden.load([m, n])).to(tl.bfloat16))
            out.store([m, n + HALF], activation_backward(right, hidden.load([m, n + HALF])).to(tl.bfloat16))
        else:
            out.store([m, n], activation(left).to(tl.bfloat16))
            out.store([m, n + HALF], activation(right).to(tl.bfloat16))


@functools.cache
def gpu_limits() -> tuple[int, int]:
    """Architecture, 90 for sm_90, and the bytes of shared memory that a block may have. The interpreter has
    no limits."""
    if INTERPRETED.value:
        return 90, HOPPER_SHARED
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    return driver.get_current_target().arch, properties["max_shared_mem"]


def launch_mlp(a: Tensor, b: Tensor, hidden: Tensor | None) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    (M, K), N = a.shape, b.shape[0]
    arch, shared = gpu_limits()
    blocks = MLP_BLOCKS if shared >= WIDE_SHARED else {**MLP_BLOCKS, "BLOCK_N": 128}  # sm_86, 89, 120
    block_m, block_n, block_k = (blocks[f"BLOCK_{d}"] for d in "MNK")
    check_multiple("the MLP's hidden width", N, block_n)
    check_multiple("the MLP's width", K, block_k)
    out = torch.empty(M, N, dtype=a.dtype, device=a.device)
    tensors = a, b, out if hidden is None else hidden, out  # a kernel wants a tensor even where it reads none
    num_tiles = triton.cdiv(M, block_m) * (N // block_n)
    sizes = dict(M=M, N=N, K=K, BACKWARD=hidden is not None, **blocks, num_warps=8, num_stages=3)
    if arch < 90 or shared < HOPPER_SHARED:
        mlp_kernel[num_tiles,](*tensors, **sizes)
        return out
    half = [block_m, block_n // 2]
    shapes = [block_m, block_k], [block_n, block_k], half, half
    descriptors = map(TensorDescriptor.from_tensor, tensors, shapes)
    programs = num_multiprocessors(a.device)  # one each: shared memory has no room for a second
    mlp_hopper_kernel[min(num_tiles, programs),](*descriptors, **sizes, PROGRAMS=programs)
    return out


def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def check_multiple(name: str, value: int, of: int):
    if value % of:
        raise ValueError(f"{name} is {value}, the Triton kernel wants a multiple of {of}; use KERNELS=torch")


@torch.library.custom_op(f"{NAMESPACE}::mlp_up", mutates_args=())
def mlp_up(x_MC: Tensor, up_FC: Tensor) -> Tensor:
    """relu(x up^T)^2, (M, F). Backward needs no more: relu(x up^T) is its root, and a root halves the
    relative rounding error. One tensor of M x F is written where the plain way writes two and reads one."""
    return launch_mlp(x_MC, up_FC, None)


@mlp_up.register_fake
def _(x_MC, up_FC):
    return x_MC.new_empty(x_MC.shape[0], up_FC.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::mlp_up_backward", mutates_args=())
def mlp_up_backward(grad_MC: Tensor, down_FC: Tensor, hidden_MF: Tensor) -> Tensor:
    """The gradient of x up^T in y = relu(x up^T)^2 down, given that of y: (grad down^T) 2 relu(x up^T)."""
    return launch_mlp(grad_MC, down_FC, hidden_MF)


@mlp_up_backward.register_fake
def _(grad_MC, down_FC, hidden_MF):
    return torch.empty_like(hidden_MF)


class FusedMLP(torch.autograd.Function):
    """relu(x up^T)^2 down; the elementwise parts ride on the products, forward and backward."""

    @staticmethod
    def forward(ctx, x_MC, up_FC, down_FC):
        hidden_MF = mlp_up(x_MC, up_FC)
        ctx.save_for_backward(x_MC, up_FC, down_FC, hidden_MF)
        return hidden_MF @ down_FC

    @staticmethod
    def backward(ctx, grad_MC):
        x_MC, up_FC, down_FC, hidden_MF = ctx.saved_tensors
        grad_MF = mlp_up_backward(grad_MC, down_FC, hidden_MF)
        return grad_MF @ up_FC, grad_MF.T @ x_MC, hidden_MF.T @ grad_MC


def mlp(x_BTC: Tensor, up_FC: Tensor, down_FC: Tensor) -> Tensor:
    """W2 relu(W1 x)^2 (arXiv 2109.08668), both matrices stored (F, C), bfloat16."""
    return FusedMLP.apply(x_BTC.flatten(0, -2), up_FC, down_FC).view(x_BTC.shape)


# ---------------------------------------------------------------------------------------------------
# Float8
# ---------------------------------------------------------------------------------------------------

TILE = dict(BLOCK_R=128, BLOCK_C=64)  # rows of at least 64 bytes each way, registers for 3 blocks at a time


@triton.jit
def to_float8(x, dtype: tl.constexpr):
    """fp32 as float8, clamped: a plain cast makes inf of e5m2 and nan of e4m3. Compiled, four numbers become
    one word: ptxas 12.8 loses bytes of triton 3.6's own cast to e5m2 where that is stored in two layouts. A
    plain cast can come back when test_triton_compile.py passes with it."""
    if INTERPRETED:
        limit: tl.constexpr = 57344.0 if dtype == tl.float8e5 else 448.0
        return tl.clamp(x, -limit, limit, propagate_nan=KEEP_NAN).to(dtype)
    kind: tl.constexpr = "e5m2x2" if dtype == tl.float8e5 else "e4m3x2"
    pack: tl.constexpr = (
        "{ .reg .b16 low, high; cvt.rn.satfinite." + kind + ".f32 low, $2, $1; "
        "cvt.rn.satfinite." + kind + ".f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    return tl.inline_asm_elementwise(pack, "=r,f,f,f,f", [x], tl.uint8, True, 4).to(dtype, bitcast=True)


@triton.jit
def quantize_kernel(x, out, out_t, R, C, scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows[:, None] < R) & (cols[None, :] < C)
    value = tl.load(x + rows[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    value = to_float8(value / scale, out.dtype.element_ty)
    tl.store(out + rows[:, None] * C + cols[None, :], value, mask=inside)
    inside = (cols[:, None] < C) & (rows[None, :] < R)
    tl.store(out_t + cols.to(tl.int64)[:, None] * R + rows[None, :], tl.trans(value), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::quantize", mutates_args=())
def quantize(x_RC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x / scale in float8 e4m3, clamped, as (R, C) and as (C, R), both contiguous: float8 products on Hopper
    want the summed dimension innermost in both factors, and backward sums over another than forward."""
    x, (R, C) = x_RC.contiguous(), x_RC.shape
    out, out_t = (torch.empty(s, dtype=torch.float8_e4m3fn, device=x.device) for s in ((R, C), (C, R)))
    quantize_kernel[triton.cdiv(R, TILE["BLOCK_R"]), triton.cdiv(C, TILE["BLOCK_C"])](
        x, out, out_t, R, C, scale, **TILE, num_warps=8
    )
    return out, out_t


@quantize.register_fake
def _(x_RC, scale):
    R, C = x_RC.shape
    return tuple(x_RC.new_empty(s, dtype=torch.float8_e4m3fn) for s in ((R, C), (C, R)))


# ---------------------------------------------------------------------------------------------------
# Head and loss
# logits = gain sigmoid((z + shift) / width) of the head's output z, so 0 < logits < gain
# ---------------------------------------------------------------------------------------------------

LOSS_BLOCK = 2048  # 16 logits per thread


@triton.jit
def exp2(x):
    """One instruction. tl.exp2 takes four, for subnormals; the loss kernels are bound by instructions."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def reciprocal(x):
    """One instruction, off by at most 1 in the last place; a division takes six."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def widen(x):
    """bfloat16 as fp32. Through tl's own cast, triton 3.6 moves a later change of layout up to here and
    computes all that follows in both layouts: 121 to 255 registers in loss_backward_kernel, not 64 to 80."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    unpack: tl.constexpr = "{ .reg .b16 low; mov.b16 low, 0; mov.b32 $0, {low, $1}; }"
    return tl.inline_asm_elementwise(unpack, "=f,h", [x], tl.float32, True, 1)


@triton.jit
def squash(z, shift, width):
    """sigmoid((z + shift) / width)"""
    slope = -LOG2E / width  # exp(x) = 2^(x log2(e)), and the factor joins the one on z
    return reciprocal(1.0 + exp2(z.to(tl.float32) * slope + shift * slope))


@triton.jit
def loss_kernel(
    z,
    targets,
    prefixes,
    weights,
    losses,
    entropies,
    lses,
    T,
    V,
    gain,
    shift,
    width,
    K: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. Logits are below gain, so gain stands in for their maximum and one pass suffices."""
    m = tl.program_id(0)
    z += m.to(tl.int64) * V  # 65,536 x 50,304 is more than 2^31
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for v in range(0, V, BLOCK):
        s = squash(tl.load(z + v + at, mask=at < V - v, other=0.0), shift, width)
        total += tl.where(at < V - v, exp2(s * (gain * LOG2E) - gain * LOG2E), 0.0)
    lse = gain + tl.log(tl.sum(total, 0))
    loss = 0.0
    for k in tl.static_range(K):
        if m % T < T - k:  # the k-th token after the next is in the same slice
            entropy = lse - gain * squash(tl.load(z + tl.load(targets + m + k)), shift, width)
            loss += tl.load(weights + k) * entropy
            if k == 0:
                tl.store(entropies + m, entropy)
    if PREFIX:
        prefix = tl.load(prefixes + m)
        if prefix >= 0:
            loss += tl.load(weights + K) * (lse - gain * squash(tl.load(z + prefix), shift, width))
    tl.store(losses + m, loss)
    tl.store(lses + m, lse)


@triton.jit
def loss_backward_kernel(
    z,
    lses,
    targets,
    prefixes,
    weights,
    grad,
    out,
    out_t,
    M,
    T,
    V,
    gain,
    shift,
    width,
    scale,
    K: tl.constexpr,
    PREFIX: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of the gradient with respect to z, divided by scale; if FLOAT8, also transposed.

    With logits gain s and p their softmax: sum_k w_k (p - [target_k]) gain / width (s - s^2).
    """
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row64 = rows.to(tl.int64)
    inside = (rows[:, None] < M) & (cols[None, :] < V)
    z = tl.load(z + row64[:, None] * V + cols[None, :], mask=inside, other=0.0)
    s = squash(widen(z), shift, width)
    lse = tl.load(lses + rows, mask=rows < M, other=0.0)
    probability = exp2(s * (gain * LOG2E) - (lse * LOG2E)[:, None])
    factor = tl.load(grad) * gain / width / scale
    strength = tl.zeros((BLOCK_R,), tl.float32)  # factor times the sum of w_k
    picked = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)  # factor times w_k, in the target's column
    for k in tl.static_range(K):
        has = (rows < M) & (rows % T < T - k)
        w = tl.where(has, tl.load(weights + k) * factor, 0.0)
        target = tl.load(targets + rows + k, mask=has, other=0).to(tl.int32)
        strength += w
        picked += tl.where(cols[None, :] == target[:, None], w[:, None], 0.0)
    if PREFIX:
        prefix = tl.load(prefixes + rows, mask=rows < M, other=-1).to(tl.int32)
        w = tl.where(prefix >= 0, tl.load(weights + K) * factor, 0.0)
        strength += w
        picked += tl.where(cols[None, :] == prefix[:, None], w[:, None], 0.0)
    value = (strength[:, None] * probability - picked) * (s - s * s)
    if not FLOAT8:
        tl.store(out + row64[:, None] * V + cols[None, :], value.to(out.dtype.element_ty), mask=inside)
    else:
        value = to_float8(value, out.dtype.element_ty)
        tl.store(out + row64[:, None] * V + cols[None, :], value, mask=inside)
        inside = (cols[:, None] < V) & (rows[None, :] < M)
        tl.store(out_t + cols.to(tl.int64)[:, None] * M + rows[None, :], tl.trans(value), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::softcapped_loss", mutates_args=())
def softcapped_loss(
    z_MV: Tensor,
    targets_BT: Tensor,
    weights: Tensor,
    gain: float,
    shift: float,
    width: float,
    prefixes_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers per row, fp32 (M): sum_k w_k CE(logits, target_{t+k}) over the targets within its
    slice, the plain cross-entropy, and the logits' logsumexp (arXiv 2404.19737, with one head).

    One pass over z; M = B T. prefixes_BT: one more target of each row, -1 for none, whose weight is the last.
    """
    z, M = z_MV.contiguous(), z_MV.shape[0]
    outs = tuple(torch.empty(M, device=z.device) for _ in range(3))
    loss_kernel[M,](
        z,
        targets_BT.contiguous(),
        targets_BT if prefixes_BT is None else prefixes_BT.contiguous(),
        weights,
        *outs,
        targets_BT.shape[1],
        z.shape[1],
        gain,
        shift,
        width,
        K=num_next(weights, prefixes_BT),
        PREFIX=prefixes_BT is not None,
        BLOCK=LOSS_BLOCK,
        num_warps=4,
    )
    return outs


def num_next(weights: Tensor, prefixes_BT: Tensor | None) -> int:
    """Number of next tokens among the targets."""
    return weights.shape[0] - (prefixes_BT is not None)


@softcapped_loss.register_fake
def _(z_MV, targets_BT, weights, gain, shift, width, prefixes_BT=None):
    return tuple(z_MV.new_empty(z_MV.shape[0], dtype=torch.float32) for _ in range(3))


def loss_gradients(z_MV: Tensor, scale: float | None) -> list[Tensor]:
    """Make room for what softcapped_loss_backward returns."""
    if scale is None:
        return [torch.empty_like(z_MV, memory_format=torch.contiguous_format)]
    M, V = z_MV.shape
    return [z_MV.new_empty(s, dtype=torch.float8_e5m2) for s in ((M, V), (V, M))]


@torch.library.custom_op(f"{NAMESPACE}::softcapped_loss_backward", mutates_args=())
def softcapped_loss_backward(
    z_MV: Tensor,
    lse_M: Tensor,
    targets_BT: Tensor,
    weights: Tensor,
    grad: Tensor,
    gain: float,
    shift: float,
    width: float,
    prefixes_BT: Tensor | None = None,
    scale: float | None = None,
) -> list[Tensor]:
    """The gradient with respect to z in z's dtype, for `grad` (0-d, fp32) on the sum of softcapped_loss.

    Given a scale: divided by it in float8 e5m2, clamped, as (M, V) and as (V, M): each of the two float8
    products that follow takes one of them."""
    z, (M, V), outs = z_MV.contiguous(), z_MV.shape, loss_gradients(z_MV, scale)
    grid = triton.cdiv(V, TILE["BLOCK_C"]), triton.cdiv(M, TILE["BLOCK_R"])
    loss_backward_kernel[grid](
        z,
        lse_M,
        targets_BT.contiguous(),
        targets_BT if prefixes_BT is None else prefixes_BT.contiguous(),
        weights,
        grad,
        outs[0],
        outs[-1],
        M,
        targets_BT.shape[1],
        V,
        gain,
        shift,
        width,
        1.0 if scale is None else scale,
        K=num_next(weights, prefixes_BT),
        PREFIX=prefixes_BT is not None,
        FLOAT8=scale is not None,
        **TILE,
        num_warps=8,
    )
    return outs


@softcapped_loss_backward.register_fake
def _(z_MV, lse_M, targets_BT, weights, grad, gain, shift, width, prefixes_BT=None, scale=None):
    return loss_gradients(z_MV, scale)


class FusedHeadLoss(torch.autograd.Function):
    """See head_loss. The plain cross-entropy has no gradient."""

    @staticmethod
    def forward(ctx, x_MC, w_VC, targets_BT, weights, softcap, scales, prefixes_BT):
        if scales is None:
            z_MV, x_t, w_t = x_MC @ w_VC.T, x_MC, w_VC
        else:
            x8, x_t = quantize(x_MC, scales[0])
            w8, w_t = quantize(w_VC, scales[1])
            z_MV = float8.product(x8, w8.T, scales[0], scales[1], fast=True)
        losses, entropies, lse_M = softcapped_loss(z_MV, targets_BT, weights, *softcap, prefixes_BT)
        ctx.save_for_backward(z_MV, lse_M, targets_BT, weights, x_t, w_t, prefixes_BT)
        ctx.softcap, ctx.scales = softcap, scales
        entropy = entropies.sum()
        ctx.mark_non_differentiable(entropy)
        return losses.sum(), entropy

    @staticmethod
    def backward(ctx, grad, _):
        z_MV, lse_M, targets_BT, weights, x_t, w_t, prefixes_BT = ctx.saved_tensors
        known = (z_MV, lse_M, targets_BT, weights, grad, *ctx.softcap)
        if ctx.scales is None:
            (g_MV,) = softcapped_loss_backward(*known, prefixes_BT)
            return g_MV @ w_t, g_MV.T @ x_t, None, None, None, None, None
        x_scale, w_scale, grad_scale = ctx.scales
        g_MV, g_VM = softcapped_loss_backward(*known, prefixes_BT, grad_scale)
        grad_x = float8.product(g_MV, w_t.T, grad_scale, w_scale)
        return grad_x, float8.product(g_VM, x_t.T, grad_scale, x_scale), None, None, None, None, None


def head_loss(
    x_MC: Tensor, w_VC: Tensor, targets_BT: Tensor, weights: Tensor, softcap, scales, prefixes_BT=None
) -> tuple[Tensor, Tensor]:
    """(sum over rows of sum_k w_k CE(softcapped x w^T, target_{t+k}), the plain cross-entropy's sum).

    x, w bfloat16, targets int64, weights fp32. softcap: gain, shift, width. scales: those of x, w (float8
    e4m3) and of the gradient (e5m2), the speedrun's idea of 2025-01; None: bfloat16 throughout. prefixes_BT:
    one more target of each row, -1 for none, whose weight is the last."""
    return FusedHeadLoss.apply(x_MC, w_VC, targets_BT, weights, softcap, scales, prefixes_BT)


# ---------------------------------------------------------------------------------------------------
# The tail of a Muon step: matrices in bfloat16 with their masters' lower halves in an int16 mantissa
# Bytes a number, without / with ORD: momentum_sums 10 / 14, polar_input 8 / 12, row_scales 2, apply_update 10
# ---------------------------------------------------------------------------------------------------

FLAT_BLOCK = 4096
ROW_BLOCKS = dict(BLOCK_R=16, BLOCK_C=256)


@triton.jit
def read_master(weight, mantissa, at, mask):
    """fp32 from a bfloat16 weight's bits and the mantissa that follows them; both pointers are to int16."""
    high = tl.load(weight + at, mask=mask, other=0).to(tl.int32) << 16
    low = tl.load(mantissa + at, mask=mask, other=0).to(tl.int32) & 0xFFFF  # the cast repeats the sign bit
    return (high | low).to(tl.float32, bitcast=True)


@triton.jit
def momentum_kernel(
    grad, momentum, weight, mantissa, sums, size, rest, ORD: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one matrix: momentum in place, and the block's <G, G>, <G, W>, <W, W>. rest: 1 - mu."""
    block, n = tl.program_id(0), tl.program_id(1)
    start = n.to(tl.int64) * size
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    g = tl.load(grad + start + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(momentum + start + at, mask=mask, other=0.0)
    m += rest * (g - m)
    tl.store(momentum + start + at, m, mask=mask)
    G = m - (m - g) * rest  # lerp(g, m, mu) as torch computes it for mu of at least 0.5
    sums += (n * tl.num_programs(0) + block) * 3
    tl.store(sums, tl.sum(G * G, 0))
    if ORD:
        W = read_master(weight + start, mantissa + start, at, mask)
        tl.store(sums + 1, tl.sum(G * W, 0))
        tl.store(sums + 2, tl.sum(W * W, 0))


def momentum_sums(
    grad: Tensor, momentum: Tensor, weight: Tensor, mantissa: Tensor, mu: float, ord: bool
) -> Tensor:
    """Updates momentum in place, m = lerp(m, grad, 1 - mu); returns, of G = lerp(grad, m, mu), <G, G> and, if
    ord, <G, W>, <W, W> of each matrix, fp32 (N, 3). G itself is not stored: polar_input makes it again."""
    N, size = grad.shape[0], grad[0].numel()
    blocks = triton.cdiv(size, FLAT_BLOCK)
    sums = torch.zeros(N, blocks, 3, device=grad.device)
    momentum_kernel[blocks, N](
        grad, momentum, bits(weight), mantissa, sums, size, 1 - mu, ORD=ord, BLOCK=FLAT_BLOCK, num_warps=8
    )
    return sums.sum(1)


def bits(weight: Tensor) -> Tensor:
    assert weight.dtype == torch.bfloat16, f"the fused Muon step wants bfloat16 weights, not {weight.dtype}"
    return weight.view(torch.int16)


@triton.jit
def polar_input_kernel(
    grad, momentum, weight, mantissa, removed, scale, out, size, rest, ORD: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(1)
    start = n.to(tl.int64) * size
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    g = tl.load(grad + start + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(momentum + start + at, mask=mask, other=0.0)
    G = m - (m - g) * rest
    if ORD:
        G -= tl.load(removed + n) * read_master(weight + start, mantissa + start, at, mask)
    tl.store(out + start + at, (G * tl.load(scale + n)).to(out.dtype.element_ty), mask=mask)


def polar_input(
    grad: Tensor,
    momentum: Tensor,
    weight: Tensor,
    mantissa: Tensor,
    removed_N: Tensor | None,
    scale_N: Tensor,
    mu: float,
) -> Tensor:
    """(G - removed W) scale in bfloat16, (N, R, K); momentum as momentum_sums left it."""
    N, size = grad.shape[0], grad[0].numel()
    out = torch.empty_like(grad)
    polar_input_kernel[triton.cdiv(size, FLAT_BLOCK), N](
        grad,
        momentum,
        bits(weight),
        mantissa,
        scale_N if removed_N is None else removed_N,
        scale_N,
        out,
        size,
        1 - mu,
        ORD=removed_N is not None,
        BLOCK=FLAT_BLOCK,
        num_warps=8,
    )
    return out


@triton.jit
def row_scales_kernel(
    u, moment, scales, sums, R, K, u_n, u_r, u_k, rest, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Whole rows of one matrix (columns, by the strides): their mean squares, what NorMuon makes of them."""
    n = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = tl.arange(0, BLOCK_C)
    u += n.to(tl.int64) * u_n
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for k in range(0, K, BLOCK_C):
        mask = (rows[:, None] < R) & (at[None, :] < K - k)
        x = tl.load(u + rows[:, None] * u_r + (k + at)[None, :] * u_k, mask=mask, other=0.0).to(tl.float32)
        total += x * x
    mean_square = tl.sum(total, 1) / K
    place, mask = n * R + rows, rows < R
    v = tl.load(moment + place, mask=mask, other=0.0)
    v += rest * (mean_square - v)
    tl.store(moment + place, v, mask=mask)
    scale = 1.0 / tl.sqrt(tl.maximum(v, 1e-10, propagate_nan=KEEP_NAN))
    tl.store(scales + place, scale, mask=mask)
    sums += (n * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(sums, tl.sum(mean_square, 0))
    tl.store(sums + 1, tl.sum(mean_square * scale * scale, 0))


def row_scales(U_NRK: Tensor, second_moment: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """NorMuon's variance reduction (arXiv 2510.05491) as factors on the rows (of a wide matrix, columns):
    each divided by the root of its running mean square, the matrix brought back to its Frobenius norm.
    Updates second_moment in place. Returns the factors in its shape, and <U, U> of each matrix (N)."""
    tall = U_NRK.size(-2) >= U_NRK.size(-1)
    U = U_NRK if tall else U_NRK.mT
    N, R, K = U.shape
    blocks = triton.cdiv(R, ROW_BLOCKS["BLOCK_R"])
    scales = torch.empty_like(second_moment)
    sums = torch.empty(N, blocks, 2, device=U.device)
    row_scales_kernel[blocks, N](
        U, second_moment, scales, sums, R, K, *U.stride(), 1 - beta2, **ROW_BLOCKS, num_warps=4
    )
    before, after = sums.sum(1).unbind(-1)
    scales *= (before / after.clamp_min(1e-30)).sqrt()[:, None, None]
    return scales, before * K


@triton.jit
def apply_kernel(
    weight,
    mantissa,
    u,
    scales,
    added,
    lr,
    sums,
    size,
    decay,
    COLS: tl.constexpr,
    TALL: tl.constexpr,
    SCALED: tl.constexpr,
    ORD: tl.constexpr,
    MODE: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W -= lr (U + decay), U the polar factor scaled by rows or columns, plus, for ORD, added W."""
    block, n = tl.program_id(0), tl.program_id(1)
    start = n.to(tl.int64) * size
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    W = read_master(weight + start, mantissa + start, at, mask)
    P = tl.load(u + start + at, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        line = at // COLS if TALL else at % COLS
        P *= tl.load(scales + n * (size // COLS if TALL else COLS) + line, mask=mask, other=0.0)
    U = P
    if ORD:
        U += tl.load(added + n) * W
    if MEASURE:
        sums += (n * tl.num_programs(0) + block) * 3
        tl.store(sums, tl.sum(U * W, 0))
        tl.store(sums + 1, tl.sum(U * U, 0))
        tl.store(sums + 2, tl.sum(P * P, 0))
    if MODE == "cautious":
        U += tl.where(U * W >= 0, decay * W, 0.0)
    elif MODE == "param":
        U += decay * W
    elif MODE == "update":
        U += decay * U
    elif MODE == "both":
        U += decay * (W + U)
    new = (W - tl.load(lr + n) * U).to(tl.int32, bitcast=True)
    # the weight is the master cut off, not rounded: its 16 bits, then the mantissa's, are the master's
    tl.store(weight + start + at, (new >> 16).to(tl.int16), mask=mask)
    tl.store(mantissa + start + at, new.to(tl.int16), mask=mask)


def apply_update(
    weight: Tensor,
    mantissa: Tensor,
    U_NRK: Tensor,
    scales: Tensor | None,
    added_N: Tensor | None,
    lr_N: Tensor,
    decay: float,
    mode: str,
    measure: bool = False,
) -> Tensor | None:
    """W -= lr (U + decay), in place, for U = U_NRK scales + added W; decay by `mode` as the trainers'
    with_decay. If asked, returns <U, W>, <U, U> and <P, P> of P = U_NRK scales, fp32 (N, 3)."""
    (N, R, K), size = U_NRK.shape, U_NRK[0].numel()
    blocks = triton.cdiv(size, FLAT_BLOCK)
    sums = torch.empty(N, blocks, 3, device=U_NRK.device) if measure else lr_N
    apply_kernel[blocks, N](
        bits(weight),
        mantissa,
        U_NRK.contiguous(),
        lr_N if scales is None else scales,
        lr_N if added_N is None else added_N,
        lr_N,
        sums,
        size,
        decay,
        COLS=K,
        TALL=R >= K,
        SCALED=scales is not None,
        ORD=added_N is not None,
        MODE=mode,
        MEASURE=measure,
        BLOCK=FLAT_BLOCK,
        num_warps=8,
        enable_fp_fusion=False,  # else each variant (MEASURE, ORD) would round differently
    )
    return sums.sum(1) if measure else None


# ---------------------------------------------------------------------------------------------------
# In place of the trainers' functions (kernels.fast_forms)
# ---------------------------------------------------------------------------------------------------


def make_mlp_forward(module):
    def forward(self, x_BTC, out_scale: float):
        down = self.down if out_scale == 1 else self.down * out_scale
        branch = mlp(module.norm(x_BTC), self.up, down)
        return x_BTC + branch if self.adds_input else branch

    return forward


def make_head_loss(module):
    def fused(self, x_BTC, targets_BT, weights_K, prefix_weight=None):
        scales, weights, prefixes_BT = module.HEAD_SCALES if self.float8_head else None, weights_K, None
        if prefix_weight is not None:
            prefixes_BT = self.prefixes_V[targets_BT]
            weights = torch.cat((weights_K, torch.zeros_like(weights_K[:1]) + prefix_weight))
        known = x_BTC.flatten(0, 1), self.head, targets_BT, weights, module.SOFTCAP, scales
        return head_loss(*known, prefixes_BT)

    return fused


def polar_steps(X_NRK: Tensor, coefficients) -> Tensor:
    """Polar Express on matrices of norm 1; a tall one is multiplied from the right, not turned.

    Triton kernels for half of each symmetric product saved at most 0.5% of a step (docs/gpus.md).
    """
    X, tall = X_NRK, X_NRK.size(-2) > X_NRK.size(-1)
    for a, b, c in coefficients:
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


def covers_muon(o) -> bool:
    """Return whether these settings take make_step_muon: the baseline's, but for AdamW."""
    return o.optimizer != "adamw" and not hasattr(o, "ord_mode")


def make_step_muon(module):
    """Muon step in which each kernel reads each matrix-sized tensor once."""

    def fused(weight, mantissa, grad, state, lr_N11, decay, mu, o):
        read, mu = (grad, state["momentum"], weight, mantissa), float(mu)
        norm = momentum_sums(*read, mu, ord=False)[:, 0].sqrt()
        scale = 1 / (module.POLAR_SAFETY * norm + module.POLAR_EPS)
        U = polar_steps(polar_input(*read, None, scale, mu), module.POLAR_COEFFICIENTS)
        scales = None
        if "second_moment" in state:
            scales, _ = row_scales(U, state["second_moment"], o.muon_beta2)
        last = lr_N11.flatten(), float(decay), o.muon_decay_mode
        apply_update(weight, mantissa, U, scales, None, *last)

    fused.runs_eagerly = True
    return fused


def covers_ord(o) -> bool:
    """Return whether make_step_ord knows these settings: one number per matrix for the radial part."""
    if not hasattr(o, "ord_mode"):  # the baseline's
        return False
    one_number = o.spectral_rho_mode == "global" and not o.spectral_variance
    return o.optimizer != "adamw" and o.ord_mode != "post" and one_number


def make_step_ord(module):
    """Muon + ORD step. The radial part is a number times W, so ORD costs two more reads of W: for rho, and to
    remove it from P's input.
    """

    def fused(weight, mantissa, grad, state, lr_N11, decay, mu, a_N11, rho_0, settled, o, measure: bool):
        read, mu = (grad, state["momentum"], weight, mantissa), float(mu)
        sums = momentum_sums(*read, mu, ord=True)
        _, GW, WW = per_matrix(sums)
        rho = GW / (WW + o.spectral_proj_eps)
        a = 0.0 if o.ord_mode == "off" else module.radial_strength(rho, a_N11, rho_0, settled, o)
        gained = a * rho  # how much W the update gains
        lost = rho if o.ord_mode == "project" else gained  # and P's input loses
        scale = 1 / (module.POLAR_SAFETY * norm_without(lost, sums) + module.POLAR_EPS)
        X = polar_input(*read, lost.flatten(), scale.flatten(), mu)
        U, scales = polar_steps(X, module.POLAR_COEFFICIENTS), None
        if "second_moment" in state:
            scales, squares = row_scales(U, state["second_moment"], o.muon_beta2)
        if o.spectral_scale == "unit":  # variance reduction keeps the norm of U
            if "second_moment" not in state:
                squares = U.float().square().sum((-2, -1))
            gained = gained * ratio(squares.view(-1, 1, 1).sqrt(), norm_without(rho, sums))
        last = lr_N11.flatten(), float(decay), o.muon_decay_mode
        applied = apply_update(weight, mantissa, U, scales, gained.flatten(), *last, measure)
        stats = ord_stats(sums, applied, rho, gained) if measure else None
        return rho.abs(), stats

    fused.runs_eagerly = True
    return fused


def ord_stats(sums_N3, applied_N3, rho, gained) -> Tensor:
    """The trainer's ord_stats, from the sums that the kernels leave."""
    (GG, GW, WW), (UW, UU, PP) = per_matrix(sums_N3), per_matrix(applied_N3)
    G, W, U = GG.sqrt(), WW.sqrt(), UU.sqrt()
    cosines = ratio(GW, G * W), ratio(UW, U * W)
    radial_over_p = ratio(gained.abs() * W, PP.sqrt())
    return torch.cat((rho, *cosines, W, ratio(U, W), radial_over_p), dim=-1).squeeze(1)


def per_matrix(sums_N3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three sums of each matrix, as (N, 1, 1) each."""
    return tuple(x.view(-1, 1, 1) for x in sums_N3.unbind(-1))


def norm_without(part: Tensor, sums_N3: Tensor) -> Tensor:
    """||G - part W||, from <G, G>, <G, W>, <W, W> of each matrix."""
    GG, GW, WW = per_matrix(sums_N3)
    return (GG - 2 * part * GW + part.square() * WW).clamp_min(0).sqrt()
