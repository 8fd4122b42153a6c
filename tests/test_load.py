"""Checkpoints on disk: every tensor arrives bit for bit, and a folder that is not whole is refused in one line."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from forks import on_devices
from huggingface_hub import file_download
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.hf.load import READERS, _ahead, check_tensors, load_params, resize_vocabulary
from llama_jax.hf.names import name_table
from llama_jax.hf.readers import check_small_files, open_checkpoint
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions

Arrays = dict[str, np.ndarray]

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64, "I8": np.int8}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

RAW = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


def write_safetensors(path: Path, tensors: Arrays) -> None:
    """The format as its specification has it: the header's length, the header, the bytes."""
    header, start = {}, 0
    for name, array in tensors.items():
        offsets = [start, start + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": offsets}
        start += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(folder: Path, raw: dict[str, Any], shards: list[Arrays]) -> None:
    """An HF folder: one `model.safetensors`, or shards with their index."""
    (folder / "config.json").write_text(json.dumps(raw))
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_arrays(raw: dict[str, Any], dtype: Any, seed: int = 0) -> Arrays:
    """Random finite bit patterns of every tensor: all exponents, subnormal numbers, both zeros."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (_, shape) in name_table(LlamaConfig.from_hf(raw)).items():
        array = np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
        with np.errstate(invalid="ignore"):
            arrays[name] = np.where(np.isfinite(array.astype(np.float64)), array, np.ones((), dtype))
    return arrays


def load(folder: Path, run: RunOptions, mesh: Mesh, **options: Any) -> Arrays:
    """The loaded parameters under HF's names, padding checked and cut off."""
    checkpoint = open_checkpoint(folder, **options)
    config = LlamaConfig.from_hf(checkpoint.config)
    tensors = check_tensors(checkpoint.tensors, config, str(folder))
    sizes: list[int] = []
    params = load_params(tensors, config, run, define(config, run, mesh).params, mesh, progress=sizes.append)
    assert sum(sizes) == sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors.values())
    result = {}
    for name, (path, shape) in name_table(config).items():
        keys = (path[0], *path[2:]) if run.scan_layers and path[0] == "layers" else path
        value = params
        for key in keys:
            value = value[key]
        value = np.asarray(value)
        value = value if keys == path else value[path[1]]
        inside = tuple(map(slice, shape))
        result[name], rest = value[inside], value.copy()
        rest[inside] = 0
        assert not rest.any(), f"{name}: what pads it is not zero"
    assert len(jax.tree.leaves(params)) == len(
        {p[2:] if run.scan_layers and p[0] == "layers" else p for p in paths(config)}
    )
    return result


def paths(config: LlamaConfig) -> list[tuple]:
    return [path for path, _ in name_table(config).values()]


def assert_same_bits(loaded: Arrays, arrays: Arrays, dtype: Any) -> None:
    """Equal after the cast to the parameters' type, which rounds to nearest even; -0 is not 0."""
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            expected = array.astype(dtype)
        assert loaded[name].dtype == expected.dtype, name
        assert loaded[name].tobytes() == expected.tobytes(), name


