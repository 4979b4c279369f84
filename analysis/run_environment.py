"""Command, settings and environment of a run, and whether its code is already compiled."""

import hashlib
import json
import os
import sys
from pathlib import Path

from analysis.devices import Slot
from analysis.manifest import Run
from analysis.trainers import env_text, inherited_environment, read_trainer

# Defaults of the launcher, which a sweep file may override: hundreds of models would fill a disk.
LAUNCHER_DEFAULTS = {"RESUME": "auto", "SAVE_MODEL": False}


def given_settings(run: Run) -> dict:
    """Return a run's settings: the launcher's defaults, overridden by the sweep file's."""
    known = read_trainer(run.script).settings
    defaults = {name: value for name, value in LAUNCHER_DEFAULTS.items() if name in known}
    return {**defaults, **run.settings}


def command_of(script: Path, nproc: int) -> list[str]:
    """Return the command of a run. One rank needs no torchrun."""
    if nproc == 1:
        return [sys.executable, str(script)]
    # --standalone picks a free port for each run; --local-addr, because the host's name may not resolve
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*torchrun, f"--nproc-per-node={nproc}", str(script)]


def settings_of(run: Run) -> dict[str, str]:
    """Return the settings that make this run, as environment variables."""
    values = {name: env_text(value) for name, value in given_settings(run).items()}
    return {**values, "SEED": str(run.seed), "RUN_ID": run.run_id}


def environment_of(run: Run, slot: Slot) -> dict[str, str]:
    """Return our environment with only the run's own settings, and no ranks."""
    env = inherited_environment(without=read_trainer(run.script).settings)
    env.update(settings_of(run), PYTHONUNBUFFERED="1")
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow each other on a busy machine
    if slot.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    return env


def warm_marker(run: Run, nproc: int, slot: Slot) -> Path | None:
    """Return a file in the compile cache that exists once this code is compiled; None: no compiling.

    A run without it starts alone, so that later ones need not compile. Any setting may be part of compiled
    code, except recording settings and numbers such as learning rates. A number that is compiled in after all
    (RESIDUAL_SCALE) costs little: seeds are interleaved, so runs that start together are of different arms
    and compile their own code anyway.
    """
    trainer = read_trainer(run.script)
    resolved = trainer.resolve(run.settings)
    compiles = resolved.get("COMPILE") == "1" or (resolved.get("COMPILE") == "auto" and slot.gpus)
    if not compiles:
        return None
    counting = {
        name: resolved[name]
        for name, spec in trainer.settings.items()
        if spec["affects"] != "recording" and not spec["type"].startswith("float")
    }
    text = json.dumps([run.source_hash, nproc, counting], sort_keys=True)
    default = trainer.path.resolve().with_name(".compile_cache") / "inductor"  # the trainers' default
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default)
    return cache / f"launched-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
