"""Files of strangers: broken, hostile and endless ones are refused in one line, soon, in little memory, and nothing
outside of their folder is read."""

import ast
import json
import os
import random
import re
import shutil
import socket
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from strangers import Ended, Strangers
from tiny import ALPACA, CONFIG, drawn_cases, make_arrays, slow_unless, write_json, write_model, write_tokenizer

from llama_jax.base.errors import InputError
from llama_jax.data.tokenizer import copy_tokenizer
from llama_jax.distributed.platform import host_memory

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5
MEMORY = 300 << 20
SECRET = "7fc1c6d0-a-secret"
CHATS = [{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}] * 2
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"

Place = Path
Case = Callable[[Place], list[Any]]


@pytest.fixture(scope="module")
def strangers() -> Iterator[Strangers]:
    """The process that runs the commands."""
    process = Strangers()
    yield process
    process.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model with its tokenizer; never changed."""
    return write_tokenizer(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def usual(strangers: Strangers, model: Path) -> int:
    """The peak bytes of a good run."""
    ended = strangers.run("train", *flags(model, write_json(model.parent / "usual.json", ALPACA)))
    assert ended.code == 0, ended.err
    return ended.peak


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Place:
    """A folder with a model `m`, data `d.json`, chats `c.json`, and beside it a secret."""
    place = tmp_path / "place"
    shutil.copytree(model, place / "m")
    write_json(place / "d.json", ALPACA)
    write_json(place / "c.json", CHATS)
    (tmp_path / "outside").mkdir()
    write_json(tmp_path / "outside" / "secret.json", {"secret": SECRET})
    return place


def flags(model: Path, data: Path, *more: Any) -> list[Any]:
    """The flags of a run that is only explained: all files are read, nothing compiles."""
    named = ["--model_name_or_path", model, "--data_path", data, "--output_dir", data.parent / "o", "--use_cpu", True]
    return [*named, "--explain", "json", "--disable_tqdm", True, *more]


def explained(place: Place, *more: Any, data: str = "d.json") -> list[Any]:
    return ["train", *flags(place / "m", place / data, *more)]


def converted(place: Place, model: str = "m") -> list[Any]:
    return ["convert", "--model_name_or_path", place / model, "--output_dir", place / "out"]


def opened(place: Place, compat: str = "4.37") -> list[Any]:
    return ["tokenizer", place / "m", place / "out", compat]


def check(ended: Ended, usual: int, declared: int = 0) -> str:
    """Check the promises of a refusal, and return its line."""
    assert "Traceback" not in ended.err, ended.err[-3000:]
    assert ended.code == 2, (ended.code, ended.err[-3000:])
    assert ended.seconds < SECONDS
    assert ended.peak < usual + 2 * declared + MEMORY
    assert not ended.opened
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ended.err.endswith(errors[0] + "\n"), ended.err[-3000:]
    assert len(errors[0]) < 2000
    return errors[0]


# -- Kinds of files ---------------------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def giant(path: Path) -> None:
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(1 << 40)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def listening(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    try:
        os.chdir(path.parent)  # a socket's path has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def in_the_place_of(name: str, kind: Callable[[Path], None], command: Callable[[Place], list[Any]]) -> Case:
    def case(place: Place) -> list[Any]:
        (place / name).parent.mkdir(exist_ok=True)
        kind(place / name)
        return command(place)

    return case


def with_template(place: Place) -> list[Any]:
    return explained(place, data="c.json")


def with_config(place: Place) -> list[Any]:
    return explained(place, "--config", place / "run.yaml")


def with_deepspeed(place: Place) -> list[Any]:
    return explained(place, "--deepspeed", place / "zero.json")


def of_gguf(place: Place) -> list[Any]:
    return converted(place, "model.gguf")


def with_pieces(place: Place) -> list[Any]:
    (place / "m" / "tokenizer.json").unlink()
    return opened(place)


def merging(place: Place) -> list[Any]:
    return [*converted(place), "--merge_adapter", place / "a"]


def tokenizing_5(place: Place) -> list[Any]:
    return opened(place, "5")


FILES: dict[str, Case] = {}
for _kind in (fifo, device, giant, folder, listening):
    for _name, _command in {
        "m/config.json": explained,
        "m/model.safetensors": explained,
        "m/tokenizer.json": explained,
        "m/tokenizer_config.json": explained,
        "m/special_tokens_map.json": opened,
        "m/chat_template.jinja": with_template,
        "m/tokenizer.model": with_pieces,
        "m/generation_config.json": converted,
        "run.yaml": with_config,
        "model.gguf": of_gguf,
        "d.json": explained,
        "a/adapter_config.json": merging,
        "zero.json": with_deepspeed,
    }.items():
        if (_kind, _name) != (folder, "d.json"):  # a folder is a source of data, too
            FILES[f"{_name} {_kind.__name__}"] = in_the_place_of(_name, _kind, _command)
FILES["tokenizer_config of transformers 5, fifo"] = in_the_place_of("m/tokenizer_config.json", fifo, tokenizing_5)
FILES["vocab of transformers 5, fifo"] = in_the_place_of("m/vocab.json", fifo, tokenizing_5)
for _name in ("d.jsonl", "d.parquet", "d.arrow", "d.csv", "d.txt", "d.json.gz"):
    for _kind in (fifo, device, giant):
        FILES[f"{_name} {_kind.__name__}"] = in_the_place_of(
            _name, _kind, lambda place, _name=_name: explained(place, data=_name)
        )
FILES["index fifo"] = in_the_place_of(
    "m/model.safetensors.index.json", fifo, lambda p: ((p / "m" / "model.safetensors").unlink(), explained(p))[1]
)
# A giant of zeros behind good bytes is a good header: what its tensors need is missing.


def configured(**changes: Any) -> Case:
    def case(place: Place) -> list[Any]:
        write_json(place / "m" / "config.json", {**CONFIG, **changes})
        return explained(place)

    return case


def text_config(key: str, text: str) -> Case:
    """A config with a value that `json.dumps` would not write."""

    def case(place: Place) -> list[Any]:
        whole = json.dumps({**CONFIG, key: "VALUE"}).replace('"VALUE"', text)
        (place / "m" / "config.json").write_text(whole)
        return explained(place)

    return case


NUMBERS: dict[str, Case] = {
    **{f"layers {n}": configured(num_hidden_layers=n) for n in (10**7, 10**9, 10**30)},
    **{f"{key} 2**70": configured(**{key: 2**70}) for key in ("vocab_size", "hidden_size", "intermediate_size")},
    "heads 1e12": configured(num_attention_heads=10**12, head_dim=8),
    "positions 10**300": configured(max_position_embeddings=10**300),
    "theta of 400 digits": configured(rope_theta=int("9" * 400)),
    "theta Infinity": text_config("rope_theta", "Infinity"),
    "theta 1e999": text_config("rope_theta", "1e999"),
    "theta NaN": text_config("rope_theta", "NaN"),
    "eps of 4,000 digits": configured(rms_norm_eps=int("1" * 4000)),
    "eps of 5,000 digits": text_config("rms_norm_eps", "1" * 5000),
    "eps Infinity": text_config("rms_norm_eps", "Infinity"),
    "range Infinity": text_config("initializer_range", "Infinity"),
    "scaling of 400 digits": configured(rope_scaling={"type": "linear", "factor": int("9" * 400)}),
    "original Infinity": text_config(
        "rope_scaling", '{"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": Infinity}'
    ),
    "truncate text": configured(rope_scaling={"rope_type": "yarn", "factor": 2, "truncate": "x" * 10**6}),
    "deep": text_config("id2label", "[" * 10**5 + "]" * 10**5),
    "deep, within Python's limit": text_config("id2label", "[" * 900 + "]" * 900),
    "deep objects": text_config("id2label", '{"a":' * 50_000 + "1" + "}" * 50_000),
    "model_type an object": configured(model_type={"a": 1}),
    "a long unknown key": configured(**{"x" * 10**6: 1}),
    "a line feed and an escape in a key": configured(**{"x\n\x1b[31mred": 1}),
}


def tokenizer_json(change: Callable[[dict[str, Any]], Any]) -> Case:
    def case(place: Place) -> list[Any]:
        path = place / "m" / "tokenizer.json"
        value = json.loads(path.read_text())
        change(value)
        write_json(path, value)
        return explained(place)

    return case


def tokenizer_config(**changes: Any) -> Case:
    def case(place: Place) -> list[Any]:
        path = place / "m" / "tokenizer_config.json"
        write_json(path, {**json.loads(path.read_text()), **changes})
        return explained(place)

    return case


def token(text: str) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def added_token(text: str) -> Case:
    def case(place: Place) -> list[Any]:
        write_json(place / "m" / "added_tokens.json", {text: 259})
        return explained(place)

    return case


def slow_ids(place: Place) -> list[Any]:
    """A sentencepiece tokenizer, whose added tokens have the ids that the files declare."""
    from sentencepiece import SentencePieceTrainer

    (place / "m" / "tokenizer.json").unlink()
    (place / "words.txt").write_text("some words to learn pieces of, and more words\n" * 50)
    SentencePieceTrainer.train(
        input=str(place / "words.txt"),
        model_prefix=str(place / "m" / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
    )
    write_json(place / "m" / "tokenizer_config.json", {"added_tokens_decoder": {"1000000000": token("<far>")}})
    return explained(place)


def _explode(value: dict[str, Any], how: list[dict[str, Any]]) -> None:
    value["normalizer"] = {"type": "Sequence", "normalizers": how}


def splitting(pattern: str) -> Case:
    """A tokenizer that splits by a regular expression, and texts that it nearly matches, in very many ways.

    A fast machine splits one of them in less than the limit of 3 s. The library itself stops at longer texts.
    """

    def split(value: dict[str, Any]) -> None:
        value["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }

    def case(place: Place) -> list[Any]:
        write_json(place / "d.json", [{"text": "a" * n + "!3"} for n in range(367, 371)])
        return tokenizer_json(split)(place)

    return case


_DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TOKENIZERS: dict[str, Case] = {
    "id of 5,000 digits": tokenizer_config(added_tokens_decoder={"1" * 5000: token("<x>")}),
    "id of unicode digits": tokenizer_config(added_tokens_decoder={"²": token("<x>")}),
    "id of other digits": tokenizer_config(added_tokens_decoder={"٣": token("<x>")}),
    "id 1e9, sentencepiece": slow_ids,
    "normalizer that doubles 40 times": tokenizer_json(lambda v: _explode(v, [_DOUBLE] * 40)),
    "normalizer of a million characters": tokenizer_json(lambda v: _explode(v, [{**_DOUBLE, "content": "b" * 10**6}])),
    "prefix of a million characters": tokenizer_json(
        lambda v: _explode(v, [{"type": "Prepend", "prepend": "b" * 10**6}])
    ),
    "regex that explodes": splitting(r"([a-z]| |[a-z ])+\d"),  # past a limit, the library panics
    "regex that takes long": splitting(r"[a-z]+[a-z]+[a-z]+\d"),
    "tokens no list": tokenizer_json(lambda v: v.update(added_tokens=7)),
    "model missing": tokenizer_json(lambda v: v.pop("model")),
    "array": tokenizer_json(lambda v: v.update(model=[])),
    "eos a number": tokenizer_config(eos_token=12),
    "lstrip text": tokenizer_config(added_tokens_decoder={"256": {**token("<s>"), "lstrip": "x"}}),
    "half a surrogate pair": tokenizer_config(added_tokens_decoder={"256": token("a\udc80")}),
    "half a surrogate pair as eos": tokenizer_config(eos_token="\ud800"),
    "half a surrogate pair as an added token": added_token("\ud800"),
    "template a number of tokens": tokenizer_config(additional_special_tokens=[7]),
}


def rendered(template: str, chats: Any = CHATS) -> Case:
    def case(place: Place) -> list[Any]:
        (place / "m" / "chat_template.jinja").write_text(template)
        write_json(place / "c.json", chats)
        return explained(place, data="c.json")

    return case


_LOOPS = "{% for a in range(99999) %}" * 3
TEMPLATES: dict[str, Case] = {
    "loops": rendered(_LOOPS + "{{ a }}" + "{% endfor %}" * 3),
    "silent loops": rendered(_LOOPS + "{% set x = a %}" + "{% endfor %}" * 3),
    "product of a string": rendered("{{ 'a' * 40000000000 }}"),
    "doubled": rendered(
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
    ),
    "doubled by ~": rendered(
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
    ),
    "doubled list": rendered(
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
    ),
    "power": rendered("{{ 9 ** 9 ** 9 }}"),
    "width": rendered("{{ 'a'.ljust(20000000000) }}"),
    "center": rendered("{{ 'a' | center(20000000000) }}"),
    "format": rendered("{{ '%20000000000d' % 1 }}"),
    "str.format": rendered("{{ '{:>20000000000}'.format(1) }}"),
    "replaced": rendered("{{ ('a' * 100000).replace('a', 'b' * 1000000) }}"),
    "joined": rendered("{{ range(99999) | join('b' * 1000000) }}"),
    "indented": rendered("{{ ('a\n' * 100000) | indent(1000000) }}"),
    "recursive": rendered("{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}"),
    "escape": rendered("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "include": rendered("{% include '/etc/passwd' %}"),
    "no template": rendered("{% for %}"),
    "renders to nothing": rendered("{% if false %}{% endif %}"),
    "deep": rendered("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"),
}


def yaml(text: str) -> Case:
    def case(place: Place) -> list[Any]:
        (place / "run.yaml").write_text(text)
        return with_config(place)

    return case


def json_flags(text: str) -> Case:
    def case(place: Place) -> list[Any]:
        (place / "run.json").write_text(text)
        return explained(place, "--config", place / "run.json")

    return case


_LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
_MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
YAMLS: dict[str, Case] = {
    "circular": yaml("fsdp_config: &a {b: *a}\n"),
    "circular list": yaml("report_to: &a [*a]\n"),
    "a billion laughs": yaml(_LAUGHS),
    "a billion laughs in a flag": yaml(_LAUGHS.replace("a11:", "report_to:")),
    "merge keys": yaml(_MERGES),
    "deep": yaml("report_to: " + "[" * 5000 + "]" * 5000),
    "deep blocks": yaml("".join(" " * i + f"k{i}:\n" for i in range(2000))),
    "an object of Python": yaml("report_to: !!python/object/apply:os.system [echo]\n"),
    "a number of a million digits": yaml("seed: 0x" + "f" * 10**5),
    "a date": yaml("seed: 2024-99-99\n"),
    "a key that is a list": yaml("? [a, b]\n: 1\n"),
    "megabytes": yaml("# comment\n" * 10**6),
    "brackets": yaml("seed: " + "[,[" * 10**5),
    "zero bytes": yaml("seed: \0\n"),
    "deep JSON": json_flags('{"report_to": ' + "[" * 10**5 + "]" * 10**5 + "}"),
    "JSON's number": json_flags('{"seed": ' + "1" * 5000 + "}"),
}


def data(name: str, content: bytes) -> Case:
    def case(place: Place) -> list[Any]:
        (place / name).write_bytes(content)
        return explained(place, data=name)

    return case


def of_parquet(table: Callable[[], pa.Table], **options: Any) -> Case:
    def case(place: Place) -> list[Any]:
        pq.write_table(table(), place / "d.parquet", **options)
        return explained(place, data="d.parquet")

    return case


def _same(text: str, rows: int) -> pa.Table:
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))
    return pa.table({"instruction": column, "output": column})


def _arrow(place: Place, table: pa.Table) -> list[Any]:
    with pa.OSFile(str(place / "d.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return explained(place, data="d.arrow")


def _sparse_json(place: Place) -> list[Any]:
    (place / "d.json").write_text('[{"instruction": "a", "output": "b"}, ')
    giant(place / "d.json")
    return explained(place)


RECORDS: dict[str, Case] = {
    "deep": data("d.json", b"[" * 10**5 + b"]" * 10**5),
    "a deep record": data("d.jsonl", b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n"),
    "a deep record, within Python's limit": data(
        "d.jsonl", b'{"messages": ' + b"[" * 900 + b"]" * 900 + b', "role": "a"}\n'
    ),
    "deep tools": data(
        "d.json",
        json.dumps([{**CHATS[0], "tools": "[" * 10**5 + "]" * 10**5}]).encode(),
    ),
    "ids of 4,000 digits": data("d.json", b'[{"input_ids": [' + b"1" * 4000 + b'], "labels": [1]}]'),
    "Infinity": data("d.json", b'[{"input_ids": [Infinity], "labels": [1]}]'),
    "parquet of one row": of_parquet(
        lambda: pa.table({"text": ["a" * 300_000_000]}), compression="zstd", write_statistics=False
    ),
    "parquet of one long text": of_parquet(lambda: _same("a long text, " * 80_000, 10**6), compression="none"),
    "parquet of very many rows": of_parquet(lambda: _same("a", 5 * 10**6), compression="zstd"),
    "arrow of one long text": lambda place: _arrow(place, _same("a long text, " * 80_000, 10**6)),
    "zeros behind a good start": _sparse_json,
    "a zip bomb": data("d.json.gz", b""),
    "zero bytes": data("d.json", bytes(10**6)),
    "an empty list": data("d.json", b"[]"),
}


def _zip_bomb(place: Place) -> list[Any]:
    import gzip

    start, zeros = (gzip.compress(part) for part in (b'{"text": "a"}\n', bytes(1 << 24)))
    (place / "d.jsonl.gz").write_bytes(start + 64 * zeros)
    return explained(place, data="d.jsonl.gz")


RECORDS["a zip bomb"] = _zip_bomb


def safetensors_header(header: bytes, size: int | None = None, body: bytes = b"") -> Case:
    def case(place: Place) -> list[Any]:
        start = struct.pack("<Q", len(header) if size is None else size)
        (place / "m" / "model.safetensors").write_bytes(start + header + body)
        return explained(place)

    return case


def index(content: Any) -> Case:
    def case(place: Place) -> list[Any]:
        (place / "m" / "model.safetensors").unlink()
        write_json(place / "m" / "model.safetensors.index.json", content)
        return explained(place)

    return case


WEIGHTS: dict[str, Case] = {
    "a header of 2**63": safetensors_header(b"{}", 2**63),
    "a header of 90 MB": safetensors_header(b" " * 9 + b"{}", 90_000_000),
    "a deep header": safetensors_header(b'{"a": ' + b"[" * 10**5),
    "a tensor twice": safetensors_header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        body=bytes(4),
    ),
    "shape of 2**64": safetensors_header(b'{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}}'),
    "a shard's long name": index({"weight_map": {"lm_head.weight": "x" * 5000}}),
    "a shard outside": index({"weight_map": {"lm_head.weight": "../../outside/secret.json"}}),
    "a shard with a zero byte": index({"weight_map": {"lm_head.weight": "a\0b"}}),
    "a map of a map": index({"weight_map": {"lm_head.weight": {"a": 1}}}),
}


def gguf(*fields: bytes, tensors: int = 0, count: int | None = None, version: int = 3, tail: bytes = b"") -> Case:
    """A GGUF file of these metadata, written by the format's description."""

    def case(place: Place) -> list[Any]:
        head = b"GGUF" + struct.pack("<IQQ", version, tensors, len(fields) if count is None else count)
        (place / "model.gguf").write_bytes(head + b"".join(fields) + tail + bytes(64))
        return of_gguf(place)

    return case


