"""Checkpoints, logs/RUN_ID/step_N.pt: everything that a run needs to resume.

Also decides where a run begins (anew, from a checkpoint, or not at all because it is over), and writes the
trained model for use elsewhere. A checkpoint is keyed by parameter name and independent of the number of
ranks. It holds no state of random generators: initial weights, data order and router noise are functions of
SEED, `position` and `step`.
"""

import contextlib
import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from runtime.log_writer import (
    beginnings,
    begun_by_this_launch,
    has_begun,
    last_event,
    logged_config,
    run_of_this_launch,
)
from runtime.settings import SettingsError, is_file_name, knobs, not_training

FORMAT = 2  # of what Session.write_checkpoint writes: raise it with every change of its keys
KEYS = {"config", "run_id", "source_hash", "step", "tokens", "train_ms", "reached", "validated", "position"}
KEYS |= {"counts", "params"}
KEPT, MODEL_FILE = 2, "model.safetensors"
HINTS = {
    "num_slices": " (SLICES, or as many as there are ranks if that is more: take its SLICES, and as many "
    "ranks as it had, or at most SLICES if it had no more)"
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: which, what was found, what to do. Exit code 2."""


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """Load a checkpoint, checked to the last byte (every record has a CRC), without running its code."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; a checkpoint (step_*.pt) is wanted")
    try:
        bad = damaged_record(path)
        saved = None if bad else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"RESUME: there is no {path}; give auto, or the path of a step_*.pt") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a file of any content can make them raise anything
        text = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} is no checkpoint, or was cut short ({text[:120]}); use another"
        ) from None
    if bad:
        raise CheckpointError(f"{path} is damaged ({bad}); use an earlier checkpoint")
    check_contents(path, saved)
    return saved


def damaged_record(path: Path) -> str | None:
    """Name of the first damaged record of a checkpoint, a zip file; None if all are whole."""
    with zipfile.ZipFile(path) as file:
        # torch takes a record marked as a folder for one, and leaves its tensor uninitialised
        folder = next((record.filename for record in file.infolist() if record.external_attr), None)
        return file.testzip() or folder


def check_contents(path: Path, saved):
    """Raise CheckpointError for contents of another format, or with a RUN_ID that no run can have."""
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or not saved.keys() >= KEYS:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {FORMAT})")
    run_id = saved["run_id"]  # it becomes a path: a crafted file must not choose it
    if not isinstance(run_id, str) or not is_file_name(run_id):
        raise CheckpointError(f"{path} belongs to RUN_ID {str(run_id)[:80]!r}, which no run can have")


