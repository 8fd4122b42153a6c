"""Store trees of arrays on disk, by orbax."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llama_jax.base.bucket import absolute, remove_tree
from llama_jax.base.errors import InputError
from llama_jax.distributed.compat import piecewise_transfer

PARAMS_DIR = "params"  # of a Flax folder


def handler(state: Any, piecewise: bool = True, kind: Any = ocp.PyTreeCheckpointHandler) -> Any:
    """Return orbax's handler, of a kind, for a tree of arrays. `piecewise` moves it to the host in pieces."""
    # The limit of host memory beside the arrays. Orbax refuses an array that is larger.
    largest = max(tree_bytes(x) for x in jax.tree.leaves(state))
    gigabytes = math.ceil(max(4e9, 2 * largest) / 1e9)
    options: dict[str, Any] = {}
    if piecewise:
        arrays = ocp.type_handlers.ArrayHandler(callback=piecewise_transfer())
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        options = {"save_device_host_concurrent_gb": gigabytes, "type_handler_registry": registry}
    # Trained float32 does not compress, and trying costs seven times the time of writing.
    return kind(use_compression=False, save_concurrent_gb=gigabytes, restore_concurrent_gb=gigabytes, **options)


def restore_args(abstract: Any, part: bool = False) -> ocp.args.PyTreeRestore:
    """Return orbax's arguments to restore a tree into the types and placements of `abstract`, perhaps a part of it."""
    to_abstract = ocp.checkpoint_utils.construct_restore_args(abstract, strict=False)
    return ocp.args.PyTreeRestore(abstract, restore_args=to_abstract, partial_restore=part)


def save_params(folder: Path, params: Any) -> None:
    """Write unstacked parameters as the `params` of a Flax folder; a failed write leaves no file."""
    try:
        with ocp.Checkpointer(handler(params)) as checkpointer:
            checkpointer.save(absolute(folder) / PARAMS_DIR, args=ocp.args.PyTreeSave(params), force=True)
    except BaseException:
        _remove_unfinished(folder)
        raise


def _remove_unfinished(folder: Path, seconds: float = 5.0) -> None:
    """Remove the temporary folder of a failed write, again until tensorstore's other writes have ended too."""
    deadline = time.monotonic() + seconds
    while unfinished := [*folder.glob(f"{PARAMS_DIR}.orbax-checkpoint-tmp*")]:
        for path in unfinished:
            with contextlib.suppress(OSError):
                remove_tree(path)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def saved_shapes(folder: Path) -> Any:
    """Read the shapes of the `params` of a Flax folder, as a tree whose keys are strings. Raises InputError."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(absolute(folder) / PARAMS_DIR).item_metadata
            return jax.tree.map(lambda leaf: leaf.shape, metadata.tree)
    except (AttributeError, ValueError, KeyError, FileNotFoundError) as e:
        raise InputError(f"{folder / PARAMS_DIR}: is no complete checkpoint: {str(e).splitlines()[0][:200]}") from None


def load_params(folder: Path, abstract: Any) -> Any:
    """Read the `params` of a Flax folder into the types and placements of `abstract`. Raises InputError.

    The padding of the vocabulary is cut or filled with zeros.
    """
    try:
        with ocp.Checkpointer(handler(abstract)) as checkpointer:
            return checkpointer.restore(absolute(folder) / PARAMS_DIR, args=restore_args(abstract))
    except (ValueError, KeyError, FileNotFoundError) as e:
        reason = str(e).splitlines()[0][:200]
        raise InputError(f"{folder / PARAMS_DIR}: does not hold the parameters of its config.json: {reason}") from None


def tree_bytes(tree: Any) -> int:
    """Return the bytes of a tree of arrays, or of their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
