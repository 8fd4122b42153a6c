"""Lay a few examples out twice: padded, as the Trainer does, and as this program does, with the map between both.

Letters: B examples, T tokens of the longest, R rows of this program, N tokens of all examples.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from llama_jax.data.batches import ROW_MULTIPLE, Batch
from llama_jax.data.examples import IGNORE_INDEX, Examples
from llama_jax.data.normalisation import training_loss
from llama_jax.data.order import Order
from llama_jax.model.config import LlamaConfig

# Examples of a sample, and tokens of each: few, for CPUs, and more than 128 in a packed row, where a CPU's attention
# goes block by block (model/blockwise.py).
ROWS, TOKENS = 4, 48
# What a sample past a sliding window may cost: parameters times tokens, some minutes of two cores; the bytes of a
# layer's scores, which torch holds in float64 some times over; and those of the logits in float64.
MOST_PRODUCTS, MOST_SCORES, MOST_LOGITS = 1e11, 1 << 29, 1 << 30


@dataclass(frozen=True)
class Sample:
    """Hold examples, each a pair of ids and labels, as int32. `packed` lays this program's side by side in one row.
    `compat` is the version of transformers whose loss holds, `longest` the longest example of the run in tokens: the
    rotation is compared for as many positions, None for the sample's own."""

    examples: list[tuple[np.ndarray, np.ndarray]]
    packed: bool = True
    compat: str = "4.37"
    longest: int | None = None

    @property
    def positions(self) -> int:
        """Return the number of positions whose rotation is compared."""
        return max(self.longest or 0, int(self.lengths.max()))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example."""
        return np.asarray([len(ids) for ids, _ in self.examples])

    @cached_property
    def mask(self) -> np.ndarray:
        """Return the attention mask [B, T] of the padded batch."""
        return (np.arange(self.lengths.max())[None] < self.lengths[:, None]).astype(np.int32)

    @cached_property
    def ids(self) -> np.ndarray:
        """Return the padded ids [B, T]."""
        return self._padded([ids for ids, _ in self.examples], 0)

    @cached_property
    def labels(self) -> np.ndarray:
        """Return the padded labels [B, T]."""
        return self._padded([labels for _, labels in self.examples], IGNORE_INDEX)

    def _padded(self, arrays: list[np.ndarray], pad: int) -> np.ndarray:
        padded = np.full(self.mask.shape, pad, np.int32)
        padded[self.mask > 0] = np.concatenate(arrays)
        return padded

    @cached_property
    def batch(self) -> Batch:
        """Return this program's rows [R, T], with the weights that its normalisation gives the tokens."""
        targets = np.pad(self.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
        trained = int((targets != IGNORE_INDEX).sum())
        order = Order(len(self.examples), len(self.examples), accumulation=1, epochs=1, compat=self.compat)
        ((weight,),) = training_loss(order)(0, [[trained]])
        columns = np.broadcast_to(np.arange(self.ids.shape[1]), self.ids.shape)
        numbers = np.broadcast_to(np.arange(len(self.ids))[:, None] + 1, self.ids.shape)
        padded = {
            "input_ids": self.ids,
            "positions": columns,
            "segment_ids": numbers if self.packed else self.mask,
            "lengths": np.full_like(self.ids, self.ids.shape[1]),
            "targets": np.where(targets == IGNORE_INDEX, 0, targets),
            "weights": np.where(targets == IGNORE_INDEX, 0, weight),
        }
        arrays = {}
        for name, values in padded.items():
            kind = np.float32 if name == "weights" else np.int32
            arrays[name] = self.to_rows(values[self.mask > 0].astype(kind))
        return Batch(**arrays)

    def of_padded(self, values: np.ndarray) -> np.ndarray:
        """Return the tokens [N, ...] of values [B, T, ...] in the padded layout."""
        return values[self.mask > 0]

    def of_rows(self, values: np.ndarray) -> np.ndarray:
        """Return the tokens [N, ...] of values [R, T, ...] in this program's layout."""
        return values[0, : self.lengths.sum()] if self.packed else values[self.mask > 0]

    def to_padded(self, tokens: np.ndarray) -> np.ndarray:
        """Return values [B, T, ...] in the padded layout, 0 at pads, of tokens [N, ...]."""
        values = np.zeros((*self.mask.shape, *tokens.shape[1:]), tokens.dtype)
        values[self.mask > 0] = tokens
        return values

    def to_rows(self, tokens: np.ndarray) -> np.ndarray:
        """Return values [R, T, ...] in this program's layout, 0 at pads, of tokens [N, ...]."""
        if not self.packed:
            return self.to_padded(tokens)
        return np.pad(tokens, [(0, -len(tokens) % ROW_MULTIPLE), *[(0, 0)] * (tokens.ndim - 1)])[None]


def too_dear(config: LlamaConfig, tokens: int) -> str:
    """Return why a sample of examples of so many tokens costs too much, "" where it does not."""
    products = ROWS * tokens * config.num_parameters
    if products > MOST_PRODUCTS:
        return f"{ROWS} examples of {tokens:,} tokens take {products / MOST_PRODUCTS:.3g} times the time that they may"
    scores = 8 * ROWS * config.num_attention_heads * tokens**2 / MOST_SCORES
    logits = 8 * ROWS * tokens * config.vocab_size / MOST_LOGITS
    for name, share in (("scores", scores), ("logits", logits)):
        if share > 1:
            return f"the {name} of {ROWS} examples of {tokens:,} tokens take {share:.3g} times the memory that they may"
    return ""


def choose_sample(examples: Examples, numbers: Iterable[int], packed: bool, compat: str, window: int = 0) -> Sample:
    """Return a sample of the first ROWS of these numbers whose examples have labels, those first that reach past a
    `window`. Each is cut to TOKENS tokens more than the window around its first label: a long prompt would leave no
    label."""
    tokens, lengths, cut = TOKENS + window, examples.lengths, []
    labelled: Iterable[int] = (int(n) for n in numbers if (examples[int(n)][1][1:] != IGNORE_INDEX).any())
    if window:
        labelled = sorted(labelled, key=lambda number: lengths[number] <= window)
    for number in islice(labelled, ROWS):
        ids, labels = examples[number]
        first = int(np.flatnonzero(labels[1:] != IGNORE_INDEX)[0]) + 1
        start = max(0, min(first - TOKENS // 2, len(ids) - tokens))
        cut.append((ids[start : start + tokens].astype(np.int32), labels[start : start + tokens].astype(np.int32)))
    return Sample(cut, packed, compat, int(lengths.max()))
