"""The flags: the HF Trainer's and stanford_alpaca's names, read by transformers' own HfArgumentParser."""

import difflib
import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, cast

import yaml

from llama_jax.base.errors import InputError, Parser
from llama_jax.model.kernels import KERNELS
from llama_jax.model.remat import REMAT
from llama_jax.reporting.metrics import EVALUATION_METRICS
from llama_jax.setup.flags import OtherFlags, overridden, read_json, read_others, resolve_optimizer
from llama_jax.training.schedule import LISTENING, SCHEDULES

_STRATEGIES = {"choices": ["no", "steps", "epoch"]}
_INTERVALS = ("logging", "eval", "save")
_PATHS = ("model_name_or_path", "data_path", "eval_data_path", "output_dir", "cache_dir")
_ARGS_FILE = Path(__file__).resolve().parents[2] / "train_jax.args"  # beside train_jax.py
CONFIG = "YAML or JSON file of flags by their names; the command line overrides it; alone, it needs no --config"


class Plan(Protocol):
    """What `due` asks of an `Order`."""

    @property
    def updates(self) -> int: ...

    def epoch_ends(self) -> set[int]: ...

    def epoch_at(self, updates_done: int) -> float: ...


def _flag(default: Any, text: str, **options: Any) -> Any:
    """A field; `options` are argparse's."""
    return field(default=default, metadata={"help": text, **options})


_OWN = (
    *("model_name_or_path", "data_path", "eval_data_path", "output_dir", "cache_dir", "resume_from_checkpoint"),
    *("coordinator_address", "process_id", "disable_tqdm", "show_examples"),
)


