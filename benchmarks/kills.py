#!/usr/bin/env python3
"""Kill runs of train_jax.py at random moments, resume them, and compare the ends with that of an undisturbed run.

    python benchmarks/kills.py --model HF_DIR --data_path FILE --kills 200 [--flags "--use_cpu True --max_steps 12"]

Each round is a new output folder. Its run gets --per_round SIGKILLs, one a start, then goes to its end. Every second
kill waits for a save and falls into it; the others come at any moment between the start and the end. The parent keeps
the seed, so that a round can be repeated. The ends are equal where all tensors have the same bytes and all logged lines
the same values, but for the clock. Exit code 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--save_strategy steps --save_steps 2 --save_total_limit 2 --logging_steps 1 --report_to none "
FLAGS += "--disable_tqdm True --resume_from_checkpoint auto"
CLOCK = ("runtime", "per_second", "time")


def start(args: argparse.Namespace, out: Path, log: Path) -> subprocess.Popen:
    paths = {"model_name_or_path": args.model, "data_path": args.data_path, "output_dir": out}
    command = [sys.executable, str(ROOT / "train_jax.py"), *(str(x) for k, v in paths.items() for x in (f"--{k}", v))]
    with log.open("a") as file:
        return subprocess.Popen(
            [*command, *FLAGS.split(), *args.flags.split()], stdout=file, stderr=file, start_new_session=True
        )


def end_of(out: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Return the SHA-256 of each exported file of weights, and the logged lines without the clock."""
    weights = sorted(out.glob("*.safetensors"))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return sums, [{k: v for k, v in e.items() if not any(word in k for word in CLOCK)} for e in history]


def saving(out: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any("tmp" in path.name for path in out.glob("checkpoint-*"))


def kill(process: subprocess.Popen, out: Path, rng: random.Random, seconds: float, in_save: bool) -> str:
    """Kill a run and return a word for the moment, "" where it ended before."""
    began, wait = time.monotonic(), rng.uniform(0, seconds)
    moment = f"{wait:.2f} s"
    while process.poll() is None:
        if in_save and saving(out):
            time.sleep(rng.uniform(0, 0.05))
            moment = "in a save"
            break
        if not in_save and time.monotonic() - began > wait:
            break
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return moment if process.wait() == -signal.SIGKILL else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per_round", type=int, default=4)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--flags", default="--use_cpu True --max_steps 12", help="of train_jax.py, as one word")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    done, number, wrong, counts = 0, 0, 0, {"in a save": 0, "at any moment": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, log = folder / "whole", folder / "log"
        for again in (folder / "first", whole):  # the first fills the caches of compiled programs
            began = time.monotonic()
            if start(args, again, log).wait():
                sys.exit(log.read_text()[-3000:])
            seconds = time.monotonic() - began
        wanted = end_of(whole)
        print(f"undisturbed: {seconds:.1f} s, {len(wanted[1])} lines", flush=True)
        while done < args.kills:
            rng = random.Random(f"{args.seed} {number}")
            out, log, moments = folder / f"round-{number}", folder / f"log-{number}", list[str]()
            while len(moments) < args.per_round:
                in_save = (done + len(moments)) % 2 == 0
                moment = kill(start(args, out, log), out, rng, seconds, in_save)
                if not moment:
                    break
                moments.append(moment)
            # A run that ended while its killer waited is at its end already: another start would be refused.
            code = 0 if (out / "trainer_state.json").exists() else start(args, out, log).wait()
            same = code == 0 and end_of(out) == wanted
            done, number, wrong = done + len(moments), number + 1, wrong + (not same)
            for moment in moments:
                counts["in a save" if moment == "in a save" else "at any moment"] += 1
            print(f"round {number - 1}: {', '.join(moments)}: {'the same end' if same else 'DIFFERENT'}", flush=True)
            if not same:
                print(log.read_text()[-3000:])
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"{done} kills ({kinds}) in {number} rounds: {number - wrong} rounds have the same end, {wrong} have not")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
