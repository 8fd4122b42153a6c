"""A disk that is full at any moment, at any byte: one line, older checkpoints whole, and with room again the same end.

The disk is a real one, a tmpfs. Another program fills it but for some bytes at a drawn moment of a run.
"""

import contextlib
import faulthandler
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Process
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_checkpoint import files, tokenised
from test_training import Job, assert_same_run
from tiny import drawn_cases, environment, run

import train_jax
from llama_jax.base.errors import InputError, run_command
from llama_jax.base.files import write_json
from llama_jax.reporting.run_log import RunLog
from llama_jax.reporting.trainer_state import TrainerState
from llama_jax.run import trainer
from llama_jax.run.checkpoint import find_steps, read_run
from llama_jax.run.disk import folder_bytes
from llama_jax.run.ownership import locked

MOMENTS = ["start", *map(str, range(1, 7)), "export", "summary"]
SIZE = 8 << 20


@contextlib.contextmanager
def filled(disk: Path, room: int, moment: str) -> Iterator[None]:
    """Let another program fill the disk but for `room` bytes: at once, after an update, or before the export or its
    last file."""

    def fill() -> None:
        free = os.statvfs(disk)
        if (size := free.f_bavail * free.f_frsize - room) > 0:
            with (disk / "other").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def filling(function: Callable[..., Any], now: Callable[..., bool]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            if now(*args):
                fill()
            return function(*args)

        return called

    if moment == "start":
        fill()
    with pytest.MonkeyPatch.context() as patch:
        on_update = filling(RunLog.on_update, lambda log, metrics: str(metrics.step) == moment)
        patch.setattr(RunLog, "on_update", on_update)
        patch.setattr(trainer, "export", filling(trainer.export, lambda *_: moment == "export"))
        patch.setattr(TrainerState, "save", filling(TrainerState.save, lambda *_: moment == "summary"))
        yield


def command(disk: str, room: int, moment: str) -> None:
    faulthandler.dump_traceback_later(250, exit=True)
    with filled(Path(disk), room, moment), pytest.MonkeyPatch.context() as patch:
        patch.setattr("plotly.offline.get_plotlyjs", str)  # as in conftest.py: the page's 5 MB need not fit
        sys.exit(run_command(train_jax.main))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with a whole run in "whole"."""
    job = tokenised(tmp_path_factory.mktemp("job"), save_total_limit=1, hf_compat="5")
    job.train("whole")
    return job


@pytest.fixture(scope="module")
def disk(job: Job) -> Iterator[Path]:
    disk = job.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_nothing_half_is_left(disk: Path) -> None:
    """Of a small file; the lock needs no byte."""
    (folder := disk / "small").mkdir()
    with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
        file.write(bytes(SIZE))
    with pytest.raises(OSError, match="No space left"):
        write_json(folder / "x.json", {"a": 1})
    assert list(folder.iterdir()) == []
    with locked(folder), pytest.raises(InputError, match="it is starting"), locked(folder):
        pass
    (disk / "other").unlink()


def test_no_warning_follows_the_line() -> None:
    """Orbax's coroutines of writes that did not begin warn when Python ends."""
    code = "import sys, warnings; from llama_jax.base.errors import RunError, run_command\n"
    code += "def main(argv): raise RunError('x')\n"
    code += "code = run_command(main); warnings.warn('late', RuntimeWarning); sys.exit(code)"
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "error: x\n")


@pytest.mark.slow
@settings(max_examples=drawn_cases(40, 3))
@given(
    moment=st.sampled_from(MOMENTS),
    share=st.integers(0, 2**32 - 1).map(lambda seed: random.Random(seed).random()),  # evenly
    apart=st.sampled_from([False] * 4 + [True]),
    exports=st.booleans(),
)
@example(moment="start", share=0.0, apart=True, exports=False)
@example(moment="4", share=0.15, apart=False, exports=False)
@example(moment="export", share=0.5, apart=False, exports=True)
def test_a_disk_full_at_any_byte(moment: str, share: float, apart: bool, exports: bool, job: Job, disk: Path) -> None:
    """From no room to room for all. A process `apart` has its temporary files and tokenised data on the disk too."""
    subprocess.run(["rm", "-rf", *disk.iterdir()], check=True)
    whole, out = job.folder / "whole", disk / "out"
    checkpoint = folder_bytes(whole / "checkpoint-6")
    model = folder_bytes(whole) - checkpoint
    needed = {"start": model + 2 * checkpoint, "export": model, "summary": 8192}.get(moment, model + checkpoint)
    room = int(1.1 * share * needed)  # blocks of 4 KiB
    if apart:
        (disk / "tmp").mkdir()
        places = {"TMPDIR": str(disk / "tmp"), "XDG_CACHE_HOME": str(disk / "cache")}
        code = f"import test_full_disk; test_full_disk.command({str(disk)!r}, {room}, {moment!r})"
        ended = Process(job.argv("", output_dir=out), environment() | places, code, "test_full_disk")
        ended.wait()
        exit_code, err = ended.returncode, ended.err
    else:
        with filled(disk, room, moment):
            outcome = run(train_jax.main, *job.argv("", output_dir=out))
        exit_code, err = outcome.code, outcome.err
    print(moment, room, needed, apart, exit_code, err.splitlines()[-1:], flush=True)
    assert exit_code in (0, 1, 2) and "Traceback" not in err, err
    if exit_code:
        assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]], err
        assert "No space left on device" in err or "make room" in err
        left = [f"checkpoint-{step}" for step in find_steps(out)]
        for name in left:
            read_run(out / name)
        (disk / "other").unlink()
        last = {"export_only": True} if exports and "checkpoint-6" in left else {"resume_from_checkpoint": "auto"}
        outcome = run(train_jax.main, *job.argv("", output_dir=out, **last))
        assert outcome.code == 0 and "damaged" not in outcome.err, outcome.err
        assert not left or "resumed from" in outcome.err or "exporting" in outcome.err
        if "export_only" in last:
            assert files(out) == files(whole)
            return
    assert_same_run(whole, out)
    assert files(out) == files(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
