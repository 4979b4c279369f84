"""Settings as environment variables: reading, checking, --help and --settings-json.

A trainer lists its settings as fields of frozen dataclasses, one `knob` each. The variable is named as the
field in capitals. A preset may change defaults; the environment has the last word.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path

OUR_PREFIXES = ("SPECTRAL_", "ORD_", "MUON_", "ADAM_", "MOE_", "LR_DECAY_", "VAL_LOSS_", "NUM_SCHEDULED_")
# Names close to a short setting's that other programs may well use.
NOT_MEANT = {"COMPILED", "COMPILER", "DEVICES", "KERNEL", "MODE", "MODELS", "SEEDS", "SPEED"}
# Settings that some trainers lack, and whose names have no prefix of ours. Other programs may well use
# KERNELS, SLICES, START and WITHOUT, so these are left out.
OF_SOME_TRAINERS = {"ATTN_BACKEND", "BATCH_SIZES", "BATCH_TOKENS", "BETA_WARMUP_STEPS", "DISABLE_FP8"}
OF_SOME_TRAINERS |= {"GRAD_CLIP", "LONG_DOCS", "LR_MULS", "MAX_DOC_TOKENS", "NGRAMS", "NGRAM_ROWS"}
OF_SOME_TRAINERS |= {"NUM_EXPERTS", "NUM_EXTENSION_ITERATIONS", "PASS_TOKENS", "RESIDUAL_SCALE", "ROUTER_LR"}
OF_SOME_TRAINERS |= {"ROUTER_NOISE", "ROW_TOKENS", "TRAIN_TOKENS", "VAL_BATCH_TOKENS", "WARMUP_STEPS"}
TYPE_NAMES = {
    str: "str",
    bool: "bool",
    int: "int",
    float: "float",
    tuple[int, ...]: "int,...",
    tuple[float, ...]: "float,...",
}
BOOLS = {"0": False, "false": False, "1": True, "true": True}


class SettingsError(ValueError):
    """Settings that cannot be used: what was found, what was wanted, what to do. Exit code 2."""


def knob(default, help: str, *, affects: str = "training", rare: bool = False, only=None, **limits):
    """Define one setting.

    affects: what a change of the setting changes. "training": the numbers of a run. "recording": what is
        written down. "machine": where and how it runs. Resuming, grouping runs into arms and skipping
        finished runs all go by this mark.
    rare: listed last in --help.
    only: (another setting, its values with which this one does something); with others it is refused, unless
        it has its default.
    limits: low and high (inclusive), above (exclusive), choices.
    """
    assert affects in ("training", "recording", "machine"), affects
    return dataclasses.field(
        default=default, metadata={"help": help, "affects": affects, "rare": rare, "only": only, **limits}
    )


recording_knob = functools.partial(knob, affects="recording")
machine_knob = functools.partial(knob, affects="machine")


EMBEDDED = {  # defaults of a preset that trains on the embedded corpus
    "train_files": "data/embedded/embedded_train_*.bin",
    "val_files": "data/embedded/embedded_val_*.bin",
    "val_tokens": 131_072,
    "val_loss_every": 100,
    "val_loss_last_steps": 0,
    "target_loss": 1.0,
}


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Settings that any run has: a name, a place, data files, times of validation, checkpoints."""

    run_id: str = recording_knob("", "name of the log logs/RUN_ID.txt; empty: time, model and seed")
    seed: int = knob(0, "whatever is drawn at random", low=0, high=2**62)
    model: str = knob("auto", "preset; auto: by the device")
    device: str = knob("auto", "auto: cuda where there is one", choices=("auto", "cuda", "cpu"))
    nproc_per_node: int = machine_knob(0, "ranks that run.sh starts; 0: by GPUs or cores", low=0, high=1024)
    compile: str = machine_knob("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    data_path: str = machine_knob(".", "folder that TRAIN_FILES and VAL_FILES are relative to")
    train_files: str = knob("data/fineweb10B/fineweb_train_*.bin", "glob of training shards")
    val_files: str = knob("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    val_tokens: int = knob(10_485_760, "validation tokens, from the start of the shards", low=1024)
    val_loss_every: int = recording_knob(50, "steps between validations; 0: only near the end", low=0)
    val_loss_last_steps: int = recording_knob(100, "last steps that are validated more often", low=0)
    val_loss_every_last: int = recording_knob(10, "steps between those validations; 0: as before", low=0)
    target_loss: float = recording_knob(3.28, "validation loss to reach, nats per token", above=0)
    manifold_every: int = recording_knob(0, "steps between measurements of spectra; 0: none", low=0)
    diverged_above: float = recording_knob(0.0, "loss that ends a run; 0: 2 ln(V)", low=0, rare=True)
    save_every: int = recording_knob(0, "steps between checkpoints; 0: only when stopped", low=0)
    resume: str = recording_knob("", "auto: from RUN_ID's last checkpoint, if any; or a checkpoint's path")
    save_model: bool = recording_knob(True, "write logs/RUN_ID/model.safetensors at the end")
    dist_timeout: float = machine_knob(
        900.0, "seconds without progress that end a rank", low=5, high=1e6, rare=True
    )

    @property
    def log(self) -> Path:
        return Path("logs") / f"{self.run_id}.txt"

    @property
    def folder(self) -> Path:
        """Folder of checkpoints and the trained model."""
        return Path("logs") / self.run_id

    def resolved(self, model: str, device: str, script: Path):
        """These settings with every 'auto', and an empty RUN_ID, replaced by its meaning on this machine."""
        if self.run_id and (not is_file_name(self.run_id) or self.run_id.endswith(".txt")):
            raise SettingsError(
                f"RUN_ID={self.run_id!r}: wanted a file name of at most 200 letters, digits and . _ - = , + "
                "that begins with a letter or digit, without the .txt of its log"
            )
        compile, run_id = self.compile, self.run_id
        if compile == "auto":
            compile = "1" if device == "cuda" else "0"
        if not run_id:
            run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{script.stem}-{model}-seed{self.seed}"
        return dataclasses.replace(self, model=model, device=device, compile=compile, run_id=run_id)

    def validates(self, step: int, num_steps: int) -> bool:
        """Return whether there is a validation after `step` of num_steps steps."""
        left = num_steps - step
        near_end = self.val_loss_every_last and left < self.val_loss_last_steps
        if left == 0 or (near_end and left % self.val_loss_every_last == 0):
            return True
        return self.val_loss_every > 0 and step % self.val_loss_every == 0


def choose_model(env: Mapping[str, str], presets: dict, default: str) -> str:
    """The preset that MODEL names; `default` for auto."""
    model = env.get("MODEL", "auto")
    if model not in ("auto", *presets):
        raise SettingsError(f"MODEL={model!r}: wanted one of auto, {', '.join(presets)}")
    return default if model == "auto" else model


def describe(config) -> str:
    """A preset's ModelConfig in words."""
    text = f"{config.num_layers} layers of width {config.width}, {config.num_heads} heads"
    if getattr(config, "num_experts", 0):
        text += f", {config.num_experts} experts of {config.expert_hidden}"
    return text


def knobs(classes) -> dict[str, dataclasses.Field]:
    """{variable name: field} of all settings in these dataclasses."""
    return {f.name.upper(): f for c in classes for f in dataclasses.fields(c)}


def not_training(classes) -> dict[str, list[str]]:
    """{"recording": names, "machine": names}: the settings that do not change the numbers."""
    fields = knobs(classes).values()
    return {
        kind: [f.name for f in fields if f.metadata["affects"] == kind] for kind in ("recording", "machine")
    }


def read(classes, env: Mapping[str, str], defaults: dict, script: str) -> list:
    """One instance of each class: the environment over `defaults` over the fields' own defaults.

    Raises SettingsError for a wrong value, for one that does nothing with the others, and for a variable that
    looks like a misspelt setting.
    """
    fields = knobs(classes)
    refuse_lookalikes(env, list(fields), script)
    unset = {f.name: defaults.get(f.name, f.default) for f in fields.values()}
    given = {f.name: parse_value(name, env[name], f) for name, f in fields.items() if name in env}
    values = {**unset, **given}
    for name, f in fields.items():
        if f.metadata["only"] is None:
            continue
        other, wanted = f.metadata["only"]
        if values[other] not in wanted and values[f.name] != unset[f.name]:
            value, having = as_text(values[f.name]), as_text(values[other]) or "''"
            raise SettingsError(
                f"{name}={value} does nothing with {other.upper()}={having}; it needs {' or '.join(wanted)}"
            )
    return [c(**{f.name: values[f.name] for f in dataclasses.fields(c)}) for c in classes]


def parse_value(name: str, text: str, field: dataclasses.Field):
    """Parse and check one environment variable; SettingsError if it does not fit its field."""
    if not text.strip() and field.default is None:
        return None
    try:
        value = parse(text, field.type)
        fits = within_limits(value, field.metadata)
    except (KeyError, ValueError):
        fits = False
    if not fits:
        raise SettingsError(f"{name}={text!r}: wanted {allowed_values(field)} ({field.metadata['help']})")
    return value


def parse(text: str, kind):
    """Convert text to a setting's type; KeyError or ValueError if it is not one."""
    if kind is str:
        return text
    if kind is bool:
        return BOOLS[text.strip().lower()]
    if kind in (int, float):
        return kind(text.strip())
    item = kind.__args__[0]
    return tuple(item(part.strip()) for part in text.strip(" []()").split(","))


def within_limits(value, limits: Mapping) -> bool:
    """Return whether a value, or every item of a tuple, is allowed."""
    if isinstance(value, tuple):
        return all(within_limits(item, limits) for item in value)
    if isinstance(value, str):
        return value in limits.get("choices", (value,))
    if isinstance(value, int):  # first: isfinite cannot take an int that no float holds
        if abs(value) > 2**62:
            return False
    elif not math.isfinite(value):
        return False
    above = limits.get("above", -math.inf)
    return limits.get("low", -math.inf) <= value <= limits.get("high", math.inf) and value > above


def allowed_values(field: dataclasses.Field) -> str:
    """The allowed values in words, such as 'int, at least 0'."""
    limits = field.metadata
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])
    if field.type is bool:
        return "0 or 1"
    type_name = TYPE_NAMES[field.type]
    words = [f"finite {type_name}" if type_name.startswith("float") else type_name]
    words += [
        f"{word} {limits[key]}"
        for key, word in (("low", "at least"), ("above", "above"), ("high", "at most"))
        if key in limits
    ]
    return ", ".join(words)


