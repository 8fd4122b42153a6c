"""A process that dies or gets stuck ends the others with one line, and the run goes on where it was saved."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_processes import finish, free_port, log_of, start
from test_training import Job
from tiny import ROOT, environment, run

import train_jax
from llama_jax.distributed import watchdog
from llama_jax.distributed.watchdog import judge

LIMIT = 9  # seconds; on two busy cores a heartbeat of a living process may be 2 s late
HOSTS = ["host-a", "host-b", "host-c"]
# As jaxlib 0.10 printed them in such runs.
POLLED = """\
E1129 06:24:46.589452    4421 coordination_service.cc:1549] [14294826094117167999] Use error polling to propagate the \
following error to all tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error [type.googleapis.com/CoordinationServiceError='']
F1129 06:24:46.649775    4432 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. This most likely indicates that another task died; see the other task logs for more details. absl::Status: \
UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
{}
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further.

RPC: /xla.coordination.CoordinationService/PollForError [type.googleapis.com/CoordinationServiceError='']
*** Check failure stack trace: ***
    @     0x7ff819840634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
NO_SERVICE = """\
F1129 06:25:49.418517    7113 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. This most likely indicates that another task died. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/Heartbeat
*** Check failure stack trace: ***
"""
OTHER = """\
F1129 06:25:49.418517    7113 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: INTERNAL: something new
"""


@pytest.mark.parametrize(
    ("messages", "index", "named", "speaks"),
    [
        (POLLED.format("1"), 0, "process 1 (host-b) of 3 died or got stuck", True),
        (POLLED.format("1"), 2, "process 1 (host-b) of 3 died or got stuck", False),
        (POLLED.format("1\n2"), 0, "process 1 (host-b) and process 2 (host-c) of 3 died or got stuck", True),
        (POLLED.format("/job:jax_worker/replica:0/task:0"), 1, "process 0 (host-a) of 3 died or got stuck", True),
        (POLLED.format("1"), 1, "process 1 (host-b) sent no heartbeats (--watchdog_seconds 30), so that", True),
        (NO_SERVICE, 1, "process 0 (host-a) of 3 died or got stuck", True),
        (NO_SERVICE, 2, "process 0 (host-a) of 3 died or got stuck", False),
        (NO_SERVICE, 0, "another of the 3 processes has failed", True),
        (OTHER, 1, "another of the 3 processes has failed", True),
    ],
)
def test_the_process_is_named(messages: str, index: int, named: str, speaks: bool) -> None:
    verdict = judge(messages, HOSTS, index, 30)
    assert verdict and verdict.line.startswith(f"error: {named}"), verdict
    assert verdict.speaks == speaks and "\n" not in verdict.line
    assert verdict.line.endswith("; start all again with --resume_from_checkpoint auto")


def test_another_abort_is_not_judged() -> None:
    assert judge("F1129 06:25:49 7113 buffer.cc:80] Check failed: size == 3 (2 vs. 3)\n1\n", HOSTS, 0, 30) is None


