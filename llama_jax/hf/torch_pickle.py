"""Read a file of `torch.save` without torch and without executing any of it: numbers, texts, containers, tensors.

The file is a zip archive, stored without compression: a pickle, and beside it a member of raw bytes for each storage.
The pickle may name few classes and functions, and this module has its own in their place.
"""

import functools
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.base.files import check_regular
from llama_jax.hf.tensor import Index, Tensor

PICKLE_BYTES = 64 << 20  # 200 bytes a tensor
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: the signature, the lengths of the name and of more
_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "BoolStorage": np.bool_,
}
# NumPy's own arrays, in rng_state.pth: nothing here needs their values.
_OPAQUE = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}


class Opaque:
    """Stand for a value that is not read."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(NamedTuple):
    """Hold the type of a storage, the number of its elements, the place of its first byte in the file, and the CRC-32
    of its bytes."""

    dtype: np.dtype
    size: int
    offset: int
    crc: int


def read_torch(path: Path) -> Any:
    """Return the value of a file of `torch.save`; its tensors stay on disk, as `Tensor`. Raises InputError."""
    check_regular(path)
    try:
        return _Archive(path).load()
    except InputError:
        raise
    except (zipfile.BadZipFile, NotImplementedError):
        raise InputError(
            f"{path}: is damaged, or in torch's format of before 1.6; copy it again, or torch.load it and "
            "torch.save it again"
        ) from None
    except Exception as e:  # a damaged pickle raises many classes
        why = (str(e).splitlines() or [type(e).__name__])[0][:100]
        raise InputError(f"{path}: is damaged ({why}); copy it again") from None


class _Archive:
    """Open the archive of a file: its pickle, and the places of its storages."""

    def __init__(self, path: Path):
        self._path = path
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it has not one data.pkl")
            if members[pickles[0]].file_size > PICKLE_BYTES:
                raise ValueError(f"its pickle has more than {PICKLE_BYTES:,} bytes")
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise ValueError("its members are compressed, which torch's are not")
            self._root = pickles[0].removesuffix("data.pkl")
            if f"{self._root}byteorder" in members and archive.read(f"{self._root}byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            self._members, self._pickle = members, archive.read(pickles[0])

    def load(self) -> Any:
        """Return the value of the pickle."""
        return _Unpickler(self._pickle, self._storage, self._tensor).load()

    def _storage(self, dtype: np.dtype, key: str, size: int) -> _Storage:
        """Return a storage of the archive by its key. Raises ValueError where it is not whole."""
        info = self._members.get(f"{self._root}data/{key}")
        if info is None or not 0 <= size * dtype.itemsize <= info.file_size:
            raise ValueError(f"storage {key} is missing or short")
        with self._path.open("rb") as file:
            file.seek(info.header_offset)
            signature, name, more = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise ValueError(f"storage {key} is not where the archive has it")
        return _Storage(dtype, size, info.header_offset + _LOCAL_HEADER.size + name + more, info.CRC)

    def _tensor(self, storage: Any, first: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        """Return a tensor of a storage, from its element `first`. Raises ValueError where it is not within it."""
        shape, stride = tuple(shape), tuple(stride)
        count, span = math.prod(shape), 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        whole = isinstance(storage, _Storage) and min(first, 0, *shape, *stride) == 0
        if not whole or first + max(count, span if count else 0) > storage.size:
            raise ValueError("a tensor is not within its storage")
        expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if all(n < 2 or a == b for n, a, b in zip(shape, stride, expected, strict=True)):
            read = functools.partial(_read, self._path, storage, first, shape)
        else:
            read = functools.partial(_read_strided, self._path, storage, first, span if count else 0, shape, stride)
        return Tensor(shape, storage.dtype, file=self._path.name, read=read)


def _read(path: Path, storage: _Storage, first: int, shape: tuple[int, ...], index: Index) -> np.ndarray:
    """Read a part of a contiguous tensor: its rows, then of these the part."""
    row = math.prod(shape[1:])
    rows = index[0] if index else slice(0, shape[0] if shape else 1)
    count = rows.stop - rows.start
    values = _elements(path, storage, first + rows.start * row, count * row)
    return values.reshape(count, *shape[1:])[(slice(None), *index[1:])] if shape else values.reshape(())


def _read_strided(
    path: Path,
    storage: _Storage,
    first: int,
    span: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    index: Index,
) -> np.ndarray:
    """Read a part of a tensor that is not contiguous, such as a transposed one: its whole span, then the part."""
    values = _elements(path, storage, first, span)
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values, shape, steps)[index or ...].copy()


def _elements(path: Path, storage: _Storage, first: int, count: int) -> np.ndarray:
    """Read elements of a storage. Raises InputError for a whole storage that is not what was saved."""
    values = np.fromfile(path, storage.dtype, count, offset=storage.offset + first * storage.dtype.itemsize)
    if values.size < count or (count == storage.size and zlib.crc32(values.view(np.uint8).data) != storage.crc):
        raise InputError(f"{path}: is damaged: a tensor is not what was saved; copy it again")
    return values


class _Unpickler(pickle.Unpickler):
    """Unpickle with the classes and functions of this module alone."""

    def __init__(self, data: bytes, storage: Callable[..., _Storage], tensor: Callable[..., Tensor]):
        super().__init__(io.BytesIO(data))
        self._storage = storage
        self._known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
            **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
            **dict.fromkeys(_OPAQUE, Opaque),
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name of the pickle. Raises ValueError for other names."""
        if (module, name) not in self._known:
            raise ValueError(f"it names {module}.{name}, which is no part of a trainer's checkpoint")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage by torch's identifier: ("storage", type, key, location, elements)."""
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError("it has storages of an unknown kind")
        return self._storage(dtype, str(key), int(size))
