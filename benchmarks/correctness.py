#!/usr/bin/env python3
"""Check the device's results and exit with 1 on an error. Run it before any figure of speed.

    python benchmarks/correctness.py [--shape llama-7b] [--layers 2] [--update_layers 32]

1. The attention kernels that `auto` takes here, in packed rows and over caches, against plain XLA in float32
   (`attention_kernels.py`). A projection over all devices and its gradients in bf16, against float64 on the host.
2. A model of the shape in bf16 on packed rows of odd lengths, for each choice of --remat, stacked and not, against
   float32 by plain XLA: the loss, the gradient's norm, and every gradient. The same for each sister model, with two
   layers of SmolLM2's sizes.
3. Adapters over a plain, a 4-bit and an 8-bit base, in bf16, against float32 over the dequantized base: the loss, the
   gradient's norm, and every gradient.
4. With --fp8, products of fp8 against the same values in float32, and a model's gradients with fast sums and without.
5. 20 updates: the blocks, kernel and options that `auto` finds, against plain XLA in small blocks under MultiSteps with
   full recomputation.
6. An update of 8 Alpaca-like examples in float32, packed into one block, against its examples one by one: the loss and
   every gradient (in Adam's first moment, a tenth of the gradient after one update). As a control, the same examples
   padded, four at a time.
7. On several devices: 20 updates with all devices on fsdp, and on tensor, against one device, in float32 and in bf16.
   Checks 1 to 6 use one device, but for the projection.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention_kernels
from make_model import SHAPES, raw_config
from rows import Row, all_fine

from llama_jax.base.files import write_json
from llama_jax.data.batches import Batch
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import compiler_options, memory_limit, set_up_jax
from llama_jax.model import matmul
from llama_jax.model.attention import XLA, Kernel, choose_kernel
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, merge
from llama_jax.model.llama import RunOptions, stack_layers
from llama_jax.model.lora import PROJECTIONS, Lora, Rank
from llama_jax.model.matmul import SCATTER, Sum
from llama_jax.model.quantized import Quantization, dequantize
from llama_jax.model.quantizing import quantize
from llama_jax.model.remat import REMAT
from llama_jax.plan.planner import Planner
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import make_job
from llama_jax.training.fit import fit, put_batch
from llama_jax.training.halves import halve, split_bits
from llama_jax.training.state import init_state
from llama_jax.training.step import losses_of

# bf16 rounds at 2^-9: a gradient sums many rounded terms behind a few layers, and its relative error is a few
# roundings; a wrong mask or a lost row causes an error of order 1.
LOSS, NORM, GRADIENT = 2e-3, 1e-2, 6e-2
# The two runs round in different places, and Adam turns the rounding of small gradients into whole steps.
CURVE = 1e-2
# Packing computes the same products in other shapes, whose sums a device orders differently. The control, padded four
# examples at a time, shows the effect of the order at these sizes; packing may differ by at most twice as much.
PACKED = 2
# 20 updates on several devices: float32 sums in another order, a difference that Adam's divisions increase.
MESHES = 1e-3
# bf16 rounds a product once, an error of 1.7e-3 in the mean. Hopper's units add fp8 products in 14 bits; fast sums stay
# there, others go on in float32 after each 128.
EXACT_SUM, FAST_SUM = 3e-3, 1e-2
# Float32 sums of some 500 products in another order: a random walk of 22 roundings of 2^-24, 1.3e-6. One pass of bf16
# leaves 2.4e-3.
FLOAT32 = 1e-5
PRODUCT = (512, 512)  # outputs and inputs of the projections that `check_products` compares
# Fast sums may add this share to the error that fp8's roundings make.
FAST = 1.25
# What each sister model has beside LLaMA's mathematics.
SISTERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 100},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 1 / 64}
    | {"logits_scaling": 8.0},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": None},
}


@partial(jax.jit, static_argnums=0)
def _normal(kind, key):
    spec = kind.sharding.spec
    if jnp.issubdtype(kind.dtype, jnp.integer):
        return (127 * jax.random.uniform(key, kind.shape, out_sharding=spec)).astype(kind.dtype)
    return 0.02 * jax.random.normal(key, kind.shape, kind.dtype, out_sharding=spec)


def random_params(abstract, mesh):
    """Return normal matrices, norms of 1 and codes of any bits, made on the device."""
    key = jax.random.key(0, impl="unsafe_rbg")  # threefry of hundreds of leaves compiles for minutes
    leaves, tree = jax.tree.flatten_with_path(abstract)
    with jax.set_mesh(mesh):
        made = [
            jnp.ones(a.shape, a.dtype, out_sharding=a.sharding.spec)
            if any("norm" in str(part) for part in path)
            else _normal(a, jax.random.fold_in(key, i))
            for i, (path, a) in enumerate(leaves)
        ]
    return jax.tree.unflatten(tree, made)


@jax.jit
def _distance(value, expected) -> jax.Array:
    return optax.tree.norm(value - expected) / optax.tree.norm(expected)


def distance(value, expected) -> float:
    """Return the relative distance of two arrays in the Frobenius norm."""
    return float(_distance(value, expected))


@jax.jit
def _compared(found, expected):
    """Return the ratio of two trees' norms, and the largest distance of two leaves."""
    worst = jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(_distance, found, expected))))
    return optax.tree.norm(found) / optax.tree.norm(expected), worst


