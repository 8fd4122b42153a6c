"""The HF folder that comes out: shards with a true index, nothing stale, nothing half-written."""

import json
import shutil
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_reader
import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import CONFIG, SISTERS, Arrays, hf_shapes, make_arrays, write_model, write_tokenizer

from llama_jax.data.tokenizer import copy_tokenizer, open_tokenizer
from llama_jax.distributed.sharding import make_mesh
from llama_jax.hf import writer
from llama_jax.hf.source import Source
from llama_jax.hf.writer import align_special_tokens, write_config, write_weights
from llama_jax.model.config import LlamaConfig
from llama_jax.model.llama import RunOptions

SMALL = {**CONFIG, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG_SMALL = LlamaConfig.from_hf(SMALL)
INDEX = "model.safetensors.index.json"
MAPPINGS = "transformers.models.auto.modeling_auto"


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write_model(tmp_path_factory.mktemp("model"), SMALL, make_arrays(SMALL)))


def load(folder: Path, **options: Any) -> Any:
    return Source(folder).load(RunOptions(**options), make_mesh())


def write(folder: Path, params: Any, shard_bytes: int = writer.SHARD_BYTES, dtype: Any = np.float32) -> None:
    write_weights(
        folder, params, CONFIG_SMALL, dict.fromkeys(hf_shapes(SMALL), np.dtype(dtype)), shard_bytes=shard_bytes
    )


def read(folder: Path) -> Arrays:
    """All tensors of a folder, as its index or its one file has them. Nothing else lies there."""
    names = {path.name for path in folder.iterdir()} - {"config.json", "generation_config.json"}
    if names == {"model.safetensors"}:
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / INDEX).read_text())
    assert names == {INDEX, *index["weight_map"].values()}
    tensors: Arrays = {}
    for file in sorted(set(index["weight_map"].values())):
        part = load_file(folder / file)
        assert {name for name, f in index["weight_map"].items() if f == file} == set(part)
        assert not tensors.keys() & part.keys()
        tensors |= part
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    return tensors


def assert_same(tensors: Arrays, expected: Arrays) -> None:
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape, name
        assert tensors[name].tobytes() == array.tobytes(), name


@settings(max_examples=40)
@given(
    shard_bytes=st.one_of(st.integers(1, 40_000), st.sampled_from([96, 97, 95, 8288, 8287, 8289])),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
)
def test_shards(params: Any, shard_bytes: int, dtype: Any) -> None:
    expected = {name: array.astype(dtype) for name, array in make_arrays(SMALL).items()}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write(folder, params, shard_bytes, dtype)
        assert_same(read(folder), expected)
        files = sorted(folder.glob("*.safetensors"))
        for number, file in enumerate(files, start=1):
            if len(files) > 1:
                assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
            sizes = [a.nbytes for a in load_file(file).values()]
            assert sum(sizes) <= shard_bytes or len(sizes) == 1
            assert safe_open(file, "np").metadata() == {"format": "pt"}  # transformers refuses a file without it
            assert file.stat().st_mode & 0o777 == 0o644
        total = sum(a.nbytes for a in expected.values())
        assert (len(files) == 1) == (total <= shard_bytes)


