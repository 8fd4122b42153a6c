"""Choose the checkpoint to resume from; define, read and compare the JSON that a checkpoint keeps beside its state."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.base.bucket import as_path
from llama_jax.base.errors import InputError
from llama_jax.hf.checkpoint import Damaged
from llama_jax.hf.remote import FLAX_JSON
from llama_jax.hf.trainer_checkpoint import is_trainers
from llama_jax.model.config import LlamaConfig
from llama_jax.reporting.progress import say
from llama_jax.run.checkpoint import find_foreign, find_steps, number, read_run, set_aside
from llama_jax.run.ownership import Ledger, find_model
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job

Json = dict[str, Any]

# Flags that decide an update, beside those of the order: a resumed run takes its own.
UPDATE = (
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    *("average_tokens_across_devices", "bf16", "fp8", "tf32", "gradient_sum_dtype", "on_nonfinite", "skip_loss_spikes"),
)

NEW = {"fp8": False, "gradient_sum_dtype": "float32"}  # flags of 2026-11-29 and later: what earlier runs had

QUANTIZATION = ("load_in_4bit", "load_in_8bit", "use_bnb_nested_quant", "fp8")

# Actions after an update, in the HF Trainer's order: first by steps, then at an epoch's end. Checkpoints hold the names
# of those left to do; before 2026-11-28, the number of those done. So neither names nor places may change.
ACTIONS = ("steps/log", "steps/evaluate", "steps/save", "epoch/log", "epoch/evaluate", "epoch/save")

# Flags by the order's names of them, and what only follows from flags and data.
_FLAGS = {
    "ranks": "--world_size",
    "per_device_batch": "--per_device_train_batch_size",
    "accumulation": "--gradient_accumulation_steps",
    "epochs": "--num_train_epochs",
    "max_steps": "--max_steps",
    "seed": "--seed",
    "data_seed": "--data_seed",
    "drop_last": "--dataloader_drop_last",
    "sampling": "--train_sampling_strategy",
    "compat": "--hf_compat",
}
_COUNTED = ("batches_per_epoch", "updates_per_epoch", "updates")


@dataclass(frozen=True)
class Facts:
    """Hold the properties of a run that a resumed run is compared with.

    `adapter` is an adapter_config.json with the flags of QUANTIZATION, empty for full fine-tuning. Checkpoints written
    before 2026-11-28 have no `update`, those before 2026-11-26 no `data`, and those before 2026-11-25 no `model`.
    `base` is the digest of the frozen parameters, set by `with_base`; "" where none is frozen. `moments` is the type of
    adamw_torch's moments, "" before 2026-11-29, where it was that of the parameters. "bfloat16, drawn" tells moments of
    `--adam_moments_dtype` from those of bfloat16 parameters, which are rounded to nearest.
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
    moments: str = ""

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
            moments=_moments(job.args, dtype),
        )


def _moments(args: Arguments, dtype: str) -> str:
    given = args.adam_moments_dtype
    return "bfloat16, drawn" if given == dtype == "bfloat16" else given or dtype


def _adapter(job: Job) -> Json:
    if job.adapter is None:
        return {}
    return {**job.adapter.values, **{name: getattr(job.args, name) for name in QUANTIZATION}}


