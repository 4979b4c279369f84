"""The twin of train_gpt.py with Muon + ORD: the gradient's part along the weight (radial, "spectral") and the
rest are treated differently. Everything outside the two optimizer fences equals train_gpt.py (sync_twins.py).

    SCRIPT=train_gpt_muon_ord.py ./run.sh                                     # the default of run.sh
    SPECTRAL_LR_MUL=0.1 torchrun --standalone --nproc-per-node=8 train_gpt_muon_ord.py
    SPECTRAL_LR_MUL=0 SEED=3 python train_gpt_muon_ord.py        # equals train_gpt.py, digit for digit
    ORD_MODE=post SPECTRAL_OUT=0.5 SPECTRAL_RESCALE=1 python train_gpt_muon_ord.py
    python train_gpt_muon_ord.py --help

With G the Nesterov-averaged gradient and W the fp32 master of one matrix, P polar factor and variance
reduction: rho = <G, W> / (||W||^2 + eps), G_par = rho W. ORD_MODE=interpolate updates by
P(G - a G_par) + a G_par with a = SPECTRAL_LR_MUL; ord_update describes project, post and off.
"""

import functools
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH=1

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.documents import DocumentStream
from data.prefixes import prefix_tokens
from data.shards import Shard, check_validation, open_pair
from kernels import vectors
from kernels.attention import Documents
from kernels.experts import MixtureOfExperts, Routing, draw_noise, load_fields
from kernels.float8 import Float8Linear
from kernels.heads import compose_heads, grouped_shape, in_head_order, without_own_value
from kernels.ngrams import embed_ngrams, sign_table
from kernels.signals import NGRAM_START, RESID_START, Mudd, TokenNet, gate_signals, signal_names
from runtime import refusals, settings, supervise
from runtime.compiling import compile_forward, compiler_for
from runtime.flops import flop_per_token
from runtime.memory import MOST_TOKENS, Memory
from runtime.prefetch import Prefetcher, to_device
from runtime.presets import PRESET_CHANGES
from runtime.ranks import Ranks, find_device
from runtime.session import Session
from runtime.settings import knob, machine_knob
from runtime.sharding import (
    SMALL,
    Bucket,
    MatrixStack,
    gradient_norm,
    read_master,
    stats_by_layer,
    write_master,
)

SCRIPT = Path(__file__).resolve()

# Words used throughout:
#   step    one batch and its update; its number counts the updates before it, from 0
#   slice   equal part of a batch, read by one rank; the ranks share a batch's slices (count_slices)
#   pass    forward (and backward) of some slices of one rank, stacked: as many as its memory takes
#   stage   part of the schedule with its own batch size, windows and loss weights: three, then the extension
#   stream  x, the residual stream (B, T, C), to which each layer adds its branches: attention, then MLP
#   signal  numbers that a small network makes for each token, in place of a learned parameter of that name
#   "the public record": the speedrun's of 2026-01-19; constants without a stated reason are taken from it

# ---------------------------------------------------------------------------------------------------
# Settings: one environment variable each, named as the field in capitals. A knob changes the numbers of
# a run, a machine_knob where and how it runs. Those that any trainer has are in runtime/settings.py.
# ---------------------------------------------------------------------------------------------------


DECAYS = ("linear", "exp", "cosine", "constant")  # shapes of the learning rate's decay
SECOND_DECAYS = ("linear", "exp", "constant")
ATTN_BACKENDS, KERNELS = ("auto", "varlen", "flex", "sdpa"), ("auto", "triton", "cpu", "torch")
OPTIMIZERS = ("normuon", "muon", "adamw")
LONG_DOCS, DECAY_MODES = ("cut", "split"), ("cautious", "none", "param", "update", "both")
PARTS = ("", "qk_group", "value_std", "value_gate_reads_table", "ngram_signs", "attn_source", "mudd")
PARTS += ("xsa_layers", "gate_layers", "compose_tokens", "prefix_weights")  # fields of ModelConfig
BY_STAGE = ("batch_sizes", "lr_muls", "max_doc_tokens")  # settings with one value per stage
# settings that need a value of another: a second decay, Muon, AdamW
second_knob = functools.partial(knob, only=("lr_decay_second_type", SECOND_DECAYS))
muon_knob = functools.partial(knob, only=("optimizer", ("normuon", "muon")))
adamw_knob = functools.partial(knob, only=("optimizer", ("adamw",)))


@dataclass(frozen=True)
class Settings(settings.RunSettings):
    """Settings of this trainer and its ORD twin, beside those of any run.

    A preset (MODEL) may change defaults; the environment has the last word.
    """

    seed: int = knob(0, "initial weights, data order and router noise, a stream each", low=0, high=2**62)
    model: str = knob("auto", "preset; auto: gpt2-small on CUDA, tiny without")
    attn_backend: str = machine_knob("auto", "auto: varlen on CUDA, else sdpa", choices=ATTN_BACKENDS)
    kernels: str = machine_knob("auto", "fast forms; auto: by device; torch: plain PyTorch", choices=KERNELS)
    disable_fp8: bool = knob(False, "use a bfloat16 head even where float8 is available (sm_89 and later)")
    # data
    val_batch_tokens: int = knob(2_097_152, "tokens of a validation batch", low=1024, rare=True)
    max_doc_tokens: tuple[int, ...] = knob((2048,) * 4, "longest document, by stage", low=16, rare=True)
    long_docs: str = knob("cut", "rest of a longer document: dropped or kept", choices=LONG_DOCS, rare=True)
    # length and shape of the run; one value per stage: three scheduled thirds, then the extension
    num_scheduled_iterations: int = knob(1560, "steps of the three scheduled stages", low=1)
    num_extension_iterations: int = knob(40, "steps after them, with longer windows", low=0)
    train_tokens: int = knob(0, "scheduled tokens; sets NUM_SCHEDULED_ITERATIONS; 0: off", low=0)
    batch_sizes: tuple[int, ...] = knob((131072, 262144, 393216, 393216), "tokens per step", low=128)
    slices: int = knob(8, "slices that a batch is cut into; more of them take less memory", low=8, high=64)
    pass_tokens: int = machine_knob(0, "most tokens of a pass of several slices; 0: by memory", low=0)
    residual_scale: float = knob(1.0, "factor on the output of every attention and MLP branch")
    ngrams: tuple[int, ...] = knob(None, "lengths of hashed n-grams; empty: preset's", low=2, high=5)
    ngram_rows: int = knob(None, "rows of the n-gram table; empty: preset's; 0: none", low=0, high=2**24)
    without: str = knob("", "part of the preset to leave out, for ablations", choices=PARTS, rare=True)
    # mixture of experts, for presets that have one
    num_experts: int = knob(0, "experts per layer, for presets that have them", low=0, high=256)
    moe_top_k: int = knob(2, "experts that a token goes to", low=2)
    moe_balance_weight: float = knob(0.01, "weight of the balance loss; even load is 1 per layer", low=0)
    router_noise: float = knob(0.1, "standard deviation of router noise, in training", low=0)
    # learning rate
    lr_muls: tuple[float, ...] = knob(
        (1.0, 1.52, 1.73, 1.0), "learning-rate multiplier; linear and cosine decay to LR_DECAY_FINAL", low=0
    )
    warmup_steps: int = knob(0, "steps of linear learning-rate warm-up", low=0)
    cooldown_frac: float = knob(0.55, "share of the scheduled steps that the decay takes", low=0, high=1)
    lr_decay_type: str = knob("linear", "shape of the decay", choices=DECAYS)
    lr_decay_final: float = knob(0.1, "multiplier at the decay's end; exp: times the stage's", low=0)
    lr_decay_second_type: str = knob(None, "shape of a second decay; empty: none", choices=SECOND_DECAYS)
    lr_decay_switch_step: int = second_knob(0, "first step of the second decay, during the first", low=0)
    lr_decay_second_final: float = second_knob(
        None, "the second decay's end, times the stage's multiplier; empty: LR_DECAY_FINAL", low=0
    )

    @property
    def cooldown_start(self) -> int:
        """First step of the learning rate's decay."""
        return int(self.num_scheduled_iterations * (1 - self.cooldown_frac))


@dataclass(frozen=True)
class NorMuonSettings:
    """The optimizer's settings."""

    optimizer: str = knob("normuon", "for matrices; muon: no variance reduction", choices=OPTIMIZERS)
    muon_lr: float = muon_knob(
        0.023, "Muon's rate; times sqrt(max(1, rows/columns)), and 2 for the MLP's second matrix", low=0
    )
    muon_momentum: float = muon_knob(0.95, "momentum after its warm-up from 0.85", low=0, high=0.9999)
    muon_warmup_steps: int = muon_knob(300, "steps of the momentum's warm-up", low=0)
    muon_beta2: float = muon_knob(0.95, "memory of squared updates, per step", low=0, high=0.9999)
    beta_warmup_steps: int = knob(0, "steps in which Adam's betas rise from 0; 0: none", low=0)
    muon_weight_decay: float = muon_knob(1.2, "decay of matrices: W -= lr * d * W, d times lr if cautious")
    muon_decay_mode: str = muon_knob("cautious", "which weights, or the update, decay", choices=DECAY_MODES)
    adam_lr: float = knob(0.008, "Adam's base rate; roles multiply it by up to 75", low=0)
    router_lr: float = knob(0.001, "learning rate of the experts' routers, in ADAM_LR's place", low=0)
    adam_weight_decay: float = knob(0.005, "cautious decay; times the rate's square and role", low=0)
    adam_matrix_lr: float = adamw_knob(5e-4, "learning rate of matrices", low=0, rare=True)
    adam_matrix_decay: float = adamw_knob(0.1, "weight decay of matrices", low=0, rare=True)
    grad_clip: float = knob(0.0, "clip gradients to this norm (grad_norm in the log); 0: no clipping", low=0)


def read_settings(env) -> tuple[Settings, "OptimizerSettings", "ModelConfig"]:
    """Read the environment over the preset's defaults; SettingsError says what is wrong."""
    device = find_device(env)
    model = settings.choose_model(env, PRESETS, "gpt2-small" if device == "cuda" else "tiny")
    config, changes = PRESETS[model]
    s, o = settings.read(SETTINGS, env, changes, SCRIPT.name)
    s = replace(s, **{name: one_per_stage(name, getattr(s, name), changes) for name in BY_STAGE})
    s = s.resolved(model, device, SCRIPT)
    refusals.check_settings(s, env, BY_STAGE, NUM_STAGES, VAL_SLICES)
    refusals.check_model(s, o, config, PRESETS)
    check_optimizer_settings(o)
    s = refusals.resolve_machine(resolve_length(s))
    refusals.check_decays(s)
    return s, o, model_config(s, config)


def one_per_stage(name: str, values: tuple, changes: dict) -> tuple:
    """A value for each stage, of the setting `name`. changes: the preset's defaults."""
    if name == "max_doc_tokens" and len(values) == 1:
        return values * NUM_STAGES
    if len(values) == NUM_STAGES - 1:  # the extension keeps its default
        return (*values, changes.get(name, getattr(Settings, name))[-1])
    return values


def model_config(s: Settings, c: "ModelConfig") -> "ModelConfig":
    """The preset's config with the settings that change it."""
    rows = c.ngram_rows if s.ngram_rows is None else s.ngram_rows
    changes = dict(ngrams=s.ngrams or c.ngrams, ngram_rows=rows)
    if s.without:
        changes[s.without] = getattr(ModelConfig, s.without)
    if s.without == "mudd":
        changes["backout"] = c.mudd[1]  # MUDD replaced backout: restore it
    if s.without == "gate_layers":
        changes["compose_tokens"] = 0  # composition needs the gate networks
    if c.num_experts:
        changes |= dict(num_experts=s.num_experts, moe_top_k=s.moe_top_k)
    return replace(c, **changes)


