"""Read a `checkpoint-N` folder of the HF Trainer without torch: progress, optimizer, schedule, generator.

Sources: `transformers.Trainer` 4.37 and 5, torch's optimizers, PEFT. `training_args.bin` is a pickle of classes and is
never read.
"""

import contextlib
import math
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.bucket import is_remote
from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object, refuse_foreign_link
from llama_jax.hf import names, peft
from llama_jax.hf.checkpoint import is_checkpoint
from llama_jax.hf.names import Path as Place
from llama_jax.hf.tensor import Tensor
from llama_jax.hf.torch_pickle import read_torch
from llama_jax.model.config import LlamaConfig
from llama_jax.model.lora import Lora
from llama_jax.reporting.comparison import BYTES, is_log

STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"

Json = dict[str, Any]

ADAMW_32 = "adamw_32bit"  # bitsandbytes' AdamW, whose moments are those of adamw_torch
# The optimizers by the keys of their state, "step" left out. 8-bit states keep small tensors in 32 bits.
_KINDS = {
    "exp_avg exp_avg_sq": "adamw_torch",
    "RMS exp_avg_sq": "adafactor",
    "RMS exp_avg_sq_col exp_avg_sq_row": "adafactor",
    "RMS exp_avg_sq exp_avg_sq_col exp_avg_sq_row": "adafactor",
    "absmax1 absmax2 qmap1 qmap2 state1 state2": "adamw_8bit",
    "state1 state2": ADAMW_32,
    "state1": "lion_32bit",
}
_OTHERS = {
    "exp_avg exp_avg_sq max_exp_avg_sq": "AdamW with amsgrad",
    "RMS exp_avg exp_avg_sq": "Adafactor with beta1",
    "RMS exp_avg exp_avg_sq_col exp_avg_sq_row": "Adafactor with beta1",
    "RMS exp_avg exp_avg_sq exp_avg_sq_col exp_avg_sq_row": "Adafactor with beta1",
    "absmax1 qmap1 state1": "lion_8bit or rmsprop_bnb_8bit",
    "momentum_buffer": "sgd with momentum",
}
_SETTINGS = {  # of a group: those that another optimizer's name stands for where they are set
    "amsgrad": "AdamW with amsgrad",
    "maximize": "an optimizer with maximize",
    "momentum": "sgd with momentum",
    "beta1": "Adafactor with beta1",
    "scale_parameter": "Adafactor with scale_parameter",
    "relative_step": "Adafactor with relative_step",
}
# The types of a state's tensors, other than float32.
_TYPES = {"exp_avg": ("bfloat16",), "exp_avg_sq": ("bfloat16",)} | dict.fromkeys(("state1", "state2"), ("uint8",))
_BNB = "__bnb_optimizer_quant_state__"  # bitsandbytes 0.49 keeps its tensors in it
# Folders and files of sharded checkpoints, with the way to whole ones; {0} is the checkpoint. The commands write
# weights alone, without config.json.
_FROM_OUT = (
    "copy config.json and the tokenizer's files to OUT, too; start from it with a new optimizer: "
    "--model_name_or_path OUT"
)
_ZERO = (
    "DeepSpeed's ZeRO shards; merge the weights by `python {0}/zero_to_fp32.py {0} OUT --safe_serialization` (a script "
    f"without this flag takes OUT/pytorch_model.bin for OUT, which --allow_pickle True reads); {_FROM_OUT}"
)
_FSDP = f"FSDP's shards; merge the weights by `accelerate merge-weights {{0}}/pytorch_model_fsdp_0 OUT`; {_FROM_OUT}"
_SHARDED = (
    ("global_step*", _ZERO),
    ("*_rank[0-9]*.bin", "FSDP's shards of each rank, which only FSDP reads; save the model there by FULL_STATE_DICT"),
    ("pytorch_model_fsdp_[0-9]*", _FSDP),
    ("optimizer_[0-9]*", _FSDP),
    (
        "rank*-of-*-optimizer.pt",
        f"FSDP's shards on XLA; merge the weights to OUT by torch_xla's consolidate_sharded_ckpts; {_FROM_OUT}",
    ),
)
_FSDP_WEIGHTS, _FSDP_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"  # by FULL_STATE_DICT, of all ranks


