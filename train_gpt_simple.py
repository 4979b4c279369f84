"""The optimization track: a plain model, a contiguous stream of tokens and one optimizer section.

    torchrun --standalone --nproc-per-node=8 train_gpt_simple.py     # MODEL=track, the tuned baseline
    MODEL=tiny python train_gpt_simple.py                            # the same architecture at width 128
    ORD_MODE=brake SPECTRAL_OUT=0.5 python train_gpt_simple.py       # ORD_DEFAULTS has each mode's constants
    python train_gpt_simple.py --help

The track fixes architecture, data and batch, with one forward and backward pass a step; initial weights,
optimizer and schedules are free. A result is a number of steps at which n runs, none of them chosen, satisfy
(3.28 - mean) sqrt(n) >= 0.004: `python report_sweep.py SWEEP.toml --target 3.28`.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH=1

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import vectors
from kernels.vectors import DIMS, ROW, WHOLE, hold, inner, norm, ratio, scalar
from runtime import settings, supervise
from runtime.compiling import compiler_for
from runtime.ranks import Ranks, find_device
from runtime.settings import knob
from runtime.sharding import Bucket, MatrixStack, ShardedOptimizer, find_role, stats_by_layer, step_adamw
from runtime.stream_run import Passes, StreamRun, count_slices, open_data  # noqa: F401

SCRIPT = Path(__file__).resolve()

# ---------------------------------------------------------------------------------------------------
# Settings, and every number of the track
# Source: rules and tuned baseline of track 3 (optimization) of github.com/KellerJordan/modded-nanogpt as of
# 2026-11, 3,250 steps. ORD_DEFAULTS: the constants of that track's best public run of each mode.
# ---------------------------------------------------------------------------------------------------

ADAM_BETAS, ADAM_EPS, ADAM_DECAY = (0.8, 0.95), 1e-10, 0.001
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (2, -1.5, 0.5), 12  # X <- a X + (b A + c A^2) X with A = X X^T
MUON_BETA2 = 0.95  # of NorMuon's second moment
ATTN_SCALE, SOFTCAP, ROTARY_BASE = 0.12, 15, 1024
START_SQUARE = 0.33  # matrices start normal with variance START_SQUARE / fan_in: rows of norm sqrt(0.33)
STARTS = {"track": {"o": 0.0, "down": 0.0}, "sphere": {"o": 1.25, "up": 1.5, "down": 3.0}}  # factors on std
ROWS_SCALE = 0.2  # ORD_MODE=rows: root mean square of U, that of Adam's updates (arXiv 2502.16982)
PASS_ROWS = 64  # rows of one forward and backward pass
VOCAB_MULTIPLE = 128  # 50,257 tokens, 50,304 logits
TRACK_SETTINGS = dict(val_loss_every=125, val_loss_last_steps=325, val_loss_every_last=25)
ORD_DEFAULTS = {  # of each mode, instead of the defaults below
    "brake": dict(
        spectral_out=0.5, spectral_rescale=True, muon_weight_decay=0.025, muon_decay_mode="cautious"
    ),
    "sphere": dict(start="sphere", muon_lr=0.018, muon_weight_decay=0.0, muon_cooldown_frac=1.0),
    "floor": dict(spectral_floor=0.35, optimizer="normuon", muon_lr=0.0375, muon_weight_decay=0.0),
    "rows": dict(muon_lr=0.0045, muon_weight_decay=0.0),  # our rate: at width 768 rows turn as the baseline's
}
ORD_MODES = ("none", "interpolate", "project", "brake", "sphere", "floor", "rows")
DECAY_MODES = ("param", "cautious", "update", "both", "none")
# modes in which a setting does something
RADIAL, BRAKE = ("ord_mode", ("interpolate", "project")), ("ord_mode", ("brake",))
RHO, FLOOR = ("ord_mode", ("interpolate", "project", "brake")), ("ord_mode", ("floor", "brake"))
DECAYING, ROWS = ("ord_mode", ("none", "interpolate", "project", "brake", "floor")), ("ord_mode", ("rows",))


@dataclass(frozen=True)
class Settings(settings.RunSettings):
    """The trainer's settings. A preset (MODEL) may change defaults; the environment has the last word."""

    batch_tokens: int = knob(524_288, "tokens per step, and of a validation batch", low=128)
    row_tokens: int = knob(1024, "tokens of a row, which attention does not leave", low=16)
    num_scheduled_iterations: int = knob(3250, "steps", low=1)
    cooldown_frac: float = knob(0.7, "share of the steps over which rates fall to 0", low=0, high=1)
    muon_cooldown_frac: float = knob(None, "the same for MUON_LR; empty: COOLDOWN_FRAC", low=0, high=1)
    start: str = knob("track", "initial weights; sphere: no matrix at 0", choices=tuple(STARTS))
    kernels, attn_backend = "torch", "sdpa"  # no annotation, so not settings: nothing has a fast form


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer's settings."""

    optimizer: str = knob("muon", "normuon: with variance reduction", choices=("muon", "normuon"))
    muon_lr: float = knob(0.025, "rate of matrices, times sqrt(max(1, rows/columns))", low=0)
    muon_momentum: float = knob(0.95, "momentum, Nesterov's", low=0, high=0.9999)
    muon_weight_decay: float = knob(
        0.05, "decay d of matrices: W -= lr d W; the other modes hold norms", low=-1, high=1, only=DECAYING
    )
    muon_decay_mode: str = knob(
        "param", "what decays: W, W where U W > 0, U, W + U", choices=DECAY_MODES, only=DECAYING
    )
    adam_embed_lr: float = knob(0.7, "Adam's rate of the embedding", low=0)
    adam_head_lr: float = knob(0.004, "Adam's rate of the head", low=0)
    adam_scalar_lr: float = knob(0.015, "Adam's rate of gains and biases", low=0)
    ord_mode: str = knob("none", "the radial part, or the norm: see FAMILY", choices=ORD_MODES)
    spectral_lr_mul: float = knob(0.1, "a, the strength of G_par", only=RADIAL)
    spectral_proj_eps: float = knob(1e-8, "added to ||W||^2 in rho", above=0, only=RADIAL)
    spectral_scale: str = knob("raw", "unit of G_par", choices=("raw", "unit"), only=RADIAL)
    spectral_rho_mode: str = knob("global", "one rho per matrix, row or col", choices=tuple(DIMS), only=RHO)
    spectral_out: float = knob(1.0, "factor on a radial part that points outward", only=BRAKE)
    spectral_in: float = knob(1.0, "factor on a radial part that points inward", only=BRAKE)
    spectral_rescale: bool = knob(False, "give W exactly the norm its radial part asks for", only=BRAKE)
    spectral_floor: float = knob(0.0, "least ||U|| / ||W||; 0: none", low=0, only=FLOOR)
    spectral_floor_mode: str = knob(
        "global", "that of a matrix, or of each row", choices=("global", "row"), only=FLOOR
    )
    spectral_gain_lr: float = knob(0.0, "Adam's rate of the row norms; 0: held", low=0, only=ROWS)


