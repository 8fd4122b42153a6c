"""Run the `tokenizers` library on a `tokenizer.json`, prepared as transformers 4.37 or 5 prepares it."""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from llama_jax.base.errors import InputError
from llama_jax.base.files import check_regular, parse_json, read_json_object, read_small, refuse_foreign_link
from llama_jax.data.added_tokens import Named, Token, as_json, named_tokens
from llama_jax.data.tokenizer_base import TOKENIZER_BYTES, Tokenizer, write_tokenizer_json

_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END = "<|endoftext|>"
# transformers 4.37's classes: the special tokens that the files need not name.
_CLASSES = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "GPT2Tokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END},
}
GROWTH = 64  # times that the normalizer may lengthen a text; 18 are Unicode's own
LONGEST = 256  # characters that it may put in front of a text
SECONDS, SPEED = 3.0, 30_000  # of the processor, and characters a second more: a hundredth of a core's usual speed
IDLE = 0.05  # seconds more for each core, whose thread waits in a loop for a while
_READ_BY_5 = (".json", ".model", ".txt", ".jinja", ".tiktoken")  # suffixes; it looks for more names than FILES has
Result = TypeVar("Result")
# The class by config.json's model_type, where no file names the class.
_CLASS_OF_MODEL = {"llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer"}


