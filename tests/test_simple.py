"""train_gpt_simple.py: the track's numbers, a straight-line copy of its model, the family in float64, ranks,
resuming, logs."""

import contextlib
import copy
import functools
import gc
import math
import weakref
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import base_env, lone_ranks, losses, run
from jobs import refusal, run_here
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import report_sweep
import train_gpt_simple as simple
from analysis.run_log import read_log
from analysis.trainers import read_trainer
from data.shards import TokenStream
from kernels import vectors
from runtime.checking import answer_for, read_run
from runtime.checkpoints import MODEL_FILE
from runtime.compiling import graphs_compiled, not_compiled
from runtime.settings import knobs
from runtime.supervise import StopRequest, Supervisor
from runtime.trained import load_model

SMALL = simple.ModelConfig(num_layers=2, width=32, num_heads=2, head_dim=16)
MODES = {
    "none": {},
    "normuon": {"OPTIMIZER": "normuon"},
    "interpolate": {"ORD_MODE": "interpolate", "SPECTRAL_SCALE": "unit"},
    "project": {"ORD_MODE": "project", "SPECTRAL_RHO_MODE": "row"},
    "brake": {"ORD_MODE": "brake"},
    "brake with row floor": {"ORD_MODE": "brake", "SPECTRAL_FLOOR": 0.38, "SPECTRAL_FLOOR_MODE": "row"},
    "sphere": {"ORD_MODE": "sphere", "START": "track"},
    "floor": {"ORD_MODE": "floor"},
    "row floor": {"ORD_MODE": "floor", "SPECTRAL_FLOOR_MODE": "row"},
    "rows": {"ORD_MODE": "rows", "MUON_LR": 0.03},
    "rows with gains": {"ORD_MODE": "rows", "MUON_LR": 0.03, "SPECTRAL_GAIN_LR": 0.015},
}


def env_of(shards, **settings) -> dict:
    """Environment of a short run of the track's settings on made-up shards."""
    env = base_env(shards)
    for name in ("VAL_BATCH_TOKENS", "BATCH_SIZES", "MUON_WARMUP_STEPS"):
        del env[name]
    few = dict(MODEL="track", BATCH_TOKENS=1024, ROW_TOKENS=64, VAL_TOKENS=4096, NUM_SCHEDULED_ITERATIONS=20)
    few |= dict(VAL_LOSS_EVERY=10, VAL_LOSS_LAST_STEPS=0, SAVE_MODEL=0)
    return env | {key: str(value) for key, value in {**few, **settings}.items()}


def read(**env):
    return simple.read_settings({"DEVICE": "cpu", "MODEL": "track", **{k: str(v) for k, v in env.items()}})


@pytest.fixture
def small(monkeypatch, tmp_path):
    """MODEL=track with a small model, in its own folder."""
    monkeypatch.setitem(simple.PRESETS, "track", (SMALL, simple.TRACK_SETTINGS))
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def begun(shards, **settings):
    """Make a Run in this process, resumed if the settings say so."""
    with run_here(simple, env_of(shards, **settings)) as start:
        made = simple.Run(start, StopRequest())
        if start.origin.has_checkpoint:
            made.session.resume(start.origin.contents)
        yield made


# ---------------------------------------------------------------------------------------------------
# The track
# ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_tuned_baseline():
    s, o, c = read()
    assert (c.num_layers, c.width, c.num_heads, c.head_dim) == (12, 768, 6, 128)
    assert (s.batch_tokens, s.row_tokens, s.val_tokens) == (512 * 1024, 1024, 20 * 524_288)
    assert (o.muon_lr, o.muon_weight_decay, o.muon_momentum) == (0.025, 0.05, 0.95)
    assert o.muon_decay_mode == "param"
    assert (o.adam_embed_lr, o.adam_head_lr, o.adam_scalar_lr, o.ord_mode) == (0.7, 0.004, 0.015, "none")
    schedule = simple.Schedule(s, c)
    assert schedule.num_steps == 3250 and s.target_loss == 3.28
    rates = [schedule.lr_mul(step) for step in (0, 974, 975, 2112.5, 3250)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0])
    validations = [step for step in range(3251) if s.validates(step, 3250)]
    assert validations[:3] == [0, 125, 250] and validations[-13:] == list(range(2950, 3251, 25))


