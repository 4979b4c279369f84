"""Schedule, data and settings against hand-computed numbers, and everything that must be refused."""

import json
import math
import os
import re
import threading

import numpy as np
import pytest
import torch
from helpers import (
    MARK,
    TRAINERS,
    Params,
    lone_ranks,
    make_optimizer,
    make_tokens,
    optimizer_settings,
    read,
    write_shard,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
import train_gpt_muon_ord as ord_gpt
from data.documents import DocumentStream
from data.shards import DataError, TokenStream, open_shards
from runtime import supervise
from runtime.log_writer import source_hash
from runtime.settings import SettingsError, knobs

MORE = int(os.environ.get("FUZZ", 1))  # FUZZ=100 pytest ...: a long search


# ------------------------------------------------------------------------------------------------ schedule


def schedule(model="gpt2-small", **env):
    s, _, config = read(train_gpt, MODEL=model, **env)
    return train_gpt.Schedule(s, config)


ONE, TWO, THREE, EXTENSION = (
    (131072, (128, 384), 1.0),
    (262144, (384, 896), 1.52),
    (393216, (640, 1408), 1.73),
    (393216, (768, 1664), 1.0),
)
# Scheduled steps -> step -> (stage's batch, windows and multiplier; fraction of the cooldown done; weights of
# further tokens; Muon's momentum). By hand: N/3 and 2N/3 rounded, the cooldown from int(0.45 N)
# (int((1 - 0.55) * 100) is 44 in floating point), 40 steps after N.
TABLES = {
    1560: {  # stages end at 520, 1040, 1560; 859 steps of cooldown from 701
        0: (ONE, 0, [1, 0.5, 0.25], 0.85),
        260: (ONE, 0, [1, 0.5, 0.125], 0.85 + 0.1 * 260 / 300),
        519: (ONE, 0, [1, 0.5, 0.25 / 520], 0.95),
        520: (TWO, 0, [1, 0.5], 0.95),
        701: (TWO, 0, [1, 0.5 * 339 / 520], 0.95),
        780: (TWO, 79 / 859, [1, 0.25], 0.95),
        1039: (TWO, 338 / 859, [1, 0.5 / 520], 0.95),
        1040: (THREE, 339 / 859, [1], 0.95),
        1550: (THREE, 849 / 859, [1], 0.95),
        1559: (THREE, 858 / 859, [1], 0.95 - 0.1 * 9 / 50),
        1560: (EXTENSION, 1, [1], 0.95 - 0.1 * 10 / 50),
        1599: (EXTENSION, 1, [1], 0.95 - 0.1 * 49 / 50),
    },
    100: {  # 33 (33.33), 67 (66.67), 100; 56 steps from 44; momentum only rises
        0: (ONE, 0, [1, 0.5, 0.25], 0.85),
        32: (ONE, 0, [1, 0.5, 0.25 / 33], 0.85 + 0.1 * 32 / 300),
        33: (TWO, 0, [1, 0.5], 0.861),
        44: (TWO, 0, [1, 0.5 * 23 / 34], 0.85 + 0.1 * 44 / 300),
        50: (TWO, 6 / 56, [1, 0.25], 0.85 + 0.1 * 50 / 300),
        66: (TWO, 22 / 56, [1, 0.5 / 34], 0.872),
        67: (THREE, 23 / 56, [1], 0.85 + 0.1 * 67 / 300),
        99: (THREE, 55 / 56, [1], 0.883),
        100: (EXTENSION, 1, [1], 0.85 + 0.1 * 100 / 300),
        139: (EXTENSION, 1, [1], 0.85 + 0.1 * 139 / 300),
    },
}


DECAYS = {  # multiplier, from that of the stage and the fraction of the cooldown done
    "linear": lambda peak, done: peak * (1 - done) + 0.1 * done,
    "exp": lambda peak, done: peak * 0.1**done,
    "cosine": lambda peak, done: 0.1 + (peak - 0.1) * (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda peak, done: peak,
}


@pytest.mark.parametrize("num_steps", TABLES)
def test_every_column_of_the_schedule(num_steps):
    """Fails if a stage begins a step early or late, or if its batch, windows, multiplier under any decay,
    weights of further tokens, cooldown or Muon momentum are wrong."""
    s, o, config = read(train_gpt, MODEL="gpt2-small", NUM_SCHEDULED_ITERATIONS=num_steps)
    plan = train_gpt.Schedule(s, config)
    optimizer = make_optimizer(train_gpt, Params({}), o, plan.num_steps)
    decays = {kind: schedule(NUM_SCHEDULED_ITERATIONS=num_steps, LR_DECAY_TYPE=kind) for kind in DECAYS}
    assert plan.num_steps == num_steps + 40 and plan.windows(train_gpt.NUM_STAGES) == (768, 2560)
    for step, ((batch, windows, peak), done, weights, momentum) in TABLES[num_steps].items():
        assert (plan.batch_tokens(step), plan.windows(plan.stage(step))) == (batch, windows), step
        for kind, multiplier in DECAYS.items():
            assert decays[kind].lr_mul(step) == pytest.approx(multiplier(peak, done), rel=1e-12), (kind, step)
        np.testing.assert_allclose(plan.predict_weights(step).numpy(), weights, atol=1e-6, err_msg=str(step))
        assert optimizer.momentum(step) == pytest.approx(momentum, rel=1e-12), step


def test_the_head_is_untied_after_two_thirds():
    """Fails if the last tied step is not round(2N/3) | 1, an odd step, on which Adam moves: 1040, 1037
    (1036.67), 67 (66.67) and 600 before | 1."""
    for num_steps, last in {1560: 1041, 1555: 1037, 100: 67, 900: 601}.items():
        assert schedule(NUM_SCHEDULED_ITERATIONS=num_steps).untie_step == last
    assert schedule("dense-88m").untie_step is None


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
def test_few_steps_in_thirds(num_steps):
    """Fails if a stage without steps is an error, or a step belongs to no stage."""
    plan = schedule(NUM_SCHEDULED_ITERATIONS=num_steps, NUM_EXTENSION_ITERATIONS=1)
    stages = {1: [1, 3], 2: [0, 2, 3], 3: [0, 1, 2, 3], 4: [0, 1, 1, 2, 3], 5: [0, 0, 1, 2, 2, 3]}
    assert [plan.stage(i) for i in range(num_steps + 1)] == stages[num_steps]
    assert all(len(plan.predict_weights(i)) for i in range(num_steps + 1))


def test_other_cooldowns():
    """Fails if COOLDOWN_FRAC or LR_DECAY_FINAL is not obeyed: of 100 steps, the last 20 decay to 0.3."""
    plan = schedule(NUM_SCHEDULED_ITERATIONS=100, COOLDOWN_FRAC=0.2, LR_DECAY_FINAL=0.3, LR_MULS="1,1,2,1")
    table = {66: 1, 67: 2, 80: 2, 85: 2 * 0.75 + 0.3 * 0.25, 99: 2 * 0.05 + 0.3 * 0.95, 100: 0.3, 139: 0.3}
    assert {step: plan.lr_mul(step) for step in table} == pytest.approx(table)
    plan = schedule(COOLDOWN_FRAC=0)
    assert [plan.lr_mul(i) for i in (0, 800, 1559, 1560, 1599)] == [1.0, 1.52, 1.73, 0.1, 0.1]
    assert schedule(COOLDOWN_FRAC=1).lr_mul(0) == 1.0


# Scheduled steps -> (LR_DECAY_SWITCH_STEP, fraction of the cooldown done there,
# {step: (its stage's multiplier, fraction of the second decay done)}), by hand: 660, 355 and 40 steps of it
SWITCHES = {
    1560: (900, 199 / 859, {900: (1.52, 0), 1039: (1.52, 139 / 660), 1040: (1.73, 140 / 660), 1599: (1, 1)}),
    1555: (1200, 501 / 856, {1200: (1.73, 0), 1271: (1.73, 0.2), 1554: (1.73, 354 / 355), 1555: (1, 1)}),
    100: (60, 16 / 56, {60: (1.52, 0), 67: (1.73, 0.175), 80: (1.73, 0.5), 100: (1, 1), 139: (1, 1)}),
}


@pytest.mark.parametrize("first", ["linear", "exp"])
@pytest.mark.parametrize("second", ["linear", "exp", "constant"])
@pytest.mark.parametrize("num_steps", SWITCHES)
def test_second_decay(num_steps, second, first):
    """Fails unless the second decay starts, in each stage, at v, where the first has brought that stage's
    multiplier b by the switch, and ends at b x LR_DECAY_SECOND_FINAL (or LR_DECAY_FINAL)."""
    switch, done, steps = SWITCHES[num_steps]
    env = dict(NUM_SCHEDULED_ITERATIONS=num_steps, LR_DECAY_TYPE=first)
    for own, final in ((0.1, {}), (0.3, dict(LR_DECAY_SECOND_FINAL=0.3))):
        plan = schedule(LR_DECAY_SWITCH_STEP=switch, LR_DECAY_SECOND_TYPE=second, **final, **env)
        assert plan.lr_mul(switch - 1) == schedule(**env).lr_mul(switch - 1)
        for step, (b, t2) in steps.items():
            v, e = DECAYS[first](b, done), b * own
            expected = {"constant": v, "linear": v * (1 - t2) + e * t2, "exp": v * (e / v) ** t2}[second]
            assert plan.lr_mul(step) == pytest.approx(expected, rel=1e-12), step


def test_second_final_is_lr_decay_finals_unless_set():
    """Fails if the second decay ends at 0.1 whatever LR_DECAY_FINAL is, or 0 counts as unset."""
    env = dict(LR_DECAY_FINAL=0.2, LR_DECAY_SWITCH_STEP=1300, LR_DECAY_SECOND_TYPE="linear")
    assert schedule(**env).lr_mul(1560) == pytest.approx(0.2)
    assert schedule(**env, LR_DECAY_SECOND_FINAL="").lr_mul(1560) == pytest.approx(0.2)
    assert schedule(**env, LR_DECAY_SECOND_FINAL=0).lr_mul(1560) == 0
    constant = dict(LR_DECAY_TYPE="constant", LR_MULS="1,1,1,1", COOLDOWN_FRAC=0.5)  # which the switch needs
    assert schedule(**constant, **env).lr_mul(1560) == pytest.approx(0.2)


@pytest.mark.parametrize("switch", ["", 701, 1560])
def test_a_second_decay_outside_the_first_is_refused(switch):
    """Fails if a second decay that would never be, or that would replace the first, is silently ignored."""
    env = dict(LR_DECAY_SWITCH_STEP=switch) if switch else {}
    with pytest.raises(SettingsError, match=f"LR_DECAY_SWITCH_STEP={switch or 0}: wanted .* 701, .* 1560"):
        schedule(LR_DECAY_SECOND_TYPE="linear", **env)


@pytest.mark.parametrize("first", [True, False])
def test_an_exponential_decay_to_zero_is_refused(first):
    """Fails if a run may begin whose learning rate is 0 from the decay's first step on."""
    second = dict(LR_DECAY_SECOND_TYPE="exp", LR_DECAY_SECOND_FINAL=0, LR_DECAY_SWITCH_STEP=900)
    with pytest.raises(SettingsError, match="TYPE=exp to .*FINAL=0"):
        schedule(**(dict(LR_DECAY_TYPE="exp", LR_DECAY_FINAL=0) if first else second))


TO_ZERO = {
    "linear": ("LR_DECAY_FINAL", 0),
    "constant": ("LR_DECAY_SECOND_FINAL", 0),
    "exp": ("LR_MULS", "0,0,0,0"),
}


@pytest.mark.parametrize("kind", TO_ZERO)
@pytest.mark.parametrize("switch", [702, 1559])
def test_learning_rates_of_zero_are_no_error(kind, switch):
    """Fails if a decay to 0 divides by it, which would end a run in its last steps."""
    name, value = TO_ZERO[kind]
    plan = schedule(LR_DECAY_SWITCH_STEP=switch, LR_DECAY_SECOND_TYPE=kind, **{name: value})
    assert all(0 <= plan.lr_mul(step) <= 1.73 for step in range(1600))


def test_warm_up():
    """Fails if the warm-up does not rise linearly to its end, or starts at 0, which would waste a step."""
    plan = schedule(WARMUP_STEPS=10)
    np.testing.assert_allclose([plan.lr_mul(i) for i in (0, 4, 9, 10, 300)], [0.1, 0.5, 1, 1, 1])


def test_momentum_and_betas():
    """Fails if momentum falls before its warm-up ends, Adam's betas do not rise from 0 over
    BETA_WARMUP_STEPS, or the log shows betas that are not in force."""
    for env, total, table in (
        ({}, 320, {0: 0.85, 150: 0.9, 299: 0.85 + 0.1 * 299 / 300, 300: 0.89, 319: 0.852}),
        (dict(MUON_WARMUP_STEPS=5), 20, {4: 0.93, 5: 0.88, 19: 0.852}),
        (dict(MUON_WARMUP_STEPS=0, MUON_MOMENTUM=0.9), 60, {0: 0.9, 10: 0.9, 35: 0.875}),
        (dict(MUON_MOMENTUM=0.8), 60, {0: 0.8, 59: 0.8}),
    ):
        optimizer = make_optimizer(train_gpt, Params({}), optimizer_settings(train_gpt, **env), total)
        for step, value in table.items():
            assert optimizer.momentum(step) == pytest.approx(value), step
    for env, table in (
        ({}, {0: (0.5, 0.95), 7: (0.5, 0.95)}),
        (dict(BETA_WARMUP_STEPS=8), {0: (0, 0), 1: (0.0625, 0.11875), 4: (0.25, 0.475), 9: (0.5, 0.95)}),
    ):
        optimizer = make_optimizer(train_gpt, Params({}), optimizer_settings(train_gpt, **env), 99)
        for step, betas in table.items():
            fields = optimizer.log_fields(step, full=True)
            assert (float(fields["beta1"]), float(fields["beta2"])) == pytest.approx(betas, abs=5e-5)


def test_validation_steps():
    """Fails if a validation is missing or extra: every 50 steps, every 10 in the last 100, and at the end."""
    plan = schedule()
    expected = {*range(0, 1501, 50), *range(1500, 1601, 10)}
    assert {i for i in range(1601) if plan.s.validates(i, 1600)} == expected
    last = schedule(VAL_LOSS_EVERY=0, VAL_LOSS_EVERY_LAST=0)
    assert [i for i in range(1601) if last.s.validates(i, 1600)] == [1600]
    uneven = schedule(
        NUM_SCHEDULED_ITERATIONS=33, NUM_EXTENSION_ITERATIONS=0, VAL_LOSS_EVERY=10, VAL_LOSS_LAST_STEPS=0
    )
    assert [i for i in range(34) if uneven.s.validates(i, 33)] == [0, 10, 20, 30, 33]


def test_train_tokens_sets_the_number_of_steps():
    """Fails if TRAIN_TOKENS gives the wrong number of steps; the stages average 262144 tokens per step."""
    assert schedule(TRAIN_TOKENS=262144 * 900).num_steps == 940


def test_without_an_extension_the_last_validation_is_of_the_third_stage():
    """Fails if windows or YaRN of a stage that no step is in change the network that is validated last."""
    plan = schedule(NUM_EXTENSION_ITERATIONS=0)
    assert [plan.stage(step) for step in (0, 519, 520, 1559, 1560)] == [0, 0, 1, 2, 2]
    one_step = schedule(NUM_SCHEDULED_ITERATIONS=1, NUM_EXTENSION_ITERATIONS=0)
    assert one_step.stage(0) == one_step.stage(1)


# ------------------------------------------------------------------------------------------------ data


class Source:
    """Shard whose tokens encode their positions, so targets can be checked: token t is 1 + t mod 60000."""

    def __init__(self, folder, lengths, name="train_0.bin", mark=0):
        self.lengths, self.total = lengths, sum(lengths)
        self.starts = np.cumsum([0, *lengths[:-1]])
        tokens = 1 + np.arange(self.total) % 60000
        tokens[self.starts] = mark
        self.tokens = tokens
        write_shard(folder / name, tokens, vocab_size=60001)

    def pieces(self, long_docs):
        """Pieces that may be read with MAX_DOC_TOKENS=40, as {start: length}."""
        out = {}
        for start, length in zip(self.starts.tolist(), self.lengths):
            for at in range(start, start + (length if long_docs == "split" else 1), 40):
                out[at] = min(40, start + length - at)
        return out


def data_settings(folder, **env):
    base = dict(
        DATA_PATH=folder,
        TRAIN_FILES="train_*.bin",
        VAL_FILES="val_*.bin",
        VAL_TOKENS=1024,
        VAL_BATCH_TOKENS=1024,
        BATCH_SIZES="1024,1024,1024,1024",
        MAX_DOC_TOKENS=40,
        LONG_DOCS="cut",
    )
    return read(train_gpt, **{**base, **env})[0]


def train_data(s, rank=0, world_size=1):
    shards = open_shards(s.data_path, s.train_files, "TRAIN_FILES")
    return train_gpt.TrainData(
        shards, s, lone_ranks(rank, world_size), s.pass_tokens or train_gpt.MOST_TOKENS
    )


def steps_of(s, steps, rank=0, world_size=1, tokens=1024):
    """Return one rank's passes of the first steps."""
    data = train_data(s, rank, world_size)
    out = [data.next((tokens, 0), (tokens, 0) if i + 1 < steps else None) for i in range(steps)]
    data.prefetcher.close()
    return out


def documents_of(batch):
    """List (inputs, targets) of each document of a pass."""
    inputs, targets = batch.inputs_BT.flatten().numpy(), batch.targets_BT.flatten().numpy()
    bounds = batch.cu_seqlens.numpy()
    return [(inputs[a:b], targets[a:b]) for a, b in zip(bounds, bounds[1:]) if b > a]


LENGTHS = [*([3, 17, 39, 40, 41, 80, 200] * 60), 25]


@pytest.mark.parametrize("long_docs", ["cut", "split"])
def test_slices_hold_whole_documents_and_true_targets(tmp_path, long_docs):
    """Fails if a document lacks its start, is cut other than at its limit or its slice's end, crosses
    slices, or is followed by anything but the shard's next token."""
    source = Source(tmp_path, LENGTHS)
    s = data_settings(tmp_path, LONG_DOCS=long_docs)
    allowed = source.pieces(long_docs)
    for batches in steps_of(s, 8):
        for batch in batches:
            T, position = 128, 0
            for inputs, targets in documents_of(batch):
                # a token gives its position; a mark's target gives the next one
                start = int(inputs[0]) - 1 if inputs[0] else int(targets[0]) - 2
                want = source.tokens[start : start + len(inputs) + 1]
                assert (inputs == want[:-1] if len(want) > len(inputs) else inputs == want).all()
                assert (targets == np.append(want, MARK)[1 : len(inputs) + 1]).all()
                position += len(inputs)
                fills = position % T == 0  # the last of its slice may be cut
                assert len(inputs) == allowed[start] or fills and len(inputs) < allowed[start]
                assert (position - len(inputs)) // T == (position - 1) // T
            assert batch.inputs_BT.shape[1] == T and batch.inputs_BT.dtype == torch.int32
            assert batch.max_doc_tokens == 40 and batch.targets_BT.dtype == torch.int64


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_ranks_share_the_same_batch(tmp_path, tokens):
    """Fails if 1, 2, 4 and 8 ranks do not see the same global batch, in order, or a rank's slices depend on
    how many fit in a pass."""
    Source(tmp_path, LENGTHS * 3)
    s = data_settings(tmp_path)

    def read_all(world_size, s=s):
        steps = []
        ranks = [steps_of(s, 5, r, world_size, tokens) for r in range(world_size)]
        for step in range(5):
            passes = [b for rank in ranks for b in rank[step]]
            steps.append([torch.cat([b[i] for b in passes]).numpy() for i in (0, 1)])  # inputs, targets
        return np.array(steps)

    one = read_all(1)
    assert one.shape == (5, 2, 8, tokens // 8)
    for world_size in (2, 4, 8):
        assert (read_all(world_size) == one).all()
    small = data_settings(tmp_path, PASS_TOKENS=3 * tokens // 8)
    assert [len(b.inputs_BT) for b in steps_of(small, 1, tokens=tokens)[0]] == [3, 3, 2]
    for world_size in (1, 4):
        assert (read_all(world_size, small) == one).all()


def test_sixteen_ranks_cut_sixteen_slices(tmp_path):
    """Fails if more than eight ranks cannot train, with one slice each."""
    Source(tmp_path, LENGTHS)
    s = data_settings(tmp_path)
    firsts = [steps_of(s, 1, rank, 16)[0] for rank in range(16)]
    assert all(len(passes) == 1 and passes[0].inputs_BT.shape == (1, 64) for passes in firsts)
    assert len({passes[0].inputs_BT.numpy().tobytes() for passes in firsts}) == 16


def test_slices_of_many_ranks_are_multiples_of_16_tokens(tmp_path):
    """Fails if 16 ranks may cut a batch, which 8 slices divide, into slices that float8 cannot multiply."""
    for name in ("train_0.bin", "val_0.bin"):
        write_shard(tmp_path / name, **GOOD)
    s = data_settings(tmp_path, BATCH_SIZES="1024,1152,1024,1024")
    train_gpt.open_data(s, 8)
    said = "BATCH_SIZES stage 2 = 1152 is not a multiple of 16 slices x 16 tokens with 16 ranks; 1024 or 1280"
    with pytest.raises(SettingsError, match=said):
        train_gpt.open_data(s, 16)
    train_gpt.open_data(
        data_settings(tmp_path, VAL_TOKENS=1152, VAL_BATCH_TOKENS=1152), 16
    )  # no float8 there
    twenty = dict(BATCH_SIZES="2560,2560,2560,2560", VAL_TOKENS=1152, VAL_BATCH_TOKENS=1152)
    with pytest.raises(SettingsError, match="VAL_BATCH_TOKENS=1152 is not a multiple of 20 slices"):
        train_gpt.open_data(data_settings(tmp_path, **twenty), 20)


def one_epoch(s, num_tokens=128):
    """Return the first epoch's slices as (starts, lengths)."""
    documents, slices = train_data(s).documents, []
    while True:
        _, starts, lengths = documents.plan_slice(num_tokens)
        if documents.epoch:
            return slices
        slices.append((starts.tolist(), lengths.tolist()))


@pytest.mark.parametrize("long_docs", ["cut", "split"])
def test_an_epoch_loses_nothing_but_cut_ends(tmp_path, long_docs):
    """Fails if an epoch repeats a piece, omits more than a shard's rest too small for a slice, or cuts one
    that does not end its slice; or if LONG_DOCS=split drops a token."""
    source = Source(tmp_path, LENGTHS)
    unread = source.pieces(long_docs)
    assert long_docs == "cut" or sum(unread.values()) == source.total
    for starts, lengths in one_epoch(data_settings(tmp_path, LONG_DOCS=long_docs)):
        assert sum(lengths) == 128
        whole = [unread.pop(start) for start in starts]  # KeyError: no such piece, or read before
        assert lengths[:-1] == whole[:-1] and 0 < lengths[-1] <= whole[-1]
    assert sum(unread.values()) < 128


def first_inputs(s, steps=1):
    return [torch.cat([b.inputs_BT for b in batches]).numpy() for batches in steps_of(s, steps)]


def test_seeds_differ_and_repeat(tmp_path):
    """Fails if SEED does not set the data order and the initial weights, or anything else does."""
    Source(tmp_path, LENGTHS)
    batches = [first_inputs(data_settings(tmp_path, SEED=seed))[0] for seed in (0, 0, 1, 2**62)]
    assert (batches[0] == batches[1]).all()
    assert len({b.tobytes() for b in batches}) == 3
    models = [
        train_gpt.build_model(
            data_settings(tmp_path, SEED=seed), train_gpt.PRESETS["tiny"][0], 256, torch.device("cpu")
        )
        for seed in (0, 0, 1)
    ]
    heads = [m.head.detach() for m in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_epochs_are_shuffled_anew_and_hold_the_same_documents(tmp_path):
    """Fails if the second epoch repeats the first one's order, or reads other documents."""
    Source(tmp_path, LENGTHS)
    documents, orders = train_data(data_settings(tmp_path)).documents, [[], []]
    while True:
        _, starts, _ = documents.plan_slice(128)
        if documents.epoch == 2:
            break
        orders[documents.epoch] += starts.tolist()
    pairs = [set(zip(order, order[1:])) for order in orders]
    assert len(pairs[0] & pairs[1]) < 0.05 * len(pairs[0])  # pairs of neighbours
    assert len(set(orders[0]) & set(orders[1])) > 0.95 * len(LENGTHS)


def test_all_shards_are_read_each_epoch(tmp_path):
    """Fails if an epoch skips or repeats a shard, or the seed does not order the shards."""
    for i in range(4):
        write_shard(tmp_path / f"train_{i}.bin", make_tokens([32] * 80, seed=i))
    orders = set()
    for seed in range(4):
        documents, order = train_data(data_settings(tmp_path, SEED=seed)).documents, []
        while documents.epoch == 0:
            documents.plan_slice(128)
            if documents.epoch == 0:
                order.append(documents.shards[documents.shard_index].path.name)
        blocks = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
        assert sorted(blocks) == [f"train_{i}.bin" for i in range(4)]
        orders.add(tuple(blocks))
    assert len(orders) > 1


@pytest.mark.parametrize("seed", range(6))
def test_a_shard_too_small_for_a_slice_is_passed_over(tmp_path, seed):
    """Fails if training fails although one shard has enough documents, wherever the seed puts it."""
    for i in range(2):
        write_shard(tmp_path / f"train_small{i}.bin", make_tokens([30], seed=i))
    write_shard(tmp_path / "train_large.bin", make_tokens([30] * 60, seed=9))
    data = train_data(data_settings(tmp_path, SEED=seed))
    for _ in range(12):
        assert sum(b.inputs_BT.numel() for b in data.make(1024)) == 1024


def test_data_that_cannot_fill_a_slice_is_refused(tmp_path):
    """Fails if a run waits forever for missing documents, or learns in its last stage that its largest batch
    cannot be filled. Of documents of 30 and 90 tokens, 70 are read, or 120 if split."""
    write_shard(tmp_path / "train_0.bin", make_tokens([30, 90]))
    write_shard(tmp_path / "val_0.bin", make_tokens([30] * 60))
    with pytest.raises(DataError, match="128 tokens"):
        train_data(data_settings(tmp_path)).make(1024)
    for fits, too_large, long_docs in ((512, 640, "cut"), (896, 1024, "split")):
        env = dict(BATCH_SIZES=f"128,128,{fits},128", LONG_DOCS=long_docs)
        s = data_settings(tmp_path, **env)
        made = train_gpt.TrainData(train_gpt.open_data(s, 1)[0], s, lone_ranks()).make(fits)
        assert sum(b.inputs_BT.numel() for b in made) == fits
        s = data_settings(tmp_path, **{**env, "BATCH_SIZES": f"128,128,{too_large},128"})
        with pytest.raises(DataError, match=rf"BATCH_SIZES=.*slices of {too_large // 8} tokens"):
            train_gpt.open_data(s, 1)


def test_a_shard_cut_short_while_in_use_matters_when_it_is_read_again(tmp_path):
    """Fails if truncating a file in use ends the process (SIGBUS), or half of it is trained on silently. The
    next shard is in memory too."""
    for i in range(3):
        write_shard(tmp_path / f"train_{i}.bin", make_tokens([30] * 60, seed=i))
    whole, data = (train_data(data_settings(tmp_path)) for _ in range(2))
    whole = [whole.make(640)[0] for _ in range(4)]  # two batches take 48 documents of a shard
    data.documents.next_shard.coming.result()
    for path in tmp_path.glob("train_*.bin"):
        os.truncate(path, 2000)
    for batch in whole:
        assert all(map(torch.equal, batch[:3], data.make(640)[0][:3]))
    with pytest.raises(DataError, match="had 1800 tokens when the run began and has 488 now"):
        for _ in range(2):
            data.make(640)


def test_the_next_shard_is_indexed_before_it_is_needed(tmp_path):
    """Fails if a step waits while the next shard is read and indexed: 0.2 s for a public shard, against 60 ms
    for a step on eight GPUs. All of it must happen ahead, off the main thread."""
    for i in range(3):
        write_shard(tmp_path / f"train_{i}.bin", make_tokens([30] * 60, seed=i))
    data, told = train_data(data_settings(tmp_path)), []

    def index_shard(*place):
        told.append((place[:2], threading.current_thread() is threading.main_thread()))
        return DocumentStream.index_shard(data.documents, *place)

    data.documents.next_shard.coming.result()
    data.documents.index_shard = index_shard
    for _ in range(16):
        data.make(640)
    data.documents.next_shard.coming.result()
    places = [(epoch, place) for epoch in range(3) for place in range(3)]
    assert told == [(place, False) for place in places[2 : 2 + len(told)]] and len(told) > 5


def test_a_failure_ahead_counts_only_if_it_lasts(tmp_path):
    """Fails if a file that is missing briefly, long before it is needed, ends the run."""
    for i in range(2):
        write_shard(tmp_path / f"train_{i}.bin", make_tokens([30] * 60, seed=i))
    paths = sorted(tmp_path.glob("train_*.bin"))
    shards = open_shards(str(tmp_path), "train_*.bin", "TRAIN_FILES")
    for path in paths:
        path.rename(path.with_suffix(".away"))
    stream = TokenStream(shards, 640)
    stream.next_shard.start(stream.read, 0)
    assert isinstance(stream.next_shard.coming.exception(), DataError)
    with pytest.raises(DataError, match="put it back"):
        stream.next()
    for path in paths:
        path.with_suffix(".away").rename(path)
    read = [stream.next() for _ in range(4)]
    assert stream.shard_index == 1 and len(np.unique([x.tobytes() for x in read])) == 4
    assert stream.next_shard.begun == (0,)  # of the next epoch


def test_text_before_the_first_mark_is_not_read_in_training(tmp_path):
    """Fails if a shard that begins inside a document, as public ones may, gives one without a mark."""
    tokens = np.concatenate((np.arange(1, 50), *[[50256, *range(1, 30)]] * 100)).astype(np.uint16)
    write_shard(tmp_path / "train_0.bin", tokens, vocab_size=0)
    for batch in steps_of(data_settings(tmp_path), 1)[0]:
        assert all(inputs[0] == 50256 for inputs, _ in documents_of(batch))


def val_pass(tmp_path, **env):
    """Return all validation passes: {world_size: [batches of rank 0, ...]}."""
    s = data_settings(tmp_path, **env)
    shards = open_shards(s.data_path, s.val_files, "VAL_FILES")
    return {
        n: [list(train_gpt.val_batches(shards, s, lone_ranks(r, n))) for r in range(n)] for n in (1, 2, 8)
    }


def test_validation_is_the_first_tokens_of_the_shards_in_slices(tmp_path):
    """Fails if validation omits, repeats or reorders a token, cuts documents at MAX_DOC_TOKENS, or lets a
    slice see the previous one. 4096 tokens from two shards: two batches of eight slices of 256."""
    lengths = [5, 300, 1, 90, 700] * 3
    a, b = make_tokens(lengths, 1, mark=7), make_tokens(lengths, 2, mark=7)
    for i, tokens in enumerate((a, b)):
        write_shard(tmp_path / f"val_{i}.bin", tokens, vocab_size=300)
    stream = np.concatenate((a, b)).astype(int)[:4097]
    starts = set(np.flatnonzero(stream == 7).tolist())
    for n, ranks in val_pass(tmp_path, VAL_TOKENS=4096, VAL_BATCH_TOKENS=2048).items():
        rows = [
            [row for batch in batches for row in zip(batch.inputs_BT.numpy(), batch.targets_BT.numpy())]
            for batches in ranks
        ]
        per_batch = 8 // n  # slices per rank in each of the two batches
        ordered = [row for i in (0, 1) for rank in rows for row in rank[i * per_batch : (i + 1) * per_batch]]
        assert (np.concatenate([x for x, _ in ordered]) == stream[:-1]).all()
        assert (np.concatenate([y for _, y in ordered]) == stream[1:]).all()
    at = 0
    for batch in val_pass(tmp_path, VAL_TOKENS=4096, VAL_BATCH_TOKENS=2048)[1][0]:
        size = batch.inputs_BT.numel()
        bounds = {at + int(x) for x in batch.cu_seqlens}
        wanted = {i for i in range(at, at + size) if i in starts or i % 256 == 0} | {at + size}
        assert bounds == wanted
        at += size
    assert at == 4096


# ------------------------------------------------------------------------------------------------ bad shards


GOOD = dict(tokens=make_tokens([100] * 40))


@pytest.mark.parametrize("which", ["train", "val"])
def test_bad_shards_are_refused(tmp_path, which):
    """Fails if a foreign file is trained on or validated with. test_data_scripts has every kind of damage."""
    for kind in ("train", "val"):
        write_shard(tmp_path / f"{kind}_0.bin", **GOOD, **(dict(magic=20240521) if kind == which else {}))
    with pytest.raises(DataError, match=f"{which}_0.bin: .*20240520"):
        train_gpt.open_data(data_settings(tmp_path), 1)


def test_data_that_does_not_fit_together_is_refused(tmp_path):
    """Fails if shards of two tokenizers are mixed, or validation is shorter than requested."""
    write_shard(tmp_path / "train_0.bin", **GOOD)
    write_shard(tmp_path / "val_0.bin", **GOOD)
    train_gpt.open_data(data_settings(tmp_path), 1)
    with pytest.raises(DataError, match="VAL_TOKENS=4096.*4000"):
        train_gpt.open_data(data_settings(tmp_path, VAL_TOKENS=4096), 1)
    with pytest.raises(SettingsError, match="3 ranks do not divide 8 slices.*; use 1 or 2 or 4 or 8 ranks"):
        train_gpt.open_data(data_settings(tmp_path), 3)
    twelve = data_settings(tmp_path, SLICES=12, BATCH_SIZES="1152,1152,1152,1152")
    with pytest.raises(SettingsError, match="8 ranks do not divide 12 slices.*; use 1 or 2 or 4 ranks"):
        train_gpt.open_data(twelve, 8)
    write_shard(tmp_path / "train_1.bin", **GOOD, vocab_size=300)
    with pytest.raises(DataError, match="train_1.bin 300"):
        train_gpt.open_data(data_settings(tmp_path), 1)
    with pytest.raises(DataError, match="300.*256"):
        train_gpt.open_data(data_settings(tmp_path, TRAIN_FILES="train_1.bin"), 1)
    with pytest.raises(DataError, match="TRAIN_FILES='none.bin'.*docs/data.md"):
        train_gpt.open_data(data_settings(tmp_path, TRAIN_FILES="none.bin"), 1)
    write_shard(tmp_path / "gpt2_0.bin", np.arange(2000), vocab_size=0)
    with pytest.raises(DataError, match="no document mark .token 50256"):
        train_gpt.open_data(data_settings(tmp_path, TRAIN_FILES="gpt2_0.bin", VAL_FILES="gpt2_0.bin"), 1)


# ------------------------------------------------------------------------------------------------ settings


BAD_SETTINGS = [  # environment, what the message must say
    (dict(SEED="x"), ["SEED", "'x'", "int"]),
    (dict(SEED="-1"), ["SEED", "-1", "at least 0"]),
    (dict(SEED=str(10**400)), ["SEED", "at most"]),
    (dict(MUON_LR="inf"), ["MUON_LR", "inf", "finite"]),
    (dict(MUON_LR="-0.1"), ["MUON_LR", "-0.1", "at least 0"]),
    (dict(COOLDOWN_FRAC="1.01"), ["COOLDOWN_FRAC", "1.01", "at most 1"]),
    (dict(TARGET_LOSS="0"), ["TARGET_LOSS", "above 0"]),
    (dict(DISABLE_FP8="maybe"), ["DISABLE_FP8", "maybe", "0 or 1"]),
    (dict(LR_DECAY_TYPE="Linear"), ["LR_DECAY_TYPE", "Linear", "cosine"]),
    (dict(OPTIMIZER="sgd"), ["OPTIMIZER", "sgd", "normuon"]),
    (dict(MODEL="huge"), ["MODEL", "huge", "gpt2-small"]),
    (dict(DEVICE="tpu"), ["DEVICE", "tpu", "cpu"]),
    (dict(BATCH_SIZES="1024,1024"), ["BATCH_SIZES", "2 values", "3 or 4"]),
    (dict(LR_MULS="1,1,1,1,1"), ["LR_MULS", "5 values", "3 or 4"]),
    (dict(LR_MULS="1,,1,1"), ["LR_MULS", "float"]),
    (dict(LR_MULS="1,nan,1,1"), ["LR_MULS", "finite"]),
    (dict(BATCH_SIZES="1024,262145,1024,1024"), ["BATCH_SIZES", "262145", "262144", "262272"]),
    (dict(VAL_TOKENS="262145"), ["VAL_TOKENS", "262145", "multiple"]),
    (dict(VAL_BATCH_TOKENS="1025", VAL_TOKENS="2050"), ["VAL_BATCH_TOKENS", "1025", "multiple"]),
    (dict(TRAIN_TOKENS="100000", NUM_SCHEDULED_ITERATIONS="5"), ["TRAIN_TOKENS", "NUM_SCHEDULED"]),
    (dict(RUN_ID="a/b"), ["RUN_ID", "a/b", "letters"]),
    (dict(RUN_ID="x" * 300), ["RUN_ID"]),
    (dict(RUN_ID="mine.txt"), ["RUN_ID", "without the .txt"]),
    (dict(ATTN_BACKEND="varlen"), ["ATTN_BACKEND", "varlen", "sdpa"]),
    (dict(ATTN_BACKEND="flash"), ["ATTN_BACKEND", "flash", "sdpa"]),
    (dict(MUON_DECAY_MODE="param"), ["MUON_WEIGHT_DECAY", "1.2", "param"]),
    (dict(MUON_DECAY_MODE="both", MUON_WEIGHT_DECAY="-2"), ["MUON_WEIGHT_DECAY", "-2", "both"]),
    (dict(NGRAMS="2,6"), ["NGRAMS", "2,6", "at most 5"]),
    (dict(NGRAM_ROWS="-1"), ["NGRAM_ROWS"]),
    (dict(NGRAM_ROWS="1"), ["NGRAM_ROWS=1", "2 and more"]),
    (dict(NGRAMS="2,3", NGRAM_ROWS="0"), ["NGRAMS=2,3", "does nothing", "NGRAM_ROWS"]),
    (dict(NGRAMS="2", MODEL="dense-88m"), ["NGRAMS=2", "does nothing", "NGRAM_ROWS"]),
    (dict(SLICES=12), ["not a multiple of 12 slices"]),
    (dict(SLICES=16, BATCH_SIZES="128,256,256,256"), ["= 128 is not a multiple of 16", "; 256 or 512 are"]),
    (dict(SLICES=4), ["SLICES", "at least 8"]),
    (dict(SLICES=128), ["SLICES", "at most 64"]),
    # settings that do nothing with the others
    (dict(OPTIMIZER="adamw", MUON_LR="0.1"), ["MUON_LR=0.1 does nothing with OPTIMIZER=adamw"]),
    (dict(ADAM_MATRIX_LR="0.1"), ["ADAM_MATRIX_LR=0.1", "OPTIMIZER=normuon", "needs adamw"]),
    (dict(LR_DECAY_SWITCH_STEP="900"), ["LR_DECAY_SWITCH_STEP=900", "LR_DECAY_SECOND_TYPE=''", "linear"]),
    (dict(LR_DECAY_TYPE="constant", COOLDOWN_FRAC="0.3"), ["COOLDOWN_FRAC=0.3 does nothing", "=constant"]),
    (dict(MODEL="dense-88m", LR_DECAY_FINAL="0"), ["LR_DECAY_FINAL=0.0 does nothing", "=constant"]),
    # look-alikes
    (dict(SPECTRAL_LR_MULL="1"), ["SPECTRAL_LR_MULL", "not a setting", "it may be another trainer's"]),
    (dict(SPECTRAL_LR_MUL="0"), ["SPECTRAL_LR_MUL", "train_gpt.py"]),
    (dict(ORD_MODE="off"), ["ORD_MODE", "train_gpt.py"]),
    (dict(MUON_BETA="1"), ["MUON_BETA", "nearest"]),
    (dict(BATCHSIZES="1"), ["BATCHSIZES", "BATCH_SIZES"]),
    (dict(COOLDOWN_FRCA="1"), ["COOLDOWN_FRAC"]),
    (dict(VAL_LOSS_EVERY_STEPS="1"), ["VAL_LOSS_EVERY"]),
    (dict(SEEED="3"), ["SEEED", "nearest is SEED"]),
    (dict(seed="3"), ["nearest is SEED"]),
    (dict(LR_MUL="2"), ["nearest is LR_MULS"]),
    (dict(muon_lr="2"), ["nearest is MUON_LR"]),
    (dict(Modell="x"), ["nearest is MODEL"]),
    # a mixture of experts
    (dict(NUM_EXPERTS=4), ["NUM_EXPERTS=4 does nothing with MODEL=tiny"]),
    (dict(MOE_TOP_K=3), ["for moe-79m and moe-tiny"]),
    (dict(ROUTER_NOISE=0), ["ROUTER_NOISE=0.0"]),
    (dict(ROUTER_LR=0.1), ["ROUTER_LR=0.1"]),
    (dict(MODEL="gpt2-small", MOE_BALANCE_WEIGHT=1), ["MOE_BALANCE_WEIGHT=1.0"]),
    (dict(MODEL="moe-tiny", MOE_TOP_K=9), ["MOE_TOP_K=9 of NUM_EXPERTS=8"]),
    (dict(MODEL="moe-tiny", NUM_EXPERTS=0), ["at least 2 experts"]),
    (dict(MODEL="moe-tiny", MOE_TOPK=2), ["the nearest is MOE_TOP_K"]),
]
BAD_ORD_SETTINGS = [
    (dict(SPECTRAL_LR_MULL="1"), ["SPECTRAL_LR_MULL", "SPECTRAL_LR_MUL"]),
    (dict(ORD_MODE="on"), ["ORD_MODE", "on", "interpolate"]),
    (dict(SPECTRAL_PROJ_EPS="0"), ["SPECTRAL_PROJ_EPS", "above 0"]),
    (dict(SPECTRAL_LR_MUL="NaN"), ["SPECTRAL_LR_MUL", "finite"]),
    (dict(SPECTRAL_VARIANCE="1", SPECTRAL_SCALE="unit"), ["SPECTRAL_VARIANCE", "SPECTRAL_SCALE"]),
    (dict(OPTIMIZER="adamw"), ["ORD_MODE", "adamw", "off"]),
    (dict(SPECTRAL_RESCALE="1"), ["SPECTRAL_RESCALE", "post", "interpolate"]),
    # settings of another ORD_MODE: the log would misdescribe the run
    (dict(SPECTRAL_OUT="0.5"), ["SPECTRAL_OUT", "post", "interpolate"]),
    (dict(SPECTRAL_IN="0"), ["SPECTRAL_IN", "post", "interpolate"]),
    (dict(ORD_MODE="post", SPECTRAL_LR_MUL="0.2"), ["SPECTRAL_LR_MUL=0.2", "post", "interpolate or project"]),
    (dict(ORD_MODE="post", SPECTRAL_SCALE="unit"), ["SPECTRAL_SCALE", "post"]),
    (dict(ORD_MODE="post", SPECTRAL_VARIANCE="1"), ["SPECTRAL_VARIANCE", "post"]),
    (dict(ORD_MODE="off", SPECTRAL_OUT="0"), ["SPECTRAL_OUT", "off"]),
    (dict(ORD_MODE="off", SPECTRAL_RHO_MODE="row"), ["SPECTRAL_RHO_MODE", "off"]),
    (dict(ORD_MODE="off", SPECTRAL_SCHEDULE="adaptive"), ["SPECTRAL_SCHEDULE", "off"]),
]
BAD = [(train_gpt, *row) for row in BAD_SETTINGS] + [(ord_gpt, *row) for row in BAD_ORD_SETTINGS]


@pytest.mark.parametrize("trainer, env, said", BAD)
def test_bad_settings_are_refused_with_what_was_found_and_wanted(trainer, env, said):
    """Fails if an unusable setting is accepted, or the message does not name it, the value found and what is
    wanted."""
    with pytest.raises(SettingsError) as error:
        read(trainer, **env)
    for words in said:
        assert words in str(error.value)


def test_a_run_with_a_setting_that_does_nothing_can_be_resumed(tmp_path, monkeypatch):
    """Fails if a run that began before such settings were refused can neither keep nor drop its own, or if
    RESUME=auto, which the launcher sets, lets a new run have them."""
    monkeypatch.chdir(tmp_path)
    env = dict(LR_DECAY_TYPE="constant", COOLDOWN_FRAC="0.4", RUN_ID="old", RESUME="auto")
    with pytest.raises(SettingsError, match="COOLDOWN_FRAC=0.4 does nothing"):
        read(train_gpt, **env)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "old.txt").write_text("config:{}\nevent:started\n")
    assert read(train_gpt, **env)[0].cooldown_frac == 0.4


def test_other_programs_variables_are_left_alone():
    """Fails if a variable of the shell, torchrun, SLURM or CUDA counts as a misspelt setting."""
    names = """PATH HOME LANG TERM SHELL USER HOSTNAME LOGNAME RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
        MASTER_ADDR MASTER_PORT GROUP_RANK ROLE_RANK ROLE_NAME TORCHELASTIC_RUN_ID OMP_NUM_THREADS OUT MODE
        CUDA_VISIBLE_DEVICES NCCL_DEBUG SLURM_JOB_ID TORCH_LOGS HF_HOME SCRIPT COMPILER MODELS DEVICES SEEDS
        SPEED http_proxy no_proxy"""
    read(ord_gpt, **dict.fromkeys(names.split(), "1"))


def test_values_are_read_as_they_are_written():
    """Fails if a value is altered, a preset's default beats the environment, or a default is lost."""
    s, o, config = read(
        train_gpt,
        SEED=" 7 ",
        LR_MULS="[1, 2,3.5 ,4]",
        BATCH_SIZES="(1024,2048,1024,128)",
        NUM_EXTENSION_ITERATIONS=8,
        MUON_LR="1e-3",
        DISABLE_FP8="true",
        VAL_LOSS_EVERY="3",
        RUN_ID="a-b_c=1,2+3.x",
    )
    assert (s.seed, s.lr_muls, s.batch_sizes) == (7, (1.0, 2.0, 3.5, 4.0), (1024, 2048, 1024, 128))
    assert (o.muon_lr, s.disable_fp8, s.val_loss_every, s.run_id) == (0.001, True, 3, "a-b_c=1,2+3.x")
    s, o, config = train_gpt.read_settings({"DEVICE": "cpu"})
    assert s.model == "tiny" and config == train_gpt.PRESETS["tiny"][0] and s.attn_backend == "sdpa"
    assert s.compile == "0" and s.device == "cpu" and s.run_id
    for name, value in train_gpt.PRESETS["tiny"][1].items():
        assert getattr(s, name, getattr(o, name, None)) == value
    s, o, _ = read(train_gpt, MODEL="gpt2-small")
    assert (o.muon_lr, o.adam_lr, o.muon_weight_decay) == (0.023, 0.008, 1.2)
    assert (o.muon_warmup_steps, o.beta_warmup_steps) == (300, 0)
    assert (o.muon_momentum, o.adam_weight_decay, o.muon_decay_mode) == (0.95, 0.005, "cautious")
    assert (s.val_tokens, s.val_batch_tokens, s.max_doc_tokens) == (10_485_760, 2_097_152, (2048,) * 4)
    assert (s.num_scheduled_iterations, s.num_extension_iterations, s.long_docs) == (1560, 40, "cut")
    assert (s.lr_muls, s.cooldown_frac, s.lr_decay_final) == ((1, 1.52, 1.73, 1), 0.55, 0.1)


def test_of_three_values_the_extension_keeps_its_own():
    """Fails if LR_MULS or BATCH_SIZES with three values is refused, or changes the extension's value."""
    given = dict(LR_MULS="1,2,3", BATCH_SIZES="1024,2048,1024", NUM_EXTENSION_ITERATIONS=8)
    for model, extension in (("gpt2-small", 393216), ("tiny", 2048), ("dense-88m", 65536)):
        s, _, _ = read(train_gpt, MODEL=model, **given)
        assert (s.lr_muls, s.batch_sizes) == ((1, 2, 3, 1), (1024, 2048, 1024, extension))
        s, _, _ = read(train_gpt, MODEL=model, **{**given, "NUM_EXTENSION_ITERATIONS": 0})
        assert s.batch_sizes[-1] == 1024, "a size that no step has counts for memory and shards"


def test_n_grams_are_the_presets_unless_set():
    """Fails if NGRAMS or NGRAM_ROWS is ignored, or overrides the preset when left out or empty."""
    for env, wanted in (
        ({}, ((2, 3, 4), 8192)),
        (dict(NGRAMS="", NGRAM_ROWS=""), ((2, 3, 4), 8192)),
        (dict(NGRAMS="2"), ((2,), 8192)),
        (dict(NGRAM_ROWS="4096"), ((2, 3, 4), 4096)),
        (dict(NGRAM_ROWS="0"), ((2, 3, 4), 0)),
        (dict(MODEL="dense-88m", NGRAM_ROWS="64", NGRAMS="3,2"), ((3, 2), 64)),
        (dict(MODEL="gpt2-small"), ((2,), 5 * 50304)),
    ):
        config = read(train_gpt, **env)[2]
        assert (config.ngrams, config.ngram_rows) == wanted


def test_empty_strength_of_a_kind_is_the_common_one():
    """Fails if an empty SPECTRAL_LR_MUL_ATTN, which --help offers, is refused or read as 0."""
    assert optimizer_settings(ord_gpt, SPECTRAL_LR_MUL_ATTN="").spectral_lr_mul_attn is None
    assert optimizer_settings(ord_gpt).spectral_lr_mul_mlp is None


NAMES = sorted(knobs(ord_gpt.SETTINGS))  # the baseline's and more
ODD = "0 1 -1 nan 1e999 1,2,3,4 128,256,384,128 1_0 ٣ auto linear exp post unit both adamw sdpa tiny"
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from([*ODD.split(), "", "9" * 400, "9" * 5000]),
    st.lists(st.integers() | st.floats(), max_size=5).map(lambda x: ",".join(map(str, x))),
)
ENVIRONMENTS = st.dictionaries(
    st.sampled_from(NAMES) | st.text("ABCDELMNORSTU_", max_size=20), VALUES, max_size=5
)


@settings(max_examples=250 * MORE, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(env=ENVIRONMENTS)
def test_no_environment_makes_anything_but_a_settings_error(env):
    """Fails if any value of a variable ends in a traceback, or is accepted and breaks the schedule."""
    try:
        s, _, config = ord_gpt.read_settings({"DEVICE": "cpu", **env})
    except SettingsError as error:
        assert any(name in str(error) for name in (*env, "VAL_TOKENS")), error
        return
    plan = ord_gpt.Schedule(s, config)
    for step in {0, plan.num_steps // 3, plan.num_steps // 2, plan.num_steps - 1}:
        assert math.isfinite(plan.lr_mul(step)) and plan.batch_tokens(step) > 0
        assert len(plan.predict_weights(step)) >= 1 and plan.windows(plan.stage(step))
        s.validates(step, plan.num_steps)


# ------------------------------------------------------------------------------------------------ help


def test_help_explains_every_setting(capsys):
    """Fails if a setting has no line in --help, or --help trains."""
    assert supervise.main(ord_gpt, ["--help"]) == 0
    text = capsys.readouterr().out
    for name in knobs(ord_gpt.SETTINGS):
        assert re.search(rf"^ +{name}=.*\(.+\)\n +\S", text, re.M), name
    assert all(preset in text for preset in ord_gpt.PRESETS)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_settings_json_is_what_a_launcher_can_read(trainer, capsys):
    """Fails if --settings-json is not JSON, lacks a setting, or lists a default that the trainer refuses."""
    assert supervise.main(trainer, ["--settings-json"]) == 0
    out = capsys.readouterr().out
    table = json.loads(out, parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    by_name = {s["name"]: s for s in table["settings"]}
    assert list(by_name) == list(knobs(trainer.SETTINGS)) and len(table["settings"]) == len(by_name)
    assert set(table["presets"]) == set(trainer.PRESETS) and table["script"] == trainer.SCRIPT.name
    assert all({"type", "default", "allowed", "help", "rare"} <= set(s) for s in by_name.values())
    assert {s["affects"] for s in by_name.values()} == {"training", "recording", "machine"}
    assert table["source_hash"] == source_hash(trainer.SCRIPT)
    for name, s in by_name.items():
        default = s["default"]
        if default in ("", None) or name == "ATTN_BACKEND":
            continue
        text = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        read(trainer, **{"MODEL": "gpt2-small", name: text})


def test_refused_settings_exit_with_two(capsys, monkeypatch, tmp_path):
    """Fails if a refusal prints a traceback, leaves a log or does not exit with 2, or ignores arguments."""
    monkeypatch.chdir(tmp_path)
    no_data = {"DEVICE": "cpu", "MODEL": "tiny", "DATA_PATH": str(tmp_path)}
    cases = (([], {"SEED": "x"}, "SEED"), (["seed=1"], {}, "seed=1"), ([], no_data, "TRAIN_FILES"))
    for argv, env, said in cases:
        assert supervise.main(train_gpt, argv, env) == 2
        captured = capsys.readouterr()
        assert said in captured.err and captured.err.startswith(train_gpt.SCRIPT.name) and not captured.out
        assert captured.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.txt"))
