"""Text to ids against sentencepiece, `tokenizers` and transformers themselves.

Rules of HF's slow LlamaTokenizer (transformers 4.37) that are written out here a second time: special tokens are cut
out of the text from left to right, the longest first; each part between them goes through sentencepiece, with the dummy
space in front of every part ("legacy") or of the first alone.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hf_reader
import pytest
import sentencepiece
import tokenizers
from hf_tokenizer import DEFAULTS, SPECIAL, Server, describe
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models
from vocabularies import (
    BOS,
    CORPUS,
    END,
    EOS,
    convert_sentencepiece,
    copy,
    for_tokenizers_0_15,
    processor,
    train_byte_level,
    train_sentencepiece,
    write,
)

from llama_jax.base.errors import InputError
from llama_jax.data.examples import alpaca_prompt
from llama_jax.data.tokenizer import (
    FastTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    copy_tokenizer,
    open_tokenizer,
)

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session", params=["small", "llama", "stories"])
def folder(request) -> Path:
    """A folder with a bare `tokenizer.model`: one trained here, LLaMA's, and that of a small model."""
    if request.param == "small":
        return request.getfixturevalue("small")
    names = {"llama": "llama-tokenizer", "stories": "stories260K"}
    return request.getfixturevalue("shared") / "data" / names[request.param]


@pytest.fixture(scope="session")
def llama(shared) -> Path:
    return shared / "data" / "llama-tokenizer"


class Opened(NamedTuple):
    """A folder's tokenizer with a pad token, and sentencepiece itself."""

    folder: Path
    ours: Tokenizer
    sp: sentencepiece.SentencePieceProcessor


@pytest.fixture(scope="session")
def opened(folder) -> Opened:
    return Opened(folder, padded(folder), processor(folder))


def padded(folder: Path) -> Tokenizer:
    tokenizer = open_tokenizer(folder)
    tokenizer.add_missing_special_tokens()
    return tokenizer


def cut(text: str, special: dict[str, int]) -> list[str | int]:
    """The text's parts and the ids of the special tokens in it: a scan from left to right, the longest token first."""
    parts: list[str | int] = [""]
    at = 0
    while at < len(text):
        here = [token for token in special if text.startswith(token, at)]
        if here:
            token = max(here, key=len)
            parts += [special[token], ""]
            at += len(token)
        else:
            parts[-1] = str(parts[-1]) + text[at]
            at += 1
    return [part for part in parts if part != ""]


SPECIAL_PIECES = ["<s>", "</s>", "<unk>", "[PAD]"]
fragments = st.sampled_from(
    [
        *SPECIAL_PIECES,
        "</s",
        "[PAD",
        "<s>>",
        "<",
        "\u2581",
        " ",
        "  ",
        "\n",
        "Hello",
        " world",
        "s>",
        ":)",
        "é",
        "\U0001f600",
    ]
)
ordinary = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=60)
with_special = st.lists(fragments | ordinary, max_size=8).map("".join)


# --- a bare tokenizer.model ---


@settings(max_examples=60)
@given(texts=st.lists(ordinary, min_size=1, max_size=4))
def test_ids_are_bos_and_sentencepieces_own(opened, texts):
    assert opened.ours.encode_batch(texts) == [[1, *opened.sp.encode(text)] for text in texts]


@settings(max_examples=80)
@given(text=with_special)
def test_special_tokens_in_a_text_are_cut_out(opened, text):
    """`legacy`: sentencepiece puts its dummy space before every part."""
    special = {"<s>": 1, "</s>": 2, "<unk>": 0, "[PAD]": opened.sp.get_piece_size()}
    expected = [1]
    for part in cut(text, special):
        expected += [part] if isinstance(part, int) else opened.sp.encode(part)
    assert opened.ours.encode_batch([text]) == [expected]


