"""The optimizers are the Trainer's own, as it configures them: clipping, decay groups, accumulation, the rate given."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import torch
from forks import on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from tiny import CONFIG, ROOT, SISTERS, slow_unless

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.hf.names import name_table
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.roles import EmbeddingTable, MatmulWeight
from llama_jax.training.optimizer import clip_by_global_norm, make_optimizer
from llama_jax.training.optimizer_names import OPTIMIZERS

EPS32 = 2.0**-24  # the unit roundoff of float32
BF16 = 2.0**-8  # and of bfloat16


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


def decays(tree: Any) -> Any:
    """The same groups as a tree of booleans."""
    return jax.tree.map(lambda x: x.ndim > 1, tree)


STEPS, PEAK = 20, 1e-2


def draw_run(seed: int, scale: float) -> tuple[Any, list[Any], np.ndarray]:
    """Parameters, the gradients of every update, the rates. In some updates some rows have no gradient, as tokens that
    do not occur; the first rate is 0, as in a warm-up."""
    rng = np.random.default_rng(seed)
    params = make_tree(rng, 1.0)
    grads = [make_tree(rng, scale) for _ in range(STEPS)]
    for tree in grads:
        tree["embed_tokens"]["weight"][rng.random(7) < 0.3] = 0
    rates = (PEAK * rng.random(STEPS)).astype(np.float32)
    rates[0] = 0
    return params, grads, rates


def trainer_run(optim: str, seed: int, scale: float, options: dict[str, float]) -> tuple[np.ndarray, list[Any]]:
    """Gradient norms and all leaves after every update, by the transformers at hand: the optimizer that its Trainer
    configures, in float64."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir="unused",
        optim=optim,
        learning_rate=PEAK,
        adam_beta1=options["b1"],
        adam_beta2=options["b2"],
        adam_epsilon=options["eps"],
        use_cpu=True,
        report_to=[],
    )
    made, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    params, grads, rates = draw_run(seed, scale)
    leaves, groups = torch_parameters(params, options["weight_decay"])
    reference = made(groups, **kwargs)
    norms, history = [], []
    for tree, rate in zip(grads, rates, strict=True):
        for p, g in zip(leaves, jax.tree.leaves(tree), strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        limit = options["max_grad_norm"]
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, limit if limit > 0 else float("inf")).item())
        for group in reference.param_groups:
            group["lr"] = float(rate)
        reference.step()
        history.append([p.detach().numpy().copy() for p in leaves])
    return np.asarray(norms), history


def error_of_an_update(optim: str, options: dict[str, float], largest_grad: float) -> float:
    """A bound on the error of `update / rate` beside the roundings of the weight and its decay."""
    if optim == "sgd":
        # The clipping's scale is off by 24 EPS32 (`test_clip_is_torchs`); its product, the sum and the rate's product.
        limit = options["max_grad_norm"]
        return 28 * EPS32 * (min(largest_grad, limit) if limit > 0 else largest_grad)
    if optim == "adafactor":
        # beta = 1 - k^-0.8 in float32 is off by at most 4 EPS32 and, after k = 1, at least 0.42: the weights of the
        # k <= 20 squares are products of up to 19 of them (less than 19 * 4 / 0.42) with one 1 - beta (4 EPS32 over at
        # least 0.09), and every step rounds three times: less than 300 EPS32 of a row, a column or a mean. The update
        # has three of their roots and is divided by its own RMS, which may double it: 900 EPS32. Clipped, its RMS is at
        # most 1 and its largest of at most 28 entries at most the root of 28.
        return 900 * EPS32 * np.sqrt(28)
    # The step is lr * r, where r is a mean of gradients over the root of their mean square: at most sqrt(20) where b2's
    # weights are nearly even over 20 steps, and below 9 for b2 = 0.95, whose oldest weight is 0.95^19. Its numerator
    # and denominator are made of at most eight roundings a step each, remembered for 1 / (1 - b) < 20 steps where b2 is
    # not near 1; 16 in all is ample for a sum of roundings of either sign. Last, optax takes 1 - b^k in float32: b has
    # the error EPS32 b, k times over in b^k.
    powers = [k * EPS32 * b**k / (1 - b**k) for b in (options["b1"], options["b2"]) if b for k in range(1, STEPS + 1)]
    return 9 * (16 * EPS32 + max(powers))


