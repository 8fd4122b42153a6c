"""Run commands on files of strangers, each in a forked child with limits on time and memory.

As a program: read requests, a line of JSON each, from stdin, and answer each by a line of JSON. The imports are made
once, before the forks; no device is set up in the parent, so that a fork copies no threads of XLA.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ADDRESS_SPACE = 12 << 30  # bytes; a child that asks for more gets a MemoryError instead of the machine's memory


class Ended(NamedTuple):
    """Describe how a command ended: exit code (negative: signal), stderr, seconds, peak bytes, and opened canaries."""

    code: int
    err: str
    seconds: float
    peak: int
    opened: list[str]


class Strangers:
    """Hold the process that runs commands."""

    def __init__(self) -> None:
        from tiny import environment

        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def run(self, command: str, *argv: Any, canary: Path | None = None, seconds: float = 20) -> Ended:
        """Run `command`, one of `_COMMANDS`; it is killed after so many seconds. Opens below `canary` are reported."""
        request = {"command": command, "argv": [*map(str, argv)], "canary": str(canary or ""), "seconds": seconds}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _train(argv: list[str]) -> int:
    from llama_jax.command.train import main

    return main(argv)


def _convert(argv: list[str]) -> int:
    from llama_jax.command.convert import main

    return main(argv)


def _tokenizer(argv: list[str]) -> int:
    """Open the tokenizer of a folder, encode and decode, and write it to another folder."""
    from llama_jax.data.tokenizer import open_tokenizer

    folder, output, compat = argv
    tokenizer = open_tokenizer(Path(folder), compat)
    tokenizer.add_missing_special_tokens()
    (ids,) = tokenizer.encode_batch(["a" * 40 + " plain text, 12345 <s> ☃!"])
    tokenizer.decode(ids)
    tokenizer.warnings()
    tokenizer.rows(259)
    Path(output).mkdir(exist_ok=True)
    tokenizer.save(Path(output))
    return 0


_COMMANDS = {"train": _train, "convert": _convert, "tokenizer": _tokenizer}


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        err, out, opened = (Path(folder) / name for name in ("err", "out", "opened"))
        opened.touch()
        started = time.monotonic()
        if not (child := os.fork()):
            _run(request, out, err, opened)
        deadline = started + request["seconds"]
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                ended = os.wait4(child, 0)
                break
            time.sleep(0.005)
        return {
            "code": os.waitstatus_to_exitcode(ended[1]),
            "err": err.read_text(errors="replace"),
            # On a busy machine the processor's time; a command that waits for ever is killed.
            "seconds": min(time.monotonic() - started, ended[2].ru_utime + ended[2].ru_stime),
            "peak": ended[2].ru_maxrss * 1024,
            "opened": opened.read_text().splitlines(),
        }


def _run(request: dict[str, Any], out: Path, err: Path, opened: Path) -> None:
    """Run a command in the child and end the process."""
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        log = os.open(opened, os.O_WRONLY | os.O_APPEND)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            name = arguments[0] if event == "open" else None
            if isinstance(name, str) and os.path.realpath(name).startswith(request["canary"]):
                os.write(log, f"{arguments[0]}\n".encode())

        if request["canary"]:
            sys.addaudithook(watch)
        from llama_jax.base.errors import run_command

        sys.argv = ["command", *request["argv"]]
        try:
            code = run_command(_COMMANDS[request["command"]])
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils  # noqa: F401

    import llama_jax.hf.convert
    import llama_jax.hf.gguf_file
    import llama_jax.hf.gguf_tokenizer
    import llama_jax.plan.dry_run
    import llama_jax.run.trainer  # noqa: F401
    from llama_jax.setup.arguments import flag_parser

    flag_parser()
    with tempfile.TemporaryDirectory() as folder:  # imports more of transformers
        from tiny import write_tokenizer

        AutoTokenizer.from_pretrained(write_tokenizer(Path(folder)), local_files_only=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
