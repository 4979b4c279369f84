"""monitor_runs: the table is right, plain where it must be, and cheap for a thousand logs."""

import contextlib
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from logs_for_tests import header, make_log, step_lines

import monitor_runs
from analysis import manifest, run_log
from analysis.manifest import Manifest, Run, manifest_path
from analysis.run_log import read_log
from monitor_runs import Monitor

ROOT = Path(monitor_runs.__file__).parent
STEPS = 200
PATIENCE_S = 180  # so long a test waits for what must come


def write(folder, name, text, age_s=0.0):
    """A log written to `age_s` seconds ago."""
    path = folder / f"{name}.txt"
    path.write_text(text)
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def by_name(rows):
    return {row.run_id: row for row in rows}


def shown(rows, monitor, width=160, height=None, plain=False):
    lines = monitor_runs.text_lines(rows, monitor, width, height, plain)
    return ["".join(text for text, _ in line).rstrip() for line in lines]


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


def test_states(tmp_path):
    """Each state from its evidence; only silence turns a running run into a stalled one."""
    half = {"num_steps": STEPS, "end": 100}
    write(tmp_path, "runs", make_log("runs", end_event="", **half), age_s=10)
    write(tmp_path, "stalls", make_log("stalls", end_event="", **half), age_s=1000)
    write(tmp_path, "ends", make_log("ends", num_steps=STEPS), age_s=5000)
    write(
        tmp_path,
        "crashes",
        make_log("crashes", end_event="event:crashed error:no memory: 5 GiB", **half),
        5000,
    )
    write(tmp_path, "diverges", make_log("diverges", end_event="event:diverged step:100", **half), 5000)
    write(tmp_path, "stops", make_log("stops", end_event="event:stopped", **half), 5000)
    write(tmp_path, "compiles", header("compiles", num_steps=STEPS), age_s=1000)  # compiling takes minutes
    slow = make_log("slow", end_event="", ms=60_000.0, **half)  # a minute a step: 1000 s are no silence
    write(tmp_path, "slow", slow, age_s=1000)
    rows = Monitor(tmp_path, stalled_after=300).poll()
    assert {row.run_id: row.state for row in rows} == {
        "runs": "running",
        "stalls": "stalled",
        "ends": "finished",
        "crashes": "crashed",
        "diverges": "diverged",
        "stops": "stopped",
        "compiles": "running",
        "slow": "running",
    }
    assert {row.run_id for row in rows[:4]} == {"runs", "stalls", "compiles", "slow"}  # what runs comes first
    text = "\n".join(shown(rows, monitor_of(tmp_path)))
    assert "crashes crashed: no memory: 5 GiB" in text and "diverges diverged: step 100" in text
    assert "stalls stalled: no line for" in text


def monitor_of(folder):
    monitor = Monitor(folder)
    monitor.poll()
    return monitor


def test_numbers_of_a_run(tmp_path):
    """Losses, speed and time left are those of the log, speed that of its last lines."""
    text = header("run", 7, num_steps=1600) + step_lines(7, end=1000, ms=50.0)
    # The last stage is twice as slow: the average over the run would promise too early an end.
    text += "".join(
        f"step:{step}/1600 train_loss:3.5 train_time:{50_000 + (step - 1000) * 100}ms step_avg:50.00ms "
        f"tokens:{10_000_000 + (step - 1000) * 4096}\n"
        for step in range(1001, 1101)
    )
    write(tmp_path, "run", text)
    (row,) = Monitor(tmp_path).poll()
    run = read_log(tmp_path / "run.txt")[0]
    assert (row.seed, row.step, row.num_steps, row.val_step) == (7, 1100, 1600, 1000)
    assert (row.val_loss, row.best_val_loss, row.train_loss) == (run.final_val_loss, run.best_val_loss, 3.5)
    assert row.ms_per_step == 100 and row.tokens_per_s == pytest.approx(40_960)
    assert row.seconds_left == pytest.approx(50) and row.train_time_s == pytest.approx(60)
    assert row.share == 1100 / 1600
    line = shown([row], monitor_of(tmp_path))[2]
    assert "1100/1600" in line and f"{run.final_val_loss:.4f}" in line and "50.0 s" in line and "41k" in line


def planned(run_id, tag, seed=1, **more):
    """A run as a manifest has it."""
    return Run(run_id, tag, "train_gpt.py", seed, {}, "", "", **more)


