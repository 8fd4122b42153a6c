"""The blocks of an update: every token where it belongs, with the weight that the HF Trainer's loss gives it.

Token j of example i has the id `STRIDE * i + j + 1`, so that a row can be read back, and its loss is a random number
of the pair (i, j). The Trainer's loss is then a few loops over those numbers.
"""

import itertools
import json
import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import CONFIG, make_records, write_json

from llama_jax.data import batches as batches_module
from llama_jax.data.batches import Batch, Batches
from llama_jax.data.examples import Examples, tokenize
from llama_jax.data.normalisation import training_loss
from llama_jax.data.order import Order
from llama_jax.data.records import ALPACA
from llama_jax.data.tokenizer import open_tokenizer
from llama_jax.model.config import LlamaConfig
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import make_job

STRIDE = 2048  # more than the longest example


def make_examples(lengths: list[int], masked: float, seed: int) -> Examples:
    """Labels are random, unlike the ids, and -100 for a share of the tokens."""
    rng = np.random.default_rng(seed)
    ids = [STRIDE * i + 1 + np.arange(n) for i, n in enumerate(lengths)]
    labels = [np.where(rng.random(n) < masked, -100, rng.integers(0, 1 << 20, n)) for n in lengths]
    offsets = np.cumsum([0, *lengths])
    return Examples(np.concatenate(ids).astype(np.int32), np.concatenate(labels).astype(np.int32), offsets)


class Placed(NamedTuple):
    """One segment of one row, read back."""

    example: int
    padded: int
    weights: np.ndarray
    targets: np.ndarray


def read_back(batch: Batch, examples: Examples) -> list[Placed]:
    """The segments of a block, which hold whole examples, one after the other, and padding behind them."""
    placed = []
    for row in range(len(batch.input_ids)):
        ids, positions, segments, lengths, targets, weights = (array[row] for array in batch)
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all(), "padding stands between examples"
        assert not segments[used:].any()
        assert not weights[used:].any()
        starts = np.flatnonzero(np.diff(segments[:used], prepend=0)).tolist()
        assert [int(segments[start]) for start in starts] == list(range(1, len(starts) + 1)), (
            "segments are not 1, 2, ..."
        )
        for start, end in zip(starts, [*starts[1:], used][: len(starts)], strict=True):
            part = slice(start, end)
            example = int(ids[start] - 1) // STRIDE
            np.testing.assert_array_equal(ids[part], examples[example][0])
            np.testing.assert_array_equal(positions[part], np.arange(end - start))
            assert len(set(lengths[part].tolist())) == 1
            placed.append(Placed(example, int(lengths[start]), weights[part], targets[part]))
    return placed


def check_targets(placed: Placed, examples: Examples) -> None:
    """Token j learns the label of token j + 1, where that has one; the last token learns nothing."""
    labels = examples[placed.example][1]
    for j in range(len(labels)):
        if j + 1 < len(labels) and labels[j + 1] != -100:
            assert placed.targets[j] == labels[j + 1]
            assert placed.weights[j] > 0
        else:
            assert placed.weights[j] == 0
            assert placed.targets[j] >= 0  # a cross-entropy looks it up all the same


def token_losses(examples: Examples, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(2, 3, n) for n in examples.lengths]


def trained_losses(losses: list[np.ndarray], examples: Examples, i: int) -> list[float]:
    """The losses of the tokens of example i that predict a label; the loss of token j is that of predicting j + 1."""
    labels = examples[i][1]
    return [float(losses[i][j]) for j in range(len(labels) - 1) if labels[j + 1] != -100]


