"""Read the architecture from a `config.json` of LLaMA or a sister model: its mathematics, and nothing else.

Keys are read from a white list (transformers' config of the family, versions 4 and 5). An unlisted key stops the load:
it might change the mathematics. Keys that are known to have no effect on the forward pass are passed over.
"""

from dataclasses import dataclass, field
from typing import Any

from llama_jax.base.errors import InputError

# HF's `hidden_act` -> the function of `jax.nn` and its keywords.
ACTIVATIONS: dict[str, tuple[str, dict[str, bool]]] = {
    "silu": ("silu", {}),
    "gelu": ("gelu", {"approximate": False}),
    "gelu_new": ("gelu", {"approximate": True}),
    "gelu_pytorch_tanh": ("gelu", {"approximate": True}),
    "relu": ("relu", {}),
}


@dataclass(frozen=True)
class Family:
    """Describe a `model_type` by its differences from LLaMA, as transformers 5.24 has them.

    `defaults` holds the keys that LLaMA's config lacks, and LLaMA's keys with other defaults. `fixed` holds the values
    that the family's code has, whatever the file holds under these keys. Keys in `idle` have no effect. `special_ids`
    are the defaults of the special tokens' keys.
    """

    architecture: str
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    special_ids: dict[str, int] = field(default_factory=lambda: {"bos_token_id": 1, "eos_token_id": 2})


_WINDOWS = ("layer_types", "max_window_layers", "sliding_window")  # no effect without use_sliding_window, a refused key
_SCALARS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")

FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        fixed={"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
        fixed={"attention_bias": True, "o_bias": False, "mlp_bias": False},
        idle=_WINDOWS,
        special_ids={},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        fixed={"mlp_bias": False, "qk_norm": True},
        idle=_WINDOWS,
        special_ids={},
    ),
    "granite": Family("GraniteForCausalLM", defaults=dict.fromkeys(_SCALARS, 1.0)),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6}
        | {"tie_word_embeddings": True, "pad_token_id": 128004, "no_rope_layers": None, "no_rope_layer_interval": 4},
        idle=_WINDOWS,
        special_ids={"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
    ),
}

# What other families would need, by a part of their `model_type`; the first match counts.
_MISSING = {
    "moe": "experts and a router",
    "mixtral": "experts and a router",
    "deepseek": "experts, a router and latent attention",
    "gpt_oss": "experts, a router and attention sinks",
    "llama4": "experts, a router and chunked attention",
    "vl": "an image encoder",
    "llava": "an image encoder",
    "mllama": "an image encoder",
    "mistral3": "an image encoder",
    "gemma": "norms that scale by 1 + weight, and scaled embeddings",
    "phi3": "fused projections of q, k and v, and of gate and up",
    "olmo": "norms over all heads of q and k, and norms after each block",
    "cohere": "LayerNorm, and attention and MLP side by side",
    "ministral": "layers with and without a window",
    "mamba": "state-space layers",
}

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# The largest values that are read. A larger number would fill the memory, or loop for hours, before any tensor's shape
# is compared with it: published models have up to 126 layers, and vocabularies of 262,144.
MOST = {
    "num_hidden_layers": 10_000,
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
}
_MOST_INT, _MOST_FLOAT = 2**40, 1e30

_KEYS = frozenset(
    """
    attention_bias head_dim hidden_act initializer_range max_position_embeddings mlp_bias num_key_value_heads
    pad_token_id rms_norm_eps tie_word_embeddings
    """.split()
).union(_REQUIRED)

# Keys without effect on the forward pass: bookkeeping, choices of a kernel, generation, leftovers of PretrainedConfig.
_WITHOUT_EFFECT = frozenset(
    """
    architectures attn_implementation auto_map bad_words_ids base_model_name_or_path begin_suppress_tokens
    bos_token bos_token_id cache_implementation chunk_size_feed_forward cls_token_id
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder is_llama_config
    keys_to_ignore_at_inference label2id length_penalty mask_token_id max_length max_new_tokens max_seq_len
    max_seq_length max_sequence_length min_length min_new_tokens min_p model_max_length model_type
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_logits output_scores pad_token prefix pretraining_tp
    problem_type remove_invalid_values renormalize_logits repetition_penalty return_dict
    return_dict_in_generate sep_token_id seq_length stop_strings suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version trust_remote_code typical_p unk_token unk_token_id
    unsloth_fixed unsloth_version use_auth_token use_bfloat16 use_cache use_flash_attention
    use_flash_attention_2 use_flash_attn xla_device
    """.split()
)

# Keys that are harmless at a single value.
_ONLY_AT: dict[str, Any] = {
    "add_cross_attention": False,
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "embd_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "qkv_bias": False,
    "resid_pdrop": 0.0,
    "rope_interleaved": False,
    "use_bias": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}

_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")

_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Hold the rotary parameters under transformers 5's names; `original_max_position_embeddings` is filled in."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    original_max_position_embeddings: int = 2048
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None


