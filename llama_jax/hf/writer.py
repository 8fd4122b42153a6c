"""Writing an HF folder that transformers loads anywhere."""

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
_INDEX = "model.safetensors.index.json"


def hf_tensors(params: dict[str, Any], config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """HF names and host arrays, one at a time; rows that pad the vocabulary are stripped, stacked layers unstacked."""
    stacked = "self_attn" in params["layers"]
    for name, (path, shape) in name_table(config).items():
        leaf: Any = params
        layer = path[1] if stacked and path[0] == "layers" else None
        for key in path:
            leaf = leaf if key is layer else leaf[key]
        array = leaf if layer is None else leaf[layer]
        yield name, np.asarray(jax.device_get(array))[: shape[0]]


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
    plan: list[list[str]] = [[]]
    used = total = 0
    for name, (_, shape) in name_table(config).items():
        size = int(np.prod(shape)) * dtypes[name].itemsize
        if plan[-1] and used + size > shard_bytes:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used, total = used + size, total + size
    count = len(plan)
    files = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    source = hf_tensors(params, config)
    for file, names in zip(files, plan, strict=True):
        shard = {}
        for expected, (name, array) in zip(names, source, strict=False):
            assert name == expected
            shard[name] = np.ascontiguousarray(array.astype(dtypes[name], copy=False))
            if len(shard) == len(names):
                break
        save_file(shard, folder / f"{file}.tmp", metadata={"format": "pt"})
        progress(sum(a.nbytes for a in shard.values()))
    for old in folder.glob("model*.safetensors"):
        if old.name not in files:
            old.unlink()
    for file in files:
        (folder / f"{file}.tmp").chmod(0o644)  # safetensors writes for the owner only
        (folder / f"{file}.tmp").rename(folder / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (folder / _INDEX).unlink(missing_ok=True)


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
