"""What is on the disk is what was saved, or it is said; and what lies beside it does no harm."""

import collections
import contextlib
import errno
import hashlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_adapters import tensors, trained
from test_processes import start
from test_training import Job, assert_same_run, checkpoints
from tiny import (
    ALPACA,
    CHANGING,
    run,
    slow_unless,
    write_json,
    write_model,
    write_tokenizer,
)

import convert_torch_to_flax
import llama_jax.hf.peft
import llama_jax.hf.writer
import llama_jax.run.checkpoint
import llama_jax.run.start
import train_jax
from llama_jax.base.errors import InputError
from llama_jax.base.output import FILE
from llama_jax.command import generate
from llama_jax.distributed.digest import sums
from llama_jax.hf.checkpoint import seal
from llama_jax.reporting.run_log import RunLog, UpdateMetrics
from llama_jax.run.checkpoint import find_steps
from llama_jax.run.disk import check_space, folder_bytes
from llama_jax.run.events import Milestones
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
    assert (
        f"{out}: holds the HF Trainer's checkpoint-500; choose another --output_dir, and go on from it" in outcome.err
    )
    assert (folder / "trainer_state.json").exists()


# -- A checkpoint is a model ------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    """The files of an exported folder, by name. Spaces at the end of JSON are left out."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in CHANGING}
    return {name: data.rstrip() if name.endswith(".json") else data for name, data in found.items()}


def tokenised(folder: Path, pad_token: str | None = "<unk>", **flags: Any) -> Job:
    """A job whose tokenizer is exported with the model."""
    job = Job(folder, data_path=folder / "alpaca.json", **flags)
    write_json(folder / "alpaca.json", ALPACA * 5)
    write_tokenizer(folder / "model", pad_token)
    return job


