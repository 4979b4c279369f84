"""monitor_runs: the table is right, plain text where needed, and cheap for a thousand logs."""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from logs_for_tests import SEPARATOR, SOURCE, hash_of, header, make_log, step_lines
from rich.console import Console
from sweeps_for_tests import make_sweep

import monitor_runs
from analysis import run_log
from analysis.manifest import Manifest, Run, manifest_path
from analysis.run_log import read_log
from monitor_runs import Monitor

ROOT = Path(monitor_runs.__file__).parent
STEPS = 200
PATIENCE_S = 180  # timeout of waits


def write(folder, name, text, age_s=0.0):
    """Write a log with an age of `age_s` seconds."""
    path = folder / f"{name}.txt"
    path.write_text(text)
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def by_name(rows):
    return {row.run.run_id: row for row in rows}


def records(monitor):
    """Return the shown record of each run."""
    return {row.run.run_id: Namespace(**monitor_runs.record_of([row], False)) for row in monitor.poll()}


def shown(monitor, width=160, height=sys.maxsize, **options):
    """Return the lines of the table."""
    options = Namespace(**{"arms": False, "by_loss": False, "filter": "", **options})
    table = monitor_runs.display(monitor, monitor.poll(), options, width, height)
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


def test_states(tmp_path):
    """Fails if a state does not follow from its evidence; only silence makes a running run stalled."""
    half = {"num_steps": STEPS, "end": 100}
    write(tmp_path, "runs", make_log("runs", end_event="", **half), age_s=10)
    write(tmp_path, "stalls", make_log("stalls", end_event="", **half), age_s=1000)
    write(tmp_path, "ends", make_log("ends", num_steps=STEPS), age_s=5000)
    lasts = dict(crashes="crashed error:no memory: 5 GiB", diverges="diverged step:100", stops="stopped")
    for name, event in lasts.items():
        write(tmp_path, name, make_log(name, end_event=f"event:{event}", **half), 5000)
    write(tmp_path, "compiles", header("compiles", num_steps=STEPS), age_s=1000)  # compiling takes minutes
    slow = make_log("slow", end_event="", ms=60_000.0, **half)  # a minute per step: 1000 s are not silence
    write(tmp_path, "slow", slow, age_s=1000)
    monitor = Monitor(tmp_path, stalled_after=300)
    rows = monitor.poll()
    ended = dict(ends="finished", crashes="crashed", diverges="diverged", stops="stopped")
    under_way = dict(runs="running", stalls="stalled", compiles="running", slow="running")
    assert {row.run.run_id: row.state for row in rows} == {**ended, **under_way}
    # running runs come first, by name, so that lines stay in place; then the latest to end
    assert [row.run.run_id for row in rows[:4]] == ["compiles", "runs", "slow", "stalls"]
    text = "\n".join(shown(monitor))
    assert "seed 1 crashed: no memory: 5 GiB" in text and "seed 1 diverged: step 100" in text
    assert "seed 1 stalled: no line for" in text


def test_numbers_of_a_run(tmp_path):
    """Fails if losses, speed or time left are not the log's; speed is that of its last lines."""
    text = header("run", 7, num_steps=1600) + step_lines(7, end=1000, ms=50.0)
    # The last stage is twice as slow: the run's average speed would predict the end too early.
    text += "".join(
        f"step:{step}/1600 train_loss:3.5 train_time:{50_000 + (step - 1000) * 100}ms step_avg:50.00ms "
        f"tokens:{10_000_000 + (step - 1000) * 4096}\n"
        for step in range(1001, 1101)
    )
    write(tmp_path, "run", text)
    monitor = Monitor(tmp_path)
    row, run = records(monitor)["run"], read_log(tmp_path / "run.txt")[0]
    assert (row.seed, row.step, row.num_steps, row.val_step) == (7, 1100, 1600, 1000)
    assert (row.val_loss, row.best_val_loss, row.train_loss) == (run.final_val_loss, run.best_val_loss, 3.5)
    assert row.ms_per_step == 100 and row.tokens_per_s == pytest.approx(40_960)
    assert row.seconds_left == pytest.approx(50) and row.train_time_s == pytest.approx(60)
    line = shown(monitor)[2]
    assert all(text in line for text in ("1100/1600", f"{run.final_val_loss:.4f}", "50.0 s", "40960"))
    write(tmp_path, "run", make_log("run", num_steps=STEPS, end_event=""))
    assert "running" in shown(monitor)[2] and "0 ms" not in shown(monitor)[2], "its last validation is left"


