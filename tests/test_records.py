"""The data file: good records come back as they stand, and every bad one is refused by its number, in one line.

A test writes one record a line, as an array or as JSONL, so that "record 3" and "line 3" are the same place (an array
has its opening bracket before the first record, on the same line).
"""

import gzip
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json
from llama_jax.data import readers
from llama_jax.data.examples import check_examples, from_tokenized
from llama_jax.data.records import read_records

TEXT: dict[str, Any] = {"instruction": "Add them.", "input": "1\n2", "output": "3"}
TOKENS: dict[str, Any] = {"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}
LAYOUTS = ("array", "jsonl")


def lay_out(lines: list[bytes], layout: str) -> bytes:
    return b"[" + b",\n".join(lines) + b"]\n" if layout == "array" else b"\n".join(lines)


def as_lines(records: list[Any]) -> list[bytes]:
    """Characters as they are, but half a pair, which UTF-8 lacks, as the escape that Python writes for it."""
    return [json.dumps(r, ensure_ascii="\\ud83d" in json.dumps(r)).encode() for r in records]


def write(path: Path, lines: list[bytes], layout: str) -> Path:
    path.write_bytes(lay_out(lines, layout))
    return path


def load(path: Path, vocab_size: int = 1 << 31) -> None:
    """Reading as the command does it: tokenised records go on into arrays before anything is compiled."""
    form, records = read_records(path)
    if form == "tokenized":
        check_examples(from_tokenized(records), vocab_size, str(path))


def refusal(path: Path) -> str:
    """What the user is told of a bad file, after the file's name."""
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: "), message
    return message.removeprefix(f"{path}: ")


def number_in(message: str) -> int:
    """The record that a message names."""
    found = re.search(r"\b(?:record|line) (\d+)", message)
    assert found, f"no record is named in: {message}"
    return int(found[1])


@pytest.mark.parametrize("records", [[TEXT], [TEXT, {"instruction": "Go.", "output": ""}] * 3, [TOKENS] * 4])
@pytest.mark.parametrize(
    "write_all",
    [
        lambda r: json.dumps(r),
        lambda r: json.dumps(r, indent=4, ensure_ascii=False),
        lambda r: " \n" * 2000 + json.dumps(r),
        lambda r: "\n".join(json.dumps(x) for x in r),
        lambda r: "\r\n".join(json.dumps(x) for x in r) + "\r\n",
        lambda r: "\n\n" + "\n \n\n".join(json.dumps(x) for x in r) + "\n\n",
    ],
    ids=["array", "indented", "far from the start", "jsonl", "jsonl of Windows", "jsonl with empty lines"],
)
def test_good_records_come_back_as_they_stand(tmp_path, records, write_all):
    path = tmp_path / "data.json"
    path.write_bytes(write_all(records).encode())
    form, got = read_records(path)
    assert (form, list(got)) == ("tokenized" if "labels" in records[0] else "alpaca", records)


words = st.text(max_size=20)
texts = st.builds(
    lambda base, more: {**more, **base},
    st.fixed_dictionaries({"instruction": words, "output": words}, optional={"input": words}),
    st.dictionaries(st.text("abc é", max_size=3), st.none() | st.integers() | words, max_size=2),
)
ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
tokens = ids.map(lambda x: {"input_ids": x, "labels": [-100, *x[1:]] if len(x) > 1 else x})


@given(st.lists(texts, min_size=1, max_size=6) | st.lists(tokens, min_size=1, max_size=6), st.sampled_from(LAYOUTS))
def test_any_text_survives(tmp_path, records, layout):
    """Newlines of Unicode inside a string do not end a line of JSONL."""
    path = write(tmp_path / "data.json", as_lines(records), layout)
    assert list(read_records(path)[1]) == without_nulls(records)


CHAT_KEYS = ("messages", "conversations", "prompt", "completion")
NOT_A_STRING = [None, True, 3, 2.5, ["a"], {"a": "b"}]
NOT_IDS = [None, 7, "1 2", {"0": 1}, [1, 5, None], [1, 5, 2.0], [True, 5, 2], ["1", 5, 2], [[1], [5], [2]]]
NOT_A_RECORD = [None, True, 3, 2.5, "text", [], [TEXT]]


def without_nulls(records: list[Any]) -> list[Any]:
    """Return the records as they should be read; turns are the only lists of objects."""
    return [
        {
            key: [{k: v for k, v in turn.items() if v is not None} for turn in value]
            if key in CHAT_KEYS and isinstance(value, list)
            else value
            for key, value in record.items()
            if value is not None
        }
        for record in records
    ]


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != key}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        *((TEXT, without(TEXT, key), key) for key in ("instruction", "output")),
        *((TEXT, {**TEXT, key: v}, key) for key in TEXT for v in NOT_A_STRING if (key, v) != ("input", None)),
        *((TEXT, {**TEXT, key: "half of a pair: \ud83d"}, key) for key in TEXT),
        *((TEXT, v, "object") for v in NOT_A_RECORD),
        (TEXT, {}, "instruction"),
        (TEXT, TOKENS, "instruction"),
        (TOKENS, TEXT, "input_ids"),
        *((TOKENS, without(TOKENS, key), key) for key in TOKENS),
        *((TOKENS, {**TOKENS, key: v}, key) for key in TOKENS for v in NOT_IDS),
        (TOKENS, {**TOKENS, "labels": [1, 2]}, "labels"),
        (TOKENS, {**TOKENS, "input_ids": [1, 2, 3, 4]}, "input_ids"),
        (TOKENS, {"input_ids": [], "labels": []}, "no tokens"),
        (TOKENS, {**TOKENS, "input_ids": [1, 5, 1 << 64]}, "token id"),
        (TOKENS, {**TOKENS, "labels": [1, 5, -1 << 64]}, "label"),
        *((TOKENS, v, "object") for v in NOT_A_RECORD),
        *((TEXT, {**TEXT, key: "x"}, repr(key)) for key in ("system", "images", "rejected", "tools")),
        (TEXT, {**TEXT, "history": [["Hi", "Hello"]]}, "'history'"),
        *(
            (TOKENS, {**TOKENS, "attention_mask": v}, "'attention_mask'")
            for v in (7, [1, 1], [1, 1, 2], [[1], [1], [1]])
        ),
        (TOKENS, {**TOKENS, "attention_mask": [1, 0, 1]}, "labels where 'attention_mask' is 0"),
        (TOKENS, {"input_ids": [1, 5, 2], "labels": [-100] * 3, "attention_mask": [1, 0, 1]}, "a 0 between tokens"),
        (TOKENS, {"input_ids": [1, 5, 2], "labels": [-100] * 3, "attention_mask": [0, 0, 0]}, "0 throughout"),
        *((TOKENS, {**TOKENS, key: [1, 1, 0]}, repr(key)) for key in ("completion_mask", "assistant_masks")),
        (TOKENS, {**TOKENS, "position_ids": [0, 1, 0]}, "restart at token 3"),
        *((TOKENS, {**TOKENS, "position_ids": v}, "'position_ids'") for v in (7, [0, 1], [1, 2, 3], [0, 2, 3])),
        (TOKENS, {**TOKENS, "seq_lengths": [2, 1]}, "'seq_lengths'"),
    ],
)
def test_a_bad_record_is_named(tmp_path, good, bad, named, layout):
    message = refusal(write(tmp_path / "data.json", as_lines([good, good, bad, good]), layout))
    assert re.search(r"\brecord 3\b", message), message
    assert named in message, message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [*NOT_A_RECORD, {}, without(TEXT, "output"), without(TOKENS, "labels")])
