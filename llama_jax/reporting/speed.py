"""Measure the speed of a run: tokens a second, and the share of the devices' peak that the model's operations take."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RECENT = 50  # updates


class Speed(NamedTuple):
    """Hold the speed of a run after its first update, which compiles.

    `update_seconds` is the median time of an update. `block_seconds` is the host's median time to make an update's
    blocks; the devices compute the previous update meanwhile.
    """

    tokens_per_second: float
    update_seconds: float
    block_seconds: float


class Speedometer:
    """Measure updates by a clock, which may stand still beside the training.

    `flops_per_token` are the model's operations for a real token, forward and backward, without recomputation. `peak`
    is the published rate of all devices together, None where one is unknown.
    """

    def __init__(self, clock: Callable[[], float], flops_per_token: float = 0.0, peak: float | None = None):
        self._clock, self._flops_per_token, self._peak = clock, flops_per_token, peak
        self._done_at: list[tuple[float, int]] = []  # time of completion and tokens, by update
        self._made_in: list[float] = []
        self._line = 0  # updates at the last line

    def count(self, tokens: int, made_in: float) -> None:
        """Count an update that is done, with its real tokens and the host's seconds to make its blocks."""
        self._done_at.append((self._clock(), tokens))
        self._made_in.append(made_in)

    def recent(self) -> float | None:
        """Return real tokens a second over the latest updates, None where only one is done."""
        return self._rate(max(0, len(self._done_at) - RECENT))

    def line(self) -> float | None:
        """Return real tokens a second since the last call, or since the first update."""
        first, self._line = max(self._line - 1, 0), len(self._done_at)
        return self._rate(first)

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Return the model's operations at a speed as a share of the devices' peak; None where one is unknown."""
        if tokens_per_second is None or self._peak is None:
            return None
        return tokens_per_second * self._flops_per_token / self._peak

    def whole(self) -> Speed | None:
        """Return the speed since the first update, which compiled; None after fewer than two updates."""
        rate = self._rate(0)
        if rate is None:
            return None
        times = [t for t, _ in self._done_at]
        return Speed(rate, float(np.median(np.diff(times))), float(np.median(self._made_in)))

    def _rate(self, first: int) -> float | None:
        """Return tokens a second of the updates after number `first` (from 0)."""
        done = self._done_at[first:]
        if len(done) < 2:
            return None
        return sum(n for _, n in done[1:]) / max(done[-1][0] - done[0][0], 1e-9)
