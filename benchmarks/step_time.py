"""Time a training step and its parts, and compare it with the device's own matmul rate.

    python benchmarks/step_time.py                                   # all stages of the default preset
    python benchmarks/step_time.py --steps 40 --ord --json out.json  # and the ratio of the twins
    torchrun --standalone --nproc-per-node=8 benchmarks/step_time.py --stages 1,3
    python benchmarks/step_time.py --stages 1 --profile --no-evaluation
    MODEL=tiny BATCH_SIZES=4096,4096,4096,4096 python benchmarks/step_time.py --script train_gpt.py

Settings are the trainer's environment variables. The step is the trainer's own: its Trainer, TrainData, Ranks
and evaluate, on the shards that a run would read. Nothing is written except --json, after every stage.

* Whole steps are timed without instrumentation, in pairs, because Adam moves on every second step. The parts
  come from other steps, in which the trainer's calls (data.next, forward, backward, optimizer.step, the
  collectives and the waits for them) are wrapped; time counts for the innermost call. So "communication" is
  what no other work hides, including waits for slower ranks. On CUDA all times are events on the stream;
  nothing synchronizes inside a step.
* The ceiling is the rate of a square product in the model's dtype, on all ranks at once. On a CPU it is
  measured again before every pair of steps, because the machine's other load varies. FLOP of a float8 head
  (sm_89 and later) count against the same ceiling.
* FLOP are the trainer's own count for its logs, from the document lengths of the shard.
* A step before a validation also measures ORD's statistics; it is timed only if it is among the timed steps.
  One whole validation is timed; the last one's longer windows are not timed separately.
* --profile lists the kernels of a step (on a CPU: torch's operators) by their time, and how long the host
  takes to issue a step to an idle device. A GPU queues some 1,000 kernels, about a pass of gpt2-small; in a
  step of several passes, the host then waits. This comes last in a stage, because profiled steps are slower.
* --ord interleaves both trainers in one process, pair by pair in alternating order, on the same tokens. It
  reports the median of the paired ratios with a confidence interval from order statistics (no assumption
  about the noise), and whether ORD's settings use the fused kernels or plain torch.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels import attention, fast_forms  # noqa: E402
from runtime.checking import read_run  # noqa: E402
from runtime.compiling import choose_allocator, graphs_compiled  # noqa: E402
from runtime.gauges import Timer, matmul_flops, peak_memory_mib  # noqa: E402
from runtime.ranks import Ranks  # noqa: E402
from runtime.session import to_host  # noqa: E402

PARTS = ("data", "forward", "backward", "communication", "optimizer", "other")
WARM_PAIRS = 2
SHOWN = 12  # kernels of a profile; --json has them all
TWINS = ("train_gpt", "train_gpt_muon_ord")


# ---------------------------------------------------------------------------------------------------
# Clocks
# ---------------------------------------------------------------------------------------------------


class Parts:
    """Time by part: the time between two marks counts for the innermost wrapped call."""

    def __init__(self, clock: Timer):
        self.clock, self.on, self.stack, self.marks = clock, False, [], []

    def note(self):
        self.marks.append((self.clock.mark(), self.stack[-1] if self.stack else None))

    @contextlib.contextmanager
    def part(self, name: str):
        if not self.on:
            yield
            return
        self.stack.append(name)
        self.note()
        try:
            yield
        finally:
            self.stack.pop()
            self.note()

    def wrap(self, name: str, function):
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def wrap_collective(self, function):
        """Wrap a collective of Ranks: both its start and the wait for its result count."""

        def timed(*args, **kwargs):
            with self.part("communication"):
                work = function(*args, **kwargs)
            return Waited(work, self) if self.on else work

        return timed

    @contextlib.contextmanager
    def recording(self):
        """Record what runs inside; time outside wrapped calls is 'other'."""
        self.on, backward = True, torch.Tensor.backward
        torch.Tensor.backward = self.wrap("backward", backward)
        try:
            with self.part("other"):
                yield
        finally:
            torch.Tensor.backward, self.on = backward, False

    def take(self) -> list:
        """Return the marks recorded since the last call, for spent()."""
        marks, self.marks = self.marks, []
        return marks

    def spent(self, marks: list) -> dict[str, float]:
        """Return the ms of each part; call clock.sync() first."""
        spent = dict.fromkeys(PARTS, 0.0)
        for (start, name), (end, _) in zip(marks, marks[1:]):
            if name is not None:
                spent[name] += self.clock.ms(start, end)
        return spent


class Waited:
    """Collective in flight whose wait() counts as communication."""

    def __init__(self, work, parts: Parts):
        self.work, self.wait = work, parts.wrap("communication", work.wait)

    def __getattr__(self, name):
        return getattr(self.work, name)


# ---------------------------------------------------------------------------------------------------
# A trainer to be timed
# ---------------------------------------------------------------------------------------------------


class Timed:
    """Trainer with its data, stepped like its own train(), with its calls wrapped from outside."""

    def __init__(self, module, s, o, config, shards, ranks):
        self.module, self.s, self.o, self.ranks = module, s, o, ranks
        train_shards, self.val_shards = shards
        self.attention, notes = attention.activate(s.attn_backend)
        self.forms = contextlib.ExitStack()
        self.fast_names, warnings = self.forms.enter_context(fast_forms.installed(module, s, o))
        self.warnings = [*notes, *warnings]
        self.trainer = module.Trainer(s, o, config, train_shards[0].vocab_size, ranks)
        self.data = module.TrainData(train_shards, s, ranks, self.trainer.memory.pass_tokens)
        self.schedule, self.pending, self.entered = self.trainer.schedule, None, -1
        self.clock = Timer(ranks.device)
        self.parts = Parts(self.clock)
        trainer, parts = self.trainer, self.parts
        trainer.train_loss = parts.wrap("forward", trainer.train_loss)
        trainer.optimizer.step = parts.wrap("optimizer", trainer.optimizer.step)
        self.next_batches = parts.wrap("data", self.data.next)

    def close(self):
        """Restore the module's plain functions."""
        self.forms.close()

    @contextlib.contextmanager
    def wrapped_collectives(self):
        """Wrap the collectives only while this trainer is recorded, because twins share one Ranks.

        Instance attributes shadow the methods.
        """
        names = ("all_reduce", "reduce_scatter", "all_gather")
        for name in names:
            setattr(self.ranks, name, self.parts.wrap_collective(getattr(self.ranks, name)))
        try:
            yield
        finally:
            for name in names:
                delattr(self.ranks, name)

    def steps_of(self, stage: int) -> range:
        """Steps of the stage; if the embedding is untied in it, only those after that."""
        steps = [i for i in range(self.schedule.num_steps) if self.schedule.stage(i) == stage]
        if not steps:
            return range(0)
        untie = self.schedule.untie_step
        return range(untie + 1 if untie in steps[:-2] else steps[0], steps[-1] + 1)

    def enter(self, stage: int):
        """Enter a later stage; of the steps skipped in between, only the untying is done."""
        self.steps, self.at = self.steps_of(stage), 0
        first, untie = self.steps[0], self.schedule.untie_step
        if untie is not None and self.entered <= untie < first:
            self.trainer.optimizer.untie()
        self.trainer.enter(first)
        self.entered = first
        self.flush()
        self.data.next_batches = None  # prefetched at the previous stage's batch size

    def flush(self):
        """Read the loss summed over the ranks, on a GPU a step late, as in a run.

        RuntimeError if it is not finite: steps with NaN weights are faster.
        """
        if self.pending:
            (total, wait), self.pending = self.pending, None
            wait()
            if not math.isfinite(total.item()):
                raise RuntimeError(f"the loss is {total.item()}, so the steps' times mean nothing")

    def step(self):
        length = len(self.steps) - len(self.steps) % 2 or 1  # repeated steps keep their parity
        step = self.steps[self.at % length]
        self.at += 1
        batches = self.next_batches(self.schedule.batch(step), self.schedule.batch(step))
        self.trainer.doc_lengths = self.data.doc_lengths
        total = self.trainer.step(step, batches)
        self.flush()
        self.pending = to_host(total, self.ranks.all_reduce(total))
        if not self.clock.cuda:
            self.flush()

    def pair(self, recorded: bool):
        """Run two steps; return the marks before and after them."""
        with contextlib.ExitStack() as stack:
            if recorded:
                stack.enter_context(self.wrapped_collectives())
                stack.enter_context(self.parts.recording())
            start = self.clock.mark()
            self.step()
            self.step()
            return start, self.clock.mark()

    def evaluation_ms(self) -> float:
        """Time one of the trainer's validations."""
        if self.s.compile == "1":
            self.evaluate(num_batches=1)  # compiles
        self.clock.sync()
        start = time.perf_counter()
        self.evaluate()
        self.clock.sync()
        return 1000 * (time.perf_counter() - start)

    def evaluate(self, num_batches: int | None = None):
        """Evaluate on all validation batches, or on the first num_batches."""
        windows, tied = self.schedule.windows(self.trainer.stage), self.schedule.tied(self.entered)
        batches = self.module.val_batches(self.val_shards, self.s, self.ranks, num_batches)
        batches = self.data.prefetcher.each(batches)
        self.module.evaluate(self.trainer.val_loss, batches, windows, tied, self.ranks)


