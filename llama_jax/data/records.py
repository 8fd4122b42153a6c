"""Read and validate the data file: every record is checked before tokenising begins."""

import json
import mmap
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, overload

from llama_jax.base.errors import InputError
from llama_jax.base.files import parse_json, read_json, read_json_object

Record = dict[str, Any]

ALPACA, CHAT, TEXT, TOKENIZED = "alpaca", "chat", "text", "tokenized"
FORMS = {  # a description of each for the user
    ALPACA: "instruction, input and output; the output is trained",
    CHAT: "turns through the tokenizer's chat template; the assistant's turns are trained",
    TEXT: "plain text with an eos; all of it is trained",
    TOKENIZED: "input_ids and labels, taken as they are",
}
OPENAI = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", **{role: role for role in OPENAI}}  # ShareGPT's names -> OpenAI's

_BLANK = b" \t\r\n"  # JSON's white space; Python's has more
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
# Match up to the next bracket or comma of JSON; an object of plain values is skipped whole.
_MARK = re.compile(rb'(?:[^]["{},]++|%s|\{(?:[^]["{}]++|%s)*+\})*+[][{},]' % (_STRING, _STRING), re.DOTALL)
_KINDS = "a JSON array, JSONL (an object a line), parquet, or a .txt file, not compressed"
_ROWS = 1000  # rows of a parquet file to hold as Python objects at a time

# Keys that change training where they hold a value, by form, with the fix.
_MOVE, _REMOVE = "move it into a system turn at the beginning", "remove such records"
_MEDIA = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "the model reads text alone")
_PAIRS = dict.fromkeys(("chosen", "rejected", "kto_tag"), "preferences are not trained; remove the key")
_AS_CHAT = "write the record as 'messages': a system turn, the earlier turns, then instruction and output"
_REFUSED = {
    ALPACA: {"history": _AS_CHAT, "system": _AS_CHAT, "system_prompt": _AS_CHAT, "tools": _REMOVE, **_MEDIA, **_PAIRS},
    CHAT: {**dict.fromkeys(("functions", "system", "system_prompt", "documents"), _MOVE), **_MEDIA, **_PAIRS},
    TEXT: _MEDIA,
    TOKENIZED: {
        "seq_lengths": "give each document a record of its own: documents are packed side by side anyway",
        **dict.fromkeys(("pixel_values", "inputs_embeds"), "the model reads input_ids alone"),
    },
}
_FLAGS = (
    "train",
    "training",
    "trainable",
    "loss",
    "loss_scale",
    "weight",
)  # switches of a turn (axolotl, OpenAI, swift)
_MASKS = ("attention_mask", "completion_mask", "assistant_masks")  # 0 at tokens whose label must be -100
_COLUMNS = {
    *("instruction", "input", "output", "messages", "conversations", "text", "input_ids", "labels", "position_ids"),
    *_MASKS,
    *(key for keys in _REFUSED.values() for key in keys),
}


def read_records(path: Path) -> tuple[str, Sequence[Record]]:
    """Return the form of a file's records, one of `FORMS`, by the first record, and the records.

    The file is a JSON array, JSONL or parquet. A file whose name ends in `.txt` is text, with a record on each line
    that is not blank. Records hold:

    - "alpaca": the strings `instruction`, `output` and perhaps `input`;
    - "chat": a list `messages` of `role` and `content`, or `conversations` of `from` and `value`;
    - "text": a string `text`;
    - "tokenized": the integer lists `input_ids` and `labels` of equal length, perhaps with an `attention_mask` that is
      0 at pads, before or after the tokens.

    A key that would change the training and is not supported is refused; other keys are passed over.
    A null in parquet is an absent value. Records are read on access; only their places are held in memory. Raises an
    InputError that names the file, and the record by number from 1.
    """
    path = path.expanduser()
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the data file in it (JSON, JSONL, parquet or .txt)")
    if not path.is_file():
        raise InputError(f"{path}: no such data file")
    records = _open(path)
    if not len(records):
        raise InputError(f"{path}: holds no records")
    form = None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            problem: str | None = f"should be an object, not {_kind(record)}"
        elif form := form or _form(record):
            problem = _refused(form, record) or _CHECKS[form](record)
        else:
            problem = (
                f"is of no known form{_keys(record)}; should have 'instruction' and 'output', 'messages', "
                "'conversations', 'text', or 'input_ids' and 'labels'"
            )
        if problem:
            raise InputError(f"{path}: record {number} {problem}")
    assert form
    return form, records


