"""Import every private or experimental name that the project takes from its libraries.

Each entry names the missing public API. Heavy modules are imported on the first call.
"""

from typing import Any

import jax

# Missing: whether this host has TPUs, before a backend starts.
from jax._src import cloud_tpu_init as _cloud_tpu_init

# Missing: the detection of a cluster without joining it; the key-value store, the place of a process and SIGTERM's
# handler of `jax.distributed`.
from jax._src import clusters as _clusters
from jax._src import distributed as _distributed

# Missing: barriers and preemption notices outside `jax.experimental`.
from jax.experimental import multihost_utils as multihost_utils

# Missing: a `jax.make_mesh` that takes a mesh shape of several slices; a device order for a reshaped mesh.
from jax.experimental.mesh_utils import create_device_mesh as create_device_mesh
from jax.experimental.mesh_utils import create_hybrid_device_mesh as create_hybrid_device_mesh


def find_cluster() -> Any:
    """Return the environment that `jax.distributed.initialize` would detect without arguments, or None."""
    kinds = [kind for kind in _clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    return next((kind for kind in kinds if kind.is_env_present()), None)


def on_tpu_host() -> bool:
    """Return whether jax found TPUs and libtpu on this host."""
    return bool(_cloud_tpu_init.running_in_cloud_tpu_vm)


def key_value_store() -> Any:
    """Return the client of the key-value store of all processes, which `jax.distributed.initialize` starts."""
    store = _distributed.global_state.client
    assert store is not None
    return store


def place_in_run() -> tuple[int, int]:
    """Return the number of this process and of all, before a backend starts, which `jax.process_index` would do."""
    state = _distributed.global_state
    assert state.process_id is not None and state.num_processes is not None
    return state.process_id, state.num_processes


def watch_sigterm() -> None:
    """Catch SIGTERM as the preemption notice of all processes, later than `jax.distributed.initialize` would."""
    jax.config.update("jax_enable_preemption_service", True)
    _distributed.global_state.initialize_preemption_sync_manager()


def piecewise_transfer() -> Any:
    """Return an orbax callback that moves no array to the host before the earlier arrays are written.

    The public option `is_prioritized_key_fn` has no effect in orbax 0.12; the array handler's callback has.
    """
    from orbax.checkpoint._src.serialization import types

    class InPieces(types.DefaultSerializationStatusCallback):
        def key_priority(self, keypath: Any) -> types.TransferPriority:
            return types.TransferPriority.ASYNCHRONOUS_DEPRIORITIZED

    return InPieces()


def cudnn_attention() -> Any:
    """Return the module of cuDNN's attention. `jax.nn.dot_product_attention` takes no offsets of packed segments."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def splash_attention() -> tuple[Any, Any]:
    """Return the modules of Splash attention and of its masks, which jax has in `jax.experimental` only."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    return splash_attention_kernel, splash_attention_mask


def tpu_topology(name: str, **options: Any) -> list[Any]:
    """Return the devices of a TPU topology from its compiler, which `jax.experimental.topologies` alone describes."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(name, "tpu", **options).devices)