def refuse_lookalikes(env: Mapping[str, str], known: list[str], script: str):
    """Raise SettingsError for a variable that is nearly a setting, or another trainer's.

    A typo would train something else than was meant, and so would a setting that does nothing here.
    Nearly: it has one of our prefixes, or two letters of a long name are wrong, or one of a short name.
    Capitals do not count.
    """
    for name in sorted(set(env) - set(known)):
        capitals = name.upper()
        if capitals in OF_SOME_TRAINERS.difference(known):
            raise SettingsError(
                f"{name} is a setting of another trainer; {script} has no such setting. Unset it"
            )
        close = difflib.get_close_matches(capitals, known, n=1, cutoff=0.75)
        typo = bool(close) and is_typo(capitals, close[0])
        if typo or capitals.startswith(OUR_PREFIXES):
            hint = f"the nearest is {close[0]}" if close else "it may be another trainer's"
            raise SettingsError(
                f"{name} is not a setting of {script}; {hint}. Unset or rename it; "
                f"`python {script} --help` lists all"
            )


def is_typo(word: str, meant: str) -> bool:
    """Return whether `word` is `meant` but for two letters, or for one if it is short."""
    blocks = difflib.SequenceMatcher(None, word, meant).get_matching_blocks()
    wrong = max(len(word), len(meant)) - sum(block.size for block in blocks)
    return wrong <= (2 if len(meant) >= 8 else 1) and word not in NOT_MEANT


