"""Trace, or compile for sm_90, a train step of gpt2-small as on a GPU; prints one line per part.

    python trace_step.py stage|experts|later|later-start|inductor|ord ...

stage     the first stage's forward and backward through AOTAutograd and the optimizer steps of both twins,
          three layers; the memory that forward keeps for backward and the optimizer holds, against
          runtime/memory.py's forecast; by default, the Triton forms are used in the model (the same source
          in both twins) and for each twin's matrix step
experts   a step and a validation of moe-79m, which has grouped products, and its optimizer's steps
later     a step of the first and the last stage, and a validation, of gpt2-small-2026-08's parts in six
          layers; later-start: the first stage alone
inductor  the ORD twin's first-stage step with all layers, and its validation, compiled by inductor to sm_90
          machine code
ord       the matrix update in each ORD mode, compiled by inductor to sm_90 machine code
"""

import contextlib
import functools
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pretend_cuda
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from helpers import WAYS_OF_ORD, shortened

import train_gpt
import train_gpt_muon_ord
from kernels import cuda, fast_forms
from runtime import compiling, presets
from runtime.compiling import graphs_compiled
from runtime.memory import held_bytes, kept_bytes

DEVICE = torch.device("cuda", 0)
VOCAB = 50257
# most gigabytes that a pass of 65,536 tokens moves between products: 59.2 with torch 2.13, 57.7 with 2.11
MOST_GIGABYTES = 58.2 if torch.__version__.startswith("2.11.") else 59.7
AS_A_RUN = compiling.torch_compile  # inductor, with a run's options
MODES = ("stage", "experts", "later", "later-start", "inductor", "ord")


def ranks(trainer):
    """Ranks of one process, on the pretended device."""

    class Alone(trainer.Ranks):
        def __init__(self):
            self.rank, self.local_rank, self.world_size, self.device = 0, 0, 1, DEVICE

    return Alone()


def build(trainer, backend, kernels: str = "auto", model: str = "gpt2-small"):
    """Build a Trainer of this preset that compiles with `backend`. Its matrix step is always the compiled
    one: the Triton form is launched from plain Python (see test_triton_compile.py)."""
    pretend_cuda.on_device(trainer)

    def by_backend(function):
        return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

    compiling.torch_compile = AS_A_RUN if backend == "inductor" else by_backend
    compiling.configure()
    env = {
        "MODEL": model,
        "NUM_SCHEDULED_ITERATIONS": "12",
        "NUM_EXTENSION_ITERATIONS": "2",
        "KERNELS": kernels,
    }
    s, o, config = trainer.read_settings(env)
    assert (s.device, s.attn_backend, s.compile, s.disable_fp8) == ("cuda", "varlen", "1", False)
    return trainer.Trainer(s, o, config, VOCAB, ranks(trainer))


@contextlib.contextmanager
def model_forms(trainer, run):
    """Install this run's fast forms, which the model uses when it is traced."""
    with fast_forms.installed(trainer, run.s, run.optimizer.o) as (_, warnings):
        assert not warnings, warnings
        yield


def recording(calls: Counter, kept: list):
    """Backend like aot_eager that partitions like inductor and refuses graphs that torch would not cache.

    calls: counts the Triton operations that the graphs of forward and backward call. kept: receives the bytes
    of each tensor that forward keeps for backward.
    """

    def count(graph):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        prefix = f"{cuda.NAMESPACE}."
        calls.update(t.split(".")[1] for t in targets if t.startswith(prefix))
        return make_boxed_func(graph.forward)

    def forward(graph, inputs):
        (returned,) = graph.graph.find_nodes(op="output")
        made = [node.meta["val"] for node in set(returned.all_input_nodes) if node.op != "placeholder"]
        made = [x for x in made if isinstance(x, torch.Tensor)]
        kept.extend(x.numel() * x.element_size() for x in made if isinstance(x.numel(), int))
        return count(graph)

    trace = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: count(graph),
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
    )

    def backend(graph, inputs):
        check_cacheable(graph)
        return trace(graph, inputs)

    return backend


def compare_forecast(run, tokens: int, kept: list):
    """Fail if runtime/memory.py is over 3% off: bytes kept per token, bytes of the optimizer's buckets."""
    c, fused = run.model.config, run.s.kernels == "triton"
    tensors = [x for b in run.optimizer.buckets for x in (b.weights, b.grads, b.mantissa, *b.state.values())]
    held = sum(x.numel() * x.element_size() for x in tensors if x is not None)
    for found, counted in (
        (sum(kept) / tokens, kept_bytes(c, VOCAB, fused)),
        (held, held_bytes(c, VOCAB, 1)),
    ):
        assert abs(counted / found - 1) < 0.03, f"{run.s.kernels}: {found:.0f} bytes, forecast {counted:.0f}"


