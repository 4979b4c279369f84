"""Faults of rented machines, injected into real runs: killed and hung ranks, signals, damaged checkpoints,
full disks, vanished data, two runs of one name. tests/README.md has the table of faults and outcomes."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import logs_for_tests
import pytest
import torch
from forked import PATIENCE_S, wait_until
from helpers import BASELINE, ORD, ROOT, base_env, command, losses, make_text, run, train, write_shard
from jobs import Job, events, lines, refusal, run_here
from safetensors.numpy import load_file

import train_gpt
import train_gpt_muon_ord
from analysis.run_log import read_log
from runtime import log_writer, supervise
from runtime.checkpoints import FORMAT, CheckpointError, Origin, set_aside
from runtime.log_writer import BAR, LogWriter, has_begun, logged_config, source_hash, sources
from runtime.settings import SettingsError
from runtime.supervise import StopRequest

EVERY_STATE = dict(  # every kind of optimizer state
    SPECTRAL_SCHEDULE="adaptive", SPECTRAL_VARIANCE=1, GRAD_CLIP=1.0, ADAM_LR=0.008, SPECTRAL_RHO_MODE="row"
)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """Log of an undisturbed 2-rank run."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    train(cwd, shards, "twin", ORD, ranks=2, SAVE_EVERY=6, **EVERY_STATE)
    return cwd / "logs" / "twin.txt"


# ---------------------------------------------------------------------------------------------------
# Killed and resumed
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 13])
def test_killed_at_any_step_and_resumed_ends_with_the_same_digits(undisturbed, shards, tmp_path, step):
    """Fails if the checkpoint lacks any state that the next update depends on."""
    env = base_env(shards, RUN_ID="killed", SAVE_EVERY=2, **EVERY_STATE)
    job = Job(tmp_path, ORD, env, ranks=2, pause_at=(step,))
    job.wait_until_paused()
    job.kill()
    done = run(tmp_path, ORD, {**env, "RESUME": "auto"}, ranks=2)
    assert done.returncode == 0, done.stderr
    assert events(job.log, "resumed") and lines(job.log) == lines(undisturbed)
    assert [r.state for r in read_log(job.log)] == ["finished"]
    before, after = job.log.read_text().split("event:resumed step:")
    at = int(after.split()[0])  # train_time continues, too
    spent = [int(t) for t in re.findall(rf"^step:{at}/.* train_time:(\d+)ms", before, re.M)]
    then = int(re.search(r"^step:.* train_time:(\d+)ms", after, re.M)[1])
    assert then > spent[-1] if at else then == 0  # killed at step 1, before the first checkpoint


EXPERTS = dict(EVERY_STATE, MODEL="moe-tiny", MANIFOLD_EVERY=3, SAVE_EVERY=2, NUM_SCHEDULED_ITERATIONS=8)


