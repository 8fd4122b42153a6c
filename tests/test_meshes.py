"""The same run on every mesh: losses, norms and final weights of one device, whatever the axes and their sizes.

All runs are made in a process of its own that has eight simulated devices, and compared there.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_training import GOLDEN, golden_flags, worst
from tiny import ALPACA, CONFIG, ROOT, environment, make_records, run, write_json, write_model, write_tokenizer

import llama_jax.job
import train_jax
from llama_jax import sharding
from llama_jax.data.batches import Batches
from llama_jax.reporting.run_log import RunLog

ONE = "fsdp=1"
# 4 heads with 4 kv heads, or 8 with 2: tensor=8 pads both, tensor=4 the second.
MESHES = ["fsdp=2", "tensor=2", "data=2", "fsdp=4", "tensor=4", "data=2,tensor=2", "fsdp=8", "tensor=8", "data=8",
          "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4"]  # fmt: skip


def on_eight_devices(call: str) -> str:
    """What a function of this file prints in a process with eight devices."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    env = environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": paths}
    command = [sys.executable, "-c", f"import test_meshes; test_meshes.{call}"]
    result = subprocess.run(command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
    return result.stdout


@contextlib.contextmanager
def laid_out(spec: str) -> Iterator[list[tuple[float, float]]]:
    """Commands run on as many devices as the mesh has. They count as one of the Trainer's, so that an update keeps its
    examples: only their rows are divided. Yields each update's loss and norm."""
    seen: list[tuple[float, float]] = []
    sizes = [int(part.partition("=")[2]) for part in spec.split(",")]
    mesh = sharding.make_mesh(jax.devices()[: int(np.prod(sizes))], spec)
    ways, original = sharding.batch_ways(mesh), RunLog.on_update

    def divided(examples: Any, order: Any, normalise: Any, _: int, *rest: Any, **options: Any) -> Batches:
        return Batches(examples, order, normalise, ways, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda spec: mesh)
        patch.setattr(sharding, "batch_ways", lambda mesh: 1)
        patch.setattr(llama_jax.job, "Batches", divided)
        patch.setattr(RunLog, "on_update", lambda self, m: (seen.append((m.loss, m.grad_norm)), original(self, m))[1])
        yield seen


def differences(argv: list[str], meshes: list[str], out: Path) -> Iterator[tuple[str, float, float, float]]:
    """Of each mesh against one device: the largest relative difference of a loss and of a norm, and the largest
    difference of a final weight."""
    results = []
    for spec in [ONE, *meshes]:
        folder = out / spec
        with laid_out(spec) as seen:
            outcome = run(train_jax.main, *argv, "--output_dir", folder)
        assert outcome.code == 0, outcome.err
        assert f"mesh {spec}\n" in outcome.err
        results.append((np.asarray(seen), load_file(folder / "model.safetensors")))
    one, weights = results[0]
    for spec, (values, others) in zip(meshes, results[1:], strict=True):
        loss, norm = np.abs(values / one - 1).max(axis=0)
        yield spec, float(loss), float(norm), worst(others, weights)


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
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, shared: Path, tmp_path: Path) -> None:
    on_eight_devices(f"golden_on_meshes({str(shared / 'golden' / name)!r}, {str(tmp_path)!r}, {MESHES})")


# -- A live run, on meshes that divide none of its sizes --------------------------------------------------------------

# Three devices or six want 3 or 6 kv heads, 6 or 12 heads, 42 of F and 384 rows of the vocabulary.
RAW = {**CONFIG, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
LIVE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "unrolled": (["tensor=3"], {}),
    "scanned": (["fsdp=2,tensor=3"], {"scan_layers": True, "remat": "attention", "label_smoothing_factor": 0.1}),
    "summed": (["data=2,fsdp=3"], {"max_tokens_per_device": 128, "per_device_train_batch_size": 4}),
    "adafactor": (["tensor=3", "fsdp=6"], {"optim": "adafactor"}),
}


def live_on_meshes(folder: str, names: list[str]) -> None:
    for name in names:
        meshes, changes = LIVE[name]
        flags = {
            **{"model_name_or_path": Path(folder) / name, "data_path": Path(folder) / "data.json", "use_cpu": True},
            **{"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "hf_compat": "5"},
            **{"learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-4, "save_strategy": "no", **changes},
        }
        argv = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
        for spec, loss, norm, weight in differences(argv, meshes, Path(folder) / f"{name}-out"):
            print(f"{name} {spec}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}")
            # As derived in test_training.py's test_any_run_is_torchs.
            assert loss <= 1e-5 and norm <= 1e-4 and weight <= 1e-5


def test_live(tmp_path: Path) -> None:
    """The tokenizer adds a row to the vocabulary; biases are padded too."""
    for name in LIVE:
        raw = {**RAW, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": name == "scanned"}
        write_tokenizer(write_model(tmp_path / name, raw), pad_token=None)
    write_json(tmp_path / "data.json", ALPACA * 3)
    on_eight_devices(f"live_on_meshes({str(tmp_path)!r}, {list(LIVE)})")


def test_a_width_that_cannot_be_divided(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model"), write_json(tmp_path / "data.json", make_records(4))
    flags = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    mend = "--mesh: fsdp=6 does not divide hidden_size 32; use data=3,fsdp=2,tensor=1"
    on_eight_devices(f"refused({[*flags, '--mesh', 'fsdp=6']}, {mend!r})")


def refused(argv: list[str], said: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()
        patch.setattr(jax, "devices", lambda: devices[:6])
        outcome = run(train_jax.main, *argv)
    assert outcome.code == 2 and outcome.compiled == 0 and said in outcome.err.splitlines()[-1], outcome.err
