#!/usr/bin/env python3
"""Time updates on a CPU by train_jax.py and by the HF Trainer, in turns, on the same records in float32.

    python benchmarks/cpu.py --model HF_DIR --data_path alpaca_data.json

HF_DIR is a folder with weights and tokenizer; side_by_side.py says how to make one of SmolLM2-135M. Each run is a
process. The first run of train_jax.py has empty caches, the later ones use its caches. Printed are the medians of all
updates but each run's first, with the peak memory of the process. CPU seconds count all threads: on a machine at other
work they vary less than time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def train_peer(args: argparse.Namespace) -> None:
    """Train with the HF Trainer, each micro-batch padded to its longest record."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    data = [{k: torch.tensor(v) for k, v in record.items()} for record in json.loads(args.data_path.read_bytes())]

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {k: pad([x[k] for x in items], True, v) for k, v in (("input_ids", 0), ("labels", -100))}
        return batch | {"attention_mask": pad([torch.ones_like(x["input_ids"]) for x in items], True)}

    kind: Any = transformers.TrainingArguments
    parser = transformers.HfArgumentParser(kind)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags_of(args), "--output_dir", folder, "--disable_tqdm", "True"]  # then each log line is printed
        (arguments,) = parser.parse_args_into_dataclasses(flags)
        transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate).train()


def flags_of(args: argparse.Namespace) -> list[str]:
    batch = f"--per_device_train_batch_size {args.batch} --gradient_accumulation_steps {args.accumulation} "
    batch += f"--max_steps {args.updates} --learning_rate 2e-5 --lr_scheduler_type cosine --logging_steps 1 "
    return (batch + "--save_strategy no --use_cpu True --report_to none").split()


def run(command: list[str], env: dict[str, str], updates: int) -> dict[str, Any]:
    """Run a command until its last update is logged, then kill it. Returns the seconds to the first update, the seconds
    and CPU seconds of each later update, and the GiB of the process at its peak."""
    started, done, spent = time.monotonic(), [], []
    env = env | {"PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env, text=True)
        assert process.stdout
        for line in process.stdout:
            if "'loss'" in line:
                done.append(time.monotonic())
                spent.append(cpu_seconds(process.pid))
            if len(done) == updates:
                break
        process.kill()
        _, _, used = os.wait4(process.pid, 0)
        if len(done) < updates:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} ended after {len(done)} updates:\n{errors.read()[-3000:]}")
    result = {"first_s": done[0] - started, "gib": used.ru_maxrss / 2**20}
    return result | {"updates_s": np.diff(done).tolist(), "updates_cpu_s": np.diff(spent).tolist()}


def cpu_seconds(pid: int) -> float:
    """Return the seconds of processors that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data_path", type=Path, required=True, help="alpaca_data.json")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--model_max_length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="records of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of an update")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--flags", default=[""], nargs="+", help="further flags of train_jax.py, a word for each variant"
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.peer:
        return train_peer(args)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        from side_by_side import tokenized

        data = tokenized(args.model, args.data_path, args.records, args.model_max_length, folder / "data.json")
        own = [sys.executable, str(ROOT / "train_jax.py"), "--model_name_or_path", str(args.model), "--data_path"]
        own += [str(data), "--output_dir", str(folder / "out"), "--dtype", "float32", *flags_of(args)]
        given = ["--batch", args.batch, "--accumulation", args.accumulation, "--updates", args.updates]
        peer = [sys.executable, __file__, "--peer", "--model", args.model, "--data_path", data, *given]
        commands = {f"train_jax.py {flags}".strip(): [*own, *flags.split()] for flags in args.flags}
        commands["HF Trainer"] = [str(part) for part in peer]
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                env = os.environ | {"XDG_CACHE_HOME": str(folder / name.replace(" ", "_"))}
                results[name].append(run(command, env, args.updates))
                print(name, json.dumps(results[name][-1]), file=sys.stderr, flush=True)
    print("| run | first update, empty caches | with caches | update | CPU seconds of it | peak GiB |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, runs in results.items():
        later = np.median([r["first_s"] for r in runs[1:]]) if runs[1:] else np.nan
        update, spent = (np.median([r[key] for r in runs]) for key in ("updates_s", "updates_cpu_s"))
        most = max(r["gib"] for r in runs)
        print(f"| {name} | {runs[0]['first_s']:.1f} s | {later:.1f} s | {update:.3f} s | {spent:.3f} | {most:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
