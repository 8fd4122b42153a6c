"""Choose the checkpoint to resume from; define, read and compare the JSON that a checkpoint keeps beside its state."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.base.bucket import as_path
from llama_jax.base.errors import InputError
from llama_jax.model.config import LlamaConfig
from llama_jax.reporting.progress import say
from llama_jax.run.checkpoint import find_foreign, find_steps
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job

Json = dict[str, Any]

# Flags that decide an update, beside those of the order: a resumed run takes its own.
UPDATE = (
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    *("average_tokens_across_devices", "bf16", "tf32"),
)

QUANTIZATION = ("load_in_4bit", "load_in_8bit", "use_bnb_nested_quant")

# Actions after an update, in the HF Trainer's order: first by steps, then at an epoch's end. Checkpoints hold the names
# of those left to do; before 2026-11-28, the number of those done. So neither names nor places may change.
ACTIONS = ("steps/log", "steps/evaluate", "steps/save", "epoch/log", "epoch/evaluate", "epoch/save")


@dataclass(frozen=True)
class Facts:
    """Hold the properties of a run that a resumed run is compared with.

    `adapter` is an adapter_config.json with the flags of QUANTIZATION, empty for full fine-tuning. Checkpoints written
    before 2026-11-28 have no `update`, those before 2026-11-26 no `data`, and those before 2026-11-25 no `model`.
    `base` is the digest of the frozen parameters, set by `with_base`; "" where none is frozen.
    """

    dtype: str
    optim: str
    order: Json
    scan_layers: bool
    model: Json = dataclasses.field(default_factory=dict)
    data: str = ""
    update: Json = dataclasses.field(default_factory=dict)
    adapter: Json = dataclasses.field(default_factory=dict)
    base: str = ""

    @classmethod
    def of(cls, job: Job, *, dtype: str, scan_layers: bool) -> "Facts":
        """Return the facts of a run whose parameters are of `dtype`."""
        return cls(
            dtype=dtype,
            optim=job.args.optim,
            order=job.order.facts(),
            scan_layers=scan_layers,
            model=as_json_values(job.config),
            data=job.data_digest,
            update={name: getattr(job.args, name) for name in UPDATE}
            | {"lr_scheduler_kwargs": job.args.schedule_kwargs},
            adapter=_adapter(job),
        )


def _adapter(job: Job) -> Json:
    if job.adapter is None:
        return {}
    return {**job.adapter.values, **{name: getattr(job.args, name) for name in QUANTIZATION}}


@dataclass(frozen=True)
class SavedRun:
    """Hold the JSON of a checkpoint.

    `left` names the actions of `ACTIONS` that are still due at the checkpoint's update. `schedule` is
    `Schedule.state()`; `log_window` is `RunLog.window`, None in checkpoints written before 2026-11-26.
    """

    facts: Facts
    trainer_state: Json
    left: tuple[str, ...]
    schedule: Json
    log_window: Json | None = None

    @classmethod
    def from_json(cls, values: Json) -> "SavedRun":
        """Read the JSON of any checkpoint since the first release."""
        facts = {f.name: values[f.name] for f in dataclasses.fields(Facts) if f.name in values}
        left = values.get("left", ACTIONS[values.get("done", len(ACTIONS)) :])
        return cls(Facts(**facts), values["trainer_state"], tuple(left), values["schedule"], values.get("log_window"))

    def to_json(self) -> Json:
        """Return the JSON to write. The values are copies: a checkpoint is written while the run goes on."""
        values = dataclasses.asdict(self)
        return {**values.pop("facts"), **values, "left": list(self.left)}


def as_json_values(config: LlamaConfig) -> Json:
    """Return the architecture as JSON reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def choose_step(args: Arguments, output_dir: Path) -> int:
    """Return the step of the checkpoint to resume from, 0 for none. Raises InputError."""
    if foreign := find_foreign(output_dir):
        path = output_dir / foreign[-1]
        raise InputError(
            f"{path}: is not a checkpoint of this program{_as_model(path)}; move it away, or choose another "
            "--output_dir"
        )
    wanted, steps = args.resume_from_checkpoint, find_steps(output_dir)
    if wanted and wanted.lower() == "auto":
        return steps[-1] if steps else 0
    if wanted and wanted.lower() not in ("false", "no", "0"):
        return _named_step(wanted, steps, output_dir)
    if steps and not args.overwrite_output_dir:
        raise InputError(
            f"{output_dir} already holds checkpoint-{steps[-1]}: go on with --resume_from_checkpoint True, or start "
            "anew with --overwrite_output_dir True, which removes it"
        )
    return 0


