"""Stand-in for the trainers: starts at once, misbehaves on demand and writes logs in our format.

The tests of the launcher copy it to base.py and ord.py, which differ as the twins do. BEHAVIOUR says how it
behaves. Each start appends a line to starts.jsonl.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RECORDED, MACHINE = ("RUN_ID", "TARGET_LOSS", "SAVE_MODEL"), ("DATA_PATH", "COMPILE")
KNOBS = [  # name, type, default, limits
    ("RUN_ID", "str", "", {}),
    ("SEED", "int", 0, {"low": 0}),
    ("MODEL", "str", "plain", {}),
    ("DEVICE", "str", "auto", {"choices": ["auto", "cuda", "cpu"]}),
    ("DATA_PATH", "str", ".", {}),
    ("COMPILE", "str", "0", {"choices": ["auto", "0", "1"]}),
    ("LR_MULS", "float,...", [1.0, 1.5], {"low": 0}),
    ("COOLDOWN_FRAC", "float", 0.55, {"low": 0, "high": 1}),
    ("NUM_SCHEDULED_ITERATIONS", "int", 4, {"low": 1}),
    ("DISABLE_FP8", "bool", False, {}),
    ("BATCH_SIZES", "int,...", [128], {"low": 128}),
    ("TARGET_LOSS", "float", 3.28, {"above": 0}),
    ("STEP_SECONDS", "float", 0.0, {}),
    ("BEHAVIOUR", "str", "good", {}),
]
if "ord" in Path(sys.argv[0]).name:
    KNOBS.append(("SPECTRAL_LR_MUL", "float", 0.1, {}))
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def source_hash():
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def print_settings():
    affects = {**dict.fromkeys(RECORDED, "recording"), **dict.fromkeys(MACHINE, "machine")}
    settings = [
        {"name": name, "type": kind, "default": default, "help": "a knob", "allowed": kind, **limits}
        | {"affects": affects.get(name, "training")}
        for name, kind, default, limits in KNOBS
    ]
    presets = {"plain": {}, "tiny": {"COOLDOWN_FRAC": 0.5}}
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    found = {"source_hash": source_hash(), "presets": presets, "num_gpus": len(gpus)}
    print(json.dumps({**found, "settings": settings}))


def check_arms():
    """Answer like a trainer, by the trainers' own rules for single values."""
    from runtime.settings import SettingsError, knob, parse_value

    kinds = {"float,...": tuple[float, ...], "int,...": tuple[int, ...]}
    kinds |= {"str": str, "int": int, "float": float, "bool": bool}
    fields = [(name, kinds[kind], knob(None, "a knob", **limits)) for name, kind, _, limits in KNOBS]
    known = {f.name: f for f in dataclasses.fields(dataclasses.make_dataclass("Settings", fields))}
    answers = []
    for arm in json.load(sys.stdin):
        answer = {"values": {}, "refused": None, "data": None}
        try:
            for name, text in arm.items():
                answer["values"][name] = parse_value(name, text, known[name])
            if arm.get("MODEL", "auto") not in ("auto", "plain", "tiny"):
                raise SettingsError(f"MODEL={arm['MODEL']!r}: wanted one of auto, plain, tiny")
        except SettingsError as error:
            answer["refused"] = str(error)
        answers.append(answer)
    print(json.dumps(answers))


def note(what):
    """Add a line to starts.jsonl."""
    env = os.environ
    line = {"what": what, "run_id": env["RUN_ID"], "seed": int(env["SEED"]), "rank": int(env.get("RANK", 0))}
    line |= {"pid": os.getpid(), "time": time.time(), "cores": sorted(os.sched_getaffinity(0))}
    line |= {"gpus": env.get("CUDA_VISIBLE_DEVICES"), "port": env.get("MASTER_PORT")}
    line |= {"world_size": env.get("WORLD_SIZE")}
    with open("starts.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def two_have_started():
    return Path("starts.jsonl").read_text().count('"what": "start"') >= 2


def start_family(loose):
    """Start helpers in their own sessions, like torchrun's workers.

    One is our child, one an orphan; with `loose`, there is another orphan without our environment.
    """
    for env in ({}, None) if loose else (None,):
        popen = f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True, env={env!r})"
        subprocess.run([sys.executable, "-c", "import subprocess, sys; " + popen])
    subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)


def open_log(steps):
    env = os.environ
    os.makedirs("logs", exist_ok=True)
    log = open(f"logs/{env['RUN_ID']}.txt", "x", buffering=1)  # noqa: SIM115  it is closed at the end
    config = {"run_id": env["RUN_ID"], "seed": int(env["SEED"]), "model": env.get("MODEL", "tiny")}
    config |= {"batch_sizes": [128], "num_scheduled_iterations": steps}
    config["settings"] = {name: env.get(name) for name, *_ in KNOBS}
    bar = "=" * 100
    log.write(f"import os\n\ndef f():\n    pass\n{bar}\nconfig:{json.dumps(config)}\n")
    started = f"script:x source_hash:{source_hash()} time:2026-02-06T12:00:00+0000 device:d world_size:1"
    log.write(f"event:started {started}\n{bar}\n")
    return log


def after_step(step, behaviour, log):
    if step == 1:
        note("stepped")
    if step != 2:
        return
    if behaviour == "diverge":
        log.write("event:diverged step:2 train_loss:nan\n")
        sys.exit(3)
    if "crash" in behaviour:
        if "torn" in behaviour:
            log.write("step:3/4 trai")
        raise RuntimeError("out of memory")
    if "hang" in behaviour:
        time.sleep(60)
    if behaviour == "gate":
        wait_until(Path("go").exists)


def main():
    env, first = os.environ, int(os.environ.get("RANK", 0)) == 0
    behaviour, pause = env.get("BEHAVIOUR", "good"), float(env.get("STEP_SECONDS", 0))
    steps = int(env.get("NUM_SCHEDULED_ITERATIONS", 4))
    if Path("healed").exists():
        behaviour, pause = "good", 0.0
    if "stubborn" in behaviour:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "refuse" or Path("refusing").exists():
        print(f"{Path(sys.argv[0]).name}: BATCH_SIZES stage 2 = 7 is not a multiple of 8", file=sys.stderr)
        sys.exit(2)
    if "family" in behaviour:
        start_family("loose" in behaviour)
    note("start")
    print(f"console of {env['RUN_ID']}")
    log = open_log(steps) if first else None
    if behaviour == "meet at once" or Path("meet at once").exists():
        wait_until(two_have_started)
    for step in range(1, steps + 1):
        time.sleep(pause)
        loss = 5.0 / step + int(env["SEED"]) / 1000
        if log:
            log.write(f"step:{step}/{steps} train_loss:{loss:.5f} train_time:{step}ms step_avg:1.00ms\n")
        after_step(step, behaviour, log)
    if log:
        log.write(f"step:{steps}/{steps} val_loss:{5 / steps:.5f} train_time:{steps}ms step_avg:1.00ms\n")
        log.write("event:finished\n")
        log.close()
    note("end")


if __name__ == "__main__":
    if "--settings-json" in sys.argv:
        print_settings()
    elif "--check-arms" in sys.argv:
        check_arms()
    else:
        main()
