"""Compute this program's model one layer in memory at a time, by the run's own code, types and kernel.

Letters: R rows, T tokens, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
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
        self, source: Source, config: LlamaConfig, run: RunOptions, mesh: Mesh, batch: Batch, new_ids: Sequence[int] = ()
    ):
        self._source, self._config, self._mesh, self._new_ids = source, config, mesh, new_ids
        self._run = dataclasses.replace(run, scan_layers=False, lora=None, quantization=None, fp8=False)
        self._definition = define(config, self._run, mesh)
        self._names = {path: (name, shape) for name, (path, shape) in name_table(config).items()}
        with jax.set_mesh(mesh):
            self._batch = Batch(*(sharding.put(mesh, array) for array in batch))
            model, slots = self._model({}), batch.input_ids.shape[1]
            places = (self._batch.positions, self._batch.segment_ids, self._batch.lengths)
            self._tokens: Tokens = jax.jit(lambda *arrays: model.tokens(*arrays, slots))(*places)

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

    def embed(self, params: Params) -> np.ndarray:
        """Return the input of the first layer [R, T, D]."""
        with jax.set_mesh(self._mesh):
            return np.asarray(jax.jit(lambda p, ids: self._model(p).embed(ids))(params, self._batch.input_ids))

    def embed_gradient(self, params: Params, dy: np.ndarray) -> Gradients:
        """Return the gradient of the embedding by that of its output."""

        def pull(params: Params, ids: jax.Array, dy: jax.Array) -> Params:
            y, back = jax.vjp(lambda p: self._model(p).embed(ids), params)
            return back(dy.astype(y.dtype))[0]

        with jax.set_mesh(self._mesh):
            return self._named(jax.jit(pull)(params, self._batch.input_ids, self._placed(dy)))

    def layer(self, i: int, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the output [R, T, D] of layer i."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._call(i)(params["layers"][i], self._placed(x)))

    def layer_gradient(self, i: int, params: Params, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of layer i's input [R, T, D] and of its parameters by that of its output."""
        call = self._call(i)
        with jax.set_mesh(self._mesh):
            _, back = jax.vjp(call, params["layers"][i], self._placed(x))
            grads, dx = back(self._placed(dy))
            return np.asarray(dx), self._named({"layers": {i: grads}})

    def _call(self, i: int) -> Any:
        """Return layer i as a function of its parameters and its input. jax compiles layers of equal definition once."""
        graphdef, _ = nnx.split(self._model({}).layers[i])
        rotates = self._config.rope_layers or None
        own = self._tokens.of_layer(i, rotates and rotates[i])
        return lambda params, x: run_block(graphdef, self._run.remat, params, x, own, None)[0]

    def norm(self, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the final norm of hidden states [R, T, D]."""
        with jax.set_mesh(self._mesh):
            return np.asarray(jax.jit(lambda p, x: self._model(p).norm(x))(params, self._placed(x)))

    def logits(self, params: Params, hidden: np.ndarray) -> np.ndarray:
        """Return the logits [R, T, V], float32, of normed hidden states."""
        with jax.set_mesh(self._mesh):
            return np.asarray(jax.jit(lambda p, h: self._model(p).logits(h))(params, self._placed(hidden)))

    def loss_gradient(self, params: Params, x: np.ndarray) -> tuple[float, np.ndarray, Gradients]:
        """Return the run's loss of the batch, and the gradients of the last layer's output, the final norm and the
        head."""

        def loss(params: Params, x: jax.Array, batch: Batch) -> jax.Array:
            model = self._model(params)
            arguments = (model.norm(x), model.head(), batch.targets, batch.weights)
            return weighted_cross_entropy(*arguments, self._config.vocab_size)[0]

        with jax.set_mesh(self._mesh):
            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            value, (grads, dx) = step(params, self._placed(x), self._batch)
            return float(value), np.asarray(dx), self._named(grads)

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
