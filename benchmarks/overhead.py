#!/usr/bin/env python3
"""Measure the frameworks' cost: an update through Flax NNX and optax beside plain functions and a hand-written AdamW.

Three ways to accumulate the gradients of two blocks are measured too.

    python benchmarks/overhead.py [--shape llama-7b] [--layers 8] [--tokens 1152]

All runs are in bf16 on random weights, unrolled, without recomputation. Milliseconds an update: the median of 20, the
tenth and ninetieth percentile. The losses after all updates are printed too; equal losses show equal updates.
"""

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from correctness import random_params
from make_model import SHAPES, raw_config

from llama_jax.data.batches import Batch
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import set_up_jax
from llama_jax.model.attention import Kernel, choose_kernel, packed_attention
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import Definition, define
from llama_jax.model.llama import RunOptions
from llama_jax.model.rope import apply_rope, rope_cos_sin
from llama_jax.training.fit import put_batch
from llama_jax.training.halves import halve, join
from llama_jax.training.loss import weighted_cross_entropy
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import TrainState, init_state
from llama_jax.training.step import Steps, losses_of

B1, B2, EPS, RATE = 0.9, 0.999, 1e-8, np.float32(1e-5)
BF16 = jnp.bfloat16


def bare_loss(config: LlamaConfig, kernel: Kernel, w, batch: Batch):
    """Return the loss of the model as a plain function of its weights."""

    def linear(x, weight, out):
        return jnp.einsum("BTI,OI->BTO", x.astype(BF16), weight.astype(BF16), out_sharding=out)

    def norm(x, weight):
        return weight * (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps))

    H, F, D = config.head_dim, sharding.ACT_BTF, sharding.ACT_BTD
    x = w["embed_tokens"]["weight"].at[batch.input_ids].get(out_sharding=D)
    cos, sin = rope_cos_sin(config, batch.positions, batch.lengths, batch.input_ids.shape[1])
    for i in range(config.num_hidden_layers):
        layer = w["layers"][i]
        a, m = layer["self_attn"], layer["mlp"]
        h = norm(x, layer["input_layernorm"]["weight"])
        q, k, v = (linear(h, a[p]["weight"], F) for p in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (jnp.reshape(y, (*y.shape[:2], -1, H), out_sharding=sharding.ACT_BTNH) for y in (q, k, v))
        q, k = apply_rope(q, cos, sin).astype(BF16), apply_rope(k, cos, sin).astype(BF16)
        out = packed_attention(kernel, q, k, v, batch.segment_ids, batch.positions)
        out = jnp.reshape(out, (*out.shape[:2], -1), out_sharding=F)
        x = x + linear(out, a["o_proj"]["weight"], D)
        h = norm(x, layer["post_attention_layernorm"]["weight"])
        gate, up = linear(h, m["gate_proj"]["weight"], F), linear(h, m["up_proj"]["weight"], F)
        x = x + linear(jax.nn.silu(gate) * up, m["down_proj"]["weight"], D)
    hidden = norm(x, w["norm"]["weight"])
    head = jax.sharding.reshard(w["lm_head"]["weight"].astype(BF16), sharding.HEAD_VD)
    return weighted_cross_entropy(hidden, head, batch.targets, batch.weights, config.vocab_size)[0]


def bare_step(config: LlamaConfig, kernel: Kernel, halved):
    """Return the function (params, lower, mu, nu, count), block -> the same after an update, and the loss."""

    def step(params, lower, mu, nu, count, batch):
        loss, grads = jax.value_and_grad(lambda w: bare_loss(config, kernel, w, batch))(params)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
        scale, count = jnp.minimum(1.0, 1.0 / (norm + 1e-6)), count + 1

        def adam(p, g, m, v):
            g = g.astype(jnp.float32) * scale
            m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
            return p - RATE * (m / (1 - B1**count)) / (jnp.sqrt(v / (1 - B2**count)) + EPS), m, v

        new = jax.tree.map(adam, join(params, lower), grads, mu, nu)
        params, mu, nu = (jax.tree.map(lambda t, i=i: t[i], new, is_leaf=lambda x: type(x) is tuple) for i in range(3))
        return (*halve(params, halved), mu, nu, count), loss

    return jax.jit(step, donate_argnums=(0, 1, 2, 3, 4))


def scan_step(definition: Definition, tx, vocab_size: int):
    """Return the function state, stacked blocks -> the state after an update that scans its blocks, and the loss."""

    def step(state: TrainState, blocks: Batch):
        def add(sums, batch):
            def loss_of(params):
                return losses_of(definition.graphdef, params, batch, vocab_size)[0]

            loss, grads = jax.value_and_grad(loss_of)(state.trainable)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), loss

        params = join(state.trainable, state.lower)
        sums, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), blocks)
        updates, opt_state = tx.update(sums, state.opt_state, params, learning_rate=RATE)
        params, lower = halve(optax.apply_updates(params, updates), definition.halved)
        return TrainState(state.step + 1, params, state.frozen, opt_state, lower), losses.sum()

    return jax.jit(step, donate_argnums=0)


