"""Models, results and checkpoints on gs://, held against the same run on the disk."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gcs
import numpy as np
import pytest
from test_processes import finish, start
from tiny import (
    ALPACA,
    CACHE,
    CHANGING,
    CONFIG,
    Outcome,
    make_arrays,
    make_records,
    run,
    write_json,
    write_model,
    write_tokenizer,
)

from llama_jax.base.bucket import as_path
from llama_jax.command import convert, train
from llama_jax.hf.source import Source


@pytest.fixture(scope="module")
def server() -> Iterator[fake_gcs.Server]:
    with fake_gcs.Server("bucket") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(server: fake_gcs.Server, monkeypatch: pytest.MonkeyPatch) -> fake_gcs.Bucket:
    """An empty bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", CACHE.name)
    server.buckets["bucket"] = fake_gcs.Bucket()
    return server.buckets["bucket"]


def put(bucket: fake_gcs.Bucket, folder: Path, name: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.write(f"{name}/{path.relative_to(folder)}", path.read_bytes(), None)


def names(bucket: fake_gcs.Bucket, folder: str, ends: str = "") -> list[str]:
    """The names in a folder, without those that orbax makes up."""
    inside = (name.removeprefix(folder + "/") for name in sorted(bucket.objects) if name.startswith(folder + "/"))
    return [name for name in inside if name.endswith(ends)]


def exported(bucket: fake_gcs.Bucket, folder: str) -> dict[str, str]:
    """SHA-256 of each file of an HF folder, by name."""
    files = {name: bucket.objects[f"{folder}/{name}"][0] for name in names(bucket, folder) if "/" not in name}
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name not in CHANGING}


def on_disk(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in CHANGING]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def model(folder: Path, shards: int = 1, seed: int = 0) -> Path:
    return write_tokenizer(write_model(folder, arrays=make_arrays(CONFIG, seed), shards=shards))


def trained(tmp_path: Path, model: str | Path, output: str | Path, **flags: Any) -> Outcome:
    data = write_json(tmp_path / "data.json", ALPACA * 4)
    flags = {
        "max_steps": 3,
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        **flags,
    }
    flags |= {"model_name_or_path": model, "data_path": data, "output_dir": output, "max_tokens_per_device": 512}
    return run(train.main, "--use_cpu", "True", *(word for k, v in flags.items() for word in (f"--{k}", v)))


