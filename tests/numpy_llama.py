"""LLaMA's forward pass in float64 NumPy, written from the papers and from nothing else: a third opinion.

RMSNorm: arXiv 1910.07467. Rotary embedding: 2104.09864, as rotations of the plane spanned by dimensions i and i + H/2
(the order of HF's checkpoints), in complex numbers. Grouped-query attention: 2305.13245. SwiGLU: 2002.05202. The bands
of Llama 3.1's rotary frequencies: section 3.2 of 2309.00071 ("NTK-by-parts"), its ramp over rotations per context.

Letters: T tokens, D model, N heads, K kv heads, H head dim, F ffn, V vocab.
"""

import numpy as np

Weights = dict[str, np.ndarray]


def llama_logits(weights: Weights, config: dict, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence of token ids [T]; `config` is a `config.json` with llama3 rope, no biases."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["model.embed_tokens.weight"][ids]
    rotation = np.exp(1j * np.outer(np.arange(len(ids)), llama3_frequencies(config)))  # [T, H/2]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        x = x + attention(own, config, rms_norm(x, own["input_layernorm.weight"], config), rotation)
        x = x + swiglu(own, rms_norm(x, own["post_attention_layernorm.weight"], config))
    return rms_norm(x, w["model.norm.weight"], config) @ w["lm_head.weight"].T


def rms_norm(x: np.ndarray, gain: np.ndarray, config: dict) -> np.ndarray:
    return gain * x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + config["rms_norm_eps"])


def swiglu(w: Weights, x: np.ndarray) -> np.ndarray:
    gate = x @ w["mlp.gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def attention(w: Weights, config: dict, x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    H, N, K = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    heads = []
    for n in range(N):
        k = n // (N // K)  # the kv head that this head shares
        query = rotate(x @ w["self_attn.q_proj.weight"][n * H : (n + 1) * H].T, rotation)
        key = rotate(x @ w["self_attn.k_proj.weight"][k * H : (k + 1) * H].T, rotation)
        value = x @ w["self_attn.v_proj.weight"][k * H : (k + 1) * H].T
        out = np.empty_like(query)
        for t in range(len(x)):
            score = key[: t + 1] @ query[t] / np.sqrt(H)
            chance = np.exp(score - score.max())
            out[t] = chance / chance.sum() @ value[: t + 1]
        heads.append(out)
    return np.concatenate(heads, axis=-1) @ w["self_attn.o_proj.weight"].T


def rotate(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * rotation
    return np.concatenate([turned.real, turned.imag], axis=-1)


def llama3_frequencies(config: dict) -> np.ndarray:
    """Angles per position [H/2]: unchanged for fast pairs, divided by `factor` for slow ones, a ramp in between."""
    scaling = config["rope_scaling"]
    frequency = config["rope_theta"] ** (-2.0 * np.arange(config["head_dim"] // 2) / config["head_dim"])
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)  # rotations in the old context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / scaling["factor"])
