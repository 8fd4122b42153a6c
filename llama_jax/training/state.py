"""The train state: what an update changes, and what a checkpoint holds of it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from llama_jax.distributed import sharding
from llama_jax.model.llama import RunOptions
from llama_jax.training.halves import halve, join, split_bits


class TrainState(NamedTuple):
    """`step` updates have been made.

    `params` are those that the model computes with, and gradients come in their types; `lower` is what they leave of
    float32 weights (`model.halve`). So a weight of matmuls in bfloat16 takes no room beside its float32, no step reads
    that only to round it, and no bit is lost.
    """

    step: Any
    params: Any
    opt_state: Any
    lower: Any = None

    @property
    def saved(self) -> "TrainState":
        """What a checkpoint holds: whole parameters; and between updates, MultiSteps adds nothing to its optimizer's
        state."""
        multi_steps = isinstance(self.opt_state, optax.MultiStepsState)
        opt_state = self.opt_state.inner_opt_state if multi_steps else self.opt_state
        return TrainState(self.step, _join(self.params, self.lower), opt_state)


_split_bits, _join = jax.jit(split_bits), jax.jit(join)


def _split_and_delete(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Halves take the place of the last float32 that was deleted: the device's free memory stays in one piece, which
    the step's temporaries need."""
    halves = _split_bits(x)
    x.delete()
    return halves


def init_state(params: Any, tx: optax.GradientTransformation, run: RunOptions, mesh: Mesh) -> TrainState:
    """A fresh state around the parameters, which it uses up; moments are placed like them."""
    with jax.set_mesh(mesh):
        params, lower = halve(params, run, _split_and_delete)
        opt_state = jax.jit(lambda params, lower: tx.init(join(params, lower)))(params, lower)
        return TrainState(sharding.put_scalar(mesh, np.int32(0)), params, opt_state, lower)


def complete(saved: TrainState, tx: optax.GradientTransformation, run: RunOptions, mesh: Mesh) -> TrainState:
    """The state of which this is what a checkpoint holds; it is used up."""
    opt_state = saved.opt_state
    with jax.set_mesh(mesh):
        if isinstance(jax.eval_shape(tx.init, saved.params), optax.MultiStepsState):
            zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like))(saved.params)
            opt_state = optax.MultiStepsState(sharding.put_scalar(mesh, np.int32(0)), saved.step + 0, opt_state, zeros)
        params, lower = halve(saved.params, run, _split_and_delete)
        return TrainState(saved.step, params, opt_state, lower)


def abstract_state(params: Any, tx: optax.GradientTransformation, run: RunOptions, mesh: Mesh) -> TrainState:
    """The types and placements of `init_state`, from those of the parameters."""
    with jax.set_mesh(mesh):
        opt_state, (params, lower) = jax.eval_shape(lambda params: (tx.init(params), halve(params, run)), params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, lower)
    return jax.tree.map(lambda a: sharding.on(mesh, a), state)


def abstract_saved(state: TrainState, mesh: Mesh) -> TrainState:
    """The types and placements of what a checkpoint holds of such a state."""
    with jax.set_mesh(mesh):
        return jax.tree.map(lambda a: sharding.on(mesh, a), jax.eval_shape(lambda state: state.saved, state))


def saving_bytes(state: TrainState) -> int:
    """What a device needs beside such a state while its parameters are whole, as a checkpoint has them."""
    return 2 * sharding.bytes_on_device(state.lower)
