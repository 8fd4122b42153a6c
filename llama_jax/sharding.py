"""The mesh and the placement of every array: the only room that knows mesh axes.

One mesh with all axes always present; an axis of size 1 costs nothing, so there is no unsharded branch. The axes are
explicit: a parameter's spec is part of its type, and gradients and Adam moments get it without being told.

Letters: B rows, T tokens, D model, N heads, K kv heads, H head dim, F ffn (or any output of a projection), V vocab.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Weights, by HF's [out, in] shapes.
COLUMN_FD = P("tensor", "fsdp")  # q, k, v, gate, up, lm_head: outputs over tensor
ROW_DF = P("fsdp", "tensor")  # o, down: inputs over tensor
EMBED_VD = P("fsdp", "tensor")  # gathered by row: a feature axis on fsdp would be gathered whole
COLUMN_BIAS = P("tensor")
REPLICATED = P(None)

# Activations.
ACT_BT = P(BATCH, None)
ACT_BTD = P(BATCH, None, None)
ACT_BTF = P(BATCH, None, "tensor")
ACT_BTNH = P(BATCH, None, "tensor", None)
ACT_BTKGH = P(BATCH, None, "tensor", None, None)
HEAD_VD = P("tensor", None)


def make_mesh(devices: list[Any] | None = None) -> Mesh:
    """All devices (or those given) on `fsdp`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((1, len(devices), 1), AXES, (AxisType.Explicit,) * 3, devices=devices)


def batch_ways(mesh: Mesh) -> int:
    """How many parts the rows of a batch are divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Rows [B, ...] divided over the devices."""
    return NamedSharding(mesh, P(BATCH, *[None] * (ndim - 1)))


def put(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """A host array of rows [B, ...] onto the devices, rows divided."""
    return jax.device_put(array, row_sharding(mesh, array.ndim))


def shape_on_device(array: jax.Array) -> tuple[int, ...]:
    """The shape of the part of an array, or of a tracer, that a device holds."""
    return jax.typeof(array).sharding.shard_shape(array.shape)


def bytes_on_device(tree: Any) -> int:
    """Bytes that a device holds of a tree of arrays, or of their shapes with placements."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def stacked(spec: P) -> P:
    """The spec of weights with the layer axis in front."""
    return P(None, *spec)


def on(mesh: Mesh, aval: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An abstract array whose spec came from `eval_shape`, placed on the devices of `mesh`."""
    spec = aval.sharding.spec if aval.sharding is not None else P()
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=NamedSharding(mesh, spec))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
