"""Write a model as a GGUF file in float32, for llama.cpp to compute from token ids: the file has no tokenizer.

Sources: the package `gguf` (keys, names of tensors) and llama.cpp's `conversion/`, as in `gguf_file`, the reader. Files
of its converter (0c1e570, --outtype f32) of two llamas had the same tensors and the same keys of the architecture.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map

from llama_jax.base.errors import InputError
from llama_jax.hf.gguf_file import INTERLEAVED, SCALARS, llama3_factors
from llama_jax.hf.source import Source
from llama_jax.hf.tensor import Tensor
from llama_jax.model.config import LlamaConfig, RopeConfig

_LLAMA3 = ("llama", "granite")  # llama.cpp (of xllamacpp 2026.10) reads the scaling's factors of these alone
_NO_ROPE_STEP = 4  # of SmolLM3's layers llama.cpp leaves each fourth unrotated


def write_gguf(source: Source, path: Path, longest: int) -> None:
    """Write the model of a source, for texts of `longest` tokens at most; one tensor at a time is in memory.

    Raises InputError for a model that llama.cpp would read as another one, such as a rotation that it does not have.
    """
    config = source.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    if problem := _unknown(config, architecture, longest):
        raise InputError(f"llama.cpp has no {problem}")
    writer = GGUFWriter(path, architecture)
    _add_keys(writer, config, architecture)
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if not INTERLEAVED[architecture]:
        heads = {}
    arrays: list[Callable[[], np.ndarray]] = []

    def add(name: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) * 4)
        arrays.append(read)

    for hf_name, tensor in source.tensors.items():
        name = names.get_name(hf_name, (".weight", ".bias"))
        if name is None:
            raise InputError(f"llama.cpp has no name for {hf_name}")
        add(name, tensor.shape, partial(_rows, tensor, heads.get(name.split(".")[-2])))
    if (rope := config.rope).rope_type == "llama3":
        factors = _factors(rope, config.head_dim)
        add("rope_freqs.weight", factors.shape, lambda: factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for read in arrays:
        writer.write_tensor_data(np.ascontiguousarray(read(), np.float32))
    writer.close()


def _rows(tensor: Tensor, heads: int | None) -> np.ndarray:
    """Return a tensor; with `heads`, the rows of q or k in llama.cpp's order, a head's two halves by turns."""
    rows = tensor.read(())
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape) if heads else rows


def _unknown(config: LlamaConfig, architecture: str, longest: int) -> str:
    """Return what of a model llama.cpp would pass over, "" where nothing. llama.cpp itself refuses unknown tensors."""
    rope, window = config.rope, config.sliding_window
    rotated = tuple(bool((i + 1) % _NO_ROPE_STEP) for i in range(config.num_hidden_layers))
    expected = rotated if architecture == "smollm3" and not all(rotated) else ()
    plain = RopeConfig(rope.rope_type, rope.rope_theta, rope.original_max_position_embeddings, rope.factor)
    if architecture not in INTERLEAVED:
        return f"model_type {config.model_type}"
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act} for {architecture}"
    if window and window < longest:
        return f"sliding_window for {architecture}, and texts of {longest} tokens reach past {window}"
    if config.rope_layers != expected:
        return "choice of no_rope_layers: each fourth layer of smollm3 is unrotated"
    if rope.rope_type not in ("default", "linear", "yarn", *(("llama3",) if architecture in _LLAMA3 else ())):
        return f"rope type {rope.rope_type} for {architecture}"
    # Its Python package replaces the betas of a file, and its attention factor is that of the paper.
    betas = {"beta_fast": (None, 32.0), "beta_slow": (None, 1.0)}
    for key, value in vars(rope).items() if rope.rope_type == "yarn" else ():
        if value not in betas.get(key, (getattr(plain, key),)):
            return f"{key} {value} of the rope type yarn"
    return ""


def _add_keys(writer: GGUFWriter, config: LlamaConfig, architecture: str) -> None:
    """Add the metadata, all that `_unknown` has not refused."""
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, name in SCALARS.items() if architecture == "granite" else ():
        writer.add_float32(f"{architecture}.{key}", getattr(config, name))
    rope = config.rope
    writer.add_rope_freq_base(rope.rope_theta)
    if rope.rope_type in ("linear", "yarn"):
        assert rope.factor is not None
        writer.add_rope_scaling_type(RopeScalingType(rope.rope_type))
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)


def _factors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the factors of llama3's scaling in float32."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    return llama3_factors(rope.rope_theta, head_dim, rope.factor, low, high, original).astype(np.float32)
