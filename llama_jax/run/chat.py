"""Chat at the terminal: answers stream, the history is kept, Ctrl-C interrupts an answer."""

import contextlib
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from llama_jax.base.errors import InputError
from llama_jax.data.chat import Turn
from llama_jax.data.questions import Prompt, Prompts
from llama_jax.reporting.progress import say, waiting
from llama_jax.run.answering import Answerer

PROMPT = ">>> "
HELP = """\
/reset  forget the conversation
/help   show this list
/quit   leave, as Ctrl-D does
Ctrl-C interrupts an answer; what was said stays in the conversation."""
_LEAVING = "Ctrl-D or /quit leaves"
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ROOM = 4  # an answer has at least a fourth of the positions before turns are dropped


def printable(text: str) -> str:
    """Return an answer's text without characters that would steer the terminal."""
    return _STEERING.sub("\ufffd", text)


class Conversation:
    """Keep the turns of a chat, and fit them into the model's positions.

    Without a chat template each question is an Alpaca instruction of its own.
    """

    def __init__(self, prompts: Prompts, positions: int, max_new_tokens: int):
        self._prompts, self._positions, self._max_new_tokens = prompts, positions, max_new_tokens
        self.turns: list[Turn] = []

    def ask(self, question: str) -> tuple[Prompt, int]:
        """Return the prompt of the turns and a further question, and the number of tokens that its answer may have.

        Turns that leave no room are dropped, the oldest first. Raises InputError where the question alone is too long.
        """
        wanted = min(self._max_new_tokens, self._positions // _ROOM)
        turns, dropped = self.turns, 0
        while (room := self._positions - len((prompt := self._prompt(turns, question)).ids)) < wanted and turns:
            turns = turns[next((i for i, turn in enumerate(turns[1:], 1) if turn["role"] == "user"), len(turns)) :]
            dropped += 1
        if room < 1:
            for_both = f"{self._positions:,} positions for it and its answer"
            raise InputError(f"the question has {len(prompt.ids):,} tokens, and the model {for_both}; shorten it")
        if dropped:
            questions = "the oldest question is" if dropped == 1 else f"the {dropped} oldest questions are"
            say(f"{questions} forgotten: the model has {self._positions:,} positions")
        self.turns = turns
        return prompt, min(room, self._max_new_tokens)

    def add(self, question: str, answer: str) -> None:
        """Keep a question and what was said to it."""
        if self._prompts.chat is not None and answer:
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _prompt(self, turns: list[Turn], question: str) -> Prompt:
        if self._prompts.chat is None:
            return self._prompts.of_instruction({"instruction": question}, "the question")
        return self._prompts.of_chat([*turns, {"role": "user", "content": question}], "the question")


def chat(answerer: Answerer, prompts: Prompts, positions: int) -> None:
    """Talk until the user leaves. The caller sets the mesh."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` edits lines, and recalls them, once it is imported

    new_tokens = answerer.rules.max_new_tokens
    conversation, asked = Conversation(prompts, positions, new_tokens), 0
    say(f"/help lists the commands; {_LEAVING}")
    while True:
        try:
            question = input(PROMPT).strip()
        except KeyboardInterrupt:
            say(f"\n{_LEAVING}")
            continue
        except EOFError:
            print()
            return
        except UnicodeDecodeError as e:
            say(f"the line is not UTF-8 ({e.reason}); type it again")
            continue
        if question in ("/quit", "/exit", "/bye"):
            return
        if question == "/reset":
            conversation.turns = []
            say("the conversation is forgotten")
        elif question == "/help":
            say(HELP)
        elif re.fullmatch(r"/[a-z]+", question):
            say(f"{question}: no such command; /help lists them")
        elif question:
            _answer(answerer, conversation, question, asked)
            asked += 1


def _answer(answerer: Answerer, conversation: Conversation, question: str, number: int) -> None:
    """Print the answer to a question, and keep both in the conversation."""
    with _interruptible() as interrupted:
        try:
            prompt, room = conversation.ask(question)
        except InputError as e:
            say(f"error: {e}")
            return
        answer = answerer.stream(prompt, number, room)
        pieces = iter(answer)
        with waiting("reading"):  # the first answer compiles, a long conversation takes its time
            piece = next(pieces, "")
        while True:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
            if interrupted or (further := next(pieces, None)) is None:
                break
            piece = further
    print()
    if interrupted:
        say("(interrupted)")
    elif answer.cut:
        limit = "max_new_tokens" if room == answerer.rules.max_new_tokens else "the model's positions"
        say(f"(cut after {room:,} tokens, by {limit})")
    conversation.add(question, answer.text)


@contextlib.contextmanager
def _interruptible() -> Iterator[list[Any]]:
    """Note Ctrl-C in the list that is yielded; a compile or a step on the device ends first."""
    noted: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *_: noted.append(True))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
