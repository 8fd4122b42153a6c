"""Bad numbers: an update of NaN or Inf changes no bit, is counted and shown; no folder with NaN is read or written.

Nothing here is taken from the code under test. A record that holds the token POISON spoils its update: the weights of
its losses are infinite.
"""

import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from forks import on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_training import torch_windows
from tiny import CONFIG, Outcome, make_arrays, make_records, run, slow_unless, write_json, write_model, write_tokenizer

import convert_torch_to_flax
import train_jax
from llama_jax.command import generate
from llama_jax.data.batches import Batch, Batches
from llama_jax.distributed import sharding
from llama_jax.hf.finite import is_finite
from llama_jax.hf.source import Source
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.lora import Lora, Rank
from llama_jax.reporting.run_report import VALUES
from llama_jax.training.fit import put_batch
from llama_jax.training.guard import LEAST, Guard, place_losses
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.state import TrainState, init_state
from llama_jax.training.step import Steps

POISON = 5  # the token
EPSILON = 1e-4


# -- One update on the devices ----------------------------------------------------------------------------------------

ROWS, TOKENS = 8, 16
FORMS: dict[str, dict[str, Any]] = {
    "one block": {},
    "one block, halves": {"compute_dtype": jnp.bfloat16},
    "sums": {},
    "sums, stacked halves": {"compute_dtype": jnp.bfloat16, "scan_layers": True},
    "MultiSteps": {},
    "MultiSteps, stacked halves": {"compute_dtype": jnp.bfloat16, "scan_layers": True},
    "adapters": {"lora": Lora(tuple(((i, "self_attn.q_proj"), Rank(4, 2.0)) for i in range(2)))},
}
# Of each block, what is added to its weights: the loss is NaN, or Inf, or finite with a norm that overflows.
KINDS = {"": 0.0, "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "overflow": 1e25}


class Made:
    """A compiled update of `blocks` blocks, and the state before the first."""

    def __init__(self, form: str, mesh: str = "fsdp=1", guard: Guard = Guard()):
        options, self.blocks = FORMS[form], 2 if form.startswith(("sums", "Multi")) else 1
        devices = jax.devices()[: math.prod(int(part.partition("=")[2]) for part in mesh.split(","))]
        self.mesh, config = sharding.make_mesh(devices, mesh), LlamaConfig.from_hf(CONFIG)
        definition = define(config, RunOptions(**options), self.mesh)
        counts = np.full(100, self.blocks, np.int32) if form.startswith("Multi") else None
        tx = make_optimizer(weight_decay=0.1, eps=EPSILON, blocks=counts)
        self.steps = Steps(definition, tx, config.vocab_size, sums=form.startswith("sums"), guard=guard)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: jax.device_put(rng.normal(0, 0.1, x.shape).astype(x.dtype), x.sharding), definition.params
        )
        state = init_state(params, tx, definition, self.mesh)
        if guard.sigma is not None:
            state = state._replace(losses=place_losses(self.mesh, None))
        self.steps.compile(state, (ROWS, TOKENS), self.mesh)
        self._places = jax.tree.map(lambda x: x.sharding, state)
        self._first = jax.device_get(state)

    def state(self) -> TrainState:
        return jax.tree.map(jax.device_put, self._first, self._places)

    def block(self, seed: int, added: float = 0.0, times: float = 1.0) -> Batch:
        rng = np.random.default_rng(seed)
        ids, targets = rng.integers(0, CONFIG["vocab_size"], (2, ROWS, TOKENS)).astype(np.int32)
        weights = np.full((ROWS, TOKENS), times / (ROWS * TOKENS * self.blocks), np.float32)
        weights[0, 3] += np.float32(added)
        places = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), ids.shape)
        same = np.ones_like(ids)
        return put_batch(self.mesh, Batch(ids, places, same, same * TOKENS, targets, weights))

    def update(self, state: TrainState, seed: int, kinds: tuple[str, ...] = (), rate: float = 1e-2, times: float = 1.0):
        """Make the update of a seed; `kinds` are its blocks', "" for a good one. Return the state and the outputs."""
        added = [KINDS[kind] for kind in kinds] or [0.0] * self.blocks
        blocks = [self.block(100 * seed + i, x, times) for i, x in enumerate(added)]
        placed = sharding.put_scalar(self.mesh, np.float32(rate))
        state, outputs = self.steps.update(state, blocks, placed, self.mesh)
        return state, jax.device_get(outputs)


