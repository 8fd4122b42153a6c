"""Multiply activations with a weight, in the compute type or in fp8, and sum the weight's gradient over all devices.

Letters: B rows, T tokens, I inputs, O outputs.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import placed

# Values of the forward pass have more bits, gradients more range.
VALUES, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2
_FP8_GPUS = r"\b(H100|H200|H800|H20|GH200|L4|L20|L40S?|G?B[123]00|Ada Generation|GeForce RTX [45]0\d\d)\b"


class Scaled(NamedTuple):
    """Hold a tensor in fp8: `values` times `unit`, a float32 scalar that is a power of two."""

    values: jax.Array
    unit: jax.Array


def check_fp8(device: Any) -> None:
    """Raise InputError for a device without fp8 matrix units; a device that only a dry run knows is judged by name."""
    capability = getattr(device, "compute_capability", None)
    has = float(capability) >= 8.9 if capability else bool(re.search(_FP8_GPUS, device.device_kind))
    if device.platform != "gpu" or not has:
        kind = device.device_kind
        raise InputError(f"--fp8 True: needs an NVIDIA GPU of Ada, Hopper or later, this is {kind}; leave it out")


def quantize(x: jax.Array, dtype: Any) -> Scaled:
    """Return the nearest fp8 values of a tensor whose largest element uses the type's range.

    The unit is a power of two: scaling rounds nothing. Each device of a mesh takes the largest element of all. An
    infinite or NaN element makes the result NaN. A stack [L, O, I] has a unit for each of its matrices.
    """
    most = float(jnp.finfo(dtype).max)
    top = int(np.log2(most))
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    mantissa, exponent = jnp.frexp(largest)  # mantissa in [0.5, 1)
    fits = mantissa * 2 ** (top + 1) <= most
    power = jnp.where(largest > 0, top + 1 - exponent - jnp.where(fits, 0, 1), 0)
    power = jnp.clip(power, -126, 126)
    up, unit = (jnp.ldexp(jnp.float32(1), p) for p in (power, -power))
    unit = jnp.where(jnp.isfinite(largest), unit, jnp.nan)
    return Scaled((x.astype(jnp.float32) * up).astype(dtype), unit)


def _einsum(form: str, a: Any, b: Any, out: P | None, dtype: Any, fast: bool = False) -> jax.Array:
    """Return a product of two plain or two scaled tensors, in `dtype`, placed by `out`.

    `fast` sums fp8 products as a GPU does fastest, in fewer bits than float32: XLA reads DEFAULT so (its pull request
    6599). Gradients are summed in float32. The multiplication by the unit becomes a factor of cuBLAS's call.
    """
    if not isinstance(a, Scaled):
        return jnp.einsum(form, a, b, out_sharding=out, preferred_element_type=dtype)
    precision = jax.lax.Precision.DEFAULT if fast else jax.lax.Precision.HIGHEST
    sums = jnp.einsum(form, a.values, b.values, out_sharding=out, preferred_element_type=dtype, precision=precision)
    return sums * (a.unit * b.unit).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project(out: P, exchange: bool, x: Float[Array, "B T I"], weight: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """Return x @ weight.T, placed by `out`; the weight's gradient is `weight_gradient`."""
    return _einsum("BTI,OI->BTO", x, weight, placed(out), x.dtype)


