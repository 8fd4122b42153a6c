"""Turn the tokens of an answer into text, piece by piece."""

from collections.abc import Sequence

from llama_jax.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character


class AnswerText:
    """Hold the text of an answer as its tokens come: whole characters, up to the first stop string.

    Of several stop strings the first to be complete counts. White space at both ends is left out. With `before`, the
    tokens of a text to continue, it stays.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()):
        self._tokenizer, self._stops, self._before = tokenizer, stops, list(before)
        self._start = len(tokenizer.decode(self._before)) if self._before else 0
        self.text = ""
        self.stopped = False

    def show(self, ids: Sequence[int], is_last: bool) -> str:
        """Return the next piece of the text of all tokens so far; text that may be of a stop string waits.

        `is_last` is whether these are all tokens.
        """
        text = self._tokenizer.decode([*self._before, *ids])[self._start :]
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)[1]]
        elif not is_last:
            text = text.rstrip(_UNFINISHED)
            text = text[: len(text) - max((_begun(text, stop) for stop in self._stops), default=0)]
        if not self._before:
            text = text.strip()
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def _begun(text: str, stop: str) -> int:
    """Return how many characters of `stop` the text ends with."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
