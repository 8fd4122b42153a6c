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
from llama_jax.data.packing import Shape
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
        """What a checkpoint holds: between updates, MultiSteps adds nothing to its optimizer's state."""
        multi_steps = isinstance(self.opt_state, optax.MultiStepsState)
        return self._replace(copy=None, opt_state=self.opt_state.inner_opt_state if multi_steps else self.opt_state)

    @property
    def weights(self) -> Any:
        """The parameters that the model computes with."""
        return with_copy(self.params, self.copy)


LossStep = Callable[[Any, Batch], jax.Array]


_make_copy = jax.jit(compute_copy, static_argnums=1)


def init_state(params: Any, tx: optax.GradientTransformation, run: RunOptions, mesh: Mesh) -> TrainState:
    """A fresh state around the parameters, which it takes over; moments are placed like them."""
    with jax.set_mesh(mesh):
        return TrainState(
            sharding.put_scalar(mesh, np.int32(0)), params, jax.jit(tx.init)(params), _make_copy(params, run)
        )


def complete(saved: TrainState, tx: optax.GradientTransformation, run: RunOptions, mesh: Mesh) -> TrainState:
    """The state of which this is what a checkpoint holds."""
    opt_state = saved.opt_state
    with jax.set_mesh(mesh):
        if isinstance(jax.eval_shape(tx.init, saved.params), optax.MultiStepsState):
            zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like))(saved.params)
            opt_state = optax.MultiStepsState(sharding.put_scalar(mesh, np.int32(0)), saved.step + 0, opt_state, zeros)
        return saved._replace(opt_state=opt_state, copy=_make_copy(saved.params, run))


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


class Steps:
    """The compiled programs of a run, and an update made of its blocks by them.

    Where every update is one block, one program makes it: gradients, optimizer, the copy. So does `optax.MultiSteps` as
    the optimizer, called once a block. Otherwise (`sums`) a program adds a block's gradient to those of the update's
    other blocks, in the parameters' type, and another gives the sums to the optimizer.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tx: optax.GradientTransformationExtraArgs,
        run: RunOptions,
        vocab_size: int,
        label_smoothing: float = 0.0,
        sums: bool = False,
    ):
        def gradients(weights: Any, batch: Batch):
            def loss(weights):
                return _losses(graphdef, weights, batch, vocab_size, label_smoothing)

            (loss, losses), grads = jax.value_and_grad(loss, has_aux=True)(weights)
            return grads, {"loss": loss, "losses": losses}

        def optimize(state: TrainState, grads: Any, learning_rate: jax.Array):
            updates, opt_state = tx.update(grads, state.opt_state, state.params, learning_rate=learning_rate)
            params = optax.apply_updates(state.params, updates)
            multi_steps = isinstance(opt_state, optax.MultiStepsState)
            done = opt_state.gradient_step if multi_steps else state.step + 1
            norm = optax.tree_utils.tree_get(opt_state, "grad_norm")
            return TrainState(done, params, opt_state, compute_copy(params, run)), norm

        def update(state: TrainState, batch: Batch, learning_rate: jax.Array):
            grads, out = gradients(state.weights, batch)
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
            state, norm = optimize(state, grads, learning_rate)
            return state, out | {"grad_norm": norm}

        def add(sums: Any, state: TrainState, batch: Batch):
            grads, out = gradients(state.weights, batch)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), out

        def apply(state: TrainState, sums: Any, learning_rate: jax.Array):
            state, norm = optimize(state, sums, learning_rate)
            return state, jax.tree.map(jnp.zeros_like, sums), norm

        self._sums, self._summing = None, sums
        self._apply = jax.jit(apply, donate_argnums=(0, 1))
        self._of_block = jax.jit(add if sums else update, donate_argnums=0)
        self._compiled: dict[Any, Any] = {}

    def compile(self, state: TrainState, shape: Shape, mesh: Mesh) -> int:
        """Compile what a block of this shape needs, for a state of these types; returns the bytes that a device needs
        for it, the state included. Raises jax's error where the compiler finds that it does not fit."""
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
        held, block = sharding.bytes_on_device(state), abstract_batch(mesh, shape)
        programs: dict[Any, Any] = {}
        with jax.set_mesh(mesh):
            if self._summing:
                held += sharding.bytes_on_device(state.params)
                programs[shape] = self._of_block.lower(state.params, state, block).compile()
                if "apply" not in self._compiled:
                    programs["apply"] = self._apply.lower(state, state.params, rate).compile()
            else:
                programs[shape] = self._of_block.lower(state, block, rate).compile()
        self._compiled |= programs
        platform = mesh.devices.flat[0].platform
        return max(_bytes_needed(program, held, platform) for program in programs.values())

    @property
    def programs(self) -> dict[Any, Any]:
        """What has been compiled, by the shape of the block; "apply" gives sums to the optimizer."""
        return self._compiled

    def update(self, state: TrainState, blocks: list[Batch], rate: jax.Array, mesh: Mesh):
        """The state after an update by these blocks, the state given being donated; and of each block {"loss",
        "losses"}, its weighted sum and the sum's parts by token [B, T], and of the last one "grad_norm"."""
        outputs = []
        with jax.set_mesh(mesh):
            for batch in blocks:
                program = self._compiled[batch.input_ids.shape]
                if self._summing:
                    if self._sums is None:
                        self._sums = jax.jit(partial(jax.tree.map, jnp.zeros_like))(state.params)
                    self._sums, out = program(self._sums, state, batch)
                else:
                    state, out = program(state, batch, rate)
                outputs.append(out)
            if self._summing:
                state, self._sums, norm = self._compiled["apply"](state, self._sums, rate)
                outputs[-1]["grad_norm"] = norm
        return state, outputs


