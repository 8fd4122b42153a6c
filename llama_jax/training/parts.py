"""Divide parameters and an optimizer's state into parts, and keep the moments in the host's memory."""

from functools import reduce
from typing import Any

import jax
import numpy as np
import optax

from llama_jax.distributed import sharding
from llama_jax.model.definition import merge
from llama_jax.model.roles import Params, is_stacked
from llama_jax.training.halves import join

Place = int | None
ON_DEVICE = 4  # parts whose moments are on the device at once: as two arrive, two leave


def parts_of(params: Params) -> list[Place]:
    """Return the parts: the number of each layer, and None for all parameters beside the layers.

    A part has several leaves: of a single one, a CPU's compiler rounds Adam's powers otherwise than in a whole update.
    """
    assert not is_stacked(params)
    return [*params.get("layers", {}), *([None] if params.keys() - {"layers"} else [])]


def take(tree: Params | None, place: Place) -> Any:
    """Return a part of a tree of parameters, by the same names; of None, None."""
    if tree is None:
        return None
    if place is None:
        return {key: value for key, value in tree.items() if key != "layers"}
    return {"layers": {place: tree["layers"][place]}}


def put_together(parts: list[Any]) -> Any:
    """Return the tree whose parts `take` gives."""
    return None if parts[0] is None else reduce(merge, parts)


def _is_tree(x: Any) -> bool:
    return isinstance(x, dict)


def split_state(opt_state: Any) -> tuple[list[Params], list[jax.Array]]:
    """Return the trees of moments in an optimizer's state, with the parameters' paths, and the numbers beside them."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_tree)
    return [x for x in leaves if _is_tree(x)], [x for x in leaves if not _is_tree(x)]


def join_state(like: Any, moments: list[Params], numbers: list[jax.Array]) -> Any:
    """Return the state of both results of `split_state`, built as `like`."""
    leaves, structure = jax.tree.flatten(like, is_leaf=_is_tree)
    of_kind = {True: iter(moments), False: iter(numbers)}
    return jax.tree.unflatten(structure, [next(of_kind[_is_tree(x)]) for x in leaves])


def moments_on_host(opt_state: Any) -> Any:
    """Return the types and placements of an optimizer's state with its moments in the host's memory."""
    moments, numbers = split_state(opt_state)
    return join_state(opt_state, sharding.to_host(moments), numbers)


def init_on_host(tx: optax.GradientTransformation, trainable: Params, lower: Params | None) -> Any:
    """Return the optimizer's first state, its moments in the host's memory. A device holds those of a part at once."""
    init, parts = jax.jit(lambda trainable, lower: tx.init(join(trainable, lower))), []
    for place in parts_of(trainable):
        state = init(take(trainable, place), take(lower, place))
        moments, numbers = split_state(state)
        parts.append(jax.block_until_ready(sharding.to_host(moments)))
    return join_state(state, [put_together([*trees]) for trees in zip(*parts, strict=True)], numbers)


def passing_bytes(trainable: Params, opt_state: Any) -> int:
    """Return the most bytes of the host's moments that are on a device at once; 0 where the host has none."""
    if not sharding.bytes_on_host(opt_state):
        return 0
    moments, _ = split_state(opt_state)
    sizes = [sharding.bytes_on_host([take(tree, place) for tree in moments]) for place in parts_of(trainable)]
    # The first parts of an update follow the last of the one before.
    return max(sum(np.roll(sizes, -i)[:ON_DEVICE]) for i in range(len(sizes)))
