"""Apply the flags to a model and its data: settle all that a run needs before anything compiles."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from llama_jax.base.errors import InputError
from llama_jax.base.files import cache_folder
from llama_jax.data.batches import Batches
from llama_jax.data.cache import data_digest, load_examples, save_examples
from llama_jax.data.chat import writes_the_date
from llama_jax.data.examples import Examples, check_examples, tokenize
from llama_jax.data.normalisation import training_loss
from llama_jax.data.order import Order, Resumed, group_by_length, randperm
from llama_jax.data.readers import Reader
from llama_jax.data.records import CHAT, FORMS, TOKENIZED, Bad, read_records, without
from llama_jax.data.sources import find_sources
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.hf.peft import Adapter
from llama_jax.hf.tensor import Tensor
from llama_jax.model.config import LlamaConfig
from llama_jax.model.quantized import Quantization
from llama_jax.model.rope import covered_positions
from llama_jax.reporting.progress import count_bar, say
from llama_jax.setup.adapters import choose_adapter, choose_quantization, refuse_without_adapter
from llama_jax.setup.arguments import Arguments
from llama_jax.training.schedule import Schedule, make_schedule

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """Describe a run to make. `config` has the tokenizer's vocabulary.

    `log_at`, `eval_at` and `save_at` return whether an action is due after an update, by its number from 1. Actions of
    a strategy of "epoch" follow those of "steps". `form` is the data file's, `held_out` the number of its first records
    kept for evaluation, `data_digest` the checksum of all examples. `new_ids` are the special tokens that this program
    added to the tokenizer. `adapter` is the adapter to train, None for full fine-tuning, and `adapter_tensors` the
    tensors of a PEFT folder that it starts from.
    """

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
    new_ids: tuple[int, ...]
    data_digest: str
    adapter: Adapter | None = None
    adapter_tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    quantization: Quantization | None = None

    @property
    def warmup_updates(self) -> int:
        """Return the number of updates of warm-up."""
        return self.args.warmup_updates(self.order.updates)

    @property
    def num_train_epochs(self) -> int:
        """Return the number of epochs begun, as the HF Trainer counts them."""
        order = self.order
        return math.ceil(order.epochs if order.max_steps <= 0 else order.updates / order.updates_per_epoch)

    def batches(
        self, max_tokens: int, row_limit: int, ways: int, cost: Callable[[int, int, int], float] | None = None
    ) -> Batches:
        """Return the blocks of every update for `ways` devices: at most `max_tokens` tokens a device, in rows of at
        most `row_limit`, or the longest example's, with the `cost` of `Batches`. Planning packs the whole run."""
        order, args = self.order, self.args
        with count_bar("planning blocks", 2 * order.updates, "update", args.disable_tqdm or None) as bar:
            return Batches(
                self.examples,
                order,
                training_loss(order, args.average_tokens_across_devices),
                ways,
                max_tokens,
                row_limit,
                packed=args.packing,
                progress=bar.update,
                cost=cost,
            )

    def steps(self, at: Callable[[int], bool]) -> list[int]:
        """Return the numbers of the updates after which `at` holds."""
        return [k for k in range(1, self.order.updates + 1) if at(k)]


def make_job(
    args: Arguments,
    config: LlamaConfig,
    tokenizer_folder: Callable[[], Path],
    ranks: int,
    disable_bars: bool | None = None,
    say: Say = say,
    resumed: Resumed | None = None,
) -> Job:
    """Read and tokenize the data; settle order, schedule and the actions after updates. Raises InputError.

    `ranks` are the HF Trainer's, whatever the number of devices. `resumed` is set where a checkpoint of the HF Trainer
    began the run.
    """
    folder: Path | None = None
    with contextlib.suppress(InputError):  # raised again below, where the data is text
        folder = tokenizer_folder()
    data = _open_data(args.data_path or [], args, folder, say)
    say(f"data: {data.name} holds {data.form} records ({FORMS[data.form]})")
    eval_data = _open_data(args.eval_data_path, args, folder, say) if args.eval_data_path else None
    if eval_data and eval_data.form != data.form:
        forms = f"holds {eval_data.form} records, and {data.name} {data.form} ones"
        raise InputError(f"{eval_data.name}: {forms}; should be of one form")
    tokenizer, new_ids = None, []
    if data.form != TOKENIZED:
        tokenizer = open_tokenizer(tokenizer_folder(), args.hf_compat)
        new_ids = tokenizer.add_missing_special_tokens()
        for warning in tokenizer.warnings():
            say(f"warning: {warning}")
    vocab_size = config.vocab_size if tokenizer is None else tokenizer.rows(config.vocab_size)
    eval_examples = eval_data.examples(tokenizer, vocab_size, disable_bars, say) if eval_data else None
    examples, held_out = data.examples(tokenizer, vocab_size, disable_bars, say), 0
    if tokenizer is not None:
        _check_eos(examples, tokenizer, data.name, say)
    if args.validation_split_percentage:
        eval_examples, examples = _held_out(examples, args.validation_split_percentage)
        held_out = len(eval_examples)
    if eval_examples:
        eval_examples = _grouped(eval_examples, args)

    _check_positions(examples, eval_examples, config, say)

    order = _order(args, examples, ranks, resumed)
    log_at, eval_at, save_at = (args.due(name, order) for name in ("logging", "eval", "save"))
    evaluated = [k for k in range(1, order.updates + 1) if eval_at(k)]
    order = dataclasses.replace(order, evaluated=(*([0] if args.eval_on_start else []), *evaluated))
    schedule = _schedule(args, order.updates)
    if tokenizer is not None:
        config = _resized(config, vocab_size, len(new_ids), args.hf_compat, say)
    refuse_without_adapter(args)
    adapter, tensors = choose_adapter(args, config)
    return Job(
        adapter=adapter,
        adapter_tensors=tensors,
        quantization=choose_quantization(args),
        args=args,
        config=config,
        form=data.form,
        tokenizer=tokenizer,
        examples=examples,
        held_out=held_out,
        eval_examples=eval_examples,
        order=order,
        schedule=schedule,
        log_at=log_at,
        eval_at=eval_at,
        save_at=save_at,
        new_ids=tuple(new_ids),
        data_digest=" ".join(d.checksum for d in (data, eval_data) if d),
    )


