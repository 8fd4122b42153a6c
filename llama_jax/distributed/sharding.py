"""Lay out the mesh and place every array on it: the only file that knows mesh axes.

One mesh has all axes always; an axis of size 1 costs nothing, so there is no unsharded branch. The axes are explicit: a
parameter's spec is part of its type, and gradients and Adam moments inherit it. Outside a mesh, arrays have no spec.

Letters: B rows, T tokens, D model, N heads, K kv heads, H head dim, F ffn (or any output of a projection), V vocab,
X parts of a row.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.base.errors import InputError
from llama_jax.distributed.compat import create_device_mesh, create_hybrid_device_mesh

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")
SHARDS = ("fsdp", "context")  # axes that divide weights: each device of `context` needs all, for its own tokens
LONGEST_CONTEXT = 128  # devices; rows are multiples of 128 tokens
# Programs dispatched ahead: XLA's CPU client deadlocks when about 40 collectives are in flight.
IN_FLIGHT = 8
HOST = "pinned_host"  # jax's name of a host's memory that a device's copy engines reach
VOCAB_MULTIPLE = 128  # rows of the vocabulary are padded to it, which keeps matmuls aligned

# Weights, in HF's [out, in] shapes.
COLUMN_FD = P(("tensor", *SHARDS), None)  # q, k, v, gate, up, lm_head: outputs over tensor (`column`)
ROW_DF = P(SHARDS, "tensor")  # o, down: inputs over tensor
EMBED_VD = P(SHARDS, "tensor")  # gathered by row: a feature axis on SHARDS would be gathered whole
COLUMN_BIAS = P("tensor")
REPLICATED = P(None)

# Activations.
ACT_BT = P(BATCH, "context")
ACT_BTD = P(BATCH, "context", None)
ACT_BTF = P(BATCH, "context", "tensor")
ACT_BTNH = P(BATCH, "context", "tensor", None)
CACHE_BKSH = P(BATCH, "tensor", None, None)
PARTS_BXTD = P(BATCH, "context", None, None)
PARTS_BXTV = P(BATCH, "context", None, "tensor")
HEAD_VD = P("tensor", None)


def mesh_sizes(spec: str, devices: int, slices: int = 1) -> dict[str, int]:
    """Return the size of each axis for `--mesh spec` on this number of devices. Raises InputError.

    In "data=2,fsdp=4" an omitted axis has size 1. An axis of -1 takes the remaining devices; only one axis may be -1.
    "auto" puts all devices of a slice on `fsdp`: packing gives each device equally many rows, so rows always divide.
    The network between TPU slices is slow: only `data` may cross it.
    """
    sizes: dict[str, int] = {}
    for part in (f"data={slices},fsdp=-1" if spec == "auto" else spec).split(","):
        axis, equals, number = (x.strip() for x in part.partition("="))
        if axis not in AXES:
            raise InputError(f"--mesh {spec}: unknown axis {axis!r}; give auto, or sizes of {', '.join(AXES)}")
        if axis in sizes:
            raise InputError(f"--mesh {spec}: {axis} is given twice")
        if not equals or not re.fullmatch("-1|0*[1-9][0-9]*", number):
            raise InputError(f"--mesh {spec}: the size of {axis} should be a number above 0, or -1, as in {axis}=2")
        sizes[axis] = int(number)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise InputError(f"--mesh {spec}: {' and '.join(open_axes)} are -1; only one axis may be")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not open_axes and fixed != devices):
        wanted = "a multiple of " if open_axes else ""
        raise InputError(
            f"--mesh {spec}: needs {wanted}{fixed} device(s), but there are {devices}; set one axis to -1, or give auto"
        )
    sizes |= dict.fromkeys(open_axes, devices // fixed)
    if LONGEST_CONTEXT % (context := sizes.get("context", 1)):
        raise InputError(f"--mesh {spec}: context={context} should be a power of two, up to {LONGEST_CONTEXT}")
    if sizes.get("data", 1) % slices:
        raise InputError(f"--mesh {spec}: on {slices} TPU slices, data should be a multiple of {slices}, as in auto")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(devices: list[Any] | None = None, spec: str = "auto") -> Mesh:
    """Lay out all devices, or the given ones, as a mesh of `mesh_sizes`. Raises InputError."""
    devices = jax.devices() if devices is None else devices
    # Devices of a dry run belong to one slice and have no slice_index.
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    sizes = mesh_sizes(spec, len(devices), slices)
    # SHARDS are laid out as one axis: a TPU gathers over both along the order of its links; any other order sends
    # twice as much. A side of a slice may hold parts of two axes, as tensor=2 of 4 x 4 x 4.
    within = [sizes["data"] // slices, sizes["fsdp"] * sizes["context"], sizes["tensor"]]
    if slices == 1:
        placed = create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        placed = create_hybrid_device_mesh(within, [slices, 1, 1], devices, allow_split_physical_axes=True)
    placed = placed.reshape(*sizes.values())
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def padded(size: int, *axes: str | tuple[str, ...], multiple: int = 1) -> int:
    """Return `size` rounded up so that these axes of the mesh that is set, or their products, and `multiple` divide it.

    Padding inside the model is zero and stays zero: so are its results and its gradients.
    """
    multiple = math.lcm(multiple, *map(axis_size, axes))
    return -(-size // multiple) * multiple


def vocab_rows(vocab_size: int) -> int:
    """Return the rows of the embedding and of the head inside the model; rows past `vocab_size` are zero and unused."""
    return padded(vocab_size, SHARDS, "tensor", multiple=VOCAB_MULTIPLE)


def column(outputs: int) -> P:
    """Return the spec of a projection [outputs, inputs] with its outputs over tensor, on the mesh that is set.

    A GPU gathers and scatters along an array's first axis: COLUMN_FD. With SHARDS on the second axis a GPU transposes
    the weight first, and parameters and moments around every update. Only outputs that the mesh does not divide use it.
    """
    return P("tensor", SHARDS) if outputs % axis_size(("tensor", *SHARDS)) else COLUMN_FD


def check_width(hidden_size: int) -> None:
    """Check that the mesh that is set divides the residual stream, which cannot be padded. Raises InputError."""
    shape = {axis: axis_size(axis) for axis in AXES}
    fitting = {"context": math.gcd(hidden_size, shape["context"]), "tensor": math.gcd(hidden_size, shape["tensor"])}
    fitting["fsdp"] = math.gcd(hidden_size // fitting["context"], shape["fsdp"])
    fitting["data"] = math.prod(shape.values()) // math.prod(fitting.values())
    for axes in (SHARDS, ("tensor",)):
        if hidden_size % axis_size(axes):
            wrong = ",".join(f"{axis}={shape[axis]}" for axis in axes if axis == axes[0] or shape[axis] > 1)
            fix = ",".join(f"{axis}={fitting[axis]}" for axis in AXES if axis != "context" or shape[axis] > 1)
            raise InputError(f"--mesh: {wrong} does not divide hidden_size {hidden_size}; use {fix}")


def describe_mesh(mesh: Mesh) -> str:
    """Return the axes of size above 1, as `--mesh` takes them."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "fsdp=1"


