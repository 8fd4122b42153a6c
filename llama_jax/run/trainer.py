"""Train by the flags in four phases: prepare, restore or load, make the updates, export."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from llama_jax.base import output
from llama_jax.base.bucket import as_path, is_remote
from llama_jax.base.errors import InputError
from llama_jax.base.files import make_output_dir, read_json_object
from llama_jax.base.stopping import STOPPED, Stopping
from llama_jax.distributed import processes
from llama_jax.distributed.digest import digest
from llama_jax.distributed.platform import memory_limit
from llama_jax.hf.checkpoint import Damaged, restore_params
from llama_jax.hf.source import refuse_other_kind
from llama_jax.model.definition import merge, only
from llama_jax.model.roles import Params
from llama_jax.plan import explain
from llama_jax.reporting.progress import say, show, update_bar
from llama_jax.reporting.run_log import RunLog, UpdateMetrics
from llama_jax.reporting.trainer_state import TrainerState
from llama_jax.run.bad_updates import BadUpdates
from llama_jax.run.checkpoint import Checkpoints, find_steps, read_run
from llama_jax.run.console import say_done, say_header, say_stopped, say_summary
from llama_jax.run.events import Milestones
from llama_jax.run.export import explaining, export
from llama_jax.run.ownership import locked
from llama_jax.run.prepare import Prepared, join, prepare
from llama_jax.run.profile import Profile
from llama_jax.run.reports import FINISHED, STOPPED_EARLY, Reports, open_reports
from llama_jax.run.resume import pass_over, pass_over_damaged, with_base
from llama_jax.run.signals import catch_stop
from llama_jax.run.start import Run, check_disk, load, make_log, read_weights, restore
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job
from llama_jax.training.fit import fit
from llama_jax.training.state import TrainState

T = TypeVar("T")


def train(args: Arguments, stopping: Stopping, started: float) -> int:
    """Train by the flags and return the exit code. `started` is `time.monotonic()` at the command's start.

    Raises InputError.
    """
    output.survive()
    platform, mesh = join(args)
    reports = open_reports(args)
    with owned(args) as output_dir, reports:
        run, checkpoints, state = begin(args, platform, mesh, started)
        prepared, watch = run.prepared, run.prepared.watch
        reports.begin(run)
        with watch.phase("training"):
            state, milestones, finished = make_updates(run, checkpoints, state, stopping, reports)
        stopping.hold(lambda: True)
        with watch.phase("saving"):
            checkpoints.wait()
        if not finished:
            checkpoints.close()
            say_summary(prepared, run.plan, run.speedometer)
            reports.end(STOPPED_EARLY)
            say_stopped(run.log.values["global_step"])
            return STOPPED
        milestones.run_log.finish()

        last: TrainState | None = state
        params, frozen, best = state.whole_params, state.frozen, run.log.best_step
        with watch.phase("export"):
            if best and args.load_best_model_at_end and best != prepared.job.order.updates:
                del state, params  # frees the devices' memory for the restored state
                last = None
                params = merge(read_best(prepared, run.log, output_dir), frozen)
            if best and args.save_total_limit == 1:
                checkpoints.keep_only(best)
            with explaining(prepared, prepared.job.order.updates, lambda: milestones.save_last(last)):
                export(prepared, params)
                if processes.is_first():
                    run.log.save(output_dir)
            checkpoints.close()
            processes.exchange("exported")
        say_summary(prepared, run.plan, run.speedometer)
        reports.end(FINISHED)
        say_done(prepared)
        return 0


def export_only(args: Arguments, stopping: Stopping) -> int:
    """Export the model of a checkpoint, by default the newest, without training; return the exit code.

    Raises InputError.
    """
    platform, mesh = join(args)
    with owned(args) as output_dir:
        prepared, (log, params) = from_newest(args, platform, mesh, saved_model)
        stopping.hold(lambda: True)
        with explaining(prepared, prepared.resume_step):
            export(prepared, params)
            if processes.is_first() and saved_step(output_dir) != prepared.resume_step:  # else it has the summary too
                log.save(output_dir)
        processes.exchange("exported")
        say_done(prepared)
        return 0


def saved_model(prepared: Prepared) -> tuple[TrainerState, Params]:
    """Read the log and the parameters to export of a checkpoint. Raises InputError."""
    args, job, definition = prepared.args, prepared.job, prepared.planner.definition
    saved, checkpoint = prepared.saved, prepared.resume_from
    assert saved is not None and checkpoint is not None
    log = make_log(args, job)
    log.resume(saved.trainer_state, checkpoint.parent, args.load_best_model_at_end)
    if log.best_step and args.load_best_model_at_end and log.best_step != prepared.resume_step:
        params = read_best(prepared, log, checkpoint.parent)
    else:
        say(f"exporting {checkpoint}, of {job.order.updates:,} updates")
        params = restore_params(checkpoint, prepared.planner.saved.params, read_run(checkpoint))
    if job.adapter is not None and job.config.vocab_size != prepared.source.config.vocab_size:
        vocabulary = only(definition.frozen, {("embed_tokens", "weight"), ("lm_head", "weight")})
        params = merge(params, read_weights(prepared, like=vocabulary) if vocabulary else {})
    return log, params


def saved_step(folder: Path) -> int | None:
    """Return the number of updates in a folder's trainer_state.json, None without a readable file."""
    with contextlib.suppress(InputError):
        return read_json_object(folder / "trainer_state.json").get("global_step")
    return None