@pytest.fixture(scope="module")
def modern(small, tmp_path_factory) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """A tokenizer without legacy, and the model without its dummy space."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((small / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return padded(copy(small, tmp_path_factory.mktemp("modern") / "model", legacy=False)), bare


@settings(max_examples=80)
@given(text=with_special)
def test_without_legacy_only_the_text_begins_with_the_dummy_space(modern, text):
    """As transformers 4.37 does it: parts are encoded without a dummy space, behind the unknown token where they begin
    with a space, whose pieces are dropped again; the whole text has a space put before it, which is dropped before a
    special token."""
    ours, sp = modern
    special = {"<s>": 1, "</s>": 2, "<unk>": 0, "[PAD]": sp.get_piece_size()}
    skipped = len(sp.encode("<unk>"))
    expected: list[int] = []
    for part in cut("\u2581" + text.replace("\u2581", " ") if text else "", special):
        if isinstance(part, int):
            expected.append(part)
        elif part.startswith((" ", "\u2581")):
            expected += sp.encode("<unk>" + part)[skipped:]
        else:
            expected += sp.encode(part)
    if len(expected) > 1 and expected[0] == sp.piece_to_id("\u2581") and expected[1] in special.values():
        del expected[0]
    assert ours.encode_batch([text]) == [[1, *expected]]


def test_pad_is_the_first_id_past_llamas_pieces(llama):
    tokenizer = open_tokenizer(llama)
    assert (len(tokenizer), tokenizer.pad_token_id) == (32000, None)
    assert len(tokenizer.add_missing_special_tokens()) == 1
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.token_to_id("[PAD]")) == (32001, 32000, 32000)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.token_to_id("<unk>")) == (1, 2, 0)
    assert tokenizer.token_to_id("[no such token]") is None
    assert tokenizer.add_missing_special_tokens() == []
    assert len(tokenizer) == 32001


def test_tokens_that_the_configuration_leaves_null_are_alpacas(small, tmp_path):
    """`</s>`, `<s>` and `<unk>` are pieces of the model already, so that only `[PAD]` is new."""
    changed = copy(small, tmp_path / "null", bos_token=None, eos_token=None, unk_token=None)
    tokenizer = open_tokenizer(changed)
    assert len(tokenizer.add_missing_special_tokens()) == 1
    assert {k: v for k, v in tokenizer.special.items() if v} == DEFAULTS
    assert tokenizer.encode_batch(["a</s>"]) == [[1, *processor(small).encode("a"), 2]]


def test_added_tokens_keep_their_ids(small, tmp_path):
    """`added_tokens_decoder` gives the ids, not the order of adding; the longest token that fits is cut out; a saved
    folder has the same ids for transformers. With that key, transformers does not read `added_tokens.json`."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    decoder = {401: "<b>", 400: "<a>", 1: "<s>", 403: "<a>x", 402: "<c>"}
    changed = copy(
        small,
        tmp_path / "added",
        pad_token="<b>",
        added_tokens_decoder={str(i): {"content": token, **flags} for i, token in decoder.items()},
    )
    write(changed, "added_tokens.json", {"<d>": 404, "<a>": 399})
    tokenizer, sp = open_tokenizer(changed), processor(small)
    tokens = ["<a>", "<b>", "<c>", "<a>x"]
    assert [tokenizer.token_to_id(token) for token in tokens] == [400, 401, 402, 403]
    assert (len(tokenizer), tokenizer.pad_token_id) == (404, 401)
    assert tokenizer.encode_batch(["x<c><a>xy"]) == [[1, *sp.encode("x"), 402, 403, *sp.encode("y")]]
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    (saved / "added_tokens.json").unlink()  # a file of transformers 4
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert theirs.convert_tokens_to_ids(tokens) == [400, 401, 402, 403]
    assert len(theirs) == 404


def test_saved_files_agree_on_the_ids(small, tmp_path):
    """The next free id is that of transformers 4.37, whatever `added_tokens.json` declares; llama.cpp reads that file,
    where transformers reads `added_tokens_decoder`."""
    folder, saved = convert_sentencepiece(tmp_path / "fast", small), tmp_path / "saved"
    write(folder, "added_tokens.json", {"<a>": 450})
    saved.mkdir()
    open_tokenizer(folder).save(saved)
    assert transformers.PreTrainedTokenizerFast.from_pretrained(saved).convert_tokens_to_ids("<a>") == 400
    file = saved / "added_tokens.json"
    assert not file.exists() or json.loads(file.read_text()) == {"<a>": 400}


