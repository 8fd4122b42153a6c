"""Update k as blocks of tokens: a pure function of the data, the order and k."""

from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.examples import IGNORE_INDEX, Examples
from llama_jax.data.normalisation import Normalise
from llama_jax.data.order import Order
from llama_jax.data.packing import Shape, ladder, pack

MAX_SHAPES = 6  # compiled steps in a run
UPDATES_PER_SHAPE = 50  # a short run compiles fewer: a compile costs more than the padding that it saves
ROW_MULTIPLE = 128  # what attention kernels ask of a row's length


class Batch(NamedTuple):
    """Packed rows, all arrays [B, T], on the host or on the devices.

    A token of weight w adds w * cross-entropy(token, target) to the update's loss.

    `segment_ids` are 1, 2, ... along a row and 0 for padding; `positions` restart with each segment; `lengths` is the
    padded length that the token's micro-batch would have in the HF Trainer, which `dynamic` and `longrope` scale by.
    """

    input_ids: Any
    positions: Any
    segment_ids: Any
    lengths: Any
    targets: Any
    weights: Any


class Piece(NamedTuple):
    """One example in an update: its index, the weight of each of its trained tokens, its micro-batch's length, and
    where it comes from: the micro-batch's number in the update and the rank."""

    example: int
    weight: float
    length: int
    micro_batch: int
    rank: int


