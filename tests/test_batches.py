"""The blocks of an update: every token where it belongs, with the weight that the HF Trainer's loss gives it.

Token j of example i has the id `STRIDE * i + j + 1`, so that a row can be read back, and its loss is a random number
of the pair (i, j). The Trainer's loss is then a few loops over those numbers.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama_jax.data import batches as batches_module
from llama_jax.data.batches import Batch, Batches
from llama_jax.data.examples import Examples
from llama_jax.data.normalisation import training_loss
from llama_jax.data.order import Order

STRIDE = 1024  # more than the longest example


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
def drawn_runs(draw: Any) -> Drawn:
    """Small runs, with as many compiled shapes as a long run has."""
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
    batches = Batches(examples, order, training_loss(order), ways, max_tokens, row_limit)
    return Drawn(examples, order, batches, ways, row_limit, max_tokens)


@pytest.fixture
def many_shapes(monkeypatch):
    monkeypatch.setattr(batches_module, "UPDATES_PER_SHAPE", 1)


@settings(max_examples=400)
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


@settings(max_examples=400)
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


@settings(max_examples=400)
@given(run=drawn_runs())
def test_blocks_have_the_declared_shapes(many_shapes, run):
    """Few shapes, rows of each device alike, no more tokens on a device than it may hold, or than the longest row."""
    shapes = run.batches.shapes
    assert 1 <= len(shapes) <= 6
    assert len(set(shapes)) == len(shapes)
    longest = max(run.row_limit, int(run.examples.lengths.max()))
    allowed = max(run.max_tokens, -(-longest // 128) * 128)
    for rows, length in shapes:
        assert rows % run.ways == 0
        assert length % 128 == 0
        assert rows // run.ways * length <= allowed
    for k in range(run.order.updates):
        blocks = run.batches.update(k)
        assert len(blocks) == run.batches.blocks(k) >= 1
        for block in blocks:
            assert {array.shape for array in block} == {block.input_ids.shape}
            assert block.input_ids.shape in shapes
            assert [array.dtype for array in block] == [np.int32] * 5 + [np.float32]
        assert len({block.input_ids.shape for block in blocks}) == 1


@settings(max_examples=100)
@given(run=drawn_runs(), data=st.data())
def test_an_update_is_a_function_of_its_number(many_shapes, run, data):
    """In any order, from another object."""
    again = Batches(run.examples, run.order, training_loss(run.order), run.ways, run.max_tokens, run.row_limit)
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
    """Lengths as in Alpaca, rows of multiples of 128: 7 % of padding where an update is one row, 17 % where it is two
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
    assert padded / tokens < (1.4 if ways == 4 else 1.1 if max_tokens == 4096 else 1.2)


def test_an_update_that_fits_is_one_block():
    """Eight examples of 500 tokens: 4,000, within the 4,096 of one device, and in two rows of 2,048 or eight of 512."""
    examples = make_examples([500] * 16, 0.5, 0)
    order = Order(16, 1, 8, 1, "5")
    for row_limit in (512, 1024, 2048, 4096):
        batches = Batches(examples, order, training_loss(order), 1, 4096, row_limit)
        assert [batches.blocks(k) for k in range(2)] == [1, 1]
        assert batches.update(0)[0].input_ids.size == 4096


def test_an_update_that_does_not_fit_is_several_blocks_of_one_shape():
    examples = make_examples([500] * 16, 0.5, 0)
    batches = Batches(examples, order := Order(16, 1, 16, 1, "5"), training_loss(order), 1, 1024, 512)
    assert batches.shapes == [(2, 512)]
    assert batches.blocks(0) == 8


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
