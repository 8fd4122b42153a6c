"""List the flags of `transformers.TrainingArguments` (4.37.2 and 5.24) that are not fields of `Arguments`.

An alias is read as another flag. A flag without meaning here is accepted, with a line that gives the reason. A refused
flag raises InputError with the reason and the fix. A flag with the Trainer's own default prints nothing.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.base.errors import InputError
from llama_jax.base.files import parse_json, read_small
from llama_jax.training.optimizer_names import OPTIMIZERS as IMPLEMENTED_OPTIMIZERS

BOTH, OLD, NEW, ALPACA, SCRIPTS, HERE = "both", "4.37", "5", "alpaca", "scripts", "here"
IMPLEMENTED, ALIAS, NO_MEANING, REFUSED = "implemented", "alias", "no meaning", "refused"


class Flag(NamedTuple):
    """Describe a flag. `text` is the reason; for an alias, the target flag and, where fixed, its value."""

    name: str
    versions: str
    type: Any
    default: Any
    status: str
    text: str
    also: tuple[Any, ...] = ()  # further values with the meaning of the default
    options: dict[str, Any] | None = None  # argparse's
    differs: str = ""  # the other default, where the versions differ

    def note(self) -> str:
        """Return the line that is printed when the flag is given."""
        if self.status == ALIAS:
            return f"--{self.name}: read as --{self.text}"
        return f"--{self.name}: " + (f"no meaning here: {self.text}" if self.status == NO_MEANING else self.text)


_LEVELS = {"choices": ["detail", "debug", "info", "warning", "error", "critical", "passive"]}
_HALF = {"choices": ["auto", "apex", "cpu_amp"]}
_MESH = "--mesh lays out all devices, and XLA exchanges their data; torch's distributed settings are not used"
_RANK = "the place of a process comes from its launcher's variables, as RANK and LOCAL_RANK"
_LOADER = "there is no DataLoader; batches are planned ahead"
_METRICS = "an evaluation computes the loss alone and keeps no outputs"
_HUB = "nothing is uploaded; OUTPUT_DIR holds the HF folder"
_COMPILE = "XLA compiles every step"
_APEX = "belongs to --fp16; there is no loss scaling here"
_LOG = "no log of transformers or torch is printed"
_SCRIPT = "this command always trains; --eval_strategy turns evaluation on"
_SHARDS = (
    "torch's FSDP is not used; --mesh auto, the default, divides parameters, gradients and moments over all devices, "
    "as full_shard does, with the same updates"
)
_FULL_EVAL = "the Trainer casts only for evaluations outside training; there are none here"
_FP16 = "float16 needs loss scaling, which is not there; use --bf16 True"
_DEBUG = "torch's reports are not there; leave it out and set JAX_DEBUG_NANS=True, which stops at the first NaN"
_KEPT = "--gradient_checkpointing alone decides what is recomputed; results are the same"
_SPLIT = "would deal other examples to the devices; leave it out and give --per_device_train_batch_size"

# fmt: off
FLAGS = (
    Flag("accelerator_config", NEW, str | None, None, REFUSED,
         "batches are dealt as with accelerate's defaults; leave it out"),
    Flag("activation_checkpointing", NEW, bool | None, None, ALIAS, "gradient_checkpointing",
         options={"nargs": "?", "const": True}),
    Flag("activation_checkpointing_kwargs", NEW, str | None, None, NO_MEANING, _KEPT),
    Flag("adafactor", OLD, bool, False, ALIAS, "optim adafactor"),
    Flag("auto_find_batch_size", BOTH, bool, False, NO_MEANING,
         "the batch never shrinks; where memory is short, lower --max_tokens_per_device: the updates stay the same"),
    Flag("batch_eval_metrics", NEW, bool, False, NO_MEANING, _METRICS),
    Flag("bf16_full_eval", BOTH, bool, False, NO_MEANING, _FULL_EVAL),
    Flag("dataloader_in_order", NEW, bool, True, NO_MEANING, _LOADER),
    Flag("dataloader_multiprocessing_context", NEW, str | None, None, NO_MEANING, _LOADER,
         options={"choices": ["fork", "spawn", "forkserver"]}),
    Flag("dataloader_num_workers", BOTH, int, 0, NO_MEANING, _LOADER),
    Flag("dataloader_persistent_workers", BOTH, bool, False, NO_MEANING, _LOADER),
    Flag("dataloader_pin_memory", BOTH, bool, True, NO_MEANING, _LOADER),
    Flag("dataloader_prefetch_factor", NEW, int | None, None, NO_MEANING, _LOADER),
    Flag("dataset_name", SCRIPTS, str | None, None, ALIAS, "data_path"),
    Flag("ddp_backend", BOTH, str | None, None, NO_MEANING, _MESH,
         options={"choices": ["nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl"]}),
    Flag("ddp_broadcast_buffers", BOTH, bool | None, None, NO_MEANING, _MESH),
    Flag("ddp_bucket_cap_mb", BOTH, int | None, None, NO_MEANING, _MESH),
    Flag("ddp_find_unused_parameters", BOTH, bool | None, None, NO_MEANING, _MESH),
    Flag("ddp_static_graph", NEW, bool | None, None, NO_MEANING, _MESH),
    Flag("ddp_timeout", BOTH, int, 1800, NO_MEANING, _MESH),
    Flag("debug", BOTH, list[str], "", REFUSED, _DEBUG,
         options={"choices": ["underflow_overflow", "tpu_metrics_debug"]}),
    Flag("deepspeed", BOTH, str | None, None, NO_MEANING,
         "there is no DeepSpeed; --mesh divides the state over all devices. The file is read for settings that differ "
         "from the flags, a line each"),
    Flag("dispatch_batches", OLD, bool | None, None, REFUSED, _SPLIT, also=(False,)),
    Flag("do_eval", BOTH, bool, False, NO_MEANING, _SCRIPT),
    Flag("do_predict", BOTH, bool, False, NO_MEANING, "this command only trains; llama_jax.generate answers prompts"),
    Flag("do_train", BOTH, bool, False, NO_MEANING, _SCRIPT),
    Flag("enable_jit_checkpoint", NEW, bool, False, NO_MEANING, "SIGTERM always saves a checkpoint before the end"),
    Flag("eval_accumulation_steps", BOTH, int | None, None, NO_MEANING, _METRICS),
    Flag("eval_do_concat_batches", NEW, bool, True, NO_MEANING, _METRICS),
    Flag("eval_use_gather_object", NEW, bool, False, NO_MEANING, _METRICS),
    Flag("evaluation_strategy", OLD, str, "no", ALIAS, "eval_strategy", options={"choices": ["no", "steps", "epoch"]}),
    Flag("fp16", BOTH, bool, False, REFUSED, _FP16),
    Flag("fp16_backend", OLD, str, "auto", NO_MEANING, _APEX, options=_HALF),
    Flag("fp16_full_eval", BOTH, bool, False, NO_MEANING, _FULL_EVAL),
    Flag("fp16_opt_level", OLD, str, "O1", NO_MEANING, _APEX),
    Flag("fsdp", BOTH, str | None, None, NO_MEANING, _SHARDS, options={"nargs": "?", "const": "True"},
         differs="4.37's default: ''"),
    Flag("fsdp_config", BOTH, str | None, None, NO_MEANING, _SHARDS),
    Flag("fsdp_min_num_params", OLD, int, 0, NO_MEANING, _SHARDS),
    Flag("fsdp_transformer_layer_cls_to_wrap", OLD, str | None, None, NO_MEANING, _SHARDS),
    Flag("gradient_checkpointing_kwargs", BOTH, str | None, None, NO_MEANING, _KEPT),
    Flag("group_by_length", OLD, bool, False, ALIAS, "train_sampling_strategy group_by_length"),
    Flag("half_precision_backend", OLD, str, "auto", NO_MEANING, _APEX, options=_HALF),
    Flag("hub_always_push", BOTH, bool, False, NO_MEANING, _HUB),
    Flag("hub_model_id", BOTH, str | None, None, NO_MEANING, _HUB),
    Flag("hub_revision", NEW, str | None, None, NO_MEANING, _HUB),
    Flag("hub_strategy", BOTH, str, "every_save", NO_MEANING, _HUB,
         options={"choices": ["end", "every_save", "checkpoint", "all_checkpoints"]}),
    Flag("hub_token", BOTH, str | None, None, NO_MEANING, _HUB),
    Flag("ignore_data_skip", BOTH, bool, False, REFUSED,
         "a resumed run goes on with the next examples; leave it out"),
    Flag("include_for_metrics", NEW, list[str], [], NO_MEANING, _METRICS),
    Flag("include_inputs_for_metrics", OLD, bool, False, NO_MEANING, _METRICS),
    Flag("include_tokens_per_second", OLD, bool, False, REFUSED,
         "4.37 counts in an extra pass, which changes the examples' order; leave it out: the rate is always printed"),
    Flag("jit_mode_eval", OLD, bool, False, NO_MEANING, _COMPILE),
    Flag("label_names", BOTH, list[str] | None, None, REFUSED,
         "the labels are the key 'labels' of the records; rename it there and leave this out", also=("labels",)),
    Flag("length_column_name", BOTH, str, "length", NO_MEANING, "lengths are counted from the token ids"),
    Flag("liger_kernel_config", NEW, str | None, None, NO_MEANING, _COMPILE),
    Flag("local_rank", BOTH, int, -1, NO_MEANING, _RANK),
    Flag("log_level_replica", BOTH, str, "warning", NO_MEANING, _LOG, options=_LEVELS),
    Flag("log_on_each_node", BOTH, bool, True, NO_MEANING, _LOG),
    Flag("loggingdir", HERE, str | None, None, ALIAS, "logging_dir"),
    Flag("mp_parameters", OLD, str, "", NO_MEANING, "a setting of SageMaker's launcher"),
    Flag("neftune_noise_alpha", BOTH, float | None, None, REFUSED,
         "noise on the embeddings is not there; leave it out"),
    Flag("no_cuda", OLD, bool, False, ALIAS, "use_cpu"),
    Flag("optim_args", BOTH, str | None, None, REFUSED,
         "no optimizer here takes further arguments; leave it out, or give --adam_beta1, --adam_beta2 or "
         "--adam_epsilon"),
    Flag("optim_target_modules", NEW, str | None, None, REFUSED,
         "only GaLore and APOLLO use it, which are not there; leave it out"),
    Flag("parallelism_config", NEW, str | None, None, REFUSED,
         "leave it out and give --mesh, the layout of all devices"),
    Flag("past_index", OLD, int, -1, REFUSED, "batches share no state; leave it out"),
    Flag("per_gpu_eval_batch_size", OLD, int | None, None, ALIAS, "per_device_eval_batch_size"),
    Flag("per_gpu_train_batch_size", OLD, int | None, None, ALIAS, "per_device_train_batch_size"),
    Flag("prediction_loss_only", BOTH, bool, False, NO_MEANING, _METRICS),
    Flag("push_to_hub", BOTH, bool, False, REFUSED,
         "nothing is uploaded; leave it out and upload OUTPUT_DIR when the run is done"),
    Flag("push_to_hub_model_id", OLD, str | None, None, NO_MEANING, _HUB),
    Flag("push_to_hub_organization", OLD, str | None, None, NO_MEANING, _HUB),
    Flag("push_to_hub_token", OLD, str | None, None, NO_MEANING, _HUB),
    Flag("ray_scope", OLD, str, "last", NO_MEANING, "there is no hyperparameter search"),
    Flag("remove_unused_columns", BOTH, bool, True, NO_MEANING, "other keys of the records are never used"),
    Flag("restore_callback_states_from_checkpoint", NEW, bool, False, NO_MEANING, "there are no callbacks"),
    Flag("save_on_each_node", BOTH, bool, False, NO_MEANING, "each host writes its own share of a checkpoint"),
    Flag("save_only_model", BOTH, bool, False, REFUSED,
         "a checkpoint always holds the optimizer state; leave it out; --save_total_limit 1 saves disk"),
    Flag("save_safetensors", OLD, bool, True, REFUSED, "weights are written as safetensors only; leave it out"),
    Flag("skip_memory_metrics", BOTH, bool, True, NO_MEANING, "the peak of device memory is always printed"),
    Flag("split_batches", OLD, bool, False, REFUSED, _SPLIT),
    Flag("torch_compile", BOTH, bool, False, NO_MEANING, _COMPILE),
    Flag("torch_compile_backend", BOTH, str | None, None, NO_MEANING, _COMPILE),
    Flag("torch_compile_mode", BOTH, str | None, None, NO_MEANING, _COMPILE),
    Flag("torch_empty_cache_steps", NEW, int | None, None, NO_MEANING, "there is no torch, and no cache of torch"),
    Flag("torchdynamo", OLD, str | None, None, NO_MEANING, _COMPILE),
    Flag("tpu_metrics_debug", OLD, bool, False, REFUSED, _DEBUG),
    Flag("tpu_num_cores", OLD, int | None, None, NO_MEANING, _MESH),
    Flag("train_file", SCRIPTS, str | None, None, ALIAS, "data_path"),
    Flag("use_cache", NEW, bool, False, NO_MEANING, "training keeps no cache, and config.json keeps its own use_cache"),
    Flag("use_ipex", OLD, bool, False, NO_MEANING, _COMPILE),
    Flag("use_legacy_prediction_loop", OLD, bool, False, REFUSED,
         "averages eval_loss differently; leave it out"),
    Flag("use_liger_kernel", NEW, bool, False, NO_MEANING, _COMPILE),
    Flag("use_mps_device", OLD, bool, False, REFUSED, "there is no MPS backend; leave it out or use --use_cpu True"),
    Flag("validation_file", SCRIPTS, str | None, None, ALIAS, "eval_data_path"),
)

# The values of --optim in either version that are not implemented: the read ones with the optimizer that they mean.
_READ_AS = {
    "adamw_torch_fused": (BOTH, "adamw_torch"),
    "adamw_torch_xla": (BOTH, "adamw_torch"),
    "adamw_torch_npu_fused": (BOTH, "adamw_torch"),
    "adamw_apex_fused": (OLD, "adamw_torch"),
    "paged_adamw_32bit": (BOTH, "adamw_torch"),
    "adamw_bnb_8bit": (BOTH, "adamw_8bit"),
    "paged_adamw_8bit": (BOTH, "adamw_8bit"),
    "paged_lion_32bit": (BOTH, "lion_32bit"),
}
_NOT_THERE = {
    OLD: "adamw_hf",
    BOTH: "adamw_anyprecision lion_8bit paged_lion_8bit adagrad rmsprop",
    NEW: "adamw_torch_4bit adamw_torch_8bit ademamix ademamix_8bit paged_ademamix_32bit paged_ademamix_8bit "
    "rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit galore_adamw galore_adamw_8bit galore_adafactor "
    "galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise apollo_adamw apollo_adamw_layerwise "
    "lomo adalomo grokadamw schedule_free_radam schedule_free_adamw schedule_free_sgd stable_adamw",
}
# Every value of --optim in either version -> versions, status, and the text or the optimizer that is meant or to use.
OPTIMIZERS: dict[str, tuple[str, str, str]] = {
    **{name: (BOTH, IMPLEMENTED, text) for name, text in IMPLEMENTED_OPTIMIZERS.items()},
    **{name: (versions, ALIAS, meant) for name, (versions, meant) in _READ_AS.items()},
    **{name: (v, REFUSED, "") for v, names in _NOT_THERE.items() for name in names.split()},
}

# Names that people type -> the flag of that meaning, or advice.
_PLAIN_NAMES = {
    "--model_name_or_path": "model model_name model_path base_model pretrained_model_name_or_path",
    "--data_path": "data dataset dataset_path data_file train_data",
    "--eval_data_path": "eval_data eval_dataset eval_file val_data validation_data",
    "--validation_split_percentage": "val_set_size validation_split test_size",
    "--model_max_length": "max_length max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len block_size "
    "context_length",
    "--output_dir": "output out out_dir output_path save_dir",
    "--num_train_epochs": "epochs epoch num_epochs n_epochs",
    "--max_steps": "steps num_steps train_steps max_train_steps",
    "--per_device_train_batch_size": "batch_size train_batch_size micro_batch_size per_device_batch_size bs",
    "--per_device_eval_batch_size": "eval_batch_size",
    "--gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation grad_accumulation_steps "
    "accumulation_steps accum_steps",
    "--learning_rate": "lr peak_lr",
    "--lr_scheduler_type": "lr_scheduler lr_schedule scheduler scheduler_type",
    "--warmup_steps or --warmup_ratio": "warmup num_warmup_steps",
    "--optim": "optimizer optimizer_type",
    "--weight_decay": "wd decay",
    "--max_grad_norm": "grad_clip gradient_clip gradient_clipping clip_grad_norm",
    "--logging_steps": "log_steps log_interval log_every",
    "--resume_from_checkpoint": "resume checkpoint resume_from",
    "--packing": "sample_packing pack",
    "--attention, which takes the device's best kernel by default": "attn_implementation flash_attention flash_attn "
    "use_flash_attention use_flash_attn use_flash_attention_2",
    "--bf16 True for matmuls in bfloat16, or --dtype for the parameters": "torch_dtype precision mixed_precision half "
    "bfloat16",
    "--mesh to lay out the devices: all are used, of GPUs those in CUDA_VISIBLE_DEVICES": "gpus gpu gpu_ids n_gpu "
    "n_gpus num_gpus num_devices devices device nproc_per_node tensor_parallel tensor_parallel_size tp",
    "--load_in_4bit True or --load_in_8bit True, with --use_peft True": "quantization quantize bits qlora "
    "quantization_bit use_qlora",
    "--use_peft True, with --lora_r and --lora_alpha": "lora adapter peft use_lora adapters lora_rank",
    "--report_to wandb, and the variable WANDB_PROJECT": "wandb use_wandb wandb_project",
    "--report_to": "tensorboard tracker trackers tracking log_with logger loggers",
}
_MEANT = {name: advice for advice, names in _PLAIN_NAMES.items() for name in names.split()}

# The differences from the Trainer that stay, with the reason: one paragraph each in docs/flags.md.
DIFFERENCES = (
    "Under `--hf_compat 5` the exported `config.json` and `generation_config.json` get the tokenizer's bos, eos and "
    "pad ids, as the Trainer of 5 aligns them, also where the data is tokenized already. Under 4.37 they stay as they "
    "are; a warning tells where generation would not stop at the eos that is trained.",
    "All flags of both versions are accepted under either `--hf_compat`. A value that only one version has (a schedule "
    "of 5, for example) may still be refused under the other.",
    "A flag may be shortened to a prefix that no other flag has. Since the flags of both versions are known here, some "
    "prefixes that one Trainer takes are ambiguous and refused; no prefix ever means another flag.",
    "`--load_best_model_at_end` with shares: `--save_steps` and `--eval_steps` are compared as typed decimals. By "
    "rounding, 4.37 refuses 0.3 with 0.1, and 5 refuses 0.07 with 0.01. A share with a number of updates is always "
    "refused; the Trainer accepts some pairs (save 500, eval 0.5).",
    "`--logging_steps`, `--eval_steps` and `--save_steps` below 0, `--save_steps 0`, a `--warmup_steps` above 1 that "
    "is not whole, and numbers that are not finite are refused. The Trainer accepts them, with unintended effects.",
    "`--save_strategy best` without `--eval_strategy` is refused: no checkpoint would ever be saved.",
    "Under `--hf_compat 4.37`, trackers get 4.37's log lines through the callbacks of the installed transformers 5. So "
    "wandb keeps the last line's entries as a summary, and settings have the names of 5.",
    "4.37's default of `--report_to`, all installed trackers, holds only where `--hf_compat 4.37` is given, and leaves "
    "out those that would ask for a login. A tracker that fails is left out with a line, where the Trainer stops. "
    "`skipped_updates` is reported too.",
    "`--optim paged_adamw_32bit` and `adamw_8bit` decay before the step, as torch and bitsandbytes on a CPU. Its CUDA "
    "kernels decay after it, a difference of `learning_rate` squared times the decay. `lion_32bit` decays apart from "
    "the gradient; bitsandbytes does so only after 0.49.2.",
    "`--optim adamw_8bit` rounds to the nearest code and keeps the sign of a negative first moment, as bitsandbytes' "
    "CUDA kernels. Its CPU build takes codes from a coarser table. 5 keeps the moments of embeddings in 32 bits; 4.37 "
    "means to and does not. A gradient of NaN, under `--on_nonfinite continue`, spreads to its block's moments.",
    "`--weight_decay` under 4.37 applies to the norms of Mistral, Qwen and other sister models too, as in its Trainer, "
    "which exempts LLaMA's norms by their class. 4.37's default attention ignores Mistral's sliding window; here the "
    "window is applied, as by 5.",
    "The Trainer's checks of flags without meaning here are not made.",
    "A token inside a text that equals the pad token (`<unk>`, where the tokenizer pads with it) is attended to like "
    "any other token. stanford_alpaca's collator derives its mask from the ids, so that later tokens do not see it.",
    "Arguments of a tool call that are a string of JSON become an object where the chat template needs one, as in "
    "vLLM. transformers' `apply_chat_template` writes them as a string inside a string.",
    "A resumed run continues exactly as the uninterrupted run would have. The Trainer's does not always: 4.37 takes "
    "other examples in the middle of a later epoch, or with a tail that carries over; so does 5 with "
    "`group_by_length`.",
    "A resumed run takes `--learning_rate`, `--weight_decay`, `--adam_beta1`, `--adam_beta2` and `--adam_epsilon` from "
    "the command line, as all flags, and warns of each change. The Trainer goes on with the checkpoint's values of "
    "these five; schedule, warm-up and `--max_grad_norm` are the command line's there too.",
    "Token ids are those of the AutoTokenizer of the version in `--hf_compat`. For 4.37, a bare `tokenizer.model` runs "
    "in sentencepiece (`use_fast=False`, as in stanford_alpaca); transformers 5 splits some runs of spaces otherwise.",
    "A row for a token that a file names past the model's rows starts as the mean of the others; the Trainer draws it. "
    "Where the ids of the files have a gap, 4.37 may give `[PAD]` the id of another token; here it gets a free id.",
    "A record of `text` that begins with bos, or ends with eos, keeps one of each, though the tokenizer adds another.",
    "Pads of records of `input_ids`, marked by `attention_mask` 0 at either end, are removed, so that "
    "`group_by_length` and token counts go without them. The label of the first token after pads is not trained; the "
    "Trainer predicts the label from the last pad.",
    "`dynamic` rope scaling depends on the length of a micro-batch. In transformers it depends on the longest length "
    "so far, so that a loss depends on earlier batches (5 resets after a batch within the original context).",
    "4.37's order is that of accelerate 0.26 and 0.27; accelerate 0.24 and 0.25 gave 4.37 the order of 5. With "
    "`--dataloader_persistent_workers True` and workers, 4.37 draws one random number less an epoch; here the order "
    "stays.",
    "A NaN that `--logging_nan_inf_filter` replaces: with several devices and several updates a log line, each device "
    "starts from the mean over devices instead of its own sum. Only the logged loss differs.",
)
# fmt: on


# Each alias -> the flag that is meant, and its value where that is fixed.
ALIASES = {
    flag.name: (target, fixed)
    for flag in FLAGS
    if flag.status == ALIAS
    for target, _, fixed in [flag.text.partition(" ")]
}


def overridden(name: str, given: set[str]) -> bool:
    """Return whether one of the `given` flags sets the same value as the flag `name` under another name."""
    targets = {target for target, fixed in (ALIASES.get(g, (g, "")) for g in given) if not fixed}
    return name not in given and ALIASES.get(name, (name, ""))[0] in targets


def _field(flag: Flag) -> tuple[str, Any, Any]:
    metadata = {"help": f"{flag.status}: {flag.text}", **(flag.options or {})}
    if flag.name in ALIASES and flag.type is str:  # None, so that a given default differs from no flag at all
        return flag.name, str | None, dataclasses.field(default=None, metadata=metadata)
    if isinstance(flag.default, list):
        return flag.name, flag.type, dataclasses.field(default_factory=list, metadata=metadata)
    return flag.name, flag.type, dataclasses.field(default=flag.default, metadata=metadata)


# One field a flag, of the Trainer's own type, for HfArgumentParser's grammar.
OtherFlags = dataclasses.make_dataclass("OtherFlags", [_field(flag) for flag in FLAGS])


def read_others(others: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the values that aliases set, by field of `Arguments`, and the lines to print. Raises InputError."""
    meant: dict[str, Any] = {}
    lines = []
    for flag in FLAGS:
        value = getattr(others, flag.name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if flag.name in ALIASES and value != getattr(OtherFlags, flag.name):
            target, fixed = ALIASES[flag.name]
            meant[target] = fixed or value
        if value in (None, "", [], flag.default, *flag.also):
            continue
        if flag.status == REFUSED:
            raise InputError(flag.note())
        if flag.name.endswith(("_kwargs", "_config", "deepspeed")) and value.startswith("{"):
            read_json(flag.name, value)
        lines.append(flag.note())
    return meant, lines


def suggest_flag(name: str, near: Iterable[str] = (), among: Iterable[str] = ()) -> str:
    """Return the advice for an unknown name: the flag of that meaning, else all of `near`, else the nearest `among`.

    The advice is empty where nothing resembles the name.
    """
    import difflib  # here, because --help does without

    name = name.lower().replace("-", "_")
    if name in _MEANT:
        return f"use {_MEANT[name]}"
    if near:
        return f"could mean {' or '.join(near)}"
    matches = difflib.get_close_matches(name, among, n=1)
    return f"did you mean {matches[0]}?" if matches else ""


def resolve_optimizer(name: str) -> tuple[str, list[str]]:
    """Return the optimizer meant by `--optim name`, and the line to print for an alias. Raises InputError."""
    _, status, text = OPTIMIZERS.get(name, (BOTH, REFUSED, ""))
    if status == REFUSED:
        raise InputError(f"--optim {name}: not there; use {_nearest_optimizer(name)}")
    if status == IMPLEMENTED:
        return name, []
    paged = "; for a state in the host's memory there is --offload_optimizer True" if name.startswith("paged_") else ""
    return text, [f"--optim {name}: read as {text}{paged}"]


def _nearest_optimizer(name: str) -> str:
    """Return an implemented optimizer of the same family, else of a similar name, else AdamW."""
    import difflib

    family = [known for known in IMPLEMENTED_OPTIMIZERS if known.partition("_")[0] in name]
    (nearest,) = (family or difflib.get_close_matches(name, IMPLEMENTED_OPTIMIZERS, n=1) or ["adamw_torch"])[:1]
    return nearest + (", or adamw_8bit for a smaller state" if "4bit" in name or "8bit" in name else "")


def read_json(name: str, text: str) -> dict[str, Any]:
    """Read the JSON object in a flag, or in the file that the flag names. Raises InputError."""
    where = f"--{name}" if text.startswith("{") else f"--{name} {text}"
    try:
        data = text.encode() if text.startswith("{") else read_small(Path(os.path.expanduser(text)))
        value = parse_json(data, where)
    except InputError as e:
        given = str(e) if str(e).startswith(where) else f"{where}: {e}"
        raise InputError(f"{given}; give a JSON object, or a file that holds it") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: should be a JSON object, as {{}}")
    return value
