"""A disk that is full at any moment, at any byte: one line, older checkpoints whole, and with room again the same end.

The disk is a real one, a tmpfs. Another program fills it but for some bytes at a drawn moment of a run.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_checkpoint import files, tokenised
from test_training import Job, assert_same_run
from tiny import ROOT, drawn_cases, environment, run

import train_jax
from llama_jax.base.errors import InputError
from llama_jax.base.files import write_json
from llama_jax.run.checkpoint import find_steps, read_run
from llama_jax.run.disk import folder_bytes
from llama_jax.run.ownership import locked

# The command, at whose start, or after an update, or before the export or its last file, the disk gets full.
FILLED = """
import os, sys
sys.path.insert(0, {root!r})
import train_jax
from llama_jax.base.errors import run_command
from llama_jax.reporting.run_log import RunLog
from llama_jax.reporting.trainer_state import TrainerState
from llama_jax.run import trainer

def fill():
    disk = os.statvfs({disk!r})
    if (size := disk.f_bavail * disk.f_frsize - {room}) > 0:
        os.posix_fallocate(os.open({disk!r} + "/other", os.O_CREAT | os.O_WRONLY), 0, size)

def filling(function, now):
    def filled(*args, **options):
        if now(args):
            fill()
        return function(*args, **options)
    return filled

moment = {moment!r}
if moment == "start":
    fill()
RunLog.on_update = filling(RunLog.on_update, lambda args: str(args[1].step) == moment)
trainer.export = filling(trainer.export, lambda args: moment == "export")
TrainerState.save = filling(TrainerState.save, lambda args: moment == "summary")
sys.exit(run_command(train_jax.main))
"""
MOMENTS = ["start", *map(str, range(1, 7)), "export", "summary"]
SIZE = 8 << 20


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


@pytest.mark.slow
@settings(max_examples=drawn_cases(36, 2))
@given(
    moment=st.sampled_from(MOMENTS),
    share=st.floats(0, 1),
    everything=st.booleans(),
    exports=st.booleans(),
)
@example(moment="start", share=0.0, everything=True, exports=False)
@example(moment="export", share=0.5, everything=False, exports=True)
def test_a_disk_full_at_any_byte(
    moment: str, share: float, everything: bool, exports: bool, job: Job, disk: Path
) -> None:
    """From no room to room for all. With `everything`, temporary files and tokenised data lie there too."""
    subprocess.run(["rm", "-rf", *disk.iterdir()], check=True)
    whole, out = job.folder / "whole", disk / "out"
    model = folder_bytes(whole) - folder_bytes(whole / "checkpoint-6")
    needed = {"export": model, "summary": 8192}.get(moment, model + 2 * folder_bytes(whole / "checkpoint-6"))
    room = int(1.3 * share * needed)  # blocks of 4 KiB
    (disk / "tmp").mkdir()
    places = {"TMPDIR": str(disk / "tmp"), "XDG_CACHE_HOME": str(disk / "cache")} if everything else {}
    code = FILLED.format(root=str(ROOT), disk=str(disk), room=room, moment=moment)
    ended = subprocess.run(
        [sys.executable, "-c", code, *job.argv("", output_dir=out)],
        env=environment() | places, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    print(moment, room, needed, ended.returncode, ended.stderr.splitlines()[-1:])
    assert ended.returncode in (0, 1, 2) and "Traceback" not in ended.stderr, ended.stderr
    if ended.returncode:
        assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == [
            ended.stderr.splitlines()[-1]
        ], ended.stderr
        assert "No space left on device" in ended.stderr or "make room" in ended.stderr
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
