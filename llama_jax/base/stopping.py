"""Take the signals that ask a command to stop: at once while there is nothing to save, else after the current work."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from llama_jax.base import output

# SLURM's notices are SIGUSR1 and SIGUSR2 as its user chooses, SIGXCPU is that of a CPU limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
STOPPED = 143  # exit code of a run that a signal stopped, after saving
INTERRUPTED = 130
PATIENCE = 10.0  # seconds in which wrappers and launchers repeat a signal
STOPPING = "stopping: the current update is finished and saved first; a signal after ten seconds ends the run at once"


class Stopping:
    """Take SIGNALS from the start of a command to its end.

    A thread takes them, as Python's own handlers wait for the end of a compile or a load. A SIGHUP that nohup ignores
    stays ignored.
    """

    def __init__(self) -> None:
        self._asked: float | None = None
        self._busy: Callable[[], bool] | None = None
        self._forward = False
        self._lock = threading.RLock()  # a handler may interrupt a handler
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._old[signum] = signal.signal(signum, lambda number, _: self._receive(number))
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if not self._old:
            return
        signal.set_wakeup_fd(self._old_fd)
        for signum, old in self._old.items():
            signal.signal(signum, old)
        os.close(self._write)  # ends the thread

    def hold(self, busy: Callable[[], bool]) -> None:
        """Let signals wait for the caller of `asked` from now on. While `busy()`, no signal ends the process."""
        self._busy = busy

    def forward(self) -> None:
        """Pass the other signals on as SIGTERM, which the caller has taken over."""
        self._forward = True
        self._old.pop(signal.SIGTERM, None)

    def asked(self) -> bool:
        """Return whether a signal asked the command to stop."""
        return self._asked is not None

    def _watch(self) -> None:
        while received := os.read(self._read, 1):
            self._receive(received[0])
        os.close(self._read)

    def _receive(self, signum: int) -> None:
        """Take a signal, from the thread or from Python's handler, whichever runs first."""
        if signum not in self._old:
            return
        if self._forward:
            signal.raise_signal(signal.SIGTERM)
            return
        now, busy = time.monotonic(), self._busy
        with self._lock:
            first, self._asked = self._asked is None, self._asked or now
        if busy is None:
            interrupted = signum == signal.SIGINT
            self._end("interrupted" if interrupted else "stopped: there was nothing to save yet", interrupted)
        elif first:
            with contextlib.suppress(OSError):  # a closed terminal
                print(STOPPING, file=sys.stderr, flush=True)
        elif now - self._asked > PATIENCE and not busy():
            self._end("stopped at once: what was done since the last checkpoint is lost", False)

    def _end(self, line: str, interrupted: bool) -> None:
        """End the process now: threads of a compile or a save would be waited for otherwise."""
        output.screen(line)
        os._exit(INTERRUPTED if interrupted else STOPPED)
