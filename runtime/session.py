"""What a run does beside training: the clock, log lines, checkpoints, stop requests, the final model.

The trainer's loop stays in the trainer. It asks a Session when to leave and tells it what happened.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from runtime import checkpoints
from runtime.compiling import graphs_compiled
from runtime.gauges import REPEATS, Utilization, matmul_flops, peak_memory_mib
from runtime.log_writer import source_hash
from runtime.manifold import Manifold  # always imported, so that the log's header holds its source
from runtime.sharding import check_all, export_all, restore_all


class Diverged(RuntimeError):
    """The loss ran away, or is no longer a finite number. Exit code 3."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(f"step {step}: {name} is {value:g}; try a lower learning rate")
        self.step, self.name, self.value = step, name, value


class Clock:
    """Training time in ms. Stops for evaluation, checkpoints and measurements."""

    def __init__(self, device: torch.device):
        self.device, self.spent_ms, self.since = device, 0.0, None

    def start(self):
        self.sync()
        self.since = time.perf_counter()

    def stop(self):
        self.sync()
        self.spent_ms, self.since = self.ms(), None

    def ms(self) -> float:
        return self.spent_ms + (1000 * (time.perf_counter() - self.since) if self.since else 0)

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def to_host(x: Tensor, work) -> tuple[Tensor, Callable]:
    """(x on the host, what to call before reading it). work: the collective under way that makes x."""
    if not x.is_cuda:
        return x, work.wait
    work.wait()
    x = x.to("cpu", non_blocking=True)  # now: a copy asked for later would queue behind the next update
    return x, torch.cuda.current_stream().record_event().synchronize


class PendingLine(NamedTuple):
    """A train_loss line whose loss is still being computed or summed over the ranks."""

    step: int
    sums: Tensor  # loss over the ranks' tokens, and number of ranks asked to stop; call wait() first
    wait: Callable
    batch_tokens: int
    tokens: int  # trained on so far
    ms: float


