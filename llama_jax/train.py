"""The train state, one update, and the loop over updates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llama_jax import sharding
from llama_jax.data.batches import Batch, Batches
from llama_jax.loss import weighted_cross_entropy


class TrainState(NamedTuple):
    """`step` updates have been made."""

    step: Any
    params: Any
    opt_state: Any


class UpdateMetrics(NamedTuple):
    """One update: its number (from 1), loss, gradient norm before clipping, tokens."""

    step: int
    loss: float
    grad_norm: float
    tokens: int


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def init_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state around the parameters, which it takes over; moments are placed like them."""
    with jax.set_mesh(mesh):
        return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(params))


def abstract_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The types and placements of `init_state`, from those of the parameters: what a checkpoint is restored into."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(tx.init, params)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return TrainState(step, params, jax.tree.map(lambda a: sharding.on(mesh, a), shapes))


def make_train_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, vocab_size: int, label_smoothing: float = 0.0
) -> TrainStep:
    """The compiled `(state, block) -> (state, {"loss", "grad_norm"})`; the state given is donated.

    The loss is the block's weighted sum; with several blocks an update, the gradient norm is that of the last update.
    """

    def step(state: TrainState, batch: Batch):
        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            hidden, _ = model(batch.input_ids, batch.positions, batch.segment_ids, batch.lengths)
            return weighted_cross_entropy(
                hidden, model.head(), batch.targets, batch.weights, vocab_size, label_smoothing
            )

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        accumulates = isinstance(opt_state, optax.MultiStepsState)
        done = opt_state.gradient_step if accumulates else state.step + 1
        norm = optax.tree_utils.tree_get(opt_state, "grad_norm")
        return TrainState(done, params, opt_state), {"loss": loss, "grad_norm": norm}

    return jax.jit(step, donate_argnums=0)


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Batches,
    mesh: Mesh,
    updates: range,
    *,
    on_update: Callable[[UpdateMetrics], None],
    on_save: Callable[[int, TrainState], None],
    save_at: Callable[[int], bool],
    stop: Callable[[], bool],
) -> TrainState:
    """Make the updates of the range (numbered from 0) and return the last state.

    Metrics are read one update late, so that the device never waits for the host. After an update for whose number
    (from 1) `save_at` is true, and when `stop` becomes true, `on_save` gets the state; then a stop returns.
    """
    pending = None
    for k in updates:
        blocks = batches.update(k)
        outputs = []
        with jax.set_mesh(mesh):
            for block in blocks:
                state, out = train_step(state, Batch(*(sharding.put(mesh, a) for a in block)))
                outputs.append(out)
        if pending is not None:
            on_update(_read(*pending))
        pending = (k + 1, outputs, sum(int((b.segment_ids > 0).sum()) for b in blocks))
        stopping = stop()
        if stopping or save_at(k + 1):
            on_update(_read(*pending))
            pending = None
            on_save(k + 1, state)
        if stopping:
            break
    if pending is not None:
        on_update(_read(*pending))
    return state


def _read(step: int, outputs: list[dict[str, jax.Array]], tokens: int) -> UpdateMetrics:
    host = jax.device_get(outputs)
    return UpdateMetrics(step, float(sum(float(o["loss"]) for o in host)), float(host[-1]["grad_norm"]), tokens)
