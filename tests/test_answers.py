"""Texts of answers piece by piece, files of questions, and the flags of `python -m llama_jax.generate`."""

import argparse
import errno
import io
import json
import re
from pathlib import Path
from typing import Any

import jax
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny import CONFIG, ROOT, Outcome, make_arrays, run, write_json, write_model, write_tokenizer
from vocabularies import convert_sentencepiece, train_byte_level, train_sentencepiece

from llama_jax.base.errors import InputError
from llama_jax.command import generate
from llama_jax.data.answer_text import AnswerText
from llama_jax.data.examples import alpaca_prompt
from llama_jax.data.questions import Prompts, read_questions
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.model.generate import Decoding
from llama_jax.run.answer_file import AnswerFile
from llama_jax.run.answering import Answerer
from llama_jax.run.chat import printable
from llama_jax.run.loaded import Opened, add_model_flags, open_model

TEMPLATE = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}a:"
NEW = 16
PENALTY = {"repetition_penalty": 20.0}


def error_line(outcome: Outcome) -> str:
    assert outcome.code == 2, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    return line


# -- Text piece by piece ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    slow = train_sentencepiece(folder / "slow")
    (folder / "bytes").mkdir()
    return [
        open_tokenizer(path)
        for path in (
            write_tokenizer(folder / "bytes"),
            slow,
            convert_sentencepiece(folder / "llama2", slow),
            train_byte_level(folder / "llama3"),
        )
    ]


def first_stop(text: str, stops: list[str]) -> int:
    """Return where the stop string begins that is complete first, read a character at a time; without one, the end."""
    for end in range(1, len(text) + 1):
        if found := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return min(found)
    return len(text)


@settings(max_examples=200)
@given(data=st.data(), kind=st.integers(0, 3))
def test_pieces_of_an_answer(tokenizers: list[Tokenizer], data: st.DataObject, kind: int) -> None:
    """However the tokens come, what is shown is a beginning of the answer: the text up to the first stop string.

    So no half character and no part of a stop string is ever shown.
    """
    letters = st.sampled_from("ab \n☃é😀你")
    given_text = data.draw(st.text(letters, max_size=24))
    ids = tokenizers[kind].encode_batch([given_text])[0]
    whole = tokenizers[kind].decode(ids)
    stops = data.draw(st.lists(st.text(letters, min_size=1, max_size=3), max_size=3))
    expected = whole[: first_stop(whole, stops)].strip()
    text, at, pieces = AnswerText(tokenizers[kind], stops), 0, []
    while at < len(ids) and not text.stopped:
        at += data.draw(st.integers(1, 3))
        pieces.append(text.show(ids[:at], is_last=False))
        assert expected.startswith("".join(pieces)) and text.text == "".join(pieces)
    pieces.append(text.show(ids, is_last=True))
    assert "".join(pieces) == text.text == expected
    assert text.stopped == (first_stop(whole, stops) < len(whole))


def test_the_first_complete_stop_string_counts(tokenizers: list[Tokenizer]) -> None:
    """Not the one that begins first: whether it would be complete is not known yet when the other is."""
    (ids,) = tokenizers[0].encode_batch(["xabcd"])
    for steps in ([len(ids)], range(len(ids) + 1)):
        text = AnswerText(tokenizers[0], ["abcd", "c", "bc"])
        assert "".join(text.show(ids[:step], is_last=False) for step in steps if not text.stopped) == "xa"


def test_a_text_goes_on_where_its_prompt_ends(tokenizers: list[Tokenizer]) -> None:
    """White space stays, also the space that sentencepiece keeps in a token."""
    for tokenizer in tokenizers:
        (before,) = tokenizer.encode_batch(["The quick"])
        (ids,) = tokenizer.encode_batch(["The quick brown fox\n"])
        assert ids[: len(before)] == before
        text = AnswerText(tokenizer, before=before)
        assert text.show(ids[len(before) :], is_last=True) == " brown fox\n"


def test_bytes_that_are_no_character_are_shown_at_the_end(tokenizers: list[Tokenizer]) -> None:
    (ids,) = tokenizers[0].encode_batch(["a☃"])
    text = AnswerText(tokenizers[0])
    assert (text.show(ids[:-1], is_last=False), text.show(ids[:-1], is_last=True)) == ("a", "\ufffd")


