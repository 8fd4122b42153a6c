"""Define low-rank adapters: which projections have one, and the mathematics of PEFT's LoRA and DoRA.

Letters: B rows, T tokens, I inputs, O outputs, R rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from llama_jax.distributed import sharding
from llama_jax.distributed.digest import mixed, places
from llama_jax.distributed.sharding import placed
from llama_jax.model.matmul import SCATTER, project
from llama_jax.model.quantized import dequantize, is_quantized
from llama_jax.model.roles import AdapterWeight, Params, is_stacked

PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class Rank(NamedTuple):
    """Hold the rank of a projection's adapter, and the factor of its product: alpha / r, or alpha / sqrt(r)."""

    r: int
    scaling: float


@dataclass(frozen=True)
class Lora:
    """Hold the adapters of a run, resolved for a model.

    `ranks` is ((layer, projection), rank) for each adapted projection, as (0, "self_attn.q_proj"), in the model's
    order. `saved` names the modules that are trained whole: "embed_tokens", "lm_head". `dropout` is the probability
    with which an element of an adapter's input is zeroed in training.
    """

    ranks: tuple[tuple[tuple[int, str], Rank], ...]
    saved: tuple[str, ...] = ()
    dropout: float = 0.0
    use_dora: bool = False

    def of(self, layer: int, projection: str) -> Rank | None:
        """Return the rank of a projection's adapter, None where it has none."""
        return self._by_place.get((layer, projection))

    @cached_property
    def _by_place(self) -> dict[tuple[int, str], Rank]:
        return dict(self.ranks)

    def uniform(self, layers: int) -> bool:
        """Return whether all layers of the model have the same adapters, as stacked layers need."""
        own: list[set[Any]] = [set() for _ in range(layers)]
        for (layer, projection), rank in self.ranks:
            own[layer].add((projection, rank))
        return all(adapters == own[0] for adapters in own)

    def trains(self, path: tuple[Any, ...], value: Any) -> bool:
        """Return whether a parameter is trained: an NNX filter."""
        kind = getattr(value, "type", type(value))
        return issubclass(kind, AdapterWeight) or path[0] in self.saved


class Projection(Protocol):
    """Describe the frozen part of a projection: x @ weight.T, and the weight, in the compute type."""

    def product(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]: ...

    def matrix(self) -> Float[Array, "O I"]: ...


class Matrix(nnx.Module):
    """Hold a matrix of an adapter, or DoRA's magnitudes, in float32."""

    def __init__(self, shape: tuple[int, ...], spec: P):
        self.weight = AdapterWeight(jnp.zeros(shape, jnp.float32, out_sharding=placed(spec)))


class Adapter(nnx.Module):
    """Compute what an adapter adds to a projection's output.

    The weights of the projection are [O, I], placed by `spec`. A and B are whole on the devices, but for the axis that
    `tensor` divides. They hold zeros here: their first values are PEFT's (`hf.peft`).
    """

    def __init__(self, out_in: tuple[int, int], row: bool, rank: Rank, lora: Lora, dtype: Any, number: int):
        (out, in_), tensor = out_in, P("tensor")
        self.lora_A = Matrix((rank.r, in_), P(None, "tensor") if row else P(None, None))
        self.lora_B = Matrix((out, rank.r), P(None, None) if row else P("tensor", None))
        self.lora_magnitude = Matrix((out,), P(None) if row else tensor) if lora.use_dora else None
        self.scaling, self.dropout, self.dtype, self.number = rank.scaling, lora.dropout, dtype, number
        self.out = sharding.ACT_BTD if row else sharding.ACT_BTF

    def __call__(
        self,
        x: Float[Array, "B T I"],
        base: Float[Array, "B T O"],
        projection: Projection,
        key: Any,
        low: Float[Array, "B T R"] | None = None,
    ) -> Float[Array, "B T O"]:
        """Return the adapter's part of the output; `base` is `projection.product(x)`. `key`, a uint32, draws the
        dropout, None for none; `low` is x @ A.T where the caller has it."""
        dropped = x.astype(self.dtype)
        if key is not None:
            kept = _drawn(mixed(key + np.uint32(self.number)), 1 - self.dropout, x)
            dropped = jnp.where(kept, dropped / (1 - self.dropout), 0)
        a, b = self.lora_A.weight[...], self.lora_B.weight[...]
        if low is None:
            low = project(sharding.ACT_BTD, SCATTER, dropped, a.astype(self.dtype))
        y = project(self.out, SCATTER, low, b.astype(self.dtype)) * self.scaling
        if self.lora_magnitude is None:
            return y
        # PEFT: the norm of W + s B A is a constant of the update; the base's output is of the dropped input too.
        whole = _summed(projection.matrix(), a, b, self.scaling)
        norm = sharding.reshard(
            jnp.linalg.norm(jax.lax.stop_gradient(whole), axis=1), P(*jax.typeof(b).sharding.spec[:1])
        )
        norm = jnp.where(norm == 0, 1, norm)  # of rows that pad the heads or the ffn for the mesh
        factor = (self.lora_magnitude.weight[...] / norm).astype(self.dtype)
        if key is not None:
            base = projection.product(dropped)
        return (factor - 1) * base + factor * y


