"""Update parameters whose moments are in the host's memory, a part (`training.parts`) at a time.

The moments of a part are copied to the device, updated there and copied back. A program of its own updates each part.
So the host decides how many parts are on the device at once; in one program a compiler's scheduler would. The copies
run beside the programs, in both directions at once.
"""

from collections import deque
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llama_jax.distributed import sharding
from llama_jax.distributed.profile import OPTIMIZER
from llama_jax.model.roles import Params
from llama_jax.training.guard import Guard, select
from llama_jax.training.halves import halve, join
from llama_jax.training.optimizer import global_norm
from llama_jax.training.parts import ON_DEVICE, Place, join_state, parts_of, put_together, split_state, take
from llama_jax.training.state import TrainState

ARRIVING = 2  # parts


class HostedOptimizer:
    """Make the second half of an update, after the gradients, with moments in the host's memory.

    `halved` is `Definition.halved`. With `sums`, gradients are the sums of an update's blocks: the update gives them
    back as zeros. The results are those of the programs of `training.step` for a state on the device, bit by bit.
    """

    def __init__(self, tx: optax.GradientTransformationExtraArgs, halved: Params | None, guard: Guard, sums: bool):
        self._tx, self._halved, self._sums = tx, halved, sums
        self._programs: dict[Place, Any] = {}
        self._arriving, self._leaving = deque[Any](), deque[Any]()

        @jax.named_scope(OPTIMIZER)
        def decide(grads: Any, step: jax.Array, losses: Any, loss: jax.Array):
            norm = global_norm(grads)
            return step + 1, norm, *guard.decide(losses, loss, norm, jnp.ones((), bool))

        self._decide = jax.jit(decide)

    def compile(self, state: TrainState, grads: Any, mesh: Mesh, options: dict[str, Any]) -> dict[str, Any]:
        """Compile the programs for a state and gradients of these types; return them by name.

        Parts of the same shapes share a program, unless their moments are drawn: a draw depends on the parameter.
        """
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
        flag = jax.ShapeDtypeStruct((), jnp.bool, sharding=sharding.replicated(mesh))
        moments, numbers = split_state(state.opt_state)
        deciding = self._decide.lower(grads, state.step, state.losses, number)
        made = flag if deciding.out_info[2] is not None else None
        self._deciding, by_text = deciding.compile(options), dict[str, Any]()
        for place in parts_of(state.trainable):
            of_part = partial(take, place=place)
            changing = [of_part(state.trainable), of_part(state.lower), sharding.to_device([*map(of_part, moments)])]
            read = [of_part(grads), numbers, number, made, number]
            if self._sums:
                changing, read = [*changing, read[0]], [None, *read[1:]]
            lowered = self._lowered(state.opt_state, of_part(self._halved), changing, read)
            text = lowered.as_text()
            if text not in by_text:
                by_text[text] = lowered.compile(options)
            self._programs[place] = by_text[text]
        named = {f"apply {place}": program for place, program in self._programs.items()}
        return {"apply": self._deciding, **named}

    def _lowered(self, like: Any, halved: Params | None, changing: list[Any], read: list[Any]) -> Any:
        """Return the lowered program of a part. It takes lists of leaves, as the paths of similar parts differ."""
        of_changing, of_read = map(jax.tree.structure, (changing, read))

        @jax.named_scope(OPTIMIZER)
        def apply(changing: list[jax.Array], read: list[jax.Array]):
            trainable, lower, moments, *sums = jax.tree.unflatten(of_changing, changing)
            grads, numbers, norm, made, rate = jax.tree.unflatten(of_read, read)
            params, opt_state = join(trainable, lower), join_state(like, moments, numbers)
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), sums[0] if sums else grads, params)
            updates, after = self._tx.update(grads, opt_state, params, learning_rate=rate, grad_norm=norm)
            whole = optax.apply_updates(params, updates)
            if made is not None:
                whole, after = select(made, whole, params), select(made, after, opt_state)
            moments, numbers = split_state(after)
            changed = [*halve(whole, halved), moments, *(jax.tree.map(jnp.zeros_like, s) for s in sums)]
            return jax.tree.leaves(changed), numbers

        return jax.jit(apply, donate_argnums=0).lower(*map(jax.tree.leaves, (changing, read)))

    def update(self, state: TrainState, grads: Any, loss: jax.Array, rate: jax.Array) -> tuple[TrainState, Any, Any]:
        """Return the state after an update by these gradients, the zeros in their place (None without sums), and
        "grad_norm" and "skipped". State and gradients are consumed."""
        step, norm, made, skipped, losses = self._deciding(grads, state.step, state.losses, loss)
        moments, numbers = split_state(state.opt_state)
        hosted = [[take(tree, place) for tree in moments] for place in self._programs]
        self._copy_first(hosted)
        parts: list[list[Any]] = []
        for place, program in self._programs.items():
            of_host, arrived = self._arriving.popleft()
            of_grads, read = take(grads, place), [numbers, norm, made, rate]
            changing = [take(state.trainable, place), take(state.lower, place), arrived]
            changing, read = ([*changing, of_grads], [None, *read]) if self._sums else (changing, [of_grads, *read])
            leaves, structure = jax.tree.flatten(changing)
            leaves, numbers_after = program(leaves, jax.tree.leaves(read))
            trainable, lower, updated, *sums = jax.tree.unflatten(structure, leaves)
            left = sharding.to_host(updated)
            _delete([of_host, updated, [] if self._sums else of_grads])
            self._leaving.append(left)
            parts.append([trainable, lower, *left, *sums])
            hosted.append(left)
            self._copy(hosted[len(parts) + len(self._arriving)])
        trainable, lower, *trees = map(put_together, map(list, zip(*parts, strict=True)))
        sums = trees.pop() if self._sums else None
        opt_state = join_state(state.opt_state, trees, numbers_after)
        after = TrainState(step, trainable, state.frozen, opt_state, lower, losses)
        return after, sums, {"grad_norm": norm, "skipped": skipped}

    def _copy_first(self, hosted: list[list[Params]]) -> None:
        """Copy the first parts to the device, unless the update before this one did."""
        copied = jax.tree.leaves([of_host for of_host, _ in self._arriving])
        if list(map(id, copied)) != list(map(id, jax.tree.leaves(hosted[: len(self._arriving)]))):
            self._arriving.clear()  # of another state
        for part in hosted[len(self._arriving) : ARRIVING]:
            self._copy(part)

    def _copy(self, of_host: list[Params]) -> None:
        """Copy the moments of a part to the device, once those of earlier parts have left.

        A copy takes its memory when it is dispatched, and begins after the programs dispatched before it. So the first
        parts of an update are copied at the end of the update before: else they would wait for the backward pass.
        """
        while len(self._arriving) + len(self._leaving) >= ON_DEVICE:
            left = jax.tree.leaves(self._leaving.popleft())
            jax.block_until_ready([array for array in left if not array.is_deleted()])  # as few parts come back
        self._arriving.append((of_host, sharding.to_device(of_host)))


def _delete(tree: Any) -> None:
    """Free arrays as soon as the dispatched programs and copies have read them."""
    for array in jax.tree.leaves(tree):
        array.delete()