def gguf_string(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text


def gguf_field(key: bytes, kind: int, value: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + value


_ARCH = gguf_field(b"general.architecture", 8, gguf_string(b"llama"))


def gguf_llama(**changes: Any) -> Case:
    """Metadata of a tiny LLaMA, some of other types."""
    numbers = {"embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "context_length": 512}
    numbers |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    fields = [_ARCH]
    for key, value in {**{f"llama.{key}": value for key, value in numbers.items()}, **changes}.items():
        if isinstance(value, bytes):
            fields.append(gguf_field(key.encode(), 8, gguf_string(value)))
        elif isinstance(value, float):
            fields.append(gguf_field(key.encode(), 6, struct.pack("<f", value)))
        elif isinstance(value, list):
            fields.append(
                gguf_field(key.encode(), 9, struct.pack("<IQ", 4, len(value)) + struct.pack(f"<{len(value)}I", *value))
            )
        else:
            fields.append(gguf_field(key.encode(), 5, struct.pack("<i", value)))
    return gguf(*fields)


_NESTED = struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQ", 4, 1) + bytes(4)
GGUFS: dict[str, Case] = {
    "2**60 tensors": gguf(_ARCH, tensors=2**60),
    "2**60 fields": gguf(_ARCH, count=2**60),
    "an array of 2**60": gguf(_ARCH, gguf_field(b"a", 9, struct.pack("<IQ", 4, 2**60))),
    "an array of 2**60 strings": gguf(_ARCH, gguf_field(b"a", 9, struct.pack("<IQ", 8, 2**60))),
    "nested arrays": gguf(_ARCH, gguf_field(b"a", 9, _NESTED)),
    "nested arrays of 2**40": gguf(_ARCH, gguf_field(b"a", 9, struct.pack("<IQ", 9, 2**40) * 3)),
    "an array of 50 million": gguf(_ARCH, gguf_field(b"a", 9, struct.pack("<IQ", 0, 50_000_000) + bytes(50_000_000))),
    "a string of 2**62": gguf(_ARCH, gguf_field(b"a", 8, gguf_string(b"abc", 2**62))),
    "a type of 99": gguf(_ARCH, gguf_field(b"a", 99, b"abcd")),
    "a tensor of 2**40 dimensions": gguf(_ARCH, tensors=1, tail=gguf_string(b"a") + struct.pack("<I", 2**31)),
    "a tensor of 2**120 values": gguf(
        _ARCH, tensors=1, tail=gguf_string(b"a") + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0)
    ),
    "a tensor past the end": gguf(_ARCH, tensors=1, tail=gguf_string(b"a") + struct.pack("<IQIQ", 1, 2, 0, 2**50)),
    "a version of 7": gguf(_ARCH, version=7),
    "split.count text": gguf_llama(**{"split.count": b"two"}),
    "split.count a list": gguf_llama(**{"split.count": [1, 2]}),
    "lengths text": gguf_llama(**{"llama.embedding_length": b"many"}),
    "head_count text": gguf_llama(**{"llama.attention.head_count": b"many"}),
    "head_count 0": gguf_llama(**{"llama.attention.head_count": 0}),
    "freq_base infinite": gguf_llama(**{"llama.rope.freq_base": float("inf")}),
    "freq_base text": gguf_llama(**{"llama.rope.freq_base": b"x"}),
    "architecture a list": gguf_llama(**{"general.architecture": [1]}),
    "tokens text": gguf_llama(**{"tokenizer.ggml.tokens": b"abc"}),
    "tokens numbers": gguf_llama(**{"tokenizer.ggml.tokens": [1, 2]}),
    "layers 2**31 - 1": gguf_llama(**{"llama.block_count": 2**31 - 1}),
    "scaling type a list": gguf_llama(**{"llama.rope.scaling.type": [1]}),
}


def long_path(*argv: Any) -> Case:
    def case(place: Place) -> list[Any]:
        given = dict(zip(argv[::2], argv[1::2], strict=True))
        usual = {"--model_name_or_path": place / "m", "--data_path": place / "d.json", "--output_dir": place / "o"}
        named = [x for pair in {**usual, **given}.items() for x in pair]
        return ["train", *named, "--use_cpu", True, "--explain", "json"]

    return case


_LONG = "/tmp/" + "a" * 5000
_LONG_PARTS = "/tmp/" + "a/" * 5000
PATHS: dict[str, Case] = {
    **{
        f"{flag} {name}": long_path(flag, path)
        for flag in ("--model_name_or_path", "--data_path", "--tokenizer_name", "--config", "--eval_data_path")
        for name, path in (("long", _LONG), ("of long parts", _LONG_PARTS))
    },
    "--model_name_or_path of nobody": long_path("--model_name_or_path", "~nobody-of-this-name/m"),
    "--data_path of nobody": long_path("--data_path", "~nobody-of-this-name/m"),
    "--output_dir": lambda place: [*converted(place)[:3], "--output_dir", _LONG],
}


def link(name: str, command: Callable[[Place], list[Any]]) -> Case:
    def case(place: Place) -> list[Any]:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(place.parent / "outside" / "secret.json")
        return command(place)

    return case


LINKS: dict[str, Case] = {
    name: link(name, command)
    for name, command in {
        "m/config.json": explained,
        "m/generation_config.json": converted,
        "m/tokenizer.json": opened,
        "m/tokenizer_config.json": opened,
        "m/special_tokens_map.json": opened,
        "m/added_tokens.json": opened,
        "m/vocab.json": opened,
        "m/merges.txt": opened,
        "m/chat_template.jinja": opened,
        "m/tokenizer.model": opened,
        "m/additional_chat_templates/x.jinja": opened,
        "a/adapter_config.json": merging,
    }.items()
}


def saved_to_disk(place: Place) -> list[Any]:
    """A folder of `save_to_disk` whose state names a file outside, of the same format."""
    from datasets import Dataset

    for folder in (place / "saved", place.parent / "outside" / "saved"):
        Dataset.from_list(ALPACA).save_to_disk(str(folder))
    state = json.loads((place / "saved" / "state.json").read_text())
    (part,) = state["_data_files"]
    state["_data_files"] = [{"filename": f"../../outside/saved/{part['filename']}"}]
    write_json(place / "saved" / "state.json", state)
    return explained(place, data="saved")


LINKS["a saved dataset's state"] = saved_to_disk
KINDS: dict[str, dict[str, Case]] = {
    "file": FILES,
    "config": NUMBERS,
    "tokenizer": TOKENIZERS,
    "template": TEMPLATES,
    "yaml": YAMLS,
    "data": RECORDS,
    "weights": WEIGHTS,
    "gguf": GGUFS,
    "path": PATHS,
    "link": LINKS,
}
CASES = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


# Of each kind of file one case is quick, with all other cases than those of kinds.
QUICK = {f"file: {name}" for name in FILES if name.startswith(("m/config.json", "index"))}


@pytest.mark.parametrize("name", [slow_unless(not name.startswith("file:") or name in QUICK, name) for name in CASES])
def test_a_hostile_file_is_refused_in_one_line(strangers: Strangers, place: Place, usual: int, name: str) -> None:
    command, *argv = CASES[name](place)
    ended = strangers.run(command, *argv, canary=place.parent / "outside")
    print(ended.seconds, ended.peak - usual, ended.err[-600:])
    check(ended, usual)
    exported = place / "out"
    assert not exported.is_dir() or not any(SECRET in p.read_text() for p in exported.rglob("*.json"))


def test_a_record_that_a_cpu_cannot_hold(strangers: Strangers, place: Place, usual: int) -> None:
    """Plain attention holds every pair of tokens: 100,000 tokens of 4 heads take 149 GiB."""
    if host_memory() > 149 << 30:
        pytest.skip("this host can")
    ids = [i % 256 for i in range(100_000)]
    write_json(place / "d.json", [{"input_ids": ids, "labels": ids}])
    named = ["--model_name_or_path", place / "m", "--data_path", place / "d.json", "--output_dir", place / "o"]
    ended = strangers.run("train", *named, "--use_cpu", True, "--report_to", "none", "--attention", "xla")
    line = check(ended, usual, (place / "d.json").stat().st_size)
    assert "longest example has 100,000 tokens" in line and "this host has" in line


# -- The export -------------------------------------------------------------------------------------------------------


def test_the_export_is_written_anew(model: Path, tmp_path: Path) -> None:
    """Links within the folder become files of the umask's mode, and JSON is parsed."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(model, source)
    target.mkdir()
    (source / "tokenizer.json").rename(source / "real.json")
    (source / "tokenizer.json").symlink_to("real.json")
    (source / "chat_template.jinja").write_bytes(b"{{ 'a' }}\r\n")
    (source / "merges.txt").write_text("a b\n")
    (source / "tokenizer_config.json").chmod(0o600)
    outside = write_json(tmp_path / "mine.json", {"a": 1})
    (target / "special_tokens_map.json").symlink_to(outside)  # a link there is not written through
    write_json(source / "special_tokens_map.json", {"eos_token": "\ud800"})
    old = os.umask(0o027)
    try:
        copy_tokenizer(source, target)
    finally:
        os.umask(old)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        written = target / name
        assert not written.is_symlink()
        assert stat.S_IMODE(written.stat().st_mode) == 0o640
        assert json.loads(written.read_text()) == json.loads((source / name).read_text())
    assert (target / "chat_template.jinja").read_bytes() == b"{{ 'a' }}\r\n"
    assert json.loads(outside.read_text()) == {"a": 1}
    write_json(tmp_path / "secret.json", {"secret": SECRET})
    (source / "vocab.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match=r"vocab\.json: is a link to .*secret\.json"):
        copy_tokenizer(source, target)


# -- The code ---------------------------------------------------------------------------------------------------------

_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
_CALLS = {"eval", "exec", "compile", "__import__"}
_UNSAFE_YAML = re.compile(r"yaml\.(load|load_all|full_load\w*|unsafe_load\w*|Loader|FullLoader|UnsafeLoader|CLoader)")


def dangers(source: str) -> list[str]:
    """Return what runs code out of data in a file of Python."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [name for name in names if name.partition(".")[0] in _MODULES or _UNSAFE_YAML.fullmatch(name)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            found.append(node.func.id)
        elif (
            isinstance(node, ast.Attribute)
            and (name := ast.unparse(node))
            and (name in ("torch.load", "np.load", "numpy.load", "torch.jit.load") or _UNSAFE_YAML.fullmatch(name))
        ):
            found.append(name)
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            given = ast.unparse(node.value)
            found += [f"{node.arg}={given}"] if given not in ("False", "allow_pickle") else []
    return found


def test_no_data_runs_as_code() -> None:
    """One room unpickles, by a table of names of its own. A proof's torch reads its weights by torch's own table."""
    files = [*ROOT.glob("*.py"), *(ROOT / "llama_jax").rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): dangers(path.read_text()) for path in files}
    torchs = (ROOT / "llama_jax/proof/torch_layers.py").read_text()
    calls = [node for node in ast.walk(ast.parse(torchs)) if isinstance(node, ast.Call)]
    loads = [ast.unparse(node) for node in calls if ast.unparse(node.func).endswith("torch.load")]
    assert len(loads) == 2 and all("weights_only=True" in call for call in loads)
    of_proof = found.pop("llama_jax/proof/torch_layers.py")
    assert of_proof == ["torch.load"]
    assert {name: some for name, some in found.items() if some} == {"llama_jax/hf/torch_pickle.py": ["pickle"]}
    room = ast.parse((ROOT / "llama_jax/hf/torch_pickle.py").read_text())
    used = [ast.unparse(node) for node in ast.walk(room) if isinstance(node, ast.Attribute)]
    assert [name for name in used if name.startswith("pickle.")] == ["pickle.Unpickler"]
    (reader,) = [node for node in room.body if isinstance(node, ast.ClassDef) and node.name == "_Unpickler"]
    assert [ast.unparse(base) for base in reader.bases] == ["pickle.Unpickler"]
    (chosen,) = [node for node in reader.body if isinstance(node, ast.FunctionDef) and node.name == "find_class"]
    assert "super" not in ast.unparse(chosen) and "__import__" not in ast.unparse(chosen)


@pytest.mark.parametrize(
    "line",
    """import pickle|from pickle import loads|eval('1')|exec('')|torch.load(f)|yaml.load(f, Loader)|yaml.unsafe_load(f)|
from yaml import load|np.load(f, allow_pickle=True)|x(trust_remote_code=True)""".replace("\n", "").split("|"),
)
def test_dangers_are_found(line: str) -> None:
    assert dangers(line)


# -- Mutations --------------------------------------------------------------------------------------------------------

SEED = int(os.environ.get("STRANGERS_SEED", random.SystemRandom().randrange(2**32)))
_CANARY = "../outside/secret.json"


class Raw(str):
    """JSON text that `json.dumps` would not write."""


def hostile(outside: str) -> list[Any]:
    """Values of every type in the place of another."""
    return [
        *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, -(10**30), 10**400, 1e308, 0.5, "", "x", "x" * 20_000, "2", "\0"),
        *("\ud800", "²", outside, _CANARY, "/etc/passwd", "/dev/zero", [], {}, [[]], [1] * 1000, ["a", "a"], {"a": {}}),
        *(Raw("Infinity"), Raw("NaN"), Raw("1e999"), Raw("1" * 5000), Raw("[" * 5000 + "]" * 5000)),
        *(Raw('{"a": 1, "a": 2}'), {"content": "<x>", "special": 1}, [["a", "b"]], {"type": "Replace"}),
    ]


