"""Read the header of a GGUF file: the metadata, and the places of the tensors.

GGUFReader of the package `gguf` trusts the file's counts, and makes an array of each number and string. Here each count
is compared with the bytes that are left before anything loops or allocates. Source: `docs/gguf.md` of ggml.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

ELEMENTS = 1 << 22  # of all arrays of the metadata; a vocabulary of 262,144 has a third
_STRING, _ARRAY = 8, 9
# The number of a type -> its letter in `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS = 4


class GgufTensor(NamedTuple):
    """Describe a tensor: the type, the shape in GGUF's order, and the mapped bytes uint8 [..., bytes of a row]."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


class BigEndian(ValueError):
    """Report a file of the other byte order."""


def read_header(path: str | Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Return the metadata, and the tensors, mapped into memory and not read.

    Raises OSError for a file that cannot be read, BigEndian, and ValueError or LookupError for a damaged file.
    """
    data = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(data)
    if cursor.bytes(4) != b"GGUF":
        raise ValueError("no GGUF at its start")
    if not (version := cursor.number("I")) & 0xFFFF:
        raise BigEndian
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    tensors, fields = cursor.number("Q"), cursor.number("Q")
    cursor.check(fields, 13)
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"{key[:60]!r} occurs twice")
        metadata[key] = cursor.value(cursor.number("I"))
    cursor.check(tensors, 24)
    infos = {}
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        if name in infos or dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name[:60]!r} occurs twice, or has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        infos[name] = GGMLQuantizationType(cursor.number("I")), shape, cursor.number("Q")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return metadata, [_tensor(data, start, name, *info) for name, info in infos.items()]


def _tensor(
    data: np.ndarray, start: int, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int
) -> GgufTensor:
    block, size = GGML_QUANT_SIZES[kind]
    *rows, columns = reversed(shape or (1,))
    if columns % block:
        raise ValueError(f"tensor {name[:60]!r} has rows of {columns} values, no multiple of {block}")
    at, row = start + offset, columns // block * size
    end = at + math.prod(rows) * row
    if end > len(data):
        raise ValueError(f"tensor {name[:60]!r} ends at byte {end:,} of {len(data):,}")
    return GgufTensor(name, kind, shape, data[at:end].reshape(*rows, row))


class _Cursor:
    """Read values one after another; `at` is the next byte."""

    def __init__(self, data: np.ndarray):
        self._data, self._elements, self.at = memoryview(data), 0, 0  # type: ignore[arg-type]  # an array is a buffer

    def check(self, count: int, size: int) -> None:
        """Raise ValueError where the rest of the file cannot hold `count` values of `size` bytes or more."""
        if count * size > len(self._data) - self.at:
            raise ValueError(f"{count:,} values at byte {self.at:,} of {len(self._data):,}")

    def bytes(self, count: int) -> bytes:
        self.check(count, 1)
        self.at += count
        return bytes(self._data[self.at - count : self.at])

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack("<" + letter, self.bytes(struct.calcsize("<" + letter)))
        return value

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """Return a value of a type: a number, a string, or a list of such."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        self._elements += count
        if kind == _ARRAY:
            raise ValueError("an array of arrays")
        if self._elements > ELEMENTS:
            raise ValueError(f"arrays of over {ELEMENTS:,} values")
        if kind == _STRING:
            self.check(count, 8)
            return [self.string() for _ in range(count)]
        letter = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{letter}", self.bytes(count * struct.calcsize("<" + letter))))
