"""Checkpoints and faults without processes: nothing is left unsaved, and no file causes a crash."""

import dataclasses
import io
import math
import os
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    MAGIC,
    SMALL_STEPS,
    TRAINERS,
    VERSION,
    fill_disk,
    later_trainer,
    lone_ranks,
    make_tokens,
    optimizer_settings,
    read,
    small_trainer,
    train_steps,
    write_shard,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_gpt
import train_gpt_muon_ord
from data.shards import DataError
from runtime import checkpoints, log_writer, session, supervise
from runtime import ranks as ranks_module
from runtime.compiling import not_compiled
from runtime.settings import SettingsError, knobs
from runtime.sharding import check_all, export_all, write_master

MORE = int(os.environ.get("FUZZ", 1))  # FUZZ=100 pytest ...: a long search
FUZZ = settings(
    max_examples=250 * MORE, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def small_session(run, data, run_id="mine"):
    """Make a Session of a small_trainer in the current folder."""
    s = dataclasses.replace(run.s, run_id=run_id)
    log = log_writer.LogWriter(s.log, 0, SMALL_STEPS)
    start = SimpleNamespace(s=s, ranks=run.ranks, log=log, config={}, script=train_gpt.SCRIPT)
    found = session.Session(start, supervise.StopRequest(), run, data)
    found.begin()
    return found


ORD_STATES = dict(SPECTRAL_SCHEDULE="adaptive", SPECTRAL_VARIANCE=1)


RESTORED = [(small_trainer, train_gpt, {}, at) for at in (2, 4, 8, 10)]
RESTORED += [
    (small_trainer, trainer, env, at)
    for trainer, env in (
        (train_gpt, dict(OPTIMIZER="adamw", ADAM_MATRIX_LR=0.01)),
        (train_gpt, dict(OPTIMIZER="muon")),
        (train_gpt_muon_ord, ORD_STATES),
    )
    for at in (2, 10)
]
# groups of heads, networks and tables of the later records
RESTORED += [(later_trainer, train_gpt, {}, 6)]
RESTORED += [(later_trainer, train_gpt_muon_ord, dict(ORD_MODE="post", SPECTRAL_OUT="0.5"), 6)]


@pytest.mark.parametrize("make, trainer, env, at", RESTORED)
def test_a_restored_trainer_goes_on_bit_for_bit(make, trainer, env, at, tmp_path, monkeypatch):
    """Fails if any state is not restored, across changes of stage, YaRN and the untying of the head. The
    restored trainer starts with another seed's weights, so that it shows."""
    monkeypatch.chdir(tmp_path)
    one, data = make(trainer, tmp_path, 0, **env)
    train_steps(one, data, 0, at)
    saves = small_session(one, data)
    saves.tokens, saves.validated_step, saves.target_reached, saves.clock.spent_ms = 77, 1, True, 1e6
    assert saves.save(at)
    wanted = train_steps(one, data, at, SMALL_STEPS)
    saved = checkpoints.read(tmp_path / "logs" / "mine" / f"step_{at:08d}.pt")
    other, data = make(trainer, tmp_path, 1, **env)
    data.documents.seed = 0  # the order of the data is a function of the seed
    resumed = small_session(other, data, "resumed")
    resumed.resume(saved)
    assert (resumed.first_step, resumed.tokens, resumed.validated_step) == (at, 77, 1)
    assert resumed.target_reached and resumed.clock.ms() > 1e6
    assert train_steps(other, data, at, SMALL_STEPS) == wanted
    both = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


@pytest.mark.parametrize("changes", [{"run_id": 5}, {"run_id": "../x"}, {"config": ...}])
def test_a_checkpoint_that_no_run_writes_is_refused(changes, tmp_path):
    """Fails if it ends in a traceback instead of being set aside. `...`: without that key."""
    saved = {**dict.fromkeys(checkpoints.KEYS), "format": checkpoints.FORMAT, "run_id": "mine", **changes}
    torch.save({key: value for key, value in saved.items() if value is not ...}, tmp_path / "x.pt")
    with pytest.raises(checkpoints.CheckpointError, match=r"x\.pt (is not a checkpoint|belongs to RUN_ID)"):
        checkpoints.read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "changes", [{"step": SMALL_STEPS}, {"step": 10**9}, {"counts": {}}, {"counts": {"head": 1}}]
)
def test_a_checkpoint_of_another_run_is_refused(changes, tmp_path, monkeypatch):
    """Fails if a checkpoint at the last of 12 steps ends the run untrained."""
    monkeypatch.chdir(tmp_path)
    run, data = small_trainer(train_gpt, tmp_path, 0)
    saves = small_session(run, data)
    saves.save(2)
    saved = {**checkpoints.read(tmp_path / "logs" / "mine" / "step_00000002.pt"), **changes}
    said = f"the checkpoint is of step {changes.get('step', 2)} and this run has {SMALL_STEPS}"
    with pytest.raises(checkpoints.CheckpointError, match=said):
        saves.resume(saved)