@dataclass(frozen=True)
class LlamaConfig:
    """Describe the architecture of a model with the attribute names of transformers' configs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Whether q, k and v have biases."""
    mlp_bias: bool = False
    pad_token_id: int | None = None
    """The row of the input embedding that gets no gradient: torch's `padding_idx`."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    model_type: str = "llama"
    o_bias: bool = False
    qk_norm: bool = False
    """Whether each head of q and k is normed before the rotation."""
    sliding_window: int | None = None
    """The number of keys that a query sees, its own included; None for all earlier ones."""
    rope_layers: tuple[bool, ...] = ()
    """Which layers rotate q and k; empty where all do."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    """The factor of the scores; None for 1 / sqrt(head_dim)."""
    logits_scaling: float = 1.0
    """The divisor of the logits."""

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters, padding not counted."""
        return self.num_non_embedding_parameters + self.vocab_size * self.hidden_size

    @property
    def num_non_embedding_parameters(self) -> int:
        """Return the number of parameters without the input embedding, as transformers counts for `total_flos`."""
        D, H = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * H, self.num_key_value_heads * H
        layer = 2 * D * q + 2 * D * kv + 3 * D * self.intermediate_size + 2 * D
        layer += self.attention_bias * (q + 2 * kv) + self.o_bias * D + self.qk_norm * 2 * H
        layer += self.mlp_bias * (2 * self.intermediate_size + D)
        return self.num_hidden_layers * layer + D + (0 if self.tie_word_embeddings else self.vocab_size * D)

    @staticmethod
    def from_hf(raw: dict[str, Any], source: str = "config.json") -> "LlamaConfig":
        """Read a `config.json` dict; `source` names it in messages. Raises InputError for unsupported entries."""
        family = _family(raw.get("model_type"), source)
        readable = _KEYS | family.defaults.keys()
        for key, value in raw.items():
            if key in readable or key in _WITHOUT_EFFECT or key in _ROPE_KEYS or key in family.idle:
                continue
            if value is None or key.startswith("_"):
                continue
            if key in ("quantization_config", "compression_config"):
                raise InputError(
                    f"{source}: {key} ({repr(value)[:60]}): quantized weights are not read; give the model that was "
                    "quantized, or model.dequantize() and save it by transformers; where the tensors are float32, "
                    f"bfloat16 or float16 all the same, remove {key}"
                )
            if key not in _ONLY_AT:
                raise InputError(
                    f"{source}: unknown key {key!r} ({repr(value)[:60]}) could change the mathematics; "
                    "remove it if it does not"
                )
            if value != _ONLY_AT[key]:
                fix = "; set it to 0.0 to train without dropout" if key == "attention_dropout" else ""
                raise InputError(f"{source}: {key} = {_shown(value)} is not supported, only {_ONLY_AT[key]}{fix}")
        types = raw.get("layer_types") or []
        if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
            raise InputError(
                f"{source}: layer_types should name full_attention alone; windows of layers are not supported"
            )
        # A null is no value, and not the family's default: Mistral's `sliding_window: null` is no window.
        values = {k: v for k, v in {**family.defaults, **raw}.items() if k in readable and v is not None}
        for key in _REQUIRED:
            if key not in values:
                raise InputError(f"{source}: key {key!r} is missing")
        _check_types(values, source)
        if values.get("logits_scaling") == 0:
            raise InputError(f"{source}: logits_scaling, a divisor, should be above 0")
        heads = values["num_attention_heads"]
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_dim", values["hidden_size"] // heads)
        if "head_dim" not in {**family.defaults, **raw} and values["hidden_size"] % heads:
            raise InputError(
                f"{source}: hidden_size {values['hidden_size']} is not a multiple of num_attention_heads {heads}"
            )
        if "pad_token_id" in values:
            values["pad_token_id"] = _padding_idx(values["pad_token_id"], values["vocab_size"], source)
        rope = _rope_from_hf(raw, values, source)
        values.pop("rope_theta", None)
        values |= {"rope_layers": _rope_layers(values, source), **family.fixed}
        values.setdefault("o_bias", values.get("attention_bias", False))
        config = LlamaConfig(**values, rope=rope, model_type=raw["model_type"])
        if heads % config.num_key_value_heads:
            raise InputError(
                f"{source}: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        if config.head_dim % 2:
            raise InputError(f"{source}: head_dim {config.head_dim} is odd; rotary embedding needs an even one")
        if config.hidden_act not in ACTIVATIONS:
            raise InputError(f"{source}: hidden_act {_shown(config.hidden_act)} is not one of {', '.join(ACTIVATIONS)}")
        return config


def _family(model_type: Any, source: str) -> Family:
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    needs = next((needs for part, needs in _MISSING.items() if part in str(model_type)), "")
    raise InputError(
        f"{source}: model_type is {_shown(model_type)}; this program reads {', '.join(FAMILIES)} only"
        + (f", and this family needs {needs}" if needs else "")
    )


def _check_types(values: dict[str, Any], source: str) -> None:
    for key, value in values.items():
        if key in ("pad_token_id", "rope_theta", "no_rope_layers"):  # checked where they are read
            continue
        kind: Any = int if key == "no_rope_layer_interval" else LlamaConfig.__dataclass_fields__[key].type
        most = MOST.get(key, _MOST_INT)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value > most and isinstance(value, int):
            raise InputError(f"{source}: {key} = {_shown(value)} is above {most:,}, the most that is read")
        ok, wanted = {
            int: (is_number and isinstance(value, int) and value > 0, "a positive int"),
            float: (is_number and 0 <= value <= _MOST_FLOAT, f"a number of 0 or above, at most {_MOST_FLOAT:g}"),
            bool: (isinstance(value, bool), "true or false"),
            str: (isinstance(value, str), "a string"),
        }[getattr(kind, "__args__", (kind,))[0]]  # annotations are real types in this module; of T | None, T
        if not ok:
            raise InputError(f"{source}: {key} = {_shown(value)} should be {wanted}")


def _shown(value: Any) -> str:
    """Return a value for an error line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}... ({len(text):,} characters)"


def _padding_idx(value: Any, vocab_size: int, source: str) -> int:
    """Return torch's `padding_idx` as a row; a negative number counts from the end."""
    if type(value) is not int or not -vocab_size <= value < vocab_size:
        raise InputError(f"{source}: pad_token_id {_shown(value)} is not a row of the vocabulary of {vocab_size}")
    return value % vocab_size


def _rope_layers(values: dict[str, Any], source: str) -> tuple[bool, ...]:
    """Take SmolLM3's keys out of `values` and return `LlamaConfig.rope_layers`."""
    layers, interval = values["num_hidden_layers"], values.pop("no_rope_layer_interval", None)
    default = [(i + 1) % interval != 0 for i in range(layers)] if interval else []
    rotates = values.pop("no_rope_layers", default)  # despite its name, 1 marks a layer that rotates
    if not isinstance(rotates, list) or (rotates and len(rotates) < layers) or any(x not in (0, 1) for x in rotates):
        raise InputError(f"{source}: no_rope_layers should be a list of 0 and 1, one for each of {layers} layers")
    chosen = tuple(map(bool, rotates[:layers]))
    return () if all(chosen) else chosen


def _rope_from_hf(raw: dict[str, Any], values: dict[str, Any], source: str) -> RopeConfig:
    """Read `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5) as transformers 5 reads them."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise InputError(f"{source}: rope_scaling and rope_parameters should be objects, not {_shown(given)}")
    rope = dict(given)
    old_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or old_type or "default"
    if not isinstance(rope_type, str) or rope_type not in _ROPE_FIELDS:
        raise InputError(f"{source}: rope type {_shown(rope_type)} is not one of {', '.join(_ROPE_FIELDS)}")
    thetas = rope.pop("rope_theta", None), values.get("rope_theta"), raw.get("rope_theta"), 10000.0
    theta = next(theta for theta in thetas if theta is not None)  # a 0 is refused below
    rope.pop("finetuned", None)  # of Yarn-Llama-2: records how the model was made
    if rope.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise InputError(f"{source}: partial_rotary_factor other than 1 is not supported")
    original = rope.pop("original_max_position_embeddings", None)
    maximum = values.get("max_position_embeddings", LlamaConfig.max_position_embeddings)
    original = raw.get("original_max_position_embeddings") or original or maximum
    fields = {k: v for k, v in rope.items() if v is not None}
    for key in fields:
        if key not in _ROPE_FIELDS[rope_type]:
            raise InputError(f"{source}: unknown key {key!r} in the rope parameters of type {rope_type!r}")
    for key in _ROPE_REQUIRED[rope_type]:
        if key not in fields:
            raise InputError(f"{source}: rope type {rope_type!r} needs {key!r}")
    half = values["head_dim"] // 2
    for key in ("short_factor", "long_factor"):
        if key in fields:
            if not isinstance(fields[key], list) or not all(map(_is_positive, fields[key])):
                raise InputError(f"{source}: {key} should be a list of positive numbers")
            fields[key] = tuple(float(x) for x in fields[key])
            if len(fields[key]) != half:
                raise InputError(f"{source}: {key} has {len(fields[key])} numbers, head_dim / 2 is {half}")
    if not isinstance(fields.get("truncate", True), bool):
        raise InputError(
            f"{source}: truncate {_shown(fields['truncate'])} of the rope parameters should be true or false"
        )
    numbers = {k: v for k, v in fields.items() if k not in ("short_factor", "long_factor", "truncate")}
    for key, value in {"rope_theta": theta, "original_max_position_embeddings": original, **numbers}.items():
        if not _is_positive(value):
            raise InputError(
                f"{source}: {key} {_shown(value)} of the rope parameters should be a positive number, at most "
                f"{_MOST_FLOAT:g}"
            )
    if rope_type == "dynamic" and values["head_dim"] <= 2:
        raise InputError(f"{source}: rope type 'dynamic' needs a head_dim over 2")
    if rope_type in ("yarn", "longrope"):
        fields.setdefault("factor", maximum / original)
    return RopeConfig(rope_type, float(theta), int(original), **fields)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST_FLOAT
