#!/usr/bin/env python3
"""Fine-tune a LLaMA: the HF Trainer's command line in, an HF folder out. `--help` lists the flags."""

import dataclasses
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError, run_command
from llama_jax.base.files import make_output_dir
from llama_jax.data.tokenizer import copy_tokenizer
from llama_jax.model.config import LlamaConfig
from llama_jax.reporting.progress import byte_bar, say, show, silence, update_bar
from llama_jax.reporting.run_log import RunLog, UpdateMetrics
from llama_jax.reporting.trainer_state import TrainerState
from llama_jax.setup.arguments import Arguments, parse_arguments
from llama_jax.setup.job import Job, make_job

STOPPED = 143  # by SIGTERM, after saving


def main(argv: list[str]) -> int:
    started = time.monotonic()
    args = parse_arguments(argv)
    # JAX is imported once the flags are good: its platform may be one of them.
    if args.dry_run:
        from llama_jax.plan.dry_run import dry_run

        return dry_run(args)
    import jax

    from llama_jax.distributed import processes, sharding
    from llama_jax.distributed.platform import memory_limit, peak_memory, set_up_jax
    from llama_jax.hf.load import resize_vocabulary
    from llama_jax.hf.source import Source, refuse_other_kind, training_dtype
    from llama_jax.model.definition import merge
    from llama_jax.plan.explain import as_json, as_text, explain, show_examples, wants_colour
    from llama_jax.plan.planner import Planner, choose_scan
    from llama_jax.run.checkpoint import Checkpoints, read_run, remove_steps
    from llama_jax.run.events import Milestones
    from llama_jax.training.fit import fit
    from llama_jax.training.state import complete, init_state
    from llama_jax.training.step import make_loss_step

    processes.join(args.coordinator_address, args.num_processes, args.process_id)
    platform = set_up_jax(args.use_cpu, args.tf32, args.full_determinism)
    if not processes.is_first():
        silence()
    quiet = args.disable_tqdm or None
    for note in args.notes(platform):
        say(note)
    output_dir = Path(args.output_dir).expanduser()
    resume_step = 0
    with processes.agreed():
        mesh = sharding.make_mesh(spec=args.mesh)
        if not args.explain:
            refuse_other_kind(output_dir, flax=False)
            make_output_dir(output_dir)
            resume_step = _resume_step(args, output_dir)

        source = Source(Path(args.model_name_or_path), args.allow_pickle)
        job = make_job(args, source.config, lambda: source.tokenizer_folder, sharding.batch_ways(mesh), quiet)
        config, order, schedule = job.config, job.order, job.schedule

        dtype = args.dtype or training_dtype(source, args.hf_compat)
        facts: dict[str, Any] = {
            "dtype": dtype,
            "optim": args.optim,
            "order": order.facts(),
            "scan_layers": choose_scan(args, config, platform),
            "model": as_json_values(config),
            "data": job.data_digest,
        }
        saved = read_run(output_dir, resume_step) if resume_step else {}
        if saved:
            compare_with_saved(facts, saved, f"{output_dir}/checkpoint-{resume_step}")
            facts["scan_layers"] = saved["scan_layers"]
        planner = Planner(job, mesh, platform, dtype, facts["scan_layers"])
    processes.same({"--output_dir's last checkpoint": resume_step, **facts, **args.decisive})
    if not args.explain:
        processes.check_shared(output_dir)
    if args.show_examples and processes.is_first():
        out = sys.stderr if args.explain == "json" else sys.stdout
        print(show_examples(job, args.show_examples, wants_colour(out)), file=out)
    limit = processes.least(memory_limit())
    if args.explain:
        plan = planner.make(planner.options(limit)[0])
        described = explain(job, plan.batches, plan.abstract, dtype)
        show(as_json(described) if args.explain == "json" else as_text(described))
        return 0
    say(
        f"{config.num_parameters:,} parameters in {dtype}, {'bfloat16' if args.bf16 else dtype} matmuls, "
        f"on {mesh.size} {platform} device(s) of {jax.process_count()} process(es), "
        f"mesh {sharding.describe_mesh(mesh)}"
    )
    # Asked for now, so that what is wrong with it is said before the run and not after it.
    tokenizer_folder = source.tokenizer_to_copy() if job.tokenizer is None else None
    say(f"{len(job.examples):,} examples, {order.updates:,} updates ({job.warmup_updates:,} of warm-up)")
    planner.check_room(limit)
    with ThreadPoolExecutor(1) as background:  # programs compile while weights are read
        planning = background.submit(planner.settle, limit)
        if resume_step:
            checkpoints = Checkpoints(output_dir, args.save_total_limit, planner.saved, resume_step)
            restored = checkpoints.restore_state(resume_step, planner.saved)
            frozen = source.load(planner.run, mesh, like=planner.definition.frozen) if planner.definition.frozen else {}
        else:
            with byte_bar("reading weights", source.bytes, quiet) as bar:
                params = source.load(planner.run, mesh, bar.update)
            if job.new_tokens or config.vocab_size != source.config.vocab_size:
                params = resize_vocabulary(params, config, job.new_tokens, mesh)
        plan = planning.result()
    if len({*processes.exchange(repr(plan.option))}) > 1:
        raise RuntimeError("the processes' compilers came to different block sizes: give --max_tokens_per_device")
    batches, run = plan.batches, plan.run
    shapes = ", ".join(f"{r}x{t}" for r, t in batches.shapes)
    say(f"at most {batches.block_counts.max()} block(s) an update of {shapes} tokens; --remat {run.remat}")
    loss_step = make_loss_step(plan.definition.graphdef, config.vocab_size, args.label_smoothing_factor)
    evaluation = _make_evaluation(job, loss_step, plan.option.max_tokens, mesh, quiet)
    log = _make_log(job)
    if resume_step:
        log.resume(saved["trainer_state"], output_dir)
        schedule.load(saved["schedule"])
        state = complete(restored, frozen, plan.tx, plan.definition, mesh)
        del restored
        say(f"resumed from {output_dir / f'checkpoint-{resume_step}'}")
    else:
        if processes.is_first():
            remove_steps(output_dir)
        processes.exchange("removed")
        checkpoints = Checkpoints(output_dir, args.save_total_limit, planner.saved, 0)
        state = init_state(params, plan.tx, plan.definition, mesh)
        del params

    log_step = job.log_at
    if args.logging_strategy == "epoch":  # written at the epoch's end, after what is due by steps
        log_step = lambda step: args.logging_first_step and step == 1  # noqa: E731
    stop = _stop_on_sigterm() if jax.process_count() == 1 else _stop_together()
    with update_bar(order.updates, resume_step, quiet) as bar:
        flops = 6.0 * config.num_non_embedding_parameters
        run_log = RunLog(
            log,
            batches,
            schedule.rate,
            log_step,
            flops,
            bar,
            args.logging_nan_inf_filter,
            args.include_num_input_tokens_seen,
            saved.get("log_window"),
        )

        def on_update(metrics: UpdateMetrics) -> None:
            if metrics.step == resume_step + 1:
                say(f"first update done {time.monotonic() - started:.1f} s after the start")
            run_log.on_update(metrics)

        milestones = Milestones(
            *(job, loss_step, evaluation, mesh, run_log, checkpoints, facts, output_dir, stop),
            *(resume_step, saved),
        )
        stopping = milestones.begin(state)
        state = fit(
            state,
            plan.steps,
            batches,
            mesh,
            range(resume_step, resume_step if stopping else order.updates),
            learning_rate=schedule.rate,
            on_update=on_update,
            due=milestones.due,
            on_due=milestones.reach,
            stop=stop,
        )
    checkpoints.wait()
    rate, median, made_in = run_log.speed()
    peak = peak_memory()
    say(
        f"{rate:,.0f} tokens/s, median update {1000 * median:,.0f} ms, blocks made in {1000 * made_in:,.1f} ms"
        + (f", peak device memory {peak / 2**30:.1f} GiB" if peak else "")
    )
    done = log.values["global_step"]
    if milestones.unfinished or done < order.updates:
        checkpoints.close()
        say(
            f"stopped after update {done}; go on with --resume_from_checkpoint True"
            if done
            else "stopped before the first update: nothing is saved"
        )
        return STOPPED

    run_log.finish()
    params = state.whole_params
    if log.best_step and args.load_best_model_at_end and log.best_step != order.updates:
        best = f"{args.best_metric_key} {log.values['best_metric']:.6g}"
        say(f"the best model is that of checkpoint-{log.best_step}: {best}")
        frozen = state.frozen
        del state, params  # the restored one takes their place
        params = merge(checkpoints.restore_state(log.best_step, planner.saved).params, frozen)
    if log.best_step and args.save_total_limit == 1:
        checkpoints.keep_only(log.best_step)
    checkpoints.close()
    _export(output_dir, source, tokenizer_folder, job, params, np.dtype(run.param_dtype), quiet)
    if processes.is_first():
        log.save(output_dir)
    processes.exchange("exported")
    say(f"the HF folder is in {output_dir}")
    return 0