def axis_size(axes: str | tuple[str, ...]) -> int:
    """Return the size of an axis of the mesh that is set, or the product of several sizes; outside a mesh, 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def placed(spec: P) -> P | None:
    """Return the `out_sharding` of an operation: the spec, or None outside a mesh, where jax refuses any spec."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def reshard(array: jax.Array, spec: P) -> jax.Array:
    """Return the array as `spec` divides it on the mesh that is set; outside a mesh, as it is."""
    return array if placed(spec) is None else jax.sharding.reshard(array, spec)


def reshape(array: jax.Array, shape: tuple[int, ...], spec: P) -> jax.Array:
    """Reshape an array, its result divided by `spec` on the mesh that is set."""
    return jax.lax.reshape(array, shape, out_sharding=placed(spec))


def spec_of(array: jax.Array) -> P:
    """Return the spec of an array or a tracer, with an entry for each axis."""
    spec = jax.typeof(array).sharding.spec
    return P(*spec, *[None] * (array.ndim - len(spec)))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts that the rows of a batch are divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_ways(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts that a row's tokens are divided into."""
    return mesh.shape["context"]


def row_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Return the sharding of rows [B, T], or [B], over the devices."""
    return NamedSharding(mesh, P(*ACT_BT[:ndim]))


def local_rows(mesh: Mesh, count: int) -> range:
    """Return the range of `count` rows that the devices of this process hold."""
    places = row_sharding(mesh, 1).addressable_devices_indices_map((count,)).values()
    bounds = [index[0].indices(count) for index in places if index is not None]
    return range(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def put(mesh: Mesh, array: np.ndarray, count: int | None = None) -> jax.Array:
    """Place a host array of rows [B, T] or [B] on the devices, divided.

    With `count`, the global array has that many rows, and `array` holds the `local_rows` of this process.
    """
    first = 0 if count is None else local_rows(mesh, count).start
    shape = (array.shape[0] if count is None else count, *array.shape[1:])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(shape[0])
        return array[start - first : stop - first, *index[1:]]

    return jax.make_array_from_callback(shape, row_sharding(mesh, array.ndim), part)


def put_scalar(mesh: Mesh, value: np.number) -> jax.Array:
    """Place a number on all devices."""
    return jax.make_array_from_callback((), replicated(mesh), lambda _: np.asarray(value))


def whole(array: jax.Array) -> jax.Array:
    """Gather an array so that each process can read it from its own devices. All processes must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    assert isinstance(array.sharding, NamedSharding)
    return jax.block_until_ready(_gather(array.sharding.mesh)(array))


@cache
def _gather(mesh: Mesh | AbstractMesh) -> Callable[[jax.Array], jax.Array]:
    """Compile the gather once for each mesh: a new `jax.jit` would compile again."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def keep_pace(results: Sequence[Any]) -> None:
    """Block until at most IN_FLIGHT dispatched programs are outstanding; `results` holds an output of each."""
    if len(results) > IN_FLIGHT:
        jax.block_until_ready(results[-1 - IN_FLIGHT])


def read(tree: Any) -> Any:
    """Copy a tree of arrays to the host, gathered by `whole`."""
    return jax.device_get(jax.tree.map(whole, tree))


def shape_on_device(array: jax.Array) -> tuple[int, ...]:
    """Return the shape of a device's part of an array, or of a tracer."""
    return jax.typeof(array).sharding.shard_shape(array.shape)


def bytes_on_device(tree: Any) -> int:
    """Return a device's bytes of a tree of arrays, or of their shapes with placements, those on the host left out."""
    return sum(_bytes_of_part(x) for x in jax.tree.leaves(tree) if not is_on_host(x))


def bytes_on_host(tree: Any) -> int:
    """Return the bytes in a host's memory that a device has of a tree of arrays, or of their shapes with placements."""
    return sum(_bytes_of_part(x) for x in jax.tree.leaves(tree) if is_on_host(x))


def _bytes_of_part(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def is_on_host(x: Any) -> bool:
    """Return whether an array, or a shape with its placement, is in the host's memory."""
    return x.sharding.memory_kind == HOST


def to_host(tree: Any) -> Any:
    """Copy a tree of arrays into the memory of their devices' hosts, divided as they are; of shapes, the placement."""
    return _moved(tree, HOST)


def to_device(tree: Any) -> Any:
    """Copy a tree of arrays from the hosts' memory back to their devices; of shapes, return the placement."""
    return _moved(tree, "device")


def _moved(tree: Any, kind: str) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    places = [x.sharding.with_memory_kind(kind) for x in leaves]
    if leaves and isinstance(leaves[0], jax.ShapeDtypeStruct):
        moved = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, places, strict=True)]
    else:
        moved = jax.device_put(leaves, places)
    return jax.tree.unflatten(structure, moved)


