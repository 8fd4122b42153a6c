"""LLaMA's sister models: config, mathematics, folders and runs against transformers' own classes.

The pattern and the tolerances are those of `test_parity.py`, which holds LLaMA to transformers.
"""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from test_parity import (
    LOGITS_ATOL,
    Packed,
    Weights,
    assert_equal_outcomes,
    assert_within,
    bfloat16_ratio,
    make_batch,
    make_hf,
    make_params,
    make_raw,
    make_weights,
    pack,
    run_hf,
    run_ours,
    torch,
    transformers,
)
from tiny import SISTERS, slow_unless

from llama_jax.distributed import sharding
from llama_jax.model.cache import make_cache
from llama_jax.model.config import LlamaConfig
from llama_jax.model.llama import RunOptions


def make_case(name: str, seed: int) -> tuple[dict[str, Any], LlamaConfig, np.random.Generator, Weights]:
    raw = make_raw(**SISTERS[name])
    config, rng = LlamaConfig.from_hf(raw), np.random.default_rng(seed)
    return raw, config, rng, make_weights(config, rng)


RUNS = {
    "unrolled": RunOptions(),
    "scanned": RunOptions(scan_layers=True, remat="matmuls"),
    "recomputed": RunOptions(remat="full"),
}
# Of each family, one run is quick; "mistral" and "qwen3" are parts of the cases after them.
QUICK = list(zip([name for name in SISTERS if name not in ("mistral", "qwen3")], 2 * list(RUNS), strict=False))
CHOSEN = [slow_unless((name, run) in QUICK, name, run) for name in SISTERS for run in RUNS]


@pytest.mark.parametrize(("name", "run"), CHOSEN)
def test_logits_loss_and_gradients(name: str, run: str, mesh: Mesh) -> None:
    """Right-padded rows longer than the window."""
    raw, config, rng, weights = make_case(name, 11)
    batch = make_batch(config, rng, [13, 7, 19])
    ours = run_ours(config, RUNS[run], mesh, weights, batch, 0.1)
    theirs, bounds = run_hf(raw, weights, batch, 0.1)
    assert_equal_outcomes(batch, ours, theirs, bounds)


@pytest.mark.parametrize("name", SISTERS)
def test_parameters_are_counted(name: str) -> None:
    raw = make_raw(**SISTERS[name])
    config = LlamaConfig.from_hf(raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    assert config.num_parameters == model.num_parameters()
    assert config.num_non_embedding_parameters == model.num_parameters(exclude_embeddings=True)


@pytest.mark.parametrize("scan", [slow_unless(True, False), slow_unless(False, True)])
@pytest.mark.parametrize("name", [slow_unless(", " in name or name == "smollm3", name) for name in SISTERS])
def test_packed_equals_alone_and_decoding(name: str, scan: bool, mesh: Mesh) -> None:
    """Each sequence of a packed row has transformers' logits of it alone, and so has each of its tokens, decoded."""
    raw, config, rng, weights = make_case(name, 12)
    rows = [[5, 1, 11, 2], [9, 10], [19]]
    packed = pack(rng, config.vocab_size, rows, 19)
    run = RunOptions(scan_layers=scan)
    graphdef, params = make_params(config, run, mesh, weights)

    @jax.jit
    def forward(params, tokens, cache):
        model = nnx.merge(graphdef, params)
        hidden, cache = model(*tokens, cache=cache)
        return model.logits(hidden), cache

    ours = np.asarray(forward(params, Packed(*(sharding.put(mesh, x) for x in packed)), None)[0])
    model = make_hf(raw, weights)
    for r, row in enumerate(rows):
        for start, length in zip(np.cumsum([0, *row]), row, strict=False):
            part = slice(start, start + length)
            with torch.no_grad():
                alone = model(torch.tensor(packed.ids[r : r + 1, part])).logits[0].numpy()
            assert_within("packed logits", np.abs(ours[r, part] - alone), LOGITS_ATOL)
    # The last row is one sequence: `alone` is the whole of it.
    cache, prompt, ids = make_cache(config, np.float32, 1, 24, scan), 4, packed.ids[2:]
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, 19))]:
        places = np.arange(start, stop)[None]
        logits, cache = forward(params, (ids[:, start:stop], places, np.ones_like(places)), cache)
        assert_within("decoding", np.abs(np.asarray(logits)[0] - alone[start:stop]), LOGITS_ATOL)


@pytest.mark.parametrize("autocast", [slow_unless(True, True), slow_unless(False, False)])
@pytest.mark.parametrize("name", [slow_unless(name == "qwen3, biases", name) for name in SISTERS])
def test_bfloat16_is_as_exact_as_torch(name: str, autocast: bool, mesh: Mesh) -> None:
    """By the bound of `test_parity.py`, which derives it."""
    assert_within("error over torch's error", bfloat16_ratio(autocast, 1.0, mesh, **SISTERS[name]), 1.25)