def test_only_connections_are_waited_for() -> None:
    class JaxRuntimeError(Exception):
        pass

    assert watchdog.lost_connection(JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"))
    assert watchdog.lost_connection(
        JaxRuntimeError("INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE")
    )
    assert not watchdog.lost_connection(JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"))
    assert not watchdog.lost_connection(ValueError("connection"))


@pytest.mark.parametrize("seconds", ["2", "-1"])
def test_a_limit_that_is_too_short(seconds: str, tmp_path: Path) -> None:
    outcome = run(train_jax.main, *Job(tmp_path).argv("out", watchdog_seconds=seconds))
    assert outcome.code == 2 and f"--watchdog_seconds {seconds}: should be at least 3" in outcome.err


DIVERTED = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from llama_jax.base import output
from llama_jax.base.errors import run_command

def main(argv):
    os.write(2, b"on the screen\\n")
    output.divert(None)
    os.write(2, b"early message\\n")
    print("a line of Python", file=sys.stderr)
    output.divert(Path(argv[0]))
    os.write(2, b"late message\\n")
    print("another line", file=sys.stderr)
    output.screen("the last line")
    assert output.diverted() == "early message\\nlate message\\n"
    return 0

code = run_command(main)
os.write(2, b"on the screen again\\n")
sys.exit(code)
"""


def test_messages_of_libraries_go_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "process-0.log"
    path.write_text("of an earlier start\n")
    command = [sys.executable, "-c", DIVERTED.format(root=str(ROOT)), path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = ["on the screen", "a line of Python", "another line", "the last line", "on the screen again"]
    assert done.stderr.splitlines() == expected
    assert path.read_text() == "of an earlier start\nearly message\nlate message\n"


JOINED = """
import sys
sys.path.insert(0, {root!r})
import jax
from llama_jax.distributed import processes

processes.join("localhost:{port}", 1, 0)
jax.config.update("jax_num_cpu_devices", 3)  # refused once a backend has started
assert jax.device_count() == 3
"""


def test_joining_starts_no_backend() -> None:
    """The platform is chosen later: --use_cpu on a host with GPUs."""
    script = JOINED.format(root=str(ROOT), port=free_port())
    subprocess.run([sys.executable, "-c", script], env=environment(), check=True, timeout=120)


# A main thread that is busy for longer than the limit: reading weights, say.
BUSY = f"""
import sys, time
import train_jax
from llama_jax.base.errors import run_command
from llama_jax.run import start

read_weights = start.read_weights

def slowly(*args, **kw):
    time.sleep({3 * watchdog.LEAST} if sys.argv[-1] == "1" else 0)
    return read_weights(*args, **kw)

start.read_weights = slowly
sys.exit(run_command(train_jax.main))
"""


@pytest.mark.parametrize(
    ("count", "how", "who"),
    [
        pytest.param(2, signal.SIGKILL, [1], marks=pytest.mark.slow),
        pytest.param(2, signal.SIGKILL, [0], marks=pytest.mark.proof),
        pytest.param(2, signal.SIGSTOP, [1], marks=pytest.mark.proof),
        pytest.param(2, signal.SIGSTOP, [0], marks=pytest.mark.slow),
        pytest.param(3, signal.SIGSTOP, [1, 2], marks=pytest.mark.proof),
    ],
)
def test_the_others_end(count: int, how: signal.Signals, who: list[int], tmp_path: Path) -> None:
    """Within the limit, with one line, without C++'s stack, with code 1; all then go on to the end of a whole run."""
    job = Job(tmp_path, max_steps=40, save_steps=10, save_total_limit=2, mesh=f"data={count}")
    out = tmp_path / "out"
    argv = job.argv("out", watchdog_seconds=LIMIT)
    processes = start([argv] * count, 1)
    while not (out / "checkpoint-10").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    began = time.monotonic()
    for index in who:
        processes[index].send_signal(how)
    living = [process for index, process in enumerate(processes) if index not in who]
    try:
        told = [process.communicate(timeout=120) for process in living]
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
    assert seconds <= LIMIT, seconds
    errors = [line for _, err in told for line in err.splitlines() if line.startswith("error:")]
    names = " and ".join(f"process {index} ({socket.gethostname()})" for index in who)
    cause = f"{names} of {count} died or got stuck: no heartbeats (--watchdog_seconds {LIMIT}); this run ends; "
    assert errors == [f"error: {cause}start all again with --resume_from_checkpoint auto"], [e[-2000:] for _, e in told]
    assert [process.returncode for process in living] == [1] * len(living)
    for _, err in told:
        assert not re.search(r"0x[0-9a-f]{8}|Traceback|\bF\d{4} ", err), err[-2000:]
    logs = [out / f"process-{index}.log" for index in range(count) if index not in who]
    assert all("detected fatal errors" in log.read_text() for log in logs)
    for process in processes:
        process.wait()

    finish(start([job.argv("out", resume_from_checkpoint="auto")] * count, 1))
    finish(start([job.argv("whole")] * count, 1))
    weights = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert weights and all((out / path.name).read_bytes() == path.read_bytes() for path in weights)
    assert log_of(out) == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_slow_start_is_no_fault(tmp_path: Path) -> None:
    """The main thread of one process is busy for longer than the limit, and the others wait."""
    argv = Job(tmp_path).argv("out", watchdog_seconds=watchdog.LEAST)
    finish(start([argv] * 2, 1, BUSY))
    assert (tmp_path / "out" / "model.safetensors").exists()
