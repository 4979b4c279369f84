"""Every kernel against its plain-torch reference, in Triton's interpreter or on a GPU.

    python tests/offgpu/numerics.py                  # interpreted, on the CPU; pytest's options may follow
    python tests/offgpu/numerics.py --device cuda    # compiled, on this machine's GPU

test_triton_interpreter.py runs this file in its own process: interpreter and compiler do not mix, so the
device (NUMERICS_DEVICE) is chosen before kernels are defined. All tensors are made on it. The same bounds
hold on both unless a comment says otherwise. All tests passed on an H100, compiled by triton 3.6.
NUMERICS_SIZES=real uses gpt2-small's shapes instead of small ones, for benchmarks/first_hour.py on a GPU;
`first` uses only the first of the small ones, for its dry run.
"""

# ruff: noqa: E402  the device is chosen before triton is imported
import argparse
import os
import sys
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args, rest = parser.parse_known_args()
    os.environ |= {"NUMERICS_DEVICE": args.device, "TRITON_INTERPRET": str(int(args.device == "cpu"))}
    import pytest

    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", str(Path(__file__).resolve()), *rest]))

# first_hour.py may run from any folder
sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
DEVICE = os.environ.get("NUMERICS_DEVICE", "cpu")
if DEVICE == "cpu":
    import interpreter  # noqa: F401  (before kernels are defined)
import helpers
import kernel_references as references
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import train_gpt
import train_gpt_muon_ord
from kernels import attention, cuda, float8, vectors
from runtime.sharding import read_master

if DEVICE == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError("--device cuda, but torch finds no CUDA device here")
torch.set_default_device(DEVICE)
ON_GPU = DEVICE == "cuda"
# (architecture, shared memory) to test the MLP with; a GPU takes those up to its own
LIMITS = [(90, 232_448), (80, 166_912), (89, 101_376)]
if ON_GPU:
    LIMITS = [x for x in LIMITS if x[0] <= cuda.gpu_limits()[0] and x[1] <= cuda.gpu_limits()[1]]

SIZES = os.environ.get("NUMERICS_SIZES", "small")
REAL = SIZES == "real"


def sized(small: list, real: list) -> list:
    """Shapes to check under NUMERICS_SIZES."""
    return {"small": small, "first": small[:1], "real": real}[SIZES]


SOFTCAP = train_gpt.SOFTCAP
BF16_STEP = 2.0**-7  # relative gap of neighbours: a sum in another order may round to the next one


def draw(*shape, seed=0, dtype=torch.bfloat16, scale=1.0):
    x = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed))
    return x.mul_(scale).to(dtype)


def draw_tokens(below, *shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, below, shape, generator=generator, device="cpu").to(DEVICE)


def assert_close(got, want, rtol=BF16_STEP, atol=1e-6):
    """Assert equality within rtol of the value or, where terms cancel, of the root mean square of all."""
    assert got.dtype == want.dtype
    wide = torch.float64 if got.numel() < 2**27 else torch.float32  # else memory runs out
    got, want = got.to(wide), want.to(wide)
    floor = atol + 0.1 * rtol * want.square().mean().sqrt()
    wrong = (got - want).abs() > rtol * want.abs() + floor
    assert not wrong.any() and got.isfinite().all(), f"{wrong.sum()} of {wrong.numel()} differ"


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Fill new memory with NaN (integers: their maximum), to find elements that no kernel writes."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty do so
    yield
    torch.use_deterministic_algorithms(False)


def test_new_memory_is_poisoned():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        new = (torch.empty(5, dtype=dtype), torch.empty_like(torch.zeros(5, dtype=dtype)))
        assert all(x.float().isnan().all() for x in new), dtype


# the interpreter itself


