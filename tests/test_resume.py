"""Read the JSON of a checkpoint, whichever commit wrote it."""

import dataclasses
import json

import pytest

from llama_jax.run.resume import ACTIONS, Facts, SavedRun

FACTS = Facts(dtype="float32", optim="adamw_torch", order={"updates": 4}, scan_layers=False, model={"a": 1}, data="x")
SAVED = SavedRun(
    facts=FACTS, trainer_state={"global_step": 2}, left=("epoch/save",), schedule={}, log_window={"now": {}}
)


def as_read(saved: SavedRun) -> dict:
    return json.loads(json.dumps(saved.to_json()))


def test_written_and_read() -> None:
    for left in ((), ACTIONS, ACTIONS[4:]):
        saved = dataclasses.replace(SAVED, left=left)
        assert SavedRun.from_json(as_read(saved)) == saved
        assert as_read(saved)["left"] == list(left)


@pytest.mark.parametrize("done", range(7))
def test_a_number_of_actions_done_names_those_left(done: int) -> None:
    """Commit 43d5f8a counted in this order."""
    order = [f"{phase}/{action}" for phase in ("steps", "epoch") for action in ("log", "evaluate", "save")]
    values = {**as_read(SAVED), "done": done}
    del values["left"]
    assert SavedRun.from_json(values) == dataclasses.replace(SAVED, left=tuple(order[done:]))


def test_older_checkpoints_hold_less() -> None:
    values = {k: v for k, v in as_read(SAVED).items() if k not in ("left", "log_window", "model", "data")}
    saved = SavedRun.from_json(values)
    assert (saved.left, saved.log_window, saved.facts.model, saved.facts.data) == ((), None, {}, "")


def test_what_is_written_does_not_change_with_the_run() -> None:
    values = SAVED.to_json()
    values["trainer_state"]["global_step"] = 3
    assert SAVED.trainer_state["global_step"] == 2
