"""Convert an opened model: an HF folder (or GGUF) to a Flax folder, and back."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.base.errors import InputError
from llama_jax.base.files import write_json
from llama_jax.data.tokenizer import copy_tokenizer, open_tokenizer
from llama_jax.distributed import sharding, storage
from llama_jax.hf import manifest, peft
from llama_jax.hf.digests import Entry
from llama_jax.hf.finite import check_written
from llama_jax.hf.names import name_table
from llama_jax.hf.source import FLAX_JSON, Source, compare_digests, dtype_summary, numpy_dtype
from llama_jax.hf.tensor import Tensor
from llama_jax.hf.writer import hf_tensors, write_config, write_weights
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, merge
from llama_jax.model.llama import RunOptions
from llama_jax.model.lora import merged
from llama_jax.model.prompt_logits import prompt_logits
from llama_jax.model.roles import Params
from llama_jax.reporting.progress import byte_bar, say

Tensors = Iterable[tuple[str, np.ndarray]]


def to_flax(
    source: Source, folder: Path, dtype: np.dtype | None, verify: bool, allow_nonfinite: bool = False
) -> list[str]:
    """Write a Flax folder; return the names of tensors that differ from the source's, found only if `verify`."""
    mesh, run = sharding.make_mesh(), RunOptions(param_dtype=dtype or np.dtype(np.float32))
    tokenizer = source.tokenizer_to_copy()
    with byte_bar("reading weights", source.bytes) as bar:
        params = source.load(run, mesh, bar.update)
    if not allow_nonfinite:  # a number of float32 may be Inf in float16
        check_written(params, name_table(source.config), folder)
    (folder / FLAX_JSON).unlink(missing_ok=True)  # written last: without it this is no Flax folder
    storage.save_params(folder, params)
    del params
    summary = dtype_summary(source.dtypes)
    write_config(folder, source.raw, source.generation, source.config, numpy_dtype(summary["dtype"]))
    copy_tokenizer(tokenizer, folder)
    write_json(folder / FLAX_JSON, {"stored_dtype": run.param_dtype.name, **summary})
    if not verify:
        return []
    saved = storage.load_params(folder, define(source.config, run, mesh).params)
    read = ((name, source.tensors[name].read(())) for name, _ in hf_tensors(saved, source.config))
    return compare(source, read, lambda name: run.param_dtype, hf_tensors(saved, source.config))


def to_hf(
    source: Source,
    folder: Path,
    dtype: np.dtype | None,
    verify: bool,
    allow_nonfinite: bool = False,
    flags: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write an HF folder, each tensor in `dtype` or the type of its original file; return the names of tensors that
    differ on disk, found only if `verify`. The manifest shows `flags`; None writes none."""
    dtypes = dict.fromkeys(source.dtypes, dtype) if dtype else source.dtypes
    mesh = sharding.make_mesh()
    params = source.load(RunOptions(param_dtype=source.stored_dtype), mesh)
    size = sum(math.prod(shape) * dtypes[name].itemsize for name, (_, shape) in name_table(source.config).items())
    with byte_bar("writing weights", size) as bar:
        entries = write_weights(folder, params, source.config, dtypes, bar.update, allow_nonfinite=allow_nonfinite)
    _write_others(source, folder, source.config, dtypes)
    if flags is not None:
        _write_manifest(source, folder, params, source.config, dtypes, entries, mesh, flags)
    if not verify:
        return []
    written = Source(folder, allow_nonfinite=allow_nonfinite).tensors
    actual = ((name, written[name].read(())) for name in dtypes)
    return compare(source, hf_tensors(params, source.config), dtypes.__getitem__, actual)


def merge_adapter(
    source: Source,
    adapter: peft.Adapter,
    tensors: dict[str, Tensor],
    folder: Path,
    dtype: np.dtype | None,
    flags: Mapping[str, Any],
    allow_nonfinite: bool = False,
) -> None:
    """Write the HF folder of a model whose weights have an adapter's products added, in float32 and rounded once to
    `dtype` or to the type of the model's file; `tensors` are the adapter's. The manifest shows `flags`.

    Raises InputError."""
    mesh, run, config = sharding.make_mesh(), RunOptions(lora=adapter.lora), adapter.resized(source.config)
    trained, rest = peft.load_adapter(tensors, adapter.lora, config, define(config, run, mesh).params)
    with byte_bar("reading weights", source.bytes) as bar:
        params = merge(source.load(run, mesh, bar.update, like=rest), trained)
    with jax.set_mesh(mesh):
        params = merged(params, adapter.lora)
    dtypes = dict.fromkeys(source.dtypes, dtype) if dtype else source.dtypes
    entries = write_weights(folder, params, config, dtypes, allow_nonfinite=allow_nonfinite)
    _write_others(source, folder, config, dtypes)
    _write_manifest(source, folder, params, config, dtypes, entries, mesh, flags)


def _write_others(source: Source, folder: Path, config: LlamaConfig, dtypes: dict[str, np.dtype]) -> None:
    """Write the files of an HF folder beside the weights."""
    write_config(folder, source.raw, source.generation, config, numpy_dtype(dtype_summary(dtypes)["dtype"]))
    copy_tokenizer(source.tokenizer_to_copy(), folder)


def _write_manifest(
    source: Source,
    folder: Path,
    params: Params,
    config: LlamaConfig,
    dtypes: dict[str, np.dtype],
    entries: dict[str, Entry],
    mesh: Mesh,
    flags: Mapping[str, Any],
) -> None:
    """Write the manifest of an HF folder that is complete; of a problem, a warning."""
    tokenizer = None
    with contextlib.suppress(InputError):
        tokenizer = open_tokenizer(source.tokenizer_folder)
    vocab_size = config.vocab_size
    prompts, columns = manifest.choose_prompts(tokenizer, vocab_size), manifest.choose_columns(vocab_size)
    read = manifest.reader(params, config, dtypes)
    with manifest.warning_without(folder, "repeat the command to write it"):
        logits = prompt_logits(config, None, mesh, [prompt.ids for prompt in prompts], columns, read)
        manifest.write_manifest(folder, entries, prompts, columns, logits, flags)


def compare(source: Source, original: Tensors, dtype_of: Callable[[str], np.dtype], actual: Tensors) -> list[str]:
    """Return the names of tensors that are not the original's in the type to store; report the digest if all are."""
    rounded = set()

    def expected() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in original:
            stored = array.astype(dtype_of(name), copy=False)
            if stored is not array and not np.array_equal(stored.astype(array.dtype), array):
                rounded.add(stored.dtype.name)
            yield name, stored

    count, digest, different = compare_digests(expected(), actual)
    if not different:
        after = f" after rounding to {' and '.join(sorted(rounded))}" if rounded else ""
        say(f"verified: {count} tensors read back equal to those of {source.folder}{after}; SHA-256 over all {digest}")
    return different
