"""Make the run's first updates with the real Trainer and with this program, each in a process of its own.

The Trainer makes them twice, in float32 and in float64. The difference is torch's own error, and `proof.bounds` makes
of it the bound of the difference between the programs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from llama_jax.distributed.platform import free_memory
from llama_jax.proof.bounds import ROUNDOFF, bound_of
from llama_jax.proof.child import Failed, ask, run_python
from llama_jax.proof.torch_layers import FLOAT32
from llama_jax.proof.verdict import Curves, Row, bounded
from llama_jax.reporting.progress import say
from llama_jax.setup.adapters import SETTINGS
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job

SECTION = "updates, float32"
_PROCESS = ["-m", "llama_jax.proof.trainer_process"]
_INITIAL = "initial.safetensors"
_RATE = 2.0**-22  # relative: both programs round a rate of float64, and products on the way, to float32
MOST = 0.5  # a bound above it would hold for weights that stay as they are
# Of a parameter in float64: 40 of weight, gradient, two moments and a temporary, and 20 of activations, as measured. No
# other program takes as much: they run one after another. (Peaks for SmolLM2-135M: Trainer in float64 7.5 GiB, in
# float32 4.1, this program 4.1; the process that compares them waits with 1.4, which `free_memory` leaves out.)
_EXACT_BYTES = 60

# Flags that decide the updates, by names of TrainingArguments.
_TRAINERS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate"),
    *("lr_scheduler_type", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy"),
)
# Further flags of ours, which the Trainer gets in other forms or which choose how the same updates are computed.
_OURS = (
    *("warmup_ratio", "warmup_steps", "lr_scheduler_kwargs", "use_peft", *(SETTINGS.keys() - {"lora_dropout"})),
    *("packing", "max_tokens_per_device", "remat", "attention", "scan_layers", "cache_dir"),
)
# What decides a row, by its kind; a row that fails has it as a note. The table of docs/parity.md has the same flags.
ADVICE = {
    "order of the examples": "compare --seed, --data_seed, --per_device_train_batch_size, "
    "--gradient_accumulation_steps, --train_sampling_strategy, --dataloader_drop_last",
    "learning rate": "compare --learning_rate, --lr_scheduler_type, --lr_scheduler_kwargs, --warmup_steps, "
    "--warmup_ratio",
    "loss": "compare the labels, --label_smoothing_factor",
    "gradient norm": "where the loss of this update holds, rows of the changes name the parameter",
    "weights": "compare --optim, --adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay, --max_grad_norm",
}


@dataclass(frozen=True)
class Made:
    """Hold what a program did: for each update loss, rate, norm and numbers of the examples; and the weights, in a file
    or in the exported folder."""

    losses: list[float]
    rates: list[float]
    norms: list[float]
    examples: list[list[int]]
    weights: Path


class Compared(NamedTuple):
    """Hold the rows of the updates, and the curves of both programs."""

    rows: list[Row]
    curves: Curves


def compare_updates(
    job: Job, model: Path, tokenizer: Path, layers: int | None, count: int, exported: Callable[[Path], list[Row]]
) -> Compared:
    """Compare the first `count` updates of a job's run, of the first `layers` layers (None: all) of the HF folder
    `model`. `exported` returns rows of the folder that the run exports. A program that fails is a row that fails."""
    if reason := _reason(job, layers, count):
        return Compared([Row(SECTION, "the Trainer's updates", None, None, None, reason)], {})
    try:
        return _compared(job, model, tokenizer, layers, count, exported)
    except Failed as e:
        return Compared([Row(SECTION, "both programs end well", None, None, False, str(e))], {})


def _compared(
    job: Job, model: Path, tokenizer: Path, layers: int | None, count: int, exported: Callable[[Path], list[Row]]
) -> Compared:
    """Make the updates and compare them. Raises Failed."""
    with TemporaryDirectory(prefix="llama_jax-parity-") as temporary:
        folder = Path(temporary)
        if layers or job.new_ids:
            given = {"model": str(model), "layers": layers, "new_tokens": len(job.new_ids)}
            model = folder / "model"
            _ask(given | {"prepared": str(model)}, folder)
        args = replace(job.args, max_steps=count)
        say(f"parity: the Trainer makes {count} updates, in float32 and in float64")
        trainers, exact = (_trainers(args, job, model, folder, is_exact) for is_exact in (False, True))
        say(f"parity: train_jax.py makes the {count} updates")
        ours = _ours(args, job, model, tokenizer, folder)
        # optax rounds b2 and 1 - b2^k to float32, off by u / (1 - b2) at most; a step has its root. Torch has float64.
        correction = ROUNDOFF[FLOAT32] / (1 - args.adam_beta2) / 2 if args.optim.startswith("adamw") else 0.0
        rows = _rows(ours, trainers, exact, folder / _INITIAL, layers or job.config.num_hidden_layers, correction)
        curves: Curves = {
            "loss": {"HF Trainer": trainers.losses, "llama_jax": ours.losses},
            "gradient norm": {"HF Trainer": trainers.norms, "llama_jax": ours.norms},
        }
        return Compared(rows + exported(ours.weights), curves)


def _reason(job: Job, layers: int | None, count: int) -> str:
    """Return why the updates cannot be compared, "" where they can."""
    args = job.args
    if args.load_in_4bit or args.load_in_8bit:
        return "the Trainer quantizes on a GPU alone; leave --load_in_4bit and --load_in_8bit out"
    if args.adapter_name_or_path:
        return "an adapter that goes on is not compared; leave --adapter_name_or_path out"
    if job.order.ranks > 1:
        return f"the Trainer makes them in one process, this run has {job.order.ranks} ranks; leave --world_size out"
    if args.adam_moments_dtype == "bfloat16":
        return "the Trainer's moments are float32; leave --adam_moments_dtype out"
    if args.optim not in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor"):
        return f"--optim {args.optim}: the Trainer has it for a GPU alone, or by another package"
    share = (layers or job.config.num_hidden_layers) / job.config.num_hidden_layers
    head = job.config.vocab_size * job.config.hidden_size * (1 if job.config.tie_word_embeddings else 2)
    needed = _EXACT_BYTES * (head + share * (job.config.num_parameters - head))
    if needed > (memory := free_memory()):
        most = int(((memory / _EXACT_BYTES) - head) / (job.config.num_parameters - head) * job.config.num_hidden_layers)
        fix = "free memory, or use a larger machine" + (f", or --shrink {most}" if most > 0 else "")
        return f"{count} updates in float64 need {needed / 2**30:.3g} GiB, free are {memory / 2**30:.3g}: {fix}"
    return ""


def _trainers(args: Arguments, job: Job, model: Path, folder: Path, exact: bool) -> Made:
    """Make the updates with the Trainer."""
    weights = folder / f"trainer-{'exact' if exact else 'float32'}.safetensors"
    flags = {name: getattr(args, name) for name in _TRAINERS}
    # Version 5 reads a share below 1 so, and has no warmup_ratio.
    flags |= {"warmup_steps": args.warmup_steps or args.warmup_ratio, "lr_scheduler_kwargs": args.schedule_kwargs}
    flags |= {"max_steps": args.max_steps, "output_dir": str(folder / "trainer"), "use_cpu": True, "report_to": []}
    flags |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "remove_unused_columns": False}
    spec = {
        "model": str(model),
        "examples": str(_records(job, folder)),
        "flags": flags,
        "exact": exact,
        "weights": str(weights),
    }
    spec |= {"initial": None if exact else str(folder / _INITIAL)}  # the same in float64
    done = _ask(spec | {"peft": _peft(job)}, folder)["updates"]
    losses, rates, norms, numbers = ([update[key] for update in done] for key in ("loss", "rate", "norm", "examples"))
    return Made(losses, rates, norms, numbers, weights)


def _peft(job: Job) -> dict[str, Any] | None:
    """Return the keywords of PEFT's LoraConfig. Both programs leave dropout out: their generators draw otherwise."""
    if job.adapter is None:
        return None
    left_out = ("peft_type", "peft_version", "inference_mode")
    return {key: value for key, value in job.adapter.values.items() if key not in left_out} | {"lora_dropout": 0.0}