@st.composite
def raws(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "model_type": "llama",
        "vocab_size": draw(st.sampled_from([1, 127, 128, 131, 300])),
        "hidden_size": heads * draw(st.integers(1, 6)),
        "intermediate_size": draw(st.integers(1, 12)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
        "head_dim": draw(st.sampled_from([2, 4, 6])),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """hypothesis draws many times within one test, so pytest's folder would be shared."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    raw=raws(),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    param_dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    scan_layers=st.booleans(),
    shards=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    shuffled=st.randoms(use_true_random=False),
)
def test_every_tensor_bit_for_bit(raw, dtype, param_dtype, scan_layers, shards, seed, shuffled, mesh) -> None:
    arrays = make_arrays(raw, DTYPES[dtype], seed)
    names = list(arrays)
    shuffled.shuffle(names)
    with temporary_folder() as folder:
        write_folder(folder, raw, [{name: arrays[name] for name in names[i::shards]} for i in range(shards)])
        loaded = load(folder, RunOptions(param_dtype=param_dtype, scan_layers=scan_layers), mesh)
    assert_same_bits(loaded, arrays, param_dtype)


def test_types_may_differ_between_tensors(tmp_path: Path, mesh: Mesh) -> None:
    """Norms in float32 among bfloat16 weights, as some exports have it, and float64."""
    arrays = make_arrays(RAW, ml_dtypes.bfloat16)
    for i, name in enumerate(arrays):
        arrays[name] = arrays[name].astype((np.float32, ml_dtypes.bfloat16, np.float64)[i % 3])
    write_folder(tmp_path, RAW, [arrays])
    for scan_layers in (False, True):
        assert_same_bits(load(tmp_path, RunOptions(scan_layers=scan_layers), mesh), arrays, np.float32)


def load_on_eight_devices(folder: str) -> None:
    """Each device reads its own part of each tensor; run where there are eight."""
    mesh = sharding.make_mesh(spec="fsdp=2,context=2,tensor=2")
    arrays = make_arrays(RAW | {"attention_bias": True}, ml_dtypes.bfloat16)
    for scan_layers in (False, True):
        assert_same_bits(load(Path(folder), RunOptions(scan_layers=scan_layers), mesh), arrays, np.float32)


def test_eight_devices(tmp_path: Path) -> None:
    raw = RAW | {"attention_bias": True}
    arrays = make_arrays(raw, ml_dtypes.bfloat16)
    write_folder(tmp_path, raw, [dict(list(arrays.items())[i::3]) for i in range(3)])
    on_devices(8, f"test_load.load_on_eight_devices({str(tmp_path)!r})")


@settings(max_examples=30)
@given(data=st.data())
def test_folders_as_transformers_reads_them(data: st.DataObject) -> None:
    """Of a whole model or its LlamaModel, with either or both of the tied tensors, buffers, any shards: the same
    tensors as AutoModelForCausalLM's, and refused where transformers has to draw a tensor or ties no longer."""
    transformers = pytest.importorskip("transformers")
    tied, bare, seed = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 9))
    raw = RAW | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied, "num_hidden_layers": 1}
    rng = np.random.default_rng(seed)
    saved = {k: rng.normal(0, 1, v.shape).astype(np.float32) for k, v in make_arrays(raw, np.float32).items()}
    kept = data.draw(st.sampled_from(["embedding", "head", "both"]))
    if tied and kept != "embedding":
        head = saved["lm_head.weight"] = saved[EMBEDDING].copy()
        head[-1, -1] += data.draw(st.booleans())
    if kept == "head":
        del saved[EMBEDDING]
    elif not tied and kept == "embedding":
        del saved["lm_head.weight"]
    if bare:
        saved = {name.removeprefix("model."): array for name, array in saved.items()}
    for name in data.draw(st.sets(st.sampled_from(BUFFERS))):
        saved[name] = np.ones(2, np.float32)
    names = data.draw(st.permutations([*saved]))
    shards = data.draw(st.integers(1, 3))
    with temporary_folder() as folder:
        write_folder(folder, raw, [{name: saved[name] for name in names[i::shards]} for i in range(shards)])
        if shards > 1 and data.draw(st.booleans()):
            unlisted = {BUFFERS[0], *(["lm_head.weight"] if tied else [])} - saved.keys()
            Model(folder, []).index(**dict.fromkeys(unlisted, min(folder.glob("*.safetensors")).name))
        for file in folder.glob("*.safetensors"):  # read by their header, which transformers wants
            save_file(load_file(file), file, metadata={"format": "pt"})
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        expected = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
        untied = tied and not np.array_equal(expected["lm_head.weight"], expected[EMBEDDING])
        if info["missing_keys"] or untied:
            fix = (
                "lm_head.weight from the weights"
                if untied
                else "LlamaForCausalLM"
                if kept == "embedding"
                else "missing"
            )
            assert fix in refusal(folder)
            return
        if tied:
            del expected["lm_head.weight"]
        read = check_tensors(open_checkpoint(folder).tensors, LlamaConfig.from_hf(raw), str(folder))
        assert_same_bits({name: tensor.read(()) for name, tensor in read.items()}, expected, np.float32)


