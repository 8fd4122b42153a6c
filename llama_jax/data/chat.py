"""Turn chats into token ids by the tokenizer's chat template, and mark the assistant's tokens for training.

transformers renders the template in its sandbox: texts and ids equal those of its `apply_chat_template`.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.base.files import parse_json, read_json_object
from llama_jax.data import origins
from llama_jax.data.records import Record, answers, messages, tools
from llama_jax.data.rendering import Endless, LimitedEnvironment, watching, within_limits
from llama_jax.data.tokenizer import TEMPLATES, Tokenizer, read_text

Turn = dict[str, Any]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_FOR_TOOLS = "tool_use"  # name of a template that chats with tools go through
_PROBES = "\ue000", "\ue001", "\ue002"  # contents that no template writes by itself
_FIX = "mark the assistant's text in the template by {% generation %} and {% endgeneration %}"
_REMOVE = "remove such records, or use a tokenizer whose template takes tools"
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
_THOUGHT = re.compile(r"[<\[](?!/)[^][<>]*think.*", re.DOTALL | re.IGNORECASE)
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # transformers' names of a turn's thoughts


class Chat:
    """Apply a tokenizer's chat template. Raises InputError where the tokenizer has none.

    The assistant's text is the text between the template's `{% generation %}` tags. Without such tags, the text of an
    assistant's turn starts after the generation prompt, and ends with the end-of-turn token. White space after that
    token is not trained: generation has stopped there.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        template = chat_template(tokenizer.folder, tokenizer.config)
        if template is None:
            raise InputError(
                f"{tokenizer.folder}: the tokenizer has no chat template, which chat records need; put one into this "
                "folder as chat_template.jinja, or use the tokenizer of the model's chat version"
            )
        self._default = _Template(template, tokenizer)

    @cached_property
    def _for_tools(self) -> "_Template":
        """Return the template for chats with tools, as transformers chooses it: "tool_use", else the default."""
        template = chat_template(self._tokenizer.folder, self._tokenizer.config, _FOR_TOOLS)
        return _Template(template, self._tokenizer) if template else self._default

    def tokenize(
        self, records: Sequence[Record], source: str, first: int
    ) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield ids and a mask of trained tokens (bool) for each record; errors name `source` and count from `first`.

        A token is trained if any of its characters is in the assistant's text, except in turns that their flags switch
        off.
        """
        with watching():
            rendered = [self._render(record, f"{source}: record {n}") for n, record in enumerate(records, first)]
        encoded = self._tokenizer.encode_with_offsets([text for text, _ in rendered])
        for n, ((_, spans), (ids, offsets)) in enumerate(zip(rendered, encoded, strict=True), first):
            if not ids:
                raise InputError(f"{source}: record {n}: the chat template makes no tokens for this chat; remove it")
            at = np.asarray(offsets, np.int64).reshape(-1, 2)
            trained = np.zeros(len(ids), bool)
            for start, end in spans:
                trained |= (at[:, 1] > start) & (at[:, 0] < end)
            yield ids, trained

    def text(self, turns: list[Turn], where: str, open_end: bool = True) -> str:
        """Return the text of a chat, up to the start of the assistant's answer. Without `open_end` the last turn is an
        answer that is to go on. Raises InputError."""
        options = {"add_generation_prompt": open_end, "continue_final_message": not open_end}
        return self._default.render(turns, where, **options)[0]

    def prompt(self, turns: list[Turn], where: str, offered: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Return the ids of a chat, with the tools offered, up to the start of the assistant's answer.

        Raises InputError.
        """
        template, turns, options = self._prepare({"messages": turns, "tools": offered}, where)
        text, _ = template.render(turns, where, add_generation_prompt=True, **options)
        ((ids, _),) = self._tokenizer.encode_with_offsets([text])
        if not ids:
            raise InputError(f"{where}: the chat template makes no tokens for this chat")
        return ids

    def drops_words(self, record: Record) -> bool:
        """Return whether the template leaves out words of a turn, of its content or its thoughts."""
        template, turns, options = self._prepare(record, "record")
        text = template.trace(turns, "record", **options)
        marks = origins.marks(text)
        for i, turn in enumerate(turns):
            own = [mark for mark in marks if mark[2] == i]
            written = ""
            if own:  # with the template's own words around it, as "<think>" may be cut off and written again
                before, after = _between(marks, i, own[0][0], max(end for _, end, _ in own), len(text))
                written = "".join(text[before:after].split())
            if any("".join(str(turn.get(key) or "").split()) not in written for key in ("content", *_THOUGHTS)):
                return True
        return False

    def _render(self, record: Record, where: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the chat as text, and the spans [start, end) of the answers that are trained. Raises InputError."""
        template, turns, options = self._prepare(record, where)
        wanted = answers(record)
        if not template.tagged:
            text, found = template.locate(turns, where, **options)
            said = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
            return text, [found[i] for i, kept in zip(said, wanted, strict=True) if kept and i in found]
        text, spans = template.render(turns, where, return_assistant_tokens_mask=True, **options)
        if any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
            _check_tools(origins.marks(template.trace(turns, where, **options)), turns, where)
        if all(wanted):
            return text, spans
        if len(spans) != len(wanted):
            raise InputError(
                f"{where}: switches turns off, but the chat template writes {len(spans)} answers for {len(wanted)} "
                "assistant turns; remove the flags of its turns"
            )
        return text, [span for span, kept in zip(spans, wanted, strict=True) if kept]

    def _prepare(self, record: Record, where: str) -> tuple["_Template", list[Turn], dict[str, Any]]:
        """Return the template of a record, its turns, and its tools by name. Raises InputError for ignored tools."""
        turns, offered = messages(record), tools(record)
        template = self._for_tools if offered else self._default
        if offered and not template.takes_tools:
            raise InputError(f"{where} has 'tools' beside its turns, which the chat template does not write; {_REMOVE}")
        for n, turn in enumerate(turns, start=1):
            if turn.get("tool_calls") and not template.takes_strings:
                turn["tool_calls"] = [_parse_arguments(call, f"{where} has in turn {n}") for call in turn["tool_calls"]]
        return template, turns, {"tools": offered} if offered else {}


class _Template:
    """Render one chat template, and locate the assistant's text in it."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        self._source = source
        self._specials = sorted(filter(None, tokenizer.special_texts()), key=len, reverse=True)
        self._variables: dict[str, Any] = {
            name: token for name, token in tokenizer.special.items() if token is not None
        }
        self.tagged = bool(_GENERATION.search(source))
        self.takes_tools = re.search(r"\btools\b", source) is not None

    def render(self, turns: list[Turn], where: str, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the text by transformers itself, and the spans between tags if `options` ask for them."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotation is wrong about the result
        # The class that it makes the template's environment of.
        chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment  # type: ignore[misc]
        named = {"chat_template": self._source, **self._variables, **options}
        texts, spans = _rendered(where, render, [turns], **named)
        return texts[0], spans[0] if spans else []

    def trace(self, turns: list[Turn], where: str, add_generation_prompt: bool = False, **options: Any) -> str:
        """Return the text with marks of the turns. Raises InputError."""
        traced = [origins.trace(turn, i) for i, turn in enumerate(turns)]
        for turn in traced:  # transformers 5.24 gives thoughts every name
            if (thoughts := next((turn[key] for key in _THOUGHTS if key in turn), None)) is not None:
                turn.setdefault("thinking", thoughts)
                turn["reasoning_content"] = thoughts
        more = {"tools": None, "documents": None, **self._variables, **options}
        more |= {"messages": traced, "add_generation_prompt": add_generation_prompt}
        return _rendered(where, self._render_traced, more)

    def _render_traced(self, variables: dict[str, Any]) -> str:
        return self._tracing.render(variables)

    def locate(self, turns: list[Turn], where: str, **options: Any) -> tuple[str, dict[int, tuple[int, int]]]:
        """Return the text by transformers, and the spans of answers by turn, found in the same text traced."""
        text, _ = self.render(turns, where, **options)
        traced = self.trace(turns, where, **options)  # `tokenize` retries where the template's date changes in between
        if traced != text or self._frame is None:
            raise InputError(f"{where}: the answers cannot be found in the text that the chat template writes; {_FIX}")
        marks = origins.marks(traced)
        _check_tools(marks, turns, where)
        spans: dict[int, tuple[int, int]] = {}
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            calls = bool(turn.get("tool_calls"))
            own, names = ([mark for mark in marks if mark[2] == number] for number in (i, ~i))
            if not own + names:
                if span := self._empty(text, marks, i, max((end for _, end in spans.values()), default=0)):
                    spans[i] = span
                continue
            first = min(own + names)[0]
            last = max(end for _, end, _ in own or names[:1])
            if any(start < last and end > first for start, end, number in marks if number not in (i, ~i)):
                raise InputError(f"{where}: the chat template writes turn {i + 1} in two places; {_FIX}")
            before, after = _between(marks, i, first, last, len(text))
            spans[i] = self._start(text, before, first, calls), self._end(text, last, after, calls)
        return text, spans

    def _empty(self, text: str, marks: list[origins.Mark], turn: int, before: int) -> tuple[int, int] | None:
        """Return the span of an answer of which no mark is left: from its prompt to its end, after `before`.

        Templates write `content | default('', true)`, which is not the empty content that was marked.
        """
        assert self._frame
        prompt, _, ends = self._frame
        numbered = [(start, end, max(number, ~number)) for start, end, number in marks]
        before = max([before, *(end for _, end, number in numbered if number < turn)])
        after = min((start for start, _, number in numbered if number > turn), default=len(text))
        start = text.find(prompt, before, after) + len(prompt) if prompt in text[before:after] else after
        found = [at + len(end) for end in ends if (at := text.find(end, start, after)) >= 0]
        return (start, min(found)) if prompt and found else None

    def _start(self, text: str, before: int, first: int, calls: bool) -> int:
        """Return where an answer starts, between the end of the text of other turns and its own text.

        Text that the template writes after the generation prompt, as "<think>", is the model's to write.
        """
        assert self._frame
        prompt, tail, _ = self._frame
        if prompt:
            at = text.rfind(prompt, before, first)
            return first if at < 0 else at + len(prompt)
        # LLaMA 2's template has no generation prompt: a space in front of the answer comes after the user's "[/INST]".
        head = text[before:first]
        written = head.startswith(tail) and (calls or head[len(tail) :].isspace())
        return before + len(tail) if written else first

    def _end(self, text: str, last: int, after: int, calls: bool) -> int:
        """Return where an answer ends: after the end of turn that follows its own text, if there is one."""
        assert self._frame
        ends = self._frame[2]
        for end in ends:
            if text.startswith(end, last):
                return last + len(end)
        if calls:  # the template closes brackets in between
            for ways in (ends, self._specials):
                found = [at + len(end) for end in ways if (at := text.find(end, last, after)) >= 0]
                if found:
                    return min(found)
        return last

    @cached_property
    def _tracing(self) -> Any:
        return origins.tracing(self._source)

    @cached_property
    def _frame(self) -> tuple[str, str, list[str]] | None:
        """Return the generation prompt, the text from a user's content to the answer, and the ways to end a turn.

        All are texts that the template writes around contents of `_PROBES`. None where it refuses such chats, or where
        a part of such a content has no mark.
        """
        user, answer, another = _PROBES
        asked = {"role": "user", "content": user}
        answered, again = ({"role": "assistant", "content": content} for content in (answer, another))
        question, prompted, whole = (
            self._written(asked),
            self._written(asked, add_generation_prompt=True),
            self._written(asked, answered),
        )
        marked = "".join(whole[start:end] for start, end, _ in origins.marks(whole))
        if not (question and prompted and whole) or any(marked.count(c) != whole.count(c) for c in _PROBES):
            return None
        closed, opened = question.partition(user)[2], prompted.partition(user)[2]
        # A thought that the prompt opens is of the answer where one is trained, as in the tags of TRL's templates.
        prompt = _THOUGHT.sub("", opened[_shared(closed, opened) :]).lstrip()
        last = whole.partition(answer)[2]
        middle = self._written(asked, answered, again).partition(answer)[2].partition(another)[0]
        middle = middle[: middle.rfind(prompt)] if prompt and prompt in middle else ""
        ends = [self._through_special(last) or last.rstrip() or last, self._through_special(middle)]
        return prompt, opened, [end for end in ends if end]

    @cached_property
    def takes_strings(self) -> bool:
        """Return whether arguments of a tool call that are a string of JSON come into the text as they are."""
        arguments = json.dumps({_PROBES[0]: _PROBES[1]}, ensure_ascii=False)
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        return arguments in self._written({"role": "user", "content": "a"}, turn)

    def _written(self, *turns: Turn, **options: Any) -> str:
        """Return the traced text of a chat, if need be with a system turn or a tool; empty if the template refuses."""
        system = {"role": "system", "content": "a"}
        for before in ([], [system]):
            for offered in (None, [_TOOL]):
                try:
                    return self.trace([*before, *turns], "a chat", **options, tools=offered)
                except Endless:
                    raise
                except InputError:
                    continue
        return ""

    def _through_special(self, text: str) -> str:
        """Return the text through its first special token; empty where it has none."""
        found = re.search("|".join(map(re.escape, self._specials)) or "(?!)", text)
        return text[: found.end()] if found else ""


def _shared(a: str, b: str) -> int:
    """Return the number of characters that both texts begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _check_tools(marks: list[origins.Mark], turns: list[Turn], where: str) -> None:
    """Raise InputError for a call of a tool, or a tool's answer, that is not in the text."""
    written = {number for _, _, number in marks}
    for i, turn in enumerate(turns):
        if turn.get("tool_calls") and ~i not in written:
            raise InputError(f"{where} calls a tool in turn {i + 1}, which the chat template does not write; {_REMOVE}")
        if turn["role"] == "tool" and turn["content"].strip() and i not in written:
            raise InputError(f"{where} has a tool's turn {i + 1}, which the chat template does not write; {_REMOVE}")


def _between(marks: list[origins.Mark], turn: int, first: int, last: int, length: int) -> tuple[int, int]:
    """Return where the parts of other turns around a turn's text [first, last) end and begin."""
    others = [mark for mark in marks if mark[2] not in (turn, ~turn)]
    before = max((end for _, end, _ in others if end <= first), default=0)
    return before, min((start for start, _, _ in others if start >= last), default=length)


def _parse_arguments(call: Any, where: str) -> Any:
    """Return a tool call with its arguments as an object, which OpenAI's form has as a string of JSON."""
    if "function" in call:
        return {**call, "function": _parse_arguments(call["function"], where)}
    if not isinstance(arguments := call.get("arguments"), str):
        return call
    try:
        return {**call, "arguments": parse_json(arguments.encode(), where, repeats=True)}
    except (ValueError, InputError):
        raise InputError(f"{where} the arguments {arguments[:40]!r} of a tool call, which are not JSON") from None


def _rendered(where: str, render: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Return `render(...)`, within limits; a template's exceptions, of any class, become an InputError."""
    from jinja2 import TemplateError

    try:
        return within_limits(where, render, *args, **named)
    except InputError:
        raise
    except Exception as error:
        raised = "refuses this chat" if type(error) is TemplateError else "fails"  # `raise_exception` raises this class
        raise InputError(f"{where}: the chat template {raised}: {str(error) or type(error).__name__}") from None


def chat_template(folder: Path, config: dict[str, Any], name: str = "default") -> str | None:
    """Return the template in `chat_template.jinja`, else in `tokenizer_config.json`, of several the named template."""
    file = folder / "chat_template.jinja"
    if name != "default":
        file = folder / TEMPLATES / f"{name}.jinja"
    if file.exists():
        return read_text(file).replace("\r\n", "\n").replace("\r", "\n")  # as transformers reads it
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get(name)
    elif name != "default":
        found = None
    return found if isinstance(found, str) and found else None


def writes_the_date(folder: Path) -> bool:
    """Return whether a chat template of the folder calls `strftime_now`, as LLaMA 3.2's does to write the date."""
    with suppress(InputError):  # the error is raised where the template is needed
        config = read_json_object(folder / "tokenizer_config.json")
        return any("strftime_now" in (chat_template(folder, config, name) or "") for name in ("default", _FOR_TOOLS))
    return False
