"""Products in fp8: roundings against ml_dtypes, products against float64, a model against torch with fp8 layers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from forks import on_devices
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from test_parity import make_batch, make_hf, make_raw, make_weights, run_ours, torch
from test_training import Job
from tiny import CONFIG, run, slow_unless

import train_jax
from llama_jax.data.batches import Batch
from llama_jax.distributed import sharding
from llama_jax.model import matmul
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, merge
from llama_jax.model.llama import RunOptions
from llama_jax.model.lora import PROJECTIONS, Lora, Rank
from llama_jax.model.matmul import (
    GRADIENTS,
    SCATTER,
    VALUES,
    Scaled,
    Sum,
    check_fp8,
    project_fp8,
    quantize,
    weight_gradient,
)
from llama_jax.training.fit import put_batch
from llama_jax.training.state import abstract_state, init_state
from llama_jax.training.step import losses_of

KINDS = {VALUES: (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn), GRADIENTS: (ml_dtypes.float8_e5m2, torch.float8_e5m2)}


def power_of(largest: float, dtype: Any) -> int:
    """The largest power of two by which the largest element can be multiplied, found by trying."""
    most = float(jnp.finfo(dtype).max)
    return next(k for k in range(126, -127, -1) if largest * 2.0**k <= most) if largest else 0


finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@pytest.mark.parametrize("dtype", list(KINDS), ids=["e4m3", "e5m2"])
def test_rounding(dtype: Any) -> None:
    @given(hnp.arrays(np.float32, (3, 5), elements=finite))
    @example(np.full((3, 5), -448, np.float32))
    @example(np.full((3, 5), np.nextafter(np.float32(448), np.float32(500)), np.float32))
    @example(np.full((3, 5), 1.75 * 2.0**15, np.float32))
    @example(np.zeros((3, 5), np.float32))
    def check(x: np.ndarray) -> None:
        scaled = jax.jit(quantize, static_argnums=1)(x, dtype)
        power = power_of(float(np.abs(x).max()), dtype)
        assert float(scaled.unit) == 2.0**-power
        expected = np.ldexp(x, power).astype(KINDS[dtype][0])
        np.testing.assert_array_equal(np.asarray(scaled.values).astype(np.float32), expected.astype(np.float32))

    check()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_bad_number_stays_one(wrong: float) -> None:
    x = np.ones((1, 2, 4), np.float32)
    x[0, 1, 2] = wrong
    out = jax.jit(lambda x, w: project_fp8(P(), SCATTER, x, [w])[0])(x, np.ones((3, 4), np.float32))
    assert np.isnan(np.asarray(out)).all()


def exact(scaled: Scaled) -> np.ndarray:
    return np.asarray(scaled.values).astype(np.float64) * float(scaled.unit)


def differences(got: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products(dtype: Any) -> None:
    """Against float64 products of the rounded operands, and of the given ones.

    The first differ by the sums' rounding, of which bfloat16 has one of 2^-9. A value of e4m3 is off by at most 2^-4 of
    itself, evenly spread some 2^-4 / sqrt(3) at worst; e5m2 twice that. The errors of two operands add as squares.
    """
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((2, 24, 80), (48, 80), (2, 24, 48)))
    x[0, 3] *= 100  # a row that takes most of the range
    x, w, dy = (np.asarray(jnp.asarray(a).astype(dtype)) for a in (x, w, dy))
    y, pull = jax.vjp(lambda x, w: project_fp8(P(), SCATTER, x, [w])[0], jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy))
    assert y.dtype == dx.dtype == dw.dtype == dtype
    qx, qw, qdy = quantize(x, VALUES), quantize(w, VALUES), quantize(dy, GRADIENTS)
    bound = 1e-6 if dtype == jnp.float32 else 2.0**-8
    one = 2.0**-4 / 3**0.5
    for name, got, form, (a, b), (plain_a, plain_b), rounding in (
        ("y", y, "BTI,OI->BTO", (qx, qw), (x, w), 2**0.5 * one),
        ("dx", dx, "BTO,OI->BTI", (qdy, qw), (dy, w), 5**0.5 * one),
        ("dw", dw, "BTO,BTI->OI", (qdy, qx), (dy, x), 5**0.5 * one),
    ):
        assert differences(got, np.einsum(form, exact(a), exact(b))) < bound, name
        whole = np.einsum(form, plain_a.astype(np.float64), plain_b.astype(np.float64))
        assert 0.2 * rounding < differences(got, whole) < rounding + bound, name


def check_meshes(specs: list[str]) -> None:
    """Products of operands that eight devices share, against one device: the same fp8 values, other orders of sums."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((8, 16, 32), (48, 32), (8, 16, 48)))
    w[40, 3] = 30  # of one device alone

    def results(spec: str, devices: list[Any]) -> list[np.ndarray]:
        with jax.set_mesh(sharding.make_mesh(devices, spec)):
            placed = [
                jax.device_put(a, of)
                for a, of in zip((x, w, dy), (sharding.ACT_BTD, sharding.COLUMN_FD, sharding.ACT_BTF), strict=True)
            ]

            @jax.jit
            def both(x, w, dy):
                y, pull = jax.vjp(lambda x, w: project_fp8(sharding.ACT_BTF, SCATTER, x, [w])[0], x, w)
                return y, *pull(dy)

            out = both(*placed)
            assert out[2].sharding.spec == sharding.COLUMN_FD
            return [np.asarray(sharding.read(a)) for a in out]

    one = results("fsdp=1", jax.devices()[:1])
    for spec in specs:
        for name, got, expected in zip(("y", "dx", "dw"), results(spec, jax.devices()), one, strict=True):
            assert differences(got, expected.astype(np.float64)) < 1e-6, (spec, name)
    # bfloat16 shares that are exchanged
    with jax.set_mesh(sharding.make_mesh(spec="fsdp=8")):
        operands = [
            quantize(jax.device_put(a.astype(jnp.bfloat16), of), kind)
            for a, of, kind in ((dy, sharding.ACT_BTF, GRADIENTS), (x, sharding.ACT_BTD, VALUES))
        ]
        transposed = [Scaled(jnp.moveaxis(a.values, -1, 0), a.unit) for a in operands]
        got = jax.jit(weight_gradient, static_argnums=(2, 3, 4))(
            *transposed, sharding.COLUMN_FD, Sum(exchange=True), jnp.bfloat16
        )
        expected = np.einsum("BTO,BTI->OI", *map(exact, operands))
    assert differences(got.astype(jnp.float32), expected) < 2.0**-8  # a rounding of each share, and of the sum