def check_run(
    optim: str,
    seed: int,
    scale: float,
    options: dict[str, float],
    norms: np.ndarray,
    history: list[Any],
    rounded: int = 1,
) -> None:
    """Compare with a run in float64, or, where two are `rounded`, in float32."""
    params, grads, rates = draw_run(seed, scale)
    tx = make_optimizer(optim, decays=decays, **options)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    largest = [0.0] * len(history[0])
    for k in range(STEPS):
        largest_grad = max(np.abs(g).max() for tree in grads[: k + 1] for g in jax.tree.leaves(tree))
        updates, state = update(grads[k], state, params, learning_rate=rates[k])
        params = optax.apply_updates(params, updates)
        # Squares, their sum in float32 over at most 28 entries a leaf and 9 leaves, the root halves the error.
        np.testing.assert_allclose(optax.tree_utils.tree_get(state, "grad_norm"), norms[k], rtol=20 * EPS32)
        for i, (expected, actual) in enumerate(zip(history[k], jax.tree.leaves(params), strict=True)):
            # Each step rounds the new weight once and its decay once, twice in sgd's sum with the gradient.
            largest[i] = max(largest[i], float(np.abs(expected).max()))
            step = PEAK * error_of_an_update(optim, options, largest_grad)
            bound = rounded * (k + 1) * (2 * EPS32 * largest[i] + step)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
    assert update._cache_size() == 1  # the rate is no part of the program


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_updates_are_the_trainers(optim: str) -> None:
    @settings(max_examples=10)
    @given(
        b1=st.sampled_from([0.9, 0.875, 0.0]),
        b2=st.sampled_from([0.999, 0.984375, 0.95]),
        eps=st.sampled_from([1e-8, 1e-3]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        max_grad_norm=st.sampled_from([0.0, 0.5, 1.0, 1e9]),
        scale=st.sampled_from([1e-3, 1.0, 100.0]),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(scale: float, seed: int, **options: float) -> None:
        check_run(optim, seed, scale, options, *trainer_run(optim, seed, scale, options))

    check()


DEFAULTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}
RUNS_4_37 = [
    (optim, seed, scale, DEFAULTS | options)
    for optim in ("adamw_torch", "sgd", "adafactor")
    for seed, scale, options in ((0, 1.0, {"weight_decay": 0.1}), (1, 1e-2, {"max_grad_norm": 0.0, "b1": 0.875}))
]


@pytest.mark.slow
def test_updates_are_those_of_4_37(tmp_path: Path) -> None:
    """By transformers 4.37.2 in a process of its own."""
    code = (
        "import pickle, sys, transformers; assert transformers.__version__ == '4.37.2'; import test_optimizer as t;"
        "pickle.dump([t.trainer_run(*run) for run in t.RUNS_4_37], open(sys.argv[1], 'wb'))"
    )
    env = reference.environment("4.37", Path(__file__).parent, ROOT)
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for run, outcome in zip(RUNS_4_37, np.load(tmp_path / "runs", allow_pickle=True), strict=True):
        check_run(*run, *outcome)


@pytest.mark.slow
def test_paged_adamw_is_torchs() -> None:
    """By bitsandbytes, with a decay: an alias of adamw_torch."""
    options = DEFAULTS | {"weight_decay": 0.1}
    check_run("adamw_torch", 0, 1.0, options, *trainer_run("paged_adamw_32bit", 0, 1.0, options), rounded=2)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.75, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_lion(seed: int, b1: float, b2: float, weight_decay: float) -> None:
    """Against the rule of the paper (Chen et al. 2023, algorithm 2) in float64, unclipped."""
    params, grads, rates = draw_run(seed, 1.0)
    options = {"weight_decay": weight_decay, "decays": decays, "max_grad_norm": 0.0}
    tx = make_optimizer("lion_32bit", b1=b1, b2=b2, eps=1.0, **options)
    state = tx.init(params)
    update = jax.jit(tx.update)
    expected = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    momenta = [np.zeros_like(x) for x in expected]
    for k in range(STEPS):
        updates, state = update(grads[k], state, params, learning_rate=rates[k])
        params = optax.apply_updates(params, updates)
        for i, (g, actual) in enumerate(zip(jax.tree.leaves(grads[k]), jax.tree.leaves(params), strict=True)):
            inside = b1 * momenta[i] + (1 - b1) * g.astype(np.float64)
            # Its float32 twin is off by four roundings a step of numbers up to the largest gradient, below 8: the draws
            # keep clear of a sign that rounding could turn.
            assert np.all((inside == 0) | (np.abs(inside) > 4 * STEPS * EPS32 * 8 * 0.01))
            decay = weight_decay if expected[i].ndim > 1 else 0.0
            expected[i] -= float(rates[k]) * (np.sign(inside) + decay * expected[i])
            momenta[i] = b2 * momenta[i] + (1 - b2) * g
            # The weight's rounding; the decay's, its sum with the sign and the product with the rate.
            bound = (k + 1) * EPS32 * (np.abs(expected[i]).max() + PEAK * 8)
            np.testing.assert_allclose(actual, expected[i], rtol=0, atol=bound)


def test_unknown_optimizer() -> None:
    with pytest.raises(InputError, match=r"--optim 'adamw_bnb' .*adamw_torch, adamw_8bit, sgd, adafactor, lion_32bit"):
        make_optimizer("adamw_bnb")


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


@pytest.mark.parametrize(
    ("compiled", "optim"),
    [
        slow_unless(compiled or optim in ("sgd", "lion_32bit"), compiled, optim)
        for compiled in (False, True)
        for optim in OPTIMIZERS
    ],
)
@pytest.mark.parametrize("weight_decay", [slow_unless(False, 0.0), 0.1])
def test_blocks_are_summed(optim: str, weight_decay: float, compiled: bool) -> None:
    """Updates of 3, 1, 2 and 1 blocks: exactly what the sums give at once (adafactor, and adamw compiled: to rounding,
    as XLA orders sums and contracts products by the program), nothing before the last block; of the rates of an
    update's blocks the last counts."""
    with contextlib.nullcontext() if compiled else jax.disable_jit():
        check_blocks(optim, weight_decay, compiled)


def check_blocks(optim: str, weight_decay: float, compiled: bool) -> None:
    rng = np.random.default_rng(1)
    counts = [3, 1, 2, 1]
    options = {"weight_decay": weight_decay, "max_grad_norm": 1.0}
    at_once = make_optimizer(optim, decays=decays, blocks=np.ones(len(counts), np.int32), **options)
    in_blocks = make_optimizer(optim, decays=decays, blocks=np.asarray(counts, np.int32), **options)
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
        rate = np.float32(0.01 * (k + 1))
        summed = jax.tree.map(lambda *gs: sum(gs), *blocks)
        updates, state_1 = update_1(summed, state_1, params_1, learning_rate=rate)
        assert any(np.asarray(u).any() for u in jax.tree.leaves(updates))
        params_1 = optax.apply_updates(params_1, updates)
        for i, grads in enumerate(blocks):
            at = rate if i == count - 1 else np.float32(7.0)
            updates, state_n = update_n(grads, state_n, params_n, learning_rate=at)
            if i < count - 1:
                assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
            params_n = optax.apply_updates(params_n, updates)
        assert int(state_n.gradient_step) == k + 1
        if optim in ("adamw_torch", "adamw_8bit") and compiled:
            # As in `error_of_an_update`, twice: both have the same corrections 1 - b^k. Of gradients clipped to 1, the
            # scale is off by 24 EPS32, a mean of them by eight more, and one of their squares by twice as much.
            largest = max(float(np.abs(p).max()) for p in jax.tree.leaves(params_1))
            assert_close(params_n, params_1, 0.0, 2 * (k + 1) * EPS32 * (2 * largest + 0.04 * 9 * 16))
            assert_close(state_n.inner_opt_state, state_1, 2 * 64 * EPS32, 2 * 32 * EPS32)
            continue
        # A mean of at most 7, two roots, products: at most 16 roundings of what is kept; of a step of rate times at
        # most the root of 28, in all steps so far.
        ulps = 16 * EPS32 if optim == "adafactor" else 0.0
        assert_close(params_n, params_1, ulps, ulps * 4 * 0.04 * 6)
        assert_close(state_n.inner_opt_state, state_1, ulps * 4, 0.0)


def assert_close(a: Any, b: Any, rtol: float, atol: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_low_precision(optim: str) -> None:
    """Parameters and gradients of bfloat16: they stay so, in blocks too, and an update is the Trainer's. Adafactor and
    Lion keep their state in float32, Adam in bfloat16, as their torch twins do."""
    rng = np.random.default_rng(3)
    low = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_tree(rng, 1.0)) for _ in range(2)]
    params, grads = low
    options = {"weight_decay": 0.1, "max_grad_norm": 0.0}
    tx = make_optimizer(optim, decays=decays, **options)
    fresh = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, fresh, params, learning_rate=np.float32(0.1))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, fresh)
    after = optax.apply_updates(params, updates)
    leaves, groups = torch_parameters(jax.tree.map(lambda x: np.asarray(x, np.float32), params), 0.1)
    for p, g in zip(leaves, jax.tree.leaves(grads), strict=True):
        p.data = p.data.to(torch.bfloat16)
        p.grad = torch.tensor(np.asarray(g, np.float32)).to(torch.bfloat16)
    if optim == "lion_32bit":  # no momentum yet: the sign of the gradient
        for group in groups:
            for p in group["params"]:
                exact = p.data.double() * (1 - 0.1 * group["weight_decay"]) - 0.1 * p.grad.double().sign()
                p.data = exact.to(torch.bfloat16)
    else:
        from transformers import Trainer, TrainingArguments

        args = TrainingArguments(output_dir="unused", optim=optim, learning_rate=0.1, use_cpu=True, report_to=[])
        made, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        made(groups, **kwargs).step()
    for expected, actual in zip(leaves, jax.tree.leaves(after), strict=True):
        assert actual.dtype == jnp.bfloat16
        # A unit in the last place, for a sum that falls near a tie. torch's Adam also rounds the decayed weight and, of
        # a step of at most 0.1, its two means, root and quotient; SGD its decayed gradient, below 4.
        exact = expected.detach().double().numpy()
        size = np.abs(exact)
        rounded = {"adamw_torch": size + 6 * 0.1, "sgd": 0.1 * 4}.get(optim, 0.0)
        assert np.all(np.abs(np.asarray(actual, np.float64) - exact) <= BF16 * (2 * size + rounded))
    kept = {x.dtype for x in jax.tree.leaves(state) if x.ndim > 0}
    assert kept == {"adamw_torch": {jnp.dtype(jnp.bfloat16)}, "sgd": set()}.get(optim, {jnp.dtype(jnp.float32)})

    in_blocks = make_optimizer(optim, decays=decays, blocks=np.asarray([2], np.int32), **options)
    halves = jax.tree.map(lambda g: g / 2, grads)
    state, update = in_blocks.init(params), jax.jit(in_blocks.update)
    for _ in range(2):
        updates, state = update(halves, state, params, learning_rate=np.float32(0.1))
    summed = optax.apply_updates(params, updates)
    assert {x.dtype for x in jax.tree.leaves(summed)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(summed, after, 2 * BF16, 0.0)


def update_on_two_devices() -> None:
    """Parameters divided over the explicit axes of a mesh: the updates of the undivided ones, and a state whose
    placement an update does not change."""
    assert jax.device_count() == 2
    rng = np.random.default_rng(5)

    def draw() -> Any:
        shapes = {
            "down_proj": {"weight": (4, 6)},
            "up_proj": {"weight": (6, 4), "bias": (6,)},
            "norm": {"weight": (4,)},
        }
        leaf = {"is_leaf": lambda x: isinstance(x, tuple)}
        return jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), shapes, **leaf)

    params, *grads = (draw() for _ in range(4))
    specs = {
        "down_proj": {"weight": sharding.ROW_DF},
        "up_proj": {"weight": sharding.COLUMN_FD, "bias": sharding.COLUMN_BIAS},
        "norm": {"weight": sharding.REPLICATED},
    }

    def put(tree: Any, mesh: jax.sharding.Mesh) -> Any:
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

    for optim in OPTIMIZERS:
        tx = make_optimizer(optim, weight_decay=0.1, decays=decays, blocks=np.asarray([1, 2], np.int32))

        def run(params: Any, grads: list[Any], tx: Any = tx) -> tuple[Any, Any, Any]:
            first = state = tx.init(params)
            for g in grads:
                updates, state = tx.update(g, state, params, learning_rate=jnp.float32(0.1))
                params = optax.apply_updates(params, updates)
            return params, first, state

        expected, _, _ = jax.jit(run)(params, grads)
        for shape in ((1, 2, 1, 1), (1, 1, 1, 2)) if optim == "adafactor" else ((1, 2, 1, 1),):
            mesh = jax.make_mesh(shape, sharding.AXES, (sharding.AxisType.Explicit,) * 4)
            with jax.set_mesh(mesh):
                placed = put(params, mesh)
                actual, before, after = jax.jit(run)(placed, [put(g, mesh) for g in grads])
            places = [jax.tree.map(lambda x: x.sharding, tree) for tree in (actual, placed, after, before)]
            assert places[0] == places[1] and places[2] == places[3]
            # Sums over the devices in another order: a rounding each of at most 24 squares, halved by the root, in two
            # updates of 0.1 times at most the root of 24.
            assert_close(actual, expected, 4 * EPS32, 2 * 24 * EPS32 * 0.1 * 5)


@pytest.mark.slow
def test_two_devices() -> None:
    on_devices(2, "test_optimizer.update_on_two_devices()")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", [{"model_type": "llama"}, SISTERS["qwen2"], SISTERS["qwen3"]])
def test_decay_groups_are_the_trainers(mesh: jax.sharding.Mesh, tied: bool, bias: bool, family: dict) -> None:
    """Of transformers 5; test_live.py has 4.37's, which decays the norms of LLaMA's sisters."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer

    raw = {**CONFIG, **family, "tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    names = {name for name, _ in model.named_parameters()}  # a tied head is no parameter of its own
    expected = set(Trainer.get_decay_parameter_names(None, model)) & names
    table = name_table(LlamaConfig.from_hf(raw))
    assert set(table) == names
    mask = define(LlamaConfig.from_hf(raw), RunOptions(), mesh).having(MatmulWeight, EmbeddingTable)

    def at(path: tuple) -> bool:
        node = mask
        for key in path:
            node = node[key]
        return node

    assert {name for name, (path, _) in table.items() if at(path)} == expected