def test_an_added_token_may_stand_past_a_gap(small, tmp_path):
    changed = copy(small, tmp_path / "gap", added_tokens_decoder={"405": {"content": "<far>"}})
    assert open_tokenizer(changed).token_to_id("<far>") == 405


PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}


@pytest.mark.parametrize(
    ("config", "added", "special"),
    [
        ({"added_tokens_decoder": {"400": {"content": "<think>", **PLAIN}}}, {}, False),
        ({"added_tokens_decoder": {"400": {"content": "<think>", **PLAIN, "special": True}}}, {}, True),
        ({}, {"<think>": 400}, False),
        ({"additional_special_tokens": ["<think>"]}, {"<think>": 400}, True),
    ],
)
def test_an_added_token_is_special_where_transformers_has_it_so(small, tmp_path, config, added, special):
    """`<think>` is cut out of a text either way; answers show it where it is not special, before saving and after."""
    changed = copy(small, tmp_path / "added", **config)
    if added:
        write(changed, "added_tokens.json", added)
    saved = tmp_path / "saved"
    saved.mkdir()
    padded(changed).save(saved)
    for folder in (changed, saved):
        ours, theirs = open_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        ids = ours.encode_batch(["name <think> it"])[0]
        assert 400 in ids and ("<think>" in ours.special_texts()) == special
        assert ("<think>" in theirs.decode(ids, skip_special_tokens=True)) != special
        # What follows the token was encoded with a dummy space, which shows where nothing stands before.
        assert ours.decode(ids) == ("name   it" if special else "name <think> it")
    decoder = json.loads((saved / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert (decoder["400"]["special"], decoder["401"]["special"]) == (special, True)  # 401 is Alpaca's [PAD]


@pytest.mark.parametrize("special", [False, True])
def test_a_fast_tokenizers_added_token_is_special_where_transformers_has_it_so(small, tmp_path, special):
    decoder = {"400": {"content": "<think>", **PLAIN, "special": special}}
    folder = convert_sentencepiece(tmp_path / "fast", small, added_tokens_decoder=decoder)
    ours, theirs = open_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    (ids,) = ours.encode_batch(["name <think> it"])
    assert 400 in ids and ("<think>" in ours.decode(ids)) != special
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_rows_that_are_no_tokens_say_nothing(small):
    """A model's embedding may have more rows than the tokenizer has tokens."""
    tokenizer = open_tokenizer(small)
    ids = tokenizer.encode_batch([CORPUS[0]])[0]
    assert tokenizer.decode([len(tokenizer), *ids, len(tokenizer) + 60, 10**6]) == CORPUS[0]


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, False), (True, True), (False, True)])
def test_beginning_and_end_follow_the_configuration(small, tmp_path, add_bos, add_eos):
    changed = copy(small, tmp_path / "bos", add_bos_token=add_bos, add_eos_token=add_eos)
    expected = [1] * add_bos + processor(small).encode("Hello") + [2] * add_eos
    assert open_tokenizer(changed).encode_batch(["Hello"]) == [expected]


