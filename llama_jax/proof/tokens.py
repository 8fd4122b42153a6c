"""Compare ids, labels and attention mask of the first records with transformers' own tokenizer.

The reference of each form is written from its published behaviour: stanford_alpaca's preprocessing (train.py, 2023),
`apply_chat_template`, the plain tokenizer call, and records that are ids already.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.data.examples import IGNORE_INDEX
from llama_jax.data.records import (
    ALPACA,
    CHAT,
    COMPLETION,
    TEXT,
    Bad,
    Record,
    answers,
    messages,
    read_records,
    tools,
)
from llama_jax.data.sources import find_sources
from llama_jax.proof.torch_layers import import_torch
from llama_jax.proof.verdict import Row
from llama_jax.setup.job import Job

SECTION = "tokens"
AROUND = 4  # tokens shown on each side of a difference
# stanford_alpaca's special tokens for a tokenizer that lacks them.
_MISSING = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
_BELOW = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request."


@dataclass(frozen=True)
class Expected:
    """Hold the reference of a record. `labels` is None where no published rule gives them."""

    ids: list[int]
    labels: list[int] | None


def compare_tokens(job: Job, tokenizer_folder: Path, count: int) -> list[Row]:
    """Return the rows of the first `count` examples of a job. Raises InputError."""
    records = first_records(job)
    if job.tokenizer is None:
        made: Iterator[Expected | None] = map(_as_given, records)
        show: Callable[[int], str] = str
        pad = None
    else:
        tokenizer = open_reference(tokenizer_folder)
        pad = tokenizer.pad_token_id
        show = partial(_spelled, tokenizer)
        made = _made(job.form, records, tokenizer, job.args.model_max_length)
    expected = [found for _, found in zip(range(count + job.held_out), _kept(made), strict=False)][job.held_out :]
    fix = _fix(job)
    ids = labels = mask = ""
    unknown = 0
    for i, found in enumerate(expected[: len(job.examples)]):
        our_ids, our_labels = (array.tolist() for array in job.examples[i])
        where = f"record {i + job.held_out + 1}"
        ids = ids or first_difference(where, our_ids, found.ids, show)
        if found.labels is None:
            unknown += 1
        else:
            labels = labels or first_difference(where, our_labels, found.labels, show)
        if job.form == ALPACA and not mask and (hidden := _hidden(found.ids, pad)):
            mask = (
                f"{where}, token {hidden}: {show(found.ids[hidden])} pads, so that stanford_alpaca's collator hides it "
                "inside the text (docs/flags.md names this difference); remove it from the record"
            )
    seen = min(len(expected), len(job.examples))
    rows = [_row(f"ids of {seen} records", ids, fix)]
    if unknown == seen:
        why = "the chat template rewrites earlier turns and has no {% generation %} tags, so no rule gives the labels"
        return [*rows, Row(SECTION, "labels", None, None, None, why)]
    left = f"; {unknown} more have no rule for labels" if unknown else ""
    rows.append(_row(f"labels of {seen - unknown} records{left}", labels, fix))
    return [*rows, _row(f"attention mask of {seen} records", mask, "")]


def first_records(job: Job) -> Iterator[Record]:
    """Yield the records of `--data_path` in order."""
    _, records = read_records(
        find_sources(job.args.data_path or [], job.args.dataset_config_name), Bad(job.args.skip_bad_records)
    )
    return iter(records)


def open_reference(folder: Path) -> Any:
    """Return transformers' tokenizer as stanford_alpaca opens it. Raises InputError."""
    import_torch()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # of many classes
        raise InputError(f"{folder}: AutoTokenizer cannot read it: {str(e).splitlines()[0]}") from None
    tokenizer.add_special_tokens({key: text for key, text in _MISSING.items() if getattr(tokenizer, key) is None})
    return tokenizer


def first_difference(where: str, ours: Sequence[int], theirs: Sequence[int], show: Callable[[int], str]) -> str:
    """Return the first place where two lists differ, with both spellings around it; "" where they are equal."""
    if list(ours) == list(theirs):
        return ""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))

    def spelled(values: Sequence[int]) -> str:
        part = values[max(0, at - AROUND) : at + AROUND + 1]
        return " ".join("masked" if v == IGNORE_INDEX else show(v) for v in part) or "(ends)"

    lengths = f" ({len(ours)} here, {len(theirs)} there)" if len(ours) != len(theirs) else ""
    return f"{where}, token {at}{lengths}: {spelled(ours)} here, {spelled(theirs)} by transformers"


def _spelled(tokenizer: Any, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens([token])[0]!r} ({token})"


def _row(name: str, difference: str, fix: str) -> Row:
    return Row(SECTION, name, None, None, not difference, difference + (fix if difference else ""))


