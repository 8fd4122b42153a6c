#!/usr/bin/env python3
"""Measure what reports cost an update: the same run on the CPU without any, with its page, and with trackers too.

The runs take turns; each line is the median of the repeats. Beside the medians of the updates, which other programs of
the machine disturb, it prints the CPU time of the thread that makes the updates for a log line, and the share of the
run's time that the threads of the page and of the trackers compute.

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
FLAGS = "--use_cpu True --save_strategy no --per_device_train_batch_size 8 --hf_compat 5 --disable_tqdm True"
CONFIG = {"hidden_size": 64, "intermediate_size": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report_to", nargs="+", default=["tensorboard", "wandb"])
    parser.add_argument("--logging_steps", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    import tiny

    import llama_jax.run.trainer as trainer
    import train_jax
    from llama_jax.reporting.run_report import RunReport
    from llama_jax.reporting.trackers import Trackers
    from llama_jax.run.reports import Reports

    spent: dict[str, int] = {}  # CPU time of a thread within a method, ns
    lines = 0

    def timed(kind: type, name: str) -> None:
        method: Callable[..., Any] = getattr(kind, name)

        def call(*values: Any, **more: Any) -> Any:
            nonlocal lines
            lines += name == "_log"
            started = time.thread_time_ns()
            try:
                return method(*values, **more)
            finally:
                spent[name] = spent.get(name, 0) + time.thread_time_ns() - started

        setattr(kind, name, call)

    for kind, name in ((Reports, "_log"), (RunReport, "_work"), (Trackers, "_call")):
        timed(kind, name)
    begin = Reports.begin
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tiny.write_model(Path("model"), tiny.CONFIG | CONFIG)
        tiny.write_json(Path("data.json"), tiny.make_records(64, longest=60))
        speeds: list[tuple[float, float]] = []

        def note(prepared: Any, plan: Any, speedometer: Any) -> None:
            speeds.append((1000 * speedometer.whole().update_seconds, prepared.watch.seconds("training")))

        trainer.say_summary = note
        words = f"--model_name_or_path model --data_path data.json --max_steps {given.max_steps} {FLAGS}"

        def update(page: bool, reports: list[str], every: int) -> tuple[float, float, float]:
            """Return ms of an update, ms of a log line in its thread, and the share of the other threads."""
            nonlocal lines
            lines = 0
            spent.clear()
            Reports.begin = begin if page else lambda self, run: None  # type: ignore[method-assign]
            argv = [*words.split(), "--report_to", *reports, "--output_dir", "out", "--logging_steps", str(every)]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                code = train_jax.main([*argv, "--overwrite_output_dir", "True"])
            assert code == 0 and "no more" not in said.getvalue(), said.getvalue()
            (ms, seconds), beside = speeds.pop(), spent.get("_work", 0) + spent.get("_call", 0)
            return ms, spent.get("_log", 0) / max(lines, 1) / 1e6, beside / 1e9 / seconds

        kinds = {"none": (False, ["none"]), "the page": (True, ["none"]), "all": (True, given.report_to)}
        update(True, given.report_to, 10)
        print("| log lines | reports | median update, ms | a line in the updates' thread, ms | the other threads |")
        print("|---|---|--:|--:|--:|")
        for every in given.logging_steps:
            found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
            for _ in range(given.repeats):
                for name, (page, reports) in kinds.items():
                    found[name].append(update(page, reports, every))
            for name, runs in found.items():
                ms, line, share = (statistics.median(column) for column in zip(*runs, strict=True))
                print(f"| every {every} | {name} | {ms:.3f} | {line:.3f} | {share:.2%} |", flush=True)


if __name__ == "__main__":
    main()
