"""Model against a slow float64 reference (reference.py), its values and its gradients.

The plain model and the one with a CPU's fast forms take the same tests.
"""

import functools
import math
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import FORMS, ROOT, lone_ranks, read, small_config, small_model
from reference import (
    DOCUMENTS,
    WEIGHTS,
    WINDOWS,
    Reference,
    assert_gradients_equal,
    make_batch,
    ref_all_logits,
    ref_attention,
    ref_doc_ids,
    ref_freqs,
    ref_multi_token_loss,
    shake,
)

import train_gpt
from kernels.attention import Documents
from kernels.float8 import Float8Linear
from kernels.ngrams import hash_ngrams

ALL = {}
PLAIN = dict(paired_layers=(), value_embed_layers=(), no_attention=(), skip=None, backout=None)
VARIANTS = {
    "all": (ALL, True, 1.0),
    "untied": (ALL, False, 1.0),
    "scaled": (ALL, False, 0.7),
    "gqa": (dict(num_kv_heads=2), True, 1.0),
    "n-grams": (dict(ngrams=(2, 4, 3)), True, 1.0),
    "gqa unpaired": (dict(num_kv_heads=1, paired_layers=()), True, 1.0),
    "plain": (dict(PLAIN, ngram_rows=0, smear=False, attn_gate=False, untie_frac=1.0), True, 1.3),
}


@pytest.fixture
def forms(request):
    """Run a test under one of FORMS."""
    with FORMS[request.param](train_gpt):
        yield request.param


@functools.cache
def expected(variant, windows):
    """The slow model's (logits, loss of the next token, training loss)."""
    changes, tied, residual_scale = VARIANTS[variant]
    batch = make_batch(train_gpt)
    reference = Reference(shake(small_model(train_gpt, **changes)), residual_scale)
    with torch.no_grad():
        logits = ref_all_logits(reference, batch, windows, tied)
        both = list(zip(logits, batch.targets_BT))
        loss, trained = (sum(ref_multi_token_loss(*x, w) for x in both) for w in ([1.0], WEIGHTS))
    return torch.stack(logits), loss.item(), trained.item()


