"""benchmarks/first_hour.py without a GPU: a dry run of every part; results survive whatever ends a step."""

import json
import lzma
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from helpers import make_chain, write_shard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import first_hour  # noqa: E402


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Function that makes a dry call of a part into the folder `out`; returns the exit code."""
    monkeypatch.setattr(first_hour, "SCRATCH", tmp_path / "scratch")

    def run(part: str, *more) -> int:
        words = [part, "--dry-run", "--minutes", "60", "--out", tmp_path / "out", *more]
        return first_hour.main([str(word) for word in words])

    return run


def results(folder: Path, name: str):
    return json.loads((folder / "out" / f"{name}.json").read_text())


# ---------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------


def test_part_a_checks_and_times_all_kernels(call, tmp_path):
    """Fails if a check's verdict cannot be read afterwards, or a kernel is not timed."""
    pytest.importorskip("triton")
    assert call("a") == 0
    text = (tmp_path / "out/a_checks.txt").read_text()
    for kernel in ("mlp", "quantize", "softcapped_loss", "head_loss", "attention", "row_scales"):
        assert f"::test_{kernel}" in text
    assert " PASSED " in text and " FAILED " not in text and "slowest durations" in text
    assert "PyTorch version" in (tmp_path / "out/a_machine.txt").read_text()
    found = results(tmp_path, "a_kernels")
    stages = {f"attention, stage {i}" for i in (1, 2, 3)}
    assert found.keys() - stages == {
        "device", "products", "head", "loss", "tables", "polar", "updates", "gates"
    }  # fmt: skip
    assert all(part and all(case["ms"] > 0 for case in part) for part in found.values())


def test_part_b_times_stage_1_and_the_twins_once(call, tmp_path):
    """Fails also if a call on another machine measures again what an earlier one has."""
    assert call("b") == 0
    (stage,) = results(tmp_path, "b_stage_1")["stages"]
    assert stage["stage"] == 1 and stage["profile"]["kernels"] and stage["evaluation_ms"] is None
    twins = results(tmp_path, "b_twins")
    assert "stages" not in twins and twins["ord"][0]["ratio"]["n"] == 2
    shutil.move(tmp_path / "out", tmp_path / "given")
    assert call("b", "--given", tmp_path / "given") == 0
    before, after = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in ("given", "out"))
    assert before == after


def test_part_c_times_stages_2_and_3_and_keeps_the_clocks(call, tmp_path, monkeypatch):
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 1980 MHz\nexec sleep 600\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    assert call("c") == 0
    assert (tmp_path / "out/clocks.csv").read_text() == "1980 MHz\n"
    stages = results(tmp_path, "c_stages")["stages"]
    assert [(r["stage"], r["batch_tokens"]) for r in stages] == [(2, 256), (3, 384)]


def test_part_d_goes_on_where_it_was_cut_off(call, tmp_path, monkeypatch):
    """Fails if the trainer is not asked to save, or the next call trains from the start or checks nothing."""
    real = first_hour.wait

    def until_step_5(child, seconds):
        monkeypatch.setattr(first_hour, "wait", real)
        logs = (tmp_path / "scratch").rglob("logs/first-hour.txt")
        while child.poll() is None and not any("\nstep:5/16 " in log.read_text() for log in logs):
            time.sleep(0.05)
            logs = (tmp_path / "scratch").rglob("logs/first-hour.txt")
        return False

    monkeypatch.setattr(first_hour, "GRACE_S", 300)  # a busy machine
    monkeypatch.setattr(first_hour, "wait", until_step_5)
    assert call("d") == 0
    assert "\n== cut off, after" in (tmp_path / "out/d_train.txt").read_text()
    assert not (tmp_path / "out/d_resumed.txt").exists()
    assert call("d") == 0
    log = (tmp_path / "out/d_log.txt").read_text()
    assert "\nevent:stopped " in log and "\nevent:resumed " in log and "\nevent:finished " in log
    found = results(tmp_path, "d")
    assert set(found["checks"].values()) == {True} and found["peak_mem_mb"] > 0, found
    assert found["resumed_val_loss"] == pytest.approx(found["last_val_loss"], abs=1e-4)
    assert "going on from step 12" in (tmp_path / "out/d_resumed.txt").read_text()
    assert "The history of" in (tmp_path / "out/d_sample.txt").read_text()
    # what is deleted is done anew: an old run would pass for one of the code as it is now
    (tmp_path / "out/d_train.txt").unlink()
    monkeypatch.setattr(first_hour, "wait", until_step_5)
    assert call("d") == 0 and "\n== cut off, after" in (tmp_path / "out/d_train.txt").read_text()
    assert not (tmp_path / "out/d_resumed.txt").exists()


