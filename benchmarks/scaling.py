#!/usr/bin/env python3
"""Estimate scaling on paper: `scaling.py --shape llama-7b --rows 1 --tokens 2048 v5e-16 v5e-256`.

The TPU compiler compiles each slice's step with the same work on each device and full recomputation, at low effort by
default. From 64 devices on, low effort sends sums of gradients in float32; full effort rounds them to bf16 first.
Nothing is run. The parts of a step's modelled time are printed:

- compute: the step's operations, with full recomputation, at a share of the published peak: the compiler's own estimate
  for one product of 8192 x 8192 x 8192 (v5e 88%, v5p 90%, v4 93%; others at 90%);
- links: the bytes that a device sends in the compiled collectives, at the published bandwidth of all its links;
- update: the state, read and written once, at the published bandwidth of the memory.

The step is between max(compute, links) + update, with all sending hidden behind products, and the sum, with none
hidden. MFU counts the model's operations (causal attention at half) over the published peak. Efficiency compares tokens
a second and device with the first slice, both at the first bound.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from make_model import SHAPES, raw_config

from llama_jax.distributed import sharding
from llama_jax.distributed.platform import set_up_jax
from llama_jax.model.attention import Kernel
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.plan.chips import Topology, find_topology
from llama_jax.plan.hlo import Program
from llama_jax.plan.operations import operations
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import abstract_state
from llama_jax.training.step import Steps

ACHIEVED = {"v4": 0.93, "v5e": 0.88, "v5p": 0.90}


def parts(topology: Topology, config: LlamaConfig, rows: int, tokens: int, spec: str) -> dict[str, Any]:
    """Return the parts of a step's time in seconds, and the MFU of both bounds."""
    mesh, chip = sharding.make_mesh(topology.devices(), spec), topology.chip
    kernel = Kernel("splash", device=chip.kind)
    run = RunOptions(jnp.float32, jnp.bfloat16, jnp.bfloat16, scan_layers=True, remat="full", attention=kernel)
    tx = make_optimizer()
    definition = define(config, run, mesh)
    state = abstract_state(tx, definition, mesh)
    steps, block = Steps(definition, tx, config.vocab_size), (rows * sharding.batch_ways(mesh), tokens)
    steps.compile(state, block, mesh)
    sent: dict[str, float] = {}
    for c in Program(steps.programs[block].as_text()).collectives(mesh.shape):
        key = f"{c.kind} over {'+'.join(c.axes)}"
        sent[key] = sent.get(key, 0) + c.sent * c.times
    model, made = (n / mesh.size for n in operations(config, block[0] * tokens, tokens, "full"))
    compute = made / (chip.flops * ACHIEVED.get(topology.family, 0.9))
    links, update = sum(sent.values()) / chip.link_rate, 2 * sharding.bytes_on_device(state) / chip.memory_rate
    hidden, bare = max(compute, links) + update, compute + links + update
    mfu = [model / time / chip.flops for time in (hidden, bare)]
    return {
        "sent": sent,
        "compute": compute,
        "links": links,
        "update": update,
        "hidden": hidden,
        "bare": bare,
        "mfu": mfu,
    }


def table(names: list[str], shape: str, rows: int, tokens: int, spec: str) -> Iterator[str]:
    config, first = LlamaConfig.from_hf(raw_config(shape)), None
    yield "| slice | devices | sent GB | compute ms | links ms | update ms | step ms | MFU | efficiency |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for name in names:
        t = parts(find_topology(name), config, rows, tokens, spec)
        first = first or t["hidden"]
        ms = {k: f"{1e3 * t[k]:,.0f}" for k in ("compute", "links", "update", "hidden", "bare")}
        yield (
            f"| {name} | {find_topology(name).count:,} | {sum(t['sent'].values()) / 1e9:,.1f} | {ms['compute']} | "
            f"{ms['links']} | {ms['update']} | {ms['hidden']} to {ms['bare']} | "
            f"{100 * t['mfu'][1]:.0f} to {100 * t['mfu'][0]:.0f}% | {100 * first / t['hidden']:.0f}% |"
        )
        yield "<!-- " + ", ".join(f"{kind}: {size / 1e9:,.1f} GB" for kind, size in t["sent"].items()) + " -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", nargs="+")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--rows", type=int, default=1, help="rows of a device")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--mesh", default="auto")
    parser.add_argument("--effort", choices=["O0", "UNKNOWN"], default="O0", help="UNKNOWN is the full effort")
    args = parser.parse_args()
    set_up_jax(use_cpu=True)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_optimization_level", args.effort)
    for line in table(args.slices, args.shape, args.rows, args.tokens, args.mesh):
        print(line, flush=True)


if __name__ == "__main__":
    main()
