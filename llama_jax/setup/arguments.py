"""Define the flags of a run, by the HF Trainer's and stanford_alpaca's names, and read them by HfArgumentParser."""

import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from llama_jax.base.bucket import as_path, is_remote, local_path
from llama_jax.base.errors import InputError
from llama_jax.base.files import parse_json, read_small
from llama_jax.base.secrets import is_secret, without_query
from llama_jax.distributed import watchdog
from llama_jax.model.kernels import KERNELS
from llama_jax.model.remat import REMAT
from llama_jax.reporting.metrics import EVALUATION_METRICS
from llama_jax.reporting.platforms import check_names
from llama_jax.setup.deepspeed import differences
from llama_jax.setup.flags import OtherFlags, overridden, read_json, read_others, resolve_optimizer, suggest_flag
from llama_jax.setup.help import help_page
from llama_jax.training.optimizer_names import OPTIMIZERS, WITHOUT_MOMENTS
from llama_jax.training.schedule import LISTENING, SCHEDULES, warmup_updates

_STRATEGIES = {"choices": ["no", "steps", "epoch"]}
_INTERVALS = ("logging", "eval", "save")
_IN_BUCKETS = ("model_name_or_path", "tokenizer_name", "output_dir", "resume_from_checkpoint")
_PATHS = ("model_name_or_path", "tokenizer_name", "output_dir", "cache_dir", "adapter_name_or_path")
_DATA = ("data_path", "eval_data_path")
_ARGS_FILE = Path(__file__).resolve().parents[2] / "train_jax.args"  # beside train_jax.py
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_CONFIG_BYTES = 128 << 10  # PyYAML takes some 4 s for so many
_YAML_DEPTH = 20


class Plan(Protocol):
    """Declare the attributes of an `Order` that `due` reads."""

    @property
    def updates(self) -> int: ...

    def epoch_ends(self) -> set[int]: ...

    def epoch_at(self, updates_done: int) -> float: ...


def _flag(default: Any, text: str, **options: Any) -> Any:
    """Make a field; `options` are argparse's. `--help` shows `text` up to its first semicolon."""
    return field(default=default, metadata={"help": text, **options})


_OWN = (
    *(
        "model_name_or_path",
        "tokenizer_name",
        "data_path",
        "eval_data_path",
        "output_dir",
        "cache_dir",
        "resume_from_checkpoint",
    ),
    *("coordinator_address", "process_id", "disable_tqdm", "log_level", "show_examples", "config"),
    *("compare_with", "sample_prompts"),
)


