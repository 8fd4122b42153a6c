"""AdamW in 8 bits is bitsandbytes' own, run live (`nearest.py`): codes, scales and weights, on every mesh. Moments in
bfloat16 are drawn without a bias. `test_live.py` has the real Trainer with such an optimizer."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import bitsandbytes
import jax
import jax.numpy as jnp
import nearest
import numpy as np
import optax
import pytest
import torch
from bitsandbytes.backends.cpu import ops
from bitsandbytes.functional import create_dynamic_map
from forks import on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tiny import CONFIG, make_records, run, write_json, write_model

import train_jax
from llama_jax.distributed import sharding
from llama_jax.training import eight_bits
from llama_jax.training.moments import Rounded
from llama_jax.training.optimizer import make_optimizer

EPS32 = 2.0**-24
SIGNED = pytest.mark.parametrize("signed", [True, False])
quantized = jax.jit(eight_bits.quantize, static_argnums=2)


def book(signed: bool) -> np.ndarray:
    """The code in fractions, rounded once; by the paper, an exponent's zeros, an indicator bit, then a fraction."""
    positive = []
    for zeros in range(7):
        items = 2 ** (6 - zeros + (not signed))
        for i in range(items):
            positive.append(
                Fraction(1, 10**zeros) * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * i + 1, 2 * items))
            )
    exact = sorted([*positive, Fraction(0), Fraction(1), *((-x for x in positive) if signed else ())])
    return np.asarray([float(x) for x in exact]).astype(np.float32)


@SIGNED
def test_code_book(signed: bool) -> None:
    np.testing.assert_array_equal(eight_bits.code_book(signed), book(signed))
    # Its ends, their mean and the power of ten: five roundings of numbers up to 1, in units of the decade's end.
    theirs = create_dynamic_map(signed).numpy()
    decade = 10.0 ** np.ceil(np.log10(np.maximum(np.abs(theirs), 1e-7)))
    assert theirs.shape == (256,) and np.all(np.abs(theirs.astype(np.float64) - book(signed)) <= 5 * EPS32 * decade)


def by_distance(x: np.ndarray, signed: bool) -> np.ndarray:
    """By distances in float64 to all codes; a negative number's code has its sign."""
    distances = np.abs(x.astype(np.float64)[..., None] - book(signed))
    if signed:
        distances[x < 0, 127:] = np.inf
    return distances.argmin(-1)


@SIGNED
def test_codes_are_the_nearest(signed: bool) -> None:
    """Of numbers of all sizes, and at the borders of all codes, where either float32 beside the middle has its own.

    Borders prove the rest. Rounded products, sums and minima do not fall as numbers grow, nor do the two codes around a
    number: between two numbers of one code, all have it.
    """
    codes = book(signed).astype(np.float64)
    middles = ((codes[1:] + codes[:-1]) / 2).astype(np.float32)
    steps = [np.nextafter(middles, np.float32(side)) for side in (-2, 2)]
    steps += [np.nextafter(step, np.float32(side)) for step, side in zip(steps, (-2, 2), strict=True)]
    powers = np.float32(10) ** np.arange(-9, 1, dtype=np.float32)
    powers = np.concatenate([powers, *(np.nextafter(powers, np.float32(s)) for s in (0, 1)), [0, -0.0]])
    borders = np.concatenate([middles, *steps, powers, codes])
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=20000) * np.exp(4 * rng.normal(size=20000))
    x = np.concatenate([borders, np.clip(drawn, -1, 1), 10 ** rng.uniform(-9, 0, 20000)]).astype(np.float32)
    x = np.resize(np.concatenate([x, -x]) if signed else np.abs(x), (len(x) // 100, 255))
    x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)  # the largest of each block
    found = np.asarray(jax.jit(lambda x: eight_bits.quantize(x, eight_bits.absmax(x), signed))(x))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, by_distance(x, signed))
    distance = np.abs(x.astype(np.float64) - codes[found])
    assert not signed or np.array_equal(found < 127, x < 0)
    # Live, in its generic path: it rounds the distances in float32, and takes the first of equal ones.
    theirs, _ = torch.ops.bitsandbytes.quantize_blockwise(
        torch.tensor(x, dtype=torch.float64), torch.tensor(book(signed)), 256
    )
    differ = found != theirs.numpy()
    assert np.all(
        np.abs(distance - np.abs(x - codes[theirs.numpy()]))[differ & (x > 0)]
        <= 2 * EPS32 * np.abs(x)[differ & (x > 0)]
    )


