#!/usr/bin/env python3
"""From the command to the first update, and an HF folder onto the device: train_jax.py and the HF Trainer side by side.

    python benchmarks/start.py --model HF_DIR --data_path alpaca_data.json [--flags "--use_cpu True"]

`make_model.py` makes a folder of any shape. Both run the seed's flags; the peer does what stanford_alpaca's train.py
does before its first update. Each run is a process of its own, ours once with empty caches and once with its own. The
weights are read once before, so that both find them in the page cache.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FLAGS = "--bf16 True --num_train_epochs 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 "
FLAGS += "--save_strategy no --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine "
FLAGS += "--logging_steps 1 --tf32 True --report_to none"


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_files(args: argparse.Namespace) -> None:
    """One thread, into one buffer: what the page cache gives."""
    buffer = bytearray(2**26)
    for path in weights(args.model):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load_ours(args: argparse.Namespace) -> None:
    import jax

    from llama_jax import sharding
    from llama_jax.hf.source import Source
    from llama_jax.model import RunOptions

    jax.block_until_ready(Source(args.model).load(RunOptions(param_dtype="float32"), sharding.make_mesh()))


def load_peer(args: argparse.Namespace) -> None:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, device_map=device)
    if device == "cuda":
        torch.cuda.synchronize()
    del model


def train_peer(args: argparse.Namespace) -> None:
    """stanford_alpaca's way to the HF Trainer: tokenise everything, each prompt twice, then train."""
    import torch
    import transformers

    from llama_jax.data.examples import alpaca_prompt
    from llama_jax.files import read_json

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, model_max_length=512, padding_side="right")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer))

    def encode(text: str):
        return tokenizer(text, return_tensors="pt", padding="longest", max_length=512, truncation=True).input_ids[0]

    data = []
    for record in read_json(args.data_path):
        prompt = alpaca_prompt(record)
        ids = encode(prompt + record["output"] + tokenizer.eos_token)
        labels = ids.clone()
        labels[: len(encode(prompt))] = -100
        data.append({"input_ids": ids, "labels": labels})

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, _, state, control, **__):
            print(f"first update done {time.time() - args.started:.1f} s after the start", file=sys.stderr, flush=True)
            os._exit(0)

    def collate(items):
        pads = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {k: pad([x[k] for x in items], batch_first=True, padding_value=v) for k, v in pads.items()}
        return batch | {"attention_mask": batch["input_ids"].ne(tokenizer.pad_token_id)}

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            bf16=True,
            gradient_accumulation_steps=8,
            per_device_train_batch_size=1,
            report_to="none",
            use_cpu=not cuda,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[Stop()])
        trainer.train()


def first_update(command: list[str], env: dict[str, str], log: Path) -> str:
    """Seconds to the first update, as the command says it; it is then killed."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        try:
            while process.poll() is None and "first update done" not in log.read_text():
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = [line for line in log.read_text().splitlines() if "first update done" in line]
    return said[0].split("done ")[1] if said else "failed: " + log.read_text().strip().splitlines()[-1][:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="HF folder with a LLaMA tokenizer")
    parser.add_argument("--data_path", type=Path, required=True, help="alpaca_data.json")
    parser.add_argument("--flags", default="", help="further flags of train_jax.py, as one word")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        started = time.monotonic()
        globals()[args.only](args)
        print(f"{args.only} {time.monotonic() - started:.2f} s")
        return
    read_files(args)
    size = sum(path.stat().st_size for path in weights(args.model)) / 1e9
    for name in ("read_files", "load_ours", "load_peer"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        line = (said.stdout.strip() or said.stderr.strip()).splitlines()[-1]
        seconds = line.removeprefix(name).removesuffix(" s")
        rate = f" ({size / float(seconds):.1f} GB/s)" if line.startswith(name) else ""
        print(f"{size:.1f} GB, {line}{rate}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
        paths = [
            "--model_name_or_path",
            str(args.model),
            "--data_path",
            str(args.data_path),
            "--output_dir",
            f"{folder}/out",
        ]
        seeds = [sys.executable, str(ROOT / "train_jax.py"), *paths, *FLAGS.split(), *args.flags.split()]
        for caches in ("cold", "warm"):
            said = first_update(seeds, env, Path(folder) / f"{caches}.log")
            print(f"train_jax.py, {caches} caches: first update {said}", flush=True)
        peer = [sys.executable, __file__, *sys.argv[1:], "--only", "train_peer", "--started", str(time.time())]
        print(f"HF Trainer: first update {first_update(peer, env, Path(folder) / 'peer.log')}", flush=True)


if __name__ == "__main__":
    main()
