"""Open the tokenizer of an HF folder: ids equal those of HF's tokenizer of the chosen version of transformers.

For 4.37 a `tokenizer.json` runs in `tokenizers` and a bare `tokenizer.model` in sentencepiece, as stanford_alpaca's
`use_fast=False` does. For 5, transformers opens the folder.
"""

from pathlib import Path

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object
from llama_jax.data.tokenizer_base import (
    FILES,
    TEMPLATES,
    Tokenizer,
    check_tokenizer_files,
    copy_tokenizer,
    read_text,
    write_tokenizer_json,
)
from llama_jax.data.tokenizer_fast import FastTokenizer
from llama_jax.data.tokenizer_slow import SentencePieceTokenizer

__all__ = [
    "FILES",
    "TEMPLATES",
    "Tokenizer",
    "check_tokenizer_files",
    "copy_tokenizer",
    "open_tokenizer",
    "read_text",
    "write_tokenizer_json",
]


def open_tokenizer(folder: Path, hf_compat: str = "4.37") -> Tokenizer:
    """Open the tokenizer of an HF folder as transformers "4.37" or "5" does. Raises InputError."""
    check_tokenizer_files(folder)
    path = folder / "tokenizer_config.json"
    config = read_json_object(path) if path.exists() else {}
    has_json = (folder / "tokenizer.json").exists()
    if not has_json and not (folder / "tokenizer.model").exists():
        raise InputError(f"{folder}: neither tokenizer.json nor tokenizer.model is in this folder")
    if hf_compat == "5":
        return FastTokenizer.of_transformers_5(folder, config)
    return FastTokenizer.of_transformers_4(folder, config) if has_json else SentencePieceTokenizer(folder, config)
