"""Keep a run's output: lines go to a file too, and a closed terminal or pipe does not end the run."""

import contextlib
import errno
import io
import os
import re
import shlex
import stat
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "run.log"
EARLY = 1000  # lines kept until the file is known
_MOVES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # of a terminal's cursor, and colors


class Output:
    """Stand in for stdout and stderr: copy finished lines, without bars, into a file; survive a closed reader."""

    def __init__(self) -> None:
        self.survives = False
        self._file: int | None = None
        self._early: list[str] = []

    def keep(self, path: Path) -> None:
        """Append all lines to a file, those until now too. Raises OSError."""
        if self._file is None:
            self._file = _open(path)
            self.line(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}: {shlex.join(sys.argv)}")
            for line in self._early:
                self.line(line)

    def line(self, line: str) -> None:
        """Write a line into the file, or keep it until there is one."""
        if self._file is None:
            if len(self._early) < EARLY:
                self._early.append(line)
            return
        try:
            os.write(self._file, f"{line}\n".encode(errors="replace"))
        except OSError as e:  # a full disk: the run has better uses for its rest
            self.close()
            print(f"warning: {FILE} ends here: {e.strerror}", file=sys.stderr)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Stream:
    """Write into a stream, None for a closed one, and its finished lines into `output`."""

    def __init__(self, stream: Any, output: Output):
        self._stream, self.output, self._line = stream, output, ""

    def write(self, text: str) -> int:
        self._attempt("write", text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self.output.line(_MOVES.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip())
        self._line = self._line.rpartition("\r")[2]  # a bar is drawn over
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, method: str, *values: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*values)
        except UnicodeError:
            raise
        except BlockingIOError:  # a slow reader of a pipe that does not block: this part is lost on the screen
            if not self.output.survives:
                raise
        except (OSError, ValueError):  # EPIPE, EIO of a terminal that is gone, a full disk; a closed file
            if not self.output.survives:
                raise
            with contextlib.suppress(OSError, ValueError):  # later writes succeed, those of C++ and at Python's end too
                number, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


@contextlib.contextmanager
def kept_output() -> Iterator[None]:
    """Put an `Output` in the place of stdout and stderr."""
    for number in range(3):  # a file that is opened later must not get the number of stdout or stderr
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    output, before = Output(), (sys.stdout, sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: no text ends a run
    sys.stdout, sys.stderr = (_Stream(stream, output) for stream in before)  # type: ignore[assignment]
    try:
        yield
    except Exception:
        output.line(traceback.format_exc())
        raise
    finally:
        sys.stdout, sys.stderr = before
        output.close()


def survive() -> None:
    """Let no failure of stdout and stderr end the command. A caller from Python keeps its own output."""
    if isinstance(sys.stderr, _Stream):
        sys.stderr.output.survives = True


def keep(path: Path) -> None:
    """Append all lines of the command to a file, too. Raises OSError."""
    if isinstance(sys.stderr, _Stream):
        sys.stderr.output.keep(path)


def note(line: str) -> None:
    """Write a line into the file alone, where there is one."""
    if isinstance(sys.stderr, _Stream):
        sys.stderr.output.line(line)


def _open(path: Path) -> int:
    """Open a regular file to append to. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise OSError(errno.EINVAL, "it is no regular file", str(path))
