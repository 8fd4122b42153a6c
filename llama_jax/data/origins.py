"""Trace the parts of a rendered chat back to the turns that they come from.

Strings are traced through the template itself: a search in the rendered text cannot tell an answer from the template's
own words, nor find an answer that the template strips or cuts.
"""

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, SupportsIndex

from jinja2 import Template, TemplateError, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.nodes import Concat, EvalContext
from jinja2.utils import Namespace
from markupsafe import Markup

from llama_jax.data.rendering import LimitedEnvironment

Mark = tuple[int, int, int]  # start and end in the text, number of the turn (inverted for a name)

_UNMARKED = ("role", "type")
_NAMES = ("name", "id", "tool_call_id")  # keys of a turn that templates copy into other turns


class Traced(str):
    """Hold text and the turns of its parts, through the methods that templates call on strings.

    A part without text keeps its mark, which tells the place of an empty answer.
    """

    _marks: list[Mark]  # never changed; the sandbox hides names with an underscore from templates

    def __new__(cls, text: str, marks: list[Mark]) -> "Traced":
        self = super().__new__(cls, text)
        self._marks = marks
        return self

    def __str__(self) -> "Traced":
        return self

    def __add__(self, other: Any) -> str:
        if type(other) is str:
            return Traced(super().__add__(other), self._marks)
        return joined((self, other)) if type(other) is Traced else NotImplemented

    def __radd__(self, other: Any) -> str:
        return joined((other, self)) if type(other) is str else NotImplemented

    def __getitem__(self, at: SupportsIndex | slice) -> str:
        if not isinstance(at, slice):
            at = range(len(self))[at]
            return self._cut(at, at + 1)
        start, stop, step = at.indices(len(self))
        return self._cut(start, max(start, stop)) if step == 1 else super().__getitem__(at)

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(super().lstrip(chars))
        return self._cut(start, max(start, len(super().rstrip(chars))))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._cut(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._cut(0, len(super().rstrip(chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._cut(len(self) - len(super().removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return self._cut(0, len(super().removesuffix(suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return self._pieces(super().split(sep, maxsplit), sep or "")

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return self._pieces(super().rsplit(sep, maxsplit), sep or "")

    def splitlines(self, keepends: bool = False) -> list[str]:  # type: ignore[override]
        return self._pieces(super().splitlines(keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = self._pieces(super().partition(sep))
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = self._pieces(super().rpartition(sep))
        return before, found, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:  # type: ignore[override]
        if not old:
            return super().replace(old, new, count)
        turns = {turn for _, _, turn in self._marks}
        if len(turns) == 1:  # the new text is the turn's, too
            new = _trace(str(new), *turns)
        return joined(between(new, self.split(old, count)))

    def lower(self) -> str:
        return self._same_places(super().lower())

    def upper(self) -> str:
        return self._same_places(super().upper())

    def capitalize(self) -> str:
        return self._same_places(super().capitalize())

    def title(self) -> str:
        return self._same_places(super().title())

    def _same_places(self, text: str) -> str:
        return Traced(text, self._marks) if len(text) == len(self) else text

    def _cut(self, start: int, stop: int) -> str:
        if start == 0 and stop == len(self):
            return self
        inside = [
            (max(a, start) - start, min(b, stop) - start, t) for a, b, t in self._marks if a <= stop and b >= start
        ]
        return Traced(super().__getitem__(slice(start, stop)), inside)

    def _pieces(self, pieces: Iterable[str], separator: str = "") -> list[str]:
        """Return the pieces, which follow one another in the text, with their marks.

        Without `separator`, pieces are next to one another, or the text in between cannot be in a piece.
        """
        at, result = 0, []
        for piece in pieces:
            at = self.find(piece, at)
            result.append(self._cut(at, at + len(piece)))
            at += len(piece) + len(separator)
        return result


def joined(parts: Iterable[str]) -> str:
    """Join strings, as `"".join` does, and keep their marks."""
    parts, at = list(parts), 0
    marks: list[Mark] = []
    for part in parts:
        if type(part) is Traced:
            marks += [(a + at, b + at, t) for a, b, t in part._marks]
        at += len(part)
    text = "".join(parts)
    return Traced(text, marks) if marks else text


def between(separator: str, parts: Iterable[str]) -> list[str]:
    """Return the parts with a separator between each two."""
    return [x for part in parts for x in (separator, part)][1:]


def marks(text: str) -> list[Mark]:
    """Return the marks of a text in order; a turn has a mark without text only where no other mark is left of it."""
    found = sorted(text._marks) if isinstance(text, Traced) else []
    written = {turn for start, end, turn in found if end > start}
    return [(start, end, turn) for start, end, turn in found if end > start or turn not in written]


def trace(turn: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a turn with its strings marked by its number, and its names by the inverted number."""
    return {key: _part(key, value, number) for key, value in turn.items()}


def _part(key: str, value: Any, turn: int) -> Any:
    return value if key in _UNMARKED else _trace(value, ~turn if key in _NAMES else turn)


def _trace(value: Any, turn: int) -> Any:
    if isinstance(value, str):
        return Traced(value, [(0, len(value), turn)])
    if isinstance(value, dict):
        return {_trace(key, turn): _part(key, part, turn) for key, part in value.items()}
    return [_trace(part, turn) for part in value] if isinstance(value, list) else value


def tracing(template: str) -> Template:
    """Compile a chat template in a sandbox like transformers', such that `render` keeps the marks of strings.

    The tags `{% generation %}` and `{% endgeneration %}` have no effect.
    """
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.concat = joined  # type: ignore[assignment]  # of macros and blocks, and of the whole text
    environment.code_generator_class = _Generator
    environment.filters |= {"join": _join, "tojson": _tojson, "safe": _safe}
    environment.globals |= {
        "dict": _dict,
        "namespace": _Namespace,
        "raise_exception": _raise,
        "strftime_now": _now,
    }
    tag = r"(?<=\{%%)([-+]?\s*)%s(?=\s*[-+]?%%\})"
    return environment.from_string(
        re.sub(tag % "endgeneration", r"\1endif", re.sub(tag % "generation", r"\1if true", template))
    )


class _Namespace(Namespace):
    """Refuse names with an underscore at the beginning, which would reach into Python; transformers does."""

    def __init__(*args: Any, **named: Any) -> None:
        for name in dict(*args[1:], **named):
            _check_name(name)
        Namespace.__init__(*args, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"the namespace's name {name!r} begins with an underscore")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: Any, **named: Any) -> dict[Any, Any]:
    return dict(*args, **named)  # the class itself has attributes that templates need not reach


class _Generator(CodeGenerator):
    """Compile the operator `~` to the environment's own concatenation."""

    def visit_Concat(self, node: Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return joined(between(str(d), map(str, value)))


def _safe(value: str) -> str:
    return value if isinstance(value, Traced) else Markup(value)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    text, turns = json.dumps(value, ensure_ascii=ensure_ascii, **options), list(_turns(value))
    return Traced(text, [(0, len(text), max(turns))]) if turns else text


def _turns(value: Any) -> Iterator[int]:
    """Yield the turns of the strings in JSON values."""
    if isinstance(value, Traced):
        yield from (turn for _, _, turn in value._marks)
    elif isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts:
            yield from _turns(part)
