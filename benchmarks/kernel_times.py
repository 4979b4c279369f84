"""Products and kernels of a training step, which benchmarks/first_hour.py times one by one.

Each function makes the inputs of one of scaling_model.PARTS and returns its cases. Elementwise work is
missing, because inductor generates its kernels with the model. Tensors are on torch's default device.

M tokens of a pass, C width, V vocabulary (padded), N matrices, R rows, K columns
"""

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from scaling_model import matrix_shapes, padded_vocab

import train_gpt
from kernels import cuda, float8
from kernels.attention import Documents
from kernels.ngrams import hash_ngrams
from runtime.ranks import Ranks


class Case(NamedTuple):
    """Call to time. times: calls per pass (optimizer: per step); 0: part of another case, or its rival."""

    name: str
    times: int
    run: Callable
    flop: float = 0.0
    bytes: float = 0.0


def normal(*shape: int) -> torch.Tensor:
    """Draw random numbers: constants would use less power and run faster."""
    return torch.randn(shape, dtype=torch.bfloat16)


def device_cases(on_cuda: bool) -> list[Case]:
    """A square product and a large copy, for the device's own rates."""
    n, size = (8192, 2**30) if on_cuda else (128, 2**16)
    a, x = normal(n, n), normal(size)
    out = torch.empty_like(x)
    return [
        Case("square product", 0, lambda: a @ a, 2 * n**3),
        Case("copy", 0, lambda: out.copy_(x), 0, 4 * size),
    ]


def linear_cases(name: str, times: int, x: torch.Tensor, N: int) -> list[Case]:
    """x W^T with x (M, K) and W (N, K), and both gradients."""
    (M, K), w, grad = x.shape, normal(N, x.shape[1]), normal(len(x), N)
    return [
        Case(f"{name}, forward", times, lambda: x @ w.T, 2 * M * K * N),
        Case(f"{name}, input's gradient", times, lambda: grad @ w, 2 * M * K * N),
        Case(f"{name}, weight's gradient", times, lambda: grad.T @ x, 2 * M * K * N),
    ]


def product_cases(c, M: int) -> list[Case]:
    """All products with matrices except the head's; two of the MLP's include elementwise work."""
    C, hidden_width, layers = c.width, 4 * c.width, c.num_layers
    attending, queries = layers - len(c.no_attention), c.num_heads * c.head_dim
    keys = c.num_kv_heads * c.head_dim
    x, grad, up, down = normal(M, C), normal(M, C), normal(hidden_width, C), normal(hidden_width, C)
    hidden, flop = normal(M, hidden_width).square_(), 2 * M * C * hidden_width
    return [
        *linear_cases("qkv", attending, x, queries + 2 * keys),
        *linear_cases("attention's output", attending, normal(M, queries), C),
        Case("MLP up and relu^2, forward", layers, lambda: cuda.mlp_up(x, up), flop),
        Case("MLP down, forward", layers, lambda: hidden @ down, flop),
        Case("MLP down and relu^2, gradient", layers, lambda: cuda.mlp_up_backward(grad, down, hidden), flop),
        Case("MLP down, weight's gradient", layers, lambda: hidden.T @ grad, flop),
        Case("MLP up, input's gradient", layers, lambda: hidden @ up, flop),
        Case("MLP up, weight's gradient", layers, lambda: hidden.T @ x, flop),
    ]


def head_cases(c, M: int, V: int) -> list[Case]:
    """The three products of the float8 head."""
    x_scale, w_scale, grad_scale = train_gpt.HEAD_SCALES
    x, x_t = cuda.quantize(normal(M, c.width), x_scale)
    w, w_t = cuda.quantize(normal(V, c.width), w_scale)
    grad = normal(M, V).to(torch.float8_e5m2)
    grad_t, flop = grad.view(torch.uint8).T.contiguous().view(grad.dtype), 2 * M * V * c.width
    return [
        Case("head, forward", 1, lambda: float8.product(x, w.T, x_scale, w_scale, fast=True), flop),
        Case("head, input's gradient", 1, lambda: float8.product(grad, w_t.T, grad_scale, w_scale), flop),
        Case("head, weight's gradient", 1, lambda: float8.product(grad_t, x_t.T, grad_scale, x_scale), flop),
    ]