def messages(record: Record) -> list[dict[str, Any]]:
    """Return the turns of a chat record as `role` and `content`; other keys of OpenAI's form stay, nulls do not."""
    return [
        {k: v for k, v in turn.items() if v is not None}
        if "role" in turn
        else {"role": SHAREGPT[turn["from"]], "content": turn["value"]}
        for turn in record.get("messages") or record["conversations"]
    ]


def answers(record: Record) -> list[bool]:
    """Return for each assistant turn of a chat record whether it is trained: no flag of the turn is false or 0."""
    return [_is_trained(turn) for turn in record.get("messages") or record["conversations"] if _is_assistant(turn)]


def tools(record: Record) -> list[dict[str, Any]]:
    """Return the tools that a chat record offers, which may be written as a string of JSON."""
    value = record.get("tools") or []
    return json.loads(value) if isinstance(value, str) else value


def unpadded(record: Record) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a tokenised record, without the pads at either end that its mask marks by 0."""
    part = _tokens(record)
    return record["input_ids"][part], record["labels"][part]


class _Lines(Sequence[Record]):
    """Read records that are lines, parsing each on access."""

    def __init__(self, path: Path, parse: Callable[[bytes, str, int], Any], starts: "array[int]", sizes: "array[int]"):
        self._path, self._parse, self._starts, self._sizes = path, parse, starts, sizes

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> "_Lines": ...
    def __getitem__(self, i: int | slice) -> "Record | _Lines":
        if isinstance(i, slice):
            return type(self)(self._path, self._parse, self._starts[i], self._sizes[i])
        at = range(len(self))[i]
        return next(iter(self[at : at + 1]))

    def __iter__(self) -> Iterator[Record]:
        try:
            with self._path.open("rb") as file:
                for start, size in zip(self._starts, self._sizes, strict=True):
                    file.seek(start)
                    line = file.read(size)
                    try:
                        record = self._parse(line, str(self._path), 1)
                    except InputError:
                        self._refuse(line, start, file)
                        raise
                    yield record
        except OSError as e:
            raise InputError(f"{self._path}: cannot be read: {e.strerror}") from None

    def _refuse(self, line: bytes, start: int, file: BinaryIO) -> None:
        """Raise the InputError of a bad line again, with the line's number."""
        file.seek(0)
        number = 1
        while file.tell() < start:
            file.readline()
            number += 1
        try:
            self._parse(line, str(self._path), number)
        except InputError as e:
            if number > 1 or self._parse is _parse_text:
                raise
            # The file may not be JSONL at all.
            if line.lstrip().startswith(b"{") and (keys := _keys_of_one(self._path)) is not None:
                one = f"{self._path}: holds one object of several lines{keys}"
                raise InputError(f"{one}; should be a JSON array, or JSONL (an object a line)") from None
            raise InputError(f"{e}; should be {_KINDS}") from None


class _Elements(_Lines):
    """Read records that are the elements of a JSON array, parsing each on access."""

    def _refuse(self, line: bytes, start: int, file: BinaryIO) -> None:
        read_json(self._path)  # parsing the whole file finds line and column


class _Rows(Sequence[Record]):
    """Read records that are rows of a parquet file, in batches on access."""

    def __init__(self, path: Path, span: range | None = None):
        self._path = path
        if span is None:
            with self._file() as file:
                span = range(file.metadata.num_rows)
        self._span = span

    def __len__(self) -> int:
        return len(self._span)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> "_Rows": ...
    def __getitem__(self, i: int | slice) -> "Record | _Rows":
        if isinstance(i, slice):
            assert i.step in (None, 1)  # rows are read in contiguous runs
            return _Rows(self._path, self._span[i])
        at = range(len(self))[i]
        return next(iter(self[at : at + 1]))

    def __iter__(self) -> Iterator[Record]:
        with self._file() as file:
            starts = [0]
            for group in range(file.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            first = max(0, bisect_right(starts, self._span.start) - 1)
            at, groups = starts[first], range(first, file.num_row_groups)
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS] or None
            for batch in file.iter_batches(_ROWS, groups, columns):
                if at >= self._span.stop:
                    return
                for row in batch[max(0, self._span.start - at) : self._span.stop - at].to_pylist():
                    yield {key: value for key, value in row.items() if value is not None}
                at += batch.num_rows

    @contextmanager
    def _file(self) -> Iterator[Any]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self._path) as file:
                yield file
        except (OSError, pyarrow.ArrowException) as e:
            raise InputError(f"{self._path}: cannot be read as a parquet file ({str(e).splitlines()[0]})") from None