def _make_evaluation(job: Job, loss_step: Any, max_tokens: int, mesh: Any, quiet: bool | None):
    """What evaluates, where the flags ask for it."""
    from llama_jax.run.evaluation import Evaluation

    if job.eval_examples is None or not job.order.evaluated:
        return None
    args = job.args
    evaluation = Evaluation(
        job.eval_examples,
        loss_step,
        mesh,
        compat=args.hf_compat,
        batch_size=args.per_device_eval_batch_size,
        drop_last=args.dataloader_drop_last,
        nan_filter=args.logging_nan_inf_filter,
        max_tokens=max_tokens,
        disable_bar=quiet,
    )
    if evaluation.has_nan:
        say("warning: an evaluation batch has no trained tokens; the HF Trainer's loss of it is NaN")
    return evaluation


def _make_log(job: Job) -> TrainerState:
    args, updates = job.args, job.order.updates
    return TrainerState(
        args.hf_compat,
        max_steps=updates,
        num_train_epochs=job.num_train_epochs,
        train_batch_size=args.per_device_train_batch_size,
        logging_steps=args.every("logging", updates),
        eval_steps=args.every("eval", updates),
        save_steps=args.every("save", updates),
        greater_is_better=bool(args.greater_is_better),
    )


def _export(
    output_dir: Path,
    source: Any,
    tokenizer_folder: Path | None,
    job: Job,
    params: Any,
    dtype: np.dtype,
    quiet: bool | None,
) -> None:
    """The HF folder: weights, config, and the job's tokenizer or that of the folder."""
    from llama_jax.distributed import processes
    from llama_jax.hf.names import name_table
    from llama_jax.hf.writer import write_config, write_weights

    with byte_bar("writing weights", job.config.num_parameters * dtype.itemsize, quiet) as bar:
        write_weights(output_dir, params, job.config, dict.fromkeys(name_table(job.config), dtype), bar.update)
    if not processes.is_first():
        return
    write_config(output_dir, source.folder, source.raw, job.config, dtype)
    if job.tokenizer is not None:
        job.tokenizer.save(output_dir)
    else:
        copy_tokenizer(tokenizer_folder, output_dir)


