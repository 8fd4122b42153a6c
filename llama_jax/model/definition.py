"""Describe a model without its arrays: graph, shapes with placements, roles, and which parameters are trained."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from llama_jax.distributed import sharding
from llama_jax.model.config import LlamaConfig
from llama_jax.model.llama import Llama, RunOptions
from llama_jax.model.roles import AdapterWeight, MatmulWeight, Params, ProjectionWeight


@dataclass(frozen=True)
class Definition:
    """Hold the graph of a model and trees of its parameters, as `jax.ShapeDtypeStruct` with shardings.

    `trainable` and `frozen` have no leaf in common. `roles` holds the tag (`model.roles`) of each trainable parameter,
    `frozen_roles` of each frozen one.
    """

    run: RunOptions
    graphdef: Any
    trainable: Params
    frozen: Params
    roles: Params
    frozen_roles: Params

    @property
    def params(self) -> Params:
        """Return the tree of all parameters."""
        return merge(self.trainable, self.frozen)

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return the trainable and the frozen parameters of a tree with all of them."""
        return pick(params, self.trainable), pick(params, self.frozen)

    def having(self, *roles: type[nnx.Param]) -> Params:
        """Return a tree of booleans over the trainable parameters: true for these roles."""
        return jax.tree.map(lambda role: issubclass(role, roles), self.roles)

    @property
    def base(self) -> Params:
        """Return the tree of all parameters but the adapters': those of the model's files."""
        return without(self.params, _where(self.trainable, self.having(AdapterWeight)))

    @property
    def halved(self) -> Params | None:
        """Return a tree of booleans, true for parameters that `training.halves` splits; None where none is split.

        Float32 weights of bfloat16 matmuls are split: no step then reads a weight only to round it.
        """
        types = (self.run.param_dtype, self.run.compute_dtype)
        return self.having(MatmulWeight) if types == (jax.numpy.float32, jax.numpy.bfloat16) else None

    @property
    def scaled(self) -> Params | None:
        """Return a tree of booleans over the frozen parameters, true for those kept in fp8 (`matmul.Scaled`) while a
        run trains; None where none is. DoRA takes norms of the weights."""
        if not self.run.fp8 or self.run.lora is None or self.run.lora.use_dora:
            return None
        return jax.tree.map(lambda role: issubclass(role, ProjectionWeight), self.frozen_roles)


@lru_cache(maxsize=4)
def define(config: LlamaConfig, run: RunOptions, mesh: Mesh, trainable: Any = None) -> Definition:
    """Return the definition of a model on a mesh; `trainable` is the NNX filter of the parameters to train, by default
    all, or with adapters those of `run.lora`."""
    trainable = trainable or (run.lora.trains if run.lora else nnx.Param)
    # Shapes do not depend on keys; splitting a key for each parameter would take four fifths of the time.
    rngs: Any = SimpleNamespace(params=lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        graphdef, *states = jax.eval_shape(lambda: nnx.split(Llama(config, run, rngs=rngs), trainable, ...))
    trained, frozen = (jax.tree.map(lambda a: sharding.on(mesh, a), nnx.to_pure_dict(state)) for state in states)
    roles: Any = [nnx.to_pure_dict(state, extract_fn=type) for state in states]
    return Definition(run, graphdef, trained, frozen, *roles)


def merge(a: Params, b: Params) -> Params:
    """Return the union of two parameter trees without a common leaf; no array is copied."""
    if not b:
        return a
    both = {key: merge(a[key], b[key]) for key in a.keys() & b.keys()}
    return {**a, **b, **both}


def _where(tree: Params, wanted: Params) -> Params:
    """Return the leaves of a tree that are true in `wanted`, without empty branches."""
    found = {k: _where(v, wanted[k]) if isinstance(v, dict) else v for k, v in tree.items() if wanted[k]}
    return {key: value for key, value in found.items() if not isinstance(value, dict) or value}


def only(tree: Params, paths: Collection[tuple[str | int, ...]], above: tuple[str | int, ...] = ()) -> Params:
    """Return the part of a tree that has these paths."""
    found = {k: only(v, paths, (*above, k)) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in found.items() if (v if isinstance(v, dict) else (*above, k) in paths)}


def without(tree: Params, other: Params) -> Params:
    """Return the part of a tree that has no leaf in common with another."""
    left = {k: without(v, other.get(k, {})) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in left.items() if (v if isinstance(v, dict) else k not in other)}


def pick(tree: Params, like: Params) -> Params:
    """Return the part of a tree that has the keys of `like`, which has no other keys."""
    return {key: pick(tree[key], value) if isinstance(value, dict) else tree[key] for key, value in like.items()}