def build(script: str, env: dict, ranks=None) -> Timed:
    """Build a script's trainer with these settings. ranks: the process's Ranks, if it has one already."""
    module = importlib.import_module(script)
    if not hasattr(module, "Trainer"):
        raise ValueError(
            f"--script {script}.py has no Trainer to time: wanted train_gpt.py, its twin or a copy"
        )
    if script == TWINS[0]:  # it refuses the other twin's settings
        env = {k: v for k, v in env.items() if not k.startswith(("SPECTRAL_", "ORD_"))}
    s, o, config, notes = read_run(module, env)
    ranks = ranks or Ranks(s.device)
    timed = Timed(module, s, o, config, module.open_data(s, ranks.world_size), ranks)
    timed.warnings += notes
    return timed


def ceiling(timed: Timed, repeats: int) -> float:
    """FLOP/s of a square product in the model's type on this rank, all ranks at once."""
    timed.ranks.all_reduce(torch.zeros(1, device=timed.ranks.device)).wait()
    return matmul_flops(timed.ranks.device, timed.trainer.model.head.dtype, repeats)


# ---------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------


def measure_stage(timed: Timed, stage: int, steps: int) -> dict:
    """Time whole steps and parts of one stage (0 is the first), in ms per step of this rank."""
    clock, pairs, start = timed.clock, -(-steps // 2), time.perf_counter()
    timed.enter(stage)
    for _ in range(WARM_PAIRS):
        timed.pair(recorded=False)
    timed.flush()
    clock.sync()
    warm_s, graphs = time.perf_counter() - start, graphs_compiled()
    whole, inside, rates = [], [], [ceiling(timed, 20)] if clock.cuda else []
    # back to back on a GPU, so that it never idles between pairs
    for recorded in [False] * pairs + [True] * pairs if clock.cuda else [False, True] * pairs:
        if not clock.cuda and not recorded:
            rates.append(ceiling(timed, 2))
        marks = timed.pair(recorded)
        if recorded:
            inside.append(timed.parts.take())
        else:
            whole.append(marks)
    timed.flush()
    clock.sync()
    ms = np.array([clock.ms(*marks) / 2 for marks in whole])
    spent = [timed.parts.spent(marks) for marks in inside]
    parts = {name: float(np.median([s[name] / 2 for s in spent])) for name in PARTS}
    step, schedule = timed.steps[0], timed.schedule
    tokens, ms_step, rate = schedule.batch_tokens(step), float(np.median(ms)), float(np.median(rates))
    flop = timed.trainer.flop_per_token(step) * tokens / timed.ranks.world_size
    compute_ms = parts["forward"] + parts["backward"]
    return {
        "stage": stage + 1,
        "batch_tokens": tokens,
        "windows": schedule.windows(stage),
        "warm_s": warm_s,
        "graphs_compiled_meanwhile": graphs_compiled() - graphs,
        "pairs": pairs,
        "ms_step": ms_step,
        "ms_step_quartiles": np.percentile(ms, [25, 75]).tolist(),
        "tokens_per_s": 1000 * tokens / ms_step,
        "parts_ms": parts,
        "shares": {name: value / sum(parts.values()) for name, value in parts.items()},
        "flop_per_rank_step": flop,
        "ceiling_flops": rate,
        "of_ceiling_forward_backward": flop / (compute_ms / 1000) / rate,
        "of_ceiling_step": flop / (ms_step / 1000) / rate,
    }


def profile_stage(timed: Timed) -> dict:
    """List the kernels of a step, averaged over a pair; before that, time two steps on an idle device."""
    clock, host, whole = timed.clock, 0.0, 0.0
    for _ in range(2):
        clock.sync()
        start = time.perf_counter()
        timed.step()
        host += time.perf_counter() - start
        clock.sync()
        whole += time.perf_counter() - start
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if clock.cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        timed.pair(recorded=False)
        timed.flush()
        clock.sync()
    kernels = []
    for event in found.key_averages():
        us = event.self_device_time_total if clock.cuda else event.self_cpu_time_total
        on_device = event.device_type == DeviceType.CUDA and not event.is_user_annotation
        if us and on_device == clock.cuda:
            kernels.append({"name": event.key, "ms": us / 2000, "calls": event.count / 2})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"host_ms": 500 * host, "step_ms": 500 * whole, "kernels": kernels}