def dumped(value: Any) -> str:
    """Return JSON with the `Raw` texts as they are."""
    raws: list[str] = []

    def mark(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {key: mark(part) for key, part in value.items()}
        return [mark(part) for part in value] if isinstance(value, list) else value

    return re.sub(r'"@raw(\d+)@"', lambda found: raws[int(found[1])], json.dumps(mark(value)))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all parts of a JSON value, of long lists and objects the first ones."""
    found = [path] if path else []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in [*parts][:40]:
        found += places(part, (*path, key))
    return found


def mutate_json(draw: Callable[[Any], Any], text: bytes, outside: str) -> bytes:
    """Replace, remove or repeat parts of a JSON text."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        if not (paths := places(value)):
            break
        *above, key = draw(st.sampled_from(paths))
        parent = value
        for step in above:
            parent = parent[step]
        if draw(st.integers(0, 4)) == 0:
            del parent[key]
        elif draw(st.integers(0, 6)) == 0 and isinstance(parent, dict):
            parent[
                draw(st.sampled_from(["x", "", "quantization_config", "auto_map", "vocab_file", "chat_template"]))
            ] = parent[key]
        else:
            parent[key] = draw(st.sampled_from(hostile(outside)))
    return dumped(value).encode("utf-8", "surrogatepass")


def mutate_bytes(draw: Callable[[Any], Any], data: bytes, outside: str, early: int = 1 << 30) -> bytes:
    """Flip, cut, insert or overwrite bytes, among the first `early` ones."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(changed), early) - 1)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            changed[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at:at] = draw(
                st.sampled_from([b"\0", b"\xff\xfe", b"[" * 3000, b'"', b"{", b"\n", b"-", b"9" * 5000])
            )
        elif kind == 3:
            changed[at : at + 8] = struct.pack(
                "<Q", draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
            )
        else:
            changed[at : at + draw(st.integers(1, 200))] = b""
    return bytes(changed)


_WORDS = (
    "{{", "}}", "{%", "%}", " for ", "endfor", "if", " else ", "range(99999)", " * ",
    "messages", "'a'", "99999999999", "|",
    "join", "center", "(", ")", "[0]", ".content", "~", "**", "set x = ", "macro m(a)", "endmacro", "m(1)",
    "include '/etc/passwd'",
    "raise_exception('no')", "tojson", "'%99999999d' % 1", "generation", "namespace(a=1)", "cycler",
    "strftime_now('%Y')",
)  # fmt: skip


def mutate_template(draw: Callable[[Any], Any], text: bytes, outside: str) -> bytes:
    """Insert words of the template's language, or change bytes."""
    changed = text.decode()
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(changed)))
        end = at + draw(st.sampled_from([0, 0, 1, 5]))
        changed = changed[:at] + draw(st.sampled_from(_WORDS)) + changed[end:]
    return changed.encode()


