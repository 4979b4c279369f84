"""Softmax attention within documents and a window, by three back ends that agree with a naive loop.

varlen: torch.nn.attention.varlen on CUDA, which is FlashAttention-2, or FlashAttention-3 or 4 where its
package is installed and the GPU is one of its own. flex: FlexAttention, a second choice on CUDA. sdpa:
scaled_dot_product_attention with a mask, anywhere; a window of w needs only blocks near the diagonal. Nothing
is downloaded.

B slices of T tokens, H query heads of D channels; keys and values may have fewer heads
"""

import functools
import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.heads import with_previous_block

CHECK_SCALE = 0.1  # softmax scale of check_varlen


class Documents:
    """Attention mask of one pass: query i sees key j of its document where 0 <= i - j <= window.

    Built once per pass, asked by every layer. In a paired layer each token stands twice in a sequence of 2T.
    """

    def __init__(self, batch, backend: str):
        """batch: has inputs_BT, cu_seqlens (where documents begin in the B*T tokens, then B*T),
        max_doc_tokens."""
        self.cu_seqlens, self.max_doc_tokens, self.backend = batch.cu_seqlens, batch.max_doc_tokens, backend
        self.B, self.T = batch.inputs_BT.shape
        self.bands, self.block_masks = {}, {}  # keys: (window, paired); for sdpa and flex
        at = torch.arange(self.B * self.T, device=self.cu_seqlens.device, dtype=self.cu_seqlens.dtype)
        self.doc_BT = torch.searchsorted(self.cu_seqlens, at, right=True).view(self.B, self.T)

    def attend(self, q_BTHD, k_BTHD, v_BTHD, window: int, paired: bool, scale: float) -> Tensor:
        """Softmax attention, (B, T, H, D). T is 2T here if paired."""
        if self.backend == "varlen":
            return self.attend_varlen(q_BTHD, k_BTHD, v_BTHD, window, paired, scale)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        attend = self.attend_flex if self.backend == "flex" else self.attend_sdpa
        return attend(q, k, v, window, paired, scale).transpose(1, 2)

    def attend_varlen(self, q_BTHD, k_BTHD, v_BTHD, window: int, paired: bool, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # a second of imports, which a CPU does without

        queries_per_key = q_BTHD.shape[2] // k_BTHD.shape[2]
        if queries_per_key > 1:  # torch 2.11 has no enable_gqa
            k_BTHD, v_BTHD = (x.repeat_interleave(queries_per_key, 2) for x in (k_BTHD, v_BTHD))
        times = 2 if paired else 1
        ends, longest = self.cu_seqlens * times, self.max_doc_tokens * times
        flat = (x.flatten(0, 1) for x in (q_BTHD, k_BTHD, v_BTHD))
        y = varlen_attn(*flat, ends, ends, longest, longest, scale=scale, window_size=(window, 0))
        return y.view(q_BTHD.shape)

    def attend_flex(self, q, k, v, window: int, paired: bool, scale: float) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        doc = self.doc_ids(paired)

        def seen(b, h, i, j):
            return (i >= j) & (i - j <= window) & (doc[b, i] == doc[b, j])

        key, T = (window, paired), q.shape[2]
        if key not in self.block_masks:
            self.block_masks[key] = create_block_mask(seen, self.B, None, T, T, q.device)
        gqa = k.shape[1] != q.shape[1]
        return flex_attention(q, k, v, block_mask=self.block_masks[key], scale=scale, enable_gqa=gqa)

    def attend_sdpa(self, q, k, v, window: int, paired: bool, scale: float) -> Tensor:
        gqa = k.shape[1] != q.shape[1]
        band = self.band(window, paired)
        bias = band.bias.to(q.dtype)
        if q.shape[2] == band.block:
            return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=gqa)
        q = in_blocks(q, band.block).flatten(0, 1)
        k, v = (with_previous_block(in_blocks(x, band.block), dim=3).flatten(0, 1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=gqa)
        return y.unflatten(0, (self.B, -1)).transpose(1, 2).flatten(2, 3)

    def doc_ids(self, paired: bool) -> Tensor:
        """The document of each position, (B, T) or (B, 2T)."""
        return self.doc_BT.repeat_interleave(2, dim=1) if paired else self.doc_BT

    def band(self, window: int, paired: bool) -> "Band":
        """The mask of one kind of layer, made once.

        It has blocks as long as the window; or one block, all of it, where that is no more work.
        """
        key = window, paired
        if key in self.bands:
            return self.bands[key]
        doc_BT = self.doc_ids(paired)
        T = doc_BT.shape[1]
        if T <= 2 * window or T % window:
            block, queries, keys = T, torch.arange(T), torch.arange(T)
            doc_q, doc_k = doc_BT[:, None], doc_BT[:, None]
        else:
            block, queries, keys = window, torch.arange(window) + window, torch.arange(2 * window)
            doc_q = doc_BT.view(-1, T // window, window)
            doc_k = with_previous_block(doc_q, dim=2, fill=-1)
        ago = (queries[:, None] - keys).to(doc_BT.device)
        seen = (ago >= 0) & (ago <= window) & (doc_q[..., :, None] == doc_k[..., None, :])
        bias = torch.zeros(seen.shape, device=doc_BT.device).masked_fill(~seen, -math.inf)
        self.bands[key] = Band(block, bias.flatten(0, 1).unsqueeze(1))
        return self.bands[key]


class Band(NamedTuple):
    """A mask: queries in blocks of `block` tokens see their own block of keys and the one before."""

    block: int
    bias: Tensor  # 0 or -inf, (B * blocks, 1, block, keys)


def in_blocks(x_BHTD: Tensor, block: int) -> Tensor:
    """(B, blocks, H, block, D)."""
    return x_BHTD.unflatten(2, (-1, block)).transpose(1, 2)


class Package(NamedTuple):
    """Faster kernels for varlen_attn, which torch takes from a package that is installed."""

    name: str  # the implementation's, in torch and in the log
    module: str
    majors: tuple[int, ...]  # compute capabilities that torch gives it, by their first number

    def is_for_this_gpu(self) -> bool:
        if torch.cuda.get_device_capability()[0] not in self.majors:
            return False
        try:
            return importlib.util.find_spec(self.module) is not None
        except ImportError:  # nor the package that the module would be in
            return False


PACKAGES = (
    Package("FA3", "flash_attn_interface", (9,)),
    Package("FA4", "flash_attn.cute", (9, 10)),
)  # best first


@functools.cache
def activate(backend: str) -> tuple[str, list[str]]:
    """Choose what computes attention, for this process and its current device; call before compiling.

    Returns (its name, warnings). For varlen that is the first of PACKAGES that fits this GPU and computes the
    right thing, or else torch's FlashAttention-2. RuntimeError if that does not either.
    """
    if backend != "varlen":
        return backend, []
    device, warnings = torch.device("cuda", torch.cuda.current_device()), []
    for package in PACKAGES:
        if not package.is_for_this_gpu():
            continue
        try:
            torch.nn.attention.activate_flash_attention_impl(package.name)
            check_varlen(device)
            return f"varlen-{package.name}", warnings
        except Exception as error:  # whatever is wrong with somebody's build of it
            if torch.nn.attention.current_flash_attention_impl():
                torch.nn.attention.restore_flash_attention_impl()
            warnings.append(
                f"{package.module} is installed, but cannot be used: {first_line(error)}; {package.name} is "
                "skipped"
            )
    try:
        check_varlen(device)
    except Exception as error:
        raise RuntimeError(
            f"torch's FlashAttention-2 cannot be used here: {first_line(error)}; try ATTN_BACKEND=flex"
        ) from error
    return "varlen-FA2", warnings


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


class CheckBatch(NamedTuple):
    """The part of a batch that Documents reads."""

    inputs_BT: Tensor
    cu_seqlens: Tensor
    max_doc_tokens: int


def check_varlen(device: torch.device):
    """Raise ValueError if varlen's attention, forward or backward, is not what plain torch computes.

    A package built for another torch may fail at its first call, or not fail and be wrong. Runs once.
    Documents and windows end within the kernels' blocks, and no document is as long as max_doc_tokens, as in
    training.
    """
    bounds = torch.tensor([0, 90, 256, 1024], dtype=torch.int32, device=device)
    batch = CheckBatch(torch.zeros(1, 1024), bounds, max_doc_tokens=800)
    for head_dim, kv_heads, window, paired in ((128, 2, 64, False), (64, 1, 200, True)):
        draw = torch.Generator().manual_seed(0)
        T = 2048 if paired else 1024
        shapes = ((1, T, heads, head_dim) for heads in (2, kv_heads, kv_heads, 2))
        *qkv, grad = (torch.randn(x, generator=draw, device="cpu").to(device, torch.bfloat16) for x in shapes)
        results = []
        for backend, dtype in (("varlen", torch.bfloat16), ("sdpa", torch.float32)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
            y = Documents(batch, backend).attend(*leaves, window=window, paired=paired, scale=CHECK_SCALE)
            y.backward(grad.to(dtype))
            results.append([y.detach(), *(x.grad for x in leaves)])
        for name, found, wanted in zip(("output", "gradient of q", "of k", "of v"), *results):
            off = float((found - wanted).norm() / wanted.norm())
            if not off < 0.02:  # bfloat16 gives 0.002 to 0.005
                raise ValueError(
                    f"its {name} is off by {off:.0%} for heads of {head_dim} and a window of {window}"
                )
