"""Update k as blocks of tokens: a pure function of the data, the order and k."""

from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.examples import IGNORE_INDEX, Examples
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
    """One example in an update: its index, the weight of each of its trained tokens, its micro-batch's length."""

    example: int
    weight: float
    length: int


class Batches:
    """The blocks of every update of a run; `shapes` are all shapes that will be compiled.

    An update is one block where its tokens fit `max_tokens` on each of `ways` devices, and otherwise several of one
    shape, to be accumulated. Each device gets the same number of rows, at most `row_limit` long (or one example).
    """

    def __init__(self, examples: Examples, order: Order, ways: int = 1, max_tokens: int = 4096, row_limit: int = 2048):
        self.examples, self.order, self.ways = examples, order, ways
        labels = examples.labels != IGNORE_INDEX
        labels[examples.offsets[:-1]] = False
        self.trained = np.add.reduceat(labels, examples.offsets[:-1], dtype=np.int64)
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

    def padded_tokens(self, k: int) -> int:
        """Tokens of update k as the HF Trainer pads them, each micro-batch to its longest example."""
        lengths = self.examples.lengths
        return sum(len(rank) * int(lengths[rank].max()) for micro in self.order.update(k) for rank in micro)

    def update(self, k: int) -> list[Batch]:
        """The blocks of update k, to be summed."""
        count, (rows, length) = self._blocks[k]
        pieces = self._pieces(k)
        placed = pack(self._sizes(k), count * rows, length)
        assert placed is not None  # as planned
        return [
            self._fill([[pieces[i] for i in row] for row in placed[b * rows : (b + 1) * rows]], length)
            for b in range(count)
        ]

    def _pieces(self, k: int) -> list[Piece]:
        """The examples of update k with the normalisation that the HF Trainer's loss would give their tokens.

        4.37: a micro-batch's mean on each rank, averaged over ranks and over the accumulation steps. 5: one sum over
        the update, divided by its trained tokens. A micro-batch or update without trained tokens adds nothing.
        """
        micro_batches = self.order.update(k)
        total = sum(int(self.trained[rank].sum()) for micro in micro_batches for rank in micro)
        pieces = []
        for micro in micro_batches:
            for rank in micro:
                if self.order.compat == "4.37":
                    share = max(int(self.trained[rank].sum()), 1) * self.order.accumulation * self.order.ranks
                else:
                    share = max(total, 1)
                longest = int(self.examples.lengths[rank].max())
                pieces += [Piece(int(i), 1.0 / share, longest) for i in rank]
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
