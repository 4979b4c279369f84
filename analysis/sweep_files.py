"""Sweep files: TOML -> arms and runs, all checked against the trainers' own --settings-json.

`python launch_lr_sweep.py --help` describes such a file. Any error in one is a ValueError that says what was
found, what was wanted and what to do.
"""

import difflib
import hashlib
import itertools
import json
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from analysis.files import read_text
from analysis.manifest import Run
from analysis.run_log import format_value
from analysis.trainers import TrainerInfo, env_text, read_trainer

TOP_LEVEL = ("script", "seeds", "control", "env", "grid", "arms", "scale")
ARM_KEYS = ("tag", "script", "seeds", "versus")
SCALE_KEYS = ("seeds", "arms", "grid")
NAME = re.compile(r"[\w.=,+-]+", re.ASCII)  # names of sweeps and arms, which name files
LAUNCHER_SETS = {
    "SEED": "seeds go into `seeds = [...]`",
    "RUN_ID": "the launcher names the runs",
    "NPROC_PER_NODE": "use --nproc-per-run",
    "RESUME": "a run that left a checkpoint goes on from it by itself",
}


@dataclass
class PlannedArm:
    """Runs that differ only in their seed. places: where in the file each setting stands.

    `check_values` completes it: settings as the trainer reads them, settings_hash and lacks.
    """

    tag: str
    script: str
    seeds: list[int]
    settings: dict
    places: dict[str, str]
    versus: str | None = None  # tag of the arm to compare it with, if not the control
    settings_hash: str = ""
    lacks: str = ""  # what is wrong with the data files, if anything

    @property
    def env(self) -> dict[str, str]:
        """Settings as environment variables."""
        return {name: env_text(value) for name, value in self.settings.items()}

    def run(self, seed: int) -> Run:
        """Return the arm's run with a seed, not yet named."""
        source = read_trainer(self.script).source_hash
        return Run("", self.tag, self.script, seed, self.settings, self.settings_hash, source)


@dataclass
class Sweep:
    """Checked sweep file at one scale. `notes` are what the user must be told."""

    name: str
    file: str
    scale: str | None
    control: str | None
    arms: list[PlannedArm]
    notes: list[str] = field(default_factory=list)

    def runs(self) -> list[Run]:
        """Return all runs, not yet named, with seeds interleaved, so that drift affects all arms alike."""
        rounds = range(max(len(arm.seeds) for arm in self.arms))
        return [arm.run(arm.seeds[i]) for i in rounds for arm in self.arms if i < len(arm.seeds)]


def read_sweep(
    file: str, scale: str | None = None, given: dict[str, str] | None = None, elsewhere: bool = False
) -> Sweep:
    """Read and check a sweep file, with [scale.SCALE] applied.

    given: variables that the launcher adds to each run's environment. elsewhere: the runs are for another
    machine, so this one is not checked.
    """
    path = Path(file)
    try:
        document = tomllib.loads(read_text(path))
    except OSError as error:
        near = ", ".join(sorted(str(other) for other in Path("sweeps").glob("*.toml"))) or "none in sweeps/"
        raise ValueError(f"cannot read {file} ({error.strerror}); sweep files here: {near}") from None
    except ValueError as error:  # read_text's, about the encoding, too
        raise ValueError(f"{file} is not valid TOML: {error}") from None
    if not NAME.fullmatch(path.stem):
        raise ValueError(
            f"{path.stem!r} names the sweep's files: letters, digits and . _ - = , + only; rename it"
        )
    check_shape(document)
    if scale is not None:
        apply_scale(document, scale)
    arms, notes = expand(document)
    check_values(arms, given or {}, elsewhere)
    check_different(arms)
    control = document.get("control")
    tags = [arm.tag for arm in arms]
    if control is not None and control not in tags:
        raise ValueError(f"control = {control!r} is none of the arms: {', '.join(tags)}")
    check_versus(arms, control)
    sweep = Sweep(path.stem, file, scale, control, arms, notes)
    for run in sweep.runs():
        run_name(run, "YYYYmmdd-HHMMSS")  # raises ValueError if the name is too long
    return sweep


# ------------------------------------------------------------------------------------------------
# Keys and types, before any value is checked
# ------------------------------------------------------------------------------------------------


