"""Turn records into token ids and labels."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.data.chat import Chat
from llama_jax.data.readers import Reader
from llama_jax.data.records import ALPACA, CHAT, COMPLETION, TEXT, TOKENIZED, Bad, Record, unpadded
from llama_jax.data.rendering import Endless
from llama_jax.data.tokenizer import Tokenizer

IGNORE_INDEX = -100
CHUNK = 2000  # records at a time: enough for all cores, few enough for a smooth progress bar and small temporaries

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
    """Hold all examples end to end: example i is `[offsets[i]:offsets[i + 1]]` of `input_ids` and `labels` (int32)."""

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Count the tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def trained(self) -> np.ndarray:
        """Count the trained tokens of each example, int64: labels that are not masked, without the first, which no
        token predicts."""
        trained = np.empty(len(self), np.int64)
        for places, run in self.runs():
            learned = run.labels != IGNORE_INDEX
            learned[run.offsets[:-1]] = False
            trained[places] = np.add.reduceat(learned.view(np.uint8), run.offsets[:-1], dtype=np.int32)
        return trained

    def runs(self) -> Iterator[tuple[slice, "Examples"]]:
        """Yield slices of examples and their places, to bound the memory of work on every token."""
        for start in range(0, len(self), CHUNK):
            offsets = self.offsets[start : start + CHUNK + 1]
            tokens = slice(offsets[0], offsets[-1])
            run = Examples(self.input_ids[tokens], self.labels[tokens], offsets - offsets[0])
            yield slice(start, start + len(run)), run

    def take(self, order: np.ndarray) -> "Examples":
        """Return the examples of these indices, in this order."""
        parts = [self[int(i)] for i in order]
        return _join([ids for ids, _ in parts], [labels for _, labels in parts])

    def split(self, at: int) -> tuple["Examples", "Examples"]:
        """Return the first `at` examples, and the rest."""
        cut = self.offsets[at]
        return (
            Examples(self.input_ids[:cut], self.labels[:cut], self.offsets[: at + 1]),
            Examples(self.input_ids[cut:], self.labels[cut:], self.offsets[at:] - cut),
        )

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.input_ids[part], self.labels[part]


def alpaca_prompt(record: Record) -> str:
    """Return stanford_alpaca's prompt: the short form where `input` is missing or empty."""
    return _LONG.format_map(record) if record.get("input", "") else _SHORT.format_map(record)


def prompt_and_answer(form: str, record: Record) -> tuple[str, str]:
    """Return the two texts of a record of the form "alpaca" or "completion"; the first is not trained."""
    if form == ALPACA:
        return alpaca_prompt(record), record["output"]
    return record["prompt"], record["completion"]


def tokenize(
    form: str,
    records: Iterable[Record],
    tokenizer: Tokenizer | None,
    model_max_length: int,
    progress: Callable[[int], None] = lambda done: None,
    source: str = "data",
    bad: Bad | None = None,
) -> Examples:
    """Make examples from records of `form`, one of `records.FORMS`, each cut at `model_max_length` tokens.

    `progress` is called with the number of further records done; `source` names the data in errors. `bad` collects
    chats that the template refuses. The forms:

    - "alpaca": `alpaca_prompt` + output + eos, tokenised as one text. As in stanford_alpaca, the number of tokens of
      the prompt alone, cut likewise, gives the number of labels -100; the two may differ at the boundary.
    - "chat": the text that the tokenizer's chat template writes; labels outside the assistant's text are -100.
    - "completion": prompt + completion as "text"; the tokens of the prompt alone, without an eos, give the number of
      labels -100.
    - "text": the bos that the tokenizer adds, the text, and eos; all are labels. A text that has bos or eos at its end
      already gets no second.
    - "tokenized": ids and labels as given, without pads; only this form needs no tokenizer, and is not cut.

    Cutting may leave an example without labels. Raises InputError for chats that the template refuses, unless `bad`
    skips.
    """
    if form == TOKENIZED:
        return from_tokenized(records)
    assert tokenizer is not None
    chat = Chat(tokenizer) if form == CHAT else None
    ids, labels, offsets = array("i"), array("i"), array("q", [0])  # arrays grow without a second copy
    remaining, done, bad = iter(records), 0, bad or Bad()
    where = records.where if isinstance(records, Reader) else lambda i: (source, i + 1)
    while chunk := list(islice(remaining, CHUNK)):
        if chat:
            made = _chats(chunk, chat, done, where, bad)
        elif form == TEXT:
            made = _text(chunk, tokenizer)
        elif form == COMPLETION:
            made = _completions(chunk, tokenizer)
        else:
            made = _alpaca(chunk, tokenizer, model_max_length)
        for example, trained in made:
            example_ids = np.asarray(example[:model_max_length], np.int32)
            ids.frombytes(example_ids.tobytes())
            labels.frombytes(np.where(trained[:model_max_length], example_ids, np.int32(IGNORE_INDEX)).tobytes())
            offsets.append(len(ids))
        done += len(chunk)
        progress(len(chunk))
    bad.refuse(done)
    if len(offsets) == 1:
        raise InputError(f"{source}: holds no good records ({bad})")
    return Examples(np.frombuffer(ids, np.int32), np.frombuffer(labels, np.int32), np.frombuffer(offsets, np.int64))


