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

import contextlib
import dataclasses
import datetime
import functools
import gc
import glob
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cpu_kernels

SCRIPT = Path(__file__).resolve()

# ---------------------------------------------------------------------------------------------------
# Settings: one environment variable each, named as the field in capitals
# ---------------------------------------------------------------------------------------------------


def knob(default, help, **limits):
    """A settings field. limits: low, high (inclusive), above (exclusive), choices."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Settings:
    """The trainer's settings. A preset (MODEL) may change defaults; the environment has the last word."""

    run_id: str = knob("", "name of the log logs/RUN_ID.txt; empty: time, model and seed")
    seed: int = knob(0, "drives initial weights, data order, router noise, a stream each", low=0, high=2**62)
    model: str = knob("auto", "preset; auto: gpt2-small on CUDA, tiny without")
    device: str = knob("auto", "auto: cuda where there is one", choices=("auto", "cuda", "cpu"))
    nproc_per_node: int = knob(0, "ranks that run.sh starts; 0: one a GPU or core, up to 8", low=0, high=1024)
    compile: str = knob("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    rehearse: str = knob(
        "auto",
        "try all stages on a copy first, off the clock; auto: if compiled or CUDA",
        choices=("auto", "0", "1"),
    )
    attn_backend: str = knob(
        "auto",
        "auto: varlen on CUDA, sdpa elsewhere; varlen: FlashAttention-3 where "
        "its package is installed and the GPU is sm_90, else torch's FlashAttention-2",
        choices=("auto", "varlen", "flex", "sdpa"),
    )
    kernels: str = knob(
        "auto",
        "auto: triton on CUDA from sm_80 on, where it is installed, else torch",
        choices=("auto", "triton", "torch"),
    )
    disable_fp8: bool = knob(False, "head in bfloat16 even where float8 is to be had (sm_89 and later)")
    # data
    data_path: str = knob(".", "folder that TRAIN_FILES and VAL_FILES are relative to")
    train_files: str = knob("data/fineweb10B/fineweb_train_*.bin", "glob of training shards")
    val_files: str = knob("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    val_tokens: int = knob(10_485_760, "tokens of validation, from the start of the shards", low=1024)
    val_batch_tokens: int = knob(2_097_152, "tokens of one validation batch, all ranks together", low=1024)
    max_doc_tokens: int = knob(2048, "longest document in training, tokens", low=16)
    long_docs: str = knob(
        "cut",
        "what becomes of the rest: cut (dropped), split (read as further documents)",
        choices=("cut", "split"),
    )
    # length and shape of the run; one value a stage: three scheduled thirds, then the extension
    num_scheduled_iterations: int = knob(1560, "steps of the three scheduled stages", low=1)
    num_extension_iterations: int = knob(40, "steps after them, with longer windows", low=0)
    train_tokens: int = knob(0, "if not 0, sets NUM_SCHEDULED_ITERATIONS to what takes so many tokens", low=0)
    batch_sizes: tuple[int, ...] = knob((131072, 262144, 393216, 393216), "tokens a step, by stage", low=128)
    slices_per_pass: int = knob(0, "slices a rank stacks into one pass; 0: what fits 65536 tokens", low=0)
    residual_scale: float = knob(1.0, "factor on the output of every attention and MLP branch")
    ngrams: tuple[int, ...] = knob(
        None,
        "lengths of the n-grams that are hashed into an embedding, one or several; empty: the preset's",
        low=2,
        high=5,
    )
    ngram_rows: int = knob(None, "rows of that embedding; 0: none; empty: the preset's", low=0, high=2**24)
    # mixture of experts, for presets that have one
    num_experts: int = knob(
        0, "experts of a layer, each of the preset's hidden width; 0: none, an MLP", low=0, high=256
    )
    moe_top_k: int = knob(2, "experts that a token goes to", low=2)
    moe_balance_weight: float = knob(
        0.01, "weight of the balance loss, in training; even load is 1 a layer", low=0
    )
    router_noise: float = knob(0.1, "standard deviation of the noise on router logits, in training", low=0)
    # learning rate
    lr_muls: tuple[float, ...] = knob((1.0, 1.52, 1.73, 1.0), "learning-rate multiplier, by stage", low=0)
    warmup_steps: int = knob(0, "steps of linear learning-rate warm-up", low=0)
    cooldown_frac: float = knob(0.55, "share of the scheduled steps that the decay takes", low=0, high=1)
    lr_decay_type: str = knob("linear", "shape of the decay", choices=("linear", "exp", "cosine", "constant"))
    lr_decay_final: float = knob(0.1, "where it ends: the multiplier; for exp a factor on the stage's", low=0)
    lr_decay_switch_step: int = knob(-1, "step from which the second decay applies; -1: never", low=-1)
    lr_decay_second_type: str = knob("constant", "shape of the second", choices=("linear", "exp", "constant"))
    lr_decay_second_final: float = knob(0.1, "where it ends: a factor on the stage's multiplier", low=0)
    # evaluation
    val_loss_every: int = knob(50, "steps between validations; 0: only the last", low=0)
    val_loss_last_steps: int = knob(100, "so many last steps are validated more often", low=0)
    val_loss_every_last: int = knob(10, "steps between those validations; 0: as before", low=0)
    target_loss: float = knob(3.28, "validation loss to reach, for log and plots, nats a token", above=0)
    manifold_every: int = knob(
        0,
        "steps between measurements of the spectra of weights and updates, to "
        "logs/RUN_ID.manifold.jsonl; 0: none",
        low=0,
    )
    diverged_above: float = knob(0.0, "a loss above this ends the run; 0: twice ln(vocabulary)", low=0)
    # checkpoints, faults
    save_every: int = knob(0, "steps between checkpoints in logs/RUN_ID/; 0: only when stopped", low=0)
    resume: str = knob("", "auto: go on from RUN_ID's last checkpoint if it has one; or a checkpoint's path")
    save_model: bool = knob(True, "write the trained weights to logs/RUN_ID/model.safetensors at the end")
    dist_timeout: float = knob(
        900.0,
        "seconds without progress after which a rank gives up; to compile a "
        "stage, or to save, must take less",
        low=5,
    )

    @property
    def log(self) -> Path:
        return Path("logs") / f"{self.run_id}.txt"

    @property
    def folder(self) -> Path:
        """Of checkpoints and the trained model."""
        return Path("logs") / self.run_id


class SettingsError(ValueError):
    """The user's settings cannot be used: what was found, what was wanted, what to do. Exit code 2."""


def parse_value(name: str, text: str, field: dataclasses.Field):
    """The value of one environment variable, checked against its field."""

    def refuse(wanted):
        raise SettingsError(f"{name}={text!r}: wanted {wanted} ({field.metadata['help']})")

    def one(kind, part):
        try:
            value = kind(part.strip())
        except ValueError:
            refuse(allowed_values(field))
        if isinstance(value, float) and not math.isfinite(value):
            refuse("a finite number")
        low, high, above = (
            field.metadata.get(k, d)
            for k, d in (("low", -math.inf), ("high", math.inf), ("above", -math.inf))
        )
        if not low <= value <= high or value <= above:
            refuse(allowed_values(field))
        if isinstance(value, int) and abs(value) > 2**62:
            refuse("a number below 2**62")
        return value

    if not text.strip() and field.default is None:
        return None
    if field.type is bool:
        if text.strip().lower() not in ("0", "1", "true", "false"):
            refuse("0 or 1")
        return text.strip().lower() in ("1", "true")
    if field.type is str:
        if text not in field.metadata.get("choices", (text,)):
            refuse(allowed_values(field))
        return text
    if field.type in (int, float):
        return one(field.type, text)
    kind = int if field.type == tuple[int, ...] else float
    return tuple(one(kind, part) for part in text.strip(" []()").split(","))


def type_name(field: dataclasses.Field) -> str:
    return {tuple[int, ...]: "int,...", tuple[float, ...]: "float,..."}.get(field.type) or field.type.__name__


def allowed_values(field: dataclasses.Field) -> str:
    """The allowed values in words: 'int, at least 0'."""
    limits = field.metadata
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])
    words = [type_name(field)]
    words += [
        f"{word} {limits[key]}"
        for key, word in (("low", "at least"), ("above", "above"), ("high", "at most"))
        if key in limits
    ]
    return ", ".join(words)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


OUR_PREFIXES = ("SPECTRAL_", "ORD_", "MUON_", "ADAM_", "MOE_", "LR_DECAY_", "VAL_LOSS_", "NUM_SCHEDULED_")
# words one letter from a setting's short name, which other programs may well have
NOT_MEANT = {"COMPILED", "COMPILER", "DEVICES", "KERNEL", "MODE", "MODELS", "SEEDS", "SPEED"}


def refuse_lookalikes(env, known: list[str]):
    """A misspelt setting would silently train something else, so it ends the run. In a short name one letter
    may be wrong, in a long one two; capitals do not count."""
    for name in sorted(set(env) - set(known)):
        capitals = name.upper()
        nearest = min(known, key=lambda k: edit_distance(capitals, k))
        close = edit_distance(capitals, nearest) <= (2 if len(nearest) >= 8 else 1)
        if close and capitals not in NOT_MEANT or capitals.startswith(OUR_PREFIXES):
            raise SettingsError(
                f"{name} is not a setting of {SCRIPT.name}; the nearest is {nearest}. "
                f"Unset or rename it; `python {SCRIPT.name} --help` lists all"
            )


