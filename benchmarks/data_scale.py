#!/usr/bin/env python3
"""Measure seconds and memory of preparing much data: N records, Alpaca's repeated, in a JSONL file.

Each row is a process of its own: reading and validating the file; the first start, which reads, tokenises and caches;
the second, from the cache; the plan of one epoch's blocks, 8 and 128 examples an update. Imports are not counted. "CPU"
are processor seconds of all threads and processes. "own" is the peak of the process' own memory, sampled 20 times a
second (a peer's once). "with files" is the peak resident memory, which includes pages of the mapped cache that the
kernel takes back when memory is short. Bytes a record are over the memory held before: imports, and for a plan the
examples.

The peer is `datasets`, run only where its stages are named: `load_dataset("json")` and the same checks, then `map` with
the same tokenizer in two processes, whose memory counts too. Its cache is removed before "datasets-read" and
"datasets-first", and found by the "-again" stages.

    .venv/bin/python benchmarks/data_scale.py --tokenizer ../shared/data/llama-tokenizer --data_path alpaca_data.json
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONFIG = {"vocab_size": 32000, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
STAGES = ("read", "first", "second", "plan-8", "plan-128")
PEERS = ("datasets-read", "datasets-read-again", "datasets-first", "datasets-first-again")
PROCESSES = 2  # of the peer's `map`


def write_records(source: Path, path: Path, count: int) -> None:
    """Write the records of a JSON array as lines, repeated."""
    lines = [json.dumps(record) + "\n" for record in json.loads(source.read_text(encoding="utf-8"))]
    with path.open("w") as file:
        file.writelines(itertools.islice(itertools.cycle(lines), count))


def prepared(tokenizer: Path, data: Path) -> Any:
    """Return the examples as a run gets them, with the cache of XDG_CACHE_HOME."""
    from llama_jax.model.config import LlamaConfig
    from llama_jax.setup.arguments import parse_arguments
    from llama_jax.setup.job import make_job

    config = LlamaConfig.from_hf({"model_type": "llama", "num_hidden_layers": 1, **CONFIG}, "config.json")
    flags = {"model_name_or_path": tokenizer, "data_path": data, "model_max_length": 512, "num_train_epochs": 1}
    args = parse_arguments([str(x) for name, value in flags.items() for x in (f"--{name}", value)])
    return make_job(args, config, lambda: tokenizer, 1, True).examples


def work(stage: str, tokenizer: Path, data: Path) -> Callable[[], Any]:
    """Prepare a stage, then measure it."""
    from llama_jax.data.batches import Batches
    from llama_jax.data.normalisation import training_loss
    from llama_jax.data.order import Order
    from llama_jax.data.records import read_records

    if stage == "read":
        return lambda: len(read_records(data)[1])
    if stage in PEERS:
        return by_datasets(stage, tokenizer, data)
    if not stage.startswith("plan"):
        return lambda: len(prepared(tokenizer, data))
    examples = prepared(tokenizer, data)
    order = Order(len(examples), 1, int(stage.split("-")[1]), 1, "4.37")
    return lambda: Batches(examples, order, training_loss(order)).shapes


def by_datasets(stage: str, tokenizer: Path, data: Path) -> Callable[[], Any]:
    """Return the work of a peer's stage."""
    from llama_jax.data.examples import Examples, check_examples
    from llama_jax.data.readers import import_datasets
    from llama_jax.data.records import read_records
    from llama_jax.data.sources import Source

    datasets, again = import_datasets(), stage.endswith("-again")
    cache = data.parent / stage.removesuffix("-again")
    if not again:
        shutil.rmtree(cache, ignore_errors=True)

    def prepare() -> int:
        table = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(cache))
        if stage.startswith("datasets-read") or not again:  # a second start of a run checks no records
            read_records([Source(str(data), (), table)])
        if stage.startswith("datasets-first"):
            folder, others = {"folder": str(tokenizer)}, table.column_names
            vocab_size = len(_opened(**folder))
            table = table.map(_tokenized, batched=True, num_proc=PROCESSES, fn_kwargs=folder, remove_columns=others)
            for batch in table.data.to_batches():
                ids, labels = batch.column("input_ids"), batch.column("labels")
                offsets = ids.offsets.to_numpy() - ids.offsets[0].as_py()
                examples = Examples(ids.flatten().to_numpy(), labels.flatten().to_numpy(), offsets)
                check_examples(examples, vocab_size, str(data))
        return len(table)

    return prepare


