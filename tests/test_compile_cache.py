"""torch's compile cache between runs: it holds graphs with autograd.Functions, and no stale ones."""

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
import json, os, sys
import torch
sys.path[:0] = [{root!r}]
from runtime import compiling
from pathlib import Path

def compile_once():
    compiling.ROOT = Path.cwd()
    sys.path.insert(0, str(compiling.ROOT))
    import function

    x = torch.arange(4.0, requires_grad=True)
    compiling.torch_compile(function.Square.apply)(x).sum().backward()
    counted = torch._dynamo.utils.counters["aot_autograd"]
    kinds = [key for key in counted if "autograd_cache" in key]
    found = {{key.removeprefix("autograd_cache_"): counted[key] for key in kinds}}
    print(json.dumps([found, x.grad.tolist()]), flush=True)

torch.compile(lambda x: x + 1)(torch.ones(1))  # imports and prepares what every process would again
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
for line in sys.stdin:
    if os.fork() == 0:
        compile_once()
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""


@pytest.fixture
def compile_once(tmp_path):
    """Function that compiles Square in a new process in tmp_path, forked from one that has imported inductor;
    returns counts of AOTAutograd's cache, and Square's gradient at 0 1 2 3."""
    names = "PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR"
    env = {
        **{name: os.environ[name] for name in names if name in os.environ},
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool, whose threads would be missing after a fork
        # save g++ seconds on vectors and headers for two small loops
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "PYTHONDONTWRITEBYTECODE": "1",  # an edit may keep the length and the second
    }
    command = [sys.executable, "-c", JOB.format(root=str(ROOT))]
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **pipes) as parent:

        def once() -> tuple[dict[str, int], list[float]]:
            parent.stdin.write("compile\n")
            parent.stdin.flush()
            line = parent.stdout.readline()
            assert line, "the process failed; its error is above"
            return tuple(json.loads(line))

        yield once


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_graphs_with_our_functions_are_kept_and_none_is_stale(tmp_path, compile_once):
    """Fails if every run of a sweep derives backward and lowers all forms again, as torch does by default for
    graphs with an autograd.Function; or if the old graph is used after an edit of its helper or of a custom
    op's fake implementation."""
    function, op = tmp_path / "function.py", tmp_path / "kernels" / "op.py"
    op.parent.mkdir()
    (op.parent / "__init__.py").write_text("")
    function.write_text(FUNCTION)
    op.write_text(OP)
    new, again = {"miss": 1, "saved": 1}, {"hit": 1}
    assert compile_once() == (new, [0, 2, 4, 6])
    assert compile_once() == (again, [0, 2, 4, 6])
    function.write_text(FUNCTION.replace("return 2 * x", "return 3 * x"))
    assert compile_once() == (new, [0, 3, 6, 9])
    function.write_text(FUNCTION)
    op.write_text(OP.replace("torch.empty_like(x)", "x.new_empty(x.shape)"))
    assert compile_once() == (new, [0, 2, 4, 6])
