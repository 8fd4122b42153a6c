"""Turn chats into token ids by the tokenizer's chat template, and mark the assistant's tokens for training.

transformers renders the template in its sandbox: texts and ids equal those of its `apply_chat_template`.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object
from llama_jax.data.records import Record, answers, messages
from llama_jax.data.tokenizer import Tokenizer

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_FIX = "mark the assistant's text in the template by {% generation %} and {% endgeneration %}"


class Chat:
    """Apply a tokenizer's chat template. Raises InputError where the tokenizer has none.

    The assistant's text is the text between the template's `{% generation %}` tags. Without such tags, the text of an
    assistant's turn starts after the earlier turns and the generation prompt, and ends with the end-of-turn token.
    White space after that token is not trained: generation has stopped there.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        template = chat_template(tokenizer.folder, tokenizer.config)
        if template is None:
            raise InputError(
                f"{tokenizer.folder}: the tokenizer has no chat template, which chat records need; put one into this "
                "folder as chat_template.jinja, or use the tokenizer of the model's chat version"
            )
        self._template = template
        self._marked = bool(_GENERATION.search(template))
        self._ends = tuple(tokenizer.special_texts())
        self._variables: dict[str, Any] = {
            name: token for name, token in tokenizer.special.items() if token is not None
        }

    def tokenize(
        self, records: Sequence[Record], source: str, first: int
    ) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield ids and a mask of trained tokens (bool) for each record; errors name `source` and count from `first`.

        A token is trained if any of its characters is in the assistant's text, except in turns that their flags switch
        off.
        """
        rendered = [self._trained(record, f"{source}: record {n}") for n, record in enumerate(records, first)]
        encoded = self._tokenizer.encode_with_offsets([text for text, _ in rendered])
        for (_, spans), (ids, offsets) in zip(rendered, encoded, strict=True):
            at = np.asarray(offsets, np.int64).reshape(-1, 2)
            trained = np.zeros(len(ids), bool)
            for start, end in spans:
                trained |= (at[:, 1] > start) & (at[:, 0] < end)
            yield ids, trained

    def _trained(self, record: Record, where: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the chat as text, and the spans of the answers that are trained. Raises InputError."""
        text, spans = self.render(messages(record), where)
        wanted = answers(record)
        if all(wanted):
            return text, spans
        if len(spans) != len(wanted):
            raise InputError(
                f"{where}: switches turns off, but the chat template writes {len(spans)} answers for {len(wanted)} "
                "assistant turns; remove the flags of its turns"
            )
        return text, [span for span, kept in zip(spans, wanted, strict=True) if kept]

    def prompt(self, turns: list[dict[str, Any]], where: str) -> list[int]:
        """Return the ids of a chat, up to the start of the assistant's answer. Raises InputError."""
        text, _ = self._apply(turns, where, add_generation_prompt=True)
        ((ids, _),) = self._tokenizer.encode_with_offsets([text])
        if not ids:
            raise InputError(f"{where}: the chat template makes no tokens for this chat")
        return ids

    def render(self, turns: list[dict[str, Any]], where: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the chat as text, and the assistant's spans of characters [start, end). Raises InputError."""
        text, spans = self._apply(turns, where, return_assistant_tokens_mask=self._marked)
        if self._marked:
            return text, spans
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before, _ = self._apply(turns[:i], where, add_generation_prompt=True)
                until, _ = self._apply(turns[: i + 1], where)
                if not (until.startswith(before) and text.startswith(until)):
                    raise InputError(
                        f"{where}: the chat template writes turn {i + 1} differently when other turns follow or when "
                        f"the turn is still to be written, so its tokens cannot be found; {_FIX}"
                    )
                stripped = until.rstrip()
                spans.append((len(before), len(stripped if stripped.endswith(self._ends) else until)))
        return text, spans

    def _apply(self, turns: list[dict[str, Any]], where: str, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation is wrong about the result
        try:
            texts, spans = render([turns], chat_template=self._template, **self._variables, **options)
        except Exception as e:  # a template's code may raise any class
            raise InputError(f"{where}: the chat template fails after {len(turns)} turns: {e}") from None
        return texts[0], spans[0] if spans else []


def chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the template in `chat_template.jinja`, else in `tokenizer_config.json` (of named ones, "default")."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise InputError(f"{file}: not UTF-8: {e.reason} at byte {e.start}; save it as UTF-8") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
    return found if isinstance(found, str) and found else None


def writes_the_date(folder: Path) -> bool:
    """Return whether the folder's chat template calls `strftime_now`, as LLaMA 3.2's does to write the date."""
    with suppress(InputError):  # the error is raised where the template is needed
        config = read_json_object(folder / "tokenizer_config.json")
        return "strftime_now" in (chat_template(folder, config) or "")
    return False
