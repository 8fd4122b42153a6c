"""The cache of tokenised data: a hit is the miss bit for bit, and nothing but the same inputs is a hit."""

import contextlib
import io
import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny import ALPACA, CONFIG, log_entries, make_records, run, write_json, write_model, write_tokenizer

import train_jax
from llama_jax.base.errors import InputError
from llama_jax.base.files import cache_folder
from llama_jax.data import cache as cache_module
from llama_jax.data import origins
from llama_jax.data.cache import data_digest, load_examples, save_examples
from llama_jax.data.examples import Examples
from llama_jax.data.records import Bad
from llama_jax.data.sources import Source
from llama_jax.model.config import LlamaConfig
from llama_jax.plan.explain import examine
from llama_jax.setup import job as job_module
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import Job, make_job

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
alpaca = st.lists(
    st.fixed_dictionaries({"instruction": words, "output": words}, optional={"input": words}), min_size=1, max_size=5
)
texts = st.lists(st.fixed_dictionaries({"text": words}), min_size=1, max_size=5)
chats = st.lists(
    st.builds(
        lambda *said: {
            "messages": [{"role": role, "content": x} for role, x in zip(("user", "assistant"), said, strict=True)]
        },
        words,
        words,
    ),
    min_size=1,
    max_size=5,
)
TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


class Made(NamedTuple):
    job: Job
    said: str
    read: int  # data files that were parsed


@contextlib.contextmanager
def counted_reads() -> Iterator[list[Path]]:
    """The data files that are parsed meanwhile."""
    read: list[Path] = []
    original = job_module.read_records

    def read_records(sources: list[Source], bad: Bad) -> Any:
        read.extend(file for source in sources for file in source.files)
        return original(sources, bad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "read_records", read_records)
        yield read


def made(model: Path, data: Path, cache: Path, *flags: Any, config: dict[str, Any] = CONFIG) -> Made:
    """The job of these flags, by way of this cache."""
    argv = ["--model_name_or_path", model, "--data_path", data, "--num_train_epochs", "1", *flags]
    arguments, said = parse_arguments([str(x) for x in argv]), io.StringIO()
    with counted_reads() as read, pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setenv("XDG_CACHE_HOME", str(cache))
        job = make_job(arguments, LlamaConfig.from_hf(config, "config.json"), lambda: model, 1, True)
    return Made(job, said.getvalue(), len(read))


def assert_same(a: Examples, b: Examples) -> None:
    for name, dtype in (("input_ids", np.int32), ("labels", np.int32), ("offsets", np.int64)):
        first, second = getattr(a, name), getattr(b, name)
        assert first.dtype == second.dtype == dtype
        np.testing.assert_array_equal(first, second)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tokenizer(write_model(tmp_path / "model"))


# --- the file ---


@settings(max_examples=200)
@given(data=st.data(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), form=words)
def test_what_is_saved_is_loaded(data, lengths, form, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    numbers = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=sum(lengths), max_size=sum(lengths))
    ids, labels = (np.asarray(data.draw(numbers), np.int32) for _ in range(2))
    examples = Examples(ids, labels, np.cumsum([0, *lengths], dtype=np.int64))
    said: list[str] = []
    save_examples(folder, "name", form, examples, said.append)
    loaded = load_examples(folder, "name", said.append)
    assert loaded is not None and loaded[0] == form
    assert_same(loaded[1], examples)
    assert load_examples(folder, "other", said.append) is None
    assert said == [] and [p.name for p in folder.iterdir()] == ["name"]


def some_examples(seed: int = 0, count: int = 5) -> Examples:
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *rng.integers(1, 30, count)], dtype=np.int64)
    return Examples(*rng.integers(0, 2**31 - 1, (2, offsets[-1])).astype(np.int32), offsets)


def test_the_arrays_stay_on_the_disk(tmp_path):
    """A view of a memory map, however deep; an array that was read owns its memory or that of bytes."""
    save_examples(tmp_path, "name", "alpaca", some_examples(), print)
    loaded = load_examples(tmp_path, "name", print)
    assert loaded is not None
    for array in vars(loaded[1]).values():
        bases = [array]
        while getattr(bases[-1], "base", None) is not None:
            bases.append(bases[-1].base)
        assert any(isinstance(base, np.memmap) for base in bases)
        assert not array.flags.writeable


