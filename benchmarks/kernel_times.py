"""Time the products and kernels of a training step one by one, in ms.

    python benchmarks/kernel_times.py --json FILE

Settings are the trainer's environment variables: sizes of its model, and real batches of its shards. A time
is the median of many calls, each after flushing the L2 cache; for updates, of a CUDA graph's replays without
that, because the host would take longer to call them. On a CPU it is a single call's, a rough figure.
Elementwise work is missing, because torch's compiler generates its kernels with the model. What fails is
named, does not stop the rest, and makes the exit code 1.

M tokens of a pass, C width, V vocabulary (padded), N matrices, R rows, K columns
"""

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.append(str(ROOT / "tests/offgpu"))
    import interpreter  # noqa: F401  (mends it; before kernels are defined)

import train_gpt  # noqa: E402
from kernels import cuda, float8  # noqa: E402
from kernels.attention import Documents, activate  # noqa: E402
from kernels.ngrams import hash_ngrams  # noqa: E402
from runtime.checking import read_run  # noqa: E402
from runtime.compiling import choose_allocator  # noqa: E402
from runtime.flops import matrix_shapes, padded_vocab  # noqa: E402
from runtime.ranks import Ranks  # noqa: E402


class Case(NamedTuple):
    """Call to time. times: calls per pass (optimizer: per step); 0: part of another case."""

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
    """All products with matrices but the head's and experts'; two of the MLP's include elementwise work."""
    C, hidden_width, layers = c.width, 4 * c.width, c.num_layers
    attending, queries = layers - len(c.no_attention), c.num_heads * c.head_dim
    keys = c.num_kv_heads * c.head_dim
    x, grad, up, down = normal(M, C), normal(M, C), normal(hidden_width, C), normal(hidden_width, C)
    hidden, flop = normal(M, hidden_width).square_(), 2 * M * C * hidden_width
    attention = [
        *linear_cases("q and k", attending, x, queries + keys),
        *linear_cases("v", attending, x, keys),
        *linear_cases("attention's output", attending, normal(M, queries), C),
    ]
    mlp = [
        Case("MLP up and relu^2, forward", layers, lambda: cuda.mlp_up(x, up), flop),
        Case("MLP down, forward", layers, lambda: hidden @ down, flop),
        Case("MLP down and relu^2, gradient", layers, lambda: cuda.mlp_up_backward(grad, down, hidden), flop),
        Case("MLP down, weight's gradient", layers, lambda: hidden.T @ grad, flop),
        Case("MLP up, input's gradient", layers, lambda: hidden @ up, flop),
        Case("MLP up, weight's gradient", layers, lambda: hidden.T @ x, flop),
    ]
    return attention if c.num_experts else attention + mlp


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
    last = targets_BT, weights, factor, *train_gpt.SOFTCAP, None, grad_scale  # no prefixes
    backward = functools.partial(cuda.softcapped_loss_backward, z, lse, *last)
    return [
        Case(f"loss on {K} tokens", 1, lambda: cuda.softcapped_loss(z, *known), 0, 2 * M * V),
        Case("its float8 gradient", 1, backward, 0, 4 * M * V),
        Case("quantize input", 1, lambda: cuda.quantize(x, x_scale), 0, 4 * M * c.width),
        Case("quantize head", 1, lambda: cuda.quantize(w, w_scale), 0, 4 * V * c.width),
    ]


def table_cases(c, tokens_M: torch.Tensor, V: int) -> list[Case]:
    """Gradients of the tables by fp32 atomics, with zeroing and cast.

    Alone they take longer than in a step, where the compiler joins the atomics to other work.
    """
    grad, cases = normal(len(tokens_M), c.width), []
    kinds = [("table of tokens", V, len(c.value_embed_layers) + 1, tokens_M)]
    if c.ngram_rows:
        (rows,) = hash_ngrams(tokens_M[None].int(), c.ngrams[:1], c.ngram_rows)
        kinds.append(("n-gram table", c.ngram_rows, len(c.ngrams), rows.flatten().long()))

    def atomics(rows: int, index: torch.Tensor):
        return torch.zeros(rows, c.width).index_add_(0, index, grad.float()).bfloat16()

    for name, rows, times, index in kinds:
        run = functools.partial(atomics, rows, index)
        cases.append(Case(name, times, run, 0, 10 * rows * c.width + 12 * grad.numel()))
    return cases


def gate_cases(c, M: int) -> list[Case]:
    """Tiny products of the gates: one number per head."""
    gates = c.attn_gate * (c.num_layers - len(c.no_attention)) + len(c.value_embed_layers)
    return linear_cases("gate", gates, normal(M, c.width)[:, : train_gpt.GATE_CHANNELS], c.num_heads)


