"""`config.json`: what published models say is read as transformers reads it, and nothing unknown passes."""

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig as HFLlamaConfig

from llama_jax.base.errors import InputError
from llama_jax.model.config import LlamaConfig, RopeConfig

# What transformers 4 wrote into every file of its time.
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
_LLAMA2 = _COMMON | {"pretraining_tp": 1, "rope_scaling": None, "max_position_embeddings": 4096}
_LLAMA3 = _LLAMA2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_8B = _7B | {"intermediate_size": 14336}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA31 = _LLAMA3 | {"mlp_bias": False, "max_position_embeddings": 131072, "rope_scaling": _SCALING}
_LLAMA32 = _LLAMA31 | {"rope_scaling": _SCALING | {"factor": 32.0}, "tie_word_embeddings": True}

# The key sets and values of the published files.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-7b": _COMMON
    | _7B
    | {"max_position_embeddings": 2048, "max_sequence_length": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06},
    "llama-7b, decapoda's": {k: v for k, v in _COMMON.items() if k != "tie_word_embeddings"}
    | _7B
    | {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    | {"max_sequence_length": 2048, "rms_norm_eps": 1e-06},
    "Llama-2-7b": _LLAMA2 | _7B | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "num_key_value_heads": 32},
    "Llama-2-70b": _LLAMA2 | _70B | {"num_key_value_heads": 8},
    "Meta-Llama-3-8B": _LLAMA3 | _8B,
    "Meta-Llama-3-70B": _LLAMA3 | _70B,
    "Llama-3.1-8B": _LLAMA31 | _8B,
    "Llama-3.1-8B-Instruct": _LLAMA31 | _8B | {"eos_token_id": [128001, 128008, 128009]},
    "Llama-3.1-405B": _LLAMA31
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_hidden_layers": 126},
    "Llama-3.2-1B": _LLAMA32
    | {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192}
    | {"num_attention_heads": 32, "num_hidden_layers": 16},
    "Llama-3.2-3B": _LLAMA32
    | {"head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192}
    | {"num_attention_heads": 24, "num_hidden_layers": 28},
    "Llama-3.3-70B-Instruct": _LLAMA31 | _70B | {"head_dim": 128, "eos_token_id": [128001, 128008, 128009]},
    "CodeLlama-7b": _LLAMA2
    | _7B
    | {"max_position_embeddings": 16384, "num_key_value_heads": 32, "rope_theta": 1000000, "vocab_size": 32016},
    "CodeLlama-34b": _LLAMA2
    | {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64, "num_hidden_layers": 48}
    | {"max_position_embeddings": 16384, "num_key_value_heads": 8, "rope_theta": 1000000},
    "TinyLlama-1.1B-Chat-v1.0": _LLAMA2
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_hidden_layers": 22}
    | {"attention_bias": False, "max_position_embeddings": 2048, "num_key_value_heads": 4, "rope_theta": 10000.0},
    "SmolLM2-135M-Instruct": _LLAMA2
    | {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30}
    | {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "initializer_range": 0.041666666666666664}
    | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "is_llama_config": True, "rope_interleaved": False}
    | {"max_position_embeddings": 8192, "num_key_value_heads": 3, "rope_theta": 100000, "tie_word_embeddings": True}
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "vocab_size": 49152},
    "deepseek-coder-6.7b": _LLAMA2
    | _7B
    | {"bos_token_id": 32013, "eos_token_id": 32014, "max_position_embeddings": 16384, "num_key_value_heads": 32}
    | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "vocab_size": 32256},
    "as transformers 5 writes it": _LLAMA31
    | _8B
    | {"dtype": "bfloat16", "pad_token_id": None, "head_dim": 128, "rope_theta": None, "rope_scaling": None}
    | {"rope_parameters": {"rope_theta": 500000.0, **_SCALING}},
}

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3_ROPE = _SCALING | {"original_max_position_embeddings": 64}


def copy(raw: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(raw))


def assert_same_reading(ours: LlamaConfig, hf: HFLlamaConfig) -> None:
    for name in LlamaConfig.__dataclass_fields__:
        if name not in ("rope", "pad_token_id"):
            assert getattr(ours, name) == getattr(hf, name), name
    # As torch's Embedding reads it: a negative padding_idx counts from the end.
    assert ours.pad_token_id == torch.nn.Embedding(hf.vocab_size, 1, hf.pad_token_id).padding_idx
    parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in hf.rope_parameters.items() if k != "type"}
    for key, value in parameters.items():
        assert getattr(ours.rope, key) == value, key
    for key in ours.rope.__dataclass_fields__.keys() - parameters.keys() - {"original_max_position_embeddings"}:
        assert getattr(ours.rope, key) == ours.rope.__dataclass_fields__[key].default, key


