"""Mixture of experts: against naive loops, its balance and noise; test_faults has whole runs."""

import shutil

import numpy as np
import pytest
import torch
from helpers import (
    TRAINERS,
    base_env,
    lone_ranks,
    make_optimizer,
    read,
    small_config,
    train_steps,
    trainer_on,
)
from reference import WINDOWS, make_batch

import train_gpt
from kernels import experts
from kernels.attention import Documents
from kernels.experts import MixtureOfExperts, Routing
from runtime import flops
from runtime.compiling import graphs_compiled, torch_compile

EXPERTS = dict(num_experts=5, moe_top_k=2, expert_hidden=24)
PATHS = pytest.mark.parametrize("grouped", [False, True], ids=["sorted", "grouped"])


def take_path(grouped, monkeypatch):
    """Use one product per expert, or torch's grouped products as on CUDA, which a CPU computes in fp32."""
    monkeypatch.setattr(experts, "is_grouped", lambda x: grouped)
    return torch.float32 if grouped else torch.float64


def close(got, wanted, dtype):
    size = wanted.abs().max().item() + 1e-30
    torch.testing.assert_close(got, wanted, rtol=0, atol=size * (1e-12 if dtype == torch.float64 else 1e-5))


# ------------------------------------------------------------------------------------------------ one layer


def naive_mixture(n_BTC, router, up, down, top_k, noise_BTE=None):
    """Compute (output, balance summed over slices) token by token and expert by expert, for autograd."""
    rows, balance = [], 0.0
    for b, slice_TC in enumerate(n_BTC):
        probabilities, sent = [], torch.zeros(len(router), dtype=n_BTC.dtype)
        for t, n in enumerate(slice_TC):
            logits = router @ n if noise_BTE is None else router @ n + noise_BTE[b, t]
            best = sorted(range(len(router)), key=lambda e: -logits[e].item())[:top_k]
            gates = torch.softmax(logits[best], 0)
            rows.append(sum(g * (down[e].T @ (up[e] @ n).relu() ** 2) for g, e in zip(gates, best)))
            probabilities.append(logits.softmax(0))
            sent[best] += 1
        f = sent / (len(slice_TC) * top_k)
        balance = balance + len(router) * (f * torch.stack(probabilities).mean(0)).sum()
    return torch.stack(rows).view_as(n_BTC), balance


def layer(dtype, seed=0, B=2, T=13, **changes):
    """Make a MixtureOfExperts with random weights, its input, and noise."""
    c, rng = small_config(train_gpt, **{**EXPERTS, **changes}), np.random.default_rng(seed)
    draw = lambda *shape: torch.tensor(rng.normal(size=shape), dtype=dtype)
    moe = MixtureOfExperts(c.width, c.num_experts, c.expert_hidden, c.moe_top_k).to(dtype)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(0.3 * draw(*p.shape))
    return moe, draw(B, T, c.width).requires_grad_(), draw(1, B, T, c.num_experts)


@PATHS
@pytest.mark.parametrize("num_experts, top_k", [(5, 2), (8, 2), (4, 3), (3, 3), (40, 2)])
def test_output_and_gradients_equal_a_naive_loop(num_experts, top_k, grouped, monkeypatch):
    """Fails if a token reaches the wrong expert, a gate or gradient is wrong, or an expert without tokens
    (most of 40) gets a gradient. The balance loss is differentiated, too."""
    dtype = take_path(grouped, monkeypatch)
    moe, n, noise = layer(dtype, num_experts=num_experts, moe_top_k=top_k)
    routing = Routing(noise)
    out = moe(n, 0.7, routing)
    wanted, balance = naive_mixture(n, moe.router, moe.up, 0.7 * moe.down, top_k, noise[0])
    close(out, wanted, dtype)
    close(routing.balance[0], balance, dtype)
    direction, inputs = torch.randn_like(out), (n, *moe.parameters())
    got = torch.autograd.grad((out * direction).sum() + 3 * routing.balance[0], inputs)
    wanted = torch.autograd.grad((wanted * direction).sum() + 3 * balance, inputs)
    for g, w in zip(got, wanted):
        assert w.abs().max() > 0
        close(g, w, dtype)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductors_gradients_are_the_eager_ones():
    """Fails if COMPILE=1 changes training: torch 2.13's inductor lost the gates' gradient when they were
    topk's own values."""
    moe, n, noise = layer(torch.float32)
    direction, inputs = torch.randn_like(n), (n, *moe.parameters())

    def loss(n):
        routing = Routing(noise)
        return (moe(n, 1.0, routing) * direction).sum() + 3 * routing.balance[0]

    wanted = torch.autograd.grad(loss(n), inputs)
    for g, w in zip(torch.autograd.grad(torch_compile(loss)(n), inputs), wanted):
        close(g, w, torch.float32)


