"""Run a sweep: arms x seeds, one training run each, resumable, several at a time.

    python launch_lr_sweep.py sweeps/spectral_lr.toml --dry-run      # the plan and how long it takes
    python launch_lr_sweep.py sweeps/spectral_lr.toml                # on GPUs, each run on all of them
    python launch_lr_sweep.py sweeps/spectral_lr.toml --parallel 4   # 4 runs at a time, GPUs shared out
    python launch_lr_sweep.py sweeps/smoke.toml --scale tiny         # as its [scale.tiny] has it
    python launch_lr_sweep.py sweeps/spectral_lr.toml --slurm        # write a SLURM job array instead

A sweep file names a trainer, seeds and what varies:

    script = "train_gpt_muon_ord.py"      # relative to where you are, else beside this file
    seeds = [1, 2, 3]
    control = "a_0-muon_lr_0.023"         # optional: the arm (tag, then grid values) to compare others with
    diverged_above = 12.0                 # optional: stop a run whose loss exceeds this after step 0
    [env]                                 # settings common to all arms whose script has them
    NUM_SCHEDULED_ITERATIONS = 1560
    [grid]                                # optional: all combinations, times the arms
    MUON_LR = [0.021, 0.023]
    [[arms]]                              # optional: tag, and any settings; also its own script or seeds
    tag = "a_0"
    SPECTRAL_LR_MUL = 0
    [[arms]]
    tag = "a_1"
    SPECTRAL_LR_MUL = 1
    versus = "a_0"                        # optional: its own control (in a grid, that of the same values)
    [scale.tiny]                          # what --scale tiny puts in place of [env] and seeds
    NUM_SCHEDULED_ITERATIONS = 300
    seeds = [1, 2]                        # for all arms
    arms = ["a_0"]                        # only these; or [[scale.tiny.arms]], others instead
    [scale.tiny.grid]
    MUON_LR = [0.023]

Everything is checked against the trainer's own --settings-json before anything runs. Settings come from the
file, never from the environment, but for those that say where to run (DATA_PATH, DEVICE and the like).
Seeds are interleaved across arms. `logs/SWEEP.sweep.json` says what is planned and done, `logs/RUN_ID.out`
has a run's console output. Launching again runs only what is missing: a run counts as done if it finished or
diverged with the same settings, seed and source code. Ctrl-C stops all runs. Exit code: 0 all runs finished,
1 some did not, 2 refused, 128 + n after signal n.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from analysis.run_log import LogParser, RunLog, format_value, read_log

HERE = Path(__file__).resolve().parent
LOGS = Path("logs")  # where the trainers write, relative to the working directory
POLL_S = 0.2
GRACE_S = 30.0  # between SIGTERM and SIGKILL: a run finishes its step and saves
GIVE_UP_S = 70.0  # from then on it is left: a process in uninterruptible sleep cannot be killed
HISTORY_LOGS = 300  # so many of the newest logs are looked at to guess how long a run takes

TOP_LEVEL = ("script", "seeds", "control", "diverged_above", "env", "grid", "arms", "scale")
ARM_KEYS = ("tag", "script", "seeds", "versus")
SCALE_KEYS = ("seeds", "arms", "grid")
# They say where to run, so they may come from the environment. DATA_PATH does not change the training.
MACHINE_SETTINGS = ("DATA_PATH", "DEVICE", "COMPILE", "ATTN_BACKEND", "DISABLE_FP8", "SLICES_PER_PASS")
NOT_HASHED = ("RUN_ID", "SEED", "DATA_PATH", "NPROC_PER_NODE", "RESUME", "SAVE_EVERY", "SAVE_MODEL")
NOT_HASHED += ("DIST_TIMEOUT",)
# The trainers keep these out of compiled code; tests/test_gpu_path.py traces a step with all of them changed.
# Any other setting may be part of it: shapes, and constants such as RESIDUAL_SCALE.
NOT_COMPILED = (
    *NOT_HASHED,
    *("LR_MULS", "WARMUP_STEPS", "COOLDOWN_FRAC", "LR_DECAY_TYPE", "LR_DECAY_FINAL", "LR_DECAY_SWITCH_STEP"),
    *("LR_DECAY_SECOND_TYPE", "LR_DECAY_SECOND_FINAL", "MUON_LR", "MUON_MOMENTUM", "BETA_WARMUP_STEPS"),
    *("MUON_WEIGHT_DECAY", "ADAM_LR", "ADAM_WEIGHT_DECAY", "ADAM_MATRIX_LR", "ADAM_MATRIX_DECAY"),
    *("ROUTER_LR", "SPECTRAL_LR_MUL", "SPECTRAL_LR_MUL_ATTN", "SPECTRAL_LR_MUL_MLP", "GRAD_CLIP"),
    *("TARGET_LOSS", "VAL_LOSS_EVERY", "VAL_LOSS_LAST_STEPS", "VAL_LOSS_EVERY_LAST", "MANIFOLD_EVERY"),
    "DIVERGED_ABOVE",
)
LAUNCHER_SETS = {
    "SEED": "seeds go into `seeds = [...]`",
    "RUN_ID": "the launcher names the runs",
    "NPROC_PER_NODE": "use --nproc-per-run",
    "RESUME": "a run that left a checkpoint goes on from it by itself",
}
# Left over from a torchrun around us, they would make a single process wait for others.
TORCHRUN_SETS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
TORCHRUN_SETS += ("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")


class SweepError(ValueError):
    """What the user asked for cannot be done: what was found, what was wanted, what to do. Exit code 2."""


# ------------------------------------------------------------------------------------------------
# Trainers: which settings they have
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """A training script as its --settings-json describes it; `settings` maps a name to its description."""

    path: Path
    settings: dict[str, dict]
    presets: dict[str, dict]
    source_hash: str

    def resolve(self, settings: dict) -> dict:
        """All settings of a run: the script's defaults, then its preset's, then the run's own."""
        defaults = {name: spec["default"] for name, spec in self.settings.items()}
        model = settings.get("MODEL", defaults.get("MODEL"))
        if model == "auto":
            model = "gpt2-small" if settings.get("DEVICE") != "cpu" and visible_gpus() else "tiny"
        return {**defaults, **self.presets.get(model, {}), **settings}


@functools.cache  # it imports torch, which takes seconds
def read_trainer(script: str) -> Trainer:
    """Ask a script for its settings."""
    path = Path(script) if Path(script).exists() else HERE / script
    if not path.is_file():
        raise SweepError(f"script {script!r} is neither in {Path.cwd()} nor beside {Path(__file__).name}")
    env = {name: value for name, value in os.environ.items() if name not in TORCHRUN_SETS}
    asked = subprocess.run(
        [sys.executable, str(path), "--settings-json"], capture_output=True, text=True, env=env
    )
    try:
        answer = json.loads(asked.stdout)
        settings = {spec["name"]: spec for spec in answer["settings"]}
        return Trainer(path, settings, answer.get("presets", {}), source_hash(path))
    except (ValueError, KeyError, TypeError):
        said = (asked.stderr or asked.stdout).strip().splitlines()[-1:] or ["nothing"]
        raise SweepError(
            f"`{script} --settings-json` should list its settings as JSON; it exited with {asked.returncode} "
            f"and said: {said[0][:200]}"
        ) from None


