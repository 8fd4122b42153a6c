"""Moments in the host's memory: the same digits as on the device, where they are, and what they cost.

The reference is the update in one program with moments on the device. It is compiled as a user's: tests else switch
fusions off, and a CPU rounds a product and a sum once where it fuses both.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import on_devices
from safetensors.numpy import load_file
from test_training import Job, assert_same_run
from tiny import COMPILATION, CONFIG, run, slow_unless, write_json

import llama_jax.plan.planner
import llama_jax.run.start
import llama_jax.training.step
import train_jax
from llama_jax.base.errors import InputError
from llama_jax.data.batches import Batch
from llama_jax.distributed import sharding
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.lora import Lora, Rank
from llama_jax.model.roles import EmbeddingTable, MatmulWeight
from llama_jax.plan.chips import find_topology
from llama_jax.plan.planner import Planner
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import make_job
from llama_jax.training.fit import put_batch
from llama_jax.training.guard import Guard
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.parts import passing_bytes
from llama_jax.training.state import SavedState, abstract_saved, abstract_state, init_state
from llama_jax.training.step import Steps

ROWS, TOKENS = 8, 16
HALVES = {"compute_dtype": jnp.bfloat16}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # options of the run, of the optimizer, blocks
    "one block": ({}, {}, 1),
    "halves": (HALVES, {}, 1),
    "sums": ({}, {}, 2),
    "sums, halves": (HALVES, {}, 2),
    "bfloat16 moments": (HALVES, {"moments": "bfloat16", "seed": 3}, 1),
    "8 bits": (HALVES, {"name": "adamw_8bit"}, 1),
    "lion": ({}, {"name": "lion_32bit"}, 2),
    "adapters": ({"lora": Lora(tuple(((i, "self_attn.q_proj"), Rank(4, 2.0)) for i in range(2)))}, {}, 1),
}


QUICK = ("sums, halves",)
OPTIONS = {option: value for option, (_, value) in COMPILATION.items()}


class Made:
    """Updates of a form with moments on the device or on the host."""

    def __init__(self, form: str, offload: bool, mesh: str = "fsdp=1", guard: Guard = Guard()):
        options, of_optimizer, self.blocks = FORMS[form]
        devices = jax.devices()[: math.prod(int(part.partition("=")[2]) for part in mesh.split(","))]
        self.mesh, config = sharding.make_mesh(devices, mesh), LlamaConfig.from_hf({**CONFIG, "num_hidden_layers": 3})
        definition = define(config, RunOptions(**options), self.mesh)
        decays = definition.having(MatmulWeight, EmbeddingTable)
        tx = make_optimizer(**{"weight_decay": 0.1, "decays": decays, "max_grad_norm": 0.5, **of_optimizer})
        self.steps = Steps(definition, tx, config.vocab_size, sums=self.blocks > 1, guard=guard, offload=offload)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: jax.device_put(rng.normal(0, 0.1, x.shape).astype(x.dtype), x.sharding), definition.params
        )
        self.state = init_state(params, tx, definition, self.mesh, offload)
        self.abstract = abstract_state(tx, definition, self.mesh, offload)
        self.bytes = self.steps.compile(self.abstract, (ROWS, TOKENS), self.mesh)

    def update(self, seed: int, added: float = 0.0) -> dict[str, Any]:
        rng, blocks = np.random.default_rng(seed), []
        for _ in range(self.blocks):
            ids, targets = rng.integers(0, CONFIG["vocab_size"], (2, ROWS, TOKENS)).astype(np.int32)
            weights = np.full((ROWS, TOKENS), 1 / (ROWS * TOKENS * self.blocks), np.float32)
            weights[0, 3] += np.float32(added)
            places = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), ids.shape)
            same = np.ones_like(ids)
            blocks.append(put_batch(self.mesh, Batch(ids, places, same, same * TOKENS, targets, weights)))
        rate = sharding.put_scalar(self.mesh, np.float32(1e-2))
        self.state, outputs = self.steps.update(self.state, blocks, rate, self.mesh)
        return jax.device_get(outputs[-1])


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def compile_as_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_jax.training.step, "compiler_options", lambda *_, **__: OPTIONS)


def on_host(tree: Any) -> list[str]:
    """The paths of the arrays in the host's memory."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, x in leaves if x.sharding.memory_kind == "pinned_host"]


def assert_same_updates(form: str, mesh: str = "fsdp=1") -> None:
    """Of the whole state and of the metrics, after good and skipped updates."""
    there, here = Made(form, True, mesh), Made(form, False, mesh)
    assert_same_bits(there.state, here.state)
    for seed, added in ((1, 0.0), (2, 0.0), (3, math.nan), (4, 0.0)):
        one, two = there.update(seed, added), here.update(seed, added)
        assert one["skipped"] == two["skipped"] == (added != 0), seed
        assert_same_bits(one, two)
        assert_same_bits(there.state, here.state)
        places = [jax.tree.map(lambda x: x.sharding, state) for state in (there.state, there.abstract)]
        assert places[0] == places[1]


