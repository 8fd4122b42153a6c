"""Reading and validating the data file: every record is known to be good before anything is tokenised."""

import json
from pathlib import Path
from typing import Any

from llama_jax.errors import InputError
from llama_jax.files import read_json

Record = dict[str, Any]

ALPACA, TOKENIZED = "alpaca", "tokenized"


def read_records(path: Path) -> tuple[str, list[Record]]:
    """The records of a JSON array or of a JSONL file, and their form: "alpaca" or "tokenized" (by the first record).

    Alpaca records hold the strings `instruction`, `output` and perhaps `input`; tokenised ones the integer lists
    `input_ids` and `labels` of equal length. Raises InputError that names the file and the record by number, from 1.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such data file")
    records = _read(path)
    if not records:
        raise InputError(f"{path}: holds no records")
    first = records[0] if isinstance(records[0], dict) else {}
    form = TOKENIZED if "input_ids" in first else ALPACA
    check = _check_tokenized if form == TOKENIZED else _check_alpaca
    for number, record in enumerate(records, start=1):
        problem = check(record) if isinstance(record, dict) else f"should be an object, not {_kind(record)}"
        if problem:
            raise InputError(f"{path}: record {number} {problem}")
    return form, records


def _read(path: Path) -> list[Any]:
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(1024).lstrip()
    if not start:
        raise InputError(f"{path}: the file is empty")
    if start[0] == "[":
        return read_json(path)
    records = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):  # noqa: B007  # the error below names it
                if line.strip():
                    records.append(json.loads(line))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: line {number} is not valid JSON at column {e.colno}: {e.msg}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is not UTF-8 text: {e.reason} at byte {e.start}") from None
    return records


def _check_alpaca(record: Record) -> str | None:
    for key in ("instruction", "input", "output"):
        if key not in record:
            if key == "input":
                continue
            return f"has no {key!r} (its keys: {', '.join(map(str, record)) or 'none'})"
        if not isinstance(record[key], str):
            return f"has {_kind(record[key])} as {key!r}, should be a string"
    return None


def _check_tokenized(record: Record) -> str | None:
    for key in ("input_ids", "labels"):
        value = record.get(key)
        if not isinstance(value, list) or not all(type(x) is int for x in value):
            return f"needs {key!r}, a list of integers"
    if len(record["input_ids"]) != len(record["labels"]):
        return f"has {len(record['input_ids'])} input_ids but {len(record['labels'])} labels"
    if not record["input_ids"]:
        return "has no tokens"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
