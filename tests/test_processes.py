"""Several real processes are one run: the curve and the folder of one process that has all their devices.

They meet on this machine by gloo, as hosts do over a network.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from forks import Process
from golden_adapters import WIDE
from safetensors.numpy import load_file
from test_training import CLOCK, EPSILON, Job, checkpoints, worst
from tiny import (
    CHANGING,
    COMPILATION,
    CONFIG,
    ROOT,
    environment,
    hf_shapes,
    make_records,
    of_devices,
    run,
    slow_unless,
    write_json,
    write_model,
)

import train_jax
from llama_jax.distributed import processes
from llama_jax.hf.manifest import read_manifest
from llama_jax.proof.verify import compare_tensors

# The command under torchrun. A rank may fail on purpose in an update: FAILS holds the rank, the update and the way.
LAUNCHED = """
import os, sys
sys.path.insert(0, {root!r})
sys.modules["torch"] = None  # which a user may not have; transformers would import it, for 3 s
import train_jax
from llama_jax.base.errors import run_command
from llama_jax.hf import writer
from llama_jax.reporting.run_log import RunLog

plan_shards = writer.plan_shards
writer.plan_shards = lambda sizes, limit: plan_shards(sizes, {shard_bytes})
rank, update, how = os.environ.get("FAILS", "- 0 -").split()
on_update = RunLog.on_update

def failing(self, metrics):
    on_update(self, metrics)
    if os.environ["RANK"] == rank and metrics.step == int(update):
        raise (RuntimeError("broken") if how == "bug" else OSError(28, "No space left on device", "weights"))

RunLog.on_update = failing
code = run_command(train_jax.main)
print("rank", os.environ["RANK"], "ends with", code, file=sys.stderr)
sys.exit(code)
"""
# The command, which tells what it read of the weights, and whose shards are small.
SHARD_BYTES = 20_000
COUNTED = f"""
import dataclasses, sys
from llama_jax.hf import source, writer
import train_jax
from llama_jax.base.errors import run_command

read = 0
load_params, plan_shards = source.load_params, writer.plan_shards

def counted(tensor):
    def part(index):
        global read
        array = tensor.read(index)
        read += array.nbytes
        return array
    return dataclasses.replace(tensor, read=part)

source.load_params = lambda tensors, *rest: load_params({{n: counted(t) for n, t in tensors.items()}}, *rest)
writer.plan_shards = lambda sizes, limit: plan_shards(sizes, {SHARD_BYTES})
code = run_command(train_jax.main)
if code == 0:
    print("bytes read:", read, file=sys.stderr)
sys.exit(code)
"""
# What gloo prints of each connection, several threads at a time: pieces of its lines may stand in any order.
GLOO = re.compile(
    r"(\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d|\n)*"
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(argvs: list[list[str]], per_process: int, code: str = COUNTED) -> list[Process]:
    """A process for each command line, with so many devices each."""
    meeting = ["--coordinator_address", f"localhost:{free_port()}", "--num_processes", str(len(argvs)), "--process_id"]
    return [
        Process([*argv, *([*meeting, str(i)] if len(argvs) > 1 else [])], environment() | of_devices(per_process), code)
        for i, argv in enumerate(argvs)
    ]


class Told(NamedTuple):
    out: str
    err: list[str]
    bytes_read: int


def finish(processes: list[Process], code: int = 0) -> list[Told]:
    """What each printed and said; all have ended with this code."""
    try:
        told = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), [err[-3000:] for _, err in told]
    result = []
    for out, err in told:
        lines = err.splitlines()
        read = [int(line.split()[-1]) for line in lines if line.startswith("bytes read:")]
        printed = "".join(line for line in out.splitlines(True) if not GLOO.fullmatch(line))
        result.append(Told(printed, [line for line in lines if not line.startswith("bytes read:")], sum(read)))
    return result


def torchrun(argv: list[str], folder: Path, **env: str) -> subprocess.Popen:
    """Start two processes by the real torchrun."""
    script = folder / "launched.py"
    script.write_text(LAUNCHED.format(root=str(ROOT), shard_bytes=SHARD_BYTES))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(script), *argv], env=environment() | env, **pipes)


def log_of(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"][:-1]
    return [{k: v for k, v in e.items() if k not in CLOCK} for e in history]


def assert_same_manifests(a: Path, b: Path) -> None:
    """Each is right for its own files; the logits differ by no more than weights that are 1e-5 apart make them."""
    first, second = (read_manifest(folder) for folder in (a, b))
    for folder, manifest in ((a, first), (b, second)):
        assert [row for row in compare_tensors(folder, manifest) if not row.holds] == []
    assert (first.columns, first.prompts, first.files.keys()) == (second.columns, second.prompts, second.files.keys())
    for one, two in zip(first.logits, second.logits, strict=True):
        np.testing.assert_allclose(two.chosen, one.chosen, rtol=0, atol=1e-3 * one.largest.max())


def assert_same_run(a: Path, b: Path) -> None:
    """The same files; in them the same numbers, but for the order in which the devices' shares are summed. Bounds as in
    test_training.py, derived at test_any_run_is_torchs for this epsilon."""
    files = [{p.name: p for p in folder.iterdir() if p.name not in CHANGING} for folder in (a, b)]
    assert files[0].keys() == files[1].keys()
    for name, path in files[0].items():
        if path.suffix == ".safetensors":
            assert worst(load_file(files[1][name]), load_file(path)) <= 1e-5, name
        elif path.is_file():
            assert files[1][name].read_bytes() == path.read_bytes(), name
    assert_same_manifests(a, b)
    logs = [log_of(folder) for folder in (a, b)]
    assert [list(entry) for entry in logs[0]] == [list(entry) for entry in logs[1]]
    for first, second in zip(*logs, strict=True):
        for key, value in first.items():
            # 4.37 rounds a loss to four decimals, which may differ by one digit.
            rtol, atol = (1e-4, 0.0) if key == "grad_norm" else (1e-5, 1.01e-4 if key == "loss" else 0.0)
            np.testing.assert_allclose(second[key], value, rtol=rtol, atol=atol, err_msg=key)


def matrices_read(raw: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all matrices and of all vectors."""
    sizes = [(len(shape), 4 * math.prod(shape)) for shape in hf_shapes(raw).values()]
    return sum(n for axes, n in sizes if axes == 2), sum(n for axes, n in sizes if axes == 1)