made = cache(Made)


def bits(state: TrainState) -> list[bytes]:
    """The bytes of each array but the numbers of updates done, which go on."""
    counted = state._replace(step=0)
    if hasattr(state.opt_state, "gradient_step"):
        counted = counted._replace(opt_state=state.opt_state._replace(gradient_step=0))
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(counted))]


QUICK = ("one block, halves", "sums", "MultiSteps")


@pytest.mark.parametrize("form", [slow_unless(form in QUICK, form) for form in FORMS])
@settings(max_examples=6)
@given(data=st.data())
def test_a_bad_update_changes_no_bit(form: str, data: st.DataObject) -> None:
    """Of drawn updates, some bad in drawn blocks, the state is bit by bit that of a run without the bad ones."""
    check_skips(made(form), data.draw(st.lists(drawn_kinds(made(form).blocks), min_size=2, max_size=6)))


def drawn_kinds(blocks: int) -> st.SearchStrategy[tuple[str, ...]]:
    good = st.just(("",) * blocks)
    return st.one_of(good, st.tuples(*[st.sampled_from([*KINDS])] * blocks))


def check_skips(made: Made, updates: list[tuple[str, ...]]) -> None:
    state, without, skipped = made.state(), made.state(), 0
    for k, kinds in enumerate(updates):
        before = bits(state)
        state, outputs = made.update(state, k, kinds, rate=1e-2 / (k + 1))
        bad, last = any(kinds), outputs[-1]
        assert bool(last["skipped"]) == bad, kinds
        loss, norm = sum(float(o["loss"]) for o in outputs), float(last["grad_norm"])
        assert (math.isfinite(loss) and math.isfinite(norm)) == (not bad)
        if kinds.count("overflow") == sum(map(bool, kinds)):
            assert math.isfinite(loss)  # the norm alone tells
        assert int(state.step) == k + 1, "a skipped update counts as done"
        skipped += bad
        if bad:
            assert bits(state) == before
        else:
            without, _ = made.update(without, k, rate=1e-2 / (k + 1))
            assert bits(state) != before
    assert int(without.step) == len(updates) - skipped
    assert bits(state) == bits(without)
    assert not any(np.isnan(np.asarray(x, np.float32)).any() for x in jax.tree.leaves(jax.device_get(state.trainable)))


