"""launch_lr_sweep: plans what the file says, makes each run once, survives trouble, leaves nothing behind.

The launcher is tested with a stand-in for the trainer that starts at once, behaves badly on demand and writes
logs in our format. The launcher runs in this process where that is enough (`launch`), and in one of its own
where signals, orphans or a terminal matter. Two tests run the real trainers.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from helpers import make_tokens, write_shard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from logs_for_tests import make_log

import launch_lr_sweep as launcher
from analysis import devices, expected_time, files, processes
from analysis.manifest import Manifest, Run, manifest_path, read_manifest
from analysis.run_log import read_log
from analysis.sweep_files import read_sweep
from analysis.sweep_plan import open_manifest, plan
from analysis.trainers import env_text, read_trainer, typed
from monitor_runs import Monitor

ROOT = Path(launcher.__file__).parent
PATIENCE_S = 180  # so long a test waits for what must come, on a machine that is busy with other things

# BEHAVIOUR says how the stand-in behaves. Each start appends a line to starts.jsonl.
STAND_IN = """
import hashlib, json, os, signal, subprocess, sys, time

def wait_until(condition):
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)

RECORDED, MACHINE = ("RUN_ID", "TARGET_LOSS", "SAVE_MODEL"), ("DATA_PATH", "COMPILE")
KNOBS = [
    ("RUN_ID", "str", "", {}), ("SEED", "int", 0, {"low": 0}), ("MODEL", "str", "plain", {}),
    ("DEVICE", "str", "auto", {"choices": ["auto", "cuda", "cpu"]}), ("DATA_PATH", "str", ".", {}),
    ("COMPILE", "str", "0", {"choices": ["auto", "0", "1"]}),
    ("LR_MULS", "float,...", [1.0, 1.5], {"low": 0}),
    ("COOLDOWN_FRAC", "float", 0.55, {"low": 0, "high": 1}),
    ("NUM_SCHEDULED_ITERATIONS", "int", 4, {"low": 1}), ("DISABLE_FP8", "bool", False, {}),
    ("BATCH_SIZES", "int,...", [128], {"low": 128}), ("TARGET_LOSS", "float", 3.28, {"above": 0}),
    ("STEP_SECONDS", "float", 0.0, {}), ("BEHAVIOUR", "str", "good", {}),
] + ([("SPECTRAL_LR_MUL", "float", 0.1, {})] if "ord" in sys.argv[0] else [])
if "--settings-json" in sys.argv:
    presets = {"plain": {}, "tiny": {"COOLDOWN_FRAC": 0.5}}
    affects = {**dict.fromkeys(RECORDED, "recording"), **dict.fromkeys(MACHINE, "machine")}
    source_hash = hashlib.sha256(open(__file__, "rb").read()).hexdigest()[:16]
    print(json.dumps({"script": os.path.basename(sys.argv[0]), "source_hash": source_hash, "presets": presets,
        "settings": [{"name": n, "type": t, "default": d, "help": "a knob", "allowed": t,
                      "affects": affects.get(n, "training"), **more} for n, t, d, more in KNOBS]}))
    sys.exit(0)

env, rank = os.environ, int(os.environ.get("RANK", 0))
run_id, seed, behaviour = env["RUN_ID"], int(env["SEED"]), env.get("BEHAVIOUR", "good")
if os.path.exists("healed"):
    behaviour = "good"
pause = 0.0 if os.path.exists("healed") else float(env.get("STEP_SECONDS", 0))
steps = int(env.get("NUM_SCHEDULED_ITERATIONS", 4))
if "stubborn" in behaviour:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "refuse":
    print("stand-in: BATCH_SIZES stage 2 = 7 is not a multiple of 8", file=sys.stderr)
    sys.exit(2)
if "family" in behaviour:  # helpers in sessions of their own, as torchrun's workers are
    code = "import signal, time\\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\\ntime.sleep(60)"
    for more in ("", ", env={}")[:1 + ("loose" in behaviour)]:  # orphans, the second without our environment
        popen = f"subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True{more})"
        subprocess.run([sys.executable, "-c", "import subprocess, sys; " + popen])
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

def note(what):
    cores = sorted(os.sched_getaffinity(0))
    with open("starts.jsonl", "a") as file:
        file.write(json.dumps({"what": what, "run_id": run_id, "seed": seed, "rank": rank, "pid": os.getpid(),
            "time": time.time(), "gpus": env.get("CUDA_VISIBLE_DEVICES"), "cores": cores,
            "port": env.get("MASTER_PORT"), "world_size": env.get("WORLD_SIZE")}) + "\\n")

def two_have_started():
    return open("starts.jsonl").read().count('"what": "start"') >= 2

note("start")
print(f"console of {run_id}")
if rank == 0:
    os.makedirs("logs", exist_ok=True)
    log = open(f"logs/{run_id}.txt", "x", buffering=1)
    config = {"run_id": run_id, "seed": seed, "model": env.get("MODEL", "tiny"), "batch_sizes": [128],
              "num_scheduled_iterations": steps, "settings": {k: env.get(k) for k, *_ in KNOBS}}
    bar = "=" * 100
    log.write(f"import os\\n\\ndef f():\\n    pass\\n{bar}\\nconfig:{json.dumps(config)}\\n")
    log.write(f"event:started script:x time:2026-02-06T12:00:00+0000 device:d world_size:1\\n{bar}\\n")
if behaviour == "meet at once" or os.path.exists("meet at once"):
    wait_until(two_have_started)
for step in range(1, steps + 1):
    time.sleep(pause)
    loss = 99.0 if behaviour == "spike" and step == 2 else 5.0 / step + seed / 1000
    if rank == 0:
        log.write(f"step:{step}/{steps} train_loss:{loss:.5f} train_time:{step}ms step_avg:1.00ms\\n")
    if step == 1:
        note("stepped")
    if step == 2 and behaviour == "diverge":
        log.write("event:diverged step:2 train_loss:nan\\n")
        sys.exit(3)
    if step == 2 and "crash" in behaviour:
        log.write("step:3/4 trai") if "torn" in behaviour else None
        raise RuntimeError("out of memory")
    if step == 2 and ("hang" in behaviour or behaviour == "spike"):
        time.sleep(60)
    if step == 2 and behaviour == "gate":
        wait_until(lambda: os.path.exists("go"))
    if step == 2 and behaviour == "meet after a step":
        wait_until(two_have_started)
if rank == 0:
    log.write(f"step:{steps}/{steps} val_loss:{5 / steps:.5f} train_time:{steps}ms step_avg:1.00ms\\n")
    log.write("event:finished\\n")
