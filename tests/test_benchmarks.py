"""Benchmarks: FLOP against torch's counter on the real model, the scaling model against measured steps and
the trainers' own sharding, step_time.py on a tiny run, what kernel_times.py times."""

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    lone_ranks,
    make_optimizer,
    make_tokens,
    read,
    small_config,
    small_model,
    write_shard,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from data.shards import open_shard
from kernels.attention import Documents
from runtime import flops, presets, supervise
from runtime.memory import GIB, Memory
from runtime.ranks import Ranks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import scaling_model  # noqa: E402
import step_time  # noqa: E402

VOCAB = 100  # padded to 128
KINDS = {
    "everything": {},
    "fewer key heads": dict(num_kv_heads=2, paired_layers=(), value_embed_layers=(1,)),
    "plain": dict(**presets.PLAIN),
}
GROUPED = {**KINDS, "in groups": dict(qk_group=2)}

# ---------------------------------------------------------------------------------------------------
# FLOP and parameters
# ---------------------------------------------------------------------------------------------------


def make_batch(lengths):
    """Make a slice of documents of these lengths."""
    tokens = torch.from_numpy(make_tokens([*lengths, 1], vocab_size=VOCAB).astype(np.int64))
    ends = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return train_gpt.Batch(tokens[:-1].int()[None], tokens[1:][None], ends, max(lengths))


def masks(model, batch, windows):
    """Yield (query heads, mask of 0 and -inf by block) for each layer with attention."""
    docs = Documents(batch, "sdpa")
    for block, plan in zip(model.blocks, model.plans):
        if plan.attention:
            heads = block.attn.num_heads // (2 if plan.paired else 1)
            yield heads, docs.band(windows[plan.long_window], plan.paired).bias


LATER_PARTS = dict(
    width=32,  # as wide as all heads together
    paired_layers=(0,),
    backout=None,
    qk_group=2,
    value_gate_reads_table=True,
    ngram_signs=7,
    branch_factors=True,
    attn_source=1,
    mudd=(0, 1),
    xsa_layers=(1,),
    gate_layers=(0, 2),
    compose_tokens=8,
)
COUNTED = {
    **KINDS,
    "later parts": LATER_PARTS,
    "later parts without MUDD": {**LATER_PARTS, "mudd": None, "compose_tokens": 0},
    "later parts without n-grams": {**LATER_PARTS, "ngram_rows": 0, "ngram_signs": 0},
}


@pytest.mark.parametrize("kind", COUNTED)
def test_flop_equal_torchs_count_on_the_real_model(kind):
    """Fails if FLOP differ from those counted in forward and backward. The plain form computes all pairs of a
    block (the composition's are its own block and the previous one), so attention is compared through the
    number of pairs, which the next test checks."""
    model, lengths = small_model(train_gpt, vocab_size=VOCAB, **COUNTED[kind]), [9, 23]
    batch, c = make_batch(lengths), model.config
    windows = tuple(w * c.window_block for w in c.windows[0])
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        loss, _ = model.train_loss(batch, windows, c.untie_frac == 1, torch.tensor([1.0, 0.5]))
        forward_only = counted.get_total_flops()
        loss.backward()
    one_token = flops.forward_flop(c, lengths, VOCAB)
    pairs = sum(heads * mask.numel() for heads, mask in masks(model, batch, windows))
    expected = one_token.matrices + one_token.head + one_token.gates + one_token.networks
    if c.compose_tokens:
        expected += flops.composition_flop(c, 2 * c.compose_tokens)
    expected = sum(lengths) * expected + 4 * c.head_dim * pairs
    assert forward_only == expected
    assert counted.get_total_flops() == 3 * expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", ([32], [9, 23], [1] * 32, [3, 1, 28]))
def test_keys_counted_are_those_that_the_models_masks_show(kind, lengths):
    model = small_model(train_gpt, vocab_size=VOCAB, **KINDS[kind])
    c = model.config
    windows = tuple(w * c.window_block for w in c.windows[0])
    shown = sum(heads * int((mask == 0).sum()) for heads, mask in masks(model, make_batch(lengths), windows))
    assert flops.keys_per_token(c, lengths, c.windows[0]) * sum(lengths) == pytest.approx(shown, rel=1e-12)
    attention = flops.forward_flop(c, lengths, VOCAB).attention
    assert attention * sum(lengths) == pytest.approx(4 * c.head_dim * shown, rel=1e-12)