def check_shape(document: dict) -> None:
    """Refuse unknown keys and values of the wrong type."""
    kinds = {"script": str, "seeds": list, "control": str, "arms": list}
    check_keys(document, TOP_LEVEL, "at the top of the file")
    for key, value in document.items():
        if not isinstance(value, kinds.get(key, dict)) or isinstance(value, bool):
            hint = "; arms are written as [[arms]], with double brackets" if key == "arms" else ""
            raise ValueError(f"{key} is {value!r}, which is not what the top of a sweep file has there{hint}")
    check_seeds(document.get("seeds", [0]), "at the top of the file")
    check_arms(document.get("arms", []), "")
    for name, scale in document.get("scale", {}).items():
        if not isinstance(scale, dict):
            raise ValueError(f"scale.{name} is {scale!r}; a scale is a table, [scale.{name}]")
        check_keys(scale, SCALE_KEYS, f"[scale.{name}]", settings=True)
        check_seeds(scale.get("seeds", [0]), f"[scale.{name}]")
        if has_own_arms(scale):
            check_arms(scale["arms"], f" of [scale.{name}]")
        check_grid(scale.get("grid", {}), f"[scale.{name}.grid]")
    check_grid(document.get("grid", {}), "[grid]")


def has_own_arms(scale: dict) -> bool:
    """Return whether a scale has its own arms, [[scale.NAME.arms]], rather than a choice of tags."""
    arms = scale.get("arms")
    return isinstance(arms, list) and any(isinstance(arm, dict) for arm in arms)


def check_arms(arms: list, place: str) -> None:
    """Refuse arms without a tag, with unknown keys, or whose script is no name."""
    for number, arm in enumerate(arms, 1):
        if not isinstance(arm, dict):
            raise ValueError(
                f"arm {number}{place} is {arm!r}; arms are written as [[arms]], with double brackets"
            )
        where = f"arm {arm.get('tag', number)!r}{place}"
        check_keys(arm, ARM_KEYS, where, settings=True)
        check_seeds(arm.get("seeds", [0]), where)
        check_name("tag", arm.get("tag"), where)
        if not isinstance(arm.get("script", ""), str):
            raise ValueError(f'script = {arm["script"]!r} in {where}: wanted a trainer, as "train_gpt.py"')
        if "versus" in arm:
            check_name("versus", arm["versus"], where)