def test_memory_and_use_of_the_gpu_where_they_are_logged(tmp_path):
    """Their columns exist if a run logs them, and take no room otherwise."""
    extra = " peak_mem_mb:33012 mfu:0.412 grad_norm:0.731"
    write(tmp_path, "old", make_log("old", num_steps=STEPS))
    names = ("peak MiB", "MFU", "grad norm")
    assert not any(name in shown(Monitor(tmp_path), 250)[1] for name in names)
    write(tmp_path, "new", re.sub("( val_loss:.*)", rf"\1{extra}", make_log("new", 2, num_steps=STEPS)))
    lines = shown(Monitor(tmp_path), 250)
    assert all(name in lines[1] for name in names)
    found = {line.split()[2]: line.split()[-3:] for line in lines[2:]}  # by seed
    assert found == {"1": ["-", "-", "-"], "2": ["33012", "0.412", "0.731"]}


def planned(run_id, tag, seed=1, **more):
    """Make a manifest's run."""
    return Run(run_id, tag, "train_gpt.py", seed, {}, "", "", **more)


def write_manifest(folder, control, runs, versus=None, name="lr"):
    Manifest(manifest_path(name, folder), control=control, versus=versus or {}, runs=runs).save()


def test_difference_to_the_control(tmp_path):
    """Fails if it is not at the same step and seed: every running run would look worse than its control."""
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
    rows = records(monitor)
    runs = {name: read_log(tmp_path / f"{name}.txt")[0] for name in rows}
    at = runs["c2"].val.step.tolist().index(100)
    assert rows["t2"].difference == runs["t2"].val.loss[-1] - runs["c2"].val.loss[at]
    assert rows["t2"].control == "c2" and (rows["t2"].sweep, rows["t2"].tag) == ("lr", "test")
    mean = np.mean([runs["c1"].final_val_loss, runs["c2"].final_val_loss])
    assert rows["t9"].difference == pytest.approx(runs["t9"].final_val_loss - mean)
    assert rows["t9"].control == "c1, c2"
    assert rows["c1"].is_control and math.isnan(rows["c1"].difference)
    text = "\n".join(shown(monitor, width=1000))
    assert "\nsweep lr: 1 run without a log: 1 planned" in text
    assert all(f"{name}.sweep.json is not a sweep's manifest" in text for name in ("broken", "odd"))
    assert f"{rows['t2'].difference:+.4f}" in text and "\ntest " in text
    (tmp_path / "lr.sweep.json").unlink()
    rows = records(Monitor(tmp_path, control="c"))
    assert rows["t2"].control == "c2" and rows["c1"].is_control
    assert math.isnan(records(Monitor(tmp_path))["t2"].difference)


def test_difference_to_an_arm_of_its_own(tmp_path):
    """An arm's own control takes precedence over the sweep's, whose rows keep theirs."""
    members = [planned("c1", "base"), planned("f1", "fast"), planned("t1", "test")]
    for run in members:
        write(tmp_path, run.run_id, make_log(run.run_id, 1, num_steps=STEPS))
    write_manifest(tmp_path, "base", members, versus={"test": "fast"})
    rows = records(Monitor(tmp_path))
    assert [rows[name].control for name in ("c1", "f1", "t1")] == ["", "c1", "f1"]
    assert rows["c1"].is_control and not rows["f1"].is_control
    write_manifest(tmp_path, "base", members, versus={"test": "gone"})
    assert math.isnan(records(Monitor(tmp_path))["t1"].difference)


