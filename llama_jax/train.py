"""The train state, one update, and the loop over updates."""

import math
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
from llama_jax.model import RunOptions, halve, join, split_bits
from llama_jax.platform import compiler_options
from llama_jax.reporting.run_log import UpdateMetrics


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


LossStep = Callable[[Any, Batch], jax.Array]


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


def _losses(graphdef: nnx.GraphDef, params: Any, batch: Batch, vocab_size: int, label_smoothing: float):
    """The block's loss, and its parts by token [B, T]."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model(batch.input_ids, batch.positions, batch.segment_ids, batch.lengths)
    return weighted_cross_entropy(hidden, model.head(), batch.targets, batch.weights, vocab_size, label_smoothing)


class Steps:
    """The compiled programs of a run, and an update made of its blocks by them.

    Where every update is one block, one program makes it: gradients, optimizer, halves. So does `optax.MultiSteps` as
    the optimizer, called once a block. Otherwise (`sums`) a program adds a block's gradient to those of the update's
    other blocks, in the whole parameters' types, and another gives the sums to the optimizer.
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
        def gradients(params: Any, batch: Batch):
            def loss(params):
                return _losses(graphdef, params, batch, vocab_size, label_smoothing)

            (loss, losses), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return grads, {"loss": loss, "losses": losses}

        def optimize(state: TrainState, grads: Any, learning_rate: jax.Array):
            params = join(state.params, state.lower)
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
            updates, opt_state = tx.update(grads, state.opt_state, params, learning_rate=learning_rate)
            params, lower = halve(optax.apply_updates(params, updates), run)
            multi_steps = isinstance(opt_state, optax.MultiStepsState)
            done = opt_state.gradient_step if multi_steps else state.step + 1
            norm = optax.tree_utils.tree_get(opt_state, "grad_norm")
            return TrainState(done, params, opt_state, lower), norm

        def update(state: TrainState, batch: Batch, learning_rate: jax.Array):
            grads, out = gradients(state.params, batch)
            state, norm = optimize(state, grads, learning_rate)
            return state, out | {"grad_norm": norm}

        def add(sums: Any, state: TrainState, batch: Batch):
            grads, out = gradients(state.params, batch)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), out

        def apply(state: TrainState, sums: Any, learning_rate: jax.Array):
            state, norm = optimize(state, sums, learning_rate)
            return state, jax.tree.map(jnp.zeros_like, sums), norm

        self._sums, self._summing = None, sums
        self._zeros = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, join(state.params, state.lower)))
        self._apply = jax.jit(apply, donate_argnums=(0, 1))
        self._of_block = jax.jit(add if sums else update, donate_argnums=0)
        self._compiled: dict[Any, Any] = {}

    def compile(self, state: TrainState, shape: Shape, mesh: Mesh) -> int:
        """Compile what a block of this shape needs, for a state of these types; returns the bytes that a device needs
        for it, the state included. Raises jax's error where the compiler finds that it does not fit."""
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
        held, block = sharding.bytes_on_device(state), abstract_batch(mesh, shape)
        programs: dict[Any, Any] = {}
        options = compiler_options(mesh, _layer_gradient_bytes(state.params))
        with jax.set_mesh(mesh):
            if self._summing:
                sums = abstract_saved(state, mesh).params
                held += sharding.bytes_on_device(sums)
                programs[shape] = self._of_block.lower(sums, state, block).compile(options)
                if "apply" not in self._compiled:
                    programs["apply"] = self._apply.lower(state, sums, rate).compile(options)
            else:
                programs[shape] = self._of_block.lower(state, block, rate).compile(options)
        self._compiled |= programs
        platform = mesh.devices.flat[0].platform
        return max(saving_bytes(state) + held, *(_bytes_needed(p, held, platform) for p in programs.values()))

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
                        self._sums = self._zeros(state)
                    self._sums, out = program(self._sums, state, batch)
                else:
                    state, out = program(state, batch, rate)
                outputs.append(out)
                sharding.keep_pace(outputs)
            if self._summing:
                state, self._sums, norm = self._compiled["apply"](state, self._sums, rate)
                outputs[-1]["grad_norm"] = norm
        return state, outputs


def _layer_gradient_bytes(params: Any) -> int:
    """What a device keeps of a layer's gradients once they are summed, in float32; of the matrices alone."""
    layers = params["layers"]
    stacked = 0 not in layers
    leaves = jax.tree.leaves(layers if stacked else layers[0])
    shapes = [x.sharding.shard_shape(x.shape)[int(stacked) :] for x in leaves]
    return sum(4 * math.prod(shape) for shape in shapes if len(shape) > 1)


def saving_bytes(state: TrainState) -> int:
    """What a device needs beside such a state while its parameters are whole, as a checkpoint has them."""
    return 2 * sharding.bytes_on_device(state.lower)


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
    losses: list[jax.Array] = []
    with jax.set_mesh(mesh):
        for block in put_update(mesh, batches, k, make_update(mesh, batches, k)):
            losses.append(loss_step(params, block))
            sharding.keep_pace(losses)
    return losses


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
    on_due: Callable[[int, TrainState, bool], bool],
    stop: Callable[[], bool],
) -> TrainState:
    """Make the updates of the range (numbered from 0) and return the last state.

    `learning_rate` is asked for an update's rate one update ahead, and again just before it. Metrics are read one
    update late, so that the device never waits for the host. After an update for whose number (from 1) `due` is true,
    and when `stop` becomes true, `on_due` gets the state and whether to stop, all metrics read, and tells that in turn.
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
            stopping = on_due(k + 1, state, stopping)
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
