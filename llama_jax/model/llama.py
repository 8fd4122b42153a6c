"""Define the LLaMA decoder, and its sisters by `config.FAMILIES`, in Flax NNX: HF's names, torch's [out, in] weights.

NNX defines, JAX transforms: `split` gives a graph definition and a pure dict of arrays; everything else is `jax.jit`.

Letters: B rows, T query, S key, D model, N heads, K kv heads, H head dim, F ffn, V vocab, L layers. N, K, F and V are
padded so that the mesh divides them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.distributed.digest import mixed
from llama_jax.distributed.sharding import placed
from llama_jax.model.attention import XLA, Kernel, Scores, cached_attention, keeps_kernel, packed_attention
from llama_jax.model.cache import KVCache
from llama_jax.model.config import ACTIVATIONS, LlamaConfig
from llama_jax.model.lora import PROJECTIONS, Adapter, Lora
from llama_jax.model.matmul import SCATTER, Scaled, Sum, project, project_apart, project_fp8, project_scaled, written
from llama_jax.model.quantized import Quantization, dequantize, empty, is_quantized, quantized_matmul
from llama_jax.model.remat import REMAT
from llama_jax.model.roles import Bias, EmbeddingTable, MatmulWeight, NormWeight, Params, ProjectionWeight
from llama_jax.model.rope import apply_rope, rope_cos_sin

ACT2FN: dict[str, Callable[[jax.Array], jax.Array]] = {
    name: partial(getattr(jax.nn, function), **keywords) for name, (function, keywords) in ACTIVATIONS.items()
}


@dataclass(frozen=True)
class RunOptions:
    """Hold the properties of a run, never of a checkpoint.

    `compute_dtype` is the type of matmuls, None for the parameters' own; `rope_dtype` the type of the rotation, None
    for the residual stream's (float32 under `--bf16`, as transformers 5; transformers 4.37 rotates in `compute_dtype`).
    `fp8` multiplies with the projections' weights in fp8; the head stays in the compute type. `scan_layers` stacks the
    layers on a leading axis under `lax.scan`. `remat` is a key of `remat.REMAT`. `sums` selects how devices add
    their gradient shares (`matmul.weight_gradient`). `attention` is the kernel for packed rows and for prompts.
    `longest` bounds the `lengths` of tokens where a block is shorter: a micro-batch may span several blocks. `lora`
    holds the adapters, and `quantization` the format of the projections below them, None for plain weights.
    `compiler_options` are XLA's, name and value, over those of `platform.compiler_options`.
    """

    param_dtype: Any = jnp.float32
    compute_dtype: Any = None
    rope_dtype: Any = None
    fp8: bool = False
    scan_layers: bool = False
    remat: str = "none"
    sums: Sum = SCATTER
    attention: Kernel = XLA
    longest: int = 0
    lora: Lora | None = None
    quantization: Quantization | None = None
    compiler_options: tuple[tuple[str, str | bool], ...] = ()

    @property
    def projection_dtype(self) -> Any:
        """Return the type in which a projection's weight is kept. Where adapters freeze it, it is rounded once, when it
        is read, and not in each product."""
        whole = self.lora is None or self.lora.use_dora  # DoRA takes norms of the weights
        return (None if whole else self.compute_dtype) or self.param_dtype


class Tokens(NamedTuple):
    """Hold the inputs of attention for a block of tokens, besides their values."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    key: Any = None

    def of_layer(self, number: Any, rotates: Any) -> "Tokens":
        """Return the inputs of a layer: angles of 0 where `rotates`, a boolean or None for true, is false.

        The `key`, a uint32, draws the adapters' dropout; None draws none.
        """
        key = None if self.key is None else mixed(self.key + jnp.uint32(number))
        if rotates is None:
            return self._replace(key=key)
        return self._replace(cos=jnp.where(rotates, self.cos, 1), sin=jnp.where(rotates, self.sin, 0), key=key)