@PATHS
def test_all_tokens_to_the_same_experts(grouped, monkeypatch):
    """Fails if the worst imbalance, two experts for all tokens, drops a token or moves the other experts."""
    dtype = take_path(grouped, monkeypatch)
    moe, n, _ = layer(dtype)
    noise = torch.zeros(1, 2, 13, 5, dtype=dtype)
    noise[..., 1], noise[..., 3] = 90, 80
    routing = Routing(noise)
    out = moe(n, 1.0, routing)
    close(out, naive_mixture(n, moe.router, moe.up, moe.down, 2, noise[0])[0], dtype)
    assert routing.loads_E[0].tolist() == [0, 26, 0, 26, 0]
    out.square().sum().backward()
    for p in (moe.up, moe.down):
        assert p.grad[[1, 3]].flatten(1).any(1).all() and not p.grad[[0, 2, 4]].any()


def test_rows_are_sorted_by_expert_in_groups_for_cuda():
    """Fails if two pairs share a row, a group has another expert's token, or a padded group is not a multiple
    of 8, which CUDA's kernel requires."""
    chosen = torch.tensor(np.random.default_rng(0).integers(0, 6, (50, 2)))
    counts = torch.bincount(chosen.flatten(), minlength=7)
    token_P, row_Mk, ends = experts.sort_by_expert(chosen, counts, 8)
    assert len(row_Mk.unique()) == 100 and (token_P < 50).sum() == 100
    assert torch.equal(token_P[row_Mk], torch.arange(50)[:, None].expand(50, 2))
    starts = torch.cat((torch.zeros(1), ends[:-1]))
    assert (row_Mk >= starts[chosen]).all() and (row_Mk < ends[chosen]).all()
    sizes = torch.diff(ends, prepend=torch.zeros(1)).int()
    assert ends.dtype == torch.int32
    assert (sizes % 8 == 0).all() and sizes.min() == 8 and ends[-1] < len(token_P)


# ------------------------------------------------------------------------------------------------ the model


def moe_model(balance_weight=0.5, **changes):
    """Make a GPT of small_config with experts whose second matrices are not zero."""
    config = small_config(train_gpt, **{**EXPERTS, **changes})
    model = train_gpt.GPT(config, 100, "sdpa")
    model.balance_weight = balance_weight
    model.init_weights(torch.Generator().manual_seed(0))
    model.rotary.make_tables(512)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("down"):
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    return model


def test_balance_is_trained_but_not_reported():
    """Training loss is cross-entropy + weight x tokens per slice x balance; the reported cross-entropy and
    validation exclude the balance."""
    batch, ones = make_batch(train_gpt), torch.ones(1)
    with torch.no_grad():
        plain, ce = moe_model(0.0).train_loss(batch, WINDOWS, True, ones)
        model = moe_model(0.5)
        loss, same_ce = model.train_loss(batch, WINDOWS, True, ones)
        routing = Routing()
        model.trunk(batch.inputs_BT, Documents(batch, "sdpa"), WINDOWS, True, routing)
        validation, _ = model.val_loss(batch, WINDOWS, True)
    assert plain.item() == ce.item() == same_ce.item()
    assert validation.item() == pytest.approx(ce.item(), rel=1e-6)
    assert loss.item() == pytest.approx(ce.item() + 0.5 * 32 * sum(routing.balance).item(), rel=1e-6)
    assert sum(routing.balance).item() > 4 * 2 * 0.9  # 4 layers, 2 slices; 1 each if even