@pytest.mark.parametrize("forms", FORMS, indirect=True)
@pytest.mark.parametrize("windows", [WINDOWS, (5, 40)], ids=["banded", "whole"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_the_slow_model(variant, windows, forms):
    """Fails if any part of the forward pass differs from the table, alone or with all the others."""
    changes, tied, residual_scale = VARIANTS[variant]
    batch, (logits, wanted, wanted_trained) = make_batch(train_gpt), expected(variant, windows)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        model = shake(small_model(train_gpt, residual_scale=residual_scale, **changes)).to(dtype)
        with torch.no_grad():
            loss, hits = model.val_loss(batch, windows, tied)
            docs = Documents(batch, "sdpa")
            x = model.trunk(batch.inputs_BT, docs, windows, tied).double() @ model.head.double().T
            trained, cross_entropy = model.train_loss(batch, windows, tied, torch.tensor(WEIGHTS))
        got = 23 * torch.sigmoid((x + 5) / 7.5)
        torch.testing.assert_close(got, logits, rtol=0, atol=23 * tolerance)
        assert hits == (logits.argmax(-1) == batch.targets_BT).sum()
        assert loss.item() == pytest.approx(wanted, rel=tolerance)
        assert cross_entropy.item() == pytest.approx(loss.item(), rel=1e-6)
        assert trained.item() == pytest.approx(wanted_trained, rel=tolerance)


WITH_GRADIENTS = [
    ("scaled", "plain"),
    *((v, "fast") for v in ("all", "scaled", "gqa", "gqa unpaired", "plain")),
]


@pytest.mark.parametrize("variant, forms", WITH_GRADIENTS, indirect=["forms"])
def test_gradients_equal_the_slow_models(variant, forms):
    """Fails if the gradient of a hand-written backward pass, the multi-token loss, tied or untied tables or
    any gate is not that of the forward pass."""
    changes, tied, residual_scale = VARIANTS[variant]
    batch = make_batch(train_gpt)
    model = shake(small_model(train_gpt, residual_scale=residual_scale, **changes)).double()
    for p in model.parameters():  # as the optimizer's buckets do; a table's rows are then added in place
        p.grad = torch.zeros_like(p)
    loss, _ = model.train_loss(batch, WINDOWS, tied, torch.tensor(WEIGHTS))
    loss.backward()
    reference = Reference(model, residual_scale)
    logits = ref_all_logits(reference, batch, WINDOWS, tied)
    wanted = sum(ref_multi_token_loss(*both, WEIGHTS) for both in zip(logits, batch.targets_BT))
    unused = {"embed"} & reference.p.keys() if tied else ()
    assert_gradients_equal(model, reference, wanted, unused)


def operations(*outputs) -> set[str]:
    """Names of the operations that a backward pass of these tensors takes."""
    found, left = set(), [y.grad_fn for y in outputs]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [next_node for next_node, _ in node.next_functions if next_node]
    return {node.name() for node in found}


def test_only_paired_layers_part_their_matrices():
    """Fails if the backward pass of a layer that does not pair heads copies the gradients of q and k."""
    model = small_model(train_gpt)
    for attn in (model.blocks[0].attn, model.blocks[1].attn):
        q, k = attn.queries_and_keys(torch.ones(1, 16, 16), model.rotary)
        assert ("SplitBackward0" in operations(q, k)) == attn.plan.paired


# ------------------------------------------------------------------------------------------------ attention


def naive_attention(q, k, v, doc, window, scale):
    """Attention of (B, T, H, D), by ref_attention of each head; autograd gives its gradients."""
    B, H, shared = len(q), q.shape[2], q.shape[2] // k.shape[2]
    of_head = lambda b, h: (q[b, :, h], k[b, :, h // shared], v[b, :, h // shared], doc[b], window, scale)
    heads = [torch.stack([ref_attention(*of_head(b, h)) for h in range(H)], 1) for b in range(B)]
    return torch.stack(heads)


def attention_case(paired, num_kv_heads, T=32, seed=0):
    """Make q, k, v for attend() (twice as long if paired), the batch, and each position's document."""
    rng = np.random.default_rng(seed)
    length = 2 * T if paired else T
    q, k, v = (torch.tensor(rng.normal(0, 1.5, (2, length, h, 6))) for h in (4, num_kv_heads, num_kv_heads))
    doc = [np.repeat(ref_doc_ids(s, T), 2 if paired else 1) for s in DOCUMENTS]
    return q, k, v, make_batch(train_gpt, T=T), doc


@pytest.mark.parametrize("window", [1, 4, 8, 16, 7, 100])
@pytest.mark.parametrize("paired, num_kv_heads", [(False, 4), (True, 4), (False, 2), (True, 1)])
def test_attention_on_a_cpu_equals_a_loop(paired, num_kv_heads, window):
    """Fails if a query sees another document, the future, or beyond its window, in blocks or whole, or if
    gradients are wrong."""
    q, k, v, batch, doc = attention_case(paired, num_kv_heads)
    docs = Documents(batch, "sdpa")
    results = []
    for function in (
        lambda *x: docs.attend(*x, window, paired, 0.37),
        lambda *x: naive_attention(*x, doc, window, 0.37),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = function(*leaves)
        y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
        results.append([y.detach(), *(x.grad for x in leaves)])
    for ours, naive in zip(*results):
        torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    assert docs.band(window, paired) is docs.band(window, paired), "every layer makes the mask anew"


@pytest.mark.filterwarnings("ignore")  # flex warns that it runs uncompiled, which is what a test wants
@pytest.mark.parametrize("paired, num_kv_heads", [(False, 4), (True, 2)])
def test_flex_attention_equals_a_loop(paired, num_kv_heads):
    """Fails if the second CUDA backend's masks differ from the first's. A CPU has no backward for it."""
    q, k, v, batch, doc = attention_case(paired, num_kv_heads)
    docs = Documents(batch, "flex")
    y = docs.attend(q.float(), k.float(), v.float(), 8, paired, 0.37)
    torch.testing.assert_close(y.double(), naive_attention(q, k, v, doc, 8, 0.37), rtol=1e-5, atol=1e-5)


def test_many_short_documents_fit():
    """Fails if a slice with more documents than the padded number of boundaries loses some."""
    starts = [list(range(0, 64, 2)), [0]]  # 32 documents of two tokens
    q, k, v, _, _ = attention_case(False, 4, T=64)
    docs = Documents(make_batch(train_gpt, starts, 64), "sdpa")
    expected = naive_attention(q, k, v, [ref_doc_ids(s, 64) for s in starts], 8, 0.1)
    torch.testing.assert_close(docs.attend(q, k, v, 8, False, 0.1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("forms", FORMS, indirect=True)
def test_passes_add_up_in_the_optimizers_buffer(forms):
    """Fails if backward replaces a bucket's view by another tensor, sparse or dense, so that the optimizer
    reads zeros; or if a step's second pass overwrites the first."""
    model = shake(small_model(train_gpt))
    buffers = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    sums = []
    for _ in range(2):
        for name, p in model.named_parameters():
            p.grad = buffers[name]
        model.train_loss(make_batch(train_gpt), WINDOWS, False, torch.tensor(WEIGHTS))[0].backward()
        assert all(p.grad is buffers[name] for name, p in model.named_parameters())
        sums.append({name: g.clone() for name, g in buffers.items()})
    for name, once in sums[0].items():
        assert once.any(), name
        torch.testing.assert_close(sums[1][name], 2 * once)


# ------------------------------------------------------------------------------------------------ rotary


def test_yarn_at_each_change_of_the_long_window():
    """Fails if frequencies or softmax scale do not follow YaRN's formula, once or over the whole schedule."""
    rotary = train_gpt.Rotary(128)
    rotary.make_tables(100)
    freqs, scale = ref_freqs(128), 0.1
    for old, new in ((384, 896), (896, 1408), (1408, 1664)):
        rotary.extend(old, new)
        turns = old * freqs / (2 * math.pi)
        freqs = freqs * (old / new + np.clip((turns - 1) / 31, 0, 1) * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    x = torch.zeros(1, 100, 1, 128)
    x[..., 0:64:2] = 1  # turned, its pairs show cos and sin of every angle
    got = rotary(x)[0, :, 0]
    angles = np.outer(np.arange(100), freqs)
    np.testing.assert_allclose(got[:, 0:64:2].numpy(), np.cos(angles), atol=5e-5)
    np.testing.assert_allclose(got[:, 1:64:2].numpy(), np.sin(angles), atol=5e-5)
    assert rotary.scale == pytest.approx(scale)
    assert freqs[0] == 1 and freqs[-1] < 0.24 / 1024  # fast ones kept, slow ones by the ratio 384/1664


def test_the_run_changes_windows_and_ties_at_their_steps():
    """Fails if YaRN is applied twice, late or where the long window stays, embedding and head are untied
    before or long after the update of their last common step, or a resumed run's state differs. Thirds of
    four steps, then two of extension; the last tied step is round(2/3 * 12) | 1 = 9."""
    windows = ((1, 2), (1, 2), (2, 4), (2, 8))
    steps = dict(NUM_SCHEDULED_ITERATIONS=12, NUM_EXTENSION_ITERATIONS=2)
    s, o, _ = read(train_gpt, BATCH_SIZES="128,128,128,128", **steps)

    def new():
        return train_gpt.Trainer(s, o, small_config(train_gpt, windows=windows), 100, lone_ranks())

    run, batch = new(), make_batch(train_gpt)
    for step in range(15):  # the last for the last validation
        resumed = new()
        resumed.go_to(step)
        for trained in (run, resumed):
            trained.enter(step)
            doublings = (step >= 8) + (step >= 12)
            assert trained.model.rotary.scale == pytest.approx(0.1 * (1 + 0.2 * math.log(2)) ** doublings)
            wanted = tuple(8 * w for w in windows[min(step, 13) // 4])
            assert trained.schedule.windows(trained.stage) == wanted
            tied, optimizer = trained.schedule.tied(step), trained.optimizer
            assert tied == (step <= 9)
            assert (optimizer.by_name["embed"] in optimizer.due(1, tied)) == (step > 9)
        if step < 14:
            before = run.model.embed.detach().clone()
            run.step(step, [batch])
            head, embed = (run.optimizer.by_name[name] for name in ("head", "embed"))
            pairs = zip((head.mine, *head.state.values()), (embed.mine, *embed.state.values()))
            copied = all(torch.equal(a, b) for a, b in pairs)  # until the next update; also before the first
            assert copied == (step in (0, 9, 10))
            assert torch.equal(before, run.model.embed) == (step not in (9, 11, 13))


@pytest.mark.parametrize(
    "parts", [dict(predict=(((1, 1), (0.5, 0.5)),) * 4), dict(prefix_weights=((0.5, 0.5),) * 4)], ids=str
)
def test_the_reported_training_loss_is_the_next_tokens_alone(parts):
    """Fails if the log's train_loss counts the tokens after the next, or prefixes, so that stages and models
    could not be compared. Before its update the model validates to the same."""
    one_token = dict(predict=(((1, 1),),) * 4)
    s, o, _ = read(train_gpt, BATCH_SIZES="128,128,128,128")
    config = small_config(train_gpt, **{**one_token, **parts})
    run, batch = train_gpt.Trainer(s, o, config, 256, lone_ranks()), make_batch(train_gpt)
    if config.predicts_prefixes:
        run.model.prefixes_V.fill_(3)  # bytes have none
    wanted, _ = run.model.val_loss(batch, run.schedule.windows(0), True)
    assert run.step(0, [batch]).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_validations_head_runs_in_pieces_of_a_pass_of_training():
    """Fails if PASS_TOKENS=1, one slice per pass, cuts validation's logits into pieces of one token."""
    s, o, _ = read(train_gpt, BATCH_SIZES="128,128,256,256", PASS_TOKENS=1)
    run = train_gpt.Trainer(s, o, small_config(train_gpt), 100, lone_ranks())
    assert run.model.head_tokens == 256 // 8


# ------------------------------------------------------------------------------------------- tables, head


@pytest.mark.parametrize("rows, vocab_size", [(61, 100), (5 * 50304, 50257), (4096, 65536)])
@pytest.mark.parametrize("num_tokens", [1, 3, 500])
def test_ngram_rows(rows, vocab_size, num_tokens):
    """Fails if a hash is outside its table, uses other tokens than the last ones, or depends on the integers'
    width, which is int32 in the records."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (2, num_tokens)).astype(np.int32)
    tokens[0, :4] = [vocab_size - 1, 0, vocab_size - 1, vocab_size - 1][:num_tokens]
    multipliers = np.array([36313, 27191, 40693, 32467, 24281], dtype=np.int32)
    for length, got in zip((2, 5, 3), hash_ngrams(torch.tensor(tokens), (2, 5, 3), rows)):
        got = got.numpy()
        assert got.shape == tokens.shape and (got[:, : length - 1] == rows - 1).all()
        assert (got >= 0).all() and (got < rows).all()
        for end in range(length - 1, num_tokens):
            with np.errstate(over="ignore"):
                last = tokens[:, end - length + 1 : end + 1][:, ::-1] * multipliers[:length]
            assert (got[:, end] == np.bitwise_xor.reduce(last, axis=1) % np.int32(rows - 1)).all()


def float8_product(x, w, grad):
    """Compute (output, gradient of x, gradient of w) of the head's product in float8."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = Float8Linear.apply(x, w, train_gpt.HEAD_SCALES)
    y.backward(grad)
    return y.detach(), x.grad, w.grad


def test_float8_head_is_within_float8s_error():
    """Fails if a scale is applied twice, not at all or to the wrong factor, forward or backward. e4m3 has 3
    bits of mantissa, e5m2 two: a relative error of at most 1/16 and 1/8 in each factor, 0.026 and 0.053 on
    average."""
    rng = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(s, generator=rng) for s in ((32, 64), (48, 64), (32, 48)))
    x, w, grad = x.bfloat16(), (0.1 * w).bfloat16(), (0.05 * grad).bfloat16()
    got = float8_product(x, w, grad)
    x, w, grad = x.double(), w.double(), grad.double()
    for ours, exact, error in zip(got, (x @ w.T, grad @ w, grad.T @ x), (0.05, 0.08, 0.08)):
        assert (ours.double() - exact).norm() / exact.norm() < error


def test_float8_head_reaches_as_far_as_its_scales():
    """Fails if activations up to 100 or weights up to 1.6, the scales' range, are clamped."""
    x, w = torch.full((16, 32), 99.0).bfloat16(), torch.full((16, 32), -1.59).bfloat16()
    y, _, _ = float8_product(x, w, torch.zeros(16, 16).bfloat16())
    assert y.float().mean().item() == pytest.approx(-99 * 1.59 * 32, rel=0.02)


def test_float8_head_does_not_overflow():
    """Fails if a large activation, weight or gradient becomes inf or NaN instead of the largest float8."""
    big = torch.full((16, 32), 3e4).bfloat16()
    y, x_grad, w_grad = float8_product(big, -big, torch.full((16, 16), 1e6).bfloat16())
    assert all(torch.isfinite(t).all() for t in (y, x_grad, w_grad))
    assert (y < 0).all() and (x_grad < 0).all() and (w_grad > 0).all()


def test_float8_head_is_used_in_training_only():
    """Fails if validation runs in float8, or training silently does not."""
    model, exact = shake(small_model(train_gpt, float8_head=True)), small_model(train_gpt)
    model.head.data *= 0.5
    exact.load_state_dict(model.state_dict())
    batch = make_batch(train_gpt)
    with torch.no_grad():
        assert model.val_loss(batch, WINDOWS, True)[0] == exact.val_loss(batch, WINDOWS, True)[0]
        ours, plain = (m.train_loss(batch, WINDOWS, True, torch.ones(1))[0].item() for m in (model, exact))
    assert ours != plain and ours == pytest.approx(plain, rel=0.02)


# ------------------------------------------------------------------------------------------------ start


def test_initial_values_are_the_tables():
    """Fails if a parameter's initial values are not the table's, or depend on more than the seed."""
    model, again, other = (small_model(train_gpt, seed=s, width=64, vocab_size=2000) for s in (1, 1, 2))
    scalars = dict(resid_lambda=1.1, x0_lambda=0.0, ngram_lambda=0.1, qkv_lambda=0.5, o_lambda=1.0)
    scalars |= dict(smear_lambda=0.0, skip_lambda=-1.5, backout_lambda=0.5)
    others = dict(other.named_parameters())
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        p = p.detach()
        assert torch.equal(p, q)
        last = name.split(".")[-1]
        if last in scalars:
            assert p.item() == pytest.approx(scalars[last])
        elif last in "qkvo" or last == "up":
            bound = math.sqrt(3) * 0.5 * 64**-0.5
            assert 0.95 * bound < p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert not torch.equal(p, others[name])
        elif last in ("head", "embed"):
            assert p.std().item() == pytest.approx(0.005, rel=0.02) and not torch.equal(p, others[name])
            assert torch.equal(p, model.head)
        else:
            assert not p.any(), name


def test_different_matrices_start_differently():
    """Fails if a random stream is used twice, so that q equals k or two layers are the same."""
    model = small_model(train_gpt)
    drawn = [p for n, p in model.named_parameters() if n.endswith((".q", ".k", ".v"))]
    assert len({p.flatten()[:5].detach().numpy().tobytes() for p in drawn}) == len(drawn)


def test_gpt2_small_is_the_speedruns():
    """Fails if the default model's sizes differ from the table of facts."""
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.PRESETS["gpt2-small"][0], 50257, "sdpa")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sum(s == (768, 768) for s in shapes.values()) == 40
    assert sum(s == (3072, 768) for s in shapes.values()) == 22
    assert sorted(n for n in shapes if n.startswith("value_embeds")) == sorted(
        f"value_embeds.{i}" for i in (0, 1, 8, 9, 10)
    )
    assert not any(n.startswith("blocks.6.attn") for n in shapes) and "blocks.10.mlp.up" in shapes
    assert shapes["head"] == shapes["embed"] == shapes["value_embeds.0"] == (50304, 768)
    assert shapes["ngram_table"] == (5 * 50304, 768)
    c = model.config
    assert (c.num_heads, c.head_dim, c.window_block, c.long_layers) == (6, 128, 128, (3, 10))
    assert (c.paired_layers, c.skip, c.backout) == ((0, 2, 5, 9), (3, 6), 7)
    assert (c.windows, c.final_windows[1]) == (((1, 3), (3, 7), (5, 11), (6, 13)), 20)


@pytest.mark.parametrize("vocab_size, padded", [(50257, 50304), (256, 256), (100, 128)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    """Fails if the head's product gets a shape that is slow on tensor cores, or loses tokens."""
    assert small_model(train_gpt, vocab_size=vocab_size).head.shape[0] == padded


FAULTS = """
import resource, torch
from runtime.compiling import keep_freed_memory
for i in range(20):
    if i == 5:
        keep_freed_memory()
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.empty(1 << 23).fill_(1)
    y = x + 1
    del x, y
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    """Fails if large tensors still come page by page from the kernel: 64 MiB are 16,384 faults a round. The
    heap grows in up to six of the first rounds, because of small things that come to lie between tensors."""
    command = [sys.executable, "-c", FAULTS]
    faults = [int(line) for line in subprocess.check_output(command, cwd=ROOT, text=True).splitlines()]
    assert sum(faults[-5:]) < sum(faults[:5]) / 3, faults