def test_continue_is_todays_update() -> None:
    """With the guard off a NaN goes into the parameters; a good update is the same but for the order of sums."""
    off, on = Made("one block", guard=Guard(nonfinite=False)), made("one block")
    (a, out), (b, _) = off.update(off.state(), 1), on.update(on.state(), 1)
    assert not out[-1]["skipped"]
    for x, y in zip(*(jax.tree.leaves(jax.device_get(s.trainable)) for s in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)  # as in test_training.py's test_any_run_is_torchs
    a, out = off.update(a, 2, ("nan",))
    assert not out[-1]["skipped"] and np.isnan(np.asarray(a.trainable["norm"]["weight"])).all()


def on_meshes() -> None:
    """On one mesh all forms; on the others, without PROOFS, those of a quick test."""
    some = FORMS if "PROOFS" in os.environ else QUICK
    others = itertools.product(["data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2"], some)
    for mesh, form in [*(("fsdp=8", form) for form in FORMS), *others]:
        blocks = 2 if form.startswith(("sums", "Multi")) else 1
        good, bad = ("",) * blocks, ("nan",) + ("",) * (blocks - 1)
        check_skips(Made(form, mesh), [good, bad, good, ("overflow",) * blocks, good])


@pytest.mark.slow
def test_on_eight_devices() -> None:
    on_devices(8, "test_nonfinite.on_meshes()")


# -- Spikes of the loss -----------------------------------------------------------------------------------------------


class Reference:
    """Mean and variance in float64 over all earlier losses with explicit weights."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def bound(self, sigma: float) -> float:
        weights = np.ones(1)
        for n in range(2, len(self.losses) + 1):
            share = max(1 / n, 1 / 100)
            weights = np.append(weights * (1 - share), share)
        mean = float(weights @ self.losses)
        return mean + sigma * math.sqrt(weights @ (np.asarray(self.losses) - mean) ** 2)


def check_spikes(form: str, mesh: str = "fsdp=1") -> None:
    """Make a run at rate 0, whose losses depend on drawn factors alone: which are skipped is what the definition
    says."""
    spiky, reference = Made(form, mesh, guard=Guard(sigma=3.0)), Reference()
    state, rng, seen = spiky.state(), np.random.default_rng(1), []
    for k in range(150):
        times = 3.0 if k in (5, 30, 31, 90, 149) else 1 + 0.1 * float(rng.normal())
        kinds = ("",) * (spiky.blocks - 1) + ("nan",) if k == 60 else ()
        state, outputs = spiky.update(state, k, kinds, rate=0.0, times=times)
        loss, skipped = sum(float(out["loss"]) for out in outputs), bool(outputs[-1]["skipped"])
        spike = len(reference.losses) >= LEAST and loss > reference.bound(3.0)
        assert skipped == (spike or k == 60), k
        seen += [k] * skipped
        if not skipped:
            reference.losses.append(loss)
    assert {30, 31, 60, 90, 149} <= {*seen} and len(seen) < 12 and 5 not in seen
    assert float(state.losses.count) == len(reference.losses)
    bound = float(state.losses.mean) + 3.0 * math.sqrt(float(state.losses.variance))
    # Some 10 roundings an update of numbers that forget 1 in 100: 1000 EPS32 = 1.2e-4 at worst.
    np.testing.assert_allclose(bound, reference.bound(3.0), rtol=1.2e-4)


def test_spikes() -> None:
    check_spikes("one block")


# -- A run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the tokens of a segment that begins with POISON infinite weights."""
    fill = Batches._fill

    def poisoned(self: Batches, rows: list, length: int) -> Batch:
        batch = fill(self, rows, length)
        starts = np.argwhere((batch.input_ids == POISON) & (batch.positions == 0))
        for row, at in starts:
            here = batch.segment_ids[row] == batch.segment_ids[row, at]
            batch.weights[row, here & (batch.weights[row] > 0)] = np.inf
        return batch

    monkeypatch.setattr(Batches, "_fill", poisoned)


def records_with(count: int, bad: set[int]) -> list[dict[str, list[int]]]:
    records = make_records(count, seed=count)
    for i, record in enumerate(records):
        ids = [POISON + 1 if x == POISON else x for x in record["input_ids"]]
        if i in bad:
            ids[0] = POISON
        records[i] = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    return records


@dataclasses.dataclass
class Job:
    """A run on 16 records of which some are bad, one to an update unless flags say otherwise."""

    folder: Path
    bad: set[int]
    count: int = 16

    def __post_init__(self) -> None:
        self.model = write_model(self.folder / "model")
        self.records = records_with(self.count, self.bad)
        self.data = write_json(self.folder / "data.json", self.records)

    def train(self, out: str = "out", **flags: Any) -> tuple[Outcome, Path]:
        flags = {
            **{"model_name_or_path": self.model, "data_path": self.data, "output_dir": self.folder / out},
            **{"use_cpu": True, "hf_compat": "5", "train_sampling_strategy": "sequential", "num_train_epochs": 1},
            **{"per_device_train_batch_size": 2, "learning_rate": 1e-3, "adam_epsilon": EPSILON, "logging_steps": 1},
            **{"save_strategy": "no", **flags},
        }
        argv = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
        return run(train_jax.main, *argv), self.folder / out


def log_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def torch_run(job: Job, size: int, accumulation: int, decay: float) -> tuple[list[int], dict[str, np.ndarray]]:
    """The updates that are not finite, and the weights: stock transformers, torch.optim.AdamW, `step` left out."""
    from transformers import LlamaForCausalLM, get_scheduler

    model = LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="eager")
    updates = math.ceil(math.ceil(job.count / size) / accumulation)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=EPSILON)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=updates)
    flags = {"batch": size, "accumulation": accumulation, "compat": "5", "seed": 3}
    bad = []
    for k, window in enumerate(itertools.islice(torch_windows(flags, job.count), updates), start=1):
        rows = [job.records[i] for batch in window for i in batch]
        trained = sum(len(r["labels"]) - 1 for r in rows)
        loss = torch.zeros(())
        for r in rows:
            factor = math.inf if POISON in r["input_ids"] else 1.0
            logits = model(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1]
            loss = loss + factor * torch.nn.functional.cross_entropy(
                logits, torch.tensor(r["labels"][1:]), reduction="sum"
            )
        (loss / trained).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(loss) and torch.isfinite(norm):
            optimizer.step()
        else:
            bad.append(k)
        schedule.step()  # the rate is the update's, whether it is skipped or not
        optimizer.zero_grad()
    return bad, {name: p.detach().numpy() for name, p in model.named_parameters()}