@SIGNED
def test_the_arithmetic_of_a_tpu(signed: bool) -> None:
    """Values have three roundings. Codes are the nearest, but for a number whose line may be rounded across the middle
    of two codes."""
    values = np.asarray(jax.jit(eight_bits._value, static_argnums=1)(jnp.arange(256, dtype=jnp.uint8), signed))
    np.testing.assert_allclose(values, book(signed), rtol=3 * EPS32, atol=0)
    codes = book(signed).astype(np.float64)
    middles = ((codes[1:] + codes[:-1]) / 2).astype(np.float32)
    near = np.concatenate([middles * np.float32(1 + k * 30 * EPS32) for k in (-2, 2)])
    drawn = 10 ** np.random.default_rng(0).uniform(-9, 0, 40000)
    x = np.concatenate([middles, near, drawn, codes, [0]]).astype(np.float32)
    x = np.concatenate([x, -x[:-1]]) if signed else np.abs(x)
    found = np.asarray(jax.jit(eight_bits._computed, static_argnums=1)(x, signed))
    right = by_distance(x, signed)
    assert not signed or np.array_equal(found < 127, x < 0)
    distance, least = (np.abs(x.astype(np.float64) - codes[of]) for of in (found, right))
    assert np.all(distance - least <= 2 * 30 * EPS32 * np.abs(x))  # of both codes
    assert np.array_equal(found[len(middles) :][: len(near)], right[len(middles) :][: len(near)])


def brute_force(block: np.ndarray, largest: np.float32, signed: bool) -> np.ndarray:
    """The codes of a block by `by_distance`, and those of a block that has no inverse of its largest magnitude."""
    if not np.finfo(np.float32).tiny <= largest < np.inf:
        return np.full(block.shape, 0 if largest == 0 else eight_bits.ZERO[signed])
    return by_distance(block * (np.float32(1) / largest), signed)


@SIGNED
@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 6),
    scale=st.sampled_from([0, 1e-40, 1e-36, 1e-20, 1e-8, 1, 3e4, 1e30, np.inf, np.nan]),
    zeros=st.sampled_from([0, 0.5]),
)
def test_drawn_codes(signed: bool, seed: int, spread: float, scale: float, zeros: float) -> None:
    """Blocks of numbers of a few sizes or of many, zeros among them, and blocks without an inverse."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=256) * np.exp(spread * rng.normal(size=256)) * (rng.random(256) >= zeros)
    x = x if signed else np.abs(x)
    tiny = np.finfo(np.float32).tiny
    with np.errstate(all="ignore"):
        block = (x / np.abs(x).max() * scale).astype(np.float32)
        block[np.abs(block) < tiny] = 0  # as a CPU takes them
        largest = np.abs(block).max()
        found = np.asarray(quantized(block[None], largest[None], signed))
        np.testing.assert_array_equal(found[0], brute_force(block, largest, signed))
        values = np.asarray(eight_bits.dequantize(found, jnp.asarray(largest[None]), signed))[0]
        np.testing.assert_allclose(values, book(signed)[found[0]] * largest, rtol=0, atol=tiny)


@SIGNED
@pytest.mark.parametrize("other", [1.0, np.inf, -np.inf])
def test_a_nan_spreads_to_its_block(signed: bool, other: float) -> None:
    """From each place of a block, beside numbers or an Inf; the blocks around it stay finite."""
    x = np.ones((2, 256, 256), np.float32)
    np.fill_diagonal(x[0, :, ::-1], other)
    np.fill_diagonal(x[0], np.nan)

    @jax.jit
    def kept(x: jax.Array) -> jax.Array:
        scales = eight_bits.absmax(x)
        return eight_bits.dequantize(eight_bits.quantize(x, scales, signed), scales, signed)

    for order in (x, x.swapaxes(0, 1)):
        np.testing.assert_array_equal(kept(order), np.where(np.isnan(order).any(-1, keepdims=True), np.nan, order))


# -- Updates ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nearest_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", nearest.quantize)


# Rows of whole blocks, and of none, where the last block has 156 elements; and less than 4,096 elements.
SHAPES: dict[str, Any] = {
    "q_proj": {"weight": (24, 512)},
    "k_proj": {"weight": (70, 90), "bias": (70,)},
    "embed_tokens": {"weight": (70, 90)},
}
STEPS, PEAK = 10, 1e-2


def draw(rng: np.random.Generator, scale: float) -> Any:
    """Multiples of 1/8 in float32, of sizes from row to row: products with the betas of the test are exact."""

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        sizes = 2.0 ** rng.integers(-12, 1, (shape[0], *[1] * (len(shape) - 1)))
        return (rng.integers(-32, 33, shape) / 8 * sizes * scale).astype(np.float32)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def bitsandbytes_run(
    params: Any, grads: list[Any], rates: np.ndarray, exact: bool, **options: float
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The leaves after each update, and the state after the last, by its AdamW in float32 as the Trainer makes it."""
    leaves = [torch.nn.Parameter(torch.tensor(x)) for x in jax.tree.leaves(params)]
    groups = [
        {"params": [p for p in leaves if p.ndim > 1], "weight_decay": options["weight_decay"]},
        {"params": [p for p in leaves if p.ndim == 1], "weight_decay": 0.0},
    ]
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    betas = (options["b1"], options["b2"])
    optimizer = bitsandbytes.optim.AdamW(groups, betas=betas, eps=options["eps"], optim_bits=8)
    optimizer.name2qmap = {"dynamic": torch.tensor(book(True)), "udynamic": torch.tensor(book(False))}
    if exact:
        manager.override_config(leaves[0], "optim_bits", 32)
    history = []
    for tree, rate in zip(grads, rates, strict=True):
        for p, g in zip(leaves, jax.tree.leaves(tree), strict=True):
            p.grad = torch.tensor(g)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.step()
        history.append([p.detach().numpy().copy() for p in leaves])
    manager.initialize()
    return history, [optimizer.state[p] for p in leaves]


