"""The train state, one update, and the loop over updates."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from llama_jax import sharding
from llama_jax.data.batches import Batch, Batches
from llama_jax.loss import weighted_cross_entropy
from llama_jax.model import RunOptions, compute_copy, with_copy
from llama_jax.reporting.run_log import UpdateMetrics


class TrainState(NamedTuple):
    """`step` updates have been made.

    `copy` holds the weights of matmuls in the compute type (`model.compute_copy`). An update writes it beside the
    parameters, so that no step reads them only to cast them, and gradients come in its type. It is not saved.
    """

    step: Any
    params: Any
    opt_state: Any
    copy: Any = None

    @property
    def saved(self) -> "TrainState":
        """What a checkpoint holds."""
        return self._replace(copy=None)

    @property
    def weights(self) -> Any:
        """The parameters that the model computes with."""
        return with_copy(self.params, self.copy)


TrainStep = Callable[[TrainState, Batch, np.float32], tuple[TrainState, dict[str, jax.Array]]]
LossStep = Callable[[Any, Batch], jax.Array]


def init_state(params: Any, tx: optax.GradientTransformation, run: RunOptions, mesh: Mesh) -> TrainState:
    """A fresh state around the parameters, which it takes over; moments are placed like them."""
    with jax.set_mesh(mesh):
        return complete(TrainState(jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(params)), run, mesh)


def complete(state: TrainState, run: RunOptions, mesh: Mesh) -> TrainState:
    """A state as it was saved, with the copy made anew."""
    with jax.set_mesh(mesh):
        return state._replace(copy=jax.jit(compute_copy, static_argnums=1)(state.params, run))


def abstract_state(params: Any, tx: optax.GradientTransformation, run: RunOptions, mesh: Mesh) -> TrainState:
    """The types and placements of `init_state`, from those of the parameters."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda params: (tx.init(params), compute_copy(params, run)), params)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return TrainState(step, params, *jax.tree.map(lambda a: sharding.on(mesh, a), shapes))


def _losses(graphdef: nnx.GraphDef, params: Any, batch: Batch, vocab_size: int, label_smoothing: float):
    """The block's loss, and its parts by token [B, T]."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model(batch.input_ids, batch.positions, batch.segment_ids, batch.lengths)
    return weighted_cross_entropy(hidden, model.head(), batch.targets, batch.weights, vocab_size, label_smoothing)


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    run: RunOptions,
    vocab_size: int,
    label_smoothing: float = 0.0,
) -> TrainStep:
    """The compiled `(state, block, learning rate) -> (state, {"loss", "losses", "grad_norm"})`; the state given is
    donated.

    The loss is the block's weighted sum, `losses` its parts by token [B, T]; with several blocks an update, the
    gradient norm is that of the last update.
    """

    def step(state: TrainState, batch: Batch, learning_rate: jax.Array):
        def loss_fn(weights):
            return _losses(graphdef, weights, batch, vocab_size, label_smoothing)

        (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.weights)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, learning_rate=learning_rate)
        params = optax.apply_updates(state.params, updates)
        accumulates = isinstance(opt_state, optax.MultiStepsState)
        done = opt_state.gradient_step if accumulates else state.step + 1
        norm = optax.tree_utils.tree_get(opt_state, "grad_norm")
        return TrainState(done, params, opt_state, compute_copy(params, run)), {
            "loss": loss,
            "losses": losses,
            "grad_norm": norm,
        }

    return jax.jit(step, donate_argnums=0)


def make_loss_step(graphdef: nnx.GraphDef, vocab_size: int, label_smoothing: float = 0.0) -> LossStep:
    """The compiled `(params, block) -> weighted loss of each token`, [B, T]."""
    return jax.jit(lambda params, batch: _losses(graphdef, params, batch, vocab_size, label_smoothing)[1])


def token_losses(params: Any, loss_step: LossStep, batches: Batches, mesh: Mesh, k: int) -> list[jax.Array]:
    """The weighted losses of the blocks of update k, [B, T] each, without training on them."""
    with jax.set_mesh(mesh):
        return [loss_step(params, put_batch(mesh, block)) for block in batches.update(k)]


def put_batch(mesh: Mesh, block: Batch) -> Batch:
    """A block of the host on the devices."""
    return Batch(*(sharding.put(mesh, a) for a in block))


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Batches,
    mesh: Mesh,
    updates: range,
    *,
    learning_rate: Callable[[int], float],
    on_update: Callable[[UpdateMetrics], None],
    due: Callable[[int], bool],
    on_due: Callable[[int, TrainState, bool], None],
    stop: Callable[[], bool],
) -> TrainState:
    """Make the updates of the range (numbered from 0) and return the last state.

    `learning_rate` is asked for an update's rate just before it. Metrics are read one update late, so that the device
    never waits for the host. After an update for whose number (from 1) `due` is true, and when `stop` becomes true,
    `on_due` gets the state and whether to stop, all metrics read; then a stop returns.
    """
    pending: Callable[[], UpdateMetrics] | None = None
    for k in updates:
        started = time.monotonic()
        blocks = batches.update(k)
        made_in = time.monotonic() - started
        outputs = []
        rate = np.float32(learning_rate(k))
        with jax.set_mesh(mesh):
            for block in blocks:
                state, out = train_step(state, put_batch(mesh, block), rate)
                outputs.append(out)
        if pending is not None:
            on_update(pending())
        pending = partial(_read, batches, k, outputs, made_in)
        stopping = stop()
        if stopping or due(k + 1):
            on_update(pending())
            pending = None
            on_due(k + 1, state, stopping)
        if stopping:
            break
    if pending is not None:
        on_update(pending())
    return state


def _read(batches: Batches, k: int, outputs: list[dict[str, jax.Array]], made_in: float) -> UpdateMetrics:
    host = jax.device_get([{name: o[name] for name in ("loss", "grad_norm")} for o in outputs])
    loss = float(sum(float(o["loss"]) for o in host))
    losses = [o["losses"] for o in outputs]
    norm = float(host[-1]["grad_norm"])
    return UpdateMetrics(
        k + 1, loss, norm, batches.tokens(k), made_in, lambda: batches.micro_losses(k, jax.device_get(losses))
    )
