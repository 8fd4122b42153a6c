"""Hash arrays and the places of their elements on their devices: for digests, and for random draws."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.distributed import sharding

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes


def digest(tree: Any, mesh: jax.sharding.Mesh) -> str:
    """Return 16 hex digits of the values of a tree, of their names and places, bit by bit.

    The mesh does not matter, nor do zeros that pad an array for it. All processes must call this.
    """
    result = hashlib.blake2b(digest_size=8)
    with jax.set_mesh(mesh):
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            result.update(f"{jax.tree_util.keystr(path)} {array.dtype} {sharding.read(_sums(array)).tolist()}".encode())
    return result.hexdigest()


def sums(tree: Any) -> dict[str, list[int]]:
    """Return two sums of each array of a tree, by its path. One wrong bit changes them, as does a wrong place."""
    # One at a time: sharding.IN_FLIGHT has the reason, and arrays of the host's memory need not fit a device together.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): sharding.read(_sums(sharding.to_device(array))).tolist() for path, array in leaves
    }


@jax.jit
def _sums(array: jax.Array) -> jax.Array:
    """Return two sums [2] of hashes of bits and place, as uint32: sums of integers are the same in any order."""
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    place = places(array, jnp.uint32(0))
    hashes = (mixed(bits ^ mixed(place + np.uint32(seed))) for seed in (1, 2))
    return jnp.stack([jnp.sum(jnp.where(bits == 0, 0, h), dtype=jnp.uint32) for h in hashes])


def places(like: jax.Array, start: jax.Array) -> jax.Array:
    """Return a hash of each element's place in an array, uint32, of its shape and placement; another `start` gives
    others."""
    place = start
    for axis in range(like.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis, out_sharding=jax.typeof(like).sharding)
        place = mixed(place + index)
    return place


def mixed(x: jax.Array) -> jax.Array:
    """Return murmur3's last step: each bit of the input flips each bit of the output half of the time."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
