"""Every update rule against an independent float64 reference, written from the formulas, not from the code.

The reference knows the polar factor as U f(S) V^T, where f is the product of Polar Express's scalar
polynomials: no matrix iteration of its own. The plain rules and a CPU's fast forms of them take the same
tests.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import (
    FORMS,
    MATRIX_NAMES,
    SMALL_STEPS,
    TRAINERS,
    Params,
    lone_ranks,
    make_optimizer,
    optimizer_settings,
    small_config,
    small_model,
    small_trainer,
    train_steps,
)

import train_gpt
import train_gpt_muon_ord as ord_gpt
from runtime.sharding import read_master, write_master

QUINTICS = (  # arXiv 2505.16932, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
BAND = 0.8588, 1.1412  # where f sends every singular value above 0.001 of the norm
MUON_LR, MUON_BETA2 = 0.023, 0.95
NUM_STEPS = 200  # far from the last 50 steps, in which momentum falls back

SHAPES = {
    "blocks.0.attn.q": (8, 8),  # square
    "blocks.0.attn.k": (6, 10),  # wide
    "blocks.0.mlp.up": (12, 7),  # tall
    "blocks.0.mlp.down": (16, 4),  # the MLP's second matrix; long, which has a polar iteration of its own
}


# ------------------------------------------------------------------------------------------------ reference


def quintics(s):
    for a, b, c in QUINTICS:
        s = a * s + b * s**3 + c * s**5
    return s


def ref_polar(G):
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    return (U * quintics(S / (1.02 * np.sqrt((S**2).sum()) + 1e-6))) @ Vt


def side(x):
    """Axis over which NorMuon takes its mean square: along a row if tall, along a column if wide."""
    return 1 if x.shape[0] >= x.shape[1] else 0


def ref_running_square(x, state, key):
    mean = (x**2).mean(side(x), keepdims=True)
    state[key] = MUON_BETA2 * state.get(key, 0.0) + (1 - MUON_BETA2) * mean
    return state[key]


def ref_P(G, state, normuon=True):
    U = ref_polar(G)
    if not normuon:
        return U
    size = np.linalg.norm(U)
    U = U / np.sqrt(ref_running_square(U, state, "second"))
    return U * size / np.linalg.norm(U)


def per(x, y, rho_mode):
    """Return <x, y> of the matrix, of each row or of each column."""
    axis = {"global": (0, 1), "row": 1, "col": 0}[rho_mode]
    return (x * y).sum(axis=axis, keepdims=True)


def ref_ord(G, W, a, o, state):
    """Return (P, radial part's contribution, post's r and s) of one matrix, from ord_update's table."""
    rho = per(G, W, o.spectral_rho_mode) / (per(W, W, o.spectral_rho_mode) + o.spectral_proj_eps)
    par = rho * W
    state.setdefault("rhos", []).append(np.abs(rho).mean())
    state["rho"] = rho.mean()
    if o.spectral_schedule == "adaptive" and len(state["rhos"]) > 50:
        a = a * np.clip(state["rhos"][-1] / np.mean(state["rhos"][10:50]), 0, 1)
    normuon = o.optimizer == "normuon"
    if o.ord_mode == "off":
        return ref_P(G, state, normuon), 0 * G, 0, 0
    if o.ord_mode == "post":
        P = ref_P(G, state, normuon)
        r = per(P, W, o.spectral_rho_mode) / per(W, W, o.spectral_rho_mode)
        s = np.where(r < 0, o.spectral_out, o.spectral_in)
        return P, -r * W + s * r * W, r, s
    P = ref_P(G - (par if o.ord_mode == "project" else a * par), state, normuon)
    if o.spectral_variance:
        par = par / np.sqrt(ref_running_square(par, state, "radial square"))
    elif o.spectral_scale == "unit":
        par = par * np.linalg.norm(P) / np.linalg.norm(G - par)
    return P, a * par, 0, 0


def ref_decay(U, W, l, lr, o):
    """Return the part of the weights that decay removes."""
    wd = o.muon_weight_decay
    return {
        "cautious": l * wd * lr * W * (U * W >= 0),
        "none": 0 * W,
        "param": l * wd * W,
        "update": l * wd * U,
        "both": l * wd * (W + U),
    }[o.muon_decay_mode]


def ref_momentum(step, num_steps=NUM_STEPS, warmup=300):
    """Momentum: 0.85 -> 0.95 over the warm-up, and back over the last 50 steps."""
    return 0.85 + 0.1 * (step / warmup if step < warmup else min(1.0, (num_steps - step) / 50))


def ref_matrix_step(name, W, grad, step, lr_mul, o, state):
    """Return the matrix after one step of NorMuon, Muon, or either with ORD."""
    mu = ref_momentum(step)
    m = state["momentum"] = mu * state.get("momentum", 0.0) + (1 - mu) * grad
    G = (1 - mu) * grad + mu * m
    lr = MUON_LR * lr_mul
    l = lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * (2 if name.endswith("down") else 1)
    if not hasattr(o, "ord_mode"):
        U = ref_P(G, state, o.optimizer == "normuon")
        return W - l * U - ref_decay(U, W, l, lr, o)
    P, radial, r, s = ref_ord(G, W, strength(name, o), o, state)
    U, new = P + radial, W - l * (P + radial)
    state.update(P=P, U=U, G=G, radial=radial)
    if o.spectral_rescale:
        wanted = np.sqrt(per(W, W, o.spectral_rho_mode)) * (1 - np.minimum(l * s * r, 0.999))
        new = new * wanted / np.sqrt(per(new, new, o.spectral_rho_mode))
        return new - ref_decay(U, new, l, lr, o)
    return new - ref_decay(U, W, l, lr, o)