def to_hf(checkpoint: Path, out: Path, *flags: Any) -> Path:
    outcome = run(
        convert_torch_to_flax.main, "--to_hf", "--model_name_or_path", checkpoint, "--output_dir", out, *flags
    )
    assert outcome.code == 0, outcome.err
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"hf_compat": "5", "scan_layers": True},
        slow_unless(False, {"bf16": True}),  # halves
        slow_unless(False, {"scan_layers": True, "dtype": "bfloat16"}),
    ],
)
def test_a_checkpoint_is_a_model(flags: dict[str, Any], tmp_path: Path) -> None:
    """The last checkpoint converts to every byte of the export; its answers are the export's. An earlier checkpoint's
    logits are transformers' of the converted folder."""
    import torch
    from transformers import AutoModelForCausalLM

    import llama_jax

    out = tokenised(tmp_path, pad_token=None, **flags).train("out")  # the vocabulary grows
    assert files(to_hf(out / "checkpoint-6", tmp_path / "last", "--verify")) == files(out)
    said = []
    for folder in (out / "checkpoint-6", out):
        argv = ("--model_name_or_path", folder, "--use_cpu", "--instruction", "Name a fish.", "--max_new_tokens", 9)
        outcome = run(generate.main, *argv)
        assert outcome.code == 0, outcome.err
        said.append(outcome.out)
    assert said[0] == said[1] != ""
    earlier = to_hf(out / "checkpoint-4", tmp_path / "earlier")
    ids = np.arange(3, 43).reshape(2, 20)
    model = AutoModelForCausalLM.from_pretrained(earlier, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    # As in `test_merged` of test_adapters: 320 roundings.
    atol = 320 * 2**-24 * np.abs(expected).max()
    np.testing.assert_allclose(llama_jax.load(out / "checkpoint-4").logits(ids), expected, atol=atol)


def test_a_run_starts_from_a_checkpoint(tmp_path: Path, job: Job) -> None:
    """As from the HF folder of the same weights, also where one of the two stacks its layers."""
    checkpoint = job.folder / "whole" / "checkpoint-4"
    hf = to_hf(checkpoint, tmp_path / "hf")
    flags = {"max_steps": 2, "save_strategy": "no", "scan_layers": True}
    ours = job.train("from-checkpoint", model_name_or_path=checkpoint, **flags)
    assert_same_run(ours, job.train("from-hf", model_name_or_path=hf, **flags))


@pytest.mark.slow
def test_a_checkpoint_of_an_adapter(tmp_path: Path) -> None:
    """It is the adapter that was exported at the same update. Its base is a folder of its own."""
    out = trained(tmp_path, "out", lora_modules_to_save=["lm_head"], use_dora=True, scan_layers=True)
    write_tokenizer(tmp_path / "model")
    base, last = tmp_path / "model", out / "checkpoint-6"
    merged = []
    for adapter in (last, out):
        argv = ["--model_name_or_path", base, "--merge_adapter", adapter, "--output_dir", tmp_path / "m"]
        outcome = run(convert_torch_to_flax.main, *argv)
        assert outcome.code == 0, outcome.err
        merged.append(files(tmp_path / "m"))
    assert merged[0] == merged[1]
    further = {"adapter_name_or_path": last, "use_peft": None, "lora_r": None, "lora_alpha": None, "max_steps": 1}
    found = tensors(trained(tmp_path, "a", **further))
    expected = tensors(trained(tmp_path, "b", **{**further, "adapter_name_or_path": out}))
    assert found.keys() == expected.keys()
    assert [name for name, array in expected.items() if not np.array_equal(found[name], array)] == []
    outcome = run(generate.main, "--model_name_or_path", last, "--use_cpu", "--instruction", "x")
    assert outcome.code == 2 and "it is a run's checkpoint of an adapter: give the base model" in outcome.err


@pytest.mark.slow
def test_a_resized_adapters_checkpoint_is_refused(tmp_path: Path) -> None:
    """It lacks the new rows, which are frozen. --export_only makes the folder."""
    write_tokenizer(write_model(tmp_path / "model"), pad_token=None)
    data = write_json(tmp_path / "alpaca.json", ALPACA * 2)
    out = trained(tmp_path, "out", data_path=data)
    argv = ("--model_name_or_path", tmp_path / "model", "--merge_adapter", out / "checkpoint-6")
    outcome = run(convert_torch_to_flax.main, *argv, "--output_dir", tmp_path / "m")
    assert outcome.code == 2 and "that resized the vocabulary" in outcome.err and "--export_only True" in outcome.err
    expected = files(out)
    for path in out.iterdir():
        if path.is_file() and path.name != LEDGER and path.name != FILE:
            path.unlink()
    trained(tmp_path, "out", data_path=data, export_only=True)
    assert files(out) == expected


@pytest.mark.parametrize("damage", ["state", "config.json", "file gone", "run", "link", "a file outside"])
def test_a_damaged_checkpoint_is_no_model(damage: str, tmp_path: Path, job: Job) -> None:
    checkpoint = shutil.copytree(job.folder / "whole" / "checkpoint-6", tmp_path / "checkpoint-6")
    path = checkpoint / ("run/metadata" if damage == "run" else "config.json")
    if damage == "state":
        shutil.rmtree(checkpoint / "state")
        shutil.copytree(job.folder / "whole" / "checkpoint-4" / "state", checkpoint / "state")
    elif damage == "file gone":
        (checkpoint / "generation_config.json").unlink()
    elif damage == "a file outside":  # named in JSON that is sealed anew
        (tmp_path / "secret").write_text("secret")
        values = json.loads((checkpoint / "run" / "metadata").read_text())
        values["files"]["../secret"] = hashlib.sha256(b"secret").hexdigest()
        (checkpoint / "run" / "metadata").write_text(json.dumps({**values, "seal": seal(values)}))
    elif damage == "link":
        path.symlink_to(path.rename(tmp_path / "config.json"))
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    argv = ("--to_hf", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "out")
    outcome = run(convert_torch_to_flax.main, *argv)
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome.err
    assert "checkpoint-6" in outcome.err and ("is damaged" in outcome.err or "is a link" in outcome.err), outcome.err


def test_a_changed_small_file_does_not_stop_a_resume(job: Job) -> None:
    """The model's files are no part of the state."""
    out = copied(job, "small")
    (out / "checkpoint-6" / "config.json").write_text("{}")
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-2" / "generation_config.json").unlink()
    outcome = run(train_jax.main, *job.argv("small", resume_from_checkpoint=True))
    assert outcome.code == 0 and f"resumed from {out}/checkpoint-6" in outcome.err, outcome.err


def test_a_checkpoint_of_before(tmp_path: Path, job: Job) -> None:
    """Without the model's files, as older versions wrote it: named as such."""
    checkpoint = shutil.copytree(job.folder / "whole" / "checkpoint-6", tmp_path / "checkpoint-6")
    for path in checkpoint.glob("*.json"):
        path.unlink()
    outcome = run(generate.main, "--model_name_or_path", checkpoint, "--use_cpu", "--instruction", "x")
    assert outcome.code == 2 and "it is a run's checkpoint of before 2026-11-29" in outcome.err


# -- Export only ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_while_exporting() -> Iterator[None]:
    """The disk takes no weights file."""

    def refuse(tensors: Any, path: Path, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        for module in (llama_jax.hf.writer, llama_jax.hf.peft):
            patch.setattr(module, "save_file", refuse)
        yield


BEST = {
    "validation_split_percentage": 25,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "learning_rate": 1.0,  # too much: the first checkpoint is the best
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"hf_compat": "5"}, slow_unless(False, BEST)])
def test_an_export_that_failed_is_made_later(flags: dict[str, Any], tmp_path: Path) -> None:
    """Every byte of the folder is that of the run whose export had room."""
    job = tokenised(tmp_path, **flags)
    whole = job.train("whole")
    with full_while_exporting():
        outcome = run(train_jax.main, *job.argv("failed"))
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "the export failed: writing failed: No space left on device" in line
    assert "checkpoint-6 holds the trained state: make room" in line and "--export_only True" in line
    failed = tmp_path / "failed"
    assert not list(failed.glob("*.safetensors*"))
    outcome = run(train_jax.main, *job.argv("failed", export_only=True))
    assert outcome.code == 0 and outcome.out == "", outcome.err
    assert files(failed) == files(whole)
    if flags is BEST:
        assert "the exported model is the best one, checkpoint-2" in outcome.err
    logs = [json.loads((out / "trainer_state.json").read_text())["log_history"] for out in (whole, failed)]
    assert [e.get("loss") for e in logs[1]] == [e.get("loss") for e in logs[0]][: len(logs[1])] and len(logs[1]) >= 6