def loss_cases(c, targets_BT: torch.Tensor, V: int, K: int) -> list[Case]:
    """Softcap and cross-entropy on K tokens, their float8 gradient, quantization of the head's inputs."""
    M, weights, factor = targets_BT.numel(), torch.ones(K), torch.ones(())
    z, x, w = normal(M, V), normal(M, c.width), normal(V, c.width)
    x_scale, w_scale, grad_scale = train_gpt.HEAD_SCALES
    known = targets_BT, weights, *train_gpt.SOFTCAP
    lse = cuda.softcapped_loss(z, *known)[2]
    last = targets_BT, weights, factor, *train_gpt.SOFTCAP, grad_scale
    backward = functools.partial(cuda.softcapped_loss_backward_float8, z, lse, *last)
    return [
        Case(f"loss on {K} tokens", 1, lambda: cuda.softcapped_loss(z, *known), 0, 2 * M * V),
        Case("its float8 gradient", 1, backward, 0, 4 * M * V),
        Case("quantize input", 1, lambda: cuda.quantize(x, x_scale), 0, 4 * M * c.width),
        Case("quantize head", 1, lambda: cuda.quantize(w, w_scale), 0, 4 * V * c.width),
    ]


def table_cases(c, tokens_M: torch.Tensor, V: int) -> list[Case]:
    """Gradients of the tables: by fp32 atomics, zeroing and cast included, or with sorted rows.

    Alone they take longer than in a step, where the compiler joins the atomics to other work.
    """
    grad, cases = normal(len(tokens_M), c.width), []
    kinds = [("table of tokens", V, len(c.value_embed_layers) + 1, tokens_M)]
    if c.ngram_rows:
        (rows,) = hash_ngrams(tokens_M[None].int(), c.ngrams[:1], c.ngram_rows)
        kinds.append(("n-gram table", c.ngram_rows, len(c.ngrams), rows.flatten().long()))

    def atomics(rows: int, index: torch.Tensor):
        return torch.zeros(rows, c.width).index_add_(0, index, grad.float()).bfloat16()

    def by_rows(rows: int, index: torch.Tensor):
        return torch.ops.aten.embedding_dense_backward(grad, index, rows, -1, False)

    for name, rows, times, index in kinds:
        traffic = 10 * rows * c.width + 12 * grad.numel()
        for way, counted, function in (("atomics", times, atomics), ("sorted", 0, by_rows)):
            run = functools.partial(function, rows, index)
            cases.append(Case(f"{name}, {way}", counted, run, 0, traffic))
    return cases


def gate_cases(c, M: int) -> list[Case]:
    """Tiny products of the gates: one number per head."""
    gates = c.attn_gate * (c.num_layers - len(c.no_attention)) + len(c.value_embed_layers)
    return linear_cases("gate", gates, normal(M, c.width)[:, : train_gpt.GATE_CHANNELS], c.num_heads)


