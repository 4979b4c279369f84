"""Helpers of the trainers' tests: settings, made-up shards, whole runs in their own processes, ranks without
processes, parameters without a model."""

import contextlib
import dataclasses
import errno
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from forked import PATIENCE_S, run_forked
from torch import nn

import train_gpt
import train_gpt_muon_ord
from kernels import fast_forms
from runtime import checkpoints
from runtime.compiling import not_compiled
from runtime.log_writer import BAR
from runtime.ranks import Done, Ranks

ROOT = Path(__file__).resolve().parent.parent
BASELINE, ORD = "train_gpt.py", "train_gpt_muon_ord.py"
TRAINERS = (train_gpt, train_gpt_muon_ord)
MARK, BYTES_VOCAB = 0, 256
WAYS_OF_ORD = {
    "interpolate": {},
    "project": {"ORD_MODE": "project"},
    "unit": {"SPECTRAL_SCALE": "unit"},
    "post": {"ORD_MODE": "post", "SPECTRAL_OUT": "0.5", "SPECTRAL_RESCALE": "1"},
    "adaptive": {"SPECTRAL_SCHEDULE": "adaptive", "ORD_MODE": "project"},
    "row variance": {"SPECTRAL_RHO_MODE": "row", "SPECTRAL_VARIANCE": "1"},
    "off": {"ORD_MODE": "off"},
}
MAGIC, VERSION = 20240520, 1  # of a shard


def read(trainer, **env):
    """Read (Settings, OptimizerSettings, ModelConfig) from an environment of only `env`, on the CPU."""
    return trainer.read_settings({"DEVICE": "cpu", "MODEL": "tiny", **{k: str(v) for k, v in env.items()}})


def optimizer_settings(trainer, **env):
    """Read the optimizer's settings, over the speedrun's defaults."""
    return read(trainer, **{"MODEL": "gpt2-small", **env})[1]


def write_shard(path, tokens, vocab_size=BYTES_VOCAB, magic=MAGIC):
    """Write a shard file. vocab_size 0 is a public GPT-2 shard."""
    header = np.zeros(256, dtype="<i4")
    header[:4] = magic, VERSION, len(tokens), vocab_size
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def make_tokens(lengths, seed=0, vocab_size=BYTES_VOCAB, mark=MARK):
    """Make documents of random tokens with these lengths, mark included."""
    tokens = np.random.default_rng(seed).integers(1, vocab_size, sum(lengths))
    tokens[np.cumsum([0, *lengths[:-1]])] = mark
    return tokens.astype(np.uint16)


def make_text(num_tokens, seed=0, longest=200, predictable=0.9):
    """Make learnable documents: mostly, a token is its predecessor plus 7."""
    rng = np.random.default_rng(seed)
    out = []
    while len(out) < num_tokens:
        out.append(MARK)
        token = int(rng.integers(1, BYTES_VOCAB))
        for _ in range(int(rng.integers(3, longest))):
            out.append(token)
            fresh = rng.random() > predictable
            token = int(rng.integers(1, BYTES_VOCAB)) if fresh else (token + 6) % (BYTES_VOCAB - 1) + 1
    return np.array(out[:num_tokens], dtype=np.uint16)


def make_chain(num_tokens: int, seed: int) -> np.ndarray:
    """Make documents of a Markov chain over bytes, four successors each: learned in a few steps."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(0).integers(1, 256, (256, 4))
    tokens, choices, state = np.empty(num_tokens, dtype=int), rng.integers(0, 4, num_tokens), 1
    breaks = set(rng.integers(1, num_tokens, num_tokens // 300).tolist()) | {0}
    for i in range(num_tokens):
        state = tokens[i] = 0 if i in breaks else int(table[state, choices[i]])
    return tokens


def base_env(shards: Path, **settings) -> dict:
    """Environment of a 14-step run of the tiny preset on made shards, isolated from ours."""
    keep = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG")
    env = {k: v for k, v in os.environ.items() if k in keep}
    env.update(
        MODEL="tiny",
        DEVICE="cpu",
        COMPILE="0",
        DATA_PATH=str(shards),
        TRAIN_FILES="made_train_*.bin",
        VAL_FILES="made_val_*.bin",
        VAL_TOKENS="2048",
        VAL_BATCH_TOKENS="1024",
        VAL_LOSS_EVERY="5",
        NUM_SCHEDULED_ITERATIONS="14",
        BATCH_SIZES="512,512,1024,1024",
        OMP_NUM_THREADS="1",
    )
    if settings.get("OPTIMIZER") != "adamw":
        env["MUON_WARMUP_STEPS"] = "5"
    env.update({k: str(v) for k, v in settings.items()})
    return env


def run(cwd: Path, script: str, env: dict | list, ranks: int = 1, extra: tuple = ()):
    """Run a script in folder cwd to its end: forked, or by torchrun if `extra` has options for it."""
    if not extra:
        return run_forked(cwd, str(ROOT / script), env, ranks)
    argv = command(script, ranks, extra)
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S)


def command(script: str, ranks: int, extra: tuple = ()) -> list[str]:
    """Command that starts a script by torchrun, or with ranks=0 by plain python."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", *(extra or ("--standalone",)))
    return [
        *(torchrun if ranks else ()),
        *((f"--nproc-per-node={ranks}",) if ranks else (sys.executable,)),
        str(ROOT / script),
    ]


