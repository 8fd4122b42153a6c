"""Find problems in the data of a run before training."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama_jax.data.chat import Chat
from llama_jax.data.examples import CHUNK, IGNORE_INDEX, Examples, doubled, prompt_and_answer
from llama_jax.data.records import ALPACA, CHAT, COMPLETION, TEXT, Record, answers, messages
from llama_jax.data.tokenizer import Tokenizer

# Meaning of a finding, and the remedy.
ADVICE = {
    "truncated": "cut at --model_max_length {limit}; raise the limit, or shorten these records",
    "eos_lost": "cut before the end, so no eos is trained; raise --model_max_length",
    "masked": "no token of these is trained: the prompt alone fills --model_max_length, or every label is -100",
    "boundary_merges": "the prompt's end and the output's beginning share a token, so the mask is off by one token; "
    "begin outputs with a letter, and completions with the white space that ends their prompts, or ignore this: "
    "stanford_alpaca and TRL train on the same tokens",
    "doubled_bos": "the texts begin with the bos that the tokenizer adds; here it stays single, in transformers it is "
    "there twice; remove it from these texts",
    "doubled_eos": "add_eos_token puts a second eos behind each output and masks the output's first token, as in "
    "stanford_alpaca; set add_eos_token to false in tokenizer_config.json",
    "past_positions": "longer than the {positions} positions of the model (max_position_embeddings); lower "
    "--model_max_length, or set rope_scaling in config.json",
    "duplicates": "the same tokens as an earlier record; remove these records unless the repetition is intended",
    "dropped": "the chat template leaves out words of a turn, as many do with earlier thoughts: they are not trained; "
    "use a template that writes them, or remove these words",
    "empty_outputs": "an output is empty: only its eos is trained; remove these records unless intended",
}
SHOWN = 8  # records to name for each finding


def diagnose(
    form: str,
    examples: Examples,
    records: Sequence[Record],
    whole: Examples | None,
    tokenizer: Tokenizer | None,
    limit: int,
    positions: int = sys.maxsize,
    first: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Describe the data as JSON values. `examples` were made of `records`, numbered from `first`.

    `whole` are the same examples without a length limit, None for records that are tokens already; these need no
    `records`. The model was made for sequences of `positions`. Each finding has a `count` and the first `records` by
    number, or is None where the form does not tell.
    """
    truncated = lost = merged = empty = two_bos = two_eos = dropped = None
    if whole is not None and len(whole) == len(examples):
        truncated = whole.lengths > examples.lengths
        assert tokenizer is not None
        lost = _end_lost(whole, examples.lengths, tokenizer)
        empty = np.fromiter((not all(map(str.strip, _trained_texts(form, r))) for r in records), bool, len(records))
        adds_bos, adds_eos = tokenizer.adds()
        if form in (ALPACA, COMPLETION):
            merged = _merged(form, whole, records, tokenizer, progress)
        if form == ALPACA:
            two_eos = np.full(len(records), adds_eos)
        if form in (TEXT, COMPLETION):
            bos = tokenizer.special["bos_token"] or ""
            texts = (r["text"] if form == TEXT else "".join(prompt_and_answer(form, r)) for r in records)
            two_bos = np.fromiter((adds_bos and text.startswith(bos) for text in texts), bool, len(records))
        if form == CHAT:
            dropped = _dropped(records, Chat(tokenizer), progress)
    found = {
        "truncated": truncated,
        "eos_lost": lost,
        "masked": examples.trained == 0,
        "boundary_merges": merged,
        "doubled_bos": two_bos,
        "doubled_eos": two_eos,
        "past_positions": examples.lengths > positions,
        "duplicates": _repeated(examples),
        "dropped": dropped,
        "empty_outputs": empty,
    }
    edges = 2 ** np.arange(np.log2(examples.lengths.min()) // 1, np.log2(examples.lengths.max()) // 1 + 2).astype(int)
    return {
        "form": form,
        "examples": len(examples),
        "model_max_length": limit,
        "positions": positions,
        "lengths": {
            "percentiles": {str(p): int(np.percentile(examples.lengths, p)) for p in (0, 50, 90, 99, 100)},
            "edges": edges.tolist(),
            "counts": np.histogram(examples.lengths, edges)[0].tolist(),
        },
        "findings": {name: None if where is None else _finding(where, first) for name, where in found.items()},
        "tokenizer": [] if tokenizer is None else tokenizer.warnings(),
    }


def as_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the facts of `diagnose` as lines (subject, text): sizes, a histogram of lengths, the findings."""
    at, edges, counts = (facts["lengths"][key] for key in ("percentiles", "edges", "counts"))
    spread = f"{at['0']} to {at['100']} tokens; half have at most {at['50']}, 90% {at['90']}, 99% {at['99']}"
    lines = [("data", f"{facts['examples']:,} {facts['form']} examples of {spread}")]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        lines.append(("", f"{low:>7,} to {high - 1:<7,} {count:>10,} {'#' * -(-40 * count // max(counts))}".rstrip()))
    for name, found in facts["findings"].items():
        if found and found["count"]:
            more = ", ..." if found["count"] > len(found["records"]) else ""
            numbers = ", ".join(map(str, found["records"])) + more
            advice = ADVICE[name].format(limit=facts["model_max_length"], positions=facts["positions"])
            lines.append((name.replace("_", " "), f"{found['count']:,} (record {numbers}) - {advice}"))
    lines += [("tokenizer", problem) for problem in facts["tokenizer"]]
    return lines


def _trained_texts(form: str, record: Record) -> list[str]:
    if form == CHAT:
        said = [turn for turn in messages(record) if turn["role"] == "assistant"]
        trained = zip(said, answers(record), strict=True)
        return [turn["content"] for turn, wanted in trained if wanted and not turn.get("tool_calls")]
    return [record["text"] if form == TEXT else prompt_and_answer(form, record)[1]]


def _end_lost(whole: Examples, lengths: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Mark examples whose last trained token is special, as eos is, and was cut away."""
    special = [tokenizer.token_to_id(token) for token in tokenizer.special_texts()]
    lost = np.empty(len(whole), bool)
    for places, run in whole.runs():
        at = np.where(run.labels != IGNORE_INDEX, np.arange(len(run.labels)), -1)
        last = np.maximum.reduceat(at, run.offsets[:-1])
        ends = np.isin(run.labels[last], [i for i in special if i is not None])
        lost[places] = (last - run.offsets[:-1] >= lengths[places]) & ends
    return lost


def _merged(
    form: str, whole: Examples, records: Sequence[Record], tokenizer: Tokenizer, progress: Callable[[int], None]
) -> np.ndarray:
    """Mark examples that do not begin with the tokens of the prompt alone."""
    merged, adds = np.zeros(len(records), bool), tokenizer.adds()
    for start in range(0, len(records), CHUNK):
        pairs = [prompt_and_answer(form, record) for record in records[start : start + CHUNK]]
        prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
        for i, prompt in enumerate(prompts, start):
            prompt = prompt[int(doubled(prompt, adds)[0]) : len(prompt) - adds[1]]
            merged[i] = whole[i][0][: len(prompt)].tolist() != prompt
        progress(len(prompts))
    return merged


def _dropped(records: Sequence[Record], chat: Chat, progress: Callable[[int], None]) -> np.ndarray:
    """Mark chats of which the template leaves out words."""
    dropped = np.empty(len(records), bool)
    for i, record in enumerate(records):
        dropped[i] = chat.drops_words(record)
        progress(1)
    return dropped


def _repeated(examples: Examples) -> np.ndarray:
    """Mark examples whose ids equal an earlier example's, by 64-bit digests: among 10 million, two collide with a
    probability of 3e-6."""
    digests = np.empty(len(examples), np.uint64)
    for i in range(len(examples)):
        digest = hashlib.blake2b(examples[i][0].tobytes(), digest_size=8).digest()
        digests[i] = int.from_bytes(digest, sys.byteorder)
    repeated = np.ones(len(examples), bool)
    repeated[np.unique(digests, return_index=True)[1]] = False
    return repeated


def _finding(where: np.ndarray, first: int) -> dict[str, Any]:
    numbers = np.flatnonzero(where)
    return {"count": len(numbers), "records": (numbers[:SHOWN] + first).tolist()}
