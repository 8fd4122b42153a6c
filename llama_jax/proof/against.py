"""Compare two folders of one architecture: each tensor by name, then the logits that this program computes of both."""

import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from llama_jax.base.errors import InputError
from llama_jax.hf.names import name_table
from llama_jax.hf.source import Source
from llama_jax.model.config import LlamaConfig
from llama_jax.proof.bounds import FLOOR, ROUNDOFF
from llama_jax.proof.model import run_options
from llama_jax.proof.our_layers import OurLayers, shrunk
from llama_jax.proof.sample import Sample
from llama_jax.proof.torch_layers import FLOAT32
from llama_jax.proof.verdict import Row, bounded

TENSORS, LOGITS = "tensors", "logits"
PART = 1 << 24  # elements read at once


def compare_folders(source: Source, other: Source, layers: int | None, sample: Sample, mesh: Mesh) -> list[Row]:
    """Return the rows of two folders, `source` first, or of their first `layers` layers. Raises InputError for folders
    of other architectures.

    Equal weights that were rounded to the coarser of both types differ by its unit roundoff u at most: the bound of a
    tensor, relative in its norm. Each layer adds such differences, independent of each other: FLOOR u sqrt(layers + 1)
    bounds the logits.
    """
    config, second = (shrunk(each.config, layers) for each in (source, other))
    if config != second:
        differing = [key for key, value in vars(config).items() if value != getattr(second, key)]
        shown = ", ".join(f"{key} {getattr(config, key)} and {getattr(second, key)}" for key in differing[:3])
        raise InputError(f"--against {other.folder}: is another architecture than {source.folder}: {shown}")
    rows, coarsest = [], 0.0
    for name in name_table(config):
        ours, theirs = source.tensors[name], other.tensors[name]
        kinds = {ours.dtype.name, theirs.dtype.name}
        u = max(
            ROUNDOFF["bfloat16"] if kind == "bfloat16" else 2.0**-11 if kind == "float16" else 2.0**-24
            for kind in kinds
        )
        coarsest = max(coarsest, u)
        difference = total = largest = 0.0
        for part in _parts(ours.shape):
            a, b = (tensor.read(part).astype(np.float64) for tensor in (ours, theirs))
            difference += float(np.square(a - b).sum())
            total += float(np.square(b).sum())
            largest = max(largest, float(np.abs(a - b).max()))
        error = math.sqrt(difference / total) if total else math.sqrt(difference)
        rows.append(bounded(TENSORS, name, error, u, f"largest difference {largest:.2e}"))
    logits = [_logits(each, config, sample, mesh) for each in (source, other)]
    scale = np.linalg.norm(logits[1], axis=-1)
    error = float((np.linalg.norm(logits[0] - logits[1], axis=-1) / scale).max())
    agreeing = float((logits[0].argmax(-1) == logits[1].argmax(-1)).mean())
    bound = FLOOR * coarsest * math.sqrt(1 + config.num_hidden_layers)
    note = f"the likeliest next token is the same for {agreeing:.1%} of {len(scale):,} tokens"
    return [*rows, bounded(LOGITS, "logits", error, bound, note)]


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield slices of some rows that cover a tensor."""
    rows = max(1, PART // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(0, n) for n in shape[1:]))


def _logits(source: Source, config: LlamaConfig, sample: Sample, mesh: Mesh) -> np.ndarray:
    """Return the logits [N, V] of a folder by this program in float32, a layer in memory at a time."""
    layers = OurLayers(source, config, run_options(FLOAT32, config, sample, mesh), mesh, sample.batch)
    x = layers.embed(layers.read("embed_tokens"))
    for i in range(layers.layers):
        x = layers.layer(i, layers.read(i), x)
    hidden = layers.norm(layers.read("norm"), x)
    return sample.of_rows(layers.logits(layers.read(layers.head), hidden))
