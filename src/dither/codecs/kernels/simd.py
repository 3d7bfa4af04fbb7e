"""Sixteen float32 numbers that travel together: a vector type for numba kernels.

A compiler turns loops into vector code when it can prove it safe and thinks it worthwhile, and says nothing
when it does not.  The block searches here cost dozens of passes over the same few weights, so whether their
sums stay in registers decides the speed by a factor of ten.  This file therefore gives numba LLVM's own
vector type `<16 x float>`: one machine register with AVX-512, two with AVX2, four with NEON.

    x = load(weights, 0)                      # sixteen neighbours
    total = x * x + splat(np.float32(1))      # lane by lane
    store(out, 0, where(less(total, x), total, x))

Lanes never mix (except in `store_transposed`), so a kernel's result for one lane does not depend on what
the other lanes hold, nor on how wide the machine's registers are.  There is no fast-math: `+`, `-`, `*` and
`/` round as IEEE 754 says; only `fma` rounds once where the hardware can and twice where it cannot.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature as make_signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from dither.codecs.kernels.common import inner

LANES = 16


class Vector(types.Type):
    """Sixteen float32."""

    def __init__(self):
        super().__init__(name=f"float32x{LANES}")


class Mask(types.Type):
    """Sixteen truth values, from a comparison of vectors."""

    def __init__(self):
        super().__init__(name=f"bool1x{LANES}")


vector, mask = Vector(), Mask()
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)


# A value of these types is an LLVM vector and nothing more: it lives in registers, not in memory.
@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _FLOATS)


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _BITS)


def _address(context, builder, array_type, array, index, element):
    """A pointer to `element`s (an LLVM type) at item `index` of a numba array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), element.as_pointer())


@intrinsic
def load(typing_context, array, index):
    """The vector at items index … index + 15 of a contiguous float32 array; no bounds check."""

    def generate(context, builder, signature, arguments):
        # An alignment of 4 is all that may be promised of an array that begins anywhere; where one does begin on a
        # line (`aligned_floats`), the same instruction is as fast.
        pointer = _address(context, builder, signature.args[0], *arguments, _FLOATS)
        return builder.load(pointer, align=4)

    return vector(array, types.intp), generate


@intrinsic
def store(typing_context, array, index, value):
    """Write a vector to items index … index + 15 of a contiguous float32 array; no bounds check."""

    def generate(context, builder, signature, arguments):
        pointer = _address(context, builder, signature.args[0], *arguments[:2], _FLOATS)
        builder.store(arguments[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def load_bytes(typing_context, array, index):
    """Items index … index + 15 of a contiguous uint8 or int8 array as float32."""

    def generate(context, builder, signature, arguments):
        narrow = ir.VectorType(ir.IntType(8), LANES)
        pointer = _address(context, builder, signature.args[0], *arguments, narrow)
        whole = builder.load(pointer, align=1)
        convert = builder.sitofp if array.dtype.signed else builder.uitofp
        return convert(whole, _FLOATS)

    return vector(array, types.intp), generate


@intrinsic
def store_bytes(typing_context, array, index, value):
    """Write the lanes, whole numbers that fit, to sixteen items of a contiguous uint8 or int8 array."""

    def generate(context, builder, signature, arguments):
        # Through 32-bit integers, which processors convert to, then cut to bytes.
        words = builder.fptosi(arguments[2], ir.VectorType(ir.IntType(32), LANES))
        narrow = ir.VectorType(ir.IntType(8), LANES)
        pointer = _address(context, builder, signature.args[0], *arguments[:2], narrow)
        builder.store(builder.trunc(words, narrow), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def splat(typing_context, scalar):
    """A vector with the same float32 in every lane."""

    def generate(context, builder, signature, arguments):
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), arguments[0], _i32(0))
        return builder.shuffle_vector(one, one, ir.Constant(_lane_numbers(), [0] * LANES))

    return vector(types.float32), generate


@intrinsic
def fma(typing_context, a, b, c):
    """a · b + c, rounded once where the hardware has the instruction."""

    def generate(context, builder, signature, arguments):
        # fmuladd, not fma: where the instruction is missing, two roundings are better than a call per lane.
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return builder.call(function, arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def smaller(typing_context, a, b):
    """Lane by lane the smaller of two vectors; `b` where `a` is not a number."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered("<", a, b), a, b)

    return vector(vector, vector), generate


@intrinsic
def larger(typing_context, a, b):
    """Lane by lane the larger of two vectors; `b` where `a` is not a number."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return vector(vector, vector), generate


@intrinsic
def magnitude(typing_context, a):
    """Lane by lane |a|."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_FLOATS, [_FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fabs.v{LANES}f32")
        return builder.call(function, arguments)

    return vector(vector), generate


@intrinsic
def less(typing_context, a, b):
    """The mask of lanes where a < b; false where either is not a number."""

    def generate(context, builder, signature, arguments):
        return builder.fcmp_ordered("<", *arguments)

    return mask(vector, vector), generate


@intrinsic
def either(typing_context, one, other):
    """The lanes of either mask."""

    def generate(context, builder, signature, arguments):
        return builder.or_(*arguments)

    return mask(mask, mask), generate


@intrinsic
def where(typing_context, chosen, yes, no):
    """`yes` in the lanes of the mask, `no` elsewhere."""

    def generate(context, builder, signature, arguments):
        return builder.select(*arguments)

    return vector(mask, vector, vector), generate


@intrinsic
def store_transposed(typing_context, source, start, stride, target, at):
    """Sixteen runs of sixteen floats, turned: item j of run r goes to target[at + 16·j + r].

    Run r is source[start + r · stride …].  Four rounds of interleaving do what 256 scalar moves would.
    """

    def generate(context, builder, signature, arguments):
        source, start, stride, target, at = arguments
        source_type, _, _, target_type, _ = signature.args
        rows = []
        for row in range(LANES):
            index = builder.add(start, builder.mul(stride, ir.Constant(stride.type, row)))
            pointer = _address(context, builder, source_type, source, index, _FLOATS)
            rows.append(builder.load(pointer, align=4))
        # Interleaving row i with row i + 8, four times over, is the transposition of a 16 × 16 matrix.
        low = [lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
        high = [lane + LANES // 2 for lane in low]
        for _ in range(4):
            pairs = [(rows[i], rows[i + LANES // 2]) for i in range(LANES // 2)]
            rows = [
                builder.shuffle_vector(a, b, ir.Constant(_lane_numbers(), order))
                for a, b in pairs
                for order in (low, high)
            ]
        for row in range(LANES):
            index = builder.add(at, ir.Constant(at.type, LANES * row))
            pointer = _address(context, builder, target_type, target, index, _FLOATS)
            builder.store(rows[row], pointer, align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp), generate


@inner
def aligned_floats(count):
    """An uninitialized float32 array that starts on a 64-byte line, so that no vector straddles two."""
    room = np.empty(count + LANES, np.float32)
    skip = -(room.ctypes.data // 4) % LANES
    return room[skip : skip + count]


def _i32(value):
    return ir.Constant(ir.IntType(32), value)


def _lane_numbers():
    return ir.VectorType(ir.IntType(32), LANES)


def _operator(symbol, instruction):
    """Let numba apply a Python operator to two vectors, as one LLVM instruction."""

    @infer_global(symbol)
    class Typing(ConcreteTemplate):
        cases = (make_signature(vector, vector, vector),)

    @lower_builtin(symbol, Vector, Vector)
    def generate(context, builder, signature, arguments):
        return getattr(builder, instruction)(*arguments)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _instruction)
