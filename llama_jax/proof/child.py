"""Run Python in a process of its own, for programs whose environment, memory or crash is not that of this one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Failed(Exception):
    """Tell which program failed, and its error."""


def ask(name: str, command: list[str], variables: dict[str, str], spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the answer of a program that reads a JSON object on the standard input. It writes the answer into the file
    that the object names, in `folder`: libraries print what they like. Raises Failed."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    run_python(name, command, variables, json.dumps({**spec, "answer": str(answer)}))
    try:
        return json.loads(answer.read_text())
    except (OSError, ValueError):
        raise Failed(f"{name} ended without an answer") from None


def run_python(name: str, command: list[str], variables: dict[str, str], given: str = "") -> None:
    """Run Python with the words of a command. Raises Failed with the line of its error."""
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), **variables}
    words = [sys.executable, *command]
    done = subprocess.run(words, input=given, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        # An exception's text may have several lines: the first one follows the last line of the traceback.
        unindented = [i for i, line in enumerate(lines) if i and lines[i - 1][0] == " " and line[0] != " "]
        raise Failed(f"{name} ended with {done.returncode}: {lines[unindented[-1] if unindented else -1]}")
