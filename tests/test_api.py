"""The public API against transformers' `LlamaForCausalLM` (float32, the CPU).

Tolerances are those of test_parity.py: of values of order 10, 1e-4; of the loss 1e-6; of a gradient 1e-5 of its norm,
and for q's and k's gradients the rounding that `watch_rounding` measures.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_parity import GRAD_RTOL, LOGITS_ATOL, LOSS_RTOL, assert_within, watch_rounding
from tiny import CONFIG, ROOT, environment, write_json, write_model, write_tokenizer

import llama_jax
from llama_jax.base.errors import InputError
from llama_jax.model.config import LlamaConfig
from llama_jax.model.llama import Llama, RunOptions
from llama_jax.training.loss import weighted_cross_entropy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BIASED = {**CONFIG, "attention_bias": True, "mlp_bias": True}


class Pair(NamedTuple):
    ours: llama_jax.Model
    theirs: Any


def make_pair(folder: Path, config: dict[str, Any]) -> Pair:
    folder = write_tokenizer(write_model(folder, config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Pair(llama_jax.load(folder), theirs)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("model"), BIASED)


class Padded(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def make_batch(padding: str | None) -> Padded:
    """Rows of 9 and 6 tokens; without padding, two rows of 9."""
    rng = np.random.default_rng(3)
    ids, mask = rng.integers(0, 256, (2, 9)), np.ones((2, 9), np.int64)
    if padding:
        mask[1, 6:] = 0
    if padding == "left":
        mask = mask[:, ::-1].copy()
    return Padded(ids, mask, np.where((mask == 1) & (rng.random(ids.shape) < 0.7), ids, -100))


@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_logits_and_hidden_states(pair: Pair, padding: str | None) -> None:
    batch = make_batch(padding)
    ids, mask = torch.tensor(batch.ids), torch.tensor(batch.mask)
    with torch.no_grad():
        theirs = pair.theirs(input_ids=ids, attention_mask=mask if padding else None, output_hidden_states=True)
    told = (batch.ids, batch.mask) if padding else (batch.ids.tolist(),)
    logits, states = pair.ours.logits(*told), pair.ours.hidden_states(*told)
    assert (logits.shape, logits.dtype) == ((2, 9, 259), jnp.float32)
    real = batch.mask == 1
    assert_within("logits", np.abs(np.asarray(logits) - theirs.logits.numpy())[real], LOGITS_ATOL)
    assert len(states) == len(theirs.hidden_states) == 3
    for i, (ours, state) in enumerate(zip(states, theirs.hidden_states, strict=True)):
        assert_within(f"state {i}", np.abs(np.asarray(ours) - state.numpy())[real], LOGITS_ATOL)


@pytest.mark.parametrize(
    ("padding", "config"),
    [("right", BIASED), ("left", {**CONFIG, "tie_word_embeddings": True, "pad_token_id": 7})],
    ids=["right", "left, tied"],
)
def test_loss_and_gradients(padding: str, config: dict[str, Any], tmp_path: Path) -> None:
    pair, batch = make_pair(tmp_path, config), make_batch(padding)
    measure = watch_rounding(pair.theirs.train())
    out = pair.theirs(**{
        "input_ids": torch.tensor(batch.ids), "attention_mask": torch.tensor(batch.mask),
        "labels": torch.tensor(batch.labels),
    })  # fmt: skip
    out.loss.backward()
    loss, gradients = pair.ours.loss_and_gradients(batch.ids, batch.labels, batch.mask)
    assert loss == pair.ours.loss(batch.ids, batch.labels, batch.mask)
    assert_within("loss", abs(float(loss) - out.loss.item()), LOSS_RTOL * out.loss.item())
    rounded, parameters = measure(), dict(pair.theirs.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        bound = GRAD_RTOL * parameter.grad.norm().item() + 8 * 2.0**-24 * rounded.get(name, 0.0)
        assert gradients[name].shape == parameter.shape
        assert_within(f"gradient of {name}", np.linalg.norm(gradients[name] - parameter.grad.numpy()), bound)


def test_greedy_answers(pair: Pair) -> None:
    """As transformers' generate, from padding on the left, in ids and in text."""
    batch = make_batch("left")
    theirs = pair.theirs.generate(
        torch.tensor(batch.ids), attention_mask=torch.tensor(batch.mask), max_new_tokens=16, do_sample=False,
        pad_token_id=257,
    )  # fmt: skip
    expected = [row[: row.index(257)] if 257 in row else row for row in theirs[:, 9:].tolist()]
    assert pair.ours.generate_ids(batch.ids, 16, batch.mask) == expected
    ragged = [row[mask == 1].tolist() for row, mask in zip(batch.ids, batch.mask, strict=True)]
    assert pair.ours.generate_ids(ragged, 16) == expected
    prompt = torch.tensor([pair.ours.tokenizer.encode_batch(["Hello"])[0]])
    (row,) = pair.theirs.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=257)[:, 6:].tolist()
    assert prompt.shape == (1, 6)
    expected_text = pair.ours.tokenizer.decode(row[: row.index(257)] if 257 in row else row)
    assert pair.ours.generate("Hello", max_new_tokens=16) == expected_text


