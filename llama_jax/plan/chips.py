"""Describe accelerators by name, and make devices to compile for on machines that have none."""

import importlib.metadata
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from llama_jax.base.errors import InputError
from llama_jax.distributed.compat import tpu_topology
from llama_jax.distributed.sharding import HOST

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Describe a device, as jax counts devices.

    `kind` is jax's name, `memory` the bytes that a program may use, `flops` the peak bfloat16 operations a second of
    matrix products. `memory_rate` and `link_rate` are bytes a second, from memory and sent over all links together.
    `clock` is the cycles a second of a TPU, as its compiler counts them (`cycles_per_microsecond` of a
    dumped schedule).
    """

    platform: str
    kind: str
    memory: int
    flops: float
    memory_rate: float
    link_rate: float
    clock: float | None = None


# Peak, memory and interconnect are as published in 2026. Sources: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e",
# "TPU7x (Ironwood)" of docs.cloud.google.com/tpu/docs; NVIDIA's data sheets of the H100, H200 and A100 80GB (SXM), of
# the L4, and its Ada white paper (float32 sums). The last two have PCIe 4.0 x16 for a link. Link rates are
# half the published ones, which add both directions. A TPU's memory is libtpu 0.0.42.1's limit for a program
# (published: 32, 16, 95, 32 and 192 GiB a chip); a TPU7x chip is two devices with half the memory each. A GPU's memory
# is the published size less the driver's and the CUDA context's share.
CHIPS = {
    "v4": Chip("tpu", "TPU v4", int(30.75 * GIB), flops=275e12, memory_rate=1228e9, link_rate=300e9, clock=1.05e9),
    "v5e": Chip("tpu", "TPU v5 lite", int(15.75 * GIB), flops=197e12, memory_rate=819e9, link_rate=200e9, clock=1.5e9),
    "v5p": Chip("tpu", "TPU v5", int(95.74 * GIB), flops=459e12, memory_rate=2765e9, link_rate=600e9, clock=1.75e9),
    "v6e": Chip(
        "tpu", "TPU v6 lite", int(31.25 * GIB), flops=918e12, memory_rate=1638e9, link_rate=400e9, clock=1.75e9
    ),
    "tpu7x": Chip("tpu", "TPU7x", int(94.75 * GIB), flops=1153.5e12, memory_rate=3690e9, link_rate=300e9, clock=1.9e9),
    "h100": Chip("gpu", "NVIDIA H100 80GB HBM3", int(78.5 * GIB), flops=989e12, memory_rate=3350e9, link_rate=450e9),
    "h200": Chip("gpu", "NVIDIA H200", int(139 * GIB), flops=989e12, memory_rate=4800e9, link_rate=450e9),
    "a100": Chip("gpu", "NVIDIA A100-SXM4-80GB", int(78.5 * GIB), flops=312e12, memory_rate=2039e9, link_rate=300e9),
    "l4": Chip("gpu", "NVIDIA L4", int(22 * GIB), flops=121e12, memory_rate=300e9, link_rate=32e9),
    "rtx4090": Chip(
        "gpu", "NVIDIA GeForce RTX 4090", int(23.4 * GIB), flops=165.2e12, memory_rate=1008e9, link_rate=32e9
    ),
}
# Chips along each side of a slice, by the number of chips. v4, v5p and tpu7x are named by cores, two a chip.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBIC = {
    **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
    **{128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"},
}
_CORES = ("v4", "v5p", "tpu7x")
_GPUS = (1, 2, 4, 8)  # of one host
KNOWN = (
    "v4-8 to v4-2048, v5e-1 to v5e-256, v5p-8 to v5p-2048, v6e-1 to v6e-256, tpu7x-8 to tpu7x-2048, h100:1 to h100:8, "
    "h200:1 to h200:8, a100:1 to a100:8, l4:1 to l4:8, rtx4090:1 to rtx4090:8"
)


def peak_flops(kind: str, devices: int) -> float | None:
    """Return the peak bfloat16 operations a second of devices of jax's name `kind`, None of an unknown one."""
    return next((devices * chip.flops for chip in CHIPS.values() if chip.kind == kind), None)


