"""Build the HF Trainer's optimizers from optax: clipping, decay groups, the update's rate, accumulation."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llama_jax.base.errors import InputError
from llama_jax.model.definition import pick
from llama_jax.model.roles import AdapterWeight, EmbeddingTable, MatmulWeight, NormWeight
from llama_jax.training.moments import EXACT_BELOW, Blockwise, Exact, Rounded, Store, scale_by_stored_adam
from llama_jax.training.optimizer_names import OPTIMIZERS

Shapes = Mapping[tuple, tuple[int, ...]]


def decayed_roles(compat: str, model_type: str) -> tuple[type[nnx.Param], ...]:
    """Return the roles of parameters that the Trainer's weight decay applies to."""
    # 4.37 exempts norms from the decay by their class, of which LLaMA's alone is registered.
    norms = (NormWeight,) if compat == "4.37" and model_type != "llama" else ()
    return MatmulWeight, EmbeddingTable, AdapterWeight, *norms


class ClipState(NamedTuple):
    """Hold the norm of the last update's gradient, before clipping."""

    grad_norm: jax.Array


def _to_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def global_norm(grads: Any) -> jax.Array:
    """Return the norm of all gradients together, float32."""
    return optax.tree.norm(_to_float32(grads))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scale by min(1, max_norm / (norm + 1e-6)), as torch's `clip_grad_norm_`; max_norm <= 0 only records the norm.

    An update of a part of the parameters gets the norm of all gradients as `grad_norm`.
    """

    def update(updates, state, params=None, *, grad_norm=None, **extra):
        norm = global_norm(updates) if grad_norm is None else grad_norm
        if max_norm > 0:
            scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
            updates = jax.tree.map(lambda g: g * scale.astype(g.dtype), updates)
        return updates, ClipState(norm)

    return optax.GradientTransformationExtraArgs(lambda params: ClipState(jnp.zeros((), jnp.float32)), update)


def _decayed(rule: optax.GradientTransformation, weight_decay: float, decays: Any) -> optax.GradientTransformation:
    """Return `rule` followed by weight decay. The state is the rule's: a run may resume with another decay."""
    if not weight_decay:
        return rule
    # Of a part of the parameters, where an update gets no more.
    decay = optax.add_decayed_weights(weight_decay, partial(pick, decays) if isinstance(decays, dict) else decays)

    def update(updates, state, params=None):
        updates, state = rule.update(updates, state, params)
        return decay.update(updates, decay.init(params), params)[0], state

    return optax.GradientTransformation(rule.init, update)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep state, arithmetic and update of `tx` in float32 for parameters of any type."""

    return optax.GradientTransformation(
        lambda params: tx.init(_to_float32(params)),
        lambda updates, state, params: tx.update(_to_float32(updates), state, _to_float32(params)),
    )


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply by minus `learning_rate`, in float32: only the sum with a low-precision weight is rounded."""

    def update(updates, state, params=None, *, learning_rate, **extra):
        return jax.tree.map(lambda u: -learning_rate * u.astype(jnp.float32), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _keys(path: tuple[Any, ...]) -> tuple:
    """Return the keys of a path of jax in a tree of dictionaries."""
    return tuple(k.key for k in path)


def _in_8_bits(tensors: Shapes, exact: Any) -> Callable[[tuple[Any, ...], jax.Array], Store]:
    """Return the function that gives the store of a leaf's moments, by its path, for `adamw_8bit`."""
    in_32_bits = {_keys(path) for path, is_exact in jax.tree_util.tree_leaves_with_path(exact) if is_exact}

    def store(path, leaf):
        tensor = tensors.get(_keys(path), leaf.shape)
        return Exact() if math.prod(tensor) < EXACT_BELOW or _keys(path) in in_32_bits else Blockwise(tensor)

    return store


def _clip_by_rms(tensors: Shapes) -> optax.GradientTransformation:
    """Clip each leaf's root mean square to at most 1, over its elements without padding, whose updates are 0."""

    def clip(path, u):
        size = math.prod(tensors.get(_keys(path), u.shape))
        return u / jnp.maximum(1.0, jnp.sqrt(jnp.sum(u * u) / size))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(clip, updates))


def make_optimizer(
    name: str = "adamw_torch",
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: Any = None,
    max_grad_norm: float = 1.0,
    moments: str | None = None,
    exact: Any = None,
    blocks: np.ndarray | None = None,
    tensors: Shapes = MappingProxyType({}),
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of the Trainer's `--optim name`, after clipping, at the rate given to the update.

    `update(grads, state, params, learning_rate=rate)` with a float32 scalar.

    - `adamw_torch`: torch's AdamW. State in the parameters' dtype, or in the type `moments` with arithmetic in float32;
      bfloat16 is drawn from `seed` (`training.moments`).
    - `adamw_8bit`: bitsandbytes' AdamW8bit. It keeps moments in float32 for tensors of less than 4,096 elements, and
      where the tree of booleans `exact` is true. Weights decay before the step, as on bitsandbytes' CPU.
    - `sgd`: torch's SGD without momentum; the decay is added to the (clipped) gradient.
    - `adafactor`: transformers' Adafactor with `scale_parameter=False, relative_step=False`; betas and eps are not
      used. It treats a leaf of two axes as a matrix and clips each leaf's update by its own RMS. Layers must thus be
      leaves of their own, not stacked.
    - `lion_32bit`: Lion (Chen et al. 2023) with decoupled decay, as in bitsandbytes' main branch. Its releases up to
      0.49.2 put the decay into the gradient in 32 bits, a bug by its issue 1992.

    `decays` is a tree of booleans: the parameters that `weight_decay` applies to; None for all. `tensors` are the
    shapes of leaves by their paths, without padding, and of a stack of leaves that of each.

    The last two keep their state in float32, as torch's do. `blocks` holds the number of blocks of each update. Where
    an update has several, `optax.MultiSteps` sums their gradients; each block's loss already carries its share of the
    normalisation. The rest runs at the last block, with that block's rate. Where every update is one block, MultiSteps
    and its accumulator are left out.
    """
    clip, decayed = clip_by_global_norm(max_grad_norm), partial(_decayed, weight_decay=weight_decay, decays=decays)
    if name == "adamw_torch" and moments == "bfloat16":
        rules = [clip, _in_float32(decayed(scale_by_stored_adam(b1, b2, eps, lambda path, leaf: Rounded(seed))))]
    elif name == "adamw_torch":
        rule = decayed(optax.scale_by_adam(b1, b2, eps))
        rules = [clip, _in_float32(rule) if moments == "float32" else rule]
    elif name == "adamw_8bit":
        rules = [clip, _in_float32(decayed(scale_by_stored_adam(b1, b2, eps, _in_8_bits(tensors, exact))))]
    elif name == "sgd":
        rules = [decayed(clip)]
    elif name == "adafactor":
        rms = optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=1, epsilon=1e-30)
        rules = [clip, _in_float32(decayed(optax.chain(rms, _clip_by_rms(tensors))))]
    elif name == "lion_32bit":
        rules = [clip, _in_float32(decayed(optax.chain(optax.scale_by_lion(b1, b2))))]
    else:
        raise InputError(f"--optim {name!r} is not one of {', '.join(OPTIMIZERS)}")
    tx = optax.chain(*rules, _scale_by_rate())
    if blocks is None or blocks.max() == 1:
        return tx

    def count(update: jax.Array) -> jax.Array:
        return jnp.asarray(blocks)[jnp.minimum(update, len(blocks) - 1)]

    multi = optax.MultiSteps(tx, count, use_grad_mean=False)
    return optax.GradientTransformationExtraArgs(multi.init, multi.update)
