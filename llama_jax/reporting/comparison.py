"""Compare the log of a run with another's, as `trainer_state.json` holds it."""

import contextlib
from pathlib import Path
from typing import Any

from llama_jax.base.bucket import local_path
from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object

Log = list[dict[str, Any]]
COMPARED = ("loss", "eval_loss", "grad_norm", "learning_rate")
BYTES = 1 << 30  # of a trainer_state.json with a line for each of some million updates


def read_log(path: Path) -> Log:
    """Return the log of a `trainer_state.json`, the HF Trainer's or ours. Raises InputError."""
    log: Any = read_json_object(path, BYTES).get("log_history")
    if not is_log(log):
        raise InputError(f"{path}: has no log_history of entries with a step; give a trainer_state.json")
    return log


def is_log(value: Any) -> bool:
    """Return whether a value is a list of entries with a step each."""
    return isinstance(value, list) and all(isinstance(e, dict) and type(e.get("step")) is int for e in value)


def read_other(path: str) -> dict[str, Any]:
    """Return the name and the log of a run to compare with, by its `trainer_state.json`. Raises InputError."""
    file = local_path(path)
    return {"name": f"{file.resolve().parent.name}/{file.name}", "log_history": read_log(file)}


def series(log: Log, key: str) -> dict[int, float]:
    """Return the values of a key by step; of a step's several values the last counts."""
    found = {}
    for entry in log:
        if isinstance(value := entry.get(key), int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # a number of hundreds of digits
                found[entry["step"]] = float(value)
    return found


def differences(ours: Log, theirs: Log) -> dict[str, dict[str, float]]:
    """Return the largest difference by key, with its step and both values, over the steps that both logs have."""
    found: dict[str, dict[str, float]] = {}
    for key in COMPARED:
        a, b = series(ours, key), series(theirs, key)
        steps = [step for step in a if step in b and a[step] - b[step] == a[step] - b[step]]  # no NaN
        if steps:
            step = max(steps, key=lambda step: abs(a[step] - b[step]))
            found[key] = {"step": step, "ours": a[step], "theirs": b[step], "difference": abs(a[step] - b[step])}
    return found


def as_lines(found: dict[str, dict[str, float]], name: str) -> list[str]:
    """Return a line for the user by key; a single one where no step is in both logs."""
    if not found:
        return [f"compared with {name}: no step is in both logs"]
    return [
        f"compared with {name}: {key} differs by at most {d['difference']:.3g}, at update {d['step']:,}: "
        f"{d['ours']:.6g} here, {d['theirs']:.6g} there"
        for key, d in found.items()
    ]
