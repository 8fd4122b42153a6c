"""Go on from a checkpoint of the HF Trainer: the flags that it decides, its position, its log."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object, refuse_foreign_link
from llama_jax.data.order import Resumed
from llama_jax.hf import peft
from llama_jax.hf.readers import open_checkpoint
from llama_jax.hf.tensor import Tensor
from llama_jax.hf.trainer_checkpoint import (
    ADAMW_32,
    OPTIMIZER,
    SCHEDULER,
    TrainerCheckpoint,
    anew,
    check_number,
    understanding,
)
from llama_jax.model.config import LlamaConfig
from llama_jax.reporting.progress import say
from llama_jax.run.resume import QUANTIZATION, Facts, SavedRun, as_json_values
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job
from llama_jax.training.moments import EXACT_BELOW
from llama_jax.training.schedule import LISTENING

Json = dict[str, Any]


@dataclass(frozen=True)
class Handover:
    """Hold what a run keeps of the HF Trainer's checkpoint that it goes on from, in its own checkpoints too.

    The Trainer resumes after `updates`, with its generator's state as in `Resumed`. `flags` have the checkpoint's
    values, which the Trainer takes instead of those of the command line. `rate` is the learning rate of the next
    update.
    """

    updates: int
    generator: Json | None
    flags: Json
    rate: float

    @classmethod
    def of(cls, checkpoint: TrainerCheckpoint, args: Arguments) -> "Handover":
        """Return what a run by these flags takes over. Raises InputError."""
        with understanding(checkpoint.folder):
            group = next(group for group in checkpoint.groups if group["params"])
            return cls(
                updates=checkpoint.updates,
                generator=checkpoint.generator,
                flags=_flags(checkpoint, args),
                rate=check_number(group.get("lr"), checkpoint.folder / OPTIMIZER, "lr"),
            )

    def to_json(self) -> Json:
        """Return the values as JSON."""
        return dataclasses.asdict(self)

    @property
    def resumed(self) -> Resumed:
        """Return the position in the order."""
        return Resumed(self.updates, self.generator)

    def apply(self, args: Arguments, name: str) -> Arguments:
        """Return the flags with those of the checkpoint, and report each that differs."""
        args = copy.copy(args)
        for flag, value in self.flags.items():
            if (given := getattr(args, flag)) != value:
                setattr(args, flag, value)
                said = "the default" if given is None else given
                say(f"--{flag} {value}, as in {name}, and not {said}: so the HF Trainer resumes")
        return args


def _flags(checkpoint: TrainerCheckpoint, args: Arguments) -> Json:
    """Return the flags that the Trainer takes from a checkpoint: the optimizer's, by torch's load_state_dict, the peak
    of the schedule, the intervals of its actions and, in 4.37, the batch size."""
    groups, state, flags = checkpoint.groups, checkpoint.state, dict[str, Any]()
    if peaks := checkpoint.scheduler.get("base_lrs"):
        flags["learning_rate"] = check_number(peaks[0], checkpoint.folder / SCHEDULER, "base_lrs")
    if groups[0]["params"]:
        flags["weight_decay"] = float(groups[0].get("weight_decay", 0.0))
    betas, eps = groups[0].get("betas"), groups[0].get("eps")
    if isinstance(betas, tuple | list):
        flags |= {"adam_beta1": float(betas[0]), "adam_beta2": float(betas[1])}
    if isinstance(eps, float):
        flags["adam_epsilon"] = eps
    for name in ("logging", "eval", "save"):
        steps, total = state.get(f"{name}_steps"), state.get("max_steps")
        if not (isinstance(steps, int | float) and isinstance(total, int) and steps > 0):
            continue
        is_share = 0 < (getattr(args, f"{name}_steps") or 0) < 1  # of this run's updates, perhaps more than then
        if getattr(args, f"{name}_strategy") == "steps" and (is_share or args.every(name, total) != steps):
            flags[f"{name}_steps"] = steps
    if args.hf_compat == "4.37" and isinstance(state.get("train_batch_size"), int):
        flags["per_device_train_batch_size"] = state["train_batch_size"]
    return flags


def _heard(checkpoint: TrainerCheckpoint, rate: float) -> Json:
    """Return what a schedule that listens to evaluations has heard, as `Schedule.state`. Raises InputError."""
    values = checkpoint.scheduler
    if "num_bad_epochs" not in values:
        raise InputError(f"{checkpoint.folder / SCHEDULER}: is of another --lr_scheduler_type; give the one of then")
    heard: Json = {
        "now": rate,
        "best": values["best"],
        "bad": values["num_bad_epochs"],
        "cooling": values["cooldown_counter"],
    }
    if "num_good_epochs" in values:
        average = values.get("_streaming_avg") or {"values": [], "sum": 0.0}
        heard |= {"good": values["num_good_epochs"], "warming": values["warmup_counter"]}
        heard |= {"until_reset": values["reset_start"], "window": average["values"], "sum": average["sum"]}
    return heard


def _dtype(tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Return the type of a checkpoint's weights, of several the widest. Raises InputError for one that is not trained
    in."""
    dtype = max({tensor.dtype for tensor in tensors.values()}, key=lambda kind: (kind.itemsize, kind.name)).name
    if dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"{folder}: its weights are in {dtype}, in which no run goes on; start from them with a new optimizer: "
            f"--model_name_or_path {folder} --dtype float32"
        )
    return dtype