BUFFERS = (
    *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    *("model.layers.0.self_attn.rotary_emb.cos_cached", "layers.0.self_attn.rotary_emb.sin_cached", "cos_cached"),
    *("rope.freqs", "model.causal_mask", "model.rotary_emb.original_inv_freq"),
)


# --- what is passed over or refused ----------------------------------------------------------------------------------


def refusal(folder: Path, **options: Any) -> str:
    """The message, one line, of opening the folder and checking its tensors; nothing is loaded."""
    with pytest.raises(InputError) as caught:
        checkpoint = open_checkpoint(folder, **options)
        check_tensors(checkpoint.tensors, LlamaConfig.from_hf(checkpoint.config), str(folder))
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert str(folder) in message
    return message


class Model(NamedTuple):
    folder: Path
    shards: list[Arrays]

    def write(self, raw: dict[str, Any] = RAW) -> None:
        write_folder(self.folder, raw, self.shards)

    def index(self, **changes: Any) -> None:
        """Change entries of the index' weight map; None takes one out."""
        path = self.folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        weight_map = index["weight_map"] | changes
        index["weight_map"] = {name: file for name, file in weight_map.items() if file is not None}
        path.write_text(json.dumps(index))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Two shards, not yet written."""
    folder = tmp_path / "model"
    folder.mkdir()
    items = list(make_arrays(RAW, np.float32).items())
    return Model(folder, [dict(items[:9]), dict(items[9:])])


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def test_old_rotary_buffers_are_passed_over(model: Model, mesh: Mesh) -> None:
    expected = model.shards[0] | model.shards[1]
    for i in range(2):
        model.shards[i][f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    model.write()
    assert_same_bits(load(model.folder, RunOptions(), mesh), expected, np.float32)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq.weight",
        "model.layers.00.mlp.up_proj.weight",
        "base_model.model.lm_head.weight",
        "two\nlines",
    ],
)
def test_unknown_tensor(name: str, model: Model) -> None:
    model.shards[1][name] = np.ones(12, np.float32)
    model.write()
    message = refusal(model.folder)
    assert "unknown" in message and name.split("\n")[0] in message


@pytest.mark.parametrize("name", [NORM, EMBEDDING, "lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_missing_tensor(name: str, model: Model) -> None:
    for shard in model.shards:
        shard.pop(name, None)
    model.write()
    message = refusal(model.folder)
    assert "missing" in message and name in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (EMBEDDING, (130, 12)),
        (EMBEDDING, (256, 12)),
        ("lm_head.weight", (131, 11)),
        (NORM, (12, 1)),
        (NORM, ()),
        ("model.layers.0.self_attn.k_proj.weight", (12, 4)),
        ("model.layers.1.mlp.down_proj.weight", (240,)),
    ],
)
def test_wrong_shape(name: str, shape: tuple[int, ...], model: Model) -> None:
    shard = next(i for i, tensors in enumerate(model.shards) if name in tensors)
    model.shards[shard][name] = np.ones(shape, np.float32)
    model.write()
    message = refusal(model.folder)
    assert name in message and str(list(shape)) in message and (FIRST, SECOND)[shard] in message


def test_duplicate_tensor(model: Model) -> None:
    model.shards[1][EMBEDDING] = model.shards[0][EMBEDDING]
    model.write()
    message = refusal(model.folder)
    assert EMBEDDING in message and SECOND in message


def test_integer_tensor(model: Model) -> None:
    model.shards[1][NORM] = np.ones(12, np.int8)
    model.write()
    assert NORM in refusal(model.folder) and SECOND in refusal(model.folder)


def test_tensor_elsewhere_than_the_index_says(model: Model) -> None:
    model.write()
    model.index(**{EMBEDDING: SECOND})
    assert EMBEDDING in refusal(model.folder)
    model.index(**{EMBEDDING: None})
    assert EMBEDDING in refusal(model.folder)
    model.index(**{EMBEDDING: FIRST})
    last = "model.layers.1.mlp.up_proj.weight"  # named by the index, needed by the model, in no file
    write_safetensors(model.folder / SECOND, {k: v for k, v in model.shards[1].items() if k != last})
    assert "missing" in refusal(model.folder) and last in refusal(model.folder)


def test_an_index_that_names_too_much(model: Model, mesh: Mesh) -> None:
    """As in transformers, which reads the files' own names: a name that the model does not need is passed over."""
    model.write()
    model.index(**{"model.layers.7.mlp.up_proj.weight": FIRST, "model.rotary_emb.inv_freq": "gone.safetensors"})
    assert_same_bits(load(model.folder, RunOptions(), mesh), model.shards[0] | model.shards[1], np.float32)