def _draw(shape: tuple[int, int], spec: P, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> Float[Array, "O I"]:
    """Draw a matrix as transformers initializes it, placed by `spec`."""
    normal = jax.nn.initializers.normal(config.initializer_range)
    return normal(rngs.params(), shape, dtype, out_sharding=placed(spec))


class Linear(nnx.Module):
    """Compute x @ weight.T + bias in the compute type, and add an adapter's part. `layer` and `name` are its place."""

    def __init__(
        self,
        name: str,
        out_in: tuple[int, int],
        spec: P,
        bias: bool,
        config: LlamaConfig,
        run: RunOptions,
        layer: int,
        rngs,
    ):
        if run.quantization is None:
            self.weight = ProjectionWeight(_draw(out_in, spec, config, run.projection_dtype, rngs))
        else:
            self.weight = ProjectionWeight(empty(run.quantization, out_in, spec, name))
        row = spec == sharding.ROW_DF
        bias_spec = sharding.REPLICATED if row else sharding.COLUMN_BIAS
        zeros = jnp.zeros(out_in[:1], run.param_dtype, out_sharding=placed(bias_spec)) if bias else None
        self.bias = None if zeros is None else Bias(zeros)
        self.dtype = run.compute_dtype or run.param_dtype
        self.out = sharding.ACT_BTD if row else sharding.ACT_BTF
        self.sums, self.fp8, self.recomputed = run.sums, run.fp8, run.remat != "none"
        rank = run.lora.of(layer, name) if run.lora else None
        kind, number = run.compute_dtype or jnp.float32, PROJECTIONS.index(name)
        self.adapter = Adapter(out_in, row, rank, run.lora, kind, number) if run.lora and rank else None

    def __call__(self, x: Float[Array, "B T I"], key: Any = None) -> Float[Array, "B T O"]:
        """Return the output for `x`. `key` draws the adapter's dropout."""
        return project_all([self], x, key)[0]

    def product(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Return x @ weight.T in the compute type."""
        return _products([self], x)[0]

    def matrix(self) -> Float[Array, "O I"]:
        """Return the weight in the compute type."""
        weight = self.weight.get_value()
        if isinstance(weight, Scaled):
            return weight.values.astype(self.dtype) * weight.unit.astype(self.dtype)
        return dequantize(weight, self.dtype) if is_quantized(weight) else weight.astype(self.dtype)


def project_all(linears: Sequence[Linear], x: Float[Array, "B T I"], key: Any) -> list[Float[Array, "B T O"]]:
    """Return the output of each projection of `x`. `key` draws the adapters' dropout.

    Adapters without dropout share one product with `x`: thin products are bound by the reading of `x`.
    """
    outputs = _products(linears, x)
    lows: list[Any] = [None] * len(linears)
    matrices = [linear.adapter.lora_A.weight[...].astype(linear.dtype) for linear in linears if linear.adapter]
    if key is None and len(matrices) == len(linears):
        low = project(sharding.ACT_BTD, SCATTER, x.astype(linears[0].dtype), jnp.concatenate(matrices))
        lows = jnp.split(low, np.cumsum([len(matrix) for matrix in matrices[:-1]]), axis=-1)
    for i, (linear, base, low) in enumerate(zip(linears, outputs, lows, strict=True)):
        if linear.bias is not None:
            outputs[i] = base + linear.bias[...].astype(linear.dtype)
        if linear.adapter is not None:
            outputs[i] = (outputs[i] + linear.adapter(x, base, linear, key, low)).astype(base.dtype)
    return outputs


def _products(linears: Sequence[Linear], x: Float[Array, "B T I"]) -> list[Float[Array, "B T O"]]:
    """Return x @ weight.T of each projection, of one kind all, in the compute type."""
    one, weights = linears[0], [linear.weight.get_value() for linear in linears]
    if is_quantized(weights[0]):
        return [quantized_matmul(x, weight, one.dtype, one.out) for weight in weights]
    x = x.astype(one.dtype)
    if isinstance(weights[0], Scaled) and one.fp8:
        return [project_scaled(one.out, x, weight) for weight in weights]
    weights = [linear.matrix() for linear in linears]
    if one.fp8:
        return project_fp8(one.out, one.sums, x, weights)
    if one.recomputed:
        return project_apart(one.out, one.sums, x, weights)
    return [project(one.out, one.sums, x, weight) for weight in weights]


class RMSNorm(nnx.Module):
    """Compute weight * x / sqrt(mean(x^2) + eps) in float32, rounded to x's type before the weight."""

    def __init__(self, size: int, config: LlamaConfig, run: RunOptions):
        ones = jnp.ones(size, run.param_dtype, out_sharding=placed(sharding.REPLICATED))
        self.weight = NormWeight(ones)
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * (x32 * scale).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, run: RunOptions, layer: int, rngs):
        D, H = config.hidden_size, config.head_dim
        kv_dim = sharding.padded(config.num_key_value_heads, "tensor") * H
        q_dim = kv_dim * (config.num_attention_heads // config.num_key_value_heads)
        linear = partial(Linear, config=config, run=run, layer=layer, rngs=rngs)
        self.q_proj = linear("self_attn.q_proj", (q_dim, D), sharding.column(q_dim), config.attention_bias)
        self.k_proj = linear("self_attn.k_proj", (kv_dim, D), sharding.column(kv_dim), config.attention_bias)
        self.v_proj = linear("self_attn.v_proj", (kv_dim, D), sharding.column(kv_dim), config.attention_bias)
        self.o_proj = linear("self_attn.o_proj", (D, q_dim), sharding.ROW_DF, config.o_bias)
        self.q_norm, self.k_norm = (RMSNorm(H, config, run) if config.qk_norm else None for _ in "qk")
        self.head_dim, self.scores = H, Scores(config.attention_multiplier, config.sliding_window)
        self.rope_dtype, self.kernel = run.rope_dtype, run.attention

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens, cache: KVCache | None):
        """Return the block's output [B, T, D] and the cache with this block's keys and values written."""

        def heads(y: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
            shape = (*y.shape[:2], y.shape[2] // self.head_dim, self.head_dim)
            return jnp.reshape(y, shape, out_sharding=placed(sharding.ACT_BTNH))

        q, k, v = map(heads, project_all((self.q_proj, self.k_proj, self.v_proj), x, tokens.key))
        names = ("q", "k", "v")
        if self.q_norm is not None and self.k_norm is not None:
            # The gradient of a norm needs its input: that is kept, and norm and rotation are recomputed.
            q, k = self.q_norm(checkpoint_name(q, "q")), self.k_norm(checkpoint_name(k, "k"))
            names = ("rotated q", "rotated k", "v")
        dtype = self.rope_dtype or x.dtype
        cos, sin = tokens.cos.astype(dtype), tokens.sin.astype(dtype)
        q, k = apply_rope(q, cos, sin).astype(v.dtype), apply_rope(k, cos, sin).astype(v.dtype)
        if cache is not None:
            cache = cache.write(k, v, tokens.positions)
        if cache is None or x.shape[1] > 1:
            out = packed_attention(
                self.kernel, q, k, v, tokens.segment_ids, tokens.positions, scores=self.scores, names=names
            )
        else:
            kernel = self.kernel if cache.layer is None else XLA  # only XLA's products read a layer out of a stack
            out = cached_attention(kernel, q, *cache.of_layer(), tokens.positions, self.scores)
        out = jnp.reshape(out, (*out.shape[:2], -1), out_sharding=placed(sharding.ACT_BTF))
        return checkpoint_name(self.o_proj(out, tokens.key), "o_proj"), cache


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, run: RunOptions, layer: int, rngs):
        D, F = config.hidden_size, sharding.padded(config.intermediate_size, "tensor")
        linear = partial(Linear, bias=config.mlp_bias, config=config, run=run, layer=layer, rngs=rngs)
        self.gate_proj = linear("mlp.gate_proj", (F, D), sharding.column(F))
        self.up_proj = linear("mlp.up_proj", (F, D), sharding.column(F))
        self.down_proj = linear("mlp.down_proj", (D, F), sharding.ROW_DF)
        self.act_fn = ACT2FN[config.hidden_act]

    def __call__(self, x: Float[Array, "B T D"], key: Any = None) -> Float[Array, "B T D"]:
        gate, up = project_all((self.gate_proj, self.up_proj), x, key)
        if self.gate_proj.adapter or self.up_proj.adapter:
            # Otherwise XLA adds the adapters' parts inside the activation's kernel, and keeps all four parts.
            gate, up = written("cuda", gate), written("cuda", up)
        gate, up = checkpoint_name(gate, "gate_proj"), checkpoint_name(up, "up_proj")
        return self.down_proj(self.act_fn(gate) * up, key)


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, run: RunOptions, layer: int, rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config, run)
        self.self_attn = Attention(config, run, layer, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, run)
        self.mlp = MLP(config, run, layer, rngs)
        self.factor = config.residual_multiplier

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens, cache: KVCache | None):
        attended, cache = self.self_attn(self.input_layernorm(x), tokens, cache)
        x = x + _times(attended, self.factor)
        return x + _times(self.mlp(self.post_attention_layernorm(x), tokens.key), self.factor), cache


