"""Benchmarks: FLOP against torch's counter on the real model, the scaling model against the trainers' own
sharding and hand-made cases, step_time.py on a tiny run."""

import csv
import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    cpu_forms,
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
    """Count a tile whole if it holds a visible pair."""
    for tile in (1, 3, 16):
        for length in (1, 5, 48, 70):
            pairs = [(q, k) for q in range(length) for k in range(q + 1) if q - k <= window]
            blocks = {(q // tile, k // tile) for q, k in pairs}
            assert flops.visible_pairs([length], window, tile) == len(blocks) * tile**2
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


@pytest.mark.parametrize("shape", ((16, 16), (16, 24), (24, 16), (16, 32), (64, 16)))
def test_polar_flop_equals_torchs_count(shape):
    """A CPU's fast form uses the Gram matrix for a matrix at least twice as long as wide."""
    with cpu_forms(train_gpt), FlopCounterMode(display=False) as counted:
        train_gpt.polar_express(torch.randn(3, *shape), torch.float32)
    gram = max(shape) >= 2 * min(shape)
    assert counted.get_total_flops() == 3 * flops.polar_flop(*shape, gram=gram)


# ---------------------------------------------------------------------------------------------------
# The scaling model
# ---------------------------------------------------------------------------------------------------

MACHINE = scaling_model.Machine()
PRESETS = scaling_model.read_presets()
SMALL = PRESETS["gpt2-small"]


@pytest.mark.parametrize("world_size", (1, 2, 3, 8, 16))
@pytest.mark.parametrize("kind", ("everything", "fewer key heads", "in groups"))
def test_owned_matrices_and_padding_are_those_of_the_real_optimizer(kind, world_size):
    """busy_share, owned and padding against every rank's optimizer, built one by one."""
    model = small_model(train_gpt, vocab_size=VOCAB, **GROUPED[kind])
    o, shapes, real = read(train_gpt)[1], flops.matrix_shapes(model.config), {}
    for rank in range(world_size):
        optimizer = make_optimizer(train_gpt, model, o, ranks=lone_ranks(rank, world_size))
        buckets = [b for b in optimizer.buckets if isinstance(b, train_gpt.MatrixBucket)]
        assert {tuple(b.mine.shape[1:]): len(b.all_names) for b in buckets} == shapes
        for bucket in buckets:
            n = len(bucket.all_names)
            assert bucket.mine.shape[0] == scaling_model.owned(n, world_size)
            real.setdefault(n, []).append(len(bucket.names))
        padded = sum(len(b.weights) for b in buckets)
        assert padded == scaling_model.padded_matrix_params(model.config, world_size)
    for n, names in real.items():
        assert sum(names) % n == 0  # each matrix has one owner (two shapes may have as many)
        slots = len(names) * scaling_model.owned(n, world_size)
        assert scaling_model.busy_share(n, world_size) == pytest.approx(sum(names) / slots)


def test_passes_a_step_are_those_of_the_trainers_data(tmp_path):
    path = write_shard(tmp_path / "made_train_0.bin", make_tokens([500] * 1200))
    shard = open_shard(path)
    for batch in (131_072, 262_144, 393_216):
        for ranks in (1, 2, 8, 16):
            s = read(train_gpt, MAX_DOC_TOKENS=2048)[0]
            data = train_gpt.TrainData([shard], s, lone_ranks(0, ranks))
            assert scaling_model.num_passes(batch, ranks) == len(data.make(batch)), (batch, ranks)


def step(ranks, machine=MACHINE, tied=False, **changes):
    c = SMALL.config
    return scaling_model.step_seconds(c, machine, 393_216, c.windows[2], ranks, tied, **changes)


def test_more_gpus_do_not_add_work_and_do_not_send_less():
    runs = [step(r) for r in (1, 2, 4, 8, 16, 32, 64)]
    assert runs[0]["communication"] == 0
    assert step(1, tied=True)["adds"] < runs[0]["adds"]  # a tied head's gradient is the embedding's
    for a, b in zip(runs, runs[1:]):
        for part in ("matmul", "head", "elementwise", "logits"):
            assert b[part] == pytest.approx(a[part] / 2)
        assert b["attention"] <= a["attention"] / 2 * 1.01  # smaller slices cut documents shorter
        assert b["polar"] <= a["polar"]
        assert b["communication"] > a["communication"]


def test_slower_parts_make_a_slower_step():
    usual = sum(step(16).values())
    rates = ("matmul_flops", "head_flops", "attention_flops", "polar_flops", "memory_bytes", "network_bytes")
    for field in rates:
        slower = dataclasses.replace(MACHINE, **{field: getattr(MACHINE, field) / 2})
        assert sum(step(16, slower).values()) > usual, field
    for field in ("crossings", "attention_tiles", "attention_bytes", "table_bytes", "add_bytes", "gap_s"):
        slower = dataclasses.replace(MACHINE, **{field: getattr(MACHINE, field) * 2})
        assert sum(step(16, slower).values()) > usual, field
    assert sum(step(256, dataclasses.replace(MACHINE, launch_s=1e-4)).values()) > sum(step(256).values())


def test_rings_by_hand():
    m = dataclasses.replace(
        MACHINE,
        collective_s=0.0,
        hop_s=0.0,
        network_hop_s=0.0,
        nvlink_bytes=100.0,
        network_bytes=10.0,
        network_share=1.0,
        gpus_per_node=8,
    )
    assert m.ring(800, 1) == 0
    assert m.ring(800, 8) == pytest.approx(700 / 100)
    assert m.ring(1600, 16) == pytest.approx(1500 / 80)  # eight cards cross the border together
    latency = dataclasses.replace(m, collective_s=1.0, hop_s=0.1, network_hop_s=0.5)
    assert latency.ring(0, 16) == pytest.approx(1 + 14 * 0.1 + 2 * 0.5)


def test_optimizer_timeline_by_hand():
    """Reductions run back to back; updates start when theirs arrives; gathers follow, in order."""
    first = scaling_model.Bucket(reduce_s=1, update_s=2, gather_s=3, polar_s=0)
    second = scaling_model.Bucket(reduce_s=4, update_s=1, gather_s=1, polar_s=0)
    assert scaling_model.optimizer_seconds([first]) == (6, 4)
    assert scaling_model.optimizer_seconds([first, second]) == (9, 6)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 ranks do not divide 8 slices"):
        step(3)


def test_slices_hold_their_tokens_and_drop_more_when_small():
    shares = []
    for size in (512, 2048, 16_384):
        slices = scaling_model.draw_slices(size, MACHINE)
        ends = np.cumsum(slices.lengths)
        boundaries = np.arange(size, ends[-1] + 1, size)
        assert np.isin(boundaries, ends).all() and slices.lengths.max() <= min(size, 2048)
        shares.append(slices.dropped)
    assert shares[0] > shares[1] > shares[2] > 0


RECORDS = Path(scaling_model.ROOT) / "records"
FIRST_HOUR = RECORDS / "2026-11-26_first_hour_h100"
KERNELS = {  # of each part, by name
    ("matmul",): r"nvjet_sm90_tst_.*_bz_|mlp_hopper|.*splitKreduce_kernel<32, 16, int, float",
    ("head",): r"nvjet_sm90_q",
    ("attention",): r"pytorch_flash",
    ("logits",): r"loss_|quantize_",
    ("tables", "adds"): r".*CUDAFunctor_add<c10::BF|triton_poi_fused_embedding_dense_backward|.*_view_41$",
    ("polar",): r"nvjet_sm90_tst_.*_bx_|gram_|Memcpy DtoD",
    ("updates",): r".*___lshift___|momentum_|polar_input_|row_scales_|apply_|.*FillFunctor<c10::BF",
}


def profiled_ms(stage):
    """Return ms per step by group of kernels; all other kernels are elementwise work. For stages 2 and 3 only
    the most expensive kernels are recorded."""
    if stage == 0:
        rows = json.loads((FIRST_HOUR / "kernels_stage_1.json").read_text(encoding="utf-8"))
        kernels = [(r["kernel"], r["ms_a_step"]) for r in rows]
    else:
        timed = json.loads((FIRST_HOUR / "c.json").read_text(encoding="utf-8"))
        kernels = [(r["what"], r["value"]) for r in timed[f"profile, stage {stage + 1}"]["rows"][3:]]
    found = dict.fromkeys([*KERNELS, ("elementwise",)], 0.0)
    for name, ms in kernels:
        groups = [
            parts for parts, pattern in KERNELS.items() if re.match(pattern, name.removeprefix("void "))
        ]
        assert len(groups) <= 1, name
        found[groups[0] if groups else ("elementwise",)] += ms
    return found


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_parts_are_those_measured(stage):
    """Constants come from stage 1; later losses read fewer tokens, which the model ignores."""
    m, c = dataclasses.replace(MACHINE, **scaling_model.MIX), SMALL.config
    batch = SMALL.settings.batch_sizes[stage]
    modelled = scaling_model.step_seconds(c, m, batch, c.windows[stage], 1, stage < 2)
    measured = profiled_ms(stage)
    within = {("logits",): 0.11 if stage else 0.01, ("updates",): 0.04, ("tables", "adds"): 0.02}
    for parts in measured if stage == 0 else list(measured)[:4]:
        ms = 1000 * sum(modelled[part] for part in parts)
        assert ms == pytest.approx(measured[parts], rel=within.get(parts, 0.025 if stage else 0.01)), parts
    if stage == 0:
        gaps = 216.8611 - sum(measured.values())
        assert 1000 * modelled["gaps"] == pytest.approx(gaps, rel=0.02)


def test_timed_steps_are_those_measured_and_the_errors_those_that_the_record_states():
    ms, record = [], (RECORDS / "2026-11-26_scaling_model_h100" / "README.md").read_text(encoding="utf-8")
    for name, stages in (("b.json", (1,)), ("c.json", (2, 3))):
        timed = json.loads((FIRST_HOUR / name).read_text(encoding="utf-8"))
        ms += [timed[f"steps, stage {stage}"]["rows"][0]["value"] for stage in stages]
    more = json.loads((FIRST_HOUR / "pass_tokens_131072.json").read_text(encoding="utf-8"))
    ours, later, wide, *public = scaling_model.TIMED
    assert (*ours.ms, *later.ms[1:], *wide.ms) == pytest.approx((*ms, more["stage 1"]["median"]), abs=0.05)
    for timed in scaling_model.TIMED:
        modelled = scaling_model.modelled_ms(SMALL, timed)
        errors = {ms: x / ms - 1 for ms, x in zip(timed.ms, modelled) if ms == ms}
        for ms, error in errors.items():
            assert f"{ms:.1f} ({ms * (1 + error):.1f}, {error:+.1%})" in record, timed
            limit = {"set from its profile": 0.002, "held out": 0.015, "the same model": 0.06}
            assert abs(error) < limit.get(timed.kind, 0.09), timed


def test_documents_of_another_text_make_attention_slower():
    """Document lengths are an assumption: with those of the timed text, there are more pairs."""
    longer = step(1, dataclasses.replace(MACHINE, **scaling_model.MIX))
    assert longer["attention"] > 1.1 * step(1)["attention"]
    assert longer["matmul"] == step(1)["matmul"]


def test_larger_passes_are_fewer():
    assert [scaling_model.num_passes(131_072, 1, n) for n in (1, 65_536, 131_072)] == [8, 2, 1]
    assert step(1, pass_tokens=196_608)["gaps"] == step(1)["gaps"] / 4


def test_set_changes_the_tables_and_nothing_that_is_compared(capsys):
    """Printed predictions are for the machines they name; --set affects only the tables after them."""
    printed = []
    for changes in ([], ["--set", "memory_bytes=4.3272e12"]):
        assert scaling_model.main(["--preset", "gpt2-small", "--gpus", "1", *changes]) == 0
        out = capsys.readouterr().out
        ms = float(re.search(r"^1 +([\d.]+)", out, re.M)[1])
        printed.append((out[out.index("Against") : out.index("gpt2-small:")], ms))
    (before, h100), (after, h200) = printed
    assert before == after and h200 < 0.9 * h100
    runs = {row[:2]: row[2] for row in scaling_model.predictions(SMALL)}
    assert runs["1 x H200", "FA2"].ms_step == pytest.approx(h200, abs=0.06)


def test_predictions_are_those_of_the_record():
    """docs/gpus.md and the record quote these numbers, so a change of the model must update them."""
    found = {row[:2]: row[2] for row in scaling_model.predictions(SMALL)}
    record = (RECORDS / "2026-11-26_scaling_model_h100" / "README.md").read_text(encoding="utf-8")
    guide = (Path(scaling_model.ROOT) / "docs" / "gpus.md").read_text(encoding="utf-8")
    for (gpus, code), run in found.items():
        rate = run.tokens / run.seconds
        assert f"| {gpus} | {code} | {run.ms_step:.1f} | {rate:,.0f} | {run.seconds:.1f} |" in record
        if gpus.startswith("1 "):
            assert f"{rate / 1000:.0f}k" in guide
    for rate, tokens_per_s in ((790e12, 1.15e6), (990e12, 1.44e6)):
        assert scaling_model.arithmetic_limit(SMALL.config, rate) == pytest.approx(tokens_per_s, rel=0.01)


def test_run_adds_up_the_stages():
    run = scaling_model.run_schedule(SMALL, MACHINE, 8)
    batches, c, by_hand = (131_072, 262_144, 393_216, 393_216), SMALL.config, 0.0
    assert run.steps == 1600
    assert run.tokens == pytest.approx(520 * sum(batches[:3]) + 40 * batches[3])
    for stage, (steps, batch) in enumerate(zip((520, 520, 520, 40), batches)):
        parts = scaling_model.step_seconds(c, MACHINE, batch, c.windows[stage], 8, tied=stage < 2)
        by_hand += steps * sum(parts.values())
    assert run.seconds == pytest.approx(by_hand) and run.seconds == pytest.approx(sum(run.parts.values()))


@pytest.mark.parametrize("style", ("text", "markdown"))
def test_scaling_model_prints_and_writes(style, tmp_path, capsys):
    arguments = ["--preset", "gpt2-small", "--gpus", "1,8", "--table", style]
    assert scaling_model.main([*arguments, "--csv", str(tmp_path / "out.csv")]) == 0
    out = capsys.readouterr().out
    assert "1,153,646 tokens/s" in out and "held out" in out and "network_bytes = 5e+10" in out
    assert ("| 8 |" in out) == (style == "markdown")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [r["gpus"] for r in rows] == ["1", "8"]
    for r in rows:
        parts = sum(float(r[f"{name}_ms"]) for name in scaling_model.PARTS)
        assert parts == pytest.approx(float(r["ms_step"]), rel=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--preset", "gpt3"], "gpt3"),
        (["--gpus", "3"], "powers of two"),
        (["--gpus", "x"], "'x'"),
        (["--set", "speed=1"], "speed"),
        (["--set", "launch_s=fast"], "not a number"),
        (["--gpus", "0"], "above 0"),
    ),
)
def test_scaling_model_refuses(arguments, message, capsys):
    assert scaling_model.main(arguments) == 2
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
    assert step_time.main(["--steps", "2", "--ord", "2", "--json", str(out)], tiny_env) == 0
    result = json.loads(out.read_text())
    stages, total = result["stages"], result["schedule"]
    assert [r["stage"] for r in stages] == [1, 2, 3] and stages[2]["same_as"] == 1
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
    assert sum(total["shares"].values()) == pytest.approx(1) and total["shares"]["evaluation"] > 0
    assert total["steps"] == 30 and total["validations"] == 4 and total["tokens"] == 10 * (256 + 512 + 256)
    ms = 10 * sum(r["ms_step"] for r in stages)
    assert total["train_minutes"] == pytest.approx(ms / 60_000)
    evaluation = stages[0]["evaluation_ms"] * 3 + stages[1]["evaluation_ms"]
    assert total["minutes_with_evaluation"] == pytest.approx((ms + evaluation) / 60_000)
    assert result["memory"]["peak_rss_mib"] > 100 and result["settings"]["val_tokens"] == 2048
    assert result["settings"]["spectral_lr_mul"] == 0.01  # the twin's, of this preset
    assert [r["stage"] for r in result["ord"]] == [1, 2]
    for r in result["ord"]:
        assert r["ord_mode"] == "interpolate" and r["fused_step"] is False  # no CUDA
        assert r["ratio"]["n"] == 2 and r["ratio"]["low"] <= r["ratio"]["median"] <= r["ratio"]["high"]
    text = capsys.readouterr().out
    assert "the same step as stage 1" in text and "whole schedule: 30 steps" in text
    assert "median of paired ratios" in text and "ORD_MODE=interpolate, plain torch" in text


@pytest.fixture
def timed_trainer(request):
    """step_time.build, which removes its fast forms from the module afterwards."""

    def build(*args):
        timed = step_time.build(*args)
        request.addfinalizer(timed.close)
        return timed

    return build


def test_evaluation_is_scaled_by_what_a_batch_adds(tiny_env, timed_trainer, monkeypatch):
    """Fails if a validation's one-off work, reading its shards, counts per batch: 5 times in gpt2-small."""
    timed = timed_trainer("train_gpt", {**tiny_env, "VAL_TOKENS": "3072"})
    asked, now = [], [0.0]

    def evaluate(val_loss, batches, windows, tied, ranks):
        asked.append(len(list(batches)))
        now[0] += 10 + 3 * asked[-1]  # seconds

    monkeypatch.setattr(train_gpt, "evaluate", evaluate)
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: now[0])
    assert timed.evaluation_ms() == pytest.approx(1000 * (10 + 3 * 3)) and asked == [1, 2]


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
    assert step_time.main([], {**tiny_env, "BATCH_SIZES": "7"}) == 2
    assert "BATCH_SIZES" in capsys.readouterr().err


@pytest.mark.parametrize("option", (["--json", "nowhere/out.json"], ["--ord", "-3"]))
def test_step_time_refuses_an_option_before_it_measures(option, tiny_env, capsys, monkeypatch):
    """Fails if a bad option costs the measurements that come before its use."""
    monkeypatch.setattr(step_time, "build", None)
    assert step_time.main(option, tiny_env) == 2
    assert option[0] in capsys.readouterr().err


MEASUREMENTS = {
    "stage": lambda timed: step_time.measure_stage(timed, 0, 2, evaluate=False),
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
    assert not timed.trainer.tied and timed.trainer.optimizer.by_name["embed"].active
    assert timed.trainer.stage == 2
    assert timed.trainer.model.rotary.scale == pytest.approx(0.1 * (1 + 0.2 * math.log(3 / 2)))
    assert step_time.step_key(timed, 2) != step_time.step_key(timed, 1)  # untied
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
