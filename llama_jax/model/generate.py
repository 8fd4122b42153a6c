"""Decode greedily or by sampling: prefill, then token by token with a KV cache.

Letters: B rows, T tokens of a prompt, S slots of the cache, N new tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import placed
from llama_jax.model.cache import make_cache
from llama_jax.model.llama import Llama

SLOT_MULTIPLE = 128  # prompts are padded to a multiple, so that few lengths are compiled
AT_ONCE = 128  # tokens of a row that the device decodes before the host sees them
_PIECE = 4  # tokens between tests for the end of all rows: on a GPU a test waits 0.1 ms for the host
_NONE = -1  # a place after a row's end


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


class _State(NamedTuple):
    """Carry a block from token to token. `token_B` was chosen last, for position `position_B`; the cache lacks it."""

    token_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array
    cache: Any
    key_B: jax.Array


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
    decoding = Decoding(model, prompts, max_new_tokens, eos_token_ids, sampling, seed)
    while not decoding.finished:
        decoding.step(AT_ONCE)
    return decoding.rows


class Decoding:
    """Decode a block of prompts step by step. `rows` holds the new tokens of each, without the end token.

    Row i draws its tokens by `seed` and `numbers[i]`, by default i, whatever rows are beside it. `doubling` pads
    lengths to powers of two: a prompt that grows needs fewer programs. The caller sets the parameters' mesh, if any.
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        sampling: Sampling = Sampling(),
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        doubling: bool = False,
    ):
        B = len(prompts)
        T = _padded(max(map(len, prompts)), doubling)
        S = _padded(T + max_new_tokens, doubling)
        ids = np.zeros((B, T), np.int32)
        positions = np.full((B, T), S, np.int32)  # past the cache: keys and values of padding are dropped
        seen = np.zeros((B, model.config.vocab_size if sampling.repetition_penalty != 1 else 1), bool)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            positions[row, : len(prompt)] = np.arange(len(prompt))
            if seen.shape[1] > 1:
                seen[row, np.asarray(prompt)] = True
        sizes = np.asarray([len(p) for p in prompts], np.int32)
        keys = _keys(jax.random.key(seed), np.asarray(range(B) if numbers is None else numbers, np.uint32))
        graphdef, self._params = nnx.split(model)
        self._static = (graphdef, tuple(eos_token_ids), sampling)
        self._left = max_new_tokens
        self._ended = np.zeros(B, bool)
        self.rows: list[list[int]] = [[] for _ in prompts]
        self._state: _State = _prefill(*self._static, S, self._params, ids, positions, sizes, seen, keys)
        self._take(np.asarray(sharding.read(self._state.token_B))[:, None])

    @property
    def finished(self) -> bool:
        """Return whether each row has its end or `max_new_tokens`."""
        return self._left == 0 or bool(self._ended.all())

    @property
    def cut(self) -> list[bool]:
        """Return for each row whether it has no end yet."""
        return [not ended for ended in self._ended]

    def step(self, count: int) -> None:
        """Add up to `count` tokens, at most AT_ONCE, to each row that has no end."""
        if not self.finished:
            steps = np.int32(min(count, AT_ONCE, self._left))
            piece = 1 if count == 1 else _PIECE
            new, self._state = _decode(*self._static, piece, self._params, self._state, self._ended, steps)
            self._take(np.asarray(sharding.read(new))[:, :steps])

    def end(self, row: int) -> None:
        """End a row: no more tokens are added to it."""
        self._ended[row] = True

    def _take(self, new_BN: np.ndarray) -> None:
        self._left -= new_BN.shape[1]
        ends = self._static[1]
        for row, tokens in enumerate(new_BN.tolist()):
            for token in tokens:
                if self._ended[row]:
                    break
                if token in ends:
                    self._ended[row] = True
                else:
                    self.rows[row].append(token)


def _padded(length: int, doubling: bool) -> int:
    """Return the multiple of SLOT_MULTIPLE to pad to, or its product with a power of two."""
    multiples = -(-length // SLOT_MULTIPLE)
    return SLOT_MULTIPLE * (1 << (multiples - 1).bit_length() if doubling else multiples)


@jax.jit
def _keys(key, numbers_B):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers_B)


