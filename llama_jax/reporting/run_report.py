"""Keep a run's `report.json` and its page, `report.html`: written as the run goes, in a thread of its own."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax.base.bucket import is_remote
from llama_jax.base.errors import InputError
from llama_jax.base.files import dump_json, read_json_object, write_text
from llama_jax.reporting.comparison import BYTES, is_log, read_log
from llama_jax.reporting.page import as_page, finite
from llama_jax.reporting.progress import say

VALUES, PAGE = "report.json", "report.html"
EVERY = 10.0  # seconds between two writes, at least
SHARE = 0.005  # of the time at most is spent on writing
STILL = 60.0  # more seconds without news: a write shows that the process lives
POINTS = ("step", "grad_norm", "tokens_per_second", "mfu", "memory")


class RunReport:
    """Write the values of a run's page. `facts` are known at the start; `collect` finds further ones in the thread."""

    def __init__(self, folder: Path, facts: dict[str, Any], collect: Callable[[], dict[str, Any]]):
        self._folder, self._collect = folder, collect
        empty = {"speed": {name: [] for name in POINTS}, "checkpoints": [], "answers": []}
        self._values: dict[str, Any] = {"status": "running", **empty, **facts}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._changed, self._pause = threading.Event(), EVERY
        self._thread = threading.Thread(target=self._work, daemon=True, name="report")

    def resume(self, step: int) -> None:
        """Take over the points, checkpoints and answers of an earlier start until update `step`; answers to other
        questions are left out."""
        try:
            earlier = read_json_object(self._folder / VALUES, BYTES)
            speed = {name: list(earlier["speed"][name]) for name in POINTS}
            made = {key: [e for e in earlier[key] if e["step"] <= step] for key in ("checkpoints", "answers")}
            kept = sum(at <= step for at in speed["step"])
            if earlier.get("prompts") != self._values.get("prompts"):
                made["answers"] = []
        except Exception:  # of an older version, no file, a bucket that fails: the page begins anew
            return
        self._values["speed"] = {name: values[:kept] for name, values in speed.items()}
        self._values |= made

    def begin(self) -> None:
        """Begin to write."""
        self._thread.start()

    def line(self, **point: float | None) -> None:
        """Add a point: the step, its gradient norm, the speed since the last point, and the peak of memory in bytes."""
        with self._lock:
            for name in POINTS:
                self._values["speed"][name].append(point[name])
        self._changed.set()

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Add an entry to `checkpoints` or `answers`, in the place of an entry of the same step."""
        with self._lock:
            self._values[kind] = [entry for entry in self._values[kind] if entry["step"] != step]
            self._values[kind].append({"step": step, **values})
        self._changed.set()

    def add_facts(self, **facts: Any) -> None:
        """Add values that are known late."""
        with self._lock:
            self._values |= facts
        self._changed.set()

    def end(self, status: str, patience: float, **more: Any) -> None:
        """Write for the last time, with the way that the run ended; wait for it `patience` seconds at most."""
        if not self._thread.is_alive():
            return
        with self._lock:
            self._values |= {"status": status, **more}
        self._ended.set()
        self._changed.set()
        self._thread.join(patience)
        if self._thread.is_alive():
            say(f"warning: {self._folder / PAGE} is late by {patience:.0f} s; its last values may be missing")

    def _work(self) -> None:
        try:
            self._write()
            found = self._collect()
            with self._lock:
                self._values |= found
            while not self._ended.is_set():
                self._write()
                self._ended.wait(self._pause)
                self._changed.wait(STILL)
                self._changed.clear()
            self._write()
        except Exception as e:  # a full disk, say: the run goes on
            say(f"warning: {self._folder / PAGE} is not written any more: {type(e).__name__}: {e}")

    def _write(self) -> None:
        began = time.monotonic()
        with self._lock:
            values = dict(self._values)
            values["speed"] = {name: list(points) for name, points in values["speed"].items()}
            values |= {key: list(values[key]) for key in ("checkpoints", "answers", "log_history")}
        values |= {"written": time.time(), "next_within": self._pause + STILL}
        if not is_remote(self._folder):
            for entry in values["checkpoints"]:
                entry["kept"] = (self._folder / f"checkpoint-{entry['step']}").is_dir()
        values = finite(values)
        write_text(self._folder / VALUES, dump_json(values) + "\n")  # keys in their order
        write_text(self._folder / PAGE, as_page([values]))
        self._pause = max(EVERY, (time.monotonic() - began) / SHARE)


def read_report(folder: Path) -> dict[str, Any]:
    """Return the values of a folder's page: its report.json, or what trainer_state.json tells, of the last checkpoint
    if need be. Raises InputError."""
    with contextlib.suppress(InputError):
        values = read_json_object(folder / VALUES, BYTES)
        if isinstance(values.get("name"), str) and is_log(values.get("log_history")):
            return values
    states = [folder / "trainer_state.json"]
    numbered = [p for p in folder.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    states += sorted(numbered, key=lambda p: -int(p.parent.name[11:]))
    for path in states:
        if path.is_file():
            known = {"name": folder.resolve().name, "updates": read_json_object(path, BYTES).get("max_steps")}
            return {**known, "log_history": read_log(path)}
    if folder.is_file():
        raise InputError(f"{folder}: is a file; give the output folder of a run, as {folder.parent}")
    raise InputError(f"{folder}: has neither {VALUES} nor a trainer_state.json; give the output folder of a run")