def _tokenized(columns: dict[str, list[Any]], folder: str) -> dict[str, list[Any]]:
    """Tokenize a batch of `map`."""
    from llama_jax.data.examples import tokenize_alpaca

    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    examples = tokenize_alpaca(records, _opened(folder), 512)
    ids, labels = zip(*(examples[i] for i in range(len(examples))), strict=True)
    return {"input_ids": [*ids], "labels": [*labels]}


@functools.cache
def _opened(folder: str) -> Any:
    from llama_jax.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(Path(folder))
    tokenizer.add_missing_special_tokens()
    return tokenizer


def row(stage: str, tokenizer: str, data: str) -> None:
    import llama_jax.setup.job  # noqa: F401  # imports are not counted

    measured = work(stage, Path(tokenizer), Path(data))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    peer = stage in PEERS
    before, own, peak, done = _memory(peer), [0], [0], threading.Event()

    def watch() -> None:
        while not done.wait(1 if peer else 0.05):  # looking for children takes 6 ms
            now = _memory(peer)
            own[0], peak[0] = max(own[0], now["RssAnon"]), max(peak[0], now["VmHWM"])

    threading.Thread(target=watch, daemon=True).start()
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    result = measured()
    seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu
    done.set()
    after = _memory(peer)
    peaks = {"own": max(*own, after["RssAnon"]), "peak": max(*peak, after["VmHWM"])}
    more = {"more_own": peaks["own"] - before["RssAnon"], "more": peaks["peak"] - before["VmRSS"]}
    print(json.dumps({"seconds": seconds, "cpu": cpu, **peaks, **more, "result": result}))


def _memory(children: bool) -> dict[str, int]:
    """Return the bytes of the process: RssAnon without mapped files, VmRSS and its peak VmHWM with them.

    With `children`, add their bytes; pages that a child shares with its parent count twice.
    """
    total, own = dict.fromkeys(("RssAnon", "VmRSS", "VmHWM"), 0), str(os.getpid())
    for path in Path("/proc").glob("[0-9]*/status" if children else "self/status"):
        with contextlib.suppress(OSError, KeyError):  # the process has ended
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            if own in (fields["Pid"].strip(), fields["PPid"].strip()):
                total = {name: sum_ + int(fields[name].split()[0]) * 1024 for name, sum_ in total.items()}
    return total


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        return row(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of LLaMA's tokenizer")
    parser.add_argument("--data_path", type=Path, required=True, help="alpaca_data.json")
    parser.add_argument("--records", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--stages", nargs="*", choices=STAGES + PEERS, default=STAGES)
    parser.add_argument("--folder", type=Path, help="folder of data and cache, 1.4 kB a record, peers 2; kept if given")
    args = parser.parse_args()
    print("| records | stage | seconds | CPU | own memory, MB | with files, MB | bytes a record: own | with files |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for records in args.records:
            data = folder / f"{records}.jsonl"
            if not data.exists():
                write_records(args.data_path, data, records)
            for stage in args.stages:
                environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
                command = [sys.executable, __file__, "--row", stage, str(args.tokenizer), str(data)]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE)
                if done.returncode:
                    sys.exit(done.returncode)
                found = json.loads(done.stdout.splitlines()[-1])
                per_record = f"{found['more_own'] / records:,.0f} | {found['more'] / records:,.0f}"
                memory = f"{found['own'] / 1e6:,.0f} | {found['peak'] / 1e6:,.0f}"
                seconds = f"{found['seconds']:,.2f} | {found['cpu']:,.2f}"
                print(f"| {records:,} | {stage} | {seconds} | {memory} | {per_record} |", flush=True)


if __name__ == "__main__":
    main()
