"""Parts of the later speedrun records, each alone and all together, against a slow float64 reference.

The reference extends that of reference.py, written from the table of facts, not from the code. It lists by
hand what each small network produces. Then: initial values, learning, roles and rates, the schedule, data by
stage, prefixes of tokens, the fast forms and ranks.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import (
    FACTORS,
    GATES,
    LATER,
    LATER_HEADS,
    later_config,
    later_trainer,
    lone_ranks,
    make_text,
    read,
    save_model,
    train,
    train_steps,
    write_shard,
)
from reference import (
    WEIGHTS,
    WINDOWS,
    Reference,
    assert_gradients_equal,
    make_batch,
    ref_all_logits,
    ref_cross_entropy,
    ref_multi_token_loss,
    ref_norm,
    shake,
    sigmoid,
)

import train_gpt
import train_gpt_muon_ord as ord_gpt
from data.prefixes import gpt2_token_bytes, longest_prefixes, prefix_tokens
from data.shards import DataError
from kernels import fast_forms, ngrams, signals
from runtime.settings import SettingsError
from runtime.trained import load_model

H, LAST, RECORD = LATER_HEADS, 5, "gpt2-small-2026-08"
GROWN = 1.1**0.5

# Outputs of each network: (layer, name, size), in order.
FIRST_GATES = [(1, "xsa", H), (1, "attn_gate", H), *((i, x, 1) for i in (0, 1) for x in ("x0", "ngram"))]
PAIRS = [(i, name, 1) for i in (3, 4, 5) for name in ("x0", "ngram")]
COMPOSE = [(5, "from", H), (5, "into", H)]
LATER_GATES = [(3, "xsa", H), (5, "attn_gate", H), *PAIRS, (2, "skip", 1)]
BEFORE_LAST = [(5, f"mu{i}", 1) for i in range(6)] + [(5, "value_gate", 2), (5, "resid_attn", 1)]
BEFORE_LAST += [(5, name, 1) for name in ("attn", "x0", "ngram", "resid_mlp", "mlp")]
AFTER = [(6, f"mu{i}", 1) for i in range(5)]

PARTS = {
    "groups of q and k": dict(qk_group=2),
    "value gate": dict(value_gate_reads_table=True),
    "signs": dict(ngram_signs=17),
    "signs of n-grams": dict(ngram_signs=17, ngrams=(2, 4, 3)),
    "factors": FACTORS,
    "one source": dict(FACTORS, attn_source=3),
    "without networks": dict(FACTORS, attn_source=3, xsa_layers=(1, 3, 5), num_kv_heads=2),
    "xsa": dict(xsa_layers=(1, 3, 5)),
    "xsa of shared keys": dict(xsa_layers=(1, 3, 5), num_kv_heads=2),
    "mudd": dict(FACTORS, mudd=(1, 3)),
    "gates": GATES,
    "composition": dict(GATES, compose_tokens=7),
    "composition of all": dict(GATES, compose_tokens=40),
    "all": LATER,
    "all but n-grams": dict(LATER, ngram_rows=0, ngram_signs=0),
}


def model_of(c, seed=0, trainer=train_gpt, shaken=True):
    model = trainer.GPT(c, 100, "sdpa")
    model.init_weights(torch.Generator().manual_seed(seed))
    model.rotary.make_tables(512)
    if shaken:
        shake(model)
        with torch.no_grad():  # else the networks' outputs dwarf everything else
            for name, p in model.named_parameters():
                if name.startswith(("mudd", "gate_nets")):
                    p.mul_(0.3)
    if any(map(any, c.prefix_weights)):
        drawn = np.random.default_rng(3).integers(-30, 100, 100)
        model.prefixes_V.copy_(torch.from_numpy(np.maximum(drawn, -1)))
    return model.double()


# ------------------------------------------------------------------------------------------------ reference


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class LaterReference(Reference):
    """Model of the later records, on one slice of tokens."""

    def network(self, name, table, x, scale=None):
        """Outputs of one small network, as {(layer, name): (T, size)}."""
        hidden = gelu(x @ self.p[f"{name}.hidden"].T)
        scale = self.p[f"{name}.scale"] if scale is None else scale
        values = (hidden @ self.p[f"{name}.out"].T + self.p[f"{name}.bias"]) * scale
        found, at = {}, 0
        for layer, signal, size in table:
            found[layer, signal] = values[:, at : at + size]
            at += size
        assert at == values.shape[1]
        return found

    def grouped(self, i, name):
        """Weight of each head of q or k, (D, C); groups hold heads g and g + H/2."""
        w, D = self.get(i, f"attn.{name}"), self.c.head_dim
        if w.ndim == 2:
            return list(w.split(D))
        return [group[:D] for group in w] + [group[D:] for group in w]

    def value_gate(self, i, n, table):
        """Gate of the value embedding, (T, key heads)."""
        if (i, "value_gate") in self.made:
            two = self.made[i, "value_gate"]
            return torch.stack([two[:, h // (H // 2)] for h in range(H)], 1)
        seen = n[:, :12]
        if self.c.value_gate_reads_table:
            seen = torch.cat([n[:, :6], table[:, :6]], 1)
        return 2 * sigmoid(seen @ self.get(i, "attn.value_gate").T)

    def heads(self, i, n, tokens):
        lam = self.get(i, "attn.qkv_lambda")
        q, k = ([ref_norm(n @ (lam * w).T) for w in self.grouped(i, name)] for name in "qk")
        v = n @ (lam * self.get(i, "attn.v")).T
        v = [self.cut(v, h) for h in range(self.c.num_kv_heads)]
        if i in self.c.value_embed_layers:
            table = self.p[f"value_embeds.{i}"][tokens]
            gate = self.value_gate(i, n, table)
            v = [x + gate[:, h : h + 1] * self.cut(table, h) for h, x in enumerate(v)]
        if i == LAST and self.c.mudd:
            v = [x + self.cut(self.more_value, h) for h, x in enumerate(v)]
        return q, k, v

    def attention(self, i, n, tokens, doc, window):
        c, (q, k, own) = self.c, self.heads(i, n, tokens)
        y, taken = self.mixed(i, q, k, own, doc, window)
        if i == LAST and c.compose_tokens:
            y = [a + b for a, b in zip(y, self.composition(*taken, doc))]
        if i in c.xsa_layers:
            y = [self.exclusive(i, h, x, own[h * len(own) // H]) for h, x in enumerate(y)]
        if not c.gate_layers:
            y = self.gated(i, n, y)
        elif i in c.long_layers:
            y = [self.made[i, "attn_gate"][:, h : h + 1] * x for h, x in enumerate(y)]
        return self.joined(i, y)

    def exclusive(self, i, h, y, v):
        out = []
        for t in range(len(y)):
            alpha = self.made[i, "xsa"][t, h] if self.c.gate_layers else self.get(i, "attn.xsa_alpha")[h]
            square = (v[t] @ v[t]).clamp_min(1e-8)
            out.append(y[t] - torch.tanh(alpha) * (y[t] @ v[t]) / square * v[t])
        return torch.stack(out)

    def composition(self, q, k, v, doc):
        """Addition to each head: attention mixed over heads, at the document's last positions."""
        out = [[] for _ in v]
        for t in range(len(doc)):
            w1, w2 = self.made[LAST, "from"][t], self.made[LAST, "into"][t]
            w1 = w1 / torch.sqrt((w1 * w1).mean() + 1e-6)
            seen = [s for s in range(t + 1) if t - s < self.c.compose_tokens and doc[s] == doc[t]]
            mixed = 0
            for h in range(H):
                scores = torch.exp(self.scale * (k[h][seen] @ q[h][t]))
                mixed = mixed + w1[h] * scores / scores.sum()
            for h in range(H):
                out[h].append(w2[h] * (mixed @ v[h][seen]))
        return [torch.stack(rows) for rows in out]

    def ngram(self, tokens):
        if not self.c.ngram_signs:
            return super().ngram(tokens)
        signs, total, all_lengths = ngrams.sign_table(17, self.c.width).double(), 0.0, self.c.ngrams
        for length in all_lengths:
            self.c = dataclasses.replace(self.c, ngrams=(length,))
            rows = []
            for t in range(len(tokens)):
                last = tokens[t - length + 1 : t + 1]
                rows.append(int(np.bitwise_xor.reduce(last)) % 17 if t >= length - 1 else 0)
            total = total + super().ngram(tokens) * signs[rows]
        self.c = dataclasses.replace(self.c, ngrams=all_lengths)
        return total

    def factor(self, i, name):
        """Factor of a branch: a number, or (T, 1)."""
        if (i, name) in self.made:
            return self.made[i, name]
        return self.get(i, f"{name}_lambda")

    def tables(self):
        """Outputs of this model's networks."""
        kept = lambda table: [x for x in table if x[1] != "ngram" or self.c.ngram_rows]
        later = [x for x in LATER_GATES if not (self.c.mudd and x[0] == LAST and x[1] in ("x0", "ngram"))]
        later += COMPOSE if self.c.compose_tokens else []
        return kept(FIRST_GATES), kept(later), kept(BEFORE_LAST)

    def logits(self, tokens, doc, windows, tied):
        if not self.c.branch_factors:
            self.made = {}
            return super().logits(tokens, doc, windows, tied)
        c, x0, ngram, out = self.c, self.embedded(tokens, tied), self.ngram(tokens), {}
        ngram = torch.zeros_like(x0) if ngram is None else ngram
        some = lambda i: self.factor(i, "ngram") if c.ngram_rows else 0.0
        x, self.made = x0, {}
        first, later, before_last = self.tables()
        for i in range(c.num_layers):
            if i in c.gate_layers:
                self.made |= self.network(f"gate_nets.{i}", first if i == 0 else later, x)
            if i == 0:
                x = h0 = x0 + some(0) * ngram
            if i == 2:
                gate = self.made.get((2, "skip"))
                if not c.gate_layers:
                    gate = 2 * sigmoid(x0[:, :12] @ self.p["skip_gate"])[:, None]
                x = x + sigmoid(self.p["skip_lambda"]) * gate * out[1]
            joins = x0
            if i == LAST and c.mudd:
                h_last, joins = x, h0
                self.made |= self.network("mudd.0", before_last, x, 0.1)
                mu = [self.made[5, f"mu{j}"] for j in range(6)]
                self.more_value = mu[0] * h0 + mu[1] * out[3] + mu[2] * x
                x = (1 + mu[5]) * x + mu[3] * h0 + mu[4] * out[3]
            if i not in c.no_attention:
                source = out[3] if c.attn_source == 3 and i > 3 else x
                y = self.attention(i, ref_norm(source), tokens, doc, windows[i in c.long_layers])
                x = self.factor(i, "resid_attn") * x + self.factor(i, "attn") * y
                x = x + self.factor(i, "x0") * joins
                x = x + (some(i) * ngram if i > 0 else 0)
            x = self.factor(i, "resid_mlp") * x + self.factor(i, "mlp") * self.hidden(i, x)
            out[i] = x
        if c.mudd:
            mu = self.network("mudd.1", AFTER, x, 0.1)
            sources = h0, out[3], h_last, self.p["value_embeds.1"][tokens], out[1]
            x = x + sum(mu[6, f"mu{j}"] * source for j, source in enumerate(sources))
        else:
            x = x - self.p["backout_lambda"] * out[3]
        return self.head(x)