@pytest.fixture(scope="module")
def undisturbed_experts(shards, tmp_path_factory):
    """Log of an undisturbed run with experts and a file of spectra."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    train(cwd, shards, "twin", ORD, ranks=2, **EXPERTS)
    return cwd / "logs" / "twin.txt"


def test_experts_and_their_spectra_survive_kills(undisturbed_experts, shards, tmp_path):
    """Fails if torchrun --max-restarts does not resume from the last checkpoint when rank 0, then rank 1, is
    killed, or the other does not name it; or if router noise, optimizer state or spectra then differ."""
    env = base_env(shards, RUN_ID="killed", **EXPERTS)
    job = Job(tmp_path, ORD, env, 2, ("--standalone", "--max-restarts=2"), pause_at=(5, 7))
    for victim in (0, 1):
        job.wait_until_paused()
        os.kill(job.ranks()[victim], signal.SIGKILL)
        job.go_on()
    assert job.end() == 0, job.out.read_text()[-3000:]
    dead = [re.search(r"rank:(\d) .* is gone", event)[1] for event in events(job.log, "crashed")]
    assert dead == ["0", "1"], "not named"
    resumed = [re.search(r"step:(\d+)", event)[1] for event in events(job.log, "resumed")]
    assert resumed == ["4", "6"] and lines(job.log) == lines(undisturbed_experts)
    assert read_log(job.log)[-1].columns["spec_mlp"].value.shape[-1] == 4  # a mean per layer
    most, least = (read_log(job.log)[-1].columns[f"moe_load_{key}"].value for key in ("max", "min"))
    assert most.shape[-1] == least.shape[-1] == 4  # a layer's busiest and idlest expert; even is 2 of 8
    assert (most >= 0.25).all() and (most <= 1).all() and (least <= 0.25).all() and (least >= 0).all()
    spectra = [log.with_suffix(".manifold.jsonl").read_text() for log in (job.log, undisturbed_experts)]
    assert spectra[0] == spectra[1] and spectra[0].count("\n") > 10


@pytest.mark.parametrize(
    "twin, settings, step, ranks",
    [
        ("undisturbed", dict(EVERY_STATE, SAVE_EVERY=6), 6, 0),
        ("undisturbed", dict(EVERY_STATE, SAVE_EVERY=6), 6, 4),
        ("undisturbed_experts", EXPERTS, 4, 0),
    ],
    ids=["one", "four", "experts on one"],
)
def test_resumed_on_another_number_of_ranks(twin, settings, step, ranks, request, shards, tmp_path):
    """Fails if a checkpoint of 2 ranks does not resume on 1 and on 4, equal within rounding."""
    log = request.getfixturevalue(twin)
    path = log.with_suffix("") / f"step_{step:08d}.pt"
    done = run(tmp_path, ORD, base_env(shards, RUN_ID="other", RESUME=path, **settings), ranks)
    assert done.returncode == 0, done.stderr
    validations = losses(tmp_path, "other")
    wanted = losses(log.parent.parent, "twin")[-len(validations) :]
    assert len(validations) == 2 and validations == pytest.approx(wanted, abs=2e-4)


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.fixture
def restored_signals():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_stops_with_a_checkpoint(undisturbed, shards, tmp_path):
    """Fails if the step is not finished and saved with exit code 0, or a resumed run differs. Two signals at
    once, as a rank gets them when Ctrl-C reaches it from both the terminal and torchrun, are one request."""
    env = base_env(shards, RUN_ID="asked", **EVERY_STATE)
    job = Job(tmp_path, ORD, env, pause_at=(3,))
    job.wait_until_paused()
    for number in (signal.SIGINT, signal.SIGTERM):
        job.process.send_signal(number)
    job.go_on()
    assert job.end() == 0, job.out.read_text()
    (stopped,) = events(job.log, "stopped")
    assert re.search("SIG(INT|TERM)", stopped) and read_log(job.log)[-1].state == "stopped"
    done = run(tmp_path, ORD, {**env, "RESUME": "auto"}, ranks=2)
    assert done.returncode == 0, done.stderr
    found = read_log(job.log)[-1]
    twin = read_log(undisturbed)[-1]
    assert found.state == "finished" and found.val.loss == pytest.approx(twin.val.loss, abs=2e-4)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_unless_it_was_ignored(number, restored_signals):
    """Fails if Ctrl-C or a closed terminal ends a run at once, or a closed terminal ends one under nohup."""
    for before, reason in ((signal.SIG_DFL, number.name), (signal.SIG_IGN, "")):
        signal.signal(number, before)
        stop = StopRequest()
        stop.listen()
        os.kill(os.getpid(), number)
        assert stop.reason == reason


@pytest.mark.parametrize("seconds, ended_by", [(4, []), (6, [signal.SIGINT])])
def test_a_later_signal_ends_the_process(seconds, ended_by, monkeypatch, restored_signals):
    """Fails if a second Ctrl-C after a while does nothing, or the two of one Ctrl-C lose the checkpoint."""
    now, sent, stop = [100.0], [], StopRequest()
    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    stop.listen()
    stop.on_signal(signal.SIGTERM, None)
    now[0] += seconds
    stop.on_signal(signal.SIGINT, None)
    assert sent == ended_by and stop.reason == "SIGTERM"
    assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) == bool(ended_by)  # not our handler again


def test_a_signal_to_one_rank_stops_all(shards, tmp_path):
    job = Job(tmp_path, BASELINE, base_env(shards, RUN_ID="one", NUM_SCHEDULED_ITERATIONS=400), ranks=2)
    job.wait_for(r"^step:2/")
    os.kill(job.ranks()[1], signal.SIGTERM)
    assert job.end() == 0, job.out.read_text()
    assert events(job.log, "stopped") and list((tmp_path / "logs" / "one").glob("step_*.pt"))


REHEARSING = """
import sys, time

sys.path.insert(0, {root!r})
import train_gpt as trainer
from runtime import supervise

rehearse = trainer.Run.rehearse


def rehearse_once_asked_to_stop(run):
    if run.start.ranks.rank == 1:
        open("rehearsing", "w").close()
        while not run.session.stop.reason:
            time.sleep(0.02)
    return rehearse(run)


