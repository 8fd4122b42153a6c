#!/usr/bin/env python3
"""Convert an HF folder (or a .gguf file) to a Flax checkpoint, and back with --to_hf."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError, Parser, run_command
from llama_jax.base.files import make_output_dir, write_json
from llama_jax.reporting.progress import byte_bar, say


def main(argv: list[str]) -> int:
    args = parse(argv)
    from llama_jax.distributed.platform import set_up_jax
    from llama_jax.hf.source import Source, numpy_dtype, refuse_other_kind

    set_up_jax(use_cpu=True)
    dtype = numpy_dtype(args.dtype) if args.dtype else None
    source = Source(Path(args.model_name_or_path), args.allow_pickle)
    if args.to_hf and not source.is_flax:
        raise InputError(f"{source.folder}: --to_hf takes a folder made by this program; this one is HF's already")
    if source.is_flax and not args.to_hf:
        raise InputError(f"{source.folder}: is a Flax folder already; --to_hf makes an HF folder of it")
    folder = Path(args.output_dir).expanduser()
    if folder.resolve() == source.folder.resolve():
        raise InputError(f"--output_dir {folder}: is the folder that is read; name another")
    refuse_other_kind(folder, flax=not args.to_hf)
    make_output_dir(folder)
    different = (to_hf if args.to_hf else to_flax)(source, folder, dtype, args.verify)
    if different:
        say(f"error: {len(different)} tensors differ after writing: {', '.join(different[:4])}")
        return 1
    say(f"{source.folder} -> {folder}")
    return 0


def to_flax(source: Any, folder: Path, dtype: np.dtype | None, verify: bool) -> list[str]:
    """Write a Flax folder; returns the names of tensors that were found to differ from the source's."""
    from llama_jax.data.tokenizer import copy_tokenizer
    from llama_jax.distributed import sharding, storage
    from llama_jax.hf.source import FLAX_JSON, dtype_summary, numpy_dtype
    from llama_jax.hf.writer import hf_tensors, write_config
    from llama_jax.model.definition import define
    from llama_jax.model.llama import RunOptions

    mesh, run = sharding.make_mesh(), RunOptions(param_dtype=dtype or np.dtype(np.float32))
    tokenizer = source.tokenizer_to_copy()
    with byte_bar("reading weights", source.bytes) as bar:
        params = source.load(run, mesh, bar.update)
    (folder / FLAX_JSON).unlink(missing_ok=True)  # written last: without it this is no Flax folder
    storage.save_params(folder, params)
    del params
    summary = dtype_summary(source.dtypes)
    write_config(folder, source.folder, source.raw, source.config, numpy_dtype(summary["dtype"]))
    copy_tokenizer(tokenizer, folder)
    write_json(folder / FLAX_JSON, {"stored_dtype": run.param_dtype.name, **summary})
    if not verify:
        return []
    saved = storage.load_params(folder, define(source.config, run, mesh).params)
    read = ((name, source.tensors[name].read(())) for name, _ in hf_tensors(saved, source.config))
    return compare(source, read, lambda name: run.param_dtype, hf_tensors(saved, source.config))


def to_hf(source: Any, folder: Path, dtype: np.dtype | None, verify: bool) -> list[str]:
    """Write an HF folder, each tensor in the type it once came in; returns the names of tensors that differ on disk."""
    from llama_jax.data.tokenizer import copy_tokenizer
    from llama_jax.distributed import sharding
    from llama_jax.hf.names import name_table
    from llama_jax.hf.readers import open_checkpoint
    from llama_jax.hf.source import dtype_summary, numpy_dtype
    from llama_jax.hf.writer import hf_tensors, write_config, write_weights
    from llama_jax.model.llama import RunOptions

    dtypes = dict.fromkeys(source.dtypes, dtype) if dtype else source.dtypes
    params = source.load(RunOptions(param_dtype=source.stored_dtype), sharding.make_mesh())
    size = sum(math.prod(shape) * dtypes[name].itemsize for name, (_, shape) in name_table(source.config).items())
    with byte_bar("writing weights", size) as bar:
        write_weights(folder, params, source.config, dtypes, bar.update)
    write_config(folder, source.folder, source.raw, source.config, numpy_dtype(dtype_summary(dtypes)["dtype"]))
    copy_tokenizer(source.folder, folder)
    if not verify:
        return []
    written = open_checkpoint(folder).tensors
    actual = ((name, written[name].read(())) for name in dtypes)
    return compare(source, hf_tensors(params, source.config), dtypes.__getitem__, actual)


def compare(
    source: Any, original: Iterable[tuple[str, np.ndarray]], dtype_of: Callable[[str], np.dtype], actual: Iterable
) -> list[str]:
    """The names of tensors that are not what the source's become in the type to store."""
    from llama_jax.hf.source import compare_digests

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


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="convert_torch_to_flax.py", description=__doc__)
    parser.add_argument(
        "--model_name_or_path", required=True, help="HF folder or .gguf file; with --to_hf a Flax folder"
    )
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--to_hf", action="store_true", help="write an HF folder from a Flax one")
    parser.add_argument("--dtype", help="type to store (float32), or with --to_hf to write (that of the original)")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare SHA-256 digests")
    parser.add_argument("--allow_pickle", action="store_true", help="read pytorch_model*.bin (torch >= 2.10)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
