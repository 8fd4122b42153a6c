"""Read traces: the division of a device's time, against sums by hand, and a run's own trace on the CPU."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_training import Job, stop_in_the_third_update
from tiny import ROOT, environment, run

import train_jax
from llama_jax.distributed import profile as room
from llama_jax.distributed.profile import OPTIMIZER, OTHER, covered, optimizer_kernels, time_spent
from llama_jax.run.profile import Profile
from llama_jax.setup.arguments import parse_arguments

NEEDED = ["--model_name_or_path", "m", "--data_path", "d.json"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=12))
def test_covered(spans: list[tuple[int, int]]) -> None:
    """By marking each unit of time."""
    marked = {t for start, length in spans for t in range(start, start + length)}
    assert covered([(start, start + length) for start, length in spans]) == len(marked)


def test_division_of_a_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In ns: three streams of GPU 0, two updates; GPU 1 and other lines do not count."""

    def event(name: str, start: float, end: float) -> Any:
        return SimpleNamespace(name=name, start_ns=start, end_ns=end, stats=[])

    first = [
        *(event("nvjet_sm90_gemm", 0, 4e6), event("cudnn_sdpa_bprop", 4e6, 5e6), event("loop_add_fusion_3", 5e6, 8e6)),
        *(event("loop_add_fusion_4", 8e6, 10e6), event("nvjet_sm90_gemm", 14e6, 20e6)),
    ]
    second = [event("ncclKernel_AllGather", 9e6, 12e6)]
    third = [event("MemcpyD2H", 11e6, 13e6), event("MemcpyH2D", 12e6, 13e6), event("MemcpyH2D", 18e6, 21e6)]
    random.Random(0).shuffle(first)
    planes = [
        SimpleNamespace(
            name="/device:GPU:0",
            lines=[
                SimpleNamespace(name="Stream #1(Compute)", events=first),
                SimpleNamespace(name="Stream #2(Compute)", events=second),
                SimpleNamespace(name="Stream #3(MemcpyH2D,MemcpyD2H)", events=third),
                SimpleNamespace(name="XLA Ops", events=[event("x", 0, 9e9)]),
            ],
        ),
        SimpleNamespace(name="/device:GPU:1", lines=[SimpleNamespace(name="Stream #1", events=[event("x", 0, 9e9)])]),
    ]
    (tmp_path / "a.xplane.pb").touch()
    read = SimpleNamespace(from_file=lambda path: SimpleNamespace(planes=planes))
    monkeypatch.setattr(room.jax.profiler, "ProfileData", read)
    spent, kernels = time_spent(tmp_path, 2, {"loop_add_fusion_4"})
    expected = {"matmuls": 5.0, "attention": 0.5, "collectives": 1.5, "host copies": 2.5, OPTIMIZER: 1.0, OTHER: 1.5}
    # From 10 to 13 ms the collective and two copies; from 20 to 21 ms the last copy.
    assert spent == expected | {"exposed": 2.0, "idle": 0.5, "whole": 10.5}
    assert kernels[0] == ("nvjet_sm90_gemm", 10.0)


def test_kernels_of_the_optimizer() -> None:
    """By the scope's name in a real program; names in traces have no dots."""

    @jax.named_scope(OPTIMIZER)
    def step(x: jax.Array, g: jax.Array) -> jax.Array:
        return x - 0.1 * jnp.tanh(g)

    def update(x: jax.Array) -> jax.Array:
        return step(x, jax.grad(lambda x: jnp.sum(jnp.sin(x) ** 2))(x))

    program = jax.jit(update).lower(jnp.ones((8, 8))).compile()
    found = optimizer_kernels([program])
    text = program.as_text().replace(".", "_")
    assert found and all(f"{name} = " in text for name in found)
    assert not optimizer_kernels([jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()])


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_parts(begin: int, length: int, first: int, more: int) -> None:
    """Each update once, in order, and those of the range profiled."""
    nothing: Any = None
    made = Profile(
        range(begin, begin + length), Path("nowhere"), programs=nothing, made=nothing, watch=nothing, report=nothing
    )
    found, profiled = [], []
    made._profiling = profiled.append  # type: ignore[method-assign, assignment]
    for updates, _ in made.parts(first, first + more):
        found += updates
    assert found == [*range(first, first + more)]
    inside = [k for updates in profiled for k in updates]  # type: ignore[attr-defined]
    assert inside == [k for k in range(begin, begin + length) if first <= k < first + more]


@pytest.mark.parametrize("text", ["", "3", "3:2", "0:4", "1:", "a:b", "1:2:3", "-1:2", "\uff11:\uff12"])
def test_refused(text: str) -> None:
    with pytest.raises(Exception, match=f"--profile_updates {text}: should be as 10:13"):
        parse_arguments([*NEEDED, f"--profile_updates={text}"])
    assert parse_arguments([*NEEDED, "--profile_updates", "2:2"]).profiled == range(1, 2)


@pytest.mark.slow
def test_a_run_with_a_profile(tmp_path: Path) -> None:
    """The same weights as without; a trace for xprof and one for Perfetto; beyond the run it is refused."""
    job = Job(tmp_path)
    plain = job.train("plain")
    outcome = run(train_jax.main, *job.argv("traced", profile_updates="2:3"))
    assert outcome.code == 0 and f"profile of updates 2:3: {tmp_path / 'traced' / 'profile'}, for xprof" in outcome.err
    assert (plain / "model.safetensors").read_bytes() == (tmp_path / "traced" / "model.safetensors").read_bytes()
    (trace,) = (tmp_path / "traced" / "profile").rglob("*.xplane.pb")
    modules = json.loads(gzip.decompress((trace.parent / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
    assert any("jit" in str(event.get("args", "")) or "Execute" in event.get("name", "") for event in modules)
    outcome = run(train_jax.main, *job.argv("traced", profile_updates="5:7", overwrite_output_dir=True))
    assert outcome.code == 2 and "--profile_updates 5:7: the run has 6 updates" in outcome.err and not outcome.compiled
    outcome = run(train_jax.main, *job.argv("plain", profile_updates="1:2", max_steps=7, resume_from_checkpoint=True))
    assert outcome.code == 0, outcome.err
    assert "the run goes on after them; nothing is profiled" in outcome.err and not (plain / "profile").exists()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "profile").write_text("a file of the user's")
    command = [sys.executable, str(ROOT / "train_jax.py"), *job.argv("file", profile_updates="2:3")]
    done = subprocess.run(command, env=environment(torch=False), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning: --profile_updates: " in done.stderr and "no profile is" in done.stderr
    assert (tmp_path / "file" / "profile").read_text() == "a file of the user's"


def test_a_stop_within_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No times are reported of a part of the updates; the run is saved."""
    job = Job(tmp_path)
    stop_in_the_third_update(monkeypatch)
    outcome = run(train_jax.main, *job.argv("out", profile_updates="1:6"))
    assert outcome.code == 143 and "profile of updates" not in outcome.err and "warning" not in outcome.err
