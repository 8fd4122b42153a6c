"""Nothing that another run or program wrote is removed, overwritten or taken for this run's own."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_checkpoint import copied
from test_training import Job, assert_same_run, checkpoints
from tiny import drawn_cases, environment, run

import train_jax
from llama_jax.base.errors import InputError
from llama_jax.distributed.platform import _ignore_abandoned
from llama_jax.hf.checkpoint import Damaged
from llama_jax.run.ownership import LOCK, locked
from llama_jax.run.resume import SavedRun


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with a whole run in "whole"."""
    job = Job(tmp_path_factory.mktemp("job"))
    job.train("whole")
    return job


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- Two runs ---------------------------------------------------------------------------------------------------------

HOLD = "import sys; from pathlib import Path; from llama_jax.run.ownership import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n print('held', flush=True)\n sys.stdin.read()"


def test_a_second_run_is_refused(job: Job) -> None:
    """While the first process lives. SIGKILL frees the folder."""
    out = job.folder / "shared"
    out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    outcome = run(train_jax.main, *job.argv("shared"))
    assert outcome.code == 2 and outcome.compiled == 0
    assert f"output_dir {out}: another run writes there (process {holder.pid} on " in outcome.err
    assert [path.name for path in out.iterdir()] == [LOCK]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    job.train("shared", max_steps=1)
    assert not (out / LOCK).exists()


def test_a_lock_is_of_the_file_that_is_there(tmp_path: Path) -> None:
    """A process that opened the file before its removal takes the new one."""
    with locked(tmp_path):
        pass
    with locked(tmp_path), pytest.raises(InputError, match="another run"), locked(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_a_file_system_without_locks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is made, with a warning."""

    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    outcome = run(train_jax.main, *job.argv("unlocked", max_steps=1))
    warning = f"warning: {job.folder}/unlocked/{LOCK} cannot be locked (Function not implemented); let no second"
    assert outcome.code == 0 and outcome.err.count(warning) == 1, outcome.err


# -- Models -----------------------------------------------------------------------------------------------------------


def test_a_finished_model_is_not_overwritten(job: Job) -> None:
    """Not by `auto` either, which finds no checkpoint there. The flag replaces the model."""
    out = job.train("finished", save_strategy="no", max_steps=2)
    before = content(out)
    for flags in ({}, {"resume_from_checkpoint": "auto"}):
        outcome = run(train_jax.main, *job.argv("finished", max_steps=3, **flags))
        assert outcome.code == 2 and outcome.compiled == 0
        assert f"{out} already holds a model (model.safetensors)" in outcome.err
    assert content(out) == before
    job.train("finished", save_strategy="no", max_steps=3, overwrite_output_dir=True)
    assert content(out)["model.safetensors"] != before["model.safetensors"]


def test_the_model_that_is_trained_is_not_overwritten(job: Job) -> None:
    model = Path(job.flags["model_name_or_path"])
    (job.folder / "link").symlink_to(model)
    before = content(model)
    for out in ("model", "link"):
        outcome = run(train_jax.main, *job.argv(out, overwrite_output_dir=True))
        assert outcome.code == 2 and "is the folder of the model that is trained" in outcome.err, outcome.err
    assert content(model) == before


@pytest.mark.parametrize("flags", [{}, {"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}])
@pytest.mark.parametrize("name", ["global_step500/mp_rank_00_model_states.pt", "state/notes.txt", "run/log"])
def test_folders_of_others_are_not_removed(name: str, flags: dict[str, Any], job: Job) -> None:
    """As DeepSpeed's: checkpoint-N with sub-folders only."""
    out = copied(job, "others")
    path = out / "checkpoint-500" / name
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    before = content(out)
    outcome = run(train_jax.main, *job.argv("others", **flags))
    assert outcome.code == 2 and f"{out}/checkpoint-500: is not a checkpoint of this program" in outcome.err
    assert content(out) == before


def test_overwriting_says_what_it_removes(job: Job) -> None:
    out = copied(job, "again")
    (out / "notes.txt").write_text("mine")
    outcome = run(train_jax.main, *job.argv("again", overwrite_output_dir=True, max_steps=2))
    assert outcome.code == 0
    assert "--overwrite_output_dir: removing checkpoint-2, checkpoint-4, checkpoint-6\n" in outcome.err
    assert checkpoints(out) == ["checkpoint-2"] and (out / "notes.txt").read_text() == "mine"


# -- Checkpoints ------------------------------------------------------------------------------------------------------


def test_notes_in_a_checkpoint_are_no_damage(job: Job) -> None:
    out = copied(job, "noted")
    for folder in ("checkpoint-4", "checkpoint-4/state", "checkpoint-4/run"):
        (out / folder / ".DS_Store").write_text("x")
    shutil.rmtree(out / "checkpoint-6")
    outcome = run(train_jax.main, *job.argv("noted", resume_from_checkpoint=True))
    assert outcome.code == 0 and f"resumed from {out}/checkpoint-4" in outcome.err
    assert_same_run(job.folder / "whole", out)


def test_a_checkpoint_of_another_folder(job: Job) -> None:
    """A run starts in a folder of its own from the state of another run, and its end is the same."""
    out = job.folder / "branch"
    source = job.folder / "whole" / "checkpoint-4"
    before = content(source)
    outcome = run(train_jax.main, *job.argv("branch", resume_from_checkpoint=source))
    assert outcome.code == 0 and f"resumed from {source}" in outcome.err, outcome.err
    assert_same_run(job.folder / "whole", out)
    assert checkpoints(out) == ["checkpoint-6"] and content(source) == before
    again = run(train_jax.main, *job.argv("branch", resume_from_checkpoint=source))
    assert again.code == 2 and "already holds checkpoint-6" in again.err


def test_a_checkpoint_of_another_run_is_set_aside(job: Job) -> None:
    """Its number is the newest, its identity is not the folder's."""
    other = job.train("other", learning_rate=5e-3)
    out = copied(job, "mixed")
    shutil.rmtree(out / "checkpoint-6")
    shutil.copytree(other / "checkpoint-6", out / "checkpoint-6")
    outcome = run(train_jax.main, *job.argv("mixed", resume_from_checkpoint=True))
    assert outcome.code == 0, outcome.err
    assert "checkpoint-6: is of another run; it is set aside as damaged-checkpoint-6" in outcome.err
    assert_same_run(job.folder / "whole", out)


def flip(path: Path, place: float, bit: int) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(place * len(data))] ^= 1 << bit
        path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, float, int], Any]] = {
    "flip": flip,
    "cut": lambda path, place, _: os.truncate(path, int(place * path.stat().st_size)),
    "garbage": lambda path, place, bit: path.write_bytes(bytes([bit]) * int(100 * place)),
    "remove": lambda path, *_: path.unlink(),
}


