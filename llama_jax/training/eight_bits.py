"""Keep float32 arrays in 8 bits: codes in blocks of 256, and the largest magnitude of each block.

Code books, blocks and rounding are those of bitsandbytes' 8-bit optimizers (Dettmers et al. 2021, arXiv 2110.02861).
"""

import math
from functools import cache
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
    """Return the largest float32 that is rounded to each magnitude of a code but the last, and not to the next; of a
    signed code then those of negative numbers."""
    magnitudes = code_book(signed)[ZERO[signed] :].astype(np.float64)
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    nearest = middle.astype(np.float32)
    before = np.nextafter(nearest, np.float32(0))
    positive, negative = np.where(nearest > middle, before, nearest), np.where(nearest >= middle, before, nearest)
    return np.concatenate([positive, negative]) if signed else positive


def absmax(blocks: jax.Array) -> jax.Array:
    """Return the largest magnitude of each block [..., 256]."""
    return jnp.max(jnp.abs(blocks), axis=-1)


def quantize(blocks: jax.Array, absmax: jax.Array, signed: bool) -> jax.Array:
    """Return the nearest codes of blocks [..., 256], uint8, by the largest magnitude of each block.

    A tie goes to the lower code. A negative number keeps its sign, as in bitsandbytes' CUDA kernel, and is not rounded
    to 0. A block of zeros has codes 0, as an array that a mesh pads. A NaN makes its whole block NaN.
    """
    inverse = jnp.where(absmax < _LEAST, 0, 1 / absmax)
    x = blocks * inverse[..., None]
    size = jnp.minimum(jnp.abs(x), 1)
    # Codes are evenly spaced within a decade: arithmetic finds the code below, or the one below that. A bound decides.
    slope, offset = jnp.float32(0), jnp.float32(0)
    for decade in range(DECADES):
        count = 2 ** (decade + (not signed))
        inside = size >= 10.0 ** (decade - DECADES)
        slope = jnp.where(inside, 10.0 ** (DECADES - 1 - decade) * count / 0.9, slope)
        offset = jnp.where(inside, count * 8 / 9 - 0.5 - (not signed), offset)
    last = 127 if signed else 254
    below = jnp.clip(jnp.floor(size * slope + offset).astype(jnp.int32), 0, last)
    bound = _look_up(_bounds(signed), jnp.where(x < 0, below + last + 1, below) if signed else below)
    code = below + (size > bound)
    if signed:
        code = jnp.where(x < 0, 127 - jnp.clip(code, 1, 127), 127 + code)
    return jnp.where(absmax[..., None] == 0, 0, code).astype(jnp.uint8)


def dequantize(codes: jax.Array, absmax: jax.Array, signed: bool) -> jax.Array:
    """Return the float32 values of blocks of codes [..., 256]."""
    return _look_up(code_book(signed), codes) * absmax[..., None]


def _look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    """Return the elements of a table, placed like the index."""
    spec = sharding.placed(sharding.spec_of(index))
    return jnp.asarray(table).at[index.astype(jnp.int32)].get(mode="promise_in_bounds", out_sharding=spec)


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
