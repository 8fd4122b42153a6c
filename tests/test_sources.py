"""Read the same records from every kind of file, folder and name that people have."""

import bz2
import csv
import gzip
import json
import lzma
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llama_jax.base.errors import InputError
from llama_jax.data.examples import alpaca_prompt
from llama_jax.data.records import Bad, messages, read_records, unpadded
from llama_jax.data.sources import find_sources

Records = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reaches the network, or the user's own cache."""
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for constants in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def taught(form: str, record: dict[str, Any]) -> Any:
    """Return all of a record that its example is made of."""
    if form == "alpaca":
        return alpaca_prompt(record), record["output"]
    return {"chat": messages, "text": lambda r: r["text"], "tokenized": unpadded}[form](record)


def read(*names: Any, config: str | None = None, bad: Bad | None = None) -> tuple[str, list[Any]]:
    form, records = read_records(find_sources([str(name) for name in names], config), bad)
    return form, [taught(form, record) for record in records]


def refused(*names: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(*names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- any records in any layout


def lines(records: Records) -> str:
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in records)


def write_csv(path: Path, records: Records) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*records[0]], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)


def write_arrow(path: Path, records: Records) -> None:
    """The file format, as Feather; save_to_disk writes the stream format."""
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


LAYOUTS: dict[str, Callable[[Path, Records], Any]] = {
    "a.json": lambda path, records: path.write_text(json.dumps(records, indent=1), encoding="utf-8-sig"),
    "a.jsonl": lambda path, records: path.write_text(lines(records), encoding="utf-8-sig", newline="\r\n"),
    "a.parquet": lambda path, records: parquet.write_table(pyarrow.Table.from_pylist(records), path),
    "a.arrow": write_arrow,
    "a.json.gz": lambda path, records: path.write_bytes(gzip.compress(json.dumps(records).encode())),
    "a.jsonl.zst": lambda path, records: path.write_bytes(zstandard.compress(lines(records).encode())),
    "a.jsonl.bz2": lambda path, records: path.write_bytes(bz2.compress(lines(records).encode())),
    "a.jsonl.xz": lambda path, records: path.write_bytes(lzma.compress(lines(records).encode())),
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "saved": lambda path, records: datasets.Dataset.from_list(records).save_to_disk(path, num_shards=len(records)),
    "dict:train": lambda path, records: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(records), "test": datasets.Dataset.from_list(records[:1])}
    ).save_to_disk(str(path).removesuffix(":train")),
}
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12) | st.sampled_from(
    ["NA", "null", "", "1", "1.0", "True", "2020-01-01", '"', "a,b\nc", " x ", "[1]", "\ufeff"]
)
alpaca = st.fixed_dictionaries(
    {"instruction": words, "input": st.none() | words, "output": words, "id": st.sampled_from(["7", "x"])}
)
turns = st.fixed_dictionaries({"role": st.just("user"), "content": words, "name": st.none() | words})
chats = st.builds(
    lambda before, said: {"messages": [*before, {"role": "assistant", "content": said, "name": None}], "id": "1"},
    st.lists(turns, max_size=2),
    words,
)
tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(
    lambda ids: {
        "input_ids": [0, *ids],
        "labels": [-100, *ids],
        "attention_mask": [0] + [1] * len(ids),
    }
)


@settings(max_examples=12)
@given(st.one_of(*(st.lists(records, min_size=1, max_size=3) for records in (alpaca, chats, tokens))))
def test_any_layout_gives_the_same_records(tmp_path_factory: pytest.TempPathFactory, records: Records) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    forms = {"instruction": "alpaca", "messages": "chat", "input_ids": "tokenized"}
    (form,) = (form for key, form in forms.items() if key in records[0])
    absent = [{k: v for k, v in r.items() if v is not None} for r in records]
    expected = [taught(form, record) for record in absent]
    for name, write in LAYOUTS.items():
        if name[-3:] in ("csv", "tsv") and form != "alpaca":
            continue
        write(folder / name, records)
        assert read(folder / name) == (form, expected), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_records_of_each_layout_are_numbered(tmp_path: Path, name: str) -> None:
    good = {"instruction": "Go.", "input": "", "output": "x", "history": ""}
    LAYOUTS[name](tmp_path / name, [good, good, {**good, "history": "x"}, good])
    assert refused(tmp_path / name).startswith(f"{tmp_path / name}: record 3 has 'history'")
    bad = Bad(skip=True)
    form, records = read_records(find_sources([str(tmp_path / name)]), bad)
    assert (form, len(records), bad.count) == ("alpaca", 3, 1)
    assert [r["output"] for r in records] == ["x"] * 3 and records[2]["output"] == records[-1]["output"] == "x"
    assert records.where(2) == (str(tmp_path / name), 4)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.arrow", "saved"])