def same_gradients(name: str, found: tuple[float, Any], expected: tuple[float, Any]) -> Row:
    """Return how far a loss and its gradients are from the expected, beside what rounding explains.

    It is one program: of two at once, several simulated devices may each wait for the other.
    """
    off = abs(found[0] - expected[0]) / abs(expected[0])
    ratio, worst = map(float, _compared(found[1], expected[1]))
    return Row(name, {"loss": (off, LOSS), "norm": (abs(ratio - 1), NORM), "worst gradient": (worst, GRADIENT)})


SEGMENTS = 5


def packed_rows(config: LlamaConfig, mesh, B: int = 2) -> Batch:
    """Return rows of SEGMENTS examples of odd lengths, on the devices of `mesh`."""
    T = 384
    rng = np.random.default_rng(1)
    ids, positions = attention_kernels.make_rows(rng, B, T, SEGMENTS)
    tokens = rng.integers(0, config.vocab_size, (B, T), np.int32)
    weights = (ids > 0) * rng.random((B, T), np.float32) / ids.size
    host = Batch(
        tokens, positions, ids, np.full((B, T), 512, np.int32), np.roll(tokens, -1, 1), weights.astype(np.float32)
    )
    return put_batch(mesh, host)


def check_adapters(config: LlamaConfig, mesh, kernel: str) -> Iterator[Row]:
    batch = packed_rows(config, mesh)
    places = tuple(((i, p), Rank(16, 2.0)) for i in range(config.num_hidden_layers) for p in PROJECTIONS)

    def gradients(options: RunOptions, params):
        definition = define(config, options, mesh)
        trainable, frozen = definition.split(params)

        def loss(trainable, frozen, batch):
            return losses_of(definition.graphdef, merge(trainable, frozen), batch, config.vocab_size)[0]

        with jax.set_mesh(mesh):
            value, grads = jax.jit(jax.value_and_grad(loss))(trainable, frozen, batch)
        return float(value), grads

    for quantization in (None, Quantization(4), Quantization(4, nested=True), Quantization(8)):
        for use_dora in (False, True):
            lora = Lora(places, use_dora=use_dora)
            bf16 = RunOptions(compute_dtype=jnp.bfloat16, attention=Kernel(kernel, SEGMENTS), lora=lora)
            params = random_params(define(config, RunOptions(lora=lora), mesh).params, mesh)
            own = {number: dict(layer) for number, layer in params["layers"].items()}
            abstract = define(config, replace(bf16, quantization=quantization), mesh).params["layers"]
            for (number, projection), _ in places:
                block, name = projection.split(".")
                module = own[number][block][name]
                if quantization:
                    like = jax.tree.map(lambda a: a.sharding, abstract[number][block][name]["weight"])
                    q = jax.device_put(quantize(np.asarray(module["weight"]), quantization, name), like)
                    own[number][block] = {**own[number][block], name: {**module, "weight": q}}
                    with jax.set_mesh(mesh):
                        module["weight"] = dequantize(q, jnp.float32)
                if use_dora:
                    magnitude = module["adapter"]["lora_magnitude"]
                    lengths = jnp.linalg.norm(module["weight"], axis=1)
                    magnitude["weight"] = jax.device_put(lengths, magnitude["weight"].sharding)
            expected_loss, expected = gradients(RunOptions(lora=lora), params)
            loss, grads = gradients(replace(bf16, quantization=quantization), {**params, "layers": own})
            name = f"{'DoRA' if use_dora else 'LoRA'} over {quantization or 'a plain base'}"
            yield same_gradients(name, (loss, grads), (expected_loss, expected))


