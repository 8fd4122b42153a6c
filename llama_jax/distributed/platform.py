"""Set JAX up for the whole process, and read a device's memory."""

import contextlib
import logging
import os
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.base.errors import InputError
from llama_jax.base.files import cache_folder

MEMORY_SHARE = 0.98  # of a device's memory for programs; the rest is for allocations that jax does not count

# XLA's options for a run's programs, by jax's name of a TPU. The rule: options stand here that together shorten the
# program in order (plan/replay.py) and raise neither the compiler's cycles nor its schedule by over 3%, at the same
# rounding (benchmarks/tpu_compiler.py; the figures are in BENCHMARKS.md). v5e: no products in rings; without them the
# pass of the second option would round gradients to bfloat16 before devices add them. v6e: no products in rings, 96 MiB
# of fast memory for an operation (MaxText's recipes), and collectives on the sparse cores, beside the work.
_NO_RINGS = ("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000")
_ON_SPARSE_CORES = (
    ("xla_tpu_enable_sparse_core_collective_offload_all_gather", True),
    ("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", True),
)
TPU_OPTIONS: Mapping[str, Mapping[str, str | bool]] = {
    "TPU v5 lite": dict([_NO_RINGS, ("xla_jf_bf16_propagation", False)]),
    "TPU v6 lite": dict([_NO_RINGS, ("xla_tpu_scoped_vmem_limit_kib", "98304"), *_ON_SPARSE_CORES]),
}
_GROUP = Path("/sys/fs/cgroup")
LEAVE_OUT = "default"  # the value of a given option that leaves the compiler's own


def set_up_jax(use_cpu: bool = False, tf32: bool | None = None, deterministic: bool = False) -> str:
    """Choose the platform, exact float32 products (TF32 on request) and a compilation cache; return the platform.

    `deterministic` restricts a GPU to operations that repeat bit for bit.
    """
    if deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    # Orbax warns of intended settings, and logs hundreds of lines for errors that it also raises.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_abandoned
    # JAX takes 75% of a GPU's memory by default; a 7B model with float32 Adam needs more.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")
    # Orbax copies a GPU's state through pinned host memory, of which XLA allows 64 GB by default.
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(host_memory() // 2**30))
    if use_cpu:
        jax.config.update("jax_platforms", "cpu")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("jax")))
    platform = jax.default_backend()
    # On a TPU, "tensorfloat32" would mean products of three bfloat16 parts.
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 and platform == "gpu" else "highest")
    return platform


def _ignore_abandoned(problem: Any) -> None:
    """Ignore what follows a failed read or write: tensorstore's callbacks to orbax's closed event loop, and the
    exception that orbax makes of the end of a read that still waits."""
    closed = isinstance(getattr(problem.exc_value, "__cause__", None), GeneratorExit)
    if not closed and str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


def compiler_options(
    mesh: Mesh, fp8: bool, scattered: int | None = None, given: Sequence[tuple[str, str | bool]] = ()
) -> dict[str, Any]:
    """Return XLA's options for a program on these devices: those of the platform, and the `given` ones over them.

    `TPU_OPTIONS` has those of TPUs; on a single v5e they were not measured. On GPUs products of fp8 are left to cuBLAS:
    XLA's search for kernels of its own takes minutes at 32 layers, and finds none. With `scattered`, gathers are
    combined up to 1 GiB instead of 30 MiB, and scatters up to `scattered` bytes of results. An update of 7B on four
    GPUs is 3.5% shorter. GPUs of one process exchange data by their copy engines, beside the multiprocessors: 1.5%
    shorter on two.
    """
    device = mesh.devices.flat[0]
    options: dict[str, Any] = {}
    if device.platform == "gpu":
        if fp8:
            options |= {"xla_gpu_enable_triton_gemm": False}
        if mesh.size > 1 and scattered is not None:
            options |= {
                "xla_gpu_all_gather_combine_threshold_bytes": 2**30,
                "xla_gpu_reduce_scatter_combine_threshold_bytes": scattered,
                "xla_gpu_use_memcpy_local_p2p": True,
            }
    elif mesh.size > 1 or device.device_kind != "TPU v5 lite":
        options |= TPU_OPTIONS.get(device.device_kind, {})
    return {name: value for name, value in (options | dict(given)).items() if value != LEAVE_OUT}


def check_compiler_options(mesh: Mesh, given: Sequence[tuple[str, str | bool]]) -> None:
    """Compile an empty program with each of a run's options. Raises InputError for one that the compiler of these
    devices refuses, `given` or not."""
    value = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    for name, setting in compiler_options(mesh, False, given=given).items():
        try:
            jax.jit(lambda x: x).lower(value).compile({name: setting})
        except (JaxRuntimeError, ValueError) as e:
            why = " ".join(str(e).splitlines()[0].split()).removeprefix("INVALID_ARGUMENT: ")
            told = f"--compiler_options {name}={setting}: the compiler refuses it: {why}"
            if name not in dict(given):
                chip = mesh.devices.flat[0].device_kind
                told += f"; runs on a {chip} have this option; leave it out by --compiler_options {name}={LEAVE_OUT}"
            raise InputError(told) from None


def memory_use() -> tuple[int, int]:
    """Return the peak of bytes in use and the bytes there are: of the first device, or of this process and its host
    where the platform does not count."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"], stats["bytes_limit"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, host_memory()


def host_memory() -> int:
    """Return the bytes of this host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int:
    """Return the bytes of this host's memory that programs can still get, in this container where its group (cgroup v2)
    has a limit; all of it where the system does not tell."""
    free = host_memory()
    with contextlib.suppress(OSError):
        if found := re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE):
            free = int(found[1]) << 10
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = (_GROUP / "memory.stat").read_text()
        cached = sum(map(int, re.findall(r"^inactive_file (\d+)$", stat, re.MULTILINE)))  # given back under pressure
        free = min(free, limit - used + cached)
    return free


def memory_limit() -> int | None:
    """Return the bytes that a program may use on each device, or None where the platform gives no limit."""
    stats = jax.local_devices()[0].memory_stats()
    return int(MEMORY_SHARE * stats["bytes_limit"]) if stats and "bytes_limit" in stats else None
