"""Run commands, and functions of the tests, in processes of several simulated devices.

A process makes its devices once, as XLA's flags say by then. To import JAX, torch and the commands takes 6 s, more than
most runs. So each process is a fork of one that has imported them and made no device.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from tiny import ROOT, environment, of_devices

TRAIN = "import sys, train_jax; from llama_jax.base.errors import run_command; sys.exit(run_command(train_jax.main))"


class Process:
    """A fork that runs code, of train_jax.py where none is given, with methods of subprocess.Popen. The code's `module`
    is imported before the fork."""

    def __init__(self, argv: list[str], environment: dict[str, str], code: str = TRAIN, module: str = "train_jax"):
        self.returncode: int | None = None
        self._files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115 - as long as the process
        files = [file.name for file in self._files]
        request = {"code": code, "argv": argv, "environment": environment, "files": files}
        request |= {"folder": os.getcwd(), "module": module}
        self.pid = int(_ask(request))
        atexit.register(self.kill)

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return Path(self._files[0].name).read_text()

    @property
    def err(self) -> str:
        return Path(self._files[1].name).read_text()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}: {self.err[-3000:]}", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        self.wait(timeout)
        return self.out, self.err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def on_devices(count: int, call: str, *xla_flags: str) -> None:
    """Make a call, as "test_meshes.check_placement()", where there are so many devices; print the call's output."""
    module = call.partition(".")[0]
    process = Process([], environment() | of_devices(count, *xla_flags), f"import {module}; {call}", module)
    code = process.wait(3600)
    assert code == 0, f"{call}: ends with {code}: {(process.out + process.err)[-3000:]}"
    print(process.out + process.err)


def _ask(request: dict[str, Any]) -> Any:
    requests, answers = _server()
    requests.write(json.dumps(request) + "\n")
    requests.flush()
    return json.loads(answers.readline())


@functools.cache
def _server() -> tuple[IO[str], IO[str]]:
    """Start the process that forks. It ends with the tests."""
    env = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    command = [sys.executable, "-c", "import forks; forks.serve()"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT / "tests", env=env, text=True, **pipes)
    assert process.stdin and process.stdout
    atexit.register(process.communicate)
    return process.stdin, process.stdout


def serve() -> None:
    """Answer each request: to run code by the process' number, to `ended` by the exit code of a process, or null."""
    gc.disable()  # as in conftest.py
    for name in (
        "train_jax",
        "llama_jax.run.trainer",
        "transformers.models.auto.tokenization_auto",  # with torch
        "transformers.models.llama.configuration_llama",
    ):
        importlib.import_module(name)  # the commands themselves import them when they run
    gc.set_threshold(50_000, 20, 20)
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        importlib.import_module(request["module"])
        gc.freeze()
        if child := os.fork():
            print(child, flush=True)
            continue
        gc.enable()
        for descriptor, path in enumerate([os.devnull, *request["files"]]):
            os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # as the environment says
        os.chdir(request["folder"])
        sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        sys.argv = ["command", *request["argv"]]
        exec(request["code"], {"__name__": "__main__"})
        sys.exit()
