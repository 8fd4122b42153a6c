"""Which examples make update k: the HF Trainer's order, without torch.

Sources: `transformers.Trainer` 4.37 and 5, accelerate's samplers, and torch's `randperm` (a 32-bit Mersenne twister
with the classic seeding; one draw and one swap an element).
"""

import math
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np

from llama_jax.errors import InputError


def randperm(n: int, seed: int) -> np.ndarray:
    """`torch.randperm(n)` on the CPU from a generator seeded with `seed`, as int64 [n]."""
    draws = _twister(seed).random_raw(max(n - 1, 0)) % np.arange(n, 1, -1, dtype=np.uint64)
    order = list(range(n))
    for i, z in enumerate(draws.tolist()):
        order[i], order[i + z] = order[i + z], order[i]
    return np.asarray(order, np.int64)


def _twister(seed: int) -> np.random.MT19937:
    twister = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)  # the classic initialisation; NumPy has no public name for it
    return twister


def epoch_seed(compat: str, seed: int, data_seed: int | None, epoch: int) -> int:
    """The seed of one epoch's permutation, epochs from 0.

    5: (data_seed or seed) + epoch. 4.37: each epoch draws two 64-bit numbers from the global generator (two 32-bit
    outputs each, the high one first): the loader's base seed, then the sampler's, whose low half is the seed.
    """
    if compat == "5":
        return (seed if data_seed is None else data_seed) + epoch
    return int(_twister(seed).random_raw(4 * epoch + 4)[-1])


@dataclass(frozen=True)
class Order:
    """The plan of a run: `updates` updates; update k is made of the micro-batches `bounds[k]` to `bounds[k + 1]`.

    Micro-batches are counted over the whole run; each epoch has `batches_per_epoch` of them. A micro-batch is
    `per_device_batch` examples on each of `ranks` ranks.
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
    batches_per_epoch: int = field(init=False)
    updates_per_epoch: int = field(init=False)
    updates: int = field(init=False)
    bounds: np.ndarray = field(init=False, repr=False, compare=False)

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
        """Ends of updates in the running count of micro-batches, int64 [updates + 1], from 0.

        5: every `accumulation` micro-batches within the epoch, and at its end. 4.37: the count runs on over epochs, so
        that a tail carries over; only an epoch of at most one update's micro-batches ends with an update of its own.
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
        """Example indices of micro-batch m, one array a rank."""
        epoch, batch = divmod(m, self.batches_per_epoch)
        order = _epoch_order(self.examples, self.compat, self.seed, self.data_seed, epoch)
        size = self.per_device_batch
        first = batch * size * self.ranks
        if self.ranks > 1:  # the tail is topped up from the start of the epoch, so that ranks have equal counts
            order = np.resize(order, max(len(order), self.batches_per_epoch * size * self.ranks))
        return [order[first + r * size : first + (r + 1) * size] for r in range(self.ranks)]

    def update(self, k: int) -> list[list[np.ndarray]]:
        """The micro-batches of update k, k from 0."""
        return [self.micro_batch(m) for m in range(self.bounds[k], self.bounds[k + 1])]

    def facts(self) -> dict[str, Any]:
        """What decides the order, by name: two runs with equal facts and data see the same examples."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "bounds"}

    def epoch_ends(self) -> set[int]:
        """The numbers of updates done at which an epoch is over, or the run."""
        epochs = np.arange(1, self.bounds[-1] // self.batches_per_epoch + 1)
        ends = np.searchsorted(self.bounds, epochs * self.batches_per_epoch, side="right") - 1
        return {*ends.tolist(), self.updates}

    def epoch_at(self, updates_done: int) -> float:
        """Epochs trained after so many updates, in micro-batches."""
        return float(self.bounds[updates_done]) / self.batches_per_epoch


@lru_cache(maxsize=2)
def _epoch_order(n: int, compat: str, seed: int, data_seed: int | None, epoch: int) -> np.ndarray:
    return randperm(n, epoch_seed(compat, seed, data_seed, epoch))
