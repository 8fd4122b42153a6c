#!/usr/bin/env python3
"""Write an HF folder of a LLaMA shape with random weights: `make_model.py --shape llama-7b --output_dir DIR`.

For measurements: the weights are normal with the config's initializer_range, the norms 1, written in 5 GB shards.
"""

import argparse
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llama_jax.base.files import write_json
from llama_jax.hf.names import name_table
from llama_jax.hf.source import numpy_dtype
from llama_jax.hf.writer import plan_shards, write_index
from llama_jax.model.config import LlamaConfig

# vocab, hidden, intermediate, layers, heads, kv heads, rope theta, positions, tied
SHAPES = {
    "tiny": (512, 64, 192, 2, 8, 4, 1e4, 512, True),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 1e5, 8192, True),
    "llama-3b": (128256, 3072, 8192, 28, 24, 8, 5e5, 8192, True),
    "llama-7b": (32000, 4096, 11008, 32, 32, 32, 1e4, 2048, False),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 5e5, 8192, False),
    "llama-13b": (32000, 5120, 13824, 40, 40, 40, 1e4, 2048, False),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 8, 1e4, 4096, False),
}


def raw_config(shape: str, layers: int | None = None) -> dict:
    """Return a `config.json` of the shape, with fewer layers if given."""
    vocab, hidden, ffn, depth, heads, kv, theta, positions, tied = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rope_theta": theta,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    raw, dtype = raw_config(args.shape, args.layers), numpy_dtype(args.dtype)
    table = name_table(LlamaConfig.from_hf(raw))
    number = {name: i for i, name in enumerate(table)}

    def tensor(name: str) -> np.ndarray:
        shape = table[name][1]
        if name.endswith("norm.weight"):
            return np.ones(shape, dtype)
        random = np.random.default_rng([args.seed, number[name]]).standard_normal(shape, np.float32)
        return (random * np.float32(raw["initializer_range"])).astype(dtype)

    sizes = {name: math.prod(shape) * dtype.itemsize for name, (_, shape) in table.items()}
    files = plan_shards(sizes)
    with ThreadPoolExecutor() as pool:
        for file, names in files.items():
            save_file(dict(zip(names, pool.map(tensor, names), strict=True)), args.output_dir / file, {"format": "pt"})
    write_index(args.output_dir, files, sum(sizes.values()))
    write_json(args.output_dir / "config.json", {**raw, "torch_dtype": args.dtype})
    for path in args.tokenizer.glob("*token*") if args.tokenizer else ():
        shutil.copyfile(path, args.output_dir / path.name)


if __name__ == "__main__":
    main()
