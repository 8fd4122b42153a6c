"""Adapters beside PEFT: the real Trainer with the installed PEFT, live, and both folders in each other's loader."""

import itertools
import json
import math
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from golden_adapters import WIDE
from hf_trainer import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_live import DEFAULTS, same_log, same_run, spelled, train_ours
from tiny import (
    ALPACA,
    CONFIG,
    ROOT,
    drawn_cases,
    log_entries,
    make_records,
    run,
    slow_unless,
    write_json,
    write_model,
    write_tokenizer,
)
from transformers import AutoModelForCausalLM

import convert_torch_to_flax
import train_jax
from llama_jax.command import generate
from llama_jax.distributed import sharding
from llama_jax.distributed.digest import mixed
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions, _block_function
from llama_jax.model.lora import Adapter, Lora, Rank, _drawn
from llama_jax.setup.adapters import _modules
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import abstract_state
from llama_jax.training.step import Steps

Flags = dict[str, Any]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# The flags of a quantized base, and the keywords of transformers' BitsAndBytesConfig that mean the same.
QUANTIZATIONS: dict[str, tuple[Flags, Flags]] = {
    "nf4": ({"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nested nf4": (
        {"load_in_4bit": True, "use_bnb_nested_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "int8": ({"load_in_8bit": True}, {"load_in_8bit": True}),
}


class Bench(NamedTuple):
    """`wide` may be quantized."""

    server: Server
    folder: Path
    model: Path
    wide: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("adapters")
    server = Server("5")
    yield Bench(server, folder, write_model(folder / "model"), write_model(folder / "wide", WIDE))
    server.close()


def settings_of(flags: Flags) -> dict[str, Any]:
    """PEFT's keywords for the flags."""
    names = {"lora_r": "r", "lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save"}
    values = {names.get(name, name): value for name, value in flags.items()}
    values.setdefault("r", 16)
    values.setdefault("lora_alpha", 32)
    return {**values, "task_type": "CAUSAL_LM"}


def words(flags: Flags) -> list[str]:
    result = []
    for name, value in flags.items():
        result += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return result


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Flags, Flags, int]:
    """Flags of the adapter, of the Trainer, and a number of records."""
    targets = st.one_of(
        st.none(),
        st.just("all-linear"),
        st.lists(st.sampled_from(PROJECTIONS), min_size=1, max_size=4, unique=True),
        st.sampled_from([r".*\.0\..*(q|down)_proj", r".*mlp\.(up|down)_proj"]),
    )
    adapter = {
        "lora_r": draw(st.integers(1, 8)),
        "lora_alpha": draw(st.integers(1, 32)),
        "lora_dropout": 0.0,  # torch's draws are others
        "lora_target_modules": draw(targets),
        "lora_modules_to_save": draw(st.sampled_from([None, None, ["lm_head"], ["embed_tokens", "lm_head"]])),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
    }
    trainer = {
        "max_steps": draw(st.integers(5, 7)),
        "per_device_train_batch_size": draw(st.integers(1, 3)),
        "gradient_accumulation_steps": draw(st.integers(1, 3)),
        "lr_scheduler_type": draw(st.sampled_from(["linear", "cosine", "constant_with_warmup"])),
        "warmup_steps": draw(st.integers(0, 2)),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "max_grad_norm": draw(st.sampled_from([0.0, 0.05, 1.0])),
        "optim": draw(st.sampled_from(["adamw_torch", "adamw_torch", "sgd"])),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "save_strategy": "no",
    }
    return {k: v for k, v in adapter.items() if v is not None and v is not False}, trainer, draw(st.integers(9, 14))


def compare(bench: Bench, adapter: Flags, trainer: Flags, count: int, quantization: str | None = None) -> None:
    """Run both, and compare losses, norms, log, adapters, and the folders as each loader reads them. A base of
    `quantization` is bitsandbytes' in the Trainer."""
    model, ours_too, theirs_too = bench.model, Flags(), Flags()
    if quantization:
        model, (ours_too, theirs_too) = bench.wide, QUANTIZATIONS[quantization]
    with tempfile.TemporaryDirectory(dir=bench.folder) as directory:
        folder = Path(directory)
        data = write_json(folder / "data.json", make_records(count, seed=count))
        argv = spelled("5", trainer)
        print("on", count, "records with", *words(adapter), *argv)
        spec = {"argv": argv, "model": str(model), "data": str(data), "output_dir": str(folder / "hf")}
        spec |= {"quantization": theirs_too} if quantization else {}
        hf = bench.server.train({**spec, "attn": "eager", "peft": settings_of(adapter)})
        assert "error" not in hf, hf
        out = folder / "ours"
        paths = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(out)]
        flags = words({"use_cpu": True, "hf_compat": 5, "use_peft": True, **adapter, **ours_too})
        ours = train_ours([*paths, *flags, *argv], out)
        same_run(ours, hf, load_file(folder / "hf/adapter/adapter_model.safetensors"))
        same_log(ours, hf, "5")
        theirs, mine = (peft.PeftModel.from_pretrained(base_of(model), f) for f in (folder / "hf/adapter", out))
        ids = list(range(3, 40))
        # Adapters are equal to 1e-5; a logit sums 32 hidden entries of size 1 over two layers.
        np.testing.assert_allclose(logits(mine, ids), logits(theirs, ids), atol=1e-3)


@pytest.mark.slow
@settings(max_examples=drawn_cases(25))
@given(jobs())
def test_drawn_runs(bench: Bench, job: tuple[Flags, Flags, int]) -> None:
    compare(bench, *job)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.slow
def test_quantized_base(bench: Bench, quantization: str) -> None:
    """The curve of the Trainer with PEFT over bitsandbytes' layers."""
    adapter = {"lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "use_dora": quantization == "nested nf4"}
    adapter |= {"lora_target_modules": ["q_proj", "down_proj"]}
    compare(bench, adapter, {"max_steps": 5, "save_strategy": "no"}, 11, quantization)


@pytest.mark.slow
@settings(max_examples=drawn_cases(10))
@given(jobs(), st.sampled_from([*QUANTIZATIONS]))
def test_drawn_runs_over_quantized_bases(bench: Bench, job: tuple[Flags, Flags, int], quantization: str) -> None:
    if quantization == "int8":
        job[0].pop("use_dora", None)  # PEFT 0.21 ends with a traceback on the CPU
    compare(bench, *job, quantization)


# -- What is done with an adapter -------------------------------------------------------------------------------------


def trained(folder: Path, out: str, **flags: Any) -> Path:
    """Train six updates of an adapter in this process."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_json(folder / "data.json", make_records(20))
    paths = {"model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out}
    flags = {"use_cpu": True, "hf_compat": 5, "use_peft": True, "max_steps": 6, "lora_r": 4, "lora_alpha": 32, **flags}
    flags = {**DEFAULTS, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_steps": 3, **paths, **flags}
    outcome = run(train_jax.main, *words({k: v for k, v in flags.items() if v is not None}))
    assert outcome.code == 0, outcome.err
    assert "trained adapter is in" in outcome.err
    return folder / out


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("scan_layers", [slow_unless(False, False), True])
def test_resumed_runs_are_the_same(scan_layers: bool, tmp_path: Path) -> None:
    """With dropout, whose draws are of the update; checkpoints hold the adapter and its moments alone."""
    flags = {"lora_target_modules": "all-linear", "use_dora": True, "scan_layers": scan_layers}
    flags |= {
        "gradient_accumulation_steps": 2,
        "max_tokens_per_device": 128,
        "lora_dropout": 0.2,
        "max_steps": 4,
        "save_steps": 2,
    }
    whole = trained(tmp_path, "whole", **flags)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    part = trained(tmp_path, "part", **flags, resume_from_checkpoint=True)
    expected, found = tensors(whole), tensors(part)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
    held = json.loads((whole / "checkpoint-2" / "state" / "_METADATA").read_text())["tree_metadata"]
    arrays = [name for name in held if "weight" in name]
    assert len(arrays) == 3 * (len(expected) // 2 if scan_layers else len(expected))
    assert all("'lora_" in name for name in arrays)
    other = trained(tmp_path, "other", **{**flags, "lora_dropout": 0.0})
    assert any(not np.array_equal(array, expected[name]) for name, array in tensors(other).items())


def test_draws_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update, block, layer and projection has its own."""
    keys: list[int] = []

    def draw(key: jax.Array, probability: float, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda key: keys.append(int(key)), key)
        return _drawn(key, probability, x)

    monkeypatch.setattr("llama_jax.model.lora._drawn", draw)
    _block_function.cache_clear()
    blocks = {"gradient_accumulation_steps": 2, "packing": False, "accumulation": "sum"}
    trained(tmp_path, "out", lora_target_modules=["q_proj", "down_proj"], lora_dropout=0.2, max_steps=2, **blocks)
    jax.effects_barrier()
    _block_function.cache_clear()
    assert len({*keys}) == 2 * 2 * CONFIG["num_hidden_layers"] * 2


@pytest.mark.parametrize("dora", [slow_unless(False, False), True])
def test_merged(dora: bool, tmp_path: Path) -> None:
    """The merged folder is PEFT's `merge_and_unload` in float32; its logits are the adapter's."""
    out = trained(tmp_path, "out", lora_target_modules=["q_proj", "down_proj"], use_dora=dora, lora_dropout=0.0)
    argv = ["--model_name_or_path", tmp_path / "model", "--merge_adapter", out, "--output_dir", tmp_path / "merged"]
    done = run(convert_torch_to_flax.main, *argv)
    assert done.code == 0, done.err
    model = peft.PeftModel.from_pretrained(base_of(tmp_path / "model"), out)
    ids = list(range(3, 40))
    before = logits(model, ids)
    expected = model.merge_and_unload().state_dict()
    for name, array in load_file(tmp_path / "merged" / "model.safetensors").items():
        # Weights are of size 0.1, products of four terms: a few roundings of 2**-24 each.
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=0, atol=1e-7, err_msg=name)
    # 32 terms of size 1 a product, over some ten products: 320 roundings.
    np.testing.assert_allclose(
        logits(base_of(tmp_path / "merged"), ids), before, atol=320 * 2**-24 * np.abs(before).max()
    )


def test_trained_further(tmp_path: Path) -> None:
    """A PEFT folder's adapter starts where it was: its first loss is the loss under PEFT."""
    out = trained(tmp_path, "out", lora_modules_to_save=["lm_head"], lora_dropout=0.0, max_steps=3)
    further = {"adapter_name_or_path": out, "use_peft": None, "lora_r": None, "lora_alpha": None, "max_steps": 1}
    again = trained(tmp_path, "again", **further, train_sampling_strategy="sequential")
    (first,) = (entry["loss"] for entry in log_entries(again))
    model = peft.PeftModel.from_pretrained(base_of(tmp_path / "model"), out)
    total, count = 0.0, 0
    for record in json.loads((tmp_path / "data.json").read_text())[:2]:
        labels = torch.tensor(record["labels"][1:])
        scores = torch.tensor(logits(model, record["input_ids"])[:-1])
        total += float(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"))
        count += int((labels != -100).sum())
    np.testing.assert_allclose(first, total / count, rtol=1e-5)
    settings = json.loads((again / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 32 and settings["modules_to_save"] == ["lm_head"]


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    """Under --bf16 the adapter stays in float32, and its curve is that of float32 to bfloat16's precision."""
    flags = {"lora_target_modules": "all-linear", "lora_dropout": 0.0}
    logs = []
    for name, more in (("exact", {}), ("bf16", {"bf16": True}), ("base", {"bf16": True, "dtype": "bfloat16"})):
        out = trained(tmp_path, name, **flags, **more, max_steps=3, save_strategy="no")
        logs.append([entry["loss"] for entry in log_entries(out)])
        assert {array.dtype for array in tensors(out).values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(logs[1], logs[0], rtol=2e-2)
    np.testing.assert_allclose(logs[2], logs[0], rtol=2e-2)


@pytest.mark.parametrize("dora", [False, True])
def test_types_of_frozen_parameters(dora: bool) -> None:
    """Projections are rounded once; what is exported beside an adapter, added or normed is not."""
    config, lora = LlamaConfig.from_hf(CONFIG), Lora((((0, "self_attn.q_proj"), Rank(4, 1.0)),), use_dora=dora)
    params: Any = define(config, RunOptions(compute_dtype=jnp.bfloat16, lora=lora), sharding.make_mesh()).params
    layer = params["layers"][1]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert layer["self_attn"][name]["weight"].dtype == (jnp.float32 if dora else jnp.bfloat16)
    others = [params["embed_tokens"], params["lm_head"], params["norm"], layer["input_layernorm"]]
    assert {other["weight"].dtype for other in others} == {jnp.dtype(jnp.float32)}


def test_no_gradient_of_a_frozen_matrix() -> None:
    """The compiled update has no product of the shape of a frozen weight, and the plain one has. A's of the same input
    are one product."""
    config, mesh = LlamaConfig.from_hf({**CONFIG, "intermediate_size": 80}), sharding.make_mesh()
    lora = Lora(
        tuple(((i, p), Rank(4, 1.0)) for i in range(2) for p in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
    )
    products, shared = [], []
    for run_options in (RunOptions(lora=lora), RunOptions()):
        definition = define(config, run_options, mesh)
        tx = make_optimizer("sgd")
        steps = Steps(definition, tx, config.vocab_size)
        steps.compile(abstract_state(tx, definition, mesh), (1, 128), mesh)
        (program,) = steps.programs.values()
        text = program.as_text()
        products.append(len(re.findall(r"f32\[(?:80,32|32,80)\]\S* (?:dot|custom-call)\(", text)))
        shared.append(len(re.findall(r"f32\[(?:1,)?128,8\]\S* (?:dot|custom-call)\(", text)))
    assert products[0] == 0
    assert products[1] >= 3 * 2  # gate, up, down of two layers
    assert shared == [2, 0]  # of both ranks of 4, in each layer


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout(p: float) -> None:
    """Elements are dropped with probability p, the others divided by 1 - p, anew for each projection, update and block;
    outside training none is."""
    mesh, rank, size = sharding.make_mesh(), Rank(64, 1.0), 64
    lora = Lora((((0, "x"), rank),), dropout=p)
    x, zero = jnp.ones((1, 512, size)), jnp.zeros((1, 512, size))
    with jax.set_mesh(mesh):
        masks = []
        for number in (0, 1):
            adapter = Adapter((size, size), False, rank, lora, jnp.float32, number)
            adapter.lora_A.weight[...] = jnp.eye(size)
            adapter.lora_B.weight[...] = jnp.eye(size)
            np.testing.assert_array_equal(adapter(x, zero, None, None), x)
            for key in mixed(jnp.arange(2, dtype=jnp.uint32)):
                masks.append(np.asarray(adapter(x, zero, None, key)))
    for mask in masks:
        assert {*np.unique(mask).tolist()} == {0.0, float(np.float32(1) / np.float32(1 - p))}
        # 5 standard deviations of a mean of 32,768 draws.
        assert abs((mask == 0).mean() - p) < 5 * math.sqrt(p * (1 - p) / mask.size)
        assert np.abs((mask == 0).mean(axis=(0, 1)) - p).max() < 6 * math.sqrt(p * (1 - p) / 512)
    for a, b in itertools.combinations(masks, 2):
        both = ((a == 0) & (b == 0)).mean()
        assert abs(both - p * p) < 6 * math.sqrt(p * p * (1 - p * p) / a.size)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"use_peft": None, "lora_r": 4}, "--lora_r: all parameters are trained without adapters; add --use_peft True"),
        (
            {"lora_target_modules": ["query"]},
            "target_modules names 'query', which is no module of this model",
        ),
        (
            {"lora_target_modules": ["q_proj", "lm_head"]},
            "matches lm_head, which cannot have an adapter here",
        ),
        ({"lora_target_modules": "(q_proj"}, "target_modules '(q_proj' is no regular expression"),
        (
            {"lora_modules_to_save": ["norm"]},
            "modules_to_save names 'norm'; only embed_tokens and lm_head",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; should be true, false or gaussian"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5; should be a number from 0 to below 1"),
        (
            {"adapter_name_or_path": "gs://b/a", "lora_r": None, "lora_alpha": None},
            "--adapter_name_or_path gs://b/a: is not",
        ),
        ({"lora_r": 0}, "r is 0; should be a whole number above 0"),
        ({"adapter_name_or_path": "/nowhere"}, "has its own settings"),
        ({"adapter_name_or_path": "/nowhere", "lora_r": None, "lora_alpha": None}, "/nowhere: no adapter_config.json"),
        ({"load_in_4bit": True}, "self_attn.q_proj: 4 bits need a multiple of 64 inputs, but the matrix has 32; use"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "a model is kept in one format; give one of them"),
        (
            {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
            "--bnb_4bit_quant_type fp4: 4 bits are held as nf4 only",
        ),
        ({"load_in_8bit": True, "use_bnb_nested_quant": True}, "belongs to --load_in_4bit True; add it, or leave this"),
        ({"load_in_8bit": True, "use_peft": None, "lora_r": None, "lora_alpha": None}, "quantized weights cannot be"),
        (
            {"lora_target_modules": r".*\.0\..*_proj", "scan_layers": True},
            "--scan_layers True: stacked layers need the same",
        ),
    ],
)
def test_refused(flags: Flags, line: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_json(tmp_path / "data.json", make_records(4))
    paths = {
        "model_name_or_path": tmp_path / "model",
        "data_path": tmp_path / "data.json",
        "output_dir": tmp_path / "o",
    }
    flags = {**paths, "use_peft": True, "lora_r": 4, "lora_alpha": 8, "use_cpu": True, **flags}
    outcome = run(train_jax.main, *words({k: v for k, v in flags.items() if v is not None}))
    assert outcome.code == 2
    assert line in outcome.err.splitlines()[-1], outcome.err
    assert not list((tmp_path / "o").glob("*")) if (tmp_path / "o").exists() else True


def test_new_tokens(tmp_path: Path) -> None:
    """A tokenizer without a pad token adds a row, as in the full job. The folder has the embedding and the head, as
    PEFT saves them; PEFT, the merged folder and this program read it."""
    write_tokenizer(write_model(tmp_path / "model"), pad_token=None)
    data = write_json(tmp_path / "alpaca.json", ALPACA * 2)
    out = trained(tmp_path, "out", data_path=data, lora_dropout=0.0)
    rows = CONFIG["vocab_size"] + 1
    head = tensors(out)["base_model.model.lm_head.weight"]
    before = load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(head[:-1], before)
    np.testing.assert_allclose(head[-1], before.mean(axis=0), atol=1e-6)
    base = base_of(tmp_path / "model")
    base.resize_token_embeddings(rows)
    model = peft.PeftModel.from_pretrained(base, out)
    argv = ["--model_name_or_path", tmp_path / "model", "--merge_adapter", out, "--output_dir", tmp_path / "merged"]
    merged = run(convert_torch_to_flax.main, *argv, "--tokenizer_name", out)
    assert merged.code == 0, merged.err
    ids = [258, 3, 4, rows - 1, 5]
    expected = logits(model, ids)
    np.testing.assert_allclose(logits(base_of(tmp_path / "merged"), ids), expected, atol=320 * 2**-24 * 30)
    further = {"adapter_name_or_path": out, "use_peft": None, "lora_r": None, "lora_alpha": None, "data_path": data}
    trained(tmp_path, "again", **further, max_steps=1)


@pytest.mark.slow
def test_a_resized_adapter_is_resumed(tmp_path: Path) -> None:
    """Frozen rows that the PEFT folder holds are the folder's in the resumed run too, not the mean of the model's."""
    write_tokenizer(write_model(tmp_path / "model"), pad_token=None)
    flags: Flags = {"data_path": write_json(tmp_path / "alpaca.json", ALPACA * 2), "lora_dropout": 0.0}
    first = trained(tmp_path, "first", **flags, max_steps=1)
    name, arrays = "base_model.model.lm_head.weight", tensors(first)
    arrays[name] = arrays[name].copy()
    arrays[name][-1] *= 3
    save_file(arrays, first / "adapter_model.safetensors", metadata={"format": "pt"})
    flags |= {"adapter_name_or_path": first, "use_peft": None, "lora_r": None, "lora_alpha": None, "max_steps": 2}
    flags |= {"lora_dropout": None, "save_steps": 1}
    whole = trained(tmp_path, "whole", **flags)
    shutil.copytree(whole / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
    expected, found = tensors(whole), tensors(trained(tmp_path, "part", **flags, resume_from_checkpoint=True))
    np.testing.assert_array_equal(expected[name], arrays[name])
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, key)


@pytest.mark.slow
def test_a_quantized_run_is_resumed(tmp_path: Path) -> None:
    """From the same quantized base, with the flags of its base alone; a Flax folder is refused."""
    write_model(tmp_path / "model", WIDE)
    write_json(tmp_path / "data.json", make_records(20))
    flags = {"load_in_4bit": True, "use_bnb_nested_quant": True, "scan_layers": True, "bf16": True}
    flags |= {"max_steps": 2, "save_steps": 1}
    whole = trained(tmp_path, "whole", **flags)
    shutil.copytree(whole / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
    argv = {"model_name_or_path": tmp_path / "model", "data_path": tmp_path / "data.json", "use_cpu": True}
    argv |= {"output_dir": tmp_path / "part", "use_peft": True, "lora_r": 4, "hf_compat": 5, **flags}
    outcome = run(train_jax.main, *words({**argv, "use_bnb_nested_quant": False, "resume_from_checkpoint": True}))
    assert outcome.code == 2
    assert "it has use_bnb_nested_quant True, this one False; give the same flags as then" in outcome.err
    expected, found = tensors(whole), tensors(trained(tmp_path, "part", **flags, resume_from_checkpoint=True))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
    flax = tmp_path / "flax"
    assert run(convert_torch_to_flax.main, "--model_name_or_path", tmp_path / "model", "--output_dir", flax).code == 0
    outcome = run(train_jax.main, *words({**argv, "model_name_or_path": flax, "output_dir": tmp_path / "new"}))
    assert outcome.code == 2
    assert "is a Flax folder; projections are quantized while an HF folder is read" in outcome.err


def test_a_flax_folder(tmp_path: Path) -> None:
    """Its frozen matrices have the types of an HF folder's: the same adapter, bit for bit."""
    flags = {"bf16": True, "max_steps": 2, "save_strategy": "no", "lora_dropout": 0.0}
    expected = tensors(trained(tmp_path, "out", **flags))
    argv = ["--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "flax"]
    assert run(convert_torch_to_flax.main, *argv).code == 0
    found = tensors(trained(tmp_path, "from-flax", **flags, model_name_or_path=tmp_path / "flax"))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/adapters.md, one after the other."""
    write_tokenizer(write_model(tmp_path / "HF_DIR"))
    write_json(tmp_path / "alpaca_data.json", ALPACA * 2)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "adapters.md").read_text(), re.DOTALL)
    answers = []
    for line in block.replace("\\\n", " ").splitlines():
        _, *command = shlex.split(line)
        main = {"train_jax.py": train_jax.main, "convert_torch_to_flax.py": convert_torch_to_flax.main}.get(command[0])
        argv = [*command[1:], "--use_cpu", "True", "--max_steps", "2"] if main is train_jax.main else command[1:]
        if main is None:
            assert command[:2] == ["-m", "llama_jax.generate"]
            main, argv = generate.main, [*command[2:], "--use_cpu", "--max_new_tokens", "8"]
        outcome = run(main, *argv)
        assert outcome.code == 0, outcome.err
        answers.append(outcome.out)
    asked = ("--model_name_or_path", "merged", "--instruction", "Name three fish.")
    merged = run(generate.main, *asked, "--use_cpu", "--max_new_tokens", "8")
    assert merged.out == answers[1]


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    out = trained(tmp_path, "out")
    argv = ["--model_name_or_path", tmp_path / "model", "--data_path", tmp_path / "data.json", "--output_dir", out]
    argv += ["--use_cpu", "True", "--hf_compat", "5", "--max_steps", "6", "--resume_from_checkpoint", "True"]
    for more, line in (
        ([], "trains an adapter, this run trains all parameters"),
        (
            ["--use_peft", "True", "--lora_r", "8", "--lora_alpha", "32"],
            "holds another adapter: it has r 4, this one 8",
        ),
    ):
        outcome = run(train_jax.main, *argv, *more)
        assert outcome.code == 2 and line in outcome.err, outcome.err
    arrays = load_file(tmp_path / "model" / "model.safetensors")
    arrays["model.layers.1.mlp.up_proj.weight"][3, 5] *= 1 + 2**-23
    write_model(tmp_path / "model", CONFIG, arrays)
    outcome = run(train_jax.main, *argv, "--use_peft", "True", "--lora_r", "4", "--lora_alpha", "32")
    assert outcome.code == 2 and "checkpoint-6 holds an adapter of another base model (digest " in outcome.err


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["[q_proj,v_proj]"], ["q_proj", "v_proj"]),  # alpaca-lora's
        (["['q_proj',", "'v_proj']"], ["q_proj", "v_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (None, None),
    ],
)
def test_spellings_of_target_modules(given: list[str] | None, read: Any) -> None:
    assert _modules(given) == read
