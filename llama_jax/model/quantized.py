"""Hold frozen matrices in 4 or 8 bits, dequantize them and multiply with them.

The formats are those of bitsandbytes: NF4 in blocks of 64 with plain or nested statistics, and int8 by output. The
dequantized values are bit-equal to those of its CPU build, but devices flush subnormal numbers to zero. With 8 bits,
LLM.int8() also quantizes activations, except for columns of outliers; here activations keep their type.

Letters: B rows, T tokens, I inputs, O outputs, G groups of BLOCK inputs, H half a group, S groups of statistics.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8
from typing_extensions import TypeIs

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import placed

BLOCK, STATISTICS = 64, 256  # weights that share a statistic, and statistics that share a scale
HALF = BLOCK // 2
FEW = 128  # tokens: for fewer, the reading of a matrix takes longer than its product
_NEGATIVE = "-1.0 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036"
_POSITIVE = "0.0 0.0795803 0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1.0"
LEVELS = np.array(f"{_NEGATIVE} {_POSITIVE}".split(), np.float32)


class NF4(NamedTuple):
    """Hold a matrix in 4 bits. The high half of a byte is input i of a group, the low half input i + HALF.

    Inputs come first: a TPU then spreads a statistic over sublanes and unpacks whole tiles. By the compiler for v5e, a
    matrix of 4096 x 4096 takes 274,000 cycles; with outputs first 493,000; in the order of bitsandbytes 1,122,000.
    The leaves are arrays of NumPy or JAX, their shapes, or their placements.
    """

    codes: Any  # [G, H, O] uint8
    absmax: Any  # [G, O] float32; nested, codes in uint8
    scales: Any = None  # nested: [S] float32, for each STATISTICS codes in torch's order
    offset: Any = None  # nested: float32, the mean of the statistics


class INT8(NamedTuple):
    """Hold a matrix in 8 bits: round(127 * weight / absmax), with the absmax of each output."""

    codes: Any  # [O, I] int8
    absmax: Any  # [O] float32


class Quantization(NamedTuple):
    """Hold the format of a model's frozen projections: `bits` are 4 or 8; `nested` quantizes 4 bits' statistics too."""

    bits: int
    nested: bool = False

    def abstract(self, out_in: tuple[int, int]) -> NF4 | INT8:
        """Return the shapes and types of a matrix [O, I]."""
        (outputs, inputs), array = out_in, jax.ShapeDtypeStruct
        if self.bits == 8:
            return INT8(array(out_in, np.int8), array((outputs,), np.float32))
        groups = inputs // BLOCK
        codes = array((groups, HALF, outputs), np.uint8)
        if not self.nested:
            return NF4(codes, array((groups, outputs), np.float32))
        scales = array((-(-outputs * groups // STATISTICS),), np.float32)
        return NF4(codes, array((groups, outputs), np.uint8), scales, array((), np.float32))


def empty(quantization: Quantization, out_in: tuple[int, int], spec: P, name: str) -> NF4 | INT8:
    """Return a matrix [O, I] of zero codes, whose weights `spec` places.

    The inputs of a matrix in 4 bits must be whole blocks. Raises InputError.
    """
    if quantization.bits == 4 and out_in[1] % BLOCK:
        raise InputError(
            f"{name}: 4 bits need a multiple of {BLOCK} inputs, but the matrix has {out_in[1]}; "
            "use --load_in_8bit in place of --load_in_4bit"
        )
    abstract = quantization.abstract(out_in)

    def zeros(array: jax.ShapeDtypeStruct, spec: P) -> jax.Array:
        return jnp.zeros(array.shape, array.dtype, out_sharding=placed(spec))

    return jax.tree.map(zeros, abstract, specs(abstract, spec, name))


def is_quantized(value: Any) -> TypeIs[NF4 | INT8]:
    """Return whether a leaf of a parameter tree is a quantized matrix."""
    return isinstance(value, NF4 | INT8)


def quantized_bytes(q: NF4 | INT8) -> int:
    """Return the bytes of a quantized matrix, or of its shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(q))


def specs(q: NF4 | INT8, spec: P, name: str) -> Any:
    """Return the placement of each array of a matrix [O, I] that `spec` places, on the mesh that is set.

    A device's part of the inputs of a 4-bit matrix must be whole groups. Raises InputError.
    """
    outputs, inputs = spec
    if isinstance(q, INT8):
        return INT8(spec, P(outputs))
    axes = (inputs,) if isinstance(inputs, str) else inputs or ()
    groups, ways = q.codes.shape[0], sharding.axis_size(axes)
    if groups % ways:
        raise InputError(
            f"--mesh: {name} in 4 bits has {groups * BLOCK} inputs, {groups} blocks of {BLOCK}, which "
            f"{' x '.join(axes)} of size {ways} does not divide; use a size that divides {groups}"
        )
    nested = (None, None) if q.scales is None else (P(None), P())
    return NF4(P(inputs, None, outputs), P(inputs, outputs), *nested)


def dequantize(q: NF4 | INT8, dtype: Any) -> Float[Array, "O I"]:
    """Return the matrix in `dtype`: products in float32, rounded once."""
    if isinstance(q, INT8):
        return (q.codes.astype(jnp.float32) * q.absmax[:, None] * np.float32(1 / 127)).astype(dtype)
    inputs, _, outputs = jax.typeof(q.codes).sharding.spec
    codes = q.codes[:, None] >> np.array([4, 0], np.uint8)[:, None, None]  # [G, 2, H, O]
    values = (_levels(codes) * _absmax(q)[:, None, None]).astype(dtype)
    return jnp.reshape(values, (-1, values.shape[-1]), out_sharding=placed(P(inputs, outputs))).T


