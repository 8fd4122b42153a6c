"""Decode greedily or by sampling: prefill, then token by token with a KV cache.

Letters: B rows, T tokens of a prompt, S slots of the cache, N new tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import placed
from llama_jax.model.llama import Llama, make_cache

SLOT_MULTIPLE = 128  # prompts are padded to a multiple, so that few lengths are compiled


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Return the new tokens of each prompt (ids, beginning token included), without the end token.

    Decoding is greedy at temperature 0; otherwise tokens are drawn from softmax(logits / temperature). The caller sets
    the parameters' mesh, if any.
    """
    longest = max(map(len, prompts))
    T = -(-longest // SLOT_MULTIPLE) * SLOT_MULTIPLE
    S = T + -(-max_new_tokens // SLOT_MULTIPLE) * SLOT_MULTIPLE
    ids = np.zeros((len(prompts), T), np.int32)
    positions = np.full((len(prompts), T), S, np.int32)  # past the cache: keys and values of padding are dropped
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    sizes = np.asarray([len(p) for p in prompts], np.int32)
    graphdef, params = nnx.split(model)
    ends, key = tuple(eos_token_ids), jax.random.key(seed)
    new = _generate(graphdef, max_new_tokens, ends, temperature, S, params, ids, positions, sizes, key)
    rows = []
    for row in np.asarray(jax.device_get(new)).tolist():
        places = [i for i, token in enumerate(row) if token in eos_token_ids]
        rows.append(row[: places[0]] if places else row)
    return rows


@partial(jax.jit, static_argnums=range(5))
def _generate(graphdef, N, eos, temperature, S, params, ids_BT, positions_BT, sizes_B, key):
    model = nnx.merge(graphdef, params)
    B = ids_BT.shape[0]
    ids_BT, positions_BT = (sharding.reshard(x, sharding.ACT_BT) for x in (ids_BT, positions_BT))
    sizes_B = sharding.reshard(sizes_B, sharding.P(sharding.BATCH))
    cache = make_cache(model.config, model.run, B, S)
    segments = jnp.ones_like(ids_BT)
    hidden, cache = model(ids_BT, positions_BT, segments, jnp.zeros_like(ids_BT) + jnp.max(sizes_B), cache)
    is_last = jnp.arange(ids_BT.shape[1]) == (sizes_B - 1)[:, None]
    last = jnp.sum(jnp.where(is_last[..., None], hidden, 0), axis=1, keepdims=True)

    def choose(hidden_B1D, key):
        logits_BV = model.logits(hidden_B1D)[:, 0]
        if temperature <= 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)

    def unfinished(carry):
        n, _, _, done_B, _, _ = carry
        return (n < N) & ~jnp.all(done_B)

    def one(carry):
        n, token_B, new_BN, done_B, cache, key = carry
        new_BN = jnp.where(jnp.arange(N) == n, token_B[:, None], new_BN)
        done_B = done_B | jnp.isin(token_B, jnp.asarray(eos, jnp.int32))
        position_B1 = (sizes_B + n)[:, None]
        hidden, cache = model(token_B[:, None], position_B1, jnp.ones_like(position_B1), position_B1 + 1, cache)
        key, sub = jax.random.split(key)
        return n + 1, choose(hidden, sub), new_BN, done_B, cache, key

    key, sub = jax.random.split(key)
    new_BN = jnp.full((B, N), eos[0] if eos else 0, jnp.int32, out_sharding=placed(sharding.ACT_BT))
    start = (jnp.int32(0), choose(last, sub), new_BN, jnp.zeros_like(sizes_B, dtype=bool), cache, key)
    return jax.lax.while_loop(unfinished, one, start)[2]