@dataclass(frozen=True)
class SavedRun:
    """Hold the JSON of a checkpoint.

    `left` names the actions of `ACTIONS` that are still due at the checkpoint's update. `schedule` is
    `Schedule.state()`; `log_window` is `RunLog.window`, None in checkpoints written before 2026-11-26. `guard` is
    `Milestones.guard_values`, None before 2026-11-29. `run` is the identity of the run, set by `Checkpoints` and ""
    before 2026-11-29. `handover` is `Handover.to_json` of a run that the HF Trainer began, else None.
    """

    facts: Facts
    trainer_state: Json
    left: tuple[str, ...]
    schedule: Json
    log_window: Json | None = None
    guard: Json | None = None
    run: str = ""
    handover: Json | None = None

    @property
    def ranks(self) -> int | None:
        """Return the HF Trainer's ranks of the run."""
        return self.facts.order.get("ranks")

    @classmethod
    def from_json(cls, values: Json) -> "SavedRun":
        """Read the JSON of any checkpoint since the first release. Raises KeyError and TypeError."""
        facts = {f.name: values[f.name] for f in dataclasses.fields(Facts) if f.name in values}
        left = values.get("left", ACTIONS[values.get("done", len(ACTIONS)) :])
        return cls(
            facts=Facts(**facts),
            trainer_state=values["trainer_state"],
            left=tuple(left),
            schedule=values["schedule"],
            log_window=values.get("log_window"),
            guard=values.get("guard"),
            run=values.get("run", ""),
            handover=values.get("handover"),
        )

    @classmethod
    def read(cls, checkpoint: Path) -> "SavedRun":
        """Read the JSON of a checkpoint. Raises InputError, and Damaged where it is not what was saved."""
        values = read_run(checkpoint)
        try:
            return cls.from_json(values)
        except (KeyError, TypeError) as e:  # JSON of before 2026-11-29 has no seal
            raise Damaged(f"{checkpoint}: is damaged: its JSON lacks {e}") from None

    def to_json(self) -> Json:
        """Return the JSON to write. The values are copies: a checkpoint is written while the run goes on."""
        values = dataclasses.asdict(self)
        return {**values.pop("facts"), **values, "left": list(self.left)}