def source_hash(script: Path) -> str:
    """As the trainers log it: of the script and the kernels beside it."""
    beside = [script.with_name(name) for name in ("cpu_kernels.py", "triton_kernels.py")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in (script, *beside) if p.exists())).hexdigest()[:16]


def check_value(name: str, value: object, spec: dict, where: str) -> object:
    """The value in the setting's own type, so that 0, 0.0 and "0" are one; SweepError if it does not fit."""
    kind = spec["type"]
    try:
        if kind.endswith(",..."):
            items = value.strip(" []()").split(",") if isinstance(value, str) else value
            if not isinstance(items, list) or not items:
                raise ValueError
            return [_check_one(item, kind.removesuffix(",..."), spec) for item in items]
        return _check_one(value, kind, spec)
    except (ValueError, TypeError, KeyError):
        wanted, what = spec.get("allowed", kind), spec.get("help", "")
        raise SweepError(f"{name}={value!r} in {where}: wanted {wanted} ({what})") from None


def _check_one(value: object, kind: str, spec: dict) -> object:
    if kind == "bool":
        return {"0": False, "false": False, "1": True, "true": True}[str(value).lower()]
    if kind == "str":
        text = str(int(value)) if isinstance(value, bool) else str(value)
        if isinstance(value, (list, dict)) or text not in spec.get("choices", (text,)):
            raise ValueError
        return text
    if isinstance(value, bool) or (kind == "int" and isinstance(value, float)):
        raise ValueError
    number = {"int": int, "float": float}[kind](value)
    low, high, above = spec.get("low", -math.inf), spec.get("high", math.inf), spec.get("above", -math.inf)
    if not math.isfinite(number) or not low <= number <= high or number <= above:
        raise ValueError
    return number


def env_text(value: object) -> str:
    """A setting as the trainer reads it from its environment, to the last digit."""
    if isinstance(value, list):
        return ",".join(env_text(item) for item in value)
    return str(int(value)) if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------
# The sweep file -> runs
# ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training run, as the manifest records it.

    state: planned, submitted (to SLURM), running, finished, diverged, crashed, hung, stopped.
    """

    run_id: str
    tag: str
    script: str
    seed: int
    settings: dict
    settings_hash: str
    source_hash: str
    state: str = "planned"
    exit_code: int | None = None
    log: str = ""
    started: str | None = None
    ended: str | None = None
    reason: str = ""
    host: str = ""
    diverged_above: float | None = None  # the threshold at which the launcher stopped it

    @property
    def key(self) -> tuple:
        """Equal for two runs that must give the same numbers."""
        return (self.settings_hash, self.seed, self.source_hash)

    @staticmethod
    def from_record(record: dict) -> "Run":
        names = {f.name for f in dataclasses.fields(Run)}
        return Run(**{name: value for name, value in record.items() if name in names})


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed."""

    tag: str
    script: str
    seeds: list[int]
    settings: dict
    settings_hash: str
    versus: str | None = None  # tag of the arm to compare it with, where that is not the control

    def run(self, seed: int) -> Run:
        source = read_trainer(self.script).source_hash
        return Run("", self.tag, self.script, seed, self.settings, self.settings_hash, source)


@dataclass
class Sweep:
    """A checked sweep file at one scale. `notes` are what the user must be told."""

    name: str
    file: str
    scale: str | None
    control: str | None
    diverged_above: float | None
    arms: list[Arm]
    notes: list[str] = field(default_factory=list)

    @property
    def manifest_path(self) -> Path:
        return LOGS / f"{self.name}.sweep.json"

    def runs(self) -> list[Run]:
        """All runs, not yet named, seeds interleaved: a machine that drifts does so for all arms alike."""
        rounds = range(max(len(arm.seeds) for arm in self.arms))
        return [arm.run(arm.seeds[i]) for i in rounds for arm in self.arms if i < len(arm.seeds)]