trainer.Run.rehearse = rehearse_once_asked_to_stop
supervise.leave(supervise.main(trainer, sys.argv[1:]))
"""


def test_a_signal_during_the_rehearsal_stops_before_the_first_step(shards, tmp_path):
    """Fails if a signal to one rank during the rehearsal is lost, or a step is trained first.

    That rank enters the trainer's own rehearsal only after the signal, so nothing is compiled.
    """
    script = tmp_path / "rehearsing_train_gpt.py"
    script.write_text(REHEARSING.format(root=str(ROOT)))
    job = Job(tmp_path, script, base_env(shards, RUN_ID="early", COMPILE=1), ranks=2)
    job.wait_until((tmp_path / "rehearsing").exists, "rehearsal")
    os.kill(job.ranks()[1], signal.SIGTERM)
    assert job.end() == 0, job.out.read_text()
    assert "step:0 " in events(job.log, "stopped")[0] and not lines(job.log)


def test_a_run_outlives_its_shell(shards, tmp_path):
    """Fails if `nohup python train_gpt.py &` ends with its shell, as a torchrun worker does with torchrun."""
    env, log = base_env(shards, RUN_ID="nohup"), tmp_path / "logs" / "nohup.txt"
    script = f"{' '.join(command(BASELINE, 0))} >out 2>&1 & while ! test -s {log}; do sleep 0.1; done"
    subprocess.run(["sh", "-c", script], cwd=tmp_path, env=env, check=True, timeout=PATIENCE_S)
    wait_until(lambda: re.search("^event:(finished|stopped|crashed)", log.read_text(), re.M), "last event")
    assert events(log, "finished")


def test_a_finished_run_is_left_alone(shards, tmp_path, monkeypatch, capsys):
    train(tmp_path, shards, "over", NUM_SCHEDULED_ITERATIONS=2)
    before = (tmp_path / "logs" / "over.txt").read_bytes()
    env = base_env(shards, RUN_ID="over", NUM_SCHEDULED_ITERATIONS=2, RESUME="auto")
    monkeypatch.chdir(tmp_path)
    assert supervise.main(train_gpt, [], env) == 0 and "nothing to do" in capsys.readouterr().out
    said = refusal(train_gpt, {**env, "SEED": "7"}, capsys)
    assert "SEED was 0, now 7" in said, "it passes for a run of seed 7"
    assert (tmp_path / "logs" / "over.txt").read_bytes() == before


def test_a_lost_model_is_made_again_from_the_last_checkpoint(shards, tmp_path):
    """Fails if a finished run that lost its model file cannot rebuild it from its last checkpoint."""
    train(tmp_path, shards, "over", NUM_SCHEDULED_ITERATIONS=4, SAVE_EVERY=2)
    log, model = tmp_path / "logs" / "over.txt", tmp_path / "logs" / "over" / "model.safetensors"
    digits, weights = lines(log), load_file(model)
    model.unlink()
    env = base_env(shards, RUN_ID="over", NUM_SCHEDULED_ITERATIONS=4, SAVE_EVERY=2, RESUME="auto")
    done = run(tmp_path, BASELINE, env, ranks=0)
    again = load_file(model) if model.exists() else {}
    assert done.returncode == 0 and again.keys() == weights.keys(), done.stderr
    assert all((again[name] == weights[name]).all() for name in weights)
    assert lines(log) == digits and read_log(log)[-1].state == "finished"


# ---------------------------------------------------------------------------------------------------
# Refusals and fallbacks
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    """Folder with a run, `saved`, killed at step 9, with checkpoints of steps 4 and 8."""
    cwd = tmp_path_factory.mktemp("saved")
    env = base_env(shards, RUN_ID="saved", SAVE_EVERY=4)
    job = Job(cwd, BASELINE, env, pause_at=(9,))
    job.wait_until_paused()
    job.kill()
    return cwd


@pytest.fixture
def copy_of_saved(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def resume_env(shards, **settings) -> dict:
    """Environment that resumes the run `saved`."""
    return base_env(shards, **{"RUN_ID": "saved", "SAVE_EVERY": 4, "RESUME": "auto", **settings})


def resume(cwd, shards, ranks=0, **settings):
    return run(cwd, BASELINE, resume_env(shards, **settings), ranks)


@pytest.fixture
def refused_resume(copy_of_saved, shards, monkeypatch, capsys):
    """Function that tries to resume `saved` in this process with other settings; returns the refusal."""
    monkeypatch.chdir(copy_of_saved)
    return lambda **settings: refusal(train_gpt, resume_env(shards, **settings), capsys)


def test_other_settings_are_refused_with_the_list(copy_of_saved, refused_resume):
    said = refused_resume(MUON_LR=0.5, SEED=3)
    assert "MUON_LR was 0.023, now 0.5" in said and "SEED was 0, now 3" in said
    assert "event:resumed" not in (copy_of_saved / "logs" / "saved.txt").read_text()


def test_another_trainer_is_refused(copy_of_saved, shards, monkeypatch, capsys):
    """Fails if a log goes on with the other twin, whose settings may all be the same or at their defaults."""
    monkeypatch.chdir(copy_of_saved)
    log, folder, env = Path("logs/saved.txt"), Path("logs/saved"), resume_env(shards)
    before, said = log.read_bytes(), "settings: SCRIPT was train_gpt.py, now train_gpt_muon_ord.py. "
    of_ord = {**env, "SPECTRAL_LR_MUL": "0.1"}  # that of the class, not of the preset: no other difference
    branch = {"RUN_ID": "branch", "RESUME": str(folder / "step_00000008.pt")}
    assert said in refusal(train_gpt_muon_ord, {**of_ord, **branch}, capsys)
    for _ in ("with checkpoints", "without"):
        assert said in refusal(train_gpt_muon_ord, of_ord, capsys)
        assert supervise.main(train_gpt_muon_ord, ["--check-settings"], of_ord) == 2
        assert said in capsys.readouterr().err
        assert supervise.main(train_gpt, ["--check-settings"], env) == 0, "the right trainer is refused"
        shutil.rmtree(folder, ignore_errors=True)
    assert log.read_bytes() == before and not Path("logs/branch.txt").exists()
    with run_here(train_gpt_muon_ord, base_env(shards, RUN_ID="ord")):
        pass
    said = refusal(train_gpt, resume_env(shards, RUN_ID="ord"), capsys)
    assert "SCRIPT was train_gpt_muon_ord.py, now train_gpt.py" in said


def test_how_often_to_save_or_validate_may_differ_and_other_code_is_said(copy_of_saved, shards):
    """Fails if such a change is refused. Step 8 is now validated; before the kill it was not."""
    path, log = (copy_of_saved / "logs" / name for name in ("saved/step_00000008.pt", "saved.txt"))
    torch.save({**torch.load(path), "source_hash": "0123"}, path)
    done = resume(copy_of_saved, shards, SAVE_EVERY=2, VAL_LOSS_EVERY=4, TARGET_LOSS=2)
    assert done.returncode == 0, done.stderr
    assert "step:8/14 val_loss" in log.read_text()
    assert "warning: the code is not that of the checkpoint" in done.stdout
    assert "0123" in events(log, "warning")[0]


def test_a_branch_without_a_checkpoint_goes_on_from_the_one_it_began_with(copy_of_saved, shards, monkeypatch):
    """Fails if RESUME=auto silently begins at step 0 a run that was killed between RESUME=PATH and its first
    checkpoint."""
    monkeypatch.chdir(copy_of_saved)
    path = Path("logs/step 8, a copy.pt")
    shutil.copy("logs/saved/step_00000008.pt", path)
    env = resume_env(shards, RUN_ID="branch")
    for wish in (str(path), "auto", "auto"):
        with run_here(train_gpt, {**env, "RESUME": wish}) as start:
            assert (start.origin.path, start.origin.contents["step"]) == (str(path), 8)
    path.unlink()
    with pytest.raises(CheckpointError, match="copy.pt, from which logs/branch.txt resumed, is gone"):
        supervise.prepare(train_gpt, env)


def test_a_branch_killed_at_its_first_write_goes_on_from_the_checkpoint(copy_of_saved, shards, monkeypatch):
    """Fails if the log is written in pieces, the first of which does not say where the run began."""
    monkeypatch.chdir(copy_of_saved)
    begun, env = "logs/saved/step_00000008.pt", resume_env(shards, RUN_ID="branch")
    write = os.write

    def write_and_die(file, data):
        write(file, data)
        raise KeyboardInterrupt

    start = supervise.prepare(train_gpt, {**env, "RESUME": begun})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "write", write_and_die)
        supervise.write_beginning(train_gpt, start)
    os.close(start.log.file)
    with run_here(train_gpt, env) as start:
        assert start.origin.path == begun


@pytest.mark.parametrize("absolute", [False, True])
def test_a_branch_resumed_since_goes_on_from_where_it_branched_off(
    absolute, copy_of_saved, shards, monkeypatch
):
    """Fails if a branch that was resumed from a checkpoint of its own, since removed, silently begins at step
    0, or is refused because that checkpoint is gone."""
    monkeypatch.chdir(copy_of_saved)
    begun, env = "logs/saved/step_00000004.pt", resume_env(shards, RUN_ID="branch")
    with run_here(train_gpt, {**env, "RESUME": begun}):
        pass
    own = Path("logs/branch/step_00000008.pt")
    own.parent.mkdir()
    shutil.copy("logs/saved/step_00000008.pt", own)
    with run_here(train_gpt, {**env, "RESUME": str(own.resolve()) if absolute else "auto"}) as start:
        assert start.origin.contents["step"] == 8
    own.unlink()
    with run_here(train_gpt, env) as start:
        assert (start.origin.path, start.origin.contents["step"]) == (begun, 4)


def test_changed_code_is_said_without_a_checkpoint(shards, tmp_path, monkeypatch, capsys):
    """Fails, too, if the log's source code, which has logs_for_tests in it, is taken for its own lines."""
    assert logs_for_tests.__file__
    monkeypatch.chdir(tmp_path)
    log, env = Path("logs/mine.txt"), base_env(shards, RUN_ID="mine")
    with run_here(train_gpt, env):
        pass
    for hashed, said in ((source_hash(train_gpt.SCRIPT), 0), ("0123", 1)):
        log.write_text(re.sub(r"^(event:.* source_hash):\w+", rf"\1:{hashed}", log.read_text(), flags=re.M))
        with run_here(train_gpt, {**env, "RESUME": "auto"}):
            pass
        assert capsys.readouterr().out.count("warning: the code is not that of the run so far") == said
        assert len(events(log, "warning")) == said
    assert "0123" in events(log, "warning")[0]


