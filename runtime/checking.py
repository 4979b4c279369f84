"""All that can be decided and refused before a run starts: by the run itself, for run.sh, and for a sweep.

run.sh and the launcher ask a trainer, so that nobody judges by other rules than the run's own:

    python train_gpt.py --check-settings    checks the environment; prints what a shell is to export
    python train_gpt.py --check-arms        answers for a JSON list of environments on standard input
"""

import dataclasses
import functools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from data.shards import DataError, count_tokens, describe_shards, find_shards, own_shards
from runtime import checkpoints
from runtime.log_writer import refuse_existing
from runtime.ranks import is_amd, usable_cores
from runtime.settings import SettingsError, knobs, parse_value
from runtime.toolchain import check_compilers

MAKE_CORPUS = Path(__file__).resolve().parent.parent / "data/embedded_corpus.py"
LEAST_VAL_TOKENS = 1024
# Settings that decide whether data files will do; sweeps of a hundred arms have few combinations of them.
ABOUT_DATA = ("data_path", "train_files", "val_files", "val_tokens", "val_batch_tokens", "batch_sizes")
ABOUT_DATA += ("max_doc_tokens", "long_docs", "nproc_per_node", "slices", "model", "without")
ABOUT_DATA += ("batch_tokens", "row_tokens")  # a plain trainer's
AMD_NOTE = "this is an AMD GPU: plain torch runs, without float8, Triton kernels and varlen attention"


def read_run(module, env) -> tuple:
    """(settings, optimizer's settings, model config, notes for the log); SettingsError says what is wrong."""
    s, o, config = module.read_settings(env)
    check_compilers(s)
    s, notes = find_data(s, env, 16 * getattr(module, "VAL_SLICES", 1))
    if s.device == "cuda" and is_amd():
        notes = (*notes, AMD_NOTE)
    return s, o, config, notes


def find_data(s, env, unit: int) -> tuple:
    """(settings, notes), where what the environment leaves open follows the data that are there.

    Shards that lie in DATA_PATH itself are the run's. Validation shards with fewer tokens than VAL_TOKENS are
    read as far as whole batches go. unit: VAL_BATCH_TOKENS is a multiple of it.
    """
    if "DATA_PATH" in env and not {"TRAIN_FILES", "VAL_FILES"} & set(env):
        try:
            train_files, val_files = own_shards(s.data_path) or (s.train_files, s.val_files)
        except DataError as error:
            raise SettingsError(str(error)) from None
        s = dataclasses.replace(s, train_files=train_files, val_files=val_files)
    if {"VAL_TOKENS", "VAL_BATCH_TOKENS"} & set(env):
        return s, ()
    have = count_tokens(s.data_path, s.val_files) - 1  # the last token is only a target
    if not LEAST_VAL_TOKENS <= have < s.val_tokens:
        return s, ()
    changed = {}
    if not hasattr(s, "val_batch_tokens"):  # a plain trainer validates in batches of its training
        batch = s.batch_tokens
        if have < batch:
            return s, ()
    elif have >= s.val_batch_tokens:
        batch = s.val_batch_tokens
    else:
        batch = changed["val_batch_tokens"] = have // unit * unit
    tokens = have // batch * batch
    note = f"validation takes {tokens:,} tokens instead of {s.val_tokens:,}: the shards hold {have + 1:,}"
    return dataclasses.replace(s, val_tokens=tokens, **changed), (note,)


def fitting_ranks(s) -> int:
    """NPROC_PER_NODE, else the largest of 1, 2, 4, 8 that fits the GPUs or cores here."""
    available = torch.cuda.device_count() if s.device == "cuda" else usable_cores()
    if s.device == "cuda" and s.nproc_per_node > available:
        raise SettingsError(
            f"NPROC_PER_NODE={s.nproc_per_node}, but torch finds {available} CUDA devices here; start one "
            "rank per device, or set DEVICE=cpu"
        )
    return s.nproc_per_node or max(n for n in (1, 2, 4, 8) if n <= max(1, available))


def check_settings(module, env) -> int:
    """Check the environment as a run will, make the embedded corpus if it is wanted; print shell commands.

    Raises ValueError for what the run would refuse. Returns the exit code.
    """
    s, o, model_config, _ = read_run(module, env)
    s = dataclasses.replace(s, nproc_per_node=fitting_ranks(s))
    pattern = Path(s.data_path, s.train_files)
    if (
        "DATA_PATH" not in env
        and pattern.match("data/embedded/*")
        and not find_shards(s.data_path, s.train_files)
    ):
        subprocess.run([sys.executable, MAKE_CORPUS, "--out", pattern.parent], stdout=sys.stderr, check=True)
    train, val = module.open_data(s, s.nproc_per_node)
    config = describe_run(module, s, o, model_config, train, val, s.nproc_per_node)
    origin = checkpoints.find_origin(module, s, config, env.get("RUN_ID", ""))
    if not origin.resumed and origin.exit_code is None:
        refuse_existing(s.log)
    found = {"MODEL": s.model, "RUN_ID": origin.run_id, "NPROC_PER_NODE": str(s.nproc_per_node)}
    print("export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in found.items()))
    return 0


def check_arms(module, env) -> int:
    """Answer on standard output for the list of environments on standard input. Returns the exit code."""
    print(json.dumps(answer_for(module, env, json.load(sys.stdin))))
    return 0


def answer_for(module, env, arms: list[dict[str, str]]) -> list[dict]:
    """Say for each arm's environment what its values are, and what a run would refuse.

    "values": {setting: value in its own type}. "refused": why the settings are refused, or None. "data": why
    the data will not do, or None. Settings come from the list alone, the rest of the environment from `env`.
    """
    known = knobs(module.SETTINGS)
    env = {name: text for name, text in env.items() if name not in known}

    @functools.cache
    def data_refused(s) -> str | None:
        try:
            module.open_data(s, s.nproc_per_node or 1)
        except (ValueError, OSError) as error:
            return str(error)

    answers = []
    for arm in arms:
        answer = {"values": {}, "refused": None, "data": None}
        try:
            answer["values"] = {name: parse_value(name, text, known[name]) for name, text in arm.items()}
            s, *_ = read_run(module, {**env, **arm})
            blank = {f.name: f.default for f in dataclasses.fields(s) if f.name not in ABOUT_DATA}
            answer["data"] = data_refused(dataclasses.replace(s, **blank))
        except ValueError as error:
            answer["refused"] = str(error)
        answers.append(answer)
    return answers


def describe_run(module, s, o, model_config, train_shards, val_shards, world_size: int) -> dict:
    """All that decides the numbers of a run, as logs and checkpoints hold it."""
    return {
        **describe_settings(s, o, model_config),
        "train_data": describe_shards(train_shards),
        "val_data": describe_shards(val_shards),
        "vocab_size": train_shards[0].vocab_size,
        "mark": train_shards[0].mark,
        "num_slices": module.count_slices(s, world_size),
    }


def describe_settings(s, o, model_config) -> dict:
    """The resolved settings and the model's config as one dictionary."""
    return {
        **dataclasses.asdict(s),
        **dataclasses.asdict(o),
        "model_config": dataclasses.asdict(model_config),
    }