def write(folder: Path, contents: dict) -> Path:
    """Write step_N.pt atomically, then delete all but the newest two.

    Raises OSError if the disk does not take it; older checkpoints stay.
    """
    path, new = folder / f"step_{contents['step']:08d}.pt", folder / ".new.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        make_durable(path)
    except (OSError, RuntimeError) as error:  # torch reports failed writes as RuntimeError
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from None
    for old in checkpoints_in(folder)[:-KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def make_durable(path: Path):
    """Make a rename survive a power cut, also in a folder that is new itself."""
    for folder in (path.parent, path.parent.parent):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(folder.glob("step_" + "[0-9]" * 8 + ".pt"))


def save_model(path: Path, model: nn.Module, metadata: dict):
    """Write a model's state as safetensors, named as its parameters; metadata values become JSON."""
    from safetensors.torch import save_file

    new = path.with_name(".new.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        copies = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        save_file(copies, new, {k: json.dumps(v) for k, v in metadata.items()})
        with new.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(new, 0o666 & ~umask)  # as any file; safetensors makes files for their owner alone
        os.replace(new, path)
        make_durable(path)
    finally:
        new.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------
# Where a run begins
# ---------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Beginning of a run: anew, or from a checkpoint."""

    run_id: str
    resumed: bool = False  # goes on in a log that exists
    path: str = "none"  # the checkpoint's
    contents: dict | None = None  # the checkpoint's, on rank 0; None on the others and without a checkpoint
    damaged: tuple[tuple[Path, str], ...] = ()  # checkpoints that were passed over, and why
    exit_code: int | None = None  # the run is over already, with this code

    @property
    def has_checkpoint(self) -> bool:
        return self.path != "none"


def find_origin(module, s, config: dict, run_id: str) -> Origin:
    """Decide where the run begins, from RESUME and torchrun's restarts.

    module: the trainer. s: its settings. config: all that decides the numbers of the run. run_id: as the user
    gave it, maybe empty.
    """
    classes = (*module.SETTINGS, module.ModelConfig)
    same = SameTraining(classes, {**config, "script": module.SCRIPT.name})
    # a restarted worker resumes if the one that it replaces had begun a log; RESUME=PATH begins there again
    # until the run has a checkpoint of its own
    if is_restart():
        s = dataclasses.replace(s, run_id=run_id or run_of_this_launch() or s.run_id)
        if begun_by_this_launch(s.log) and (not s.resume or checkpoints_in(s.folder)):
            return last_checkpoint(s, same)
    if s.resume == "auto":
        if not run_id:
            raise SettingsError(
                "RESUME=auto without RUN_ID: which run? Set RUN_ID to its log's name, without .txt"
            )
        return last_checkpoint(s, same)
    if s.resume:
        saved = read(Path(s.resume))
        same.require(s.resume, saved["config"])
        s = dataclasses.replace(s, run_id=run_id or saved["run_id"])
        same.require(s.log, logged_config(s.log))
        return Origin(s.run_id, True, s.resume, saved)
    if checkpoints_in(s.folder) and not has_begun(s.log):
        raise SettingsError(
            f"{s.folder} holds checkpoints of an earlier run; RESUME=auto goes on with it, or choose "
            "another RUN_ID"
        )
    return Origin(s.run_id)


def last_checkpoint(s, same: "SameTraining") -> Origin:
    """RESUME=auto: the run's newest checkpoint that can be read, else the one that it branched from.

    Without either, the run from its start.
    """
    same.require(s.log, logged_config(s.log))
    last, damaged = last_event(s.log), []
    lost_model = s.save_model and checkpoints_in(s.folder) and not (s.folder / MODEL_FILE).exists()
    if last == "finished" and not lost_model:
        return Origin(s.run_id, exit_code=0)
    if last == "diverged" and is_restart():  # it would diverge again
        return Origin(s.run_id, exit_code=3)
    for path in reversed(checkpoints_in(s.folder)):
        try:
            return same.origin(s.run_id, path, damaged)
        except CheckpointError as error:
            damaged.append((path, str(error)))
    if damaged:
        found = "; ".join(text for _, text in damaged)
        raise CheckpointError(
            f"{s.folder} has no checkpoint that can be read: {found}. Remove the folder and {s.log} to begin "
            "the run anew"
        )
    path = branched_from(s)
    if path is None:
        return Origin(s.run_id, has_begun(s.log))
    if not path.exists():
        raise CheckpointError(
            f"{path}, from which {s.log} resumed, is gone, and {s.folder} has no checkpoint; put it back, or "
            f"remove {s.log} to begin the run anew"
        )
    return same.origin(s.run_id, path)


def branched_from(s) -> Path | None:
    """The newest checkpoint of another folder that the log resumed from; None if there is none.

    One of the run's own folder counts while it exists: its user may have removed it, to begin the run anew.
    """
    for begun in reversed(beginnings(s.log)):
        if begun["path"] in (None, "none"):
            continue
        path = Path(begun["path"])
        if path.exists() or path.parent.resolve() != s.folder.resolve():
            return path
    return None


def is_restart() -> bool:
    """Return whether torchrun started this worker in place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class SameTraining:
    """Checks that a checkpoint or log belongs to a run of the same training."""

    def __init__(self, classes, config: dict):
        *settings, model_class = classes
        defaults = {f.name: f.default for f in knobs(settings).values()}
        model_defaults = {f.name: f.default for f in dataclasses.fields(model_class)}
        self.defaults = as_json({**defaults, "model_config": model_defaults, "script": config["script"]})
        self.config = as_json(config)
        self.may_differ = {name for names in not_training(settings).values() for name in names}

    def origin(self, run_id: str, path: Path, damaged=()) -> Origin:
        """The beginning of a run from this checkpoint, which is read and checked."""
        saved = read(path)
        self.require(path, saved["config"])
        return Origin(run_id, True, str(path), saved, tuple(damaged))

    def require(self, where, theirs: dict):
        """Raise SettingsError if `theirs`, the config of a checkpoint or log, differs. {}: there is none."""
        found = self.differences(theirs) if theirs else []
        if found:
            raise SettingsError(
                f"{where} belongs to a run of other settings: {'; '.join(found)}. Give it the same settings, "
                "or start a new run under another RUN_ID"
            )

    def differences(self, theirs: dict) -> list[str]:
        """Differences that change the training, in words.

        A setting, or a field of the model's config, that `theirs` predates counts as its default; the
        trainer's name, in checkpoints that lack it, as this trainer's.
        """
        old = {**self.defaults, **as_json(theirs)}
        old["model_config"] = {**self.defaults["model_config"], **old["model_config"]}
        old, new = flat(old), flat(self.config)
        names = sorted({*old, *new} - self.may_differ)
        changed = [name for name in names if old.get(name) != new.get(name)]
        return [f"{n.upper()} was {old.get(n)}, now {new.get(n)}{HINTS.get(n, '')}" for n in changed]


def flat(config: dict) -> dict:
    """A config with the model's fields beside the settings, as MODEL_CONFIG.WIDTH."""
    model = {f"model_config.{key}": value for key, value in config["model_config"].items()}
    return {**{key: value for key, value in config.items() if key != "model_config"}, **model}


def as_json(config: dict) -> dict:
    """A config as it comes back from a file: tuples become lists."""
    return json.loads(json.dumps(config))


def set_aside(origin: Origin, folder: Path):
    """Rename checkpoints newer than the resume point; never delete them."""
    if not origin.has_checkpoint:
        return
    for path in checkpoints_in(folder):
        if path > folder / f"step_{origin.contents['step']:08d}.pt":
            kind = ".damaged" if path in dict(origin.damaged) else ".superseded"
            earlier = len(list(folder.glob(f"{path.stem}{kind}*")))  # set aside by an earlier resumption
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(f"{kind}{earlier or ''}"))
