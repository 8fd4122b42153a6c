"""Compile a run's programs, make updates with them, and count the bytes that a device needs."""

import math
from collections.abc import Callable
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from llama_jax.data.batches import Batch
from llama_jax.data.packing import Shape
from llama_jax.distributed import sharding
from llama_jax.distributed.digest import mixed
from llama_jax.distributed.platform import compiler_options
from llama_jax.distributed.profile import OPTIMIZER
from llama_jax.model.definition import Definition, merge
from llama_jax.model.roles import Params, is_stacked
from llama_jax.training.guard import Guard, select
from llama_jax.training.halves import halve, join
from llama_jax.training.loss import weighted_cross_entropy
from llama_jax.training.offload import HostedOptimizer
from llama_jax.training.parts import passing_bytes
from llama_jax.training.state import TrainState, abstract_saved, saving_bytes

LossStep = Callable[[Any, Batch], jax.Array]


def losses_of(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: Batch,
    vocab_size: int,
    label_smoothing: float = 0.0,
    key: jax.Array | None = None,
):
    """Return the loss of a block, and its part of each token [B, T]. `key` draws the dropout of adapters."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model(batch.input_ids, batch.positions, batch.segment_ids, batch.lengths, key=key)
    return weighted_cross_entropy(hidden, model.head(), batch.targets, batch.weights, vocab_size, label_smoothing)


class Steps:
    """Compile the programs of a run, and make updates of blocks with them.

    Where every update is one block, a single program computes gradients, optimizer and halves. With `optax.MultiSteps`
    as the optimizer, this program is called once a block. Otherwise (`sums`) a program adds a block's gradient to the
    update's sum, in the whole parameters' types, and another applies the optimizer to the sum. `seed` draws the dropout
    of adapters, by the numbers of the update and of its block. `guard` skips bad updates. Each program gets the loss of
    the update's earlier blocks, so that the guard sees the loss of all. With `offload`, moments are in the host's
    memory: a program gives the gradients, or their sums, to `training.offload`.
    """

    def __init__(
        self,
        definition: Definition,
        tx: optax.GradientTransformationExtraArgs,
        vocab_size: int,
        label_smoothing: float = 0.0,
        sums: bool = False,
        seed: int = 0,
        guard: Guard = Guard(),
        offload: bool = False,
    ):
        run = definition.run
        self._given, self._fp8, self._drops = (
            run.compiler_options,
            run.fp8,
            run.lora is not None and run.lora.dropout > 0,
        )

        def gradients(state: TrainState, batch: Batch, number: jax.Array | None):
            key = None
            if number is not None:
                key = jnp.uint32(seed % 2**32)
                for count in (state.step, number):
                    key = mixed(mixed(key) + count.astype(jnp.uint32))

            def loss(trainable):
                params = merge(trainable, state.frozen)
                return losses_of(definition.graphdef, params, batch, vocab_size, label_smoothing, key)

            (loss, losses), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
            return grads, {"loss": loss, "losses": losses}

        @jax.named_scope(OPTIMIZER)
        def optimize(state: TrainState, grads: Any, learning_rate: jax.Array, loss: jax.Array):
            params = join(state.trainable, state.lower)
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
            updates, opt_state = tx.update(grads, state.opt_state, params, learning_rate=learning_rate)
            multi_steps = isinstance(opt_state, optax.MultiStepsState)
            done = opt_state.gradient_step if multi_steps else state.step + 1
            norm = optax.tree_utils.tree_get(opt_state, "grad_norm")
            made, skipped, opt_state, losses = guard(opt_state, state, loss, norm)
            whole = optax.apply_updates(params, updates)
            trainable, lower = halve(whole if made is None else select(made, whole, params), definition.halved)
            after = TrainState(done, trainable, state.frozen, opt_state, lower, losses)
            return after, {"grad_norm": norm, "skipped": skipped}

        def update(
            state: TrainState, batch: Batch, number: jax.Array | None, earlier: jax.Array, learning_rate: jax.Array
        ):
            grads, out = gradients(state, batch, number)
            loss = earlier + out["loss"]
            state, decided = optimize(state, grads, learning_rate, loss)
            return state, loss, out | decided

        def begin(state: TrainState, batch: Batch, number: jax.Array | None, earlier: jax.Array):
            grads, out = gradients(state, batch, number)
            return grads, earlier + out["loss"], out

        def add(sums: Any, state: TrainState, batch: Batch, number: jax.Array | None, earlier: jax.Array):
            grads, out = gradients(state, batch, number)
            sums = jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads)
            return sums, earlier + out["loss"], out

        def apply(state: TrainState, sums: Any, loss: jax.Array, learning_rate: jax.Array):
            state, decided = optimize(state, sums, learning_rate, loss)
            return state, jax.tree.map(jnp.zeros_like, sums), decided

        self._sums, self._summing, self._no_loss = None, sums, None  # type: Any, bool, jax.Array | None
        self._zeros = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, join(state.trainable, state.lower)))
        self._apply = jax.jit(apply, donate_argnums=(0, 1))
        self._of_block = jax.jit(
            add if sums else begin if offload else update, donate_argnums=0 if sums or not offload else ()
        )
        self._hosted = HostedOptimizer(tx, definition.halved, guard, sums) if offload else None
        self._compiled: dict[Any, Any] = {}
        self._applying = Lock()

    def compile(self, state: TrainState, shape: Shape, mesh: Mesh) -> int:
        """Compile the programs of a block of this shape for a state of these types; return the bytes that a device
        needs, the state included. Raises jax's error where the compiler finds that a program does not fit."""
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))  # of the earlier loss, too
        held, block = sharding.bytes_on_device(state), abstract_batch(mesh, shape)
        held += passing_bytes(state.trainable, state.opt_state)
        read = state._replace(opt_state=None) if self._hosted else state
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh)) if self._drops else None
        programs: dict[Any, Any] = {}
        options = compiler_options(mesh, self._fp8, _layer_gradient_bytes(state.trainable), self._given)
        with jax.set_mesh(mesh):
            if self._summing:
                sums = abstract_saved(state, mesh).params
                held += sharding.bytes_on_device(sums)
                programs[shape] = self._of_block.lower(sums, read, block, number, rate).compile(options)
            elif self._hosted:
                programs[shape] = self._of_block.lower(read, block, number, rate).compile(options)
                sums = state.trainable
            else:
                programs[shape] = self._of_block.lower(state, block, number, rate, rate).compile(options)
            with self._applying:  # blocks are compiled in threads
                if "apply" not in self._compiled:
                    if self._hosted:
                        self._compiled |= self._hosted.compile(state, sums, mesh, options)
                    elif self._summing:
                        self._compiled["apply"] = self._apply.lower(state, sums, rate, rate).compile(options)
        second = [program for name, program in self._compiled.items() if isinstance(name, str)]
        self._compiled |= programs
        platform = mesh.devices.flat[0].platform
        needed = [_bytes_needed(program, held, platform) for program in programs.values()]
        if self._hosted and not self._summing:
            held += sharding.bytes_on_device(state.trainable)  # gradients
        return max(saving_bytes(state) + held, *needed, *(_bytes_needed(program, held, platform) for program in second))

    @property
    def programs(self) -> dict[Any, Any]:
        """Return the compiled programs by the shape of the block, and those of the optimizer by their names."""
        return self._compiled

    def update(self, state: TrainState, blocks: list[Batch], rate: jax.Array, mesh: Mesh):
        """Return the state after an update by these blocks, and each block's outputs; the given state is donated.
        Outputs are "loss", the weighted sum, and "losses", its parts by token [B, T]. The last block's have "grad_norm"
        and "skipped" too."""
        outputs = []
        if self._no_loss is None:  # placed once: a transfer waits for the programs dispatched before it
            self._no_loss = sharding.put_scalar(mesh, np.float32(0))
        loss = self._no_loss
        with jax.set_mesh(mesh):
            for i, batch in enumerate(blocks):
                program = self._compiled[batch.input_ids.shape]
                number = sharding.put_scalar(mesh, np.int32(i)) if self._drops else None
                read = state._replace(opt_state=None) if self._hosted else state
                if self._summing:
                    if self._sums is None:
                        self._sums = self._zeros(read)
                    self._sums, loss, out = program(self._sums, read, batch, number, loss)
                elif self._hosted:
                    grads, loss, out = program(read, batch, number, loss)
                else:
                    state, loss, out = program(state, batch, number, loss, rate)
                outputs.append(out)
                sharding.keep_pace(outputs)
            if self._hosted:
                given = self._sums if self._summing else grads
                state, self._sums, decided = self._hosted.update(state, given, loss, rate)
                outputs[-1] |= decided
            elif self._summing:
                state, self._sums, decided = self._compiled["apply"](state, self._sums, loss, rate)
                outputs[-1] |= decided
        return state, outputs