RUNS = [("sum", 1, {7}), ("sum", 3, {0, 9}), ("multisteps", 3, {15})]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("accumulation", "steps", "bad"),
    [slow_unless(steps == 3 and kind == "sum", kind, steps, bad) for kind, steps, bad in RUNS],
)
def test_a_run_is_torchs_without_the_bad_updates(accumulation: str, steps: int, bad: set[int], tmp_path: Path) -> None:
    """Weights as derived in test_training.py's test_any_run_is_torchs; the count, and the numbers of the records."""
    job = Job(tmp_path, bad)
    outcome, out = job.train(
        **{"gradient_accumulation_steps": steps, "accumulation": accumulation, "weight_decay": 0.1, "seed": 3},
        **{"max_tokens_per_device": 128, "train_sampling_strategy": "random", "max_bad_updates": 0},
    )
    assert outcome.code == 0, outcome.err
    wrong, weights = torch_run(job, 2, steps, decay=0.1)
    assert wrong
    trained = load_file(out / "model.safetensors")
    for name, expected in weights.items():
        np.testing.assert_allclose(trained[name], expected, rtol=1e-6, atol=1e-5, err_msg=name)
    skips = [entry for entry in log_of(out) if "skipped_updates" in entry]
    assert [(e["step"], e["skipped_updates"]) for e in skips] == [(k, n) for n, k in enumerate(wrong, start=1)]
    windows = list(
        itertools.islice(torch_windows({"batch": 2, "accumulation": steps, "compat": "5", "seed": 3}, 16), 9)
    )
    said = [line for line in outcome.err.splitlines() if "is not finite" in line]
    for entry, line in zip(skips, said, strict=True):
        examples = sorted(i + 1 for batch in windows[entry["step"] - 1] for i in batch)
        assert entry["skipped_records"] == examples and {i + 1 for i in bad} & {*examples}
        assert f"update {entry['step']} is not finite" in line and f"records {', '.join(map(str, examples))} of" in line
    good = [e for e in log_of(out) if "loss" in e and e["step"] not in wrong]
    assert good and all(math.isfinite(e["loss"]) and e["loss"] > 1 for e in good)
    assert all(math.isnan(e["loss"]) for e in log_of(out) if "loss" in e and e["step"] in wrong), "not 0.0"
    # The summary's loss is the mean over the updates that were made.
    summary = next(e["train_loss"] for e in log_of(out) if "train_loss" in e)
    np.testing.assert_allclose(summary, np.mean([e["loss"] for e in good]), rtol=1e-6)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("step", [slow_unless(False, 3), 4, slow_unless(False, 7)])
def test_resuming_across_a_skip(step: int, tmp_path: Path) -> None:
    """From each checkpoint around skipped updates a run goes on to the same bits, log and count, spikes watched too."""
    job = Job(tmp_path, {4, 7}, count=20)
    flags = {"save_strategy": "steps", "save_steps": 1, "skip_loss_spikes": 1e6, "logging_steps": 2}
    outcome, whole = job.train("whole", **flags)
    assert outcome.code == 0, outcome.err
    expected, counts = load_file(whole / "model.safetensors"), [e.get("skipped_updates") for e in log_of(whole)]
    assert [n for n in counts if n] == [1, 2]
    part = tmp_path / f"from-{step}"
    part.mkdir()
    (whole / f"checkpoint-{step}").rename(part / f"checkpoint-{step}")
    outcome, _ = job.train(part.name, resume_from_checkpoint=True, **flags)
    assert outcome.code == 0, outcome.err
    actual = load_file(part / "model.safetensors")
    assert {n: a.tobytes() for n, a in actual.items()} == {n: a.tobytes() for n, a in expected.items()}
    assert [e.get("skipped_updates") for e in log_of(part)] == counts
    assert [e["loss"] for e in log_of(part) if "loss" in e] == pytest.approx(
        [e["loss"] for e in log_of(whole) if "loss" in e], nan_ok=True, rel=0, abs=0
    )
    guards = [json.loads((f / "checkpoint-10" / "run" / "metadata").read_text())["guard"] for f in (whole, part)]
    assert guards[0] == guards[1] and guards[0]["losses"][2] == 8


