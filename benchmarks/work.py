"""Define the work that `speed.py` and its peers are timed at, and the figures of a run."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.model.config import LlamaConfig
from llama_jax.model.lora import Lora
from llama_jax.plan.operations import operations

PEAK = 989e12
PROFILED = 4  # updates, after the timed ones
SEED_FLAGS = (
    "--num_train_epochs 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine"
)


def lengths_of(args: argparse.Namespace, ranks: int) -> tuple[np.ndarray, int, int]:
    """Return tokens of every example, and for each rank examples a micro-batch and micro-batches an update."""
    if not args.work.startswith("alpaca"):
        rows, length = map(int, args.work.split("x"))
        return np.full(rows * ranks * (args.updates + PROFILED + 10), length), rows, 1
    micro_batches = int(args.work.removeprefix("alpaca").removeprefix("-") or 8) // ranks
    if args.data_path:
        from fill import alpaca

        return alpaca(args.tokenizer, args.data_path, 512).lengths, 1, micro_batches
    drawn = np.random.default_rng(0).lognormal(4.72, 0.5, 52002)  # mean 127 tokens
    return np.clip(drawn, 30, 512).astype(int), 1, micro_batches


def planner_of(args: argparse.Namespace, raw: dict, devices: list | None = None) -> Any:
    """Return the planner of a run of `args.work` with train_jax.py's `args.flags`, over random token ids: on these
    devices of a dry run, else on those that jax finds, for which jax is set up. The peers' processes need no jax."""
    from llama_jax.distributed import sharding
    from llama_jax.distributed.platform import set_up_jax
    from llama_jax.plan.planner import Planner, choose_scan
    from llama_jax.setup.arguments import parse_arguments
    from llama_jax.setup.job import make_job

    config, rng = LlamaConfig.from_hf(raw), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        flags = f"--model_name_or_path {folder} --data_path {data} --cache_dir {folder}/cache {SEED_FLAGS}"
        flags += f" --bf16 True --logging_steps 1 {args.flags}"
        arguments = parse_arguments(flags.split())
        platform = devices[0].platform if devices else set_up_jax(arguments.use_cpu, arguments.tf32 is not False)
        mesh = sharding.make_mesh(devices, arguments.mesh)
        lengths, batch, accumulation = lengths_of(args, sharding.batch_ways(mesh))
        arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = batch, accumulation
        arguments.model_max_length = int(lengths.max())
        with data.open("w") as file:
            for n in lengths:
                ids = rng.integers(0, config.vocab_size, n).tolist()
                file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
        job = make_job(arguments, config, lambda: Path(folder), sharding.batch_ways(mesh), True)
    return Planner(job, mesh, platform, arguments.dtype or "float32", choose_scan(job, platform))


def count_flops(raw: dict, lengths: np.ndarray, lora: Lora | None = None) -> float:
    """Count the operations of forward and backward over examples of these lengths, with adapters or without."""
    config = LlamaConfig.from_hf(raw)
    return sum(operations(config, n, n, "none", lora)[0] for n in lengths.tolist())


def measured(
    raw: dict,
    lengths: np.ndarray,
    done: list[float],
    examples: list[np.ndarray],
    devices: int = 1,
    lora: Lora | None = None,
) -> dict:
    """Return the figures of all updates but the first three and the last.

    Milliseconds with their spread, tokens an update on all devices, and the rate of one device. Metrics of an update
    are read while the device computes the next update, metrics of the last update at once.
    """
    laps = np.diff(done)[2:-1]
    each = [lengths[i] for i in examples[3:-1]]
    seconds, tokens = laps.sum(), sum(int(x.sum()) for x in each)
    rate = sum(count_flops(raw, x, lora) for x in each) / seconds
    return {
        "updates": len(laps),
        "ms": 1000 * laps.mean(),
        "ms_median": 1000 * float(np.median(laps)),
        "ms_spread": [1000 * float(x) for x in np.quantile(laps, (0.1, 0.9))],
        "tokens_an_update": tokens / len(laps),
        "tokens_s": tokens / seconds / devices,
        "tflops": rate / 1e12 / devices,
        "mfu": rate / PEAK / devices,
    }
