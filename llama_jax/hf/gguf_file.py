"""GGUF, llama.cpp's file format: the config, the tensors and the tokenizer as Hugging Face would have them.

Sources: the package `gguf` (keys, block formats) and llama.cpp: `conversion/llama.py` interleaves the rows of q and k
and bakes in llama 3's rope factors, `src/llama-vocab.cpp` says what the tokenizer's metadata mean.
"""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llama_jax.errors import InputError
from llama_jax.hf.tensor import Index, Tensor

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that add nothing to what the tensors say; experts, for one, are refused by the names of their tensors.
_IGNORED = {"vocab_size", "tensor_data_layout", "expert_count", "expert_used_count", "rope.scaling.finetuned"}
_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}

_F = GGMLQuantizationType
_NATIVE = {_F.F32: np.dtype(np.float32), _F.F16: np.dtype(np.float16), _F.BF16: np.dtype(ml_dtypes.bfloat16)}
_CHUNK = 1 << 20  # elements to dequantize at a time, as gguf's `dequantize` holds its result twice

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the patterns that cut the text, each applied within the pieces that the one before has left.
_SPLITS = {
    **{name: [_LLAMA3] for name in ("llama-bpe", "llama3", "llama-v3")},
    **{name: [r"\p{N}", _GPT2] for name in ("smollm", "starcoder", "refact")},
    "gpt-2": [_GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns (the config in the form of HF's config.json, the tensors by HF's names with HF's shapes).

    F32, F16 and BF16 tensors keep their type, quantized ones are read as float32; q's and k's rows come back in HF's
    order. A tensor that LLaMA lacks (an expert's, say) keeps its GGUF name, for the caller to refuse. Raises
    `InputError` for a file that is not a whole GGUF file of architecture llama, and for metadata or rope factors that
    change the mathematics in a way that the config cannot tell.
    """
    metadata, sources = _open(path)
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise InputError(f"{path}: general.architecture is {architecture!r}, not 'llama'; give a LLaMA model")
    config = _make_config(path, metadata, sources)
    head_counts = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, source in sources.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        layer, part, kind = match.groups() if match else ("", "", "")
        hf_name = f"model.layers.{layer}.{_LAYER[part]}.{kind}" if part in _LAYER else _TOP.get(name, name)
        if name != "rope_freqs.weight":  # that one is config["rope_scaling"] now
            tensors[hf_name] = _make_tensor(path, source, head_counts.get(part))
    return config, tensors


def _open(path: str | Path) -> tuple[dict[str, Any], dict[str, ReaderTensor]]:
    """The metadata, and the tensors by GGUF name: mapped into memory, not read."""
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}; give the path of a GGUF file that can be read") from problem
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as problem:
        raise InputError(f"{path}: not a whole GGUF file ({problem!r}); download or copy it again") from problem
    if reader.byte_order != "I":
        raise InputError(f"{path}: big-endian; convert it with gguf-convert-endian FILE little")
    if metadata.get("split.count", 1) > 1:
        raise InputError(f"{path}: one part of several; join them with llama-gguf-split --merge FIRST_PART FILE")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _make_config(path: str | Path, metadata: dict[str, Any], sources: dict[str, ReaderTensor]) -> dict[str, Any]:
    keys = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}

    def take(key: str, default: Any = None) -> Any:
        value = keys.pop(key, default)
        if value is None or isinstance(value, list):
            raise InputError(f"{path}: metadata llama.{key} must be one value, not {value}; convert the model again")
        return _shortest(value) if isinstance(value, float) else value

    hidden, heads = take("embedding_length"), take("attention.head_count")
    rotary = take("rope.dimension_count", keys.get("attention.key_length", hidden // max(heads, 1)))
    head_dim = take("attention.key_length", rotary)
    if not rotary == head_dim == take("attention.value_length", head_dim):
        raise InputError(f"{path}: rope.dimension_count, attention.key_length and value_length must be one number")
    embedding = sources.get("token_embd.weight")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        **{f"{key}_token_id": metadata.get(f"tokenizer.ggml.{_TOKEN_IDS[key]}") for key in ("bos", "eos", "pad")},
    }
    scaling = {"rope_type": "linear"} | {name: take(key) for key, name in _SCALING.items() if key in keys}
    if scaling["rope_type"] not in ("none", "linear", "yarn"):
        raise InputError(f"{path}: rope scaling {scaling['rope_type']!r} is not supported; use a model without it")
    if scaling["rope_type"] != "none" and scaling.get("factor", 0) not in (0, 1):
        config["rope_scaling"] = scaling
    if "rope_freqs.weight" in sources:
        config["rope_scaling"] = _recover_llama3(path, config, sources["rope_freqs.weight"].data)
    if unknown := sorted(keys.keys() - _IGNORED):
        raise InputError(f"{path}: metadata {'llama.' + unknown[0]!r} is not supported: it may change the mathematics")
    return config


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _recover_llama3(path: str | Path, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The rope_scaling whose factors, by which llama.cpp divides the frequencies, these are [head_dim / 2].

    Between wavelengths of 1/4 of the original context and the whole of it the factor goes smoothly from 1 to `factor`
    (the formula: `generate_extra_tensors` of llama.cpp's `conversion/llama.py`). The file keeps no more than the
    factors, so they are tried against the bounds that every llama 3 has.
    """
    low, high, original, factor = 1.0, 4.0, 8192, round(float(np.max(factors)), 3)
    frequencies = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if config["rope_scaling"] or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(f"{path}: rope_freqs.weight is not llama3's scaling; use the model's HF folder instead")
    bounds = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **bounds}


def _make_tensor(path: str | Path, source: ReaderTensor, heads: int | None) -> Tensor:
    """The tensor still in its file; with `heads`, its rows (q's or k's) are put in HF's order."""
    kind, shape = source.tensor_type, tuple(int(size) for size in reversed(source.shape))
    dtype, (block, size) = _NATIVE.get(kind, np.dtype(np.float32)), GGML_QUANT_SIZES[kind]
    packed = source.data.view(np.uint8)  # [..., bytes of a row]
    if heads and shape[0] % (2 * heads):
        raise InputError(f"{path}: {heads} heads cannot share {source.name!r}'s {shape[0]} rows; convert it again")

    def unpack(part: np.ndarray) -> np.ndarray:
        return part.view(dtype) if kind in _NATIVE else dequantize(part, kind)

    try:
        unpack(np.zeros(size, np.uint8))
    except NotImplementedError as problem:
        raise InputError(f"{path}: gguf cannot read {source.name!r}'s type {kind.name}; quantize to Q8_0") from problem

    def read(index: Index = ()) -> np.ndarray:
        """Reads only the rows and, along the last dimension, the blocks that the index touches."""
        order = np.arange(shape[0])  # order[HF's row] is GGUF's row
        if heads:  # GGUF alternates between the rows of a head's two halves, which RoPE turns in pairs
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

    return Tensor(shape, dtype, str(path), read)


def write_gguf_tokenizer(path: str | Path, folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if any, chat_template.jinja.

    `folder` is made if need be. Both of LLaMA's tokenizers become a tokenizer.json:
    - 'gpt2', byte-level BPE: the file's merges, the text cut first as tokenizer.ggml.pre says.
    - 'llama', sentencepiece's BPE: merges that follow the scores. No tokenizer.model, since transformers 5 reads one
      otherwise than sentencepiece does: it adds no '▁' to a text that begins with a space.
    Control tokens are special, and what follows an added token is encoded as a text of its own, with its own '▁', as
    llama.cpp and HF's `legacy` tokenizers do. Raises `InputError` for other tokenizers and damaged metadata.
    """
    metadata, _ = _open(path)
    settings = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    model, pre = settings.get("model"), settings.get("pre", "")
    if model == "llama":  # llama.cpp's defaults
        settings = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | settings
    refused = {
        "model": model not in ("gpt2", "llama"),
        "pre": model == "gpt2" and pre not in _SPLITS,
        "remove_extra_whitespaces": settings.get("remove_extra_whitespaces", False),
        "precompiled_charsmap": "precompiled_charsmap" in settings,
    }
    for key in (key for key, unknown in refused.items() if unknown):
        value = repr(settings.get(key))[:40]
        raise InputError(f"{path}: tokenizer.ggml.{key} {value} is not supported; use the tokenizer of the HF folder")
    try:
        tokens, types = settings["tokens"], settings["token_type"]
        ids = {key: settings[name] for key, name in _TOKEN_IDS.items() if name in settings}
        names = {f"{key}_token": tokens[id_] for key, id_ in ids.items()}
        tokenizer = _make_byte_level(settings) if model == "gpt2" else _make_sentencepiece(settings)
        if not len(tokens) == len(types) == tokenizer.get_vocab_size():
            raise ValueError("a token occurs twice, or has no type")
    except Exception as problem:  # `tokenizers` raises no narrower class
        raise InputError(f"{path}: damaged tokenizer ({problem!r}); use the tokenizer of the HF folder") from problem

    special = {i for i, type_ in enumerate(types) if type_ in (TokenType.CONTROL, TokenType.UNKNOWN)} | {*ids.values()}
    plain = {i for i, type_ in enumerate(types) if type_ == TokenType.USER_DEFINED} - special
    added = [AddedToken(tokens[i], special=i in special, normalized=False) for i in sorted(special | plain)]
    tokenizer.add_tokens(added)
    # Where the file is silent, llama.cpp adds a bos token for sentencepiece and for llama 3.
    add_bos = settings.get("add_bos_token", model == "llama" or _SPLITS[pre] == _SPLITS["llama-bpe"])
    add = {"bos": bool(add_bos and "bos" in ids), "eos": bool(settings.get("add_eos_token") and "eos" in ids)}
    before, after = ([names[f"{key}_token"]] if add[key] else [] for key in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=[(tokens[id_], id_) for id_ in set(ids.values())]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    config |= {f"add_{key}_token": value for key, value in add.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
    if chat_template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _make_byte_level(settings: dict[str, Any]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(settings["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in settings["merges"]]
    # llama 3's vocabulary has words that no merge leads to: a whole piece that is a token stays whole.
    splits = _SPLITS[settings["pre"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=splits == _SPLITS["llama-bpe"]))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _make_sentencepiece(settings: dict[str, Any]) -> Tokenizer:
    tokens, types = settings["tokens"], settings["token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    text = {token for token, type_ in zip(tokens, types, strict=True) if type_ == TokenType.NORMAL}
    # sentencepiece merges whichever two neighbours make the piece of the best score, the leftmost first among equals
    # (runs of spaces have equal scores): there the longer left part is what has grown from the left.
    pairs = [(token[:cut], token[cut:]) for token in text for cut in range(1, len(token))]
    merges = [pair for pair in pairs if text.issuperset(pair)]
    merges.sort(key=lambda pair: (-settings["scores"][vocab["".join(pair)]], -len(pair[0]), -len(pair[1]), pair))
    unknown, has_bytes = tokens[settings["unknown_token_id"]], TokenType.BYTE in types
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    prefix = settings.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(decoder if prefix else decoder[:-1])
    return tokenizer