def test_the_launcher_knows_of_killed_runs(tmp_path):
    """A killed process leaves a log that says it is running; the manifest says how it ended."""
    for name in ("killed", "hangs", "runs"):
        write(tmp_path, name, make_log(name, num_steps=STEPS, end=100, end_event=""))
    runs = [planned("killed", "a", state="crashed", reason="killed by signal 9")]
    runs += [planned("hangs", "a", state="hung"), planned("runs", "a", state="running")]
    write_manifest(tmp_path, None, runs)
    monitor = Monitor(tmp_path)
    rows = by_name(monitor.poll())
    states = {name: row.state for name, row in rows.items()}
    assert states == {"killed": "crashed", "hangs": "crashed", "runs": "running"}
    text = "\n".join(shown(monitor))
    assert "a seed 1 crashed: killed by signal 9" in text and "a seed 1 crashed: launcher: hung" in text


def test_runs_that_ended_before_their_logs_began(tmp_path):
    """Fails if a run that left no log, or only some of its source code, is not seen to have failed."""
    write(tmp_path, "empty", "")
    write(tmp_path, "cut", SOURCE[:40])
    write(tmp_path, "runs", make_log("runs", 4, num_steps=STEPS, end=100, end_event=""))
    write(tmp_path, "packed", "").rename(tmp_path / "packed.txt.xz")
    failed = {"state": "crashed", "reason": "killed by signal 9"}
    runs = [planned("empty", "a", 1, **failed), planned("cut", "a", 2, **failed), planned("runs", "a", 4)]
    runs += [
        planned("none", "b", 3, state="refused", reason="MUON_LR is -1"),
        planned("packed", "c", **failed),
    ]
    for run in runs:
        run.source_hash = hash_of(SOURCE)
    write_manifest(tmp_path, None, runs)
    monitor = Monitor(tmp_path)
    found = {name: (row.name, row.seed, row.state) for name, row in records(monitor).items()}
    ended = {"empty": ("a", 1, "crashed"), "cut": ("a", 2, "crashed")}
    assert found == {**ended, "runs": ("a", 4, "running")}
    lines = shown(monitor)
    assert {f"a seed {seed} crashed: killed by signal 9" for seed in (1, 2)} <= set(lines)
    ended = "sweep lr: 1 run without a log: 1 refused; b seed 3 refused: MUON_LR is -1"
    assert ended in lines and not any(line.startswith("c ") for line in lines)


def test_runs_without_a_log_are_one_line(tmp_path):
    """Fails if the runs of a sweep whose logs were deleted flood the table, or some are not counted."""
    lost = [planned(f"old{seed}", "o", seed, state="diverged") for seed in range(9)]
    write_manifest(tmp_path, None, lost, name="old")
    failed = [planned(f"a{seed}", "a", seed, state="refused", reason="MUON_LR is -1") for seed in (1, 2, 3)]
    failed = [planned("b2", "b", 2, state="stopped", reason="by SIGINT"), *failed, planned("b1", "b", 1)]
    write_manifest(tmp_path, None, failed)
    write(tmp_path, "b1", make_log("b1", 1, num_steps=STEPS))
    (tmp_path / "broken.sweep.json").write_text("{")
    monitor = Monitor(tmp_path)
    *notes, error, without = monitor.notes(monitor.poll())
    counts = "sweep lr: 4 runs without a log: 1 stopped, 3 refused"
    assert without == f"{counts}; a seed 1 refused: MUON_LR is -1"
    assert "broken.sweep.json" in error and not notes
    lost[0] = planned("old0", "o", 0)  # still to come: the sweep is no old one
    write_manifest(tmp_path, None, lost, name="old")
    monitor = Monitor(tmp_path)
    counts = "sweep old: 9 runs without a log: 1 planned, 8 diverged"
    assert counts in monitor.notes(monitor.poll())
    lost[0] = planned("old0", "o", 0, state="diverged")
    write_manifest(tmp_path, None, lost, name="old")
    monitor = Monitor(tmp_path / "old.sweep.json")
    assert monitor.notes(monitor.poll())[1:] == ["sweep old: 9 runs without a log: 9 diverged"]


