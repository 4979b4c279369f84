"""launch_lr_sweep: plans what the file says, makes each run once, survives trouble, leaves nothing behind.

Most tests use a stand-in for the trainer that starts at once, misbehaves on demand and writes logs in our
format. The launcher runs in this process if possible (`launch`), and in its own where signals or orphans
matter. Two tests run the real trainers.
"""

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import make_tokens, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launches import STAND_IN, TWO_ARMS, alive, planned, sweep_file, with_env
from logs_for_tests import SOURCE, hash_of, make_log, step_lines

import launch_lr_sweep as launcher
from analysis import files, processes, run_environment, sweep_plan
from analysis.manifest import manifest_path
from analysis.run_log import read_log
from analysis.sweep_files import read_sweep
from analysis.sweep_plan import plan_runs
from analysis.trainers import read_trainer
from data import cores
from monitor_runs import Monitor

ROOT = Path(launcher.__file__).parent
PATIENCE_S = 180  # timeout of waits, for a busy machine


def launch_process(*args, grace=10.0, **options):
    """Start the launcher in its own process, in the background, with a grace period for tests."""
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
    """Run the launcher in its own process to its end: (exit code, output)."""
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


# ------------------------------------------------------------------------------------------------
# Done and remaining runs
# ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=st.lists(
        st.tuples(
            st.integers(0, 3),  # which run
            st.sampled_from(["finished", "diverged", "crashed", "hung", "stopped", "submitted", "planned"]),
            st.booleans(),  # is its log still there
            st.sampled_from(["same", "settings", "source"]),
            st.booleans(),  # in `earlier` rather than `runs`
        ),
        max_size=8,
    )
)
def test_only_what_is_missing_or_changed_is_planned(place, history):
    """Fails if a relaunch repeats finished runs, or skips one whose settings, source or log have changed."""
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
    assert [run.run_id in why for run in found.runs] == [which not in done for which in range(4)]
    assert [(run.tag, run.seed) for run in found.runs] == [(run.tag, run.seed) for run in sweep.runs()]
    assert all(Path(found.runs[i].log).exists() for i in done)
    assert len({run.run_id for run in found.runs}) == 4
    started = {f"old{n}" for n, (_, state, *_) in enumerate(history) if state != "planned"}
    assert {run.run_id for run in found.earlier} == started - {run.run_id for run in found.runs}, (
        "no attempt is lost"
    )


def test_dry_run_says_all_and_writes_nothing(place, launch):
    """Fails if printing the plan changes it."""
    text = sweep_file(TWO_ARMS)
    before = sorted(place.rglob("*"))
    done = launch(text, "--dry-run")
    assert done.returncode == 0 and not done.stderr
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in str(path)) == before
    for part in ("2 arms, 4 runs, 4 to run", "base.py seeds 1,2", "SPECTRAL_LR_MUL=0.1", "LR_MULS=1,1.52"):
        assert part in done.stdout, done.stdout


def test_a_console_that_lacks_a_character_shows_a_mark(place):
    """Fails if the launcher crashes on a name that the terminal cannot show."""
    Path("a→b").mkdir()
    sweep = sweep_file(TWO_ARMS, "a→b/trial")
    code, output = launched(sweep, "--dry-run", env={"PYTHONIOENCODING": "latin-1"})
    assert code == 0 and "a?b/trial.toml" in output, output


# ------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------