def test_exporting_an_earlier_checkpoint(tmp_path: Path, job: Job) -> None:
    """Of another run, into a folder of its own: the tensors that --to_hf writes."""
    checkpoint = job.folder / "whole" / "checkpoint-4"
    expected = load_file(to_hf(checkpoint, tmp_path / "hf") / "model.safetensors")
    outcome = run(train_jax.main, *job.argv("earlier", export_only=True, resume_from_checkpoint=checkpoint))
    assert outcome.code == 0 and outcome.compiled <= len(expected) + 20, outcome
    found = load_file(job.folder / "earlier" / "model.safetensors")
    assert [name for name, array in expected.items() if found[name].tobytes() != array.tobytes()] == []
    assert checkpoints(job.folder / "earlier") == []


def test_nothing_to_export(job: Job) -> None:
    outcome = run(train_jax.main, *job.argv("empty", export_only=True))
    assert outcome.code == 2 and "no checkpoint in" in outcome.err


@pytest.mark.slow
def test_a_failed_export_of_a_newer_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last state is saved then, so that no update is lost. Where that fails too, both ways on are named."""
    job = tokenised(tmp_path, max_steps=3, save_steps=2)
    whole = job.train("whole")
    with full_while_exporting():
        outcome = run(train_jax.main, *job.argv("out"))
    assert outcome.code == 1 and "checkpoint-3 holds the trained state: make room" in outcome.err
    outcome = run(train_jax.main, *job.argv("out", export_only=True))
    assert outcome.code == 0 and files(tmp_path / "out") == files(whole)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Milestones, "save_last", refuse)
    with full_while_exporting():
        outcome = run(train_jax.main, *job.argv("other"))
    assert outcome.code == 1 and "go on from checkpoint-2 with --resume_from_checkpoint True" in outcome.err


# -- Room on the disk -------------------------------------------------------------------------------------------------


def peak(checkpoint: int, export: int, saves: int, kept: int, limit: int | None) -> int:
    """The most bytes beyond those of the start, by writing and removing one file after the other."""
    held = collections.deque([checkpoint] * kept)
    start = most = sum(held)
    for _ in range(saves):
        held.append(checkpoint)
        most = max(most, sum(held))
        while limit and len(held) > limit:
            held.popleft()
    return max(most, sum(held) + export) - start


@given(
    checkpoint=st.integers(1, 50),
    export=st.integers(0, 50),
    saves=st.integers(0, 9),
    kept=st.integers(0, 6),
    limit=st.sampled_from([None, 0, 1, 2, 3, 5]),
    free=st.integers(0, 400),
)
def test_room(checkpoint: int, export: int, saves: int, kept: int, limit: int | None, free: int) -> None:
    """No run that comes to need more than is free starts without a line, and none with room for its checkpoints and an
    export beside them is refused."""
    sizes = {"checkpoint": checkpoint, "export": export, "saves": saves, "kept": kept, "limit": limit}
    try:
        silent, refused = check_space(Path("out"), free=free, **sizes) == "", False
    except InputError:
        silent, refused = False, True
    needed = peak(**sizes)
    assert not (silent and needed > free)
    if free >= max(needed, 0) + export:
        assert not refused
    if limit and needed > free:
        assert refused


@pytest.mark.parametrize("resume", [slow_unless(False, False), True])
def test_a_disk_without_room_is_refused(resume: bool, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything compiles; checkpoints of the run that is resumed take no further room."""
    name = "no-room"
    out = copied(job, name)
    if not resume:
        shutil.rmtree(out)
        out.mkdir()
    one, export = folder_bytes(job.folder / "whole" / "checkpoint-6"), 10**5

    def has(free: float) -> None:
        usage = shutil.disk_usage(job.folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free)))

    flags: dict[str, Any] = (
        {"save_total_limit": 2, "resume_from_checkpoint": True} if resume else {"save_total_limit": 2}
    )
    if resume:
        for step in (2, 4):
            shutil.rmtree(out / f"checkpoint-{step}")
        flags |= {"max_steps": 20}
    has(one)
    outcome = run(train_jax.main, *job.argv(name, **flags))
    assert outcome.code == 2 and outcome.compiled == 0, outcome.err
    count = 2 if resume else 3
    assert f"output_dir {out}: {count} checkpoint(s) of " in outcome.err
    assert "MiB are free: make room, lower --save_total_limit 2, or choose another --output_dir" in outcome.err
    # The rest of an interrupted write is removed first.
    rest = out / "checkpoint-7.orbax-checkpoint-tmp"
    rest.mkdir()
    (rest / "rest").write_bytes(bytes(one))
    has((count - 1) * one + 2 * export)
    flags |= {"max_steps": 7} if resume else {}
    outcome = run(train_jax.main, *job.argv(name, **flags))
    assert outcome.code == 0 and "checkpoint(s) of" not in outcome.err, outcome.err


