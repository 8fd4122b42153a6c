"""The chat at a real terminal, a pseudo-terminal of pexpect: what people see is what transformers answers."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
import tiny
import torch
from tiny import CONFIG, make_arrays, write_model, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
NEW = 12  # tokens of an answer
LONG = 20_000


def speaking(folder: Path, template: str | None = TEMPLATE, **config: Any) -> Path:
    """Write a model that answers in letters alone: the head's other rows are zero, and a letter is above."""
    raw = {**CONFIG, "max_position_embeddings": 2 * LONG, **config}
    arrays = make_arrays(raw, seed=3)
    write_tokenizer(write_model(folder, raw, arrays))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    letters = {tokenizer.convert_tokens_to_ids(chr(c)) for c in range(ord("a"), ord("z") + 1)}
    for i in set(range(raw["vocab_size"])) - letters:
        arrays["lm_head.weight"][i] = 0
    write_model(folder, raw, arrays)
    if template:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        tiny.write_json(folder / "tokenizer_config.json", settings | {"chat_template": template})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tmp_path_factory.mktemp("speaking") / "model")


def answer(folder: Path, *turns: str) -> str:
    """transformers' greedy answer to a conversation of the user's and the assistant's turns."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    new = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, folder: Path, *flags: str, new: int = NEW):
        words = ["-m", "llama_jax.generate", "--model_name_or_path", str(folder), "--use_cpu", "--max_new_tokens"]
        env = {**tiny.environment(torch=False), "TERM": "dumb"}  # without readline's escapes
        del env["PYTHONUNBUFFERED"]  # the chat itself has to flush
        self.child = pexpect.spawn(
            sys.executable, [*words, str(new), *flags], env=env, encoding="utf-8", timeout=120, dimensions=(24, 200)
        )

    def until_prompt(self) -> str:
        """Return what is shown up to the next prompt."""
        self.child.expect(">>> ")
        return self.child.before

    def ask(self, line: str) -> str:
        """Return what is shown for a line, without its echo and bars."""
        self.child.sendline(line)
        shown = self.until_prompt().replace("\r\n", "\n").removeprefix(line + "\n")
        return "\n".join(part.rpartition("\r")[2] for part in shown.split("\n")).strip()

    def end(self) -> int | None:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def open_chat() -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*args: Any, **options: Any) -> Terminal:
        opened.append(Terminal(*args, **options))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.child.close(force=True)


def test_a_chat_keeps_its_history_until_it_is_reset(model: Path, open_chat: Any) -> None:
    first = answer(model, "Hi")
    second = answer(model, "Hi", first, "And?")
    assert second != answer(model, "And?") and first != answer(model, "Hi", first, "Hi")
    terminal = open_chat(model)
    assert "/help" in terminal.until_prompt()
    said = terminal.ask("Hi")
    assert said == f"{first}\n(cut after {NEW} tokens, by max_new_tokens)"
    assert terminal.ask("").strip() == ""
    assert "/reset" in terminal.ask("/help")
    assert "no such command" in terminal.ask("/rest")
    assert terminal.ask("And?").split("\n")[0] == second
    assert terminal.ask("/reset") == "the conversation is forgotten"
    assert terminal.ask("And?").split("\n")[0] == answer(model, "And?")
    terminal.child.sendintr()  # at an empty prompt: it does not leave
    assert "Ctrl-D or /quit leaves" in terminal.until_prompt()
    terminal.child.sendeof()
    assert terminal.end() == 0


def test_an_answer_streams_and_is_interrupted(model: Path, open_chat: Any) -> None:
    """Its pieces come one after another; what was said stays in the conversation, and the next question is answered."""
    terminal = open_chat(model, new=LONG)
    terminal.until_prompt()
    terminal.child.sendline("Hi")
    terminal.child.expect("Hi\r\n")
    pieces: list[str] = []
    started, said = time.monotonic(), ""
    while len(said) < 60 or len(pieces) < 5:
        terminal.child.expect(".+")  # what has come
        pieces.append(terminal.child.after)
        said = "".join(pieces).rpartition("\r")[2].strip()  # after the bar
        assert len(said) < LONG / 2 and time.monotonic() - started < 120, "it does not come in pieces"
    terminal.child.sendintr()
    rest = terminal.until_prompt()
    shown = ("".join(pieces) + rest).split("\r\n")
    said = shown[0].rpartition("\r")[2].replace("^C", "")
    assert "(interrupted)" in shown[1] and 60 <= len(said) < LONG
    terminal.child.sendline("And?")
    terminal.child.expect("And\\?\r\n")
    expected = answer(model, "Hi", said, "And?")
    terminal.child.expect_exact(expected)
    terminal.child.sendintr()
    assert "(interrupted)" in terminal.until_prompt()
    terminal.child.sendline("/quit")
    assert terminal.end() == 0


@pytest.mark.slow
def test_the_oldest_turns_make_room(tmp_path: Path, open_chat: Any) -> None:
    """Of 96 positions an answer has 12; a byte is a token."""
    folder = speaking(tmp_path / "model", max_position_embeddings=96)
    terminal = open_chat(folder)
    terminal.until_prompt()
    first = terminal.ask("a" * 20).split("\n")[0]
    assert first == answer(folder, "a" * 20)
    second = terminal.ask("b" * 20).split("\n")[0]  # 1 + 23 + 15 + 23 + 2 + 12 = 76 tokens
    assert second == answer(folder, "a" * 20, first, "b" * 20)
    third = terminal.ask("c" * 20).split("\n")
    assert third[0] == "the oldest question is forgotten: the model has 96 positions"
    assert third[1] == answer(folder, "b" * 20, second, "c" * 20)
    assert "shorten it" in terminal.ask("d" * 100)
    again = terminal.ask("c" * 20).split("\n")
    assert again[0] == third[0] and again[1] == answer(folder, "c" * 20, third[1], "c" * 20)


@pytest.mark.slow
def test_a_chat_without_a_template(tmp_path: Path, open_chat: Any) -> None:
    """Each question is an Alpaca instruction of its own, as --instruction has it."""
    from llama_jax.command import generate

    folder = speaking(tmp_path / "model", template=None)
    terminal = open_chat(folder)
    assert "an Alpaca instruction of its own, without history" in terminal.until_prompt()
    flags = ("--model_name_or_path", folder, "--use_cpu", "--max_new_tokens", NEW)
    alone = tiny.run(generate.main, *flags, "--instruction", "Hi").out.strip()
    assert [terminal.ask("Hi").split("\n")[0] for _ in range(2)] == [alone, alone]
