#!/usr/bin/env python3
"""Fine-tune a LLaMA: the HF Trainer's command line in, an HF folder out. `--help` lists the flags."""

import copy
import dataclasses
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.arguments import Arguments, parse_arguments
from llama_jax.config import LlamaConfig
from llama_jax.data.batches import Batches
from llama_jax.data.examples import Examples, check_examples, from_tokenized, tokenize_alpaca
from llama_jax.data.order import Order
from llama_jax.data.records import TOKENIZED, read_records
from llama_jax.data.tokenizer import Tokenizer, copy_tokenizer, open_tokenizer
from llama_jax.errors import InputError, run_command
from llama_jax.files import make_output_dir
from llama_jax.reporting.progress import byte_bar, count_bar, say, update_bar
from llama_jax.reporting.run_log import RunLog
from llama_jax.reporting.trainer_state import TrainerState

STOPPED = 143  # by SIGTERM, after saving


def main(argv: list[str]) -> int:
    started = time.monotonic()
    args = parse_arguments(argv)
    # JAX is imported once the flags are good: its platform may be one of them.
    import jax

    from llama_jax import sharding
    from llama_jax.checkpoint import Checkpoints, find_steps, read_run, remove_steps
    from llama_jax.hf.load import abstract_params, resize_vocabulary
    from llama_jax.hf.names import name_table
    from llama_jax.hf.source import Source
    from llama_jax.hf.writer import write_config, write_weights
    from llama_jax.model import RunOptions
    from llama_jax.optimizer import make_optimizer, make_schedule
    from llama_jax.platform import peak_memory, set_up_jax
    from llama_jax.train import TrainState, UpdateMetrics, abstract_state, fit, init_state, make_train_step

    platform = set_up_jax(args.use_cpu, args.tf32)
    quiet = args.disable_tqdm or None
    for note in args.notes(platform):
        say(note)
    mesh = sharding.make_mesh()
    output_dir = make_output_dir(Path(args.output_dir).expanduser())
    resume_step = _resume_step(args, output_dir, find_steps(output_dir))

    source = Source(Path(args.model_name_or_path), args.allow_pickle)
    examples, tokenizer = load_examples(args, source.config, lambda: source.tokenizer_folder, quiet)
    config = _resized(source.config, tokenizer, args.hf_compat)
    order = make_order(args, len(examples), sharding.batch_ways(mesh))
    batches = Batches(examples, order, order.ranks, args.max_tokens_per_device)
    schedule = make_schedule(
        args.lr_scheduler_type, args.learning_rate, args.warmup_updates(order.updates), order.updates
    )

    facts: dict[str, Any] = {"dtype": args.dtype, "order": order.facts(), "scan_layers": scan_layers(args, config)}
    saved = read_run(output_dir, resume_step) if resume_step else {}
    if saved:
        compare_with_saved(facts, saved, f"{output_dir}/checkpoint-{resume_step}")
        facts["scan_layers"] = saved["scan_layers"]
    compute = jax.numpy.bfloat16 if args.bf16 else None
    run = RunOptions(
        param_dtype=jax.numpy.dtype(args.dtype),
        compute_dtype=compute,
        rope_dtype=compute if args.hf_compat == "4.37" else None,
        scan_layers=facts["scan_layers"],
        remat="full" if args.gradient_checkpointing else "matmuls",
    )
    blocks = np.asarray([batches.blocks(k) for k in range(order.updates)], np.int32)
    tx = make_optimizer(
        schedule,
        b1=args.adam_beta1,
        b2=args.adam_beta2,
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        blocks=blocks,
    )
    say(
        f"{config.num_parameters:,} parameters in {args.dtype}, {'bfloat16' if args.bf16 else args.dtype} matmuls, "
        f"on {len(mesh.devices.flat)} {platform} device(s)"
    )
    say(
        f"{len(examples):,} examples, {order.updates:,} updates ({args.warmup_updates(order.updates):,} of warm-up), "
        f"at most {blocks.max()} block(s) an update of {', '.join(f'{r}x{t}' for r, t in batches.shapes)} tokens"
    )

    graphdef, abstract_parameters = abstract_params(config, run, mesh)
    abstract = abstract_state(abstract_parameters, tx, mesh)
    if not resume_step:
        remove_steps(output_dir)
    checkpoints = Checkpoints(output_dir, args.save_total_limit, abstract)
    log = TrainerState(
        args.hf_compat,
        max_steps=order.updates,
        num_train_epochs=math.ceil(order.epochs if args.max_steps <= 0 else order.updates / order.updates_per_epoch),
        train_batch_size=args.per_device_train_batch_size,
        logging_steps=args.every("logging", order.updates),
        save_steps=args.every("save", order.updates),
    )
    if resume_step:
        log.resume(saved["trainer_state"])
        state = checkpoints.restore_state(resume_step, abstract)
        say(f"resumed from {output_dir / f'checkpoint-{resume_step}'}")
    else:
        with byte_bar("reading weights", source.bytes, quiet) as bar:
            params = source.load(run, mesh, bar.update)
        if config.vocab_size != source.config.vocab_size:
            params = resize_vocabulary(params, source.config, config, mesh)
        state = init_state(params, tx, mesh)
        del params

    ends = order.epoch_ends()
    log_at = args.due("logging", order.updates, ends)
    save_at = args.due("save", order.updates, ends)
    stop = _stop_on_sigterm()
    with update_bar(order.updates, resume_step, quiet) as bar:
        run_log = RunLog(log, batches, schedule, log_at, 6.0 * config.num_non_embedding_parameters, bar)

        def on_update(m: UpdateMetrics) -> None:
            if m.step == resume_step + 1:
                say(f"first update done {time.monotonic() - started:.1f} s after the start")
            run_log.on_update(m.step, m.loss, m.grad_norm, m.tokens)

        def on_save(step: int, state: TrainState) -> None:
            checkpoints.save(step, state, {"trainer_state": copy.deepcopy(log.values), **facts})

        state = fit(
            state,
            make_train_step(graphdef, tx, config.vocab_size, args.label_smoothing_factor),
            batches,
            mesh,
            range(resume_step, order.updates),
            on_update=on_update,
            on_save=on_save,
            save_at=save_at,
            stop=stop,
        )
    checkpoints.wait()
    checkpoints.close()
    rate, median = run_log.speed()
    peak = peak_memory()
    say(
        f"{rate:,.0f} tokens/s, median update {1000 * median:,.0f} ms"
        + (f", peak device memory {peak / 2**30:.1f} GiB" if peak else "")
    )
    if log.values["global_step"] < order.updates:
        say(f"stopped after update {log.values['global_step']}; go on with --resume_from_checkpoint True")
        return STOPPED

    run_log.finish()
    dtype = np.dtype(run.param_dtype)
    with byte_bar("writing weights", config.num_parameters * dtype.itemsize, quiet) as bar:
        write_weights(output_dir, state.params, config, dict.fromkeys(name_table(config), dtype), bar.update)
    write_config(output_dir, source.folder, source.raw, config, dtype)
    if tokenizer is not None:
        tokenizer.save(output_dir)
    else:
        copy_tokenizer(source.tokenizer_folder, output_dir)
    log.save(output_dir)
    say(f"the HF folder is in {output_dir}")
    return 0