@pytest.mark.parametrize("time, state", [("13:00:01+0100", "running"), ("11:59:59+0000", "stopped")])
def test_a_run_of_a_stopped_sweep_that_is_resumed_is_running(tmp_path, time, state):
    """Fails if the manifest's old state hides a run resumed by hand, or a later end is overlooked."""
    event = f"event:stopped\nevent:resumed step:100/{STEPS} path:x time:2026-02-06T{time}"
    write(tmp_path, "a", make_log("a", num_steps=STEPS, end=100, end_event=event))
    write_manifest(tmp_path, None, [planned("a", "a", state="stopped", ended="2026-02-06T12:00:00+00:00")])
    assert records(Monitor(tmp_path))["a"].state == state


def test_garbage_and_empty_logs_are_rows(tmp_path):
    (tmp_path / "garbage.txt").write_bytes(bytes(range(256)) * 20 + b"\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "note.md").write_text("not a log")
    monitor = Monitor(tmp_path)
    rows = records(monitor)
    assert set(rows) == {"garbage", "empty"} and rows["garbage"].unread_lines > 0
    assert "could not be read in 1 log, " in "\n".join(shown(monitor))


def test_trials_of_one_file_have_their_own_curves(tmp_path):
    trial = "".join(f"step:{s}/90 val_loss:{{}}{s} train_time:{s}ms\n" for s in range(0, 91, 10))
    write(tmp_path, "two", trial.replace("{}", "3.1") + trial.replace("{}", "4.9"))
    rows = records(Monitor(tmp_path))
    assert rows["two#1"].best_val_loss < 4 < rows["two#2"].best_val_loss


# ------------------------------------------------------------------------------------------------
# Sweeps and arms
# ------------------------------------------------------------------------------------------------


def test_a_sweep_alone(tmp_path, monkeypatch, capsys):
    """Fails unless exactly the sweep's planned runs are shown, with those that another launch adds."""
    file = make_sweep(tmp_path, "lr", {"base": (3.27, {}), "high": (3.3, {"MUON_LR": 1})}, seeds=(1, 2))
    logs = tmp_path / "logs"
    write(logs, "other", make_log("other", num_steps=STEPS))
    monitor = Monitor(file, logs=logs)
    assert sorted(row.name for row in monitor.poll()) == ["base", "base", "high", "high"]
    assert len(Monitor(logs).poll()) == 5
    make_sweep(tmp_path, "lr", {"base": (3.27, {})}, seeds=(3,))
    assert [(row.name, row.run.seed) for row in monitor.poll()] == [("base", 3)]
    (tmp_path / "sweeps" / "new.toml").write_text("")
    new = Monitor(tmp_path / "sweeps" / "new.toml", logs=logs)
    assert "new.sweep.json yet: launch the sweep" in "\n".join(shown(new))
    monkeypatch.chdir(tmp_path)
    assert monitor_runs.main(["sweeps/lr.toml", "--once"]) == 0
    assert ": 1 run (1 finished)" in capsys.readouterr().out


def test_two_sweeps_with_one_tag_are_told_apart(tmp_path):
    for name in ("lr", "decay"):
        write(tmp_path, name, make_log(name, num_steps=STEPS))
        write_manifest(tmp_path, None, [planned(name, "base", state="finished")], name=name)
    monitor = Monitor(tmp_path)
    wanted = [["base", "decay"], ["base", "lr"], ["run", "sweep"]]
    for lines in (shown(monitor, 80), shown(monitor, 80, arms=True)):
        assert sorted(line.split()[:2] for line in lines[1:]) == wanted


def test_logs_alone(tmp_path):
    """Single logs, as the shell expands logs/a*.txt: other runs of their sweep do not count as missing."""
    paths = [write(tmp_path, name, make_log(name, num_steps=STEPS)) for name in ("a1", "a2", "b1")]
    runs = [planned(name, name[0], int(name[1]), state="finished") for name in ("a1", "a2", "b1")]
    write_manifest(tmp_path, None, runs)
    monitor = Monitor(*paths[:2])
    assert sorted(row.run.run_id for row in monitor.poll()) == ["a1", "a2"]
    assert len(shown(monitor)) == 4


def test_arms(tmp_path):
    """An arm's mean is that of its finished runs; a crashed or running run would spoil it."""
    arms = {"base": (3.27, {}), "low": (3.25, {"MUON_LR": 1}), "new": (3.3, {"MUON_LR": 2})}
    ends = {("low", 3): "crashed", ("new", 1): "running", ("new", 2): "running", ("new", 3): "planned"}
    file = make_sweep(tmp_path, "lr", arms, control="base", ends=ends)
    monitor = Monitor(file, logs=tmp_path / "logs")
    rows = {}
    for row in monitor.poll():
        rows.setdefault(row.name, []).append(row)
    found = {name: Namespace(**monitor_runs.record_of(members, True)) for name, members in rows.items()}
    losses = [row.run.final_val_loss for row in rows["low"] if row.state == "finished"]
    assert (found["low"].n, found["low"].state) == (2, "1 crashed, 2 finished")
    assert found["low"].val_loss == pytest.approx(np.mean(losses)) and found["low"].val_step == STEPS
    single = [monitor_runs.record_of([row], False)["difference"] for row in rows["low"]]
    finished = [d for d, row in zip(single, rows["low"], strict=True) if row.state == "finished"]
    assert found["low"].difference == pytest.approx(np.mean(finished)) and found["low"].difference < 0
    assert (found["new"].n, found["new"].val_step) == (2, STEPS // 2)
    assert found["base"].is_control and math.isnan(found["base"].difference)
    lines = shown(monitor, 80, arms=True)
    assert lines[1].split()[:3] == ["run", "n", "state"]
    assert [line.split()[0] for line in lines[2:5]] == [*arms]
    by_loss = shown(monitor, arms=True, by_loss=True)[2:5]
    assert [line.split()[0] for line in by_loss] == ["low", "base", "new"]


def test_runs_of_other_source_code_are_an_arm_of_their_own(tmp_path):
    """Fails if a mean is over runs of an edited trainer and runs of the trainer as it was before."""
    old, new = SOURCE, SOURCE + "# edited\n"
    for number, source in enumerate((old, old, new)):
        text = make_log(f"b{number}", number, num_steps=STEPS, final=3.2 + number, source=source)
        write(tmp_path, f"b{number}", text)
    write(tmp_path, "c", make_log("c", 1, num_steps=STEPS, source=new))
    runs = [planned(f"b{number}", "base", number, state="finished") for number in range(3)]
    write_manifest(tmp_path, None, [*runs, planned("c", "other", 1, state="finished")])
    lines = shown(Monitor(tmp_path), arms=True)
    names = [f"base (source {hash_of(source)[:8]})" for source in (old, new)]
    found = {name: line for name in (*names, "other ") for line in lines if line.startswith(name)}
    assert len(found) == 3 and " 2  2 finished" in found[names[0]] and " 1  1 finished" in found[names[1]]


def test_runs_without_a_seed_have_names_of_their_own(tmp_path):
    """Fails if all runs of a public script, which log no seed, have the name of the first."""
    steps = "".join(f"step:{s}/90 val_loss:3.{s:02d} train_time:{s}ms\n" for s in range(0, 91, 10))
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for number in range(2):
            text = f"{SOURCE}{SEPARATOR}\nRunning\n{SEPARATOR}\n{steps}"
            write(tmp_path / folder, f"run{number}", text)
    assert sorted(row.name for row in Monitor(tmp_path / "a").poll()) == ["run0", "run1"]
    both = Monitor(tmp_path / "a", tmp_path / "b")
    names = sorted(row.name[-6:] for row in both.poll())
    assert names == ["a/run0", "a/run1", "b/run0", "b/run1"]
    (line,) = shown(both, arms=True)[2:]
    assert line.split()[:4] == ["run0", "4", "4", "finished"]


def test_sorted_and_filtered(tmp_path):
    finals = {"a": 3.3, "b": 3.1, "c": 3.2}
    for name, final in finals.items():
        write(tmp_path, name, make_log(name, 1, {"model": name}, num_steps=STEPS, final=final))
    crash = {"end": 50, "end_event": "event:crashed error:no"}
    write(tmp_path, "d", make_log("d", 1, {"model": "d"}, num_steps=STEPS, **crash))
    write(tmp_path, "e", header("e", 1, {"model": "e"}, num_steps=STEPS))
    monitor = Monitor(tmp_path)
    order = [line.split()[0] for line in shown(monitor, by_loss=True)[2:7]]
    assert order == [f"model={name}" for name in "bcade"]
    lines = shown(monitor, filter="crashed")
    assert lines[2].startswith("model=d ") and lines[3:] == ["model=d seed 1 crashed: no"]
    assert "none of them contains 'xyz'" in "\n".join(shown(monitor, filter="xyz"))


def test_messages_are_filtered_like_the_runs(tmp_path):
    """Fails if --filter leaves lines below the table about runs that it hides."""
    runs = [planned("l1", "low"), planned("h1", "high"), planned("l2", "low", 2), planned("l3", "low", 3)]
    runs += [planned("h2", "high", 2, state="refused", reason="no memory")]
    write(tmp_path, "l1", make_log("l1", end_event="event:crashed error:no"))
    write(tmp_path, "h1", make_log("h1", end_event="event:crashed error:no") + "garbage\n")
    write_manifest(tmp_path, None, runs, name="one")
    write_manifest(tmp_path, None, [planned("c1", "c")], name="two")
    monitor = Monitor(tmp_path)
    assert len(shown(monitor)[4:]) == 5
    notes = ["low seed 1 crashed: no", "sweep one: 2 runs without a log: 2 planned"]
    assert shown(monitor, filter="low")[3:] == notes
    refused = "sweep one: 1 run without a log: 1 refused; high seed 2 refused: no memory"
    assert shown(monitor, filter="refused")[2:] == [refused]


def test_the_usage_says_what_is_allowed(capsys):
    """Fails if it offers a sweep beside logs, which is refused."""
    with pytest.raises(SystemExit):
        monitor_runs.main(["--help"])
    assert "[SWEEP.toml | LOG ...]" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
@pytest.mark.parametrize("height", [sys.maxsize, 24, 10])
def test_table_fits_the_terminal(tmp_path, width, height):
    """A line longer than the terminal wraps and breaks the table; surplus rows scroll it away."""
    for i in range(30):
        name = f"lrmul-1-1.52-1.73-1-cd0.55-spectral_lr_0.{i}-20260206-233406-seed{i}"
        write(tmp_path, name, make_log(name, i, num_steps=STEPS, end=100, end_event=""))
    lines = shown(Monitor(tmp_path), width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) == 32 if height == sys.maxsize else len(lines) <= height
    assert all(word in lines[1] for word in ("run", "state", "val loss"))
    assert height == sys.maxsize or lines[-1] == f"and {30 - (len(lines) - 3)} more"
    if width >= 80:
        assert all(word in lines[1] for word in ("seed", "step"))
    if width >= 120:
        assert all(word in lines[1] for word in ("train", "ms/step", "tokens/s", "left", "best"))


def test_tags_are_whole_in_80_columns(tmp_path):
    """Fails if the part that distinguishes the runs is cut out of their names."""
    tags = [f"spectral_lr_0.0{i}-muon_lr_0.023" for i in (1, 2)] + ["baseline"]
    arms = {tag: (3.2 + i / 10, {"MUON_LR": i}) for i, tag in enumerate(tags)}
    ends = {(tag, 2): "running" for tag in tags}
    make_sweep(tmp_path, "lr", arms, seeds=(1, 2), control="baseline", ends=ends)
    lines = shown(Monitor(tmp_path / "logs"), 80)
    assert max(map(len, lines)) <= 80 and all(word in lines[1] for word in ("seed", "val loss", "vs control"))
    assert {line.split()[0] for line in lines[2:8]} == {*tags}


def test_table_of_short_names_fits_any_terminal(tmp_path):
    """Fails if the name column grows after the others have been fitted."""
    write(tmp_path, "a", make_log("a", 1, num_steps=STEPS, end=100, end_event=""))
    monitor = Monitor(tmp_path)
    for width in range(40, 160, 3):
        assert max(map(len, shown(monitor, width))) <= width


def test_locale_c_shows_no_garbage(tmp_path):
    """Python writes UTF-8 in the C locale, which tmux and serial consoles show as garbage."""
    for name in ("a" * 90 + "0", "a" * 90 + "1"):
        write(tmp_path, name, make_log(name, num_steps=STEPS))
    text = "\n".join(shown(Monitor(tmp_path), 100))
    assert text.isascii() and "~" in text


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_json(tmp_path, capsys):
    """One list of objects, with null for unknown values: NaN is not JSON and breaks other readers."""
    write(tmp_path, "run", make_log("run", 3, num_steps=STEPS))
    write(tmp_path, "new", header("new", num_steps=STEPS))
    assert monitor_runs.main(["--json", "--logs", str(tmp_path)]) == 0
    objects = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    got = {entry["run_id"]: entry for entry in objects}
    assert set(got) == {"run", "new"}
    assert got["run"]["path"] == str(tmp_path / "run.txt") and got["run"]["state"] == "finished"
    assert (got["run"]["step"], got["run"]["num_steps"], got["run"]["seed"]) == (STEPS, STEPS, 3)
    final = read_log(tmp_path / "run.txt")[0].final_val_loss
    assert got["run"]["val_loss"] == got["run"]["best_val_loss"] == final
    assert got["new"]["val_loss"] is None and got["new"]["state"] == "running" and got["new"]["step"] == 0


@pytest.mark.parametrize("arguments", [[], ["--once"]])
def test_plain_text_when_not_a_terminal(tmp_path, capsys, arguments):
    """A file or pipe gets a single table without escape codes."""
    write(tmp_path, "run", make_log("run", num_steps=STEPS))
    assert monitor_runs.main(["--logs", str(tmp_path), *arguments]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "run  " in text and "finished" in text


def test_errors_speak_to_a_person(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.txt.xz").write_bytes(b"")
    for arguments, said in (
        ("--logs nowhere", "nowhere; name a folder of logs, logs, or a sweep's file"),
        ("none.toml", "no sweep file"),
        ("none.toml .", "give one sweep, or logs, not both"),
        ("--logs . --interval 0", "--interval 0"),
        ("run.txt.xz", "compressed, so its run is over; plot_loss.py reads it"),
    ):
        assert monitor_runs.main(arguments.split()) == 2 and said in capsys.readouterr().err
    assert monitor_runs.main(["--logs", "."]) == 0 and "no .txt logs here yet" in capsys.readouterr().out


def read_terminal(descriptor, until):
    """Read a program's terminal output until `until` is in it."""
    text, end = "", time.monotonic() + PATIENCE_S
    os.set_blocking(descriptor, False)
    while time.monotonic() < end and until not in text:
        with contextlib.suppress(BlockingIOError):
            text += os.read(descriptor, 65536).decode(errors="replace")
        time.sleep(0.05)
    return text


@pytest.fixture
def terminal():
    """Start the monitor in a 120 x 20 terminal; return its process and our end of the terminal."""
    started = []

    def start(*arguments, **env):
        ours, theirs = pty.openpty()
        resize(ours, 120)
        env = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **env}
        for name in ("COLUMNS", "LINES"):  # set in pytest's processes; rich would trust them
            env.pop(name, None)
        command = [sys.executable, str(ROOT / "monitor_runs.py"), *map(str, arguments), "--interval", "0.1"]
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background tests may ignore it
        before, ends = termios.tcgetattr(theirs), dict(stdin=theirs, stdout=theirs, stderr=theirs)
        process = subprocess.Popen(command, **ends, env=env, preexec_fn=heed)
        started.append((process, ours, theirs, before))
        return process, ours

    yield start
    for process, ours, theirs, before in started:
        try:
            assert process.poll() is not None, "it is still running"
            assert termios.tcgetattr(theirs) == before  # keys are echoed again
        finally:
            process.kill()
            process.wait()
            os.close(ours)
            os.close(theirs)


def resize(descriptor, columns):
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 20, columns, 0, 0))


@pytest.mark.parametrize("end", ["q", signal.SIGINT, signal.SIGTERM])
def test_live_table_follows_and_ends_cleanly(tmp_path, terminal, end):
    """Terminal: redrawn as the log grows; on exit it is restored and keeps the last table, without error."""
    log = write(tmp_path, "run", make_log("run", num_steps=STEPS, end=100, end_event=""))
    process, ours = terminal(tmp_path)
    first = read_terminal(ours, "100/200")
    assert "100/200" in first and "\x1b[?1049h" in first  # the alternate screen
    with log.open("a") as file:
        file.write(step_lines(num_steps=STEPS, begin=101, end=150))
    assert "150/200" in read_terminal(ours, "150/200")
    if end == "q":
        os.write(ours, b"q")
    else:
        process.send_signal(end)
    last = read_terminal(ours, "\x1b[?1049l")
    assert process.wait(PATIENCE_S) == 0
    with contextlib.suppress(BlockingIOError):
        last += os.read(ours, 65536).decode()
    left = last.partition("\x1b[?1049l")[2]
    assert "150/200" in left and "q end" not in left and "Traceback" not in last
    assert re.search("\x1b\\[\\?25h", last)  # the cursor is back


def test_hostile_text_stays_text_in_the_live_table(tmp_path, terminal):
    """Otherwise a log's messages could retitle the terminal, move its cursor or set its colours."""
    attack = "\x1b[2J\x1b]0;title\x07[red]"
    end = f"event:crashed error:{json.dumps(attack)} reason:{attack}"
    write(tmp_path, "run", make_log("run", 1, {"run_id": attack}, num_steps=STEPS, end_event=end))
    process, ours = terminal(tmp_path)
    text = read_terminal(ours, "q end")
    os.write(ours, b"q")
    assert process.wait(PATIENCE_S) == 0
    assert text.count("\ufffd]0;title\ufffd[red]") >= 3 and "\x1b]" not in text and "\x1b[2J" not in text


def test_live_table_heeds_keys_and_the_size_of_the_terminal(tmp_path, terminal):
    for seed in (1, 2):
        write(tmp_path, f"run{seed}", make_log(f"run{seed}", seed, num_steps=STEPS))
    process, ours = terminal(tmp_path, LC_ALL="C")
    first = read_terminal(ours, "q end")
    assert "tokens/s" in first and "2 runs (2 finished)" in first and first.isascii()
    resize(ours, 40)
    os.write(ours, b"a")
    text = read_terminal(ours, "2 finished\x1b[0m")
    assert "tokens/s" not in text.rpartition("\x1b[H")[2]
    os.write(ours, b"q")
    assert process.wait(PATIENCE_S) == 0


# ------------------------------------------------------------------------------------------------
# Cost
# ------------------------------------------------------------------------------------------------


def test_only_logs_that_changed_are_read(tmp_path, monkeypatch):
    """Fails if each refresh of a thousand logs takes as long as the first, which reads them all."""
    text = make_log("x", num_steps=STEPS)
    for i in range(100):
        (tmp_path / f"run{i:03}.txt").write_text(text.replace('"run_id": "x"', f'"run_id": "run{i:03}"'))
    write_manifest(tmp_path, "base", [planned(f"run{i:03}", "base", i) for i in range(100)])
    monitor = Monitor(tmp_path)
    rows = monitor.poll()
    assert len(rows) == 100 and {row.state for row in rows} == {"finished"}

    read = []
    monkeypatch.setattr(run_log, "read_log", lambda path: (read.append(path), read_log(path))[1])
    for number in (50, 51):
        log = tmp_path / f"run{number:03}.txt"
        with log.open("a") as file:
            file.write("event:resumed step:200\n")
        read.clear()
        rows = monitor.poll()
        assert read == [log] and by_name(rows)[log.stem].state == "running"
    shown_of = monitor_runs.record_of
    monkeypatch.setattr(monitor_runs, "record_of", lambda *args: (read.append(args), shown_of(*args))[1])
    read.clear()
    assert len(shown(monitor, 160, 20)) == 20 and len(read) < 20  # logs of hidden runs are not read
    monkeypatch.setattr(Monitor, "_all_rows", lambda monitor: pytest.fail("nothing is new"))
    assert len(monitor.poll()) == 100
    monkeypatch.undo()
    write_manifest(tmp_path, "base", [planned("run000", "other")])
    assert by_name(monitor.poll())["run000"].tag == "other"
