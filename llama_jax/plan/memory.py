"""Estimate by arithmetic the bytes that a step takes on a device, beside the train state and the gradients."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.model.config import LlamaConfig
from llama_jax.model.llama import RunOptions
from llama_jax.model.quantized import quantized_bytes
from llama_jax.model.remat import REMAT
from llama_jax.training.loss import CHUNK


def activation_bytes(config: LlamaConfig, run: RunOptions, remat: str, mesh: Mesh) -> int:
    """Return the bytes that a token leaves on its device for the backward pass, over all layers."""
    compute, stream = (jnp.dtype(t).itemsize for t in (run.compute_dtype or run.param_dtype, run.param_dtype))
    ways, D, H = mesh.shape["tensor"], config.hidden_size, config.head_dim
    kv_heads, ffn = -(-config.num_key_value_heads // ways) * H, -(-config.intermediate_size // ways)
    heads = kv_heads * (config.num_attention_heads // config.num_key_value_heads)
    named = {"q": heads, "k": kv_heads, "v": kv_heads, "attention": heads, "o_proj": D}
    named |= {"gate_proj": ffn, "up_proj": ffn}
    kept = REMAT[remat].kept
    width = sum(named.values() if kept is None else (named[name] for name in kept))
    if kept is not None:
        inputs_of = 0
    elif run.fp8 and run.lora is None:  # of all projections, in fp8
        inputs_of = 2 * D + heads + ffn
    else:  # of down_proj; adapters keep it in the compute type
        inputs_of = compute * ffn
    of_layers = config.num_hidden_layers * (stream * D + compute * width + inputs_of)
    if kept is not None or run.lora is None or not run.lora.dropout:
        return of_layers
    inputs = {"self_attn.o_proj": heads, "mlp.down_proj": ffn}
    dropped = sum(inputs.get(projection, D) for (_, projection), _ in run.lora.ranks)
    return of_layers + (compute + 1) * dropped  # an input without the dropped elements, and their mask


def score_bytes(config: LlamaConfig, run: RunOptions, mesh: Mesh, remat: str, *, tokens: int, row: int) -> int:
    """Return the bytes of plain attention's scores, of `tokens` in rows of `row`.

    Without recomputation each layer keeps its softmax, in float32 and rounded. Else a single layer holds scores,
    softmax and their gradient.
    """
    scores = tokens * row * -(-config.num_attention_heads // mesh.shape["tensor"])
    if remat == "none":
        return scores * config.num_hidden_layers * (4 + _itemsize(run))
    return scores * (3 * 4 + _itemsize(run))


def logit_bytes(config: LlamaConfig, run: RunOptions, mesh: Mesh, *, tokens: int) -> int:
    """Return the bytes of the logits of a chunk, of at most `tokens` tokens, in float32, and of their gradient."""
    return min(CHUNK, tokens * config.vocab_size // mesh.shape["tensor"]) * (4 + _itemsize(run))


def weight_bytes(config: LlamaConfig, run: RunOptions, mesh: Mesh) -> int:
    """Return the bytes of weights that a step makes: those gathered for two layers, the head in the compute type, and
    two matrices that are dequantized, or summed with their adapter for DoRA's norms."""
    D, F, ways, itemsize = config.hidden_size, config.intermediate_size, mesh.shape["tensor"], _itemsize(run)
    layer = (config.num_parameters - 2 * config.vocab_size * D) // (config.num_hidden_layers * ways)
    head, matrix = config.vocab_size * D // ways * itemsize, D * F // ways
    of_weight = quantized_bytes(run.quantization.abstract((F, D))) / (F * D) if run.quantization else itemsize
    # Halves hold the head in the compute type already.
    whole_head = mesh.size > 1 or (run.lora is not None and itemsize != run.param_dtype.itemsize)
    gathered = int(2 * layer * of_weight) if mesh.size > 1 else 0
    dequantized = 2 * matrix * itemsize if run.quantization else 0
    summed = 2 * matrix * 4 if run.lora and run.lora.use_dora else 0
    return gathered + whole_head * head + dequantized + summed


def _itemsize(run: RunOptions) -> int:
    """Return the bytes of a number of the compute type."""
    return np.dtype(run.compute_dtype or run.param_dtype).itemsize