def test_missing_shard(model: Model) -> None:
    model.write()
    (model.folder / SECOND).unlink()
    assert SECOND in refusal(model.folder)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "sub/x.safetensors", "/etc/passwd", "", ".", "..", "a\nb", "a\0b"]
)
def test_shard_name_that_leaves_the_folder(shard: str, model: Model) -> None:
    model.write()
    for place in (model.folder.parent, model.folder / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(model.folder / SECOND, place / "x.safetensors")
    model.index(**dict.fromkeys(model.shards[1], shard))
    assert "model.safetensors.index.json" in refusal(model.folder)


def test_weights_behind_links(model: Model, mesh: Mesh) -> None:
    """Weights may lie anywhere: they are read as numbers, and copied nowhere."""
    model.write()
    outside = model.folder.parent / "elsewhere" / "weights of mine"
    outside.parent.mkdir()
    (model.folder / SECOND).rename(outside)
    (model.folder / SECOND).symlink_to(outside)
    assert_same_bits(load(model.folder, RunOptions(), mesh), model.shards[0] | model.shards[1], np.float32)


def into_cache(folder: Path, cache: Path) -> Path:
    """Move the files into a hub cache, by huggingface_hub's own functions, and return the snapshot."""
    repo = cache / file_download.repo_folder_name(repo_id="org/x", repo_type="model")
    snapshot = repo / "snapshots" / ("0" * 40)
    for path in (snapshot, repo / "blobs", repo / "refs"):
        path.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for file in sorted(folder.iterdir()):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file_download._create_symlink(str(file.rename(blob)), str(snapshot / file.name), new_blob=True)
    return snapshot


def behind_link(path: Path, disk: Path) -> None:
    """Move a file or folder to another disk, and leave a link to it."""
    disk.mkdir(exist_ok=True)
    path.symlink_to(path.rename(disk / path.name))


@pytest.mark.parametrize("layout", ["plain", "shared", "blobs", "each blob", "repository", "cache", "shared, cache"])
def test_hub_caches(layout: str, model: Model, mesh: Mesh) -> None:
    """Every cache is read, by the snapshot, a link to it, and a folder of links into it: as downloaded, with the blobs
    shared by all repositories (huggingface_hub 1.32), and with a part on another disk."""
    model.write()
    (model.folder / "generation_config.json").write_text("{}")
    root = model.folder.parent
    cache = root / "cache"
    snapshot = into_cache(model.folder, cache)
    repo = snapshot.parents[1]
    if "shared" in layout:
        for blob in (repo / "blobs").iterdir():
            size = blob.stat().st_size
            publish_blob_to_shared_store(blob_path=str(blob), xet_hash=blob.name, cache_dir=cache, expected_size=size)
            assert blob.is_symlink()
    moved = {"blobs": [repo / "blobs"], "each blob": [*(repo / "blobs").iterdir()], "repository": [repo]}
    for part in moved.get(layout, [cache] if "cache" in layout else []):
        behind_link(part, root / "disk")
    linked, local, again = root / "linked", root / "local", root / "again"
    linked.symlink_to(snapshot)
    for folder in (local, again):
        folder.mkdir()
    for file in snapshot.iterdir():
        (local / file.name).symlink_to(os.path.normpath(file.parent / file.readlink()))  # as `local_dir` before 0.23
        (again / file.name).symlink_to(file)
    for folder in (snapshot, linked, local, again):
        check_small_files(folder)
        assert_same_bits(load(folder, RunOptions(), mesh), model.shards[0] | model.shards[1], np.float32)


SMALL = ("config.json", "generation_config.json", "model.safetensors.index.json", "vocab.json", "merges.txt")


@pytest.mark.parametrize("name", [*SMALL, "tokenizer.model", "added_tokens.json", "additional_chat_templates/x.jinja"])
def test_a_link_to_a_secret_is_not_read(name: str, model: Model) -> None:
    """Nor in folders that look like a hub cache: blobs that are links to another name, or in a folder of secrets."""
    secret = model.folder.parent / "ssh" / "id_rsa"
    secret.parent.mkdir()
    model.write()
    file = model.folder / name
    file.parent.mkdir(exist_ok=True)
    secret.write_text(file.read_text() if file.exists() else "{}")  # valid, so that the link alone is refused
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    assert name in refusal(model.folder) and "copy the file here" in refusal(model.folder)
    file.unlink()
    file.symlink_to(os.path.relpath(secret, file.parent))
    assert name in refusal(model.folder) and str(secret) in refusal(model.folder)
    file.unlink()
    hashed = secret.rename(secret.with_name("c" * 40))  # a name as of a blob, which no cache leads to
    file.symlink_to(hashed)
    assert name in refusal(model.folder)
    hashed.rename(secret)
    if "/" in name:
        return
    file.unlink()
    snapshot = into_cache(model.folder, model.folder.parent / "cache")
    blobs = snapshot.parents[1] / "blobs"
    (blobs / ("a" * 40)).symlink_to(secret)
    (snapshot / name).symlink_to(Path("../../blobs") / ("a" * 40))
    assert name in refusal(snapshot)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(Path("../../blobs") / "id_rsa")
    for blob in blobs.iterdir():
        blob.rename(secret.parent / blob.name)
    blobs.rmdir()
    blobs.symlink_to(secret.parent)
    assert name in refusal(snapshot)


def test_links_within_the_folder_and_links_in_circles(model: Model, mesh: Mesh) -> None:
    model.write()
    (model.folder / "config.json").rename(model.folder / "mine.json")
    (model.folder / "config.json").symlink_to("mine.json")
    assert_same_bits(load(model.folder, RunOptions(), mesh), model.shards[0] | model.shards[1], np.float32)
    (model.folder / "config.json").unlink()
    (model.folder / "config.json").symlink_to("config.json")
    assert "config.json" in refusal(model.folder)


def test_one_file_goes_before_an_index(model: Model) -> None:
    """As in transformers: an old index, whose shards may be gone, does not matter."""
    transformers = pytest.importorskip("transformers")
    model.write({**RAW, "tie_word_embeddings": False})
    whole = {name: array + 1 for name, array in (model.shards[0] | model.shards[1]).items()}
    save_file(whole, model.folder / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model.folder).model.norm.weight.detach().numpy()
    np.testing.assert_array_equal(open_checkpoint(model.folder).tensors[NORM].read(()), theirs)
    np.testing.assert_array_equal(whole[NORM], theirs)
    (model.folder / SECOND).unlink()
    assert open_checkpoint(model.folder).tensors.keys() == whole.keys()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"model.norm.weight": 3}}',
        '{"weight_map": {"model.norm.weight": ["model-00001-of-00002.safetensors"]}}',
        '{"weight_map": {"a": "b", "a": "c"}}',
        b"\xff\xfe\x00",
    ],
)
def test_damaged_index(text: str | bytes, model: Model) -> None:
    model.write()
    (model.folder / "model.safetensors.index.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refusal(model.folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"model_type": "llama", "model_type": "llama"}', b"\xff\xfe\x00"]
)
def test_damaged_config(text: str | bytes, model: Model) -> None:
    model.write()
    (model.folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json" in refusal(model.folder)


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "no config.json" in refusal(tmp_path) and "merge_and_unload" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for inside in ("checkpoint-3", "snapshots/0123"):
        (tmp_path / inside).mkdir(parents=True)
        (tmp_path / inside / "config.json").write_text(json.dumps(RAW))
        assert "no config.json" in refusal(tmp_path) and str(tmp_path / inside) in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    assert "model.safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors" in refusal(tmp_path)


@settings(deadline=None)
@given(data=st.data())
def test_part_of_a_tensor(data: st.DataObject) -> None:
    """Rows, columns, both or neither, wherever the bytes of a tensor begin."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), max_size=3)))
    dtype = np.dtype(data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16, np.float64])))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape]
    index = tuple(slice(a, max(b, a + 1)) for a, b in bounds)
    before = np.zeros(data.draw(st.integers(0, 9)), np.float16)
    array = np.frombuffer(np.random.default_rng(0).bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), RAW, [{"before": before, "whole": array}])
        tensor = open_checkpoint(Path(folder)).tensors["whole"]
        for part, expected in ((tensor.read(index), array[index]), (tensor.read(()), array)):
            assert (part.shape, part.dtype) == (expected.shape, dtype)
            assert part.tobytes() == expected.tobytes()


def test_file_cut_while_it_is_used(model: Model) -> None:
    model.write()
    tensor = open_checkpoint(model.folder).tensors[NORM]
    os.truncate(model.folder / tensor.file, 200)
    with pytest.raises(InputError, match=rf"{tensor.file}: could not be read to the end of tensor '{NORM}'"):
        tensor.read(())


@settings(max_examples=40)
@given(where=st.floats(0, 1, exclude_max=True))
def test_truncated_file(where: float) -> None:
    """Cut anywhere, a file is refused before a tensor is read."""
    with temporary_folder() as folder:
        write_folder(folder, RAW, [make_arrays(RAW, np.float16)])
        path = folder / "model.safetensors"
        os.truncate(path, int(where * path.stat().st_size))
        assert "model.safetensors" in refusal(folder)


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_header(data: st.DataObject) -> None:
    """A byte changed in the header: refused in one line, or (a digit of a shape's, say) never another exception."""
    with temporary_folder() as folder:
        write_folder(folder, RAW, [make_arrays(RAW, np.float16)])
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, 7 + int.from_bytes(content[:8], "little")))
        content[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]))
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(folder)
            check_tensors(checkpoint.tensors, LlamaConfig.from_hf(checkpoint.config), str(folder))
        except InputError as e:
            assert len(str(e).splitlines()) == 1 and str(folder) in str(e)


