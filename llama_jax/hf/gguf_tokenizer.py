"""Convert the tokenizer in a GGUF file's metadata to the tokenizer files of an HF folder.

Source: llama.cpp's `src/llama-vocab.cpp` defines the metadata.
"""

import json
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llama_jax.base.errors import InputError
from llama_jax.data.tokenizer import write_tokenizer_json
from llama_jax.hf.gguf_file import TOKEN_IDS, end_tokens, open_gguf

LONGEST = 1024  # characters of a token; all its cuts in two are looked up
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OTHER = "give the tokenizer of the model's HF folder by --tokenizer_name DIR"
_QWEN2 = _LLAMA3.replace("{1,3}", "")  # llama.cpp does not normalize to NFC first, as Qwen's tokenizer.json does
# The patterns that split the text, each applied to the pieces of the previous one, and their names in llama.cpp, which
# are the values of tokenizer.ggml.pre.
_LLAMA3_NAMES = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split()
_SPLITS = {
    **{name: [_LLAMA3] for name in [*_LLAMA3_NAMES, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"]},
    **{
        name: [_QWEN2]
        for name in "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2".split()
    },
    **{
        name: [r"\p{N}", _GPT2]
        for name in "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2".split()
    },
    **{
        name: [_GPT2]
        for name in (
            "gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion "
            "granite-docling"
        ).split()
    },
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}


def write_gguf_tokenizer(path: str | Path, folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if any, chat_template.jinja.

    `folder` is created if missing. Both of LLaMA's tokenizers become a tokenizer.json:
    - 'gpt2', byte-level BPE: the file's merges, after splitting the text by tokenizer.ggml.pre.
    - 'llama', sentencepiece's BPE: merges in the order of the scores. A tokenizer.model would not do: transformers 5,
      unlike sentencepiece, adds no '▁' to a text that begins with a space.
    Control tokens are special. The text after an added token is encoded on its own, with its own '▁', as in llama.cpp
    and HF's `legacy` tokenizers. Raises `InputError` for other tokenizers and damaged metadata.
    """
    metadata, _ = open_gguf(path)
    settings = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    model, pre = (str(settings.get(key, ""))[:60] for key in ("model", "pre"))
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
        raise InputError(f"{path}: tokenizer.ggml.{key} {value} is not supported; {_OTHER}")
    try:
        tokens, types = settings["tokens"], settings["token_type"]
        if longest := max((len(token) for token in tokens if len(token) > LONGEST), default=0):
            raise ValueError(f"a token of {longest:,} characters")
        ids = {key: settings[name] for key, name in TOKEN_IDS.items() if name in settings}
        names = {f"{key}_token": tokens[id_] for key, id_ in ids.items()}
        tokenizer = _make_byte_level(settings) if model == "gpt2" else _make_sentencepiece(settings)
        if any(type(i) is not int or i < 0 for i in ids.values()):
            raise ValueError(f"ids {ids}")
        ends = end_tokens(metadata)  # special whatever their type, as in llama.cpp
        if not len(tokens) == len(types) == tokenizer.get_vocab_size():
            raise ValueError("a token occurs twice or has no type")
    except Exception as problem:  # `tokenizers` raises no narrower class
        raise InputError(f"{path}: damaged tokenizer ({problem!r}); {_OTHER}") from problem

    special = {i for i, type_ in enumerate(types) if type_ in (TokenType.CONTROL, TokenType.UNKNOWN)} | {*ids.values()}
    special |= {*ends}
    plain = {i for i, type_ in enumerate(types) if type_ == TokenType.USER_DEFINED} - special
    added = [AddedToken(tokens[i], special=i in special, normalized=False) for i in sorted(special | plain)]
    tokenizer.add_tokens(added)
    # Without the key, llama.cpp adds a bos token for sentencepiece and for llama 3.
    add_bos = settings.get("add_bos_token", model == "llama" or pre in _LLAMA3_NAMES)
    add = {"bos": bool(add_bos and "bos" in ids), "eos": bool(settings.get("add_eos_token") and "eos" in ids)}
    before, after = ([names[f"{key}_token"]] if add[key] else [] for key in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=[(tokens[id_], id_) for id_ in set(ids.values())]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer_json(folder / "tokenizer.json", tokenizer.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    config |= {f"add_{key}_token": value for key, value in add.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
    chat_template = metadata.get("tokenizer.chat_template")
    if chat_template and isinstance(chat_template, str):
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _make_byte_level(settings: dict[str, Any]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(settings["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in settings["merges"]]
    # llama 3's vocabulary has words that no merges produce: a whole piece that is a token stays whole.
    pre = settings["pre"]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3_NAMES))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _make_sentencepiece(settings: dict[str, Any]) -> Tokenizer:
    tokens, types = settings["tokens"], settings["token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    text = {token for token, type_ in zip(tokens, types, strict=True) if type_ == TokenType.NORMAL}
    # sentencepiece merges the two neighbours that make the piece of the best score, the leftmost among equals. Equal
    # scores occur in runs of spaces, where merging from the left makes the longer left part: hence the order below.
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
