"""Gather the facts of a run that its page shows."""

import platform
import shlex
import sys
from typing import Any

import jax

from llama_jax.base.secrets import without_secrets
from llama_jax.base.versions import PACKAGES, versions
from llama_jax.data.doctor import as_lines, diagnose
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import memory_use
from llama_jax.model.rope import covered_positions
from llama_jax.plan.explain import first_examples
from llama_jax.run.start import Run
from llama_jax.setup.arguments import changed_flags
from llama_jax.setup.job import Job

EXAMPLES, LONGEST = 3, 1000  # examples on the page, and tokens of one


def known_facts(run: Run) -> dict[str, Any]:
    """Return the facts that are known when a run starts, as JSON values."""
    prepared, plan = run.prepared, run.plan
    args, job, mesh = prepared.args, prepared.job, prepared.mesh
    adapter = job.adapter.size(job.config) if job.adapter else None
    return {
        "name": prepared.output_dir.resolve().name,
        "log_history": run.log.values["log_history"],
        "updates": job.order.updates,
        "command": shlex.join(without_secrets(["python", *sys.argv])),
        "flags": changed_flags(args),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "model": {
            "path": args.model_name_or_path,
            "parameters": job.config.num_parameters,
            **({"trained parameters of the adapter": adapter} if adapter else {}),
            "type": prepared.facts.dtype,
            "matrix products": args.products or prepared.facts.dtype,
            "attention": plan.attention,
            "recomputation": f"--remat {plan.run.remat}",
            "blocks": ", ".join(f"{rows}x{length}" for rows, length in plan.batches.shapes),
            "layers": f"{job.config.num_hidden_layers}, {'stacked' if plan.run.scan_layers else 'one by one'}",
        },
        "device": {
            "platform": prepared.platform,
            "kind": mesh.devices.flat[0].device_kind,
            "devices": mesh.size,
            "processes": jax.process_count(),
            "mesh": sharding.describe_mesh(mesh),
            "memory": memory_use()[1],
        },
    }


def found_facts(job: Job) -> dict[str, Any]:
    """Return facts that take a moment: the lengths of the examples, problems among them, the first examples."""
    limit = job.args.model_max_length
    found = diagnose(
        job.form, job.examples, [], None, job.tokenizer, limit, covered_positions(job.config), job.held_out + 1
    )
    lines = [line for line in as_lines(found)[1:] if line[0]]
    if full := int((job.examples.lengths == limit).sum()):
        lines.append(
            ("at the limit", f"{full:,} examples have --model_max_length {limit} tokens: most of them were cut")
        )
    shown = [{"title": title, "spans": spans} for title, spans in first_examples(job, EXAMPLES, LONGEST)]
    return {"data": {**found, "lines": lines}, "examples": shown}
