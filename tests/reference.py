"""Slow float64 reference of the model, written from its formulas with loops; and what its tests share.

It takes the model's parameters by name; nothing else is shared. torch stands in for numpy, because autograd
gives its gradients; none of torch's functions for networks is used.
"""

import numpy as np
import torch
from helpers import MATRIX_NAMES

DOCUMENTS = [[0, 5, 6, 20], [0, 11, 31]]  # where documents begin in the two slices of 32 tokens
WINDOWS = (4, 8)  # banded in 32 tokens
WEIGHTS = (1.0, 0.5, 0.25)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def ref_norm(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True))


def ref_doc_ids(starts, T):
    return np.searchsorted(starts, np.arange(T), side="right")


def ref_attention(q, k, v, doc, window, scale):
    """Attention of one head of one slice, query by query: q, k, v (T, D)."""
    y = []
    for i in range(len(q)):
        seen = [j for j in range(max(0, i - window), i + 1) if doc[i] == doc[j]]
        scores = scale * (k[seen] @ q[i])
        weights = torch.exp(scores - scores.max())
        y.append(weights @ v[seen] / weights.sum())
    return torch.stack(y)


def ref_rotary(x, freqs):
    """Rotate pairs (2j, 2j+1) of the first half of x (T, D) by position * freqs[j]; keep the second half."""
    columns = list(x.unbind(1))
    for j, freq in enumerate(freqs):
        angle = torch.arange(len(x)) * float(freq)
        even, odd = columns[2 * j], columns[2 * j + 1]
        columns[2 * j] = even * torch.cos(angle) - odd * torch.sin(angle)
        columns[2 * j + 1] = even * torch.sin(angle) + odd * torch.cos(angle)
    return torch.stack(columns, 1)


