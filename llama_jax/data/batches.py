"""Make the blocks of tokens of update k: a pure function of the data, the order and k."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.examples import IGNORE_INDEX, Examples
from llama_jax.data.normalisation import Normalise
from llama_jax.data.order import Order
from llama_jax.data.packing import Shape, allowed_shapes, best_sizes, ladder, pack, totals

MAX_SHAPES = 6  # compiled steps in a run
UPDATES_PER_SHAPE = 50  # a short run compiles fewer: a compile costs more than the padding that it saves
SAMPLE = 50  # updates to pack when choosing a row limit
ROW_MULTIPLE = 128  # attention kernels need rows of a multiple of this length


class Batch(NamedTuple):
    """Hold packed rows, all arrays [B, T], on the host or on the devices.

    A token of weight w adds w * cross-entropy(token, target) to the update's loss. `segment_ids` are 1, 2, ... along a
    row and 0 for padding; `positions` restart with each segment. `lengths` is the padded length that the token's
    micro-batch would have in the HF Trainer; RoPE types `dynamic` and `longrope` scale by this length.
    """

    input_ids: Any
    positions: Any
    segment_ids: Any
    lengths: Any
    targets: Any
    weights: Any


class Piece(NamedTuple):
    """Describe one example of an update.

    `example` is the index, `weight` that of each trained token, `length` the padded length of the micro-batch.
    `micro_batch` (its number within the update) and `rank` name the example's place in the HF Trainer.
    """

    example: int
    weight: float
    length: int
    micro_batch: int
    rank: int


class Batches:
    """Plan and make the blocks of every update of a run; `shapes` are all shapes to compile.

    An update is one block where its tokens fit `max_tokens` on each of `ways` devices. Otherwise the update has the
    fewest blocks that hold it, and gradients are accumulated. Each device gets the same number of rows, at most
    `row_limit` long (or as long as the longest example).

    With `packed` false a block is a micro-batch of the HF Trainer: one example a row. Rows are as long as the longest
    example, rounded up to one of few lengths.

    Choosing the shapes visits each update twice, or again if one does not fit, which is rare. `progress` is called with
    the number of further visits. `cost(blocks, tokens, row)` orders the row limits: of a sample of updates, its blocks,
    the tokens of a device in them, and the longest row. None orders by blocks, then tokens.
    """

    def __init__(
        self,
        examples: Examples,
        order: Order,
        normalise: Normalise,
        ways: int = 1,
        max_tokens: int = 4096,
        row_limit: int = 2048,
        packed: bool = True,
        progress: Callable[[int], None] = lambda done: None,
        cost: Callable[[int, int, int], float] | None = None,
    ):
        self.examples, self.order, self.normalise, self.ways, self.packed = examples, order, normalise, ways, packed
        self._cost = cost
        self.trained = examples.trained
        levels = max(1, min(MAX_SHAPES, order.updates // UPDATES_PER_SHAPE))
        # Block b of the run has the shape of number _shape_of[b]; update k begins with block _first[k].
        self.shapes: list[Shape]
        self._shape_of: np.ndarray
        self._first: np.ndarray
        if packed:
            self._plan(levels, max_tokens, row_limit, progress)
        else:
            self._plan_padded(levels)
            progress(2 * order.updates)

    def _plan(self, levels: int, max_tokens: int, row_limit: int, progress: Callable[[int], None]) -> None:
        order, allowed = self.order, self._allowed(max_tokens, row_limit)
        # A sum of lengths tells whether examples fit one row; for several rows, only packing tells.
        one_row = {size: rows * self.ways == 1 for size, (rows, _) in allowed.items()}
        counts, needed = np.ones((2, order.updates), np.int64)
        tokens = order.reduce(np.add, self.examples.lengths, order.bounds)
        smallest = np.searchsorted([*allowed], tokens / self.ways)
        simple = np.asarray([*one_row.values(), False])[smallest]
        needed[simple] = np.asarray([*allowed])[smallest[simple]]
        progress(int(simple.sum()))
        for k in map(int, np.flatnonzero(~simple)):
            counts[k], needed[k] = self._least(self._sizes(k), allowed)
            progress(1)
        holds = counts == 1  # the shape of the needed size holds the update
        while True:
            sizes = best_sizes(counts, needed, list(allowed), levels)
            choices = {int(n): totals(sizes, n) for n in np.unique(counts)}
            first = np.concatenate([[0], np.cumsum(counts)])
            shape_of, lost = np.zeros(first[-1], np.int8), False
            smallest = np.minimum(np.searchsorted(sizes, needed), len(sizes) - 1)
            simple = np.asarray([one_row[size] for size in sizes])[smallest]
            simple = (counts == 1) & (simple | holds & (np.asarray(sizes)[smallest] == needed))
            shape_of[first[:-1][simple]] = smallest[simple]
            progress(int(simple.sum()))
            for k in map(int, np.flatnonzero(~simple)):
                lengths, options = self._sizes(k), choices[int(counts[k])]
                for total, blocks in options.items():
                    rows = self._capacities([allowed[b] for b in blocks])
                    if total >= needed[k] and pack(lengths, rows) is not None:
                        shape_of[first[k] : first[k + 1]] = [sizes.index(b) for b in blocks]
                        break
                else:  # the room suffices, but not in rows of these lengths: need more
                    lost, holds[k] = True, False
                    needed[k] = max(options) + ROW_MULTIPLE
                    if counts[k] == 1:
                        needed[k] = min((s for s in allowed if s >= needed[k]), default=needed[k])
                    counts[k] += needed[k] > counts[k] * max(allowed)
                progress(1)
            if not lost:
                break
        used, shape_of = np.unique(shape_of, return_inverse=True)
        self.shapes = [(allowed[sizes[i]][0] * self.ways, allowed[sizes[i]][1]) for i in used]
        self._shape_of, self._first = shape_of.astype(np.int8), first

    def _allowed(self, max_tokens: int, row_limit: int) -> dict[int, Shape]:
        """Return the block shapes to choose from, one device's share by its tokens.

        A shorter row limit may pack better where two of the longest example do not fit a row. Rows of 1,152 hold
        examples of 1,100 better than rows of 2,048. Where rows have a cost, any shorter limit may be better. The best
        limit for a sample of updates is taken.
        """
        longest = int(self.examples.lengths.max())
        row_limit = min(row_limit, max_tokens)
        least = longest if self._cost or 2 * longest > row_limit else row_limit
        limits = range(max(row_limit, longest), least - 1, -ROW_MULTIPLE)
        choices = [allowed_shapes(max_tokens, limit, longest=longest, multiple=ROW_MULTIPLE) for limit in limits]
        if len(choices) == 1:
            return choices[0]
        sample = [self._sizes(k) for k in range(0, self.order.updates, -(-self.order.updates // SAMPLE))]

        def key(allowed: dict[int, Shape]) -> Any:
            blocks, tokens = map(int, np.sum([self._least(x, allowed) for x in sample], axis=0))
            return (
                self._cost(blocks, tokens, max(row for _, row in allowed.values())) if self._cost else (blocks, tokens)
            )

        return min(choices, key=key)

    def _least(self, lengths: list[int], allowed: dict[int, Shape]) -> tuple[int, int]:
        """Return the number of blocks that examples of these lengths need, and a device's tokens in all blocks.

        One block has an allowed size. Of several, all but the last have the largest size; the last has the rest.
        """
        share = -(-sum(lengths) // (self.ways * ROW_MULTIPLE)) * ROW_MULTIPLE
        most = max(allowed)
        if share <= most:
            for size, shape in allowed.items():
                if size >= share and pack(lengths, self._capacities([shape])) is not None:
                    return 1, size
        count = max(2, -(-share // most))
        while (placed := pack(lengths, self._capacities([allowed[most]] * count))) is None:
            count += 1
        rest = sum(lengths[i] for row in placed[-allowed[most][0] * self.ways :] for i in row)
        return count, (count - 1) * most + -(-rest // (self.ways * ROW_MULTIPLE)) * ROW_MULTIPLE

    def _capacities(self, shapes: list[Shape]) -> list[int]:
        """Return the lengths of all rows, over all devices, of blocks of these shapes."""
        return [length for rows, length in shapes for _ in range(rows * self.ways)]

    def _plan_padded(self, levels: int) -> None:
        order = self.order
        longest = order.reduce(np.maximum, self.examples.lengths, np.arange(order.bounds[-1] + 1))
        row_lengths = ladder(longest, levels, ROW_MULTIPLE)
        rows = -(-order.per_device_batch * order.ranks // self.ways) * self.ways
        self.shapes = [(rows, length) for length in row_lengths]
        self._shape_of, self._first = np.searchsorted(row_lengths, longest).astype(np.int8), order.bounds

    def _sizes(self, k: int) -> list[int]:
        """Return the lengths of the examples of update k, in order."""
        return self.examples.lengths[self.order.examples_of(k)].tolist()

    @property
    def block_counts(self) -> np.ndarray:
        """Count the blocks of each update, int64 [updates]."""
        return np.diff(self._first)

    def blocks(self, k: int) -> int:
        """Count the blocks of update k."""
        return int(self._first[k + 1] - self._first[k])

    def shapes_of(self, k: int) -> list[Shape]:
        """Return rows and row length of each block of update k."""
        return [self.shapes[i] for i in self._shape_of[self._first[k] : self._first[k + 1]]]

    def tokens(self, k: int, until: int | None = None) -> int:
        """Count the tokens of update k, or of its first `until` micro-batches."""
        return sum(int(self.examples.lengths[rank].sum()) for micro in self.order.update(k)[:until] for rank in micro)

    def padded_tokens(self, k: int, until: int | None = None) -> int:
        """Count the tokens of update k, or of its first `until` micro-batches, with the HF Trainer's padding."""
        lengths = self.examples.lengths
        return sum(len(rank) * int(lengths[rank].max()) for micro in self.order.update(k)[:until] for rank in micro)

    def update(self, k: int, share: Callable[[int], range] = range) -> list[Batch]:
        """Make the blocks of update k, whose losses add up; `share` selects rows to make from a number of rows."""
        return [
            self._fill([rows[r] for r in share(len(rows))], length)  # placement is the same for all shares
            for rows, length in self._placed(k)
        ]

    def _placed(self, k: int) -> list[tuple[list[list[Piece]], int]]:
        """Place the examples of update k: for each block, the pieces of its rows and the rows' length."""
        pieces, shapes = self._pieces(k), self.shapes_of(k)
        if self.packed:
            placed = pack(self._sizes(k), [length for rows, length in shapes for _ in range(rows)])
            assert placed is not None  # as planned
            pieces_of_rows = iter([pieces[i] for i in row] for row in placed)
            return [([next(pieces_of_rows) for _ in range(rows)], length) for rows, length in shapes]
        blocks: list[list[list[Piece]]] = [[] for _ in shapes]
        for piece in pieces:
            blocks[piece.micro_batch].append([piece])
        return [
            (block + [[] for _ in range(rows - len(block))], length)
            for block, (rows, length) in zip(blocks, shapes, strict=True)
        ]

    def trained_tokens(self, k: int) -> list[list[int]]:
        """Count the trained tokens of each micro-batch of update k, by rank."""
        return [[int(self.trained[rank].sum()) for rank in micro] for micro in self.order.update(k)]

    def is_nan(self, k: int) -> np.ndarray:
        """Mark where the HF Trainer's loss of update k is NaN, a mean over no tokens: bool [micro-batches, ranks]."""
        return np.isnan(self.normalise(k, self.trained_tokens(k)))

    def micro_losses(self, k: int, losses: list[np.ndarray]) -> np.ndarray:
        """Return the part of each micro-batch and rank in the loss of update k, float64 [micro-batches, ranks].
        `losses` are the weighted losses of each token, [B, T] a block."""
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
        """List the examples of update k with their tokens' weights."""
        weights = np.nan_to_num(self.normalise(k, self.trained_tokens(k)))  # NaN is the weight of no token
        pieces = []
        for m, micro in enumerate(self.order.update(k)):
            for r, rank in enumerate(micro):
                longest = int(self.examples.lengths[rank].max())
                weight = float(weights[m, r])
                pieces += [Piece(example=int(i), weight=weight, length=longest, micro_batch=m, rank=r) for i in rank]
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