def test_a_sweep_runs_once_and_only_once(place, launch, monkeypatch):
    """Fails if tools cannot find the runs by the manifest, or a second launch repeats them."""
    for name in ("RANK", "WORLD_SIZE"):  # from a surrounding torchrun; a run with them waits for other ranks
        monkeypatch.setenv(name, "1")
    done = launch(sweep_file(TWO_ARMS))
    assert done.returncode == 0, done.stdout + done.stderr
    ends = re.findall(r"finished after .*; (\d) of 4 ended(, about [\d.]+ m?s left)?", done.stdout)
    assert [number for number, _ in ends] == ["1", "2", "3", "4"] and ends[0][1] and not ends[3][1]
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
[[arms]]
tag = "crash"
BEHAVIOUR = "crash, torn"
[[arms]]
tag = "diverge"
BEHAVIOUR = "diverge"
[[arms]]
tag = "family"
BEHAVIOUR = "family, loose"
[[arms]]
tag = "good"
"""


def test_trouble_is_recorded_and_the_rest_goes_on(place, launch):
    """Fails if one bad run ends the sweep, or readers wait for a log that has ended."""
    at_once = str(min(2, cores.usable_cores()))
    code, output = launched(sweep_file(TROUBLE), "--parallel", at_once, grace=0.3)
    assert code == 1, output
    runs = {run["tag"]: run for run in manifest()["runs"]}
    assert {tag: run["state"] for tag, run in runs.items()} == {
        "crash": "crashed",
        "diverge": "diverged",
        "family": "finished",
        "good": "finished",
    }
    assert runs["diverge"]["exit_code"] == 3
    reasons = {"crash": "out of memory", "diverge": "above DIVERGED_ABOVE"}
    for tag, said in reasons.items():
        assert said in runs[tag]["reason"] and tag in output
    logs = {tag: read_log(run["log"])[0].state for tag, run in runs.items()}
    assert logs == {
        "crash": "crashed",
        "diverge": "diverged",
        "family": "finished",
        "good": "finished",
    }
    text = Path(runs["crash"]["log"]).read_text()
    assert "\nevent:crashed reason:" in text, "not at the end of half a line"
    assert not alive(place), "even what a finished run left behind is gone"

    Path("healed").touch()  # crashed runs are retried; diverged ones would diverge again
    assert launch("trial.toml").returncode == 1, "one of the runs has not finished"
    assert [run["tag"] for run in manifest()["runs"] if run["state"] != "finished"] == ["diverge"]
    assert len(starts()) == 4 + 1
    assert [run["state"] for run in manifest()["earlier"]] == ["crashed"]


def test_a_refused_run_is_the_last_one(place, launch):
    """Fails if the launcher goes on through a night of identical refusals."""
    text = 'script = "base.py"\nseeds = [1, 2, 3]\n[env]\nBEHAVIOUR = "refuse"\n'
    done = launch(sweep_file(text))
    assert done.returncode == 2 and "2 run(s) not started" in done.stdout, done.stdout
    assert [run["state"] for run in manifest()["runs"]] == ["refused", "planned", "planned"]
    assert "multiple of 8" in manifest()["runs"][0]["reason"] and not starts()
    Path("healed").touch()
    sweep_file(text.replace("refuse", "good"))
    assert launch("trial.toml").returncode == 0 and len(starts()) == 3


def test_a_run_that_cannot_be_started_is_recorded(place, launch, monkeypatch):
    """Fails if the manifest calls a run that never started running."""

    def no_memory(*args):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(launcher, "start_process", no_memory)
    done = launch(sweep_file('script = "base.py"\nseeds = [1]\n'))
    assert done.returncode == 1 and states() == {("all", 1): "crashed"}, done.stdout
    assert "Cannot allocate memory" in manifest()["runs"][0]["reason"]


def test_a_refused_resume_is_the_last_one(place, launch):
    """Fails if a crashed run whose resume is refused is reported as crashing again, without the reason."""
    text = 'script = "base.py"\nseeds = [1, 2]\n[env]\nBEHAVIOUR = "crash"\n'
    launch(sweep_file(text))
    first = manifest()["runs"]
    for run in first:
        folder = Path(run["log"]).with_suffix("")
        folder.mkdir()
        (folder / "step_2.pt").touch()
    Path("refusing").touch()
    done = launch("trial.toml")
    assert done.returncode == 2 and "1 run(s) not started" in done.stdout, done.stdout
    run = manifest()["runs"][0]
    assert run["run_id"] == first[0]["run_id"] and run["state"] == "refused"
    assert "multiple of 8" in run["reason"]


def test_a_hung_run_is_stopped_and_tried_again(place, launch, monkeypatch):
    """Fails if a run that hangs blocks its GPU until somebody looks."""
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


def test_a_log_is_read_once_however_long_its_run_takes(place, launch, monkeypatch):
    """Fails if the launcher parses growing logs five times a second, or stops a slow run that does log."""
    reads, looks, look_after = [], [], launcher.Launcher.look_after

    def look(self, job):
        looks.append(job)
        self.hang_s = 2 if starts("stepped") else 0
        look_after(self, job)

    monkeypatch.setattr(launcher.Launcher, "look_after", look)
    monkeypatch.setattr(launcher, "read_log", lambda path: (reads.append(path), read_log(path))[1])
    text = 'script = "base.py"\nseeds = [1]\n[env]\nSTEP_SECONDS = 0.4\nNUM_SCHEDULED_ITERATIONS = 8\n'
    assert launch(sweep_file(text)).returncode == 0
    (run,) = manifest()["runs"]
    assert run["state"] == "finished" and len(looks) > 5 and reads == [run["log"]]


def test_descendants_are_found_without_environment_or_group(place):
    """Fails if a helper started with a clean environment keeps training after Ctrl-C."""
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
    """Fails if a launcher that runs for days fills the process table with zombies."""
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
    """Fails if results of another training are shown under the new settings."""
    assert launch(sweep_file(TWO_ARMS)).returncode == 0
    sweep_file(TWO_ARMS.replace("SPECTRAL_LR_MUL = 0.1", "SPECTRAL_LR_MUL = 0.2"))
    done = launch("trial.toml")
    assert "2 to run" in done.stdout and "2 (SPECTRAL_LR_MUL changed)" in done.stdout and len(starts()) == 6
    sweep_file(TWO_ARMS)  # earlier runs are still done
    assert "0 to run" in launch("trial.toml").stdout and len(starts()) == 6
    Path(manifest()["runs"][0]["log"]).unlink()
    assert "1 (log is gone)" in launch("trial.toml").stdout and len(starts()) == 7
    new_setting = '\nKNOBS.append(("NEW_LR", "float", 0.1, {}))\n\n\ndef print_settings'
    Path("base.py").write_text(STAND_IN.replace("\n\ndef print_settings", new_setting, 1))
    read_trainer.cache_clear()
    done = launch("trial.toml")
    assert "2 (source code changed)\n2 of these had finished" in done.stdout and len(starts()) == 9
    assert {run["tag"] for run in manifest()["runs"][0::2]} == {"base"}
    read_trainer.cache_clear()
    Path("base.py").write_text(STAND_IN)
    sweep_file(with_env("COOLDOWN_FRAC = 0.5\nLR_MULS = [1, 1.6]\nTARGET_LOSS = 3"))
    said = "2 (COOLDOWN_FRAC, LR_MULS, source code changed), 2 (COOLDOWN_FRAC, LR_MULS changed)"
    plan = launch("trial.toml", "--dry-run").stdout
    read_trainer.cache_clear()
    assert said in plan and "4 of these had finished: from the launch on" in plan


def test_a_trainer_that_changes_during_a_sweep_is_named(place, launch, monkeypatch):
    """Fails if runs of the trainer as it was then count as runs of today's, or the reverse."""
    say_end = launcher.Launcher.say_end

    def edit_after_the_first(self, run, loss, seconds):
        say_end(self, run, loss, seconds)
        Path("base.py").write_text(STAND_IN + "# a change\n")

    monkeypatch.setattr(launcher.Launcher, "say_end", edit_after_the_first)
    done = launch(sweep_file('script = "base.py"\nseeds = [1, 2]\n'))
    assert done.returncode == 0 and "base.py changed during the sweep" in done.stdout, done.stdout
    for code, seed in ((STAND_IN, 2), (STAND_IN + "# a change\n", 1)):
        Path("base.py").write_text(code)
        read_trainer.cache_clear()
        plan = launch("trial.toml", "--dry-run").stdout
        assert "again: 1 (source code changed)" in plan and f"-seed{seed}-" in plan.splitlines()[-1], plan
    done = launch("trial.toml")
    read_trainer.cache_clear()
    assert "changed" not in done.stdout.splitlines()[-1] and len(starts()) == 3