@pytest.mark.usefixtures("poison")
def test_a_run_of_bad_updates_ends(tmp_path: Path) -> None:
    """Three in a row end the run with 1 and the name of the last checkpoint, which is finite; two do not."""
    job = Job(tmp_path, {2, 5, 8, 10, 12}, count=20)
    flags = {"save_strategy": "steps", "save_steps": 4}
    outcome, out = job.train(**flags)
    assert outcome.code == 1 and not (out / "model.safetensors").exists()
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: 3 updates in a row, up to update 7, were skipped (--max_bad_updates 3)")
    assert f"{out}/checkpoint-4, the last good checkpoint" in last and "--resume_from_checkpoint True" in last
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-4"] and "Traceback" not in outcome.err
    outcome, _ = job.train(max_bad_updates=0, resume_from_checkpoint=True, **flags)
    assert outcome.code == 0, outcome.err
    assert all(np.isfinite(x).all() for x in load_file(out / "model.safetensors").values())
    outcome, _ = job.train("none", max_bad_updates=1)
    assert outcome.code == 1 and "start anew: no checkpoint was saved" in outcome.err.splitlines()[-1]


def test_a_rate_that_overflows_is_not_saved(tmp_path: Path) -> None:
    """Loss and gradient are finite, the update is not: no checkpoint of it is written, and the last good one named."""
    job = Job(tmp_path, set())
    flags = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    outcome, out = job.train(max_steps=1, **flags)
    assert outcome.code == 0, outcome.err
    outcome, _ = job.train(
        max_steps=3, resume_from_checkpoint=True, **flags | {"learning_rate": 3e38, "weight_decay": 1e3}
    )
    assert outcome.code == 1, outcome.err
    assert "after update 2 the parameters hold NaN or Inf" in outcome.err.splitlines()[-1]
    assert f"go on from {out}/checkpoint-1" in outcome.err.splitlines()[-1]
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("compat", ["4.37", "5"])
def test_nothing_bad_is_exported(compat: str, tmp_path: Path) -> None:
    """Under `continue` the run trains on, keeps the last finite checkpoint, and refuses to write the folder."""
    job = Job(tmp_path, {7})
    flags = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "hf_compat": compat, "seed": 3}
    flags |= {"on_nonfinite": "continue", "eval_strategy": "steps", "eval_steps": 1, "eval_data_path": job.data}
    outcome, out = job.train(**flags)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert "no model is written, since tensor 'model.embed_tokens.weight' holds NaN or Inf" in last
    assert "--allow_nonfinite" in last and sum("trained on" in line for line in outcome.err.splitlines()) == 1
    assert not [
        p
        for p in out.iterdir()
        if not p.name.startswith(".") and p.suffix in (".json", ".safetensors", ".tmp") and p.name != VALUES
    ]
    kept = sorted(int(p.name.removeprefix("checkpoint-")) for p in out.glob("checkpoint-*"))
    assert kept[1:] == [7, 8]
    outcome, again = job.train(max_steps=kept[0], resume_from_checkpoint=out / f"checkpoint-{kept[0]}", **flags)
    assert outcome.code == 0, "the oldest that is kept is finite"
    assert all(np.isfinite(x).all() for x in load_file(again / "model.safetensors").values())
    for path in again.glob("model*"):
        path.unlink()
    outcome, _ = job.train("allowed", allow_nonfinite=True, **flags | {"save_strategy": "no"})
    assert outcome.code == 0 and np.isnan(load_file(tmp_path / "allowed" / "model.safetensors")["lm_head.weight"]).all()


