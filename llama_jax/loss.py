"""Weighted cross-entropy that never holds all logits.

Letters: B rows, T tokens, C tokens of a chunk, D model, V vocab (padded).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax import sharding

# Logits of one chunk are [B, CHUNK, V] float32 and live twice at a time: 131 MB each for one row of LLaMA's 32,000.
CHUNK = 1024


def weighted_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    vocab_size: int,
    label_smoothing: float = 0.0,
) -> Float[Array, "B T"]:
    """weight * cross-entropy(hidden @ head.T, target) of each token, float32.

    `targets_BT` are already shifted (the token that follows); where the weight is 0 the target is not looked at.
    Rows of the head past `vocab_size` take no part. With smoothing e, a token costs
    (1 - e) * -log p[target] + e * mean over the vocabulary of -log p, as in the HF Trainer's LabelSmoother.
    Logits are made chunk by chunk, in the operands' type, and again in the backward pass; the rest is float32.
    """
    T, V = hidden_BTD.shape[1], head_VD.shape[0]
    real_V = jnp.arange(V) < vocab_size

    @jax.checkpoint
    def chunk_loss(hidden_BCD, head_VD, targets_BC, weights_BC):
        logits = jnp.einsum("BCD,VD->BCV", hidden_BCD.astype(head_VD.dtype), head_VD, out_sharding=sharding.ACT_BTF)
        logits = logits.astype(jnp.float32)
        masked = jnp.where(real_V, logits, -jnp.inf) if vocab_size < V else logits
        log_z = jax.nn.logsumexp(masked, axis=-1)
        is_target = jnp.arange(V) == targets_BC[..., None]
        loss = log_z - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        if label_smoothing:
            mean_logit = jnp.sum(jnp.where(real_V, logits, 0.0), axis=-1) / vocab_size
            loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - mean_logit)
        return weights_BC * loss

    chunks = [slice(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]
    losses = [chunk_loss(hidden_BTD[:, c], head_VD, targets_BT[:, c], weights_BT[:, c]) for c in chunks]
    return jnp.concatenate(losses, axis=1)
