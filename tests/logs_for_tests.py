"""Logs for the tests of the tools: invented numbers in the trainers' format."""

import json

import numpy as np

SEPARATOR = "=" * 100

# A log begins with source code; nothing in it that looks like a log line is one.
SOURCE = '''"""Trains a GPT. The log looks like this:
step:50/1600 val_loss:0.00001 train_time:3100ms step_avg:62.00ms lr_mul:1.0000
step:51/1600 train_loss:0.00001 train_time:3162ms step_avg:62.00ms
event:finished
s:250 tel:0.00001
config:{"seed": 666}
"""

import os
from pathlib import Path

EXAMPLE = """
step:1600/1600 val_loss:0.00001 train_time:99000ms step_avg:62.00ms
event:crashed error:none
"""


def log_step(step, num_steps, loss):
    print(f"step:{step}/{num_steps} val_loss:{loss:.5f}")
step:7/1600 val_loss:0.00001 train_time:1ms step_avg:1.00ms


class Model:
    """A model."""
'''


def loss_at(step, num_steps, final=3.27, start=10.8):
    """Return a plausible loss: falls fast, then slowly, then with the cooldown, to `final`."""
    share = np.asarray(step) / num_steps
    shape = 0.75 * np.exp(-share * 40) + 0.2 * np.exp(-share * 8) + 0.05 * (1 - share)
    return final + (start - final) * shape


def config_line(run_id, seed, settings, num_steps):
    """Return the `config:` line of a run; `settings` override the defaults."""
    config = {
        "run_id": run_id,
        "seed": seed,
        "num_scheduled_iterations": num_steps - 10,
        "num_extension_iterations": 10,
        "lr_muls": [1.0, 1.52, 1.73, 1.0],
        "batch_sizes": [131072, 262144, 393216, 393216],
        "cooldown_frac": 0.55,
        "optimizer": "normuon",
        "muon_weight_decay": 1.2,
        "spectral_lr_mul": 0.1,
        "val_loss_every": 50,
        "target_loss": None,
        "model": "gpt2-small",
        "model_facts": {"num_layers": 11, "width": 768},
    }
    return "config:" + json.dumps({**config, **settings})


def header(
    run_id="run", seed=1, settings=None, num_steps=1600, script="train_gpt_muon_ord.py", source=SOURCE
):
    """Return a log's header: source, separator, configuration, start event, separator."""
    return "\n".join(
        [
            source + SEPARATOR,
            config_line(run_id, seed, settings or {}, num_steps),
            f"event:started script:{script} source_hash:{hash_of(source)} world_size:8"
            " device:NVIDIA H100 80GB HBM3 torch:2.13.0+cu130 git:0123abc"
            " train_data:fineweb_train_000001.bin/100000000/132f",
            SEPARATOR,
            "",
        ]
    )


def with_files(text, files):
    """Return a log whose header gives the name and byte length of each embedded source file."""
    parts = []
    for name, source in files.items():
        parts.append(f"# file: {name}, {len(source.encode())} bytes\n{source}")
        parts.append("" if source.endswith("\n") else "\n")
    return "".join(parts) + text[text.index(SEPARATOR) :]


def hash_of(source):
    return f"{len(source):08x}{sum(source.encode()):08x}"


def step_lines(
    seed=1, num_steps=1600, val_every=50, final=3.27, begin=0, end=None, layers=11, ms=62.0, spec=True, last=0
):
    """Return the step lines of one run from `begin` to `end`, both included (default: all).

    Validations every `val_every` steps, and every 10 in the `last` steps.
    """
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(num_steps + 1, 3 + 2 * layers))
    offset = 0.0013 * noise[0, 0]
    lines, tokens = [], 0
    for step in range(num_steps + 1):
        stage = min(3 * step // num_steps, 2)
        tokens += (131072, 262144, 393216)[stage] if step else 0
        if step < begin or (end is not None and step > end):
            continue
        loss = float(loss_at(step, num_steps, final)) + offset
        lr_mul = (1.0, 1.52, 1.73)[stage] * min(1.0, max(0.1, (num_steps - step) / (0.55 * num_steps)))
        common = (
            f"train_time:{step * ms:.0f}ms step_avg:{ms if step else float('nan'):.2f}ms lr_mul:{lr_mul:.4f} "
            f"beta1:0.5000 beta2:0.9500 batch_size:{(131072, 262144, 393216)[stage]} tokens:{tokens} "
            f"muon_momentum:{min(0.95, 0.85 + step / 3000):.4f}"
        )
        if step:
            lines.append(f"step:{step}/{num_steps} train_loss:{loss + 0.03 * noise[step, 1]:.5f} {common}")
        if step % val_every == 0 or step == num_steps or (step % 10 == 0 and step > num_steps - last):
            line = f"step:{step}/{num_steps} val_loss:{loss:.5f} {common} val_acc:{0.5 - loss / 25:.5f}"
            if spec:
                size = -0.2 * np.exp(-4 * step / num_steps) - 0.002
                attn = ",".join(f"{size * (1 + 0.3 * x):.4f}" for x in noise[step, 3 : 3 + layers])
                mlp = ",".join(f"{8 * size * (1 + 0.3 * x):.4g}" for x in noise[step, 3 + layers :])
                line += f" spec_attn:[{attn}] spec_mlp:[{mlp}]"
            lines.append(line)
    return "\n".join(lines) + "\n"


def make_log(run_id="run", seed=1, settings=None, num_steps=1600, end_event="event:finished", **kwargs):
    """Return a whole log; `kwargs` as for `step_lines`, `script` and `source` as for `header`."""
    head = {key: kwargs.pop(key) for key in ("script", "source") if key in kwargs}
    text = header(run_id, seed, settings, num_steps, **head) + step_lines(seed, num_steps, **kwargs)
    return text + (end_event + "\n" if end_event else "")