def whole_schedule(timed: Timed, results: list[dict]) -> dict | None:
    """Minutes of all steps and validations, and each part's share; None if some of it was not timed."""
    schedule, by_stage, n = timed.schedule, {r["stage"] - 1: r for r in results}, timed.schedule.num_steps
    of_step = [schedule.stage(i) for i in range(n)]
    if not set(of_step) <= set(by_stage) or any(r["evaluation_ms"] is None for r in results):
        return None
    validations = [of_step[min(i, n - 1)] for i in range(n + 1) if schedule.s.validates(i, n)]
    train_ms = sum(by_stage[i]["ms_step"] for i in of_step)
    eval_ms = sum(by_stage[i]["evaluation_ms"] for i in validations)
    parts_ms = {
        name: sum(by_stage[i]["shares"][name] * by_stage[i]["ms_step"] for i in of_step) for name in PARTS
    }
    parts_ms["evaluation"] = eval_ms
    tokens = sum(schedule.batch_tokens(i) for i in range(n))
    return {
        "steps": n,
        "tokens": tokens,
        "validations": len(validations),
        "train_minutes": train_ms / 60_000,
        "minutes_with_evaluation": (train_ms + eval_ms) / 60_000,
        "tokens_per_s": 1000 * tokens / train_ms,
        "ms_step": train_ms / n,
        "shares": {name: ms / (train_ms + eval_ms) for name, ms in parts_ms.items()},
    }


