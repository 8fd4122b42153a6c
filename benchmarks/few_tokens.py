#!/usr/bin/env python3
"""Time the projections of LLaMA-7B's layers for one new token of each prompt: XLA's products beside other ways.

    python benchmarks/few_tokens.py --prompts 1 32 --dtype bfloat16 int8 --ways xla mosaic bytes

A layer here is its norms, its seven products and its activation, without attention. `xla` multiplies as `generate`
does. `mosaic` is a kernel of Pallas' Mosaic GPU, for Hopper GPUs: the copy engine brings tiles of the weights to
shared memory, and tensor cores multiply them. `bytes` multiplies int8 weights by inputs in 16 bits, as two rows of
bytes. Printed are microseconds of a layer by the clock, microseconds of its products by a profile, and the largest
error of a product against float32, relative to its largest element.
"""

import argparse
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_jax.distributed import sharding
from llama_jax.distributed.profile import time_spent, tracing
from llama_jax.model.quantized import INT8, quantized_matmul

D, F = 4096, 11008
KINDS = {"qkv": [(D, D)] * 3, "o": [(D, D)], "gate_up": [(F, D)] * 2, "down": [(D, F)]}
SPLITS = {"qkv": 1, "o": 4, "gate_up": 1, "down": 2}  # parts of the inputs, each a program of its own
TILE, STEP, STAGES = 64, 128, 6  # outputs of a program, inputs of a step, steps in flight
OUT = P(None, None, None)
_PRODUCTS = "gemm|nvjet|cutlass|cublas|mosaic|input_reduce|dot"


def xla(x, weights, kind):
    if isinstance(weights[0], INT8):
        return [quantized_matmul(x[:, None], weight, x.dtype, OUT)[:, 0] for weight in weights]
    return [jnp.einsum("NI,OI->NO", x, weight) for weight in weights]