def strength(name, o):
    own = o.spectral_lr_mul_attn if ".attn." in name else o.spectral_lr_mul_mlp
    return o.spectral_lr_mul if own is None else own


# ------------------------------------------------------------------------------------------------ both sides


def start_weights(seed=0, scale=0.5, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, scale, s).astype(np.float32) for n, s in shapes.items()}


def random_grads(weights, seed):
    """Yield each step's gradients, whose part along the weights comes, goes and changes sign."""
    rng = np.random.default_rng(seed + 100)
    while True:
        yield {
            n: (rng.normal(0, 2, w.shape) + 3 * rng.normal() * w).astype(np.float32)
            for n, w in weights.items()
        }


def compare_steps(trainer, o, steps, seed=0, weights=None, lr_mul=1.3, tolerance=2e-5):
    """Run optimizer and reference from one start under the same gradients, and compare every step."""
    weights = weights or start_weights(seed)
    model = Params(weights)
    optimizer = make_optimizer(trainer, model, o)
    ref = {n: w.astype(np.float64) for n, w in weights.items()}
    states, slack = {n: {} for n in weights}, {n: tolerance + 0 * w for n, w in ref.items()}
    for step, grads in zip(range(steps), random_grads(weights, seed)):
        model.add_grads(grads)
        optimizer.step(step, lr_mul, 2048, True)
        for name, W in ref.items():
            new = ref_matrix_step(name, W, grads[name].astype(np.float64), step, lr_mul, o, states[name])
            # an update so near 0 that rounding decides its sign also decides whether its weight decays
            moved = W - new
            slack[name] = slack[name] + 0.1 * np.abs(W) * (np.abs(moved) < 1e-5)
            ref[name] = new
            error = np.abs(model.numpy(name) - new)
            assert (error <= slack[name]).all(), (name, step, error.max())
    return model, optimizer, ref, states


# ------------------------------------------------------------------------------------------- polar factor


def test_the_band_of_polar_express():
    """Fails if the coefficients are not those of Polar Express: f maps [0.001, 1/1.02] into BAND."""
    values = quintics(np.linspace(0.001, 1 / 1.02, 100_001))
    assert BAND[0] < values.min() < BAND[0] + 1e-3 and BAND[1] - 1e-3 < values.max() < BAND[1]
    assert train_gpt.POLAR_COEFFICIENTS == ord_gpt.POLAR_COEFFICIENTS == QUINTICS


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("rows, columns", [(32, 32), (96, 24), (24, 96), (64, 96), (9, 1), (1, 9)])
@pytest.mark.parametrize("condition", [1, 10, 300, 1e9])
def test_polar_express_over_condition_numbers(condition, rows, columns, forms):
    """Fails if the singular vectors are not the input's (an extra transpose, an even power), small singular
    values do not grow enough, as with a wrong first step or too large a norm, rounding spoils nearly singular
    matrices, or one of two stacked matrices affects the other. A CPU's fast form squares the singular values
    of long matrices, which costs up to 6e-3; the polynomials themselves are off by 0.14."""
    rng, n = np.random.default_rng(1), min(rows, columns)
    U, V = (np.linalg.qr(rng.normal(size=(2, size, n)))[0] for size in (rows, columns))
    S = np.geomspace(1, 1 / condition, n)
    G = torch.tensor(U * S @ V.mT, dtype=torch.float32)
    with FORMS[forms](train_gpt):
        X = train_gpt.polar_express(G, torch.float32).double().numpy()
    expected = quintics(S / (1.02 * np.linalg.norm(S) + 1e-6))
    squared = forms == "fast" and max(rows, columns) >= 2 * n
    error = np.linalg.norm(X - U * expected @ V.mT, 2, axis=(1, 2))
    assert error.max() < (7e-3 if squared else 2e-4)
    if condition <= 300:
        values = np.linalg.svd(X, compute_uv=False)
        assert BAND[0] - 1e-3 < values.min() and values.max() < BAND[1] + 1e-3


@pytest.mark.parametrize("forms", FORMS)
def test_polar_express_of_nothing_is_nothing(forms):
    """Fails if a matrix without gradient becomes NaN."""
    with FORMS[forms](train_gpt):
        assert (train_gpt.polar_express(torch.zeros(2, 4, 6), torch.float32) == 0).all()


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("optimizer", ["normuon", "muon"])
def test_steps_of_normuon_and_muon(trainer, optimizer, forms):
    """Fails if momentum, polar factor, variance reduction, the rate of a shape or the cautious decay
    differ."""
    extra = {} if trainer is train_gpt else {"ORD_MODE": "off"}
    with FORMS[forms](trainer):
        compare_steps(trainer, optimizer_settings(trainer, OPTIMIZER=optimizer, **extra), steps=8)


DECAYS = [
    ("cautious", 1.2),
    ("cautious", -1.2),
    ("cautious", 30),
    ("none", 0.5),
    *itertools.product(("param", "update", "both"), (-0.2, 0, 0.2)),
]


@pytest.mark.parametrize("mode, decay", DECAYS)
def test_decay_modes_of_any_sign(mode, decay):
    """Fails if a decay mode removes the wrong part, or a negative decay is clamped to zero."""
    o = optimizer_settings(train_gpt, MUON_DECAY_MODE=mode, MUON_WEIGHT_DECAY=decay)
    _, _, ref, _ = compare_steps(train_gpt, o, steps=4)
    _, _, plain, _ = compare_steps(train_gpt, optimizer_settings(train_gpt, MUON_DECAY_MODE="none"), steps=4)
    difference = max(np.abs(ref[n] - plain[n]).max() for n in ref)
    assert (difference > 1e-3) == (mode != "none" and decay != 0)  # the test can distinguish them


