"""Compute digests of tensors: of each its bytes, and one of all."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

Entry = dict[str, Any]  # a tensor's "dtype", "shape" and "sha256", perhaps with its "file"


def describe(array: np.ndarray) -> Entry:
    """Return the type, the shape and the SHA-256 of the bytes of an array, which are those of its safetensors file."""
    data = np.ascontiguousarray(array).view(np.uint8).data if array.size else b""
    return {"dtype": array.dtype.name, "shape": [*array.shape], "sha256": hashlib.sha256(data).hexdigest()}


def digest_of_all(entries: Mapping[str, Entry]) -> str:
    """Return one SHA-256 of names, types, shapes and digests of tensors; order and files do not matter."""
    lines = (f"{name} {entry['dtype']} {entry['shape']} {entry['sha256']}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
