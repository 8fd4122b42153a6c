"""Divide the time of a run among its phases."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Count the seconds of each phase of the main thread. At each moment one phase runs; a nested phase pauses it."""

    def __init__(self, phase: str, started: float):
        self._phases, self._since = [phase], started
        self._spent: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds within the block for the phase `name`."""
        self._book()
        self._phases.append(name)
        try:
            yield
        finally:
            self._book()
            self._phases.pop()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one phase for another."""
        self._spent[source] = self._spent.get(source, 0.0) - seconds
        self._spent[target] = self._spent.get(target, 0.0) + seconds

    def seconds(self, name: str) -> float:
        """Return the seconds of a phase until now."""
        running = time.monotonic() - self._since if self._phases[-1] == name else 0.0
        return self._spent.get(name, 0.0) + running

    def all(self) -> dict[str, float]:
        """Return the seconds of each phase until now, in the order of their beginnings."""
        self._book()
        return dict(self._spent)

    def _book(self) -> None:
        now, phase = time.monotonic(), self._phases[-1]
        self._spent[phase] = self._spent.get(phase, 0.0) + now - self._since
        self._since = now