def read_sweep(file: str, scale: str | None) -> Sweep:
    """Read and check everything; SweepError says what is wrong."""
    path = Path(file)
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        near = ", ".join(sorted(str(other) for other in Path("sweeps").glob("*.toml"))) or "none in sweeps/"
        raise SweepError(f"cannot read {file} ({error.strerror}); sweep files here: {near}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SweepError(f"{file} is not valid TOML: {error}") from None
    if not re.fullmatch(r"[\w.=,+-]+", path.stem):
        raise SweepError(
            f"{path.stem!r} names the sweep's files: letters, digits and . _ - = , + only; rename it"
        )
    check_shape(document)
    apply_scale(document, scale)
    arms, notes = expand(document)
    control = document.get("control")
    tags = [arm.tag for arm in arms]
    if control is not None and control not in tags:
        raise SweepError(f"control = {control!r} is none of the arms: {', '.join(tags)}")
    check_versus(arms, control)
    sweep = Sweep(path.stem, file, scale, control, document.get("diverged_above"), arms, notes)
    for run in sweep.runs():
        run_name(run, "YYYYmmdd-HHMMSS")  # is it short enough?
    return sweep


def check_shape(document: dict) -> None:
    """Keys and kinds, before any value is looked at."""
    kinds = {"script": str, "seeds": list, "control": str, "diverged_above": (int, float), "arms": list}
    check_keys(document, TOP_LEVEL, "at the top of the file")
    for key, value in document.items():
        if not isinstance(value, kinds.get(key, dict)) or isinstance(value, bool):
            hint = "; arms are written as [[arms]], with double brackets" if key == "arms" else ""
            raise SweepError(f"{key} is {value!r}, which is not what the top of a sweep file has there{hint}")
    check_seeds(document.get("seeds", [0]), "at the top of the file")
    check_arms(document.get("arms", []), "")
    for name, scale in document.get("scale", {}).items():
        if not isinstance(scale, dict):
            raise SweepError(f"scale.{name} is {scale!r}; a scale is a table, [scale.{name}]")
        check_keys(scale, SCALE_KEYS, f"[scale.{name}]", settings=True)
        check_seeds(scale.get("seeds", [0]), f"[scale.{name}]")
        if has_own_arms(scale):
            check_arms(scale["arms"], f" of [scale.{name}]")
        check_grid(scale.get("grid", {}), f"[scale.{name}.grid]")
    check_grid(document.get("grid", {}), "[grid]")


def has_own_arms(scale: dict) -> bool:
    """Whether a scale replaces the arms, [[scale.NAME.arms]], instead of taking some by their tags."""
    arms = scale.get("arms")
    return isinstance(arms, list) and any(isinstance(arm, dict) for arm in arms)


def check_arms(arms: list, place: str) -> None:
    for number, arm in enumerate(arms, 1):
        if not isinstance(arm, dict):
            raise SweepError(
                f"arm {number}{place} is {arm!r}; arms are written as [[arms]], with double brackets"
            )
        where = f"arm {arm.get('tag', number)!r}{place}"
        check_keys(arm, ARM_KEYS, where, settings=True)
        check_seeds(arm.get("seeds", [0]), where)
        for key in ("tag", "versus"):
            name = arm.get(key, "-" if key == "versus" else None)
            if not isinstance(name, str) or not re.fullmatch(r"[\w.=,+-]+", name):
                raise SweepError(
                    f'{where}: wanted {key} = "..." of letters, digits and . _ - = , +; tags name files'
                )


def check_keys(table: dict, known: tuple[str, ...], where: str, settings: bool = False) -> None:
    """Keys that are neither known nor, if `settings`, in capitals as settings are."""
    for key in table:
        if key not in known and not (settings and key.isupper()):
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            hint += "; settings are written in capitals" if settings else "; settings go into [env]"
            raise SweepError(f"{key} {where} is unknown; {hint}")


def check_grid(grid: object, where: str) -> None:
    if not isinstance(grid, dict):
        raise SweepError(f"grid = {grid!r}: wanted a table, {where}")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise SweepError(f"{name} = {values!r} in {where}: wanted a list of values to try")


def check_seeds(seeds: object, where: str) -> None:
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(seed) is int and 0 <= seed <= 2**62 for seed in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise SweepError(f"seeds = {seeds!r} {where}: wanted a list of different whole numbers from 0")


def apply_scale(document: dict, name: str | None) -> None:
    """Put [scale.NAME] in place, in the document itself: settings into [env], arms, seeds for all, grid."""
    if name is None:
        return
    if name not in document.get("scale", {}):
        known = ", ".join(document.get("scale", {})) or "none"
        raise SweepError(f"--scale {name}: the file has no [scale.{name}]; its scales: {known}")
    scale = dict(document["scale"][name])
    if has_own_arms(scale):
        document["arms"] = scale.pop("arms")
    if "seeds" in scale:
        document["seeds"] = scale.pop("seeds")
        for arm in document.get("arms", []):
            arm.pop("seeds", None)
    if "arms" in scale:
        kept, tags = scale.pop("arms"), [arm["tag"] for arm in document.get("arms", [])]
        if not isinstance(kept, list) or not kept or not set(kept) <= set(tags):
            raise SweepError(
                f"arms = {kept!r} in [scale.{name}]: wanted a list of tags out of {', '.join(tags)}"
            )
        document["arms"] = [arm for arm in document["arms"] if arm["tag"] in kept]
    grid = document.get("grid", {})
    for setting, values in scale.pop("grid", {}).items():
        if setting not in grid:
            raise SweepError(f"{setting} in [scale.{name}.grid] is not in [grid], which it should replace")
        grid[setting] = values
    for setting in scale:
        if document.get("arms") and all(setting in arm for arm in document["arms"]):
            raise SweepError(f"{setting} in [scale.{name}] does nothing: every arm sets its own")
    document["env"] = {**document.get("env", {}), **scale}


def expand(document: dict) -> tuple[list[Arm], list[str]]:
    """Arms times grid, checked, and notes on what was left out for whom."""
    grid, common = document.get("grid", {}), document.get("env", {})
    for name in grid:
        if name in common:
            raise SweepError(f"{name} stands in [grid] and also in [env] or [scale]; remove one of them")
    scripts = [arm.get("script", document.get("script")) for arm in document.get("arms") or [{}]]
    if None in scripts:
        raise SweepError(
            'an arm has no script: wanted script = "train_gpt.py" or such at the top of the file'
        )
    trainers = {script: read_trainer(script) for script in scripts}
    taken, notes = from_environment(trainers.values(), {*grid, *common})
    common = {**taken, **common}
    for name in (*common, *grid):
        if not any(name in trainer.settings for trainer in trainers.values()):
            raise unknown_setting(name, "[env], [grid] or [scale]", trainers)
    arms = []
    for arm, script in zip(document.get("arms") or [{}], scripts):
        arms += expand_arm(arm, script, common, grid, arm.get("seeds", document.get("seeds", [0])))
        lacking = [name for name in (*common, *grid) if name not in trainers[script].settings]
        if lacking:
            who = arm.get("tag", script)
            notes.append(f"left out for {who}, as {script} has no such settings: {', '.join(lacking)}")
    check_different(arms)
    return arms, notes


def from_environment(trainers: Iterable[Trainer], in_file: set[str]) -> tuple[dict, list[str]]:
    """Where to run may come from the environment, what to run may not: nobody would see it later."""
    known = {name for trainer in trainers for name in trainer.settings}
    found = {name: os.environ[name] for name in sorted(known & set(os.environ)) if name != "NPROC_PER_NODE"}
    for name, value in found.items():
        if name not in MACHINE_SETTINGS:
            where = LAUNCHER_SETS.get(name, "put it into the file's [env]")
            raise SweepError(
                f"{name}={value!r} is set in the environment, but a sweep's settings come from its file: "
                f"`unset {name}`; {where}"
            )
    taken = {name: value for name, value in found.items() if name not in in_file}
    notes = [f"from the environment: {' '.join(f'{k}={v}' for k, v in taken.items())}"] if taken else []
    return taken, notes


def unknown_setting(name: str, where: str, trainers: dict[str, Trainer]) -> SweepError:
    known = sorted({other for trainer in trainers.values() for other in trainer.settings})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"the nearest is {near[0]}" if near else f"`python {next(iter(trainers))} --help` lists them"
    if name in TOP_LEVEL:
        hint = "it belongs to the top of the file, above the first [table]"
    return SweepError(f"{name} in {where} is not a setting of {' or '.join(trainers)}; {hint}")


def expand_arm(arm: dict, script: str, common: dict, grid: dict, seeds: list[int]) -> list[Arm]:
    """One arm times what [grid] varies: all that its script knows and that it does not set itself."""
    trainer = read_trainer(script)
    own = {name: value for name, value in arm.items() if name not in ARM_KEYS}
    where = f"arm {arm.get('tag')!r}"
    for name in own:
        if name not in trainer.settings:
            raise unknown_setting(name, where, {script: trainer})
    shared = {name: value for name, value in common.items() if name in trainer.settings}
    axes = {name: values for name, values in grid.items() if name in trainer.settings and name not in own}
    arms = []
    for combination in itertools.product(*axes.values()):
        settings = {}
        for table, place in ((shared, "[env]"), (dict(zip(axes, combination)), "[grid]"), (own, where)):
            for name, value in table.items():
                if name in LAUNCHER_SETS:
                    raise SweepError(f"{name} in {place}: {LAUNCHER_SETS[name]}")
                settings[name] = check_value(name, value, trainer.settings[name], place)
        if trainer.presets and settings.get("MODEL", "auto") not in ("auto", *trainer.presets):
            raise SweepError(f"MODEL={settings['MODEL']!r}: wanted one of auto, {', '.join(trainer.presets)}")
        parts = [f"{name.lower()}_{format_value(settings[name])}" for name in axes]
        tag = grid_name([arm["tag"]] if arm else [], parts) or "all"
        versus = grid_name([arm["versus"]], parts) if "versus" in arm else None
        arms.append(Arm(tag, script, seeds, settings, hash_settings(trainer, settings), versus))
    return arms


def grid_name(tag: list[str], values: list[str]) -> str:
    return re.sub(r"[^\w.=,+-]", "_", "-".join(tag + values))


def hash_settings(trainer: Trainer, settings: dict) -> str:
    """Of every setting that a run will have, defaults too, but for its seed and name."""
    resolved = {name: value for name, value in trainer.resolve(settings).items() if name not in NOT_HASHED}
    return hashlib.sha256(json.dumps([trainer.path.name, resolved], sort_keys=True).encode()).hexdigest()[:8]


def check_different(arms: list[Arm]) -> None:
    """Two arms of one name cannot be told apart; two of the same settings would count one run twice."""
    tags, trainings = {}, {}
    for arm in arms:
        if arm.tag in tags:
            raise SweepError(f"two arms are called {arm.tag!r}; give each its own tag")
        tags[arm.tag] = arm
        other = trainings.setdefault(arm.settings_hash, arm)
        if other is not arm:
            raise SweepError(
                f"arms {other.tag!r} and {arm.tag!r} have the same settings, defaults counted; remove one"
            )


def check_versus(arms: list[Arm], control: str | None) -> None:
    """Each arm's own control is another arm; the rest have the sweep's."""
    tags = [arm.tag for arm in arms]
    for arm in arms:
        if arm.versus is None:
            continue
        if control is None:
            raise SweepError(f"arm {arm.tag!r} has versus, but there is no control = ... for the other arms")
        if arm.versus not in tags or arm.versus == arm.tag:
            others = ", ".join(tag for tag in tags if tag != arm.tag)
            raise SweepError(f"versus = {arm.versus!r} of arm {arm.tag!r}: wanted another arm, of {others}")


def run_name(run: Run, stamp: str) -> str:
    """lrmul-1-1.52-1.73-1-cd0.55-TAG-TIMESTAMP-seed1-HASH."""
    resolved = read_trainer(run.script).resolve(run.settings)
    parts = []
    if "LR_MULS" in resolved:
        parts.append("lrmul-" + "-".join(format_value(value) for value in resolved["LR_MULS"]))
    if "COOLDOWN_FRAC" in resolved:
        parts.append("cd" + format_value(resolved["COOLDOWN_FRAC"]))
    name = "-".join([*parts, run.tag, stamp, f"seed{run.seed}", run.settings_hash])
    if len(name) > 200:
        raise SweepError(f"the run name {name} has {len(name)} characters, 200 at most; shorten the tag")
    return name


def check_data(sweep: Sweep) -> str:
    """Empty, or which data files are missing. Every run would find out by itself, one after the other."""
    for arm in sweep.arms:
        resolved = read_trainer(arm.script).resolve(arm.settings)
        for name in ("TRAIN_FILES", "VAL_FILES"):
            root, pattern = resolved.get("DATA_PATH") or ".", resolved.get(name)
            if pattern and not glob.glob(os.path.join(root, pattern)):
                return (
                    f"{name}={pattern!r} of arm {arm.tag!r} matches no file under DATA_PATH={root!r}; "
                    "data/README.md says how to get or make it"
                )
    return ""


# ------------------------------------------------------------------------------------------------
# The manifest: what is planned and done
# ------------------------------------------------------------------------------------------------


class Manifest:
    """logs/SWEEP.sweep.json. `runs` is the present plan; `earlier` has attempts that are no longer in it."""

    def __init__(self, sweep: Sweep):
        self.sweep, self.path = sweep, sweep.manifest_path
        self.created, self.runs, self.earlier = now(), [], []
        try:
            data = json.loads(self.path.read_text())
            self.created = data["created"]
            self.runs = [Run.from_record(record) for record in data["runs"]]
            self.earlier = [Run.from_record(record) for record in data.get("earlier", [])]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SweepError(
                f"{self.path} cannot be read ({error}); move it away to begin the sweep anew"
            ) from None

    def plan(self) -> dict[int, str]:
        """Put the sweep's runs in place of the old ones; for the index of each that must run, why.

        What was done with the same settings, seed and source stays as it is, at whatever scale it was done.
        """
        old = [*self.earlier, *self.runs]
        usable = {run.key: run for run in old if self.counts(run)}
        attempts = {(run.tag, run.seed): run for run in old if run.state != "planned"}
        runs, why = [], {}
        for run in self.sweep.runs():
            same = usable.get(run.key)
            if same:
                same.tag = run.tag
            else:
                why[len(runs)] = reason_to_run(run, attempts.get((run.tag, run.seed)))
            runs.append(same or run)
        stamp = free_stamp([runs[i] for i in why])
        resumed = {}
        for i in why:
            before = attempts.get((runs[i].tag, runs[i].seed))
            if before and before.key == runs[i].key and left_a_checkpoint(before):
                runs[i].run_id, runs[i].log, resumed[before.run_id] = before.run_id, before.log, before
                why[i] += ", goes on from its checkpoint"
                continue
            runs[i].run_id = run_name(runs[i], stamp)
            runs[i].log = str(LOGS / f"{runs[i].run_id}.txt")
        kept = {id(run) for run in [*runs, *resumed.values()]}
        self.earlier = [
            run for run in old if id(run) not in kept and run.state not in ("planned", "submitted")
        ]
        self.runs = runs
        return why

    def counts(self, run: Run) -> bool:
        """Whether a run need not be made again. A crash may have been the machine's; a divergence was not."""
        if run.state == "diverged" and run.diverged_above not in (None, self.sweep.diverged_above):
            return False
        return run.state == "running" or (run.state in ("finished", "diverged") and Path(run.log).exists())

    def save(self) -> None:
        """Whole or not at all."""
        data = {
            "sweep": self.sweep.name,
            "file": self.sweep.file,
            "scale": self.sweep.scale,
            "control": self.sweep.control,
            "versus": {arm.tag: arm.versus for arm in self.sweep.arms if arm.versus},
            "created": self.created,
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "earlier": [dataclasses.asdict(run) for run in self.earlier],
        }
        new = self.path.with_name(f".{self.path.name}.new")
        with new.open("w") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def free_stamp(runs: list[Run]) -> str:
    """The time, or the next second at which no run of that name exists: logs are never overwritten."""
    at = time.time()
    while True:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(at))
        if not any((LOGS / f"{run_name(run, stamp)}.txt").exists() for run in runs):
            return stamp
        at += 1


