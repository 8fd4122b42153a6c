"""Connect several processes, on one host or many, and compare their values.

All processes run the same program on the same flags and data. Each must call every function here in the same order.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from llama_jax.base.errors import FailedAlone, InputError
from llama_jax.base.launcher import DEFAULT_PORT, SLURM, TORCH, Place, PlaceError, find_place
from llama_jax.distributed import watchdog
from llama_jax.distributed.compat import (
    find_cluster,
    key_value_store,
    multihost_utils,
    on_tpu_host,
    place_in_run,
    watch_sigterm,
)

MASTER = ("MASTER_ADDR", "MASTER_PORT")
JOIN_SECONDS = 300  # until all processes of a run have started
WAIT = 24 * 3600 * 1000  # milliseconds: a host may tokenise for hours; the heartbeat detects a dead host
_exchanges = itertools.count()


def join(
    address: str | None, count: int | None, index: int | None, use_cpu: bool = False, watchdog_seconds: int = 30
) -> None:
    """Connect to the other processes, before jax looks for devices, and watch them. Raises InputError.

    A launcher's variables give process 0's address and the place of this process; `address`, `count` and `index` do so
    without a launcher, and jax's detection on a TPU slice. A process without heartbeats for `watchdog_seconds` ends the
    others with a line.
    """
    if (count is None) != (index is None) or (count is not None and address is None):
        raise InputError("--num_processes, --process_id and --coordinator_address: give all three, or none")
    if count is not None and index is not None and not 0 <= index < count:
        raise InputError(f"--process_id {index}: should be at least 0 and below --num_processes {count}")
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator_address {address}: should be HOST:PORT")
    place, cluster = _place(), find_cluster()
    if place and count is not None and (count, index) != (place.size, place.rank):
        theirs = f"{place.launcher.name} made this process {place.rank} of {place.size}"
        raise InputError(f"--process_id {index} of --num_processes {count}: {theirs}; leave the flags out")
    if address and count is None and not place and cluster is None:
        raise InputError(f"--coordinator_address {address}: give --num_processes and --process_id too")
    if place:
        use_cpu = use_cpu or os.environ.get("JAX_PLATFORMS") == "cpu"
        if not use_cpu and on_tpu_host() and not place.alone_on_host:
            several = f"{place.launcher.name} started several processes on a host of TPUs, which one process uses whole"
            raise InputError(f"{several}; start one a host: python train_jax.py ... (docs/tpu.md)")
        address, count, index = address or _coordinator(place, cluster), place.size, place.rank
        devices = None if use_cpu else _own_gpus(place)
        _connect(address, num_processes=count, process_id=index, local_device_ids=devices, limit=watchdog_seconds)
    elif count is not None and index is not None and address is not None:
        _connect(address, num_processes=count, process_id=index, limit=watchdog_seconds)
    elif address or (cluster and cluster.get_process_count() > 1):
        _configure()
        jax.distributed.initialize(address, heartbeat_timeout_seconds=watchdog.heartbeat(watchdog_seconds))
    if jax.distributed.is_initialized():
        _watch(watchdog_seconds)


def refuse_several(command: str) -> None:
    """Refuse to run a command of one process under a launcher of several. Raises InputError."""
    if place := _place():
        several = f"{place.launcher.name} started {place.size} ({place.launcher.size})"
        raise InputError(f"{command} runs in one process, but {several}; start it without a launcher: {command} ...")


def _place() -> Place | None:
    """Return the place of this process under a launcher. Raises InputError."""
    try:
        return find_place()
    except PlaceError as e:
        raise InputError(str(e), everywhere=True) from None


def _coordinator(place: Place, cluster: Any) -> str:
    """Return HOST:PORT of process 0, at which jax's processes meet. Raises InputError."""
    host, port, own_port = (os.environ.get(name, "").strip() for name in (*MASTER, "JAX_COORDINATOR_PORT"))
    if place.launcher is TORCH and not (host and port):
        missing = MASTER[0] if port else MASTER[1] if host else " and ".join(MASTER)
        raise InputError(
            f"{TORCH.size} is {place.size}, but {missing} is not set: torchrun sets both; without a launcher, python "
            "train_jax.py ... uses all GPUs of the host"
        )
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"{MASTER[1]} is {port!r}: should be a port, as {DEFAULT_PORT}")
    if cluster is not None and (place.launcher is SLURM or (place.launcher is not TORCH and not host)):
        return cluster.get_coordinator_address(timeout_secs=JOIN_SECONDS, override_coordinator_port=own_port or None)
    if not host and place.local_size != place.size:
        raise InputError(
            f"{place.launcher.name} started {place.size} processes on several hosts without naming the first: set "
            f"{MASTER[0]} for all, as mpirun -x {MASTER[0]}=HOST0"
        )
    # torchrun itself listens on MASTER_PORT. Below 32768 Linux gives no port to outgoing connections.
    own_port = own_port or str(10000 + int(port or DEFAULT_PORT) % 20000)
    return f"[{host}]:{own_port}" if ":" in host else f"{host or '127.0.0.1'}:{own_port}"