@dataclass
class Arguments:
    """Hold every implemented flag, with the names, types and defaults of the HF Trainer and stanford_alpaca.

    `setup/flags.py` lists the other flags of the Trainer. The order of the fields is the order of `--help all`.
    """

    model_name_or_path: str = _flag(
        "",
        "HF folder, hub name (org/model), .gguf file, Flax folder or checkpoint-N (required); a named model is read "
        "from the hub's cache, or downloaded into it; convert_torch_to_flax.py makes Flax folders",
    )
    tokenizer_name: str | None = _flag(None, "folder or hub name of another tokenizer than the model's own")
    data_path: list[str] | None = _flag(  # noqa: RUF009 - makes a field
        None,
        "training data: JSON, JSONL, parquet, .arrow, .csv or .txt, or a folder (required); several, with commas or "
        "spaces between; patterns (data/*.jsonl), .gz, .bz2, .xz and .zst; folders of save_to_disk, or "
        "with files as load_dataset finds them; names of datasets on the hub; URLs of fsspec; DATA:SPLIT for a split; "
        "records are Alpaca, chat, text, or input_ids and labels",
    )
    dataset_config_name: str | None = _flag(None, "configuration of the dataset that --data_path names")
    skip_bad_records: bool = _flag(False, "leave bad records out, with a warning")
    model_max_length: int = _flag(
        512, "longest example in tokens, bos included; longer examples are cut, except records of input_ids"
    )
    allow_pickle: bool = _flag(False, "read pytorch_model*.bin, its tensors alone")
    allow_nonfinite: bool = _flag(False, "read and write weights with NaN or Inf")
    cache_dir: str | None = _flag(None, "folder for tokenized data; by default ~/.cache/llama_jax/data")

    num_train_epochs: float = _flag(3.0, "number of epochs; fractions are allowed")
    max_steps: int = _flag(-1, "number of updates; above 0 it overrides the epochs")
    per_device_train_batch_size: int = _flag(8, "examples of a micro-batch on each device")
    gradient_accumulation_steps: int = _flag(1, "micro-batches of an update")
    learning_rate: float = _flag(5e-5, "peak learning rate")
    lr_scheduler_type: str = _flag("linear", "schedule of the learning rate", choices=[*SCHEDULES])
    lr_scheduler_kwargs: str | None = _flag(None, "schedule's keywords: JSON or a file; 4.37's default: {}, the same")
    warmup_ratio: float = _flag(0.0, "share of the updates that warm up")
    warmup_steps: float = _flag(0, "updates that warm up; a value below 1 is a share")
    optim: str = _flag(
        "adamw_torch",
        f"optimizer: {', '.join(OPTIMIZERS)}; 5's default: adamw_torch_fused, the same",
    )
    weight_decay: float = _flag(0.0, "decay of the matrices; biases and norms have none")
    adam_beta1: float = _flag(0.9, "decay of the first moment")
    adam_beta2: float = _flag(0.999, "decay of the second moment")
    adam_epsilon: float = _flag(1e-8, "constant added to the root of the second moment")
    adam_moments_dtype: str | None = _flag(
        None, "type of adamw_torch's moments; by default the parameters'", choices=["float32", "bfloat16"]
    )
    offload_optimizer: bool = _flag(
        False, "keep the optimizer's moments in the host's memory; the same updates, each longer by the copies"
    )
    max_grad_norm: float = _flag(1.0, "clip the gradient to this norm; 0 or less: no clip")
    on_nonfinite: str = _flag("skip", "NaN or Inf in loss or gradient: skip or continue", choices=["skip", "continue"])
    max_bad_updates: int = _flag(3, "end the run after so many skipped in a row; 0: never")
    skip_loss_spikes: float | None = _flag(None, "skip a loss above the mean by this many deviations")
    label_smoothing_factor: float = _flag(0.0, "label smoothing")
    train_sampling_strategy: str = _flag(
        "random",
        "order of the examples; batch_rebalance is refused",
        choices=["random", "sequential", "group_by_length", "batch_rebalance"],
    )
    dataloader_drop_last: bool = _flag(False, "drop the last incomplete micro-batch of an epoch")
    average_tokens_across_devices: bool = _flag(
        True, "under --hf_compat 5, the loss of an update is the mean over the tokens of all devices"
    )
    seed: int = _flag(42, "seed of the order of the examples")
    data_seed: int | None = _flag(None, "seed of the order under --hf_compat 5; 4.37 ignores the flag")
    hf_compat: str = _flag("4.37", "transformers whose rules hold", choices=["4.37", "5"])

    use_peft: bool = _flag(
        False, "train low-rank adapters (LoRA); the output is a PEFT folder, and the base model stays as it is"
    )
    lora_r: int = _flag(16, "rank of the adapters")
    lora_alpha: int = _flag(32, "scale of the adapters: their product is multiplied by lora_alpha / lora_r")
    lora_dropout: float = _flag(0.05, "chance that an input element is dropped")
    lora_target_modules: list[str] | None = _flag(  # noqa: RUF009 - makes a field
        None,
        "projections that get adapters: names (q_proj v_proj), all-linear, or a regular expression of whole names; by "
        "default PEFT's of the model's family, q_proj and v_proj",
    )
    lora_modules_to_save: list[str] | None = _flag(  # noqa: RUF009 - makes a field
        None, "modules to train whole beside the adapters: embed_tokens lm_head"
    )
    ensure_weight_tying: bool = _flag(False, "train a tied embedding and head whole, as one")
    use_rslora: bool = _flag(False, "multiply by lora_alpha / sqrt(lora_r) instead")
    use_dora: bool = _flag(False, "train the lengths of the weights' rows (DoRA)")
    lora_bias: str = _flag("none", "biases to train; none are", choices=["none", "all", "lora_only"])
    init_lora_weights: str = _flag("True", "True (PEFT's), gaussian, False")
    adapter_name_or_path: str | None = _flag(None, "PEFT folder whose adapter is trained further")
    load_in_4bit: bool = _flag(False, "keep the base's projections in 4 bits (QLoRA)")
    load_in_8bit: bool = _flag(False, "keep the base's projections in 8 bits")
    bnb_4bit_quant_type: str = _flag("nf4", "of --load_in_4bit; fp4 is refused", choices=["nf4", "fp4"])
    use_bnb_nested_quant: bool = _flag(False, "keep the scales of 4 bits in 8 bits")

    bf16: bool = _flag(False, "matmuls in bfloat16; the rest stays float32")
    fp8: bool = _flag(False, "projections in fp8; needs an Ada or Hopper GPU")
    dtype: str | None = _flag(
        None,
        "type of the parameters and the optimizer state; by default float32, or the checkpoint's under --hf_compat 5",
        choices=["float32", "bfloat16"],
    )
    tf32: bool | None = _flag(None, "float32 matmuls in TF32; needs an NVIDIA GPU, Ampere or later")
    use_cpu: bool = _flag(False, "run on the CPU")
    mesh: str = _flag(
        "auto",
        "layout of the devices, as data=2,fsdp=4,tensor=2; auto puts all on fsdp; axes left out are 1, one axis may be "
        "-1; context=2 divides rows over 2 devices",
    )
    world_size: int | None = _flag(
        None, "devices of the Trainer that the run stands for; by default the checkpoint's, else data x fsdp of --mesh"
    )
    max_tokens_per_device: str = _flag(
        "auto",
        "tokens in a device's memory at once; larger updates are accumulated; auto: the most that fits by the "
        "compiler's count, or 4096 where the device's memory is not known",
    )
    remat: str = _flag(
        "auto",
        "activations that the backward pass computes again; "
        + "; ".join(f"{name}: {choice.text}" for name, choice in REMAT.items())
        + "; auto: as little as fits",
        choices=["auto", *REMAT],
    )
    gradient_checkpointing: bool = _flag(
        False, "same as --remat full, unless --remat is given; 5's default: None, which is the same"
    )
    gradient_sum_dtype: str = _flag(
        "float32",
        "type of the sum of layers' gradients over devices; bfloat16 sends half of the bytes",
        choices=["float32", "bfloat16"],
    )
    accumulation: str = _flag(
        "sum",
        "sum of the gradients of an update in several blocks; sum: beside the optimizer; multisteps: optax.MultiSteps",
        choices=["sum", "multisteps"],
    )
    packing: bool = _flag(True, "place examples side by side in rows; False pads each micro-batch, as the Trainer does")
    attention: str = _flag("auto", "attention kernel; auto takes the device's best", choices=["auto", *KERNELS])
    scan_layers: bool | None = _flag(
        None, "stack the layers under one lax.scan; by default for over 8 layers, on a GPU for over 48"
    )
    compiler_options: str | None = _flag(
        None, "XLA's options, as NAME=VALUE,NAME=VALUE; the value default leaves a chip's option out"
    )
    full_determinism: bool = _flag(False, "give the same bits on every run; somewhat slower")
    coordinator_address: str | None = _flag(
        None,
        "HOST:PORT of the first of several processes; torchrun, accelerate launch, deepspeed, mpirun, srun and TPU "
        "slices need no address",
    )
    num_processes: int | None = _flag(None, "number of processes; needed beside --coordinator_address alone")
    process_id: int | None = _flag(None, "number of this process, from 0, as --num_processes")
    watchdog_seconds: int = _flag(30, "seconds until a dead or stuck process ends the rest")

    output_dir: str = _flag(
        "trainer_output",
        "checkpoints and the final HF folder; 4.37's default: required; 5's default: None, which means trainer_output",
    )
    save_strategy: str = _flag(
        "steps",
        "when to save a checkpoint; best (--hf_compat 5) saves after each evaluation that is the best so far",
        choices=["no", "steps", "epoch", "best"],
    )
    save_steps: float = _flag(500, "updates between checkpoints; below 1 a share")
    save_total_limit: int | None = _flag(None, "checkpoints to keep, by default all; the best stays")
    overwrite_output_dir: bool = _flag(False, "replace output_dir's checkpoints and model")
    resume_from_checkpoint: str | None = _flag(
        None,
        "True for the last checkpoint in output_dir, auto for the last if any, or the path of any run's, the HF "
        "Trainer's too",
    )
    export_only: bool = _flag(False, "export the last checkpoint, without training")
    eval_strategy: str = _flag("no", "when to evaluate: no, steps or epoch", **_STRATEGIES)
    eval_data_path: list[str] | None = _flag(  # noqa: RUF009 - makes a field
        None, "evaluation data; as for --data_path, DATA:validation for a split"
    )
    eval_tasks: list[str] | None = _flag(  # noqa: RUF009 - makes a field
        None, "lm-eval's tasks or YAML files, judged at each evaluation"
    )
    eval_tasks_limit: float | None = _flag(None, "questions of each task; below 1 a share")
    validation_split_percentage: float = _flag(0, "percentage of data_path to hold out for evaluation")
    eval_steps: float | None = _flag(
        None, "updates between two evaluations; a value below 1 is a share; by default --logging_steps"
    )
    eval_delay: float = _flag(0, "updates or epochs, as --eval_strategy counts, before the first evaluation")
    eval_on_start: bool = _flag(False, "evaluate before the first update")
    per_device_eval_batch_size: int = _flag(8, "examples of an evaluation batch on each device")
    load_best_model_at_end: bool = _flag(False, "export the best checkpoint instead of the last")
    metric_for_best_model: str | None = _flag(None, "metric that decides which checkpoint is best; by default loss")
    greater_is_better: bool | None = _flag(None, "take a larger metric for better; by default not for a loss")
    logging_strategy: str = _flag("steps", "when to log: no, steps or epoch", **_STRATEGIES)
    logging_steps: float = _flag(500, "updates between log lines; below 1 a share")
    logging_first_step: bool = _flag(False, "log the first update too")
    logging_nan_inf_filter: bool = _flag(True, "log the mean so far for a loss that is not finite")
    include_num_input_tokens_seen: str = _flag(
        "no",
        "count the tokens seen in every log; no, all (or true), or non_padding; 4.37's default: False, which is no",
        nargs="?",
        const="all",
    )
    disable_tqdm: bool | None = _flag(None, "show no progress bar")
    log_level: str = _flag(
        "passive",
        "least level to print on stderr; passive is info; debug adds each compiled program",
        choices=["detail", "debug", "info", "warning", "error", "critical", "passive"],
    )
    report_to: list[str] | None = _flag(  # noqa: RUF009 - makes a field
        None,
        "trackers, as wandb mlflow; all: those installed, the default where --hf_compat 4.37 is given; 5's default: "
        "none; docs/trackers.md lists them",
    )
    compare_with: str | None = _flag(
        None, "trainer_state.json of another run, the HF Trainer's too; its curves lie over this run's in report.html"
    )
    run_name: str | None = _flag(None, "name of the run for trackers; MLflow: output_dir under 4.37")
    logging_dir: str | None = _flag(None, "TensorBoard's folder; by default under OUTPUT_DIR/runs")
    project: str = _flag("huggingface", "trackio's project; wandb: WANDB_PROJECT")
    trackio_space_id: str | None = _flag(None, "Space on the hub that trackio writes to")
    trackio_bucket_id: str | None = _flag(None, "bucket of that Space")
    trackio_static_space_id: str | None = _flag(None, "Space of a static copy of it")
    hub_private_repo: bool | None = _flag(None, "make that Space private; 4.37's default: False", nargs="?", const=True)

    config: str | None = _flag(
        None,
        "YAML or JSON file of flags, as configs/demo.yaml; also as the first word; the command line overrides it",
    )
    explain: str | None = _flag(
        None,
        "print the flags' effect on this data, and end; text or json",
        nargs="?",
        const="text",
        choices=["text", "json"],
    )
    sample_prompts: str | None = _flag(
        None, "file of questions to answer at each save, side by side in report.html; a .txt holds one a line"
    )
    profile_updates: str | None = _flag(
        None, "updates to trace, as 10:13, both included; OUTPUT_DIR/profile opens in xprof and Perfetto"
    )
    show_examples: int = _flag(0, "print so many examples; trained tokens are marked")
    dry_run: str | None = _flag(
        None,
        "report whether the run fits v5e-16 or h200:8, and end; exit code 3 where not; config.json alone suffices",
    )
    dry_run_effort: str = _flag(
        "full",
        "the compiler's effort; fast takes a fraction of the time, and gives no verdict on memory",
        choices=["full", "fast"],
    )

    def __post_init__(self) -> None:
        self.read_as: list[str] = []  # one line for each alias and each flag without meaning
        self.without_meaning: dict[str, Any] = {}  # given flags of the Trainer that are not fields

    @property
    def max_tokens(self) -> int | None:
        """Return `--max_tokens_per_device` as a number, None for auto."""
        return None if self.max_tokens_per_device == "auto" else int(self.max_tokens_per_device)

    @property
    def xla_options(self) -> tuple[tuple[str, str | bool], ...]:
        """Return `--compiler_options` as names and values; a value may have commas. Raises InputError."""
        given, parts = self.compiler_options or "", list[str]()
        if given.startswith("{"):  # a mapping of a config file
            parts = [f"{name}={value}" for name, value in read_json("compiler_options", given).items()]
        for part in [] if parts else given.split(","):
            if parts and "=" not in part:
                parts[-1] += f",{part}"
            elif part.strip():
                parts.append(part)
        found: dict[str, str | bool] = {}
        for part in parts:
            name, equals, value = (x.strip() for x in part.partition("="))
            if not (re.fullmatch(r"\w+", name) and equals and value):
                raise InputError(f"--compiler_options {part.strip()}: should be NAME=VALUE, without dashes")
            if name in found:
                raise InputError(f"--compiler_options: {name} is given twice")
            found[name] = {"true": True, "false": False}.get(value.lower(), value)
        return tuple(found.items())

    @property
    def schedule_kwargs(self) -> dict[str, Any]:
        """Return `--lr_scheduler_kwargs` as keywords of the schedule. Raises InputError."""
        return read_json("lr_scheduler_kwargs", self.lr_scheduler_kwargs) if self.lr_scheduler_kwargs else {}

    @property
    def best_metric_key(self) -> str:
        """Return `metric_for_best_model` by its name among an evaluation's metrics."""
        return "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")

    def settle(self) -> None:
        """Set the values that follow from other values, as TrainingArguments does. Raises InputError."""
        self.optim, lines = resolve_optimizer(self.optim)
        self.read_as += lines
        seen = self.include_num_input_tokens_seen.lower()
        words = {**dict.fromkeys("yes true t y 1".split(), "all"), **dict.fromkeys("false f n 0".split(), "no")}
        self.include_num_input_tokens_seen = words.get(seen, seen)
        for name in _PATHS:
            if value := getattr(self, name):
                setattr(self, name, os.path.expanduser(value))
        for name in _DATA:
            if given := getattr(self, name):
                setattr(self, name, _data_names([given] if isinstance(given, str) else given))
        if self.export_only and not self.resume_from_checkpoint:
            self.resume_from_checkpoint = "True"
        if self.gradient_checkpointing and self.remat == "auto":
            self.remat = "full"
        if self.eval_strategy == "steps" and not self.eval_steps:
            self.eval_steps = self.logging_steps
        needs_metric = self.load_best_model_at_end or self.lr_scheduler_type in LISTENING
        if self.metric_for_best_model is None and needs_metric:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and (metric := self.metric_for_best_model) is not None:
            is_loss = metric in ("loss", "eval_loss") if self.hf_compat == "4.37" else metric.endswith("loss")
            self.greater_is_better = not is_loss

    @property
    def decisive(self) -> dict[str, Any]:
        """Return the flags that must be equal in all processes of a run: neither paths nor the process's own number."""
        return {f"--{f.name}": getattr(self, f.name) for f in fields(self) if f.name not in _OWN}

    @property
    def of_trainer(self) -> dict[str, Any]:
        """Return the values of all flags of the Trainer for trackers, those without meaning here as they are given."""
        return {**self.without_meaning, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @property
    def profiled(self) -> range:
        """Return the updates of `--profile_updates`, numbered from 0; an empty range for none. Raises InputError."""
        if self.profile_updates is None:
            return range(0)
        match = re.fullmatch(r"0*([1-9]\d*):0*([1-9]\d*)", self.profile_updates, re.ASCII)
        if match is None or int(match[1]) > int(match[2]):
            raise InputError(f"--profile_updates {self.profile_updates}: should be as 10:13, the first and the last")
        return range(int(match[1]) - 1, int(match[2]))

    @property
    def products(self) -> str:
        """Return the types of matrix products, "" for the parameters' own."""
        return f"bfloat16{', fp8 in the projections' if self.fp8 else ''}" if self.bf16 else ""

    def notes(self, platform: str) -> list[str]:
        """Return a line for each given flag that is an alias, or has no meaning or no effect here."""
        lines = list(self.read_as)
        if self.tf32 and platform != "gpu":
            lines.append(f"--tf32 True: no effect on {platform}; float32 matmuls stay float32")
        if self.warmup_ratio and self.warmup_steps:
            lines.append("--warmup_ratio: ignored, because --warmup_steps is given")
        if self.data_seed is not None and self.hf_compat == "4.37":
            lines.append("--data_seed: ignored under --hf_compat 4.37, as by transformers 4.37")
        if not self.average_tokens_across_devices and self.hf_compat == "4.37":
            lines.append("--average_tokens_across_devices: no effect under --hf_compat 4.37")
        if self.max_tokens_per_device != "auto" and not self.packing:
            lines.append("--max_tokens_per_device: no effect with --packing False; blocks are micro-batches then")
        if self.eval_strategy == "no" and not self.eval_on_start:
            given = [name for name in ("eval_data_path", "eval_tasks") if getattr(self, name)]
            lines += [f"--{name}: no effect, because --eval_strategy is no" for name in given]
        return lines

    def check(self) -> None:
        """Raise InputError for values that are refused in every run."""
        if not self.model_name_or_path:
            raise InputError("--model_name_or_path is missing: give a folder with the model (config.json, safetensors)")
        if not self.data_path:
            raise InputError("--data_path is missing: give training records, as alpaca_data.json")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"--{f.name} {value}: should be a finite number")
            if isinstance(value, str) and (scheme := re.match("([a-z0-9]+)://", value)):
                in_bucket = ", or to a bucket of gs://" if f.name in _IN_BUCKETS else ""
                if scheme[1] != "gs" or not in_bucket:
                    raise InputError(f"--{f.name} {value}: is not reached from here; copy the files here{in_bucket}")
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "max_bad_updates"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: should not be below 0")
        if self.skip_loss_spikes is not None and self.skip_loss_spikes <= 0:
            raise InputError(f"--skip_loss_spikes {self.skip_loss_spikes:g}: should be above 0, as 6")
        if self.adam_moments_dtype is not None and self.optim != "adamw_torch":
            raise InputError(
                f"--adam_moments_dtype {self.adam_moments_dtype}: is for --optim adamw_torch, and this run's is "
                f"{self.optim}; leave it out"
            )
        if self.offload_optimizer and self.optim in WITHOUT_MOMENTS:
            raise InputError(f"--offload_optimizer True: --optim {self.optim} has no large state; leave the flag out")
        if self.offload_optimizer and self.accumulation != "sum":
            raise InputError(
                f"--offload_optimizer True: is for --accumulation sum, and this run's is {self.accumulation}; leave "
                "either out"
            )
        if self.gradient_sum_dtype == "bfloat16" and not self.bf16:
            raise InputError("--gradient_sum_dtype bfloat16: needs --bf16 True, whose gradients are in that type")
        if self.gradient_sum_dtype == "bfloat16" and self.use_peft:
            raise InputError("--gradient_sum_dtype bfloat16: adapters' gradients are few; leave it out")
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
        if self.watchdog_seconds < watchdog.LEAST:
            raise InputError(f"--watchdog_seconds {self.watchdog_seconds}: should be at least {watchdog.LEAST}")
        if self.world_size is not None and self.world_size <= 0:
            raise InputError(f"--world_size {self.world_size}: should be above 0, or left out")
        if self.max_tokens_per_device != "auto" and not re.fullmatch("0*[1-9][0-9]*", self.max_tokens_per_device):
            raise InputError(
                f"--max_tokens_per_device {self.max_tokens_per_device}: should be auto or a number above 0"
            )
        for name in (*intervals, "warmup_steps"):
            value = getattr(self, name)
            if value > 1 and value != int(value):
                raise InputError(f"--{name} {value}: should be a whole number, or a share below 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"--warmup_ratio {self.warmup_ratio}: should be between 0 and 1")
        if (seen := self.include_num_input_tokens_seen) not in ("no", "all", "non_padding"):
            raise InputError(f"--include_num_input_tokens_seen {seen}: should be no, all or non_padding")
        if self.train_sampling_strategy == "batch_rebalance":
            raise InputError(
                "--train_sampling_strategy batch_rebalance: not there, since nothing is padded here; use random or "
                "group_by_length"
            )
        self.schedule_kwargs  # noqa: B018  # raises
        self.xla_options  # noqa: B018  # raises
        check_names(self.report_to or ())
        if self.profiled and is_remote(as_path(self.output_dir)):
            raise InputError("--profile_updates: a trace cannot be written to a bucket; give a local --output_dir")
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        held_out = self.validation_split_percentage
        if not 0 <= held_out < 100:
            raise InputError(f"--validation_split_percentage {held_out:g}: should be at least 0 and below 100")
        if held_out and self.eval_data_path:
            raise InputError("--validation_split_percentage and --eval_data_path: give one of them")
        data = held_out or self.eval_data_path
        if (self.eval_strategy != "no" or self.eval_on_start) and not (data or self.eval_tasks):
            name = "eval_on_start" if self.eval_strategy == "no" else f"eval_strategy {self.eval_strategy}"
            raise InputError(
                f"--{name}: there is no evaluation data; give --eval_data_path, --validation_split_percentage or "
                "--eval_tasks"
            )
        if self.fp8 and not self.bf16:
            raise InputError("--fp8 True: is for the projections of a bfloat16 run; add --bf16 True")
        if self.fp8 and (self.load_in_4bit or self.load_in_8bit):
            given = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise InputError(f"--fp8 True: the projections are quantized by --{given} True already; give one of them")
        self._check_tasks()
        if self.metric_for_best_model is not None and not self.eval_tasks:
            self.check_metric(EVALUATION_METRICS)
        if self.save_strategy == "best" and self.hf_compat == "4.37":
            raise InputError(
                "--save_strategy best: not in transformers 4.37; use steps or epoch, or give --hf_compat 5"
            )
        if self.eval_strategy == "no":
            follows = "needs evaluations; give --eval_strategy steps or epoch"
            if self.lr_scheduler_type in LISTENING:
                raise InputError(f"--lr_scheduler_type {self.lr_scheduler_type}: {follows}")
            if self.save_strategy == "best":
                raise InputError(f"--save_strategy best: {follows}")
        if self.save_strategy == "best":
            if self.metric_for_best_model is None:
                raise InputError("--save_strategy best: give --metric_for_best_model, for example loss")
            return
        if not self.load_best_model_at_end:
            return
        if self.save_strategy != self.eval_strategy:
            raise InputError(
                f"--load_best_model_at_end: --save_strategy {self.save_strategy} and --eval_strategy "
                f"{self.eval_strategy} should be equal"
            )
        if self.eval_strategy == "steps":
            assert self.eval_steps is not None
            # Decimals, since binary fractions make 0.3 no multiple of 0.1.
            left = Fraction(str(self.save_steps)) % Fraction(str(self.eval_steps))
            if left or (self.save_steps < 1) != (self.eval_steps < 1):
                raise InputError(
                    f"--load_best_model_at_end: --save_steps {self.save_steps:g} should be a multiple of --eval_steps "
                    f"{self.eval_steps:g}, both numbers of updates or both shares"
                )

    def _check_tasks(self) -> None:
        limit = self.eval_tasks_limit
        if limit is not None and not self.eval_tasks:
            raise InputError("--eval_tasks_limit: is for --eval_tasks, which is not given")
        if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
            raise InputError(f"--eval_tasks_limit {limit:g}: should be a whole number, or a share below 1")

    def check_metric(self, names: Iterable[str]) -> None:
        """Raise InputError where `metric_for_best_model` is none of the names of an evaluation's metrics."""
        if self.metric_for_best_model is not None and self.best_metric_key not in (known := [*names]):
            raise InputError(
                f"--metric_for_best_model {self.metric_for_best_model}: an evaluation has {', '.join(known)}"
            )

    def warmup_updates(self, updates: int) -> int:
        """Return the number of updates that warm up, of all `updates`."""
        return warmup_updates(self.warmup_steps, self.warmup_ratio, updates)

    def every(self, name: str, updates: int) -> int:
        """Return `logging_steps`, `eval_steps` or `save_steps` as a number of updates, by default 500."""
        value = getattr(self, f"{name}_steps")
        if value is None:
            return 500
        return math.ceil(updates * value) if value < 1 else int(value)

    def due(self, name: str, order: Plan) -> Callable[[int], bool]:
        """Return a test for a log ("logging"), evaluation ("eval") or checkpoint ("save") after a number of updates.

        Two cases are decided elsewhere: `--save_strategy best` and `--eval_on_start`.
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


def _data_names(words: Sequence[str]) -> list[str]:
    """Return the names in the words of a flag: commas separate names, but for commas of a path that exists.

    Raises InputError for a config file, which lacks its flag.
    """
    if configs := [word for word in words if word.endswith((".yaml", ".yml"))]:
        raise InputError(_unknown_argument(configs[0]))
    whole = [[word] if os.path.exists(os.path.expanduser(word)) else word.split(",") for word in words]
    return [os.path.expanduser(name.strip()) for names in whole for name in names if name.strip()]


def flag_parser() -> Any:
    """Make transformers' HfArgumentParser of all flags; a mistake on the command line raises InputError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else transformers warns that torch is missing
    from transformers import HfArgumentParser  # takes over 1 s

    class FlagParser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            if ambiguous := re.match(r"ambiguous option: --([\w-]+).* could match (.*)", message):
                # argparse lists a flag with underscores and with dashes: one spelling is enough.
                near = dict.fromkeys("--" + flag[2:].replace("-", "_") for flag in ambiguous[2].split(", "))
                raise InputError(f"unknown argument --{ambiguous[1]}; {suggest_flag(ambiguous[1], near=near)}")
            raise InputError(message.replace("argument ", "", 1))

    return FlagParser(cast(Any, (Arguments, OtherFlags)), prog="train_jax.py", add_help=False)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line, over the file of `--config`, over `train_jax.args`.

    Prints the help and raises SystemExit for `--help`; raises InputError for a mistake.
    """
    argv = list(argv)
    if {"--help", "-h"} & {*argv}:
        print(help_page(fields(Arguments), everything="all" in argv), end="")
        raise SystemExit(0)
    if argv and argv[0].endswith(_CONFIG_SUFFIXES) and not any(word.startswith("--conf") for word in argv):
        argv = ["--config", *argv]
    for name in _DATA:  # argparse would keep the last one alone
        if sum(word.partition("=")[0].replace("-", "_") == f"__{name}" for word in argv) > 1:
            raise InputError(f"--{name} is given twice: name all files after one --{name}, separated by spaces")
    parser = flag_parser()

    def read(argv: list[str]) -> tuple[Arguments, Any, list[str]]:
        return parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, args_filename=_ARGS_FILE)

    arguments, others, unknown = read(argv)
    if arguments.config:
        argv = _config_argv(local_path(arguments.config), _given(parser, argv)) + argv
        arguments, others, unknown = read(argv)
    if unknown:
        raise InputError(_unknown_argument(unknown[0]))
    meant, arguments.read_as = read_others(others)
    unset = OtherFlags()
    arguments.without_meaning = {k: v for k, v in vars(others).items() if v != getattr(unset, k)}
    for name, value in meant.items():
        setattr(arguments, name, value)
    if arguments.report_to is None and "hf_compat" not in _given(parser, argv):
        arguments.report_to = ["none"]  # 4.37's default, all, is for a command that asks for 4.37
    arguments.read_as += _of_accelerate(arguments)
    arguments.settle()
    if file := others.deepspeed or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").removeprefix("none"):
        arguments.read_as += differences(read_json("deepspeed", file), arguments)
    arguments.check()
    return arguments


def _of_accelerate(arguments: Arguments) -> list[str]:
    """Apply the settings of `accelerate launch` that TrainingArguments reads, and return a line for each.

    Source: `mixed_precision` and `_setup_devices` in transformers 4.37 and 5. Raises InputError.
    """
    lines = []
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "fp8" and not arguments.fp8:
        arguments.bf16 = arguments.fp8 = True
        lines.append("ACCELERATE_MIXED_PRECISION=fp8 (accelerate launch): read as --bf16 True --fp8 True")
    if precision not in ("no", "bf16", "fp8") and not arguments.bf16:
        raise InputError(
            f"ACCELERATE_MIXED_PRECISION is {precision} (accelerate launch --mixed_precision): float16 is not there; "
            "use bf16 or no"
        )
    if precision == "bf16" and not arguments.bf16:
        arguments.bf16 = True
        lines.append("ACCELERATE_MIXED_PRECISION=bf16 (accelerate launch): read as --bf16 True")
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes") and not arguments.use_cpu:
        arguments.use_cpu = True
        lines.append("ACCELERATE_USE_CPU (accelerate launch --cpu): read as --use_cpu True")
    return lines


def _unknown_argument(word: str) -> str:
    """Return the error line for a word of the command line that no flag takes."""
    if not word.startswith("-"):
        if word.endswith(_CONFIG_SUFFIXES):
            return f"unknown argument {word}; give one config file, as --config {word}"
        return f"unknown argument {word}; a value belongs after its flag, as --output_dir output"
    name = word.partition("=")[0]
    near = suggest_flag(name.lstrip("-"), among=[f"--{flag}" for flag in (*_flags(), "help")])
    return f"unknown argument {name}; {near or '--help all lists the flags'}"


def _flags() -> dict[str, Any]:
    """Return the options of each flag for argparse."""
    return {f.name: f.metadata for cls in (Arguments, OtherFlags) for f in fields(cls)}


def _given(parser: Any, argv: list[str]) -> set[str]:
    """Return the names of the flags on a command line."""
    unset = object()
    known, _ = parser.parse_known_args(argv, Namespace(**dict.fromkeys(_flags(), unset)))
    return {name for name, value in vars(known).items() if value is not unset}


def _config_argv(path: Path, given: set[str]) -> list[str]:
    """Read a YAML or JSON file of flags as a command line, without the flags that the `given` flags override."""
    where = f"--config {path}"
    try:
        data = read_small(path, _CONFIG_BYTES)
    except InputError as e:
        raise InputError(f"--config {e}") from None
    values = parse_json(data, where) if path.suffix == ".json" else _parse_yaml(data, where)
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: should map flags to values, as learning_rate: 2e-5")
    flags = _flags()
    del flags["config"]
    argv: list[str] = []
    for key, value in values.items():
        if key not in flags:
            near = suggest_flag(str(key), among=flags)
            raise InputError(f"--config {path}: unknown flag {key!r}" + (f"; {near}" if near else ""))
        if overridden(key, given):
            continue
        if value is False and "no" in (flags[key].get("choices") or ()):  # YAML reads a bare no as false
            value = "no"
        try:
            if isinstance(value, list):
                argv += [f"--{key}", *map(str, value)] if value else []
            elif value is not None:
                argv.append(f"--{key}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
        except (TypeError, ValueError) as e:  # keys of other types; digits that Python does not print
            raise InputError(f"--config {path}: {key}: cannot be a flag's value: {e}") from None
    return argv


def _parse_yaml(data: bytes, where: str) -> Any:
    """Parse YAML of plain values. Raises InputError, for aliases too, by which a value can hold itself or grow without
    bounds."""
    import yaml  # here, because --help does without

    try:
        depth = 0
        for event in yaml.parse(data, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{where}: aliases (*{event.anchor}) are not read; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _YAML_DEPTH:
                raise InputError(f"{where}: nests over {_YAML_DEPTH} levels; should map flags to values")
        return yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from None


def changed_flags(args: Arguments) -> dict[str, Any]:
    """Return the flags that are not at their default, without secrets, as JSON values."""
    changed: dict[str, Any] = {}
    for flag in fields(args):
        default = flag.default if flag.default_factory is MISSING else flag.default_factory()
        value = getattr(args, flag.name)
        if value != default and not is_secret(flag.name):
            if isinstance(value, list):
                changed[flag.name] = [without_query(str(part)) for part in value]
            else:
                changed[flag.name] = value if isinstance(value, int | float) else without_query(str(value))
    return changed