def left_a_checkpoint(run: Run) -> bool:
    """Whether the trainer can go on where this attempt was stopped or crashed."""
    log = Path(run.log)
    return (
        run.state in ("stopped", "crashed", "hung")
        and log.exists()
        and any(log.with_suffix("").glob("step_*.pt"))
    )


def reason_to_run(run: Run, before: Run | None) -> str:
    if before is None:
        return "new"
    if before.settings_hash != run.settings_hash:
        return "settings changed"
    if before.source_hash != run.source_hash:
        return "source changed"
    if before.state in ("finished", "diverged"):
        return "threshold changed" if Path(before.log).exists() else "log is gone"
    return f"{before.state} before"


def settle(run: Run, hang_minutes: float, act: bool) -> None:
    """What became of a run that the manifest has as running or submitted: its launcher may have been killed.

    `act`: stop what is left of it and end its log; else only look.
    """
    if run.state not in ("running", "submitted"):
        return
    here, log = run.host == platform.node(), Path(run.log)
    if here and processes_of({run.run_id}):
        if not act:
            return
        say(f"stopping {run.run_id}, left over from a launcher that was killed")
        stop_processes(lambda: processes_of({run.run_id}))
    if not log.exists():
        run.state, run.reason = ("planned" if run.state == "submitted" else "stopped"), "it wrote no log"
        return
    found, written = read_log(log)[-1], log.stat().st_mtime
    state, started = found.state, found.event("started")
    if state == "running" and not here and time.time() - written < hang_minutes * 60:
        run.state = "running"  # on another machine
        return
    run.state = state if state in ("finished", "diverged", "crashed") else "stopped"
    run.started = run.started or (started.fields.get("time") if started else None)
    run.ended = datetime.fromtimestamp(written).astimezone().isoformat("T", "seconds")
    run.reason = "" if run.state in ("finished", "diverged") else "its launcher was killed"
    if act:
        end_log(run)


