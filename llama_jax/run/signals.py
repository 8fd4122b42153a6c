"""Stop a run by SIGTERM or Ctrl-C: the current update is finished and saved first."""

import signal
from collections.abc import Callable

import jax

from llama_jax.distributed import processes
from llama_jax.reporting.progress import say

STOPPING = "stopping: the current update is finished and saved first"


def catch_stop() -> Callable[[], bool]:
    """Return a function, called once an update, that returns whether to stop."""
    return _alone() if jax.process_count() == 1 else _together()


def _alone() -> Callable[[], bool]:
    """Catch SIGTERM and Ctrl-C in a run of one process; a second signal ends the process at once."""
    received = []

    def handle(signum, frame):
        received.append(signum)
        say(f"{STOPPING}; a second signal ends the run at once")
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return lambda: bool(received)


def _together() -> Callable[[], bool]:
    """Stop several processes after the same update, when one of them has received a signal."""
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    stop = processes.stop_together()

    def asked() -> bool:
        if stopping := stop():
            say(STOPPING)
        return stopping

    return asked
