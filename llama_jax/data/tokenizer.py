"""Turn text into token ids, by sentencepiece for a bare `tokenizer.model`, by `tokenizers` for a `tokenizer.json`.

Ids equal those of HF's tokenizer, with the bos token as its configuration demands. Special tokens have HF's names, and
`save` writes the files of an HF folder.
"""

import itertools
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object, write_json, write_text

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# The files of a tokenizer in an HF folder.
FILES = (
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "chat_template.jinja chat_template.json vocab.json merges.txt"
).split()

_STRIP = ("lstrip", "rstrip", "normalized", "single_word")

# stanford_alpaca's defaults for special tokens that a tokenizer lacks.
DEFAULTS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


class Tokenizer(ABC):
    """Define the tokenizer that training and generation use; `open_tokenizer` makes instances.

    `special` maps HF's names (`eos_token`, ...) to the tokens' texts or None.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder, self.config = folder, config
        self.special: dict[str, str | None] = {key: _text(config.get(key)) for key in SPECIAL}

    @abstractmethod
    def __len__(self) -> int:
        """Count all ids, added tokens included."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, with the bos token, computed on all cores."""

    @abstractmethod
    def encode_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
        """Yield the ids of each text, with no token added at either end, and the characters [start, end) of each id.

        Each byte token of a character has the character's span; an inserted space in front has the next token's.
        """

    @abstractmethod
    def special_texts(self) -> set[str]:
        """Return the texts of all special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, without special tokens."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, None where the token does not exist."""

    @abstractmethod
    def _add(self, token: str) -> None:
        """Make the text a special token, with a new id where the text has none."""

    def save(self, folder: Path) -> None:
        """Write files from which transformers loads the same tokenizer, added tokens included."""
        copy_tokenizer(self.folder, folder)
        self._save_tokens(folder)
        write_json(folder / "tokenizer_config.json", self.config)
        write_json(folder / "special_tokens_map.json", {k: v for k, v in self.special.items() if v is not None})

    @abstractmethod
    def _save_tokens(self, folder: Path) -> None:
        """Write the files that added tokens change, and add the tokens to `config`."""

    def add_missing_special_tokens(self) -> int:
        """Set missing special tokens as stanford_alpaca does, to `DEFAULTS`, and return the number of new ids."""
        before = len(self)
        for key, token in DEFAULTS.items():
            if self.special[key] is None:
                self._add(token)
                self.special[key] = token
                self.config[key] = token
        return len(self) - before

    def warnings(self) -> list[str]:
        """Describe problems of the eos token that make a model generate without end."""
        eos, found = self.special["eos_token"], []
        if not eos or self.eos_token_id is None:
            found.append(f"the tokenizer's eos_token is {eos!r}: no eos is trained, so the model will not stop")
            return found
        for other in ("unk_token", "pad_token", "bos_token"):
            if self.special[other] == eos:
                found.append(f"the tokenizer's eos_token {eos!r} is also its {other}: the model may not learn to stop")
        return found

    @property
    def eos_token(self) -> str | None:
        return self.special["eos_token"]

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    def _id(self, key: str) -> int | None:
        token = self.special[key]
        return self.token_to_id(token) if token else None