note("end")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two stand-ins, which differ as the twins do, and nothing of ours in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name in ("SEED", "RUN_ID", "MODEL", "DEVICE", "DATA_PATH", "COMPILE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "base.py").write_text(STAND_IN)
    (tmp_path / "ord.py").write_text(STAND_IN)
    devices.visible_gpus.cache_clear()
    yield tmp_path
    left = alive(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    devices.visible_gpus.cache_clear()
    assert not left, "processes of the sweep are still there"


def alive(folder):
    """Processes that run in a folder: what a launcher may have left behind."""
    found = {process.pid for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)}
    return found - {os.getpid()}


def sweep_file(text, name="trial"):
    Path(f"{name}.toml").write_text(text)
    return f"{name}.toml"


@pytest.fixture
def launch(place, monkeypatch, capsys):
    """The launcher's main, in this process: its exit code and output."""
    # else the orphans of later tests would be ours, and nobody would take their exit codes
    monkeypatch.setattr(launcher, "adopt_orphans", lambda: None)
    monkeypatch.setattr(launcher, "POLL_S", 0.02)

    def call(*args):
        capsys.readouterr()
        code = launcher.main(list(args))
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


def launch_process(*args, grace=10.0, **options):
    """The launcher in a process of its own, in the background, with a time of grace for tests."""
    code = "import sys, launch_lr_sweep as l; from analysis import processes as p\n"
    code += f"p.GRACE_S = {grace}; sys.exit(l.main(sys.argv[1:]))"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})},
        text=True,
        # a shell in the background ignores SIGINT, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def launched(*args, **options):
    """The same, until it has ended: (exit code, output)."""
    process = launch_process(*args, **options)
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def manifest(name="trial"):
    return json.loads(Path(f"logs/{name}.sweep.json").read_text())


def states(name="trial"):
    return {(run["tag"], run["seed"]): run["state"] for run in manifest(name)["runs"]}


def starts(what="start"):
    path = Path("starts.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["what"] == what]


def wait_for(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def planned(sweep):
    """The sweep's manifest after planning, and why each run must be made."""
    opened = open_manifest(sweep)
    return opened, plan(sweep, opened)


TWO_ARMS = """
script = "ord.py"
seeds = [1, 2]
control = "base"
[env]
LR_MULS = [1, 1.52]
[[arms]]
tag = "base"
script = "base.py"
[[arms]]
tag = "spectral_lr_0.1"
SPECTRAL_LR_MUL = 0.1
"""


# ------------------------------------------------------------------------------------------------
# What the file says
# ------------------------------------------------------------------------------------------------


def test_names_are_the_seeds_with_seed_and_hash(place):
    """Else tools that look for `lrmul-...-cd...-TAG-TIME` miss our runs, or two runs share a name."""
    runs = planned(read_sweep(sweep_file(TWO_ARMS)))[0].runs
    assert len({run.run_id for run in runs}) == 4
    for run in runs:
        pattern = rf"lrmul-1-1\.52-cd0\.55-{re.escape(run.tag)}-\d{{8}}-\d{{6}}-seed{run.seed}-[0-9a-f]{{8}}"
        assert re.fullmatch(pattern, run.run_id), run.run_id
        assert run.log == f"logs/{run.run_id}.txt"


def test_seeds_are_interleaved_and_arms_may_have_their_own(place):
    """Else a machine that slows down or heats up does it to one arm alone."""
    text = TWO_ARMS + '[[arms]]\ntag = "more"\nseeds = [2, 7, 9]\nSPECTRAL_LR_MUL = 0.5\n'
    runs = read_sweep(sweep_file(text), None).runs()
    assert [(run.tag[:4], run.seed) for run in runs] == [
        *[("base", 1), ("spec", 1), ("more", 2)],
        *[("base", 2), ("spec", 2), ("more", 7)],
        ("more", 9),
    ]


def test_an_arm_may_have_its_own_control(place):
    """Else two forms at several rates can only be compared with one rate of one form. The grid goes along."""
    text = TWO_ARMS.replace('"base"\n', '"base-cooldown_frac_0.5"\n', 1)
    text += 'versus = "base"\n[grid]\nCOOLDOWN_FRAC = [0.5, 0.7]\n'
    sweep = read_sweep(sweep_file(text), None)
    assert [(arm.tag, arm.versus) for arm in sweep.arms] == [
        ("base-cooldown_frac_0.5", None),
        ("base-cooldown_frac_0.7", None),
        ("spectral_lr_0.1-cooldown_frac_0.5", "base-cooldown_frac_0.5"),
        ("spectral_lr_0.1-cooldown_frac_0.7", "base-cooldown_frac_0.7"),
    ]
    planned(sweep)[0].save()
    saved = read_manifest(manifest_path("trial"))
    assert saved.versus == {arm.tag: arm.versus for arm in sweep.arms[2:]}
    assert saved.control_of("spectral_lr_0.1-cooldown_frac_0.7") == "base-cooldown_frac_0.7"
    assert saved.control_of("base-cooldown_frac_0.7") == "base-cooldown_frac_0.5"


def test_what_a_script_does_not_have_is_left_out_and_said(place):
    """Else the baseline refuses to start, or the user believes that a setting applied to it."""
    text = TWO_ARMS.replace("[env]", "[env]\nSPECTRAL_LR_MUL = 0.3\nCOOLDOWN_FRAC = 0")
    sweep = read_sweep(sweep_file(text), None)
    base, ord_arm = sweep.arms
    assert base.settings == {"LR_MULS": [1.0, 1.52], "COOLDOWN_FRAC": 0.0}
    assert ord_arm.settings == {**base.settings, "SPECTRAL_LR_MUL": 0.1}, (
        "the arm's own value wins over [env]"
    )
    assert any(
        "base" in note and "SPECTRAL_LR_MUL" in note and "COOLDOWN" not in note for note in sweep.notes
    )


def test_grid_multiplies_the_arms_that_leave_it_open(place):
    """Else a control is run once for every grid value and counted as so many arms."""
    text = """
script = "ord.py"
seeds = [1]
[grid]
SPECTRAL_LR_MUL = [0, 0.5]
LR_MULS = [[1, 1], [2, 1]]
[[arms]]
tag = "open"
[[arms]]
tag = "closed"
SPECTRAL_LR_MUL = 0.25
[[arms]]
tag = "base"
script = "base.py"
"""
    sweep = read_sweep(sweep_file(text), None)
    assert [arm.tag for arm in sweep.arms] == [
        "open-spectral_lr_mul_0-lr_muls_1,1",
        "open-spectral_lr_mul_0-lr_muls_2,1",
        "open-spectral_lr_mul_0.5-lr_muls_1,1",
        "open-spectral_lr_mul_0.5-lr_muls_2,1",
        "closed-lr_muls_1,1",
        "closed-lr_muls_2,1",
        "base-lr_muls_1,1",
        "base-lr_muls_2,1",
    ]
    assert sweep.arms[3].settings == {"SPECTRAL_LR_MUL": 0.5, "LR_MULS": [2.0, 1.0]}
    assert sweep.arms[5].settings == {"SPECTRAL_LR_MUL": 0.25, "LR_MULS": [2.0, 1.0]}


def test_scale_changes_what_it_says_and_nothing_else(place):
    """Else the tiny version is another experiment, or too long to be run."""
    text = (
        TWO_ARMS.replace("[env]", "[grid]\nCOOLDOWN_FRAC = [0, 0.5, 1]\n[env]\nTARGET_LOSS = 3")
        + """
[scale.tiny]
seeds = [5]
arms = ["spectral_lr_0.1"]
TARGET_LOSS = 2
MODEL = "tiny"
[scale.tiny.grid]
COOLDOWN_FRAC = [0.25]
"""
    )
    text = text.replace('control = "base"', "")
    (arm,) = read_sweep(sweep_file(text), "tiny").arms
    assert (arm.tag, arm.seeds) == ("spectral_lr_0.1-cooldown_frac_0.25", [5])
    assert arm.settings == {
        "LR_MULS": [1.0, 1.52],
        "TARGET_LOSS": 2.0,
        "MODEL": "tiny",
        "COOLDOWN_FRAC": 0.25,
        "SPECTRAL_LR_MUL": 0.1,
    }
    assert len(read_sweep("trial.toml", None).arms) == 6


BAD = {  # what is wrong: what the error must say
    "seed = [1]\n" + TWO_ARMS: ("seed", "did you mean seeds"),
    TWO_ARMS.replace("[1, 2]", "[1, 1]"): ("seeds = [1, 1]", "different whole numbers"),
    TWO_ARMS.replace("[1, 2]", "3"): ("seeds is 3",),
    TWO_ARMS.replace("[1, 2]", "[-1]"): ("seeds = [-1]",),
    TWO_ARMS.replace('control = "base"', 'control = "bass"'): ("bass", "base, spectral_lr_0.1"),
    TWO_ARMS + 'versus = "bass"': ("versus = 'bass'", "another arm, of base"),
    TWO_ARMS + 'versus = "spectral_lr_0.1"': ("another arm, of base",),
    TWO_ARMS.replace('control = "base"', "") + 'versus = "base"': ("no control = ",),
    'script = "ord.py"\n[arms]\ntag = "a"\n': ("double brackets",),
    TWO_ARMS.replace("LR_MULS", "LR_MUL"): ("LR_MUL in [env]", "base.py or ord.py", "LR_MULS"),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", 'LR_MULS = "1;2"'): (
        "LR_MULS='1;2' in [env]",
        "wanted float,...",
    ),
    TWO_ARMS.replace("SPECTRAL_LR_MUL = 0.1", "SPECTRAL_LR_MULL = 0.1"): (
        "SPECTRAL_LR_MULL",
        "SPECTRAL_LR_MUL",
    ),
    TWO_ARMS.replace('"base.py"', '"base.py"\nSPECTRAL_LR_MUL = 1'): (
        "arm 'base'",
        "not a setting of base.py",
    ),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", "COOLDOWN_FRAC = 1.5"): ("COOLDOWN_FRAC=1.5 in [env]",),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", "NUM_SCHEDULED_ITERATIONS = 1.5"): (
        "=1.5 in [env]",
        "wanted int",
    ),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", "NUM_SCHEDULED_ITERATIONS = true"): ("=True in [env]",),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", "TARGET_LOSS = nan"): ("TARGET_LOSS=nan",),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", "TARGET_LOSS = 0"): ("TARGET_LOSS=0",),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", 'DEVICE = "tpu"'): ("DEVICE='tpu'",),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", "DISABLE_FP8 = 2"): ("DISABLE_FP8=2",),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", 'MODEL = "huge"'): ("MODEL='huge'", "auto, plain, tiny"),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", "SEED = 3"): ("SEED in [env]", "seeds = [...]"),
    TWO_ARMS.replace("LR_MULS = [1, 1.52]", 'script = "base.py"'): (
        "script in [env]",
        "above the first [table]",
    ),
    TWO_ARMS.replace("spectral_lr_0.1", "base"): ("two arms are called 'base'",),
    TWO_ARMS.replace("spectral_lr_0.1", "a/b"): ("arm 'a/b'", "name files"),
    TWO_ARMS.replace("spectral_lr_0.1", "a" * 200): ("200 at most",),
    TWO_ARMS + '[[arms]]\ntag = "again"\n': ("'spectral_lr_0.1' and 'again' have the same settings",),
    TWO_ARMS + "[[arms]]\nSPECTRAL_LR_MUL = 3\n": ("arm 3", 'tag = "..."'),
    TWO_ARMS + '[[arms]]\ntag = "x"\nspectral_lr_mul = 3\n': ("spectral_lr_mul", "capitals"),
    TWO_ARMS.replace('"ord.py"', '"no.py"'): ("'no.py'", "neither"),
    TWO_ARMS.replace('"ord.py"', '"silent.py"'): ("silent.py --settings-json", "I am no trainer"),
    TWO_ARMS.replace('script = "ord.py"', ""): ("no script",),
    TWO_ARMS + "[grid]\nLR_MULS = [[1]]\n": ("LR_MULS stands in [grid] and also in [env]",),
    TWO_ARMS + "[grid]\nCOOLDOWN_FRAC = 0.5\n": ("COOLDOWN_FRAC = 0.5 in [grid]", "list of values"),
    TWO_ARMS + "[grid]\nCOOLDOWN_FRAC = []\n": ("COOLDOWN_FRAC = []",),
    "script = [": ("not valid TOML",),
    TWO_ARMS.replace("[1, 1.52]", "[1, 1.52"): ("not valid TOML",),
}