def call(main, arguments: list, encoding: str = "utf-8", given: bytes = b"") -> subprocess.CompletedProcess:
    """Call a command's main in this process, on a console of this encoding; stdin holds `given`."""
    streams = [io.TextIOWrapper(io.BytesIO(data), encoding) for data in (given, b"", b"")]
    with mock.patch.multiple(sys, stdin=streams[0], stdout=streams[1], stderr=streams[2]):
        try:
            code = main([os.fsdecode(argument) for argument in arguments])
        except SystemExit as error:  # argparse
            code = error.code
    for stream in streams[1:]:
        stream.flush()
    return subprocess.CompletedProcess(arguments, code, *(s.buffer.getvalue() for s in streams[1:]))


def losses(cwd: Path, run_id: str, kind: str = "val_loss") -> list[float]:
    text = (cwd / "logs" / f"{run_id}.txt").read_text()
    text = text.rpartition(f"\n{BAR}\n")[2]  # sources in the header may hold lines that look like steps
    return [float(x) for x in re.findall(rf"^step:\d+/\d+ {kind}:(\S+)", text, re.M)]


def train(cwd, shards, run_id, script=BASELINE, ranks=0, **settings) -> tuple[list[float], list[float]]:
    """Run a script to its end; return (validation losses, training losses)."""
    done = run(cwd, script, base_env(shards, RUN_ID=run_id, **settings), ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "event:finished" in (cwd / "logs" / f"{run_id}.txt").read_text()
    return losses(cwd, run_id), losses(cwd, run_id, "train_loss")


def copy_project(folder: Path):
    """Copy the trainers and what they import, so that edits to one do not affect the other."""
    for script in (BASELINE, ORD):
        shutil.copy(ROOT / script, folder)
    for package in ("data", "kernels", "runtime"):
        (folder / package).mkdir()
        for path in (ROOT / package).glob("*.py"):
            shutil.copy(path, folder / package)


def lone_ranks(rank=0, world_size=1):
    """Make the Ranks of a single process, without a process group.

    With world_size > 1 it behaves as one of several ranks whose gradients are all zero but its own: so one
    process can compute any rank's share.
    """

    class Lone(Ranks):
        def __init__(self):
            self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")
            self.local_rank, self.local_world_size = rank, world_size

        def all_reduce(self, *args, **kwargs):
            return Done()

        reduce_scatter = all_gather = all_reduce

    return Lone()


MATRIX_NAMES = (".q", ".k", ".v", ".o", ".up", ".down")


def small_config(trainer, **changes):
    """Make a minimal config with every feature of the speedrun's model."""
    return trainer.ModelConfig(
        **{
            **dict(
                num_layers=4,
                width=16,
                num_heads=4,
                head_dim=8,
                num_kv_heads=4,
                window_block=8,
                windows=((1, 2),) * 4,
                final_windows=(1, 2),
                long_layers=(3,),
                paired_layers=(0,),
                value_embed_layers=(0, 3),
                skip=(0, 2),
                no_attention=(2,),
                backout=1,
                ngram_rows=61,
                predict=(((1, 1), (0.5, 0)),) * 4,
                untie_frac=2 / 3,
            ),
            **changes,
        }
    )


def shortened(preset: str):
    """Cut the preset's config to three layers (the speedrun's: one without attention) and few n-gram rows."""
    config, _ = train_gpt.PRESETS[preset]
    if not config.skip:
        return dataclasses.replace(config, num_layers=3)
    return dataclasses.replace(
        config,
        num_layers=3,
        long_layers=(1,),
        paired_layers=(0,),
        skip=(0, 2),
        value_embed_layers=(0,),
        no_attention=(2,),
        backout=1,
        ngram_rows=1024,
    )


def small_model(trainer, seed=0, vocab_size=100, float8_head=False, residual_scale=1.0, **changes):
    """Make a GPT of small_config with freshly drawn weights."""
    model = trainer.GPT(small_config(trainer, **changes), vocab_size, "sdpa", residual_scale, float8_head)
    model.init_weights(torch.Generator().manual_seed(seed))
    model.rotary.make_tables(512)
    return model


def save_model(path, model, vocab_size=100, windows=(8, 16), tied=False):
    """Save a model of train_gpt.py as a run does at its end."""
    facts = dict(vocab_size=vocab_size, mark=MARK, residual_scale=1.0, rotary_scale=model.rotary.scale)
    facts |= dict(config=dataclasses.asdict(model.config), windows=windows, tied=tied, script=BASELINE)
    checkpoints.save_model(path, model, facts)


def make_optimizer(trainer, model, o, num_steps=200, ranks=None):
    """Make an uncompiled Optimizer, by default for one rank. 200 steps, the last 50 of which differ."""
    return trainer.Optimizer(model, o, ranks or lone_ranks(), num_steps, not_compiled)


def trainer_on(trainer, config=None, ranks=None, **env):
    """Make (Trainer, its data) in this process: of the settings' preset, or of this config."""
    s, o, preset = read(trainer, **env)
    ranks = ranks or lone_ranks()
    made = trainer.Trainer(s, o, config or preset, BYTES_VOCAB, ranks)
    return made, trainer.TrainData(trainer.open_data(s, 1)[0], s, ranks)


SMALL_STEPS = 12  # of a small_trainer: stages of four, the head untied at step 9
SMALL_WINDOWS = ((1, 1), (1, 2), (2, 3), (2, 3))


def small_trainer(trainer, folder, seed=0, config=None, **env):
    """Make (Trainer, its data) of this config, by default one with every feature, on text in this folder."""
    if not (folder / "train_0.bin").exists():
        write_shard(folder / "train_0.bin", make_text(9000, 1))
        write_shard(folder / "val_0.bin", make_text(3000, 2))
    text = dict(DATA_PATH=folder, TRAIN_FILES="train_*.bin", VAL_FILES="val_*.bin", MAX_DOC_TOKENS=64)
    sizes = dict(BATCH_SIZES="256,256,512,512", VAL_TOKENS=2048, VAL_BATCH_TOKENS=1024)
    common = dict(text, **sizes, NUM_SCHEDULED_ITERATIONS=SMALL_STEPS, SEED=seed)
    config = config or small_config(trainer, windows=SMALL_WINDOWS)
    return trainer_on(trainer, config, **{**common, **env})


LATER_HEADS = 4
FACTORS = dict(branch_factors=True)
GATES = dict(branch_factors=True, gate_layers=(0, 2), xsa_layers=(1, 3))
LATER = dict(  # all parts of the later records
    GATES,
    qk_group=2,
    value_std=0.01,
    value_gate_reads_table=True,
    ngram_signs=17,
    attn_source=3,
    mudd=(1, 3),
    compose_tokens=7,
    prefix_weights=((0.25, 0.25), (0.25, 0), (0, 0), (0, 0)),
)


def later_config(trainer, **changes):
    """Config of six small layers with every feature of the speedrun's model, plus these changes."""
    fields = dict(
        num_layers=6,
        width=32,
        num_heads=LATER_HEADS,
        num_kv_heads=LATER_HEADS,
        head_dim=8,
        window_block=8,
        windows=((1, 2),) * 4,
        final_windows=(1, 2),
        long_layers=(1, 5),
        paired_layers=(0, 4),
        value_embed_layers=(1, 4, 5),
        skip=(1, 2),
        no_attention=(2,),
        backout=None if changes.get("mudd") else 3,
        ngram_rows=61,
        predict=(((1, 1), (0.5, 0)),) * 4,
    )
    return trainer.ModelConfig(**{**fields, **changes})


def later_trainer(trainer, folder, seed=0, changes=LATER, **env):
    """Make (Trainer of a small model with all parts of the later records, its data)."""
    config = later_config(trainer, **changes, windows=SMALL_WINDOWS)
    own = dict(MAX_DOC_TOKENS="24,32,32,64", LONG_DOCS="cut", MUON_BETA2=0.9)
    return small_trainer(trainer, folder, seed, config, **own, **env)


def train_steps(run, data, first, last) -> list[float]:
    """Train steps first to last - 1; return their mean losses."""
    found, schedule = [], run.schedule
    for step in range(first, last):
        run.enter(step)
        batches = data.next(schedule.batch(step), schedule.batch(step + 1))
        found.append(run.step(step, batches).item() / schedule.batch_tokens(step))
    return found


def fill_disk(monkeypatch):
    """Let nothing more reach the disk."""

    def fsync(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@contextlib.contextmanager
def cpu_forms(trainer):
    """Install the fast forms of a CPU run; all of them must fit."""
    s, o, _ = read(trainer)
    with fast_forms.installed(trainer, s, o) as (names, warnings):
        assert len(names) == len(fast_forms.CPU_FORMS) and not warnings
        yield


@contextlib.contextmanager
def triton_forms(trainer, o=None):
    """Install the fast forms of a GPU run with these optimizer settings."""
    s, defaults, _ = read(trainer)
    s = dataclasses.replace(s, kernels="triton")
    with fast_forms.installed(trainer, s, o or defaults) as (names, warnings):
        assert names and not warnings
        yield names


FORMS = {"fast": cpu_forms, "plain": contextlib.nullcontext}  # a CPU's fast forms, or the trainer's own code


class Params:
    """Stand-in for a model with what the optimizer needs: named parameters."""

    def __init__(self, values: dict, dtype=torch.float32):
        self.params = {n: nn.Parameter(torch.tensor(v, dtype=dtype)) for n, v in values.items()}

    def named_parameters(self):
        return self.params.items()

    def numpy(self, name):
        return self.params[name].detach().double().numpy()

    def add_grads(self, grads: dict):
        """Accumulate gradients like backward, onto those that the optimizer has not cleared."""
        for name, grad in grads.items():
            self.params[name].grad += torch.as_tensor(grad).to(self.params[name].dtype)