def test_a_bad_first_record_is_named_whatever_form_it_might_have(tmp_path, bad, layout):
    if isinstance(bad, list) and layout == "jsonl":
        pytest.skip("a file that begins with [ is an array")
    assert number_in(refusal(write(tmp_path / "data.json", as_lines([bad, TEXT]), layout))) == 1


def break_syntax(line: bytes) -> bytes:
    return line[:1] + b"@" + line[1:]


def break_utf8(line: bytes) -> bytes:
    """A byte that is UTF-8 nowhere, inside the first string of the record."""
    start = line.index(b'"') + 1
    return line[:start] + b"\xff" + line[start:]


def cut_utf8(line: bytes) -> bytes:
    """The last byte of a character is lost."""
    start = line.index(b'"') + 1
    return line[:start] + "é".encode()[:1] + line[start:]


def double_a_key(line: bytes) -> bytes:
    return b'{"instruction": "x", ' + line[1:]


def control_character(line: bytes) -> bytes:
    start = line.index(b'"') + 1
    return line[:start] + b"\x01" + line[start:]


def long_number(line: bytes) -> bytes:
    """More digits than Python turns into a number."""
    return b'{"extra": ' + b"9" * 5000 + b", " + line[1:]


def nest_deeply(line: bytes) -> bytes:
    return b'{"extra": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + line[1:]


