#!/usr/bin/env python3
"""Check and time products with frozen matrices in 4 and 8 bits on this device.

    python benchmarks/quantized.py [--small] [--rows 12288]

First values and gradients are compared with float64 on the host. Then, for the shapes of 7B in bfloat16, milliseconds
of x @ W.T and of its gradient for x: a bfloat16 matrix, `quantized_matmul` by format, dequantization alone, and other
ways to dequantize. A gradient counts its forward pass too. Exits with 1 where an error is more than bf16 explains.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from attention_kernels import median_seconds

from llama_jax.model import quantized
from llama_jax.model.quantized import LEVELS, NF4, dequantize, quantized_matmul
from llama_jax.model.quantizing import quantize_int8, quantize_nf4

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # [outputs, inputs]
SMALL = [(256, 192)]
BOUND = 2.0**-8  # relative to the sum of magnitudes: the result is rounded to bfloat16, products and sums are exact
OUT = P(None, None, None)

FORMATS: dict[str, Callable[[np.ndarray], Any]] = {
    "nested nf4": partial(quantize_nf4, nested=True, name="w"),
    "nf4": partial(quantize_nf4, nested=False, name="w"),
    "int8": partial(quantize_int8, name="w"),
}


def by_take(q: NF4, dtype: Any) -> jax.Array:
    """Dequantize by a lookup in a table of 16 levels."""
    codes = jnp.stack([q.codes >> 4, q.codes & 15], axis=1)
    values = jnp.asarray(LEVELS)[codes] * quantized._absmax(q)[:, None, None]
    return values.astype(dtype).reshape(-1, values.shape[-1]).T


def in_torch_order(q: NF4, dtype: Any) -> jax.Array:
    """Dequantize bytes of neighbours, outputs first, as bitsandbytes packs them. The codes are not those of `q`."""
    groups, half, outputs = q.codes.shape
    codes = q.codes.reshape(outputs, groups, half)[..., None] >> np.array([4, 0], np.uint8)
    values = quantized._levels(codes.reshape(outputs, groups, -1)) * quantized._absmax(q).reshape(outputs, groups, 1)
    return values.astype(dtype).reshape(outputs, -1)


def two_products(x: jax.Array, q: NF4) -> jax.Array:
    """Multiply each half of the groups by itself: codes are never interleaved."""
    x_halves = x.reshape(*x.shape[:2], -1, 2, quantized.HALF)
    absmax = quantized._absmax(q)[:, None]
    high, low = ((quantized._levels(codes) * absmax).astype(x.dtype) for codes in (q.codes >> 4, q.codes))
    return jnp.einsum("BTGH,GHO->BTO", x_halves[..., 0, :], high) + jnp.einsum(
        "BTGH,GHO->BTO", x_halves[..., 1, :], low
    )


def recomputed(way: Callable[[NF4, Any], jax.Array]) -> Callable[[jax.Array, NF4], jax.Array]:
    """Return a product that dequantizes again in the backward pass, as `quantized_matmul` does."""

    @jax.checkpoint
    def product(x: jax.Array, q: NF4) -> jax.Array:
        return jnp.einsum("BTI,OI->BTO", x, way(q, x.dtype))

    return product


def product(x: jax.Array, q: Any) -> jax.Array:
    return quantized_matmul(x, q, jnp.bfloat16, OUT)


def both(f: Callable, x: jax.Array, w: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, pull = jax.vjp(lambda x: f(x, w), x)
    return y, *pull(dy)


def check(shape: tuple[int, int], rows: int) -> bool:
    """Compare the module's products, and the other ways' that take its codes, with float64 on the host."""
    rng, good = np.random.default_rng(0), True
    weight = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    x, dy = (jnp.asarray(rng.standard_normal((1, rows, n), np.float32), jnp.bfloat16) for n in reversed(shape))
    for name, quantize in FORMATS.items():
        q = quantize(weight)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            on_host = np.asarray(jax.jit(dequantize, static_argnums=1)(q, jnp.bfloat16))
        on_device = np.asarray(jax.jit(dequantize, static_argnums=1)(q, jnp.bfloat16))
        exact, same = on_host.astype(np.float64), bool((on_device == on_host).all())
        ways: dict[str, Callable] = {"quantized_matmul": product}
        if name != "int8":
            ways |= {"take": recomputed(by_take), "two products": jax.checkpoint(two_products)}
        for way, f in ways.items():
            got = jax.jit(partial(both, f))(x, q, dy)
            errors = []
            for value, given, b in zip(got, (x, dy), (exact.T, exact), strict=True):
                a = np.asarray(given, np.float64)
                errors.append((np.abs(np.asarray(value, np.float64) - a @ b) / (np.abs(a) @ np.abs(b))).max())
            good &= same and max(errors) < BOUND
            print(f"{name} {shape}, {way}: y, dx off by {errors[0]:.1e} {errors[1]:.1e}; matrix equal: {same}")
    return good


def clock(f: Callable, *arguments: Any) -> float:
    """Return the median milliseconds of a compiled call."""
    return 1000 * median_seconds(jax.jit(f), *arguments, calls=5)


def clock_all(shape: tuple[int, int], rows: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    x, dy = (jnp.asarray(rng.standard_normal((1, rows, n), np.float32), jnp.bfloat16) for n in reversed(shape))
    nested = jax.device_put(FORMATS["nested nf4"](weight))
    # name, the product, the matrix it takes
    runs = [("bf16", lambda x, w: jnp.einsum("BTI,OI->BTO", x, w), jnp.asarray(weight, jnp.bfloat16))]
    runs += [(name, product, jax.device_put(quantize(weight))) for name, quantize in FORMATS.items()]
    runs += [(way.__name__, recomputed(way), nested) for way in (by_take, in_torch_order)]
    runs += [("two_products", jax.checkpoint(two_products), nested)]
    alone = dict.fromkeys(FORMATS, dequantize) | {"by_take": by_take, "in_torch_order": in_torch_order}
    for name, f, w in runs:
        forward, gradient = clock(f, x, w), clock(partial(both, f), x, w, dy)
        text = f"{shape} x {rows} rows, {name}: {forward:.3f} ms, with gradient {gradient:.3f} ms"
        if name in alone:
            text += f"; dequantized alone {clock(partial(alone[name], dtype=jnp.bfloat16), w):.3f} ms"
        print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that the script runs")
    parser.add_argument("--rows", type=int, default=12_288)
    args = parser.parse_args()
    shapes, rows = (SMALL, 64) if args.small else (SHAPES, args.rows)
    print(jax.devices()[0].device_kind, flush=True)
    good = check(SMALL[0] if args.small else (1024, 2048), 256)
    for shape in shapes:
        clock_all(shape, rows)
    sys.exit(0 if good else 1)