def _bytes_needed(program: Any, held: int, platform: str) -> int:
    """The most that a device has in use while a compiled program runs, where it holds so many bytes."""
    memory = program.memory_analysis()
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    # The sum overstates on a TPU, whose compiler tells the peak; that of a CPU leaves out what is temporary.
    peak = memory.peak_memory_in_bytes if platform == "tpu" else arguments + results + memory.temp_size_in_bytes
    return peak + max(0, held - arguments)


def make_loss_step(graphdef: nnx.GraphDef, vocab_size: int, label_smoothing: float = 0.0) -> LossStep:
    """The compiled `(params, block) -> weighted loss of each token`, [B, T]."""
    return jax.jit(lambda params, batch: _losses(graphdef, params, batch, vocab_size, label_smoothing)[1])


def token_losses(params: Any, loss_step: LossStep, batches: Batches, mesh: Mesh, k: int) -> list[jax.Array]:
    """The weighted losses of the blocks of update k, [B, T] each, without training on them."""
    with jax.set_mesh(mesh):
        return [loss_step(params, block) for block in put_update(mesh, batches, k, make_update(mesh, batches, k))]


def put_batch(mesh: Mesh, block: Batch, rows: int | None = None) -> Batch:
    """A block of the host on the devices; with `rows` it holds this process' share of so many."""
    return Batch(*(sharding.put(mesh, a, rows) for a in block))


def make_update(mesh: Mesh, batches: Batches, k: int) -> list[Batch]:
    """The rows of update k that this process' devices hold, as blocks of the host."""
    return batches.update(k, partial(sharding.local_rows, mesh))


def put_update(mesh: Mesh, batches: Batches, k: int, blocks: list[Batch]) -> list[Batch]:
    """What `make_update` made, on the devices."""
    return [put_batch(mesh, block, rows) for block, (rows, _) in zip(blocks, batches.shapes_of(k), strict=True)]


def abstract_batch(mesh: Mesh, shape: Shape) -> Batch:
    """The types and placements of a block of this shape."""
    kinds = dict.fromkeys(Batch._fields, jnp.int32) | {"weights": jnp.float32}
    rows = sharding.row_sharding(mesh)
    return Batch(**{name: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for name, kind in kinds.items()})


def fit(
    state: TrainState,
    steps: Steps,
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

    `learning_rate` is asked for an update's rate one update ahead, and again just before it. Metrics are read one
    update late, so that the device never waits for the host. After an update for whose number (from 1) `due` is true,
    and when `stop` becomes true, `on_due` gets the state and whether to stop, all metrics read; then a stop returns.
    """

    def prepare(k: int) -> tuple[list[Batch], np.float32, jax.Array, float]:
        """Blocks and rate of update k on the devices, and the seconds that the host took to make the blocks."""
        started = time.monotonic()
        blocks = make_update(mesh, batches, k)
        made_in, rate = time.monotonic() - started, np.float32(learning_rate(k))
        return put_update(mesh, batches, k, blocks), rate, sharding.put_scalar(mesh, rate), made_in

    pending: Callable[[], UpdateMetrics] | None = None
    ahead = prepare(updates[0]) if updates else None
    for k in updates:
        assert ahead is not None
        blocks, rate, placed_rate, made_in = ahead
        # A transfer waits for all that the devices were told before: told first, it waits for the last update only.
        ahead = prepare(k + 1) if k + 1 in updates else None
        if (now := np.float32(learning_rate(k))) != rate:  # a schedule that listened to an evaluation meanwhile
            placed_rate = sharding.put_scalar(mesh, now)
        state, outputs = steps.update(state, blocks, placed_rate, mesh)
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
    of_blocks, norm = sharding.read(([o["loss"] for o in outputs], outputs[-1]["grad_norm"]))
    loss, norm = sum(map(float, of_blocks)), float(norm)
    losses = [o["losses"] for o in outputs]
    return UpdateMetrics(
        k + 1, loss, norm, batches.tokens(k), made_in, lambda: batches.micro_losses(k, sharding.read(losses))
    )