TAIL = "\n[scale.tiny]\n"
BAD_SCALES = {
    TWO_ARMS: ("no [scale.tiny]; its scales: none",),
    TWO_ARMS + TAIL + "NUM_STEPS = 3": ("NUM_STEPS",),
    TWO_ARMS + TAIL + "num = 3": ("capitals",),
    TWO_ARMS + TAIL + 'arms = ["none"]': ("base, spectral_lr_0.1",),
    TWO_ARMS + TAIL + 'arms = ["spectral_lr_0.1"]': ("control",),
    TWO_ARMS + TAIL + 'arms = [{ tag = "base" }, "x"]': ("arm 2 of [scale.tiny] is 'x'",),
    TWO_ARMS + TAIL + "[[scale.tiny.arms]]\nLR_MULS = [1]": ("arm 1 of [scale.tiny]: wanted tag",),
    TWO_ARMS + TAIL + "[scale.tiny.grid]\nLR_MULS = [[1]]": ("not in [grid]",),
    'script = "ord.py"\n[[arms]]\ntag = "a"\nTARGET_LOSS = 3' + TAIL + "TARGET_LOSS = 2": ("every arm",),
}


@pytest.mark.parametrize(
    "text, scale, wanted",
    [(text, [], wanted) for text, wanted in BAD.items()]
    + [(text, ["--scale", "tiny"], wanted) for text, wanted in BAD_SCALES.items()],
)
def test_a_bad_file_is_refused_before_anything_runs(place, launch, text, scale, wanted):
    """Else a night is lost to a typing error, --scale does nothing, or the error does not tell what to do."""
    Path("silent.py").write_text("import sys; sys.exit('I am no trainer')")
    done = launch(sweep_file(text), *scale)
    assert done.returncode == 2 and all(part in done.stderr for part in wanted), done.stderr
    assert "Traceback" not in done.stderr and not starts() and not list(place.glob("logs/*"))