@pytest.mark.parametrize("window", (0, 1, 7, 64))
def test_visible_pairs_against_counting_them(window):
    for lengths in (5, [1], [3, 9, 1], [70, 8]):
        counted = sum(min(i, window) + 1 for n in np.atleast_1d(lengths) for i in range(n))
        assert flops.visible_pairs(lengths, window) == counted


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_parameters_of_every_preset_are_those_of_its_model(preset):
    config = train_gpt.PRESETS[preset][0]
    with torch.device("meta"):
        model = train_gpt.GPT(config, 50257, "sdpa")
    found = {name: p.numel() for name, p in model.named_parameters()}
    tables = flops.table_sizes(config, 50257)
    assert {name: found[name] for name in tables} == tables
    matrices = sum(n for name, n in found.items() if train_gpt.find_role(name).rule == "matrix")
    assert flops.num_matrix_params(config) == matrices
    networks = sum(n for name, n in found.items() if name.startswith(("mudd", "gate_nets")))
    outputs = flops.network_outputs(config)
    width = flops.HIDDEN
    assert networks == sum(width * config.width + n * (width + 1) for n in outputs) + len(config.gate_layers)
    assert sum(found.values()) - matrices - sum(tables.values()) - networks < 2e4  # gates and scalars


# ---------------------------------------------------------------------------------------------------
# The scaling model
# ---------------------------------------------------------------------------------------------------

SMALL = scaling_model.SMALL
ONE, _ = scaling_model.PUBLIC[scaling_model.FITTED]
MACHINE = scaling_model.fit(ONE)


def step_ms(stage, ranks, machine=MACHINE, pass_tokens=1):
    return scaling_model.step_ms(SMALL, stage, ranks, machine, pass_tokens)


@pytest.mark.parametrize("code", scaling_model.PUBLIC)
def test_the_fit_recovers_its_rows_and_foretells_eight_gpus(code):
    """Errors are within 0.5% on the steps fitted, and within 3% on those held out."""
    one, eight = scaling_model.PUBLIC[code]
    machine = scaling_model.fit(one)
    assert [step_ms(stage, 1, machine) for stage in range(3)] == pytest.approx(one, rel=0.005)
    assert [step_ms(stage, 8, machine) for stage in range(3)] == pytest.approx(eight, rel=0.03)


def test_the_fit_finds_the_constants_of_made_up_steps():
    """Batches are 131,072 tokens and twice and three times as many, in eight passes."""
    made = scaling_model.fit([2.0 * 131.072 * stage + 3.0 * 8 for stage in (1, 2, 3)])
    assert (made.token_us, made.pass_ms) == pytest.approx((2.0, 3.0))
    shorter = scaling_model.fit([ms / 60 for ms in ONE])  # the fit does not depend on the unit of time
    assert (60 * shorter.token_us, 60 * shorter.pass_ms) == pytest.approx((MACHINE.token_us, MACHINE.pass_ms))


def test_steps_of_this_project_are_those_of_its_record():
    folder, ms = ROOT / "records" / "2026-11-26_first_hour_h100", []
    for name, stages in (("b.json", (1,)), ("c.json", (2, 3))):
        timed = json.loads((folder / name).read_text(encoding="utf-8"))
        ms += [timed[f"steps, stage {stage}"]["rows"][0]["value"] for stage in stages]
    wide = json.loads((folder / "pass_tokens_131072.json").read_text(encoding="utf-8"))
    ours = scaling_model.OURS
    assert (*ours[65_536], *ours[131_072]) == pytest.approx((*ms, wide["stage 1"]["median"]), abs=0.05)


@pytest.mark.parametrize("world_size", (1, 3, 16))
@pytest.mark.parametrize("kind", ("everything", "fewer key heads", "in groups"))
def test_padding_is_that_of_the_real_optimizer(kind, world_size):
    model = small_model(train_gpt, vocab_size=VOCAB, **GROUPED[kind])
    optimizer = make_optimizer(train_gpt, model, read(train_gpt)[1], ranks=lone_ranks(0, world_size))
    sent = {
        tuple(b.mine.shape[1:]): len(b.weights)
        for b in optimizer.buckets
        if isinstance(b, train_gpt.MatrixBucket)
    }
    shapes = flops.matrix_shapes(model.config)
    assert sent == dict(zip(shapes, scaling_model.padded_matrices(model.config, world_size)))


