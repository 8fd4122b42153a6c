"""`config.json`: what published models say is read as transformers reads it, and nothing unknown passes."""

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers import LlamaConfig as HFLlamaConfig

from llama_jax.base.errors import InputError
from llama_jax.model.config import FAMILIES, LlamaConfig, RopeConfig

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
PUBLISHED: dict[str, dict[str, Any]] = {
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


def assert_same_reading(ours: LlamaConfig, hf: Any) -> None:
    """LLaMA's config has no keys for what its sisters have beside it."""
    H = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    fixed = {"mistral": (False, False, False), "qwen2": (True, False, False)}
    biases = fixed.get(hf.model_type) or (hf.attention_bias, hf.attention_bias, getattr(hf, "mlp_bias", False))
    other = {"head_dim": H, "attention_bias": biases[0], "o_bias": biases[1], "mlp_bias": biases[2]}
    other |= {"qk_norm": hf.model_type == "qwen3", "rope_layers": ()}
    if not all(rotates := getattr(hf, "no_rope_layers", [])):
        other["rope_layers"] = tuple(map(bool, rotates[: hf.num_hidden_layers]))
    if hf.model_type != "mistral":
        other["sliding_window"] = None
    if hf.model_type != "granite":
        other |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
        other["attention_multiplier"] = None
    for name in LlamaConfig.__dataclass_fields__.keys() - {"rope", "pad_token_id"}:
        expected = other[name] if name in other else getattr(hf, name)
        assert getattr(ours, name) == expected, name
    # As torch's Embedding reads it: a negative padding_idx counts from the end.
    assert ours.pad_token_id == torch.nn.Embedding(hf.vocab_size, 1, hf.pad_token_id).padding_idx
    parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in hf.rope_parameters.items() if k != "type"}
    for key, value in parameters.items():
        assert getattr(ours.rope, key) == value, key
    for key in ours.rope.__dataclass_fields__.keys() - parameters.keys() - {"original_max_position_embeddings"}:
        assert getattr(ours.rope, key) == ours.rope.__dataclass_fields__[key].default, key


@pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_configs(raw: dict[str, Any]) -> None:
    """The file, and what transformers 5 makes of it when it saves the model again, are read as transformers does."""
    hf = HFLlamaConfig(**{k: v for k, v in copy(raw).items() if k != "model_type" and v is not None})
    assert_same_reading(LlamaConfig.from_hf(copy(raw)), hf)
    assert_same_reading(LlamaConfig.from_hf(copy(hf.to_dict())), hf)
    assert_same_reading(LlamaConfig.from_hf(copy(hf.to_diff_dict())), hf)  # what save_pretrained writes


