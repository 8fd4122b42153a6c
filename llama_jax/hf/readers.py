"""Open a checkpoint's files: safetensors, GGUF, and `.bin` on request. The tensors stay on disk."""

import functools
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llama_jax.base.errors import InputError
from llama_jax.base.files import SMALL_BYTES, check_regular, parse_json, read_json, refuse_foreign_link
from llama_jax.data.tokenizer import check_tokenizer_files
from llama_jax.hf.checkpoint import is_checkpoint
from llama_jax.hf.hub import SMALL
from llama_jax.hf.names import IGNORED
from llama_jax.hf.tensor import Index, Tensor
from llama_jax.hf.torch_pickle import read_torch

HEADER_BYTES = 32 << 20  # of a safetensors file; 100 bytes a tensor
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Checkpoint(NamedTuple):
    """Hold an HF model on disk: the folder, its `config.json`, and the tensors by HF name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    gguf: Path | None = None


def open_checkpoint(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """Open an HF folder, a `.gguf` file, or a folder with a `.gguf` file. Raises InputError for damaged files."""
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such folder; give a folder with an HF model, or its name on the hub, org/model")
    if path.is_file() and (path.suffix in (".safetensors", ".json") or path.name.startswith("pytorch_model")):
        raise InputError(f"{path}: is one file of an HF model; give the folder: --model_name_or_path {path.parent}")
    check_small_files(path.parent if path.is_file() else path)
    gguf = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if path.is_file() or (gguf and not (path / "config.json").exists()):
        if len(gguf) > 1:
            raise InputError(f"{path}: holds {len(gguf)} .gguf files; name the one to read")
        from llama_jax.hf.gguf_file import read_gguf

        config, tensors = read_gguf(gguf[0])
        return Checkpoint(gguf[0].parent, config, tensors, gguf=gguf[0])
    if not (path / "config.json").exists():
        raise InputError(f"{path}: no config.json in this folder, so it is not an HF model{_elsewhere(path)}")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{path / 'config.json'}: should be a JSON object")
    return Checkpoint(path, config, _open_weights(path, allow_pickle))


def _elsewhere(folder: Path) -> str:
    """Return where the model of a folder without config.json is, "" where nothing tells."""
    if is_checkpoint(folder):
        if (folder / "adapter_config.json").exists():
            return "; it is a run's checkpoint of an adapter: give the base model, and this folder as its adapter"
        return "; it is a run's checkpoint of before 2026-11-29, without the model's files: resume the run to save anew"
    if (folder / "adapter_config.json").exists():
        return "; it holds a PEFT adapter: merge it into its base model (merge_and_unload) and save that"
    inside = [p.parent for pattern in ("*", "snapshots/*") for p in sorted(folder.glob(f"{pattern}/config.json"))]
    return f"; give the folder that has one: {inside[-1]}" if inside else ""


def check_small_files(folder: Path) -> None:
    """Check every file but the weights before any is opened: a regular file of a usual size, and no link out of the
    folder, as these files are exported. Raises InputError."""
    check_tokenizer_files(folder)
    for path in (folder / name for name in SMALL):
        if os.path.exists(path):  # a link to nothing is no file
            refuse_foreign_link(folder, path)
            check_regular(path, SMALL_BYTES)


def _open_weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    for stem, suffix, opener in (("model", "safetensors", open_safetensors), ("pytorch_model", "bin", _open_bin)):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if not index.exists() and not single.exists():
            continue
        if suffix == "bin" and not allow_pickle:
            raise InputError(f"{folder}: holds only pickled weights ({stem}*.bin); --allow_pickle reads them")
        if single.exists():  # takes precedence over an index, as in transformers
            return opener(single)
        return _open_indexed(folder, index, opener)
    raise InputError(f"{folder}: no model.safetensors, model.safetensors.index.json, .gguf or pytorch_model.bin")


def _open_indexed(folder: Path, index: Path, opener) -> dict[str, Tensor]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index}: 'weight_map' should map tensor names to file names")
    tensors: dict[str, Tensor] = {}
    weight_map = {name: shard for name, shard in weight_map.items() if not IGNORED.fullmatch(name)}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in opener(_shard_path(folder, index, shard)).items():
            if name in tensors:
                raise InputError(f"{folder}: tensor {name!r} is in both {tensors[name].file} and {shard}")
            if weight_map.get(name) != shard:
                raise InputError(f"{index}: tensor {name!r} of {shard} is listed under {weight_map.get(name)!r}")
            tensors[name] = tensor
    return tensors  # the index may name more: `check_tensors` misses those that the model needs


def _shard_path(folder: Path, index: Path, shard: str) -> Path:
    """Return the shard's path; its name must be a plain file name in the folder. Raises InputError."""
    if Path(shard).name != shard or shard in ("", ".."):
        raise InputError(f"{index}: shard name {shard!r} is not a plain file name")
    path = folder / shard
    if not os.path.exists(path):  # Path's own raises for a name that is too long
        raise InputError(f"{index}: names the shard {shard!r}, which is not in the folder")
    return path


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Open a safetensors file. Raises InputError for a damaged file and for types that are not floating."""
    check_regular(path)
    try:
        with path.open("rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if start > HEADER_BYTES:
                raise InputError(f"{path}: a header of {start:,} bytes is no safetensors file's; download it again")
            header = parse_json(f.read(start - 8), f"{path}, header")
            _check_length(path, header, start)  # of a sparse file of a terabyte, the library's mapping would fail
            with safe_open(path, "np"):  # the library checks the whole header, and the length again
                pass
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e}); copy or download it again") from None

    def read(name: str, index: Index) -> np.ndarray:
        shape, dtype = header[name]["shape"], np.dtype(_DTYPES[header[name]["dtype"]])
        if index and any(s.stop - s.start < n for s, n in zip(index[1:], shape[1:], strict=True)):
            # Parts of rows are not contiguous. The file is opened for each read, because a mapping counts as memory of
            # this process while it exists.
            with safe_open(path, "np") as f:
                return f.get_slice(name)[index]
        # Whole rows are contiguous. Reading is three times as fast as the library's mapping of the file.
        first, shape = (index[0].start, (index[0].stop - index[0].start, *shape[1:])) if index else (0, shape)
        at = start + header[name]["data_offsets"][0] + first * math.prod(shape[1:]) * dtype.itemsize
        values = np.fromfile(path, dtype, math.prod(shape), offset=at)
        if values.size < math.prod(shape):
            raise InputError(f"{path}: could not be read to the end of tensor {name!r}; copy or download it again")
        return values.reshape(shape)

    header.pop("__metadata__", None)
    kinds = {name: (about["shape"], _DTYPES.get(about["dtype"])) for name, about in header.items()}
    return _tensors(path, kinds, read)


def _check_length(path: Path, header: Any, start: int) -> None:
    """Refuse a safetensors file that is longer than its header tells. Raises InputError."""
    tensors = [about for name, about in header.items() if name != "__metadata__"] if isinstance(header, dict) else []
    offsets = [about.get("data_offsets") for about in tensors if isinstance(about, dict)]
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2 and type(pair[1]) is int]
    if (size := path.stat().st_size) > (end := start + max(ends, default=0)):
        raise InputError(
            f"{path}: not a whole safetensors file (of {size:,} bytes, its header describes {end:,}); copy or download "
            "it again"
        )


def _open_bin(path: Path) -> dict[str, Tensor]:
    state = read_torch(path, "holds {}, not plain tensors: save the model's state_dict(), or use safetensors")
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}; save the model's state_dict() in it")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise InputError(f"{path}: has a {type(name).__name__} for a name; save the model's state_dict() in it")
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name!r} is not a dense tensor; save the model's state_dict() alone")
    floating = {np.dtype(kind) for kind in _DTYPES.values()}
    kinds = {name: (t.shape, t.dtype if t.dtype in floating else None) for name, t in state.items()}
    return _tensors(path, kinds, lambda name, index: state[name].read(index))


def _tensors(path: Path, kinds: dict[str, tuple[Iterable[int], Any]], read) -> dict[str, Tensor]:
    """Describe a file's tensors, given by (shape, type), without buffers of no effect. Raises InputError."""
    found = {name: kind for name, kind in kinds.items() if not IGNORED.fullmatch(name)}
    for name, (_, dtype) in found.items():
        if dtype is None:
            raise InputError(
                f"{path}: tensor {name!r} is not of a floating type (quantized checkpoints are not supported); give "
                "the model that it was made of, in float32, bfloat16 or float16"
            )
    return {
        name: Tensor(tuple(shape), np.dtype(dtype), file=path.name, read=functools.partial(read, name))
        for name, (shape, dtype) in found.items()
    }
