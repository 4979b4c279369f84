"""benchmarks/first_hour.py without a GPU: a dry run of every part; results survive whatever ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import first_hour  # noqa: E402
import report  # noqa: E402
from report import Report, row  # noqa: E402

from runtime.supervise import process_state  # noqa: E402

# ---------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Folder for files that first_hour.py leaves outside its results; restores the environment afterwards."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(first_hour, "SCRATCH", tmp_path / "scratch")
    return tmp_path


def dry_run(part: str, folder: Path, *more: str) -> tuple[int, dict]:
    code = first_hour.main([part, "--dry-run", "--out", str(folder / "out"), *more])
    return code, json.loads((folder / "out" / f"{part}.json").read_text())


def values(step: dict) -> dict[str, float]:
    assert step["status"] == "ok", step
    return {r["what"]: r["value"] for r in step["rows"]}


BROKEN = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]
import interpreter
import kernel_references
right = kernel_references.mlp
kernel_references.mlp = lambda *x: 1.05 * right(*x)
import first_hour
sys.exit(first_hour.main(sys.argv[1:]))
"""


def test_part_a_checks_and_times_all_kernels_and_names_the_wrong_one(tmp_path):
    """One reference is wrong: its checks fail, all others pass, and the part runs to its end."""
    paths = str(ROOT / "benchmarks"), str(ROOT / "tests/offgpu")
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, *paths, "a", "--dry-run", "--out", str(tmp_path / "out")],
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    steps = json.loads((tmp_path / "out/a.json").read_text())
    failed = {name for name, step in steps.items() if step["status"] != "ok"}
    assert failed == {f"check test_mlp[130-64-256-sm_{sm}]" for sm in (80, 89, 90)}
    assert "assert" in steps["check test_mlp[130-64-256-sm_90]"]["error"]
    checked = {name.partition("_")[2].partition("[")[0] for name in steps if name.startswith("check")}
    assert {"mlp", "quantize", "softcapped_loss", "head_loss", "attention", "row_scales"} <= checked
    timed = [name for name in steps if name.startswith("time")]
    assert len(timed) == len(first_hour.TIMED) + 2  # attention in three stages
    assert all(r["value"] > 0 for name in timed for r in steps[name]["rows"])
    sums = [r for name in timed for r in steps[name]["rows"] if r["what"] == "a step"]
    predicted = [r for r in sums if r["beside"] is not None]
    assert len(sums) == 10 and len(predicted) == 8  # not gates, nor updates, which would be Adam's, too
    assert "FAILED" in done.stdout and f"{len(steps) - 3} ok, 3 failed" in done.stdout


def test_part_b_times_stage_1_and_the_twins(scratch, capsys):
    code, steps = dry_run("b", scratch)
    assert code == 0 and len(steps) == 5
    assert values(steps["compile, stage 1"])["fast forms"] == 2
    step = values(steps["steps, stage 1"])
    parts = "data", "forward", "backward", "communication", "optimizer", "other"
    assert step.keys() >= set(parts) and step["tokens/s"] == pytest.approx(128_000 / step["step"])
    (predicted,) = (r["beside"] for r in steps["steps, stage 1"]["rows"] if r["what"] == "step")
    assert 0 < predicted < 100
    profile = values(steps["profile, stage 1"])
    assert 0 < profile["a step alone: the host's part"] <= profile["a step alone"]
    assert profile["all kernels"] > profile["aten::mm"] > 0
    twins = values(steps["twins, stage 1"])
    ratio = twins["step of train_gpt_muon_ord"] / twins["step of train_gpt"]
    assert ratio == pytest.approx(twins["step, ORD over NorMuon"], rel=0.5)
    assert "predicted" in capsys.readouterr().out
    (scratch / "out").rename(scratch / "given")
    again, same = dry_run("b", scratch, "--given", str(scratch / "given"))
    assert again == 0 and same == steps, "nothing is measured twice"


def test_part_c_times_stages_2_and_3(scratch):
    code, steps = dry_run("c", scratch)
    assert code == 0 and len(steps) == 7
    for stage, tokens in ((2, 256_000), (3, 384_000)):
        step = values(steps[f"steps, stage {stage}"])
        assert step["tokens/s"] == pytest.approx(tokens / step["step"])


