"""Checkpoints and faults without processes: what is saved is all there is; any file is survived."""

import io
import math
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TRAINERS,
    lone_ranks,
    make_text,
    make_tokens,
    optimizer_settings,
    read,
    small_config,
    write_shard,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_schedule_data import MORE, data_settings, train_data

import train_gpt
import train_gpt_muon_ord

STEPS = 12  # stages of four, the head untied at step 9


def small_trainer(trainer, folder, seed, **env):
    """A Trainer of the model with every feature, its data and settings, at step 0."""
    if not (folder / "train_0.bin").exists():
        write_shard(folder / "train_0.bin", make_text(9000, 1))
        write_shard(folder / "val_0.bin", make_text(3000, 2))
    common = dict(
        TRAIN_FILES="train_*.bin", VAL_FILES="val_*.bin", DATA_PATH=folder, BATCH_SIZES="256,256,512,512"
    )
    common |= dict(VAL_TOKENS=2048, VAL_BATCH_TOKENS=1024, NUM_SCHEDULED_ITERATIONS=STEPS, MAX_DOC_TOKENS=64)
    s, o, _ = read(trainer, SEED=seed, **common, **env)
    ranks = lone_ranks(trainer)
    config = small_config(trainer, windows=((1, 1), (1, 2), (2, 3), (2, 3)))
    run = trainer.Trainer(s, o, config, 256, ranks)
    return run, trainer.TrainData(trainer.open_data(s, 1)[0], s, ranks)


def steps(run, data, first, last) -> list[float]:
    out, size = [], run.schedule.batch_tokens
    for step in range(first, last):
        run.enter(step)
        out.append(run.step(step, data.next(size(step), size(step + 1))).item())
    return out


ORD_STATES = dict(SPECTRAL_SCHEDULE="adaptive", SPECTRAL_VARIANCE=1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("at", [2, 4, 8, 10])
@pytest.mark.parametrize(
    "trainer, env",
    [
        (train_gpt, {}),
        (train_gpt, dict(OPTIMIZER="adamw", ADAM_MATRIX_LR=0.01)),
        (train_gpt, dict(OPTIMIZER="muon")),
        (train_gpt_muon_ord, ORD_STATES),
    ],
)
def test_a_restored_trainer_goes_on_bit_for_bit(trainer, env, at, tmp_path):
    """Over changes of stage, YaRN and the untying of the head; the other trainer has another seed's weights,
    so whatever is not restored shows."""
    one, data = small_trainer(trainer, tmp_path, 0, **env)
    steps(one, data, 0, at)
    file = io.BytesIO()
    torch.save({**one.export(), "position": list(data.position)}, file)
    wanted = steps(one, data, at, STEPS)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, data = small_trainer(trainer, tmp_path, 1, **env)
    data.seed = 0  # the order of the data is a function of the seed
    other.optimizer.check(saved["params"])
    other.restore(saved, saved["params"])
    data.seek(saved["position"])
    assert steps(other, data, at, STEPS) == wanted
    assert all(
        torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values())
    )


def test_masters_in_two_halves_are_saved_whole(tmp_path):
    """bfloat16 weights with their mantissas, as on a GPU, come back as the same fp32 numbers; each kind reads
    the other's checkpoints."""
    ranks, o = lone_ranks(train_gpt), optimizer_settings(train_gpt)
    values = torch.randn(300, 300)

    def bucket(dtype):
        param = torch.nn.Parameter(torch.zeros(300, 300, dtype=dtype))
        return train_gpt.AdamBucket({"ngram": param}, ranks, o, lambda function: function, False)

    half, full = bucket(torch.bfloat16), bucket(torch.float32)
    train_gpt.write_master(half.mine, half.mantissa, values.flatten())
    full.restore(half.export())
    assert torch.equal(full.params["ngram"].data, values)
    again = bucket(torch.bfloat16)
    again.restore(full.export())
    assert torch.equal(again.mantissa, half.mantissa) and torch.equal(again.mine, half.mine)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_states_that_do_not_fit_are_refused(trainer, tmp_path):
    run, _ = small_trainer(trainer, tmp_path, 0)
    params = run.export()["params"]
    for wrong in (
        {k: v for k, v in params.items() if k != "head"},
        {**params, "stranger": params["head"]},
        {**params, "head": {**params["head"], "m": params["head"]["m"][:-1]}},
        {**params, "head": {**params["head"], "v": params["head"]["v"].double()}},
        {**params, "blocks.0.mlp.up": {"master": params["blocks.0.mlp.up"]["master"]}},
    ):
        with pytest.raises(ValueError, match="the checkpoint"):
            run.optimizer.check(wrong)


