"""The data file: good records come back as they stand, and every bad one is refused by its number, in one line.

A test writes one record a line, as an array or as JSONL, so that "record 3" and "line 3" are the same place (an array
has its opening bracket before the first record, on the same line).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.examples import check_examples, from_tokenized
from llama_jax.data.records import read_records
from llama_jax.errors import InputError

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
    assert read_records(path) == ("tokenized" if "labels" in records[0] else "alpaca", records)


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
    assert read_records(path)[1] == records


NOT_A_STRING = [None, True, 3, 2.5, ["a"], {"a": "b"}]
NOT_IDS = [None, 7, "1 2", {"0": 1}, [1, 5, None], [1, 5, 2.0], [True, 5, 2], ["1", 5, 2], [[1], [5], [2]]]
NOT_A_RECORD = [None, True, 3, 2.5, "text", [], [TEXT]]


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != key}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        *((TEXT, without(TEXT, key), key) for key in ("instruction", "output")),
        *((TEXT, {**TEXT, key: v}, key) for key in TEXT for v in NOT_A_STRING),
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


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (missing, "no such data file"),
        (folder, "no such data file"),
        (content(b""), "empty"),
        (content(b" \n\n\t "), "empty"),
        (content(b"[]"), "no records"),
        (content(b" [ ] \n"), "no records"),
        (content(b"\xef\xbb\xbf[]"), "BOM"),
        (content(b"\x00\x00"), "not valid JSON"),
        (content(b'"text"'), "record 1 should be an object, not a string"),
        (content(json.dumps([TEXT]).encode() * 2), "Extra data"),
        (content(json.dumps(TEXT, indent=1).encode()), "line 1"),
        (content(json.dumps([TEXT]).encode("utf-16")), "UTF-8"),
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
    assert read_records(Path("~/data.json")) == ("alpaca", [TEXT])