LOG = """
step:0/20 val_loss:5.0 train_time:0ms
event:checkpoint step:{kept} path:logs/first-hour/step_{kept:08d}.pt
event:resumed step:{stop} path:logs/first-hour/step_{stop:08d}.pt
step:20/20 val_loss:4.95 train_time:9ms tokens:90
event:recompiled step:15
"""


@pytest.mark.parametrize(("stop", "chosen"), [(4, "step_00000012.pt"), (14, "step_00000012.pt"), (12, None)])
def test_a_run_is_resumed_where_it_had_not_stopped(stop, chosen, tmp_path):
    """Fails if both runs go on from one checkpoint, which says nothing about resuming."""
    log = tmp_path / "first-hour.txt"
    log.write_text(LOG.format(stop=stop, kept=12))
    log.with_suffix("").mkdir()
    for step in (stop, 12):
        (tmp_path / f"first-hour/step_{step:08d}.pt").touch()
    found = first_hour.checkpoint_to_resume(log)
    assert (found and found.name) == chosen


def test_a_run_that_did_not_learn_or_compiled_on_the_way_is_named(tmp_path):
    (tmp_path / "x.txt").write_text(LOG.format(stop=4, kept=12))
    (run,) = first_hour.read_log(tmp_path / "x.txt")
    assert list(first_hour.check_run(run, None)["checks"].values()) == [True, False, False, True, None]


# ---------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------

CRASH = "import os; print('be' + 'gun', flush=True); os.kill(os.getpid(), 11)"
HANG = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def test_a_step_that_crashes_or_hangs_harms_no_other(tmp_path, monkeypatch, capsys):
    """Fails also if such a step is tried again by the next call, or counts as one that went well."""
    monkeypatch.setattr(first_hour, "GRACE_S", 0.2)
    monkeypatch.setattr(first_hour, "LEAST_S", 0)
    begun = time.monotonic()
    for _ in range(2):
        steps = first_hour.Steps(tmp_path, {}, time.monotonic() + 100, dry=False)
        steps.run("crashes", ["-c", CRASH], 60)
        steps.run("hangs", ["-c", HANG], 1)
        steps.run("fine", ["-c", "print('done')"], 60)
        assert [steps.succeeded(name) for name in steps.names] == [False, False, True]
    assert time.monotonic() - begun < 50 and capsys.readouterr().out.count("begun") == 1
    assert (tmp_path / "crashes.txt").read_text().startswith("begun\n\n== finished: exit code -11, after ")
    assert "== finished: stopped at its limit, after" in (tmp_path / "hangs.txt").read_text()
    assert first_hour.Steps(tmp_path, {}, 0, dry=True).succeeded("fine") is None, "a dry run is another one"


def test_a_failed_step_makes_the_exit_code_and_the_next_step_runs(call, tmp_path, monkeypatch):
    def part(steps, scratch, dry):
        steps.run("a_bad", ["-c", "raise SystemExit(3)"], 60)
        steps.run("a_good", ["-c", "print(1)"], 60)
        return []

    monkeypatch.setitem(first_hour.PARTS, "a", part)
    assert call("a", "--minutes", "1") == 0 and not list(tmp_path.glob("out/a_*")), (
        "no time is left for a step"
    )
    assert call("a") == 1 and (tmp_path / "out/a_good.txt").read_text().startswith("1\n")