def test_what_was_recorded_otherwise_is_named_and_not_run_again(place, launch):
    """Fails if another target line for plots repeats all runs, or logs of the old one are not named."""
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
    """Fails if an interruption loses finished runs, or leaves one running beside the next launch."""
    text = TWO_ARMS.replace("SPECTRAL_LR_MUL = 0.1", 'SPECTRAL_LR_MUL = 0.1\nBEHAVIOUR = "hang"')
    process = launch_process(sweep_file(text), grace=0.3)
    wait_for(lambda: len(starts("stepped")) == 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    if number != signal.SIGKILL:
        assert not alive(place), "a process is left behind"
        assert list(states().values()) == ["finished", "stopped", "planned", "planned"]
    wait_for(lambda: not alive(place))  # after SIGKILL, the kernel signals our children
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
    """Fails if a reader disturbs the run it watches, or sees half of a line being written."""
    text = TWO_ARMS.replace("[env]", '[env]\nBEHAVIOUR = "gate"')
    process, monitor, seen = launch_process(sweep_file(text)), Monitor(Path("logs")), set()
    while process.poll() is None:
        for row in monitor.poll():
            begun = row.run.num_steps is not None  # else its log has no whole line yet
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
    """Fails if `| tee` or a lost ssh connection crashes the launcher before it has stopped its runs."""
    process = launch_process(sweep_file(HANGING), grace=0.3)
    wait_for(lambda: len(starts("stepped")) == 1)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE_S) == 130
    assert not alive(place) and states()["base", 1] == "stopped"


