"""Make of a run's checkpoint the folder from which the HF Trainer goes on."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import numpy as np

from llama_jax.base.bucket import is_remote
from llama_jax.base.errors import InputError, plain
from llama_jax.base.files import make_output_dir, write_json
from llama_jax.data.order import Order, generator_after
from llama_jax.data.tokenizer import copy_tokenizer
from llama_jax.distributed import sharding
from llama_jax.hf import convert, names, peft
from llama_jax.hf.checkpoint import host_state
from llama_jax.hf.names import Path
from llama_jax.hf.source import Source
from llama_jax.hf.trainer_checkpoint import STATE, parameter_order
from llama_jax.hf.trainer_writer import (
    CALLBACKS,
    WRITABLE,
    import_torch,
    write_generators,
    write_optimizer,
    write_scheduler,
)
from llama_jax.model.config import LlamaConfig, RopeConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.roles import is_stacked
from llama_jax.reporting.progress import say
from llama_jax.run.checkpoint import find_steps, number
from llama_jax.run.handover import Handover
from llama_jax.run.resume import Facts, SavedRun
from llama_jax.run.trainers_state import deal, leaf_at
from llama_jax.training.optimizer import decayed_roles
from llama_jax.training.schedule import LISTENING, make_schedule, warmup_updates

Json = dict[str, Any]
FLAG = "--to_hf_trainer"


def hand_back(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """Write the folder: weights and tokenizer, or the adapter, optimizer, schedule, progress and generators.

    The folder appears whole: files are written beside it first. The host holds the checkpoint's arrays. Raises
    InputError before the first file is written."""
    saved = _open(checkpoint, folder)
    make_output_dir(folder)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.resolve().parent) as temporary:
        part = pathlib.Path(temporary, folder.name)
        part.mkdir()
        _write(saved, checkpoint, part)
        part.chmod(folder.stat().st_mode)
        part.replace(folder)


def _write(saved: SavedRun, checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """Write all files of the folder."""
    config, done = _config(saved.facts.model), saved.trainer_state["global_step"]
    adapter = peft.read_adapter(checkpoint, config) if saved.facts.adapter else None
    lora = adapter[0].lora if adapter else None
    arrays, order = host_state(checkpoint), _order(saved)
    if adapter:
        tensors = [(name, tensor.read(())) for name, tensor in adapter[1].items()]
        peft.write_adapter(folder, tensors, adapter[0])
        copy_tokenizer(checkpoint, folder)
    else:
        convert.to_hf(Source(checkpoint), folder, None, verify=False)
    scheduler, rate = _schedule(saved, order)
    write_scheduler(folder, scheduler)
    definition = define(config, RunOptions(lora=lora), sharding.make_mesh())
    parameters = parameter_order(config, lora)
    groups = deal(parameters, definition.having(*decayed_roles(order.compat, config.model_type)))
    shapes = peft.name_table(lora, config) if lora else names.name_table(config)
    moments = {name: _moments(arrays, path, shapes[name][1]) for name, path in parameters}
    moments = {name: held for name, held in moments.items() if held}
    write_optimizer(folder, saved.facts.optim, groups, _settings(saved.facts, rate), moments)
    files = ["rng_state.pth"] if order.ranks == 1 else [f"rng_state_{k}.pth" for k in range(order.ranks)]
    write_generators(folder, generator_after(order, done), order.seed, files)
    write_json(folder / STATE, _progress(saved))


def _open(checkpoint: pathlib.Path, folder: pathlib.Path) -> SavedRun:
    """Read the JSON of a checkpoint that can go back. Raises InputError."""
    import_torch(FLAG)
    if is_remote(checkpoint) or is_remote(folder):
        raise InputError(f"{FLAG}: reads and writes local folders; copy {checkpoint} here")
    if number(checkpoint.name) not in find_steps(checkpoint.parent):
        raise InputError(f"{FLAG} takes a run's checkpoint-N as --model_name_or_path; {checkpoint} is none")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"--output_dir {folder}: is not empty, and the Trainer would read its files; name a new folder"
        )
    saved = SavedRun.read(checkpoint)
    if (named := number(folder.name)) not in (-1, step := saved.trainer_state["global_step"]):
        raise InputError(f"--output_dir {folder}: holds update {step}, not {named}; call it checkpoint-{step}")
    if saved.facts.optim not in WRITABLE:
        known = f"{', '.join(WRITABLE)} can go back"
        raise InputError(f"{FLAG}: {checkpoint} was made by --optim {saved.facts.optim}; {known}")
    if not saved.facts.update:
        why = "is of before 2026-11-28 and lacks the run's flags"
        raise InputError(f"{FLAG}: {checkpoint} {why}: resume it to save anew")
    return saved


def _progress(saved: SavedRun) -> Json:
    """Return trainer_state.json, and report what does not go back."""
    state = saved.trainer_state
    if best := state["best_model_checkpoint"]:
        say(
            f"warning: the best checkpoint so far, {plain(best)}, stays where it is: the Trainer keeps its metric alone"
        )
    if left := [action for action in saved.left if action.endswith("evaluate")]:
        say(f"warning: an evaluation was still due ({', '.join(left)}): the Trainer leaves it out")
    callbacks = {"stateful_callbacks": CALLBACKS} if "stateful_callbacks" in state else {}
    return {**state, "best_model_checkpoint": None, **callbacks}


def _config(values: Json) -> LlamaConfig:
    """Return the architecture in a checkpoint's JSON, of any time: a field that is missing has its default."""

    def of(kind: Any, found: Json) -> Any:
        known = {f.name for f in dataclasses.fields(kind)} & found.keys()
        return kind(**{key: tuple(v) if isinstance(v := found[key], list) else v for key in known})

    return of(LlamaConfig, {**values, "rope": of(RopeConfig, values.get("rope", {}))})