def mutate_yaml(draw: Callable[[Any], Any], text: bytes, outside: str) -> bytes:
    """Replace values and insert YAML's own signs."""
    lines = text.decode().splitlines()
    signs = [
        "&a [*a]",
        "*a",
        "!!python/name:os.system",
        "{a: [b, {c: d}]}",
        "- x",
        "|",
        ">-",
        "? a",
        "0x" + "f" * 9000,
        "[" * 900,
    ]
    signs += [".inf", "1e999", "2024-99-99", "1:60:60", "'", "<<: {seed: 1}", "\t", "yes", "~", "\0", outside]
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(lines) - 1))
        key, _, value = lines[i].partition(":")
        lines[i] = f"{key}: {draw(st.sampled_from([*signs, value]))}"
        if draw(st.booleans()):
            lines.insert(i, draw(st.sampled_from(signs)))
    return "\n".join(lines).encode()


def mutate_header(draw: Callable[[Any], Any], data: bytes, outside: str) -> bytes:
    """Change the JSON in front of a safetensors file, and its length."""
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(draw, data[8 : 8 + size], outside)
    told = draw(st.sampled_from([len(header)] * 4 + [0, len(header) + 1, 2**40]))
    return struct.pack("<Q", told) + header + data[8 + size :]


def either(first: Callable[..., bytes], second: Callable[..., bytes]) -> Callable[..., bytes]:
    return lambda draw, data, outside: (first if draw(st.integers(0, 2)) else second)(draw, data, outside)