def check_gradients(config: LlamaConfig, mesh, kernel: str, reference=None) -> Iterator[Row]:
    """Compare a model's loss and gradients for each choice of --remat, stacked and not, with plain XLA in float32.

    `reference` is the mesh that computes in float32, by default `mesh`.
    """
    reference, B = reference or mesh, max(2, sharding.batch_ways(mesh))
    batches = {one: packed_rows(config, one, B) for one in (reference, mesh)}
    params = random_params(define(config, RunOptions(), mesh).params, mesh)

    def move(tree, mesh):
        like = define(config, RunOptions(), mesh).params
        return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), tree, like)

    def compiled(options: RunOptions, mesh):
        definition = define(config, options, mesh)
        abstract = definition.params

        def gradients(weights, batch):
            def loss(weights):
                return losses_of(definition.graphdef, weights, batch, config.vocab_size)[0]

            return jax.value_and_grad(loss)(weights)

        with jax.set_mesh(mesh):
            weights = jax.eval_shape(lambda params: halve(params, definition.halved)[0], abstract)
            weights = jax.tree.map(lambda a: sharding.on(mesh, a), weights)
            return jax.jit(gradients).lower(weights, batches[mesh]).compile(compiler_options(mesh, False))

    def run(program, options: RunOptions, mesh, params):
        with jax.set_mesh(mesh):
            weights = halve(params, define(config, options, mesh).halved, jax.jit(split_bits))[0]
            value, grads = jax.block_until_ready(program(weights, batches[mesh]))
        return float(value), jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    choices = [(scan, remat) for scan in (False, True) for remat in REMAT]
    kernels, sums = Kernel(kernel, SEGMENTS, mesh.devices.flat[0].device_kind), Sum(sharding.exchanges(mesh))
    bf16 = RunOptions(compute_dtype=jnp.bfloat16, attention=kernels, sums=sums)
    every = [RunOptions(attention=XLA), *(replace(bf16, scan_layers=scan, remat=remat) for scan, remat in choices)]
    with ThreadPoolExecutor(4) as pool:
        plain, *programs = pool.map(compiled, every, [reference, *(mesh for _ in choices)])
    expected_loss, expected = run(plain, every[0], reference, move(params, reference))
    expected = move(expected, mesh)
    for (scan, remat), options, program in zip(choices, every[1:], programs, strict=True):
        if scan and 0 in params["layers"]:  # stacking consumes the layers
            with jax.set_mesh(mesh):
                params, expected = stack_layers(params), stack_layers(expected)
        found = run(program, options, mesh, params)
        with jax.set_mesh(mesh):
            row = same_gradients(
                f"{'stacked' if scan else 'unrolled'}, --remat {remat}", found, (expected_loss, expected)
            )
        yield row


