"""Every setting marked `training` changes the numbers of a short run, or there is a reason why not here."""

import functools
import itertools

import pytest
from helpers import (
    BYTES_VOCAB,
    SMALL_STEPS,
    SMALL_WINDOWS,
    lone_ranks,
    make_text,
    small_config,
    train_steps,
    write_shard,
)

import train_gpt
import train_gpt_muon_ord
import train_gpt_simple
from runtime.settings import OF_SOME_TRAINERS, OUR_PREFIXES, SettingsError, knobs
from runtime.supervise import Start, StopRequest

ADAMW = {"OPTIMIZER": "adamw"}
TWO_DECAYS = {"LR_DECAY_SECOND_TYPE": "linear", "LR_DECAY_SWITCH_STEP": "8"}
EXPERTS = {"MODEL": "moe-tiny"}
POST = {"ORD_MODE": "post"}
BRAKE = {"ORD_MODE": "brake", "SPECTRAL_OUT": "0.5", "SPECTRAL_RESCALE": "0"}
PROJECT, ROWS = {"ORD_MODE": "project"}, {"ORD_MODE": "rows"}
FLOOR = {"ORD_MODE": "floor", "SPECTRAL_FLOOR": "3"}  # above the ratio of the updates
# (another value, what the setting needs beside it)
ANY_TRAINER = {"SEED": ("1", {}), "TRAIN_FILES": ("train_1.bin", {}), "VAL_FILES": ("train_1.bin", {})}
ANY_TRAINER |= {"VAL_TOKENS": ("1024", {})}
TWINS = {
    **ANY_TRAINER,
    "MODEL": ("tiny-wide", {}),
    "VAL_BATCH_TOKENS": ("2048", {}),
    "MAX_DOC_TOKENS": ("32", {}),
    "LONG_DOCS": ("split", {}),
    "NUM_SCHEDULED_ITERATIONS": ("9", {}),
    "NUM_EXTENSION_ITERATIONS": ("2", {}),
    "TRAIN_TOKENS": ("2048", {}),
    "BATCH_SIZES": ("256,512,512,512", {}),
    "SLICES": ("16", {}),
    "RESIDUAL_SCALE": ("0.5", {}),
    "NGRAMS": ("3", {}),
    "NGRAM_ROWS": ("50", {}),
    "WITHOUT": ("value_std", {}),
    "NUM_EXPERTS": ("4", EXPERTS),
    "MOE_TOP_K": ("3", EXPERTS),
    "MOE_BALANCE_WEIGHT": ("0.5", EXPERTS),
    "ROUTER_NOISE": ("0.5", EXPERTS),
    "ROUTER_LR": ("0.01", EXPERTS),
    "LR_MULS": ("1,1.1,1.2,1", {}),
    "WARMUP_STEPS": ("3", {}),
    "COOLDOWN_FRAC": ("0.3", {}),
    "LR_DECAY_TYPE": ("cosine", {}),
    "LR_DECAY_FINAL": ("0.3", {}),
    "LR_DECAY_SECOND_TYPE": ("exp", TWO_DECAYS),
    "LR_DECAY_SWITCH_STEP": ("9", TWO_DECAYS),
    "LR_DECAY_SECOND_FINAL": ("0.3", TWO_DECAYS),
    "OPTIMIZER": ("muon", {}),
    "MUON_LR": ("0.01", {}),
    "MUON_MOMENTUM": ("0.9", {}),
    "MUON_WARMUP_STEPS": ("6", {}),
    "MUON_BETA2": ("0.8", {}),
    "BETA_WARMUP_STEPS": ("5", {}),
    "MUON_WEIGHT_DECAY": ("0.1", {}),
    "MUON_DECAY_MODE": ("none", {}),
    "ADAM_LR": ("0.01", {}),
    "ADAM_WEIGHT_DECAY": ("0.5", {}),
    "ADAM_MATRIX_LR": ("0.001", ADAMW),
    "ADAM_MATRIX_DECAY": ("10", ADAMW),
    "GRAD_CLIP": ("0.1", {}),
}
ORD_ALONE = {
    "ORD_MODE": ("project", {}),
    "SPECTRAL_LR_MUL": ("0.5", {}),
    "SPECTRAL_LR_MUL_ATTN": ("0.5", {}),
    "SPECTRAL_LR_MUL_MLP": ("0.5", {}),
    "SPECTRAL_PROJ_EPS": ("1", {}),
    "SPECTRAL_RHO_MODE": ("row", {}),
    "SPECTRAL_SCALE": ("unit", {}),
    "SPECTRAL_VARIANCE": ("1", {}),
    "SPECTRAL_OUT": ("0.5", POST),
    "SPECTRAL_IN": ("0.5", POST),
    "SPECTRAL_RESCALE": ("1", POST),
}
SIMPLE = {
    **ANY_TRAINER,
    "MODEL": ("tiny-wide", {}),
    "BATCH_TOKENS": ("256", {}),
    "ROW_TOKENS": ("64", {}),
    "NUM_SCHEDULED_ITERATIONS": ("9", {}),
    "COOLDOWN_FRAC": ("0.3", {}),
    "MUON_COOLDOWN_FRAC": ("0.3", {}),
    "START": ("sphere", {}),
    "OPTIMIZER": ("normuon", {}),
    "MUON_LR": ("0.01", {}),
    "MUON_MOMENTUM": ("0.9", {}),
    "MUON_WEIGHT_DECAY": ("0.5", {}),
    "MUON_DECAY_MODE": ("update", {}),
    "ADAM_EMBED_LR": ("0.1", {}),
    "ADAM_HEAD_LR": ("0.01", {}),
    "ADAM_SCALAR_LR": ("0.1", {}),
    "ORD_MODE": ("project", {}),
    "SPECTRAL_LR_MUL": ("0.5", PROJECT),
    "SPECTRAL_PROJ_EPS": ("1", PROJECT),
    "SPECTRAL_SCALE": ("unit", PROJECT),
    "SPECTRAL_RHO_MODE": ("row", PROJECT),
    "SPECTRAL_OUT": ("0", BRAKE),
    "SPECTRAL_IN": ("0", BRAKE),
    "SPECTRAL_RESCALE": ("1", BRAKE),
    "SPECTRAL_FLOOR": ("4", FLOOR),
    "SPECTRAL_FLOOR_MODE": ("row", FLOOR),
    "SPECTRAL_GAIN_LR": ("0.1", ROWS),
}
ELSEWHERE = {
    "DEVICE": "takes a GPU; test_gpu_path has which device it means",
    "DISABLE_FP8": "a CPU has no float8 product; test_gpu_path has who gets one",
    "SPECTRAL_SCHEDULE": "acts from step 50 on: test_update_rules has its formula",
}