def test_only_the_last_two_are_kept_and_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        train_gpt.write_checkpoint(tmp_path, {"step": step})
    names = lambda: sorted(p.name for p in tmp_path.iterdir())
    assert names() == ["step_00000004.pt", "step_00000006.pt"]

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_gpt.os, "fsync", no_space)
    with pytest.raises(OSError, match="step_00000008.pt could not be written.*No space"):
        train_gpt.write_checkpoint(tmp_path, {"step": 8})
    assert names() == ["step_00000004.pt", "step_00000006.pt"]


def checkpoint_bytes(**changes) -> bytes:
    contents = {key: kind() for key, kind in train_gpt.CHECKPOINT_KEYS.items() if kind is not torch.Tensor}
    contents |= {"format": 1, "run_id": "mine", "position": [0, 0, 0], "rotary_freqs": torch.zeros(3)}
    file = io.BytesIO()
    torch.save({**contents, "params": {"a": torch.ones(50)}, **changes}, file)
    return file.getvalue()


def marked_as_folder(data: bytes) -> bytes:
    """One bit of the zip's directory flipped: torch then leaves a tensor uninitialised, without a word."""
    at = data.rindex(b"archive/data/0") - 8  # external attributes, in the directory at the file's end
    return data[:at] + b"\x10" + data[at + 1 :]


WHOLE = checkpoint_bytes()


@settings(max_examples=250 * MORE, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    data=st.one_of(
        st.binary(max_size=300),
        st.integers(0, len(WHOLE) - 1).map(lambda n: WHOLE[:n]),
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)).map(
            lambda x: WHOLE[: x[0]] + bytes([WHOLE[x[0]] ^ x[1]]) + WHOLE[x[0] + 1 :]
        ),
    )
)
@example(data=WHOLE)
@example(data=marked_as_folder(WHOLE))
def test_any_bytes_are_a_checkpoint_or_a_checkpoint_error(data, tmp_path):
    """No traceback whatever is in the file; and a byte changed anywhere never changes a number unseen."""
    path = tmp_path / "step_00000002.pt"
    path.write_bytes(data)
    try:
        saved = train_gpt.read_checkpoint(path)
    except train_gpt.CheckpointError as error:
        assert str(path) in str(error)
        return
    assert torch.equal(saved["params"]["a"], torch.ones(50)) and torch.equal(
        saved["rotary_freqs"], torch.zeros(3)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "../../elsewhere"},  # else a stranger's file chooses where log and model are written
        {"run_id": ""},
        {"config": {"seed": torch.ones(2)}},
        {"config": {(1, 2): 3}},
        {"step": -1},
        {"stage": 77},
        {"position": [0, -1, 0]},
        {"position": [0]},
        {"position": [0, 0, "a"]},
        {"params": []},
    ],
    ids=str,
)
def test_contents_that_no_run_has_are_refused(changes, tmp_path):
    path = tmp_path / "step_00000002.pt"
    path.write_bytes(checkpoint_bytes(**changes))
    with pytest.raises(train_gpt.CheckpointError, match="step_00000002.pt"):
        train_gpt.read_checkpoint(path)


def test_a_setting_newer_than_the_checkpoint_had_its_default():
    """Else every new setting makes all checkpoints useless; and one that is not at its default is said."""
    config = {"seed": 1, "muon_lr": 0.5, "grad_clip": 0.0}
    old = {"seed": 1, "muon_lr": 0.5}
    default = train_gpt.OptimizerSettings.grad_clip
    assert not [d for d in train_gpt.differences(old, {**config, "grad_clip": default}) if "GRAD_CLIP" in d]
    found = [d for d in train_gpt.differences(old, {**config, "grad_clip": 7.0}) if "GRAD_CLIP" in d]
    assert found == [f"GRAD_CLIP was {default}, now 7.0"]


def test_pipes_are_refused_and_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "pipe.txt")
    os.mkfifo(tmp_path / "step_00000002.pt")
    with pytest.raises(train_gpt.CheckpointError, match="step_00000002.pt is no regular file"):
        train_gpt.read_checkpoint(tmp_path / "step_00000002.pt")
    with pytest.raises(train_gpt.SettingsError, match="pipe.txt is no regular file"):
        train_gpt.RunLog(train_gpt.Path("logs/pipe.txt"), 0, 9)
    assert train_gpt.last_event(tmp_path / "logs" / "pipe.txt") == ""