ORD_ARMS = [
    dict(ORD_MODE=mode, SPECTRAL_RHO_MODE=rho, **scale)
    for mode, rho, scale in itertools.product(
        ("interpolate", "project"),
        ("global", "row", "col"),
        (dict(SPECTRAL_SCALE="raw"), dict(SPECTRAL_SCALE="unit"), dict(SPECTRAL_VARIANCE=1)),
    )
] + [
    dict(
        ORD_MODE="post",
        SPECTRAL_RHO_MODE=rho,
        SPECTRAL_RESCALE=rescale,
        SPECTRAL_OUT=out,
        SPECTRAL_IN=into,
    )
    for rho, rescale, (out, into) in itertools.product(
        ("global", "row", "col"), (0, 1), ((0, 0), (0.5, 1), (1, 0.25), (1.5, -0.5))
    )
]


ADAPTIVE_ARMS = [  # the schedule only scales a
    dict(SPECTRAL_SCHEDULE="adaptive", ORD_MODE=mode, SPECTRAL_RHO_MODE=rho, **scale)
    for mode, rho, scale in (
        ("interpolate", "row", dict(SPECTRAL_SCALE="unit")),
        ("project", "col", dict(SPECTRAL_VARIANCE=1)),
        ("interpolate", "global", dict(SPECTRAL_SCALE="raw")),
    )
]


