"""Where a handed-back folder goes, and a resume that names the wrong folder: each is refused in a line."""

import shutil
from pathlib import Path

import pytest
from test_handover import write_checkpoint
from tiny import run

import convert_torch_to_flax
import train_jax

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer's checkpoint-7 in `hf`, and a run of ours of two updates in `ours`."""
    folder = tmp_path_factory.mktemp("runs")
    write_checkpoint(folder)
    (folder / "hf").mkdir()
    shutil.move(folder / "checkpoint-7", folder / "hf/checkpoint-7")
    assert run(train_jax.main, *words(folder, "ours")).code == 0
    return folder


def words(folder: Path, output: str, *more: str) -> list[str]:
    given = ["--model_name_or_path", str(folder / "model"), "--data_path", str(folder / "data.json")]
    given += ["--output_dir", str(folder / output), "--use_cpu", "True", "--hf_compat", "5", "--max_steps", "2"]
    return [*given, "--save_strategy", "steps", "--save_steps", "1", *more]


def back(runs: Path, folder: Path):
    argv = ["--model_name_or_path", str(runs / "ours/checkpoint-2"), "--output_dir", str(folder), "--to_hf_trainer"]
    return run(convert_torch_to_flax.main, *argv)


def test_the_folder_is_new(runs: Path, tmp_path: Path) -> None:
    """Files that are there already would be read by the Trainer; N is the update."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/rng_state_1.pth").touch()
    outcome = back(runs, tmp_path / "checkpoint-2")
    assert outcome.code == 2 and "is not empty, and the Trainer would read its files" in outcome.err
    outcome = back(runs, tmp_path / "checkpoint-3")
    assert outcome.code == 2 and "holds update 2, not 3; call it checkpoint-2" in outcome.err
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-2/rng_state_1.pth"]


def test_nothing_half_written(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_jax.run import hand_back

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hand_back, "write_scheduler", full)
    assert back(runs, tmp_path / "a").code == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    outcome = back(runs, tmp_path / "a")
    assert outcome.code == 0 and "evaluation" not in outcome.err  # none was asked for
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "model.safetensors"} <= names
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize(
    "output, checkpoint, said",
    [
        ("out", "ours", "ours: is a run's folder; name a checkpoint in it, as {}/ours/checkpoint-2"),
        ("out", "hf", "hf: is a run's folder; name a checkpoint in it, as {}/hf/checkpoint-7"),
        ("hf/checkpoint-7", "hf/checkpoint-7", "is in the checkpoint that the run goes on from; choose another folder"),
        ("hf/checkpoint-7/out", "hf/checkpoint-7", "is in the checkpoint that the run goes on from"),
        ("hf", "hf/checkpoint-7", "hf: holds the HF Trainer's checkpoint-7; choose another --output_dir\n"),
    ],
)
def test_wrong_folders(output: str, checkpoint: str, said: str, runs: Path) -> None:
    more = ["--resume_from_checkpoint", str(runs / checkpoint), "--overwrite_output_dir", "True"]
    outcome = run(train_jax.main, *words(runs, output, *more))
    assert outcome.code == 2 and said.format(runs) in outcome.err
    assert (runs / "hf/checkpoint-7/optimizer.pt").exists()


def test_an_output_dir_of_the_trainer(runs: Path) -> None:
    outcome = run(train_jax.main, *words(runs, "hf"))
    assert outcome.code == 2 and f"go on from it by --resume_from_checkpoint {runs}/hf/checkpoint-7" in outcome.err
