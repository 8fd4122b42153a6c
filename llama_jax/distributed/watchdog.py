"""End this process with one line that names the process of the run that died or is stuck.

jax's coordination service notices a process without heartbeats and then aborts all others from C++, with a stack trace
and the signal SIGABRT. Its callback for that ends in std::bad_cast (jaxlib 0.10 and 0.11), so that the signal is taken
here. What C++ prints goes into a file, in which the handler finds the reason.
"""

import contextlib
import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama_jax.base import output

LEAST = 3  # seconds: heartbeats come every second or two
_FATAL = "distributed service detected fatal errors"  # of jaxlib's client, before it aborts
_SILENT = re.compile(r"^(?:/job:\S*/task:)?(\d+)$", re.MULTILINE)  # a line for each process without heartbeats
_SERVICE = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|Socket closed|failed to connect", re.IGNORECASE)
_CONNECTION = re.compile("gloo|nccl|coordination ?service|heartbeat timeout|barrier failed", re.IGNORECASE)
_SOCKET = re.compile("connection|socket closed", re.IGNORECASE)


class Verdict(NamedTuple):
    """Hold the line on the end of a run, and whether this process prints it for all."""

    line: str
    speaks: bool


def heartbeat(seconds: int) -> int:
    """Return the seconds without heartbeats after which jax takes a process for dead, below the limit `seconds`.

    The end of the others follows up to a fifth later (measured).
    """
    return max(2 * seconds // 3, 2)


def watch(hosts: Sequence[str], index: int, seconds: int) -> None:
    """Take SIGABRT from now on. `hosts` has the host of each process, `index` is the number of this one."""
    output.divert(None)
    first = threading.Lock()

    def on_abort(number: int) -> None:
        if not first.acquire(blocking=False):  # another thread is at it
            time.sleep(60)
        verdict = judge(output.diverted(), hosts, index, seconds)
        if verdict is None:
            output.screen("error: compiled code ended this process with SIGABRT; its last messages:")
            output.screen(output.diverted()[-2000:])
            _signal(number, None)  # the abort goes on
            return
        if verdict.speaks:
            output.screen(verdict.line)
        else:
            os.write(2, f"{verdict.line}\n".encode())
        os._exit(1)

    global _on_abort, _limit
    _on_abort, _limit = _Handler(on_abort), seconds
    _signal(signal.SIGABRT, _on_abort)


def judge(messages: str, hosts: Sequence[str], index: int, seconds: int) -> Verdict | None:
    """Return the verdict by the messages of C++, None for an abort that is not of the coordination service."""
    _, fatal, reason = messages.rpartition(_FATAL)
    if not fatal:
        return None
    silent = sorted({int(number) for number in _SILENT.findall(reason)} & set(range(len(hosts))))
    if not silent and _SERVICE.search(reason) and index:
        silent = [0]  # the first process holds the service
    again = "start all again with --resume_from_checkpoint auto"
    limit = f"--watchdog_seconds {seconds}"
    if index in silent:
        line = f"process {index} ({hosts[index]}) sent no heartbeats ({limit}), so that the others have ended; {again}"
        return Verdict(f"error: {line}", True)
    if not silent:
        line = f"another of the {len(hosts)} processes has failed, see its output; {again}"
        return Verdict(f"error: {line}", True)
    names = " and ".join(f"process {i} ({hosts[i]})" for i in silent)
    line = f"{names} of {len(hosts)} died or got stuck: no heartbeats ({limit}); this run ends; {again}"
    return Verdict(f"error: {line}", index == min({*range(len(hosts))} - {*silent}))


def lost_connection(e: Exception) -> bool:
    """Return whether an exception comes from a connection to another process, which may have ended."""
    of_jax = type(e).__name__ in ("JaxRuntimeError", "XlaRuntimeError")  # a background save wraps it
    return bool(_CONNECTION.search(str(e)) or (of_jax and _SOCKET.search(str(e))))


def wait_for_verdict() -> None:
    """Wait until `watch` has ended this process; return where it has not, some time after its limit."""
    with contextlib.suppress(ValueError):  # outside the main thread
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of a launcher that ends all
    time.sleep(_limit + 5)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_limit = 0  # seconds, as given to `watch`
_on_abort: Callable[[int], None] | None = None  # ctypes frees a callback that no name holds


def _signal(number: int, handler: Callable[[int], None] | None) -> None:
    """Set C's handler of a signal, None for the default: Python's own runs later, in the main thread."""
    ctypes.CDLL(None).signal(ctypes.c_int(number), handler)