class FastTokenizer(Tokenizer):
    """Hold a tokenizer of the `tokenizers` library, whose post-processor adds bos and eos."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        named: Named,
        special: dict[str, str | None],
        tokenizer: tokenizers.Tokenizer,
    ):
        super().__init__(folder, config, named, special)
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @staticmethod
    def of_transformers_4(folder: Path, config: dict[str, Any]) -> "FastTokenizer":
        """Open a `tokenizer.json` as PreTrainedTokenizerFast and its subclasses in transformers 4.37 do."""
        path = folder / "tokenizer.json"
        data = read_small(path, TOKENIZER_BYTES)
        with _library(f"{path}: not a tokenizer"):
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        value = parse_json(data, str(path), repeats=True)
        _check_growth(value, path)
        in_json = value.get("added_tokens") or []
        named = named_tokens(folder, config, in_json)
        class_ = _class(folder, config)
        named.special = {**_CLASSES.get(class_, {}), **named.special}
        if tokenizer.padding and "pad_token" not in named.special:
            named.special["pad_token"] = tokenizer.padding["pad_token"]
        with _library(f"{path}: not a tokenizer"):
            _register(tokenizer, named)
        special = {key: None if token is None else str(token) for key, token in named.special.items()}
        opened = FastTokenizer(folder, config, named, special, tokenizer)
        if _CLASSES.get(class_) is _LLAMA:
            with _library(f"{path}: not a tokenizer"):
                opened._follow_add_bos()
        return opened

    @staticmethod
    def of_transformers_5(folder: Path, config: dict[str, Any]) -> "FastTokenizer":
        """Open the folder by the AutoTokenizer of the installed transformers 5, which knows the files' rules."""
        from transformers import AutoTokenizer

        named = named_tokens(folder, config)
        for path in sorted(folder.iterdir()):
            if not path.is_dir() and path.suffix in _READ_BY_5 and path.exists():
                refuse_foreign_link(folder, path)
                check_regular(path)
        path = folder / ("tokenizer.json" if (folder / "tokenizer.json").exists() else "tokenizer.model")
        with _library(f"{path}: transformers cannot open it"):
            opened = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer = opened.backend_tokenizer
            _check_growth(parse_json(tokenizer.to_str().encode(), str(path), repeats=True), path)
        special: dict[str, str | None] = {
            key: str(token) for key, token in opened.special_tokens_map.items() if isinstance(token, str)
        }
        return FastTokenizer(folder, config, named, special, tokenizer)

    def _follow_add_bos(self) -> None:
        """Add bos and eos by `add_bos_token`, `add_eos_token`, not by the file, as HF's LlamaTokenizer classes do."""
        parts, used = ["$A:0"], []
        for key, at in (("bos_token", 0), ("eos_token", 1)):
            token = self.special[key]
            if token and self.config.get(f"add_{key}", key == "bos_token"):
                parts.insert(at * len(parts), f"{token}:0")
                used.append((token, self.token_to_id(token)))
        pair = parts + [p.replace("$A:0", "$B:1").replace(":0", ":1") for p in parts]
        self._tokenizer.post_processor = TemplateProcessing(single=parts, pair=pair, special_tokens=used)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def added(self) -> dict[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _add(self, token: str) -> None:
        self._tokenizer.add_special_tokens([token])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = list(texts)
        return [e.ids for e in self._within_time(lambda: self._tokenizer.encode_batch_fast(texts), texts)]

    def encode_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
        texts = list(texts)
        for e in self._within_time(lambda: self._tokenizer.encode_batch(texts, add_special_tokens=False), texts):
            yield e.ids, e.offsets

    def _within_time(self, encode: Callable[[], Result], texts: list[str]) -> Result:
        """Return `encode()`, called in a thread, which is abandoned where it takes far longer than `texts` should.

        A regular expression of the file can take a time that is exponential in a text's length. Processor time counts,
        as a stopped or starved process makes no progress. Raises InputError.
        """
        results: list[Result] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(encode())
            except BaseException as e:  # of the Rust library, whose panics are no Exception
                errors.append(e)

        thread = threading.Thread(target=work, daemon=True)
        started = time.process_time()
        allowed = SECONDS + sum(map(len, texts)) / SPEED + IDLE * (os.cpu_count() or 1)
        thread.start()
        path = self.folder / "tokenizer.json"
        while thread.is_alive():
            thread.join(0.1)
            if thread.is_alive() and time.process_time() - started > allowed:
                raise InputError(
                    f"{path}: encoding {len(texts)} texts takes over {allowed:.0f} s: a regular expression in it may "
                    "explode; use the tokenizer of the model that it was made of"
                )
        for e in errors:
            with _library(f"{path}: the tokenizer fails"):
                raise e
        return results[0]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _save_tokens(self, folder: Path) -> None:
        write_tokenizer_json(folder / "tokenizer.json", self._tokenizer.to_str())
        self.config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")


@contextlib.contextmanager
def _library(what: str) -> Iterator[None]:
    """Turn the exceptions of `tokenizers` and transformers, which are of any class, into an InputError: `what`."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of the Rust library is no Exception
        raise InputError(f"{what} ({(str(e).splitlines() or [type(e).__name__])[0]})") from None


def _check_growth(value: dict[str, Any], path: Path) -> None:
    """Refuse a tokenizer that lengthens texts without bounds. Raises InputError."""
    model = value.get("model") or {}
    affixes = [model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    for part in ("normalizer", "decoder"):
        growth = 1.0
        for rule in _rules(value.get(part)):
            if rule.get("type") == "Prepend":
                affixes.append(rule.get("prepend") or "")
            if rule.get("type") == "Replace":
                pattern = rule.get("pattern") or {}
                shortest = max(1, len(pattern.get("String") or ""))  # a regular expression matches a character or more
                growth *= max(1.0, len(rule.get("content") or "") / shortest)
        if growth > GROWTH:
            raise InputError(
                f"{path}: its {part} makes texts up to {growth:.3g} times as long; use the tokenizer of the model that "
                "it was made of"
            )
    if longest := max((len(affix) for affix in affixes if len(affix) > LONGEST), default=0):
        raise InputError(f"{path}: puts {longest:,} characters beside each text or word; should be few")


def _rules(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the rules of a normalizer or decoder, those of sequences too."""
    if isinstance(part, dict):
        yield part
        for inner in part.get("normalizers") or part.get("decoders") or []:
            yield from _rules(inner)


def _class(folder: Path, config: dict[str, Any]) -> str:
    """Return the name of the class that transformers 4.37 chooses, without "Fast"."""
    path = folder / "config.json"
    model = read_json_object(path) if path.exists() else {}
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    return str(named or _CLASS_OF_MODEL.get(str(model.get("model_type")), "")).removesuffix("Fast")


def _register(tokenizer: tokenizers.Tokenizer, named: Named) -> None:
    """Add the named tokens in the order of transformers 4.37, runs of special and of plain tokens by turns.

    The library gives a new token the next free id, whatever id the files declare.
    """
    tokens: list[Token] = [token for _, token in sorted(named.added.items())]
    known = {str(token) for token in [*tokenizer.get_added_tokens_decoder().values(), *tokens]}
    # An AddedToken never equals a text of `known`: transformers registers it again, with its own flags.
    tokens += [t for t in named.all_special() if (t not in known if isinstance(t, str) else t not in tokens)]
    special = set(map(str, named.all_special()))

    def is_special(token: Token) -> bool:
        return str(token) in special or (isinstance(token, AddedToken) and token.special)

    # tokenizers 0.15 cuts a token out of the raw text if it was ever registered so, 0.23 by its last registration.
    raw = {token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.normalized}

    def as_0_15(token: Token) -> Token:
        if isinstance(token, AddedToken) and token.normalized and token.content in raw:
            return AddedToken(**{**as_json(token), "normalized": False})
        if isinstance(token, str) or not token.normalized:
            raw.add(str(token))
        return token

    for together, run in itertools.groupby(tokens, is_special):
        (tokenizer.add_special_tokens if together else tokenizer.add_tokens)([as_0_15(token) for token in run])
