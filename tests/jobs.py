"""Runs in the background that faults are done to, and what their logs say; for test_faults.py and soak.py."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from helpers import command


def heed_signals():
    """Tests that are started in the background or by nohup pass on that these are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Job:
    """A run in the background, in a session of its own, whose log can be waited for."""

    def __init__(self, cwd: Path, script: str, env: dict, ranks: int = 0, extra: tuple = (), setup=None):
        self.log = cwd / "logs" / f"{env['RUN_ID']}.txt"
        self.run_id, self.out = env["RUN_ID"], cwd / f"{env['RUN_ID']}.out"
        with self.out.open("a") as out:
            self.process = subprocess.Popen(
                command(script, ranks, extra),
                cwd=cwd,
                env=env,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=lambda: (heed_signals(), setup() if setup else None),
            )

    def wait_for(self, pattern: str, seconds: float = 90):
        """Until a line of the log matches."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.log.exists() and re.search(pattern, self.log.read_text(), re.M):
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no line {pattern!r} in {self.log}: {self.out.read_text()[-2000:]}")

    def ranks(self) -> dict[int, int]:
        """rank -> process of this run's living workers."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                env = dict(
                    x.split(b"=", 1) for x in (folder / "environ").read_bytes().split(b"\0") if b"=" in x
                )
                cmdline, cwd = (folder / "cmdline").read_bytes(), Path(os.readlink(folder / "cwd"))
                dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except (OSError, ValueError):
                continue
            worker = b"train_gpt" in cmdline and b"torch.distributed.run" not in cmdline
            ours = cwd == self.log.parent.parent.resolve() and env.get(b"RUN_ID") == self.run_id.encode()
            if worker and ours and not dead:
                found[int(env.get(b"RANK", 0))] = int(folder.name)
        return found

    def end(self, seconds: float = 120) -> int:
        """Exit code; afterwards no process of the run may be left."""
        code = self.process.wait(seconds)
        limit = time.monotonic() + 60  # a worker without its launcher finishes its step and saves
        while self.ranks() and time.monotonic() < limit:
            time.sleep(0.1)
        assert not self.ranks(), f"workers survived: {self.ranks()}"
        return code

    def kill(self):
        """As the machine's end does: everything at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.ranks().values():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def lines(log: Path) -> dict[int, list[str]]:
    """step -> its lines without times; of steps done twice, those after the run was resumed."""
    out, keep = {}, re.compile(r"^(?:step:(\d+)/\d+ (.*)|event:resumed step:(\d+) .*)$", re.M)
    for step, rest, resumed in keep.findall(log.read_text()):
        if resumed:
            out = {step: found for step, found in out.items() if step <= int(resumed)}
            continue
        text = re.sub(r"train_time:\S+ step_avg:\S+ ", "", rest)
        out.setdefault(int(step), {})[text.partition(":")[0]] = text
    return {step: sorted(kinds.values()) for step, kinds in out.items()}


def events(log: Path, name: str) -> list[str]:
    return re.findall(rf"^event:{name}\b.*", log.read_text(), re.M)
