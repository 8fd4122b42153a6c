"""What is on the disk is what was saved, or it is said; and what lies beside it does no harm."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_training import Job, assert_same_run, checkpoints
from tiny import run, slow_unless, write_json

import train_jax
from llama_jax.distributed.digest import sums
from llama_jax.run.ownership import LEDGER, Ledger

TYPES = (np.float32, jnp.bfloat16, np.int16, np.int32)


@given(data_seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(TYPES), axes=st.integers(0, 3), draw=st.data())
def test_a_digest_knows_every_bit_and_no_padding(data_seed: int, kind: type, axes: int, draw: st.DataObject) -> None:
    array = np.random.default_rng(data_seed).integers(0, 256, (*(2, 3, 4)[:axes], np.dtype(kind).itemsize), np.uint8)
    values = array.view(kind)[..., 0]
    (right,) = sums({"x": jnp.asarray(values)}).values()
    padded = np.pad(values, [(0, 3)] * axes) if axes else values
    assert sums({"x": jnp.asarray(padded)}) == {"['x']": right}
    bit = draw.draw(st.integers(0, 8 * array.size - 1))
    array.reshape(-1)[bit // 8] ^= 1 << bit % 8
    assert sums({"x": jnp.asarray(array.view(kind)[..., 0])}) != {"['x']": right}


@given(data_seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(TYPES), axes=st.integers(1, 3), draw=st.data())
def test_a_digest_knows_every_place(data_seed: int, kind: type, axes: int, draw: st.DataObject) -> None:
    """Two unlike values that change places are found, and two unlike slices along any axis."""
    shape = (2, 3, 4)[:axes]
    bits = np.random.default_rng(data_seed).integers(0, 256, (*shape, np.dtype(kind).itemsize), np.uint8)
    (right,) = sums({"x": jnp.asarray(bits.view(kind)[..., 0])}).values()

    def of_swapped(view: np.ndarray) -> dict[str, int]:
        """The digest after two entries of `view`, a view of `bits`, have changed places."""
        i, j = draw.draw(st.lists(st.integers(0, len(view) - 1), min_size=2, max_size=2, unique=True))
        assume((view[i] != view[j]).any())
        view[[i, j]] = view[[j, i]]
        return sums({"x": jnp.asarray(bits.view(kind)[..., 0])})

    axis = draw.draw(st.integers(0, axes))
    places = bits.reshape(-1, bits.shape[-1])
    assert of_swapped(places if axis == axes else np.moveaxis(bits, axis, 0)) != {"['x']": right}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("job"))
    job.train("whole")
    return job


def copied(job: Job, name: str) -> Path:
    """Copy the checkpoints and the ledger of the whole run, without what it exported."""
    out = job.folder / name
    shutil.rmtree(out, ignore_errors=True)
    for saved in checkpoints(job.folder / "whole"):
        shutil.copytree(job.folder / "whole" / saved, out / saved)
    shutil.copy(job.folder / "whole" / LEDGER, out)
    return out


@pytest.mark.parametrize("where", [slow_unless(where in (0.4, 0.8), where) for where in (0.2, 0.4, 0.6, 0.8)])
def test_a_wrong_byte(where: float, job: Job) -> None:
    """The checkpoint is set aside and the one before taken, unless the byte holds nothing."""
    out = copied(job, f"flipped-{where}")
    largest = max(
        (p for p in (out / "checkpoint-4" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[int(where * len(content))] ^= 0x40
    largest.write_bytes(content)
    shutil.rmtree(out / "checkpoint-6")
    outcome = run(train_jax.main, *job.argv(out.name, resume_from_checkpoint=True))
    assert outcome.code == 0, outcome.err
    assert_same_run(job.folder / "whole", out)
    aside = (out / "damaged-checkpoint-4").is_dir()
    assert aside == (f"{out}/checkpoint-4: is damaged" in outcome.err)
    assert f"resumed from {out}/checkpoint-{2 if aside else 4}" in outcome.err


def test_wrong_bytes_are_found(job: Job) -> None:
    """A state of other numbers, whole by all that orbax knows."""
    out = copied(job, "swapped")
    shutil.rmtree(out / "checkpoint-4" / "state")
    shutil.copytree(out / "checkpoint-6" / "state", out / "checkpoint-4" / "state")
    outcome = run(train_jax.main, *job.argv(out.name, resume_from_checkpoint=out / "checkpoint-4"))
    assert outcome.code == 2 and f"{out}/checkpoint-4: is damaged" in outcome.err, outcome.err
    assert "arrays are not what was saved" in outcome.err


@pytest.mark.parametrize("damage", ["cut", "empty run"])
def test_a_damaged_file(damage: str, job: Job) -> None:
    out = copied(job, damage)
    if damage == "cut":
        files = [p for p in (out / "checkpoint-6" / "state").rglob("*") if p.is_file() and p.stat().st_size > 1000]
        for path in files:
            path.write_bytes(path.read_bytes()[:-500])
    else:
        shutil.rmtree(out / "checkpoint-6" / "run")
        (out / "checkpoint-6" / "run").mkdir()
    outcome = run(train_jax.main, *job.argv(out.name, resume_from_checkpoint=out / "checkpoint-6", max_steps=8))
    assert outcome.code == 2 and f"{out}/checkpoint-6: is damaged" in outcome.err, outcome.err
    assert f"--resume_from_checkpoint {out}/checkpoint-4" in outcome.err
    outcome = run(train_jax.main, *job.argv(out.name, resume_from_checkpoint=True))
    assert outcome.code == 0 and "is set aside as damaged-checkpoint-6; resuming from checkpoint-4" in outcome.err
    assert_same_run(job.folder / "whole", out)


def test_half_removed(job: Job) -> None:
    """A process that dies while it removes checkpoints leaves parts of them, which its ledger names: they are removed.
    Without the ledger, a part is nobody's and stays."""
    out = copied(job, "half")
    shutil.rmtree(out / "checkpoint-6" / "state")
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-4").mkdir()
    outcome = run(train_jax.main, *job.argv("half", resume_from_checkpoint="auto"))
    assert outcome.code == 2 and f"{out}/checkpoint-6: is not a checkpoint of this program" in outcome.err
    Ledger(out).remove([4, 6])
    job.train("half", resume_from_checkpoint="auto")
    assert checkpoints(out) == checkpoints(job.folder / "whole")
    assert_same_run(job.folder / "whole", out)


def test_auto_starts_anew_or_goes_on(job: Job) -> None:
    """A script that is queued again needs no other flags."""
    first = job.train("auto", resume_from_checkpoint="auto", max_steps=3)
    assert checkpoints(first) == ["checkpoint-2"]
    outcome = run(train_jax.main, *job.argv("auto", resume_from_checkpoint="auto"))
    assert outcome.code == 0 and f"resumed from {first}/checkpoint-2" in outcome.err


@pytest.mark.parametrize("flags", [{}, {"resume_from_checkpoint": True}, {"overwrite_output_dir": True}])
def test_the_trainers_checkpoint(flags: dict, job: Job) -> None:
    """It would be in the way of ours of the same number; it is never removed."""
    out = job.folder / "hf"
    folder = out / "checkpoint-500"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "trainer_state.json", {})
    outcome = run(train_jax.main, *job.argv("hf", **flags))
    assert outcome.code == 2 and outcome.compiled == 0, outcome.err
    assert f"{folder}: is not a checkpoint of this program" in outcome.err
    assert (folder / "trainer_state.json").exists()
