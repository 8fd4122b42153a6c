"""Compare the log of a run with another's, as `trainer_state.json` holds it."""

from pathlib import Path
from typing import Any

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object

Log = list[dict[str, Any]]
COMPARED = ("loss", "eval_loss", "grad_norm", "learning_rate")
BYTES = 1 << 30  # of a trainer_state.json with a line for each of some million updates


def read_log(path: Path) -> Log:
    """Return the log of a `trainer_state.json`, the HF Trainer's or ours. Raises InputError."""
    values = read_json_object(path, BYTES)
    log = values.get("log_history")
    if not isinstance(log, list) or not all(isinstance(e, dict) and isinstance(e.get("step"), int) for e in log):
        raise InputError(f"{path}: has no log_history of entries with a step; give a trainer_state.json")
    return log


def series(log: Log, key: str) -> dict[int, float]:
    """Return the values of a key by step; of a step's several entries the last counts."""
    found = {entry["step"]: entry.get(key) for entry in log}
    for entry in log:  # an entry without the key must not hide an earlier one of its step
        if isinstance(entry.get(key), int | float) and not isinstance(entry[key], bool):
            found[entry["step"]] = entry[key]
    return {step: float(value) for step, value in found.items() if isinstance(value, int | float)}


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