def end_log(run: Run) -> None:
    """Say how a run ended in its log, if the trainer could not, so that no reader waits for more."""
    path = Path(run.log)
    event = {"hung": "crashed"}.get(run.state, run.state)
    if event not in ("crashed", "diverged", "stopped") or not path.exists():
        return
    log = read_log(path)[-1]
    if log.config and log.state == "running":
        text = path.read_bytes()
        with path.open("ab") as file:  # the last line may have been cut short
            file.write(
                (b"" if text.endswith(b"\n") else b"\n") + f"event:{event} reason:{run.reason}\n".encode()
            )


# ------------------------------------------------------------------------------------------------
# The machine: GPUs, cores, processes
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """What one run may use; no cores: any."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


@functools.cache
def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(part.strip() for part in chosen.split(",") if part.strip() not in ("", "-1"))
    return tuple(ask_nvidia_smi("index"))


def ask_nvidia_smi(what: str) -> list[str]:
    """One line a GPU; none without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True)
    return asked.stdout.strip().splitlines() if asked.returncode == 0 else []


def usable_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def share_out(sweep: Sweep, parallel: int, nproc: int) -> tuple[list[Slot], int]:
    """Disjoint slots, and the number of ranks a run (0: all GPUs of its slot; on CPU one)."""
    gpus = visible_gpus() if any(arm.settings.get("DEVICE") != "cpu" for arm in sweep.arms) else ()
    if gpus:
        nproc = nproc or max(1, len(gpus) // parallel)
        if parallel * nproc > len(gpus):
            raise SweepError(
                f"{parallel} runs at a time x {nproc} ranks want {parallel * nproc} GPUs, found "
                f"{len(gpus)} ({', '.join(gpus)}); lower --parallel or --nproc-per-run"
            )
        return [Slot(gpus=gpus[i * nproc : (i + 1) * nproc]) for i in range(parallel)], nproc
    cores = usable_cores()
    if parallel > len(cores):
        raise SweepError(
            f"{parallel} runs at a time want {parallel} CPU cores at least, found {len(cores)}; "
            "lower --parallel"
        )
    share = len(cores) // parallel
    slots = [Slot(cores=cores[i * share : (i + 1) * share] if parallel > 1 else ()) for i in range(parallel)]
    return slots, nproc or 1


def process_table() -> dict[int, tuple[int, str]]:
    """Process -> its parent and its state (Z: has ended, nobody has asked)."""
    table = {}
    if not Path("/proc/self/stat").exists():  # macOS
        ps = subprocess.Popen(["ps", "-axo", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True)
        for pid, parent, state in (line.split()[:3] for line in ps.communicate()[0].splitlines()):
            table[int(pid)] = (int(parent), state[0])
        table.pop(ps.pid, None)
        return table
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(") ")[2].split()[:2]
            table[int(name)] = (int(parent), state)
        except OSError:  # gone since
            continue
    return table


def processes_of(run_ids: set[str], roots: Iterable[int] = ()) -> set[int]:
    """Living processes of some runs: who descends from `roots` or has a run's RUN_ID in its environment.

    torchrun starts its workers in sessions of their own; once it is dead, only that tells whose they are.
    """
    table, found = process_table(), set(roots)
    wanted = {b"RUN_ID=" + run_id.encode() for run_id in run_ids}
    for pid in table:
        try:
            if wanted and not wanted.isdisjoint(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                found.add(pid)
        except OSError:  # somebody else's, or gone
            continue
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in table.items():
        children.setdefault(parent, []).append(pid)
    queue = list(found)
    while queue:
        new = [pid for pid in children.get(queue.pop(), []) if pid not in found]
        found.update(new)
        queue += new
    return {pid for pid in found if pid in table and table[pid][1] not in "ZX" and pid != os.getpid()}


def stop_processes(find: Callable[[], set[int]]) -> bool:
    """SIGTERM to all that `find` finds, SIGKILL after a while, until it finds none; False if some remain."""
    begin, told = time.monotonic(), set()
    while left := find():
        spent = time.monotonic() - begin
        if spent > GIVE_UP_S:
            return False
        for pid in left:
            if spent >= GRACE_S or pid not in told:  # they may start others while they end
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if spent >= GRACE_S else signal.SIGTERM)
        reap_orphans()
        time.sleep(0.05)
    reap_orphans()
    return True


ROOTS: dict[int, subprocess.Popen] = {}  # the processes that we started ourselves


def reap_orphans() -> None:
    """Children that we inherited (see adopt_orphans) and that have ended."""
    for pid, (parent, state) in process_table().items():
        if parent == os.getpid() and state == "Z" and pid not in ROOTS:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Linux: a process whose parent dies becomes our child, so that it can be found and its end seen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def child_setup(cores: tuple[int, ...]) -> Callable[[], None]:
    """What a child does before it becomes the trainer: keep to its cores, end when we are killed."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def setup() -> None:
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        if libc:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # torchrun then ends its workers, too

    return setup


# ------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------


def command_of(script: Path, nproc: int) -> list[str]:
    """One rank needs no torchrun. --standalone takes a free port, so that parallel runs do not meet."""
    if nproc == 1:
        return [sys.executable, str(script)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={nproc}", str(script)]


def settings_of(run: Run) -> dict[str, str]:
    """The settings that make this run, as environment variables."""
    values = {name: env_text(value) for name, value in run.settings.items()}
    ours = {"RESUME": "auto", "SAVE_MODEL": "0"}  # hundreds of models fill a disk; [env] can ask for them
    ours = {name: value for name, value in ours.items() if name in read_trainer(run.script).settings}
    return {**ours, **values, "SEED": str(run.seed), "RUN_ID": run.run_id}


def environment_of(run: Run, slot: Slot) -> dict[str, str]:
    """Our environment without anybody's settings or ranks, plus the run's own."""
    dropped = {*TORCHRUN_SETS, *read_trainer(run.script).settings}
    inherited = {
        k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("TORCHELASTIC_")
    }
    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)} if slot.gpus else {}
    return {**inherited, **settings_of(run), **gpus, "PYTHONUNBUFFERED": "1"}


class LogWatch:
    """A log that grows: what it says so far, and when it last said something."""

    def __init__(self, path: str):
        self.path, self.parser, self.offset = Path(path), LogParser(path), 0
        self.last_growth = time.monotonic()
        self.run: RunLog | None = None

    def poll(self) -> bool:
        """Read what is new; whether there was any."""
        try:
            if self.path.stat().st_size <= self.offset:
                return False
            with self.path.open("rb") as file:
                file.seek(self.offset)
                new = file.read()
        except OSError:
            return False
        self.offset += len(new)
        self.parser.feed(new)
        self.run, self.last_growth = self.parser.runs()[-1], time.monotonic()
        return True

    def highest_loss(self) -> float:
        """Of all logged after step 0, -inf if none."""
        curves = (self.run.train, self.run.val) if self.run else ()
        return max(
            (float(curve.loss[curve.step > 0].max(initial=-math.inf)) for curve in curves), default=-math.inf
        )


@dataclass
class Job:
    """A run that is running."""

    run: Run
    process: subprocess.Popen
    slot: Slot
    watch: LogWatch
    cold: bool  # nothing else starts until it has compiled
    begin: float = field(default_factory=time.monotonic)

    def find(self) -> set[int]:
        return processes_of({self.run.run_id}, [self.process.pid] if self.process.poll() is None else [])


class Launcher:
    """Starts runs as slots become free, watches them, records how they end."""

    def __init__(self, manifest: Manifest, todo: list[int], slots: list[Slot], nproc: int, hang_s: float):
        self.manifest, self.nproc, self.hang_s = manifest, nproc, hang_s
        self.todo, self.free = list(todo), list(slots)
        self.num_todo, self.num_slots = len(todo), len(slots)
        self.jobs: list[Job] = []
        self.seconds: list[float] = []  # of the runs that finished
        self.signal = 0
        self.display = Display(self)

    def run_all(self) -> None:
        """All runs, or until a signal comes."""
        try:
            while (self.todo or self.jobs) and not self.signal:
                while self.todo and self.free and not any(job.cold for job in self.jobs) and not self.signal:
                    self.start(self.todo.pop(0))
                for job in list(self.jobs):
                    self.look_after(job)
                self.display.update()
                time.sleep(POLL_S)
        finally:  # also after an error of our own, nothing is left behind
            self.stop_all()
            self.display.close()

    def start(self, index: int) -> None:
        run, slot = self.manifest.runs[index], self.free.pop(0)
        run.state, run.started, run.host = "running", now(), platform.node()
        try:
            self.save()  # before it starts: a launcher killed here is known to have wanted it
            with Path(run.log).with_suffix(".out").open("a") as console:
                process = subprocess.Popen(
                    command_of(read_trainer(run.script).path, self.nproc),
                    env=environment_of(run, slot),
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches us alone; we stop the children
                    preexec_fn=child_setup(slot.cores),
                )
        except (OSError, subprocess.SubprocessError) as error:
            run.state, run.ended, run.reason = "crashed", now(), f"it could not be started: {error}"
            self.free.append(slot)
            self.display.ended(run, math.nan, 0.0)
            return
        ROOTS[process.pid] = process
        marker = warm_marker(run, self.nproc, slot)
        cold = marker is not None and not marker.exists()
        self.jobs.append(Job(run, process, slot, LogWatch(run.log), cold))
        self.display.started(self.jobs[-1])

    def look_after(self, job: Job) -> None:
        grown = job.watch.poll()
        if job.cold and grown and job.watch.run.last_step > 0:
            job.cold = False
            marker = warm_marker(job.run, self.nproc, job.slot)
            with contextlib.suppress(OSError):  # then the next launch waits once more
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
        limit, loss = self.manifest.sweep.diverged_above, job.watch.highest_loss() if grown else -math.inf
        if job.process.poll() is not None:
            self.finish(job)
        elif limit is not None and loss > limit:
            job.run.diverged_above = limit
            self.finish(job, "diverged", f"a loss of {loss:.4g}, above diverged_above = {limit:g}")
        elif self.hang_s and time.monotonic() - job.watch.last_growth > self.hang_s:
            self.finish(job, "hung", f"no new log line for {self.hang_s / 60:g} minutes")

    def finish(self, job: Job, state: str = "", reason: str = "") -> None:
        """Stop what is left of it, see how it ended unless the caller knows, and record that."""
        run = job.run
        left = job.find()
        if left and not stop_processes(job.find):
            self.display.say(f"{run.run_id}: process {min(left)} cannot be killed")
        run.exit_code, run.ended = job.process.poll(), now()
        ROOTS.pop(job.process.pid, None)
        reap_orphans()
        job.watch.poll()
        log = job.watch.run
        if not state or (log and log.state == "finished"):
            state, reason = how_it_ended(run, log)
        run.state, run.reason = state, reason
        self.jobs.remove(job)
        self.free.append(job.slot)
        try:
            end_log(run)
        except OSError as error:
            self.display.say(f"{run.log}: {error}")
        self.save()
        seconds = time.monotonic() - job.begin
        if state == "finished":
            self.seconds.append(seconds)
        self.display.ended(run, log.final_val_loss if log else math.nan, seconds)

    def stop_all(self) -> None:
        name = signal.Signals(self.signal).name if self.signal else "an error of the launcher"
        if self.jobs:
            self.display.say(f"stopping {len(self.jobs)} run(s)")
        roots = [job.process.pid for job in self.jobs if job.process.poll() is None]
        run_ids = {job.run.run_id for job in self.jobs}
        if self.jobs:  # all at once, so that the time of grace passes once
            stop_processes(lambda: processes_of(run_ids, [pid for pid in roots if ROOTS[pid].poll() is None]))
        for job in list(self.jobs):
            self.finish(job, "stopped", f"stopped by {name}")
        stop_processes(lambda: processes_of(set(), [os.getpid()]))  # orphans that nothing ties to a run

    def save(self) -> None:
        try:
            self.manifest.save()
        except OSError as error:  # a full disk: the logs say how runs ended, and the next launch reads them
            self.display.say(f"warning: {self.manifest.path} could not be written: {error}")

    def seconds_left(self) -> float:
        """From the runs that finished in this launch; NaN if there are none."""
        if not self.seconds:
            return math.nan
        running = sum(min(time.monotonic() - job.begin, max(self.seconds)) for job in self.jobs)
        mean = sum(self.seconds) / len(self.seconds)
        return max(0.0, mean * (len(self.todo) + len(self.jobs)) - running) / self.num_slots


def how_it_ended(run: Run, log: RunLog | None) -> tuple[str, str]:
    """State and reason from the log's last word and the exit code. torchrun turns every failure into 1."""
    if log and log.state == "finished":
        return "finished", ""
    if run.exit_code == 3 or (log and log.state == "diverged"):
        return "diverged", "the loss is not a number, or above DIVERGED_ABOVE"
    if run.exit_code is not None and run.exit_code < 0:
        return "crashed", f"killed by signal {-run.exit_code} ({signal.strsignal(-run.exit_code)})"
    crash = log.event("crashed") if log and log.state == "crashed" else None  # not one it resumed from
    try:
        lines = Path(run.log).with_suffix(".out").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    if not log:  # it was refused: torchrun has more to say after the trainer's own words
        lines = [line for line in lines if line.startswith(f"{Path(run.script).name}: ")] or lines
    said = crash.fields.get("error", "") if crash else lines[-1] if lines else ""
    return "crashed", f"exit code {run.exit_code}: {said[:300]}"


def warm_marker(run: Run, nproc: int, slot: Slot) -> Path | None:
    """A file in the compiler's cache: if it is there, this code has been compiled before. None: no compiling.

    Every setting counts that is not known to leave compiled code alone: a run that is taken for cold lets
    others wait once, but runs that are taken for warm all compile the same code side by side.
    """
    trainer = read_trainer(run.script)
    resolved = trainer.resolve(run.settings)
    if not {"1": True, "auto": bool(slot.gpus)}.get(resolved.get("COMPILE"), False):
        return None
    counting = {name: value for name, value in resolved.items() if name not in NOT_COMPILED}
    text = json.dumps([run.source_hash, nproc, counting], sort_keys=True)
    default = Path(run.script).resolve().with_name(".compile_cache") / "inductor"  # as the trainers have it
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default)
    return cache / f"launched-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


# ------------------------------------------------------------------------------------------------
# What the user sees
# ------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def say(text: str) -> None:
    """A line for the user, if anybody reads: `| tee` ends at Ctrl-C before us, and we have runs to stop."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """A line when a run starts or ends; on a terminal also a live table of those that run."""

    def __init__(self, launcher: Launcher):
        self.launcher, self.live, self.shown = launcher, None, 0.0
        if sys.stdout.isatty():
            from rich.live import Live  # slow to import, and not needed elsewhere

            # we refresh it ourselves: threads and preexec_fn do not mix
            self.live = Live(auto_refresh=False, transient=True, redirect_stdout=False)
            self.live.start()

    def say(self, text: str) -> None:
        if self.live:
            with contextlib.suppress(OSError):  # the terminal has gone
                self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def started(self, job: Job) -> None:
        number = self.launcher.num_todo - len(self.launcher.todo)
        alone = "  (alone until it has compiled)" if job.cold and self.launcher.num_slots > 1 else ""
        self.say(
            f"[{number}/{self.launcher.num_todo}] {job.run.tag} seed {job.run.seed} -> {job.run.log}{alone}"
        )

    def ended(self, run: Run, loss: float, seconds: float) -> None:
        text = f"    {run.tag} seed {run.seed}: {run.state} after {duration(seconds)}"
        text += f", validation loss {loss:.4f}" if math.isfinite(loss) else ""
        self.say(text + (f" - {run.reason}" if run.reason else ""))

    def update(self) -> None:
        if not self.live or time.monotonic() - self.shown < 1:
            return
        from rich.table import Table

        self.shown = time.monotonic()
        launcher, table = self.launcher, Table(box=None, pad_edge=False)
        for column in ("running", "seed", "step", "loss", "time", "on"):
            table.add_column(column)
        for job in launcher.jobs:
            log = job.watch.run
            losses = [curve.loss[-1] for curve in (log.train, log.val) if len(curve)] if log else []
            table.add_row(
                job.run.tag,
                str(job.run.seed),
                f"{max(0, log.last_step)}/{log.num_steps or '?'}" if log else "starting",
                f"{losses[0]:.4f}" if losses else "",
                duration(self.shown - job.begin),
                "GPU " + ",".join(job.slot.gpus) if job.slot.gpus else "CPU",
            )
        left = launcher.seconds_left()
        time_left = "" if math.isnan(left) else f", about {duration(left)} left"
        table.caption = f"{len(launcher.todo)} to come{time_left}"
        with contextlib.suppress(OSError):
            self.live.update(table, refresh=True)

    def close(self) -> None:
        if self.live:
            with contextlib.suppress(OSError):
                self.live.stop()


def print_plan(sweep: Sweep, manifest: Manifest, why: dict[int, str], slots: list[Slot], nproc: int) -> None:
    """Arms with their settings, what runs and what is done, and the expected time."""
    runs, arms = manifest.runs, sweep.arms
    scale = f", scale {sweep.scale}" if sweep.scale else ""
    say(f"{sweep.name} ({sweep.file}{scale}): {len(arms)} arms, {len(runs)} runs, {len(why)} to run")
    values: dict[str, list[str]] = {}
    for arm in arms:
        for name, value in arm.settings.items():
            values.setdefault(name, []).append(format_value(value))
    having = {name: {arm.script for arm in arms if name in arm.settings} for name in values}
    common = {  # of all arms whose script has the setting
        name: v[0]
        for name, v in values.items()
        if 1 < len(v) == sum(arm.script in having[name] for arm in arms) and len(set(v)) == 1
    }
    width = max(len(arm.tag) for arm in arms)
    for arm in arms:
        mine = [f"{name}={format_value(v)}" for name, v in arm.settings.items() if name not in common]
        seeds = ",".join(str(seed) for seed in arm.seeds)
        done = sum(run.tag == arm.tag and i not in why for i, run in enumerate(runs))
        notes = [f"({done} done)"] * bool(done) + ["control"] * (arm.tag == sweep.control)
        notes += [f"versus {arm.versus}"] * bool(arm.versus)
        say("  ".join([f"  {arm.tag:<{width}}", f"{arm.script} seeds {seeds}", *notes, *mine]))
    if common:
        say("common: " + " ".join(f"{name}={value}" for name, value in common.items()))
    for note in sweep.notes:
        say(note)
    if again := [reason for reason in why.values() if reason != "new"]:
        say("again: " + ", ".join(f"{again.count(r)} ({r})" for r in dict.fromkeys(again)))
    if elsewhere := [run.run_id for i, run in enumerate(runs) if run.state == "running" and i not in why]:
        say(f"running already, not started again: {', '.join(elsewhere)}")
    if why and slots:
        where = f"{nproc} GPU(s) each" if slots[0].gpus else f"{nproc} rank(s) each on CPU"
        say(f"{len(slots)} at a time, {where}; {expected_time([runs[i] for i in why], slots, nproc)}")
    if why:
        say(f"the first: {runs[next(iter(why))].run_id}")


# ------------------------------------------------------------------------------------------------
# Expected time
# ------------------------------------------------------------------------------------------------


def expected_time(runs: list[Run], slots: list[Slot], nproc: int) -> str:
    """In words, from logs of the same model, batch sizes and device."""
    wanted = {shape_of(run): None for run in runs}
    history = read_history(set(wanted))
    device = device_name(bool(slots[0].gpus))
    threads = str(max(1, len(slots[0].cores or usable_cores()) // nproc))
    if nproc == 1:  # as the trainers have it: for several ranks they set it themselves
        threads = os.environ.get("OMP_NUM_THREADS", threads)
    total, used = 0.0, set()
    for run in runs:
        fits = [
            past
            for past in history
            if past["shape"] == shape_of(run)
            and past["device"] == device
            and past["ranks"] == str(nproc)
            and (slots[0].gpus or past["threads"] == threads)
        ]
        if not fits:
            return "expected time unknown: no finished log of this model, batch sizes and device yet"
        resolved = read_trainer(run.script).resolve(run.settings)
        scheduled, batches = resolved.get("NUM_SCHEDULED_ITERATIONS", 0), resolved.get("BATCH_SIZES")
        if resolved.get("TRAIN_TOKENS"):
            scheduled = resolved["TRAIN_TOKENS"] / (sum(batches[:-1]) / (len(batches) - 1))
        steps = scheduled + resolved.get("NUM_EXTENSION_ITERATIONS", 0)
        total += sum(past["step_s"] * steps + past["other_s"] for past in fits) / len(fits)
        used.update(past["run_id"] for past in fits)
    rounds = math.ceil(len(runs) / len(slots))
    return (
        f"expected time about {duration(total / len(runs) * rounds)} ({duration(total / len(runs))} a run, "
        f"from {len(used)} earlier log{'s' * (len(used) > 1)})"
    )


def shape_of(run: Run) -> tuple:
    """What decides how long a step takes, on one machine."""
    trainer = read_trainer(run.script)
    resolved = trainer.resolve(run.settings)
    model = resolved.get("MODEL")
    return (model, tuple(resolved.get("BATCH_SIZES") or ()))


def read_history(shapes: set[tuple]) -> list[dict]:
    """Time a step, and time beside the steps, of earlier finished runs of these shapes."""
    walls = {}
    for path in LOGS.glob("*.sweep.json"):
        try:
            for record in json.loads(path.read_text())["runs"]:
                begin, end = (datetime.fromisoformat(record[key]) for key in ("started", "ended"))
                walls[record["run_id"]] = (end - begin).total_seconds()
        except (OSError, ValueError, KeyError, TypeError):  # another sweep's, and only a guess depends on it
            continue
    history = []
    logs = sorted(LOGS.glob("*.txt"), key=lambda path: path.stat().st_mtime, reverse=True)[:HISTORY_LOGS]
    for path in logs:
        head = head_config(path)
        if (head.get("model"), tuple(head.get("batch_sizes") or ())) not in shapes:
            continue
        log = read_log(path)[-1]
        started = log.event("started")
        if log.state == "finished" and started and log.last_step > 0 and math.isfinite(log.last_time_ms):
            train_s = log.last_time_ms / 1000
            history.append(
                {
                    "run_id": log.run_id,
                    "shape": (head.get("model"), tuple(head.get("batch_sizes") or ())),
                    "device": started.fields.get("device"),
                    "ranks": started.fields.get("world_size"),
                    "threads": started.fields.get("threads"),
                    "step_s": train_s / log.last_step,
                    "other_s": max(
                        0.0, walls.get(log.run_id, train_s) - train_s
                    ),  # start, compiling, validation
                }
            )
    return history


def head_config(path: Path) -> dict:
    """The configuration in a log's head, without reading the steps; {} if there is none."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 20)
        found = re.findall(rb"^config:(\{.*\})$", head, re.MULTILINE)
        config = json.loads(found[-1]) if found else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


@functools.cache
def device_name(gpu: bool) -> str:
    """As the trainers log it."""
    name = (ask_nvidia_smi("name") or ["unknown"])[0] if gpu else platform.processor() or platform.machine()
    return name.strip().replace(" ", "_")


# ------------------------------------------------------------------------------------------------
# SLURM
# ------------------------------------------------------------------------------------------------


def write_slurm(sweep: Sweep, runs: list[Run], nproc: int, parallel: int) -> Path:
    """A job array, one task a run, that needs no launcher: the manifest already says what each is."""
    on_cpu = all(arm.settings.get("DEVICE") == "cpu" for arm in sweep.arms)
    foreign = {*TORCHRUN_SETS}.union(*(read_trainer(run.script).settings for run in runs))
    lines = [
        "#!/bin/bash",
        f"# {len(runs)} runs of {sweep.file}, written by launch_lr_sweep.py --slurm. Submit it from the same",
        f"# folder: sbatch [--partition=...] [--time=...] {LOGS}/{sweep.name}.slurm.sh",
        f"#SBATCH --job-name={sweep.name}",
        f"#SBATCH --array=0-{len(runs) - 1}{f'%{parallel}' if parallel > 1 else ''}",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        f"#SBATCH --{'cpus-per-task' if on_cpu else 'gpus-per-node'}={nproc}",
        f"#SBATCH --output={LOGS}/{sweep.name}.slurm-%a.out",
        'cd "${SLURM_SUBMIT_DIR:-.}" || exit 1',
        "unset " + " ".join(sorted(foreign)) + "  # sbatch passes on the environment that it is called in",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for number, run in enumerate(runs):
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings_of(run).items())
        command = shlex.join(command_of(read_trainer(run.script).path, nproc))
        console = shlex.quote(str(Path(run.log).with_suffix(".out")))
        lines.append(f"{number}) export {settings}")
        lines.append(f"    exec {command} > {console} 2>&1 ;;")
    lines += ['*) echo "no run number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac", ""]
    path = LOGS / f"{sweep.name}.slurm.sh"
    path.write_text("\n".join(lines))
    return path


# ------------------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="SWEEP.toml")
    parser.add_argument("--scale", metavar="NAME", help="apply the file's [scale.NAME]")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and the expected time, run nothing"
    )
    parser.add_argument(
        "--nproc-per-run",
        type=int,
        default=0,
        metavar="K",
        help="ranks of a run (default: its share of the GPUs; on CPU 1)",
    )
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="M", help="runs at a time, on GPUs or cores of their own"
    )
    parser.add_argument(
        "--hang-minutes",
        type=float,
        default=30,
        metavar="X",
        help="stop a run that logs nothing for so long (default 30; 0: never)",
    )
    parser.add_argument("--slurm", action="store_true", help="write a SLURM job array instead of running")
    args = parser.parse_args(argv)
    for name, low in (("nproc_per_run", 0), ("parallel", 1), ("hang_minutes", 0)):
        if not low <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted {low} or more")
    return args


