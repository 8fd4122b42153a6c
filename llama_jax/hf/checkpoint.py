"""Read a `checkpoint-N` folder of a run: its sealed JSON, its arrays, and its parameters as those of a model.

A checkpoint holds the folders `state` (arrays) and `run` (JSON), and beside them the small files of a model and the
marker `llama_jax.json`, or of an adapter `adapter_config.json`.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from llama_jax.base.bucket import absolute
from llama_jax.base.errors import InputError
from llama_jax.base.files import refuse_foreign_link
from llama_jax.distributed import processes, storage
from llama_jax.distributed.digest import sums
from llama_jax.distributed.platform import host_memory
from llama_jax.distributed.sharding import to_device
from llama_jax.hf.names import Path as Place
from llama_jax.hf.names import name_table, without_layer
from llama_jax.hf.tensor import Tensor
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.roles import Params, is_stacked

STATE, RUN = "state", "run"  # the folders of a checkpoint; the HF Trainer writes neither
FORMAT = 2  # of the JSON since 2026-11-29, which is sealed

# The fields of a state's named tuples, of which orbax makes keys; no parameter has such a name.
_FIELDS = re.compile(r"\['(step|params|opt_state|count|mu|nu|v|v_row|v_col|grad_norm|codes|absmax)'\]")

Json = dict[str, Any]


class Damaged(InputError):
    """Report a checkpoint that is not what was saved under its name."""


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint of this program."""
    return all((folder / item).is_dir() for item in (STATE, RUN))


@contextlib.contextmanager
def restoring(checkpoint: Path, besides: str = "") -> Iterator[None]:
    """Turn any exception into Damaged, unless memory is short or the disk fails: orbax and tensorstore raise many
    kinds."""
    try:
        yield
    except (JaxRuntimeError, MemoryError, InputError):
        raise
    except PermissionError as e:
        raise InputError(f"{checkpoint}: cannot be read: {e.strerror}: {e.filename}") from None
    except Exception as e:
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise Damaged(f"{checkpoint}: is damaged{besides}: {why}") from None


def seal(values: Json) -> str:
    """Return the SHA-256 of JSON values without their own seal."""
    text = json.dumps({key: value for key, value in values.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_sealed(checkpoint: Path) -> Json:
    """Read and check the JSON saved beside a state. Raises InputError, and Damaged where it is not what was saved."""
    with restoring(checkpoint):
        if not (checkpoint / RUN / "metadata").is_file():  # to open a FIFO blocks
            raise ValueError(f"{RUN}/metadata is no file")
        # Any one process may read it: without this, orbax waits for all of them.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        with ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
            values = checkpointer.restore(absolute(checkpoint) / RUN)
        if not isinstance(values, dict):
            raise ValueError("its JSON holds no object")
        # Older JSON has neither: two keys, so that the loss of one is seen.
        if ("format" in values or "seal" in values) and (values.get("format"), values.get("seal")) != (
            FORMAT,
            seal(values),
        ):
            raise ValueError("its JSON is not what was saved")
        return values


def restore(checkpoint: Path, abstract: Any, values: Json, part: bool = False) -> Any:
    """Restore the arrays of a checkpoint in the types and placements of `abstract`, a pytree of ShapeDtypeStruct, and
    compare them with the digests in `values`, its JSON. `part` permits the checkpoint to hold more arrays.

    A leaf of another length is taken for another mesh's padding. Raises InputError, and Damaged where the arrays are
    not what was saved. All processes raise the same.
    """
    state, error = None, ""
    try:
        with (
            restoring(checkpoint, ", or of another model or optimizer"),
            ocp.Checkpointer(storage.handler(abstract, is_large(abstract))) as checkpointer,
        ):
            state = checkpointer.restore(absolute(checkpoint) / STATE, args=storage.restore_args(abstract, part))
    except Damaged as e:
        error = str(e)
    if first := next(filter(None, processes.exchange(error)), None):
        raise Damaged(first)
    check_digests(checkpoint, state, values)
    return state


def is_large(abstract: Any) -> bool:
    """Return whether a state does not fit this host's memory twice."""
    return storage.tree_bytes(abstract) > host_memory() // 2


def check_digests(checkpoint: Path, state: Any, values: Json) -> None:
    """Raise Damaged where arrays of a checkpoint's state differ from the digests in its JSON."""
    saved = values.get("digests", {})  # checkpoints of before 2026-11-27 have none
    with restoring(checkpoint):
        found: Json = (sums if "format" in values else _old_digests)(state) if saved else {}
        if isinstance(state, dict):  # of a file or a part: its keys are names of the state's fields
            found = {_FIELDS.sub(r".\1", path): value for path, value in found.items()}
        wrong = [path for path, value in found.items() if saved[path] != value]
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(found)} arrays are not what was saved, {wrong[0]} first")


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """Return the sum of an array's elements as bits, each times an odd number made from its indices, uint32.

    Checkpoints of before 2026-11-29 hold it. One wrong bit always changes the sum; values that differ only in high bits
    may change places.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    for axis, odd in enumerate(np.asarray([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D], np.uint32)[: x.ndim]):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(bits).sharding)
        bits = bits * (2 * place * odd + 1)
    return bits.sum(dtype=jnp.uint32)


def _old_digests(state: Any) -> dict[str, int]:
    """Return the `_digest` of each array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): int(_digest(to_device(x))) for path, x in leaves}