def _order(args: Arguments, examples: Examples, ranks: int, resumed: Resumed | None) -> Order:
    """Return the order of the examples, without evaluations."""
    return Order(
        len(examples),
        args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        epochs=args.num_train_epochs,
        compat=args.hf_compat,
        seed=args.seed,
        data_seed=args.data_seed,
        max_steps=args.max_steps,
        ranks=ranks,
        drop_last=args.dataloader_drop_last,
        sampling=args.train_sampling_strategy,
        lengths=examples.lengths,
        resumed=resumed,
    )


def _schedule(args: Arguments, updates: int) -> Schedule:
    """Return the schedule of `--lr_scheduler_type`. Raises InputError."""
    return make_schedule(
        args.lr_scheduler_type,
        args.learning_rate,
        warmup=args.warmup_updates(updates),
        total=updates,
        compat=args.hf_compat,
        kwargs=args.schedule_kwargs,
    )


def _grouped(eval_examples: Examples, args: Arguments) -> Examples:
    """Return the examples to evaluate in the Trainer's order.

    `group_by_length` of transformers 5 groups evaluations too, from a generator of their own, the same each time.
    """
    if args.hf_compat != "5" or args.train_sampling_strategy != "group_by_length":
        return eval_examples
    permuted = randperm(len(eval_examples), args.seed if args.data_seed is None else args.data_seed)
    return eval_examples.take(group_by_length(permuted, eval_examples.lengths, args.per_device_eval_batch_size))


@dataclass
class _Data:
    """Hold data and its form, and its examples: `cached`, or to be made from `records`.

    `digest` names the examples in the folder `cache`; `checksum` is set by `examples`.
    """

    name: str
    limit: int
    cache: Path
    digest: str
    form: str
    cached: tuple[str, Examples, str, str] | None
    records: Reader | None
    bad: Bad
    checksum: str = ""

    def examples(self, tokenizer: Tokenizer | None, vocab_size: int, disable_bars: bool | None, say: Say) -> Examples:
        """Return the examples. Call it once: the records are released. Raises InputError."""
        examples = self._made(tokenizer, vocab_size, disable_bars, say)
        longer = int((examples.lengths > self.limit).sum()) if self.form == TOKENIZED else 0
        if longer:
            say(
                f"--model_max_length {self.limit}: {longer:,} records of {self.name} are longer, the longest of "
                f"{examples.lengths.max():,} tokens, and stay whole: input_ids are taken as they are"
            )
        return examples

    def _made(self, tokenizer: Tokenizer | None, vocab_size: int, disable_bars: bool | None, say: Say) -> Examples:
        """Return the examples, checked even if cached: another model may have fewer rows."""
        if self.cached:
            _, examples, self.checksum, left_out = self.cached
            if left_out:
                say(left_out)
            check_examples(examples, vocab_size, self.name)
            return examples
        assert self.records is not None
        examples = tokenized(
            self.form,
            self.records,
            tokenizer,
            limit=self.limit,
            source=self.name,
            bad=self.bad,
            disable_bars=disable_bars,
        )
        left_out = ""
        if self.bad.count:
            left_out = f"warning: {self.bad.count:,} bad records are left out: {self.bad}"
            say(left_out)
        examples = check_examples(examples, vocab_size, self.name, without(self.records, self.bad.dropped))
        self.records = None
        self.checksum = save_examples(self.cache, self.digest, self.form, examples, say, left_out)
        # Mapped from the file, they need no memory of the process.
        saved = load_examples(self.cache, self.digest, say)
        return saved[1] if saved else examples


