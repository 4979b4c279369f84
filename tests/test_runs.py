"""Whole runs of the trainers in their own processes: equal arms, ranks and reruns, exit codes."""

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from forked import free_port
from helpers import BASELINE, ORD, ROOT, base_env, losses, run, train
from jobs import run_here

import train_gpt
from analysis.run_log import read_log
from runtime.flops import flop_per_token
from runtime.log_writer import BAR
from runtime.supervise import StopRequest


@pytest.fixture(scope="module")
def baseline(shards, tmp_path_factory):
    """Reference run: (folder, validation losses, training losses)."""
    cwd = tmp_path_factory.mktemp("baseline")
    return cwd, *train(cwd, shards, "baseline")


def test_ords_control_arm_is_the_baseline_digit_for_digit(baseline, shards, tmp_path):
    """Fails if ORD without strength is another method than the baseline, in any digit."""
    _, val, trained = baseline
    assert train(tmp_path, shards, "same", ORD, SPECTRAL_LR_MUL=0) == (val, trained)


def test_four_ranks_train_the_same(baseline, shards, tmp_path):
    """Fails if a validation loss differs by more than 2e-4: ranks only round differently."""
    _, val, _ = baseline
    got, _ = train(tmp_path, shards, "ranks4", ranks=4)
    assert got == pytest.approx(val, abs=2e-4)


def test_ord_modes_agree_over_ranks(shards, tmp_path):
    """Fails if rho, its reference or its log depend on which rank holds a matrix."""
    # at the preset's ADAM_LR, clipping amplifies roundings to 1e-3 in two steps; at half of it, not
    settings = dict(SPECTRAL_SCALE="unit", SPECTRAL_RHO_MODE="row", GRAD_CLIP=1.0, ADAM_LR=0.008)
    one, _ = train(tmp_path, shards, "one", ORD, **settings)
    two, _ = train(tmp_path, shards, "two", ORD, ranks=2, **settings)
    assert two == pytest.approx(one, abs=2e-4)
    for name in ("spec_attn", "spec_mlp"):
        columns = [
            read_log(tmp_path / "logs" / f"{run_id}.txt")[0].columns[name] for run_id in ("one", "two")
        ]
        assert columns[0].value.size > 0
        np.testing.assert_allclose(columns[1].value, columns[0].value, atol=2e-3)


def test_a_stage_begins_before_the_validation_at_its_start(shards, tmp_path, monkeypatch):
    """Fails if a validation between two stages uses the old stage's windows. Thirds of two steps; without an
    extension, the last validation is of the third stage, with its own windows."""
    monkeypatch.chdir(tmp_path)
    env = dict(NUM_SCHEDULED_ITERATIONS=6, VAL_LOSS_EVERY=1, SAVE_MODEL=0)
    with run_here(train_gpt, base_env(shards, RUN_ID="stages", **env)) as start:
        run, stages = train_gpt.Run(start, StopRequest()), []
        monkeypatch.setattr(run, "validate", lambda step: stages.append(run.trainer.stage) or (1.0, 0.5))
        run.train()
    assert stages == [0, 0, 1, 1, 2, 2, 2]


def test_rehearsal_leaks_nothing(baseline, shards, tmp_path, monkeypatch):
    """Fails if the rehearsal does not work on a copy: every later digit must be the same."""
    _, val, trained = baseline
    monkeypatch.chdir(tmp_path)
    with run_here(train_gpt, base_env(shards, RUN_ID="rehearsed")) as start:
        steps, make_step = [], train_gpt.Trainer.step

        def step(self, number, *args, **kwargs):
            steps.append(number)
            return make_step(self, number, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(train_gpt.Trainer, "step", step)
            train_gpt.Run(start, StopRequest()).rehearse()
        assert {train_gpt.Schedule(start.s, start.model_config).stage(number) for number in steps} == {
            0,
            1,
            2,
        }
        assert train_gpt.Run(start, StopRequest()).train() == 14
    assert (losses(tmp_path, "rehearsed"), losses(tmp_path, "rehearsed", "train_loss")) == (val, trained)


def test_two_agents_train_together(baseline, shards, tmp_path):
    """Fails if several machines do not train like one: torchrun --nnodes=2, both agents here."""
    _, val, _ = baseline
    address = ("--master-addr=127.0.0.1", f"--master-port={free_port()}")

    def agent(node):
        extra = ("--nnodes=2", f"--node-rank={node}", *address)
        return run(tmp_path, BASELINE, base_env(shards, RUN_ID="nodes"), 1, extra)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(agent, (0, 1)))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert losses(tmp_path, "nodes") == pytest.approx(val, abs=2e-4)


def test_golden_losses(shards, tmp_path):
    """Fails if model, data, optimizer or schedule changed. Processors differ by less than 2e-4."""
    then = dict(  # the settings of the golden losses
        ADAM_LR=0.008,
        MUON_LR=0.012,
        BATCH_SIZES="2048,2048,4096,4096",
        VAL_TOKENS=16384,
        VAL_BATCH_TOKENS=8192,
    )
    val, _ = train(tmp_path, shards, "golden", NUM_SCHEDULED_ITERATIONS=10, SEED=42, **then)
    assert val == pytest.approx([5.54399, 4.99635, 4.47218], abs=2e-4)  # at steps 0, 5 and 10