def attention_cases(c, batch, backend: str, windows: tuple[int, int]) -> list[Case]:
    """Attention of each kind of layer, on the documents of this batch."""
    plans = [plan for plan in train_gpt.layer_plans(c) if plan.attention]
    docs, (B, T), cases = Documents(batch, backend), batch.inputs_BT.shape, []
    for (long, paired), times in Counter((plan.long_window, plan.paired) for plan in plans).items():
        factor = 2 if paired else 1
        heads = [c.num_heads // factor, *[c.num_kv_heads // factor] * 2, c.num_heads // factor]
        *qkv, grad = (normal(B, factor * T, h, c.head_dim) for h in heads)
        known = windows[long], paired, train_gpt.ATTN_SCALE

        def forward(qkv=qkv, known=known):
            return docs.attend(*qkv, *known)

        def both(qkv=qkv, grad=grad, forward=forward):
            return torch.autograd.grad(forward(), qkv, grad)

        name = f"window {windows[long]}{', paired' if paired else ''}"
        for x in qkv:
            x.requires_grad_()
        cases += [Case(f"{name}, forward", 0, forward), Case(f"{name}, forward and backward", times, both)]
    return cases


def polar_cases(shapes: dict) -> list[Case]:
    """Polar iterations of each bucket, and the products of a single one."""
    cases = []
    for (R, K), N in shapes.items():
        X = normal(N, R, K) / (R * K) ** 0.5
        name, short, tall = f"{N} x {R} x {K}", min(R, K), R > K
        left, right = (X.mT, X) if tall else (X, X.mT)
        A = left @ right
        flop = 2 * N * short * R * K

        X_XT = functools.partial(torch.bmm, left, right)
        last = functools.partial(torch.baddbmm, X, *((X, A) if tall else (A, X)))
        whole = functools.partial(cuda.polar_steps, X, train_gpt.POLAR_COEFFICIENTS)
        cases += [
            Case(f"{name}, X X^T", 0, X_XT, flop),
            Case(
                f"{name}, b A + c A A",
                0,
                lambda A=A: torch.baddbmm(A, A, A, beta=-2.0, alpha=0.5),
                2 * N * short**3,
            ),
            Case(f"{name}, a X + B X", 0, last, flop),
            Case(f"{name}, all five iterations", 1, whole, 5 * (2 * flop + 2 * N * short**3)),
        ]
    return cases


def update_cases(shapes: dict) -> list[Case]:
    """Rest of a Muon + ORD step of each bucket; Adam's kernels are compiled with the trainer."""
    cases = []
    for (R, K), N in shapes.items():
        weight, grad, momentum = normal(N, R, K), normal(N, R, K), normal(N, R, K).float()
        mantissa, ones = torch.zeros(N, R, K, dtype=torch.int16), torch.ones(N)
        moment, numbers, name = torch.ones((N, R, 1) if R >= K else (N, 1, K)), N * R * K, f"{N} x {R} x {K}"
        state = grad, momentum, weight, mantissa
        last = weight, mantissa, grad, moment.clone(), ones, 1e-9 * ones, 0.0, "cautious"
        runs = {
            "momentum and sums": (lambda s=state: cuda.momentum_sums(*s, 0.95, ord=True), 14),
            "polar input": (lambda s=state, o=ones: cuda.polar_input(*s, o, o, 0.95), 12),
            "row scales": (lambda g=grad, m=moment: cuda.row_scales(g, m, 0.95), 2),
            "apply update": (lambda a=last: cuda.apply_update(*a), 10),
        }
        cases += [Case(f"{name}, {k}", 1, run, 0, size * numbers) for k, (run, size) in runs.items()]
    return cases


class Lab:
    """Sizes of a model, and real batches of each stage."""

    def __init__(self, env: dict):
        self.s, _, self.c = train_gpt.read_settings(env)
        self.ranks = Ranks(self.s.device)
        shards, _ = train_gpt.open_data(self.s, 1)
        self.data = train_gpt.TrainData(shards, self.s, self.ranks)
        self.schedule, self.cuda = train_gpt.Schedule(self.s, self.c), self.s.device == "cuda"
        self.vocabulary = padded_vocab(shards[0].vocab_size)
        self.shapes = matrix_shapes(self.c)
        if not self.cuda:  # the interpreter is slow
            self.shapes = dict.fromkeys(self.shapes, 1)

    def batches(self, stage: int) -> list:
        """Make the passes of a step."""
        return self.data.make(self.schedule.batch_tokens(self.schedule.bounds[stage]))

    def cases(self, part: str, stage: int, batch) -> list[Case]:
        """Make the cases of one of scaling_model.PARTS, or of `device` or `gates`."""
        c, M, V, windows = self.c, batch.inputs_BT.numel(), self.vocabulary, self.schedule.windows(stage)
        make, *arguments = {
            "device": (device_cases, self.cuda),
            "matmul": (product_cases, c, M),
            "head": (head_cases, c, M, V),
            "attention": (attention_cases, c, batch, self.s.attn_backend, windows),
            "logits": (loss_cases, c, batch.targets_BT, V, len(c.predict[stage])),
            "tables": (table_cases, c, batch.inputs_BT.flatten().long(), V),
            "polar": (polar_cases, self.shapes),
            "updates": (update_cases, self.shapes),
            "gates": (gate_cases, c, M),
        }[part]
        return make(*arguments)

    def median_ms(self, run: Callable) -> float:
        """Median of many calls, each after flushing the L2 cache; on a CPU, a single call, a rough figure."""
        if self.cuda:
            return triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)

    def measure(self, part: str, stage: int) -> tuple[list[tuple[Case, float]], float]:
        """Time a part's cases: ((case, ms) of each, ms per step of this stage)."""
        with torch.device(self.ranks.device):
            batches = self.batches(stage)
            found = [(case, self.median_ms(case.run)) for case in self.cases(part, stage, batches[0])]
        passes = 1 if part in ("polar", "updates") else len(batches)
        return found, passes * sum(case.times * ms for case, ms in found)
