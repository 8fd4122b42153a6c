"""The same run on every mesh: losses, norms and final weights of one device, whatever the axes and their sizes.

All runs are made in processes that have eight simulated devices, and compared there.
"""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forks import on_devices
from jax.sharding import PartitionSpec as P
from numpy_llama import llama_logits
from safetensors.numpy import load_file
from test_training import GOLDEN, golden_flags, worst
from tiny import (
    ALPACA,
    CONFIG,
    drawn_cases,
    make_records,
    run,
    slow_unless,
    write_json,
    write_model,
    write_tokenizer,
)

import convert_torch_to_flax
import train_jax
from llama_jax.command import generate
from llama_jax.data.batches import Batch
from llama_jax.distributed import sharding
from llama_jax.distributed.digest import sums
from llama_jax.distributed.storage import tree_bytes
from llama_jax.hf.manifest import read_manifest
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.lora import _drawn
from llama_jax.model.matmul import SCATTER, Sum, weight_gradient
from llama_jax.model.roles import EmbeddingTable, MatmulWeight
from llama_jax.reporting.run_log import RunLog
from llama_jax.training.fit import put_batch
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import TrainState, abstract_state
from llama_jax.training.step import Steps, abstract_batch

ONE = "fsdp=1"
# 4 heads with 4 kv heads, or 8 with 2: tensor=8 pads both, tensor=4 the second.
MESHES = ["fsdp=2", "tensor=2", "data=2", "fsdp=4", "tensor=4", "data=2,tensor=2", "fsdp=8", "tensor=8", "data=8",
          "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4", "context=2", "context=8", "fsdp=2,context=2", "data=2,context=4",
          "context=2,tensor=4", "fsdp=2,context=2,tensor=2"]  # fmt: skip


@contextlib.contextmanager
def laid_out(spec: str) -> Iterator[list[tuple[float, float]]]:
    """Commands run on as many devices as the mesh has. Yields each update's loss and norm."""
    seen: list[tuple[float, float]] = []
    sizes = [int(part.partition("=")[2]) for part in spec.split(",")]
    mesh = sharding.make_mesh(jax.devices()[: int(np.prod(sizes))], spec)
    original = RunLog.on_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda spec: mesh)
        patch.setattr(RunLog, "on_update", lambda self, m: (seen.append((m.loss, m.grad_norm)), original(self, m))[1])
        yield seen


def differences(argv: list[str], meshes: list[str], out: Path) -> Iterator[tuple[str, float, float, float]]:
    """Of each mesh against one device: the largest relative difference of a loss and of a norm, and the largest
    difference of a final weight."""
    results = []
    for spec in [ONE, *meshes]:
        folder = out / spec
        with laid_out(spec) as seen:
            outcome = run(train_jax.main, *argv, "--output_dir", folder, "--world_size", "1")
        assert outcome.code == 0, outcome.err
        assert f"mesh {spec}{'' if spec == ONE else ' (auto)'}\n" in outcome.err
        logits = np.concatenate([logits.chosen for logits in read_manifest(folder).logits])
        results.append((np.asarray(seen), load_file(next(folder.glob("*model.safetensors"))), logits))
    one, weights, expected = results[0]
    for spec, (values, others, logits) in zip(meshes, results[1:], strict=True):
        loss, norm = np.abs(values / one - 1).max(axis=0)
        apart = worst(others, weights)
        # The manifest's, of weights 1e-5 apart, in two layers of sums of at most 256 products. Weights trained in
        # bfloat16 are further apart: there the logits of the run's own weights are expected, in float64. Three layers
        # of sums of at most 160 products in float32 were off by 8e-7 of the largest.
        tolerance = 1e-3
        if "--bf16" in map(str, argv):
            expected, tolerance = by_numpy(out / spec), 1e-5
        assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max(), (spec, apart)
        yield spec, float(loss), float(norm), apart


