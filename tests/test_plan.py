"""What is chosen fits by the compiler's own count, what was passed over does not, and all choices make the same run."""

import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.ad_checkpoint import saved_residuals
from safetensors.numpy import load_file
from tiny import CONFIG, hf_shapes, make_records, run, slow_unless, write_json, write_model

import llama_jax.hf.source
import llama_jax.model.attention
import llama_jax.plan.planner
import llama_jax.run.trainer
import train_jax
from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import compiler_options
from llama_jax.model.config import LlamaConfig
from llama_jax.plan.chips import Named, find_topology
from llama_jax.plan.hlo import Program
from llama_jax.plan.memory import activation_bytes
from llama_jax.plan.operations import operations
from llama_jax.plan.planner import Option, Plan, Planner, choose_scan
from llama_jax.run.evaluation import Evaluation
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import make_job
from llama_jax.training.step import abstract_batch

RAW = {**CONFIG, "num_hidden_layers": 2}
UPDATE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "max_steps": 3}  # some 600 tokens


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No choices of other runs; and the compiler is asked for each program once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original, told = Plan.compile, {}

    def compile(self: Plan, shape: Any, mesh: Any) -> int:
        key = (self.option, shape, isinstance(self.abstract.opt_state, optax.MultiStepsState))
        if key not in told:
            told[key] = original(self, shape, mesh)
        return told[key]

    monkeypatch.setattr(Plan, "compile", compile)


