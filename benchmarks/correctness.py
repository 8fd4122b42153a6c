#!/usr/bin/env python3
"""Is what the device computes right? Exits with 1 if not; run it before any figure of speed is believed.

    python benchmarks/correctness.py [--shape llama-7b] [--layers 2]

1. The attention kernel that `auto` takes here, against plain XLA in float32 (`attention_kernels.py`).
2. A model of the shape in bf16 on packed rows of odd lengths, for each choice of --remat, stacked and not, against
   float32 by plain XLA: the loss, the gradient's norm, and every gradient.
3. 20 updates: the blocks, kernel and options that `auto` finds, against plain XLA in small blocks under MultiSteps with
   everything computed again.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention_kernels
from make_model import SHAPES, raw_config

from llama_jax import sharding
from llama_jax.arguments import parse_arguments
from llama_jax.attention import XLA, Kernel, choose_kernel
from llama_jax.config import LlamaConfig
from llama_jax.data.batches import Batch
from llama_jax.files import write_json
from llama_jax.hf.load import abstract_params
from llama_jax.job import make_job
from llama_jax.model import RunOptions, compute_copy, stack_layers, with_copy
from llama_jax.plan import Planner
from llama_jax.platform import memory_limit, set_up_jax
from llama_jax.train import _losses, fit, init_state, put_batch

# bf16 rounds at 2^-9: a gradient is a sum of many rounded terms behind a few layers, and its error some of those
# against its size; what a wrong mask or a lost row does is of the order of 1.
LOSS, NORM, GRADIENT = 2e-3, 1e-2, 6e-2
# The two runs round at other places, and Adam turns the rounding of small gradients into whole steps.
CURVE = 1e-2


def random_params(abstract, mesh):
    """Normal matrices by the shape of each array alone, norms of 1, in float32."""
    rng = np.random.default_rng(0)

    def make(a):
        value = 0.02 * rng.standard_normal(a.shape, np.float32) if len(a.shape) > 1 else np.ones(a.shape, np.float32)
        return jax.device_put(value, a.sharding)

    return jax.tree.map(make, abstract)


def check_gradients(config: LlamaConfig, mesh, kernel: str) -> bool:
    B, T, segments = 2, 384, 5
    rng = np.random.default_rng(1)
    ids, positions = attention_kernels.make_rows(rng, B, T, segments)
    tokens = rng.integers(0, config.vocab_size, (B, T), np.int32)
    weights = (ids > 0) * rng.random((B, T), np.float32) / ids.size
    host = Batch(
        tokens, positions, ids, np.full((B, T), 512, np.int32), np.roll(tokens, -1, 1), weights.astype(np.float32)
    )
    batch, good = put_batch(mesh, host), True
    _, abstract = abstract_params(config, RunOptions(), mesh)
    params = random_params(abstract, mesh)

    def run(options: RunOptions, params):
        graphdef, _ = abstract_params(config, options, mesh)
        with jax.set_mesh(mesh):
            used = with_copy(params, compute_copy(params, options))
            loss = jax.jit(jax.value_and_grad(lambda w: _losses(graphdef, w, batch, config.vocab_size, 0.0)[0]))
            value, grads = loss(used)
        return float(value), jax.tree.map(lambda g: np.asarray(g, np.float32), grads)

    expected_loss, expected = run(RunOptions(attention=XLA), params)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(expected)))
    for scan in (False, True):
        placed = stack_layers(jax.tree.map(jnp.copy, params)) if scan else params
        wanted = jax.tree.map(np.asarray, stack_layers(jax.tree.map(jnp.asarray, expected))) if scan else expected
        for remat in ("none", "matmuls", "attention", "full"):
            options = RunOptions(
                compute_dtype=jnp.bfloat16, scan_layers=scan, remat=remat, attention=Kernel(kernel, segments)
            )
            loss, grads = run(options, placed)
            off = abs(loss - expected_loss) / abs(expected_loss)
            its = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
            each = jax.tree.map(lambda g, e: float(np.linalg.norm(g - e) / np.linalg.norm(e)), grads, wanted)
            worst = max(jax.tree.leaves(each))
            fine = off < LOSS and abs(its / norm - 1) < NORM and worst < GRADIENT
            good &= fine
            print(
                f"{'stacked' if scan else 'unrolled'}, --remat {remat}: loss off by {off:.1e}, "
                f"norm {abs(its / norm - 1):.1e}, worst gradient {worst:.1e}{'' if fine else '  WRONG'}",
                flush=True,
            )
    return good


def check_curve(config: LlamaConfig, mesh, platform: str) -> bool:
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        rows = [rng.integers(0, config.vocab_size, n).tolist() for n in rng.integers(30, 300, 200)]
        data = Path(folder) / "data.json"
        write_json(data, [{"input_ids": row, "labels": row} for row in rows])
        curves = []
        plain = "--attention xla --remat full --accumulation multisteps --max_tokens_per_device 512 --scan_layers True"
        for flags in (plain, ""):
            base = f"--model_name_or_path {folder} --data_path {data} --cache_dir {folder}/cache --bf16 True "
            base += "--max_steps 20 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 "
            base += "--learning_rate 1e-4"
            args = parse_arguments([*base.split(), *flags.split()])
            job = make_job(args, config, lambda: Path(folder), sharding.batch_ways(mesh), True)
            planner = Planner(job, mesh, platform, "float32", bool(args.scan_layers))
            plan = planner.settle(memory_limit())
            _, abstract = abstract_params(config, RunOptions(), mesh)
            params = random_params(abstract, mesh)
            state = init_state(stack_layers(params) if args.scan_layers else params, plan.tx, plan.run, mesh)
            curve: list[tuple[float, float]] = []
            fit(
                *(state, plan.steps, plan.batches, mesh, range(20)),
                learning_rate=job.schedule.rate,
                on_update=lambda m, curve=curve: curve.append((m.loss, m.grad_norm)),
                due=lambda step: False,
                on_due=lambda *_: None,
                stop=lambda: False,
            )
            curves.append(np.asarray(curve))
            print(f"{plan.run.attention.name}, --remat {plan.run.remat}, blocks {plan.batches.shapes}", flush=True)
    off = np.abs(curves[1] / curves[0] - 1).max(axis=0)
    fine = bool(off.max() < CURVE)
    print(f"20 updates: losses off by at most {off[0]:.1e}, norms {off[1]:.1e}{'' if fine else '  WRONG'}")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    platform, mesh = set_up_jax(), sharding.make_mesh()
    raw = {**raw_config(args.shape, args.layers), "tie_word_embeddings": False}
    config = LlamaConfig.from_hf(raw)
    kernel, why = choose_kernel("auto", platform, mesh.devices.flat[0].device_kind, config.head_dim, "bfloat16")
    print(f"{args.shape}, {args.layers} layers; attention by {kernel}: {why}")
    good = kernel == "xla" or attention_kernels.check(kernel, mesh)
    good = check_gradients(config, mesh, kernel) and good
    good = check_curve(config, mesh, platform) and good
    print("right" if good else "WRONG")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
