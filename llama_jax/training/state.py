"""Hold what an update changes, and what a checkpoint keeps of it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from llama_jax.distributed import sharding
from llama_jax.model.definition import Definition, merge
from llama_jax.model.matmul import VALUES, Scaled, quantize
from llama_jax.model.roles import Params
from llama_jax.training.halves import halve, join, split_bits
from llama_jax.training.parts import init_on_host, moments_on_host


class SavedState(NamedTuple):
    """Hold the arrays of a checkpoint: `params` are the trainable parameters in `RunOptions.param_dtype`.

    The names of the fields are those on disk. `lower` is None and has no array.
    """

    step: Any
    params: Params
    opt_state: Any
    lower: None = None


class LossWindow(NamedTuple):
    """Hold the weighted mean and variance of the losses of good updates, and their number: float32 scalars."""

    mean: Any
    variance: Any
    count: Any


class TrainState(NamedTuple):
    """Hold the state after `step` updates, skipped ones (`training.guard`) counted.

    The optimizer, gradients and checkpoints see `trainable` alone; gradients have its types. `frozen` is read by the
    model and never written. `lower` holds the lower halves of float32 weights (`training.halves`), None without halves.
    `losses` is None without `--skip_loss_spikes`; a checkpoint keeps the values in its JSON.
    """

    step: Any
    trainable: Params
    frozen: Params
    opt_state: Any
    lower: Params | None = None
    losses: LossWindow | None = None

    @property
    def params(self) -> Params:
        """Return all parameters in the types that the model computes with."""
        return merge(self.trainable, self.frozen)

    @property
    def whole_params(self) -> Params:
        """Return all parameters, halves joined: for an export."""
        return merge(_join(self.trainable, self.lower), self.frozen)

    @property
    def saved(self) -> SavedState:
        """Return the state for a checkpoint. Between updates, MultiSteps adds nothing to its optimizer's state."""
        return SavedState(self.step, _join(self.trainable, self.lower), _saved_opt_state(self.opt_state))


def _saved_opt_state(opt_state: Any) -> Any:
    return opt_state.inner_opt_state if isinstance(opt_state, optax.MultiStepsState) else opt_state


_split_bits, _join = jax.jit(split_bits), jax.jit(join)


def _split_and_delete(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the halves of an array and free it.

    Halves then fill the place of the last float32 that was freed. The device's free memory stays in one piece, as the
    temporaries of a step need.
    """
    halves = _split_bits(x)
    x.delete()
    return halves


def _of_stack(x: jax.Array) -> Scaled:
    return (jax.vmap(_of_stack) if x.ndim > 2 else partial(quantize, dtype=VALUES))(x)


_to_fp8 = jax.jit(_of_stack)


def _scale_and_delete(x: jax.Array) -> Scaled:
    """Return a matrix, or a stack, in fp8 and free it: the whole and its fp8 values need not fit together."""
    result = _to_fp8(x)
    x.delete()
    return result


def _in_fp8(frozen: Params, definition: Definition, scale: Callable[[jax.Array], Scaled] = _scale_and_delete) -> Params:
    """Return the frozen parameters as a run's programs read them: projections in fp8 where `definition.scaled`."""
    if definition.scaled is None:
        return frozen
    return jax.tree.map(lambda x, is_scaled: scale(x) if is_scaled else x, frozen, definition.scaled)


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    definition: Definition,
    mesh: Mesh,
    offload: bool = False,
) -> TrainState:
    """Return the state before the first update, moments placed like parameters, or with `offload` in the host's memory.
    The parameters are consumed."""
    trainable, frozen = definition.split(params)
    with jax.set_mesh(mesh):
        trainable, lower = halve(trainable, definition.halved, _split_and_delete)
        if offload:
            opt_state = init_on_host(tx, trainable, lower)
        else:
            opt_state = jax.jit(lambda trainable, lower: tx.init(join(trainable, lower)))(trainable, lower)
        frozen = _in_fp8(frozen, definition)
        return TrainState(sharding.put_scalar(mesh, np.int32(0)), trainable, frozen, opt_state, lower)


def complete(
    saved: SavedState, frozen: Params, tx: optax.GradientTransformation, definition: Definition, mesh: Mesh
) -> TrainState:
    """Return the state of a checkpoint's arrays, which are consumed, and the frozen parameters."""
    opt_state = saved.opt_state
    with jax.set_mesh(mesh):
        if isinstance(jax.eval_shape(tx.init, saved.params), optax.MultiStepsState):
            zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like))(saved.params)
            opt_state = optax.MultiStepsState(sharding.put_scalar(mesh, np.int32(0)), saved.step + 0, opt_state, zeros)
        trainable, lower = halve(saved.params, definition.halved, _split_and_delete)
        return TrainState(saved.step, trainable, _in_fp8(frozen, definition), opt_state, lower)


def abstract_state(
    tx: optax.GradientTransformation, definition: Definition, mesh: Mesh, offload: bool = False
) -> TrainState:
    """Return the types and placements of `init_state`."""

    def init(trainable: Params) -> tuple[Any, tuple[Params, Params | None]]:
        return tx.init(trainable), halve(trainable, definition.halved)

    with jax.set_mesh(mesh):
        opt_state, (trainable, lower) = jax.eval_shape(init, definition.trainable)
        frozen = _in_fp8(definition.frozen, definition, partial(jax.eval_shape, _of_stack))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, trainable, frozen, opt_state, lower)
    state = jax.tree.map(lambda a: sharding.on(mesh, a), state)
    return state._replace(opt_state=moments_on_host(state.opt_state)) if offload else state


def abstract_saved(state: TrainState, mesh: Mesh) -> SavedState:
    """Return the types and placements of the arrays that a checkpoint holds of an abstract state."""
    with jax.set_mesh(mesh):
        params = jax.eval_shape(join, state.trainable, state.lower)
    params = jax.tree.map(lambda a: sharding.on(mesh, a), params)
    return SavedState(state.step, params, _saved_opt_state(state.opt_state))


def trained_parameters(state: TrainState) -> int:
    """Return the number of parameters that the optimizer updates, padding counted."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.trainable))


def saving_bytes(state: TrainState) -> int:
    """Return the bytes that a device needs beside a state while its halves are joined for a checkpoint."""
    return 2 * sharding.bytes_on_device(state.lower)
