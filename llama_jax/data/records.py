"""Validate the data: every record is checked before tokenising begins."""

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.base.errors import InputError
from llama_jax.base.files import parse_json
from llama_jax.data.readers import Elements, Joined, Kept, Reader, Record
from llama_jax.data.sources import Source, find_sources

ALPACA, CHAT, COMPLETION, TEXT, TOKENIZED = "alpaca", "chat", "completion", "text", "tokenized"
FORMS = {  # a description of each for the user
    ALPACA: "instruction, input and output; the output is trained",
    CHAT: "turns through the tokenizer's chat template; the assistant's turns are trained",
    COMPLETION: "a prompt and its completion with an eos, one text; the completion is trained",
    TEXT: "plain text with an eos; all of it is trained",
    TOKENIZED: "input_ids and labels, taken as they are",
}
OPENAI = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", **{role: role for role in OPENAI}}  # ShareGPT's names -> OpenAI's

SHOWN, LONGEST = 3, 150  # bad records to name, and characters of each problem

# Keys that change training where they hold a value, by form, with the fix.
_MOVE, _REMOVE = "move it into a system turn at the beginning", "remove such records"
_MEDIA = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "the model reads text alone")
_PAIRS = dict.fromkeys(("chosen", "rejected", "kto_tag"), "preferences are not trained; remove the key")
_AS_CHAT = "write the record as 'messages': a system turn, the earlier turns, then instruction and output"
_REFUSED = {
    ALPACA: {"history": _AS_CHAT, "system": _AS_CHAT, "system_prompt": _AS_CHAT, "tools": _REMOVE, **_MEDIA, **_PAIRS},
    COMPLETION: {
        **dict.fromkeys(("history", "system", "system_prompt"), "write 'prompt' and 'completion' as lists of turns"),
        **{"tools": _REMOVE, "label": _PAIRS["kto_tag"], **_MEDIA, **_PAIRS},
    },
    CHAT: {**dict.fromkeys(("functions", "system", "system_prompt", "documents"), _MOVE), **_MEDIA, **_PAIRS},
    TEXT: _MEDIA,
    TOKENIZED: {
        "seq_lengths": "give each document a record of its own: documents are packed side by side anyway",
        **dict.fromkeys(("pixel_values", "inputs_embeds"), "the model reads input_ids alone"),
    },
}
# Switches of a turn, by axolotl, OpenAI and swift.
_FLAGS = ("train", "training", "trainable", "loss", "loss_scale", "weight")
_MASKS = ("attention_mask", "completion_mask", "assistant_masks")  # 0 at tokens whose label must be -100
_COLUMNS = {
    *("instruction", "input", "output", "messages", "conversations", "prompt", "completion", "text"),
    *("input_ids", "labels", "position_ids"),
    *_MASKS,
    *(key for keys in _REFUSED.values() for key in keys),
}


class Bad:
    """Collect the problems of bad records: the first few, and the number of all.

    With `skip` bad records are left out, else `refuse` raises. `dropped` are the places of records that `tokenize` left
    out.
    """

    def __init__(self, skip: bool = False):
        self.skip, self.count = skip, 0
        self.dropped: list[int] = []
        self._first: list[tuple[str, str]] = []

    def add(self, source: str, problem: str) -> None:
        """Note the problem of a record of a file."""
        self.count += 1
        if len(self._first) < SHOWN:
            self._first.append((source, problem))

    def refuse(self, total: int) -> None:
        """Raise InputError where a record of `total` is bad and none may be left out."""
        if self.count and not self.skip:
            more = f"; {self.count:,} of {total:,} records are bad" if self.count > 1 else ""
            raise InputError(f"{self}{more} (--skip_bad_records True leaves bad records out)")

    def __str__(self) -> str:
        if self.count == 1:
            return ": ".join(self._first[0])
        problems, last = [], None
        for source, problem in self._first:
            problems.append(f"{source}: " * (source != last) + problem[:LONGEST] + "..." * (len(problem) > LONGEST))
            last = source
        return "; ".join(problems)


def read_records(data: Path | Sequence[Source], bad: Bad | None = None) -> tuple[str, Reader]:
    """Return the form of the records, one of `FORMS`, by the first record, and the records of all sources, in order.

    Records hold:

    - "alpaca": the strings `instruction`, `output` and perhaps `input`;
    - "chat": a list `messages` of `role` and `content`, or `conversations` of `from` and `value`, or the lists `prompt`
      and `completion`, of which the second is trained;
    - "completion": the strings `prompt` and `completion`;
    - "text": a string `text`;
    - "tokenized": the integer lists `input_ids` and `labels` of equal length, perhaps with an `attention_mask` that is
      0 at pads, before or after the tokens.

    A key that would change the training and is not supported is refused; other keys are passed over. A null is an
    absent value. Records are read on access; only their places are held in memory. Bad records are left out where `bad`
    skips; else an InputError names the first ones by file and by number from 1. Raises InputError.
    """
    sources = find_sources([str(data)]) if isinstance(data, Path) else data
    bad = bad or Bad()
    form, total, readers, first = None, 0, [], sources[0].name
    for source in sources:
        reader = source.open(_COLUMNS)
        if len(sources) == 1 and not len(reader):
            raise InputError(f"{source.name}: holds no records")
        total += len(reader)
        form, good = _validated(source.name, reader, form, bad, first)
        readers.append(good)
    bad.refuse(total)
    if not form or not any(map(len, readers)):
        raise InputError(f"{first}: holds no good records{f' ({bad})' if bad.count else ''}")
    return form, readers[0] if len(readers) == 1 else Joined(readers)


