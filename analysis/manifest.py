"""Manifests, logs/SWEEP.sweep.json: a sweep's plan and progress. Only this module reads or writes them.

manifest = read_manifest(manifest_path("spectral_lr"))
manifest.runs                        # the current plan, with the state of each run
manifest.earlier                     # attempts that are no longer part of the plan
manifest.control_of("a_1")           # tag of the arm to compare that arm with, or None
manifests, errors = manifests_in(Path("logs"))
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from analysis.files import write_atomically
from analysis.shown import clean

LOGS = Path("logs")  # where the trainers write, relative to the working directory
SUFFIX = ".sweep.json"


@dataclass
class Run:
    """Training run, planned or started.

    state: planned, submitted (to SLURM), running, finished, diverged, crashed, hung, stopped, refused (by the
    trainer, before it began).
    """

    run_id: str
    tag: str
    script: str
    seed: int
    settings: dict  # those of the sweep file; the trainer knows the defaults
    settings_hash: str  # of all settings that affect training, defaults included, except the seed
    source_hash: str  # the trainer's, of the code that affects the numbers
    state: str = "planned"
    exit_code: int | None = None
    log: str = ""
    started: str | None = None
    ended: str | None = None
    reason: str = ""
    host: str = ""

    @property
    def key(self) -> tuple:
        """Key that is equal for runs that must give the same numbers."""
        return (self.settings_hash, self.seed, self.source_hash)

    @property
    def console(self) -> Path:
        """File with the run's console output."""
        return Path(self.log).with_suffix(".out")

    @staticmethod
    def from_record(record: dict) -> "Run":
        """Make a run from its record in a manifest, ignoring unknown keys; TypeError if a key is missing."""
        names = {f.name for f in dataclasses.fields(Run)}
        return Run(**{name: value for name, value in record.items() if name in names})


@dataclass
class Manifest:
    """Plan and runs of a sweep. `versus` maps an arm's tag to its own control, if it has one."""

    path: Path
    file: str = ""  # the sweep file, as given to the launcher
    scale: str | None = None
    control: str | None = None
    versus: dict[str, str] = field(default_factory=dict)
    created: str = ""
    runs: list[Run] = field(default_factory=list)
    earlier: list[Run] = field(default_factory=list)

    @property
    def sweep(self) -> str:
        """Name of the sweep."""
        return self.path.name.removesuffix(SUFFIX)

    def control_of(self, tag: str) -> str | None:
        """Return the tag of the arm that this one is compared with, if there is one."""
        return self.versus.get(tag, self.control)

    def save(self) -> None:
        """Write the manifest atomically."""
        data = {"sweep": self.sweep, **dataclasses.asdict(self)}
        del data["path"]
        write_atomically(self.path, json.dumps(data, indent=1) + "\n")


def now() -> str:
    """Return the time in the manifests' format."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def manifest_path(sweep: str, logs: Path = LOGS) -> Path:
    """Return the path of a sweep's manifest."""
    return logs / f"{sweep}{SUFFIX}"


def sweep_among(paths: Sequence[Path]) -> Path | None:
    """Return the sweep, its file or manifest, that the user named; ValueError unless it is named alone."""
    sweeps = [path for path in paths if path.suffix in (".toml", ".json")]
    if sweeps and len(paths) > 1:
        raise ValueError(f"{sweeps[0]} is a sweep; give one sweep, or logs, not both")
    return sweeps[0] if sweeps else None


def find_manifest(sweep: Path, logs: Path = LOGS) -> Path:
    """Return the manifest of a sweep, given its file or the manifest itself.

    ValueError if there is no such sweep file; the manifest need not exist yet.
    """
    if sweep.suffix == ".json":
        return sweep
    if not sweep.exists():
        known = ", ".join(sorted(map(str, sweep.parent.glob("*.toml")))) or f"none in {sweep.parent}/"
        raise ValueError(f"no sweep file {sweep}; there: {known}")
    return manifest_path(sweep.stem, logs)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. FileNotFoundError if there is none; ValueError if the file is not one."""
    try:
        data = clean(json.loads(path.read_text(encoding="utf-8")))
        runs = [Run.from_record(record) for record in data["runs"]]
        earlier = [Run.from_record(record) for record in data.get("earlier", [])]
        return Manifest(
            path,
            file=str(data.get("file", "")),
            scale=data.get("scale"),
            control=data.get("control"),
            versus=dict(data.get("versus") or {}),
            created=str(data.get("created", "")),
            runs=runs,
            earlier=earlier,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a sweep's manifest: {error}") from None


def manifests_in(folder: Path) -> tuple[list[Manifest], list[str]]:
    """Return all readable manifests in a folder, sorted by name, and what is wrong with the others."""
    manifests, errors = [], []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            manifests.append(read_manifest(path))
        except (OSError, ValueError) as error:
            errors.append(str(error))
    return manifests, errors
