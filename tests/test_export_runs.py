"""export_runs.py: every number of a log arrives, once, under its name; running logs are followed."""

import csv
import importlib.util
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from logs_for_tests import make_log

import export_runs
from analysis.run_log import LogFollower, read_log
from export_runs import NewPoints, name_runs

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture
def logs(tmp_path) -> Path:
    """Folder with two runs: a finished one, and one that is still running."""
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "a.txt").write_text(make_log("a", 1, {"muon_lr": 0.02}, 100))
    (folder / "b.txt").write_text(make_log("b", 2, {"muon_lr": 0.04}, 100, end_event="", end=60))
    return folder


def read_table(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_number_of_the_logs_is_in_the_tables(logs, tmp_path, capsys):
    """Fails if a step, a quantity or a setting is lost, or is in another run's row."""
    out = tmp_path / "tables"
    assert export_runs.main([str(logs), "--to", "csv", "--out", str(out)]) == 0
    assert "steps.csv" in capsys.readouterr().out
    settings = {row["run"]: row for row in read_table(out / "settings.csv")}
    assert {name: float(row["muon_lr"]) for name, row in settings.items()} == {"a": 0.02, "b": 0.04}
    assert (settings["a"]["state"], settings["b"]["state"]) == ("finished", "running")
    assert settings["a"]["lr_muls"] == "1,1.52,1.73,1" and int(settings["a"]["model_facts.width"]) == 768
    steps = read_table(out / "steps.csv")
    for name in ("a", "b"):
        (run,) = read_log(logs / f"{name}.txt")
        rows = {int(row["step"]): row for row in steps if row["run"] == name}
        assert sorted(rows) == sorted({*run.columns["train_loss"].step, *run.val.step})
        for quantity in ("val_loss", "train_loss", "tokens", "val_acc"):
            column = run.columns[quantity]
            assert [float(rows[step][quantity]) for step in column.step] == column.value.tolist()
            missing = set(rows) - set(column.step.tolist())
            assert all(rows[step][quantity] == "" for step in missing)
        spec = run.columns["spec_attn"]
        assert [float(rows[step]["spec_attn.3"]) for step in spec.step] == spec.value[:, 3].tolist()


def test_a_setting_that_changed_its_type_is_no_obstacle(logs, tmp_path):
    """Fails if logs from before and after a change of a setting's type cannot share a table."""
    (logs / "c.txt").write_text(make_log("c", 3, {"muon_lr": "0.1,0.2", "target_loss": 3}, 100))
    out = tmp_path / "tables"
    assert export_runs.main([str(logs), "--to", "csv", "--out", str(out)]) == 0
    assert [row["muon_lr"] for row in read_table(out / "settings.csv")] == ["0.02", "0.04", "0.1,0.2"]


def test_points_are_given_out_once_and_in_order(logs):
    """Fails if a running log's curve has a point twice, or goes back at a step repeated after resuming."""
    points, follower, given = NewPoints(), LogFollower(logs), []
    path = logs / "b.txt"
    whole = make_log("b", 2, {"muon_lr": 0.04}, 100)
    path.write_text(whole[: whole.index("step:31/100")])
    for text in (whole[: whole.index("step:70/100")], whole):
        follower.poll()
        given += points.take("b", follower.logs[path].runs[0])
        with path.open("a") as file:
            file.write(text[path.stat().st_size :])
    follower.poll()
    given += points.take("b", follower.logs[path].runs[0])
    (run,) = read_log(path)
    steps = [step for step, values in given if "val_loss" in values]
    assert steps == run.val.step.tolist() and len(given) == len({step for step, _ in given}) == 101
    assert [values["val_loss"] for _, values in given if "val_loss" in values] == run.val.loss.tolist()
    with path.open("a") as file:  # the log goes back to step 50, as after a crash, and repeats it
        file.write(f"event:resumed step:50/100 path:x\n{whole[whole.index('step:51/100') :]}")
    follower.poll()
    assert points.take("b", follower.logs[path].runs[0]) == []


def test_names_are_file_names_and_different(tmp_path):
    """Fails if two runs share a curve, a run's own name leads out of the folder, or the order names a run."""
    runs = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(make_log("../../a", 1, {}, 20))
        runs += read_log(tmp_path / folder / "a.txt")
    one, two = tmp_path / "one", tmp_path / "two"
    for given in ([one, two], [two, one], [two / "a.txt", one]):
        assert name_runs(runs, given) == {"one.a": runs[0], "two.a": runs[1]}
    assert list(name_runs(runs[:1], [one])) == list(name_runs(runs[:1], [one / "a.txt", one])) == ["a"]
    (one / "latest.txt").symlink_to(one / "a.txt")
    assert len(name_runs(runs[:1] + read_log(one / "latest.txt"), [one])) == 1
    (tmp_path / "one.a.txt").write_text(make_log("b", 1, {}, 20))
    with pytest.raises(ValueError, match="would both be one.a: rename one"):
        name_runs(runs + read_log(tmp_path / "one.a.txt"), [tmp_path])


def test_a_log_given_twice_is_exported_once(logs, tmp_path, monkeypatch):
    """Fails if a folder given relative and absolute, as `logs $PWD/logs`, has each run twice."""
    monkeypatch.chdir(tmp_path)
    assert export_runs.main(["logs", str(logs), "--to", "csv", "--out", "tables"]) == 0
    assert [row["run"] for row in read_table(Path("tables/settings.csv"))] == ["a", "b"]


def test_a_packed_log_is_followed_as_it_is(logs, tmp_path, monkeypatch):
    """Fails if a packed log, named with --follow, is read as text too, which overwrites its finished run."""
    packed = tmp_path / "a.txt.xz"
    packed.write_bytes(lzma.compress((logs / "a.txt").read_bytes()))

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_runs.time, "sleep", interrupt)
    arguments = [str(packed), "--to", "csv", "--follow", "--out", str(tmp_path / "tables")]
    assert export_runs.main(arguments) == 0
    (row,) = read_table(tmp_path / "tables" / "settings.csv")
    assert (row["run"], row["state"], row["last_step"]) == ("a", "finished", "100")


