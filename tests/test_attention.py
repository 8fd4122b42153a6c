"""Kernels against a float64 loop over segments; which kernel a run takes. cuDNN itself runs in benchmarks/ on a GPU."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import Mesh
from tiny import slow_unless

import llama_jax.model.attention
from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.model.attention import (
    PLAIN,
    Kernel,
    Scores,
    cached_attention,
    choose_kernel,
    kv_copies,
    packed_attention,
    splash_blocks,
)

H200, A100, V5E, V6E = "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "TPU v5 lite", "TPU v6 lite"


def make_rows(lengths: list[list[int]], T: int) -> tuple[np.ndarray, np.ndarray]:
    ids, positions = np.zeros((len(lengths), T), np.int32), np.zeros((len(lengths), T), np.int32)
    for b, row in enumerate(lengths):
        start = 0
        for i, n in enumerate(row, start=1):
            ids[b, start : start + n], positions[b, start : start + n] = i, np.arange(n)
            start += n
    return ids, positions


def one_by_one(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: list[list[int]], kind: Scores = PLAIN
) -> np.ndarray:
    """Softmax attention of each query over its own segment's earlier keys, in float64, query by query."""
    scale = 1 / np.sqrt(q.shape[3]) if kind.scale is None else kind.scale
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, row in enumerate(lengths):
        start = 0
        for n in row:
            for t in range(start, start + n):
                first = start if kind.window is None else max(start, t + 1 - kind.window)
                for head in range(q.shape[2]):
                    scores = k[b, first : t + 1, head // group].astype(np.float64) @ q[b, t, head] * scale
                    chances = np.exp(scores - scores.max())
                    out[b, t, head] = chances @ v[b, first : t + 1, head // group] / chances.sum()
            start += n
    return out


def make_inputs(rows: int, T: int, heads: int, kv_heads: int, H: int) -> list[np.ndarray]:
    rng = np.random.default_rng(rows * T + heads)
    return [rng.standard_normal((rows, T, n, H), np.float32) for n in (heads, kv_heads, kv_heads)]


def placed(mesh: Mesh, arrays: list[np.ndarray]) -> list[jax.Array]:
    specs = {4: sharding.ACT_BTNH, 2: sharding.ACT_BT}
    return [jax.device_put(a, jax.NamedSharding(mesh, specs[a.ndim])) for a in arrays]


LENGTHS = {  # padded ends, a full row, segments across blocks
    128: [[5, 1, 90, 17], [128], [60, 60]],
    768: [[300, 200, 1, 250], [768], [384, 10]],
}


@pytest.mark.parametrize("kernel", ["xla", "splash", "blockwise"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "T", "kind"),
    [
        slow_unless(False, 4, 4, 128, PLAIN),
        (4, 1, 128, PLAIN),
        (4, 1, 128, Scores(scale=0.02, window=17)),
        (2, 1, 768, PLAIN),
        slow_unless(False, 2, 1, 128, Scores(window=1)),
        slow_unless(False, 2, 1, 768, Scores(window=300)),
        slow_unless(False, 2, 1, 768, Scores(window=768)),
    ],
)
def test_packed_rows(
    kernel: str, heads: int, kv_heads: int, T: int, kind: Scores, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values; and gradients against the plain one's, whose own are torch's by test_parity.py and test_families.py."""
    monkeypatch.setattr(llama_jax.model.attention, "SHORT", 0)
    lengths = LENGTHS[T]
    ids, positions = make_rows(lengths, T)
    q, k, v = make_inputs(len(lengths), T, heads, kv_heads, 128)
    real = (ids > 0)[:, :, None, None]
    weights = np.where(real, np.random.default_rng(0).standard_normal(q.shape, np.float32), 0)
    arrays = placed(mesh, [q, k, v, weights, ids, positions])

    def both(name: str) -> tuple[Any, Any]:
        def loss(q, k, v, weights, ids, positions):
            out = packed_attention(Kernel(name), q, k, v, ids, positions, interpret=True, scores=kind)
            return jnp.sum(out * weights), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    grads, out = both(kernel)
    assert np.isfinite(out).all() and all(np.isfinite(g).all() for g in grads)
    # Scores are sums of 128 products of the size of 1, over sqrt(128); some 1e-6 off. Outputs are means of values of 1.
    np.testing.assert_allclose(np.where(real, out, 0), one_by_one(q, k, v, lengths, kind), rtol=0, atol=1e-5)
    for ours, plain in zip(grads, both("xla")[0], strict=True):
        # Sums over up to 128 queries of the same: ten times that.
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_splash_with_blocks_of_a_v6e() -> None:
    """Blocks of queries twice as long as those of keys, in bfloat16: values against float64, gradients against plain
    attention in float32. Inputs are the same; the kernel rounds probabilities and results, by 2^-9 of less than 4."""
    T, lengths = 2048, [[700, 900, 300]]
    blocks = splash_blocks(T, jnp.bfloat16, V6E)
    assert blocks["block_q"] == 2 * blocks["block_kv"] and blocks["block_q_dkv"] == 2 * blocks["block_kv_dkv"]
    ids, positions = make_rows(lengths, T)
    q, k, v = (np.asarray(x, jnp.bfloat16) for x in make_inputs(1, T, 1, 1, 128))
    drawn = np.random.default_rng(0).standard_normal(q.shape, np.float32)
    weights = np.where((ids > 0)[:, :, None, None], drawn, 0)

    def both(kernel: Kernel, dtype: Any) -> tuple[Any, Any]:
        def loss(*qkv):
            out = packed_attention(kernel, *qkv, ids, positions, interpret=True).astype(jnp.float32)
            return jnp.sum(out * weights), out

        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*(jnp.asarray(x, dtype) for x in (q, k, v)))
        return [np.asarray(g, np.float32) for g in grads], out

    grads, out = both(Kernel("splash", device=V6E), jnp.bfloat16)
    exact = one_by_one(*(np.asarray(x, np.float32) for x in (q, k, v)), lengths)
    np.testing.assert_allclose(np.where(weights != 0, out, 0), exact, rtol=0, atol=4 * 2**-8)
    for ours, plain in zip(grads, both(Kernel(), jnp.float32)[0], strict=True):
        assert np.linalg.norm(ours - plain) < 4 * 2**-8 * np.linalg.norm(plain)


def on_meshes() -> None:
    """Rows divided over devices, heads that these divide and do not: values, and gradients of one device; run where
    there are eight."""
    T, lengths = 256, [[100, 3, 150], [256], [30, 30, 30]]
    ids, positions = make_rows(lengths, T)
    one = sharding.make_mesh(jax.devices()[:1])
    for heads, kv_heads, kernel in (
        (8, 2, "xla"),
        (4, 4, "xla"),
        (6, 2, "xla"),
        (3, 1, "xla"),
        (4, 2, "splash"),
        (6, 2, "blockwise"),
    ):
        kind = Scores(window=40) if heads == 6 else PLAIN
        q, k, v = make_inputs(len(lengths), T, heads, kv_heads, 128)
        weights = np.random.default_rng(0).standard_normal(q.shape, np.float32) * (ids > 0)[:, :, None, None]

        def loss(q, k, v, weights, ids, positions, kernel=kernel, kind=kind):
            out = packed_attention(Kernel(kernel), q, k, v, ids, positions, interpret=True, scores=kind)
            return jnp.sum(out * weights), out

        def both(mesh: Mesh, loss: Any = loss, arrays: tuple = (q, k, v, weights, ids, positions)) -> Any:
            with jax.set_mesh(mesh):
                step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
                return jax.tree.map(np.asarray, step(*placed(mesh, list(arrays))))

        expected, _ = both(one)
        for spec in ("context=2", "context=8", "context=4,tensor=2") if kernel != "splash" else ("context=4",):
            if kv_heads % (2 if "tensor" in spec else 1):
                continue  # the model pads the heads for tensor itself
            size = 2 if spec == "context=2" else 4 if kernel == "splash" else 8
            grads, out = both(sharding.make_mesh(jax.devices()[:size], spec))
            real = (ids > 0)[:, :, None, None]
            # Bounds of test_packed_rows.
            np.testing.assert_allclose(np.where(real, out, 0), one_by_one(q, k, v, lengths, kind), rtol=0, atol=1e-5)
            for ours, plain in zip(grads, expected, strict=True):
                np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4, err_msg=f"{heads} {kv_heads} {spec}")


@pytest.mark.slow
def test_rows_divided_over_devices() -> None:
    on_devices(8, "test_attention.on_meshes()")


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 12), ways=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_copies_of_kv_heads(kv_heads: int, group: int, ways: int) -> None:
    """No other number of copies needs fewer query heads; none is made where the devices divide the kv heads."""
    copies, filled = kv_copies(kv_heads, group, ways)
    assert group % copies == 0 and filled % ways == 0 and filled >= kv_heads * copies
    heads = filled * (group // copies)
    for other in range(1, group + 1):
        if group % other == 0:
            assert heads <= math.ceil(kv_heads * other / ways) * ways * (group // other)
    if kv_heads % ways == 0:
        assert (copies, filled) == (1, kv_heads)
    elif kv_heads * group % ways == 0 and ways % kv_heads == 0:
        assert heads == kv_heads * group  # as with 8 kv heads of 32 on 16 devices


def test_splash_blocks() -> None:
    """Every row length is a multiple of 128; blocks divide it, 384 of 1,152 and not 128. On a v6e the queries' blocks
    are as in MaxText's recipes, and at most half a row."""
    for dtype, device, most in (("bfloat16", V5E, 1024), ("float32", V5E, 512), ("bfloat16", V6E, 2048)):
        for T in range(128, 32768 + 1, 128):
            blocks = splash_blocks(T, dtype, device)
            assert all(T % n == 0 and n % 128 == 0 and n <= most for n in blocks.values()), (T, blocks)
            assert blocks["block_kv"] % blocks["block_kv_compute"] == 0
    for T, block in ((128, 128), (1152, 384), (1408, 128), (1920, 640), (2048, 1024), (4096, 1024)):
        assert set(splash_blocks(T, "bfloat16", V5E).values()) == {block}
    assert set(splash_blocks(768, "float32", V6E).values()) == {384}
    for T, q, backward in ((8192, 1024, 2048), (4096, 1024, 2048), (2048, 1024, 1024), (256, 128, 128)):
        blocks = splash_blocks(T, "bfloat16", V6E)
        assert (blocks["block_q"], blocks["block_q_dkv"], blocks["block_q_dq"]) == (q, backward, backward)
        assert {n for name, n in blocks.items() if "_kv" in name} == {min(512, T)}


@settings(max_examples=25)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3),
    room=st.integers(0, 5),
    tail=st.booleans(),
    kind=st.sampled_from([PLAIN, Scores(scale=0.3, window=9)]),
)
def test_what_cudnn_is_told(lengths: list[list[int]], room: int, tail: bool, kind: Scores) -> None:
    """A loop that attends by the starts and sizes that cuDNN gets: padding a segment of its own, -1 where unused. A
    window reaches cuDNN where it hides keys of the row."""
    T = max(sum(row) for row in lengths) + (7 if tail else 0)
    ids, positions = make_rows(lengths, T)
    told: dict[str, np.ndarray] = {}

    def record(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        names = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
        jax.debug.callback(lambda *arrays: told.update(zip(names, map(np.asarray, arrays), strict=True)),
                           *(options[n] for n in names))  # fmt: skip
        assert options["mask_type"] == cudnn.MaskType.PADDING_CAUSAL and options["scale"] == (kind.scale or 8**-0.5)
        assert options["sliding_window_length"] == (kind.window if kind.window and kind.window < T else None)
        return q

    mesh = sharding.make_mesh()
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(cudnn, "dot_product_attention", record)
        arrays = placed(mesh, [*make_inputs(len(lengths), T, 2, 1, 8), ids, positions])
        kernel = Kernel("cudnn", max(map(len, lengths)) + room)
        jax.block_until_ready(jax.jit(lambda *a: packed_attention(kernel, *a, scores=kind))(*arrays))
        jax.effects_barrier()
    np.testing.assert_array_equal(told["q_seqlen"], told["kv_seqlen"])
    np.testing.assert_array_equal(told["q_offsets"], told["kv_offsets"])
    places = kernel.segments + 1
    assert told["q_seqlen"].shape == (len(lengths), places) and told["q_offsets"].shape == (len(lengths), places + 1)
    for row, sizes, starts in zip(lengths, told["q_seqlen"], told["q_offsets"], strict=True):
        whole = [*row, T - sum(row)] if sum(row) < T else row
        unused = [-1] * (places - len(whole))
        assert sizes.tolist() == [*whole, *unused]
        assert starts.tolist() == [*np.cumsum([0, *whole[:-1]]).tolist(), *unused, -1]


@pytest.mark.parametrize(
    ("kind", "rows", "called"),
    [(PLAIN, 4, 1), (Scores(scale=0.3, window=24), 4, 1), (Scores(window=9), 4, 0), (PLAIN, 3, 0)],
)
def test_a_cache_by_cudnn(kind: Scores, rows: int, called: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop in NumPy in cuDNN's place gets the filled slots of a large cache, and gives XLA's output. A window that
    hides slots, and few heads, are left to XLA."""
    S, N, K, H = 24, 4, 2, 8
    calls = []

    def attend(q, k, v, q_seqlen, kv_seqlen, scale):
        out = np.zeros_like(q)
        for b, n in np.ndindex(q.shape[:2]):
            filled, shared = slice(kv_seqlen[b]), n // (N // K)
            weights = np.exp(scale * k[b, shared, filled] @ q[b, n, 0])
            out[b, n, 0] = weights @ v[b, shared, filled] / weights.sum()
        assert (q_seqlen == 1).all()
        calls.append(q.shape)
        return out

    def stub(q, k, v, *, q_seqlen, kv_seqlen, scale, mask_type, qkv_layout):
        assert (mask_type, qkv_layout) == (cudnn.MaskType.PADDING, "BNTH")
        like = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return jax.pure_callback(attend, like, q, k, v, q_seqlen, kv_seqlen, scale)

    monkeypatch.setattr(cudnn, "dot_product_attention", stub)
    monkeypatch.setattr(llama_jax.model.attention, "LARGE", 4 * 2 * K * S * H * 3)
    monkeypatch.setattr(llama_jax.model.attention, "MANY", 4 * N)
    rng = np.random.default_rng(0)
    shapes = (rows, 1, N, H), (rows, K, S, H), (rows, K, S, H)
    q, k, v = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)
    positions = jnp.asarray([[0], [S - 1], [5], [11]][:rows])
    found = cached_attention(Kernel("cudnn"), q, k, v, positions, kind)
    # Each output is a mean of up to 24 values by weights of some 10 roundings of 2^-24.
    np.testing.assert_allclose(found, cached_attention(Kernel("xla"), q, k, v, positions, kind), atol=1e-5)
    assert len(calls) == called


@pytest.mark.parametrize(
    ("wanted", "platform", "device", "head_dim", "dtype", "expected"),
    [
        ("auto", "gpu", H200, 128, "bfloat16", "cudnn"),
        ("auto", "gpu", "NVIDIA H100 80GB HBM3", 64, "bfloat16", "cudnn"),
        ("auto", "gpu", H200, 128, "float32", "xla"),
        ("auto", "gpu", H200, 256, "bfloat16", "xla"),
        ("auto", "gpu", H200, 100, "bfloat16", "xla"),
        ("auto", "gpu", A100, 128, "bfloat16", "xla"),
        ("auto", "tpu", V5E, 128, "bfloat16", "splash"),
        ("auto", "tpu", V5E, 64, "bfloat16", "xla"),
        ("auto", "cpu", "cpu", 128, "bfloat16", "blockwise"),
        ("xla", "cpu", "cpu", 128, "float32", "xla"),
        ("xla", "gpu", H200, 128, "bfloat16", "xla"),
        ("cudnn", "gpu", H200, 128, "bfloat16", "cudnn"),
        ("splash", "tpu", V5E, 256, "float32", "splash"),
    ],
)
def test_the_kernel_of_a_run(wanted: str, platform: str, device: str, head_dim: int, dtype: str, expected: str) -> None:
    name, why = choose_kernel(wanted, platform, device, head_dim, dtype)
    assert name == expected and why


@pytest.mark.parametrize(
    ("wanted", "platform", "device", "head_dim", "dtype", "reason"),
    [
        ("cudnn", "cpu", "cpu", 128, "bfloat16", "NVIDIA GPU, this is cpu"),
        ("cudnn", "gpu", A100, 128, "bfloat16", "Hopper"),
        ("cudnn", "gpu", H200, 128, "float32", "--bf16 True"),
        ("cudnn", "gpu", H200, 192, "bfloat16", "192"),
        ("splash", "gpu", H200, 128, "bfloat16", "TPU"),
        ("splash", "tpu", V5E, 64, "bfloat16", "64"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    wanted: str, platform: str, device: str, head_dim: int, dtype: str, reason: str
) -> None:
    with pytest.raises(InputError, match=f"--attention {wanted}: .*{reason}.*; use auto or xla"):
        choose_kernel(wanted, platform, device, head_dim, dtype)


def test_no_kernel_that_fails_under_determinism() -> None:
    """cuDNN's packed gradient ends with an IndexError there, seen on an H200; Splash is deterministic."""
    name, why = choose_kernel("auto", "gpu", H200, 128, "bfloat16", deterministic=True)
    assert name == "xla" and "--full_determinism" in why
    with pytest.raises(InputError, match=r"--attention cudnn: .*--full_determinism.*; use auto or xla"):
        choose_kernel("cudnn", "gpu", H200, 128, "bfloat16", deterministic=True)
    assert choose_kernel("auto", "tpu", V5E, 128, "bfloat16", deterministic=True)[0] == "splash"