def read_settings(env) -> tuple[Settings, "OptimizerSettings", "ModelConfig"]:
    """The settings of the environment over the preset's defaults; SettingsError names what is wrong."""
    fields = {f.name.upper(): f for c in (Settings, OptimizerSettings) for f in dataclasses.fields(c)}
    refuse_lookalikes(env, list(fields))
    device = env.get("DEVICE", "auto")
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("DEVICE='cuda', but torch finds no CUDA device here; use DEVICE=cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and num_local > torch.cuda.device_count():
        raise SettingsError(
            f"{num_local} ranks on this machine, but torch finds {torch.cuda.device_count()} "
            "CUDA devices here; start one rank a device, or set DEVICE=cpu"
        )
    model = env.get("MODEL", "auto")
    model = {"auto": "gpt2-small" if cuda else "tiny"}.get(model, model)
    if model not in PRESETS:
        raise SettingsError(f"MODEL={model!r}: wanted one of auto, {', '.join(PRESETS)}")
    config, defaults = PRESETS[model]
    values = {}
    for name, field in fields.items():
        values[field.name] = (
            parse_value(name, env[name], field) if name in env else defaults.get(field.name, field.default)
        )
    values.update(model=model, device="cuda" if cuda else "cpu")
    s, o = (
        c(**{f.name: values[f.name] for f in dataclasses.fields(c)}) for c in (Settings, OptimizerSettings)
    )
    check_settings(s, env)
    check_optimizer_settings(o)
    return resolve(s), o, with_experts(with_ngrams(config, s), s, o)


def is_run_id(text: str) -> bool:
    """Whether it can name files in logs/, and only there."""
    return re.fullmatch(r"[A-Za-z0-9_][\w.=,+-]{0,199}", text, re.ASCII) is not None


def check_settings(s: Settings, env):
    """Combinations that no single field can judge."""
    for name in ("batch_sizes", "lr_muls"):
        values = getattr(s, name)
        if len(values) != NUM_STAGES:
            raise SettingsError(
                f"{name.upper()} has {len(values)} values, wanted {NUM_STAGES}: "
                "one for each scheduled stage and one for the extension"
            )
    for stage, tokens in enumerate(s.batch_sizes, 1):
        if tokens % (NUM_SLICES * 16):
            down = tokens // (NUM_SLICES * 16) * NUM_SLICES * 16
            raise SettingsError(
                f"BATCH_SIZES stage {stage} = {tokens} is not a multiple of {NUM_SLICES} "
                f"slices x 16 tokens; {down} or {down + NUM_SLICES * 16} are"
            )
    if s.val_batch_tokens % (NUM_SLICES * 16) or s.val_tokens % s.val_batch_tokens:
        raise SettingsError(
            f"VAL_TOKENS={s.val_tokens} must be a multiple of VAL_BATCH_TOKENS="
            f"{s.val_batch_tokens}, and that of {NUM_SLICES} slices x 16 tokens"
        )
    if s.train_tokens and "NUM_SCHEDULED_ITERATIONS" in env:
        raise SettingsError("TRAIN_TOKENS and NUM_SCHEDULED_ITERATIONS both set the run's length; unset one")
    if s.run_id and not is_run_id(s.run_id):
        raise SettingsError(
            f"RUN_ID={s.run_id!r}: wanted a file name of at most 200 letters, digits and "
            ". _ - = , + that begins with a letter or digit"
        )
    if s.device == "cpu" and s.attn_backend in ("varlen", "flex"):
        raise SettingsError(f"ATTN_BACKEND={s.attn_backend} trains on CUDA only; elsewhere use sdpa or auto")
    if s.kernels == "triton" and (s.device == "cpu" or not importlib.util.find_spec("triton")):
        lacks = "no CUDA device is used" if s.device == "cpu" else "triton is not installed"
        raise SettingsError(f"KERNELS=triton, but {lacks} here; use KERNELS=torch or auto")


def with_ngrams(config: "ModelConfig", s: Settings) -> "ModelConfig":
    """The preset's sizes with NGRAMS and NGRAM_ROWS."""
    rows = config.ngram_rows if s.ngram_rows is None else s.ngram_rows
    if s.ngrams is not None and not rows:
        raise SettingsError(
            f"NGRAMS={','.join(map(str, s.ngrams))} does nothing without rows to hash into; "
            "set NGRAM_ROWS, for example to 4096"
        )
    if rows == 1:
        raise SettingsError("NGRAM_ROWS=1, but one row is kept for the beginning; wanted 0, or 2 and more")
    return dataclasses.replace(config, ngrams=s.ngrams or config.ngrams, ngram_rows=rows)


def with_experts(config: "ModelConfig", s: Settings, o: "OptimizerSettings") -> "ModelConfig":
    """The preset's sizes with NUM_EXPERTS and MOE_TOP_K; a dense preset refuses what is for experts."""
    if not config.num_experts:
        defaults = {f.name: f.default for c in (s, o) for f in dataclasses.fields(c)}
        mixtures = " and ".join(name for name, (c, _) in PRESETS.items() if c.num_experts)
        for name in ("num_experts", "moe_top_k", "moe_balance_weight", "router_noise", "router_lr"):
            value = getattr(s if hasattr(s, name) else o, name)
            if value != defaults[name]:
                raise SettingsError(
                    f"{name.upper()}={value} does nothing with MODEL={s.model}, which has no "
                    f"experts; it is for {mixtures}"
                )
        return config
    if not 2 <= s.moe_top_k <= s.num_experts:
        raise SettingsError(
            f"MOE_TOP_K={s.moe_top_k} of NUM_EXPERTS={s.num_experts}; MODEL={s.model} wants "
            "at least 2 experts, and from 2 up to all of them for a token"
        )
    return dataclasses.replace(config, num_experts=s.num_experts, moe_top_k=s.moe_top_k)


def capability() -> tuple[int, int]:
    """(major, minor) of this rank's own GPU: 9, 0 for sm_90."""
    return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", 0)))


def resolve(s: Settings) -> Settings:
    """Settings with every 'auto' and 0-means-derived replaced by what it means here."""
    cuda = s.device == "cuda"
    changes = {"compile": str(int(cuda)) if s.compile == "auto" else s.compile}
    changes["rehearse"] = str(int(cuda or changes["compile"] == "1")) if s.rehearse == "auto" else s.rehearse
    changes["attn_backend"] = ("varlen" if cuda else "sdpa") if s.attn_backend == "auto" else s.attn_backend
    if not cuda or capability() < (8, 9):
        changes["disable_fp8"] = True
    if s.kernels == "auto":
        able = cuda and capability() >= (8, 0) and importlib.util.find_spec("triton")
        changes["kernels"] = "triton" if able else "torch"
    if s.train_tokens:
        mean_batch = sum(s.batch_sizes[:-1]) / (NUM_STAGES - 1)
        changes["num_scheduled_iterations"] = max(1, round(s.train_tokens / mean_batch))
    if not s.run_id:
        changes["run_id"] = f"{time.strftime('%Y%m%d-%H%M%S')}-{SCRIPT.stem}-{s.model}-seed{s.seed}"
    return dataclasses.replace(s, **changes)


def print_help():
    print(__doc__)
    for c in (Settings, OptimizerSettings):
        print(f"\n{c.__doc__}\n")
        for f in dataclasses.fields(c):
            default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            print(f"  {f.name.upper()}  ({allowed_values(f)}; default {default!r})")
            print(f"      {f.metadata['help']}")
    print(
        f"\nCompiled code is kept in {COMPILE_CACHE.name}/ beside this script, for later runs and whole\n"
        "sweeps; TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR put it elsewhere."
    )
    print("\nPresets (MODEL) and the defaults they change:\n")
    for name, (config, defaults) in PRESETS.items():
        print(
            f"  {name}: {config.num_layers} layers of width {config.width}, {config.num_heads} heads"
            + (f", {config.num_experts} experts of {config.expert_hidden}" if config.num_experts else "")
        )
        for key, value in defaults.items():
            print(f"      {key.upper()}={','.join(map(str, value)) if isinstance(value, tuple) else value}")


RECORDING = ("run_id", "resume", "save_every", "save_model", "manifold_every", "target_loss")
RECORDING += ("diverged_above", "val_loss_every", "val_loss_last_steps", "val_loss_every_last")
MACHINE = ("data_path", "nproc_per_node", "compile", "kernels", "attn_backend", "dist_timeout", "rehearse")
MACHINE += ("slices_per_pass",)
AFFECTS = {**dict.fromkeys(RECORDING, "recording"), **dict.fromkeys(MACHINE, "machine")}


def print_settings_json():
    """For the launcher: every setting's name, type, default and allowed values; and the presets' defaults."""
    settings = [
        {
            "name": f.name.upper(),
            "type": type_name(f),
            "default": f.default,
            "allowed": allowed_values(f),
            "affects": AFFECTS.get(f.name, "training"),
            "rare": False,
            **f.metadata,
        }
        for c in (Settings, OptimizerSettings)
        for f in dataclasses.fields(c)
    ]
    presets = {name: {k.upper(): v for k, v in defaults.items()} for name, (_, defaults) in PRESETS.items()}
    answer = {"script": SCRIPT.name, "source_hash": source_hash(), "settings": settings, "presets": presets}
    print(json.dumps(answer))


# ---------------------------------------------------------------------------------------------------
# Ranks: all collectives in one small class
# ---------------------------------------------------------------------------------------------------


class Done:
    """What a collective returns when there is nobody to talk to."""

    def wait(self):
        pass


class Arrival:
    """A collective of ranks that see each other's memory: wait() until all have arrived, then read, once."""

    def __init__(self, pipes: "Pipes", read=lambda: None):
        self.pipes, self.read, self.number = pipes, read, pipes.arrive()

    def wait(self):
        if self.read:
            self.pipes.wait(self.number)
            self.read()
            self.read = None


class Pipes:
    """By which ranks on one host tell each other how often they have arrived, a byte each time: in 20
    microseconds, where gloo's all_reduce takes 250. A rank that ends closes its own: nobody waits for it."""

    def __init__(self, ranks: "Ranks"):
        """A collective. OSError on all ranks if one may not open another's files."""
        ends = {rank: os.pipe() for rank in range(ranks.world_size) if rank != ranks.rank}
        self.count, self.heard, self.write_ends = 0, dict.fromkeys(ends, 0), {}
        self.read_ends = {rank: read_end for rank, (read_end, _) in ends.items()}
        everyones = ranks.collect({rank: f"/proc/{os.getpid()}/fd/{end}" for rank, (_, end) in ends.items()})
        error = None
        try:
            for rank in ends:
                self.write_ends[rank] = os.open(everyones[rank][ranks.rank], os.O_WRONLY)
        except OSError as found:
            error = found
        errors = ranks.collect(error and str(error))
        for _, write_end in ends.values():  # the other rank has it open
            os.close(write_end)
        if any(errors):
            for end in (*self.read_ends.values(), *self.write_ends.values()):
                os.close(end)
            raise OSError(next(filter(None, errors)))

    def arrive(self) -> int:
        """This rank's memory may be read. Which arrival this is; the others' of that number belong to it."""
        self.count += 1
        for rank, end in self.write_ends.items():
            try:
                os.write(end, b".")
            except BrokenPipeError:
                raise dist.DistError(f"rank {rank} has left") from None
        return self.count

    def wait(self, number: int):
        """Until every rank has arrived so often."""
        for rank, end in self.read_ends.items():
            while self.heard[rank] < number:
                found = len(os.read(end, 4096))
                if not found:
                    raise dist.DistError(f"rank {rank} has left")
                self.heard[rank] += found


class Ranks:
    """This process among the others. Collectives are asynchronous: they return an object with .wait()."""

    last_beat = 0.0  # time.monotonic() of the last sign of progress
    pipes: Pipes | None = None  # if all ranks are on the CPU of one host
    everyones: dict[int, Tensor] = {}  # what zeros() made, by the address of this rank's part

    def __init__(self, device: str, timeout_s: float = 900.0, settings: dict | ValueError | None = None):
        """settings: this rank's, or why it has none. SettingsError on all ranks unless all have the same."""
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = torch.device("cuda", self.local_rank) if device == "cuda" else torch.device("cpu")
        self.everyones = {}  # not the class's
        if device == "cuda":
            torch.cuda.set_device(self.device)
        else:
            cpu_kernels.keep_freed_memory()
            if "OMP_NUM_THREADS" not in os.environ or self.local_world_size > 1:
                torch.set_num_threads(max(1, usable_cores() // self.local_world_size))
        self.parent = os.getppid()  # before its store is asked, which proves it alive: see Watch
        self.launched = "RANK" in os.environ  # by torchrun, even with a single rank
        self.watched = threading.Event()
        if self.launched:
            threading.Thread(target=self.leave_with_launcher, daemon=True).start()
            # Watch gives up first and says why; NCCL's own watchdog would end the process without a word
            timeout = datetime.timedelta(seconds=1.5 * timeout_s)
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                # torchrun keeps one store for all its restarts, in which dead ranks' addresses still stand
                # (pytorch#135712). Agents on several machines count restarts each for itself: see README
                store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self.agree(store, settings or {})
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
                **({"device_id": self.device} if device == "cuda" else {}),
            )
            if device == "cpu" and 1 < world_size == self.local_world_size and hasattr(os, "memfd_create"):
                with contextlib.suppress(OSError):  # then gloo does it all
                    self.pipes = Pipes(self)
        elif isinstance(settings, ValueError):
            raise settings

    def agree(self, store: dist.Store, settings: dict | ValueError):
        """Before the ranks form a group, for which all must come, and with one device: a machine whose
        settings are wrong, or not those of the others, would keep them waiting."""
        refused, soon = isinstance(settings, ValueError), datetime.timedelta(seconds=30)
        store.set(f"settings{self.rank}", json.dumps({"refused": str(settings)} if refused else settings))
        keys = [f"settings{rank}" for rank in range(self.world_size)]
        try:
            store.wait(keys, *([soon] if refused else []))
        except dist.DistError:
            if refused:
                raise settings from None
            raise
        found = [json.loads(text) for text in store.multi_get(keys)]
        texts = [f.get("refused") or different_settings(rank, f, found[0]) for rank, f in enumerate(found)]
        if any(texts):
            with contextlib.suppress(dist.DistError):  # the store may go with this rank: let all read first
                store.set(f"read{self.rank}", "")
                store.wait([f"read{rank}" for rank in range(self.world_size)], soon)
            raise settings if refused else SettingsError(next(filter(None, texts)))

    def orphan(self) -> bool:
        """Whether torchrun is gone. Without it the parent is a shell, whose end means nothing (nohup)."""
        return self.launched and os.getppid() != self.parent

    def leave_with_launcher(self):
        """Until Watch takes over: who waits for ranks that nobody starts any more would wait very long."""
        while not self.watched.wait(0.5):
            if self.orphan():
                os._exit(1)

    def zeros(self, numel: int, like: Tensor, common: bool = False) -> Tensor:
        """What reduce_scatter works on; common: what all_gather does. If all ranks are on one host's CPU,
        each sees the others', and what is common is the same for all: a step's exchange then costs one
        read of the gradients instead of gloo's sockets. A file without a name: a killed run leaves none."""
        if self.pipes is None:
            return like.new_zeros(numel)
        path, copies = None, 1 if common else self.world_size
        if self.rank == 0:
            file = os.memfd_create("ranks")
            os.ftruncate(file, copies * numel * like.dtype.itemsize)
            path = f"/proc/{os.getpid()}/fd/{file}"
        memory = torch.from_file(self.share(path), shared=True, size=copies * numel, dtype=like.dtype)
        memory = memory.view(copies, numel)
        self.collect(None)  # all have it open
        if self.rank == 0:
            os.close(file)
        mine = memory[0 if common else self.rank]
        self.everyones[mine.data_ptr()] = memory
        return mine

    def all_reduce(self, x: Tensor, op=dist.ReduceOp.SUM):
        return dist.all_reduce(x, op=op, async_op=True) if self.world_size > 1 else Done()

    def reduce_scatter(self, full: Tensor):
        """Sum over the ranks, in place; afterwards this rank's shard(full) is right, the rest is undefined.
        gloo's own takes 2.6 times as long as its all_reduce (1M numbers, 2 ranks).
        (torch 2.13 renamed this call and the next from *_tensor; this class is the one place to follow.)"""
        if (everyones := self.in_memory(full)) is not None:
            return Arrival(self.pipes, lambda: self.sum_shards(everyones))
        if self.world_size == 1 or self.device.type == "cpu":
            return self.all_reduce(full)
        return dist.reduce_scatter_single(self.shard(full), full, async_op=True)

    def all_gather(self, full: Tensor):
        """Every rank's shard(full) to all, in place."""
        if self.in_memory(full) is not None:
            return Arrival(self.pipes)
        if self.world_size == 1:
            return Done()
        return dist.all_gather_single(full, self.shard(full), async_op=True)

    def in_memory(self, full: Tensor) -> Tensor | None:
        """All ranks' buffers (of common memory, one), if `full` is one that zeros() made for all to see."""
        return self.everyones.get(full.data_ptr()) if self.everyones else None

    def sum_shards(self, everyones: Tensor):
        """Nobody else reads or writes this rank's shard of its own buffer."""
        mine = self.shard(everyones[self.rank])
        for rank, theirs in enumerate(everyones):
            if rank != self.rank:
                mine += self.shard(theirs)

    def shard(self, full: Tensor) -> Tensor:
        """This rank's view of its equal part of full's first dimension."""
        n = full.shape[0] // self.world_size
        return full[self.rank * n : (self.rank + 1) * n]

    def whole(self, mine: Tensor) -> Tensor:
        """Every rank's equal part of a flat tensor, joined in the order of the ranks."""
        full = mine.new_empty(mine.numel() * self.world_size)
        self.shard(full).copy_(mine)
        self.all_gather(full).wait()
        return full

    def broadcast(self, x: Tensor):
        if self.world_size > 1:
            dist.broadcast(x, 0)

    def share(self, value):
        """Rank 0's value (small, picklable) to all."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def collect(self, value) -> list:
        """Every rank's value (small, picklable), in their order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def together(self, function):
        """function()'s value. What one rank refuses, or the system refuses it, is a ValueError on all:
        nobody waits for one that left."""
        value = error = None
        try:
            value = function()
        except ValueError as found:
            error = found
        except OSError as found:
            error = ValueError(f"{found.filename or 'a file'} cannot be used: {found.strerror or found}")
        for rank, text in enumerate(self.collect(None if error is None else str(error))):
            if text is not None:
                raise error or ValueError(f"rank {rank}: {text}")
        return value

    def beat(self):
        """A sign of progress, for Watch."""
        self.last_beat = time.monotonic()

    @staticmethod
    def close():
        if dist.is_initialized():
            dist.destroy_process_group()


class Stop:
    """Whether somebody asked the run to stop. The first SIGTERM, SIGINT or SIGHUP is a request, which the
    ranks then agree on; so are others that come with it (a terminal's and torchrun's, for one Ctrl-C). One
    that comes later ends the process at once."""

    TOGETHER_S = 5.0

    def __init__(self):
        self.reason, self.since = "", 0.0

    def listen(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.reason = self.reason or signal.Signals(number).name  # Watch may have given one
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Watch(threading.Thread):
    """Ends this process, with a line in the log, when the run cannot go on: no beat for DIST_TIMEOUT (a
    collective hangs), or a rank on this host is gone and the main thread does not notice (NCCL waits for
    ever). A thread, because the main one is inside C code then. Without its launcher a rank stops."""

    POLL_S, GRACE_S = 0.5, 15.0  # torchrun kills after 30 s

    def __init__(self, ranks: Ranks, timeout_s: float, stop: Stop, on_crash):
        super().__init__(daemon=True)
        self.timeout_s, self.stop_request, self.on_crash = timeout_s, stop, on_crash
        self.ranks = ranks
        everybody = enumerate(ranks.collect((host(), os.getpid())))
        self.pids = {rank: pid for rank, (where, pid) in everybody if where == host()}
        self.over = threading.Event()
        ranks.beat()
        ranks.watched.set()

    def missing(self) -> dict[int, str]:
        """Which ranks of this host are dead or stopped, in words."""
        states = {rank: process_state(pid) for rank, pid in self.pids.items() if rank != self.ranks.rank}
        return {
            rank: f"rank {rank} (process {self.pids[rank]}) is {state}"
            for rank, state in states.items()
            if state != "alive"
        }

    def leads(self, missing: dict) -> bool:
        """Whether this rank speaks for those that only saw others fail: the first one left beside the log."""
        return 0 in self.pids and all(rank in missing for rank in self.pids if rank < self.ranks.rank)

    def run(self):
        lost_since, polled = None, time.monotonic()
        while not self.over.wait(self.POLL_S):
            now, missing = time.monotonic(), self.missing()
            if now - polled > 10 * self.POLL_S:  # this whole process slept (SIGSTOP, a suspended machine)
                self.ranks.last_beat += now - polled
            polled = now
            if self.ranks.orphan() and not self.stop_request.reason:
                self.stop_request.reason = "its launcher is gone"
            gone = [text for text in missing.values() if text.endswith("gone")]
            lost_since = (lost_since or now) if gone else None
            silent_s = now - self.ranks.last_beat
            if silent_s > self.timeout_s:
                elsewhere = self.ranks.world_size - len(self.pids)
                why = ", ".join(missing.values()) or (
                    f"{elsewhere} on other hosts may not answer" if elsewhere else "all ranks are alive"
                )
                self.on_crash(
                    missing, f"no progress for {silent_s:.0f} s (DIST_TIMEOUT={self.timeout_s:g}): {why}"
                )
            elif lost_since and min(now - lost_since, silent_s) > self.GRACE_S:
                self.on_crash(missing, ", ".join(gone))


def host() -> str:
    """Where a process number and a network mean the same: two containers may bear one name."""
    with contextlib.suppress(OSError):
        return " ".join((platform.node(), os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self/ns/net")))
    return platform.node()


def process_state(pid: int) -> str:
    """alive, stopped (by SIGSTOP) or gone."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return "gone"
    except OSError:  # no /proc on this system: alive is all that can be said
        return "alive"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "alive")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------------------------------------------
# Run log: what analysis.run_log reads
# ---------------------------------------------------------------------------------------------------


class RunLog:
    """logs/RUN_ID.txt and the console, on rank 0; silent on the others. One flushed append a line. What a
    full disk does not take is kept and written before the next line."""

    def __init__(self, path: Path, rank: int, num_steps: int, go_on: bool = False):
        """go_on: append to a log that exists. Raises SettingsError where the log cannot be had."""
        self.path, self.is_main, self.num_steps = path, rank == 0, num_steps
        self.bar = self.is_main and sys.stdout.isatty()
        self.unwritten, self.full, self.ended = b"", False, threading.Lock()
        if not self.is_main:
            return
        try:
            os.makedirs(self.path.parent, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            if not self.path.is_file():
                raise SettingsError(f"{self.path} is no regular file; choose another RUN_ID, or remove it")
            self.lock()  # before anything is asked of it, which another process might change
            self.existed = has_begun(self.path)
            if self.existed and not go_on:
                raise SettingsError(
                    f"{self.path} exists already, and logs are never overwritten; choose "
                    "another RUN_ID, or RESUME=auto to go on with that run"
                )
            if not self.existed:
                os.ftruncate(self.file, 0)
        except OSError as error:
            raise SettingsError(
                f"{self.path} cannot be written: {error.strerror}; run where logs/ can be written"
            ) from None
        size = os.fstat(self.file).st_size
        if size and os.pread(self.file, 1, size - 1) != b"\n":
            self.write("")  # ends the line that a crash cut short

    def lock(self):
        """One writer a log, also when two processes resume it; the lock goes with the process."""
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"{self.path} exists already and is being written by another process; "
                "wait for it, or choose another RUN_ID"
            ) from None
        except (ImportError, OSError):
            self.say(f"warning: {self.path} cannot be locked on this file system")

    def write(self, line: str):
        if self.is_main:
            self.unwritten += (line + "\n").encode()
            self.flush()

    def flush(self):
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[os.write(self.file, self.unwritten) :]
            self.full = False
        except OSError as error:
            if not self.full:
                self.say(f"warning: {self.path}: {error.strerror}; its lines wait in memory")
            self.full = True

    def end(self, name: str, whoever: bool = False, **fields):
        """The last event, once, whichever thread comes first; `whoever`: also from another rank than 0."""
        if not self.ended.acquire(blocking=False):
            return
        if self.is_main:
            self.event(name, **fields)
        elif whoever and self.path.exists():
            with contextlib.suppress(OSError), self.path.open("a") as file:
                file.write(self.event_line(name, fields) + "\n")

    def sync(self):
        """To the disk, before a checkpoint that takes it for granted. OSError if there is no room."""
        if self.is_main:
            self.flush()
            if self.unwritten:
                raise OSError(f"{self.path} has lines that the disk does not take")
            os.fsync(self.file)

    def close(self) -> int:
        """Exit code: 1 if the disk never took some lines."""
        if not self.is_main:
            return 0
        self.flush()
        os.close(self.file)
        if self.unwritten:
            show(
                f"error: {self.path} lacks its last lines, the disk did not take them:\n"
                f"{self.unwritten.decode()}",
                file=sys.stderr,
            )
        try:
            sys.stdout.flush()
        except OSError:  # what the console does not take would become the exit code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(bool(self.unwritten))

    def header(self, config: dict, started: dict):
        """The sources, the resolved settings and the first event, fenced by two lines of '='. One write: a
        kill leaves none of it or, on a disk that is full, a part that has_begun() knows."""
        self.write(
            "\n".join(
                [
                    sources(),
                    "=" * 100,
                    "config:" + json.dumps(config),
                    self.event_line("started", started),
                    "=" * 100,
                ]
            )
        )

    def event(self, name: str, **fields):
        self.write(self.event_line(name, fields))

    @staticmethod
    def event_line(name: str, fields: dict) -> str:
        return " ".join([f"event:{name}", *(f"{k}:{v}" for k, v in fields.items())])

    def say(self, text: str):
        """A line for the person at the console only."""
        if self.is_main:
            show(("\r\033[K" if self.bar else "") + text)

    def step(self, step: int, fields: dict):
        """One step line: `fields` in their order, floats already formatted."""
        self.write(f"step:{step}/{self.num_steps} " + " ".join(f"{k}:{v}" for k, v in fields.items()))

    def progress(self, step: int, loss: float, tokens_per_s: float, seconds_left: float, shown_every: int):
        """A bar on a terminal, now and then a plain line elsewhere."""
        if not self.is_main or not (self.bar or step % shown_every == 0 or step == self.num_steps):
            return
        text = (
            f"step {step:>5}/{self.num_steps}  train loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  "
            f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left"
        )
        if self.bar:
            width = max(10, min(40, shutil.get_terminal_size().columns - len(text) - 4))
            done = round(width * step / self.num_steps)
            text = f"\r\033[K[{'#' * done}{'.' * (width - done)}] {text}"
        show(text, end="" if self.bar else "\n")


def show(text: str, **options):
    """To the console, which may be a closed terminal or a file on a full disk: no reason to end a run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True, **options)


def source_files() -> list[Path]:
    """What decides the numbers: this script, and the kernels it uses."""
    beside = [SCRIPT.with_name(name) for name in ("cpu_kernels.py", "triton_kernels.py")]
    return [p for p in (SCRIPT, *beside) if p.exists()]


def sources() -> str:
    return "".join(p.read_text() for p in source_files())


def has_begun(log: Path) -> bool:
    """Whether there is a log with more in it than the piece of a header that a run killed in its first
    moment leaves behind."""
    if not log.is_file():
        return False
    ours = sources().encode()
    with log.open("rb") as file:
        text, rest = file.read(len(ours)), file.read(65_536)
    return not ours.startswith(text) or b"\nevent:started " in rest


def source_hash() -> str:
    return hashlib.sha256(sources().encode()).hexdigest()[:16]


def launch_id() -> str:
    """The same for a worker and for those that torchrun starts in its place."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}.{os.getppid()}"


def restarted() -> bool:
    """Whether torchrun started this worker in place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def provenance(ranks: Ranks) -> dict:
    """What ran where, as fields of event:started."""
    git = (
        subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=SCRIPT.parent,
            capture_output=True,
            text=True,
        )
        if shutil.which("git")
        else None
    )
    cuda = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "script": SCRIPT.name,
        "source_hash": source_hash(),
        "launch": launch_id(),
        "git": git.stdout.strip() if git and git.returncode == 0 else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": name.replace(" ", "_"),
        "world_size": ranks.world_size,
        "threads": torch.get_num_threads(),
        "host_cores": usable_cores(),
    }


# ---------------------------------------------------------------------------------------------------
# Data: shards of documents -> slices of tokens
# ---------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
GPT2_VOCAB, GPT2_MARK = 50257, 50256
PASS_TOKENS = 65_536  # of one forward pass if it is up to us: gpt2-small then takes some 50 of 80 GB
NUM_SLICES = 8  # a global batch is always cut so (or into as many slices as there are ranks, if more)


class DataError(ValueError):
    """A data file cannot be used: which, what was found, what was wanted. Exit code 2."""


@dataclass
class Shard:
    """An llm.c token file: 256 int32 of header [magic, version, tokens, vocabulary], then uint16 tokens."""

    path: Path
    tokens: np.ndarray
    vocab_size: int
    kept: np.ndarray | None = None

    def read(self) -> np.ndarray:
        """All tokens, in memory: a mapped file that somebody cuts short ends the process with SIGBUS."""
        try:
            tokens = np.fromfile(self.path, dtype="<u2", offset=HEADER_INTS * 4)
        except OSError as error:
            raise DataError(
                f"{self.path} was there when the run began and cannot be read now "
                f"({error.strerror}); put it back, then RESUME=auto goes on"
            ) from None
        if len(tokens) != len(self.tokens):
            raise DataError(
                f"{self.path} had {len(self.tokens)} tokens when the run began and has "
                f"{len(tokens)} now; put the old file back, then RESUME=auto goes on"
            )
        return tokens

    def head(self, num_tokens: int) -> np.ndarray:
        """The first tokens, read once."""
        if self.kept is None or len(self.kept) < min(num_tokens, len(self.tokens)):
            self.kept = np.array(self.tokens[:num_tokens])
        return self.kept[:num_tokens]

    @functools.cached_property
    def mark(self) -> int:
        """The token that begins every document. Public GPT-2 shards may begin in the middle of one, so their
        first token says nothing; in a shard that states its own vocabulary the first token is the mark."""
        return GPT2_MARK if self.vocab_size == GPT2_VOCAB else int(self.tokens[0])


def open_shard(path: Path) -> Shard:
    """Map a shard, checked: magic, version, count against the file's size, every token in the vocabulary."""
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe would make us wait for ever
            raise DataError(f"{path} is no regular file; a token shard is wanted")
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:  # a folder, a link to nothing, a file of somebody else's
        raise DataError(f"{path} cannot be read ({error.strerror}); a token shard is wanted") from None
    if size < HEADER_INTS * 4:
        raise DataError(f"{path} has {size} bytes, a shard's header alone {HEADER_INTS * 4}; make it again")
    magic, version, count, vocab_size = (int(x) for x in header[:4])
    if magic != SHARD_MAGIC or version != SHARD_VERSION:
        raise DataError(
            f"{path} begins with [{magic}, {version}], a token shard with [{SHARD_MAGIC}, "
            f"{SHARD_VERSION}]; it is another kind of file"
        )
    if count < 1 or size != HEADER_INTS * 4 + 2 * count:
        raise DataError(
            f"{path} says it has {count} tokens, its size of {size} bytes holds "
            f"{(size - HEADER_INTS * 4) / 2:g}; it was cut short or damaged: make it again"
        )
    vocab_size = vocab_size or GPT2_VOCAB
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_INTS * 4)
    if not 0 < vocab_size <= 65536 or int(tokens.max()) >= vocab_size:
        raise DataError(f"{path} has token {int(tokens.max())}, beyond its vocabulary of {vocab_size}")
    return Shard(path, tokens, vocab_size)


def open_shards(root: str, pattern: str, name: str) -> list[Shard]:
    """The shards that match, all of one vocabulary."""
    paths = sorted(Path(p) for p in glob.glob(os.path.join(root, pattern)))
    if not paths:
        fetch = "data/embedded_corpus.py" if "embedded" in pattern else "data/cached_fineweb10B.py 9"
        raise DataError(
            f"{name}={pattern!r} under DATA_PATH={root!r} matches no file; `python {fetch}` "
            f"makes it, or point {name} at your own shards (data/README.md)"
        )
    shards = [open_shard(p) for p in paths]
    if len({s.vocab_size for s in shards}) > 1:
        found = ", ".join(f"{s.path.name} {s.vocab_size}" for s in shards)
        raise DataError(f"{name} mixes vocabularies ({found}); all must come from one tokenizer")
    return shards


def shard_fields(shards: list[Shard]) -> str:
    """name/tokens/sha256 of each file for the log; of files over 64 MiB only the ends are hashed."""

    def digest(s):
        ends = (s.tokens,) if s.tokens.nbytes <= 64 << 20 else (s.tokens[: 1 << 19], s.tokens[-(1 << 19) :])
        return hashlib.sha256(b"".join(part.tobytes() for part in ends)).hexdigest()[:16]

    return ",".join(f"{s.path.name.replace(' ', '_')}/{len(s.tokens)}/{digest(s)}" for s in shards)


class Batch(NamedTuple):
    """One forward pass of one rank. B slices of T tokens."""

    inputs_BT: Tensor  # int32
    targets_BT: Tensor  # int64, the token that follows each input in the shard
    cu_seqlens: Tensor  # int32: where documents begin in the B*T inputs, then B*T; its length is not fixed
    max_doc_tokens: int


def count_slices(world_size: int) -> int:
    """Of a global batch."""
    return max(NUM_SLICES, world_size)


def my_slices(ranks: Ranks) -> range:
    """Which slices of a global batch are this rank's."""
    each = count_slices(ranks.world_size) // ranks.world_size
    return range(ranks.rank * each, (ranks.rank + 1) * each)


def stack_slices(slices: list, device: torch.device, max_doc_tokens: int) -> Batch:
    """slices: (inputs, targets, document lengths) in numpy."""
    inputs, targets = (np.stack([s[i] for s in slices]) for i in (0, 1))
    cu_seqlens = np.cumsum(np.concatenate([[0], *(s[2] for s in slices)]))
    arrays = inputs.astype(np.int32), targets.astype(np.int64), cu_seqlens.astype(np.int32)
    return Batch(*(to_device(torch.from_numpy(a), device) for a in arrays), max_doc_tokens)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """From the host, which does not wait: a copy from pageable memory would make it wait for all that the
    device was given before."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class Ahead:
    """Batches made by a thread while the device computes. On CUDA their copies go through a stream of their
    own; taking them makes the device wait for the copies, not the host."""

    def __init__(self, device: torch.device):
        self.device, self.worker = device, ThreadPoolExecutor(1)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, make, *args):
        """A ticket for make(*args): a Batch, or a list of them."""
        return self.worker.submit(self.run, make, args)

    def run(self, make, args):
        if self.stream is None:
            return make(*args), None
        # a new thread stands on device 0 and its default stream
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            return make(*args), self.stream.record_event()

    def take(self, ticket):
        made, copied = ticket.result()
        if copied is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            for batch in [made] if isinstance(made, Batch) else made or []:
                for x in batch[:3]:  # their memory is the copying stream's, which must not reuse it early
                    x.record_stream(computing)
        return made

    def each(self, batches):
        """The items of an iterator, each made while the one before it is in use."""
        batches = iter(batches)
        ticket = self.start(next, batches, None)
        while (batch := self.take(ticket)) is not None:
            ticket = self.start(next, batches, None)
            yield batch

    def close(self):
        self.worker.shutdown()


def documents(tokens: np.ndarray, mark: int, longest: int, split: bool) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of a shard's documents as training reads them, in the file's order: none longer than
    `longest`, whose rest is dropped or, with `split`, read as further documents."""
    starts = np.flatnonzero(tokens == mark)  # a beginning without a mark is no document
    lengths = np.diff(starts, append=len(tokens))
    if split:
        pieces = -(-lengths // longest)
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(starts, pieces) + nth * longest
        lengths = np.repeat(lengths, pieces) - nth * longest
    return starts, np.minimum(lengths, longest)


class TrainData:
    """Endless batches of whole documents. Every rank plans all slices of a step and reads its own, so that
    1, 2, 4 and 8 ranks see the same tokens. The order of shards and documents is drawn from the seed, each
    epoch anew: `position`, where the step after the last one handed out begins, is all the state there is."""

    def __init__(self, shards: list[Shard], s: Settings, ranks: Ranks):
        self.shards, self.seed, self.device = shards, s.seed, ranks.device
        self.max_doc_tokens, self.split = s.max_doc_tokens, s.long_docs == "split"
        self.num_slices, self.mine = count_slices(ranks.world_size), my_slices(ranks)
        self.slices_per_pass = s.slices_per_pass
        self.loaded, self.ahead = None, Ahead(ranks.device)
        self.seek((0, 0, 0))

    def seek(self, position: tuple[int, int, int]):
        """Go to (epoch, place in its order of shards, document in that shard's order)."""
        self.position = self.epoch, self.place, self.cursor = tuple(position)
        self.load_shard()
        self.coming = None

    def load_shard(self):
        """Index the current shard's documents, in this epoch's order."""
        order = np.random.default_rng([self.seed, 1, self.epoch]).permutation(len(self.shards))
        index = int(order[self.place])
        if self.loaded != index:
            shard = self.shards[index]
            self.tokens, self.mark, self.loaded = shard.read(), shard.mark, index
        starts, lengths = documents(self.tokens, self.mark, self.max_doc_tokens, self.split)
        perm = np.random.default_rng([self.seed, 2, self.epoch, index]).permutation(len(starts))
        self.starts, self.lengths = starts[perm], lengths[perm]
        self.ends = np.cumsum(self.lengths)

    def plan_slice(self, num_tokens: int) -> tuple:
        """(tokens, starts, lengths) of the next slice: whole documents, the last one cut to fill it."""
        for _ in range(2 * len(self.shards) + 1):  # what is left of this epoch, and all of the next
            before = self.ends[self.cursor - 1] if self.cursor else 0
            last = int(np.searchsorted(self.ends, before + num_tokens))
            if last < len(self.ends):
                starts, lengths = (
                    self.starts[self.cursor : last + 1],
                    self.lengths[self.cursor : last + 1].copy(),
                )
                lengths[-1] -= self.ends[last] - before - num_tokens
                self.cursor = last + 1
                return self.tokens, starts, lengths
            self.place, self.cursor = self.place + 1, 0
            if self.place == len(self.shards):
                self.epoch, self.place = self.epoch + 1, 0
            self.load_shard()
        raise DataError(
            f"no training shard fills a slice of {num_tokens} tokens now, as one did when the "
            "run began; put the old files back, then RESUME=auto goes on"
        )

    def read_slice(self, tokens, starts, lengths) -> tuple:
        """Inputs and the tokens that follow them; past the end of the shard follows a document mark."""
        inputs = np.concatenate([tokens[s : s + n] for s, n in zip(starts, lengths)])
        follows = [tokens[s + 1 : s + n + 1] for s, n in zip(starts, lengths)]
        follows = [np.append(f, self.mark) if len(f) < n else f for f, n in zip(follows, lengths)]
        return inputs, np.concatenate(follows), lengths

    def make(self, batch_tokens: int) -> list[Batch]:
        slice_tokens = batch_tokens // self.num_slices
        plans = [self.plan_slice(slice_tokens) for _ in range(self.num_slices)]
        slices = [self.read_slice(*plans[i]) for i in self.mine]
        n = self.slices_per_pass or max(1, PASS_TOKENS // slice_tokens)
        longest = min(self.max_doc_tokens, slice_tokens)
        return [stack_slices(slices[i : i + n], self.device, longest) for i in range(0, len(slices), n)]

    def next(self, batch_tokens: int, then: int | None) -> list[Batch]:
        """This rank's passes of this step; those of the step after it, of size `then`, are read meanwhile."""
        now = self.ahead.take(self.coming or self.ahead.start(self.make, batch_tokens))
        self.position = self.epoch, self.place, self.cursor
        self.coming = self.ahead.start(self.make, then) if then else None
        return now


def val_batches(shards: list[Shard], s: Settings, ranks: Ranks, num_batches: int | None = None):
    """This rank's passes over the first val_tokens tokens: batches of contiguous slices, documents whole.
    num_batches: only the first so many."""
    need = s.val_tokens + 1
    tokens = np.concatenate([shard.head(need) for shard in shards])[:need]
    slice_tokens = s.val_batch_tokens // count_slices(ranks.world_size)
    n = max(1, PASS_TOKENS // slice_tokens)
    marks = np.flatnonzero(tokens[:-1] == shards[0].mark)
    bounds = np.union1d(marks, np.arange(0, need, slice_tokens))
    longest = int(np.diff(bounds).max())  # of all batches, because compiled code is made for this number
    for batch_start in range(0, s.val_tokens, s.val_batch_tokens)[:num_batches]:
        slices = []
        for i in my_slices(ranks):
            at = batch_start + i * slice_tokens
            part = tokens[at : at + slice_tokens + 1]
            inner = np.flatnonzero(part[1:-1] == shards[0].mark) + 1
            slices.append((part[:-1], part[1:], np.diff(inner, prepend=0, append=slice_tokens)))
        for i in range(0, len(slices), n):
            yield stack_slices(slices[i : i + n], ranks.device, longest)


def open_data(s: Settings, world_size: int) -> tuple[list[Shard], list[Shard]]:
    """Training and validation shards, checked against each other and against what the run needs."""
    train = open_shards(s.data_path, s.train_files, "TRAIN_FILES")
    val = open_shards(s.data_path, s.val_files, "VAL_FILES")
    if train[0].vocab_size != val[0].vocab_size:
        raise DataError(
            f"training shards have a vocabulary of {train[0].vocab_size}, validation shards of "
            f"{val[0].vocab_size}; both must come from one tokenizer"
        )
    readable = []  # tokens of each shard that training reads
    for shard in train:
        _, lengths = documents(shard.tokens, shard.mark, s.max_doc_tokens, s.long_docs == "split")
        readable.append(int(lengths.sum()))
        if not readable[-1]:
            raise DataError(
                f"{shard.path} has no document mark (token {shard.mark}), with which every "
                "document begins; make it again with data/tokenize_text.py"
            )
    have = sum(len(v.tokens) for v in val)
    for v in val:
        v.head(s.val_tokens + 1)
    if have < s.val_tokens + 1:
        raise DataError(
            f"VAL_TOKENS={s.val_tokens}, but the validation shards hold {have}, one of them only "
            f"a target; set it to a multiple of VAL_BATCH_TOKENS={s.val_batch_tokens} below that"
        )
    num_slices = count_slices(world_size)
    if num_slices % world_size or any(t % num_slices for t in (*s.batch_sizes, s.val_batch_tokens)):
        raise SettingsError(
            f"{world_size} ranks do not divide {num_slices} slices, or those the batches "
            f"{s.batch_sizes}; use 1, 2, 4, 8 ranks, or batches that divide"
        )
    most = max(s.batch_sizes) // num_slices
    if most > max(readable):
        raise DataError(
            f"BATCH_SIZES={','.join(map(str, s.batch_sizes))}: the largest has slices of {most} "
            f"tokens, but no training shard has more than {max(readable)} in documents up to "
            f"MAX_DOC_TOKENS={s.max_doc_tokens}; use larger shards or smaller batches"
        )
    return train, val


# ---------------------------------------------------------------------------------------------------
# Numerics
# ---------------------------------------------------------------------------------------------------

LOSS_SCALE = 2 / 8  # on the summed loss: the gradient size in which raw radial strengths were first measured


def norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, without gain."""
    return cpu_kernels.Norm.apply(x) if eager_cpu(x) else F.rms_norm(x, (x.size(-1),))


def eager_cpu(x: Tensor) -> bool:
    """Whether to take cpu_kernels' hand-written passes. A compiler does better by itself: it and CUDA see
    plain torch."""
    return not (x.is_cuda or torch.compiler.is_compiling())


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 (arXiv 2109.08668). Saves one tensor, makes two passes backward; autograd's makes four."""

    @staticmethod
    def forward(ctx, x):
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


class Float8Head(torch.autograd.Function):
    """x @ w.T in float8 with fixed scales, the speedrun's idea of 2025-01: activations and weights in e4m3,
    the incoming gradient in e5m2. x_MC, w_VC in bfloat16; result bfloat16 (M, V)."""

    @staticmethod
    def forward(ctx, x_MC, w_VC):
        x8, w8 = to_float8(x_MC, HEAD_X_SCALE), to_float8(w_VC, HEAD_W_SCALE)
        ctx.save_for_backward(x8, w8)
        return float8_product(x8, w8.T, HEAD_X_SCALE, HEAD_W_SCALE, fast=True)

    @staticmethod
    def backward(ctx, grad_MV):
        x8, w8 = ctx.saved_tensors
        g8 = to_float8(grad_MV, HEAD_GRAD_SCALE, torch.float8_e5m2)
        grad_x = float8_product(g8, w8.T.contiguous().T, HEAD_GRAD_SCALE, HEAD_W_SCALE)
        return grad_x, float8_product(g8.T.contiguous(), x8.T.contiguous().T, HEAD_GRAD_SCALE, HEAD_X_SCALE)


HEAD_X_SCALE, HEAD_W_SCALE, HEAD_GRAD_SCALE = 100 / 448, 1.6 / 448, LOSS_SCALE * 0.75 / 448


def float8_product(a: Tensor, b: Tensor, a_scale: float, b_scale: float, fast: bool = False) -> Tensor:
    """a @ b in bfloat16; a by rows and b by columns, as the hardware reads them."""
    scale_a, scale_b = (torch.full((), scale, device=a.device) for scale in (a_scale, b_scale))
    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def to_float8(x: Tensor, scale: float, dtype=torch.float8_e4m3fn) -> Tensor:
    """x / scale, clamped: e5m2 would overflow to inf, e4m3 to nan."""
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


# ---------------------------------------------------------------------------------------------------
# Model
# B slices, T tokens of a slice, H heads, D head dim, C width, V vocabulary (padded), K predicted tokens
# in a mixture of experts: E experts, F hidden width of one, M tokens of a pass, k experts a token, P rows
# ---------------------------------------------------------------------------------------------------

NUM_STAGES = 4  # three scheduled, and the extension
GATE_CHANNELS = 12  # gates read the first channels of what they gate
SOFTCAP = (23.0, 5.0, 7.5)  # logits = 23 sigmoid((z + 5) / 7.5)
ATTN_SCALE = 0.1
ROTARY_BASE = 1024
HASH_MULTIPLIERS = (36313, 27191, 40693, 32467, 24281)  # of the last token of an n-gram, the one before, ...
VOCAB_MULTIPLE = 128  # so that the head's product has aligned shapes
INIT_GAIN = 0.5  # matrices start uniform with standard deviation INIT_GAIN / sqrt(width)
ROUTER_STD = 0.02  # of a router's first weights
GROUP_MULTIPLE = 8  # rows of a group on CUDA: 16 bytes of bfloat16, which its kernel asks for


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and topology. Tuples of layers say which have a feature; windows are (short, long) in blocks."""

    num_layers: int = 11
    width: int = 768
    num_heads: int = 6
    head_dim: int = 128
    num_kv_heads: int = 6
    window_block: int = 128
    windows: tuple = ((1, 3), (3, 7), (5, 11), (6, 13))  # by stage
    final_windows: tuple = (6, 20)  # at the last validation
    long_layers: tuple = (3, 10)
    paired_layers: tuple = (0, 2, 5, 9)
    value_embed_layers: tuple = (0, 1, 8, 9, 10)
    skip: tuple | None = (3, 6)  # output of one added before the other
    no_attention: tuple = (6,)
    backout: int | None = 7
    ngram_rows: int = 5 * 50304  # of the hash embedding
    ngrams: tuple = (2,)  # how many last tokens are hashed into it
    smear: bool = True
    attn_gate: bool = True
    # weights of the losses on token t+1, t+2, ... by stage, each (at its start, at its end)
    predict: tuple = (((1, 1), (0.5, 0.5), (0.25, 0)), ((1, 1), (0.5, 0)), ((1, 1),), ((1, 1),))
    untie_frac: float = 2 / 3  # of training; 1: embedding, head stay tied
    num_experts: int = 0  # in place of each MLP; 0: none
    moe_top_k: int = 2
    expert_hidden: int = 0  # hidden width of one expert


@dataclass(frozen=True)
class LayerPlan:
    """What one layer has."""

    attention: bool
    long_window: bool
    paired: bool
    value_embed: bool


def layer_plans(c: ModelConfig) -> list[LayerPlan]:
    return [
        LayerPlan(
            i not in c.no_attention, i in c.long_layers, i in c.paired_layers, i in c.value_embed_layers
        )
        for i in range(c.num_layers)
    ]


PLAIN = dict(
    paired_layers=(),
    value_embed_layers=(),
    skip=None,
    no_attention=(),
    backout=None,
    ngram_rows=0,
    smear=False,
    attn_gate=False,
    untie_frac=1.0,
)

TINY = dict(
    num_layers=4,
    width=128,
    num_heads=2,
    head_dim=64,
    num_kv_heads=2,
    window_block=64,
    windows=((1, 4),) * 4,
    final_windows=(1, 4),
    long_layers=(1, 3),
    paired_layers=(),
    value_embed_layers=(0, 3),
    skip=None,
    no_attention=(),
    backout=None,
    ngram_rows=8192,
    ngrams=(2, 3, 4),
    predict=(((1, 1),),) * 4,
    untie_frac=1.0,
)
TINY_SETTINGS = dict(
    train_files="data/embedded/embedded_train_*.bin",
    val_files="data/embedded/embedded_val_*.bin",
    batch_sizes=(2048,) * 4,
    lr_muls=(1.0,) * 4,
    num_scheduled_iterations=1000,
    num_extension_iterations=0,
    max_doc_tokens=256,
    long_docs="split",
    val_tokens=131_072,
    val_batch_tokens=65_536,
    val_loss_every=100,
    val_loss_last_steps=0,
    target_loss=1.0,
    adam_lr=0.016,
)

# MODEL -> (ModelConfig, defaults of settings that the preset changes)
PRESETS = {
    "gpt2-small": (ModelConfig(), {}),
    "gpt2-medium": (
        ModelConfig(
            num_layers=16,
            width=1024,
            num_heads=8,
            num_kv_heads=8,
            long_layers=(3, 7, 11, 15),
            paired_layers=(0, 2, 5, 9, 13),
            value_embed_layers=(0, 1, 13, 14, 15),
            skip=(5, 9),
            no_attention=(9,),
            backout=11,
        ),
        dict(target_loss=2.92, num_scheduled_iterations=4800),
    ),
    "gpt2-1b": (
        ModelConfig(
            num_layers=20,
            width=2048,
            num_heads=16,
            num_kv_heads=16,
            long_layers=(4, 9, 14, 19),
            paired_layers=(0, 2, 6, 12, 17),
            value_embed_layers=(0, 1, 17, 18, 19),
            skip=(6, 11),
            no_attention=(11,),
            backout=14,
        ),
        dict(target_loss=2.7, num_scheduled_iterations=12000),
    ),
    "dense-88m": (
        ModelConfig(
            num_layers=22,
            width=512,
            num_heads=8,
            head_dim=64,
            num_kv_heads=4,
            long_layers=tuple(range(22)),
            windows=((4, 4),) * 4,
            final_windows=(4, 4),
            predict=(((1, 1),),) * 4,
            **PLAIN,
        ),
        dict(
            batch_sizes=(65_536,) * 4,
            lr_muls=(1.0,) * 4,
            num_scheduled_iterations=25_940,
            num_extension_iterations=0,
            cooldown_frac=0.0,
            lr_decay_type="constant",
            max_doc_tokens=512,
            long_docs="split",
            val_loss_every=250,
        ),
    ),
    "moe-79m": (
        ModelConfig(
            num_layers=6,
            width=384,
            num_heads=8,
            head_dim=48,
            num_kv_heads=8,
            long_layers=tuple(range(6)),
            windows=((4, 4),) * 4,
            final_windows=(4, 4),
            predict=(((1, 1),),) * 4,
            num_experts=8,
            expert_hidden=1536,
            **PLAIN,
        ),
        dict(
            num_experts=8,
            batch_sizes=(32_768,) * 4,
            lr_muls=(1.0,) * 4,
            num_scheduled_iterations=2000,
            num_extension_iterations=0,
            warmup_steps=100,
            cooldown_frac=1.0,
            lr_decay_type="cosine",
            lr_decay_final=0.0,
            max_doc_tokens=512,
            long_docs="split",
            val_loss_every=100,
            val_loss_last_steps=0,
            target_loss=4.5,
        ),
    ),
    "tiny": (ModelConfig(**TINY), TINY_SETTINGS),
    "tiny-wide": (ModelConfig(**{**TINY, "width": 256, "num_heads": 4, "num_kv_heads": 4}), TINY_SETTINGS),
    "moe-tiny": (ModelConfig(num_experts=8, expert_hidden=128, **TINY), dict(TINY_SETTINGS, num_experts=8)),
}


class Rotary(nn.Module):
    """Half-truncated rotary embedding (arXiv 2104.09864): head_dim/4 frequencies turn interleaved pairs, the
    other half of the head stands still. Holds the softmax scale too, because YaRN changes both."""

    def __init__(self, head_dim: int):
        super().__init__()
        freqs = (1 / ROTARY_BASE) ** torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("freqs", freqs)  # radians a token
        self.scale = ATTN_SCALE  # a constant of compiled code, which new windows compile anew in any case
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
        """The long window goes from old to new tokens: frequencies that turn less than once in the old window
        are slowed by their ratio, fast ones kept (YaRN, arXiv 2309.00071, with beta 1 and 32)."""
        turns = old * self.freqs / (2 * math.pi)
        ratio = old / new
        self.freqs.mul_(ratio + ((turns - 1) / 31).clamp(0, 1) * (1 - ratio))
        self.scale *= 1 + 0.2 * math.log(new / old)
        self.make_tables(self.cos.shape[0])

    def turns(self, num_positions: int, dtype: torch.dtype) -> Tensor:
        """The pairs' rotations as complex numbers, (positions, F)."""
        return torch.complex(self.cos[:num_positions], self.sin[:num_positions]).to(dtype.to_complex())

    def forward(self, x_BTHD: Tensor) -> Tensor:
        T, D = x_BTHD.shape[1], x_BTHD.shape[-1]
        cos, sin = self.cos[:T, None], self.sin[:T, None]
        even, odd = x_BTHD[..., : D // 2].float().unflatten(-1, (D // 4, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        return torch.cat((turned.type_as(x_BTHD), x_BTHD[..., D // 2 :]), -1)


@functools.cache
def choose_attention(backend: str) -> tuple[str, str]:
    """(what computes attention, a warning or ""). For varlen: torch's own FlashAttention-2, or, activated
    here, FlashAttention-3 where its package is installed, the GPU is sm_90 and it works. Nothing is
    downloaded."""
    if backend != "varlen" or capability()[0] != 9 or not importlib.util.find_spec("flash_attn_interface"):
        return backend + "-FA2" * (backend == "varlen"), ""
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
        check_varlen(torch.device("cuda", torch.cuda.current_device()))
    except Exception as error:  # whatever is wrong with somebody's build of it
        if torch.nn.attention.current_flash_attention_impl():
            torch.nn.attention.restore_flash_attention_impl()
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return "varlen-FA2", f"flash_attn_interface is installed, but cannot be used: {reason}"
    return "varlen-FA3", ""


def check_varlen(device: torch.device):
    """ValueError if varlen's attention, forward or backward, is not what plain torch computes: a package
    built for another torch may fail at its first call, or not fail and be wrong. Small, once a run."""
    bounds = torch.tensor([0, 90, 256], dtype=torch.int32, device=device)
    batch = Batch(torch.zeros(1, 256), None, bounds, max_doc_tokens=166)
    for head_dim, kv_heads in ((128, 2), (64, 1)):
        draw = torch.Generator().manual_seed(0)
        shapes = ((1, 256, heads, head_dim) for heads in (2, kv_heads, kv_heads, 2))
        *qkv, grad = (torch.randn(x, generator=draw).to(device, torch.bfloat16) for x in shapes)
        results = []
        for backend, dtype in (("varlen", torch.bfloat16), ("sdpa", torch.float32)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
            y = Documents(batch, backend).attend(*leaves, window=64, paired=False, scale=ATTN_SCALE)
            y.backward(grad.to(dtype))
            results.append([y.detach(), *(x.grad for x in leaves)])
        for name, found, wanted in zip(("output", "gradient of q", "of k", "of v"), *results):
            off = float((found - wanted).norm() / wanted.norm())
            if not off < 0.02:  # bfloat16 gives 0.002 to 0.005
                raise ValueError(f"its {name} is off by {off:.0%} for heads of {head_dim}")


class Documents:
    """Who may see whom, for one pass: query i sees key j of its document where 0 <= i - j <= window. With
    `paired`, every token stands twice in a sequence of 2T. Built once a pass, asked by every layer."""

    def __init__(self, batch: Batch, backend: str):
        self.cu_seqlens, self.max_doc_tokens, self.backend = batch.cu_seqlens, batch.max_doc_tokens, backend
        self.B, self.T = batch.inputs_BT.shape
        self.masks = {}
        if backend != "varlen":
            at = torch.arange(self.B * self.T, device=self.cu_seqlens.device, dtype=self.cu_seqlens.dtype)
            self.doc_BT = torch.searchsorted(self.cu_seqlens, at, right=True).view(self.B, self.T)

    def doc_ids(self, paired: bool) -> Tensor:
        return self.doc_BT.repeat_interleave(2, dim=1) if paired else self.doc_BT

    def band(self, window: int, paired: bool) -> tuple[int, Tensor]:
        """(block, bias): queries in blocks of `block` tokens see their own block of keys and the one before;
        bias is 0 or -inf, (B * blocks, 1, block, keys). One block, all of it, where that is no more work."""
        if (window, paired) not in self.masks:
            doc = self.doc_ids(paired)
            T = doc.shape[1]
            if T <= 2 * window or T % window:
                block, query, key = T, torch.arange(T), torch.arange(T)
                doc_q, doc_k = doc[:, None], doc[:, None]
            else:
                block, query, key = window, torch.arange(window) + window, torch.arange(2 * window)
                doc_q = doc.view(-1, T // window, window)
                doc_k = torch.cat((F.pad(doc_q, (0, 0, 1, 0), value=-1)[:, :-1], doc_q), -1)
            ago = (query[:, None] - key).to(doc.device)
            seen = (ago >= 0) & (ago <= window) & (doc_q[..., :, None] == doc_k[..., None, :])
            bias = torch.zeros(seen.shape, device=doc.device).masked_fill(~seen, -math.inf)
            self.masks[window, paired] = block, bias.flatten(0, 1).unsqueeze(1)
        return self.masks[window, paired]

    def query_blocks(self, window: int, paired: bool) -> list[tuple[slice, slice, Tensor]]:
        """The masks of cpu_kernels.Attention."""
        key = "blocks", window, paired
        if key not in self.masks:
            self.masks[key] = cpu_kernels.query_blocks(self.doc_ids(paired), window)
        return self.masks[key]

    def attend(
        self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int, paired: bool, scale: float
    ) -> Tensor:
        """Softmax attention. T is 2T here if paired."""
        gqa = k_BTHD.shape[2] != q_BTHD.shape[2]
        if self.backend == "varlen":
            from torch.nn.attention.varlen import varlen_attn

            times = 2 if paired else 1
            cu, longest = self.cu_seqlens * times, self.max_doc_tokens * times
            y = varlen_attn(
                *(x.flatten(0, 1) for x in (q_BTHD, k_BTHD, v_BTHD)),
                cu,
                cu,
                longest,
                longest,
                scale=scale,
                window_size=(window, 0),
                enable_gqa=gqa,
            )
            return y.view(q_BTHD.shape)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        if self.backend == "flex":
            return self.flex(q, k, v, window, paired, scale, gqa).transpose(1, 2)
        block, bias = self.band(window, paired)
        if q.shape[2] == block:
            y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=scale, enable_gqa=gqa)
            return y.transpose(1, 2)
        split = lambda x: x.unflatten(2, (-1, block)).transpose(1, 2)  # B, blocks, H, block, D
        with_last = lambda x: torch.cat((F.pad(x, (0,) * 6 + (1, 0))[:, :-1], x), 3)
        q, k, v = split(q), with_last(split(k)), with_last(split(v))
        y = F.scaled_dot_product_attention(
            *(x.flatten(0, 1) for x in (q, k, v)), bias.to(q.dtype), scale=scale, enable_gqa=gqa
        )
        return y.unflatten(0, (self.B, -1)).transpose(2, 3).flatten(1, 2)

    def flex(self, q, k, v, window, paired, scale, gqa):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        doc = self.doc_ids(paired)

        def seen(b, h, i, j):
            return (i >= j) & (i - j <= window) & (doc[b, i] == doc[b, j])

        key, T = (window, paired), q.shape[2]
        if key not in self.masks:
            self.masks[key] = create_block_mask(seen, self.B, None, T, T, q.device)
        return flex_attention(q, k, v, block_mask=self.masks[key], scale=scale, enable_gqa=gqa)


def weight(value: float) -> nn.Parameter:
    """A scalar that learns; these stay fp32 everywhere."""
    return nn.Parameter(torch.tensor(value))


def scaled(matrix: Tensor, factor: float) -> Tensor:
    """A factor on a branch's output, taken by its last matrix, which is smaller than what comes out of it."""
    return matrix if factor == 1 else matrix * factor


class Attention(nn.Module):
    """Causal self-attention within documents and a window; q and k normed, heads gated by their input."""

    def __init__(self, c: ModelConfig, plan: LayerPlan):
        super().__init__()
        self.plan, self.head_dim = plan, c.head_dim
        self.num_heads, self.num_kv_heads = c.num_heads, c.num_kv_heads
        self.q = nn.Parameter(torch.empty(c.num_heads * c.head_dim, c.width))
        self.k = nn.Parameter(torch.empty(c.num_kv_heads * c.head_dim, c.width))
        self.v = nn.Parameter(torch.empty(c.num_kv_heads * c.head_dim, c.width))
        self.o = nn.Parameter(torch.empty(c.width, c.num_heads * c.head_dim))
        self.a_in, self.a_out = weight(0.5), weight(1.0)
        gate = lambda heads: nn.Parameter(torch.zeros(heads, GATE_CHANNELS))
        self.attn_gate = gate(c.num_heads) if c.attn_gate else None
        self.value_gate = gate(c.num_kv_heads) if plan.value_embed else None

    def forward(self, x_BTC, value_BTC, docs: Documents, window: int, rotary: Rotary, out_scale: float):
        """x and the branch added to it."""
        B, T, _ = x_BTC.shape
        heads = (self.num_heads, self.num_kv_heads)
        w_qkv = torch.cat((self.q, self.k, self.v)) * self.a_in
        w_out = scaled(self.o, out_scale) * self.a_out
        if eager_cpu(x_BTC) and docs.backend == "sdpa":
            layout = cpu_kernels.Layout(*heads, self.plan.paired, self.plan.long_window)
            return cpu_kernels.Attention.apply(
                x_BTC,
                w_qkv,
                w_out,
                self.attn_gate,
                self.value_gate,
                value_BTC,
                rotary.turns(2 * T if self.plan.paired else T, x_BTC.dtype),
                docs.query_blocks(window, self.plan.paired),
                rotary.scale,
                layout,
            )
        n_BTC = norm(x_BTC)
        qkv = F.linear(n_BTC, w_qkv).view(B, T, -1, self.head_dim)
        qk, v = qkv.split((sum(heads), heads[1]), dim=2)  # slices would each zero and fill a whole gradient
        qk = norm(qk)
        gate_in = n_BTC[..., :GATE_CHANNELS]
        if value_BTC is not None:
            gate = 2 * torch.sigmoid(F.linear(gate_in, self.value_gate))
            v = v + gate.unsqueeze(-1) * value_BTC.view_as(v)
        if self.plan.long_window:
            qk = torch.cat((qk[:, :, : heads[0]], offset_keys(qk[:, :, heads[0] :])), dim=2)
        if self.plan.paired:
            if heads[0] == heads[1]:  # not taken apart and joined: a permutation fuses with what follows
                qk = pair_heads(qk, groups=2)
            else:
                qk = torch.cat([pair_heads(x) for x in qk.split(heads, dim=2)], dim=2)
            v, heads = pair_heads(v), (heads[0] // 2, heads[1] // 2)
        q, k = rotary(qk).split(heads, dim=2)
        y = docs.attend(q, k, v, window, self.plan.paired, rotary.scale)
        if self.plan.paired:
            y = y.view(B, T, 2, self.num_heads // 2, self.head_dim).flatten(2, 3)
        if self.attn_gate is not None:
            y = y * torch.sigmoid(F.linear(gate_in, self.attn_gate)).unsqueeze(-1)
        return x_BTC + F.linear(y.flatten(2), w_out)


def offset_keys(k_BTHD: Tensor) -> Tensor:
    """The half of each key that rotary leaves still, one position later: heads then find what came before."""
    turning, still = k_BTHD.chunk(2, dim=-1)
    return torch.cat((turning, torch.cat((still[:, :1], still[:, :-1]), dim=1)), dim=-1)


def pair_heads(x_BTHD: Tensor, groups: int = 1) -> Tensor:
    """Heads h and h + H/2 side by side along the sequence, positions 2t and 2t+1: (B, 2T, H/2, D); in each of
    as many equal groups of heads, if asked. The public record mixes the two by a view of the flat channels;
    this is the clean form of its idea."""
    B, T, H, D = x_BTHD.shape
    return x_BTHD.unflatten(2, (groups, 2, -1)).transpose(2, 3).reshape(B, 2 * T, H // 2, D)


class MLP(nn.Module):
    """W2 relu(W1 n)^2; both matrices stored (4C, C)."""

    def __init__(self, c: ModelConfig, kernels: bool):
        super().__init__()
        self.kernels = kernels
        self.up, self.down = (nn.Parameter(torch.empty(4 * c.width, c.width)) for _ in range(2))

    def forward(self, n_BTC: Tensor, out_scale: float) -> Tensor:
        if self.kernels:
            import triton_kernels

            return triton_kernels.mlp(n_BTC, self.up, scaled(self.down, out_scale))
        return SquaredReLU.apply(F.linear(n_BTC, self.up)) @ scaled(self.down, out_scale)


def grouped(x: Tensor) -> bool:
    """Whether experts' products are torch's grouped ones, which wait for nothing, or one an expert."""
    return x.is_cuda


def row_products(x_PK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """(P, N): each expert's group of rows times its matrix. ends_E: where the groups end, int32."""
    if grouped(x_PK):
        return F.grouped_mm(x_PK, w_EKN, offs=ends_E)  # rows after the last group are not written
    product = cpu_kernels.row_products if eager_cpu(x_PK) else cpu_kernels.compiled_row_products
    return product(x_PK, w_EKN, ends_E)


def group_products(x_PK: Tensor, y_PN: Tensor, ends_E: Tensor) -> Tensor:
    """(E, K, N): the sum over each expert's rows of x_p y_p^T, the gradient of its matrix."""
    if grouped(x_PK):
        return F.grouped_mm(x_PK.T, y_PN, offs=ends_E)
    product = cpu_kernels.group_products if eager_cpu(x_PK) else cpu_kernels.compiled_group_products
    return product(x_PK, y_PN, ends_E)


def sort_by_expert(experts_Mk: Tensor, counts_E: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the (token, expert) pairs stand as rows, an expert's together: (token of each row, M in padding;
    row of each pair; where groups end). Shapes do not depend on the routing and nothing waits for a device.
    multiple > 1: groups are filled up to it, empty ones too, and some rows follow the last group."""
    M, k = experts_Mk.shape
    flat = experts_Mk.flatten()
    order = flat.argsort(stable=True)
    if multiple == 1:
        ends = counts_E.cumsum(0)
        rows, num_rows = torch.arange(M * k, device=flat.device), M * k
    else:
        sizes = (counts_E + multiple - 1).clamp_min(multiple) // multiple * multiple
        ends, num_rows = sizes.cumsum(0), M * k + multiple * (len(counts_E) + 1)
        shift = (ends - sizes) - (counts_E.cumsum(0) - counts_E)  # of a group, by the padding before it
        rows = torch.arange(M * k, device=flat.device) + shift[flat[order]]
    token_P = torch.full((num_rows,), M, device=flat.device).scatter(0, rows, order // k)
    row_Mk = torch.empty_like(rows).scatter(0, order, rows).view(M, k)
    return token_P, row_Mk, ends.int()


class ExpertMLPs(torch.autograd.Function):
    """y_t = sum_j gate_tj W2_e relu(W1_e n_t)^2 with e = expert j of token t, every pair of them. up, down
    (E, F, C); token_P, row_Mk, ends_E as sort_by_expert gives them."""

    @staticmethod
    def take(x_MC, token_P, padded: bool):
        """Rows of x; zeros where token_P is M."""
        if not padded:
            return x_MC[token_P]
        M = x_MC.shape[0]
        return torch.where((token_P < M).unsqueeze(-1), x_MC[token_P.clamp(max=M - 1)], 0)

    @staticmethod
    def forward(ctx, n_MC, gates_Mk, up, down, token_P, row_Mk, ends_E):
        ctx.padded = len(token_P) != row_Mk.numel()
        x_PC = ExpertMLPs.take(n_MC, token_P, ctx.padded)
        positive_PF = row_products(x_PC, up.mT, ends_E).relu()
        hidden_PF = positive_PF * positive_PF
        y_PC = row_products(hidden_PF, down, ends_E)
        ctx.save_for_backward(x_PC, positive_PF, gates_Mk, up, down, token_P, row_Mk, ends_E)
        return (y_PC[row_Mk] * gates_Mk.unsqueeze(-1)).sum(1).to(n_MC.dtype)

    @staticmethod
    def backward(ctx, grad_MC):
        x_PC, positive_PF, gates_Mk, up, down, token_P, row_Mk, ends_E = ctx.saved_tensors
        grad_PC = ExpertMLPs.take(grad_MC, token_P, ctx.padded)
        gate_P = gates_Mk.new_zeros(len(token_P)).scatter(0, row_Mk.flatten(), gates_Mk.flatten())
        gate_P1 = gate_P.unsqueeze(-1)
        hidden_PF = positive_PF * positive_PF
        back_PF = row_products(grad_PC, down.mT, ends_E)  # hidden's gradient, but for the gate
        grad_gates = (back_PF * hidden_PF).sum(-1, dtype=gates_Mk.dtype)[row_Mk]
        grad_down = group_products((hidden_PF * gate_P1).to(grad_PC.dtype), grad_PC, ends_E)
        pre_PF = (back_PF * positive_PF * (2 * gate_P1)).to(grad_PC.dtype)
        grad_n = row_products(pre_PF, up, ends_E)[row_Mk].sum(1)
        return grad_n, grad_gates, group_products(pre_PF, x_PC, ends_E), grad_down, None, None, None


class Routing:
    """What one pass's routers are given, noise in training, and what each leaves here, in layers' order."""

    def __init__(self, noise_LBTE: Tensor | None = None):
        self.noise_LBTE = noise_LBTE
        self.balance = []  # E sum_i f_i P_i, summed over the slices; 1 a slice where the load is even
        self.loads_E = []  # tokens that went to each expert


class MixtureOfExperts(nn.Module):
    """In place of an MLP: each token goes to the k experts with the largest router logits, weighted by the
    softmax of these k logits (arXiv 1701.06538, 2401.04088). No expert has a limit, so no token is dropped.

    The balance loss (arXiv 2101.03961) is taken slice by slice: f_i is expert i's share of a slice's pairs,
    P_i the slice's mean router probability. Any number of ranks has the same slices, so all agree; over the
    global batch it would need an exchange within forward, and would let slices be uneven that even out."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.top_k = c.moe_top_k
        self.router = nn.Parameter(torch.empty(c.num_experts, c.width))  # fp32 everywhere
        self.up, self.down = (
            nn.Parameter(torch.empty(c.num_experts, c.expert_hidden, c.width)) for _ in range(2)
        )

    def forward(self, n_BTC: Tensor, out_scale: float, routing: Routing) -> Tensor:
        num_experts = len(self.router)
        logits_BTE = F.linear(n_BTC.type_as(self.router), self.router)
        if routing.noise_LBTE is not None:
            logits_BTE = logits_BTE + routing.noise_LBTE[len(routing.loads_E)]
        experts_BTk = logits_BTE.topk(self.top_k).indices
        chosen_BTkE = experts_BTk.unsqueeze(-1) == torch.arange(num_experts, device=n_BTC.device)
        # topk's own values would do, but torch 2.13's inductor loses their gradient beside the balance loss's
        gates_BTk = torch.where(chosen_BTkE, logits_BTE.unsqueeze(-2), 0).sum(-1).softmax(-1)
        load_BE = chosen_BTkE.sum((1, 2))
        share_BE = load_BE.type_as(logits_BTE) / (n_BTC.shape[1] * self.top_k)
        routing.balance.append(num_experts * (share_BE * logits_BTE.softmax(-1).mean(1)).sum())
        routing.loads_E.append(load_BE.sum(0))
        multiple = GROUP_MULTIPLE if grouped(n_BTC) else 1
        rows = sort_by_expert(experts_BTk.flatten(0, 1), routing.loads_E[-1], multiple)
        return ExpertMLPs.apply(
            n_BTC.flatten(0, 1), gates_BTk.flatten(0, 1), self.up, scaled(self.down, out_scale), *rows
        ).view_as(n_BTC)


class Block(nn.Module):
    """One layer: its input is mixed from the stream, the embedding and the n-gram embedding."""

    def __init__(self, c: ModelConfig, plan: LayerPlan, kernels: bool):
        super().__init__()
        self.attn = Attention(c, plan) if plan.attention else None
        self.mlp = MixtureOfExperts(c) if c.num_experts else MLP(c, kernels)
        self.l_res, self.l_x0 = weight(1.1), weight(0.0)
        self.l_ngram = weight(0.1) if c.ngram_rows else None

    def forward(self, x, x0, ngram, value, docs, window, rotary, residual_scale, routing):
        if eager_cpu(x):
            pairs = (self.l_res, x, self.l_x0, x0, self.l_ngram, ngram)
            x = cpu_kernels.Mix.apply(*(pairs if ngram is not None else pairs[:4]))
        else:
            x = self.l_res * x + self.l_x0 * x0
            x = x if ngram is None else x + self.l_ngram * ngram
        if self.attn is not None:
            x = self.attn(x, value, docs, window, rotary, residual_scale)
        if isinstance(self.mlp, MixtureOfExperts):
            return x + self.mlp(norm(x), residual_scale, routing)
        if eager_cpu(x):
            return cpu_kernels.MLP.apply(x, self.mlp.up, scaled(self.mlp.down, residual_scale))
        return x + self.mlp(norm(x), residual_scale)


class GPT(nn.Module):
    """The speedrun's GPT. Knows nothing of ranks or optimizers."""

    def __init__(
        self,
        c: ModelConfig,
        vocab_size: int,
        backend: str,
        float8_head: bool,
        residual_scale: float,
        kernels: bool = False,
        balance_weight: float = 0.0,
    ):
        super().__init__()
        self.config, self.plans, self.kernels = c, layer_plans(c), kernels
        self.backend, self.float8_head, self.residual_scale = backend, float8_head, residual_scale
        self.balance_weight = balance_weight
        if c.num_experts:  # tokens that validation sent to each expert of each layer; see take_expert_load
            load = torch.zeros(c.num_layers, c.num_experts, dtype=torch.int64)
            self.register_buffer("expert_load_LE", load, persistent=False)
        V = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.head = nn.Parameter(torch.empty(V, c.width))
        self.embed = nn.Parameter(torch.empty(V, c.width)) if c.untie_frac < 1 else None
        self.ngram = nn.Parameter(torch.empty(c.ngram_rows, c.width)) if c.ngram_rows else None
        self.value_embeds = nn.ParameterDict(
            {str(i): torch.empty(V, c.num_kv_heads * c.head_dim) for i in c.value_embed_layers}
        )
        if c.smear:
            self.smear_gate, self.l_smear = nn.Parameter(torch.zeros(GATE_CHANNELS)), weight(0.0)
        if c.skip:
            self.skip_gate, self.l_skip = nn.Parameter(torch.zeros(GATE_CHANNELS)), weight(-1.5)
        if c.backout is not None:
            self.l_back = weight(0.5)
        self.rotary = Rotary(c.head_dim)
        self.blocks = nn.ModuleList(Block(c, plan, kernels) for plan in self.plans)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator):
        """Everything that is drawn, from one stream in the order of the names; the other tables are zero."""
        for name, p in sorted(self.named_parameters()):
            if name == "head":
                p.normal_(0, 0.005, generator=generator)
            elif name.endswith((".q", ".k", ".v", ".o", ".up")):
                bound = math.sqrt(3) * INIT_GAIN * self.config.width**-0.5
                p.uniform_(-bound, bound, generator=generator)
            elif name.endswith(".router"):
                p.normal_(0, ROUTER_STD, generator=generator)
            elif p.ndim >= 2:
                p.zero_()
        if self.embed is not None:
            self.embed.copy_(self.head)

    def ngram_rows(self, tokens_BT: Tensor) -> list[Tensor]:
        """For each length of n-grams the hash embedding's row at each token, or the last row where too few
        precede it. Several lengths in one table are an idea of arXiv 2412.09871; the record has bigrams."""
        rows, found = self.ngram.shape[0] - 1, []
        for length in self.config.ngrams:
            last = length - 1
            hashed = HASH_MULTIPLIERS[0] * tokens_BT[:, last:]
            for back in range(1, length):
                hashed = hashed ^ (HASH_MULTIPLIERS[back] * tokens_BT[:, last - back : -back])
            found.append(F.pad(hashed % rows, (last, 0), value=rows)[:, : tokens_BT.shape[1]])
        return found

    def embed_tokens(self, tokens_BT: Tensor, tied: bool) -> Tensor:
        x = F.embedding(tokens_BT, self.head if tied else self.embed)
        if self.config.smear:
            gate = self.l_smear * torch.sigmoid(x[:, 1:, :GATE_CHANNELS] @ self.smear_gate.to(x.dtype))
            x = torch.cat((x[:, :1], x[:, 1:] + gate.to(x.dtype).unsqueeze(-1) * x[:, :-1]), dim=1)
        return norm(x)

    def trunk(
        self,
        tokens_BT: Tensor,
        docs: Documents,
        windows: tuple[int, int],
        tied: bool,
        routing: Routing | None = None,
    ) -> Tensor:
        """Everything between tokens and head. windows: (short, long) in tokens."""
        c, routing = self.config, routing or Routing()
        x = x0 = self.embed_tokens(tokens_BT, tied)
        ngram = None
        if self.ngram is not None:  # sparse: backward adds its rows to the gradient, not a whole table
            ngram = functools.reduce(
                torch.add,
                (
                    F.embedding(rows_BT, self.ngram, sparse=eager_cpu(x))
                    for rows_BT in self.ngram_rows(tokens_BT)
                ),
            )
        kept = {}
        for i, (block, plan) in enumerate(zip(self.blocks, self.plans)):
            if c.skip and i == c.skip[1]:
                gate = 2 * torch.sigmoid(x0[..., :GATE_CHANNELS] @ self.skip_gate.to(x.dtype)).unsqueeze(-1)
                x = x + torch.sigmoid(self.l_skip) * gate * kept[c.skip[0]]
            value = F.embedding(tokens_BT, self.value_embeds[str(i)]) if plan.value_embed else None
            x = block(
                x,
                x0,
                ngram,
                value,
                docs,
                windows[plan.long_window],
                self.rotary,
                self.residual_scale,
                routing,
            )
            kept[i] = x if i == c.backout or c.skip and i == c.skip[0] else None
        if c.backout is not None:
            x = x - self.l_back * kept[c.backout]
        return norm(x)

    def forward(
        self,
        batch: Batch,
        windows: tuple[int, int],
        weights_K: Tensor | None,
        tied: bool,
        noise_LBTE: Tensor | None = None,
    ):
        """One pass; sums over tokens, in nats. Training: (loss, cross-entropy), where the loss counts the
        tokens after the next too, weighted, and the experts' balance. Evaluation (weights_K None):
        (cross-entropy, right guesses). noise_LBTE is added to the router logits."""
        docs, routing = Documents(batch, self.backend), Routing(noise_LBTE)
        x = self.trunk(batch.inputs_BT, docs, windows, tied, routing)
        if weights_K is None:
            if routing.loads_E:
                self.expert_load_LE += torch.stack(routing.loads_E)
            return self.score(x.flatten(0, 1), batch.targets_BT.flatten())
        loss, cross_entropy = self.train_loss(x, batch.targets_BT, weights_K)
        if routing.balance:  # as much as one nat a token of loss would be
            loss = loss + self.balance_weight * batch.inputs_BT.shape[1] * torch.stack(routing.balance).sum()
        return loss, cross_entropy

    def train_loss(self, x_BTC: Tensor, targets_BT: Tensor, weights_K: Tensor) -> tuple[Tensor, Tensor]:
        """(loss on the next tokens, weighted; cross-entropy of the next one, detached), sums."""
        x, (B, T) = x_BTC, targets_BT.shape
        if self.kernels:
            import triton_kernels

            scales = (HEAD_X_SCALE, HEAD_W_SCALE, HEAD_GRAD_SCALE) if self.float8_head else None
            return triton_kernels.head_loss(
                x.flatten(0, 1), self.head, targets_BT, weights_K, SOFTCAP, scales
            )
        if self.float8_head:
            logits = Float8Head.apply(x.flatten(0, 1), self.head).view(B, T, -1)
        else:
            logits = F.linear(x, self.head)
        logits = softcap(logits)
        return multi_token_loss(logits, logits.logsumexp(-1), targets_BT, weights_K)

    def take_expert_load(self, ranks: Ranks) -> Tensor:
        """Tokens that went to each expert of each layer, (L, E), in all ranks' evaluations since it was
        last taken. A collective."""
        load = self.expert_load_LE.clone()
        self.expert_load_LE.zero_()
        ranks.all_reduce(load).wait()
        return load

    def score(self, x_MC: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy, right guesses), sums. In pieces: a slice of validation is longer than a pass of
        training, and the logits of all of it (262,144 x 50,304) would not fit beside each other."""
        loss, right = 0, 0
        for x, targets in zip(x_MC.split(PASS_TOKENS), targets_M.split(PASS_TOKENS)):
            logits = softcap(F.linear(x, self.head))
            picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            loss = loss + (logits.logsumexp(-1) - picked).sum()
            right = right + (logits.argmax(-1) == targets).sum()
        return loss, right


def softcap(logits: Tensor) -> Tensor:
    gain, shift, width = SOFTCAP
    return gain * torch.sigmoid((logits.float() + shift) / width)


def multi_token_loss(logits_BTV: Tensor, lse_BT: Tensor, targets_BT: Tensor, weights_K: Tensor):
    """(sum_k w_k CE(logits_t, target_{t+k}), the plain CE detached), sums over the tokens that have such a
    target in their slice; documents may be crossed (arXiv 2404.19737, with one head)."""
    T = targets_BT.shape[1]
    losses = []
    for k in range(len(weights_K)):
        picked = logits_BTV[:, : T - k].gather(-1, targets_BT[:, k:].unsqueeze(-1)).squeeze(-1)
        losses.append((lse_BT[:, : T - k] - picked).sum())
    return (weights_K * torch.stack(losses)).sum(), losses[0].detach()


def build_model(s: Settings, config: ModelConfig, vocab_size: int, device: torch.device) -> GPT:
    """A freshly initialised model; on CUDA matrices and tables are bfloat16, scalars and routers fp32."""
    model = GPT(
        config,
        vocab_size,
        s.attn_backend,
        not s.disable_fp8,
        s.residual_scale,
        kernels=s.kernels == "triton",
        balance_weight=s.moe_balance_weight,
    )
    seed = np.random.SeedSequence([s.seed, 0]).generate_state(1, np.uint64)[0]
    model.init_weights(torch.Generator().manual_seed(int(seed) >> 1))
    model.to(device)
    if device.type == "cuda":
        for name, p in model.named_parameters():
            p.data = p.data.bfloat16() if p.ndim >= 2 and not name.endswith(".router") else p.data
    stage_slices = [t // NUM_SLICES for t in s.batch_sizes]
    longest = max(*stage_slices, s.val_batch_tokens // NUM_SLICES)
    model.rotary.make_tables(longest * (2 if config.paired_layers else 1))
    return model


# >>> optimizer
# ---------------------------------------------------------------------------------------------------
# Optimizer: NorMuon with orthogonal-radial decomposition (ORD) for matrices, Adam for the rest, both sharded
# N matrices of R rows and K columns (as stored); momentum, second moments and masters are fp32
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer's settings."""

    optimizer: str = knob(
        "normuon",
        "for matrices: normuon, muon (no variance reduction) or adamw",
        choices=("normuon", "muon", "adamw"),
    )
    muon_lr: float = knob(0.023, "Muon's learning rate, for a matrix times sqrt(max(1, rows/columns))", low=0)
    muon_momentum: float = knob(0.95, "momentum after its warm-up from 0.85", low=0, high=0.9999)
    beta_warmup_steps: int = knob(300, "steps of that warm-up", low=0)
    muon_weight_decay: float = knob(1.2, "decay of matrices; cautious: times learning rate, else as it is")
    muon_decay_mode: str = knob(
        "cautious",
        "what decays: weights where the update shrinks them, nothing, all weights, the update, or both",
        choices=("cautious", "none", "param", "update", "both"),
    )
    adam_lr: float = knob(0.008, "base learning rate of everything but the matrices", low=0)
    router_lr: float = knob(0.001, "learning rate of the experts' routers, in ADAM_LR's place", low=0)
    adam_weight_decay: float = knob(0.005, "their cautious decay, times learning rate and role", low=0)
    adam_matrix_lr: float = knob(5e-4, "learning rate of matrices under OPTIMIZER=adamw", low=0)
    adam_matrix_decay: float = knob(0.1, "their decoupled weight decay under OPTIMIZER=adamw", low=0)
    ord_mode: str = knob(
        "interpolate",
        "interpolate: P(G - a G_par) + a G_par; project: P(G_perp) + "
        "a G_par; post: scale the radial part of P(G); off: P(G)",
        choices=("interpolate", "project", "post", "off"),
    )
    spectral_lr_mul: float = knob(0.1, "a, the strength of the radial part G_par in the update")
    spectral_lr_mul_attn: float = knob(None, "a of attention's matrices; empty: SPECTRAL_LR_MUL")
    spectral_lr_mul_mlp: float = knob(None, "a of the MLP's matrices; empty: SPECTRAL_LR_MUL")
    spectral_proj_eps: float = knob(1e-8, "added to ||W||^2 in rho", above=0)
    spectral_rho_mode: str = knob("global", "one rho a matrix, row or col", choices=("global", "row", "col"))
    spectral_scale: str = knob(
        "raw",
        "raw: a G_par as it is, linear in the gradient's size; unit: G_par times ||P|| / ||G_perp||",
        choices=("raw", "unit"),
    )
    spectral_schedule: str = knob(
        "constant",
        "adaptive: a times |rho| / its mean of steps 10-50, at most a",
        choices=("constant", "adaptive"),
    )
    spectral_variance: bool = knob(False, "divide G_par by the root of its running mean square")
    spectral_out: float = knob(1.0, "ORD_MODE=post: factor on a radial part that points outward")
    spectral_in: float = knob(1.0, "ORD_MODE=post: factor on a radial part that points inward")
    spectral_rescale: bool = knob(False, "ORD_MODE=post: give W exactly the norm its radial part asks for")
    grad_clip: float = knob(0.0, "largest norm of the mean loss's gradient in a step; 0: no clipping", low=0)


# 0.1 costs 0.025 and 0.011 nats there: records/2026-11-25_spectral_fine_tiny and ..._spectral_medium_tiny
for preset in ("tiny", "tiny-wide"):
    PRESETS[preset][1]["spectral_lr_mul"] = 0.01


def check_optimizer_settings(o: OptimizerSettings):
    if o.muon_decay_mode in ("param", "update", "both") and abs(o.muon_weight_decay) > 1:
        raise SettingsError(
            f"MUON_WEIGHT_DECAY={o.muon_weight_decay:g}, but MUON_DECAY_MODE="
            f"{o.muon_decay_mode} takes it as it is (the default is for cautious); set it "
            "between -1 and 1"
        )
    if o.spectral_variance and o.spectral_scale == "unit":
        raise SettingsError("SPECTRAL_VARIANCE=1 replaces SPECTRAL_SCALE=unit; set one of them")
    if o.optimizer == "adamw" and o.ord_mode != "off":
        raise SettingsError(f"ORD_MODE={o.ord_mode} is for Muon; with OPTIMIZER=adamw set ORD_MODE=off")
    fields = {f.name: f for f in dataclasses.fields(o)}
    for name in ("out", "in", "rescale", "scale", "schedule", "variance"):
        name, modes = (
            f"spectral_{name}",
            (("post",) if name in ("out", "in", "rescale") else ("interpolate", "project")),
        )
        if getattr(o, name) != fields[name].default and o.ord_mode not in modes:
            raise SettingsError(
                f"{name.upper()}={getattr(o, name)} does nothing with ORD_MODE={o.ord_mode}; "
                f"it is for {' and '.join(modes)}"
            )


@dataclass(frozen=True)
class Role:
    """How the parameters whose names match are updated. lr and decay multiply the settings'; base names the
    setting that lr multiplies."""

    name: str
    pattern: str
    rule: str = "adam"
    lr: float = 1.0
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    base: str = "adam_lr"


ROLES = (  # complete and disjoint: every parameter matches exactly one
    Role("matrices", r"blocks\.\d+\.(attn\.[qkvo]|mlp\.(up|down))", rule="matrix", betas=(0.9, 0.95)),
    Role("scalars", r"l_(smear|skip|back)|blocks\.\d+\.(l_res|l_ngram|attn\.a_in|attn\.a_out)", lr=5),
    Role("x0", r"blocks\.\d+\.l_x0", lr=5, betas=(0.65, 0.95)),
    Role("tables", r"ngram|value_embeds\.\d+", lr=75, decay=5, betas=(0.75, 0.95)),
    Role("smear gate", r"smear_gate", lr=0.01),
    Role("skip gate", r"skip_gate", lr=0.05),
    Role("gates", r"blocks\.\d+\.attn\.(attn|value)_gate", decay=1),
    Role("routers", r"blocks\.\d+\.mlp\.router", base="router_lr"),
    Role("head", r"head|embed", decay=150, betas=(0.5, 0.95)),
)

ADAM_EVERY = 2  # two steps' gradients add up before Adam moves
ADAM_EPS = 1e-10
SMALL = 2**16  # parameters of fewer numbers are all-reduced together and updated on every rank;
# but ranks that share memory share all work
MUON_BETA2 = 0.95  # of NorMuon's second moment
MUON_START_MOMENTUM, MUON_END_STEPS = 0.85, 50
DOWN_LR = 2.0  # on the MLP's second matrix
POLAR_SAFETY, POLAR_EPS = 1.02, 1e-6

# Odd quintics that bring all singular values near 1: Polar Express (arXiv 2505.16932), 5 steps
POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G_NRK: Tensor) -> Tensor:
    """The polar factor U V^T of each matrix, approximately; in bfloat16 on CUDA, fp32 elsewhere."""
    tall = G_NRK.size(-2) > G_NRK.size(-1)
    flipped = tall and G_NRK.is_cuda  # a CPU pays for transposed copies, so there tall ones are left standing
    right = tall and not flipped  # and multiplied from the right, by polynomials in X^T X
    X = G_NRK.mT if flipped else G_NRK
    X = X / (POLAR_SAFETY * X.norm(dim=(-2, -1), keepdim=True) + POLAR_EPS)
    X = X.bfloat16() if X.is_cuda else X
    gram = (lambda X: X.mT @ X) if right else (lambda X: X @ X.mT)
    if not X.is_cuda and max(X.shape[-2:]) >= 2 * min(X.shape[-2:]):
        Q = gram_polynomial(gram(X))
        return X @ Q.mT if right else Q @ X
    for a, b, c in POLAR_COEFFICIENTS:
        A = gram(X)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if right else torch.baddbmm(X, B, X, beta=a)
    return (X.mT if flipped else X).float()


def gram_polynomial(S_NRR: Tensor) -> Tensor:
    """Q such that the steps take X to Q X for S = X X^T, X to X Q^T for S = X^T X: each step multiplies X by
    a polynomial in S, so a long X is touched twice in all, not in every step. S has the squares of the
    singular values, hence fp32. All its polynomials commute but for rounding, which Q's order keeps small."""
    P = Q = None
    for a, b, c in POLAR_COEFFICIENTS:
        if P is not None:
            S_NRR = P @ S_NRR @ P
        P = torch.baddbmm(S_NRR, S_NRR, S_NRR, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
    return Q


def polar_steps(X_NRK: Tensor) -> Tensor:
    """polar_express on a GPU, of matrices brought to norm 1 already, in bfloat16: both of a step's symmetric
    products cost half. A tall matrix is multiplied from the right and never turned."""
    import triton_kernels

    tall = X_NRK.size(-2) > X_NRK.size(-1)
    for a, b, c in POLAR_COEFFICIENTS:
        A = triton_kernels.gram(X_NRK.mT if tall else X_NRK)
        B = triton_kernels.gram_polynomial(A, b, c)
        X_NRK = torch.baddbmm(X_NRK, X_NRK, B, beta=a) if tall else torch.baddbmm(X_NRK, B, X_NRK, beta=a)
    return X_NRK


def nesterov(grad: Tensor, momentum: Tensor, mu: Tensor) -> Tensor:
    """Updates momentum in place; the gradient averaged with it, once more."""
    grad = grad.float()
    momentum.lerp_(grad, 1 - mu)
    return grad.lerp(momentum, mu)


def reduce_variance(U_NRK: Tensor, second_moment: Tensor) -> Tensor:
    """NorMuon (arXiv 2510.05491): rows (of a wide matrix, columns) divided by the root of their running mean
    square, then each matrix brought back to its Frobenius norm. second_moment is updated in place."""
    tall = U_NRK.size(-2) >= U_NRK.size(-1)
    dim = -1 if tall else -2
    mean_square = torch.linalg.vector_norm(U_NRK, dim=dim, keepdim=True).square() / U_NRK.size(dim)
    second_moment.lerp_(mean_square, 1 - MUON_BETA2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before = mean_square.sum((-2, -1), keepdim=True)
    after = (mean_square * scale.square()).sum((-2, -1), keepdim=True)
    return U_NRK * (scale * (before / after.clamp_min(1e-30)).sqrt())


def orthogonalize(G_NRK: Tensor, second_moment: Tensor | None) -> Tensor:
    """P of the formulas: polar factor, and NorMuon's variance reduction if it has a second moment."""
    U = polar_express(G_NRK)
    return U if second_moment is None else reduce_variance(U, second_moment)


def with_decay(U: Tensor, W: Tensor, decay: Tensor, mode: str) -> Tensor:
    """The update with its decay. Cautious: only where the update shrinks the weight (arXiv 2411.16085)."""
    if mode == "none":
        return U
    if mode == "cautious":
        return torch.addcmul(U, (U * W).ge_(0).mul_(W), decay)
    return U + decay * {"param": W, "update": U, "both": W + U}[mode]


def adam_update(grad: Tensor, m: Tensor, v: Tensor, count: Tensor, beta1: Tensor, beta2: Tensor) -> Tensor:
    """Bias-corrected Adam direction (arXiv 1412.6980); m, v are updated in place, count is its number."""
    grad = grad.float()
    m.lerp_(grad, 1 - beta1)
    v.lerp_(grad.square(), 1 - beta2)
    root = (v / (1 - beta2**count)).sqrt_().add_(ADAM_EPS)
    return (m / (1 - beta1**count)).div_(root)


def read_master(weight: Tensor, mantissa: Tensor | None) -> Tensor:
    """The fp32 master, to be changed and written back: weight itself, or a bfloat16 weight (high half) and an
    int16 mantissa (low half)."""
    if mantissa is None:
        return weight
    return ((weight.view(torch.int16).int() << 16) | (mantissa.int() & 0xFFFF)).view(torch.float32)


def write_master(weight: Tensor, mantissa: Tensor | None, value: Tensor):
    if mantissa is None:
        weight.copy_(value)
    else:
        bits = value.view(torch.int32)
        mantissa.copy_(bits.short())
        weight.view(torch.int16).copy_((bits >> 16).short())


RHO_DIMS = {"global": (-2, -1), "row": (-1,), "col": (-2,)}
RHO_START, RHO_END = 10, 50  # steps over which the adaptive schedule takes its reference
RESCALE_FLOOR = 0.25  # half of INIT_GAIN: a matrix of a smaller root mean square must grow first
MAX_SHRINK = 0.999  # of a norm in one step
ORD_STATS = ("rho", "cos_gw", "cos_uw", "w_norm", "u_over_w", "radial_over_p")


def inner(x: Tensor, y: Tensor, dims=(-2, -1)) -> Tensor:
    if eager_cpu(x) and dims == (-2, -1):  # in one pass
        return torch.linalg.vecdot(x.flatten(-2), y.flatten(-2))[..., None, None]
    return (x * y).sum(dims, keepdim=True)


def safe_ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, 0 where y is 0."""
    return torch.where(y == 0, 0.0, x / torch.where(y == 0, 1.0, y))


def radial_strength(rho, a_N11: Tensor, rho_0: Tensor, settled: Tensor, o: OptimizerSettings) -> Tensor:
    """a, or adaptively a clip(|rho| / rho_0, 0, 1) once rho_0, the mean |rho| of steps 10-50, is settled."""
    if o.spectral_schedule == "constant":
        return a_N11
    ratio = rho.abs().mean((-2, -1), keepdim=True) / rho_0.clamp_min(1e-30)
    return a_N11 * torch.where((settled > 0) & (rho_0 > 0), ratio.clamp(0, 1), 1.0)


def radial_factor(G, W, rho, P, radial_moment, o: OptimizerSettings) -> Tensor:
    """What times W is G_par in the unit that SPECTRAL_SCALE and SPECTRAL_VARIANCE ask for; raw: rho."""
    if o.spectral_variance:
        par = rho * W
        mean_square = par.square().mean(-1 if par.size(-2) >= par.size(-1) else -2, keepdim=True)
        radial_moment.lerp_(mean_square, 1 - MUON_BETA2)
        return safe_ratio(rho, radial_moment.sqrt())
    if o.spectral_scale == "unit":
        perp = torch.addcmul(G, rho, W, value=-1)
        return rho * safe_ratio(inner(P, P).sqrt(), inner(perp, perp).sqrt())
    return rho


def ord_update(G, W, a, rho, second_moment, radial_moment, o: OptimizerSettings):
    """(P, f, norm factor a unit of lr): the update is P + f W.

    interpolate  P(G - a G_par) + a G_par                        a = 0 is NorMuon to the last bit
    project      P(G_perp) + a G_par                             a = 0 moves along the sphere, at first order
    post         P(G) - r W + s r W, r = <P(G), W> / ||W||^2     s = SPECTRAL_OUT where r < 0 (outward), else
                 SPECTRAL_IN; below the floor s = 1, so that a matrix that starts at zero can grow
    """
    if o.ord_mode == "off":
        return orthogonalize(G, second_moment), 0.0, 0.0
    dims = RHO_DIMS[o.spectral_rho_mode]
    if o.ord_mode == "post":
        P = orthogonalize(G, second_moment)
        r = safe_ratio(inner(P, W, dims), inner(W, W, dims))
        s = torch.where(r < 0, o.spectral_out, o.spectral_in)
        s = torch.where(inner(W, W, dims) > floor_square(W, dims), s, 1.0)
        return P, (s - 1) * r, s * r
    taken = rho if o.ord_mode == "project" else a * rho
    P = orthogonalize(torch.addcmul(G, taken, W, value=-1), second_moment)
    return P, a * radial_factor(G, W, rho, P, radial_moment, o), 0.0


def floor_square(W: Tensor, dims) -> float:
    """The square norm under which post leaves the radial part alone."""
    return RESCALE_FLOOR**2 / W.size(-1) * math.prod([W.size(d) for d in dims])


def rescaled(new: Tensor, W: Tensor, shrink: Tensor, dims) -> Tensor:
    """new with the norm ||W|| (1 - shrink), unless W is under the floor."""
    before = inner(W, W, dims)
    norm_wanted = before.sqrt() * (1 - shrink.clamp(max=MAX_SHRINK))
    factor = safe_ratio(norm_wanted, inner(new, new, dims).sqrt())
    return new * torch.where(before > floor_square(W, dims), factor, 1.0)


def ord_stats(G, W, U, radial, P, rho) -> Tensor:
    """ORD_STATS of each matrix, (N, 6)."""
    size = lambda x: inner(x, x).sqrt()
    values = (
        rho.mean((-2, -1), keepdim=True),
        safe_ratio(inner(G, W), size(G) * size(W)),
        safe_ratio(inner(U, W), size(U) * size(W)),
        size(W),
        safe_ratio(size(U), size(W)),
        safe_ratio(size(radial), size(P)),
    )
    return torch.cat(values, dim=-1).squeeze(1)


def step_muon(
    weight,
    mantissa,
    grad,
    momentum,
    second_moment,
    radial_moment,
    lr_N11,
    decay,
    mu,
    a_N11,
    rho_0,
    settled,
    o: OptimizerSettings,
    measure: bool,
):
    """One Muon + ORD step on a shard of matrices, in place; returns mean |rho| and, if asked, ORD_STATS."""
    W = read_master(weight, mantissa)
    G = nesterov(grad, momentum, mu)
    dims = RHO_DIMS[o.spectral_rho_mode]
    rho = inner(G, W, dims) / (inner(W, W, dims) + o.spectral_proj_eps)
    a = radial_strength(rho, a_N11, rho_0, settled, o)
    P, factor, shrink = ord_update(G, W, a, rho, second_moment, radial_moment, o)
    U = P if o.ord_mode == "off" else torch.addcmul(P, factor, W)
    stats = ord_stats(G, W, U, factor * W, P, rho) if measure else None
    if o.spectral_rescale:
        new = rescaled(torch.addcmul(W, U, lr_N11, value=-1), W, lr_N11 * shrink, dims)
        new = new - lr_N11 * (with_decay(U, new, decay, o.muon_decay_mode) - U)
    else:
        new = W.addcmul_(with_decay(U, W, decay, o.muon_decay_mode), lr_N11, value=-1)
    write_master(weight, mantissa, new)
    return rho.abs().mean((-2, -1), keepdim=True), stats


def fused_covers(o: OptimizerSettings) -> bool:
    """Whether step_muon_fused knows these settings; it wants one number a matrix for the radial part."""
    return o.ord_mode != "post" and o.spectral_rho_mode == "global" and not o.spectral_variance


def per_matrix(sums_N3: Tensor):
    return (x.view(-1, 1, 1) for x in sums_N3.unbind(-1))


def radial_part(sums_N3, a_N11, rho_0, settled, o: OptimizerSettings):
    """From <G, G>, <G, W>, <W, W> of each matrix, all (N, 1, 1): rho, how much W the input of P loses, how
    much the update gains, and the norms of P's input and of G_perp."""
    GG, GW, WW = per_matrix(sums_N3)
    rho = GW / (WW + o.spectral_proj_eps)
    a_rho = 0 * rho if o.ord_mode == "off" else radial_strength(rho, a_N11, rho_0, settled, o) * rho
    lost = rho if o.ord_mode == "project" else a_rho
    norm_without = lambda part: (GG - 2 * part * GW + part.square() * WW).clamp_min(0).sqrt()
    return rho, lost, a_rho, norm_without(lost), norm_without(rho)


def fused_stats(sums_N3, applied_N3, rho, gained) -> Tensor:
    """ord_stats from the sums that the kernels leave."""
    (GG, GW, WW), (UW, UU, PP) = per_matrix(sums_N3), per_matrix(applied_N3)
    G_norm, W_norm, U_norm = GG.sqrt(), WW.sqrt(), UU.sqrt()
    values = (
        rho,
        safe_ratio(GW, G_norm * W_norm),
        safe_ratio(UW, U_norm * W_norm),
        W_norm,
        safe_ratio(U_norm, W_norm),
        safe_ratio(gained.abs() * W_norm, PP.sqrt()),
    )
    return torch.cat(values, dim=-1).squeeze(1)


def step_muon_fused(
    weight,
    mantissa,
    grad,
    momentum,
    second_moment,
    radial_moment,
    lr_N11,
    decay,
    mu,
    a_N11,
    rho_0,
    settled,
    o: OptimizerSettings,
    measure: bool,
    radial_part=radial_part,
):
    """step_muon on a GPU, where fused_covers: the radial part is a number times W, so ORD costs two reads of
    W, one for the sums that give rho, one where P's input loses it. radial_part: perhaps compiled."""
    import triton_kernels

    state, mu = (grad, momentum, weight, mantissa), float(mu)
    sums = triton_kernels.momentum_sums(*state, mu, ord=True)
    rho, lost, gained, norm, perp_norm = radial_part(sums, a_N11, rho_0, settled, o)
    scale = 1 / (POLAR_SAFETY * norm + POLAR_EPS)
    U = polar_steps(triton_kernels.polar_input(*state, lost.flatten(), scale.flatten(), mu))
    scales = None
    if second_moment is not None:
        scales, squares = triton_kernels.row_scales(U, second_moment, MUON_BETA2)
    if o.spectral_scale == "unit":  # variance reduction keeps the norm of U
        squares = inner(U.float(), U.float()) if second_moment is None else squares.view(-1, 1, 1)
        gained = gained * safe_ratio(squares.sqrt(), perp_norm)
    applied = triton_kernels.apply_update(
        weight,
        mantissa,
        U,
        scales,
        gained.flatten(),
        lr_N11.flatten(),
        float(decay),
        o.muon_decay_mode,
        measure,
    )
    return rho.abs(), fused_stats(sums, applied, rho, gained) if measure else None


def step_adam(weight, mantissa, grad, m, v, count, lr, decay, beta1, beta2, mode: str):
    """One Adam step on a shard, in place; lr, decay and betas 0-d, or one for each number."""
    W = read_master(weight, mantissa)
    if eager_cpu(W) and lr.ndim == 0 and mode == "cautious":
        cpu_kernels.step_adam(W, grad.float(), m, v, count, lr, decay, beta1, beta2, ADAM_EPS)
    else:
        U = adam_update(grad, m, v, count, beta1, beta2)
        W.addcmul_(with_decay(U, W, decay, mode), lr, value=-1)
    write_master(weight, mantissa, W)


class Bucket:
    """Parameters in one flat buffer, which they and their gradients are views of. If sharded, it is padded
    so that every rank owns an equal part: gradients arrive by reduce(), new weights leave by gather(). Ranks
    that share memory share the weights: who has everyone's gradients knows that nobody still needs those."""

    missing = 0  # gradients that this step's reduction still waits for

    def __init__(self, params: dict[str, nn.Parameter], ranks: Ranks, unit: int, every: int):
        """unit: numbers that must stay on one rank, a matrix's for matrices. every: steps an update."""
        self.params, self.ranks, self.active, self.work, self.every = params, ranks, True, Done(), every
        like = next(iter(params.values()))
        self.size = sum(p.numel() for p in params.values())
        self.sharded = len(params) == 1 and self.size >= SMALL or unit > 1 or ranks.pipes is not None
        multiple = unit * ranks.world_size if self.sharded else 1
        padded = -(-self.size // multiple) * multiple
        zeros = ranks.zeros if self.sharded else lambda numel, like, common=False: like.new_zeros(numel)
        self.weights, self.grads = zeros(padded, like, common=True), zeros(padded, like)
        at = 0
        for p in params.values():
            here = slice(at, at := at + p.numel())
            self.weights[here] = p.data.flatten()
            p.data, p.grad = self.weights[here].view(p.shape), self.grads[here].view(p.shape)
        self.mine, self.grad = self.part(self.weights), self.part(self.grads)
        self.mantissa = torch.zeros_like(self.mine, dtype=torch.int16) if like.dtype.itemsize == 2 else None

    def part(self, full: Tensor) -> Tensor:
        """What this rank updates."""
        return self.ranks.shard(full) if self.sharded else full

    def reduce(self):
        self.work = (self.ranks.reduce_scatter if self.sharded else self.ranks.all_reduce)(self.grads)

    def square_norm(self) -> Tensor:
        """Of this rank's part of the reduced gradient; what all ranks hold counts on the first alone."""
        self.work.wait()
        counts = self.sharded or self.ranks.rank == 0
        return self.grad.float().square().sum() * float(counts)

    def gather(self):
        self.work = self.ranks.all_gather(self.weights) if self.sharded else Done()

    def finish(self):
        """The new weights are here. Only now has every rank read these gradients."""
        self.work.wait()
        self.grads.zero_()

    def state(self) -> dict[str, Tensor]:
        """This rank's part of all that the next updates depend on, beside weights and count."""
        raise NotImplementedError

    def parts(self, numel: int) -> list[int]:
        """How many of a state's numbers belong to each parameter, in order; the padding's come last."""
        sizes = [p.numel() * numel // len(self.weights) for p in self.params.values()]
        return [*sizes, numel - sum(sizes)]

    def export(self) -> dict[str, dict[str, Tensor]]:
        """{parameter: {state: all of it, flat, on the CPU}}, fp32 masters among them, whatever the number of
        ranks. A collective; only rank 0 gets something."""
        self.work.wait()
        out = {name: {} for name in self.params}
        for key, mine in {"master": read_master(self.mine, self.mantissa), **self.state()}.items():
            whole = self.ranks.whole(mine.flatten()) if self.sharded else mine.flatten()
            if self.ranks.rank == 0:
                for name, part in zip(self.params, whole.split(self.parts(len(whole)))):
                    out[name][key] = part.to("cpu", copy=True)
        return out

    def check(self, saved: dict[str, dict[str, Tensor]]):
        """ValueError if these states of a checkpoint cannot be restored."""
        for key, mine in {"master": self.mine, **self.state()}.items():
            for name, wanted in zip(self.params, self.parts(self.whole_numel(mine))):
                found = saved[name].get(key)
                if not isinstance(found, Tensor) or found.dtype != torch.float32 or found.numel() != wanted:
                    raise ValueError(f"the checkpoint has no {key} of {wanted} fp32 numbers for {name}")

    def whole_numel(self, mine: Tensor) -> int:
        return mine.numel() * (self.ranks.world_size if self.sharded else 1)

    def restore(self, saved: dict[str, dict[str, Tensor]] | None):
        """export's inverse; `saved` on rank 0, which gives the others theirs."""
        for key, mine in {"master": self.mine, **self.state()}.items():
            whole = torch.zeros(self.whole_numel(mine), device=mine.device)
            if saved is not None:
                found = torch.cat([saved[name][key].flatten() for name in self.params])
                whole[: len(found)] = found
            self.ranks.broadcast(whole)
            part = self.part(whole).view(mine.shape)
            write_master(self.mine, self.mantissa, part) if key == "master" else mine.copy_(part)
        self.gather()
        self.finish()


class AdamBucket(Bucket):
    """A big table, or all small parameters together. kernels: none here, a compiler fuses Adam by itself."""

    def __init__(self, params, ranks, o: OptimizerSettings, compiler, kernels: bool):
        super().__init__(params, ranks, 1, ADAM_EVERY)
        self.o, self.count = o, 0
        self.m, self.v = (torch.zeros_like(self.mine, dtype=torch.float32) for _ in range(2))
        roles = [find_role(name) for name in params]
        lengths = torch.tensor([p.numel() for p in params.values()])

        def each(values):  # the roles' values, one for each number of this rank's part
            values = torch.tensor(values, dtype=torch.float32)
            if len(roles) == 1:
                return values[0]
            full = torch.zeros(len(self.weights))
            full[: self.size] = values.repeat_interleave(lengths, output_size=self.size)
            return self.part(full).to(self.mine.device)

        self.lr, self.decay = each([r.lr for r in roles]), each([r.decay for r in roles])
        base = [getattr(o, r.base) for r in roles]
        self.base_lr = base[0] if len(set(base)) == 1 else each(base)
        self.betas = [each([r.betas[i] for r in roles]) for i in (0, 1)]
        self.run = compiler(step_adam)

    def update(self, lr_mul: float, mu: float, measure: bool):
        self.work.wait()
        self.count += 1
        lr = self.base_lr * lr_mul * self.lr
        decay = self.o.adam_weight_decay * lr * self.decay
        self.run(
            self.mine,
            self.mantissa,
            self.grad,
            self.m,
            self.v,
            scalar(self.count),
            lr,
            decay,
            *self.betas,
            "cautious",
        )
        self.gather()

    def state(self):
        return {"m": self.m, "v": self.v}

    def copy_from(self, other: "AdamBucket"):
        """Weights and state of a bucket of the same shape."""
        for mine, theirs in (
            (self.weights, other.weights),
            (self.mantissa, other.mantissa),
            (self.m, other.m),
            (self.v, other.v),
        ):
            if mine is not None:
                mine.copy_(theirs)
        self.count = other.count


class MatrixBucket(Bucket):
    """All matrices of one shape, stacked, so that one batched product serves them all. A parameter of three
    dimensions holds one matrix for each expert."""

    def __init__(self, params, ranks, o: OptimizerSettings, compiler, kernels: bool):
        R, K = next(iter(params.values())).shape[-2:]
        super().__init__(params, ranks, R * K, every=1)
        self.o, self.count = o, 0
        self.mine, self.grad = self.mine.view(-1, R, K), self.grad.view(-1, R, K)
        self.mantissa = None if self.mantissa is None else self.mantissa.view(-1, R, K)
        num_mine = self.mine.shape[0]
        first = ranks.rank * num_mine
        self.all_names = [part for name, p in params.items() for part in matrix_names(name, p)]
        self.names = self.all_names[first : first + num_mine]  # padding, at the end, has no name
        self.momentum = torch.zeros_like(self.mine, dtype=torch.float32)
        rows_or_columns = (num_mine, R, 1) if R >= K else (num_mine, 1, K)
        self.second_moment = {
            "normuon": torch.zeros(rows_or_columns, device=self.mine.device),
            "muon": None,
            "adamw": torch.zeros_like(self.momentum),
        }[o.optimizer]
        shape_lr = [max(1, R / K) ** 0.5 * (DOWN_LR if ".down" in name else 1) for name in self.names]
        shape_lr += [0.0] * (num_mine - len(shape_lr))
        self.shape_lr_N11 = torch.tensor(shape_lr, device=self.mine.device).view(-1, 1, 1)
        self.radial_moment = None
        if o.spectral_variance:
            self.radial_moment = torch.zeros(rows_or_columns, device=self.mine.device)
        strength = {"attn": o.spectral_lr_mul_attn, "mlp": o.spectral_lr_mul_mlp}
        a = [strength[name.split(".")[2]] for name in self.names] + [0.0] * (num_mine - len(self.names))
        a = [o.spectral_lr_mul if x is None else x for x in a]
        self.a_N11 = torch.tensor(a, device=self.mine.device).view(-1, 1, 1)
        self.rho_sum = torch.zeros_like(self.a_N11)
        self.stats = None
        if o.optimizer == "adamw":
            self.run = compiler(step_adam)
        else:
            small = compiler(radial_part)
            fused = lambda *state: step_muon_fused(*state, radial_part=small)
            self.run = fused if kernels and fused_covers(o) else compiler(step_muon)

    def state(self):
        found = {
            "momentum": self.momentum,
            "second_moment": self.second_moment,
            "radial_moment": self.radial_moment,
            "rho_sum": self.rho_sum,
        }
        return {key: value for key, value in found.items() if value is not None}

    def update(self, lr_mul: float, mu: float, measure: bool):
        self.work.wait()
        self.count += 1
        o, state = self.o, (self.mine, self.mantissa, self.grad, self.momentum, self.second_moment)
        if o.optimizer == "adamw":
            beta1, beta2 = map(scalar, find_role(next(iter(self.params))).betas)
            self.run(
                *state,
                scalar(self.count),
                scalar(o.adam_matrix_lr * lr_mul),
                scalar(o.adam_matrix_decay),
                beta1,
                beta2,
                "param",
            )
        else:
            lr = o.muon_lr * lr_mul
            decay = o.muon_weight_decay * (lr if o.muon_decay_mode == "cautious" else 1)
            settled = self.count > RHO_END
            rho_0 = self.rho_sum / (RHO_END - RHO_START)
            rho, self.stats = self.run(
                *state,
                self.radial_moment,
                lr * self.shape_lr_N11,
                scalar(decay),
                scalar(mu),
                self.a_N11,
                rho_0,
                scalar(settled),
                o,
                measure,
            )
            if RHO_START < self.count <= RHO_END:
                self.rho_sum += rho
        self.gather()


def scalar(x: float) -> Tensor:
    """A 0-d tensor on the CPU: compiled code takes it as an argument, and a new value needs no new code."""
    return torch.tensor(x, dtype=torch.float32)


def matrix_names(name: str, p: Tensor) -> list[str]:
    """blocks.0.mlp.up of a mixture of experts holds blocks.0.mlp.up.0, blocks.0.mlp.up.1, ..."""
    return [name] if p.ndim == 2 else [f"{name}.{expert}" for expert in range(len(p))]


def find_role(name: str) -> Role:
    found = [role for role in ROLES if re.fullmatch(role.pattern, name)]
    assert len(found) == 1, f"parameter {name} matches {len(found)} roles: {[r.name for r in found]}"
    return found[0]


class Optimizer:
    """All buckets, small ones first, so that the big transfers overlap with the work on what has arrived."""

    def __init__(
        self, model: GPT, o: OptimizerSettings, ranks: Ranks, num_steps: int, compiler, kernels: bool = False
    ):
        self.o, self.ranks, self.num_steps = o, ranks, num_steps
        groups = {}
        for name, p in model.named_parameters():
            role = find_role(name)
            if role.rule == "matrix":
                key = MatrixBucket, tuple(p.shape[-2:])
            else:  # the head stays alone, because the embedding takes over its state
                key = AdamBucket, name if p.numel() >= SMALL or role.name == "head" else p.dtype
            groups.setdefault(key, {})[name] = p
        self.buckets = [make(params, ranks, o, compiler, kernels) for (make, _), params in groups.items()]
        self.buckets.sort(key=lambda b: (isinstance(b, MatrixBucket), b.size))
        self.by_name = {name: b for b in self.buckets for name in b.params}
        if "embed" in self.by_name:
            self.by_name["embed"].active = False
        self.watch = None  # called when all gradients of a step are reduced and none has been used
        self.queue = None  # of this step's buckets, those whose reduction has not begun; None: none expected
        for bucket in self.buckets:
            for p in bucket.params.values():
                p.register_post_accumulate_grad_hook(functools.partial(self.arrived, bucket))

    def untie(self):
        """From here on the embedding learns by itself, from where the head is."""
        self.by_name["embed"].copy_from(self.by_name["head"])
        self.by_name["embed"].active = True

    def pending(self, step: int) -> bool:
        """Whether gradients wait for their update after `step` steps."""
        return step % ADAM_EVERY != 0

    def momentum(self, step: int) -> float:
        """Up from 0.85 over the warm-up, back over the last 50 steps."""
        up = min(1, step / max(1, self.o.beta_warmup_steps))
        down = min(1, (self.num_steps - step) / MUON_END_STEPS)
        low = min(MUON_START_MOMENTUM, self.o.muon_momentum)
        return low + min(up, down) * (self.o.muon_momentum - low)

    def due(self, step: int) -> list[Bucket]:
        """What moves at this step."""
        return [b for b in self.buckets if b.active and step % b.every == b.every - 1]

    def expect(self, step: int):
        """Before a step's last backward pass: from here on a bucket's reduction begins once its gradients are
        complete, in the buckets' order, because all ranks must call their collectives in one order."""
        self.queue = self.due(step)
        for bucket in self.queue:
            bucket.missing = len(bucket.params)

    def arrived(self, bucket: Bucket, param: nn.Parameter):
        """A gradient has been added; called by autograd."""
        bucket.missing -= 1
        while self.queue and self.queue[0].missing <= 0:
            self.queue.pop(0).reduce()

    @torch.no_grad()
    def step(self, step: int, lr_mul: float, batch_tokens: int, measure: bool):
        """Reduce, update, gather. measure: the next line of the log wants log_fields(full=True)."""
        if self.queue is None:
            self.expect(step)
        due = self.due(step)
        for bucket in self.queue:
            bucket.reduce()
        self.queue = None
        if self.watch:
            self.watch()
        if self.o.grad_clip:
            self.clip(due, batch_tokens)
        for bucket in due:
            bucket.update(lr_mul, self.momentum(step), measure)
        for bucket in due:
            bucket.finish()

    def clip(self, due: list[Bucket], batch_tokens: int):
        total = torch.stack([b.square_norm() for b in due]).sum()
        self.ranks.all_reduce(total).wait()
        norm_of_mean = total.sqrt() / (LOSS_SCALE * batch_tokens)
        factor = (self.o.grad_clip / norm_of_mean).clamp(max=1)
        for bucket in due:
            bucket.grad.mul_(factor)

    def matrices(self):
        """(names, fp32 masters, gradients) of the matrices this rank owns, a shape at a time, to look at."""
        for bucket in self.buckets:
            if isinstance(bucket, MatrixBucket) and bucket.names:
                bucket.work.wait()
                num = len(bucket.names)
                yield bucket.names, read_master(bucket.mine, bucket.mantissa)[:num], bucket.grad[:num]

    def export(self) -> tuple[dict, dict]:
        """(states, counts) of all parameters by name, for a checkpoint; no gradient may be pending."""
        states = {}
        for bucket in self.buckets:
            states.update(bucket.export())
        return states, {name: bucket.count for name, bucket in self.by_name.items()}

    def check(self, saved: dict):
        """ValueError if `saved`, the states of a checkpoint, are not this optimizer's."""
        wrong = sorted(set(self.by_name) ^ set(saved))
        if wrong:
            raise ValueError(
                f"the checkpoint does not fit the model: only one of them has {', '.join(wrong[:5])}"
            )
        for bucket in self.buckets:
            bucket.check(saved)

    def restore(self, saved: dict | None, counts: dict[str, int], tied: bool):
        """export's inverse; `saved` on rank 0, counts on all."""
        for bucket in self.buckets:
            bucket.restore(saved)
            bucket.count = counts[next(iter(bucket.params))]
        if "embed" in self.by_name:
            self.by_name["embed"].active = not tied

    def log_fields(self, step: int, full: bool) -> dict:
        """For the step line; `full` at validations. A collective: every rank calls it."""
        beta1, beta2 = find_role("head").betas
        return {
            "beta1": f"{beta1:.4f}",
            "beta2": f"{beta2:.4f}",
            "muon_momentum": f"{self.momentum(step):.4f}",
            **(self.ord_fields() if full else {}),
        }

    def ord_fields(self) -> dict:
        """ORD_STATS by layer, the mean over a layer's matrices: spec_attn and spec_mlp are the signed rho."""
        buckets = [b for b in self.buckets if isinstance(b, MatrixBucket)]
        if not any(b.count for b in buckets):
            return {}
        names = [name for b in buckets for name in b.all_names]
        table = torch.zeros(len(names), len(ORD_STATS), device=self.ranks.device)
        for b in buckets:
            if b.stats is not None:
                for name, row in zip(b.names, b.stats):
                    table[names.index(name)] = row
        self.ranks.all_reduce(table).wait()
        fields = {}
        for i, stat in enumerate(ORD_STATS):
            for kind in ("attn", "mlp"):
                layers = {}
                for name, value in zip(names, table[:, i].tolist()):
                    layer, this_kind = name.split(".")[1:3]
                    if this_kind == kind:
                        layers.setdefault(int(layer), []).append(value)
                means = (sum(v) / len(v) for _, v in sorted(layers.items()))
                key = f"{'spec' if stat == 'rho' else stat}_{kind}"
                fields[key] = "[" + ",".join(f"{m:.5g}" for m in means) + "]"
        return fields


# <<< optimizer
# ---------------------------------------------------------------------------------------------------
# Schedule
# ---------------------------------------------------------------------------------------------------


class Schedule:
    """What changes over the steps: stage, learning rate, windows, loss weights; functions of the step."""

    def __init__(self, s: Settings, config: ModelConfig):
        self.s, self.config = s, config
        self.scheduled = s.num_scheduled_iterations
        self.num_steps = self.scheduled + s.num_extension_iterations
        self.untie_step = round(self.scheduled * config.untie_frac) | 1 if config.untie_frac < 1 else None

    def stage(self, step: int) -> int:
        return (NUM_STAGES - 1) if step >= self.scheduled else step * (NUM_STAGES - 1) // self.scheduled

    def batch_tokens(self, step: int) -> int:
        return self.s.batch_sizes[self.stage(step)]

    def windows(self, stage: int) -> tuple[int, int]:
        return tuple(blocks * self.config.window_block for blocks in self.config.windows[stage])

    def final_windows(self) -> tuple[int, int]:
        return tuple(blocks * self.config.window_block for blocks in self.config.final_windows)

    def predict_weights(self, step: int) -> Tensor:
        """Weights of the losses on the next tokens, linear within the stage."""
        stage, length = self.stage(step), self.scheduled / (NUM_STAGES - 1)
        done = step / length - stage if stage < NUM_STAGES - 1 else 0.0
        return torch.tensor([a + (b - a) * done for a, b in self.config.predict[stage]])

    def lr_mul(self, step: int) -> float:
        s, peak = self.s, self.s.lr_muls[self.stage(step)]
        warm = min(1.0, (step + 1) / s.warmup_steps) if s.warmup_steps else 1.0
        if 0 <= s.lr_decay_switch_step <= step:
            before = max(0, s.lr_decay_switch_step - 1)
            old_peak = s.lr_muls[self.stage(before)]
            reached = self.decayed(before, s.lr_decay_type, old_peak, s.lr_decay_final)
            done = min(1.0, (step - s.lr_decay_switch_step) / max(1, self.scheduled - s.lr_decay_switch_step))
            final = peak * s.lr_decay_second_final
            if s.lr_decay_second_type == "linear":
                return warm * (reached + (final - reached) * done)
            if s.lr_decay_second_type == "exp" and reached:
                return warm * reached * (final / reached) ** done
            return warm * reached
        return warm * self.decayed(step, s.lr_decay_type, peak, s.lr_decay_final)

    def decayed(self, step: int, kind: str, peak: float, final: float) -> float:
        """The first decay's multiplier at a step: linear and cosine end at `final`, exp at peak * final."""
        start = int(self.scheduled * (1 - self.s.cooldown_frac))
        done = min(1.0, max(0.0, (step - start) / max(1, self.scheduled - start)))
        if kind == "linear":
            return peak * (1 - done) + final * done
        if kind == "cosine":
            return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done)) if done else peak
        if kind == "exp":
            return peak * final**done
        return peak

    def validates(self, step: int) -> bool:
        s, left = self.s, self.num_steps - step
        often = s.val_loss_every_last and left < s.val_loss_last_steps and left % s.val_loss_every_last == 0
        return left == 0 or bool(often) or bool(s.val_loss_every and step % s.val_loss_every == 0)


# ---------------------------------------------------------------------------------------------------
# Checkpoints: logs/RUN_ID/step_N.pt, what a run needs to go on as if nothing had happened
# ---------------------------------------------------------------------------------------------------

# What a checkpoint holds. There is no state of random generators: initial weights, the order of the data and
# router noise are functions of SEED, `position` and `step`, so these are all their state.
CHECKPOINT_KEYS = {
    "format": int,
    "config": dict,
    "run_id": str,
    "source_hash": str,
    "step": int,
    "tokens": int,
    "train_ms": float,
    "reached": bool,
    "validated": int,
    "position": list,
    "stage": int,
    "tied": bool,
    "rotary_scale": float,
    "rotary_freqs": Tensor,
    "counts": dict,
    "params": dict,
}
CHECKPOINT_FORMAT, CHECKPOINTS_KEPT, MODEL_FILE = 1, 2, "model.safetensors"
MAY_DIFFER = {
    "run_id",
    "nproc_per_node",
    "compile",
    "rehearse",
    "kernels",
    "slices_per_pass",
    "val_loss_every",
    "val_loss_last_steps",
    "val_loss_every_last",
    "target_loss",
    "diverged_above",
    "save_every",
    "resume",
    "save_model",
    "dist_timeout",
    "data_path",
    "train_files",
    "val_files",
    "train_tokens",
    "manifold_every",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read: which, what was found, what to do. Exit code 2."""


def read_checkpoint(path: Path) -> dict:
    """The contents, checked to the last byte (every record has a CRC) and loaded without running code."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; a checkpoint (step_*.pt) is wanted")
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
            # torch takes what is marked as a folder for one, and leaves its tensor uninitialised
            bad = bad or next((part.filename for part in file.infolist() if part.external_attr), None)
        if bad:
            raise CheckpointError(f"{path} is damaged ({bad}); use an earlier checkpoint")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"RESUME: there is no {path}; give auto, or the path of a step_*.pt") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever a file of any content makes them raise
        text = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} is no checkpoint, or was cut short ({text[:120]}); use another"
        ) from None
    if not isinstance(saved, dict) or saved.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {CHECKPOINT_FORMAT})")
    for key, kind in CHECKPOINT_KEYS.items():
        if not isinstance(saved.get(key), kind):
            raise CheckpointError(f"{path} has no {key} of type {kind.__name__}; use another checkpoint")
    if not is_run_id(saved["run_id"]):  # it would name files, wherever a stranger wanted them
        raise CheckpointError(f"{path} belongs to RUN_ID {saved['run_id'][:80]!r}, which no run can have")
    numbers = [saved["step"], saved["tokens"], saved["stage"], *saved["position"]]
    whole = len(numbers) == 6 and all(type(n) is int and n >= 0 for n in numbers)
    if not whole or saved["stage"] >= NUM_STAGES:
        raise CheckpointError(f"{path}: step, tokens, stage and position are {numbers}, which no run has")
    try:
        json.dumps(saved["config"])
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: its config is not one that a run has; use another") from None
    return saved


def write_checkpoint(folder: Path, contents: dict) -> Path:
    """Written aside, synced, renamed: a reader finds all of it or nothing. Then all but the last two go.
    Raises OSError, with everything as it was, if the disk does not take it."""
    path, new = folder / f"step_{contents['step']:08d}.pt", folder / ".new.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        make_durable(path)
    except (OSError, RuntimeError) as error:  # torch reports failed writes as RuntimeError
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from None
    for old in checkpoints_in(folder)[:-CHECKPOINTS_KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def make_durable(path: Path):
    """Make a rename survive a power cut, also in a folder that is new itself."""
    for folder in (path.parent, path.parent.parent):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checkpoints_in(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step_" + "[0-9]" * 8 + ".pt"))


def differences(old: dict, new: dict) -> list[str]:
    """What would train something else, in words. A setting that is newer than the checkpoint had, then, its
    default."""
    defaults = {f.name: f.default for c in (Settings, OptimizerSettings) for f in dataclasses.fields(c)}
    old, new = json.loads(json.dumps({**defaults, **old})), json.loads(json.dumps(new))
    hints = {
        "num_slices": " (as many as there are ranks, at least 8: take as many ranks as it had, or at "
        "most 8 if it had no more)"
    }
    return [
        f"{key.upper()} was {old.get(key)}, now {new.get(key)}{hints.get(key, '')}"
        for key in sorted({*old, *new} - MAY_DIFFER)
        if old.get(key) != new.get(key)
    ]


def different_settings(rank: int, mine: dict, first: dict) -> str:
    """What a rank's settings have otherwise than rank 0's, in words; empty if nothing."""
    names = [name for name in sorted({*mine, *first}) if mine.get(name) != first.get(name)]
    found = ", ".join(f"{name.upper()}={mine.get(name)} instead of {first.get(name)}" for name in names)
    return found and (
        f"the ranks were started with different settings: rank {rank} has {found}; give all "
        "machines the same ones"
    )


def refuse_differences(where, old: dict, new: dict):
    found = differences(old, new)
    if found:
        raise SettingsError(
            f"{where} belongs to a run of other settings: {'; '.join(found)}. Give it the "
            "same settings, or start a new run under another RUN_ID"
        )


class Origin(NamedTuple):
    """Where a run begins: anew, or from `saved`, a checkpoint's contents (None: step 0)."""

    run_id: str
    resumed: bool = False
    saved: dict | None = None
    path: str = "none"
    damaged: tuple[tuple[Path, str], ...] = ()  # checkpoints that were passed over, and why
    ended: int | None = None  # the run is over already: its exit code


def find_origin(s: Settings, config: dict, run_id: str) -> Origin:
    """What RESUME and torchrun's restarts mean here. run_id: as the user gave it, maybe empty."""
    if restarted():  # as RESUME=auto, if the worker in whose place this one is had come so far
        s = dataclasses.replace(s, run_id=run_id or restarted_run_id() or s.run_id)
        if begun_by_this_launch(s.log) and (not s.resume or checkpoints_in(s.folder)):
            return last_checkpoint(s, config)
    if s.resume == "auto":
        if not run_id:
            raise SettingsError(
                "RESUME=auto without RUN_ID: which run? Set RUN_ID to its log's name, without .txt"
            )
        return last_checkpoint(s, config)
    if s.resume:
        saved = read_checkpoint(Path(s.resume))
        refuse_differences(s.resume, saved["config"], config)
        s = dataclasses.replace(s, run_id=run_id or saved["run_id"])
        refuse_differences(s.log, {**config, **log_config(s.log)}, config)
        return Origin(s.run_id, True, saved, s.resume)
    if checkpoints_in(s.folder) and not has_begun(s.log):
        raise SettingsError(
            f"{s.folder} holds checkpoints of an earlier run; RESUME=auto goes on with it, "
            "or choose another RUN_ID"
        )
    return Origin(s.run_id)


def last_checkpoint(s: Settings, config: dict) -> Origin:
    """RESUME=auto: the newest checkpoint that can be read; without any, the run from its start."""
    last, damaged = last_event(s.log), []
    lost = s.save_model and checkpoints_in(s.folder) and not (s.folder / MODEL_FILE).exists()
    if last == "finished" and not lost:
        return Origin(s.run_id, ended=0)
    if last == "diverged" and restarted():  # it would diverge again
        return Origin(s.run_id, ended=3)
    for path in reversed(checkpoints_in(s.folder)):
        try:
            saved = read_checkpoint(path)
        except CheckpointError as error:
            damaged.append((path, str(error)))
            continue
        refuse_differences(path, saved["config"], config)
        return Origin(s.run_id, True, saved, str(path), tuple(damaged))
    if damaged:
        found = "; ".join(text for _, text in damaged)
        raise CheckpointError(
            f"{s.folder} has no checkpoint that can be read: {found}. Remove the folder "
            f"and {s.log} to begin the run anew"
        )
    refuse_differences(s.log, {**config, **log_config(s.log)}, config)
    return Origin(s.run_id, has_begun(s.log))


def set_aside(origin: Origin, folder: Path):
    """Rename what is not to be gone on with, but not throw it away: of the checkpoints that are left, the
    last by number is then the last by time."""
    for path in checkpoints_in(folder):
        if origin.saved and path > folder / f"step_{origin.saved['step']:08d}.pt":
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".damaged" if path in dict(origin.damaged) else ".superseded"))


def last_event(log: Path) -> str:
    """How a log ends so far: finished, diverged ..., or started or resumed; empty if there is none."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65_536))
        events = rb"^event:(started|resumed|finished|diverged|crashed|stopped)\b"
        found = re.findall(events, file.read(), re.M)
    return found[-1].decode() if found else ""


def log_config(log: Path) -> dict:
    """The settings in a log's header; {} if there is none."""
    found = log.is_file() and re.search(r"^config:(\{.*\})$", log.read_text(errors="replace"), re.M)
    return json.loads(found[1]) if found else {}


def restarted_run_id() -> str:
    """The run that a restarted worker had begun; empty if it had not got so far."""
    logs = sorted(Path("logs").glob("*.txt"), key=lambda p: p.stat().st_mtime, reverse=True)
    return next((log.stem for log in logs if begun_by_this_launch(log)), "")


def begun_by_this_launch(log: Path) -> bool:
    """Whether a worker of this torchrun, maybe one that died since, began or resumed it."""
    ours = rf"^event:(?:started|resumed) .*launch:{re.escape(launch_id())}( |$)"
    return log.is_file() and re.search(ours, log.read_text(errors="replace"), re.M) is not None


def save_model(path: Path, model: GPT, config: dict, windows: tuple[int, int], tied: bool):
    """The trained weights, as the forward pass has them, for use elsewhere: safetensors, named as the
    parameters, with what is needed to build the model in its metadata."""
    from safetensors.torch import save_file

    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    tensors["rotary.freqs"] = model.rotary.freqs.cpu()
    metadata = {
        "config": config["model_config"],
        "vocab_size": config["vocab_size"],
        "mark": config["mark"],
        "residual_scale": config["residual_scale"],
        "rotary_scale": model.rotary.scale,
        "windows": windows,
        "tied": tied,
    }
    new = path.with_name(".new.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.clone() for k, v in tensors.items()}, new, {k: json.dumps(v) for k, v in metadata.items()}
        )
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(new, 0o644)  # as the log; safetensors makes files for their owner alone
        os.replace(new, path)
        make_durable(path)
    finally:
        new.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------
# Evaluate, warm up, main
# ---------------------------------------------------------------------------------------------------


class Clock:
    """Training time in ms; stops for evaluation."""

    def __init__(self, device: torch.device):
        self.device, self.spent_ms, self.since = device, 0.0, None

    def start(self):
        self.sync()
        self.since = time.perf_counter()

    def stop(self):
        self.sync()
        self.spent_ms, self.since = self.ms(), None

    def ms(self) -> float:
        return self.spent_ms + (1000 * (time.perf_counter() - self.since) if self.since else 0)

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@torch.no_grad()
def evaluate(
    forward,
    shards,
    s: Settings,
    ranks: Ranks,
    windows,
    tied: bool,
    ahead: Ahead,
    num_batches: int | None = None,
) -> tuple[float, float]:
    """(mean cross-entropy in nats a token, share of tokens guessed right) over all ranks. num_batches: of the
    first so many batches only."""
    sums, num_tokens = torch.zeros(2, dtype=torch.float64, device=ranks.device), 0
    for batch in ahead.each(val_batches(shards, s, ranks, num_batches)):
        ranks.beat()
        loss, right = forward(batch, windows, None, tied)
        sums += torch.stack([loss.double(), right.double()])
        num_tokens += batch.targets_BT.numel() * ranks.world_size  # every rank has as many
    ranks.all_reduce(sums).wait()
    loss, right = sums.tolist()
    return loss / num_tokens, right / num_tokens


class Diverged(RuntimeError):
    """The loss ran away, or is no longer a finite number. Exit code 3."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(f"step {step}: {name} is {value:g}; try a lower learning rate")
        self.step, self.name, self.value = step, name, value


MAX_VARIANTS = 64  # compiled forms of one function: gpt2-small's forward has 11, more than dynamo's 8
COMPILE_CACHE = SCRIPT.with_name(".compile_cache")  # of all runs, those of a sweep too, and across restarts


def torch_compile(function):
    """One graph and fixed shapes, or an error: graph breaks and recompilations cost time silently."""
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(COMPILE_CACHE / folder))
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_VARIANTS)
    # options are each thread's own in torch 2.13, and backward runs in autograd's: so it is compiled with
    # forward, here, and the option below travels with the function
    functorch.force_non_lazy_backward_lowering = True
    # torch 2.13 asserts ("16384 v.s. 16383") when it fuses reductions over T and over T - 1; retry in 2.14
    return torch.compile(
        function, dynamic=False, fullgraph=True, options={"triton.mix_order_reduction": False}
    )


def compiled_forward(model: GPT):
    """The compiled model. Only the number of documents is left open: every pass has another one, and nothing
    but attention's own kernel reads them."""
    forward = torch_compile(model)

    def with_any_number_of_documents(batch: Batch, *args):
        torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        return forward(batch, *args)

    return with_any_number_of_documents


def graphs_compiled() -> int:
    """By this process, so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # its import takes a second; eager runs do without
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


class Trainer:
    """Model, optimizer and schedule, and the step that joins them."""

    def __init__(self, s: Settings, o: OptimizerSettings, config: ModelConfig, vocab_size: int, ranks: Ranks):
        self.s, self.ranks, self.schedule = s, ranks, Schedule(s, config)
        choose_attention(s.attn_backend)  # before anything is compiled
        self.model = build_model(s, config, vocab_size, ranks.device)
        compiler = torch_compile if s.compile == "1" else lambda function: function
        self.forward = compiled_forward(self.model) if s.compile == "1" else self.model
        self.optimizer = Optimizer(
            self.model, o, ranks, self.schedule.num_steps, compiler, kernels=s.kernels == "triton"
        )
        self.stage, self.tied = 0, True

    def enter(self, step: int):
        """What happens between steps: a new stage's long window (YaRN), the untying of embedding and head."""
        stage = self.schedule.stage(step)
        old, new = self.schedule.windows(self.stage)[1], self.schedule.windows(stage)[1]
        if old != new:
            self.model.rotary.extend(old, new)
        self.stage = stage
        if step == self.schedule.untie_step:
            self.optimizer.untie()
            self.tied = False

    def export(self) -> dict:
        """All that training depends on beside step and data: tensors and plain values. A collective."""
        params, counts = self.optimizer.export()
        return {
            "stage": self.stage,
            "tied": self.tied,
            "rotary_scale": self.model.rotary.scale,
            "rotary_freqs": self.model.rotary.freqs.cpu(),
            "counts": counts,
            "params": params,
        }

    def restore(self, saved: dict, params: dict | None):
        """export's inverse; params on rank 0 only."""
        self.stage, self.tied, rotary = saved["stage"], saved["tied"], self.model.rotary
        rotary.freqs.copy_(saved["rotary_freqs"])
        rotary.scale = saved["rotary_scale"]
        rotary.make_tables(rotary.cos.shape[0])
        self.optimizer.restore(params, saved["counts"], self.tied)

    def router_noise(self, step: int, slices, batch: Batch) -> Tensor | None:
        """Normal noise for the router logits of a pass, (L, B, T, E), from a stream of its own for each step
        and slice of the global batch: the ranks agree, and a resumed run needs no state for it."""
        c, (B, T) = self.model.config, batch.inputs_BT.shape
        if not (c.num_experts and self.s.router_noise):
            return None
        shape = c.num_layers, T, c.num_experts
        streams = (np.random.default_rng([self.s.seed, 3, step, next(slices)]) for _ in range(B))
        noise = np.stack([stream.standard_normal(shape, np.float32) for stream in streams], 1)
        return to_device(self.s.router_noise * torch.from_numpy(noise), self.ranks.device)

    def step(self, step: int, batches: list[Batch], measure: bool = False) -> Tensor:
        """One update; returns the cross-entropy summed over this rank's tokens. measure: take the optimizer's
        statistics too, even if the next line of the log does not want them."""
        schedule, total = self.schedule, 0
        weights = to_device(schedule.predict_weights(step), self.ranks.device)
        slices = iter(my_slices(self.ranks))
        for i, batch in enumerate(batches):
            self.ranks.beat()
            if i == len(batches) - 1:
                self.optimizer.expect(step)
            loss, cross_entropy = self.forward(
                batch,
                schedule.windows(self.stage),
                weights,
                self.tied,
                self.router_noise(step, slices, batch),
            )
            (LOSS_SCALE * loss).backward()
            total = total + cross_entropy
        self.optimizer.step(
            step,
            schedule.lr_mul(step),
            schedule.batch_tokens(step),
            measure=measure or schedule.validates(step + 1),
        )
        return total


def rehearse(s, o, config, train_shards, val_shards, ranks, stop: Stop):
    """Compile and autotune all that the run will meet, on a trainer and data of its own, which are thrown
    away: every stage, tied or not, training and evaluation, steps with and without Adam and statistics.
    Ends early if a rank was asked to stop."""
    trainer = Trainer(s, o, config, train_shards[0].vocab_size, ranks)
    data = TrainData(train_shards, s, ranks)
    schedule, validation = trainer.schedule, (trainer.forward, val_shards, s, ranks)
    starts = {schedule.stage(i): i for i in range(schedule.num_steps - 1, -1, -1)}.values()
    firsts = {*starts, schedule.untie_step or 0}
    for step in sorted(firsts | {i + 1 for i in firsts}):  # two steps each: Adam moves on every second
        if any(ranks.collect(stop.reason)):
            break
        if step < schedule.num_steps:
            trainer.enter(step)
            trainer.step(step, data.next(schedule.batch_tokens(step), None), measure=step == 0)
            evaluate(*validation, schedule.windows(trainer.stage), trainer.tied, data.ahead, num_batches=1)
    else:
        evaluate(*validation, schedule.final_windows(), trainer.tied, data.ahead, num_batches=1)
    data.ahead.close()
    del trainer, data, validation
    gc.collect()  # hooks and their optimizer are a cycle, and gigabytes of the device hang on it
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()


class Recorded:
    """What a CUDA device had been given up to now, as something to wait for."""

    def __init__(self):
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self):
        self.event.synchronize()


class Report:
    """What happened, as lines of the log and on the console; ends a run whose loss is no longer a number."""

    def __init__(self, trainer: Trainer, s: Settings, ranks: Ranks, log: RunLog):
        self.schedule, self.optimizer, self.target = trainer.schedule, trainer.optimizer, s.target_loss
        self.ranks, self.log, self.pending, self.reached = ranks, log, None, False
        self.model = trainer.model
        self.stop = False  # whether the ranks agree that somebody asked for it
        self.highest = s.diverged_above or 2 * math.log(trainer.model.head.shape[0])

    def line(self, step: int, loss: dict, tokens: int, ms: float, last: dict, full: bool):
        """One step line. Schedules are those of the update that led to `step`."""
        update, schedule = max(0, step - 1), self.schedule
        self.log.step(
            step,
            {
                **loss,
                "train_time": f"{ms:.0f}ms",
                "step_avg": f"{ms / max(1, step):.2f}ms",
                "lr_mul": f"{schedule.lr_mul(update):.4f}",
                **self.optimizer.log_fields(update, full),
                "batch_size": schedule.batch_tokens(update),
                "tokens": tokens,
                **last,
            },
        )

    def trained(self, step: int, total: Tensor, stop: bool, tokens: int, ms: float):
        """After update number `step`. On a GPU its line comes an update late: nothing waits for it. A
        request to stop, which one rank alone may have got, travels with the loss: all see it at one step."""
        self.flush()
        total = total.float()
        sums = torch.stack((total, torch.full_like(total, float(stop))))
        work = self.ranks.all_reduce(sums)
        if sums.is_cuda:  # copied now: a copy asked for later would stand in line behind the next update
            work.wait()
            sums, work = sums.to("cpu", non_blocking=True), Recorded()
        self.pending = (step, sums, work, tokens, ms)
        if self.ranks.device.type == "cpu":
            self.flush()

    def flush(self):
        if self.pending:
            waiting, self.pending = self.pending, None
            self.write(*waiting)

    def write(self, step: int, sums: Tensor, work, tokens: int, ms: float):
        work.wait()
        total, stop = sums.tolist()
        self.stop = self.stop or stop > 0
        loss, num_steps = total / self.schedule.batch_tokens(step - 1), self.schedule.num_steps
        self.line(step, {"train_loss": f"{loss:.6f}"}, tokens, ms, {}, full=False)
        self.log.progress(
            step,
            loss,
            1000 * tokens / ms,
            ms / step * (num_steps - step) / 1000,
            shown_every=max(1, num_steps // 20),
        )
        self.check(step, "train_loss", loss)

    def expert_load(self) -> dict:
        """By layer, the share of this validation's tokens that the busiest and the idlest expert got. A token
        counts with each of its k experts: even is k / E. A collective."""
        if not self.model.config.num_experts:
            return {}
        load = self.model.take_expert_load(self.ranks)
        share = load / load.sum(1, keepdim=True) * self.model.config.moe_top_k
        ends = {"moe_load_max": share.amax(1), "moe_load_min": share.amin(1)}
        return {key: "[" + ",".join(f"{x:.4f}" for x in value.tolist()) + "]" for key, value in ends.items()}

    def validated(self, step: int, loss: float, accuracy: float, tokens: int, ms: float):
        self.line(
            step,
            {"val_loss": f"{loss:.5f}"},
            tokens,
            ms,
            {"val_acc": f"{accuracy:.5f}", **self.expert_load()},
            full=True,
        )
        self.log.say(
            f"step {step:>5}/{self.schedule.num_steps}  validation loss {loss:.4f}, "
            f"{accuracy:.1%} of tokens right, {ms / 1000:.1f} s of training"
        )
        self.check(step, "val_loss", loss)
        if loss <= self.target and not self.reached:
            self.reached = True
            self.log.event("target_reached", step=step, target=self.target, val_loss=f"{loss:.5f}")

    def check(self, step: int, name: str, loss: float):
        if not loss <= self.highest:  # NaN is not
            raise Diverged(step, name, loss)


class Run:
    """The loop, and what it does beside training: validate, save, stop."""

    def __init__(self, start: "Start", stop: Stop):
        s, ranks = self.s, self.ranks = start.s, start.ranks
        self.log, self.config, self.stop, self.val_shards = start.log, start.config, stop, start.val_shards
        self.trainer = Trainer(s, start.o, start.model_config, start.config["vocab_size"], ranks)
        self.data, self.clock = TrainData(start.train_shards, s, ranks), Clock(ranks.device)
        self.report, self.schedule = Report(self.trainer, s, ranks, self.log), self.trainer.schedule
        self.first, self.tokens, self.last_saved, self.validated, self.manifold = 0, 0, 0, -1, None
        if s.manifold_every:
            from manifold import Manifold

            self.manifold = Manifold(
                s.log.with_suffix(".manifold.jsonl"),
                s.manifold_every,
                self.trainer.optimizer,
                ranks,
                self.clock,
                self.log,
            )

    def resume(self, saved: dict | None):
        """Go on from a checkpoint, which rank 0 has; refused before anything is taken from it."""
        try:
            self.ranks.together(lambda: self.trainer.optimizer.check(saved["params"]) if saved else None)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        small = self.ranks.share(saved and {k: v for k, v in saved.items() if k not in ("params", "config")})
        known = set(small["counts"]) == set(self.trainer.optimizer.by_name)
        if small["step"] >= self.schedule.num_steps or not known:
            raise CheckpointError(
                f"the checkpoint is of step {small['step']} and this run has "
                f"{self.schedule.num_steps}, or it counts other parameters' updates"
            )
        self.trainer.restore(small, saved and saved["params"])
        self.data.seek(small["position"])
        self.clock.spent_ms, self.report.reached = small["train_ms"], small["reached"]
        self.first = self.last_saved = small["step"]
        self.tokens, self.validated = small["tokens"], small["validated"]
        if saved:
            saved.clear()  # gigabytes, which `start` would hold to the end

    def train(self) -> int | None:
        """Exit code if the run was stopped, None at its end."""
        s, schedule, epoch = self.s, self.schedule, self.data.position[0]
        self.graphs = graphs_compiled()
        self.report.stop = any(self.ranks.collect(self.stop.reason))
        if self.report.stop:  # during the rehearsal; what there is to go on with exists already
            self.end_stopped(self.first)
            return 0
        if self.manifold:
            self.manifold.go_on(self.first)
        self.clock.start()
        for step in range(self.first, schedule.num_steps + 1):
            last = step == schedule.num_steps
            if schedule.validates(step) and step > self.validated:
                self.validate(step, last)
            if last:
                break
            stopping = self.report.stop
            due = s.save_every and step // s.save_every > self.last_saved // s.save_every
            if (stopping or due) and step > self.first and not self.trainer.optimizer.pending(step):
                saved = self.save(step)
                if stopping:
                    self.end_stopped(step)
                    return 0 if saved else 1
            self.trainer.enter(step)
            batch_tokens = schedule.batch_tokens(step)
            if self.manifold:
                self.manifold.expect(step + 1)
            total = self.trainer.step(step, self.data.next(batch_tokens, schedule.batch_tokens(step + 1)))
            self.tokens += batch_tokens
            if self.manifold:
                self.manifold.measure(step + 1, self.tokens)
            self.report.trained(step + 1, total, bool(self.stop.reason), self.tokens, self.clock.ms())
            self.note_compilation(step + 1)
            if self.data.position[0] > epoch:
                epoch = self.data.position[0]
                self.log.event("epoch", step=step + 1, epoch=epoch)
        self.clock.stop()
        return None

    def end_stopped(self, step: int):
        self.log.end("stopped", step=step, reason=json.dumps(self.stop.reason or "another rank"))

    def note_compilation(self, step: int):
        """A line if the run has just compiled something, which the rehearsal is there to prevent."""
        before, self.graphs = self.graphs, graphs_compiled()
        if self.graphs > before and self.s.rehearse == "1":
            self.log.event("recompiled", step=step, graphs=self.graphs - before)
            self.log.say(f"warning: step {step} compiled something that the rehearsal had not met")

    def validate(self, step: int, last: bool):
        self.report.flush()
        self.clock.stop()
        windows = self.schedule.final_windows() if last else self.schedule.windows(self.trainer.stage)
        loss, accuracy = evaluate(
            self.trainer.forward,
            self.val_shards,
            self.s,
            self.ranks,
            windows,
            self.trainer.tied,
            self.data.ahead,
        )
        self.validated = step
        self.report.validated(step, loss, accuracy, self.tokens, self.clock.ms())
        self.note_compilation(step)
        self.clock.start()

    def save(self, step: int) -> bool:
        """A checkpoint, off the clock; whether the disk took it. The run goes on if not."""
        self.report.flush()
        self.clock.stop()
        self.ranks.beat()  # the disk has all of DIST_TIMEOUT
        contents, saved, broken = self.trainer.export(), False, False
        if self.ranks.rank == 0:
            contents |= {
                "format": CHECKPOINT_FORMAT,
                "config": self.config,
                "run_id": self.s.run_id,
                "source_hash": source_hash(),
                "step": step,
                "tokens": self.tokens,
                "train_ms": self.clock.ms(),
                "reached": self.report.reached,
                "validated": self.validated,
                "position": list(self.data.position),
            }
            broken = not all(p["master"].isfinite().all() for p in contents["params"].values())
        if self.ranks.share(broken):  # the last good checkpoint must not make room for this one
            raise Diverged(step, "weight", math.nan)
        if self.ranks.rank == 0:
            try:
                self.log.sync()
                path = write_checkpoint(self.s.folder, contents)
                self.log.event("checkpoint", step=step, path=path)
                saved = True
            except OSError as error:
                self.log.event("save_failed", step=step, error=json.dumps(str(error)))
                self.log.say(f"warning: {error}; training goes on, checkpoints before it are kept")
        self.last_saved, saved = step, self.ranks.share(saved)
        self.ranks.beat()
        self.clock.start()
        return saved

    def finish(self) -> int:
        """The model for use elsewhere, and the log's last line. Exit code. Without its model a run is not
        finished: RESUME=auto then repeats what follows the last checkpoint."""
        where = {}
        if self.s.save_model and self.ranks.rank == 0:
            path = self.s.folder / MODEL_FILE
            try:
                save_model(
                    path, self.trainer.model, self.config, self.schedule.final_windows(), self.trainer.tied
                )
                where = {"model": path}
            except Exception as error:  # safetensors has errors of its own
                reason = f"{path} could not be written: {error}"
                self.log.say(f"error: {reason}; make room, then RESUME=auto ends the run")
                self.log.end("crashed", rank=0, error=json.dumps(reason))
                return 1
        self.log.end("finished", **where)
        return 0


class Start(NamedTuple):
    """What prepare() found out."""

    s: Settings
    o: "OptimizerSettings"
    model_config: ModelConfig
    config: dict  # all that decides the numbers of a run, as checkpoints hold it
    train_shards: list
    val_shards: list
    ranks: Ranks
    log: RunLog | None  # None if the run is over already
    origin: Origin  # with what the checkpoint holds on rank 0, {} in its place on the others


def choose_allocator():
    """Segments that grow do not fall to pieces between stages, whose shapes differ. Before the first question
    to CUDA, which fixes the allocator's options: the settings are read after it."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def prepare(env) -> Start:
    """Everything that can be refused is refused here, on all ranks together, before the first step."""
    choose_allocator()
    try:
        s, o, model_config = read_settings(env)
    except SettingsError as error:
        Ranks("cpu", settings=error)  # tells the others
        raise
    config = {
        **dataclasses.asdict(s),
        **dataclasses.asdict(o),
        "model_config": dataclasses.asdict(model_config),
    }
    run_id = env.get("RUN_ID", "")
    ranks = Ranks(s.device, s.dist_timeout, {**config, "run_id": run_id})
    train_shards, val_shards = ranks.together(lambda: open_data(s, ranks.world_size))
    config |= {
        "train_data": shard_fields(train_shards),
        "val_data": shard_fields(val_shards),
        "vocab_size": train_shards[0].vocab_size,
        "mark": train_shards[0].mark,
        "num_slices": count_slices(ranks.world_size),
    }
    origin = ranks.together(lambda: find_origin(s, config, run_id) if ranks.rank == 0 else None)
    shared = ranks.share(origin and origin._replace(saved=origin.saved and {}))
    origin, num_steps = origin or shared, Schedule(s, model_config).num_steps
    s = dataclasses.replace(s, run_id=origin.run_id)
    config["run_id"] = s.run_id
    log = (
        None
        if origin.ended is not None
        else ranks.together(lambda: RunLog(s.log, ranks.rank, num_steps, origin.resumed))
    )
    return Start(s, o, model_config, config, train_shards, val_shards, ranks, log, origin)


def write_beginning(start: Start):
    """The log's header, or its line about going on."""
    log, origin, config = start.log, start.origin, start.config
    attention, warning = choose_attention(start.s.attn_backend)
    started = {
        **provenance(start.ranks),
        "attn": attention,
        **{k: config[k] for k in ("train_data", "val_data")},
    }
    if not log.existed:
        settings = {k: v for k, v in config.items() if k not in started}
        log.header(settings, {"run_id": start.s.run_id, **started})
    if warning:
        log.event("warning", text=json.dumps(warning))
        log.say(f"warning: {warning}; FlashAttention-2 takes its place")
    for _, text in origin.damaged:
        log.event("checkpoint_damaged", error=json.dumps(text))
        log.say(f"warning: {text}; falling back to the one before it")
    if origin.resumed:
        set_aside(origin, start.s.folder)
        step = origin.saved["step"] if origin.saved else 0
        if origin.saved and origin.saved["source_hash"] != source_hash():
            text = f"the code is not that of the checkpoint (source_hash {origin.saved['source_hash']})"
            log.event("warning", text=json.dumps(text))
            log.say(f"warning: {text}")
        log.event("resumed", step=step, path=origin.path, **started)
        log.say(f"going on from step {step} ({origin.path})")


def main(argv: list[str], env=os.environ) -> int:
    """Exit code: 0 trained or stopped, 1 crashed, 2 refused what the user gave, 3 diverged."""
    if "--help" in argv or "-h" in argv:
        return print_help() or 0
    if "--settings-json" in argv:
        return print_settings_json() or 0
    try:
        if argv:
            raise SettingsError(f"arguments {argv}: settings are environment variables instead, see --help")
        start = prepare(env)
        if start.log is None:
            if start.ranks.rank == 0:
                show(f"{SCRIPT.name}: {start.s.log} is of a run that is over; nothing to do")
            return start.origin.ended
    except ValueError as error:
        return refuse(error)
    return supervise(start, Stop())


def refuse(error: ValueError) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        show(f"{SCRIPT.name}: {error}", file=sys.stderr)
    Ranks.close()
    return 2


def supervise(start: Start, stop: Stop) -> int:
    """Train, and whatever happens leave a last line in the log. Exit code."""
    s, log, ranks, saved = start.s, start.log, start.ranks, start.origin.saved

    def crashed(missing: dict[int, str], reason: str, otherwise: int | str):
        """From the rank whose error it is; if others went missing without a word, from the first left.
        otherwise: whose error it is if nobody is missing here."""
        if (not missing or watch.leads(missing)) and last_event(log.path) != "crashed":
            log.end("crashed", whoever=True, rank=next(iter(missing), otherwise), error=json.dumps(reason))

    def give_up(missing: dict[int, str], reason: str):
        crashed(missing, reason, "unknown")
        show(f"rank {ranks.rank} gives up: {reason}", file=sys.stderr)
        log.close()
        os._exit(1)  # the main thread hangs inside a collective

    watch = Watch(ranks, s.dist_timeout, stop, give_up)
    stop.listen()
    watch.start()
    try:
        if ranks.rank == 0:
            write_beginning(start)
        log.say(
            f"{SCRIPT.name}: {s.model} on {ranks.world_size} rank(s) of {ranks.device.type}, log {log.path}"
        )
        if s.rehearse == "1":
            log.say("rehearsing every stage (compiles; not counted as training time)")
            rehearse(s, start.o, start.model_config, start.train_shards, start.val_shards, ranks, stop)
        this = Run(start, stop)
        if saved is not None:
            this.resume(saved or None)
        code = this.train()
        watch.over.set()
        if code is None:
            code = this.finish()
    except CheckpointError as error:  # of a form that these parameters cannot take: found out by all ranks
        watch.over.set()
        log.end("crashed", error=json.dumps(str(error)))
        log.close()
        return refuse(error)
    except Diverged as error:
        log.end("diverged", step=error.step, **{error.name: f"{error.value:g}"})
        log.say(f"diverged: {error}")
        code = 3
    except BaseException as error:
        missing = {}
        if isinstance(error, RuntimeError) and ranks.world_size > 1:
            time.sleep(1)  # a rank that was killed needs a moment to be gone
            missing = watch.missing()
        cut_off = isinstance(error, dist.DistError) or "gloo" in str(error)  # by another host's doing
        crashed(
            missing,
            ", ".join([*missing.values(), f"{type(error).__name__}: {error}"]),
            "unknown" if cut_off else ranks.rank,
        )
        log.close()
        if ranks.device.type == "cuda" and ranks.world_size > 1:
            traceback.print_exc()  # closing the group would wait for collectives that the others never join
            sys.stderr.flush()
            os._exit(1)
        raise
    finally:
        watch.over.set()
        ranks.close()
    return log.close() or code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