def test_the_best_model_is_no_nan(tmp_path: Path) -> None:
    """4.37 takes a first `eval_loss` of NaN for the best, and nothing is better than NaN: here NaN is passed over."""
    job = Job(tmp_path, set())
    masked = {**job.records[8], "labels": [-100] * len(job.records[8]["labels"])}
    bad_eval = write_json(tmp_path / "eval.json", [*job.records[:8], masked])
    flags = {"hf_compat": "4.37", "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    outcome, out = job.train(load_best_model_at_end=True, eval_data_path=bad_eval, **flags)
    assert outcome.code == 0, outcome.err
    state = json.loads((out / "trainer_state.json").read_text())
    assert math.isnan(next(e["eval_loss"] for e in state["log_history"] if "eval_loss" in e))
    assert (state["best_metric"], state["best_model_checkpoint"]) == (None, None)


@pytest.mark.usefixtures("poison")
def test_an_adapter_of_nan_is_not_written(tmp_path: Path) -> None:
    job = Job(tmp_path, {3})
    flags = {"use_peft": True, "lora_r": 2, "max_steps": 3}
    outcome, out = job.train(on_nonfinite="continue", **flags)
    assert outcome.code == 1 and not list(out.glob("adapter*"))
    assert "no model is written, since tensor 'base_model.model.model.layers.0." in outcome.err.splitlines()[-1]
    outcome, out = job.train("skipped", **flags)
    assert outcome.code == 0, outcome.err
    assert all(np.isfinite(x).all() for x in load_file(out / "adapter_model.safetensors").values())


# -- Reading and converting -------------------------------------------------------------------------------------------

KIND = {"f8": np.float64, "f4": np.float32, "f2": np.float16, "bf": ml_dtypes.bfloat16}


@settings(max_examples=60)
@given(kind=st.sampled_from([*KIND]), seed=st.integers(0, 2**32 - 1), size=st.integers(1, 3000), bad=st.booleans())
def test_bits_of_nan_and_inf(kind: str, seed: int, size: int, bad: bool) -> None:
    """Of all bit patterns, drawn evenly, against NumPy's isfinite on float64."""
    rng, dtype = np.random.default_rng(seed), np.dtype(KIND[kind])
    x = np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).copy()
    finite = np.isfinite(x.astype(np.float64))
    x[~finite] = 0
    assert is_finite(x) and is_finite(x.reshape(-1, 1))
    extremes = np.asarray([np.finfo(np.float32).max if kind == "f4" else 3e4, -1e-3, -0.0], dtype)
    assert is_finite(extremes)
    if bad:
        pattern = np.frombuffer(rng.bytes(64 * dtype.itemsize), dtype)
        pattern = np.append(pattern[~np.isfinite(pattern.astype(np.float64))], np.asarray([np.nan, np.inf], dtype))
        x[rng.integers(size)] = rng.choice(pattern) * (-1 if rng.random() < 0.5 else 1)
        assert not is_finite(x)


NAMES = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")


