"""The updates of a certificate: the real Trainer's are this program's, and a Trainer with one other flag fails a row.

The Trainer makes its updates in float32 and float64 in this process; train_jax.py makes ours in its own, once.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import (
    ALPACA,
    CONFIG,
    ROOT,
    environment,
    make_arrays,
    of_devices,
    run,
    write_json,
    write_model,
    write_tokenizer,
)

from llama_jax.command import parity
from llama_jax.distributed import platform
from llama_jax.proof import servers, updates
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
    job, made = open_subject(args, None).job, tmp_path_factory.mktemp("ours")
    spec = {"model": str(case.folder / "model"), "layers": None, "new_tokens": 1, "prepared": str(made / "model")}
    updates._ask(spec, made)
    return updates._ours(args, job, made / "model", case.folder / "model", made)


def rows_beside(ours: updates.Made, case: Run, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> list[Row]:
    """The rows of our updates beside those of a Trainer with other flags."""
    from accelerate.state import AcceleratorState, GradientState

    from llama_jax.proof import trainer_process

    def ask(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
        AcceleratorState._reset_state(True)  # they outlive a run
        GradientState._reset_state()
        if "prepared" in spec:
            return trainer_process.prepare(spec)
        return trainer_process.train({**spec, "flags": {**spec["flags"], **change}})

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
        ({"seed": 43}, "update 1: order of the examples"),
        ({"gradient_accumulation_steps": 1}, "update 1: order of the examples"),
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
    ],
    ids=str,
)
def test_another_flag_is_named(
    change: dict[str, Any], row: str, ours: updates.Made, case: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row that fails has the flag in its note."""
    failing = {row.name: row for row in rows_beside(ours, case, monkeypatch, change) if row.holds is False}
    first = next(iter(failing))
    assert row in failing
    if row.startswith("update"):  # rows before it, in time, hold
        assert first == row
    (flag,) = change
    assert f"--{flag}" in re.findall(r"--\w+", failing[first].note)


def test_the_page_has_the_flags_of_the_notes() -> None:
    """The table "Where a row fails" of docs/parity.md, against the notes."""
    rows = {
        "order of the examples": "update N: order of the examples",
        "learning rate": "update N: learning rate",
        "loss": "update N: loss, its first update alone",
        "gradient norm": "update N: gradient norm, its first update alone",
        "weights": "change of a weight; update N: loss or gradient norm, from a later update on",
    }
    page = (ROOT / "docs" / "parity.md").read_text()
    for kind, advice in updates.ADVICE.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {rows[kind]} |")]
        assert re.findall(r"--\w+", line) == re.findall(r"--\w+", advice), line


