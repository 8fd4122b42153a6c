"""Train by the flags in four phases: prepare, restore or load, make the updates, export."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.base import output
from llama_jax.base.bucket import as_path, is_remote
from llama_jax.base.errors import InputError
from llama_jax.base.files import make_output_dir, read_json_object
from llama_jax.base.stopping import STOPPED, Stopping
from llama_jax.distributed import processes
from llama_jax.distributed.digest import digest
from llama_jax.distributed.platform import memory_limit, peak_memory
from llama_jax.distributed.storage import tree_bytes
from llama_jax.hf import peft
from llama_jax.hf.checkpoint import Damaged, restore_params
from llama_jax.hf.load import place_arrays, resize_vocabulary
from llama_jax.hf.source import refuse_other_kind
from llama_jax.model.definition import merge, only
from llama_jax.model.lora import magnitudes
from llama_jax.model.roles import Params
from llama_jax.plan import explain
from llama_jax.plan.planner import Plan
from llama_jax.reporting.progress import byte_bar, say, show, update_bar
from llama_jax.reporting.run_log import RunLog, UpdateMetrics
from llama_jax.reporting.trackers import Trackers
from llama_jax.reporting.trainer_state import TrainerState
from llama_jax.run.bad_updates import BadUpdates
from llama_jax.run.checkpoint import Checkpoints, find_removable, find_steps, read_run, remove_steps, restore_state
from llama_jax.run.disk import check_space, folder_bytes
from llama_jax.run.evaluation import Evaluation
from llama_jax.run.events import Milestones
from llama_jax.run.export import explaining, export, model_files, say_done
from llama_jax.run.ownership import locked, new_identity
from llama_jax.run.prepare import Prepared, join, prepare, say_header
from llama_jax.run.resume import Facts, pass_over, pass_over_damaged, with_base
from llama_jax.run.signals import catch_stop
from llama_jax.run.tasks import Evaluate, with_tasks
from llama_jax.run.tracking import begin_reports, open_reports
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job
from llama_jax.training.fit import fit
from llama_jax.training.guard import place_losses
from llama_jax.training.state import SavedState, TrainState, complete, init_state
from llama_jax.training.step import LossStep, make_loss_step

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Hold a prepared run with its compiled programs, its evaluation (None for none) and its log."""

    prepared: Prepared
    plan: Plan
    loss_step: LossStep
    evaluation: Evaluate | None
    log: TrainerState


def train(args: Arguments, stopping: Stopping, started: float) -> int:
    """Train by the flags and return the exit code. `started` is `time.monotonic()` at the command's start.

    Raises InputError.
    """
    output.survive()
    platform, mesh = join(args)
    with open_reports(args) as trackers, owned(args) as output_dir:
        prepared, run, checkpoints, state = begin(args, platform, mesh)
        job, facts = prepared.job, prepared.facts
        if state.frozen:
            base = digest(state.frozen, prepared.mesh)
            facts = with_base(facts, base, prepared.saved, str(prepared.resume_from))

        begin_reports(trackers, prepared, run.log)
        state, milestones, finished = make_updates(run, checkpoints, state, facts, stopping, started, trackers)
        stopping.hold(lambda: True)
        checkpoints.wait()
        run_log = milestones.run_log
        say_speed(run_log)
        if not finished:
            checkpoints.close()
            trackers.end(finished=False)
            say_stopped(run.log.values["global_step"])
            return STOPPED
        run_log.finish()

        last: TrainState | None = state
        params, frozen, best = state.whole_params, state.frozen, run.log.best_step
        if best and args.load_best_model_at_end and best != job.order.updates:
            del state, params  # frees the devices' memory for the restored state
            last = None
            params = merge(read_best(prepared, run.log, output_dir), frozen)
        if best and args.save_total_limit == 1:
            checkpoints.keep_only(best)
        with explaining(prepared, job.order.updates, lambda: milestones.save_last(last)):
            export(prepared, params)
            if processes.is_first():
                run.log.save(output_dir)
        checkpoints.close()
        processes.exchange("exported")
        trackers.end(finished=True)
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
    log.resume(saved.trainer_state, checkpoint.parent)
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
                refuse_other_kind(output_dir, flax=False)
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