@pytest.mark.parametrize("raw", FAMILIES.values(), ids=FAMILIES.keys())
def test_published_configs(raw: dict[str, Any]) -> None:
    """The file, and what transformers 5 makes of it when it saves the model again, are read as transformers does."""
    hf = HFLlamaConfig(**{k: v for k, v in copy(raw).items() if k != "model_type" and v is not None})
    assert_same_reading(LlamaConfig.from_hf(copy(raw)), hf)
    assert_same_reading(LlamaConfig.from_hf(copy(hf.to_dict())), hf)
    assert_same_reading(LlamaConfig.from_hf(copy(hf.to_diff_dict())), hf)  # what save_pretrained writes


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 5000},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.5, "rope_theta": 77.0}, "rope_theta": 5000},
        {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "mscale": 0.7, "truncate": False}},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 1e6}, "rope_theta": 5000.0},
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3_ROPE}, "original_max_position_embeddings": 16},
        {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2, 3, 4, 5.5]}},
    ],
)
def test_rope_parameters(rope: dict[str, Any]) -> None:
    raw = SMALL | {"max_position_embeddings": 128} | rope
    hf = HFLlamaConfig(**{k: v for k, v in copy(raw).items() if k != "model_type"})
    hf.standardize_rope_params()  # its rotary modules call this first: a context length outside the dict wins
    assert_same_reading(LlamaConfig.from_hf(copy(raw)), hf)


def refusal(raw: Any, source: str = "here/config.json") -> str:
    """The message, one line that opens with the file."""
    with pytest.raises(InputError) as caught:
        LlamaConfig.from_hf(raw, source)
    message = str(caught.value)
    assert message.startswith(source)
    assert len(message.splitlines()) == 1, message
    return message


json_values = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=9) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
# Keys with no effect on the mathematics are passed over; this list is the test's own, from transformers' documentation.
KNOWN = {*SMALL, *HFLlamaConfig().to_dict(), *(k for raw in FAMILIES.values() for k in raw)}


@settings(max_examples=300)
@given(
    key=st.text(min_size=1, max_size=20) | st.from_regex(r"[a-z]{1,8}(_[a-z]{1,8}){0,2}", fullmatch=True),
    value=json_values.filter(lambda v: v is not None),
)
@example("sliding_window", 4096)
@example("attention_multiplier", 0.5)
@example("rope", {})
@example("logits_scaling", "8\n9")
@example("embedding\nmultiplier", 12)
@example("num_experts", 8)
@example("qk_norm", False)
def test_unknown_key(key: str, value: Any) -> None:
    """Any key that is not known stops the load; keys that open with an underscore are transformers' private notes."""
    if key in KNOWN or key.startswith("_"):
        return
    try:
        LlamaConfig.from_hf(SMALL | {key: value})
    except InputError:
        assert repr(key) in refusal(SMALL | {key: value})
    else:
        pytest.fail(f"{key!r} was passed over")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"model_type": None}, "model_type"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"intermediate_size": [48, 48]}, "intermediate_size"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"hidden_act": "swish2"}, "swish2"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"hidden_size": 28}, "head_dim"),  # 28 / 4 = 7
        ({"hidden_size": 34}, "hidden_size"),  # 34 / 4 = 8.5: transformers refuses it
        ({"hidden_size": 2}, "hidden_size"),  # 2 / 4 = 0.5
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"is_encoder_decoder": "a\nb"}, "is_encoder_decoder"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}}, "low_freq_factor"),
        ({"rope_scaling": {"factor": 2.0}}, "factor"),  # no type: "default", which takes no factor
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor"),
        ({"rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if k != "high_freq_factor"}}, "high_freq_factor"),
        ({"rope_parameters": LLAMA3_ROPE | {"mscale": 1.0}}, "mscale"),
        ({"rope_parameters": LLAMA3_ROPE | {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": "64"}}, "original_max"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}}, "long_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}}, "short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": 1.0, "long_factor": [1.0] * 4}}, "short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": ["x"] * 4, "long_factor": [1.0] * 4}}, "short_factor"),
    ],
    ids=lambda x: json.dumps(x) if isinstance(x, dict) else None,
)
def test_wrong_values(change: dict[str, Any], named: str) -> None:
    assert named in refusal(SMALL | change)


@settings(max_examples=400)
@given(
    key=st.sampled_from(sorted(LlamaConfig.__dataclass_fields__.keys() - {"rope"})) | st.just("rope_theta"),
    value=json_values,
)
def test_any_value_of_a_known_key(key: str, value: Any) -> None:
    """Read or refused in one line; no other exception."""
    try:
        LlamaConfig.from_hf(SMALL | {key: value})
    except InputError:
        refusal(SMALL | {key: value})


@settings(max_examples=400)
@given(
    kind=st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"]),
    holder=st.sampled_from(["rope_scaling", "rope_parameters"]),
    key=st.sampled_from([*RopeConfig.__dataclass_fields__, "type", "partial_rotary_factor"]),
    value=json_values,
)
def test_any_value_of_a_rope_key(kind: str, holder: str, key: str, value: Any) -> None:
    needed = {"linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "llama3": LLAMA3_ROPE}.get(kind, {})
    needed = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else needed
    raw = SMALL | {holder: {**needed, "rope_type": kind, key: value}}
    try:
        LlamaConfig.from_hf(copy(raw) if value == value else raw)
    except InputError:
        refusal(raw)


@settings(max_examples=100)
@given(value=json_values)
def test_any_rope_holder(value: Any) -> None:
    for holder in ("rope_scaling", "rope_parameters"):
        try:
            LlamaConfig.from_hf(SMALL | {holder: value})
        except InputError:
            refusal(SMALL | {holder: value})