def _fix(job: Job) -> str:
    """Return what to try where ids or labels differ."""
    from transformers import __version__

    if job.args.hf_compat == "5" or job.tokenizer is None:
        return ""
    return f"; the tokenizer is that of --hf_compat 4.37 and transformers here is {__version__}: give --hf_compat 5"


def _kept(made: Iterator[Expected | None]) -> Iterator[Expected]:
    return (found for found in made if found is not None)


def _hidden(ids: list[int], pad: int | None) -> int:
    """Return the place of the first token that equals the pad and that a later token would attend to, else 0."""
    last = max((i for i, token in enumerate(ids) if token != pad), default=0)
    return next((i for i, token in enumerate(ids[:last]) if token == pad), 0)


def _as_given(record: Record) -> Expected:
    mask = record.get("attention_mask") or [1] * len(record["input_ids"])
    kept = [i for i, seen in enumerate(mask) if seen]
    return Expected([record["input_ids"][i] for i in kept], [record["labels"][i] for i in kept])


def _made(form: str, records: Iterator[Record], tokenizer: Any, limit: int) -> Iterator[Expected | None]:
    """Yield the reference of each record, None for a chat that the template refuses."""
    for record in records:
        if form == CHAT:
            yield _chat(record, tokenizer, limit)
        elif form == TEXT:
            yield _text(record, tokenizer, limit)
        elif form == COMPLETION:
            yield _completion(record, tokenizer, limit)
        else:
            yield _alpaca(record, tokenizer, limit)


def _alpaca(record: Record, tokenizer: Any, limit: int) -> Expected:
    """Tokenize prompt, answer and eos as one text; mask as many tokens as the prompt alone has, pads not counted."""
    given = record.get("input") or ""
    about = f"{_BELOW}, paired with an input that provides further context. " if given else f"{_BELOW}. "
    parts = [about + _ANSWER, f"### Instruction:\n{record['instruction']}"]
    parts += [f"### Input:\n{given}"] if given else []
    prompt = "\n\n".join([*parts, "### Response:"])
    whole, alone = (
        tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        for text in (prompt + record["output"] + tokenizer.eos_token, prompt)
    )
    masked = sum(token != tokenizer.pad_token_id for token in alone)
    return Expected(whole, [IGNORE_INDEX] * len(whole[:masked]) + whole[masked:])


def _completion(record: Record, tokenizer: Any, limit: int) -> Expected:
    """Tokenize prompt and completion as one text; mask as many tokens as the prompt alone has, without an eos."""
    ids = _text({"text": record["prompt"] + record["completion"]}, tokenizer, limit).ids
    masked = len(_text({"text": record["prompt"] + tokenizer.eos_token}, tokenizer, limit + 1).ids) - 1
    return Expected(ids, [IGNORE_INDEX] * len(ids[:masked]) + ids[masked:])


def _text(record: Record, tokenizer: Any, limit: int) -> Expected:
    """Tokenize a text, between one bos, where the tokenizer has it, and one eos."""
    text, eos = record["text"], tokenizer.eos_token
    ids = tokenizer(text if text.endswith(eos) else text + eos)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    if ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids = ids[:-1]
    return Expected(ids[:limit], ids[:limit])


def _chat(record: Record, tokenizer: Any, limit: int) -> Expected | None:
    """Tokenize a chat by `apply_chat_template`. Labels are its assistant mask; without {% generation %} tags they are
    the text that each answer adds to the prompt before it, up to the end of turn."""
    turns, options = messages(record), {"tools": tools(record) or None}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception:  # the template's own refusals
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
    wanted = answers(record)
    if "{% generation" in _template(tokenizer) or "{%- generation" in _template(tokenizer):
        if not all(wanted):
            return Expected(ids[:limit], None)
        found = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        trained = np.asarray(found["assistant_masks"], bool)
    else:
        spans = _added(turns, text, tokenizer, options)
        if spans is None:
            return Expected(ids[:limit], None)
        trained = np.zeros(len(ids), bool)
        for (start, end), kept in zip(spans, wanted, strict=True):
            trained |= (offsets[:, 1] > start) & (offsets[:, 0] < end) & kept
    labels = np.where(trained, ids, IGNORE_INDEX).tolist()
    return Expected(ids[:limit], labels[:limit])


def _added(turns: list[Any], text: str, tokenizer: Any, options: dict[str, Any]) -> list[tuple[int, int]] | None:
    """Return the span of each answer in the text of a chat; None where the text of fewer turns is no part of it."""
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        try:
            before = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True, **options)
            after = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False, **options)
        except Exception:  # a template that wants the turns whole
            return None
        if not (text.startswith(before) and text.startswith(after.rstrip()) and len(before) < len(after)):
            return None
        spans.append((len(before), len(after.rstrip())))
    return spans


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return "".join(template.values()) if isinstance(template, dict) else template or ""