# Evaluated, one example without a label (the Trainer's loss of it is NaN), and logged at an epoch's end, where 4.37 has
# begun the next update: what is read from the devices token by token.
TOKEN_LOSSES = {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, {"hf_compat": "5", "max_steps": 4, "save_steps": 3, "max_tokens_per_device": 128}),
        (4, {"mesh": "data=2,fsdp=2,tensor=2", "scan_layers": True, "save_strategy": "no", **TOKEN_LOSSES}),
        (2, {"mesh": "context=4", "hf_compat": "5", "save_strategy": "no", **TOKEN_LOSSES}),
    ],
    ids=["two", "four", "context"],
)
def test_as_one_process(count: int, flags: dict[str, Any], tmp_path: Path) -> None:
    raw = {**CONFIG, "vocab_size": 384}  # as many rows on each device
    per_device, accumulated = (4, 1) if count == 2 else (1, 2)
    flags = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulated, **flags}
    job = Job(tmp_path, adam_epsilon=EPSILON, **flags)
    shutil.rmtree(tmp_path / "model")  # the one file of it goes before an index
    write_model(tmp_path / "model", raw, shards=3)
    records = make_records(30)
    records[0]["labels"] = [-100] * len(records[0]["labels"])
    write_json(tmp_path / "data.json", records)
    write_json(tmp_path / "eval.json", make_records(9, seed=1))
    job.flags["eval_data_path"] = tmp_path / "eval.json"
    (one,) = finish(start([job.argv("one")], 2 * count))
    several = finish(start([job.argv("several")] * count, 2))
    assert_same_run(tmp_path / "one", tmp_path / "several")
    assert len(list((tmp_path / "several").glob("model-*.safetensors"))) > count  # each wrote one, some two
    assert any(f"devices: {2 * count} cpu device(s) of {count} process(es)" in line for line in several[0].err)
    assert several[0].out.count("'loss'") == one.out.count("'loss'") > 0
    assert [told.out for told in several[1:]] == [""] * (count - 1)  # one log
    assert [told.err for told in several[1:]] == [[]] * (count - 1)
    matrices, vectors = matrices_read(raw)
    # Two processes: half of each matrix. Four, as two replicas: half of each too. Vectors lie on every device.
    print([told.bytes_read for told in (one, *several)], matrices, vectors)
    for told in several:
        assert told.bytes_read == matrices // 2 + vectors
    assert one.bytes_read == matrices * (2 if count == 4 else 1) + vectors