def trainers_loss(order: Order, k: int, examples: Examples, losses: list[np.ndarray]) -> float:
    """Section 7. 4.37: each rank's micro-batch has the mean of its own tokens; the ranks' gradients are averaged; each
    of the accumulation steps counts 1 / accumulation, even where the window is short. 5: the sum of all tokens'
    losses over their number. Nothing to learn (NaN there) has no gradient."""
    if order.compat == "5":
        everything = [
            x
            for micro in order.update(k)
            for rank in micro
            for i in rank
            for x in trained_losses(losses, examples, int(i))
        ]
        return sum(everything) / len(everything) if everything else 0.0
    total = 0.0
    for micro in order.update(k):
        means = []
        for rank in micro:
            own = [x for i in rank for x in trained_losses(losses, examples, int(i))]
            means.append(sum(own) / len(own) if own else 0.0)
        total += sum(means) / order.ranks / order.accumulation
    return total


class Drawn(NamedTuple):
    examples: Examples
    order: Order
    batches: Batches
    ways: int
    row_limit: int
    max_tokens: int


@st.composite
def drawn_runs(draw: Any, packed: bool | None = None) -> Drawn:
    """Small runs, with as many compiled shapes as a long run has, packed or padded."""
    longest = draw(st.sampled_from([3, 40, 130, 400]))
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=24))
    examples = make_examples(lengths, draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])), draw(st.integers(0, 99)))
    ranks = draw(st.integers(1, 3))
    drop_last = draw(st.booleans())
    batch = draw(st.integers(1, 4))
    assume(not drop_last or len(lengths) >= batch * ranks)
    order = Order(
        len(lengths),
        batch,
        draw(st.integers(1, 9)),
        draw(st.sampled_from([0.5, 1.0, 2.5])),
        draw(st.sampled_from(["4.37", "5"])),
        draw(st.integers(0, 3)),
        max_steps=draw(st.sampled_from([-1, -1, 5])),
        ranks=ranks,
        drop_last=drop_last,
    )
    ways = draw(st.sampled_from([ranks, 1, 2, 4]))
    max_tokens = draw(st.sampled_from([1, 128, 500, 1024, 4096]))
    row_limit = draw(st.sampled_from([1, 128, 200, 512, 2048]))
    packed = draw(st.booleans()) if packed is None else packed
    batches = Batches(examples, order, training_loss(order), ways, max_tokens, row_limit, packed)
    return Drawn(examples, order, batches, ways, row_limit, max_tokens)


@pytest.fixture
def many_shapes(monkeypatch):
    monkeypatch.setattr(batches_module, "UPDATES_PER_SHAPE", 1)


@settings(max_examples=100)
@given(run=drawn_runs())
def test_every_example_of_an_update_is_in_its_blocks_once(many_shapes, run):
    """With the padded length that its micro-batch has in the Trainer, whole, and its labels one token early."""
    for k in range(run.order.updates):
        expected: Counter[tuple[int, int]] = Counter()
        padded = 0
        for micro in run.order.update(k):
            for rank in micro:
                longest = max(len(run.examples[int(i)][0]) for i in rank)
                expected.update((int(i), longest) for i in rank)
                padded += longest * len(rank)
        placed = [p for block in run.batches.update(k) for p in read_back(block, run.examples)]
        assert Counter((p.example, p.padded) for p in placed) == expected
        assert run.batches.padded_tokens(k) == padded
        for p in placed:
            check_targets(p, run.examples)


@settings(max_examples=100)
@given(run=drawn_runs(), seed=st.integers(0, 99))
def test_the_weighted_sum_is_the_trainers_loss(many_shapes, run, seed):
    """In float64: what is left is the rounding of each weight to float32, 6e-8 of it."""
    losses = token_losses(run.examples, seed)
    for k in range(run.order.updates):
        got, size = 0.0, 0.0
        for block in run.batches.update(k):
            for p in read_back(block, run.examples):
                terms = p.weights.astype(np.float64) * losses[p.example]
                got, size = got + terms.sum(), size + np.abs(terms).sum()
        assert abs(got - trainers_loss(run.order, k, run.examples, losses)) <= 1e-7 * size


