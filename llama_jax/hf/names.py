"""The one table between HF's tensor names and the model's parameters; its inverse is derived."""

import re

from llama_jax.model.config import LlamaConfig

Path = tuple[str | int, ...]

# Buffers that old checkpoints carry and that are computed here.
IGNORED = re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def name_table(config: LlamaConfig) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """HF name -> (path in the unstacked parameter tree, HF shape), in the order of the model."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    Q, KV = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    table: dict[str, tuple[Path, tuple[int, ...]]] = {"model.embed_tokens.weight": (("embed_tokens", "weight"), (V, D))}
    projections: dict[str, tuple[int, int, bool]] = {
        "self_attn.q_proj": (Q, D, config.attention_bias),
        "self_attn.k_proj": (KV, D, config.attention_bias),
        "self_attn.v_proj": (KV, D, config.attention_bias),
        "self_attn.o_proj": (D, Q, config.attention_bias),
        "mlp.gate_proj": (F, D, config.mlp_bias),
        "mlp.up_proj": (F, D, config.mlp_bias),
        "mlp.down_proj": (D, F, config.mlp_bias),
    }
    for i in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table[f"model.layers.{i}.{norm}.weight"] = (("layers", i, norm, "weight"), (D,))
        for name, (out, in_, bias) in projections.items():
            path: Path = ("layers", i, *name.split("."))
            table[f"model.layers.{i}.{name}.weight"] = ((*path, "weight"), (out, in_))
            if bias:
                table[f"model.layers.{i}.{name}.bias"] = ((*path, "bias"), (out,))
    table["model.norm.weight"] = (("norm", "weight"), (D,))
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = (("lm_head", "weight"), (V, D))
    return table
