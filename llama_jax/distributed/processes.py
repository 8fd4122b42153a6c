"""Several processes, on one host or on many: how they find each other, and what they agree on.

All of them run the same program on the same flags and data. What is asked here of one must be asked of all.
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

WAIT = 24 * 3600 * 1000  # milliseconds: a host may tokenise for hours; one that died is noticed by its heartbeat
_exchanges = itertools.count()


def join(address: str | None, count: int | None, index: int | None) -> None:
    """Find the other processes, before jax looks for devices: by the address of the first one, or by what jax knows of
    a TPU slice, SLURM or Open MPI. Raises InputError."""
    if (count is None) != (index is None) or (count is not None and address is None):
        raise InputError("--num_processes and --process_id: give both, and --coordinator_address, or none of them")
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
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


def exchange(value: str) -> list[str]:
    """What each process has given, in their order; returns when all have."""
    if jax.process_count() == 1:
        return [value]
    store, key = key_value_store(), f"llama_jax/{next(_exchanges)}"
    store.key_value_set(f"{key}/{jax.process_index()}", f"={value}")
    return [store.blocking_key_value_get(f"{key}/{i}", WAIT)[1:] for i in range(jax.process_count())]


def least(number: int | None) -> int | None:
    """The smallest of the processes' numbers, None where one has none."""
    numbers = [int(told) for told in exchange("" if number is None else str(number)) if told]
    return min(numbers) if len(numbers) == jax.process_count() else None


def same(values: dict[str, Any]) -> None:
    """Raises InputError where the processes' values, by name and printable, are not the same."""
    told = [json.loads(text) for text in exchange(json.dumps({name: repr(value) for name, value in values.items()}))]
    for i, theirs in enumerate(told):
        for name, value in told[0].items():
            if theirs[name] != value:
                both = f"process 0 has {value[:100]}, process {i} {theirs[name][:100]}"
                raise InputError(f"{name}: all processes should have the same, but {both}")


def check_shared(folder: Path) -> None:
    """Raises InputError where a process does not see what the first one writes into the folder."""
    (name, *_) = exchange(f".shared-test-{uuid.uuid4().hex}")
    if is_first():
        (folder / name).touch()
    exchange("written")
    seen = exchange("yes" if (folder / name).exists() else "")
    if is_first():
        (folder / name).unlink()
    if not all(seen):
        raise InputError(f"output_dir {folder}: process {seen.index('')} does not see the first one's files in it")


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What is done inside is done by all: the user's mistake on one of them is raised on each."""
    mistake = ""
    try:
        yield
    except InputError as e:
        mistake = str(e)
    for i, told in enumerate(exchange(mistake)):
        if told:
            raise InputError(told if i == 0 else f"process {i}: {told}")


def stop_together() -> Callable[[], bool]:
    """A function, to be asked once an update, that tells all processes at the same update that one of them has got
    SIGTERM."""
    asked = itertools.count()
    return lambda: multihost_utils.reached_preemption_sync_point(next(asked))