def test_a_frozen_layer_is_named(ours: updates.Made, case: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer whose second layer needs no gradients. Its norm lacks them, and shows it before the weights do."""
    from transformers import Trainer

    train = Trainer.train

    def frozen(self: Any) -> Any:
        self.model.model.layers[1].requires_grad_(False)
        return train(self)

    monkeypatch.setattr(Trainer, "train", frozen)
    rows = rows_beside(ours, case, monkeypatch, {})
    alone = {row.name for row in rows if row.holds is False and row.note == "changes here alone"}
    weights = load_file(ours.weights / "model.safetensors").keys()
    assert alone == {f"change of {name}" for name in weights if name.startswith("model.layers.1.")}
    assert len(alone) == 9
    assert next(row for row in rows if row.holds is False and row.name.startswith("update 1")).name.endswith("norm")


COMMANDS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "float16 weights": ({"dtype": "float16"}, np.float16, "--hf_compat 4.37"),
    "adapter of a tied model": (
        {"dtype": "bfloat16", "tie_word_embeddings": True},
        ml_dtypes.bfloat16,
        "--use_peft True --lora_dropout 0.1 --shrink 1",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command(name: str, case: Run, tmp_path: Path) -> None:
    """Each program in a process of its own, ours on one of the two devices that are visible. The tokenizer adds a row;
    an adapter's dropout is left out by both. The files' type does not matter: both train in float32."""
    changes, kind, more = COMMANDS[name]
    config = {**CONFIG, **changes}
    arrays = {key: array.astype(kind) for key, array in make_arrays(config).items()}
    write_tokenizer(write_model(tmp_path / "model", config, arrays), pad_token=None)
    words = [str(tmp_path / "model") if word == str(case.folder / "model") else word for word in case.argv]
    words = [str(tmp_path / "out") if word == str(case.folder / "out") else word for word in words]
    if "--hf_compat" in more:
        words = words[: words.index("--hf_compat")] + words[words.index("--hf_compat") + 2 :]
    given = [*words, "--dtype", "float32", "--updates", "2", *more.split()]
    command = [sys.executable, "-m", "llama_jax.parity", *given]
    done = subprocess.run(
        command, env=environment() | of_devices(2), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads((tmp_path / "out/parity.json").read_text())
    rows = [row for row in values["rows"] if row["section"] == updates.SECTION]
    assert sum(bool(row["error"]) for row in rows) > 5
    what = "adapter" if "--use_peft" in more else "folder"
    sections = [row["section"] for row in values["rows"]]
    assert f"the exported {what}, float32" in sections
    assert sections.count(servers.SECTION) == (0 if what == "adapter" else 2)
    assert [len(curve) for curve in values["curves"]["loss"].values()] == [2, 2]
    assert '<div class="curve" data-name="loss">' in (tmp_path / "out/parity.html").read_text()


def test_a_program_that_fails(case: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate has the other sections, and the line of the error."""
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('a first line\\nand a second')\n")
    monkeypatch.setattr(updates, "_PROCESS", [str(broken)])
    argv = [str(tmp_path / "out") if word == str(case.folder / "out") else word for word in case.argv]
    outcome = run(parity.main, *argv, "--shrink", 1)
    assert outcome.code == 1 and "the Trainer ended with 1: ValueError: a first line" in outcome.out
    values = json.loads((tmp_path / "out/parity.json").read_text())
    assert {"tokens", "gradients, float32", updates.SECTION} <= {row["section"] for row in values["rows"]}


def test_stopped(case: Run, tmp_path: Path) -> None:
    """SIGTERM ends the programs that are running, and leaves no file in the temporary folder."""
    slow = "import time; print('started', file=open('started', 'w')); time.sleep(600)"
    code = "import sys; from pathlib import Path; from llama_jax.proof import updates; "
    code += "from llama_jax.command.parity import main; updates._PROCESS = ['slow.py']; "
    code += f"Path('slow.py').write_text({slow!r}); sys.exit(main(sys.argv[1:]))"
    argv = ["--output_dir" if word == "--output_dir" else word for word in case.argv]
    argv = [str(tmp_path / "out") if word == str(case.folder / "out") else word for word in argv]
    (tmp_path / "temporary").mkdir()
    env = environment() | {"TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen([sys.executable, "-c", code, *argv, "--shrink", "1"], cwd=tmp_path, env=env)
    waiting = Path(tmp_path / "started")
    while not waiting.exists() and process.poll() is None:
        time.sleep(0.1)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.terminate()
    assert process.wait(60) == 143 and not Path(f"/proc/{child}").exists()
    assert not list((tmp_path / "temporary").glob("llama_jax-parity-*"))


ONES = np.ones(100)


@pytest.mark.parametrize(
    "ours, trainers, exact, holds",
    [
        (1.1, 1.1, 1.1, True),
        (1.1 + 1e-6, 1.1, 1.1, False),
        (1.1 + 1e-6, 1.1 + 1e-6, 1.1, True),
        (1.0, 1.1, 1.1, False),  # a layer that ours leaves out
        (1.1, 1.0, 1.0, False),
        (1.0, 1.0, 1.0, None),  # a rate of 0
        (1.0 + 2e-7, 1.0 + 1e-7, 1.0 + 2e-7, None),  # a change of some roundings of float32
    ],
)
def test_a_change(ours: float, trainers: float, exact: float, holds: bool | None) -> None:
    row = updates._change("w", ONES * ours, ONES * trainers, ONES * exact, ONES, 2, 0.0)
    assert row.holds is holds and (row.bound or row.note)


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--optim lion_32bit", "--optim lion_32bit"),
        ("--world_size 2", "leave --world_size out"),
        ("--adam_moments_dtype bfloat16", "leave --adam_moments_dtype out"),
        ("--use_peft True --load_in_8bit True", "leave --load_in_4bit and --load_in_8bit out"),
    ],
)
def test_what_is_not_compared(flags: str, reason: str, case: Run) -> None:
    subject = open_subject(parse_arguments([*case.argv, *flags.split()]), None)
    (row,) = compared(subject.job, case).rows
    assert row.holds is None and reason in row.note


def test_a_model_that_is_too_large(case: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 bytes a parameter, as measured."""
    subject = open_subject(parse_arguments(case.argv), None)
    count = subject.job.config.num_parameters
    for memory, remedy in ((60 * count - 1, ", or --shrink 1"), (60 * 1000, "")):
        monkeypatch.setattr(updates, "free_memory", lambda memory=memory: memory)
        (row,) = compared(subject.job, case).rows
        assert row.holds is None and row.note.endswith(f": free memory, or use a larger machine{remedy}")
    monkeypatch.setattr(updates, "free_memory", lambda: 60 * count)
    assert not updates._reason(subject.job, None, COUNT)


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's limit holds, and its cache of files is free."""
    monkeypatch.setattr(platform, "_GROUP", tmp_path)
    assert 0 < (whole := platform.free_memory()) < platform.host_memory()  # programs run
    (tmp_path / "memory.max").write_text("90000\n")
    (tmp_path / "memory.current").write_text("70000\n")
    (tmp_path / "memory.stat").write_text("anon 6\nfile 40000\ninactive_file 30000\nactive_file 10000\n")
    assert platform.free_memory() == 50_000
    (tmp_path / "memory.max").write_text("max\n")
    assert platform.free_memory() == pytest.approx(whole, rel=0.2)


def test_a_sample_of_examples_with_labels(tmp_path: Path, case: Run) -> None:
    """Prompts that fill --model_max_length have no label: the sample takes later examples."""
    long = {"instruction": "Count. " * 60, "input": "", "output": "1"}
    data = write_json(tmp_path / "data.json", [long] * 9 + ALPACA[:2])
    argv = [str(data) if word.endswith("data.json") else word for word in case.argv] + ["--model_max_length", "360"]
    sample = open_subject(parse_arguments(argv), None).sample
    assert len(sample.examples) == 2 and all((labels[1:] != -100).any() for _, labels in sample.examples)
