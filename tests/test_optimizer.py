"""The optimizer is torch's AdamW as the HF Trainer sets it up: schedule, clipping, decay groups, accumulation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIG

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.hf.names import name_table
from llama_jax.optimizer import SCHEDULES, clip_by_global_norm, decay_mask, make_optimizer, make_schedule

EPS64, EPS32 = 2.0**-52, 2.0**-24  # the unit roundoff of float32; twice that of float64


def torch_schedule(kind: str, peak: float, warmup: int, total: int) -> np.ndarray:
    """Learning rates that transformers' scheduler gives by the number of updates done."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(total):
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    return np.asarray(rates)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(SCHEDULES),
    peak=st.floats(1e-6, 1.0),
    total=st.integers(1, 300),
    warmup=st.integers(0, 320),
)
def test_schedule(kind: str, peak: float, total: int, warmup: int) -> None:
    # Both are float64. A factor of at most 1 comes from at most four roundings on either side, each of at most half an
    # EPS64, and so does 1 - fraction near 0 and 1 + cos near -1, which is why a part of the bound is absolute.
    expected = torch_schedule(kind, peak, warmup, total)
    actual = make_schedule(kind, peak, warmup, total)
    assert actual.dtype == np.float64 and actual.shape == (total + 1,)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=4 * EPS64 * peak)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(195, 6500), (0, 1), (1, 1), (7, 7), (9, 7), (0, 6500)])
def test_schedule_at_its_edges(kind: str, warmup: int, total: int) -> None:
    expected = torch_schedule(kind, 2e-5, warmup, total)
    np.testing.assert_allclose(make_schedule(kind, 2e-5, warmup, total), expected, rtol=1e-12, atol=4 * EPS64 * 2e-5)


def test_unknown_schedule() -> None:
    with pytest.raises(InputError, match=r"polynomial.*linear, cosine, constant, constant_with_warmup"):
        make_schedule("polynomial", 1.0, 0, 1)


SHAPES: dict[str, Any] = {
    "embed_tokens": {"weight": (7, 4)},
    "layers": {
        0: {
            "input_layernorm": {"weight": (4,)},
            "self_attn": {"q_proj": {"weight": (4, 4), "bias": (4,)}},
            "mlp": {"down_proj": {"weight": (4, 6)}},
            "post_attention_layernorm": {"weight": (4,)},
        }
    },
    "norm": {"weight": (4,)},
    "lm_head": {"weight": (7, 4)},
}


def make_tree(rng: np.random.Generator, scale: float) -> Any:
    """Normal values, of very different size from tensor to tensor."""

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.normal(size=shape) * scale * 10.0 ** rng.uniform(-2, 0)).astype(np.float32)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def torch_parameters(tree: Any, weight_decay: float) -> tuple[list[torch.nn.Parameter], list[dict[str, Any]]]:
    """The leaves in float64 and the Trainer's two groups: all but vectors decay."""
    leaves = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in jax.tree.leaves(tree)]
    groups = [
        {"params": [p for p in leaves if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in leaves if p.ndim == 1], "weight_decay": 0.0},
    ]
    return leaves, groups


