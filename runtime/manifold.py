"""The manifold measurement: spectra of weights and of their updates during training (MANIFOLD_EVERY).

Every MANIFOLD_EVERY steps, one JSON line per matrix is appended to logs/RUN_ID.manifold.jsonl. Each rank
measures the matrices it owns, in place, and sends only the lines. Both trainers use this file, and only when
asked. It reads weights and gradients and writes neither, so training is bit-identical with and without it.

Each line describes the update that completes `step` (W before it, dW = W after - W before; fp32 masters):
    step tokens layer proj shape        proj: q k v o up down; `expert` too, in a mixture of experts, and for
        the groups of heads in which a model may store q and k
    entropy effective_rank stable_rank sigma_max gap      from W's full spectrum s: H = -sum p ln p with
        p = s / sum s; exp(H); ||W||_F^2 / s_1^2; s_1; s_1 / s_2
    update_entropy ... update_gap       the same of dW
    weight_norm update_norm             Frobenius
    grad_norm                           of the raw gradient that reaches the optimizer, before clipping and
        momentum, whatever the number of ranks: of the loss summed over the batch's tokens, in the twins times
        2/8
    left_alignment right_alignment      mean singular value of U_W[:, :5]^T U_dW[:, :5], and of V's; 1: the
        same space. update_alignment = left_alignment
    left_chance right_chance            the same for random spaces of these sizes
    quantiles update_quantiles          of the spectra, in ascending order; for pictures only
null means undefined: the spectrum of a zero matrix, the directions of a matrix of rank below 5.
"""

import functools
import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.checkpoints import make_durable
from runtime.sharding import masters

NUM_DIRECTIONS = 5  # leading singular vectors compared by the alignment
NUM_QUANTILES = 25
CHANCE_DRAWS = 2000  # random spaces drawn; their mean is accurate to about 1%
PROJECTIONS = ("q", "k", "v", "o", "up", "down")
SVD_NUMBERS = 2**26  # numbers in one batch of SVDs: bounds its memory


# ---------------------------------------------------------------------------------------------------
# Measured quantities
# ---------------------------------------------------------------------------------------------------