def test_what_outlives_a_killed_launcher_is_stopped_by_the_next(place, launch, monkeypatch):
    """Fails if two processes train on the same GPU, one of them unnoticed."""
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_only_its_own_processes_are_stopped(place, number):
    """Fails if a launch stops a run that was resumed by hand, or whatever else has its RUN_ID."""
    process = launch_process(sweep_file(HANGING.replace("[1, 2]", "[1]")), grace=0.3)
    wait_for(lambda: len(starts("stepped")) == 1)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_S)
    wait_for(lambda: not alive(place))
    run = manifest()["runs"][0]
    code = "import fcntl, sys, time; log = open(sys.argv[1], 'a'); fcntl.flock(log, fcntl.LOCK_EX); "
    code += "print('locked', flush=True); time.sleep(60)"
    by_hand = subprocess.Popen(
        [sys.executable, "-c", code, run["log"]],
        env={**os.environ, "RUN_ID": run["run_id"]},
        stdout=subprocess.PIPE,
    )
    by_hand.stdout.readline()
    Path("healed").touch()
    _, output = launched("trial.toml")
    assert f"running already, not started again: {run['run_id']}" in output
    assert by_hand.poll() is None and list(states().values()) == ["running", "finished"]
    assert "reason:its launcher" not in Path(run["log"]).read_text()
    by_hand.kill()
    by_hand.communicate()


def test_a_run_that_finished_after_its_launcher_died_counts(place, launch):
    """Fails if eight GPUs repeat an hour of finished work."""
    text = 'script = "base.py"\nseeds = [1]\n[env]\nBEHAVIOUR = "stubborn"\nSTEP_SECONDS = 0.1\n'
    process = launch_process(sweep_file(text))
    wait_for(lambda: len(starts()) == 1)
    process.kill()
    process.communicate()
    wait_for(lambda: len(starts("end")) == 1 and not alive(place))
    done = launch("trial.toml")
    assert done.returncode == 0 and "0 to run" in done.stdout and len(starts()) == 1
    assert states() == {("all", 1): "finished"}


