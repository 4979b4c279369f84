"""The run log, logs/RUN_ID.txt, which analysis.run_log reads; and what a later start may ask of it.

One flushed append per line, by rank 0. The log begins with every source file of the project that the run
uses, so that unpack_run.py can rebuild the run from its log alone:

    # file: train_gpt.py, 51234 bytes
    <that many bytes>
    ...
    ====== (100 of them)
    config:{every resolved setting}
    affects:{"recording": [...], "machine": [...]}    settings that do not change the numbers
    event:started ...
    ====== (100 of them)
    step:1/1600 ...
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from runtime.ranks import Ranks, usable_cores
from runtime.settings import SettingsError

ROOT = Path(__file__).resolve().parent.parent
BAR = "=" * 100
FIRST_LINE = b"# file: "
# What decides the numbers of a run beside the trainer itself: source_hash covers these.
DECIDES_NUMBERS = ("kernels/*.py", "runtime/sharding.py", "runtime/stream_run.py", "runtime/presets.py")
DECIDES_NUMBERS += ("data/shards.py", "data/documents.py", "data/prefixes.py")


class LogWriter:
    """The log and the console on rank 0; silent on the others.

    Lines that a full disk rejects are kept, and written before the next one.
    """

    def __init__(self, path: Path, rank: int, num_steps: int, go_on: bool = False):
        """go_on: append to a log that exists. Raises SettingsError if the log cannot be written."""
        self.path, self.is_main, self.num_steps = path, rank == 0, num_steps
        self.bar = self.is_main and sys.stdout.isatty()
        self.unwritten, self.disk_is_full = b"", False
        self.end_lock, self.ended = threading.Lock(), False
        if self.is_main:
            self.open(go_on)

    def open(self, go_on: bool):
        try:
            os.makedirs(self.path.parent, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            if not self.path.is_file():
                raise SettingsError(f"{self.path} is no regular file; choose another RUN_ID, or remove it")
            self.lock()  # before anything is asked of it that another process might change
            self.existed = has_begun(self.path)
            if not go_on:
                refuse_existing(self.path)
            if not self.existed:
                os.ftruncate(self.file, 0)
        except OSError as error:
            raise SettingsError(
                f"{self.path} cannot be written: {error.strerror}; run where logs/ can be written"
            ) from None
        size = os.fstat(self.file).st_size
        if size and os.pread(self.file, 1, size - 1) != b"\n":
            self.write("")  # ends the line that a crash cut short

    def lock(self):
        """Keep other writers out, also when two processes resume one run; the lock goes with the process."""
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"{self.path} exists already and is being written by another process; wait for it, or choose "
                "another RUN_ID"
            ) from None
        except (ImportError, OSError):
            self.say(f"warning: {self.path} cannot be locked on this file system")

    def write(self, line: str):
        if self.is_main:
            self.unwritten += (line + "\n").encode()
            self.flush()

    def flush(self):
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[os.write(self.file, self.unwritten) :]
            self.disk_is_full = False
        except OSError as error:
            if not self.disk_is_full:
                self.say(f"warning: {self.path}: {error.strerror}; its lines wait in memory")
            self.disk_is_full = True

    def sync(self):
        """Flush to the disk, before a checkpoint that relies on the log. OSError if there is no room."""
        if self.is_main:
            self.flush()
            if self.unwritten:
                raise OSError(f"{self.path} has lines that the disk does not take")
            os.fsync(self.file)

    def close(self) -> int:
        """Exit code: 1 if the disk never took some lines."""
        if not self.is_main:
            return 0
        self.flush()
        os.close(self.file)
        if self.unwritten:
            lost = self.unwritten.decode()
            show(f"error: {self.path} lacks its last lines, the disk did not take them:\n{lost}", sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # text that the console does not take would become the exit code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(bool(self.unwritten))

    def header(self, config: dict, affects: dict, started: dict, resumed: dict | None = None):
        """Write sources, settings and event:started, and the line of a run that begins from a checkpoint.

        In one call: has_begun() knows a header cut short, and no kill comes between the two events.
        """
        lines = [
            sources().decode() + BAR,
            "config:" + json.dumps(config),
            "affects:" + json.dumps(affects),
            event_line("started", started),
            BAR,
        ]
        if resumed:
            lines.append(event_line("resumed", resumed))
        self.write("\n".join(lines))

    def event(self, name: str, **fields):
        self.write(event_line(name, fields))

    def warn(self, text: str, name: str = "warning", **fields):
        """Write a warning to the log, as an event of this name, and to the console."""
        self.event(name, **(fields or {"text": json.dumps(text)}))
        self.say(f"warning: {text}")

    def end(self, name: str, from_any_rank: bool = False, **fields):
        """Write the last event, once, whichever thread comes first."""
        with self.end_lock:
            if self.ended:
                return
            self.ended = True
        if self.is_main:
            self.event(name, **fields)
        elif from_any_rank and self.path.exists():
            with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
                file.write(event_line(name, fields) + "\n")

    def step(self, step: int, fields: dict):
        """Write one step line: `fields` in their order, floats formatted already."""
        self.write(f"step:{step}/{self.num_steps} " + " ".join(f"{k}:{v}" for k, v in fields.items()))

    def say(self, text: str):
        """Show a line on the console alone."""
        if self.is_main:
            show(("\r\033[K" if self.bar else "") + text)

    def progress(self, step: int, loss: float, tokens_per_s: float, seconds_left: float):
        """Show a bar on a terminal, and now and then a plain line elsewhere."""
        shown_every = max(1, self.num_steps // 20)
        if not self.is_main or not (self.bar or step % shown_every == 0 or step == self.num_steps):
            return
        text = (
            f"step {step:>5}/{self.num_steps}  train loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  "
            f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left"
        )
        if self.bar:
            width = max(10, min(40, shutil.get_terminal_size().columns - len(text) - 4))
            done = round(width * step / self.num_steps)
            text = f"\r\033[K[{'#' * done}{'.' * (width - done)}] {text}"
        show(text, end="" if self.bar else "\n")


def event_line(name: str, fields: dict) -> str:
    return " ".join([f"event:{name}", *(f"{k}:{v}" for k, v in fields.items())])


def show(text: str, file=None, end: str = "\n"):
    """Print to a console that may be closed, or a file on a full disk: no reason to end a run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True, file=file or sys.stdout, end=end)