# ---------------------------------------------------------------------------------------------------
# The twins
# ---------------------------------------------------------------------------------------------------


def median_interval(values, confidence: float = 0.95) -> dict:
    """Median with the narrowest interval of order statistics that has this coverage for any distribution.

    With too few values, it is the smallest and the largest, with their coverage.
    """
    x = np.sort(np.asarray(values, dtype=float))
    n = len(x)
    below = np.cumsum([math.comb(n, i) / 2**n for i in range(n)])  # P(at most i values below the median)
    k = max(1, int(np.searchsorted(below, (1 - confidence) / 2)))
    return {
        "median": float(np.median(x)),
        "low": float(x[k - 1]),
        "high": float(x[n - k]),
        "n": n,
        "confidence": float(1 - 2 * below[k - 1]),
    }


def time_twins(env: dict, ranks: Ranks | None, stages: list[int], pairs: int) -> list[dict]:
    """Build both trainers and compare them in each stage. ranks: see build()."""
    twins = []
    with contextlib.ExitStack() as stack:
        for script in TWINS:
            twins.append(build(script, env, ranks))
            stack.callback(twins[-1].close)
            ranks = twins[0].ranks
        return [compare_twins(twins, stage, pairs) for stage in stages]


def compare_twins(twins: list[Timed], stage: int, pairs: int) -> dict:
    """Compare train_gpt_muon_ord.py with train_gpt.py, in alternating pairs of steps."""
    for twin in twins:
        twin.enter(stage)
        for _ in range(WARM_PAIRS):
            twin.pair(recorded=False)
    clock, whole, inside = twins[0].clock, ([], []), ([], [])
    for i in range(pairs):
        for which in ((0, 1), (1, 0))[i % 2]:
            whole[which].append(twins[which].pair(recorded=True))
            inside[which].append(twins[which].parts.take())
    for twin in twins:
        twin.flush()
    clock.sync()
    ms = [np.array([clock.ms(*marks) / 2 for marks in arm]) for arm in whole]
    optimizer_ms = [
        np.array([twin.parts.spent(marks)["optimizer"] / 2 for marks in arm])
        for twin, arm in zip(twins, inside)
    ]
    return {
        "stage": stage + 1,
        "pairs": pairs,
        "ord_mode": twins[1].o.ord_mode,
        "fused_step": "step_ord" in twins[1].fast_names,
        "ms_step": {name: float(np.median(x)) for name, x in zip(TWINS, ms)},
        "ms_optimizer": {name: float(np.median(x)) for name, x in zip(TWINS, optimizer_ms)},
        "ratio": median_interval(ms[1] / ms[0]),
        "optimizer_extra_share_of_step": median_interval((optimizer_ms[1] - optimizer_ms[0]) / ms[0]),
    }


