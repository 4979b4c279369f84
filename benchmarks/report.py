"""Results of benchmarks/first_hour.py: saved after every step, because it may be cut off and resumed later.

A Report holds the steps of one part and its clock. The compile cache is packed into files small enough to
carry to another machine.
"""

import contextlib
import ctypes
import functools
import gc
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from pathlib import Path

import torch

PIECE_BYTES, MAX_PIECES = 2**24, 3
STEPS_OF_COMPILER = (".ttir", ".ttgir", ".llir", ".ptx", ".source")  # Triton loads a kernel without them
PACKING = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 2**26}]  # kernels are in it twice, far apart
SAVE_S, STOP_S = 40, 40  # reserved for packing the cache, and before that for training to save and stop
PR_SET_PDEATHSIG = 1  # Linux's prctl option
DONE = ("ok", "failed", "out of memory", "missing")
MAX_ROWS = 14  # per step, in the table


class Missing(RuntimeError):
    """Something that a step needs is not on this machine."""


class CutOff(RuntimeError):
    """Time was up."""


def row(what: str, value=None, unit: str = "ms", beside=None, note: str = "", ok=None) -> dict:
    """Make a row of the table. beside: the prediction or the bound. ok: the verdict, if it is a check."""
    value, beside = (None if x is None else float(x) for x in (value, beside))
    return {"what": what, "value": value, "unit": unit, "beside": beside, "note": note, "ok": ok}


class Report:
    """Steps of one part and their results; ends the process when time is up."""

    def __init__(self, part: str, out: Path, given: Path, minutes: float, cache: Path):
        """given: folder of an earlier call's files. cache: folder to pack at the end."""
        self.out, self.path, self.cache, self.child = out, out / f"{part}.json", cache, None
        self.end = time.monotonic() + 60 * minutes - SAVE_S
        found = [path for path in (self.path, given / self.path.name) if path.exists()]
        self.steps = json.loads(found[0].read_text(encoding="utf-8")) if found else {}
        self.lock, self.code, self.finished = threading.RLock(), None, threading.Event()
        out.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self.watch, daemon=True).start()

    def seconds_left(self) -> float:
        return self.end - STOP_S - time.monotonic()

    def record(self, name: str, **what):
        """Add to a step's record, and save it."""
        with self.lock:
            self.steps.setdefault(name, {}).update(what)
            self.write()

    def write(self):
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.steps, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)

    def step(self, name: str, run):
        """Run a step and record its rows, unless an earlier call did or time is up. run: () -> rows."""
        before = self.steps.get(name, {})
        status = before.get("status")
        attempts = before.get("attempts", 0) if status == "running" else 0  # that ended the process
        if status in DONE:
            return
        if attempts > 1:
            self.record(name, status="failed", error="it ended the process twice")
        elif self.seconds_left() < 0:
            self.record(name, status="left out")
        else:
            self.record(name, status="running", attempts=attempts + 1)
            start = time.monotonic()
            status, rows, error = self.outcome(run)
            seconds = round(time.monotonic() - start, 2)
            self.record(name, status=status, seconds=seconds, rows=rows, error=error)
            self.empty_device()

    def outcome(self, run) -> tuple[str, list[dict], str]:
        """Run a step: (status, rows, error)."""
        try:
            rows = run() or []
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # kernel errors appear only here
            return "failed" if any(r["ok"] is False for r in rows) else "ok", rows, ""
        except torch.OutOfMemoryError as found:
            return "out of memory", [], str(found)
        except (ImportError, NotImplementedError, Missing) as found:
            return "missing", [], str(found)
        except CutOff as found:
            return "cut off", [], str(found)
        except Exception:
            return "failed", [], traceback.format_exc()[-4000:]

    def guard(self, name: str, run):
        """Run something that makes its own steps; a failure outside of them is a failed step, too."""
        self.steps.pop(name, None)
        try:
            run()
        except Exception:
            self.record(name, status="failed", error=traceback.format_exc()[-4000:])

    def empty_device(self):
        """Free the device's memory; if the device is broken, restart the process, or later steps fail."""
        if torch.cuda.is_available():
            gc.collect()
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                minutes = (self.end + SAVE_S - time.monotonic()) / 60
                os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", str(minutes)])

    def call(self, command: list[str], env: dict, folder: Path) -> subprocess.CompletedProcess:
        """Run a command. When time is up it gets SIGTERM, at which a trainer saves and stops."""
        pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if sys.platform == "linux":  # a trainer that outlives this process would lock its log
            kill_with_parent = ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL
            pipes["preexec_fn"] = functools.partial(*kill_with_parent)
        self.child = subprocess.Popen(command, env=env, cwd=folder, **pipes)
        try:
            said, _ = self.child.communicate(timeout=max(1, self.seconds_left()))
        except subprocess.TimeoutExpired:
            self.child.terminate()
            self.child.communicate()  # watch() ends it after STOP_S
            raise CutOff("the same command goes on from where this one stopped") from None
        return subprocess.CompletedProcess(command, self.child.returncode, said)

    def watch(self):
        """End the process in time, even if its main thread is blocked."""
        if self.finished.wait(max(0, self.end - time.monotonic())):
            return
        try:
            with self.lock:
                for name in [name for name, step in self.steps.items() if step["status"] == "running"]:
                    self.record(name, status="cut off")
                self.finish()
            sys.stdout.flush()
        except Exception:  # such as a full disk
            traceback.print_exc()
        finally:
            if self.child:
                self.child.kill()
            os._exit(1 if self.code is None else self.code)

    def finish(self) -> int:
        """Print the table and pack the cache. Returns the exit code: 1 if a step failed."""
        with self.lock:
            if self.code is None:
                self.code = int(any(step["status"] == "failed" for step in self.steps.values()))
                self.write()
                self.print_table()
                try:
                    pack(self.cache, self.out)
                except OSError as error:
                    print(f"the compile cache is not packed: {error}")
        self.finished.set()
        return self.code

    def print_table(self):
        print(f"{self.path.name:64} {'measured':>18} {'predicted':>12}")
        for name, step in self.steps.items():
            if step["status"] != "ok":
                last = step.get("error", "").strip().rpartition("\n")[2]
                print(f"{name:64.64} {step['status'].upper():>18} {'':12}  {last[:120]}")
            rows = step.get("rows", [])
            for r in rows[:MAX_ROWS]:
                found, beside = ("" if x is None else f"{x:,.2f}" for x in (r["value"], r["beside"]))
                found = f"{found} {r['unit']}" if found else ""
                note = r["note"][:120] + (" <- FAILED" if r["ok"] is False else "")
                print(f"{name + ': ' + r['what']:64.64} {found:>18} {beside:>12}  {note}")
            if len(rows) > MAX_ROWS:
                print(f"{name}: {len(rows) - MAX_ROWS} more in {self.path.name}")
        states = [step["status"] for step in self.steps.values()]
        print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))