def _validated(name: str, reader: Reader, form: str | None, bad: Bad, first: str) -> tuple[str | None, Reader]:
    """Return the form of a source's records, and the good ones. Raises InputError."""
    places: array[int] | None = None
    for at, record in enumerate(reader.scan()):
        problem: str | None
        if isinstance(record, InputError):
            if not bad.skip and isinstance(reader, Elements):
                reader.refuse()
            if not bad.skip and at == 0:
                raise record
            problem = str(record).removeprefix(f"{name}: ")
        elif not isinstance(record, dict):
            problem = f"record {at + 1} should be an object, not {kind(record)}"
        elif form := form or _form(record):
            problem = refused_key(form, record) or _CHECKS[form](record)
            if problem and at == 0 and name != first and (own := _form(record)) not in (None, form):
                raise InputError(f"{name}: holds {own} records, and {first} {form} ones; should be of one form")
            problem = problem and f"record {at + 1} {problem}"
        else:
            problem = (
                f"record {at + 1} is of no known form{named_keys(record)}; should have 'instruction' and 'output', "
                "'messages', 'conversations', 'prompt' and 'completion', 'text', or 'input_ids' and 'labels'"
            )
            if not bad.skip:
                raise InputError(f"{name}: {problem}")
        if problem:
            bad.add(name, problem)
            places = array("q", range(at)) if places is None else places
        elif places is not None:
            places.append(at)
    return form, reader if places is None else Kept(reader, places)


def without(records: Reader, dropped: Iterable[int]) -> Reader:
    """Return the records but for those at some places."""
    gone = set(dropped)
    return Kept(records, array("q", (i for i in range(len(records)) if i not in gone))) if gone else records


def messages(record: Record) -> list[dict[str, Any]]:
    """Return the turns of a chat record as `role` and `content`, a text; other keys of OpenAI's form stay, nulls do
    not."""
    return [
        {k: _text(v) if k == "content" else v for k, v in turn.items() if v is not None}
        if "role" in turn
        else {"role": SHAREGPT[turn["from"]], "content": turn["value"]}
        for turn in _turns(record)
    ]


def answers(record: Record) -> list[bool]:
    """Return for each assistant turn of a chat record whether it is trained: no flag of the turn is false or 0, and it
    is in no `prompt`."""
    asked, turns = _asked(record), _turns(record)
    return [n >= asked and _is_trained(turn) for n, turn in enumerate(turns) if is_assistant(turn)]


def tools(record: Record) -> list[dict[str, Any]]:
    """Return the tools that a chat record offers, which may be written as a string of JSON. Raises InputError."""
    value = record.get("tools") or []
    return (
        parse_json(value.encode(errors="surrogatepass"), "'tools'", repeats=True) if isinstance(value, str) else value
    )


def unpadded(record: Record) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a tokenised record, without the pads at either end that its mask marks by 0."""
    part = _tokens(record)
    return record["input_ids"][part], record["labels"][part]


def _form(record: Record) -> str | None:
    """Return the form by the most specific key, as Alpaca's records may have a `text` too."""
    keys = {"input_ids": TOKENIZED, "messages": CHAT, "conversations": CHAT, "instruction": ALPACA}
    if form := next((form for key, form in keys.items() if key in record), None):
        return form
    if "prompt" in record and "completion" in record:
        return CHAT if isinstance(record["prompt"], list) else COMPLETION
    return TEXT if "text" in record else None


def _turns(record: Record) -> Any:
    """Return the turns of a chat record, None where it has no list of them."""
    if turns := _listed(record):
        return turns
    prompt, completion = record.get("prompt"), record.get("completion")
    return prompt + completion if isinstance(prompt, list) and isinstance(completion, list) else None


def _asked(record: Record) -> int:
    """Return how many of the turns are in TRL's `prompt`, and so are not trained."""
    return 0 if _listed(record) else len(record["prompt"])


def _listed(record: Record) -> Any:
    """Return the turns of a chat record that has them in one list, else None."""
    return record.get("messages") or record.get("conversations")


def _text(content: Any) -> Any:
    """Return the text of a turn's content, which OpenAI's form may have as a list of one part."""
    return content[0]["text"] if isinstance(content, list) else content


def refused_key(form: str, record: Record) -> str | None:
    """Return the problem of a key that would change the record's text and is not supported."""
    refused = _REFUSED[form]
    for key in record:
        if key in refused and record[key] not in (None, "", [], {}):
            return f"has {key!r}, which is not supported in {form} records: {refused[key]}"
    return None