def test_going_on_from_an_earlier_step_sets_the_later_ones_aside(copy_of_saved, shards):
    """Fails if a restart can resume from the abandoned step 8, or pruning keeps it as one of the last 2."""
    folder = copy_of_saved / "logs" / "saved"
    done = resume(copy_of_saved, shards, RESUME="logs/saved/step_00000004.pt", SAVE_EVERY=2)
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in folder.glob("step_*"))
    assert names == ["step_00000008.superseded", "step_00000010.pt", "step_00000012.pt"]
    for path in (folder / "step_00000004.pt", folder / "step_00000008.pt"):
        path.touch()
    set_aside(Origin("saved", True, "", {"step": 4}), folder)
    assert (folder / "step_00000008.superseded1").exists(), "the first one was overwritten"


@pytest.mark.parametrize("part", [0, 4, 5000, None])
def test_a_log_that_was_only_begun_does_not_block_its_name(tmp_path, part):
    """Fails if a run killed while writing its header blocks its name."""
    torn = tmp_path / "torn.txt"
    torn.write_bytes((sources() + f"{BAR}\nconfig:{{".encode())[:part])
    log = LogWriter(torn, 0, 9)
    assert not log.existed and torn.read_bytes() == b""
    log.header({"run_id": "torn"}, {"recording": [], "machine": []}, {"run_id": "torn"})
    log.end("finished")
    assert log.close() == 0
    (found,) = read_log(torn)
    assert found.state == "finished" and found.config["run_id"] == "torn"