BREAKS = [break_syntax, break_utf8, cut_utf8, double_a_key, control_character, long_number, nest_deeply]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("before", [0, 2, 500], ids=["first", "third", "far"])
def test_a_record_that_is_not_json_is_named(tmp_path, before, broken, layout):
    """500 records are more than a buffer of the file's decoder."""
    lines = as_lines([TEXT] * (before + 3))
    lines[before] = broken(lines[before])
    assert number_in(refusal(write(tmp_path / "data.json", lines, layout))) == before + 1


def corrupt_value(good: dict[str, Any]) -> st.SearchStrategy[Any]:
    """A record of the same form with one thing wrong."""
    keys = ("input_ids", "labels") if "labels" in good else ("instruction", "output")
    wrong = NOT_IDS if "labels" in good else NOT_A_STRING
    changes: list[st.SearchStrategy[Any]] = [
        st.sampled_from(keys).map(lambda key: without(good, key)),
        st.tuples(st.sampled_from(keys), st.sampled_from(wrong)).map(lambda change: {**good, change[0]: change[1]}),
        st.sampled_from(NOT_A_RECORD),
    ]
    if "labels" in good:
        changes.append(st.just({**good, "labels": good["labels"][1:]}))
        changes.append(st.just({**good, "input_ids": [*good["input_ids"], 1]}))
        changes.append(
            st.integers(0, len(good["input_ids"]) - 1).map(
                lambda at: {**good, "input_ids": [*good["input_ids"][:at], "1", *good["input_ids"][at + 1 :]]}
            )
        )
    return st.one_of(changes)


@settings(max_examples=300)
@given(st.data(), st.booleans(), st.sampled_from(LAYOUTS))
def test_any_corruption_of_one_record_is_found_at_its_number(tmp_path, data, tokenized, layout):
    records = data.draw(st.lists(tokens if tokenized else texts, min_size=2, max_size=8))
    at = data.draw(st.integers(1, len(records) - 1), label="at")
    records[at] = data.draw(corrupt_value(records[at]), label="corrupted")
    message = refusal(write(tmp_path / "data.json", as_lines(records), layout))
    assert number_in(message) == at + 1, message


@settings(max_examples=150)
@given(st.data(), st.sampled_from([b for b in BREAKS if b is not nest_deeply]), st.sampled_from(LAYOUTS))
def test_any_corruption_of_the_bytes_of_one_record_is_found_at_its_number(tmp_path, data, broken, layout):
    records = data.draw(st.lists(texts, min_size=1, max_size=8))
    at = data.draw(st.integers(0, len(records) - 1), label="at")
    lines = as_lines(records)
    lines[at] = broken(lines[at])
    assert number_in(refusal(write(tmp_path / "data.json", lines, layout))) == at + 1


@settings(max_examples=150)
@given(st.data(), st.booleans(), st.sampled_from(LAYOUTS))
def test_a_cut_file_is_refused_where_it_ends(tmp_path, data, tokenized, layout):
    """Whatever is left of a file that was not written to its end: the reader says at which line it broke off."""
    records = data.draw(st.lists(tokens if tokenized else texts, min_size=1, max_size=6))
    whole = lay_out(as_lines(records), layout)
    last = whole.rstrip().rfind(b"\n") + 1
    end = data.draw(st.integers(last + 1, len(whole.rstrip()) - 1), label="bytes kept")
    path = tmp_path / "data.json"
    path.write_bytes(whole[:end])
    assert number_in(refusal(path)) == len(records)


