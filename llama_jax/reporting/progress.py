"""Print lines and progress bars while a run goes on."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

WARNING = "warning: "
_silent, _level = False, logging.INFO


def silence() -> None:
    """Print nothing from now on, because another process of the run prints."""
    global _silent
    _silent = True


def set_level(level: int) -> None:
    """Print lines of at least this level of `logging` alone from now on; bars and results are printed at any."""
    global _level
    _level = level


def say(line: str) -> None:
    """Print a line for the user on stderr, above any bar: a warning where it begins with `WARNING`."""
    if not _silent and _level <= (logging.WARNING if line.startswith(WARNING) else logging.INFO):
        tqdm.write(line, file=sys.stderr)


def show(line: str) -> None:
    """Print a line of the result on stdout."""
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


def byte_bar(name: str, total: int, disable: bool | None = None) -> Any:
    return _bar(disable, desc=name, total=total, unit="B", unit_scale=True, unit_divisor=1000, leave=False)


def count_bar(name: str, total: int, unit: str, disable: bool | None = None) -> Any:
    return _bar(disable, desc=name, total=total, unit=unit, leave=False)


def update_bar(total: int, initial: int, disable: bool | None = None) -> Any:
    """Show the updates done of a training run, the time left, and the bar's postfix."""
    return _bar(disable, _UpdateBar, total=total, initial=initial, unit="update", dynamic_ncols=True, smoothing=0.05)


@contextlib.contextmanager
def waiting(name: str, disable: bool | None = None) -> Iterator[Any]:
    """Count the seconds of work that reports no progress; `set_description` renames the line."""
    done = threading.Event()
    with _bar(disable, desc=name, bar_format="{desc}: {elapsed}", leave=False) as bar:

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
