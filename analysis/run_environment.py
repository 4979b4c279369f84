"""Command, settings and environment of a run."""

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