def our_run(
    params: Any, grads: list[Any], rates: np.ndarray, exact: bool, jit: Callable = jax.jit, **options: float
) -> tuple[list[Any], Any]:
    marked = {name: dict.fromkeys(leaf, exact and name == "embed_tokens") for name, leaf in SHAPES.items()}
    decays = jax.tree.map(lambda x: x.ndim > 1, params)
    tx = make_optimizer("adamw_8bit", decays=decays, exact=marked, max_grad_norm=0.0, **options)
    params = jax.tree.map(jnp.asarray, params)
    state, update, history = tx.init(params), jit(tx.update), []
    for tree, rate in zip(grads, rates, strict=True):
        updates, state = update(tree, state, params, learning_rate=rate)
        params = optax.apply_updates(params, updates)
        history.append([np.asarray(x) for x in jax.tree.leaves(params)])
    return history, state


def kept(state: Any) -> Iterator[tuple[Any, Any]]:
    """Both moments of each leaf."""
    is_leaf = lambda x: isinstance(x, eight_bits.Quantized)  # noqa: E731
    mu, nu = (optax.tree_utils.tree_get(state, name) for name in ("mu", "nu"))
    return zip(jax.tree.leaves(mu, is_leaf=is_leaf), jax.tree.leaves(nu, is_leaf=is_leaf), strict=True)


@pytest.mark.parametrize(("exact", "weight_decay"), [(False, 0.1), (True, 0.0)])
def test_updates_are_those_of_bitsandbytes(exact: bool, weight_decay: float, nearest_codes: None) -> None:
    """Codes and scales bit by bit, where each operation is rounded by itself: XLA contracts products and sums."""
    rng = np.random.default_rng(int(weight_decay * 10))
    params, *grads = (draw(rng, 1.0) for _ in range(STEPS + 1))
    grads[3] = jax.tree.map(np.zeros_like, grads[3])
    rates = (PEAK * rng.random(STEPS)).astype(np.float32)
    options = {"b1": 0.875, "b2": 0.984375, "eps": 1e-8, "weight_decay": weight_decay}
    theirs, state = bitsandbytes_run(params, grads, rates, exact, **options)
    with jax.disable_jit():
        ours, ours_state = our_run(params, grads, rates, exact, jit=lambda f: f, **options)
    for k in range(STEPS):
        for expected, actual in zip(theirs[k], ours[k], strict=True):
            # Each rounds a weight up to twice an update, of a step of at most 9 rates (test_optimizer.py) some ten
            # numbers: 1e-6 of the largest weight, some 4, after all.
            bound = (k + 1) * EPS32 * (2 * np.abs(expected).max() + 10 * 9 * PEAK)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
    eight = 0
    for moments, of in zip(kept(ours_state), state, strict=True):
        for moment, name in zip(moments, ("1", "2"), strict=True):
            if of[f"state{name}"].dtype == torch.uint8:
                eight += 1
                np.testing.assert_array_equal(moment.codes, of[f"state{name}"].numpy())
                np.testing.assert_array_equal(np.ravel(moment.absmax), of[f"absmax{name}"].numpy())
            else:
                np.testing.assert_array_equal(moment, of[f"state{name}"].numpy())
    assert eight == (4 if exact else 6)  # of two moments: q_proj, k_proj and the embedding


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def keep(x: np.ndarray, number: int, signed: bool = False) -> np.ndarray:
    kept = Rounded(seed=3).keep(jnp.asarray(x), None, None, signed, jnp.uint32(number))
    assert kept.dtype == jnp.bfloat16
    return np.asarray(kept.astype(jnp.float32))


