#!/usr/bin/env python3
"""Time the README's Alpaca command in train_jax.py and in the HF Trainer: loading, start, an update.

    python benchmarks/seed.py --model HF_DIR --data_path alpaca_data.json [--flags "--use_cpu True"]

Three times are measured: weights onto the device, the command to its first update, and an update. `make_model.py` makes
a folder of any shape. The peer does the work of stanford_alpaca's train.py before its first update, and its Trainer
takes the same examples in the same order. Each run is a process of its own; train_jax.py runs once with empty caches
and once with the caches of the first run. All are killed after a number of updates. The weights are read once before,
so that every run finds them in the page cache. Then the page cache is dropped, and the weights are read and loaded from
the disk.

With --lora both train LoRA, r=16 on all linear layers, the peer by PEFT, and the reading alone is left out.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FLAGS = "--bf16 True --num_train_epochs 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 "
FLAGS += "--save_strategy no --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine "
FLAGS += "--logging_steps 1 --tf32 True --report_to none"
LORA = "--use_peft True --lora_r 16 --lora_alpha 32 --lora_dropout 0 --lora_target_modules all-linear --dtype bfloat16"
WARM = 3  # updates that are not timed
PIECE = 2**26  # bytes
PARTS = ("read_files", "load_ours", "load_peer")


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_files(args: argparse.Namespace) -> None:
    """Read the files by several threads, each its own pieces, from the page cache or the disk."""
    threads = 8

    def read(first: int) -> None:
        buffer = bytearray(PIECE)
        for path, at in pieces[first::threads]:
            with path.open("rb", buffering=0) as file:
                file.seek(at)
                file.readinto(buffer)

    pieces = [(path, at) for path in weights(args.model) for at in range(0, path.stat().st_size, PIECE)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))


def forget_files(args: argparse.Namespace) -> None:
    """Drop the files from the page cache."""
    for path in weights(args.model):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_ours(args: argparse.Namespace) -> float:
    """Load the weights; return the time at which libraries and device were ready."""
    import jax

    from llama_jax.distributed import sharding
    from llama_jax.hf.source import Source
    from llama_jax.model.llama import RunOptions

    mesh = sharding.make_mesh()
    began = time.monotonic()
    jax.block_until_ready(Source(args.model).load(RunOptions(param_dtype="float32"), mesh))
    return began


def load_peer(args: argparse.Namespace) -> float:
    """Load the weights as `load_ours` does, with transformers."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = transformers.AutoModelForCausalLM.from_pretrained  # the first use of the name imports the class
    torch.zeros(1, device=device)
    began = time.monotonic()
    model = load(args.model, dtype=torch.float32, device_map=device)
    if device == "cuda":
        torch.cuda.synchronize()
    del model
    return began


def train_peer(args: argparse.Namespace) -> None:
    """Train with the HF Trainer as stanford_alpaca does: tokenise everything, each prompt twice, then train."""
    import torch
    import transformers

    from llama_jax.data.examples import alpaca_prompt

    cuda = torch.cuda.is_available()
    dtype, place = (torch.bfloat16, "cuda" if cuda else "cpu") if args.lora else (torch.float32, None)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, device_map=place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, model_max_length=512, padding_side="right")
    if args.lora:
        from peft import LoraConfig, get_peft_model

        tokenizer.pad_token = tokenizer.eos_token
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer))

    def encode(text: str):
        return tokenizer(text, return_tensors="pt", padding="longest", max_length=512, truncation=True).input_ids[0]

    data = []
    for record in json.loads(args.data_path.read_bytes()):
        prompt = alpaca_prompt(record)
        ids = encode(prompt + record["output"] + tokenizer.eos_token)
        labels = ids.clone()
        labels[: len(encode(prompt))] = -100
        data.append({"input_ids": ids, "labels": labels})

    def collate(items):
        pads = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {k: pad([x[k] for x in items], batch_first=True, padding_value=v) for k, v in pads.items()}
        return batch | {"attention_mask": batch["input_ids"].ne(tokenizer.pad_token_id)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            bf16=True,
            num_train_epochs=1,
            gradient_accumulation_steps=8,
            per_device_train_batch_size=1,
            learning_rate=2e-5,
            warmup_steps=0.03,  # a ratio, as transformers 5 takes it
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,  # then each log line is printed
            report_to="none",
            tf32=True if cuda else None,
            use_cpu=not cuda,
        )
        transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate).train()


