"""`--dry_run`: what it says of state and traffic against sums of our own, and its verdicts."""

import dataclasses
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import CONFIG, ROOT, SISTERS, Outcome, hf_shapes, make_records, run, write_json, write_model

import train_jax
from llama_jax.distributed.platform import MEMORY_SHARE, TPU_OPTIONS
from llama_jax.distributed.sharding import bytes_on_device
from llama_jax.hf.source import Source
from llama_jax.model.config import LlamaConfig
from llama_jax.plan.chips import CHIPS, Named, find_topology
from llama_jax.plan.dry_run import make_planner
from llama_jax.plan.hlo import Program
from llama_jax.plan.operations import operations
from llama_jax.plan.planner import Option, Planner
from llama_jax.setup.arguments import parse_arguments

FLAGS = ["--bf16", "True", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"]
MODELS = {  # of configs/, by the beginnings of their names
    "alpaca_7b": "llama-7b",
    "alpaca_13b": "llama-13b",
    "alpaca_70b": "llama-2-70b",
    "llama3_8b": "llama-3-8b",
}


def raw_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "benchmarks" / "make_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.raw_config(shape, layers)


def write_case(folder: Path, raw: dict[str, Any], count: int = 600, length: int | None = None) -> list[str]:
    """A model of which only the config is there, and records as long as Alpaca's, or of `length`; returns the flags."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    write_json(model / "config.json", raw)
    rng = np.random.default_rng(0)
    drawn = np.clip(rng.lognormal(math.log(100), 0.6, count), 20, 512).astype(int)
    lengths = drawn if length is None else np.full(count, length)
    records = [{"input_ids": [7] * n, "labels": [-100] * (n // 2) + [7] * (n - n // 2)} for n in map(int, lengths)]
    data = write_json(folder / "data.json", records)
    paths = ("--model_name_or_path", model, "--data_path", data, "--output_dir", folder / "out")
    return [str(part) for part in paths]


def dry_run(folder: Path, raw: dict[str, Any], *flags: Any) -> Outcome:
    outcome = run(train_jax.main, *write_case(folder, raw), *FLAGS, *flags)
    assert not (folder / "out").exists()
    return outcome


def row(text: str, name: str) -> float:
    found = re.search(rf"^ +{re.escape(name)} +([\d.,]+)", text, re.M)
    assert found, (name, text)
    return float(found[1].replace(",", ""))


def test_gpus_by_arithmetic(tmp_path: Path) -> None:
    """Only config.json is there, nothing is compiled or written, and what a device holds is an eighth."""
    raw = raw_config("llama-7b") | {"num_hidden_layers": 8}
    outcome = dry_run(tmp_path, raw, "--dry_run", "h200:8")
    assert outcome.code == 0 and outcome.compiled == 0, outcome.err
    assert "attention by cudnn" in outcome.out and "an estimate by arithmetic, nothing was compiled" in outcome.out
    parameters = sum(math.prod(shape) for shape in hf_shapes(raw).values())
    for name, size in (("parameters", 4), ("optimizer's state", 8)):
        assert row(outcome.out, name) == pytest.approx(parameters * size / 8 / 2**30, abs=0.006), name


@pytest.mark.parametrize("name", ["mistral, window", "qwen3, biases"])
def test_sister_models(name: str, tmp_path: Path) -> None:
    raw = {**CONFIG, **SISTERS[name]}
    outcome = dry_run(tmp_path, raw, "--dry_run", "h200:2")
    assert outcome.code == 0, outcome.err
    assert f"model: {sum(math.prod(shape) for shape in hf_shapes(raw).values()):,} parameters" in outcome.out


def test_the_kernel_under_determinism(tmp_path: Path) -> None:
    outcome = dry_run(tmp_path, {**CONFIG, "head_dim": 64}, "--dry_run", "h200:1", "--full_determinism", "True")
    assert outcome.code == 0 and "attention kernel: xla (cudnn's packed gradient does not run" in outcome.err


def test_operations_of_a_window() -> None:
    """Attention counts the keys that a mask shows, but for half of the diagonal."""
    L, width = CONFIG["num_hidden_layers"], CONFIG["hidden_size"]
    full = operations(LlamaConfig.from_hf(CONFIG), 64, 64, "none")[0]
    q, k = np.indices((64, 64))
    for window in (1, 5, 63, 64, 300, None):
        config = LlamaConfig.from_hf({**CONFIG, "model_type": "mistral", "sliding_window": window})
        hidden = 64 * 64 / 2 - (((k <= q) & (q - k < (window or 64))).sum() - min(window or 64, 64) / 2)
        assert operations(config, 64, 64, "none")[0] == full - 12 * L * width * hidden, window


@pytest.mark.slow
def test_what_does_not_fit_a_gpu(tmp_path: Path) -> None:
    """78 GiB of state on 80, and 26 more to save it; the next larger holds it. And flags that ask for too much.

    With a quarter of 7B's layers, of four times the size: each planner traces every layer.
    """
    raw = raw_config("llama-7b", 8) | {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64}
    raw["num_key_value_heads"] = 64
    outcome = dry_run(tmp_path, raw, "--dry_run", "h100:1")
    assert outcome.code == 3 and "h100:1: DOES NOT FIT" in outcome.out and outcome.out.strip().endswith("h100:2")
    asked = ["--remat", "none", "--max_tokens_per_device", "40000", "--gradient_accumulation_steps", "256"]
    outcome = dry_run(tmp_path, raw, "--dry_run", "h200:1", *asked)
    assert outcome.code == 3, outcome.out
    change = re.search(r"what fits, with the same examples in an update: (.*)", outcome.out)
    assert change, outcome.out
    changed = dry_run(tmp_path, raw, "--dry_run", "h200:1", *asked, *shlex.split(change[1]))
    assert changed.code == 0 and "256 examples" in changed.out, changed.out


def test_ways_out_and_little_to_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change that would help has its memory: the larger dry run has the same figure for two devices."""
    raw = {**CONFIG, "hidden_size": 4096, "intermediate_size": 65536, "num_hidden_layers": 8, "head_dim": 128}
    outcome = dry_run(tmp_path, raw, "--dry_run", "h100:1", "--learning_rate", "2e-5")
    assert outcome.code == 3, outcome.out
    section = outcome.out.split("by arithmetic, a device needs of its 76.93 GiB, with one change:\n")[1]
    ways = re.findall(r"^ +([\d.]+)  (.*?) \((fits|not enough alone)(.*)\)$", section, re.M)
    told = {text: (float(size), verdict, note) for size, text, verdict, note in ways}
    assert told["2 devices"][1:] == ("fits", ", the same updates with --world_size 1")
    assert told["--dtype bfloat16"][2] == "; steps of --learning_rate 2e-05 do not move parameters above 0.01"
    assert [told[f"--optim {name}"][1] for name in ("sgd", "adafactor")] == ["fits"] * 2
    assert told["--optim lion_32bit"] > told["--optim sgd"]

    fits = r"h100:1: fits: ([\d.]+) of "
    outcome = dry_run(tmp_path, raw, "--dry_run", "h100:1", "--optim", "sgd")
    assert outcome.code == 0 and "to spare" not in outcome.out
    needed = float(re.search(fits, outcome.out)[1]) * 2**30  # type: ignore[index]
    for spare, said in ((0.019, True), (0.021, False)):
        small = dataclasses.replace(CHIPS["h100"], memory=int(needed / (1 - spare) / MEMORY_SHARE) + 2**24)
        monkeypatch.setitem(CHIPS, "h100", small)
        outcome = dry_run(tmp_path, raw, "--dry_run", "h100:1", "--optim", "sgd")
        assert outcome.code == 0 and ("of a device's memory is to spare: another process" in outcome.out) == said


def test_larger_ones_that_do_not_divide_the_model(tmp_path: Path) -> None:
    """They are passed over: the verdict stays one."""
    raw = {**CONFIG, "hidden_size": 6147, "intermediate_size": 160_000, "num_hidden_layers": 3, "head_dim": 128}
    outcome = dry_run(tmp_path, raw, "--dry_run", "h100:1")
    assert outcome.code == 3 and outcome.out.strip().endswith("fits, nor any larger h100"), (outcome.out, outcome.err)
    assert outcome.err.count("data: ") == outcome.err.count("attention kernel: cudnn") == 1  # not of each plan tried


@pytest.mark.slow
def test_another_mesh_keeps_the_batch(tmp_path: Path) -> None:
    raw = raw_config("llama-7b")
    outcome = dry_run(tmp_path, raw, "--dry_run", "h100:8", "--mesh", "data=8")
    assert outcome.code == 3 and "64 examples" in outcome.out
    change = re.search(r"an update: (.*)", outcome.out)
    assert change and change[1].endswith("--mesh fsdp=8"), outcome.out
    changed = dry_run(tmp_path, raw, "--dry_run", "h100:8", *shlex.split(change[1]))
    assert changed.code == 0 and "64 examples" in changed.out


def test_bad_input(tmp_path: Path) -> None:
    for name in ("v5x-4", ""):
        outcome = dry_run(tmp_path, CONFIG, "--dry_run", name)
        assert outcome.code == 2 and "no such topology; known are" in outcome.err
    outcome = dry_run(tmp_path, CONFIG, "--dry_run", "h200:8", "--mesh", "fsdp=3")
    assert outcome.code == 2 and "--mesh fsdp=3" in outcome.err
    untyped = {k: v for k, v in CONFIG.items() if k != "torch_dtype"}
    outcome = dry_run(tmp_path, untyped, "--dry_run", "h200:1", "--hf_compat", "5")
    assert outcome.code == 2 and "give --dtype" in outcome.err
    outcome = dry_run(tmp_path, CONFIG, "--dry_run", "h200:1", "--bf16", "False", "--gradient_sum_dtype", "bfloat16")
    assert outcome.code == 2 and "needs --bf16 True" in outcome.err


def test_a_whole_folder_and_a_real_run_still_need_weights(tmp_path: Path) -> None:
    flags = write_case(tmp_path, CONFIG)
    outcome = run(train_jax.main, *flags)
    assert outcome.code == 2 and "no model.safetensors" in outcome.err
    write_model(tmp_path / "model", CONFIG)
    write_json(tmp_path / "data.json", make_records(20))
    assert run(train_jax.main, *flags, "--dry_run", "h200:1").code == 0


@pytest.mark.slow
def test_a_tiny_model_on_a_tpu(libtpu: None, tmp_path: Path) -> None:
    """Compiled for the slice with its kernel; no verdict at low effort."""
    raw = {**CONFIG, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    outcome = dry_run(tmp_path, raw, "--dry_run", "v5e-4", "--dry_run_effort", "fast")
    assert outcome.code == 0 and outcome.compiled == 1 + len(TPU_OPTIONS["TPU v5 lite"]), outcome.err  # each is tried
    for wanted in ("attention by splash", "4 x TPU v5 lite", "over fsdp", "gives no verdict on memory"):
        assert wanted in outcome.out, outcome.out
    assert "peak" not in outcome.out


@pytest.mark.slow
def test_a_tiny_model_at_full_effort(libtpu: None, tmp_path: Path) -> None:
    raw = {**CONFIG, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    option = "xla_tpu_scoped_vmem_limit_kib=65536"
    full = dry_run(tmp_path, raw, "--dry_run", "v5e-4", "--remat", "matmuls", "--compiler_options", option)
    assert full.code == 0 and re.search(r"v5e-4: fits: [\d.]+ of 15.43 GiB", full.out), full.out
    assert row(full.out, "peak") < 0.2
    told = re.search("^compiler options: (.*)$", full.out, re.M)
    of_v5e = {f"{name}={value}" for name, value in TPU_OPTIONS["TPU v5 lite"].items()}
    assert told and {*told[1].split(", ")} == of_v5e | {option}, full.out
    assert re.search(r"[\d.]+ ms  by its schedule, without kernels: \d+ of work, \d+ of waiting", full.out), full.out
    assert re.search(r"[\d.]+ ms  all in the program's order, .*: \d+ of work, \d+ of waiting", full.out), full.out
    # Kept outputs and statistics: the backward pass does not run the forward kernel again.
    layers = raw["num_hidden_layers"]
    kernels = "dkv_segmented_no_residuals", "dq_segmented_no_residuals", "fwd_segmented_residuals"
    assert ", ".join(f"splash_mqa_{kernel} {layers} times" for kernel in kernels) + ")" in full.out, full.out


@pytest.mark.slow
def test_a_forward_kernel_that_is_repeated(libtpu: None, tmp_path: Path) -> None:
    """Under full recomputation, on the newest chip: its compiler's estimates and calls are told as of the others."""
    raw = {**CONFIG, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    outcome = dry_run(tmp_path, raw, "--dry_run", "tpu7x-8", "--remat", "full")
    layers = raw["num_hidden_layers"]
    called = f"splash_mqa_fwd_segmented_residuals {2 * layers} times, {layers} of them again backward)"
    assert called in outcome.out, outcome.out
    assert re.search(r"estimates of a block, at 1.90 GHz", outcome.out), outcome.out


@pytest.mark.slow
def test_what_a_tpu_sends(libtpu: None, tmp_path: Path) -> None:
    """With all devices on fsdp, weights and gradients and the norm's sums: nothing that has a place for each token."""
    raw = {**CONFIG, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 12}
    flags = write_case(tmp_path, raw)
    args = parse_arguments([*flags, *FLAGS])
    topology = find_topology("v5e-4")
    source = Source(tmp_path / "model", weights=False)
    planner = make_planner(args, source, topology, topology.devices())
    plan = planner.make(Option(2048, "full"))
    plan.compile(plan.largest_block, planner.mesh)
    program = Program(plan.steps.programs[plan.largest_block].as_text())
    found = program.collectives(planner.mesh.shape)
    assert {c.axes for c in found} == {("fsdp",)}
    B, T = plan.largest_block
    activations = {f"{B},{T},256", f"{B // 4},{T},256", f"{B * T},256"}
    assert not [c for c in found if re.search(r"\[(.*)\]", c.result)[1] in activations], found  # type: ignore[index]
    layers = sum(math.prod(shape) for name, shape in hf_shapes(raw).items() if "layers" in name)
    # Gathered forward and backward in bfloat16, scattered in float32: three of four parts, and rings' extra steps.
    of_layers = sum(c.sent * c.times for c in found if c.times >= 12)
    assert 0.74 * (2 + 2 + 4) * layers <= of_layers <= 1.5 * (2 + 2 + 4) * layers


@pytest.mark.slow
def test_what_a_tpu_sends_of_four_bits(libtpu: None, tmp_path: Path) -> None:
    """Codes and statistics are gathered forward and backward, no matrix is; only adapters' gradients are summed."""
    raw = {**CONFIG, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    raw |= {"num_hidden_layers": 12}
    flags = ["--use_peft", "True", "--lora_target_modules", "all-linear", "--lora_dropout", "0"]
    args = parse_arguments([*write_case(tmp_path, raw), *FLAGS, *flags, "--load_in_4bit", "True"])
    topology = find_topology("v5e-4")
    planner = make_planner(args, Source(tmp_path / "model", weights=False), topology, topology.devices())
    plan = planner.make(Option(2048, "matmuls"))
    level = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0")
    try:
        plan.compile(plan.largest_block, planner.mesh)
    finally:
        jax.config.update("jax_optimization_level", level)
    found = Program(plan.steps.programs[plan.largest_block].as_text()).collectives(planner.mesh.shape)
    of_layers = [c for c in found if c.times >= 12]
    weights = sum(math.prod(shape) for name, shape in hf_shapes(raw).items() if "_proj" in name)
    gathered = sum(c.sent * c.times for c in of_layers if c.kind == "all-gather")
    assert gathered == 2 * (1 / 2 + 4 / 64) * weights * 3 / 4
    summed = sum(c.sent * c.times for c in of_layers if c.kind != "all-gather")
    adapters = sum(16 * sum(shape) for name, shape in hf_shapes(raw).items() if "_proj" in name)
    assert summed <= 2 * 4 * adapters * 3 / 4 * 1.1
    assert {c.kind for c in of_layers} <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.slow
def test_refused(libtpu: None, tmp_path: Path) -> None:
    """7B on four chips of 16 GB: the state alone is more."""
    outcome = dry_run(tmp_path, raw_config("llama-7b"), "--dry_run", "v5e-4")
    assert outcome.code == 3 and outcome.compiled == 0, outcome.err
    assert "v5e-4: DOES NOT FIT" in outcome.out and "the smallest that has room is v5e-8" in outcome.out


CONFIGS = [
    (path, shlex.split(line.lstrip("# "))[-1])
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    for line in path.read_text().splitlines()
    if "--dry_run" in line
]
ADAPTERS = [(path, topology) for path, topology in CONFIGS if "use_peft" in path.read_text()]
CI = ("alpaca_7b_v6e-8",)
LONG = ROOT / "configs" / "llama3_8b_128k_v5p-128.yaml"


def model_of(path: Path) -> str:
    """The shape's name, of `make_model.py`."""
    return next(shape for name, shape in MODELS.items() if path.name.startswith(name))


def dry_run_config(folder: Path, path: Path, topology: str, *flags: str) -> Outcome:
    documents = (16, 131072) if path == LONG else (4000, None)
    paths = write_case(folder, raw_config(model_of(path)), *documents)
    return run(train_jax.main, "--config", path, *paths, "--dry_run", topology, *flags)


@pytest.mark.parametrize(
    ("path", "topology"),
    [
        pytest.param(path, topology, id=path.stem, marks=pytest.mark.slow if path.stem in CI else pytest.mark.proof)
        for path, topology in CONFIGS
        if (path, topology) not in ADAPTERS
    ],
)
def test_configs(path: Path, topology: str, libtpu: None, tmp_path: Path) -> None:
    """Each compiles for what its name says. The bytes that FSDP must send: weights gathered forward and backward in
    bfloat16, and gradients scattered in float32; half more where gradients are summed whole (64 devices of v5p), and
    the embedding and the head."""
    outcome = dry_run_config(tmp_path, path, topology, "--dry_run_effort", "fast")
    assert outcome.code == 0, outcome.err
    assert ("8 examples in at most 1 block(s) of 8 x 131,072" if path == LONG else "128 examples") in outcome.out
    if topology.startswith("h"):
        return

    def sent_over(axes: str) -> float:
        found = re.findall(rf"^ +([\d.,]+)  [a-z-]+ over {re.escape(axes)},", outcome.out, re.M)
        return sum(float(x.replace(",", "")) for x in found)

    if path == LONG:
        # Of each of its 16,384 tokens a device sends seven of eight parts to the others, in bfloat16: 32 heads of q and
        # of what comes out, 8 of k and v, forward and backward. `matmuls` keeps q, k, v and the kernel's output as the
        # kernel has them: what comes out is sent again.
        again = 32 if "--remat matmuls" in outcome.out else 0
        around = 32 * (2 * 80 + again) * 128 * 2 * 16384 * 7 / 8 / 1e6
        assert 0.99 * around < sent_over("context") < 1.01 * around, outcome.out
        return
    sent = sent_over("fsdp")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    layers = sum(math.prod(shape) for name, shape in hf_shapes(raw).items() if "layers" in name)
    devices = find_topology(topology).count
    least = (2 + 2 + 4) * layers * (devices - 1) / devices / 1e6
    assert 0.98 * least < sent < 1.6 * least, (sent, least)


def adapter_planner(folder: Path, path: Path, name: str, raw: dict[str, Any], *flags: str) -> Planner:
    """The planner of a config on devices of these kinds, without their compiler."""
    args = parse_arguments(["--config", str(path), *write_case(folder, raw), *flags])
    topology, source = find_topology(name), Source(folder / "model", weights=False)
    devices: list[Any] = [Named(i, "gpu", topology.chip.kind) for i in range(topology.count)]
    return make_planner(args, source, topology, devices)


def state_bytes(raw: dict[str, Any], devices: int, four: bool) -> float:
    """A device's state: frozen weights and the first embedding and head in parts, adapters and their moments whole."""
    frozen, adapters = 0.0, 0
    for name, shape in hf_shapes(raw).items():
        count = math.prod(shape)
        if "_proj" in name:
            frozen += (count / 2 + count / 64 * 4 if four else 2 * count) / devices
            adapters += 16 * sum(shape)
        else:
            frozen += 4 * count / (1 if "norm" in name else devices)
    return frozen + 12 * adapters


@pytest.mark.slow
def test_adapter_configs_by_arithmetic(tmp_path: Path) -> None:
    """Each fits what its name says, with a state that is the sum of its parts."""
    for path, name in ADAPTERS:
        folder = tmp_path / path.stem / name
        folder.mkdir(parents=True)
        raw = raw_config(model_of(path))
        plans = adapter_planner(folder, path, name, raw)
        topology, four = find_topology(name), "load_in_4bit: true" in path.read_text()
        held = bytes_on_device(plans.state)
        assert 0 <= held - state_bytes(raw, topology.count, four) < 64, path.stem  # counts of steps
        for chip in (topology.chip, *(CHIPS[like] for like in ("l4", "a100") if "24gb" in path.stem)):
            limit = int(MEMORY_SHARE * chip.memory)
            assert any(plans.estimate(option) <= limit for option in plans.options(limit)), path.stem
        order = plans.job.order
        assert order.accumulation * order.per_device_batch * order.ranks == 128


@pytest.mark.proof
def test_a_config_at_full_effort(libtpu: None, tmp_path: Path) -> None:
    path = ROOT / "configs" / "alpaca_7b_v5e-16.yaml"
    outcome = dry_run_config(tmp_path, path, "v5e-16")
    assert outcome.code == 0, outcome.err
    assert 5.4 < row(outcome.out, "peak") < 15.43 and "v5e-16: fits" in outcome.out