def test_the_log_holds_what_the_readers_need(baseline):
    cwd, val, _ = baseline
    text = (cwd / "logs" / "baseline.txt").read_text()
    source, head, steps = text.split("\n" + BAR + "\n")
    assert "\n# file: train_gpt.py, " in source
    config = json.loads(head.splitlines()[0].removeprefix("config:"))
    assert config["seed"] == 0 and config["muon_lr"] > 0 and config["model_config"]["width"] > 0
    assert re.search(r"^event:started .*source_hash:[0-9a-f]{16}", head, re.M)
    kernels, first = steps.splitlines()[:2]
    assert re.fullmatch(r"event:kernels attn:sdpa fast_forms:\S+", kernels)
    assert re.match(
        r"step:0/14 val_loss:\d+\.\d{5} train_time:0ms step_avg:\S+ms lr_mul:1\.0000 beta1:0\.5000 "
        r"beta2:0\.9500 ",
        first,
    )
    assert len(val) == 4  # steps 0, 5, 10 and 14


def test_validations_say_how_large_gradient_and_memory_are(baseline):
    """Fails if a field is missing from validation lines, or the readers lose it. There is no gradient before
    the first update. A CPU logs no mfu, because its peak rate depends on other load."""
    cwd, _, _ = baseline
    log = read_log(cwd / "logs" / "baseline.txt")[0]
    norm, peak = log.columns["grad_norm"], log.columns["peak_mem_mb"]
    assert norm.step.tolist() == [5, 10, 14] and peak.step.tolist() == [0, 5, 10, 14]
    assert (0 < norm.value).all() and (norm.value < 10).all()
    assert (np.diff(peak.value) >= 0).all() and 100 < peak.value[0] < 10_000
    assert "mfu" not in log.columns and not log.unread_lines


def test_mfu_is_the_models_flop_over_what_products_would_do(shards, tmp_path, monkeypatch):
    """Fails if MFU counts another stage's FLOP or validation time, or does not restart at a validation. A CPU
    logs it only on request."""
    monkeypatch.chdir(tmp_path)
    with run_here(train_gpt, base_env(shards, RUN_ID="mfu", SAVE_MODEL=0)) as start:
        made = train_gpt.Run(start, StopRequest())
        made.session.utilization = gauge = made.session.measure_rate()
        assert made.train() == 14
    log = read_log(tmp_path / "logs" / "mfu.txt")[0]
    mfu, ms = log.columns["mfu"], log.columns["train_time"]
    at = dict(zip(ms.step.tolist(), ms.value))
    trainer, config = made.trainer, start.model_config
    for first, last, found in zip((0, 5, 10), (5, 10, 14), mfu.value, strict=True):
        flop = sum(
            trainer.schedule.batch_tokens(i)
            * flop_per_token(config, trainer.doc_lengths, 256, config.windows[trainer.schedule.stage(i)])
            for i in range(first, last)
        )
        assert found == pytest.approx(flop / gauge.flops / ((at[last] - at[first]) / 1000), rel=0.02)
    assert re.search(
        r"^event:matmul_rate tflops_a_rank:\d+\.\d$", (tmp_path / "logs/mfu.txt").read_text(), re.M
    )


STAND_IN_PYTHON = """#!/bin/sh
case "$*" in
*--check-settings) echo "export MODEL=tiny RUN_ID=no-such-run NPROC_PER_NODE=2" ;;
*--standalone*) shift 2; printf '%s\\n' "$@" >"$SAW"; env >>"$SAW" ;;
esac
"""


def test_what_run_sh_is_told_reaches_torchrun(tmp_path):
    """Fails if MAX_RESTARTS, SCRIPT, RESUME or the number of ranks is lost on the way. A stand-in for python
    answers run.sh's checks and writes down how torchrun is called."""
    python, saw = tmp_path / "python", tmp_path / "saw"
    python.write_text(STAND_IN_PYTHON)
    python.chmod(0o755)
    told = dict(
        VENV="0", MAX_RESTARTS="3", SCRIPT=BASELINE, RESUME="auto", RUN_ID="no-such-run", SAW=str(saw)
    )
    env = {**told, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "run.sh"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = saw.read_text().splitlines()
    words = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=3", BASELINE]
    assert found[:5] == words
    assert {"RESUME=auto", "RUN_ID=no-such-run", "MODEL=tiny"} <= set(found[5:])


FULL_COLLECTION = """
import gc, sys

sys.path.insert(0, {root!r})
import train_gpt as trainer
from runtime import session, supervise

note_update = session.Session.note_update


def note(self, step, *args):
    note_update(self, step, *args)
    if step == 8:
        print("frozen", gc.get_freeze_count(), "left", len(gc.get_objects()), flush=True)


session.Session.note_update = note
code = supervise.main(trainer, [])
print("afterwards", gc.get_freeze_count())
sys.exit(code)
"""


def test_full_collections_during_training_are_short(shards, tmp_path):
    """Fails if a full garbage collection during a run visits every object, for a tenth of a second or more,
    while the other ranks wait. Any of a million steps may meet one."""
    script = tmp_path / "watched.py"
    script.write_text(FULL_COLLECTION.format(root=str(ROOT)))
    env = base_env(shards, RUN_ID="watched", NUM_SCHEDULED_ITERATIONS=9, VAL_LOSS_EVERY=0)
    done = run(tmp_path, str(script), env, ranks=0)
    assert done.returncode == 0, done.stdout + done.stderr
    frozen, left = map(int, re.search(r"^frozen (\d+) left (\d+)$", done.stdout, re.M).groups())
    assert frozen > 100_000 and left < frozen / 20
    assert "afterwards 0" in done.stdout