@pytest.mark.slow
@settings(max_examples=drawn_cases(300, 12))
@given(
    damage=st.sampled_from([*DAMAGES, "rename", "swap", "link"]),
    where=st.floats(0, 1, exclude_max=True),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
@example(damage="rename", where=0, place=0, bit=0)
@example(damage="swap", where=0, place=0, bit=0)
@example(damage="link", where=0, place=0, bit=0)
def test_any_damage_is_passed_over(damage: str, where: float, place: float, bit: int, job: Job) -> None:
    """The run ends as the whole run did, and the damaged checkpoint still exists, unless the damage changes nothing."""
    out = copied(job, "damaged")
    newest, older = out / "checkpoint-6", out / "checkpoint-4"
    if damage in DAMAGES:
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        DAMAGES[damage](files[int(where * len(files))], place, bit)
    elif damage == "swap":
        newest.rename(out / "x"), older.rename(newest), (out / "x").rename(older)
    else:
        shutil.rmtree(newest)
        (newest.symlink_to(older) if damage == "link" else older.rename(newest))
    flags = {"resume_from_checkpoint": True, "max_steps": 6}
    outcome = run(train_jax.main, *job.argv("damaged", **flags))
    assert outcome.code == 0, (outcome.err, damage)
    assert "Traceback" not in outcome.err
    assert_same_run(job.folder / "whole", out)
    if damage not in DAMAGES:
        assert "it holds update 4, under another name" in outcome.err
        assert (out / "damaged-checkpoint-6").exists()


def test_a_read_that_is_given_up_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """After one array has failed: as orbax reads an array, the end of a coroutine becomes another exception."""

    async def read() -> None:
        try:
            await types.coroutine(lambda: (yield))()
        except BaseException as e:
            raise Exception("while reading") from e

    monkeypatch.setattr("sys.unraisablehook", _ignore_abandoned)
    waiting = read()
    waiting.send(None)
    del waiting
    assert capsys.readouterr().err == ""

    class Broken:
        def __del__(self) -> None:
            raise ValueError("a bug")

    Broken()
    assert "a bug" in capsys.readouterr().err


@settings(max_examples=drawn_cases(200, 60))
@given(st.data())
def test_any_change_of_the_json_is_seen(job: Job, data: st.DataObject) -> None:
    """Of a value, of a key, or of a type, at any depth."""
    out = copied(job, "json")
    (file,) = (path for path in (out / "checkpoint-6" / "run").iterdir() if path.read_bytes()[:1] == b"{")
    values = json.loads(file.read_text())
    inner: Any = values
    while True:
        key = data.draw(st.sampled_from([*inner] if isinstance(inner, dict) else range(len(inner))))
        if isinstance(inner[key], (dict, list)) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            continue
        break
    changed = data.draw(st.sampled_from([None, True, -1, 7, 1.5, "text", [], {}, "gone"]))
    if changed == inner[key]:
        return
    if changed == "gone":
        del inner[key]
    else:
        inner[key] = changed
    file.write_text(json.dumps(values))
    with pytest.raises(Damaged, match="checkpoint-6: is damaged"):
        SavedRun.read(out / "checkpoint-6")
