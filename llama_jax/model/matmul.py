"""Multiply activations with a weight, and sum the weight's gradient over all devices.

Letters: B rows, T tokens, I inputs, O outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import placed


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project(out: P, exchange: bool, x: Float[Array, "B T I"], weight: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """Return x @ weight.T, placed by `out`; the weight's gradient is `weight_gradient`."""
    return jnp.einsum("BTI,OI->BTO", x, weight, out_sharding=placed(out))


def _project_bwd(out: P, exchange: bool, operands: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, weight = operands
    like_x, like_weight = (jax.typeof(operand).sharding.spec for operand in operands)
    dx = jnp.einsum("BTO,OI->BTI", dy, weight, out_sharding=placed(like_x))
    return dx, weight_gradient(dy, x, like_weight, exchange)


project.defvjp(lambda *args: (project(*args), args[2:]), _project_bwd)


def sum_dtype(dtype: Any) -> Any:
    """Return the type in which a weight's gradient, in products of `dtype`, is summed. Over devices it is float32, as
    the Trainer's ranks sum theirs; on a single device, where only the sum is rounded, `dtype`."""
    return np.dtype(np.float32 if sharding.sums_gradients() else dtype)


def weight_gradient(dy_BTO: jax.Array, x_BTI: jax.Array, spec: P, exchange: bool) -> jax.Array:
    """Return the gradient [O, I], in x's type, of a weight that `spec` places, of y = x @ weight.T.

    The devices' shares are added in `sum_dtype`, and the sum is rounded. With `exchange`, shares in bfloat16 are
    rounded before they are sent, as the Trainer's ranks round theirs. Devices exchange and add parts of the shares:
    half the traffic of a float32 scatter, and none of a GPU's multiprocessors (`platform.compiler_options`).
    """
    dtype, ways = x_BTI.dtype, sharding.axis_size(sharding.SHARDS)
    if ways == 1 or dtype != jnp.bfloat16 or not exchange:
        kind = sum_dtype(dtype)
        dw = jnp.einsum("BTO,BTI->OI", dy_BTO, x_BTI, out_sharding=placed(spec), preferred_element_type=kind)
        return dw.astype(dtype)
    axis = next(i for i, axes in enumerate(spec) if axes and set(sharding.SHARDS) <= set(axes))

    def of_device(dy: jax.Array, x: jax.Array) -> jax.Array:
        share = jnp.einsum("BTO,BTI->OI", dy, x)
        shape = (*share.shape[:axis], ways, share.shape[axis] // ways, *share.shape[axis + 1 :])
        parts = jax.lax.all_to_all(jnp.moveaxis(share.reshape(shape), axis, 0), sharding.SHARDS, 0, 0)
        return jax.lax.psum(jnp.sum(parts.astype(jnp.float32), axis=0), "data").astype(dtype)

    specs = tuple(jax.typeof(operand).sharding.spec for operand in (dy_BTO, x_BTI))
    return jax.shard_map(of_device, in_specs=specs, out_specs=spec)(dy_BTO, x_BTI)
