#!/usr/bin/env python3
"""Train on eight simulated devices with gradients of the layers' matrices that are summed as a ring of bfloat16 sums
them, and compare the losses with those of float32 sums.

    python benchmarks/rounded_sums.py --model HF_DIR --data_path alpaca_data.json --updates 200

A CPU's compiler sums in float32, whatever `--gradient_sum_dtype` says. So the sums of the second run are made here:
each device's share is rounded to bfloat16, and so is the sum after each of the ring's seven additions.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_allow_excess_precision=false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import jax
import jax.numpy as jnp
import numpy as np
import side_by_side

from llama_jax.distributed import sharding
from llama_jax.model import matmul

FLAGS = "--use_cpu True --mesh fsdp=8 --bf16 True --per_device_train_batch_size 1 --learning_rate 2e-4"
FLAGS += " --model_max_length 256 --save_strategy no --logging_steps 1"


def of_a_ring(dy: Any, x: Any, spec: Any, how: matmul.Sum, dtype: Any) -> jax.Array:
    """Return `matmul.weight_gradient`, summed by a ring in bfloat16."""
    axis = next(i for i, axes in enumerate(spec) if axes and set(sharding.SHARDS) <= set(axes))

    def of_device(dy: Any, x: Any) -> jax.Array:
        share = jnp.einsum("BTO,BTI->OI", dy, x, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
        shares = jax.lax.all_gather(share, sharding.SHARDS)
        total = shares[0]
        for share in shares[1:]:
            total = (total.astype(jnp.float32) + share.astype(jnp.float32)).astype(jnp.bfloat16)
        size = total.shape[axis] // shares.shape[0]
        return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index(sharding.SHARDS) * size, size, axis)

    specs = tuple(jax.typeof(operand).sharding.spec for operand in (dy, x))
    return jax.shard_map(of_device, in_specs=specs, out_specs=spec, check_vma=False)(dy, x)


def losses(args: argparse.Namespace) -> np.ndarray:
    """Return the loss of each update of a run."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--model_name_or_path", args.model, "--data_path", args.data_path, "--output_dir", folder]
        found, _ = side_by_side.ours([*argv, "--max_steps", str(args.updates), *FLAGS.split()])
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HF folder")
    parser.add_argument("--data_path", required=True, help="alpaca_data.json")
    parser.add_argument("--updates", type=int, default=200)
    args = parser.parse_args()
    exact = losses(args)
    matmul.weight_gradient = of_a_ring
    jax.clear_caches()
    rounded = losses(args)
    off = np.abs(rounded / exact - 1)
    change = rounded.mean() / exact.mean() - 1
    print(f"mean loss {exact.mean():.5f}, summed in bfloat16 {rounded.mean():.5f}: {change:+.3%}")
    print(f"an update's loss differs by {np.median(off):.3%} in the median, by {off.max():.2%} at most")


if __name__ == "__main__":
    main()
