"""Hold the keys and values of earlier tokens, for decoding.

Letters: B rows, T tokens, S slots, K kv heads, H head dim, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import placed
from llama_jax.model.config import LlamaConfig


class KVCache(NamedTuple):
    """Hold keys and values by position: of a layer [B, K, S, H], or of stacked layers [L, B, K, S, H].

    With heads before slots, the products of a new token need no transposed copy. `layer` is the number of the layer in
    use, None where layers are not stacked.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    layer: Any = None

    def write(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]) -> "KVCache":
        """Return the cache with a block's keys and values at their positions; those past the last slot are dropped.

        A single token needs a position below the last slot.
        """
        if positions.size == 1:  # for a slice there are two kernels fewer than for a scatter
            lead = () if self.layer is None else (self.layer,)
            start = (*lead, 0, 0, positions[0, 0], 0)

            def put(whole: jax.Array, new: jax.Array) -> jax.Array:
                block = jnp.expand_dims(jnp.swapaxes(new, 1, 2), range(len(lead)))
                return jax.lax.dynamic_update_slice(whole, sharding.reshard(block, sharding.spec_of(whole)), start)

            return self._replace(k=put(self.k, k), v=put(self.v, v))
        rows = jnp.arange(k.shape[0])[:, None]
        at = (rows, slice(None), positions) if self.layer is None else (self.layer, rows, slice(None), positions)
        kept = [
            whole.at[at].set(new, mode="drop", out_sharding=placed(jax.typeof(whole).sharding.spec))
            for whole, new in ((self.k, k), (self.v, v))
        ]
        return self._replace(k=kept[0], v=kept[1])

    def of_layer(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Return the keys and values of the layer in use."""
        return (self.k, self.v) if self.layer is None else (self.k[self.layer], self.v[self.layer])


def make_cache(config: LlamaConfig, dtype: Any, rows: int, slots: int, stacked: bool) -> Any:
    """Return empty keys and values for `slots` positions of each row: a KVCache for each layer, or one if `stacked`."""
    shape = (rows, sharding.padded(config.num_key_value_heads, "tensor"), slots, config.head_dim)

    def empty(*lead: int) -> KVCache:
        spec = sharding.stacked(sharding.CACHE_BKSH) if lead else sharding.CACHE_BKSH
        return KVCache(*(jnp.zeros((*lead, *shape), dtype, out_sharding=placed(spec)) for _ in "kv"))

    return empty(config.num_hidden_layers) if stacked else [empty() for _ in range(config.num_hidden_layers)]
