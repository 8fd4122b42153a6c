"""Runs of adapters by the real Trainer with PEFT and bitsandbytes, kept as files for machines that have neither.

    .venv/bin/python tests/golden_adapters.py

writes tests/golden/NAME.json (loss, gradient norm and learning rate of every update) and NAME.safetensors (PEFT's
adapter).
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tiny import CONFIG, make_records, write_json, write_model

GOLDEN = Path(__file__).parent / "golden"
WIDE = {**CONFIG, "hidden_size": 64, "intermediate_size": 128}  # 4 bits need multiples of 64
TRAINER = (
    "--learning_rate 1e-3 --optim adamw_torch --adam_epsilon 1e-4 --logging_steps 1 --max_steps 8 --save_strategy no"
)


class Golden(NamedTuple):
    """`adapter` has flags of train_jax.py, `peft` and `quantization` the same for PEFT and BitsAndBytesConfig."""

    adapter: str
    peft: dict[str, Any]
    trainer: str
    quantization: dict[str, Any] | None = None


RUNS = {
    "lora": Golden(
        "--lora_r 4 --lora_alpha 8 --lora_target_modules all-linear --lora_modules_to_save lm_head",
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --lr_scheduler_type cosine --warmup_steps 2",
    ),
    "dora": Golden(
        "--lora_r 3 --lora_alpha 8 --lora_target_modules q_proj down_proj --use_dora True --use_rslora True",
        {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
        "--per_device_train_batch_size 3 --weight_decay 0.1 --max_grad_norm 0.05",
    ),
    "qlora": Golden(
        "--lora_r 4 --lora_alpha 16 --load_in_4bit True --use_bnb_nested_quant True",
        {"r": 4, "lora_alpha": 16},
        "--per_device_train_batch_size 2",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
}


def write_inputs(folder: Path) -> tuple[Path, Path]:
    return write_model(folder / "model", WIDE), write_json(folder / "data.json", make_records(12, seed=5))


def main() -> None:
    from hf_trainer import Server

    server = Server("5")
    with tempfile.TemporaryDirectory() as directory:
        model, data = write_inputs(Path(directory))
        for name, golden in RUNS.items():
            out = Path(directory) / name
            spec: dict[str, Any] = {"model": str(model), "data": str(data), "output_dir": str(out), "attn": "eager"}
            spec["argv"] = [*TRAINER.split(), *golden.trainer.split()]
            spec["peft"] = {**golden.peft, "task_type": "CAUSAL_LM"}
            if golden.quantization:
                spec["quantization"] = golden.quantization
            done = server.train(spec)
            if "error" in done:
                sys.exit(done["error"])
            shutil.copyfile(out / "adapter" / "adapter_model.safetensors", GOLDEN / f"{name}.safetensors")
            kept = {key: done[key] for key in ("losses", "grad_norms", "rates")}
            write_json(GOLDEN / f"{name}.json", {"versions": server.versions, **kept})
    server.close()


if __name__ == "__main__":
    main()
