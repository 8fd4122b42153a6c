"""Build the user's model as transformers defines it, one layer in memory at a time. The only room with torch's model.

transformers' own code makes masks, rotary angles, multipliers and logits: its forward pass runs with recorders in the
place of the layers. Weights are read from the folder by safetensors or torch itself, by HF's names.

Letters: B rows, T tokens, D model, V vocabulary.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError, one_line

INSTALL = "pip install 'llama_jax[parity]'"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_model.safetensors"
EXACT, FLOAT32, BF16, BF16_WEIGHTS = "float64", "float32", "bfloat16", "bfloat16 weights"


def import_torch() -> Any:
    """Return torch. Raises InputError where torch or transformers is missing."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise InputError(f"parity: needs {e.name}, which is not installed: {INSTALL}") from None
    transformers.utils.logging.set_verbosity_error()
    return torch


class Reference:
    """Hold the model of an HF folder without weights in memory. `layers` keeps its first layers only, None all.

    `rows` and `new_tokens` resize the vocabulary as stanford_alpaca does: the last `new_tokens` rows are the mean of
    the others. `without_padding_idx` gives the embedding of 4.37 after a resize. `adapter` is a PEFT folder, whose
    layers PEFT puts into the model; a matrix of the vocabulary that it holds replaces the folder's. A precision is
    EXACT (all in float64, the casts to float32 of norms and softmax too), FLOAT32, BF16 (autocast, float32 weights, as
    the Trainer's --bf16) or BF16_WEIGHTS. Raises InputError for a folder that transformers does not read.
    """

    def __init__(
        self,
        folder: Path,
        layers: int | None = None,
        rows: int | None = None,
        new_tokens: int = 0,
        without_padding_idx: bool = False,
        adapter: Path | None = None,
    ):
        self.torch = torch = import_torch()
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder = folder
        self._files = _tensor_files(folder)
        try:
            config = AutoConfig.from_pretrained(folder)
        except Exception as e:  # of many classes
            raise InputError(f"{folder}: transformers cannot read it: {one_line(e)}") from None
        if layers is not None:
            keep_layers(config, layers)
        self._rows, self._new_tokens = rows or config.vocab_size, new_tokens
        config.vocab_size = self._rows
        if without_padding_idx:
            config.pad_token_id = None
        config._attn_implementation = "eager"
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        self.model.train()
        self._adapter_files: dict[str, Path] = {}
        if adapter is not None:
            self._adapter_files = _insert(torch, self.model, adapter)
            self.model.eval()  # without dropout
        inner = self.model.model
        inner.rotary_emb = type(inner.rotary_emb)(config=config)
        self.config, self._layers, self._norm = config, list(inner.layers), inner.norm
        self._embedding, inner.norm = inner.embed_tokens, torch.nn.Identity()
        inner.layers = torch.nn.ModuleList(_recorder(torch) for _ in self._layers)
        self.tied = bool(config.tie_word_embeddings)

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    def inputs(self, ids: np.ndarray, mask: np.ndarray, precision: str, embedding: Any) -> tuple[Any, list[Any]]:
        """Return the input of the first layer, [B, T, D], and the further arguments of each layer, as transformers'
        forward pass makes them. `embedding` is of `embedding`."""
        torch, inner = self.torch, self.model.model
        inner.embed_tokens = embedding
        with self.computing(precision):
            numbers, seen = (torch.tensor(array, dtype=torch.int64) for array in (ids, mask))
            inner(input_ids=numbers, attention_mask=seen, use_cache=False)
        recorders = list(inner.layers)
        arguments = [dict(recorder.arguments) for recorder in recorders]
        if precision == EXACT:
            positions = torch.arange(ids.shape[1], dtype=torch.float64)
            arguments = [_moved(torch, a, inner.rotary_emb.inv_freq, positions) for a in arguments]
        return recorders[0].x, arguments

    def rotation(self, positions: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return cosines and sines [T, H/2] of the positions from 0, and the largest frequency, by a fresh module:
        that of `dynamic` keeps what it has seen."""
        torch = self.torch
        module = type(self.model.model.rotary_emb)(config=self.config)
        cos, sin = module(torch.zeros(1), torch.arange(positions)[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].numpy(), sin[0, :, :half].numpy(), float(module.inv_freq.max())

    def embedding(self, precision: str) -> Any:
        """Return the input embedding with its weights."""
        return self._filled(self._embedding, "model.embed_tokens.", precision)

    @contextlib.contextmanager
    def layer(self, i: int, precision: str) -> Iterator[Any]:
        """Give layer i with its weights, which are dropped at the end."""
        layer = self._filled(self._layers[i], f"model.layers.{i}.", precision)
        try:
            yield layer
        finally:
            self.drop(layer)

    def norm(self, precision: str) -> Any:
        """Return the final norm with its weights."""
        return self._filled(self._norm, "model.norm.", precision)

    def logits(self, hidden: Any, precision: str, head: Any) -> Any:
        """Return the logits [B, T, V] of normed hidden states by the model's own forward pass. `head` is of `head`."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        model = self.model
        inner, linear = model.model, model.lm_head
        try:
            model.model = _answer(self.torch, BaseModelOutputWithPast(last_hidden_state=hidden))
            model.lm_head = head
            with self.computing(precision):
                return model(input_ids=None, inputs_embeds=hidden, use_cache=False).logits
        finally:
            model.model, model.lm_head = inner, linear

    def head(self, precision: str) -> Any:
        """Return the head with its weights."""
        weight = self.tensor(EMBEDDING if self.tied else HEAD)
        return _linear(self.torch, self._as(weight, precision))

    def whole_logits(self, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        """Return the logits [B, T, V] in FLOAT32, and EXACT ones, of a padded batch. Raises InputError."""
        states: dict[str, Any] = {}
        arguments: dict[str, list[Any]] = {}
        with self.torch.no_grad():
            for kind in (FLOAT32, EXACT):
                embedding = self.embedding(kind)
                states[kind], arguments[kind] = self.inputs(ids, mask, kind, embedding)
                self.drop(embedding)
            for i in range(self.layers):
                for kind in states:
                    with self.layer(i, kind) as layer:
                        states[kind] = self.call(layer, states[kind], arguments[kind][i], kind)
            found = []
            for kind, state in states.items():
                norm = self.norm(kind)
                with self.computing(kind):
                    hidden = norm(state)
                found.append(self.logits(hidden, kind, self.head(kind)).numpy())
        return found

    def loss(self, logits: Any, labels: np.ndarray) -> Any:
        """Return the mean loss over label tokens: transformers' own, or in float64 its definition."""
        torch = self.torch
        wanted = torch.tensor(labels, dtype=torch.int64)
        if logits.dtype == torch.float64:
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        return self.model.loss_function(logits=logits, labels=wanted, vocab_size=self._rows)

    def tensor(self, name: str) -> Any:
        """Return a tensor of the folder in its own type, a vocabulary matrix with the rows asked for. Raises
        InputError for a tensor that is not there."""
        if (own := saved_name(EMBEDDING if self.tied and name == HEAD else name)) in self._adapter_files:
            return _read_safetensors(self._adapter_files[own], own)
        name = name.replace(".base_layer.", ".")
        names = [name, name.removeprefix("model.")]  # a saved LlamaModel lacks the prefix
        if self.tied and name == EMBEDDING:
            names.append(HEAD)  # some folders hold a tied matrix under this name alone
        found = next((key for key in names if key in self._files), None)
        if found is None:
            raise InputError(f"{self.folder}: transformers' model needs the tensor {name}, which the folder lacks")
        value = self._read(found)
        return self._resized(value) if name in (EMBEDDING, HEAD) else value

    def state(self, values: np.ndarray, precision: str) -> Any:
        """Return values as a tensor, rounded to the type that a state between layers has in a precision."""
        kind = {EXACT: self.torch.float64, BF16_WEIGHTS: self.torch.bfloat16}.get(precision, self.torch.float32)
        return self.torch.tensor(values).to(kind)

    def computing(self, precision: str) -> Any:
        """Return a context in which modules compute in a precision."""
        if precision == EXACT:
            return in_float64(self.torch)
        return self.torch.autocast("cpu", self.torch.bfloat16, enabled=precision == BF16)

    def call(self, layer: Any, x: Any, arguments: dict[str, Any], precision: str) -> Any:
        """Return the output [B, T, D] of a layer in the type of its input."""
        with self.computing(precision):
            out = layer(x, **arguments)
        return (out[0] if isinstance(out, tuple) else out).to(x.dtype)

    def _filled(self, module: Any, prefix: str, precision: str) -> Any:
        state = {name: self._as(self.tensor(prefix + name), precision) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        return module

    def drop(self, module: Any) -> None:
        """Drop the weights of a module."""
        module.to("meta")
        for parameter in module.parameters():
            parameter.grad = None

    def _as(self, value: Any, precision: str) -> Any:
        kinds = {EXACT: self.torch.float64, BF16_WEIGHTS: self.torch.bfloat16}
        if value.dtype == self.torch.float64:  # rounded, as both programs read a file
            value = value.to(self.torch.float32)
        return value.to(kinds.get(precision, self.torch.float32))

    def _resized(self, value: Any) -> Any:
        torch, rows, old = self.torch, self._rows, len(value)
        if rows == old and not self._new_tokens:
            return value
        value, kept = value.float(), min(old, rows - self._new_tokens)
        return torch.cat([value[:kept], value[:kept].mean(0, keepdim=True).expand(rows - kept, -1)])

    def _read(self, name: str) -> Any:
        path = self.folder / self._files[name]
        if path.suffix == ".bin":
            return self.torch.load(path, map_location="cpu", weights_only=True, mmap=True)[name].detach()
        return _read_safetensors(path, name)


def _read_safetensors(path: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def saved_name(name: str) -> str:
    """Return the name in an adapter's file of a tensor in PEFT's model, as PEFT saves it."""
    name = name.removesuffix(".weight") if "lora_magnitude_vector" in name else name
    return f"base_model.model.{name.replace('.default', '')}"


def _insert(torch: Any, model: Any, folder: Path) -> dict[str, Path]:
    """Put the layers of a PEFT folder into a model without weights, and return the file of each of its tensors.
    Raises InputError."""
    try:
        from peft import PeftConfig, inject_adapter_in_model
    except ImportError:
        raise InputError(f"parity: needs peft, which is not installed: {INSTALL}") from None
    from safetensors import safe_open

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.modules_to_save = None  # whole matrices are read in the place of the model's own
        with torch.device("meta"):
            inject_adapter_in_model(config, model)
        with safe_open(folder / ADAPTER, "pt") as file:
            return dict.fromkeys(file.keys(), folder / ADAPTER)
    except Exception as e:  # of many classes
        raise InputError(f"{folder}: PEFT cannot read it: {one_line(e)}") from None


def keep_layers(config: Any, layers: int) -> None:
    """Leave the first layers in a config of transformers."""
    config.num_hidden_layers = layers
    for key in ("layer_types", "no_rope_layers"):
        if getattr(config, key, None):
            setattr(config, key, getattr(config, key)[:layers])


def _tensor_files(folder: Path) -> dict[str, str]:
    """Return the file of each tensor of an HF folder, as transformers finds them. Raises InputError."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.exists():
            if suffix == "bin":
                torch = import_torch()
                names = torch.load(single, map_location="meta", weights_only=True).keys()
            else:
                from safetensors import safe_open

                with safe_open(single, "pt") as file:
                    names = file.keys()
            return dict.fromkeys(names, single.name)
        if index.exists():
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    raise InputError(
        f"{folder}: parity compares with transformers, which reads HF folders with safetensors; make one by "
        f"python convert_torch_to_flax.py --to_hf, or by transformers' save_pretrained (found: "
        f"{', '.join(sorted(os.listdir(folder))[:4]) if folder.is_dir() else 'no folder'})"
    )


def _recorder(torch: Any) -> Any:
    class Recorder(torch.nn.Module):
        """Record a layer's input and arguments, and return the input."""

        def forward(self, hidden_states: Any, **arguments: Any) -> Any:
            keep = ("attention_mask", "position_ids", "position_embeddings", "cache_position")
            self.x = hidden_states
            self.arguments = {key: value for key, value in arguments.items() if key in keep}
            return hidden_states

    return Recorder()


def _answer(torch: Any, output: Any) -> Any:
    class Answer(torch.nn.Module):
        """Return an output that is known already."""

        def forward(self, *args: Any, **arguments: Any) -> Any:
            return output

    return Answer()


def _linear(torch: Any, weight: Any) -> Any:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.load_state_dict({"weight": weight}, assign=True)
    return linear


def _moved(torch: Any, arguments: dict[str, Any], inv_freq: Any, positions: Any) -> dict[str, Any]:
    """Turn each rotary angle by 2^-23 of itself, a unit in the last place of a float32 frequency.

    torch's powers are off by such a unit at times, and so may frequencies of two correct programs differ. The exact
    pass has angles that are off as well, so that the measured error of float32 includes theirs.
    """
    cos, sin = arguments["position_embeddings"]
    turn = (positions[:, None] * inv_freq.double()[None]).repeat(1, 2) * 2.0**-23
    return {**arguments, "position_embeddings": (cos - sin * turn, sin + cos * turn)}


@contextlib.contextmanager
def in_float64(torch: Any) -> Iterator[None]:
    """Let the names torch.float32, torch.float and Tensor.float mean float64: transformers casts norms, softmax, angles
    and loss by them."""
    kept = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept
