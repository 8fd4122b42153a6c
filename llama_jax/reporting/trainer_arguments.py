"""Make the TrainingArguments that callbacks read, without torch and without the devices that it would set up."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

# accelerate's AcceleratorConfig, as TrainingArguments prints it.
_ACCELERATOR = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
}


def trainer_arguments(flags: Mapping[str, Any]) -> Any:
    """Return transformers' TrainingArguments of the flags that it knows, with the values that it derives."""
    from transformers import IntervalStrategy, SchedulerType, TrainingArguments
    from transformers.trainer_utils import HubStrategy, SaveStrategy
    from transformers.training_args import OptimizerNames

    enums = {
        "logging_strategy": IntervalStrategy,
        "eval_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "hub_strategy": HubStrategy,
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
    }

    class Arguments(TrainingArguments):
        """Derive values as TrainingArguments does, for `to_dict` and its kin; torch sets up nothing."""

        def __post_init__(self) -> None:
            for field in fields(self):
                value = getattr(self, field.name)
                if isinstance(value, str) and value.startswith("{"):
                    setattr(self, field.name, json.loads(value))
            for name in ("logging", "eval", "save"):
                every = getattr(self, f"{name}_steps")
                if getattr(self, f"{name}_strategy") == "steps" and every > 1:
                    setattr(self, f"{name}_steps", int(every))
            self.do_eval = self.do_eval or self.eval_strategy != "no"
            self.activation_checkpointing = self.gradient_checkpointing = bool(self.gradient_checkpointing)
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
            self.disable_tqdm = bool(self.disable_tqdm)
            self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
            self.accelerator_config: Any = object()  # only `to_dict` shows its values
            self.debug = self.debug or []
            for name, enum in enums.items():
                setattr(self, name, enum(getattr(self, name)))

        def to_dict(self) -> dict[str, Any]:
            values = super().to_dict()
            return values | {"accelerator_config": dict(_ACCELERATOR)}

        @property
        def train_batch_size(self) -> int:
            return self.per_device_train_batch_size

        @property
        def eval_batch_size(self) -> int:
            return self.per_device_eval_batch_size

    known = {field.name for field in fields(TrainingArguments) if field.init}
    given = {name: value for name, value in flags.items() if name in known}
    if flags.get("warmup_ratio") and not flags.get("warmup_steps"):  # of 4.37; 5 reads a share below 1 so
        given["warmup_steps"] = flags["warmup_ratio"]
    return Arguments(**given)