@dataclass(frozen=True)
class TrainerCheckpoint:
    """Hold a checkpoint of the HF Trainer: `state` is trainer_state.json, `groups` are the optimizer's groups of
    parameters and `moments` its tensors by the parameter's number, `scheduler` is the state of scheduler.pt.

    `generator` is `Resumed.generator`, None without rng_state*.pth; `ranks` is the number of these files.
    """

    folder: Path
    state: Json
    groups: list[Json]
    moments: dict[int, Json]
    scheduler: Json
    generator: Json | None
    ranks: int | None

    @property
    def updates(self) -> int:
        """Return the number of updates made."""
        return self.state["global_step"]

    @property
    def optim(self) -> str:
        """Return the optimizer whose state this is, by the names of `--optim`, or `ADAMW_32`. Raises InputError for
        others, by name."""
        keys = sorted(
            {key for values in self.moments.values() for key, value in values.items() if value is not None} - {"step"}
        )
        optim, group = _KINDS.get(" ".join(keys)), next((g for g in self.groups if g["params"]), self.groups[0])
        other = _OTHERS.get(" ".join(keys)) or next((name for key, name in _SETTINGS.items() if group.get(key)), None)
        if not keys and "momentum" in group:
            optim = "sgd"
        elif not keys:
            raise self._unusable("has an empty state (was it saved before the first update?)")
        betas = group.get("betas")
        if optim in (ADAMW_32, "adamw_8bit") and isinstance(betas, Sequence) and len(betas) > 2:
            other = "ademamix"
        if optim == "lion_32bit" and (group.get("eps") or (isinstance(betas, Sequence) and not betas[-1])):
            other = "rmsprop_bnb"  # it has an epsilon, and a second beta of 0
        if optim is None or other:
            other = other or f"an optimizer with {', '.join(keys)}"
            raise self._unusable(f"holds the state of {other}, which this program does not have")
        for key in set(keys) - {"RMS"}:
            if wrong := self._types(key) - {"float32", *_TYPES.get(key, ())}:
                raise self._unusable(f"holds {key} in {', '.join(sorted(wrong))}, as no state of {optim} does")
        if optim != "adamw_8bit" and "uint8" in self._types("state1"):
            raise self._unusable("holds state1 in uint8 without its qmap1")
        return optim

    @property
    def moments_dtype(self) -> str:
        """Return the type of AdamW's moments, "" for other optimizers. Raises InputError where they have several."""
        found = self._types("exp_avg") | self._types("exp_avg_sq")
        if self.optim != "adamw_torch":
            return "float32" if self.optim == ADAMW_32 else ""
        if len(found) != 1:
            raise self._unusable(f"holds moments in {' and '.join(sorted(found))}")
        return found.pop()

    def _types(self, key: str) -> set[str]:
        held = [values[key] for values in self.moments.values() if key in values]
        return {value.dtype.name if isinstance(value, Tensor) else type(value).__name__ for value in held}

    def _unusable(self, what: str) -> InputError:
        return InputError(f"{self.folder / OPTIMIZER}: {what}; {anew(self.folder)}")

    @property
    def steps(self) -> int:
        """Return the number of updates that the optimizer counted, the same for all parameters: fewer than the folder's
        where some were skipped, as by a loss scaler. Raises InputError."""
        path = self.folder / OPTIMIZER
        counted = sorted(
            {check_number(values["step"], path, "step") for values in self.moments.values() if "step" in values}
        )
        if len(counted) > 1:
            raise InputError(f"{path}: 'step' differs among the parameters: {[int(n) for n in counted[:4]]}")
        if counted and counted[0] > self.updates:
            raise InputError(
                f"{path}: counts {counted[0]:g} updates, and {STATE} {self.updates}: the files are of two checkpoints; "
                f"copy the folder again, or {anew(self.folder)}"
            )
        return int(counted[0]) if counted else self.updates

    def by_name(self, decayed: Sequence[str], spared: Sequence[str]) -> Iterator[tuple[str, Json]]:
        """Yield the names of trained parameters with their tensors. The Trainer's first group holds the `decayed`
        parameters, its second the others. Raises InputError for groups of other sizes."""
        sizes, wanted = [len(group["params"]) for group in self.groups], [len(decayed), len(spared)]
        if sizes != wanted:
            raise InputError(
                f"{self.folder / OPTIMIZER}: its groups hold {_and(sizes)} parameters, this run's {_and(wanted)} (with "
                "and without weight decay): give the model, the adapter flags and the --hf_compat of then"
            )
        for group, in_group in zip(self.groups, (decayed, spared), strict=True):
            for number, name in zip(group["params"], in_group, strict=True):
                yield name, self.moments.get(number, {})