def resolve_length(s: Settings) -> Settings:
    """Turn TRAIN_TOKENS into steps; without an extension, its batch size counts for nothing."""
    changes = {}
    if s.train_tokens:
        mean_batch = sum(s.batch_sizes[:-1]) / (NUM_STAGES - 1)
        num_steps = max(1, round(s.train_tokens / mean_batch))
        changes |= {"num_scheduled_iterations": num_steps, "train_tokens": 0}
    if not s.num_extension_iterations:  # no step uses the extension's batch size: no forecast or check may
        changes["batch_sizes"] = (*s.batch_sizes[:-1], s.batch_sizes[-2])
    return replace(s, **changes)


# ---------------------------------------------------------------------------------------------------
# Presets: what they consist of. PRESETS itself comes after the optimizer, whose defaults it may change.
# ---------------------------------------------------------------------------------------------------

NUM_STAGES = 4  # three scheduled, and the extension


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and topology. Tuples of layers say which have a feature; windows are (short, long) in blocks.

    The defaults are gpt2-small, which has all of the public record's parts.
    """

    num_layers: int = 11
    width: int = 768
    num_heads: int = 6
    head_dim: int = 128
    num_kv_heads: int = 6
    window_block: int = 128
    windows: tuple = ((1, 3), (3, 7), (5, 11), (6, 13))  # windows[stage]
    final_windows: tuple = (6, 20)  # the last validation's; no step has them
    long_layers: tuple = (3, 10)  # these have the long window, and keys offset by a token
    paired_layers: tuple = (0, 2, 5, 9)  # heads attend in pairs over a doubled sequence
    value_embed_layers: tuple = (0, 1, 8, 9, 10)  # a table each, added to v (arXiv 2410.17897)
    skip: tuple | None = (3, 6)  # output of layer 3 joins layer 6, gated, as in a U-Net
    no_attention: tuple = (6,)
    backout: int | None = 7  # this layer's output, times a learned scalar, is subtracted before the head
    ngram_rows: int = 5 * 50304  # rows of the hash embedding; 0: none
    ngrams: tuple = (2,)  # how many last tokens are hashed into it
    smear: bool = True  # each embedding gets some of the one before it, gated
    attn_gate: bool = True  # gates heads' outputs (arXiv 2505.06708); if gate_layers, long_layers only
    # predict[stage][k]: weight of the loss on token t+1+k, (at the stage's start, at its end)
    predict: tuple = (((1, 1), (0.5, 0.5), (0.25, 0)), ((1, 1), (0.5, 0)), ((1, 1),), ((1, 1),))
    untie_frac: float = 2 / 3  # share of the scheduled steps; then embedding and head part; 1: never
    num_experts: int = 0  # experts that replace each MLP; 0: none
    moe_top_k: int = 2
    expert_hidden: int = 0  # hidden width of one expert
    # parts of later records, 2026-02 to 2026-07; docs/differences.md says what each brought there
    qk_group: int = 0  # heads of q, or of k, that Muon orthogonalizes together; 0: all
    value_std: float = 0.0  # initial standard deviation of the value tables
    value_gate_reads_table: bool = False  # half of what gates a value embedding comes from its own row
    ngram_signs: int = 0  # rows of fixed random signs that the n-gram embedding is multiplied by; 0: none
    branch_factors: bool = False  # learned, also on the stream before each branch; x0 joins after attention
    attn_source: int | None = None  # attention of all later layers reads this layer's output
    mudd: tuple | None = None  # two layers whose outputs come back, by token, in the last layer and after it
    xsa_layers: tuple = ()  # heads' outputs lose some of what lies along the token's own value
    gate_layers: tuple = ()  # a network before each makes the gates of the layers up to the next, by token
    compose_tokens: int = 0  # reach, in positions, of the mixture of the last layer's heads; 0: none
    prefix_weights: tuple = ((0, 0),) * 4  # as predict, for the next token's prefix

    def __post_init__(self):
        later = self.mudd or self.gate_layers or self.attn_source is not None
        assert self.branch_factors or not later, "mudd, gate_layers and attn_source require branch_factors"
        assert self.gate_layers or not self.compose_tokens, "compose_tokens requires gate_layers"
        assert not (self.branch_factors and self.num_experts), "experts' branches have no factors"
        assert not set(self.long_layers) & set(self.paired_layers), "paired layers require the short window"
        assert self.gate_layers[:1] in ((), (0,)), "layers before the first gate network would have no gates"

    @property
    def predicts_prefixes(self) -> bool:
        """True if a stage has the loss on the next token's prefix."""
        return any(start or end for start, end in self.prefix_weights)


@dataclass(frozen=True)
class LayerPlan:
    """The features of one layer."""

    attention: bool
    long_window: bool
    paired: bool
    value_embed: bool
    xsa: bool
    composed: bool
    signals: frozenset  # names of the per-token numbers that networks make, in place of parameters


def layer_plans(c: ModelConfig) -> list[LayerPlan]:
    """One plan per layer."""
    return [
        LayerPlan(
            attention=i not in c.no_attention,
            long_window=i in c.long_layers,
            paired=i in c.paired_layers,
            value_embed=i in c.value_embed_layers,
            xsa=i in c.xsa_layers,
            composed=c.compose_tokens > 0 and i == c.num_layers - 1,
            signals=signals,
        )
        for i, signals in enumerate(signal_names(c))
    ]


# ---------------------------------------------------------------------------------------------------
# Batches: shards of documents -> slices of tokens
# ---------------------------------------------------------------------------------------------------

VAL_SLICES = 8  # slices of a validation batch; independent of SLICES, so that arms compare
# Random streams of SEED: 0 initial weights; 1 order of shards, 2 of documents (data/documents.py);
# 3 router noise (kernels/experts.py). A new one takes the next number
INIT_STREAM = 0


class Batch(NamedTuple):
    """One forward pass of one rank: B slices of T tokens."""

    inputs_BT: Tensor  # int32
    targets_BT: Tensor  # int64, the token that follows each input in the shard
    cu_seqlens: Tensor  # int32: document starts in the B*T inputs, then B*T; length varies from pass to pass
    max_doc_tokens: int


def count_slices(s: Settings, world_size: int) -> int:
    """Number of slices in a training batch: SLICES, or as many as there are ranks if that is more."""
    return max(s.slices, world_size)


def count_val_slices(world_size: int) -> int:
    """Number of slices in a validation batch: VAL_SLICES, or one per rank if that is more."""
    return max(VAL_SLICES, world_size)


def my_slices(num_slices: int, ranks: Ranks) -> range:
    """This rank's slices of a global batch."""
    each = num_slices // ranks.world_size
    return range(ranks.rank * each, (ranks.rank + 1) * each)