@pytest.mark.slow
def test_meshes() -> None:
    specs = ["fsdp=8", "data=2,fsdp=2,tensor=2", "context=8", "tensor=8"]
    on_devices(8, f"test_fp8.check_meshes({specs})")


class TorchFp8(torch.autograd.Function):
    """torch's linear layer over operands rounded to its own fp8 types."""

    @staticmethod
    def rounded(x: Any, dtype: Any) -> Any:
        power = power_of(float(x.abs().max()), dtype)
        return torch.ldexp(torch.ldexp(x, torch.tensor(power)).to(KINDS[dtype][1]).float(), torch.tensor(-power))

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        x, weight = TorchFp8.rounded(x, VALUES), TorchFp8.rounded(weight, VALUES)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x, weight), dy = ctx.saved_tensors, TorchFp8.rounded(gradients[0], GRADIENTS)
        return dy @ weight, dy.flatten(0, -2).T @ x.flatten(0, -2)


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), slow_unless(False, True, "full")])
def test_a_model(scan: bool, remat: str, mesh: Mesh) -> None:
    """Loss and gradients against transformers' model whose projections are `TorchFp8`, all else in float32.

    An input that lies within float32's rounding of the middle between two values of fp8 may be rounded to either: few
    do, and a gradient of tiny layers is off by a few thousandths then. A product that is in fp8 on one side alone makes
    0.02 or more, as the comparison with the model without fp8 has.
    """
    raw = make_raw(hidden_size=32, intermediate_size=48)
    config = LlamaConfig.from_hf(raw)
    rng = np.random.default_rng(3)
    weights, batch = make_weights(config, rng), make_batch(config, rng, [11, 11])
    ours = run_ours(config, RunOptions(fp8=True, scan_layers=scan, remat=remat), mesh, weights, batch)
    plain = run_ours(config, RunOptions(), mesh, weights, batch)
    model = make_hf(raw, weights)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            layer.forward = lambda x, layer=layer: (
                TorchFp8.apply(x, layer.weight) + (0 if layer.bias is None else layer.bias)
            )
    loss = model(input_ids=torch.tensor(batch.ids), labels=torch.tensor(batch.labels, dtype=torch.int64)).loss
    loss.backward()
    assert abs(ours.loss - loss.item()) < 1e-4 * loss.item()
    assert abs(plain.loss - loss.item()) > 1e-3 * loss.item()
    for name, parameter in model.named_parameters():
        expected = parameter.grad.numpy().astype(np.float64)
        assert differences(ours.grads[name], expected) < 5e-3, name
        assert differences(plain.grads[name], expected) > 2e-2, name


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command trains in fp8, where the device is taken for a GPU: near bfloat16's losses, and not at them. It
    evaluates in bfloat16, in which the exported model runs."""
    monkeypatch.setattr("llama_jax.plan.planner.check_fp8", lambda *_: None)
    losses, evaluated = {}, {}
    for fp8 in (False, True):
        job = Job(tmp_path / str(fp8), bf16=True, fp8=fp8, max_steps=6, logging_steps=1, hf_compat="5")
        when = {"eval_strategy": "steps", "eval_steps": 6, "eval_on_start": True}
        outcome = run(train_jax.main, *job.argv("out", eval_data_path=job.flags["data_path"], **when))
        assert outcome.code == 0, outcome.err
        assert ("matrix products in bfloat16, fp8 in the projections" in outcome.err) == fp8
        log = json.loads((job.folder / "out" / "trainer_state.json").read_text())["log_history"]
        losses[fp8] = np.array([entry["loss"] for entry in log if "loss" in entry])
        evaluated[fp8] = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    # The first is of the weights that both begin with.
    assert len(evaluated[True]) == 2 and evaluated[True][0] == evaluated[False][0]
    off = np.abs(losses[True] / losses[False] - 1)
    assert 1e-5 < off.max() < 0.02


@pytest.mark.parametrize("scan", [False, slow_unless(False, True)])
def test_a_frozen_base_is_rounded_once(scan: bool, mesh: Mesh) -> None:
    """Adapters over weights that are kept in fp8, as `init_state` makes them, have the loss and gradients of adapters
    over weights that each product rounds: these are checked against torch above."""
    config = LlamaConfig.from_hf({**CONFIG, "num_hidden_layers": 2})
    lora = Lora(tuple(((i, p), Rank(4, 2.0)) for i in range(2) for p in PROJECTIONS))
    definition = define(config, RunOptions(fp8=True, lora=lora, scan_layers=scan), mesh)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda a: jax.device_put(rng.normal(0, 0.1, a.shape).astype(a.dtype), a.sharding), definition.params
    )
    trainable, frozen = definition.split(params)
    copied = jax.tree.map(jnp.copy, (trainable, frozen))
    state = init_state(merge(*copied), optax.sgd(0.1), definition, mesh)
    kept = [x for x in jax.tree.leaves(state.frozen, is_leaf=lambda x: isinstance(x, Scaled)) if isinstance(x, Scaled)]
    assert len(kept) == (1 if scan else 2) * len(PROJECTIONS)
    assert all(x.values.dtype == VALUES and x.unit.size == (2 if scan else 1) for x in kept)
    like = abstract_state(optax.sgd(0.1), definition, mesh)
    shapes = [(a.shape, a.dtype, a.sharding) for a in jax.tree.leaves(like.frozen)]
    assert shapes == [(a.shape, a.dtype, a.sharding) for a in jax.tree.leaves(state.frozen)]
    ids = rng.integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    places = np.broadcast_to(np.arange(24, dtype=np.int32), ids.shape)
    batch = put_batch(
        mesh, Batch(ids, places, np.ones_like(ids), places * 0 + 24, ids, np.full(ids.shape, 1 / 48, np.float32))
    )

    @jax.jit
    def gradients(trainable, frozen):
        return jax.value_and_grad(
            lambda t: losses_of(definition.graphdef, merge(t, frozen), batch, config.vocab_size)[0]
        )(trainable)

    with jax.set_mesh(mesh):
        (loss, grads), (other, others) = gradients(trainable, frozen), gradients(state.trainable, state.frozen)
    # An answer multiplies with the same weights, and rounds no input.
    run = replace(definition.run, fp8=False)
    answering = define(config, run, mesh).graphdef
    is_scaled = lambda x: isinstance(x, Scaled)  # noqa: E731
    of_stack = lambda x: x.values.astype(jnp.float32) * x.unit.reshape(-1, *[1] * (x.values.ndim - 1))  # noqa: E731
    plain = jax.tree.map(
        lambda x: of_stack(x).reshape(x.values.shape) if is_scaled(x) else x, state.frozen, is_leaf=is_scaled
    )
    with jax.set_mesh(mesh):
        answered, expected = (
            jax.jit(lambda t, f: losses_of(answering, merge(t, f), batch, config.vocab_size)[0])(state.trainable, f)
            for f in (state.frozen, plain)
        )
    assert abs(float(answered) - float(expected)) < 1e-6 * float(expected) < abs(float(answered) - float(loss))
    assert abs(float(loss) - float(other)) < 1e-6 * float(loss)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        assert differences(b, np.asarray(a, np.float64)) < 1e-5


@pytest.mark.slow
def test_training_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes has the losses of one that was not stopped; without the flag the checkpoint is refused."""
    monkeypatch.setattr("llama_jax.plan.planner.check_fp8", lambda *_: None)
    flags = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0}
    job = Job(tmp_path, bf16=True, fp8=True, hf_compat="5", save_steps=3, **flags)
    job.train("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    job.train("resumed", resume_from_checkpoint=True)
    weights = [load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "resumed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "other" / "checkpoint-3")
    outcome = run(train_jax.main, *job.argv("other", resume_from_checkpoint=True, fp8=False))
    assert outcome.code == 2 and "it has fp8 True, this one False; give the same flags as then" in outcome.err


WITHOUT = ["NVIDIA A100-SXM4-80GB", "Tesla T4", "Quadro RTX 4000", "NVIDIA GeForce RTX 3090", "NVIDIA L3"]
WITH = ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation", "NVIDIA GB200"]


def test_devices_with_fp8() -> None:
    """A real device is judged by its compute capability, one of a dry run by its name."""
    for kind in WITH + WITHOUT:
        for capability, has in ((None, kind in WITH), ("8.9", True), ("9.0", True), ("8.6", False)):
            device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
            if has:
                check_fp8(device)
                continue
            with pytest.raises(matmul.InputError, match=f"--fp8 True: needs an NVIDIA GPU .*, this is {kind}; leave"):
                check_fp8(device)
    with pytest.raises(matmul.InputError, match="this is TPU v5e"):
        check_fp8(SimpleNamespace(platform="tpu", device_kind="TPU v5e"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"bf16": True}, "--fp8 True: needs an NVIDIA GPU of Ada, Hopper or later, this is cpu; leave it out"),
        ({}, "--fp8 True: is for the projections of a bfloat16 run; add --bf16 True"),
        (
            {"bf16": True, "use_peft": True, "load_in_8bit": True},
            "--fp8 True: the projections are quantized by --load_in_8bit True already; give one of them",
        ),
    ],
    ids=["a CPU", "float32", "8 bits"],
)
def test_refused(flags: dict[str, Any], said: str, tmp_path: Path) -> None:
    outcome = run(train_jax.main, *Job(tmp_path, fp8=True, **flags).argv("out"))
    assert outcome.code == 2 and outcome.compiled == 0
    assert outcome.err.splitlines()[-1] == f"error: {said}"
