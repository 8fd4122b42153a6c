"""Tag each parameter with its role: the type of its variable, given where the parameter is made.

Code that treats parameters differently (optimizer, halves, sharded sums, adapters) reads the tag and never the name.
"""

from typing import Any

from flax import nnx

Params = dict[str | int, Any]  # a parameter tree: nested, by attribute names and layer numbers


class MatmulWeight(nnx.Param):
    """Mark the matrix of the output head, [outputs, inputs]; of a projection by its subclass."""


class ProjectionWeight(MatmulWeight):
    """Mark the matrix of a layer's projection, [outputs, inputs]."""


class Bias(nnx.Param):
    """Mark the bias of a projection, [outputs]."""


class NormWeight(nnx.Param):
    """Mark the scale of a norm, [model], or [head dim] for q and k."""


class AdapterWeight(nnx.Param):
    """Mark a matrix of a low-rank adapter, [rank, inputs] or [outputs, rank], or DoRA's magnitudes, [outputs]."""


class EmbeddingTable(nnx.Param):
    """Mark the rows that token ids select, [vocabulary, model]; with tied embeddings also the output head."""


def is_stacked(params: Params) -> bool:
    """Return whether the layers of a parameter tree are stacked on a leading axis, and not keyed by their numbers."""
    return any(isinstance(key, str) for key in params.get("layers", ()))
