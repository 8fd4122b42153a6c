"""The flags applied to a model and its data: all that is settled before anything compiles."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from llama_jax.arguments import Arguments
from llama_jax.config import LlamaConfig
from llama_jax.data.batches import Batches
from llama_jax.data.examples import Examples, check_examples, from_tokenized, tokenize_alpaca
from llama_jax.data.normalisation import training_loss
from llama_jax.data.order import Order, group_by_length, randperm
from llama_jax.data.records import TOKENIZED, Record, read_records
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.errors import InputError
from llama_jax.reporting.progress import count_bar, say
from llama_jax.schedule import Schedule, make_schedule


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be made: `config` has the tokenizer's vocabulary; `log_at`, `eval_at` and `save_at` tell what is due
    after an update, by its number from 1. What a strategy of "epoch" asks for comes after what "steps" does."""

    args: Arguments
    config: LlamaConfig
    tokenizer: Tokenizer | None
    examples: Examples
    eval_examples: Examples | None
    order: Order
    schedule: Schedule
    log_at: Callable[[int], bool]
    eval_at: Callable[[int], bool]
    save_at: Callable[[int], bool]

    @property
    def warmup_updates(self) -> int:
        return self.args.warmup_updates(self.order.updates)

    @property
    def num_train_epochs(self) -> int:
        """Epochs begun, as the HF Trainer counts them."""
        order = self.order
        return math.ceil(order.epochs if order.max_steps <= 0 else order.updates / order.updates_per_epoch)

    def batches(self) -> Batches:
        """The blocks of every update. Planning their shapes packs the whole run once."""
        normalise = training_loss(self.order, self.args.average_tokens_across_devices)
        return Batches(self.examples, self.order, normalise, self.order.ranks, self.args.max_tokens_per_device)

    def steps(self, at: Callable[[int], bool]) -> list[int]:
        """The numbers of updates after which something is due."""
        return [k for k in range(1, self.order.updates + 1) if at(k)]


def make_job(
    args: Arguments,
    config: LlamaConfig,
    tokenizer_folder: Callable[[], Path],
    ranks: int,
    disable_bars: bool | None = None,
) -> Job:
    """Read and tokenise the data, and settle order, schedule and what is due when. Raises InputError."""
    path = Path(args.data_path or "")
    form, records = read_records(path)
    tokenizer = None if form == TOKENIZED else _open_tokenizer(tokenizer_folder(), config)

    def tokenized(records: list[Record], path: Path) -> Examples:
        if tokenizer is None:
            return check_examples(from_tokenized(records), config.vocab_size, str(path))
        with count_bar("tokenizing", len(records), "record", disable_bars) as bar:
            examples = tokenize_alpaca(records, tokenizer, args.model_max_length, bar.update)
        return check_examples(examples, len(tokenizer), str(path))

    eval_examples = None
    if args.eval_data_path:
        eval_form, eval_records = read_records(eval_path := Path(args.eval_data_path))
        if eval_form != form:
            raise InputError(f"{eval_path}: holds {eval_form} records, and {path} {form} ones; should be of one form")
        eval_examples = tokenized(eval_records, eval_path)
    examples = tokenized(records, path)
    if args.validation_split_percentage:
        eval_examples, examples = _held_out(examples, args.validation_split_percentage)
    if eval_examples and args.hf_compat == "5" and args.train_sampling_strategy == "group_by_length":
        # Its evaluations are grouped too, from a generator of their own, the same each time.
        permuted = randperm(len(eval_examples), args.seed if args.data_seed is None else args.data_seed)
        grouped = group_by_length(permuted, eval_examples.lengths, args.per_device_eval_batch_size)
        eval_examples = eval_examples.take(grouped)

    order = Order(
        len(examples),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.num_train_epochs,
        args.hf_compat,
        args.seed,
        args.data_seed,
        args.max_steps,
        ranks,
        args.dataloader_drop_last,
        args.train_sampling_strategy,
        examples.lengths,
    )
    log_at, eval_at, save_at = (args.due(name, order) for name in ("logging", "eval", "save"))
    evaluated = [k for k in range(1, order.updates + 1) if eval_at(k)]
    order = dataclasses.replace(order, evaluated=(*([0] if args.eval_on_start else []), *evaluated))
    schedule = make_schedule(
        args.lr_scheduler_type,
        args.learning_rate,
        args.warmup_updates(order.updates),
        order.updates,
        args.hf_compat,
        args.schedule_kwargs,
    )
    if tokenizer is not None:
        config = _resized(config, tokenizer, args.hf_compat)
    return Job(args, config, tokenizer, examples, eval_examples, order, schedule, log_at, eval_at, save_at)


def _open_tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer:
    tokenizer = open_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer has {len(tokenizer)} tokens, more than the {config.vocab_size} rows "
            "of the model's embedding; it belongs to another model"
        )
    tokenizer.add_missing_special_tokens()
    for warning in tokenizer.warnings():
        say(f"warning: {warning}")
    return tokenizer


def _held_out(examples: Examples, percentage: float) -> tuple[Examples, Examples]:
    """The first share of the examples, for evaluation, and the rest."""
    count = round(len(examples) * percentage / 100)
    if not 0 < count < len(examples):
        raise InputError(
            f"--validation_split_percentage {percentage:g}: of {len(examples)} examples it holds out {count}; should "
            "leave at least one on either side"
        )
    return examples.split(count)


def _resized(config: LlamaConfig, tokenizer: Tokenizer, compat: str) -> LlamaConfig:
    """The architecture with as many vocabulary rows as the tokenizer has tokens, as stanford_alpaca resizes it."""
    if len(tokenizer) == config.vocab_size:
        return config
    # Resizing gives transformers 4.37 a new embedding, without the old one's padding_idx.
    pad_token_id = None if compat == "4.37" else config.pad_token_id
    say(f"vocabulary: {config.vocab_size} rows become {len(tokenizer)}, as many as the tokenizer has tokens")
    return dataclasses.replace(config, vocab_size=len(tokenizer), pad_token_id=pad_token_id)