LOCKS = []  # open files


def lock(sweep: Sweep) -> None:
    """Hold the sweep for this process; the system frees it, however we end."""
    LOCKS.append((LOGS / f".{sweep.name}.lock").open("w"))
    try:
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SweepError(
            f"another launcher is running the sweep {sweep.name} in {LOGS.resolve()}; wait for it or stop it"
        ) from None


def launch(
    manifest: Manifest, why: dict[int, str], slots: list[Slot], nproc: int, hang_minutes: float
) -> int:
    """Run what must be run; the exit code."""
    launcher = Launcher(manifest, list(why), slots, nproc, hang_minutes * 60)

    def on_signal(number, frame):
        launcher.signal = number

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:  # nohup asks us to ignore one
            signal.signal(name, on_signal)
    adopt_orphans()
    launcher.run_all()
    return summarize(manifest, launcher.signal)


def summarize(manifest: Manifest, signal_number: int) -> int:
    """Say how all runs of the sweep stand; 0 if all have finished."""
    states = [run.state for run in manifest.runs]
    failed = [run for run in manifest.runs if run.state not in ("finished", "planned", "running")]
    say(
        f"{manifest.sweep.name}: "
        + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    )
    for run in failed:
        say(f"  {run.state}: {run.tag} seed {run.seed} - {run.reason} ({Path(run.log).with_suffix('.out')})")
    if any(state not in ("finished", "diverged") for state in states):
        say("launch again to run what is missing")
    if signal_number:
        return 128 + signal_number
    return int(states.count("finished") < len(states))


