"""What a run is started with: command, settings, environment, and whether its code is compiled already."""

import hashlib
import json
import os
import sys
from pathlib import Path

from analysis.devices import Slot
from analysis.manifest import Run
from analysis.trainers import env_text, inherited_environment, read_trainer

# What runs are given unless the sweep file sets it: hundreds of models would fill a disk.
LAUNCHER_DEFAULTS = {"RESUME": "auto", "SAVE_MODEL": False}


def given_settings(run: Run) -> dict:
    """Return the settings that a run is started with: the launcher's defaults, then the sweep file's."""
    known = read_trainer(run.script).settings
    defaults = {name: value for name, value in LAUNCHER_DEFAULTS.items() if name in known}
    return {**defaults, **run.settings}


def command_of(script: Path, nproc: int) -> list[str]:
    """Return the command of a run. One rank needs no torchrun."""
    if nproc == 1:
        return [sys.executable, str(script)]
    # --standalone takes a free port, so that parallel runs do not meet; the address: its name may have none
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*torchrun, f"--nproc-per-node={nproc}", str(script)]


def settings_of(run: Run) -> dict[str, str]:
    """Return the settings that make this run, as environment variables."""
    values = {name: env_text(value) for name, value in given_settings(run).items()}
    return {**values, "SEED": str(run.seed), "RUN_ID": run.run_id}


def environment_of(run: Run, slot: Slot) -> dict[str, str]:
    """Return our environment without anybody's settings or ranks, plus the run's own."""
    env = inherited_environment(without=read_trainer(run.script).settings)
    env.update(settings_of(run), PYTHONUNBUFFERED="1")
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin ruin each other on a busy machine
    if slot.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    return env


def warm_marker(run: Run, nproc: int, slot: Slot) -> Path | None:
    """Return a file in the compiler's cache that exists if this code has been compiled; None: no compiling.

    A run without it starts alone, so that those after it need not compile. Any setting may be part of
    compiled code, except what is recorded, and numbers such as learning rates. A number that is compiled in
    after all (RESIDUAL_SCALE) costs little: seeds are interleaved, so runs that start side by side are of
    different arms, and compile code of their own anyway.
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
    default = trainer.path.resolve().with_name(".compile_cache") / "inductor"  # as the trainers have it
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default)
    return cache / f"launched-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
