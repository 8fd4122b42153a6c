"""The environment of a launcher gives each process its place; what contradicts itself is refused in one line."""

from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import Job
from tiny import ALPACA, run, write_json, write_model

import convert_torch_to_flax
import train_jax
from llama_jax.base import errors
from llama_jax.base.errors import InputError
from llama_jax.base.launcher import PlaceError, find_place, rank_of
from llama_jax.command import generate
from llama_jax.distributed import processes

# Variables as the launchers of that name set them, recorded from real ones but for deepspeed (launch.py of 0.17), Intel
# MPI, Kubeflow and SLURM (their documentation). The expectation is what `jax.distributed.initialize` gets: address,
# number of processes, number of this one, its GPUs (None: all).
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "host0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NODEID": "1", "SLURM_NTASKS": "16"}
SRUN |= {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
ONE_A_HOST = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0"}
DEEPSPEED |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "CUDA_VISIBLE_DEVICES": "4,6"}
LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
PLACES: dict[str, tuple[dict[str, str], tuple | None]] = {
    "nothing": ({}, None),
    "left over": (LEFT_OVER, None),
    "torchrun": (TORCHRUN, ("host0:19500", 4, 3, [1])),
    "torchrun --standalone": ({**TORCHRUN, "MASTER_PORT": "37087"}, ("host0:27087", 4, 3, [1])),
    "torchrun, IPv6": ({**TORCHRUN, "MASTER_ADDR": "fe80::1"}, ("[fe80::1]:19500", 4, 3, [1])),
    "torchrun, a port for jax": ({**TORCHRUN, "JAX_COORDINATOR_PORT": "7"}, ("host0:7", 4, 3, [1])),
    "torchrun, one process a host": (
        {**TORCHRUN, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        ("host0:19500", 2, 1, [0]),
    ),
    "torchrun on a CPU": ({**TORCHRUN, "JAX_PLATFORMS": "cpu"}, ("host0:19500", 4, 3, None)),
    "deepspeed": (DEEPSPEED, ("127.0.0.1:19500", 2, 1, [1])),
    "Kubeflow": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
        ("job-master-0:13456", 2, 1, None),
    ),
    "mpirun": (
        {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "57409536.0;tcp://192.0.2.2:44993"},
        ("192.0.2.2:63168", 2, 1, [1]),  # jax's port, of the job's number
    ),
    "mpirun of Open MPI 5": (OPEN_MPI, ("127.0.0.1:19500", 2, 1, [1])),
    "mpirun on several hosts": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "host0"},
        ("host0:19500", 2, 1, None),
    ),
    "mpirun of torch's variables": ({**OPEN_MPI, **TORCHRUN}, ("host0:19500", 4, 3, [1])),
    "mpirun, a GPU bound to each": ({**OPEN_MPI, "CUDA_VISIBLE_DEVICES": "5"}, ("127.0.0.1:19500", 2, 1, None)),
    "mpiexec": (HYDRA, ("127.0.0.1:19500", 2, 1, [1])),
    "srun": (SRUN, ("node07:61440", 16, 9, [1])),
    "srun, one a host": ({**SRUN, **ONE_A_HOST}, ("node07:61440", 2, 1, None)),
    "srun, GPUs bound to each": ({**SRUN, "SLURM_GPUS_PER_TASK": "2"}, ("node07:61440", 16, 9, None)),
    "srun of torchrun": ({**SRUN, **ONE_A_HOST, **TORCHRUN}, ("host0:19500", 4, 3, [1])),
    "srun of a torchrun of one": ({**SRUN, **LEFT_OVER}, ("node07:61440", 16, 9, [1])),
    "srun, the size exported": ({**SRUN, "WORLD_SIZE": "16"}, ("node07:61440", 16, 9, [1])),
    "srun --mpi=pmi2": ({**SRUN, "PMI_RANK": "9", "PMI_SIZE": "16"}, ("node07:61440", 16, 9, [1])),
    "sbatch without srun": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, None),
}
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "no rank": ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set (the environment of torchrun); start all"),
    "no size": ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
    "a size of another launcher": (
        {**SRUN, "WORLD_SIZE": "2"},
        "WORLD_SIZE is 2, and srun has 16 for it (the environment of torchrun); start all processes by one launcher, "
        "or one process without: unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE",
    ),
    "a rank too high": ({**TORCHRUN, "RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4: a process of N has"),
    "a local rank too high": ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, the processes of this host are 2"),
    "words": ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE is 'four': should be a number"),
    "no address": (
        {**TORCHRUN, "MASTER_ADDR": ""},
        "WORLD_SIZE is 4, but MASTER_ADDR is not set: torchrun sets both; without a launcher, python train_jax.py ... "
        "uses all GPUs",
    ),
    "no port": ({**TORCHRUN, "MASTER_PORT": ""}, "but MASTER_PORT is not set"),
    "no port's number": ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999': should be a port"),
    "hosts unknown": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        "on several hosts without naming the first: set MASTER_ADDR for all, as mpirun -x MASTER_ADDR=HOST0",
    ),
    "few GPUs": (
        {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "0"},
        "CUDA_VISIBLE_DEVICES=0 has 1 GPU(s) for the host's 2 processes",
    ),
}
NAMES = sorted({name for env, _ in PLACES.values() for name in env} - {"JAX_PLATFORMS"})


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments that `jax.distributed.initialize` got, on a host with GPUs and without any launcher's variable."""
    got: list[Any] = []

    def initialize(*args: Any, **options: Any) -> None:
        assert options["cluster_detection_method"] == "deactivate"
        got.append(args)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name in [*NAMES, "JAX_PLATFORMS"]:
        monkeypatch.delenv(name, raising=False)
    return got


