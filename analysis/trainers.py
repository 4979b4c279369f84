"""Training scripts as their --settings-json describes them: settings, presets and source hash.

    trainer = read_trainer("train_gpt.py")
    trainer.source_hash                        # identifies the code that affects the numbers
    trainer.resolve({"MODEL": "tiny"})         # every setting of such a run, defaults included
    trainer.affecting("training", settings)    # only those that change the numbers
    trainer.check([{"MODEL": "tiny"}])         # its answer about each arm's settings

A setting affects "training" (the numbers), "recording" (what is written) or the "machine" (where and how it
runs). The trainer says which; no command keeps its own list.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Inherited from a surrounding torchrun, these would make a single process wait for others.
TORCHRUN_SETS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
TORCHRUN_SETS += ("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")
# A run is not a task of the SLURM job that the launcher runs in.
SLURM_SETS = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


@dataclass(frozen=True)
class TrainerInfo:
    """Training script. `settings` and `presets` map names to their entries in --settings-json."""

    path: Path
    settings: dict[str, dict]
    presets: dict[str, dict]  # the first is what MODEL=auto means on a GPU
    modes: dict[str, dict]  # ORD_MODE -> the defaults it changes
    source_hash: str
    gpus: tuple[str, ...]  # those that its runs would find here

    def check(self, arms: list[dict[str, str]]) -> list[dict]:
        """Ask the script, in one process, about each arm's environment.

        An answer has "values", the settings in their own types, and a run's objections, or None: "refused"
        to the settings, "data" to the data files.
        """
        answers, said = ask(self.path, "--check-arms", json.dumps(arms))
        if answers is None or len(answers) != len(arms):
            raise ValueError(f"`{self.path.name} --check-arms` should answer for {len(arms)} arms; {said}")
        return answers

    def resolve(self, settings: dict) -> dict:
        """Return every setting of a run: defaults of script, preset and mode, overridden by the run's own."""
        values = {name: spec["default"] for name, spec in self.settings.items()} | settings
        if values.get("MODEL") == "auto":
            cuda = values.get("DEVICE") != "cpu" and self.gpus
            values["MODEL"] = next(iter(self.presets)) if cuda else "tiny"
        changed = self.presets.get(values.get("MODEL"), {}) | self.modes.get(values.get("ORD_MODE"), {})
        return values | {name: value for name, value in changed.items() if name not in settings}

    def is_idle(self, name: str, settings: dict) -> bool:
        """Return whether a setting does nothing with the others of a run."""
        other, wanted = self.settings[name].get("only") or (None, ())
        return other is not None and self.resolve(settings)[other.upper()] not in wanted

    def without_machine(self, settings: dict) -> dict:
        """Return the settings without those that affect only the machine."""
        kept = {name for name, spec in self.settings.items() if spec["affects"] != "machine"}
        return {name: value for name, value in settings.items() if name in kept}

    def affecting(self, what: str, settings: dict) -> dict:
        """Return those of a run's resolved settings that affect `what`."""
        resolved = self.resolve(settings)
        return {name: resolved[name] for name, spec in self.settings.items() if spec["affects"] == what}


def gpu_names(count: int) -> tuple[str, ...]:
    """Return the first `count` GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return tuple(part.strip() for part in chosen.split(",") if part.strip())[:count]


@functools.cache  # asking imports torch, which takes seconds
def read_trainer(script: str) -> TrainerInfo:
    """Ask a script, relative to the working directory or to the project, for its settings."""
    path = Path(script) if Path(script).exists() else ROOT / script
    if not path.is_file():
        raise ValueError(f"script {script!r} is neither in {Path.cwd()} nor in {ROOT}")
    answer, said = ask(path, "--settings-json")
    try:
        settings = {spec["name"]: spec for spec in answer["settings"]}
        if not all({"type", "default", "affects"} <= spec.keys() for spec in settings.values()):
            raise ValueError
        gpus = gpu_names(answer["num_gpus"])
        presets, modes = (answer.get(name, {}) for name in ("presets", "modes"))
        return TrainerInfo(path, settings, presets, modes, answer["source_hash"], gpus)
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"`{script} --settings-json` should print its settings, source_hash and num_gpus as JSON; {said}"
        ) from None


def inherited_environment(without: Iterable[str] = ()) -> dict[str, str]:
    """Return our environment without some variables, and without a surrounding torchrun's."""
    drop = {*TORCHRUN_SETS, *SLURM_SETS, *without}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in drop and not name.startswith("TORCHELASTIC_")
    }


def ask(path: Path, question: str, given: str = "") -> tuple[object, str]:
    """Return a script's answer (None if it is not JSON) and its last output."""
    asked = subprocess.run(
        [sys.executable, str(path), question],
        input=given,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=inherited_environment(),
    )
    last = (asked.stderr or asked.stdout).strip().splitlines()[-1:] or ["nothing"]
    try:
        answer = json.loads(asked.stdout)
    except ValueError:
        answer = None
    return answer, f"it exited with {asked.returncode} and said: {last[0][:200]}"


def env_text(value: object) -> str:
    """Format a setting for the trainer's environment, in full precision."""
    if isinstance(value, list):
        return ",".join(env_text(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