def test_a_header_cut_anywhere_says_nothing_of_settings(tmp_path):
    """Fails if RESUME=auto is refused for settings of a header that a kill cut short, or cannot read them."""
    log = LogWriter(tmp_path / "whole.txt", 0, 9)
    started = {"run_id": "whole", "time": "now", "script": "x.py", "source_hash": "1"}
    log.header({"model_config": {"width": 8}, "seed": 1}, {"recording": [], "machine": []}, started)
    assert log.close() == 0
    whole = (tmp_path / "whole.txt").read_bytes()
    config = logged_config(tmp_path / "whole.txt")
    assert config == {"model_config": {"width": 8}, "seed": 1, "script": "x.py"}
    cut = tmp_path / "cut.txt"
    for end in range(whole.rindex(b"\nconfig:"), len(whole)):
        cut.write_bytes(whole[:end])
        assert has_begun(cut) or logged_config(cut) == {}


def test_a_line_cut_by_a_crash_is_ended_when_the_run_resumes(tmp_path):
    """Fails if the first line after resuming is glued to the torn one, and so lost to the readers."""
    torn = tmp_path / "torn.txt"
    torn.write_text(f"{BAR}\nevent:started x\n{BAR}\nstep:3/9 train_lo")
    log = LogWriter(torn, 0, 9, go_on=True)
    log.event("resumed", step=2)
    assert log.close() == 0
    assert torn.read_text().endswith("\nstep:3/9 train_lo\nevent:resumed step:2\n")


