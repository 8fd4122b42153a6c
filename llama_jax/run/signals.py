"""Stop a run by a signal: the current update is finished and saved first."""

from collections.abc import Callable

import jax

from llama_jax.base.stopping import STOPPING, Stopping
from llama_jax.distributed import processes
from llama_jax.reporting.progress import say


def catch_stop(stopping: Stopping, busy: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function, called once an update, that returns whether to stop. While `busy()`, no signal ends the run at
    once."""
    stopping.hold(busy)
    return stopping.asked if jax.process_count() == 1 else _together(stopping)


def _together(stopping: Stopping) -> Callable[[], bool]:
    """Stop several processes after the same update, when one of them has received a signal."""
    stop = processes.stop_together()
    stopping.forward()

    def asked() -> bool:
        if stopped := stop():
            say(STOPPING)
        return stopped

    return asked
