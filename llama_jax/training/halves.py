"""Float32 weights as their nearest bfloat16 and the bits that rounding took: an update loses none of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.model.llama import RunOptions


def split_bits(x: Float[Array, "..."]) -> tuple[jax.Array, jax.Array]:
    """The nearest bfloat16 of a float32 (of two, that away from zero), and the difference of its bits to the float32's
    as int16."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), (bits + 0x8000) >> 16)
    lower = (bits - (upper << 16)).astype(jnp.uint16)
    upper = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return upper, jax.lax.bitcast_convert_type(lower, jnp.int16)


def halve(
    params: dict[str, Any], run: RunOptions, split: Callable[[jax.Array], tuple[jax.Array, jax.Array]] = split_bits
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The parameters that the model computes with, and the bits that rounding took from them.

    Where matmuls are in bfloat16 and parameters in float32, the matmuls' weights are taken apart (`split_bits`): the
    second tree has their lower halves, and None in the places of all others. `join` gives the float32 back, bit for
    bit; a NaN stays one. Otherwise that tree is None.
    """
    if (run.param_dtype, run.compute_dtype) != (jnp.float32, jnp.bfloat16):
        return params, None

    def of_weight(path, x):
        in_matmul = any(str(k.key).endswith("_proj") or k.key == "lm_head" for k in path)
        return split(x) if in_matmul else (x, None)

    halves = jax.tree_util.tree_map_with_path(of_weight, params)
    upper, lower = (jax.tree.map(lambda _, h, i=i: h[i], params, halves) for i in (0, 1))
    return upper, lower


def join(params: dict[str, Any], lower: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters of which `halve` made these."""
    if lower is None:
        return params

    def whole(low, x):
        if low is None:
            return x
        upper = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(upper + low.astype(jnp.uint32), jnp.float32)

    return jax.tree.map(whole, lower, params, is_leaf=lambda x: x is None)
