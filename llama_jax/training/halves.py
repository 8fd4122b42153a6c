"""Split float32 weights into their nearest bfloat16 and the bits that rounding took, so that updates lose no bit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.model.roles import Params


def split_bits(x: Float[Array, "..."]) -> tuple[jax.Array, jax.Array]:
    """Return the nearest bfloat16 of each float32, and the difference of their bits as int16.

    Of two nearest, the result is the one away from zero.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), (bits + 0x8000) >> 16)
    lower = (bits - (upper << 16)).astype(jnp.uint16)
    upper = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return upper, jax.lax.bitcast_convert_type(lower, jnp.int16)


def halve(
    params: Params,
    halved: Params | None,
    split: Callable[[jax.Array], tuple[jax.Array, jax.Array]] = split_bits,
) -> tuple[Params, Params | None]:
    """Return the parameters that the model computes with, and their lower halves.

    `halved` is a tree of booleans (`model.definition.Definition.halved`): parameters under true are split by `split`.
    The second tree has None for all others; it is None where `halved` is. `join` restores the float32 bit for bit,
    but for a NaN, which stays a NaN.
    """
    if halved is None:
        return params, None
    halves = jax.tree.map(lambda x, is_halved: split(x) if is_halved else (x, None), params, halved)
    upper, lower = (jax.tree.map(lambda _, pair, i=i: pair[i], params, halves) for i in (0, 1))
    return upper, lower


def join(params: Params, lower: Params | None) -> Params:
    """Return the whole parameters from both results of `halve`."""
    if lower is None:
        return params

    def whole(low, x):
        if low is None:
            return x
        upper = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(upper + low.astype(jnp.uint32), jnp.float32)

    return jax.tree.map(whole, lower, params, is_leaf=lambda x: x is None)
