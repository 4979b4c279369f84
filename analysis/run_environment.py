"""Where and how a run is started: its GPUs or cores, command, settings and environment."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from analysis.manifest import Run
from analysis.trainers import env_text, inherited_environment, read_trainer
from data.cores import usable_cores

# Defaults of the launcher, which a sweep file may override: hundreds of models would fill a disk.
LAUNCHER_DEFAULTS = {"RESUME": "auto", "SAVE_MODEL": False}


def core_ids() -> tuple[int, ...]:
    """Return cores that runs may be pinned to: of this process's, as many as its quota allows."""
    ids = range(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        ids = sorted(os.sched_getaffinity(0))
    return tuple(ids)[: usable_cores()]


@dataclass(frozen=True)
class Slot:
    """Devices that one run may use. No cores means any."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


def share_out(parallel: int, nproc: int, gpus: tuple[str, ...]) -> tuple[list[Slot], int]:
    """Return disjoint slots for `parallel` runs at a time, and the number of ranks per run.

    nproc 0 means all GPUs of a slot; without GPUs, one rank. ValueError if the machine is too small.
    """
    if gpus:
        nproc = nproc or max(1, len(gpus) // parallel)
        if parallel * nproc > len(gpus):
            raise ValueError(
                f"{parallel} runs at a time x {nproc} ranks want {parallel * nproc} GPUs, found "
                f"{len(gpus)} ({', '.join(gpus)}); lower --parallel or --nproc-per-run"
            )
        return [Slot(gpus=gpus[i * nproc : (i + 1) * nproc]) for i in range(parallel)], nproc
    cores = core_ids()
    if parallel > len(cores):
        raise ValueError(
            f"{parallel} runs at a time want {parallel} CPU cores at least, found {len(cores)}; "
            "lower --parallel"
        )
    nproc = nproc or 1
    if parallel == 1:
        return [Slot()], nproc
    share = len(cores) // parallel
    return [Slot(cores=cores[i * share : (i + 1) * share]) for i in range(parallel)], nproc


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