def broken_models(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    for i, (name, value) in enumerate(zip(NAMES, (np.nan, np.inf, -np.inf), strict=True)):
        kind = [np.float32, np.float16, ml_dtypes.bfloat16][i]
        arrays = {n: a.astype(kind) for n, a in make_arrays(CONFIG).items()}
        arrays[name].reshape(-1)[-1] = value
        yield name, write_model(tmp_path / f"{i}", arrays=arrays, shards=1 + 2 * (i == 1))
        yield name, tmp_path / f"{i}"


def test_weights_of_nan_are_refused_by_name(tmp_path: Path) -> None:
    for name, folder in broken_models(tmp_path):
        argv = ["--model_name_or_path", folder, "--output_dir", tmp_path / f"{folder.name}-flax"]
        outcome = run(convert_torch_to_flax.main, *argv)
        assert outcome.code == 2
        assert f"tensor '{name}' holds NaN or Inf" in outcome.err.splitlines()[-1], outcome.err
        assert f"{folder}/model" in outcome.err.splitlines()[-1]
        assert not list((tmp_path / f"{folder.name}-flax").iterdir())
    outcome = run(generate.main, "--model_name_or_path", write_tokenizer(folder), "--use_cpu", "--instruction", "x")
    assert outcome.code == 2 and f"tensor '{name}' holds NaN or Inf" in outcome.err.splitlines()[-1], outcome.err
    assert "(train_jax.py and convert_torch_to_flax.py take it as it is with --allow_nonfinite)" in outcome.err


def test_all_ways_of_reading(tmp_path: Path) -> None:
    """A .bin file, a Flax folder, a quantized load and a PEFT folder, by the name of the tensor."""
    from test_peft import TINY, drawn_tensors

    from llama_jax.base.errors import InputError
    from llama_jax.hf import peft
    from llama_jax.model.quantized import Quantization

    name, folder = next(broken_models(tmp_path))
    matrix = NAMES[1]
    arrays = make_arrays(CONFIG)
    arrays[matrix][3, 4] = np.inf
    flax = tmp_path / "flax"
    allowed = ["--model_name_or_path", folder, "--output_dir", flax, "--allow_nonfinite", "--verify"]
    assert run(convert_torch_to_flax.main, *allowed).code == 0
    bins = write_model(tmp_path / "bins", arrays=arrays)
    torch.save({n: torch.tensor(a) for n, a in arrays.items()}, bins / "pytorch_model.bin")
    (bins / "model.safetensors").unlink()
    quantized = RunOptions(quantization=Quantization(bits=4), lora=Lora(()))
    plain, mesh = RunOptions(), sharding.make_mesh(jax.devices()[:1])
    cases = [(name, flax, plain), (matrix, bins, plain)]
    config = {**CONFIG, "hidden_size": 128, "intermediate_size": 128}
    wide = make_arrays(config)
    wide[matrix][3, 4] = np.nan
    cases.append((matrix, write_model(tmp_path / "wide", config, wide), quantized))
    for bad, path, options in cases:
        with pytest.raises(InputError, match=rf"tensor '{bad}' holds NaN or Inf"):
            Source(path, allow_pickle=True).load(options, mesh)
    source = Source(flax, allow_nonfinite=True)
    assert np.isnan(np.asarray(source.load(plain, mesh)["embed_tokens"]["weight"])).any()

    outcome = run(convert_torch_to_flax.main, "--model_name_or_path", flax, "--output_dir", tmp_path / "hf", "--to_hf")
    assert outcome.code == 2 and f"tensor '{name}' holds NaN or Inf" in outcome.err.splitlines()[-1]

    adapter = peft.read_settings({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}, TINY, "here")
    tensors = dict(drawn_tensors(adapter, TINY))
    bad = [*tensors][-1]
    tensors[bad] = np.full_like(tensors[bad], np.nan)
    peft.write_adapter(tmp_path, tensors.items(), adapter)
    _, read = peft.read_adapter(tmp_path, TINY)
    with pytest.raises(InputError, match=f"tensor '{bad}' holds NaN or Inf".replace(".", r"\.")):
        peft.load_adapter(read, adapter.lora, TINY, define(TINY, RunOptions(lora=adapter.lora), mesh).params)
    assert np.isnan(peft.read_adapter(tmp_path, TINY, allow_nonfinite=True)[1][bad].read(())).all()


@pytest.mark.parametrize("to_hf", [False, True])
def test_a_type_that_overflows(to_hf: bool, tmp_path: Path) -> None:
    """1e5 is finite in float32 and Inf in float16: neither direction writes the folder."""
    arrays = make_arrays(CONFIG)
    arrays[NAMES[1]][0, 0] = 1e5
    folder = write_model(tmp_path / "model", arrays=arrays)
    out = tmp_path / "out"
    if to_hf:
        argv = ["--model_name_or_path", folder, "--output_dir", tmp_path / "flax"]
        assert run(convert_torch_to_flax.main, *argv).code == 0
        folder = tmp_path / "flax"
    argv = ["--model_name_or_path", folder, "--output_dir", out, "--dtype", "float16", *["--to_hf"] * to_hf]
    outcome = run(convert_torch_to_flax.main, *argv)
    assert outcome.code == 1 and f"tensor '{NAMES[1]}' holds NaN or Inf" in outcome.err.splitlines()[-1], outcome.err
    assert not list(out.iterdir())
    assert run(convert_torch_to_flax.main, *argv, "--allow_nonfinite").code == 0


def test_merging_an_adapter_that_overflows(tmp_path: Path) -> None:
    from test_peft import TINY, drawn_tensors

    from llama_jax.hf import peft

    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 1e30, "target_modules": ["q_proj"]}
    adapter = peft.read_settings(values, TINY, "here")
    tensors = {name: np.full_like(a, 1e10) for name, a in drawn_tensors(adapter, TINY).items()}
    (tmp_path / "peft").mkdir()
    peft.write_adapter(tmp_path / "peft", tensors.items(), adapter)
    raw = {**CONFIG, **{k: getattr(TINY, k) for k in ("vocab_size", "hidden_size", "num_hidden_layers")}}
    model, out = write_model(tmp_path / "model", raw), tmp_path / "out"
    argv = ["--model_name_or_path", model, "--merge_adapter", tmp_path / "peft", "--output_dir", out]
    outcome = run(convert_torch_to_flax.main, *argv)
    assert outcome.code == 1 and "q_proj.weight' holds NaN or Inf" in outcome.err.splitlines()[-1], outcome.err
    assert not list(out.iterdir())
    save_file({}, tmp_path / "unused.safetensors")
    with tempfile.TemporaryDirectory() as directory:
        assert run(convert_torch_to_flax.main, *argv[:-1], directory, "--allow_nonfinite").code == 0