def test_a_stage_is_entered_with_warm_steps():
    """Fails if a continued call, which skips compile(), compiles while it times or profiles."""
    calls = []

    def note(name):
        return lambda *args, **kwargs: calls.append(name)

    stages = first_hour.Stages({}, 2)
    clock = SimpleNamespace(sync=note("sync"))
    stages.timed = SimpleNamespace(enter=note("enter"), pair=note("pair"), flush=note("flush"), clock=clock)
    assert stages.at(0) is stages.at(0) is stages.timed
    assert calls == ["enter", "pair", "flush", "sync"]


def test_part_d_trains_resumes_and_samples(scratch):
    code, steps = dry_run("d", scratch)
    assert code == 0 and list(steps) == ["train", "resume", "sample"]
    train, resumed = values(steps["train"]), values(steps["resume"])
    assert train["finished"] == resumed["finished"] == 16 and train["checkpoints"] == 1
    assert train["last validation loss"] < train["first validation loss"] - 0.1
    assert resumed["last validation loss"] == pytest.approx(train["last validation loss"], abs=1e-4)
    assert "The history of" in steps["sample"]["rows"][0]["note"]
    for name in ("first-hour", "first-hour-resumed"):
        log = (scratch / f"out/d_{name}.txt").read_text()
        assert "event:finished" in log and ("event:resumed" in log) == name.endswith("resumed")
    assert not first_hour.scratch(dry=False).exists(), "a real call would meet a dry one's runs or cache"


LOG = """
step:0/20 val_loss:5.0 train_time:0ms
event:checkpoint step:{kept} path:logs/first-hour/step_{kept:08d}.pt
event:resumed step:{stop} path:logs/first-hour/step_{stop:08d}.pt
step:20/20 val_loss:3.0 train_time:9ms
"""


@pytest.mark.parametrize("stop, kept, wanted", ((4, 12, 12), (14, 12, 12), (12, 12, 12)))
def test_a_run_is_resumed_where_it_had_not_stopped(stop, kept, wanted, scratch, make_report, monkeypatch):
    """Fails if both runs go on from one checkpoint, which says nothing about resuming.

    Or if all is trained again from an early stop, because nothing else is left.
    """
    run = first_hour.RealRun(make_report(), {}, dry=True)
    (run.logs / first_hour.RUN).mkdir()
    (run.logs / f"{first_hour.RUN}.txt").write_text(LOG.format(stop=stop, kept=kept))
    for step in (stop, kept):
        (run.logs / first_hour.RUN / f"step_{step:08d}.pt").touch()
    begun = []
    monkeypatch.setattr(run, "train", lambda run_id, resume: begun.append(resume) or (None, []))
    with pytest.raises(AttributeError):
        run.resumed()
    assert Path(begun[0]).name == f"step_{wanted:08d}.pt"


@pytest.mark.parametrize("end, then", ((report.CutOff("time"), "left out"), (None, "ok")))
def test_only_a_trained_model_is_resumed_and_sampled(end, then, scratch, make_report, tmp_path, monkeypatch):
    """Fails if steps that need the trained model fail for good before there is one."""

    def whole(self):
        if end:
            raise end
        return [row("finished", ok=False)]  # a failed check, but a trained model

    monkeypatch.setattr(first_hour.RealRun, "whole", whole)
    for name in ("resumed", "sample"):
        monkeypatch.setattr(first_hour.RealRun, name, lambda self: [])
    first_hour.part_d(make_report(), {}, dry=True)
    assert statuses(tmp_path) == dict(train="cut off" if end else "failed", resume=then, sample=then)


