"""Tokenised examples on disk: the next run on the same data maps what the first one made.

A file of the cache is one line of JSON, then the arrays as they lie in memory: offsets int64, ids int32, labels int32.
Its name is a digest of everything that decides them, so that a file is never out of date, only unused.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.examples import Examples
from llama_jax.data.tokenizer import COPIED, COPIED_TEXT
from llama_jax.errors import InputError

LIBRARIES = ("jinja2", "sentencepiece", "tokenizers", "transformers")  # whose versions may decide ids
ALIGNMENT = 64  # bytes; the arrays begin at a multiple of it


def data_digest(data: Path, tokenizer: Path | None, settings: dict[str, Any]) -> str:
    """The name of the examples of a data file by the tokenizer in a folder (None: there is none), in hex.

    It covers both as bytes, the settings, this package's code that makes examples, and the libraries' versions. Raises
    InputError where the data cannot be read.
    """
    data = data.expanduser()
    files = {f"code {path.name}": path for path in Path(__file__).parent.glob("*.py")}
    if tokenizer is not None:
        named = {f"tokenizer {name}": tokenizer / name for name in (*COPIED, *COPIED_TEXT)}
        files |= {what: path for what, path in named.items() if path.is_file()}
    try:
        digests = {what: _file_digest(path) for what, path in sorted({**files, f"data {data.suffix}": data}.items())}
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be read: {e.strerror}") from None
    versions = {name: version(name) for name in LIBRARIES}
    return _hash(json.dumps([digests, settings, versions], sort_keys=True).encode())


def load_examples(folder: Path, digest: str, say: Callable[[str], None]) -> tuple[str, Examples] | None:
    """The form and the examples of this name, mapped from the disk, or None; a damaged file is said and is None."""
    path = folder.expanduser() / digest
    try:
        with path.open("rb") as file:
            header = file.readline(10 * ALIGNMENT)
        body = np.asarray(np.memmap(path, np.uint8, "r", offset=len(header)))
        told = json.loads(header)
        if told["checksum"] != _hash(_described(told["form"], told["examples"]), body):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        say(f"warning: cached data {path} cannot be read ({e.strerror}): tokenizing again")
        return None
    except (ValueError, KeyError, TypeError):
        say(f"warning: cached data {path} is damaged: tokenizing again")
        return None
    cut = 8 * (told["examples"] + 1)
    input_ids, labels = body[cut:].view(np.int32).reshape(2, -1)
    return told["form"], Examples(input_ids, labels, body[:cut].view(np.int64))


def save_examples(folder: Path, digest: str, form: str, examples: Examples, say: Callable[[str], None]) -> None:
    """Write the examples under this name: the whole file or none. A folder that cannot be written to is said."""
    folder = folder.expanduser()
    arrays = [
        np.ascontiguousarray(array, dtype)
        for array, dtype in ((examples.offsets, np.int64), (examples.input_ids, np.int32), (examples.labels, np.int32))
    ]
    checksum = _hash(_described(form, len(examples)), *arrays)
    header = json.dumps({"form": form, "examples": len(examples), "checksum": checksum})
    header += " " * (-(len(header) + 1) % ALIGNMENT) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: several processes may write the same examples at once, and the last rename stays.
        temporary = folder / f"{digest}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("xb") as file:
                file.write(header.encode())
                for array in arrays:
                    file.write(array.data)
            os.replace(temporary, folder / digest)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        say(f"warning: the tokenized data is not cached: {folder}: {e.strerror}")


def _described(form: str, examples: int) -> bytes:
    return json.dumps([form, examples]).encode()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _hash(*parts: Any) -> str:
    result = hashlib.blake2b(digest_size=20)
    for part in parts:
        result.update(part)
    return result.hexdigest()