def missing(path: Path) -> None: ...


def folder(path: Path) -> None:
    path.mkdir()


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


OF_OTHER_KINDS = (b"instruction,output\na,b\n", gzip.compress(b"[]"), b"{'text': 'a'}\n", b'{\n "data": [1,\n')


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (missing, "no such data file"),
        (folder, "is a folder in which no data is found"),
        (content(b""), "empty"),
        (content(b" \n\n\t "), "empty"),
        (content(b"[]"), "no records"),
        (content(b" [ ] \n"), "no records"),
        (content(b"\xef\xbb\xbf[]"), "no records"),
        (content(b"\xef\xbb\xbf \n"), "empty"),
        (content(b"\x00\x00"), "not valid JSON"),
        (content(b'"text"'), "record 1 should be an object, not a string"),
        (content(json.dumps([TEXT]).encode() * 2), "Extra data"),
        (content(json.dumps(TEXT, indent=1).encode()), "one object of several lines"),
        (content(json.dumps([TEXT]).encode("utf-16")), "UTF-8"),
        (content(json.dumps({"data": [TEXT], "n": 1}, indent=1).encode()), "one object"),
        (content(json.dumps({"data": [TEXT], "n": 1}, indent=1).encode()), "(its keys: data, n)"),
        *((content(data), kind) for data in OF_OTHER_KINDS for kind in ("line 1", "JSONL", "parquet", ".txt")),
    ],
)
def test_a_file_that_holds_no_records_is_refused(tmp_path, make, says):
    path = tmp_path / "data.json"
    make(path)
    message = refusal(path)
    assert says.lower() in message.lower(), message


def test_keys_are_listed_in_one_line(tmp_path):
    path = write(tmp_path / "data.json", as_lines([{"a\nb": 1}]), "array")
    assert number_in(refusal(path)) == 1


def test_a_home_folder_is_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data.json", as_lines([TEXT]), "array")
    form, records = read_records(Path("~/data.json"))
    assert (form, list(records)) == ("alpaca", [TEXT])


# --- chats and texts

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é"}]}
SHAREGPT: dict[str, Any] = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "é"}]}
PLAIN: dict[str, Any] = {"text": "Once upon\na time"}
COMPLETION: dict[str, Any] = {"prompt": "Once upon", "completion": " a time"}
ASKED: dict[str, Any] = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
PART = {"type": "text", "text": "Hi"}
FLAGS = ("train", "training", "trainable", "loss", "weight")
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
    {"role": "tool", "content": "7", "name": "f"},
    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
]
NOT_TURNS = [None, 3, "Hi", [], {"role": "user"}, {}]


