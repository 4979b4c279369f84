"""Manifold measurement: against NumPy on known spectra, and within real runs of the trainers."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import BASELINE, TRAINERS, base_env, fill_disk, lone_ranks, run, small_trainer, train
from jobs import events

import train_gpt
import train_gpt_muon_ord
import train_gpt_simple
from runtime import manifold
from runtime.compiling import not_compiled
from runtime.log_writer import LogWriter
from runtime.session import Clock


def orthonormal(rows, columns, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def measure(W, dW):
    """Measure one matrix and its update; return the line's numbers."""
    (row,) = manifold.measure_matrices(*(torch.tensor(x, dtype=torch.float32)[None] for x in (W, dW)))
    return row


def test_spectra_that_are_known():
    """Fails if a number does not follow its formula: in an orthogonal matrix all directions are equal; a
    diagonal matrix is its own spectrum."""
    diagonal = np.linspace(4, 1, 12)
    D = np.zeros((12, 20))
    D[:, :12] = np.diag(diagonal)
    row = measure(3 * orthonormal(20, 12, 0), D.T)
    assert row["effective_rank"] == pytest.approx(12) and row["entropy"] == pytest.approx(math.log(12))
    assert row["stable_rank"] == pytest.approx(12, rel=1e-5) and row["gap"] == pytest.approx(1, rel=1e-5)
    assert row["sigma_max"] == pytest.approx(3) and row["weight_norm"] == pytest.approx(3 * math.sqrt(12))
    p = diagonal / diagonal.sum()
    assert row["update_entropy"] == pytest.approx(-(p * np.log(p)).sum())
    assert row["update_effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert row["update_stable_rank"] == pytest.approx((diagonal**2).sum() / 16)
    assert row["update_gap"] == pytest.approx(diagonal[0] / diagonal[1])
    assert row["update_quantiles"] == pytest.approx(np.quantile(diagonal, np.linspace(0, 1, 12)).tolist())


def test_rank_one_and_zero():
    """Fails if an undefined value is rounding noise or NaN instead of None."""
    u, v = np.random.default_rng(0).standard_normal((2, 16))
    row = measure(np.outer(u, v), np.zeros((16, 16)))
    assert row["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert row["stable_rank"] == pytest.approx(1, abs=1e-5) and row["gap"] > 1e5
    assert row["left_alignment"] is None and row["update_entropy"] is None and row["update_gap"] is None
    assert row["update_norm"] == 0
    bad = measure(np.full((6, 6), np.nan), np.eye(6))
    assert bad["entropy"] is None and bad["update_effective_rank"] == pytest.approx(6)


def test_alignment_equals_numpys():
    rng = np.random.default_rng(3)
    W, dW = rng.standard_normal((2, 30, 18)) @ np.diag(np.linspace(9, 1, 18))
    row = measure(W, dW)
    (U, _, V), (dU, _, dV) = np.linalg.svd(W), np.linalg.svd(dW)

    def cosines(a, b):
        return np.linalg.svd(a[:, :5].T @ b[:, :5], compute_uv=False).mean()

    assert row["left_alignment"] == row["update_alignment"] == pytest.approx(cosines(U, dU), abs=1e-4)
    assert row["right_alignment"] == pytest.approx(cosines(V.T, dV.T), abs=1e-4)
    assert measure(W, 0.1 * W)["left_alignment"] == pytest.approx(1, abs=1e-4)


def test_chance_is_what_random_matrices_give():
    """Fails if alignment is compared with the wrong chance level. Both frames are random; one direction has a
    closed form; 5 of 5 is the whole space."""
    for dim in (8, 40):
        found = [
            np.linalg.svd(
                orthonormal(dim, 5, 2 * i).T @ orthonormal(dim, 5, 2 * i + 1), compute_uv=False
            ).mean()
            for i in range(1500)
        ]
        assert manifold.chance_alignment(dim) == pytest.approx(np.mean(found), rel=0.015)
    wanted = math.exp(math.lgamma(32) - math.lgamma(32.5)) / math.sqrt(math.pi)
    assert manifold.chance_alignment(64, 1) == pytest.approx(wanted, rel=0.05)
    assert manifold.chance_alignment(5) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------
# Within the trainers
# ---------------------------------------------------------------------------------------------------


def watched(trainer, folder, env, steps=3):
    """Lines of the last measured update, the parameters before and after it, and its raw gradients."""
    this, data = small_trainer(trainer, folder, 0, **env)
    path, log = folder / "a.manifold.jsonl", LogWriter(folder / "a.txt", 0, steps)
    m = manifold.Manifold(path, steps, this.optimizer, this.ranks, Clock(this.ranks.device), log)
    for step in range(steps):
        this.enter(step)
        batches = data.next(this.schedule.batch(step), this.schedule.batch(step + 1))
        before = {name: p.detach().clone() for name, p in this.model.named_parameters()}
        grads = []
        for batch in batches:  # the same forward and backward, by autograd alone
            weights = this.schedule.predict_weights(step)
            windows, tied = this.schedule.windows(this.stage), this.schedule.tied(step)
            loss, _ = this.model.train_loss(batch, windows, tied, weights, None)
            names = [n for n in before if n.endswith((".q", ".k", ".v", ".o", ".up", ".down"))]
            params = dict(this.model.named_parameters())
            grads.append(torch.autograd.grad(trainer.LOSS_SCALE * loss, [params[n] for n in names]))
        m.expect(step + 1)
        this.step(step, batches)
        m.measure(step + 1, 0)
    grads = {name: sum(g) for name, *g in zip(names, *grads)}
    after = {name: p.detach().clone() for name, p in this.model.named_parameters()}
    return [json.loads(line) for line in path.read_text().splitlines()], before, after, grads


OPTIMIZERS = [
    (train_gpt, dict(OPTIMIZER="normuon")),
    (train_gpt, dict(OPTIMIZER="muon", GRAD_CLIP=1e-4)),
    (train_gpt, dict(OPTIMIZER="adamw")),
    (train_gpt_muon_ord, dict(ORD_MODE="interpolate")),
    (train_gpt_muon_ord, dict(ORD_MODE="post", SPECTRAL_OUT=0.5, SPECTRAL_RESCALE=1)),
]


@pytest.mark.parametrize("trainer, env", OPTIMIZERS)
def test_update_is_after_minus_before_and_the_gradient_is_raw(trainer, env, tmp_path):
    """Fails if it does not measure the optimizer's update, or clipping or momentum affects grad_norm."""
    rows, before, after, grads = watched(trainer, tmp_path, env)
    assert {row["step"] for row in rows} == {3} and len(rows) == len(grads)
    for row in rows:
        name = f"blocks.{row['layer']}.{'mlp' if row['proj'] in ('up', 'down') else 'attn'}.{row['proj']}"
        dW = (after[name] - before[name]).double()
        s = np.linalg.svd(dW.numpy(), compute_uv=False)
        assert row["update_norm"] == pytest.approx(dW.norm().item(), rel=1e-4)
        assert row["update_sigma_max"] == pytest.approx(s[0], rel=1e-4)
        assert row["weight_norm"] == pytest.approx(before[name].norm().item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(grads[name].norm().item(), rel=1e-4)


SHORT = dict(NUM_SCHEDULED_ITERATIONS=6, BATCH_SIZES="1024,1024,1024,1024", VAL_LOSS_EVERY=3)


def rows_of(folder, run_id):
    return [json.loads(x) for x in (folder / "logs" / f"{run_id}.manifold.jsonl").read_text().splitlines()]


def test_whole_runs(shards, tmp_path):
    """Fails if measuring changes training in any digit, two ranks do not measure what one does, or a resumed
    run's file differs from an undisturbed one's, whatever the crash left in it."""
    plain = train(tmp_path, shards, "plain", **SHORT)
    one = train(tmp_path, shards, "one", MANIFOLD_EVERY=2, SAVE_EVERY=4, **SHORT)
    assert one == plain and not (tmp_path / "logs" / "plain.manifold.jsonl").exists()
    path = tmp_path / "logs" / "one.manifold.jsonl"
    whole, log = path.read_bytes(), path.with_name("one.txt")
    assert [r["step"] for r in rows_of(tmp_path, "one")] == [2] * 24 + [4] * 24 + [6] * 24
    assert log.read_text().count("\nevent:manifold ") == 3

    path.write_bytes(whole[:-3000])  # killed while writing step 6
    text = log.read_text()
    log.write_text(text[: text.rindex("step:6/")])
    again = base_env(shards, RUN_ID="one", RESUME="auto", MANIFOLD_EVERY=2, **SHORT)
    done = run(tmp_path, BASELINE, again, 0)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == whole and "event:resumed step:4" in log.read_text()

    train(tmp_path, shards, "two", ranks=2, MANIFOLD_EVERY=2, **SHORT)
    both = rows_of(tmp_path, "one"), rows_of(tmp_path, "two")
    assert len(both[1]) == 72
    for a, b in zip(*both):
        assert all(a[key] == b[key] for key in ("step", "tokens", "layer", "proj"))
        for key in ("grad_norm", "update_norm", "weight_norm", "effective_rank", "update_effective_rank"):
            assert a[key] == pytest.approx(b[key], rel=2e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_its_time_is_not_training_time(trainer, tmp_path):
    """Fails if the clock runs between the first copy and the last line, or stops during the update."""
    this, data = small_trainer(trainer, tmp_path, 0)
    clock, seen, log = Clock(this.ranks.device), [], LogWriter(tmp_path / "a.txt", 0, 1)
    m = manifold.Manifold(tmp_path / "a.manifold.jsonl", 1, this.optimizer, this.ranks, clock, log)
    clock.start()
    m.expect(1)
    look = this.optimizer.before_update

    def before_update():
        look()
        assert clock.since  # the update itself counts

    def gather(value):
        seen.append(clock.since)
        return [value]

    this.optimizer.before_update = before_update
    this.step(0, data.next(this.schedule.batch(0)))
    this.ranks.beat, this.ranks.all_gather_object = lambda: seen.append(clock.since), gather
    m.measure(1, 0)
    assert len(seen) > 2 and not any(seen) and clock.since and m.ms > 0


def test_ranks_that_own_only_padding_measure_nothing(tmp_path):
    """Fails if a rank without a matrix of some shape ends the run, or a matrix is measured on no rank. Two
    layers of train_gpt_simple.py have two matrices of each of the MLP's shapes, for eight ranks."""
    config = train_gpt_simple.ModelConfig(num_layers=2, width=32, num_heads=2, head_dim=16)
    o = train_gpt_simple.read_settings({"DEVICE": "cpu"})[1]
    measured = []
    for rank in range(8):
        model, ranks = train_gpt_simple.GPT(config, 100, 64), lone_ranks(rank, 8)
        ranks.beat, ranks.all_gather_object = lambda: None, lambda rows: measured.extend(rows) or []
        optimizer = train_gpt_simple.Optimizer(model, o, ranks, not_compiled)
        log, clock = LogWriter(tmp_path / f"{rank}.txt", 0, 1), Clock(ranks.device)
        m = manifold.Manifold(tmp_path / "a.manifold.jsonl", 1, optimizer, ranks, clock, log)
        m.expect(1)
        optimizer.step(1.0, 1.0)
        m.measure(1, 0)
    assert len(measured) == 12 and len({(row["layer"], row["proj"]) for row in measured}) == 12


def test_trimmed_to_the_step_it_goes_on_from(tmp_path):
    path = tmp_path / "a.manifold.jsonl"
    manifold.trim(path, 5)
    assert not path.exists()
    lines = [json.dumps({"step": step}) + "\n" for step in (2, 4, 6)]
    path.write_text(lines[0] + '{"step": 2, "la\n' + "".join(lines[1:]) + '{"step": 4')
    manifold.trim(path, 4)
    assert path.read_text() == "".join(lines[:2]) and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_half_measurement(tmp_path, monkeypatch):
    """Fails if half a line stays in the file, or the run does not continue."""
    path, log = tmp_path / "a.manifold.jsonl", LogWriter(tmp_path / "a.txt", 0, 9)
    manifold.append(path, [{"step": 1}])
    whole = path.read_bytes()
    fill_disk(monkeypatch)
    m = manifold.Manifold(path, 1, None, lone_ranks(), None, log)
    m.on_disk(2, lambda: manifold.append(path, [{"step": 2, "x": math.nan}]))
    assert path.read_bytes() == whole and events(log.path, "manifold_failed")