class Session:
    """One run, from its first step or a checkpoint to its last log line.

    trainer: has model (its `head` has a row for each token), schedule and optimizer (with buckets);
        go_to(step), which restores what follows from the step; the optimizer's state is restored apart;
        log_fields(step, full) and validation_fields(), dicts, by collectives; model_metadata(), a dict;
        flop_per_token(step), of the forward and backward pass.
    data: has position, a tuple of integers, and seek(position).
    """

    def __init__(self, start, stop, trainer, data):
        """start: supervise.Start. stop: supervise.StopRequest."""
        self.s, self.ranks, self.log, self.config = start.s, start.ranks, start.log, start.config
        self.script, self.stop, self.trainer, self.data = start.script, stop, trainer, data
        self.num_steps, self.buckets = trainer.schedule.num_steps, trainer.optimizer.buckets
        self.clock = Clock(self.ranks.device)
        self.first_step = self.tokens = 0
        self.last_save, self.last_save_worked = 0, True  # step of the last attempt, and its outcome
        self.validated_step = -1
        self.target_reached = False
        self.stop_agreed = False  # all ranks know of a stop request
        self.pending = None  # the train_loss line that a GPU has not finished computing
        self.utilization = None  # MFU, if the device's rate was measured
        self.highest_loss = self.s.diverged_above or 2 * math.log(trainer.model.head.shape[0])
        self.manifold = None
        if self.s.manifold_every:
            path, every = self.s.log.with_suffix(".manifold.jsonl"), self.s.manifold_every
            self.manifold = Manifold(path, every, trainer.optimizer, self.ranks, self.clock, self.log)

    # The loop's questions and reports, in the order in which it makes them

    def begin(self) -> range:
        """Start the clock. Returns the steps to make and one more number, for the last validation; none after
        a stop request."""
        self.epoch, self.graphs = self.data.position[0], graphs_compiled()
        if self.asked_to_stop():  # during the rehearsal: nothing to save
            return range(0)
        if self.manifold:
            self.manifold.go_on(self.first_step)
        if self.ranks.device.type == "cuda":  # other work changes what a CPU can do from second to second
            self.utilization = self.measure_rate()
        self.clock.start()
        return range(self.first_step, self.num_steps + 1)

    def asked_to_stop(self) -> bool:
        """Return whether any rank was asked to stop. A collective."""
        return any(self.ranks.all_gather_object(self.stop.reason))

    def measure_rate(self) -> Utilization:
        """Time the device's own product in the type of the model, on all ranks at once."""
        dtype = torch.bfloat16 if self.ranks.device.type == "cuda" else torch.float32
        flops = torch.tensor(matmul_flops(self.ranks.device, dtype, REPEATS), device=self.ranks.device)
        self.ranks.all_reduce(flops).wait()
        self.log.event("matmul_rate", tflops_a_rank=f"{float(flops) / self.ranks.world_size / 1e12:.1f}")
        return Utilization(float(flops), self.clock.ms())

    @contextlib.contextmanager
    def off_the_clock(self):
        """Write pending lines and stop the clock meanwhile."""
        self.flush()
        self.clock.stop()
        yield
        self.clock.start()

    def should_validate(self, step: int) -> bool:
        return self.s.validates(step, self.num_steps) and step > self.validated_step

    def note_validation(self, step: int, loss: float, accuracy: float):
        """Report a validation; call it off the clock. Raises Diverged."""
        self.validated_step, ms = step, self.clock.ms()
        fields = {"val_acc": f"{accuracy:.5f}", **self.trainer.validation_fields(), **self.gauges(ms)}
        self.write_step(step, {"val_loss": f"{loss:.5f}"}, self.tokens, ms, fields, full=True)
        self.log.say(
            f"step {step:>5}/{self.num_steps}  validation loss {loss:.4f}, {accuracy:.1%} of tokens right, "
            f"{ms / 1000:.1f} s of training"
        )
        self.check_loss(step, "val_loss", loss)
        if loss <= self.s.target_loss and not self.target_reached:
            self.target_reached = True
            self.log.event("target_reached", step=step, target=self.s.target_loss, val_loss=f"{loss:.5f}")
        self.note_compilation(step)

    def gauges(self, ms: float) -> dict:
        """Fields of a validation's line: peak memory of any rank and, on CUDA, MFU. A collective."""
        peaks = peak_memory_mib(self.ranks)
        peak = peaks.get("cuda_max_allocated_mib", peaks["peak_rss_mib"])
        fields = {"peak_mem_mb": f"{peak:.0f}"}
        if self.utilization:
            mfu = self.utilization.take(ms)
            if mfu is not None:
                fields["mfu"] = f"{mfu:.4f}"
        return fields

    def should_leave(self, step: int) -> bool:
        """Save a checkpoint if one is due. Return True if the run ends here: finished, or asked to stop."""
        if step == self.num_steps:
            return True
        every = self.s.save_every
        # a multiple of SAVE_EVERY has passed: that step itself may not have been one to save at
        due = every > 0 and step // every > self.last_save // every
        if not due and not self.stop_agreed:
            return False
        if step == self.first_step or self.trainer.optimizer.is_pending(step):
            return False  # nothing new, or gradients that wait for their update
        self.last_save, self.last_save_worked = step, self.save(step)
        return self.stop_agreed

    def expect_update(self, step: int):
        """Prepare to measure the update that makes `step` of them, if it is to be measured."""
        if self.manifold:
            self.manifold.expect(step)

    def note_update(self, step: int, loss_sum: Tensor, batch_tokens: int):
        """Report update number `step`. loss_sum: the cross-entropy, summed over this rank's tokens.

        On a GPU its log line comes an update late, so that nothing waits for it. A stop request, which one
        rank alone may have received, travels with the loss: all ranks see it at the same step.
        """
        self.tokens += batch_tokens
        if self.utilization:
            self.utilization.add(batch_tokens * self.trainer.flop_per_token(step - 1))
        if self.manifold:
            self.manifold.measure(step, self.tokens)
        self.flush()
        loss_sum = loss_sum.float()
        asked_to_stop = torch.full_like(loss_sum, 1.0 if self.stop.reason else 0.0)
        sums = torch.stack((loss_sum, asked_to_stop))
        sums, wait = to_host(sums, self.ranks.all_reduce(sums))
        self.pending = PendingLine(step, sums, wait, batch_tokens, self.tokens, self.clock.ms())
        if self.ranks.device.type == "cpu":
            self.flush()
        self.note_compilation(step)
        if self.data.position[0] > self.epoch:
            self.epoch = self.data.position[0]
            self.log.event("epoch", step=step, epoch=self.epoch)

    def end(self, step: int) -> int:
        """Write the last log line, for a run that left its loop before `step`; exit code."""
        self.clock.stop()
        if step < self.num_steps:
            self.log.end("stopped", step=step, reason=json.dumps(self.stop.reason or "another rank"))
            return 0 if self.last_save_worked else 1
        return self.finish()

    # How it does that

    def flush(self):
        """Write the pending train_loss line, waiting for it. Raises Diverged."""
        if self.pending is None:
            return
        step, sums, wait, batch_tokens, tokens, ms = self.pending
        self.pending = None
        wait()
        loss_sum, stops = sums.tolist()
        self.stop_agreed = self.stop_agreed or stops > 0
        loss = loss_sum / batch_tokens
        self.write_step(step, {"train_loss": f"{loss:.6f}"}, tokens, ms, {}, full=False)
        seconds_left = ms / step * (self.num_steps - step) / 1000
        self.log.progress(step, loss, 1000 * tokens / ms, seconds_left)
        self.check_loss(step, "train_loss", loss)

    def write_step(self, step: int, loss: dict, tokens: int, ms: float, last: dict, full: bool):
        """Write one step line. Its schedules are those of the update that led to `step`."""
        times = {"train_time": f"{ms:.0f}ms", "step_avg": f"{ms / max(1, step):.2f}ms"}
        fields = self.trainer.log_fields(max(0, step - 1), full)
        self.log.step(step, {**loss, **times, **fields, "tokens": tokens, **last})

    def check_loss(self, step: int, name: str, loss: float):
        if not loss <= self.highest_loss:  # also true of NaN
            raise Diverged(step, name, loss)

    def note_compilation(self, step: int):
        """Warn if the run has just compiled something, which the rehearsal is there to prevent."""
        before, self.graphs = self.graphs, graphs_compiled()
        if self.graphs > before:
            text = f"step {step} compiled something that the rehearsal had not met"
            self.log.warn(text, "recompiled", step=step, graphs=self.graphs - before)

    def save(self, step: int) -> bool:
        """Write a checkpoint, off the clock. Returns whether the disk took it; the run goes on if not."""
        with self.off_the_clock():
            self.ranks.beat()  # the disk has all of DIST_TIMEOUT
            params, counts = export_all(self.buckets)
            broken = any(not state["master"].isfinite().all() for state in params.values())
            # the last good checkpoint must not make room for a broken one
            if self.ranks.broadcast_object(broken):
                raise Diverged(step, "weight", math.nan)
            worked = self.ranks.rank == 0 and self.write_checkpoint(step, params, counts)
            worked = self.ranks.broadcast_object(worked)
            self.ranks.beat()
        return worked

    def write_checkpoint(self, step: int, params: dict, counts: dict) -> bool:
        """Write logs/RUN_ID/step_N.pt and a line about it. Returns whether the disk took it."""
        contents = {
            "format": checkpoints.FORMAT,
            "config": {**self.config, "script": self.script.name},
            "run_id": self.s.run_id,
            "source_hash": source_hash(self.script),
            "step": step,
            "tokens": self.tokens,
            "train_ms": self.clock.ms(),
            "reached": self.target_reached,
            "validated": self.validated_step,
            "position": list(self.data.position),
            "counts": counts,
            "params": params,
        }
        try:
            self.log.sync()
            path = checkpoints.write(self.s.folder, contents)
        except OSError as error:
            text = f"{error}; training goes on, checkpoints before it are kept"
            self.log.warn(text, "save_failed", step=step, error=json.dumps(str(error)))
            return False
        self.log.event("checkpoint", step=step, path=path)
        return True

    def resume(self, contents: dict | None):
        """Go on from a checkpoint, which rank 0 has; it is checked before anything is taken from it."""

        def check():
            if contents is None:
                return
            check_all(self.buckets, contents["params"])
            if contents["step"] >= self.num_steps or set(contents["counts"]) != set(contents["params"]):
                raise ValueError(
                    f"the checkpoint is of step {contents['step']} and this run has {self.num_steps}, or it "
                    "counts other parameters' updates"
                )

        try:
            self.ranks.run_on_all(check)
        except ValueError as error:
            raise checkpoints.CheckpointError(str(error)) from None
        params = small = None
        if contents is not None:  # on rank 0
            params = contents["params"]
            small = {k: v for k, v in contents.items() if k not in ("params", "config")}
            target = contents["config"].get("target_loss", self.s.target_loss)
            if target != self.s.target_loss:
                small["reached"] = False  # another target is to be reached anew
        small = self.ranks.broadcast_object(small)
        restore_all(self.buckets, params, small["counts"])
        self.trainer.go_to(small["step"])
        self.data.seek(small["position"])
        self.clock.spent_ms, self.target_reached = small["train_ms"], small["reached"]
        self.first_step = self.last_save = small["step"]
        self.tokens, self.validated_step = small["tokens"], small["validated"]
        if contents:
            contents.clear()  # gigabytes, which `start` would hold to the end

    def finish(self) -> int:
        """Save the model for use elsewhere and write the last log line; exit code.

        Without its model a run is not finished: RESUME=auto then repeats what follows its last checkpoint; if
        it has none, what follows the one that it began from (RESUME=PATH), or the whole run.
        """
        if not self.s.save_model:
            self.log.end("finished")
            return 0
        path = self.s.folder / checkpoints.MODEL_FILE
        if self.ranks.rank == 0:
            try:
                checkpoints.save_model(path, self.trainer.model, self.model_metadata())
            except Exception as error:  # safetensors has errors of its own
                reason = f"{path} could not be written: {error}"
                self.log.say(f"error: {reason}; make room, then RESUME=auto repeats {self.unsaved()}")
                self.log.end("crashed", rank=0, error=json.dumps(reason))
                return 1
        self.log.end("finished", model=path)
        return 0

    def unsaved(self) -> str:
        """Name the steps that resuming would repeat."""
        saved = checkpoints.checkpoints_in(self.s.folder)
        step = int(saved[-1].stem.removeprefix("step_")) if saved else self.first_step
        return f"what follows step {step}" if step else "the whole run, which has no checkpoint"

    def model_metadata(self) -> dict:
        """Facts needed to build the model, and to run it."""
        names = ("vocab_size", "mark", "residual_scale", "row_tokens")
        facts = {name: self.config[name] for name in names if name in self.config}
        facts |= {"script": self.script.name, "config": self.config["model_config"]}
        return {**facts, **self.trainer.model_metadata()}