def check_name(key: str, name: object, where: str) -> None:
    """Refuse a name that cannot be part of a file name."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f'{where}: wanted {key} = "..." of letters, digits and . _ - = , +; tags name files')


def check_keys(table: dict, known: tuple[str, ...], where: str, settings: bool = False) -> None:
    """Refuse unknown keys; if `settings`, allow those in capitals."""
    for key in table:
        if key not in known and not (settings and key.isupper()):
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            hint += "; settings are written in capitals" if settings else "; settings go into [env]"
            raise ValueError(f"{key} {where} is unknown; {hint}")


def check_grid(grid: object, where: str) -> None:
    """Refuse a grid that is not a table of lists."""
    if not isinstance(grid, dict):
        raise ValueError(f"grid = {grid!r}: wanted a table, {where}")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name} = {values!r} in {where}: wanted a list of values to try")


def check_seeds(seeds: object, where: str) -> None:
    """Refuse seeds that are not a list of distinct integers."""
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(seed) is int and 0 <= seed <= 2**62 for seed in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise ValueError(f"seeds = {seeds!r} {where}: wanted a list of different whole numbers from 0")


# ------------------------------------------------------------------------------------------------
# Arms
# ------------------------------------------------------------------------------------------------


def apply_scale(document: dict, name: str) -> None:
    """Apply [scale.NAME] to the document in place: settings into [env], arms, seeds for all, grid."""
    if name not in document.get("scale", {}):
        known = ", ".join(document.get("scale", {})) or "none"
        raise ValueError(f"--scale {name}: the file has no [scale.{name}]; its scales: {known}")
    scale = dict(document["scale"][name])
    if "seeds" in scale:
        document["seeds"] = scale.pop("seeds")
        for arm in document.get("arms", []):
            arm.pop("seeds", None)
    if has_own_arms(scale):  # these may have seeds of their own
        document["arms"] = scale.pop("arms")
    if "arms" in scale:
        kept, tags = scale.pop("arms"), [arm["tag"] for arm in document.get("arms", [])]
        if not isinstance(kept, list) or not kept or not all(tag in tags for tag in kept):
            raise ValueError(
                f"arms = {kept!r} in [scale.{name}]: wanted a list of tags out of {', '.join(tags)}"
            )
        document["arms"] = [arm for arm in document["arms"] if arm["tag"] in kept]
    grid = document.get("grid", {})
    for setting, values in scale.pop("grid", {}).items():
        if setting not in grid:
            raise ValueError(f"{setting} in [scale.{name}.grid] is not in [grid], which it should replace")
        grid[setting] = values
    for setting in scale:
        if document.get("arms") and all(setting in arm for arm in document["arms"]):
            raise ValueError(f"{setting} in [scale.{name}] does nothing: every arm sets its own")
    document["env"] = {**document.get("env", {}), **scale}


def expand(document: dict) -> tuple[list[PlannedArm], list[str]]:
    """Return arms times grid, and notes on which settings were left out for which arms."""
    grid, common = document.get("grid", {}), document.get("env", {})
    for name in grid:
        if name in common:
            raise ValueError(f"{name} stands in [grid] and also in [env] or [scale]; remove one of them")
    tables = document.get("arms") or [{}]  # without arms, the grid alone makes them
    scripts = [arm.get("script", document.get("script")) for arm in tables]
    if None in scripts:
        raise ValueError(
            'an arm has no script: wanted script = "train_gpt.py" or such at the top of the file'
        )
    trainers = {script: read_trainer(script) for script in scripts}
    taken, notes = from_environment(trainers.values(), {*grid, *common})
    common = {**taken, **common}
    for name in (*common, *grid):
        if not any(name in trainer.settings for trainer in trainers.values()):
            raise unknown_setting(name, "[env], [grid] or [scale]", trainers)
    arms = []
    for table, script in zip(tables, scripts):
        ours = multiply(table, script, common, grid, table.get("seeds", document.get("seeds", [0])))
        arms += ours
        who, known = table.get("tag", script), trainers[script].settings
        lacking = [name for name in (*common, *grid) if not all(name in arm.settings for arm in ours)]
        for names, why in (
            ([name for name in lacking if name not in known], f"as {script} has no such settings"),
            ([name for name in lacking if name in known], "where they do nothing with its other settings"),
        ):
            if names:
                notes.append(f"left out for {who}, {why}: {', '.join(names)}")
    for name in document.get("env", {}):
        if not any(name in arm.settings for arm in arms):
            raise ValueError(
                f"{name} in [env] or [scale] does nothing in any arm; --help says with what it does"
            )
    return arms, notes


def from_environment(trainers: Iterable[TrainerInfo], in_file: set[str]) -> tuple[dict, list[str]]:
    """Return the settings taken from the environment, and notes on them.

    The environment may say where to run: DEVICE, and settings that affect only the machine. It may not say
    what to run, because that would leave no trace.
    """
    affects = {name: spec["affects"] for trainer in trainers for name, spec in trainer.settings.items()}
    found = {name: os.environ[name] for name in sorted(affects) if name in os.environ}
    found.pop("NPROC_PER_NODE", None)  # meant for run.sh
    for name, value in found.items():
        if affects[name] != "machine" and name != "DEVICE":
            where = LAUNCHER_SETS.get(name, "put it into the file's [env]")
            raise ValueError(
                f"{name}={value!r} is set in the environment, but a sweep's settings come from its file: "
                f"`unset {name}`; {where}"
            )
    taken = {name: value for name, value in found.items() if name not in in_file}
    notes = [f"from the environment: {' '.join(f'{k}={v}' for k, v in taken.items())}"] if taken else []
    return taken, notes


def unknown_setting(name: str, where: str, trainers: dict[str, TrainerInfo]) -> ValueError:
    """Return the error for a setting that no trainer has, with the closest known one."""
    known = sorted({other for trainer in trainers.values() for other in trainer.settings})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"the nearest is {near[0]}" if near else f"`python {next(iter(trainers))} --help` lists them"
    if name in TOP_LEVEL:
        hint = "it belongs to the top of the file, above the first [table]"
    return ValueError(f"{name} in {where} is not a setting of {' or '.join(trainers)}; {hint}")


def multiply(table: dict, script: str, common: dict, grid: dict, seeds: list[int]) -> list[PlannedArm]:
    """Multiply an arm by [grid], for settings that its script knows and that it does not set itself.

    Of the common settings it takes those that do something with its own.
    """
    trainer = read_trainer(script)
    own = {name: value for name, value in table.items() if name not in ARM_KEYS}
    where = f"arm {table.get('tag')!r}"
    for name in own:
        if name not in trainer.settings:
            raise unknown_setting(name, where, {script: trainer})
    shared = {name: value for name, value in common.items() if name in trainer.settings}
    axes = {name: values for name, values in grid.items() if name in trainer.settings and name not in own}
    arms = []
    for combination in itertools.product(*axes.values()):
        varied = dict(zip(axes, combination))
        settings = {**shared, **varied, **own}
        places = dict.fromkeys(shared, "[env]") | dict.fromkeys(varied, "[grid]") | dict.fromkeys(own, where)
        idle = [name for name in shared if name not in own and trainer.is_idle(name, settings)]
        for name in idle:
            del settings[name], places[name]
        for name in settings:
            if name in LAUNCHER_SETS:
                raise ValueError(f"{name} in {places[name]}: {LAUNCHER_SETS[name]}")
        values = [f"{name.lower()}_{format_value(value)}" for name, value in varied.items()]
        tag = in_file_name([table["tag"], *values] if "tag" in table else values or ["all"])
        versus = in_file_name([table["versus"], *values]) if "versus" in table else None
        arms.append(PlannedArm(tag, script, seeds, settings, places, versus))
    return arms


def in_file_name(parts: list[str]) -> str:
    """Join the parts of an arm's tag, in characters that may stand in a file's name."""
    return re.sub(r"[^\w.=,+-]", "_", "-".join(parts), flags=re.ASCII)


def check_values(arms: list[PlannedArm], given: dict[str, str], elsewhere: bool) -> None:
    """Give the arms their settings as the trainers read them; ValueError if a trainer refuses one."""
    for script in dict.fromkeys(arm.script for arm in arms):
        trainer, ours = read_trainer(script), [arm for arm in arms if arm.script == script]
        environments = []
        for arm in ours:
            added = {name: value for name, value in given.items() if name in trainer.settings}
            env = {**added, **arm.env, "SEED": str(arm.seeds[0]), "RUN_ID": f"x{arm.tag}"[:100]}
            environments.append({**trainer.without_machine(env), "DEVICE": "cpu"} if elsewhere else env)
        for arm, answer in zip(ours, trainer.check(environments), strict=True):
            if answer["refused"]:
                raise ValueError(refusal(arm, answer["refused"]))
            values = {name: value for name, value in answer["values"].items() if name in arm.settings}
            if elsewhere:
                values.pop("DEVICE", None)
            arm.settings |= values
            arm.settings_hash = hash_settings(trainer, arm.settings)
            arm.lacks = answer["data"] or ""


def refusal(arm: PlannedArm, said: str) -> str:
    """Return a trainer's objection to an arm, and where the setting that it names is in the file."""
    text = arm.env
    for name, place in arm.places.items():
        for shown in (f"{name}={text[name]!r}", f"{name}={text[name]}"):
            if said.startswith(f"{shown}:") or said.startswith(f"{shown} "):
                return said.replace(shown, f"{shown} in {place}", 1)
    return f"arm {arm.tag!r}: {said}"


