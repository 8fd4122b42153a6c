"""Compare the answers to `--sample_prompts` with those of transformers from the same weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jax.errors import JaxRuntimeError
from test_training import Job, assert_same_run
from tiny import ALPACA, ROOT, of_devices, run, write_json, write_tokenizer

import train_jax
from llama_jax.data.examples import alpaca_prompt
from llama_jax.reporting.run_report import VALUES
from llama_jax.run.answering import Answerer
from llama_jax.run.samples import MOST, NEW_TOKENS

QUESTIONS = ["Name a fish.", "ab"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("samples")
    job = Job(folder, data_path=folder / "alpaca.json", logging_steps=2, hf_compat="5")
    write_json(folder / "alpaca.json", ALPACA * 5)
    write_tokenizer(folder / "model")
    (folder / "questions.txt").write_text("".join(f"{question}\n" for question in QUESTIONS))
    job.train("sampled", sample_prompts=folder / "questions.txt")
    return job


def answers(folder: Path) -> dict[int, list[str]]:
    """The answers by step; each step has them once."""
    entries = json.loads((folder / VALUES).read_text())["answers"]
    assert len({entry["step"] for entry in entries}) == len(entries)
    return {entry["step"]: entry["texts"] for entry in entries}


def theirs(folder: Path, prompts: list[str]) -> list[str]:
    """Return transformers' greedy answers by an HF folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


def test_answers_are_those_of_the_weights(job: Job) -> None:
    """Before the run, at each save, at the end: by transformers, from the model's folder and the exported one."""
    found = answers(job.folder / "sampled")
    assert [*found] == [0, 2, 4, 6]
    prompts = [alpaca_prompt({"instruction": question}) for question in QUESTIONS]
    assert found[0] == theirs(job.folder / "model", prompts)
    assert found[6] == theirs(job.folder / "sampled", prompts)
    assert found[0] != found[6]
    assert json.loads((job.folder / "sampled" / VALUES).read_text())["prompts"] == QUESTIONS


@pytest.mark.slow
def test_the_run_is_the_same(job: Job) -> None:
    job.train("plain")
    assert_same_run(job.folder / "plain", job.folder / "sampled")


@pytest.mark.slow
def test_the_last_update_without_a_save(job: Job) -> None:
    questions = [{"instruction": "a", "input": "b"}, {"text": "c"}, {"prompt": "d"}]
    (job.folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    out = job.train("late", sample_prompts=job.folder / "q.jsonl", save_strategy="no")
    assert [*answers(out)] == [0, 6]
    assert json.loads((out / VALUES).read_text())["prompts"] == ["a\nb", "c", "d"]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_answers(job: Job) -> None:
    argv = job.argv("again", sample_prompts=job.folder / "questions.txt", max_steps=4, lr_scheduler_type="constant")
    assert run(train_jax.main, *argv).code == 0
    first = answers(job.folder / "again")
    argv[argv.index("--max_steps") + 1] = "6"
    argv[argv.index("--output_dir") + 1] = str(job.folder / "again")
    (job.folder / "again" / "model.safetensors").unlink()
    outcome = run(train_jax.main, *argv, "--resume_from_checkpoint", "True")
    assert outcome.code == 0, outcome.err
    assert [*answers(job.folder / "again")] == [0, 2, 4, 6]
    assert {step: answers(job.folder / "again")[step] for step in first} == first
    (job.folder / "other.txt").write_text("Another question?\n")
    argv[argv.index("--sample_prompts") + 1] = str(job.folder / "other.txt")
    argv[argv.index("--max_steps") + 1] = "8"
    (job.folder / "again" / "model.safetensors").unlink()
    outcome = run(train_jax.main, *argv, "--resume_from_checkpoint", "True")
    assert outcome.code == 0, outcome.err
    assert [*answers(job.folder / "again")] == [6, 8], "of the new question alone"


def test_without_memory_training_goes_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Answerer, "block", full)
    outcome = run(train_jax.main, *job.argv("full", sample_prompts=job.folder / "questions.txt"))
    assert outcome.code == 0 and outcome.err.count("memory does not suffice beside the training") == 1
    assert answers(job.folder / "full") == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the file is empty"),
        ('{"a": 1}\n', "record 1 is no question"),
        ('{"prompt": "x"}\n' * (MOST + 1), f"has {MOST + 1} questions; give at most {MOST}"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "chat template"),
    ],
)
def test_refused(job: Job, text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    outcome = run(train_jax.main, *job.argv("refused", sample_prompts=tmp_path / "q.jsonl"))
    assert outcome.code == 2 and outcome.compiled == 0 and named in outcome.err.splitlines()[-1], outcome.err
    outcome = run(train_jax.main, *job.argv("refused", sample_prompts=tmp_path / "none.txt"))
    assert outcome.code == 2 and "none.txt" in outcome.err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=4", "fsdp=2,tensor=2", "context=2,fsdp=2"])
def test_on_several_devices(job: Job, mesh: str, tmp_path: Path) -> None:
    """The same answers before the first update; rows that are divided are refused."""
    changes = {"sample_prompts": job.folder / "questions.txt", "mesh": mesh, "max_steps": 2, "world_size": 1}
    argv = [sys.executable, ROOT / "train_jax.py", *job.argv(f"mesh-{mesh}", **changes)]
    done = subprocess.run(list(map(str, argv)), env=of_devices(4), capture_output=True, text=True, check=False)
    if "context" in mesh:
        assert done.returncode == 2 and "leave context out of it" in done.stderr.splitlines()[-1]
        return
    assert done.returncode == 0, done.stderr
    assert answers(job.folder / f"mesh-{mesh}")[0] == answers(job.folder / "sampled")[0]