def test_a_scale_may_have_arms_of_its_own(place):
    """Else arms that differ in a size, such as that of the batch, can only run at one scale."""
    text = TWO_ARMS + '[[scale.tiny.arms]]\ntag = "base"\nCOOLDOWN_FRAC = 0.2\n'
    text += '[[scale.tiny.arms]]\ntag = "spectral_lr_9"\nseeds = [7]\nSPECTRAL_LR_MUL = 9\n'
    assert [arm.tag for arm in read_sweep(sweep_file(text), None).arms] == ["base", "spectral_lr_0.1"]
    small = read_sweep(sweep_file(text), "tiny").arms
    assert [(arm.tag, arm.script, arm.seeds) for arm in small] == [
        ("base", "ord.py", [1, 2]),
        ("spectral_lr_9", "ord.py", [7]),
    ]
    assert small[0].settings["COOLDOWN_FRAC"] == 0.2


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("COOLDOWN_FRAC", "0.3", r"COOLDOWN_FRAC='0.3' is set in the environment.*unset COOLDOWN_FRAC"),
        ("TARGET_LOSS", "3", "TARGET_LOSS='3' is set in the environment"),
        ("SEED", "3", "SEED='3'.*seeds"),
        ("DEVICE", "tpu", "DEVICE='tpu'"),
    ],
)
def test_the_environment_does_not_say_what_to_run(place, monkeypatch, name, value, wanted):
    """Else a variable exported days ago changes every run, and no file says so."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=wanted):
        read_sweep(sweep_file(TWO_ARMS))


@pytest.mark.parametrize("name, value", [("DEVICE", "cpu"), ("DATA_PATH", "/data"), ("COMPILE", "1")])
def test_the_environment_may_say_where_to_run(place, monkeypatch, name, value):
    """Else a sweep file must be changed on every machine."""
    monkeypatch.setenv(name, value)
    sweep = read_sweep(sweep_file(TWO_ARMS))
    assert all(arm.settings[name] == value for arm in sweep.arms)
    assert any(f"{name}={value}" in note for note in sweep.notes)


def hashes(env):
    text = TWO_ARMS.replace("LR_MULS = [1, 1.52]", env)
    return [arm.settings_hash for arm in read_sweep(sweep_file(text)).arms]


@pytest.mark.parametrize(
    "env",
    [
        *("COOLDOWN_FRAC = 0.55", 'COOLDOWN_FRAC = "0.55"', "BATCH_SIZES = [128]", 'BATCH_SIZES = "128"'),
        *('DATA_PATH = "/else"', "TARGET_LOSS = 3.28", "TARGET_LOSS = 3"),
    ],
)
def test_hash_is_the_same_for_the_same_training(place, env):
    """Else runs are repeated for the way a number is written, a moved folder, or what is only recorded."""
    assert hashes(env) == hashes("")


@pytest.mark.parametrize(
    "env", ["COOLDOWN_FRAC = 0.5500001", "BATCH_SIZES = [128, 128]", "DISABLE_FP8 = true"]
)
def test_hash_tells_trainings_apart(place, env):
    """Else changed settings are skipped as done."""
    plain = hashes("")
    assert plain[0] != plain[1], "two scripts are two trainings"
    assert not set(hashes(env)) & set(plain)


def test_a_preset_counts_with_its_defaults(place, monkeypatch):
    """Else a default that is written out is another training, or `auto` is not the preset it stands for."""
    assert (
        hashes('MODEL = "tiny"') == hashes('MODEL = "tiny"\nCOOLDOWN_FRAC = 0.5') == hashes('MODEL = "auto"')
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    devices.visible_gpus.cache_clear()
    resolve = read_trainer("base.py").resolve
    assert resolve({"MODEL": "auto"})["MODEL"] == "gpt2-small"
    assert resolve({"MODEL": "auto", "DEVICE": "cpu"})["COOLDOWN_FRAC"] == 0.5


@pytest.fixture(scope="module")
def real_trainer():
    sys.path.insert(0, str(ROOT))
    import train_gpt

    return train_gpt, read_trainer("train_gpt.py")


PLAUSIBLE = st.one_of(
    st.integers(-3, 10**6),
    st.floats(-2, 2e6),
    st.sampled_from(
        [0.55, 1e-08, 1.2345678901234567, float("inf"), True, False, "", "0", "1", "0.1", "1e3", "1,2,3,4"]
    ),
    st.sampled_from(["auto", "linear", "cuda", "cpu", " 3 ", "true", "x", "nan", "[1, 2]", "131072", "sdpa"]),
    st.lists(st.one_of(st.integers(-1, 10**6), st.floats(0, 10)), max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@example(data=None)
def test_launcher_and_trainer_agree_on_values(real_trainer, data):
    """Else the launcher refuses what the trainer takes, passes what it refuses, or loses digits."""
    train_gpt, trainer = real_trainer
    fields = {
        f.name.upper(): f
        for c in (train_gpt.Settings, train_gpt.OptimizerSettings)
        for f in train_gpt.dataclasses.fields(c)
    }
    assert set(fields) == set(trainer.settings)
    if data is None:
        return
    name = data.draw(st.sampled_from(sorted(fields)))
    value = data.draw(PLAUSIBLE)
    try:
        ours = typed(name, value, trainer.settings[name], "[env]")
    except ValueError:
        ours = None
    text = env_text(value)
    try:
        theirs = train_gpt.parse_value(name, text, fields[name])
    except train_gpt.SettingsError:
        theirs = None
    if ours is not None:  # what we pass on is taken as what we meant
        assert train_gpt.parse_value(name, env_text(ours), fields[name]) == (
            tuple(ours) if isinstance(ours, list) else ours
        )
    elif isinstance(value, str):  # what is text already is judged alike
        assert theirs is None


# ------------------------------------------------------------------------------------------------
# What is done and what is left
# ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=st.lists(
        st.tuples(
            st.integers(0, 3),  # which run
            st.sampled_from(["finished", "diverged", "crashed", "hung", "stopped", "planned"]),
            st.booleans(),  # is its log still there
            st.sampled_from(["same", "settings", "source"]),
            st.booleans(),  # in `earlier` rather than `runs`
        ),
        max_size=8,
    )
)
def test_only_what_is_missing_or_changed_is_planned(place, history):
    """Else a relaunch repeats finished runs, or skips one whose settings, source or log have changed."""
    sweep = read_sweep(sweep_file(TWO_ARMS), None)
    for old in Path("logs").glob("*") if Path("logs").exists() else []:
        old.unlink()
    Path("logs").mkdir(exist_ok=True)
    done, records = set(), {"runs": [], "earlier": []}
    for number, (which, state, has_log, change, earlier) in enumerate(history):
        run = sweep.runs()[which]
        run.run_id, run.state, run.log = f"old{number}", state, f"logs/old{number}.txt"
        run.settings_hash = run.settings_hash if change != "settings" else "0" * 8
        run.source_hash = run.source_hash if change != "source" else "0" * 16
        if has_log:
            Path(run.log).write_text("x")
        if state in ("finished", "diverged") and has_log and change == "same":
            done.add(which)
        records["earlier" if earlier else "runs"].append(dataclasses.asdict(run))
    manifest_path("trial").write_text(json.dumps({"created": "then", **records}))
    found, why = planned(sweep)
    assert set(why) == {0, 1, 2, 3} - done
    assert [(run.tag, run.seed) for run in found.runs] == [(run.tag, run.seed) for run in sweep.runs()]
    assert all(Path(found.runs[i].log).exists() for i in done)
    assert len({run.run_id for run in found.runs}) == 4
    started = {f"old{n}" for n, (_, state, *_) in enumerate(history) if state != "planned"}
    assert {run.run_id for run in found.earlier} == started - {run.run_id for run in found.runs}, (
        "no attempt is lost"
    )


def test_dry_run_says_all_and_writes_nothing(place, launch):
    """Else a look at the plan changes it."""
    text = sweep_file(TWO_ARMS)
    before = sorted(place.rglob("*"))
    done = launch(text, "--dry-run")
    assert done.returncode == 0 and not done.stderr
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in str(path)) == before
    for part in (
        "2 arms, 4 runs, 4 to run",
        "base.py seeds 1,2",
        "SPECTRAL_LR_MUL=0.1",
        "LR_MULS=1,1.52",
        "unknown",
    ):
        assert part in done.stdout, done.stdout


def test_expected_time_comes_from_logs_of_the_same_kind(place, monkeypatch):
    """Else the plan promises a GPU's time on a laptop, or that of another batch size."""
    Path("logs").mkdir()
    monkeypatch.setattr(expected_time, "device_name", lambda gpu: "laptop")
    monkeypatch.setattr(devices, "usable_cores", lambda: (0, 1))
    monkeypatch.setattr(expected_time, "usable_cores", lambda: (0, 1))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep = read_sweep(sweep_file(TWO_ARMS.replace("LR_MULS = [1, 1.52]", 'MODEL = "tiny"')))
    slots, nproc = devices.share_out(1, 0, use_gpus=True)

    def said():
        return expected_time.expected_time(sweep.runs(), slots, nproc)

    assert "unknown" in said()

    def log(name, ms, device="laptop", threads=2, batch=128, end="event:finished"):
        text = make_log(
            name, settings={"model": "tiny", "batch_sizes": [batch]}, num_steps=100, ms=ms, end_event=end
        )
        started = f"event:started device:{device} world_size:1 threads:{threads}"
        Path(f"logs/{name}.txt").write_text(re.sub("^event:started .*", started, text, flags=re.M))

    log("other-device", 9e6, device="H100")
    log("other-threads", 9e6, threads=1)
    log("other-batch", 9e6, batch=256)
    log("unfinished", 9e6, end="")
    assert "unknown" in said()
    log("one", 10_000)
    log("two", 20_000)
    assert "about 4 min 00 s (60.0 s a run, from 2 earlier logs)" in said()
    run = Run("one", "x", "base.py", 1, {}, "", "", log="logs/one.txt")
    run.started, run.ended = "2026-02-06T10:00:00+00:00", "2026-02-06T10:20:00+00:00"
    Manifest(manifest_path("x"), runs=[run]).save()  # 1,000 s of training took 1,200
    assert "about 10 min 40 s (2 min 40 s a run" in said()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the runs would heed
    assert "from 1 earlier log)" in said()