def is_file_name(text: str) -> bool:
    """Return whether a text can name files in logs/, and only there."""
    return re.fullmatch(r"[A-Za-z0-9_][\w.=,+-]{0,199}", text, re.ASCII) is not None


def as_text(value) -> str:
    """A value as the environment variable is written; None is empty, the truth 1 or 0."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def help_text(description: str, classes, presets: dict[str, tuple], footer: str) -> str:
    """--help: every setting with its default, limits and meaning; rare ones last; then the presets.

    presets: {name: (ModelConfig, {setting: default that the preset changes})}.
    """
    lines = [description.strip(), "\nEvery setting with its default, what it may be, and what it does:\n"]
    fields = knobs(classes)
    lines += [line for name, f in fields.items() if not f.metadata["rare"] for line in help_lines(name, f)]
    lines.append("\nRarely needed:\n")
    lines += [line for name, f in fields.items() if f.metadata["rare"] for line in help_lines(name, f)]
    lines += [f"\n{footer}", "\nPresets (MODEL) and the defaults they change:\n"]
    for name, (config, defaults) in presets.items():
        lines.append(f"  {name}: {describe(config)}")
        lines += [f"      {key.upper()}={as_text(value)}" for key, value in defaults.items()]
    return "\n".join(lines)


def help_lines(name: str, field: dataclasses.Field) -> list[str]:
    """One setting in --help."""
    affects = field.metadata["affects"]
    note = {"training": "", "recording": "; recording only", "machine": "; this machine only"}[affects]
    if field.metadata["only"]:
        other, wanted = field.metadata["only"]
        note += f"; only with {other.upper()}={' or '.join(wanted)}"
    return [
        f"  {name}={as_text(field.default)}  ({allowed_values(field)}{note})",
        f"      {field.metadata['help']}",
    ]


def settings_json(
    script: str,
    classes,
    presets: dict[str, tuple],
    modes: dict[str, dict],
    source_hash: str,
    num_gpus: int,
) -> str:
    """--settings-json, which the launcher reads.

    Every setting's name, type, default, allowed values and what it affects; the presets' defaults, and those
    of each ORD_MODE; the hash of the code that decides the numbers; the number of GPUs that a run would find
    here.
    """
    settings = [
        {
            "name": name,
            "type": TYPE_NAMES[f.type],
            "default": f.default,
            "allowed": allowed_values(f),
            **f.metadata,
        }
        for name, f in knobs(classes).items()
    ]
    found = {"script": script, "source_hash": source_hash, "num_gpus": num_gpus, "settings": settings}
    found["presets"] = {name: in_capitals(changes) for name, (_, changes) in presets.items()}
    found["modes"] = {name: in_capitals(changes) for name, changes in modes.items()}
    return json.dumps(found)


def in_capitals(changes: dict) -> dict:
    """Changed defaults by the names of their environment variables."""
    return {name.upper(): value for name, value in changes.items()}