def prepare(args: argparse.Namespace) -> tuple[Sweep, Manifest, dict[int, str], list[Slot], int, str]:
    """All that can be refused is refused here. Also: which data are missing, which a dry run only tells."""
    sweep = read_sweep(args.sweep, args.scale)
    if args.slurm:  # the machines are others
        slots, nproc = [], args.nproc_per_run or 1
    else:
        slots, nproc = share_out(sweep, args.parallel, args.nproc_per_run)
    missing = check_data(sweep)
    if not args.dry_run:
        if missing:
            raise SweepError(missing)
        LOGS.mkdir(exist_ok=True)
        lock(sweep)
    manifest = Manifest(sweep)
    for run in [*manifest.runs, *manifest.earlier]:
        settle(run, args.hang_minutes, act=not args.dry_run)
    why = manifest.plan()
    if not args.dry_run:
        for i in why if args.slurm else ():
            manifest.runs[i].state = "submitted"
        manifest.save()
    return sweep, manifest, why, slots, nproc, missing


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        sweep, manifest, why, slots, nproc, missing = prepare(args)
    except (SweepError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print_plan(sweep, manifest, why, slots, nproc)
    if args.dry_run:
        if missing:
            say(f"before it can run: {missing}")
        return 0
    if args.slurm and why:
        path = write_slurm(sweep, [manifest.runs[i] for i in why], nproc, args.parallel)
        say(f"wrote {path}; submit it with: sbatch {path}")
        return 0
    return launch(manifest, why, slots, nproc, args.hang_minutes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
