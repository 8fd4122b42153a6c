"""Moments in the host's memory: the same digits as on the device, where they are, and what they cost."""

import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_meshes import on_eight_devices
from test_training import Job, assert_same_run
from tiny import CONFIG

from llama_jax.data.batches import Batch
from llama_jax.distributed import sharding
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.lora import Lora, Rank
from llama_jax.model.roles import EmbeddingTable, MatmulWeight
from llama_jax.training.fit import put_batch
from llama_jax.training.guard import Guard
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import TrainState, abstract_state, init_state
from llama_jax.training.step import Steps

ROWS, TOKENS = 8, 16
HALVES = {"compute_dtype": jnp.bfloat16}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # options of the run, of the optimizer, blocks
    "one block": ({}, {}, 1),
    "halves": (HALVES, {}, 1),
    "sums": ({}, {}, 2),
    "sums, halves": (HALVES, {}, 2),
    "stacked halves": ({**HALVES, "scan_layers": True}, {}, 1),
    "bfloat16 parameters": ({"param_dtype": jnp.bfloat16, **HALVES}, {}, 1),
    "bfloat16 moments": (HALVES, {"moments": "bfloat16", "seed": 3}, 1),
    "8 bits": (HALVES, {"name": "adamw_8bit"}, 1),
    "lion": ({}, {"name": "lion_32bit"}, 2),
    "adapters": ({"lora": Lora(tuple(((i, "self_attn.q_proj"), Rank(4, 2.0)) for i in range(2)))}, {}, 1),
}


class Made:
    """Updates of a form with moments on the device or on the host."""

    def __init__(self, form: str, offload: bool, mesh: str = "fsdp=1", guard: Guard = Guard()):
        options, of_optimizer, self.blocks = FORMS[form]
        devices = jax.devices()[: math.prod(int(part.partition("=")[2]) for part in mesh.split(","))]
        self.mesh, config = sharding.make_mesh(devices, mesh), LlamaConfig.from_hf({**CONFIG, "num_hidden_layers": 3})
        definition = define(config, RunOptions(**options), self.mesh)
        decays = definition.having(MatmulWeight, EmbeddingTable)
        tx = make_optimizer(**{"weight_decay": 0.1, "decays": decays, "max_grad_norm": 0.5, **of_optimizer})
        self.steps = Steps(definition, tx, config.vocab_size, sums=self.blocks > 1, guard=guard, offload=offload)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: jax.device_put(rng.normal(0, 0.1, x.shape).astype(x.dtype), x.sharding), definition.params
        )
        self.state = init_state(params, tx, definition, self.mesh, offload)
        self.abstract = abstract_state(tx, definition, self.mesh, offload)
        self.needed = self.steps.compile(self.abstract, (ROWS, TOKENS), self.mesh)

    def update(self, seed: int, added: float = 0.0) -> dict[str, Any]:
        rng, blocks = np.random.default_rng(seed), []
        for _ in range(self.blocks):
            ids, targets = rng.integers(0, CONFIG["vocab_size"], (2, ROWS, TOKENS)).astype(np.int32)
            weights = np.full((ROWS, TOKENS), 1 / (ROWS * TOKENS * self.blocks), np.float32)
            weights[0, 3] += np.float32(added)
            places = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), ids.shape)
            same = np.ones_like(ids)
            blocks.append(put_batch(self.mesh, Batch(ids, places, same, same * TOKENS, targets, weights)))
        rate = sharding.put_scalar(self.mesh, np.float32(1e-2))
        self.state, outputs = self.steps.update(self.state, blocks, rate, self.mesh)
        return jax.device_get(outputs[-1])


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_digits(form: str) -> None:
    """Of the whole state and of the metrics, after good and skipped updates."""
    there, here = Made(form, True), Made(form, False)
    assert_same_bits(there.state, here.state)
    for seed, added in ((1, 0.0), (2, 0.0), (3, math.nan), (4, 0.0)):
        one, two = there.update(seed, added), here.update(seed, added)
        assert one["skipped"] == two["skipped"] == (added != 0), seed
        assert_same_bits(one, two)
        assert_same_bits(there.state, here.state)