def as_json_values(config: LlamaConfig) -> Json:
    """Return the architecture as JSON reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def choose_checkpoint(args: Arguments, output_dir: Path) -> Path | None:
    """Return the checkpoint to resume from, None for a new run. Raises InputError."""
    if foreign := find_foreign(output_dir):
        path = output_dir / foreign[-1]
        if is_trainers(path):
            is_named = args.resume_from_checkpoint and not resumes_newest(args)
            on = "" if is_named else f", and go on from it by --resume_from_checkpoint {path}"
            raise InputError(f"{output_dir}: holds the HF Trainer's {path.name}; choose another --output_dir{on}")
        raise InputError(
            f"{path}: is not a checkpoint of this program{_as_model(path)}; move it away, or choose another "
            "--output_dir"
        )
    steps = find_steps(output_dir)
    newest = output_dir / f"checkpoint-{steps[-1]}" if steps else None
    if resumes_newest(args):
        if newest:
            return newest
        if args.resume_from_checkpoint != "auto":
            raise InputError(f"--resume_from_checkpoint True: no checkpoint in {output_dir}; auto starts anew then")
    named = None if resumes_newest(args) else _named_checkpoint(args, output_dir)
    if named and named.parent == output_dir:
        return named
    if not args.overwrite_output_dir:
        if newest:
            raise InputError(
                f"{output_dir} already holds {newest.name}: go on with --resume_from_checkpoint True, or start "
                "anew with --overwrite_output_dir True, which removes it"
            )
        if model := find_model(output_dir):
            raise InputError(
                f"{output_dir} already holds a model ({model}): choose another --output_dir, or replace the model with "
                "--overwrite_output_dir True"
            )
    return named


def resumes_newest(args: Arguments) -> bool:
    """Return whether the run resumes from its newest checkpoint, as against a named one or none."""
    return (args.resume_from_checkpoint or "").lower() in ("auto", "true", "yes", "1")


def _named_checkpoint(args: Arguments, output_dir: Path) -> Path | None:
    """Return the checkpoint of `--resume_from_checkpoint PATH`, of this run or another. Raises InputError."""
    wanted = args.resume_from_checkpoint
    if not wanted or wanted.lower() in ("false", "no", "0"):
        return None
    path = as_path(wanted)
    if inside := [f"checkpoint-{step}" for step in find_steps(path)] or find_foreign(path):
        raise InputError(
            f"--resume_from_checkpoint {wanted}: is a run's folder; name a checkpoint in it, as {path / inside[-1]}"
        )
    if is_trainers(path):
        if output_dir.resolve().is_relative_to(path.resolve()):
            raise InputError(
                f"--output_dir {output_dir}: is in the checkpoint that the run goes on from; choose another folder"
            )
        return path
    if not path.exists():
        raise InputError(f"--resume_from_checkpoint {wanted}: is not there; {output_dir} has {_found(output_dir)}")
    if number(path.name) not in find_steps(path.parent):
        raise InputError(
            f"--resume_from_checkpoint {wanted}: is not a checkpoint of this program; {output_dir} has "
            f"{_found(output_dir)}{_as_model(path)}"
        )
    return output_dir / path.name if path.parent.resolve() == output_dir.resolve() else path


def _found(output_dir: Path) -> str:
    return ", ".join(f"checkpoint-{step}" for step in find_steps(output_dir)) or "none"


def pass_over_damaged(args: Arguments, output_dir: Path) -> None:
    """Set aside the newest checkpoints whose JSON is damaged, or of another run, where the run resumes from the newest.
    Raises InputError where the damaged checkpoint was named."""
    run = Ledger(output_dir).run
    while True:
        if not resumes_newest(args):
            path = _named_checkpoint(args, output_dir)
        else:
            path = output_dir / f"checkpoint-{steps[-1]}" if (steps := find_steps(output_dir)) else None
        if path is None or is_trainers(path):
            return
        try:
            saved = SavedRun.read(path)
            if run and saved.run not in ("", run) and resumes_newest(args):
                raise Damaged(f"{path}: is of another run")
            return
        except Damaged as e:
            pass_over(args, path, e)


def pass_over(args: Arguments, checkpoint: Path, damage: Damaged) -> None:
    """Set a damaged checkpoint aside: the run resumes from the one before. Raises InputError if it was named."""
    older = [step for step in find_steps(checkpoint.parent) if step < number(checkpoint.name)]
    if not resumes_newest(args):
        fix = f"--resume_from_checkpoint {checkpoint.parent}/checkpoint-{older[-1]}" if older else "start anew"
        raise InputError(f"{damage}; move it away and {fix}")
    new = set_aside(checkpoint.parent, number(checkpoint.name))
    then = f"resuming from checkpoint-{older[-1]}" if older else "no other checkpoint is left"
    say(f"warning: {damage}; it is set aside as {new.name}; {then}")


def _as_model(path: Path) -> str:
    """Return the proposal to start from the weights of an HF model, "" where `path` is none."""
    if not (path / "config.json").is_file() or (path / FLAX_JSON).is_file():  # the latter: a part of our own
        return ""
    return f"; it is an HF model: train on from its weights, with a new optimizer, by --model_name_or_path {path}"


def _kind(facts: Facts) -> str:
    return "trains an adapter" if facts.adapter else "trains all parameters"


def compare_with_saved(facts: Facts, saved: SavedRun, name: str) -> None:
    """Refuse a checkpoint that this run cannot continue; report differences that it can. Raises InputError."""
    then = saved.facts
    moments = then.moments or then.dtype
    kept = "--adam_moments_dtype"
    by_flag = f"without {kept}" if moments == then.dtype else f"with {kept} {moments.partition(',')[0]}"
    for was, now, held, fix in (
        (then.dtype, facts.dtype, "parameters in", f"with --dtype {then.dtype}"),
        (then.optim, facts.optim, "the state of", f"with --optim {then.optim}"),
        (moments, facts.moments or facts.dtype, "moments in", by_flag),
    ):
        if was != now:
            raise InputError(f"{name} holds {held} {was}: resume it {fix}")
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
        before = then.order.get(key)
        if key == "evaluations_before_epoch" and before is not None:  # empty where there are none
            shared = min(filter(None, (len(before), len(value))), default=0)  # the epochs that both runs have
            before, value = ((list(x) or [0] * shared)[:shared] for x in (before, value))
        if before != value and key not in _COUNTED:
            say(f"warning: {name} was made with {_FLAGS.get(key, key)} {before}, this run has {value}")
    for flag, now in facts.update.items() if then.update else ():
        before = then.update.get(flag, NEW.get(flag, now))
        if before != now:
            say(f"warning: {name} was made with --{flag} {before}, this run goes on with {now}")
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
