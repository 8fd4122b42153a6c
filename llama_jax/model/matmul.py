"""Multiply activations with a weight, in the compute type or in fp8, and sum the weight's gradient over all devices.

Letters: B rows, T tokens, I inputs, O outputs.
"""

import re
from collections.abc import Sequence
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


class Sum(NamedTuple):
    """Select how devices add their shares of a weight's gradient: by an exchange of parts (`weight_gradient`), and
    `rounded` to the products' type before they are added."""

    exchange: bool = False
    rounded: bool = False


SCATTER = Sum()


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
    return _rounded(x, _unit(jnp.max(jnp.abs(x)).astype(jnp.float32), dtype), dtype)


def _unit(largest: jax.Array, dtype: Any) -> jax.Array:
    """Return the smallest power of two by which the largest magnitude can be divided to fit the type.

    The arithmetic is on the bits of float32, in one kernel of the device; `frexp` and `ldexp` take several.
    """
    most = np.float32(jnp.finfo(dtype).max)  # 1.75 times a power of two, in both types
    bits, most_bits = jax.lax.bitcast_convert_type(largest, jnp.int32), int(most.view(np.int32))
    exponent, above = bits >> 23, (bits & 0x7FFFFF) > (most_bits & 0x7FFFFF)
    power = jnp.clip(exponent - (most_bits >> 23) + above.astype(jnp.int32), -126, 126)
    power = jnp.where(largest == 0, 0, power)
    unit = jnp.where(exponent == 255, 255 << 23 | 1, power + 127 << 23)  # a NaN, if the largest is not finite
    return jax.lax.bitcast_convert_type(unit, jnp.float32)


def _rounded(x: jax.Array, unit: jax.Array, dtype: Any) -> Scaled:
    return Scaled((x.astype(jnp.float32) * (1 / unit)).astype(dtype), unit)