def write_manifest(folder, control, runs, versus=None, name="lr"):
    Manifest(manifest_path(name, folder), control=control, versus=versus or {}, runs=runs).save()


def test_difference_to_the_control(tmp_path):
    """Taken at the same step of the same seed: else every run under way looks worse than its control."""
    write(tmp_path, "c1", make_log("c1", 1, num_steps=STEPS))
    write(tmp_path, "c2", make_log("c2", 2, num_steps=STEPS))
    write(tmp_path, "t2", make_log("t2", 2, num_steps=STEPS, final=3.25, end=120, end_event=""))
    write(tmp_path, "t9", make_log("t9", 9, num_steps=STEPS))
    members = [planned("c1", "base", 1), planned("c2", "base", 2), planned("t2", "test", 2)]
    members += [planned("t9", "test", 9), planned("later", "test", 3)]
    write_manifest(tmp_path, "base", members)
    (tmp_path / "broken.sweep.json").write_text("{")
    (tmp_path / "odd.sweep.json").write_text('{"runs": [1, {"tag": "x"}], "control": null}')
    monitor = Monitor(tmp_path)
    rows = by_name(monitor.poll())
    runs = {name: read_log(tmp_path / f"{name}.txt")[0] for name in rows}
    at = runs["c2"].val.step.tolist().index(100)
    assert rows["t2"].difference == runs["t2"].val.loss[-1] - runs["c2"].val.loss[at]
    assert rows["t2"].control == "c2" and (rows["t2"].sweep, rows["t2"].tag) == ("lr", "test")
    mean = np.mean([runs["c1"].final_val_loss, runs["c2"].final_val_loss])
    assert rows["t9"].difference == pytest.approx(runs["t9"].final_val_loss - mean)
    assert rows["t9"].control == "mean of 2"
    assert rows["c1"].is_control and math.isnan(rows["c1"].difference)
    text = "\n".join(shown(list(rows.values()), monitor, width=1000))
    assert "sweep lr: 1 of 5 runs have not started" in text
    assert all(f"{name}.sweep.json is not a sweep's manifest" in text for name in ("broken", "odd"))
    assert f"{rows['t2'].difference:+.4f}" in text and "\ntest " in text
    (tmp_path / "lr.sweep.json").unlink()
    rows = by_name(Monitor(tmp_path, control="c").poll())
    assert rows["t2"].control == "c2" and rows["c1"].is_control
    assert math.isnan(by_name(Monitor(tmp_path).poll())["t2"].difference)


def test_difference_to_an_arm_of_its_own(tmp_path):
    """An arm's own control goes before the sweep's, whose rows keep theirs."""
    members = [planned("c1", "base"), planned("f1", "fast"), planned("t1", "test")]
    for run in members:
        write(tmp_path, run.run_id, make_log(run.run_id, 1, num_steps=STEPS))
    write_manifest(tmp_path, "base", members, versus={"test": "fast"})
    rows = by_name(Monitor(tmp_path).poll())
    assert [rows[name].control for name in ("c1", "f1", "t1")] == ["", "c1", "f1"]
    assert rows["c1"].is_control and not rows["f1"].is_control
    write_manifest(tmp_path, "base", members, versus={"test": "gone"})
    assert math.isnan(by_name(Monitor(tmp_path).poll())["t1"].difference)


def test_the_launcher_knows_of_killed_runs(tmp_path):
    """A process killed by the system leaves a log that says it runs; the manifest says how it ended."""
    for name in ("killed", "hangs", "runs"):
        write(tmp_path, name, make_log(name, num_steps=STEPS, end=100, end_event=""))
    runs = [planned("killed", "a", state="crashed", reason="killed by signal 9")]
    runs += [planned("hangs", "a", state="hung"), planned("runs", "a", state="running")]
    write_manifest(tmp_path, None, runs)
    monitor = Monitor(tmp_path)
    rows = by_name(monitor.poll())
    assert {name: row.state for name, row in rows.items()} == {
        "killed": "crashed",
        "hangs": "crashed",
        "runs": "running",
    }
    text = "\n".join(shown(list(rows.values()), monitor))
    assert "killed crashed: killed by signal 9" in text and "hangs crashed: launcher: hung" in text