# ------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------


def test_a_sweep_runs_once_and_only_once(place, launch, monkeypatch):
    """Else the tools that read the manifest do not find the runs, or a second launch repeats them."""
    for name in ("RANK", "WORLD_SIZE"):  # of a torchrun around us: a run that heeds them waits for others
        monkeypatch.setenv(name, "1")
    done = launch(sweep_file(TWO_ARMS))
    assert done.returncode == 0, done.stdout + done.stderr
    first = manifest()
    assert {key: first[key] for key in ("sweep", "file", "scale", "control")} == {
        "sweep": "trial",
        "file": "trial.toml",
        "scale": None,
        "control": "base",
    }
    for run in first["runs"]:
        (log,) = read_log(run["log"])
        assert (log.run_id, log.seed, log.state) == (run["run_id"], run["seed"], "finished")
        assert run["state"] == "finished" and run["exit_code"] == 0 and run["started"] <= run["ended"]
        assert Path(run["log"]).with_suffix(".out").read_text() == f"console of {run['run_id']}\n"
        given = {name: value for name, value in log.config["settings"].items() if value is not None}
        assert given.pop("SPECTRAL_LR_MUL", None) == ("0.1" if run["script"] == "ord.py" else None)
        assert given == {"LR_MULS": "1.0,1.52", "SEED": str(run["seed"]), "RUN_ID": run["run_id"]}
    again = launch("trial.toml")
    assert again.returncode == 0 and "0 to run" in again.stdout
    assert len(starts()) == 4 and manifest() == first


TROUBLE = """
script = "base.py"
seeds = [1]
diverged_above = 50
[[arms]]
tag = "crash"
BEHAVIOUR = "crash, torn"
[[arms]]
tag = "refuse"
BEHAVIOUR = "refuse"
[[arms]]
tag = "diverge"
BEHAVIOUR = "diverge"
[[arms]]
tag = "spike"
BEHAVIOUR = "spike"
[[arms]]
tag = "family"
BEHAVIOUR = "family, loose"
[[arms]]
tag = "good"
"""


def test_trouble_is_recorded_and_the_rest_goes_on(place, launch):
    """Else one bad run ends the night, or readers wait for a log that is over."""
    at_once = str(min(2, len(devices.usable_cores())))
    code, output = launched(sweep_file(TROUBLE), "--parallel", at_once, grace=0.3)
    assert code == 1, output
    runs = {run["tag"]: run for run in manifest()["runs"]}
    assert {tag: run["state"] for tag, run in runs.items()} == {
        "crash": "crashed",
        "refuse": "crashed",
        "diverge": "diverged",
        "spike": "diverged",
        "family": "finished",
        "good": "finished",
    }
    assert (runs["refuse"]["exit_code"], runs["diverge"]["exit_code"]) == (2, 3)
    reasons = {"crash": "out of memory", "refuse": "multiple of 8", "spike": "99, above"}
    for tag, said in reasons.items():
        assert said in runs[tag]["reason"] and tag in output
    logs = {tag: read_log(run["log"])[0].state for tag, run in runs.items() if tag != "refuse"}
    assert logs == {
        "crash": "crashed",
        "diverge": "diverged",
        "spike": "diverged",
        "family": "finished",
        "good": "finished",
    }
    text = Path(runs["crash"]["log"]).read_text()
    assert "\nevent:crashed reason:" in text, "not at the end of half a line"
    assert not Path(runs["refuse"]["log"]).exists()
    assert not alive(place), "even what a finished run left behind is gone"

    Path("healed").touch()  # what crashed is tried again; what diverged would diverge again
    assert launch("trial.toml").returncode == 1, "two of the runs have not finished"
    assert [run["tag"] for run in manifest()["runs"] if run["state"] != "finished"] == ["diverge", "spike"]
    assert len(starts()) == 5 + 2, "refuse did not get so far as to say that it started"
    assert [run["state"] for run in manifest()["earlier"]] == ["crashed", "crashed"]
    sweep_file(TROUBLE.replace("diverged_above = 50", "diverged_above = 500"))
    assert launch("trial.toml").returncode == 1
    assert len(starts()) == 8, "a higher threshold tries `spike` again"


