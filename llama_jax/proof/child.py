"""Run Python in a process of its own, for programs whose environment, memory or crash is not that of this one."""

import os
import subprocess
import sys
from pathlib import Path


class Failed(Exception):
    """Tell which program failed, and its error."""


def run_python(name: str, command: list[str], variables: dict[str, str], given: str = "") -> str:
    """Run Python with the words of a command; return the last line that it prints. Raises Failed with the line of its
    error."""
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), **variables}
    words = [sys.executable, *command]
    done = subprocess.run(words, input=given, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        # An exception's text may have several lines: the first one follows the last line of the traceback.
        unindented = [i for i, line in enumerate(lines) if i and lines[i - 1][0] == " " and line[0] != " "]
        raise Failed(f"{name} ended with {done.returncode}: {lines[unindented[-1] if unindented else -1]}")
    return (done.stdout.splitlines() or [""])[-1]