@pytest.mark.parametrize("arm", ORD_ARMS + ADAPTIVE_ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_steps_of_ord(arm):
    """Fails if any ORD mode, with any combination of its settings, does not compute its formula."""
    strong = {"SPECTRAL_LR_MUL": 0.1 if "SPECTRAL_VARIANCE" in arm else 0.7}
    o = optimizer_settings(
        ord_gpt, **arm, **(strong if arm["ORD_MODE"] in ("interpolate", "project") else {})
    )
    steps = 56 if "SPECTRAL_SCHEDULE" in arm else 5
    tolerance = 2e-5 if steps == 5 else 2e-4
    compare_steps(ord_gpt, o, steps, tolerance=tolerance)


RADIAL = dict(SPECTRAL_LR_MUL=0.7)
RESCALED = dict(ORD_MODE="post", SPECTRAL_RESCALE=1, SPECTRAL_OUT=0.5)


@pytest.mark.parametrize(
    "extra",
    [
        dict(RADIAL, OPTIMIZER="muon"),
        dict(RADIAL, SPECTRAL_LR_MUL_ATTN=0.05, SPECTRAL_LR_MUL_MLP=0.4),
        dict(RADIAL, SPECTRAL_LR_MUL_MLP=0),
        dict(SPECTRAL_LR_MUL=-0.3),
        dict(RADIAL, SPECTRAL_PROJ_EPS=5),
        dict(RADIAL, MUON_DECAY_MODE="param", MUON_WEIGHT_DECAY=0.1),
        dict(RESCALED, MUON_DECAY_MODE="both", MUON_WEIGHT_DECAY=0.2),
        dict(RESCALED, MUON_DECAY_MODE="update", MUON_WEIGHT_DECAY=-0.2),
        dict(RESCALED, MUON_DECAY_MODE="param", MUON_WEIGHT_DECAY=0.2),
        dict(RESCALED, MUON_DECAY_MODE="cautious", MUON_WEIGHT_DECAY=30),
    ],
    ids=str,
)
def test_steps_of_ord_with_other_settings(extra):
    """Fails if ORD ignores a setting: its own strengths for attention and MLP, eps, a negative a, decay,
    Muon; if rescaling undoes the decay, or the decay's mask is not taken from the update."""
    compare_steps(ord_gpt, optimizer_settings(ord_gpt, **extra), steps=4)


# ------------------------------------------------------------------------------------------------ identities


def run_steps(trainer, o, weights, grads, measure=True, ranks=None):
    """Run some steps; return the weights and the optimizer."""
    model = Params(weights)
    optimizer = make_optimizer(trainer, model, o, ranks=ranks)
    for step, g in enumerate(grads):
        model.add_grads(g)
        optimizer.step(step, 1.3, 2048, measure)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, optimizer


def some_grads(weights, steps, seed=0):
    return [g for g, _ in zip(random_grads(weights, seed), range(steps))]


def assert_bit_equal(a, b):
    for name, x in a.items():
        assert torch.equal(x.view(torch.int32), b[name].view(torch.int32)), name


@pytest.mark.parametrize("decay", [("cautious", 1.2), ("both", -0.1)])
@pytest.mark.parametrize("optimizer", ["normuon", "muon"])
@pytest.mark.parametrize(
    "arm",
    [
        dict(ORD_MODE="interpolate", SPECTRAL_LR_MUL=0),
        dict(ORD_MODE="off"),
        dict(ORD_MODE="interpolate", SPECTRAL_LR_MUL=0, SPECTRAL_SCALE="unit", SPECTRAL_RHO_MODE="row"),
        dict(ORD_MODE="interpolate", SPECTRAL_LR_MUL=0, SPECTRAL_SCHEDULE="adaptive", SPECTRAL_VARIANCE=1),
        dict(ORD_MODE="post"),
        dict(ORD_MODE="post", SPECTRAL_OUT=1, SPECTRAL_IN=1, SPECTRAL_RESCALE=0, SPECTRAL_RHO_MODE="col"),
    ],
    ids=lambda arm: "-".join(map(str, arm.values())),
)
def test_ord_of_no_strength_is_train_gpt_to_the_last_bit(arm, optimizer, decay):
    """Fails if the control arm is not bit-identical to the baseline: a rounding would act like a new seed."""
    weights = start_weights(shapes={**SHAPES, "blocks.1.mlp.up": (5, 12, 7)})  # and a bank of experts
    grads = some_grads(weights, 6)
    shared = dict(OPTIMIZER=optimizer, MUON_DECAY_MODE=decay[0], MUON_WEIGHT_DECAY=decay[1])
    base, _ = run_steps(train_gpt, optimizer_settings(train_gpt, **shared), weights, grads)
    ours, _ = run_steps(ord_gpt, optimizer_settings(ord_gpt, **shared, **arm), weights, grads)
    assert_bit_equal(base, ours)


@pytest.mark.parametrize(
    "name, shape, extra",
    [
        ("blocks.0.mlp.up", (4, 24, 16), {}),  # experts
        ("blocks.0.mlp.up", (4, 24, 16), dict(SPECTRAL_LR_MUL=0.5)),
        ("blocks.0.attn.q", (3, 8, 12), {}),  # groups of heads
        ("blocks.0.attn.q", (3, 8, 12), dict(ORD_MODE="post", SPECTRAL_OUT=0.5)),
    ],
)
def test_each_matrix_of_a_bank_is_updated_by_itself(name, shape, extra):
    """Fails if a matrix's momentum, polar factor, variance or rho depends on another one of its parameter, or
    if rate and variance are not those of its shape."""
    trainer, (_, rows, columns) = ord_gpt if extra else train_gpt, shape
    o, weights = optimizer_settings(trainer, **extra), start_weights(shapes={name: shape})
    grads = some_grads(weights, 3)
    together, optimizer = run_steps(trainer, o, weights, grads)
    (bucket,) = optimizer.stacks
    assert bucket.state["second_moment"].shape == (shape[0], *((rows, 1) if rows > columns else (1, columns)))
    assert bucket.shape_lr_N11.unique().tolist() == pytest.approx([max(1, rows / columns) ** 0.5])
    for i in range(shape[0]):
        own = [{name: step[name][i]} for step in grads]
        alone, optimizer = run_steps(trainer, o, {name: weights[name][i]}, own)
        torch.testing.assert_close(together[name][i], alone[name])
        if extra:
            torch.testing.assert_close(bucket.stats[i : i + 1], optimizer.stacks[0].stats)


def test_a_step_of_post_that_would_remove_all_leaves_a_thousandth():
    """Fails if a step longer than the matrix reverses it."""
    o = optimizer_settings(ord_gpt, **RESCALED, SPECTRAL_IN=2, MUON_DECAY_MODE="none")
    _, _, ref, _ = compare_steps(ord_gpt, o, steps=1, lr_mul=400, tolerance=1e-4)
    shares = [np.linalg.norm(ref[n]) / np.linalg.norm(w) for n, w in start_weights().items()]
    assert min(shares) == pytest.approx(0.001)


UNIT_ARMS = [arm for arm in ORD_ARMS + ADAPTIVE_ARMS if arm.get("SPECTRAL_SCALE") == "unit"]


@pytest.mark.parametrize("arm", UNIT_ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_unit_does_not_see_the_gradients_size(arm):
    """Fails if a gradient 1024 times as large changes any bit of the weights. (Gradient norms are above 32
    here: below that, fp32 resolves the 1e-6 that the polar factor adds to the norm.)"""
    weights = start_weights()
    steps = 54 if "SPECTRAL_SCHEDULE" in arm else 6
    grads = [{n: 64 * g for n, g in step.items()} for step in some_grads(weights, steps)]
    larger = [{n: 1024 * g for n, g in step.items()} for step in grads]
    o = optimizer_settings(ord_gpt, SPECTRAL_LR_MUL=0.7, **arm)
    usual = run_steps(ord_gpt, o, weights, grads)[0]
    assert_bit_equal(usual, run_steps(ord_gpt, o, weights, larger)[0])
    tiny = [{n: np.float32(1e-5) * g for n, g in step.items()} for step in grads[:5]]
    few = run_steps(ord_gpt, o, weights, grads[:5])[0]
    assert_close_weights(few, run_steps(ord_gpt, o, weights, tiny)[0], 5e-3)


# ------------------------------------------------------------------------------------------------ zeros


ZERO_ARMS = [*ORD_ARMS, dict(ORD_MODE="interpolate", MUON_DECAY_MODE="both", MUON_WEIGHT_DECAY=-0.1)]


@pytest.mark.parametrize(
    "trainer, arm",
    [(train_gpt, {}), *((ord_gpt, arm) for arm in ZERO_ARMS)],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_matrices_that_start_at_zero_move(trainer, arm):
    """Fails if a division by ||W|| = 0 or ||G|| = 0 gives a NaN, or a mode keeps a zero matrix at zero. The
    gradient is zero at step 0, zero in the first matrix at step 1, then constant."""
    weights = {n: 0 * w for n, w in start_weights().items()}
    weights["blocks.0.attn.q"] = start_weights()["blocks.0.attn.q"]
    full = some_grads(start_weights(), 1)[0]
    none = {n: 0 * g for n, g in full.items()}
    grads = [none, {**full, "blocks.0.attn.q": none["blocks.0.attn.q"]}, *[full] * 4]
    o = optimizer_settings(trainer, **arm)
    still, _ = run_steps(trainer, o, weights, grads[:1])
    after, _ = run_steps(trainer, o, weights, grads)
    for name, w in weights.items():
        assert torch.isfinite(still[name]).all() and torch.isfinite(after[name]).all()
        if not w.any():
            assert not still[name].any()
            assert after[name].norm() > 0.02 * math.sqrt(min(w.shape))  # one step of NorMuon is .035 or more


@pytest.mark.parametrize("rescale", [0, 1])
def test_a_zero_matrix_grows_in_post_until_it_has_a_size(rescale):
    """Fails if a matrix that starts at zero stays small because its radial updates are removed: below the
    floor, a post update without radial part is NorMuon's."""
    shapes = {"blocks.0.mlp.down": (16, 4)}
    weights = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    grads = some_grads(start_weights(shapes=shapes), 1) * 60
    extra = dict(MUON_DECAY_MODE="none")
    plain, _ = run_steps(train_gpt, optimizer_settings(train_gpt, **extra), weights, grads[:4])
    o = optimizer_settings(
        ord_gpt, ORD_MODE="post", SPECTRAL_OUT=0, SPECTRAL_IN=0, SPECTRAL_RESCALE=rescale, **extra
    )
    assert_bit_equal(plain, run_steps(ord_gpt, o, weights, grads[:4])[0])
    sizes = [
        run_steps(ord_gpt, o, weights, grads[:n])[0]["blocks.0.mlp.down"].norm().item() for n in (40, 60)
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=2e-5 if rescale else 1e-2)  # and then it keeps its norm
    assert sizes[0] > 0.2 * math.sqrt(16)


def six_matrices():
    return {f"blocks.{i}.mlp.up": (9, 4) for i in range(5)} | {"blocks.0.mlp.down": (9, 4)}


@pytest.mark.parametrize(
    "trainer, arm",
    [
        (train_gpt, {}),
        (train_gpt, dict(MUON_DECAY_MODE="both", MUON_WEIGHT_DECAY=-0.2)),
        (train_gpt, dict(OPTIMIZER="adamw")),
        (ord_gpt, dict(ORD_MODE="project", SPECTRAL_SCALE="unit")),
        (ord_gpt, dict(SPECTRAL_VARIANCE=1, SPECTRAL_SCHEDULE="adaptive", SPECTRAL_RHO_MODE="row")),
        (ord_gpt, dict(ORD_MODE="post", SPECTRAL_RESCALE=1, SPECTRAL_OUT=0)),
    ],
)
def test_shards_of_any_rank_equal_those_of_one_rank_and_padding_stays_zero(trainer, arm):
    """Fails if a rank updates another's matrices or uses another's rate, or the padding of six matrices to
    eight (four ranks) becomes nonzero, which would leak into norms and checkpoints."""
    weights = start_weights(shapes=six_matrices())
    grads = some_grads(weights, 4)
    o = optimizer_settings(trainer, **arm)
    whole, _ = run_steps(trainer, o, weights, grads)
    flat = torch.cat([x.flatten() for x in whole.values()])
    for rank in range(4):
        _, optimizer = run_steps(trainer, o, weights, grads, ranks=lone_ranks(rank, 4))
        [bucket] = optimizer.buckets
        assert bucket.weights.numel() == 8 * 36 and not bucket.weights[6 * 36 :].any()
        mine = slice(rank * 72, rank * 72 + 72)
        torch.testing.assert_close(
            bucket.weights[mine], torch.cat((flat, torch.zeros(72)))[mine], rtol=0, atol=1e-5
        )


def test_shards_of_a_big_table_equal_those_of_one_rank():
    """Fails if one of four ranks updates another's part of a table, or skips small parameters. 65537 entries
    need padding on four ranks."""
    shapes = {"ngram_table": (65537, 1), "smear_gate": (12,), "blocks.0.attn.attn_gate": (2, 12)}
    weights = start_weights(shapes=shapes)
    grads = some_grads(weights, 4)
    o = optimizer_settings(train_gpt)
    whole, _ = run_steps(train_gpt, o, weights, grads)
    for rank in range(4):
        after, _ = run_steps(train_gpt, o, weights, grads, measure=False, ranks=lone_ranks(rank, 4))
        part = slice(rank * 16385, min(65537, (rank + 1) * 16385))
        for name, p in after.items():
            mine = part if name == "ngram_table" else slice(None)
            torch.testing.assert_close(p[mine], whole[name][mine], rtol=0, atol=1e-6)
            assert not torch.equal(p[mine], torch.tensor(weights[name][mine]))


# ------------------------------------------------------------------------------------------------ masters


def test_masters_of_bfloat16_and_mantissa_keep_every_bit():
    """Fails if a master loses a bit in bfloat16 and int16: a sign, a carry, a special value."""
    ones, large = (1.0, 1 + 2**-23, 1 - 2**-24), (65535.0, 3.4e38, math.inf, math.nan)
    positive = torch.tensor([0.0, 1e-45, 1.17549435e-38, *ones, *large])
    special = torch.cat((positive, -positive)).view(torch.int32)
    halves = torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x3F80, 0xBF80, 0x7F80])
    pairs = ((halves[:, None] << 16) | halves).flatten().to(torch.int32)
    random = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0)).int()
    for bits in (special, pairs, random):
        weight, mantissa = (torch.zeros(len(bits), dtype=t) for t in (torch.bfloat16, torch.int16))
        write_master(weight, mantissa, bits.view(torch.float32))
        assert torch.equal(read_master(weight, mantissa).view(torch.int32), bits)
        assert torch.equal(weight.view(torch.int16).int(), bits >> 16)  # the model sees the high half