# -- As a model -------------------------------------------------------------------------------------------------------


def restore_params(checkpoint: Path, abstract: Params, values: Json) -> Params:
    """Restore the trained parameters of a checkpoint as `restore` does, without the optimizer's arrays."""
    return restore(checkpoint, {"params": abstract}, values, part=True)["params"]


def load_params(checkpoint: Path, config: LlamaConfig, dtype: Any, mesh: Mesh) -> Params:
    """Restore the parameters of a model, saved in `dtype`, onto a mesh; layers are stacked as they were saved.

    Raises InputError for shapes that are not of `config`.
    """
    values, saved = read_sealed(checkpoint), _saved_params(checkpoint)
    stacked = is_stacked(saved)
    for name, (path, shape) in name_table(config).items():
        found = _shape(saved, path, stacked)
        if len(found) != len(shape) or any(a < b for a, b in zip(found, shape, strict=True)):
            raise InputError(f"{checkpoint}: {name!r} has shape {[*found] or 'none'}, config.json means {[*shape]}")
    run = RunOptions(param_dtype=dtype, scan_layers=stacked)
    return restore_params(checkpoint, define(config, run, mesh).params, values)


def host_tensors(checkpoint: Path, table: Mapping[str, tuple[Place, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Read all trained parameters of a checkpoint to the host, and return those of a table of names, paths and shapes.

    Names that the checkpoint lacks are left out. Meant for adapters, which are small.
    """
    values, shapes = read_sealed(checkpoint), _saved_params(checkpoint)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    args = ocp.args.PyTreeRestore({"params": abstract}, restore_args={"params": on_host}, partial_restore=True)
    with restoring(checkpoint), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        params = checkpointer.restore(absolute(checkpoint) / STATE, args=args)["params"]
    check_digests(checkpoint, {"params": jax.tree.map(jnp.asarray, params)}, values)
    stacked, tensors = is_stacked(params), {}
    for name, (path, shape) in table.items():
        if not (found := _shape(shapes, path, stacked)):
            continue
        leaf = _at(params, without_layer(path) if stacked else path)
        array = leaf[path[1]] if stacked and path[0] == "layers" else leaf
        inside = tuple(map(slice, shape)) if len(found) == len(shape) else ()  # a mesh pads
        tensors[name] = _in_memory(array[inside])
    return tensors


def host_state(checkpoint: Path) -> Json:
    """Read all arrays of a checkpoint to the host, as a tree with numbers for layers. Raises InputError and Damaged."""
    values = read_sealed(checkpoint)
    with restoring(checkpoint), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(absolute(checkpoint) / STATE).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=on_host)
        state = _numbered(checkpointer.restore(absolute(checkpoint) / STATE, args=args))
    check_digests(checkpoint, jax.tree.map(jnp.asarray, state), values)
    return state


def _in_memory(array: np.ndarray) -> Tensor:
    """Describe an array of the host as a tensor of a file."""
    return Tensor(array.shape, array.dtype, STATE, lambda index: array[index].copy())


def check_files(checkpoint: Path, folder: Path) -> None:
    """Compare the small files of a checkpoint's model, in `folder`, with the digests in its JSON. Raises Damaged."""
    values = read_sealed(checkpoint)
    with restoring(checkpoint):
        for name, digest in values.get("files", {}).items():
            path = folder / name
            refuse_foreign_link(folder, path)
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} is not what was saved")


def _saved_params(checkpoint: Path) -> Params:
    """Read the tree of the trained parameters' metadata, with numbers for layers. Raises Damaged."""
    with restoring(checkpoint):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(absolute(checkpoint) / STATE).item_metadata
        return _numbered(metadata.tree["params"])


def _numbered(tree: Any) -> Any:
    """Return a tree of strings as keys with the numbers among them as int."""
    if isinstance(tree, list):
        return [_numbered(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdecimal() else key: _numbered(value) for key, value in tree.items()}


def _at(tree: Any, path: Place) -> Any:
    """Return the leaf at a path of a tree, None where there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _shape(saved: Params, path: Place, stacked: bool) -> tuple[int, ...]:
    """Return the shape of a parameter by its path in the unstacked tree, () where the checkpoint has none."""
    leaf = _at(saved, without_layer(path) if stacked else path)
    if leaf is None or isinstance(leaf, dict):
        return ()
    if not (stacked and path[0] == "layers"):
        return tuple(leaf.shape)
    return tuple(leaf.shape[1:]) if isinstance(path[1], int) and path[1] < leaf.shape[0] else ()
