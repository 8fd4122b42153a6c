"""From records to token ids and labels, by stanford_alpaca's rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llama_jax.data.records import Record
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import InputError

IGNORE_INDEX = -100
CHUNK = 2000  # records tokenised at a time: enough for every core, small enough for the progress bar

_SHORT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_LONG = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Examples:
    """All examples, end to end: example i is `[offsets[i]:offsets[i + 1]]` of `input_ids` and `labels` (int32)."""

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def trained(self) -> np.ndarray:
        """Trained tokens of each example, int64: labels that are not masked, the first token's left out, which nothing
        predicts."""
        labels = self.labels != IGNORE_INDEX
        labels[self.offsets[:-1]] = False
        return np.add.reduceat(labels, self.offsets[:-1], dtype=np.int64)

    def take(self, order: np.ndarray) -> "Examples":
        """The examples of these indices, in this order."""
        parts = [self[int(i)] for i in order]
        return _join([ids for ids, _ in parts], [labels for _, labels in parts])

    def split(self, at: int) -> tuple["Examples", "Examples"]:
        """The first `at` examples, and the rest."""
        cut = self.offsets[at]
        return (
            Examples(self.input_ids[:cut], self.labels[:cut], self.offsets[: at + 1]),
            Examples(self.input_ids[cut:], self.labels[cut:], self.offsets[at:] - cut),
        )

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.input_ids[part], self.labels[part]


def alpaca_prompt(record: Record) -> str:
    """stanford_alpaca's prompt: the short form where `input` is missing or empty."""
    return _LONG.format_map(record) if record.get("input", "") else _SHORT.format_map(record)


def tokenize_alpaca(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    model_max_length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Examples:
    """Prompt + output + eos tokenised as one text, cut at `model_max_length`; labels of the prompt are -100.

    The prompt's length is that of the prompt tokenised alone, as in stanford_alpaca: the two need not agree at the
    boundary. A prompt that reaches the limit leaves an example without labels.
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    eos = tokenizer.eos_token or ""
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        prompts = [alpaca_prompt(r) for r in chunk]
        texts = [prompt + record["output"] + eos for prompt, record in zip(prompts, chunk, strict=True)]
        joint = tokenizer.encode_batch(texts + prompts)
        for example, prompt in zip(joint[: len(chunk)], joint[len(chunk) :], strict=True):
            example_ids = np.asarray(example[:model_max_length], np.int32)
            masked = sum(i != tokenizer.pad_token_id for i in prompt[:model_max_length])
            example_labels = example_ids.copy()
            example_labels[:masked] = IGNORE_INDEX
            ids.append(example_ids)
            labels.append(example_labels)
        progress(len(chunk))
    return _join(ids, labels)


def from_tokenized(records: Sequence[Record]) -> Examples:
    """Records that are `input_ids` and `labels` already."""
    ids = [np.asarray(r["input_ids"], np.int64) for r in records]
    labels = [np.asarray(r["labels"], np.int64) for r in records]
    return _join(ids, labels)


def _join(ids: list[np.ndarray], labels: list[np.ndarray]) -> Examples:
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Examples(np.concatenate(ids), np.concatenate(labels), offsets)


def check_examples(examples: Examples, vocab_size: int, source: str) -> Examples:
    """Examples as int32 with every id inside the vocabulary and something to learn. Raises InputError."""
    ids, labels = examples.input_ids, examples.labels
    bad_label = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))
    for what, bad, values in (
        ("token id", (ids < 0) | (ids >= vocab_size), ids),
        ("label", bad_label, labels),
    ):
        if bad.any():
            where = int(bad.argmax())
            number = int(np.searchsorted(examples.offsets, where, side="right"))
            raise InputError(
                f"{source}: record {number} has the {what} {values[where]}, outside the vocabulary of {vocab_size}"
            )
    if not examples.trained.any():
        raise InputError(
            f"{source}: every label is masked (-100), so there is nothing to learn; raise model_max_length?"
        )
    return Examples(ids.astype(np.int32), labels.astype(np.int32), examples.offsets)