def attention_cases(c, batch, backend: str, windows: tuple[int, int]) -> list[Case]:
    """Attention of each kind of layer, on the documents of this batch; q, k, v lie in memory as a layer's."""
    activate(backend)
    plans = [plan for plan in train_gpt.layer_plans(c) if plan.attention]
    docs, (B, T), cases = Documents(batch, backend), batch.inputs_BT.shape, []
    for (long, paired), times in Counter((plan.long_window, plan.paired) for plan in plans).items():
        factor = 2 if paired else 1
        heads = c.num_heads // factor, c.num_kv_heads // factor
        qk, v, grad = (normal(B, factor * T, h, c.head_dim) for h in (sum(heads), heads[1], heads[0]))
        q, k = qk.split(heads, dim=2)
        qkv = q, train_gpt.offset_keys(k) if long else k, v
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
    """Polar iterations of each bucket."""
    cases = []
    for (R, K), N in shapes.items():
        X = normal(N, R, K) / (R * K) ** 0.5
        run, (m, n) = functools.partial(cuda.polar_steps, X, train_gpt.POLAR_COEFFICIENTS), sorted((R, K))
        flop = len(train_gpt.POLAR_COEFFICIENTS) * (2 * 2 * m * m * n + 2 * m**3)  # X X^T, B X; A A
        cases.append(Case(f"{N} x {R} x {K}", 1, run, N * flop))
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


def make_parts(env: dict) -> tuple[str, dict[str, Callable]]:
    """Return (device, {part: function that makes its cases})."""
    s, _, c, _ = read_run(train_gpt, env)
    (shards, _), schedule, shapes = train_gpt.open_data(s, 1), train_gpt.Schedule(s, c), matrix_shapes(c)
    data, V = train_gpt.TrainData(shards, s, Ranks(s.device)), padded_vocab(shards[0].vocab_size)
    on_cuda = s.device == "cuda"
    if not on_cuda:  # the interpreter is slow
        shapes = dict.fromkeys(shapes, 1)
    first, *later = (data.make(*schedule.batch(step))[0] for step in schedule.bounds[:3])  # a pass each
    M, attention = first.inputs_BT.numel(), {}
    for stage, batch in enumerate([first, *later]):
        known = c, batch, s.attn_backend, schedule.windows(stage)
        attention[f"attention, stage {stage + 1}"] = functools.partial(attention_cases, *known)
    return s.device, {
        "device": lambda: device_cases(on_cuda),
        **attention,
        "products": lambda: product_cases(c, M),
        "head": lambda: head_cases(c, M, V),
        "loss": lambda: loss_cases(c, first.targets_BT, V, len(c.predict[0])),
        "tables": lambda: table_cases(c, first.inputs_BT.flatten().long(), V),
        "polar": lambda: polar_cases(shapes),
        "gates": lambda: gate_cases(c, M),
        "updates": lambda: update_cases(shapes),
    }


def measure(case: Case, on_cuda: bool, in_graph: bool) -> dict:
    """Time a case. Its rate counts only the work that the arithmetic needs."""
    if on_cuda and in_graph:
        ms = triton.testing.do_bench_cudagraph(case.run, return_mode="median")
    elif on_cuda:
        ms = triton.testing.do_bench(case.run, warmup=10, rep=60, return_mode="median")
    else:
        start = time.perf_counter()
        case.run()
        ms = 1000 * (time.perf_counter() - start)
    rate = f"{case.flop / ms / 1e9:,.1f} TFLOP/s" if case.flop else f"{case.bytes / ms / 1e6:,.0f} GB/s"
    print(
        f"  {case.name:44} {ms:9.4f} ms x {case.times:<3} {rate if case.flop or case.bytes else ''}",
        flush=True,
    )
    return {"name": case.name, "ms": ms, "times": case.times, "flop": case.flop, "bytes": case.bytes}


def main(argv: list[str]) -> int:
    """Return exit code 0; 1 if a part failed; 2 for unusable settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there, after every part")
    args = parser.parse_args(argv)
    choose_allocator()
    try:
        device, parts = make_parts(dict(os.environ))
    except ValueError as error:
        print(f"kernel_times.py: {error}", file=sys.stderr)
        return 2
    found, failed = {}, []
    with torch.device(device):
        for part, make in parts.items():
            print(part)
            found[part] = []
            try:
                for case in make():
                    found[part].append(measure(case, device == "cuda", part == "updates"))
            except Exception:
                traceback.print_exc()
                failed.append(part)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