def test_an_end_token_ends_an_answer(tmp_path: Path) -> None:
    """The end tokens of generation_config.json go before those of config.json, as in transformers' generate."""
    folder, ids = write_model(tmp_path), make_batch(None).ids
    first, second = llama_jax.load(folder).generate_ids(ids, 16)
    write_json(folder / "generation_config.json", {"eos_token_id": [first[4], 258], "pad_token_id": 258})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = theirs.generate(torch.tensor(ids), max_new_tokens=16, do_sample=False)[:, 9:].tolist()
    ends = [[i for i, token in enumerate(row) if token in (first[4], 258)] for row in rows]
    expected = [row[: end[0]] if end else row for row, end in zip(rows, ends, strict=True)]
    assert llama_jax.load(folder).generate_ids(ids, 16) == expected
    assert len(expected[0]) <= 4 and len(second) == 16


def test_bfloat16(pair: Pair, tmp_path: Path) -> None:
    """Parameters, states and gradients have the type; logits and loss are float32."""
    model = llama_jax.load(write_model(tmp_path, BIASED), dtype="bfloat16")
    batch = make_batch("right")
    assert model.logits(batch.ids).dtype == jnp.float32
    assert {state.dtype for state in model.hidden_states(batch.ids)} == {jnp.dtype(jnp.bfloat16)}
    loss, gradients = model.loss_and_gradients(batch.ids, batch.labels, batch.mask)
    assert {gradient.dtype for gradient in gradients.values()} == {jnp.dtype(jnp.bfloat16)}
    # bfloat16 rounds by 2^-9 of a value; a mean over tokens, through some tens of roundings.
    exact = float(pair.ours.loss(batch.ids, batch.labels, batch.mask))
    assert loss.dtype == jnp.float32 and 0 < abs(float(loss) - exact) < 0.02 * exact


def test_what_is_refused(pair: Pair, tmp_path: Path) -> None:
    model, ids = pair.ours, np.zeros((2, 4), int)
    for call, said in (
        (lambda: model.logits([[259]]), "input_ids: tokens should be from 0 to 258"),
        (lambda: model.logits([[-1]]), "input_ids: tokens"),
        (lambda: model.loss(ids, ids - 1), "labels: tokens"),
        (lambda: model.loss(ids, ids[:, :3]), "one shape"),
        (lambda: model.logits(ids, ids[:1]), "one shape"),
        (lambda: model.logits([1, 2]), "one shape"),
        (lambda: model.logits([[1, 2], [3]]), "one shape"),
        (lambda: model.logits([[], []]), "one shape"),
        (lambda: model.logits([[1.5, 2]]), "integers"),
        (lambda: model.logits("Hello"), "integers"),
        (lambda: model.logits([[np.nan, 1]]), "integers"),
        (lambda: model.generate_ids(ids, 10**9), "max_new_tokens 1000000000 should be from 1 to"),
        (lambda: model.logits(ids + 2**32), "input_ids: tokens"),
        (lambda: model.logits(ids, ids + np.array([1, 1, 2, 2])), "attention_mask: should be 1"),
        (lambda: model.loss(ids, ids[0]), "one shape"),
        (lambda: model.generate_ids([1, 2]), "one shape"),
        (lambda: model.generate_ids(ids, attention_mask=ids[:, :3] + 1), "one shape"),
        (lambda: model.generate_ids(ids, attention_mask=ids + np.array([1, 1, 1, 2])), "attention_mask: should be 1"),
        (lambda: model.generate_ids([[1], []]), "at least one token"),
        (lambda: model.generate_ids([[300]]), "input_ids: tokens"),
        (lambda: llama_jax.load(tmp_path), "config.json"),
        (lambda: llama_jax.load(write_model(tmp_path), dtype="int8"), "dtype 'int8'"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            call()


def test_a_changed_parameter_changes_the_logits(tmp_path: Path) -> None:
    """`llama` is the module that the methods compute with."""
    model = llama_jax.load(write_model(tmp_path))
    before = model.logits([[1, 2, 3]])
    weight = model.llama.layers[0].mlp.down_proj.weight
    weight[...] = weight[...] * 0
    assert np.abs(np.asarray(model.logits([[1, 2, 3]]) - before)).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_model_without_a_mesh(scan_layers: bool) -> None:
    """Constructed, called and differentiated, eagerly and compiled, with no mesh set."""
    config = LlamaConfig.from_hf(CONFIG)
    model = Llama(config, RunOptions(scan_layers=scan_layers), rngs=nnx.Rngs(0))
    ids = jnp.asarray(make_batch(None).ids, jnp.int32)
    positions, ones = jnp.broadcast_to(jnp.arange(9), ids.shape), jnp.ones_like(ids)

    def loss(model: Llama) -> jax.Array:
        hidden, _ = model(ids, positions, ones)
        return weighted_cross_entropy(hidden, model.head(), ids, ones / ids.size, config.vocab_size)[0]

    eager, gradients = nnx.value_and_grad(loss)(model)
    compiled, same = nnx.jit(nnx.value_and_grad(loss))(model)
    assert_within("loss", abs(float(eager) - float(compiled)), LOSS_RTOL * float(eager))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(same), strict=True):
        assert_within("gradient", jnp.linalg.norm(a - b), 2 * GRAD_RTOL * float(jnp.linalg.norm(a)) + 1e-9)


def test_the_page_runs(tmp_path: Path) -> None:
    """The example of docs/api.md, in a process of its own, and the import that must not load jax."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    write_tokenizer(write_model(tmp_path / "model"))
    script = f"import sys, llama_jax; assert 'jax' not in sys.modules\n{code.replace('path/to/model', 'model')}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4, done.stdout
