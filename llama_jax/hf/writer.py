"""Write an HF folder that transformers loads anywhere."""

import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from llama_jax.base.bucket import local_file
from llama_jax.base.files import write_json
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.distributed import sharding
from llama_jax.distributed.processes import exchange, is_first
from llama_jax.hf.digests import Entry, describe
from llama_jax.hf.finite import check_written
from llama_jax.hf.manifest import ADAPTER_CONFIG, remove_manifest
from llama_jax.hf.names import check_names, name_table, without_layer
from llama_jax.model.config import FAMILIES, LlamaConfig
from llama_jax.model.roles import Params, is_stacked

SHARD_BYTES = 5 * 10**9  # transformers' "5GB"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_INDEX = "model.safetensors.index.json"
_ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")  # transformers would load it on top


def hf_tensors(
    params: Params, config: LlamaConfig, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield HF names and host arrays of the wanted tensors, one at a time, without padding and with layers unstacked.

    With several processes, each gathers all tensors onto its devices, and copies its wanted tensors to the host.
    """
    check_names(params, config)
    return host_arrays(params, name_table(config), wanted)


def host_arrays(
    params: Params,
    table: dict[str, tuple[tuple[str | int, ...], tuple[int, ...]]],
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the parameters of a table, which maps names to paths and shapes, as `hf_tensors` does."""
    stacked = is_stacked(params)
    for name, (path, shape) in table.items():
        leaf: Any = params
        for key in without_layer(path) if stacked else path:
            leaf = leaf[key]
        array = leaf[path[1]] if stacked and path[0] == "layers" else leaf
        array = jax.block_until_ready(sharding.whole(array))
        if wanted(name):
            yield name, np.asarray(array)[tuple(map(slice, shape))]


def write_weights(
    folder: Path,
    params: Params,
    config: LlamaConfig,
    dtypes: dict[str, np.dtype],
    progress: Callable[[int], None] = lambda bytes_written: None,
    shard_bytes: int = SHARD_BYTES,
    allow_nonfinite: bool = False,
) -> dict[str, Entry]:
    """Write `model.safetensors`, or shards of at most `shard_bytes` with an index; `dtypes` by name. Return the digest
    and the file of each tensor.

    Files get their names when all are complete; other files of an earlier export are removed, an adapter's too, and
    its manifest first.
    Processes deal the shards among themselves, and each holds one at a time. Raises RunError before the first file for
    a NaN or Inf, unless `allow_nonfinite`.
    """
    if not allow_nonfinite:
        check_written(params, name_table(config), folder, dtypes)
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, (_, shape) in name_table(config).items()}
    files = plan_shards(sizes, shard_bytes)
    try:
        written = _write_shards(folder, files, params, config, dtypes, progress)
    except BaseException:
        for file in files:
            (folder / f"{file}.tmp").unlink(missing_ok=True)
        raise
    entries = {name: entry for theirs in exchange(json.dumps(written)) for name, entry in json.loads(theirs).items()}
    if not is_first():
        return entries
    remove_manifest(folder)
    for name in _ADAPTER:
        (folder / name).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        if _WEIGHTS.fullmatch(old.name) and old.name not in files:
            old.unlink()
    for file in files:
        (folder / f"{file}.tmp").replace(folder / file)
    write_index(folder, files, sum(sizes.values()))
    return entries


def plan_shards(sizes: dict[str, int], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Return {file name: tensor names}, in order, for tensors of these sizes; a file over the limit has one tensor."""
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
    """Write the index of several files; a single file has none."""
    if len(files) == 1:
        (folder / _INDEX).unlink(missing_ok=True)
        return
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(folder / _INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_shards(
    folder: Path, files: dict[str, list[str]], params, config: LlamaConfig, dtypes, progress
) -> dict[str, Entry]:
    """Write this process's share of the shards, and return the entries of its tensors."""
    mine = [*files][jax.process_index() :: jax.process_count()]
    file_of = {name: file for file in mine for name in files[file]}
    shard: dict[str, np.ndarray] = {}
    entries: dict[str, Entry] = {}
    writing: Future | None = None

    def write(file: str, shard: dict[str, np.ndarray]) -> None:
        with local_file(folder / f"{file}.tmp") as path:
            save_file(shard, path, metadata={"format": "pt"})
            path.chmod(0o644)  # safetensors writes for the owner only
        entries.update({name: {"file": file, **describe(array)} for name, array in shard.items()})
        progress(sum(a.nbytes for a in shard.values()))

    with ThreadPoolExecutor(1) as pool:  # the others' tensors are gathered meanwhile
        for name, array in hf_tensors(params, config, file_of.__contains__):
            if writing is not None:
                writing.result()
                writing = None
            shard[name] = np.ascontiguousarray(array.astype(dtypes[name], copy=False))
            if len(shard) == len(files[file_of[name]]):
                writing, shard = pool.submit(write, file_of[name], shard), {}
        if writing is not None:
            writing.result()
    return entries


def write_config(
    folder: Path, raw: dict[str, Any], generation: dict[str, Any], config: LlamaConfig, dtype: np.dtype
) -> None:
    """Write `config.json` as read, with the true vocabulary and type, and `generation_config.json`.

    `auto_map` is left out: it names Python files, which are not copied, for what is a plain model of its family here.
    """
    out = {**raw, **_old_rope(raw, config), "vocab_size": config.vocab_size}
    out["architectures"] = [FAMILIES[config.model_type].architecture]
    out.pop("auto_map", None)
    for key in {"torch_dtype", *(raw.keys() & {"dtype"})}:  # transformers 5's own name is unknown to 4.37
        out[key] = dtype.name
    write_json(folder / "config.json", out)
    write_json(folder / "generation_config.json", generation)


def align_special_tokens(
    raw: dict[str, Any], generation: dict[str, Any], tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `config.json` and `generation_config.json` with the tokenizer's ids, as the Trainer of transformers 5
    aligns them: end tokens that `generation_config.json` or a list of `config.json` has stay, behind the tokenizer's.
    """
    raw, generation = dict(raw), dict(generation)
    defaults = FAMILIES[raw["model_type"]].special_ids
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        new, old, old_generation = (
            getattr(tokenizer, key),
            raw.get(key, defaults.get(key)),
            _as_list(generation.get(key)),
        )
        if new is None or (new in _as_list(old) and new in old_generation):
            continue
        raw[key] = generation[key] = new
        if key == "eos_token_id":
            generation[key] = [new, *(i for i in old_generation if i not in (new, None))]
            if isinstance(old, list):
                raw[key] = [new, *(i for i in old if i != new)]
    return raw, generation


def _as_list(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def _old_rope(raw: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` as transformers 4.37 reads them, where the config has them otherwise.

    4.37 knows `linear` and `dynamic`, by two keys exactly. It refuses other types, but only in `rope_scaling`. 5 reads
    these keys too, before its own `rope_parameters`.
    """
    rope, out = config.rope, {}  # type: Any, dict[str, Any]
    if rope.rope_theta != (raw.get("rope_theta") or 10000.0):
        out["rope_theta"] = rope.rope_theta
    if rope.rope_type in ("linear", "dynamic"):
        out["rope_scaling"] = {"type": rope.rope_type, "factor": float(rope.factor)}
    elif raw.get("rope_scaling") and rope.rope_type == "default":
        out["rope_scaling"] = None
    elif not raw.get("rope_scaling") and rope.rope_type != "default":
        out["rope_scaling"] = {k: v for k, v in raw["rope_parameters"].items() if k != "rope_theta"}
    return out
