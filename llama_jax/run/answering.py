"""Answer prompts with a loaded model: one of them piece by piece, or many in blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llama_jax.data.answer_text import AnswerText
from llama_jax.data.questions import Prompt
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model.generate import Decoding, Sampling
from llama_jax.model.llama import Llama

STEP = 32  # tokens between looks at the text of a block: at stop strings, and for Ctrl-C


@dataclass(frozen=True)
class Rules:
    """Hold how answers are made. `ends` are the end tokens, `stops` the texts that end an answer."""

    max_new_tokens: int
    ends: tuple[int, ...]
    stops: tuple[str, ...]
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Answerer:
    """Answer prompts; the caller sets the mesh. A prompt's number decides, with the seed, the tokens that are drawn."""

    model: Llama
    tokenizer: Tokenizer
    rules: Rules

    def block(self, prompts: Sequence[Prompt], numbers: Sequence[int], rows: int) -> tuple[list[str], int]:
        """Return the answer to each prompt of a block, which is filled up to `rows` for one shape of programs, and how
        many of them the limit of tokens has cut."""
        filled = [*range(len(prompts)), *[0] * (rows - len(prompts))]
        decoding = self._decoding([prompts[i] for i in filled], [numbers[i] for i in filled])
        texts = [self._text(prompt) for prompt in prompts]
        while not decoding.finished:
            decoding.step(STEP)
            for row, text in enumerate(texts if self.rules.stops else ()):
                text.show(decoding.rows[row], is_last=False)
                if text.stopped:
                    decoding.end(row)
        for row, text in enumerate(texts):
            text.show(decoding.rows[row], is_last=True)
        cut = sum(decoding.cut[row] and not text.stopped for row, text in enumerate(texts))
        return [text.text for text in texts], cut

    def stream(self, prompt: Prompt, number: int = 0, limit: int | None = None, step: int = 1) -> "Answer":
        """Return the answer to one prompt, to be read while it is made, of at most `limit` tokens."""
        return Answer(self, prompt, number, min(limit or self.rules.max_new_tokens, self.rules.max_new_tokens), step)

    def _decoding(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], limit: int = 0, doubling: bool = False
    ) -> Decoding:
        rules = self.rules
        return Decoding(
            self.model,
            [prompt.ids for prompt in prompts],
            limit or rules.max_new_tokens,
            rules.ends,
            rules.sampling,
            rules.seed,
            numbers=numbers,
            doubling=doubling,
        )

    def _text(self, prompt: Prompt) -> AnswerText:
        return AnswerText(self.tokenizer, self.rules.stops, prompt.ids if prompt.continues else ())


class Answer:
    """Yield an answer in pieces of text. `text` is the text so far; `cut` is whether the limit of tokens ended it."""

    def __init__(self, answerer: Answerer, prompt: Prompt, number: int, limit: int, step: int):
        self._answerer, self._prompt, self._number = answerer, prompt, number
        self._limit, self._step = limit, step
        self._text = answerer._text(prompt)
        self.cut = False

    @property
    def text(self) -> str:
        return self._text.text

    def __iter__(self) -> Iterator[str]:
        decoding = self._answerer._decoding([self._prompt], [self._number], self._limit, doubling=True)
        while not decoding.finished:
            yield self._text.show(decoding.rows[0], is_last=False)  # perhaps nothing: the reader may want to stop
            if self._text.stopped:
                return
            decoding.step(self._step)
        self.cut = decoding.cut[0]
        yield self._text.show(decoding.rows[0], is_last=True)
        self.cut &= not self._text.stopped
