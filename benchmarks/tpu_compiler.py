#!/usr/bin/env python3
"""Ask the TPU's compiler about a step: `tpu_compiler.py --shape llama-7b --work 1x2048 v5e-16 v6e-8`. Nothing is run.

Work is ROWSxLENGTH, whole sequences of each device, in one block. `--flags` are train_jax.py's, as --remat and
--compiler_options. A row of the table:

- GiB: the peak of a device, and what a program may use;
- cycles: the compiler's estimate of each instruction times its trips, in ms at the chip's clock, of instructions with a
  matmul, of other arithmetic, and of those that only copy. Collectives and Pallas kernels have no estimate;
- schedule: the latency-hiding scheduler's time of computation, in which Pallas kernels count nothing, and of waiting
  for links. The two disagree on what matters; neither was checked on a device;
- attention: the operations of the kernels at the chip's peak, which both leave out;
- in order: the cycles and the attention in the program's order, with the links at their published rate beside them: the
  time of work, and of waiting for links;
- sent: the bytes that a device sends, in float32 of them, and in collectives that overlap with nothing of them;
- kernels: calls of Pallas kernels.

`--read FOLDER` gives the row of another program for the one named slice, such as MaxText's, compiled with
`XLA_FLAGS="--xla_dump_to=FOLDER --xla_dump_hlo_as_text --xla_dump_latency_hiding_schedule=true"`.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
from jax.errors import JaxRuntimeError
from make_model import SHAPES, raw_config
from work import planner_of

from llama_jax.base.errors import run_command
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import MEMORY_SHARE, set_up_jax
from llama_jax.model.config import LlamaConfig
from llama_jax.plan.chips import Topology, find_topology
from llama_jax.plan.hlo import Program
from llama_jax.plan.operations import kernel_operations
from llama_jax.plan.planner import Option
from llama_jax.plan.replay import replay
from llama_jax.plan.schedule import read_schedule

HEADER = (
    "| program | remat | GiB | cycles ms (matmul / elementwise / copy) | schedule ms (compute + exposed) | "
    "attention ms | in order ms (work + waiting) | GB sent (float32, alone) | kernels | s |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|---|--:|"
)


def row(
    name: str,
    remat: str,
    topology: Topology,
    needed: float,
    program: Program,
    folder: Path,
    made: float,
    wall: str = "",
) -> str:
    """Return the table's row of a compiled program, whose schedule is in the folder: `made` is the attention's."""
    chip = topology.chip
    assert chip.clock, topology.name
    ms = {kind: cycles / chip.clock * 1e3 for kind, cycles in program.cycles.items()}
    schedule = read_schedule(folder, program)
    times = "not dumped"
    if schedule:
        compute, exposed, rough = (f"{cycles / chip.clock * 1e3:,.0f}" for cycles in schedule)
        times = f"{compute} + {exposed}" + (f" ({rough} a rough estimate of loops)" if schedule.rough else "")
    mesh, attention = {"fsdp": topology.count}, made / chip.flops
    work, waiting = (seconds * 1e3 for seconds in replay(program, chip, mesh, attention))
    collectives = program.collectives(mesh)
    sent, exact, alone = (
        sum(c.sent * c.times for c in collectives if of(c)) / 1e9
        for of in (lambda c: True, lambda c: c.result.startswith("f32"), lambda c: c.waits)
    )
    kernels = ", ".join(f"{k} {n}" for k, n in sorted(program.kernels.items()))
    return (
        f"| {name} | {remat} | {needed / 2**30:.2f} of {MEMORY_SHARE * chip.memory / 2**30:.2f} | "
        f"{sum(ms.values()):,.0f} ({' / '.join(f'{t:,.0f}' for t in ms.values())}) | {times} | "
        f"{attention * 1e3:.0f} | {work + waiting:,.0f} ({work:,.0f} + {waiting:,.0f}) | "
        f"{sent:.1f} ({exact:.1f}, {alone:.1f}) | {kernels} | {wall} |"
    )


def ours(args: argparse.Namespace, topology: Topology) -> str:
    """Compile this program's step and return its row."""
    raw, started = raw_config(args.shape, args.layers), time.monotonic()
    planner = planner_of(args, raw, topology.devices())
    mesh = planner.mesh
    rows, length = map(int, args.work.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        planner.schedules = folder
        limit = int(MEMORY_SHARE * topology.chip.memory)
        if planner.job.args.remat == "auto":
            planner.job.args.max_tokens_per_device = str(rows * length)
            plan, needed = planner.choose(limit, remember=False)
        else:
            plan = planner.make(Option(rows * length, planner.job.args.remat))
            needed = plan.compile(plan.largest_block, mesh)
        program = Program(plan.steps.programs[plan.largest_block].as_text())
        tokens = rows * length * sharding.batch_ways(mesh) // mesh.size
        made = kernel_operations(LlamaConfig.from_hf(raw), tokens, length, plan.option.remat)
        wall = f"{time.monotonic() - started:.0f}"
        name = f"{topology.name} {args.name}".strip()
        return row(name, plan.option.remat, topology, needed, program, Path(folder), made, wall)


def others(args: argparse.Namespace, topology: Topology) -> str:
    """Return the row of the largest program that was dumped into a folder."""
    schedule = max(args.read.glob("*.schedule.txt"), key=lambda file: file.stat().st_size)
    module = schedule.name.removesuffix(".schedule.txt")
    (hlo,) = args.read.glob(f"module_*.{module}.*after_codegen.txt")  # the last one: it has the cycles
    report = next(args.read.glob(f"module_*.{module}.*memory-usage-report.txt")).read_text()
    needed = re.search(r"Memory Space: default.*?Total bytes: (\d+)", report, re.DOTALL)
    assert needed, report[:200]
    program = Program(hlo.read_text())
    config = LlamaConfig.from_hf(raw_config(args.shape, args.layers))
    rows, length = map(int, args.work.split("x"))
    again = sum(n for name, n in program.kernels.items() if "fwd" in name) > config.num_hidden_layers
    made = kernel_operations(config, rows * length, length, "full" if again else "none")
    return row(args.name, "", topology, int(needed[1]), program, args.read, made)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", nargs="+")
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--work", default="1x2048", help="ROWSxLENGTH")
    parser.add_argument("--flags", default="", help="further flags of train_jax.py, as one word")
    parser.add_argument("--name", default="", help="what the row says beside the slice")
    parser.add_argument("--read", type=Path, help="folder of another program's dump")
    parser.set_defaults(updates=1)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    set_up_jax(use_cpu=True)
    jax.config.update("jax_enable_compilation_cache", False)
    print(HEADER, flush=True)
    for name in args.slices:
        topology = find_topology(name)
        try:
            print(others(args, topology) if args.read else ours(args, topology), flush=True)
        except JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            print(f"| {name} {args.name} | | does not fit: {str(e).splitlines()[0][:160]} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
