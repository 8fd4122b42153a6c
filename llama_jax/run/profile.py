"""Profile updates of a run: trace them, and report where the device's time went."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from llama_jax.base.output import note
from llama_jax.distributed import processes
from llama_jax.distributed.profile import optimizer_kernels, time_spent, tracing
from llama_jax.reporting.progress import say
from llama_jax.reporting.stopwatch import Stopwatch

FOLDER = "profile"  # in the output folder
Report = Callable[[str, list[tuple[str, float, float]]], None]


class Profile:
    """Profile the updates of a range, numbered from 0.

    `programs` returns the compiled programs of updates, `made` the number of updates so far. `report` gets the updates
    as a text, and each kind of work with its ms an update and its share. Of several processes the first one profiles.
    """

    def __init__(
        self,
        updates: range,
        output_dir: Path,
        *,
        programs: Callable[[range], Iterable[Any]],
        made: Callable[[], int],
        watch: Stopwatch,
        report: Report,
    ):
        self._updates, self._folder = updates, output_dir / FOLDER
        self._programs, self._made, self._watch, self._report = programs, made, watch, report

    def parts(self, first: int, end: int) -> Iterator[tuple[range, AbstractContextManager[None]]]:
        """Yield the updates from `first` to `end` in ranges, each with the context to make it in."""
        begin, stop = (min(max(at, first), end) for at in (self._updates.start, self._updates.stop))
        if self._updates and begin == stop:
            say("--profile_updates: the run goes on after them; nothing is profiled")
        for updates, profiled in ((range(first, begin), False), (range(begin, stop), True), (range(stop, end), False)):
            if updates:
                yield updates, self._profiling(updates) if profiled and processes.is_first() else nullcontext()

    @contextlib.contextmanager
    def _profiling(self, updates: range) -> Iterator[None]:
        trace, started = contextlib.ExitStack(), False
        with self._forgiving():
            trace.enter_context(tracing(self._folder))
            started = True
        yield
        with self._watch.phase("profile"), self._forgiving():
            trace.close()
            if started and self._made() == updates.stop:  # else the run stops
                self._tell(updates)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Turn an exception of the profiler or of the disk into a warning: the run goes on."""
        try:
            yield
        except Exception as e:
            say(f"warning: --profile_updates: {type(e).__name__}: {e}; no profile is written")

    def _tell(self, updates: range) -> None:
        """Report a trace that is written."""
        numbers = f"{updates.start + 1}:{updates.stop}"
        say(f"profile of updates {numbers}: {self._folder}, for xprof --logdir; Perfetto opens its perfetto_trace")
        spent, kernels = time_spent(self._folder, len(updates), optimizer_kernels(self._programs(updates)))
        if not spent:
            say("the division of an update's time needs a GPU")
            return
        whole = spent.pop("whole")
        rows = [(name, ms, ms / whole) for name, ms in spent.items()]
        say(f"{whole:.1f} ms an update: " + ", ".join(f"{name} {ms:.1f} ({part:.1%})" for name, ms, part in rows))
        for name, ms in kernels[:20]:
            note(f"{ms / len(updates):10.3f} ms an update  {name}")
        self._report(numbers, rows)
