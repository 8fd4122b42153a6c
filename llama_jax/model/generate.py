"""Decode greedily or by sampling: prefill, then token by token with a KV cache.

Letters: B rows, T tokens of a prompt, S slots of the cache, N new tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import placed
from llama_jax.model.llama import Llama, make_cache

SLOT_MULTIPLE = 128  # prompts are padded to a multiple, so that few lengths are compiled


class Sampling(NamedTuple):
    """Describe how a token is chosen: greedily at temperature 0, otherwise drawn from softmax(logits / temperature).

    `top_k` leaves the k likeliest tokens (0: all), then `top_p` the likeliest whose probabilities sum to p. Of these,
    `min_p` leaves those of at least that share of the likeliest. `repetition_penalty` divides the positive logits of
    tokens that the row already holds, prompt included, and multiplies the negative ones.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[list[int]]:
    """Return the new tokens of each prompt (ids, beginning token included), without the end token.

    The caller sets the parameters' mesh, if any.
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
    seen = np.zeros((len(prompts), model.config.vocab_size if sampling.repetition_penalty != 1 else 1), bool)
    for row, prompt in enumerate(prompts if seen.shape[1] > 1 else ()):
        seen[row, np.asarray(prompt)] = True
    graphdef, params = nnx.split(model)
    ends, key = tuple(eos_token_ids), jax.random.key(seed)
    new = _generate(graphdef, max_new_tokens, ends, sampling, S, params, ids, positions, sizes, seen, key)
    rows = []
    for row in np.asarray(jax.device_get(new)).tolist():
        places = [i for i, token in enumerate(row) if token in eos_token_ids]
        rows.append(row[: places[0]] if places else row)
    return rows


@partial(jax.jit, static_argnums=range(5))
def _generate(graphdef, N, eos, sampling, S, params, ids_BT, positions_BT, sizes_B, seen_BV, key):
    model = nnx.merge(graphdef, params)
    B = ids_BT.shape[0]
    ids_BT, positions_BT = (sharding.reshard(x, sharding.ACT_BT) for x in (ids_BT, positions_BT))
    sizes_B = sharding.reshard(sizes_B, sharding.P(sharding.BATCH))
    seen_BV = sharding.reshard(seen_BV, sharding.P(sharding.BATCH, None))
    cache = make_cache(model.config, model.run, B, S)
    segments = jnp.ones_like(ids_BT)
    hidden, cache = model(ids_BT, positions_BT, segments, jnp.zeros_like(ids_BT) + jnp.max(sizes_B), cache)
    is_last = jnp.arange(ids_BT.shape[1]) == (sizes_B - 1)[:, None]
    last = jnp.sum(jnp.where(is_last[..., None], hidden, 0), axis=1, keepdims=True)

    def choose(hidden_B1D, seen_BV, key):
        logits_BV = warp(model.logits(hidden_B1D)[:, 0], seen_BV, sampling)
        if sampling.temperature <= 0:
            token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        else:
            token_B = jax.random.categorical(key, logits_BV).astype(jnp.int32)
        return token_B, seen_BV | (jnp.arange(seen_BV.shape[1]) == token_B[:, None])

    def unfinished(carry):
        n, _, _, done_B, *_ = carry
        return (n < N) & ~jnp.all(done_B)

    def one(carry):
        n, token_B, new_BN, done_B, seen_BV, cache, key = carry
        new_BN = jnp.where(jnp.arange(N) == n, token_B[:, None], new_BN)
        done_B = done_B | jnp.isin(token_B, jnp.asarray(eos, jnp.int32))
        position_B1 = (sizes_B + n)[:, None]
        hidden, cache = model(token_B[:, None], position_B1, jnp.ones_like(position_B1), position_B1 + 1, cache)
        key, sub = jax.random.split(key)
        token_B, seen_BV = choose(hidden, seen_BV, sub)
        return n + 1, token_B, new_BN, done_B, seen_BV, cache, key

    key, sub = jax.random.split(key)
    new_BN = jnp.full((B, N), eos[0] if eos else 0, jnp.int32, out_sharding=placed(sharding.ACT_BT))
    token_B, seen_BV = choose(last, seen_BV, sub)
    start = (jnp.int32(0), token_B, new_BN, jnp.zeros_like(sizes_B, dtype=bool), seen_BV, cache, key)
    return jax.lax.while_loop(unfinished, one, start)[2]


def warp(logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the logits to choose from, by the rules and in the order of transformers' processors; -inf is never drawn.

    Of equal logits at a limit all stay. `seen_BV` marks the tokens of each row, for `repetition_penalty` alone.
    """
    if (penalty := sampling.repetition_penalty) != 1:
        punished_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, punished_BV, logits_BV)
    if sampling.temperature <= 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    V = logits_BV.shape[1]
    if 0 < sampling.top_k < V:
        least_B1 = jnp.sort(logits_BV, axis=-1)[:, V - sampling.top_k][:, None]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        rising_BV = jnp.sort(logits_BV, axis=-1)
        kept_BV = jnp.cumsum(jax.nn.softmax(rising_BV, axis=-1), axis=-1) > 1 - sampling.top_p
        kept_BV |= jnp.arange(V) == V - 1
        least_B1 = jnp.min(jnp.where(kept_BV, rising_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.min_p > 0:
        most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        unlikely_BV = jnp.exp(logits_BV - most_B1) < sampling.min_p
        logits_BV = jnp.where(unlikely_BV, -jnp.inf, logits_BV)
    return logits_BV