def test_keys_of_other_records_are_absent(tmp_path: Path, name: str) -> None:
    """Tables give each turn, call and argument the keys of all."""
    records: Records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}]},
        *(
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": values}}]}]}
            for values in ({"x": 1}, {"y": {"z": "a"}}, {"y": {"w": [{"v": "a"}, {"u": 2}]}})
        ),
    ]
    LAYOUTS[name](tmp_path / name, records)
    form, got = read_records(find_sources([str(tmp_path / name)]))
    assert (form, list(got)) == ("chat", records)


# --- several files, folders and names


def text(folder: Path, name: str, *texts: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines([{"text": t} for t in texts]))
    return path


def test_several_files_are_read_in_their_order(tmp_path: Path) -> None:
    a, b, c = (text(tmp_path, f"{name}.jsonl", name) for name in "abc")
    text(tmp_path, "d.txt")
    (tmp_path / "d.txt").write_text("d\n\ne\n")
    assert read(c, a, tmp_path / "d.txt") == ("text", ["c", "a", "d", "e"])
    assert read(tmp_path / "[a-b]*.jsonl", c) == ("text", ["a", "b", "c"])
    assert "no file matches" in refused(tmp_path / "*.parquet")
    _, records = read_records(find_sources([str(a), str(b), str(c)]))
    assert [r["text"] for r in records[1:]] == ["b", "c"] and records[-1] == {"text": "c"}
    assert records.where(1) == (str(b), 1)


def test_mixed_forms_are_told_apart_by_file(tmp_path: Path) -> None:
    a, b = text(tmp_path, "a.jsonl", "a"), tmp_path / "b.jsonl"
    b.write_text('{"instruction": "x", "output": "y"}')
    assert refused(a, b) == f"{b}: holds alpaca records, and {a} text ones; should be of one form"