@pytest.mark.parametrize("form", [slow_unless(form in QUICK, form) for form in FORMS])
def test_the_same_digits(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as_users(monkeypatch)
    assert_same_updates(form)


@pytest.mark.slow
def test_updates_that_are_never_skipped() -> None:
    """`--on_nonfinite continue` leaves the guard nothing to decide."""
    there, here = (Made("halves", offload, guard=Guard(nonfinite=False)) for offload in (True, False))
    for seed, added in ((1, 0.0), (2, math.inf)):
        assert there.update(seed, added)["skipped"] == here.update(seed, added)["skipped"] == 0
    assert not np.isfinite(np.asarray(there.state.trainable["lm_head"]["weight"], np.float32)).any()
    assert_same_bits(there.state.step, here.state.step)


def on_meshes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        compile_as_users(patch)
        assert_same_updates("sums, halves", "fsdp=4")
        assert_same_updates("halves", "data=2,fsdp=2,tensor=2")


@pytest.mark.slow
def test_meshes() -> None:
    on_devices(8, "test_offload.on_meshes()")


def test_what_lies_where() -> None:
    """Moments alone are on the host, and a device never holds more of them than it was planned to."""
    made = Made("halves", True)
    moments = set(on_host(made.state))
    assert moments == set(on_host(made.abstract))
    assert moments == {
        f".opt_state[1].{name}{jax.tree_util.keystr(path)}"
        for name in ("mu", "nu")
        for path, _ in jax.tree_util.tree_leaves_with_path(made.state.trainable)
    }
    size = sum(x.size for x in jax.tree.leaves(made.state.trainable))
    assert sharding.bytes_on_host(made.state) == 2 * 4 * size
    assert sharding.bytes_on_device(made.state.opt_state) == 8  # the number of updates and the norm
    saved = abstract_saved(made.abstract, made.mesh)
    assert on_host(saved) == on_host(made.abstract)
    with jax.set_mesh(made.mesh):
        assert jax.tree.map(lambda x: x.sharding, saved) == jax.tree.map(lambda x: x.sharding, made.state.saved)


def test_few_parts_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to the device are counted until their part has come back to the host, or rather been waited for."""
    made, inside, most = Made("halves", True), 0, 0
    to_device, wait = sharding.to_device, jax.block_until_ready

    def arriving(tree: Any) -> Any:
        nonlocal inside, most
        inside += sum(x.nbytes for x in jax.tree.leaves(tree))
        most = max(most, inside)
        return to_device(tree)

    def waiting(arrays: Any) -> Any:
        nonlocal inside
        inside -= sum(x.nbytes for x in jax.tree.leaves(arrays))
        return wait(arrays)

    monkeypatch.setattr(sharding, "to_device", arriving)
    monkeypatch.setattr(jax, "block_until_ready", waiting)
    for seed in range(3):
        made.update(seed)
    monkeypatch.undo()
    planned = passing_bytes(made.abstract.trainable, made.abstract.opt_state)
    a_layer = 8 * sum(x.size for x in jax.tree.leaves(made.state.trainable["layers"][0]))
    rest = 8 * (2 * made.state.trainable["lm_head"]["weight"].size + 32)
    assert rest > a_layer and planned == 3 * a_layer + rest  # all four parts
    assert 2 * a_layer < most <= planned


def test_another_state() -> None:
    """The first moments of an update are copied ahead. They are not used for a state that was not made by it."""
    made = Made("halves", True)
    first, places = jax.tree.map(np.array, made.state), jax.tree.map(lambda x: x.sharding, made.state)
    made.update(1)
    expected = jax.tree.map(np.array, made.state)
    made.update(2)
    made.state = jax.tree.map(jax.device_put, first, places)
    made.update(1)
    assert_same_bits(made.state, expected)


def test_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same run with moments on the device, whose bytes are those of a model that needs them all."""
    there, here = Made("halves", True), Made("halves", False)
    moments, planned = (
        sharding.bytes_on_host(there.abstract),
        passing_bytes(there.abstract.trainable, there.abstract.opt_state),
    )
    gradients = sharding.bytes_on_device(there.state.trainable)
    block = there.steps.programs[ROWS, TOKENS].memory_analysis()
    temporary = block.temp_size_in_bytes + block.output_size_in_bytes
    held = sharding.bytes_on_device(there.abstract) + planned
    assert max(gradients, temporary) + held <= there.bytes <= gradients + temporary + held + 4096
    assert sharding.bytes_on_device(here.abstract) == sharding.bytes_on_device(there.abstract) + moments


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"optim": "sgd"}, "--offload_optimizer True: --optim sgd has no large state; leave the flag out"),
        ({"optim": "adafactor"}, "--offload_optimizer True: --optim adafactor has no large state"),
        ({"accumulation": "multisteps"}, "--offload_optimizer True: is for --accumulation sum"),
        ({"scan_layers": True}, "--scan_layers True: --offload_optimizer needs each layer by itself"),
    ],
)
def test_refused(flags: dict[str, Any], line: str, tmp_path: Path) -> None:
    outcome = run(train_jax.main, *Job(tmp_path, offload_optimizer=True).argv("out", **flags))
    assert outcome.code == 2 and line in outcome.err and outcome.compiled == 0, outcome.err