# ---------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------


def in_words(shares: dict[str, float]) -> str:
    return "  ".join(f"{name} {share:.1%}" for name, share in shares.items())


def describe_stage(r: dict) -> str:
    low, high = r["ms_step_quartiles"]
    lines = [
        f"\nstage {r['stage']}: {r['batch_tokens']} tokens a step, windows {r['windows']}; "
        f"{2 * r['pairs']} steps timed whole and {2 * r['pairs']} in parts, after {r['warm_s']:.1f} s of "
        "compiling and warming up",
        f"{r['ms_step']:.2f} ms a step (quartiles {low:.2f}, {high:.2f}), {r['tokens_per_s']:,.0f} tokens/s",
        f"{in_words(r['shares'])}; in ms: {', '.join(f'{ms:.2f}' for ms in r['parts_ms'].values())}",
        f"{r['flop_per_rank_step'] / 1e9:,.2f} GFLOP a rank and step; matmul ceiling "
        f"{r['ceiling_flops'] / 1e9:,.0f} GFLOP/s a rank: forward and backward run at "
        f"{r['of_ceiling_forward_backward']:.1%} of it, the whole step at {r['of_ceiling_step']:.1%}",
        "memory of a rank: " + ", ".join(f"{name} {mib:,.0f}" for name, mib in r["memory"].items()),
    ]
    if r["graphs_compiled_meanwhile"]:
        lines.append(f"WRONG: {r['graphs_compiled_meanwhile']} graphs were compiled while steps were timed")
    if r["evaluation_ms"] is not None:
        lines.append(f"evaluation: {r['evaluation_ms'] / 1000:.2f} s a validation")
    if r["profile"]:
        kernels = r["profile"]["kernels"]
        total = sum(kernel["ms"] for kernel in kernels)
        lines.append(
            "a step on an idle device: {step_ms:.2f} ms, issued by the host in {host_ms:.2f}; "
            "profiled, {} kinds of kernels take {:.2f} ms:".format(len(kernels), total, **r["profile"])
        )
        lines += [f"{k['ms']:10.3f} ms {k['calls']:6g} calls  {k['name'][:80]}" for k in kernels[:SHOWN]]
    return "\n  ".join(lines)


def describe_schedule(total: dict | None) -> str:
    if total is None:
        return "\nnot all stages and validations were timed, so the schedule's total is not known"
    return (
        "\nwhole schedule: {steps} steps, {tokens:,} tokens, {validations} validations: {train_minutes:.2f} "
        "minutes of training ({ms_step:.2f} ms a step, {tokens_per_s:,.0f} tokens/s), "
        "{minutes_with_evaluation:.2f} with evaluation\n  ".format(**total)
        + in_words(total["shares"])
    )


def describe_twins(r: dict) -> str:
    (base, ord_), optimizers = r["ms_step"].values(), r["ms_optimizer"].values()
    return (
        f"\nstage {r['stage']}, train_gpt_muon_ord.py over train_gpt.py, {r['pairs']} pairs of 2 steps each, "
        f"interleaved; ORD_MODE={r['ord_mode']}, {'fused kernels' if r['fused_step'] else 'plain torch'}:\n"
        f"  step {ord_:.2f} / {base:.2f} ms, median of paired ratios "
        + "{median:.4f} ({low:.4f} to {high:.4f}, {confidence:.1%}, n = {n})\n".format(**r["ratio"])
        + "  optimizer {1:.2f} / {0:.2f} ms; its extra time is ".format(*optimizers)
        + "{median:.2%} of a baseline step ({low:.2%} to {high:.2%})".format(
            **r["optimizer_extra_share_of_step"]
        )
    )


