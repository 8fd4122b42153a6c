"""Read the JSON of a checkpoint, whichever commit wrote it."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, make_records, write_json, write_model

from llama_jax.base.errors import InputError
from llama_jax.model.config import LlamaConfig
from llama_jax.run.resume import ACTIONS, UPDATE, Facts, SavedRun, choose_checkpoint, compare_with_saved
from llama_jax.setup.arguments import Arguments, parse_arguments
from llama_jax.setup.job import make_job
from llama_jax.training.optimizer import make_optimizer

FACTS = Facts(
    dtype="float32",
    optim="adamw_torch",
    order={"updates": 4},
    scan_layers=False,
    model={"a": 1},
    data="x",
    update={"learning_rate": 1e-3},
)
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


def test_older_checkpoints_hold_less(capsys: pytest.CaptureFixture) -> None:
    values = {k: v for k, v in as_read(SAVED).items() if k not in ("left", "log_window", "model", "data", "update")}
    saved = SavedRun.from_json(values)
    assert (saved.left, saved.log_window, saved.facts.model, saved.facts.data) == ((), None, {}, "")
    compare_with_saved(dataclasses.replace(FACTS, model={}), saved, "checkpoint-2")
    assert "warning" not in capsys.readouterr().err


def test_each_flag_that_decides_an_update_is_compared(capsys: pytest.CaptureFixture) -> None:
    """Flags that only another version of this program knows are none of the differences."""
    then = {**dict.fromkeys(UPDATE, 1), "lr_scheduler_kwargs": {"power": 2}}
    now = {**dict.fromkeys(UPDATE, 2), "lr_scheduler_kwargs": {"power": 3}}
    saved = dataclasses.replace(SAVED, facts=dataclasses.replace(FACTS, update=then))
    compare_with_saved(dataclasses.replace(FACTS, update=now), SavedRun.from_json(as_read(saved)), "checkpoint-2")
    said = capsys.readouterr().err.splitlines()
    assert [re.search(r"--(\w+) ", line)[1] for line in said] == [*UPDATE, "lr_scheduler_kwargs"]
    assert {"learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "adam_beta2"} < {*UPDATE}


def moments_of(dtype: str, kept: str | None) -> list[tuple[str, bytes]]:
    """The type and bits of each array of AdamW's state after two updates."""
    tx, params = make_optimizer(moments=kept), jnp.linspace(-1, 1, 64, dtype=dtype)
    state = tx.init(params)
    for k in (1, 2):
        _, state = tx.update(jnp.cos(k * params), state, params, learning_rate=jnp.float32(1e-3))
    return [(x.dtype.name, np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_moments_are_refused(dtype: str, tmp_path: Path) -> None:
    """Those are others whose bits differ after the same gradients. The line's own fix resumes."""
    paths = ("--model_name_or_path", write_model(tmp_path / "model"), "--output_dir", tmp_path / "out")
    argv = [*map(str, paths), "--data_path", str(write_json(tmp_path / "data.json", make_records(8))), "--use_cpu"]
    facts = {}
    for kept in (None, "float32", "bfloat16"):
        args = parse_arguments([*argv, *(("--adam_moments_dtype", kept) if kept else ())])
        job = make_job(args, LlamaConfig.from_hf(CONFIG), lambda: tmp_path, 1, True)
        facts[kept] = Facts.of(job, dtype=dtype, scan_layers=False)
    for then, now in itertools.product(facts, facts):
        saved = SavedRun.from_json(as_read(dataclasses.replace(SAVED, facts=facts[then])))
        if moments_of(dtype, then) == moments_of(dtype, now):
            compare_with_saved(facts[now], saved, "checkpoint-2")
            continue
        default = then is None or then == dtype == "float32"
        fix = "without --adam_moments_dtype" if default else f"with --adam_moments_dtype {then}"
        with pytest.raises(InputError, match=f"^checkpoint-2 holds moments in .*: resume it {fix}$"):
            compare_with_saved(facts[now], saved, "checkpoint-2")
    older = dataclasses.replace(SAVED, facts=dataclasses.replace(facts[None], moments=""))
    compare_with_saved(facts[None], older, "checkpoint-2")


def test_what_is_written_does_not_change_with_the_run() -> None:
    values = SAVED.to_json()
    values["trainer_state"]["global_step"] = 3
    assert SAVED.trainer_state["global_step"] == 2


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_of_the_trainer_is_proposed_as_the_model(inside: bool, tmp_path: Path) -> None:
    """Its optimizer state is not read, its weights are: of the last one in output_dir, or of the one that is named."""
    out = tmp_path / "out"
    for number in (500, 1000):
        path = (out if inside else tmp_path / "theirs") / f"checkpoint-{number}"
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
    for resume in ("True", str(path))[not inside :]:
        with pytest.raises(InputError, match=f"by --model_name_or_path {path}"):
            choose_checkpoint(Arguments(resume_from_checkpoint=resume), out)
    (path / "config.json").rename(path / "notes.txt")
    with pytest.raises(InputError) as caught:
        choose_checkpoint(Arguments(resume_from_checkpoint=str(path)), out)
    assert "--model_name_or_path" not in str(caught.value)