def ref_offset(x):
    """Take the second half of each key (T, D) from the position before; the first has none."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], torch.cat([x[:1, half:], x[:-1, half:]])], 1)


def ref_paired(heads):
    """Join head h at even places and h + H/2 at odd ones of a sequence twice as long."""
    half = len(heads) // 2
    return [torch.stack((heads[h], heads[h + half]), 1).flatten(0, 1) for h in range(half)]


def ref_freqs(head_dim):
    return (1 / 1024) ** np.linspace(0, 1, head_dim // 4)


class Reference:
    """Whole model for one slice of tokens, a list."""

    def __init__(self, model, residual_scale=1.0):
        self.c, self.residual_scale = model.config, residual_scale
        self.p = {n: p.detach().double().clone().requires_grad_() for n, p in model.named_parameters()}
        self.freqs, self.scale = ref_freqs(self.c.head_dim), 0.1

    def get(self, i, name):
        return self.p[f"blocks.{i}.{name}"]

    def cut(self, x, h):
        """Head h's columns."""
        return x[:, h * self.c.head_dim : (h + 1) * self.c.head_dim]

    def heads(self, i, n, tokens):
        """Return q, k, v of each head, (T, D) each: normed, values with their embedding."""
        c = self.c
        q, k, v = (n @ (self.get(i, "attn.qkv_lambda") * self.get(i, f"attn.{x}")).T for x in "qkv")
        q = [ref_norm(self.cut(q, h)) for h in range(c.num_heads)]
        k = [ref_norm(self.cut(k, h)) for h in range(c.num_kv_heads)]
        v = [self.cut(v, h) for h in range(c.num_kv_heads)]
        if i in c.value_embed_layers:
            gate = 2 * sigmoid(n[:, :12] @ self.get(i, "attn.value_gate").T)
            table = self.p[f"value_embeds.{i}"][tokens]
            v = [x + gate[:, h : h + 1] * self.cut(table, h) for h, x in enumerate(v)]
        return q, k, v

    def mixed(self, i, q, k, v, doc, window):
        """Attention of all heads; also q, k and v as it takes them."""
        if i in self.c.long_layers:
            k = [ref_offset(x) for x in k]
        if i in self.c.paired_layers:
            q, k, v, doc = ref_paired(q), ref_paired(k), ref_paired(v), np.repeat(doc, 2)
        shared = len(q) // len(k)  # query heads that share a key and value head
        q, k = ([ref_rotary(x, self.freqs) for x in xs] for xs in (q, k))
        y = [
            ref_attention(x, k[h // shared], v[h // shared], doc, window, self.scale) for h, x in enumerate(q)
        ]
        if i in self.c.paired_layers:
            y = [x[0::2] for x in y] + [x[1::2] for x in y]
        return y, (q, k, v)

    def gated(self, i, n, y):
        gate = sigmoid(n[:, :12] @ self.get(i, "attn.attn_gate").T)
        return [gate[:, h : h + 1] * x for h, x in enumerate(y)]

    def joined(self, i, y):
        return torch.cat(y, 1) @ (self.get(i, "attn.o_lambda") * self.get(i, "attn.o")).T

    def attention(self, i, n, tokens, doc, window):
        y, _ = self.mixed(i, *self.heads(i, n, tokens), doc, window)
        return self.joined(i, self.gated(i, n, y) if self.c.attn_gate else y)

    def embedded(self, tokens, tied):
        x = self.p["head" if tied else "embed"][tokens]
        out = [x[0]]
        for t in range(1, len(x)):
            smear = self.p["smear_lambda"] * sigmoid(self.p["smear_gate"] @ x[t, :12]) if self.c.smear else 0
            out.append(x[t] + smear * x[t - 1])
        return ref_norm(torch.stack(out))

    def ngram(self, tokens):
        if not self.c.ngram_rows:
            return None
        multipliers, total = (36313, 27191, 40693, 32467, 24281), 0.0
        for length in self.c.ngrams:
            rows = []
            for end in range(len(tokens)):
                hashed = 0
                for back in range(length):
                    hashed ^= multipliers[back] * tokens[end - back]
                enough = end >= length - 1
                rows.append(hashed % (self.c.ngram_rows - 1) if enough else self.c.ngram_rows - 1)
            total = total + self.p["ngram_table"][rows]
        return total

    def hidden(self, i, x):
        """Second branch of a layer."""
        return torch.relu(ref_norm(x) @ self.get(i, "mlp.up").T) ** 2 @ self.get(i, "mlp.down")

    def head(self, x):
        return 23 * sigmoid((ref_norm(x) @ self.p["head"].T + 5) / 7.5)

    def logits(self, tokens, doc, windows, tied):
        c, x0, ngram, after = self.c, self.embedded(tokens, tied), self.ngram(tokens), {}
        x = x0
        for i in range(c.num_layers):
            if c.skip and i == c.skip[1]:
                gate = 2 * sigmoid(x0[:, :12] @ self.p["skip_gate"])
                x = x + sigmoid(self.p["skip_lambda"]) * gate[:, None] * after[c.skip[0]]
            x = self.get(i, "resid_lambda") * x + self.get(i, "x0_lambda") * x0
            if c.ngram_rows:
                x = x + self.get(i, "ngram_lambda") * ngram
            if i not in c.no_attention:
                y = self.attention(i, ref_norm(x), tokens, doc, windows[i in c.long_layers])
                x = x + self.residual_scale * y
            x = x + self.residual_scale * self.hidden(i, x)
            after[i] = x
        if c.backout is not None:
            x = x - self.p["backout_lambda"] * after[c.backout]
        return self.head(x)


def ref_cross_entropy(logits, target):
    top = logits.max()
    return top + torch.log(torch.exp(logits - top).sum()) - logits[target]


def ref_multi_token_loss(logits, targets, weights):
    """Sum over t and k of w_k CE(logits_t, token t+1+k), where the slice has that token."""
    total = 0.0
    for t in range(len(logits)):
        for k, w in enumerate(weights):
            if t + k < len(targets):
                total += w * ref_cross_entropy(logits[t], targets[t + k])
    return total


def ref_all_logits(reference, batch, windows, tied):
    """Logits of both slices of a batch of make_batch()."""
    T = batch.inputs_BT.shape[1]
    both = zip(batch.inputs_BT.tolist(), DOCUMENTS)
    return [reference.logits(tokens, ref_doc_ids(s, T), windows, tied) for tokens, s in both]


def assert_gradients_equal(model, reference, loss, unused=()):
    """Compare the model's gradients with those of the reference's loss; `unused` must have none."""
    used = {name: p for name, p in reference.p.items() if name not in unused}
    wanted = dict(zip(used, torch.autograd.grad(loss, list(used.values()))))
    assert reference.p.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        if name in unused:
            assert not p.grad.any(), name
            continue
        size = wanted[name].abs().max().item()
        torch.testing.assert_close(
            p.grad, wanted[name], rtol=1e-4, atol=1e-4 * size, msg=lambda text, name=name: f"{name}: {text}"
        )


def make_batch(trainer, starts=DOCUMENTS, T=32, vocab_size=100, seed=0):
    """Make a pass of random tokens: two slices, or one per list of documents."""
    rng = np.random.default_rng(seed)
    tokens = lambda: rng.integers(0, vocab_size, T)
    slices = [(tokens(), tokens(), np.diff([*s, T])) for s in starts]
    (batch,) = trainer.stack_slices(slices, torch.device("cpu"), T)
    return batch


def shake(model, seed=0):
    """Perturb every parameter, so that no initial zero or one hides an error."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            size = 0.25 if name.endswith(MATRIX_NAMES) else 0.6
            p += torch.tensor(rng.normal(0, size, p.shape), dtype=p.dtype)
    return model
