#!/usr/bin/env python3
"""Updates a second of train_jax.py's own loop and of the HF Trainer, side by side on one device, for a shape by name.

    python benchmarks/speed.py --shape llama-7b --work alpaca 4x2048 --peers trainer compiled [--json OUT.json]

Work is `alpaca`, the seed command's updates (8 examples; lengths from --data_path tokenised with --tokenizer, else
drawn with Alpaca's mean and spread), or ROWSxLENGTH, whole sequences an update. Weights and token ids are random; each
run is a process of its own. Ours takes the blocks and the recomputation that `auto` finds. The Trainer's flags are the
same: its optimizer is the installed transformers' default, and it checkpoints gradients where sequences are whole.

TFLOP/s count 6 operations a parameter (input embedding left out) and token, attention at half; MFU is over 989 TFLOP/s
(H100, H200). Real tokens only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_model import SHAPES, raw_config

PEAK = 989e12
SEED_FLAGS = (
    "--num_train_epochs 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine"
)


def lengths_of(args: argparse.Namespace) -> tuple[np.ndarray, int, int]:
    """Tokens of every example, examples a micro-batch, micro-batches an update."""
    if args.work != "alpaca":
        rows, length = map(int, args.work.split("x"))
        return np.full(rows * (args.updates + 10), length), rows, 1
    if args.data_path:
        from fill import alpaca

        return alpaca(args.tokenizer, args.data_path, 512).lengths, 1, 8
    drawn = np.random.default_rng(0).lognormal(4.72, 0.5, 52002)  # mean 127 tokens
    return np.clip(drawn, 30, 512).astype(int), 1, 8


def count_flops(raw: dict, lengths: np.ndarray) -> float:
    """Of forward and backward over examples of these lengths."""
    from llama_jax.config import LlamaConfig
    from llama_jax.dry_run import operations

    config = LlamaConfig.from_hf(raw)
    return sum(operations(config, n, n, "none")[0] for n in lengths.tolist())


def ours(args: argparse.Namespace) -> dict:
    """`fit` on a plan that `Planner` settled, from random weights made on the device."""
    from correctness import random_params

    from llama_jax import sharding
    from llama_jax.arguments import parse_arguments
    from llama_jax.config import LlamaConfig
    from llama_jax.job import make_job
    from llama_jax.plan import Planner, choose_scan
    from llama_jax.platform import memory_limit, peak_memory, set_up_jax
    from llama_jax.train import fit, init_state

    raw = raw_config(args.shape, args.layers)
    config = LlamaConfig.from_hf(raw)
    lengths, batch, accumulation = lengths_of(args)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with data.open("w") as file:
            for n in lengths:
                ids = rng.integers(0, config.vocab_size, n).tolist()
                file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
        flags = f"--model_name_or_path {folder} --data_path {data} --cache_dir {folder}/cache {SEED_FLAGS}"
        flags += f" --per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulation}"
        flags += f" --model_max_length {lengths.max()} --bf16 True --tf32 True --logging_steps 1 {args.flags}"
        arguments = parse_arguments(flags.split())
        platform = set_up_jax(arguments.use_cpu, arguments.tf32)
        mesh = sharding.make_mesh()
        job = make_job(arguments, config, lambda: Path(folder), sharding.batch_ways(mesh), True)
    planner = Planner(job, mesh, platform, arguments.dtype or "float32", choose_scan(arguments, config, platform))
    started = time.monotonic()
    plan = planner.settle(memory_limit())
    compiled_in = time.monotonic() - started

    state = init_state(random_params(planner.state.params, mesh), plan.tx, plan.run, mesh)
    done: list[tuple[float, float]] = []
    deadline = time.monotonic() + args.seconds
    fit(
        state,
        plan.steps,
        plan.batches,
        mesh,
        range(min(args.updates + 4, job.order.updates)),
        learning_rate=job.schedule.rate,
        on_update=lambda m: done.append((time.monotonic(), m.loss)),
        due=lambda step: False,
        on_due=lambda *_: None,
        stop=lambda: time.monotonic() > deadline and len(done) > 5,
    )
    examples = [job.order.examples_of(k) for k in range(len(done))]
    shapes = ",".join(f"{r}x{t}" for r, t in plan.batches.shapes)
    return {
        "device": mesh.devices.flat[0].device_kind,
        **measured(raw, lengths, [t for t, _ in done], examples),
        "memory_gib": (peak_memory() or 0) / 2**30,
        "compile_s": compiled_in,
        "detail": f"--remat {plan.run.remat}, {plan.option.max_tokens} tokens at once, blocks {shapes}",
        "losses": [loss for _, loss in done],
    }


def trainer(args: argparse.Namespace) -> dict:
    """The HF Trainer of the installed transformers, on random weights made on the device."""
    import torch
    import transformers

    raw = raw_config(args.shape, args.layers)
    lengths, batch, accumulation = lengths_of(args)
    rng = np.random.default_rng(0)

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return len(lengths)

        def __getitem__(self, i):
            return {"length": int(lengths[i]), "index": i}

    seen: list[int] = []

    def collate(items):
        seen.extend(item["index"] for item in items)
        longest = max(item["length"] for item in items)
        rows = [rng.integers(0, raw["vocab_size"], item["length"]) for item in items]
        pad = np.stack([np.pad(row, (0, longest - len(row)), constant_values=-1) for row in rows])
        ids, labels = np.where(pad < 0, 0, pad), np.where(pad < 0, -100, pad)
        return {k: torch.tensor(v) for k, v in (("input_ids", ids), ("labels", labels), ("attention_mask", pad >= 0))}

    cuda = torch.cuda.is_available()
    config = transformers.LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    with torch.device("cuda" if cuda else "cpu"):
        model = transformers.LlamaForCausalLM(config).float()
    done: list[float] = []
    deadline = time.monotonic() + args.seconds

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, _, state, control, **__):
            if cuda:
                torch.cuda.synchronize()
            done.append(time.monotonic())
            control.should_training_stop = len(done) >= 6 and time.monotonic() > deadline

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            bf16=True,
            max_steps=args.updates + 4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=2e-5,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            gradient_checkpointing=args.work != "alpaca",
            torch_compile=args.only == "compiled",
            use_cpu=not cuda,
            tf32=True if cuda else None,
        )
        started = time.monotonic()
        run = transformers.Trainer(model, arguments, train_dataset=Data(), data_collator=collate, callbacks=[Clock()])
        run.train()
    per_update = batch * accumulation
    examples = [np.asarray(seen[k * per_update : (k + 1) * per_update]) for k in range(len(done))]
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        **measured(raw, lengths, done, examples),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0,
        "compile_s": done[0] - started,
        "detail": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


def measured(raw: dict, lengths: np.ndarray, done: list[float], examples: list[np.ndarray]) -> dict:
    """Of all updates but the first three and the last: milliseconds with their spread, and what the device did in them.

    Metrics of an update are read when the device is some way into the next one, those of the last one at once.
    """
    laps = np.diff(done)[2:-1]
    each = [lengths[i] for i in examples[3:-1]]
    seconds, tokens = laps.sum(), sum(int(x.sum()) for x in each)
    rate = sum(count_flops(raw, x) for x in each) / seconds
    return {
        "updates": len(laps),
        "ms": 1000 * laps.mean(),
        "ms_median": 1000 * float(np.median(laps)),
        "ms_spread": [1000 * float(x) for x in np.quantile(laps, (0.1, 0.9))],
        "tokens_an_update": tokens / len(laps),
        "tokens_s": tokens / seconds,
        "tflops": rate / 1e12,
        "mfu": rate / PEAK,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--work", nargs="+", default=["alpaca"], help="alpaca, or ROWSxLENGTH")
    parser.add_argument("--peers", nargs="*", choices=["trainer", "compiled"], default=["trainer"])
    parser.add_argument("--flags", default="", help="further flags of train_jax.py, as one word")
    parser.add_argument("--updates", type=int, default=40, help="timed at most, between three and one that are not")
    parser.add_argument("--seconds", type=float, default=20, help="of training in each run, at least six updates")
    parser.add_argument("--data_path", type=Path, help="alpaca_data.json")
    parser.add_argument("--tokenizer", type=Path, help="folder of a LLaMA tokenizer")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args()
    if args.only:
        args.work = args.work[0]
        print("RESULT " + json.dumps((ours if args.only == "ours" else trainer)(args)))
        return
    print(f"{args.shape}: {args.layers or SHAPES[args.shape][3]} layers\n")
    print("| work | run | ms an update (10-90%) | tokens | tokens/s | TFLOP/s | MFU | GiB | compile s | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    results = []
    for work in args.work:
        for run in ("ours", *args.peers):
            command = [sys.executable, __file__, *sys.argv[1:], "--work", work, "--only", run]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [x for x in made.stdout.splitlines() if x.startswith("RESULT ")]
            if not lines:
                print(f"| {work} | {run} | failed: {made.stderr.strip().splitlines()[-1][:200]} |", flush=True)
                continue
            r = json.loads(lines[0].removeprefix("RESULT "))
            results.append({"shape": args.shape, "work": work, "run": run, **r})
            spread = "-".join(f"{x:,.1f}" for x in r["ms_spread"])
            print(
                f"| {work} | {run} | {r['ms']:,.1f} ({spread}) | {r['tokens_an_update']:,.0f} | {r['tokens_s']:,.0f} | "
                f"{r['tflops']:,.0f} | {r['mfu']:.1%} | {r['memory_gib']:.1f} | {r['compile_s']:.0f} | {r['detail']} |",
                flush=True,
            )
    if results:
        print(f"\non {results[0]['device']}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
