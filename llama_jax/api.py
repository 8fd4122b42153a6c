"""Compute with a LLaMA checkpoint on one device: logits, hidden states, loss, gradients, answers. See docs/api.md.

Letters: B rows, T tokens, D model, V vocabulary, L layers.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.base.errors import InputError
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.distributed import sharding
from llama_jax.hf.generation import check_new_tokens
from llama_jax.hf.source import Source, numpy_dtype
from llama_jax.hf.writer import hf_tensors
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.generate import generate
from llama_jax.model.llama import Llama, RunOptions
from llama_jax.reporting.progress import say
from llama_jax.training.loss import weighted_cross_entropy

Arrays = dict[str, np.ndarray]

_SHOULD_BE = "input_ids, labels and attention_mask: give integers of one shape [B, T], at least one token a row"


def load(path: str | Path, dtype: str = "float32", allow_pickle: bool = False) -> "Model":
    """Read a model from an HF folder, a .gguf file or a Flax folder onto the first device.

    `dtype` ("float32", "bfloat16", "float16") is the type of parameters and matmuls. `allow_pickle` permits
    pytorch_model*.bin. Raises InputError.
    """
    run, source = RunOptions(param_dtype=jnp.dtype(numpy_dtype(dtype))), Source(path, allow_pickle)
    device = jax.devices()[0]
    mesh = sharding.make_mesh([device])
    graphdef = define(source.config, run, mesh).graphdef
    # The same buffers without the mesh: operations on them need no spec.
    params = jax.device_put(source.load(run, mesh), jax.sharding.SingleDeviceSharding(device))
    return Model(nnx.merge(graphdef, params), source)


class Model:
    """Hold a loaded model. `llama` is its Flax module, an `nnx.Module`; `config` its architecture.

    `input_ids`, `labels` and `attention_mask` are integers [B, T], as transformers takes them. The mask is 1 for tokens
    and 0 for padding, on either side; as there, positions count padding too.
    """

    def __init__(self, llama: Llama, source: Source):
        self.llama, self.config = llama, llama.config
        self._source = source
        self._said: set[str] = set()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the folder. Raises InputError where it has none."""
        return open_tokenizer(self._source.tokenizer_folder)

    def logits(self, input_ids: Any, attention_mask: Any = None) -> jax.Array:
        """Return the float32 logits [B, T, V]."""
        return self._run(_logits, input_ids, attention_mask)

    def hidden_states(self, input_ids: Any, attention_mask: Any = None) -> tuple[jax.Array, ...]:
        """Return the embeddings and each layer's output, the last one normed: L + 1 arrays [B, T, D]."""
        return self._run(_hidden_states, input_ids, attention_mask)

    def loss(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> jax.Array:
        """Return the mean cross-entropy of the next tokens, a float32 scalar; labels of -100 take no part."""
        return self._run(_loss, input_ids, attention_mask, *_targets(self.config, labels))

    def loss_and_gradients(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> tuple[jax.Array, Arrays]:
        """Return `loss`, and its gradient by every parameter under HF's name, on the host in the parameter's type."""
        loss, gradients = self._run(_gradients, input_ids, attention_mask, *_targets(self.config, labels))
        return loss, dict(hf_tensors(gradients, self.config))

    def generate(self, prompt: str, max_new_tokens: int = 128, temperature: float | None = None, seed: int = 0) -> str:
        """Return the text that follows the prompt, up to an end token; greedy at temperature 0."""
        (ids,) = self.tokenizer.encode_batch([prompt])
        (new,) = self.generate_ids([ids], max_new_tokens, temperature=temperature, seed=seed)
        return self.tokenizer.decode(new)

    def generate_ids(
        self,
        input_ids: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        attention_mask: Any = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, up to an end token of generation_config.json or config.json.

        Without a temperature, tokens are drawn as those files say, by default greedily; their `top_k`, `top_p`, `min_p`
        and `repetition_penalty` hold at any temperature.
        Prompts are lists of any length, or an array [B, T] with the attention mask of its padding.
        """
        rows = [_integers(row, axes=1) for row in input_ids]
        masks = [np.ones_like(row) for row in rows] if attention_mask is None else [*_mask(attention_mask)]
        if [row.shape for row in rows] != [mask.shape for mask in masks]:
            raise InputError(_SHOULD_BE)
        prompts = [row[mask != 0].astype(np.int64) for row, mask in zip(rows, masks, strict=True)]
        if not prompts or not all(map(len, prompts)) or not 0 <= (temperature or 0) < math.inf:
            raise InputError("generate: give prompts of at least one token and temperature >= 0")
        check_new_tokens(max_new_tokens, "generate: max_new_tokens")
        _check_ids("input_ids", np.concatenate(prompts), self.config)
        ends, (sampling, lines) = self._source.eos_token_ids(), self._source.sampling(temperature)
        for line in lines:
            if line not in self._said:
                say(line)
        self._said.update(lines)
        with jax.default_matmul_precision("highest"):
            return generate(self.llama, [p.tolist() for p in prompts], max_new_tokens, ends, sampling, seed)

    def _run(self, f: Callable[..., Any], input_ids: Any, attention_mask: Any, *rest: np.ndarray) -> Any:
        """Compute `f(graphdef, params, ids, positions, segments, *rest)` with exact float32 products."""
        ids = _integers(input_ids)
        segments = np.ones_like(ids) if attention_mask is None else _mask(attention_mask)
        if not ids.size or any(x.shape != ids.shape for x in (segments, *rest)):
            raise InputError(_SHOULD_BE)
        _check_ids("input_ids", ids, self.config)
        ids, segments = ids.astype(np.int32), segments.astype(np.int32)
        graphdef, state = nnx.split(self.llama)
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        with jax.default_matmul_precision("highest"):
            return _compute(f, graphdef, nnx.to_pure_dict(state), ids, positions, segments, *rest)


def _integers(value: Any, axes: int = 2) -> np.ndarray:
    """Return whole numbers in their own type, which may be wider than jax's. Raises InputError."""
    try:
        array = np.asarray(value)
    except ValueError as e:  # rows of several lengths
        raise InputError(_SHOULD_BE) from e
    if array.ndim != axes or array.dtype.kind not in "biuf" or not (array == np.trunc(array)).all():
        raise InputError(_SHOULD_BE)
    return array


def _mask(value: Any) -> np.ndarray:
    """Return an attention mask [B, T]. Raises InputError for other numbers than 0 and 1: a 2 would be a segment."""
    mask = _integers(value)
    other = np.setdiff1d(mask, [0, 1])
    if other.size:
        raise InputError(f"attention_mask: should be 1 for tokens and 0 for padding, found {other[0]}")
    return mask


def _check_ids(name: str, ids: np.ndarray, config: LlamaConfig) -> None:
    """Raise InputError for a token outside the vocabulary, which jax would clamp without an error."""
    if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        found = f"found {ids.min()} to {ids.max()}"
        raise InputError(f"{name}: tokens should be from 0 to {config.vocab_size - 1}, {found}")


def _targets(config: LlamaConfig, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the label that follows each token and its weight in the mean, [B, T] each."""
    labels = _integers(labels)
    _check_ids("labels", labels[labels != -100], config)
    targets = np.pad(labels[:, 1:].astype(np.int32), ((0, 0), (0, 1)), constant_values=-100)
    counts = targets != -100
    return targets, (counts / np.float32(counts.sum())).astype(np.float32)


def _logits(graphdef, params, ids, positions, segments):
    model = nnx.merge(graphdef, params)
    return model.logits(model(ids, positions, segments)[0])


def _hidden_states(graphdef, params, ids, positions, segments):
    states: list[jax.Array] = []
    last, _ = nnx.merge(graphdef, params)(ids, positions, segments, states=states)
    return (*states, last)


def _loss(graphdef, params, ids, positions, segments, targets, weights):
    model = nnx.merge(graphdef, params)
    hidden, _ = model(ids, positions, segments)
    return weighted_cross_entropy(hidden, model.head(), targets, weights, model.config.vocab_size)[0]


_gradients = jax.value_and_grad(_loss, argnums=1)
_compute = jax.jit(lambda f, *args: f(*args), static_argnums=(0, 1))
