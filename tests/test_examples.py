"""stanford_alpaca's examples, against a plain reading of its rule with sentencepiece itself.

The rule (its train.py, 2023): a prompt with or without `input`; prompt + output + eos as one text; the labels of as
many tokens as the prompt alone has are -100; both are cut at `model_max_length` first.
"""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.base.errors import InputError
from llama_jax.data import examples as examples_module
from llama_jax.data.examples import Examples, alpaca_prompt, check_examples, from_tokenized, tokenize, tokenize_alpaca
from llama_jax.data.records import ALPACA, CHAT, COMPLETION, FORMS, TEXT, TOKENIZED
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer

BEFORE_LONG = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request."""
BEFORE_SHORT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request."""

Record = dict[str, Any]


def prompt_of(record: Record) -> str:
    if "input" in record and record["input"] != "":
        parts = [BEFORE_LONG, "### Instruction:\n" + record["instruction"], "### Input:\n" + record["input"]]
    else:
        parts = [BEFORE_SHORT, "### Instruction:\n" + record["instruction"]]
    return "\n\n".join([*parts, "### Response:"])


class Rule(NamedTuple):
    """The reference: LLaMA's ids 1 and 2 around sentencepiece's, special tokens in the text cut out."""

    sp: sentencepiece.SentencePieceProcessor

    def encode(self, text: str) -> list[int]:
        special = {"<unk>": 0, "<s>": 1, "</s>": 2, "[PAD]": self.sp.get_piece_size()}
        ids = [1]
        for part in re.split(r"(<unk>|<s>|</s>|\[PAD\])", text):
            if part in special:
                ids.append(special[part])
            elif part:
                ids += self.sp.encode(part)
        return ids

    def example(self, record: Record, limit: int) -> tuple[list[int], list[int]]:
        ids = self.encode(prompt_of(record) + record["output"] + "</s>")[:limit]
        prompt = self.encode(prompt_of(record))[:limit]
        masked = len([i for i in prompt if i != self.sp.get_piece_size()])
        return ids, [-100] * len(ids[:masked]) + ids[masked:]


CORPUS = [
    BEFORE_LONG,
    BEFORE_SHORT,
    "### Instruction:\nWhat is a rainbow?\n\n### Input:\nred, green :) :: blue\n\n### Response:::) A rainbow is a bow.",
]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> tuple[Tokenizer, Rule]:
    """A tokenizer of LLaMA's kind, trained here: few pieces, so that texts are long."""
    folder = tmp_path_factory.mktemp("tokenizer")
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="bpe",
            vocab_size=340,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return opened(folder)


@pytest.fixture(scope="session")
def llama(shared) -> tuple[Tokenizer, Rule]:
    return opened(shared / "data" / "llama-tokenizer")


def opened(folder: Path) -> tuple[Tokenizer, Rule]:
    tokenizer = open_tokenizer(folder)
    tokenizer.add_missing_special_tokens()
    return tokenizer, Rule(sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")))


@pytest.fixture(scope="session")
def alpaca(shared) -> list[Record]:
    return json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text(encoding="utf-8"))


def assert_by_the_rule(records: list[Record], limit: int, tokenizer: Tokenizer, rule: Rule) -> None:
    got = tokenize_alpaca(records, tokenizer, limit)
    assert len(got) == len(records)
    for i, record in enumerate(records):
        ids, labels = rule.example(record, limit)
        assert got[i][0].tolist() == ids, f"record {i + 1}"
        assert got[i][1].tolist() == labels, f"record {i + 1}"
    assert got.lengths.sum() == len(got.input_ids) == len(got.labels)
    assert got.input_ids.dtype == got.labels.dtype == np.int32


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "",
        " ",
        "{input}",
        "{instruction}",
        "{",
        "}}",
        "%s",
        ":)",
        ":",
        "::",
        "\n",
        "a [PAD] b",
        "</s>",
        "<s><unk>",
        "red",
    ]
)
records_strategy = st.lists(
    st.fixed_dictionaries({"instruction": words, "output": words}, optional={"input": words, "id": words}),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300)