def test_garbage_and_empty_logs_are_rows(tmp_path):
    (tmp_path / "garbage.txt").write_bytes(bytes(range(256)) * 20 + b"\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "note.md").write_text("not a log")
    monitor = Monitor(tmp_path)
    rows = by_name(monitor.poll())
    assert set(rows) == {"garbage", "empty"} and rows["garbage"].unread_lines > 0
    assert "could not be read in 1 logs" in "\n".join(shown(list(rows.values()), monitor))


def test_trials_of_one_file_have_their_own_curves(tmp_path):
    trial = "".join(f"step:{s}/90 val_loss:{{}}{s} train_time:{s}ms\n" for s in range(0, 91, 10))
    write(tmp_path, "two", trial.replace("{}", "3.1") + trial.replace("{}", "4.9"))
    monitor = Monitor(tmp_path)
    rows = by_name(monitor.poll())
    first, second = (monitor_runs.late_losses(rows[name].run) for name in ("two#1", "two#2"))
    assert first.max() < 4 < second.min()


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
@pytest.mark.parametrize("height", [None, 24, 10])
def test_table_fits_the_terminal(tmp_path, width, height):
    """A line longer than the terminal wraps and breaks the table; more rows than lines scroll it away."""
    for i in range(30):
        name = f"lrmul-1-1.52-1.73-1-cd0.55-spectral_lr_0.{i}-20260206-233406-seed{i}"
        write(tmp_path, name, make_log(name, i, num_steps=STEPS, end=100, end_event=""))
    monitor = Monitor(tmp_path)
    lines = shown(monitor.poll(), monitor, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) == 32 if height is None else len(lines) <= height
    assert all(word in lines[1] for word in ("run", "state", "val loss"))
    assert height is None or lines[-1] == f"and {30 - (len(lines) - 3)} running more"
    if width >= 120:
        assert all(word in lines[1] for word in ("seed", "progress", "train", "ms/step", "left"))


def test_table_of_short_names_fits_any_terminal(tmp_path):
    """Wrong if the name's column grows after the others have been fitted."""
    write(tmp_path, "a", make_log("a", 1, num_steps=STEPS, end=100, end_event=""))
    monitor = Monitor(tmp_path)
    rows = monitor.poll()
    for width in range(40, 160):
        assert max(map(len, shown(rows, monitor, width))) <= width


@pytest.mark.parametrize(
    "values, bars", [([3, 2, 1], "█▅▁"), ([1, 1], "▁▁"), ([1], ""), ([], ""), ([math.nan, 2, 1], "█▁")]
)
def test_sparkline(values, bars):
    assert monitor_runs.sparkline(values, 10) == bars


def test_sparkline_samples_to_its_width():
    bars = monitor_runs.sparkline(range(1000), 8)
    assert bars == "▁▂▃▄▅▆▇█" and bars.translate(monitor_runs.PLAIN).isascii()


def test_progress():
    assert monitor_runs.progress(0.5, 8).translate(monitor_runs.PLAIN) == "####...."
    assert monitor_runs.progress(0, 4).translate(monitor_runs.PLAIN) == "...."
    assert monitor_runs.progress(1.0, 4) == "━━━━"


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_json(tmp_path, capsys):
    """One list of objects with null for what is unknown: NaN is no JSON, and breaks every other reader."""
    write(tmp_path, "run", make_log("run", 3, num_steps=STEPS))
    write(tmp_path, "new", header("new", num_steps=STEPS))
    assert monitor_runs.main(["--json", "--logs", str(tmp_path)]) == 0
    objects = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    got = {entry["run_id"]: entry for entry in objects}
    assert set(got) == {"run", "new"}
    assert got["run"]["path"] == str(tmp_path / "run.txt") and got["run"]["state"] == "finished"
    assert (got["run"]["step"], got["run"]["num_steps"], got["run"]["seed"]) == (STEPS, STEPS, 3)
    assert (
        got["run"]["val_loss"]
        == got["run"]["best_val_loss"]
        == read_log(tmp_path / "run.txt")[0].final_val_loss
    )
    assert got["new"]["val_loss"] is None and got["new"]["state"] == "running" and got["new"]["step"] == 0


@pytest.mark.parametrize("arguments", [[], ["--once"]])
def test_plain_text_when_not_a_terminal(tmp_path, capsys, arguments):
    """A file or a pipe gets one table, then the end, and no escape codes."""
    write(tmp_path, "run", make_log("run", num_steps=STEPS))
    assert monitor_runs.main(["--logs", str(tmp_path), *arguments]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "run  " in text and "finished" in text


def test_a_poor_terminal(tmp_path):
    """A terminal that has no letters but ASCII: nothing fails, and nothing else is written."""
    write(tmp_path, "run", make_log("run", num_steps=STEPS))
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    command = [sys.executable, str(ROOT / "monitor_runs.py"), "--logs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=env)
    assert done.returncode == 0 and done.stdout.isascii() and b"val loss" in done.stdout and not done.stderr


def test_errors_speak_to_a_person(tmp_path, capsys):
    assert monitor_runs.main(["--logs", str(tmp_path / "nowhere")]) == 2
    assert "say where the logs are with --logs DIR" in capsys.readouterr().err
    assert monitor_runs.main(["--logs", str(tmp_path), "--interval", "0"]) == 2
    assert "--interval 0" in capsys.readouterr().err
    assert monitor_runs.main(["--logs", str(tmp_path)]) == 0
    assert "no logs here yet" in capsys.readouterr().out


def read_terminal(descriptor, until):
    """Text that a program writes to its terminal, until `until` is in it."""
    text, end = "", time.monotonic() + PATIENCE_S
    os.set_blocking(descriptor, False)
    while time.monotonic() < end and until not in text:
        with contextlib.suppress(BlockingIOError):
            text += os.read(descriptor, 65536).decode(errors="replace")
        time.sleep(0.05)
    return text


def test_live_table_follows_and_ends_cleanly(tmp_path):
    """A terminal: redrawn as the log grows; Ctrl-C gives the terminal back and is no error."""
    log = write(tmp_path, "run", make_log("run", num_steps=STEPS, end=100, end_event=""))
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "120", "LINES": "20", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    command = [sys.executable, str(ROOT / "monitor_runs.py"), "--logs", str(tmp_path), "--interval", "0.1"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests run in the background may ignore it
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, preexec_fn=heed)
    try:
        first = read_terminal(ours, "100/200")
        assert "100/200" in first and "\x1b[?1049h" in first  # the alternate screen
        with log.open("a") as file:
            file.write(step_lines(num_steps=STEPS, begin=101, end=150))
        assert "150/200" in read_terminal(ours, "150/200")
        process.send_signal(signal.SIGINT)
        last = read_terminal(ours, "\x1b[?1049l")
        assert process.wait(PATIENCE_S) == 0 and "\x1b[?1049l" in last and "Traceback" not in last
        assert re.search("\x1b\\[\\?25h", last)  # the cursor is back
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


# ------------------------------------------------------------------------------------------------
# Cost
# ------------------------------------------------------------------------------------------------


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    """Else a look at a thousand logs takes as long as the first, which reads them all."""
    text = make_log("x", num_steps=STEPS)
    for i in range(100):
        (tmp_path / f"run{i:03}.txt").write_text(text.replace('"run_id": "x"', f'"run_id": "run{i:03}"'))
    write_manifest(tmp_path, "base", [planned(f"run{i:03}", "base", i) for i in range(100)])
    monitor = Monitor(tmp_path)
    rows = monitor.poll()
    assert len(rows) == 100 and {row.state for row in rows} == {"finished"}

    read, made, manifests = [], [], []

    def watch(owner, name, calls):
        function = getattr(owner, name)

        def watched(*arguments):
            calls.append(arguments[-1])
            return function(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(run_log.LogParser, "feed", read)
    watch(monitor_runs, "row_of", made)
    watch(manifest, "read_manifest", manifests)
    for number in (50, 51):
        line = "event:resumed step:200\n"
        with (tmp_path / f"run{number:03}.txt").open("a") as file:
            file.write(line)
        read.clear(), made.clear()
        rows = monitor.poll()
        assert read == [line.encode()] and [run.run_id for run in made] == [f"run{number:03}"]
        assert (
            by_name(rows)[f"run{number:03}"].state == "running" and len(shown(rows, monitor, 160, 50)) <= 50
        )
    assert not manifests
    write_manifest(tmp_path, "base", [planned("run000", "other")])
    assert by_name(monitor.poll())["run000"].tag == "other" and len(manifests) == 1