def _levels(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Return the level of the low 4 bits, by 15 selects. A gather takes 4 times the cycles on a v5e, and memory."""
    values: list[Any] = list(LEVELS)
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _absmax(q: NF4) -> Float[Array, "G O"]:
    """Return the statistics in float32, as an array of its own: fused, each weight would repeat the lookup."""
    if q.scales is None or q.offset is None:
        return q.absmax
    (groups, outputs), spec = q.absmax.shape, placed(jax.typeof(q.absmax).sharding.spec)
    index = (np.arange(outputs) * groups + np.arange(groups)[:, None]) // STATISTICS
    scales = q.scales.at[index].get(out_sharding=spec)
    levels = jnp.asarray(statistic_levels()).at[q.absmax].get(out_sharding=spec)
    # The minimum changes no value, as levels end at 1. Without it XLA makes product and sum a fused multiply-add.
    return jax.lax.optimization_barrier(jnp.minimum(levels * scales, scales) + q.offset)


@cache
def statistic_levels() -> np.ndarray:
    """Return bitsandbytes' 256 values of a statistic, ascending: 0, 1 and 7 decades, each finer than the one below."""
    decades = [10.0 ** (d - 6) * (0.1 + 0.9 * (np.arange(2**d) + 0.5) / 2**d) for d in range(7)]
    # torch rounds some of them up (2) or down (0) by a unit in the last place.
    ulps = "2210111222222120111010211111101111211211210111112112011121112212111111111012110111101111010101112111"
    ulps += "121111211111111111111111111"
    values = np.concatenate(decades).astype(np.float32).view(np.int32) + np.array(list(ulps), np.int32) - 1
    positive = values.view(np.float32)
    return np.concatenate([-positive[::-1], [0], positive, [1]], dtype=np.float32)


def quantized_matmul(x: Float[Array, "B T I"], q: NF4 | INT8, dtype: Any, out: P) -> Float[Array, "B T O"]:
    """Return x @ dequantize(q, dtype).T in `dtype`, placed by `out`. For few tokens int8 is not rounded to `dtype`.

    The backward pass dequantizes again: neither x nor the matrix is kept. `q` has no gradient.
    """
    x = x.astype(dtype)
    return _matmul(out, jax.typeof(x).sharding.spec, x, q)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(out: P, like_x: P, x: jax.Array, q: NF4 | INT8) -> jax.Array:
    if isinstance(q, INT8) and x.shape[0] * x.shape[1] < FEW:
        return _by_codes(out, x, _gathered(q)).astype(x.dtype)
    return jnp.einsum("BTI,OI->BTO", x, dequantize(_gathered(q), x.dtype), out_sharding=placed(out))


def _by_codes(out: P, x: jax.Array, q: INT8) -> jax.Array:
    """Return the float32 product of a few tokens. Codes are exact in any type of `x`, and sums are scaled: a GPU's
    product reads the codes themselves. Out of stacked layers it copies them first."""

    def product(x, codes, scale):
        sums = jnp.einsum(
            "BTI,OI->BTO", x, codes.astype(x.dtype), out_sharding=placed(out), preferred_element_type=jnp.float32
        )
        return sums * scale

    operands = x, q.codes, q.absmax * np.float32(1 / 127)
    if x.size > x.shape[-1] or x.shape[-1] % 2 or sharding.axis_size(sharding.AXES) > 1:
        return product(*operands)
    of_token = partial(_of_token, out)
    return jax.lax.platform_dependent(*operands, cuda=of_token, default=product)


def _of_token(out: P, x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the product of one token, [1, 1, O], as a GPU computes it fastest: a sum over pairs of codes.

    XLA reads four elements of a sum at a time: 4 bytes of codes, but 8 of pairs, as of weights in bfloat16.
    """
    outputs, inputs = codes.shape
    x, codes = sharding.reshard(x, P()), sharding.reshard(codes, P())  # all on one device
    pairs = jax.lax.bitcast_convert_type(codes.reshape(outputs, inputs // 2, 2), jnp.int16).astype(jnp.int32)
    first, second = (pairs << 24) >> 24, pairs >> 8
    x = jax.lax.optimization_barrier(x.reshape(inputs // 2, 2).astype(jnp.float32).T)  # once, not for each output
    terms = first.astype(jnp.float32) * x[0] + second.astype(jnp.float32) * x[1]
    return sharding.reshard(jnp.sum(terms * scale[:, None], axis=1)[None, None], out)


def _matmul_bwd(out: P, like_x: P, q: NF4 | INT8, dy: jax.Array):
    # Without the barrier XLA merges gather and dequantization with the forward pass's, and keeps their results.
    q, dy = jax.lax.optimization_barrier((q, dy))
    return jnp.einsum("BTO,OI->BTI", dy, dequantize(_gathered(q), dy.dtype), out_sharding=placed(like_x)), None


_matmul.defvjp(lambda out, like_x, x, q: (_matmul(out, like_x, x, q), q), _matmul_bwd)


def _gathered(q: Any) -> Any:
    """Gather the codes over SHARDS: a quarter of the traffic of gathering a matrix in bfloat16."""

    def gather(array: jax.Array) -> jax.Array:
        parts = ((part,) if isinstance(part, str) else part or () for part in jax.typeof(array).sharding.spec)
        kept = [tuple(axis for axis in part if axis not in sharding.SHARDS) for part in parts]
        return sharding.reshard(array, P(*(axes or None for axes in kept)))

    return jax.tree.map(gather, q)
