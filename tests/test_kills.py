"""Runs that SIGKILL ends at random moments, half of them in a save, end as an undisturbed run."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ALPACA, ROOT, drawn_cases, environment, write_json, write_model, write_tokenizer

FLAGS = {
    "4.37": "--hf_compat 4.37 --gradient_accumulation_steps 2",
    "best": "--hf_compat 5 --validation_split_percentage 20 --eval_strategy steps --eval_steps 2 "
    "--load_best_model_at_end True",
    "adapter": "--use_peft True --lora_r 4 --learning_rate 1e-3",
    "two": "--hf_compat 5",
}
KILLS = {"4.37": (60, 0), "best": (60, 2), "adapter": (40, 0), "two": (40, 0)}  # in proofs, in CI


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if KILLS[k][1] else pytest.mark.proof) for k in FLAGS]
)
def test_killed_runs(kind: str, tmp_path: Path) -> None:
    """Weights and log. Of two processes one is killed, and the other ends by itself. The seed is fresh, and printed."""
    write_tokenizer(write_model(tmp_path / "model"))
    flags = {
        **{"model": tmp_path / "model", "data_path": write_json(tmp_path / "data.json", ALPACA * 8)},
        **{"kills": drawn_cases(*KILLS[kind]), "processes": 1 + (kind == "two")},
        "flags": f"--use_cpu True --max_steps 12 --per_device_train_batch_size 2 {FLAGS[kind]}",
    }
    command = [
        sys.executable,
        ROOT / "benchmarks" / "kills.py",
        *(str(x) for k, v in flags.items() for x in (f"--{k}", v)),
    ]
    made = subprocess.run(command, env=environment(torch=False), capture_output=True, text=True, check=False)
    print(made.stdout)
    assert made.returncode == 0, made.stderr[-2000:]
    assert " 0 have not" in made.stdout and "seed" in made.stdout
