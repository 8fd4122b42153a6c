"""Export the model or the adapter of a run, and name the way to go on where that fails."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from llama_jax.base.errors import FailedAlone, InputError, RunError, disk_problem
from llama_jax.base.files import write_json
from llama_jax.data.tokenizer import Tokenizer, copy_tokenizer, open_tokenizer
from llama_jax.distributed import processes
from llama_jax.hf import peft
from llama_jax.hf.digests import Entry
from llama_jax.hf.finite import check_written
from llama_jax.hf.names import name_table
from llama_jax.hf.remote import FLAX_JSON
from llama_jax.hf.writer import align_special_tokens, host_arrays, write_config, write_weights
from llama_jax.model.roles import Params
from llama_jax.reporting.progress import byte_bar
from llama_jax.run.checkpoint import find_steps
from llama_jax.run.manifest import write_run_manifest
from llama_jax.run.prepare import Prepared


def export(prepared: Prepared, params: Params) -> None:
    """Write the HF folder: weights in the parameters' type, config, and the job's tokenizer, or the files of the
    tokenizer's folder; last its manifest.

    Of a run that trains an adapter, write PEFT's folder."""
    job, source, output_dir = prepared.job, prepared.source, prepared.output_dir
    dtype = np.dtype(prepared.planner.run.param_dtype)
    if job.adapter is not None:
        lora = job.adapter.lora
        if job.config.vocab_size != source.config.vocab_size:  # as PEFT: a base that is loaded again lacks the rows
            lora = dataclasses.replace(lora, saved=peft.SAVED[: 1 if job.config.tie_word_embeddings else 2])
        table = peft.name_table(lora, job.config)
        if not job.args.allow_nonfinite:
            check_written(params, table, output_dir)
        tensors, entries = list(host_arrays(params, table)), dict[str, Entry]()
        if processes.is_first():
            entries = peft.write_adapter(output_dir, tensors, job.adapter)
            write_tokenizer(prepared, output_dir)
        write_run_manifest(prepared, params, entries, exported_tokenizer(prepared), lora)
        return
    with byte_bar("writing weights", job.config.num_parameters * dtype.itemsize, prepared.quiet) as bar:
        entries = write_weights(
            output_dir,
            params,
            job.config,
            dict.fromkeys(name_table(job.config), dtype),
            bar.update,
            allow_nonfinite=job.args.allow_nonfinite,
        )
    if processes.is_first():
        write_model_config(prepared, output_dir)
        write_tokenizer(prepared, output_dir)
    write_run_manifest(prepared, params, entries, exported_tokenizer(prepared))


@contextlib.contextmanager
def explaining(prepared: Prepared, step: int, save: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn an error of the disk while update `step` is exported into a RunError that names the way to go on.

    First, `save` tries to write a checkpoint of it: what ended the export may be gone, as a full disk. One of several
    processes cannot save alone.
    """
    try:
        yield
    except Exception as e:
        problem = disk_problem(e)
        if isinstance(e, OSError) and not problem:
            problem = f"writing failed: {e.strerror}: {e.filename}"
        if not problem:
            raise
        if jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the line below names the last checkpoint
                save()
        steps = find_steps(prepared.output_dir)
        if step in steps:
            on = f"checkpoint-{step} holds the trained state: make room, and repeat the command with --export_only True"
        elif steps:
            on = (
                f"make room, and go on from checkpoint-{steps[-1]} with --resume_from_checkpoint True, or export it as "
                "it is with --export_only True"
            )
        else:
            on = "no checkpoint is saved: make room, and start anew"
        error = RunError(f"the export failed: {problem}; {on}")
        if jax.process_count() > 1:
            raise FailedAlone from error
        raise error from None


def write_model_config(prepared: Prepared, folder: Path) -> None:
    """Write the trained model's `config.json` and `generation_config.json`."""
    job, raw, generation = prepared.job, prepared.source.raw, prepared.source.generation
    if job.args.hf_compat == "5" and (tokenizer := exported_tokenizer(prepared)):
        raw, generation = align_special_tokens(raw, generation, tokenizer)
    write_config(folder, raw, generation, job.config, np.dtype(prepared.planner.run.param_dtype))


def write_tokenizer(prepared: Prepared, folder: Path) -> None:
    """Write the job's tokenizer, or the files of the tokenizer's folder."""
    if prepared.job.tokenizer is not None:
        prepared.job.tokenizer.save(folder)
    else:
        copy_tokenizer(prepared.tokenizer_folder, folder)


def model_files(prepared: Prepared) -> dict[str, bytes]:
    """Return the small files of the model or adapter to export, by name: a checkpoint with them is a model too."""
    with tempfile.TemporaryDirectory(prefix="llama_jax-") as name:
        folder = Path(name)
        if prepared.job.adapter is None:
            write_model_config(prepared, folder)
            dtype = np.dtype(prepared.planner.run.param_dtype).name
            write_json(folder / FLAX_JSON, {"stored_dtype": dtype, "dtype": dtype, "dtypes": {}})
        elif prepared.job.config.vocab_size == prepared.source.config.vocab_size:  # else new rows, frozen, are missing
            peft.write_config(folder, prepared.job.adapter)
        write_tokenizer(prepared, folder)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def exported_tokenizer(prepared: Prepared) -> Tokenizer | None:
    """Return the job's tokenizer, or that whose files are exported as they are; None where none opens."""
    job, folder = prepared.job, prepared.tokenizer_folder
    with contextlib.suppress(InputError):
        return job.tokenizer or (open_tokenizer(folder, job.args.hf_compat) if folder else None)
    return None
