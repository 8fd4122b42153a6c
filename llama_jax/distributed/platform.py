"""Settings of JAX that hold for the whole process; jax's differences between versions live here and in sharding.py."""

import logging
import os
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.base.files import cache_folder

MEMORY_SHARE = 0.98  # of a device's, that a program may use: the rest is for what is not counted


def set_up_jax(use_cpu: bool = False, tf32: bool | None = None, deterministic: bool = False) -> str:
    """Choose the platform, exact float32 products (TF32 on request) and a compilation cache; returns the platform.

    `deterministic` has a GPU use only operations that repeat bit for bit.
    """
    if deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    # Orbax warns of what is meant, and tells in hundreds of lines of the errors that it also raises.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _pass_over_closed_loop
    # JAX takes 75% of a GPU's memory by default; a 7B model with float32 Adam needs more.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")
    # Orbax copies a GPU's state through pinned host memory, of which XLA allows 64 GB by default.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(memory // 2**30))
    if use_cpu:
        jax.config.update("jax_platforms", "cpu")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("jax")))
    platform = jax.default_backend()
    # On a TPU, "tensorfloat32" would mean products of three bfloat16 parts.
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 and platform == "gpu" else "highest")
    return platform


def _pass_over_closed_loop(problem: Any) -> None:
    """After a write has failed, tensorstore tells of the others to orbax's event loop, which is gone."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


def compiler_options(mesh: Mesh, scattered: int) -> dict[str, Any]:
    """For a program on these devices. On several GPUs, gathers go together up to a GiB instead of up to 30 MiB, and
    scatters up to so many bytes of results: an update of 7B on four is 3.5% shorter. What GPUs of one process exchange
    is copied by their copy engines, beside the multiprocessors: 1.5% shorter on two."""
    if mesh.size == 1 or mesh.devices.flat[0].platform != "gpu":
        return {}
    return {
        "xla_gpu_all_gather_combine_threshold_bytes": 2**30,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": scattered,
        "xla_gpu_use_memcpy_local_p2p": True,
    }


def peak_memory() -> int | None:
    """The most bytes in use on the first device so far, where the platform tells."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def memory_limit() -> int | None:
    """Bytes that a program may use on each device, where the platform tells."""
    stats = jax.local_devices()[0].memory_stats()
    return int(MEMORY_SHARE * stats["bytes_limit"]) if stats and "bytes_limit" in stats else None
