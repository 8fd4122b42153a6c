"""Reading and writing small files: clear errors one way, never a half-written file the other."""

import json
import os
from pathlib import Path
from typing import Any

from llama_jax.errors import InputError


def read_json(path: Path) -> Any:
    """The parsed file. Raises InputError that names file, line and column."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: not valid JSON at line {e.lineno}, column {e.colno}: {e.msg}") from None
    except (OSError, UnicodeDecodeError, _DuplicateKey) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}") from None


class _DuplicateKey(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [k for k, _ in pairs]
        raise _DuplicateKey(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return result


def write_text(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """JSON as HF writes it: indent 2, sorted keys, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def make_output_dir(path: Path) -> Path:
    """Create the folder and prove that files can be written to it. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise InputError(f"output_dir {path} is not writable: {e.strerror}") from None
    return path