def ref_loss(all_logits, model, batch, prefix_weight):
    total = 0.0
    for logits, targets in zip(all_logits, batch.targets_BT):
        total += ref_multi_token_loss(logits, targets, WEIGHTS)
        if prefix_weight:
            for row, target in zip(logits, targets):
                prefix = int(model.prefixes_V[target])
                total += prefix_weight * ref_cross_entropy(row, prefix) if prefix >= 0 else 0.0
    return total


@pytest.mark.parametrize("part", PARTS)
def test_forward_equals_the_slow_model(part):
    """Fails if a part differs from the table of facts, alone or with all the others."""
    model, batch = model_of(later_config(train_gpt, **PARTS[part])), make_batch(train_gpt)
    reference = LaterReference(model)
    prefix_weight = 0.2 if "prefix_weights" in PARTS[part] else None
    with torch.no_grad():
        for windows, tied in (((5, 40), False), (WINDOWS, True)):
            expected = ref_all_logits(reference, batch, windows, tied)
            docs = train_gpt.Documents(batch, "sdpa")
            x = model.trunk(batch.inputs_BT, docs, windows, tied) @ model.head.T
            torch.testing.assert_close(23 * sigmoid((x + 5) / 7.5), torch.stack(expected), rtol=0, atol=2e-4)
        loss, ce = model.train_loss(batch, WINDOWS, True, torch.tensor(WEIGHTS), None, prefix_weight)
        assert loss.item() == pytest.approx(ref_loss(expected, model, batch, prefix_weight).item(), rel=1e-5)


