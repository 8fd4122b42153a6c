"""Print the beginning and the end of a run."""

import jax
import numpy as np

from llama_jax.base.versions import versions
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import memory_use
from llama_jax.plan.planner import Plan, unrolled_layers
from llama_jax.reporting.progress import say
from llama_jax.reporting.run_report import PAGE
from llama_jax.reporting.speed import Speedometer
from llama_jax.run.checkpoint import find_steps
from llama_jax.run.prepare import Prepared


def say_header(prepared: Prepared) -> None:
    """Report the model, the devices and the length of the run."""
    args, job, mesh, dtype = prepared.args, prepared.job, prepared.mesh, prepared.facts.dtype
    computed = args.products or dtype
    held = f", projections in {job.quantization.bits} bits" if job.quantization else ""
    programs = ", ".join(f"{name} {version}" for name, version in versions("llama_jax", "jax").items())
    say(f"model: {job.config.num_parameters:,} parameters in {dtype}{held}, matrix products in {computed}; {programs}")
    if job.adapter is not None:
        lora, size = job.adapter.lora, job.adapter.size(job.config)
        whole = f", and {', '.join(lora.saved)} whole" if lora.saved else ""
        say(
            f"adapters: {size:,} parameters in float32 ({size / (job.config.num_parameters + size):.2%}) at "
            f"{len(lora.ranks)} projections are trained{whole}"
        )
    chosen = " (auto)" if args.mesh == "auto" and mesh.size > 1 else ""
    kind = "" if prepared.platform == "cpu" else f", {mesh.devices.flat[0].device_kind}"
    say(
        f"devices: {mesh.size} {prepared.platform} device(s) of {jax.process_count()} process(es), "
        f"mesh {sharding.describe_mesh(mesh)}{chosen}{kind}"
    )
    if (ranks := job.order.ranks) != (ways := sharding.batch_ways(mesh)):
        say(f"--world_size {ranks}: the updates of {ranks} device(s) of the HF Trainer; {ways} here divide the rows")
    rising = f", the first {job.warmup_updates:,} with a rising learning rate (warm-up)" if job.warmup_updates else ""
    tokens = job.order.reduce(np.add, job.examples.lengths, job.order.bounds).mean()
    say(
        f"training: {len(job.examples):,} examples, {job.order.updates:,} updates of {tokens:,.0f} tokens in the mean"
        f"{rising}"
    )


def say_plan(prepared: Prepared, plan: Plan, limit: int | None) -> None:
    """Report the choices for the devices: blocks, recomputation, the form of the layers; the memory that they need."""
    args, layers = prepared.args, prepared.job.config.num_hidden_layers
    shapes = ", ".join(f"{rows}x{length}" for rows, length in plan.batches.shapes)
    form = "stacked" if plan.run.scan_layers else "one by one"
    why = f" (auto: up to {unrolled_layers(prepared.platform)} one by one)" if args.scan_layers is None else ""
    say(
        f"examples are {'packed' if args.packing else 'padded'}: at most {plan.batches.block_counts.max()} block(s) an "
        f"update, of {shapes} tokens; --remat {plan.run.remat}; {layers} layers {form}{why}"
    )
    auto = [f"--{name} auto" for name in ("max_tokens_per_device", "remat") if getattr(args, name) == "auto"]
    if limit is not None:
        reason = f", the fastest choice of {' and '.join(auto)} that fits" if auto else ""
        say(f"memory: {plan.needed / 2**30:.1f} of {limit / 2**30:.1f} GiB a device by the compiler's count{reason}")


def say_summary(prepared: Prepared, plan: Plan, speedometer: Speedometer) -> None:
    """Report where the time of the run went, its speed, and the peak of the memory."""
    seconds = prepared.watch.all()
    parts = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
    say(f"time: {sum(seconds.values()):.1f} s: {parts} (compiling {plan.compiled_in:.1f})")
    if speed := speedometer.whole():
        packing = f"{1000 * speed.block_seconds:,.1f} ms on the host to pack its examples"
        share = f", MFU {mfu:.1%}" if (mfu := speedometer.mfu(speed.tokens_per_second)) else ""
        update = f"median update {1000 * speed.update_seconds:,.0f} ms ({packing})"
        say(f"speed: {speed.tokens_per_second:,.0f} tokens/s{share}, {update}")
    used, has = memory_use()
    where = "host" if prepared.platform == "cpu" else "device"
    say(f"memory: at most {used / 2**30:.1f} of {has / 2**30:.1f} GiB of the {where} in use")


def say_stopped(step: int) -> None:
    """Report where a stopped run ended, and how to continue."""
    if step:
        say(f"stopped after update {step}, saved as checkpoint-{step}; go on with --resume_from_checkpoint True")
    else:
        say("stopped before the first update: nothing is saved")


def say_done(prepared: Prepared) -> None:
    """Report the exported folder and its checkpoints."""
    what, kind = ("adapter", "PEFT") if prepared.job.adapter else ("model", "Hugging Face")
    if steps := find_steps(prepared.output_dir):
        say(f"checkpoints: {', '.join(f'checkpoint-{step}' for step in steps)} in {prepared.output_dir}")
    if (page := prepared.output_dir / PAGE).exists():
        say(f"page: {page} shows the run, in a browser")
    say(f"done: the trained {what} is in {prepared.output_dir} (a {kind} folder)")