@pytest.fixture(scope="session")
def again(opened, tmp_path_factory) -> Tokenizer:
    """Saved, opened and saved a second time."""
    saved = tmp_path_factory.mktemp("saved")
    opened.ours.save(saved)
    again = open_tokenizer(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    again.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    return again


@settings(max_examples=80)
@given(text=with_special)
def test_saved_and_opened_again_it_gives_the_same_ids(opened, again, text):
    assert isinstance(again, SentencePieceTokenizer)
    assert len(again) == len(opened.ours)
    assert again.special == opened.ours.special
    assert again.encode_batch([text]) == opened.ours.encode_batch([text])


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[\u2581")))
def test_decoding_gives_the_text_back(opened, text):
    """Where the model keeps all spaces, as LLaMA's does."""
    if opened.folder.name == "stories260K":
        pytest.skip("this model drops spaces")
    ids = opened.ours.encode_batch([text])[0]
    assert opened.ours.decode([*ids, 2, opened.sp.get_piece_size()]) == text


@pytest.fixture(scope="module")
def in_transformers(llama, tmp_path_factory) -> tuple[Tokenizer, Any, Any]:
    """LLaMA's tokenizer with its pad token: ours, transformers' reading of what we saved, transformers' of the bare
    model."""
    saved = tmp_path_factory.mktemp("saved")
    tokenizer = padded(llama)
    tokenizer.save(saved)
    return tokenizer, *map(transformers.AutoTokenizer.from_pretrained, (saved, llama))


def test_transformers_loads_the_saved_tokenizer(in_transformers):
    ours, theirs, _ = in_transformers
    assert len(theirs) == len(ours) == 32001
    for key in SPECIAL:
        assert getattr(theirs, key) == ours.special[key]
        assert getattr(theirs, f"{key}_id") == ours.token_to_id(ours.special[key])
    assert theirs.model_max_length == 2048
    assert theirs("Hello</s>[PAD]")["input_ids"] == [1, 15043, 2, 32000]
    assert theirs.decode([1, 15043, 2, 32000], skip_special_tokens=True) == "Hello"


def test_transformers_gives_the_same_ids_to_alpacas_texts(shared, llama, in_transformers):
    """transformers 5 splits some runs of spaces differently from the sentencepiece that the model was trained with, in
    53 of these 2,000 texts, with or without us: those are left out."""
    ours, theirs, bare = in_transformers
    sp = processor(llama)
    records = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text())[:2000]
    texts = [alpaca_prompt(record) + record["output"] for record in records]
    expected = [[1, *sp.encode(text)] for text in texts]
    agreed = [a == b for a, b in zip(bare(texts)["input_ids"], expected, strict=True)]
    assert sum(agreed) == 1947
    got, saved = ours.encode_batch(texts), theirs(texts)["input_ids"]
    assert got == expected
    assert [s for s, fine in zip(saved, agreed, strict=True) if fine] == [
        e for e, fine in zip(expected, agreed, strict=True) if fine
    ]


# --- a tokenizer.json ---

fast_fragments = st.sampled_from(
    [BOS, EOS, END, "<|", "|>", "<s>", "</s>", "[PAD]", " ", "  ", "\n", "it's", "123456", "é"]
)
fast_texts = st.lists(fast_fragments | st.text(max_size=30), max_size=8).map("".join)

ADDED = {
    "__type": "AddedToken",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}

FAST: dict[str, Callable[[Path, Path], Path]] = {
    "LLaMA 3": lambda to, _: train_byte_level(to),
    "LLaMA 3, a pad of its own": lambda to, _: train_byte_level(to, pad_token=END),
    "LLaMA 3, tokens as objects": lambda to, _: train_byte_level(to, eos_token={"content": END, **ADDED}),
    "LLaMA 3, a special token that the file lacks": lambda to, _: train_byte_level(to, pad_token="<|finetune_pad|>"),
    "LLaMA 2": lambda to, sp: convert_sentencepiece(to, sp),
    "LLaMA 2, bos": lambda to, sp: convert_sentencepiece(to, sp, add_bos_token=True),
    "LLaMA 2, no bos": lambda to, sp: convert_sentencepiece(to, sp, add_bos_token=False),
    "LLaMA 2, bos and eos": lambda to, sp: convert_sentencepiece(to, sp, add_bos_token=True, add_eos_token=True),
    "LLaMA 2, bos by configuration alone": lambda to, sp: convert_sentencepiece(to, sp, False, add_bos_token=True),
}


@pytest.fixture(scope="module", params=FAST)
def fast(request, small, tmp_path_factory) -> Path:
    return FAST[request.param](tmp_path_factory.mktemp("fast"), small)


@pytest.fixture(scope="module")
def fast_pair(fast) -> tuple[Tokenizer, Any]:
    """Ours and that of transformers. Its class LlamaTokenizer follows `add_bos_token` and `add_eos_token`: by itself in
    transformers 4, where told so in 5, which takes them from the file's post-processor instead."""
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(fast)
    config = json.loads((fast / "tokenizer_config.json").read_text())
    if config["tokenizer_class"] == "LlamaTokenizer":
        theirs.add_bos_token = config.get("add_bos_token", True)
        theirs.add_eos_token = config.get("add_eos_token", False)
    return open_tokenizer(fast), theirs


@settings(max_examples=60)
@given(texts=st.lists(fast_texts, min_size=1, max_size=3))
def test_fast_ids_are_those_of_transformers(fast_pair, texts):
    ours, theirs = fast_pair
    assert isinstance(ours, FastTokenizer)
    assert len(ours) == len(theirs)
    assert ours.encode_batch(texts) == theirs(texts)["input_ids"]
    ids = theirs(texts[0])["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@settings(max_examples=60)
@given(texts=st.lists(fast_texts, min_size=1, max_size=3))
def test_fast_saved_is_the_same_to_us_and_to_transformers(fast_saved, texts):
    ours, again, theirs = fast_saved
    assert len(ours) == len(again) == len(theirs)
    assert ours.encode_batch(texts) == again.encode_batch(texts) == theirs(texts)["input_ids"]


@pytest.fixture(scope="module")
def fast_saved(fast, tmp_path_factory) -> tuple[Tokenizer, Tokenizer, Any]:
    saved = tmp_path_factory.mktemp("saved")
    ours = padded(fast)
    ours.save(saved)
    return ours, open_tokenizer(saved), transformers.PreTrainedTokenizerFast.from_pretrained(saved)


def test_fast_special_tokens_after_alpacas_rule(fast, fast_saved):
    before, (ours, again, theirs) = open_tokenizer(fast), fast_saved
    named = {key: before.special[key] for key in SPECIAL if before.special[key] is not None}
    assert ours.special == again.special == dict.fromkeys(SPECIAL) | DEFAULTS | named
    new = [t for t in ours.special.values() if t and before.token_to_id(t) is None]
    assert len(ours) == len(before) + len(new)
    for key in SPECIAL:
        assert getattr(theirs, key) == ours.special[key]
        assert getattr(theirs, f"{key}_id") == (ours.token_to_id(ours.special[key]) if ours.special[key] else None)


def test_a_beginning_token_that_the_file_lacks_is_added(small, tmp_path):
    folder = convert_sentencepiece(tmp_path / "fast", small, bos_token="<begin>", add_bos_token=True)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.add_bos_token = True
    assert theirs.bos_token_id == 400
    assert open_tokenizer(folder).encode_batch(["a"]) == theirs(["a"])["input_ids"]


def test_a_llama_2_file_gives_sentencepieces_ids(small, tmp_path):
    """The independent witness of the file that the tests above build: a text without runs of spaces."""
    fast = open_tokenizer(convert_sentencepiece(tmp_path / "fast", small))
    for text in CORPUS[:2]:
        assert fast.encode_batch([text]) == [[1, *processor(small).encode(text)]]


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
@pytest.mark.parametrize("named", ["object", "decoder"])
def test_a_special_token_that_takes_spaces_along_still_does(tmp_path, named, side):
    """As Phi-3's `</s>` does: `rstrip` swallows the spaces behind the token. The configuration repeats it, in the token
    itself or in `added_tokens_decoder`."""
    flags = {**ADDED, side: True}
    token = tokenizers.AddedToken(EOS, **{k: v for k, v in flags.items() if k != "__type"})
    config = {
        "object": {"eos_token": {"content": EOS, **flags}},
        "decoder": {"added_tokens_decoder": {"381": {"content": EOS, **flags}}},
    }
    folder = train_byte_level(tmp_path / "model", [BOS, token, END], **config[named])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs.eos_token_id == 381
    texts = [f"a {EOS} b", f"a{EOS}  b", f"  {EOS}\n\nb"]
    assert open_tokenizer(folder).encode_batch(texts) == theirs(texts)["input_ids"]


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    folder = train_byte_level(tmp_path / "model")
    expected = open_tokenizer(folder).encode_batch([CORPUS[0], "a"])
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=0, pad_token=EOS, length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert open_tokenizer(folder).encode_batch([CORPUS[0], "a"]) == expected
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs([CORPUS[0], "a"])["input_ids"] == expected
    assert open_tokenizer(folder).special["pad_token"] == theirs.pad_token == EOS


def test_tokenizer_json_goes_before_tokenizer_model(small, tmp_path):
    folder = convert_sentencepiece(copy(small, tmp_path / "both"), small)
    assert isinstance(open_tokenizer(folder), FastTokenizer)


def test_copied_files_open_as_the_same_tokenizer(small, tmp_path):
    source = copy(small, tmp_path / "from")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "to").mkdir()
    copy_tokenizer(source, tmp_path / "to")
    assert {p.name for p in (tmp_path / "to").iterdir()} == {p.name for p in source.iterdir()}
    copy_tokenizer(source, source)
    assert open_tokenizer(tmp_path / "to").encode_batch(CORPUS) == open_tokenizer(source).encode_batch(CORPUS)


@pytest.mark.parametrize("kinds", [("slow", "fast"), ("fast", "slow")])
@pytest.mark.parametrize("how", ["copied", "saved"])
def test_another_tokenizers_files_do_not_stay(how, kinds, small, tmp_path):
    """A tokenizer.json that is left would win over the tokenizer.model that is meant."""
    folders = {"slow": copy(small, tmp_path / "slow"), "fast": train_byte_level(tmp_path / "fast")}
    first, second = (folders[kind] for kind in kinds)
    (first / "chat_template.jinja").write_text("{{ first }}")
    write(first, "added_tokens.json", {})
    to = tmp_path / "to"
    to.mkdir()
    (to / "notes.txt").write_text("mine")
    for source in (first, second):
        if how == "copied":
            copy_tokenizer(source, to)
        else:
            padded(source).save(to)
    expected = open_tokenizer(second) if how == "copied" else padded(second)
    assert open_tokenizer(to).encode_batch(CORPUS) == expected.encode_batch(CORPUS)
    assert not (to / "chat_template.jinja").exists() and (to / "notes.txt").exists()
    opened = open_tokenizer(to)
    opened.save(to)  # into its own folder nothing is lost
    assert open_tokenizer(to).encode_batch(CORPUS) == expected.encode_batch(CORPUS)


# --- which file names the special tokens ---

KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "sentencepiece": lambda to, sp: copy(sp, to),
    "LLaMA 2": lambda to, sp: convert_sentencepiece(to, sp),
    "fast": lambda to, sp: convert_sentencepiece(to, sp, tokenizer_class="PreTrainedTokenizerFast"),
}
AS_OBJECT = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
# Of tokenizer_config.json what is set and what is missing, and special_tokens_map.json.
NAMED: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "null": ({"pad_token": None}, [], {"pad_token": "<unk>"}),
    "another": ({"pad_token": "<a>"}, [], {"pad_token": "<b>"}),
    "an object": ({"eos_token": "<a>"}, [], {"eos_token": {"content": "</s>", **AS_OBJECT}}),
    "an object in either": (
        {"pad_token": {"content": "<a>", **ADDED}},
        [],
        {"unk_token": {"content": "<s>", **AS_OBJECT}},
    ),
    "a key that is missing": ({}, ["pad_token"], {"pad_token": "<unk>"}),
    "keys that are missing": ({}, ["eos_token", "bos_token", "unk_token"], {"eos_token": "<e>"}),
    "null in the map": ({"pad_token": "<a>"}, [], {"pad_token": None}),
    "empty in the map": ({}, [], {"eos_token": ""}),
    "no key in the map": ({"pad_token": "<a>"}, ["unk_token"], {}),
}