@pytest.mark.parametrize(
    "trainer, arm",
    [
        (train_gpt, {}),
        (train_gpt, dict(OPTIMIZER="adamw")),
        (ord_gpt, {}),
        (ord_gpt, dict(ORD_MODE="post", SPECTRAL_OUT=0.5, SPECTRAL_RESCALE=1)),
    ],
)
def test_many_steps_on_bfloat16_weights_equal_steps_on_fp32_masters(trainer, arm, monkeypatch):
    """Fails if small updates are lost: after any number of steps the masters are those of fp32 weights. The
    polar factor of bfloat16 weights, computed in bfloat16, is computed in fp32 here, as that of fp32 weights.
    """
    polar_express = trainer.polar_express
    monkeypatch.setattr(trainer, "polar_express", lambda G, dtype: polar_express(G, torch.float32))
    shapes = {**SHAPES, "head": (8, 4), "ngram_table": (5, 3)}
    weights = {n: torch.tensor(w).bfloat16().float().numpy() for n, w in start_weights(shapes=shapes).items()}
    o = optimizer_settings(trainer, **arm)
    models = [Params(weights, dtype) for dtype in (torch.float32, torch.bfloat16)]
    optimizers = [make_optimizer(trainer, m, o) for m in models]
    for step, grads in zip(range(60), random_grads(weights, 0)):
        for model, optimizer in zip(models, optimizers):
            if step % 2 == 0:  # Adam sums two steps' gradients in bfloat16, which is not tested here
                model.add_grads({n: torch.tensor(g).bfloat16() for n, g in grads.items()})
            optimizer.step(step, 0.01, 2048, False)
    for exact, half in zip(*(optimizer.buckets for optimizer in optimizers)):
        assert half.mine.dtype == torch.bfloat16 and half.mantissa is not None
        assert torch.equal(read_master(half.mine, half.mantissa), exact.mine)


