#!/usr/bin/env python3
"""Time the updates of train_jax.py's own loop and of its peers (`peers.py`), side by side, for a shape by name.

    python benchmarks/speed.py --shape llama-7b --work alpaca 4x2048 --peers trainer fsdp [--json OUT.json]

Work is `alpaca`, updates of 8 examples with Alpaca's lengths, `alpaca-64` with another number, or ROWSxLENGTH, whole
sequences of each rank in an update. Alpaca's lengths come from --data_path and --tokenizer, else are drawn with the
data's mean and spread. Weights and token ids are random. Each run is a process of its own and takes all visible
devices: ours by `--flags "--mesh fsdp=2,tensor=2"`, with fsdp times data ranks, the peers with a rank a device. Ours
takes the blocks and the recomputation that `auto` finds.

Figures are of one device. TFLOP/s count 6 operations a parameter (input embedding left out) and token, 4 where adapters
freeze it, attention at half; MFU is over 989 TFLOP/s (H100, H200). Only real tokens count.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_model import SHAPES, raw_config
from work import PROFILED, measured, planner_of

PEERS = ("trainer", "compiled", "fsdp", "fsdp_checkpointed", "peft", "peft_compiled", "peft_checkpointed")


def ours(args: argparse.Namespace) -> dict:
    """Time `fit` on a plan that `Planner` settled, from random weights made on the device."""
    from correctness import random_params

    from llama_jax.distributed import sharding
    from llama_jax.distributed.platform import memory_limit, memory_use
    from llama_jax.distributed.profile import time_spent, tracing
    from llama_jax.training.fit import fit
    from llama_jax.training.state import init_state

    raw = raw_config(args.shape, args.layers)
    planner = planner_of(args, raw)
    job, mesh, lengths = planner.job, planner.mesh, planner.job.examples.lengths
    started = time.monotonic()
    plan = planner.settle(memory_limit())
    compiled_in = time.monotonic() - started

    params, offload = random_params(planner.definition.params, mesh), planner.job.args.offload_optimizer
    state = init_state(params, plan.tx, plan.definition, mesh, offload)
    done: list[tuple[float, float]] = []
    deadline = time.monotonic() + args.seconds

    def go(state, updates: range):
        return fit(
            *(state, plan.steps, plan.batches, mesh, updates),
            learning_rate=job.schedule.rate,
            on_update=lambda m: done.append((time.monotonic(), m.loss)),
            due=lambda step: False,
            on_due=lambda k, state, stopping: stopping,
            stop=lambda: time.monotonic() > deadline and len(done) > 5,
        )

    state = go(state, range(min(args.updates + 4, job.order.updates)))
    timed, memory, profile = len(done), memory_use()[0], {}
    if args.profile:
        with tempfile.TemporaryDirectory() as folder:
            with tracing(Path(folder)):
                deadline = math.inf
                go(state, range(timed, timed + PROFILED))
            spent, kernels = time_spent(Path(folder), PROFILED)
            profile = {**spent, "kernels": kernels[:40]}
    examples = [job.order.examples_of(k) for k in range(timed)]
    shapes = ",".join(f"{r}x{t}" for r, t in plan.batches.shapes)
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        **measured(raw, lengths, [t for t, _ in done[:timed]], examples, mesh.size, plan.run.lora),
        "memory_gib": memory / 2**30,
        "compile_s": compiled_in,
        "detail": f"{sharding.describe_mesh(mesh)}, --remat {plan.run.remat}, blocks {shapes}",
        "losses": [loss for _, loss in done],
        "profile": profile,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--work", nargs="+", default=["alpaca"], help="alpaca, alpaca-64, or ROWSxLENGTH")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["trainer"])
    parser.add_argument("--flags", default="", help="further flags of train_jax.py, as one word")
    parser.add_argument("--updates", type=int, default=40, help="timed at most; three before and one after are not")
    parser.add_argument("--seconds", type=float, default=20, help="of training in a run; at least six updates")
    parser.add_argument("--data_path", type=Path, help="alpaca_data.json")
    parser.add_argument("--tokenizer", type=Path, help="folder of a LLaMA tokenizer")
    parser.add_argument(
        "--profile", action="store_true", help="put into --json where ours spends its time, by four more updates"
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args()
    if args.profile and not args.json:
        parser.error("--profile needs --json FILE, into which the profile is written")
    if args.only:
        args.work = args.work[0]
        if args.only == "ours":
            result: dict | None = ours(args)
        else:
            import peers

            result = peers.run(args)
        if result:
            print("RESULT " + json.dumps(result))
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
                print(made.stderr[-4000:], file=sys.stderr, flush=True)
                print(f"| {work} | {run} | failed: {made.stderr.strip().splitlines()[-1][:200]} |", flush=True)
                continue
            r = json.loads(lines[0].removeprefix("RESULT "))
            results.append({"shape": args.shape, "work": work, "run": run, **r})
            if args.json:  # at once: a later run may be killed
                args.json.write_text(json.dumps(results, indent=1))
            spread = "-".join(f"{x:,.1f}" for x in r["ms_spread"])
            print(
                f"| {work} | {run} | {r['ms']:,.1f} ({spread}) | {r['tokens_an_update']:,.0f} | {r['tokens_s']:,.0f} | "
                f"{r['tflops']:,.0f} | {r['mfu']:.1%} | {r['memory_gib']:.1f} | {r['compile_s']:.0f} | {r['detail']} |",
                flush=True,
            )
    if results:
        print(f"\nof one {results[0]['device']} of {results[0]['devices']}")


if __name__ == "__main__":
    main()