def test_masters_in_two_halves_are_saved_whole():
    """Fails if bfloat16 weights with mantissas, as on a GPU, are not restored as the same fp32 numbers, or
    either kind cannot read the other's checkpoints."""
    ranks, o = lone_ranks(), optimizer_settings(train_gpt)
    values = torch.randn(300, 300)

    def bucket(dtype):
        param = torch.nn.Parameter(torch.zeros(300, 300, dtype=dtype))
        return train_gpt.AdamBucket({"ngram_table": param}, ranks, o, not_compiled)

    half, full = bucket(torch.bfloat16), bucket(torch.float32)
    write_master(half.mine, half.mantissa, values.flatten())
    full.restore(half.export())
    assert torch.equal(full.params["ngram_table"].data, values)
    again = bucket(torch.bfloat16)
    again.restore(full.export())
    assert torch.equal(again.mantissa, half.mantissa) and torch.equal(again.mine, half.mine)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_states_that_do_not_fit_are_refused(trainer, tmp_path):
    run, _ = small_trainer(trainer, tmp_path, 0)
    params, _ = export_all(run.optimizer.buckets)
    for wrong in (
        {k: v for k, v in params.items() if k != "head"},
        {**params, "stranger": params["head"]},
        {**params, "head": {**params["head"], "m": params["head"]["m"][:-1]}},
        {**params, "head": {**params["head"], "v": params["head"]["v"].double()}},
        {**params, "blocks.0.mlp.up": {"master": params["blocks.0.mlp.up"]["master"]}},
    ):
        with pytest.raises(ValueError, match="the checkpoint"):
            check_all(run.optimizer.buckets, wrong)


def test_only_the_last_two_are_kept_and_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        checkpoints.write(tmp_path, {"step": step})

    def names():
        return sorted(p.name for p in tmp_path.iterdir())

    assert names() == ["step_00000004.pt", "step_00000006.pt"]
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="step_00000008.pt could not be written.*No space"):
        checkpoints.write(tmp_path, {"step": 8})
    assert names() == ["step_00000004.pt", "step_00000006.pt"]


def checkpoint_bytes(**changes) -> bytes:
    """Return a checkpoint's bytes with these changes to its contents."""
    contents = {"format": checkpoints.FORMAT, "run_id": "mine", "params": {"a": {"master": torch.ones(50)}}}
    file = io.BytesIO()
    torch.save({**contents, **changes}, file)
    return file.getvalue()


def marked_as_folder(data: bytes) -> bytes:
    """Flip one bit of the zip's directory, at which torch leaves a tensor uninitialised."""
    at = data.rindex(b"archive/data/0") - 8  # external attributes, in the directory at the file's end
    return data[:at] + b"\x10" + data[at + 1 :]


WHOLE = checkpoint_bytes()


@FUZZ
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
    """Fails if any file causes a traceback, or a changed byte silently changes a number."""
    path = tmp_path / "step_00000002.pt"
    path.write_bytes(data)
    try:
        saved = checkpoints.read(path)
    except checkpoints.CheckpointError as error:
        assert str(path) in str(error)
        return
    assert torch.equal(saved["params"]["a"]["master"], torch.ones(50))
    assert saved["format"] == 2 and saved["run_id"] == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "../../elsewhere"},  # else a stranger's file chooses where log and model are written
        {"run_id": ""},
        {"format": 1},  # of the trainers before this format
        {"format": 3},
        {"format": None},
    ],
    ids=str,
)
def test_contents_that_no_run_has_are_refused(changes, tmp_path):
    path = tmp_path / "step_00000002.pt"
    path.write_bytes(checkpoint_bytes(**changes))
    with pytest.raises(checkpoints.CheckpointError, match="step_00000002.pt"):
        checkpoints.read(path)