# ------------------------------------------------------------------------------------------------ Adam


def torch_adamw(weights, grads, lr, betas, decay):
    params = {n: torch.nn.Parameter(torch.tensor(w)) for n, w in weights.items()}
    adam = torch.optim.AdamW(params.values(), lr=lr, betas=betas, eps=1e-10, weight_decay=decay)
    for step in grads:
        for n, g in step.items():
            params[n].grad = torch.tensor(g)
        adam.step()
    return {n: p.detach() for n, p in params.items()}


def assert_close_weights(a, b, tolerance=2e-6):
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1, 1e-10, 0], ids=["usual", "near eps", "unseen"])
@pytest.mark.parametrize("warmup", [0, 15])
def test_adam_equals_its_formula_in_float64(size, warmup):
    """Fails if eps is added after the bias correction, as in torch, weights without gradient decay, or the
    betas do not rise with BETA_WARMUP_STEPS. A gate and a table, with decay 1 and 5."""
    weights = start_weights(shapes={"blocks.0.attn.attn_gate": (4, 12), "ngram_table": (4, 3)}, scale=2)
    grads = [{n: np.float32(size) * g for n, g in step.items()} for step in some_grads(weights, 20)]
    model = Params(weights)
    o = optimizer_settings(train_gpt, ADAM_WEIGHT_DECAY=0.5, BETA_WARMUP_STEPS=warmup)
    optimizer = make_optimizer(train_gpt, model, o)
    refs = {n: RefAdam(n, w.astype(float)) for n, w in weights.items()}
    for step, g in enumerate(grads):
        model.add_grads(g)
        optimizer.step(step, 1.3, 2048, False)
        for name, ref in refs.items():
            ref.step(g[name].astype(float), 1.3, step % 2 == 1, min(1, step / warmup) if warmup else 1)
            np.testing.assert_allclose(model.numpy(name), ref.W, rtol=0, atol=1e-4 * 0.008 * ref.lr + 1e-6)
    for name, w in weights.items():
        assert (size == 0) == (model.numpy(name) == w).all()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_matrices_under_adamw_are_torchs_adamw(trainer):
    """Fails if OPTIMIZER=adamw, Muon's control arm, is not AdamW with decoupled decay at every step."""
    extra = {} if trainer is train_gpt else {"ORD_MODE": "off"}
    o = optimizer_settings(trainer, OPTIMIZER="adamw", ADAM_MATRIX_LR=0.003, ADAM_MATRIX_DECAY=0.3, **extra)
    weights = start_weights()
    grads = some_grads(weights, 12)
    after, _ = run_steps(trainer, o, weights, grads)
    assert_close_weights(after, torch_adamw(weights, grads, 1.3 * 0.003, (0.9, 0.95), 0.3))


FACTS = {  # last words of Adam's parameters -> lr x, decay x, betas
    "resid_lambda ngram_lambda qkv_lambda o_lambda": (5, 0, 0.9, 0.99),
    "smear_lambda skip_lambda backout_lambda": (5, 0, 0.9, 0.99),
    "x0_lambda": (5, 0, 0.65, 0.95),
    "resid_attn_lambda resid_mlp_lambda": (5, 0, 0.9, 0.95),
    "attn_lambda mlp_lambda xsa_alpha": (1, 0, 0.9, 0.95),
    "mudd.hidden mudd.out": (0.25, 1, 0.9, 0.99),
    "mudd.bias": (0.25, 0, 0.9, 0.99),
    "gate_nets.hidden gate_nets.out": (0.1, 1, 0.9, 0.99),
    "gate_nets.bias gate_nets.scale": (0.1, 0, 0.9, 0.99),
    "ngram_table value_embeds": (75, 5, 0.75, 0.95),
    "smear_gate": (0.01, 0, 0.9, 0.99),
    "skip_gate": (0.05, 0, 0.9, 0.99),
    "attn_gate value_gate": (1, 1, 0.9, 0.99),
    "router": (1, 0, 0.9, 0.99),
    "head embed": (1, 150, 0.5, 0.95),
}
BY_KEY = {key: facts for keys, facts in FACTS.items() for key in keys.split()}