def begin(args: Arguments, platform: str, mesh: Mesh) -> tuple[Prepared, Run, Checkpoints, TrainState]:
    """Prepare the run, compile its programs and get its first state, from the newest checkpoint that is whole."""

    def start(prepared: Prepared) -> tuple[Run, Checkpoints, TrainState]:
        limit = processes.least(memory_limit())
        prepared.planner.check_room(limit)
        check_disk(prepared)
        with processes.agreed():
            keep_log(prepared.output_dir)
        return (restore if prepared.saved else load)(prepared, limit)

    prepared, started = from_newest(args, platform, mesh, start)
    return prepared, *started


def from_newest(args: Arguments, platform: str, mesh: Mesh, read: Callable[[Prepared], T]) -> tuple[Prepared, T]:
    """Prepare the run and return the result of `read`, which gets the newest checkpoint that is whole."""
    while True:
        prepared = prepare(args, platform, mesh)
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
    described = explain.explain(prepared.job, plan.batches, plan.abstract, prepared.facts.dtype)
    show(explain.as_json(described) if args.explain == "json" else explain.as_text(described))
    return 0


# -- Restore or load --------------------------------------------------------------------------------------------------


def restore(prepared: Prepared, limit: int | None) -> tuple[Run, Checkpoints, TrainState]:
    """Resume a checkpoint: read its state while the programs compile, and continue its log and schedule."""
    saved, checkpoint = prepared.saved, prepared.resume_from
    assert saved is not None and checkpoint is not None

    def read() -> tuple[SavedState, Params]:
        frozen = prepared.planner.definition.frozen
        return restore_state(checkpoint, prepared.planner.saved), read_weights(prepared, like=frozen) if frozen else {}

    plan, (restored, frozen), files = compile_while(read, prepared, limit)
    if not prepared.goes_on:
        remove_earlier(prepared.output_dir)
    checkpoints = open_checkpoints(prepared, files)
    run = make_run(prepared, plan)
    run.log.resume(saved.trainer_state, prepared.output_dir)
    prepared.job.schedule.load(saved.schedule)
    state = complete(restored, frozen, plan.tx, plan.definition, prepared.mesh)
    if prepared.job.args.skip_loss_spikes:
        state = state._replace(losses=place_losses(prepared.mesh, (saved.guard or {}).get("losses")))
    say(f"resumed from {checkpoint}")
    return run, checkpoints, state


def load(prepared: Prepared, limit: int | None) -> tuple[Run, Checkpoints, TrainState]:
    """Start a new run: read the model's weights while the programs compile, and remove an earlier run's checkpoints."""
    plan, params, files = compile_while(lambda: first_params(prepared), prepared, limit)
    run = make_run(prepared, plan)
    remove_earlier(prepared.output_dir)
    checkpoints = open_checkpoints(prepared, files)
    state = init_state(params, plan.tx, plan.definition, prepared.mesh)
    if prepared.job.args.skip_loss_spikes:
        state = state._replace(losses=place_losses(prepared.mesh, None))
    return run, checkpoints, state


def first_params(prepared: Prepared) -> Params:
    """Return all parameters before the first update: the model's, and those of an adapter."""
    job, definition = prepared.job, prepared.planner.definition
    if job.adapter is None or job.adapter_tensors:
        return read_weights(prepared, like=definition.params)
    params, init = read_weights(prepared, like=definition.base), job.adapter.values["init_lora_weights"]
    # PEFT rounds to the base's type, unless that is a type of integers.
    dtype = np.dtype(np.float32 if job.quantization else prepared.facts.dtype)
    arrays = peft.first_values(job.adapter.lora, job.config, job.args.seed, init, dtype)
    if job.adapter.lora.use_dora:
        with jax.set_mesh(prepared.mesh):
            arrays |= magnitudes(params, job.adapter.lora, prepared.planner.run.param_dtype)
    return merge(params, place_arrays(arrays, definition.params)[0])


def read_weights(prepared: Prepared, like: Params) -> Params:
    """Return the parameters of `like`: from the PEFT folder where it has them, else the model's, with the rows of the
    job's vocabulary."""
    job, mesh, source = prepared.job, prepared.mesh, prepared.source
    trained: Params = {}
    if job.adapter is not None:
        trained, like = peft.load_adapter(job.adapter_tensors, job.adapter.lora, job.config, like)
    with byte_bar("reading weights", source.bytes, prepared.quiet) as bar:
        params = source.load(prepared.planner.run, mesh, bar.update, like)
    if job.new_ids or job.config.vocab_size != source.config.vocab_size:
        params = resize_vocabulary(params, source.config, job.config, job.new_ids, mesh)
    return merge(params, trained)