def _summed(
    weight: Float[Array, "O I"],
    a: Float[Array, "R I"],
    b: Float[Array, "O R"],
    scaling: Any,
    precision: str | None = None,
) -> Float[Array, "O I"]:
    """Return W + s B A in float32."""
    spec = placed(jax.typeof(weight).sharding.spec)
    product = jnp.einsum("OR,RI->OI", b, a, out_sharding=spec, precision=precision)
    return weight.astype(jnp.float32) + scaling * product


def _drawn(key: jax.Array, probability: float, x: jax.Array) -> jax.Array:
    """Draw booleans of the shape and the placement of `x`, true with `probability`, the same ones on any mesh.

    Each is a hash of the element's place. A program with draws of jax's generators takes a GPU's compiler two to three
    times as long.
    """
    return places(x, key) < np.uint32(min(probability * 2**32, 2**32 - 1))


def magnitudes(params: Params, lora: Lora, dtype: Any) -> dict[tuple[str | int, ...], np.ndarray]:
    """Return DoRA's first magnitudes, the lengths of the rows of each adapted weight in `dtype`, by their path."""
    layers, stacked = params["layers"], is_stacked(params)
    result: dict[tuple[str | int, ...], np.ndarray] = {}
    for (layer, projection), _ in lora.ranks:
        block, module = projection.split(".")
        weight = (layers if stacked else layers[layer])[block][module]["weight"]
        if stacked:
            weight = jax.tree.map(lambda array, number=layer: array[number], weight)
        if is_quantized(weight):
            weight = dequantize(weight, dtype)
        lengths = jnp.linalg.norm(weight.astype(jnp.float32), axis=1).astype(dtype)
        path = ("layers", layer, block, module, "adapter", "lora_magnitude", "weight")
        result[path] = np.asarray(sharding.whole(lengths)).astype(np.float32)
    return result


def merged(params: Params, lora: Lora) -> Params:
    """Return the parameters of the plain model whose unstacked layers have the adapters in their weights, summed in
    float32 and rounded once. The given arrays are used up."""
    layers = {number: {**layer} for number, layer in params["layers"].items()}
    for (layer, projection), rank in lora.ranks:
        block, module = projection.split(".")
        parts = dict(layers[layer][block][module])
        adapter = {name: matrix["weight"] for name, matrix in parts.pop("adapter").items()}
        parts["weight"] = _merged(parts["weight"], adapter, rank.scaling)
        layers[layer][block] = {**layers[layer][block], module: parts}
    return {**params, "layers": layers}


@jax.jit(donate_argnums=0)
def _merged(weight: Float[Array, "O I"], adapter: dict[str, jax.Array], scaling: float) -> Float[Array, "O I"]:
    whole = _summed(weight, adapter["lora_A"], adapter["lora_B"], scaling, precision="highest")
    if "lora_magnitude" in adapter:
        lengths, wanted = (
            sharding.reshard(x, P(None)) for x in (jnp.linalg.norm(whole, axis=1), adapter["lora_magnitude"])
        )
        whole = whole * (wanted / lengths)[:, None]
    return whole.astype(weight.dtype)
