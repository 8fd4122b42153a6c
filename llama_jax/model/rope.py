"""Compute the rotary position embedding with every scaling that transformers has for LLaMA.

Sources: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), NTK-aware "dynamic" scaling, YaRN
(2309.00071), LongRoPE (2402.13753), and Llama 3.1's frequency bands. The arithmetic follows transformers'
`modeling_rope_utils` in order and type: float32, powers rounded from float64.

Letters: B rows, T tokens, H head dimension.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.distributed.sharding import ACT_BTD, placed
from llama_jax.model.config import LlamaConfig, RopeConfig

F32 = np.float32


def rope_cos_sin(
    config: LlamaConfig, positions: Int[Array, "B T"], lengths: Int[Array, "B T"], max_length: int
) -> tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]:
    """Return cosines and sines of the rotation angles, float32, scaled by YaRN's and LongRoPE's attention factor.

    `lengths` is the length of each token's sequence, at most `max_length`. `dynamic` and `longrope` choose their
    frequencies by it, as transformers does from the largest position of a batch.
    """
    rope = config.rope
    if rope.rope_type == "dynamic":
        table = jnp.asarray(_dynamic_inv_freq(config, max_length))
        rows = jnp.maximum(lengths - config.max_position_embeddings, 0)
        inv_freq = table.at[rows].get(out_sharding=placed(ACT_BTD))
    elif rope.rope_type == "longrope":
        assert rope.short_factor is not None and rope.long_factor is not None
        inv_freq = jnp.where(
            (lengths > rope.original_max_position_embeddings)[..., None],
            _divided(config, rope.long_factor),
            _divided(config, rope.short_factor),
        )
    else:
        inv_freq = jnp.asarray(_fixed_inv_freq(config))
    angles = positions.astype(jnp.float32)[..., None] * inv_freq
    factor = attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def covered_positions(config: LlamaConfig) -> int:
    """Return the length of sequences that the model was made for, as vLLM derives it from the scaling.

    `linear` and `dynamic` stretch `max_position_embeddings`; the others name the length before the stretch themselves.
    """
    rope, maximum = config.rope, config.max_position_embeddings
    if rope.rope_type in ("linear", "dynamic"):
        return int(maximum * (rope.factor or 1))
    if rope.rope_type in ("yarn", "llama3"):
        return max(maximum, int(rope.original_max_position_embeddings * (rope.factor or 1)))
    return maximum


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H/2"], sin: Float[Array, "B T H/2"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2]) by the given angles; the result has the promoted type of the operands."""
    x1, x2 = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def attention_factor(rope: RopeConfig) -> float:
    """Return the factor of cosines and sines: 1 except for `yarn` and `longrope`."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    assert rope.factor is not None
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "longrope":
        if rope.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _exponents(dim: int) -> np.ndarray:
    return np.arange(0, dim, 2).astype(F32) / F32(dim)


def _powers(base: float, dim: int) -> np.ndarray:
    """Return base ** (2i / dim), each the float32 nearest to the exact value."""
    return np.power(base, _exponents(dim).astype(np.float64)).astype(F32)


def _divided(config: LlamaConfig, factors: tuple[float, ...]) -> np.ndarray:
    return F32(1) / (np.asarray(factors, F32) * _powers(config.rope.rope_theta, config.head_dim))


def _fixed_inv_freq(config: LlamaConfig) -> np.ndarray:
    """Return the inverse frequencies [H/2] of the scalings that do not depend on the length."""
    rope, dim = config.rope, config.head_dim
    powers = _powers(rope.rope_theta, dim)
    inv_freq = F32(1) / powers
    if rope.rope_type == "default":
        return inv_freq
    assert rope.factor is not None
    if rope.rope_type == "linear":
        return inv_freq / F32(rope.factor)
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq)
    assert rope.rope_type == "yarn"
    low, high = _yarn_range(rope, dim)
    ramp = np.clip((np.arange(dim // 2).astype(F32) - F32(low)) / F32(high - low), F32(0), F32(1))
    keep = F32(1) - ramp
    return F32(1) / (F32(rope.factor) * powers) * (F32(1) - keep) + inv_freq * keep


def _yarn_range(rope: RopeConfig, dim: int) -> tuple[float, float]:
    def dimension(rotations: float) -> float:
        period = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _llama3(rope: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor
    original = rope.original_max_position_embeddings
    # torch divides a scalar by a tensor as the scalar times the reciprocal.
    wavelength = F32(1) / inv_freq * F32(2 * math.pi)
    slow = wavelength > F32(original / rope.low_freq_factor)
    fast = wavelength < F32(original / rope.high_freq_factor)
    scaled = np.where(slow, inv_freq / F32(rope.factor), inv_freq)
    smooth = (F32(1) / wavelength * F32(original) - F32(rope.low_freq_factor)) / F32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (F32(1) - smooth) * scaled / F32(rope.factor) + smooth * scaled
    return np.where(slow | fast, scaled, blended).astype(F32)


def _dynamic_inv_freq(config: LlamaConfig, max_length: int) -> np.ndarray:
    """Return inverse frequencies [max_length - max_position_embeddings + 1, H/2] by length, the base growing with it.

    The table is made on the host. A device's float32 power is some units off in the last place, and at position 10,000
    this moves a fast angle by 1e-3.
    """
    rope, dim, maximum = config.rope, config.head_dim, config.max_position_embeddings
    assert rope.factor is not None
    length = np.arange(maximum, max(maximum, max_length) + 1).astype(F32)
    stretch = F32(rope.factor) * length / F32(maximum) - F32(rope.factor - 1)
    growth = np.power(stretch.astype(np.float64), dim / (dim - 2)).astype(F32)
    base = (F32(rope.rope_theta) * growth).astype(np.float64)[:, None]
    base[0] = rope.rope_theta  # nothing is stretched inside the original context
    return F32(1) / np.power(base, _exponents(dim).astype(np.float64)).astype(F32)