def argv(folder: Path, **flags: Any) -> list[str]:
    if not (folder / "data.json").exists():
        write_model(folder / "model", RAW)
        write_json(folder / "data.json", make_records(64))
    paths = {"model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / "out"}
    flags = {**paths, "use_cpu": True, "save_strategy": "no", **UPDATE, **flags}
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def planner(folder: Path, raw: dict[str, Any] = RAW, **flags: Any) -> Planner:
    args = parse_arguments(argv(folder, **flags))
    config = LlamaConfig.from_hf(raw)
    mesh = sharding.make_mesh()
    return Planner(make_job(args, config, lambda: folder, 1, True), mesh, "cpu", "float32", False)


def needed(planner: Planner, option: Option) -> int:
    plan = planner.make(option)
    return max(plan.compile(shape, planner.mesh) for shape in plan.batches.shapes)


@pytest.mark.parametrize(("max_tokens", "said"), [(128, "xla"), (512, "blockwise")])
def test_the_kernel_that_runs(max_tokens: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rows whose program calls blockwise attention while it is traced."""
    lengths, original = [], llama_jax.model.attention.blockwise

    def blockwise(q: jax.Array, *rest: Any, **kw: Any) -> jax.Array:
        lengths.append(q.shape[1])
        return original(q, *rest, **kw)

    monkeypatch.setattr(llama_jax.model.attention, "blockwise", blockwise)
    plans = planner(tmp_path)
    plan = plans.make(Option(max_tokens, "full"))
    needed(plans, plan.option)
    assert {*lengths} == {length for _, length in plan.batches.shapes if plan.attention == "blockwise"}
    assert plan.attention == said and plans.attention_line.endswith("blockwise, xla in rows of at most 128 tokens")


@pytest.mark.parametrize("attention", ["auto", "xla"])
def test_a_state_that_a_cpu_cannot_hold(attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU names no limit, but its host has one: 405 million parameters of 16 bytes are 6 GiB."""
    wide = {**RAW, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8}
    plans = planner(tmp_path, wide, attention=attention)
    monkeypatch.setattr(llama_jax.plan.planner, "host_memory", lambda: 8 << 30)
    plans.check_room(None)
    monkeypatch.setattr(llama_jax.plan.planner, "host_memory", lambda: 4 << 30)
    with pytest.raises(InputError, match=r"the run needs 6\.\d+ GiB, and a device has 4 GiB .*--optim adamw_8bit \("):
        plans.check_room(None)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ["sum", "multisteps"])
def test_the_first_that_fits(accumulation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every limit between what the leanest and what the fastest choice needs."""
    monkeypatch.setattr(llama_jax.plan.planner, "SIZES", (128,))
    plans = planner(tmp_path, accumulation=accumulation)
    everything = plans.options(10**12)
    assert len(everything) == 8  # a block an update, or of 128 tokens; each with all choices of recomputation
    needs = {option: needed(plans, option) for option in everything}
    assert needs[everything[0]] > min(needs.values())
    for limit in sorted(needs.values()):
        chosen = plans.settle(limit).option
        assert needs[chosen] <= limit
        faster = everything[: everything.index(chosen)]
        assert all(needs[option] > limit for option in faster), (limit, chosen, needs)
    assert plans.options(10**12)[0].remat == "none" and plans.settle(10**12).batches.blocks(0) == 1


@pytest.mark.parametrize(
    ("kv_heads", "bf16"),
    [slow_unless((kv_heads == 1) == bf16, kv_heads, bf16) for kv_heads in (4, 1) for bf16 in (False, True)],
)
def test_bytes_kept_for_the_backward_pass(kv_heads: int, bf16: bool, tmp_path: Path) -> None:
    """Of each further layer, what jax's own partial evaluation keeps, parameters and what is not a token's left out.
    With "none" it also keeps what one fused kernel makes and takes, which the compiler then does not."""
    kept = {}
    for layers in (2, 3):
        raw = {**CONFIG, "num_hidden_layers": layers, "num_key_value_heads": kv_heads, "intermediate_size": 80}
        plans = planner(tmp_path, raw, bf16=bf16)
        for remat in ("full", "attention", "qkv", "matmuls"):
            plan = plans.make(Option(128, remat))
            block = abstract_batch(plans.mesh, (1, 128))

            def hidden(params: Any, plan: Plan = plan, block: Any = block) -> Any:
                zeros = [jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec) for x in block[:4]]
                return nnx.merge(plan.definition.graphdef, params)(*zeros)[0]

            with jax.set_mesh(plans.mesh):
                found = saved_residuals(hidden, plan.abstract.trainable)
            sizes = [x.size * x.dtype.itemsize for x, how in found if "argument" not in how and 128 in x.shape]
            formula = activation_bytes(plans.job.config, plans.run, remat, plans.mesh)
            kept.setdefault(remat, []).append((sum(sizes), 128 * formula))
    for remat, ((less, told_less), (more, told_more)) in kept.items():
        assert more - less == told_more - told_less, remat


def dot_operations(program: Program) -> tuple[float, float]:
    """The operations of a program's products, by their shapes: of weights, and of attention, which have batches."""
    of_weights = of_attention = 0.0
    for computation, lines in program.computations.items():
        shapes = {
            line.name: [int(n) for n in re.findall(r"\d+", line.result.partition("[")[2].partition("]")[0])]
            for line in lines
        }
        for line in lines:
            if line.kind == "dot":
                axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", line.rest)
                assert axes, line
                summed = math.prod(shapes[line.operands[0]][int(axis)] for axis in axes[1].split(","))
                made = 2.0 * math.prod(shapes[line.name]) * summed * program.times[computation]
                batched = "lhs_batch_dims" in line.rest
                of_weights, of_attention = of_weights + made * (not batched), of_attention + made * batched
    return of_weights, of_attention


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_target_modules": "q_proj k_proj v_proj"},
        slow_unless(False, {"lora_target_modules": "all-linear", "load_in_4bit": True}),
        slow_unless(False, {"lora_target_modules": ".*1.*(gate|down)_proj", "lora_modules_to_save": "lm_head"}),
        slow_unless(False, {"lora_target_modules": "o_proj", "use_dora": True, "lora_modules_to_save": "embed_tokens"}),
    ],
)
def test_operations_are_those_of_the_compiled_update(flags: dict[str, Any], tmp_path: Path) -> None:
    """Of products, in all blocks of one program. Plain attention computes also the half that the mask hides."""
    raw = {**RAW, "hidden_size": 64, "intermediate_size": 192}
    plans = planner(tmp_path, raw, **flags, use_peft=True, lora_r=4, attention="xla")
    plan = plans.make(Option(10**4, "none"))
    plan.compile(plan.largest_block, plans.mesh)
    rows, length = plan.largest_block
    of_weights, of_attention = dot_operations(Program(plan.steps.programs[plan.largest_block].as_text()))
    config = replace(plans.job.config, vocab_size=384)  # its rows on a device
    expected = operations(config, rows * length, length, "none", plan.run.lora)[0]
    without = operations(config, rows * length, 1e-9, "none", plan.run.lora)[0]
    if flags.get("use_dora"):  # B A, for the norms of each layer's o_proj
        of_weights -= 2 * 2 * 4 * 64 * 64
    assert of_weights == pytest.approx(without, rel=1e-6)
    assert of_attention / 2 == pytest.approx(expected - without, rel=1e-6)