@settings(max_examples=12)
@given(
    b1=st.sampled_from([0.9, 0.875, 0.0]),
    b2=st.sampled_from([0.999, 0.984375, 0.95]),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    max_grad_norm=st.sampled_from([0.0, 0.5, 1.0, 1e9]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_updates_are_torchs(
    b1: float, b2: float, eps: float, weight_decay: float, max_grad_norm: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    steps, peak = 20, 1e-2
    schedule = make_schedule("cosine", peak, 3, steps)
    params = make_tree(rng, 1.0)
    leaves, groups = torch_parameters(params, weight_decay)
    reference = torch.optim.AdamW(groups, lr=peak, betas=(b1, b2), eps=eps)
    tx = make_optimizer(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    state = tx.init(params)
    update = jax.jit(tx.update)

    # Each step rounds the new weight once and its decay once (2 EPS32 |w|). The step itself is lr * r, where r is a
    # mean of gradients over the root of their mean square: at most sqrt(20) where b2's weights are nearly even over 20
    # steps, and below 9 for b2 = 0.95, whose oldest weight is 0.95^19. Its numerator and denominator are made of at
    # most eight roundings a step each, remembered for 1 / (1 - b) < 20 steps where b2 is not near 1; 16 in all is
    # ample for a sum of roundings of either sign. Last, optax takes 1 - b^k in float32: b has the error EPS32 b, k
    # times over in b^k.
    roundings = 16 * EPS32 * 9
    powers = max(k * EPS32 * b**k / (1 - b**k) for b in (b1, b2) if b for k in range(1, steps + 1))
    for k in range(steps):
        grads = make_tree(rng, scale)
        for p, g in zip(leaves, jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        norm = torch.nn.utils.clip_grad_norm_(leaves, max_grad_norm if max_grad_norm > 0 else float("inf"))
        for group in reference.param_groups:
            group["lr"] = schedule[k]
        reference.step()
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        # Squares, their sum in float32 over at most 28 entries a leaf and 9 leaves, the root halves the error.
        np.testing.assert_allclose(optax.tree_utils.tree_get(state, "grad_norm"), norm.item(), rtol=20 * EPS32)
        for expected, actual in zip(leaves, jax.tree.leaves(params), strict=True):
            largest = float(expected.detach().abs().max())
            bound = (k + 1) * (2 * EPS32 * largest + peak * (roundings + 9 * powers))
            np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=bound)


@pytest.mark.parametrize("max_norm", [1e-6, 0.5, 1.0, 5.0, 0.0, -1.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_clip_is_torchs(max_norm: float, scale: float) -> None:
    """The 1e-6 in the denominator included, which Adam alone would hide: it does not see the gradient's size."""
    grads = make_tree(np.random.default_rng(0), scale)
    leaves, _ = torch_parameters(grads, 0.0)
    for p in leaves:
        p.grad = p.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm if max_norm > 0 else float("inf"))
    tx = clip_by_global_norm(max_norm)
    clipped, state = jax.jit(tx.update)(grads, tx.init(grads))
    # The norm's error as above; then its sum with 1e-6, the quotient and the product round once each.
    np.testing.assert_allclose(state.grad_norm, norm.item(), rtol=20 * EPS32)
    for expected, actual in zip(leaves, jax.tree.leaves(clipped), strict=True):
        np.testing.assert_allclose(actual, expected.grad.numpy(), rtol=24 * EPS32)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_blocks_are_summed(weight_decay: float) -> None:
    """Updates of 3, 1, 2 and 1 blocks: exactly what the sums give at once, nothing before the last block."""
    rng = np.random.default_rng(1)
    counts = [3, 1, 2, 1]
    options = {"weight_decay": weight_decay, "max_grad_norm": 1.0}
    schedule = make_schedule("linear", 1e-2, 1, len(counts))
    at_once = make_optimizer(schedule, blocks=np.ones(len(counts), np.int32), **options)
    in_blocks = make_optimizer(schedule, blocks=np.asarray(counts, np.int32), **options)
    params = jax.tree.map(jnp.asarray, make_tree(rng, 1.0))
    state_1, state_n, params_1, params_n = at_once.init(params), in_blocks.init(params), params, params
    assert not isinstance(state_1, optax.MultiStepsState) and isinstance(state_n, optax.MultiStepsState)
    update_1, update_n = jax.jit(at_once.update), jax.jit(in_blocks.update)
    for k, count in enumerate(counts):
        # Multiples of 1/8 below 16: their float32 sums are exact, in any order.
        blocks = [
            jax.tree.map(lambda x: rng.integers(-128, 128, x.shape).astype(np.float32) / 8, params)
            for _ in range(count)
        ]
        updates, state_1 = update_1(jax.tree.map(lambda *gs: sum(gs), *blocks), state_1, params_1)
        params_1 = optax.apply_updates(params_1, updates)
        for i, grads in enumerate(blocks):
            updates, state_n = update_n(grads, state_n, params_n)
            if i < count - 1:
                assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
            params_n = optax.apply_updates(params_n, updates)
        assert int(state_n.gradient_step) == k + 1
        assert_same_bits(params_n, params_1)
        assert_same_bits(state_n.inner_opt_state, state_1)


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_schedule_runs_on_updates_not_blocks() -> None:
    """With clipping off and Adam's memory off, an update is -lr * sign(g): the learning rates can be read off."""
    schedule = make_schedule("linear", 1.0, 2, 5)
    counts = np.asarray([2, 1, 3, 1, 2], np.int32)
    tx = make_optimizer(schedule, b1=0.0, b2=0.0, eps=0.0, max_grad_norm=0.0, blocks=counts)
    params = {"x": {"weight": jnp.zeros((1, 1))}}
    state, seen = tx.init(params), []
    for count in counts:
        for _ in range(count):
            updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
        seen.append(-float(updates["x"]["weight"][0, 0]))
    # Multiples of 1/3 and 1/2 in float32, through a root and a quotient.
    np.testing.assert_allclose(seen, schedule[:5], rtol=8 * EPS32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_decay_groups_are_the_trainers(tied: bool, bias: bool) -> None:
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM, Trainer

    raw = {**CONFIG, "tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    with torch.device("meta"):
        model = LlamaForCausalLM(HFConfig(**raw))
    names = {name for name, _ in model.named_parameters()}  # a tied head is no parameter of its own
    expected = set(Trainer.get_decay_parameter_names(None, model)) & names
    table = name_table(LlamaConfig.from_hf(raw))
    assert set(table) == names
    params: dict[Any, Any] = {}
    for path, _ in table.values():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = 0
    mask = decay_mask(params)

    def at(path: tuple) -> bool:
        node = mask
        for key in path:
            node = node[key]
        return node

    assert {name for name, (path, _) in table.items() if at(path)} == expected
