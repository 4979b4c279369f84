"""GPU behaviour of the trainers that a CPU can test: nothing compiles after the rehearsal, reductions start
with the last gradient, choices depend on the device."""

import importlib
import os
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    WAYS_OF_ORD,
    lone_ranks,
    make_text,
    optimizer_settings,
    read,
    small_config,
    small_model,
    write_shard,
)
from torch.nn.attention import varlen

import train_gpt
import train_gpt_muon_ord
from data.shards import DataError, open_shard
from kernels import attention
from runtime import checkpoints, compiling
from runtime.compiling import graphs_compiled
from runtime.log_writer import LogWriter
from runtime.prefetch import Prefetcher
from runtime.settings import SettingsError
from runtime.supervise import Start, StopRequest, Supervisor

STAGES = dict(
    num_layers=3,
    skip=(0, 2),
    no_attention=(2,),
    backout=1,
    long_layers=(1,),
    paired_layers=(0,),
    value_embed_layers=(0,),
    windows=((1, 3), (3, 7), (5, 11), (6, 13)),
    final_windows=(6, 20),
    predict=(((1, 1), (0.5, 0.5), (0.25, 0)), ((1, 1), (0.5, 0)), ((1, 1),), ((1, 1),)),
)


def staged_start(trainer, folder, **settings):
    """Make a Start as supervise.prepare does: a model with every feature, four stages of different shapes,
    documents of all lengths, a validation after every step, and small passes, so that a step has several with
    different numbers of slices. The longest validation documents are in its second batch."""
    write_shard(folder / "made_train_0.bin", make_text(60_000))
    val = make_text(2500, 1, longest=60), make_text(6500, 2)
    write_shard(folder / "made_val_0.bin", np.concatenate(val))
    s, o, _ = read(
        trainer,
        DATA_PATH=folder,
        TRAIN_FILES="made_train_*.bin",
        VAL_FILES="made_val_*.bin",
        VAL_TOKENS=4096,
        VAL_BATCH_TOKENS=2048,
        VAL_LOSS_EVERY=1,
        MAX_DOC_TOKENS=64,
        BATCH_SIZES="512,1024,1536,1536",
        NUM_SCHEDULED_ITERATIONS=9,
        NUM_EXTENSION_ITERATIONS=3,
        COMPILE=1,
        PASS_TOKENS=768,  # the second stage has passes of six slices and of two, the others of one size
        **settings,
    )
    config, ranks = small_config(trainer, **STAGES), lone_ranks()
    log = LogWriter(folder / "run.txt", 0, s.num_scheduled_iterations + s.num_extension_iterations)
    data, origin = trainer.open_data(s, 1), checkpoints.Origin("run")
    return Start(trainer.SCRIPT, s, o, config, {"vocab_size": 256}, *data, ranks, origin, log)


@pytest.fixture
def traced_only(monkeypatch):
    """Use torch.compile with dynamo alone, whose graphs are what would be compiled. They keep parameters,
    like inductor's. Like varlen's, attention reads the longest document, a constant of the graph."""
    torch._dynamo.reset()
    attend, kept = attention.Documents.attend, []

    def ask_longest(self, *args):
        return attend(self, *args) * float(self.max_doc_tokens > 0)

    def backend(graph, inputs):
        kept.extend(x for x in inputs if isinstance(x, torch.nn.Parameter))
        return graph.forward

    def by_dynamo(function):
        return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

    monkeypatch.setattr(attention.Documents, "attend", ask_longest)
    monkeypatch.setattr(compiling, "torch_compile", by_dynamo)
    with torch._dynamo.config.patch(recompile_limit=compiling.MAX_VARIANTS):
        yield
    torch._dynamo.reset()