@functools.cache
def chance_alignment(dim: int, num: int = NUM_DIRECTIONS) -> float:
    """Mean singular value of A^T B for two independent random orthonormal frames of `num` vectors.

    The frames are uniform in `dim` dimensions and have at most `dim` vectors. Seeded Monte Carlo: one frame
    may be fixed on the first axes, the other is the Q of a Gaussian matrix. For num = 1 the exact value is
    Gamma(dim/2) / (sqrt(pi) Gamma((dim+1)/2)).
    """
    num, rng = min(num, dim), np.random.default_rng(dim)
    total, at_once = 0.0, max(1, 2**20 // (dim * num))
    for done in range(0, CHANCE_DRAWS, at_once):
        draws = min(at_once, CHANCE_DRAWS - done)
        frames = np.linalg.qr(rng.standard_normal((draws, dim, num)))[0]
        total += np.linalg.svd(frames[:, :num], compute_uv=False).mean(-1).sum()
    return float(total / CHANCE_DRAWS)


def spectrum_facts(s: np.ndarray) -> dict:
    """Compute a line's facts about singular values `s`, largest first; None where undefined (zero, NaN)."""
    facts = dict.fromkeys(("entropy", "effective_rank", "stable_rank", "sigma_max", "gap", "quantiles"))
    if not np.isfinite(s).all():
        return facts
    facts["sigma_max"] = s[0]
    facts["quantiles"] = np.quantile(s, np.linspace(0, 1, min(NUM_QUANTILES, len(s)))).tolist()
    if s[0] > 0:
        p = s[s > 0] / s.sum()
        facts["entropy"] = max(0.0, -(p * np.log(p)).sum())
        facts["effective_rank"] = math.exp(facts["entropy"])
        facts["stable_rank"] = np.square(s / s[0]).sum()
        facts["gap"] = s[0] / s[1] if len(s) > 1 and s[1] > 0 else None
    return facts


def decompose(X_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U_NRM, s, V_NKM): the first M = NUM_DIRECTIONS columns of U and V, and all singular values.

    A matrix that holds a NaN, or on which LAPACK fails, gives NaN: a measurement must not end a run.
    """
    finite_N = X_NRK.isfinite().all(-1).all(-1)
    X_NRK = torch.where(finite_N[:, None, None], X_NRK, 0.0)
    try:
        U, s, Vh = torch.linalg.svd(X_NRK, full_matrices=False)
    except torch.linalg.LinAlgError:
        if len(X_NRK) > 1:
            return tuple(map(torch.cat, zip(*(decompose(X) for X in X_NRK.split(1)))))
        R, K = X_NRK.shape[1:]
        U, s, Vh = (X_NRK.new_full((1, *shape), math.nan) for shape in ((R, R), (min(R, K),), (K, K)))
    s = torch.where(finite_N[:, None], s, math.nan)
    return U[..., :NUM_DIRECTIONS], s, Vh[..., :NUM_DIRECTIONS, :].mT


def has_directions(s: np.ndarray, dim: int) -> bool:
    """Return True if the leading singular vectors are more than rounding error, by numpy's rank rule."""
    return bool(s[:NUM_DIRECTIONS][-1] > s[0] * dim * np.finfo(np.float32).eps)


def measure_matrices(W_NRK: Tensor, dW_NRK: Tensor) -> list[dict]:
    """Compute a line's numbers for each of N matrices and its update, from two SVDs each."""
    (R, K), rows = W_NRK.shape[1:], []
    (U, s, V), (dU, ds, dV) = decompose(W_NRK), decompose(dW_NRK)
    cosines = [torch.linalg.svdvals((x.mT @ y).nan_to_num()) for x, y in ((U, dU), (V, dV))]
    left, right = (x.mean(-1).tolist() for x in cosines)
    norms = [torch.linalg.vector_norm(x, dim=(-2, -1)).tolist() for x in (W_NRK, dW_NRK)]
    spectra = [x.double().cpu().numpy() for x in (s, ds)]
    for i in range(len(W_NRK)):
        facts, of_update = (spectrum_facts(spectrum[i]) for spectrum in spectra)
        quantiles = facts.pop("quantiles"), of_update.pop("quantiles")
        aligned = all(has_directions(spectrum[i], max(R, K)) for spectrum in spectra)
        alignment = (left[i], right[i]) if aligned else (None, None)
        rows.append(
            {
                **facts,
                **{f"update_{key}": value for key, value in of_update.items()},
                "weight_norm": norms[0][i],
                "update_norm": norms[1][i],
                "left_alignment": alignment[0],
                "right_alignment": alignment[1],
                "update_alignment": alignment[0],
                "left_chance": chance_alignment(R),
                "right_chance": chance_alignment(K),
                "quantiles": quantiles[0],
                "update_quantiles": quantiles[1],
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------


def rounded(value, digits: int = 8):
    """Round for JSON, which has no NaN. Lists (quantiles, for pictures) get four digits."""
    if isinstance(value, list):
        return [rounded(x, 4) for x in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def place(name: str) -> dict:
    """Parse layer, projection and expert from a name: blocks.3.attn.q, blocks.0.mlp.up, blocks.0.mlp.up.7."""
    found = re.fullmatch(r"blocks\.(\d+)\.\w+\.([a-z]+)(?:\.(\d+))?", name)
    assert found, f"{name} is no matrix of a block"
    expert = {} if found[3] is None else {"expert": int(found[3])}
    return {"layer": int(found[1]), "proj": found[2], **expert}


def order(row: dict) -> tuple:
    """Sort key of a step's lines, independent of the rank that measured them."""
    proj = row["proj"]
    return (
        row["layer"],
        PROJECTIONS.index(proj) if proj in PROJECTIONS else len(PROJECTIONS),
        proj,
        row.get("expert", -1),
    )


def trim(path: Path, last_step: int):
    """Keep complete lines of steps up to last_step; a run that resumes there writes the later ones again.

    The file is replaced atomically, so a reader never sees half of it.
    """
    if not path.exists():
        return
    kept, temporary = [], path.with_name(f".{path.name}.{os.getpid()}")
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= last_step and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a crash
    try:
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        make_durable(path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, rows: list[dict]):
    """Append all lines of a step, or none if the disk fails; synced before that step's checkpoint."""
    data = "".join(json.dumps({k: rounded(v) for k, v in row.items()}) + "\n" for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


# ---------------------------------------------------------------------------------------------------
# The measurement within a run
# ---------------------------------------------------------------------------------------------------


class Manifold:
    """The measurement within a run: taken when due, off the training clock.

    optimizer: calls its .before_update once a step's gradients are reduced and before anything uses them; its
    .stacks are the MatrixStacks of runtime/sharding.py.
    """

    def __init__(self, path: Path, every: int, optimizer, ranks, clock, log):
        self.path, self.every, self.optimizer, self.ranks = path, every, optimizer, ranks
        self.clock, self.log, self.before, self.ms = clock, log, None, 0.0

    def go_on(self, step: int):
        """Drop lines of later steps, which an earlier attempt wrote. Call before the first step."""
        self.on_disk(step, lambda: trim(self.path, step))

    def expect(self, step: int):
        """Arm the measurement if `step` is due. Call before the update that completes `step`."""
        self.optimizer.before_update = self.look if step % self.every == 0 else None

    def look(self):
        """Keep what the update will overwrite. The optimizer calls this."""
        found = list(masters(self.optimizer.stacks))  # waits for the gradients, as the update would
        self.clock.stop()
        start = time.perf_counter()
        norms = [torch.linalg.vector_norm(grad.float(), dim=(-2, -1)).tolist() for _, _, grad in found]
        self.before = [(names, W.clone(), norm) for (names, W, _), norm in zip(found, norms)]
        self.ms = 1000 * (time.perf_counter() - start)
        self.clock.start()

    def measure(self, step: int, tokens: int):
        """Measure after the update, if it was due (then a collective); otherwise do nothing."""
        if self.before is None:
            return
        self.clock.stop()
        start, rows = time.perf_counter(), []
        for (names, W, grad_norms), (_, after, _) in zip(self.before, masters(self.optimizer.stacks)):
            at_once = max(1, SVD_NUMBERS // W[0].numel())
            for i in range(0, len(names), at_once):
                self.ranks.beat()
                part = slice(i, i + at_once)
                facts = measure_matrices(W[part], after[part] - W[part])
                for name, norm, row in zip(names[part], grad_norms[part], facts):
                    about = {"step": step, "tokens": tokens, **place(name), "shape": list(W.shape[1:])}
                    rows.append({**about, "grad_norm": norm, **row})
        self.before = None
        rows = sorted((row for part in self.ranks.all_gather_object(rows) for row in part), key=order)
        self.on_disk(step, lambda: append(self.path, rows))
        self.ms += 1000 * (time.perf_counter() - start)
        self.log.event("manifold", step=step, ms=f"{self.ms:.0f}")
        self.clock.start()

    def on_disk(self, step: int, action):
        """Run `action` on rank 0; if the disk refuses it, log a warning and go on training."""
        if self.ranks.rank:
            return
        try:
            action()
        except OSError as error:
            text = f"{self.path} could not be written ({error}); training goes on"
            self.log.warn(text, "manifold_failed", step=step, error=json.dumps(str(error)))
