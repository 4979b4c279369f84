"""Background runs for injecting faults, and readers of their logs."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
from forked import PATIENCE_S, wait_until
from helpers import ROOT, command
from launches import alive

from kernels import fast_forms
from runtime import supervise
from runtime.supervise import process_state

# A trainer whose ranks stop after `steps[0]` updates, so that a fault hits exactly there, however busy the
# machine is. Workers of torchrun's n-th restart stop at steps[n], if there is one.
PAUSING = """
import os, signal, sys

sys.path.insert(0, {root!r})
import {trainer} as trainer
from runtime import supervise

make_step, steps = trainer.Trainer.step, {steps}
restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def step(self, number, *args, **kwargs):
    if number in steps[restart : restart + 1]:
        os.kill(os.getpid(), signal.SIGSTOP)
    return make_step(self, number, *args, **kwargs)


trainer.Trainer.step = step
supervise.leave(supervise.main(trainer, sys.argv[1:]))
"""


def refusal(trainer, env: dict, capsys) -> str:
    """Run the trainer in this process and folder; it must exit with 2. Returns the message."""
    capsys.readouterr()
    assert supervise.main(trainer, [], env) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{trainer.SCRIPT.name}: ") and "Traceback" not in said
    return said


@contextlib.contextmanager
def run_here(trainer, env: dict):
    """Begin a run in this process and folder, as Supervisor does; yields its Start.

    The log has its header, and the fast forms are in place.
    """
    start = supervise.prepare(trainer, env)
    supervise.write_beginning(trainer, start)
    with fast_forms.installed(trainer, start.s, start.o):
        yield start
    start.log.close()


def heed_signals():
    """Reset signals that background shells and nohup make their children ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Job:
    """Background run in its own session, with methods that wait for its log.

    pause_at: number of updates after which every rank stops (SIGSTOP): first, after torchrun's first restart,
    and so on; see wait_until_paused() and go_on().
    argv: command to run instead of the script.
    """

    def __init__(
        self,
        cwd: Path,
        script: str,
        env: dict,
        ranks: int = 0,
        extra: tuple = (),
        setup=None,
        pause_at: tuple[int, ...] = (),
        argv: list[str] | None = None,
    ):
        self.log = cwd / "logs" / f"{env['RUN_ID']}.txt"
        self.run_id, self.out, self.num_ranks = env["RUN_ID"], cwd / f"{env['RUN_ID']}.out", max(1, ranks)
        if pause_at:
            code = PAUSING.format(root=str(ROOT), trainer=Path(script).stem, steps=pause_at)
            script = cwd / f"pausing_{script}"
            script.write_text(code)
        self.pause_at = pause_at
        with self.out.open("a") as out:
            self.process = subprocess.Popen(
                argv or command(script, ranks, extra),
                cwd=cwd,
                env=env,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=lambda: (heed_signals(), setup() if setup else None),
            )

    def wait_for(self, pattern: str):
        """Wait until a line of the log matches."""
        self.wait_until(
            lambda: self.log.exists() and re.search(pattern, self.log.read_text(), re.M),
            f"a line {pattern!r} in {self.log}",
        )

    def wait_until_paused(self):
        """Wait until every rank has stopped itself before the update after `pause_at`."""

        def paused() -> bool:
            pids = self.ranks().values()
            return len(pids) == self.num_ranks and all(process_state(pid) == "stopped" for pid in pids)

        self.wait_until(paused, f"the pause at step {self.pause_at}")

    def wait_until(self, condition, what: str):
        """Poll until the condition holds; AssertionError if the run ends first."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            over = self.process.poll() is not None  # before the check, so that its last output counts
            if condition():
                return
            if over:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {what}: {self.out.read_text()[-2000:]}")

    def go_on(self):
        """Continue the ranks that are paused."""
        for pid in self.ranks().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def ranks(self) -> dict[int, int]:
        """PIDs of this run's living workers, by rank."""
        found = {}
        for pid in alive(self.log.parent.parent.resolve()):
            try:
                process = psutil.Process(pid)
                env, words = process.environ(), " ".join(process.cmdline())
            except psutil.Error:  # it has just ended
                continue
            worker = "train_gpt" in words and "torch.distributed.run" not in words
            if worker and env.get("RUN_ID") == self.run_id and process_state(pid) != "gone":
                found[int(env.get("RANK", 0))] = pid
        return found

    def end(self, seconds: float = PATIENCE_S) -> int:
        """Wait for the exit code and assert that no process of the run is left."""
        code = self.process.wait(seconds)
        wait_until(lambda: not self.ranks(), "end of the workers")  # which may finish a step and save
        return code

    def kill(self):
        """Kill everything at once, as if the machine died."""
        os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.ranks().values():
            with contextlib.suppress(ProcessLookupError):  # torchrun may have killed it
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def lines(log: Path) -> dict[int, list[str]]:
    """Lines of each step without times and memory; of repeated steps, those written after resuming."""
    out, keep = {}, re.compile(r"^(?:step:(\d+)/\d+ (.*)|event:resumed step:(\d+) .*)$", re.M)
    for step, rest, resumed in keep.findall(log.read_text()):
        if resumed:
            out = {step: found for step, found in out.items() if step <= int(resumed)}
            continue
        text = re.sub(r"train_time:\S+ step_avg:\S+ | peak_mem_mb:\S+", "", rest)
        out.setdefault(int(step), {})[text.partition(":")[0]] = text
    return {step: sorted(kinds.values()) for step, kinds in out.items()}


def events(log: Path, name: str) -> list[str]:
    """The log's lines about events of this name."""
    return re.findall(rf"^event:{name}\b.*", log.read_text(), re.M)