def check_products(mesh, dtype) -> Iterator[Row]:
    """Compare projections over all devices, and the gradients of input and weight, with float64 on the host.

    Weights lie as the model's do: a device has a part of the outputs. Each device has rows of its own: their shares of
    the weight's gradient are summed over devices.
    """
    B, T, bound = 2 * sharding.batch_ways(mesh), 128, EXACT_SUM if jnp.dtype(dtype) == jnp.bfloat16 else FLOAT32
    rng = np.random.default_rng(3)
    for spec, out in ((sharding.COLUMN_FD, sharding.ACT_BTF), (sharding.ROW_DF, sharding.ACT_BTD)):
        shapes = (B, T, PRODUCT[1]), PRODUCT, (B, T, PRODUCT[0])
        arrays = [np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32), dtype)) for shape in shapes]
        x, weight, dy = (array.astype(np.float64) for array in arrays)
        expected = x @ weight.T, dy @ weight, np.einsum("BTO,BTI->OI", dy, x)
        specs = sharding.ACT_BTD, spec, out
        placed = [jax.device_put(a, jax.NamedSharding(mesh, p)) for a, p in zip(arrays, specs, strict=True)]

        def products(x, weight, dy, out=out):
            y, pull = jax.vjp(partial(matmul.project, out, Sum(sharding.exchanges(mesh))), x, weight)
            return y, *pull(dy)

        options = compiler_options(mesh, False)
        with jax.set_mesh(mesh):
            found = [np.asarray(a).astype(np.float64) for a in jax.jit(products, compiler_options=options)(*placed)]
        off = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True)]
        errors = {of: (error, bound) for of, error in zip(("y", "dx", "dW"), off, strict=True)}
        kind = "outputs" if spec == sharding.COLUMN_FD else "inputs and outputs"
        name = f"projection in {jnp.dtype(dtype).name}, {kind} divided, {sharding.describe_mesh(mesh)}"
        yield Row(name, errors)


def check_fp8(config: LlamaConfig, mesh, kernel: str) -> Iterator[Row]:
    """Compare each product of fp8, forward and backward, with the same fp8 values multiplied in float32; then print how
    far the gradients of a model are from those in float32, in the mean, with the fast sums of its forward pass and not.

    Two runs of a model are no measure: a difference in the last bit of bf16 moves values across fp8's wide steps, and
    after some ten roundings as many values differ as in two independent roundings.
    """
    product, options = matmul._einsum, compiler_options(mesh, True)

    def exact_sums(form, a, b, out, dtype, fast=False):
        return product(form, a, b, out, dtype)

    def with_product(einsum: Callable, f: Callable, *args):
        jax.clear_caches()  # layers are traced once for all programs
        matmul._einsum = einsum
        try:
            return jax.jit(f, compiler_options=options)(*args)
        finally:
            matmul._einsum = product

    def products(x, weight, dy):
        (y,), pull = jax.vjp(lambda x, weight: matmul.project_fp8(None, SCATTER, x, [weight]), x, weight)
        return y, *pull([dy])

    def values(x, dtype):
        """Return fp8 values in float32, an array of its own: in one program XLA leaves out the rounding to fp8."""
        scaled = jax.jit(matmul.quantize, static_argnums=1)(x, dtype)
        return scaled.values.astype(jnp.float32) * scaled.unit

    D, F = config.hidden_size, config.intermediate_size
    for outputs, inputs in ((D, D), (F, D), (D, F)):
        keys = map(partial(jax.random.fold_in, jax.random.key(outputs + 2 * inputs, impl="unsafe_rbg")), range(3))
        shapes = (2, 384, inputs), (outputs, inputs), (2, 384, outputs)
        x, weight, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
        x8, weight8, dy8 = values(x, matmul.VALUES), values(weight, matmul.VALUES), values(dy, matmul.GRADIENTS)
        expected = x8 @ weight8.T, dy8 @ weight8, jnp.einsum("BTO,BTI->OI", dy8, x8)
        off = {}
        for name, einsum in (("fast", product), ("exact", exact_sums)):
            found = with_product(einsum, products, x, weight, dy)
            off[name] = [distance(a.astype(jnp.float32), b) for a, b in zip(found, expected, strict=True)]
        exact = {of: (error, EXACT_SUM) for of, error in zip(("y, exact sums", "dx", "dW"), off["exact"], strict=True)}
        yield Row(f"fp8, weight [{outputs}, {inputs}]", {"y": (off["fast"][0], FAST_SUM), **exact})

    batch = packed_rows(config, mesh)
    params = random_params(define(config, RunOptions(), mesh).params, mesh)

    def gradients(run: RunOptions, einsum: Callable):
        definition = define(config, run, mesh)

        def loss(weights, batch):
            return losses_of(definition.graphdef, weights, batch, config.vocab_size)[0]

        with jax.set_mesh(mesh):
            weights = halve(params, definition.halved, jax.jit(split_bits))[0]
            value, grads = with_product(einsum, jax.value_and_grad(loss), weights, batch)
        return float(value), jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    run = RunOptions(compute_dtype=jnp.bfloat16, fp8=True, attention=Kernel(kernel, SEGMENTS))
    in_float32, mean = gradients(RunOptions(), product), dict[str, float]()
    for name, einsum in (("fast sums", product), ("exact sums", exact_sums)):
        value, found = gradients(run, einsum)
        mean[name] = float(np.mean(jax.tree.leaves(jax.tree.map(distance, found["layers"], in_float32[1]["layers"]))))
        print(
            f"fp8, {name}: loss {value:.5f} (float32 {in_float32[0]:.5f}), gradients off by {mean[name]:.1e} on average"
        )
    yield Row("fp8, gradients of a model", {"mean, fast sums": (mean["fast sums"], FAST * mean["exact sums"])})


