"""Make the tiny model and data of a run of the real Trainer, tests/golden/full.json, and the run's flags."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llama_jax.base.files import write_json
from llama_jax.hf.names import name_table
from llama_jax.model.config import LlamaConfig

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "full.json"
# A head dim of 128 is what a TPU's attention kernel takes. Weights four times HF's: gradients clear of rounding.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
UPDATES = 20
# Adam divides by at least its epsilon: with the default of 1e-8, the rounding of small gradients becomes whole steps.
TRAINER = f"""--max_steps {UPDATES} --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --learning_rate 1e-3
--lr_scheduler_type cosine --warmup_steps 2 --weight_decay 0.1 --optim adamw_torch --adam_epsilon 1e-4 --logging_steps 1
--save_strategy no --seed 42"""


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write the model's folder and the data's file. The streams of RandomState are the same in every numpy."""
    model, data = folder / "model", folder / "data.json"
    model.mkdir()
    random = np.random.RandomState(0)
    arrays = {}
    for name, (_, shape) in name_table(LlamaConfig.from_hf(CONFIG)).items():
        drawn = random.standard_normal(shape).astype(np.float32) * np.float32(CONFIG["initializer_range"])
        arrays[name] = 1 + drawn if "norm" in name else drawn
    save_file(arrays, model / "model.safetensors", {"format": "pt"})
    write_json(model / "config.json", CONFIG)
    records = []
    for _ in range(8 * UPDATES):
        ids = random.randint(3, CONFIG["vocab_size"], random.randint(20, 150)).tolist()
        masked = random.randint(1, len(ids) // 2)
        records.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    data.write_text(json.dumps(records))
    return model, data