def run(name: str, command: list[str], env: dict[str, str], updates: int) -> dict:
    """Run a command until a number of updates is logged, then kill it.

    Returns seconds to the first update, seconds of each later update, and the log.
    """
    started = time.monotonic()
    command = ["/usr/bin/env", "PYTHONUNBUFFERED=1", *command]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=env, text=True, start_new_session=True
        )
        done, losses = [], []
        try:
            assert process.stdout
            for line in process.stdout:
                if "'loss'" in line:
                    done.append(time.monotonic())
                    losses.append(line.strip())
                if len(done) == updates:
                    break
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if "it/s]" not in line and "B/s]" not in line]
    if len(done) < updates:
        sys.exit(f"{name} ended after {len(done)} updates:\n" + "\n".join(said[-15:]))
    laps = 1000 * np.diff(done)[WARM - 1 :]
    result = {"run": name, "first_update_s": done[0] - started, "ms": laps.tolist(), "log": losses, "said": said}
    late = f", first update after {done[0] - started:.1f} s"
    timed = f", {laps.mean():,.1f} ms an update (median {np.median(laps):,.1f}, {len(laps)} timed)" if len(laps) else ""
    print(name + late + timed, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="HF folder with a LLaMA tokenizer")
    parser.add_argument("--data_path", type=Path, required=True, help="alpaca_data.json")
    parser.add_argument("--flags", default="", help="further flags of train_jax.py, as one word")
    parser.add_argument("--updates", type=int, default=80, help="by train_jax.py with caches; 0: only read and load")
    parser.add_argument("--peer_updates", type=int, default=9, help="by the HF Trainer")
    parser.add_argument("--lora", action="store_true", help="LoRA over a base in bfloat16")
    parser.add_argument("--json", type=Path, help="write all figures and logs there")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one part, in this process
    args = parser.parse_args()
    if args.only:
        started = time.monotonic()
        began = globals()[args.only](args) or started
        print(f"{args.only} {time.monotonic() - began:.2f} s, after {began - started:.2f} s of start")
        return
    again = [sys.executable, __file__, *sys.argv[1:], "--only"]
    read_files(args)
    size = sum(path.stat().st_size for path in weights(args.model)) / 1e9
    for part, cold in () if args.lora else (*((p, False) for p in PARTS), *((p, True) for p in PARTS)):
        if cold:
            forget_files(args)
        said = subprocess.run([*again, part], capture_output=True, text=True, check=False)
        line = (said.stdout.strip() or said.stderr.strip()).splitlines()[-1]
        rate = f" ({size / float(line.split()[1]):.1f} GB/s)" if line.startswith(part) else ""
        print(f"{size:.1f} GB from {'the disk' if cold else 'the page cache'}, {line}{rate}", flush=True)
    if args.updates == 0:
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = {"model_name_or_path": args.model, "data_path": args.data_path, "output_dir": f"{folder}/out"}
        ours = [sys.executable, str(ROOT / "train_jax.py"), *(str(x) for k, v in paths.items() for x in (f"--{k}", v))]
        ours += [*FLAGS.split(), *(LORA.split() if args.lora else ()), *args.flags.split()]
        caches = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
        results = [
            run("train_jax.py, empty caches", ours, caches, 1),
            run("train_jax.py, its caches", ours, caches, args.updates),
            run("HF Trainer", [*again, "train_peer"], dict(os.environ), args.peer_updates),
        ]
    _, mine, peer = results
    n = len(peer["ms"])
    same = np.mean(mine["ms"][:n])
    print(f"updates {WARM + 1} to {WARM + n}: {same:,.1f} ms and {np.mean(peer['ms']):,.1f} ms, ", end="")
    print(f"{np.mean(peer['ms']) / same:.1f} times as fast")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