def pack(folder: Path, out: Path, piece: int = PIECE_BYTES):
    """Pack a folder into out/cache.tar.xz.0, .1, ...; write nothing if that takes too many files."""
    found = os.walk(folder)  # unlike rglob, it goes on where a folder has just vanished
    files = sorted(Path(parent) / name for parent, _, names in found for name in names)
    if not files:
        return
    data = io.BytesIO()
    with lzma.open(data, "wb", filters=PACKING) as xz, tarfile.open(fileobj=xz, mode="w") as archive:
        for path in [path for path in files if path.suffix not in STEPS_OF_COMPILER]:
            with contextlib.suppress(FileNotFoundError):  # an interrupted compiler was still writing
                archive.add(path, path.relative_to(folder))
    packed = data.getvalue()
    pieces = [packed[i : i + piece] for i in range(0, len(packed), piece)]
    print(f"compile cache: {len(packed):,} bytes packed, {len(pieces)} file(s) of at most {MAX_PIECES}")
    if len(pieces) <= MAX_PIECES:
        for i, part in enumerate(pieces):
            (out / f"cache.new.{i}").write_bytes(part)
        for old in out.glob("cache.tar.xz.*"):
            old.unlink()
        for i in range(len(pieces)):
            (out / f"cache.new.{i}").replace(out / f"cache.tar.xz.{i}")


def unpack(given: Path, folder: Path):
    """Unpack an earlier call's cache into the folder, unless it exists; go on without a damaged one."""
    pieces, new = sorted(given.glob("cache.tar.xz.*")), folder.with_suffix(".new")
    if not pieces or folder.is_dir():
        return
    shutil.rmtree(new, ignore_errors=True)
    try:
        data = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
        with tarfile.open(fileobj=data, mode="r:xz") as archive:
            archive.extractall(new, filter="data")
        new.replace(folder)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        print(f"compiling everything anew: the cache in {given} cannot be unpacked: {error}")