def test_a_folder_is_read_by_its_splits(tmp_path: Path) -> None:
    """As a clone of the hub: by names of files, or as the README tells."""
    text(tmp_path, "hub/data/train-00000-of-00002.jsonl", "a")
    text(tmp_path, "hub/data/train-00001-of-00002.jsonl", "b")
    text(tmp_path, "hub/data/test-00000-of-00001.jsonl", "t")
    assert read(tmp_path / "hub") == read(f"{tmp_path}/hub:train") == ("text", ["a", "b"])
    assert read(f"{tmp_path}/hub:test") == ("text", ["t"])
    assert "has no split 'valid', but " in refused(f"{tmp_path}/hub:valid")
    text(tmp_path, "hub/more/x.jsonl", "x")
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: data/test-*\n- config_name: two\n  data_files:\n"
        "  - split: train\n    path: more/*\n---\n"
    )
    assert read(tmp_path / "hub", config="two") == ("text", ["x"])
    assert read(tmp_path / "hub", config="one") == ("text", ["t"])
    assert "'one', 'two'" in refused(tmp_path / "hub")
    said: list[str] = []
    find_sources([str(tmp_path / "hub")], "one", said.append)
    assert not said
    other = text(tmp_path, "hub/more/y.csv", "y")
    for name in ("dataset_infos.json", ".hidden.json", "more/model.bin"):
        (tmp_path / "hub" / name).write_text("{}")
    find_sources([str(tmp_path / "hub")], "one", said.append)
    assert [re.search("left out: (.*); name", line)[1] for line in said] == [str(other)]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.bin").write_bytes(b"")
    assert re.search("is a folder in which no data is found .*; it holds model.bin", refused(tmp_path / "empty"))
    assert "which has no splits; leave :train out" in refused(f"{text(tmp_path, 'a.jsonl', 'a')}:train")
    (tmp_path / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(tmp_path / "lfs.parquet")


def test_a_dataset_of_the_hub_is_found_in_the_cache(tmp_path: Path, offline: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": t} for t in "abc"]))
    datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made" / "json").glob("*/*/*/json-train.arrow")
    target = offline / "org___my_set" / "default" / "0.0.0" / "0123"
    shutil.copytree(made.parent, target)
    (target / "json-train.arrow").rename(target / "my_set-train.arrow")
    info = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default", "dataset_name": "my_set"}))
    assert read("org/my_set") == read("org/my_set", config="default") == ("text", ["a", "b", "c"])
    assert read("org/my_set:train[1:]") == ("text", ["b", "c"])
    assert "Unknown split" in refused("org/my_set:valid")
    first, rest = (find_sources([f"org/my_set:train[{part}]"])[0] for part in (":1", "1:"))
    assert first.files == rest.files and first.fingerprint != rest.fingerprint
    assert refused("org/other").startswith(
        "org/other: no such file or folder, and no dataset of this name is in the local Hugging Face cache"
    )
    assert refused("org/other.json") == "org/other.json: no such data file"


def test_urls_are_read_where_their_client_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", b'{"text": "a"}')
    memory.pipe("/bucket/b.jsonl.gz", gzip.compress(b'{"text": "b"}'))
    assert read("memory://bucket/*.jsonl*") == ("text", ["a", "b"])
    assert read("memory://bucket/b.jsonl.gz") == ("text", ["b"])
    assert refused("memory://bucket/none.jsonl").startswith("memory://bucket/none.jsonl: cannot be read: ")
    memory.pipe("/bucket/c.jsonl", b'{"text": 1}')
    assert refused("memory://bucket/c.jsonl").startswith("memory://bucket/c.jsonl: record 1 has a number as 'text'")
    assert re.match("nobody://x: cannot be read: .*nobody", refused("nobody://x"))


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 1000)[:-20])
    assert "a.jsonl.gz: cannot be decompressed" in refused(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 and no more")
    assert "a.arrow: cannot be read as an Arrow file" in refused(tmp_path / "a.arrow")
    (tmp_path / "a.csv").write_text("text,b\n1,2\n1,2,3,4\n")
    assert "a.csv: cannot be read as CSV" in refused(tmp_path / "a.csv")


@settings(max_examples=60)
@given(
    files=st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4).filter(
        lambda files: any(map(any, files))
    ),
    cuts=st.lists(st.tuples(*[st.none() | st.integers(-12, 12)] * 2), max_size=3),
)
def test_records_of_several_files_without_bad_ones_are_a_sequence(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bool]], cuts: list[tuple[int | None, int | None]]
) -> None:
    """Parts of parts are those of a list, and each record is found at its file and number."""
    folder = tmp_path_factory.mktemp("files")
    names = [str(folder / f"{i}.jsonl") for i in range(len(files))]
    expected = []
    for name, goods in zip(names, files, strict=True):
        records = [{"text": f"{name} {n}" if good else 0} for n, good in enumerate(goods, 1)]
        Path(name).write_text(lines(records))
        expected += [(name, n) for n, good in enumerate(goods, 1) if good]
    _, got = read_records(find_sources(names), Bad(skip=True))
    assert [got.where(i) for i in range(len(got))] == expected
    texts = [f"{name} {n}" for name, n in expected]
    for start, stop in cuts:
        got, texts = got[start:stop], texts[start:stop]
        assert len(got) == len(texts)
        assert [r["text"] for r in got] == texts == [got[i]["text"] for i in range(len(got))]


# --- bad records


def test_the_first_bad_records_are_listed_with_their_number(tmp_path: Path) -> None:
    a = text(tmp_path, "a.jsonl", *"abcd")
    b = tmp_path / "b.jsonl"
    b.write_text(lines([{"text": 1}, {"text": "x"}, {"text": None}, {"text": [1]}, {"text": "y"}, {}]) + "\n{oops")
    said = refused(a, b)
    assert said.startswith(
        f"{b}: record 1 has a number as 'text', should be a string; record 3 has no 'text' (its keys: none); "
        "record 4 has a list as 'text', should be a string; 5 of 11 records are bad (--skip_bad_records True leaves"
    )
    bad = Bad(skip=True)
    assert read(a, b, bad=bad) == ("text", ["a", "b", "c", "d", "x", "y"])
    assert bad.count == 5 and "record 4 has a list" in str(bad)
    bad = Bad(skip=True)
    b.write_text("{oops\n" + lines([{"text": "x"}]))
    assert read(b, bad=bad) == ("text", ["x"])
    assert f"{b}: not valid JSON at line 1" in str(bad)
    b.write_text('[{"text": "x"}, {"text": "y", "text": "z"}, 3]')
    bad = Bad(skip=True)
    assert read(b, bad=bad) == ("text", ["x"])
    assert str(bad) == f"{b}: record 2 is not usable JSON; record 3 should be an object, not a number"
    b.write_text('[{"text": 1}]')
    with pytest.raises(InputError, match=r"holds no good records .*record 1 has a number"):
        read(b, bad=Bad(skip=True))
