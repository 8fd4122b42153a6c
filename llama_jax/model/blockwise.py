"""Compute packed causal attention on a CPU block by block: scores stay in the cache, other segments are skipped.

A block of queries visits the blocks of keys from its first segment's start, or its window's, to itself, as in
FlashAttention-2 (arXiv:2307.08691). Plain attention on a CPU is bound by the scores' way through memory.

Letters: B rows, T tokens (C of a block), S keys, N heads, K kv heads, G query heads per kv head, H head dim.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 64  # tokens: of 32, 64, 128 and 256 the fastest for 8 to 32 heads of 8 to 128 values (two cores, 2026-11-29)
SHORT = 128  # tokens of a row whose scores fit the cache as a whole: plain attention is as fast and compiles sooner
LEAST = float(jnp.finfo(jnp.float32).min)
_SUMS: dict[str, Any] = {"preferred_element_type": jnp.float32}


def blockwise(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    factor: float,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Return softmax(factor * q k') v over the keys of the same segment at no later position, in the last `window`.

    A row's segments lie side by side, positions restart with each, and padding is at its end. Products are in the
    operands' type, scores, softmax and sums in float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = jnp.transpose(q_BTNH.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4))
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    row = partial(_row, math.gcd(T, BLOCK), factor, window)
    out_BKGTH = jax.lax.map(lambda inputs: row(*inputs), (q_BKGTH, k_BKTH, v_BKTH, segment_ids, positions))
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _row(C: int, factor: float, window: int | None, q_KGTH, k_KTH, v_KTH, ids_T, positions_T):
    return _row_fwd(C, factor, window, q_KGTH, k_KTH, v_KTH, ids_T, positions_T)[0]


def _row_fwd(C: int, factor: float, window: int | None, q_KGTH, k_KTH, v_KTH, ids_T, positions_T):
    K, G, _, H = q_KGTH.shape

    def queries(i):
        q_KGCH = _block(q_KGTH, i, C)

        def keys(j, before):
            most, total, out = before  # each query's largest score so far, its sum of exponentials, and of values
            scores = _scores(q_KGCH, _block(k_KTH, j, C), factor)
            scores = jnp.where(_visible(ids_T, positions_T, i, j, C, window), scores, LEAST)
            more = jnp.maximum(most, jnp.max(scores, axis=-1))
            # Where no key was visible yet, the scale is 0 at the first visible one: at the latest the query's own.
            scale, weights = jnp.exp(most - more), jnp.exp(scores - more[..., None])
            added = jnp.einsum("KGCS,KSH->KGCH", weights.astype(v_KTH.dtype), _block(v_KTH, j, C), **_SUMS)
            return more, total * scale + jnp.sum(weights, axis=-1), out * scale[..., None] + added

        zeros = jnp.zeros((K, G, C), jnp.float32)
        start = (zeros + LEAST, zeros, jnp.zeros((K, G, C, H), jnp.float32))
        most, total, out = jax.lax.fori_loop(_first(ids_T, positions_T, i, C, window), i + 1, keys, start)
        return out / total[..., None], most + jnp.log(total)

    out, log_total = jax.lax.map(queries, jnp.arange(ids_T.size // C))
    out_KGTH = jnp.moveaxis(out, 0, 2).reshape(q_KGTH.shape)
    log_KGT = jnp.moveaxis(log_total, 0, 2).reshape(q_KGTH.shape[:-1])
    return out_KGTH.astype(v_KTH.dtype), (q_KGTH, k_KTH, v_KTH, ids_T, positions_T, out_KGTH, log_KGT)


def _row_bwd(C: int, factor: float, window: int | None, residuals, d_out_KGTH):
    q_KGTH, k_KTH, v_KTH, ids_T, positions_T, out_KGTH, log_KGT = residuals
    dot_KGT = jnp.sum(out_KGTH * d_out_KGTH.astype(jnp.float32), axis=-1)

    def queries(sums, i):
        q_KGCH, d_out_KGCH = _block(q_KGTH, i, C), _block(d_out_KGTH, i, C)
        log_KGC1, dot_KGC1 = (_block(x[..., None], i, C) for x in (log_KGT, dot_KGT))

        def keys(j, before):
            d_q, d_k, d_v = before
            k_KSH, v_KSH = _block(k_KTH, j, C), _block(v_KTH, j, C)
            weights = jnp.exp(_scores(q_KGCH, k_KSH, factor) - log_KGC1)
            weights = jnp.where(_visible(ids_T, positions_T, i, j, C, window), weights, 0)
            d_scores = weights * (_scores(d_out_KGCH, v_KSH, 1.0) - dot_KGC1) * factor
            weights, d_scores = weights.astype(v_KSH.dtype), d_scores.astype(k_KSH.dtype)
            d_q += jnp.einsum("KGCS,KSH->KGCH", d_scores, k_KSH, **_SUMS)
            d_k = _add(d_k, jnp.einsum("KGCS,KGCH->KSH", d_scores, q_KGCH, **_SUMS), j, C)
            d_v = _add(d_v, jnp.einsum("KGCS,KGCH->KSH", weights, d_out_KGCH, **_SUMS), j, C)
            return d_q, d_k, d_v

        start = (jnp.zeros(q_KGCH.shape, jnp.float32), *sums)
        d_q, *sums = jax.lax.fori_loop(_first(ids_T, positions_T, i, C, window), i + 1, keys, start)
        return tuple(sums), d_q

    zeros = jnp.zeros(k_KTH.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(queries, (zeros, zeros), jnp.arange(ids_T.size // C))
    d_q = jnp.moveaxis(d_q, 0, 2).reshape(q_KGTH.shape)
    return d_q.astype(q_KGTH.dtype), d_k.astype(k_KTH.dtype), d_v.astype(v_KTH.dtype), None, None


_row.defvjp(_row_fwd, _row_bwd)


def _scores(q_KGCH: jax.Array, k_KSH: jax.Array, factor: float) -> jax.Array:
    return jnp.einsum("KGCH,KSH->KGCS", q_KGCH, k_KSH, **_SUMS) * factor


def _block(x: jax.Array, i: jax.Array, C: int) -> jax.Array:
    """Return block i of the tokens, the last axis but one."""
    return jax.lax.dynamic_slice_in_dim(x, i * C, C, axis=-2)


def _add(x: jax.Array, added: jax.Array, j: jax.Array, C: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _block(x, j, C) + added, j * C, axis=-2)


def _visible(ids_T: jax.Array, positions_T: jax.Array, i: jax.Array, j: jax.Array, C: int, window: int | None):
    """Return a mask [C, S]: the keys of block j that each query of block i sees."""
    (ids_C1, at_C1), (ids_S1, at_S1) = ([_block(x[:, None], n, C) for x in (ids_T, positions_T)] for n in (i, j))
    visible = (ids_C1 == ids_S1.T) & (at_C1 >= at_S1.T)
    return visible if window is None else visible & (at_C1 - at_S1.T < window)


def _first(ids_T: jax.Array, positions_T: jax.Array, i: jax.Array, C: int, window: int | None) -> jax.Array:
    """Return the number of the first block of keys that a query of block i sees. Padding may have any position."""
    first = i * C - jnp.where(ids_T[i * C] == 0, 0, positions_T[i * C])
    return (first if window is None else jnp.maximum(first, i * C - window + 1)) // C