def with_turn(good: dict[str, Any], n: int, **changes: Any) -> dict[str, Any]:
    """The record with its turn n, from 0, changed; what is changed to ... is left out."""
    ((key, turns),) = good.items()
    turn = {k: v for k, v in {**turns[n], **changes}.items() if v is not ...}
    return {key: [*turns[:n], turn, *turns[n + 1 :]]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("form", "records"),
    [
        ("chat", [CHAT, SHAREGPT, {"messages": [CHAT["messages"][1]]}]),
        ("chat", [SHAREGPT, CHAT, {"messages": None, **SHAREGPT}, {**CHAT, "id": 3, "tools": []}]),
        ("chat", [{"conversations": CHAT["messages"]}, with_turn(CHAT, 1, tool_calls=None, name="x", weight=1)]),
        ("chat", [{"conversations": [{"from": f, "value": ""} for f in ("system", "user", "assistant")]}]),
        ("chat", [{"messages": CALLED, "tools": TOOLS}, {"messages": CALLED, "tools": json.dumps(TOOLS)}]),
        ("chat", [ASKED, CHAT, {**ASKED, "messages": None, "prompt": CALLED, "tools": TOOLS}]),
        ("chat", [with_turn(CHAT, 0, content=[PART]), with_turn(CHAT, 1, content=[{**PART, "cache_control": {}}])]),
        ("text", [PLAIN, {"text": ""}, {"text": "x", "instruction": "y"}, {**PLAIN, "prompt": "x"}]),
        ("completion", [COMPLETION, {"prompt": "", "completion": "", "text": "x", "history": []}]),
        (
            "chat",
            [with_turn(CHAT, 0, weight=1, train=False), {**SHAREGPT, "source": "x", "category": 3, "rejected": None}],
        ),
        ("alpaca", [{**TEXT, "text": "all of it"}, {**TEXT, "history": [], "system": "", "images": None, "id": 7}]),
        (
            "tokenized",
            [{**TOKENS, "attention_mask": [1, 1, 1], "position_ids": [0, 1, 2], "token_type_ids": [0, 0, 0]}],
        ),
        (
            "tokenized",
            [
                {"input_ids": [0, 1, 5], "labels": [-100, 1, 5], "attention_mask": m, "position_ids": p}
                for m in ([0, 1, 1], [False, True, True])
                for p in ([0, 1, 2], [1, 0, 1], None)
            ],
        ),
    ],
)
def test_the_first_record_tells_the_form(tmp_path, form, records, layout):
    path = write(tmp_path / "data.json", as_lines(records), layout)
    got_form, got = read_records(path)
    assert (got_form, list(got)) == (form, without_nulls(records))


HALF = "half of a pair: \ud83d"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        *((CHAT, other, "'messages' or 'conversations'") for other in (TEXT, TOKENS, PLAIN, {})),
        *((other, CHAT, "its keys: messages") for other in (TEXT, PLAIN)),
        (TOKENS, CHAT, "input_ids"),
        (TEXT, PLAIN, "instruction"),
        (PLAIN, TEXT, "'text'"),
        *((CHAT, {"messages": v}, "list of turns") for v in NOT_TURNS),
        *((CHAT, {"messages": [*CHAT["messages"], v]}, "turn 3") for v in (None, "Hi", ["user", "Hi"])),
        *((CHAT, with_turn(CHAT, 0, role=v), "turn 1") for v in (..., None, 3, "function", "User", "human", ["user"])),
        *((SHAREGPT, with_turn(SHAREGPT, 0, **{"from": v}), "turn 1") for v in (..., None, "bing", {"a": 1})),
        *((CHAT, with_turn(CHAT, 1, content=v), "'content' of turn 2") for v in (..., *NOT_A_STRING, HALF)),
        *((SHAREGPT, with_turn(SHAREGPT, 1, value=v), "'value' of turn 2") for v in (..., *NOT_A_STRING, HALF)),
        (CHAT, {"messages": CHAT["messages"][:1]}, "assistant"),
        *(
            (CHAT, with_turn(CHAT, 1, tool_calls=v), "tool in turn 2")
            for v in ([{}], [3], [{"name": 1}], {"name": "f"}, 3)
        ),
        (CHAT, with_turn(CHAT, 1, function_call={"name": "f"}), "'function_call' in turn 2"),
        *((CHAT, {**CHAT, "tools": v}, "'tools'") for v in ("[", "{}", [3], {"name": "f"})),
        *((CHAT, with_turn(CHAT, 1, **{key: v}), "each assistant turn off") for key in FLAGS for v in (0, False, 0.0)),
        *((SHAREGPT, with_turn(SHAREGPT, 1, **{key: 0}), "each assistant turn off") for key in FLAGS),
        *((CHAT, with_turn(CHAT, n, weight=v), f"'weight' of turn {n + 1}") for n in (0, 1) for v in (0.5, "1", [1])),
        (CHAT, with_turn(CHAT, 0, train=True), "'train' in turn 1"),
        (CHAT, with_turn(CHAT, 1, train_detail=[{"begin_offset": 0}]), "'train_detail' in turn 2"),
        *((CHAT, {**CHAT, key: "x"}, repr(key)) for key in ("tools", "functions", "system", "rejected", "images")),
        *((CHAT, v, "object") for v in NOT_A_RECORD),
        *((PLAIN, {"text": v}, "'text'") for v in (*NOT_A_STRING, HALF)),
        (CHAT, with_turn(CHAT, 0, content=[PART, PART]), "2 parts in 'content' of turn 1, should be one"),
        (CHAT, with_turn(CHAT, 0, content=[]), "0 parts in 'content' of turn 1"),
        (
            CHAT,
            with_turn(CHAT, 0, content=[{"type": "text"}]),
            "a part without 'text', or null, in 'content' of turn 1",
        ),
        (CHAT, with_turn(CHAT, 0, content=[PART, {"type": "image_url", "image_url": "x"}]), "type 'image_url'"),
        *((CHAT, with_turn(CHAT, 0, content=[v]), "without a 'type'") for v in (None, 3, "Hi", {"text": "Hi"})),
        (CHAT, with_turn(CHAT, 0, content=[{"type": "text", "text": 3}]), "'content' of turn 1"),
        (SHAREGPT, with_turn(SHAREGPT, 0, value=[PART]), "'value' of turn 1"),
        *((ASKED, {**ASKED, "completion": v}, "two such lists") for v in ("Hi", None, {"role": "user"})),
        (ASKED, COMPLETION, "has a text as 'prompt', and the first record a list"),
        (COMPLETION, ASKED, "has a list as 'prompt', and the first record a text"),
        *((good, {**good, "label": v}, "'label'") for good in (ASKED, COMPLETION) for v in (True, False)),
        (ASKED, {**ASKED, "prompt": [{**CHAT["messages"][0], "train": True}]}, "'train' in turn 1"),
        (ASKED, {**ASKED, "prompt": [{"role": "assistant", "content": "a", "loss": 1}]}, "none of a 'prompt'"),
        (ASKED, {**ASKED, "completion": []}, "assistant"),
        (ASKED, {"prompt": CHAT["messages"], "completion": ASKED["prompt"]}, "their place in 'prompt'"),
        (ASKED, {**ASKED, "completion": [{"role": "assistant"}]}, "'content' of turn 2"),
        *((COMPLETION, {**COMPLETION, k: v}, repr(k)) for k in COMPLETION for v in (None, *NOT_A_STRING, HALF)),
        *((COMPLETION, {**COMPLETION, key: "x"}, repr(key)) for key in ("system", "tools", "chosen", "images")),
    ],
)
def test_a_bad_chat_or_text_is_named(tmp_path, good, bad, named, layout):
    message = refusal(write(tmp_path / "data.json", as_lines([good, good, bad, good]), layout))
    assert re.search(r"\brecord 3\b", message), message
    assert named in message, message