def test_parameters_in_order() -> None:
    """Each parameter in 8 bits waits for its scales, and but for a GPU's program for the parameter before it."""
    params = {name: jnp.ones((64, 256)) for name in "abc"}
    tx = make_optimizer("adamw_8bit")
    state = tx.init(params)
    traced = jax.jit(lambda grads, state: tx.update(grads, state, params, learning_rate=1.0)).trace(params, state)
    for platform, expected in (("cuda", 3), ("tpu", 3 + 2), ("cpu", 3 + 2)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("optimization_barrier") == expected, platform


def test_draws() -> None:
    """One of both neighbours, as often as the number is near; the same draw each time, another for each update, moment
    and element, and not another in an array that a mesh pads."""
    rng = np.random.default_rng(0)
    x = np.full((256, 256), 1 + 2.0**-7 * 0.3, np.float32)
    found = keep(x, 1)
    assert set(np.unique(found)) == {1.0, 1 + 2.0**-7}
    shares = [(keep(x, number, signed) > 1).mean() for number in range(2) for signed in (False, True)]
    # Of 65,536 draws each: five standard deviations; 2^-16 for the draws' own bits.
    assert np.all(np.abs(np.asarray(shares) - 0.3) < 5 * np.sqrt(0.21 / 2**16) + 2.0**-16)
    for other in (keep(x, 2), keep(x, 1, True), found[::-1], found[:, ::-1], np.roll(found, 1), found.T):
        assert abs((other == found).mean() - (0.3**2 + 0.7**2)) < 5 * 0.5 / 256
    np.testing.assert_array_equal(found, keep(x, 1))
    np.testing.assert_array_equal(found, keep(np.pad(x, [(0, 8), (0, 24)]), 1)[:256, :256])
    exact = np.asarray(jnp.asarray(rng.normal(size=4096), jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(keep(exact, 5), exact)
    np.testing.assert_array_equal(
        keep(np.float32([0, -0.0, np.inf, -np.inf, np.nan]), 5), [0, 0, np.inf, -np.inf, np.nan]
    )


@pytest.mark.slow
def test_a_second_moment_falls() -> None:
    """After large gradients come small ones: the root of the second moment follows float32's. To nearest, it stays."""
    tx, exact = (make_optimizer("adamw_torch", moments=kind, max_grad_norm=0.0) for kind in ("bfloat16", "float32"))
    params = {"weight": jnp.zeros((64, 64))}

    def second(tx: Any) -> np.ndarray:
        def step(state: Any, k: jax.Array) -> tuple[Any, None]:
            g = jax.random.normal(jax.random.key(k), (64, 64)) * jnp.where(k < 200, 1.0, 0.1)
            return tx.update({"weight": g}, state, params, learning_rate=jnp.float32(0))[1], None

        state, _ = jax.jit(lambda: jax.lax.scan(step, tx.init(params), jnp.arange(2200)))()
        nu = optax.tree_utils.tree_get(state, "nu")["weight"]
        return np.sqrt(np.asarray(nu, np.float64))

    ratio = second(tx) / second(exact)
    # A rounding has at most half an ulp of standard deviation, 2^-8 of the number at most; 500 weigh in, of the sum's
    # 1 / (1 - b2^2). The root halves their deviation: 4.4%.
    deviation = 2.0**-8 * np.sqrt(500) / 2
    assert abs(ratio.mean() - 1) < 0.005 and ratio.std() < deviation


# -- Meshes -----------------------------------------------------------------------------------------------------------

# Leaves in the shapes of the unpadded tensor, as the mesh pads them, and their specs. Layers may be stacked.
LEAVES: dict[str, tuple[tuple[int, ...], tuple[int, ...], P]] = {
    "whole": ((24, 4096), (24, 4096), sharding.COLUMN_FD),
    "blocks over columns": ((24, 4096), (24, 4096), sharding.ROW_DF),
    "parts of blocks": ((24, 768), (24, 768), P(None, ("tensor", *sharding.SHARDS))),
    "no blocks": ((48, 90), (48, 96), sharding.ROW_DF),
    "more rows": ((21, 256), (24, 256), sharding.COLUMN_FD),
    "more columns": ((24, 256), (24, 320), sharding.ROW_DF),
    "vector": ((4096,), (4096,), P("tensor")),
    "odd vector": ((4100,), (4104,), P("tensor")),
}


def updates_on_meshes() -> None:
    """The codes of one device and of a layer by itself, and zeros in the padding. Each device holds its part alone
    where blocks are whole. XLA contracts a product and a sum in one program and not in another, which moves last bits.
    """
    rng = np.random.default_rng(2)

    def leaf(name: str) -> np.ndarray:
        tensor, _, _ = LEAVES[name]
        x = rng.integers(-32, 33, (2, *tensor)) * 2.0 ** rng.integers(-12, 1, (2, tensor[0], *[1] * (len(tensor) - 1)))
        return x.astype(np.float32)

    def padded(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.pad(x, [(0, n - t) for n, t in zip(shape, x.shape, strict=True)])

    params, *grads = ({name: leaf(name) for name in LEAVES} for _ in range(4))
    tensors = {(name,): tensor for name, (tensor, _, _) in LEAVES.items()}
    tx = make_optimizer("adamw_8bit", b1=0.875, b2=0.984375, max_grad_norm=0.0, tensors=tensors)

    def update(g: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(g, state, params, learning_rate=jnp.float32(0.125))
        return optax.apply_updates(params, updates), state

    def run(place: Callable[[Any], Any]) -> tuple[Any, Any]:
        placed, made = place(params), jax.jit(update)
        state = jax.jit(tx.init)(placed)
        for g in grads:
            before = jax.tree.map(lambda x: (x.dtype, x.sharding), state)
            placed, state = made(place(g), state, placed)
            assert before == jax.tree.map(lambda x: (x.dtype, x.sharding), state)
        return placed, [optax.tree_utils.tree_get(state, name) for name in ("mu", "nu")]

    one = [run(lambda tree, i=i: {name: x[i] for name, x in tree.items()}) for i in range(2)]
    expected = jax.tree.map(lambda *layers: np.stack(layers), *one)
    for spec in ("fsdp=8", "fsdp=2,context=2,tensor=2"):
        mesh = sharding.make_mesh(spec=spec)

        def put(tree: Any, mesh: Any = mesh) -> Any:
            places = {name: NamedSharding(mesh, P(None, *leaf[2])) for name, leaf in LEAVES.items()}
            return {name: jax.device_put(padded(x, (2, *LEAVES[name][1])), places[name]) for name, x in tree.items()}

        with jax.set_mesh(mesh):
            weights, moments = run(put)
        for x, y in zip(jax.tree.leaves((weights, moments)), jax.tree.leaves(expected), strict=True):
            # A last bit turns a code in ten thousand, by one; three updates of 1/8 times its distance, a fiftieth.
            apart = np.abs(np.asarray(x, np.float64) - padded(y, x.shape))
            assert apart.max() <= (1 if x.dtype == jnp.uint8 else 3 / 8 / 50) and (apart > 1e-5).mean() < 1e-3
        for name, moment in moments[0].items():
            assert moment.codes.sharding == weights[name].sharding
        for name in ("whole", "blocks over columns"):
            assert sharding.bytes_on_device(moments[0][name]) == 2 * 24 * (4096 + 16 * 4) // 8


@pytest.mark.slow
def test_meshes() -> None:
    on_devices(8, "test_moments.updates_on_meshes()")


# -- Whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--optim", "adamw_8bit"], ["--adam_moments_dtype", "bfloat16"]])
@pytest.mark.parametrize("more", [[], ["--scan_layers", "True", "--bf16", "True", "--accumulation", "multisteps"]])
def test_resumed(flags: list[str], more: list[str], tmp_path: Path) -> None:
    """From the middle, to the same bits; not with moments of another type."""
    model = write_model(tmp_path / "model", {**CONFIG, "hidden_size": 64, "intermediate_size": 192})
    data = write_json(tmp_path / "data.json", make_records(24))
    argv = ["--model_name_or_path", model, "--data_path", data, "--use_cpu", "True", "--max_steps", "4"]
    argv += ["--save_steps", "2", "--per_device_train_batch_size", "4", "--max_tokens_per_device", "32"]
    whole = run(train_jax.main, *argv, *flags, *more, "--output_dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    again = ["--output_dir", tmp_path / "again", "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2"]
    resumed = run(train_jax.main, *argv, *flags, *more, *again)
    assert resumed.code == 0, resumed.err
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        np.testing.assert_array_equal(two[name], expected, err_msg=name)
    other = run(train_jax.main, *argv, *more, *again, "--overwrite_output_dir", "True")
    assert other.code == 2 and f"resume it with {' '.join(flags)}" in other.err, other.err