def test_what_is_missing_is_said(logs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert export_runs.main([str(tmp_path / "empty"), "--to", "csv"]) == 2
    assert "no logs in" in capsys.readouterr().err
    out = tmp_path / "tables"
    for more in ([], ["--follow"]):
        assert (
            export_runs.main([str(logs), "sweeps/smoke.toml", "--to", "csv", "--out", str(out), *more]) == 2
        )
        assert "sweeps/smoke.toml is no log; wanted logs" in capsys.readouterr().err and not out.exists()
    for library in ("tensorboard", "trackio", "wandb"):
        if importlib.util.find_spec(library) is None:
            assert export_runs.main([str(logs), "--to", library, "--out", str(tmp_path)]) == 2
            assert f"-m pip install {library}" in capsys.readouterr().err


def test_following_ends_with_ctrl_c_and_has_everything(logs, tmp_path):
    """Fails if a running log's new lines do not arrive, or Ctrl-C leaves half a file or a traceback."""
    out, path = tmp_path / "tables", logs / "b.txt"
    code = (
        "import sys, signal; signal.signal(signal.SIGINT, signal.default_int_handler); import export_runs; "
        "export_runs.EVERY_S = 0.05; sys.exit(export_runs.main())"
    )
    argv = [sys.executable, "-c", code, str(logs / "a.txt"), str(path), "--to", "csv", "--follow"]
    argv += ["--out", str(out)]
    child = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_for(last_step: int):
        steps = out / "steps.csv"
        while child.poll() is None:
            if steps.exists() and f"\nb,{last_step}," in steps.read_text():
                return
            time.sleep(0.02)
        pytest.fail(child.stderr.read())

    wait_for(60)
    whole = make_log("b", 2, {"muon_lr": 0.04}, 100)
    with path.open("a") as file:
        file.write(whole[path.stat().st_size :])
    wait_for(100)
    os.kill(child.pid, signal.SIGINT)
    said, wrong = child.communicate()
    assert (child.returncode, wrong) == (0, "") and "Ctrl-C ends it" in said
    assert {row["state"] for row in read_table(out / "settings.csv")} <= {"finished", "running"}


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is optional; pip install tensorboard")
def test_tensorboard_reads_what_was_logged(logs, tmp_path):
    """Fails if tensorboard's own reader finds other numbers, or finds them twice after a second export."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        assert export_runs.main([str(logs), "--to", "tensorboard", "--out", str(tmp_path)]) == 0
    for name in ("a", "b"):
        (run,) = read_log(logs / f"{name}.txt")
        found = EventAccumulator(str(tmp_path / "tensorboard" / name))
        found.Reload()
        events = found.Scalars("loss/val_loss")
        assert [event.step for event in events] == run.val.step.tolist()
        assert np.allclose([event.value for event in events], run.val.loss, rtol=1e-6)
        assert "per_layer/spec_attn.3" in found.Tags()["scalars"]
        assert math.isclose(events[-1].wall_time - events[0].wall_time, run.val.time_ms[-1] / 1000, abs_tol=1)