@pytest.fixture(scope="module")
def old() -> Iterator[Server]:
    """transformers 4.37.2."""
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_that_names_the_special_tokens_is_transformers(small, tmp_path, old, kind, named, decoder):
    """4.37's and 5's agree: `special_tokens_map.json` goes before `tokenizer_config.json`, whose `added_tokens_decoder`
    says that the map is not to be read."""
    folder = KINDS[kind](tmp_path / "model", small)
    config, missing, extra = NAMED[named]
    if decoder:
        flags = {k: v for k, v in ADDED.items() if k != "__type"}
        tokens = enumerate(("<unk>", "<s>", "</s>"))
        config = config | {"added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in tokens}}
    config = json.loads((folder / "tokenizer_config.json").read_text()) | config
    write(folder, "tokenizer_config.json", {k: v for k, v in config.items() if k not in missing})
    write(folder, "special_tokens_map.json", extra)
    if (folder / "tokenizer.json").exists():
        for_tokenizers_0_15(folder)
    ours = open_tokenizer(folder)
    theirs = old.describe(folder, [])
    same = {key: theirs[key] for key in ("length", "special")}
    assert {key: describe(str(folder), [])[key] for key in same} == same
    assert {"length": len(ours), "special": ours.special} == same
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    again = open_tokenizer(saved)
    assert {"length": len(again), "special": again.special} == same


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_an_object_says_normalized_and_the_end_is_an_end(small, tmp_path, file):
    """As in LLaMA's first folders; the flags of tokenizer.json itself hold."""
    folder = KINDS["fast"](tmp_path / "model", small)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = {"__type": "AddedToken"} if file == "tokenizer_config.json" else {}
    config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    write(folder, file, config | {key: {"content": token, **AS_OBJECT, **kind} for key, token in tokens.items()})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    texts = ["Hello</s>", "a </s> b", "</s>x"]
    expected = theirs(texts)["input_ids"]
    assert expected[0][-1] == 2
    assert open_tokenizer(folder).encode_batch(texts) == expected


# --- warnings and errors ---


def both_kinds(small: Path, to: Path) -> list[Path]:
    return [copy(small, to / "slow"), convert_sentencepiece(to / "fast", small)]


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"eos_token": ""}, "''"),
        ({"eos_token": None}, "None"),
        ({"eos_token": "<unk>"}, "unk_token"),
        ({"pad_token": "</s>"}, None),  # a pad takes no label away: rows are packed
        ({"bos_token": "</s>"}, None),
        ({}, None),
        ({"pad_token": "<unk>"}, None),
    ],
)
def test_an_end_that_cannot_be_learned_is_warned_of(small, tmp_path, config, word):
    for folder in both_kinds(small, tmp_path):
        old = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder, "tokenizer_config.json", old | config)
        warnings = open_tokenizer(folder).warnings()
        if word is None:
            assert warnings == []
        else:
            assert len(warnings) == 1
            assert "eos_token" in warnings[0]
            assert word in warnings[0]
            assert "stop" in warnings[0]


