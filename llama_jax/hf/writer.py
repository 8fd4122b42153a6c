"""Writing an HF folder that transformers loads anywhere."""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from llama_jax.config import LlamaConfig
from llama_jax.files import write_json
from llama_jax.hf.names import name_table

SHARD_BYTES = 5 * 10**9  # transformers' "5GB"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_INDEX = "model.safetensors.index.json"


def hf_tensors(params: dict[str, Any], config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """HF names and host arrays, one at a time; padding is stripped, stacked layers are unstacked."""
    stacked = "self_attn" in params["layers"]
    for name, (path, shape) in name_table(config).items():
        leaf: Any = params
        layer = path[1] if stacked and path[0] == "layers" else None
        for key in path:
            leaf = leaf if key is layer else leaf[key]
        array = leaf if layer is None else leaf[layer]
        yield name, np.asarray(jax.device_get(array))[tuple(map(slice, shape))]


def write_weights(
    folder: Path,
    params: dict[str, Any],
    config: LlamaConfig,
    dtypes: dict[str, np.dtype],
    progress: Callable[[int], None] = lambda bytes_written: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`model.safetensors`, or shards of at most `shard_bytes` with an index; `dtypes` by name.

    Files get their names when all are whole; those of an earlier export that are not written again are removed.
    The host holds one shard at a time.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, (_, shape) in name_table(config).items()}
    files = plan_shards(sizes, shard_bytes)
    try:
        _write_shards(folder, files, hf_tensors(params, config), dtypes, progress)
    except BaseException:
        for file in files:
            (folder / f"{file}.tmp").unlink(missing_ok=True)
        raise
    for old in folder.glob("model*.safetensors"):
        if _WEIGHTS.fullmatch(old.name) and old.name not in files:
            old.unlink()
    for file in files:
        (folder / f"{file}.tmp").chmod(0o644)  # safetensors writes for the owner only
        (folder / f"{file}.tmp").rename(folder / file)
    write_index(folder, files, sum(sizes.values()))


def plan_shards(sizes: dict[str, int], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> tensor names, in order, for tensors of so many bytes: no file over the limit but for one tensor."""
    plan: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if plan[-1] and used + size > shard_bytes:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used += size
    if len(plan) == 1:
        return {"model.safetensors": plan[0]}
    return {f"model-{i:05d}-of-{len(plan):05d}.safetensors": names for i, names in enumerate(plan, start=1)}


def write_index(folder: Path, files: dict[str, list[str]], total_size: int) -> None:
    """The index of several files; none for one."""
    if len(files) == 1:
        (folder / _INDEX).unlink(missing_ok=True)
        return
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(folder / _INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_shards(folder: Path, files: dict[str, list[str]], source, dtypes, progress) -> None:
    for file, names in files.items():
        shard = {}
        for expected, (name, array) in zip(names, source, strict=False):
            assert name == expected
            shard[name] = np.ascontiguousarray(array.astype(dtypes[name], copy=False))
            if len(shard) == len(names):
                break
        save_file(shard, folder / f"{file}.tmp", metadata={"format": "pt"})
        progress(sum(a.nbytes for a in shard.values()))


def write_config(folder: Path, source: Path, raw: dict[str, Any], config: LlamaConfig, dtype: np.dtype) -> None:
    """`config.json` as it came in, with the true vocabulary and type, and `generation_config.json`."""
    out = {**raw, "vocab_size": config.vocab_size, "architectures": ["LlamaForCausalLM"]}
    out["dtype" if "dtype" in raw else "torch_dtype"] = dtype.name
    write_json(folder / "config.json", out)
    generation = source / "generation_config.json"
    if generation.exists():
        if generation.resolve() != (folder / generation.name).resolve():
            shutil.copyfile(generation, folder / generation.name)
    else:
        ids = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(k) is not None}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