@given(records=records_strategy, limit=st.integers(1, 400))
def test_any_records_follow_the_rule(small, records, limit):
    assert_by_the_rule(records, limit, *small)


def test_two_thousand_records_of_alpaca_follow_the_rule(alpaca, llama):
    assert_by_the_rule(alpaca[:2000], 512, *llama)


@pytest.mark.proof
def test_all_records_of_alpaca_follow_the_rule(alpaca, llama):
    assert len(alpaca) == 52002
    assert_by_the_rule(alpaca, 512, *llama)


def test_prompts_that_are_no_prefix_of_their_text(alpaca, llama):
    """The colon that ends the prompt merges with what follows. The joint text is trained on, the prompt's own length is
    masked; prompt and answer tokenised apart would give other ids."""
    tokenizer, rule = llama
    first = alpaca[:999]
    merging = []
    for record in first:
        prompt, joint = rule.encode(prompt_of(record)), rule.encode(prompt_of(record) + record["output"] + "</s>")
        if joint[: len(prompt)] != prompt:
            merging.append(record)
    assert len(merging) == 32
    assert_by_the_rule(merging, 512, tokenizer, rule)
    apart = [rule.encode(prompt_of(r)) + rule.encode(r["output"] + "</s>")[1:] for r in merging]
    got = tokenize_alpaca(merging, tokenizer, 512)
    assert all(got[i][0].tolist() != ids for i, ids in enumerate(apart))


@pytest.mark.parametrize(
    ("record", "long"),
    [
        ({"instruction": "a", "output": "b"}, False),
        ({"instruction": "a", "input": "", "output": "b"}, False),
        ({"instruction": "a", "input": " ", "output": "b"}, True),
        ({"instruction": "a", "input": "x", "output": "b"}, True),
        ({"instruction": "{input}", "input": "{instruction}", "output": "b"}, True),
    ],
)
def test_the_prompt_has_an_input_where_the_record_has(record, long):
    expected = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        f"response that appropriately completes the request.\n\n### Instruction:\n{record['instruction']}\n\n### Input:"
        f"\n{record.get('input')}\n\n### Response:"
        if long
        else "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{record['instruction']}\n\n### Response:"
    )
    assert alpaca_prompt(record) == expected == prompt_of(record)


RECORD = {"instruction": "What is a rainbow?", "input": "red", "output": "A bow of light."}


def test_the_limit_takes_the_end_first_and_then_all_labels(small):
    """One token too few and eos is lost; at the prompt's length nothing is left to learn."""
    tokenizer, rule = small
    whole, prompt = rule.encode(prompt_of(RECORD) + RECORD["output"] + "</s>"), rule.encode(prompt_of(RECORD))
    for limit in range(len(prompt) - 3, len(whole) + 3):
        got = tokenize_alpaca([RECORD], tokenizer, limit)
        ids, labels = got[0]
        assert ids.tolist() == whole[:limit]
        assert (ids[-1] == 2) == (limit >= len(whole))
        assert (labels != -100).sum() == max(0, min(limit, len(whole)) - len(prompt))
        assert (labels[: len(prompt)] == -100).all()


def test_a_prompt_at_the_limit_is_an_example_without_labels(small):
    tokenizer, rule = small
    limit = len(rule.encode(prompt_of(RECORD)))
    long = {**RECORD, "instruction": "What is a rainbow? " * 50}
    got = tokenize_alpaca([RECORD, long], tokenizer, limit)
    assert got.lengths.tolist() == [limit, limit]
    assert (got.labels == -100).all()
    with pytest.raises(InputError, match=r"data\.json: .*masked"):
        check_examples(got, len(tokenizer), "data.json")
    more = tokenize_alpaca([long, {"instruction": "a", "output": "b"}], tokenizer, limit)
    assert check_examples(more, len(tokenizer), "data.json").labels.tolist() == more.labels.tolist()


