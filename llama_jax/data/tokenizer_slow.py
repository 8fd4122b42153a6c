"""Run sentencepiece on a bare `tokenizer.model`, by the rules of the slow LlamaTokenizer of transformers 4.37."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_small, write_json
from llama_jax.data.added_tokens import Token, named_tokens
from llama_jax.data.tokenizer_base import TOKENIZER_BYTES, Tokenizer

_SPACE = "\u2581"  # sentencepiece's


@dataclass
class _Part:
    """Hold a part of a text: an added token, or text between added tokens.

    Character k of `text` is character `at[k]` of the whole text; the dummy space of non-legacy encoding is -1.
    """

    text: str
    at: list[int] | range

    def stripped(self, left: bool, right: bool) -> "_Part":
        """Return the part without white space at its left or right end."""
        start = len(self.text) - len(self.text.lstrip()) if left else 0
        end = len(self.text.rstrip()) if right else len(self.text)
        return _Part(self.text[start:end], self.at[start:end])

    def __add__(self, other: "_Part") -> "_Part":
        return _Part(self.text + other.text, [*self.at, *other.at])


class SentencePieceTokenizer(Tokenizer):
    """Cut a text at the added tokens, and encode the parts between them by sentencepiece."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        named = named_tokens(folder, config)
        defaults: dict[str, Token | None] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        named.special = defaults | named.special
        special = {key: None if token is None else str(token) for key, token in named.special.items()}
        super().__init__(folder, config, named, special)
        if config.get("sp_model_kwargs"):
            raise InputError(f"{folder / 'tokenizer_config.json'}: sp_model_kwargs is not supported; remove it")
        # Without "legacy": false, every part between added tokens begins with sentencepiece's dummy space.
        self._legacy = config.get("legacy") in (None, True)
        self._sp = _open_pieces(folder / "tokenizer.model", self._legacy)
        # HF's non-legacy encoding of a part that begins with a space: behind the unk token's text, which is cut off.
        self._unk = self.special["unk_token"] or ""
        self._unk_length = len(self._sp.encode(self._unk))
        self._added = dict(named.added)
        self._register()

    def _register(self) -> None:
        """Add the special tokens: a token that is a piece keeps the piece's id, another gets a new id."""
        ids = {token.content: i for i, token in self._added.items()}
        pieces = self._sp.get_piece_size()
        texts = [self._added[i].content if i in self._added else self._sp.id_to_piece(i) for i in range(pieces)]
        self._vocab = {text: i for i, text in enumerate(texts)} | ids
        for token in self._named.all_special():
            # A text that a file adds already keeps its flags. An AddedToken brings its own.
            if not isinstance(token, str):
                token.special = True
                self._put(token)
            elif token not in ids:
                self._add(token)

    def _put(self, token: AddedToken) -> None:
        if (i := self._vocab.get(token.content)) is None:
            # HF takes the number of tokens, which is another token's id where the ids have a gap.
            i = len(self._vocab) if len(self._vocab) not in self._added else max(self._added) + 1
        self._added[i] = token
        self._vocab[token.content] = i
        for cached in ("_ids", "_pattern", "_renamed"):
            self.__dict__.pop(cached, None)

    def _add(self, token: str) -> None:
        self._put(AddedToken(token, normalized=False, special=True))

    def __len__(self) -> int:
        return len(self._vocab)

    def added(self) -> dict[int, AddedToken]:
        return self._added

    def token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Map the added tokens' texts to their ids."""
        return {token.content: i for i, token in self._added.items() if token.content}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Match an added token: the longest of those that begin at the leftmost place."""
        longest_first = sorted(self._ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _renamed(self) -> dict[int, int]:
        """Map pieces to ids that the files give to the same texts. HF looks up pieces by text."""
        pieces = {i: self._sp.piece_to_id(token) for token, i in self._ids.items()}
        return {piece: i for i, piece in pieces.items() if piece != i and self._sp.id_to_piece(piece) in self._ids}

    def _parts(self, text: str) -> list[_Part]:
        """Cut a text at the added tokens; the tokens' flags move white space and single words between the parts."""
        at = range(len(text))
        if text and not self._legacy:
            text, at = _SPACE + text.replace(_SPACE, " "), range(-1, len(text))
        parts, last = [], 0
        for match in self._pattern.finditer(text):
            start, end = match.span()
            parts += [_Part(text[last:start], at[last:start])] if start > last else []
            parts.append(_Part(text[start:end], at[start:end]))
            last = end
        if last < len(text):
            parts.append(_Part(text[last:], at[last:]))
        for i, part in enumerate(parts):
            if part.text in self._ids:
                self._apply_flags(parts, i)
        return [part for part in parts if part.text]

    def _apply_flags(self, parts: list[_Part], i: int) -> None:
        """Strip the neighbours of the added token at place `i`, or join a token that is no word of its own to one."""
        token = self._added[self._ids[parts[i].text]]
        left, right = parts[i - 1] if i else _NOTHING, parts[i + 1] if i + 1 < len(parts) else _NOTHING
        if token.rstrip and right.text:
            parts[i + 1] = right.stripped(left=True, right=False)
        if token.lstrip and left.text:
            parts[i - 1] = left.stripped(left=False, right=True)
        if token.single_word and left.text and left.text[-1] != " ":
            parts[i - 1], parts[i] = parts[i - 1] + parts[i], _NOTHING
        elif token.single_word and right.text and right.text[0] != " ":
            parts[i + 1], parts[i] = parts[i] + parts[i + 1], _NOTHING

    def _starts(self, ids: list[int]) -> int:
        """Return 1 where a dummy space comes before a special token, which non-legacy encoding drops, else 0."""
        if self._legacy or len(ids) < 2 or ids[0] != self._vocab.get(_SPACE):
            return 0
        special = {*map(str, self._named.all_special()), *filter(None, self.special.values())}
        return int(ids[1] in map(self._vocab.get, special))

    def _behind_unk(self, text: str) -> bool:
        """Return whether HF encodes the text behind the unk token's text."""
        return not self._legacy and text.startswith((_SPACE, " "))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        start = [i for i in [self.bos_token_id] if i is not None and self.config.get("add_bos_token", True)]
        end = [i for i in [self.eos_token_id] if i is not None and self.config.get("add_eos_token", False)]
        split = [[part.text for part in self._parts(text)] for text in texts]
        plain = [text for parts in split for text in parts if text not in self._ids]
        prefixed = [self._unk + text if self._behind_unk(text) else text for text in plain]
        encoded = zip(plain, self._sp.encode(prefixed, num_threads=os.cpu_count() or 1), strict=True)
        result = []
        for parts in split:
            ids: list[int] = []
            for text in parts:
                ids += [self._ids[text]] if text in self._ids else self._without_unk(*next(encoded))
            result.append([*start, *ids[self._starts(ids) :], *end])
        return result

    def _without_unk(self, text: str, ids: list[int]) -> list[int]:
        """Return the ids of the text without those of the unk token's text in front."""
        cut = self._unk_length if self._behind_unk(text) and len(ids) >= self._unk_length else 0
        return [self._renamed.get(i, i) for i in ids[cut:]] if self._renamed else ids[cut:]

    def encode_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
        for text in texts:
            ids: list[int] = []
            offsets: list[tuple[int, int]] = []
            for part in self._parts(text):
                more, spans = self._encode_part(part)
                ids += more
                offsets += spans
            start = self._starts(ids)
            yield ids[start:], offsets[start:]

    def _encode_part(self, part: _Part) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a part's ids, and the characters of each in the whole text."""
        from sentencepiece.sentencepiece_pb2 import SentencePieceText  # type: ignore[attr-defined]  # defined at run time

        if (token := self._ids.get(part.text)) is not None:
            return [token], [(max(part.at[0], 0), part.at[-1] + 1)]
        prefix = self._unk if self._behind_unk(part.text) else ""
        pieces = SentencePieceText.FromString(self._sp.encode(prefix + part.text, out_type="serialized_proto")).pieces
        ids = self._without_unk(part.text, [piece.id for piece in pieces])
        # Bytes to characters. All but the last byte of a character, and an inserted space, have an empty span.
        bytes_at = np.cumsum([0, *(len(c.encode()) for c in prefix + part.text)])
        spans = [(piece.begin, piece.end) for piece in pieces[len(pieces) - len(ids) :]]
        if not spans:  # white space that the model removes
            return [], []
        before, after = np.searchsorted(bytes_at, spans).T - len(prefix)
        at = np.array([*part.at, part.at[-1] + 1])
        starts = np.maximum(at[before], 0)
        ends = np.maximum(np.where(after > 0, at[after - 1] + 1, at[0]), 0)
        nonempty = np.minimum(np.searchsorted(ends, starts, "right"), len(ends) - 1)  # none: a dummy space alone
        return ids, list(zip(starts.tolist(), ends[nonempty].tolist(), strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        skipped = {i for i, token in self._added.items() if token.special}
        # Padded rows of the model's embedding are no tokens and have no text.
        pieces = range(self._sp.get_piece_size())
        known = [int(i) for i in ids if i not in skipped and (i in pieces or i in self._added)]
        runs = itertools.groupby(known, self._added.get)
        return "".join(token.content * len([*run]) if token else self._sp.decode([*run]) for token, run in runs)

    def _save_tokens(self, folder: Path) -> None:
        self.config.setdefault("tokenizer_class", "LlamaTokenizer")
        # llama.cpp's converter reads this file.
        if new := {token.content: i for i, token in self._added.items() if i >= self._sp.get_piece_size()}:
            write_json(folder / "added_tokens.json", new)


_NOTHING = _Part("", range(0))


def _open_pieces(path: Path, dummy_prefix: bool) -> Any:
    """Return the sentencepiece model of a file, with or without the dummy space in front. Raises InputError."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    data = read_small(path, TOKENIZER_BYTES)
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]  # defined at run time
        if not proto.pieces:
            raise ValueError("it holds no pieces")
        if not dummy_prefix:
            proto.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as e:  # protobuf and sentencepiece raise classes of their own
        raise InputError(
            f"{path}: not a sentencepiece model ({(str(e).splitlines() or [type(e).__name__])[0]})"
        ) from None