def _keys_of_one(path: Path) -> str | None:
    """Return the keys of a file that is one JSON object, as text for an error; None for other files."""
    try:
        return _keys(read_json_object(path))
    except InputError:
        return None


def _open(path: Path) -> Sequence[Any]:
    try:
        with path.open("rb") as file:
            while (start := file.read(1024)) and not start.strip():
                pass
            if not start:
                raise InputError(f"{path}: the file is empty")
            text = path.suffix == ".txt"
            if not text and start.startswith(b"PAR1"):
                return _Rows(path)
            if not text and start.lstrip().startswith(b"["):
                return _elements(path)
            file.seek(0)
            starts, sizes, at = array("q"), array("q"), 0
            for line in file:
                if line.strip():
                    starts.append(at)
                    sizes.append(len(line))
                at += len(line)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    return _Lines(path, _parse_text if text else _parse_line, starts, sizes)


def _elements(path: Path) -> Sequence[Any]:
    """Find the elements of a JSON array by its commas; each is parsed, and so checked, on access.

    Raises InputError where the file is no array.
    """
    starts, sizes, start, depth, at = array("q"), array("q"), 0, 0, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while mark := _MARK.match(data, at):
            at = mark.end()
            kind = data[at - 1 : at]
            if depth == 1 and kind in b",]":
                starts.append(start)
                sizes.append(at - 1 - start)
            depth += (kind in b"[{") - (kind in b"]}")
            if depth == 1 and kind in b"[,":
                start = at
            if depth == 0:
                break
        if depth or kind != b"]" or (data[: starts[0] - 1] + data[at:]).strip(_BLANK):
            return read_json(path)  # raises an error with line and column
        if len(starts) == 1 and not data[starts[0] : at - 1].strip(_BLANK):
            return []
    return _Elements(path, _parse_line, starts, sizes)


def _parse_line(line: bytes, where: str, number: int) -> Any:
    return parse_json(line.rstrip(b"\r\n"), where, number)


def _parse_text(line: bytes, where: str, number: int) -> Record:
    try:
        return {TEXT: line.rstrip(b"\r\n").decode("utf-8-sig")}
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not UTF-8 at line {number}: {e.reason}") from None


def _form(record: Record) -> str | None:
    """Return the form by the most specific key, as Alpaca's records may have a `text` too."""
    keys = {"input_ids": TOKENIZED, "messages": CHAT, "conversations": CHAT, "instruction": ALPACA, "text": TEXT}
    return next((form for key, form in keys.items() if key in record), None)


def _refused(form: str, record: Record) -> str | None:
    for key, fix in _REFUSED[form].items():
        if record.get(key) not in (None, "", [], {}):
            return f"has {key!r}, which is not supported in {form} records: {fix}"
    return None


def _check_alpaca(record: Record) -> str | None:
    for key in ("instruction", "input", "output"):
        if key not in record:
            if key == "input":
                continue
            return f"has no {key!r}{_keys(record)}"
        if problem := _check_string(record[key], repr(key)):
            return problem
    return None


def _check_text(record: Record) -> str | None:
    return _check_string(record["text"], "'text'") if "text" in record else f"has no 'text'{_keys(record)}"


def _check_chat(record: Record) -> str | None:
    turns = record.get("messages") or record.get("conversations")
    if not isinstance(turns, list):
        return f"needs 'messages' or 'conversations', a list of turns{_keys(record)}"
    if problem := _check_tools(record):
        return problem
    for n, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            return f"has {_kind(turn)} as turn {n}, should be an object"
        name, text, known = ("role", "content", OPENAI) if "role" in turn else ("from", "value", tuple(SHAREGPT))
        role = turn.get(name)
        if role not in known:
            return f"has the {name!r} {str(role)[:40]!r} in turn {n}, should be one of {', '.join(known)}"
        if turn.get("function_call"):
            return f"has 'function_call' in turn {n}, which is not supported; write it as 'tool_calls'"
        if problem := _check_tool_calls(turn.get("tool_calls"), n):
            return problem
        calls_only = turn.get("tool_calls") and turn.get(text) is None
        if not calls_only and (problem := _check_string(turn.get(text), f"{text!r} of turn {n}")):
            return problem
        if problem := _check_flags(turn, n):
            return problem
    if not any(map(_is_assistant, turns)):
        return "has no turn of the assistant, so there is nothing to train"
    return None if any(answers(record)) else "trains no turn: the flags of its turns switch each assistant turn off"


