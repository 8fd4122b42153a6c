"""The mesh and the placement of every array: the only room that knows mesh axes.

One mesh with all axes always present; an axis of size 1 costs nothing, so there is no unsharded branch. The axes are
explicit: a parameter's spec is part of its type, and gradients and Adam moments get it without being told.

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
SHARDS = ("fsdp", "context")  # what divides weights: each device of `context` needs all of them, for tokens of its own
LONGEST_CONTEXT = 128  # devices; rows are multiples of so many tokens
# Programs that devices are told ahead: of some 40 that exchange something, the client of several CPUs comes to no end.
IN_FLIGHT = 8
VOCAB_MULTIPLE = 128  # rows of the vocabulary are padded to it, which keeps matmuls aligned

# Weights, by HF's [out, in] shapes.
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
PARTS_BXTD = P(BATCH, "context", None, None)
PARTS_BXTV = P(BATCH, "context", None, "tensor")
HEAD_VD = P("tensor", None)


def mesh_sizes(spec: str, devices: int, slices: int = 1) -> dict[str, int]:
    """The size of each axis for `--mesh spec` on so many devices. Raises InputError.

    "data=2,fsdp=4": axes left out are 1, and one may be -1, which takes the devices that the others leave. "auto" has
    all devices of a slice on `fsdp`: packing gives each of them as many rows, so that rows can always be divided.
    Between TPU slices lies a slow network: only `data` may run there.
    """
    sizes: dict[str, int] = {}
    for part in (f"data={slices},fsdp=-1" if spec == "auto" else spec).split(","):
        axis, equals, number = (x.strip() for x in part.partition("="))
        if axis not in AXES:
            raise InputError(f"--mesh {spec}: {axis!r} is no axis; give auto, or sizes of {', '.join(AXES)}")
        if axis in sizes:
            raise InputError(f"--mesh {spec}: {axis} stands there twice")
        if not equals or not re.fullmatch("-1|0*[1-9][0-9]*", number):
            raise InputError(f"--mesh {spec}: the size of {axis} should be a number above 0, or -1, as in {axis}=2")
        sizes[axis] = int(number)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise InputError(f"--mesh {spec}: {' and '.join(open_axes)} are -1; only one may be")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not open_axes and fixed != devices):
        wrong = "do not divide" if open_axes else "are not"
        raise InputError(
            f"--mesh {spec}: {fixed} device(s) {wrong} the {devices} that are there; let one axis be -1, or give auto"
        )
    sizes |= dict.fromkeys(open_axes, devices // fixed)
    if LONGEST_CONTEXT % (context := sizes.get("context", 1)):
        raise InputError(f"--mesh {spec}: context={context} should be a power of two, up to {LONGEST_CONTEXT}")
    if sizes.get("data", 1) % slices:
        raise InputError(f"--mesh {spec}: the devices are {slices} TPU slices; {slices} should divide data, as in auto")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(devices: list[Any] | None = None, spec: str = "auto") -> Mesh:
    """The mesh of all devices (or of those given) by `mesh_sizes`."""
    devices = jax.devices() if devices is None else devices
    # Devices of a dry run are of one slice, and have no number of it.
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    sizes = mesh_sizes(spec, len(devices), slices)
    # SHARDS are laid out as one axis: over both, a TPU gathers only along the order of its links, and sends twice as
    # much else. A side of a slice may hold parts of two axes, as tensor=2 of 4 x 4 x 4.
    within = [sizes["data"] // slices, sizes["fsdp"] * sizes["context"], sizes["tensor"]]
    if slices == 1:
        placed = create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        placed = create_hybrid_device_mesh(within, [slices, 1, 1], devices, allow_split_physical_axes=True)
    placed = placed.reshape(*sizes.values())
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def padded(size: int, *axes: str | tuple[str, ...], multiple: int = 1) -> int:
    """`size` rounded up so that these axes of the mesh that is set (or products of some), and `multiple`, divide it.

    What is added inside the model is zero, and stays so: neither its results nor its gradients are anything else.
    """
    multiple = math.lcm(multiple, *map(axis_size, axes))
    return -(-size // multiple) * multiple


def vocab_rows(vocab_size: int) -> int:
    """Rows of the embedding and of the head inside the model; those past `vocab_size` are zero and never used."""
    return padded(vocab_size, SHARDS, "tensor", multiple=VOCAB_MULTIPLE)


def column(outputs: int) -> P:
    """The spec of a projection [outputs, inputs] whose outputs lie over tensor, on the mesh that is set.

    A GPU gathers and scatters along an array's first axis: COLUMN_FD. With SHARDS on the second one it transposes the
    weight before, and parameters and moments around every update. That is left for outputs that the mesh does not
    divide.
    """
    return P("tensor", SHARDS) if outputs % axis_size(("tensor", *SHARDS)) else COLUMN_FD


def check_width(hidden_size: int) -> None:
    """Raises InputError where the mesh that is set does not divide the residual stream, which cannot be padded."""
    shape = {axis: axis_size(axis) for axis in AXES}
    fitting = {"context": math.gcd(hidden_size, shape["context"]), "tensor": math.gcd(hidden_size, shape["tensor"])}
    fitting["fsdp"] = math.gcd(hidden_size // fitting["context"], shape["fsdp"])
    fitting["data"] = math.prod(shape.values()) // math.prod(fitting.values())
    for axes in (SHARDS, ("tensor",)):
        if hidden_size % axis_size(axes):
            wrong = ",".join(f"{axis}={shape[axis]}" for axis in axes if axis == axes[0] or shape[axis] > 1)
            mend = ",".join(f"{axis}={fitting[axis]}" for axis in AXES if axis != "context" or shape[axis] > 1)
            raise InputError(f"--mesh: {wrong} does not divide hidden_size {hidden_size}; use {mend}")


def describe_mesh(mesh: Mesh) -> str:
    """The axes that divide anything, as `--mesh` takes them."""
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


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of a batch are divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_ways(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a row's tokens are divided into."""
    return mesh.shape["context"]