tokenize_alpaca = partial(tokenize, ALPACA)


def _chats(
    records: Sequence[Record], chat: Chat, first: int, where: Callable[[int], tuple[str, int]], bad: Bad
) -> Iterable[tuple[Sequence[int], np.ndarray]]:
    """Tokenize chats, the first of them record `first`; a chat that the template refuses goes to `bad`."""
    try:
        return list(chat.tokenize(records, *where(first)))
    except Endless:
        raise
    except InputError:
        made: list[tuple[Sequence[int], np.ndarray]] = []
    for i, record in enumerate(records, first):
        source, number = where(i)
        try:
            made += chat.tokenize([record], source, number)
        except Endless:
            raise
        except InputError as e:
            bad.add(source, str(e).removeprefix(f"{source}: "))
            bad.dropped.append(i)
    return made


def _alpaca(records: Sequence[Record], tokenizer: Tokenizer, limit: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    pairs, eos = [prompt_and_answer(ALPACA, record) for record in records], tokenizer.eos_token or ""
    texts = [prompt + answer + eos for prompt, answer in pairs]
    joint, pad = tokenizer.encode_batch(texts + [prompt for prompt, _ in pairs]), tokenizer.pad_token_id
    for ids, prompt in zip(joint[: len(records)], joint[len(records) :], strict=True):
        head = prompt[:limit]
        yield ids, np.arange(len(ids)) >= len(head) - head.count(pad)  # type: ignore[arg-type]  # ids are never None


def _completions(records: Sequence[Record], tokenizer: Tokenizer) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    pairs = [prompt_and_answer(COMPLETION, record) for record in records]
    prompts, adds = tokenizer.encode_batch([prompt for prompt, _ in pairs]), tokenizer.adds()
    for ids, prompt in zip(_ended([a + b for a, b in pairs], tokenizer), prompts, strict=True):
        added = doubled(prompt, adds)[0] + adds[1]  # a second bos, and an eos
        yield ids, np.arange(len(ids)) >= len(prompt) - added


def _text(records: Sequence[Record], tokenizer: Tokenizer) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    for ids in _ended([record["text"] for record in records], tokenizer):
        yield ids, np.ones(len(ids), bool)


def _ended(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the ids of texts with one bos, where the tokenizer adds it, and one eos."""
    eos, adds = tokenizer.eos_token or "", tokenizer.adds()
    for ids in tokenizer.encode_batch([text + ("" if text.endswith(eos) else eos) for text in texts]):
        first, last = doubled(ids, adds)
        yield ids[first : len(ids) - last]


def doubled(ids: Sequence[int], adds: tuple[bool, bool]) -> tuple[bool, bool]:
    """Return whether a bos was added before one that was there, and an eos behind one; `adds` is `Tokenizer.adds`."""
    adds_bos, adds_eos = adds
    return adds_bos and ids[1:2] == ids[:1], adds_eos and ids[-2:-1] == ids[-1:]


def from_tokenized(records: Iterable[Record]) -> Examples:
    """Join records that are `input_ids` and `labels` already, as int32, or as int64 where a number needs it."""
    arrays, offsets = [array("i"), array("i")], array("q", [0])
    for record in records:
        for at, values in enumerate(unpadded(record)):
            try:
                arrays[at].extend(values)
            except OverflowError:  # outside any vocabulary: `check_examples` names the number
                del arrays[at][offsets[-1] :]
                arrays = [array("q", a) for a in arrays]
                arrays[at].extend(values)
        offsets.append(len(arrays[0]))
    ids, labels = (np.frombuffer(a, a.typecode) for a in arrays)
    return Examples(ids, labels, np.frombuffer(offsets, np.int64))


def _join(ids: list[np.ndarray], labels: list[np.ndarray]) -> Examples:
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Examples(np.concatenate(ids), np.concatenate(labels), offsets)


def check_examples(examples: Examples, vocab_size: int, source: str, records: Reader | None = None) -> Examples:
    """Return the examples as int32; raise InputError for ids outside the vocabulary or if every label is masked.

    `records` gives the file and number of a record; else numbers count the examples of `source`.
    """
    for places, run in examples.runs():
        bad_id = (run.input_ids < 0) | (run.input_ids >= vocab_size)
        bad_label = (run.labels != IGNORE_INDEX) & ((run.labels < 0) | (run.labels >= vocab_size))
        for name, bad, values in (("token id", bad_id, run.input_ids), ("label", bad_label, run.labels)):
            if bad.any():
                where = int(bad.argmax())
                at = places.start + int(np.searchsorted(run.offsets, where, side="right")) - 1
                source, number = records.where(at) if records is not None else (source, at + 1)
                raise InputError(
                    f"{source}: record {number} has the {name} {values[where]}, outside the vocabulary of {vocab_size}"
                )
    ids, labels = (array.astype(np.int32, copy=False) for array in (examples.input_ids, examples.labels))
    checked = Examples(ids, labels, examples.offsets)
    if not checked.trained.any():
        raise InputError(
            f"{source}: every label is masked (-100), so there is nothing to learn; is --model_max_length too small?"
        )
    return checked
