"""Run Adam on moments that are kept in fewer bits than it computes with: bfloat16, or 8-bit blocks."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax.distributed.digest import mixed, places
from llama_jax.training import eight_bits
from llama_jax.training.eight_bits import Quantized

EXACT_BELOW = 4096  # elements of a tensor whose moments bitsandbytes keeps in 32 bits


class Store(Protocol):
    """Declare how the moments of a parameter are kept, `signed` for the first of them."""

    def divide(self, x: jax.Array) -> jax.Array:
        """Return a float32 array of the parameter's shape, in the shape to compute with."""

    def join(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """Return the result of `divide` in the parameter's shape and placement, those of `like`."""

    def zeros(self, like: jax.Array) -> Any:
        """Return a moment of zeros as it is kept."""

    def keep(self, x: jax.Array, scale: Any, like: jax.Array, signed: bool, number: jax.Array) -> Any:
        """Return a moment as it is kept. `scale` is that of 8 bits; `number` differs by update and parameter."""

    def read(self, kept: Any, signed: bool) -> jax.Array:
        """Return a kept moment in float32, in the shape to compute with."""


class Exact:
    """Keep moments in float32."""

    def divide(self, x):
        return x

    def join(self, x, like):
        return x

    def zeros(self, like):
        return jnp.zeros_like(like)

    def keep(self, x, scale, like, signed, number):
        return x

    def read(self, kept, signed):
        return kept


class Rounded(Exact):
    """Keep moments in bfloat16, rounded up as often as the number is near the upper of its neighbours.

    Rounding to nearest would freeze the second moment: an update with a b2 of 0.999 changes it by less than half a unit
    in the last place. The draws depend on `seed`, the update, the parameter and the element, not on the mesh.
    """

    def __init__(self, seed: int):
        self._seed = np.uint32(seed % 2**32)

    def zeros(self, like):
        return jnp.zeros_like(like, jnp.bfloat16)

    def keep(self, x, scale, like, signed, number):
        place = places(x, mixed(number + self._seed) + np.uint32(signed))
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (place >> 16)
        drawn = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
        return jnp.where(jnp.isfinite(x), drawn, x.astype(jnp.bfloat16))

    def read(self, kept, signed):
        return kept.astype(jnp.float32)


class Blockwise:
    """Keep moments in 8 bits (`eight_bits`), in the blocks of a tensor of this shape."""

    def __init__(self, tensor: tuple[int, ...]):
        self._tensor = tensor

    def divide(self, x):
        return eight_bits.divide(x, self._tensor)

    def join(self, x, like):
        return eight_bits.join(x, self._tensor, like)

    def zeros(self, like):
        return Quantized(jnp.zeros_like(like, jnp.uint8), jnp.zeros_like(self.divide(like)[..., 0]))

    def keep(self, x, scale, like, signed, number):
        return Quantized(eight_bits.join(eight_bits.quantize(x, scale, signed), self._tensor, like), scale)

    def read(self, kept, signed):
        codes = eight_bits.divide(kept.codes, self._tensor, fill=eight_bits.ZERO[signed])
        return eight_bits.dequantize(codes, kept.absmax, signed)


def _after(arrays: Any) -> Any:
    """Return arrays unchanged. None is used before all are there, except on a GPU: its programs keep few of the moments
    in float32 without this, and copy the codes with it."""
    return jax.lax.platform_dependent(arrays, cuda=lambda x: x, default=jax.lax.optimization_barrier)


class StoredAdamState(NamedTuple):
    """Hold the number of updates, and trees of the first and the second moments as they are kept."""

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any


def scale_by_stored_adam(
    b1: float, b2: float, eps: float, store: Callable[[tuple[Any, ...], jax.Array], Store]
) -> optax.GradientTransformation:
    """Return Adam for float32 gradients. `store` gives the `Store` of a parameter by its path and its array.

    An update takes the new moments before they are rounded, as bitsandbytes' kernels do.
    """

    def init(params):
        mu, nu = (jax.tree_util.tree_map_with_path(lambda path, p: store(path, p).zeros(p), params) for _ in range(2))
        return StoredAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        # float32 would leave few digits of 1 - b^k for the first k.
        first, second = (-jnp.expm1(count * math.log(b)) if b else 1.0 for b in (b1, b2))
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        steps, mus, nus, last = [], [], [], None
        for (path, whole), mu, nu in zip(
            leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True
        ):
            of, name = store(path, whole), jax.tree_util.keystr(path)
            # By its name, a parameter has the same number in an update of a part of the tree.
            g, number = of.divide(whole), mixed(count.astype(jnp.uint32)) + np.uint32(zlib.crc32(name.encode()))

            def moments(mu, nu, of=of, g=g):
                return b1 * of.read(mu, True) + (1 - b1) * g, b2 * of.read(nu, False) + (1 - b2) * g * g

            scales = None, None
            if isinstance(of, Blockwise):
                # XLA would keep the moments of all parameters in float32. So each parameter waits for the one before,
                # and its moments are computed again once their scales are known. A CPU's compiler drops the barriers.
                if last is not None:
                    mu, nu, mus[last], nus[last] = _after((mu, nu, mus[last], nus[last]))
                scales = tuple(map(eight_bits.absmax, moments(mu, nu)))
                mu, nu, scales = jax.lax.optimization_barrier((mu, nu, scales))
                last = len(mus)
            m, v = moments(mu, nu)
            steps.append(of.join(m / (jnp.sqrt(v) * (first / jnp.sqrt(second)) + first * eps), whole))
            mus.append(of.keep(m, scales[0], whole, True, number))
            nus.append(of.keep(v, scales[1], whole, False, number))
        return tree.unflatten(steps), StoredAdamState(count, tree.unflatten(mus), tree.unflatten(nus))

    return optax.GradientTransformation(init, update)
