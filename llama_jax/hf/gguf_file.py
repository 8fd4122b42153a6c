"""Read GGUF, llama.cpp's file format: the config and the tensors in Hugging Face's form.

Sources: the package `gguf` (keys, block formats) and llama.cpp. Its `conversion/` interleaves the rows of q and k for
some architectures and stores llama 3's rope factors; `src/llama-vocab.cpp` defines the tokenizer's metadata.
"""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llama_jax.base.errors import InputError
from llama_jax.base.files import check_regular
from llama_jax.hf.gguf_header import BigEndian, GgufTensor, read_header
from llama_jax.hf.tensor import Index, Tensor
from llama_jax.model.config import FAMILIES

# llama.cpp's architectures, which bear the names of HF's `model_type`; Mistral is a llama. True where llama.cpp rotates
# neighbours, and its converter therefore interleaves the rows of q and k.
INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False, "granite": True, "smollm3": True}
SCALARS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that repeat facts of the tensors; experts, for example, are refused by the names of their tensors.
_IGNORED = {"vocab_size", "tensor_data_layout", "expert_count", "expert_used_count", "rope.scaling.finetuned"}
_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
# The texts of tokens that llama.cpp ends a generation at, among them its fill-in-the-middle pad, repository and file.
_ENDS = frozenset(
    """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> [e~[
    <\uff5cend\u2581of\u2581sentence\uff5c>
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
    """.split()
)
_END_IDS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")

_F = GGMLQuantizationType
_NATIVE = {_F.F32: np.dtype(np.float32), _F.F16: np.dtype(np.float16), _F.BF16: np.dtype(ml_dtypes.bfloat16)}
_CHUNK = 1 << 20  # elements to dequantize at a time, as gguf's `dequantize` holds its result twice


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (the config in the form of HF's config.json, the tensors by HF's names with HF's shapes).

    F32, F16 and BF16 tensors keep their type; quantized tensors are read as float32. The rows of q and k are returned
    in HF's order. A tensor unknown to LLaMA (an expert's, say) keeps its GGUF name, for the caller to refuse. Raises
    `InputError` for a file that is not a whole GGUF file of a known architecture. The same error refuses metadata or
    rope factors that change the mathematics and that the config cannot express.
    """
    metadata, sources = open_gguf(path)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in INTERLEAVED:
        known = ", ".join(INTERLEAVED)
        raise InputError(f"{path}: general.architecture is {repr(architecture)[:60]}; give a model of one of {known}")
    try:
        config = _make_config(path, architecture, metadata, sources)
    except (ArithmeticError, LookupError, TypeError, ValueError) as problem:  # values of other types and sizes
        raise InputError(f"{path}: damaged metadata ({repr(problem)[:200]}); download or copy it again") from problem
    head_counts = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if not INTERLEAVED[architecture]:
        head_counts = {}
    tensors = {}
    for name, source in sources.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        layer, part, kind = match.groups() if match else ("", "", "")
        hf_name = f"model.layers.{layer}.{_LAYER[part]}.{kind}" if part in _LAYER else _TOP.get(name, name)
        if name != "rope_freqs.weight":  # already in config["rope_scaling"]
            tensors[hf_name] = _make_tensor(path, source, head_counts.get(part))
    return config, tensors


def open_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return the metadata, and the tensors by GGUF name, mapped into memory and not read. Raises InputError."""
    check_regular(Path(path))
    try:
        metadata, tensors = read_header(path)
    except BigEndian:
        raise InputError(f"{path}: big-endian; convert it with gguf-convert-endian FILE little") from None
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}; give the path of a GGUF file that can be read") from problem
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as problem:
        raise InputError(f"{path}: not a whole GGUF file ({problem!r}); download or copy it again") from problem
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(f"{path}: one part of several; join them with llama-gguf-split --merge FIRST_PART FILE")
    return metadata, {tensor.name: tensor for tensor in tensors}


