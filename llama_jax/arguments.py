"""The flags: the HF Trainer's and stanford_alpaca's names, read by transformers' own HfArgumentParser."""

import difflib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml

from llama_jax.errors import InputError, Parser


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Every flag that the run takes. Names, types and defaults are the HF Trainer's and stanford_alpaca's."""

    model_name_or_path: str = _flag("", "HF folder, .gguf file, or folder made by convert_torch_to_flax.py")
    data_path: str | None = _flag(None, "Alpaca JSON or JSONL, or records of input_ids and labels")
    output_dir: str = _flag("trainer_output", "checkpoints, and the HF folder at the end")
    model_max_length: int = _flag(512, "tokens of an example, bos included; longer ones are cut")
    cache_dir: str | None = _flag(None, "stanford_alpaca's download cache; nothing is downloaded here")
    allow_pickle: bool = _flag(False, "read pytorch_model*.bin (unpickling; torch >= 2.10)")
    dtype: str = _flag("float32", "type of the parameters and of Adam's state: float32 or bfloat16")
    hf_compat: str = field(
        default="4.37", metadata={"help": "whose rules: transformers 4.37's or 5's", "choices": ["4.37", "5"]}
    )

    num_train_epochs: float = _flag(3.0, "epochs, fractions allowed")
    max_steps: int = _flag(-1, "updates; above 0 it overrides the epochs")
    per_device_train_batch_size: int = _flag(8, "examples of a micro-batch on each device")
    per_device_eval_batch_size: int = _flag(8, "examples of an evaluation batch on each device")
    gradient_accumulation_steps: int = _flag(1, "micro-batches an update")
    max_tokens_per_device: int = _flag(4096, "tokens that a device is given at once; larger updates are accumulated")
    dataloader_drop_last: bool = _flag(False, "drop the last incomplete micro-batch of an epoch")
    seed: int = _flag(42, "seed of the order")
    data_seed: int | None = _flag(None, "seed of the order in 5; 4.37 ignores it")

    optim: str = _flag("adamw_torch", "adamw_torch or adamw_torch_fused (the same here)")
    learning_rate: float = _flag(5e-5, "peak learning rate")
    weight_decay: float = _flag(0.0, "decoupled decay of the matrices")
    adam_beta1: float = _flag(0.9, "decay of the first moment")
    adam_beta2: float = _flag(0.999, "decay of the second moment")
    adam_epsilon: float = _flag(1e-8, "added to the square root of the second moment")
    max_grad_norm: float = _flag(1.0, "clip the gradient to this norm; 0 or less does not clip")
    lr_scheduler_type: str = _flag("linear", "linear, cosine, constant or constant_with_warmup")
    warmup_ratio: float = _flag(0.0, "share of the updates that warm up")
    warmup_steps: float = _flag(0, "updates that warm up; below 1 a share")
    label_smoothing_factor: float = _flag(0.0, "label smoothing")

    bf16: bool = _flag(False, "matmuls in bfloat16; parameters, residual stream, norms and loss stay float32")
    tf32: bool | None = _flag(None, "float32 matmuls in TF32 (NVIDIA Ampere and later)")
    scan_layers: bool | None = _flag(None, "stack the layers under one lax.scan; by default where there are over 8")
    gradient_checkpointing: bool = _flag(False, "keep only each layer's input for the backward pass")
    use_cpu: bool = _flag(False, "run on the CPU")

    evaluation_strategy: str = _flag("no", "alias of eval_strategy")
    eval_strategy: str = _flag("no", "no; evaluation during training is not there yet")
    logging_strategy: str = field(
        default="steps", metadata={"help": "no, steps or epoch", "choices": ["no", "steps", "epoch"]}
    )
    logging_steps: float = _flag(500, "updates between two logs; below 1 a share of all")
    logging_first_step: bool = _flag(False, "log the first update too")
    logging_dir: str | None = _flag(None, "TensorBoard's folder; there is no TensorBoard here")
    loggingdir: str | None = _flag(None, "as logging_dir")
    report_to: str = _flag("none", "trackers; none here: the log is in trainer_state.json")
    disable_tqdm: bool = _flag(False, "no progress bar")
    save_strategy: str = field(
        default="steps", metadata={"help": "no, steps or epoch", "choices": ["no", "steps", "epoch"]}
    )
    save_steps: float = _flag(500, "updates between two checkpoints; below 1 a share of all")
    save_total_limit: int | None = _flag(None, "checkpoints kept; the oldest go first")
    overwrite_output_dir: bool = _flag(False, "start anew where output_dir holds checkpoints, and remove them")
    resume_from_checkpoint: str | None = _flag(None, "True for the last checkpoint of output_dir, or its path")

    def notes(self, platform: str) -> list[str]:
        """One line for each given flag that is an alias, or has no meaning or no effect here."""
        said = []
        if self.evaluation_strategy != "no":
            said.append("--evaluation_strategy: read as --eval_strategy")
        if self.loggingdir is not None:
            said.append("--loggingdir: read as --logging_dir")
        if self.logging_dir or self.loggingdir:
            said.append(
                "--logging_dir: no TensorBoard here, nothing is written there; the log is in trainer_state.json"
            )
        if self.report_to not in ("none", "None"):
            said.append(f"--report_to {self.report_to}: no trackers here; the log is in trainer_state.json")
        if self.cache_dir:
            said.append("--cache_dir: nothing is downloaded, so nothing is cached there")
        if self.tf32 and platform != "gpu":
            said.append(f"--tf32 True: no NVIDIA GPU here ({platform}); float32 matmuls stay float32")
        if self.optim != "adamw_torch":
            said.append(f"--optim {self.optim}: read as adamw_torch (optax AdamW)")
        if self.warmup_ratio and self.warmup_steps:
            said.append("--warmup_ratio: ignored, as --warmup_steps is given")
        if self.data_seed is not None and self.hf_compat == "4.37":
            said.append("--data_seed: transformers 4.37 ignores it, and so does --hf_compat 4.37")
        return said

    def check(self) -> None:
        """Raise InputError for values that no run can have."""
        if not self.model_name_or_path:
            raise InputError("--model_name_or_path is missing: give an HF folder")
        if not self.data_path:
            raise InputError("--data_path is missing: give a JSON file of records")
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), float) and not math.isfinite(value):
                raise InputError(f"--{f.name} {value}: should be a finite number")
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: should not be below 0")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: should be at least 0 and below 1")
        positive = (
            "model_max_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
        )
        for name in (*positive, "per_device_eval_batch_size", "max_tokens_per_device", "logging_steps", "save_steps"):
            strategy = {"logging_steps": self.logging_strategy, "save_steps": self.save_strategy}.get(name, "steps")
            if getattr(self, name) <= 0 and strategy == "steps":
                raise InputError(f"--{name} {getattr(self, name)}: should be above 0")
        for name in ("logging_steps", "save_steps", "warmup_steps"):
            value = getattr(self, name)
            if value > 1 and value != int(value):
                raise InputError(f"--{name} {value}: should be a whole number, or a share below 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"--warmup_ratio {self.warmup_ratio}: should lie between 0 and 1")
        if self.eval_strategy != "no" or self.evaluation_strategy != "no":
            raise InputError("--eval_strategy: evaluation during training is not there yet; use no")
        if self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise InputError(f"--optim {self.optim}: only adamw_torch and adamw_torch_fused are there")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"--dtype {self.dtype}: should be float32 or bfloat16")

    def warmup_updates(self, updates: int) -> int:
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(updates * (self.warmup_steps or self.warmup_ratio))

    def every(self, name: str, updates: int) -> int:
        """`logging_steps` or `save_steps` as a number of updates."""
        value = getattr(self, f"{name}_steps")
        return math.ceil(updates * value) if value < 1 else int(value)

    def due(self, name: str, updates: int, epoch_ends: set[int]) -> Callable[[int], bool]:
        """Whether a log ("logging") or a checkpoint ("save") is due after so many updates."""
        strategy, every = getattr(self, f"{name}_strategy"), self.every(name, updates)
        if strategy == "no":
            at_strategy = lambda done: False  # noqa: E731
        elif strategy == "epoch":
            at_strategy = lambda done: done in epoch_ends  # noqa: E731
        else:
            at_strategy = lambda done: done % every == 0  # noqa: E731
        if name == "logging":
            return lambda done: at_strategy(done) or (self.logging_first_step and done == 1)
        last = self.hf_compat == "5" and strategy == "steps"
        return lambda done: at_strategy(done) or (last and done == updates)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line (and the file of `--config`, whose values it overrides). Raises InputError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell that torch is missing, which is meant
    from transformers import HfArgumentParser

    class FlagParser(HfArgumentParser):
        error = Parser.error

    argv = list(argv)
    before = Parser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    known, rest = before.parse_known_args(argv)
    from_file = _config_argv(Path(known.config)) if known.config else []
    parser = FlagParser(
        cast(Any, Arguments), description="Fine-tune a LLaMA: an HF folder in, an HF folder out.", prog="train_jax.py"
    )
    parser.add_argument("--config", help="YAML file of flags by their names; the command line overrides it")
    (arguments, *_), unknown = _split(
        parser.parse_args_into_dataclasses(from_file + rest, return_remaining_strings=True)
    )
    if unknown:
        names = [f"--{f.name}" for f in fields(Arguments)]
        near = difflib.get_close_matches(unknown[0], names, n=1)
        raise InputError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    arguments.check()
    return arguments


def _split(parsed: tuple) -> tuple[tuple, list[str]]:
    return parsed[:-1], parsed[-1]


def _config_argv(path: Path) -> list[str]:
    """A YAML file of flags as a command line."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file") from None
    except OSError as e:
        raise InputError(f"--config {path}: cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"--config {path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: should map flags to values")
    names = {f.name for f in fields(Arguments)}
    argv: list[str] = []
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise InputError(f"--config {path}: unknown flag {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if value is not None:
            items = value if isinstance(value, list) else [value]
            argv += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in items)]
    return argv