def test_no_token_is_dropped_and_validation_alone_is_counted():
    """Fails if a layer's load is not k experts per token, or training passes count."""
    model, batch = moe_model(), make_batch(train_gpt)
    with torch.no_grad():
        model.train_loss(batch, WINDOWS, True, torch.ones(1))
        assert not model.expert_load_LE.any()
        for _ in range(3):
            model.val_loss(batch, WINDOWS, True)
    load = model.expert_load_LE
    assert load.sum(1).tolist() == [2 * 3 * batch.inputs_BT.numel()] * 4 and load.shape == (4, 5)


def tiny_trainer(shards, ranks=None, **env):
    """Make a Trainer of moe-tiny and its data, 2,048 tokens a step."""
    own = dict(MODEL="moe-tiny", BATCH_SIZES="2048,2048,2048,2048", NUM_SCHEDULED_ITERATIONS=12)
    return trainer_on(train_gpt, ranks=ranks, **base_env(shards, **own, **env))


def noise_of_step(run, step, batches) -> list:
    """Return the noise of each pass of a training step, without learning."""
    seen, loss = [], torch.zeros((), requires_grad=True)

    def train_loss(batch, windows, tied, weights, noise, *more):
        seen.append(noise)
        return loss, loss.detach()

    run.train_loss = train_loss
    run.step(step, batches)
    return seen


def test_noise_is_a_function_of_seed_step_and_slice(shards):
    """Fails if a slice's noise depends on the number of ranks, two steps, seeds, slices or layers share
    theirs, or ROUTER_NOISE is not its standard deviation."""
    run, data = tiny_trainer(shards)
    (batch,) = data.next((2048, 0))
    (whole,) = noise_of_step(run, 4, [batch])
    assert whole.shape == (4, 8, 256, 8) and whole.std().item() == pytest.approx(0.1, rel=0.02)
    second, _ = tiny_trainer(shards, ranks=lone_ranks(1, 2))
    parts = [batch._replace(inputs_BT=batch.inputs_BT[i : i + 2]) for i in (4, 6)]
    assert torch.equal(torch.cat(noise_of_step(second, 4, parts), 1), whole[:, 4:])
    other_seed, off = (tiny_trainer(shards, **x)[0] for x in ({"SEED": 1}, {"ROUTER_NOISE": 0}))
    others = [noise_of_step(r, step, [batch])[0][0, 0] for r, step in ((run, 5), (other_seed, 4))]
    flat = torch.stack([x.flatten() for x in (*whole[:, 0], *whole[:, 1], *others)])
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.12
    assert noise_of_step(off, 4, [batch]) == [None]


def test_noise_and_load_of_training_and_validation(shards, monkeypatch):
    """Fails if a training pass gets no noise, a validation pass gets some, or a validation's load carries
    over to the next one."""
    run, data = tiny_trainer(shards)
    noisy, forward = [], MixtureOfExperts.forward

    def spy(self, n_BTC, out_scale, routing):
        noisy.append(routing.noise_LBTE is not None)
        return forward(self, n_BTC, out_scale, routing)

    monkeypatch.setattr(MixtureOfExperts, "forward", spy)
    train_steps(run, data, 0, 1)
    assert set(noisy) == {True}
    noisy.clear()
    batches = train_gpt.val_batches(train_gpt.open_data(run.s, 1)[1], run.s, run.ranks)
    train_gpt.evaluate(run.val_loss, batches, (64, 256), True, run.ranks)
    assert set(noisy) == {False}
    assert run.model.expert_load_LE.any() and set(run.validation_fields()) == {"moe_load_max", "moe_load_min"}
    assert not run.model.expert_load_LE.any()


def test_zero_initialised_experts_train(shards):
    """Fails if an expert or router does not move. down starts at zero, so only down can move at first; after
    a few steps all have moved, and the loss falls."""
    run, data = tiny_trainer(shards)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if ".mlp." in n}
    assert all(not p.any() for n, p in before.items() if n.endswith("down"))
    losses = train_steps(run, data, 0, 6)
    for name, p in run.model.named_parameters():
        if ".mlp." in name:
            assert (p != before[name]).flatten(1).any(1).all(), name
    assert losses[-1] < losses[0] * 0.95