def compile_while(read: Callable[[], T], prepared: Prepared, limit: int | None) -> tuple[Plan, T, dict[str, bytes]]:
    """Compile the run's programs in a thread while `read` runs; return the plan, the result of `read`, and the model's
    small files, which the first process makes meanwhile: a vocabulary of 128,000 takes 2 s."""
    say("compiling the training step while the weights are read; a first start takes longer, later ones use the cache")
    with ThreadPoolExecutor(2) as background:
        planning = background.submit(prepared.planner.settle, limit, say)
        making = background.submit(model_files, prepared) if processes.is_first() else None
        result = read()
        plan = planning.result()
    with processes.agreed():
        files = making.result() if making else {}
    if len({*processes.exchange(repr(plan.option))}) > 1:
        raise RuntimeError("the processes' compilers came to different block sizes: give --max_tokens_per_device")
    return plan, result, files


def check_disk(prepared: Prepared) -> None:
    """Compare the bytes that the run writes with the room in the output folder. All processes raise the same
    InputError."""
    args, job, output_dir, first = prepared.args, prepared.job, prepared.output_dir, prepared.resume_step
    with processes.agreed():
        if not processes.is_first() or is_remote(output_dir):
            return
        kept = [step for step in find_steps(output_dir) if prepared.goes_on and step <= first]
        saves = job.steps(job.eval_at if args.save_strategy == "best" else job.save_at)
        if job.adapter is None:
            export = job.config.num_parameters * np.dtype(prepared.planner.run.param_dtype).itemsize
        else:
            export = tree_bytes(prepared.planner.saved.params)
        warning = check_space(
            output_dir,
            free=shutil.disk_usage(output_dir).free + sum(map(folder_bytes, find_removable(output_dir, kept))),
            checkpoint=tree_bytes(prepared.planner.saved),
            export=export,
            saves=sum(step > first for step in saves),
            kept=len(kept),
            limit=args.save_total_limit,
        )
        if warning:
            say(f"warning: {warning}")


def remove_earlier(output_dir: Path) -> None:
    """Remove the checkpoints of an earlier run, as --overwrite_output_dir asks."""
    if processes.is_first() and (steps := find_steps(output_dir)):
        say(f"--overwrite_output_dir: removing {', '.join(f'checkpoint-{step}' for step in steps)}")
        remove_steps(output_dir, steps)
    processes.exchange("removed")


def open_checkpoints(prepared: Prepared, files: dict[str, bytes]) -> Checkpoints:
    """Open the folder for the checkpoints of this run, with the model's small files in each."""
    known = prepared.saved.run if prepared.saved and prepared.goes_on else ""
    return Checkpoints(
        prepared.output_dir,
        prepared.args.save_total_limit,
        prepared.planner.saved,
        first=prepared.resume_step,
        run=known or processes.exchange(new_identity())[0],
        files=files,
    )


def make_run(prepared: Prepared, plan: Plan) -> Run:
    """Add the evaluation and the log to a plan, and report the blocks that its updates take."""
    args, job = prepared.args, prepared.job
    shapes = ", ".join(f"{rows}x{length}" for rows, length in plan.batches.shapes)
    most = plan.batches.block_counts.max()
    say(f"examples are packed: at most {most} block(s) an update, of {shapes} tokens; --remat {plan.run.remat}")
    loss_step = make_loss_step(plan.definition.graphdef, job.config.vocab_size, args.label_smoothing_factor)
    evaluation = with_tasks(make_evaluation(prepared, loss_step, plan.option.max_tokens), prepared.tasks)
    return Run(prepared=prepared, plan=plan, loss_step=loss_step, evaluation=evaluation, log=make_log(args, job))


def make_log(args: Arguments, job: Job) -> TrainerState:
    """Return the log of a run without entries."""
    return TrainerState(
        args.hf_compat,
        max_steps=job.order.updates,
        num_train_epochs=job.num_train_epochs,
        train_batch_size=args.per_device_train_batch_size,
        logging_steps=args.every("logging", job.order.updates),
        eval_steps=args.every("eval", job.order.updates),
        save_steps=args.every("save", job.order.updates),
        greater_is_better=bool(args.greater_is_better),
    )