def make_block(config: LlamaConfig, tokens: int, segments: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    cuts = [0, *np.sort(rng.choice(np.arange(1, tokens), segments - 1, replace=False)), tokens]
    ids, positions = np.zeros((1, tokens), np.int32), np.zeros((1, tokens), np.int32)
    for i, (start, stop) in enumerate(pairwise(cuts), start=1):
        ids[0, start:stop], positions[0, start:stop] = i, np.arange(stop - start)
    values = rng.integers(0, config.vocab_size, (1, tokens), np.int32)
    weights = np.full((1, tokens), 1 / tokens, np.float32)
    return Batch(values, positions, ids, np.full_like(ids, tokens), np.roll(values, -1, 1), weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1152)
    parser.add_argument("--updates", type=int, default=20)
    args = parser.parse_args()
    platform, mesh, segments = set_up_jax(), sharding.make_mesh(), 8
    raw = {**raw_config(args.shape, args.layers), "tie_word_embeddings": False}
    config = LlamaConfig.from_hf(raw)
    name, _ = choose_kernel("auto", platform, mesh.devices.flat[0].device_kind, config.head_dim, "bfloat16")
    kernel = Kernel(name, segments)
    run = RunOptions(compute_dtype=BF16, attention=kernel)
    definition = define(config, run, mesh)
    blocks = [put_batch(mesh, make_block(config, args.tokens, segments, seed)) for seed in (1, 2)]
    rate = jax.device_put(RATE, sharding.replicated(mesh))

    def fresh(tx):
        return init_state(random_params(definition.params, mesh), tx, definition, mesh)

    def measure(what: str, update, state) -> None:
        """Time `update`, which maps the state to the next one and the loss.

        As in `fit`, an update is dispatched before the last one's loss is awaited.
        """
        done, (state, loss) = [], update(state)
        for _ in range(args.updates + 4):
            last, (state, loss) = loss, update(state)
            last.block_until_ready()
            done.append(1000 * time.perf_counter())
        low, middle, high = np.quantile(np.diff(done)[3:], (0.1, 0.5, 0.9))
        print(f"{what}: {middle:.2f} ms ({low:.2f}-{high:.2f}), loss {float(loss):.5f}", flush=True)

    print(f"{args.shape}, {args.layers} layers, blocks of {args.tokens} tokens, attention by {name}")
    plain = make_optimizer(b1=B1, b2=B2, eps=EPS, max_grad_norm=1.0)
    with jax.set_mesh(mesh):
        bare, state = bare_step(config, kernel, definition.halved), fresh(plain)
        zeros = [jax.tree.map(jnp.zeros_like, join(state.trainable, state.lower)) for _ in "mv"]
        held = (state.trainable, state.lower, *zeros, jnp.zeros((), jnp.int32))
        del state, zeros
        measure("one block, plain functions", lambda held: bare(*held, blocks[0]), held)
        del held
    several = make_optimizer(b1=B1, b2=B2, eps=EPS, max_grad_norm=1.0, blocks=np.asarray([2] * 100))
    ways = {
        "one block, NNX and optax": (plain, False, blocks[:1]),
        "two blocks, sums beside the optimizer": (plain, True, blocks),
        "two blocks, optax.MultiSteps": (several, False, blocks),
    }
    for what, (tx, sums, used) in ways.items():
        steps, state = Steps(definition, tx, config.vocab_size, sums=sums), fresh(tx)
        steps.compile(state, used[0].input_ids.shape, mesh)

        def update(state, steps=steps, used=used):
            state, outputs = steps.update(state, used, rate, mesh)
            return state, sum(out["loss"] for out in outputs)

        measure(what, update, state)
        del state, steps, update
    with jax.set_mesh(mesh):
        scanned = scan_step(definition, plain, config.vocab_size)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
        measure("two blocks, lax.scan in the step", lambda state: scanned(state, stacked), fresh(plain))


if __name__ == "__main__":
    main()