def test_a_stacked_model_is_written_alike(params: Any, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", SMALL)
    out = tmp_path / "out"
    out.mkdir()
    write(out, load(source, scan_layers=True), 4000)
    assert_same(read(out), make_arrays(SMALL))


@pytest.mark.parametrize(("before", "after"), [(4000, 10**9), (10**9, 4000), (2000, 6000), (6000, 2000), (4000, 4000)])
def test_an_earlier_export_is_replaced(params: Any, tmp_path: Path, before: int, after: int) -> None:
    old = jax.tree.map(lambda x: x + 1, params)
    write(tmp_path, old, before)
    write(tmp_path, params, after)
    assert_same(read(tmp_path), make_arrays(SMALL))


def test_other_files_stay(params: Any, tmp_path: Path) -> None:
    """Only what an export could have written is removed."""
    mine = {"model_notes.safetensors", "adapter_notes.safetensors", "model.gguf", "notes.txt"}
    for name in (*mine, "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("mine")
    write(tmp_path, params, 4000)
    write(tmp_path, params)
    assert {path.name for path in tmp_path.iterdir()} == mine | {"model.safetensors"}


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize(("before", "after"), [(4000, 4000), (10**9, 4000)])
def test_a_failed_write_leaves_the_earlier_export(
    params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, before: int, after: int
) -> None:
    write(tmp_path, params, before)
    was = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def save_file(tensors: Arrays, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) > failing:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    original = writer.save_file
    monkeypatch.setattr(writer, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, jax.tree.map(lambda x: x + 1, params), after)
    assert {name: (tmp_path / name).read_bytes() for name in was} == was
    # What is left of the attempt has no name that any program takes for weights, and the next export replaces it.
    assert all(path.name in was or path.suffix == ".tmp" for path in tmp_path.iterdir())
    monkeypatch.undo()
    write(tmp_path, params, after)
    assert_same(read(tmp_path), make_arrays(SMALL))


def test_the_config_is_the_one_that_came_in(tmp_path: Path) -> None:
    raw = {**SMALL, "rope_scaling": None, "transformers_version": "4.28.0", "architectures": ["LLaMAForCausalLM"]}
    config = LlamaConfig.from_hf({**SMALL, "vocab_size": 260})
    source, out = tmp_path / "in", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    code = {"auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}  # in Python files, which stay behind
    (source / "config.json").write_text(json.dumps({**raw, "temperature": 0.7, "top_p": None}))
    write_config(out, raw | code, Source(source, weights=False).generation, config, np.dtype(np.float16))
    written = json.loads((out / "config.json").read_text())
    changed = {"vocab_size": 260, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    assert written == {**raw, **changed}
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 256, "eos_token_id": 257, "temperature": 0.7}

    given = {"eos_token_id": [257, 258], "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(given))
    modern = {**raw, "dtype": "float32"}  # transformers 5's name of the key
    del modern["torch_dtype"]
    write_config(out, modern, Source(source, weights=False).generation, config, np.dtype(ml_dtypes.bfloat16))
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text()) == given
    write_config(out, raw, Source(out, weights=False).generation, config, np.dtype(np.float32))  # read and written
    assert json.loads((out / "generation_config.json").read_text()) == given


_id = st.none() | st.integers(0, 3)
_ids = st.one_of(st.just("absent"), _id, st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))


@settings(max_examples=40)
@given(
    config=st.fixed_dictionaries({"eos_token_id": _ids, "bos_token_id": st.just("absent") | _id, "pad_token_id": _id}),
    generation=st.none() | st.fixed_dictionaries({"eos_token_id": _ids, "bos_token_id": _id, "pad_token_id": _id}),
    eos=_id,
    bos=_id,
    pad=_id,
)
def test_special_tokens_are_aligned_as_by_the_trainer_of_5(config, generation, eos, bos, pad) -> None:
    """Against its own `align_special_tokens`, by what transformers reads of the written files."""
    transformers = pytest.importorskip("transformers")
    align = pytest.importorskip("transformers.trainer_utils").align_special_tokens
    present, generation = ({k: v for k, v in (d or {}).items() if v != "absent"} for d in (config, generation))
    generation = generation or {"_from_model_config": True, **{k: v for k, v in present.items() if v is not None}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(4)}, "t0")),
        **{f"{key}_token": f"t{i}" for key, i in (("eos", eos), ("bos", bos), ("pad", pad)) if i is not None},
    )
    theirs = types.SimpleNamespace(
        config=transformers.LlamaConfig(**present), generation_config=transformers.GenerationConfig(**generation)
    )
    align(theirs, tokenizer)
    raw, ours = align_special_tokens({"model_type": "llama", **present}, generation, tokenizer)
    del raw["model_type"]
    read = transformers.LlamaConfig(**raw), transformers.GenerationConfig(**ours)
    for key in config:
        assert getattr(read[0], key) == getattr(theirs.config, key), key
        assert getattr(read[1], key) == getattr(theirs.generation_config, key), key


BARE = {key: value for key, value in SMALL.items() if key not in ("rope_theta", "torch_dtype")}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "4: theta": {"rope_theta": 5e5, "torch_dtype": "float32"},
    "4: linear": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "4: of both names": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4}},
    "4: default": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
    "GGUF: linear": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0, **LONG}},
    "5: theta": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float32"},
    "5: linear": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}, "dtype": "float32"},
    "5: dynamic": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 4.0}},
    "5: llama3": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    "4: llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
}


@pytest.fixture(scope="module")
def old_transformers() -> Iterator[hf_reader.Server]:
    server = hf_reader.Server()
    yield server
    server.close()