def by_numpy(folder: Path) -> np.ndarray:
    """What the manifest of an exported LLaMA, untied and without a scaling of its rotation, should hold as logits."""
    raw, manifest = json.loads((folder / "config.json").read_text()), read_manifest(folder)
    config = {**raw, **raw.get("rope_parameters", {})}
    config["rope_scaling"] = {"factor": 1.0, "original_max_position_embeddings": 1}
    config["rope_scaling"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    weights = load_file(folder / "model.safetensors")
    logits = [llama_logits(weights, config, np.asarray(prompt.ids)) for prompt in manifest.prompts]
    return np.concatenate(logits)[:, manifest.columns]


def adapters_on_meshes(out: str, meshes: list[str], *flags: str) -> None:
    folder = Path(out)
    wide = {"hidden_size": 128, "intermediate_size": 256} if "--load_in_4bit" in flags else {}
    write_model(folder / "model", {**CONFIG, "num_attention_heads": 8, **wide})
    write_json(folder / "data.json", make_records(40))
    argv = ["--model_name_or_path", folder / "model", "--data_path", folder / "data.json", "--use_cpu", "True"]
    argv += ["--max_steps", "5", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"]
    argv += ["--hf_compat", "5", "--learning_rate", "1e-3", "--adam_epsilon", "1e-4", "--save_strategy", "no"]
    argv += [
        "--use_peft",
        "True",
        "--lora_r",
        "4",
        "--lora_dropout",
        "0.1" if meshes == ["tensor=8"] else "0",  # draws follow a block's rows, which other meshes change
        "--lora_target_modules",
        "all-linear",
        *flags,
    ]
    for spec, loss, norm, weight in differences([str(word) for word in argv], meshes, folder / "runs"):
        print(f"{flags} {spec}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}")
        assert loss <= 1e-5 and norm <= 1e-4 and weight <= 1e-5  # as of the whole model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "meshes"),
    [
        (("--use_dora", "True"), ["tensor=8"]),
        (
            ("--use_dora", "True", "--load_in_4bit", "True", "--use_bnb_nested_quant", "True"),
            ["fsdp=2,context=2,tensor=2"],
        ),
        (
            ("--load_in_8bit", "True", "--scan_layers", "True", "--lora_modules_to_save", "lm_head"),
            ["fsdp=8", "data=2,fsdp=2,tensor=2"],
        ),
    ],
)
def test_adapters(flags: tuple[str, ...], meshes: list[str], tmp_path: Path) -> None:
    on_devices(8, f"test_meshes.adapters_on_meshes({str(tmp_path)!r}, {meshes}, *{flags})")


def dropout_on_meshes() -> None:
    """Each device draws its own part of the same elements."""
    key, probability = np.uint32(3), 0.9

    def draw(x: Any) -> Any:
        return _drawn(key, probability, x)

    whole = np.asarray(jax.jit(draw)(jnp.zeros((4, 256, 512), jnp.bfloat16)))
    # 524,288 draws: 5 standard deviations of the share, and of that of equal draws in both halves of an axis.
    assert abs(whole.mean() - 0.9) < 0.0021
    for axis in range(3):
        first, second = np.split(whole, 2, axis)
        assert abs((first == second).mean() - (0.9**2 + 0.1**2)) < 0.0038
    for spec, place in (
        ("data=2,fsdp=2,tensor=2", sharding.ACT_BTF),
        ("fsdp=2,context=2,tensor=2", sharding.ACT_BTD),
    ):
        with jax.set_mesh(sharding.make_mesh(spec=spec)):
            x = jnp.zeros(whole.shape, jnp.bfloat16, out_sharding=place)
            program = jax.jit(draw).lower(x).compile()
            drawn = program(x)
        sizes = re.findall(r"u32\[([\d,]+)\]", program.as_text())
        assert max(math.prod(map(int, size.split(","))) for size in sizes) <= x.size // 4
        np.testing.assert_array_equal(drawn, whole)
        for shard in drawn.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])


@pytest.mark.slow
def test_dropout() -> None:
    on_devices(8, "test_meshes.dropout_on_meshes()")


# -- The Trainer's golden runs ----------------------------------------------------------------------------------------


def golden_on_meshes(folder: str, out: str, meshes: list[str]) -> None:
    case = Path(folder)
    flags = golden_flags(case, Path(out))
    for spec, loss, norm, weight in differences(flags, meshes, Path(out)):
        print(f"{case.name} {spec}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}")
        # One device is held to the Trainer's values by the same bounds in test_training.py, which derives them.
        bf16 = "bf16" in case.name
        assert loss <= (6e-3 if bf16 else 1e-5)
        assert norm <= (2 * 1.7e-2 / 4 if bf16 else 1e-4)
        assert weight <= (4e-3 if bf16 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "meshes"), [(name, MESHES[i :: len(GOLDEN)]) for i, name in enumerate(GOLDEN)])