def _and(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def check_number(value: Any, path: Path, key: str, below: float = math.inf) -> float:
    """Return a number from 0 to less than `below`, perhaps a tensor's. Raises InputError for another value of the
    file's key."""
    if isinstance(value, Tensor):
        value = value.read(()).tolist()
    if type(value) not in (int, float) or not 0 <= value < below or value > sys.float_info.max:
        wanted = "0 or more, and finite" if below == math.inf else f"from 0 to below {below:g}"
        raise InputError(f"{path}: {key} is {repr(value)[:40]}; should be a number {wanted}: copy the file again")
    return float(value)


@contextlib.contextmanager
def understanding(folder: Path) -> Iterator[None]:
    """Turn an exception over values of unexpected kinds into an InputError that names the checkpoint."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as e:
        why = f"{type(e).__name__}: {e}"[:100]
        raise InputError(f"{folder}: its values are not those of the HF Trainer ({why}); copy it again") from None


def is_trainers(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint of the HF Trainer, by its progress file."""
    return (folder / STATE).is_file() and not is_checkpoint(folder)


def anew(folder: Path) -> str:
    """Return the way to train on where the optimizer's state is of no use."""
    flag = "--adapter_name_or_path" if (folder / "adapter_config.json").exists() else "--model_name_or_path"
    return f"start from the weights with a new optimizer: {flag} {folder}"


def _refuse_sharded(folder: Path) -> None:
    """Refuse a checkpoint of DeepSpeed or FSDP, with the way to its weights. Raises InputError."""
    for pattern, what in _SHARDED:
        if found := sorted(folder.glob(pattern)):
            raise InputError(f"{found[0]}: is of {what.format(folder)}")
    weights = folder / _FSDP_WEIGHTS
    if found := [path for path in (weights, folder / _FSDP_OPTIMIZER) if path.exists()]:
        way = anew(folder)
        if weights.exists() and not any(folder.glob("*model*.safetensors")):
            copy = f"`mkdir OUT && cp {weights} OUT/pytorch_model.bin`"
            way = f"copy the weights by {copy}; {_FROM_OUT} --allow_pickle True"
        raise InputError(f"{found[0]}: is of FSDP's whole state, without {OPTIMIZER}; {way}")


def read_trainer_checkpoint(folder: Path) -> TrainerCheckpoint:
    """Read the small files of a checkpoint, and describe the tensors of the optimizer. Raises InputError."""
    if is_remote(folder):
        raise InputError(f"{folder}: a checkpoint of the HF Trainer is read from a local folder; copy it here")
    _refuse_sharded(folder)
    state = _read_state(folder / STATE)
    for name in (OPTIMIZER, SCHEDULER):
        if not (folder / name).exists():
            raise InputError(
                f"{folder}: holds no {name} (of a run with save_only_model?), so no run can go on from it; "
                f"{anew(folder)}"
            )
        refuse_foreign_link(folder, folder / name)
    optimizer, scheduler = read_torch(folder / OPTIMIZER), read_torch(folder / SCHEDULER)
    if not (isinstance(optimizer, dict) and _are_groups(optimizer.get("param_groups"))):
        raise InputError(f"{folder / OPTIMIZER}: param_groups is no list of groups with params; copy the file again")
    moments = optimizer.get("state")
    if not (isinstance(moments, dict) and all(isinstance(values, dict) for values in moments.values())):
        raise InputError(f"{folder / OPTIMIZER}: state is no dictionary of parameters; copy the file again")
    if not (isinstance(scheduler, dict) and isinstance(scheduler.get("last_epoch"), int)):
        raise InputError(f"{folder / SCHEDULER}: holds no last_epoch; copy the file again")
    for values in moments.values():
        if not isinstance(values.get(_BNB, {}), dict):
            raise InputError(f"{folder / OPTIMIZER}: {_BNB} is no dictionary; copy the file again")
    moments = {number: {**values.pop(_BNB, {}), **values} for number, values in moments.items()}
    _check_settings(optimizer["param_groups"], folder / OPTIMIZER)
    _check_peaks(scheduler.get("base_lrs"), folder / SCHEDULER)
    files = _generator_files(folder)
    return TrainerCheckpoint(
        folder=folder,
        state=state,
        groups=optimizer["param_groups"],
        moments=moments,
        scheduler=scheduler,
        generator=read_generator(files[0]) if files else None,
        ranks=len(files) or None,
    )


def _read_state(path: Path) -> Json:
    """Read a trainer_state.json, whose values a run carries on. Raises InputError."""
    state = read_json_object(path, BYTES)
    if type(state.get("global_step")) is not int or state["global_step"] < 1:
        raise InputError(f"{path}: global_step is {state.get('global_step')!r}; should be a number above 0")
    for key in ("epoch", "total_flos", "num_input_tokens_seen"):
        check_number(state.get(key, 0), path, key)
    batch = state.get("train_batch_size")
    if batch is not None and (type(batch) is not int or batch < 1):  # the key is of 4.35
        raise InputError(f"{path}: train_batch_size is {repr(batch)[:40]}; should be a number above 0")
    best = (("best_metric", (int, float)), ("best_global_step", (int,)), ("best_model_checkpoint", (str,)))
    for key, kinds in best:
        if (value := state.get(key)) is not None and type(value) not in kinds:
            raise InputError(
                f"{path}: {key} is {repr(value)[:40]}; should be {'a path' if str in kinds else 'a number'} or null: "
                "copy the file again"
            )
    if not 0 <= (best_step := state.get("best_global_step") or 0) <= state["global_step"]:
        raise InputError(
            f"{path}: best_global_step is {repr(best_step)[:40]}; should be from 0 to global_step, "
            f"{state['global_step']}: copy the file again"
        )
    if not isinstance(log := state.get("log_history"), list):
        raise InputError(f"{path}: log_history is missing; copy the file again")
    for number, entry in enumerate(log):
        if not is_log([entry]):
            raise InputError(
                f"{path}: log_history[{number}] is {repr(entry)[:40]}; should be an object with a step: copy the file "
                "again"
            )
    return state


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )


