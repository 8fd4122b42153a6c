"""Trace what a device does, and divide its time among kinds of work."""

import contextlib
import math
import re
import shutil
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

# Kernels and copies of a GPU by their names; GPUs of one process exchange by copy engines.
KINDS = {
    "collectives": "nccl|MemcpyP2P",
    "host copies": "MemcpyH2D|MemcpyD2H",
    "matmuls": "gemm|nvjet|cutlass|cublas|xmma",
    "attention": "sdpa|fmha|flash|cudnn",
}
TRANSFERS = ("collectives", "host copies")
OPTIMIZER, OTHER = "optimizer", "elementwise and other"  # the first is a scope of `training.step`
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="[^"]*/' + OPTIMIZER + "/", re.MULTILINE)


@contextlib.contextmanager
def tracing(folder: Path) -> Iterator[None]:
    """Write a trace of the block under `folder`/plugins/profile, which xprof reads, with a copy for Perfetto. A folder
    of an earlier trace is replaced."""
    shutil.rmtree(folder / "plugins" / "profile", ignore_errors=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
    try:
        yield
    finally:
        with contextlib.redirect_stdout(None):  # prints a line on each trace
            jax.profiler.stop_trace()


def optimizer_kernels(programs: Iterable[Any]) -> set[str]:
    """Return the names of the kernels, the compiler's own, that belong to the optimizer in compiled programs.

    A kernel of several operations counts by its last one.
    """
    names = (name for program in programs for name in _INSTRUCTION.findall(program.as_text()))
    return {re.sub("[.-]", "_", name) for name in names}


def time_spent(
    folder: Path, updates: int, optimizer: Container[str] = ()
) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Return ms an update that the first GPU of a trace spent by kind, and its longest kernels with their ms in all.

    `optimizer` has the names of kernels of that kind.
    Beside the kinds: "exposed" counts transfers while nothing else ran, "idle" the time without work, "whole" all from
    the first operation to the last. Without a GPU the times are empty.
    """
    planes = jax.profiler.ProfileData.from_file(str(next(folder.rglob("*.xplane.pb")))).planes
    lines = [line for plane in planes if plane.name.startswith("/device:GPU:0") for line in plane.lines]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*KINDS, OPTIMIZER, OTHER)}
    kernels: dict[str, float] = {}
    for line in lines:
        for event in line.events if line.name.startswith("Stream") else ():
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.name)), OTHER)
            if event.name == "MemcpyD2D" and jax.local_device_count() > 1:
                kind = "collectives"
            if kind == OTHER and event.name in optimizer:
                kind = OPTIMIZER
            times[kind].append((event.start_ns, event.end_ns))
            kernels[event.name] = kernels.get(event.name, 0.0) + (event.end_ns - event.start_ns) / 1e6
    everything = [span for spans in times.values() for span in spans]
    work = [span for kind, spans in times.items() if kind not in TRANSFERS for span in spans]
    if not everything:
        return {}, []
    whole, busy = max(end for _, end in everything) - min(start for start, _ in everything), covered(everything)
    spent = {kind: covered(spans) for kind, spans in times.items()}
    spent |= {"exposed": busy - covered(work), "idle": whole - busy, "whole": whole}
    longest = sorted(kernels.items(), key=lambda item: -item[1])
    return {name: ns / 1e6 / updates for name, ns in spent.items()}, longest


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
