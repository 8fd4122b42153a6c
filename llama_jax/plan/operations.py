"""Count the floating-point operations of an update."""

from llama_jax.hf.names import projection_shapes
from llama_jax.model.config import LlamaConfig
from llama_jax.model.lora import PROJECTIONS, Lora
from llama_jax.model.remat import REMAT

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
    window = min(config.sliding_window or row, row)
    attention = 4.0 * config.num_attention_heads * config.head_dim * (window - window**2 / row / 2)
    forward = L * (attention + 2.0 * sum(out * in_ for out, in_ in shapes.values()))
    backward, head = 2 * forward, 6.0
    if lora is not None:
        forward, backward = _adapted(lora, shapes, layers=L, forward=forward, attention=attention)
        head_is_trained = "lm_head" in lora.saved or (config.tie_word_embeddings and "embed_tokens" in lora.saved)
        head = 6.0 if head_is_trained else 4.0
    model = forward + backward + head * config.vocab_size * config.hidden_size
    return tokens * model, tokens * (model + REMAT[remat].again * forward)


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