@contextlib.contextmanager
def owned(args: Arguments) -> Iterator[Path]:
    """Make the output folder and keep it to this run; set aside damaged checkpoints. All processes raise the same
    InputError."""
    output_dir = as_path(args.output_dir)
    with contextlib.ExitStack() as lock:
        with processes.agreed():
            if processes.is_first():
                refuse_other_kind(output_dir, "adapter" if args.use_peft or args.adapter_name_or_path else "HF")
                make_output_dir(output_dir)
                lock.enter_context(locked(output_dir))
                pass_over_damaged(args, output_dir)
        yield output_dir


def keep_log(output_dir: Path) -> None:
    """Append the output to `run.log` too, and the messages of C++ to `process-N.log` where there are several processes;
    nothing on a bucket, which has no files to append to. Raises InputError."""
    if is_remote(output_dir):
        return
    try:
        if processes.is_first():
            output.keep(output_dir / output.FILE)
        if jax.process_count() > 1:
            output.divert(output_dir / f"process-{jax.process_index()}.log")
    except OSError as e:
        advice = "remove it, or choose another --output_dir"
        raise InputError(f"{e.filename}: the log cannot be written: {e.strerror}; {advice}") from None


def begin(args: Arguments, platform: str, mesh: Mesh, started: float) -> tuple[Run, Checkpoints, TrainState]:
    """Prepare the run, compile its programs and get its first state, from the newest checkpoint that is whole."""

    def start(prepared: Prepared) -> tuple[Run, Checkpoints, TrainState]:
        limit = processes.least(memory_limit())
        prepared.planner.check_room(limit)
        check_disk(prepared)
        with processes.agreed():
            keep_log(prepared.output_dir)
        return (restore if prepared.saved else load)(prepared, limit)

    prepared, (run, checkpoints, state) = from_newest(args, platform, mesh, start, started)
    if state.frozen:
        base = digest(state.frozen, prepared.mesh)
        facts = with_base(prepared.facts, base, prepared.saved, str(prepared.resume_from))
        run = replace(run, prepared=replace(prepared, facts=facts))
    return run, checkpoints, state


def from_newest(
    args: Arguments, platform: str, mesh: Mesh, read: Callable[[Prepared], T], started: float | None = None
) -> tuple[Prepared, T]:
    """Prepare the run and return the result of `read`, which gets the newest checkpoint that is whole."""
    while True:
        prepared = prepare(args, platform, mesh, started)
        say_header(prepared)
        try:
            return prepared, read(prepared)
        except Damaged as e:
            with processes.agreed():
                if processes.is_first() and prepared.resume_from:
                    pass_over(args, prepared.resume_from, e)


def read_best(prepared: Prepared, log: TrainerState, folder: Path) -> Params:
    """Read the trained parameters of the best checkpoint in a folder. Raises InputError."""
    checkpoint, metric = folder / f"checkpoint-{log.best_step}", log.values["best_metric"]
    say(f"the exported model is the best one, {checkpoint.name}: {prepared.args.best_metric_key} {metric:.6g}")
    try:
        return restore_params(checkpoint, prepared.planner.saved.params, read_run(checkpoint))
    except Damaged as e:
        instead = "--resume_from_checkpoint True --load_best_model_at_end False"
        raise InputError(f"{e}; export the last state in its place: {instead}") from None


