"""Small networks that compute numbers for each token: gates of layers and coefficients of MUDD connections.

A network reads the stream at one place and makes signals for the layers that follow. What it makes is data:
`gate_signals` and `mudd_signals` list it for a trainer's ModelConfig, and a layer that is given a signal has
no parameter of that name. MUDD connections are an idea of arXiv 2502.12170, trimmed by the public speedrun's
records of 2026-04-22 and, for the gates, 2026-05-27.

B slices, T tokens, C width, H heads
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 64  # width of a network
SCALE = 0.1  # first factor on the outputs; some networks learn it
RESID_START = 1.1**0.5  # factor on the stream before each of a layer's two branches
NGRAM_START = 0.05  # factor on the n-gram embedding
ATTN_GATE_START, SKIP_START = 0.25, 0.5
BACKOUT_START = -0.5  # factor on the later of MUDD's two layers: what backout was


class Signal(NamedTuple):
    """`size` numbers for each token, for one layer (num_layers: after the last one).

    start: what the numbers are before the network has learnt.
    """

    layer: int
    name: str
    start: float = 0.0
    size: int = 1


def gate_signals(c) -> list[list[Signal]]:
    """List what each gate network makes, for its layer and those up to the next network's."""
    networks, H, last = [], c.num_heads, c.num_layers - 1
    for first, end in zip(c.gate_layers, (*c.gate_layers[1:], c.num_layers)):
        layers = [i for i in range(first, end) if i not in c.no_attention]
        signals = [Signal(i, "xsa", size=H) for i in layers if i in c.xsa_layers]
        if c.attn_gate:
            signals += [Signal(i, "attn_gate", ATTN_GATE_START, H) for i in layers if i in c.long_layers]
        for i in layers:
            if c.mudd and i == last:  # has them from MUDD
                continue
            signals.append(Signal(i, "x0"))
            if c.ngram_rows:
                signals.append(Signal(i, "ngram", NGRAM_START))
        if c.skip and first <= c.skip[1] < end:
            signals.append(Signal(c.skip[1], "skip", SKIP_START))
        if c.compose_tokens and first <= last < end:
            signals += [Signal(last, "compose_from", 1.0, H), Signal(last, "compose_into", 0.0, H)]
        networks.append(signals)
    return networks


def mudd_signals(c) -> list[list[Signal]]:
    """List the coefficients of the MUDD connections: of the last layer, then of the stream after it.

    They multiply h0, what layer 0 reads; early and late, the outputs of c.mudd's layers; x, the stream; and
    h_last, the stream before the last layer. value_* add to its attention's values, in_* to what it reads.
    """
    if not c.mudd:
        return []
    last = c.num_layers - 1
    names = ("value_h0", "value_late", "value_x", "in_h0", "in_late", "in_x")
    signals = [Signal(last, name) for name in names]
    signals += [Signal(last, "value_gate", 2.0, 2), Signal(last, "resid_attn", RESID_START)]
    signals += [Signal(last, "attn", 1.0), Signal(last, "x0")]
    if c.ngram_rows:
        signals.append(Signal(last, "ngram", NGRAM_START))
    signals += [Signal(last, "resid_mlp", RESID_START), Signal(last, "mlp", 1.0)]
    starts = {"h0": 0.0, "late": BACKOUT_START, "h_last": 0.0, "value": 0.0, "early": 0.0}
    return [signals, [Signal(c.num_layers, name, start) for name, start in starts.items()]]


def signal_names(c) -> list[frozenset[str]]:
    """Names of each layer's signals."""
    all_signals = [s for signals in (*gate_signals(c), *mudd_signals(c)) for s in signals]
    return [frozenset(s.name for s in all_signals if s.layer == i) for i in range(c.num_layers)]


class TokenNet(nn.Module):
    """Network of one hidden layer that makes signals; the last weights start at zero."""

    def __init__(self, width: int, signals: list[Signal], learn_scale: bool):
        super().__init__()
        self.places, self.sizes = [(s.layer, s.name) for s in signals], [s.size for s in signals]
        starts = [s.start / SCALE for s in signals for _ in range(s.size)]
        self.hidden = nn.Parameter(torch.empty(HIDDEN, width))
        self.out = nn.Parameter(torch.empty(len(starts), HIDDEN))
        self.bias = nn.Parameter(torch.tensor(starts))
        self.scale = nn.Parameter(torch.tensor(SCALE)) if learn_scale else SCALE

    def forward(self, x_BTC: Tensor) -> dict[tuple[int, str], Tensor]:
        """{(layer, name): (B, T, size)}."""
        values = F.linear(F.gelu(F.linear(x_BTC, self.hidden)), self.out)
        values = ((values + self.bias) * self.scale).type_as(x_BTC)
        return dict(zip(self.places, values.split(self.sizes, dim=-1)))


class Mudd(nn.ModuleList):
    """MUDD connections: outputs of earlier layers come back in the last layer and after it, by token.

    They are kept as {layer: its output}, with what the first layer reads under FIRST_INPUT.
    """

    FIRST_INPUT = -1

    def __init__(self, c):
        super().__init__(TokenNet(c.width, signals, learn_scale=False) for signals in mudd_signals(c))
        (self.early, self.late), self.num_layers = c.mudd, c.num_layers

    def enter(self, x_BTC: Tensor, kept: dict) -> tuple[Tensor, dict]:
        """(the last layer's input, its signals by name; "value" joins its attention's values)."""
        h0, late = kept[self.FIRST_INPUT], kept[self.late]
        made = {name: signal for (_, name), signal in self[0](x_BTC).items()}
        made["value"] = made["value_h0"] * h0 + made["value_late"] * late + made["value_x"] * x_BTC
        return (1 + made["in_x"]) * x_BTC + made["in_h0"] * h0 + made["in_late"] * late, made

    def leave(self, x_BTC: Tensor, kept: dict, value_BTC: Tensor) -> Tensor:
        """The stream after the last layer. value_BTC: the first value table's rows."""
        sources = {"h0": kept[self.FIRST_INPUT], "late": kept[self.late], "h_last": kept[self.num_layers - 2]}
        sources |= {"value": value_BTC, "early": kept[self.early]}
        made = self[1](x_BTC)
        return x_BTC + sum(made[self.num_layers, name] * source for name, source in sources.items())