def test_tied_head(model: Model, mesh: Mesh) -> None:
    """A tied model may carry its head again; not another head, nor one that cannot be told to be the same."""
    raw = RAW | {"tie_word_embeddings": True}
    embedding = model.shards[0][EMBEDDING]
    head = next(shard for shard in model.shards if "lm_head.weight" in shard)
    head["lm_head.weight"] = embedding.copy()
    model.write(raw)
    expected = {k: v for shard in model.shards for k, v in shard.items() if k != "lm_head.weight"}
    assert_same_bits(load(model.folder, RunOptions(), mesh), expected, np.float32)

    one_bit = embedding.copy()
    one_bit[-1, -1] = np.nextafter(one_bit[-1, -1], np.float32(1))
    for other in (one_bit, embedding[:-1], embedding.astype(np.float64), embedding[0]):
        head["lm_head.weight"] = other
        model.write(raw)
        assert "lm_head.weight" in refusal(model.folder) and "tie_word_embeddings" in refusal(model.folder)


@pytest.mark.parametrize("row", [0, 4095, 4096, 4098])
def test_tied_head_of_many_rows(row: int, tmp_path: Path) -> None:
    """Any row may differ; they are compared 4,096 at a time."""
    raw = RAW | {"vocab_size": 4099, "tie_word_embeddings": True}
    arrays = make_arrays(raw, np.float32)
    head = arrays["lm_head.weight"] = arrays[EMBEDDING].copy()
    write_folder(tmp_path, raw, [arrays])
    checkpoint = open_checkpoint(tmp_path)
    assert "lm_head.weight" not in check_tensors(checkpoint.tensors, LlamaConfig.from_hf(raw), str(tmp_path))
    head.view(np.uint32)[row, 0] ^= 1
    write_folder(tmp_path, raw, [arrays])
    assert "lm_head.weight differs" in refusal(tmp_path)


