"""Read the tokens that a tokenizer folder adds to its vocabulary, by the rules of transformers 4.37.

An `added_tokens_decoder` in `tokenizer_config.json` is complete. Without that key, `special_tokens_map.json`,
`added_tokens.json` and the `added_tokens` of `tokenizer.json` count too; the later file wins.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object
from llama_jax.data.records import check_string

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")

# stanford_alpaca's special tokens for a tokenizer that lacks them.
DEFAULTS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}

Token = str | AddedToken
_DIGITS = 9  # of a token's id


@dataclass
class Named:
    """Hold the tokens that the files name.

    `added` are the tokens by declared id, `special` the tokens by HF's key (None: null in the file), `more` the
    `additional_special_tokens`.
    """

    added: dict[int, AddedToken]
    special: dict[str, Token | None]
    more: list[Token]

    def all_special(self) -> list[Token]:
        """Return the special tokens in transformers' order, each text once."""
        tokens: dict[str, Token] = {}
        for token in [*map(self.special.get, SPECIAL), *self.more]:
            if token is not None and str(token):
                tokens.setdefault(str(token), token)
        return list(tokens.values())


def named_tokens(folder: Path, config: dict[str, Any], in_json: Iterable[dict[str, Any]] = ()) -> Named:
    """Return the tokens that the folder's files name.

    `config` holds `tokenizer_config.json`, `in_json` the `added_tokens` of `tokenizer.json`. Raises an InputError that
    names the file.
    """
    path = folder / "tokenizer_config.json"
    special = {key: _token(config[key], path, key) for key in SPECIAL if key in config}
    more = _tokens(config.get("additional_special_tokens"), path)
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise InputError(f"{path}: added_tokens_decoder should be an object")
        for i, value in decoder.items():
            token = _token(value, path, f"added token {i!r}")
            if not isinstance(token, AddedToken):
                raise InputError(f"{path}: added token {i!r} should be an object with 'content', not {value!r}")
            added[_id(i, token.content, path)] = token
        described = {token.content: token for token in added.values()}
    else:
        path = folder / "special_tokens_map.json"
        named = read_json_object(path) if path.exists() else {}
        special |= {key: _token(named[key], path, key, special=True) for key in SPECIAL if key in named}
        more += _tokens(named.get("additional_special_tokens"), path, special=True)
        path = folder / "added_tokens.json"
        texts = {str(token) for token in [*special.values(), *more] if token}
        for text, i in (read_json_object(path) if path.exists() else {}).items():
            is_special = text in texts
            _check_text(text, path, f"the token {text!r}")
            added[_id(i, text, path)] = AddedToken(text, normalized=not is_special, special=is_special)
        described = {}
        for value in in_json:
            described[value["content"]] = added[value["id"]] = _added(value)
    special = {key: described.get(str(token), token) if token else token for key, token in special.items()}
    return Named(added, special, more)


def as_json(token: AddedToken) -> dict[str, Any]:
    """Return a token as `added_tokens_decoder` describes it."""
    return {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}


def _token(value: Any, path: Path, name: str, special: bool = False) -> Token | None:
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        if wrong := [flag for flag in FLAGS if not isinstance(value.get(flag, False), bool)]:
            raise InputError(f"{path}: {name}: {wrong[0]} {value[wrong[0]]!r} should be true or false")
        _check_text(value["content"], path, name)
        return _added({**value, "special": True} if special else value)
    if isinstance(value, str):
        _check_text(value, path, name)
        return value
    if value is None:
        return None
    raise InputError(f"{path}: {name} {value!r} should be a string, an object with 'content', or null")


def _tokens(values: Any, path: Path, special: bool = False) -> list[Token]:
    name = "additional_special_tokens"
    if not isinstance(values, list | None):
        raise InputError(f"{path}: {name} {values!r} should be a list of tokens")
    tokens = [_token(value, path, f"a token of {name}", special) for value in values or []]
    return [token for token in tokens if token is not None]


def _added(value: dict[str, Any]) -> AddedToken:
    return AddedToken(value["content"], **{flag: value[flag] for flag in FLAGS if flag in value})


def _check_text(text: str, path: Path, name: str) -> None:
    if problem := check_string(text, name):
        raise InputError(f"{path}: {problem}; correct the token's text")


def _id(i: Any, token: str, path: Path) -> int:
    text = i if isinstance(i, str) else repr(i)[:40]
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        raise InputError(
            f"{path}: the added token {token[:40]!r} has the id {text[:40]!r}, should be an integer below 10**{_DIGITS}"
        )
    return int(text)