@pytest.mark.parametrize("part", ["without networks", "all"])
def test_gradients_equal_the_slow_models(part):
    """Fails if a parameter's gradient is missing, or is not that of the forward pass."""
    model, batch = model_of(later_config(train_gpt, **PARTS[part])), make_batch(train_gpt)
    prefix_weight = 0.2 if "prefix_weights" in PARTS[part] else None
    model.train_loss(batch, WINDOWS, False, torch.tensor(WEIGHTS), None, prefix_weight)[0].backward()
    reference = LaterReference(model)
    logits = ref_all_logits(reference, batch, WINDOWS, False)
    assert_gradients_equal(model, reference, ref_loss(logits, model, batch, prefix_weight))


# ------------------------------------------------------------------------------------------------ start


SAME_AT_START = {
    "value gate": (dict(value_gate_reads_table=True), {}),
    "signs": (dict(ngram_signs=17), {}),
    "one in a group": (dict(qk_group=1), {}),
    "xsa": (dict(xsa_layers=(1, 3, 5)), {}),
    "xsa by token": (GATES, dict(GATES, xsa_layers=())),
    "composition": (dict(GATES, compose_tokens=7), GATES),
    "mudd": (dict(FACTORS, mudd=(1, 3)), FACTORS),
    "mudd among all": (LATER, dict(LATER, mudd=None, backout=3)),
}