SETTINGS = (Settings, OptimizerSettings)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model."""

    num_layers: int = 12
    width: int = 768
    num_heads: int = 6
    head_dim: int = 128


TINY_SETTINGS = dict(settings.EMBEDDED, num_scheduled_iterations=1000, batch_tokens=2048, row_tokens=256)
PRESETS = {  # MODEL -> (ModelConfig, defaults of settings that the preset changes)
    "track": (ModelConfig(), TRACK_SETTINGS),
    "tiny": (ModelConfig(num_layers=4, width=128, num_heads=2, head_dim=64), TINY_SETTINGS),
    "tiny-wide": (ModelConfig(num_layers=4, width=256, num_heads=4, head_dim=64), TINY_SETTINGS),
}


def read_settings(env) -> tuple[Settings, OptimizerSettings, ModelConfig]:
    """The settings of the environment over the preset's and the mode's; SettingsError names what is wrong."""
    device = find_device(env)
    model = settings.choose_model(env, PRESETS, "track" if device == "cuda" else "tiny")
    config, changes = PRESETS[model]
    mode_defaults = ORD_DEFAULTS.get(env.get("ORD_MODE"), {})
    s, o = settings.read(SETTINGS, env, {**changes, **mode_defaults}, SCRIPT.name)
    if s.muon_cooldown_frac is None:
        s = replace(s, muon_cooldown_frac=s.cooldown_frac)
    return s.resolved(model, device, SCRIPT), o, config


# ---------------------------------------------------------------------------------------------------
# Model
# B rows, T tokens, H heads, D head dim, C width, V vocabulary (padded)
# Weights are fp32; the embedding's dtype, bfloat16 on CUDA, is that of the computation.
# ---------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A product with a bias, in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), self.bias.type_as(x))


class RMSNorm(nn.Module):
    """Division by the root mean square, times a gain for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.gain.shape, self.gain).type_as(x)