def end_tokens(metadata: dict[str, Any]) -> list[int]:
    """Return the ids that end a generation by llama.cpp's rule, the eos token first: ids of the metadata, and texts.

    Its exceptions are followed too: <|end|> between the channels of a harmony answer, </s> beside <|tool_response>.
    """
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise TypeError("tokenizer.ggml.tokens should be a list of strings")
    eos = metadata.get("tokenizer.ggml.eos_token_id", 2 if metadata.get("tokenizer.ggml.model") == "llama" else None)
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _END_IDS]
    ends = {i: tokens[i] for i in [eos, *named] if isinstance(i, int) and 0 <= i < len(tokens)}
    ends |= {i: token for i, token in enumerate(tokens) if token in _ENDS}
    texts, excepted = {*ends.values()}, set()
    if texts & {"<|return|>", "<|flush|>"} and texts & {"<|call|>", "<|calls|>"}:
        excepted.add("<|end|>")
    if "<|tool_response>" in texts:
        excepted.add("</s>")
    ends = {i: token for i, token in ends.items() if token not in excepted}
    return sorted(ends, key=lambda i: (i != eos, i))


def _make_config(
    path: str | Path, architecture: str, metadata: dict[str, Any], sources: dict[str, GgufTensor]
) -> dict[str, Any]:
    own = f"{architecture}."
    keys = {key.removeprefix(own): value for key, value in metadata.items() if key.startswith(own)}

    def take(key: str, default: Any = None) -> Any:
        value = keys.pop(key, default)
        if value is None or isinstance(value, list):
            raise InputError(
                f"{path}: metadata {own}{key} must be one value, not {repr(value)[:60]}; convert the model again"
            )
        return _shortest(value) if isinstance(value, float) else value

    hidden, heads = take("embedding_length"), take("attention.head_count")
    rotary = take("rope.dimension_count", keys.get("attention.key_length", hidden // max(heads, 1)))
    head_dim = take("attention.key_length", rotary)
    if not rotary == head_dim == take("attention.value_length", head_dim):
        raise InputError(f"{path}: rope.dimension_count, attention.key_length and value_length must be one number")
    embedding = sources.get("token_embd.weight")
    config = {
        "architectures": [FAMILIES[architecture].architecture],
        "model_type": architecture,
        "vocab_size": int(embedding.shape[-1]) if embedding else len(metadata.get("tokenizer.ggml.tokens", ())),
        "hidden_size": hidden,
        "intermediate_size": take("feed_forward_length"),
        "num_hidden_layers": take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": take("attention.layer_norm_rms_epsilon"),
        "rope_theta": take("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "max_position_embeddings": take("context_length"),
        "attention_bias": any(re.search(r"\.attn_(q|k|v|output)\.bias$", name) for name in sources),
        "mlp_bias": any(re.search(r"\.ffn_(gate|up|down)\.bias$", name) for name in sources),
        "tie_word_embeddings": "output.weight" not in sources,
        "torch_dtype": "float32",
        **{f"{key}_token_id": metadata.get(f"tokenizer.ggml.{TOKEN_IDS[key]}") for key in ("bos", "eos", "pad")},
    }
    if ends := end_tokens(metadata):
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if architecture == "granite":
        # As llama.cpp reads a file without the key; HF's default for the scores is 1.
        config |= dict.fromkeys(SCALARS.values(), 1.0) | {"attention_multiplier": head_dim**-0.5}
        config |= {name: take(key) for key, name in SCALARS.items() if key in keys}
        if not keys.get("rope.scaling.finetuned", True):
            raise InputError(
                f"{path}: metadata 'granite.rope.scaling.finetuned' is false: no rotation is not supported"
            )
    scaling = {"rope_type": "linear"} | {name: take(key) for key, name in _SCALING.items() if key in keys}
    if scaling["rope_type"] not in ("none", "linear", "yarn"):
        raise InputError(f"{path}: rope scaling {scaling['rope_type']!r} is not supported; use a model without it")
    if scaling["rope_type"] != "none" and scaling.get("factor", 0) not in (0, 1):
        config["rope_scaling"] = scaling
    if factors := sources.get("rope_freqs.weight"):
        if factors.tensor_type != _F.F32 or not factors.data.size:
            raise InputError(f"{path}: rope_freqs.weight should be of the type F32; convert the model again")
        config["rope_scaling"] = _recover_llama3(path, config, factors.data.view(np.float32))
    if unknown := sorted(keys.keys() - _IGNORED):
        raise InputError(f"{path}: metadata {own + unknown[0]!r} is not supported: it may change the mathematics")
    return config


def _shortest(value: float) -> float:
    """Return the shortest decimal that rounds to this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _recover_llama3(path: str | Path, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Return the rope_scaling that gives `factors` [head_dim / 2], by which llama.cpp divides the frequencies.

    The file holds only the factors, so they are compared with those of the bounds that every llama 3 has.
    """
    low, high, original, factor = 1.0, 4.0, 8192, round(float(np.max(factors)), 3)
    expected = llama3_factors(config["rope_theta"], config["head_dim"], factor, low, high, original)
    if config["rope_scaling"] or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(f"{path}: rope_freqs.weight is not llama3's scaling; use the model's HF folder instead")
    bounds = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **bounds}


def llama3_factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """Return the factors [head_dim / 2] by which llama.cpp divides the frequencies of llama3's scaling.

    They rise smoothly from 1 to `factor` between wavelengths of `original / high` and `original / low` positions.
    Source: `generate_extra_tensors` of llama.cpp's `conversion/llama.py`.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _make_tensor(path: str | Path, source: GgufTensor, heads: int | None) -> Tensor:
    """Describe a tensor in its file; with `heads`, reading puts the rows (of q or k) in HF's order."""
    kind, shape = source.tensor_type, tuple(int(size) for size in reversed(source.shape))
    dtype, (block, size) = _NATIVE.get(kind, np.dtype(np.float32)), GGML_QUANT_SIZES[kind]
    packed = source.data  # [..., bytes of a row]
    if heads and shape[0] % (2 * heads):
        raise InputError(f"{path}: {heads} heads cannot share {source.name!r}'s {shape[0]} rows; convert it again")

    def unpack(part: np.ndarray) -> np.ndarray:
        return part.view(dtype) if kind in _NATIVE else dequantize(part, kind)

    try:
        unpack(np.zeros(size, np.uint8))
    except NotImplementedError as problem:
        raise InputError(f"{path}: gguf cannot read {source.name!r}'s type {kind.name}; quantize to Q8_0") from problem

    def read(index: Index = ()) -> np.ndarray:
        """Read only the rows and, along the last dimension, the blocks that the index covers."""
        order = np.arange(shape[0])  # order[HF's row] is GGUF's row
        if heads:  # GGUF interleaves the rows of a head's two halves, which RoPE rotates in pairs
            order = order.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        if len(shape) == 1:  # a norm or a bias: small
            return np.array(unpack(packed)[order][index])
        rows, *middle, columns = index + (slice(None),) * (len(shape) - len(index))
        order = order[rows]
        start, stop, _ = columns.indices(shape[-1])
        first = start // block
        blocks = packed[(slice(None), *middle, slice(first * size, -(-stop // block) * size))]
        out = np.empty((len(order), *blocks.shape[1:-1], max(stop - start, 0)), dtype)
        step = max(1, _CHUNK // max(1, out[:1].size))
        for row in range(0, len(order) if out.size else 0, step):
            part = unpack(np.ascontiguousarray(blocks[order[row : row + step]]))
            out[row : row + step] = part[..., start - first * block : stop - first * block]
        return out

    return Tensor(shape, dtype, file=str(path), read=read)
