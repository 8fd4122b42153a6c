"""Place the examples of one update side by side in rows, and choose few shapes for a run."""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np

Shape = tuple[int, int]  # rows, row length


def pack(lengths: Sequence[int], capacities: Sequence[int]) -> list[list[int]] | None:
    """Place examples in rows and return positions in `lengths` by row, None where no placement was found.

    Row r holds at most `capacities[r]` tokens. Rows are filled one after the other, the longest first. Each row takes
    the remaining examples that fill the row best: an exact subset sum that prefers long examples.
    """
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    remaining = sum(lengths)
    if remaining > sum(capacities) or (left and lengths[left[0]] > max(capacities)):
        return None
    placed: list[list[int]] = [[] for _ in capacities]
    for row in sorted(range(len(capacities)), key=lambda r: -capacities[r]):
        chosen = left if remaining <= capacities[row] else _fullest(left, lengths, capacities[row])
        placed[row] = sorted(chosen)
        remaining -= sum(lengths[i] for i in chosen)
        taken = set(chosen)
        left = [i for i in left if i not in taken]
        if not left:
            return placed
    return None if left else placed


def _fullest(left: list[int], lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the indices of `left` with the largest sum of lengths up to `capacity`; earlier ones are preferred."""
    within = (1 << (capacity + 1)) - 1
    reached = [1]  # element j: bit s is set where some of the first j lengths sum to s
    for i in left:
        reached.append((reached[-1] | reached[-1] << lengths[i]) & within)
        if reached[-1] >> capacity:
            break
    load = reached[-1].bit_length() - 1
    chosen = []
    for j in range(len(reached) - 2, -1, -1):
        if not reached[j] >> load & 1:
            chosen.append(left[j])
            load -= lengths[left[j]]
    return chosen


def allowed_shapes(max_tokens: int, row_limit: int, longest: int, multiple: int) -> dict[int, Shape]:
    """Return the shapes to choose from for one device, by tokens, ascending: for each size the one of fewest rows.

    Row lengths are multiples of `multiple`. A single row may be as short as `multiple`. Several rows are each longer
    than half of `row_limit`, to waste little room, and hold the longest example. `row_limit` and `max_tokens` are
    raised to the longest example.
    """
    longest = _round_up(longest, multiple)
    limit = max(_round_up(min(row_limit, max_tokens), multiple), longest)
    shapes = {}
    for size in range(multiple, max(max_tokens, limit) + 1, multiple):
        fewest = -(-size // limit)
        for rows in range(fewest, max(fewest, 2 * size // limit) + 1):
            length = size // rows
            several = length >= longest and 2 * length > limit
            if size % (rows * multiple) == 0 and (rows == 1 or several):
                shapes[size] = (rows, length)
                break
    return shapes


def totals(sizes: Sequence[int], count: int) -> dict[int, tuple[int, ...]]:
    """Return the choices of sizes for an update of `count` blocks, by the sum of the sizes, ascending.

    All blocks but two have the largest size: two free blocks of six sizes make 21 sums, which are close enough.
    """
    free = min(count, 2)
    full = (max(sizes),) * (count - free)
    choices = combinations_with_replacement(sorted(sizes, reverse=True), free)
    return dict(sorted((sum(full + choice), full + choice) for choice in choices))


def best_sizes(counts: np.ndarray, needed: np.ndarray, allowed: Sequence[int], levels: int) -> list[int]:
    """Choose at most `levels` of the sizes `allowed` that minimise the total room of all updates.

    Update k has `counts[k]` blocks and needs `needed[k]` tokens. These are an allowed size where the count is 1, else
    at most `counts[k]` times the largest allowed size. The choice is optimal where every update is one block. Otherwise
    the choice is a local optimum: neither adding nor replacing one size improves the total.
    """
    if counts.max() == 1:
        return ladder(needed, levels, 1)
    wanted = [(int(n), *np.unique(needed[counts == n], return_counts=True)) for n in np.unique(counts)]

    def room(sizes: list[int]) -> float:
        """Return the total room of all updates."""
        taken = 0
        for count, needs, updates in wanted:
            sums = np.asarray([*totals(sizes, count)])
            if sums[-1] < needs[-1]:
                return np.inf
            taken += int(sums[np.searchsorted(sums, needs)] @ updates)
        return taken

    chosen = [max(allowed)]
    least = room(chosen)
    improved = True
    while improved:
        improved = False
        grown = [chosen] if len(chosen) < levels else []
        for others in [*grown, *(chosen[:i] + chosen[i + 1 :] for i in range(len(chosen)))]:
            taken, size = min((room([*others, size]), size) for size in allowed)
            if taken < least:
                least, chosen, improved = taken, [*others, size], True
                break
    return sorted(set(chosen))  # a smaller largest size may leave another size unused


def ladder(needed: np.ndarray, levels: int, multiple: int) -> list[int]:
    """Choose at most `levels` lengths, multiples of `multiple`, that cover all of `needed` with the least padding.

    The choice is exact, by dynamic programming over the distinct rounded lengths.
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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
