"""Accelerators by the cloud's names, and devices that can be compiled for."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.model.attention import Kernel, packed_attention
from llama_jax.plan import chips as topology
from llama_jax.plan.chips import CHIPS, all_topologies, find_topology


@pytest.mark.parametrize(
    ("name", "devices", "shape"),
    [
        ("v5e-4", 4, "2x2"),
        ("v5litepod-16", 16, "4x4"),
        ("V5E-128", 128, "8x16"),
        ("v5e-256", 256, "16x16"),
        ("v6e-8", 8, "2x4"),
        ("v6e-1", 1, "1x1"),
        ("v4-8", 4, "2x2x1"),
        ("v5p-8", 4, "2x2x1"),
        ("v5p-128", 64, "4x4x4"),
        ("v5p-2048", 1024, "8x8x16"),
        ("tpu7x-8", 8, "2x2x1"),
        ("h200:8", 8, ""),
        ("h100:1", 1, ""),
        ("rtx4090:1", 1, ""),
    ],
)
def test_the_clouds_names(name: str, devices: int, shape: str) -> None:
    """v5p and v4 count cores, of which a chip has two and jax sees one device; tpu7x counts cores that are devices."""
    found = find_topology(name)
    assert (found.count, found.shape) == (devices, shape)


def test_what_is_known_is_named() -> None:
    for one in all_topologies():
        assert find_topology(one.name) == one
        chips = math.prod(int(n) for n in one.shape.split("x")) if one.shape else one.count
        assert chips * (2 if one.family == "tpu7x" else 1) == one.count
        assert all(larger.count > one.count and larger.family == one.family for larger in one.larger)
    for family in CHIPS:
        assert sum(t.family == family for t in all_topologies()) > 3 and family in topology.KNOWN


@pytest.mark.parametrize("name", ["", "v5e", "v5e-3", "v5p-7", "v5p-4", "v7-8", "h200", "h200:3", "a10:8", "v5e-16x"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(InputError, match=r"--dry_run .*no such topology; known are v4-8 .* h200:8"):
        find_topology(name)


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'libtpu==\d[\d.*]+'"):
        find_topology("v5e-4").devices()
    assert len(find_topology("h200:8").devices()) == 8


def test_the_compilers_devices(libtpu: None) -> None:
    for one in all_topologies():
        devices = one.devices()
        assert len(devices) == one.count, one
        assert {(d.platform, d.device_kind) for d in devices} == {(one.chip.platform, one.chip.kind)}, one


@pytest.mark.parametrize(
    ("name", "tokens", "heads", "kv_heads", "head_dim", "dtype"),
    [
        ("v5e-4", 1152, 4, 4, 128, "bfloat16"),
        *(
            pytest.param(name, *shape, marks=pytest.mark.slow)
            for name in ("v5e-4", "v5p-8", "v6e-4")
            for shape in ((8192, 8, 2, 128, "bfloat16"), (2048, 4, 4, 256, "float32"))
        ),
    ],
)
def test_splash_compiles(
    name: str, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: str, libtpu: None
) -> None:
    """The kernel and its gradient by the TPU's own compiler: its blocks fit the chip's fast memory."""
    mesh = sharding.make_mesh(find_topology(name).devices())

    def placed(shape: tuple[int, ...], dtype: str, spec: jax.sharding.PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    q, k, v = (placed((4, tokens, n, head_dim), dtype, sharding.ACT_BTNH) for n in (heads, kv_heads, kv_heads))
    ids = placed((4, tokens), "int32", sharding.ACT_BT)

    kernel = Kernel("splash", device=mesh.devices.flat[0].device_kind)

    def loss(q, k, v, ids):
        return jnp.sum(packed_attention(kernel, q, k, v, ids, ids).astype(jnp.float32))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, ids).compile()
    assert compiled.as_text().count("custom-call(") >= 3  # forward, dq, dk and dv