def _optim(checkpoint: TrainerCheckpoint, job: Job) -> str:
    """Return the `--optim` that goes on with the checkpoint's state. Raises InputError."""
    if checkpoint.optim != ADAMW_32:
        return checkpoint.optim
    sizes = [math.prod(values["state1"].shape) for values in checkpoint.moments.values() if "state1" in values]
    if job.args.optim == "adamw_8bit" and max(sizes) < EXACT_BELOW:
        return "adamw_8bit"
    say(
        f"warning: {checkpoint.folder} was made by bitsandbytes' AdamW in 32 bits; this run's adamw_torch decays the "
        "weights before an update and not after"
    )
    return "adamw_torch"


def _model(path: Path) -> Json:
    """Return the architecture of a checkpoint's config.json, as in `Facts`; {} where the file is missing. The
    padding's row is left out: the Trainer writes the tokenizer's there, after it has made the model with another."""
    if not path.is_file():
        return {}
    refuse_foreign_link(path.parent, path)
    values = as_json_values(LlamaConfig.from_hf(read_json_object(path), str(path)))
    del values["pad_token_id"]
    return values


def _compare_epochs(checkpoint: TrainerCheckpoint, job: Job) -> None:
    """Warn where the checkpoint has trained other epochs than this run would have by its update.

    In 4.37, a Trainer that was resumed has passed over micro-batches, at most those that it passes over now."""
    done, epoch = checkpoint.updates, checkpoint.state.get("epoch")
    if epoch is None or done > job.order.updates:
        return
    least, most = (order.epoch_at(done) for order in (dataclasses.replace(job.order, resumed=None), job.order))
    if not least * (1 - 1e-6) <= epoch <= most * (1 + 1e-6):
        say(
            f"warning: {checkpoint.folder} is at epoch {epoch:.6g} after {done} updates, this run would be at "
            f"{least:.6g}: other data, another batch size, gradient_accumulation_steps or number of ranks"
        )


def saved_run(checkpoint: TrainerCheckpoint, handover: Handover, facts: Facts, job: Job) -> SavedRun:
    """Return what a checkpoint of this program would hold beside the state; report differences of the flags. `facts`
    are those of this run. Raises InputError."""
    state, folder = checkpoint.state, checkpoint.folder
    done = checkpoint.scheduler["last_epoch"]
    if "base_lrs" in checkpoint.scheduler and done != checkpoint.updates:
        raise InputError(
            f"{folder / SCHEDULER}: last_epoch is {done} after {checkpoint.updates} updates (fp16 skips updates): the "
            f"schedule cannot go on; {anew(folder)}"
        )
    for key, flag, now in (
        ("max_steps", "updates of the run", job.order.updates),
        ("num_train_epochs", "epochs", job.num_train_epochs),
        ("train_batch_size", "examples a micro-batch", job.args.per_device_train_batch_size),
    ):
        if state.get(key) not in (None, now):
            say(f"warning: {folder} was made with {state[key]} {flag}, this run has {now}")
    if ("stateful_callbacks" in state) != (job.args.hf_compat == "5"):
        say(f"warning: {folder} was not written by transformers {job.args.hf_compat}; give --hf_compat as it was")
    if checkpoint.steps < checkpoint.updates:
        say(
            f"warning: {folder / OPTIMIZER} counts {checkpoint.steps} of {checkpoint.updates} updates: "
            "some were skipped"
        )
    if "correct_bias" in checkpoint.groups[0]:
        say(f"warning: {folder} was made by adamw_hf; this run's adamw_torch differs where epsilon is added and decays")
    if job.args.hf_compat == "4.37" and checkpoint.generator is None:
        say(f"warning: {folder} holds no rng_state.pth, so that later epochs have another order than the Trainer's")
    _compare_epochs(checkpoint, job)
    adapter: Json = {}
    model = facts.model
    if (folder / peft.CONFIG).is_file():
        found, tensors = peft.read_adapter(folder, job.config, job.args.allow_nonfinite)
        adapter = found.values | {k: getattr(job.args, k) for k in QUANTIZATION}
        base, given = found.values.get("base_model_name_or_path"), job.args.model_name_or_path
        if isinstance(base, str) and given and Path(base).name != Path(given).name:
            say(f"warning: {folder} is an adapter of {base}, and this run's --model_name_or_path is {given}")
    else:
        model = _model(folder / "config.json")
        tensors = open_checkpoint(folder, job.args.allow_pickle).tensors
    order = {**facts.order, "ranks": checkpoint.ranks or facts.order["ranks"]}
    return SavedRun(
        facts=dataclasses.replace(
            facts,
            dtype=_dtype(tensors, folder),
            optim=_optim(checkpoint, job),
            adapter=adapter,
            order=order,
            model=model,
            moments=checkpoint.moments_dtype or facts.moments,
        ),
        trainer_state=state,
        left=(),
        schedule=_heard(checkpoint, handover.rate) if job.args.lr_scheduler_type in LISTENING else {},
        handover=handover.to_json(),
    )