def row_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows [B, T], or [B], divided over the devices."""
    return NamedSharding(mesh, P(*ACT_BT[:ndim]))


def local_rows(mesh: Mesh, count: int) -> range:
    """Those of `count` rows that the devices of this process hold."""
    places = row_sharding(mesh, 1).addressable_devices_indices_map((count,)).values()
    bounds = [index[0].indices(count) for index in places if index is not None]
    return range(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def put(mesh: Mesh, array: np.ndarray, count: int | None = None) -> jax.Array:
    """A host array of rows [B, T] or [B] onto the devices, divided; with `count` it has the `local_rows` of so many."""
    first = 0 if count is None else local_rows(mesh, count).start
    shape = (array.shape[0] if count is None else count, *array.shape[1:])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(shape[0])
        return array[start - first : stop - first, *index[1:]]

    return jax.make_array_from_callback(shape, row_sharding(mesh, array.ndim), part)


def put_scalar(mesh: Mesh, value: np.number) -> jax.Array:
    """The same number on all devices."""
    return jax.make_array_from_callback((), replicated(mesh), lambda _: np.asarray(value))


def whole(array: jax.Array) -> jax.Array:
    """The array as each process can read it: what lies on devices of others is gathered onto its own, which all
    processes have to ask for."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    assert isinstance(array.sharding, NamedSharding)
    return jax.block_until_ready(_gather(array.sharding.mesh)(array))


@cache
def _gather(mesh: Mesh | AbstractMesh) -> Callable[[jax.Array], jax.Array]:
    """Of a mesh once: what is jitted anew compiles anew."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def keep_pace(results: Sequence[Any]) -> None:
    """Of programs whose results these are, waits for the one told IN_FLIGHT before the last."""
    if len(results) > IN_FLIGHT:
        jax.block_until_ready(results[-1 - IN_FLIGHT])


def read(tree: Any) -> Any:
    """Host copies of a tree of arrays, by `whole`."""
    return jax.device_get(jax.tree.map(whole, tree))


def shape_on_device(array: jax.Array) -> tuple[int, ...]:
    """The shape of the part of an array, or of a tracer, that a device holds."""
    return jax.typeof(array).sharding.shard_shape(array.shape)


def bytes_on_device(tree: Any) -> int:
    """Bytes that a device holds of a tree of arrays, or of their shapes with placements."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def sums_gradients() -> bool:
    """Whether devices of the mesh that is set have tokens of their own: a weight's gradient is then a sum over them."""
    return axis_size((*BATCH, "context")) > 1


def exchanges(mesh: Mesh) -> bool:
    """Whether `weight_gradient` exchanges shares on this mesh: where what SHARDS divide lies within a process, whose
    devices are no TPUs. Over a network, and along a TPU's links, an exchange sends more than a scatter."""
    groups = mesh.devices.transpose(0, 3, 1, 2).reshape(-1, mesh.shape["fsdp"] * mesh.shape["context"])
    local = all(len({device.process_index for device in group}) == 1 for group in groups)
    return local and mesh.devices.flat[0].platform != "tpu"


def in_parts(array_BT: jax.Array) -> jax.Array:
    """Rows [B, T, ...] as [B, X, T / X, ...], X the devices that a row is divided over: the parts of the third axis can
    be taken one by one, each device having its own."""
    (B, T, *rest), X = array_BT.shape, axis_size("context")
    spec = P(BATCH, "context", None, *[None] * len(rest))
    return jax.lax.reshape(array_BT, (B, X, T // X, *rest), out_sharding=placed(spec))


def in_rows(array_BXT: jax.Array) -> jax.Array:
    """What `in_parts` took apart."""
    B, X, T, *rest = array_BXT.shape
    spec = P(BATCH, "context", *[None] * len(rest))
    return jax.lax.reshape(array_BXT, (B, X * T, *rest), out_sharding=placed(spec))


def stacked(spec: P) -> P:
    """The spec of weights with the layer axis in front."""
    return P(None, *spec)


def on(mesh: Mesh, aval: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An abstract array whose spec came from `eval_shape`, placed on the devices of `mesh`."""
    spec = aval.sharding.spec if aval.sharding is not None else P()
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=NamedSharding(mesh, spec))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
