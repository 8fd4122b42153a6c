"""AdamW as the HF Trainer runs it, made of optax: schedule, clipping, decay groups, accumulation."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax.errors import InputError

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


def make_schedule(kind: str, peak: float, warmup: int, total: int) -> np.ndarray:
    """Learning rates by the number of updates already done, float64 [total + 1]; the first update uses entry 0.

    Formulas of transformers' `optimization.py`. Made on the host: a float32 cosine loses the last updates.
    """
    done = np.arange(total + 1, dtype=np.float64)
    if kind == "linear":
        falling = np.maximum(0.0, (total - done) / max(1, total - warmup))
    elif kind == "cosine":
        falling = np.maximum(0.0, 0.5 * (1.0 + np.cos(math.pi * (done - warmup) / max(1, total - warmup))))
    elif kind in ("constant", "constant_with_warmup"):
        falling = np.ones_like(done)
    else:
        raise InputError(f"lr_scheduler_type {kind!r} is not one of {', '.join(SCHEDULES)}")
    if kind == "constant":
        return peak * falling
    return peak * np.where(done < warmup, done / max(1, warmup), falling)


class ClipState(NamedTuple):
    """The norm of the last update's gradient, before clipping."""

    grad_norm: jax.Array


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """torch's `clip_grad_norm_`: scale by min(1, max_norm / (norm + 1e-6)); max_norm <= 0 only records the norm."""

    def update(updates, state, params=None):
        norm = optax.tree.norm(updates)
        if max_norm > 0:
            scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
            updates = jax.tree.map(lambda g: g * scale.astype(g.dtype), updates)
        return updates, ClipState(norm)

    return optax.GradientTransformation(lambda params: ClipState(jnp.zeros((), jnp.float32)), update)


def decay_mask(params):
    """True for weights that decay: matrices. The norms' weights and all biases are vectors and do not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_vector(path), params)


def _is_vector(path) -> bool:
    names = [str(k.key) for k in path]
    return names[-1] == "bias" or any(name.endswith("norm") for name in names)


def make_optimizer(
    schedule: np.ndarray,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    blocks: np.ndarray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip, then AdamW with decoupled decay, at `schedule[updates done]`.

    `blocks` holds the number of blocks of each update: where one has several, their gradients are summed by
    `optax.MultiSteps` (each block's loss already carries its share of the normalisation) and the rest runs at the last
    block. Where every update is one block, MultiSteps and its accumulator stand aside.
    """
    table = jnp.asarray(schedule, jnp.float32)
    tx: optax.GradientTransformationExtraArgs = optax.chain(
        clip_by_global_norm(max_grad_norm),
        optax.adamw(
            lambda count: table[jnp.minimum(count, len(table) - 1)],
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=decay_mask if weight_decay else None,
        ),
    )
    if blocks is None or blocks.max() == 1:
        return tx
    counts = jnp.asarray(blocks)
    multi = optax.MultiSteps(tx, lambda update: counts[jnp.minimum(update, len(counts) - 1)], use_grad_mean=False)
    return optax.GradientTransformationExtraArgs(multi.init, multi.update)