def host_rate(kind: str) -> float:
    """Return the bytes a second between a device of jax's name `kind` and its host, each way, both ways at once.

    50 GB/s is measured on an H200 (2026-11-29), of the 64 of x16 PCIe 5.0; of the 32 of 4.0 the same share is assumed.
    """
    return 50e9 if kind in (CHIPS["h100"].kind, CHIPS["h200"].kind) else 25e9


class _Memory(str):
    """Name a memory. jax reads `kind` of a device's default memory, and compares the others as strings."""

    @property
    def kind(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Named:
    """Stand in for a jax device, with the attributes that making a mesh and a sharding reads."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0

    @property
    def client(self) -> Any:
        return SimpleNamespace(process_index=lambda: self.process_index)

    def default_memory(self) -> _Memory:
        return _Memory("device")

    def addressable_memories(self) -> list[_Memory]:
        return [_Memory("device"), _Memory(HOST)]


@dataclass(frozen=True)
class Topology:
    """Describe `count` devices of one kind: `name` is the cloud's, `shape` the chips along each side of a TPU slice."""

    name: str
    family: str
    count: int
    shape: str = ""

    @property
    def chip(self) -> Chip:
        return CHIPS[self.family]

    @property
    def larger(self) -> list["Topology"]:
        """Return the topologies with more devices of the same kind."""
        family = [t for t in all_topologies() if t.family == self.family]
        return [t for t in family if t.count > self.count]

    def devices(self) -> list[Any]:
        """Return devices to compile for, not to run on: a TPU's come from its compiler, in the libtpu package.

        GPUs are `Named`: the dry run compiles nothing for them. Raises InputError where libtpu is missing.
        """
        if self.chip.platform == "gpu":
            return [Named(i, self.chip.platform, self.chip.kind) for i in range(self.count)]
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                f"--dry_run {self.name}: the TPU compiler is not installed; on Linux, pip install "
                f"'{libtpu_requirement()}' (no TPU is needed)"
            )
        # A machine without a TPU needs none of these settings, but a second process would fail on a lock file.
        settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        for name, value in (settings | {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}).items():
            os.environ.setdefault(name, value)
        sides = [int(n) for n in self.shape.split("x")]
        options: dict[str, Any] = {}
        if self.family == "v4":
            options["chip_config_name"] = "megacore"  # a chip's two cores are one device
        if self.count == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if len(sides) == 3 and all(n % 4 == 0 for n in sides):
            options["wrap"] = (True, True, True)  # whole cubes of 64 chips are a torus
        return tpu_topology(f"{self.family}:{self.shape}", **options)


def find_topology(name: str) -> Topology:
    """Find the topology of a name such as v5e-16 (or v5litepod-16), v5p-128 or h200:8. Raises InputError."""
    wanted = re.sub("^v5litepod", "v5e", name.strip().lower())
    for topology in all_topologies():
        if topology.name == wanted:
            return topology
    raise InputError(f"--dry_run {name}: no such topology; known are {KNOWN}, by powers of two")


def all_topologies() -> list[Topology]:
    """Return all topologies, family by family, from few devices to many."""
    found = []
    for family, chip in CHIPS.items():
        if chip.platform == "gpu":
            found += [Topology(f"{family}:{n}", family, n) for n in _GPUS]
        elif family in _CORES:
            per_chip = 2 if family == "tpu7x" else 1
            found += [Topology(f"{family}-{2 * n}", family, n * per_chip, shape=s) for n, s in _CUBIC.items()]
        else:
            found += [Topology(f"{family}-{n}", family, n, shape=s) for n, s in _FLAT.items()]
    assert all(math.prod(map(int, t.shape.split("x"))) <= t.count for t in found if t.shape)
    return found


def libtpu_requirement() -> str:
    """Return the requirement on libtpu of the installed jax's extra `jax[tpu]`."""
    for requirement in importlib.metadata.requires("jax") or []:
        if requirement.startswith("libtpu"):
            return requirement.partition(";")[0].strip().replace(" ", "")
    return "libtpu"
