"""Read a file of `torch.save` without torch and without executing any of it: numbers, texts, containers, tensors.

The file is a zip archive, stored without compression: a pickle, and beside it a member of raw bytes for each storage.
The pickle may name few classes and functions, and this module has its own in their place. A pickle can also set the
state of whatever it holds, and take a tuple apart: so no object of NumPy or of Python's own is ever among its values.
"""

import functools
import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.base.files import check_regular
from llama_jax.hf.tensor import Index, Tensor

PICKLE_BYTES = 64 << 20  # 200 bytes a tensor
MAX_DIMENSIONS = 64  # of NumPy
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
# The opcodes of a torch file, by any of the protocols that `torch.save` offers.
_PUTS = {"BINPUT", "LONG_BINPUT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    *("MEMOIZE", "BINGET", "LONG_BINGET", *_PUTS, *_TEXTS),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
}


class _UnknownName(Exception):
    """Report a class or function that this module has nothing for."""


class _Fixed:
    """Refuse a state from the pickle (its opcode BUILD), which could replace any attribute."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets the state of an object that has none")


class _Function(_Fixed):
    """Stand for a class or function that the pickle may call.

    It is no tuple, as the pickle could call another function with its parts.
    """

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class Opaque:
    """Stand for a value that is not read."""

    __slots__ = ()

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Dictionary(dict):
    """Stand for an OrderedDict. The state of a model's is `_metadata`, which is not read."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class TorchTensor(_Fixed, Tensor):
    """Describe a tensor of the file."""


@dataclass(frozen=True)
class _Storage(_Fixed):
    """Hold the type of a storage, the number of its elements, the place of its first byte in the file, and the CRC-32
    of its bytes."""

    dtype: np.dtype
    size: int
    offset: int
    crc: int


def read_torch(path: Path, refusal: str = "it names {}, which this reader does not take") -> Any:
    """Return the value of a file of `torch.save`; its tensors stay on disk, as `Tensor`.

    Raises InputError; `refusal` is what it says, with the name in it, of a file that names other classes or functions.
    """
    check_regular(path)
    try:
        return _Archive(path).load()
    except InputError:
        raise
    except _UnknownName as e:
        raise InputError(f"{path}: {refusal.format(e)}") from None
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
            order = members.get(f"{self._root}byteorder")
            if order and (order.file_size != len(b"little") or archive.read(order) != b"little"):
                raise ValueError("its numbers are not little-endian")
            self._members, self._pickle = members, archive.read(pickles[0])

    def load(self) -> Any:
        """Return the value of the pickle."""
        _check(self._pickle)
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
        whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (first, *shape, *stride))
        if not whole or not isinstance(storage, _Storage) or len(shape) > MAX_DIMENSIONS:
            raise ValueError("a tensor's shape, stride, offset or storage is not one")
        stride = tuple(step if n > 1 else 0 for n, step in zip(shape, stride, strict=True))  # of one row, of any size
        count, span = math.prod(shape), 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if first + max(count, span if count else 0) > storage.size:
            raise ValueError("a tensor is not within its storage")
        expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if not count or all(n < 2 or a == b for n, a, b in zip(shape, stride, expected, strict=True)):
            read = functools.partial(_read, self._path, storage, first, shape)
        else:
            read = functools.partial(_read_strided, self._path, storage, first, span, shape, stride)
        return TorchTensor(shape, storage.dtype, file=self._path.name, read=read)


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


def _check(data: bytes) -> None:
    """Check a pickle before any of it is done. Raises _UnknownName, ValueError for what no torch file has.

    The unpickler's memo has room up to its largest index, which a file of 200 bytes could have at 4 billion.
    """
    value: Any
    key = None  # the text before a value: its key in a dictionary
    for count, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in _OPCODES:
            raise ValueError(f"its pickle holds {opcode.name}, which torch's do not")
        if opcode.name in _PUTS and value > count:
            raise ValueError("its pickle counts more values than it has")
        if opcode.name == "GLOBAL":
            module, _, name = value.partition(" ")
            if (module, name) not in _NAMES:
                raise _UnknownName(_spelled(module, name) + (f" in {key[:100]!r}" if key else ""))
        elif opcode.name in _TEXTS:
            key = key if value == "storage" else value  # the first text of a storage's identifier
        elif opcode.name not in ("MARK", "MEMOIZE", *_PUTS):
            key = None


def _spelled(module: str, name: str) -> str:
    return f"{module}.{name}"[:100]


# What stands for a name, but for tensors: these are the file's.
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): None,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): tuple,
    **dict.fromkeys(_OPAQUE, Opaque),
    **{("torch", name): name for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """Unpickle with the classes and functions of this module alone."""

    def __init__(self, data: bytes, storage: Callable[..., _Storage], tensor: Callable[..., Tensor]):
        super().__init__(io.BytesIO(data))
        self._storage, self._tensor = storage, tensor

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name of the pickle: a text for a storage's type. Raises _UnknownName for others."""
        if (module, name) not in _NAMES:
            raise _UnknownName(_spelled(module, name))
        found = _NAMES[module, name]
        return found if isinstance(found, str) else _Function(found or self._tensor)

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage by torch's identifier: ("storage", type, key, location, elements)."""
        kind, name, key, _, size = pid
        if kind != "storage" or name not in _STORAGES or type(key) is not str or type(size) is not int:
            raise ValueError("it has storages of an unknown kind")
        return self._storage(np.dtype(_STORAGES[name]), key, size)
