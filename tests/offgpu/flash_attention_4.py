"""Compile FlashAttention-4 as torch calls it, without a GPU: windows, documents, backward.

    python tests/offgpu/flash_attention_4.py sm_90   # sm_100; needs requirements-gpu.txt; nothing runs

Prints one line per kind of heads; fails if this version of the package does not match torch's calls.
"""

import os
import sys

ARCH = sys.argv[1]
os.environ.update(FLASH_ATTENTION_ARCH=ARCH, CUTE_DSL_ARCH=f"{ARCH}a", FLASH_ATTENTION_NUM_SMS="132")

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.attention import _fa4  # noqa: E402

TOKENS, LONGEST, HEADS, WINDOW, SCALE = 1024, 800, 6, (384, 0), 0.1


def compile_both_ways(head_dim: int, kv_heads: int):
    """Compile forward and backward of one kind of heads through torch's own calls."""
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    shapes = [(TOKENS, n, head_dim) for n in heads]
    q, k, v, grad = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    ends = torch.empty(5, dtype=torch.int32, device="cuda")
    out, lse = _fa4._fa4_run_forward(
        q, k, v, ends, ends, LONGEST, LONGEST, SCALE, False, *WINDOW, seqused_k=None
    )
    grads = _fa4._fa4_run_backward(grad, q, k, v, out, lse, ends, ends, SCALE, False, *WINDOW)
    assert (out.shape, lse.shape) == (q.shape, (HEADS, TOKENS))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    print(f"{ARCH}: {HEADS} heads of {head_dim}, {kv_heads} of keys", flush=True)


_fa4.register_flash_attention_fa4()
with FakeTensorMode(allow_non_fake_inputs=True):
    compile_both_ways(head_dim=128, kv_heads=6)
    compile_both_ways(head_dim=64, kv_heads=3)
