"""Bad numbers put into runs at drawn places: on meshes, in each form of accumulation, in one process of several.

Which updates are skipped follows from the data alone. The run has to end with the bits of a run on the data without the
records of these updates.
"""

import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import on_devices
from safetensors.numpy import load_file
from test_meshes import laid_out
from test_nonfinite import KINDS, check_spikes, log_of
from test_processes import finish, start
from tiny import CONFIG, drawn_cases, run, write_json, write_model

import train_jax
from llama_jax.base.errors import run_command
from llama_jax.data.batches import Batch, Batches

# The first token of a record names what is added to the weight of its last token.
ADDED = {token: KINDS[kind] for token, kind in enumerate([*KINDS][1:], start=1)}
# The ranks of the HF Trainer on a mesh.
MESHES = {
    "fsdp=1": 1,
    "fsdp=2": 2,
    "data=2": 2,
    "tensor=2": 1,
    "context=2": 1,
    "fsdp=4": 4,
    "data=2,tensor=2": 2,
    "fsdp=8": 8,
    "data=2,fsdp=2,tensor=2": 4,
}


@contextmanager
def injecting() -> Iterator[None]:
    """Commands add the numbers of ADDED. Says so where a process' own rows get one."""
    fill = Batches._fill

    def injected(self: Batches, rows: list, length: int) -> Batch:
        batch = fill(self, rows, length)
        for row, pieces in enumerate(rows):
            for segment, piece in enumerate(pieces, start=1):
                if added := ADDED.get(int(self.examples[piece.example][0][0])):
                    here = (batch.segment_ids[row] == segment) & (batch.weights[row] > 0)
                    batch.weights[row, np.flatnonzero(here)[-1]] += np.float32(added)
                    print("injected", file=sys.stderr)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "_fill", injected)
        yield


def records_of(updates: int, size: int, bad: dict[int, dict[int, int]], seed: int) -> list[dict[str, list[int]]]:
    """The records of each update in order, of the same lengths in each; `bad` has the token of a record by its update
    and its place there."""
    lengths, records = np.random.default_rng(0).integers(3, 17, size), []
    for k in range(updates):
        rng = np.random.default_rng([seed, k])
        for i, length in enumerate(lengths):
            ids = [bad.get(k, {}).get(i, 100), *rng.integers(len(ADDED) + 1, CONFIG["vocab_size"], length).tolist()]
            records.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return records


def flags_of(folder: Path, name: str, records: list[Any], **more: Any) -> list[str]:
    flags = {
        **{"model_name_or_path": folder / "model", "data_path": write_json(folder / f"{name}.json", records)},
        **{"output_dir": folder / name, "use_cpu": True, "hf_compat": "5", "train_sampling_strategy": "sequential"},
        **{"num_train_epochs": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-3, "weight_decay": 0.1},
        **{"logging_steps": 1, "save_strategy": "no", **more},
    }
    return [str(part) for key, value in flags.items() for part in (f"--{key}", value)]


def check_same_end(out: Path, without: Path, bad: dict[int, Any], updates: int, size: int) -> None:
    """Weights, losses of the good updates, the count of the others and their records."""
    file = next(out.glob("*model.safetensors"))
    found, expected = load_file(file), load_file(without / file.name)
    assert all(np.isfinite(x).all() for x in found.values())
    assert {n: x.tobytes() for n, x in found.items()} == {n: x.tobytes() for n, x in expected.items()}
    skips = [entry for entry in log_of(out) if "skipped_updates" in entry]
    assert [(e["step"], e["skipped_updates"]) for e in skips] == [(k + 1, n) for n, k in enumerate(sorted(bad), 1)]
    for entry, k in zip(skips, sorted(bad), strict=True):
        assert entry["skipped_records"] == list(range(k * size + 1, (k + 1) * size + 1))
    losses = [[e["loss"] for e in log_of(folder) if "loss" in e] for folder in (out, without)]
    assert [loss for loss in losses[0] if not math.isnan(loss)] == losses[1]
    assert len(losses[0]) == updates