def train(folder: str, flags: str, lengths, config: LlamaConfig, mesh, platform: str, updates: int):
    """Make updates from random weights on random tokens; return the last state, and loss and gradient norm of each
    update."""
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
    data = Path(folder) / "data.json"
    write_json(data, [{"input_ids": row, "labels": row} for row in rows])
    base = f"--model_name_or_path {folder} --data_path {data} --cache_dir {folder}/cache --max_steps {updates} "
    ranks = sharding.batch_ways(mesh)
    base += f"--per_device_train_batch_size 1 --gradient_accumulation_steps {8 // ranks}"
    args = parse_arguments([*base.split(), *flags.split()])
    job = make_job(args, config, lambda: Path(folder), ranks, True)
    plan = Planner(job, mesh, platform, "float32", bool(args.scan_layers)).settle(memory_limit())
    blocks = f"at most {plan.batches.block_counts.max()} block(s) an update of {plan.batches.shapes}"
    print(f"{plan.run.attention.name}, --remat {plan.run.remat}, {blocks}", flush=True)
    abstract = define(config, RunOptions(), mesh).params
    params = random_params(abstract, mesh)
    curve: list[tuple[float, float]] = []
    state = fit(
        init_state(stack_layers(params) if args.scan_layers else params, plan.tx, plan.definition, mesh),
        *(plan.steps, plan.batches, mesh, range(updates)),
        learning_rate=job.schedule.rate,
        on_update=lambda m: curve.append((m.loss, m.grad_norm)),
        due=lambda step: False,
        on_due=lambda k, state, stopping: stopping,
        stop=lambda: False,
    )
    return state, np.asarray(curve)


def check_packing(config: LlamaConfig, mesh, platform: str) -> Iterator[Row]:
    lengths, off = (61, 127, 250, 93, 142, 38, 201, 89), []
    with tempfile.TemporaryDirectory() as folder:

        def gradients(flags: str) -> tuple[float, list[jax.Array]]:
            flags += " --hf_compat 5 --remat matmuls --max_grad_norm 0 --scan_layers True"
            state, curve = train(folder, flags, lengths, config, mesh, platform, 1)
            return curve[0, 0], jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "mu"))

        loss, moments = jax.device_get(gradients("--packing False"))
        four = "--packing False --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
        for flags in (four, "--packing True --max_tokens_per_device 1152"):
            other, others = gradients(flags)
            off.append((abs(other / loss - 1), max(map(distance, others, moments))))
            del others  # frees their memory first
    control, packed = np.asarray(off)
    bounds = PACKED * np.maximum(control, 2.0**-23)
    errors = {of: (packed[i], bounds[i]) for i, of in enumerate(("loss", "worst gradient"))}
    yield Row(f"packed against one by one, float32, {config.num_hidden_layers} layers", errors)


