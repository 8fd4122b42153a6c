"""Make the run's first updates with the real Trainer and with this program, each in a process of its own.

The Trainer makes them twice, in float32 and in float64. The difference is torch's own error, and `proof.bounds` makes
of it the bound of the difference between the programs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from llama_jax.base.errors import InputError
from llama_jax.base.versions import versions
from llama_jax.distributed.platform import host_memory
from llama_jax.proof.bounds import ROUNDOFF, bound_of
from llama_jax.proof.torch_layers import FLOAT32
from llama_jax.proof.verdict import Curves, Row, bounded
from llama_jax.reporting.progress import say
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job

SECTION = "updates, float32"
_PROCESS = Path(__file__).with_name("trainer_process.py")
_INITIAL = "initial.safetensors"
_RATE = 2.0**-22  # relative: both programs round a rate of float64, and products on the way, to float32
_EXACT_BYTES = 40  # of a parameter in float64: weight, gradient, two moments, a temporary

# Flags that decide the updates, by names of TrainingArguments.
_TRAINERS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate"),
    *("lr_scheduler_type", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy"),
)
# Flags of our run that this section sets itself, or that would make it do other work.
_LEFT_OUT = {
    *("output_dir", "overwrite_output_dir", "max_steps", "bf16", "fp8", "dtype", "tf32", "use_cpu", "lora_dropout"),
    *("resume_from_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("eval_data_path", "eval_strategy", "eval_on_start", "eval_steps", "eval_tasks", "eval_tasks_limit", "do_eval"),
    *("save_strategy", "save_steps", "save_total_limit", "logging_strategy", "logging_steps", "logging_first_step"),
    *(
        "report_to",
        "sample_prompts",
        "compare_with",
        "config",
        "hf_compat",
        "profile_updates",
        "export_only",
        "run_name",
    ),
}


@dataclass(frozen=True)
class Made:
    """Hold what a program did: for each update loss, rate, norm and numbers of the examples, and the weights' file."""

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
    `model`. `exported` returns rows of the folder that the run exports. Raises InputError."""
    if reason := _reason(job, layers, count):
        return Compared([Row(SECTION, "the Trainer's updates", None, None, None, reason)], {})
    with TemporaryDirectory(prefix="llama_jax-parity-") as temporary:
        folder = Path(temporary)
        if layers is not None:
            _ask({"model": str(model), "layers": layers, "shrunk": str(folder / "model")})
            model = folder / "model"
        args = replace(job.args, max_steps=count)
        say(f"parity: the Trainer makes {count} updates, in float32 and in float64")
        trainers, exact = (_trainers(args, job, model, folder, is_exact) for is_exact in (False, True))
        say(f"parity: train_jax.py makes the {count} updates")
        ours = _ours(args, job, model, tokenizer, folder)
        # optax rounds b2 and 1 - b2^k to float32, off by u / (1 - b2) at most; a step has its root. Torch has float64.
        correction = ROUNDOFF[FLOAT32] / (1 - args.adam_beta2) / 2
        rows = _rows(ours, trainers, exact, folder / _INITIAL, layers or job.config.num_hidden_layers, correction)
        curves: Curves = {"loss": {"HF Trainer": trainers.losses, "llama_jax": ours.losses}}
        if ours.norms:
            curves["gradient norm"] = {"HF Trainer": trainers.norms, "llama_jax": ours.norms}
        return Compared(rows + (exported(ours.weights.parent) if job.adapter is None else []), curves)


def _reason(job: Job, layers: int | None, count: int) -> str:
    """Return why the updates cannot be compared, "" where they can."""
    args = job.args
    if args.load_in_4bit or args.load_in_8bit:
        return "the Trainer quantizes on a GPU alone; leave --load_in_4bit and --load_in_8bit out"
    if args.adapter_name_or_path:
        return "an adapter that goes on is not compared; leave --adapter_name_or_path out"
    if job.order.ranks > 1:
        return f"the Trainer makes them in one process, this run has {job.order.ranks} ranks; leave --world_size out"
    if args.optim not in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor"):
        return f"--optim {args.optim}: the Trainer has it for a GPU alone, or by another package"
    share = (layers or job.config.num_hidden_layers) / job.config.num_hidden_layers
    head = job.config.vocab_size * job.config.hidden_size * (1 if job.config.tie_word_embeddings else 2)
    needed = _EXACT_BYTES * (head + share * (job.config.num_parameters - head))
    if needed > (memory := host_memory()):
        most = int(((memory / _EXACT_BYTES) - head) / (job.config.num_parameters - head) * job.config.num_hidden_layers)
        fix = f"compare fewer layers, --shrink {most}" if most > 0 else "use a larger machine"
        return f"{count} updates in float64 need {needed / 2**30:.3g} GiB, the host has {memory / 2**30:.3g}: {fix}"
    return ""


def _trainers(args: Arguments, job: Job, model: Path, folder: Path, exact: bool) -> Made:
    """Make the updates with the Trainer."""
    examples, weights = folder / "examples.npz", folder / f"trainer-{'exact' if exact else 'float32'}.safetensors"
    if not examples.exists():
        pairs = [job.examples[i] for i in range(len(job.examples))]
        ids, labels = (np.concatenate([pair[i] for pair in pairs]).astype(np.int32) for i in (0, 1))
        np.savez(examples, ids=ids, labels=labels, lengths=[len(ids) for ids, _ in pairs])
    flags = {name: getattr(args, name) for name in _TRAINERS}
    # Version 5 reads a share below 1 so, and has no warmup_ratio.
    flags |= {"warmup_steps": args.warmup_steps or args.warmup_ratio, "lr_scheduler_kwargs": args.schedule_kwargs}
    flags |= {"max_steps": args.max_steps, "output_dir": str(folder / "trainer"), "use_cpu": True, "report_to": []}
    flags |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "remove_unused_columns": False}
    spec = {"model": str(model), "examples": str(examples), "flags": flags, "exact": exact, "weights": str(weights)}
    spec |= {"initial": str(folder / _INITIAL)}
    done = _ask(spec | {"new_tokens": len(job.new_ids), "peft": _peft(job)})["updates"]
    losses, rates, norms, numbers = ([update[key] for update in done] for key in ("loss", "rate", "norm", "examples"))
    return Made(losses, rates, norms, numbers, weights)


def _peft(job: Job) -> dict[str, Any] | None:
    """Return the keywords of PEFT's LoraConfig. Both programs leave dropout out: their generators draw otherwise."""
    if job.adapter is None:
        return None
    left_out = ("peft_type", "peft_version", "inference_mode")
    return {key: value for key, value in job.adapter.values.items() if key not in left_out} | {"lora_dropout": 0.0}