def _named_step(wanted: str, steps: list[int], output_dir: Path) -> int:
    """Return the step of `--resume_from_checkpoint True` or PATH. Raises InputError."""
    if wanted.lower() in ("true", "yes", "1"):
        if not steps:
            raise InputError(f"--resume_from_checkpoint True: no checkpoint in {output_dir}; auto starts anew then")
        return steps[-1]
    path = as_path(wanted)
    name = path.name.removeprefix("checkpoint-")
    if path.parent.resolve() != output_dir.resolve() or not name.isdigit() or int(name) not in steps:
        raise InputError(
            f"--resume_from_checkpoint {wanted}: not one of the checkpoints in {output_dir}: {steps}{_as_model(path)}"
        )
    return int(name)


def _as_model(path: Path) -> str:
    """Return the proposal to start from the weights of an HF Trainer's checkpoint, "" where `path` is no HF model."""
    if not (path / "config.json").is_file():
        return ""
    return f"; it is the HF Trainer's: train on from its weights, with a new optimizer, by --model_name_or_path {path}"


def _kind(facts: Facts) -> str:
    return "trains an adapter" if facts.adapter else "trains all parameters"


def compare_with_saved(facts: Facts, saved: SavedRun, name: str) -> None:
    """Refuse a checkpoint that this run cannot continue; report differences that it can. Raises InputError."""
    then = saved.facts
    for flag, was, now, held in (
        ("dtype", then.dtype, facts.dtype, "parameters in"),
        ("optim", then.optim, facts.optim, "the state of"),
    ):
        if was != now:
            raise InputError(f"{name} holds {held} {was}: resume it with --{flag} {was}")
    for key, value in then.model.items():
        if facts.model[key] != value:
            both = f"{key} {value}, this one {facts.model[key]}"
            raise InputError(f"{name} holds another model: it has {both}; give --model_name_or_path the same as then")
    if bool(then.adapter) != bool(facts.adapter):
        raise InputError(f"{name} {_kind(then)}, this run {_kind(facts)}: resume it with the same flags of adapters")
    for key, value in then.adapter.items():
        if facts.adapter.get(key) != value and key != "base_model_name_or_path":
            both = f"{key} {value}, this one {facts.adapter.get(key)}"
            raise InputError(f"{name} holds another adapter: it has {both}; give the same flags as then")
    updates = facts.order["updates"]
    if saved.trainer_state["global_step"] > updates:
        raise InputError(f"{name} is past the {updates} updates of this run: raise --num_train_epochs or --max_steps")
    if then.data and then.data != facts.data:
        say(f"warning: {name} was made with other examples: other data, another tokenizer or --model_max_length")
    for key, value in facts.order.items():
        if then.order.get(key) != value:
            say(f"warning: {name} was made with {key} {then.order.get(key)}, this run has {value}")
    for flag, was in then.update.items():
        if was != facts.update.get(flag):
            say(f"warning: {name} was made with --{flag} {was}, this run goes on with {facts.update.get(flag)}")
    if then.scan_layers != facts.scan_layers:
        say(f"--scan_layers: {then.scan_layers}, as in {name}")


def with_base(facts: Facts, base: str, saved: SavedRun | None, name: str) -> Facts:
    """Return the facts with the digest of the frozen parameters. Raises InputError where the checkpoint has another."""
    if saved is not None and saved.facts.base not in ("", base):
        raise InputError(
            f"{name} holds an adapter of another base model (digest {saved.facts.base}, this one {base}): the weights "
            "of --model_name_or_path have changed since; give the same as then"
        )
    return dataclasses.replace(facts, base=base)