def test_golden(name: str, meshes: list[str], shared: Path, tmp_path: Path) -> None:
    """The meshes are dealt over the runs, as all with all take half an hour; BENCHMARKS.md has those."""
    on_devices(8, f"test_meshes.golden_on_meshes({str(shared / 'golden' / name)!r}, {str(tmp_path)!r}, {meshes})")


# -- A live run, on meshes that divide none of its sizes --------------------------------------------------------------

# Three devices or six want 3 or 6 kv heads, 6 or 12 heads, 42 of F and 384 rows of the vocabulary.
RAW = {**CONFIG, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
LIVE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "unrolled": (["tensor=3"], {}),
    "scanned": (["fsdp=2,tensor=3"], {"scan_layers": True, "remat": "attention", "label_smoothing_factor": 0.1}),
    "summed": (["data=2,fsdp=3"], {"max_tokens_per_device": 128, "per_device_train_batch_size": 4}),
    "adafactor": (["fsdp=6", "tensor=3"], {"optim": "adafactor"}),
    "long": (["context=2,tensor=3", "fsdp=3,context=2"], {"max_tokens_per_device": 64, "remat": "matmuls"}),
}


def live_on_meshes(folder: str, names: list[str]) -> None:
    """Make each run on one device and on its meshes, in CI on the first of them."""
    for name in names:
        meshes, changes = LIVE[name]
        flags = {
            **{"model_name_or_path": Path(folder) / name, "data_path": Path(folder) / "data.json", "use_cpu": True},
            **{"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "hf_compat": "5"},
            **{"learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-4, "save_strategy": "no", **changes},
        }
        argv = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
        for spec, loss, norm, weight in differences(
            argv, meshes[: drawn_cases(2, in_ci=1)], Path(folder) / f"{name}-out"
        ):
            print(f"{name} {spec}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}")
            # As derived in test_training.py's test_any_run_is_torchs.
            assert loss <= 1e-5 and norm <= 1e-4 and weight <= 1e-5


@pytest.mark.slow
def test_live(tmp_path: Path) -> None:
    """The tokenizer adds a row to the vocabulary; biases are padded too."""
    for name in LIVE:
        raw = {**RAW, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": name == "scanned"}
        write_tokenizer(write_model(tmp_path / name, raw), pad_token=None)
    write_json(tmp_path / "data.json", ALPACA * 3)
    on_devices(8, f"test_meshes.live_on_meshes({str(tmp_path)!r}, {list(LIVE)})")


@pytest.mark.slow
def test_a_width_that_cannot_be_divided(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model"), write_json(tmp_path / "data.json", make_records(4))
    flags = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    mend = "--mesh: fsdp=6 does not divide hidden_size 32; use data=3,fsdp=2,tensor=1"
    on_devices(8, f"test_meshes.refused({[*flags, '--mesh', 'fsdp=6']}, {mend!r})")


def refused(argv: list[str], said: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()
        patch.setattr(jax, "devices", lambda: devices[:6])
        outcome = run(train_jax.main, *argv)
    assert outcome.code == 2 and outcome.compiled == 0 and said in outcome.err.splitlines()[-1], outcome.err


# -- What lies where, and what is sent --------------------------------------------------------------------------------

# Sizes that tell all tensors apart; 8 heads of 8, so that 8 devices have one each.
WIDE = {**CONFIG, "hidden_size": 64, "intermediate_size": 136, "num_attention_heads": 8, "num_key_value_heads": 8}
WIDE |= {"vocab_size": 384}
D, F, V, L, B, T = 64, 136, 384, 2, 8, 128
MATRICES = [D * D] * 4 + [F * D] * 3  # of a layer
KINDS = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"


def compiled_step(spec: str, **options: Any) -> tuple[Any, TrainState, Any]:
    """The compiled update of a block [B, T], and the types of its state."""
    mesh, config, run = sharding.make_mesh(spec=spec), LlamaConfig.from_hf(WIDE), RunOptions(**options)
    definition = define(config, run, mesh)
    tx = make_optimizer(weight_decay=0.1, decays=definition.having(MatmulWeight, EmbeddingTable))
    state = abstract_state(tx, definition, mesh)
    steps = Steps(definition, tx, config.vocab_size)
    steps.compile(state, (B, T), mesh)
    return steps._compiled[B, T], state, mesh


def sent(program: Any) -> Counter[tuple[str, int]]:
    """How many collectives there are of each kind and number of elements that it gives; those of one element, sums of
    squares for the gradient's norm and the like, left out. A collective may combine several of what it is asked for."""
    found: Counter[tuple[str, int]] = Counter()
    for given, kind in re.findall(rf"= (\S.*?) ({KINDS})(?:-start)?\(", program.as_text()):
        for shape in re.findall(r"\w+\[([\d,]*)\]", given):
            found[kind, math.prod(int(n) for n in shape.split(",") if n)] += 1
    return Counter({key: n for key, n in found.items() if key[1] > 1})


def check_collectives() -> None:
    # fsdp. Forward, each matrix is gathered; the backward pass of an unrolled layer finds it still there. Its gradient
    # is summed over the devices, once (the CPU's compiler leaves a device its part of the whole sum, where those of GPU
    # and TPU scatter it), and so are those of the norms. Nothing else is sent: no activation, no moment.
    gathered = Counter({("all-gather", n): L * MATRICES.count(n) for n in MATRICES}) + Counter(
        {("all-gather", V * D): 2}
    )
    summed = Counter({("all-reduce", n): k for (_, n), k in gathered.items()}) + Counter({("all-reduce", D): 2 * L + 1})
    assert sent(compiled_step("fsdp=8")[0]) == gathered + summed
    # With recomputation, and where layers are scanned (one body for all of them, forward and backward), a layer's
    # matrices are let go and gathered again.
    again = Counter({("all-gather", n): L * MATRICES.count(n) for n in MATRICES})
    assert sent(compiled_step("fsdp=8", remat="full")[0]) == gathered + again + summed
    bodies = Counter({("all-gather", n): 2 * MATRICES.count(n) for n in MATRICES}) + Counter({("all-gather", V * D): 2})
    sums = Counter({("all-reduce", n): MATRICES.count(n) for n in MATRICES}) + Counter(
        {("all-reduce", V * D): 2, ("all-reduce", D): 3}
    )
    assert sent(compiled_step("fsdp=8", scan_layers=True)[0]) == bodies + sums
    # tensor. Gathered are the features of the embedded tokens. Summed are activations: of a layer o and down forward,
    # and the gradients by the inputs of q, k, v, gate and up backward; and that by the last hidden states. Of each
    # token the largest logit, the sum of exponentials, and the target's logit. No parameter is sent.
    activations = Counter({("all-gather", B * T * D): 1, ("all-reduce", B * T * D): L * (2 + 5) + 1})
    assert sent(compiled_step("tensor=8")[0]) == activations + Counter({("all-reduce", B * T): 3})
    # context. What fsdp sends, and around attention, forward and backward: q, k, v and its result as parts for each of
    # the others, and once the segments and positions of whole rows.
    around = Counter({("all-to-all", B * T * D // 8 // 8): L * 8 * 8, ("all-gather", B * T): 2})
    assert sent(compiled_step("context=8")[0]) == gathered + summed + around


def check_placement() -> None:
    for spec in ("fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2"):
        mesh = sharding.make_mesh(spec=spec)
        ways = mesh.size // mesh.shape["data"]
        for scan in (False, True):
            program, state, _ = compiled_step(spec, scan_layers=scan, compute_dtype=jnp.bfloat16)
            specs = jax.tree.map(lambda x: x.sharding.spec, state.trainable)
            adam = optax.tree_utils.tree_get(state.opt_state, "mu"), optax.tree_utils.tree_get(state.opt_state, "nu")
            for moments in adam:
                assert jax.tree.map(lambda x: x.sharding.spec, moments) == specs
            # What the compiler was given is what it gives back.
            placed = jax.tree.map(lambda x: x.sharding, state)
            same = jax.tree.map(
                lambda x, a, b: a.is_equivalent_to(b, x.ndim), state, placed, program.output_shardings[0]
            )
            assert all(jax.tree.leaves(same))
            for tree in (state.trainable, *adam):
                vectors, matrices = [], []
                for path, x in jax.tree_util.tree_leaves_with_path(tree):
                    (vectors if "norm" in str(path) else matrices).append(x)
                assert sharding.bytes_on_device(matrices) * ways == tree_bytes(matrices), spec
                assert sharding.bytes_on_device(vectors) == tree_bytes(vectors)


def check_types(folder: str) -> None:
    """As the partitioner leaves the program: the CPU's compiler then has all sums in float32."""
    jax.config.update("jax_enable_compilation_cache", False)  # what is found there is not dumped
    for spec, scan in (("fsdp=8", False), ("data=2,fsdp=4", True)):
        for how in (SCATTER, Sum(exchange=True), Sum(rounded=True)):
            compiled_step(spec, scan_layers=scan, compute_dtype=jnp.bfloat16, sums=how)
    dumps = list(Path(folder).glob("*jit_update*after_spmd-partitioning*"))
    assert len(dumps) == 6
    unrolled = exchanged = rounded = 0
    for dump in dumps:
        text = dump.read_text()
        kinds = Counter(re.findall(rf"= (\w+)\[[\d,]*\]\S* ({KINDS})\(", text))
        # Of each matrix but the embedding the copy in bfloat16 is gathered. Sums over devices are in bfloat16 on
        # request only, of a layer's matrices.
        assert kinds["bf16", "all-gather"] >= len(MATRICES) + 1 and kinds["f32", "all-gather"] == 1, kinds
        if kinds["bf16", "all-reduce"]:
            assert kinds["bf16", "all-reduce"] >= len(MATRICES) and not kinds["bf16", "all-to-all"], kinds
            rounded += 1
        elif kinds["bf16", "all-to-all"]:  # shares of those gradients, which devices add by themselves
            assert kinds["bf16", "all-to-all"] >= len(MATRICES) and kinds["f32", "all-reduce"] >= 2, kinds
            exchanged += 1
        else:
            assert kinds["f32", "all-reduce"] >= len(MATRICES) + 2, kinds
        assert not kinds["f32", "all-to-all"], kinds
        # Before an unrolled layer's backward pass begins, a device has its part of the sums of the layer two behind it.
        waited = [
            sorted(math.prod(map(int, shape.split(","))) for shape in re.findall(r"bf16\[([\d,]+)\]", given))
            for given in re.findall(r"= \((.*?)\) opt-barrier", text)
        ]
        assert waited in ([], [sorted(n // 8 for n in MATRICES)] * (L - 1))
        unrolled += bool(waited)
    assert unrolled == 3 and exchanged == rounded == 2


def check_weight_gradient(specs: list[str]) -> None:
    """Small numbers, so that each device's share is a whole one below 256, which bfloat16 has, and their sum is not."""
    rng = np.random.default_rng(0)
    dy, x = (rng.integers(0, 4, (8, 16, width)) for width in (32, 48))
    exact = np.einsum("BTO,BTI->OI", dy, x)
    assert exact.max() > 256
    for spec in specs:
        for weight in (sharding.COLUMN_FD, sharding.ROW_DF, P("tensor", sharding.SHARDS)):
            placed = sharding.ACT_BTF, sharding.ACT_BTD
            if weight == sharding.ROW_DF:
                placed = placed[::-1]
            with jax.set_mesh(sharding.make_mesh(spec=spec)):
                operands = [jax.device_put(a.astype(jnp.bfloat16), of) for a, of in zip((dy, x), placed, strict=True)]
                got = jax.jit(weight_gradient, static_argnums=(2, 3, 4))(
                    *operands, weight, Sum(exchange=True), jnp.bfloat16
                )
            assert got.sharding.spec == weight and got.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(got), exact.astype(jnp.bfloat16), f"{spec}, {weight}")


@pytest.mark.parametrize(
    "specs",
    [
        ["fsdp=8", "fsdp=2,context=2,tensor=2"],
        slow_unless(False, ["data=2,fsdp=4", "context=8", "data=2,fsdp=2,tensor=2"]),
    ],
    ids=["quick", "others"],
)
def test_weight_gradient(specs: list[str]) -> None:
    """Against the whole product: devices' shares are added in float32, and lie where the weight does."""
    on_devices(8, f"test_meshes.check_weight_gradient({specs})")


@pytest.mark.slow
def test_gradients_are_summed_in_float32(tmp_path: Path) -> None:
    """As the Trainer's ranks sum them, though matmuls are in bfloat16."""
    flags = (f"--xla_dump_to={tmp_path}", "--xla_dump_hlo_pass_re=spmd-partitioning")
    on_devices(8, f"test_meshes.check_types({str(tmp_path)!r})", *flags)


@pytest.mark.slow
def test_collectives() -> None:
    on_devices(8, "test_meshes.check_collectives()")


@pytest.mark.slow
def test_placement() -> None:
    on_devices(8, "test_meshes.check_placement()")


def tell_many() -> None:
    """An update of many blocks, the digests of many arrays."""
    mesh, config, run = sharding.make_mesh(spec="fsdp=8"), LlamaConfig.from_hf(WIDE), RunOptions()
    tx = make_optimizer()
    definition = define(config, run, mesh)
    state = abstract_state(tx, definition, mesh)
    steps = Steps(definition, tx, config.vocab_size, sums=True)
    steps.compile(state, (B, T), mesh)
    placed = jax.tree.map(lambda x: x.sharding, state)
    state = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state), out_shardings=placed)()
    block = put_batch(mesh, Batch(*(np.ones((B, T), kind.dtype) for kind in abstract_batch(mesh, (B, T)))))
    _, outputs = steps.update(state, [block] * 100, sharding.put_scalar(mesh, np.float32(0)), mesh)
    assert jax.device_get(outputs[-1]["loss"]) > 0
    rows = jax.device_put(np.ones((64, 64), np.float32), sharding.row_sharding(mesh))
    assert len({*map(tuple, sums([rows] * 200).values())}) == 1


@pytest.mark.slow
def test_more_programs_than_xlas_client_takes() -> None:
    """Where they exchange something, XLA's client of several CPUs stands still with 40 of them ahead, and ends the
    process."""
    on_devices(8, "test_meshes.tell_many()")


# -- From one mesh to another -----------------------------------------------------------------------------------------


def moved(folder: str) -> None:
    """Begun on three devices, from a Flax folder, with more heads, F and rows of the vocabulary than the model has;
    gone on with on two, and on one."""
    out = Path(folder) / "out"
    flags = {
        **{"model_name_or_path": Path(folder) / "flax", "data_path": Path(folder) / "data.json", "use_cpu": True},
        **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "adam_epsilon": 1e-4},
        **{"save_steps": 1, "hf_compat": "5", "lr_scheduler_type": "constant"},
    }
    argv = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    with laid_out(ONE):
        assert run(train_jax.main, *argv, "--output_dir", Path(folder) / "whole").code == 0
    for spec, last in (("tensor=3", 1), ("fsdp=2", 2), (ONE, 3)):
        with laid_out(spec):
            more = ["--resume_from_checkpoint", "True"] if last > 1 else []
            outcome = run(train_jax.main, *argv, "--output_dir", out, *more, "--max_steps", last)
            assert outcome.code == 0, outcome.err
            assert f"mesh {spec}" in outcome.err
    weights = [load_file(path / "model.safetensors") for path in (out, Path(folder) / "whole")]
    assert worst(*weights) <= 1e-5  # as derived in test_training.py's test_any_run_is_torchs


@pytest.mark.slow
def test_another_mesh(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {**RAW, "attention_bias": True})
    outcome = run(convert_torch_to_flax.main, "--model_name_or_path", model, "--output_dir", tmp_path / "flax")
    assert outcome.code == 0, outcome.err
    write_json(tmp_path / "data.json", make_records(12))
    on_devices(8, f"test_meshes.moved({str(tmp_path)!r})")


# -- Answers ----------------------------------------------------------------------------------------------------------


def answers(folder: str) -> None:
    flags = ["--model_name_or_path", folder, "--instruction", "Name three fish.", "--max_new_tokens", "24", "--use_cpu"]
    one, eight, *refused = (
        run(generate.main, *flags, *(("--mesh", mesh) if mesh else ()))
        for mesh in ("", "tensor=-1", "fsdp=4,tensor=2", "context=2,tensor=4")
    )
    assert one.code == eight.code == 0, eight.err
    assert one.out == eight.out and len(one.out) > 10
    for outcome in refused:
        assert outcome.code == 2 and "can be divided over tensor only" in outcome.err.splitlines()[-1]


@pytest.mark.slow
def test_answers_of_eight_devices(tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path / "model"))
    on_devices(8, f"test_meshes.answers({str(folder)!r})")