def check_blocks(run: Drawn) -> None:
    """The blocks are as announced, few shapes are compiled, and each device gets as many rows as the others."""
    shapes = run.batches.shapes
    assert 1 <= len(shapes) <= 6
    assert len(set(shapes)) == len(shapes)
    for rows, length in shapes:
        assert rows % run.ways == 0
        assert length % 128 == 0
    seen = set()
    for k in range(run.order.updates):
        blocks = run.batches.update(k)
        assert run.batches.blocks(k) == len(blocks)
        assert run.batches.shapes_of(k) == [block.input_ids.shape for block in blocks]
        for block in blocks:
            assert {array.shape for array in block} == {block.input_ids.shape}
            assert [array.dtype for array in block] == [np.int32] * 5 + [np.float32]
        seen.update(run.batches.shapes_of(k))
    assert seen == set(shapes), "a shape is announced that no update has, or the other way round"


@settings(max_examples=100)
@given(run=drawn_runs(packed=True))
def test_packed_blocks(many_shapes, run):
    """No more tokens on a device than it may hold, or than the longest row. As few blocks as hold the tokens; one, at
    the latest, where they leave room for the longest example in every row of the largest block, or fill one row. Where
    the longest example is more than half a row, that is so of the sum over updates: another row may suit more."""
    check_blocks(run)
    up = lambda n: -(-n // 128) * 128  # noqa: E731
    longest = int(run.examples.lengths.max())
    limit = max(up(min(run.row_limit, run.max_tokens)), up(longest))
    most = max(run.max_tokens, limit)
    assert all(rows // run.ways * length <= most for rows, length in run.batches.shapes)
    assert all(length <= limit for _, length in run.batches.shapes)
    rows = most // limit * run.ways
    needed = []
    for k in range(run.order.updates):
        tokens = sum(len(p.weights) for block in run.batches.update(k) for p in read_back(block, run.examples))
        assert run.batches.blocks(k) >= tokens / (most * run.ways)
        # First-fit's bound: an example that finds no place leaves less than its length free in every row.
        at_most = max(1, -(-tokens // (rows * (limit - longest)))) if limit > longest else np.inf
        needed.append(1 if tokens <= limit else at_most)
    blocks = [run.batches.blocks(k) for k in range(run.order.updates)]
    assert sum(blocks) <= sum(needed)
    if 2 * longest <= min(run.row_limit, run.max_tokens):
        assert all(n <= most for n, most in zip(blocks, needed, strict=True))


@settings(max_examples=100)
@given(run=drawn_runs(packed=False))
def test_padded_blocks(many_shapes, run):
    """A block is a micro-batch: its examples in order, each in a row of its own. All shapes have the same rows, as many
    as a whole micro-batch fills, and a block's rows are the shortest that hold its longest example."""
    check_blocks(run)
    whole = run.order.per_device_batch * run.order.ranks
    assert {rows for rows, _ in run.batches.shapes} == {-(-whole // run.ways) * run.ways}
    for k in range(run.order.updates):
        micro_batches = run.order.update(k)
        assert run.batches.blocks(k) == len(micro_batches)
        for block, micro in zip(run.batches.update(k), micro_batches, strict=True):
            assert block.segment_ids.max() == 1
            wanted = [int(i) for rank in micro for i in rank]
            assert [p.example for p in read_back(block, run.examples)] == wanted
            assert block.segment_ids[: len(wanted), 0].all()
            longest = max(int(run.examples.lengths[i]) for i in wanted)
            row = block.input_ids.shape[1]
            assert row == min(length for _, length in run.batches.shapes if length >= longest)


def test_padded_row_lengths_are_the_best():
    """Longest examples of 100, 200, ..., 1,000 tokens; 3 row lengths. Against all choices of 1,024 and two more."""
    lengths = [100 * (i // 30 + 1) for i in range(300)]
    examples = make_examples(lengths, 0.3, 0)
    order = Order(300, 2, 1, 1, "5")
    batches = Batches(examples, order, training_loss(order), packed=False)
    assert order.updates == 150  # of which 50 pay for a shape
    longest = [max(lengths[i] for i in order.update(k)[0][0]) for k in range(150)]
    multiples = range(128, 1025, 128)
    computed = min(sum(min(t for t in (a, b, 1024) if t >= n) for n in longest) for a in multiples for b in multiples)
    assert len(batches.shapes) == 3
    assert sum(length for k in range(150) for _, length in batches.shapes_of(k)) == computed


@settings(max_examples=100)
@given(run=drawn_runs(packed=True), seed=st.integers(0, 9))
def test_packed_and_padded_are_the_same_update(many_shapes, run, seed):
    """Token by token the same weight, target and padded length; and each micro-batch has its part in the loss."""
    order = run.order
    padded = Batches(run.examples, order, training_loss(order), run.ways, packed=False)
    table = token_losses(run.examples, seed)
    for k in range(order.updates):
        both = []
        for batches in (run.batches, padded):
            tokens: Counter[tuple[int, ...]] = Counter()
            losses = []
            for block in batches.update(k):
                example, position = (block.input_ids - 1) // STRIDE, (block.input_ids - 1) % STRIDE
                values = np.zeros(block.input_ids.shape)
                for at in zip(*np.nonzero(block.segment_ids), strict=True):
                    i, j = int(example[at]), int(position[at])
                    assert block.positions[at] == j
                    fields = (block.targets[at], block.weights[at], block.lengths[at])
                    tokens[i, j, *(x.item() for x in fields)] += 1
                    values[at] = block.weights[at] * table[i][j]
                losses.append(values)
            both.append((tokens, batches.micro_losses(k, losses)))
        assert both[0][0] == both[1][0]
        # Sums of at most 400 float64 products in another order.
        np.testing.assert_allclose(both[0][1], both[1][1], rtol=1e-11, atol=1e-11)
        assert both[0][1].shape == (len(order.update(k)), order.ranks)
        total = trainers_loss(order, k, run.examples, table)
        size = sum(w * n for (*_, w, _), n in both[0][0].items()) * np.abs(np.concatenate(table)).max()
        assert abs(both[0][1].sum() - total) <= 1e-7 * size  # weights are float32


@settings(max_examples=100)
@given(run=drawn_runs(), data=st.data())
def test_an_update_is_a_function_of_its_number(many_shapes, run, data):
    """In any order, from another object."""
    limits = run.ways, run.max_tokens, run.row_limit, run.batches.packed
    again = Batches(run.examples, run.order, training_loss(run.order), *limits)
    assert again.shapes == run.batches.shapes
    expected = [run.batches.update(k) for k in range(run.order.updates)]
    for k in data.draw(st.permutations(range(run.order.updates))):
        got = again.update(k)
        assert len(got) == len(expected[k])
        for a, b in zip(got, expected[k], strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)


@settings(max_examples=60)
@given(run=drawn_runs())
def test_a_short_run_compiles_one_shape(run):
    """50 updates pay for a shape."""
    assume(run.order.updates < 100)
    assert len(run.batches.shapes) == 1
    losses = token_losses(run.examples, 0)
    for k in range(run.order.updates):
        placed = [p for block in run.batches.update(k) for p in read_back(block, run.examples)]
        got = sum(float(p.weights.astype(np.float64) @ losses[p.example]) for p in placed)
        assert got == pytest.approx(trainers_loss(run.order, k, run.examples, losses), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("compat", ["4.37", "5"])
@pytest.mark.parametrize("ways", [1, 4])
@pytest.mark.parametrize("max_tokens", [512, 4096])
def test_a_long_run_has_few_shapes_and_little_padding(compat, ways, max_tokens):
    """Lengths as in Alpaca, rows of multiples of 128: 7 % of padding where an update is one row, 9 % where it is two
    or three of at most 512 tokens, 38 % where each of four devices has two examples of 130 tokens."""
    rng = np.random.default_rng(5)
    lengths = np.minimum(np.maximum(rng.lognormal(4.7, 0.5, 3300).astype(int), 30), 512)
    examples = make_examples(lengths.tolist(), 0.4, 0)
    order = Order(len(lengths), 1, 8 // ways, 1, compat, ranks=ways)
    batches = Batches(examples, order, training_loss(order), ways, max_tokens)
    assert 1 < len(batches.shapes) <= 6
    tokens = padded = 0
    seen: Counter[int] = Counter()
    for k in range(order.updates):
        for block in batches.update(k):
            assert block.input_ids.shape in batches.shapes
            padded += block.input_ids.size
            tokens += int((block.segment_ids > 0).sum())
            seen.update(p.example for p in read_back(block, examples))
    expected = Counter(
        int(i) for k in range(order.updates) for micro in order.update(k) for rank in micro for i in rank
    )
    assert seen == expected
    assert tokens == sum(int(lengths[i]) * n for i, n in expected.items())
    assert max(rows * length for rows, length in batches.shapes) <= max_tokens * ways
    assert padded / tokens < (1.4 if ways == 4 else 1.1)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("per_row", [0.0, 1e-4, 1e-2])
def test_rows_that_cost_are_shorter(per_row, even):
    """Of all row limits the cheapest, by the blocks that each limit alone makes; and the same updates as ever. A third
    of each shortest row is empty where examples are nearly of one length: without a cost, long rows are cheaper."""
    rng = np.random.default_rng(2)
    drawn = rng.integers(250, 261, 256) if even else rng.lognormal(4.7, 0.5, 256).astype(int)
    lengths = np.clip(drawn, 30, 400).tolist()
    examples = make_examples(lengths, 0.4, 0)
    order = Order(256, 1, 8, 1, "5")

    def cost(blocks: int, tokens: int, row: int) -> float:
        return tokens * (1 + per_row * row) + 100 * blocks

    def price(batches: Batches) -> float:
        shapes = [shape for k in range(order.updates) for shape in batches.shapes_of(k)]
        return cost(len(shapes), sum(map(math.prod, shapes)), max(length for _, length in batches.shapes))

    chosen = Batches(examples, order, training_loss(order), max_tokens=2048, cost=cost)
    longest = max(length for _, length in chosen.shapes)
    if per_row == 1e-2:
        assert longest == (384 if even else 512)
    elif even and not per_row:
        assert longest > 1000
    # A cost that only one limit escapes makes the blocks of that limit.
    others = [
        Batches(examples, order, training_loss(order), 1, 2048, limit, cost=lambda b, t, row, n=limit: float(row != n))
        for limit in range(384 if even else 512, 2049, 128)
    ]
    # A run compiles one shape for its largest update, where limits are compared by a sample's own sizes.
    assert price(chosen) <= 1.1 * min(map(price, others))
    for k in range(order.updates):
        placed = [p for block in chosen.update(k) for p in read_back(block, examples)]
        assert sorted(p.example for p in placed) == sorted(int(i) for m in order.update(k) for rank in m for i in rank)


def test_an_update_that_fits_is_one_block():
    """Eight examples of 500 tokens: 4,000, within the 4,096 of one device, and in two rows of 2,048 or eight of 512."""
    examples = make_examples([500] * 16, 0.5, 0)
    order = Order(16, 1, 8, 1, "5")
    for row_limit in (512, 1024, 2048, 4096):
        batches = Batches(examples, order, training_loss(order), 1, 4096, row_limit)
        assert [batches.blocks(k) for k in range(2)] == [1, 1]
        assert batches.update(0)[0].input_ids.size == 4096


@pytest.mark.parametrize("ways", [1, 2])
def test_an_update_that_fits_to_the_last_token_is_one_block(ways):
    """32 examples of 4,096 tokens a device in all, in rows of 2,048; one token more is a block more."""
    rng = np.random.default_rng(1)
    for more in (0, 1):
        lengths = np.clip(rng.lognormal(4.7, 0.5, 32).astype(int), 30, 512)
        lengths = lengths * 4096 * ways // lengths.sum()
        lengths[np.argsort(lengths)[: 4096 * ways - lengths.sum() + more]] += 1
        assert lengths.sum() == 4096 * ways + more
        examples = make_examples(lengths.tolist(), 0.3, 0)
        batches = Batches(examples, order := Order(32, 1, 32, 1, "5"), training_loss(order), ways, 4096)
        assert batches.blocks(0) == 1 + more


def test_an_update_that_does_not_fit_is_several_blocks():
    examples = make_examples([500] * 16, 0.5, 0)
    batches = Batches(examples, order := Order(16, 1, 16, 1, "5"), training_loss(order), 1, 1024, 512)
    assert batches.shapes == [(2, 512)]
    assert batches.shapes_of(0) == [(2, 512)] * 8


def test_what_is_left_over_is_a_smaller_block(many_shapes):
    """Three updates of 25 examples of 100 tokens: 20 in a block as large as may be, and 5 in a small one."""
    examples = make_examples([100] * 75, 0.5, 0)
    batches = Batches(examples, order := Order(75, 1, 25, 1, "5"), training_loss(order), 1, 2048)
    assert batches.shapes == [(1, 512), (1, 2048)]
    assert [sorted(batches.shapes_of(k)) for k in range(3)] == [[(1, 512), (1, 2048)]] * 3


def test_room_that_cannot_be_used_is_not_counted():
    """Three examples of 700 are fewer tokens than two rows of 1,152 hold, but need three rows. Two shapes for 99 such
    updates and a larger one, with rows for the longest example: theirs, and the larger one's."""
    lengths = [700, 700, 700, 1] * 99 + [1000] * 4
    examples = make_examples(lengths, 0.5, 0)
    order = Order(400, 4, 1, 1, "5", sampling="sequential")
    batches = Batches(examples, order, training_loss(order), 1, 4096, 1152)
    assert batches.shapes == [(3, 1024), (4, 1024)]
    assert [batches.shapes_of(k) for k in range(100)] == [[(3, 1024)]] * 99 + [[(4, 1024)]]


def test_an_update_asks_for_more_room_until_it_has_a_place():
    """One shape for two updates. The first needs 2,048, a row; the second 2 x 1,152, where no two of 650 find a place,
    nor in 2 x 1,280, though that is what the first asks for next."""
    examples = make_examples([651, 667, 659, 35, 494, 693, 400, 651], 0.5, 0)
    order = Order(8, 4, 1, 1, "5", sampling="sequential")
    batches = Batches(examples, order, training_loss(order))
    assert batches.shapes == [(2, 1408)]
    assert [block.input_ids.shape for k in range(2) for block in batches.update(k)] == [(2, 1408)] * 2


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 250), min_size=30, max_size=60),
    an_update=st.integers(1, 8),
    levels=st.integers(1, 3),
)
def test_the_shapes_of_one_row_are_the_best(many_shapes, lengths, an_update, levels):
    """What all updates take, against all choices of lengths of a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "MAX_SHAPES", levels)
        order = Order(len(lengths), 1, an_update, 1, "5")
        batches = Batches(make_examples(lengths, 0.5, 0), order, training_loss(order), 1, 4096)
    assume(order.updates >= levels)
    needed = [sum(lengths[int(i)] for micro in order.update(k) for i in micro[0]) for k in range(order.updates)]
    rows = range(128, -(-max(needed) // 128) * 128 + 1, 128)
    least = min(
        sum(min(row for row in chosen if row >= n) for n in needed)
        for count in range(1, levels + 1)
        for chosen in itertools.combinations(rows, count)
        if chosen[-1] >= max(needed)
    )
    assert {rows for rows, _ in batches.shapes} == {1}
    assert sum(length for k in range(order.updates) for _, length in batches.shapes_of(k)) == least


def test_what_one_row_holds_is_planned_without_a_step_an_update(monkeypatch):
    """A run of a million updates is planned in seconds: what is done by update is done by NumPy."""
    lengths = np.random.default_rng(0).integers(1, 250, 4000)
    examples, order = make_examples(lengths.tolist(), 0.5, 0), Order(4000, 1, 8, 1, "5")
    expected = [Batches(examples, order, training_loss(order)).shapes_of(k) for k in range(500)]

    def refuse(*given: Any) -> None:
        raise AssertionError("an update is looked at by itself")

    for name in ("update", "examples_of", "micro_batch"):
        monkeypatch.setattr(Order, name, refuse)
    batches = Batches(examples, order, training_loss(order))
    assert len(batches.shapes) == 6 and [batches.shapes_of(k) for k in range(500)] == expected
    padded = Batches(examples, order, training_loss(order), packed=False)
    assert len(padded.shapes) > 1


@settings(max_examples=100)
@given(run=drawn_runs())
def test_progress_is_told(many_shapes, run):
    """Each update is looked at twice, and all of them once more where one found no place."""
    done: list[int] = []
    limits = run.ways, run.max_tokens, run.row_limit, run.batches.packed
    Batches(run.examples, run.order, training_loss(run.order), *limits, done.append)
    looks, rest = divmod(sum(done), run.order.updates)
    assert looks >= 2 and rest == 0 and min(done) >= 0
    if not run.batches.packed or (run.ways == 1 and run.examples.lengths.sum() <= run.row_limit):
        assert looks == 2


def test_rows_suit_long_examples():
    """Examples of 1,100: one in a row of 2,048 would leave half of it; three rows of 1,152 fit a device."""
    examples = make_examples([1100] * 64, 0.5, 0)
    batches = Batches(examples, order := Order(64, 1, 32, 1, "5"), training_loss(order))
    assert batches.shapes == [(3, 1152)]
    assert [batches.blocks(k) for k in range(2)] == [11, 11]


@pytest.mark.slow
def test_fill_on_alpaca(shared):
    """Alpaca's 52,002 examples. The targets of the design: 90 % with the seed's flags, 97 % from 32 examples an update.

    With several devices the kernels' multiple of 128 tokens a row is the limit: 8 x 128 are a quarter of 32 examples.
    The numbers there are what is reached, less 0.2 %; benchmarks/fill.py shows the bounds beside them.
    """
    data = shared / "data"
    records = json.loads((data / "alpaca" / "alpaca_data.json").read_text(encoding="utf-8"))
    examples = tokenize(ALPACA, records, open_tokenizer(data / "llama-tokenizer"), 512)
    reached = {
        (8, 1): 0.90,
        (32, 1): 0.97,
        (64, 1): 0.97,
        (128, 1): 0.97,
        (32, 8): 0.888,
        (64, 8): 0.94,
        (128, 8): 0.947,
        (512, 8): 0.97,
    }
    for (an_update, ways), least in reached.items():
        order = Order(len(examples), 1, an_update // ways, 3, "4.37", ranks=ways)
        batches = Batches(examples, order, training_loss(order), ways)
        tokens = sum(examples.lengths[r].sum() for k in range(order.updates) for m in order.update(k) for r in m)
        computed = sum(rows * length for k in range(order.updates) for rows, length in batches.shapes_of(k))
        assert len(batches.shapes) <= 6
        assert tokens / computed >= least, (an_update, ways, batches.shapes)


def test_a_device_gets_rows_of_its_own():
    examples = make_examples([500] * 16, 0.5, 0)
    batches = Batches(examples, order := Order(16, 1, 2, 1, "5", ranks=4), training_loss(order), 4, 4096, 2048)
    assert [batches.blocks(k) for k in range(2)] == [1, 1]
    assert batches.update(0)[0].input_ids.shape == (4, 1024)


# --- the Trainer itself ---


torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class TableOfLosses(torch.nn.Module):
    """A model whose loss of a token is looked up, and normalised as transformers' own models do it.

    The Trainer learns from `loss_type` that labels are shifted, as in LlamaForCausalLM.
    """

    loss_type = "ForCausalLM"

    def __init__(self, losses: list[np.ndarray]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.losses = losses

    def forward(self, input_ids: Any, labels: Any, num_items_in_batch: Any = None, **kwargs: Any) -> dict[str, Any]:
        total, count = 0.0, 0
        for ids, row in zip(input_ids.tolist(), labels.tolist(), strict=True):
            own = self.losses[(ids[0] - 1) // STRIDE]
            learned = [own[j] for j in range(len(row) - 1) if row[j + 1] != -100]
            total, count = total + sum(learned), count + len(learned)
        return {"loss": self.weight.sum() * total / (count if num_items_in_batch is None else num_items_in_batch)}


@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(1, 8, 1), (2, 3, 2), (3, 1, 1.5), (2, 50, 2)])
def test_the_trainer_itself_reports_the_same_losses(tmp_path, batch, accumulation, epochs):
    """Version 5, learning rate 0: the logged loss of every update."""
    rng = np.random.default_rng(batch)
    examples = make_examples(rng.integers(2, 40, 29).tolist(), 0.5, batch)
    losses = token_losses(examples, 1)

    def collate(rows: list[int]) -> dict[str, Any]:
        longest = max(len(examples[i][0]) for i in rows)
        pad = lambda part, value: torch.tensor(  # noqa: E731
            [[*examples[i][part].tolist(), *[value] * (longest - len(examples[i][0]))] for i in rows]
        )
        return {"input_ids": pad(0, 0), "labels": pad(1, -100)}

    trainer = transformers.Trainer(
        TableOfLosses(losses),
        transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            learning_rate=0.0,
            logging_steps=1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=list(range(29)),
        data_collator=collate,
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    order = Order(29, batch, accumulation, epochs, "5")
    batches = Batches(examples, order, training_loss(order))
    got = []
    for k in range(order.updates):
        placed = [p for block in batches.update(k) for p in read_back(block, examples)]
        got.append(sum(float(p.weights.astype(np.float64) @ losses[p.example]) for p in placed))
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("ranks", "batch", "accumulation"), [(1, 2, 3), (2, 1, 3), (3, 2, 2), (4, 1, 1)])
@pytest.mark.parametrize("average", [True, False])
def test_the_gradient_of_several_ranks_is_ddps(tmp_path, average, ranks, batch, accumulation):
    """Version 5's `training_step` on each rank by torch, gradients averaged over ranks as DDP does.

    The loss of a token is half the square of an entry of a table, found by the label.
    """
    records = make_records(17, seed=ranks)
    flags = {
        **{"model_name_or_path": tmp_path, "data_path": write_json(tmp_path / "data.json", records)},
        **{"output_dir": tmp_path, "hf_compat": "5", "average_tokens_across_devices": average},
        **{"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
    }
    arguments = parse_arguments([str(x) for name, value in flags.items() for x in (f"--{name}", value)])
    job = make_job(arguments, LlamaConfig.from_hf(CONFIG), lambda: tmp_path, ranks, True)
    batches = job.batches(128, 128, ranks)
    table = np.random.default_rng(0).normal(0, 1, CONFIG["vocab_size"])
    for k in range(job.order.updates):
        micros = job.order.update(k)
        learned = [[[y for i in rank for y in records[i]["labels"][1:] if y != -100] for rank in m] for m in micros]
        counts = [sum(len(m[rank]) for m in learned) for rank in range(ranks)]
        losses, gradients = [], []
        for rank in range(ranks):
            weight = torch.tensor(table, requires_grad=True)
            items, scale = (sum(counts), ranks) if average else (counts[rank], 1)
            loss = sum((weight[m[rank]] ** 2 / 2).sum() / items * scale for m in learned)
            loss.backward()
            losses.append(loss.item())
            gradients.append(weight.grad.numpy())
        targets, weights = (np.concatenate([b[j].ravel() for b in batches.update(k)]) for j in (4, 5))
        weights = weights.astype(np.float64)
        # Weights are float32, one rounding each; the rest is float64.
        assert weights @ (table[targets] ** 2 / 2) == pytest.approx(np.mean(losses), rel=1e-6)
        gradient = np.bincount(targets, weights * table[targets], len(table))
        np.testing.assert_allclose(gradient, np.mean(gradients, axis=0), rtol=1e-6, atol=1e-12)