def test_a_hung_run_is_stopped_and_tried_again(place, launch, monkeypatch):
    """Else one run that hangs keeps its GPU until somebody looks."""
    look_after = launcher.Launcher.look_after

    def once_it_hangs(self, job):
        self.hang_s = 0.6 if starts("stepped") else 0
        look_after(self, job)

    monkeypatch.setattr(launcher.Launcher, "look_after", once_it_hangs)
    monkeypatch.setattr(processes, "GRACE_S", 0.3)
    text = 'script = "base.py"\nseeds = [1]\n[env]\nBEHAVIOUR = "hang, stubborn"\n'
    assert launch(sweep_file(text)).returncode == 1
    (run,) = manifest()["runs"]
    assert run["state"] == "hung" and run["reason"] == "no new log line for 0.01 minutes"
    assert read_log(run["log"])[0].state == "crashed"
    Path("healed").touch()
    assert launch("trial.toml").returncode == 0 and len(starts()) == 2
    assert [run["state"] for run in manifest()["earlier"]] == ["hung"]


def test_descendants_are_found_without_environment_or_group(place):
    """Else a helper that was started with a clean environment goes on training after Ctrl-C."""
    code = "import time; time.sleep(60)"
    for _ in range(2):
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], env={{}})"
    process = subprocess.Popen([sys.executable, "-c", code], env={}, start_new_session=True)
    wait_for(lambda: len(alive(place)) == 3)
    found = processes.processes_of(set(), [process.pid])
    assert found == alive(place)
    assert processes.stop_processes(lambda: processes.processes_of(set(), found & alive(place)))
    process.wait()