def test_an_output_may_be_empty(small):
    got = tokenize_alpaca([{**RECORD, "output": ""}], *small[:1], 4096)
    assert got[0][1].tolist()[-2:] == [-100, 2]


def test_an_empty_end_adds_nothing(small, monkeypatch):
    tokenizer, rule = small
    monkeypatch.setitem(tokenizer.special, "eos_token", "")
    got = tokenize_alpaca([RECORD], tokenizer, 4096)
    assert got[0][0].tolist() == rule.encode(prompt_of(RECORD) + RECORD["output"])


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_chunks_are_not_seen_in_the_result(small, monkeypatch, chunk):
    tokenizer, _ = small
    records = [{**RECORD, "output": str(i) * i} for i in range(12)]
    expected = tokenize_alpaca(records, tokenizer, 150)
    monkeypatch.setattr(examples_module, "CHUNK", chunk)
    done: list[int] = []
    got = tokenize_alpaca(records, tokenizer, 150, done.append)
    assert sum(done) == 12
    for a, b in zip((got.input_ids, got.labels, got.offsets), vars(expected).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def some_examples(lengths: list[int], vocab_size: int = 10) -> list[Record]:
    return [
        {"input_ids": [j % vocab_size for j in range(n)], "labels": [-100] * (n - 1) + [n % vocab_size]}
        for n in lengths
    ]


lengths_strategy = st.lists(st.integers(2, 9), min_size=1, max_size=8)


@given(lengths=lengths_strategy)
def test_tokenised_records_come_through(lengths):
    records = some_examples(lengths)
    got = check_examples(from_tokenized(records), 10, "data.json")
    assert len(got) == len(records)
    assert got.lengths.tolist() == lengths
    assert [(ids.tolist(), labels.tolist()) for ids, labels in map(got.__getitem__, range(len(got)))] == [
        (r["input_ids"], r["labels"]) for r in records
    ]
    assert got.input_ids.dtype == got.labels.dtype == np.int32


@given(lengths=lengths_strategy, pads=st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=8, max_size=8))
def test_pads_are_no_tokens(lengths, pads):
    """Records with pads at either end, marked by the mask, give the examples of the records without."""
    records = some_examples(lengths)
    padded = [
        {
            "input_ids": [7] * a + r["input_ids"] + [7] * b,
            "labels": [-100] * a + r["labels"] + [-100] * b,
            "attention_mask": [0] * a + [1] * len(r["labels"]) + [0] * b,
        }
        for r, (a, b) in zip(records, pads, strict=False)
    ]
    got, expected = from_tokenized(padded), from_tokenized(records)
    for a, b in zip(vars(got).values(), vars(expected).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=300)
@given(
    data=st.data(),
    lengths=lengths_strategy,
    key=st.sampled_from(["input_ids", "labels"]),
    wrong=st.sampled_from([-1, 10, 11, 2**31, 2**32, -(2**31), -99, -101, 2**62]),
    chunk=st.sampled_from([1, 2, 100]),
)
def test_an_id_outside_the_vocabulary_is_found_at_its_record(monkeypatch, data, lengths, key, wrong, chunk):
    """2**32 is 0 in 32 bits: the check comes before the cast."""
    monkeypatch.setattr(examples_module, "CHUNK", chunk)
    records = some_examples(lengths)
    at = data.draw(st.integers(0, len(lengths) - 1))
    place = data.draw(st.integers(0, lengths[at] - 1))
    records[at][key][place] = wrong
    with pytest.raises(InputError) as caught:
        check_examples(from_tokenized(records), 10, "data.json")
    message = str(caught.value)
    assert message.startswith("data.json: ")
    assert re.search(rf"\brecord {at + 1} ", message)
    assert re.search(rf" {wrong}\b", message)
    assert "vocabulary of 10" in message
    assert ("label" in message) == (key == "labels")


@given(lengths=lengths_strategy)
def test_the_mask_is_no_token_id(lengths):
    """-100 masks a label, and is no id of a token."""
    records = some_examples(lengths)
    records[-1]["input_ids"][0] = -100
    with pytest.raises(InputError, match=rf"record {len(lengths)} has the token id -100"):
        check_examples(from_tokenized(records), 10, "data.json")