def log(text: str | bytes) -> list[dict[str, Any]]:
    return [entry for entry in json.loads(text)["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_a_run_is_the_disks(bucket: fake_gcs.Bucket, tmp_path: Path) -> None:
    """The same files and losses; resumed after a save that was cut off, the same again."""
    put(bucket, model(tmp_path / "model", shards=3), "models/tiny")
    done = trained(tmp_path, "gs://bucket/models/tiny", "gs://bucket/out")
    assert done.code == 0, done.err
    assert trained(tmp_path, tmp_path / "model", tmp_path / "out").code == 0
    assert exported(bucket, "out") == on_disk(tmp_path / "out")
    losses = log((tmp_path / "out/trainer_state.json").read_text())
    assert log(bucket.objects["out/trainer_state.json"][0]) == losses
    assert len(losses) == 3
    committed = ["checkpoint-2/commit_success.txt", "checkpoint-3/commit_success.txt"]
    assert [name for name in names(bucket, "out", "commit_success.txt") if name.count("/") == 1] == committed

    again = trained(tmp_path, "gs://bucket/models/tiny", "gs://bucket/out")
    assert again.code == 2
    assert "gs://bucket/out already holds checkpoint-3: go on with --resume_from_checkpoint True" in again.err

    hf = ("--to_hf", "--model_name_or_path", "gs://bucket/out/checkpoint-3", "--output_dir", tmp_path / "converted")
    done = run(convert.main, *hf)
    assert done.code == 0, done.err
    name = "model.safetensors"
    assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    del bucket.objects["out/checkpoint-3/commit_success.txt"]  # written last
    del bucket.objects["out/model.safetensors"]
    named = "gs://bucket/out/checkpoint-2"
    resumed = trained(tmp_path, "gs://bucket/models/tiny", "gs://bucket/out", resume_from_checkpoint=named)
    assert resumed.code == 0, resumed.err
    assert "resumed from gs://bucket/out/checkpoint-2" in resumed.err
    assert exported(bucket, "out") == on_disk(tmp_path / "out")
    assert log(bucket.objects["out/trainer_state.json"][0]) == losses


@pytest.mark.slow
def test_two_processes(bucket: fake_gcs.Bucket, tmp_path: Path) -> None:
    """Two processes that share a bucket alone write the files of two that share a disk."""
    write_json(tmp_path / "data.json", make_records(12))
    put(bucket, write_model(tmp_path / "model", shards=3), "model")
    argv = ["--use_cpu", "True", "--data_path", str(tmp_path / "data.json"), "--max_steps", "2", "--save_steps", "2"]
    argv += ["--per_device_train_batch_size", "2", "--logging_steps", "1"]
    for model, output in ((str(tmp_path / "model"), str(tmp_path / "out")), ("gs://bucket/model", "gs://bucket/out")):
        finish(start([[*argv, "--model_name_or_path", model, "--output_dir", output]] * 2, 2))
    assert exported(bucket, "out") == on_disk(tmp_path / "out")
    assert len(names(bucket, "out", ".safetensors")) > 2
    assert log(bucket.objects["out/trainer_state.json"][0]) == log((tmp_path / "out/trainer_state.json").read_text())


@pytest.mark.slow
def test_conversions(bucket: fake_gcs.Bucket, tmp_path: Path) -> None:
    """There and back; the Flax folder's arrays are read where they are."""
    put(bucket, model(tmp_path / "model"), "hf")
    there = run(convert.main, "--model_name_or_path", "gs://bucket/hf", "--output_dir", "gs://bucket/flax", "--verify")
    assert there.code == 0 and "verified: " in there.err, there.err
    back = ("--to_hf", "--verify", "--model_name_or_path", "gs://bucket/flax", "--output_dir", "gs://bucket/back")
    done = run(convert.main, *back)
    assert done.code == 0 and "verified: " in done.err, done.err
    assert bucket.objects["back/model.safetensors"][0] == (tmp_path / "model/model.safetensors").read_bytes()
    assert not names(bucket, "back", ".tmp")
    copied = [path.name for path in Source("gs://bucket/flax").folder.iterdir()]
    assert "llama_jax.json" in copied and "params" not in copied
    same = run(convert.main, *back[:-1], "gs://bucket/flax")
    assert same.code == 2 and "is the folder that is read" in same.err


def test_a_copy_follows_the_bucket(bucket: fake_gcs.Bucket, tmp_path: Path) -> None:
    put(bucket, model(tmp_path / "one", shards=2), "m")
    bucket.write("m/pytorch_model.bin", b"not wanted", None)
    bucket.write("m/checkpoint-1/config.json", b"not wanted", None)
    first = Source("gs://bucket/m")
    wanted = {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert {path.name for path in first.folder.iterdir()} == wanted
    bucket.refused["safetensors$"] = 403  # the copy is used again, whatever the bucket says to a reader
    assert Source("gs://bucket/m").folder == first.folder
    bucket.refused.clear()
    put(bucket, model(tmp_path / "two", shards=2, seed=1), "m")
    second = Source("gs://bucket/m")
    for source, seed in ((first, 0), (second, 1)):
        (expected,) = (a for name, a in make_arrays(CONFIG, seed).items() if name == "lm_head.weight")
        np.testing.assert_array_equal(source.tensors["lm_head.weight"].read(()), expected)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"model": "gs://bucket/nothing"}, "gs://bucket/nothing: no such folder in the bucket"),
        ({"model": "gs://bucket/bin"}, "holds bin/pytorch_model.bin"),
        ({"model": "gs://bucket/closed"}, "gs://bucket/closed: cannot be read: OSError: Forbidden"),
        ({"output": "gs://no-bucket/out"}, "output_dir gs://no-bucket/out is not writable: FileNotFoundError"),
        ({"output": "gs://bucket/closed/out"}, "output_dir gs://bucket/closed/out is not writable: OSError: Forbidden"),
        ({"output": "s3://bucket/out"}, "--output_dir s3://bucket/out: is not reached from here; copy the files here"),
        ({"cache_dir": "gs://bucket/cache"}, "--cache_dir gs://bucket/cache: is not reached from here"),
    ],
)
def test_refused(flags: dict[str, str], line: str, bucket: fake_gcs.Bucket, tmp_path: Path) -> None:
    local = model(tmp_path / "model")
    put(bucket, local, "closed")
    bucket.write("bin/config.json", b"{}", None)
    bucket.write("bin/pytorch_model.bin", b"", None)
    bucket.refused["^closed"] = 403
    outcome = trained(tmp_path, **{"model": str(local), "output": str(tmp_path / "out"), **flags})  # type: ignore[arg-type]
    assert outcome.code == 2
    assert line.replace("bin/", "") in outcome.err.replace("bin/", ""), outcome.err
    assert "Traceback" not in outcome.err


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Exception, match="pip install gcsfs"):
        as_path("gs://bucket/out")
