"""Compare a DeepSpeed file with the flags, which alone decide a run here."""

import json
from collections.abc import Iterator
from typing import Any

# A key of the file -> the flag of the same meaning. transformers fills "auto" from the flag, and refuses another value.
SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "max_steps",
    "bf16.enabled": "bf16",
}
OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch", "lion": "lion_32bit", "sgd": "sgd"}
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def differences(settings: dict[str, Any], args: Any) -> Iterator[str]:
    """Yield a line for each setting of a DeepSpeed file that the flags decide otherwise."""

    def at(key: str) -> Any:
        """Return the file's value, None where it is missing or "auto"."""
        value: Any = settings
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return None if value == "auto" else value

    def line(key: str, flags: str) -> str:
        return f"--deepspeed: {key} is {json.dumps(at(key))} there; the flags decide: {flags}"

    for key, flag in SAME.items():
        if (theirs := at(key)) is not None and theirs != getattr(args, flag):
            yield line(key, f"--{flag} {getattr(args, flag)}")
    if "gradient_clipping" not in settings and args.max_grad_norm > 0:
        yield (
            "--deepspeed: gradient_clipping is missing there, so that DeepSpeed would not clip; the flags decide: "
            f"--max_grad_norm {args.max_grad_norm}"
        )
    if at("optimizer.params.betas") not in (None, [args.adam_beta1, args.adam_beta2]):
        yield line("optimizer.params.betas", f"--adam_beta1 {args.adam_beta1} --adam_beta2 {args.adam_beta2}")
    if (kind := at("optimizer.type")) is not None and OPTIMIZERS.get(str(kind).lower()) != args.optim:
        yield line("optimizer.type", f"--optim {args.optim}")
    if (kind := at("scheduler.type")) is not None and SCHEDULES.get(str(kind)) != args.lr_scheduler_type:
        yield line("scheduler.type", f"--lr_scheduler_type {args.lr_scheduler_type}")
    elif kind and (args.warmup_steps or args.warmup_ratio) and at("scheduler.params.warmup_type") != "linear":
        yield (
            f"--deepspeed: scheduler.type {kind} warms up by the logarithm of the update unless warmup_type is linear; "
            "here the learning rate rises linearly"
        )
    if at("fp16.enabled"):
        yield line("fp16.enabled", f"--bf16 {args.bf16}; there is no float16")
    own = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if (whole := at("train_batch_size")) is not None:
        count = whole // own if isinstance(whole, int) and whole % own == 0 else None
        means = f"which is {count} device(s) of" if count else "no multiple of"
        yield (
            f"--deepspeed: train_batch_size is {json.dumps(whole)} there, {means} --per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x --gradient_accumulation_steps {args.gradient_accumulation_steps}; "
            "here --world_size counts, by default the devices of data x fsdp in --mesh"
        )
    device = at("zero_optimization.offload_optimizer.device")
    if device is not None and (device != "none") != args.offload_optimizer:
        yield line("zero_optimization.offload_optimizer.device", f"--offload_optimizer {args.offload_optimizer}")
    if (stage := at("zero_optimization.stage")) is not None:
        here = "--mesh data=-1 does the same" if stage == 0 else "--mesh auto divides all of the state, as stage 3 does"
        yield f"--deepspeed: zero_optimization.stage {stage} changes memory, not the updates; {here}"
