"""Limit the time and the memory of a chat template, which is a program of a stranger.

The sandbox keeps a template from Python and files. It does not bound loops within loops, or operations that make a text
of any length at once. A timer ends the former, the latter are checked before they run.
"""

import contextlib
import functools
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Template
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_jax.base.errors import InputError

SECONDS = 1.5  # of the processor for a chat; a millisecond is usual
BYTES = 96 << 20  # that the process may grow by meanwhile
LARGEST = 1 << 22  # characters that an operation may make at once
Result = TypeVar("Result")
_TICK = 0.02  # seconds between looks at the clock; a doubled text of 64 MB takes longer
_UNKNOWN = 1000  # values of an iterator, for an estimate
_DIGITS = 4096  # bits of a number
# The methods of strings, and the filters, whose result may be far longer than the values that they take.
_METHODS = frozenset("center expandtabs format format_map join ljust replace rjust translate zfill".split())
_FILTERS = frozenset("batch center format indent join replace round slice tojson wordwrap".split())
_WIDTH = re.compile(r"\d{7}|\*")


class Endless(InputError):
    """Report a template that takes too much time or memory: no record can be rendered by it."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Check operations that make long texts or large numbers before they run. Raises SecurityError."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def from_string(self, *args: Any, **named: Any) -> Template:
        """Compile a template, with the filters of this moment checked, those of the caller too."""
        self.filters |= {name: _checked(name, self.filters[name]) for name in _FILTERS}
        return super().from_string(*args, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check("%", (left, right))
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            if _size(left) * _size(right) > LARGEST:
                raise SecurityError(f"a product of over {LARGEST:,} values")
        elif isinstance(left, int) and isinstance(right, int) and operator != "%":
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _DIGITS:
                raise SecurityError(f"a number of over {_DIGITS} bits")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
        if getattr(method, "__name__", "") in _METHODS and isinstance(getattr(method, "__self__", None), str):
            _check(method.__name__, (method.__self__, *args, *named.values()))
        return super().call(__context, __obj, *args, **named)


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that checks its values first."""
    if getattr(function, "is_checked", False):
        return function

    @functools.wraps(function)  # jinja reads attributes of filters
    def checked(*args: Any, **named: Any) -> Any:
        _check(name, (*args, *named.values()))
        return function(*args, **named)

    checked.is_checked = True  # type: ignore[attr-defined]
    return checked


def _check(name: str, values: tuple[Any, ...]) -> None:
    """Raise SecurityError for an operation whose result may have over LARGEST characters.

    A result is at most about as long as the product of the two largest values: a text's length, a number's width.
    """
    if name == "tojson":  # writes a value once, indented by a number
        values = tuple(value for value in values if isinstance(value, int))
    sizes = sorted(map(_size, values), reverse=True)
    patterns = [value for value in values if isinstance(value, str)] if name in ("%", "format", "format_map") else []
    product = max([1, *sizes[:1]]) * max([1, *sizes[1:2]])
    if product > 16 * LARGEST or any(map(_WIDTH.search, patterns)):
        raise SecurityError(f"{name} may make a text of over {LARGEST:,} characters")


def _size(value: Any) -> int:
    """Return the characters of a text, the values of a list and the characters in them, or a number's magnitude."""
    if isinstance(value, int | float):
        return int(min(abs(value), 1e18))
    if isinstance(value, list | tuple):
        return len(value) + sum(len(part) for part in value if isinstance(part, str))
    if hasattr(value, "__len__"):
        return len(value)
    return _UNKNOWN if hasattr(value, "__next__") else 1


class _Watch:
    """End a rendering that takes over SECONDS or BYTES: raise Endless. Without effect off the main thread.

    A timer looks at the renderings of many chats, as to set a timer takes longer than to render a chat. Time counts on
    the processor, as a stopped or starved process makes no progress.
    """

    def __init__(self) -> None:
        self.armed = False
        self._where, self._chat, self._seen = "", 0, -1
        self._started, self._size = 0.0, 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Set the timer for the renderings within."""
        if self.armed or threading.current_thread() is not threading.main_thread():
            yield
            return
        handler, unraisable = signal.signal(signal.SIGALRM, self._look), sys.unraisablehook
        self.armed = True
        # Python drops what is raised in a callback of its garbage collection; the next tick raises it again.
        sys.unraisablehook = lambda lost: None if lost.exc_type is Endless else unraisable(lost)
        signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.armed, sys.unraisablehook = False, unraisable
            signal.signal(signal.SIGALRM, handler)

    def begin(self, where: str) -> None:
        """Note that the rendering of another chat begins; `where` names the chat."""
        self._where, self._chat = where, self._chat + 1

    def _look(self, *_: Any) -> None:
        now, size = time.thread_time(), _resident()
        if self._seen != self._chat:
            self._seen, self._started, self._size = self._chat, now, size
        if now - self._started > SECONDS:
            raise Endless(f"{self._where}: the chat template takes over {SECONDS:g} s for a chat; correct its loops")
        if size - self._size > BYTES:
            raise Endless(f"{self._where}: the chat template takes over {BYTES:,} bytes for a chat; correct its loops")


_watch = _Watch()
watching = _watch.watching


def within_limits(where: str, render: Callable[..., Result], *args: Any, **named: Any) -> Result:
    """Return `render(...)` of one chat, which `where` names; many are faster within `watching`. Raises Endless."""
    if not _watch.armed:
        with watching():
            _watch.begin(where)
            return render(*args, **named)
    _watch.begin(where)
    return render(*args, **named)


def _resident() -> int:
    """Return the bytes of memory that this process holds; 1 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) << 12
    except OSError:
        return 1
