"""Kill, stop, hang and corrupt runs at random, for as long as you like. Not part of ./test.sh.

    .venv/bin/python tests/soak.py --minutes 60 --seed 1 --out soak.json

Every run has an undisturbed twin (same settings, same number of ranks). After each fault, at a random
moment, the run is resumed with RESUME=auto, sometimes on another number of ranks, or restarted by torchrun.
Every run must finish with its twin's losses: equal in every digit if the number of ranks never changed, else
within 5e-3 (60 steps amplify roundings). Exit code 1 if any does not.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from helpers import BASELINE, ORD, base_env, command, copy_project, make_text, write_shard  # noqa: E402, path first
from jobs import Job, events, lines  # noqa: E402

from runtime.supervise import process_state  # noqa: E402

STEPS, TOLERANCE, DIST_TIMEOUT = 60, 5e-3, 10
COMMON = dict(
    NUM_SCHEDULED_ITERATIONS=STEPS,
    VAL_LOSS_EVERY=20,
    BATCH_SIZES="1024,1024,2048,2048",
    ADAM_LR=0.008,
    DIST_TIMEOUT=DIST_TIMEOUT,
)
# script, settings, ranks (0: plain python)
ARMS = {
    "baseline": (BASELINE, {}, 2),
    "alone": (BASELINE, {"SEED": 5}, 0),
    "ord": (ORD, {"SPECTRAL_LR_MUL": 0.1}, 2),
    "ord_states": (ORD, {"SPECTRAL_SCHEDULE": "adaptive", "SPECTRAL_VARIANCE": 1, "GRAD_CLIP": 1.0}, 2),
    "adamw": (BASELINE, {"OPTIMIZER": "adamw", "ADAM_MATRIX_LR": 0.003}, 2),
    "four": (BASELINE, {"SEED": 9}, 4),
    "experts": (ORD, {"MODEL": "moe-tiny"}, 2),
    "spectra": (BASELINE, {"MANIFOLD_EVERY": 7}, 2),
}


@dataclass
class Disturbed:
    """One run and what was done to it."""

    arm: str
    run_id: str
    faults: list[str] = field(default_factory=list)
    ranks_changed: bool = False
    problem: str = ""
    exact: bool = False
    difference: float = float("nan")


# Faults. Each acts on a living job and returns whether the job must be restarted.


def kill_all(job: Job, rng) -> bool:
    job.kill()
    return True


def kill_rank(job: Job, rng) -> bool:
    """Kill a rank: torchrun restarts it, or ends if it has no restarts left."""
    for pid in rng.sample(list(job.ranks().values()), 1) if job.ranks() else ():
        signal_to(pid, signal.SIGKILL)
    return False


def kill_launcher(job: Job, rng) -> bool:
    """Kill torchrun: the workers notice, save and stop on their own."""
    wake(job)
    job.process.kill()
    job.end()
    return True


def ask_to_stop(job: Job, rng) -> bool:
    wake(job)
    os.killpg(job.process.pid, rng.choice((signal.SIGTERM, signal.SIGINT)))
    job.end()
    return True


def stop_rank(job: Job, rng) -> bool:
    """Hang a rank for good: the others give up after DIST_TIMEOUT."""
    awake = [pid for pid in job.ranks().values() if process_state(pid) == "alive"]
    for pid in rng.sample(awake, 1) if awake else ():
        signal_to(pid, signal.SIGSTOP)
        if len(awake) < 2:  # no other rank is there to notice
            time.sleep(1)
            signal_to(pid, signal.SIGCONT)
    return False


def pause(job: Job, rng) -> bool:
    """Hang all ranks for less than DIST_TIMEOUT, which must have no effect."""
    pids = list(job.ranks().values())
    for number, seconds in ((signal.SIGSTOP, rng.uniform(0.2, 3)), (signal.SIGCONT, 0)):
        for pid in pids:
            signal_to(pid, number)
        time.sleep(seconds)
    return False


def cut_checkpoint(job: Job, rng) -> bool:
    job.kill()
    damage(job, lambda data: data[: rng.randrange(len(data))])
    return True


def flip_bit(job: Job, rng) -> bool:
    """Flip a bit in the middle half of a checkpoint, where the tensors are."""
    job.kill()

    def flipped(data):
        data = bytearray(data)
        data[rng.randrange(len(data) // 4, 3 * len(data) // 4)] ^= 1 << rng.randrange(8)
        return bytes(data)

    damage(job, flipped)
    return True


def tear_log(job: Job, rng) -> bool:
    """Leave half a line in the log, as if the machine died while writing it."""
    job.kill()
    # not begun; or finished, so that no resumed run would end the torn line
    if not job.log.exists() or events(job.log, "finished"):
        return True
    with job.log.open("a") as file:
        file.write(f"step:{STEPS}/{STEPS} train_loss:0.1234"[: rng.randrange(1, 30)])
    return True


def intrude(job: Job, rng) -> bool:
    """Start the same run a second time: it must be refused, without affecting the first."""
    if not job.log.exists():  # it would be the first
        return False
    env = {**job.env, "RESUME": rng.choice(("", "auto"))}
    done = subprocess.run(
        command(job.script, 0), cwd=job.log.parent.parent, env=env, capture_output=True, text=True
    )
    if job.process.poll() is None and done.returncode not in (0, 2):
        raise AssertionError(f"an intruder was not refused: {done.returncode} {done.stderr[-500:]}")
    return False


def hide_data(job: Job, rng) -> bool:
    """Move the training shard away for a second; the run has it in memory."""
    path = job.log.parent.parent / "made_train_000000.bin"
    path.rename(path.with_suffix(".away"))
    time.sleep(1)
    path.with_suffix(".away").rename(path)
    return False


FAULTS = [
    kill_all,
    kill_rank,
    kill_launcher,
    ask_to_stop,
    stop_rank,
    pause,
    cut_checkpoint,
    flip_bit,
    tear_log,
]
FAULTS += [intrude, hide_data]


def signal_to(pid: int, number: int):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wake(job: Job):
    """Continue stopped ranks: without torchrun to kill them, they would stay forever."""
    for pid in job.ranks().values():
        signal_to(pid, signal.SIGCONT)


def damage(job: Job, change):
    """Corrupt the newest checkpoint, if there is an older one to fall back to."""
    found = sorted((job.log.parent / job.run_id).glob("step_*.pt"))
    if len(found) > 1:
        found[-1].write_bytes(change(found[-1].read_bytes()))


def start(cwd: Path, arm: str, run_id: str, ranks: int, **settings) -> Job:
    script, own, _ = ARMS[arm]
    script = str(cwd / script)  # the copy
    env = base_env(cwd, RUN_ID=run_id, **COMMON, **own, **settings)
    job = Job(cwd, script, env, ranks, ("--standalone", "--max-restarts=1"))
    job.env, job.script = env, script
    return job


def disturb(cwd: Path, this: Disturbed, rng: random.Random, most_faults: int):
    """Start, disturb and resume a run until it finishes."""
    ranks = ARMS[this.arm][2]
    job = start(cwd, this.arm, this.run_id, ranks, SAVE_EVERY=rng.choice((2, 5, 10)), RESUME="auto")
    for _ in range(most_faults + 10):
        wait = rng.uniform(3, 14) if len(this.faults) < most_faults else 600
        end = time.monotonic() + wait
        while time.monotonic() < end and job.process.poll() is None:
            time.sleep(0.05)
        if job.process.poll() is None and len(this.faults) < most_faults:
            fault = rng.choice(FAULTS)
            this.faults.append(fault.__name__)
            anew = fault(job, rng)
        elif job.process.poll() is None:
            raise AssertionError("the run hangs")
        else:
            job.end()
            anew = True
        if job.process.poll() is not None or anew:
            if job.log.exists() and events(job.log, "finished"):
                return
            if rng.random() < 0.15:
                ranks = rng.choice([n for n in (0, 1, 2, 4) if n != ranks])
            job = start(cwd, this.arm, this.run_id, ranks, SAVE_EVERY=rng.choice((2, 5, 10)), RESUME="auto")
    raise AssertionError(f"not finished after {most_faults + 10} attempts")


def spectra(log: Path) -> list[dict]:
    """Read the manifold measurements beside a log."""
    path = log.with_suffix(".manifold.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def loss(line: str) -> float:
    """Loss at the beginning of a step's line."""
    return float(line.split()[0].partition(":")[2])


