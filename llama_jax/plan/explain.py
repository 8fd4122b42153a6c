"""Describe a run for `--explain`, by its flags, model and data, before anything compiles."""

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from llama_jax.data.batches import Batches
from llama_jax.data.doctor import as_lines, diagnose
from llama_jax.data.examples import IGNORE_INDEX
from llama_jax.data.records import Bad, Record, read_records, without
from llama_jax.data.sources import find_sources
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.distributed.sharding import bytes_on_host
from llama_jax.distributed.storage import tree_bytes
from llama_jax.model.rope import covered_positions
from llama_jax.plan.chips import host_rate
from llama_jax.reporting.progress import count_bar
from llama_jax.setup.job import Job, kept_steps, tokenized
from llama_jax.training.state import TrainState, trained_parameters

Description = dict[str, Any]  # by name, for JSON

# The rules of each version of transformers, by the name of the fact that a rule decides.
RULES = {
    "4.37": {
        "updates_per_epoch": "floor(micro-batches / accumulation); the rest carries over into the next epoch",
        "loss": "mean over the tokens of each micro-batch, then over the accumulation's micro-batches",
        "first_examples": "one generator from --seed draws every epoch's permutation; evaluations move later ones",
        "warmup_updates": "ceil(updates * warmup_ratio), or warmup_steps",
        "learning_rate": "a log line shows the next update's rate",
        "checkpoints_left": "where save_steps divides; none at the end for being the end",
        "dtype": "parameters in float32 whatever the checkpoint holds",
        "rotary": "rotated in bfloat16 under --bf16 True",
    },
    "5": {
        "updates_per_epoch": "ceil(micro-batches / accumulation); an epoch's last update may be short",
        "loss": "sum over the update's tokens, divided by their number",
        "first_examples": "each epoch's permutation from (data_seed or seed) + epoch",
        "warmup_updates": "ceil(updates * share), or warmup_steps where it is 1 or more",
        "learning_rate": "a log line shows this update's rate",
        "checkpoints_left": "where save_steps divides, and at the end",
        "dtype": "parameters in the checkpoint's type",
        "rotary": "rotated in float32",
    },
}