def check_curve(config: LlamaConfig, mesh, platform: str) -> Iterator[Row]:
    lengths = np.random.default_rng(2).integers(30, 300, 200)
    plain = "--attention xla --remat full --accumulation multisteps --max_tokens_per_device 512 --scan_layers True"
    with tempfile.TemporaryDirectory() as folder:
        curves = [
            train(folder, f"--bf16 True --learning_rate 1e-4 {flags}", lengths, config, mesh, platform, 20)[1]
            for flags in (plain, "")
        ]
    yield same_curve("20 updates", curves[1], curves[0], CURVE)


def same_curve(name: str, found: np.ndarray, expected: np.ndarray, bound: float) -> Row:
    """Return how far the losses and gradient norms [updates, 2] are from the expected, relatively, at most."""
    losses, norms = np.abs(found / expected - 1).max(axis=0)
    return Row(name, {"losses": (float(losses), bound), "norms": (float(norms), bound)})


def check_meshes(config: LlamaConfig, platform: str, kind: str) -> Iterator[Row]:
    lengths, devices = np.random.default_rng(2).integers(30, 300, 200), jax.devices()
    meshes = [sharding.make_mesh(devices[:1])]
    meshes += [sharding.make_mesh(devices, f"{axis}={len(devices)}") for axis in ("fsdp", "tensor")]
    flags, bound = ("--bf16 True", CURVE) if kind == "bf16" else ("", MESHES)
    with tempfile.TemporaryDirectory() as folder:
        one, *others = (
            train(folder, f"--learning_rate 1e-4 {flags}", lengths, config, mesh, platform, 20)[1] for mesh in meshes
        )
    for mesh, curve in zip(meshes[1:], others, strict=True):
        name = f"20 updates in {kind}, {sharding.describe_mesh(mesh)} against one device"
        yield same_curve(name, curve, one, bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, default=2, help="of the model in 2 to 5 and 7")
    parser.add_argument("--update_layers", type=int, default=2, help="of that in 6")
    parser.add_argument("--fp8", action="store_true", help="check the products of fp8 too")
    args = parser.parse_args()
    platform, mesh = set_up_jax(), sharding.make_mesh(jax.devices()[:1])
    config, whole = (
        LlamaConfig.from_hf({**raw_config(args.shape, layers), "tie_word_embeddings": False})
        for layers in (args.layers, args.update_layers)
    )
    kernel, why = choose_kernel("auto", platform, mesh.devices.flat[0].device_kind, config.head_dim, "bfloat16")
    print(f"{args.shape}, {args.layers} layers; attention by {kernel}: {why}")
    good = all_fine(attention_kernels.check("auto", mesh)) & all_fine(attention_kernels.check_cached(mesh))
    good &= all_fine(check_products(sharding.make_mesh(), jnp.bfloat16))
    good &= all_fine(check_gradients(config, mesh, kernel))
    for family, keys in SISTERS.items():
        print(family)
        sister = LlamaConfig.from_hf({**raw_config("smollm2-135m", 2), "model_type": family, **keys})
        good &= all_fine(check_gradients(sister, mesh, kernel))
    good &= all_fine(check_adapters(config, mesh, kernel))
    if args.fp8:
        good &= all_fine(check_fp8(config, mesh, kernel))
    good &= all_fine(check_curve(config, mesh, platform))
    good &= all_fine(check_packing(whole, mesh, platform))
    for kind in ("float32", "bf16") if jax.device_count() > 1 else ():
        good &= all_fine(check_meshes(config, platform, kind))
    print("right" if good else "WRONG")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
