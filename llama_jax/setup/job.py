"""The flags applied to a model and its data: all that is settled before anything compiles."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from llama_jax.base.errors import InputError
from llama_jax.base.files import cache_folder
from llama_jax.data.batches import Batches
from llama_jax.data.cache import data_digest, load_examples, save_examples
from llama_jax.data.chat import writes_the_date
from llama_jax.data.examples import Examples, check_examples, tokenize
from llama_jax.data.normalisation import training_loss
from llama_jax.data.order import Order, group_by_length, randperm
from llama_jax.data.records import CHAT, FORMS, TOKENIZED, Record, read_records
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.model.config import LlamaConfig
from llama_jax.reporting.progress import count_bar, say
from llama_jax.setup.arguments import Arguments
from llama_jax.training.schedule import Schedule, make_schedule


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be made: `config` has the tokenizer's vocabulary; `log_at`, `eval_at` and `save_at` tell what is due
    after an update, by its number from 1. What a strategy of "epoch" asks for comes after what "steps" does.
    `form` is that of the data file, `held_out` how many of its first records are kept for evaluation, and `data_digest`
    the checksum of all examples. The last `new_tokens` of the vocabulary are such as the tokenizer had not."""

    args: Arguments
    config: LlamaConfig
    form: str
    tokenizer: Tokenizer | None
    examples: Examples
    held_out: int
    eval_examples: Examples | None
    order: Order
    schedule: Schedule
    log_at: Callable[[int], bool]
    eval_at: Callable[[int], bool]
    save_at: Callable[[int], bool]
    new_tokens: int
    data_digest: str

    @property
    def warmup_updates(self) -> int:
        return self.args.warmup_updates(self.order.updates)

    @property
    def num_train_epochs(self) -> int:
        """Epochs begun, as the HF Trainer counts them."""
        order = self.order
        return math.ceil(order.epochs if order.max_steps <= 0 else order.updates / order.updates_per_epoch)

    def batches(self, max_tokens: int, row_limit: int) -> Batches:
        """The blocks of every update: of so many tokens a device at most, in rows of at most `row_limit`, unless an
        example is longer. Planning their shapes packs the whole run."""
        order, args = self.order, self.args
        with count_bar("planning blocks", 2 * order.updates, "update", args.disable_tqdm or None) as bar:
            return Batches(
                self.examples,
                order,
                training_loss(order, args.average_tokens_across_devices),
                order.ranks,
                max_tokens,
                row_limit,
                packed=args.packing,
                progress=bar.update,
            )

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
    folder: Path | None = None
    with contextlib.suppress(InputError):  # which matters only where there is text
        folder = tokenizer_folder()
    path, eval_path = Path(args.data_path or ""), Path(args.eval_data_path) if args.eval_data_path else None
    data = _Data(path, args, folder)
    say(f"{path}: {data.form} records: {FORMS[data.form]}")
    eval_data = _Data(eval_path, args, folder) if eval_path else None
    if eval_data and eval_data.form != data.form:
        forms = f"holds {eval_data.form} records, and {path} {data.form} ones"
        raise InputError(f"{eval_path}: {forms}; should be of one form")
    tokenizer, new_tokens = (
        (None, 0) if data.form == TOKENIZED else _open_tokenizer(tokenizer_folder(), config.vocab_size)
    )
    vocab_size = config.vocab_size if tokenizer is None else len(tokenizer)
    eval_examples = eval_data.examples(tokenizer, vocab_size, disable_bars) if eval_data else None
    examples, held_out = data.examples(tokenizer, vocab_size, disable_bars), 0
    if args.validation_split_percentage:
        eval_examples, examples = _held_out(examples, args.validation_split_percentage)
        held_out = len(eval_examples)
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
        config = _resized(config, len(tokenizer), new_tokens, args.hf_compat)
    return Job(
        *(args, config, data.form, tokenizer, examples, held_out, eval_examples),
        *(order, schedule, log_at, eval_at, save_at, new_tokens),
        " ".join(d.checksum for d in (data, eval_data) if d),
    )