def set_all(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("case", PLACES)
def test_each_launcher(case: str, joined: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env, expected = PLACES[case]
    set_all(monkeypatch, env)
    processes.join(None, None, None)
    assert joined == ([] if expected is None else [expected])
    assert rank_of() == (expected[2] if expected else 0)


@pytest.mark.parametrize("case", REFUSED)
def test_a_contradiction_is_refused(case: str, joined: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env, said = REFUSED[case]
    set_all(monkeypatch, env)
    with pytest.raises(InputError) as e:
        processes.join(None, None, None)
    assert said in str(e.value) and joined == []


def test_flags_under_a_launcher(joined: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TORCHRUN)
    with pytest.raises(
        InputError, match="--process_id 0 of --num_processes 2: torchrun made this process 3 of 4; leave"
    ):
        processes.join("host1:1", 2, 0)
    processes.join("host1:1", 4, 3)
    processes.join("host1:1", None, None)
    assert joined == [("host1:1", 4, 3, [1])] * 2


def test_tpu_hosts(joined: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One process drives all chips of a host: torchrun may start one a host."""
    monkeypatch.setattr(processes, "on_tpu_host", lambda: True)
    set_all(monkeypatch, TORCHRUN)
    with pytest.raises(InputError, match=r"torchrun started several .* a host of TPUs.*start one a host: python"):
        processes.join(None, None, None)
    processes.join(None, None, None, use_cpu=True)
    set_all(monkeypatch, {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    processes.join(None, None, None)
    assert [args[:3] for args in joined] == [("host0:19500", 4, 3)] * 2


def test_the_port_is_not_the_launchers(joined: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun listens on MASTER_PORT, and a second run on the next: jax's port differs from both, and run from run."""
    set_all(monkeypatch, TORCHRUN)
    place = find_place()
    assert place
    own = {}
    for port in [*range(1, 65536, 97), *range(29400, 29600)]:
        monkeypatch.setenv("MASTER_PORT", str(port))
        own[port] = int(processes._coordinator(place, None).rpartition(":")[2])
    assert all(1024 <= mine < 32768 and mine != port for port, mine in own.items())
    near = range(29400, 29600)
    assert len({own[port] for port in near}) == len(near) and not {own[port] for port in near} & {*near}


FAMILIES = {  # the innermost first: rank, size, local rank, local size
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": tuple(f"OMPI_COMM_WORLD_{x}" for x in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", None),
}
VALUES = st.sampled_from(["", "0", "1", "2", "3", "-1", "two"]) | st.integers(0, 4).map(str)


def expected_place(env: dict[str, str]) -> tuple[str, int, int] | str | None:
    """The rules, family by family: a name with rank and size, "refused", or None for one process."""
    told = {name: [None if not (key and env.get(key)) else env[key] for key in keys] for name, keys in FAMILIES.items()}
    if not env.get("SLURM_STEP_NODELIST"):
        del told["srun"]
    if told["mpiexec"][2] is None:
        del told["mpiexec"]
    unfinished: list[list[str | None]] = []
    for name, (rank, size, local, local_size) in told.items():
        if not all(value is None or value.isdigit() for value in (rank, size)):
            return "refused"
        if size == "0" or (rank and size and int(rank) >= int(size)):
            return "refused"
        if size in (None, "1") and rank in (None, "0"):
            continue  # a launcher of one, or none
        if rank is None or size is None:
            unfinished.append([rank, size])
            continue
        if any(x not in (None, rank) or y not in (None, size) for x, y in unfinished):
            return "refused"
        if not all(value is None or value.isdigit() for value in (local, local_size)):
            return "refused"
        if local_size and not int(local or 0) < int(local_size) <= int(size):
            return "refused"
        return name, int(rank), int(size)
    return "refused" if unfinished else None


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str]:
    """Any mixture of the variables, often a whole and consistent family."""
    env: dict[str, str] = {}
    for keys in FAMILIES.values():
        if draw(st.booleans()):
            size = draw(st.integers(1, 4))
            rank = draw(st.integers(0, size - 1))
            env |= {key: str(x) for key, x in zip(keys, (rank, size, rank, size), strict=True) if key}
    if draw(st.booleans()):
        env["SLURM_STEP_NODELIST"] = "node1"
    names = [key for keys in FAMILIES.values() for key in keys if key]
    for name, value in draw(st.lists(st.tuples(st.sampled_from(names), VALUES), max_size=3)):
        env[name] = value
    for name in draw(st.lists(st.sampled_from(names), max_size=2)):
        env.pop(name, None)
    return env


@settings(max_examples=120)
@given(environments())
def test_any_environment(env: dict[str, str]) -> None:
    expected = expected_place(env)
    try:
        place = find_place(env)
    except PlaceError as e:
        assert expected == "refused", env
        assert "\n" not in str(e) and rank_of(env) == 0  # 0: the process prints the line
        return
    if place is None:
        assert expected is None, env
    else:
        name = next(n for n, keys in FAMILIES.items() if keys[0] == place.launcher.rank)
        assert (name, place.rank, place.size) == expected, env


def test_commands_of_one_process(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes would write into one folder, or answer twice."""
    set_all(monkeypatch, {**TORCHRUN, "RANK": "0"})
    model, data = write_model(tmp_path / "model"), write_json(tmp_path / "data.json", ALPACA)
    for command, argv, plain in (
        (generate.main, ["--instruction", "hi"], "python -m llama_jax.generate"),
        (convert_torch_to_flax.main, ["--output_dir", tmp_path / "out"], "convert_torch_to_flax.py"),
        (train_jax.main, ["--data_path", data, "--dry_run", "h200:8"], "python train_jax.py --dry_run"),
    ):
        outcome = run(command, "--model_name_or_path", model, *argv)
        (line,) = outcome.err.splitlines()
        assert outcome.code == 2 and outcome.compiled == 0
        assert line == (
            f"error: {plain} runs in one process, but torchrun started 4 (WORLD_SIZE); start it without a launcher: "
            f"{plain} ..."
        )
    assert not (tmp_path / "out").exists()


def test_the_first_process_prints_before_its_launcher_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others, which print nothing, wait before they end: torchrun then ends all."""
    slept: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    for rank, printed, waits in (("0", 1, 0), ("3", 0, 1)):
        set_all(monkeypatch, {**TORCHRUN, "RANK": rank})
        outcome = run(train_jax.main, "--model_name_or_path", "m", "--data_path", "d", "--learning_rate", "-1")
        assert (outcome.code, outcome.err.count("error: --learning_rate"), len(slept)) == (2, printed, waits)


def test_settings_of_accelerate(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TrainingArguments takes the precision of `accelerate launch` where no flag gives it."""
    job = Job(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    outcome = run(train_jax.main, *job.argv("out", explain="text"))
    assert "ACCELERATE_MIXED_PRECISION=bf16 (accelerate launch): read as --bf16 True" in outcome.err.splitlines()
    assert run(train_jax.main, *job.argv("out", explain="text", bf16=True)).err.count("ACCELERATE") == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    (line,) = run(train_jax.main, *job.argv("out")).err.splitlines()
    assert line.startswith(
        "error: ACCELERATE_MIXED_PRECISION is fp16 (accelerate launch --mixed_precision): float16 is not there"
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    said = run(train_jax.main, *job.argv("out", explain="text")).err.splitlines()
    assert "ACCELERATE_MIXED_PRECISION=fp8 (accelerate launch): read as --bf16 True --fp8 True" in said