@pytest.mark.parametrize("part", SAME_AT_START)
def test_a_part_that_starts_at_zero_changes_nothing_at_first(part):
    """Fails if a part whose strength is learned acts before the first step. MUDD starts as the backout of
    its second layer; it also doubles the gate of the value embeddings, which start at zero here."""
    logits = []
    for changes in SAME_AT_START[part]:
        model = model_of(later_config(train_gpt, **{**changes, "value_std": 0.0}), shaken=False)
        batch = make_batch(train_gpt)
        with torch.no_grad():
            for name, p in model.named_parameters():  # the same draws for both models
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                drawn = name.endswith((".q", ".k", ".v", ".o", ".up", ".down", "head", "embed"))
                if drawn:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            docs = train_gpt.Documents(batch, "sdpa")
            logits.append(model.trunk(batch.inputs_BT, docs, WINDOWS, True) @ model.head.T)
    assert logits[0].std() > 0.1
    torch.testing.assert_close(logits[0], logits[1].view_as(logits[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [LATER, dict(FACTORS, xsa_layers=(1, 3, 5))], ids=["by token", "fixed"])
def test_every_part_learns(changes, tmp_path):
    """Fails if a parameter keeps its initial value: it does not reach the loss, or no rule updates it."""
    run, data = later_trainer(train_gpt, tmp_path, changes=changes)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    found = train_steps(run, data, 0, 12)
    assert found[-1] < found[0] - 0.5
    still = [name for name, p in run.model.named_parameters() if torch.equal(p, before[name])]
    assert not still


# ------------------------------------------------------------------------------------- roles, sizes, schedule


def test_the_preset_is_the_record():
    """Fails if the preset's sizes, layers or initial values differ from the table of facts."""
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.PRESETS[RECORD][0], 50257, "sdpa")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    c = model.config
    assert sum(s == (3, 256, 768) for s in shapes.values()) == 20  # 60 matrices of q and k
    assert sum(s == (768, 768) for s in shapes.values()) == 20
    assert sum(s == (3072, 768) for s in shapes.values()) == 22
    assert shapes["ngram_table"] == (50304 * 15 // 2, 768) and model.ngram_signs.shape == (8192, 768)
    assert shapes["mudd.0.out"] == (14, 64) and shapes["mudd.1.out"] == (5, 64)
    assert shapes["gate_nets.0.out"] == (26, 64) and shapes["gate_nets.4.out"] == (41, 64)
    tables = sorted(int(n.split(".")[1]) for n in shapes if n.startswith("value_embeds"))
    assert tables == [1, 2, 8, 9, 10]
    assert not any(name.endswith(("attn_gate", "x0_lambda", "xsa_alpha", "skip_gate")) for name in shapes)
    gates = sorted(int(n.split(".")[1]) for n in shapes if n.endswith("value_gate"))
    assert gates == [1, 2, 8, 9] and shapes["blocks.1.attn.value_gate"] == (6, 12)
    assert (c.attn_source, c.mudd, c.xsa_layers) == (7, (3, 7), (1, 3, 4, 7))
    assert (c.compose_tokens, c.backout) == (112, None)


def test_first_values_of_the_networks():
    """Fails if a signal's initial value is not the table's; 0 unless it is listed here."""
    c = train_gpt.PRESETS[RECORD][0]
    starts = {}
    for prefix, lists in (("gate", signals.gate_signals(c)), ("mudd", signals.mudd_signals(c))):
        for i, made in enumerate(lists):
            starts |= {(prefix, i, s.layer, s.name): s.start for s in made if s.start}
            net = signals.TokenNet(8, made, learn_scale=prefix == "gate")
            torch.nn.init.zeros_(net.out), torch.nn.init.ones_(net.hidden)
            for (layer, name), value in net(torch.ones(1, 1, 8)).items():
                wanted = starts.get((prefix, i, layer, name), 0.0)
                assert value.flatten().tolist() == pytest.approx([wanted] * value.numel())
    wanted = {("gate", i, layer, "attn_gate"): 0.25 for i, layer in ((0, 3), (1, 10))}
    wanted[("gate", 1, 6, "skip")] = 0.5
    wanted |= {("gate", 0, i, "ngram"): 0.05 for i in range(4)}
    wanted |= {("gate", 1, i, "ngram"): 0.05 for i in (4, 5, 7, 8, 9)}
    wanted |= {("gate", 1, 10, "compose_from"): 1.0, ("mudd", 0, 10, "value_gate"): 2.0}
    wanted |= {("mudd", 0, 10, name): GROWN for name in ("resid_attn", "resid_mlp")}
    wanted |= {("mudd", 0, 10, "attn"): 1.0, ("mudd", 0, 10, "mlp"): 1.0, ("mudd", 0, 10, "ngram"): 0.05}
    assert starts == {**wanted, ("mudd", 1, 11, "late"): -0.5}
    model = model_of(later_config(train_gpt, **FACTORS, value_std=0.01, mudd=(1, 3)), shaken=False)
    block = model.blocks[3]
    found = [block.resid_attn_lambda, block.attn_lambda, block.resid_mlp_lambda, block.mlp_lambda]
    assert [x.item() for x in found] == pytest.approx([GROWN, 1, GROWN, 1])
    assert [block.x0_lambda.item(), block.ngram_lambda.item()] == pytest.approx([0, 0.05])
    assert model.value_embeds["1"].std().item() == pytest.approx(0.01, rel=0.05)
    hidden = model.mudd[0].hidden
    assert 0.95 < hidden.abs().max().item() * 32**0.5 <= 1 and not model.mudd[0].out.any()


def test_schedule_of_the_preset():
    """Fails if the schedule of rate, document length, batches or loss weights is not the record's."""
    s, o, c = read(train_gpt, MODEL=RECORD)
    schedule = train_gpt.Schedule(s, c)
    assert (schedule.scheduled, schedule.num_steps, o.muon_beta2) == (1270, 1285, 0.9)
    assert s.max_doc_tokens == (896, 2048, 2048, 2048)
    assert schedule.s.cooldown_start == 508
    done = (1000 - 508) / (1270 - 508)
    assert schedule.lr_mul(100) == 1.0 and schedule.lr_mul(500) == 1.52
    assert schedule.lr_mul(1000) == pytest.approx(1.73 * (1 - done) + 0.15 * done)
    assert schedule.lr_mul(1275) == pytest.approx(0.15)
    assert schedule.prefix_weight(0) == 0.25 and schedule.prefix_weight(422) == 0.25
    halfway = (schedule.bounds[1] + schedule.bounds[2]) / 2
    assert schedule.prefix_weight(int(halfway)).item() == pytest.approx(0.125, abs=1e-3)
    assert schedule.prefix_weight(900) is None and schedule.prefix_weight(1280) is None


def test_a_part_can_be_left_out():
    """Fails if WITHOUT leaves a part in, removes one that does not depend on it, or silently does nothing."""
    full = read(train_gpt, MODEL="tiny-2026-08")[2]
    assert full.num_heads > full.qk_group  # else one group would be all heads
    for part in train_gpt.PARTS[1:]:
        c = read(train_gpt, MODEL="tiny-2026-08", WITHOUT=part)[2]
        found = {name for name, value in dataclasses.asdict(full).items() if getattr(c, name) != value}
        assert found == {part} | {"mudd": {"backout"}, "gate_layers": {"compose_tokens"}}.get(part, set())
        assert not getattr(c, part) or not any(map(any, c.prefix_weights))
        model_of(dataclasses.replace(c, ngram_rows=61))
        with pytest.raises(SettingsError, match="no such part"):
            read(train_gpt, MODEL="gpt2-small", WITHOUT=part)


def test_parts_that_stand_on_others_are_refused_alone():
    """Fails if a config may silently lack what a part requires."""
    for changes in (
        dict(mudd=(1, 3)),
        dict(gate_layers=(0,)),
        dict(attn_source=3),
        dict(FACTORS, compose_tokens=7),
        dict(long_layers=(1,), paired_layers=(0, 1)),
    ):
        with pytest.raises(AssertionError, match="require"):
            later_config(train_gpt, **changes)


# ----------------------------------------------------------------------------------------- documents, tokens


def test_documents_change_their_length_with_the_stage(tmp_path):
    """Fails if a stage reads longer documents than allowed, or the change reorders, repeats or skips one: up
    to it, the batches are those of its own limit, and then those of the later one from the same position, as
    in a resumed run. test_schedule_data has what a batch of one limit is."""
    write_shard(tmp_path / "train_0.bin", make_text(30_000, 1, longest=150))
    write_shard(tmp_path / "val_0.bin", make_text(3000, 2))
    known = dict(DATA_PATH=tmp_path, TRAIN_FILES="train_*.bin", VAL_FILES="val_*.bin", VAL_TOKENS=2048)
    known |= dict(VAL_BATCH_TOKENS=1024, BATCH_SIZES="512,512,512,512", LONG_DOCS="cut")

    def batches_of(limits, stages, position=None):
        s = read(train_gpt, MAX_DOC_TOKENS=limits, **known)[0]
        data = train_gpt.TrainData(train_gpt.open_data(s, 1)[0], s, lone_ranks())
        data.seek(position or data.position)
        made = [data.next((512, now), (512, then))[0] for now, then in zip(stages, [*stages[1:], 1])]
        return made, data.position

    batches, _ = batches_of("40,100,100,100", [0, 0, 0, 1, 1, 1])
    short, position = batches_of("40", [0, 0, 0])
    long, _ = batches_of("100", [0, 0, 0], position)
    for batch, wanted in zip(batches, short + long, strict=True):
        assert all(map(torch.equal, batch[:3], wanted[:3]))
    longest = [int(batch.cu_seqlens.diff().max()) for batch in batches]
    assert [batch.max_doc_tokens for batch in batches] == [40, 40, 40, 64, 64, 64]  # a slice has 64 tokens
    assert max(longest[:3]) == 40 and max(longest[3:]) > 40
    for wrong, said in (("40,100", "2 values"), ("8", "MAX_DOC_TOKENS")):
        with pytest.raises(SettingsError, match=said):
            read(train_gpt, MAX_DOC_TOKENS=wrong, **known)
    with pytest.raises(SettingsError, match="LONG_DOCS=split"):
        read(train_gpt, **{**known, "LONG_DOCS": "split"}, MAX_DOC_TOKENS="40,100,100,100")
    assert read(train_gpt, **known, MAX_DOC_TOKENS=64)[0].max_doc_tokens == (64,) * 4


def test_the_table_of_signs():
    """Fails if signs differ between ranks or runs, are not +-1, or are saved with the model."""
    table = ngrams.sign_table(8192, 64)
    assert torch.equal(table, ngrams.sign_table(8192, 64)) and set(table.unique().tolist()) == {-1, 1}
    assert abs(table.float().mean()) < 0.01
    assert "ngram_signs" not in model_of(later_config(train_gpt, **LATER)).state_dict()


def test_prefixes_by_hand():
    """Fails if a token's prefix is not its longest proper prefix that is a token."""
    strings = [b"a", b"b", b"ab", b"abcd", b"abd", b"abcde", b"ba", b"c"]
    assert longest_prefixes(strings).tolist() == [-1, -1, 0, 2, 2, 3, 1, -1]
    assert (prefix_tokens(256) == -1).all()
    with pytest.raises(DataError, match="vocabulary, 1000,"):
        prefix_tokens(1000)


def test_prefixes_of_gpt2s_vocabulary():
    """Fails if a token's prefix differs from a search over all shorter tokens, for 2,000 tokens."""
    pytest.importorskip("tiktoken")
    try:
        strings = gpt2_token_bytes()
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    prefixes, numbers = prefix_tokens(50257), {string: token for token, string in enumerate(strings)}
    assert prefixes.shape == (50257,) and prefixes[50256] == -1
    assert sum(prefixes == -1) == 257  # the single bytes, and the mark
    for token in np.random.default_rng(0).choice(50256, 2000, replace=False):
        string = strings[token]
        lengths = [n for n in range(1, len(string)) if string[:n] in numbers]
        assert prefixes[token] == (numbers[string[: lengths[-1]]] if lengths else -1)


# ------------------------------------------------------------------------------------------------ fast forms


def test_a_cpus_forms_compute_the_same(tmp_path):
    """Fails if the CPU's fast forms compute another model. Losses of three steps cover the gradients."""
    plain, data = later_trainer(train_gpt, tmp_path)
    wanted = train_steps(plain, data, 0, 3)
    s, o, _ = read(train_gpt, MODEL="tiny-2026-08")
    with fast_forms.installed(train_gpt, s, o):
        fast, data = later_trainer(train_gpt, tmp_path)
        assert train_steps(fast, data, 0, 3) == pytest.approx(wanted, rel=2e-5)


# ---------------------------------------------------------------------------------- sampling, resuming, ranks


def test_a_saved_model_continues_a_text(tmp_path):
    """Fails if the model file lacks a part or its config, or a token's logits depend on later tokens: the
    logits of each prefix of a text are those of the whole text. One token is shorter than an n-gram and a
    block of the composition."""
    c = later_config(train_gpt, **LATER)
    model = model_of(c).float()
    save_model(tmp_path / "model.safetensors", model, windows=WINDOWS)
    loaded = load_model(tmp_path / "model.safetensors", "cpu")
    assert loaded.model.config == c
    tokens = np.random.default_rng(0).integers(1, 100, 32)
    batch = train_gpt.stack_slices([(tokens, tokens, [32])], torch.device("cpu"), 32)[0]
    with torch.no_grad():
        x = model.trunk(batch.inputs_BT, train_gpt.Documents(batch, "sdpa"), WINDOWS, False)[0]
        whole = train_gpt.softcap(x @ model.head.T)[:, :100]
        for length in (1, 2, 7, 8, 20, 32):
            found = loaded.next_logits(tokens[:length].tolist())
            torch.testing.assert_close(found, whole[length - 1], rtol=1e-3, atol=1e-3)


def test_ord_learns_with_all_parts(tmp_path):
    """Fails if an ORD mode does not run on groups of heads, or has no effect."""
    runs = {}
    for way in ({}, {"ORD_MODE": "post", "SPECTRAL_IN": "0.5"}, {"ORD_MODE": "project"}, {"ORD_MODE": "off"}):
        run, data = later_trainer(ord_gpt, tmp_path, VAL_LOSS_EVERY=8, **way)
        runs[str(way)] = train_steps(run, data, 0, 8)
        assert runs[str(way)][-1] < runs[str(way)][0] - 0.3
        fields = run.log_fields(7, full=True)
        assert len(fields["spec_attn"].split(",")) == 5  # one mean per layer, five layers
    assert len({tuple(found) for found in runs.values()}) == len(runs)
    run, data = later_trainer(train_gpt, tmp_path)
    assert train_steps(run, data, 0, 8) == runs[str({"ORD_MODE": "off"})]


def test_ranks_agree(tmp_path, shards):
    """Fails if 1 and 4 ranks, which shard groups of heads, networks and tables, train different models."""
    known = dict(MODEL="tiny-2026-08", NUM_SCHEDULED_ITERATIONS=4, VAL_LOSS_EVERY=0, SAVE_MODEL=0)
    known |= dict(BATCH_SIZES="512,512,512,512", VAL_TOKENS=1024, VAL_BATCH_TOKENS=1024)
    validation, training = alone = train(tmp_path, shards, "alone", **known)
    for ours, theirs in zip(train(tmp_path, shards, "four", ranks=4, **known), alone):
        assert ours == pytest.approx(theirs, abs=2e-4)
    assert len(training) == 4 and validation[-1] < training[0] - 0.2
