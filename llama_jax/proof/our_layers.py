"""Compute this program's model one layer in memory at a time, by the run's own code, types and kernel.

Letters: R rows, T tokens, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama_jax.data.batches import Batch
from llama_jax.distributed import sharding
from llama_jax.hf.load import resize_vocabulary
from llama_jax.hf.names import Path, name_table
from llama_jax.hf.source import Source
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, merge, without
from llama_jax.model.llama import Llama, RunOptions, Tokens, run_block
from llama_jax.model.roles import Params
from llama_jax.model.rope import rope_cos_sin
from llama_jax.training.loss import weighted_cross_entropy

Gradients = dict[str, np.ndarray]


def shrunk(config: LlamaConfig, layers: int | None) -> LlamaConfig:
    """Return the architecture with its first layers only, None for all."""
    if layers is None:
        return config
    return dataclasses.replace(config, num_hidden_layers=layers, rope_layers=config.rope_layers[:layers])


class OurLayers:
    """Hold the model of a source without weights in memory. `config` has the rows of the run's vocabulary and perhaps
    fewer layers than the source; `new_ids` are tokens that the run adds."""

    def __init__(
        self,
        source: Source,
        config: LlamaConfig,
        run: RunOptions,
        mesh: Mesh,
        batch: Batch,
        new_ids: Sequence[int] = (),
    ):
        self._source, self._config, self._mesh, self._new_ids = source, config, mesh, new_ids
        self._run = dataclasses.replace(run, scan_layers=False, lora=None, quantization=None, fp8=False)
        self._definition = define(config, self._run, mesh)
        self._names = {path: (name, shape) for name, (path, shape) in name_table(config).items()}
        with jax.set_mesh(mesh):
            self._batch = Batch(*(sharding.put(mesh, array) for array in batch))
            model, slots = self._model({}), batch.input_ids.shape[1]
            places = (self._batch.positions, self._batch.segment_ids, self._batch.lengths)
            # Each is compiled once: a part is computed alone and again in the carried pass.
            self._embed = jax.jit(lambda p, ids: self._model(p).embed(ids))
            self._norm = jax.jit(lambda p, x: self._model(p).norm(x))
            self._logits = jax.jit(lambda p, hidden: self._model(p).logits(hidden))
            self._loss = jax.jit(jax.value_and_grad(self._loss_of, argnums=(0, 1)))
            self._tokens: Tokens = jax.jit(lambda a, b, c: model.tokens(a, b, c, slots))(*places)

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return self._config.num_hidden_layers

    @property
    def head(self) -> str:
        """Return the name of the part that holds the head's matrix."""
        return "embed_tokens" if self._config.tie_word_embeddings else "lm_head"

    def read(self, *parts: str | int) -> Params:
        """Return the parameters of parts of the tree: names, or numbers of layers."""
        tree = self._definition.params
        like: Params = {part: tree[part] for part in parts if isinstance(part, str)}
        if numbers := [part for part in parts if isinstance(part, int)]:
            like["layers"] = {i: tree["layers"][i] for i in numbers}
        if not self._resizes or not {"embed_tokens", "lm_head"} & like.keys():
            return self._source.load(self._run, self._mesh, like=like)
        old = define(self._source.config, self._run, self._mesh).params
        params = self._source.load(self._run, self._mesh, like={part: old[part] for part in like})
        return resize_vocabulary(params, self._source.config, self._config, self._new_ids, self._mesh)

    @property
    def _resizes(self) -> bool:
        return bool(self._new_ids) or self._config.vocab_size != self._source.config.vocab_size

    def _model(self, params: Params) -> Llama:
        """Return the model with these parameters; the others are descriptions."""
        return nnx.merge(self._definition.graphdef, merge(without(self._definition.params, params), params))

    def rotation(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines [T, H/2] of the positions from 0."""
        places = np.arange(positions, dtype=np.int32)[None]
        with jax.set_mesh(self._mesh):
            at, lengths = (sharding.put(self._mesh, a) for a in (places, np.full_like(places, positions)))
            cos, sin = rope_cos_sin(self._config, at, lengths, positions)
        return np.asarray(cos[0]), np.asarray(sin[0])

    def embed(self, params: Params) -> np.ndarray:
        """Return the input of the first layer [R, T, D]."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._embed(params, self._batch.input_ids))

    def embed_gradient(self, params: Params, dy: np.ndarray) -> Gradients:
        """Return the gradient of the embedding by that of its output."""
        with jax.set_mesh(self._mesh):
            x, back = jax.vjp(lambda p: self._embed(p, self._batch.input_ids), params)
            return self._named(back(self._placed(dy).astype(x.dtype))[0])

    def layer(self, i: int, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the output [R, T, D] of layer i."""
        with jax.set_mesh(self._mesh):
            return np.asarray(_layer(self._kind(i), params["layers"][i], self._placed(x), self._inputs(i)))

    def parts(self, i: int) -> set[str]:
        """Return the names of layer i's parts: projections, norms, attention and MLP."""
        found = {"self_attn", "mlp"}
        for keys, _ in jax.tree_util.tree_flatten_with_path(self._definition.params["layers"][i])[0]:
            found.add(".".join(key.key for key in keys[:-1]))
        return found

    def part(self, i: int, params: Params, name: str, x: np.ndarray) -> np.ndarray:
        """Return the output of a part of layer i for an input [R, T, ...]."""

        def call(params: Params, x: jax.Array, tokens: Tokens) -> jax.Array:
            module: Any = self._model(params).layers[i]
            for key in name.split("."):
                module = getattr(module, key)
            return module(x, tokens, None)[0] if name == "self_attn" else module(x)

        with jax.set_mesh(self._mesh):
            return np.asarray(jax.jit(call)(params, jnp.asarray(x), self._inputs(i)))

    def layer_gradient(self, i: int, params: Params, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of layer i's input [R, T, D] and of its parameters by that of its output."""
        with jax.set_mesh(self._mesh):
            arrays = (params["layers"][i], self._placed(x), self._inputs(i), self._placed(dy))
            grads, dx = _pull(self._kind(i), *arrays)
            return np.asarray(dx), self._named({"layers": {i: grads}})

    def _kind(self, i: int) -> Any:
        """Return the graph definition of layer i, equal for layers that jax compiles once."""
        return nnx.split(self._model({}).layers[i])[0]

    def _inputs(self, i: int) -> Tokens:
        rotates = self._config.rope_layers or None
        return self._tokens.of_layer(i, rotates and rotates[i])

    def norm(self, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the final norm of hidden states [R, T, D]."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._norm(params, self._placed(x)))

    def logits(self, params: Params, hidden: np.ndarray) -> np.ndarray:
        """Return the logits [R, T, V], float32, of normed hidden states."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._logits(params, self._placed(hidden)))

    def loss_gradient(self, params: Params, x: np.ndarray) -> tuple[float, np.ndarray, Gradients]:
        """Return the run's loss of the batch, and the gradients of the last layer's output, the final norm and the
        head."""
        with jax.set_mesh(self._mesh):
            value, (grads, dx) = self._loss(params, self._placed(x), self._batch)
            return float(value), np.asarray(dx), self._named(grads)

    def _loss_of(self, params: Params, x: jax.Array, batch: Batch) -> jax.Array:
        model = self._model(params)
        arguments = (model.norm(x), model.head(), batch.targets, batch.weights)
        return weighted_cross_entropy(*arguments, self._config.vocab_size)[0]

    def _placed(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(jnp.asarray(x), jax.sharding.NamedSharding(self._mesh, sharding.ACT_BTD))

    def _named(self, tree: Params) -> Gradients:
        """Return gradients under HF's names, without padding, as float32."""
        found = {}
        for keys, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
            path: Path = tuple(key.key for key in keys)
            name, shape = self._names[path]
            found[name] = np.asarray(value[tuple(map(slice, shape))], np.float32)
        return found


def _layer(kind: Any, params: Params, x: jax.Array, tokens: Tokens) -> jax.Array:
    return run_block(kind, "none", params, x, tokens, None)[0]


@partial(jax.jit, static_argnums=0)
def _pull(kind: Any, params: Params, x: jax.Array, tokens: Tokens, dy: jax.Array) -> Any:
    """Return the gradients of a layer's parameters and input by that of its output."""
    return jax.vjp(lambda params, x: _layer(kind, params, x, tokens), params, x)[1](dy)