def test_passes_a_step_are_those_of_the_trainers_data(tmp_path):
    path = write_shard(tmp_path / "made_train_0.bin", make_tokens([500] * 1200))
    shard = open_shard(path)
    for batch in (131_072, 262_144, 393_216):
        for ranks in (1, 2, 8, 16):
            s = read(train_gpt, MAX_DOC_TOKENS=2048)[0]
            data = train_gpt.TrainData([shard], s, lone_ranks(0, ranks))
            slices = train_gpt.count_slices(s, ranks)
            assert scaling_model.num_passes(batch, slices, ranks) == len(data.make(batch)), (batch, ranks)
    assert [scaling_model.num_passes(131_072, 8, 1, n) for n in (1, 65_536, 131_072)] == [8, 2, 1]


def test_rings_by_hand():
    m = scaling_model.Machine(1.0, 1.0, nvlink_bytes=1e5, network_bytes=1e4, collective_us=0, hop_us=0)
    m = dataclasses.replace(m, network_hop_us=0)
    assert m.ring_ms(800, 1) == 0
    assert m.ring_ms(800, 8) == pytest.approx(7)
    assert m.ring_ms(1600, 16) == pytest.approx(1500 / 80)  # eight cards cross the border together
    latency = dataclasses.replace(m, collective_us=1000, hop_us=100, network_hop_us=500)
    assert latency.ring_ms(0, 16) == pytest.approx(1 + 14 * 0.1 + 2 * 0.5)


def test_transfers_are_those_of_the_trainers_buckets():
    """Two buckets of matrices every step; Adam's seven tables, eight when untied, every second step."""
    m = dataclasses.replace(MACHINE, nvlink_bytes=math.inf, collective_us=1000, hop_us=1e-9)
    assert scaling_model.transfer_ms(SMALL, 0, 8, m) == pytest.approx(2 * (2 + 7 / 2))
    assert scaling_model.transfer_ms(SMALL, 2, 8, m) == pytest.approx(2 * (2 + 8 / 2))


def test_memory_is_what_the_trainer_forecasts():
    s, o, config = read(train_gpt, MODEL="gpt2-small")
    s = dataclasses.replace(s, kernels="triton")
    for ranks in (1, 8):
        memory = Memory(s, o, config, 50257, 8, 8, lone_ranks(0, ranks))
        wanted = max(memory.wanted(memory.largest_pass()), memory.validation())
        assert scaling_model.forecast_gib(SMALL, ranks) == pytest.approx(wanted / GIB)


def test_dropped_tokens_by_hand(monkeypatch):
    """Slices of 4 tokens: the second document is cut to 1 of its 5."""
    monkeypatch.setattr(scaling_model, "DOC_LENGTHS", np.array([3, 5, 4]))
    assert scaling_model.dropped_share.__wrapped__(4) == pytest.approx(4 / 12)


def test_scaling_model_prints_and_set_changes_only_the_forecast(capsys):
    printed = []
    for changes in ([], ["--set", "token_us=1.0"]):
        scaling_model.main(["--preset", "gpt2-small", "--gpus", "8", "1", *changes])
        out = capsys.readouterr().out
        assert "held out" in out and "539M parameters" in out
        printed.append((out.partition("Machine")[0], float(re.search(r"^1 +([\d.]+)", out, re.M)[1])))
    (before, usual), (after, fast) = printed
    assert before == after and fast < 0.7 * usual


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--preset", "gpt3"], "gpt3"),
        (["--gpus", "3"], "powers of two"),
        (["--gpus", "x"], "'x'"),
        (["--gpus", "0"], "0 GPUs"),
        (["--set", "speed=1"], "speed=1: wanted NAME=VALUE"),
        (["--set", "hop_us=fast"], "hop_us=fast"),
        (["--set", "hop_us=-1"], "hop_us=-1: wanted NAME=VALUE, above 0"),
    ),
)
def test_scaling_model_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling_model.main(arguments)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# step_time.py
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_env(tmp_path):
    """The tiny preset with steps of 256 tokens on made shards; stage 2 differs."""
    write_shard(tmp_path / "made_train_0.bin", make_tokens([60, 200, 90] * 80))
    write_shard(tmp_path / "made_val_0.bin", make_tokens([100] * 40))
    return dict(
        MODEL="tiny",
        DEVICE="cpu",
        DATA_PATH=str(tmp_path),
        TRAIN_FILES="made_train_*.bin",
        VAL_FILES="made_val_*.bin",
        VAL_TOKENS="2048",
        VAL_BATCH_TOKENS="1024",
        VAL_LOSS_EVERY="10",
        NUM_SCHEDULED_ITERATIONS="30",
        BATCH_SIZES="256,512,256,256",
    )