def resume_differences(trainer, config, theirs) -> list[str]:
    """List the differences for which a run of this config refuses theirs."""
    classes, model = (*trainer.SETTINGS, trainer.ModelConfig), dataclasses.asdict(trainer.ModelConfig())
    config, theirs = ({"model_config": model, **x} for x in (config, theirs))
    config["script"] = trainer.SCRIPT.name  # which checkpoints may lack
    return checkpoints.SameTraining(classes, config).differences(theirs)


def test_a_field_of_the_model_newer_than_the_checkpoint_counts_as_its_default():
    """Fails if a new model field invalidates all checkpoints, or one that is set goes unnoticed."""
    model = dataclasses.asdict(train_gpt.ModelConfig())
    settings = {f.name: f.default for f in knobs(train_gpt.SETTINGS).values()}
    older = {k: v for k, v in model.items() if k != "smear"}
    now = {**settings, "model_config": model}
    assert resume_differences(train_gpt, now, {**settings, "model_config": older}) == []
    now["model_config"] = {**model, "smear": False}
    found = resume_differences(train_gpt, now, {**settings, "model_config": older})
    assert found == ["MODEL_CONFIG.SMEAR was True, now False"]


def test_a_setting_newer_than_the_checkpoint_counts_as_its_default():
    """Fails if every new setting invalidates all checkpoints, or one that is set goes unnoticed."""
    old, default = {"seed": 1, "muon_lr": 0.5}, train_gpt.NorMuonSettings().grad_clip
    assert not [d for d in resume_differences(train_gpt, {**old, "grad_clip": default}, old) if "GRAD" in d]
    found = [d for d in resume_differences(train_gpt, {**old, "grad_clip": 7.0}, old) if "GRAD" in d]
    assert found == [f"GRAD_CLIP was {default}, now 7.0"]


def test_facts_beside_the_settings_must_agree():
    """Fails if a run resumes with other data or another model under the same settings."""
    config = {"seed": 0, "model_config": {"width": 8}, "num_slices": 8, "train_data": "a/1/b"}
    for changes in ({"model_config": {"width": 9}}, {"num_slices": 16}, {"train_data": "a/2/c"}):
        assert resume_differences(train_gpt, config, {**config, **changes})


def test_pipes_are_refused_and_not_waited_for(tmp_path):
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "pipe.txt")
    os.mkfifo(tmp_path / "step_00000002.pt")
    with pytest.raises(checkpoints.CheckpointError, match="step_00000002.pt is no regular file"):
        checkpoints.read(tmp_path / "step_00000002.pt")
    with pytest.raises(SettingsError, match="pipe.txt is no regular file"):
        log_writer.LogWriter(tmp_path / "logs" / "pipe.txt", 0, 9)
    assert log_writer.last_event(tmp_path / "logs" / "pipe.txt") == ""


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """Fails if it replaces the last good checkpoints, as it can while the loss is still finite, or if a loss
    of NaN passes for a small one."""
    monkeypatch.chdir(tmp_path)
    trainer, data = small_trainer(train_gpt, tmp_path, 0)
    saves = small_session(trainer, data)
    assert saves.save(2) and saves.s.log.read_text().startswith("event:checkpoint step:2 ")
    trainer.model.get_parameter("blocks.0.mlp.up").data[0, 0] = math.nan
    with pytest.raises(session.Diverged, match="weight is nan"):
        saves.save(4)
    with pytest.raises(session.Diverged, match="step 3: train_loss is nan"):
        saves.check_loss(3, "train_loss", math.nan)
    assert [p.name for p in (tmp_path / "logs" / "mine").iterdir()] == ["step_00000002.pt"]


ODD = st.sampled_from([MAGIC, VERSION, 0, 256, 50257, 3, 600, 601]) | st.integers(-(2**31), 2**31 - 1)