def test_the_first_label_alone_teaches_nothing():
    """No token predicts the first one, so that its label counts for as little as -100."""
    records = [{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}, {"input_ids": [4], "labels": [4]}]
    with pytest.raises(InputError, match=r"data\.json: every label is masked"):
        check_examples(from_tokenized(records), 10, "data.json")
    records[0]["labels"][2] = 3
    check_examples(from_tokenized(records), 10, "data.json")


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    chunk=st.sampled_from([1, 2, 5, 100]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_trained_tokens_are_the_labels_that_some_token_predicts(monkeypatch, lengths, chunk, masked, seed):
    """Counted one by one, in whatever runs they are looked at, and of a part of the examples as well."""
    monkeypatch.setattr(examples_module, "CHUNK", chunk)
    rng = np.random.default_rng(seed)
    labels = [np.where(rng.random(n) < masked, -100, rng.integers(0, 9, n)).tolist() for n in lengths]
    expected = [sum(label != -100 for label in row[1:]) for row in labels]
    flat = np.asarray([x for row in labels for x in row], np.int32)
    got = Examples(np.zeros_like(flat), flat, np.cumsum([0, *lengths]))
    assert got.trained.dtype == np.int64
    assert got.trained.tolist() == expected
    cut = len(lengths) // 2
    if cut > 0:
        assert [part.trained.tolist() for part in got.split(cut)] == [expected[:cut], expected[cut:]]
    assert labels == [run[i][1].tolist() for _, run in got.runs() for i in range(len(run))]


def test_examples_are_slices_of_one_array():
    got = Examples(np.arange(6, dtype=np.int32), -np.arange(6, dtype=np.int32), np.asarray([0, 1, 6]))
    assert len(got) == 2
    assert got.lengths.tolist() == [1, 5]
    assert got[1][0].tolist() == [1, 2, 3, 4, 5]
    assert got[1][1].tolist() == [-1, -2, -3, -4, -5]
    assert np.shares_memory(got[1][0], got.input_ids)


# --- prompt and completion, plain text, and what all forms share


@settings(max_examples=200)
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4), limit=st.integers(1, 60))
def test_a_completion_is_trained_and_its_prompt_is_not(small, pairs, limit):
    """One bos, one eos, and labels -100 at as many tokens as the prompt alone has, pads included."""
    tokenizer, rule = small
    got = tokenize(COMPLETION, [{"prompt": a, "completion": b} for a, b in pairs], tokenizer, limit)
    assert len(got) == len(pairs)
    for i, (prompt, completion) in enumerate(pairs):
        text = (prompt + completion).removeprefix("<s>")
        whole = rule.encode(text if text.endswith("</s>") else text + "</s>")
        masked = len(rule.encode(prompt.removeprefix("<s>")))
        assert got[i][0].tolist() == whole[:limit]
        assert got[i][1].tolist() == [-100 if at < masked else token for at, token in enumerate(whole)][:limit]


@settings(max_examples=200)
@given(texts=st.lists(words, min_size=1, max_size=4), limit=st.integers(1, 60))
def test_all_of_a_text_is_trained(small, texts, limit):
    """With the beginning token, and one eos at the end."""
    tokenizer, rule = small
    got = tokenize(TEXT, [{"text": text} for text in texts], tokenizer, limit)
    assert len(got) == len(texts)
    for i, text in enumerate(texts):
        expected = rule.encode(text.removeprefix("<s>") if text.endswith("</s>") else text.removeprefix("<s>") + "</s>")
        assert expected[0] == 1 and expected[-1] == 2
        assert got[i][0].tolist() == got[i][1].tolist() == expected[:limit]
    assert got.input_ids.dtype == got.labels.dtype == np.int32


