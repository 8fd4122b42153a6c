"""Products with a weight: operands that a TPU computes once, the same digits everywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import CONFIG

from llama_jax.distributed import sharding
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.matmul import SCATTER, project, project_apart
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import abstract_state
from llama_jax.training.step import abstract_batch, losses_of


def three(products, x, weights):
    """A norm before three products, and an activation after the first."""
    a, b, c = products(x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)), weights)
    return jnp.sum(jax.nn.silu(a) * b * c)


def test_operands_that_are_computed_once(mesh: Mesh) -> None:
    """The digits are those of `project`, and gradients; a TPU's program alone has barriers: x, and three gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 8, 32))
    weights = [jax.random.normal(key, (48, 32)) for key in keys[1:]]
    how = sharding.ACT_BTF, SCATTER
    functions = {
        "apart": jax.value_and_grad(partial(three, partial(project_apart, *how)), argnums=(0, 1)),
        "plain": jax.value_and_grad(partial(three, lambda x, ws: [project(*how, x, w) for w in ws]), argnums=(0, 1)),
    }
    results = {name: jax.tree.map(np.asarray, jax.jit(f)(x, weights)) for name, f in functions.items()}
    assert jax.tree.all(jax.tree.map(np.array_equal, *results.values()))
    barriers = {
        (name, platform): jax.jit(f)
        .trace(x, weights)
        .lower(lowering_platforms=(platform,))
        .as_text()
        .count("optimization_barrier")
        for name, f in functions.items()
        for platform in ("tpu", "cuda", "cpu")
    }
    assert {key for key, count in barriers.items() if count} == {("apart", "tpu")}
    assert barriers["apart", "tpu"] == 4


@pytest.mark.parametrize(
    ("layers", "scan_layers", "remat", "on_cpu", "on_tpu"),
    [
        # One, of all layers alike, keeps what they compute again apart from the forward pass; a loop needs none. A TPU
        # has four more for operands (of q, k and v, of o_proj, of gate and up, of down_proj), which are computed
        # twice, and seven for gradients. Layers that are not computed again have none.
        (2, True, "none", 0, 0),
        (2, True, "full", 0, 4 + 4 + 7),
        (2, True, "matmuls", 0, 4 + 4 + 7),
        (2, False, "matmuls", 1, 1 + 4 + 4 + 7),
        (2, False, "none", 0, 0),
        (1, True, "full", 1, 1 + 4 + 4 + 7),  # XLA takes such a loop apart
    ],
)
def test_barriers_of_a_model(layers: int, scan_layers: bool, remat: str, on_cpu: int, on_tpu: int, mesh: Mesh) -> None:
    config = LlamaConfig.from_hf({**CONFIG, "num_hidden_layers": layers})
    run = RunOptions(scan_layers=scan_layers, remat=remat)
    definition = define(config, run, mesh)
    params = abstract_state(make_optimizer(), definition, mesh).trainable

    def loss(params, batch):
        return losses_of(definition.graphdef, params, batch, config.vocab_size)[0]

    traced = jax.jit(jax.grad(loss)).trace(params, abstract_batch(mesh, (mesh.size, 16)))
    for name, expected in (("cpu", on_cpu), ("tpu", on_tpu)):
        text = traced.lower(lowering_platforms=(name,)).as_text()
        assert text.count("optimization_barrier") == expected, (name, text.count("optimization_barrier"))