def _check_settings(groups: list[Json], path: Path) -> None:
    """Refuse settings of the optimizer that are no numbers, or that differ among the groups of parameters. Raises
    InputError."""
    read = []
    for group in groups:
        if not group["params"]:
            continue
        eps, betas = group.get("eps", 0.0), group.get("betas", ())
        if not isinstance(betas, tuple | list):
            raise InputError(f"{path}: betas is {repr(betas)[:40]}; should be two numbers: copy the file again")
        read.append(
            {
                "lr": check_number(group.get("lr"), path, "lr"),
                "betas": [check_number(beta, path, "betas", below=1) for beta in betas],
                "eps": [check_number(x, path, "eps") for x in (eps if isinstance(eps, tuple | list) else [eps])],
            }
        )
        decay = check_number(group.get("weight_decay", 0.0), path, "weight_decay")
        if len(read) == 2 and decay:
            raise InputError(
                f"{path}: weight_decay of the second group is {decay:g}, and the Trainer's is 0; this program has no "
                f"groups of one's own: {anew(path.parent)}"
            )
    for values in read[1:]:
        for key, value in values.items():
            if value != read[0][key]:
                raise InputError(
                    f"{path}: {key} differs among the groups of parameters, {read[0][key]} and {value}; this program "
                    f"has one for all: {anew(path.parent)}"
                )


