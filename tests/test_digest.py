"""The digest of parameters: any bit and any place changes it, no mesh does."""

import jax
import ml_dtypes
import numpy as np
from forks import on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.distributed.digest import digest
from llama_jax.distributed.sharding import make_mesh

TYPES = (np.float32, ml_dtypes.bfloat16, np.uint8, np.int8)


def arrays(dtype: type, seed: int = 0, shape: tuple[int, ...] = (6, 8)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = f"u{np.dtype(dtype).itemsize}"
    bits = (rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(kind)[..., 0] for _ in "ab")
    return {name: array.view(dtype) for name, array in zip("ab", bits, strict=True)}


@settings(max_examples=60)
@given(st.sampled_from(TYPES), st.integers(0, 2**32 - 1), st.data())
def test_any_change_changes_it(dtype: type, seed: int, data: st.DataObject) -> None:
    """A bit of an element, two elements that change places, two arrays that do, and a name."""
    mesh, given = make_mesh(), arrays(dtype, seed)
    seen = [digest(given, mesh)]
    bits = given["a"].view(f"u{given['a'].itemsize}").copy()
    i, j = data.draw(st.lists(st.integers(0, bits.size - 1), min_size=2, max_size=2, unique=True))
    bits.flat[i] ^= 1 << data.draw(st.integers(0, 8 * bits.itemsize - 1))
    seen.append(digest({**given, "a": bits.view(dtype)}, mesh))
    bits = given["a"].view(bits.dtype).copy()
    bits.flat[[i, j]] = bits.flat[[j, i]]
    if not np.array_equal(bits, given["a"].view(bits.dtype)):
        seen.append(digest({**given, "a": bits.view(dtype)}, mesh))
    seen.append(digest({"a": given["b"], "b": given["a"]}, mesh))
    seen.append(digest({"a": given["a"], "c": given["b"]}, mesh))
    assert len({*seen}) == len(seen)
    assert digest(arrays(dtype, seed), mesh) == seen[0]


def test_a_mesh_and_its_padding_do_not() -> None:
    on_devices(8, "test_digest.on_eight_devices()")


def on_eight_devices() -> None:
    alone = make_mesh(jax.devices()[:1])
    for dtype in TYPES:
        given = arrays(dtype, shape=(16, 8))
        expected = digest(given, alone)
        for spec, of in (("fsdp=8", P("fsdp", None)), ("fsdp=2,context=2,tensor=2", P("tensor", ("fsdp", "context")))):
            mesh = make_mesh(spec=spec)
            padded = {name: np.pad(array, ((0, 16), (0, 8))) for name, array in given.items()}
            for values in (given, padded):
                found = digest(jax.device_put(values, NamedSharding(mesh, of)), mesh)
                assert found == expected, (dtype, spec)