def calls_wanted(num_layers: int) -> dict:
    """Calls in a float8 training pass: an MLP in every layer, x and the head's weights quantised."""
    return {
        "mlp_up": num_layers,
        "mlp_up_backward": num_layers,
        "quantize": 2,
        "softcapped_loss": 1,
        "softcapped_loss_backward": 1,
    }


def batch(trainer, num_slices: int, slice_tokens: int, num_docs: int, longest: int):
    """Make a pass with the shapes of TrainData's."""
    empty = lambda *shape, dtype=torch.int32: torch.zeros(shape, dtype=dtype, device=DEVICE)
    return trainer.Batch(
        empty(num_slices, slice_tokens),
        empty(num_slices, slice_tokens, dtype=torch.int64),
        empty(num_docs + 1),
        longest,
    )


def stage_batch(trainer, run, stage: int, num_docs: int):
    slice_tokens = run.s.batch_sizes[stage] // run.s.slices
    return batch(trainer, max(1, 65_536 // slice_tokens), slice_tokens, num_docs, run.s.max_doc_tokens[stage])


def report(name: str, since: float):
    print(f"{name}: {graphs_compiled()} graphs, {time.perf_counter() - since:.1f} s", flush=True)


def optimizer_steps(run):
    """Run two steps: with statistics and without Adam, then the reverse."""
    run.optimizer.step(0, 1.0, 131_072, measure=True)
    run.optimizer.step(1, 1.0, 131_072, measure=False)


def stage():
    """Run a step of three layers with two passes of different numbers of documents; then the optimizer's
    other forms. The baseline uses its default, the Triton forms; the ORD twin, whose model is the same, plain
    torch."""
    for trainer, kernels in ((train_gpt, "auto"), (train_gpt_muon_ord, "torch")):
        since, calls, kept = time.perf_counter(), Counter(), []
        trainer.PRESETS["gpt2-small"] = (shortened("gpt2-small"), {})
        run = build(trainer, recording(calls, kept), kernels)
        with model_forms(trainer, run):
            batches = [stage_batch(trainer, run, 0, n) for n in (94, 131)]
            weights = trainer.to_device(run.schedule.predict_weights(0), DEVICE)
            run.train_loss(batches[0], run.schedule.windows(0), True, weights, None)
            compare_forecast(run, batches[0].inputs_BT.numel(), kept)
            run.step(0, batches)
            assert run.s.kernels == ("triton" if kernels == "auto" else "torch")
            wanted = calls_wanted(run.model.config.num_layers) if kernels == "auto" else {}
            assert calls == wanted, f"KERNELS={kernels}: {dict(calls)} instead of {wanted}"
            report(f"{run.s.kernels} step", since)
            graphs = graphs_compiled()
            run.step(2, [stage_batch(trainer, run, 0, 77)])
            assert graphs_compiled() == graphs, "the same form was compiled again"
            optimizer_steps(run)
            report(f"{trainer.__name__} optimizer", since)


LATER_TOPOLOGY = ("num_layers", "long_layers", "paired_layers", "value_embed_layers", "skip", "no_attention")
LATER_TOPOLOGY += ("attn_source", "mudd", "xsa_layers", "gate_layers")
WAYS_NOT_FUSED = {"post", "row variance"}


def matrix_steps():
    """Fail unless the matrix step is fused for Muon and the ORD modes that it covers, and for no other."""
    for trainer, ways in ((train_gpt, {"default": {}}), (train_gpt_muon_ord, WAYS_OF_ORD)):
        run = build(trainer, "eager")
        for way, env in ways.items():
            s, o, _ = trainer.read_settings({"MODEL": "gpt2-small", **env})
            with fast_forms.installed(trainer, s, o) as (_, warnings):
                optimizer = trainer.Optimizer(run.model, o, run.ranks, 14, compiling.torch_compile)
            found = [getattr(bucket.compiled_step, "runs_eagerly", False) for bucket in optimizer.stacks]
            wanted = [way not in WAYS_NOT_FUSED] * 2  # two shapes of matrices
            assert found == wanted and not warnings, f"{trainer.__name__}, {way}: {found}, {warnings}"


@contextlib.contextmanager
def counting_bytes(graphs: list):
    """Append the bytes that inductor's own kernels move in each graph that it compiles: all work but
    products, attention and our Triton operations. A cached graph is not counted."""
    codegen = GraphLowering.codegen

    def counted(graph):
        result = codegen(graph)
        own = [node for node in graph.scheduler.nodes if not node.is_extern()]
        graphs.append(sum(node.get_read_write_buffers_sizes() for node in own))
        return result

    GraphLowering.codegen = counted
    try:
        yield
    finally:
        GraphLowering.codegen = codegen


def inductor_step():
    """Do the same with inductor, whose own guards must not tie the code to one number of documents either."""
    trainer, since, moved = train_gpt_muon_ord, time.perf_counter(), []
    run = build(trainer, "inductor")
    with model_forms(trainer, run):
        with counting_bytes(moved):
            run.step(0, [stage_batch(trainer, run, 0, 94)])
        gigabytes = sum(moved[:2]) / 1e9  # of the pass, forward and backward
        print(f"{gigabytes:.1f} GB moved between products")
        assert 50 < gigabytes < MOST_GIGABYTES
        report("inductor step", since)
        optimizer_steps(run)
        report("inductor optimizer", since)
        with torch.no_grad():
            val = batch(trainer, 1, run.s.val_batch_tokens // trainer.VAL_SLICES, 400, 100_000)
            run.val_loss(val, run.schedule.windows(0), run.schedule.tied(0))
        report("inductor validation", since)
        graphs = graphs_compiled()
        run.step(2, [stage_batch(trainer, run, 0, n) for n in (77, 131)])
        assert graphs_compiled() == graphs, "other numbers of documents were compiled anew"


def ord_updates():
    """Update all matrices of gpt2-small once, with statistics, by the plain step."""
    trainer, since = train_gpt_muon_ord, time.perf_counter()
    run = build(trainer, "inductor")
    for name, env in WAYS_OF_ORD.items():
        o = trainer.read_settings({"MODEL": "gpt2-small", **env})[1]
        optimizer = trainer.Optimizer(run.model, o, run.ranks, 14, compiling.torch_compile)
        for bucket in optimizer.stacks:
            with torch.no_grad():
                bucket.update(1.0, 0.95, 1.0, measure=True)
        report(name, since)


def experts(backend: str):
    """Run a step and a validation of a mixture of experts: nothing may depend on the routing."""
    for trainer in (train_gpt, train_gpt_muon_ord):
        since, run = time.perf_counter(), build(trainer, backend, model="moe-79m")
        slice_tokens = run.s.batch_sizes[0] // run.s.slices
        with model_forms(trainer, run):
            for num_docs in (94, 131):
                docs = batch(trainer, run.s.slices, slice_tokens, num_docs, run.s.max_doc_tokens[0])
                run.step(0, [docs])
            with torch.no_grad():
                val = batch(trainer, 1, run.s.val_batch_tokens // trainer.VAL_SLICES, 400, 100_000)
                run.val_loss(val, run.schedule.windows(trainer.NUM_STAGES), run.schedule.tied(0))
            report(f"{trainer.__name__} experts", since)
            optimizer_steps(run)
            report(f"{trainer.__name__} optimizer", since)


def later(to_the_end: bool):
    """Run the parts of the later records at gpt2-small's width; only the first stage predicts prefixes."""
    since, calls, kept = time.perf_counter(), Counter(), []
    config, changes = train_gpt.PRESETS["gpt2-small-2026-08"]
    topology = {name: presets.TINY_LATER[name] for name in LATER_TOPOLOGY}
    train_gpt.PRESETS["gpt2-small-2026-08"] = replace(config, **topology, ngram_rows=1024), changes
    train_gpt.prefix_tokens = lambda vocabulary: np.full(vocabulary, -1)
    run = build(train_gpt, recording(calls, kept), model="gpt2-small-2026-08")
    with model_forms(train_gpt, run):
        batches = [stage_batch(train_gpt, run, 0, n) for n in (94, 131)]
        weights = train_gpt.to_device(run.schedule.predict_weights(0), DEVICE)
        known = run.schedule.windows(0), True, weights, None, run.schedule.prefix_weight(0)
        run.train_loss(batches[0], *known)
        compare_forecast(run, batches[0].inputs_BT.numel(), kept)
        run.step(0, batches)
        assert calls == calls_wanted(6), dict(calls)
        report("first stage", since)
        if not to_the_end:
            return
        calls.clear()
        run.enter(8)
        run.step(8, [stage_batch(train_gpt, run, 2, n) for n in (60, 77)])
        assert calls == calls_wanted(6), dict(calls)
        report("last stage", since)
        with torch.no_grad():
            val = batch(train_gpt, 1, run.s.val_batch_tokens // train_gpt.VAL_SLICES, 400, 100_000)
            run.val_loss(val, run.schedule.windows(train_gpt.NUM_STAGES), run.schedule.tied(8))
        report("validation", since)


def main(mode: str):
    with pretend_cuda.fake_mode():
        if mode == "stage":
            stage()
            matrix_steps()
        elif mode == "experts":
            experts("aot_eager")
        elif mode.startswith("later"):
            later(mode == "later")
        elif mode == "ord":
            ord_updates()
        else:
            inductor_step()


if __name__ == "__main__":
    code = 1
    try:
        if not sys.argv[1:] or not set(sys.argv[1:]) <= set(MODES):
            raise SystemExit(f"wanted some of {', '.join(MODES)}, got {sys.argv[1:]}")
        for mode in sys.argv[1:]:
            main(mode)
        code = 0
    except BaseException:
        import traceback

        text = [line for line in traceback.format_exc().splitlines() if "registered at" not in line]
        print("\n".join(text), flush=True)
    sys.stdout.flush()
    pretend_cuda.os._exit(code)