def test_an_empty_end_is_not_replaced_by_alpacas(small, tmp_path):
    """stanford_alpaca replaces what is None, and "" is not: the trap that the warning is for."""
    for folder in both_kinds(small, tmp_path):
        old = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder, "tokenizer_config.json", old | {"eos_token": ""})
        tokenizer = padded(folder)
        assert tokenizer.eos_token == ""
        assert tokenizer.eos_token_id is None
        assert len(tokenizer.warnings()) == 1


def cut_file(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def put_config(**config: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder, "tokenizer_config.json", old | config)

    return change


BROKEN = [
    ("slow", "tokenizer.model", cut_file("tokenizer.model")),
    ("slow", "tokenizer.model", put("tokenizer.model", b"")),
    ("slow", "tokenizer.model", put("tokenizer.model", b"\x00\x01nonsense" * 50)),
    (
        "slow",
        "tokenizer.model",
        put("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"),
    ),
    ("slow", "tokenizer_config.json", cut_file("tokenizer_config.json")),
    ("slow", "tokenizer_config.json", put("tokenizer_config.json", b"[]")),
    ("slow", "tokenizer_config.json", put("tokenizer_config.json", b"\xff\xfe{}")),
    ("slow", "special_tokens_map.json", put("special_tokens_map.json", b'{"eos_token": ')),
    ("slow", "special_tokens_map.json", put("special_tokens_map.json", b"3")),
    ("slow", "special_tokens_map.json", put("special_tokens_map.json", b'{"eos_token": 3}')),
    ("slow", "added_tokens.json", put("added_tokens.json", b'{"[PAD]": ')),
    ("slow", "added_tokens.json", put("added_tokens.json", b"[1]")),
    ("slow", "added_tokens.json", put("added_tokens.json", b'{"[PAD]": "x"}')),
    ("slow", "tokenizer_config.json", put_config(eos_token=5)),
    ("slow", "tokenizer_config.json", put_config(added_tokens_decoder={"first": {"content": "<a>"}})),
    ("slow", "tokenizer_config.json", put_config(added_tokens_decoder=[1])),
    ("fast", "tokenizer.json", cut_file("tokenizer.json")),
    ("fast", "tokenizer.json", put("tokenizer.json", b"")),
    ("fast", "tokenizer.json", put("tokenizer.json", b"{}")),
    ("fast", "tokenizer.json", put("tokenizer.json", b"\xff\xff")),
    ("fast", "tokenizer_config.json", cut_file("tokenizer_config.json")),
    ("fast", "tokenizer_config.json", put("tokenizer_config.json", b"[]")),
    ("fast", "special_tokens_map.json", put("special_tokens_map.json", b'{"eos_token": ')),
    ("fast", "tokenizer_config.json", put_config(eos_token=5)),
]


@pytest.mark.parametrize(("kind", "named", "change"), BROKEN, ids=[f"{i}-{b[0]}-{b[1]}" for i, b in enumerate(BROKEN)])
def test_a_broken_file_is_named(small, tmp_path, kind, named, change):
    folder = dict(zip(("slow", "fast"), both_kinds(small, tmp_path), strict=True))[kind]
    change(folder)
    with pytest.raises(InputError) as caught:
        open_tokenizer(folder)
    assert str(folder / named) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(keep=st.floats(0, 1, exclude_max=True), kind_and_name=st.sampled_from([b[:2] for b in BROKEN]))
def test_a_file_cut_anywhere_is_refused_or_read(broken_at_random, keep, kind_and_name):
    """A sentencepiece model cut between two pieces is a shorter model; JSON is never complete before its end."""
    kind, name = kind_and_name
    folder = broken_at_random[kind]
    if not (folder / name).exists():
        return
    whole = (folder / name).read_bytes()
    cut_file(name, keep)(folder)
    try:
        tokenizer = open_tokenizer(folder)
    except InputError as e:
        assert str(folder / name) in str(e)
    else:
        assert name == "tokenizer.model"
        assert len(tokenizer) < 400
    finally:
        (folder / name).write_bytes(whole)


@pytest.fixture(scope="module")
def broken_at_random(small, tmp_path_factory) -> dict[str, Path]:
    return dict(zip(("slow", "fast"), both_kinds(small, tmp_path_factory.mktemp("cut")), strict=True))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="neither tokenizer"):
        open_tokenizer(tmp_path)