def _records(job: Job, folder: Path) -> Path:
    """Return the file of the job's examples, by which both programs take the same ids and labels."""
    path = folder / "examples.jsonl"
    if not path.exists():
        with path.open("w") as file:
            for i in range(len(job.examples)):
                ids, labels = (array.tolist() for array in job.examples[i])
                file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    return path


def _ask(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the answer of `trainer_process`. Raises Failed."""
    variables = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    return ask("the Trainer", _PROCESS, variables, spec, folder)


def _ours(args: Arguments, job: Job, model: Path, tokenizer: Path, folder: Path) -> Made:
    """Make the updates by train_jax.py on one CPU device, under the rules of transformers 5, which is installed."""
    output = folder / "ours"
    flags = {name: value for name in (*_TRAINERS, *_OURS) if (value := getattr(args, name)) is not None}
    flags |= {"model_name_or_path": model, "tokenizer_name": tokenizer, "data_path": _records(job, folder)}
    flags |= {"output_dir": output, "max_steps": args.max_steps, "hf_compat": "5", "world_size": 1}
    flags |= {"use_cpu": True, "dtype": "float32", "save_strategy": "no", "report_to": "none"}
    flags |= {"logging_strategy": "steps", "logging_steps": 1} | ({"lora_dropout": 0.0} if args.use_peft else {})
    command = ["-m", "train_jax"]
    for name, value in flags.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    run_python("train_jax.py", command, {"XLA_FLAGS": ""})
    log = [x for x in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in x]
    order = replace(job.order, compat="5", max_steps=args.max_steps)
    examples = [order.examples_of(k).tolist() for k in range(args.max_steps)]
    losses, rates, norms = ([entry[key] for entry in log] for key in ("loss", "learning_rate", "grad_norm"))
    return Made(losses, rates, norms, examples, output)


def _rows(ours: Made, trainers: Made, exact: Made, initial: Path, layers: int, correction: float) -> list[Row]:
    """Return the rows of each update, and of each parameter's change over all of them.

    `correction` bounds by how much of itself the change of a weight is off beside torch's error. A loss or norm is off
    by the same part of its own change, to first order.
    """
    rows = []
    for k, wanted in enumerate(trainers.examples):
        row = Row(SECTION, f"update {k + 1}: order of the examples", None, None, ours.examples[k] == wanted)
        differ = f"this program takes {ours.examples[k]}, the Trainer {wanted}; "
        rows.append(_advised(row, "order of the examples", differ))
    for k, rate in enumerate(trainers.rates):
        off = _off(ours.rates[k], rate, rate)
        rows.append(_advised(bounded(SECTION, f"update {k + 1}: learning rate", off, _RATE), "learning rate"))
    for name, values in (("loss", "losses"), ("gradient norm", "norms")):
        mine, theirs, right = (getattr(made, values) for made in (ours, trainers, exact))
        worst = moved = 0.0  # an error of the weights stays
        for k, value in enumerate(mine):
            worst, moved = max(worst, _off(theirs[k], right[k], right[k])), max(moved, abs(right[k] - right[0]))
            bound = bound_of(FLOAT32, worst, layers) + (correction * moved / abs(right[k]) if right[k] else 0.0)
            row = bounded(SECTION, f"update {k + 1}: {name}", _off(value, theirs[k], right[k]), bound)
            rows.append(_advised(row, "weights" if k else name))  # later, the weights differ
    return rows + _changes([ours.weights, trainers.weights, exact.weights, initial], layers, correction)


def _advised(row: Row, kind: str, before: str = "") -> Row:
    """Return a row with the advice of its kind as its note, where it fails."""
    return replace(row, note=before + ADVICE[kind]) if row.holds is False else row


def _off(value: float, other: float, right: float) -> float:
    return abs(value - other) / abs(right) if right else float(value != other)


def _changes(paths: list[Path], layers: int, correction: float) -> list[Row]:
    """Return the row of each trained parameter. The paths hold the weights of this program, of the Trainer, of the
    exact Trainer, and those before."""
    ours, trainers, exact, before = map(_tensors, paths)
    rows = []
    for name in sorted(ours.keys() | trainers.keys()):
        if name not in ours or name not in trainers:
            note = f"is among {'this program' if name in ours else 'the Trainer'}'s weights alone"
            rows.append(Row(SECTION, f"change of {name}", None, None, False, note))
        else:
            mine, theirs, right, first = (f[name]().astype(np.float64) for f in (ours, trainers, exact, before))
            rows.append(_change(f"change of {name}", mine, theirs, right, first, layers, correction))
    return rows


def _change(
    name: str,
    ours: np.ndarray,
    trainers: np.ndarray,
    exact: np.ndarray,
    before: np.ndarray,
    layers: int,
    correction: float,
) -> Row:
    """Return the row of a parameter: the difference of its changes, relative to the exact change. `correction` is added
    to the bound. A change within float32's rounding of its weight is not compared."""
    if ours.shape != trainers.shape:
        note = f"has shape {list(ours.shape)} here, {list(trainers.shape)} by the Trainer"
        return Row(SECTION, name, None, None, False, note)
    moves, theirs_moves = (bool((after != before).any()) for after in (ours, trainers))
    if moves != theirs_moves:
        return Row(SECTION, name, None, None, False, f"changes {'here' if moves else 'by the Trainer'} alone")
    if not moves:
        return Row(SECTION, name, None, None, None, "stays as it is in both programs: the rate is 0 or below rounding")
    change = float(np.linalg.norm(exact - before))
    off, error = (float(np.linalg.norm(x)) / change for x in (ours - trainers, trainers - exact))
    bound = bound_of(FLOAT32, error, layers) + correction
    if bound >= MOST:
        note = "its change is within float32's rounding: raise --learning_rate or --updates"
        return Row(SECTION, name, off, bound, None, note)
    return _advised(bounded(SECTION, name, off, bound), "weights")


def _tensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Return the readers of the tensors in a file, or in the files of an exported folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    opened = [safe_open(file, "np") for file in files]
    return {name: partial(file.get_tensor, name) for file in opened for name in list(file.keys())}
