#!/usr/bin/env python3
"""Measure what trackers cost an update: the same run on the CPU with and without `--report_to`, in turns.

Beside the medians of the updates, which other programs of the machine disturb, it prints the CPU time of a log line: in
the thread that makes the updates, and in the trackers' own.

    .venv/bin/python benchmarks/reporting.py --report_to tensorboard wandb
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
FLAGS = "--use_cpu True --max_steps 300 --save_strategy no --per_device_train_batch_size 8 --hf_compat 5"
CONFIG = {"hidden_size": 64, "intermediate_size": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report_to", nargs="+", default=["tensorboard", "wandb"])
    parser.add_argument("--logging_steps", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    import tiny

    import llama_jax.run.trainer as trainer
    import train_jax
    from llama_jax.reporting.trackers import Trackers

    spent = {"log": 0, "_call": 0}  # CPU time, ns
    lines = 0

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **more: Any) -> Any:
            nonlocal lines
            lines += name == "log"
            started = time.thread_time_ns()
            try:
                return method(*values, **more)
            finally:
                if name == "log" or values[2] == "on_log":
                    spent[name] += time.thread_time_ns() - started

        return call

    for name in spent:
        setattr(Trackers, name, timed(name, getattr(Trackers, name)))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tiny.write_model(Path("model"), tiny.CONFIG | CONFIG)
        tiny.write_json(Path("data.json"), tiny.make_records(64, longest=60))
        speeds: list[float] = []

        def note(prepared: Any, plan: Any, speedometer: Any) -> None:
            speeds.append(1000 * speedometer.whole().update_seconds)

        trainer.say_summary = note
        words = f"--model_name_or_path model --data_path data.json {FLAGS} --report_to"

        def update(name: str, every: int, reports: list[str]) -> float:
            argv = [*words.split(), *reports, "--output_dir", name, "--logging_steps", str(every)]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                code = train_jax.main([*argv, "--overwrite_output_dir", "--disable_tqdm", "True"])
            assert code == 0 and "no more" not in said.getvalue(), said.getvalue()
            return speeds.pop()

        update("warm", 10, given.report_to)
        print("| log lines | median update without, ms | with, ms | line, ms: updates' thread | trackers' thread |")
        print("|---|--:|--:|--:|--:|")
        for every in given.logging_steps:
            pairs = []
            for _ in range(given.repeats):
                without = update("a", every, ["none"])
                lines, spent["log"], spent["_call"] = 0, 0, 0
                pairs.append((without, update("b", every, given.report_to)))
            without, with_ = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(
                f"| every {every} | {without:.2f} | {with_:.2f} | {spent['log'] / lines / 1e6:.3f} | "
                f"{spent['_call'] / lines / 1e6:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
