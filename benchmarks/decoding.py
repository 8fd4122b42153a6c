#!/usr/bin/env python3
"""Time generation by `model.generate` and by transformers, side by side, for a shape by name.

    python benchmarks/decoding.py --shape llama-7b --batch 1 32 --prompt 512 --new 128 --runs ours static

Weights are random, in bfloat16 on a GPU and in float32 on a CPU, and prompts are random ids of one length. Each run is
a process of its own. `first` is the time from the prompts to the first token of each, compiled before; `tokens/s`
counts all rows from the second token on; the floor reads the weights and the filled cache once a token at --bandwidth.
Medians of --repeats. `dynamic` and `static` are the caches of transformers; it compiles its step with the static cache.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_model import SHAPES, raw_config

OURS, PEERS = ("ours", "scanned", "int8"), ("dynamic", "static")


def ours(args: argparse.Namespace, raw: dict, ids: np.ndarray) -> dict:
    """Time `Decoding` over layers one by one; stacked for the run `scanned`, with projections in 8 bits for `int8`."""
    import jax
    import jax.numpy as jnp
    from correctness import random_params
    from flax import nnx

    from llama_jax.distributed import sharding
    from llama_jax.distributed.platform import memory_use, set_up_jax
    from llama_jax.distributed.profile import time_spent, tracing
    from llama_jax.model.attention import Kernel, choose_kernel
    from llama_jax.model.config import LlamaConfig
    from llama_jax.model.definition import define
    from llama_jax.model.generate import Decoding
    from llama_jax.model.llama import RunOptions
    from llama_jax.model.quantized import Quantization

    platform = set_up_jax(args.use_cpu)
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = sharding.make_mesh(jax.devices()[:1])
    dtype = jnp.bfloat16 if platform == "gpu" else jnp.float32
    config = LlamaConfig.from_hf(raw)
    kernel, _ = choose_kernel(
        "auto", platform, mesh.devices.flat[0].device_kind, config.head_dim, jnp.dtype(dtype).name
    )
    run = RunOptions(
        param_dtype=jnp.dtype(dtype),
        scan_layers=args.only == "scanned",
        attention=Kernel(kernel, 1),
        quantization=Quantization(8) if args.only == "int8" else None,
    )
    definition = define(config, run, mesh)
    with jax.set_mesh(mesh):
        model = nnx.merge(definition.graphdef, random_params(definition.params, mesh))

        def once() -> tuple[float, float]:
            started = time.monotonic()
            decoding = Decoding(model, ids.tolist(), args.new)
            first = time.monotonic() - started
            while not decoding.finished:
                decoding.step(args.new)
            return first, time.monotonic() - started - first

        compiled = sum(once())
        times = [once() for _ in range(args.repeats)]
        profile = {}
        if args.profile:
            trace = Path(args.profile)
            with tracing(trace):
                once()
            spent, kernels = time_spent(trace, args.new)
            profile = {**spent, "kernels": kernels[:40]}
    return {**_measured(args, times, compiled), "memory_gib": memory_use()[0] / 2**30, "profile": profile}


def theirs(args: argparse.Namespace, raw: dict, ids: np.ndarray) -> dict:
    """Time transformers' greedy `generate` with the cache of this name."""
    import torch
    import transformers

    gpu = torch.cuda.is_available() and not args.use_cpu
    config = transformers.LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    with torch.device("cuda" if gpu else "cpu"):
        torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
        model = transformers.LlamaForCausalLM(config).eval()
        inputs = torch.tensor(ids)

    def once(new: int) -> float:
        started = time.monotonic()
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=args.only,
        )
        assert out.shape[1] == ids.shape[1] + new
        if gpu:
            torch.cuda.synchronize()
        return time.monotonic() - started

    compiled = once(1) + once(args.new)
    once(args.new)  # a static cache compiles again for the first reuse
    firsts = [once(1) for _ in range(args.repeats)]
    times = [(first, once(args.new) - first) for first in firsts]
    memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan")
    return {**_measured(args, times, compiled), "memory_gib": memory}


def _measured(args: argparse.Namespace, times: list[tuple[float, float]], compiled: float) -> dict:
    first, rest = np.median(times, axis=0)
    low, high = (float(x) for x in np.quantile([r for _, r in times], (0, 1)))
    rate = args.batch[0] * (args.new - 1) / rest
    return {"first_s": float(first), "tokens_s": float(rate), "spread": (high - low) / rest, "compile_s": compiled}


def floor(raw: dict, args: argparse.Namespace, batch: int, run: str) -> float:
    """Return the tokens a second at which the weights and the filled part of the cache are read once a token."""
    from llama_jax.model.config import LlamaConfig

    config, itemsize = LlamaConfig.from_hf(raw), 4 if args.use_cpu else 2
    head = config.vocab_size * config.hidden_size
    layers = config.num_parameters - (1 if config.tie_word_embeddings else 2) * head
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (args.prompt + args.new / 2)
    read = itemsize * (head + batch * cache) + (1 if run == "int8" else itemsize) * layers
    return batch * args.bandwidth / read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", nargs="+", choices=OURS + PEERS, default=["ours"])
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes a second, for the floor")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--profile", help="folder for a trace of ours")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", choices=OURS + PEERS, help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args()
    raw = raw_config(args.shape, args.layers)
    if args.only:
        ids = np.random.default_rng(0).integers(3, raw["vocab_size"], (args.batch[0], args.prompt))
        print("RESULT " + json.dumps((ours if args.only in OURS else theirs)(args, raw, ids)))
        return
    print("| batch | run | first token ms | tokens/s | spread | of the floor | GiB | compile s |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for batch in args.batch:
        for run in args.runs:
            most = floor(raw, args, batch, run)
            command = [sys.executable, __file__, *sys.argv[1:], "--batch", str(batch), "--only", run]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [x for x in made.stdout.splitlines() if x.startswith("RESULT ")]
            if not lines:
                print(f"| {batch} | {run} | failed: {made.stderr.strip()[-1500:]} |", flush=True)
                continue
            r = json.loads(lines[0].removeprefix("RESULT "))
            results.append({"batch": batch, "run": run, "floor": most, **r})
            print(
                f"| {batch} | {run} | {1000 * r['first_s']:.1f} | {r['tokens_s']:,.0f} | {r['spread']:.1%} | "
                f"{r['tokens_s'] / most:.0%} | {r['memory_gib']:.1f} | {r['compile_s']:.1f} |",
                flush=True,
            )
            for kernel in r.get("profile", {}).get("kernels", []):
                print("   ", kernel)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
