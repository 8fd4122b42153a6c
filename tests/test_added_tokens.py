"""Tokens that the files of a folder add or name: drawn folders and texts, against AutoTokenizer of 4.37.2 and of 5."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_tokenizer
import pytest
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny import CONFIG, write_model, write_tokenizer
from vocabularies import (
    convert_sentencepiece,
    copy,
    for_tokenizers_0_15,
    processor,
    train_byte_level,
    train_sentencepiece,
    write,
)

from llama_jax.base.errors import InputError
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.model.config import LlamaConfig
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import Job, make_job

transformers.logging.set_verbosity_error()

TEXTS = ("<a>", "<ab>", "ab>", "<im>", "<fim>", "the", "s", "[PAD]", "<s>", "</s>", "<pad>", "\u2581the", "two words")
flag = st.booleans()


@st.composite
def added(draw: Any, text: str) -> dict[str, Any]:
    """A token as JSON describes it."""
    flags = {name: draw(flag) for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return {"content": text, **flags, "special": draw(flag)}


@st.composite
def named(draw: Any, token: dict[str, Any], typed: bool) -> str | dict[str, Any]:
    """A token as a special key names it: its text, or, as in LLaMA's first folders, an object of one of its tokens.

    `tokenizer_config.json` marks objects (`typed`). Of new tokens with several descriptions, tokenizers 0.15 and 0.23
    make different things.
    """
    if token["content"] not in ("<s>", "</s>") or draw(flag):
        return token["content"]
    token = {key: value for key, value in token.items() if key != "special"}
    return {**token, "__type": "AddedToken"} if typed else token


@st.composite
def folders(draw: Any) -> dict[str, Any]:
    """What is written beside a model's vocabulary: the files by name."""
    texts = draw(st.lists(st.sampled_from(TEXTS), unique=True, min_size=1, max_size=5))
    tokens = {text: draw(added(text)) for text in [*texts, "</s>"]}
    config: dict[str, Any] = {}
    mapped: dict[str, Any] = {}
    files: dict[str, Any] = {"tokenizer_config.json": config}
    for key in ("pad_token", "eos_token", "mask_token"):
        for file in (config, mapped):
            if draw(st.integers(0, 2)) == 0:
                words = [text for text in texts if " " not in text]  # transformers refuses an eos with a space
                text = draw(st.sampled_from([*words, "</s>", None] if key == "pad_token" else [*words, "</s>"]))
                file[key] = text and draw(named(tokens[text], file is config))
    for file in (config, mapped):
        if draw(st.integers(0, 2)) == 0:
            listed = draw(st.lists(st.sampled_from(texts), unique=True))
            file["additional_special_tokens"] = [draw(named(tokens[text], file is config)) for text in listed]
    if draw(st.booleans()):
        listed = draw(st.lists(st.sampled_from(texts), unique=True))
        config["added_tokens_decoder"] = {str(400 + i): tokens[text] for i, text in enumerate(listed)}
    if draw(st.booleans()):
        files["special_tokens_map.json"] = mapped
    if draw(st.booleans()):
        listed = draw(st.lists(st.sampled_from(texts), unique=True))
        files["added_tokens.json"] = {text: 400 + i for i, text in enumerate(listed)}
    if draw(flag):
        config["legacy"] = draw(flag)
    if draw(st.integers(0, 3)) == 0:
        config["add_eos_token"] = draw(flag)
    return files


@st.composite
def cases(draw: Any) -> tuple[dict[str, Any], list[str]]:
    """Files, and texts full of the tokens that they name, with and without spaces around."""
    files = draw(folders())
    tokens = sorted({text for text in TEXTS if json.dumps(text) in json.dumps(files)})
    fragment = st.sampled_from([*tokens, *tokens, *TEXTS, *("x", "a word", "é", "\u2581", "1", "\n")])
    spaced = st.tuples(st.sampled_from(["", "", " ", "  "]), fragment).map("".join)
    return files, draw(st.lists(st.lists(spaced, max_size=10).map("".join), min_size=1, max_size=4))


def with_symbols(to: Path, _: Path) -> None:
    """Special tokens that are pieces: control symbols, which the text cannot make, and user-defined ones."""
    train_sentencepiece(to, symbols={"control_symbols": ["<im>"], "user_defined_symbols": ["<fim>"]})


