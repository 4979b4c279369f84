"""Make the most of a short GPU loan: gpt2-small on one device, in four parts, most useful first.

    python benchmarks/first_hour.py a --out out                     # kernels: checked, timed
    python benchmarks/first_hour.py b --out out --tokens shards     # stage 1: steps, profile, twins
    python benchmarks/first_hour.py c --out out --tokens shards     # stages 2 and 3
    python benchmarks/first_hour.py d --out out --tokens shards     # 300 real steps, a sample, resumed

Made for a machine that may vanish at any minute and on which nothing can be installed. Each step is a
process: its output goes to out/STEP.txt, which ends with a line that says how it went, and its numbers to
out/STEP.json; out/clocks.csv has the GPU's clock during timings. A step that fails or hangs does not stop the
next one. After --minutes, the running step gets SIGTERM, at which a trainer saves and stops. The same command
then does the rest; finished steps are not repeated, even failed ones (delete a step's .txt to repeat it). On
another machine, --given names the folder with the earlier call's files. The compile cache is among them, in
out/cache.tar.xz.N.

--tokens: a folder with NAME_train_*.bin and NAME_val_*.bin, plain or .xz, and optionally tiktoken_cache/, to
sample. Without it, random tokens with FineWeb's document lengths.

--dry-run does everything on a CPU with tiny shapes. It proves that each step runs, and that in Triton's
interpreter the kernels match their references. It proves nothing about compiled kernels, varlen attention,
memory, the profiler's CUDA side, or any number.

Exit code: 0; 1 if a step or a check failed; 2 for unusable arguments.
"""

import argparse
import contextlib
import hashlib
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analysis.run_log import read_log  # noqa: E402
from data.shards import DataError, count_tokens, own_shards, write_shard  # noqa: E402

SCRATCH = Path(tempfile.gettempdir()) / "first_hour"  # fixed: a compile cache holds absolute paths
GRACE_S, PACK_S = 40, 40  # of a call's time: for a step to save and stop, and for packing the cache
LEAST_S = 15  # no step begins with less time left: imports alone take 10
SHOWN = 25  # last lines of a step's output that are printed
RUN = "first-hour"
LOSS_FALLS = 0.1  # nats at least; 16 steps of a dry run suffice
RESUMED_WITHIN = 0.02  # nats between a run and its resumed end: GPU atomics add in any order
PIECE_BYTES, MAX_PIECES = 2**24, 3
STEPS_OF_COMPILER = (".ttir", ".ttgir", ".llir", ".ptx", ".source")  # Triton loads a kernel without them
PACKING = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 2**26}]  # kernels are in it twice, far apart


# ---------------------------------------------------------------------------------------------------
# Tokens and settings
# ---------------------------------------------------------------------------------------------------


def draw_documents(count: int, vocabulary: int, mean: int, seed: int) -> np.ndarray:
    """Draw documents of log-normal lengths, with token frequencies that fall as 1 / rank."""
    rng, mark = np.random.default_rng(seed), 0 if vocabulary == 256 else vocabulary - 1
    lengths = np.clip(rng.lognormal(np.log(0.6 * mean), 1.0, count), 16, 20 * mean).astype(int)
    odds = np.cumsum(1 / np.arange(3, vocabulary + 2))
    tokens = np.searchsorted(odds, rng.random(lengths.sum()) * odds[-1]) + (mark == 0)
    tokens[np.cumsum([0, *lengths[:-1]])] = mark
    return tokens


def draw_shards(folder: Path, dry: bool) -> Path:
    vocabulary, mean, *sizes = (256, 60, 500, 200) if dry else (50_257, 700, 30_000, 2000)
    for seed, (kind, count) in enumerate(zip(("train", "val"), sizes)):
        path = folder / f"drawn_{kind}_0.bin"
        if not path.exists():
            write_shard(path, draw_documents(count, vocabulary, mean, seed), vocabulary)
    return folder


def unpack_shards(source: Path, folder: Path) -> Path:
    """Return a folder with just the source's shards, decompressed; ValueError if they will not do."""
    files = sorted(path for path in source.glob("*.bin*") if path.suffix in (".bin", ".xz"))
    key = repr([str(source.resolve()), *((path.name, path.stat().st_size) for path in files)])
    folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        place, new = folder / path.name.removesuffix(".xz"), folder / "new"
        if not place.exists():
            data = path.read_bytes()
            new.write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
            new.replace(place)
    try:
        found = own_shards(str(folder))
    except DataError:  # it names this copy, and settings that do not choose here
        raise ValueError(f"--tokens {source}: shards of several corpora; give a folder with one") from None
    if not found:
        raise ValueError(f"--tokens {source}: found no NAME_train_*.bin with NAME_val_*.bin, plain or .xz")
    return folder


