"""Fix Triton's interpreter for bfloat16 and float8: import before any kernel is defined.

    TRITON_INTERPRET=1 python -c "import interpreter, kernels.cuda"

The interpreter of triton 3.7 stores the bits of bfloat16 in uint16 and of float8 in uint8, and hands these
integers to numpy: sums and products are silently wrong, and casts truncate. Here every operation on such a
value widens to fp32, computes, and rounds to nearest even; float8 saturates, like the hardware's conversion.
Not covered, because no kernel uses them: inline assembly, libdevice, atomics. numerics.py first tests this
file itself. Delete it when Triton does this.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
CARRIERS = {1: torch.uint8, 2: torch.uint16}  # types that hold their bits


def is_narrow(*types) -> bool:
    return any(t.scalar in NARROW for t in types)


def widen(handle: TensorHandle) -> TensorHandle:
    """Return narrow numbers in fp32, other types unchanged."""
    if not is_narrow(handle.dtype):
        return handle
    raw = torch.from_numpy(np.array(handle.data, order="C"))
    return TensorHandle(raw.view(NARROW[handle.dtype.scalar]).float().numpy(), tl.float32)


def narrow(values: np.ndarray, to: tl.dtype) -> TensorHandle:
    """Round numbers to type `to`, to nearest even."""
    if not is_narrow(to):
        return TensorHandle(values.astype(_get_np_dtype(to)), to.scalar)
    dtype = NARROW[to.scalar]
    x = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    if dtype.itemsize == 1:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return TensorHandle(x.to(dtype).view(CARRIERS[dtype.itemsize]).numpy(), to.scalar)


def mend_arithmetic(name: str, num_operands: int):
    """Make a method of the interpreter compute in fp32; the result has the type of its first number."""
    original = getattr(InterpreterBuilder, name)
    numbers_from = 1 if name == "ternary_op" else 0  # where(condition, x, y)

    def mended(self, *args):
        operands, rest = args[:num_operands], args[num_operands:]
        if not is_narrow(*(h.dtype for h in operands)):
            return original(self, *args)
        result = original(self, *map(widen, operands), *rest).data
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return narrow(result, operands[numbers_from].dtype)

    setattr(InterpreterBuilder, name, mended)


for method, operands in (
    ("binary_op", 2),
    ("unary_op", 1),
    ("ternary_op", 3),
    ("create_fma", 3),
    ("create_rsqrt", 1),
):
    mend_arithmetic(method, operands)


def cast(self, value, to, *_):
    if is_narrow(value.dtype, to):
        return narrow(widen(value).data, to)
    return TensorHandle(value.data.astype(_get_np_dtype(to)), to.scalar)


original_patch = interpreter._patch_lang_tensor


def patch_tensor(tensor, scope):
    """Let a one-element tensor be an index: triton 3.6 returns an array, which numpy 2.4 refuses."""
    original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_tensor
original_float_cast, original_dot = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot


def float_cast(self, value, to, rounding):
    if is_narrow(value.dtype, to):
        return cast(self, value, to)
    return original_float_cast(self, value, to, rounding)


def dot(self, a, b, acc, *options):
    if not is_narrow(a.dtype, b.dtype, acc.dtype):
        return original_dot(self, a, b, acc, *options)
    product = np.matmul(widen(a).data, widen(b).data, dtype=np.float32)
    return narrow(product + widen(acc).data, acc.dtype)


InterpreterBuilder.cast_impl = cast
InterpreterBuilder.create_fp_to_fp = float_cast
InterpreterBuilder.create_dot = dot
InterpreterBuilder.get_bf16 = lambda self, value: narrow(np.array([value], np.float32), tl.bfloat16)