def stack_slices(slices: list, device, max_doc_tokens: int, pass_tokens: int = MOST_TOKENS) -> list[Batch]:
    """Stack slices, (inputs, targets, document lengths) in numpy, into passes of at most pass_tokens tokens.

    A pass has one slice at least.
    """
    per_pass = max(1, pass_tokens // len(slices[0][0]))
    batches = []
    for start in range(0, len(slices), per_pass):
        inputs, targets, lengths = zip(*slices[start : start + per_pass])
        inputs, targets = np.stack(inputs).astype(np.int32), np.stack(targets).astype(np.int64)
        cu_seqlens = np.cumsum(np.concatenate([[0], *lengths])).astype(np.int32)
        tensors = (to_device(torch.from_numpy(x), device) for x in (inputs, targets, cu_seqlens))
        batches.append(Batch(*tensors, max_doc_tokens))
    return batches


class TrainData:
    """Endless training batches. The last document of a slice is cut to fill it, its rest skipped.

    Every rank plans all slices of a step and reads its own, so that 1, 2, 4 and 8 ranks see the same tokens.
    A thread makes the next step's batch while this one is computed. So `documents` is a step ahead of
    `position`, which checkpoints hold: where the next step to be trained begins.
    """

    def __init__(self, shards: list[Shard], s: Settings, ranks: Ranks, pass_tokens: int = MOST_TOKENS):
        self.max_doc_tokens, self.pass_tokens, self.device = s.max_doc_tokens, pass_tokens, ranks.device
        self.documents = DocumentStream(shards, s.seed, s.max_doc_tokens[0], s.long_docs == "split")
        self.num_slices = count_slices(s, ranks.world_size)
        self.mine = my_slices(self.num_slices, ranks)
        self.prefetcher = Prefetcher(ranks.device)
        self.position, self.next_batches = self.documents.position, None

    def seek(self, position: tuple[int, int, int]):
        """Go to a position of the documents, as a checkpoint holds it."""
        self.documents.seek(position)
        self.position, self.next_batches = self.documents.position, None

    def make(self, batch_tokens: int, stage: int = 0) -> list[Batch]:
        """This rank's passes of the next step."""
        longest, slice_tokens = self.max_doc_tokens[stage], batch_tokens // self.num_slices
        self.documents.set_longest(longest)
        plans = [self.documents.plan_slice(slice_tokens) for _ in range(self.num_slices)]
        slices = [self.documents.read_slice(*plans[i]) for i in self.mine]
        return stack_slices(slices, self.device, min(longest, slice_tokens), self.pass_tokens)

    def next(self, now: tuple[int, int], then: tuple[int, int] | None = None) -> list[Batch]:
        """This rank's passes of a step. now, then: (tokens, stage) of it and of the next, made meanwhile."""
        if self.next_batches is None:  # the first step, or the first after seek()
            self.next_batches = self.prefetcher.start(self.make, *now)
        batches = self.prefetcher.take(self.next_batches)
        self.position = self.documents.position
        self.doc_lengths = self.documents.lengths  # this shard's: the thread may go on to the next one
        self.next_batches = self.prefetcher.start(self.make, *then) if then else None
        return batches


def val_batches(shards: list[Shard], s: Settings, ranks: Ranks, num_batches: int | None = None):
    """Yield this rank's passes over the first VAL_TOKENS tokens, in contiguous slices that may cut documents.

    num_batches: stop after this many global batches.
    """
    need = s.val_tokens + 1
    tokens = np.concatenate([shard.head(need) for shard in shards])[:need]
    num_slices = count_val_slices(ranks.world_size)
    slice_tokens = s.val_batch_tokens // num_slices
    marks = np.flatnonzero(tokens[:-1] == shards[0].mark)
    edges = np.union1d(marks, np.arange(0, need, slice_tokens))  # ends of documents and slices
    longest = int(np.diff(edges).max())  # the longest of all batches: compiled code is made for it
    for batch_start in range(0, s.val_tokens, s.val_batch_tokens)[:num_batches]:
        slices = []
        for i in my_slices(num_slices, ranks):
            start = batch_start + i * slice_tokens
            end = start + slice_tokens
            lengths = np.diff(edges[(edges >= start) & (edges <= end)])
            slices.append((tokens[start:end], tokens[start + 1 : end + 1], lengths))
        yield from stack_slices(slices, ranks.device, longest)


def open_data(s: Settings, world_size: int) -> tuple[list[Shard], list[Shard]]:
    """Training and validation shards, checked against each other and against what the run needs."""
    train, val = open_pair(s.data_path, s.train_files, s.val_files)
    check_validation(val, s.val_tokens, "VAL_BATCH_TOKENS", s.val_batch_tokens)
    num_slices, val_slices = count_slices(s, world_size), count_val_slices(world_size)
    refusals.check_slices(s, train, num_slices, val_slices, world_size)
    if model_config(s, PRESETS[s.model][0]).predicts_prefixes:
        prefix_tokens(train[0].vocab_size)  # refuses what it does not know, before anything starts
    return train, val


# ---------------------------------------------------------------------------------------------------
# Model
# B slices, T tokens of one, M = B T, H heads, D head dim, C width, V vocabulary (padded), K predicted tokens
#
# Plain torch, for every device. kernels/fast_forms.py replaces some of these functions by faster ones. An
# edit of such a function, of its class's __init__ or of a helper it uses brings the plain one back: the log
# warns, and losses change in the last digit. KERNELS=torch takes plain functions alone.
# ---------------------------------------------------------------------------------------------------

# The first four, and the starts of the learned scalars below, are the public record's
GATE_CHANNELS = 12  # gates read only the first 12 channels of their input
SOFTCAP = (23.0, 5.0, 7.5)  # logits = 23 sigmoid((z + 5) / 7.5): Gemma 2's cap (arXiv 2408.00118), shifted
ATTN_SCALE = 0.1  # factor on q k^T, before YaRN, for any head_dim; 1 / sqrt(128) is 0.088
ROTARY_BASE = 1024  # the slowest pair turns by 1 / 1024 radians per token
VOCAB_MULTIPLE = 128  # so that the head's product has aligned shapes
INIT_GAIN = 0.5  # q, k, v, o and up start uniform with standard deviation INIT_GAIN / sqrt(width)
ROUTER_STD = 0.02  # standard deviation of a router's first weights


def norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, without gain."""
    return F.rms_norm(x, (x.size(-1),))


def learned_scalar(value: float) -> nn.Parameter:
    """Learned scalar, fp32 on every device."""
    return nn.Parameter(torch.tensor(value))


class Rotary(nn.Module):
    """Rotary embedding (arXiv 2104.09864) of half a head: D/4 frequencies turn pairs, the rest stands still.

    Holds the softmax scale too, because YaRN changes both.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        freqs = (1 / ROTARY_BASE) ** torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("freqs", freqs)  # radians per token
        self.scale = ATTN_SCALE  # a Python float: baked into compiled code, and new windows recompile anyway
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)

    def make_tables(self, num_positions: int):
        angles = torch.outer(torch.arange(num_positions, device=self.freqs.device), self.freqs.float())
        if self.cos.shape == angles.shape:  # in place, so that compiled code keeps its addresses
            self.cos.copy_(angles.cos())
            self.sin.copy_(angles.sin())
        else:
            self.cos, self.sin = angles.cos(), angles.sin()

    def extend(self, old: int, new: int):
        """Extend the long window from `old` to `new` tokens (YaRN, arXiv 2309.00071, with beta 1 and 32).

        Frequencies that turn less than once in the old window are slowed by the windows' ratio, fast ones
        kept.
        """
        turns = old * self.freqs / (2 * math.pi)
        ratio = old / new
        self.freqs.mul_(ratio + ((turns - 1) / 31).clamp(0, 1) * (1 - ratio))
        self.scale *= 1 + 0.2 * math.log(new / old)
        self.make_tables(self.cos.shape[0])

    def forward(self, x_BTHD: Tensor) -> Tensor:
        T, D = x_BTHD.shape[1], x_BTHD.shape[-1]
        # identity (cos 1, sin 0) for the half that stands still; slicing would go through a GPU's memory
        cos, sin = F.pad(self.cos[:T], (0, D // 4), value=1.0), F.pad(self.sin[:T], (0, D // 4))
        cos = torch.stack((cos, cos), dim=-1).flatten(1).unsqueeze(1)
        sin = torch.stack((-sin, sin), dim=-1).flatten(1).unsqueeze(1)
        x = x_BTHD.float()
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # the two of each pair
        return (x * cos + swapped * sin).type_as(x_BTHD)


def pair_heads(x_BTHD: Tensor) -> Tensor:
    """Put heads h and h + H/2 one after the other along the sequence, at positions 2t and 2t + 1.

    Returns a view, (B, 2T, H/2, D). Each then attends to the other's keys, too. The public record mixes the
    two by a view of the flat channels; this is the clean form of its idea.
    """
    return x_BTHD.unflatten(2, (2, -1)).flatten(1, 2)


def unpair_heads(y_BTHD: Tensor) -> Tensor:
    """Undo pair_heads: (B, T, H, D) of (B, 2T, H/2, D)."""
    return y_BTHD.unflatten(1, (-1, 2)).flatten(2, 3)


def offset_keys(k_BTHD: Tensor) -> Tensor:
    """Move the half of each key that rotary leaves still to the next position.

    A head that matches token t by this half reads the value of token t + 1. As the public record.
    """
    turning, still = k_BTHD.chunk(2, dim=-1)
    return torch.cat((turning, torch.cat((still[:, :1], still[:, :-1]), dim=1)), dim=-1)


class Common(NamedTuple):
    """Inputs and constants that all layers of a pass share."""

    docs: Documents
    windows: tuple[int, int]  # (short, long) in tokens
    rotary: Rotary
    out_scale: float  # factor on the output of every branch
    routing: Routing


class Embeds(NamedTuple):
    """Inputs of a layer from the tokens themselves, beside the stream. None where the layer has none."""

    x0: Tensor  # token embeddings, normed, (B, T, C)
    ngram: Tensor | None  # (B, T, C)
    value: Tensor | None  # rows of the layer's own value table, num_kv_heads * head_dim wide


class Attention(nn.Module):
    """Causal self-attention within documents and a window; q and k normed (arXiv 2010.04245), heads gated.

    A signal, which a network makes by token, stands in for the parameter of that name. A layer that has
    neither lacks the part.
    """

    def __init__(self, c: ModelConfig, plan: LayerPlan):
        super().__init__()
        self.plan, self.head_dim = plan, c.head_dim
        self.num_heads, self.num_kv_heads = c.num_heads, c.num_kv_heads
        self.q = nn.Parameter(torch.empty(grouped_shape(c.num_heads, c)))
        self.k = nn.Parameter(torch.empty(grouped_shape(c.num_kv_heads, c)))
        self.v = nn.Parameter(torch.empty(c.num_kv_heads * c.head_dim, c.width))
        self.o = nn.Parameter(torch.empty(c.width, c.num_heads * c.head_dim))
        self.qkv_lambda, self.o_lambda = learned_scalar(0.5), learned_scalar(1.0)
        self.attn_gate = self.value_gate = self.xsa_alpha = None
        if c.attn_gate and not c.gate_layers:
            self.attn_gate = nn.Parameter(torch.zeros(c.num_heads, GATE_CHANNELS))
        if plan.value_embed and "value_gate" not in plan.signals:
            self.value_gate = nn.Parameter(torch.zeros(c.num_kv_heads, GATE_CHANNELS))
        if plan.xsa and "xsa" not in plan.signals:
            self.xsa_alpha = nn.Parameter(torch.zeros(c.num_heads))
        self.gate_reads_table, self.compose_tokens = c.value_gate_reads_table, c.compose_tokens

    def forward(self, x_BTC: Tensor, value_BTC: Tensor | None, signals: dict, common: Common) -> Tensor:
        """Return the branch, (B, T, C), which the block adds to the stream.

        value_BTC: the tokens' value embeddings. signals: {name: (B, T, size)}, what networks made for this
        layer.
        """
        B, T, _ = x_BTC.shape
        n_BTC = norm(x_BTC)
        q, k = self.queries_and_keys(n_BTC, common.rotary)
        v = F.linear(n_BTC, self.v * self.qkv_lambda).view(B, T, -1, self.head_dim)
        gate_in = n_BTC[..., :GATE_CHANNELS]
        if value_BTC is not None:
            v = v + self.gate_of_value(gate_in, value_BTC, signals).unsqueeze(-1) * value_BTC.view_as(v)
        if "value" in signals:  # MUDD makes it
            v = v + signals["value"].view_as(v)
        own_value = v
        if self.plan.paired:
            v = pair_heads(v)
        short, long = common.windows
        window = long if self.plan.long_window else short
        scale = common.rotary.scale
        y = common.docs.attend(q, k, v, window, self.plan.paired, scale)
        if self.plan.paired:
            y = unpair_heads(y)
        if self.plan.composed:
            shares = signals["compose_from"], signals["compose_into"]
            y = y + compose_heads(q, k, v, common.docs.doc_BT, scale, self.compose_tokens, *shares)
        if self.plan.xsa:
            alpha = signals["xsa"] if self.xsa_alpha is None else self.xsa_alpha.to(y.dtype)
            y = without_own_value(y, own_value, alpha)
        if self.attn_gate is not None:
            y = y * torch.sigmoid(F.linear(gate_in, self.attn_gate)).unsqueeze(-1)
        elif "attn_gate" in signals:
            y = y * signals["attn_gate"].unsqueeze(-1)
        return F.linear(y.flatten(2), self.o * (common.out_scale * self.o_lambda))

    def queries_and_keys(self, n_BTC: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Normed and rotated q and k, (B, T, H, D), where k has H_kv heads; if paired (B, 2T, H/2, D)."""
        places = 2 if self.plan.paired else 1  # positions per token
        q, k = in_head_order(self.q, self.head_dim), in_head_order(self.k, self.head_dim)
        # One product for both, so that the compiler norms and rotates them in one pass
        if self.plan.paired:  # halves of the heads take turns, so that a token's two positions are a view
            (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
            weight = torch.cat((q1, k1, q2, k2))
        else:
            weight = torch.cat((q, k))
        # the norm cancels this factor but for its eps; the public record has it on q and k, too
        qk = F.linear(n_BTC, weight * self.qkv_lambda)
        # as one view, torch 2.11's compiler moves 1.6 GB more per pass of gpt2-small
        qk = rotary(norm(qk.unflatten(-1, (places, -1, self.head_dim)).flatten(1, 2)))
        q, k = qk.split((self.num_heads // places, self.num_kv_heads // places), dim=2)
        if self.plan.long_window:
            k = offset_keys(k)
        return q, k

    def gate_of_value(self, gate_in, value_BTC, signals: dict) -> Tensor:
        """Factor on the value embedding of each key head, (B, T, H)."""
        if "value_gate" in signals:  # one for each half of the heads
            return signals["value_gate"].repeat_interleave(self.num_kv_heads // 2, dim=-1)
        if self.gate_reads_table:
            half = GATE_CHANNELS // 2
            gate_in = torch.cat((gate_in[..., :half], value_BTC[..., :half]), dim=-1)
        return 2 * torch.sigmoid(F.linear(gate_in, self.value_gate))


class MLP(nn.Module):
    """x + W2 relu(W1 norm(x))^2 (arXiv 2109.08668), or without x; both matrices stored (4C, C)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.empty(4 * c.width, c.width)) for _ in range(2))
        self.adds_input = not c.branch_factors

    def forward(self, x_BTC: Tensor, out_scale: float) -> Tensor:
        hidden = F.linear(norm(x_BTC), self.up).relu().square()
        # scale the weight: it is smaller than the activation
        down = self.down if out_scale == 1 else self.down * out_scale
        return x_BTC + hidden @ down if self.adds_input else hidden @ down


class Block(nn.Module):
    """One layer: mixes token and n-gram embeddings into the stream, then adds attention and MLP."""

    def __init__(self, c: ModelConfig, plan: LayerPlan):
        super().__init__()
        self.attn = Attention(c, plan) if plan.attention else None
        if c.num_experts:
            self.mlp = MixtureOfExperts(c.width, c.num_experts, c.expert_hidden, c.moe_top_k)
        else:
            self.mlp = MLP(c)
        # parameters resid_lambda, x0_lambda, ngram_lambda; in a FactoredBlock resid_attn_lambda, attn_lambda,
        # x0_lambda, ngram_lambda, resid_mlp_lambda, mlp_lambda
        for name, start in self.factor_starts(plan).items():
            if name not in plan.signals and (name != "ngram" or c.ngram_rows):
                setattr(self, f"{name}_lambda", learned_scalar(start))

    def factor_starts(self, plan: LayerPlan) -> dict[str, float]:
        """Starts of the learned factors, by name; a network may make some of them instead."""
        return {"resid": 1.1, "x0": 0.0, "ngram": 0.1}

    def factor(self, name: str, signals: dict) -> Tensor:
        """A number, or one for each token, (B, T, 1)."""
        return signals[name] if name in signals else getattr(self, f"{name}_lambda")

    def mix(self, resid: str, x: Tensor, embeds: Embeds, signals: dict) -> Tensor:
        """The stream, times its factor `resid`, with some of the embedding and of the n-gram embedding."""
        mixture = self.factor(resid, signals) * x + self.factor("x0", signals) * embeds.x0
        return mixture if embeds.ngram is None else mixture + self.factor("ngram", signals) * embeds.ngram

    def forward(self, x, embeds: Embeds, attn_source, signals: dict, common: Common) -> Tensor:
        """Return the stream after the layer. attn_source is for a FactoredBlock."""
        x = self.mix("resid", x, embeds, signals)
        if self.attn is not None:
            x = x + self.attn(x, embeds.value, signals, common)
        if isinstance(self.mlp, MixtureOfExperts):
            return x + self.mlp(norm(x), common.out_scale, common.routing)
        return self.mlp(x, common.out_scale)  # norms and adds x itself, because its fast forms fuse that


class FactoredBlock(Block):
    """A layer with branch_factors: embeddings are mixed in after attention.

    In each sum, stream and branch have a factor: a parameter, or one for each token from a network.
    """

    def factor_starts(self, plan: LayerPlan) -> dict[str, float]:
        mixed = {"resid_attn": RESID_START, "attn": 1.0, "x0": 0.0, "ngram": NGRAM_START}
        return (mixed if plan.attention else {}) | {"resid_mlp": RESID_START, "mlp": 1.0}

    def forward(self, x, embeds: Embeds, attn_source, signals: dict, common: Common) -> Tensor:
        """Return the stream after the layer. attn_source: what attention reads, x or an earlier output."""
        if self.attn is not None:
            branch = self.attn(attn_source, embeds.value, signals, common)
            x = self.mix("resid_attn", x, embeds, signals) + self.factor("attn", signals) * branch
        # this product first: autograd sums x's gradients in the order of these lines, and another order
        # changes the last digits
        resid = self.factor("resid_mlp", signals) * x
        return resid + self.factor("mlp", signals) * self.mlp(x, common.out_scale)


class GPT(nn.Module):
    """The speedrun's GPT. Knows nothing of ranks or optimizers."""

    def __init__(
        self, c: ModelConfig, vocab_size, backend, residual_scale=1.0, float8_head=False, balance_weight=0.0
    ):
        super().__init__()
        self.config, self.plans = c, layer_plans(c)
        self.backend, self.residual_scale = backend, residual_scale
        self.float8_head, self.balance_weight = float8_head, balance_weight
        self.head_tokens = MOST_TOKENS  # tokens per piece of the validation head; a Trainer sets what fits
        if c.num_experts:  # tokens that validation sent to each expert of each layer
            load = torch.zeros(c.num_layers, c.num_experts, dtype=torch.int64)
            self.register_buffer("expert_load_LE", load, persistent=False)
        V = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.head = nn.Parameter(torch.empty(V, c.width))
        self.embed = nn.Parameter(torch.empty(V, c.width)) if c.untie_frac < 1 else None
        self.ngram_table = nn.Parameter(torch.empty(c.ngram_rows, c.width)) if c.ngram_rows else None
        kv_width = c.num_kv_heads * c.head_dim
        self.value_embeds = nn.ParameterDict({str(i): torch.empty(V, kv_width) for i in c.value_embed_layers})
        if c.smear:
            self.smear_gate, self.smear_lambda = nn.Parameter(torch.zeros(GATE_CHANNELS)), learned_scalar(0.0)
        if c.skip:
            self.skip_lambda = learned_scalar(-1.5)
            if not c.gate_layers:
                self.skip_gate = nn.Parameter(torch.zeros(GATE_CHANNELS))
        if c.backout is not None:
            self.backout_lambda = learned_scalar(0.5)
        self.rotary = Rotary(c.head_dim)
        make_block = FactoredBlock if c.branch_factors else Block
        self.blocks = nn.ModuleList(make_block(c, plan) for plan in self.plans)
        gates = zip(c.gate_layers, gate_signals(c))
        self.gate_nets = nn.ModuleDict({str(i): TokenNet(c.width, s, learn_scale=True) for i, s in gates})
        self.mudd = Mudd(c) if c.mudd else None
        if c.ngram_signs:
            self.register_buffer("ngram_signs", sign_table(c.ngram_signs, c.width), persistent=False)
        if c.predicts_prefixes:  # each token's prefix, -1 where it has none
            self.register_buffer("prefixes_V", torch.full((vocab_size,), -1), persistent=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator):
        """Draw the first weights, in the order of the parameters' names, from one stream.

        Zero all other tensors of two or more dimensions, such as `down`; scalars keep their constructors'.
        """
        for name, p in sorted(self.named_parameters()):
            if name == "head":
                p.normal_(0, 0.005, generator=generator)
            elif name.endswith((".q", ".k", ".v", ".o", ".up")):
                bound = math.sqrt(3) * INIT_GAIN * self.config.width**-0.5
                p.uniform_(-bound, bound, generator=generator)
            elif name.endswith(".router"):
                p.normal_(0, ROUTER_STD, generator=generator)
            elif name.startswith("value_embeds.") and self.config.value_std:
                p.normal_(0, self.config.value_std, generator=generator)
            elif name.endswith(".hidden"):
                bound = self.config.width**-0.5
                p.uniform_(-bound, bound, generator=generator)
            elif p.ndim >= 2:
                p.zero_()
        if self.embed is not None:
            self.embed.copy_(self.head)

    def embed_tokens(self, tokens_BT: Tensor, tied: bool) -> Tensor:
        x = F.embedding(tokens_BT, self.head if tied else self.embed)
        if self.config.smear:  # each token gets a little of the one before it, of another document too
            gate = self.smear_lambda * torch.sigmoid(x[:, 1:, :GATE_CHANNELS] @ self.smear_gate.to(x.dtype))
            x = torch.cat((x[:, :1], x[:, 1:] + gate.to(x.dtype).unsqueeze(-1) * x[:, :-1]), dim=1)
        return norm(x)

    def trunk(self, tokens_BT, docs, windows: tuple[int, int], tied: bool, routing: Routing | None = None):
        """Everything between tokens and head, (B, T, C). windows: (short, long) in tokens."""
        c = self.config
        common = Common(docs, windows, self.rotary, self.residual_scale, routing or Routing())
        x = x0 = self.embed_tokens(tokens_BT, tied)
        ngram = None
        if self.ngram_table is not None:
            signs = self.ngram_signs if c.ngram_signs else None
            ngram = embed_ngrams(tokens_BT, self.ngram_table, c.ngrams, signs)
        values = {int(i): F.embedding(tokens_BT, table) for i, table in self.value_embeds.items()}
        outputs = {}  # {layer: its output}; with branch_factors, what layer 0 reads, too
        gates = {}  # the gate networks' signals, by (layer, name)
        for i, block in enumerate(self.blocks):
            if i in c.gate_layers:
                gates.update(self.gate_nets[str(i)](x))
            signals = {name: gate for (layer, name), gate in gates.items() if layer == i}
            embeds = Embeds(x0, ngram, values.get(i))
            if i == 0 and c.branch_factors:  # here the n-grams join before attention, not after it
                if ngram is not None:
                    x = x + block.factor("ngram", signals) * ngram
                outputs[Mudd.FIRST_INPUT] = x
                embeds = embeds._replace(ngram=None)
            if c.skip and i == c.skip[1]:
                gate = signals["skip"] if "skip" in signals else self.gate_of_skip(x0)
                x = x + torch.sigmoid(self.skip_lambda) * gate * outputs[c.skip[0]]
            if c.mudd and i == c.num_layers - 1:
                x, mudd_signals = self.mudd.enter(x, outputs)
                signals |= mudd_signals  # no gate network makes those
                embeds = embeds._replace(x0=outputs[Mudd.FIRST_INPUT])  # not the bare embedding
            source = outputs.get(c.attn_source, x)  # what attention reads
            x = outputs[i] = block(x, embeds, source, signals, common)
        if c.mudd:
            x = self.mudd.leave(x, outputs, values[c.value_embed_layers[0]])
        if c.backout is not None:
            x = x - self.backout_lambda * outputs[c.backout]
        return norm(x)

    def gate_of_skip(self, x0: Tensor) -> Tensor:
        return 2 * torch.sigmoid(x0[..., :GATE_CHANNELS] @ self.skip_gate.to(x0.dtype)).unsqueeze(-1)

    def train_loss(self, batch: Batch, windows, tied: bool, weights_K, noise_LBTE=None, prefix_weight=None):
        """One training pass: (loss, cross-entropy of the next token, detached), sums over tokens in nats.

        The loss sums, each with its weight, the cross-entropies of the next tokens (weights_K), that of the
        next token's prefix (prefix_weight; None: not in this stage) and the experts' balance. noise_LBTE is
        added to the router logits.
        """
        routing = Routing(noise_LBTE)
        x = self.trunk(batch.inputs_BT, Documents(batch, self.backend), windows, tied, routing)
        loss, cross_entropy = self.head_loss(x, batch.targets_BT, weights_K, prefix_weight)
        if routing.balance:  # times T: the cross-entropy is summed over a slice's tokens
            balance = torch.stack(routing.balance).sum()
            loss = loss + self.balance_weight * batch.inputs_BT.shape[1] * balance
        return loss, cross_entropy

    def head_loss(self, x_BTC: Tensor, targets_BT: Tensor, weights_K: Tensor, prefix_weight=None):
        """(weighted loss, plain cross-entropy of the next token, detached), summed over tokens."""
        if self.float8_head:  # training alone, for speed; val_loss has a bfloat16 head
            logits = Float8Linear.apply(x_BTC.flatten(0, 1), self.head, HEAD_SCALES)
            logits = logits.view(*targets_BT.shape, -1)
        else:
            logits = F.linear(x_BTC, self.head)
        logits = softcap(logits)
        loss, cross_entropy = multi_token_loss(logits, targets_BT, weights_K)
        if prefix_weight is not None:
            loss = loss + prefix_weight * prefix_loss(logits, self.prefixes_V[targets_BT])
        return loss, cross_entropy

    def val_loss(self, batch: Batch, windows, tied: bool) -> tuple[Tensor, Tensor]:
        """One validation pass: (cross-entropy in nats, right guesses), sums over tokens.

        The head runs in pieces: a slice of validation is longer than a pass of training, and the logits of
        all of it (262,144 x 50,304) would not fit in memory at once.
        """
        routing = Routing()
        x = self.trunk(batch.inputs_BT, Documents(batch, self.backend), windows, tied, routing)
        if routing.loads_E:
            self.expert_load_LE += torch.stack(routing.loads_E)
        loss, right = 0, 0
        x_MC, targets_M = x.flatten(0, 1), batch.targets_BT.flatten()
        for piece, targets in zip(x_MC.split(self.head_tokens), targets_M.split(self.head_tokens)):
            logits = softcap(F.linear(piece, self.head))
            loss = loss + (logits.logsumexp(-1) - target_logits(logits, targets)).sum()
            right = right + (logits.argmax(-1) == targets).sum()
        return loss, right


def build_model(s: Settings, config: ModelConfig, vocab_size: int, device: torch.device) -> GPT:
    """A freshly initialised model; on CUDA matrices and tables are bfloat16, scalars and routers fp32."""
    model = GPT(config, vocab_size, s.attn_backend, s.residual_scale, not s.disable_fp8, s.moe_balance_weight)
    seed = np.random.SeedSequence([s.seed, INIT_STREAM]).generate_state(1, np.uint64)[0]
    model.init_weights(torch.Generator().manual_seed(int(seed) >> 1))  # torch takes 63 bits
    if config.predicts_prefixes:
        model.prefixes_V.copy_(torch.from_numpy(prefix_tokens(vocab_size)))
    model.to(device)
    if device.type == "cuda":
        for name, p in model.named_parameters():
            if p.ndim >= 2 and not name.endswith(".router"):
                p.data = p.data.bfloat16()
    longest = max(max(s.batch_sizes) // s.slices, s.val_batch_tokens // VAL_SLICES)
    model.rotary.make_tables(longest * (2 if config.paired_layers else 1))
    return model


# ---------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------

# Factor on the loss, which is summed over the batch. The public trainer doubles the loss and averages over 8
# ranks. Adam and Muon do not depend on it, but for their eps; ORD's raw strengths do.
LOSS_SCALE = 2 / 8
# e4m3, up to 448, holds inputs up to 100 and weights up to 1.6; the gradient is in e5m2
HEAD_SCALES = (100 / 448, 1.6 / 448, LOSS_SCALE * 0.75 / 448)


def softcap(logits: Tensor) -> Tensor:
    gain, shift, width = SOFTCAP
    return gain * torch.sigmoid((logits.float() + shift) / width)


def target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The logit of each target: (..., V) and (...) to (...)."""
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def multi_token_loss(logits_BTV: Tensor, targets_BT: Tensor, weights_K: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_k w_k CE(logits_t, target_{t+k}), the plain CE detached), sums over tokens with such a target.

    The target is in the same slice; documents may be crossed (arXiv 2404.19737, with one head).
    """
    T = targets_BT.shape[1]
    logsumexp_BT = logits_BTV.logsumexp(-1)
    losses = []
    for k in range(len(weights_K)):
        losses_BT = logsumexp_BT[:, : T - k] - target_logits(logits_BTV[:, : T - k], targets_BT[:, k:])
        losses.append(losses_BT.sum())
    return (weights_K * torch.stack(losses)).sum(), losses[0].detach()


def prefix_loss(logits_BTV: Tensor, prefixes_BT: Tensor) -> Tensor:
    """Sum of the cross-entropies of prefixes, over the tokens that have one (-1: none)."""
    losses_BT = logits_BTV.logsumexp(-1) - target_logits(logits_BTV, prefixes_BT.clamp_min(0))
    return (losses_BT * (prefixes_BT >= 0)).sum()


# ---------------------------------------------------------------------------------------------------
# Optimizer: NorMuon for matrices, Adam for the rest, both sharded
# N matrices of R rows and K columns (as stored); momentum, second moments and masters are fp32
#
# One step of the matrices of a shape: Bucket.reduce (gradients over ranks) -> MatrixBucket.update (rates) ->
# apply_rule -> step_muon: nesterov -> orthogonalize (polar_express, reduce_variance) -> with_decay ->
# write_master -> Bucket.gather (weights). Muon: Keller Jordan et al., kellerjordan.github.io/posts/muon
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """Update of the parameters whose names match. lr_mul and decay_mul multiply the settings."""

    name: str
    pattern: str
    rule: str = "adam"
    lr_mul: float = 1.0
    decay_mul: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    lr_setting: str = "adam_lr"


ROLES = (  # complete and disjoint: every parameter matches exactly one
    # matrices take rate and decay from their bucket; betas are for OPTIMIZER=adamw
    Role("matrices", r"blocks\.\d+\.(attn\.[qkvo]|mlp\.(up|down))", rule="matrix", betas=(0.9, 0.95)),
    Role(
        "scalars", r"(smear|skip|backout)_lambda|blocks\.\d+\.((resid|ngram)|attn\.(qkv|o))_lambda", lr_mul=5
    ),
    Role("x0", r"blocks\.\d+\.x0_lambda", lr_mul=5, betas=(0.65, 0.95)),
    Role("stream factors", r"blocks\.\d+\.resid_(attn|mlp)_lambda", lr_mul=5, betas=(0.9, 0.95)),
    Role("branch factors", r"blocks\.\d+\.((attn|mlp)_lambda|attn\.xsa_alpha)", betas=(0.9, 0.95)),
    Role("mudd", r"mudd\.\d\.(hidden|out)", lr_mul=0.25, decay_mul=1),
    Role("mudd biases", r"mudd\.\d\.bias", lr_mul=0.25),
    Role("gate networks", r"gate_nets\.\d+\.(hidden|out)", lr_mul=0.1, decay_mul=1),
    Role("gate biases", r"gate_nets\.\d+\.(bias|scale)", lr_mul=0.1),
    Role("tables", r"ngram_table|value_embeds\.\d+", lr_mul=75, decay_mul=5, betas=(0.75, 0.95)),
    Role("smear gate", r"smear_gate", lr_mul=0.01),
    Role("skip gate", r"skip_gate", lr_mul=0.05),
    Role("gates", r"blocks\.\d+\.attn\.(attn|value)_gate", decay_mul=1),
    Role("routers", r"blocks\.\d+\.mlp\.router", lr_setting="router_lr"),
    Role("head", r"head|embed", decay_mul=150, betas=(0.5, 0.95)),
)

# ADAM_EVERY to POLAR_EPS, the momentum schedule and ROLES (except routers) come from the public records
ADAM_EVERY = 2  # Adam sums two steps' gradients; if the last step is even-numbered, its own is never used
ADAM_EPS = 1e-10
MUON_START_MOMENTUM, MUON_END_STEPS = 0.85, 50
DOWN_LR = 2.0  # factor on the rate of the MLP's second matrix
POLAR_SAFETY, POLAR_EPS = 1.02, 1e-6  # input / (1.02 ||G|| + 1e-6): no singular value above 1, no 0 / 0

# Odd quintics that bring all singular values near 1: Polar Express (arXiv 2505.16932), 5 steps
POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def find_role(name: str) -> Role:
    """The one role of a parameter."""
    found = [role for role in ROLES if re.fullmatch(role.pattern, name)]
    assert len(found) == 1, f"parameter {name} matches {len(found)} roles: {[r.name for r in found]}"
    return found[0]


def polar_express(G_NRK: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate the polar factor U V^T of each matrix, computing in `dtype`; the result is fp32."""
    tall = G_NRK.size(-2) > G_NRK.size(-1)
    X = G_NRK.mT if tall else G_NRK
    X = (X / (POLAR_SAFETY * X.norm(dim=(-2, -1), keepdim=True) + POLAR_EPS)).to(dtype)
    for a, b, c in POLAR_COEFFICIENTS:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).float()


def nesterov(grad: Tensor, momentum: Tensor, mu: Tensor) -> Tensor:
    """The gradient averaged with its momentum, which is updated in place."""
    grad = grad.float()
    momentum.lerp_(grad, 1 - mu)
    return grad.lerp(momentum, mu)


def reduce_variance(U_NRK: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Divide rows (columns, if wide) by the root of their running mean square: NorMuon (arXiv 2510.05491).

    Each matrix keeps its Frobenius norm. second_moment is updated in place.
    """
    dim = -1 if U_NRK.size(-2) >= U_NRK.size(-1) else -2
    mean_square = torch.linalg.vector_norm(U_NRK, dim=dim, keepdim=True).square() / U_NRK.size(dim)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before = mean_square.sum((-2, -1), keepdim=True)
    after = (mean_square * scale.square()).sum((-2, -1), keepdim=True)
    return U_NRK * (scale * (before / after.clamp_min(1e-30)).sqrt())


def orthogonalize(G_NRK: Tensor, second_moment: Tensor | None, beta2: float, dtype: torch.dtype) -> Tensor:
    """Orthogonalize each matrix (polar factor); reduce its variance if there is a second moment."""
    U = polar_express(G_NRK, dtype)
    return U if second_moment is None else reduce_variance(U, second_moment, beta2)


def with_decay(U: Tensor, W: Tensor, decay: Tensor, mode: str) -> Tensor:
    """The update with its decay, before the learning rate multiplies both.

    none: no decay; param: of all weights; update: of the update instead of the weights; both: of both;
    cautious: of weights that the update does not let grow, U W >= 0 (arXiv 2510.12402); strict: of those that
    it shrinks, U W > 0, so that what got no gradient keeps its weight.
    """
    if mode == "none":
        return U
    if mode == "param":
        return U + decay * W
    if mode == "update":
        return U + decay * U
    if mode == "both":
        return U + decay * (W + U)
    mask = (U * W).ge_(0) if mode == "cautious" else (U * W).gt_(0)  # else strict
    return torch.addcmul(U, mask.mul_(W), decay)


def step_muon(weight, mantissa, grad, state: dict, lr_N11, decay, mu, o: "OptimizerSettings"):
    """One NorMuon (or Muon) step on a shard of matrices, in place. state: momentum, maybe second_moment."""
    W, mode = read_master(weight, mantissa), o.muon_decay_mode
    G = nesterov(grad, state["momentum"], mu)
    U = orthogonalize(G, state.get("second_moment"), o.muon_beta2, weight.dtype)
    write_master(weight, mantissa, W.addcmul_(with_decay(U, W, decay, mode), lr_N11, value=-1))


def adam_update(grad: Tensor, m: Tensor, v: Tensor, count: Tensor, beta1: Tensor, beta2: Tensor) -> Tensor:
    """Bias-corrected Adam direction (arXiv 1412.6980); m, v change in place. count: 1 at the first update."""
    grad = grad.float()
    m.lerp_(grad, 1 - beta1)
    v.lerp_(grad.square(), 1 - beta2)
    correction = (1 - beta2**count).sqrt() / (1 - beta1**count)  # eps comes before it, as in the records
    return (m / v.sqrt().add_(ADAM_EPS)).mul_(correction)


def step_adam(weight, mantissa, grad, m, v, count, lr, decay, beta1, beta2, mode: str):
    """One Adam step on a shard, in place; lr, decay and betas 0-d, or one for each number."""
    W = read_master(weight, mantissa)
    U = adam_update(grad, m, v, count, beta1, beta2)
    write_master(weight, mantissa, W.addcmul_(with_decay(U, W, decay, mode), lr, value=-1))


class AdamBucket(Bucket):
    """A big table, or all small parameters together."""

    def __init__(self, params: dict, ranks: Ranks, o: "OptimizerSettings", compiler):
        super().__init__(params, ranks, unit=1, every=ADAM_EVERY)
        self.o, self.compiled_step = o, compiler(step_adam)
        self.state = {key: torch.zeros_like(self.mine, dtype=torch.float32) for key in ("m", "v")}
        roles = [find_role(name) for name in params]
        self.role_lr_mul = self.per_number([r.lr_mul for r in roles])
        bases = [getattr(o, r.lr_setting) for r in roles]
        # a Python float if all rates agree, so that base_lr * lr_mul is computed in float64
        self.base_lr = bases[0] if len(set(bases)) == 1 else self.per_number(bases)
        self.role_decay_mul = self.per_number([r.decay_mul for r in roles])
        self.betas = [self.per_number([r.betas[i] for r in roles]) for i in (0, 1)]

    def per_number(self, values: list[float]) -> Tensor:
        """The parameters' values, one for each number of the bucket; 0-d for a single parameter."""
        if len(values) == 1:
            return vectors.scalar(values[0])
        parts = [torch.full((p.numel(),), float(x)) for p, x in zip(self.params.values(), values)]
        return torch.cat(parts).to(self.mine.device)

    def update(self, lr_mul: float, mu: float, beta_frac: float, measure: bool):
        """Move this rank's part. Adam uses neither mu nor measure."""
        lr = self.base_lr * lr_mul * self.role_lr_mul
        decay = self.o.adam_weight_decay * lr * self.role_decay_mul  # and lr once more, in step_adam
        tensors = self.mine, self.mantissa, self.grad, self.state["m"], self.state["v"]
        beta1, beta2 = (beta_frac * beta for beta in self.betas)
        self.compiled_step(*tensors, vectors.scalar(self.count), lr, decay, beta1, beta2, "strict")


class AdamWBucket(MatrixStack):
    """Matrices updated by AdamW (OPTIMIZER=adamw)."""

    def __init__(self, params: dict, ranks: Ranks, o: "OptimizerSettings", compiler):
        super().__init__(params, ranks)
        self.o, self.compiled_step, self.betas = o, compiler(step_adam), find_role(next(iter(params))).betas
        keys = ("momentum", "second_moment")  # Adam's m and v, under Muon's names
        self.state = {key: torch.zeros_like(self.mine, dtype=torch.float32) for key in keys}

    def update(self, lr_mul: float, mu: float, beta_frac: float, measure: bool):
        """Move this rank's matrices. AdamW uses neither mu nor measure."""
        lr, decay = vectors.scalar(self.o.adam_matrix_lr * lr_mul), vectors.scalar(self.o.adam_matrix_decay)
        beta1, beta2 = (vectors.scalar(beta_frac * beta) for beta in self.betas)
        moments = self.state["momentum"], self.state["second_moment"]
        tensors = self.mine, self.mantissa, self.grad, *moments
        self.compiled_step(*tensors, vectors.scalar(self.count), lr, decay, beta1, beta2, "param")


class MatrixBucket(MatrixStack):
    """Matrices updated by NorMuon or Muon."""

    def __init__(self, params: dict, ranks: Ranks, o: "OptimizerSettings", compiler):
        super().__init__(params, ranks)
        self.o, self.compiled_step = o, compiler(step_muon)
        N, R, K = self.mine.shape
        self.rows_or_columns = (N, R, 1) if R >= K else (N, 1, K)
        self.state = {"momentum": torch.zeros_like(self.mine, dtype=torch.float32)}
        if o.optimizer == "normuon":
            self.state["second_moment"] = torch.zeros(self.rows_or_columns, device=self.mine.device)
        # Muon's shape factor. An orthonormal (R, K) with R > K takes an input of root mean square 1 to one of
        # sqrt(K / R); this undoes it. down, stored transposed, has it too, as in the public record
        lr = max(1, R / K) ** 0.5
        self.shape_lr_N11 = self.per_matrix(lambda name: lr * DOWN_LR if ".down" in name else lr)

    def per_matrix(self, value) -> Tensor:
        """(N, 1, 1): value(name) of each matrix that this rank owns, 0 for padding."""
        values = [value(name) for name in self.names] + [0.0] * (len(self.mine) - len(self.names))
        return torch.tensor(values, device=self.mine.device).view(-1, 1, 1)

    def update(self, lr_mul: float, mu: float, beta_frac: float, measure: bool):
        """Move this rank's matrices. measure: take the statistics that the log wants."""
        lr = self.o.muon_lr * lr_mul
        # cautious decay takes the rate twice, here and in the step, as in the record; the others once
        decay = self.o.muon_weight_decay * (lr if self.o.muon_decay_mode == "cautious" else 1)
        self.apply_rule(lr * self.shape_lr_N11, vectors.scalar(decay), vectors.scalar(mu), measure)

    def apply_rule(self, lr_N11: Tensor, decay: Tensor, mu: Tensor, measure: bool):
        """Step this rank's matrices. ORD has its own."""
        self.compiled_step(self.mine, self.mantissa, self.grad, self.state, lr_N11, decay, mu, self.o)


# >>> optimizer
# Muon + ORD: orthogonal-radial decomposition of the gradient of each matrix

ORD_MODES = ("interpolate", "project", "post", "off")
# settings of what happens before orthogonalization, and after it
before_knob = functools.partial(knob, only=("ord_mode", ("interpolate", "project")))
post_knob = functools.partial(knob, only=("ord_mode", ("post",)))


@dataclass(frozen=True)
class OptimizerSettings(NorMuonSettings):
    """The optimizer's settings."""

    ord_mode: str = knob(
        "interpolate",
        "interpolate: P(G - a G_par) + a G_par; project: P(G_perp) + a G_par; post: scale the radial part; "
        "off: P(G)",
        choices=ORD_MODES,
    )
    spectral_lr_mul: float = before_knob(0.1, "a, the strength of the radial part G_par in the update")
    spectral_lr_mul_attn: float = before_knob(None, "a of attention's matrices; empty: SPECTRAL_LR_MUL")
    spectral_lr_mul_mlp: float = before_knob(None, "a of the MLP's matrices; empty: SPECTRAL_LR_MUL")
    spectral_proj_eps: float = before_knob(1e-8, "added to ||W||^2 in rho", above=0)
    spectral_rho_mode: str = knob(
        "global",
        "one rho per matrix, row or col",
        choices=tuple(vectors.DIMS),
        only=("ord_mode", ("interpolate", "project", "post")),
    )
    spectral_scale: str = before_knob(
        "raw",
        "raw: a G_par as it is, linear in the gradient's size; unit: G_par times ||P|| / ||G_perp||",
        choices=("raw", "unit"),
    )
    spectral_schedule: str = before_knob(
        "constant",
        "adaptive: a times |rho| / its mean over steps 10-50, at most a",
        choices=("constant", "adaptive"),
    )
    spectral_variance: bool = before_knob(False, "divide G_par by the root of its running mean square")
    spectral_out: float = post_knob(1.0, "factor on a radial part that points outward")
    spectral_in: float = post_knob(1.0, "factor on a radial part that points inward")
    spectral_rescale: bool = post_knob(False, "give W exactly the norm its radial part asks for")


# 0.1 costs tiny and tiny-wide 0.025 and 0.011 nats: records/2026-11-25_spectral_fine_tiny and
# ..._spectral_medium_tiny
OPTIMIZER_PRESETS = dict.fromkeys(("tiny", "tiny-wide", "tiny-2026-08"), {"spectral_lr_mul": 0.01})
RHO_START, RHO_END = 10, 50  # steps over which the adaptive schedule takes its reference
RESCALE_FLOOR = 0.25  # half of INIT_GAIN: a matrix of a smaller root mean square must grow first
MAX_SHRINK = 0.999  # largest share of a norm that one step takes off
# columns of a bucket's `stats`, for the log; spec is rho with its sign
MATRIX_STATS = ("spec", "cos_gw", "cos_uw", "w_norm", "u_over_w", "radial_over_p")


def check_optimizer_settings(o: OptimizerSettings):
    """Refuse settings that contradict each other."""
    refusals.check_decay(o)
    refusals.refuse(
        o.spectral_variance and o.spectral_scale == "unit",
        "SPECTRAL_VARIANCE=1 replaces SPECTRAL_SCALE=unit; set one of them",
    )
    refusals.refuse(
        o.optimizer == "adamw" and o.ord_mode != "off",
        f"ORD_MODE={o.ord_mode} is for Muon; with OPTIMIZER=adamw set ORD_MODE=off",
    )


# Symbols of the formulas. Inner products and norms are of the matrix or, by SPECTRAL_RHO_MODE, of each row or
# column, so rho, r and s are numbers per matrix, row or column.
#   W    fp32 master weight
#   G    gradient averaged with its momentum (Nesterov)
#   rho  <G, W> / (||W||^2 + eps); G_par = rho W, the radial part, and G_perp = G - G_par
#   P()  polar factor, then variance reduction: orthogonalize
#   a    SPECTRAL_LR_MUL (_ATTN, _MLP), perhaps adaptive: interpolate keeps a G_par from P and adds it after P
#   r    <P(G), W> / ||W||^2: the radial part that P makes; post scales it by s, SPECTRAL_OUT or _IN
#   U    the update, W -= lr U. Where rho or r is negative, W grows: "outward"


def radial_strength(rho, a_N11: Tensor, rho_0: Tensor, settled: Tensor, o: OptimizerSettings) -> Tensor:
    """a, or adaptively a clip(|rho| / rho_0, 0, 1) once rho_0, the mean |rho| of steps 10-50, is settled.

    settled: 1 once those steps are over; 0-d, because a bool would be a second version of compiled code.
    """
    if o.spectral_schedule == "constant":
        return a_N11
    ratio = rho.abs().mean((-2, -1), keepdim=True) / rho_0.clamp_min(1e-30)
    return a_N11 * torch.where((settled > 0) & (rho_0 > 0), ratio.clamp(0, 1), 1.0)


def radial_factor(G, W, rho, P, state: dict, o: OptimizerSettings) -> Tensor:
    """The factor f with f W = G_par, in the unit of SPECTRAL_SCALE or SPECTRAL_VARIANCE; raw: f = rho."""
    if o.spectral_variance:
        par, radial_moment = rho * W, state["radial_moment"]
        mean_square = par.square().mean(-1 if par.size(-2) >= par.size(-1) else -2, keepdim=True)
        radial_moment.lerp_(mean_square, 1 - o.muon_beta2)
        # q and k are normed, so that rho of a first gradient is rounding; this brings it to full size
        return vectors.ratio(rho, radial_moment.sqrt())
    if o.spectral_scale == "unit":
        perp = torch.addcmul(G, rho, W, value=-1)
        return rho * vectors.ratio(vectors.norm(P), vectors.norm(perp))
    return rho


class Parts(NamedTuple):
    """An update P + factor W of each matrix."""

    P: Tensor
    factor: Tensor | float = 0.0
    shrink: Tensor | float = 0.0  # share of ||W|| that SPECTRAL_RESCALE takes off, per unit of lr


def ord_update(G, W, a, rho, state: dict, dtype, o: OptimizerSettings) -> Parts:
    """The update in its parts, by ORD_MODE.

    interpolate  P(G - a G_par) + a G_par                        a = 0 is NorMuon to the last bit
    project      P(G_perp) + a G_par                             a = 0 moves along the sphere, at first order
    post         P(G) - r W + s r W, r = <P(G), W> / ||W||^2     s = SPECTRAL_OUT where r < 0 (outward), else
                 SPECTRAL_IN; below the floor s = 1, so that a matrix that starts at zero can grow
    """
    second_moment = state.get("second_moment")
    if o.ord_mode == "off":
        return Parts(orthogonalize(G, second_moment, o.muon_beta2, dtype))
    dims = vectors.DIMS[o.spectral_rho_mode]
    if o.ord_mode == "post":
        P = orthogonalize(G, second_moment, o.muon_beta2, dtype)
        square = vectors.inner(W, W, dims)
        r = vectors.ratio(vectors.inner(P, W, dims), square)
        s = torch.where(r < 0, o.spectral_out, o.spectral_in)
        s = torch.where(square > floor_square(W, dims), s, 1.0)
        return Parts(P, factor=(s - 1) * r, shrink=s * r)
    removed = rho if o.ord_mode == "project" else a * rho
    P = orthogonalize(torch.addcmul(G, removed, W, value=-1), second_moment, o.muon_beta2, dtype)
    return Parts(P, factor=a * radial_factor(G, W, rho, P, state, o))


def floor_square(W: Tensor, dims) -> float:
    """The square norm under which post leaves the radial part alone."""
    return RESCALE_FLOOR**2 / W.size(-1) * math.prod([W.size(d) for d in dims])


def rescaled(new: Tensor, W: Tensor, shrink: Tensor, dims) -> Tensor:
    """Give `new` the norm ||W|| (1 - shrink), unless W is under the floor."""
    before = vectors.inner(W, W, dims)
    norm_wanted = before.sqrt() * (1 - shrink.clamp(max=MAX_SHRINK))
    factor = vectors.ratio(norm_wanted, vectors.norm(new, dims))
    return new * torch.where(before > floor_square(W, dims), factor, 1.0)


def ord_stats(G, W, U, radial, P, rho) -> Tensor:
    """MATRIX_STATS of each matrix, (N, 6)."""
    values = (
        rho.mean((-2, -1), keepdim=True),
        vectors.ratio(vectors.inner(G, W), vectors.norm(G) * vectors.norm(W)),
        vectors.ratio(vectors.inner(U, W), vectors.norm(U) * vectors.norm(W)),
        vectors.norm(W),
        vectors.ratio(vectors.norm(U), vectors.norm(W)),
        vectors.ratio(vectors.norm(radial), vectors.norm(P)),
    )
    return torch.cat(values, dim=-1).squeeze(1)


def step_ord(weight, mantissa, grad, state: dict, lr_N11, decay, mu, a_N11, rho_0, settled, o, measure: bool):
    """One Muon + ORD step on a shard of matrices, in place; returns mean |rho| and, if asked, the stats."""
    W = read_master(weight, mantissa)
    G = nesterov(grad, state["momentum"], mu)
    dims = vectors.DIMS[o.spectral_rho_mode]
    rho = vectors.inner(G, W, dims) / (vectors.inner(W, W, dims) + o.spectral_proj_eps)
    a = radial_strength(rho, a_N11, rho_0, settled, o)
    P, factor, shrink = ord_update(G, W, a, rho, state, weight.dtype, o)
    U = P if o.ord_mode == "off" else torch.addcmul(P, factor, W)
    stats = ord_stats(G, W, U, factor * W, P, rho) if measure else None
    if o.spectral_rescale:
        new = rescaled(torch.addcmul(W, U, lr_N11, value=-1), W, lr_N11 * shrink, dims)
        # the decay alone: before the norm is set, it would be undone
        new = new - lr_N11 * (with_decay(U, new, decay, o.muon_decay_mode) - U)
    else:
        new = W.addcmul_(with_decay(U, W, decay, o.muon_decay_mode), lr_N11, value=-1)
    write_master(weight, mantissa, new)
    return rho.abs().mean((-2, -1), keepdim=True), stats


class OrdBucket(MatrixBucket):
    """Matrices updated by Muon + ORD."""

    def __init__(self, params: dict, ranks: Ranks, o: OptimizerSettings, compiler):
        super().__init__(params, ranks, o, compiler)
        if o.spectral_variance:
            self.state["radial_moment"] = torch.zeros(self.rows_or_columns, device=self.mine.device)
        self.a_N11 = self.per_matrix(self.strength)
        self.state["rho_sum"] = torch.zeros_like(self.a_N11)  # sum of |rho| over steps 10-50
        self.compiled_step = compiler(step_ord)

    def strength(self, name: str) -> float:
        """a of a matrix, blocks.LAYER.PART.REST with PART attn or mlp."""
        _, _, part, *_ = name.split(".")
        own = self.o.spectral_lr_mul_attn if part == "attn" else self.o.spectral_lr_mul_mlp
        return self.o.spectral_lr_mul if own is None else own

    def apply_rule(self, lr_N11: Tensor, decay: Tensor, mu: Tensor, measure: bool):
        tensors, rho_sum = (self.mine, self.mantissa, self.grad, self.state), self.state["rho_sum"]
        rho_0 = rho_sum / (RHO_END - RHO_START)
        settled = vectors.scalar(self.count > RHO_END)
        rho, self.stats = self.compiled_step(
            *tensors, lr_N11, decay, mu, self.a_N11, rho_0, settled, self.o, measure
        )
        if RHO_START < self.count <= RHO_END:
            rho_sum += rho


MatrixUpdate = OrdBucket


# <<< optimizer
SETTINGS = (Settings, OptimizerSettings)
PRESETS = {  # MODEL -> (ModelConfig, defaults of settings that the preset changes)
    name: (ModelConfig(**fields), {**changes, **OPTIMIZER_PRESETS.get(name, {})})
    for name, (fields, changes) in PRESET_CHANGES.items()
}


class Optimizer:
    """All buckets: Adam's, then those of matrices, each from small to large.

    All reductions begin at once, so that the work on the first overlaps with the transfer of the others.
    """

    def __init__(self, model: GPT, o: OptimizerSettings, ranks: Ranks, num_steps: int, compiler):
        self.o, self.ranks, self.num_steps = o, ranks, num_steps
        matrix_bucket = AdamWBucket if o.optimizer == "adamw" else MatrixUpdate
        groups = {}
        for name, p in model.named_parameters():
            role = find_role(name)
            if role.rule == "matrix":
                key = matrix_bucket, tuple(p.shape[-2:])
            elif p.numel() >= SMALL or role.name == "head":  # untying copies head's bucket into embed's
                key = AdamBucket, name
            else:
                key = AdamBucket, p.dtype
            groups.setdefault(key, {})[name] = p
        self.buckets = [make(params, ranks, o, compiler) for (make, _), params in groups.items()]
        self.buckets.sort(key=lambda b: (isinstance(b, MatrixStack), b.size))
        self.stacks = [b for b in self.buckets if isinstance(b, MatrixStack)]
        self.by_name = {name: b for b in self.buckets for name in b.params}
        self.before_update = None  # called when all gradients of a step are reduced and none has been used
        # norm of the mean loss's gradient over the parameters updated in the last step that measured it
        self.grad_norm = None

    def untie(self):
        """Give the embedding the head's weights and state, from which it will learn by itself."""
        self.by_name["embed"].copy_from(self.by_name["head"])

    def is_pending(self, step: int) -> bool:
        """Return whether gradients wait for their update after `step` steps."""
        return step % ADAM_EVERY != 0

    def momentum(self, step: int) -> float:
        """Muon's momentum: up from 0.85 over the warm-up, and back over the last 50 steps after it."""
        warmup, high = self.o.muon_warmup_steps, self.o.muon_momentum
        low = min(MUON_START_MOMENTUM, high)
        if step < warmup:
            return low + step / warmup * (high - low)
        return low + min(1, (self.num_steps - step) / MUON_END_STEPS) * (high - low)

    def beta_frac(self, step: int) -> float:
        """Factor on Adam's betas: up from 0 over BETA_WARMUP_STEPS."""
        return min(1, step / self.o.beta_warmup_steps) if self.o.beta_warmup_steps else 1

    def due(self, step: int, tied: bool) -> list[Bucket]:
        """The buckets that move at this step. tied: the head is the embedding, whose own table then rests."""
        resting = self.by_name.get("embed") if tied else None
        return [b for b in self.buckets if (step + 1) % b.every == 0 and b is not resting]

    @torch.no_grad()
    def step(self, step: int, lr_mul: float, batch_tokens: int, measure: bool, tied: bool = True):
        """Reduce, update, gather. measure: the next line of the log wants log_fields(full=True)."""
        due = self.due(step, tied)
        for bucket in due:  # the same order on all ranks
            bucket.reduce()
        if self.before_update:
            self.before_update()
        if due and (self.o.grad_clip or measure):
            self.grad_norm = gradient_norm(due, self.ranks) / (LOSS_SCALE * batch_tokens)
        if due and self.o.grad_clip:
            factor = (self.o.grad_clip / self.grad_norm).clamp(max=1)
            for bucket in due:
                bucket.grad.mul_(factor)
        for bucket in due:
            bucket.work.wait()
            bucket.count += 1
            bucket.update(lr_mul, self.momentum(step), self.beta_frac(step), measure)
            bucket.gather()
        for bucket in due:
            bucket.finish()

    def log_fields(self, step: int, full: bool) -> dict:
        """Fields of the step line; `full` at validations, and then a collective: every rank calls it.

        The log has one pair of betas, those of the head's role.
        """
        beta1, beta2 = (self.beta_frac(step) * beta for beta in find_role("head").betas)
        fields = {"beta1": f"{beta1:.4f}", "beta2": f"{beta2:.4f}"}
        fields["muon_momentum"] = f"{self.momentum(step):.4f}"
        if full and self.grad_norm is not None:
            fields["grad_norm"] = f"{float(self.grad_norm):.6g}"
        if full:
            fields |= stats_by_layer(MATRIX_STATS, self.stacks, self.ranks)
        return fields


# ---------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------


def interpolate(shape: str, start: float, end: float, done: float) -> float:
    """A value on its way from start to end. done: the share of the way behind it."""
    if shape == "constant":
        return start
    if shape == "exp":
        return start * (end / start) ** done if start else 0.0
    if shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return start * (1 - done) + end * done


class Schedule:
    """Stage, learning rate, windows and loss weights, which change over the steps; functions of the step."""

    def __init__(self, s: Settings, config: ModelConfig):
        self.s, self.config = s, config
        self.scheduled = s.num_scheduled_iterations
        self.num_steps = self.scheduled + s.num_extension_iterations
        starts = [round(self.scheduled * i / (NUM_STAGES - 1)) for i in range(NUM_STAGES)]
        self.bounds = (*starts, self.num_steps)  # stage i: from bounds[i] up to bounds[i + 1]
        self.untie_step = None  # the last step that trains embedding and head as one
        if config.untie_frac < 1:
            # odd, so that Adam moves in it (ADAM_EVERY) and what untying copies has just been updated
            self.untie_step = round(self.scheduled * config.untie_frac) | 1

    def stage(self, step: int) -> int:
        """Stage of a step; num_steps counts as part of the last stage."""
        step = min(step, self.num_steps - 1)
        return next(stage for stage, end in enumerate(self.bounds[1:]) if step < end)

    def tied(self, step: int) -> bool:
        """Return whether embedding and head share weights after `step` steps and in the next one."""
        return self.untie_step is None or step <= self.untie_step

    def batch_tokens(self, step: int) -> int:
        return self.s.batch_sizes[self.stage(step)]

    def batch(self, step: int) -> tuple[int, int]:
        """(tokens, stage) of a step, as TrainData.next takes them."""
        return self.batch_tokens(step), self.stage(step)

    def windows(self, stage: int) -> tuple[int, int]:
        """(short, long) in tokens; stage NUM_STAGES is the last validation."""
        blocks = (*self.config.windows, self.config.final_windows)[stage]
        return tuple(n * self.config.window_block for n in blocks)

    def predict_weights(self, step: int) -> Tensor:
        """Weights of the losses on the next tokens, linear within the stage."""
        stage, done = self.stage(step), self.share_of_stage(step)
        return torch.tensor([interpolate("linear", a, b, done) for a, b in self.config.predict[stage]])

    def prefix_weight(self, step: int) -> Tensor | None:
        """Weight of the loss on the next token's prefix, linear within the stage; None in a stage without."""
        start, end = self.config.prefix_weights[self.stage(step)]
        if not start and not end:
            return None
        return vectors.scalar(interpolate("linear", start, end, self.share_of_stage(step)))

    def share_of_stage(self, step: int) -> float:
        """Share of the stage's steps that lies before `step`."""
        start, end = self.bounds[self.stage(step)], self.bounds[self.stage(step) + 1]
        return (step - start) / (end - start)

    def lr_mul(self, step: int) -> float:
        """Factor on all learning rates."""
        s, peak = self.s, self.s.lr_muls[self.stage(step)]
        warm = min(1.0, (step + 1) / s.warmup_steps) if s.warmup_steps else 1.0
        if s.lr_decay_second_type and s.lr_decay_switch_step <= step:
            return warm * self.second_decay(step, peak)
        return warm * self.first_decay(step, peak)

    def first_decay(self, step: int, peak: float) -> float:
        """Multiplier of the first decay: linear and cosine end at LR_DECAY_FINAL, exp at that times peak."""
        shape, final = self.s.lr_decay_type, self.s.lr_decay_final
        end = peak * final if shape == "exp" else final
        return interpolate(shape, peak, end, self.share_done(step, self.s.cooldown_start))

    def second_decay(self, step: int, peak: float) -> float:
        """Decay from where the first decay would be at LR_DECAY_SWITCH_STEP, had it begun at this peak."""
        s, switch = self.s, self.s.lr_decay_switch_step
        final = s.lr_decay_final if s.lr_decay_second_final is None else s.lr_decay_second_final
        reached, done = self.first_decay(switch, peak), self.share_done(step, switch)
        return interpolate(s.lr_decay_second_type, reached, peak * final, done)

    def share_done(self, step: int, start: int) -> float:
        """Share of the scheduled steps from `start` on that lies before `step`; 1 in the extension."""
        if step >= self.scheduled:
            return 1.0
        return max(0, step - start) / max(1, self.scheduled - start)


# ---------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(val_loss, batches, windows: tuple[int, int], tied: bool, ranks: Ranks) -> tuple[float, float]:
    """(mean cross-entropy in nats per token, share of tokens guessed right) over all ranks.

    val_loss: GPT.val_loss, maybe compiled. batches: this rank's; every rank has as many tokens.
    """
    sums, num_tokens = torch.zeros(2, dtype=torch.float64, device=ranks.device), 0
    for batch in batches:
        ranks.beat()
        loss, right = val_loss(batch, windows, tied)
        sums += torch.stack([loss.double(), right.double()])
        num_tokens += batch.targets_BT.numel() * ranks.world_size
    ranks.all_reduce(sums).wait()
    loss, right = sums.tolist()
    return loss / num_tokens, right / num_tokens


# ---------------------------------------------------------------------------------------------------
# Step
# ---------------------------------------------------------------------------------------------------


class Trainer:
    """Model, optimizer and schedule, and the step that joins them."""

    def __init__(self, s: Settings, o: OptimizerSettings, config: ModelConfig, vocab_size: int, ranks: Ranks):
        self.s, self.ranks, self.schedule = s, ranks, Schedule(s, config)
        num_slices, val_slices = count_slices(s, ranks.world_size), count_val_slices(ranks.world_size)
        self.memory = Memory(s, o, config, vocab_size, num_slices, val_slices, ranks)
        self.model = build_model(s, config, vocab_size, ranks.device)
        self.model.head_tokens = self.memory.head_tokens
        compiler = compiler_for(s)
        self.train_loss = compile_forward(self.model.train_loss, compiler)
        self.val_loss = compile_forward(self.model.val_loss, compiler)
        self.optimizer = Optimizer(self.model, o, ranks, self.schedule.num_steps, compiler)
        self.stage = 0
        self.doc_lengths, self.flop_by_stage = None, {}  # documents as this stage reads them, for MFU

    def enter(self, step: int):
        """Go to the stage of `step`, before its validation and update; YaRN follows the long window.

        The last validation's still longer windows have no YaRN of their own.
        """
        stage = self.schedule.stage(step)
        old, new = self.schedule.windows(self.stage)[1], self.schedule.windows(stage)[1]
        if old != new:
            self.model.rotary.extend(old, new)
        self.stage = stage

    def step(self, step: int, batches: list[Batch], measure: bool = False) -> Tensor:
        """One update; returns the cross-entropy summed over this rank's tokens.

        measure: take the optimizer's statistics too, even if the next line of the log does not want them.
        """
        schedule, loss_sum = self.schedule, 0
        weights = to_device(schedule.predict_weights(step), self.ranks.device)
        windows, prefix_weight = schedule.windows(self.stage), schedule.prefix_weight(step)
        tied = schedule.tied(step)
        for batch, noise in zip(batches, self.router_noise(step, batches)):
            self.ranks.beat()
            loss, cross_entropy = self.train_loss(batch, windows, tied, weights, noise, prefix_weight)
            (LOSS_SCALE * loss).backward()
            loss_sum = loss_sum + cross_entropy
        measure = measure or self.s.validates(step + 1, schedule.num_steps)
        self.optimizer.step(step, schedule.lr_mul(step), schedule.batch_tokens(step), measure, tied)
        if step == schedule.untie_step:
            self.optimizer.untie()
        return loss_sum

    def router_noise(self, step: int, batches: list[Batch]):
        """Yield each pass's router noise, (L, B, T, E), drawn by slice; None without experts."""
        c, scale = self.model.config, self.s.router_noise
        first = my_slices(count_slices(self.s, self.ranks.world_size), self.ranks).start
        for batch in batches:
            B, T = batch.inputs_BT.shape
            slices, first = range(first, first + B), first + B
            if c.num_experts and scale:
                noise = draw_noise(self.s.seed, step, slices, (c.num_layers, T, c.num_experts))
                yield to_device(scale * noise, self.ranks.device)
            else:
                yield None

    def log_fields(self, step: int, full: bool) -> dict:
        """Fields of the line about the update of `step`, in the log's order. A collective if full."""
        return {
            "lr_mul": f"{self.schedule.lr_mul(step):.4f}",
            **self.optimizer.log_fields(step, full),
            "batch_size": self.schedule.batch_tokens(step),
        }

    def validation_fields(self) -> dict:
        """Fields of a validation's line: how even the experts' load was. A collective."""
        if not self.model.config.num_experts:
            return {}
        load = self.model.expert_load_LE.clone()
        self.model.expert_load_LE.zero_()
        self.ranks.all_reduce(load).wait()
        return load_fields(load, self.model.config.moe_top_k)

    def flop_per_token(self, step: int) -> float:
        """FLOP of a token's forward and backward pass, averaged over the documents."""
        stage, c = self.schedule.stage(step), self.model.config
        if stage not in self.flop_by_stage:
            vocab_size, windows = len(self.model.head), c.windows[stage]
            self.flop_by_stage[stage] = flop_per_token(c, self.doc_lengths, vocab_size, windows)
        return self.flop_by_stage[stage]

    def go_to(self, step: int):
        """Restore what follows from `step`: stage and windows. The optimizer has its own state."""
        for first in self.schedule.bounds:  # stage by stage: YaRN extends the windows one by one
            if first < step:
                self.enter(first)

    def model_metadata(self) -> dict:
        """Facts that forward needs beside weights and config."""
        windows, tied = self.schedule.windows(NUM_STAGES), self.schedule.tied(self.schedule.num_steps)
        return {"rotary_scale": self.model.rotary.scale, "windows": windows, "tied": tied}


# ---------------------------------------------------------------------------------------------------
# Loop
# ---------------------------------------------------------------------------------------------------


class Run:
    """One run: the trainer, its data, and the session that keeps log, clock and checkpoints."""

    def __init__(self, start, stop):
        """start: runtime.supervise.Start. stop: its StopRequest."""
        self.start = start
        self.trainer = Trainer(start.s, start.o, start.model_config, start.config["vocab_size"], start.ranks)
        self.data = TrainData(start.train_shards, start.s, start.ranks, self.trainer.memory.pass_tokens)
        self.session = Session(start, stop, self.trainer, self.data)

    def validate(self, step: int, num_batches: int | None = None) -> tuple[float, float]:
        """(loss, accuracy) after `step` steps, over all batches or the first num_batches."""
        trainer, start, schedule = self.trainer, self.start, self.trainer.schedule
        stage = NUM_STAGES if step == schedule.num_steps else trainer.stage
        batches = self.data.prefetcher.each(val_batches(start.val_shards, start.s, start.ranks, num_batches))
        return evaluate(trainer.val_loss, batches, schedule.windows(stage), schedule.tied(step), start.ranks)

    def rehearse(self):
        """Compile and autotune all that a run will meet; call it on a run that is then thrown away.

        Every stage, tied or not, training and evaluation, steps with and without Adam and statistics. Ends
        early if a rank was asked to stop.
        """
        trainer, schedule = self.trainer, self.trainer.schedule
        trainer.memory.announce(self.start.log)
        last, untie = schedule.num_steps, schedule.untie_step or 0
        firsts = (*schedule.bounds, untie, untie + 1)  # steps at which what is compiled changes
        for step in sorted({first + n for first in firsts for n in (0, 1)}):  # two each: Adam moves in one
            if step > last or self.session.asked_to_stop():
                break
            trainer.enter(step)
            with trainer.memory.explained():
                self.validate(step, num_batches=1)
                if step < last:
                    trainer.step(step, self.data.next(schedule.batch(step)), measure=step == 0)
        self.data.prefetcher.close()

    def train(self) -> int:
        """Train from the session's first step. Returns the step that it reached: the last, or a stop's."""
        trainer, session, schedule = self.trainer, self.session, self.trainer.schedule
        step = session.first_step
        for step in session.begin():
            trainer.enter(step)
            if session.should_validate(step):
                with session.off_the_clock():
                    session.note_validation(step, *self.validate(step))
            if session.should_leave(step):
                break
            session.expect_update(step + 1)
            batches = self.data.next(schedule.batch(step), schedule.batch(step + 1))
            trainer.doc_lengths = self.data.doc_lengths
            with trainer.memory.explained():
                loss_sum = trainer.step(step, batches)
            session.note_update(step + 1, loss_sum, schedule.batch_tokens(step))
        return step


# supervise.main runs this module: read_settings -> process group -> open_data -> log; what a rank refuses
# ends the run before its first step. On CUDA, or if code is compiled, a Run rehearses every stage and is
# thrown away. The next Run is the one that counts: resume from a checkpoint, if any -> Run.train.
if __name__ == "__main__":
    supervise.leave(supervise.main(sys.modules[__name__], sys.argv[1:]))