def test_the_model_compiles_to_one_graph():
    """Fails if COMPILE=1 would meet a graph break, forward or backward, or a shape that depends on the
    routing. AOTAutograd alone, because inductor takes a minute; test_fullgraph.py traces what a GPU compiles.
    """
    plain = dict(paired_layers=(), value_embed_layers=(), no_attention=(), skip=None, backout=None)
    model, one = moe_model(num_layers=2, **plain), torch.ones(1)
    parameters = list(model.parameters())
    graphs = graphs_compiled() + 1
    compiled = torch.compile(model.train_loss, dynamic=False, fullgraph=True, backend="aot_eager")
    for seed in range(3):  # other tokens, another routing, the same code
        batch = make_batch(train_gpt, seed=seed)
        noise = torch.randn(2, 2, 32, 5)
        grads = [
            torch.autograd.grad(f(batch, WINDOWS, True, one, noise)[0], parameters, allow_unused=True)
            for f in (model.train_loss, compiled)
        ]
        for name, eager, other in zip(dict(model.named_parameters()), *grads):
            assert (eager is None) == (other is None) == (name == "embed"), name
            if eager is not None:
                torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4)
    assert graphs_compiled() == graphs
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ optimizer


@pytest.mark.parametrize("trainer", TRAINERS)
def test_experts_are_matrices_of_their_own_and_routers_adams(trainer):
    """Fails if one bucket does not hold every expert's matrix, or ROUTER_LR moves more than the routers."""
    config = small_config(trainer, **EXPERTS)
    model = trainer.GPT(config, 100, "sdpa")
    o = read(trainer, MODEL="moe-79m", ROUTER_LR=0.003, ADAM_LR=0.01)[1]
    optimizer = make_optimizer(trainer, model, o)
    bank = optimizer.by_name["blocks.0.mlp.up"]
    assert bank is optimizer.by_name["blocks.3.mlp.down"] and isinstance(bank, trainer.MatrixBucket)
    assert bank.mine.shape == (2 * 4 * 5, 24, 16) and len(set(bank.names)) == len(bank.names) == 40
    down = [".down." in name for name in bank.names]
    assert bank.shape_lr_N11.flatten().tolist() == pytest.approx([1.5**0.5 * (2 if d else 1) for d in down])
    small = optimizer.by_name["blocks.0.mlp.router"]
    sizes = [p.numel() for p in small.params.values()]
    lr = dict(zip(small.params, (small.base_lr * small.role_lr_mul).split(sizes)))
    assert lr["blocks.0.mlp.router"].unique().tolist() == pytest.approx([0.003])
    assert lr["blocks.0.resid_lambda"].unique().tolist() == pytest.approx([0.05])
    assert trainer.find_role("blocks.11.mlp.router").rule == "adam"


# ------------------------------------------------------------------------------------------------ settings


def test_moe_79m_is_the_experiments():
    """Fails if the preset's sizes differ from the experiment that it is named after, or a preset's default of
    NUM_EXPERTS from its model."""
    for name, (c, defaults) in train_gpt.PRESETS.items():
        assert c.num_experts == defaults.get("num_experts", 0), name
    c = train_gpt.PRESETS["moe-79m"][0]
    with torch.device("meta"):
        model = train_gpt.GPT(c, 50257, "sdpa")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes["blocks.5.mlp.up"] == shapes["blocks.0.mlp.down"] == (8, 1536, 384)
    assert shapes["blocks.0.mlp.router"] == (8, 384) and shapes["blocks.0.attn.q"] == (384, 384)
    assert 79e6 < sum(p.numel() for p in model.parameters()) < 80e6
    forward = flops.forward_flop(c, [512], 50257)  # a quarter of the experts' products
    assert forward.matrices == 2 * 6 * (4 * 384**2 + 2 * 2 * 384 * 1536 + 8 * 384)