def key_of(name):
    """Return a parameter's key in BY_KEY: the last part of its name, with the first for networks."""
    parts = name.split(".")
    if parts[0] in ("mudd", "gate_nets"):
        return f"{parts[0]}.{parts[-1]}"
    return "value_embeds" if parts[0] == "value_embeds" else parts[-1]


def test_every_parameter_of_a_preset_follows_one_rule_of_the_table():
    """Fails if a parameter is updated by no rule or by two, or its rate, decay or betas are wrong. Branch
    factors that no network makes are in no preset."""
    configs = [config for config, _ in train_gpt.PRESETS.values()]
    configs.append(small_config(train_gpt, branch_factors=True, xsa_layers=(1,)))
    seen = set()
    for config in configs:
        with torch.device("meta"):
            model = train_gpt.GPT(config, 50257, "sdpa")
        for name, p in model.named_parameters():
            role = train_gpt.find_role(name)  # asserts that it is one
            assert (role.rule == "matrix") == name.endswith(MATRIX_NAMES), name
            if role.rule == "matrix":
                assert p.ndim >= 2, name
            else:
                assert (role.lr_mul, role.decay_mul, *role.betas) == BY_KEY[key_of(name)], name
                seen.add(key_of(name))
    assert seen == set(BY_KEY)


class RefAdam:
    """Adam for one parameter: bias-corrected, on odd steps, eps before the correction, strictly cautious
    decay lr * lr * 0.005 * wd_mul; 0.5 here, as 0.005 is too small to detect."""

    def __init__(self, name, value):
        (self.lr, self.wd, self.b1, self.b2), self.W = BY_KEY[key_of(name)], value
        self.m = self.v = self.grad = 0.0
        self.n, self.active = 0, name != "embed"

    def step(self, grad, lr_mul, odd, warm=1.0):
        self.grad = self.grad + grad
        if not odd or not self.active:
            return
        g, self.grad, self.n = self.grad, 0.0, self.n + 1
        b1, b2 = warm * self.b1, warm * self.b2
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        U = self.m / (np.sqrt(self.v) + 1e-10) * np.sqrt(1 - b2**self.n) / (1 - b1**self.n)
        lr = 0.008 * self.lr * lr_mul
        self.W = self.W - lr * U - lr * lr * 0.5 * self.wd * self.W * (U * self.W > 0)


def test_every_adam_group_of_the_model_follows_the_table():
    """Fails if a parameter has another group's rate, decay or betas, is updated on even steps, or decays
    without gradient; or if untying does not copy the head's weights and Adam state to the embedding."""
    model = small_model(train_gpt)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        p.data = torch.tensor(rng.normal(0, 2, p.shape), dtype=torch.float32)
    names = [n for n, p in model.named_parameters() if not n.endswith(MATRIX_NAMES)]
    refs = {n: RefAdam(n, dict(model.named_parameters())[n].detach().double().numpy().copy()) for n in names}
    optimizer = make_optimizer(train_gpt, model, optimizer_settings(train_gpt, ADAM_WEIGHT_DECAY=0.5), 99)
    assert len({BY_KEY[key_of(n)] for n in names}) == 7  # the speedrun's groups
    params = dict(model.named_parameters())
    for step, lr_mul in enumerate((1.0, 1.5, 0.5, 1.0, 2.0, 1.0, 0.7, 1.2)):
        if step == 6:
            optimizer.untie()
            for key in ("W", "m", "v", "n"):
                setattr(refs["embed"], key, getattr(refs["head"], key))
            refs["embed"].active = True
        for name, ref in refs.items():
            grad = rng.normal(0, 0.1, ref.W.shape) * (name != "embed" or step >= 6)
            if grad.ndim:
                grad[0] = 0  # a row that is never seen
            params[name].grad += torch.tensor(grad, dtype=torch.float32)
            ref.step(np.float32(grad).astype(float), lr_mul, step % 2 == 1)
        optimizer.step(step, lr_mul, 2048, False, tied=step < 6)
        for name, ref in refs.items():
            if ref.active:
                got = params[name].detach().numpy()
                np.testing.assert_allclose(got, ref.W, rtol=0, atol=2e-5, err_msg=name)


def test_gradient_clipping_holds_the_norm_of_the_mean_loss():
    """Fails if GRAD_CLIP acts on the summed loss, whose gradient grows with the batch, or on each bucket
    alone."""
    weights = start_weights(shapes={"head": (6, 4), "skip_gate": (5,)})
    scale = 0.25 * 2048  # the trained loss is 2/8 of the sum
    grads = {n: np.float32(scale) * g for n, g in some_grads(weights, 1)[0].items()}
    size = math.sqrt(sum((g**2).sum() for g in grads.values())) / scale / 2  # Adam's: half is of another step
    for clip in (0.5 * size, 2 * size):
        o = optimizer_settings(train_gpt, GRAD_CLIP=clip)
        model = Params(weights)
        optimizer = make_optimizer(train_gpt, model, o)
        assert "grad_norm" not in optimizer.log_fields(0, full=True)
        model.add_grads(grads)
        optimizer.step(1, 1.0, 2048, False)
        assert float(optimizer.log_fields(1, full=True)["grad_norm"]) == pytest.approx(size, rel=1e-5)
        beta2 = {"head": 0.95, "skip_gate": 0.99}
        for bucket in optimizer.buckets:  # Adam's v after one step tells the gradient that it was given
            [name] = bucket.params
            seen = np.sqrt(bucket.state["v"].numpy() / (1 - beta2[name])).reshape(grads[name].shape)
            np.testing.assert_allclose(seen, np.abs(grads[name]) * min(1, clip / size), rtol=1e-4)