@dataclass
class Arguments:
    """Every flag that the run takes. Names, types and defaults are the HF Trainer's and stanford_alpaca's.

    The other flags of the Trainer are in `llama_jax.flags`.
    """

    model_name_or_path: str = _flag("", "HF folder, .gguf file, or folder made by convert_torch_to_flax.py")
    data_path: str | None = _flag(None, "JSON, JSONL, parquet or .txt: Alpaca, chat, text, or input_ids and labels")
    eval_data_path: str | None = _flag(None, "the same for evaluation")
    validation_split_percentage: float = _flag(0, "percentage of data_path that is held out for evaluation")
    output_dir: str = _flag(
        "trainer_output",
        "checkpoints, and the HF folder at the end (4.37's default: required; 5's default: None, for this one)",
    )
    model_max_length: int = _flag(
        512, "tokens of an example, bos included; longer ones are cut, but for data of input_ids"
    )
    allow_pickle: bool = _flag(False, "read pytorch_model*.bin (unpickling; torch >= 2.10)")
    dtype: str | None = _flag(
        None,
        "type of the parameters and of the optimizer's state; by default float32, or the checkpoint's under "
        "--hf_compat 5",
        choices=["float32", "bfloat16"],
    )
    hf_compat: str = _flag("4.37", "whose rules: transformers 4.37's or 5's", choices=["4.37", "5"])
    show_examples: int = _flag(0, "print so many examples of the first updates, what is trained told apart")
    cache_dir: str | None = _flag(None, "tokenized data is kept there; by default in ~/.cache/llama_jax/data")
    explain: str | None = _flag(
        None,
        "print what the flags mean for this data, as text or json, and end",
        nargs="?",
        const="text",
        choices=["text", "json"],
    )
    dry_run: str | None = _flag(
        None,
        "compile the run for devices that need not be there, v5e-16, v5p-128 or h200:8, tell whether it fits them, and "
        "end: exit code 0 where it does, 3 where not; the model may be a folder with config.json alone",
    )
    dry_run_effort: str = _flag(
        "full",
        "fast compiles several times faster, for shapes, kernels and collectives, and gives no verdict on memory",
        choices=["full", "fast"],
    )

    num_train_epochs: float = _flag(3.0, "epochs, fractions allowed")
    max_steps: int = _flag(-1, "updates; above 0 it overrides the epochs")
    per_device_train_batch_size: int = _flag(8, "examples of a micro-batch on each device")
    per_device_eval_batch_size: int = _flag(8, "examples of an evaluation batch on each device")
    gradient_accumulation_steps: int = _flag(1, "micro-batches an update")
    average_tokens_across_devices: bool = _flag(
        True, "--hf_compat 5: an update's loss is the mean over the tokens of all devices"
    )
    max_tokens_per_device: str = _flag(
        "auto",
        "tokens that a device is given at once, larger updates are accumulated; auto: what fits by the compiler's own "
        "count, or 4096 where the device's memory is not known",
    )
    dataloader_drop_last: bool = _flag(False, "drop the last incomplete micro-batch of an epoch")
    train_sampling_strategy: str = _flag(
        "random",
        "order of the examples; batch_rebalance is refused",
        choices=["random", "sequential", "group_by_length", "batch_rebalance"],
    )
    seed: int = _flag(42, "seed of the order")
    data_seed: int | None = _flag(None, "seed of the order in 5; 4.37 ignores it")
    full_determinism: bool = _flag(False, "the same bits on every run, with slower kernels where that costs them")

    optim: str = _flag("adamw_torch", "see Values below (5's default: adamw_torch_fused, which is the same here)")
    learning_rate: float = _flag(5e-5, "peak learning rate")
    weight_decay: float = _flag(0.0, "decay of the matrices")
    adam_beta1: float = _flag(0.9, "decay of the first moment")
    adam_beta2: float = _flag(0.999, "decay of the second moment")
    adam_epsilon: float = _flag(1e-8, "added to the square root of the second moment")
    max_grad_norm: float = _flag(1.0, "clip the gradient to this norm; 0 or less does not clip")
    lr_scheduler_type: str = _flag("linear", "schedule of the learning rate", choices=[*SCHEDULES])
    lr_scheduler_kwargs: str | None = _flag(
        None, "the schedule's keywords: a JSON object or a file of one (4.37's default: {}, which is the same)"
    )
    warmup_ratio: float = _flag(0.0, "share of the updates that warm up")
    warmup_steps: float = _flag(0, "updates that warm up; below 1 a share")
    label_smoothing_factor: float = _flag(0.0, "label smoothing")

    bf16: bool = _flag(False, "matmuls in bfloat16; parameters, residual stream, norms and loss stay float32")
    tf32: bool | None = _flag(None, "float32 matmuls in TF32 (NVIDIA Ampere and later)")
    packing: bool = _flag(True, "examples side by side in rows; False pads each micro-batch, as the Trainer does")
    attention: str = _flag("auto", "kernel: auto takes the device's best", choices=["auto", *KERNELS])
    scan_layers: bool | None = _flag(
        None, "stack the layers under one lax.scan; by default where there are over 8, on a GPU over 48"
    )
    gradient_checkpointing: bool = _flag(
        False, "the same as --remat full, unless that is given (5's default: None, which is the same)"
    )
    remat: str = _flag(
        "auto",
        "what the backward pass computes again: nothing; all but the matmuls; all but attention; all but each layer's "
        "input; auto: as little as fits",
        choices=["auto", *REMAT],
    )
    accumulation: str = _flag(
        "sum",
        "of an update in several blocks: a sum beside the optimizer, or optax.MultiSteps",
        choices=["sum", "multisteps"],
    )
    use_cpu: bool = _flag(False, "run on the CPU")
    mesh: str = _flag(
        "auto",
        "how the devices are laid out, as data=2,fsdp=4,tensor=2 or fsdp=4,context=2; axes left out are 1, one may be "
        "-1; each of data x fsdp is a device of the Trainer's, context divides its rows; auto: all on fsdp",
    )
    coordinator_address: str | None = _flag(
        None, "HOST:PORT of the first of several processes; TPU slices, SLURM and Open MPI need no address"
    )
    num_processes: int | None = _flag(None, "how many processes there are, where only --coordinator_address tells")
    process_id: int | None = _flag(None, "the number of this one of them, from 0")

    logging_strategy: str = _flag("steps", "when to log", **_STRATEGIES)
    logging_steps: float = _flag(500, "updates between two logs; below 1 a share of all")
    logging_first_step: bool = _flag(False, "log the first update too")
    logging_nan_inf_filter: bool = _flag(True, "in the log, the mean so far stands for a loss that is not finite")
    include_num_input_tokens_seen: str = _flag(
        "no",
        "count the tokens seen in every log: no, all (true) or non_padding (4.37's default: False, which is no)",
        nargs="?",
        const="all",
    )
    disable_tqdm: bool | None = _flag(None, "True: no progress bar")
    eval_strategy: str = _flag("no", "when to evaluate", **_STRATEGIES)
    eval_steps: float | None = _flag(None, "updates between two evaluations; below 1 a share; by default logging_steps")
    eval_delay: float = _flag(0, "updates or epochs, as eval_strategy counts, before the first evaluation")
    eval_on_start: bool = _flag(False, "evaluate before the first update")
    load_best_model_at_end: bool = _flag(False, "export the best checkpoint, not the last")
    metric_for_best_model: str | None = _flag(None, "what best means: loss by default")
    greater_is_better: bool | None = _flag(None, "whether a larger metric is better; by default not of a loss")
    save_strategy: str = _flag(
        "steps",
        "when to save; best (5): after an evaluation that was the best",
        choices=["no", "steps", "epoch", "best"],
    )
    save_steps: float = _flag(500, "updates between two checkpoints; below 1 a share of all")
    save_total_limit: int | None = _flag(None, "checkpoints kept; the oldest go first, the best stays")
    overwrite_output_dir: bool = _flag(False, "start anew where output_dir holds checkpoints, and remove them")
    resume_from_checkpoint: str | None = _flag(
        None, "True for the last checkpoint of output_dir, auto for that or a fresh start, or its path"
    )

    def __post_init__(self) -> None:
        self.said: list[str] = []  # of flags that are an alias or without meaning

    @property
    def max_tokens(self) -> int | None:
        """`--max_tokens_per_device`, None for auto."""
        return None if self.max_tokens_per_device == "auto" else int(self.max_tokens_per_device)

    @property
    def schedule_kwargs(self) -> dict[str, Any]:
        """`--lr_scheduler_kwargs` as keywords of the schedule."""
        return read_json("lr_scheduler_kwargs", self.lr_scheduler_kwargs) if self.lr_scheduler_kwargs else {}

    @property
    def best_metric_key(self) -> str:
        """`metric_for_best_model` as an evaluation names it."""
        return "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")

    def settle(self) -> None:
        """Give values that follow from others theirs, as TrainingArguments does. Raises InputError."""
        self.optim, said = resolve_optimizer(self.optim, self.weight_decay)
        self.said += said
        seen = self.include_num_input_tokens_seen.lower()
        words = {**dict.fromkeys("yes true t y 1".split(), "all"), **dict.fromkeys("false f n 0".split(), "no")}
        self.include_num_input_tokens_seen = words.get(seen, seen)
        for name in _PATHS:
            if value := getattr(self, name):
                setattr(self, name, os.path.expanduser(value))
        if self.gradient_checkpointing and self.remat == "auto":
            self.remat = "full"
        if self.eval_strategy == "steps" and not self.eval_steps:
            self.eval_steps = self.logging_steps
        listens = self.lr_scheduler_type in LISTENING
        if self.metric_for_best_model is None and (self.load_best_model_at_end or listens):
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and (metric := self.metric_for_best_model) is not None:
            is_loss = metric in ("loss", "eval_loss") if self.hf_compat == "4.37" else metric.endswith("loss")
            self.greater_is_better = not is_loss

    @property
    def decisive(self) -> dict[str, Any]:
        """The flags that all processes of a run have alike: not where things lie for one, nor which it is."""
        return {f"--{f.name}": getattr(self, f.name) for f in fields(self) if f.name not in _OWN}

    def notes(self, platform: str) -> list[str]:
        """One line for each given flag that is an alias, or has no meaning or no effect here."""
        said = list(self.said)
        if self.tf32 and platform != "gpu":
            said.append(f"--tf32 True: no NVIDIA GPU here ({platform}); float32 matmuls stay float32")
        if self.warmup_ratio and self.warmup_steps:
            said.append("--warmup_ratio: ignored, as --warmup_steps is given")
        if self.data_seed is not None and self.hf_compat == "4.37":
            said.append("--data_seed: transformers 4.37 ignores it, and so does --hf_compat 4.37")
        if not self.average_tokens_across_devices and self.hf_compat == "4.37":
            said.append("--average_tokens_across_devices: no effect; under --hf_compat 4.37 a loss is never counted so")
        if self.max_tokens_per_device != "auto" and not self.packing:
            said.append("--max_tokens_per_device: no effect; with --packing False a micro-batch is what a device gets")
        if self.eval_data_path and self.eval_strategy == "no" and not self.eval_on_start:
            said.append("--eval_data_path: no effect, as --eval_strategy is no")
        return said

    def check(self) -> None:
        """Raise InputError for values that no run can have."""
        if not self.model_name_or_path:
            raise InputError("--model_name_or_path is missing: give an HF folder")
        if not self.data_path:
            raise InputError("--data_path is missing: give a JSON file of records")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"--{f.name} {value}: should be a finite number")
            if isinstance(value, str) and re.match("[a-z0-9]+://", value):
                raise InputError(
                    f"--{f.name} {value}: is no path of files; copy it here, or mount the bucket (docs/tpu.md)"
                )
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: should not be below 0")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: should be at least 0 and below 1")
        intervals = [f"{name}_steps" for name in _INTERVALS if getattr(self, f"{name}_strategy") == "steps"]
        positive = (
            "model_max_length",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
        )
        for name in (*positive, *intervals):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} {getattr(self, name)}: should be above 0")
        if self.max_tokens_per_device != "auto" and not re.fullmatch("0*[1-9][0-9]*", self.max_tokens_per_device):
            raise InputError(
                f"--max_tokens_per_device {self.max_tokens_per_device}: should be auto or a number above 0"
            )
        for name in (*intervals, "warmup_steps"):
            value = getattr(self, name)
            if value > 1 and value != int(value):
                raise InputError(f"--{name} {value}: should be a whole number, or a share below 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"--warmup_ratio {self.warmup_ratio}: should lie between 0 and 1")
        if (seen := self.include_num_input_tokens_seen) not in ("no", "all", "non_padding"):
            raise InputError(f"--include_num_input_tokens_seen {seen}: should be no, all or non_padding")
        if self.train_sampling_strategy == "batch_rebalance":
            raise InputError(
                "--train_sampling_strategy batch_rebalance: makes micro-batches of unequal sizes so that little is "
                "padded, and nothing is padded here; use random or group_by_length"
            )
        self.schedule_kwargs  # noqa: B018  # raises
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        held_out = self.validation_split_percentage
        if not 0 <= held_out < 100:
            raise InputError(f"--validation_split_percentage {held_out:g}: should be at least 0 and below 100")
        if held_out and self.eval_data_path:
            raise InputError("--validation_split_percentage and --eval_data_path: give one of them")
        if (self.eval_strategy != "no" or self.eval_on_start) and not (held_out or self.eval_data_path):
            name = "eval_on_start" if self.eval_strategy == "no" else f"eval_strategy {self.eval_strategy}"
            raise InputError(
                f"--{name}: no data to evaluate on; give --eval_data_path or --validation_split_percentage"
            )
        if self.metric_for_best_model is not None and self.best_metric_key not in EVALUATION_METRICS:
            known = ", ".join(EVALUATION_METRICS)
            raise InputError(f"--metric_for_best_model {self.metric_for_best_model}: an evaluation has {known}")
        if self.save_strategy == "best" and self.hf_compat == "4.37":
            raise InputError("--save_strategy best: transformers 4.37 has none; give --hf_compat 5, or steps or epoch")
        if self.eval_strategy == "no":
            follows = "follows evaluations; give --eval_strategy steps or epoch"
            if self.lr_scheduler_type in LISTENING:
                raise InputError(f"--lr_scheduler_type {self.lr_scheduler_type}: {follows}")
            if self.save_strategy == "best":
                raise InputError(f"--save_strategy best: {follows}")
        if self.save_strategy == "best":
            if self.metric_for_best_model is None:
                raise InputError("--save_strategy best: give --metric_for_best_model, as loss")
            return
        if not self.load_best_model_at_end:
            return
        if self.save_strategy != self.eval_strategy:
            raise InputError(
                f"--load_best_model_at_end: --save_strategy {self.save_strategy} and --eval_strategy "
                f"{self.eval_strategy} should be the same"
            )
        if self.eval_strategy == "steps":
            assert self.eval_steps is not None
            # As decimals: 0.3 is a multiple of 0.1, which binary fractions deny.
            left = Fraction(str(self.save_steps)) % Fraction(str(self.eval_steps))
            if left or (self.save_steps < 1) != (self.eval_steps < 1):
                raise InputError(
                    f"--load_best_model_at_end: --save_steps {self.save_steps:g} should be a multiple of --eval_steps "
                    f"{self.eval_steps:g}, both of them numbers of updates or both shares"
                )

    def warmup_updates(self, updates: int) -> int:
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(updates * (self.warmup_steps or self.warmup_ratio))

    def every(self, name: str, updates: int) -> int:
        """`logging_steps`, `eval_steps` or `save_steps` as a number of updates; 500 where none is given."""
        value = getattr(self, f"{name}_steps")
        if value is None:
            return 500
        return math.ceil(updates * value) if value < 1 else int(value)

    def due(self, name: str, order: Plan) -> Callable[[int], bool]:
        """Whether a log ("logging"), an evaluation ("eval") or a checkpoint ("save") is due after so many updates.

        What follows an evaluation (`--save_strategy best`) or comes before the first update (`--eval_on_start`) is not
        told here.
        """
        strategy, every = getattr(self, f"{name}_strategy"), self.every(name, order.updates)
        delay = self.eval_delay if name == "eval" else 0
        first = name == "logging" and self.logging_first_step
        last = order.updates if self.hf_compat == "5" and name != "logging" else None
        ends = order.epoch_ends()

        def at(done: int) -> bool:
            if strategy == "epoch":
                return (done in ends and delay <= order.epoch_at(done)) or (first and done == 1)
            if strategy == "steps":
                return ((done % every == 0 or done == last) and delay <= done) or (first and done == 1)
            return first and done == 1

        return at


def flag_parser() -> Any:
    """transformers' HfArgumentParser of all flags, in which a user's mistake is an InputError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell that torch is missing, which is meant
    from transformers import HfArgumentParser

    class FlagParser(HfArgumentParser):
        error = Parser.error

    parser = FlagParser(
        cast(Any, (Arguments, OtherFlags)),
        description="Fine-tune a LLaMA: an HF folder in, an HF folder out.",
        prog="train_jax.py",
    )
    parser.add_argument("--config", help=CONFIG)
    return parser


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line, over the file of `--config`, over `train_jax.args`. Raises InputError."""
    argv = list(argv)
    if len(argv) == 1 and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        argv = ["--config", *argv]
    parser = flag_parser()

    def read(argv: list[str]) -> tuple[Arguments, Any, Any, list[str]]:
        return parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, args_filename=_ARGS_FILE)

    arguments, others, rest, unknown = read(argv)
    if rest.config:
        argv = _config_argv(Path(rest.config).expanduser(), _given(parser, argv)) + argv
        arguments, others, _, unknown = read(argv)
    if unknown:
        names = [f"--{name}" for name in _flags()]
        near = difflib.get_close_matches(unknown[0], names, n=1)
        raise InputError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    meant, arguments.said = read_others(others)
    for name, value in meant.items():
        setattr(arguments, name, value)
    arguments.settle()
    arguments.check()
    return arguments


def _flags() -> dict[str, Any]:
    """The options of each flag for argparse."""
    return {f.name: f.metadata for cls in (Arguments, OtherFlags) for f in fields(cls)}


def _given(parser: Any, argv: list[str]) -> set[str]:
    """The names of the flags on a command line."""
    unset = object()
    known, _ = parser.parse_known_args(argv, Namespace(**dict.fromkeys(_flags(), unset)))
    return {name for name, value in vars(known).items() if value is not unset}


def _config_argv(path: Path, given: set[str]) -> list[str]:
    """A YAML or JSON file of flags as a command line, without what the given ones override."""
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file") from None
    except OSError as e:
        raise InputError(f"--config {path}: cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise InputError(f"--config {path}: not valid {kind}: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: should map flags to values")
    flags = _flags()
    argv: list[str] = []
    for key, value in values.items():
        if key not in flags:
            near = difflib.get_close_matches(str(key), flags, n=1)
            raise InputError(f"--config {path}: unknown flag {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if overridden(key, given):
            continue
        if value is False and "no" in (flags[key].get("choices") or ()):  # YAML's own reading of no
            value = "no"
        if isinstance(value, list):
            argv += [f"--{key}", *map(str, value)] if value else []
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv
