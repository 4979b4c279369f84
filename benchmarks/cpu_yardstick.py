"""Compare the tiny preset on a CPU with a plain GPT of the same size.

    python benchmarks/cpu_yardstick.py                    # about 8 minutes on two cores
    python benchmarks/cpu_yardstick.py --seconds 20       # a quick look

The plain GPT is the usual one: LayerNorm, GELU, learned positions, torch's AdamW with warm-up, cosine and
clipping, one process on all cores; the best of three learning rates counts. Both train on the same bytes,
with equal tokens per step, and are validated on the same 65,536 held-out bytes in contexts of 256 (the
preset's own validation has longer contexts, an advantage not used here). Time is training time. Ours are
train_gpt.py (NorMuon) and train_gpt_muon_ord.py with the preset's SPECTRAL_LR_MUL; the final comparison uses
the latter.
Absolute numbers depend on the machine and its load; read the ratios, which all come from one run.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONTEXT, VAL_TOKENS = 256, 65_536
PLAIN_RATES = (1e-3, 3e-3, 6e-3)


def tiny():
    """Return (module, settings, optimizer settings, model config) of the tiny preset on this machine."""
    import train_gpt

    env = {"MODEL": "tiny", "DEVICE": "cpu", "DATA_PATH": str(ROOT)}
    return train_gpt, *train_gpt.read_settings(env)


# ---------------------------------------------------------------------------------------------------
# The plain GPT
# ---------------------------------------------------------------------------------------------------


def build_plain(width: int, num_layers: int, num_heads: int, vocab: int):
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x):
            B, T, C = x.shape
            q, k, v = (
                z.view(B, T, num_heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(C, dim=2)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
            return x + self.mlp(self.norm2(x))

    class PlainGPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(CONTEXT, width)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(num_layers))), nn.LayerNorm(width)
            self.head = nn.Linear(width, vocab, bias=False)
            self.head.weight = self.tokens.weight
            self.apply(
                lambda m: (
                    nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear | nn.Embedding) else 0
                )
            )

        def forward(self, inputs, targets):
            x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
            logits = self.head(self.norm(self.blocks(x)))
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return PlainGPT()


def train_plain(rate: float, seconds: float) -> dict:
    """Train the plain GPT for about `seconds`; return its last validation loss, time and tokens/s."""
    import torch

    module, s, _, c = tiny()
    torch.manual_seed(0)
    shards, val_shards = module.open_data(s, 1)
    text, held_out = (
        shards[0].tokens.astype(np.int64),
        val_shards[0].tokens[: VAL_TOKENS + 1].astype(np.int64),
    )
    model = build_plain(c.width, c.num_layers, c.num_heads, 256)
    adam = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    rows, rng = max(s.batch_sizes) // CONTEXT, np.random.default_rng(0)

    def step(lr):
        at = rng.integers(0, len(text) - CONTEXT - 1, rows)
        batch = torch.from_numpy(np.stack([text[i : i + CONTEXT + 1] for i in at]))
        for group in adam.param_groups:
            group["lr"] = lr
        model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    start = time.perf_counter()
    for _ in range(10):
        step(0.0)
    num_steps = max(20, int(seconds / (time.perf_counter() - start) * 10))
    start = time.perf_counter()
    for i in range(num_steps):
        step(rate * min(1, (i + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * i / num_steps))))
    spent = time.perf_counter() - start
    with torch.no_grad():
        inputs, targets = (torch.from_numpy(held_out[i : VAL_TOKENS + i]).view(-1, CONTEXT) for i in (0, 1))
        loss = np.mean([model(a, b).item() for a, b in zip(inputs.split(32), targets.split(32))])
    return {
        "rate": rate,
        "loss": float(loss),
        "seconds": spent,
        "tokens_per_s": num_steps * rows * CONTEXT / spent,
        "params": sum(p.numel() for p in model.parameters()),
    }


# ---------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------


def torchrun(arguments: list[str], ranks: int, **env) -> str:
    """Run a script of this project under torchrun; return its stdout."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        *arguments,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout


def ms_per_step(script: str, ranks: int) -> float:
    """Measure the ms per step of the tiny preset with step_time.py."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step_time.json"
        arguments = ["--script", f"{script}.py", "--json", str(out)]
        torchrun(["benchmarks/step_time.py", *arguments], ranks, MODEL="tiny", DEVICE="cpu")
        return json.loads(out.read_text(encoding="utf-8"))["schedule"]["ms_step"]


def train_ours(script: str, seconds: float, ranks: int) -> list[tuple[float, float, int]]:
    """Train the tiny preset for the given seconds; return its log's [(seconds, validation loss, tokens)]."""
    num_steps = max(60, int(1000 * seconds / ms_per_step(script, ranks)))
    run_id = f"yardstick-{script}-{time.strftime('%Y%m%d-%H%M%S')}"
    torchrun(
        [f"{script}.py"],
        ranks,
        MODEL="tiny",
        DEVICE="cpu",
        RUN_ID=run_id,
        VAL_LOSS_EVERY="25",
        NUM_SCHEDULED_ITERATIONS=str(num_steps),
        VAL_TOKENS=str(VAL_TOKENS),
        VAL_BATCH_TOKENS=str(CONTEXT * 8),
    )
    pattern = r"^step:\d+/\d+ val_loss:(\S+) train_time:(\d+)ms .* tokens:(\d+)"
    found = re.findall(pattern, (ROOT / "logs" / f"{run_id}.txt").read_text(encoding="utf-8"), re.M)
    return [(int(ms) / 1000, float(loss), int(tokens)) for loss, ms, tokens in found]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=80, help="training time of each run (default 80)")
    parser.add_argument(
        "--ranks", type=int, default=min(2, os.cpu_count() or 1), help="ranks of the tiny preset"
    )
    parser.add_argument("--plain", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        return print(json.dumps(train_plain(args.plain, args.seconds)))
    for script in ("train_gpt", "train_gpt_muon_ord"):
        curve = train_ours(script, args.seconds, args.ranks)
        spent, loss, tokens = curve[-1]
        print(
            f"ours   {loss:.3f} nats per byte after {spent:.0f} s, "
            f"{tokens / spent:,.0f} tokens/s, {script}.py"
        )
    plain = []
    for rate in PLAIN_RATES:
        out = subprocess.run(
            [sys.executable, __file__, "--plain", str(rate), "--seconds", str(args.seconds)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        plain.append(json.loads(out))
        print(
            "plain  {loss:.3f} nats per byte after {seconds:.0f} s, {tokens_per_s:,.0f} tokens/s, "
            "AdamW at {rate:g}, {params:,} parameters".format(**plain[-1])
        )
    best = min(plain, key=lambda p: p["loss"])
    reached = next((t for t, value, _ in curve if value <= best["loss"]), None)
    if reached is None:
        print(f"ours did not reach plain's {best['loss']:.3f}")
    else:
        print(
            f"seconds to {best['loss']:.3f}: ours {reached:.1f}, plain {best['seconds']:.1f} "
            f"(its schedule ends there), ratio {reached / best['seconds']:.2f}"
        )
    return None


if __name__ == "__main__":
    main()
