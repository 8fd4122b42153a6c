"""The weighted cross-entropy and its own gradient, against torch's autograd in float64."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_jax.training.loss
from llama_jax.distributed import sharding
from llama_jax.training.loss import weighted_cross_entropy

torch = pytest.importorskip("torch")

D, V = 12, 40  # padded; float32 sums of so many products of the size of 1 are some 2e-6 off


def by_torch(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray, vocab: int, e: float):
    """Loss, its parts and the gradients, in float64."""
    h, w = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, head))
    log_p = torch.log_softmax(h @ w[:vocab].T, -1)
    nll = -torch.gather(log_p, -1, torch.tensor(targets, dtype=torch.int64)[..., None])[..., 0]
    parts = torch.tensor(weights, dtype=torch.float64) * ((1 - e) * nll - e * log_p.mean(-1))
    (2 * parts.sum()).backward()
    return parts.sum().item(), *(x.numpy() for x in (parts.detach(), h.grad, w.grad))


def ours(mesh: jax.sharding.Mesh, arrays: list[np.ndarray], vocab: int, e: float) -> list[Any]:
    placed = [sharding.put(mesh, a) for a in arrays]
    placed[1] = jax.device_put(arrays[1], jax.NamedSharding(mesh, sharding.HEAD_VD))

    def loss(hidden, head, targets, weights):
        total, parts = weighted_cross_entropy(hidden, head, targets, weights, vocab, e)
        return 2 * total, (total, parts)

    grads, (total, parts) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*placed)
    alone, _ = jax.jit(lambda *x: weighted_cross_entropy(*x, vocab, e))(*placed)  # no gradient asked for
    assert alone == pytest.approx(float(total), rel=1e-6)
    return [float(total), *(np.asarray(x, np.float64) for x in (parts, *grads))]


@pytest.mark.slow
@settings(max_examples=15)
@given(
    *(st.integers(1, 3), st.integers(1, 9), st.integers(2, V)),
    *(st.sampled_from([0.0, 0.1, 0.9]), st.sampled_from([1, 3 * V, 10**6]), st.integers(0, 9)),
)
def test_loss_and_gradients(B: int, T: int, vocab: int, e: float, chunk: int, seed: int) -> None:
    """In chunks of one token, of a few, and whole; tokens without weight; rows of the head past the vocabulary."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.standard_normal((B, T, D), np.float32), rng.standard_normal((V, D), np.float32)
    targets = rng.integers(0, vocab, (B, T), dtype=np.int32)
    weights = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    mesh = sharding.make_mesh()
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(llama_jax.training.loss, "CHUNK", chunk)
        got = ours(mesh, [hidden, head, targets, weights], vocab, e)
    for mine, theirs in zip(got, by_torch(hidden, head, targets, weights, vocab, e), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


def test_chunks_are_of_what_a_device_holds(mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """No array of the compiled program has more logits than `CHUNK`."""
    monkeypatch.setattr(llama_jax.training.loss, "CHUNK", 2 * 8 * V)
    rows = [sharding.put(mesh, np.zeros(s, k)) for s, k in (((2, 64, D), "f"), ((2, 64), "i"), ((2, 64), "f"))]
    arrays = [rows[0], jax.device_put(np.zeros((V, D), "f"), jax.NamedSharding(mesh, sharding.HEAD_VD)), *rows[1:]]

    def loss(*arrays):
        return weighted_cross_entropy(*arrays, V)[0]

    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).as_text()
    assert f"2x1x8x{V}xf32" in text and f"2x1x16x{V}" not in text and f"2x1x64x{V}" not in text
