"""Keep float32 arrays in 8 bits: codes in blocks of 256, and the largest magnitude of each block.

Code books, blocks and rounding are those of bitsandbytes' 8-bit optimizers (Dettmers et al. 2021, arXiv 2110.02861).
"""

import math
from functools import cache, partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.distributed import sharding

BLOCK = 256
DECADES = 7
ZERO = {True: 127, False: 0}  # the codes of 0: signed, unsigned
_LEAST = float(np.finfo(np.float32).tiny)  # GPUs take smaller numbers for 0, and their inverse overflows


class Quantized(NamedTuple):
    """Hold an array in 8 bits: `codes` has its shape and placement, `absmax` a float32 for each block of `divide`."""

    codes: jax.Array
    absmax: jax.Array


@cache
def code_book(signed: bool) -> np.ndarray:
    """Return the 256 values of a code, ascending, float32: 0, 1, and in each of 7 decades below 1 the middles of equal
    intervals, of which the next decade has twice as many. Signed codes have half as many, and their negatives.

    The values are rounded once. bitsandbytes' are of torch.linspace, whose last bit depends on the CPU.
    """
    bounds = [np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1) for decade in range(DECADES)]
    middles = [10.0 ** (i - DECADES + 1) * (b[:-1] + b[1:]) / 2 for i, b in enumerate(bounds)]
    positive = np.concatenate(middles)
    below = -positive[::-1] if signed else positive[:0]
    return np.concatenate([below, [0], positive, [1]]).astype(np.float32)


@cache
def _bounds(signed: bool) -> np.ndarray:
    """Return the largest float32 that is rounded to a code and not to the next one, by the number of the next one.

    A tie goes to the lower code, and a negative number is not rounded to 0. The first element is no number's bound.
    """
    values = code_book(signed).astype(np.float64)
    middle = (values[1:] + values[:-1]) / 2
    bounds = middle.astype(np.float32)
    bounds = np.where(bounds > middle, np.nextafter(bounds, np.float32(-1)), bounds)
    if signed:
        bounds[ZERO[signed] - 1] = 0
    return np.concatenate([[-np.inf], bounds]).astype(np.float32)


def absmax(blocks: jax.Array) -> jax.Array:
    """Return the largest magnitude of each block [..., 256], NaN where the block has one."""

    def of_bits(size: jax.Array) -> jax.Array:
        """Compare the bits as integers, where NaN is above Inf: XLA's maximum on a CPU may drop a NaN."""
        bits = jnp.max(jax.lax.bitcast_convert_type(size, jnp.int32), axis=-1)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    return jax.lax.platform_dependent(jnp.abs(blocks), cpu=of_bits, default=partial(jnp.max, axis=-1))


def quantize(blocks: jax.Array, absmax: jax.Array, signed: bool) -> jax.Array:
    """Return the nearest codes of blocks [..., 256], uint8, by the largest magnitude of each block.

    A tie goes to the lower code; a TPU gives either code to a number that is within 2e-6 of itself from the middle of
    both. A negative number keeps its sign, as in bitsandbytes' CUDA kernel, and is not rounded to 0. A block of zeros
    has codes 0, as an array that a mesh pads. A NaN makes its whole block NaN.
    """
    usual = (absmax >= _LEAST) & (absmax < jnp.inf)
    x = blocks * jnp.where(usual, 1 / absmax, 0)[..., None]
    code = jax.lax.platform_dependent(
        x, tpu=partial(_computed, signed=signed), default=partial(_searched, signed=signed)
    )
    unusual = jnp.where(absmax == 0, 0, ZERO[signed])
    return jnp.where(usual[..., None], code, unusual[..., None]).astype(jnp.uint8)


def _line(size: jax.Array, signed: bool) -> jax.Array:
    """Return where magnitudes up to 1 lie among the codes, in float32.

    Let a decade begin at b = 10^(d - 7) and have n = 2^d intervals, or 2^(d + 1) of an unsigned code. Interval i has
    the code n + i above 0 if signed, n + i - 1 if unsigned. It begins where n (x / b + 8) / 9 is n + i: a line in x.
    (The first one begins a fifth later, because the interval before it is shorter.) Each decade's line has a fifth of
    the slope of the decade before: the lowest line is that of the decade of x. Numbers below 0.001 have the lines of
    1000 times the number, where n is 8 times as large.
    """
    low = size < 1e-3
    size = jnp.where(low, 1000 * size, size)
    counts = {10.0 ** (d - DECADES): 2 ** (d + (not signed)) for d in range(3, DECADES)}
    line = reduce(jnp.minimum, [size * (n / b / 9) + n * 8 / 9 for b, n in counts.items()])
    return jnp.where(low, line / 8, line)


def _searched(x: jax.Array, signed: bool) -> jax.Array:
    """Return the codes of numbers up to 1, int32: of the two around the bound nearest to x, the one on its side."""
    size = jnp.minimum(jnp.abs(x), 1)
    # The rounded line is the upper code. An eighth more: whole and half places are frequent, at bounds and at codes.
    # There a compiler that repeats the arithmetic, with other fused products, would round to another number.
    line = _line(size, signed) + 0.125
    line = jnp.where(x < 0, 128 - line, 127 + line) if signed else line - 1
    # A sum with 2^23 ends in the rounded number. A conversion takes six instructions on a GPU.
    upper = jax.lax.bitcast_convert_type(line + 2.0**23, jnp.int32) & 255
    return upper - ((x if signed else size) <= _look_up(_bounds(signed), upper))