@st.composite
def shard_files(draw) -> tuple[list[int], np.ndarray, int | None]:
    """Draw a file, mostly a shard: its header, its tokens, and where it is cut short, if it is."""
    mark, vocab_size = draw(st.sampled_from([(0, 256), (50256, 0)]))
    size, beyond = draw(st.integers(0, 900)), draw(st.sampled_from([256, 256, 256, 2, 65_536]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    is_mark = rng.random(size) < draw(st.sampled_from([0.02, 0.02, 0.5, 0]))
    tokens = np.where(is_mark, mark, rng.integers(0, beyond, size))
    fault = draw(st.sampled_from(["", "", "", "", "header", "cut"]))
    header = [MAGIC, VERSION, size, vocab_size]
    if fault == "header":
        header = draw(st.lists(ODD, min_size=4, max_size=4))
    return header, tokens, draw(st.integers(0, 2500)) if fault == "cut" else None


def test_any_file_is_a_shard_or_a_data_error(tmp_path):
    """Fails if any file causes a traceback or a hang, instead of training or a refusal by name."""
    accepted = []
    s, _, _ = read(
        train_gpt,
        DATA_PATH=tmp_path,
        TRAIN_FILES="train_*.bin",
        VAL_FILES="val_*.bin",
        VAL_TOKENS=1024,
        VAL_BATCH_TOKENS=1024,
        BATCH_SIZES="256,256,256,256",
        MAX_DOC_TOKENS=40,
    )

    @FUZZ
    @given(shard_files())
    def check(file):
        header, tokens, cut = file
        for old in tmp_path.glob("*.bin"):
            old.unlink()
        head = np.zeros(256, dtype="<i4")
        head[:4] = header
        data = head.tobytes() + tokens.astype("<u2").tobytes()
        (tmp_path / "train_0.bin").write_bytes(data[:cut])
        write_shard(tmp_path / "val_0.bin", make_tokens([100] * 40), vocab_size=max(header[3], 0))
        try:
            shards, _ = train_gpt.open_data(s, 1)
            batches = train_gpt.TrainData(shards, s, lone_ranks()).next((256, 0))
        except (DataError, SettingsError) as error:
            assert ".bin" in str(error) or "shard" in str(error)
            return
        assert sum(batch.inputs_BT.numel() for batch in batches) == 256
        accepted.append(file)

    check()
    assert len(accepted) > 40 * MORE


def test_saving_takes_no_training_time(tmp_path, monkeypatch):
    """Fails if the time of a checkpoint is in train_time, by which runs are compared."""
    monkeypatch.chdir(tmp_path)
    now = [5.0]
    monkeypatch.setattr(session.time, "perf_counter", lambda: now[0])
    saves = small_session(*small_trainer(train_gpt, tmp_path, 0))
    write = checkpoints.write

    def slowly(*args):
        now[0] += 60
        return write(*args)

    monkeypatch.setattr(checkpoints, "write", slowly)
    now[0] += 1
    assert saves.save(2) and saves.clock.ms() == 1000
    now[0] += 1
    assert saves.clock.ms() == 2000


def test_the_target_is_reached_once(tmp_path, monkeypatch):
    """Fails if the log does not say when a validation reached TARGET_LOSS, or says it again."""
    monkeypatch.chdir(tmp_path)
    run, data = small_trainer(train_gpt, tmp_path, 0, TARGET_LOSS=1.5)
    saves = small_session(run, data)
    for step, loss in ((2, 1.6), (4, 1.4), (6, 1.3)):
        saves.note_validation(step, loss, 0.5)
    found = re.findall("^event:target_reached .*$", saves.s.log.read_text(), re.M)
    assert found == ["event:target_reached step:4 target:1.5 val_loss:1.40000"]


@pytest.mark.parametrize("target, reached", [(1.5, []), (1.3, ["6"])])
def test_a_target_changed_on_resuming_can_be_reached(target, reached, tmp_path, monkeypatch):
    """Fails if the log never says that a lower target was reached, or says again that the same one was."""
    monkeypatch.chdir(tmp_path)
    saves = small_session(*small_trainer(train_gpt, tmp_path, 0, TARGET_LOSS=1.5))
    saves.config = {"target_loss": 1.5}
    saves.note_validation(2, 1.4, 0.5)
    assert saves.save(2)
    resumed = small_session(*small_trainer(train_gpt, tmp_path, 0, TARGET_LOSS=target), "resumed")
    resumed.resume(checkpoints.read(tmp_path / "logs" / "mine" / "step_00000002.pt"))
    for step, loss in ((4, 1.4), (6, 1.3), (8, 1.2)):
        resumed.note_validation(step, loss, 0.5)
    assert re.findall(r"^event:target_reached step:(\d+)", resumed.s.log.read_text(), re.M) == reached


@pytest.mark.parametrize(
    "saved_at, said", [(0, "the whole run, which has no checkpoint"), (4, "what follows step 4")]
)
def test_without_room_for_the_model_the_run_says_what_is_repeated(
    saved_at, said, tmp_path, monkeypatch, capsys
):
    """Fails if its user believes that resuming only writes the model, and it trains from step 0."""
    monkeypatch.chdir(tmp_path)
    ends = small_session(*small_trainer(train_gpt, tmp_path, 0))
    ends.config = {"model_config": {}}
    assert not saved_at or ends.save(saved_at)
    fill_disk(monkeypatch)
    assert ends.finish() == 1
    assert f"No space left on device; make room, then RESUME=auto repeats {said}" in capsys.readouterr().out


def test_a_clock_that_jumps_changes_no_figure(monkeypatch):
    """Fails if training time uses the wall clock, which NTP or a resumed virtual machine may set."""
    begin = time.perf_counter()
    clock = session.Clock(torch.device("cpu"))
    clock.start()
    for now in (0.0, 86_400.0, -86_400.0):
        monkeypatch.setattr(session.time, "time", lambda now=now: now)
        assert 0 <= clock.ms() <= 1000 * (time.perf_counter() - begin)
    clock.stop()
    assert math.isfinite(clock.spent_ms)


class FakeTime:
    """Clock that the test sets; waiting on it, as on Watch.over, takes no time."""

    def __init__(self):
        self.now, self.over, self.each_poll = 1000.0, False, None

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.each_poll()
        return self.over


def test_the_watch_gives_up_after_the_timeout_and_not_before(monkeypatch):
    """Fails if a run hangs forever in a collective, or is ended while it makes progress."""
    clock, said = FakeTime(), []
    for module in (supervise, ranks_module):
        monkeypatch.setattr(module, "time", clock)
    ranks = ranks_module.Ranks("cpu")

    def give_up(missing, reason):
        said.append((clock.now, reason))
        clock.over = True

    def beat_for_a_while():
        if clock.now <= 1060:  # then the main thread hangs
            ranks.beat()
        assert clock.now < 1100

    watch = supervise.Watch(ranks, 10, supervise.StopRequest(), give_up)
    watch.over, clock.each_poll = clock, beat_for_a_while
    watch.run()
    (at, reason) = said[0]
    assert len(said) == 1 and 1070 < at <= 1070 + 2 * watch.POLL_S
    assert "no progress" in reason and "DIST_TIMEOUT=10" in reason


def test_time_in_which_the_machine_slept_is_no_silence(monkeypatch):
    """Fails if a run is ended because the machine was suspended for an hour."""
    clock, said = FakeTime(), []
    for module in (supervise, ranks_module):
        monkeypatch.setattr(module, "time", clock)
    ranks = ranks_module.Ranks("cpu")

    def sleep_once():
        if 1005 <= clock.now < 1006:
            clock.now += 3600
        elif clock.now > 4000:
            ranks.beat()
            clock.over = clock.now > 4700

    watch = supervise.Watch(ranks, 10, supervise.StopRequest(), lambda missing, reason: said.append(reason))
    watch.over, clock.each_poll = clock, sleep_once
    watch.run()
    assert not said


def test_a_dead_rank_ends_one_that_waits_for_it(monkeypatch):
    """Fails if a rank waits DIST_TIMEOUT for a dead one: a collective of NCCL does not notice."""
    clock, said = FakeTime(), []
    for module in (supervise, ranks_module):
        monkeypatch.setattr(module, "time", clock)
    states = {11: lambda: "alive", 12: lambda: "gone" if clock.now > 1005 else "alive"}
    monkeypatch.setattr(supervise, "process_state", lambda pid: states[pid]())

    def give_up(missing, reason):
        said.append((clock.now, missing, reason))
        clock.over = True

    def no_longer_than_needed():
        assert clock.now < 1100

    watch = supervise.Watch(ranks_module.Ranks("cpu"), 900, supervise.StopRequest(), give_up)
    watch.pids = {0: 11, 1: 12}
    watch.over, clock.each_poll = clock, no_longer_than_needed
    watch.run()
    ((at, missing, reason),) = said
    assert 1020 < at < 1025 and reason == missing[1] == "rank 1 (process 12) is gone"


def test_restarted_workers_find_their_log_without_run_id(tmp_path, monkeypatch):
    """Fails if torchrun's restarts, whose default RUN_ID has a new time, start from scratch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    (tmp_path / "logs").mkdir()
    line = "event:started run_id:{0} launch:{1} git:none\n"
    for name, launch in (("mine", log_writer.launch_id()), ("other", "abc.0"), ("old", "none.7")):
        (tmp_path / "logs" / f"{name}.txt").write_text(line.format(name, launch))
    assert log_writer.run_of_this_launch() == "mine"
