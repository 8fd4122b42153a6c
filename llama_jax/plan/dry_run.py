"""Compile a run's step for absent devices and report whether it fits them, for `--dry_run TOPOLOGY`."""

import copy
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import MEMORY_SHARE, compiler_options, set_up_jax
from llama_jax.distributed.processes import refuse_several
from llama_jax.hf.source import Source, training_dtype
from llama_jax.plan.chips import Chip, Topology, find_topology
from llama_jax.plan.hlo import Collective, Program
from llama_jax.plan.memory import activation_bytes
from llama_jax.plan.operations import kernel_operations, operations
from llama_jax.plan.planner import Plan, Planner, choose_scan, transfer
from llama_jax.plan.replay import replay
from llama_jax.plan.schedule import Schedule, read_schedule
from llama_jax.reporting.progress import say, waiting
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job, Say, make_job
from llama_jax.training.parts import passing_bytes
from llama_jax.training.state import TrainState, trained_parameters

GIB = 2**30
DOES_NOT_FIT = 3
LITTLE = 0.98  # share of the memory from which a run that fits has little to spare


@dataclass(frozen=True)
class Outcome:
    """Hold the result of planning a run: `needed` bytes a device, infinite where the compiler refuses, None where
    unknown. `seconds` is the time spent. `program` is that of the largest block, None where nothing was compiled, and
    `schedule` a TPU's."""

    planner: Planner
    plan: Plan
    needed: float | None
    seconds: float
    program: Program | None = None
    schedule: Schedule | None = None


def dry_run(args: Arguments) -> int:
    """Print the report of `--dry_run`; return the exit code: 0 where the run fits, 3 where not. Raises InputError.

    `--dry_run_effort fast` gives no verdict, unless arithmetic alone shows that the run cannot fit.
    """
    topology = find_topology(args.dry_run or "")
    chip, fast = topology.chip, args.dry_run_effort == "fast"
    refuse_several("python train_jax.py --dry_run")
    set_up_jax(use_cpu=True)
    for note in args.notes(chip.platform):
        say(note)
    # Programs compiled for absent devices would be written to the cache and never found there.
    settings = {"jax_enable_compilation_cache": False, "jax_optimization_level": "O0" if fast else "UNKNOWN"}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        source = Source(args.model_name_or_path, args.allow_pickle, weights=False, tokenizer=args.tokenizer_name)
        for note in source.notes:
            say(note)
        devices = topology.devices()
        planner = make_planner(args, source, topology, devices, say)
        say(planner.attention_line)
        limit = int(MEMORY_SHARE * chip.memory)
        outcome = _plan(planner, chip, limit, fast=fast)
        print("\n".join(_report(outcome, topology, fast)), flush=True)
        fits = outcome.needed is None or outcome.needed <= limit
        print("\n".join(_verdict(outcome, topology, limit)), flush=True)
        if not fits:
            print("\n".join(_ways_out(outcome.planner, limit)), flush=True)
            print(_nearest(planner, source, topology, devices, limit=limit, fast=fast), flush=True)
        return 0 if fits else DOES_NOT_FIT
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def make_planner(
    args: Arguments,
    source: Source,
    topology: Topology,
    devices: list[jax.Device],
    say: Say = lambda line: None,
) -> Planner:
    """Return the planner of the flags' run on the devices, as training makes it. Raises InputError."""
    mesh, quiet = sharding.make_mesh(devices, args.mesh), args.disable_tqdm or None
    ranks = args.world_size or sharding.batch_ways(mesh)
    job = make_job(args, source.config, lambda: source.tokenizer_folder, ranks, disable_bars=quiet, say=say)
    dtype, platform = args.dtype or training_dtype(source, args.hf_compat), topology.chip.platform
    return Planner(job, mesh, platform, dtype=dtype, scan_layers=choose_scan(job, platform))


