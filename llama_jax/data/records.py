"""Reading and validating the data file: every record is known to be good before anything is tokenised."""

from pathlib import Path
from typing import Any

from llama_jax.errors import InputError
from llama_jax.files import parse_json, read_json

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
    try:
        with path.open("rb") as file:
            while (start := file.read(1024)) and not start.strip():
                pass
            if not start:
                raise InputError(f"{path}: the file is empty")
            if start.lstrip().startswith(b"["):
                return read_json(path)
            file.seek(0)
            lines = enumerate(file, start=1)
            return [parse_json(line.rstrip(b"\r\n"), str(path), number) for number, line in lines if line.strip()]
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None


def _check_alpaca(record: Record) -> str | None:
    for key in ("instruction", "input", "output"):
        if key not in record:
            if key == "input":
                continue
            return f"has no {key!r} (its keys: {', '.join(map(str, record)) or 'none'})"
        if not isinstance(record[key], str):
            return f"has {_kind(record[key])} as {key!r}, should be a string"
        if not record[key].isascii() and _half_pair(record[key]):
            return f"has half a surrogate pair in {key!r}, which is no character"
    return None


def _half_pair(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _check_tokenized(record: Record) -> str | None:
    for key in ("input_ids", "labels"):
        value = record.get(key)
        if not isinstance(value, list) or not all(type(x) is int for x in value):
            return f"needs {key!r}, a list of integers"
        if large := [x for x in value if abs(x) >= 2**31]:
            return f"has the {'label' if key == 'labels' else 'token id'} {large[0]}, which no vocabulary holds"
    if len(record["input_ids"]) != len(record["labels"]):
        return f"has {len(record['input_ids'])} input_ids but {len(record['labels'])} labels"
    if not record["input_ids"]:
        return "has no tokens"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