def scan_layers(args: Arguments, config: LlamaConfig) -> bool:
    """Whether layers are stacked: a few unrolled ones compile as fast, and many do not."""
    return config.num_hidden_layers > 8 if args.scan_layers is None else args.scan_layers


def compare_with_saved(facts: dict[str, Any], saved: dict[str, Any], name: str) -> None:
    """Refuse to resume what cannot go on, and say what goes on otherwise than it began."""
    if saved["dtype"] != facts["dtype"]:
        raise InputError(f"{name} holds {saved['dtype']} parameters: resume it with --dtype {saved['dtype']}")
    updates = facts["order"]["updates"]
    if saved["trainer_state"]["global_step"] > updates:
        raise InputError(f"{name} is past the {updates} updates of this run: raise --num_train_epochs or --max_steps")
    for key, value in facts["order"].items():
        if saved["order"][key] != value:
            say(f"warning: {name} was made with {key} {saved['order'][key]}, this run has {value}")
    if saved["scan_layers"] != facts["scan_layers"]:
        say(f"--scan_layers: {saved['scan_layers']}, as in {name}")


def load_examples(args: Arguments, config: LlamaConfig, tokenizer_folder, quiet) -> tuple[Examples, Tokenizer | None]:
    """The examples of `--data_path`, and the tokenizer where the records are text."""
    path = Path(args.data_path or "")
    form, records = read_records(path)
    if form == TOKENIZED:
        return check_examples(from_tokenized(records), config.vocab_size, str(path)), None
    tokenizer = open_tokenizer(tokenizer_folder())
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer has {len(tokenizer)} tokens, more than the {config.vocab_size} rows "
            "of the model's embedding; it belongs to another model"
        )
    tokenizer.add_missing_special_tokens()
    for warning in tokenizer.warnings():
        say(f"warning: {warning}")
    with count_bar("tokenizing", len(records), "record", quiet) as bar:
        examples = tokenize_alpaca(records, tokenizer, args.model_max_length, bar.update)
    return check_examples(examples, len(tokenizer), str(path)), tokenizer


def make_order(args: Arguments, examples: int, ranks: int) -> Order:
    return Order(
        examples,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.num_train_epochs,
        args.hf_compat,
        args.seed,
        args.data_seed,
        args.max_steps,
        ranks,
        args.dataloader_drop_last,
    )


def _resized(config: LlamaConfig, tokenizer: Tokenizer | None, compat: str) -> LlamaConfig:
    """The architecture with as many vocabulary rows as the tokenizer has tokens, as stanford_alpaca resizes it."""
    if tokenizer is None or len(tokenizer) == config.vocab_size:
        return config
    # Resizing gives transformers 4.37 a new embedding, without the old one's padding_idx.
    pad_token_id = None if compat == "4.37" else config.pad_token_id
    say(f"vocabulary: {config.vocab_size} rows become {len(tokenizer)}, as many as the tokenizer has tokens")
    return dataclasses.replace(config, vocab_size=len(tokenizer), pad_token_id=pad_token_id)


def _resume_step(args: Arguments, output_dir: Path, steps: list[int]) -> int:
    """The checkpoint to go on from, 0 for none."""
    wanted = args.resume_from_checkpoint
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


if __name__ == "__main__":
    sys.exit(run_command(main))
