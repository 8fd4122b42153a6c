"""Read and write small files: clear errors on reading, no half-written file on writing."""

import fcntl
import json
import os
import platform
import re
import stat
from pathlib import Path
from typing import IO, Any

from llama_jax.base.bucket import is_remote, reaching
from llama_jax.base.errors import InputError

SMALL_BYTES = 16 << 20  # of a JSON file; the largest index on the hub has 9 MB
HOLES = 1 << 30
DEEPEST = 100  # brackets within brackets: more exhaust Python's stack where values are walked

_HASH = re.compile("[0-9a-f]{40,64}")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|([][{}])', re.DOTALL)


def cache_folder(name: str) -> Path:
    """Return the folder `name` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_jax" / name


def check_regular(path: Path, limit: int | None = None) -> None:
    """Refuse a path that is no regular file, or a file over `limit` bytes. Raises InputError.

    To open a FIFO blocks, a device has no end, and a sparse file of a terabyte takes no room on the disk.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: cannot be read: its name holds a zero byte") from None
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "no file")
        raise InputError(f"{path}: is {kind}; should be a regular file: put one there, or remove it")
    if limit is not None and status.st_size > limit:
        raise InputError(
            f"{path}: has {status.st_size:,} bytes, and such a file at most {limit:,}; download or copy it again"
        )


def refuse_holes(path: Path) -> None:
    """Refuse a file of data with more than HOLES bytes that were never written, which read as zeros. Raises InputError.

    File systems without holes find none.
    """
    with path.open("rb") as file:
        at, holes, end = 0, 0, os.fstat(file.fileno()).st_size
        while at < end and holes <= HOLES and hasattr(os, "SEEK_HOLE"):
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            try:
                at = os.lseek(file.fileno(), hole, os.SEEK_DATA)
            except OSError:  # no data behind the hole
                at = end
            holes += at - hole
    if holes > HOLES:
        raise InputError(f"{path}: over {HOLES:,} of its bytes were never written (a sparse file); copy it again")


def read_small(path: Path, limit: int = SMALL_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises InputError."""
    if not is_remote(path):
        check_regular(path, limit)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None


def read_json(path: Path, limit: int = SMALL_BYTES) -> Any:
    """Parse a JSON file. Raises an InputError that names file, line and column."""
    return parse_json(read_small(path, limit), str(path))


def read_json_object(path: Path, limit: int = SMALL_BYTES) -> dict[str, Any]:
    """Parse a JSON file that holds an object. Raises InputError."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold a JSON object")
    return value


def parse_json(data: bytes, where: str, first_line: int = 1, repeats: bool = False) -> Any:
    """Parse UTF-8 JSON, refusing repeated keys unless `repeats`; errors count lines from `first_line`.

    Raises InputError, for numbers of thousands of digits and deep nesting too.
    """
    try:
        text = data.decode("utf-8")
        _check_depth(data)
        return json.loads(text, object_pairs_hook=None if repeats else _no_duplicates)
    except UnicodeDecodeError as e:
        line = first_line + data.count(b"\n", 0, e.start)
        raise InputError(f"{where}: not UTF-8 at line {line}: {e.reason}") from None
    except json.JSONDecodeError as e:
        line = first_line + e.lineno - 1
        raise InputError(f"{where}: not valid JSON at line {line}, column {e.colno}: {e.msg}") from None
    except (ValueError, RecursionError) as e:  # a repeated key, a number of thousands of digits, deep nesting
        line = first_line + _lines_before_problem(text)
        raise InputError(f"{where}: not usable JSON at line {line}: {str(e)[:100]}") from None


def _check_depth(data: bytes) -> None:
    """Raise RecursionError for JSON with over DEEPEST brackets within one another."""
    if data.count(b"[") + data.count(b"{") <= DEEPEST:
        return
    depth = 0
    for mark in _BRACKETS.finditer(data):
        if bracket := mark[1]:
            depth += 1 if bracket in b"[{" else -1
            if depth > DEEPEST:
                raise RecursionError(f"over {DEEPEST} brackets within one another")


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
    try:
        temporary.write_text(text, encoding="utf-8")
    except OSError:  # a full disk
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in HF's format: indent 2, sorted keys, a newline at the end."""
    write_text(path, dump_json(value, sort_keys=True) + "\n")


def dump_json(value: Any, sort_keys: bool = False) -> str:
    """Return JSON text, indented by 2; half surrogate pairs, which UTF-8 lacks, are escaped."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=2, sort_keys=sort_keys)
    return text


def lock(file: int | IO, path: Path) -> str:
    """Hold an open file for this process alone until it is closed; SIGKILL frees it too. Return a warning, "" but where
    the file system has no locks. Raises BlockingIOError where another process holds the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as e:
        return f"warning: {path} cannot be locked ({e.strerror}); let no second command write there"
    return ""


def make_output_dir(path: Path) -> Path:
    """Create the folder and check that it is writable. Raises InputError."""
    with reaching(path, f"output_dir {path} is not writable"):
        if not is_remote(path):  # a bucket has no folders; its client would make a missing bucket
            path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{platform.node()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    return path
