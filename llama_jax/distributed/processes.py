"""Connect several processes, on one host or many, and compare their values.

All processes run the same program on the same flags and data. Each must call every function here in the same order.
"""

import contextlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from llama_jax.base.errors import InputError
from llama_jax.distributed.compat import find_cluster, key_value_store, multihost_utils

WAIT = 24 * 3600 * 1000  # milliseconds: a host may tokenise for hours; the heartbeat detects a dead host
_exchanges = itertools.count()


def join(address: str | None, count: int | None, index: int | None) -> None:
    """Connect to the other processes, before jax looks for devices. Raises InputError.

    Process 0 is found by its `address`, or by jax's detection of a TPU slice, SLURM or Open MPI.
    """
    if (count is None) != (index is None) or (count is not None and address is None):
        raise InputError("--num_processes, --process_id and --coordinator_address: give all three, or none")
    if count is not None and index is not None and not 0 <= index < count:
        raise InputError(f"--process_id {index}: should be at least 0 and below --num_processes {count}")
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator_address {address}: should be HOST:PORT")
    found = find_cluster()
    if address and count is None and found is None:
        raise InputError(f"--coordinator_address {address}: give --num_processes and --process_id too")
    if address or (found and found.get_process_count() > 1):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, index)


def is_first() -> bool:
    """Return whether this process prints and writes for all."""
    return jax.process_index() == 0


def exchange(value: str) -> list[str]:
    """Return the value of each process, in their order, after all have called."""
    if jax.process_count() == 1:
        return [value]
    store, key = key_value_store(), f"llama_jax/{next(_exchanges)}"
    store.key_value_set(f"{key}/{jax.process_index()}", f"={value}")
    return [store.blocking_key_value_get(f"{key}/{i}", WAIT)[1:] for i in range(jax.process_count())]


def least(number: int | None) -> int | None:
    """Return the smallest of the processes' numbers, or None where a process has none."""
    numbers = [int(value) for value in exchange("" if number is None else str(number)) if value]
    return min(numbers) if len(numbers) == jax.process_count() else None


def same(values: dict[str, Any]) -> None:
    """Compare the processes' values, by name, as their `repr`. Raises InputError where they differ."""
    printed = [json.loads(text) for text in exchange(json.dumps({name: repr(value) for name, value in values.items()}))]
    for i, theirs in enumerate(printed):
        for name, value in printed[0].items():
            if theirs[name] != value:
                both = f"process 0 has {value[:100]}, process {i} {theirs[name][:100]}"
                raise InputError(f"{name}: all processes should have the same, but {both}")


def check_shared(folder: Path) -> None:
    """Check that all processes see the files of process 0 in the folder. Raises InputError."""
    (name, *_) = exchange(f".shared-test-{uuid.uuid4().hex}")
    if is_first():
        (folder / name).touch()
    exchange("written")
    seen = exchange("yes" if (folder / name).exists() else "")
    if is_first():
        (folder / name).unlink()
    if not all(seen):
        blind = f"process {seen.index('')} does not see the files of process 0 in it"
        raise InputError(f"output_dir {folder}: {blind}; use a shared disk")


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Run a block on all processes, and raise an InputError of any process on each."""
    error = ""
    try:
        yield
    except InputError as e:
        error = str(e)
    for i, line in enumerate(exchange(error)):
        if line:
            raise InputError(line if i == 0 else f"process {i}: {line}")


def stop_together() -> Callable[[], bool]:
    """Return a function to call once an update: true on all processes at the same update after any got SIGTERM."""
    updates = itertools.count()
    return lambda: multihost_utils.reached_preemption_sync_point(next(updates))
