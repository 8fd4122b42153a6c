"""Placing the examples of one update side by side in rows of a fixed length, and choosing few shapes for a run."""

from collections.abc import Sequence

import numpy as np

Shape = tuple[int, int]  # rows, row length


def pack(lengths: Sequence[int], rows: int, capacity: int) -> list[list[int]] | None:
    """Positions in `lengths` by row, so that no row holds more than `capacity` tokens; None where that was not found.

    Longest first, each into the emptiest row: rows come out even, and first-fit's failures need a fill over 3/4.
    Where that fails, best fit (into the fullest row that still takes it) is tried.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for best_fit in (False, True):
        loads, placed = [0] * rows, [[] for _ in range(rows)]  # type: tuple[list[int], list[list[int]]]
        for i in order:
            fits = [r for r in range(rows) if loads[r] + lengths[i] <= capacity]
            if not fits:
                break
            row = max(fits, key=loads.__getitem__) if best_fit else min(fits, key=loads.__getitem__)
            loads[row] += lengths[i]
            placed[row].append(i)
        else:
            return [sorted(row) for row in placed]
    return None


def ladder(needed: np.ndarray, levels: int, multiple: int) -> list[int]:
    """At most `levels` lengths, multiples of `multiple`, that cover all of `needed` with the least total padding.

    Exact, by dynamic programming over the distinct rounded lengths.
    """
    rounded = -(-np.asarray(needed) // multiple)
    values, counts = np.unique(rounded, return_counts=True)
    n = len(values)
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[k][j]: least padded sum of the first j values with k levels; a level is the largest value that it covers.
    cost = np.full((min(levels, n) + 1, n + 1), np.inf)
    cost[:, 0] = 0
    cut = np.zeros(cost.shape, int)
    for k in range(1, len(cost)):
        for j in range(1, n + 1):
            options = cost[k - 1, :j] + (total[j] - total[:j]) * values[j - 1]
            cut[k, j] = int(options.argmin())
            cost[k, j] = options[cut[k, j]]
    chosen, j, k = [], n, len(cost) - 1
    while j > 0:
        chosen.append(int(values[j - 1]) * multiple)
        j, k = int(cut[k, j]), k - 1
    return sorted(chosen)