def test_a_record_of_no_form_is_told_all_forms(tmp_path):
    message = refusal(write(tmp_path / "data.json", as_lines([{"prompt": "a", "answer": "b"}]), "jsonl"))
    assert number_in(message) == 1
    for key in ("prompt", "completion", "instruction", "output", "messages", "conversations", "text", "input_ids"):
        assert key in message


# --- plain text


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        ("\ufeffé \r\n\n \t \n  x\x0b\u2028y".encode(), ["é ", "  x\x0b\u2028y"]),
        (b'[\n{"text": 1}\nPAR1', ["[", '{"text": 1}', "PAR1"]),
        (b"PAR1\n", ["PAR1"]),
    ],
)
def test_each_line_of_a_text_file_is_a_record(tmp_path, data, lines):
    """But blank ones, whatever the text looks like; its line's end is no part of it."""
    (tmp_path / "data.txt").write_bytes(data)
    form, records = read_records(tmp_path / "data.txt")
    assert (form, list(records)) == ("text", [{"text": line} for line in lines])


@pytest.mark.parametrize("before", [0, 3, 500])
def test_a_text_file_that_is_not_utf8_is_refused_at_its_line(tmp_path, before):
    (tmp_path / "data.txt").write_bytes(b"a\n\n" * before + b"caf\xe9\n" + b"a\n")
    message = refusal(tmp_path / "data.txt")
    assert "UTF-8" in message and number_in(message) == 2 * before + 1


