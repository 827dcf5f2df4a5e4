"""Triton's interpreter, with what its versions lack; imported before a kernel runs in it."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _as_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_bfloat16(numbers):
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def _with_bfloat16(builder=interpreter.InterpreterBuilder):
    """Teach the interpreter bfloat16, which it holds as uint16.

    As it is, products multiply the bit patterns, and a conversion from float32 truncates.
    """
    convert, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, target):
        types = (source.dtype.scalar, target.scalar)
        if types == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(as_bfloat16(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_as_float(source.data), tl.float32)
        return convert(self, source, target)

    def widened(self, operand):
        if operand.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_as_float(operand.data), tl.float32)
        return operand

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = lambda self, source, target, _: cast_impl(self, source, target)
    builder.create_dot = lambda self, a, b, *rest: dot(
        self, widened(self, a), widened(self, b), *rest
    )


_with_bfloat16()


def _with_lengths_from_numpy(patch=interpreter._patch_lang_tensor):
    """Let a loop's length be the array of one element that Triton 3.6 hands to numpy 2.4."""

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


_with_lengths_from_numpy()
