"""Map HF's tensor names to the model's parameters in one table; the inverse is derived from this table."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.base.errors import InputError
from llama_jax.model.config import LlamaConfig
from llama_jax.model.lora import PROJECTIONS
from llama_jax.model.roles import Params, is_stacked

Path = tuple[str | int, ...]

# Buffers that some checkpoints hold, under these last names; the model computes their values, as transformers does.
IGNORED = re.compile(r"(.+\.)?((original_)?inv_freq|(cos|sin)_cached|freqs_cis|rope\.freqs|causal_mask|position_ids)")


def name_table(config: LlamaConfig) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Return {HF name: (path in the unstacked parameter tree, HF shape)}, in the order of the model."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    Q, KV = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    table: dict[str, tuple[Path, tuple[int, ...]]] = {"model.embed_tokens.weight": (("embed_tokens", "weight"), (V, D))}
    projections: dict[str, tuple[int, int, bool]] = {
        "self_attn.q_proj": (Q, D, config.attention_bias),
        "self_attn.k_proj": (KV, D, config.attention_bias),
        "self_attn.v_proj": (KV, D, config.attention_bias),
        "self_attn.o_proj": (D, Q, config.o_bias),
        "mlp.gate_proj": (F, D, config.mlp_bias),
        "mlp.up_proj": (F, D, config.mlp_bias),
        "mlp.down_proj": (D, F, config.mlp_bias),
    }
    norms = {"input_layernorm": D, "post_attention_layernorm": D}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    for i in range(config.num_hidden_layers):
        for norm, size in norms.items():
            table[f"model.layers.{i}.{norm}.weight"] = (("layers", i, *norm.split("."), "weight"), (size,))
        for name, (out, in_, bias) in projections.items():
            path: Path = ("layers", i, *name.split("."))
            table[f"model.layers.{i}.{name}.weight"] = ((*path, "weight"), (out, in_))
            if bias:
                table[f"model.layers.{i}.{name}.bias"] = ((*path, "bias"), (out,))
    table["model.norm.weight"] = (("norm", "weight"), (D,))
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = (("lm_head", "weight"), (V, D))
    return table


def module_names(config: LlamaConfig) -> list[str]:
    """Return the names of all modules of transformers' model, in its order."""
    attention = ["self_attn", *PROJECTIONS[:4], *(f"self_attn.{n}_norm" for n in ("qk" if config.qk_norm else ""))]
    layer = [*attention, "mlp", *PROJECTIONS[4:], "mlp.act_fn", "input_layernorm", "post_attention_layernorm"]
    layers = [
        f"model.layers.{i}{end}" for i in range(config.num_hidden_layers) for end in ("", *(f".{n}" for n in layer))
    ]
    return ["model", "model.embed_tokens", "model.layers", *layers, "model.norm", "model.rotary_emb", "lm_head"]


def projection_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return {projection: (outputs, inputs)} of a layer, by the names of `model.lora.PROJECTIONS`."""
    table, result = name_table(config), {}
    for name in PROJECTIONS:
        outputs, inputs = table[f"model.layers.0.{name}.weight"][1]
        result[name] = (outputs, inputs)
    return result


def check_names(params: Params, config: LlamaConfig) -> None:
    """Raise InputError for parameters that the table has no name for: an export would lose them."""
    stacked = is_stacked(params)
    known = {without_layer(path) if stacked else path for path, _ in name_table(config).values()}
    nameless = sorted(".".join(map(str, path)) for path in _paths(params) if path not in known)
    if nameless:
        shown = ", ".join(nameless[:4]) + (f" and {len(nameless) - 4} more" if len(nameless) > 4 else "")
        raise InputError(
            f"{len(nameless)} parameter(s) of the model have no name in an HF folder, so no export can hold them: "
            f"{shown}; add them to llama_jax/hf/names.py"
        )


def without_layer(path: Path) -> Path:
    """Return the path of a parameter in the tree of stacked layers."""
    return (path[0], *path[2:]) if path[0] == "layers" else path


def _paths(tree: Mapping[Any, Any], above: Path = ()) -> Iterator[Path]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, key))
        else:
            yield (*above, key)