def drawn(rng: random.Random, mesh: str) -> dict[str, Any]:
    flags = {
        "accumulation": rng.choice(["sum", "multisteps"]),
        "gradient_accumulation_steps": rng.choice([1, 2, 3]),
        "per_device_train_batch_size": rng.choice([1, 2]),
        "packing": rng.choice([True, False]),
        "scan_layers": rng.choice([True, False]),
        "bf16": rng.choice([True, False]),
        "max_bad_updates": rng.choice([0, 0, 2, 3]),
    }
    if flags["packing"] and rng.random() < 0.5:
        flags["max_tokens_per_device"] = 64 if "context" in mesh else 128  # several blocks an update
    if rng.random() < 0.25:
        flags |= {"use_peft": True, "lora_r": 2, "lora_dropout": 0}
    if rng.random() < 0.25:
        flags["skip_loss_spikes"] = 1e6
    size = MESHES[mesh] * flags["gradient_accumulation_steps"] * flags["per_device_train_batch_size"]
    updates = rng.randint(3, 7)
    spoiled = rng.sample(range(updates), rng.randint(1, updates - 1))
    bad = {k: {i: rng.choice([*ADDED]) for i in rng.sample(range(size), min(size, rng.randint(1, 3)))} for k in spoiled}
    return {"mesh": mesh, "flags": flags, "size": size, "updates": updates, "bad": bad, "seed": rng.randrange(100)}


def ends_at(bad: set[int], most: int) -> int | None:
    """The update, from 0, that is the last of so many bad ones in a row."""
    row = [k for k in sorted(bad) if most and all(k - i in bad for i in range(most))]
    return row[0] if row else None


def check(folder: Path, number: int, case: dict[str, Any]) -> str:
    updates, size, bad, flags = (case[key] for key in ("updates", "size", "bad", "flags"))
    out, without = folder / f"{number}", folder / f"{number}-without"
    whole = records_of(updates, size, bad, case["seed"])
    with laid_out(case["mesh"]), injecting():
        outcome = run(train_jax.main, *flags_of(folder, out.name, whole, **flags))
    assert "Traceback" not in outcome.err and "injected" in outcome.err, outcome.err
    skipped = outcome.err.count("nothing is changed by its examples")
    last = ends_at({*bad}, flags["max_bad_updates"])
    if last is not None:
        assert outcome.code == 1 and f"up to update {last + 1}, were skipped" in outcome.err.splitlines()[-1]
        assert skipped == sum(k <= last for k in bad)
        assert not [path for path in out.iterdir() if path.suffix == ".safetensors"]
        return f"{skipped} skipped, ended after update {last + 1}"
    assert outcome.code == 0, outcome.err
    assert skipped == len(bad)
    good = [record for k in range(updates) if k not in bad for record in whole[k * size : (k + 1) * size]]
    with laid_out(case["mesh"]):
        outcome = run(train_jax.main, *flags_of(folder, without.name, good, **flags))
    assert outcome.code == 0, outcome.err
    check_same_end(out, without, bad, updates, size)
    return f"{skipped} of {updates} skipped"


def on_meshes(folder: str, count: int) -> None:
    write_model(Path(folder) / "model")
    for number in range(count):  # from 4100 on, the first four have each form of accumulation, and adapters
        case = drawn(random.Random(4100 + number), [*MESHES][-number % len(MESHES)])
        print(number, case["mesh"], case["flags"], case["bad"], check(Path(folder), number, case), flush=True)


@pytest.mark.slow
def test_injected_on_meshes(tmp_path: Path) -> None:
    """NaN, Inf, -Inf in losses, and gradients that overflow, on one to eight devices."""
    on_devices(8, f"test_injected.on_meshes({str(tmp_path)!r}, {drawn_cases(54, 4)})")


def spikes_on_meshes() -> None:
    for form, mesh in (("MultiSteps", "fsdp=8"), ("sums", "data=2,fsdp=2,tensor=2"), ("MultiSteps", "tensor=2")):
        check_spikes(form, mesh)


@pytest.mark.slow
def test_spikes_on_meshes() -> None:
    on_devices(8, "test_injected.spikes_on_meshes()")


def command() -> None:
    with injecting():
        sys.exit(run_command(train_jax.main))


@pytest.mark.slow
def test_one_of_two_processes(tmp_path: Path) -> None:
    """The rows of one process alone hold a bad record: both skip the update."""
    write_model(tmp_path / "model")
    updates, size, bad = 6, 4, {1: {3: 1}, 4: {0: 4}}
    whole = records_of(updates, size, bad, 0)
    good = [record for k in range(updates) if k not in bad for record in whole[k * size : (k + 1) * size]]
    told = {}
    for name, records in (("whole", whole), ("without", good)):
        argv = flags_of(tmp_path, name, records, per_device_train_batch_size=2, packing=False)
        both = finish(start([argv] * 2, 1, "import test_injected; test_injected.command()"))
        told[name] = [sum("injected" in line for line in process.err) for process in both]
    assert told["whole"] in ([1, 1], [2, 0], [0, 2])
    check_same_end(tmp_path / "whole", tmp_path / "without", bad, updates, size)
