"""Go on from a checkpoint of the HF Trainer: its flags, its position, and its state as this program's."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from optax import ScaleByAdamState

from llama_jax.base.errors import InputError
from llama_jax.data.order import Resumed
from llama_jax.distributed import sharding
from llama_jax.hf import names, peft
from llama_jax.hf.load import check_tensors, load_params, place_arrays
from llama_jax.hf.names import Path as Place
from llama_jax.hf.names import without_layer
from llama_jax.hf.readers import open_checkpoint
from llama_jax.hf.tensor import Tensor
from llama_jax.hf.trainer_checkpoint import OPTIMIZER, SCHEDULER, TrainerCheckpoint, parameter_order
from llama_jax.model.roles import Params, is_stacked
from llama_jax.plan.planner import Planner
from llama_jax.reporting.progress import byte_bar, say
from llama_jax.run.resume import QUANTIZATION, Facts, SavedRun
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job
from llama_jax.training.moments import StoredAdamState
from llama_jax.training.optimizer import ClipState
from llama_jax.training.state import SavedState

Json = dict[str, Any]


@dataclass(frozen=True)
class Handover:
    """Hold what a run keeps of the HF Trainer's checkpoint that it goes on from, in its own checkpoints too.

    The Trainer resumed after `updates`, with its generator's state as in `Resumed`. `flags` have the checkpoint's values
    where the Trainer takes them, and not those of the command line. `rate` is the learning rate of the next update.
    """

    updates: int
    generator: Json | None
    flags: Json
    rate: float

    @classmethod
    def of(cls, checkpoint: TrainerCheckpoint, args: Arguments) -> "Handover":
        """Return what a run by these flags takes over. Raises InputError."""
        group = next(group for group in checkpoint.groups if group["params"])
        return cls(
            updates=checkpoint.updates,
            generator=checkpoint.generator,
            flags=_flags(checkpoint, args),
            rate=_rate(checkpoint, group),
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


def _rate(checkpoint: TrainerCheckpoint, group: Json) -> float:
    rate = group.get("lr")
    rate = rate.read(()).item() if isinstance(rate, Tensor) else rate
    if not isinstance(rate, int | float):
        raise InputError(f"{checkpoint.folder / OPTIMIZER}: param_groups have no lr; copy the file again")
    return float(rate)


def _flags(checkpoint: TrainerCheckpoint, args: Arguments) -> Json:
    """Return the flags that the Trainer takes from a checkpoint: the optimizer's, by torch's load_state_dict, the peak
    of the schedule, the intervals of its actions and, in 4.37, the batch size."""
    groups, state, flags = checkpoint.groups, checkpoint.state, dict[str, Any]()
    if peaks := checkpoint.scheduler.get("base_lrs"):
        flags["learning_rate"] = float(peaks[0])
    if groups[0]["params"]:
        flags["weight_decay"] = float(groups[0].get("weight_decay", 0.0))
    betas, eps = groups[0].get("betas"), groups[0].get("eps")
    if isinstance(betas, tuple | list):
        flags |= {"adam_beta1": float(betas[0]), "adam_beta2": float(betas[1])}
    if isinstance(eps, float):
        flags["adam_epsilon"] = eps
    for name in ("logging", "eval", "save"):
        steps, total = state.get(f"{name}_steps"), state.get("max_steps")
        known = isinstance(steps, int | float) and isinstance(total, int) and steps > 0
        if known and getattr(args, f"{name}_strategy") == "steps" and args.every(name, total) != steps:
            flags[f"{name}_steps"] = steps
    if args.hf_compat == "4.37" and isinstance(state.get("train_batch_size"), int):
        flags["per_device_train_batch_size"] = state["train_batch_size"]
    return flags


def saved_run(checkpoint: TrainerCheckpoint, handover: Handover, facts: Facts, job: Job) -> SavedRun:
    """Return what a checkpoint of this program would hold beside the state; report differences of the flags. `facts`
    are those of this run. Raises InputError."""
    state, folder = checkpoint.state, checkpoint.folder
    done = checkpoint.scheduler["last_epoch"]
    if "base_lrs" in checkpoint.scheduler and done != checkpoint.updates:
        raise InputError(
            f"{folder / SCHEDULER}: last_epoch is {done} after {checkpoint.updates} updates (fp16 skips updates): the "
            f"schedule cannot go on; start from the weights by --model_name_or_path {folder}"
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
    adapter: Json = {}
    if (folder / peft.CONFIG).is_file():
        adapter = peft.read_adapter(folder, job.config)[0].values | {k: getattr(job.args, k) for k in QUANTIZATION}
    order = {**facts.order, "ranks": checkpoint.ranks or facts.order["ranks"]}
    return SavedRun(
        facts=dataclasses.replace(facts, optim=checkpoint.optim, adapter=adapter, order=order),
        trainer_state=state,
        left=(),
        schedule={},
        handover=handover.to_json(),
    )


# -- The state --------------------------------------------------------------------------------------------------------


def restore_trainers(
    checkpoint: TrainerCheckpoint, job: Job, planner: Planner, mesh: jax.sharding.Mesh, quiet: bool | None
) -> SavedState:
    """Read the trained weights and the optimizer's state of a checkpoint, tensor by tensor, onto the devices.

    Raises InputError."""
    place = _Placing(job, planner, mesh)
    like, folder = planner.saved.params, checkpoint.folder
    if job.adapter is None:
        tensors = open_checkpoint(folder, job.args.allow_pickle).tensors
        tensors = check_tensors(tensors, job.config, str(folder), job.args.allow_nonfinite)
    else:
        tensors = peft.read_adapter(folder, job.config, job.args.allow_nonfinite)[1]
    with byte_bar("reading weights", sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors.values()), quiet):
        params = place(tensors, like)
    opt_state = _opt_state(checkpoint, planner, place, mesh)
    return SavedState(sharding.put_scalar(mesh, np.int32(checkpoint.updates)), params, opt_state)


class _Placing:
    """Place tensors, by the names of the trained parameters, in a tree like these."""

    def __init__(self, job: Job, planner: Planner, mesh: jax.sharding.Mesh):
        self._job, self._planner, self._mesh = job, planner, mesh
        self.order = parameter_order(job.config, job.adapter.lora if job.adapter else None)

    def __call__(self, tensors: dict[str, Tensor], like: Params) -> Params:
        if self._job.adapter is None:
            placed = load_params(tensors, self._job.config, self._planner.run, like, self._mesh)
        else:
            arrays = {path: tensors[name].read(()).astype(np.float32) for name, path in self.order}
            placed, _ = place_arrays(arrays, like)
        return jax.tree.map(lambda x, target: jax.device_put(x, target.sharding), placed, like)  # perhaps on the host


def _opt_state(checkpoint: TrainerCheckpoint, planner: Planner, place: _Placing, mesh: jax.sharding.Mesh) -> Any:
    """Return the optimizer's state in the form of this program's checkpoints. Raises InputError."""
    decayed, spared = _groups(place.order, planner.decayed)
    values = dict(checkpoint.by_name(decayed, spared))
    shapes = {name: shape for name, (_, shape) in _table(place).items()}
    count = sharding.put_scalar(mesh, np.int32(checkpoint.steps))

    def tensors(key: str) -> dict[str, Tensor]:
        for name, held in values.items():
            found = held.get(key)
            if not isinstance(found, Tensor) or found.shape != shapes[name]:
                shape = [*found.shape] if isinstance(found, Tensor) else "missing"
                raise InputError(
                    f"{checkpoint.folder / OPTIMIZER}: {key!r} of {name} is {shape}, should be {[*shapes[name]]}: give "
                    "the model and the adapter flags of then, or copy the file again"
                )
        return {name: held[key] for name, held in values.items()}

    def fill(node: Any) -> Any:
        if isinstance(node, ClipState):
            return ClipState(sharding.put_scalar(mesh, np.float32(0)))
        if isinstance(node, ScaleByAdamState | StoredAdamState):
            mu, nu = (place(tensors(key), like) for key, like in (("exp_avg", node.mu), ("exp_avg_sq", node.nu)))
            return node._replace(count=count, mu=mu, nu=nu)
        return node

    kinds = (ClipState, ScaleByAdamState, StoredAdamState)
    return jax.tree.map(fill, planner.saved.opt_state, is_leaf=lambda node: isinstance(node, kinds))


def _table(place: _Placing) -> dict[str, tuple[Place, tuple[int, ...]]]:
    job = place._job
    return peft.name_table(job.adapter.lora, job.config) if job.adapter else names.name_table(job.config)


def _groups(order: list[tuple[str, Place]], decayed: Params) -> tuple[list[str], list[str]]:
    """Return the names of the Trainer's two groups: parameters with weight decay, and those without."""
    stacked = is_stacked(decayed)
    groups: tuple[list[str], list[str]] = ([], [])
    for name, path in order:
        node: Any = decayed
        for key in without_layer(path) if stacked else path:
            node = node[key]
        groups[0 if node else 1].append(name)
    return groups
