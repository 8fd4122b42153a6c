"""Reach folders of Google Cloud Storage, by `gs://BUCKET/...`, through the methods of a path."""

import contextlib
import errno
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llama_jax.base.errors import InputError

_SCHEME = re.compile(r"(\w+):/")


def as_path(name: str | Path) -> Path:
    """Return the path of a local name, with `~` expanded, or of a `gs://` URL. Raises InputError."""
    if not (scheme := _SCHEME.match(str(name))):
        return local_path(name)
    if scheme[1] != "gs":
        raise InputError(f"{name}: is not reached from here; copy the files here, or to a bucket of gs://")
    if not importlib.util.find_spec("gcsfs"):
        raise InputError(f"{name}: needs the client of Google Cloud Storage; install it with: pip install gcsfs")
    import fsspec.config
    from etils import epath

    for client in ("gcsfs", "google.auth"):  # warn at each call where a bucket's kind is not to be known
        logging.getLogger(client).setLevel(logging.ERROR)
    # A list of names kept by one process would hide the files of another.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(str(name))  # type: ignore[return-value]  # has Path's methods


def local_path(name: str | Path) -> Path:
    """Return a local path with `~` expanded. Raises InputError for a name that no file can have."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise InputError(f"{name}: there is no such user here; give the whole path") from None
    try:
        os.lstat(path)
    except ValueError:
        raise InputError(f"{name}: a path cannot hold a zero byte") from None
    except OSError as e:
        if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f"{name}: cannot be read: {e.strerror}; give a shorter path") from None
    return path


def is_remote(path: Path) -> bool:
    """Return whether a path of `as_path` lies in a bucket."""
    return bool(_SCHEME.match(str(path)))


def absolute(path: Path) -> Path:
    """Return the path as orbax wants it; a URL is absolute already."""
    return path if is_remote(path) else path.absolute()


@contextlib.contextmanager
def reaching(path: Path, what: str) -> Iterator[None]:
    """Turn the exceptions of a bucket's client, which are of several libraries, into an InputError: `what` failed."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        if not is_remote(path) and not isinstance(e, OSError):
            raise
        reason = (isinstance(e, OSError) and e.strerror) or f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise InputError(f"{what}: {reason}") from None


@contextlib.contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """Give the local file to write for `path`: itself, or for a bucket a temporary file that is uploaded at the end."""
    if not is_remote(path):
        yield path
        return
    from fsspec.core import url_to_fs

    with tempfile.TemporaryDirectory(prefix="llama_jax-") as folder:
        yield (local := Path(folder) / path.name)
        system, place = url_to_fs(str(path))
        system.put_file(str(local), place)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that it holds."""
    from etils import epath

    epath.Path(path).rmtree()
