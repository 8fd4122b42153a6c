"""`--explain` tells what the run then does, compiles nothing and leaves nothing behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIG, log_entries, make_records, run, slow_unless, write_json, write_model

import train_jax

SEEDS_FLAGS = [
    *("--bf16", "True", "--num_train_epochs", "1", "--per_device_train_batch_size", "1"),
    *("--per_device_eval_batch_size", "1", "--gradient_accumulation_steps", "8", "--evaluation_strategy", "no"),
    *("--save_strategy", "steps", "--save_steps", "2000", "--save_total_limit", "1", "--learning_rate", "2e-5"),
    *("--weight_decay", "0.", "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--logging_steps", "1"),
    *("--tf32", "True", "--report_to", "none", "--loggingdir", "./log"),
]
# Section 0 of the facts, and the first indices observed in the Trainer of 5.
SEEDS_RUN: dict[str, dict[str, Any]] = {
    "4.37": {
        "updates": 6500,
        "warmup_updates": 195,
        "updates_per_epoch": 6500,
        "checkpoints_left": ["checkpoint-6000"],
    },
    "5": {"updates": 6501, "warmup_updates": 196, "updates_per_epoch": 6501, "checkpoints_left": ["checkpoint-6501"]},
}


def explained(*flags: Any) -> dict[str, Any]:
    outcome = run(train_jax.main, *flags, "--explain", "json")
    assert outcome.code == 0, outcome.err
    assert outcome.compiled == 0
    return json.loads(outcome.out)


def check_seeds_run(facts: dict[str, Any], compat: str) -> None:
    assert SEEDS_RUN[compat].items() <= facts.items()
    assert facts["examples"] == 52002 and len(facts["first_examples"]) == 8
    if compat == "5":
        assert facts["first_examples"][:5] == [7674, 32279, 38878, 9568, 38952]
    assert facts["learning_rates"][str(facts["warmup_updates"] + 1)] == 2e-5


@pytest.mark.parametrize("compat", ["4.37", slow_unless(False, "5")])
def test_the_seeds_command(compat: str, tmp_path: Path) -> None:
    """As many records as Alpaca has."""
    records = [{"input_ids": [1, 2 + i % 100, 2], "labels": [-100, 2 + i % 100, 2]} for i in range(52002)]
    model, data = write_model(tmp_path / "model"), write_json(tmp_path / "data.json", records)
    out = tmp_path / "out"
    flags = ["--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--hf_compat", compat]
    check_seeds_run(explained(*flags, *SEEDS_FLAGS), compat)
    assert not out.exists()


@pytest.mark.proof
@pytest.mark.parametrize("compat", ["4.37", "5"])
def test_the_seeds_command_on_alpaca(compat: str, shared: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {**CONFIG, "vocab_size": 32000})
    for file in (shared / "data" / "llama-tokenizer").iterdir():
        shutil.copy(file, model)
    data = shared / "data" / "alpaca" / "alpaca_data.json"
    flags = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "out"]
    facts = explained(*flags, "--hf_compat", compat, *SEEDS_FLAGS)
    check_seeds_run(facts, compat)
    assert facts["fill"] > 0.9
    assert facts["data"]["findings"]["empty_outputs"]["count"] == 28  # as its README counts them
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@settings(max_examples=6)
@given(
    flags=st.fixed_dictionaries(
        {
            "hf_compat": st.sampled_from(["4.37", "5"]),
            "per_device_train_batch_size": st.integers(1, 3),
            "gradient_accumulation_steps": st.integers(1, 4),
            "num_train_epochs": st.sampled_from([1.0, 1.5, 2.0]),
            "warmup_ratio": st.sampled_from([0.0, 0.3]),
            "save_steps": st.sampled_from([1, 2, 3, 0.4]),
            "save_strategy": st.sampled_from(["steps", "epoch"]),
            "save_total_limit": st.integers(1, 3),
            "eval_strategy": st.sampled_from(["no", "steps", "epoch"]),
            "eval_steps": st.integers(1, 3),
            "validation_split_percentage": st.just(20),
        }
    ),
    count=st.integers(6, 14),
)
def test_the_run_does_what_was_explained(
    flags: dict[str, Any], count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    model, data = write_model(folder / "model"), write_json(folder / "data.json", make_records(count))
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", folder / "out", "--logging_steps", 1]
    argv += [part for name, value in flags.items() for part in (f"--{name}", value)]
    facts = explained(*argv)
    assert not (folder / "out").exists()
    outcome = run(train_jax.main, *argv)
    assert outcome.code == 0, outcome.err
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    assert facts["updates"] == state["global_step"] == state["max_steps"]
    assert facts["epochs"] == pytest.approx(state["epoch"], abs=0.005)
    assert sorted(facts["checkpoints_left"]) == sorted(p.name for p in (folder / "out").glob("checkpoint-*"))
    assert facts["evaluations"] == [e["step"] for e in state["log_history"] if "eval_loss" in e]
    assert facts["examples"] + facts["eval_examples"] == count
    shift = 0 if flags["hf_compat"] == "5" else 1  # 4.37 logs the next update's rate
    logged = {e["step"] + shift: e["learning_rate"] for e in log_entries(folder / "out")}
    assert {int(k): v for k, v in facts["learning_rates"].items() if int(k) in logged} == {
        int(k): logged[int(k)] for k in facts["learning_rates"] if int(k) in logged
    }
    assert f"at most {facts['blocks_an_update']} block(s)" in outcome.err


def test_explained_as_text(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model"), write_json(tmp_path / "data.json", make_records(21))
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", 7]
    outcome = run(train_jax.main, *argv, "--explain")
    assert outcome.code == 0 and outcome.compiled == 0, outcome.err
    for wanted in ("updates:           7", "warm-up:", "learning rate:", "checkpoints:", "state:", "transformers 4.37"):
        assert wanted in outcome.out
    assert not (tmp_path / "out").exists()