@triton.jit
def arithmetic_kernel(x, y, dots, sums, casts, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(dots + at, tl.dot(a, b))
    tl.store(sums + at, tl.where(a > b, a + b, a * b))
    tl.store(casts + at, (a * 1000).to(casts.dtype.element_ty))


@pytest.mark.skipif(ON_GPU, reason="tests the interpreter")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_interpreter_computes_in_the_narrow_types(dtype):
    """The stock interpreter multiplies bfloat16's bits as integers, so no later test would mean anything."""
    x, y = draw(16, 16), draw(16, 16, seed=1)
    dots, sums, casts = torch.empty(16, 16), torch.empty_like(x), torch.empty(16, 16, dtype=dtype)
    arithmetic_kernel[1,](x, y, dots, sums, casts, N=16)
    assert torch.allclose(dots, x.float() @ y.float(), atol=1e-5)
    assert torch.equal(sums, torch.where(x > y, x + y, x * y))
    limit = torch.finfo(dtype).max
    assert torch.equal(casts.float(), (x * 1000).float().clamp(-limit, limit).to(dtype).float())


# the MLP


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: f"sm_{limits[0]}")
@pytest.mark.parametrize(
    "M, C, F", sized([(130, 64, 256), (1200, 64, 512), (1, 128, 256)], [(65_536, 768, 3072)])
)
def test_mlp(M, C, F, limits, monkeypatch):
    """Output and all three gradients, within a few roundings of fp32 on the same bfloat16 numbers."""
    monkeypatch.setattr(cuda, "gpu_limits", lambda: limits)
    if not REAL:  # so that each processor has several blocks
        monkeypatch.setattr(cuda, "num_multiprocessors", lambda device: 3)
    shapes = ((M, C), (F, C), (F, C))
    inputs = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    got, want = cuda.mlp(*inputs), references.mlp(*exact)
    grad = draw(M, C, seed=9)
    got.backward(grad)
    want.backward(grad.float())
    pairs = [(got, want), *((x.grad, e.grad) for x, e in zip(inputs, exact))]
    for a, b in pairs:
        error = (a.float() - b).norm() / b.norm()
        assert error < BF16_STEP, error


def test_mlp_hidden_is_exact_to_a_rounding():
    x, up = draw(40, 192), draw(256, 192, seed=1)
    assert_close(cuda.mlp_up(x, up), (x.float() @ up.float().T).relu().square().bfloat16())


def test_mlp_does_not_hide_nan():
    x = draw(8, 64)
    x[3, 5] = float("nan")
    assert cuda.mlp_up(x, draw(256, 64))[3].isnan().all()


def test_mlp_says_which_widths_it_takes():
    with pytest.raises(ValueError, match="KERNELS=torch"):
        cuda.mlp_up(draw(8, 64), draw(200, 64))


# float8


@pytest.mark.parametrize("shape", sized([(128, 128), (130, 70), (7, 300)], [(65_536, 768), (50_304, 768)]))
def test_quantize(shape):
    """Bit-identical on the CPU, clamped numbers included. A GPU's division by the scale may be off by one ulp
    of fp32, so a few numbers at an edge may round to the neighbour, an eighth away."""
    x = draw(*shape, scale=30)
    for a, b in zip(cuda.quantize(x, 0.1), references.quantize(x, 0.1)):
        same = a.view(torch.uint8) == b.view(torch.uint8)
        if ON_GPU:
            assert same.float().mean() > 0.999
            assert_close(a.float(), b.float(), rtol=0.13)
        else:
            assert same.all()


def test_quantize_does_not_hide_nan():
    x = draw(4, 4)
    x[1, 2] = float("nan")
    assert all(q.float().isnan().sum() == 1 for q in cuda.quantize(x, 0.1))


# head and loss


def loss_case(B, T, V, K, scale=3.0):
    targets = draw_tokens(V, B, T, seed=3)
    targets[0, 0], targets[-1, -1] = V - 1, 0
    weights = torch.tensor([1.0, 0.5, 0.25][:K])
    return draw(B * T, V, scale=scale), targets, weights


