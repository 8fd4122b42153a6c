"""Estimate by arithmetic the bytes that a step takes on a device, beside the train state and the gradients."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.model.config import LlamaConfig
from llama_jax.model.llama import RunOptions
from llama_jax.model.quantized import quantized_bytes
from llama_jax.model.remat import REMAT
from llama_jax.training.loss import CHUNK

# The inputs of projections that adapters share, besides attention's output, which is kept for attention.
_SHARED = {"q_proj": "normed", "k_proj": "normed", "v_proj": "normed"}
_SHARED |= {"gate_proj": "normed again", "up_proj": "normed again", "down_proj": "activated"}


def least_activation_bytes(config: LlamaConfig, run: RunOptions, remat: str, mesh: Mesh) -> int:
    """Return the bytes that a token must leave on its device for the backward pass, over all layers: each layer's input
    and what `Remat.kept` names. Of `none` these are all names; compilers keep other values beside them."""
    named, kept = _named(config, mesh), REMAT[remat].kept
    width = sum(named[name] for name in (named if kept is None else kept))
    return config.num_hidden_layers * (_stream(config, run) + _itemsize(run) * width)


def activation_bytes(config: LlamaConfig, run: RunOptions, remat: str, mesh: Mesh) -> int:
    """Return the bytes that a token leaves on its device for the backward pass, over all layers. Values that DoRA keeps
    are left out, and the products with matrices A, which are thin."""
    if REMAT[remat].kept is not None:
        return least_activation_bytes(config, run, remat, mesh)
    compute, named, layers, D = _itemsize(run), _named(config, mesh), config.num_hidden_layers, config.hidden_size
    # The inputs of both norms, of attention and of the activation. The second norm's input has o_proj's output in it.
    of_layer = 2 * _stream(config, run) + compute * (sum(named.values()) - named["o_proj"])
    heads, ffn = named["attention"], named["up_proj"]
    # Gradients of weights need the inputs of projections. In fp8 these are kept in fp8, and the activation's output in
    # the compute type too.
    if run.lora is None:
        return layers * (of_layer + (2 * D + heads + ffn + compute * ffn if run.fp8 else compute * (2 * D + ffn)))
    adapted = [(layer, projection.split(".")[1]) for (layer, projection), _ in run.lora.ranks]
    if run.lora.dropout:  # each adapter's input after dropout; of the masks, XLA keeps two a layer
        sizes = {"o_proj": heads, "down_proj": ffn}
        inputs = compute * sum(sizes.get(name, D) for _, name in adapted) + layers * 2 * D
    else:
        shared = {(layer, _SHARED[name]) for layer, name in adapted if name in _SHARED}
        inputs = compute * sum(ffn if name == "activated" else D for _, name in shared)
    return layers * of_layer + inputs


def layer_bytes(config: LlamaConfig, run: RunOptions, remat: str, mesh: Mesh) -> int:
    """Return the most bytes of a token that the backward pass of a layer makes beside `activation_bytes`: what it
    computes again, and the gradients of the residual stream and of the MLP's three projections."""
    compute, ffn = _itemsize(run), _named(config, mesh)["up_proj"]
    everything, layers = activation_bytes(config, run, "none", mesh), config.num_hidden_layers
    again = 0 if remat == "none" else everything - activation_bytes(config, run, remat, mesh)
    parts = compute * ffn if run.lora else 0  # gate_proj's output beside the sum with the adapter's
    return _stream(config, run) + 3 * compute * ffn + parts + -(-again // layers)


def _stream(config: LlamaConfig, run: RunOptions) -> int:
    """Return the bytes of a token in the residual stream."""
    return jnp.dtype(run.param_dtype).itemsize * config.hidden_size


def _named(config: LlamaConfig, mesh: Mesh) -> dict[str, int]:
    """Return the elements of a token that a device has of each tensor that `Remat.kept` may name."""
    ways, H = mesh.shape["tensor"], config.head_dim
    kv_heads, ffn = -(-config.num_key_value_heads // ways) * H, -(-config.intermediate_size // ways)
    heads = kv_heads * (config.num_attention_heads // config.num_key_value_heads)
    named = {"q": heads, "k": kv_heads, "v": kv_heads, "attention": heads, "o_proj": config.hidden_size}
    return named | {"gate_proj": ffn, "up_proj": ffn}


def score_bytes(config: LlamaConfig, run: RunOptions, mesh: Mesh, remat: str, *, tokens: int, row: int) -> int:
    """Return the bytes of plain attention's scores, of `tokens` in rows of `row`.

    Without recomputation each layer keeps its softmax, in float32 and rounded. Else a single layer holds scores,
    softmax and their gradient.
    """
    scores = tokens * row * -(-config.num_attention_heads // mesh.shape["tensor"])
    if remat == "none":
        return scores * config.num_hidden_layers * (4 + _itemsize(run))
    return scores * (3 * 4 + _itemsize(run))


def step_bytes(
    config: LlamaConfig, run: RunOptions, mesh: Mesh, remat: str, *, tokens: int, segments: int, gradients: int
) -> int:
    """Return the most bytes at a moment of a step, of `tokens` tokens and `gradients` bytes, plain attention's scores
    left out. cuDNN keeps statistics of the softmax for each token of a row, once for each of the row's `segments`.

    The moment is one of four: the loss; the last layer's backward pass, while the activations of all layers are kept;
    the first layer's, with the gradients of all others; the end, with all gradients.
    """
    layers, kept = config.num_hidden_layers, tokens * activation_bytes(config, run, remat, mesh)
    if remat != "full":
        kept += tokens * 4 * segments * layers * _named(config, mesh)["attention"] // config.head_dim
    layer = tokens * layer_bytes(config, run, remat, mesh)
    head = config.vocab_size * config.hidden_size // mesh.shape["tensor"] * _itemsize(run)
    # The input of the last norm, its output, and the gradient of that.
    hidden = tokens * (_stream(config, run) + 2 * config.hidden_size * _itemsize(run))
    # The head's gradient, or its copy in the compute type below adapters.
    last = kept + head + max(layer, hidden + logit_bytes(config, run, mesh, tokens=tokens))
    first = (kept + (layers - 1) * gradients) // layers + layer
    return max(last, first, gradients) + weight_bytes(config, run, mesh)


def logit_bytes(config: LlamaConfig, run: RunOptions, mesh: Mesh, *, tokens: int) -> int:
    """Return the bytes of the logits of two chunks, which XLA computes at the same time, and of their gradients.
    `tokens` bounds a chunk."""
    return min(CHUNK, tokens * config.vocab_size // mesh.shape["tensor"]) * 4 * _itemsize(run)


def weight_bytes(config: LlamaConfig, run: RunOptions, mesh: Mesh) -> int:
    """Return the bytes of weights that a step makes.

    On several devices, two layers and the head are gathered. Two matrices are dequantized, or summed with their adapter
    for DoRA's norms. In fp8, XLA transposes the values of all layers before the backward pass; on several devices this
    was not seen, and is left out.
    """
    D, F, ways, itemsize = config.hidden_size, config.intermediate_size, mesh.shape["tensor"], _itemsize(run)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * D
    matrices = (config.num_parameters - embeddings) // ways
    head, matrix = config.vocab_size * D // ways * itemsize, D * F // ways
    of_weight = quantized_bytes(run.quantization.abstract((F, D))) / (F * D) if run.quantization else itemsize
    gathered = int(2 * matrices // config.num_hidden_layers * of_weight) + head if mesh.size > 1 else 0
    dequantized = 2 * matrix * itemsize if run.quantization else 0
    summed = 2 * matrix * 4 if run.lora and run.lora.use_dora else 0
    transposed = matrices if run.fp8 and run.lora is None and mesh.size == 1 else 0
    return gathered + dequantized + summed + transposed


def _itemsize(run: RunOptions) -> int:
    """Return the bytes of a number of the compute type."""
    return np.dtype(run.compute_dtype or run.param_dtype).itemsize