@pytest.mark.parametrize("data", [b"", b"\n \r\n"])
def test_a_text_file_without_text_is_refused(tmp_path, data):
    (tmp_path / "data.txt").write_bytes(data)
    assert "empty" in refusal(tmp_path / "data.txt")


# --- parquet, and files of which only the places of the records are kept


def write_parquet(path: Path, records: list[dict[str, Any]], group: int = 1000) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=group)
    return path


@pytest.mark.parametrize("form", ["alpaca", "chat", "sharegpt", "asked", "completion", "text", "tokenized"])
def test_parquet_holds_every_form(tmp_path, form):
    good = {"alpaca": TEXT, "chat": CHAT, "sharegpt": SHAREGPT, "asked": ASKED, "completion": COMPLETION}
    good = (good | {"text": PLAIN, "tokenized": TOKENS})[form]
    path = write_parquet(tmp_path / "data", [{"id": i, **good, "score": [0.5]} for i in range(5)], group=2)
    got_form, records = read_records(path)
    assert got_form == ("chat" if form in ("sharegpt", "asked") else form)
    assert list(records) == [good] * 5, "other columns are not read"


@pytest.mark.parametrize(
    ("good", "changes", "named"),
    [
        (TEXT, {"history": [["Hi", "Hello"]]}, "'history'"),
        (TOKENS, {"attention_mask": [1, 1, 0]}, "'attention_mask'"),
        (TOKENS, {"position_ids": [0, 1, 0]}, "'position_ids'"),
        (with_turn(CHAT, 1, train=True), with_turn(CHAT, 1, train=False), "each assistant turn off"),
    ],
)
def test_keys_that_change_the_training_are_not_filtered_out_of_parquet(tmp_path, good, changes, named):
    message = refusal(
        write_parquet(tmp_path / "data.parquet", [{**dict.fromkeys(changes), **good}] * 2 + [{**good, **changes}])
    )
    assert number_in(message) == 3 and named in message


def test_a_null_of_parquet_is_no_value(tmp_path):
    """A column is there in each row or in none."""
    records = [TEXT, {"instruction": "Go.", "output": ""}]
    assert list(read_records(write_parquet(tmp_path / "data.parquet", records))[1]) == records
    bad = [TEXT, {"instruction": "Go."}]
    message = refusal(write_parquet(tmp_path / "data.parquet", bad))
    assert number_in(message) == 2 and "'output'" in message


@pytest.mark.parametrize("at", [1, 2, 1999, 2000, 2500])
@pytest.mark.parametrize("column", ["text", "messages", "input_ids"])
def test_a_bad_row_is_named(tmp_path, at, column):
    good = {"text": PLAIN, "messages": CHAT, "input_ids": TOKENS}[column]
    bad = {
        "text": {},
        "messages": {"messages": CHAT["messages"][:1]},
        "input_ids": {"input_ids": [1], "labels": [1, 2]},
    }
    records = [good] * 2600
    records[at] = bad[column]
    assert number_in(refusal(write_parquet(tmp_path / "data", records, group=700))) == at + 1


