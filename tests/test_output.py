"""`run.log` holds what a run prints, and no closed terminal or pipe ends a run."""

import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_training import Job, assert_same_run
from tiny import ROOT, environment, run

import train_jax
from llama_jax.base.output import Output, _Stream


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("job"), report_to="none")
    job.train("whole")
    return job


def start(job: Job, out: str, redirected: str = "", **streams: Any) -> subprocess.Popen:
    shell = ["sh", "-c", f'exec "$@" {redirected}', "sh"]
    return subprocess.Popen(
        [*shell, sys.executable, ROOT / "train_jax.py", *job.argv(out)], env=environment(torch=False), **streams
    )


def check_whole(job: Job, out: str, process: subprocess.Popen) -> None:
    """The run went on to its end, with the bits of an undisturbed one, and its log has every update and the last
    line."""
    assert process.wait(120) == 0
    assert_same_run(job.folder / "whole", job.folder / out)
    lines = (job.folder / out / "run.log").read_text().splitlines()
    assert sum("'loss'" in line for line in lines) == 6 and lines[-1].startswith("done: the trained model is in")
    assert not [line for line in lines if "\r" in line or "\x1b" in line]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "after the first update"])
def test_closed_pipes(when: str, job: Job) -> None:
    """As by `| head -1`, on both streams."""
    process = start(job, f"pipes {when}", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    if when == "after the first update":
        assert "'loss'" in process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    check_whole(job, f"pipes {when}", process)


@pytest.mark.slow
def test_a_terminal_that_is_gone(job: Job) -> None:
    """Writing then fails with EIO; bars are drawn in a terminal only."""
    terminal, end = pty.openpty()
    process = start(job, "terminal", stdout=end, stderr=end, stdin=subprocess.DEVNULL)
    os.close(end)
    shown = b""
    while b"'loss'" not in shown:
        shown += os.read(terminal, 10_000)
    os.close(terminal)
    check_whole(job, "terminal", process)


@pytest.mark.slow
def test_streams_that_were_never_open(job: Job) -> None:
    """Files that the run opens must not become its stdout or stderr."""
    process, log = start(job, "never", "<&- >&- 2>&-"), job.folder / "never" / "run.log"
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    assert {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)} == {os.devnull}
    check_whole(job, "never", process)


@given(st.lists(st.tuples(st.text("ab ", max_size=5), st.booleans()), max_size=8), st.lists(st.integers(1, 9)))
def test_lines_without_bars(parts: list[tuple[str, bool]], cuts: list[int]) -> None:
    """However the text is cut into writes: a bar is drawn over itself and wiped before a line."""
    text = "".join(f"\r\x1b[1m{word}\x1b[0m\r      \r" if is_bar else f"{word}\n" for word, is_bar in parts)
    kept, screen, at = Output(), io.StringIO(), 0
    kept.line = (lines := []).append  # type: ignore[method-assign]
    stream = _Stream(screen, kept)
    for cut in (*cuts, len(text)):
        stream.write(text[at : at + cut])
        at += cut
    assert screen.getvalue() == text and lines == [word.rstrip() for word, is_bar in parts if not is_bar]


def test_the_log_is_what_is_printed(job: Job) -> None:
    """Line for line and in order, the lines before the folder is known too; a later start of the run is appended."""
    outcome = run(train_jax.main, *job.argv("printed", max_steps=4))
    empty, first, *lines = (job.folder / "printed" / "run.log").read_text().splitlines()
    assert empty == "" and f"process {os.getpid()}: command --model_name_or_path" in first
    printed = {line.rpartition("\r")[2].rstrip() for text in (outcome.out, outcome.err) for line in text.splitlines()}
    assert outcome.code == 0 and printed - {""} == set(lines) - {""}
    assert [line for line in lines if "'loss'" in line] == [x for x in outcome.out.splitlines() if "'loss'" in x]
    job.train("printed", code=2)  # a finished model is there
    assert (job.folder / "printed" / "run.log").read_text().splitlines() == [empty, first, *lines]
    job.train("printed", overwrite_output_dir=True)
    later = (job.folder / "printed" / "run.log").read_text().splitlines()
    assert later[: len(lines) + 2] == [empty, first, *lines] and len(later) > 2 * len(lines)


@pytest.mark.parametrize("kind", ["a link", "a FIFO", "a folder"])
def test_a_log_that_is_no_file(kind: str, job: Job, tmp_path: Path) -> None:
    out = job.folder / f"log {kind}"
    out.mkdir()
    (tmp_path / "other").write_text("mine")
    makers = {"a link": lambda p: p.symlink_to(tmp_path / "other"), "a FIFO": os.mkfifo, "a folder": os.mkdir}
    makers[kind](out / "run.log")
    outcome = run(train_jax.main, *job.argv(out.name))
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith(f"error: {out / 'run.log'}: the log cannot")
    assert (tmp_path / "other").read_text() == "mine"


def test_a_full_disk_ends_the_log_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.base.output._open", lambda path: os.open("/dev/full", os.O_WRONLY))
    outcome = run(train_jax.main, *job.argv("full", save_strategy="no"))
    assert outcome.code == 0 and outcome.err.count("run.log ends here: No space left on device") == 1
