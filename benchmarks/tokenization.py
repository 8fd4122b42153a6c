#!/usr/bin/env python3
"""Measure seconds and peak memory of preparing Alpaca: cold, from the cache, and in stanford_alpaca's own way.

stanford_alpaca calls transformers 4.37's LlamaTokenizer on each text and each prompt alone; its row needs the packages
that `make test` installs. Each row is a process of its own; imports are not counted; ids and labels are compared.

    .venv/bin/python benchmarks/tokenization.py --tokenizer ../shared/data/llama-tokenizer --data_path alpaca_data.json
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".venv" / "transformers-4.37"
CONFIG = {"vocab_size": 32000, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}


def ours(tokenizer: Path, data: Path, limit: int) -> tuple[float, list[np.ndarray]]:
    """Prepare the examples as a run does, with the cache of XDG_CACHE_HOME."""
    from llama_jax.model.config import LlamaConfig
    from llama_jax.setup.arguments import parse_arguments
    from llama_jax.setup.job import make_job

    config = LlamaConfig.from_hf({"model_type": "llama", "num_hidden_layers": 1, **CONFIG}, "config.json")
    flags = {"model_name_or_path": tokenizer, "data_path": data, "model_max_length": limit}
    args = parse_arguments([str(x) for name, value in flags.items() for x in (f"--{name}", value)])
    started = time.perf_counter()
    examples = make_job(args, config, lambda: tokenizer, 1).examples
    return time.perf_counter() - started, [examples.input_ids, examples.labels]


def stanford_alpacas(tokenizer: Path, data: Path, limit: int) -> tuple[float, list[np.ndarray]]:
    """Tokenise the texts one by one, then the prompts; a prompt's length masks the labels."""
    import torch  # noqa: F401  # the import is not counted
    from transformers import LlamaTokenizer

    from llama_jax.data.examples import IGNORE_INDEX, alpaca_prompt

    started = time.perf_counter()
    opened = LlamaTokenizer.from_pretrained(tokenizer, model_max_length=limit, padding_side="right")
    opened.add_special_tokens({"pad_token": "[PAD]"})
    records = json.loads(data.read_text(encoding="utf-8"))
    prompts = [alpaca_prompt(record) for record in records]
    texts = [prompt + record["output"] + opened.eos_token for prompt, record in zip(prompts, records, strict=True)]

    def ids_of(text: str) -> Any:
        return opened(text, return_tensors="pt", padding="longest", max_length=limit, truncation=True).input_ids[0]

    ids = [ids_of(text) for text in texts]
    lengths = [int(ids_of(prompt).ne(opened.pad_token_id).sum()) for prompt in prompts]
    labels = [example.clone() for example in ids]
    for label, length in zip(labels, lengths, strict=True):
        label[:length] = IGNORE_INDEX
    seconds = time.perf_counter() - started
    return seconds, [np.concatenate([x.numpy() for x in parts]).astype(np.int32) for parts in (ids, labels)]


def measure(way: str, args: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Measure a row in a process of its own."""
    path = [str(ROOT), *([str(PEER)] if way == "alpaca" else [])]
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu"}
    given = [str(args.tokenizer), str(args.data_path), str(args.model_max_length)]
    done = subprocess.run([sys.executable, __file__, "--row", way, *given], env=environment, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def row(way: str, tokenizer: str, data: str, limit: str) -> None:
    prepare = stanford_alpacas if way == "alpaca" else ours
    seconds, arrays = prepare(Path(tokenizer), Path(data), int(limit))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest = hashlib.blake2b(b"".join(array.tobytes() for array in arrays)).hexdigest()
    print(json.dumps({"seconds": seconds, "peak": peak * 1024, "tokens": len(arrays[0]), "digest": digest}))


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        return row(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with LLaMA's tokenizer.model")
    parser.add_argument("--data_path", type=Path, required=True, help="alpaca_data.json")
    parser.add_argument("--model_max_length", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        rows = {
            "train_jax.py, first start": measure("cold", args, cache),
            "train_jax.py, second start": measure("warm", args, cache),
            "stanford_alpaca's way": measure("alpaca", args, cache),
        }
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| way | seconds | peak memory, MB |\n|---|--:|--:|")
    for name, found in rows.items():
        print(f"| {name} | {found['seconds']:.2f} | {found['peak'] / 1e6:,.0f} |")
    same = len({found["digest"] for found in rows.values()}) == 1
    tokens = next(iter(rows.values()))["tokens"]
    print(f"\n{tokens:,} tokens; ids and labels of all three are {'equal' if same else 'NOT equal'}.")


if __name__ == "__main__":
    main()