TABLES = {train_gpt: TWINS, train_gpt_muon_ord: {**TWINS, **ORD_ALONE}, train_gpt_simple: SIMPLE}
# the twins share what reads the settings that both have
ROWS_TO_RUN = [(train_gpt, TWINS), (train_gpt_muon_ord, ORD_ALONE), (train_gpt_simple, SIMPLE)]
ROWS_TO_RUN = [(trainer, name, *row) for trainer, table in ROWS_TO_RUN for name, row in table.items()]


@pytest.mark.parametrize("trainer", TABLES)
def test_every_setting_has_a_row(trainer):
    """Fails if a new setting has no row in the tables above."""
    affects = {name: field.metadata["affects"] for name, field in knobs(trainer.SETTINGS).items()}
    training = {name for name, kind in affects.items() if kind == "training"}
    assert training == TABLES[trainer].keys() | (ELSEWHERE.keys() & training)


def test_settings_of_other_trainers_are_refused():
    """Fails if a setting that one trainer has, and another lacks, is ignored there without a word. The four
    names left out are words that other programs may well use."""
    names = {trainer: set(knobs(trainer.SETTINGS)) for trainer in TABLES}
    some = set.union(*names.values()) - set.intersection(*names.values())
    some = {name for name in some if not name.startswith(OUR_PREFIXES)}
    assert some - {"KERNELS", "SLICES", "START", "WITHOUT"} == OF_SOME_TRAINERS
    for trainer, known in names.items():
        lacking = OF_SOME_TRAINERS - known
        for name in lacking | {name.lower() for name in lacking}:
            said = f"^{name} is a setting of another trainer; {trainer.SCRIPT.name} has no such setting"
            with pytest.raises(SettingsError, match=said):
                trainer.read_settings({"DEVICE": "cpu", "MODEL": "tiny", name: "1"})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Folder with made-up shards."""
    folder = tmp_path_factory.mktemp("text")
    for i, (name, size) in enumerate((("train_0", 9000), ("train_1", 9000), ("val_0", 3000))):
        write_shard(folder / f"{name}.bin", make_text(size, seed=i))
    return folder


def small_presets(trainer) -> dict:
    """Presets of small models and short runs."""
    changes = dict(train_files="train_0.bin", val_files="val_0.bin", val_tokens=2048)
    changes |= dict(num_scheduled_iterations=SMALL_STEPS)
    if trainer is train_gpt_simple:
        changes |= dict(batch_tokens=512, row_tokens=32)
        sizes = dict(num_layers=2, num_heads=2, head_dim=8)
        return {
            "tiny": (trainer.ModelConfig(width=16, **sizes), changes),
            "tiny-wide": (trainer.ModelConfig(width=24, **sizes), changes),
        }
    changes |= dict(batch_sizes=(256, 256, 512, 512), val_batch_tokens=1024, max_doc_tokens=(64,) * 4)
    changes |= dict(num_extension_iterations=1, muon_warmup_steps=4)
    config = functools.partial(small_config, trainer, windows=SMALL_WINDOWS, value_std=0.01)
    return {
        "tiny": (config(), changes),
        "tiny-wide": (config(width=24), changes),
        "moe-tiny": (config(num_experts=8, expert_hidden=8), {**changes, "num_experts": 8}),
    }


def numbers_of(trainer, folder, env: dict):
    """Yield the training losses of a run in this process, then its validation loss."""
    s, o, config = trainer.read_settings({"DEVICE": "cpu", "MODEL": "tiny", "DATA_PATH": str(folder), **env})
    made = {"vocab_size": BYTES_VOCAB}, *trainer.open_data(s, 1), lone_ranks()
    run = trainer.Run(Start(trainer.SCRIPT, s, o, config, *made, None, None), StopRequest())
    num_steps = trainer.Schedule(s, config).num_steps
    for step in range(num_steps):
        if trainer is train_gpt_simple:
            yield run.step(step, run.cut(run.data.next())).item()
        else:
            yield train_steps(run.trainer, run.data, step, step + 1)[0]
    yield run.validate()[0] if trainer is train_gpt_simple else run.validate(num_steps)[0]


def differ(one, other) -> bool:
    """Return whether two runs do, computing them only as far as that takes."""
    return any(a != b for a, b in itertools.zip_longest(one, other))


@pytest.mark.parametrize(
    "trainer, needs",
    [
        (train_gpt, {**EXPERTS, "NUM_SCHEDULED_ITERATIONS": "3"}),
        (train_gpt_muon_ord, {}),
        (train_gpt_simple, {}),
    ],
)
def test_the_same_settings_give_the_same_numbers(trainer, needs, text, monkeypatch):
    """Fails if the runs differ by themselves, so that the next test would prove nothing."""
    monkeypatch.setattr(trainer, "PRESETS", small_presets(trainer))
    assert not differ(numbers_of(trainer, text, needs), numbers_of(trainer, text, needs))


@pytest.mark.parametrize(
    "trainer, name, value, needs", ROWS_TO_RUN, ids=[f"{row[0].__name__}-{row[1]}" for row in ROWS_TO_RUN]
)
def test_another_value_gives_other_numbers(trainer, name, value, needs, text, monkeypatch):
    """Fails if a setting is read and logged, but never reaches model, data, optimizer or schedule."""
    monkeypatch.setattr(trainer, "PRESETS", small_presets(trainer))
    assert differ(numbers_of(trainer, text, needs), numbers_of(trainer, text, {**needs, name: value}))
