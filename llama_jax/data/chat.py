"""Chats to token ids by the tokenizer's own chat template, and which of them the assistant has said.

transformers renders the template, in its sandbox: texts and ids are those of its `apply_chat_template`.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object
from llama_jax.data.records import Record, messages
from llama_jax.data.tokenizer import Tokenizer

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MEND = "mark the assistant's text in the template by {% generation %} and {% endgeneration %}"


class Chat:
    """A tokenizer's chat template, applied. Raises InputError where there is none.

    The assistant's text is what stands between the template's `{% generation %}` tags. Without such tags it is, of each
    of its turns, what follows on the turns before and the generation prompt, up to its end-of-turn token. White space
    after that token is not trained: generation has stopped there.
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
        """Ids and what is trained of them (bool) of each record; `source` and the `first` one's number are for errors.

        A token that has a character of the assistant is trained."""
        rendered = [self.render(messages(record), f"{source}: record {n}") for n, record in enumerate(records, first)]
        encoded = self._tokenizer.encode_with_offsets([text for text, _ in rendered])
        for (_, spans), (ids, offsets) in zip(rendered, encoded, strict=True):
            at = np.asarray(offsets, np.int64).reshape(-1, 2)
            trained = np.zeros(len(ids), bool)
            for start, end in spans:
                trained |= (at[:, 1] > start) & (at[:, 0] < end)
            yield ids, trained

    def prompt(self, turns: list[dict[str, Any]], where: str) -> list[int]:
        """Ids of the chat, up to where the assistant is to speak. Raises InputError."""
        text, _ = self._apply(turns, where, add_generation_prompt=True)
        ((ids, _),) = self._tokenizer.encode_with_offsets([text])
        if not ids:
            raise InputError(f"{where}: the chat template makes no token of it")
        return ids

    def render(self, turns: list[dict[str, Any]], where: str) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, and the characters [start, end) that the assistant has said. Raises InputError."""
        text, spans = self._apply(turns, where, return_assistant_tokens_mask=self._marked)
        if self._marked:
            return text, spans
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before, _ = self._apply(turns[:i], where, add_generation_prompt=True)
                until, _ = self._apply(turns[: i + 1], where)
                if not (until.startswith(before) and text.startswith(until)):
                    raise InputError(
                        f"{where}: the chat template writes turn {i + 1} otherwise when more turns follow or none has "
                        f"been written yet, so that its tokens are not known; {_MEND}"
                    )
                said = until.rstrip()
                spans.append((len(before), len(said if said.endswith(self._ends) else until)))
        return text, spans

    def _apply(self, turns: list[dict[str, Any]], where: str, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # whose annotation is not what it returns
        try:
            texts, spans = render([turns], chat_template=self._template, **self._variables, **options)
        except Exception as e:  # a template's own code raises what it likes
            raise InputError(f"{where}: the chat template fails after {len(turns)} turns: {e}") from None
        return texts[0], spans[0] if spans else []


def chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja` goes before `tokenizer_config.json`, whose templates may have names: "default" is meant."""
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
    """Whether the chat template of a tokenizer's folder asks for the time, as LLaMA 3.2's does for the date."""
    with suppress(InputError):  # which is raised where the template is needed
        config = read_json_object(folder / "tokenizer_config.json")
        return "strftime_now" in (chat_template(folder, config) or "")
    return False