@pytest.mark.slow
def test_an_adapter_as_one_process(tmp_path: Path) -> None:
    """Over a quantized base; one process then resumes the checkpoint of two."""
    flags = {"hf_compat": "5", "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "use_peft": True}
    flags |= {"lora_r": 4, "lora_dropout": 0, "lora_target_modules": "q_proj", "scan_layers": True}
    flags |= {"load_in_4bit": True, "use_bnb_nested_quant": True}
    job = Job(tmp_path, adam_epsilon=EPSILON, **flags)
    write_model(tmp_path / "model", WIDE)
    write_json(tmp_path / "data.json", make_records(30))
    finish(start([job.argv("one")], 4))
    several = finish(start([job.argv("several")] * 2, 2))
    assert [told.out for told in several[1:]] == [""]
    assert_same_run(tmp_path / "one", tmp_path / "several")
    shutil.copytree(tmp_path / "several" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    (resumed,) = finish(start([job.argv("resumed", resume_from_checkpoint=True)], 4))
    assert any("resumed from" in line for line in resumed.err)
    assert_same_run(tmp_path / "one", tmp_path / "resumed")


@pytest.mark.slow
def test_moments_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint of the same two processes without --offload_optimizer, an update has the same bits: the digests
    are of all moments and weights. It sums two blocks, of which each process has a row; compiled as a user's, as in
    test_offload.py."""
    users = " ".join(f"--{option}={value}".lower() for option, (_, value) in COMPILATION.items())
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {users}")
    blocks = {"per_device_train_batch_size": 4, "max_tokens_per_device": 128}
    job = Job(tmp_path, hf_compat="5", bf16=True, max_steps=2, warmup_steps=0, save_steps=1, **blocks)

    def train(name: str, **flags: Any) -> Path:
        first, _ = finish(start([job.argv(name, **flags)] * 2, 1))
        assert any("at most 2 block(s) an update" in line for line in first.err), first.err
        return tmp_path / name

    plain = train("plain")
    hosted = train("hosted", offload_optimizer=True, resume_from_checkpoint=plain / "checkpoint-1")
    assert log_of(hosted) == log_of(plain)
    one, two = (json.loads((out / "checkpoint-2/run/metadata").read_text()) for out in (plain, hosted))
    assert one["digests"] == two["digests"]


@pytest.mark.slow
def test_sigterm_to_one(tmp_path: Path) -> None:
    """All stop after the same update; one process with another mesh goes on, as a run that was not stopped."""
    flags = {"per_device_train_batch_size": 1, "save_steps": 1000, "lr_scheduler_type": "constant", "warmup_steps": 0}
    job = Job(tmp_path, hf_compat="5", max_steps=200, **flags)
    processes = start([job.argv("stopped")] * 2, 2)
    while processes[0].out.count("'loss'") < 3:
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    told = finish(processes, code=143)
    (name,) = checkpoints(tmp_path / "stopped")
    step = int(name.removeprefix("checkpoint-"))
    assert 3 <= step < 200 and any(f"stopped after update {step}" in line for line in told[0].err)
    job.flags["max_steps"] = step + 4
    finish(start([job.argv("stopped", resume_from_checkpoint=True, mesh="data=2,fsdp=2")], 4))
    finish(start([job.argv("whole")], 4))
    values = [[e["loss"] for e in log_of(tmp_path / out) if "loss" in e] for out in ("stopped", "whole")]
    assert len(values[0]) == step + 4
    # Sums of the same numbers in another order, as for the golden runs.
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        slow_unless(False, [{"learning_rate": -1}] * 2, "--learning_rate -1.0: should not be below 0"),
        slow_unless(False, [{"mesh": "fsdp=3"}] * 2, "--mesh fsdp=3: needs 3 device(s), but there are 2"),
        ([{}, {"data_path": "nowhere.json"}], "process 1: nowhere.json: no such data file"),
    ],
    ids=["a flag", "the mesh", "a file of one host"],
)
def test_a_mistake_is_said_once(changes: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    job = Job(tmp_path)
    first, second = finish(start([job.argv("out", **change) for change in changes], 1), code=2)
    assert [line[: len(said) + 7] for line in first.err if line.startswith("error:")] == [f"error: {said}"]
    assert second.err == [] and first.out == second.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["examples", "a flag", "folders"])
def test_what_is_not_the_same_everywhere(what: str, tmp_path: Path) -> None:
    """Each process would train on its own, or fail at the end: both hear of it before anything compiles."""
    job = Job(tmp_path)
    changes, said = {
        "examples": ({"data_path": tmp_path / "other.json"}, "data: all processes should have the same, but process 0"),
        "a flag": ({"learning_rate": 2e-3}, "--learning_rate: all processes should have the same, but process 0 has"),
        "folders": ({"output_dir": tmp_path / "own"}, "process 1 does not see the files of process 0 in it"),
    }[what]
    write_json(tmp_path / "other.json", make_records(21, vocab_size=200))
    first, _ = finish(start([job.argv("out"), job.argv("out", **changes)], 1), code=2)
    (line,) = [line for line in first.err if line.startswith("error:")]
    assert said in line
    assert list((tmp_path / "out").iterdir()) == []


def test_half_a_meeting(tmp_path: Path) -> None:
    for flags, said in (
        ({"num_processes": 2}, "--num_processes, --process_id and --coordinator_address: give all three"),
        ({"num_processes": 2, "process_id": 0}, "and --coordinator_address"),
        ({"coordinator_address": "localhost"}, "--coordinator_address localhost: should be HOST:PORT"),
        ({"coordinator_address": "localhost:1"}, "give --num_processes and --process_id too"),
        ({"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 2}, "below --num_processes 2"),
    ):
        outcome = run(train_jax.main, *Job(tmp_path).argv("out", **flags))
        assert outcome.code == 2, outcome.err
        (line,) = outcome.err.splitlines()
        assert said in line


def test_the_least_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that knows no limit leaves all without one."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for told, expected in ((["7", "5", "6"], 5), (["7", "", "6"], None), (["", "", ""], None)):
        monkeypatch.setattr(processes, "exchange", lambda value, told=told: told)
        assert processes.least(7) == expected


@pytest.mark.slow
def test_a_mistake_under_torchrun(tmp_path: Path) -> None:
    """The processes meet, and the first prints, before torchrun ends it because the other has ended."""
    started = torchrun(Job(tmp_path).argv("out", mesh="fsdp=3"), tmp_path)
    _, err = started.communicate(timeout=200)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert started.returncode == 1
    assert lines == ["error: --mesh fsdp=3: needs 3 device(s), but there are 2; set one axis to -1, or give auto"], err[
        -3000:
    ]


@pytest.mark.slow
def test_nobody_comes(tmp_path: Path) -> None:
    """Without the others, or with its port in use, a process ends with one line instead of waiting or aborting."""
    job, port = Job(tmp_path), free_port()
    code = "import sys; sys.path.insert(0, {!r}); import train_jax; from llama_jax.base.errors import run_command\n"
    code = code.format(str(ROOT)) + "from llama_jax.distributed import processes; processes.JOIN_SECONDS = 1\n"
    alone = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "JAX_COORDINATOR_PORT": str(port)}
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        several = [
            subprocess.Popen(
                [sys.executable, "-c", code + "sys.exit(run_command(train_jax.main))", *job.argv("out")],
                env=environment() | alone | {"RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        err = [process.communicate(timeout=200)[1].splitlines()[-1] for process in several]
    assert err[0].startswith(f"error: port {port} of this host is in use, at which the 2 processes of this run would")
    assert err[1].startswith(f"error: process 1 of 2: not all processes came to 127.0.0.1:{port} within 1 s; see the")
    assert [process.returncode for process in several] == [2, 1]


@pytest.mark.slow
def test_torchrun_as_one_process(tmp_path: Path) -> None:
    """stanford_alpaca's own command; then SIGTERM to torchrun, which all processes get: one checkpoint, code 143."""
    job = Job(tmp_path, adam_epsilon=EPSILON, hf_compat="5")
    shards = {"fsdp": "full_shard auto_wrap", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    started = torchrun(job.argv("several", **shards), tmp_path)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 0, err[-3000:]
    assert "devices: 2 cpu device(s) of 2 process(es), mesh fsdp=2 (auto)" in err.splitlines()
    assert any(line.startswith("--fsdp: no meaning here") and "--mesh auto" in line for line in err.splitlines())
    assert out.count("'loss'") == 6
    finish(start([job.argv("one")], 2))
    assert_same_run(tmp_path / "one", tmp_path / "several")

    started = torchrun(job.argv("stopped", max_steps=2000, save_steps=1000), tmp_path)
    assert started.stdout
    while "'loss'" not in started.stdout.readline():
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=100)
    (name,) = checkpoints(tmp_path / "stopped")
    assert err.count(f"stopped after update {name.removeprefix('checkpoint-')}, saved as {name}") == 1
    assert "rank 0 ends with 143" in err and "rank 1 ends with 143" in err


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how"), [(1, "bug"), (0, "bug"), (1, "disk")])
def test_a_rank_fails(rank: int, how: str, tmp_path: Path) -> None:
    """torchrun hears of it at once, where jax's own end would wait 300 s for the other."""
    started = torchrun(Job(tmp_path, max_steps=2000).argv("out"), tmp_path, FAILS=f"{rank} 3 {how}")
    _, err = started.communicate(timeout=200)
    said = "RuntimeError: broken" if how == "bug" else "error: writing failed: No space left on device: weights"
    assert started.returncode == 1
    assert err.splitlines().count(said) == 1, err[-3000:]
    assert (f"(process {rank} of 2; where a connection failed" in err) == (how == "bug")
