"""Progress bars on the standard error stream."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


def say(line: str) -> None:
    """One line for the user, above any bar."""
    tqdm.write(line, file=sys.stderr)


def byte_bar(what: str, total: int, disable: bool | None = None) -> Any:
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=disable, leave=False)


def count_bar(what: str, total: int, unit: str, disable: bool | None = None) -> Any:
    return tqdm(desc=what, total=total, unit=unit, disable=disable, leave=False)


def update_bar(total: int, initial: int, disable: bool | None = None) -> Any:
    """The bar of a training run: updates done, time left, and what `set_postfix` is told."""
    return tqdm(total=total, initial=initial, unit="update", dynamic_ncols=True, smoothing=0.05, disable=disable)


@contextlib.contextmanager
def waiting(what: str, disable: bool | None = None) -> Iterator[Any]:
    """A line that counts the seconds of work that tells nothing until it is done; `set_description` renames it."""
    done = threading.Event()
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", disable=disable, leave=False) as bar:

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