def _check_flags(turn: dict[str, Any], n: int) -> str | None:
    for key in _FLAGS:
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            return f"has {str(value)[:40]!r} as {key!r} of turn {n}, should be true or false (1 or 0)"
        if value and key != "weight" and not _is_assistant(turn):  # a weight counts on assistant turns alone
            return f"has {key!r} in turn {n}, but only turns of the assistant are trained; remove the key there"
    if turn.get("train_detail"):
        return f"has 'train_detail' in turn {n}, which is not supported; train the whole turn, or split it"
    return None


def _is_assistant(turn: dict[str, Any]) -> bool:
    return (turn["role"] if "role" in turn else turn["from"]) in ("assistant", "gpt")


def _is_trained(turn: dict[str, Any]) -> bool:
    return not any(turn.get(key) == 0 for key in _FLAGS)


def _check_tools(record: Record) -> str | None:
    try:
        value = tools(record)
    except ValueError:
        value = None
    if isinstance(value, list) and all(isinstance(tool, dict) for tool in value):
        return None
    return "should have as 'tools' a list of objects, which may be a string of JSON"


def _check_tool_calls(calls: Any, n: int) -> str | None:
    for call in calls if isinstance(calls, list) else [calls] if calls else []:
        function = call.get("function", call) if isinstance(call, dict) and isinstance(calls, list) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return f"calls a tool in turn {n} by no name; 'tool_calls' should be a list of objects that name a function"
    return None


def _check_string(value: Any, name: str) -> str | None:
    if not isinstance(value, str):
        return f"has {_kind(value)} as {name}, should be a string"
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        return f"has half a surrogate pair in {name}, which is not a character"
    return None


def _keys(record: Record) -> str:
    return f" (its keys: {', '.join(map(str, record)) or 'none'})"


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
    return _check_masks(record) or _check_positions(record)


def _check_masks(record: Record) -> str | None:
    for key in _MASKS:
        mask, labels = record.get(key), record["labels"]
        if mask is None:
            continue
        if not isinstance(mask, list) or mask.count(0) + mask.count(1) != len(mask):
            return f"has {key!r}, but not as a list of 0 and 1"
        if len(mask) != len(labels):
            return f"has {len(labels)} input_ids but {len(mask)} values in {key!r}"
        if 0 in mask and any(label != -100 for m, label in zip(mask, labels, strict=True) if not m):
            return f"has labels where {key!r} is 0; set these labels to -100"
    mask = record.get("attention_mask") or [1]
    if 1 not in mask:
        return "has no tokens: its 'attention_mask' is 0 throughout"
    if 0 in mask[_tokens(record)]:
        return "has a 0 between tokens in its 'attention_mask', which is not supported; only pads at the ends are"
    return None


def _check_positions(record: Record) -> str | None:
    positions = record.get("position_ids")
    if positions is None:
        return None
    if not isinstance(positions, list) or len(positions) != len(record["input_ids"]):
        return "has 'position_ids', but not as a list with an integer for each token"
    part = _tokens(record)
    found = positions[part]
    if found in ([*range(len(found))], [*range(part.start, part.stop)]):
        return None
    if 0 in found[1:]:
        return (
            f"has 'position_ids' that restart at token {found.index(0, 1) + 1}, which is not supported; give each "
            "document a record of its own: documents are packed side by side anyway"
        )
    return "has 'position_ids' that do not count the tokens from 0, which is not supported; leave the key out"


def _tokens(record: Record) -> slice:
    """Return the part of a tokenised record between the pads."""
    mask = record.get("attention_mask")
    if mask is None or 0 not in mask:
        return slice(0, len(record["input_ids"]))
    return slice(mask.index(1), len(mask) - mask[::-1].index(1))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


_CHECKS = {ALPACA: _check_alpaca, CHAT: _check_chat, TEXT: _check_text, TOKENIZED: _check_tokenized}
