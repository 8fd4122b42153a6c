"""The flags of `transformers.TrainingArguments` (4.37.2 and 5.24) that are not fields of `Arguments`.

Each is accepted and either read as another flag, or without meaning here and said in one line, or refused with the
reason and the mend. Nothing is said of a flag that has the Trainer's own default.
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.base.errors import InputError

BOTH, OLD, NEW, ALPACA, HERE = "both", "4.37", "5", "alpaca", "here"
IMPLEMENTED, ALIAS, NO_MEANING, REFUSED = "implemented", "alias", "no meaning", "refused"


class Flag(NamedTuple):
    """One flag. `text` says why; of an alias, it is the flag that is meant, and its value where that is another."""

    name: str
    versions: str
    type: Any
    default: Any
    status: str
    text: str
    also: tuple[Any, ...] = ()  # further values that mean the default
    options: dict[str, Any] | None = None  # argparse's
    differs: str = ""  # a default of one version that differs

    def said(self) -> str:
        if self.status == ALIAS:
            return f"--{self.name}: read as --{self.text}"
        return f"--{self.name}: " + (f"no meaning here: {self.text}" if self.status == NO_MEANING else self.text)


_LEVELS = {"choices": ["detail", "debug", "info", "warning", "error", "critical", "passive"]}
_HALF = {"choices": ["auto", "apex", "cpu_amp"]}
_MESH = "one program runs on all devices; there are no ranks to launch"
_LOADER = "there is no DataLoader; batches are planned ahead"
_METRICS = "an evaluation computes the loss alone, and keeps no outputs"
_HUB = "nothing is uploaded; OUTPUT_DIR holds the HF folder"
_TRACKERS = "there are no trackers; the log is in trainer_state.json"
_BOARD = "there is no TensorBoard; the log is in trainer_state.json"
_COMPILE = "XLA compiles every step"
_APEX = "a setting of --fp16; there is no loss scaling here"
_LOG = "no log of transformers or torch is printed"
_SCRIPT = "this command always trains; --eval_strategy says when it evaluates"
_SHARDS = "shards come from the device mesh; torch's FSDP is not used"
_FP16 = "float16 needs loss scaling, which is not there; use --bf16 True"
_DEBUG = "these reports are torch's; leave it out and set JAX_DEBUG_NANS=True, which stops at the first NaN"
_KEPT = "what the backward pass recomputes is decided by --gradient_checkpointing alone; results are the same"
_SPLIT = "would deal other examples to the devices; leave it out and give --per_device_train_batch_size"

# fmt: off
FLAGS = (
    Flag("accelerator_config", NEW, str | None, None, REFUSED,
         "batches are dealt as accelerate does by default; leave it out"),
    Flag("activation_checkpointing", NEW, bool | None, None, ALIAS, "gradient_checkpointing",
         options={"nargs": "?", "const": True}),
    Flag("activation_checkpointing_kwargs", NEW, str | None, None, NO_MEANING, _KEPT),
    Flag("adafactor", OLD, bool, False, ALIAS, "optim adafactor"),
    Flag("auto_find_batch_size", BOTH, bool, False, NO_MEANING,
         "the batch never shrinks; lower --max_tokens_per_device where memory is short, the updates stay the same"),
    Flag("batch_eval_metrics", NEW, bool, False, NO_MEANING, _METRICS),
    Flag("bf16_full_eval", BOTH, bool, False, NO_MEANING,
         "the Trainer casts for evaluations outside training, and here all are made during it"),
    Flag("dataloader_in_order", NEW, bool, True, NO_MEANING, _LOADER),
    Flag("dataloader_multiprocessing_context", NEW, str | None, None, NO_MEANING, _LOADER,
         options={"choices": ["fork", "spawn", "forkserver"]}),
    Flag("dataloader_num_workers", BOTH, int, 0, NO_MEANING, _LOADER),
    Flag("dataloader_persistent_workers", BOTH, bool, False, NO_MEANING, _LOADER),
    Flag("dataloader_pin_memory", BOTH, bool, True, NO_MEANING, _LOADER),
    Flag("dataloader_prefetch_factor", NEW, int | None, None, NO_MEANING, _LOADER),
    Flag("ddp_backend", BOTH, str | None, None, NO_MEANING, _MESH,
         options={"choices": ["nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl"]}),
    Flag("ddp_broadcast_buffers", BOTH, bool | None, None, NO_MEANING, _MESH),
    Flag("ddp_bucket_cap_mb", BOTH, int | None, None, NO_MEANING, _MESH),
    Flag("ddp_find_unused_parameters", BOTH, bool | None, None, NO_MEANING, _MESH),
    Flag("ddp_static_graph", NEW, bool | None, None, NO_MEANING, _MESH),
    Flag("ddp_timeout", BOTH, int, 1800, NO_MEANING, _MESH),
    Flag("debug", BOTH, list[str], "", REFUSED, _DEBUG,
         options={"choices": ["underflow_overflow", "tpu_metrics_debug"]}),
    Flag("deepspeed", BOTH, str | None, None, NO_MEANING, "there is no DeepSpeed; its file is not read"),
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
    Flag("fp16_full_eval", BOTH, bool, False, NO_MEANING,
         "the Trainer casts for evaluations outside training, and here all are made during it"),
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
    Flag("hub_private_repo", BOTH, bool, False, NO_MEANING, _HUB, differs="5's default: None"),
    Flag("hub_revision", NEW, str | None, None, NO_MEANING, _HUB),
    Flag("hub_strategy", BOTH, str, "every_save", NO_MEANING, _HUB,
         options={"choices": ["end", "every_save", "checkpoint", "all_checkpoints"]}),
    Flag("hub_token", BOTH, str | None, None, NO_MEANING, _HUB),
    Flag("ignore_data_skip", BOTH, bool, False, REFUSED,
         "a resumed run always goes on with the examples that are next; leave it out"),
    Flag("include_for_metrics", NEW, list[str], [], NO_MEANING, _METRICS),
    Flag("include_inputs_for_metrics", OLD, bool, False, NO_MEANING, _METRICS),
    Flag("include_tokens_per_second", OLD, bool, False, REFUSED,
         "4.37 counts the tokens in a pass of its own, which moves the order of the examples; leave it out, the tokens "
         "per second are printed anyway"),
    Flag("jit_mode_eval", OLD, bool, False, NO_MEANING, _COMPILE),
    Flag("label_names", BOTH, list[str] | None, None, REFUSED,
         "the labels are the key 'labels' of the records; rename it there and leave this out", also=("labels",)),
    Flag("length_column_name", BOTH, str, "length", NO_MEANING, "lengths are counted from the token ids"),
    Flag("liger_kernel_config", NEW, str | None, None, NO_MEANING, _COMPILE),
    Flag("local_rank", BOTH, int, -1, NO_MEANING, _MESH),
    Flag("log_level", BOTH, str, "passive", NO_MEANING, _LOG, options=_LEVELS),
    Flag("log_level_replica", BOTH, str, "warning", NO_MEANING, _LOG, options=_LEVELS),
    Flag("log_on_each_node", BOTH, bool, True, NO_MEANING, _LOG),
    Flag("logging_dir", OLD, str | None, None, NO_MEANING, _BOARD),
    Flag("loggingdir", HERE, str | None, None, ALIAS, f"logging_dir, which has no meaning here: {_BOARD}"),
    Flag("mp_parameters", OLD, str, "", NO_MEANING, "a setting of SageMaker's launcher"),
    Flag("neftune_noise_alpha", BOTH, float | None, None, REFUSED,
         "noise on the embeddings is not there; leave it out"),
    Flag("no_cuda", OLD, bool, False, ALIAS, "use_cpu"),
    Flag("optim_args", BOTH, str | None, None, REFUSED,
         "no optimizer here takes further arguments; leave it out and give --adam_beta1, --adam_beta2 or "
         "--adam_epsilon where they are meant"),
    Flag("optim_target_modules", NEW, str | None, None, REFUSED,
         "only GaLore and APOLLO take it, which are not there; leave it out"),
    Flag("parallelism_config", NEW, str | None, None, REFUSED,
         "leave it out and give --mesh, which lays out all devices"),
    Flag("past_index", OLD, int, -1, REFUSED, "no state is carried from one batch to the next; leave it out"),
    Flag("per_gpu_eval_batch_size", OLD, int | None, None, ALIAS, "per_device_eval_batch_size"),
    Flag("per_gpu_train_batch_size", OLD, int | None, None, ALIAS, "per_device_train_batch_size"),
    Flag("prediction_loss_only", BOTH, bool, False, NO_MEANING, _METRICS),
    Flag("project", NEW, str, "huggingface", NO_MEANING, _TRACKERS),
    Flag("push_to_hub", BOTH, bool, False, REFUSED,
         "nothing is uploaded; leave it out and upload OUTPUT_DIR when the run is done"),
    Flag("push_to_hub_model_id", OLD, str | None, None, NO_MEANING, _HUB),
    Flag("push_to_hub_organization", OLD, str | None, None, NO_MEANING, _HUB),
    Flag("push_to_hub_token", OLD, str | None, None, NO_MEANING, _HUB),
    Flag("ray_scope", OLD, str, "last", NO_MEANING, "there is no hyperparameter search"),
    Flag("remove_unused_columns", BOTH, bool, True, NO_MEANING, "other keys of the records are never used"),
    Flag("report_to", BOTH, list[str], "none", NO_MEANING,
         _TRACKERS, also=("None",), differs="4.37's default: None, which means all that are installed"),
    Flag("restore_callback_states_from_checkpoint", NEW, bool, False, NO_MEANING, "there are no callbacks"),
    Flag("run_name", BOTH, str | None, None, NO_MEANING, _TRACKERS),
    Flag("save_on_each_node", BOTH, bool, False, NO_MEANING, "each host writes its own share of a checkpoint"),
    Flag("save_only_model", BOTH, bool, False, REFUSED,
         "a checkpoint holds all that resuming needs, and the HF folder is written at the end; leave it out, and give "
         "--save_strategy no or --save_total_limit 1 to save disk"),
    Flag("save_safetensors", OLD, bool, True, REFUSED, "weights are written as safetensors only; leave it out"),
    Flag("skip_memory_metrics", BOTH, bool, True, NO_MEANING, "the peak of device memory is always printed"),
    Flag("split_batches", OLD, bool, False, REFUSED, _SPLIT),
    Flag("torch_compile", BOTH, bool, False, NO_MEANING, _COMPILE),
    Flag("torch_compile_backend", BOTH, str | None, None, NO_MEANING, _COMPILE),
    Flag("torch_compile_mode", BOTH, str | None, None, NO_MEANING, _COMPILE),
    Flag("torch_empty_cache_steps", NEW, int | None, None, NO_MEANING, "there is no torch, and so no cache of its"),
    Flag("torchdynamo", OLD, str | None, None, NO_MEANING, _COMPILE),
    Flag("tpu_metrics_debug", OLD, bool, False, REFUSED, _DEBUG),
    Flag("tpu_num_cores", OLD, int | None, None, NO_MEANING, _MESH),
    Flag("trackio_bucket_id", NEW, str | None, None, NO_MEANING, _TRACKERS),
    Flag("trackio_space_id", NEW, str | None, None, NO_MEANING, _TRACKERS),
    Flag("trackio_static_space_id", NEW, str | None, None, NO_MEANING, _TRACKERS),
    Flag("use_cache", NEW, bool, False, NO_MEANING, "training keeps no cache, and config.json keeps its own use_cache"),
    Flag("use_ipex", OLD, bool, False, NO_MEANING, _COMPILE),
    Flag("use_legacy_prediction_loop", OLD, bool, False, REFUSED,
         "it averages eval_loss in another way; leave it out"),
    Flag("use_liger_kernel", NEW, bool, False, NO_MEANING, _COMPILE),
    Flag("use_mps_device", OLD, bool, False, REFUSED, "there is no MPS backend; leave it out or use --use_cpu True"),
)

_BITS = "quantized state; use adamw_torch, or --dtype bfloat16 for a smaller state"
_LOW_RANK = "low-rank gradients of its own library; use adamw_torch or adafactor"
_OWN = "an algorithm of its own library; use adamw_torch"
_LAYERWISE = "updates layer by layer during the backward pass; use adafactor"
_SAME = "adamw_torch"

# Every value of --optim in either version: of an alias, the text is the optimizer that is meant.
OPTIMIZERS: dict[str, tuple[str, str, str]] = {
    "adamw_torch": (BOTH, IMPLEMENTED, "AdamW: decay apart from the gradient"),
    "sgd": (BOTH, IMPLEMENTED, "plain gradient descent, without momentum"),
    "adafactor": (BOTH, IMPLEMENTED, "the Trainer's settings: no relative step, no scaling by the parameter"),
    "lion_32bit": (BOTH, IMPLEMENTED, "Lion"),
    "adamw_torch_fused": (BOTH, ALIAS, _SAME),
    "adamw_torch_xla": (BOTH, ALIAS, _SAME),
    "adamw_torch_npu_fused": (BOTH, ALIAS, _SAME),
    "adamw_apex_fused": (OLD, ALIAS, _SAME),
    "paged_adamw_32bit": (BOTH, ALIAS, _SAME),
    "paged_lion_32bit": (BOTH, ALIAS, "lion_32bit"),
    "adamw_hf": (OLD, REFUSED, "a deprecated AdamW with another epsilon and a decay after the update; use adamw_torch"),
    "adamw_anyprecision": (BOTH, REFUSED, "needs torchdistx, and sums with compensation; use adamw_torch"),
    "adamw_torch_4bit": (NEW, REFUSED, _BITS),
    "adamw_torch_8bit": (NEW, REFUSED, _BITS),
    "adamw_bnb_8bit": (BOTH, REFUSED, _BITS),
    "adamw_8bit": (BOTH, REFUSED, _BITS),
    "paged_adamw_8bit": (BOTH, REFUSED, _BITS),
    "lion_8bit": (BOTH, REFUSED, "quantized state; use lion_32bit"),
    "paged_lion_8bit": (BOTH, REFUSED, "quantized state; use lion_32bit"),
    "ademamix": (NEW, REFUSED, _OWN),
    "ademamix_8bit": (NEW, REFUSED, _BITS),
    "paged_ademamix_32bit": (NEW, REFUSED, _OWN),
    "paged_ademamix_8bit": (NEW, REFUSED, _BITS),
    "adagrad": (BOTH, REFUSED, "not there; use sgd or adamw_torch"),
    "rmsprop": (BOTH, REFUSED, "not there; use adamw_torch"),
    "rmsprop_bnb": (NEW, REFUSED, "not there; use adamw_torch"),
    "rmsprop_bnb_8bit": (NEW, REFUSED, _BITS),
    "rmsprop_bnb_32bit": (NEW, REFUSED, "not there; use adamw_torch"),
    "galore_adamw": (NEW, REFUSED, _LOW_RANK),
    "galore_adamw_8bit": (NEW, REFUSED, _LOW_RANK),
    "galore_adafactor": (NEW, REFUSED, _LOW_RANK),
    "galore_adamw_layerwise": (NEW, REFUSED, _LOW_RANK),
    "galore_adamw_8bit_layerwise": (NEW, REFUSED, _LOW_RANK),
    "galore_adafactor_layerwise": (NEW, REFUSED, _LOW_RANK),
    "apollo_adamw": (NEW, REFUSED, _LOW_RANK),
    "apollo_adamw_layerwise": (NEW, REFUSED, _LOW_RANK),
    "lomo": (NEW, REFUSED, _LAYERWISE),
    "adalomo": (NEW, REFUSED, _LAYERWISE),
    "grokadamw": (NEW, REFUSED, _OWN),
    "schedule_free_radam": (NEW, REFUSED, _OWN),
    "schedule_free_adamw": (NEW, REFUSED, _OWN),
    "schedule_free_sgd": (NEW, REFUSED, _OWN),
    "stable_adamw": (NEW, REFUSED, _OWN),
}

# What stays other than in the Trainer, with the reason: one paragraph each, in docs/flags.md.
DIFFERENCES = (
    "All flags of both versions are accepted under either `--hf_compat`; a value that only one version has (as a "
    "schedule of 5) may still be refused under the other.",
    "A flag may be shortened to a prefix that no other flag has. As both versions' flags are known here, some prefixes "
    "that one Trainer takes are ambiguous and refused; none ever means another flag.",
    "`--load_best_model_at_end` with shares: `--save_steps` and `--eval_steps` are compared as the decimals that were "
    "typed. 4.37 refuses 0.3 with 0.1, and 5 refuses 0.07 with 0.01, both by rounding. A share with a number of "
    "updates is always refused; the Trainer lets some pass (save 500, eval 0.5).",
    "`--logging_steps`, `--eval_steps` and `--save_steps` below 0, `--save_steps 0`, a `--warmup_steps` above 1 that "
    "is not whole, and numbers that are not finite are refused; the Trainer takes them and does something unmeant.",
    "`--save_strategy best` without `--eval_strategy` is refused: it would never save.",
    "`--report_to` without a value means none under 4.37 too, where the Trainer means all that are installed.",
    "`--optim paged_adamw_32bit` is refused with `--weight_decay`: bitsandbytes decays after the update, torch before. "
    "`lion_32bit` decays apart from the gradient; bitsandbytes does so only after 0.49.2.",
    "The Trainer's checks of flags that have no meaning here are not made.",
    "A token inside a text that is also the pad token, as `<unk>` where that pads, is attended to like any other. "
    "stanford_alpaca's collator makes its mask from the ids, so that the tokens after such a one do not see it.",
    "A resumed run goes on exactly as the run that was not stopped would have. The Trainer's own does not always: 4.37 "
    "in the middle of a later epoch, or with a tail that carries over, takes other examples; so does 5 with "
    "`group_by_length`.",
    "`dynamic` rope scaling goes by the length of a micro-batch; transformers' goes by the longest that it has seen: "
    "there a batch's loss depends on those before it (5 forgets once a batch is within the original context).",
    "4.37's order is that of accelerate 0.26 and 0.27; accelerate 0.24 and 0.25 gave it 5's. With "
    "`--dataloader_persistent_workers True` and workers, 4.37 draws once less an epoch; here the order stays.",
    "A NaN that `--logging_nan_inf_filter` replaces: with several devices and several updates a log line, each device "
    "starts from the mean over devices instead of its own sum. Only the logged loss is touched.",
)
# fmt: on


# Of each alias the flag that is meant, and its value where that is another.
ALIASES = {
    flag.name: (target, fixed)
    for flag in FLAGS
    if flag.status == ALIAS and flag.versions != HERE
    for target, _, fixed in [flag.text.partition(" ")]
}


def overridden(name: str, given: set[str]) -> bool:
    """Whether what the flag of this name says is said by one of the given flags under another name."""
    said = {target for target, fixed in (ALIASES.get(g, (g, "")) for g in given) if not fixed}
    return name not in given and ALIASES.get(name, (name, ""))[0] in said


def _field(flag: Flag) -> tuple[str, Any, Any]:
    metadata = {"help": f"{flag.status}: {flag.text}", **(flag.options or {})}
    if flag.name in ALIASES and flag.type is str:  # so that its default, given, is told from none
        return flag.name, str | None, dataclasses.field(default=None, metadata=metadata)
    if isinstance(flag.default, list):
        return flag.name, flag.type, dataclasses.field(default_factory=list, metadata=metadata)
    return flag.name, flag.type, dataclasses.field(default=flag.default, metadata=metadata)


# One field a flag, of the Trainer's own type, for HfArgumentParser's grammar.
OtherFlags = dataclasses.make_dataclass("OtherFlags", [_field(flag) for flag in FLAGS])


def read_others(others: Any) -> tuple[dict[str, Any], list[str]]:
    """What aliases mean, by the name of the field of `Arguments`, and the lines to say. Raises InputError."""
    meant: dict[str, Any] = {}
    said = []
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
            raise InputError(flag.said())
        if flag.name.endswith(("_kwargs", "_config", "deepspeed")) and value.startswith("{"):
            read_json(flag.name, value)
        said.append(flag.said())
    return meant, said


def resolve_optimizer(name: str, weight_decay: float) -> tuple[str, list[str]]:
    """The optimizer meant by `--optim name`, and the line to say of an alias. Raises InputError."""
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        raise InputError(f"--optim {name}: no such optimizer; use {near[0] if near else _SAME}")
    _, status, text = OPTIMIZERS[name]
    if status == REFUSED:
        raise InputError(f"--optim {name}: {text}")
    if status == IMPLEMENTED:
        return name, []
    if name == "paged_adamw_32bit" and weight_decay:
        # bitsandbytes' kernel multiplies the parameters by (1 - lr decay) after the update, torch before it.
        raise InputError(f"--optim {name}: with --weight_decay it decays after the update; use {text}")
    return text, [f"--optim {name}: read as {text}"]


def read_json(name: str, text: str) -> dict[str, Any]:
    """The JSON object that a flag holds, or whose file it names. Raises InputError."""
    try:
        if not text.startswith("{"):
            text = Path(text).expanduser().read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as e:
        raise InputError(f"--{name} {text}: neither a JSON object nor a file of one: {e.strerror}") from None
    except ValueError as e:
        raise InputError(f"--{name}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise InputError(f"--{name}: should be a JSON object, as {{}}")
    return value
