"""Signals by phase: what is done is saved, what is not begun ends at once, and no signal ends a save."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_training import Job, assert_same_run, checkpoints
from tiny import ROOT, environment, run, slow_unless

import llama_jax.run.trainer as trainer
import train_jax
from llama_jax.base.stopping import SIGNALS
from llama_jax.run.checkpoint import Checkpoints
from llama_jax.run.evaluation import Evaluation


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with evaluations and a whole run in "whole"."""
    job = Job(tmp_path_factory.mktemp("job"), eval_strategy="steps", eval_steps=3, validation_split_percentage=25)
    job.train("whole")
    return job


def sending(signum: int, function: Callable[..., Any], times: int = 1) -> Callable[..., Any]:
    """Wrap a function: at its first call the process gets a signal, some 10 ms apart where there are several."""
    left = [times]

    def wrapped(*args: Any, **options: Any) -> Any:
        while left[0]:
            left[0] -= 1
            signal.raise_signal(signum)
            time.sleep(0.01)
        return function(*args, **options)

    return wrapped


# Where a signal comes while there is something to save, and what is patched there.
SAVED = {
    "the first update": (trainer, "fit"),
    "a save": (Checkpoints, "save"),
    "an evaluation": (Evaluation, "__call__"),
}


@pytest.mark.parametrize("times", [1, slow_unless(False, 3)])
@pytest.mark.parametrize(
    ("phase", "signum"),
    [
        slow_unless(i == (5 * j) % len(SIGNALS), phase, signum)
        for j, phase in enumerate(SAVED)
        for i, signum in enumerate(SIGNALS)
    ],
)
def test_what_is_done_is_saved(phase: str, signum: signal.Signals, times: int, job: Job, tmp_path: Path) -> None:
    """Once or three times, as wrappers repeat it: code 143, and the resumed run is the whole run."""
    job.folder, before = tmp_path, job.folder
    owner, name = SAVED[phase]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, sending(signum, getattr(owner, name), times))
            outcome = run(train_jax.main, *job.argv("out"))
        out = tmp_path / "out"
        assert outcome.code == 143, outcome.err
        assert outcome.err.count("stopping: the current update is finished and saved first") == 1
        assert checkpoints(out) and not (out / "model.safetensors").exists()
        job.train("out", resume_from_checkpoint=True)
    finally:
        job.folder = before
    assert_same_run(before / "whole", out)


@pytest.mark.parametrize("signum", [slow_unless(s == signal.SIGHUP, s) for s in SIGNALS])
def test_an_export_is_finished(signum: signal.Signals, job: Job) -> None:
    """It is the end of the run: nothing is left to stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "export", sending(signum, trainer.export))
        out = job.train(f"export-{signum}")
    assert_same_run(job.folder / "whole", out)


PATCHED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts a suite in the background without
sys.path.insert(0, {root!r})
from llama_jax.base import stopping
stopping.PATIENCE = {patience}
import train_jax, {module} as module
from llama_jax.base.errors import run_command
original = {place}
def patched(*args, **options):
    {action}
    return original(*args, **options)
{place} = patched
sys.exit(run_command(train_jax.main))
"""


def in_a_process(job: Job, out: str, module: str, place: str, action: str, patience: float = 10) -> Any:
    """Run the job in a process of its own, in which a function performs an action first."""
    code = PATCHED.format(root=str(ROOT), module=module, place=place, action=action, patience=patience)
    command = [sys.executable, "-c", code, *job.argv(out)]
    return subprocess.run(
        command, env=environment(torch=False), capture_output=True, text=True, check=False, timeout=120
    )


# A lock that is taken twice: code without Python's lock that no signal interrupts, as a compiler's.
FOREVER = "import ctypes; m = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(m) for _ in '12']"

EARLY = {
    "tokenising": ("llama_jax.run.prepare", "module.make_job"),
    "compiling": ("llama_jax.plan.planner", "module.Planner.settle"),
    "reading": ("llama_jax.run.start", "module.read_weights"),
}


@pytest.mark.parametrize(
    ("phase", "signum"),
    [
        slow_unless((phase, signum) in (("compiling", signal.SIGINT), ("reading", signal.SIGUSR1)), phase, signum)
        for phase in EARLY
        for signum in SIGNALS
    ],
)
def test_nothing_to_save(phase: str, signum: signal.Signals, job: Job) -> None:
    """The process ends at once, also while code runs that Python cannot interrupt."""
    action = f"import threading; threading.Timer(1, os.kill, (os.getpid(), {int(signum)})).start(); "
    action += FOREVER
    began = time.monotonic()
    ended = in_a_process(job, f"{phase}-{signum}", *EARLY[phase], action)
    interrupted = signum == signal.SIGINT
    assert ended.returncode == (130 if interrupted else 143), ended.stderr
    assert ended.stderr.splitlines()[-1] == ("interrupted" if interrupted else "stopped: there was nothing to save yet")
    assert time.monotonic() - began < 60 and checkpoints(job.folder / f"{phase}-{signum}") == []


@pytest.mark.slow
def test_a_later_signal_ends_at_once(job: Job) -> None:
    """After PATIENCE, while no checkpoint is being written. The folder takes the next run."""
    action = f"os.kill(os.getpid(), {int(signal.SIGTERM)}); time.sleep(0.5); "
    action += f"os.kill(os.getpid(), {int(signal.SIGTERM)}); {FOREVER}"
    ended = in_a_process(job, "later", "llama_jax.run.trainer", "module.fit", action, patience=0.2)
    assert ended.returncode == 143 and "stopped at once" in ended.stderr, ended.stderr
    assert_same_run(job.folder / "whole", job.train("later"))


@pytest.mark.slow
def test_no_signal_ends_a_save(job: Job) -> None:
    signals = f"[(os.kill(os.getpid(), {int(signal.SIGTERM)}), time.sleep(0.3)) for _ in range(3)]"
    place = "module.ocp.CheckpointManager.save"
    ended = in_a_process(job, "saving", "llama_jax.run.checkpoint", place, signals, patience=0.2)
    assert ended.returncode == 143 and "stopped after update" in ended.stderr, ended.stderr
    assert_same_run(job.folder / "whole", job.train("saving", resume_from_checkpoint=True))


@pytest.mark.slow
def test_what_nohup_ignores_stays_ignored(job: Job) -> None:
    action = f"os.kill(os.getpid(), {int(signal.SIGHUP)})"
    code = PATCHED.format(
        root=str(ROOT), module="llama_jax.run.trainer", place="module.fit", action=action, patience=10
    )
    command = ["nohup", sys.executable, "-c", code, *job.argv("nohup")]
    ended = subprocess.run(
        command,
        env={**os.environ, **environment(torch=False)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_run(job.folder / "whole", job.folder / "nohup")
