"""What torch keeps of compiled code from run to run: graphs with autograd.Functions too, no stale ones."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

FUNCTION = """
import torch
from kernels.op import double

def slope(x):
    return 2 * x

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * double(x) / 2

    @staticmethod
    def backward(ctx, grad):
        return grad * slope(*ctx.saved_tensors)
"""
OP = """
import torch

@torch.library.custom_op("compile_cache_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

@double.register_fake
def _(x):
    return torch.empty_like(x)
"""
JOB = """
import json, sys
import torch
sys.path[:0] = [{root!r}]
from runtime import compiling
from pathlib import Path
compiling.ROOT = Path.cwd()
sys.path.insert(0, str(compiling.ROOT))
import function

x = torch.arange(4.0, requires_grad=True)
compiling.torch_compile(function.Square.apply)(x).sum().backward()
counted = torch._dynamo.utils.counters["aot_autograd"]
found = {{key.removeprefix("autograd_cache_"): n for key, n in counted.items() if "autograd_cache" in key}}
print(json.dumps([found, x.grad.tolist()]))
"""


def compile_once(folder) -> tuple[dict[str, int], list[float]]:
    """Counts of AOTAutograd's cache in a process that compiles Square, and Square's gradient at 0 1 2 3."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ
    }
    env = {
        **kept,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "PYTHONDONTWRITEBYTECODE": "1",  # an edit may be as long as what it replaces, in the same second
    }
    command = [sys.executable, "-c", JOB.format(root=str(ROOT))]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_graphs_with_our_functions_are_kept_and_none_is_stale(tmp_path):
    """Fails if every run of a sweep derives backward and lowers all forms again, as torch does by default
    where a graph has an autograd.Function; or if one whose helper was edited, or what a custom op says of its
    result, is still trained as it was."""
    function, op = tmp_path / "function.py", tmp_path / "kernels" / "op.py"
    op.parent.mkdir()
    (op.parent / "__init__.py").write_text("")
    function.write_text(FUNCTION)
    op.write_text(OP)
    new, again = {"miss": 1, "saved": 1}, {"hit": 1}
    assert compile_once(tmp_path) == (new, [0, 2, 4, 6])
    assert compile_once(tmp_path) == (again, [0, 2, 4, 6])
    function.write_text(FUNCTION.replace("return 2 * x", "return 3 * x"))
    assert compile_once(tmp_path) == (new, [0, 3, 6, 9])
    function.write_text(FUNCTION)
    op.write_text(OP.replace("torch.empty_like(x)", "x.new_empty(x.shape)"))
    assert compile_once(tmp_path) == (new, [0, 2, 4, 6])
