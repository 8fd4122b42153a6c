"""Compute the logits of a few prompts in float32, one layer at a time, from parameters of any floating type.

A program of its own for embedding, layer and head: the first compiles once for all layers, and no device holds more
than one layer in float32 beside the parameters.

Letters: B rows, T tokens, D model, V vocabulary, C chosen columns.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama_jax.distributed import sharding
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, merge, without
from llama_jax.model.llama import Llama, RunOptions, Tokens, run_block
from llama_jax.model.lora import Lora
from llama_jax.model.roles import Params

MULTIPLE = 16  # tokens that a row is padded to, so that prompts of other tokenizers mostly have one shape

# Return the parameters of a part of the tree, a name or a layer's number, as a tree with this part alone.
Read = Callable[[str | int], Params]


class PromptLogits(NamedTuple):
    """Hold the logits after each token of a prompt: those of chosen columns [T, C], the likeliest id [T], and the
    largest magnitude over the whole vocabulary [T], NaN where any logit is NaN or Inf."""

    chosen: np.ndarray
    likeliest: np.ndarray
    largest: np.ndarray


def prompt_logits(
    config: LlamaConfig,
    lora: Lora | None,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    columns: Sequence[int],
    read: Read,
) -> list[PromptLogits]:
    """Return the logits of prompts, which are ids, by the parameters that `read` returns; layers have numbers there,
    stacked or not. All processes must call this."""
    definition = define(config, RunOptions(lora=lora), mesh)

    def model(params: Params) -> Llama:
        """Return the model with these parameters in float32; the others are descriptions."""
        rest = without(definition.params, params)
        return nnx.merge(definition.graphdef, merge(rest, _in_float32(params)))

    @jax.jit
    def begin(params: Params, ids_BT, positions_BT, segments_BT, lengths_BT) -> tuple[jax.Array, Tokens]:
        own = model(params)
        return own.embed(ids_BT), own.tokens(positions_BT, segments_BT, lengths_BT, ids_BT.shape[1])

    @jax.jit
    def end(params: Params, x: jax.Array) -> tuple[jax.Array, ...]:
        own = model(params)
        logits = own.logits(own.norm(x))
        chosen = logits.at[..., np.asarray(columns)].get(out_sharding=sharding.placed(sharding.ACT_BTD))
        largest = jnp.max(jnp.abs(logits), axis=-1)  # of a NaN, XLA's maximum on the CPU may be any other number
        largest = jnp.where(jnp.isfinite(logits).all(axis=-1), largest, jnp.nan)
        return chosen, jnp.argmax(logits, axis=-1), largest

    longest = max(map(len, prompts))
    B = math.ceil(len(prompts) / sharding.batch_ways(mesh)) * sharding.batch_ways(mesh)
    multiple = max(MULTIPLE, sharding.row_ways(mesh))  # both are powers of two
    T = math.ceil(longest / multiple) * multiple
    ids, segments = np.zeros((2, B, T), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    lengths = np.full_like(ids, longest)  # of the batch, as transformers takes it for a batch with pads
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        places = [sharding.put(mesh, array) for array in (ids, positions, segments, lengths)]
        x, tokens = begin(read("embed_tokens"), *places)
        rotates = config.rope_layers or None
        for i, layer in enumerate(model({}).layers):
            turned = rotates and np.bool_(rotates[i])
            # One at a time: sharding.IN_FLIGHT has the reason, and a layer that is read from files should go.
            x = jax.block_until_ready(_layer(nnx.split(layer)[0], read(i)["layers"][i], x, tokens, turned))
        head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        found = end(merge(read("norm"), read(head)), x)
        arrays = [np.asarray(array) for array in sharding.read(found)]
    return [PromptLogits(*(array[row, : len(prompt)] for array in arrays)) for row, prompt in enumerate(prompts)]


def _in_float32(params: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


@partial(jax.jit, static_argnums=0)
def _layer(graphdef: Any, params: Params, x: jax.Array, tokens: Tokens, rotates: Any) -> jax.Array:
    """Return the output [B, T, D] of a layer by its graph definition, equal for layers that jax compiles once."""
    return run_block(graphdef, "none", _in_float32(params), x, tokens.of_layer(0, rotates), None)[0]
