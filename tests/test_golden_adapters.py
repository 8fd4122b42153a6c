"""Runs of adapters against the files of `golden_adapters.py`: the Trainer's, PEFT's and bitsandbytes' own results."""

import json
from pathlib import Path

import pytest
from golden_adapters import GOLDEN, RUNS, TRAINER, write_inputs
from safetensors.numpy import load_file
from test_live import same_run, train_ours
from tiny import slow_unless


@pytest.mark.parametrize("name", ["qlora", *(slow_unless(False, name) for name in ("lora", "dora"))])
def test_golden(name: str, tmp_path: Path) -> None:
    model, data = write_inputs(tmp_path)
    argv = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    argv += ["--use_cpu", "True", "--hf_compat", "5", "--use_peft", "True", "--lora_dropout", "0"]
    golden, expected = RUNS[name], json.loads((GOLDEN / f"{name}.json").read_text())
    ours = train_ours([*argv, *TRAINER.split(), *golden.adapter.split(), *golden.trainer.split()], tmp_path / "out")
    same_run(ours, expected, load_file(GOLDEN / f"{name}.safetensors"))