def _layer_gradient_bytes(params: Params) -> int:
    """Return the float32 bytes that a device keeps of a layer's summed gradients, counting matrices only."""
    layers, stacked = params.get("layers", {}), is_stacked(params)
    leaves = jax.tree.leaves(layers if stacked else next(iter(layers.values()), None))
    shapes = [x.sharding.shard_shape(x.shape)[int(stacked) :] for x in leaves]
    return sum(4 * math.prod(shape) for shape in shapes if len(shape) > 1)


def _bytes_needed(program: Any, held: int, platform: str) -> int:
    """Return the peak of the bytes in use on a device that holds `held` bytes while a compiled program runs."""
    memory = program.memory_analysis()
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    # The sum overstates on a TPU, whose compiler reports the peak; a CPU's peak leaves out temporary buffers.
    peak = memory.peak_memory_in_bytes if platform == "tpu" else arguments + results + memory.temp_size_in_bytes
    return peak + max(0, held - arguments)


def make_loss_step(definition: Definition, mesh: Mesh, vocab_size: int, label_smoothing: float = 0.0) -> LossStep:
    """Return the compiled `(params, block) -> weighted loss of each token`, [B, T]."""
    return jax.jit(
        lambda params, batch: losses_of(definition.graphdef, params, batch, vocab_size, label_smoothing)[1],
        compiler_options=compiler_options(mesh, definition.run.fp8, given=definition.run.compiler_options),
    )


def abstract_batch(mesh: Mesh, shape: Shape) -> Batch:
    """Return the types and placements of a block of this shape."""
    kinds = dict.fromkeys(Batch._fields, jnp.int32) | {"weights": jnp.float32}
    rows = sharding.row_sharding(mesh)
    return Batch(**{name: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for name, kind in kinds.items()})
