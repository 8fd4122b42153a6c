"""The updates of a certificate: the real Trainer's are this program's, and a Trainer with one other flag fails a row.

The Trainer makes its updates in float32 and float64 in this process; train_jax.py makes ours in its own, once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import ALPACA, CONFIG, run, write_json, write_model, write_tokenizer

from llama_jax.command import parity
from llama_jax.proof import updates
from llama_jax.proof.certify import open_subject
from llama_jax.proof.updates import compare_updates
from llama_jax.proof.verdict import Row
from llama_jax.setup.arguments import parse_arguments

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow

COUNT = 3
FLAGS = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-2 --weight_decay 0.1 "
FLAGS += "--warmup_steps 2 --lr_scheduler_type cosine --max_grad_norm 0.5 --hf_compat 5 --use_cpu True"


class Run(NamedTuple):
    folder: Path
    argv: list[str]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("updates")
    model = write_tokenizer(write_model(folder / "model", CONFIG), pad_token=None)
    data = write_json(folder / "data.json", [*ALPACA * 3])
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", folder / "out", "--report_to", "none"]
    return Run(folder, [*map(str, argv), *FLAGS.split()])


@pytest.fixture(scope="module")
def ours(case: Run, tmp_path_factory: pytest.TempPathFactory) -> updates.Made:
    args = dataclasses.replace(parse_arguments(case.argv), max_steps=COUNT)
    subject = open_subject(args, None)
    made = tmp_path_factory.mktemp("ours")
    return updates._ours(args, subject.job, case.folder / "model", case.folder / "model", made)


def rows_beside(ours: updates.Made, case: Run, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> list[Row]:
    """The rows of our updates beside those of a Trainer with other flags."""
    from accelerate.state import AcceleratorState, GradientState

    from llama_jax.proof import trainer_process

    def ask(spec: dict[str, Any]) -> dict[str, Any]:
        AcceleratorState._reset_state(True)  # they outlive a run
        GradientState._reset_state()
        for key, value in change.items():
            place = spec if key in spec else spec["flags"]
            place[key] = value
        return trainer_process.train(spec)

    monkeypatch.setattr(updates, "_ask", ask)
    monkeypatch.setattr(updates, "_ours", lambda *_: ours)
    torch.set_num_threads(1)
    subject = open_subject(parse_arguments(case.argv), None)
    return compared(subject.job, case).rows


def compared(job: Any, case: Run) -> updates.Compared:
    return compare_updates(job, case.folder / "model", case.folder / "model", None, COUNT, lambda folder: [])


def test_equal_updates(ours: updates.Made, case: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_beside(ours, case, monkeypatch, {})
    assert not [row for row in rows if row.holds is not True]
    # Half a bound leaves a factor of two for other machines, as in test_proof.py.
    worst = max(rows, key=lambda row: row.share)
    assert worst.share < 0.5, worst
    assert len(rows) == 4 * COUNT + 2 * 9 + 3
    assert sum(row.name.startswith("change of ") for row in rows) == 2 * 9 + 3


@pytest.mark.parametrize(
    "change, row",
    [
        ({"seed": 43}, "update 1: examples"),
        ({"gradient_accumulation_steps": 1}, "update 1: examples"),
        ({"learning_rate": 1.001e-2}, "update 2: learning rate"),
        ({"lr_scheduler_type": "constant"}, "update 1: learning rate"),
        ({"warmup_steps": 3}, "update 2: learning rate"),
        ({"label_smoothing_factor": 0.01}, "update 1: loss"),
        ({"max_grad_norm": 4.0}, "change of lm_head.weight"),
        ({"weight_decay": 0.099}, "change of lm_head.weight"),
        ({"adam_beta1": 0.9001}, "change of lm_head.weight"),
        ({"adam_beta2": 0.998}, "change of lm_head.weight"),
        ({"adam_epsilon": 1e-6}, "change of lm_head.weight"),
        ({"optim": "sgd"}, "change of lm_head.weight"),
        ({"new_tokens": 0}, "change of lm_head.weight"),
    ],
    ids=str,
)
def test_another_flag_is_named(
    change: dict[str, Any], row: str, ours: updates.Made, case: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [row.name for row in rows_beside(ours, case, monkeypatch, change) if row.holds is False]
    assert row in failing
    if row.startswith("update"):  # rows before it, in time, hold
        assert failing[0] == row


@pytest.mark.parametrize("more", ["--use_peft True --lora_r 4 --lora_dropout 0.1", "--shrink 1"], ids=str)
def test_the_command(more: str, case: Run, tmp_path: Path) -> None:
    """Each program in its own process; an adapter's dropout is left out by both."""
    outcome = run(parity.main, *case.argv, "--output_dir", tmp_path, "--updates", COUNT, *more.split())
    assert outcome.code == 0, outcome.out + outcome.err
    values = json.loads((tmp_path / "parity.json").read_text())
    sections = {row["section"] for row in values["rows"]}
    assert {"updates, float32"} | ({"the exported folder, float32"} if "peft" not in more else set()) <= sections
    assert [len(curve) for curve in values["curves"]["loss"].values()] == [COUNT, COUNT]
    assert '<div class="curve" data-name="loss">' in (tmp_path / "parity.html").read_text()


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--optim lion_32bit", "--optim lion_32bit"),
        ("--world_size 2", "leave --world_size out"),
        ("--use_peft True --load_in_8bit True", "leave --load_in_4bit and --load_in_8bit out"),
    ],
)
def test_what_is_not_compared(flags: str, reason: str, case: Run) -> None:
    subject = open_subject(parse_arguments([*case.argv, *flags.split()]), None)
    (row,) = compared(subject.job, case).rows
    assert row.holds is None and reason in row.note


def test_a_model_that_is_too_large(case: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "host_memory", lambda: 1_200_000)
    subject = open_subject(parse_arguments(case.argv), None)
    (row,) = compared(subject.job, case).rows
    assert row.holds is None and row.note.endswith("compare fewer layers, --shrink 1")


def test_a_sample_of_examples_with_labels(tmp_path: Path, case: Run) -> None:
    """Prompts that fill --model_max_length have no label: the sample takes later examples."""
    long = {"instruction": "Count. " * 60, "input": "", "output": "1"}
    data = write_json(tmp_path / "data.json", [long] * 9 + ALPACA[:2])
    argv = [str(data) if word.endswith("data.json") else word for word in case.argv] + ["--model_max_length", "360"]
    sample = open_subject(parse_arguments(argv), None).sample
    assert len(sample.examples) == 2 and all((labels[1:] != -100).any() for _, labels in sample.examples)