def test_the_logged_norm_is_that_of_the_mean_loss():
    """Fails if grad_norm depends on the loss's scale or the batch, omits parameters that move, counts those
    that wait, or is not GRAD_CLIP's; or if a step before no validation computes it."""
    weights = start_weights(shapes={"head": (6, 4), "blocks.0.attn.q": (8, 8), "blocks.0.mlp.up": (12, 8)})
    model = Params(weights)
    optimizer = make_optimizer(train_gpt, model, optimizer_settings(train_gpt))
    grads = some_grads(weights, 2)

    def norm(parts) -> float:
        return math.sqrt(sum((np.float64(g) ** 2).sum() for g in parts)) / (0.25 * 4096)

    model.add_grads(grads[0])
    optimizer.step(0, 1.0, 4096, True)  # matrices alone move
    found = float(optimizer.log_fields(0, full=True)["grad_norm"])
    assert found == pytest.approx(norm(g for n, g in grads[0].items() if n != "head"), rel=1e-5)
    model.add_grads(grads[1])
    optimizer.step(1, 1.0, 4096, False)
    assert float(optimizer.log_fields(1, full=True)["grad_norm"]) == found
    assert "grad_norm" not in optimizer.log_fields(1, full=False)
    model.add_grads(grads[1])
    optimizer.step(2, 1.0, 4096, False)
    model.add_grads(grads[0])
    optimizer.step(3, 1.0, 4096, True)
    both = [(g + grads[1][n]) / 2 if n == "head" else g for n, g in grads[0].items()]
    assert float(optimizer.log_fields(3, full=True)["grad_norm"]) == pytest.approx(norm(both), rel=1e-5)


# ------------------------------------------------------------------------------------------- log and runs


@pytest.mark.parametrize("env, measured", [(dict(OPTIMIZER="adamw", ORD_MODE="off"), True), ({}, False)])
def test_statistics_that_the_last_step_did_not_take_are_not_logged(env, measured):
    """Fails if AdamW, or a run resumed at a validation, logs zeros in place of statistics."""
    weights = start_weights(shapes={"blocks.0.attn.q": (8, 8), "blocks.0.mlp.up": (12, 8)})
    model = Params(weights)
    optimizer = make_optimizer(ord_gpt, model, optimizer_settings(ord_gpt, **env))
    model.add_grads(some_grads(weights, 1)[0])
    optimizer.step(0, 1.0, 4096, measured)
    assert set(optimizer.log_fields(0, full=True)) <= {"beta1", "beta2", "muon_momentum", "grad_norm"}


def test_logged_numbers_of_ord_are_those_of_the_step():
    """Fails if the log shows |rho| for rho, mixes layers or kinds, or mislabels a measurement."""
    shapes = {
        f"blocks.{i}.{n}": s
        for i in (0, 1)
        for n, s in (("attn.q", (8, 8)), ("attn.k", (8, 8)), ("mlp.up", (12, 8)))
    }
    o = optimizer_settings(ord_gpt, SPECTRAL_LR_MUL=0.4)
    weights = start_weights(shapes=shapes)
    _, optimizer, _, states = compare_steps(ord_gpt, o, 2, weights=weights)
    _, _, ref, _ = compare_steps(ord_gpt, o, 1, weights=weights)  # the weights before the second step
    fields = optimizer.log_fields(1, full=True)
    size, cos = np.linalg.norm, lambda x, y: (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    expected = {
        "spec": lambda s, W: s["rho"],
        "cos_gw": lambda s, W: cos(s["G"], W),
        "cos_uw": lambda s, W: cos(s["U"], W),
        "w_norm": lambda s, W: size(W),
        "u_over_w": lambda s, W: size(s["U"]) / size(W),
        "radial_over_p": lambda s, W: size(s["radial"]) / size(s["P"]),
    }
    for stat, function in expected.items():
        for kind in ("attn", "mlp"):
            got = [float(x) for x in fields[f"{stat}_{kind}"].strip("[]").split(",")]
            layers = [[n for n in shapes if n.startswith(f"blocks.{i}.{kind}")] for i in (0, 1)]
            want = [np.mean([function(states[n], ref[n]) for n in names]) for names in layers]
            np.testing.assert_allclose(got, want, rtol=2e-3, err_msg=f"{stat}_{kind}")
    rhos = fields["spec_attn"] + fields["spec_mlp"]
    assert "-" in rhos.replace("e-", "")  # signed: with this seed at least one is negative


def test_runs_of_a_thousandfold_loss_agree_in_unit_and_not_in_raw(tmp_path, monkeypatch):
    """Fails if anything in a `unit` run depends on the loss's scale beyond rounding, or nothing in `raw`
    does."""

    def losses(scale):
        run, data = small_trainer(ord_gpt, tmp_path, SPECTRAL_SCALE=scale, SPECTRAL_LR_MUL=0.1)
        return np.array(train_steps(run, data, 0, SMALL_STEPS))

    usual = {scale: losses(scale) for scale in ("unit", "raw")}
    monkeypatch.setattr(ord_gpt, "LOSS_SCALE", 1000 * ord_gpt.LOSS_SCALE)
    scaled = {scale: losses(scale) for scale in ("unit", "raw")}
    assert usual["unit"][-1] < usual["unit"][0] - 0.2  # it learns
    np.testing.assert_allclose(usual["unit"], scaled["unit"], atol=2e-5)  # 2e-6 here
    assert np.abs(usual["raw"] - scaled["raw"]).max() > 3e-4  # 3e-3 here
