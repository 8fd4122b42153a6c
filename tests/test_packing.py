"""Packing never loses an example nor overfills a row; the ladder of lengths is the best one there is."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.packing import ladder, pack

many_lengths = st.lists(st.integers(1, 40), max_size=14)


def loads(placed: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[i] for i in row) for row in placed]


def fits(lengths: list[int], rows: int, capacity: int) -> bool:
    """Whether there is any packing at all, by trying: each item into every row of another load."""

    def place(items: list[int], free: list[int]) -> bool:
        if not items:
            return True
        for r, room in enumerate(free):
            if room >= items[0] and room not in free[:r]:
                rest = [*free[:r], room - items[0], *free[r + 1 :]]
                if place(items[1:], rest):
                    return True
        return False

    return place(sorted(lengths, reverse=True), [capacity] * rows)


@settings(max_examples=1000)
@given(lengths=many_lengths, rows=st.integers(1, 6), capacity=st.integers(1, 100))
def test_every_example_is_placed_once_and_no_row_is_overfull(lengths, rows, capacity):
    placed = pack(lengths, rows, capacity)
    if placed is None:
        # Longest first: an item finds no room only where every row is too full for it.
        assert sum(lengths) + rows * max(lengths) > rows * capacity
        return
    assert len(placed) == rows
    assert sorted(i for row in placed for i in row) == list(range(len(lengths)))
    assert max(loads(placed, lengths), default=0) <= capacity
    assert all(row == sorted(row) for row in placed)


@settings(max_examples=300)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), rows=st.integers(1, 3), capacity=st.integers(1, 40)
)
def test_one_row_and_small_examples_are_never_given_up(lengths, rows, capacity):
    """What does not fit is not placed; what fits into one row is, and what leaves room for the longest in every row."""
    placed = pack(lengths, rows, capacity)
    if not fits(lengths, rows, capacity):
        assert placed is None
    elif rows == 1 or sum(lengths) <= rows * (capacity - max(lengths)):
        assert placed is not None


@settings(max_examples=500)
@given(lengths=many_lengths, rows=st.integers(1, 5), more=st.integers(1, 4), capacity=st.integers(20, 100))
def test_more_rows_never_fail_where_fewer_do_not(lengths, rows, more, capacity):
    """`Batches` plans with few rows and may place the examples into more."""
    if pack(lengths, rows, capacity) is not None:
        assert pack(lengths, rows + more, capacity) is not None


@settings(max_examples=500)
@given(lengths=many_lengths.filter(bool), rows=st.integers(1, 5), capacity=st.integers(40, 120), data=st.data())
def test_less_room_down_to_the_fullest_row_is_enough(lengths, rows, capacity, data):
    """`Batches` plans with the longest row that is allowed and then takes a shorter one."""
    placed = pack(lengths, rows, capacity)
    if placed is not None:
        smaller = data.draw(st.integers(max(loads(placed, lengths)), capacity))
        assert pack(lengths, rows, smaller) is not None


def test_where_even_rows_fail_full_ones_are_tried():
    """3 and 3 in one row each leave no room for 2, 2 and 2: 5, 5 and one over."""
    assert pack([2, 2, 2, 3, 3], 2, 6) == [[3, 4], [0, 1, 2]]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=14), rows=st.integers(1, 5))
def test_rows_come_out_even(lengths, rows):
    """Longest first into the emptiest row: no row is fuller than the emptiest by more than its own last example."""
    placed = pack(lengths, rows, sum(lengths))
    assert placed is not None
    full = loads(placed, lengths)
    for row, load in zip(placed, full, strict=True):
        assert not row or load - min(lengths[i] for i in row) <= min(full)


def padded_sum(needed: list[int], levels: tuple[int, ...]) -> int:
    return sum(min(level for level in levels if level >= n) for n in needed)


@settings(max_examples=400)
@given(
    needed=st.lists(st.integers(1, 700), min_size=1, max_size=12),
    levels=st.integers(1, 4),
    multiple=st.sampled_from([1, 7, 64, 128]),
)
def test_the_ladder_is_the_best_of_all(needed, levels, multiple):
    """All choices of at most `levels` multiples are tried."""
    got = ladder(np.asarray(needed), levels, multiple)
    assert 1 <= len(got) <= levels
    assert got == sorted(set(got))
    assert all(type(level) is int and level % multiple == 0 for level in got)
    assert max(got) >= max(needed)
    rounded = sorted({-(-n // multiple) * multiple for n in needed})
    best = min(
        padded_sum(needed, chosen)
        for count in range(1, min(levels, len(rounded)) + 1)
        for chosen in combinations(rounded, count)
        if chosen[-1] == rounded[-1]
    )
    assert padded_sum(needed, tuple(got)) == best


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_levels_that_are_not_needed_are_not_made(levels):
    assert ladder(np.asarray([100, 3, 128, 128]), levels, 128) == [128]


def test_a_long_ladder():
    """Six levels for ten thousand updates: each covers its share, and one more would only help."""
    needed = np.random.default_rng(0).lognormal(6.5, 0.5, 10_000).astype(int) + 1
    sums = [padded_sum(needed.tolist(), tuple(ladder(needed, levels, 128))) for levels in range(1, 9)]
    assert sums == sorted(sums, reverse=True)
    assert len(set(sums)) == len(sums)
    assert sums[0] == len(needed) * (-(-int(needed.max()) // 128) * 128)