def _own_gpus(place: Place) -> list[int] | None:
    """Return the GPUs of this process among the visible ones, or None for all. Raises InputError.

    torchrun's processes have a GPU each. Elsewhere, a process alone on its host has all GPUs, as has a process to which
    the launcher shows fewer GPUs than the host has processes: its own.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    processes = place.local_size or (place.local_rank or 0) + 1
    if place.local_rank is None:
        return None
    if place.launcher is TORCH:
        if visible and len(visible) < processes:
            raise InputError(
                f"CUDA_VISIBLE_DEVICES={','.join(visible)} has {len(visible)} GPU(s) for the host's {processes} "
                "processes; name as many, start fewer, or give --use_cpu True",
                everywhere=True,
            )
        return [place.local_rank]
    if place.alone_on_host or 0 < len(visible) < processes or "SLURM_GPUS_PER_TASK" in os.environ:
        return None
    return [place.local_rank]


def _connect(
    address: str, *, num_processes: int, process_id: int, limit: int, local_device_ids: list[int] | None = None
) -> None:
    """Join the processes at `address` by their numbers, or end this process with a line after JOIN_SECONDS."""
    port = int(address.rpartition(":")[2])
    if process_id == 0 and not _is_free(port):  # a second service would share the port without an error
        raise InputError(
            f"port {port} of this host is in use, at which the {num_processes} processes of this run would meet; "
            f"start them with another {MASTER[1]} (torchrun --master_port), or set JAX_COORDINATOR_PORT for all"
        )

    def give_up() -> None:
        print(
            f"error: process {process_id} of {num_processes}: not all processes came to {address} within "
            f"{JOIN_SECONDS} s; see the output of the others, and whether all hosts reach that port",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    # jax's own timeout aborts the process with a stack trace.
    timer = threading.Timer(JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    _configure()
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=2 * JOIN_SECONDS,
        heartbeat_timeout_seconds=watchdog.heartbeat(limit),
    )
    timer.cancel()


def _watch(seconds: int) -> None:
    """Watch the other processes, before a backend starts."""
    (index, count), store, key = place_in_run(), key_value_store(), "llama_jax/host"
    store.key_value_set(f"{key}/{index}", socket.gethostname())
    hosts = [store.blocking_key_value_get(f"{key}/{i}", 1000 * JOIN_SECONDS) for i in range(count)]
    watchdog.watch(hosts, index, seconds)


def _configure() -> None:
    """Set collectives between CPUs; leave SIGTERM to end a process at once, until there is an update to save."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier run may linger
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError:
            return False
    return True


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


def on_this_host() -> int:
    """Return the number of the run's processes on this host, after all have called."""
    return exchange(socket.gethostname()).count(socket.gethostname())


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


@contextlib.contextmanager
def failing_alone() -> Iterator[None]:
    """Run a block of one among several processes; raise FailedAlone from an exception that the others may not have.

    All processes raise the same InputError.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        if not jax.distributed.is_initialized():
            raise
        if watchdog.lost_connection(e):  # the other process is named, if it ended
            watchdog.wait_for_verdict()
        number = f"process {jax.process_index()} of {jax.process_count()}"
        e.add_note(f"({number}; where a connection failed, another process ended first: see its output)")
        raise FailedAlone from e


def stop_together() -> Callable[[], bool]:
    """Return a function to call once an update: true on all processes at the same update after any got SIGTERM."""
    watch_sigterm()
    updates = itertools.count()
    return lambda: multihost_utils.reached_preemption_sync_point(next(updates))