def mosaic(x, weights, kind):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tokens = len(x)
    x = jnp.pad(x, ((0, -tokens % 8), (0, 0)))
    arrays = [weight.codes if isinstance(weight, INT8) else weight for weight in weights]
    whole, (rows, inputs), splits = arrays[0].dtype == x.dtype, x.shape, SPLITS[kind]
    steps = inputs // splits // STEP
    starts = np.cumsum([0] + [len(array) // TILE * splits for array in arrays]).tolist()

    def spec(rows, dtype, index):
        transforms = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
        return plgpu.BlockSpec((rows, STEP), index, transforms=transforms, delay_release=int(whole))

    def body(x_ref, *refs):
        program = jax.lax.axis_index("program")
        for i, (w_ref, out_ref) in enumerate(zip(refs[: len(arrays)], refs[len(arrays) :], strict=True)):

            @pl.when((program >= starts[i]) & (program < starts[i + 1]))
            def _(w_ref=w_ref, out_ref=out_ref, first=starts[i]):
                tile, part = (program - first) // splits, (program - first) % splits

                def add(_, w_tile, x_tile, sums):
                    w = w_tile if whole else w_tile[...].astype(x.dtype)
                    plgpu.wgmma(sums, w, plgpu.transpose_ref(x_tile, (1, 0)))
                    plgpu.wgmma_wait(int(whole))

                def all_steps(sums):
                    specs = [
                        spec(TILE, w_ref.dtype, lambda step: (tile, part * steps + step)),
                        spec(rows, x.dtype, lambda step: (0, part * steps + step)),
                    ]
                    pipeline = plgpu.emit_pipeline(
                        partial(add, sums=sums), grid=(steps,), in_specs=specs, max_concurrent_steps=STAGES
                    )
                    pipeline(w_ref, x_ref)
                    return sums[...]

                out_ref[part, pl.ds(tile * TILE, TILE), :] = pl.run_scoped(
                    all_steps, plgpu.ACC((TILE, rows), jnp.float32)
                )

    shapes = [jax.ShapeDtypeStruct((splits, len(array), rows), jnp.float32) for array in arrays]
    kernel = plgpu.kernel(body, out_type=shapes, grid=(starts[-1],), grid_names=("program",))
    sums = [jnp.sum(parts, axis=0).T[:tokens] for parts in kernel(x, *arrays)]
    return [(y * _scale(weight)).astype(x.dtype) for y, weight in zip(sums, weights, strict=True)]


def in_bytes(x, weights, kind):
    unit = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True) / 32639
    number = jnp.round(x / unit).astype(jnp.int32)
    high = (number + 128) >> 8
    pairs = jnp.concatenate([high, number - (high << 8)]).astype(jnp.int8)
    outputs = []
    for weight in weights:
        sums = jnp.einsum("NI,OI->NO", pairs, weight.codes, preferred_element_type=jnp.int32).astype(jnp.float32)
        outputs.append(((256 * sums[: len(x)] + sums[len(x) :]) * unit * _scale(weight)).astype(x.dtype))
    return outputs


WAYS = {"xla": xla, "mosaic": mosaic, "bytes": in_bytes}


def _scale(weight):
    return weight.absmax / 127 if isinstance(weight, INT8) else 1


def _float32(x, weight):
    matrix = weight.codes if isinstance(weight, INT8) else weight
    product = jnp.einsum("NI,OI->NO", x.astype(jnp.float32), matrix.astype(jnp.float32), precision="highest")
    return product * _scale(weight)


def _norm(x):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def layers_of(way, x, layers):
    """Return the output of all layers. Attention is the sum of q, k and v: each product is needed."""
    for layer in layers:
        q, k, v = way(_norm(x), layer["qkv"], "qkv")
        x = x + way(q + k + v, layer["o"], "o")[0]
        gate, up = way(_norm(x), layer["gate_up"], "gate_up")
        x = x + way(jax.nn.silu(gate) * up, layer["down"], "down")[0]
    return x


def random_weight(key, shape, dtype):
    if dtype == "bfloat16":
        return (0.02 * jax.random.normal(key, shape)).astype(dtype)
    return INT8(jax.random.randint(key, shape, -127, 128, jnp.int8), jnp.linspace(0.06, 0.1, shape[0]))


def measure(name, prompts, dtype, layers, repeats=20):
    way, key = WAYS[name], jax.random.key(1)
    errors = []
    for kind, weights in layers[0].items():
        inputs = KINDS[kind][0][1]
        x = jax.random.normal(key, (prompts, inputs)).astype(jnp.bfloat16)
        found = jax.jit(partial(way, kind=kind))(x, weights)
        for y, weight in zip(found, weights, strict=True):
            right = jax.jit(_float32)(x, weight)
            errors.append(float(jnp.max(jnp.abs(y - right)) / jnp.max(jnp.abs(right))))
    x = jax.random.normal(key, (prompts, D)).astype(jnp.bfloat16)
    run = jax.jit(partial(layers_of, way))
    jax.block_until_ready(run(x, layers))
    started = time.monotonic()
    jax.block_until_ready([run(x, layers) for _ in range(repeats)])
    wall = 1e6 * (time.monotonic() - started) / repeats / len(layers)
    with tempfile.TemporaryDirectory() as folder:
        with tracing(Path(folder)):
            jax.block_until_ready(run(x, layers))
        kernels = time_spent(Path(folder), 1)[1]
    # Norms are reductions too, of 1 us and less.
    products = 1e3 * sum(ms for kernel, ms in kernels if re.search(_PRODUCTS, kernel)) / len(layers)
    print(f"| {dtype} | {prompts} | {name} | {wall:.1f} | {products:.1f} | {max(errors):.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "int8"), default=["bfloat16", "int8"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["xla", "mosaic"])
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    print("| weights | prompts | way | us a layer | its products | error |")
    print("|---|--:|---|--:|--:|--:|")
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:1])):
        for dtype in args.dtype:
            keys = iter(jax.random.split(jax.random.key(0), args.layers * 7))
            layers = [
                {kind: [random_weight(next(keys), shape, dtype) for shape in shapes] for kind, shapes in KINDS.items()}
                for _ in range(args.layers)
            ]
            for prompts in args.prompts:
                for name in args.ways:
                    if name != "bytes" or dtype == "int8":
                        measure(name, prompts, dtype, layers)


if __name__ == "__main__":
    main()
