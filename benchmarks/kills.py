#!/usr/bin/env python3
"""Kill runs of train_jax.py at random moments, resume them, and compare the ends with that of an undisturbed run.

    python benchmarks/kills.py --model HF_DIR --data_path FILE --kills 200 [--flags "--use_cpu True --max_steps 12"]

Each round is a new output folder. Its run gets --per_round SIGKILLs, one a start, then goes to its end. Every second
kill waits for a save and falls into it; the others come at any moment between the start and the end. The parent keeps
the seed, so that a round can be repeated. The ends are equal where all tensors have the same bytes and all logged lines
the same values, but for the clock and for train_loss, the HF Trainer's mean over the updates since the last start. With
--processes 2, one of the two is killed, and the other has to end by itself with exit code 1. Exit code 1 where anything
differs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--save_strategy steps --save_steps 2 --save_total_limit 2 --logging_steps 1 --report_to none "
FLAGS += "--disable_tqdm True --resume_from_checkpoint auto"
LEFT_OUT = ("runtime", "per_second", "time", "train_loss")
PATIENCE = 330  # seconds for the processes that were not killed; they wait 300 for one that has not come yet


class Job:
    """Start the processes of a run, and kill one of them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.slowest, self.wrong = args, 0.0, 0

    def start(self, out: Path, log: Path) -> list[subprocess.Popen]:
        args, count = self.args, self.args.processes
        paths = {"model_name_or_path": args.model, "data_path": args.data_path, "output_dir": out}
        command = [sys.executable, ROOT / "train_jax.py", *(x for k, v in paths.items() for x in (f"--{k}", v))]
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        meeting = ["--coordinator_address", f"localhost:{port}", "--num_processes", str(count), "--process_id"]
        with log.open("a") as file:
            return [
                subprocess.Popen(
                    [*command, *FLAGS.split(), *args.flags.split(), *([*meeting, str(i)] if count > 1 else [])],
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
                for i in range(count)
            ]

    def finish(self, out: Path, log: Path) -> int:
        """Run to the end and return the largest exit code."""
        return max(abs(process.wait()) for process in self.start(out, log))

    def kill(self, out: Path, log: Path, rng: random.Random, seconds: float, in_save: bool) -> str:
        """Start a run, kill one process of it and return a word for the moment, "" where it ended before.

        Another process that does not end with 1 is reported and counted in `wrong`.
        """
        earlier, at = log.stat().st_size if log.exists() else 0, time.time()
        processes = self.start(out, log)
        victim, wait = rng.choice(processes), rng.uniform(0, seconds)
        while len(processes) > 1 and victim.poll() is None and b"devices:" not in log.read_bytes()[earlier:]:
            time.sleep(0.01)  # the others wait 300 s for a process that was never there: no fault
        began = time.monotonic()
        moment = f"{wait:.2f} s"
        while victim.poll() is None:
            if in_save and saving(out, at):
                time.sleep(rng.uniform(0, 0.05))
                moment = "in a save"
                break
            if not in_save and time.monotonic() - began > wait:
                break
            time.sleep(0.001)
        if victim.poll() is None:
            os.killpg(victim.pid, signal.SIGKILL)
        killed, began = victim.wait() == -signal.SIGKILL, time.monotonic()
        try:
            codes = [process.wait(PATIENCE) for process in processes if process is not victim]
        except subprocess.TimeoutExpired:
            codes = [-signal.SIGKILL]
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        self.slowest = max(self.slowest, time.monotonic() - began)
        if not {*codes} <= ({1} if killed and not (out / "trainer_state.json").exists() else {0, 1}):
            self.wrong += 1
            print(f"process {processes.index(victim)} was killed, {moment}; the others ended with {codes}", flush=True)
        return moment if killed else ""


def end_of(out: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Return the SHA-256 of each exported file of weights and of the manifest's tensors, and the logged lines without
    the clock and train_loss."""
    weights = sorted(out.glob("*.safetensors"))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    tensors = json.loads((out / "manifest.json").read_text())["tensors"]
    sums["manifest.json"] = hashlib.sha256(json.dumps(tensors).encode()).hexdigest()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return sums, [{k: v for k, v in e.items() if not any(word in k for word in LEFT_OUT)} for e in history]


def saving(out: Path, since: float) -> bool:
    """Return whether a checkpoint is being written that was begun after a time; others are of a killed run."""
    for path in out.glob("checkpoint-*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ctime > since:
                return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per_round", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--flags", default="--use_cpu True --max_steps 12", help="of train_jax.py, as one word")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    job = Job(args)
    done, number, wrong, counts = 0, 0, 0, {"in a save": 0, "at any moment": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, log = folder / "whole", folder / "log"
        for again in (folder / "first", whole):  # the first fills the caches of compiled programs
            began = time.monotonic()
            if job.finish(again, log):
                sys.exit(log.read_text()[-3000:])
            seconds = time.monotonic() - began
        wanted = end_of(whole)
        print(f"undisturbed: {seconds:.1f} s, {len(wanted[1])} lines", flush=True)
        while done < args.kills:
            rng = random.Random(f"{args.seed} {number}")
            out, log, moments = folder / f"round-{number}", folder / f"log-{number}", list[str]()
            while len(moments) < args.per_round:
                moment = job.kill(out, log, rng, seconds, (done + len(moments)) % 2 == 0)
                if not moment:
                    break
                moments.append(moment)
            # A run that ended while its killer waited is at its end already: another start would be refused.
            code = 0 if (out / "trainer_state.json").exists() else job.finish(out, log)
            same = code == 0 and end_of(out) == wanted
            done, number, wrong = done + len(moments), number + 1, wrong + (not same)
            for moment in moments:
                counts["in a save" if moment == "in a save" else "at any moment"] += 1
            print(
                f"round {number - 1}: {', '.join(moments)}: {'the same end' if same else f'DIFFERENT, code {code}'}",
                flush=True,
            )
            if not same:
                print(log.read_text()[-3000:])
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if args.processes > 1:
        print(f"processes that were not killed ended within {job.slowest:.0f} s, {job.wrong} not with 1")
    print(f"{done} kills ({kinds}) in {number} rounds: {number - wrong} rounds have the same end, {wrong} have not")
    return int(wrong + job.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