def _project_bwd(out: P, exchange: bool, operands: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, weight = operands
    like_x, like_weight = (jax.typeof(operand).sharding.spec for operand in operands)
    dx = _einsum("BTO,OI->BTI", dy, weight, placed(like_x), dy.dtype)
    return dx, weight_gradient(dy, x, like_weight, exchange, dy.dtype)


project.defvjp(lambda *args: (project(*args), args[2:]), _project_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project_fp8(out: P, exchange: bool, x: Float[Array, "B T I"], weight: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """Return x @ weight.T as `project`, by products of fp8. Projections of the same `x` share its fp8 values, as the
    compiler finds equal operations."""
    return _project_fp8_fwd(out, exchange, x, weight)[0]


def _project_fp8_fwd(out: P, exchange: bool, x: jax.Array, weight: jax.Array):
    operands = quantize(x, VALUES), quantize(weight, VALUES)
    return _einsum("BTI,OI->BTO", *operands, placed(out), x.dtype, fast=True), operands


def _project_fp8_bwd(out: P, exchange: bool, operands: tuple[Scaled, Scaled], dy: jax.Array):
    x, weight = operands
    like_x, like_weight = (jax.typeof(operand.values).sharding.spec for operand in operands)
    scaled = quantize(dy, GRADIENTS)
    dx = _einsum("BTO,OI->BTI", scaled, weight, placed(like_x), dy.dtype)
    return dx, weight_gradient(scaled, x, like_weight, exchange, dy.dtype)


project_fp8.defvjp(_project_fp8_fwd, _project_fp8_bwd)


def project_scaled(out: P, x: Float[Array, "B T I"], weight: Scaled) -> Float[Array, "B T O"]:
    """Return `project_fp8` by a frozen weight [O, I] that is in fp8 already. The backward pass does not keep `x`."""
    return _project_scaled(out, jax.typeof(x).sharding.spec, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project_scaled(out: P, like_x: P, x: jax.Array, weight: Scaled) -> jax.Array:
    return _einsum("BTI,OI->BTO", quantize(x, VALUES), weight, placed(out), x.dtype, fast=True)


def _project_scaled_bwd(out: P, like_x: P, weight: Scaled, dy: jax.Array):
    return _einsum("BTO,OI->BTI", quantize(dy, GRADIENTS), weight, placed(like_x), dy.dtype), None


_project_scaled.defvjp(
    lambda out, like, x, weight: (_project_scaled(out, like, x, weight), weight), _project_scaled_bwd
)


def sum_dtype(dtype: Any) -> Any:
    """Return the type in which a weight's gradient, in products of `dtype`, is summed. Over devices it is float32, as
    the Trainer's ranks sum theirs; on a single device, where only the sum is rounded, `dtype`."""
    return np.dtype(np.float32 if sharding.sums_gradients() else dtype)


def weight_gradient(dy_BTO: Any, x_BTI: Any, spec: P, exchange: bool, dtype: Any) -> jax.Array:
    """Return the gradient [O, I], in `dtype`, of a weight that `spec` places, of y = x @ weight.T.

    The operands are both plain, or both `Scaled`. The devices' shares are added in `sum_dtype`, and the sum is rounded.
    With `exchange`, shares in bfloat16 are rounded before they are sent, as the Trainer's ranks round theirs. Devices
    exchange and add parts of the shares: half the traffic of a float32 scatter, and none of a GPU's multiprocessors
    (`platform.compiler_options`).
    """
    ways = sharding.axis_size(sharding.SHARDS)
    if ways == 1 or dtype != jnp.bfloat16 or not exchange:
        return _einsum("BTO,BTI->OI", dy_BTO, x_BTI, placed(spec), sum_dtype(dtype)).astype(dtype)
    axis = next(i for i, axes in enumerate(spec) if axes and set(sharding.SHARDS) <= set(axes))

    def of_device(dy: Any, x: Any) -> jax.Array:
        share = _einsum("BTO,BTI->OI", dy, x, None, dtype)
        shape = (*share.shape[:axis], ways, share.shape[axis] // ways, *share.shape[axis + 1 :])
        parts = jax.lax.all_to_all(jnp.moveaxis(share.reshape(shape), axis, 0), sharding.SHARDS, 0, 0)
        return jax.lax.psum(jnp.sum(parts.astype(jnp.float32), axis=0), "data").astype(dtype)

    specs = jax.tree.map(lambda operand: jax.typeof(operand).sharding.spec, (dy_BTO, x_BTI))
    return jax.shard_map(of_device, in_specs=specs, out_specs=spec)(dy_BTO, x_BTI)
