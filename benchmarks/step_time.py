"""Time a training step and its parts, and compare it with the device's own matmul rate.

    python benchmarks/step_time.py                                   # all stages of the default preset
    python benchmarks/step_time.py --steps 40 --ord --json out.json  # and the ratio of the twins
    torchrun --standalone --nproc-per-node=8 benchmarks/step_time.py --stages 1,3
    MODEL=tiny BATCH_SIZES=4096,4096,4096,4096 python benchmarks/step_time.py --script train_gpt.py

Settings are the trainer's environment variables. The step is the trainer's own: its Trainer, TrainData, Ranks
and evaluate, on the shards that a run would read. Nothing is written except --json.

* Whole steps are timed without instrumentation, in pairs, because Adam moves on every second step. The parts
  come from other steps, in which the trainer's calls (data.next, forward, backward, optimizer.step, the
  collectives and the waits for them) are wrapped; time counts for the innermost call. So "communication" is
  what no other work hides, including waits for slower ranks. On CUDA all times are events on the stream;
  nothing synchronizes inside a step.
* The ceiling is the rate of a square product in the model's dtype, on all ranks at once. On a CPU it is
  measured again before every pair of steps, because the machine's other load varies. FLOP of a float8 head
  (sm_89 and later) count against the same ceiling.
* FLOP are those of runtime/flops.py, with the document lengths of the timed batches.
* A step before a validation also measures ORD's statistics; it is timed only if it is among the timed steps.
  Evaluation is timed on one and on two validation batches, and each further batch counts as much as the
  second one adds: reading the shards and finding the documents happens once per validation. The last
  validation's longer windows are not timed separately.
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
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels import attention, fast_forms  # noqa: E402
from runtime.compiling import choose_allocator, compiler_for  # noqa: E402
from runtime.flops import forward_flop  # noqa: E402
from runtime.gauges import Timer, matmul_flops, peak_memory_mib  # noqa: E402
from runtime.ranks import Ranks  # noqa: E402
from runtime.session import to_host  # noqa: E402

PARTS = ("data", "forward", "backward", "communication", "optimizer", "other")
WARM_PAIRS = 2
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
        self.module, self.s, self.o, self.config, self.ranks = module, s, o, config, ranks
        self.train_shards, self.val_shards = shards
        self.vocab_size = self.train_shards[0].vocab_size
        attention.activate(s.attn_backend)
        self.forms = contextlib.ExitStack()
        installed = fast_forms.installed(module, s, o, compiler_for(s))
        self.fast_names, self.fast_warnings = self.forms.enter_context(installed)
        self.trainer = module.Trainer(s, o, config, self.vocab_size, ranks)
        self.data = module.TrainData(self.train_shards, s, ranks, self.trainer.memory.pass_tokens)
        self.schedule, self.pending, self.entered = self.trainer.schedule, None, -1
        self.clock = Timer(ranks.device)
        self.parts, self.seen = Parts(self.clock), []
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
            self.trainer.untie()
        self.trainer.enter(first)
        self.entered = first
        self.flush()
        self.data.coming = None  # prefetched at the previous stage's batch size

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
        self.seen.append([batch.cu_seqlens for batch in batches])
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
        """Extrapolate a whole validation from one batch and from two."""
        if self.clock.cuda or self.s.compile == "1":
            self.evaluate_ms(1)  # compiles
        num_batches = self.s.val_tokens // self.s.val_batch_tokens
        one = self.evaluate_ms(1)
        return one if num_batches == 1 else one + (num_batches - 1) * max(0.0, self.evaluate_ms(2) - one)

    def evaluate_ms(self, num_batches: int) -> float:
        """Time the trainer's own evaluation of this many batches."""
        windows, trainer = self.schedule.windows(self.trainer.stage), self.trainer
        self.clock.sync()
        start = time.perf_counter()
        batches = self.module.val_batches(self.val_shards, self.s, self.ranks, num_batches)
        batches = self.data.prefetcher.each(batches)
        self.module.evaluate(trainer.val_loss, batches, windows, trainer.tied, self.ranks)
        self.clock.sync()
        return 1000 * (time.perf_counter() - start)

    def flop_per_step(self, stage: int) -> float:
        """Mean FLOP of this rank, forward and backward, over the steps seen since the last call."""
        total = 0.0
        for step in self.seen:
            for cu_seqlens in step:
                lengths = np.diff(cu_seqlens.cpu().numpy())
                lengths = lengths[lengths > 0]
                forward = forward_flop(self.config, lengths, self.vocab_size, self.config.windows[stage])
                total += 3 * forward.total * lengths.sum()
        count, self.seen = len(self.seen), []
        return total / count


