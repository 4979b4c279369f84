"""torch.compile as the trainers use it, and the options of memory allocators."""

import ctypes
import functools
import hashlib
import os
import sys
from pathlib import Path

import torch

MAX_VARIANTS = 64  # compiled forms of one function: gpt2-small's forward has 11, dynamo allows 8 by default
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".compile_cache"  # shared by all runs and sweeps
CACHE_HELP = (
    f"Compiled code is kept in {CACHE.name}/ beside this script, for later runs and whole sweeps;\n"
    "TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR put it elsewhere."
)


def torch_compile(function):
    """Compile to one graph with fixed shapes, or fail: graph breaks and recompilations cost time silently.

    A function with the attribute `runs_eagerly` (a fast form with kernels of its own) is returned as it is.
    """
    if getattr(function, "runs_eagerly", False):
        return function
    configure()
    # torch 2.13 asserts ("16384 v.s. 16383") when it fuses reductions over T and over T - 1; retry in 2.14
    return torch.compile(
        function, dynamic=False, fullgraph=True, options={"triton.mix_order_reduction": False}
    )


def configure():
    """Set torch's options for what is compiled from now on, in this process."""
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(CACHE / folder))
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch.compiler.config as compiler

    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_VARIANTS)
    # Without this, torch does not cache what it derives from a graph with autograd.Functions, and every run
    # derives all forms again. Dynamo traces their bodies into the graph, and the graph is the cache's key.
    functorch.autograd_cache_allow_custom_autograd_functions = True
    # Not in the graph: what a custom op's fake says of shapes and types, and how it is differentiated.
    compiler.cache_key_tag = compiler.cache_key_tag or kernels_hash()
    # Options are per thread in torch 2.13 and backward runs in autograd's thread. So backward is compiled
    # with forward, here, and the option below travels with the function.
    functorch.force_non_lazy_backward_lowering = True


@functools.cache
def kernels_hash() -> str:
    """Hash of the sources that define custom ops."""
    sources = [path.read_bytes() for path in sorted(ROOT.glob("kernels/*.py"))]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def not_compiled(function):
    """Stand in for torch_compile where COMPILE=0."""
    return function


def compiler_for(s):
    """The compiler of a run with these settings."""
    return torch_compile if s.compile == "1" else not_compiled


def compile_forward(function, compiler):
    """Compile a pass of the model, which is called as function(batch, ...), by one of the compilers above.

    Only the number of documents is dynamic: it differs in every pass, and only attention's kernel reads it.
    """
    if compiler is not_compiled:
        return function
    forward = compiler(function)

    def with_any_number_of_documents(batch, *args):
        torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        return forward(batch, *args)

    return with_any_number_of_documents


def graphs_compiled() -> int:
    """Number of graphs that this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # its import takes a second; eager runs do without
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def choose_allocator():
    """Let CUDA's memory segments grow, so that stages of different shapes do not fragment them.

    Call before anything asks CUDA a question, which fixes the allocator's options.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory():
    """Tell the C library (glibc; others are left alone) to keep what tensors free for the next ones.

    By default it returns large blocks to the system and faults them in again, page by page: 10.6 of 40.3 s of
    processor time over 40 steps of `tiny` with three evaluations; 1.4 of 31.0 s with this.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
        libc.mallopt(M_MMAP_MAX, 0)  # and have everything in it