@pytest.mark.usefixtures("one_thread")
def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    """The last good checkpoints would make room for it, and a loss that is still finite hides it."""
    trainer, data = small_trainer(train_gpt, tmp_path, 0)
    run = object.__new__(train_gpt.Run)
    events = []
    log = SimpleNamespace(sync=lambda: None, event=lambda name, **fields: events.append(name))
    run.s = SimpleNamespace(run_id="mine", folder=tmp_path / "mine")
    run.ranks, run.trainer, run.data, run.log, run.config = trainer.ranks, trainer, data, log, {}
    run.ranks.share, run.clock = lambda value: value, train_gpt.Clock(torch.device("cpu"))
    run.report = SimpleNamespace(flush=lambda: None, reached=False)
    run.tokens, run.validated, run.last_saved = 0, -1, 0
    run.clock.start()
    assert run.save(2) and events == ["checkpoint"]
    trainer.model.get_parameter("blocks.0.mlp.up").data[0, 0] = math.nan
    with pytest.raises(train_gpt.Diverged, match="weight is nan"):
        run.save(4)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["step_00000002.pt"]


@settings(max_examples=250 * MORE, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    header=st.lists(
        st.sampled_from([20240520, 1, 0, 256, 50257, 3, 600, 601]) | st.integers(-(2**31), 2**31 - 1),
        min_size=4,
        max_size=4,
    )
    | st.tuples(st.just(20240520), st.just(1), st.integers(0, 700), st.sampled_from([0, 256, 9])).map(list),
    tokens=st.lists(st.integers(0, 65_535) | st.sampled_from([0, 0, 50256, 5]), max_size=700),
    cut=st.none() | st.integers(0, 2500),
)
def test_any_file_is_a_shard_or_a_data_error(header, tokens, cut, tmp_path):
    """No traceback and no hang whatever is in the file: it is trained on, or refused by name."""
    for old in tmp_path.glob("*.bin"):
        old.unlink()
    head = np.zeros(256, dtype="<i4")
    head[:4] = header
    data = head.tobytes() + np.array(tokens, dtype="<u2").tobytes()
    (tmp_path / "train_0.bin").write_bytes(data[:cut])
    write_shard(
        tmp_path / "val_0.bin", make_tokens([100] * 40), vocab_size=header[3] if 0 < header[3] else 256
    )
    s = data_settings(tmp_path)
    try:
        found = train_data(s)
        found.next(256, None)
    except (train_gpt.DataError, train_gpt.SettingsError) as error:
        assert ".bin" in str(error) or "shard" in str(error)


def test_a_clock_that_jumps_changes_no_figure(monkeypatch):
    """The wall clock set back or forward by a day, as by NTP or a resumed virtual machine."""
    clock = train_gpt.Clock(torch.device("cpu"))
    clock.start()
    for now in (0.0, 86_400.0, -86_400.0):
        monkeypatch.setattr(train_gpt.time, "time", lambda now=now: now)
        assert 0 <= clock.ms() < 60_000
    clock.stop()
    assert math.isfinite(clock.spent_ms)


def test_a_refusal_of_one_rank_is_one_of_all():
    """Else the others wait in their first collective for a rank that has gone home."""
    other = ["the disk of machine 2 is missing"]
    ranks = lone_ranks(train_gpt, world_size=2)
    ranks.collect = lambda value: [value, *other]
    with pytest.raises(ValueError, match="rank 1: the disk of machine 2 is missing"):
        ranks.together(lambda: 5)
    other[0] = None
    assert ranks.together(lambda: 5) == 5
    with pytest.raises(train_gpt.DataError, match="mine"):
        ranks.together(lambda: (_ for _ in ()).throw(train_gpt.DataError("mine")))


def test_the_watch_gives_up_after_the_timeout_and_not_before():
    """A main thread inside a collective can do nothing; if this thread does not act, nobody does."""
    ranks = train_gpt.Ranks("cpu")
    said, given_up = [], threading.Event()

    def give_up(missing, reason):
        said.append(reason)
        given_up.set()
        watch.over.set()

    watch = train_gpt.Watch(ranks, 1.5, train_gpt.Stop(), give_up)
    watch.POLL_S = 0.05
    start = time.monotonic()
    watch.start()
    for _ in range(10):
        time.sleep(0.1)
        ranks.beat()
    assert not said
    assert given_up.wait(10) and 2.4 < time.monotonic() - start < 8
    assert "no progress" in said[0] and "DIST_TIMEOUT=1.5" in said[0]


def test_restarted_workers_find_their_log_without_run_id(tmp_path, monkeypatch):
    """torchrun's restarts have a new time in their default RUN_ID; without this they would begin anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    (tmp_path / "logs").mkdir()
    line = "event:started run_id:{0} launch:{1} git:none\n"
    for name, launch in (("mine", train_gpt.launch_id()), ("other", "abc.0"), ("old", "none.7")):
        (tmp_path / "logs" / f"{name}.txt").write_text(line.format(name, launch))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train_gpt.restarted_run_id() == "mine"