def as_json_values(config: LlamaConfig) -> dict[str, Any]:
    """The architecture as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def compare_with_saved(facts: dict[str, Any], saved: dict[str, Any], name: str) -> None:
    """Refuse to resume what cannot go on, and say what goes on otherwise than it began."""
    for key, what in (("dtype", "parameters in"), ("optim", "the state of")):
        if saved[key] != facts[key]:
            raise InputError(f"{name} holds {what} {saved[key]}: resume it with --{key} {saved[key]}")
    for key, value in saved.get("model", {}).items():  # checkpoints of before 2026-11-25 do not tell
        if facts["model"][key] != value:
            was = f"{key} {value}, this one {facts['model'][key]}"
            raise InputError(f"{name} holds another model: it has {was}; give --model_name_or_path the same as then")
    updates = facts["order"]["updates"]
    if saved["trainer_state"]["global_step"] > updates:
        raise InputError(f"{name} is past the {updates} updates of this run: raise --num_train_epochs or --max_steps")
    if saved.get("data", facts["data"]) != facts["data"]:
        say(f"warning: {name} was made with other examples: other data, another tokenizer or --model_max_length")
    for key, value in facts["order"].items():
        if saved["order"].get(key) != value:
            say(f"warning: {name} was made with {key} {saved['order'].get(key)}, this run has {value}")
    if saved["scan_layers"] != facts["scan_layers"]:
        say(f"--scan_layers: {saved['scan_layers']}, as in {name}")


def _resume_step(args: Arguments, output_dir: Path) -> int:
    """The checkpoint to go on from, 0 for none."""
    from llama_jax.run.checkpoint import find_foreign, find_steps

    if foreign := find_foreign(output_dir):
        raise InputError(
            f"{output_dir}/{foreign[-1]}: is not a checkpoint of this program (the HF Trainer's?); move it away, or "
            "choose another --output_dir"
        )
    wanted, steps = args.resume_from_checkpoint, find_steps(output_dir)
    if wanted and wanted.lower() == "auto":
        return steps[-1] if steps else 0
    if wanted and wanted.lower() not in ("false", "no", "0"):
        if wanted.lower() in ("true", "yes", "1"):
            if not steps:
                raise InputError(f"--resume_from_checkpoint True: no checkpoint in {output_dir}")
            return steps[-1]
        path = Path(wanted).expanduser()
        name = path.name.removeprefix("checkpoint-")
        if path.parent.resolve() != output_dir.resolve() or not name.isdigit() or int(name) not in steps:
            raise InputError(f"--resume_from_checkpoint {wanted}: not one of the checkpoints in {output_dir}: {steps}")
        return int(name)
    if steps and not args.overwrite_output_dir:
        raise InputError(
            f"{output_dir} already holds checkpoint-{steps[-1]}: go on with --resume_from_checkpoint True, or start "
            "anew with --overwrite_output_dir True, which removes it"
        )
    return 0


def _stop_on_sigterm():
    """A function that tells whether SIGTERM or Ctrl-C has come; a second one ends the process at once."""
    received = []

    def handle(signum, frame):
        received.append(signum)
        say("stopping: the update under way is finished and saved")
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return lambda: bool(received)


def _stop_together():
    """The same for several processes: all are told at the same update when one of them has got a signal."""
    from llama_jax.distributed.processes import stop_together

    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    stop = stop_together()

    def asked() -> bool:
        if stopping := stop():
            say("stopping: the update under way is finished and saved")
        return stopping

    return asked


if __name__ == "__main__":
    sys.exit(run_command(main))