@pytest.mark.parametrize("remat", ["matmuls", "qkv", slow_unless(False, "attention"), "full"])
def test_operations_that_are_made_again(remat: str, tmp_path: Path) -> None:
    """Of products with weights, in the compiled update: recomputation leaves out what no gradient needs."""
    raw = {**RAW, "hidden_size": 64, "intermediate_size": 192}
    plans = planner(tmp_path, raw, attention="xla")
    plan = plans.make(Option(10**4, remat))
    plan.compile(plan.largest_block, plans.mesh)
    rows, length = plan.largest_block
    of_weights, _ = dot_operations(Program(plan.steps.programs[plan.largest_block].as_text()))
    config = replace(plans.job.config, vocab_size=384)  # its rows on a device
    model, made = operations(config, rows * length, 1e-9, remat)
    assert of_weights == pytest.approx(made, rel=1e-6)
    assert (made > model) == (remat != "matmuls")


def test_rows_of_plain_attention_are_short(tmp_path: Path) -> None:
    """A small model's attention takes most of the time, and rows are as short as the longest example: 200 tokens alone,
    and 9 times 100 in pairs. A wide model's takes little, and so does attention that skips other segments."""
    records = [{"input_ids": [1] * n, "labels": [1] * n} for n in [200, *[100] * 9] * 4]
    write_json(tmp_path / "data.json", records)
    wide = {**RAW, "hidden_size": 2**14, "intermediate_size": 2**16}
    flags = {
        "per_device_train_batch_size": 10,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    rows = {}
    for name, raw, attention in (("small", RAW, "xla"), ("wide", wide, "xla"), ("skipped", RAW, "blockwise")):
        plans = planner(tmp_path, raw, **flags, attention=attention)
        rows[name] = plans.make(plans.options(None)[0]).largest_block
    assert rows == {"small": (6, 256), "wide": (1, 1152), "skipped": (1, 1152)}


def test_too_large_by_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before weights are read, which would not fit either."""
    monkeypatch.setattr(llama_jax.run.trainer, "memory_limit", lambda: 2**18)
    monkeypatch.setattr(llama_jax.hf.source.Source, "load", None)
    outcome = run(train_jax.main, *argv(tmp_path))
    assert outcome.code == 2 and outcome.compiled == 0, outcome.err
    assert "and a device has 0.000244 GiB for it" in outcome.err
    ways = outcome.err.split("; needed by arithmetic with one change: ")[1].split(", or ")
    assert [way.split(" (")[0].split()[-1] for way in ways] == [
        *("devices", "bfloat16", "adamw_8bit", "bfloat16", "sgd", "adafactor", "lion_32bit"),
        "True",  # --use_peft; 4 bits need wider matrices
    ]
    assert all(re.search(r" \(0\.0\d+ GiB", way) for way in ways)


@pytest.mark.slow
def test_ways_out_are_the_planners_own_figures(tmp_path: Path) -> None:
    """Each is the least that the planner of those flags, or of that many devices, estimates."""

    def least(plans: Planner) -> int:
        return min(map(plans.estimate, plans.options(limit)))

    # An update of one device has two blocks, and sums of gradients; that of several devices one.
    limit, fixed = 2**20, {"remat": "none", "max_tokens_per_device": 248, "gradient_accumulation_steps": 4}
    raw = {**RAW, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 192}
    now, config = planner(tmp_path, raw, **fixed), LlamaConfig.from_hf(raw)
    ways = {way.text: way for way in now.ways_out(limit)}
    args = parse_arguments(argv(tmp_path, **fixed))
    bfloat16 = Planner(make_job(args, config, lambda: tmp_path, 1, True), now.mesh, "cpu", "bfloat16", False)
    (devices,) = (int(text.split()[0]) for text in ways if text.endswith("devices"))
    args = parse_arguments(argv(tmp_path, **fixed))
    mesh = sharding.make_mesh([Named(i, "gpu", now.device_kind) for i in range(devices)])
    expected = {
        "--remat auto --max_tokens_per_device auto": planner(tmp_path, raw, gradient_accumulation_steps=4),
        f"{devices} devices": Planner(make_job(args, config, lambda: tmp_path, 1, True), mesh, "cpu", "float32", False),
        "--adam_moments_dtype bfloat16": planner(tmp_path, raw, **fixed, adam_moments_dtype="bfloat16"),
        "--optim adamw_8bit": planner(tmp_path, raw, **fixed, optim="adamw_8bit"),
        "--dtype bfloat16": bfloat16,
        **{
            f"--optim {name}": planner(tmp_path, raw, **fixed, optim=name)
            for name in ("sgd", "adafactor", "lion_32bit")
        },
        "--use_peft True": planner(tmp_path, raw, **fixed, use_peft=True),
        "--use_peft True --load_in_4bit True": planner(tmp_path, raw, **fixed, use_peft=True, load_in_4bit=True),
    }
    assert list(ways) == list(expected)
    for text, plans in expected.items():
        assert ways[text].needed == least(plans) < least(now), text
    assert ways["--dtype bfloat16"].note.endswith("do not move parameters above " + f"{512 * args.learning_rate:.2g}")
    adapted, both = expected["--use_peft True"], expected["--use_peft True --load_in_4bit True"]
    *_, last = adapted.ways_out(limit)
    assert last == ("--load_in_4bit True", least(both), ", over weights rounded to 4 bits")
    assert not [way for way in both.ways_out(limit) if "load_in_4bit" in way.text or "peft" in way.text]
    halved = []
    for length in (3000, 1500):
        folder = tmp_path / str(length)
        folder.mkdir()
        write_model(folder / "model", RAW)
        write_json(folder / "data.json", [{"input_ids": [1] * length, "labels": [1] * length}] * 8)
        halved.append(planner(folder, gradient_accumulation_steps=4))
    (way,) = (way for way in halved[0].ways_out(limit) if way.text == "--model_max_length 1500")
    assert way.needed == least(halved[1]) < least(halved[0])
    # In bfloat16, a smaller step is lost.
    for size in (1.0, 1.5, 1.99):
        moved = jnp.bfloat16(size) + jnp.bfloat16(float(jnp.bfloat16(size)) / 512 * 0.99)
        assert moved == jnp.bfloat16(size)


@pytest.mark.parametrize("compat", ["4.37", "5"])
def test_7b_with_8_bits_fits_80_gb(compat: str, tmp_path: Path) -> None:
    """Float32 weights in halves, updates of up to 2,048 tokens, on the 74.5 GiB that an H100 has for a run. Moments are
    two codes an element and two scales for 256 of them; 4.37 has no exception for embeddings."""
    raw = {**CONFIG, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    raw |= {"num_attention_heads": 32, "num_key_value_heads": 32}
    lengths = np.random.default_rng(0).integers(60, 256, 80).tolist()
    data = write_json(tmp_path / "data.json", [{"input_ids": [1] * n, "labels": [1] * n} for n in lengths])
    mesh, limit = sharding.make_mesh(find_topology("h100:1").devices()), int(74.5 * 2**30)
    plans = {}
    for optim in ("adamw_torch", "adamw_8bit"):
        flags = {"model_name_or_path": tmp_path, "data_path": data, "bf16": True, "max_steps": 8, "optim": optim}
        flags |= {"hf_compat": compat, "per_device_train_batch_size": 8, "scan_layers": True}  # traced in a moment
        args = parse_arguments([str(part) for name, value in flags.items() for part in (f"--{name}", value)])
        job = make_job(args, LlamaConfig.from_hf(raw), lambda: tmp_path, 1, True)
        plans[optim] = Planner(job, mesh, "gpu", "float32", True)
    eight = plans["adamw_8bit"]
    moments = 0
    for name, shape in hf_shapes(raw).items():
        n = math.prod(shape)
        moments += 8 * n if compat == "5" and "embed_tokens" in name else 2 * n + 8 * n // 256
    assert sharding.bytes_on_device(eight.state.opt_state) - moments == 8  # the number of updates and the norm
    option = eight.options(limit)[0]
    assert option.remat == "none" and eight.estimate(option) < limit * 0.9
    eight.check_room(limit)
    with pytest.raises(InputError) as refused:
        plans["adamw_torch"].check_room(limit)
    ways = re.findall(r"(?:change: |, or )(--\S+ \w+) \(([\d.]+) GiB", str(refused.value))
    names = [name for name, _ in ways]
    assert names[:3] == ["--adam_moments_dtype bfloat16", "--optim adamw_8bit", "--dtype bfloat16"]
    assert "--use_peft True" in names and float(dict(ways)["--optim adamw_8bit"]) < 74.5


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It only saves time."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plans = planner(tmp_path)
    assert plans.settle(10**12).option == plans.options(10**12)[0]


LENGTHS = st.lists(st.integers(2, 150), min_size=1, max_size=40)


@settings(max_examples=15)
@given(
    lengths=LENGTHS,
    eval_lengths=LENGTHS,
    devices=st.sampled_from([1, 2, 8]),
    ranks=st.sampled_from([1, 2, 3, 8]),
    batch=st.integers(1, 8),
    accumulation=st.integers(1, 4),
    compat=st.sampled_from(["4.37", "5"]),
)
def test_no_row_has_more_segments_than_the_kernel_is_told(
    lengths: list[int], eval_lengths: list[int], devices: int, ranks: int, batch: int, accumulation: int, compat: str
) -> None:
    """Those beyond would be garbage. By a count of every row; few examples are dealt to many ranks several times."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for name, sizes in (("data", lengths), ("eval", eval_lengths)):
            write_json(folder / f"{name}.json", [{"input_ids": [1] * n, "labels": [1] * n} for n in sizes])
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        flags = {**sizes, "gradient_accumulation_steps": accumulation, "max_steps": 4, "hf_compat": compat}
        paths = {"model_name_or_path": folder, "data_path": folder / "data.json", "output_dir": folder / "out"}
        flags |= {**paths, "eval_data_path": folder / "eval.json", "eval_strategy": "epoch", "bf16": True}
        args = parse_arguments([str(part) for name, value in flags.items() for part in (f"--{name}", value)])
        mesh = sharding.make_mesh(find_topology(f"h100:{devices}").devices())
        job = make_job(args, LlamaConfig.from_hf({**CONFIG, "head_dim": 64}), lambda: folder, ranks, True)
        plans = Planner(job, mesh, "gpu", "float32", False)
        assert plans.kernel == "cudnn"
        plan = plans.make(plans.options(2**36)[0])
        evaluation = Evaluation(
            job.eval_examples,
            None,
            mesh,
            compat=compat,
            ranks=ranks,
            batch_size=batch,
            drop_last=False,
            nan_filter=True,
            max_tokens=plan.option.max_tokens,
            disable_bar=True,
        )
        for batches in (plan.batches, evaluation.batches):
            blocks = [block for k in range(batches.order.updates) for block in batches.update(k)]
            assert max(int(block.segment_ids.max()) for block in blocks) <= plan.run.attention.segments


def test_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start compiles no program that the first found not to fit."""
    fixed = {"max_tokens_per_device": 128}  # one shape for each choice of recomputation
    plans = planner(tmp_path, **fixed)
    limit = min(needed(plans, option) for option in plans.options(10**12))
    made: list[Option] = []
    original = Planner.make

    def make(self: Planner, option: Option) -> Plan:
        made.append(option)
        return original(self, option)

    monkeypatch.setattr(Planner, "make", make)
    first = plans.settle(limit).option
    assert len(made) > 1 and made[-1] == first
    made.clear()
    assert planner(tmp_path, **fixed).settle(limit).option == first and made == [first]
    made.clear()
    assert planner(tmp_path, **fixed).settle(10**12).option != first  # another device


def test_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_jax.run.trainer, "memory_limit", lambda: 2**20 // 4)
    outcome = run(train_jax.main, *argv(tmp_path))
    assert outcome.code == 2 and "--remat full" in outcome.err and "0.000244 GiB for it" in outcome.err, outcome.err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_every_choice_is_the_same_run(tmp_path: Path) -> None:
    weights = []
    sizes = {"none": "auto", "matmuls": 128, "qkv": "auto", "attention": "auto", "full": 128, "auto": "auto"}
    for remat, size in sizes.items():
        flags = {"remat": remat, "max_tokens_per_device": size, "output_dir": tmp_path / remat}
        outcome = run(train_jax.main, *argv(tmp_path, **flags, adam_epsilon=1e-4))
        assert outcome.code == 0, outcome.err
        weights.append(load_file(tmp_path / remat / "model.safetensors"))
    for name, expected in weights[0].items():
        for other in weights[1:]:
            # Adam's step moves by lr / epsilon = 0.5 times the gradient's rounding, some 1e-8, in 3 updates.
            np.testing.assert_allclose(other[name], expected, rtol=0, atol=1e-7, err_msg=name)


def test_gradient_checkpointing_is_full(tmp_path: Path) -> None:
    for flags, remat in (
        ({"gradient_checkpointing": True}, "full"),
        ({"gradient_checkpointing": True, "remat": "attention"}, "attention"),
        ({}, "matmuls"),
    ):
        assert planner(tmp_path, **flags).options(None)[0].remat == remat


@pytest.mark.parametrize("value", ["0", "-5", "many", "4.5", ""])
def test_a_size_that_is_none(value: str, tmp_path: Path) -> None:
    outcome = run(train_jax.main, *argv(tmp_path, max_tokens_per_device=value))
    assert outcome.code == 2 and "--max_tokens_per_device" in outcome.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("xla_nothing=1", "No such compile option: 'xla_nothing'"),
        ("xla_cpu_enable_fast_math=maybe", "'maybe' is not a valid bool value"),
        ("--xla_cpu_enable_fast_math=true", "should be NAME=VALUE, without dashes"),
        ("xla_cpu_enable_fast_math", "should be NAME=VALUE, without dashes"),
        ("a=1,a=2", "a is given twice"),
    ],
)
def test_refused_compiler_options(options: str, told: str, tmp_path: Path) -> None:
    outcome = run(train_jax.main, *argv(tmp_path), f"--compiler_options={options}")
    assert outcome.code == 2 and told in outcome.err.splitlines()[-1], (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err and not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("kind", "count", "given", "expected"),
    [
        ("TPU v5 lite", 1, {}, {}),
        ("TPU v5 lite", 4, {}, {"rings": "1000000", "bf16": False}),
        ("TPU v5 lite", 4, {"rings": "-1"}, {"rings": "-1", "bf16": False}),
        ("TPU v5 lite", 4, {"bf16": "default"}, {"rings": "1000000"}),
        ("TPU v6 lite", 1, {}, {"rings": "1000000", "vmem": "98304", "gathers": True, "sums": True}),
        (
            *("TPU v6 lite", 8, {"gathers": "default", "sums": False}),
            {"rings": "1000000", "vmem": "98304", "sums": False},
        ),
        ("TPU v5p", 4, {"vmem": "-1"}, {"vmem": "-1"}),
    ],
)
def test_compiler_options_by_chip(kind: str, count: int, given: dict, expected: dict) -> None:
    names = {
        "rings": "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        "bf16": "xla_jf_bf16_propagation",
        "vmem": "xla_tpu_scoped_vmem_limit_kib",
        "gathers": "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        "sums": "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
    }
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    mesh: Any = SimpleNamespace(size=count, devices=np.array([device] * count))
    options = compiler_options(mesh, False, given=[(names[name], value) for name, value in given.items()])
    assert options == {names[name]: value for name, value in expected.items()}


def test_a_chips_option_that_its_compiler_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a later libtpu: one line, and the way out that it names."""
    monkeypatch.setattr("llama_jax.distributed.platform.TPU_OPTIONS", {"cpu": {"xla_nothing": "1"}})
    outcome = run(train_jax.main, *argv(tmp_path))
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome.err
    told = re.search("No such compile option: 'xla_nothing'.*leave it out by (.*)$", outcome.err.strip())
    assert told and "runs on a cpu have this option" in outcome.err, outcome.err
    assert run(train_jax.main, *argv(tmp_path), *told[1].split()).code == 0


def test_compiler_options_reach_every_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of true and false are booleans, as XLA needs them."""
    seen = []
    true = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self, options=None: (seen.append(options), true(self, options))[1]
    )
    options = {
        "compiler_options": "xla_cpu_enable_fast_math=true, xla_cpu_max_isa=SSE4_2",
        "max_tokens_per_device": 128,
    }
    plans = planner(tmp_path, **options)
    plan = plans.make(plans.options(None)[0])
    plan.compile(plan.largest_block, plans.mesh)
    assert seen == [{"xla_cpu_enable_fast_math": True, "xla_cpu_max_isa": "SSE4_2"}] * 2  # a block's, the optimizer's


def test_scanned_or_not() -> None:
    for layers, platform, flag, scanned in (
        (8, "cpu", None, False),
        (32, "cpu", None, True),
        (32, "tpu", None, True),
        (32, "gpu", None, False),
        (80, "gpu", None, True),
        (32, "gpu", True, True),
        (80, "tpu", False, False),
    ):
        flags = [] if flag is None else ["--scan_layers", str(flag)]
        args = parse_arguments(["--model_name_or_path", "m", "--data_path", "d", *flags])
        config = LlamaConfig.from_hf({**CONFIG, "num_hidden_layers": layers})
        job: Any = SimpleNamespace(args=args, config=config, adapter=None)
        assert choose_scan(job, platform) == scanned