def build(script: str, env: dict, ranks=None) -> Timed:
    """Build a script's trainer with these settings. ranks: the process's Ranks, if it has one already."""
    module = importlib.import_module(script)
    if script == TWINS[0]:  # it refuses the other twin's settings
        env = {k: v for k, v in env.items() if not k.startswith(("SPECTRAL_", "ORD_"))}
    s, o, config = module.read_settings(env)
    ranks = ranks or Ranks(s.device)
    return Timed(module, s, o, config, module.open_data(s, ranks.world_size), ranks)


def ceiling(timed: Timed, repeats: int) -> float:
    """FLOP/s of a square product in the model's type on this rank, all ranks at once."""
    timed.ranks.all_reduce(torch.zeros(1, device=timed.ranks.device)).wait()
    return matmul_flops(timed.ranks.device, timed.trainer.model.head.dtype, repeats)


# ---------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------


def measure_stage(timed: Timed, stage: int, steps: int, evaluate: bool = True) -> dict:
    """Time whole steps, parts and a validation of one stage (0 is the first), in ms per step of this rank."""
    clock, pairs, whole, parts_ms, rates = timed.clock, max(1, -(-steps // 2)), [], [], []
    timed.enter(stage)
    for _ in range(WARM_PAIRS):
        timed.pair(recorded=False)
    timed.seen = []
    if clock.cuda:  # back to back, so that the GPU never idles between pairs
        rates.append(ceiling(timed, 20))
        whole = [timed.pair(recorded=False) for _ in range(pairs)]
        for _ in range(pairs):
            timed.pair(recorded=True)
        clock.sync()
        parts_ms = [timed.parts.spent(timed.parts.take())]
        parts_ms = [{name: ms / (2 * pairs) for name, ms in parts_ms[0].items()}]
    else:
        for _ in range(pairs):
            rates.append(ceiling(timed, 2))
            whole.append(timed.pair(recorded=False))
            timed.pair(recorded=True)
            spent = timed.parts.spent(timed.parts.take())
            parts_ms.append({name: ms / 2 for name, ms in spent.items()})
    timed.flush()
    ms = np.array([clock.ms(*marks) / 2 for marks in whole])
    parts = {name: float(np.median([p[name] for p in parts_ms])) for name in PARTS}
    step, schedule = timed.steps[0], timed.schedule
    tokens, ms_step = schedule.batch_tokens(step), float(np.median(ms))
    flop, rate = timed.flop_per_step(stage), float(np.median(rates))
    compute_ms = parts["forward"] + parts["backward"]
    return {
        "stage": stage + 1,
        "first_step": step,
        "batch_tokens": tokens,
        "windows": schedule.windows(stage),
        "predicted_tokens": len(schedule.predict_weights(step)),
        "tied": timed.trainer.tied,
        "pairs": pairs,
        "ms_step": ms_step,
        "ms_step_quartiles": np.percentile(ms, [25, 75]).tolist(),
        "ms_step_fastest": float(ms.min()),
        "tokens_per_s": 1000 * tokens / ms_step,
        "parts_ms": parts,
        "shares": {name: value / sum(parts.values()) for name, value in parts.items()},
        "evaluation_ms": timed.evaluation_ms() if evaluate else None,
        "flop_per_rank_step": flop,
        "ceiling_flops": rate,
        "of_ceiling_forward_backward": flop / (compute_ms / 1000) / rate,
        "of_ceiling_step": flop / (ms_step / 1000) / rate,
    }


def step_key(timed: Timed, stage: int) -> tuple:
    """Key that is equal for stages whose steps do the same work."""
    step, schedule = timed.steps_of(stage)[0], timed.schedule
    untied = schedule.untie_step is not None and step > schedule.untie_step
    return schedule.batch_tokens(step), schedule.windows(stage), len(schedule.predict_weights(step)), untied


def measure(timed: Timed, stages: list[int], steps: int, say) -> list[dict]:
    """Measure each stage; one whose steps equal an earlier one's is not timed again."""
    results, done = [], {}
    for stage in stages:
        key = step_key(timed, stage)
        if key in done:
            results.append({**done[key], "stage": stage + 1, "same_as": done[key]["stage"]})
        else:
            results.append(measure_stage(timed, stage, steps))
            done[key] = results[-1]
        print_stage(results[-1], say)
    return results


def whole_schedule(timed: Timed, results: list[dict]) -> dict | None:
    """Minutes of all steps and validations, and each part's share; None if a stage was not timed."""
    schedule, by_stage = timed.schedule, {r["stage"] - 1: r for r in results}
    of_step = [schedule.stage(i) for i in range(schedule.num_steps)]
    if not set(of_step) <= set(by_stage):
        return None
    validations = [
        of_step[min(i, schedule.num_steps - 1)]
        for i in range(schedule.num_steps + 1)
        if schedule.s.validates(i, schedule.num_steps)
    ]
    train_ms = sum(by_stage[i]["ms_step"] for i in of_step)
    eval_ms = sum(by_stage[i]["evaluation_ms"] for i in validations)
    shares = {
        name: sum(by_stage[i]["shares"][name] * by_stage[i]["ms_step"] for i in of_step)
        / (train_ms + eval_ms)
        for name in PARTS
    }
    tokens = sum(schedule.batch_tokens(i) for i in range(schedule.num_steps))
    return {
        "steps": schedule.num_steps,
        "tokens": tokens,
        "validations": len(validations),
        "train_minutes": train_ms / 60_000,
        "minutes_with_evaluation": (train_ms + eval_ms) / 60_000,
        "tokens_per_s": 1000 * tokens / train_ms,
        "ms_step": train_ms / schedule.num_steps,
        "shares": {**shares, "evaluation": eval_ms / (train_ms + eval_ms)},
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
    k = max(1, int(stats.binom.ppf((1 - confidence) / 2, n, 0.5)))
    return {
        "median": float(np.median(x)),
        "low": float(x[k - 1]),
        "high": float(x[n - k]),
        "n": n,
        "confidence": float(1 - 2 * stats.binom.cdf(k - 1, n, 0.5)),
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
    base, ord_ = (np.array([clock.ms(*marks) / 2 for marks in arm]) for arm in whole)
    base_optimizer, ord_optimizer = (
        np.array([twin.parts.spent(marks)["optimizer"] / 2 for marks in arm])
        for twin, arm in zip(twins, inside)
    )
    return {
        "stage": stage + 1,
        "pairs": pairs,
        "steps_each": 2 * pairs,
        "ord_mode": twins[1].o.ord_mode,
        "fused_step": "step_ord" in twins[1].fast_names,
        "ms_step": {TWINS[0]: float(np.median(base)), TWINS[1]: float(np.median(ord_))},
        "ms_optimizer": {
            TWINS[0]: float(np.median(base_optimizer)),
            TWINS[1]: float(np.median(ord_optimizer)),
        },
        "ratio": median_interval(ord_ / base),
        "ratio_of_fastest": float(ord_.min() / base.min()),
        "optimizer_extra_share_of_step": median_interval((ord_optimizer - base_optimizer) / base),
    }


# ---------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------


def in_words(parts: dict[str, float], whole: float | None = None) -> str:
    if whole is None:
        return "  ".join(f"{name} {share:.1%}" for name, share in parts.items())
    return "  ".join(f"{name} {ms:.2f} ms ({ms / whole:.1%})" for name, ms in parts.items())


def print_stage(r: dict, say):
    if "same_as" in r:
        say(f"\nstage {r['stage']}: the same step as stage {r['same_as']}")
        return
    low, high = r["ms_step_quartiles"]
    parts = r["parts_ms"]
    say(
        f"\nstage {r['stage']}: {r['batch_tokens']} tokens a step, windows {r['windows']}, "
        f"{r['predicted_tokens']} predicted token(s), {'tied' if r['tied'] else 'untied'}; "
        f"{2 * r['pairs']} steps timed whole, {2 * r['pairs']} in parts"
    )
    say(
        f"  {r['ms_step']:.2f} ms a step (quartiles {low:.2f} to {high:.2f}, fastest pair "
        f"{r['ms_step_fastest']:.2f}), {r['tokens_per_s']:,.0f} tokens/s; "
        f"steps in parts took {sum(parts.values()):.2f} ms"
    )
    say(f"  {in_words(parts, sum(parts.values()))}")
    say(
        f"  {r['flop_per_rank_step'] / 1e9:,.2f} GFLOP a rank and step; matmul ceiling "
        f"{r['ceiling_flops'] / 1e9:,.0f} GFLOP/s a rank: forward and backward run at "
        f"{r['of_ceiling_forward_backward']:.1%} of it, the whole step at {r['of_ceiling_step']:.1%}"
    )
    say(f"  evaluation: {r['evaluation_ms'] / 1000:.2f} s a validation")


def print_schedule(total: dict | None, say):
    if total is None:
        say("\nnot all stages were timed, so the schedule's total is not known")
        return
    say(
        f"\nwhole schedule: {total['steps']} steps, {total['tokens']:,} tokens, {total['validations']} "
        f"validations: {total['train_minutes']:.2f} minutes of training ({total['ms_step']:.2f} ms a step, "
        f"{total['tokens_per_s']:,.0f} tokens/s), {total['minutes_with_evaluation']:.2f} with evaluation"
    )
    say(f"  {in_words(total['shares'])}")


def print_twins(r: dict, say):
    ratio, extra = r["ratio"], r["optimizer_extra_share_of_step"]
    say(
        f"\nstage {r['stage']}, train_gpt_muon_ord.py over train_gpt.py, {r['pairs']} pairs of 2 steps each, "
        f"interleaved; ORD_MODE={r['ord_mode']}, {'fused kernels' if r['fused_step'] else 'plain torch'}:"
    )
    say(
        f"  step {r['ms_step'][TWINS[1]]:.2f} / {r['ms_step'][TWINS[0]]:.2f} ms, median of paired ratios "
        f"{ratio['median']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f}, {ratio['confidence']:.1%}, "
        f"n = {ratio['n']}); fastest pair over fastest pair {r['ratio_of_fastest']:.4f}"
    )
    say(
        f"  optimizer {r['ms_optimizer'][TWINS[1]]:.2f} / {r['ms_optimizer'][TWINS[0]]:.2f} ms; its "
        f"extra time is {extra['median']:.2%} of a baseline step ({extra['low']:.2%} to {extra['high']:.2%})"
    )


def machine(timed: Timed) -> dict:
    cuda, threads = timed.clock.cuda, torch.get_num_threads()
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return {
        "device": name,
        "world_size": timed.ranks.world_size,
        "threads_a_rank": threads,
        "torch": torch.__version__,
        "dtype": str(timed.trainer.model.head.dtype).removeprefix("torch."),
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", default="train_gpt_muon_ord.py", help="trainer (default %(default)s)")
    parser.add_argument("--stages", help="comma-separated, 1 is the first, 4 the extension (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a stage, whole, and in parts (20)")
    parser.add_argument(
        "--ord",
        type=int,
        nargs="?",
        const=40,
        default=0,
        metavar="PAIRS",
        help="also the paired ratio of the twins, from so many pairs of two steps (40)",
    )
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


def run(args, env: dict) -> tuple[dict, object]:
    """Return the result for --json, and the process's Ranks."""
    if args.ord < 0:
        raise ValueError(f"--ord {args.ord}: wanted a number of pairs")
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist")
    choose_allocator()  # as in a run
    timed = build(Path(args.script).stem, env)
    ranks = timed.ranks
    say = print if ranks.rank == 0 else lambda text: None
    stages = choose_stages(timed, args.stages)
    result = {
        "script": args.script,
        "model": timed.s.model,
        **machine(timed),
        "settings": {**dataclasses.asdict(timed.s), **dataclasses.asdict(timed.o)},
    }
    say(
        f"{args.script}: {timed.s.model} in {result['dtype']} on {result['world_size']} rank(s) of "
        f"{result['device']}, {result['threads_a_rank']} thread(s) each, torch {result['torch']}, "
        f"compile {timed.s.compile}, fast forms: {', '.join(timed.fast_names) or 'none'}"
    )
    result["stages"] = measure(timed, stages, args.steps, say)
    result["schedule"] = whole_schedule(timed, result["stages"])
    print_schedule(result["schedule"], say)
    result["memory"] = peak_memory_mib(timed.ranks)
    say("\npeak memory of a rank: " + ", ".join(f"{k} {v:,.0f}" for k, v in result["memory"].items()))
    result["ord"] = []
    if args.ord:
        distinct = [r["stage"] - 1 for r in result["stages"] if "same_as" not in r]
        timed.close()
        del timed  # its memory is for the two that follow
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        result["ord"] = time_twins(env, ranks, distinct, args.ord)
        for compared in result["ord"]:
            print_twins(compared, say)
    else:
        timed.close()
    return result, ranks


def main(argv: list[str], env=os.environ) -> int:
    """Return exit code 0, or 2 for unusable settings or options."""
    args, env = parse(argv), dict(env)
    try:
        result, ranks = run(args, env)
    except (ValueError, ModuleNotFoundError) as error:
        if env.get("RANK", "0") == "0":
            print(f"step_time.py: {error}", file=sys.stderr)
        return 2
    if args.json and ranks.rank == 0:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