def test_orphans_that_end_are_buried(place):
    """Else a launcher that runs for days fills the system's table of processes with zombies."""
    code = """
import subprocess, sys, time
import psutil
from analysis import processes
processes.adopt_orphans()
child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'pass'], stdout=subprocess.DEVNULL)"
subprocess.run([sys.executable, "-c", child])
wait = lambda: [process.status() for process in psutil.Process().children()]
while wait() != ["zombie"]:
    time.sleep(0.01)
processes.reap_orphans()
sys.exit(len(wait()))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=PATIENCE_S).returncode == 0


def test_changed_settings_and_changed_source_run_again(place, launch):
    """Else results of another training are shown under the new settings."""
    assert launch(sweep_file(TWO_ARMS)).returncode == 0
    sweep_file(TWO_ARMS.replace("SPECTRAL_LR_MUL = 0.1", "SPECTRAL_LR_MUL = 0.2"))
    done = launch("trial.toml")
    assert "2 to run" in done.stdout and "2 (settings changed)" in done.stdout and len(starts()) == 6
    sweep_file(TWO_ARMS)  # what was done before is still done
    assert "0 to run" in launch("trial.toml").stdout and len(starts()) == 6
    Path(manifest()["runs"][0]["log"]).unlink()
    assert "1 (log is gone)" in launch("trial.toml").stdout and len(starts()) == 7
    Path("base.py").write_text(STAND_IN + "# a change\n")
    read_trainer.cache_clear()
    done = launch("trial.toml")
    read_trainer.cache_clear()
    assert "2 (source changed)" in done.stdout and len(starts()) == 9
    assert {run["tag"] for run in manifest()["runs"][0::2]} == {"base"}


def test_what_was_recorded_otherwise_is_named_and_not_run_again(place, launch):
    """Else a night is repeated for a target line in a plot, or nobody learns that the log has the old one."""
    assert launch(sweep_file(TWO_ARMS)).returncode == 0
    before = manifest()["runs"]
    sweep_file(TWO_ARMS.replace("[env]", "[env]\nTARGET_LOSS = 3"))
    done = launch("trial.toml")
    assert done.returncode == 0 and "0 to run" in done.stdout and len(starts()) == 4
    (line,) = [line for line in done.stdout.splitlines() if "TARGET_LOSS=3.28 (now 3)" in line]
    assert all(run["log"] in line for run in before) and "delete a log to run it again" in line
    assert manifest()["runs"] == before, "the manifest says what the logs were recorded with"


HANGING = TWO_ARMS.replace("LR_MULS = [1, 1.52]", 'BEHAVIOUR = "hang"')


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_killed_in_the_middle_completes_without_repeating(place, launch, number):
    """Else an interruption costs the runs done so far, or a run goes on behind the next launch's back."""
    text = TWO_ARMS.replace("SPECTRAL_LR_MUL = 0.1", 'SPECTRAL_LR_MUL = 0.1\nBEHAVIOUR = "hang"')
    process = launch_process(sweep_file(text), grace=0.3)
    wait_for(lambda: len(starts("stepped")) == 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    if number != signal.SIGKILL:
        assert not alive(place), "no process is left behind"
        assert list(states().values()) == ["finished", "stopped", "planned", "planned"]
    wait_for(lambda: not alive(place))  # SIGKILL leaves us no time; the kernel tells our children
    finished = [line["run_id"] for line in starts("end")]
    assert len(finished) == 1

    Path("healed").touch()
    done = launch("trial.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(states().values()) == {"finished"} and not alive(place)
    assert len(starts()) == 5, "one run was interrupted, none that had finished was repeated"
    assert finished[0] in {run["run_id"] for run in manifest()["runs"]}
    assert sorted(line["run_id"] for line in starts("end")) == sorted(
        run["run_id"] for run in manifest()["runs"]
    )
    (stopped,) = manifest()["earlier"]
    assert stopped["state"] == "stopped" and read_log(stopped["log"])[0].state == "stopped"


def test_a_sweep_and_a_monitor_on_the_same_logs(place):
    """Else who watches disturbs what is watched, or is shown half of a line that is being written."""
    text = TWO_ARMS.replace("[env]", '[env]\nBEHAVIOUR = "gate"')
    process, monitor, seen = launch_process(sweep_file(text)), Monitor(Path("logs")), set()
    while process.poll() is None:
        for row in monitor.poll():
            begun = row.num_steps is not None  # else its log is there, but has no whole line yet
            assert row.state in (("running", "finished") if begun else ("running", "unknown")), row
            seen.add(row.state)
        if "running" in seen:
            Path("go").touch()
        time.sleep(0.01)
    output, _ = process.communicate()
    assert process.returncode == 0 and len(starts()) == 4 and "running" in seen, output
    assert [row.state for row in monitor.poll()] == ["finished"] * 4
    assert set(states().values()) == {"finished"}


def test_ctrl_c_when_nobody_reads_our_output_any_more(place):
    """Else `| tee` or a lost ssh connection makes the launcher fail before it has stopped its runs."""
    process = launch_process(sweep_file(HANGING), grace=0.3)
    wait_for(lambda: len(starts("stepped")) == 1)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE_S) == 130
    assert not alive(place) and states()["base", 1] == "stopped"


def test_what_outlives_a_killed_launcher_is_stopped_by_the_next(place, launch, monkeypatch):
    """Else two processes train on the same GPU, one of them unseen."""
    process = launch_process(sweep_file(HANGING.replace("hang", "stubborn, family, hang")))
    wait_for(lambda: len(starts()) == 1 and states()["base", 1] == "running")
    process.kill()
    process.communicate()
    orphan = starts()[0]["pid"]
    assert orphan in alive(place), "it ignores the signal that tells it of its parent's death"
    looked = launch("trial.toml", "--dry-run")
    assert "running already" in looked.stdout and orphan in alive(place), "a dry run stops nothing"
    Path("healed").touch()
    monkeypatch.setattr(processes, "GRACE_S", 0.3)
    done = launch("trial.toml")
    assert done.returncode == 0 and "left over" in done.stdout, done.stdout + done.stderr
    assert not alive(place) and set(states().values()) == {"finished"}


def test_a_run_that_finished_after_its_launcher_died_counts(place, launch):
    """Else eight GPUs repeat an hour that was already done."""
    text = 'script = "base.py"\nseeds = [1]\n[env]\nBEHAVIOUR = "stubborn"\nSTEP_SECONDS = 0.1\n'
    process = launch_process(sweep_file(text))
    wait_for(lambda: len(starts()) == 1)
    process.kill()
    process.communicate()
    wait_for(lambda: len(starts("end")) == 1 and not alive(place))
    done = launch("trial.toml")
    assert done.returncode == 0 and "0 to run" in done.stdout and len(starts()) == 1
    assert states() == {("all", 1): "finished"}


def test_two_launchers_of_one_sweep_do_not_meet(place, launch):
    """Else every run is made twice and the manifests overwrite each other."""
    sweep = read_sweep(sweep_file(TWO_ARMS))
    with launcher.locked(sweep):
        second = launch("trial.toml")
    assert second.returncode == 2 and "another launcher" in second.stderr and not starts()
    assert launch("trial.toml").returncode == 0, "the first has ended"


def overlap(starts, ends):
    """The most runs that were running at once."""
    events = sorted([(line["time"], 1) for line in starts] + [(line["time"], -1) for line in ends])
    return max(np.cumsum([change for _, change in events]))


def test_parallel_runs_have_gpus_of_their_own(place, launch, monkeypatch):
    """Else two runs share a GPU, and neither their memory nor their times are their own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-abc")
    devices.visible_gpus.cache_clear()
    text = TWO_ARMS.replace("[1, 2]", "[1, 2, 3]").replace("[env]", '[env]\nBEHAVIOUR = "meet at once"')
    done = launch(sweep_file(text), "--parallel", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["gpus"] for line in starts()} == {"3", "5"} and len(starts()) == 6
    assert overlap(starts(), starts("end")) == 2
    for gpu in "35":
        mine = [[line for line in starts(what) if line["gpus"] == gpu] for what in ("start", "end")]
        assert overlap(*mine) == 1
    refused = launch("trial.toml", "--parallel", "2", "--nproc-per-run", "2")
    assert refused.returncode == 2 and "want 4 GPUs, found 3" in refused.stderr


@pytest.mark.skipif(len(devices.usable_cores()) < 2, reason="needs two cores")
def test_parallel_runs_have_cores_of_their_own(place, launch):
    """Else two runs share their cores, and their times say nothing."""
    text = TWO_ARMS.replace("[1, 2]", "[4]").replace("[env]", '[env]\nBEHAVIOUR = "meet at once"')
    assert launch(sweep_file(text), "--parallel", "2").returncode == 0
    a, b = (set(line["cores"]) for line in starts())
    assert a and b and not a & b
    refused = launch("trial.toml", "--parallel", "1000")
    assert refused.returncode == 2 and "1000 runs at a time want 1000 CPU cores" in refused.stderr


@pytest.mark.skipif(len(devices.usable_cores()) < 2, reason="needs two cores")
def test_the_first_run_compiles_alone(place, launch):
    """Else all runs that start together compile the same code, each for itself."""
    text = """
script = "base.py"
seeds = [1, 2, 3]
[env]
COMPILE = "1"
STEP_SECONDS = 0.3
BEHAVIOUR = "meet after a step"
"""
    assert launch(sweep_file(text), "--parallel", "2").returncode == 0
    assert starts()[1]["time"] > starts("stepped")[0]["time"], (
        "it waits for a step, which needs compiled code"
    )
    assert starts()[1]["time"] < starts("end")[0]["time"], "but not longer"
    Path("starts.jsonl").unlink()
    text = text.replace("[1, 2, 3]", "[4, 5]").replace("STEP_SECONDS = 0.3", "COOLDOWN_FRAC = 0.5")
    Path("meet at once").touch()
    assert launch(sweep_file(text, "warm"), "--parallel", "2").returncode == 0
    assert starts()[1]["time"] < starts("stepped")[0]["time"], "the cache is warm: nobody waits for a step"


def test_torchrun_workers_are_stopped_and_parallel_ones_do_not_meet(place):
    """Else Ctrl-C leaves workers training, or the ranks of two runs talk to each other."""
    parallel = min(2, len(devices.usable_cores()))
    text = TWO_ARMS.replace("[1, 2]", "[1]").replace('"base.py"', '"base.py"\nNUM_SCHEDULED_ITERATIONS = 2')
    text = text.replace("SPECTRAL_LR_MUL = 0.1", 'SPECTRAL_LR_MUL = 0.1\nBEHAVIOUR = "hang"')
    process = launch_process(sweep_file(text), "--nproc-per-run", "2", "--parallel", str(parallel))
    wait_for(lambda: len(starts("stepped")) == 4 and states()["base", 1] == "finished")
    assert sorted((line["rank"], line["world_size"]) for line in starts()) == [(0, "2")] * 2 + [(1, "2")] * 2
    assert len({(line["run_id"], line["port"]) for line in starts()}) == 2
    if parallel == 2:
        assert len({line["port"] for line in starts()}) == 2
    workers = [line["pid"] for line in starts() if line["run_id"] != starts("end")[0]["run_id"]]
    assert len({os.getsid(pid) for pid in workers}) == 2, "the premise: workers are in sessions of their own"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and not alive(place), output
    assert states() == {("base", 1): "finished", ("spectral_lr_0.1", 1): "stopped"}


def test_live_table_on_a_terminal(place):
    """Else the launcher works where nobody looks, and fails on the screen where somebody does."""
    text = TWO_ARMS.replace("[1, 2]", "[1]").replace("[env]", '[env]\nBEHAVIOUR = "gate"')
    ours, theirs = os.openpty()
    env = {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = launch_process(sweep_file(text), env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other side has closed
        while new := os.read(ours, 4096):
            shown += new
            if re.search(rb"base +1 +2/4", shown):
                Path("go").touch()
    os.close(ours)
    assert process.wait(timeout=PATIENCE_S) == 0, shown
    for part in (rb"base +1 +2/4 +2\.[0-9]+ +[0-9.]+ m?s +CPU", b"1 to come", b"2 finished"):
        assert re.search(part, shown), (part, shown)


def test_slurm_array_runs_what_the_launcher_would(place, launch):
    """Else a cluster trains something else, or the next launch repeats it."""
    text = TWO_ARMS.replace("LR_MULS = [1, 1.52]", """DATA_PATH = "a b'c $HOME" """)
    done = launch(sweep_file(text), "--slurm", "--parallel", "3")
    assert done.returncode == 0 and "sbatch logs/trial.slurm.sh" in done.stdout and not starts()
    script = Path("logs/trial.slurm.sh").read_text()
    assert "#SBATCH --array=0-3%3\n" in script and "#SBATCH --gpus-per-node=1\n" in script
    assert set(states().values()) == {"submitted"}

    def task(number):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number), "COOLDOWN_FRAC": "0.1", "RANK": "1"}
        return subprocess.run(["bash", "logs/trial.slurm.sh"], env=env, capture_output=True, text=True)

    for number in (0, 1, 2):
        assert task(number).returncode == 0
    assert task(4).returncode == 2
    for run in manifest()["runs"][:3]:
        log = read_log(run["log"])[0]
        assert log.config["settings"]["DATA_PATH"] == "a b'c $HOME" and log.seed == run["seed"]
        assert log.config["settings"]["COOLDOWN_FRAC"] is None, "a setting exported where sbatch was called"
        assert Path(run["log"]).with_suffix(".out").exists()
    done = launch("trial.toml")  # here or there: it is one sweep
    assert done.returncode == 0 and "1 to run" in done.stdout and len(starts()) == 4
    assert set(states().values()) == {"finished"}


def test_missing_data_is_found_before_the_first_run(place, real_trainer, launch):
    """Else every run of the sweep starts, finds no data and fails, one after the other."""
    text = 'script = "train_gpt.py"\n[env]\nMODEL = "tiny"\nDEVICE = "cpu"\nDATA_PATH = "nowhere"\n'
    done = launch(sweep_file(text))
    assert done.returncode == 2 and "matches no file under DATA_PATH='nowhere'" in done.stderr
    assert not Path("logs").exists()
    done = launch("trial.toml", "--dry-run")
    assert done.returncode == 0 and "before it can run" in done.stdout


def test_a_damaged_manifest_is_not_overwritten(place, launch):
    """Else the record of a sweep is lost with one bad disk block."""
    Path("logs").mkdir()
    Path("logs/trial.sweep.json").write_text('{"runs": [')
    done = launch(sweep_file(TWO_ARMS))
    assert done.returncode == 2 and "move it away" in done.stderr and not starts()
    assert Path("logs/trial.sweep.json").read_text() == '{"runs": ['


def test_manifest_is_whole_at_any_moment(place, monkeypatch):
    """Else whoever reads it while it is written, or after a crash then, gets half of it."""
    found, _ = planned(read_sweep(sweep_file(TWO_ARMS)))
    found.save()
    whole = found.path.read_text()
    found.runs[0].state = "running"

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        found.save()
    assert found.path.read_text() == whole and list(found.path.parent.iterdir()) == [found.path]


# ------------------------------------------------------------------------------------------------
# The sweeps of this project, and the real trainers
# ------------------------------------------------------------------------------------------------

SWEEPS = sorted((ROOT / "sweeps").glob("*.toml"))


def test_every_sweep_here_is_accepted_by_its_trainers(place, real_trainer, monkeypatch):
    """Else an experiment of this project fails at its first run, or has no small version."""
    import train_gpt_muon_ord

    modules = {"train_gpt.py": real_trainer[0], "train_gpt_muon_ord.py": train_gpt_muon_ord}
    assert {"smoke", "spectral_lr", "muon_decay", "residual_scale"} <= {path.stem for path in SWEEPS}
    for path in SWEEPS:
        for scale in (None, "tiny"):
            sweep = read_sweep(str(path), scale)
            for arm in sweep.arms:
                env = {name: env_text(value) for name, value in arm.settings.items()}
                modules[arm.script].read_settings({"DEVICE": "cpu", **env, "SEED": "1", "RUN_ID": "x"})
            assert len(sweep.runs()) < (150 if scale else 400), f"{path.name} at scale {scale}"


REAL = """
script = "train_gpt_muon_ord.py"
seeds = [3]
control = "baseline_std_0"
[env]
MODEL = "tiny"
DEVICE = "cpu"
TRAIN_FILES = "t_train_*.bin"
VAL_FILES = "t_val_*.bin"
DATA_PATH = "{place}"
BATCH_SIZES = [256, 256, 256, 256]
NUM_SCHEDULED_ITERATIONS = {steps}
MAX_DOC_TOKENS = 64
VAL_TOKENS = 2048
VAL_BATCH_TOKENS = 2048
[[arms]]
tag = "baseline_std_0"
script = "train_gpt.py"
"""


def real_sweep(place, steps, more=""):
    write_shard(place / "t_train_0.bin", make_tokens([100] * 200, seed=1))
    write_shard(place / "t_val_0.bin", make_tokens([100] * 90, seed=2))
    return REAL.format(place=place, steps=steps) + more


def test_an_interrupted_run_goes_on_from_its_checkpoint(place, launch):
    """Else stopping a sweep of long runs throws away hours, though the trainer has saved them."""
    process = launch_process(sweep_file(real_sweep(place, 60)), grace=30)
    wait_for(lambda: any("step:3/" in log.read_text() for log in Path("logs").glob("*.txt")))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    (log,) = Path("logs").glob("*.txt")
    assert list(states().values()) == ["stopped"] and list(log.with_suffix("").glob("step_*.pt")), output
    done = launch("trial.toml")
    assert done.returncode == 0 and "goes on from its checkpoint" in done.stdout, done.stdout + done.stderr
    (run,) = read_log(log)
    assert run.state == "finished" and run.last_step == 60 and "event:resumed" in log.read_text()
    assert list(Path("logs").glob("*.txt")) == [log] and not manifest()["earlier"]
    assert not (log.with_suffix("") / "model.safetensors").exists(), "a sweep keeps no models unless asked"


def test_a_sweep_of_the_real_trainers(place, launch):
    """Else the launcher and the trainers do not fit together: names, settings, exit codes or logs."""
    text = real_sweep(
        place,
        3,
        """
[[arms]]
tag = "spectral_lr_0"
SPECTRAL_LR_MUL = 0
SPECTRAL_RHO_MODE = "row"
[[arms]]
tag = "refused"
SPECTRAL_VARIANCE = true
SPECTRAL_SCALE = "unit"
""",
    )
    done = launch(sweep_file(text))
    assert done.returncode == 1, done.stdout + done.stderr
    runs = {run["tag"]: run for run in manifest()["runs"]}
    assert {tag: run["state"] for tag, run in runs.items()} == {
        "baseline_std_0": "finished",
        "spectral_lr_0": "finished",
        "refused": "crashed",
    }
    assert runs["refused"]["exit_code"] == 2 and "SPECTRAL_VARIANCE" in runs["refused"]["reason"]
    base, ord_run = (read_log(runs[tag]["log"])[0] for tag in ("baseline_std_0", "spectral_lr_0"))
    assert (base.seed, base.last_step, base.num_steps) == (3, 3, 3)
    assert base.source_hash == runs["baseline_std_0"]["source_hash"], "the trainer says what it logs"
    np.testing.assert_allclose(base.val.loss, ord_run.val.loss)  # both got seed, data and batch from the file
    done = launch("trial.toml", "--dry-run")
    assert done.returncode == 0 and "1 to run" in done.stdout and "expected time about" in done.stdout, (
        done.stdout
    )