def test_nothing_is_compiled_after_the_rehearsal(tmp_path, traced_only, monkeypatch):
    """Fails if a stage begins with a minute of compiling on the clock, in a whole run or one resumed in the
    middle of stage 3, untied: even a softmax scale that differs in its last bit is another graph constant.
    Also fails if the rehearsal's model or optimizer, as large as the run's, is not freed."""
    at = 8
    monkeypatch.chdir(tmp_path)
    trainer = train_gpt_muon_ord  # compiles all that the baseline does, and a form of the step that measures
    start = staged_start(trainer, tmp_path, RUN_ID="saved", SAVE_EVERY=at)
    made = []
    for part in (trainer.Trainer, trainer.Optimizer):

        def remember(self, *args, build=part.__init__):
            made.append(weakref.ref(self))
            build(self, *args)

        monkeypatch.setattr(part, "__init__", remember)
    before = graphs_compiled()
    parts = SimpleNamespace(log=start.log, module=trainer, start=start, stop=StopRequest())
    Supervisor.rehearse(parts)
    rehearsed = graphs_compiled()
    assert rehearsed - before > 15
    (said,) = re.findall(r"^event:rehearsed seconds:(\S+) graphs:(\d+)$", start.log.path.read_text(), re.M)
    assert float(said[0]) > 0 and int(said[1]) == rehearsed - before
    assert [part() for part in made] == [None] * 2, "the rehearsal's trainer or optimizer is still there"
    run = trainer.Run(start, StopRequest())
    views = [name for name, p in run.trainer.model.named_parameters() if p.grad._is_view()]
    assert not views, "tracing them takes torch.compile seconds per graph"
    assert run.train() == 12
    assert graphs_compiled() == rehearsed
    text = (tmp_path / "run.txt").read_text()
    assert text.count("val_loss:") == 13 and "recompiled" not in text
    resumed = trainer.Run(start, StopRequest())
    resumed.session.resume(checkpoints.read(tmp_path / "logs" / "saved" / f"step_{at:08d}.pt"))
    assert (resumed.session.first_step, resumed.trainer.stage) == (at, 2)
    assert not resumed.trainer.schedule.tied(at)
    assert resumed.train() == 12
    assert graphs_compiled() == rehearsed
    assert (tmp_path / "run.txt").read_text().count("step:12/12 val_loss:") == 2
    # the alarm works
    batches = trainer.val_batches(start.val_shards, start.s, start.ranks)
    trainer.evaluate(run.trainer.val_loss, batches, (8, 8), False, start.ranks)
    run.session.note_compilation(12)
    assert "event:recompiled step:12 graphs:1" in (tmp_path / "run.txt").read_text()


@pytest.mark.parametrize("way", WAYS_OF_ORD)
def test_every_way_of_ord_is_one_graph(way, traced_only):
    """Fails if dynamo refuses an ORD mode that eager torch takes, which would end a GPU run's rehearsal."""
    trainer = train_gpt_muon_ord
    model, o = small_model(trainer), optimizer_settings(trainer, **WAYS_OF_ORD[way])
    optimizer = trainer.Optimizer(model, o, lone_ranks(), 200, compiling.torch_compile)
    matrices = [b for b in optimizer.buckets if isinstance(b, trainer.MatrixBucket)]
    before = graphs_compiled()
    with torch.no_grad():
        for bucket in matrices:
            for measure in (True, False):
                bucket.update(1.0, 0.95, 1.0, measure)
    assert graphs_compiled() - before == 2 * len(matrices)


def test_the_limit_of_forms_is_raised_and_more_are_an_error(traced_only):
    """Fails if dynamo's limit of eight stays, which the stages' forms exceed, or if the form beyond the limit
    would silently run uncompiled."""
    with torch._dynamo.config.patch(recompile_limit=8):
        compiling.configure()
        assert torch._dynamo.config.recompile_limit == compiling.MAX_VARIANTS > 11  # train 5, validate 6
    compiled = compiling.torch_compile(lambda x, n: x * n)
    error = torch._dynamo.exc.FailOnRecompileLimitHit
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(error, match="fullgraph"):
        for n in range(4):
            compiled(torch.ones(2), n)


def test_validation_passes_share_one_longest_document(tmp_path):
    """Fails if it varies, though it is a constant of compiled code, or is the slice's size, for which
    attention would launch too many blocks."""
    write_shard(tmp_path / "val.bin", make_text(5000, longest=90))
    s = SimpleNamespace(val_tokens=4096, val_batch_tokens=2048)
    shards = [open_shard(tmp_path / "val.bin")]
    batches = list(train_gpt.val_batches(shards, s, lone_ranks()))
    lengths = np.concatenate([np.diff(b.cu_seqlens.numpy()) for b in batches])
    assert {b.max_doc_tokens for b in batches} == {lengths.max()}
    assert lengths.min() > 0 and lengths.max() < 100


def test_prefetched_batches_come_in_order_and_errors_reach_the_caller():
    """Fails if a step gets another one's batch, or a missing data file does not end the run."""

    def used_up():
        raise DataError("used up")

    prefetcher = Prefetcher(torch.device("cpu"))
    assert list(prefetcher.each(iter(range(1, 6)))) == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="used up"):
        prefetcher.take(prefetcher.start(used_up))
    prefetcher.close()