# --- transformers 4.37 ---


@pytest.fixture(scope="module")
def old_transformers() -> Iterator[hf_reader.Server]:
    server = hf_reader.Server()
    yield server
    server.close()


OLD: dict[str, Callable[[Path, Path], Path]] = {
    "LLaMA 2, both files": lambda to, sp: convert_sentencepiece(copy(sp, to), sp),
    "LLaMA 2, bare tokenizer.model": lambda to, sp: copy(sp, to),
    "LLaMA 3": lambda to, _: train_byte_level(to),
}


@pytest.mark.parametrize("kind", OLD)
def test_what_is_saved_loads_in_transformers_of_4_37_and_of_5(kind, small, old_transformers, tmp_path):
    """The fast tokenizer and, of sentencepiece, the slow one, as stanford_alpaca asks for it: with Alpaca's [PAD]."""
    source, saved = OLD[kind](tmp_path / "source", small), tmp_path / "saved"
    saved.mkdir()
    ours = padded(source)
    ours.save(saved)
    texts = [*CORPUS[:3], "a[PAD]b", "x y"]
    for fast in (True, False) if (source / "tokenizer.model").exists() else (True,):
        read = [f({"folder": str(saved), "fast": fast, "texts": texts}) for f in (
            hf_reader.tokenize, lambda case: old_transformers.ask("tokenize", case))]  # fmt: skip
        for theirs in read:
            special = {key: token for key, token in ours.special.items() if token}
            assert theirs["special"] == special
            assert theirs["special_ids"] == {key: ours.token_to_id(token) for key, token in special.items()}
        assert read[1]["class"].endswith("Fast") == fast
        assert read[1]["ids"] == ours.encode_batch(texts)


def test_a_merge_with_a_space_keeps_its_parts(tmp_path):
    vocab = {token: i for i, token in enumerate(["a", " ", "b", " b", "a b"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [(" ", "b"), ("a", " b")]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    saved = tmp_path / "saved"
    saved.mkdir()
    open_tokenizer(tmp_path).save(saved)
    again = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert again.encode("a b").ids == tokenizer.encode("a b").ids == [4]
