"""Turn questions into token ids: a text, a chat, or a file's records, each up to the start of its answer."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llama_jax.base.errors import InputError
from llama_jax.data.chat import Chat, Turn, chat_template
from llama_jax.data.examples import alpaca_prompt
from llama_jax.data.readers import Joined, Reader, Record
from llama_jax.data.records import (
    ALPACA,
    CHAT,
    TEXT,
    check_string,
    check_turns,
    is_assistant,
    kind,
    messages,
    named_keys,
    refused_key,
    tools,
)
from llama_jax.data.rendering import watching
from llama_jax.data.sources import find_sources
from llama_jax.data.tokenizer import Tokenizer

ANSWER = "generated_text"  # transformers' pipelines call it so
PROMPT = "prompt"
# The form of a question by its most specific key.
_FORMS = {"messages": CHAT, "conversations": CHAT, "instruction": ALPACA, "prompt": PROMPT, "text": TEXT}
_TURNS = "messages", "conversations"


class Prompt(NamedTuple):
    """Hold the tokens to answer; `continues` is whether the answer goes on in their text."""

    ids: Sequence[int]
    continues: bool = False


class Prompts:
    """Make token ids of questions. `raw` continues a prompt's text, without template and instruction.

    `check` raises InputError for ids that the model lacks. `chat` is the tokenizer's chat template, None where it has
    none: a prompt is then asked as an Alpaca instruction.
    """

    def __init__(self, tokenizer: Tokenizer, check: Callable[[list[int]], None], raw: bool = False):
        self._tokenizer, self._check, self._raw = tokenizer, check, raw
        self.chat = None if chat_template(tokenizer.folder, tokenizer.config) is None else Chat(tokenizer)

    def of_chat(self, turns: list[Turn], where: str, offered: Sequence[dict[str, Any]] = ()) -> Prompt:
        """Return the prompt of a chat by the template; `where` names it in errors. Raises InputError."""
        return self._checked((self.chat or Chat(self._tokenizer)).prompt(turns, where, offered), where)

    def of_instruction(self, record: Record, where: str) -> Prompt:
        """Return an Alpaca prompt. Raises InputError."""
        return self._encoded(alpaca_prompt(record), where)

    def of_prompt(self, text: str, where: str) -> Prompt:
        """Return a prompt: raw, in the chat template, or as an Alpaca instruction. Raises InputError."""
        if self._raw:
            return self._encoded(text, where, continues=True)
        if self.chat is None:
            return self.of_instruction({"instruction": text}, where)
        return self.of_chat([{"role": "user", "content": text}], where)

    def of_record(self, record: Record, where: str) -> Prompt:
        """Return the prompt of a record that `read_questions` has checked. Raises InputError."""
        record = _as_chat(record)
        form = _form(record)
        if form == CHAT:
            turns = messages(record)
            return self.of_chat(turns[:-1] if is_assistant(turns[-1]) else turns, where, tools(record))
        if form == ALPACA:
            return self.of_instruction(record, where)
        if form == TEXT:
            return self._encoded(record["text"], where, continues=True)
        return self.of_prompt(record["prompt"], where)

    def of_records(self, records: Reader, progress: Callable[[int], Any]) -> list[Prompt]:
        """Return the prompts of all records; `progress` is called after each. Raises InputError."""
        made = []
        with watching():
            for i, record in enumerate(records):
                source, number = records.where(i)
                prompt = self.of_record(record, f"{source}: record {number}")
                made.append(Prompt(array("i", prompt.ids), prompt.continues))  # a list takes nine times as much
                progress(1)
        return made

    def _encoded(self, text: str, where: str, continues: bool = False) -> Prompt:
        return self._checked(self._tokenizer.encode_batch([text])[0], where, continues)

    def _checked(self, ids: list[int], where: str, continues: bool = False) -> Prompt:
        if not ids:
            raise InputError(f"{where}: the text makes no tokens, so there is nothing to continue; give a text")
        self._check(ids)
        return Prompt(ids, continues)


def read_questions(name: str, say: Callable[[str], None] = lambda line: None) -> Reader:
    """Return the records of a file or another source of `find_sources`, with all their keys.

    A record has `messages` or `conversations`, `instruction` and perhaps `input`, a `prompt` (a text, or turns), or a
    `text` to continue. An answer that is there already, as `output` or a last turn of the assistant, is not read.
    `say` receives a warning of files of a folder that are not read. Raises InputError for records of no such form, the
    first by its number.
    """
    readers = [source.open(set()) for source in find_sources([name], say=say)]
    records = readers[0] if len(readers) == 1 else Joined(readers)
    first, bad, count = "", 0, 0
    for i, record in enumerate(records):
        count += 1
        if problem := _problem(record):
            source, number = records.where(i)
            first, bad = first or f"{source}: record {number} {problem}", bad + 1
    if bad:
        raise InputError(first + (f"; {bad:,} of {count:,} records are bad" if bad > 1 else ""))
    if not count:
        raise InputError(f"{name}: holds no records")
    return records


def _problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return f"should be an object, not {kind(record)}"
    if ANSWER in record:
        return f"has {ANSWER!r} already, the key of the answer; is this an output file? rename the key"
    record = _as_chat(record)
    form = _form(record)
    if form is None:
        known = "'messages', 'conversations', 'instruction', 'prompt' or 'text'"
        return f"is no question{named_keys(record)}; should have {known}"
    if form == PROMPT:
        return check_string(record["prompt"], "'prompt'")
    if problem := refused_key(form, record):
        return problem
    if form == CHAT:
        return check_turns(record) or _check_question(messages(record))
    keys = ("text",) if form == TEXT else ("instruction", *(["input"] if "input" in record else []))
    return next((problem for key in keys if (problem := check_string(record[key], repr(key)))), None)


def _check_question(turns: list[Turn]) -> str | None:
    if all(map(is_assistant, turns)):
        return "has no turn before the assistant's, so there is no question"
    if len(turns) > 1 and is_assistant(turns[-1]) and is_assistant(turns[-2]):
        return "ends with two turns of the assistant; leave the last one out"
    return None


def _as_chat(record: Record) -> Record:
    """Return a record whose `prompt` is a list of turns, as TRL has them, with these as its `messages`."""
    if isinstance(record.get("prompt"), list) and not any(key in record for key in _TURNS):
        return {"messages": record["prompt"]} | {key: record[key] for key in ("tools",) if key in record}
    return record


def _form(record: Record) -> str | None:
    return next((form for key, form in _FORMS.items() if key in record), None)
