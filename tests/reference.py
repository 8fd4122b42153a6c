"""The real transformers of 4.37 and of 5, in processes of their own: `make test` installs 4.37.2 beside the other."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRANSFORMERS_437 = Path(sys.prefix) / "transformers-4.37"  # with the accelerate of its time


def environment(compat: str, *paths: Path) -> dict[str, str]:
    """Of a process whose `transformers` is of that version; modules of these paths can be imported too."""
    first = [TRANSFORMERS_437, Path(__file__).parent / "without_datasets"] if compat == "4.37" else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*first, *paths])), "OMP_NUM_THREADS": "1"}


class Process:
    """A script that answers each line of JSON on its standard input with one on its standard output."""

    def __init__(self, script: str, environment: dict[str, str]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until `close`; a pipe would fill up
        self._process = subprocess.Popen(
            [sys.executable, script],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, question: Any) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> Any:
        """The next line. Raises RuntimeError with what the process said last, if it has ended."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self._process.args} ended: {self._errors.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._errors.close()


def serve(*functions: Callable[[Any], Any]) -> None:
    """Answer each line of JSON on the standard input, [function, argument], with one on the standard output."""
    named = {f.__name__: f for f in functions}
    answers = sys.stdout
    sys.stdout = sys.stderr  # for what transformers prints
    for line in sys.stdin:
        name, argument = json.loads(line)
        print(json.dumps(named[name](argument)), file=answers, flush=True)