@partial(jax.jit, static_argnums=range(4))
def _prefill(graphdef, eos, sampling, S, params, ids_BT, positions_BT, sizes_B, seen_BV, key_B):
    """Return the state after the prompts, their next tokens chosen."""
    model = nnx.merge(graphdef, params)
    ids_BT, positions_BT = (sharding.reshard(x, sharding.ACT_BT) for x in (ids_BT, positions_BT))
    sizes_B, key_B = (sharding.reshard(x, sharding.P(sharding.BATCH)) for x in (sizes_B, key_B))
    seen_BV = sharding.reshard(seen_BV, sharding.P(sharding.BATCH, None))
    dtype = model.run.compute_dtype or model.run.param_dtype
    cache = make_cache(model.config, dtype, ids_BT.shape[0], S, model.run.scan_layers)
    segments = (positions_BT < S).astype(jnp.int32)
    hidden, cache = model(ids_BT, positions_BT, segments, jnp.zeros_like(ids_BT) + sizes_B[:, None], cache)
    is_last = jnp.arange(ids_BT.shape[1]) == (sizes_B - 1)[:, None]
    last = jnp.sum(jnp.where(is_last[..., None], hidden, 0), axis=1, keepdims=True)
    return _choose(model, eos, sampling, last, sizes_B, jnp.zeros_like(sizes_B, dtype=bool), seen_BV, cache, key_B)


@partial(jax.jit, static_argnums=range(4), donate_argnums=5)
def _decode(graphdef, eos, sampling, piece, params, state, ended_B, count):
    """Return up to `count` new tokens of each row [B, AT_ONCE], and the state after them. The old state is consumed.

    Tokens are computed by `piece`, a divisor of AT_ONCE. The state stays as it is after `count`: a token that is
    computed beyond it writes the same key and value again.
    """
    model = nnx.merge(graphdef, params)
    ended_B = sharding.reshard(ended_B, sharding.P(sharding.BATCH))

    def unfinished(carry):
        n, _, state = carry
        return (n < count) & ~jnp.all(state.done_B)

    def one(_, carry):
        n, new_BN, state = carry
        token_B, position_B, done_B, seen_BV, cache, key_B = state
        position_B1 = position_B[:, None]
        hidden, cache = model(token_B[:, None], position_B1, jnp.ones_like(position_B1), position_B1 + 1, cache)
        after = _choose(model, eos, sampling, hidden, position_B + 1, done_B, seen_BV, None, key_B)
        new_B = jnp.where(done_B, _NONE, after.token_B)
        after = jax.tree.map(partial(jnp.where, n < count), after, state._replace(cache=None))
        return n + 1, jnp.where(jnp.arange(AT_ONCE) == n, new_B[:, None], new_BN), after._replace(cache=cache)

    new_BN = jnp.full((ended_B.shape[0], AT_ONCE), _NONE, jnp.int32, out_sharding=placed(sharding.ACT_BT))
    state = state._replace(done_B=state.done_B | ended_B)
    pieces = partial(jax.lax.fori_loop, 0, piece, one)
    _, new_BN, state = jax.lax.while_loop(unfinished, pieces, (jnp.int32(0), new_BN, state))
    return new_BN, state


def _choose(model, eos, sampling, hidden_B1D, position_B, done_B, seen_BV, cache, key_B) -> _State:
    """Return the state with the next token of each row, for `position_B`, chosen by its last hidden state."""
    logits_BV = warp(model.logits(hidden_B1D)[:, 0], seen_BV, sampling)
    if sampling.temperature > 0:
        key_B, sub_B = jax.vmap(jax.random.split, out_axes=1)(key_B)
        logits_BV += jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(sub_B)
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    seen_BV |= jnp.arange(seen_BV.shape[1]) == token_B[:, None]
    done_B |= jnp.isin(token_B, jnp.asarray(eos, jnp.int32))
    return _State(token_B, position_B, done_B, seen_BV, cache, key_B)


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