def _times(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * factor


class Embedding(nnx.Module):
    def __init__(self, config: LlamaConfig, run: RunOptions, rngs):
        shape = (sharding.vocab_rows(config.vocab_size), config.hidden_size)
        self.weight = EmbeddingTable(_draw(shape, sharding.EMBED_VD, config, run.param_dtype, rngs))
        self.padding_idx = config.pad_token_id

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.weight[...].at[input_ids].get(out_sharding=placed(sharding.ACT_BTD))
        if self.padding_idx is None:
            return x
        return jnp.where((input_ids == self.padding_idx)[..., None], jax.lax.stop_gradient(x), x)


class Head(nnx.Module):
    def __init__(self, config: LlamaConfig, run: RunOptions, rngs):
        rows = sharding.vocab_rows(config.vocab_size)
        spec = sharding.column(rows)
        self.weight = MatmulWeight(_draw((rows, config.hidden_size), spec, config, run.param_dtype, rngs))


class Llama(nnx.Module):
    """Map token ids to final hidden states, as `LlamaForCausalLM`; `head` returns the weights of the logits."""

    def __init__(self, config: LlamaConfig, run: RunOptions = RunOptions(), *, rngs: nnx.Rngs):
        sharding.check_width(config.hidden_size)
        if run.quantization:
            _check_unpadded(config)
        self.config, self.run = config, run
        self.embed_tokens = Embedding(config, run, rngs)
        blocks = [Block(config, run, layer, rngs) for layer in range(config.num_hidden_layers)]
        self.layers: Any = _stack(blocks) if run.scan_layers else nnx.List(blocks)
        self.norm = RMSNorm(config.hidden_size, config, run)
        self.lm_head = None if config.tie_word_embeddings else Head(config, run, rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        lengths: Int[Array, "B T"] | None = None,
        cache: Any = None,
        states: list[jax.Array] | None = None,
        key: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Return the final hidden states (normed) and the cache.

        Tokens of one row attend to earlier positions of the same segment id only. `lengths` is the sequence length that
        `dynamic` and `longrope` scale by; the default is transformers' rule, the largest position of the batch plus
        one. With `cache` (of `make_cache`) the block is written at its positions. A block of one token a row attends to
        the cache; a longer block holds its rows' beginning and attends to itself.
        `states` receives the input of each layer; stacked layers do not support it. `key` draws the adapters' dropout.
        """
        x = self.embed(input_ids)
        slots = input_ids.shape[1] if cache is None else jax.tree.leaves(cache)[0].shape[-2]
        tokens = self.tokens(positions, segment_ids, lengths, slots, key)
        rotates = self.config.rope_layers or None
        if self.run.scan_layers:
            assert states is None
            graphdef, stacked = nnx.split(self.layers)

            def run_layer(carry, layer):
                (x, cache), (weights, number, rotates) = carry, layer
                own = cache and cache._replace(layer=number)
                x, own = run_block(
                    graphdef, self.run.remat, weights, x, tokens.of_layer(number, rotates), own, in_loop=several
                )
                return (x, own and own._replace(layer=None)), None

            # The cache is carried, so that each layer writes into it. As an output of the scan it would be copied.
            numbers, several = jnp.arange(self.config.num_hidden_layers), self.config.num_hidden_layers > 1
            layers = (stacked, numbers, rotates and jnp.asarray(rotates))
            (x, cache), _ = jax.lax.scan(run_layer, (x, cache), layers)
        else:
            caches, (graphdefs, weights) = [], map(list, zip(*map(nnx.split, self.layers), strict=True))
            for i, graphdef in enumerate(graphdefs):
                if states is not None:
                    states.append(x)
                if sharding.sums_gradients() and i + 1 < len(weights) and self.run.lora is None:  # adapters are small
                    x, weights[i + 1] = _in_order(x, weights[i + 1])
                own = tokens.of_layer(i, rotates and rotates[i])
                x, layer_cache = run_block(graphdef, self.run.remat, weights[i], x, own, cache and cache[i])
                caches.append(layer_cache)
            cache = cache and caches
        return self.norm(x), cache

    def embed(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the input of the first layer."""
        return _times(self.embed_tokens(input_ids), self.config.embedding_multiplier)

    def tokens(self, positions: Any, segment_ids: Any, lengths: Any, slots: int, key: Any = None) -> Tokens:
        """Return the inputs of every layer beside its values. `slots` is the length of a row, or of the cache."""
        if lengths is None:
            lengths = jnp.zeros_like(positions) + (jnp.max(positions) + 1)
        cos, sin = rope_cos_sin(self.config, positions, lengths, max(slots, self.run.longest))
        return Tokens(cos, sin, positions, segment_ids, key)

    def head(self) -> Float[Array, "V D"]:
        """Return the output projection / `logits_scaling` in the compute type; rows past `vocab_size` are padding."""
        weight = (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]
        weight = _times(weight, 1 / self.config.logits_scaling)
        return sharding.reshard(weight.astype(self.run.compute_dtype or weight.dtype), sharding.HEAD_VD)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Return float32 logits over the real vocabulary. For a few positions: training uses `loss.py`."""
        head = self.head()
        out = jnp.einsum("BTD,VD->BTV", hidden.astype(head.dtype), head, out_sharding=placed(sharding.ACT_BTF))
        out = sharding.reshard(out, sharding.ACT_BTD)
        return out[..., : self.config.vocab_size].astype(jnp.float32)


def _check_unpadded(config: LlamaConfig) -> None:
    """Raise InputError where the mesh that is set pads projections: no padding of quantized matrices is there."""
    for key in ("num_key_value_heads", "intermediate_size"):
        size: int = getattr(config, key)
        if sharding.padded(size, "tensor") != size:
            raise InputError(
                f"--mesh: tensor={sharding.axis_size('tensor')} does not divide {key} {size}, as quantized matrices "
                "need; use a size that divides it"
            )


@jax.custom_vjp
def _in_order(x: Float[Array, "B T D"], later: Any):
    """Return a layer's input and the next layer's weights unchanged. Backward, no earlier layer begins until the
    devices have summed the gradients of these weights, a sum that overlaps with this layer. Otherwise XLA does most
    such sums at the end, where no computation is left to overlap with."""
    return x, later


_in_order.defvjp(
    lambda x, later: (_in_order(x, later), None), lambda _, gradients: jax.lax.optimization_barrier(gradients)
)


def run_block(graphdef, remat: str, params, x, tokens: Tokens, cache: KVCache | None, in_loop: bool = False):
    """Return a layer's output, in the type of `x`, and its cache, by the layer's graph definition and parameters.

    With `in_loop`, the layer is the body of a loop over several layers. What the backward loop computes again needs no
    barrier there: XLA cannot replace it by the forward loop's values. A barrier would copy each saved value.
    """
    return _block_function(graphdef, remat, in_loop)(params, x, tokens, cache)


@lru_cache
def _block_function(graphdef, remat: str, in_loop: bool) -> Any:
    """Return a layer as a function, the same for layers of equal definition: jax traces it once, forward and back."""

    def run(params, x, tokens, cache):
        y, cache = nnx.merge(graphdef, params)(x, tokens, cache)
        return y.astype(x.dtype), cache

    kept = REMAT[remat].kept
    if kept == ():
        run = jax.checkpoint(run, prevent_cse=not in_loop)
    elif kept is not None:
        named = jax.checkpoint_policies.save_only_these_names(*kept)
        policy = jax.checkpoint_policies.save_from_both_policies(named, keeps_kernel)
        run = jax.checkpoint(run, policy=policy, prevent_cse=not in_loop)
    return jax.jit(run)


def _stack(blocks: list[Block]) -> Block:
    """Return a block whose parameters carry the layers on a leading axis."""
    graphdef, _ = nnx.split(blocks[0])
    states = [nnx.to_pure_dict(nnx.state(b)) for b in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *xs: jnp.stack(xs), *states))


def stack_layers(params: Params) -> Params:
    """Stack the parameters of a list of layers (`layers: {0: ..., 1: ...}`), one tensor after another.

    The input is used up: a layer's arrays are dropped as soon as they are stacked.
    """
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    leaves, treedef = zip(*(jax.tree.flatten(layer) for layer in layers), strict=True)
    stacked = []
    for i in range(len(leaves[0])):
        stacked.append(jnp.stack([leaf[i] for leaf in leaves]))
        for leaf in leaves:
            leaf[i] = None
    params["layers"].clear()
    return {**params, "layers": jax.tree.unflatten(treedef[0], stacked)}


def unstack_layers(params: Params) -> Params:
    """Return stacked layers as a list of layers, one tensor after another. The input is used up."""
    leaves, treedef = jax.tree.flatten(params.pop("layers"))
    layers: list[list[Any]] = [[] for _ in range(len(leaves[0]))]
    while leaves:
        leaf = leaves.pop(0)
        for i, layer in enumerate(layers):
            layer.append(leaf[i])
    return {**params, "layers": {i: jax.tree.unflatten(treedef, layer) for i, layer in enumerate(layers)}}