def compare(log: Path, twin: Path, this: Disturbed):
    """Record how a run's log differs from its twin's, and whether that is a problem."""
    started = re.findall(r"^event:(?:started|resumed) .*\bworld_size:(\d+)", log.read_text(), re.M)
    this.ranks_changed = len(set(started)) > 1  # an intruder may resume a crashed run, too
    found, wanted = lines(log), lines(twin)
    have, want = ({step: len(kinds) for step, kinds in steps.items()} for steps in (found, wanted))
    if have != want:
        this.problem = f"has lines of {have}, its twin of {want}"
        return
    pairs = [(loss(a), loss(b)) for step in wanted for a, b in zip(found[step], wanted[step])]
    gaps = [abs(a - b) for a, b in pairs]
    this.difference = max(gaps) if all(gap == gap for gap in gaps) else float("nan")
    this.exact = found == wanted
    if not this.exact and not (this.ranks_changed and this.difference <= TOLERANCE):
        this.problem = f"differs from its twin by {this.difference:g}"
    measured, of_twin = (spectra(path) for path in (log, twin))
    which = [[(row["step"], row["layer"], row["proj"]) for row in rows] for rows in (measured, of_twin)]
    if which[0] != which[1] or (not this.ranks_changed and measured != of_twin):
        this.problem = "its spectra differ from its twin's"
    open_lines = [line for line in log.read_text().splitlines() if line.startswith("event:finished")]
    if len(open_lines) != 1:
        this.problem = f"{len(open_lines)} finished events"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=4, help="at most so many a run (4)")
    parser.add_argument("--out", type=Path, help="write all results here as JSON")
    args = parser.parse_args(argv)
    rng, runs, injected = random.Random(args.seed), [], Counter()
    cwd = Path(tempfile.mkdtemp(prefix="soak-"))
    write_shard(cwd / "made_train_000000.bin", make_text(40_000, 1))  # two epochs, nearly
    write_shard(cwd / "made_val_000000.bin", make_text(20_000, 2))
    copy_project(cwd)
    for arm, (_, _, ranks) in ARMS.items():
        job = start(cwd, arm, f"twin_{arm}", ranks)
        if job.end(600) or not events(job.log, "finished"):
            raise SystemExit(f"the undisturbed {arm} failed: {job.out.read_text()[-2000:]}")
    print(f"{len(ARMS)} undisturbed twins in {cwd}", flush=True)
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        arm = rng.choice(list(ARMS))
        this = Disturbed(arm, f"run{len(runs):04d}_{arm}")
        runs.append(this)
        try:
            disturb(cwd, this, rng, rng.randint(1, args.faults))
            compare(cwd / "logs" / f"{this.run_id}.txt", cwd / "logs" / f"twin_{arm}.txt", this)
        except Exception as error:  # the soak goes on; this one is reported
            this.problem = f"{type(error).__name__}: {error}"
        injected.update(this.faults)
        what = this.problem or ("equal" if this.exact else f"within {this.difference:.1e}, ranks changed")
        print(f"{this.run_id}: {', '.join(this.faults) or 'no fault'}: {what}", flush=True)
        if not this.problem:
            shutil.rmtree(cwd / "logs" / this.run_id, ignore_errors=True)
        if args.out:
            args.out.write_text(json.dumps([vars(r) for r in runs], indent=1))
    bad = [r for r in runs if r.problem]
    exact, near = sum(r.exact for r in runs), [r.difference for r in runs if not r.problem and not r.exact]
    print(f"{len(runs)} runs, {sum(injected.values())} faults: {dict(injected.most_common())}")
    print(
        f"{len(runs) - len(bad)} finished and equal to their twins: {exact} digit for digit, {len(near)} "
        f"after a change of ranks within {max(near, default=0):.1e}; {len(bad)} with a problem"
    )
    for r in bad:
        print(f"  {r.run_id}: {r.problem} (after {', '.join(r.faults)})")
    if not bad:
        shutil.rmtree(cwd)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
