"""Learn the most from the first minutes on a GPU: gpt2-small on one device, in four parts, most useful first.

    python benchmarks/first_hour.py a --out out                     # kernels and products
    python benchmarks/first_hour.py b --out out --tokens shards     # stage 1: steps, profile, twins
    python benchmarks/first_hour.py c --out out --tokens shards     # stages 2 and 3
    python benchmarks/first_hour.py d --out out --tokens shards     # 300 real steps, sample

For a machine that may vanish at any minute and where nothing can be installed. out/PART.json is written after
every step, with the predictions of scaling_model.py beside the measurements. Rerun the same command to
continue where it was cut off; --given names the folder that now holds an earlier call's files. They include
the compile cache, out/cache.tar.xz.N, which saves a fresh machine from compiling again. --minutes: no step
starts after that, and the call ends and lists what it left out. A failed step does not stop the next one.
Running out of memory, or a missing feature, is a result.

--tokens: a folder with *_train_*.bin and *_val_*.bin, plain or .xz, and optionally tiktoken_cache/, to
sample. Without it, random tokens with FineWeb's document lengths.

--dry-run does everything on a CPU with tiny shapes. It proves that each step runs, and that in Triton's
interpreter the kernels match their references. It proves nothing about compiled kernels, varlen attention,
memory, the profiler's CUDA side, or any number.

Exit code: 0; 1 if a step failed; 2 for unusable arguments.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import lzma
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from report import Missing, Report, row, unpack  # noqa: E402

from analysis.run_log import read_log  # noqa: E402
from data.shards import check_shard, write_shard  # noqa: E402
from runtime.compiling import choose_allocator, graphs_compiled  # noqa: E402
from runtime.gauges import peak_memory_mib  # noqa: E402
from runtime.toolchain import fault  # noqa: E402

# The steps import the trainers and all that defines kernels: main() first chooses whether Triton interprets,
# and a failed import fails only its own step.

SCRATCH = Path(tempfile.gettempdir()) / "first_hour"  # fixed: a compile cache holds absolute paths
ORD = "train_gpt_muon_ord"
TIMED = ("device", "attention", "matmul", "head", "logits", "tables", "polar", "updates", "gates")
RUN = "first-hour"
ORD_SHARE = 0.005  # goal: the most that ORD may add, as a fraction of a step
LOSS_FALLS = 0.1  # nats at least; 16 steps of a dry run suffice
RESUMED_WITHIN = 0.02  # nats between a run and its resumed end: GPU atomics add in any order


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


def scratch(dry: bool) -> Path:
    """Folder for what is no result; a real call must not meet a dry one's runs or compile cache."""
    return SCRATCH / ("dry" if dry else "real")


def prepare_shards(tokens: Path | None, dry: bool) -> Path:
    """Return a folder with the given shards, unpacked, or with drawn ones."""
    folder = scratch(dry) / ("given" if tokens else "drawn")
    folder.mkdir(parents=True, exist_ok=True)
    if tokens is None:
        vocabulary, mean, *sizes = (256, 60, 500, 200) if dry else (50_257, 700, 30_000, 2000)
        for seed, count in enumerate(sizes):
            found = draw_documents(count, vocabulary, mean, seed)
            write_shard(folder / f"drawn_{('train', 'val')[seed]}_0.bin", found, vocabulary)
        return folder
    for path in (*tokens.glob("*_train_*.bin*"), *tokens.glob("*_val_*.bin*")):
        place = folder / path.name.removesuffix(".xz")
        if not place.exists():
            data, new = path.read_bytes(), place.with_suffix(".new")
            new.write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
            new.replace(place)
    return folder