def _plan(planner: Planner, chip: Chip, limit: int, fast: bool) -> Outcome:
    """Choose blocks and recomputation that fit, as the run would; a GPU's by arithmetic."""
    started = time.monotonic()
    first = planner.options(limit)[0]
    if chip.platform == "gpu":
        best = next((o for o in planner.options(limit) if planner.estimate(o) <= limit), first)
        return Outcome(planner, planner.make(best), planner.estimate(best), time.monotonic() - started)
    if (least := planner.least_bytes(first)) > limit:  # no compiler can change that
        return Outcome(planner, planner.make(first), least, time.monotonic() - started)
    program = schedule = None
    with waiting("planning", planner.job.args.disable_tqdm or None) as bar, tempfile.TemporaryDirectory() as folder:

        def told(line: str) -> None:
            bar.set_description(line)
            say(line)

        planner.schedules = None if fast else folder
        plan, needed = planner.choose(limit, told, remember=not fast)
        if compiled := plan.steps.programs.get(plan.largest_block):
            program = Program(compiled.as_text())
            try:
                schedule = None if fast else read_schedule(folder, program)
            except ValueError as e:  # of another libtpu
                say(f"the compiler's schedule is left out: {e}")
    # A program that fits at low effort need not fit: the verdict is open. A refusal counts, but not of quantized
    # matrices: at low effort the compiler holds all steps of dequantizing (35 GiB for a layer of 70B in 4 bits).
    unknown = fast and (needed <= limit or planner.run.quantization is not None)
    return Outcome(planner, plan, None if unknown else needed, time.monotonic() - started, program, schedule)


def _report(outcome: Outcome, topology: Topology, fast: bool) -> list[str]:
    """Return the lines of the report, without the verdict."""
    planner, plan, chip = outcome.planner, outcome.plan, topology.chip
    job, mesh, state = planner.job, planner.mesh, plan.abstract
    rows, length = plan.largest_block
    blocks = int(plan.batches.block_counts.max())
    options = compiler_options(mesh, plan.run.fp8, given=job.args.xla_options)
    copied = passing_bytes(state.trainable, state.opt_state)
    held = sharding.bytes_on_device(state) + copied
    several = ", the largest of its shapes" if len(plan.batches.shapes) > 1 else ""
    lines = [
        f"{topology.name}: {topology.count} x {chip.kind}"
        + (f", {topology.shape} chips" if topology.shape else "")
        + f", {chip.memory / GIB:.4g} GiB each",
        f"mesh: {sharding.describe_mesh(mesh)}",
        f"model: {job.config.num_parameters:,} parameters in {np.dtype(plan.run.param_dtype).name}, "
        f"{np.dtype(plan.run.compute_dtype or plan.run.param_dtype).name} matmuls, attention by {planner.kernel}, "
        f"layers {'under one scan' if plan.run.scan_layers else 'unrolled'}",
        *_adapter_line(plan),
        f"update: {_examples(job):,} examples in at most {blocks} block(s) of {rows:,} x {length:,} tokens{several}, "
        f"--remat {plan.option.remat}",
        *_option_line(options, chip),
        "",
        "GiB a device:",
        *(
            f"  {name:<34}{sharding.bytes_on_device(part) / GIB:9.2f}"
            for name, part in (
                ("trained parameters" if state.frozen else "parameters", (state.trainable, state.lower)),
                ("frozen parameters", state.frozen),
                ("optimizer's state", state.opt_state),
            )
            if part
        ),
    ]
    if copied:
        hosted = sharding.bytes_on_host(state)
        lines.append(f"  {'moments that are copied at once':<34}{copied / GIB:9.2f}")
        lines.append(f"  {'moments in the host':<34}{hosted / GIB:9.2f}   (of its memory, for each device)")
    if blocks > 1 and job.args.accumulation == "sum":
        sums = sharding.bytes_on_device(planner.saved.params)
        lines.append(f"  {'sums of gradients':<34}{sums / GIB:9.2f}")
        held += sums
    programs = plan.steps.programs
    of_block = outcome.program
    if of_block is None:
        kept = plan.option.max_tokens * activation_bytes(job.config, plan.run, plan.option.remat, mesh)
        lines += [
            f"  {'kept for the backward pass':<34}{kept / GIB:9.2f}   (by arithmetic)",
            f"  {'gradients':<34}{sharding.bytes_on_device(state.trainable) / GIB:9.2f}",
        ]
        return [*lines, *_floors(planner, plan, chip, 2.0 * held, [])]
    needed = outcome.needed
    if needed is not None and needed < math.inf:
        lines += [
            f"  {'activations and all else':<34}{(needed - held) / GIB:9.2f}",
            f"  {'peak':<34}{needed / GIB:9.2f}",
        ]
    collectives = of_block.collectives(mesh.shape)
    lines += ["", "the largest tensors, MiB a device:"]
    lines += [f"  {size / 2**20:9,.0f}  {text}  {name}" for size, text, name in _largest(state, of_block)]
    lines += ["", "collectives of a block, MB that a device sends (a ring's):"]
    lines += _by_kind(collectives) or ["  none"]
    moved = 0.0
    for program in programs.values():
        memory = program.memory_analysis()
        moved += memory.argument_size_in_bytes + memory.output_size_in_bytes
    lines += _floors(planner, plan, chip, moved, collectives)
    return lines if fast else [*lines, *_estimates(outcome, chip, of_block)]


