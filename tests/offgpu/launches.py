"""Compile the trainers' kernel launches without a GPU; print each one's resources.

    PYTHONPATH=.:tests python tests/offgpu/launches.py 90             # 80 (no float8), 89; JSON on stdout
    PYTHONPATH=.:tests python tests/offgpu/launches.py 90 everything  # other presets and settings; minutes

The trainers' own model and optimizer call the kernels, on CPU tensors of the presets' widths. Fewer layers
and tokens change a launch's grid, not its code, which depends only on divisibility of sizes by 16, strides
of 1 and the columns of a matrix (apply_kernel). No kernel runs and no product is computed, so values are
meaningless.

Always: a step of gpt2-small with each twin. On sm_90 also what its defaults do not launch: the wide matrices
of dense-88m (keys and values, 256 x 512), every MUON_DECAY_MODE, OPTIMIZER=muon. `everything` adds steps of
gpt2-medium and dense-88m, all settings on all shapes of gpt2-small and dense-88m, and the shapes of all
presets.
"""

import json
import sys

import compile_only
import helpers
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import train_gpt
import train_gpt_muon_ord
from data.shards import GPT2_VOCABULARY
from kernels import cuda
from runtime.flops import matrix_shapes

SLICES, TOKENS = 8, 32  # 16,384 to 49,152 tokens a slice in gpt2-small
PREDICTED = (1, 2, 3)  # tokens, by stage
DECAY_MODES = ("none", "param", "update", "both")  # besides cautious, the default


class NoProducts(TorchDispatchMode):
    """Replace torch's matrix products by empty results of their shape; a CPU would take minutes."""

    PRODUCTS = {getattr(torch.ops.aten, n).default for n in ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm")}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in self.PRODUCTS:
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs or {}))
        return torch.empty_like(function(*args, **kwargs), device="cpu")


def train_step(trainer, float8: bool, preset: str = "gpt2-small"):
    """Run forward, backward and update."""
    model = trainer.GPT(helpers.shortened(preset), GPT2_VOCABULARY, "sdpa")
    model.float8_head = float8
    model.init_weights(torch.Generator().manual_seed(0))
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.ndim == 2 else p.data
    model.rotary.make_tables(2 * TOKENS)
    tokens = torch.zeros(SLICES, TOKENS, dtype=torch.int64)
    ends = torch.arange(0, (SLICES + 1) * TOKENS, TOKENS, dtype=torch.int32)
    batch, o = trainer.Batch(tokens.int(), tokens, ends, TOKENS), helpers.optimizer_settings(trainer)
    with helpers.triton_forms(trainer, o):
        optimizer = helpers.make_optimizer(trainer, model, o)
        for K in PREDICTED:
            loss, _ = model.train_loss(batch, (128, 384), True, torch.ones(K))
            loss.backward()
        x = torch.zeros(SLICES, TOKENS, model.config.width, dtype=torch.bfloat16, requires_grad=True)
        model.prefixes_V = torch.zeros(GPT2_VOCABULARY, dtype=torch.int64)
        model.head_loss(x, tokens, torch.ones(1), 0.25)[0].backward()  # with prefixes
        for measure in (False, True):
            optimizer.step(0, 1.0, SLICES * TOKENS, measure)


def muon_step(trainer, shapes, **env):
    """Update one matrix of each shape (rows, columns), with and without statistics."""
    shapes = {tuple(shape) for shape in shapes}
    params = {f"blocks.{i}.mlp.up": np.zeros(shape, np.float32) for i, shape in enumerate(sorted(shapes))}
    params, o = helpers.Params(params, torch.bfloat16), helpers.optimizer_settings(trainer, **env)
    with helpers.triton_forms(trainer, o):
        optimizer = helpers.make_optimizer(trainer, params, o)
        for measure in (False, True):
            optimizer.step(0, 1.0, SLICES * TOKENS, measure)


def shapes_of(preset: str):
    return matrix_shapes(train_gpt.PRESETS[preset][0])


def other_settings():
    """Launch a few examples of what gpt2-small's defaults do not: other shapes and settings, on one twin."""
    tall, wide = (768, 768), (256, 512)
    muon_step(train_gpt_muon_ord, [wide])
    for mode in DECAY_MODES:
        muon_step(train_gpt_muon_ord, [tall], MUON_DECAY_MODE=mode, MUON_WEIGHT_DECAY="0.1")
    muon_step(train_gpt, [wide], OPTIMIZER="muon")


def everything(float8: bool):
    for trainer in (train_gpt, train_gpt_muon_ord):
        for preset in ("gpt2-medium", "dense-88m"):
            train_step(trainer, float8, preset)
        for preset in train_gpt.PRESETS:
            muon_step(trainer, shapes_of(preset))
        for preset in ("gpt2-small", "dense-88m"):
            for optimizer in ("normuon", "muon"):
                for mode in ("cautious", *DECAY_MODES):
                    muon_step(
                        trainer,
                        shapes_of(preset),
                        OPTIMIZER=optimizer,
                        MUON_DECAY_MODE=mode,
                        MUON_WEIGHT_DECAY="0.1",
                    )


def constants(compiled) -> dict:
    """Constants that the launch gave the kernel, by name, without block sizes."""
    source = compiled.src
    return {
        source.fn.arg_names[at]: value
        for (at,), value in source.constants.items()
        if isinstance(value, (bool, int, str)) and not source.fn.arg_names[at].startswith("BLOCK")
    }


def main(arch: int, all_of_it: bool):
    compile_only.install(arch)
    for trainer in (train_gpt, train_gpt_muon_ord):
        trainer.POLAR_COEFFICIENTS = trainer.POLAR_COEFFICIENTS[:1]  # all steps launch the same kernels
    with NoProducts():
        train_step(train_gpt, float8=False)
        train_step(train_gpt_muon_ord, float8=arch >= 89)
        if arch == 90:
            other_settings()
        if all_of_it:
            everything(float8=arch >= 89)
    names = [n for n in vars(cuda) if n.endswith("_kernel")]
    found = []
    for name in names:
        for compiled in compile_only.launches(getattr(cuda, name)):
            found.append(
                {"kernel": name, "constants": constants(compiled), **compile_only.read_resources(compiled)}
            )
    lines = ",\n".join(json.dumps(x) for x in found)
    print(f'{{"names": {json.dumps(names)}, "launches": [\n{lines}\n]}}')


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["everything"])