def _transposed(scaled: Scaled) -> Scaled:
    """Return the values with their last axis first, in memory too.

    A GPU multiplies fp8 along the last axes of both operands. XLA would transpose anew for each product.
    """
    return Scaled(jax.lax.optimization_barrier(jnp.moveaxis(scaled.values, -1, 0)), scaled.unit)


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
def project(out: P, how: Sum, x: Float[Array, "B T I"], weight: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """Return x @ weight.T, placed by `out`; the weight's gradient is `weight_gradient`."""
    return _einsum("BTI,OI->BTO", x, weight, placed(out), x.dtype)


def _project_bwd(out: P, how: Sum, operands: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, weight = operands
    like_x, like_weight = (jax.typeof(operand).sharding.spec for operand in operands)
    dx = _einsum("BTO,OI->BTI", dy, weight, placed(like_x), dy.dtype)
    return dx, weight_gradient(dy, x, like_weight, how, dy.dtype)


project.defvjp(lambda *args: (project(*args), args[2:]), _project_bwd)


def project_apart(
    out: P, how: Sum, x: Float[Array, "B T I"], weights: Sequence[Float[Array, "O I"]]
) -> list[Float[Array, "B T O"]]:
    """Return x @ weight.T for each weight as `project`, from operands that a TPU computes once, before the products.

    XLA's fusions on a TPU compute an operand in each tile of a product anew: a norm, an activation, a rounding of a
    gradient. That is slower where the backward pass computes the operands again (BENCHMARKS.md, "Our program and
    MaxText's"). The programs of other devices do not change.
    """
    x = written("tpu", x)
    return [_written_backward(project(out, how, x, weight)) for weight in weights]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def written(platform: str, x: jax.Array) -> jax.Array:
    """Return a tensor unchanged. The platform's program ("tpu" or "cuda") has written it before its first use."""
    return jax.lax.platform_dependent(x, **{platform: jax.lax.optimization_barrier}, default=lambda x: x)


written.defjvp(lambda platform, primals, tangents: (written(platform, *primals), *tangents))


@jax.custom_vjp
def _written_backward(y: jax.Array) -> jax.Array:
    """Return a tensor unchanged. A TPU's program has written its gradient before the gradient's first use."""
    return y


_written_backward.defvjp(lambda y: (y, None), lambda _, dy: (written("tpu", dy),))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project_fp8(
    out: P, how: Sum, x: Float[Array, "B T I"], weights: Sequence[Float[Array, "O I"]]
) -> list[Float[Array, "B T O"]]:
    """Return x @ weight.T for each weight as `project`, by products of fp8. They share the fp8 values of `x`."""
    return _project_fp8_fwd(out, how, x, weights)[0]


def _project_fp8_fwd(out: P, how: Sum, x: jax.Array, weights: Sequence[jax.Array]):
    scaled, units = quantize(x, VALUES), []
    ys = []
    for weight in weights:
        of_weight = quantize(weight, VALUES)
        ys.append(_einsum("BTI,OI->BTO", scaled, of_weight, placed(out), x.dtype, fast=True))
        units.append(of_weight.unit)
    return ys, (_transposed(scaled), weights, units)


def _project_fp8_bwd(out: P, how: Sum, residuals: tuple[Scaled, Sequence[jax.Array], list], dys: list):
    x, weights, units = residuals
    *like, last = sharding.spec_of(x.values)
    dx, gradients = None, []
    for weight, unit, dy in zip(weights, units, dys, strict=True):
        scaled, of_weight = quantize(dy, GRADIENTS), _transposed(_rounded(weight, unit, VALUES))
        part = _einsum("BTO,IO->BTI", scaled, of_weight, placed(P(*like[1:], last, like[0])), dy.dtype)
        dx = part if dx is None else dx + part
        gradients.append(weight_gradient(_transposed(scaled), x, sharding.spec_of(weight), how, dy.dtype))
    return dx, gradients


project_fp8.defvjp(_project_fp8_fwd, _project_fp8_bwd)


def project_scaled(out: P, x: Float[Array, "B T I"], weight: Scaled) -> Float[Array, "B T O"]:
    """Return `project_fp8` by a frozen weight [O, I] that is in fp8 already. The backward pass does not keep `x`."""
    return _project_scaled(out, jax.typeof(x).sharding.spec, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project_scaled(out: P, like_x: P, x: jax.Array, weight: Scaled) -> jax.Array:
    return _einsum("BTI,OI->BTO", quantize(x, VALUES), weight, placed(out), x.dtype, fast=True)


def _project_scaled_bwd(out: P, like_x: P, weight: Scaled, dy: jax.Array):
    return _einsum("BTO,IO->BTI", quantize(dy, GRADIENTS), _transposed(weight), placed(like_x), dy.dtype), None


_project_scaled.defvjp(
    lambda out, like, x, weight: (_project_scaled(out, like, x, weight), weight), _project_scaled_bwd
)


def sum_dtype(dtype: Any) -> Any:
    """Return the type in which a weight's gradient, in products of `dtype`, is summed. Over devices it is float32, as
    the Trainer's ranks sum theirs; on a single device, where only the sum is rounded, `dtype`."""
    return np.dtype(np.float32 if sharding.sums_gradients() else dtype)


def weight_gradient(dy: Any, x: Any, spec: P, how: Sum, dtype: Any) -> jax.Array:
    """Return the gradient [O, I], in `dtype`, of a weight that `spec` places, of y = x @ weight.T.

    The operands are both plain, [B, T, O] and [B, T, I], or both `_transposed`, [O, B, T] and [I, B, T]. The devices'
    shares are added in `sum_dtype`, and the sum is rounded; in `dtype`, where `how.rounded`. With `how.exchange`,
    shares in bfloat16 are rounded before they are sent, as the Trainer's ranks round theirs. Devices exchange and add
    parts of the shares: half the traffic of a float32 scatter, and none of a GPU's multiprocessors
    (`platform.compiler_options`).
    """
    form = "OBT,IBT->OI" if isinstance(x, Scaled) else "BTO,BTI->OI"
    ways = sharding.axis_size(sharding.SHARDS)
    if ways == 1 or dtype != jnp.bfloat16 or how.rounded or not how.exchange:
        return _einsum(form, dy, x, placed(spec), dtype if how.rounded else sum_dtype(dtype)).astype(dtype)
    axis = next(i for i, axes in enumerate(spec) if axes and set(sharding.SHARDS) <= set(axes))

    def of_device(dy: Any, x: Any) -> jax.Array:
        share = _einsum(form, dy, x, None, dtype)
        shape = (*share.shape[:axis], ways, share.shape[axis] // ways, *share.shape[axis + 1 :])
        parts = jax.lax.all_to_all(jnp.moveaxis(share.reshape(shape), axis, 0), sharding.SHARDS, 0, 0)
        return jax.lax.psum(jnp.sum(parts.astype(jnp.float32), axis=0), "data").astype(dtype)

    specs = jax.tree.map(lambda operand: jax.typeof(operand).sharding.spec, (dy, x))
    return jax.shard_map(of_device, in_specs=specs, out_specs=spec)(dy, x)