@pytest.mark.parametrize("state", ["crashed", "hung", "stopped", "diverged"])
@pytest.mark.parametrize("end", ["finished", "diverged"])
def test_a_run_that_was_resumed_by_hand_to_its_end_counts(place, state, end):
    """Fails if the manifest, which saw the run end before, has it made again."""
    sweep = read_sweep(sweep_file('script = "base.py"\nseeds = [1]\n'), None)
    found, _ = planned(sweep)
    (run,) = found.runs
    text = make_log(run.run_id, 1, num_steps=20, end=10, end_event="event:crashed")
    text = text.replace(hash_of(SOURCE), run.source_hash) + "event:resumed step:10\n"
    Path("logs").mkdir()
    Path(run.log).write_text(text + step_lines(1, 20, begin=11) + f"event:{end}\n")
    hour_ago = time.time() - 3600  # else it is taken for one that is being written
    os.utime(run.log, (hour_ago, hour_ago))
    run.state, run.exit_code, run.reason, run.ended = state, 1, "out of memory", "2026-02-06T23:34:06+00:00"
    found.save()
    again, why = plan_runs(sweep, 30, act=True)
    assert not why and again.runs[0].state == end
    if state != end:
        assert again.runs[0].reason == "" and again.runs[0].ended > run.ended


def test_a_run_on_a_cluster_counts_with_the_source_it_had(place):
    """Fails if a trainer that was edited after --slurm, before its job ran, counts as the planned one."""
    sweep = read_sweep(sweep_file('script = "base.py"\nseeds = [1]\n'), None)
    found, _ = planned(sweep)
    (run,) = found.runs
    Path("logs").mkdir()
    Path(run.log).write_text(make_log(run.run_id, 1, num_steps=20))
    hour_ago = time.time() - 3600  # else it is taken for one that is being written
    os.utime(run.log, (hour_ago, hour_ago))
    run.state = "submitted"
    found.save()
    again, why = plan_runs(sweep, 30, act=True)
    assert list(why.values()) == ["source code changed"] and again.earlier[0].source_hash == hash_of(SOURCE)


def test_a_run_under_way_counts_with_the_source_it_has(place):
    """Fails if a run that a job makes with today's trainer, planned with an older one, is made twice."""
    sweep = read_sweep(sweep_file('script = "base.py"\nseeds = [1]\n'), None)
    found, _ = planned(sweep)
    (run,) = found.runs
    Path("logs").mkdir()
    text = make_log(run.run_id, 1, num_steps=20, end=10, end_event="")
    Path(run.log).write_text(text.replace(hash_of(SOURCE), run.source_hash))
    run.state, run.source_hash = "submitted", "0" * 16
    found.save()
    with open(run.log) as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        again, why = plan_runs(sweep, 30, act=True)
    assert not why and again.runs[0].state == "running"


@pytest.mark.parametrize("minutes, runs_on", [(30, False), (90, True), (0, True)])
def test_a_silent_run_on_another_machine_runs_until_the_limit(place, launch, minutes, runs_on):
    """Fails if a second run is made beside it, as 0 means never, or if the plan counts it as done."""
    sweep = read_sweep(sweep_file('script = "base.py"\nseeds = [1, 2]\n'), None)
    found, _ = planned(sweep)
    run = found.runs[0]
    run.state, run.host = "running", "another machine"
    Path("logs").mkdir()
    Path(run.log).write_text(make_log(run.run_id, 1, num_steps=20, end=10, end_event=""))
    hour_ago = time.time() - 3600
    os.utime(run.log, (hour_ago, hour_ago))
    found.save()
    said = launch("trial.toml", "--dry-run", "--hang-minutes", str(minutes)).stdout
    assert ("running already, not started again" in said) == ("2 runs, 1 to run" in said) == runs_on, said
    assert "done)" not in said


def test_a_resumed_run_does_not_tell_how_long_a_whole_one_takes(place):
    """Fails if a run that had one step left lets an hour look like seconds."""
    found, _ = planned(read_sweep(sweep_file('script = "base.py"\nseeds = [1, 2, 3]\n'), None))
    made = launcher.Launcher(found, found.runs, [None], 1, 0)
    Path("logs").mkdir()
    for before, timed in ((1000, 0), (0, 1)):
        run = made.todo.pop()
        Path(run.log).write_text(make_log(run.run_id, 1, num_steps=20))
        process = subprocess.Popen(["true"])
        process.wait()
        made.jobs.append(launcher.Job(run, process, None, [before, before]))
        made.finish(made.jobs[0])
        assert run.state == "finished" and len(made.seconds) == timed