def _option_line(options: dict[str, Any], chip: Chip) -> list[str]:
    """Return a line with the compiler options, none without."""
    if not options:
        return []
    checked = " (not checked: nothing is compiled for GPUs)" if chip.platform == "gpu" else ""
    return ["compiler options: " + ", ".join(f"{name}={value}" for name, value in options.items()) + checked]


def _adapter_line(plan: Plan) -> list[str]:
    """Return a line with the parameters of adapters and the type of the projections below them, none without."""
    run = plan.run
    if run.lora is None:
        return []
    kind = f"{run.quantization.bits} bits" if run.quantization else np.dtype(run.projection_dtype).name
    if plan.definition.scaled is not None:
        kind = "fp8"
    return [f"adapters: {trained_parameters(plan.abstract):,} parameters are trained; frozen projections are in {kind}"]


def _examples(job: Job) -> int:
    """Return the number of examples in the largest update."""
    order = job.order
    return int(np.diff(order.bounds).max()) * order.per_device_batch * order.ranks


def _largest(state: TrainState, program: Program, count: int = 8) -> Iterator[tuple[int, str, str]]:
    """Yield bytes, type and name of the largest arrays that the state holds, then of those that the step makes."""
    held = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if sharding.is_on_host(leaf):
            continue
        shape = leaf.sharding.shard_shape(leaf.shape)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        text = f"{leaf.dtype.name}[{','.join(map(str, shape))}]"
        held.append((math.prod(shape) * leaf.dtype.itemsize, text, f"held: {name}"))
    made = [(size, text, f"made: {_short(name)}") for text, size, name in program.largest(count)]
    for part in (sorted(held, key=lambda x: -x[0])[: count // 2], made[: count // 2]):
        yield from part


def _short(name: str) -> str:
    """Return the end of an operation's path, marked if it belongs to the backward pass."""
    parts = [p for p in name.split("/") if p not in ("while", "body", "closed_call", "checkpoint")]
    return ("backward " if "transpose" in name else "") + "/".join(parts[-2:])


def _by_kind(collectives: list[Collective]) -> list[str]:
    """Return a line for each kind of collective and axes: megabytes sent, and how often."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for c in collectives:
        key = (c.kind, "+".join(c.axes) or "no axis")
        count, sent = sums.get(key, (0, 0.0))
        sums[key] = (count + c.times, sent + c.sent * c.times)
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return [f"  {sent / 1e6:9,.1f}  {kind} over {axes}, {count:,} times" for (kind, axes), (count, sent) in ordered]


def _floors(planner: Planner, plan: Plan, chip: Chip, moved: float, collectives: list[Collective]) -> list[str]:
    """Return the lines of the least time of a block, at the chip's published rates."""
    rows, length = plan.largest_block
    blocks = int(plan.batches.block_counts.max())
    config, lora = planner.job.config, plan.run.lora
    model, made = operations(config, rows * length, length, plan.option.remat, lora)
    devices = planner.mesh.size
    sent = sum(c.sent * c.times for c in collectives)
    lines = [
        "",
        f"floors of a block, the largest ({blocks} at most make an update); a floor is no prediction:",
        f"  {made / devices / chip.flops * 1e3:9,.1f} ms  {made / devices / 1e12:,.1f} TFLOP a device "
        f"({model / devices / 1e12:,.1f} without recomputation) at {chip.flops / 1e12:,.5g} TFLOP/s",
        f"  {moved / chip.memory_rate * 1e3:9,.1f} ms  {moved / 1e9:,.1f} GB in and out of the program at "
        f"{chip.memory_rate / 1e9:,.0f} GB/s",
    ]
    if collectives:
        lines.append(
            f"  {sent / chip.link_rate * 1e3:9,.1f} ms  {sent / 1e9:,.1f} GB sent at {chip.link_rate / 1e9:,.0f} GB/s "
            "over all links"
        )
    if sharding.bytes_on_host(plan.abstract):
        lines.append(f"of an update: the moments' copies, {transfer(plan.abstract.opt_state, chip.kind)}")
    return lines


def _estimates(outcome: Outcome, chip: Chip, program: Program) -> list[str]:
    """Return the lines of the compiler's own estimates of a block's time, and of what they leave out."""
    cycles = program.cycles
    if not chip.clock or not sum(cycles.values()):
        return []
    ms = {kind: n / chip.clock * 1e3 for kind, n in cycles.items()}
    lines = [
        "",
        f"the compiler's estimates of a block, at {chip.clock / 1e9:.2f} GHz; none was verified on a device:",
        f"  {sum(ms.values()):9,.1f} ms  one operation after the other, without collectives and kernels: matmuls "
        f"{ms['matmul']:,.0f}, other arithmetic {ms['elementwise']:,.0f}, copies {ms['copy']:,.0f}",
    ]
    if not outcome.schedule:
        lines.append("             no schedule of this program was read")
    else:
        compute, exposed, rough = (n / chip.clock * 1e3 for n in outcome.schedule)
        lines.append(
            f"  {compute + exposed:9,.1f} ms  by its schedule, without kernels: {compute:,.0f} of work, {exposed:,.0f} "
            "of waiting for links"
        )
        if rough:
            lines.append(
                f"  {rough:9,.1f} ms  of this work are a rough estimate of loops, which may be a quarter too low"
            )
    mesh, made = outcome.planner.mesh, 0.0
    if kernels := program.kernels:
        plan = outcome.plan
        rows, length = plan.largest_block
        made = kernel_operations(outcome.planner.job.config, rows * length, length, plan.option.remat) / mesh.size
        layers = outcome.planner.job.config.num_hidden_layers
        calls = ", ".join(_calls(name, times, layers) for name, times in sorted(kernels.items()))
        lines.append(
            f"  {made / chip.flops * 1e3:9,.1f} ms  left out by both: {made / 1e12:,.2f} TFLOP of attention at the "
            f"published peak ({calls})"
        )
    work, waiting = replay(program, chip, mesh.shape, made / chip.flops)
    lines.append(
        f"  {(work + waiting) * 1e3:9,.1f} ms  all in the program's order, links at the published bandwidth: "
        f"{work * 1e3:,.0f} of work, {waiting * 1e3:,.0f} of waiting for links"
    )
    return lines


def _calls(kernel: str, times: int, layers: int) -> str:
    """Return how often a kernel is called, and how often to repeat a forward pass."""
    again = times - layers if "fwd" in kernel else 0
    return f"{kernel} {times:,} times" + (f", {again:,} of them again backward" if again > 0 else "")


def _verdict(outcome: Outcome, topology: Topology, limit: int) -> list[str]:
    """Return the lines of the verdict: whether the run fits `limit` bytes a device."""
    needed, room = outcome.needed, f"{limit / GIB:.2f} GiB"
    spent = f"{outcome.seconds:,.0f} s"
    if needed is None and not outcome.plan.steps.programs:
        told = f"refused at low effort in {spent}; that gives no verdict on 4 or 8 bits: --dry_run_effort full does"
    elif needed is None:
        told = f"compiled at low effort in {spent}; that gives no verdict on memory: --dry_run_effort full does"
    elif needed == math.inf:
        told = f"DOES NOT FIT: the compiler finds no room for it ({spent}); a device has {room} for a program"
    elif not outcome.plan.steps.programs:
        by = "an estimate by arithmetic, nothing was compiled"
        if topology.chip.platform == "tpu":
            by = "at least, by arithmetic; nothing was compiled"
        told = f"{'fits' if needed <= limit else 'DOES NOT FIT'}: {needed / GIB:.2f} of {room} on a device ({by})"
    else:
        told = f"{'fits' if needed <= limit else 'DOES NOT FIT'}: {needed / GIB:.2f} of {room} on a device ({spent})"
    lines = ["", f"{topology.name}: {told}"]
    if needed is not None and LITTLE * limit < needed <= limit:
        lines.append(
            f"only {1 - needed / limit:.1%} of a device's memory is to spare: another process on it, or another "
            "version of the compiler, may leave too little"
        )
    return lines


def _ways_out(planner: Planner, limit: int) -> list[str]:
    """Return a line for each change that needs less memory, with the bytes of a device by arithmetic."""
    lines = [f"by arithmetic, a device needs of its {limit / GIB:.2f} GiB, with one change:"]
    for way in planner.ways_out(limit):
        verdict = "fits" if way.needed <= limit else "not enough alone"
        lines.append(f"  {way.needed / GIB:9.2f}  {way.text} ({verdict}{way.note})")
    return lines


def _nearest(
    planner: Planner,
    source: Source,
    topology: Topology,
    devices: list[jax.Device],
    *,
    limit: int,
    fast: bool,
) -> str:
    """Return a line with the first change of flags that fits, with the same global batch.

    Recomputation and blocks are tried first, then the mesh. Where neither fits, the line names the fewest devices that
    have room by arithmetic.
    """
    args = planner.job.args
    whole = sharding.bytes_on_device(planner.state) * planner.mesh.size // planner.mesh.shape["data"]
    for changes in _changes(args, planner) if whole < limit * planner.mesh.size else ():
        changed = copy.copy(args)
        for name, value in changes.items():
            setattr(changed, name, value)
        try:
            other = make_planner(changed, source, topology, devices)
        except InputError:
            continue
        if other.least_bytes(other.options(limit)[0]) > limit:
            continue
        outcome = _plan(other, topology.chip, limit, fast=fast)
        if outcome.needed is None or outcome.needed <= limit:
            option = outcome.plan.option
            flags = {**changes, "remat": option.remat, "max_tokens_per_device": option.max_tokens}
            told = " ".join(f"--{name} {value}" for name, value in flags.items())
            return f"what fits, with the same examples in an update: {told}"
    for larger in (t for t in topology.larger if whole < limit * t.count):
        changed = _same_batch(args, planner)
        try:
            other = make_planner(changed, source, larger, larger.devices())
        except InputError:
            continue
        if other.least_bytes(other.options(limit)[0]) <= limit:
            return (
                "no --remat, --max_tokens_per_device or --mesh fits; by arithmetic, with --world_size "
                f"{planner.job.order.ranks} for the same updates, the smallest that has room is {larger.name}"
            )
    return f"no --remat, --max_tokens_per_device or --mesh fits, nor any larger {topology.family}"


def _same_batch(args: Arguments, planner: Planner) -> Arguments:
    """Return the flags for more devices, with the same examples in an update."""
    changed = copy.copy(args)
    changed.mesh, changed.remat, changed.max_tokens_per_device = "auto", "auto", "auto"
    changed.world_size = planner.job.order.ranks
    return changed


def _changes(args: Arguments, planner: Planner) -> Iterator[dict[str, str | int]]:
    """Yield flags to change, the nearest first. A mesh with fewer parts for rows keeps the Trainer's ranks."""
    free: dict[str, str | int] = {"remat": "auto", "max_tokens_per_device": "auto"}
    if (args.remat, args.max_tokens_per_device) != ("auto", "auto"):
        yield free
    ranks, size = planner.job.order.ranks, planner.mesh.size
    for together in (1, 2, 4, 8):
        if size % together:
            continue
        same: dict[str, str | int] = {} if size // together == ranks else {"world_size": ranks}
        for axis in ("tensor", "context")[:together]:
            mesh = f"fsdp={size // together}" + (f",{axis}={together}" if together > 1 else "")
            if mesh != sharding.describe_mesh(planner.mesh):
                yield {**free, "mesh": mesh, **same}
