"""Draw the initial matrices of torch's layers on the CPU, without torch."""

import math

import numpy as np

from llama_jax.data.order import twister_of

_BITS = 24  # of a 32-bit output, the low bits that make a float32 in [0, 1)


class TorchRandom:
    """Draw float32 matrices as torch 2.13 does on the CPU after `torch.manual_seed(seed)`."""

    def __init__(self, seed: int):
        self.twister = twister_of(seed)

    def skip(self, elements: int) -> None:
        """Pass over the draws of a uniform matrix of so many elements."""
        self.twister.random_raw(elements, output=False)

    def kaiming_uniform(self, out: int, in_: int) -> np.ndarray:
        """Draw the weight [out, in] of a new `nn.Linear`: uniform within 1 / sqrt(in), bit for bit.

        torch computes u (high - low) + low by a fused multiply-add, on x86 with AVX2 and on ARM. As high is -low, the
        result is the rounded product of two float32, (2^24 u - 2^23) and 2^-23 high.
        """
        # torch.nn.init.kaiming_uniform_ with a = sqrt(5), in the order of its float64 operations.
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(in_))
        values = (self._integers(out * in_) - (1 << (_BITS - 1))).astype(np.float32)
        values *= np.float32(bound) * np.float32(2.0 ** (1 - _BITS))
        return values.reshape(out, in_)

    def normal(self, out: int, in_: int, std: float) -> np.ndarray:
        """Draw a normal matrix [out, in] of at least 16 elements, with torch's draws.

        Box-Muller makes 16 values of 16 uniform draws: 8 radii and 8 angles. For a partial last block torch draws again
        for the last 16 elements. torch's logarithm, sine and cosine depend on the machine (AVX2 or the C library). Here
        float64 is rounded once, so values differ from torch's by at most 4 x 2^-24 radius std.
        """
        count = out * in_
        if count < 16:
            raise NotImplementedError("torch draws normal matrices below 16 elements otherwise")
        uniforms = self._integers(count).astype(np.float32) * np.float32(2.0**-_BITS)
        values = np.empty(count, np.float32)
        whole = count // 16 * 16
        values[:whole] = _box_muller(uniforms[:whole], std)
        if whole < count:
            values[-16:] = _box_muller(self._integers(16).astype(np.float32) * np.float32(2.0**-_BITS), std)
        return values.reshape(out, in_)

    def _integers(self, count: int) -> np.ndarray:
        return (self.twister.random_raw(count) & ((1 << _BITS) - 1)).astype(np.int32)


def _box_muller(uniforms: np.ndarray, std: float) -> np.ndarray:
    """Return normal values for uniforms in [0, 1), both float32 [16 n]."""
    first, second = np.moveaxis(uniforms.reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(-2 * np.log1p(-first.astype(np.float64)))
    angle = (np.float32(2 * math.pi) * second).astype(np.float64)  # torch rounds the angle to float32
    return (np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) * std).astype(np.float32).ravel()