def test_two_launchers_of_one_sweep_do_not_meet(place, launch):
    """Fails if every run is made twice and the manifests overwrite each other."""
    sweep = read_sweep(sweep_file(TWO_ARMS))
    with launcher.locked(sweep):
        second = launch("trial.toml")
    assert second.returncode == 2 and "another launcher" in second.stderr and not starts()
    assert launch("trial.toml").returncode == 0, "the first has ended"


def overlap(starts, ends):
    """Largest number of runs at once."""
    events = sorted([(line["time"], 1) for line in starts] + [(line["time"], -1) for line in ends])
    return max(np.cumsum([change for _, change in events]))


def test_parallel_runs_have_gpus_of_their_own(place, launch, monkeypatch):
    """Fails if two runs share a GPU, with its memory and time."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-abc")
    read_trainer.cache_clear()
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


def test_cores_are_as_many_as_a_container_may_keep_busy(tmp_path, monkeypatch):
    """Fails if `docker --cpus=4` on 64 cores takes 64 runs at a time, or gives each more than its share."""
    quota = tmp_path / "cpu.max"
    quota.write_text("400000 100000\n")
    monkeypatch.setattr(cores, "Path", lambda name: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    with pytest.raises(ValueError, match="64 runs at a time want 64 CPU cores at least, found 4"):
        run_environment.share_out(64, 0, ())
    slots, _ = run_environment.share_out(2, 0, ())
    assert [len(slot.cores) for slot in slots] == [2, 2] and not set(slots[0].cores) & set(slots[1].cores)


@pytest.mark.skipif(cores.usable_cores() < 2, reason="needs two cores")
def test_parallel_runs_have_cores_of_their_own(place, launch):
    """Fails if two runs share cores, which makes their times meaningless."""
    text = TWO_ARMS.replace("[1, 2]", "[4]").replace("[env]", '[env]\nBEHAVIOUR = "meet at once"')
    assert launch(sweep_file(text), "--parallel", "2").returncode == 0
    a, b = (set(line["cores"]) for line in starts())
    assert a and b and not a & b
    refused = launch("trial.toml", "--parallel", "1000")
    assert refused.returncode == 2 and "1000 runs at a time want 1000 CPU cores" in refused.stderr


def test_torchrun_workers_are_stopped_and_parallel_ones_do_not_meet(place):
    """Fails if Ctrl-C leaves workers training, or ranks of two runs connect to each other."""
    parallel = min(2, cores.usable_cores())
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


def test_slurm_array_runs_what_the_launcher_would(place, launch, monkeypatch):
    """Fails if a cluster trains something else, or the next launch repeats or forgets it."""
    text = TWO_ARMS.replace("LR_MULS = [1, 1.52]", """DATA_PATH = "a b'c $HOME" """)
    done = launch(sweep_file(text), "--slurm", "--parallel", "3")
    assert done.returncode == 0 and "sbatch logs/trial.slurm.sh" in done.stdout and not starts()
    script = Path("logs/trial.slurm.sh").read_text()
    assert "#SBATCH --array=0-3%3\n" in script and "#SBATCH --gpus-per-node=1\n" in script
    assert set(states().values()) == {"submitted"}

    def task(number):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number), "COOLDOWN_FRAC": "0.1", "RANK": "1"}
        return subprocess.run(["bash", "logs/trial.slurm.sh"], env=env, capture_output=True, text=True)

    first = manifest()["runs"]
    monkeypatch.setattr(sweep_plan, "free_stamp", lambda runs: "later")
    assert launch("trial.toml", "--slurm").returncode == 0
    assert manifest()["runs"] == first, "the jobs of the first launch are still queued"
    for number in (0, 1, 2):
        assert task(number).returncode == 0
    assert task(4).returncode == 2
    for run in manifest()["runs"][:3]:
        log = read_log(run["log"])[0]
        assert log.config["settings"]["DATA_PATH"] == "a b'c $HOME" and log.seed == run["seed"]
        assert log.config["settings"]["COOLDOWN_FRAC"] is None, "a setting leaks from sbatch's environment"
        assert Path(run["log"]).with_suffix(".out").exists()
    done = launch("trial.toml")  # one sweep, on either machine
    assert done.returncode == 0 and "1 to run" in done.stdout and len(starts()) == 4
    assert set(states().values()) == {"finished"}
    done = launch("trial.toml", "--slurm")
    assert done.returncode == 0 and "4 finished" in done.stdout and "sbatch" not in done.stdout


def test_missing_data_is_found_before_the_first_run(place, launch):
    """Fails if every run of the sweep starts and fails for lack of data, one by one."""
    text = 'script = "train_gpt.py"\n[env]\nMODEL = "tiny"\nDEVICE = "cpu"\nDATA_PATH = "nowhere"\n'
    done = launch(sweep_file(text))
    assert done.returncode == 2 and "under DATA_PATH='nowhere' matches no file" in done.stderr
    assert not Path("logs").exists()
    done = launch("trial.toml", "--dry-run")
    assert done.returncode == 0 and "before it can run" in done.stdout


def test_a_damaged_manifest_is_not_overwritten(place, launch):
    """Fails if one bad disk block loses the record of a sweep."""
    Path("logs").mkdir()
    Path("logs/trial.sweep.json").write_text('{"runs": [')
    done = launch(sweep_file(TWO_ARMS))
    assert done.returncode == 2 and "move it away" in done.stderr and not starts()
    assert Path("logs/trial.sweep.json").read_text() == '{"runs": ['


def test_manifest_is_whole_at_any_moment(place, monkeypatch):
    """Fails if a reader during a write, or after a crash in one, sees half of it."""
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
# The real trainers
# ------------------------------------------------------------------------------------------------

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
    """Fails if stopping a sweep of long runs discards hours that the trainer has saved."""
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
    """Fails if launcher and trainers do not agree on names, settings, exit codes or logs."""
    text = real_sweep(
        place,
        3,
        """
