"""Cache tokenised examples on disk: later runs on the same data map the first run's file.

A cache file is one line of JSON, then the raw arrays: offsets int64, ids int32, labels int32. Its name is a digest of
every input, so that a file is never out of date, only unused; for chats whose template writes the date, plus the date.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.data.examples import Examples
from llama_jax.data.tokenizer import FILES, TEMPLATES

LIBRARIES = ("jinja2", "sentencepiece", "tokenizers", "transformers")  # libraries whose versions may change ids
ALIGNMENT = 64  # bytes; the arrays begin at a multiple of this
PIECE = 1 << 22  # bytes hashed at a time, on all cores


def data_digest(data: Sequence[Path], tokenizer: Path | None, settings: dict[str, Any]) -> str:
    """Return the cache name, in hex, of data files' examples under the tokenizer in a folder (None: no tokenizer).

    The digest covers the bytes of both, the settings, the code of this folder, and the libraries' versions. Raises
    InputError where the data cannot be read.
    """
    files = {f"code {path.name}": path for path in Path(__file__).parent.glob("*.py")}
    if tokenizer is not None:
        named = {f"tokenizer {name}": tokenizer / name for name in FILES}
        named |= {f"tokenizer {TEMPLATES}/{path.name}": path for path in (tokenizer / TEMPLATES).glob("*.jinja")}
        files |= {what: path for what, path in named.items() if path.is_file()}
    try:
        digests = {what: _file_digest(path) for what, path in sorted(files.items())}
        digests |= {f"data {n} {''.join(path.suffixes[-2:])}": _file_digest(path) for n, path in enumerate(data)}
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be read: {e.strerror}") from None
    versions = {name: version(name) for name in LIBRARIES}
    return _digest([], bytes, json.dumps([digests, settings, versions], sort_keys=True))


def load_examples(folder: Path, digest: str, say: Callable[[str], None]) -> tuple[str, Examples, str, str] | None:
    """Return form, examples mapped from disk, checksum, and text on bad records; None where the file is missing.
    A damaged or unreadable file gives a warning through `say`, and None."""
    path = folder.expanduser() / digest
    try:
        with path.open("rb") as file:
            header = file.readline(1 << 16)
        body = np.asarray(np.memmap(path, np.uint8, "r", offset=len(header)))
        told = json.loads(header)
        form, cut = told["form"], 8 * (told["examples"] + 1)
        input_ids, labels = body[cut:].view(np.int32).reshape(2, -1)
        examples = Examples(input_ids, labels, body[:cut].view(np.int64))
        if told["checksum"] != _checksum(form, examples, told["left_out"]):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        say(f"warning: cached data {path} cannot be read ({e.strerror}): tokenizing again")
        return None
    except (ValueError, KeyError, TypeError):
        say(f"warning: cached data {path} is damaged: tokenizing again")
        return None
    return form, examples, told["checksum"], told["left_out"]


def save_examples(
    folder: Path, digest: str, form: str, examples: Examples, say: Callable[[str], None], left_out: str = ""
) -> str:
    """Write the examples under the name `digest`, the whole file or none, and return their checksum.
    `left_out` describes bad records. A folder that is not writable gives a warning through `say`."""
    folder = folder.expanduser()
    ids, labels = (np.ascontiguousarray(array, np.int32) for array in (examples.input_ids, examples.labels))
    examples = Examples(ids, labels, np.ascontiguousarray(examples.offsets, np.int64))
    checksum = _checksum(form, examples, left_out)
    header = json.dumps({"form": form, "examples": len(examples), "checksum": checksum, "left_out": left_out})
    header += " " * (-(len(header) + 1) % ALIGNMENT) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The temporary name is unique: several processes may write the same examples at once; the last rename stays.
        temporary = folder / f"{digest}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("xb") as file:
                file.write(header.encode())
                for array in _arrays(examples):
                    file.write(array.data)
            os.replace(temporary, folder / digest)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        say(f"warning: the tokenized data is not cached: {folder}: {e.strerror}")
    return checksum


def _arrays(examples: Examples) -> tuple[np.ndarray, ...]:
    """Return the arrays in the order of the file."""
    return examples.offsets, examples.input_ids, examples.labels


def _checksum(form: str, examples: Examples, left_out: str) -> str:
    arrays = [array.view(np.uint8) for array in _arrays(examples)]
    pieces = [array[at : at + PIECE] for array in arrays for at in range(0, len(array), PIECE)]
    return _digest(pieces, lambda piece: piece, json.dumps([form, len(examples), left_out]))


def _file_digest(path: Path) -> str:
    def read(at: int) -> bytes:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(PIECE)

    return _digest(range(0, path.stat().st_size, PIECE), read)


def _digest(pieces: Iterable[Any], read: Callable[[Any], Any], about: str = "") -> str:
    """Hash `about` and the digests of all pieces, which are read and hashed in parallel."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda piece: hashlib.blake2b(read(piece)).digest(), pieces)
        return hashlib.blake2b(about.encode() + b"".join(digests), digest_size=20).hexdigest()