def hash_settings(trainer: TrainerInfo, settings: dict) -> str:
    """Hash all settings that affect training, defaults included. An arm's settings do not include SEED."""
    training = trainer.affecting("training", settings)
    return hashlib.sha256(json.dumps([trainer.path.name, training], sort_keys=True).encode()).hexdigest()[:8]


def check_different(arms: list[PlannedArm]) -> None:
    """Refuse two arms with one name, or with the same training, which would count one run twice."""
    tags, trainings = set(), {}
    for arm in arms:
        if arm.tag in tags:
            raise ValueError(f"two arms are called {arm.tag!r}; give each its own tag")
        tags.add(arm.tag)
        other = trainings.setdefault(arm.settings_hash, arm)
        if other is not arm:
            raise ValueError(
                f"arms {other.tag!r} and {arm.tag!r} have the same settings, defaults included "
                "(what is only recorded does not count); remove one"
            )


def check_versus(arms: list[PlannedArm], control: str | None) -> None:
    """Refuse an arm's own control unless it is another arm and the other arms have a control."""
    tags = [arm.tag for arm in arms]
    for arm in arms:
        if arm.versus is None:
            continue
        if control is None:
            raise ValueError(f"arm {arm.tag!r} has versus, but there is no control = ... for the other arms")
        if arm.versus not in tags or arm.versus == arm.tag:
            others = ", ".join(tag for tag in tags if tag != arm.tag)
            raise ValueError(f"versus = {arm.versus!r} of arm {arm.tag!r}: wanted another arm, of {others}")


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def run_name(run: Run, stamp: str) -> str:
    """Return TAG-lrmul-1-1.52-1.73-1-cd0.55-TIMESTAMP-seed1-HASH.

    The tag comes first, to be visible where a list truncates names. Nothing parses names, so those of older
    sweeps, which begin with lrmul, are read like any other.
    """
    resolved = read_trainer(run.script).resolve(run.settings)
    parts = [run.tag]
    if "LR_MULS" in resolved:
        parts.append("lrmul-" + "-".join(format_value(value) for value in resolved["LR_MULS"]))
    if "COOLDOWN_FRAC" in resolved:
        parts.append("cd" + format_value(resolved["COOLDOWN_FRAC"]))
    name = "-".join([*parts, stamp, f"seed{run.seed}", run.settings_hash])
    if len(name) > 200:
        raise ValueError(f"the run name {name} has {len(name)} characters, 200 at most; shorten the tag")
    return name