[[arms]]
tag = "spectral_lr_0"
SPECTRAL_LR_MUL = 0
SPECTRAL_RHO_MODE = "row"
""",
    )
    refused = '[[arms]]\ntag = "refused"\nSPECTRAL_VARIANCE = true\nSPECTRAL_SCALE = "unit"\n'
    accented = '[[arms]]\ntag = "é"\n'
    for arm, said, options in (  # launch and dry run both ask the trainer
        (refused, "SPECTRAL_VARIANCE", ()),
        (accented, "tags name files", ("--dry-run",)),
    ):
        done = launch(sweep_file(text + arm), *options)
        assert done.returncode == 2 and said in done.stderr and not Path("logs").exists()
    done = launch(sweep_file(text.replace("VAL_BATCH_TOKENS = 2048", "")), "--dry-run")
    assert done.returncode == 2 and "VAL_TOKENS=2048 in [env] must be a multiple" in done.stderr
    done = launch(sweep_file(text))
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {run["tag"]: run for run in manifest()["runs"]}
    assert {tag: run["state"] for tag, run in runs.items()} == {
        "baseline_std_0": "finished",
        "spectral_lr_0": "finished",
    }
    base, ord_run = (read_log(runs[tag]["log"])[0] for tag in ("baseline_std_0", "spectral_lr_0"))
    assert (base.seed, base.last_step, base.num_steps) == (3, 3, 3)
    assert base.source_hash == runs["baseline_std_0"]["source_hash"], "the trainer says what it logs"
    np.testing.assert_allclose(base.val.loss, ord_run.val.loss)  # both got seed, data and batch from the file
    done = launch("trial.toml", "--dry-run")
    assert done.returncode == 0 and "0 to run" in done.stdout, done.stdout
    sweep_file(text.replace("seeds = [3]", "seeds = [3, 4]"))
    done = launch("trial.toml", "--dry-run")
    assert "2 to run" in done.stdout, done.stdout