class _Data:
    """A data file: its form, and its examples, out of the cache or made of its records."""

    def __init__(self, path: Path, args: Arguments, tokenizer_folder: Path | None):
        self._path, self._limit = path, args.model_max_length
        self._cache = Path(folder) if (folder := args.cache_dir) else cache_folder("data")
        self._digest, self._cached, dated = "", None, ""
        self.checksum = ""  # of the examples, once they are there
        if path.expanduser().is_file():
            self._digest = data_digest(path, tokenizer_folder, {"model_max_length": self._limit})
            self._cached = load_examples(self._cache, self._digest, say)
            if tokenizer_folder and not self._cached and writes_the_date(tokenizer_folder):
                dated = f"{self._digest}-{date.today()}"  # of chats alone
                self._cached = load_examples(self._cache, dated, say)
        self._records: Sequence[Record] | None = None
        if self._cached:  # the same bytes were found valid before
            self.form = self._cached[0]
        else:
            self.form, self._records = read_records(path)
        if dated and self.form == CHAT:
            self._digest = dated
            say(f"{path}: the chat template writes today's date (strftime_now); give it a fixed one to repeat the run")

    def examples(self, tokenizer: Tokenizer | None, vocab_size: int, disable_bars: bool | None) -> Examples:
        """To be asked for once: the records are let go."""
        examples = self._made(tokenizer, vocab_size, disable_bars)
        longer = int((examples.lengths > self._limit).sum()) if self.form == TOKENIZED else 0
        if longer:
            say(
                f"--model_max_length {self._limit}: {longer:,} records of {self._path} are longer, the longest of "
                f"{examples.lengths.max():,} tokens, and stay whole: input_ids are taken as they are"
            )
        return examples

    def _made(self, tokenizer: Tokenizer | None, vocab_size: int, disable_bars: bool | None) -> Examples:
        """Checked in any case: another model may have fewer rows."""
        if self._cached:
            _, examples, self.checksum = self._cached
            check_examples(examples, vocab_size, str(self._path))
            return examples
        assert self._records is not None
        examples = tokenized(self.form, self._records, tokenizer, self._limit, self._path, disable_bars)
        self._records = None
        examples = check_examples(examples, vocab_size, str(self._path))
        self.checksum = save_examples(self._cache, self._digest, self.form, examples, say)
        # Mapped from the file, they need no memory of the process.
        saved = load_examples(self._cache, self._digest, say)
        return saved[1] if saved else examples


def tokenized(
    form: str,
    records: Sequence[Record],
    tokenizer: Tokenizer | None,
    limit: int,
    source: Path,
    disable_bars: bool | None = None,
) -> Examples:
    """`tokenize` of the records of a file, with a bar."""
    with count_bar("tokenizing", len(records), "record", disable_bars) as bar:
        return tokenize(form, records, tokenizer, limit, bar.update, str(source))


def _open_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many tokens it has got."""
    tokenizer = open_tokenizer(folder)
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer has {len(tokenizer)} tokens, more than the {vocab_size} rows "
            "of the model's embedding; it belongs to another model"
        )
    new_tokens = tokenizer.add_missing_special_tokens()
    for warning in tokenizer.warnings():
        say(f"warning: {warning}")
    return tokenizer, new_tokens


def _held_out(examples: Examples, percentage: float) -> tuple[Examples, Examples]:
    """The first share of the examples, for evaluation, and the rest."""
    count = round(len(examples) * percentage / 100)
    if not 0 < count < len(examples):
        raise InputError(
            f"--validation_split_percentage {percentage:g}: of {len(examples)} examples it holds out {count}; should "
            "leave at least one on either side"
        )
    return examples.split(count)


def _resized(config: LlamaConfig, tokens: int, new_tokens: int, compat: str) -> LlamaConfig:
    """The architecture with as many vocabulary rows as the tokenizer has tokens, as stanford_alpaca resizes it."""
    made = f"; of new tokens, the last {new_tokens}, each the mean of those before" if new_tokens else ""
    if tokens == config.vocab_size:
        if new_tokens:
            say(f"vocabulary: {tokens} rows{made}")
        return config
    # Resizing gives transformers 4.37 a new embedding, without the old one's padding_idx.
    pad_token_id = None if compat == "4.37" else config.pad_token_id
    say(f"vocabulary: {config.vocab_size} rows become {tokens}, as many as the tokenizer has tokens{made}")
    return dataclasses.replace(config, vocab_size=tokens, pad_token_id=pad_token_id)


def kept_steps(steps: Sequence[int], limit: int | None, best: int | None = None) -> list[int]:
    """The steps that the HF Trainer's rotation leaves of those saved: the newest and the best, and then more of the
    newest up to `limit` (None or 0: all)."""
    steps = sorted(steps)
    if not limit or limit < 0:
        return steps
    protected = {*steps[-1:], *({best} & set(steps))} if best is not None else {*steps[-1:]}
    others = [s for s in steps if s not in protected]
    gone = max(0, len(others) - max(0, limit - len(protected)))
    return sorted([*protected, *others[gone:]])