def test_step_time_tells_everything(tiny_env, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert step_time.main(["--steps", "2", "--ord", "2", "--profile", "--json", str(out)], tiny_env) == 0
    result = json.loads(out.read_text())
    stages, total = result["stages"], result["schedule"]
    assert [r["stage"] for r in stages] == [1, 2, 3]
    assert [r["batch_tokens"] for r in stages] == [256, 512, 256]
    for r in stages:
        assert set(r["shares"]) == set(step_time.PARTS)
        assert sum(r["shares"].values()) == pytest.approx(1)
        assert min(r["shares"][name] for name in ("data", "forward", "backward", "optimizer")) > 0
        assert r["shares"]["forward"] + r["shares"]["backward"] + r["shares"]["optimizer"] > 0.5
        assert r["tokens_per_s"] == pytest.approx(1000 * r["batch_tokens"] / r["ms_step"])
        assert 0 < r["of_ceiling_step"] < 1.5 and r["evaluation_ms"] > 0 and r["pairs"] == 1
        matrices = 6 * (786_432 + 256 * 128) * r["batch_tokens"]
        assert matrices < r["flop_per_rank_step"] < 1.5 * matrices  # the rest is attention
        assert r["memory"]["peak_rss_mib"] > 100 and r["graphs_compiled_meanwhile"] == 0
        kernels = {kernel["name"]: kernel["ms"] for kernel in r["profile"]["kernels"]}
        assert kernels["aten::mm"] > 0 and r["profile"]["host_ms"] <= r["profile"]["step_ms"]
    assert sum(total["shares"].values()) == pytest.approx(1) and total["shares"]["evaluation"] > 0
    assert total["steps"] == 30 and total["validations"] == 4 and total["tokens"] == 10 * (256 + 512 + 256)
    ms = 10 * sum(r["ms_step"] for r in stages)
    assert total["train_minutes"] == pytest.approx(ms / 60_000)
    evaluation = sum(r["evaluation_ms"] for r in [*stages, stages[2]])  # after steps 0, 10, 20 and 30
    assert total["minutes_with_evaluation"] == pytest.approx((ms + evaluation) / 60_000)
    assert result["settings"]["val_tokens"] == 2048
    assert result["settings"]["spectral_lr_mul"] == 0.01  # the twin's, of this preset
    assert [r["stage"] for r in result["ord"]] == [1, 2, 3]
    for r in result["ord"]:
        assert r["ord_mode"] == "interpolate" and r["fused_step"] is False  # no CUDA
        assert r["ratio"]["n"] == 2 and r["ratio"]["low"] <= r["ratio"]["median"] <= r["ratio"]["high"]
    text = capsys.readouterr().out
    assert "aten::mm" in text and "whole schedule: 30 steps" in text
    assert "median of paired ratios" in text and "ORD_MODE=interpolate, plain torch" in text


@pytest.fixture
def timed_trainer(request):
    """step_time.build, which removes its fast forms from the module afterwards."""

    def build(*args):
        timed = step_time.build(*args)
        request.addfinalizer(timed.close)
        return timed

    return build


def test_what_was_measured_is_written_before_a_later_stage_fails(tiny_env, tmp_path, monkeypatch):
    """Fails if a machine that goes away in stage 2 takes the times of stage 1 with it."""
    out, real = tmp_path / "out.json", step_time.measure_stage

    def measure_stage(timed, stage, steps):
        if stage == 1:
            raise RuntimeError("gone")
        return real(timed, stage, steps)

    monkeypatch.setattr(step_time, "measure_stage", measure_stage)
    with pytest.raises(RuntimeError, match="gone"):
        step_time.main(["--steps", "2", "--no-evaluation", "--json", str(out)], tiny_env)
    (stage,) = json.loads(out.read_text())["stages"]
    assert stage["ms_step"] > 0 and stage["evaluation_ms"] is None


@pytest.mark.parametrize("given", ({}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}))
def test_steps_are_timed_with_the_trainers_allocator(given, monkeypatch):
    """Fails if the timed step uses another allocator than a run, one whose blocks do not fit later stages."""
    names, found = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), []
    wrong = {"DEVICE": "cpu", "MODEL": "nonsense"}  # refused right after
    for start in (lambda: supervise.main(train_gpt, [], wrong), lambda: step_time.main([], wrong)):
        for name in names:
            monkeypatch.setenv(name, "")  # so that it is restored
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert start() == 2
        found.append({name: os.environ[name] for name in names if name in os.environ})
    assert found[0] == found[1] == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_step_time_refuses_a_stage_without_steps(tiny_env, capsys):
    assert step_time.main(["--stages", "4"], tiny_env) == 2
    assert "wanted some of 1,2,3" in capsys.readouterr().err
    assert step_time.main(["--script", "train_gpt_simple.py"], tiny_env) == 2
    assert "train_gpt_simple.py has no Trainer to time" in capsys.readouterr().err
    assert step_time.main([], {**tiny_env, "BATCH_SIZES": "7"}) == 2
    assert "BATCH_SIZES" in capsys.readouterr().err