def _order(saved: SavedRun) -> Order:
    """Return the order of a run's examples, but for their lengths."""
    known = {f.name for f in dataclasses.fields(Order) if f.init} & saved.facts.order.keys()
    log = saved.trainer_state["log_history"]
    return Order(
        **{key: saved.facts.order[key] for key in known},
        evaluated=tuple(entry["step"] for entry in log if "eval_loss" in entry),
        resumed=Handover(**saved.handover).resumed if saved.handover else None,
    )


def _schedule(saved: SavedRun, order: Order) -> tuple[Json, float]:
    """Return the state of torch's scheduler, and the rate of the next update."""
    flags, done = saved.facts.update, saved.trainer_state["global_step"]
    kind, peak = flags["lr_scheduler_type"], flags["learning_rate"]
    warmup = warmup_updates(flags["warmup_steps"], flags["warmup_ratio"], order.updates)
    schedule = make_schedule(kind, peak, warmup, order.updates, order.compat, flags["lr_scheduler_kwargs"])
    schedule.load(saved.schedule)
    if saved.handover:
        schedule.give(saved.handover["updates"], saved.handover["rate"])
    rate = schedule.rate(done)
    if kind not in LISTENING:
        state = {"base_lrs": [peak] * 2, "last_epoch": done, "_step_count": done + 1, "lr_lambdas": [None] * 2}
        return {**state, "_is_initial": False, "_get_lr_called_within_step": False, "_last_lr": [rate] * 2}, rate
    heard = saved.schedule
    state = {"best": heard["best"], "num_bad_epochs": heard["bad"], "cooldown_counter": heard["cooling"]}
    if "good" in heard:
        state |= {"num_good_epochs": heard["good"], "warmup_counter": heard["warming"]}
        state |= {"reset_start": heard["until_reset"]}
        if heard["window"]:
            state["_streaming_avg"] = {"values": heard["window"], "sum": heard["sum"]}
    return {**state, "last_epoch": len(order.evaluated), "_last_lr": [rate] * 2}, rate


def _settings(facts: Facts, rate: float) -> list[Json]:
    """Return the settings of the two groups, by torch's names."""
    flags = facts.update
    common = {"lr": rate, "initial_lr": flags["learning_rate"]}
    if facts.optim == "adamw_torch":
        common |= {"betas": (flags["adam_beta1"], flags["adam_beta2"]), "eps": flags["adam_epsilon"]}
    return [{**common, "weight_decay": decay} for decay in (flags["weight_decay"], 0.0)]


def _moments(arrays: Json, path: Path, shape: tuple[int, ...]) -> Json:
    """Return the state of a parameter as torch's optimizer has it, without the mesh's padding; {} for none."""
    node = _counting(arrays["opt_state"])
    if node is None:
        return {}

    def part(key: str) -> np.ndarray:
        leaf = leaf_at(node[key], path)
        return leaf[path[1]] if is_stacked(node[key]) and path[0] == "layers" else leaf

    count = int(node["count"])
    if "v_row" not in node:
        inside = tuple(map(slice, shape))
        step = np.asarray(count, np.float32)
        return {"step": step, "exp_avg": part("mu")[inside], "exp_avg_sq": part("nu")[inside]}
    state: Json = {"step": count, "RMS": 0.0}
    if len(shape) == 1:
        return {**state, "exp_avg_sq": part("v")[: shape[0]]}
    padded = leaf_at(arrays["params"], path).shape
    for key, axis in zip(("v_row", "v_col"), np.argsort(padded).tolist(), strict=True):
        other = 1 - axis
        means = part(key)[: shape[axis]] * np.float32(padded[other] / shape[other])
        state[f"exp_avg_sq_{('row', 'col')[axis]}"] = means
    return state


def _counting(node: Any) -> Json | None:
    """Return the part of optax's state, as orbax has it, that counts updates; None where there is none."""
    if isinstance(node, dict) and "count" in node:
        return node
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((found for value in inside if (found := _counting(value))), None)