def rotate(x_BTHD: Tensor, angles_TP: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the pairs (i, i + D/2)."""
    cos, sin = angles_TP.cos()[:, None], angles_TP.sin()[:, None]
    first, second = x_BTHD.float().chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), -1).type_as(x_BTHD)


class Attention(nn.Module):
    """Causal attention within a row; queries and keys are normed."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config, width = c, c.num_heads * c.head_dim
        self.q, self.k, self.v = (Linear(c.width, width) for _ in range(3))
        self.o = Linear(width, c.width)

    def forward(self, x_BTC: Tensor, angles_TP: Tensor) -> Tensor:
        heads = self.config.num_heads, self.config.head_dim
        q, k, v = (project(x_BTC).unflatten(-1, heads) for project in (self.q, self.k, self.v))
        q, k = (rotate(F.rms_norm(x, heads[1:]), angles_TP) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=ATTN_SCALE, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """relu(x)^2 (arXiv 2109.08668) between two products."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.up, self.down = Linear(c.width, 4 * c.width), Linear(4 * c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.width), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.width), MLP(c)

    def forward(self, x: Tensor, angles_TP: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), angles_TP)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The track's model: no tied head, no skips, no document masks."""

    def __init__(self, c: ModelConfig, vocab_size: int, row_tokens: int):
        super().__init__()
        V = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embed, self.embed_norm = nn.Parameter(torch.empty(V, c.width)), RMSNorm(c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head_norm, self.head = RMSNorm(c.width), nn.Parameter(torch.zeros(V, c.width))
        self.head_bias = nn.Parameter(torch.zeros(V))
        freqs = (1 / ROTARY_BASE) ** torch.linspace(0, 1, c.head_dim // 4)  # half of the pairs; others rest
        angles_TP = torch.outer(torch.arange(row_tokens).float(), F.pad(freqs, (0, c.head_dim // 4)))
        self.register_buffer("angles_TP", angles_TP, persistent=False)

    @torch.no_grad()
    def init_weights(self, start: str, generator: torch.Generator):
        """Draw the weights, in the order of their names, from one stream."""
        for name, p in sorted(self.named_parameters()):
            if name == "embed":
                p.normal_(generator=generator)
            elif find_role(name, ROLES) == "matrix":
                factor = STARTS[start].get(name.split(".")[-2], 1.0)
                p.normal_(0, factor * math.sqrt(START_SQUARE / p.shape[1]), generator=generator)
            elif name.endswith("bias"):
                p.zero_()

    def hidden(self, inputs_BT: Tensor) -> Tensor:
        """Input of the head, (B, T, C)."""
        x = self.embed_norm(F.embedding(inputs_BT, self.embed))
        for block in self.blocks:
            x = block(x, self.angles_TP[: inputs_BT.shape[1]])
        return self.head_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the next token, (..., V), softly capped; fp32."""
        logits = F.linear(x, self.head.type_as(x), self.head_bias.type_as(x)).float()
        return SOFTCAP * logits * (logits.square() + SOFTCAP**2).rsqrt()

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy summed over the tokens, number of tokens guessed right)."""
        logits = self.logits(self.hidden(inputs_BT))
        loss = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum")
        return loss, (logits.argmax(-1) == targets_BT).sum()


# ---------------------------------------------------------------------------------------------------
# Optimizer: Muon for the blocks' matrices, AdamW for the rest, both sharded
# N matrices W of R rows and K columns, G their averaged gradients, P polar factors, U updates; W <- W - lr U
# ---------------------------------------------------------------------------------------------------

ROLES = {  # complete and disjoint: role -> pattern of parameters
    "matrix": r"blocks\.\d+\.(attn\.[qkvo]|mlp\.(up|down))\.weight",
    "embed": r"embed",
    "head": r"head",
    "scalar": r".*(gain|bias)",
}
STATS = ("spec", "cos_uw", "w_norm", "u_over_w")  # spec: <G, W> / ||W||^2
TWINS_LOSS_SCALE = 2 / 8  # raw strengths are in units of the twins' gradient
GROWN = 0.5  # share of the usual start's norm below which a matrix is not braked, so that one at 0 can grow


def newton_schulz(G_NRK: Tensor, dtype: torch.dtype) -> Tensor:
    """The polar factor of each matrix, approximately, computed in `dtype`; fp32. Muon: Keller Jordan."""
    tall, (a, b, c) = G_NRK.size(-2) > G_NRK.size(-1), NEWTON_SCHULZ
    X = (G_NRK.mT if tall else G_NRK).to(dtype)
    X = X / (X.norm(dim=WHOLE, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).float()


def orthogonalize(G: Tensor, second_moment: Tensor | None, dtype: torch.dtype) -> Tensor:
    """P of the formulas; with NorMuon's variance reduction if it has a second moment."""
    P = newton_schulz(G, dtype)
    return P if second_moment is None else vectors.reduce_variance(P, second_moment, MUON_BETA2)


# The family: (U, W, norms, lr, settings) -> new W. norms: what sphere and rows hold, (N, 1, 1) or (N, R, 1).
# Source: the track's public runs, unless a docstring names another. Float64 references: tests/test_simple.py.


def ord_update(G: Tensor, W: Tensor, second_moment, dtype, o: OptimizerSettings) -> Tensor:
    """U of interpolate and project, as in train_gpt_muon_ord.py (this project).

    rho = <G, W> / (||W||^2 + eps), G_par = rho W;
    interpolate: P(G - a G_par) + a G_par; project: P(G - G_par) + a G_par.
    unit: G_par is scaled by ||P|| / ||G - G_par||.
    """
    a, dims = o.spectral_lr_mul, DIMS[o.spectral_rho_mode]
    par = inner(G, W, dims) / (inner(W, W, dims) + o.spectral_proj_eps) * W
    P = orthogonalize(G - (a if o.ord_mode == "interpolate" else 1) * par, second_moment, dtype)
    unit = TWINS_LOSS_SCALE if o.spectral_scale == "raw" else ratio(norm(P), norm(G - par))
    return P + a * unit * par


def none(U, W, norms, lr, o: OptimizerSettings) -> Tensor:
    """W - lr U: Muon (Keller Jordan, 2024) or NorMuon (arXiv 2510.05491)."""
    return W - lr * U


def lift(U: Tensor, W: Tensor, o: OptimizerSettings) -> Tensor:
    """U, scaled up to the norm t ||W|| where it is smaller; of the matrix or of each row."""
    dims = DIMS[o.spectral_floor_mode]
    return U * ratio(o.spectral_floor * norm(W, dims), norm(U, dims)).clamp_min(1)


def floor(U, W, norms, lr, o: OptimizerSettings) -> Tensor:
    """W - lr lift(U): the update/weight floor."""
    return W - lr * lift(U, W, o)


def brake(U, W, norms, lr, o: OptimizerSettings) -> Tensor:
    """W - lr U', U' = lift(U - (1 - s) r W), r = <U, W> / ||W||^2, s = SPECTRAL_OUT where r < 0, else _IN.

    SPECTRAL_RESCALE: with the norm ||W|| - lr <U', W> / ||W|| that its radial part alone asks for: a finite
    tangent step no longer grows W. A matrix below GROWN is left alone, so that one at 0 can grow.
    """
    dims = DIMS[o.spectral_rho_mode]
    length = norm(W, dims)
    r, grown = ratio(inner(U, W, dims), length.square()), length > GROWN * usual_norm(W, dims)
    s = torch.where(r < 0, o.spectral_out, o.spectral_in)
    U = lift(U - torch.where(grown, (1 - s) * r, 0.0) * W, W, o)
    new = W - lr * U
    wanted = (length - lr * ratio(inner(U, W, dims), length)).clamp_min(0)
    return torch.where(grown, hold(new, wanted, dims), new) if o.spectral_rescale else new


def sphere(U, W, norms, lr, o: OptimizerSettings) -> Tensor:
    """(W - lr n U / ||U||) with its norm set to n, that of the start: hyperball."""
    return hold(W - lr * norms * ratio(U, norm(U)), norms, WHOLE)


def rows(U, W, norms, lr, o: OptimizerSettings) -> Tensor:
    """n V / ||V|| by row, V = c W / ||W|| - lr U, c = sqrt(0.33): weight normalization (arXiv 1602.07868).

    The public run (Muown) lets V's norms grow instead.
    """
    return hold(math.sqrt(START_SQUARE) * ratio(W, norm(W, ROW)) - lr * U, norms, ROW)


def rows_gradient(grad: Tensor, W: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for V, (n / c) (grad - <grad, w> w), and for n, <grad, w>; w = W / ||W|| by row."""
    w = ratio(W, norm(W, ROW))
    along = inner(grad, w, ROW)
    return norms / math.sqrt(START_SQUARE) * (grad - along * w), along


FAMILY = dict(none=none, interpolate=none, project=none, brake=brake, sphere=sphere, floor=floor, rows=rows)


def usual_norm(W: Tensor, dims) -> float:
    """Norm over these dimensions that the usual start gives."""
    return math.sqrt(START_SQUARE / W.size(-1) * math.prod([W.size(d) for d in dims]))


def decaying(U: Tensor, W: Tensor, mode: str) -> Tensor:
    """Decaying part: W, where U shrinks it if cautious (arXiv 2510.12402), U, or both."""
    return {"param": W, "cautious": W * (U * W > 0), "update": U, "both": W + U, "none": 0 * W}[mode]


def step_matrices(W, grad, state: dict, count, lr, gain_lr, dtype, o: OptimizerSettings) -> Tensor:
    """One step on a shard of matrices, in place; returns STATS."""
    norms, R, K = state.get("norms"), *W.shape[1:]
    scale = math.sqrt(max(1, R / K))
    if o.ord_mode == "rows":
        scale = ROWS_SCALE * math.sqrt(max(R, K))
        grad, along = rows_gradient(grad, W, norms)
        if o.spectral_gain_lr:
            moments = state["gain_m"], state["gain_v"]
            norms -= gain_lr * vectors.adam(along, *moments, count, ADAM_BETAS, ADAM_EPS)
    G, second_moment = vectors.nesterov(grad, state["momentum"], o.muon_momentum), state.get("second_moment")
    if o.ord_mode in ("interpolate", "project"):
        U = scale * ord_update(G, W, second_moment, dtype, o)
    else:
        U = scale * orthogonalize(G, second_moment, dtype)
    w, u = norm(W), norm(U)
    stats = ratio(inner(G, W), w.square()), ratio(inner(U, W), u * w), w, ratio(u, w)
    new = FAMILY[o.ord_mode](U, W, norms, lr, o)
    if o.muon_weight_decay:  # brake's comes after the norm is set, so that it is not undone
        decayed = new if o.ord_mode == "brake" else W
        new = new - lr * o.muon_weight_decay * decaying(U, decayed, o.muon_decay_mode)
    W.copy_(new)
    return torch.cat(stats, dim=-1).squeeze(1)


def start_state(W: Tensor, o: OptimizerSettings) -> dict[str, Tensor]:
    """State of a stack of matrices. A norm to be held that is 0 becomes the usual one."""
    state = {"momentum": torch.zeros_like(W)}
    if o.optimizer == "normuon":
        state["second_moment"] = torch.zeros_like(W.sum(-1 if W.size(1) >= W.size(2) else -2, keepdim=True))
    if o.ord_mode in ("sphere", "rows"):
        dims = WHOLE if o.ord_mode == "sphere" else ROW
        state["norms"] = torch.where(norm(W, dims) > 0, norm(W, dims), usual_norm(W, dims))
    if o.spectral_gain_lr:
        state |= {key: torch.zeros_like(state["norms"]) for key in ("gain_m", "gain_v")}
    return state


class Optimizer(ShardedOptimizer):
    """Muon and the family for stacks of matrices, AdamW for the rest."""

    def __init__(self, model: GPT, o: OptimizerSettings, ranks: Ranks, compiler):
        super().__init__(model, ROLES, ranks)
        self.o, self.step_adam, self.step_matrices = o, compiler(step_adamw), compiler(step_matrices)
        self.dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32  # of Newton-Schulz
        for role, b in self.by_role:
            if role == "matrix":
                b.state, b.lr = start_state(b.mine, o), o.muon_lr
            else:
                b.state = {key: torch.zeros_like(b.mine, dtype=torch.float32) for key in ("m", "v")}
                b.lr = getattr(o, f"adam_{role}_lr")

    def update(self, b: Bucket, lr_mul: float, muon_lr_mul: float):
        """Move this rank's part of a bucket."""
        if isinstance(b, MatrixStack):
            rates = scalar(b.lr * muon_lr_mul), scalar(self.o.spectral_gain_lr * lr_mul)
            args = b.mine, b.grad, b.state, scalar(b.count), *rates, self.dtype, self.o
            b.stats = self.step_matrices(*args)
        else:
            args = b.mine, b.mantissa, b.grad, b.state, scalar(b.count), scalar(b.lr * lr_mul)
            self.step_adam(*args, ADAM_DECAY, ADAM_BETAS, ADAM_EPS)

    def log_fields(self, full: bool) -> dict:
        """Fields of the step line; with `full`, STATS by layer. A collective then."""
        betas = dict(beta1=ADAM_BETAS[0], beta2=ADAM_BETAS[1], muon_momentum=self.o.muon_momentum)
        stats = stats_by_layer(STATS, self.stacks, self.ranks) if full else {}
        return {key: f"{value:.4f}" for key, value in betas.items()} | stats


# ---------------------------------------------------------------------------------------------------
# Schedule and step; runtime/stream_run.py has the loop
# ---------------------------------------------------------------------------------------------------


class Schedule:
    """Everything that changes over the steps."""

    def __init__(self, s: Settings, config: ModelConfig):
        self.s, self.num_steps = s, s.num_scheduled_iterations

    def lr_mul(self, step: int) -> float:
        """Factor on MUON_LR."""
        return self.falling(step, self.s.muon_cooldown_frac)

    def adam_lr_mul(self, step: int) -> float:
        """Factor on the other rates."""
        return self.falling(step, self.s.cooldown_frac)

    def falling(self, step: int, frac: float) -> float:
        """1, then linear to 0 over the last `frac` of the steps."""
        return min(1.0, (1 - step / self.num_steps) / max(frac, 1e-9))


class Run(StreamRun):
    """One run: model, optimizer, schedule, and the step that joins them."""

    pass_rows = PASS_ROWS

    def __init__(self, start, stop):
        """start: runtime.supervise.Start. stop: its StopRequest."""
        s, ranks = start.s, start.ranks
        model = GPT(start.model_config, start.config["vocab_size"], s.row_tokens)
        model.init_weights(s.start, torch.Generator().manual_seed(s.seed))
        model.to(ranks.device)
        if ranks.device.type == "cuda":
            model.embed.data = model.embed.data.bfloat16()
        compiler = compiler_for(s)
        optimizer, schedule = Optimizer(model, start.o, ranks, compiler), Schedule(s, start.model_config)
        super().__init__(start, stop, model, compiler(model), optimizer, schedule)

    def step(self, step: int, passes: Passes) -> Tensor:
        """One update; returns the cross-entropy summed over this rank's tokens."""
        loss_sum = 0
        for inputs, targets in passes:
            self.ranks.beat()
            loss, _ = self.loss(inputs, targets)
            loss.backward()
            loss_sum = loss_sum + loss.detach()
        self.optimizer.step(self.schedule.adam_lr_mul(step), self.schedule.lr_mul(step))
        return loss_sum


if __name__ == "__main__":
    supervise.leave(supervise.main(sys.modules[__name__], sys.argv[1:]))