def test_too_little_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_jax.plan.planner, "host_memory", lambda: 2**17)
    outcome = run(train_jax.main, *Job(tmp_path, offload_optimizer=True).argv("out"))
    assert outcome.code == 2, outcome.err
    assert re.search(r"--offload_optimizer True: the moments take 0\.000\d+ GiB of this host's memory", outcome.err)


def test_explained(tmp_path: Path) -> None:
    """32 layers of the tiny model: 2 moments of 4 bytes, with the padding of the vocabulary, and PCIe 4.0."""
    job = Job(tmp_path, offload_optimizer=True)
    facts = json.loads(run(train_jax.main, *job.argv("out", explain="json")).out)
    with_padding = facts["parameters"] + 2 * (384 - 259) * 32
    assert facts["offloaded"] == {
        "bytes_each_way": 8 * with_padding,
        "bytes_a_second": 25e9,
        "seconds": 8 * with_padding / 25e9,
    }
    text = run(train_jax.main, *job.argv("out", explain="text")).out
    expected = (
        f"in the host's memory; an update moves {8 * with_padding / 2**30:.2f} GiB to each device and as much back"
    )
    assert re.search(rf"moments: +{expected}, .* s at 25 GB/s each way", text), text
    assert "offloaded" not in json.loads(run(train_jax.main, *Job(tmp_path).argv("out", explain="json")).out)


@pytest.mark.slow
def test_resumed_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints hold no trace of the flag, and are resumed with or without it, to the same bits."""
    compile_as_users(monkeypatch)
    job, restored = Job(tmp_path, bf16=True, max_steps=4), []
    read = llama_jax.run.start.restore_state
    monkeypatch.setattr(
        llama_jax.run.start, "restore_state", lambda *rest: restored.append(state := read(*rest)) or state
    )
    plain, hosted = job.train("plain"), job.train("hosted", offload_optimizer=True)
    assert_same_run(plain, hosted)
    for name, start, offload in (("a", plain, True), ("b", hosted, False), ("c", hosted, True)):
        out = job.train(name, resume_from_checkpoint=start / "checkpoint-2", offload_optimizer=offload)
        state = restored.pop()
        assert isinstance(state, SavedState) and bool(on_host(state)) == offload
        assert_same_bits(load_file(out / "model.safetensors"), load_file(plain / "model.safetensors"))
        for one, other in zip(*(sorted((f / "checkpoint-4").rglob("digests")) for f in (out, plain)), strict=True):
            assert one.read_bytes() == other.read_bytes()
        digests = [json.loads((f / "checkpoint-4" / "run" / "metadata").read_text())["digests"] for f in (out, plain)]
        assert digests[0] == digests[1]


def test_a_stacked_checkpoint_is_refused(tmp_path: Path) -> None:
    job = Job(tmp_path, scan_layers=True, max_steps=2)
    job.train("out")
    flags = {"scan_layers": False, "offload_optimizer": True, "resume_from_checkpoint": True}
    outcome = run(train_jax.main, *job.argv("out", **flags, max_steps=3))
    assert outcome.code == 2 and "checkpoint-2: its layers are stacked, and --offload_optimizer" in outcome.err


def test_an_error_names_it(tmp_path: Path) -> None:
    """LLaMA-7B on an H100 of 80 GB: 6.74e9 parameters have 54 GB of moments; weights, gradients and the moments of
    embedding and head and of three layers, 2 + 2 + 2 bytes a parameter and 2.1 + 3 x 1.6 GB."""
    raw = {**CONFIG, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    raw |= {"num_attention_heads": 32, "num_key_value_heads": 32}
    data = write_json(tmp_path / "data.json", [{"input_ids": [1] * 144, "labels": [1] * 144}] * 80)
    mesh, limit = sharding.make_mesh(find_topology("h100:1").devices()), int(74.5 * 2**30)
    flags = {"model_name_or_path": tmp_path, "data_path": data, "bf16": True, "max_steps": 8}
    args = parse_arguments([str(part) for name, value in flags.items() for part in (f"--{name}", value)])
    job = make_job(args, LlamaConfig.from_hf(raw), lambda: tmp_path, 1, True)
    planner = Planner(job, mesh, "gpu", "float32", False)
    with pytest.raises(InputError) as refused:
        planner.check_room(limit)
    told = r"--offload_optimizer True \(([\d.]+) GiB, and the moments in the host's memory; slower: (.*? GB/s)"
    found = re.search(told, str(refused.value))
    assert found and found[2] == "53.9 GB each way an update, 1.1 s at 50 GB/s"
    held = (6 * 6.738e9 + 2.1e9 + 3 * 1.6e9) / 2**30
    assert held < float(found[1]) < held + 15 < 74.5  # activations and logits of 1,152 tokens
