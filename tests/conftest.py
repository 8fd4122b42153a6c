"""What every test needs: the CPU at full precision, compiled programs kept between runs, draws that repeat."""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, here and in the subprocesses of tests
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub

import hypothesis
import jax
import pytest
from tiny import COMPILATION

from llama_jax.distributed.sharding import make_mesh
from llama_jax.reporting.page import _template

ROOT = Path(__file__).resolve().parent.parent

gc.disable()  # until all is imported, a third of whose time its passes would take

QUICK = " ".join(f"--{name}={value}".lower() for name, (value, _) in COMPILATION.items())
if QUICK not in os.environ.get("XLA_FLAGS", ""):  # pytest's workers inherit the flags
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Derandomized: the same draws on every run and machine. Not shrunk: an example costs a compilation or a folder on disk.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    print_blob=True,
)
hypothesis.settings.load_profile("repeatable")


# A file's tests share programs, models and other processes, which each of xdist's workers would make anew. These files
# share least for their length: their tests are dealt one at a time, last, so that no worker waits for another.
APART = """demo elastic handover kills meshes nonfinite offload processes stopping topology trackers training
watchdog""".split()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one worker, the files of most tests first, then the tests of the files `APART`."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).stem.removeprefix("test_") in APART else file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Leave what is imported and collected, half a million objects, out of each pass of the garbage collector."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 20)  # its passes took a twelfth of the tests' time


@pytest.fixture(autouse=True)
def small_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plotting library's 5 MB out of the pages of the many small runs; test_page has it."""
    _template.cache_clear()
    if request.path.name != "test_page.py":
        monkeypatch.setattr("plotly.offline.get_plotlyjs", str)


@pytest.fixture
def mesh() -> Iterator[jax.sharding.Mesh]:
    """The mesh of all devices, set for the length of the test."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The TPU compiler, from the environment or the folder that the Makefile fills; what it makes is not cached."""
    folder = Path(sys.prefix) / "libtpu"
    if folder.is_dir():
        monkeypatch.syspath_prepend(folder)
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which `make test` installs")
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real checkpoints and golden values beside the repository; they are not part of it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the real inputs of {path}, which is absent on this machine")
    return path
