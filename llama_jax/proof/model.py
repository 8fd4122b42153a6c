"""Compare a whole model in one precision: its forward pass, then its gradients."""

import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.hf.source import Source
from llama_jax.model.attention import Kernel, choose_kernel
from llama_jax.model.config import LlamaConfig
from llama_jax.model.llama import RunOptions
from llama_jax.proof.forward import compare_forward
from llama_jax.proof.gradients import compare_gradients
from llama_jax.proof.our_layers import OurLayers
from llama_jax.proof.sample import Sample
from llama_jax.proof.torch_layers import BF16, BF16_WEIGHTS, FLOAT32, Reference
from llama_jax.proof.verdict import Row

FORWARD, ALONE, GRADIENTS = "forward", "gradients of a part alone", "gradients"


def run_options(precision: str, config: LlamaConfig, sample: Sample, mesh: Mesh, kernel: str = "auto") -> RunOptions:
    """Return the options by which a run computes in a precision, with `--attention kernel`. Raises InputError."""
    device = mesh.devices.flat[0]
    kind = "float32" if precision == FLOAT32 else "bfloat16"
    name, _ = choose_kernel(kernel, device.platform, device.device_kind, config.head_dim, kind)
    compute = jnp.bfloat16 if precision == BF16 else None
    return RunOptions(
        param_dtype=jnp.dtype(jnp.bfloat16 if precision == BF16_WEIGHTS else jnp.float32),
        compute_dtype=compute,
        rope_dtype=compute if sample.compat == "4.37" else None,  # as plan/planner.py
        attention=Kernel(name, len(sample.examples), device.device_kind),
        longest=int(sample.lengths.max()),
    )


def compare_model(
    reference: Reference,
    source: Source,
    config: LlamaConfig,
    sample: Sample,
    precision: str,
    mesh: Mesh,
    new_ids: tuple[int, ...] = (),
    kernel: str = "auto",
    gradients: bool = True,
) -> list[Row]:
    """Return the rows of a model. `config` is the source's, perhaps with fewer layers or other rows of the vocabulary;
    `new_ids` are the tokens that a run adds. Raises InputError."""
    run = run_options(precision, config, sample, mesh, kernel)
    ours = OurLayers(source, config, run, mesh, sample.batch, new_ids)
    rows, walk = compare_forward(reference, ours, sample, precision, f"{FORWARD}, {precision}")
    if gradients:
        rows += compare_gradients(reference, ours, sample, walk, f"{ALONE}, {precision}", f"{GRADIENTS}, {precision}")
    return rows