def sources() -> bytes:
    """The project's source files that this process has imported, each after a line with name and size."""
    paths = {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    paths = {p.resolve() for p in paths if p.is_absolute() and p.is_file()}  # torch.ops is "_ops.py", nowhere
    ours = sorted(p for p in paths if p.is_relative_to(ROOT) and "site-packages" not in p.parts)
    files = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in ours if p.suffix == ".py"}
    return b"".join(
        FIRST_LINE + f"{name}, {len(code)} bytes\n".encode() + code for name, code in files.items() if code
    )


def source_hash(script: Path) -> str:
    """Hash of the code that decides the numbers; a change elsewhere (this file, say) leaves it alone."""
    paths = [script, *(p for pattern in DECIDES_NUMBERS for p in sorted(ROOT.glob(pattern)))]
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()[:16]


def launch_id() -> str:
    """Identify this torchrun: the same for a worker and for the one started in its place."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}.{os.getppid()}"


def provenance(script: Path, ranks: Ranks) -> dict:
    """Description of what ran where, as fields of event:started."""
    git = None
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = platform.processor() or platform.machine()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "script": script.name,
        "source_hash": source_hash(script),
        "launch": launch_id(),
        "git": git.stdout.strip() if git and git.returncode == 0 else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.replace(" ", "_"),
        "world_size": ranks.world_size,
        "threads": torch.get_num_threads(),
        "host_cores": usable_cores(),
    }


# ---------------------------------------------------------------------------------------------------
# Questions to a log that exists
# ---------------------------------------------------------------------------------------------------


def has_begun(log: Path) -> bool:
    """Return whether a log holds more than the piece of a header that an early kill leaves."""
    if not log.is_file():
        return False
    text = log.read_bytes()
    may_be_cut = text.startswith(FIRST_LINE) or FIRST_LINE.startswith(text)
    return b"\nevent:started " in text or not may_be_cut


def refuse_existing(log: Path):
    """Raise SettingsError if a log has begun."""
    if has_begun(log):
        raise SettingsError(
            f"{log} exists already, and logs are never overwritten; choose another RUN_ID, or RESUME=auto to "
            "go on with that run"
        )


def last_event(log: Path) -> str:
    """Last event of a log so far: finished, diverged, crashed, stopped, started, resumed; or empty."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65_536))
        events = rb"^event:(started|resumed|finished|diverged|crashed|stopped)\b"
        found = re.findall(events, file.read(), re.M)
    return found[-1].decode() if found else ""


def logged_config(log: Path) -> dict:
    """The settings in a log's header, and the trainer's name as `script`; {} if no run has begun in it."""
    begun = beginnings(log)
    if not begun:
        return {}
    config = own_lines(log).partition("\n")[0].removeprefix("config:")
    return {**json.loads(config), "script": begun[0]["script"]}


def own_lines(log: Path) -> str:
    """A log from its settings on: lines of the source code before them may look like any of its own."""
    if not log.is_file():
        return ""
    text = "\n" + log.read_text(encoding="utf-8", errors="replace")
    start = text.rfind("\nconfig:{")
    return text[start + 1 :] if start >= 0 else ""


def beginnings(log: Path) -> list[dict[str, str | None]]:
    """Each start and resumption in a log: `path` (the checkpoint's), `script` and `source_hash`.

    `path` is None for a start, "none" for a resumption without a checkpoint; it may contain blanks.
    """
    begun = r"^event:(?:started .*?|resumed step:\d+ path:(?P<path>.*?)) time:\S+ script:(?P<script>.*?)"
    return [
        m.groupdict() for m in re.finditer(begun + r" source_hash:(?P<source_hash>\w+)", own_lines(log), re.M)
    ]


def begun_by_this_launch(log: Path) -> bool:
    """Return whether a worker of this torchrun, maybe one that died since, began or resumed the log."""
    if not log.is_file():
        return False
    ours = rf"^event:(?:started|resumed) .*launch:{re.escape(launch_id())}( |$)"
    return re.search(ours, log.read_text(encoding="utf-8", errors="replace"), re.M) is not None


def run_of_this_launch() -> str:
    """RUN_ID of the run that a restarted worker had begun; empty if it had not got so far."""
    logs = sorted(Path("logs").glob("*.txt"), key=lambda p: p.stat().st_mtime, reverse=True)
    return next((log.stem for log in logs if begun_by_this_launch(log)), "")
