#!/usr/bin/env python3
"""Time a checkpoint's write beside a plain copy of the same bytes: seconds, CPU seconds, and host memory beyond before.

    python benchmarks/saving.py FOLDER --gigabytes 2

Each way is a process, in turns: `plain` writes the arrays into one file, one after the other, and syncs it; `whole`
writes by orbax as a run saves a state that fits the host twice, `piecewise` as a larger state; `digests` computes what
a run stores beside the arrays, and `transfer` moves the arrays to the host, which on a GPU is a part of each.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WAYS = ("plain", "whole", "piecewise", "digests", "transfer")
SHAPE = (2048, 4096)  # of an array: 34 MB, a matrix of a model of 1 to 8 B parameters


def write(way: str, folder: Path, gigabytes: float) -> None:
    """Make arrays, write them, print a row of the table, and remove what was written."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from llama_jax.distributed.digest import sums
    from llama_jax.distributed.platform import set_up_jax
    from llama_jax.distributed.storage import handler

    set_up_jax()
    make = jax.jit(lambda i: jax.random.normal(jax.random.key(i), SHAPE))
    count = round(gigabytes * 1e9 / (4 * SHAPE[0] * SHAPE[1]))
    state = jax.block_until_ready({f"w{i}": make(i) for i in range(count)})
    size, before = sum(x.nbytes for x in state.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, spent = time.monotonic(), time.process_time()
    if way == "plain":
        with folder.open("wb", buffering=0) as file:
            for array in state.values():
                file.write(np.asarray(array).data.cast("B"))
            os.fsync(file.fileno())
    elif way == "digests":
        sums(state)
    elif way == "transfer":
        for array in state.values():
            np.asarray(array)
    else:
        with ocp.Checkpointer(handler(state, way == "piecewise")) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(state))
    seconds, spent = time.monotonic() - started, time.process_time() - spent
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"| {way} | {seconds:.2f} | {size / 1e9 / seconds:.2f} | {spent:.2f} | {more:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on the disk, or the tmpfs, to measure; a folder in it is used")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.way:
        return write(args.way, args.folder, args.gigabytes)
    print("| way | seconds | GB/s | CPU seconds | GiB more |\n|---|--:|--:|--:|--:|", flush=True)
    again, written = [sys.executable, __file__, "--gigabytes", str(args.gigabytes)], args.folder / "saving-benchmark"
    for way in WAYS * args.rounds:
        try:
            subprocess.run([*again, str(written), "--way", way], check=True)
        finally:
            shutil.rmtree(written, ignore_errors=True)
            written.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
