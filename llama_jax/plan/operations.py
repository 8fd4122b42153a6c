"""Count the floating-point operations of an update."""

import math

from llama_jax.hf.names import projection_shapes
from llama_jax.model.config import LlamaConfig
from llama_jax.model.lora import PROJECTIONS, Lora
from llama_jax.model.remat import REMAT, Remat

STAGES = dict(zip(PROJECTIONS, (0, 0, 0, 1, 2, 2, 3), strict=True))  # the order of a layer's projections


def operations(
    config: LlamaConfig, tokens: int, row: float, remat: str, lora: Lora | None = None
) -> tuple[float, float]:
    """Return the floating-point operations of an update, without and with recomputation.

    Each weight of a matmul counts six a token: forward, gradient of the input and of the weight. Causal attention
    counts 12 times the heads' width and the mean number of a row's visible keys (half of the row without a window), in
    each layer; a kernel may skip more, where segments end. `lora` freezes the model, as `_adapted` counts it.
    """
    shapes, L = projection_shapes(config), config.num_hidden_layers
    attention = _attention(config, row)
    forward = L * (attention + 2.0 * sum(out * in_ for out, in_ in shapes.values()))
    backward, head = 2 * forward, 6.0
    if lora is not None:
        forward, backward = _adapted(lora, shapes, layers=L, forward=forward, attention=attention)
        head_is_trained = "lm_head" in lora.saved or (config.tie_word_embeddings and "embed_tokens" in lora.saved)
        head = 6.0 if head_is_trained else 4.0
    model = forward + backward + head * config.vocab_size * config.hidden_size
    return tokens * model, tokens * (model + L * _again(REMAT[remat], shapes, attention))


def kernel_operations(config: LlamaConfig, tokens: int, row: float, remat: str) -> float:
    """Return the operations of an attention kernel in an update: two products forward, and again where `remat` keeps no
    output; seven backward, as both of its kernels compute scores and their gradient anew. All layers count, also those
    below the first adapter."""
    one = config.num_hidden_layers * _attention(config, row) / 2
    kept = REMAT[remat].kept
    return tokens * one * (2 + 7 + 2 * (kept is not None and "attention" not in kept))


def _attention(config: LlamaConfig, row: float) -> float:
    """Return a token's operations in the two products of causal attention in a layer."""
    window = min(config.sliding_window or row, row)
    return 4.0 * config.num_attention_heads * config.head_dim * (window - window**2 / row / 2)


def _again(remat: Remat, shapes: dict[str, tuple[int, int]], attention: float) -> float:
    """Return a token's operations in the backward pass of a layer that the forward pass has made already.

    No gradient needs the layer's own output, so down_proj is not computed again. Adapters do not count, nor the
    products that DoRA's magnitudes need again.
    """
    if remat.kept is None:
        return 0.0
    lost = [out * in_ for name, (out, in_) in shapes.items() if not remat.keeps(name.split(".")[-1])]
    down_proj = shapes["mlp.down_proj"]
    return 2.0 * (sum(lost) - math.prod(down_proj)) + attention * ("attention" not in remat.kept)


def _adapted(
    lora: Lora, shapes: dict[str, tuple[int, int]], *, layers: int, forward: float, attention: float
) -> tuple[float, float]:
    """Return a token's operations in the layers, forward and backward.

    `forward` is the frozen model's, `attention` a layer's. A frozen weight counts four, forward and gradient of the
    input; a weight of an adapter six. Before the first adapter, and beside it, no projection needs the gradient of its
    input. Stacked layers compute these all the same. DoRA multiplies a dropped input by the weight once more; its norms
    do not count.
    """
    backward = 0.0
    first = (0, -1) if "embed_tokens" in lora.saved else min((layer, STAGES[name]) for (layer, name), _ in lora.ranks)
    for layer in range(first[0], layers):
        backward += 2 * attention * ((layer, 0) >= first)
        for name, (out, in_) in shapes.items():
            rank = lora.of(layer, name)
            r = rank.r if rank else 0
            later = (layer, STAGES[name]) > first
            again = bool(r and lora.use_dora and lora.dropout)
            forward += 2.0 * r * (out + in_) + 2.0 * again * out * in_
            backward += 2.0 * r * (2 * out + (1 + later) * in_) + 2.0 * later * (1 + again) * out * in_
    return forward, backward