def print_explanation(args: Arguments) -> int:
    """Print `--explain`'s description of the run, and return the exit code. Nothing compiles. Raises InputError."""
    prepared = prepare(args, *join(args))
    planner = prepared.planner
    plan = planner.make(planner.options(processes.least(memory_limit()))[0])
    kind = prepared.mesh.devices.flat[0].device_kind
    described = explain.explain(prepared.job, plan.batches, plan.abstract, prepared.facts.dtype, kind)
    show(explain.as_json(described) if args.explain == "json" else explain.as_text(described))
    return 0


# -- Make the updates -------------------------------------------------------------------------------------------------


def make_updates(
    run: Run, checkpoints: Checkpoints, state: TrainState, stopping: Stopping, reports: Reports
) -> tuple[TrainState, Milestones, bool]:
    """Make the updates that are left; return the last state, the milestones, and whether the run is finished."""
    prepared, plan = run.prepared, run.plan
    args, job, first = prepared.args, prepared.job, prepared.resume_step
    beside = job.adapter.parameters_beside(job.config) if job.adapter else 0

    def programs(updates: range) -> list[Any]:
        shapes = {shape for k in updates for shape in plan.batches.shapes_of(k)}
        return [program for shape, program in plan.steps.programs.items() if shape in shapes or isinstance(shape, str)]

    profile = Profile(
        args.profiled,
        prepared.output_dir,
        programs=programs,
        made=lambda: run.log.values["global_step"],
        watch=prepared.watch,
        report=reports.profiled,
    )
    stop = catch_stop(stopping, lambda: checkpoints.saving)
    with update_bar(job.order.updates, first, prepared.quiet) as bar:
        run_log = RunLog(
            run.log,
            plan.batches,
            rate=job.schedule.rate,
            due=steps_to_log(job),
            flops_per_token=6.0 * (job.config.num_non_embedding_parameters + beside),
            bar=bar,
            speedometer=run.speedometer,
            nan_filter=args.logging_nan_inf_filter,
            tokens_seen=args.include_num_input_tokens_seen,
            window=prepared.saved.log_window if prepared.saved else None,
        )

        guard = (prepared.saved and prepared.saved.guard) or {}

        def last_checkpoint() -> str | None:
            checkpoints.wait()
            done = [s for s in find_steps(prepared.output_dir) if s <= run.log.values["global_step"]]
            return f"{prepared.output_dir}/checkpoint-{done[-1]}" if done else None

        bad = BadUpdates(job=job, run_log=run_log, last_checkpoint=last_checkpoint, in_a_row=guard.get("in_a_row", 0))

        def on_update(metrics: UpdateMetrics) -> None:
            if metrics.step == first + 1:
                say(f"first update done {sum(prepared.watch.all().values()):.1f} s after the start")
            checkpoints.check()
            reports.update(metrics, job.order.epoch_at(metrics.step))
            run_log.on_update(metrics)
            bad.on_update(metrics)

        milestones = Milestones(
            job=job,
            loss_step=run.loss_step,
            evaluation=run.evaluation,
            mesh=prepared.mesh,
            run_log=run_log,
            checkpoints=checkpoints,
            facts=prepared.facts,
            output_dir=prepared.output_dir,
            stop=stop,
            first=first,
            left=prepared.saved.left if prepared.saved else (),
            goes_on=prepared.goes_on,
            bad=bad,
            finite=guard.get("finite", first or None),
            reports=reports,
            samples=prepared.samples,
            watch=prepared.watch,
            handover=prepared.saved.handover if prepared.saved else None,
        )
        stopped = milestones.begin(state)

        def on_due(step: int, state: TrainState, stopping: bool) -> bool:
            nonlocal stopped
            stopped = milestones.reach(step, state, stopping)
            return stopped

        for updates, context in profile.parts(first, job.order.updates):
            if stopped:
                break
            with context:
                state = fit(
                    state,
                    plan.steps,
                    plan.batches,
                    prepared.mesh,
                    updates,
                    learning_rate=job.schedule.rate,
                    on_update=on_update,
                    due=milestones.due,
                    on_due=on_due,
                    stop=stop,
                )
    finished = not milestones.unfinished and run.log.values["global_step"] == job.order.updates
    return state, milestones, finished


def steps_to_log(job: Job) -> Callable[[int], bool]:
    """Return the rule for log lines by steps. Lines of `--logging_strategy epoch` are written by `Milestones`."""
    if job.args.logging_strategy == "epoch":
        return lambda step: job.args.logging_first_step and step == 1
    return job.log_at