def with_prefixes(targets, weights, V):
    """Return (weights, the prefixes' last; prefixes, some missing)."""
    drawn = draw_tokens(2 * V, *targets.shape, seed=7) - V
    drawn[0, 0], drawn[-1, -1] = V - 1, 0
    return torch.cat((weights, torch.tensor([0.2]))), drawn.clamp_min(-1)


def slices(targets, prefix):
    """List (rows, targets, prefixes) of each slice. References hold ten fp32 tensors of the logits' size."""
    B, T = targets.shape
    own = [slice(b, b + 1) for b in range(B)]
    return [
        (slice(b * T, (b + 1) * T), targets[x], None if prefix is None else prefix[x])
        for b, x in enumerate(own)
    ]


# 65,536 x 50,304 logits have more elements than an int32 counts
LOGITS = [(4, 16_384, 50_304, 3), (1, 16_384, 50_304, 2), (1, 16_384, 50_304, 1)]


@pytest.mark.parametrize("prefixes", [False, True], ids=["", "prefixes"])
@pytest.mark.parametrize(
    "B, T, V, K", sized([(2, 19, 2176, 2), (1, 5, 128, 1), (3, 7, 4099, 3), (4, 2, 50, 3)], LOGITS)
)
def test_softcapped_loss(B, T, V, K, prefixes):
    """Forward against torch, backward against its autograd."""
    z, targets, weights = loss_case(B, T, V, K)
    weights, prefix = with_prefixes(targets, weights, V) if prefixes else (weights, None)
    factor = torch.tensor(0.25)
    got = cuda.softcapped_loss(z, targets, weights, *SOFTCAP, prefix)
    (grad,) = cuda.softcapped_loss_backward(z, got[2], targets, weights, factor, *SOFTCAP, prefix)
    for rows, own, own_prefix in slices(targets, prefix):
        exact = z[rows].float().requires_grad_()
        want = references.softcapped_loss(exact, own, weights, *SOFTCAP, own_prefix)
        for a, b in zip(got, want):
            assert_close(a[rows], b.detach(), rtol=1e-5, atol=1e-5)
        (factor * want[0].sum()).backward()
        known = z[rows], want[2].detach(), own, weights, factor
        del want
        assert_close(grad[rows], exact.grad.bfloat16(), rtol=2 * BF16_STEP)
        formula = references.softcapped_loss_backward(*known, *SOFTCAP, own_prefix)
        assert_close(formula, exact.grad, rtol=1e-4)


@pytest.mark.parametrize("prefixes", [False, True], ids=["", "prefixes"])
@pytest.mark.parametrize("B, T, V, K", sized([(2, 67, 300, 2), (1, 5, 128, 1), (3, 7, 130, 3)], LOGITS))
def test_softcapped_loss_backward_in_float8(B, T, V, K, prefixes):
    """Neighbouring float8 numbers are a quarter apart; a value at an edge may round either way."""
    z, targets, weights = loss_case(B, T, V, K)
    weights, prefix = with_prefixes(targets, weights, V) if prefixes else (weights, None)
    lse, factor = cuda.softcapped_loss(z, targets, weights, *SOFTCAP, prefix)[2], torch.tensor(0.25)
    known = z, lse, targets, weights, factor
    got, turned = cuda.softcapped_loss_backward(*known, *SOFTCAP, prefix, 1e-4)
    assert torch.equal(turned.view(torch.uint8), got.view(torch.uint8).T)
    for rows, own, own_prefix in slices(targets, prefix):
        known = z[rows], lse[rows], own, weights, factor
        want = references.softcapped_loss_backward(*known, *SOFTCAP, own_prefix)
        want, _ = references.quantize(want, 1e-4, torch.float8_e5m2)
        assert (got[rows].float() == want.float()).float().mean() > 0.999
        assert_close(got[rows].float(), want.float(), rtol=0.26)


def test_float8_gradient_saturates():
    z, targets, weights = loss_case(1, 4, 128, 1)
    lse = cuda.softcapped_loss(z, targets, weights, *SOFTCAP)[2]
    got, _ = cuda.softcapped_loss_backward(z, lse, targets, weights, torch.tensor(1e9), *SOFTCAP, None, 1e-3)
    assert got.float().abs().max() == torch.finfo(torch.float8_e5m2).max