# --- pickles ---------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_only_on_request(sharded: bool, model: Model, mesh: Mesh) -> None:
    torch = pytest.importorskip("torch")
    model.write()
    for path in model.folder.glob("model*"):
        path.unlink()
    arrays = model.shards[0] | model.shards[1]
    parts = model.shards if sharded else [arrays]
    files = [f"pytorch_model-{i}.bin" if sharded else "pytorch_model.bin" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: torch.tensor(array).bfloat16() for name, array in part.items()}, model.folder / file)
    if sharded:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (model.folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "--allow_pickle" in refusal(model.folder)
    expected = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    assert_same_bits(load(model.folder, RunOptions(), mesh, allow_pickle=True), expected, np.float32)

    os.truncate(model.folder / files[-1], 1000)
    assert files[-1] in refusal(model.folder, allow_pickle=True)
    torch.save(parts[-1] | {"x": Bomb(model.folder / "ran")}, model.folder / files[-1])
    assert files[-1] in refusal(model.folder, allow_pickle=True)
    assert not (model.folder / "ran").exists()


def test_pickled_parameters_and_what_else_a_bin_may_hold(model: Model, mesh: Mesh) -> None:
    torch = pytest.importorskip("torch")
    model.write()
    for path in model.folder.glob("model*"):
        path.unlink()
    arrays, path = model.shards[0] | model.shards[1], model.folder / "pytorch_model.bin"
    parameters = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}
    torch.save(parameters, path)
    assert_same_bits(load(model.folder, RunOptions(), mesh, allow_pickle=True), arrays, np.float32)
    for value, options, named in (
        ({**parameters, "epoch": 3}, {}, "'epoch'"),
        ({**parameters, NORM: torch.ones(12).to_sparse()}, {}, f"_rebuild_sparse_tensor in '{NORM}', not plain"),
        ([*parameters.values()], {}, "state_dict()"),
        (dict(enumerate(parameters.values())), {}, "has a int for a name; save the model's state_dict()"),
        (torch.nn.Linear(2, 3), {}, "holds torch.nn.modules.linear.Linear, not plain tensors: save the model's state_"),
        (parameters, {"_use_new_zipfile_serialization": False}, "torch.save it again"),
    ):
        torch.save(value, path, **options)
        assert named in refusal(model.folder, allow_pickle=True) and path.name in refusal(
            model.folder, allow_pickle=True
        )


