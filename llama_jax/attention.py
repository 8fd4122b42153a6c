"""Packed causal attention: every token sees the earlier tokens of its own segment, and nothing else.

Letters: B rows, T query, S key, N heads, K kv heads, G query heads per kv head, H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.sharding import ACT_BTKGH, ACT_BTNH


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    q_positions: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    kv_positions: Int[Array, "B S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k' / sqrt(H)) v over the keys of the same segment at no later position.

    Plain XLA, for any device: products in the operands' type, scores and softmax in float32. Every query must have at
    least one key that it may see (itself, in training).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=ACT_BTKGH)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    same = q_segments[:, :, None] == kv_segments[:, None, :]
    visible = same & (q_positions[:, :, None] >= kv_positions[:, None, :])
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return jnp.reshape(out, (B, T, N, H), out_sharding=ACT_BTNH)