def test_loss_does_not_hide_nan():
    z, targets, weights = loss_case(1, 4, 128, 1)
    z[2, 7] = float("nan")
    losses, _, _ = cuda.softcapped_loss(z, targets, weights, *SOFTCAP)
    assert losses.isnan().tolist() == [False, False, True, False]


HEAD = (16_384, 768, 50_304) if REAL else (48, 64, 160)


def head_case(seed=0):
    M, C, V = HEAD
    x, w = draw(M, C, seed=seed), draw(V, C, seed=seed + 1, scale=1.6 * C**-0.5)
    x, w = x.requires_grad_(), w.requires_grad_()
    targets = draw_tokens(V, 2, M // 2, seed=seed)
    return x, w, targets, torch.tensor([1.0, 0.5])


@pytest.mark.parametrize("prefixes", [False, True], ids=["", "prefixes"])
@pytest.mark.parametrize(
    "scales, error", [(None, 0.01), ((100 / 448, 6 / 448, 0.1 / 448), 0.12)], ids=["bfloat16", "float8"]
)
def test_head_loss(scales, error, prefixes):
    """Loss and gradients against the trainer's in fp32. float8 has 3 mantissa bits forward, 2 backward."""
    x, w, targets, weights = head_case()
    weights, prefix = with_prefixes(targets, weights, len(w)) if prefixes else (weights, None)
    exact = [p.detach().float().requires_grad_() for p in (x, w)]
    loss, entropy = cuda.head_loss(x, w, targets, weights, SOFTCAP, scales, prefix)
    logits = train_gpt.softcap(exact[0] @ exact[1].T).view(*targets.shape, -1)
    want, want_entropy = train_gpt.multi_token_loss(logits, targets, weights[:2])
    if prefixes:
        want = want + weights[2] * train_gpt.prefix_loss(logits, prefix)
    (0.25 * loss).backward()
    (0.25 * want).backward()
    assert not entropy.requires_grad
    assert loss.item() == pytest.approx(want.item(), rel=error / 4)
    assert entropy.item() == pytest.approx(want_entropy.item(), rel=error / 4)
    for p, e in zip((x, w), exact):
        assert (p.grad.float() - e.grad).norm() / e.grad.norm() < error


def test_head_loss_in_float8_is_made_of_its_references():
    """Gradients equal those of the same quantisation, products and loss, step by step in plain torch."""
    x, w, targets, weights = head_case()
    scales = x_scale, w_scale, grad_scale = 100 / 448, 6 / 448, 0.1 / 448
    loss, _ = cuda.head_loss(x, w, targets, weights, SOFTCAP, scales)
    loss.backward()
    x8, x_t = references.quantize(x.detach(), x_scale)
    w8, w_t = references.quantize(w.detach(), w_scale)
    z = float8.product(x8, w8.T, x_scale, w_scale, fast=True)
    losses, _, lse = references.softcapped_loss(z, targets, weights, *SOFTCAP)
    grad_z = references.softcapped_loss_backward(z, lse, targets, weights, torch.tensor(1.0), *SOFTCAP)
    g, g_t = references.quantize(grad_z, grad_scale, torch.float8_e5m2)
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    for got, want in (
        (x.grad, float8.product(g, w_t.T, grad_scale, w_scale)),
        (w.grad, float8.product(g_t, x_t.T, grad_scale, x_scale)),
    ):
        assert (got - want).norm() / want.norm() < 0.01


# the tail of a Muon step


def tail_case(shape, seed=0):
    """Draw (grad, momentum, weight, mantissa) of N matrices; the last is zero, like optimizer padding."""
    grad, momentum = draw(*shape, seed=seed), draw(*shape, seed=seed + 1, dtype=torch.float32)
    weight, mantissa = draw(*shape, seed=seed + 2, scale=0.1), draw(*shape, seed=seed + 3, scale=9e3).short()
    for x in (grad, momentum, weight, mantissa):
        x[-1] = 0
    return grad, momentum, weight, mantissa


def copies(*tensors):
    return [t.clone() for t in tensors]


SHAPES = sized([(3, 96, 70), (2, 48, 80), (2, 130, 130)], [(40, 768, 768), (22, 3072, 768)])


@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_sums_and_polar_input(shape):
    grad, momentum, weight, mantissa = tail_case(shape)
    theirs = momentum.clone()
    want = references.momentum_sums(grad, theirs, weight, mantissa, 0.9)
    plain_momentum = momentum.clone()
    plain = cuda.momentum_sums(grad, plain_momentum, weight, mantissa, 0.9, ord=False)
    got = cuda.momentum_sums(grad, momentum, weight, mantissa, 0.9, ord=True)
    assert_close(momentum, theirs, rtol=1e-6)
    assert_close(got, want, rtol=1e-4)
    assert torch.equal(plain[:, 0], got[:, 0]) and torch.equal(plain_momentum, momentum)
    removed, scale = draw(shape[0], dtype=torch.float32), draw(shape[0], seed=1, dtype=torch.float32)
    for part in (removed, None):
        state = (grad, momentum, weight, mantissa, part, scale, 0.9)
        assert_close(cuda.polar_input(*state), references.polar_input(*state))
    nothing = cuda.polar_input(grad, momentum, weight, mantissa, torch.zeros(shape[0]), scale, 0.9)
    assert torch.equal(nothing, cuda.polar_input(grad, momentum, weight, mantissa, None, scale, 0.9))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 40, 600), (1, 600, 40)])
