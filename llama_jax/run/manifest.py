"""Write the manifest of a run's export: what its receiver compares (`hf/manifest.py`)."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from llama_jax.base.errors import FailedAlone
from llama_jax.base.secrets import without_query
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.distributed import processes
from llama_jax.hf import manifest
from llama_jax.hf.digests import Entry
from llama_jax.hf.names import name_table
from llama_jax.model.definition import define, merge, pick, without
from llama_jax.model.llama import RunOptions
from llama_jax.model.lora import Lora
from llama_jax.model.prompt_logits import Read, prompt_logits
from llama_jax.model.roles import Params, is_stacked
from llama_jax.run.checkpoint import find_steps
from llama_jax.run.prepare import Prepared
from llama_jax.setup.arguments import changed_flags


def write_run_manifest(
    prepared: Prepared,
    params: Params,
    tensors: dict[str, Entry],
    tokenizer: Tokenizer | None,
    lora: Lora | None = None,
) -> None:
    """Write the manifest of the exported folder, by the first process' `tensors` and the exported tokenizer's prompts.
    All processes must call this.

    `lora` is the adapter as its files hold it, None for a model's folder. Its base is read from its files again, a
    layer at a time: the run may hold it rounded, or in 4 bits. The export is complete before: a problem is a warning.
    Of several processes, one that cannot compute the logits ends the run, since the others wait for it.
    """
    job, source, mesh = prepared.job, prepared.source, prepared.mesh
    if lora is None:
        dtype = np.dtype(prepared.planner.run.param_dtype)
        read = manifest.reader(params, job.config, dict.fromkeys(name_table(job.config), dtype))
    else:
        read = _adapted(prepared, params, lora)
    prompts = manifest.choose_prompts(tokenizer, job.config.vocab_size)
    columns = manifest.choose_columns(job.config.vocab_size)
    with manifest.warning_without(prepared.output_dir, _remedy(prepared)):
        if lora:
            with processes.agreed():
                source.check_unchanged()
        try:
            logits = prompt_logits(job.config, lora, mesh, [prompt.ids for prompt in prompts], columns, read)
        except Exception as e:
            if jax.process_count() == 1:
                raise
            raise FailedAlone from e
        if not processes.is_first():
            return
        base = None
        if lora:
            base = manifest.base_of(job.args.model_name_or_path, source.tensors)
            source.check_unchanged()
        names = [Path(without_query(name)).name for name in job.args.data_path or []]
        manifest.write_manifest(
            prepared.output_dir,
            tensors,
            prompts,
            columns,
            logits,
            flags=changed_flags(job.args),
            data={"names": names, "digest": job.data_digest},
            base=base,
        )


def _remedy(prepared: Prepared) -> str:
    """Return the way to a manifest that is missing."""
    if prepared.args.export_only:
        return "repeat the command to write it"
    if prepared.job.order.updates in find_steps(prepared.output_dir):
        return "repeat the command with --export_only True to write it"
    return "without a checkpoint of the last update it cannot be written later"


def _adapted(prepared: Prepared, params: Params, lora: Lora) -> Read:
    """Return how to read a base model from its files, and the adapter from the run's parameters."""
    job, source, mesh = prepared.job, prepared.source, prepared.mesh
    plain = RunOptions()
    base, resized = (define(config, plain, mesh).params for config in (source.config, job.config))
    whole = define(job.config, replace(plain, lora=lora), mesh).params

    def read(part: str | int) -> Params:
        if isinstance(part, str):  # a resized vocabulary is saved too
            return {part: params[part]} if part in lora.saved else source.load(plain, mesh, like={part: base[part]})
        layer = manifest.layer_of(params, part) if is_stacked(params) else params["layers"][part]
        own = pick(layer, without(whole["layers"][part], resized["layers"][part]))
        loaded = source.load(plain, mesh, like={"layers": {part: base["layers"][part]}})
        return {"layers": {part: merge(loaded["layers"][part], own)}}

    return read
