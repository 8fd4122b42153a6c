"""Compile programs for an H200 on a machine without a GPU, by the compiler of jax's CUDA plugin.

Run in a process of its own: `environment` gives its variables, `main` prints the programs' HLO, and `memory` the bytes
that updates need. Without a GPU the compiler cannot time kernels: products are cuBLAS' or XLA's.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(sys.prefix) / "cuda"  # the Makefile fills it
# An H200 as the compiler describes one (`--xla_dump_to` on such a machine writes it).
DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability { major: 9 }
  memory_bandwidth: 4814000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 14 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
LAYERS, TOKENS, SLOTS = 2, 256, 128
SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "vocab_size": 768}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "model_type": "llama", "tie_word_embeddings": False}


# LLaMA-7B with fewer layers, and the rows and tokens of an update.
WIDE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 5, "vocab_size": 32000}
WIDE |= {"num_attention_heads": 32, "num_key_value_heads": 32, "model_type": "llama", "tie_word_embeddings": False}
WORK = (6, 2048)


def environment(merged: bool = False) -> dict[str, str]:
    """Return the variables of the compiler's process. Without `merged`, products of one input are not merged."""
    root = Path(__file__).parent.parent
    flags = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    # Products of one input are merged where they are small, as in SHAPE, and not at the sizes of real models.
    flags |= {"XLA_FLAGS": "--xla_gpu_autotune_level=0" + ("" if merged else " --xla_gpu_dot_merger_threshold_mb=0")}
    return os.environ | flags | {"PYTHONPATH": f"{FOLDER}:{root}:{root}/tests"}


def one_device() -> Any:
    """Return the mesh of an H200 that is not there; cuDNN's attention compiles for it."""
    import jax
    from jax._src import xla_bridge
    from jax.experimental import topologies

    from llama_jax.distributed import sharding
    from llama_jax.distributed.compat import cudnn_attention

    known = xla_bridge.canonicalize_platform

    def canonicalize(platform: str) -> str:  # jax's issue 23971: without a GPU, "gpu" is no platform's name
        return "cuda" if platform == "gpu" else known(platform)

    xla_bridge.canonicalize_platform = canonicalize
    topology = topologies.get_topology_desc(platform="cuda", target_config=DEVICE, topology="1x1x1")
    jax.config.update("jax_default_matmul_precision", "highest")
    cudnn = cudnn_attention()
    # jax's checks look for a device.
    cudnn.check_cudnn_version, cudnn.check_compute_capability = lambda: 91400, lambda capability: True
    cudnn.is_cuda_compute_capability_equal = lambda capability: False
    return sharding.make_mesh(topology.devices)


def memory(folder: Path, cases: list[list[str]]) -> None:
    """Print a JSON object: for each of `cases`, flags of a run of WIDE, the bytes by arithmetic, the least bytes
    by arithmetic, and those that the compiled update needs."""
    from tiny import write_json

    from llama_jax.model.config import LlamaConfig
    from llama_jax.plan.planner import Option, Planner
    from llama_jax.setup.arguments import parse_arguments
    from llama_jax.setup.job import make_job

    rows, length = WORK
    data = write_json(folder / "data.json", [{"input_ids": [1] * length, "labels": [1] * length}] * rows)
    mesh, config, found = one_device(), LlamaConfig.from_hf(WIDE), []
    flags = {"model_name_or_path": folder, "data_path": data, "bf16": True, "max_steps": 1, "attention": "cudnn"}
    flags |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    given = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    for case in cases:
        args = parse_arguments([*given, *case])
        planner = Planner(make_job(args, config, lambda: folder, 1, True), mesh, "gpu", "float32", False)
        option = Option(rows * length, args.remat)
        needed = planner.make(option).compile(WORK, mesh)
        found.append((planner.estimate(option), planner.least_bytes(option), needed))
    print(json.dumps(found))


def main() -> None:
    """Print a JSON object: the optimized HLO of each program by its name."""
    import jax
    import jax.numpy as jnp

    from llama_jax.distributed import sharding
    from llama_jax.model import attention
    from llama_jax.model.config import LlamaConfig
    from llama_jax.model.definition import define
    from llama_jax.model.generate import Sampling, _decode, _prefill
    from llama_jax.model.llama import RunOptions
    from llama_jax.model.quantized import Quantization
    from llama_jax.training.optimizer import make_optimizer
    from llama_jax.training.state import abstract_state
    from llama_jax.training.step import Steps

    mesh = one_device()
    config = LlamaConfig.from_hf(SHAPE)

    def update(run: RunOptions, **optimizer: Any) -> str:
        definition, tx = define(config, run, mesh), make_optimizer(**optimizer)
        steps, shape = Steps(definition, tx, config.vocab_size), (1, TOKENS)
        steps.compile(abstract_state(tx, definition, mesh), shape, mesh)
        return steps.programs[shape].as_text()

    def decoding(rows: int, **options: Any) -> str:
        definition = define(config, RunOptions(param_dtype=jnp.dtype(jnp.bfloat16), **options), mesh)
        static = (definition.graphdef, (), Sampling())
        with jax.set_mesh(mesh):
            block, row = (rows, SLOTS), (rows,)
            arrays = (block, jnp.int32), (block, jnp.int32), (row, jnp.int32), ((rows, 1), bool)
            ids, positions, sizes, seen = (sharding.on(mesh, jax.ShapeDtypeStruct(*a)) for a in arrays)
            keys = jax.eval_shape(lambda n: jax.vmap(jax.random.key)(n), sizes)
            prompt = (definition.params, ids, positions, sizes, seen, keys)
            state = jax.eval_shape(lambda *arrays: _prefill(*static, SLOTS, *arrays), *prompt)
            ended, count = (sharding.on(mesh, jax.ShapeDtypeStruct(*a)) for a in ((row, bool), ((), jnp.int32)))
            return _decode.lower(*static, 4, definition.params, state, ended, count).compile().as_text()

    texts = {f"decoding {rows}": decoding(rows) for rows in (1, 8)}
    texts |= {f"decoding {rows} in int8": decoding(rows, quantization=Quantization(8)) for rows in (1, 8)}
    attention.LARGE = attention.MANY = 0
    for name, stacked in (("decoding 8 by cudnn", False), ("decoding 8, stacked", True)):
        texts[name] = decoding(8, attention=attention.Kernel("cudnn", 1), scan_layers=stacked)
    texts["fp8"] = update(RunOptions(compute_dtype=jnp.bfloat16, fp8=True))
    texts["8 bits"] = update(RunOptions(compute_dtype=jnp.bfloat16), name="adamw_8bit")
    print(json.dumps(texts))