@pytest.mark.parametrize("option", (["--json", "nowhere/out.json"], ["--ord", "-3"], ["--steps", "-1"]))
def test_step_time_refuses_an_option_before_it_measures(option, tiny_env, capsys, monkeypatch):
    """Fails if a bad option costs the measurements that come before its use."""
    monkeypatch.setattr(step_time, "build", None)
    assert step_time.main(option, tiny_env) == 2
    assert option[0] in capsys.readouterr().err


MEASUREMENTS = {
    "stage": lambda timed: step_time.measure_stage(timed, 0, 2),
    "twins": lambda timed: step_time.compare_twins([timed, timed], 0, 2),
}


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_steps_without_numbers_are_not_timed(measure, tiny_env, timed_trainer, monkeypatch):
    """Fails if NaN losses count as a measurement (steps are 6 to 8% faster on an H100), even just the last.

    On a GPU a loss is read a step late.
    """
    timed, real, steps = timed_trainer("train_gpt", tiny_env), step_time.Timed.step, []

    def step():
        real(timed)
        steps.append(len(steps))
        if len(steps) == 8:  # 2 warm pairs and 2 timed ones, or 4 timed ones
            timed.pending = torch.tensor(math.nan), lambda: None

    monkeypatch.setattr(timed, "step", step)
    if measure is MEASUREMENTS["twins"]:
        monkeypatch.setattr(step_time, "WARM_PAIRS", 0)
    with pytest.raises(RuntimeError, match="the loss is nan"):
        measure(timed)
    assert len(steps) == 8


def test_timing_changes_no_number(tiny_env, timed_trainer):
    """Fails if recorded steps give other weights than the trainer's own loop, or leave methods wrapped."""
    backward = torch.Tensor.backward
    timed = timed_trainer("train_gpt", tiny_env)
    timed.enter(0)
    timed.pair(recorded=True)
    timed.pair(recorded=False)
    assert torch.Tensor.backward is backward and "all_reduce" not in vars(timed.ranks)
    s, o, config = train_gpt.read_settings(tiny_env)
    ranks = Ranks("cpu")
    shards, _ = train_gpt.open_data(s, 1)
    trainer, data = (train_gpt.Trainer(s, o, config, 256, ranks), train_gpt.TrainData(shards, s, ranks))
    trainer.enter(0)
    for i in range(4):
        trainer.step(i, data.next((256, 0), (256, 0)))
    for (name, a), b in zip(trainer.model.named_parameters(), timed.trainer.model.parameters()):
        assert torch.equal(a, b), name