class SentencePieceTokenizer(Tokenizer):
    """Follow HF's slow LlamaTokenizer: `[bos] + encode(text)`, after splitting the text at special tokens."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        super().__init__(folder, config)
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        path = folder / "tokenizer.model"
        try:
            proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]  # defined at run time
            self._start = SentencePieceProcessor(model_proto=proto.SerializeToString())
            proto.normalizer_spec.add_dummy_prefix = False
            self._inner = SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as e:  # protobuf and sentencepiece raise classes of their own
            raise InputError(f"{path}: not a sentencepiece model ({str(e).splitlines()[0]})") from None
        pieces = self._start
        for key, i in (("bos_token", pieces.bos_id()), ("eos_token", pieces.eos_id()), ("unk_token", pieces.unk_id())):
            if key not in config and i >= 0:
                self.special[key] = config[key] = pieces.id_to_piece(i)
        # Without "legacy": false, HF lets every part between special tokens begin with the dummy space.
        if config.get("legacy", True) is not False:
            self._inner = self._start
        self._added: dict[str, int] = {}
        for i, token in _added_tokens(folder, config):
            if i >= pieces.get_piece_size():
                self._added[token] = i
        for special in self.special.values():
            if special:
                self._add(special)
        marked = [
            t for t in config.get("added_tokens_decoder", {}).values() if isinstance(t, dict) and t.get("special")
        ]
        more = config.get("additional_special_tokens")
        self._more_special = {_text(t) for t in [*marked, *(more if isinstance(more, list) else [])]}

    def __len__(self) -> int:
        return self._start.get_piece_size() + len(self._added)

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        i = self._start.piece_to_id(token)
        return i if self._start.id_to_piece(i) == token else None

    def _add(self, token: str) -> None:
        if self.token_to_id(token) is None:
            self._added[token] = len(self)

    def special_texts(self) -> set[str]:
        return {t for t in [*self.special.values(), *self._more_special] if t and self.token_to_id(t) is not None}

    def _split(self, texts: Sequence[str]) -> list[list[str]]:
        """Split each text at special and added tokens; the tokens are at odd places of the result."""
        longest_first = sorted({t for t in [*self.special.values(), *self._added] if t}, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(re.escape(t) for t in longest_first) + ")")
        return [pattern.split(text) for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        start = [self.bos_token_id] if self.config.get("add_bos_token", True) else []
        end = [self.eos_token_id] if self.config.get("add_eos_token", False) else []
        split = self._split(texts)
        heads = self._start.encode([parts[0] for parts in split], num_threads=os.cpu_count() or 1)
        result = []
        for parts, head in zip(split, heads, strict=True):
            ids = [*start, *head]
            for k, part in enumerate(parts[1:]):
                if k % 2 == 0:
                    ids.append(self.token_to_id(part))
                elif part:
                    ids.extend(self._inner.encode(part))
            result.append(ids + end)
        return result

    def encode_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
        from sentencepiece.sentencepiece_pb2 import SentencePieceText  # type: ignore[attr-defined]  # defined at run time

        for parts in self._split(texts):
            ids: list[int] = []
            offsets: list[tuple[int, int]] = []
            at = 0
            for k, part in enumerate(parts):
                if k % 2:
                    ids.append(self.token_to_id(part))  # type: ignore[arg-type]  # never None: split off as a token
                    offsets.append((at, at + len(part)))
                elif part:
                    inner = self._inner if k else self._start
                    pieces = SentencePieceText.FromString(inner.encode(part, out_type="serialized_proto")).pieces
                    # All but the last byte of a character, and an inserted space, have an empty surface.
                    ends = at + np.cumsum([len(piece.surface) for piece in pieces])
                    starts = np.concatenate([[at], ends[:-1]])
                    ids += [piece.id for piece in pieces]
                    offsets += zip(starts.tolist(), ends[np.searchsorted(ends, starts, "right")].tolist(), strict=True)
                at += len(part)
            yield ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        skipped = {self.token_to_id(t) for t in self.special_texts()}
        added = {i: t for t, i in self._added.items()}
        # Padded rows of the model's embedding are no tokens and have no text.
        pieces = range(self._start.get_piece_size())
        known = [int(i) for i in ids if i not in skipped and (i in pieces or i in added)]
        runs = itertools.groupby(known, added.get)
        return "".join(token * len([*run]) if token else self._start.decode([*run]) for token, run in runs)

    def _save_tokens(self, folder: Path) -> None:
        known = {self.token_to_id(t): t for t in self.special.values() if t} | {i: t for t, i in self._added.items()}
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        special, decoder = self.special_texts(), self.config.setdefault("added_tokens_decoder", {})
        for i, token in sorted(known.items()):
            decoder.setdefault(str(i), {"content": token, **flags, "special": token in special})
        self.config.setdefault("tokenizer_class", "LlamaTokenizer")
        if self._added:
            write_json(folder / "added_tokens.json", self._added)


class FastTokenizer(Tokenizer):
    """Run a `tokenizer.json` by the `tokenizers` library, whose post-processor adds the bos token."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        of_llama = str(config.get("tokenizer_class", "")).startswith(("LlamaTokenizer", "CodeLlamaTokenizer"))
        if of_llama:  # the defaults of HF's classes, where the files name no token
            config = {key: DEFAULTS[key] for key in ("bos_token", "eos_token", "unk_token")} | config
        super().__init__(folder, config)
        import tokenizers

        path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the Rust library raises plain Exception
            raise InputError(f"{path}: not a tokenizer ({str(e).splitlines()[0]})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._register()
        if of_llama:
            self._follow_add_bos()

    def _follow_add_bos(self) -> None:
        """Add bos and eos by `add_bos_token`, `add_eos_token`, not by the file, as HF's LlamaTokenizer classes do."""
        from tokenizers.processors import TemplateProcessing

        parts, used = ["$A:0"], []
        for key, at in (("bos_token", 0), ("eos_token", 1)):
            token = self.special[key]
            if token and self.config.get(f"add_{key}", key == "bos_token"):
                parts.insert(at * len(parts), f"{token}:0")
                used.append((token, self.token_to_id(token)))
        pair = parts + [p.replace("$A:0", "$B:1").replace(":0", ":1") for p in parts]
        self._tokenizer.post_processor = TemplateProcessing(single=parts, pair=pair, special_tokens=used)

    def _register(self) -> None:
        """Register special tokens, so that a text is split at them, as in HF.

        Flags come from `added_tokens_decoder`, else from the file, and last from the object that names the token.
        LLaMA's old objects have `normalized`, which would hide the eos in `Hello</s>`."""
        import tokenizers

        if (decoder := self.config.get("added_tokens_decoder")) is not None:
            described = [t for t in decoder.values() if isinstance(t, dict)]
            flags = {t.get("content"): {k: t.get(k, False) for k in _STRIP} for t in described}
        else:
            known = self._tokenizer.get_added_tokens_decoder().values()
            flags = {t.content: {k: getattr(t, k) for k in _STRIP} for t in known}
        for key in SPECIAL:
            if token := self.special[key]:
                given = self.config.get(key)
                named = {k: given.get(k, False) for k in _STRIP} if isinstance(given, dict) else {}
                added = tokenizers.AddedToken(token, **{"normalized": False, **flags.get(token, named)}, special=True)
                self._tokenizer.add_special_tokens([added])

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _add(self, token: str) -> None:
        self._tokenizer.add_special_tokens([token])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts))]

    def encode_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
        for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False):
            yield e.ids, e.offsets

    def special_texts(self) -> set[str]:
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _save_tokens(self, folder: Path) -> None:
        write_tokenizer_json(folder / "tokenizer.json", self._tokenizer.to_str())
        self.config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        decoder = self.config.get("added_tokens_decoder")
        if decoder is not None:
            flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
            for token in self.special.values():
                if token and (i := self.token_to_id(token)) is not None:
                    decoder.setdefault(str(i), {"content": token, **flags})


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer of an HF folder. Raises InputError where the folder has none."""
    path = folder / "tokenizer_config.json"
    config = _read(path)
    if "added_tokens_decoder" not in config:  # with the key, transformers ignores the other file
        named = _read(folder / "special_tokens_map.json")
        config |= {key: named[key] for key in SPECIAL if key in named}
    if not isinstance(config.get("added_tokens_decoder", {}), dict):
        raise InputError(f"{path}: added_tokens_decoder should be an object")
    if (folder / "tokenizer.json").exists():
        return FastTokenizer(folder, config)
    if (folder / "tokenizer.model").exists():
        return SentencePieceTokenizer(folder, config)
    raise InputError(f"{folder}: neither tokenizer.json nor tokenizer.model is in this folder")


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copy the tokenizer's files unchanged, and remove other tokenizer files from the folder."""
    if source and source.resolve() == folder.resolve():
        return
    for name in FILES:
        if source and (source / name).exists():
            shutil.copyfile(source / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def write_tokenizer_json(path: Path, serialized: str) -> None:
    """Write a serialized tokenizer with merges as "a b", which `tokenizers` before 0.20 needs.

    Merges stay lists, the newer form, if a part contains a space.
    """
    value = json.loads(serialized)
    merges = value["model"].get("merges", [])
    if not any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
        value["model"]["merges"] = [" ".join(merge) for merge in merges]
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False))


def _read(path: Path) -> dict[str, Any]:
    """Read a file that may name special tokens; return {} where the file is missing."""
    config = read_json_object(path) if path.exists() else {}
    for key in SPECIAL:
        if not isinstance(_text(config.get(key)), str | None):
            raise InputError(f"{path}: {key} {config[key]!r} should be a string, an object with 'content', or null")
    return config


def _text(token: Any) -> str | None:
    """Return the text of a special token in `tokenizer_config.json`: a string, an object with `content`, or null."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int, str]]:
    """Return the ids and texts of added tokens, by id, from both files that may list them."""
    listed: dict[str, dict[Any, Any]] = {
        "tokenizer_config.json": {_text(t): i for i, t in config.get("added_tokens_decoder", {}).items()}
    }
    if (folder / "added_tokens.json").exists():
        listed["added_tokens.json"] = read_json_object(folder / "added_tokens.json")
    found = {}
    for file, ids in listed.items():
        for token, i in ids.items():
            if not str(i).isdigit():
                raise InputError(f"{folder / file}: the added token {token!r} has the id {i!r}, should be an integer")
            found[int(i)] = str(token)
    return sorted(found.items())