def test_an_answer_steers_no_terminal() -> None:
    assert printable("a\x1b[2J\tb\n\r\x9b☃") == "a\ufffd[2J\tb\n\ufffd\ufffd☃"


# -- A file of questions ----------------------------------------------------------------------------------------------

QUESTIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}], "id": 7},
    {"instruction": "Name a fish.", "input": "", "output": "Cod."},
    {"instruction": "Translate.", "input": "Eel, please, and a good deal of it"},
    {"prompt": "Hello there"},
    {"text": "Once upon a time"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "reference"}]},
    {"prompt": [{"role": "user", "content": "Hello there"}], "note": "é☃"},
]
ASKED = [  # the same, each by flags
    ("--message", "Hi"),
    ("--instruction", "Name a fish."),
    ("--instruction", "Translate.", "--input", "Eel, please, and a good deal of it"),
    ("--prompt", "Hello there"),
    ("--raw", "--prompt", "Once upon a time"),
    ("--message", "Hi"),
    ("--message", "Hello there"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that answers in letters, hardly one twice, `k` its end."""
    raw = {**CONFIG, "eos_token_id": None}
    folder = write_tokenizer(write_model(tmp_path / "model", raw))
    arrays, tokenizer = make_arrays(raw, seed=3), open_tokenizer(folder)
    letters = {tokenizer.token_to_id(chr(c)) for c in range(ord("a"), ord("z") + 1)}
    for i in range(raw["vocab_size"]):
        arrays["lm_head.weight"][i] *= 10 if i in letters else 0
    write_model(folder, raw, arrays)
    settings_ = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings_ | {"chat_template": TEMPLATE})
    write_json(folder / "generation_config.json", {"eos_token_id": [tokenizer.token_to_id("k")], **PENALTY})
    return folder


def ask(model: Path, *flags: Any) -> Outcome:
    return run(generate.main, "--model_name_or_path", model, "--use_cpu", "--max_new_tokens", NEW, *flags)


def answered(model: Path, *flags: Any) -> str:
    outcome = ask(model, *flags)
    assert outcome.code == 0, outcome.err
    return outcome.out.removesuffix("\n")


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_questions(tmp_path: Path, model: Path) -> None:
    """Each record comes back in its place with the answer that it gets alone; blocks of three are ragged."""
    alone = [answered(model, *flags) for flags in ASKED]
    assert len({len(text) for text in alone}) > 2 and alone[0] != alone[3]  # `k` ends some
    source, out = write_lines(tmp_path / "in.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    outcome = ask(model, "--input_file", source, "--output_file", out, "--batch_size", 3)
    assert outcome.code == 0 and not outcome.out, outcome.err
    assert read_lines(out) == [q | {"generated_text": text} for q, text in zip(QUESTIONS, alone, strict=True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "model", "out.jsonl"]
    again = ask(model, "--input_file", source, "--output_file", out)
    assert "is there already; remove it" in error_line(again)
    asked = ask(model, "--input_file", out, "--output_file", tmp_path / "second.jsonl")
    assert "out.jsonl: record 1 has 'generated_text' already" in error_line(asked)
    assert f"{len(QUESTIONS)} of {len(QUESTIONS)} records are bad" in asked.err


def test_questions_of_other_files(tmp_path: Path) -> None:
    """All columns stay, as the output has them; a line of a text file is a text to continue."""
    records = [{"prompt": "Hi", "id": "7"}, {"prompt": "Ho", "id": "8"}]
    (tmp_path / "in.csv").write_text("prompt,id\nHi,7\nHo,8\n")
    (tmp_path / "in.txt").write_text("Once\n\nTwice\n")
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in.parquet")
    write_json(tmp_path / "in.json", records)
    for name in ("in.csv", "in.parquet", "in.json"):
        assert list(read_questions(str(tmp_path / name))) == records
    assert list(read_questions(str(tmp_path / "in.txt"))) == [{"text": "Once"}, {"text": "Twice"}]


def test_questions_of_a_folder(tmp_path: Path, model: Path) -> None:
    """The files that are left out are named, as in training."""
    (folder := tmp_path / "in").mkdir()
    write_lines(folder / "a.jsonl", QUESTIONS[:1])
    (folder / "b.csv").write_text("prompt\nHi\n")
    done = ask(model, "--input_file", folder, "--output_file", tmp_path / "out.jsonl")
    assert done.code == 0 and len(read_lines(tmp_path / "out.jsonl")) == 1, done.err
    assert f"warning: of a folder, files of one kind are read; left out: {folder}/b.csv;" in done.err


def test_an_interrupted_file_goes_on(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C and a torn line the rest is answered, as in one run; drawn tokens do not depend on the blocks."""
    source, out = write_lines(tmp_path / "in.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    flags = ("--input_file", source, "--temperature", 2, "--seed", 5, "--output_file")
    whole = ask(model, *flags, tmp_path / "whole.jsonl", "--batch_size", len(QUESTIONS))
    assert whole.code == 0, whole.err
    block, blocks = Answerer.block, []

    def interrupted(self: Answerer, prompts: Any, numbers: Any, rows: int) -> list[str]:
        blocks.append(list(numbers))
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return block(self, prompts, numbers, rows)

    monkeypatch.setattr(Answerer, "block", interrupted)
    stopped = ask(model, *flags, out, "--batch_size", 2)
    assert stopped.code == 130 and not out.exists()
    assert f"4 of {len(QUESTIONS)} answers are in {out}.partial; the same command goes on" in stopped.err
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("a") as file:
        file.write('[6, "tor')
    other = ask(model, *flags, out, "--temperature", 1, "--top_k", 3)
    assert "was begun with another temperature, top_k" in error_line(other)
    done = {number for numbers in blocks[:2] for number in numbers}
    blocks[:] = []
    resumed = ask(model, *flags, out, "--batch_size", 2)
    assert resumed.code == 0 and f"holds 4 of {len(QUESTIONS)} answers; the others follow" in resumed.err, resumed.err
    assert {number for numbers in blocks for number in numbers} == set(range(len(QUESTIONS))) - done
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text() and not partial.exists()
    partial.write_text("something else\n")
    out.unlink()
    assert "is no file of answers that this command began" in error_line(ask(model, *flags, out))


def test_two_commands_on_one_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused, and the first ends as alone. A disk that is full at the end leaves the answers alone."""
    source, out = write_lines(tmp_path / "in.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    flags = ("--input_file", source, "--output_file", out)
    block, second = Answerer.block, []

    def beside(self: Answerer, *args: Any) -> Any:
        monkeypatch.setattr(Answerer, "block", block)
        second.append(ask(model, *flags))
        return block(self, *args)

    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Answerer, "block", beside)
    first = ask(model, *flags)
    assert "another command writes its answers" in error_line(second[0])
    assert first.code == 0 and len(read_lines(out)) == len(QUESTIONS), first.err
    out.unlink()
    monkeypatch.setattr("llama_jax.run.answer_file.os.replace", full)
    assert ask(model, *flags).code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "model", "out.jsonl.partial"]


def test_a_file_that_another_command_finished_meanwhile(tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    first, second = AnswerFile(str(out)), AnswerFile(str(out))
    first.begin({"seed": 0}, len(QUESTIONS))
    first.add(range(len(QUESTIONS)), ["a"] * len(QUESTIONS))
    first.finish(read_questions(str(source)))
    with pytest.raises(InputError, match="is there already"):
        second.begin({"seed": 0}, len(QUESTIONS))
    assert {line["generated_text"] for line in read_lines(out)} == {"a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    AnswerFile(str(tmp_path / "out.jsonl")).begin({"seed": 0}, 1)
    assert "cannot be locked (Function not implemented)" in capfd.readouterr().err


BAD: dict[str, tuple[list[Any] | str, str]] = {
    "no form": ([{"prompt": "a"}, {"question": "a"}], "record 2 is no question (its keys: question); should have"),
    "no object": ([{"prompt": "a"}, ["a"]], "record 2 should be an object, not a list"),
    "no text": ([{"prompt": 3}], "record 1 has a number as 'prompt', should be a string"),
    "no input": ([{"instruction": "a", "input": ["b"]}], "record 1 has a list as 'input'"),
    "history": ([{"instruction": "a", "history": [["b", "c"]]}], "record 1 has 'history', which is not supported"),
    "image": ([{"text": "a", "image": "a.png"}], "record 1 has 'image', which is not supported"),
    "a role": ([{"messages": [{"role": "me", "content": "a"}]}], "the 'role' 'me' in turn 1"),
    "no question": ([{"messages": [{"role": "assistant", "content": "a"}]}], "has no turn before the assistant's"),
    "two answers": (
        [{"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "assistant")]}],
        "ends with two turns of the assistant",
    ),
    "tools": ([{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}], "does not write"),
    "no tokens": ([{"prompt": "a"}, {"text": ""}], "record 2: the text makes no tokens"),
    "no records": ("[]", "holds no records"),
    "empty": ("", "the file is empty"),
    "no JSON": ('{"prompt": "a"}\n{"prompt": "b"\n', "in.jsonl: not valid JSON at line 2"),
}


@pytest.mark.parametrize(("content", "named"), BAD.values(), ids=BAD.keys())
def test_bad_questions(
    content: list[Any] | str, named: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is refused in a line that names file and record, before the model is loaded."""
    monkeypatch.setattr(Opened, "load", lambda self: pytest.fail("loaded"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    write_json(model / "tokenizer.json", tokenizer | {"post_processor": None})  # no bos, so that "" has no tokens
    path = tmp_path / "in.jsonl"
    path.write_text(content) if isinstance(content, str) else write_lines(path, content)
    outcome = ask(model, "--input_file", path, "--output_file", tmp_path / "out.jsonl")
    line = error_line(outcome)
    assert line.startswith(f"error: {path}") and named in line
    assert not list(tmp_path.glob("out*"))


# -- Flags ------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[Any], str]] = {
    "top_p": (["--top_p", 1.5], "--top_p 1.5 should be a number from 0.0 to 1.0"),
    "min_p": (["--min_p", "nan"], "--min_p nan should be a number from 0.0 to 1.0"),
    "top_k": (["--top_k", -1], "--top_k -1 should be a number from 0 to"),
    "repetition_penalty": (["--repetition_penalty", 0], "--repetition_penalty 0.0 should be a number from 0.001"),
    "temperature": (["--temperature", "inf"], "--temperature inf should be a number from 0.0"),
    "no cold": (["--temperature", 1e-40], "--temperature 1e-40 should be 0 for the likeliest token, or 1e-30 or above"),
    "no room": (["--max_new_tokens", 10**9], "--max_new_tokens 1000000000 should be from 1 to 1048576"),
    "prompt in Latin-1": (["--prompt", "a\udcff"], "--prompt: not UTF-8"),
    "stop in Latin-1": (["--prompt", "a", "--stop", "b", "a\udcff"], "--stop: not UTF-8"),
    "nothing to draw": (["--temperature", 0, "--top_p", 0.9], "--top_p chooses among tokens to draw"),
    "seed": (["--seed", -1], "--seed -1 should be from 0"),
    "stop": (["--stop", ""], "--stop: an empty text"),
    "raw message": (["--raw", "--message", "Hi"], "--raw continues a text: give it as --prompt"),
    "raw instruction": (["--raw", "--instruction", "Hi"], "--raw continues a text: give it as --prompt"),
    "two questions": (["--prompt", "Hi", "--message", "Hi"], "not allowed with"),
    "input of a prompt": (["--prompt", "Hi", "--input", "x"], "--input belongs to --instruction"),
    "no output": (["--input_file", "in.jsonl"], "--input_file and --output_file go together"),
    "no input file": (["--output_file", "out.jsonl"], "--input_file and --output_file go together"),
    "a batch of one prompt": (["--prompt", "Hi", "--batch_size", 3], "--batch_size should be above 0, and belongs to"),
    "no batch": (["--input_file", "a", "--output_file", "b", "--batch_size", 0], "--batch_size should be above 0"),
    "no folder": (["--input_file", "a", "--output_file", "no/b"], "its folder is not there"),
    "a folder": (["--input_file", "a", "--output_file", "."], "--output_file .: is a folder"),
    "a long name": (
        ["--input_file", "in.jsonl", "--output_file", "n" * 300],
        ": cannot be read: File name too long; give a shorter path",
    ),
    "a bucket": (["--input_file", "a", "--output_file", "gs://b/c"], "should be a file on this machine"),
}


@pytest.mark.parametrize(("flags", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_flags_are_checked(flags: list[Any], named: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Opened, "load", lambda self: pytest.fail("loaded"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.chdir(model.parent)
    write_lines(Path("in.jsonl"), QUESTIONS)
    assert named in error_line(ask(model, *flags))


def test_memory_is_checked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, keys and values of a block that are a byte more than the memory are refused, and nothing is written."""
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    opened = open_model(parser.parse_args(["--model_name_or_path", str(model), "--use_cpu"]), "generate")
    arrays = jax.tree.leaves(opened.load_params())
    questions = write_lines(tmp_path / "in.jsonl", QUESTIONS)
    prompts = Prompts(opened.tokenizer, opened.check_tokens)
    longest = max(len(prompts.of_record(question, "").ids) for question in QUESTIONS)
    head = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    token = 2 * CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"] * head * 4  # bytes, in float32
    needed = sum(array.nbytes for array in arrays) + 2 * (longest + NEW) * token
    flags = ("--input_file", questions, "--output_file", tmp_path / "out.jsonl", "--batch_size", 2)
    monkeypatch.setattr("llama_jax.run.loaded.memory_use", lambda: (0, needed - 1))
    line = error_line(ask(model, *flags))
    assert f"2 prompt(s) at a time of up to {longest + NEW:,} tokens" in line
    assert "lower --max_new_tokens or --batch_size" in line
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr("llama_jax.run.loaded.memory_use", lambda: (0, needed))
    assert ask(model, *flags).code == 0


def test_stdin_is_a_prompt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is piped in is answered as --prompt; nothing is refused, as is bad UTF-8."""
    expected = answered(model, "--prompt", "Hello\nthere")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nthere\n"))
    assert answered(model) == expected
    for held, named in ((b"\n", "is no terminal and holds no text"), (b"a\xff", "stdin: not UTF-8")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(held), encoding="utf-8"))
        assert named in error_line(ask(model))


def test_a_prompt_without_a_template(model: Path) -> None:
    """It is an Alpaca instruction, which is said; --raw continues its text."""
    settings_ = json.loads((model / "tokenizer_config.json").read_text())
    del settings_["chat_template"]
    write_json(model / "tokenizer_config.json", settings_)
    outcome = ask(model, "--prompt", "Name a fish.")
    assert outcome.out.strip() == answered(model, "--instruction", "Name a fish.")
    assert "no chat template: the prompt is an Alpaca instruction; --raw continues" in outcome.err
    raw = ask(model, "--raw", "--prompt", alpaca_prompt({"instruction": "Name a fish."}))
    assert raw.out == outcome.out and "Alpaca" not in raw.err


ROPES: dict[str, dict[str, Any]] = {
    "one for all lengths": {},
    "dynamic": {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "longrope": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]},
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_prompts_of_several_blocks_of_keys(rope: dict[str, Any], tmp_path: Path) -> None:
    """A file's prompts of up to 300 tokens, in one padded block, are answered as transformers answers each alone.

    Of the scalings that depend on the length, each prompt has that of its own.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    arrays = make_arrays(CONFIG, seed=5)
    for name in arrays:
        arrays[name] *= 8 if "q_proj" in name or "k_proj" in name else 1  # scores that positions decide
    folder = write_tokenizer(write_model(tmp_path / "model", CONFIG | rope, arrays))
    theirs, tokenizer = transformers.LlamaForCausalLM.from_pretrained(folder).eval(), open_tokenizer(folder)
    texts = [("The sea is wide. " * 20)[:length] for length in (300, 40, 190)]
    questions = write_lines(tmp_path / "questions.jsonl", [{"text": text} for text in texts])
    ask(folder, "--input_file", questions, "--output_file", tmp_path / "answers.jsonl", "--temperature", 0)
    for text, record in zip(texts, read_lines(tmp_path / "answers.jsonl"), strict=True):
        (ids,) = tokenizer.encode_batch([text])
        assert len(ids) >= len(text)
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, len(ids) :]
        kept = [int(i) for i in out if int(i) != CONFIG["eos_token_id"]]
        assert record["generated_text"] == tokenizer.decode(kept)


def test_the_template_of_the_page_writes_alpacas_prompt(model: Path) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (template,) = re.findall(r"```jinja\n(.*?)```", page, re.DOTALL)
    asked = answered(model, "--instruction", "Name a fish.")
    assert answered(model, "--message", "Name a fish.") != asked
    (model / "chat_template.jinja").write_text(template)
    assert answered(model, "--message", "Name a fish.") == answered(model, "--prompt", "Name a fish.") == asked
    prompts = Prompts(open_tokenizer(model), lambda ids: None)
    turns = [{"role": r, "content": c} for r, c in (("user", "A"), ("assistant", "B"), ("user", "C"))]
    text = open_tokenizer(model).decode(prompts.of_chat(turns, "a chat").ids)
    assert text == alpaca_prompt({"instruction": "A"}) + "B" + alpaca_prompt({"instruction": "C"})


def test_stop_strings(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text before the first of them, over the ends of tokens; in a file too; the flag goes before the file's.

    A block ends with the last of its rows.
    """
    write_json(model / "generation_config.json", PENALTY)
    prompts = ["Hello", "Hello there, and more", "Hi"]
    texts = [answered(model, "--prompt", prompt, "--max_new_tokens", 40) for prompt in prompts]
    stop = texts[0][20:22]  # two tokens: a letter each
    expected = [text[: text.index(stop)] if stop in text else text for text in texts]
    assert 5 < len(expected[0]) <= 20
    flags = ("--max_new_tokens", 40, "--stop", "never", stop)
    assert [answered(model, "--prompt", prompt, *flags) for prompt in prompts] == expected
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    outcome = ask(model, "--input_file", source, "--output_file", tmp_path / "out.jsonl", *flags)
    assert outcome.code == 0, outcome.err
    assert [record["generated_text"] for record in read_lines(tmp_path / "out.jsonl")] == expected
    steps, step = [], Decoding.step
    monkeypatch.setattr(Decoding, "step", lambda self, count: (steps.append(count), step(self, count)))
    one = write_lines(tmp_path / "one.jsonl", [{"prompt": prompts[0]}])
    flags = ("--max_new_tokens", 300, "--stop", stop)
    assert ask(model, "--input_file", one, "--output_file", tmp_path / "first.jsonl", *flags).code == 0
    assert read_lines(tmp_path / "first.jsonl")[0]["generated_text"] == expected[0] and len(steps) == 1
    write_json(model / "generation_config.json", {"stop_strings": stop, "max_new_tokens": 40, **PENALTY})
    files = ("--model_name_or_path", model, "--use_cpu", "--prompt", prompts[0])
    obeyed = run(generate.main, *files)
    assert obeyed.out.strip() == expected[0] and "no effect" not in obeyed.err
    assert answered(model, "--prompt", prompts[0], "--max_new_tokens", 40, "--stop", "never") == texts[0]
    for bad in ({"stop_strings": [3]}, {"max_new_tokens": "many"}):
        write_json(model / "generation_config.json", bad)
        assert f"generation_config.json: {next(iter(bad))}" in error_line(run(generate.main, *files))


def test_an_answer_that_is_cut_is_said(model: Path) -> None:
    """Only where the limit of tokens ended it, not an end token or a stop string."""
    asked = ("--instruction", "Name a fish.")
    text = answered(model, *asked)
    for flags, is_cut in ((asked, True), ((*asked, "--stop", text[3]), False), (("--prompt", "Hello there"), False)):
        outcome = ask(model, *flags)
        assert (len(outcome.out.strip()) == NEW, f"(cut at --max_new_tokens {NEW})" in outcome.err) == (is_cut, is_cut)


def test_flags_of_drawing(model: Path) -> None:
    """A value of drawing draws, and is said; with the likeliest token alone left, the answer is the greedy one."""
    greedy = answered(model, "--prompt", "Hello")
    for flags in (["--top_p", 0.0], ["--top_k", 1, "--temperature", 5]):
        outcome = ask(model, "--prompt", "Hello", *flags)
        assert outcome.out.strip() == greedy, flags
        assert "tokens are chosen by temperature" in outcome.err
    drawn = {answered(model, "--prompt", "Hello", "--temperature", 5, "--seed", seed) for seed in (1, 1, 2, 3)}
    assert len(drawn) == 3
    assert answered(model, "--prompt", "Hello", "--repetition_penalty", 1) != greedy
