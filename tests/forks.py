"""Call functions of the tests in processes of several simulated devices.

A process makes its devices once, as XLA's flags say by then. To import JAX, torch and the commands takes 7 s, more than
most calls. So each call is a fork of one process that has imported them and made no device.
"""

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from typing import IO, Any

from tiny import ROOT, environment, of_devices


def on_devices(count: int, call: str, *xla_flags: str) -> None:
    """Make a call, as "test_meshes.check_placement()", where there are so many devices; print the call's output."""
    with tempfile.NamedTemporaryFile("r") as output:
        request = {"call": call, "output": output.name, "environment": of_devices(count, *xla_flags)}
        requests, answers = _server()
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        answer, text = answers.readline(), output.read()
    assert answer == "0\n", f"{call}: ends with {answer or 'the server'}: {text[-3000:]}"
    print(text)


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
    """Fork for each request, one after another, and answer with the exit code."""
    import llama_jax.command.train  # noqa: F401  # by the command itself only when it runs

    for line in sys.stdin:
        request = json.loads(line)
        module = importlib.import_module(request["call"].partition(".")[0])
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        descriptor = os.open(request["output"], os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(request["environment"])
        exec(request["call"], {module.__name__: module})
        sys.exit()