@pytest.mark.parametrize("start", ["track", "sphere"])
def test_initial_weights(start):
    """Fails unless standard deviations are the table's, biases 0, gains 1 and the initial loss ln V."""
    model = simple.GPT(simple.ModelConfig(num_layers=1), 50257, 64)
    model.init_weights(start, torch.Generator().manual_seed(1))
    factors = {"q": 1, "k": 1, "v": 1, "o": 1.25, "up": 1.5, "down": 3}
    if start == "track":
        factors |= {"o": 0, "up": 1, "down": 0}
    for name, p in model.named_parameters():
        part = name.split(".")[-2] if name.endswith("weight") else name.rpartition(".")[2]
        std = {"embed": 1.0, "head": 0.0}.get(part, 0.0)
        if part in factors:
            std = factors[part] * math.sqrt(0.33 / p.shape[1])
        assert p.std().item() == pytest.approx(std, rel=0.02), name
        assert part != "gain" or bool((p == 1).all())
    tokens = torch.arange(64).view(1, -1)
    assert model(tokens, tokens)[0].item() / 64 == pytest.approx(10.82584, abs=1e-5)


def rms(x):
    return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()


def inputs_and_targets(tokens: np.ndarray, T: int):
    return (torch.from_numpy(x.astype(np.int64)).view(-1, T) for x in (tokens[:-1], tokens[1:]))


