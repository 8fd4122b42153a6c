"""Read and write small files: clear errors on reading, no half-written file on writing."""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from llama_jax.base.bucket import is_remote, reaching
from llama_jax.base.errors import InputError

_HASH = re.compile("[0-9a-f]{40,64}")


def cache_folder(name: str) -> Path:
    """Return the folder `name` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_jax" / name


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises an InputError that names file, line and column."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    return parse_json(data, str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object. Raises InputError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold a JSON object")
    return value


def parse_json(data: bytes, where: str, first_line: int = 1) -> Any:
    """Parse UTF-8 JSON, refusing repeated keys; errors count lines from `first_line`. Raises InputError."""
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as e:
        line = first_line + data.count(b"\n", 0, e.start)
        raise InputError(f"{where}: not UTF-8 at line {line}: {e.reason}") from None
    except json.JSONDecodeError as e:
        line = first_line + e.lineno - 1
        raise InputError(f"{where}: not valid JSON at line {line}, column {e.colno}: {e.msg}") from None
    except (ValueError, RecursionError) as e:  # a repeated key, a number of thousands of digits, deep nesting
        line = first_line + _lines_before_problem(text)
        raise InputError(f"{where}: not usable JSON at line {line}: {str(e)[:100]}") from None


def _lines_before_problem(text: str) -> int:
    """Count the lines before the first bad element of a JSON array, 0 where the text is no array."""
    decoder, at = json.JSONDecoder(object_pairs_hook=_no_duplicates), 0
    if not text.lstrip().startswith("["):
        return 0
    at = text.index("[") + 1
    try:
        while True:
            while text[at] in " \t\r\n,":
                at += 1
            at = decoder.raw_decode(text, at)[1]
    except (ValueError, RecursionError, IndexError):
        return text.count("\n", 0, at)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice in one object")
    return result


def refuse_foreign_link(folder: Path, path: Path) -> None:
    """Refuse a small file of a model folder that a link leads out of it, unless into a hub cache. Raises InputError.

    Small files are copied into the export, where a stranger's link to a secret would publish it. huggingface_hub links
    snapshots/HASH/FILE to ../../blobs/ETAG in a `models--` folder, wherever the cache is. ETAG may be a link too: since
    1.32 to CACHE/blobs/XX/XETHASH, or to another disk. Every blob is named by a hash.
    """
    target = Path(os.path.realpath(path))
    inside = target.is_relative_to(os.path.realpath(folder))
    if not inside and not (_HASH.fullmatch(target.name) and _leads_to_blobs(path)):
        raise InputError(f"{path}: is a link to {target}, a file outside the model's folder; copy the file here")


def _leads_to_blobs(path: Path, links: int = 40) -> bool:
    """Return whether one of the links that `path` follows names `blobs/HASH` beside a folder `snapshots`."""
    for _ in range(links):
        blobs = path.parent
        if blobs.name == "blobs" and _HASH.fullmatch(path.name) and (blobs.parent / "snapshots").is_dir():
            return True
        path = Path(os.path.realpath(blobs)) / path.name
        if not path.is_symlink():
            return False
        path = Path(os.path.normpath(path.parent / path.readlink()))
    return False


def write_text(path: Path, text: str) -> None:
    """Write the whole file or nothing; of several processes that write, the last one wins."""
    if is_remote(path):  # a bucket shows whole files only
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f"{path.name}-{platform.node()}-{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in HF's format: indent 2, sorted keys, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def make_output_dir(path: Path) -> Path:
    """Create the folder and check that it is writable. Raises InputError."""
    with reaching(path, f"output_dir {path} is not writable"):
        if not is_remote(path):  # a bucket has no folders; its client would make a missing bucket
            path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{platform.node()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    return path
