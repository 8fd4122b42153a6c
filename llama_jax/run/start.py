"""Start a run: restore a checkpoint's state or load the model's weights, while the programs compile."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from llama_jax.base.bucket import is_remote
from llama_jax.distributed import processes
from llama_jax.distributed.storage import tree_bytes
from llama_jax.hf import peft
from llama_jax.hf.load import place_arrays, resize_vocabulary
from llama_jax.model.definition import Definition, define, merge
from llama_jax.model.lora import magnitudes
from llama_jax.model.roles import Params
from llama_jax.plan.chips import peak_flops
from llama_jax.plan.operations import operations
from llama_jax.plan.planner import Plan
from llama_jax.reporting.progress import byte_bar, say
from llama_jax.reporting.speed import Speedometer
from llama_jax.reporting.trainer_state import TrainerState
from llama_jax.run.checkpoint import Checkpoints, find_removable, find_steps, remove_steps, restore_state
from llama_jax.run.console import say_plan
from llama_jax.run.disk import check_space, folder_bytes
from llama_jax.run.evaluation import Evaluation
from llama_jax.run.export import model_files
from llama_jax.run.ownership import new_identity
from llama_jax.run.prepare import Prepared
from llama_jax.run.tasks import Evaluate, with_tasks
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job
from llama_jax.training.guard import place_losses
from llama_jax.training.state import SavedState, TrainState, complete, init_state
from llama_jax.training.step import LossStep, make_loss_step

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Hold a prepared run with its compiled programs, its evaluation (None for none), its log and its speed."""

    prepared: Prepared
    plan: Plan
    loss_step: LossStep
    evaluation: Evaluate | None
    log: TrainerState
    speedometer: Speedometer


def restore(prepared: Prepared, limit: int | None) -> tuple[Run, Checkpoints, TrainState]:
    """Resume a checkpoint: read its state while the programs compile, and continue its log and schedule."""
    saved, checkpoint = prepared.saved, prepared.resume_from
    assert saved is not None and checkpoint is not None

    def read() -> tuple[SavedState, Params]:
        planner, trainers = prepared.planner, prepared.trainers
        state = trainers.read() if trainers else restore_state(checkpoint, planner.saved)
        frozen = planner.definition.frozen
        return state, read_weights(prepared, like=frozen) if frozen else {}

    plan, (restored, frozen), files = compile_while(read, prepared, limit)
    if not prepared.goes_on:
        remove_earlier(prepared.output_dir)
    checkpoints = open_checkpoints(prepared, files)
    run = make_run(prepared, plan)
    run.log.resume(saved.trainer_state, prepared.output_dir, prepared.args.load_best_model_at_end)
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
    state = init_state(params, plan.tx, plan.definition, prepared.mesh, prepared.args.offload_optimizer)
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
        with prepared.watch.phase("weights and compile"):
            result = read()
            plan = planning.result()
    with processes.agreed():
        files = making.result() if making else {}
    say_plan(prepared, plan, limit)
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
    """Add the evaluation, the log and the speedometer to a plan."""
    args, job = prepared.args, prepared.job

    def losses(definition: Definition) -> LossStep:
        return make_loss_step(definition, prepared.mesh, job.config.vocab_size, args.label_smoothing_factor)

    loss_step = exported = losses(plan.definition)
    if plan.run.fp8:  # an evaluation is of the exported model, which does not know of fp8
        exported = losses(define(job.config, replace(plan.run, fp8=False), prepared.mesh))
    evaluation = with_tasks(make_evaluation(prepared, exported, plan.option.max_tokens), prepared.tasks)
    peak = peak_flops(prepared.mesh.devices.flat[0].device_kind, prepared.mesh.size)
    speedometer = Speedometer(
        lambda: prepared.watch.seconds("training"), flops_per_token(job) if peak is not None else 0.0, peak
    )
    return Run(
        prepared=prepared,
        plan=plan,
        loss_step=loss_step,
        evaluation=evaluation,
        log=make_log(args, job),
        speedometer=speedometer,
    )


def flops_per_token(job: Job) -> float:
    """Return the mean of the model's operations for a token of the examples, as MFU counts them."""
    lengths, counts = np.unique(job.examples.lengths, return_counts=True)
    lora = job.adapter.lora if job.adapter else None
    made = [operations(job.config, int(n), int(n), "none", lora)[0] for n in lengths]
    return float(np.dot(made, counts) / np.dot(lengths, counts))


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
