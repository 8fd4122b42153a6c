"""Compute which examples make update k: the HF Trainer's order, without torch.

Sources: `transformers.Trainer` 4.37 and 5, accelerate's samplers, and torch's `randperm` (a 32-bit Mersenne twister
with the classic seeding; one draw and one swap an element).
"""

import math
from array import array
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError

DRAWS = 1 << 16  # draws of a permutation to hold as Python integers at a time


def randperm(n: int, seed: int) -> np.ndarray:
    """Compute `torch.randperm(n)` of a CPU generator seeded with `seed`, as int64 [n]."""
    return _permutation(n, twister_of(seed))


def group_by_length(permuted: np.ndarray, lengths: np.ndarray, batch: int) -> np.ndarray:
    """Regroup a permutation of examples, int64 [N], as the Trainer's `LengthGroupedSampler` does.

    Mega-batches of min(N // (4 batch), 50) batches, at least one, are sorted by length, the longest first. Then the
    longest example of all swaps places with the first. `lengths` [N], in tokens, is by example.
    """
    lengths = np.asarray(lengths, np.int64)
    mega = batch * max(1, min(len(permuted) // (4 * batch), 50))
    cuts = np.split(permuted, range(mega, len(permuted), mega))
    grouped = np.concatenate([cut[np.argsort(-lengths[cut], kind="stable")] for cut in cuts])
    longest = mega * int(np.argmax(lengths[grouped[::mega]]))
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped


def _permutation(n: int, twister: np.random.MT19937) -> np.ndarray:
    """Compute `torch.randperm(n)` from a generator's present state, with n - 1 of its 32-bit outputs."""
    order = array("q")
    order.frombytes(np.arange(n).view(np.uint8).data)
    for start in range(0, n - 1, DRAWS):
        places = np.arange(start, min(start + DRAWS, n - 1), dtype=np.uint64)
        others = places + twister.random_raw(len(places)) % (n - places)
        for i, j in enumerate(others.tolist(), start):
            order[i], order[j] = order[j], order[i]
    return np.frombuffer(order, np.int64)


def twister_of(seed: int) -> np.random.MT19937:
    """Return the generator of torch on the CPU, seeded by `torch.manual_seed(seed)`."""
    twister = np.random.MT19937()
    # RandomState seeds as torch does. `MT19937(seed)` hashes the seed first.
    state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
    twister.state = state
    return twister


def epoch_seed(compat: str, seed: int, data_seed: int | None, epoch: int, evaluations: int = 0) -> int:
    """Return the seed of an epoch's random permutation, epochs from 0, after so many evaluations.

    5: (data_seed or seed) + epoch. 4.37: each epoch draws two 64-bit numbers from the global generator, each of two
    32-bit outputs, the high one first. The first number is the loader's base seed; the second is the sampler's, whose
    low half is the seed. The loader of an evaluation draws a base seed from the same generator.
    """
    if compat == "5":
        return (seed if data_seed is None else data_seed) + epoch
    return int(twister_of(seed).random_raw(4 * epoch + 2 * evaluations + 4)[-1])


# Compared and hashed by identity: `lengths` has no cheap hash, and an order's epochs are cached by the order.
@dataclass(frozen=True, eq=False)
class Order:
    """Plan the `updates` of a run: update k is made of the micro-batches `bounds[k]` to `bounds[k + 1]`.

    Micro-batches are counted over the whole run; each epoch has `batches_per_epoch` of them. A micro-batch is
    `per_device_batch` examples on each of `ranks` ranks.

    `sampling` is 5's `train_sampling_strategy`: "random", "sequential" or "group_by_length", which needs the examples'
    `lengths` in tokens, [examples]. `evaluated` holds the numbers of updates done at which the run evaluates, 0 for
    before the first. Evaluations change the order of later epochs if it comes from the global generator. As `updates`
    does not depend on `evaluated`, `dataclasses.replace` may set the field.
    """

    examples: int
    per_device_batch: int
    accumulation: int
    epochs: float
    compat: str
    seed: int = 42
    data_seed: int | None = None
    max_steps: int = -1
    ranks: int = 1
    drop_last: bool = False
    sampling: str = "random"
    lengths: np.ndarray | None = field(default=None, repr=False)
    evaluated: tuple[int, ...] = field(default=(), repr=False)
    batches_per_epoch: int = field(init=False)
    updates_per_epoch: int = field(init=False)
    updates: int = field(init=False)
    bounds: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        global_batch = self.per_device_batch * self.ranks
        batches = self.examples // global_batch if self.drop_last else -(-self.examples // global_batch)
        whole = batches // self.accumulation if self.compat == "4.37" else -(-batches // self.accumulation)
        per_epoch = max(1, whole)
        updates = self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * per_epoch)
        if batches == 0:
            raise InputError(
                f"{self.examples} examples do not fill one micro-batch of {global_batch}, and "
                "--dataloader_drop_last True drops what is left"
            )
        set_ = object.__setattr__
        set_(self, "batches_per_epoch", batches)
        set_(self, "updates_per_epoch", per_epoch)
        set_(self, "updates", updates)
        set_(self, "bounds", self._bounds(batches, updates))

    def _bounds(self, batches: int, updates: int) -> np.ndarray:
        """Return the ends of updates in the run's count of micro-batches, int64 [updates + 1], from 0.

        5: an update ends after `accumulation` micro-batches of the epoch, and at the epoch's end. 4.37: the count runs
        on over epochs, so that a tail carries over; only an epoch of at most `accumulation` micro-batches ends with an
        update.
        """
        A = self.accumulation
        epoch_ends = batches * np.arange(1, updates + 1, dtype=np.int64)
        if self.compat == "5":
            within = np.minimum(A * np.arange(1, -(-batches // A) + 1), batches)
            epochs = -(-updates // len(within))
            ends = (batches * np.arange(epochs)[:, None] + within).ravel()
        elif batches <= A:
            ends = np.union1d(epoch_ends, A * np.arange(1, updates + 1, dtype=np.int64))
        else:
            ends = A * np.arange(1, updates + 1, dtype=np.int64)
        return np.concatenate([[0], ends[:updates]])

    def micro_batch(self, m: int) -> list[np.ndarray]:
        """Return the example indices of micro-batch m, one array a rank."""
        epoch, batch = divmod(m, self.batches_per_epoch)
        order = _epoch_order(self, epoch)
        size = self.per_device_batch
        first = batch * size * self.ranks
        return [order[first + r * size : first + (r + 1) * size] for r in range(self.ranks)]

    def update(self, k: int) -> list[list[np.ndarray]]:
        """Return the micro-batches of update k, k from 0."""
        return [self.micro_batch(m) for m in range(self.bounds[k], self.bounds[k + 1])]

    def examples_of(self, k: int) -> np.ndarray:
        """Return the examples of update k, ordered by micro-batch, then by rank."""
        start, end = self.bounds[k : k + 2].tolist()
        per_epoch, size = self.batches_per_epoch, self.per_device_batch * self.ranks
        epochs = range(start // per_epoch, -(-end // per_epoch))
        parts = [
            _epoch_order(self, e)[max(start - e * per_epoch, 0) * size : min(end - e * per_epoch, per_epoch) * size]
            for e in epochs
        ]
        return np.concatenate(parts)

    def reduce(self, ufunc: np.ufunc, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """Reduce `values` [examples] by the ufunc, from 0, over the examples of each span of micro-batches.

        Span i is `bounds[i]` to `bounds[i + 1]`, ascending from 0. Returns int64 [len(bounds) - 1], fast for millions.
        """
        result = np.zeros(len(bounds) - 1, np.int64)
        per_epoch, size = self.batches_per_epoch, self.per_device_batch * self.ranks
        for epoch in range(-(-int(bounds[-1]) // per_epoch)):
            first = np.searchsorted(bounds, epoch * per_epoch, "right") - 1
            last = min(int(np.searchsorted(bounds, (epoch + 1) * per_epoch)), len(result))
            within = np.clip(bounds[first : last + 1] - epoch * per_epoch, 0, per_epoch) * size
            dealt = _epoch_order(self, epoch)[: within[-1]]
            part = result[first:last]
            ufunc(part, ufunc.reduceat(values[dealt], within[:-1]), out=part)
        return result

    def evaluations_before(self, epoch: int) -> int:
        """Count the evaluations made before an epoch begins."""
        done = self.bounds[np.asarray(self.evaluated, np.int64)]
        return int(np.count_nonzero(done <= epoch * self.batches_per_epoch))

    def facts(self) -> dict[str, Any]:
        """Return the settings that decide the order, as JSON values: equal facts and data give equal examples.

        Evaluations are counted by epoch, and only where they change the order.
        """
        facts = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("bounds", "lengths", "evaluated")
        }
        moved = self.sampling == "group_by_length" or (self.sampling, self.compat) == ("random", "4.37")
        epochs = range(-(-int(self.bounds[-1]) // self.batches_per_epoch)) if moved else range(0)
        before = [self.evaluations_before(e) for e in epochs]
        return {**facts, "evaluations_before_epoch": before if any(before) else []}

    def epoch_ends(self) -> set[int]:
        """Return the numbers of updates done at which an epoch, or the run, ends."""
        epochs = np.arange(1, self.bounds[-1] // self.batches_per_epoch + 1)
        ends = np.searchsorted(self.bounds, epochs * self.batches_per_epoch, side="right") - 1
        return {*ends.tolist(), self.updates}

    def tail(self, updates_done: int) -> int:
        """Count the micro-batches of a finished epoch that 4.37 carries over into the next update."""
        if updates_done == self.updates or updates_done not in self.epoch_ends():
            return 0
        return int(-self.bounds[updates_done] % self.batches_per_epoch)

    def epoch_at(self, updates_done: int) -> float:
        """Return the epochs trained after so many updates, by micro-batches."""
        return float(self.bounds[updates_done]) / self.batches_per_epoch


@lru_cache(maxsize=2)
def _epoch_order(order: Order, epoch: int) -> np.ndarray:
    """Return the order of an epoch's examples; with several ranks, its start repeats at the end to fill all batches."""
    permuted = _permuted(order, epoch)
    if order.ranks == 1:
        return permuted
    return np.resize(permuted, max(len(permuted), order.batches_per_epoch * order.per_device_batch * order.ranks))


def _permuted(order: Order, epoch: int) -> np.ndarray:
    n, evaluations = order.examples, order.evaluations_before(epoch)
    if order.sampling == "sequential":
        return np.arange(n)
    if order.sampling == "random":
        return randperm(n, epoch_seed(order.compat, order.seed, order.data_seed, epoch=epoch, evaluations=evaluations))
    # Both versions permute by the global generator: an epoch draws the loader's base seed, then n - 1 outputs.
    assert order.lengths is not None, "group_by_length needs lengths"
    twister = twister_of(order.seed)
    twister.random_raw(2 * (epoch + 1 + evaluations) + (n - 1) * epoch, output=False)
    return group_by_length(_permutation(n, twister), order.lengths, order.per_device_batch * order.accumulation)