class Batches:
    """The blocks of every update of a run; `shapes` are all shapes that will be compiled.

    An update is one block where its tokens fit `max_tokens` on each of `ways` devices, and otherwise several of one
    shape, to be accumulated. Each device gets the same number of rows, at most `row_limit` long (or one example).
    """

    def __init__(
        self,
        examples: Examples,
        order: Order,
        normalise: Normalise,
        ways: int = 1,
        max_tokens: int = 4096,
        row_limit: int = 2048,
    ):
        self.examples, self.order, self.normalise, self.ways = examples, order, normalise, ways
        self.trained = examples.trained
        self.shapes: list[Shape] = []
        self._plan(max_tokens, row_limit)

    def _plan(self, max_tokens: int, row_limit: int) -> None:
        lengths = self.examples.lengths
        row_limit = max(min(row_limit, max_tokens), int(lengths.max()))
        row_limit = -(-row_limit // ROW_MULTIPLE) * ROW_MULTIPLE
        rows_at_once = max(1, max_tokens // row_limit)
        rows, needed = [], []
        for k in range(self.order.updates):
            sizes = self._sizes(k)
            count = max(1, -(-sum(sizes) // (row_limit * self.ways)))
            while (placed := pack(sizes, count * self.ways, row_limit)) is None:
                count += 1
            longest = max(sum(sizes[i] for i in row) for row in placed)
            if count > rows_at_once:
                count = -(-count // rows_at_once) * rows_at_once
            rows.append(count)
            needed.append(longest)
        most = max(1, min(MAX_SHAPES, self.order.updates // UPDATES_PER_SHAPE))
        # One level of length for each number of rows, then further ones to the most frequent number.
        by_rows: dict[int, list[int]] = {}
        for r, n in zip(rows, needed, strict=True):
            by_rows.setdefault(min(r, rows_at_once), []).append(n)
        while len(by_rows) > max(most, 1):
            smallest = min(by_rows)
            moved = by_rows.pop(smallest)
            by_rows[min(by_rows)].extend(moved)
        common = max(by_rows, key=lambda r: len(by_rows[r]))
        for r, lengths_needed in sorted(by_rows.items()):
            levels = most - len(by_rows) + 1 if r == common else 1
            self.shapes += [(r * self.ways, n) for n in ladder(np.asarray(lengths_needed), levels, ROW_MULTIPLE)]
        self._blocks = [
            self._blocks_of(self._sizes(k), r, n, rows_at_once)
            for k, (r, n) in enumerate(zip(rows, needed, strict=True))
        ]

    def _sizes(self, k: int) -> list[int]:
        """Lengths of the examples of update k, in order."""
        lengths = self.examples.lengths
        return [int(lengths[i]) for micro in self.order.update(k) for rank in micro for i in rank]

    def _blocks_of(self, sizes: list[int], rows: int, needed: int, rows_at_once: int) -> tuple[int, Shape]:
        """How many blocks of which shape an update takes that needs `rows` rows a device of length `needed`."""
        fitting = [s for s in self.shapes if s[0] >= min(rows, rows_at_once) * self.ways and s[1] >= needed]
        for shape in sorted(fitting, key=lambda s: s[0] * s[1]):
            count = -(-rows * self.ways // shape[0])
            if pack(sizes, count * shape[0], shape[1]) is not None:
                return count, shape
        raise AssertionError(f"no shape of {self.shapes} holds examples of lengths {sizes}")

    def blocks(self, k: int) -> int:
        """How many blocks update k has."""
        return self._blocks[k][0]

    def shape(self, k: int) -> Shape:
        """Rows and row length of each block of update k."""
        return self._blocks[k][1]

    def padded_tokens(self, k: int) -> int:
        """Tokens of update k as the HF Trainer pads them, each micro-batch to its longest example."""
        lengths = self.examples.lengths
        return sum(len(rank) * int(lengths[rank].max()) for micro in self.order.update(k) for rank in micro)

    def update(self, k: int) -> list[Batch]:
        """The blocks of update k, to be summed."""
        return [self._fill(rows, length) for rows, length in self._placed(k)]

    def _placed(self, k: int) -> list[tuple[list[list[Piece]], int]]:
        """Each block of update k as the pieces of its rows, and the rows' length."""
        count, (rows, length) = self._blocks[k]
        pieces = self._pieces(k)
        placed = pack(self._sizes(k), count * rows, length)
        assert placed is not None  # as planned
        pieces_of_rows = [[pieces[i] for i in row] for row in placed]
        return [(pieces_of_rows[b * rows : (b + 1) * rows], length) for b in range(count)]

    def trained_tokens(self, k: int) -> list[list[int]]:
        """Trained tokens of each micro-batch of update k, by rank."""
        return [[int(self.trained[rank].sum()) for rank in micro] for micro in self.order.update(k)]

    def is_nan(self, k: int) -> np.ndarray:
        """Where the HF Trainer's loss of update k is NaN, a mean over no tokens: bool [micro-batches, ranks]."""
        return np.isnan(self.normalise(k, self.trained_tokens(k)))

    def micro_losses(self, k: int, losses: list[np.ndarray]) -> np.ndarray:
        """The part of each micro-batch and rank in the loss of update k, float64 [micro-batches, ranks], from its
        blocks' weighted losses of each token, [B, T] each."""
        parts = np.zeros((len(self.order.update(k)), self.order.ranks))
        for (rows, _), block in zip(self._placed(k), losses, strict=True):
            for row, values in zip(rows, block, strict=True):
                start = 0
                for piece in row:
                    end = start + int(self.examples.lengths[piece.example])
                    parts[piece.micro_batch, piece.rank] += values[start:end].sum(dtype=np.float64)
                    start = end
        return parts

    def _pieces(self, k: int) -> list[Piece]:
        """The examples of update k with their tokens' weights."""
        weights = np.nan_to_num(self.normalise(k, self.trained_tokens(k)))  # NaN weighs no token
        pieces = []
        for m, micro in enumerate(self.order.update(k)):
            for r, rank in enumerate(micro):
                longest = int(self.examples.lengths[rank].max())
                pieces += [Piece(int(i), float(weights[m, r]), longest, m, r) for i in rank]
        return pieces

    def _fill(self, rows: list[list[Piece]], length: int) -> Batch:
        kinds = dict.fromkeys(Batch._fields, np.int32) | {"weights": np.float32}
        batch = Batch(**{name: np.zeros((len(rows), length), kind) for name, kind in kinds.items()})
        for r, row in enumerate(rows):
            start = 0
            for segment, piece in enumerate(row, start=1):
                ids, labels = self.examples[piece.example]
                part = slice(start, start + len(ids))
                batch.input_ids[r, part] = ids
                batch.positions[r, part] = np.arange(len(ids))
                batch.segment_ids[r, part] = segment
                batch.lengths[r, part] = piece.length
                learned = labels[1:] != IGNORE_INDEX
                batch.targets[r, start : start + len(ids) - 1] = np.where(learned, labels[1:], 0)
                batch.weights[r, start : start + len(ids) - 1] = learned * np.float32(piece.weight)
                start += len(ids)
        return batch