@pytest.mark.parametrize("name", ROPES)
def test_transformers_of_4_37_and_of_5_read_the_config_alike(
    name: str, old_transformers: hf_reader.Server, tmp_path: Path
) -> None:
    """As 5 reads the source. 4.37 gives the same logits too; llama3's rotation, which it lacks, it refuses."""
    raw = {**BARE, "max_position_embeddings": 16, **ROPES[name]}
    source, out = write_model(tmp_path / "in", raw), tmp_path / "out"
    out.mkdir()
    write_config(out, raw, Source(source).generation, LlamaConfig.from_hf(raw), np.dtype(np.float32))
    shutil.copy(source / "model.safetensors", out)
    meant, new = (hf_reader.configure(str(folder)) for folder in (source, out))
    assert isinstance(meant, dict) and isinstance(new, dict)
    ignored = LONG.keys() if meant["rope"]["rope_type"] != "llama3" else set()  # by these rotations
    rope = {key: value for key, value in meant["rope"].items() if key not in ignored}
    assert new == {"rope": rope, "dtype": "torch.float32"}
    old = old_transformers.ask("configure", str(out))
    if rope["rope_type"] == "llama3":
        assert isinstance(old, str) and "rope_scaling" in old
        return
    assert old == new
    ids = np.random.default_rng(0).integers(0, 259, 24).tolist()
    expected = hf_reader.logits({"folder": str(source), "ids": ids})
    # Two implementations in float32, some tens of roundings of 6e-8 of logits below 4 apart.
    for logits in (old_transformers.ask("logits", {"folder": str(out), "ids": ids}),
                   hf_reader.logits({"folder": str(out), "ids": ids})):  # fmt: skip
        np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize("key", ["tokenizer_class", "auto_map"])
@pytest.mark.parametrize("how", ["saved", "copied"])
def test_both_transformers_load_the_tokenizer_that_5_saved(
    how: str, key: str, old_transformers: hf_reader.Server, tmp_path: Path
) -> None:
    """5 names its base class, which 4.37 lacks; others name a class in a Python file, which is not copied."""
    transformers = pytest.importorskip("transformers")
    plain = write_tokenizer(write_model(tmp_path / "plain"))
    (plain / "additional_chat_templates").mkdir()
    (plain / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (plain / "chat_template.jinja").write_text("{{ messages }}")
    source, out = tmp_path / "in", tmp_path / "out"
    for folder in (source, out):
        write_model(folder)
    transformers.AutoTokenizer.from_pretrained(plain).save_pretrained(source)
    path = source / "tokenizer_config.json"
    assert json.loads(path.read_text())["tokenizer_class"] == "TokenizersBackend"
    if key == "auto_map":
        custom = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | custom))
    if how == "saved":
        open_tokenizer(source).save(out)
    else:
        copy_tokenizer(source, out)
    case = {"folder": str(out), "fast": True, "texts": ["Hello</s> you", ""]}
    expected = hf_reader.tokenize({**case, "folder": str(plain)})
    assert old_transformers.ask("tokenize", case)["ids"] == hf_reader.tokenize(case)["ids"] == expected["ids"]
    templates = transformers.AutoTokenizer.from_pretrained(out).chat_template
    assert templates == {"default": "{{ messages }}", "rag": "{{ documents }}"}
    copy_tokenizer(write_tokenizer(tmp_path), out)
    assert not (out / "additional_chat_templates").exists()


@pytest.mark.parametrize("name", SISTERS)
def test_transformers_reads_a_sister_model(name: str, old_transformers: hf_reader.Server, tmp_path: Path) -> None:
    """Equal logits of the folder that came in and of the export, in stacked layers, by 5 and, where it has the family,
    by 4.37, whose default attention ignores a window."""
    raw = {**SMALL, **SISTERS[name], "max_position_embeddings": 64, "vocab_size": 64, "architectures": None}
    raw["eos_token_id"] = raw["bos_token_id"] = 1
    folder, out = write_model(tmp_path / "in", raw), tmp_path / "out"
    out.mkdir()
    source = Source(folder)
    assert source.tensors.keys() == hf_shapes(raw).keys()
    params = source.load(RunOptions(scan_layers=True), make_mesh())
    write_weights(out, params, source.config, source.dtypes)
    write_config(out, raw, {}, source.config, np.dtype(np.float32))
    written = json.loads((out / "config.json").read_text())
    class_ = pytest.importorskip(MAPPINGS).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[raw["model_type"]]
    assert written == {**raw, "architectures": [class_], "torch_dtype": "float32"}
    ids = np.random.default_rng(0).integers(0, 64, 5 if "window" in name else 24).tolist()
    expected = hf_reader.logits({"folder": str(folder), "ids": ids})
    assert hf_reader.logits({"folder": str(out), "ids": ids}) == expected
    if class_ in ("MistralForCausalLM", "Qwen2ForCausalLM"):
        old = old_transformers.ask("logits", {"folder": str(out), "ids": ids})
        np.testing.assert_allclose(old, expected, atol=2e-5)  # as above
