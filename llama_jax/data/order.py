"""Compute which examples make update k: the HF Trainer's order, without torch.

Sources: `transformers.Trainer` 4.37 and 5, accelerate's samplers, and torch's `randperm` (a 32-bit Mersenne twister
with the classic seeding; one draw and one swap an element).
"""

import math
from array import array
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, cast

import numpy as np

from llama_jax.base.errors import InputError

DRAWS = 1 << 16  # draws of a permutation to hold as Python integers at a time
MOST_UPDATES = 10**8  # the ends of all updates are held in memory, 8 bytes each


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


@dataclass(frozen=True, eq=False)
class Resumed:
    """Describe where the HF Trainer resumes: after `updates` updates, with the state of torch's global generator, None
    where the checkpoint has none: the 624 words "key" of a Mersenne twister, and the place "pos" of the next."""

    updates: int
    generator: dict[str, Any] | None = field(default=None, repr=False)


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

    `resumed` is set where the HF Trainer would resume its own checkpoint, whose faults the order then has (`_position`,
    `_generator`). Updates before are then not those that were made, only as long.
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
    resumed: Resumed | None = None
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
        if updates > MOST_UPDATES:
            raise InputError(
                f"{updates:,} updates are above {MOST_UPDATES:,}, the most that are planned; lower --num_train_epochs "
                "or --max_steps"
            )
        if batches == 0:
            raise InputError(
                f"{self.examples} examples do not fill one micro-batch of {global_batch}, and "
                "--dataloader_drop_last True drops what is left"
            )
        set_ = object.__setattr__
        set_(self, "batches_per_epoch", batches)
        set_(self, "updates_per_epoch", per_epoch)
        set_(self, "updates", updates)
        bounds = np.concatenate([[0], self._ends(0, updates)])
        if self.resumed and self.resumed.updates < updates:
            done, (epoch, skipped) = self.resumed.updates, self._position()
            first = epoch * batches + skipped
            bounds = np.concatenate([bounds[:done] + first - bounds[done], [first], self._ends(first, updates - done)])
        set_(self, "bounds", bounds)

    def _ends(self, first: int, count: int) -> np.ndarray:
        """Return the ends of `count` updates in the run's count of micro-batches, int64, where the first begins with
        micro-batch `first`.

        5: an update ends after `accumulation` micro-batches of the epoch, and at the epoch's end. 4.37: the count runs
        on over epochs, so that a tail carries over; only an epoch of at most `accumulation` micro-batches ends with an
        update.
        """
        A, B = self.accumulation, self.batches_per_epoch
        epoch = first // B
        if self.compat == "5":
            within = np.minimum(A * np.arange(1, -(-B // A) + 1), B)
            epochs = np.arange(epoch, epoch + count // len(within) + 2, dtype=np.int64)
            ends = (B * epochs[:, None] + within).ravel()
            ends = ends[ends > first]
        elif B <= A:
            ends = np.union1d(
                B * np.arange(epoch + 1, epoch + count + 1, dtype=np.int64),
                first + A * np.arange(1, count + 1, dtype=np.int64),
            )
        else:
            ends = first + A * np.arange(1, count + 1, dtype=np.int64)
        return ends[:count]

    def _position(self) -> tuple[int, int]:
        """Return the epoch in which the HF Trainer resumes, and the micro-batches of it that the Trainer passes over.

        The Trainer finds both from the number of updates. 4.37 thus forgets the tails that it has carried over.
        """
        assert self.resumed
        epoch, updates = divmod(self.resumed.updates, self.updates_per_epoch)
        return epoch, updates * self.accumulation

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

        Span i is `bounds[i]` to `bounds[i + 1]`, ascending. Returns int64 [len(bounds) - 1], fast for millions.
        """
        result = np.zeros(len(bounds) - 1, np.int64)
        per_epoch, size = self.batches_per_epoch, self.per_device_batch * self.ranks
        for epoch in range(int(bounds[0]) // per_epoch, -(-int(bounds[-1]) // per_epoch)):
            first = max(int(np.searchsorted(bounds, epoch * per_epoch, "right")) - 1, 0)
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
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("bounds", "lengths", "evaluated", "resumed")
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
    """Return the order of an epoch's examples on one rank.

    5 permutes under the seed (data_seed or seed) + epoch. 4.37 takes the low half of a 64-bit number of torch's global
    generator for the seed; a permutation that is grouped by length comes from the global generator itself.
    """
    n = order.examples
    if order.sampling == "sequential":
        return np.arange(n)
    if (order.sampling, order.compat) == ("random", "5"):
        return randperm(n, (order.seed if order.data_seed is None else order.data_seed) + epoch)
    twister = _generator(order, epoch, order.evaluations_before(epoch))
    twister.random_raw(2, output=False)  # the base seed of the epoch's loader
    if order.sampling == "random":
        return randperm(n, int(twister.random_raw(2)[-1]))
    assert order.lengths is not None, "group_by_length needs lengths"
    return group_by_length(_permutation(n, twister), order.lengths, order.per_device_batch * order.accumulation)


def generator_after(order: Order, done: int) -> np.random.MT19937:
    """Return torch's global generator as the Trainer saves it after so many updates."""
    begun = -(-int(order.bounds[done]) // order.batches_per_epoch)
    return _generator(order, begun, int(np.searchsorted(order.evaluated, done, "right")))


def _generator(order: Order, epoch: int, evaluations: int) -> np.random.MT19937:
    """Return torch's global generator as the loader of an epoch finds it, after so many evaluations.

    An epoch draws the loader's base seed, a 64-bit number of two 32-bit outputs, and what the sampler takes: another
    64-bit number, n - 1 outputs, or none. The loader of an evaluation draws a base seed too.

    The resumed Trainer seeds the generator anew. 4.37 then lets the sampler of each past epoch draw, for `random`
    without the base seed. In the middle of an epoch, the permutation is drawn before the generator gets the state of
    the checkpoint: so its order is not that of the interrupted epoch, but in the first.
    """
    by_sampler = {"random": 2 * (order.compat == "4.37"), "group_by_length": order.examples - 1}.get(order.sampling, 0)
    twister = twister_of(order.seed)
    draws = epoch * (2 + by_sampler)
    if order.resumed:
        first, skipped = order._position()
        evaluations -= int(np.searchsorted(order.evaluated, order.resumed.updates, "right"))
        past = first * (by_sampler + 2 * (order.sampling != "random")) if order.compat == "4.37" else 0
        draws = past + (epoch - first) * (2 + by_sampler)
        if order.resumed.generator and (epoch > first or not skipped):
            state = order.resumed.generator
            words = {"key": np.asarray(state["key"], np.uint32), "pos": state["pos"]}
            twister.state = cast(Any, {"bit_generator": "MT19937", "state": words})
            draws = (epoch - first - bool(skipped)) * (2 + by_sampler)
    twister.random_raw(max(draws + 2 * max(evaluations, 0), 0), output=False)  # an epoch before has no draws
    return twister