def test_without_a_limit_a_small_disk_is_a_warning(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    size = folder_bytes(job.folder / "whole" / "checkpoint-6")
    usage = shutil.disk_usage(job.folder)._replace(free=4 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    outcome = run(train_jax.main, *job.argv("many", save_steps=1))
    assert outcome.code == 0, outcome.err
    assert f"warning: output_dir {job.folder}/many: 6 checkpoint(s) of " in outcome.err
    assert "give --save_total_limit 1" in outcome.err


def test_the_size_of_a_checkpoint_is_known(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that are compared are those on the disk, but for what is written about the arrays."""
    sizes: dict[str, int] = {}

    def record(output_dir: Path, **given: Any) -> str:
        sizes.update(given)
        return ""

    monkeypatch.setattr(llama_jax.run.start, "check_space", record)
    out = job.train("sizes", max_steps=2)
    arrays = sum(folder_bytes(path) for path in (out / "checkpoint-2" / "state").rglob("d"))
    assert 0 <= arrays - sizes["checkpoint"] < 0.1 * arrays, (arrays, sizes)
    assert 0 <= (out / "model.safetensors").stat().st_size - sizes["export"] < 0.05 * sizes["export"]
    assert sizes["saves"] == 1 and sizes["kept"] == 0


# -- Writes in the background -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "/d/x"), slow_unless(False, ValueError("a bug"))]
)
def test_a_write_that_fails_ends_the_run_at_once(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an interval later. The checkpoint before is whole, and the resumed run ends as one without the failure."""
    write, updates = llama_jax.run.checkpoint._BesideModel.finalize, []
    original, failed, writers = RunLog.on_update, threading.Event(), []

    def finalize(self: Any, directory: Any) -> None:
        if "checkpoint-20" in str(directory) and not updates_allowed:
            writers.append(threading.current_thread())
            failed.set()
            raise error
        write(self, directory)

    def on_update(self: RunLog, metrics: UpdateMetrics) -> None:
        if metrics.step == 22:  # the write of 20 is over, whatever the machine does beside it
            assert failed.wait(60)
            writers[0].join(60)
        updates.append(metrics.step)
        original(self, metrics)

    updates_allowed: list[bool] = []
    monkeypatch.setattr(llama_jax.run.checkpoint._BesideModel, "finalize", finalize)
    monkeypatch.setattr(RunLog, "on_update", on_update)
    job = Job(tmp_path, save_steps=10, max_steps=32)
    outcome = run(train_jax.main, *job.argv("out"))
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome.err
    reason = "No space left on device: /d/x" if isinstance(error, OSError) else "ValueError: a bug"
    assert f"error: writing failed: {reason}; checkpoint-20 is not saved" in outcome.err
    assert "go on from checkpoint-10 with --resume_from_checkpoint True" in outcome.err
    assert 20 <= max(updates) <= 23
    assert find_steps(tmp_path / "out") == [10]
    updates_allowed.append(True)
    job.train("out", resume_from_checkpoint=True)
    monkeypatch.undo()
    assert_same_run(job.train("whole"), tmp_path / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, which another program fills while the run goes on. With room again, the resumed run ends as one on a
    disk that was never full."""
    job = Job(tmp_path, max_steps=12, save_total_limit=1)
    whole = job.train("whole")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        original = RunLog.on_update

        def on_update(self: RunLog, metrics: UpdateMetrics) -> None:
            if metrics.step == 5:
                while find_steps(disk / "out") != [4]:
                    time.sleep(0.01)
                with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
                    file.write(bytes(4 << 20))
            original(self, metrics)

        monkeypatch.setattr(RunLog, "on_update", on_update)
        outcome = run(train_jax.main, *job.argv("", output_dir=disk / "out"))
        assert outcome.code == 1 and "Traceback" not in outcome.err, outcome.err
        assert "error: writing failed: No space left on device" in outcome.err
        assert "checkpoint-6 is not saved" in outcome.err and "go on from checkpoint-4 with" in outcome.err
        monkeypatch.undo()
        (disk / "other").unlink()
        outcome = run(train_jax.main, *job.argv("", output_dir=disk / "out", resume_from_checkpoint=True))
        assert outcome.code == 0, outcome.err
        assert_same_run(whole, disk / "out")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# Process 1 writes no arrays of the second checkpoint.
BROKEN = """
import itertools, sys, time
import orbax.checkpoint as ocp
from llama_jax.base.errors import run_command
from llama_jax.reporting.run_log import RunLog
import train_jax
class Broken:
    def result(self, timeout=None):
        raise OSError(28, "No space left on device", "/d/x")
counter, write, log = itertools.count(1), ocp.PyTreeCheckpointHandler.async_save, RunLog.on_update
async def async_save(self, *args, **options):
    writes = await write(self, *args, **options)
    return [Broken()] if next(counter) == 2 and sys.argv[-1] == "1" else writes
def on_update(self, metrics):
    time.sleep(0.05)
    print("update", metrics.step, flush=True)
    log(self, metrics)
ocp.PyTreeCheckpointHandler.async_save, RunLog.on_update = async_save, on_update
sys.exit(run_command(train_jax.main))
"""


@pytest.mark.slow
def test_one_of_two_processes_fails_to_write(tmp_path: Path) -> None:
    """It ends at the next update, although orbax's own threads wait for the other process."""
    both = start([Job(tmp_path, save_steps=10, max_steps=2000).argv("out")] * 2, 1, BROKEN)
    try:
        out, err = both[1].communicate(timeout=200)
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert both[1].returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: writing failed: No space left on device: /d/x; checkpoint-20 is not saved"), line
    assert "go on from checkpoint-10 with --resume_from_checkpoint True" in line and "Traceback" not in err
    assert 20 <= len([line for line in out.splitlines() if line.startswith("update")]) < 29