@pytest.mark.parametrize("text", ["somebody's notes", "# file: a.py, 1 bytes\n\n\nevent:started x\n"])
def test_a_file_that_is_more_than_a_piece_of_a_header_is_not_overwritten(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(SettingsError, match="exists already"):
        LogWriter(path, 0, 9)
    assert path.read_text() == text


def test_a_damaged_checkpoint_is_passed_over_loudly(copy_of_saved, shards):
    """Fails if one flipped bit goes unnoticed, or the fallback is not reported."""
    path = copy_of_saved / "logs" / "saved" / "step_00000008.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = resume(copy_of_saved, shards)
    assert done.returncode == 0, done.stderr
    log = copy_of_saved / "logs" / "saved.txt"
    assert "step_00000008.pt" in events(log, "checkpoint_damaged")[0] and "warning" in done.stdout
    assert "step:4 " in events(log, "resumed")[0]
    assert path.with_suffix(".damaged").exists()


def test_without_a_good_checkpoint_nothing_is_thrown_away(copy_of_saved, refused_resume):
    paths = list((copy_of_saved / "logs" / "saved").glob("step_*.pt"))
    for path in paths:
        path.write_bytes(b"rubbish")
    assert "no checkpoint that can be read" in refused_resume()
    assert all(path.read_bytes() == b"rubbish" for path in paths)


class Runs:
    """Object whose pickle runs code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_strangers_checkpoint_runs_no_code(refused_resume, tmp_path):
    bad, trap = tmp_path / "stranger.pt", tmp_path / "code_was_run"
    torch.save({"format": FORMAT, "config": Runs(trap)}, bad)
    assert "is no checkpoint" in refused_resume(RESUME=str(bad)) and not trap.exists()


def test_a_checkpoint_of_another_run_is_refused(copy_of_saved, shards):
    """Fails if a checkpoint at the last step ends the run untrained, or in a traceback."""
    bad = copy_of_saved / "bad.pt"
    torch.save({**torch.load(copy_of_saved / "logs" / "saved" / "step_00000008.pt"), "step": 14}, bad)
    done = resume(copy_of_saved, shards, RESUME=str(bad))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the checkpoint is of step 14 and this run has 14" in done.stderr


@pytest.mark.parametrize("path", ["nowhere.pt", "logs", "logs/saved.txt", "logs/saved/model.safetensors"])
def test_a_path_that_is_no_checkpoint_is_refused(copy_of_saved, refused_resume, path):
    (copy_of_saved / "logs" / "saved" / "model.safetensors").write_bytes(b"\0" * 100)
    begins = "RESUME: there is no nowhere.pt" if path == "nowhere.pt" else path
    assert refused_resume(RESUME=path).startswith(f"train_gpt.py: {begins}")


def test_a_refusal_of_rank_0_is_said_once_and_ends_all(copy_of_saved, shards):
    done = resume(copy_of_saved, shards, ranks=2, RESUME="logs")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("train_gpt.py: logs is no regular file") == 1


def test_auto_needs_to_know_which_run(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "RUN_ID" in refusal(train_gpt, base_env(shards, RESUME="auto"), capsys)


@pytest.mark.parametrize(
    "name, values, said",
    [
        ("SEED", (0, 1), "the ranks were started with different settings: rank 1 has SEED=1 instead of 0"),
        ("MUON_LR", (0.02, "x"), "MUON_LR='x': wanted finite float"),
    ],
)
def test_machines_with_different_or_bad_settings_are_refused_together(shards, tmp_path, name, values, said):
    """Fails if agents with different seeds train nonsense, or a bad value on one leaves the other waiting.
    Both say why."""
    alone = dict(LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, GROUP_WORLD_SIZE=2)  # on its machine
    envs = [base_env(shards, RUN_ID="nodes", **alone, **{name: value}) for value in values]
    done = run(tmp_path, BASELINE, envs, ranks=2)
    assert done.returncode == 2 and done.stderr.count(said) == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "logs").exists()


# ---------------------------------------------------------------------------------------------------
# A rank dies, hangs or is cut off
# ---------------------------------------------------------------------------------------------------


def test_restarts_do_not_take_an_older_run_of_the_same_name(copy_of_saved, shards):
    """Fails if an existing name is accepted, either at first or by torchrun's second attempt."""
    log = copy_of_saved / "logs" / "saved.txt"
    before = log.read_bytes()
    env = base_env(shards, RUN_ID="saved", SAVE_EVERY=4)
    done = run(copy_of_saved, BASELINE, env, 2, ("--standalone", "--max-restarts=1"))
    assert done.returncode == 1 and done.stderr.count("exists already") == 2
    assert log.read_bytes() == before


def test_a_stopped_rank_is_given_up_in_time(shards, tmp_path):
    """Fails if the others wait forever for a process that hangs (SIGSTOP stands in for a hung GPU)."""
    env = base_env(shards, RUN_ID="hung", NUM_SCHEDULED_ITERATIONS=400, DIST_TIMEOUT=5)
    job = Job(tmp_path, BASELINE, env, ranks=2)
    job.wait_for(r"^step:2/")
    pid = job.ranks()[0]
    os.kill(pid, signal.SIGSTOP)
    job.wait_for("^event:crashed")
    os.kill(pid, signal.SIGKILL)  # as torchrun does after 30 s
    assert job.end() != 0
    (crashed,) = events(job.log, "crashed")
    assert "no progress" in crashed and f"(process {pid}) is stopped" in crashed


def test_without_their_launcher_the_workers_stop_by_themselves(shards, tmp_path):
    job = Job(tmp_path, BASELINE, base_env(shards, RUN_ID="orphans", NUM_SCHEDULED_ITERATIONS=4000), ranks=2)
    job.wait_for(r"^step:2/")
    os.kill(job.process.pid, signal.SIGKILL)
    job.end()
    stopped = events(job.log, "stopped")
    assert len(stopped) == 1 and "launcher is gone" in stopped[0]


def can_make_namespaces() -> bool:
    if not shutil.which("ip") or os.geteuid():
        return False
    made = subprocess.run(["ip", "netns", "add", "ord-probe"], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", "ord-probe"], capture_output=True)
    return made


@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and iproute2 for network namespaces")
def test_a_cut_link_between_two_machines_ends_both(shards, tmp_path):
    """Fails if a machine waits forever for an unreachable one: two torchrun agents in network namespaces,
    whose link goes down silently."""
    names = [f"ord{os.getpid() % 10_000}{i}" for i in (0, 1)]

    def ip(*args):
        subprocess.run(["ip", *args], check=True, capture_output=True)

    def inside(i):
        extra = ("--nnodes=2", f"--node-rank={i}", "--master-addr=10.99.0.1", "--master-port=29511")
        interface = {"GLOO_SOCKET_IFNAME": names[i], "TP_SOCKET_IFNAME": names[i]}
        env = base_env(shards, RUN_ID="cut", NUM_SCHEDULED_ITERATIONS=4000, DIST_TIMEOUT=8, **interface)
        cwd = tmp_path / f"machine{i}"
        cwd.mkdir()
        argv = ["ip", "netns", "exec", names[i], *command(BASELINE, 1, extra)]
        with (cwd / "out").open("w") as out:
            return subprocess.Popen(argv, cwd=cwd, env=env, stdout=out, stderr=out, start_new_session=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for i, name in enumerate(names):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        agents = [inside(i) for i in (0, 1)]
        log = tmp_path / "machine0" / "logs" / "cut.txt"
        wait_until(lambda: log.exists() and re.search(r"^step:2/", log.read_text(), re.M), "step 2")
        ip("-n", names[0], "link", "set", names[0], "down")
        for agent in agents:
            agent.wait(PATIENCE_S)
        crashed = events(log, "crashed")
        assert len(crashed) == 1 and ("on other hosts" in crashed[0] or "gloo" in crashed[0])
        assert "rank:unknown " in crashed[0] and all(agent.returncode == 1 for agent in agents)
    finally:
        for name in names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listed.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


# ---------------------------------------------------------------------------------------------------
# Loss, disk, data
# ---------------------------------------------------------------------------------------------------


def test_a_runaway_loss_ends_the_run_and_keeps_the_last_good_state(copy_of_saved, shards):
    done = resume(copy_of_saved, shards, DIVERGED_ABOVE="0.01")
    assert done.returncode == 3, done.stderr
    log = copy_of_saved / "logs" / "saved.txt"
    assert re.match(r"event:diverged step:9 train_loss:\d", events(log, "diverged")[0])
    assert (copy_of_saved / "logs" / "saved" / "step_00000008.pt").exists()


def limit_files(size: int):
    """Function that limits its process's files to `size` bytes, like a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_costs_neither_the_run_nor_the_checkpoint_before(copy_of_saved, shards):
    """Fails if checkpoints that do not fit (no file may exceed 3 MB) end the run or its log."""
    env = base_env(shards, RUN_ID="saved", SAVE_EVERY=2, RESUME="auto")
    job = Job(copy_of_saved, BASELINE, env, setup=limit_files(3_000_000))
    assert job.end() == 1  # trained to the end, but a run without its model is not finished
    assert len(events(job.log, "save_failed")) == 2 and "model.safetensors" in events(job.log, "crashed")[0]
    folder = copy_of_saved / "logs" / "saved"
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000004.pt", "step_00000008.pt"]
    digits = lines(job.log)
    done = resume(copy_of_saved, shards)
    assert done.returncode == 0 and (folder / "model.safetensors").exists()
    assert events(job.log, "finished") and lines(job.log) == digits and digits[14]


def test_a_signal_on_a_full_disk_stops_and_says_that_nothing_was_saved(shards, tmp_path):
    """Fails if the exit code is not 1: a launcher would take the run for one that can be resumed."""
    env = base_env(shards, RUN_ID="full", NUM_SCHEDULED_ITERATIONS=400)
    job = Job(tmp_path, BASELINE, env, setup=limit_files(3_000_000))
    job.wait_for(r"^step:2/")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 1
    assert events(job.log, "save_failed") and events(job.log, "stopped")
    assert not list((tmp_path / "logs" / "full").glob("*"))


@pytest.mark.parametrize("room", [True, False])
def test_log_lines_wait_for_a_full_disk(room, tmp_path, monkeypatch, capsys):
    """Fails if lines that did not fit are lost or reordered once there is room, or if the exit code is not 1
    when there never is."""
    path, write, limit = tmp_path / "logs" / "full.txt", os.write, [1000]

    def write_what_fits(file, data):
        free = limit[0] - os.fstat(file).st_size
        if free <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:free])

    log = LogWriter(path, 0, 9)
    monkeypatch.setattr(os, "write", write_what_fits)
    for i in range(100):
        log.write(f"line {i} " + "." * 30)
    with pytest.raises(OSError, match="lines that the disk does not take"):  # so no checkpoint of those steps
        log.sync()
    if room:
        limit[0] = 10**6
    log.end("finished")
    assert log.close() == (0 if room else 1)
    said, text = capsys.readouterr(), path.read_text()
    assert said.out.count("warning") == 1 and "wait in memory" in said.out
    lines = re.findall(r"^line (\d+) \.{30}$", text if room else text + said.err, re.M)
    if room:
        assert [int(n) for n in lines] == list(range(100)) and text.endswith("event:finished\n")
    else:
        assert lines[-1] == "99" and "event:finished" in said.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_console_that_takes_nothing_ends_no_run(shards, tmp_path):
    """Fails if an .out file on a full disk, or a closed terminal, ends a run."""
    options = dict(cwd=tmp_path, env=base_env(shards, RUN_ID="mute"), stderr=subprocess.PIPE, text=True)
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(BASELINE, 0), stdout=full, timeout=PATIENCE_S, **options)
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "logs" / "mute.txt", "finished")


@pytest.mark.parametrize("reason", ["File exists", "Read-only file system"])
def test_logs_that_cannot_be_written_are_refused(shards, tmp_path, monkeypatch, capsys, reason):
    monkeypatch.chdir(tmp_path)
    if reason == "File exists":
        (tmp_path / "logs").write_text("a file where the folder should be")
    else:
        refuse = Mock(side_effect=OSError(errno.EROFS, reason))
        monkeypatch.setattr(log_writer, "os", SimpleNamespace(**{**vars(os), "open": refuse}))
    said = f"logs/x.txt cannot be written: {reason}"
    assert said in refusal(train_gpt, base_env(shards, RUN_ID="x"), capsys)


def write_two_small_shards(folder) -> list[Path]:
    """Write two training shards, used up in 14 steps, and one for validation; return the two."""
    names = [folder / f"made_train_00000{i}.bin" for i in (0, 1)]
    for i, name in enumerate(names):
        write_shard(name, make_text(4500, seed=i))
    write_shard(folder / "made_val_000000.bin", make_text(17_000, seed=9))
    return names


def test_vanished_data_ends_the_run_and_resuming_with_it_goes_on(tmp_path):
    """Fails if a shard that disappears during the run costs more than the time until it is back."""
    names = write_two_small_shards(tmp_path)
    train(tmp_path, tmp_path, "whole", SAVE_EVERY=2)
    env = base_env(tmp_path, RUN_ID="lost", SAVE_EVERY=2)
    job = Job(tmp_path, BASELINE, env, pause_at=(1,))
    job.wait_until_paused()
    for name in names:
        name.rename(name.with_suffix(".away"))
    job.go_on()
    assert job.end() == 1
    crashed = events(job.log, "crashed")
    assert len(crashed) == 1 and "DataError" in crashed[0] and "put it back" in crashed[0]
    for name in names:
        name.with_suffix(".away").rename(name)
    done = run(tmp_path, BASELINE, {**env, "RESUME": "auto"}, ranks=0)
    assert done.returncode == 0, done.stderr
    assert lines(job.log) == lines(tmp_path / "logs" / "whole.txt")
    assert events(job.log, "epoch")  # 9,000 tokens were used up: the next epoch began


def test_a_crash_on_a_full_disk_leaves_its_lines_on_the_console(tmp_path):
    """Fails if the lines that a full log could not take, or the reason for the crash, are lost."""
    names = write_two_small_shards(tmp_path)
    train(tmp_path, tmp_path, "good", NUM_SCHEDULED_ITERATIONS=4)
    size = (tmp_path / "logs" / "good.txt").read_text().index("step:3/")
    job = Job(tmp_path, BASELINE, base_env(tmp_path, RUN_ID="full"), setup=limit_files(size), pause_at=(1,))
    job.wait_until_paused()
    for name in names:
        name.unlink()
    job.go_on()
    assert job.end() == 1 and not events(job.log, "crashed")
    lacking = job.out.read_text().partition("lacks its last lines")[2]
    assert "\nstep:3/14 train_loss:" in lacking and "\nevent:crashed rank:0 " in lacking


# ---------------------------------------------------------------------------------------------------
# Two at once
# ---------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_and_one_name_twice(shards, tmp_path, monkeypatch, capsys):
    long = dict(NUM_SCHEDULED_ITERATIONS=400)
    first = Job(tmp_path, BASELINE, base_env(shards, RUN_ID="first", **long), pause_at=(2,))
    first.wait_until_paused()
    monkeypatch.chdir(tmp_path)
    env = base_env(shards, RUN_ID="first", **long)
    assert "exists already" in refusal(train_gpt, env, capsys)
    assert "being written by another process" in refusal(train_gpt, {**env, "RESUME": "auto"}, capsys)
    train(tmp_path, shards, "second")
    assert first.process.poll() is None
    first.process.send_signal(signal.SIGTERM)
    first.go_on()
    assert first.end() == 0