# ---------------------------------------------------------------------------------------------------
# Tokens, compile cache, arguments
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_steps(monkeypatch):
    monkeypatch.setitem(first_hour.PARTS, "b", lambda steps, scratch, dry: [])


def test_given_shards_are_unpacked_and_never_mixed(call, tmp_path, no_steps, capsys):
    """Fails if shards of two corpora, or of an earlier call, are trained on together without a word."""
    given, scratch = tmp_path / "given", tmp_path / "unpacked"
    given.mkdir()
    for kind in ("train", "val"):
        path = write_shard(given / f"x_{kind}_0.bin", make_chain(3000, 1))
        (given / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes()))
        path.rename(tmp_path / path.name)
    first = first_hour.unpack_shards(given, scratch)
    assert sorted(p.name for p in first.iterdir()) == ["x_train_0.bin", "x_val_0.bin"]
    assert all(p.read_bytes() == (tmp_path / p.name).read_bytes() for p in first.iterdir())
    assert call("b", "--tokens", given) == 0
    for path in list(given.iterdir()):
        path.rename(given / path.name.replace("x_", "y_"))
    second = first_hour.unpack_shards(given, scratch)
    assert sorted(p.name for p in second.iterdir()) == ["y_train_0.bin", "y_val_0.bin"]
    for path in first.iterdir():
        shutil.copy(path, given)
    assert call("b", "--tokens", given) == 2
    assert f"--tokens {given}: shards of several corpora" in capsys.readouterr().err


def test_a_misspelt_folder_or_a_missing_gpu_is_refused(call, tmp_path, monkeypatch, capsys):
    for option in ("--tokens", "--given"):
        assert call("b", option, tmp_path / "mispelt") == 2
        assert f"{option} {tmp_path}/mispelt" in capsys.readouterr().err
    monkeypatch.setattr(first_hour, "HAS_CUDA", "raise SystemExit(1)")
    assert first_hour.main(["a", "--out", str(tmp_path / "out")]) == 2
    assert "--dry-run" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_cache_is_packed_in_pieces_and_unpacked_in_its_place(tmp_path, monkeypatch, capsys):
    cache, out, place = tmp_path / "cache", tmp_path / "out", tmp_path / "elsewhere/cache"
    (cache / "inductor/ab").mkdir(parents=True)
    out.mkdir()
    contents = {f"inductor/ab/{i}.so": bytes(make_chain(3000, i).astype("u1")) for i in range(3)}
    for name, data in contents.items():
        (cache / name).write_bytes(data)
    (cache / "inductor/ab/kernel.ptx").write_bytes(b"x")  # not needed to load the kernel
    monkeypatch.setattr(first_hour, "PIECE_BYTES", 4096)
    first_hour.pack(cache, out)
    sizes = [path.stat().st_size for path in sorted(out.iterdir())]
    assert len(sizes) in (2, 3) and sizes[0] == 4096
    first_hour.unpack(out, place)
    assert {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()} == contents
    (place / "inductor/ab/0.so").write_bytes(b"newer")
    first_hour.unpack(out, place)
    assert (place / "inductor/ab/0.so").read_bytes() == b"newer"
    monkeypatch.setattr(first_hour, "PIECE_BYTES", 256)
    first_hour.pack(cache, out)
    assert [path.stat().st_size for path in sorted(out.iterdir())] == sizes, "too many: the last ones stay"
    assert "at most 3" in capsys.readouterr().out


def test_a_damaged_cache_stops_no_call(call, tmp_path, no_steps, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dry_cache.tar.xz.0").write_bytes(b"damaged")
    assert call("b") == 0
    assert "compiled anew" in capsys.readouterr().out and not (tmp_path / "scratch/dry_cache").exists()