def test_an_eos_that_the_tokenizer_adds_stays_single(small, monkeypatch):
    tokenizer, rule = small
    monkeypatch.setitem(tokenizer.config, "add_eos_token", True)
    got = tokenize(TEXT, [{"text": "a"}, {"text": "a</s>"}], tokenizer, 9)
    assert [got[i][0].tolist() for i in range(2)] == [rule.encode("a</s>")] * 2
    ((ids, labels),) = tokenize(COMPLETION, [{"prompt": "a", "completion": "b"}], tokenizer, 9)
    assert ids.tolist() == rule.encode("ab</s>") and (labels == -100).tolist() == [True, True, False, False]


def test_a_text_without_an_eos_token_gets_none(small, monkeypatch):
    tokenizer, rule = small
    monkeypatch.setitem(tokenizer.special, "eos_token", None)
    assert tokenize(TEXT, [{"text": "a"}], tokenizer, 9)[0][0].tolist() == rule.encode("a")


FORMED = {
    ALPACA: lambda i: {**RECORD, "output": str(i) * i},
    CHAT: lambda i: {"messages": [{"role": "user", "content": "a" * i}, {"role": "assistant", "content": str(i)}]},
    COMPLETION: lambda i: {"prompt": "a" * i, "completion": str(i)},
    TEXT: lambda i: {"text": str(i) * i},
    TOKENIZED: lambda i: {"input_ids": [1, i, 2], "labels": [-100, i, 2]},
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_records_are_asked_for_once_and_a_chunk_at_a_time(small, monkeypatch, form, chunk):
    """Each example is that of its record alone, and no more records than a chunk's are out at a time."""
    tokenizer, _ = small
    monkeypatch.setitem(tokenizer.config, "chat_template", TEMPLATE)
    monkeypatch.setattr(examples_module, "CHUNK", chunk)
    records = [FORMED[form](i) for i in range(12)]
    asked, done = 0, 0

    def stream():
        nonlocal asked
        for record in records:
            assert form == TOKENIZED or asked - done < chunk
            asked += 1
            yield record

    def progress(count: int) -> None:
        nonlocal done
        done += count

    got = tokenize(form, stream(), None if form == TOKENIZED else tokenizer, 150, progress)
    assert asked == len(got) == 12 and (form == TOKENIZED or done == 12)
    for i, record in enumerate(records):
        alone = tokenize(form, [record], tokenizer, 150)
        assert got[i][0].tolist() == alone[0][0].tolist() and got[i][1].tolist() == alone[0][1].tolist()
        assert (got[i][1] != -100).any()


def test_token_lists_are_not_held_twice(small):
    """Ids and labels of 4 bytes, a quarter more for how an array grows, and a megabyte for a chunk of 6,000 tokens; a
    list of ids would be 8 bytes a token, a second copy of the arrays 8 more."""
    tokenizer, _ = small
    records = [{"text": "ab " * 100}] * 2000
    tokens = 2000 * len(tokenize(TEXT, records[:1], tokenizer, 512)[0][0])
    assert tokens > 400_000
    examples_module.CHUNK, before = 20, examples_module.CHUNK
    tracemalloc.start()
    try:
        tokenize(TEXT, records, tokenizer, 512)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        examples_module.CHUNK = before
    assert peak < 8 * tokens * 1.25 + 1e6, f"{peak / tokens:.1f} bytes a token"


def test_what_is_read_as_tokens_is_not_held_twice():
    """As above; and checking them takes the memory of some examples, and 8 bytes an example."""
    record = {"input_ids": [7] * 100, "labels": [-100] + [7] * 99}
    monkey = pytest.MonkeyPatch()
    monkey.setattr(examples_module, "CHUNK", 20)
    tracemalloc.start()
    try:
        examples = from_tokenized(record for _ in range(5000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        checked = check_examples(examples, 10, "data.json")
        more = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
        monkey.undo()
    assert peak < 8 * 500_000 * 1.25 + 200_000, f"{peak / 500_000:.1f} bytes a token"
    assert more < 8 * 5000 + 200_000, f"{more / 500_000:.1f} bytes a token"
    assert np.shares_memory(checked.labels, examples.labels)
