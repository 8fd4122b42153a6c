"""Compute weighted cross-entropy without ever holding all logits or computing them twice.

Letters: B rows, T tokens, X parts of a row, C tokens of a part's chunk, D model, V vocab (padded).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import placed
from llama_jax.model.matmul import sum_dtype

# The most logits of a chunk on a device, unless a single token has more: 512 MiB of float32.
CHUNK = 2**27


def weighted_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    vocab_size: int,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Return the summed loss and, without gradients, its part of each token, float32.

    A part is weight * cross-entropy(hidden @ head.T, target). `targets_BT` are already shifted (the token that
    follows), and ignored where the weight is 0. Rows of the head past `vocab_size` take no part. With smoothing e, a
    token costs (1 - e) * -log p[target] + e * mean over the vocabulary of -log p, as in the HF Trainer's LabelSmoother.
    Logits are made chunk by chunk in the head's type, and their gradient at once; the rest is float32.
    """
    loss, parts = _loss(vocab_size, label_smoothing, hidden_BTD, head_VD, targets_BT, weights_BT)
    return loss, jax.lax.stop_gradient(parts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(vocab_size: int, label_smoothing: float, hidden_BTD, head_VD, targets_BT, weights_BT):
    inputs = [sharding.in_parts(x) for x in (hidden_BTD, targets_BT, weights_BT)]
    parts = [
        _chunk(vocab_size, label_smoothing, head_VD, *(x[:, :, c] for x in inputs))[0]
        for c in _chunks(hidden_BTD, head_VD)
    ]
    losses = sharding.in_rows(jnp.concatenate(parts, axis=2))
    return jnp.sum(losses), losses


def _loss_fwd(vocab_size: int, label_smoothing: float, hidden_BTD, head_VD, targets_BT, weights_BT):
    parts, d_hidden, d_head = [], [], None
    inputs = [sharding.in_parts(x) for x in (hidden_BTD.astype(head_VD.dtype), targets_BT, weights_BT)]
    for c in _chunks(hidden_BTD, head_VD):
        hidden, targets, weights = (x[:, :, c] for x in inputs)
        losses, d_logits = _chunk(vocab_size, label_smoothing, head_VD, hidden, targets, weights)
        parts.append(losses)
        d_hidden.append(jnp.einsum("BXCV,VD->BXCD", d_logits, head_VD, out_sharding=placed(sharding.PARTS_BXTD)))
        kind = sum_dtype(head_VD.dtype)
        here = jnp.einsum(
            "BXCV,BXCD->VD", d_logits, hidden, out_sharding=placed(sharding.HEAD_VD), preferred_element_type=kind
        )
        d_head = here if d_head is None else d_head + here
    losses = sharding.in_rows(jnp.concatenate(parts, axis=2))
    assert d_head is not None
    d_hidden_BTD = sharding.in_rows(jnp.concatenate(d_hidden, axis=2))
    return (jnp.sum(losses), losses), (d_hidden_BTD.astype(hidden_BTD.dtype), d_head.astype(head_VD.dtype))


def _loss_bwd(vocab_size: int, label_smoothing: float, gradients, cotangents):
    d_loss, _ = cotangents
    d_hidden, d_head = (g * d_loss.astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _chunks(hidden_BTD: jax.Array, head_VD: jax.Array) -> list[slice]:
    """Split a device's tokens of a row into parts as equal as possible, few enough for their logits."""
    B, T = sharding.shape_on_device(hidden_BTD)[:2]
    count = min(T, math.ceil(B * T * sharding.shape_on_device(head_VD)[0] / CHUNK))
    return [slice(T * i // count, T * (i + 1) // count) for i in range(count)]


def _chunk(vocab_size: int, label_smoothing: float, head_VD, hidden_BXCD, targets_BXC, weights_BXC):
    """Return the weighted losses [B, X, C] and their gradient by the logits [B, X, C, V], in the head's type."""
    V = head_VD.shape[0]
    real_V = jnp.arange(V) < vocab_size
    hidden = hidden_BXCD.astype(head_VD.dtype)
    logits = jnp.einsum("BXCD,VD->BXCV", hidden, head_VD, out_sharding=placed(sharding.PARTS_BXTV))
    logits = logits.astype(jnp.float32)
    masked = jnp.where(real_V, logits, -jnp.inf) if vocab_size < V else logits
    log_z = jax.nn.logsumexp(masked, axis=-1)
    is_target = jnp.arange(V) == targets_BXC[..., None]
    loss = log_z - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    wanted = is_target.astype(jnp.float32)
    if label_smoothing:
        mean_logit = jnp.sum(jnp.where(real_V, logits, 0.0), axis=-1) / vocab_size
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - mean_logit)
        wanted = (1 - label_smoothing) * wanted + label_smoothing / vocab_size * real_V
    d_logits = weights_BXC[..., None] * (jnp.exp(masked - log_z[..., None]) - wanted)
    return weights_BXC * loss, d_logits.astype(head_VD.dtype)