def test_stages_are_entered_with_what_lies_between(tiny_env, request):
    """Stage 3 alone: the long window has grown, and timed steps come after the untying."""
    config = small_config(train_gpt, windows=((1, 2), (1, 3), (1, 3), (1, 4)))
    s, o, _ = train_gpt.read_settings({**tiny_env, "BATCH_SIZES": "256,256,256,256"})
    timed = step_time.Timed(train_gpt, s, o, config, train_gpt.open_data(s, 1), Ranks("cpu"))
    request.addfinalizer(timed.close)
    assert timed.schedule.untie_step == 21 and list(timed.steps_of(2)) == list(range(22, 30))
    timed.enter(2)
    assert not timed.schedule.tied(timed.entered)
    assert timed.trainer.stage == 2
    assert timed.trainer.model.rotary.scale == pytest.approx(0.1 * (1 + 0.2 * math.log(3 / 2)))
    timed.pair(recorded=False)


class Ticks:
    """Clock that a test sets."""

    cuda, now = False, 0.0

    def mark(self):
        return self.now

    def ms(self, start, end):
        return end - start


def test_time_belongs_to_the_innermost_call():
    clock = Ticks()
    parts = step_time.Parts(clock)

    def spend(ms):
        clock.now += ms

    class Work:
        def wait(self):
            spend(5)

    start = parts.wrap_collective(lambda: spend(2) or Work())

    def optimizer():
        spend(10)
        work = start()
        spend(1)
        work.wait()

    timed, backward = parts.wrap("optimizer", optimizer), parts.wrap("backward", lambda: spend(100))
    timed()  # not recording
    assert parts.take() == []
    with parts.recording():
        spend(3)
        timed()
        backward()
    spend(1000)
    with parts.recording():
        timed()
    spent = parts.spent(parts.take())
    assert spent == {
        "data": 0,
        "forward": 0,
        "backward": 100,
        "communication": 14,
        "optimizer": 22,
        "other": 3,
    }


def test_interval_of_the_median():
    """Textbook order statistics: for n = 10 the second and the ninth cover the median in 97.9%."""
    ten = step_time.median_interval([3, 1, 2, 10, 9, 8, 4, 7, 5, 6])
    assert (ten["low"], ten["median"], ten["high"], ten["n"]) == (2, 5.5, 9, 10)
    assert ten["confidence"] == pytest.approx(1 - 22 / 1024)
    three = step_time.median_interval([1, 2, 4])
    assert (three["low"], three["high"]) == (1, 4) and three["confidence"] == pytest.approx(0.75)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        found = step_time.median_interval(rng.exponential(size=21))
        hits += found["low"] <= math.log(2) <= found["high"]
    assert hits / 400 == pytest.approx(found["confidence"], abs=0.03)


# ---------------------------------------------------------------------------------------------------
# kernel_times.py
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_timed_on_tensors_that_lie_as_in_a_layer(kind, monkeypatch):
    """Fails if kernel_times.py gives attention other shapes or strides than the trainer's layers do."""
    kernel_times = pytest.importorskip("kernel_times", reason="triton is not installed")
    model, batch = small_model(train_gpt, vocab_size=VOCAB, **KINDS[kind]), make_batch([9, 23])
    attend, seen = Documents.attend, set()

    def spy(self, q, k, v, *known):
        seen.add((known[:2], *((x.shape, x.stride()) for x in (q, k, v))))
        return attend(self, q, k, v, *known)

    monkeypatch.setattr(Documents, "attend", spy)
    c = model.config
    windows = tuple(w * c.window_block for w in c.windows[0])
    model.train_loss(batch, windows, True, torch.ones(1))
    wanted = seen.copy()
    seen.clear()
    for case in kernel_times.attention_cases(c, batch, "sdpa", windows):
        case.run()
    assert seen == wanted


def test_updates_are_timed_in_a_graph(monkeypatch):
    """Fails if many small launches are timed at the host's pace, or triton's timer takes other arguments."""
    kernel_times = pytest.importorskip("kernel_times", reason="triton is not installed")
    for name, ms in (("do_bench", 1.0), ("do_bench_cudagraph", 2.0)):
        real = getattr(kernel_times.triton.testing, name)
        monkeypatch.setattr(kernel_times.triton.testing, name, mock.create_autospec(real, return_value=ms))
    case = kernel_times.Case("x", 1, print)
    assert [kernel_times.measure(case, True, in_graph)["ms"] for in_graph in (False, True)] == [1.0, 2.0]