# The published files of the sister models, without the keys that LLaMA's test covers. Granite's has a dropout of 0.1.
SISTERS: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": _8B
    | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 4096}
    | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "vocab_size": 32000},
    "Mistral-7B-Instruct-v0.3": _8B
    | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": None}
    | {"attention_dropout": 0.0, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0}
    | {"vocab_size": 32768},
    "Mistral-Nemo-Base-2407": _8B
    | {"model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "rope_theta": 1e6}
    | {"num_hidden_layers": 40, "num_key_value_heads": 8, "sliding_window": None, "vocab_size": 131072},
    "Qwen2.5-0.5B-Instruct": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864}
    | {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0}
    | {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "attention_dropout": 0.0}
    | {"max_position_embeddings": 32768, "tie_word_embeddings": True, "vocab_size": 151936, "rms_norm_eps": 1e-06},
    "Qwen3-0.6B": {"model_type": "qwen3", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072}
    | {"attention_bias": False, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16}
    | {"num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000}
    | {"sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936},
    "granite-3.1-2b-instruct": {"model_type": "granite", "attention_bias": False, "attention_dropout": 0.0}
    | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
    | {"residual_multiplier": 0.22, "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": False}
    | {"max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8}
    | {"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": True}
    | {"vocab_size": 49155, "pad_token_id": 0},
    "SmolLM3-3B": {"model_type": "smollm3", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}
    | {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 36}
    | {"layer_types": ["full_attention"] * 36, "no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4}
    | {"max_position_embeddings": 65536, "max_window_layers": 28, "num_key_value_heads": 4, "rope_theta": 5000000.0}
    | {"pretraining_tp": 2, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256}
    | {"pad_token_id": 128004},
}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a family's config class fills in itself; 32 heads, as many as Qwen's kv heads.
for _name in ("mistral", "qwen2", "qwen3", "granite", "smollm3"):
    SISTERS[f"{_name}, defaults"] = {"model_type": _name, **dict.fromkeys(_NEEDED, 256)}
    SISTERS[f"{_name}, defaults"] |= {"vocab_size": 128256, "num_attention_heads": 32}


@pytest.mark.parametrize("raw", SISTERS.values(), ids=SISTERS.keys())
def test_sister_models(raw: dict[str, Any]) -> None:
    """As `test_published_configs`, defaults included."""
    hf = AutoConfig.for_model(**copy(raw))
    assert_same_reading(LlamaConfig.from_hf(copy(raw)), hf)
    assert_same_reading(LlamaConfig.from_hf(copy(hf.to_dict())), hf)
    assert_same_reading(LlamaConfig.from_hf(copy({**hf.to_diff_dict(), **{k: raw[k] for k in _NEEDED}})), hf)


@pytest.mark.parametrize(
    ("model_type", "change", "named"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("mistral", {"logits_scaling": 2.0}, "logits_scaling"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": 2}, "layer_types"),
        ("granite", {"attention_dropout": 0.1}, "set it to 0.0"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        ("granite", {"attention_multiplier": "0.1"}, "attention_multiplier"),
        ("granite", {"sliding_window": 4096}, "sliding_window"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window"),
        ("smollm3", {"pad_token_id": 100}, "pad_token_id"),
    ],
)
def test_wrong_values_of_sisters(model_type: str, change: dict[str, Any], named: str) -> None:
    raw = SMALL | {"model_type": model_type, "num_key_value_heads": 4, "pad_token_id": None}
    LlamaConfig.from_hf(raw)
    assert named in refusal(raw | change)


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
KNOWN = {*SMALL, *HFLlamaConfig().to_dict(), *(k for raw in PUBLISHED.values() for k in raw)}


@settings(max_examples=120)
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
        ({"model_type": "gemma2"}, "norms that scale by 1 + weight"),
        ({"model_type": "mixtral"}, "needs experts and a router"),
        ({"model_type": "qwen3_moe"}, "needs experts and a router"),
        ({"model_type": "qwen2_5_vl"}, "needs an image encoder"),
        ({"model_type": "phi3"}, "fused projections"),
        ({"model_type": "rwkv"}, "'rwkv'; this program reads llama, mistral, qwen2, qwen3, granite, smollm3 only"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
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
        ({"quantization_config": {"quant_method": "gptq"}}, "give the model that was quantized"),
        ({"use_bias": True}, "use_bias"),
        ({"draft_vocab_size": 32000}, "draft_vocab_size"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_theta": 0}, "rope_theta 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta 0"),
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


def test_keys_without_mathematics() -> None:
    """Of the tools that save models, and all that LlamaConfig of transformers 5 writes."""
    config = pytest.importorskip("transformers").LlamaConfig
    tools = {"attn_implementation": "flash_attention_2", "_attn_implementation": "sdpa", "use_flash_attention_2": True,
             "unsloth_fixed": True, "model_max_length": 4096, "gradient_checkpointing": True, "hidden_dropout": 0.0,
             "pad_token": "[PAD]", "min_p": 0.1, "use_bias": False}  # fmt: skip
    written = config(**{k: v for k, v in SMALL.items() if k != "model_type"}).to_dict()
    assert LlamaConfig.from_hf(SMALL | tools) == LlamaConfig.from_hf(SMALL)
    assert LlamaConfig.from_hf(written) == LlamaConfig.from_hf(SMALL)


@settings(max_examples=150)
@given(
    model_type=st.sampled_from(sorted(FAMILIES)),
    key=st.sampled_from(sorted(LlamaConfig.__dataclass_fields__.keys() - {"rope"}))
    | st.sampled_from(["rope_theta", "no_rope_layers", "no_rope_layer_interval", "layer_types", "max_window_layers"]),
    value=json_values,
)
def test_any_value_of_a_known_key(model_type: str, key: str, value: Any) -> None:
    """Read or refused in one line; no other exception."""
    raw = SMALL | {"model_type": model_type, "num_key_value_heads": 4, "pad_token_id": None, key: value}
    try:
        LlamaConfig.from_hf(raw)
    except InputError:
        refusal(raw)


@settings(max_examples=150)
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
