"""Define the tokenizer of training and generation: special tokens under HF's names, and the files of an HF folder."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from llama_jax.base.bucket import remove_tree
from llama_jax.base.errors import InputError
from llama_jax.base.files import (
    SMALL_BYTES,
    check_regular,
    dump_json,
    parse_json,
    read_json_object,
    read_small,
    refuse_foreign_link,
    write_json,
    write_text,
)
from llama_jax.data.added_tokens import DEFAULTS, SPECIAL, Named, as_json

# The files of a tokenizer in an HF folder.
FILES = (
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "chat_template.jinja chat_template.json vocab.json merges.txt"
).split()
TEMPLATES = "additional_chat_templates"  # a folder of named templates
TOKENIZER_BYTES = 64 << 20  # of a vocabulary; the largest on the hub have 33 MB
FAR = 1 << 16  # rows that an embedding may get for ids without tokens
_LARGE = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")


class Tokenizer(ABC):
    """Define a tokenizer; `tokenizer.open_tokenizer` makes instances.

    `special` maps HF's keys (`eos_token`, ...) to the tokens' texts or None. `named` holds the tokens of the files.
    """

    def __init__(self, folder: Path, config: dict[str, Any], named: Named, special: dict[str, str | None]):
        self.folder, self.config, self._named = folder, config, named
        self.special: dict[str, str | None] = {key: special.get(key) for key in SPECIAL}

    @abstractmethod
    def __len__(self) -> int:
        """Count all tokens, added ones included."""

    @abstractmethod
    def added(self) -> dict[int, AddedToken]:
        """Return the added tokens by id: the texts that are cut out before a text is encoded."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, with bos and eos as the files demand, computed on all cores."""

    @abstractmethod
    def encode_with_offsets(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
        """Yield the ids of each text, with no token added at either end, and the characters [start, end) of each id.

        Each byte token of a character has the character's span; an inserted space in front has the next token's.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, without special tokens."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, None where the token does not exist."""

    @abstractmethod
    def _add(self, token: str) -> None:
        """Make the text a special token, with a new id where the text has none."""

    @abstractmethod
    def _save_tokens(self, folder: Path) -> None:
        """Write the files that added tokens change, except `tokenizer_config.json`."""

    def rows(self, rows: int) -> int:
        """Return the rows that an embedding of `rows` needs: one for each token and for each row that a file names.

        transformers gives some tokens other ids than a file declares, and resizes to the number of tokens. A row past
        that number is kept where a file names it. Raises InputError for an id far past all tokens and rows.
        """
        declared = [i for i in self._named.added if i < rows]
        needed = max([len(self), *(i + 1 for i in [*self.added(), *declared])])
        if needed > 2 * max(len(self), rows) + FAR:
            raise InputError(
                f"{self.folder}: the tokenizer names a token of the id {needed - 1}, and has {len(self)} tokens; give "
                "added tokens the ids behind the others"
            )
        return needed

    def save(self, folder: Path) -> None:
        """Write files from which transformers loads the same tokenizer, added tokens included."""
        copy_tokenizer(self.folder, folder)
        (folder / "added_tokens.json").unlink(missing_ok=True)  # `added_tokens_decoder` is complete
        self._save_tokens(folder)
        special = {key: text for key, text in self.special.items() if text is not None}
        decoder = {str(i): as_json(token) for i, token in sorted(self.added().items())}
        nulls = {key: None for key in SPECIAL if key in self.config}
        config = {**self.config, **nulls, **special, "added_tokens_decoder": decoder}
        write_json(folder / "tokenizer_config.json", _portable(config, folder))
        write_json(folder / "special_tokens_map.json", special)

    def add_missing_special_tokens(self) -> list[int]:
        """Set missing special tokens as stanford_alpaca does, to `DEFAULTS`, and return the new ids."""
        new = []
        for key, token in DEFAULTS.items():
            if self.special[key] is None:
                is_new = self.token_to_id(token) is None
                self._add(token)
                self.special[key] = token
                new += [i for i in [self.token_to_id(token)] if is_new and i is not None]
        return new

    def warnings(self) -> list[str]:
        """Describe what a user would not expect: no eos, ids other than declared, tokens of transformers 5 alone."""
        eos, found = self.special["eos_token"], []
        if not eos or self.eos_token_id is None:
            found.append(f"the tokenizer's eos_token is {eos!r}: no eos is trained, so the model will not stop")
        elif eos == self.special["unk_token"]:
            found.append(
                f"the tokenizer's eos_token {eos!r} is also its unk_token: the model may stop at unknown words"
            )
        for i, token in self._named.added.items():
            if (got := self.token_to_id(token.content)) != i:
                found.append(
                    f"the files give {token.content!r} the id {i}; transformers, and so this run, gives it {got}"
                )
        extra = self.config.get("extra_special_tokens") or []
        for text in map(_text, extra.values() if isinstance(extra, dict) else extra):
            if self.token_to_id(text) is None:
                found.append(
                    f"extra_special_tokens names {text!r}, a token for transformers 5 alone; to have it as a token, "
                    "give --hf_compat 5"
                )
        return found

    def adds(self) -> tuple[bool, bool]:
        """Return whether encoding a text adds bos in front, and eos at the end."""
        (ids,) = self.encode_batch(["a"])
        return ids[:1] == [self.bos_token_id], ids[-1:] == [self.eos_token_id]

    def special_texts(self) -> set[str]:
        """Return the texts of all special tokens."""
        return {token.content for token in self.added().values() if token.special}

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


def check_tokenizer_files(folder: Path) -> None:
    """Check that each tokenizer file of a folder is a regular file of a usual size, and no link to a file outside.

    Raises InputError.
    """
    for path in _files(folder):
        refuse_foreign_link(folder, path)
        check_regular(path, TOKENIZER_BYTES if path.name in _LARGE else SMALL_BYTES)


def _files(folder: Path) -> list[Path]:
    """Return the tokenizer files in a folder, named templates included."""
    named = [folder / name for name in FILES]
    return [path for path in (*named, *sorted((folder / TEMPLATES).glob("*.jinja"))) if os.path.exists(path)]


def read_text(path: Path, limit: int = SMALL_BYTES) -> str:
    """Read a small UTF-8 file, with its line ends. Raises InputError."""
    try:
        return read_small(path, limit).decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8: {e.reason} at byte {e.start}; save it as UTF-8") from None


def _write_anew(path: Path, target: Path) -> None:
    """Write the content of a tokenizer file: JSON is parsed, text decoded; of links, the content alone is taken."""
    if path.suffix == ".json":
        write_text(target, dump_json(parse_json(read_small(path, TOKENIZER_BYTES), str(path), repeats=True)) + "\n")
    elif path.suffix == ".model":
        target.write_bytes(read_small(path, TOKENIZER_BYTES))
    else:
        target.write_bytes(read_text(path, TOKENIZER_BYTES).encode())


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Write the tokenizer's files, for any transformers to load, and remove other tokenizer files from the folder.

    Raises InputError for a link to a file outside of `source`.
    """
    if source and source.resolve() == folder.resolve():
        return
    if source:
        check_tokenizer_files(source)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)  # a link is replaced, not followed
    if (folder / TEMPLATES).is_dir():
        remove_tree(folder / TEMPLATES)
    for path in _files(source) if source else ():
        target = folder / (path.name if path.parent == source else f"{TEMPLATES}/{path.name}")
        target.parent.mkdir(exist_ok=True)
        _write_anew(path, target)
    if (path := folder / "tokenizer_config.json").exists():
        config = read_json_object(path)
        if (portable := _portable(config, folder)) != config:
            write_json(path, portable)


def _portable(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a `tokenizer_config.json` that transformers 4.37 and 5 load: without the base classes of 5, whose names
    4.37 lacks, and without classes in Python files, which are not copied."""
    custom = {"TokenizersBackend", "SentencePieceBackend", "PythonBackend"}
    auto_map = config.get("auto_map")
    for names in auto_map.values() if isinstance(auto_map, dict) else ():
        custom |= {str(name).rpartition(".")[2] for name in (names if isinstance(names, list) else [names])}
    config = {key: value for key, value in config.items() if key != "auto_map"}
    if config.get("tokenizer_class") in custom:
        is_fast = (folder / "tokenizer.json").exists()
        config["tokenizer_class"] = "PreTrainedTokenizerFast" if is_fast else "LlamaTokenizer"
    return config


def write_tokenizer_json(path: Path, serialized: str) -> None:
    """Write a serialized tokenizer with merges as "a b", which `tokenizers` before 0.20 needs.

    Merges stay lists, the newer form, if a part contains a space.
    """
    value = parse_json(serialized.encode(), str(path))
    merges = value["model"].get("merges", [])
    if not any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
        value["model"]["merges"] = [" ".join(merge) for merge in merges]
    write_text(path, dump_json(value))


def _text(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)