def _check_peaks(peaks: Any, path: Path) -> None:
    """Refuse a schedule's peaks that are no numbers, or that differ. Raises InputError."""
    if peaks is None:
        return
    if not isinstance(peaks, list) or not peaks:
        raise InputError(f"{path}: base_lrs is {repr(peaks)[:40]}; should be a list of numbers: copy the file again")
    found = {check_number(peak, path, "base_lrs") for peak in peaks}
    if len(found) > 1:
        raise InputError(
            f"{path}: base_lrs differ among the groups of parameters, {sorted(found)}; this program has one for all: "
            f"{anew(path.parent)}"
        )


def _generator_files(folder: Path) -> list[Path]:
    """Return the files of the generators, of each rank one, in order. Raises InputError where one is missing or too
    many."""
    found = {path.name for path in folder.glob("rng_state*.pth")}
    ranks = [f"rng_state_{rank}.pth" for rank in range(len(found))]
    if found and found not in ({"rng_state.pth"}, set(ranks)):
        raise InputError(
            f"{folder}: holds {', '.join(sorted(found))}, which are not of one run: should be rng_state.pth alone, or "
            "rng_state_0.pth and the next ones without a gap; copy the missing ones, and remove those of other runs"
        )
    return [folder / name for name in (["rng_state.pth"] if found == {"rng_state.pth"} else ranks)]


def read_generator(path: Path) -> Json:
    """Read the state of torch's generator on the CPU, a Mersenne twister, of an rng_state.pth. Raises InputError.

    Its bytes: the seed, 8; the outputs left before the next 624, 4; a flag, 4; the next output's place, 8; 624 words of
    8 bytes; a cached normal.
    """
    refuse_foreign_link(path.parent, path)
    values = read_torch(path)
    cpu = values.get("cpu") if isinstance(values, dict) else None
    if not isinstance(cpu, Tensor) or cpu.dtype != np.uint8 or cpu.shape != (5056,):
        raise InputError(f"{path}: 'cpu' is no generator's state of 5056 bytes; copy the file again")
    data = cpu.read(()).tobytes()
    left, place = struct.unpack_from("<i4xQ", data, 8)
    words = np.frombuffer(data, np.uint64, 624, 24)
    if left not in range(1, 625) or place > 624 or words.max() >= 1 << 32:
        raise InputError(f"{path}: 'cpu' is no state of a Mersenne twister; copy the file again")
    return {"key": words.tolist(), "pos": 624 if left == 1 else place}


def parameter_order(config: LlamaConfig, lora: Lora | None) -> list[tuple[str, Place]]:
    """Return the trained parameters' names, of `names.name_table` or of `peft.name_table`, with their paths, as torch's
    model has them: by module, each with its weight before its bias, tied ones once."""
    modules = names.module_names(config)
    ends = ("weight", "bias", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    table, prefix = names.name_table(config), ""
    if lora is not None:
        table, prefix = peft.name_table(lora, config), "base_model.model."
    found = [name for module in modules for end in ends if (name := f"{prefix}{module}.{end}") in table]
    first = {path: name for name in reversed(found) for path in [table[name][0]]}
    return [(name, table[name][0]) for name in found if first[table[name][0]] == name]