@pytest.mark.parametrize("piece", [16, cache_module.PIECE])
def test_a_damaged_file_is_found(tmp_path, monkeypatch, piece):
    """Each byte changed, and each shorter length: no examples, one line that names the file. Only the spaces that fill
    the first line up say nothing, wherever they stand."""
    monkeypatch.setattr(cache_module, "PIECE", piece)
    examples = some_examples(count=3)
    save_examples(tmp_path, "name", "alpaca", examples, print)
    path = tmp_path / "name"
    whole = path.read_bytes()
    spoilt = [whole[:n] for n in range(len(whole))]
    spoilt += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole)) if whole[i] != ord(" ")]
    spoilt += [whole[:-32] + whole[-16:] + whole[-32:-16]]
    spoilt += [whole + b"\0", b"\n" + whole, b"[]\n" + whole, b"\xff\n" + whole]
    for data in spoilt:
        path.write_bytes(data)
        said: list[str] = []
        assert load_examples(tmp_path, "name", said.append) is None
        assert len(said) == 1 and str(path) in said[0] and "damaged" in said[0] and "\n" not in said[0]
    save_examples(tmp_path, "name", "alpaca", examples, print)
    assert path.read_bytes() == whole


def test_writers_at_once_disturb_no_reader(tmp_path):
    """Large enough for several writes to the file; readers see the whole file or none."""
    examples, said = some_examples(count=20_000), []
    threads = [
        threading.Thread(target=lambda: [save_examples(tmp_path, "name", "x", examples, said.append) for _ in range(8)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    loads = 0
    while any(thread.is_alive() for thread in threads):
        if loaded := load_examples(tmp_path, "name", said.append):
            assert_same(loaded[1], examples)
            loads += 1
    assert loads and said == []
    assert [p.name for p in tmp_path.iterdir()] == ["name"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    said: list[str] = []
    save_examples(tmp_path, "name", "alpaca", some_examples(), said.append)
    assert len(said) == 1 and "not cached" in said[0] and "No space left on device" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder("data") == Path("/x/llama_jax/data")
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert cache_folder("data") == Path.home() / ".cache" / "llama_jax" / "data"


# --- its name ---

files = st.dictionaries(
    st.sampled_from(
        [
            *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
            "additional_chat_templates/tool_use.jinja",
        ]
    ),
    st.binary(max_size=2),
    max_size=3,
)
inputs = st.tuples(
    st.binary(max_size=2), st.sampled_from(["a.json", "b.json", "a.jsonl"]), st.none() | files, st.integers(1, 3)
)


@settings(max_examples=40)
@given(pair=st.tuples(inputs, inputs))
@example(pair=tuple((b"", "a.json", {"additional_chat_templates/tool_use.jinja": text}, 1) for text in (b"a", b"b")))
def test_only_the_same_inputs_have_the_same_name(pair, tmp_path_factory):
    """The data's bytes and kind of file, each of the tokenizer's files, the limit; not the file's own name."""
    names, decisive = [], []
    for data, name, tokenizer, limit in pair:
        folder = tmp_path_factory.mktemp("inputs")
        (folder / name).write_bytes(data)
        for file, content in (tokenizer or {}).items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        (folder / "model.safetensors").write_bytes(folder.name.encode())  # decides nothing
        names.append(data_digest([folder / name], None if tokenizer is None else folder, {"model_max_length": limit}))
        decisive.append((data, name.split(".")[1], tokenizer or {}, limit))
    assert (names[0] == names[1]) == (decisive[0] == decisive[1])


@pytest.mark.parametrize("piece", [1, 2, 3, cache_module.PIECE])
def test_a_file_in_pieces_has_a_digest_of_its_own(tmp_path, monkeypatch, piece):
    """All files of at most seven letters of two."""
    monkeypatch.setattr(cache_module, "PIECE", piece)
    path, contents = tmp_path / "file", [bytes(x) for n in range(8) for x in itertools.product(b"ab", repeat=n)]
    digests = []
    for content in contents:
        path.write_bytes(content)
        digests.append(cache_module._file_digest(path))
        assert cache_module._file_digest(path) == digests[-1]
    assert len(set(digests)) == len(contents) == 255


def test_the_code_and_its_libraries_are_in_the_name(tmp_path, monkeypatch):
    """Copied elsewhere, with one file changed: the package makes other examples."""
    data = write_json(tmp_path / "data.json", ALPACA)
    name = data_digest([data], None, {})
    copy = shutil.copytree(Path(job_module.__file__).parents[1] / "data", tmp_path / "copy")
    monkeypatch.setattr("llama_jax.data.cache.__file__", str(copy / "cache.py"))
    assert data_digest([data], None, {}) == name
    for file in ("records.py", "examples.py", "chat.py", "origins.py", "tokenizer.py"):
        with (copy / file).open("a") as f:
            f.write("#")
        assert name != (name := data_digest([data], None, {}))
    names = set()
    for changed in (None, "sentencepiece", "tokenizers", "jinja2", "transformers"):
        monkeypatch.setattr("llama_jax.data.cache.version", lambda n, one=changed: "2" if n == one else "1")
        names.add(data_digest([data], None, {}))
    assert len(names) == 5


# --- a run ---


@settings(max_examples=40)
@given(
    records=alpaca | texts | chats | st.builds(make_records, st.integers(1, 6), st.integers(0, 9)),
    limit=st.integers(180, 400),
    split=st.sampled_from([0, 40]),
    evaluate=st.booleans(),
)
def test_a_run_from_the_cache_is_the_same_run(records, limit, split, evaluate, tmp_path_factory):
    assume(not split or (len(records) > 2 and not evaluate))
    folder = tmp_path_factory.mktemp("run")
    model, data = write_tokenizer(write_model(folder / "model")), write_json(folder / "data.json", records)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    flags = ["--model_max_length", limit, "--validation_split_percentage", split]
    if evaluate:
        flags += ["--eval_data_path", write_json(folder / "eval.json", records[::-1]), "--eval_strategy", "epoch"]
    try:
        first = made(model, data, folder / "cache", *flags)
    except InputError as e:  # nothing to learn, where the prompts are too long
        assert "every label is masked" in str(e)
        with pytest.raises(InputError, match="every label is masked"):
            made(model, data, folder / "cache", *flags)
        return
    second = made(model, data, folder / "cache", *flags)
    distinct = 2 if evaluate and records[::-1] != records else 1
    assert (first.read, second.read) == (1 + evaluate, 0)
    assert len(list((folder / "cache" / "llama_jax" / "data").iterdir())) == distinct
    assert_same(first.job.examples, second.job.examples)
    assert (first.job.eval_examples is None) == (second.job.eval_examples is None) == (not (split or evaluate))
    if first.job.eval_examples is not None and second.job.eval_examples is not None:
        assert_same(first.job.eval_examples, second.job.eval_examples)
    for name in ("form", "held_out", "config"):
        assert getattr(first.job, name) == getattr(second.job, name)
    assert (first.job.tokenizer is None) == (second.job.tokenizer is None) == ("input_ids" in records[0])
    assert first.said == second.said


def test_another_limit_or_tokenizer_is_tokenised_again(model, tmp_path):
    data, cache = write_json(tmp_path / "data.json", ALPACA), tmp_path / "cache"
    whole = made(model, data, cache, "--model_max_length", "400")
    cut = made(model, data, cache, "--model_max_length", "200")
    assert whole.read == cut.read == 1
    assert cut.job.examples.lengths.max() == 200 < whole.job.examples.lengths.max()
    config = json.loads((model / "tokenizer_config.json").read_text())
    write_json(model / "tokenizer_config.json", {**config, "eos_token": "<unk>"})
    other = made(model, data, cache, "--model_max_length", "400")
    assert other.read == 1
    assert set(other.job.examples.input_ids[other.job.examples.offsets[1:] - 1]) == {258}


def test_the_tokenizers_warnings_are_said_each_time(model, tmp_path):
    config = json.loads((model / "tokenizer_config.json").read_text())
    write_json(model / "tokenizer_config.json", {**config, "unk_token": "</s>"})
    data = write_json(tmp_path / "data.json", ALPACA)
    for reads in (1, 0):
        job = made(model, data, tmp_path / "cache")
        assert job.read == reads
        assert "eos_token '</s>' is also its unk_token" in job.said


def test_another_models_vocabulary_is_checked_from_the_cache(model, tmp_path):
    data = write_json(tmp_path / "data.json", [{"input_ids": [1, 2, 99], "labels": [-100, 2, 99]}])
    assert made(model, data, tmp_path / "cache").read == 1
    with pytest.raises(InputError, match=r"data\.json: record 1 has the token id 99, outside the vocabulary of 99"):
        made(model, data, tmp_path / "cache", config={**CONFIG, "vocab_size": 99})


def test_the_forms_are_compared_from_the_cache(model, tmp_path):
    text = write_json(tmp_path / "text.json", ALPACA)
    tokens = write_json(tmp_path / "tokens.json", make_records(3))
    for data in (text, tokens):
        made(model, data, tmp_path / "cache")
    with pytest.raises(InputError, match=r"tokens\.json: holds tokenized records, and .*text\.json alpaca ones"):
        made(model, text, tmp_path / "cache", "--eval_data_path", tokens, "--eval_strategy", "epoch")


def test_a_damaged_file_is_made_again(model, tmp_path):
    data, cache = write_json(tmp_path / "data.json", ALPACA), tmp_path / "cache"
    first = made(model, data, cache)
    (path,) = (cache / "llama_jax" / "data").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    again = made(model, data, cache)
    assert again.read == 1 and again.said.count("\n") == 2 and "damaged" in again.said  # and what form the data has
    assert_same(first.job.examples, again.job.examples)
    assert path.read_bytes() == whole


def test_a_run_goes_on_without_a_cache(model, tmp_path):
    """Below a file no folder can be made; of two runs both tokenise."""
    data = write_json(tmp_path / "data.json", ALPACA)
    (tmp_path / "file").touch()
    for _ in range(2):
        job = made(model, data, tmp_path / "file")
        assert job.read == 1 and len(job.job.examples) == len(ALPACA)
        assert job.said.count("\n") == 2 and "not cached" in job.said and str(tmp_path / "file") in job.said


@pytest.mark.parametrize("place", ["file", "config", "folder"])
def test_a_template_that_writes_the_date_is_of_its_day(model, tmp_path, monkeypatch, place):
    """As LLaMA 3.2's does. What else there is to train on keeps its tokens."""
    from transformers.utils import chat_template_utils

    template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    tools = []
    if place == "file":
        (model / "chat_template.jinja").write_text(template)
    elif place == "folder":  # of the template for tools
        (model / "chat_template.jinja").write_text(TEMPLATE)
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0] }}" + template)
        tools = [{"name": "f"}]
    else:
        config = json.loads((model / "tokenizer_config.json").read_text())
        write_json(model / "tokenizer_config.json", {**config, "chat_template": template})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = write_json(tmp_path / "chat.json", [{"messages": turns, "tools": tools}])
    other = write_json(tmp_path / "other.json", ALPACA)
    for day, reads in ((11, (1, 1)), (11, (0, 0)), (12, (1, 0)), (12, (0, 0))):
        today = datetime(2026, 3, day, 9)
        for module in (chat_template_utils, origins):
            monkeypatch.setattr(module, "datetime", SimpleNamespace(now=lambda today=today: today))
        monkeypatch.setattr(job_module, "date", SimpleNamespace(today=lambda today=today: today.date()), raising=False)
        jobs = made(model, chat, tmp_path / "cache"), made(model, other, tmp_path / "cache")
        assert tuple(job.read for job in jobs) == reads
        assert jobs[0].job.tokenizer is not None
        text = jobs[0].job.tokenizer.decode(jobs[0].job.examples.input_ids)
        assert text.removeprefix("{'name': 'f'}").startswith(f"{day} Mar 2026")
        assert "writes today's date" in jobs[0].said and "date" not in jobs[1].said


def test_a_record_that_the_template_refuses_is_named(model, tmp_path):
    (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    data = write_json(tmp_path / "data.json", [{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(InputError, match=r"data\.json: record 1: .*no"):
        made(model, data, tmp_path / "cache")


def test_tokens_need_no_tokenizer(tmp_path):
    """A model in GGUF may be without one: what then fails is only text."""
    tokens = write_json(tmp_path / "tokens.json", make_records(3))
    text = write_json(tmp_path / "text.json", ALPACA)

    def no_folder() -> Path:
        raise InputError("model.gguf: no tokenizer inside")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        config = LlamaConfig.from_hf(CONFIG, "config.json")
        arguments = parse_arguments(["--model_name_or_path", "model.gguf", "--data_path", str(tokens)])
        for _ in range(2):
            assert len(make_job(arguments, config, no_folder, 1).examples) == 3
        arguments.data_path = [str(text)]
        with pytest.raises(InputError, match="no tokenizer inside"):
            make_job(arguments, config, no_folder, 1)


def test_files_of_another_kind_in_a_folder_are_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_json(folder / "tokens.json", make_records(3))
    (folder / "other.csv").write_text("text\na\n")
    config, said = LlamaConfig.from_hf(CONFIG, "config.json"), []
    flags = ["--model_name_or_path", "x", "--data_path", str(folder), "--cache_dir", str(tmp_path / "cache")]
    assert len(make_job(parse_arguments(flags), config, lambda: tmp_path, 1, say=said.append).examples) == 3
    assert [line for line in said if f"left out: {folder / 'other.csv'}; name a file" in line]


def test_tokens_longer_than_the_limit_are_said_each_time(model, tmp_path):
    """They are not cut, as the help says."""
    lengths = [3, 10, 11, 400]
    records = [{"input_ids": [1] * n, "labels": [1] * n} for n in lengths]
    data = write_json(tmp_path / "tokens.json", records)
    for reads in (1, 0):
        job = made(model, data, tmp_path / "cache", "--model_max_length", "10")
        assert job.read == reads and job.job.examples.lengths.tolist() == lengths
        (line,) = [line for line in job.said.splitlines() if "model_max_length" in line]
        assert "--model_max_length 10: 2 records" in line and "400 tokens" in line and str(data) in line
    assert "model_max_length" not in made(model, data, tmp_path / "cache", "--model_max_length", "400").said


def test_the_command_trains_from_the_cache(model, tmp_path):
    records = [*ALPACA, {"instruction": "Only here.", "output": "In no other test."}]
    data = write_json(tmp_path / "data.json", records)
    losses, parsed = [], []
    for name in ("first", "second"):
        out = tmp_path / name
        argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--max_steps", 2]
        with counted_reads() as read:
            outcome = run(train_jax.main, *argv, "--logging_steps", 1)
        assert outcome.code == 0, outcome.err
        losses.append([entry["loss"] for entry in log_entries(out)])
        parsed.append(len(read))
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert parsed == [1, 0]


def test_what_is_left_out_is_said_from_the_cache_too(model, tmp_path):
    """Bad records of two files, and chats that the template refuses; the explanation reads the same records again."""
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('I refuse') }}{% endif %}" + TEMPLATE
    (model / "chat_template.jinja").write_text(refusing)
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in ("a", "no", "b")]
    a = write_json(tmp_path / "a.json", [{"messages": turn} for turn in (turns[1], turns[0], turns[0][:1])])
    b = write_json(tmp_path / "b.json", [{"messages": turn} for turn in (turns[0][:1], turns[1], turns[2])])
    flags = ["--skip_bad_records", "True"]
    first, second = (made(model, f"{a},{b}", tmp_path / "cache", *flags) for _ in range(2))
    assert (first.read, second.read) == (2, 0)
    (said,) = (line for line in first.said.splitlines() if "left out" in line)
    assert said in second.said.splitlines()
    assert said.startswith("warning: 4 bad records are left out: ")
    nothing = "has no turn of the assistant, so there is nothing to train"
    assert f"{a}: record 3 {nothing}; {b}: record 1 {nothing}; {a}: record 1: the chat template refuses" in said
    assert_same(first.job.examples, second.job.examples)
    good = made(model, write_json(tmp_path / "good.json", [{"messages": turns[i]} for i in (0, 2)]), tmp_path / "cache")
    assert_same(first.job.examples, good.job.examples)
    assert examine(first.job)["examples"] == 2
    with pytest.raises(InputError, match=r"a.json: record 3 has no .*; .*b.json: record 1 .*; 2 of 6 records are bad"):
        made(model, f"{a},{b}", tmp_path / "cache")