def _open_data(names: Sequence[str], args: Arguments, tokenizer_folder: Path | None, say: Say) -> _Data:
    """Open the data of these names, or its examples in the cache. Raises InputError."""
    sources = find_sources(names, args.dataset_config_name, say)
    name = sources[0].name + (f" (and {len(sources) - 1} more)" if len(sources) > 1 else "")
    cache = Path(args.cache_dir) if args.cache_dir else cache_folder("data")
    settings = {
        "model_max_length": args.model_max_length,
        "hf_compat": args.hf_compat,
        "skip_bad_records": args.skip_bad_records,
        "tables": [source.fingerprint for source in sources],
    }
    digest = data_digest([file for source in sources for file in source.files], tokenizer_folder, settings)
    cached, dated, bad = load_examples(cache, digest, say), "", Bad(args.skip_bad_records)
    if tokenizer_folder and not cached and writes_the_date(tokenizer_folder):
        dated = f"{digest}-{date.today()}"  # of chats alone
        cached = load_examples(cache, dated, say)
    # Cached bytes were valid when they were read.
    form, records = (cached[0], None) if cached else read_records(sources, bad)
    if dated and form == CHAT:
        digest = dated
        say(
            f"warning: the tokenizer's chat template writes today's date into {name} (strftime_now), so that a run on "
            "another day trains on other tokens; replace the date in the template to repeat this run"
        )
    return _Data(
        name=name,
        limit=args.model_max_length,
        cache=cache,
        digest=digest,
        form=form,
        cached=cached,
        records=records,
        bad=bad,
    )


def tokenized(
    form: str,
    records: Reader,
    tokenizer: Tokenizer | None,
    limit: int,
    source: str,
    bad: Bad,
    disable_bars: bool | None = None,
) -> Examples:
    """Tokenize records, with a bar. Raises InputError."""
    with count_bar("tokenizing", len(records), "record", disable_bars) as bar:
        return tokenize(form, records, tokenizer, limit, bar.update, source, bad)


def _check_eos(examples: Examples, tokenizer: Tokenizer, source: str, say: Say) -> None:
    """Warn where the tokenizer's eos is in no label: generation that stops at eos alone would not stop."""
    eos = tokenizer.eos_token_id
    if eos is not None and not any((run.labels == eos).any() for _, run in examples.runs()):
        say(
            f"warning: the tokenizer's eos_token {tokenizer.eos_token!r} is not trained in {source}: generation that "
            "waits for it will not stop; name the token that ends the texts in generation_config.json"
        )


def _check_positions(examples: Examples, eval_examples: Examples | None, config: LlamaConfig, say: Say) -> None:
    """Warn of examples that are longer than the sequences that the model was made for."""
    covered = covered_positions(config)
    for kind, some in (("", examples), ("evaluation ", eval_examples)):
        if some and (longer := int((some.lengths > covered).sum())):
            say(
                f"warning: {longer:,} of {len(some):,} {kind}examples are longer than the {covered:,} positions of the "
                f"model (max_position_embeddings), the longest of {some.lengths.max():,} tokens; lower "
                "--model_max_length, or set rope_scaling in config.json"
            )


def _held_out(examples: Examples, percentage: float) -> tuple[Examples, Examples]:
    """Return the first share of the examples, for evaluation, and the rest. Raises InputError."""
    count = round(len(examples) * percentage / 100)
    if not 0 < count < len(examples):
        raise InputError(
            f"--validation_split_percentage {percentage:g}: of {len(examples)} examples it holds out {count}; should "
            "leave at least one on either side"
        )
    return examples.split(count)


def _resized(config: LlamaConfig, rows: int, new_tokens: int, compat: str, say: Say) -> LlamaConfig:
    """Return the architecture with a vocabulary of `rows`, as stanford_alpaca resizes it for its tokenizer."""
    added = f"the tokenizer gets {new_tokens} special token(s) that it lacked; " if new_tokens else ""
    start = ", the new ones starting as the mean of the others" if new_tokens or rows > config.vocab_size else ""
    if rows == config.vocab_size:
        if new_tokens:
            say(f"vocabulary: {added}the model has {rows} rows for its tokens{start}")
        return config
    # Resizing gives transformers 4.37 a new embedding, without the old one's padding_idx.
    pad_token_id = None if compat == "4.37" else config.pad_token_id
    size = f"{'grows' if rows > config.vocab_size else 'shrinks'} from {config.vocab_size} to {rows} rows"
    say(f"vocabulary: {added}the model's vocabulary {size}, one for each token{start}")
    return dataclasses.replace(config, vocab_size=rows, pad_token_id=pad_token_id)


def kept_steps(steps: Sequence[int], limit: int | None, best: int | None = None) -> list[int]:
    """Return the steps that the HF Trainer's rotation keeps, at most `limit` (None or 0: all).

    The newest and the best are kept, then more of the newest.
    """
    steps = sorted(steps)
    if not limit or limit < 0:
        return steps
    protected = {*steps[-1:], *({best} & set(steps))} if best is not None else {*steps[-1:]}
    others = [s for s in steps if s not in protected]
    gone = max(0, len(others) - max(0, limit - len(protected)))
    return sorted([*protected, *others[gone:]])