def write_gguf(path: Path) -> None:
    """A tiny GGUF model with a vocabulary of bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_context_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{a}_proj": f"attn_{b}" for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
        **{f"mlp.{a}_proj": f"ffn_{a}" for a in ("gate", "up", "down")},
    }
    for name, array in make_arrays({**CONFIG, "num_hidden_layers": 1}).items():
        own = name.removesuffix(".weight")
        layer, last = ("blk.0.", own.removeprefix("model.layers.0.")) if "layers" in own else ("", own)
        writer.add_tensor(f"{layer}{names[last]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_bytes(draw: Callable[[Any], Any], data: bytes, outside: str) -> bytes:
    return mutate_bytes(draw, data, outside, early=10_000)  # behind lie the weights


def of_sharded(place: Place) -> list[Any]:
    return ["train", *flags(place / "sharded", place / "d.json")]


def of_lines(place: Place) -> list[Any]:
    return explained(place, data="d.jsonl")


def of_table(place: Place) -> list[Any]:
    return explained(place, data="d.parquet")


MUTATED: dict[str, tuple[str, Callable[..., bytes], list[Callable[[Place], list[Any]]]]] = {
    "config": ("m/config.json", either(mutate_json, mutate_bytes), [explained, converted]),
    "index": ("sharded/model.safetensors.index.json", either(mutate_json, mutate_bytes), [of_sharded]),
    "safetensors": ("m/model.safetensors", either(mutate_header, mutate_bytes), [explained]),
    "gguf": ("model.gguf", gguf_bytes, [of_gguf]),
    "tokenizer": ("m/tokenizer.json", either(mutate_json, mutate_bytes), [opened, explained, tokenizing_5]),
    "tokenizer_config": (
        "m/tokenizer_config.json",
        either(mutate_json, mutate_bytes),
        [opened, with_template, tokenizing_5],
    ),
    "template": ("m/chat_template.jinja", mutate_template, [with_template]),
    "json": ("d.json", either(mutate_json, mutate_bytes), [explained]),
    "chats": ("c.json", either(mutate_json, mutate_bytes), [with_template]),
    "jsonl": ("d.jsonl", mutate_bytes, [of_lines]),
    "yaml": ("run.yaml", either(mutate_yaml, mutate_bytes), [with_config]),
    "parquet": ("d.parquet", mutate_bytes, [of_table]),
    "arrow": ("d.arrow", mutate_bytes, [lambda place: explained(place, data="d.arrow")]),
}


@pytest.fixture(scope="module")
def good(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder with a good file of each kind."""
    place = tmp_path_factory.mktemp("good") / "place"
    shutil.copytree(model, place / "m")
    (place / "m" / "chat_template.jinja").write_text(TEMPLATE)
    write_json(
        place / "m" / "tokenizer_config.json",
        {
            **json.loads((model / "tokenizer_config.json").read_text()),
            "added_tokens_decoder": {"256": token("<s>"), "257": token("</s>"), "258": token("<unk>")},
            "additional_special_tokens": ["<s>"],
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 512,
            "add_bos_token": True,
        },
    )
    write_model(place / "sharded", shards=2)
    write_tokenizer(place / "sharded")
    write_json(place / "d.json", ALPACA)
    write_json(place / "c.json", CHATS)
    (place / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ALPACA))
    pq.write_table(pa.Table.from_pylist(ALPACA), place / "d.parquet")
    table = pa.Table.from_pylist(ALPACA)
    with pa.OSFile(str(place / "d.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    lines = {"learning_rate": "2e-5", "seed": 7, "per_device_train_batch_size": 2, "report_to": "none", "bf16": "false"}
    (place / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    write_gguf(place / "model.gguf")
    (place.parent / "outside").mkdir()
    write_json(place.parent / "outside" / "secret.json", {"secret": SECRET})
    return place


@pytest.mark.parametrize("kind", MUTATED)
def test_good_files_are_read(strangers: Strangers, good: Place, kind: str) -> None:
    """Else the mutations would prove nothing."""
    for command in MUTATED[kind][2]:
        name, *argv = command(good)
        ended = strangers.run(name, *argv)
        assert ended.code == 0, ended.err[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATED)
def test_mutated_files_end_in_a_line(strangers: Strangers, good: Place, usual: int, kind: str) -> None:
    """500 mutations in all: exit code 0 or 2 within 5 s, no traceback, no file opened outside."""
    print(f"STRANGERS_SEED={SEED}")
    file, mutate, commands = MUTATED[kind]

    @seed(SEED)
    @settings(max_examples=drawn_cases(-(-500 // len(MUTATED))), derandomize=False, database=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "place"
            shutil.copytree(good, place, ignore=shutil.ignore_patterns("o", "out"))
            outside = Path(folder) / "outside"
            shutil.copytree(good.parent / "outside", outside)
            content = mutate(data.draw, (place / file).read_bytes(), str(outside / "secret.json"))
            (place / file).write_bytes(content)
            command, *argv = data.draw(st.sampled_from(commands))(place)
            ended = strangers.run(command, *argv, canary=outside)
            about = f"{ended.code} {ended.seconds:.1f} s {ended.err[-3000:]}\n{content[:2000]!r}"
            assert "Traceback" not in ended.err and ended.code in (0, 2), about
            assert ended.seconds < SECONDS and ended.peak < usual + MEMORY and not ended.opened, about
            if ended.code == 2:
                assert len(re.findall("^error: ", ended.err, re.M)) == 1, about

    holds()