def _computed(x: jax.Array, signed: bool) -> jax.Array:
    """Return the codes of numbers up to 1, int32, by arithmetic alone: a TPU looks bounds up slowly.

    The line is rounded in three products and a sum. At a decade's begin, where it is steep, the sum weighs most: all
    together 30 * 2^-24 of x.
    """
    line = _line(jnp.minimum(jnp.abs(x), 1), signed)
    whole = jnp.floor(line)
    least = 1.0 if signed else 2.0  # the first interval of all, which begins in the middle between its code and 0
    is_first = jax.lax.bitcast_convert_type(whole, jnp.int32) & 0x7FFFFF == 0
    late = jnp.where(whole == least, least * (7 / 36) if signed else least * (5 / 72), 0.2)
    place = jnp.where(is_first & (line - whole < late), whole - 1, whole).astype(jnp.int32)
    last = 2 ** (DECADES + (not signed)) - 0.25  # the code of 1 is half an interval above the one before
    place = jnp.where(line >= last, place + 1, place)
    if not signed:
        return place - 1
    return jnp.where(x < 0, 127 - jnp.clip(place, 1, 127), 127 + place)


def dequantize(codes: jax.Array, absmax: jax.Array, signed: bool) -> jax.Array:
    """Return the float32 values of blocks of codes [..., 256]."""
    values = jax.lax.platform_dependent(
        codes, tpu=partial(_value, signed=signed), default=partial(_look_up, code_book(signed))
    )
    return values * absmax[..., None]


def _look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    """Return the elements of a table, placed like the index."""
    spec = sharding.placed(sharding.spec_of(index))
    return jnp.asarray(table).at[index.astype(jnp.int32)].get(mode="promise_in_bounds", out_sharding=spec)


def _value(codes: jax.Array, signed: bool) -> jax.Array:
    """Return the values of codes by arithmetic, off by at most 2 units in the last place.

    A TPU looks values up slowly. A GPU does not: there this arithmetic makes XLA write moments in float32. With the
    letters of `_line`, and k = n + i, the value is (9 (k + 1/2) - 8 n) / n * b, and b / n is a power of 5 times a
    constant.
    """
    code = codes.astype(jnp.int32)
    k = jnp.abs(code - 127) if signed else code + 1
    # The bits of 2k as float32: its exponent ends in the three bits of log2 n.
    twice = jax.lax.bitcast_convert_type(2 * k | 0x4B000000, jnp.float32) - 2.0**23
    bits = jax.lax.bitcast_convert_type(twice, jnp.int32)
    n_twice = jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    fives = [jnp.where(bits & 1 << 23 + i != 0, np.float32(5**2**i), np.float32(1)) for i in range(3)]
    value = (9 * twice + 9 - 8 * n_twice) * (fives[0] * fives[1] * fives[2]) * (0.5e-7 if signed else 0.5e-8)
    value = jnp.where(code == 255, 1, jnp.where(code == ZERO[signed], 0, value))
    return jnp.where(code < 127, -value, value) if signed else value


def divide(x: jax.Array, tensor: tuple[int, ...], fill: int = 0) -> jax.Array:
    """Divide a parameter, or stacked parameters, into blocks [..., 256] of consecutive elements of each `tensor`, the
    shape without the mesh's padding.

    Where blocks divide a row, the result is [..., row / 256, 256]: no element moves between devices that hold whole
    blocks. Else it is [blocks, 256], on every device, and `fill` is the rest of the last block.
    """
    if not tensor or tensor[-1] % BLOCK:
        stack = x.shape[: x.ndim - len(tensor)]
        x = sharding.reshard(x, P())[..., *map(slice, tensor)].reshape(*stack, math.prod(tensor))
        x = jnp.pad(x, [(0, 0)] * len(stack) + [(0, -x.shape[-1] % BLOCK)], constant_values=fill)
        return x.reshape(*stack, -1, BLOCK)
    *rows, last = sharding.spec_of(x)
    if x.shape[-1] != tensor[-1] or sharding.shape_on_device(x)[-1] % BLOCK:
        last = None
        x = sharding.reshard(x, P(*rows, last))[..., : tensor[-1]]
    return sharding.reshape(x, (*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK), P(*rows, last, None))


def join(blocks: jax.Array, tensor: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Join blocks of `divide` in the shape and placement of the array `like`, zeros in the mesh's padding."""
    if not tensor or tensor[-1] % BLOCK:
        stack = like.shape[: like.ndim - len(tensor)]
        x = blocks.reshape(*stack, -1)[..., : math.prod(tensor)].reshape(*stack, *tensor)
    else:
        spec = sharding.spec_of(blocks)
        x = sharding.reshape(blocks, (*blocks.shape[:-2], tensor[-1]), P(*spec[:-1]))
    if x.shape != like.shape:
        x = jnp.pad(x, [(0, whole - part) for whole, part in zip(like.shape, x.shape, strict=True)])
    return sharding.reshard(x, sharding.spec_of(like))