@pytest.mark.parametrize("type_", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_strings_of_any_arrow_type_are_strings(tmp_path, type_):
    table = pyarrow.table({"text": pyarrow.array(["a", "é", "a"]).cast(type_)})
    parquet.write_table(table, tmp_path / "data")
    assert [r["text"] for r in read_records(tmp_path / "data")[1]] == ["a", "é", "a"]


@pytest.mark.parametrize("table", [{"text": [b"a"]}, {"text": [1]}, {"other": ["a"]}, {"input_ids": [[0.5]]}])
def test_columns_of_other_types_are_refused(tmp_path, table):
    parquet.write_table(pyarrow.table(table), tmp_path / "data")
    message = refusal(tmp_path / "data")
    assert number_in(message) == 1 and next(iter(table)) in message


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = write_parquet(tmp_path / "data", [{"text": str(i) * 50} for i in range(3000)])
    whole = path.read_bytes()
    for broken in (
        b"PAR1",
        whole[: len(whole) // 2],
        whole[:4] + b"\xff" * (len(whole) // 2) + whole[len(whole) // 2 :],
    ):
        path.write_bytes(broken)
        assert "parquet" in refusal(path)
    write_parquet(path, [])
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert "no records" in refusal(path)


bounds = st.none() | st.integers(-12, 12)


@settings(max_examples=200)
@given(
    count=st.integers(1, 9),
    group=st.integers(1, 9),
    rows=st.integers(1, 4),
    kind=st.sampled_from(["json", "jsonl", "txt", "parquet"]),
    cuts=st.lists(st.tuples(bounds, bounds), max_size=3),
    at=st.integers(-12, 12),
)
def test_records_are_a_sequence(tmp_path, count, group, rows, kind, cuts, at):
    """Parts of parts, from either end, over the edges of parquet's row groups and batches, are those of a list."""
    expected = [{"text": f"{i}é" * i + "."} for i in range(count)]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        write_parquet(path, expected, group)
    else:
        lines = [r["text"].encode() for r in expected] if kind == "txt" else as_lines(expected)
        path.write_bytes(lay_out(lines, "array") if kind == "json" else b"\n\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_ROWS", rows)
        got = read_records(path)[1]
        for start, stop in cuts:
            got, expected = got[start:stop], expected[start:stop]
        assert len(got) == len(expected)
        assert list(got) == list(got) == expected
        if -len(expected) <= at < len(expected):
            assert got[at] == expected[at]
        else:
            with pytest.raises(IndexError):
                got[at]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.txt"])
def test_a_file_is_not_held_in_memory(tmp_path, name):
    """Twenty megabytes of records take a few lines' memory: ten of 0.1 MB are allowed, for the buffers of one line."""
    record = "a" * 100_000 if name == "data.txt" else json.dumps({"text": "a" * 100_000})
    lines = [record.encode()] * 200
    (tmp_path / name).write_bytes(lay_out(lines, "array" if name == "data.json" else "jsonl"))
    tracemalloc.start()
    try:
        records = read_records(tmp_path / name)[1][1:]
        assert sum(len(record["text"]) for record in records) == 19_900_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_is_gone_is_told(tmp_path):
    path = write(tmp_path / "data.json", as_lines([PLAIN] * 3), "jsonl")
    records = read_records(path)[1]
    path.unlink()
    with pytest.raises(InputError, match=r"data\.json: cannot be read"):
        list(records)


def test_many_records_take_no_memory_but_for_their_places(tmp_path):
    """16 bytes a record, and half as much again for how an array grows; an object of two keys has more than 200."""
    count = 20_000
    for layout in LAYOUTS:
        path = write(tmp_path / "data.json", [b'{"text": "a", "more": 1}'] * count, layout)
        tracemalloc.start()
        try:
            records = read_records(path)[1]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(records) == count and peak < 24 * count + 300_000, f"{layout}: {peak / count:.0f} bytes a record"


# --- the elements of an array, against Python's own reading of the whole file

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('a"\\[]{},: \n\té☃', max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\[]{},é', max_size=3), inner, max_size=3),
    max_leaves=12,
)
marks = st.sampled_from([*'[]{},:"\\ \n\x0c1a', "true", "\\u00e9", '"a"', "é"])


@pytest.mark.slow
@settings(max_examples=500)
@given(
    elements=st.lists(values, max_size=4),
    indent=st.sampled_from([None, 2]),
    around=st.tuples(*[st.text(" \n\t\r", max_size=2)] * 2),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), marks), max_size=2),
)
def test_the_elements_of_an_array_are_those_of_the_whole_file(tmp_path, elements, indent, around, edits):
    """And where the file is not JSON, after a cut or an insertion anywhere, it is refused as reading the whole does."""
    text = around[0] + json.dumps(elements, indent=indent, ensure_ascii=False) + around[1]
    for share, cut, mark in edits:
        at = int(share * len(text))
        text = text[:at] + mark + text[at + cut :]
    assume(text.lstrip().startswith("["))
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        expected: Any = [readers.present(value) for value in read_json(path)]
    except InputError as e:
        expected = str(e)
    try:
        got: Any = list(readers.open_file(str(path), path, set()))
    except InputError as e:
        got = str(e)
    assert got == expected
