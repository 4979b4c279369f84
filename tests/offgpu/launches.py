"""Compile every kernel launch that the trainers make for gpt2-small, without a GPU; print what came of it.

    PYTHONPATH=.:tests python tests/offgpu/launches.py 90    # 80 (no float8), 89; JSON on stdout

The trainers' own model and optimizer call the kernels here, on CPU tensors of gpt2-small's widths. Fewer
layers and tokens change the grid of a launch, not its code, which depends on sizes only through their
divisibility by 16 (and on strides of 1). No kernel runs and no product is computed: values mean nothing.
"""
import dataclasses
import json
import sys

import compile_only
import helpers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import train_gpt
import train_gpt_muon_ord
import triton_kernels

SLICES, TOKENS = 8, 32  # 16,384 to 49,152 tokens a slice in gpt2-small
PREDICTED = (1, 2, 3)   # tokens, by stage


class NoProducts(TorchDispatchMode):
    """torch's matrix products return memory of the right shape: a CPU would take minutes over them."""

    PRODUCTS = {getattr(torch.ops.aten, n).default for n in ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm")}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in self.PRODUCTS:
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs or {}))
        return torch.empty_like(function(*args, **kwargs), device="cpu")


def small_gpt2():
    """gpt2-small's config with three layers (one without attention), and few rows of the bigram table."""
    config, _ = train_gpt.PRESETS["gpt2-small"]
    return dataclasses.replace(config, num_layers=3, long_layers=(1,), paired_layers=(0,), skip=(0, 2),
                               value_embed_layers=(0,), no_attention=(2,), backout=1, bigram_rows=1024)


def train_step(trainer, float8: bool, **env):
    """Forward, backward and update."""
    o = helpers.optimizer_settings(trainer, **env)
    model = trainer.GPT(small_gpt2(), trainer.GPT2_VOCAB, "sdpa", float8, 1.0, kernels=True)
    model.init_weights(torch.Generator().manual_seed(0))
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.ndim == 2 else p.data
    model.rotary.make_tables(2 * TOKENS)
    tokens = torch.zeros(SLICES, TOKENS, dtype=torch.int64)
    ends = torch.arange(0, (SLICES + 1) * TOKENS, TOKENS, dtype=torch.int32)
    batch, ranks = trainer.Batch(tokens.int(), tokens, ends, TOKENS), helpers.lone_ranks(trainer)
    optimizer = trainer.Optimizer(model, o, ranks, 200, lambda function: function, kernels=True)
    for K in PREDICTED:
        loss, _ = model(batch, (128, 384), torch.ones(K), True)
        loss.backward()
    for measure in (False, True):
        optimizer.step(0, 1.0, SLICES * TOKENS, measure)


def main(arch: int):
    compile_only.install(arch)
    for trainer in (train_gpt, train_gpt_muon_ord):
        trainer.eager_cpu = lambda x: False  # the path that CUDA takes
        trainer.POLAR_COEFFICIENTS = trainer.POLAR_COEFFICIENTS[:1]  # all steps launch the same
    with NoProducts():
        train_step(train_gpt, float8=False)
        train_step(train_gpt_muon_ord, float8=arch >= 89)
    names = [n for n in vars(triton_kernels) if n.endswith("_kernel")]
    found = []
    for name in names:
        for compiled in compile_only.launches(getattr(triton_kernels, name)):
            found.append({"kernel": name, **compile_only.read_resources(compiled)})
    print(json.dumps({"names": names, "launches": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
