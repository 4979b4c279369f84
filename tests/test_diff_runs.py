"""diff_runs: names all differences between two runs, and nothing else."""

import subprocess
import sys

import pytest
from helpers import ROOT
from logs_for_tests import SEPARATOR, make_log, with_files

import diff_runs

FILES = {"train_gpt.py": "import os\n\n\ndef f():\n    return 1\n", "runtime/ranks.py": "x = 1\n"}


@pytest.fixture
def compared(tmp_path, capsys):
    """Call the command on two texts; return its exit code and the sections of its output, by title."""

    def call(a: str, b: str) -> tuple[int, dict[str, str]]:
        for name, text in (("a.txt", a), ("b.txt", b)):
            (tmp_path / name).write_text(text)
        code = diff_runs.main([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
        parts = capsys.readouterr().out.split("\n\n")
        return code, {part.partition("\n")[0].partition(":")[0]: part for part in parts}

    return call


def test_everything_that_differs_is_named_and_nothing_else(compared):
    """Otherwise a difference in loss is attributed to the wrong cause."""
    a = with_files(make_log("a", 1, {"muon_lr": 0.02, "val_loss_every": 50}, 200), FILES)
    edited = {**FILES, "train_gpt.py": FILES["train_gpt.py"].replace("return 1", "return 2")}
    changes = {"muon_lr": 0.04, "val_loss_every": 25, "router_lr": 0.1}
    b = with_files(make_log("b", 1, changes, 200, final=3.2, val_every=25), edited)
    b = b.replace("torch:2.13.0+cu130", "torch:2.12.0").replace("100000000/132f", "100000000/9999")
    code, found = compared(a, b)
    assert code == 0
    rows = [line.split() for line in found["settings"].splitlines()[3:]]
    wanted = [["muon_lr", "0.02", "0.04"], ["router_lr", "-", "0.1"]]
    assert rows == [*wanted, ["val_loss_every", "50", "25", "recording"]]
    assert found["versions and machine"].splitlines()[3:] == ["torch  2.13.0+cu130  2.12.0"]
    assert "/132f" in found["data"] and "/9999" in found["data"] and "val_data" not in found["data"]
    steps = [line.split() for line in found["validation loss"].splitlines()[3:]]
    assert [row[0] for row in steps] == ["0", "50", "100", "150", "200"]
    assert [float(row[3]) for row in steps] == pytest.approx(
        [float(row[2]) - float(row[1]) for row in steps], abs=2e-4
    )
    assert steps[-1][3] == "-0.0700"
    assert found["source code"].splitlines()[3:] == ["train_gpt.py          1         1"]
    diff = found["--- A/train_gpt.py"].splitlines()
    assert diff[1] == "+++ B/train_gpt.py" and "-    return 1" in diff and "+    return 2" in diff
    assert "--- A/runtime/ranks.py" not in found


def test_the_files_of_two_trainers_are_compared_with_each_other(compared):
    """Fails if runs of the twins show both trainers whole, and not what one changes."""
    a = with_files(make_log("a", 1, {"script": "train_gpt.py"}, 100), FILES)
    twin = {"twin.py": FILES["train_gpt.py"].replace("return 1", "return 2"), "runtime/ranks.py": "x = 1\n"}
    _, found = compared(a, with_files(make_log("b", 1, {"script": "twin.py"}, 100), twin))
    assert found["source code"].splitlines()[3:] == ["train_gpt.py, twin.py          1         1"]


def test_equal_runs_are_said_to_be_equal(compared):
    log = make_log("a", 1, {}, 100)
    _, found = compared(log, log.replace('"run_id": "a"', '"run_id": "b"'))
    for title in ("settings", "versions and machine", "data", "source code"):
        assert f"{title}: the same" in found[title]


def test_older_logs_have_their_source_code_compared_in_one_piece(compared):
    """Public logs, and ours from before the list of files, hold one text up to the first line of '='."""
    a = make_log("a", 1, {}, 100)
    _, found = compared(a, a.replace("class Model", "class Net", 1))
    assert "-class Model:" in found["--- A/source"].splitlines()
    _, found = compared("step:1/2 val_loss:3 train_time:1ms\n", "step:2/2 val_loss:3 train_time:1ms\n")
    assert "not in both logs" in found["source code"] and "no validation" in found["validation loss"]


def test_a_missing_log_is_an_error_and_a_closed_pipe_is_none(tmp_path, capsys):
    assert diff_runs.main([str(tmp_path / "none.txt"), str(tmp_path / "none.txt")]) == 2
    assert "no log" in capsys.readouterr().err
    for name, lines in (("a", 1), ("b", 20000)):
        head = f"# file: x.py, {2 * lines} bytes\n" + "x\n" * lines
        (tmp_path / f"{name}.txt").write_text(f"{head}{SEPARATOR}\nstep:1/1 val_loss:3 train_time:1ms\n")
    command = f"{sys.executable} {ROOT}/diff_runs.py a.txt b.txt | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("A: a.txt")