def make_evaluation(prepared: Prepared, loss_step: LossStep, max_tokens: int) -> Evaluation | None:
    """Return the evaluation where the flags ask for one, in groups of at most `max_tokens` tokens a device."""
    args, job = prepared.args, prepared.job
    if job.eval_examples is None or not job.order.evaluated:
        return None
    evaluation = Evaluation(
        job.eval_examples,
        loss_step,
        prepared.mesh,
        compat=args.hf_compat,
        ranks=job.order.ranks,
        batch_size=args.per_device_eval_batch_size,
        drop_last=args.dataloader_drop_last,
        nan_filter=args.logging_nan_inf_filter,
        max_tokens=max_tokens,
        disable_bar=prepared.quiet,
    )
    if evaluation.has_nan:
        say("warning: an evaluation batch has no trained tokens (only -100); the HF Trainer's loss of it is NaN")
    return evaluation


# -- Make the updates -------------------------------------------------------------------------------------------------


def make_updates(
    run: Run,
    checkpoints: Checkpoints,
    state: TrainState,
    facts: Facts,
    stopping: Stopping,
    started: float,
    trackers: Trackers,
) -> tuple[TrainState, Milestones, bool]:
    """Make the updates that are left; return the last state, the milestones, and whether the run is finished."""
    prepared, plan = run.prepared, run.plan
    args, job, first = prepared.args, prepared.job, prepared.resume_step
    beside = job.adapter.parameters_beside(job.config) if job.adapter else 0
    stop = catch_stop(stopping, lambda: checkpoints.saving)
    with update_bar(job.order.updates, first, prepared.quiet) as bar:
        run_log = RunLog(
            run.log,
            plan.batches,
            rate=job.schedule.rate,
            due=steps_to_log(job),
            flops_per_token=6.0 * (job.config.num_non_embedding_parameters + beside),
            bar=bar,
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
                say(f"first update done {time.monotonic() - started:.1f} s after the start")
            checkpoints.check()
            trackers.update(metrics.step, job.order.epoch_at(metrics.step))
            run_log.on_update(metrics)
            bad.on_update(metrics)

        milestones = Milestones(
            job=job,
            loss_step=run.loss_step,
            evaluation=run.evaluation,
            mesh=prepared.mesh,
            run_log=run_log,
            checkpoints=checkpoints,
            facts=facts,
            output_dir=prepared.output_dir,
            stop=stop,
            first=first,
            left=prepared.saved.left if prepared.saved else (),
            goes_on=prepared.goes_on,
            bad=bad,
            finite=guard.get("finite", first or None),
            trackers=trackers,
        )
        stopped = milestones.begin(state)
        state = fit(
            state,
            plan.steps,
            plan.batches,
            prepared.mesh,
            range(first, first if stopped else job.order.updates),
            learning_rate=job.schedule.rate,
            on_update=on_update,
            due=milestones.due,
            on_due=milestones.reach,
            stop=stop,
        )
    finished = not milestones.unfinished and run.log.values["global_step"] == job.order.updates
    return state, milestones, finished


def steps_to_log(job: Job) -> Callable[[int], bool]:
    """Return the rule for log lines by steps. Lines of `--logging_strategy epoch` are written by `Milestones`."""
    if job.args.logging_strategy == "epoch":
        return lambda step: job.args.logging_first_step and step == 1
    return job.log_at


# -- Lines for the user -----------------------------------------------------------------------------------------------


def say_speed(run_log: RunLog) -> None:
    """Report the speed after the first update, where there were several, and the devices' memory, where known."""
    figures = []
    if speed := run_log.speed():
        packing = f"{1000 * speed.block_seconds:,.1f} ms on the host to pack its examples"
        update = f"median update {1000 * speed.update_seconds:,.0f} ms ({packing})"
        figures = [f"speed: {speed.tokens_per_second:,.0f} tokens/s, {update}"]
    if peak := peak_memory():
        figures.append(f"peak device memory {peak / 2**30:.1f} GiB")
    if figures:
        say(", ".join(figures))


def say_stopped(step: int) -> None:
    """Report where a stopped run ended, and how to continue."""
    if step:
        say(f"stopped after update {step}, saved as checkpoint-{step}; go on with --resume_from_checkpoint True")
    else:
        say("stopped before the first update: nothing is saved")