@pytest.mark.parametrize("capability,float8", [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_float8_needs_sm_89(on_gpu, capability, float8):
    """Fails if an A100 would crash in its first head product, or an H100 would use the slow one."""
    on_gpu(*capability)
    assert train_gpt.read_settings({"MODEL": "tiny"})[0].disable_fp8 is not float8
    assert train_gpt.read_settings({"MODEL": "tiny", "DISABLE_FP8": "1"})[0].disable_fp8


def test_more_ranks_than_gpus_are_refused(on_gpu, monkeypatch):
    """Fails if two ranks would share a device, which NCCL refuses with an obscure error."""
    on_gpu(9, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(SettingsError, match="8 ranks on this machine.* 1 CUDA"):
        train_gpt.read_settings({"MODEL": "tiny"})
    train_gpt.read_settings({"MODEL": "tiny", "DEVICE": "cpu"})


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_that_torch_cannot_use_are_not_passed_over(device, monkeypatch):
    """Fails if eight ranks silently train on the CPU when the driver is too old for torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(SettingsError, match="8 CUDA devices.*driver"):
        train_gpt.read_settings({"MODEL": "tiny", "DEVICE": device})
    assert train_gpt.read_settings({"MODEL": "tiny", "DEVICE": "cpu"})[0].device == "cpu"


def rounded(x):
    """Round x to bfloat16."""
    return x.bfloat16().float()


class VarlenOnCPU:
    """CPU version of torch's varlen attention, which has none; `off` makes the window too long, in the
    forward or backward pass. Like FlashAttention, it rounds probabilities and their gradients to bfloat16
    before the products."""

    def __init__(self, forward_off=0, backward_off=0):
        self.forward_off, self.backward_off = forward_off, backward_off

    def register(self, library):
        library.impl("_flash_attention_forward", self.forward, "CPU")
        library.impl("_flash_attention_backward", self.backward, "CPU")

    @staticmethod
    def probabilities(q_THD, k_THD, cu_seqlens, window, scale):
        at = torch.arange(len(q_THD))
        doc = torch.searchsorted(cu_seqlens, at.to(cu_seqlens.dtype), right=True)
        ago = at[:, None] - at
        seen = (ago >= 0) & (ago <= window) & (doc[:, None] == doc)
        scores = torch.einsum("ihd,jhd->hij", q_THD, k_THD) * scale
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    def forward(self, q, k, v, cu_q, cu_k, *_, scale, window_size_left, **__):
        k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        P = self.probabilities(q.float(), k, cu_q, window_size_left + self.forward_off, scale)
        rng = torch.zeros(2, dtype=torch.uint64)
        lse = torch.zeros(q.shape[1], len(q))
        return torch.einsum("hij,jhd->ihd", rounded(P), v).to(q.dtype), lse, rng, rng, torch.empty(0)

    def backward(self, grad, q, k, v, out, lse, cu_q, cu_k, *_, scale, window_size_left, **__):
        shared, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
        k, v = (x.float().repeat_interleave(shared, 1) for x in (k, v))
        grad, q = grad.float(), q.float()
        P = self.probabilities(q, k, cu_q, window_size_left + self.backward_off, scale)
        grad_P = torch.einsum("ihd,jhd->hij", grad, v)
        grad_S = rounded(P * (grad_P - (grad_P * P).sum(-1, keepdim=True))) * scale
        fold = lambda x: x.unflatten(1, (kv_heads, shared)).sum(2)
        grads = (
            torch.einsum("hij,jhd->ihd", grad_S, k),
            fold(torch.einsum("hij,ihd->jhd", grad_S, q)),
            fold(torch.einsum("hij,ihd->jhd", rounded(P), grad)),
        )
        return tuple(x.bfloat16() for x in grads)


class VarlenOnCPUWhere(VarlenOnCPU):
    """VarlenOnCPU with windows that are right only where right() says so."""

    def __init__(self, right):
        super().__init__()
        self.right = right

    def forward(self, *args, **kwargs):
        self.forward_off = 0 if self.right() else 1
        return super().forward(*args, **kwargs)


def test_a_wrong_attention_kernel_is_found_out(monkeypatch):
    """Fails if a package built for another torch would train on wrong numbers.

    torch 2.11's varlen attention takes only as many key heads as query heads.
    """
    cpu, takes_all = torch.device("cpu"), varlen.varlen_attn

    def takes_same_heads(q, k, v, *args, scale, window_size):
        assert q.shape[1] == k.shape[1] == v.shape[1]
        return takes_all(q, k, v, *args, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", takes_same_heads)
    for kernels, wrong in (
        (VarlenOnCPU(), None),
        (VarlenOnCPU(forward_off=1), "output is off by 9% for heads of 128 and a window of 64"),
        (VarlenOnCPU(backward_off=1), "gradient of q is off"),
    ):
        with torch.library._scoped_library("aten", "IMPL") as library:
            kernels.register(library)
            if wrong is None:
                attention.check_varlen(cpu)
            else:
                with pytest.raises(ValueError, match=wrong):
                    attention.check_varlen(cpu)


def test_the_check_of_attention_works_under_a_default_device(monkeypatch):
    """Fails if it draws on the default device, which refuses the CPU's generator where it is a GPU."""

    class Drawn(Exception):
        pass

    def documents(*args):
        raise Drawn

    monkeypatch.setattr(attention, "Documents", documents)
    with torch.device("meta"), pytest.raises(Drawn):
        attention.check_varlen(torch.device("cpu"))


FA3_PACKAGE = """
import torch
library = torch.library.Library("flash_attn_3", "FRAGMENT")
if not hasattr(torch.ops.flash_attn_3, "fwd"):
    library.define("fwd(Tensor q) -> Tensor")
    library.define("bwd(Tensor q) -> Tensor")
"""
FA4_PACKAGE = """
def _flash_attn_fwd(*args, **kwargs):
    raise NotImplementedError
_flash_attn_bwd = _flash_attn_fwd
"""


imported = []  # torch 2.11 cannot list its operations once a library with some is gone


def forget_flash_attention():
    """Forget these packages' modules, so that they are imported again."""
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        imported.append(sys.modules.pop(name))


@pytest.fixture
def choose(on_gpu, monkeypatch, tmp_path):
    """Function that chooses attention again on a pretended GPU with the CPU's kernels; packages come from the
    folder tmp_path."""
    check = attention.check_varlen
    monkeypatch.setattr(attention, "check_varlen", lambda device: check(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.syspath_prepend(str(tmp_path))

    def on(*capability, backend="varlen", kernels=None):
        on_gpu(*capability)
        attention.activate.cache_clear()
        importlib.invalidate_caches()
        with torch.library._scoped_library("aten", "IMPL") as library:
            if kernels:
                kernels.register(library)
            return attention.activate(backend)

    yield on
    if torch.nn.attention.current_flash_attention_impl():
        torch.nn.attention.restore_flash_attention_impl()
    forget_flash_attention()


def test_torchs_own_attention_is_compared_too(choose):
    """Fails if a run trains with a FlashAttention-2 that is broken or has wrong windows, or the user is not
    told what to try."""
    assert choose(9, 0, backend="sdpa") == ("sdpa", [])
    assert choose(8, 0, kernels=VarlenOnCPU()) == ("varlen-FA2", [])
    with pytest.raises(RuntimeError, match="FlashAttention-2.* gradient of q is off.*ATTN_BACKEND=flex"):
        choose(8, 0, kernels=VarlenOnCPU(backward_off=1))
    with pytest.raises(RuntimeError, match="FlashAttention-2.*Could not run 'aten::_flash_attention_forw"):
        choose(8, 0)


def test_flash_attention_3_where_it_can_be_had(choose, tmp_path):
    """Fails if torch's own attention is not used without the package or on another GPU, or if a package with
    missing or wrong kernels causes more than a warning."""
    active = torch.nn.attention.current_flash_attention_impl
    assert choose(9, 0, kernels=VarlenOnCPU()) == ("varlen-FA2", [])
    package = tmp_path / "flash_attn_interface.py"
    package.write_text("raise ImportError('undefined symbol: _ZN3c10')")
    name, (warning,) = choose(9, 0, kernels=VarlenOnCPU())
    assert name == "varlen-FA2" and "flash_attn_interface is installed, but" in warning
    assert "undefined symbol" in warning
    package.write_text(FA3_PACKAGE)
    assert choose(8, 0, kernels=VarlenOnCPU()) == ("varlen-FA2", [])
    assert choose(9, 0, kernels=VarlenOnCPU()) == ("varlen-FA3", []) and active() == "FA3"
    right_without = VarlenOnCPUWhere(lambda: active() is None)
    name, (warning,) = choose(9, 0, kernels=right_without)
    assert name == "varlen-FA2" and active() is None
    assert "cannot be used: its output is off" in warning


def test_flash_attention_4_where_it_can_be_had(choose, tmp_path):
    """Fails if it is not used on Hopper and Blackwell, is used elsewhere or before FlashAttention-3, or if
    another package named flash_attn is mistaken for it."""
    active = torch.nn.attention.current_flash_attention_impl
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert choose(9, 0, kernels=VarlenOnCPU()) == ("varlen-FA2", [])
    forget_flash_attention()
    (package / "cute").mkdir()
    (package / "cute" / "interface.py").write_text(FA4_PACKAGE)
    for capability, name in (((8, 0), "FA2"), ((9, 0), "FA4"), ((10, 0), "FA4"), ((12, 0), "FA2")):
        assert choose(*capability, kernels=VarlenOnCPU()) == (f"varlen-{name}", [])
    assert choose(9, 0, kernels=VarlenOnCPU())[0] == "varlen-FA4" and active() == "FA4"
    name, (warning,) = choose(9, 0, kernels=VarlenOnCPUWhere(lambda: active() is None))
    assert name == "varlen-FA2" and active() is None and "flash_attn.cute is installed, but" in warning
    (tmp_path / "flash_attn_interface.py").write_text(FA3_PACKAGE)
    assert choose(9, 0, kernels=VarlenOnCPU()) == ("varlen-FA3", [])
    name, (warning,) = choose(9, 0, kernels=VarlenOnCPUWhere(lambda: active() != "FA3"))
    assert name == "varlen-FA4" and active() == "FA4" and "FA3 is skipped" in warning


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_flash_attention_4_compiles_as_torch_calls_it(arch):
    """Fails if the version in requirements-gpu.txt does not match this torch's calls, or does not compile
    windows within documents, forward and backward."""
    pytest.importorskip("flash_attn.cute", reason="requirements-gpu.txt is not installed")
    script = ROOT / "tests" / "offgpu" / "flash_attention_4.py"
    done = subprocess.run([sys.executable, str(script), arch], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [
        f"{arch}: 6 heads of 128, 6 of keys",
        f"{arch}: 6 heads of 64, 3 of keys",
    ]


def test_compiled_code_is_kept_beside_the_script(monkeypatch):
    """Fails if every run of a sweep compiles for itself."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    compiling.torch_compile(abs)
    folder = train_gpt.SCRIPT.parent / ".compile_cache"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")


OTHER_NUMBERS = dict(  # numbers that compiled code does not hold
    LR_MULS="0.5,2,3,4",
    WARMUP_STEPS=3,
    COOLDOWN_FRAC=0.9,
    LR_DECAY_TYPE="exp",
    LR_DECAY_FINAL=0.2,
    LR_DECAY_SWITCH_STEP=500,
    LR_DECAY_SECOND_TYPE="linear",
    LR_DECAY_SECOND_FINAL=0.3,
    MUON_LR=0.01,
    MUON_MOMENTUM=0.9,
    MUON_WARMUP_STEPS=2,
    BETA_WARMUP_STEPS=5,
    MUON_WEIGHT_DECAY=0.3,
    ADAM_LR=0.01,
    ADAM_WEIGHT_DECAY=0.1,
    SPECTRAL_LR_MUL=0,
    SPECTRAL_LR_MUL_ATTN=0.3,
    SPECTRAL_LR_MUL_MLP=0.4,
    GRAD_CLIP=1,
    TARGET_LOSS=1,
    VAL_LOSS_EVERY=2,
    VAL_LOSS_LAST_STEPS=7,
    VAL_LOSS_EVERY_LAST=3,
    MANIFOLD_EVERY=1,
    DIVERGED_ABOVE=50,
    SEED=5,
    SAVE_EVERY=1,
    SAVE_MODEL=0,
    DIST_TIMEOUT=60,
)


def test_other_numbers_compile_nothing_anew(tmp_path, traced_only):
    """Fails if every arm of a sweep over learning rates is compiled anew."""
    trainer = train_gpt_muon_ord
    start = staged_start(trainer, tmp_path)
    config = small_config(
        trainer,
        num_layers=1,
        long_layers=(),
        paired_layers=(),
        value_embed_layers=(),
        skip=None,
        no_attention=(),
        backout=None,
    )

    def graphs_of_two_steps(**settings):
        """Number of new graphs in both steps of an Adam pair, with statistics and without."""
        env = {"MAX_DOC_TOKENS": 64, "BATCH_SIZES": "512,1024,1536,1536", "COMPILE": 1}
        s, o, _ = read(trainer, DATA_PATH=tmp_path, TRAIN_FILES="made_train_*.bin", **(env | settings))
        before = graphs_compiled()
        run = trainer.Trainer(s, o, config, 256, start.ranks)
        data = trainer.TrainData(start.train_shards, s, start.ranks)
        for step in (0, 1):
            run.step(step, data.next((512, 0)), measure=step == 0)
        data.prefetcher.close()
        return graphs_compiled() - before

    assert graphs_of_two_steps() > 5
    assert graphs_of_two_steps(**OTHER_NUMBERS) == 0