def trainer_env(folder: Path, dry: bool) -> dict[str, str]:
    """Settings of the trainers: gpt2-small, or small steps of `tiny`, with validation to fit the shards."""
    batch = 1024 if dry else 524_288
    have = sum(check_shard(path).num_tokens for path in folder.glob("*_val_*.bin")) - 1
    env = dict(MODEL="gpt2-small", DEVICE="cuda", TRAIN_FILES="*_train_*.bin", VAL_FILES="*_val_*.bin")
    env |= dict(DATA_PATH=str(folder), VAL_BATCH_TOKENS=str(batch))
    env["VAL_TOKENS"] = str(batch * max(1, min(3, have // batch)))
    if dry:
        env |= dict(MODEL="tiny", DEVICE="cpu", COMPILE="0", BATCH_SIZES="128,256,384,384")
    return {**os.environ, **env}


def predict(model: str, stage: int) -> dict[str, float]:
    """Predict the ms of a step of this preset on this GPU, by scaling_model.PARTS and in total."""
    import scaling_model

    from kernels import attention

    p, changes = scaling_model.read_presets()[model], {}
    if torch.cuda.is_available():
        changes |= scaling_model.H200 if "H200" in torch.cuda.get_device_name() else {}
        changes |= {} if attention.activate("varlen")[0] == "varlen-FA2" else scaling_model.FA3
    machine = dataclasses.replace(scaling_model.Machine(), **changes)
    tied = stage < 2 or p.config.untie_frac == 1
    tokens, windows = p.settings.batch_sizes[stage], p.config.windows[stage]
    seconds = scaling_model.step_seconds(p.config, machine, tokens, windows, 1, tied)
    found = {name: 1000 * s for name, s in seconds.items()}
    return {**found, "step": sum(found.values())}


# ---------------------------------------------------------------------------------------------------
# a: kernels and products
# ---------------------------------------------------------------------------------------------------


def ask(*command: str) -> str:
    """Return a command's output, or the error."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def clocks() -> str:
    wanted = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"
    return ask("nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader")


def describe_machine() -> list[dict]:
    found = {d.name: d.version for d in importlib.metadata.distributions()}
    names = ["torch", "triton", "numpy", "safetensors", "tiktoken", "flash-attn-4", "flash_attn_3"]
    versions = ", ".join(f"{name} {found.get(name, '-')}" for name in names)
    compilers = ", ".join(f"{language} {fault(language) or 'works'}" for language in ("c", "c++"))
    rows = [
        row("cores", os.cpu_count(), "", note=f"{platform.platform()}, Python {platform.python_version()}"),
        row("torch", note=f"{torch.__version__}, CUDA {torch.version.cuda}; {versions}"),
        row("compilers", note=compilers),
    ]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        note = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
        rows += [
            row("device memory", gpu.total_memory / 2**30, "GiB", note=note),
            row("clocks", note=clocks()),
        ]
    return rows


def choose_attention(device: str) -> list[dict]:
    """Report the implementation that training would use, after activate() has checked it."""
    from kernels import attention

    name, warnings = attention.activate("varlen" if device == "cuda" else "sdpa")
    return [row("attention", note="; ".join([name, *warnings]))]


def check_kernels(report: Report, dry: bool):
    """Run the tests of tests/offgpu/numerics.py, each as a step; a dry run leaves out the slowest."""
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no plugins of this Python
    os.environ["NUMERICS_DEVICE"] = "cpu" if dry else "cuda"
    os.environ["NUMERICS_SIZES"] = "first" if dry else "real"
    wanted = "not graph and not twins and not fused and not whole" if dry else "not graph"

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(pyfuncitem):
        code = pyfuncitem.obj.__code__
        arguments = {name: pyfuncitem.funcargs[name] for name in code.co_varnames[: code.co_argcount]}
        report.step(f"check {pyfuncitem.name}", lambda: pyfuncitem.obj(**arguments))
        return True  # keeps pytest from calling it

    tests, plugin = ROOT / "tests/offgpu/numerics.py", SimpleNamespace(pytest_pyfunc_call=pytest_pyfunc_call)
    code = pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-k", wanted, str(tests)], [plugin])
    torch.set_default_device("cpu")  # numerics.py changed it
    if code:
        raise RuntimeError(f"pytest ended with {code!r}; its output says why")


def time_part(lab, part: str, stage: int) -> list[dict]:
    """Time each product or kernel of a part, and estimate a step from their sum."""
    found, step_ms = lab().measure(part, stage)
    rows = []
    for case, ms in found:
        rate = f"{case.flop / ms / 1e9:,.1f} TFLOP/s" if case.flop else f"{case.bytes / ms / 1e6:,.0f} GB/s"
        rows.append(row(case.name, ms, note=rate if case.flop or case.bytes else ""))
    predicted = predict(lab().s.model, stage)
    predicted.pop("updates")  # with Adam and the zeroing of tables; measured are matrices only
    whole = [row("a step", step_ms, beside=predicted.get(part))] if step_ms else []
    return [*whole, *rows]


def part_a(report: Report, env: dict, dry: bool):
    report.step("machine", describe_machine)
    report.step("attention", lambda: choose_attention(env["DEVICE"]))
    report.guard("all checks", lambda: check_kernels(report, dry))

    @functools.cache
    def lab():
        import kernel_times

        return kernel_times.Lab(env)

    for part in TIMED:
        for stage in (0, 1, 2) if part == "attention" else (0,):
            name = f"time {part}, stage {stage + 1}"
            report.step(name, functools.partial(time_part, lab, part, stage))
    report.step("clocks after that", lambda: [row("clocks", note=clocks())])


# ---------------------------------------------------------------------------------------------------
# b, c: the compiled step
# ---------------------------------------------------------------------------------------------------


def cache_use() -> str:
    """Report hits and misses of the compile caches in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    groups = [dynamo.counters[name] for name in ("inductor", "aot_autograd")] if dynamo else []
    return ", ".join(f"{name} {n}" for group in groups for name, n in group.items() if "cache" in name)


class Stages:
    """The trainer of parts b and c, built when a step first asks for it."""

    def __init__(self, env: dict, count: int):
        """count: number of steps to time, and of pairs of steps of the twins."""
        self.env, self.count, self.timed, self.stage = env, count, None, None

    def at(self, stage: int):
        """Enter the stage and run its first two steps, which compile: a continued call skips compile()."""
        import step_time

        if self.stage != stage:
            start = time.perf_counter()
            self.timed = self.timed or step_time.build(ORD, self.env)
            self.timed.enter(stage)
            built = time.perf_counter()
            self.timed.pair(recorded=False)
            self.timed.flush()
            self.timed.clock.sync()
            self.seconds = built - start, time.perf_counter() - built
            self.stage = stage
        return self.timed

    def compile(self, stage: int) -> list[dict]:
        """Report what at() has built and compiled."""
        before, timed = graphs_compiled(), self.at(stage)
        (built, first), names, warnings = self.seconds, timed.fast_names, timed.fast_warnings
        return [
            row("the trainer is built", built, "s"),
            row("first two steps", first, "s", note=cache_use()),
            row("graphs", graphs_compiled() - before, ""),
            row("fast forms", len(names), "", note=", ".join([*names, *warnings]), ok=not warnings),
        ]

    def steps(self, stage: int) -> list[dict]:
        """Time whole steps and their parts with step_time; nothing may compile now."""
        import step_time

        timed, before = self.at(stage), graphs_compiled()
        r = step_time.measure_stage(timed, stage, self.count, evaluate=False)
        ms, compiled = predict(timed.s.model, stage)["step"], graphs_compiled() - before
        low, high = r["ms_step_quartiles"]
        return [
            row("step", r["ms_step"], beside=ms, note=f"quartiles {low:.2f} to {high:.2f}"),
            row("tokens/s", r["tokens_per_s"], "", 1000 * r["batch_tokens"] / ms),
            *(row(name, value) for name, value in r["parts_ms"].items()),
            row("device's matmul rate", r["ceiling_flops"] / 1e12, "TFLOP/s"),
            row("share of it in a step", r["of_ceiling_step"], ""),
            row("graphs compiled meanwhile", compiled, "", ok=not compiled),
        ]

    def profile(self, stage: int) -> list[dict]:
        """Compare host and total time of single steps; then list time by kernel, per step of a pair."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        timed, host, whole = self.at(stage), 0.0, 0.0
        for _ in range(2):
            timed.clock.sync()
            start = time.perf_counter()
            timed.step()
            host += time.perf_counter() - start
            timed.clock.sync()
            whole += time.perf_counter() - start
        cuda, kernels = timed.clock.cuda, []
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA][: int(cuda)]]) as found:
            timed.pair(recorded=False)
            timed.flush()
            timed.clock.sync()
        for event in found.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            on_device = event.device_type == DeviceType.CUDA and not event.is_user_annotation
            if us and on_device == cuda:
                kernels.append(row(event.key[:60], us / 2000, note=f"{event.count / 2:g} a step"))
        kernels.sort(key=lambda r: -r["value"])
        return [
            row("a step alone: the host's part", 500 * host),
            row("a step alone", 500 * whole),
            row("all kernels", sum(r["value"] for r in kernels), note=f"{len(kernels)} kinds"),
            *kernels,
        ]

    def memory(self, stage: int) -> list[dict]:
        """Report peaks since the process began, the device's beside the trainer's forecast."""
        timed = self.at(stage)
        forecast = timed.trainer.memory.wanted(timed.trainer.memory.largest_pass()) / 2**20
        peaks = peak_memory_mib(timed.ranks)
        return [row(name, x, "MiB", forecast if "cuda" in name else None) for name, x in peaks.items()]

    def twins(self, stage: int) -> list[dict]:
        """Compare train_gpt_muon_ord.py with train_gpt.py, pair by pair on the same tokens."""
        import step_time

        if self.timed:
            self.timed.close()
        self.timed = self.stage = None
        gc.collect()
        (r,) = step_time.time_twins(self.env, None, [stage], self.count)
        ratio, extra = r["ratio"], r["optimizer_extra_share_of_step"]
        note = f"{ratio['low']:.4f} to {ratio['high']:.4f}; fused: {r['fused_step']}"
        return [
            row("step, ORD over NorMuon", ratio["median"], "", 1 + ORD_SHARE, note),
            row("share of a step that ORD adds", extra["median"], "", ORD_SHARE),
            *(row(f"step of {script}", ms) for script, ms in r["ms_step"].items()),
            *(row(f"optimizer of {script}", ms) for script, ms in r["ms_optimizer"].items()),
        ]


def time_stages(report: Report, timed: Stages, stages: tuple[int, ...]):
    for stage in stages:
        for action in (timed.compile, timed.steps, timed.profile):
            report.step(f"{action.__name__}, stage {stage + 1}", functools.partial(action, stage))
    report.step("peak memory", lambda: timed.memory(stages[-1]))


def part_b(report: Report, env: dict, dry: bool):
    timed = Stages(env, 2 if dry else 20)
    time_stages(report, timed, (0,))
    report.step("twins, stage 1", lambda: timed.twins(0))


def part_c(report: Report, env: dict, dry: bool):
    time_stages(report, Stages(env, 2 if dry else 20), (1, 2))


# ---------------------------------------------------------------------------------------------------
# d: a real run
# ---------------------------------------------------------------------------------------------------


class RealRun:
    """Runs of the trainer itself, each in its own process, in a scratch folder for each --out."""

    def __init__(self, report: Report, env: dict, dry: bool):
        self.report = report
        self.logs = scratch(dry).joinpath("run", *report.out.parts[1:], "logs")
        steps, extension, save = (14, 2, 12) if dry else (280, 20, 200)
        self.env = env | dict(NUM_SCHEDULED_ITERATIONS=str(steps), NUM_EXTENSION_ITERATIONS=str(extension))
        self.env |= dict(SAVE_EVERY=str(save), VAL_LOSS_EVERY=str(steps // 4), VAL_LOSS_LAST_STEPS="0")
        self.logs.mkdir(parents=True, exist_ok=True)
        if not (self.logs / f"{RUN}.txt").exists():  # an earlier call's run is not here
            report.steps.clear()

    def train(self, run_id: str, resume: str):
        """Train to the end: (run read from its log, rows about it). The log is copied to the results."""
        env, log = self.env | dict(RUN_ID=run_id, RESUME=resume), self.logs / f"{run_id}.txt"
        start = time.perf_counter()
        try:
            done = self.report.call([sys.executable, str(ROOT / f"{ORD}.py")], env, self.logs.parent)
        finally:
            if log.exists():
                shutil.copy(log, self.report.out / f"d_{run_id}.txt")
        if done.returncode and "OutOfMemory" in done.stdout:
            raise torch.OutOfMemoryError(done.stdout[-1000:])
        if done.returncode:
            raise RuntimeError(f"the trainer ended with {done.returncode}:\n{done.stdout[-3000:]}")
        run, seconds = read_log(log)[0], time.perf_counter() - start
        names = "warning", "recompiled", "save_failed"
        odd = [f"{event.name} {event.fields}" for event in run.events if event.name in names]
        rate = 1000 * run.last("tokens") / run.val.time_ms[-1]
        return run, [
            row("finished", run.last_step, "steps", ok=run.state == "finished"),
            row("training", run.val.time_ms[-1] / 1000, "s", note=f"{rate:,.0f} tokens/s"),
            row("the process", seconds, "s", note="with imports, rehearsal, evaluation, checkpoints"),
            row("warnings", len(odd), "", note="; ".join(odd), ok=not any("recompiled" in x for x in odd)),
        ]

    def whole(self) -> list[dict]:
        """Run all steps; check that the loss falls, nothing recompiles and a checkpoint is kept."""
        run, rows = self.train(RUN, "auto")
        first, last = run.val.loss[0], run.val.loss[-1]
        saved = [e.fields["path"] for e in run.events if e.name == "checkpoint"]
        return [
            *rows,
            row("first validation loss", first, ""),
            row("last validation loss", last, "", ok=bool(last < first - LOSS_FALLS)),
            row("checkpoints", len(saved), "", note=", ".join(saved), ok=bool(saved)),
        ]

    def resumed(self) -> list[dict]:
        """Repeat the last steps from a checkpoint, under another name; check for the same loss.

        Take the newest at which the run itself was not resumed; else the comparison proves nothing.
        """
        whole = read_log(self.logs / f"{RUN}.txt")[0]
        used = [Path(e.fields["path"]).name for e in whole.events if e.name == "resumed"]
        saved = max((self.logs / RUN).glob("step_*.pt"), key=lambda path: (path.name not in used, path))
        run, rows = self.train(f"{RUN}-resumed", str(saved))
        found, wanted = run.val.loss[-1], whole.val.loss[-1]
        same = any(e.name == "resumed" for e in run.events) and abs(found - wanted) < RESUMED_WITHIN
        return [*rows, row("last validation loss", found, "", wanted, ok=bool(same))]

    def sample(self) -> list[dict]:
        """Sample from the trained model; needs GPT-2's vocabulary."""
        model, text = self.logs / RUN / "model.safetensors", ("--tokens", "40", "--prompt", "The history of")
        command = [sys.executable, str(ROOT / "sample.py"), str(model), *text, "--device", self.env["DEVICE"]]
        done = self.report.call(command, self.env, self.logs)
        if done.returncode and "tiktoken" in done.stdout:
            raise Missing(done.stdout[-300:])
        said = " ".join(done.stdout.split())
        return [row("exit code", done.returncode, "", note=said, ok=done.returncode == 0)]


def part_d(report: Report, env: dict, dry: bool):
    run = RealRun(report, env, dry)
    report.step("train", run.whole)
    for name, action in (("resume", run.resumed), ("sample", run.sample)):
        if report.steps["train"].get("rows"):  # it trained to the end, even if a check failed
            report.step(name, action)
        else:
            report.record(name, status="left out")


PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d}


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
    args = parse(argv)
    given, dry, cache = args.given or args.out, args.dry_run, scratch(args.dry_run) / "cache"
    os.environ |= {f"{name}_CACHE_DIR": str(cache / name) for name in ("TORCHINDUCTOR", "TRITON")}
    if dry:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": str(int(args.part == "a"))}
    if args.tokens and (args.tokens / "tiktoken_cache").is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str((args.tokens / "tiktoken_cache").resolve())
    choose_allocator()
    if not dry and not torch.cuda.is_available():
        print("first_hour.py: torch finds no CUDA device here; --dry-run needs none", file=sys.stderr)
        return 2
    unpack(given, cache)
    report = Report(args.part, args.out.resolve(), given, args.minutes, cache)

    def run():
        PARTS[args.part](report, trainer_env(prepare_shards(args.tokens, dry), dry), dry)

    report.guard("the whole part", run)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