def test_given_shards_are_unpacked(scratch):
    import lzma

    given = scratch / "given"
    given.mkdir()
    drawn = first_hour.prepare_shards(None, dry=True)
    for path in drawn.glob("*.bin"):
        (given / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes()))
    found = first_hour.prepare_shards(given, dry=True)
    assert found != drawn
    assert {p.name: p.read_bytes() for p in found.iterdir()} == {
        p.name: p.read_bytes() for p in drawn.iterdir()
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_only_a_dry_run(tmp_path, scratch, capsys):
    assert first_hour.main(["a", "--out", str(tmp_path / "out")]) == 2
    assert "--dry-run" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def make_report(tmp_path):
    """Function that makes Reports in one folder, whose clocks do not end the tests' process."""
    made = []

    def make(minutes=1e5):
        made.append(Report("p", tmp_path, tmp_path, minutes, tmp_path / "cache"))
        return made[-1]

    yield make
    for one in made:
        one.finish()


def statuses(folder: Path) -> dict[str, str]:
    return {name: step["status"] for name, step in json.loads((folder / "p.json").read_text()).items()}


def fail_with(error):
    def run():
        raise error

    return run


def test_every_outcome_is_a_result(make_report, tmp_path, capsys):
    """Fails if a step that does not succeed stops the next one, or anything but a failure counts as one."""
    found = make_report()
    found.step("memory", fail_with(torch.OutOfMemoryError("too much")))
    found.step("varlen", fail_with(ImportError("no varlen here")))
    found.step("fine", lambda: [row("loss", 1.5, "", ok=True)])
    assert found.finish() == 0
    found = make_report()
    found.step("check", lambda: [row("loss", 7.5, "", ok=False)])
    found.step("broken", fail_with(RuntimeError("nonsense")))
    found.guard("several", fail_with(KeyError("outside of a step")))
    found.step("last", lambda: None)
    assert found.finish() == 1
    failed = dict.fromkeys(("check", "broken", "several"), "failed")
    others = dict(memory="out of memory", varlen="missing", fine="ok", last="ok")
    assert statuses(tmp_path) == failed | others
    shown = capsys.readouterr().out
    assert "no varlen here" in shown and "RuntimeError: nonsense" in shown and "<- FAILED" in shown


def test_what_time_leaves_out_is_named_and_done_by_the_next_call(make_report, tmp_path):
    late = make_report(minutes=1e5)
    late.end = -1e9
    late.step("later", fail_with(AssertionError("it must not run")))
    assert late.finish() == 0 and statuses(tmp_path) == {"later": "left out"}
    make_report().step("later", lambda: None)
    assert statuses(tmp_path) == {"later": "ok"}


IN_A_PROCESS = """
import os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import report
folder = Path(sys.argv[2])
def note(text):
    with open(folder / "ran.txt", "a") as file:
        file.write(text)
"""


def in_a_process(folder: Path, code: str) -> int:
    script = [sys.executable, "-c", IN_A_PROCESS + code, str(ROOT / "benchmarks"), str(folder)]
    return subprocess.run(script, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True).returncode


def test_a_part_that_was_killed_goes_on(make_report, tmp_path):
    """Finished steps are not repeated; an interrupted one is, unless it ended the process twice."""
    code = """
found = report.Report("p", folder, folder, 1e5, folder / "cache")
found.step("first", lambda: None)
found.step("second", lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert in_a_process(tmp_path, code) == -9
    assert statuses(tmp_path) == dict(first="ok", second="running")
    for before, after in (("second", "ok"), ("third", "failed")):
        found, ran = make_report(), []
        for name in ("first", "second", "third"):
            found.step(name, lambda name=name, ran=ran: ran.append(name))
        assert ran == ([] if before == "third" else ["second", "third"])
        assert statuses(tmp_path)[before] == after
        found.record("third", status="running", attempts=2)  # as if it had crashed two processes


def test_a_step_that_was_cut_off_may_still_crash_once(make_report, tmp_path):
    """Fails if a clean end counts as a crash: one more, and the step is given up for good."""
    found = make_report()
    found.step("train", fail_with(report.CutOff("time")))
    code = """
found = report.Report("p", folder, folder, 1e5, folder / "cache")
found.step("train", lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert in_a_process(tmp_path, code) == -9
    make_report().step("train", lambda: None)
    assert statuses(tmp_path) == {"train": "ok"}


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_command_ends_with_the_process(tmp_path):
    """Fails if a trainer outlives a killed call: the next one is refused the log that it holds."""
    code = """
found = report.Report("p", folder, folder, 1e5, folder / "cache")
child = '''
import os, time
with open("pid", "w") as file:
    file.write(str(os.getpid()))
os.kill(os.getppid(), 9)
time.sleep(30)
'''
found.call([sys.executable, "-c", child], dict(os.environ), folder)
"""
    assert in_a_process(tmp_path, code) == -9
    child, polls = int((tmp_path / "pid").read_text()), 0
    while process_state(child) != "gone" and polls < 100:
        time.sleep(0.1)
        polls += 1
    assert polls < 100


@pytest.mark.parametrize("error", (FileNotFoundError, RuntimeError))
def test_a_step_that_hangs_ends_with_the_clock_even_without_a_cache(error, tmp_path):
    """Fails if packing, while a compiler renames its folders or on a full disk, keeps the process alive."""
    code = """
def pack(*_):
    raise ERROR
def hang():
    found.end = 0
    threading.Thread(target=found.watch).start()
    threading.Event().wait(20)
    note("late")
report.pack = pack
found = report.Report("p", folder, folder, 1e5, folder / "cache")
found.step("hangs", hang)
"""
    assert in_a_process(tmp_path, code.replace("ERROR", error.__name__)) == 0
    assert statuses(tmp_path) == dict(hangs="cut off") and not (tmp_path / "ran.txt").exists()


def test_a_step_that_hangs_ends_with_the_clock(tmp_path):
    """Fails if results or cache are lost when the main thread never returns."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/kernel").write_bytes(b"x")
    code = """
def hang():
    found.end = 0
    threading.Thread(target=found.watch).start()
    threading.Event().wait()
found = report.Report("p", folder, folder, 1e5, folder / "cache")
found.step("first", lambda: note("1"))
found.step("hangs", hang)
"""
    assert in_a_process(tmp_path, code) == 0
    assert statuses(tmp_path) == dict(first="ok", hangs="cut off")
    assert (tmp_path / "cache.tar.xz.0").exists()


def test_a_broken_device_begins_the_process_anew(make_report, monkeypatch):
    """Every call to CUDA fails after an illegal access; the rest of the part needs another process."""
    calls = []

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    found = make_report(minutes=100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(report.os, "execv", lambda *call: calls.append(call))
    found.step("kernel", lambda: [])
    assert found.steps["kernel"]["status"] == "failed", (
        "errors of kernels appear only when all are waited for"
    )
    ((program, arguments),) = calls
    assert program == arguments[0] == sys.executable and arguments[1:-2] == sys.argv
    assert arguments[-2] == "--minutes" and 99 < float(arguments[-1]) <= 100


def test_a_command_is_asked_to_stop_when_time_is_up(make_report, tmp_path):
    """A command ends by itself, like a trainer that saves, and its step does not count as done."""
    found = make_report()
    found.end = -1e9  # a command gets at least a second
    child = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(open("saved", "w").close()))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
signal.pause()
"""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # so that it waits for the child's handler
    outcome = found.outcome(lambda: found.call([sys.executable, "-c", child], dict(os.environ), tmp_path))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    assert outcome[0] == "cut off" and found.child.returncode == 0 and (tmp_path / "saved").exists()


def test_a_cache_is_packed_in_pieces_and_unpacked_in_its_place(tmp_path):
    cache, out, place = tmp_path / "cache", tmp_path / "out", tmp_path / "place"
    (cache / "inductor/ab").mkdir(parents=True)
    out.mkdir()
    noise = np.random.default_rng(0)
    contents = {f"inductor/ab/{i}.so": noise.bytes(3000) for i in range(3)}
    for name, data in contents.items():
        (cache / name).write_bytes(data)
    (cache / "inductor/ab/kernel.ptx").write_bytes(noise.bytes(9000))  # not needed to load the kernel
    report.pack(cache, out, piece=4096)
    sizes = [path.stat().st_size for path in sorted(out.iterdir())]
    assert len(sizes) == 3 and max(sizes) == 4096
    report.unpack(out, place)
    assert {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()} == contents
    (place / "inductor/ab/0.so").write_bytes(b"newer")
    report.unpack(out, place)
    assert (place / "inductor/ab/0.so").read_bytes() == b"newer"
    (out / "cache.tar.xz.1").write_bytes(b"damaged")
    report.unpack(out, tmp_path / "cold")
    assert not (tmp_path / "cold").exists(), "a damaged cache ends no call and leaves no half"
    report.pack(cache, out, piece=4096)
    report.pack(cache, out, piece=1024)
    assert [path.stat().st_size for path in sorted(out.iterdir())] == sizes, "too many: the last ones stay"
