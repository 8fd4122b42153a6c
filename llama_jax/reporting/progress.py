"""What is said while a run goes on: lines, and bars on the standard error stream."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_silent = False


def silence() -> None:
    """Say and show nothing from now on: another process speaks."""
    global _silent
    _silent = True


def say(line: str) -> None:
    """One line for the user, above any bar."""
    if not _silent:
        tqdm.write(line, file=sys.stderr)


def show(line: str) -> None:
    """One line of the result, on the standard output."""
    if not _silent:
        tqdm.write(line)


class _UpdateBar(tqdm):
    """Leave the first update, which compiles, out of the rate and the time left."""

    _compiled = False

    def update(self, n: float | None = 1) -> bool | None:
        if self._compiled or self.disable:
            return super().update(n)
        self._compiled = True
        self.n += n or 0
        self.initial = self.last_print_n = self.n
        self.unpause()  # restarts the clock, as nothing was counted since the start
        self.refresh()
        return True


def _bar(disable: bool | None, kind: type[tqdm] = tqdm, **options: Any) -> Any:
    return kind(disable=True if _silent else disable, **options)


def byte_bar(what: str, total: int, disable: bool | None = None) -> Any:
    return _bar(disable, desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1000, leave=False)


def count_bar(what: str, total: int, unit: str, disable: bool | None = None) -> Any:
    return _bar(disable, desc=what, total=total, unit=unit, leave=False)


def update_bar(total: int, initial: int, disable: bool | None = None) -> Any:
    """The bar of a training run: updates done, time left, and what `set_postfix` is told."""
    return _bar(disable, _UpdateBar, total=total, initial=initial, unit="update", dynamic_ncols=True, smoothing=0.05)


@contextlib.contextmanager
def waiting(what: str, disable: bool | None = None) -> Iterator[Any]:
    """A line that counts the seconds of work that tells nothing until it is done; `set_description` renames it."""
    done = threading.Event()
    with _bar(disable, desc=what, bar_format="{desc}: {elapsed}", leave=False) as bar:

        def tick() -> None:
            while not done.wait(1):
                bar.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            done.set()
            thread.join()
