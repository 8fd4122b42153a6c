"""Frozen parameters: no gradient, no moments, no place in checkpoints, and the memory that the planner counts."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from tiny import CONFIG, hf_shapes, make_records, run, slow_unless, write_json, write_model
from transformers import AutoModelForCausalLM

import llama_jax.run.prepare
import train_jax
from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.hf.names import check_names
from llama_jax.hf.writer import hf_tensors
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, merge
from llama_jax.model.llama import RunOptions
from llama_jax.model.roles import EmbeddingTable, ProjectionWeight
from llama_jax.plan.planner import Planner
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import make_job
from llama_jax.training.state import saving_bytes

EMBEDDING = "model.embed_tokens.weight"
EXAMPLES, UPDATES = 4, 4  # of an update, and in all
FLAGS = {
    "use_cpu": True,
    "hf_compat": 5,
    "max_steps": UPDATES,
    "per_device_train_batch_size": EXAMPLES,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,  # of the size of the gradients: Adam then magnifies none of their roundings
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_steps": 2,
}


def argv(folder: Path, out: str, **flags: Any) -> list[str]:
    if not (folder / "data.json").exists():
        write_model(folder / "model", CONFIG)
        write_json(folder / "data.json", make_records(EXAMPLES * UPDATES))
    paths = {"model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / out}
    return [str(part) for name, value in {**paths, **FLAGS, **flags}.items() for part in (f"--{name}", value)]


def freeze(patch: pytest.MonkeyPatch, trainable: Any) -> None:
    patch.setattr(llama_jax.run.prepare, "Planner", partial(Planner, trainable=trainable))


def torch_run(folder: Path, frozen: str) -> tuple[dict[str, np.ndarray], list[tuple[float, float]]]:
    """The same updates by torch: the final weights, and loss and gradient norm of each update."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    trained = {name: p for name, p in model.named_parameters() if name != frozen}
    model.get_parameter(frozen).requires_grad_(False)
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": FLAGS["weight_decay"]},
        {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=FLAGS["learning_rate"], eps=FLAGS["adam_epsilon"])
    records, curve = json.loads((folder / "data.json").read_text()), []
    for k in range(UPDATES):
        part = records[EXAMPLES * k : EXAMPLES * (k + 1)]
        count = sum(label != -100 for r in part for label in r["labels"][1:])
        loss = torch.zeros(())
        for record in part:
            logits = model(torch.tensor([record["input_ids"]])).logits[0, :-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(record["labels"][1:]), reduction="sum")
        optimizer.zero_grad()
        (loss / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), FLAGS["max_grad_norm"])
        optimizer.step()
        curve.append((loss.item() / count, norm.item()))
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, curve


@pytest.mark.parametrize("bf16", [slow_unless(False, False), True])
def test_frozen_embeddings(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal after training, after a resumed run and in the export; the rest is what torch trains."""
    freeze(monkeypatch, nnx.Not(EmbeddingTable))
    outcome = run(train_jax.main, *argv(tmp_path, "out", bf16=bf16))
    assert outcome.code == 0, outcome.err
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(after[EMBEDDING].view(np.uint32), before[EMBEDDING].view(np.uint32))
    assert all(not np.array_equal(after[name], before[name]) for name in before if name != EMBEDDING)
    if not bf16:
        expected, curve = torch_run(tmp_path, EMBEDDING)
        log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        np.testing.assert_allclose([(e["loss"], e["grad_norm"]) for e in log[:UPDATES]], curve, rtol=1e-5)
        for name, weight in expected.items():
            # A gradient of at most 0.5 is off by some 1e-6; over eps 1e-3, times the rate 1e-2, in each of 4 updates.
            np.testing.assert_allclose(after[name], weight, rtol=0, atol=UPDATES * 1e-5, err_msg=name)

    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    again = run(train_jax.main, *argv(tmp_path, "out", bf16=bf16, resume_from_checkpoint=True))
    assert again.code == 0, again.err
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(resumed[name], after[name]) for name in after)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_held(scan_layers: bool, tmp_path: Path) -> None:
    """The embedding has no moments, gradient, halves or place in a checkpoint; bytes are those of torch's shapes."""
    args = parse_arguments(argv(tmp_path, "out", bf16=True))
    config, mesh = LlamaConfig.from_hf(CONFIG), sharding.make_mesh()
    job = make_job(args, config, lambda: tmp_path, 1, True)
    whole, part = (
        Planner(job, mesh, "cpu", "float32", scan_layers, trainable)
        for trainable in (nnx.Param, nnx.Not(EmbeddingTable))
    )
    rows = sharding.padded(CONFIG["vocab_size"], multiple=sharding.VOCAB_MULTIPLE)
    size = 4 * rows * CONFIG["hidden_size"]
    bytes_of = sharding.bytes_on_device
    assert bytes_of(whole.state.frozen) == 0 and bytes_of(part.state.frozen) == size
    assert bytes_of(whole.state.trainable) - bytes_of(part.state.trainable) == size
    assert bytes_of(whole.state.opt_state) - bytes_of(part.state.opt_state) == 2 * size
    assert bytes_of(whole.saved) - bytes_of(part.saved) == 3 * size
    for name in ("mu", "nu"):
        assert "embed_tokens" not in optax.tree_utils.tree_get(part.state.opt_state, name)
    assert "embed_tokens" not in part.saved.params and "embed_tokens" not in part.state.trainable
    matrices = [math.prod(s) for name, s in hf_shapes(CONFIG).items() if "_proj" in name] + [size // 4]  # and the head
    assert saving_bytes(whole.state) == 4 * sum(matrices)  # in float32, beside their halves
    limit = 2**30
    option = whole.options(limit)[0]
    # Two moments; the gradient beside them is no longer what a device needs most.
    assert whole.held_bytes(option) - part.held_bytes(option) == 2 * size
    assert merge(part.definition.trainable, part.definition.frozen) == whole.definition.params


def test_roles_are_given_where_parameters_are_made() -> None:
    """A bias is no matmul weight, whatever its module is called; the head is one, a tied embedding is not."""
    raw = {**CONFIG, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    run_options = RunOptions(compute_dtype=np.dtype("bfloat16"))
    definition = define(LlamaConfig.from_hf(raw), run_options, sharding.make_mesh())
    halved = definition.halved
    assert halved is not None
    projection = halved["layers"][0]["self_attn"]["q_proj"]
    assert projection == {"weight": True, "bias": False}
    assert halved["lm_head"] == {"weight": True}
    assert halved["embed_tokens"] == {"weight": False} and halved["norm"] == {"weight": False}
    assert definition.roles["layers"][1]["mlp"]["up_proj"]["weight"] is ProjectionWeight


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_parameter_without_a_name_stops_the_export(scan_layers: bool) -> None:
    config, mesh = LlamaConfig.from_hf(CONFIG), sharding.make_mesh()
    params = define(config, RunOptions(scan_layers=scan_layers), mesh).params
    check_names(params, config)
    layer: Any = params["layers"] if scan_layers else params["layers"][1]
    extra = {**layer, "self_attn": {**layer["self_attn"], "lora_A": {"weight": 0}}}
    changed = {**params, "layers": extra if scan_layers else {**params["layers"], 1: extra}}
    for act in (check_names, lambda *args: next(hf_tensors(*args))):
        with pytest.raises(InputError, match=r"1 parameter\(s\).*self_attn\.lora_A\.weight"):
            act(changed, config)
