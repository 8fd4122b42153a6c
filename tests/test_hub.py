"""Models by their names on the hub: out of its cache, or from a server that answers as the hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from huggingface_hub import constants, file_download
from tiny import write_model, write_tokenizer

import convert_torch_to_flax
from llama_jax.base.errors import InputError
from llama_jax.hf.hub import find_folder
from llama_jax.hf.source import Source

NAME, COMMIT = "org/tiny", "0" * 40


class Hub(NamedTuple):
    files: dict[str, bytes]
    asked: list[str]  # the files that were downloaded
    cache: Path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty repository on a server of its own, and an empty cache, for huggingface_hub as it is."""
    hub = Hub({}, [], tmp_path / "cache")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path, data, headers = self.path.split("?")[0], b"", {}
            resolved = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
            if path.startswith(f"/api/models/{NAME}/revision/") or path == f"/api/models/{NAME}":
                siblings = [{"rfilename": name} for name in hub.files]
                data = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
            elif path.startswith(f"/api/models/{NAME}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in hub.files.items()
                ]
                data = json.dumps(entries).encode()
            elif resolved in hub.files:
                data = hub.files[resolved]
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                hub.asked.extend([resolved] * body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data if body else b"")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    yield hub
    server.shutdown()
    server.server_close()


def fill(hub: Hub, folder: Path) -> None:
    hub.files.update({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


def fill_cache(hub: Hub, folder: Path) -> Path:
    """Lay files into the cache as a download leaves them, and return the snapshot."""
    repo = hub.cache / file_download.repo_folder_name(repo_id=NAME, repo_type="model")
    snapshot = repo / "snapshots" / COMMIT
    for path in (snapshot, repo / "blobs", repo / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        blob = repo / "blobs" / hashlib.sha1(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        file_download._create_symlink(str(blob), str(snapshot / file.name), new_blob=True)
    return snapshot


def test_a_cached_model_is_found_without_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers finds it, in the same folder by the same name; a folder of that name goes before."""
    cached_file = pytest.importorskip("transformers.utils.hub").cached_file
    snapshot = fill_cache(hub, write_tokenizer(write_model(tmp_path / "model", shards=2)))
    assert find_folder(Path(NAME)) == snapshot
    assert cached_file(NAME, "config.json", cache_dir=hub.cache, local_files_only=True) == str(snapshot / "config.json")
    outcome = tiny.run(convert_torch_to_flax.main, "--model_name_or_path", NAME, "--output_dir", tmp_path / "flax")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "flax" / "tokenizer.json").is_file() and not (tmp_path / "flax" / "config.json").is_symlink()
    assert hub.asked == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert find_folder(Path(NAME)) == Path(NAME)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_is_downloaded_with_the_files_that_are_read(shards: int, hub: Hub, tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path / "model", shards=shards))
    read = {p.name for p in folder.iterdir()} | {"additional_chat_templates/rag.jinja"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "original").mkdir()
    for name in ("README.md", "pytorch_model.bin", "model.fp16.safetensors", "x.gguf", "original/config.json"):
        (folder / name).write_text("not read")
    fill(hub, folder)
    source = Source(Path(NAME), weights=False)  # a dry run reads the small files
    assert source.config.vocab_size == 259
    assert {*hub.asked} == {name for name in read if not name.startswith("model-") and name != "model.safetensors"}
    assert Source(Path(NAME)).tensors.keys() == tiny.make_arrays(tiny.CONFIG).keys()
    assert sorted(hub.asked) == sorted(read)
    assert Source(Path(NAME)).bytes and sorted(hub.asked) == sorted(read)


def test_another_tokenizer_by_name(hub: Hub, tmp_path: Path) -> None:
    """`--tokenizer_name` takes a name of the hub or a folder; the converter writes that tokenizer."""
    model = write_tokenizer(write_model(tmp_path / "model"))
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other, pad_token="</s>")
    fill(hub, other)
    for name in (NAME, other):
        flags = ("--model_name_or_path", model, "--output_dir", tmp_path / "flax", "--tokenizer_name", name)
        outcome = tiny.run(convert_torch_to_flax.main, *flags)
        assert outcome.code == 0, outcome.err
        assert json.loads((tmp_path / "flax" / "tokenizer_config.json").read_text())["pad_token"] == "</s>"


@pytest.mark.parametrize(
    ("offline", "files", "cached", "named"),
    [
        (True, [], [], ["not in its cache", "HF_HUB_OFFLINE is set", f"hf download {NAME}"]),
        (True, ["config.json", "model.safetensors"], ["config.json"], ["only in part", "HF_HUB_OFFLINE is set"]),
        (False, [], [], ["no model.safetensors"]),
        (False, ["config.json", "x-q4.gguf"], [], ["x-q4.gguf"]),
        (False, ["config.json", "pytorch_model.bin"], [], ["--allow_pickle"]),
        (False, None, [], ["RepositoryNotFoundError", f"hf download {NAME}"]),
    ],
)
def test_one_line_where_the_hub_does_not_help(
    offline: bool, files: list[str] | None, cached: list[str], named: list[str], hub: Hub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.files.update(dict.fromkeys(files or [], b"{}"))
    (tmp_path / "part").mkdir()
    for name in cached:
        (tmp_path / "part" / name).write_text("{}")
    if cached:
        fill_cache(hub, tmp_path / "part")
    name = NAME if files is not None else "org/other"
    named = [text.replace(NAME, name) for text in named]
    with pytest.raises(InputError) as caught:
        find_folder(Path(name))
    assert len(str(caught.value).splitlines()) == 1 and all(text in str(caught.value) for text in [name, *named])


@pytest.mark.parametrize(
    "path", ["a/b/c", "/tmp/none", "model.gguf", "../x", "org/model.safetensors", "org/", "a b/c", "a--b", "x..y"]
)
def test_other_paths_are_not_names(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if path == "org/":  # pathlib's `org`, a name
        with pytest.raises(InputError, match="org: no such folder here"):
            find_folder(Path(path))
    else:
        assert find_folder(Path(path)) == Path(path)