def settings(shards: Path, tokens: Path | None, cache: Path, dry: bool) -> dict[str, str]:
    """Environment of all steps: MODEL or gpt2-small, or small steps of `tiny`.

    Validation is one batch, as large as the shards allow up to the default, so that its memory is a run's.
    """
    have = count_tokens(str(shards), own_shards(str(shards))[1]) - 1
    batch = 1024 if dry else min(2_097_152, max(1, have // 65_536) * 65_536)
    env = dict(MODEL=os.environ.get("MODEL", "gpt2-small"), DEVICE="cuda", DATA_PATH=str(shards))
    env |= dict(VAL_BATCH_TOKENS=str(batch), VAL_TOKENS=str(batch))
    env |= {f"{name}_CACHE_DIR": str(cache / name) for name in ("TORCHINDUCTOR", "TRITON")}
    env["PYTHONUNBUFFERED"] = "1"
    if dry:
        env |= dict(MODEL="tiny", DEVICE="cpu", COMPILE="0", BATCH_SIZES="128,256,384,384")
        env |= dict(CUDA_VISIBLE_DEVICES="")
    if tokens and (tokens / "tiktoken_cache").is_dir():
        env["TIKTOKEN_CACHE_DIR"] = str((tokens / "tiktoken_cache").resolve())
    return {**os.environ, **env}


# ---------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------


def wait(child: subprocess.Popen, seconds: float) -> bool:
    """Return whether the process ended within so many seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    return child.returncode is not None


def stop(child: subprocess.Popen):
    """Stop a process, if it still runs, and all that it started."""
    child.terminate()
    wait(child, GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    wait(child, 5)  # not for ever: a broken driver can keep a killed process


@contextlib.contextmanager
def clocks_to(path: Path):
    """Append the GPU's clock, power and temperature to a file every 2 s, if nvidia-smi is there to ask."""
    if not shutil.which("nvidia-smi"):
        yield
        return
    query = "--query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu"
    with path.open("ab") as file:
        command = ["nvidia-smi", query, "--format=csv", "-l", "2"]
        watch = subprocess.Popen(command, stdout=file, process_group=0)
        try:
            yield
        finally:
            stop(watch)


class Steps:
    """Steps of a call, one after the other until its time is up."""

    def __init__(self, out: Path, env: dict, end: float, dry: bool):
        self.out, self.env, self.end, self.names = out, env, end - GRACE_S - PACK_S, []
        self.finished = f"== finished{' dry' if dry else ''}: "  # a dry run does not count as a real one
        self.patience = 10 if dry else 1  # a CPU may have other work

    def run(self, name: str, command: list, limit_s: float, folder: Path = ROOT, **env):
        """Run a command of Python's, unless an earlier call finished it or the time is up."""
        self.names.append(name)
        limit_s, path = limit_s * self.patience, self.out / f"{name}.txt"
        seconds = min(limit_s, self.end - time.monotonic())
        if self.ended(name).startswith(self.finished) or seconds < LEAST_S:
            return
        command, env = [sys.executable, *map(str, command)], {**self.env, **env}
        print(f"\n{name}: {' '.join(command)}", flush=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        start, pipes = time.monotonic(), dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        with path.open("wb") as file:
            child = subprocess.Popen(command, env=env, cwd=folder, stdout=file, process_group=0, **pipes)
            try:
                in_time = wait(child, seconds)
            finally:
                stop(child)
        how = f"{self.finished}exit code {child.returncode}"
        if not in_time:
            how = f"{self.finished}stopped at its limit" if seconds == limit_s else "== cut off"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{how}, after {time.monotonic() - start:.1f} s\n")
        print("\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:]), flush=True)

    def ended(self, name: str) -> str:
        """Return the line that says how a step ended."""
        path = self.out / f"{name}.txt"
        last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-1:] if path.exists() else []
        return last[0] if last and last[0].startswith("==") else "== not run to its end"

    def succeeded(self, name: str) -> bool | None:
        """None: it has not finished."""
        how = self.ended(name)
        return how.startswith(f"{self.finished}exit code 0,") if how.startswith(self.finished) else None


# ---------------------------------------------------------------------------------------------------
# The parts; each returns what is wrong beside failed steps
# ---------------------------------------------------------------------------------------------------

MACHINE = """
import subprocess, sys, torch.utils.collect_env
sys.path.insert(0, ".")
from runtime.toolchain import fault
print("C compiler:", fault("c") or "works", flush=True)
torch.utils.collect_env.main()
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), flush=True)
    subprocess.run("nvidia-smi -q -d CLOCK,POWER,TEMPERATURE", shell=True)  # it may be missing
"""


def part_a(steps: Steps, scratch: Path, dry: bool) -> list[str]:
    steps.run("a_machine", ["-c", MACHINE], 90)
    numerics = dict(NUMERICS_DEVICE="cpu" if dry else "cuda", NUMERICS_SIZES="first" if dry else "real")
    numerics |= dict(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", TRITON_INTERPRET=str(int(dry)))
    numerics["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # the other commands choose it themselves
    wanted = "not graph and not twins and not fused and not whole" if dry else "not graph"
    command = ["-m", "pytest", "-v", "--tb=short", "--durations=0", "-p", "no:cacheprovider", "-k", wanted]
    steps.run("a_checks", [*command, ROOT / "tests/offgpu/numerics.py"], 300, **numerics)
    command = [ROOT / "benchmarks/kernel_times.py", "--json", steps.out / "a_kernels.json"]
    with clocks_to(steps.out / "clocks.csv"):
        steps.run("a_kernels", command, 240, TRITON_INTERPRET=str(int(dry)))
    return []


def time_stages(steps: Steps, name: str, limit_s: float, *options):
    command = [ROOT / "benchmarks/step_time.py", "--no-evaluation", "--json", steps.out / f"{name}.json"]
    with clocks_to(steps.out / "clocks.csv"):
        steps.run(name, [*command, *options], limit_s)


def part_b(steps: Steps, scratch: Path, dry: bool) -> list[str]:
    count = 2 if dry else 20
    time_stages(steps, "b_stage_1", 240, "--stages", "1", "--steps", count, "--profile")
    time_stages(steps, "b_twins", 360, "--stages", "1", "--steps", 0, "--ord", count)
    return []


def part_c(steps: Steps, scratch: Path, dry: bool) -> list[str]:
    time_stages(steps, "c_stages", 420, "--stages", "2,3", "--steps", 2 if dry else 20, "--profile")
    return []


def part_d(steps: Steps, scratch: Path, dry: bool) -> list[str]:
    """Train, sample and resume, in a scratch folder for each --out; then check what came of it."""
    folder, out = scratch.joinpath("run", *steps.out.parts[1:]), steps.out
    log, again = folder / f"logs/{RUN}.txt", folder / f"logs/{RUN}-resumed.txt"
    if not (out / "d_train.txt").exists():  # to be trained anew: not an old run of another call or code
        shutil.rmtree(folder, ignore_errors=True)
    if not log.exists():  # an earlier call's run is not here
        for path in out.glob("d[_.]*"):
            path.unlink()
    log.parent.mkdir(parents=True, exist_ok=True)
    num, extension, every = (14, 2, 12) if dry else (280, 20, 200)
    env = dict(NUM_SCHEDULED_ITERATIONS=str(num), NUM_EXTENSION_ITERATIONS=str(extension))
    env |= dict(SAVE_EVERY=str(every), VAL_LOSS_EVERY=str(num // 4), VAL_LOSS_LAST_STEPS="0")
    trainer = [ROOT / "train_gpt_muon_ord.py"]
    steps.run("d_train", trainer, 3600, folder, **env, RUN_ID=RUN, RESUME="auto")
    if log.exists():
        shutil.copy(log, out / "d_log.txt")
    if not steps.succeeded("d_train"):
        return []
    if dry or "TIKTOKEN_CACHE_DIR" in steps.env:
        model = [log.with_suffix("") / "model.safetensors", "--device", steps.env["DEVICE"]]
        command = [ROOT / "sample.py", *model, "--tokens", "40", "--prompt", "The history of"]
        steps.run("d_sample", command, 120, folder)
    if checkpoint := checkpoint_to_resume(log):
        steps.run("d_resumed", trainer, 3600, folder, **env, RUN_ID=again.stem, RESUME=str(checkpoint))
    found = check_run(read_log(log)[0], read_log(again)[0] if steps.succeeded("d_resumed") else None)
    out.joinpath("d.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return [f"not true: {what}" for what, ok in found["checks"].items() if ok is False]


def checkpoint_to_resume(log: Path) -> Path | None:
    """Choose the newest from which the run itself did not go on: comparing that would prove nothing."""
    used = [Path(event.fields["path"]).name for event in read_log(log)[0].events if event.name == "resumed"]
    unused = [path for path in log.with_suffix("").glob("step_*.pt") if path.name not in used]
    return max(unused, default=None)


def check_run(run, again) -> dict:
    """Say how a run went, and what is true of it. again: the resumed run, None if there is none."""
    first, *_, last = map(float, run.val.loss)
    resumed = float(again.val.loss[-1]) if again else None
    events = [event.name for event in run.events]
    checks = {
        "the run is finished": run.state == "finished",
        "its loss has fallen": last < first - LOSS_FALLS,
        "nothing was compiled on the way": "recompiled" not in events,
        "a checkpoint was kept": "checkpoint" in events,
        "resumed, it ends alike": abs(resumed - last) < RESUMED_WITHIN if again else None,
    }
    ms, tokens = run.val.time_ms[-1], run.last("tokens")
    bad = "warning", "recompiled", "save_failed"
    warnings = [f"{event.name} {event.fields}" for event in run.events if event.name in bad]
    losses = {"first_val_loss": first, "last_val_loss": last, "resumed_val_loss": resumed}
    costs = {"train_ms": ms, "tokens_per_s": 1000 * tokens / ms, "peak_mem_mb": run.last("peak_mem_mb")}
    return {"checks": checks, **losses, **costs, "warnings": warnings}


# ---------------------------------------------------------------------------------------------------
# The compile cache
# ---------------------------------------------------------------------------------------------------


def pack(cache: Path, out: Path):
    """Pack the cache into out/NAME.tar.xz.0, .1, ...; leave the last ones if that takes too many files."""
    files = sorted(Path(parent) / name for parent, _, names in os.walk(cache) for name in names)
    if not files:
        return
    data = io.BytesIO()
    with lzma.open(data, "wb", filters=PACKING) as xz, tarfile.open(fileobj=xz, mode="w") as archive:
        for path in [path for path in files if path.suffix not in STEPS_OF_COMPILER]:
            archive.add(path, path.relative_to(cache))
    packed = data.getvalue()
    pieces = [packed[i : i + PIECE_BYTES] for i in range(0, len(packed), PIECE_BYTES)]
    print(f"compile cache: {len(packed):,} bytes packed, {len(pieces)} file(s) of at most {MAX_PIECES}")
    if len(pieces) <= MAX_PIECES:
        for old in out.glob(f"{cache.name}.tar.xz.*"):
            old.unlink()
        for i, piece in enumerate(pieces):
            out.joinpath(f"{cache.name}.tar.xz.{i}").write_bytes(piece)


def unpack(given: Path, cache: Path):
    """Unpack an earlier call's cache, unless there is one."""
    pieces, new = sorted(given.glob(f"{cache.name}.tar.xz.*")), cache.with_suffix(".new")
    if not pieces or cache.is_dir():
        return
    shutil.rmtree(new, ignore_errors=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(b"".join(map(Path.read_bytes, pieces))), mode="r:xz") as archive:
            archive.extractall(new, filter="data")
        new.replace(cache)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        print(f"everything is compiled anew: the cache in {given} cannot be unpacked: {error!r}")


# ---------------------------------------------------------------------------------------------------

PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d}
HAS_CUDA = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results go")
    parser.add_argument("--given", type=Path, metavar="FOLDER", help="results of an earlier call (--out)")
    parser.add_argument("--tokens", type=Path, metavar="FOLDER", help="token shards (drawn at random)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time that the call may take (9)")
    parser.add_argument("--dry-run", action="store_true", help="everything tiny, on a CPU")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    start, args = time.monotonic(), parse(argv)
    dry, out, given = args.dry_run, args.out.resolve(), args.given or args.out
    scratch, cache = SCRATCH / ("dry" if dry else "real"), SCRATCH / ("dry_cache" if dry else "cache")
    try:
        if not given.is_dir() and args.given:
            raise ValueError(f"--given {given}: no such folder")
        if not dry and subprocess.run([sys.executable, "-c", HAS_CUDA], timeout=120).returncode:
            raise ValueError("torch finds no CUDA device here; --dry-run needs none")
        tokens = scratch / "tokens"
        shards = unpack_shards(args.tokens, tokens) if args.tokens else draw_shards(tokens / "drawn", dry)
        out.mkdir(parents=True, exist_ok=True)
        for path in given.glob(f"{args.part}[_.]*"):  # what has been done
            if not (out / path.name).exists():
                shutil.copy(path, out)
    except (ValueError, OSError, lzma.LZMAError, EOFError, subprocess.TimeoutExpired) as error:
        print(f"first_hour.py: {error}", file=sys.stderr)
        return 2
    unpack(given, cache)
    steps = Steps(out, settings(shards, args.tokens, cache, dry), start + 60 * args.minutes, dry)
    try:
        wrong = PARTS[args.part](steps, scratch, dry)
    finally:
        try:
            pack(cache, out)
        except OSError as error:
            print(f"the compile cache is not packed: {error}")
    print("\n".join(["", *(f"{name}: {steps.ended(name)}" for name in steps.names), *wrong]))
    return int(bool(wrong) or any(steps.succeeded(name) is False for name in steps.names))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a step is stopped, and the cache is packed
    sys.exit(main(sys.argv[1:]))
