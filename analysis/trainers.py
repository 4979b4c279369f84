"""Training scripts as their --settings-json describes them: settings, presets and source hash.

    trainer = read_trainer("train_gpt.py")
    trainer.source_hash                        # identifies the code that decides the numbers
    trainer.resolve({"MODEL": "tiny"})         # every setting of such a run, defaults included
    trainer.affecting("training", settings)    # only those that change the numbers

A setting affects "training" (the numbers), "recording" (what is written down) or the "machine" (where and how
it runs). The trainer says which; no command keeps a list of its own.
"""

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from analysis.devices import visible_gpus

ROOT = Path(__file__).resolve().parent.parent
# Left over from a torchrun around us, they would make a single process wait for others.
TORCHRUN_SETS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
TORCHRUN_SETS += ("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")
BOOLEANS = {"0": False, "false": False, "1": True, "true": True}


@dataclass(frozen=True)
class TrainerInfo:
    """A training script. `settings` and `presets` map names to what --settings-json says of them."""

    path: Path
    settings: dict[str, dict]
    presets: dict[str, dict]
    source_hash: str

    def resolve(self, settings: dict) -> dict:
        """Return every setting of a run: the script's defaults, then its preset's, then the run's own."""
        values = {name: spec["default"] for name, spec in self.settings.items()} | settings
        if values.get("MODEL") == "auto":
            cuda = values.get("DEVICE") != "cpu" and visible_gpus()
            values["MODEL"] = "gpt2-small" if cuda else "tiny"
        preset = self.presets.get(values.get("MODEL"), {})
        return values | {name: value for name, value in preset.items() if name not in settings}

    def affecting(self, what: str, settings: dict) -> dict:
        """Return those of a run's resolved settings that affect `what`."""
        resolved = self.resolve(settings)
        return {name: resolved[name] for name, spec in self.settings.items() if spec["affects"] == what}


@functools.cache  # asking imports torch, which takes seconds
def read_trainer(script: str) -> TrainerInfo:
    """Ask a script, relative to the working directory or to the project, for its settings."""
    path = Path(script) if Path(script).exists() else ROOT / script
    if not path.is_file():
        raise ValueError(f"script {script!r} is neither in {Path.cwd()} nor in {ROOT}")
    env = {name: value for name, value in os.environ.items() if name not in TORCHRUN_SETS}
    command = [sys.executable, str(path), "--settings-json"]
    asked = subprocess.run(command, capture_output=True, text=True, env=env)
    try:
        answer = json.loads(asked.stdout)
        settings = {spec["name"]: spec for spec in answer["settings"]}
        if not all({"type", "default", "affects"} <= spec.keys() for spec in settings.values()):
            raise ValueError
        return TrainerInfo(path, settings, answer.get("presets", {}), answer["source_hash"])
    except (ValueError, KeyError, TypeError):
        said = (asked.stderr or asked.stdout).strip().splitlines()[-1:] or ["nothing"]
        raise ValueError(
            f"`{script} --settings-json` should print its settings and source_hash as JSON; it exited with "
            f"{asked.returncode} and said: {said[0][:200]}"
        ) from None


def typed(name: str, value: object, spec: dict, where: str) -> object:
    """Return a value in its setting's own type, so that 0, 0.0 and "0" are one.

    Raises ValueError if it does not fit what the trainer says of the setting.
    """
    kind, is_list = spec["type"].removesuffix(",..."), spec["type"].endswith(",...")
    items = [value]
    if is_list:
        items = value if isinstance(value, list) else str(value).strip(" []()").split(",")
    try:
        values = [_typed_one(item, kind, spec) for item in items]
    except (ValueError, TypeError, KeyError):
        values = []
    if not values:
        wanted, meaning = spec.get("allowed", spec["type"]), spec.get("help", "")
        raise ValueError(f"{name}={value!r} in {where}: wanted {wanted} ({meaning})")
    return values if is_list else values[0]


def _typed_one(value: object, kind: str, spec: dict) -> object:
    """Return one value in its type; ValueError, TypeError or KeyError if it does not fit."""
    text = env_text(value)
    if kind == "bool":
        return BOOLEANS[text.lower()]
    if kind == "str":
        if isinstance(value, (list, dict)) or text not in spec.get("choices", (text,)):
            raise ValueError
        return text
    if isinstance(value, bool):
        raise ValueError
    number = int(text) if kind == "int" else float(text)
    low, high, above = spec.get("low", -math.inf), spec.get("high", math.inf), spec.get("above", -math.inf)
    if number in (math.inf, -math.inf) or not low <= number <= high or not number > above:
        raise ValueError  # NaN is above nothing
    return number


def env_text(value: object) -> str:
    """Return a setting as the trainer reads it from its environment, to the last digit."""
    if isinstance(value, list):
        return ",".join(env_text(item) for item in value)
    return str(int(value)) if isinstance(value, bool) else str(value)