def sums_gradients() -> bool:
    """Return whether the mesh that is set divides tokens: a weight's gradient is then a sum over devices."""
    return axis_size((*BATCH, "context")) > 1


def exchanges(mesh: Mesh) -> bool:
    """Return whether `weight_gradient` exchanges shares on this mesh: SHARDS stay within a process, on CPUs or GPUs.

    Over a network, and along a TPU's links, an exchange sends more than a scatter.
    """
    groups = mesh.devices.transpose(0, 3, 1, 2).reshape(-1, mesh.shape["fsdp"] * mesh.shape["context"])
    local = all(len({device.process_index for device in group}) == 1 for group in groups)
    return local and mesh.devices.flat[0].platform != "tpu"


def in_parts(array_BT: jax.Array) -> jax.Array:
    """Reshape rows [B, T, ...] to [B, X, T / X, ...], X the devices that divide a row.

    A slice of the third axis is then local: each device has its own part of each slice.
    """
    (B, T, *rest), X = array_BT.shape, axis_size("context")
    spec = P(BATCH, "context", None, *[None] * len(rest))
    return reshape(array_BT, (B, X, T // X, *rest), spec)


def in_rows(array_BXT: jax.Array) -> jax.Array:
    """Reshape [B, X, T / X, ...] back to rows [B, T, ...], after `in_parts`."""
    B, X, T, *rest = array_BXT.shape
    spec = P(BATCH, "context", *[None] * len(rest))
    return reshape(array_BXT, (B, X * T, *rest), spec)


def stacked(spec: P) -> P:
    """Return the spec of weights with the layer axis in front."""
    return P(None, *spec)


def on(mesh: Mesh, aval: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Place an abstract array, whose spec came from `eval_shape`, on the devices of `mesh`."""
    spec = aval.sharding.spec if aval.sharding is not None else P()
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=NamedSharding(mesh, spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that each device holds whole."""
    return NamedSharding(mesh, P())