# --- another vocabulary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("old", "new", "new_tokens"),
    [
        *((127, 128, 1), (128, 129, 1), (131, 132, 1), (131, 400, 269), (300, 131, 0), (128, 3, 0), (9, 9, 0)),
        *((320, 260, 1), (260, 260, 1), (131, 133, 3)),  # rows without a token, one of which a new token gets
    ],
)
def test_resized_vocabulary(old: int, new: int, new_tokens: int, tied: bool, tmp_path: Path, mesh: Mesh) -> None:
    """Against transformers' resize_token_embeddings and stanford_alpaca's mean over the rows that are not new.

    Old rows are equal bit for bit. A mean of n numbers of order 1, summed in whatever order, is off by at most n u of
    the mean of their magnitudes (u = 2^-24), on either side.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = RAW | {"vocab_size": old, "tie_word_embeddings": tied}
    config, resized = LlamaConfig.from_hf(raw), LlamaConfig.from_hf(raw | {"vocab_size": new})
    rng = np.random.default_rng(0)
    arrays = {k: rng.normal(0, 1, v.shape).astype(np.float32) for k, v in make_arrays(raw, np.float32).items()}

    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"}))
    hf.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()}, strict=not tied)
    hf.tie_weights()
    hf.resize_token_embeddings(new)
    if new_tokens > 0:  # stanford_alpaca's smart_tokenizer_and_embedding_resize
        for weight in (hf.get_input_embeddings().weight.data, hf.get_output_embeddings().weight.data):
            weight[-new_tokens:] = weight[:-new_tokens].mean(dim=0, keepdim=True)

    write_folder(tmp_path, raw, [arrays])
    params = load_params(
        check_tensors(open_checkpoint(tmp_path).tensors, config, ""),
        config,
        RunOptions(),
        define(config, RunOptions(), mesh).params,
        mesh,
    )
    result = resize_vocabulary(params, config, resized, range(new - new_tokens, new), mesh)
    assert params["embed_tokens"]["weight"].shape[0] == sharding.vocab_rows(old)  # the argument is left as it was
    assert ("lm_head" in result) == (not tied)
    theirs = {"embed_tokens": hf.get_input_embeddings().weight, "lm_head": hf.get_output_embeddings().weight}
    for name in result.keys() & theirs.keys():
        ours, expected = np.asarray(result[name]["weight"]), theirs[name].detach().numpy()
        assert ours.shape == (sharding.vocab_rows(new), config.hidden_size)
        assert result[name]["weight"].sharding.spec == params[name]["weight"].sharding.spec
        kept = new - new_tokens
        np.testing.assert_array_equal(ours[:kept], expected[:kept])
        bound = 2 * kept * 2.0**-24 * np.abs(expected[:kept]).mean(0)
        assert (np.abs(ours[kept:new] - expected[kept:new]) <= bound).all()
        assert not ours[new:].any()
    assert result["layers"] is params["layers"]


@settings(max_examples=15)
@given(
    old=st.integers(1, 300),
    grows=st.integers(-20, 20),
    new_ids=st.sets(st.integers(0, 320), max_size=4),
    seed=st.integers(0, 9),
)
def test_rows_of_tokens_stay(old: int, grows: int, new_ids: set[int], seed: int) -> None:
    """A row that the checkpoint has, and that is no new token's, is untouched; the others are the mean of these."""
    config, mesh = LlamaConfig.from_hf(RAW), sharding.make_mesh()
    new = max(1, old + grows)
    new_ids = {i for i in new_ids if i < new}
    before = np.random.default_rng(seed).normal(0, 1, (sharding.vocab_rows(old), config.hidden_size))
    before[old:] = 0
    stay = [i for i in range(min(old, new)) if i not in new_ids]
    assume(stay)
    with jax.set_mesh(mesh):
        weight = jax.device_put(before.astype(np.float32), jax.NamedSharding(mesh, sharding.EMBED_VD))
    sizes = (dataclasses.replace(config, vocab_size=n) for n in (old, new))
    result = resize_vocabulary({"embed_tokens": {"weight": weight}}, *sizes, sorted(new_ids), mesh)
    after = np.asarray(result["embed_tokens"]["weight"])
    np.testing.assert_array_equal(after[stay], before[stay].astype(np.float32))
    others = [i for i in range(new) if i not in stay]
    # A mean of n numbers, summed in any order in float32, is off by at most n u of the mean magnitude (u = 2^-24).
    bound = len(stay) * 2.0**-24 * np.abs(before[stay]).mean(0)
    assert (np.abs(after[others] - before[stay].astype(np.float32).mean(0, dtype=np.float64)) <= bound + 2.0**-24).all()
    assert not after[new:].any()


class AtOnce:
    """A pool whose work is done when it is given."""

    def submit(self, load: Any, *tensor: Any) -> Future:
        future: Future = Future()
        future.set_result(load(*tensor))
        return future


def test_what_is_read_ahead_is_bounded() -> None:
    """Tensors read and not yet asked for, whatever the readers' speed: each takes memory of host and device."""
    read: list[tuple] = []
    loaded = _ahead(AtOnce(), lambda path, _: read.append(path) or path, (((i,), None) for i in range(50)))  # type: ignore
    for i in range(50):
        assert next(loaded) == (i,) and len(read) <= i + 1 + READERS
    assert next(loaded, None) is None and read == [(i,) for i in range(50)]