def describe(timed: Timed, script: str) -> dict:
    cuda = timed.clock.cuda
    return {
        "script": script,
        "model": timed.s.model,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "world_size": timed.ranks.world_size,
        "threads_a_rank": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(timed.trainer.model.head.dtype).removeprefix("torch."),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "attention": timed.attention,
        "fast_forms": timed.fast_names,
        "warnings": timed.warnings,
        "settings": {**dataclasses.asdict(timed.s), **dataclasses.asdict(timed.o)},
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", default="train_gpt_muon_ord.py", help="trainer (default %(default)s)")
    parser.add_argument("--stages", help="comma-separated, 1 is the first, 4 the extension (default: all)")
    parser.add_argument(
        "--steps", type=int, default=20, help="steps to time whole in each stage, and in parts (20)"
    )
    parser.add_argument("--profile", action="store_true", help="also list the kernels of a step")
    parser.add_argument("--no-evaluation", action="store_true", help="time no validation")
    text = "also the paired ratio of the twins, from this many pairs of two steps (40); --steps 0: only that"
    parser.add_argument("--ord", type=int, nargs="?", const=40, default=0, metavar="PAIRS", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    return parser.parse_args(argv)


def choose_stages(timed: Timed, text: str | None) -> list[int]:
    """Stages to time, from 0: as the user says, else all that have steps."""
    having = [i for i in range(timed.module.NUM_STAGES) if len(timed.steps_of(i))]
    try:
        chosen = sorted({int(part) - 1 for part in text.split(",")}) if text else having
    except ValueError:
        chosen = [-1]
    if not set(chosen) <= set(having):
        raise ValueError(
            f"--stages {text}: wanted some of {','.join(str(i + 1) for i in having)}, the "
            "stages that have steps under these settings"
        )
    return chosen


def memory(timed: Timed) -> dict[str, float]:
    """Peak memory of a rank so far in MiB and, on a GPU, the trainer's forecast."""
    found, forecast = peak_memory_mib(timed.ranks), timed.trainer.memory
    if forecast.forecasts:
        found["cuda_forecast_mib"] = forecast.wanted(forecast.largest_pass()) / 2**20
    return found


def run(args, env: dict):
    """Measure, print, and write the result so far after each stage and after the twins."""
    if args.ord < 0 or args.steps < 0:
        raise ValueError(f"--ord {args.ord} --steps {args.steps}: wanted numbers of pairs and of steps")
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist")
    choose_allocator()  # as in a run
    timed = build(Path(args.script).stem, env)
    ranks, stages, result = timed.ranks, choose_stages(timed, args.stages), describe(timed, args.script)

    def note(text: str, **found):
        result.update(found)
        if ranks.rank == 0:
            print(text, flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    note(
        "{script}: {model} in {dtype} on {world_size} rank(s) of {device}, {threads_a_rank} thread(s) each, "
        "torch {torch}, attention {attention}, fast forms {fast_forms}, compile {compile}, "
        "warnings {warnings}".format(**result, compile=timed.s.compile)
    )
    if args.steps:
        measure(timed, stages, args, note)
    timed.close()
    if args.ord:
        del timed  # its memory is for the two that follow
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        found = time_twins(env, ranks, stages, args.ord)
        note("\n".join(map(describe_twins, found)), ord=found)
    ranks.close()


def measure(timed: Timed, stages: list[int], args, note):
    """Measure each stage, then put the schedule together."""
    found = []
    for stage in stages:
        r = measure_stage(timed, stage, args.steps)
        r["evaluation_ms"] = None if args.no_evaluation else timed.evaluation_ms()
        r["profile"] = profile_stage(timed) if args.profile else None
        r["memory"] = memory(timed)
        found.append(r)
        note(describe_stage(r), stages=found)
    total = whole_schedule(timed, found)
    note(describe_schedule(total), schedule=total)


def main(argv: list[str], env=os.environ) -> int:
    """Return exit code 0, or 2 for unusable settings or options."""
    args, env = parse(argv), dict(env)
    try:
        run(args, env)
    except (ValueError, ModuleNotFoundError) as error:
        if env.get("RANK", "0") == "0":
            print(f"step_time.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