def _check_alpaca(record: Record) -> str | None:
    for key in ("instruction", "input", "output"):
        if key not in record:
            if key == "input":
                continue
            return f"has no {key!r}, or null{named_keys(record)}"
        if problem := check_string(record[key], repr(key)):
            return problem
    return None


def _check_completion(record: Record) -> str | None:
    for key in ("prompt", "completion"):
        if key not in record:
            return f"has no {key!r}, or null{named_keys(record)}"
        if isinstance(record[key], list):
            return f"has a list as {key!r}, and the first record a text; should be of one form"
        if problem := check_string(record[key], repr(key)):
            return problem
    return None


def _check_text(record: Record) -> str | None:
    return check_string(record["text"], "'text'") if "text" in record else f"has no 'text'{named_keys(record)}"


def _check_chat(record: Record) -> str | None:
    if isinstance(record.get("prompt"), str) and _form(record) == COMPLETION:
        return "has a text as 'prompt', and the first record a list of turns; should be of one form"
    if problem := check_turns(record):
        return problem
    if _asked(record) and record.get("label") is not None:
        return f"has 'label', which is not supported: {_PAIRS['kto_tag']}"
    if not any(map(is_assistant, _turns(record))):
        return "has no turn of the assistant, so there is nothing to train"
    if any(answers(record)):
        return None
    return "trains no turn: the flags of its turns, or their place in 'prompt', switch each assistant turn off"


def check_turns(record: Record) -> str | None:
    """Return the problem of a chat record's turns or tools, if any, whoever speaks last."""
    turns = _turns(record)
    if not isinstance(turns, list):
        both = "or 'prompt' and 'completion', two such lists"
        return f"needs 'messages' or 'conversations', a list of turns, {both}{named_keys(record)}"
    if problem := _check_tools(record):
        return problem
    asked = _asked(record)
    for n, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            return f"has {kind(turn)} as turn {n}, should be an object"
        name, text, known = ("role", "content", OPENAI) if "role" in turn else ("from", "value", tuple(SHAREGPT))
        role = turn.get(name)
        if role not in known:
            return f"has the {name!r} {str(role)[:40]!r} in turn {n}, should be one of {', '.join(known)}"
        if turn.get("function_call"):
            return f"has 'function_call' in turn {n}, which is not supported; write it as 'tool_calls'"
        if problem := _check_tool_calls(turn.get("tool_calls"), n):
            return problem
        calls_only = turn.get("tool_calls") and turn.get(text) is None
        content, named = turn.get(text), f"{text!r} of turn {n}"
        if text == "content" and isinstance(content, list):
            if problem := _check_parts(content, named):
                return problem
            content = _text(content)
        if not calls_only and (problem := check_string(content, named)):
            return problem
        if problem := _check_flags(turn, n, trainable=is_assistant(turn) and n > asked):
            return problem
    return None


def _check_parts(parts: list[Any], named: str) -> str | None:
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            return f"has {kind(part)} without a 'type' in {named}; should be a text, or one part of the type 'text'"
        if part["type"] != "text":
            return f"has a part of the type {part['type'][:40]!r} in {named}; the model reads text alone"
        if "text" not in part:
            return f"has a part without 'text', or null, in {named}"
    if len(parts) != 1:
        return f"has {len(parts)} parts in {named}, should be one; write them as one text"
    return None


def _check_flags(turn: dict[str, Any], n: int, trainable: bool) -> str | None:
    for key in _FLAGS:
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            return f"has {str(value)[:40]!r} as {key!r} of turn {n}, should be true or false (1 or 0)"
        if value and key != "weight" and not trainable:  # a weight counts on assistant turns alone
            where = "turns of the assistant, and none of a 'prompt',"
            return f"has {key!r} in turn {n}, but only {where} are trained; remove the key there"
    if turn.get("train_detail"):
        return f"has 'train_detail' in turn {n}, which is not supported; train the whole turn, or split it"
    return None


def is_assistant(turn: dict[str, Any]) -> bool:
    """Return whether a turn of either form is the assistant's."""
    return (turn["role"] if "role" in turn else turn["from"]) in ("assistant", "gpt")


def _is_trained(turn: dict[str, Any]) -> bool:
    return not any(turn.get(key) == 0 for key in _FLAGS)


def _check_tools(record: Record) -> str | None:
    try:
        value = tools(record)
    except InputError:
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


def check_string(value: Any, name: str) -> str | None:
    """Return the problem of a value that should be a string of whole characters."""
    if not isinstance(value, str):
        return f"has {kind(value)} as {name}, should be a string"
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        return f"has half a surrogate pair in {name}, which is not a character"
    return None


def named_keys(record: Record) -> str:
    """Return the keys of a record, in brackets, for a message."""
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


def kind(value: Any) -> str:
    """Return what JSON calls a value, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


_CHECKS = {
    ALPACA: _check_alpaca,
    CHAT: _check_chat,
    COMPLETION: _check_completion,
    TEXT: _check_text,
    TOKENIZED: _check_tokenized,
}