VOCABULARIES: dict[str, Callable[[Path, Path], Any]] = {
    "slow": lambda to, small: copy(small, to),
    "slow, symbols": with_symbols,
    "slow, spaces removed": lambda to, _: train_sentencepiece(to, spaces=False),
    "LLaMA 2": lambda to, small: convert_sentencepiece(to, small),
    "LLaMA 3": lambda to, _: train_byte_level(to),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request: Any, small: Path, tmp_path_factory: Any) -> Path:
    """A folder to which drawn files are added."""
    folder = tmp_path_factory.mktemp("vocabulary") / "model"
    VOCABULARIES[request.param](folder, small)
    if (folder / "tokenizer.json").exists():
        for_tokenizers_0_15(folder)
    return folder


@pytest.fixture(scope="module")
def old() -> Iterator[hf_tokenizer.Server]:
    """transformers 4.37.2."""
    server = hf_tokenizer.Server()
    yield server
    server.close()


def make(folder: Path, vocabulary: Path, files: dict[str, Any]) -> Path:
    shutil.copytree(vocabulary, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, "tokenizer_config.json", config | files["tokenizer_config.json"])
    for name in files.keys() - {"tokenizer_config.json"}:
        write(folder, name, files[name])
    return folder


def described(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """What `hf_tokenizer.describe` says of theirs."""

    def now() -> dict[str, Any]:
        return {
            "length": len(tokenizer),
            "special": dict(tokenizer.special),
            "ids": tokenizer.encode_batch(texts),
            "added": {token.content: i for i, token in tokenizer.added().items()},
        }

    return {**now(), "alpaca": (tokenizer.add_missing_special_tokens(), now())[1]}


def clash(theirs: dict[str, Any]) -> bool:
    """Whether a new token got another token's id: 4.37 takes the number of tokens, though the ids may have a gap."""
    return len(set(theirs["added"].values())) < len(theirs["added"])


def takes_another_text(files: dict[str, Any]) -> bool:
    """Whether 4.37 mixes up two texts: it files each token of `added_tokens.json` under the text of the last token of
    `additional_special_tokens`, and a special token of that text becomes the other."""
    more = files.get("special_tokens_map.json", {}).get("additional_special_tokens")
    decoder = "added_tokens_decoder" in files["tokenizer_config.json"]
    return bool(more and files.get("added_tokens.json") and not decoder)


STRIPPING = {"content": "<a>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
END = {"content": "</s>", "lstrip": True, "__type": "AddedToken"}
NORMALIZED = {"added_tokens_decoder": {"2": {"content": "</s>", "normalized": True, "special": True}}}
DECODED = {"additional_special_tokens": ["<a>"], "added_tokens_decoder": {"400": {**STRIPPING, "special": False}}}


@settings(max_examples=12)
@given(case=cases())
@example(case=({"tokenizer_config.json": {"eos_token": END}}, ["a </s> b"]))  # tokenizer.json's flags hold
@example(case=({"tokenizer_config.json": {"legacy": False}}, ["a</s> b"]))  # the space of " b" stays
@example(case=({"tokenizer_config.json": NORMALIZED}, ["a</s>b"]))  # tokenizer.json has cut </s> out of the raw text
@example(case=({"tokenizer_config.json": DECODED}, ["x <a> y"]))  # the decoder's flags hold
@example(case=({"tokenizer_config.json": {}, "added_tokens.json": {"\u2581the": 400}}, ["the a"]))  # a piece's new id
def test_tokens_are_those_of_4_37(vocabulary, old, case):
    """Length, special and added tokens, ids: as opened, after stanford_alpaca's rule, and of what is saved then."""
    files, texts = case
    assume(not takes_another_text(files))
    with tempfile.TemporaryDirectory() as parent:
        folder = make(Path(parent) / "model", vocabulary, files)
        theirs = old.describe(folder, texts)
        tokenizer = open_tokenizer(folder)
        ours = described(tokenizer, texts)
        assume(not clash(theirs))
        if clash(theirs["alpaca"]):
            assert not clash(ours["alpaca"])
            ours["alpaca"] = theirs["alpaca"]
        assert ours == theirs
        assert_same_when_saved(tokenizer, Path(parent), texts, "4.37", old.describe)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_the_models_type_decides_where_no_file_names_a_class(small, old, tmp_path, model_type):
    folder, texts = convert_sentencepiece(tmp_path / "model", small), ["a b"]
    for_tokenizers_0_15(folder)
    write(folder, "tokenizer_config.json", {})
    write(folder, "config.json", {"model_type": model_type})
    assert described(open_tokenizer(folder), texts) == old.describe(folder, texts)


@settings(max_examples=8)
@given(case=cases())
def test_tokens_are_those_of_5(vocabulary, case):
    files, texts = case
    with tempfile.TemporaryDirectory() as parent:
        folder = make(Path(parent) / "model", vocabulary, files)
        try:
            theirs = hf_tokenizer.describe(str(folder), texts)
        except (TypeError, ValueError):  # an eos with a space in it, or objects among additional_special_tokens
            with pytest.raises(InputError, match="transformers cannot open it"):
                open_tokenizer(folder, "5")
            return
        tokenizer = open_tokenizer(folder, "5")
        assert described(tokenizer, texts) == theirs
        assert_same_when_saved(tokenizer, Path(parent), texts, "5", lambda *x: hf_tokenizer.describe(str(x[0]), x[1]))


def assert_same_when_saved(
    tokenizer: Tokenizer, parent: Path, texts: list[str], compat: str, describe: Callable[..., dict[str, Any]]
) -> None:
    saved = parent / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    before = described(tokenizer, texts)
    again, theirs = described(open_tokenizer(saved, compat), texts), describe(saved, texts)
    for key in ("length", "special", "ids"):
        assert before[key] == again[key] == theirs[key]


@settings(max_examples=12)
@given(case=cases())
def test_offsets_are_places_in_the_text(vocabulary, case):
    """The ids are those without bos and eos; an added token's span is its text; no letter is without a token."""
    files, texts = case
    with tempfile.TemporaryDirectory() as parent:
        config = {**files["tokenizer_config.json"], "add_bos_token": False, "add_eos_token": False}
        folder = make(Path(parent) / "model", vocabulary, {**files, "tokenizer_config.json": config})
        tokenizer = open_tokenizer(folder)
        added = {i: token.content for i, token in tokenizer.added().items()}
        whole = tokenizer.encode_batch(texts)
        for text, ids, (got, spans) in zip(texts, whole, tokenizer.encode_with_offsets(texts), strict=True):
            assert got == (ids if tokenizer.adds() == (False, False) else ids[1:])
            covered = set()
            for i, (start, end) in zip(got, spans, strict=True):
                assert 0 <= start <= end <= len(text)
                covered |= {*range(start, end)}
                if i in added:
                    assert text[start:end].strip(" \n\u2581") == added[i].strip(" \u2581")
            assert all(text[k].isspace() or text[k] == "\u2581" for k in {*range(len(text))} - covered)


# --- what the rows of a model are ---


@settings(max_examples=12)
@given(files=folders(), rows=st.integers(380, 420))
def test_each_row_that_a_file_names_is_kept(vocabulary, files, rows):
    with tempfile.TemporaryDirectory() as parent:
        folder = make(Path(parent) / "model", vocabulary, files)
        tokenizer = open_tokenizer(folder)
        before = {*tokenizer.added()}
        new = tokenizer.add_missing_special_tokens()
        config = files["tokenizer_config.json"]
        declared = [*map(int, config["added_tokens_decoder"])] if "added_tokens_decoder" in config else []
        if not declared and "added_tokens_decoder" not in config:
            declared = [*files.get("added_tokens.json", {}).values()]
        kept = tokenizer.rows(rows)
        assert kept >= len(tokenizer) and kept > max([*new, *tokenizer.added()])
        assert all(i < kept for i in declared if i < rows)
        assert len({*new}) == len(new) and not {*new} & {*before}


def test_cases(shared, old, tmp_path):
    """Folders of public reports, as both versions of transformers read them."""
    cases = shared / "cases" / "data"
    tokenizer = open_tokenizer(cases / "03" / "model")
    assert (len(tokenizer), tokenizer.token_to_id("<|tool_call|>"), tokenizer.token_to_id("<|tool_end|>")) == (
        808,
        806,
        807,
    )
    assert open_tokenizer(cases / "04" / "tokenizer").token_to_id("<|im_start|>") == 3
    texts = ["<|im_start|>user\nHello<|im_end|>\n"]
    ids = open_tokenizer(cases / "04" / "tokenizer").encode_batch(texts)
    assert ids == old.describe(cases / "04" / "tokenizer", texts)["ids"] and 3 in ids[0]
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(shared / "data" / "llama-tokenizer" / name, tmp_path / name)
    shutil.copyfile(cases / "04" / "sp_additional.tokenizer_config.json", tmp_path / "tokenizer_config.json")
    assert len(open_tokenizer(tmp_path)) == 32002


def job_of(model: Path, data: Path, cache: Path, *flags: str) -> tuple[Job, str]:
    """The job of these flags, and what is said meanwhile."""
    said: list[str] = []
    argv = [
        "--model_name_or_path",
        str(model),
        "--data_path",
        str(data),
        "--output_dir",
        "out",
        "--cache_dir",
        str(cache),
    ]
    config = LlamaConfig.from_hf(json.loads((model / "config.json").read_text()))
    job = make_job(parse_arguments([*argv, *flags]), config, lambda: model, 1, True, said.append)
    return job, "\n".join(said)


@pytest.mark.parametrize("hf_compat", ["4.37", "5"])
def test_rows_of_cases(shared, tmp_path, hf_compat):
    """03: tokens that tokenizer.json lacks have rows. 06: a pad past the model's rows, Alpaca's [PAD] behind it."""
    case = shared / "cases" / "data" / "03"
    job, _ = job_of(case / "model", case / "data.jsonl", tmp_path, "--hf_compat", hf_compat)
    assert (job.config.vocab_size, job.new_ids) == (809, (808,))
    assert {806, 807} <= {*job.examples.input_ids.tolist()}
    case = shared / "cases" / "data" / "06"
    model = tmp_path / "model"
    shutil.copytree(shared / "data" / "stories260K", model)
    shutil.copyfile(case / "added_tokens.json", model / "added_tokens.json")
    job, said = job_of(model, case / "four.json", tmp_path, "--hf_compat", hf_compat)
    assert (job.config.vocab_size, job.new_ids) == (514, (513,))
    assert "grows from 512 to 514 rows" in said


def test_the_versions_ids_are_cached_apart(shared, tmp_path):
    """transformers 5 cuts runs of spaces otherwise than sentencepiece does, which 4.37 runs."""
    model = tmp_path / "model"
    shutil.copytree(shared / "data" / "llama-tokenizer", model)
    write(
        model,
        "config.json",
        json.loads((shared / "data" / "stories260K" / "config.json").read_text()) | {"vocab_size": 32000},
    )
    records = [{"text": f"def f(x):{' ' * n}return x{' ' * n}+ 1"} for n in range(1, 40)]
    write(tmp_path, "data.json", records)
    sp, theirs = processor(model), transformers.AutoTokenizer.from_pretrained(model)
    expected = {
        "4.37": [[1, *sp.encode(r["text"]), 2] for r in records],
        "5": [[*theirs(r["text"])["input_ids"], 2] for r in records],
    }
    assert expected["4.37"] != expected["5"]
    for compat, ids in expected.items():
        job, _ = job_of(model, tmp_path / "data.json", tmp_path / "cache", "--hf_compat", compat)
        assert [job.examples[i][0].tolist() for i in range(len(records))] == ids


def test_an_eos_that_is_nowhere_trained_is_said(tmp_path):
    """As of chats whose template ends a turn with another token than eos."""
    model = write_tokenizer(write_model(tmp_path / "model", {**CONFIG, "vocab_size": 259}))
    end = "{% for m in messages %}{{ m.role + ': ' }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    write(
        model,
        "tokenizer_config.json",
        json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": end},
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(tmp_path, "chats.json", [{"messages": turns}])
    write(tmp_path, "texts.json", [{"text": "a"}])
    assert "'</s>' is not trained in" in job_of(model, tmp_path / "chats.json", tmp_path)[1]
    assert "not trained" not in job_of(model, tmp_path / "texts.json", tmp_path)[1]
