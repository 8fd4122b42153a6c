#!/usr/bin/env python3
"""Compare the kernels of model/attention.py on this device with float32 by plain XLA: values, gradients, time.

    python benchmarks/attention_kernels.py [KERNEL]

Each shape class varies rows, GQA or MHA, segments a row, padded tails, head dims and window; then caches. Then
milliseconds of forward, and of forward and backward, for 4 rows of 2,048 tokens, 32 heads, and microseconds of a new
token's attention to caches of which 576 slots are filled. Exits with 1 where an error is more than bf16 explains.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from rows import Row, all_fine

from llama_jax.distributed import sharding
from llama_jax.distributed.platform import compiler_options
from llama_jax.model import attention
from llama_jax.model.attention import Kernel, Scores, cached_attention, choose_kernel, packed_attention

# (rows, length, heads, kv heads, head dim, segments a row), sliding window
CASES = [
    ((1, 128, 4, 4, 64, 1), None),
    ((1, 1024, 32, 32, 128, 8), None),
    ((4, 1024, 32, 8, 128, 8), None),
    ((4, 1024, 32, 8, 128, 8), 17),
    ((4, 2048, 32, 32, 128, 64), None),
    ((2, 896, 9, 3, 64, 5), None),
    ((2, 896, 9, 3, 64, 5), 128),
    ((4, 640, 32, 4, 64, 17), None),
    ((8, 1920, 16, 2, 128, 33), None),
    ((8, 1920, 16, 2, 128, 3), 500),
]
# (rows, slots, heads, kv heads, head dim) of a cache
CACHES = [
    (2, 128, 4, 2, 64),
    (1, 640, 32, 32, 128),
    (32, 640, 32, 32, 128),
    (16, 2560, 32, 8, 128),
    (32, 2560, 9, 3, 64),
]
SMALL = 2**14  # rows x tokens x heads that a CPU computes in seconds
# Relative to the float32 reference's largest value: inputs, outputs and probabilities rounded to bf16 (2^-9 each).
BOUND = 2e-2
# The same in float32: up to 2,048 terms of 2^-24 in another order, 1.2e-4 at the very worst. Operands that a device
# rounds to bf16 in silence leave 1e-3 and more.
BOUND_FLOAT32 = 1e-4


def make_rows(rng, B: int, T: int, segments: int):
    """Return segment ids and positions of random odd lengths; every other row ends in padding."""
    ids, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        end = T if b % 2 == 0 and segments > 1 else T - int(rng.integers(1, T // 4))
        cuts = np.sort(rng.choice(np.arange(1, end), segments - 1, replace=False))
        for i, (start, stop) in enumerate(zip([0, *cuts], [*cuts, end], strict=True), start=1):
            ids[b, start:stop], positions[b, start:stop] = i, np.arange(stop - start)
    return ids, positions


def run(kernel: Kernel, scores: Scores, mesh, dtype, q, k, v, w, ids, positions):
    def loss(q, k, v, w, ids, positions):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        out = packed_attention(kernel, q, k, v, ids, positions, scores=scores)
        return jnp.sum(out.astype(jnp.float32) * w), out

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), compiler_options=compiler_options(mesh, False))
        grads, out = program(q, k, v, w, ids, positions)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


def check(wanted: str, mesh, dtype=jnp.bfloat16, reference=None) -> Iterator[Row]:
    """Compare the kernel that `--attention wanted` takes with float32, in every shape class: its output and gradients.

    `reference` is the mesh that computes in float32, by default `mesh`. A CPU takes the small classes alone: it
    computes the others in minutes.
    """
    reference, kind = reference or mesh, mesh.devices.flat[0]
    bound = BOUND if jnp.dtype(dtype) == jnp.bfloat16 else BOUND_FLOAT32
    for case, window in CASES:
        B, T, N, K, H, segments = case
        if kind.platform == "cpu" and B * T * N > SMALL:
            continue
        name, _ = choose_kernel(wanted, kind.platform, kind.device_kind, H, jnp.dtype(dtype).name)
        scores, rng = Scores(window=window), np.random.default_rng(sum(case))
        ids, positions = make_rows(rng, B, T, segments)
        real = (ids > 0)[..., None, None]
        arrays = [rng.standard_normal((B, T, n, H), np.float32) for n in (N, K, K, N)]
        arrays = [np.asarray(jnp.asarray(a, dtype), np.float32) for a in arrays]
        arrays[3] = arrays[3] * real  # padding has no gradient

        def results(kernel: Kernel, mesh, dtype, scores=scores, arrays=arrays, rows=(ids, positions)):
            placed = [jax.device_put(a, jax.NamedSharding(mesh, sharding.ACT_BTNH)) for a in arrays]
            return run(kernel, scores, mesh, dtype, *placed, *(sharding.put(mesh, a) for a in rows))

        expected = results(Kernel("xla"), reference, jnp.float32)
        errors = dict.fromkeys(("out", "dq", "dk", "dv"), (0.0, bound))
        for room in (0, 7):
            got = results(Kernel(name, segments + room, mesh.devices.flat[0].device_kind), mesh, dtype)
            for of, g, e in zip(errors, got, expected, strict=True):
                # A NaN or an infinity is an error in padding too.
                off = np.abs(np.where(real, g - e, 0)).max() / np.abs(np.where(real, e, 0)).max()
                errors[of] = (max(errors[of][0], float(off) if np.isfinite(g).all() else math.inf), bound)
        where = f"{B} x {T} tokens, {N}/{K} heads of {H}, {segments} segments a row, window {window}"
        yield Row(f"attention by {name} in {jnp.dtype(dtype).name}, {where}", errors)


def check_cached(mesh, dtype=jnp.bfloat16) -> Iterator[Row]:
    """Compare the attention of a new token in each row to a cache with float32. Slots that the row has not filled hold
    large numbers."""
    kind, bound = mesh.devices.flat[0], BOUND if jnp.dtype(dtype) == jnp.bfloat16 else BOUND_FLOAT32
    for case in CACHES:
        B, S, N, K, H = case
        if kind.platform == "cpu" and B * S * K > SMALL:
            continue
        name, _ = choose_kernel("auto", kind.platform, kind.device_kind, H, jnp.dtype(dtype).name)
        rng = np.random.default_rng(sum(case))
        positions = rng.integers(0, S, (B, 1)).astype(np.int32)
        positions[0], positions[-1] = 0, S - 1
        unfilled = (np.arange(S) > positions)[:, None, :, None]
        arrays = [rng.standard_normal(shape, np.float32) for shape in ((B, 1, N, H), (B, K, S, H), (B, K, S, H))]
        q, k, v = (jnp.asarray(x, dtype) for x in (arrays[0], *(np.where(unfilled, 1e3, x) for x in arrays[1:])))

        def attend(kernel: str, q, k, v, positions=positions):
            program = jax.jit(partial(cached_attention, Kernel(kernel)))
            return np.asarray(program(q, k, v, jnp.asarray(positions)), np.float32)

        expected, got = attend("xla", *(x.astype(jnp.float32) for x in (q, k, v))), attend(name, q, k, v)
        off = np.abs(got - expected).max() / np.abs(expected).max()
        size = (k.nbytes + v.nbytes) / 2**20
        where = f"{B} rows of {S} slots, {N}/{K} heads of {H}, {size:.1f} MiB"
        yield Row(f"attention to a cache under --attention {name}, {where}", {"out": (float(off), bound)})


def median_seconds(program: Any, *arguments: Any, calls: int) -> float:
    """Return the seconds of a call, the median of five laps of so many calls in flight, after a first call."""
    jax.block_until_ready(program(*arguments))
    laps = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([program(*arguments) for _ in range(calls)])
        laps.append((time.perf_counter() - start) / calls)
    return float(np.median(laps))


def clock(name: str, mesh, B: int, T: int, N: int, K: int, H: int, segments: int) -> None:
    rng = np.random.default_rng(0)
    ids, positions = make_rows(rng, B, T, segments)
    placed = [
        jax.device_put(
            jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.bfloat16), jax.NamedSharding(mesh, sharding.ACT_BTNH)
        )
        for n in (N, K, K)
    ]
    rows = [sharding.put(mesh, a) for a in (ids, positions)]
    kernel = Kernel(name, segments)

    def forward(q, k, v):
        return packed_attention(kernel, q, k, v, *rows)

    def both(q, k, v):
        return jax.grad(lambda *x: jnp.sum(forward(*x).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    times = []
    with jax.set_mesh(mesh):
        for f in (jax.jit(forward), jax.jit(both)):
            times.append(1000 * median_seconds(f, *placed, calls=10))
    print(
        f"{name} {B}x{T}, {N}/{K} heads of {H}, {segments} segments: {times[0]:.2f} ms, with backward {times[1]:.2f} ms"
    )


def clock_cached(names: list[str], S: int, K: int, B: int, N: int = 32, H: int = 128, layers: int = 8) -> None:
    """Print the microseconds of a layer by each kernel, whatever the size of the cache."""
    keys = jax.random.split(jax.random.key(0), 2 * layers)
    cache = [jax.random.normal(key, (B, K, S, H), jnp.bfloat16) for key in keys]
    q, positions = jnp.ones((B, 1, N, H), jnp.bfloat16), jnp.full((B, 1), 575, jnp.int32)
    times: list[str] = []
    attention.LARGE = attention.MANY = 0
    for name in names:

        def forward(q, cache, name=name):
            for i in range(4 * layers):
                j = 2 * (i % layers)
                q = cached_attention(Kernel(name), q, cache[j], cache[j + 1], positions)
            return q

        seconds = median_seconds(jax.jit(forward), q, cache, calls=4) / (4 * layers)
        times.append(f"{name} {1e6 * seconds:.1f} us")
    print(f"{B} rows of {S} slots, {N}/{K} heads of {H}: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    name, mesh = (sys.argv[1:] or ["cudnn"])[0], sharding.make_mesh()
    good = all_fine(check(name, mesh)) & all_fine(check_cached(mesh))
    jax.config.update("jax_default_matmul_precision", "default")
    for shape in ((1, 1024, 32, 32, 128, 8), (4, 2048, 32, 32, 128, 16), (4, 2048, 32, 8, 128, 16)):
        for kernel in dict.fromkeys(("xla", name)):
            clock(kernel, mesh, *shape)
    for slots, kv_heads, most in ((640, 32, 32), (640, 8, 32), (2560, 32, 8), (2560, 8, 32)):
        for rows in (n for n in (1, 4, 8, 16, 32) if n <= most):
            clock_cached(list(dict.fromkeys(("xla", name))), slots, kv_heads, rows)
    sys.exit(0 if good else 1)