def explain(job: Job, batches: Batches, state: TrainState, dtype: str, device_kind: str = "") -> Description:
    """Return the facts of a run by name, for JSON. `state` is the abstract train state, on devices of jax's name
    `device_kind`."""
    order, args, lengths = job.order, job.args, job.examples.lengths
    updates = order.updates
    saved, evaluated = job.steps(job.save_at), list(order.evaluated)
    tokens = order.reduce(np.add, lengths, order.bounds)
    trained = order.reduce(np.add, job.examples.trained, order.bounds)
    computed = sum(rows * length for k in range(updates) for rows, length in batches.shapes_of(k))
    warmup = job.warmup_updates
    chosen = sorted({1, *range(warmup, warmup + 2), updates // 2, updates} & set(range(1, updates + 1)))
    opt_bytes = tree_bytes(state.opt_state)
    return {
        "hf_compat": args.hf_compat,
        "examples": len(job.examples),
        "eval_examples": len(job.eval_examples) if job.eval_examples else 0,
        "ranks": order.ranks,
        "micro_batches_per_epoch": order.batches_per_epoch,
        "updates_per_epoch": order.updates_per_epoch,
        "updates": updates,
        "epochs": order.epoch_at(updates),
        "warmup_updates": warmup,
        "learning_rates": {k: job.schedule.rate(k - 1) for k in chosen},
        "first_examples": order.examples_of(0).tolist(),
        "examples_trained": int(order.reduce(np.add, np.ones_like(lengths), order.bounds).sum()),
        "tokens_an_update": float(tokens.mean()),
        "trained_tokens_an_update": float(trained.mean()),
        "shapes": [list(shape) for shape in batches.shapes],
        "blocks_an_update": int(batches.block_counts.max()),
        "fill": float(tokens.sum() / computed),
        "evaluations": evaluated,
        "checkpoints": [f"checkpoint-{k}" for k in saved],
        "checkpoints_left": [f"checkpoint-{k}" for k in kept_steps(saved, args.save_total_limit)],
        "best_checkpoint_kept": bool(args.metric_for_best_model and evaluated),
        "parameters": job.config.num_parameters,
        "trained_parameters": trained_parameters(state) if state.frozen else job.config.num_parameters,
        "dtype": dtype,
        "state_bytes": {
            "parameters": tree_bytes((state.trainable, state.lower)),
            **({"frozen": tree_bytes(state.frozen)} if state.frozen else {}),
            "optimizer": opt_bytes,
            "gradient": tree_bytes(state.trainable),
        },
        **(
            {
                "offloaded": {
                    "bytes_each_way": (size := bytes_on_host(state.opt_state)),
                    "bytes_a_second": (rate := host_rate(device_kind)),
                    "seconds": size / rate,
                }
            }
            if args.offload_optimizer
            else {}
        ),
        "rules": RULES[args.hf_compat],
        "data": examine(job),
    }


def examine(job: Job) -> Description:
    """Diagnose the examples that are trained on. Text is read and tokenized once more for it. Raises InputError."""
    args, quiet = job.args, job.args.disable_tqdm or None
    records: Sequence[Record] = []
    whole = None
    if job.tokenizer is not None:
        bad = Bad(args.skip_bad_records)
        read = read_records(find_sources(args.data_path or [], args.dataset_config_name), bad)[1]
        whole = tokenized(job.form, read, job.tokenizer, limit=sys.maxsize, source="data", bad=bad, disable_bars=quiet)
        whole = whole.split(job.held_out)[1]
        records = without(read, bad.dropped)[job.held_out :]
    with count_bar("comparing texts", len(records), "record", quiet) as bar:
        return diagnose(
            job.form,
            job.examples,
            records,
            whole=whole,
            tokenizer=job.tokenizer,
            limit=args.model_max_length,
            positions=covered_positions(job.config),
            first=job.held_out + 1,
            progress=bar.update,
        )


def show_examples(job: Job, n: int, colour: bool) -> str:
    """Return the first n examples in the order of training, as text; trained tokens are green, or between brackets."""
    around = {True: ("\x1b[32m", "\x1b[0m"), False: ("\x1b[2m", "\x1b[0m")} if colour else {True: "⟦⟧", False: ("", "")}
    return "\n".join(
        f"--- {title} ---\n{''.join(around[kind][0] + text + around[kind][1] for kind, text in spans)}\n"
        for title, spans in first_examples(job, n)
    )


def first_examples(job: Job, n: int, longest: int | None = None) -> Iterator[tuple[str, list[tuple[bool, str]]]]:
    """Yield a title and spans of text, (whether they are trained, text), of the first n examples in the order of
    training; of an example at most the `longest` first tokens."""
    order = job.order
    indices = (int(i) for k in range(order.updates) for micro in order.update(k) for rank in micro for i in rank)
    for _, i in zip(range(n), indices, strict=False):
        ids, labels = job.examples[i]
        trained = labels != IGNORE_INDEX
        trained[0] = False  # nothing predicts the first token
        title = f"example {i} (record {job.held_out + i + 1}): {len(ids):,} tokens, {trained.sum():,} trained"
        yield title, _spans(ids[:longest], trained[:longest], job.tokenizer)


def wants_colour(stream: TextIO) -> bool:
    """Return whether to print colours to the stream: to a terminal, or where FORCE_COLOR is set."""
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def _spans(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer | None) -> list[tuple[bool, str]]:
    """Return spans of the text of tokens, special ones by name; without a tokenizer, the ids."""
    special = {tokenizer.token_to_id(token): token for token in tokenizer.special_texts()} if tokenizer else {}
    alone = np.isin(ids, [i for i in special if i is not None])
    cuts = np.flatnonzero((trained[1:] != trained[:-1]) | alone[1:] | alone[:-1]) + 1
    runs, decoded = [], ""
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        if tokenizer is None:
            text = " ".join(map(str, ids[start:end])) + (" " if end < len(ids) else "")
        elif alone[start]:
            text = special[ids[start]]
        else:
            # Decoded from the start each time: a run alone would lose its first space. Half a character at the end is
            # whole in the next run.
            before, decoded = decoded, tokenizer.decode(ids[:end].tolist()).rstrip("\ufffd")
            text = decoded[len(before) :].replace("\x1b", "\\x1b")
        runs.append((bool(trained[start]), text))
    return [(kind, "".join(text for _, text in group)) for kind, group in itertools.groupby(runs, lambda run: run[0])]


def as_text(facts: Description) -> str:
    """Format the facts for a reader, one subject a line, each with the rule that decides it."""
    rates = ", ".join(f"{rate:.3g} at {k}" for k, rate in facts["learning_rates"].items())
    shapes = ", ".join(f"{r}x{t}" for r, t in facts["shapes"])
    sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in facts["state_bytes"].items())
    alone = facts["trained_parameters"] != facts["parameters"]
    trained = f", {facts['trained_parameters']:,} trained" if alone else ""
    best = " (and the best)" if facts["best_checkpoint_kept"] else ""
    subjects = {  # name: value, the rule that decided it
        "examples": (f"{facts['examples']:,}; trained on, repeats counted: {facts['examples_trained']:,}", ""),
        "updates per epoch": (f"{facts['updates_per_epoch']:,}", "updates_per_epoch"),
        "updates": (f"{facts['updates']:,}, {facts['epochs']:.4g} epochs", ""),
        "warm-up": (f"{facts['warmup_updates']:,} updates", "warmup_updates"),
        "learning rate": (rates, "learning_rate"),
        "loss": ("", "loss"),
        "first update": (f"examples {_some(facts['first_examples'])}", "first_examples"),
        "tokens an update": (
            f"{facts['tokens_an_update']:,.0f}, of which trained {facts['trained_tokens_an_update']:,.0f}",
            "",
        ),
        "on the device": (
            f"at most {facts['blocks_an_update']} block(s) an update, of {shapes} tokens, {facts['fill']:.1%} filled",
            "",
        ),
        "evaluations": (f"{len(facts['evaluations'])}, after updates {_some(facts['evaluations'])}", ""),
        "checkpoints": (f"{len(facts['checkpoints'])}: {_some(facts['checkpoints'])}", ""),
        "left at the end": (_some(facts["checkpoints_left"]) + best, "checkpoints_left"),
        "type": (facts["dtype"], "dtype"),
        "rotary": ("", "rotary"),
        "state": (f"{facts['parameters']:,} parameters{trained}; over all devices: {sizes}", ""),
    }
    if moved := facts.get("offloaded"):
        size, rate, seconds = (moved[name] for name in ("bytes_each_way", "bytes_a_second", "seconds"))
        subjects["moments"] = (
            f"in the host's memory; an update moves {size / 2**30:.2f} GiB to each device and as much back, "
            f"{seconds:.2g} s at {rate / 1e9:.0f} GB/s each way",
            "",
        )
    lines = [
        f"{name + ':':19}" + " - ".join(x for x in (value, facts["rules"].get(rule)) if x)
        for name, (value, rule) in subjects.items()
    ]
    lines += [f"{name + ':' if name else '':19}{text}" for name, text in as_lines(facts["data"])]
    return "\n".join([f"by the rules of transformers {facts['hf_compat']}:", *lines])


def _some(items: Sequence[object], limit: int = 8) -> str:
    """Return the first items, an ellipsis and the last."""
    shown = ", ".join(str(x) for x in items[:limit])
    return (shown + (f", ... {items[-1]}" if len(items) > limit else "")) or "none"


def as_json(facts: Description) -> str:
    """Format the facts as JSON."""
    return json.dumps(facts, indent=2)