def _ask(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of `trainer_process`. Raises InputError where it fails."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(_PROCESS)]
    done = subprocess.run(command, input=json.dumps(spec), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        error = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"parity: the Trainer cannot make these updates: {error}")
    return json.loads(done.stdout.splitlines()[-1])


def _ours(args: Arguments, job: Job, model: Path, tokenizer: Path, folder: Path) -> Made:
    """Make the updates by train_jax.py, under the rules of the installed Trainer. Raises InputError."""
    compat = "5" if int(versions("transformers")["transformers"].partition(".")[0]) >= 5 else "4.37"
    output, flags = folder / "ours", list[str]()
    for field in fields(args):
        value = getattr(args, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default and field.name not in _LEFT_OUT:
            words = value if isinstance(value, list | tuple) else [value]
            flags += [f"--{field.name}", *map(str, words)]
    for name, value in {
        "model_name_or_path": model,
        "tokenizer_name": tokenizer,
        "output_dir": output,
        "max_steps": args.max_steps,
        "hf_compat": compat,
        "use_cpu": args.use_cpu,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "report_to": "none",
        "lora_dropout": 0.0 if args.use_peft else None,
    }.items():
        flags += [] if value is None else [f"--{name}", str(value)]
    command = [sys.executable, "-m", "train_jax", *flags]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        error = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"parity: train_jax.py cannot make these updates: {error}")
    log = [x for x in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in x]
    order = replace(job.order, compat=compat, max_steps=args.max_steps)
    examples = [order.examples_of(k).tolist() for k in range(args.max_steps)]
    name = "adapter_model.safetensors" if job.adapter else "model.safetensors"
    norms = [x["grad_norm"] for x in log] if compat == "5" else []  # 4.37 logs none
    return Made([x["loss"] for x in log], [x["learning_rate"] for x in log], norms, examples, output / name)


def _rows(ours: Made, trainers: Made, exact: Made, initial: Path, layers: int, correction: float) -> list[Row]:
    """Return the rows of each update, and of each parameter's change over all of them.

    `correction` bounds by how much of itself the change of a weight is off beside torch's error. A loss or norm is off
    by the same part of its own change, to first order.
    """
    rows = []
    # 4.37 rounds a logged loss to 4 decimals; its runs have no norms.
    rounded = 0.0 if ours.norms else 5e-5
    for k, wanted in enumerate(trainers.examples):
        same = ours.examples[k] == wanted
        note = "" if same else f"this program takes {ours.examples[k]}, the Trainer {wanted}"
        rows.append(Row(SECTION, f"update {k + 1}: examples", None, None, same, note))
    for k, rate in enumerate(trainers.rates):
        off = _off(ours.rates[k], rate, rate)
        rows.append(bounded(SECTION, f"update {k + 1}: learning rate", off, _RATE))
    for name, values in (("loss", "losses"), ("gradient norm", "norms")):
        mine, theirs, right = (getattr(made, values) for made in (ours, trainers, exact))
        worst = moved = 0.0  # an error of the weights stays
        for k, value in enumerate(mine):
            worst, moved = max(worst, _off(theirs[k], right[k], right[k])), max(moved, abs(right[k] - right[0]))
            absolute = correction * moved + (rounded if name == "loss" else 0.0)
            bound = bound_of(FLOAT32, worst, layers) + (absolute / abs(right[k]) if right[k] else 0.0)
            rows.append(bounded(SECTION, f"update {k + 1}: {name}", _off(value, theirs[k], right[k]), bound))
    return rows + _changes([ours.weights, trainers.weights, exact.weights, initial], layers, correction)


def _off(value: float, other: float, right: float) -> float:
    return abs(value - other) / abs(right) if right else float(value != other)


def _changes(paths: list[Path], layers: int, correction: float) -> list[Row]:
    """Return the row of each trained parameter: the difference of its changes, relative to the exact change. The files
    hold the weights of this program, of the Trainer, of the exact Trainer, and those before. `correction` is added to
    each bound."""
    rows = []
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "np")) for path in paths]
        names, wanted = (set(file.keys()) for file in files[:2])
        for name in sorted(names ^ wanted):
            owner = "this program's" if name in names else "the Trainer's"
            rows.append(Row(SECTION, f"change of {name}", None, None, False, f"is among {owner} weights alone"))
        for name in sorted(names & wanted):
            mine, theirs, right, before = (file.get_tensor(name).astype(np.float64) for file in files)
            if mine.shape != theirs.shape:
                note = f"has shape {list(mine.shape)} here, {list(theirs.shape)} by the Trainer"
                rows.append(Row(SECTION, f"change of {name}", None, None, False, note))
                continue
            change = np.linalg.norm(right - before)
            off, error = (float(np.linalg.norm(x) / change) if change else 0.0 for x in (mine - theirs, theirs - right))
            bound = bound_of(FLOAT32, error, layers) + correction
            rows.append(bounded(SECTION, f"change of {name}", off, bound))
    return rows
