#!/usr/bin/env python3
"""Measure the peak memory of loading an HF folder onto simulated CPU devices, beyond the loaded parameters.

    python benchmarks/load_memory.py --shape llama-7b --devices 8

The script makes the folder in bfloat16, of sparse files with holes instead of zeros. Holes take no room on the disk and
are read like any file. The parameters stay in bfloat16, as the devices' memory is the host's.
"""

import argparse
import json
import math
import os
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_model import SHAPES, raw_config

from llama_jax.hf.names import name_table
from llama_jax.hf.writer import plan_shards, write_index
from llama_jax.model.config import LlamaConfig


def write_holes(folder: Path, raw: dict) -> int:
    """Write a folder of the shape with zero weights; return the bytes of the weights."""
    shapes = {name: shape for name, (_, shape) in name_table(LlamaConfig.from_hf(raw)).items()}
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    files = plan_shards(sizes)
    for file, names in files.items():
        header, end = {}, 0
        for name in names:
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    write_index(folder, files, sum(sizes.values()))
    (folder / "config.json").write_text(json.dumps({**raw, "torch_dtype": "bfloat16"}))
    return sum(sizes.values())


def memory(field: str) -> int:
    """Return this process' memory in bytes: RssAnon without mapped files, VmHWM its peak with them."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--mesh", default="auto")
    parser.add_argument("--scan_layers", action="store_true", help="stack the layers, as for TPU slices")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    import jax
    import jax.numpy as jnp

    from llama_jax.distributed import sharding
    from llama_jax.distributed.platform import set_up_jax
    from llama_jax.hf.source import Source
    from llama_jax.model.llama import RunOptions

    set_up_jax(use_cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        size = write_holes(Path(folder), raw_config(args.shape, args.layers))
        mesh = sharding.make_mesh(spec=args.mesh)
        jnp.zeros(8).block_until_ready()
        before, started = memory("VmHWM"), time.monotonic()
        run = RunOptions(param_dtype=jnp.bfloat16, scan_layers=args.scan_layers)
        params = jax.block_until_ready(Source(Path(folder)).load(run, mesh))
        seconds, peak = time.monotonic() - started, memory("VmHWM")
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    on_device = sharding.bytes_on_device(params)
    print(
        f"{args.shape}, {size / 1e9:.2f} GB in bfloat16 onto {args.devices} devices, {on_device / 1e9:.2f} GB each: "
        f"{seconds:.0f} s, peak {peak / 1e9:.2f} GB, of it libraries {before / 1e9:.2f}; beyond those and the "
        f"parameters {(peak - before - held) / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