def straight_line_loss(p: dict, tokens: np.ndarray, T: int, heads: int) -> torch.Tensor:
    """Summed loss of a batch, written from the facts alone: loops, complex numbers, explicit masks."""
    inputs, targets = inputs_and_targets(tokens, T)
    x = rms(p["embed"][inputs]) * p["embed_norm.gain"]
    for i in range(SMALL.num_layers):
        b = f"blocks.{i}."
        n = rms(x) * p[b + "attn_norm.gain"]
        outputs = []
        q, k, v = (n @ p[f"{b}attn.{m}.weight"].T + p[f"{b}attn.{m}.bias"] for m in "qkv")
        D = q.shape[-1] // heads
        freqs = torch.cat([(1 / 1024) ** torch.linspace(0, 1, D // 4), torch.zeros(D // 4)])
        turn = torch.polar(torch.ones(T, D // 2), -torch.outer(torch.arange(T).float(), freqs))
        for h in range(heads):
            qh, kh, vh = (m[..., h * D : (h + 1) * D] for m in (q, k, v))
            qh, kh = (torch.complex(*rms(m).split(D // 2, -1)) * turn for m in (qh, kh))
            scores = 0.12 * (qh @ kh.conj().transpose(1, 2)).real
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            outputs.append(scores.softmax(-1) @ vh)
        x = x + torch.cat(outputs, -1) @ p[b + "attn.o.weight"].T + p[b + "attn.o.bias"]
        n = rms(x) * p[b + "mlp_norm.gain"]
        hidden = (n @ p[b + "mlp.up.weight"].T + p[b + "mlp.up.bias"]).clamp_min(0) ** 2
        x = x + hidden @ p[b + "mlp.down.weight"].T + p[b + "mlp.down.bias"]
    z = rms(x) * p["head_norm.gain"] @ p["head"].T + p["head_bias"]
    logits = 15 * z / (z**2 + 225).sqrt()
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum()


def straight_line_training(p: dict, batches: list, num_steps: int, T: int, heads: int) -> list[float]:
    """Train the reference: torch's AdamW, and Muon matrix by matrix. Returns the steps' mean losses."""
    matrices = {n: torch.zeros_like(x) for n, x in p.items() if "blocks" in n and n.endswith(".weight")}
    rates = {"embed": 0.7, "head": 0.004}
    groups = [{"params": [x], "lr": rates.get(n, 0.015)} for n, x in p.items() if n not in matrices]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001)
    schedule = [1 if i < 0.3 * num_steps else (1 - i / num_steps) / 0.7 for i in range(num_steps)]
    decayed = torch.optim.lr_scheduler.LambdaLR(adamw, lambda i: schedule[min(i, num_steps - 1)])
    found = []
    for step, tokens in enumerate(batches):
        loss = straight_line_loss(p, tokens, T, heads)
        loss.backward()
        found.append(loss.item() / (len(tokens) - 1))
        with torch.no_grad():
            for name, momentum in matrices.items():
                W, lr = p[name], 0.025 * schedule[step]
                momentum.mul_(0.95).add_(0.05 * W.grad)
                X = 0.05 * W.grad + 0.95 * momentum
                wide = X if X.shape[0] <= X.shape[1] else X.T
                wide = wide / (wide.norm() + 1e-7)
                for _ in range(12):
                    A = wide @ wide.T
                    wide = 2 * wide - 1.5 * A @ wide + 0.5 * A @ A @ wide
                U = wide if X.shape[0] <= X.shape[1] else wide.T
                W.mul_(1 - lr * 0.05).sub_(lr * max(1, W.shape[0] / W.shape[1]) ** 0.5 * U)
        adamw.step()
        decayed.step()
        for x in p.values():
            x.grad = None
    return found


def test_twenty_steps_are_those_of_a_straight_line_copy(small, shards):
    """Fails if model, loss, baseline or schedule differs from the facts."""
    with begun(shards, RUN_ID="track") as made:
        p = {n: x.detach().clone().requires_grad_() for n, x in made.model.named_parameters()}
        stream = TokenStream(made.start.train_shards, 1024)
        batches = [stream.next() for _ in range(20)]
        wanted = straight_line_training(p, batches, 20, 64, SMALL.num_heads)
        assert made.train() == 20
    found = losses(made.s.log.parent.parent, "track", "train_loss")
    assert found == pytest.approx(wanted, abs=1e-5)
    assert found[-1] < found[0] - 0.5


def test_gradient_norm_and_flop_are_those_of_the_step(small, shards):
    """Fails if the log's grad_norm is not the mean loss's, or MFU counts other products than the model's;
    attention's are those of the visible pairs."""
    with begun(shards, RUN_ID="gauges", NUM_SCHEDULED_ITERATIONS=2, VAL_LOSS_EVERY=1) as made:
        model, tokens = copy.deepcopy(made.model), TokenStream(made.start.train_shards, 1024).next()
        inputs, targets = inputs_and_targets(tokens, 64)
        with FlopCounterMode(display=False) as counted:
            loss, _ = model(inputs, targets)
        (loss / 1024).backward()
        wanted = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert made.train() == 2
        products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "mm" in str(op))
        pairs = 1024 * 65 / 2
        attention = SMALL.num_layers * 4 * SMALL.num_heads * SMALL.head_dim * pairs
        assert 1024 * made.flop_per_token(0) == pytest.approx(3 * (products + attention))
    norm = read_log(made.s.log)[0].columns["grad_norm"]
    assert norm.step.tolist() == [1, 2] and norm.value[0] == pytest.approx(wanted, rel=1e-4)


# ---------------------------------------------------------------------------------------------------
# Data and ranks
# ---------------------------------------------------------------------------------------------------


class Tokens:
    """Shard in memory."""

    def __init__(self, tokens):
        self.tokens = tokens

    def read(self):
        return self.tokens


def test_the_stream_reads_straight_on_and_skips_what_crosses_an_end():
    shards = [Tokens(np.arange(25)), Tokens(np.arange(100, 105)), Tokens(np.arange(200, 211))]
    stream = TokenStream(shards, 10)
    found, places = [], []
    for _ in range(4):
        found.append(stream.next().tolist())
        places.append(stream.position)
    assert found == [list(range(a, a + 11)) for a in (0, 10, 200, 0)]
    assert places == [(0, 0, 10), (0, 0, 20), (0, 2, 10), (1, 0, 10)]
    again = TokenStream(shards, 10)
    again.seek(places[1])
    assert again.next().tolist() == found[2]


def test_four_ranks_train_the_same(shards, tmp_path):
    """Fails if any kind of state, as these settings have it, depends on which rank holds it."""
    settings = dict(MODES["rows with gains"], MODEL="tiny", OPTIMIZER="normuon", VAL_LOSS_EVERY=2)
    for ranks in (0, 4):
        env = env_of(shards, RUN_ID=f"on{ranks}", NUM_SCHEDULED_ITERATIONS=4, **settings)
        done = run(tmp_path, "train_gpt_simple.py", env, ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path, "on4") == pytest.approx(losses(tmp_path, "on0"), abs=2e-4)


# ---------------------------------------------------------------------------------------------------
# The family
# ---------------------------------------------------------------------------------------------------


def drawn(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def lengths(x, mode):
    return np.sqrt((x**2).sum({"global": (-2, -1), "row": -1, "col": -2}[mode], keepdims=True))


def reference(name: str, U, W, norms, lr: float, o) -> np.ndarray:
    """Reference in float64, matrix by matrix, from the formulas."""
    if name == "none":
        return W - lr * U
    if name == "sphere":
        new = W - lr * norms * U / lengths(U, "global")
        return new * norms / lengths(new, "global")
    if name == "rows":
        v = math.sqrt(0.33) * W / lengths(W, "row") - lr * U
        return norms * v / lengths(v, "row")
    if name == "brake":
        over = {"global": (-2, -1), "row": -1, "col": -2}[o.spectral_rho_mode]
        r = (U * W).sum(over, keepdims=True) / lengths(W, o.spectral_rho_mode) ** 2
        U = U - r * W + np.where(r < 0, o.spectral_out, o.spectral_in) * r * W
    if o.spectral_floor:
        least = o.spectral_floor * lengths(W, o.spectral_floor_mode)
        U = U * np.maximum(1, least / lengths(U, o.spectral_floor_mode))
    new = W - lr * U
    if name == "brake" and o.spectral_rescale:
        length = lengths(W, o.spectral_rho_mode)
        wanted = length - lr * (U * W).sum(over, keepdims=True) / length
        new = new / lengths(new, o.spectral_rho_mode) * wanted
    return new


FORMULAS = [
    *((name, {}) for name in ("none", "sphere", "rows", "floor", "brake")),
    ("floor", {"SPECTRAL_FLOOR_MODE": "row"}),
    ("brake", {"SPECTRAL_RESCALE": 0, "SPECTRAL_IN": 0.3}),
    ("brake", {"SPECTRAL_RHO_MODE": "row", "SPECTRAL_FLOOR": 0.5, "SPECTRAL_FLOOR_MODE": "row"}),
]


@pytest.mark.parametrize("name, settings", FORMULAS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_family_is_its_formulas(name, settings, sign):
    """Against numpy in float64, for updates that point outward and inward."""
    _, o, _ = read(ORD_MODE=name, **settings)
    W, U = drawn((3, 6, 9), 1), 0.2 * drawn((3, 6, 9), 2)
    U = U + sign * 0.1 * W
    norms = np.abs(drawn((3, 6 if name == "rows" else 1, 1), 3)) + 1
    found = simple.FAMILY[name](*map(torch.from_numpy, (U, W, norms)), 0.1, o)
    np.testing.assert_allclose(found.numpy(), reference(name, U, W, norms, 0.1, o), rtol=1e-8)
    if name == "sphere":
        np.testing.assert_allclose(lengths(found.numpy(), "global"), norms)


@pytest.mark.parametrize("mode", ["interpolate", "project"])
@pytest.mark.parametrize("scale", ["raw", "unit"])
@pytest.mark.parametrize("rho_mode", ["global", "row"])
def test_ord_before_orthogonalization(mode, scale, rho_mode):
    """P(G - removed) + a G_par, with the polar factor from an SVD; raw is in the twins' unit."""
    _, o, _ = read(ORD_MODE=mode, SPECTRAL_SCALE=scale, SPECTRAL_RHO_MODE=rho_mode, SPECTRAL_LR_MUL=0.3)
    G, W = drawn((2, 5, 8), 4), drawn((2, 5, 8), 5)
    over = {"global": (-2, -1), "row": -1}[rho_mode]
    par = (G * W).sum(over, keepdims=True) / ((W**2).sum(over, keepdims=True) + 1e-8) * W
    left, _, right = np.linalg.svd(G - (0.3 if mode == "interpolate" else 1) * par, full_matrices=False)
    P = left @ right
    unit = 0.25 if scale == "raw" else lengths(P, "global") / lengths(G - par, "global")
    found = simple.ord_update(torch.from_numpy(G), torch.from_numpy(W), None, torch.float64, o)
    np.testing.assert_allclose(found.numpy(), P + 0.3 * unit * par, atol=2e-3)  # 12 steps of Newton-Schulz


def test_gradients_of_weight_normalization():
    """Against autograd through W = n v / ||v||."""
    shapes = (1, 4, 7), (1, 4, 1), (1, 4, 7)
    W, norms, grad = (torch.from_numpy(drawn(shape, i)) for i, shape in enumerate(shapes))
    v = (math.sqrt(0.33) * W / W.norm(dim=-1, keepdim=True)).requires_grad_()
    n = norms.clone().requires_grad_()
    (n * v / v.norm(dim=-1, keepdim=True) * grad).sum().backward()
    for_v, for_n = simple.rows_gradient(grad, W, norms)
    torch.testing.assert_close(for_v, v.grad)
    torch.testing.assert_close(for_n, n.grad)


def test_normuon_keeps_the_norm_and_evens_the_rows():
    U, second = torch.from_numpy(drawn((1, 8, 4), 6)), torch.zeros(1, 8, 1, dtype=torch.float64)
    U[:, 0] *= 10
    new = vectors.reduce_variance(U, second, 0.95)
    assert float(new.norm()) == pytest.approx(float(U.norm()))
    torch.testing.assert_close(new.norm(dim=-1), new.norm(dim=-1)[:, :1].expand(1, 8))


@pytest.mark.parametrize("mode", simple.DECAY_MODES)
def test_decay_modes(mode):
    U, W = torch.from_numpy(drawn((1, 3, 4), 7)), torch.from_numpy(drawn((1, 3, 4), 8))
    wanted = {"param": W, "update": U, "both": W + U, "none": 0 * W}
    wanted["cautious"] = torch.where(U * W > 0, W, 0.0)
    torch.testing.assert_close(simple.decaying(U, W, mode), wanted[mode])


@pytest.mark.parametrize("name", MODES)
def test_every_mode_trains_projections_that_start_at_zero(name, small, shards):
    """Fails if a matrix of norm 0 stays there, or its first step is huge."""
    settings = dict(MODES[name], RUN_ID="zero", NUM_SCHEDULED_ITERATIONS=12, VAL_LOSS_EVERY=12)
    with begun(shards, **settings) as made:
        starts = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        made.train()
        for n, p in made.model.named_parameters():
            if n.endswith(("o.weight", "down.weight")):
                assert not starts[n].any()
                assert 0.05 < p.norm().item() < 30, n
            if name == "sphere" and n.endswith("q.weight"):
                assert p.norm().item() == pytest.approx(starts[n].norm().item(), rel=1e-5)
            if name == "rows" and n.endswith("q.weight"):
                torch.testing.assert_close(p.norm(dim=-1), starts[n].norm(dim=-1))
    found = losses(made.s.log.parent.parent, "zero")
    assert found[0] == pytest.approx(math.log(256), abs=1e-4) and found[-1] < found[0] - 0.5


def test_no_strength_and_no_brake_are_the_baseline(small, shards):
    """Bit-identical where the formulas agree: a control must not differ by more than its setting."""
    found = []
    free = dict(SPECTRAL_OUT=1, SPECTRAL_RESCALE=0, MUON_WEIGHT_DECAY=0.05, MUON_DECAY_MODE="param")
    settings = [{}, dict(ORD_MODE="interpolate", SPECTRAL_LR_MUL=0), dict(ORD_MODE="brake", **free)]
    for i, more in enumerate(settings):
        with begun(shards, RUN_ID=f"run{i}", NUM_SCHEDULED_ITERATIONS=6, **more) as made:
            made.train()
        found.append(losses(made.s.log.parent.parent, f"run{i}", "train_loss"))
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[0], abs=1e-4)  # its decay comes after the step


BACKENDS = {"brake with row floor": "aot_eager", "rows with gains": "eager"}


@pytest.mark.parametrize("name, backend", BACKENDS.items())
def test_a_step_compiles_once(name, backend, monkeypatch):
    """Fails if a graph breaks, which would end a GPU run, or a second step compiles anything."""
    monkeypatch.setattr(simple, "NEWTON_SCHULZ_STEPS", 1)  # twelve unrolled ones are traced for seconds
    _, o, _ = read(**MODES[name])
    tokens, found = torch.arange(64).view(4, 16), []
    torch._dynamo.reset()
    for compiler in (not_compiled, functools.partial(torch.compile, fullgraph=True, backend=backend)):
        model = simple.GPT(replace(SMALL, num_layers=1), 256, 16)
        model.init_weights("track", torch.Generator().manual_seed(0))
        optimizer, graphs = simple.Optimizer(model, o, lone_ranks(), compiler), []
        loss = model if name == "rows with gains" else compiler(model)  # the same in all modes
        for step in range(3):
            loss(tokens, tokens + 1)[0].backward()
            optimizer.step(1 - 0.1 * step, 1 - 0.2 * step)
            graphs.append(graphs_compiled())
        found.append(loss(tokens, tokens + 1)[0].item())
        assert len(set(graphs)) == 1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# ---------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "sphere", "rows with gains"])
def test_a_resumed_run_is_bit_identical(name, small, shards):
    """Fails if a checkpoint lacks any state: weights and losses must be bit-identical."""
    settings = dict(MODES[name], OPTIMIZER="normuon", NUM_SCHEDULED_ITERATIONS=8, VAL_LOSS_EVERY=4)
    with begun(shards, RUN_ID="whole", SAVE_EVERY=5, **settings) as whole:
        whole.train()
    path = whole.s.folder / "step_00000005.pt"
    with begun(shards, RUN_ID="rest", RESUME=path, **settings) as rest:
        assert rest.session.first_step == 5
        rest.train()
    for (n, a), b in zip(whole.model.named_parameters(), rest.model.parameters()):
        assert torch.equal(a, b), n
    here = whole.s.log.parent.parent
    assert losses(here, "rest", "train_loss") == losses(here, "whole", "train_loss")[5:]
    assert losses(here, "rest") == losses(here, "whole")[-1:]


def test_the_rehearsals_run_is_freed(small, shards, monkeypatch):
    """Fails if the rehearsal's model or optimizer, as large as the run's, is there when that is built."""
    made = []
    for part in (simple.GPT, simple.Optimizer):

        def remember(self, *args, build=part.__init__):
            made.append(weakref.ref(self))
            build(self, *args)

        monkeypatch.setattr(part, "__init__", remember)
    with run_here(simple, env_of(shards, RUN_ID="rehearsed")) as start:
        gc.disable()  # else it may come by itself
        try:
            parts = dict(log=start.log, module=simple, start=start, stop=StopRequest())
            Supervisor.rehearse(SimpleNamespace(**parts))
        finally:
            gc.enable()
        assert [part() for part in made] == [None] * 2


def test_the_tools_read_its_logs(small, shards):
    """Log, spectra, and the track's proof by report_sweep --target 3.28."""
    for seed in (1, 2):
        env = dict(RUN_ID=f"seed{seed}", SEED=seed, NUM_SCHEDULED_ITERATIONS=4, MANIFOLD_EVERY=2)
        with begun(shards, **env) as made:
            made.train()
            assert made.session.end(4) == 0
    log = read_log(made.s.log)[0]
    assert log.state == "finished" and log.config["ord_mode"] == "none"
    assert log.columns["spec_attn"].value.shape[-1] == SMALL.num_layers
    assert len(made.s.log.with_suffix(".manifold.jsonl").read_text().splitlines()) == 2 * 12
    assert report_sweep.main(["logs", "--target", "3.28", "--out", "report"]) == 0
    text = (made.s.log.parent.parent / "report" / "REPORT.md").read_text()
    assert "Proof against 3.28" in text and "(target - mean) √n" in text


def test_the_model_file_gives_the_models_losses(shards, small):
    """Fails if sampling or evaluation, which bypass GPT.forward, has other probabilities."""
    with begun(shards, RUN_ID="saved", NUM_SCHEDULED_ITERATIONS=2, VAL_LOSS_EVERY=0, SAVE_MODEL=1) as made:
        made.train()
        assert made.session.end(2) == 0
    loaded = load_model(made.s.folder / MODEL_FILE, "cpu")
    assert loaded.trainer is simple and loaded.max_tokens == 64
    inputs, targets = torch.randint(1, 256, (2, 2, 64), generator=torch.Generator().manual_seed(1))
    logits = loaded.logits(loaded.hidden(inputs))
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    with torch.no_grad():
        assert float(nats) == pytest.approx(float(made.model(inputs, targets)[0]), rel=1e-5)


def test_short_validation_shards_are_read_as_far_as_batches_go(small, shards):
    """Fails if a user's own text, with little to validate on, ends the run at the start."""
    env = {name: text for name, text in env_of(shards).items() if name != "VAL_TOKENS"}
    s, _, _, notes = read_run(simple, env)
    assert s.val_tokens == 19 * 1024 and "the shards hold 20,000" in notes[0]
    assert read_run(simple, {**env, "BATCH_TOKENS": "32768"})[0].val_tokens == 10_485_760, "refused later"


def test_a_sweep_knows_what_a_run_will_have(shards, trainers_here, monkeypatch):
    """Fails if the launcher refuses small batches, or writing out a mode's default makes another run."""
    asked = {name: text for name, text in env_of(shards).items() if name in knobs(simple.SETTINGS)}
    answer = answer_for(simple, {}, [asked])[0]
    assert answer["refused"] is None and answer["data"] is None
    trainer = read_trainer("train_gpt_simple.py")
    for gpus, model in (((), "tiny"), (("0",), "track")):
        on_machine = replace(trainer, gpus=gpus)
        assert on_machine.resolve({})["MODEL"] == model
        monkeypatch.setattr(simple, "find_device", lambda env, gpus=gpus: "cuda" if gpus else "cpu")
        for mode in simple.ORD_MODES:
            s, o, _ = simple.read_settings({"ORD_MODE": mode})
            values = {k.upper(): v for k, v in {**asdict(s), **asdict(o)}.items()}
            resolved = trainer.without_machine(on_machine.resolve({"ORD_MODE": mode}))
            differing = {name for name in resolved if resolved[name] != values[name]}
            assert differing <= {"RUN_ID", "DEVICE", "MUON_COOLDOWN_FRAC"}, (mode, differing)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"SPECTRAL_OUT": 0.5}, "SPECTRAL_OUT=0.5 does nothing with ORD_MODE=none"),
        ({"ORD_MODE": "sphere", "MUON_WEIGHT_DECAY": 0.05}, "does nothing with ORD_MODE=sphere"),
        ({"MODEL": "gpt2-small"}, "MODEL='gpt2-small': wanted one of auto, track"),
        ({"ROW_TOKENS": 100}, "that of ROW_TOKENS=100"),
        ({"BATCH_TOKENS": 2**17, "VAL_TOKENS": 2**17}, "the largest training shard has 120000 tokens"),
        ({"VAL_TOKENS": 20480}, "the validation shards hold 20000"),
        ({"BATCH_TOKENS": 20480, "VAL_TOKENS": 20480}, "BATCH_TOKENS=20480, of which it is a multiple"),
    ],
)
def test_what_cannot_be_is_refused(settings, said, small, shards, capsys):
    assert said in refusal(simple, env_of(shards, **settings), capsys)