def test_row_scales(shape):
    N, R, K = shape
    U = draw(*shape)
    moment = draw(*((N, R, 1) if R >= K else (N, 1, K)), dtype=torch.float32).square()
    theirs = moment.clone()
    want, want_norms = references.row_scales(U, theirs, 0.95)
    got, norms = cuda.row_scales(U, moment, 0.95)
    assert_close(moment, theirs, rtol=1e-5)
    assert_close(got, want, rtol=1e-5)
    assert_close(norms, want_norms, rtol=1e-5)
    assert_close((U.float() * got).square().sum((1, 2)), want_norms, rtol=1e-4)  # the norm is kept


@pytest.mark.parametrize("mode", ["cautious", "none", "param", "update", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_apply_update(shape, mode):
    """Fails if an fp32 master differs by more than the rounding that an FMA saves."""
    N, R, K = shape
    _, _, weight, mantissa = tail_case(shape)
    U, scales = draw(*shape, seed=5), draw(*((N, R, 1) if R >= K else (N, 1, K)), dtype=torch.float32)
    added, lr = draw(N, dtype=torch.float32), draw(N, seed=1, dtype=torch.float32, scale=0.1)
    for parts in ((scales, added), (scales, None), (None, None)):
        mine, theirs = copies(weight, mantissa), copies(weight, mantissa)
        want = references.apply_update(*theirs, U, *parts, lr, 0.03, mode)
        got = cuda.apply_update(*mine, U, *parts, lr, 0.03, mode, measure=True)
        assert_close(read_master(*mine), read_master(*theirs), rtol=1e-6)
        assert_close(got, want, rtol=1e-4, atol=1e-4)
        again = copies(weight, mantissa)
        assert cuda.apply_update(*again, U, *parts, lr, 0.03, mode) is None
        assert torch.equal(again[0], mine[0]) and torch.equal(again[1], mine[1]), "measuring changes nothing"
    nothing = copies(weight, mantissa)
    cuda.apply_update(*nothing, U, scales, torch.zeros(N), lr, 0.03, mode)
    plain = copies(weight, mantissa)
    cuda.apply_update(*plain, U, scales, None, lr, 0.03, mode)
    assert torch.equal(nothing[0], plain[0]) and torch.equal(nothing[1], plain[1]), "a = 0 is NorMuon"


# what compiled code sees


def head_and_mlp(mlp, x, head, targets, weights, scales):
    """Apply an MLP, then the head: (loss, cross-entropy)."""
    y = mlp(x, 1.0)
    return cuda.head_loss(y.flatten(0, 1), head, targets, weights, SOFTCAP, scales)


@pytest.mark.parametrize("scales", [None, (100 / 448, 6 / 448, 0.1 / 448)], ids=["bfloat16", "float8"])
def test_one_graph_holds_forward_and_backward(scales):
    """Fails if dynamo cannot trace the autograd functions as one graph, or the traced results differ."""
    mlp = train_gpt.MLP(helpers.small_config(train_gpt, width=64)).bfloat16()
    mlp.up.data, mlp.down.data = draw(256, 64, seed=1, scale=0.1), draw(256, 64, seed=2, scale=0.1)
    x, head = draw(2, 16, 64).requires_grad_(), draw(160, 64, seed=3, scale=0.1).requires_grad_()
    targets, weights = torch.randint(0, 160, (2, 16)), torch.tensor([1.0, 0.5])
    leaves, results = (x, head, mlp.up, mlp.down), []
    compiled = torch.compile(head_and_mlp, backend="aot_eager", fullgraph=True, dynamic=False)
    with helpers.triton_forms(train_gpt):
        for run in (head_and_mlp, compiled):
            for leaf in leaves:
                leaf.grad = None
            loss, entropy = run(mlp, x, head, targets, weights, scales)
            (0.25 * loss).backward()
            results.append([loss.detach(), entropy, *(leaf.grad for leaf in leaves)])
    for eager, traced in zip(*results):
        assert_close(traced, eager)


# attention


def naive_attention(q, k, v, ends, window, scale):
    """Softmax attention of (M, H, D) in fp32, one document at a time."""
    found = []
    for start, end in pairwise(ends):
        ours = [x[start:end].float().transpose(0, 1) for x in (q, k, v)]
        ago = torch.arange(end - start)[:, None] - torch.arange(end - start)
        scores = (scale * ours[0] @ ours[1].mT).masked_fill((ago < 0) | (ago > window), -torch.inf)
        found.append((scores.softmax(-1) @ ours[2]).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("paired", [False, True], ids=["", "paired"])
@pytest.mark.parametrize("window", sized([8, 24], [128, 384, 640, 896, 1408]))
def test_attention(window, paired):
    """Output and gradients, in documents of up to 2,048 tokens, against a loop over the documents."""
    torch.use_deterministic_algorithms(False)  # else FlashAttention's backward pass is not a run's
    M, H, D, longest = (65_536, 6, 128, 2048) if REAL else (96, 4, 16, 40)
    lengths = np.random.default_rng(0).integers(1, longest + 1, M)
    ends = np.union1d(np.minimum(np.cumsum([0, *lengths]), M), [M // 2])  # no document crosses slices
    batch = attention.CheckBatch(torch.zeros(2, M // 2), torch.from_numpy(ends).int().to(DEVICE), longest)
    backend = "varlen" if ON_GPU else "sdpa"
    attention.activate(backend)
    times, H = (2, H // 2) if paired else (1, H)
    leaves = [draw(2, times * M // 2, H, D, seed=i).requires_grad_() for i in range(3)]
    exact = [x.detach().clone().requires_grad_() for x in leaves]
    grad = draw(*leaves[0].shape, seed=3)
    got = attention.Documents(batch, backend).attend(*leaves, window, paired, attention.CHECK_SCALE)
    flat = [x.flatten(0, 1) for x in exact]
    want = naive_attention(*flat, (times * ends).tolist(), window, attention.CHECK_SCALE)
    got.backward(grad)
    want.backward(grad.float().flatten(0, 1))
    for a, b in [(got.flatten(0, 1), want), *((x.grad, e.grad) for x, e in zip(leaves, exact))]:
        error = (a.float() - b).norm() / b.norm()
        assert error < 0.01, error


# the trainers with kernels


@pytest.mark.parametrize(
    "shape", sized([(1, 130, 130), (1, 100, 40), (2, 40, 70)], [(2, 768, 768), (2, 3072, 768)])
)
def test_polar_steps_give_the_polar_factor(shape):
    """Fails if singular values are not near 1, or directions not those of an exact SVD, within bfloat16's
    precision."""
    U, _, Vh = torch.linalg.svd(draw(*shape, dtype=torch.float64), full_matrices=False)
    spectrum = torch.linspace(1, 0.05, U.shape[-1], dtype=torch.float64)
    X = U * spectrum @ Vh
    X = (X / (1.02 * X.norm(dim=(1, 2), keepdim=True))).bfloat16()
    got = cuda.polar_steps(X, train_gpt.POLAR_COEFFICIENTS).double()
    values = torch.linalg.svdvals(got)
    assert 0.75 < values.min() and values.max() < 1.25
    assert (got * (U @ Vh)).sum() / (got.norm() * (U @ Vh).norm()) > 0.99


ORD_CASES = [
    dict(ORD_MODE="off"),
    dict(),
    dict(SPECTRAL_LR_MUL="0.7"),
    dict(ORD_MODE="project"),
    dict(SPECTRAL_SCALE="unit"),
    dict(SPECTRAL_SCHEDULE="adaptive"),
    dict(OPTIMIZER="muon"),
    dict(OPTIMIZER="muon", SPECTRAL_SCALE="unit"),
    dict(MUON_DECAY_MODE="param", MUON_WEIGHT_DECAY="0.1"),
]


def twin_step(fused: bool, case, env, measure=True):
    """Step the twin on copies of a case: (masters, momentum, second moment, |rho|, stats)."""
    o = helpers.optimizer_settings(train_gpt_muon_ord, **env)
    step = train_gpt_muon_ord.step_ord
    if fused:
        with helpers.triton_forms(train_gpt_muon_ord, o):
            step = train_gpt_muon_ord.step_ord
    grad, momentum, weight, mantissa = copies(*case)
    N, R, K = grad.shape
    state, scalar = {"momentum": momentum}, vectors.scalar
    if o.optimizer == "normuon":
        state["second_moment"] = torch.full((N, R, 1) if R >= K else (N, 1, K), 1e-3)
    a, rho_0 = torch.full((N, 1, 1), o.spectral_lr_mul), torch.full((N, 1, 1), 0.02)
    rho, stats = step(
        weight,
        mantissa,
        grad,
        state,
        torch.full((N, 1, 1), 0.02),
        scalar(0.03),
        scalar(0.9),
        a,
        rho_0,
        scalar(1.0),
        o,
        measure,
    )
    return read_master(weight, mantissa), momentum, state.get("second_moment"), rho, stats


STEPS = sized([(2, 90, 48), (2, 40, 56)], SHAPES)


@pytest.mark.parametrize("env", ORD_CASES, ids=lambda env: "-".join(env.values()) or "default")
@pytest.mark.parametrize("shape", STEPS)
def test_fused_step_is_the_plain_step(shape, env):
    """Weights, states and measurements against the torch path. Its bfloat16 polar iterations round
    differently, so what depends on them agrees to 2%; the rest agrees closely."""
    case = tail_case(shape)
    case[0].add_(case[2], alpha=3)  # else rho is almost zero
    want = twin_step(False, case, env)
    got = twin_step(True, case, env)
    before = read_master(*case[2:])
    moved = [x[0] - before for x in (got, want)]
    assert (moved[0] - moved[1]).norm() / moved[1].norm() < 0.02
    assert_close(got[1], want[1], rtol=1e-6)
    if want[2] is not None:
        assert_close(got[2], want[2], rtol=0.02)
    assert_close(got[3], want[3], rtol=1e-4)
    assert torch.allclose(got[4], want[4], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("env", [dict(SPECTRAL_LR_MUL="0"), dict(ORD_MODE="off")], ids=["a=0", "off"])
def test_twins_with_kernels_agree_bit_for_bit(shape, env):
    """Fails if SPECTRAL_LR_MUL=0 is not NorMuon with kernels, or measuring for the log changes a weight."""
    case, scalar = tail_case(shape), vectors.scalar
    grad, momentum, weight, mantissa = copies(*case)
    N, R, K = shape
    moment = torch.full((N, R, 1) if R >= K else (N, 1, K), 1e-3)
    with helpers.triton_forms(train_gpt):
        fused = train_gpt.step_muon
    fused(
        weight,
        mantissa,
        grad,
        {"momentum": momentum, "second_moment": moment},
        torch.full((N, 1, 1), 0.02),
        scalar(0.03),
        scalar(0.9),
        helpers.optimizer_settings(train_gpt),
    )
    for measure in (True, False):
        twin = twin_step(True, case, env, measure)
        for a, b in zip(twin, (read_master(weight, mantissa), momentum, moment)):
            assert torch.equal(a, b)


def model_of_every_feature(float8, dtype, backend="sdpa"):
    """GPT wide enough for the kernels, with tables and matrices in dtype, like build_model's on CUDA."""
    c = helpers.small_config(train_gpt, width=64, num_heads=4, head_dim=16, num_kv_heads=4)
    with torch.device("cpu"):  # like the trainers
        model = train_gpt.GPT(train_gpt.ModelConfig() if REAL else c, VOCAB, backend)
        model.float8_head = float8
        model.init_weights(torch.Generator("cpu").manual_seed(0))
    model.to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = (p.data + 0.02 * torch.randn(p.shape, generator=generator)).bfloat16().to(dtype)
    model.rotary.make_tables(4 * ENDS[-1])
    return model


# documents in two slices, and windows within them
VOCAB, WINDOWS, ENDS = 160, (8, 16), [0, 20, 32, 64]
if REAL:
    VOCAB, WINDOWS, ENDS = 50_257, (128, 384), [0, 700, 2048, 3000, 4096]


def loss_and_grads(model):
    """Return loss, cross-entropy and gradients; norms of small ones as one vector, since each is noisy."""
    tokens = draw_tokens(VOCAB, 2, ENDS[-1] // 2 + 1, seed=1)
    ends = torch.tensor(ENDS, dtype=torch.int32)
    batch = train_gpt.Batch(tokens[:, :-1].int(), tokens[:, 1:], ends, max(b - a for a, b in pairwise(ENDS)))
    loss, entropy = model.train_loss(batch, WINDOWS, True, torch.tensor([1.0, 0.5]))
    (train_gpt.LOSS_SCALE * loss).backward()
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    small = [n for n in sorted(grads) if grads[n].numel() < 100]
    return (
        loss.item(),
        entropy.item(),
        {
            **{n: g for n, g in grads.items() if n not in small},
            "small": torch.stack([grads[n].norm() for n in small]),
        },
    )


@pytest.mark.parametrize("float8", [False, True], ids=["bfloat16", "float8"])
def test_whole_model_with_kernels(float8):
    """Fails if the loss or a gradient is further from fp32's than plain torch's in the same types."""
    exact = loss_and_grads(model_of_every_feature(False, torch.float32))
    plain = loss_and_grads(model_of_every_feature(float8, torch.bfloat16))
    with helpers.triton_forms(train_gpt):
        got = loss_and_grads(model_of_every_feature(float8, torch.bfloat16, "varlen" if ON_GPU else "sdpa"))
    assert got[:2] == pytest.approx(exact[:2], rel=5e-3)
    assert got[2].keys() == exact[2].keys()
    for name, want in exact[2].items():
        if want.norm() > 0:
            error, usual = ((x[2][name] - want).norm() / want.norm() for x in (got, plain))
            assert error < 1.3 * usual + 0.005, (name, error, usual)
