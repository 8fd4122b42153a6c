"""Keep a run's output: lines go to a file too, and a closed terminal or pipe does not end the run.

C++ libraries write to file descriptor 2 themselves; their messages can be diverted into a file.
"""

import contextlib
import errno
import io
import os
import re
import shlex
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llama_jax.base.secrets import without_secrets

FILE = "run.log"
EARLY = 1000  # lines kept until the file is known
_MOVES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # of a terminal's cursor, and colors


class Output:
    """Stand in for stdout and stderr: copy finished lines, without bars, into a file; survive a closed reader."""

    def __init__(self) -> None:
        self.survives = False
        self._file: int | None = None
        self._early: list[str] = []
        self._screen: int | None = None  # a copy of descriptor 2 from before it was diverted
        self._messages: IO[bytes] | None = None
        self._messages_path: Path | None = None
        self._began = 0  # the file's bytes of earlier starts

    def keep(self, path: Path) -> None:
        """Append all lines to a file, those until now too. Raises OSError."""
        if self._file is None:
            self._file = _open(path)
            command = shlex.join(without_secrets(sys.argv))
            self.line(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}: {command}")
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

    def divert(self, path: Path | None) -> int:
        """Append to a file (None: one without a name) what is written to descriptor 2, the last file's content first;
        return a descriptor of the screen. Raises OSError."""
        messages = tempfile.TemporaryFile() if path is None else os.fdopen(_open(path), "rb+")  # noqa: SIM115
        earlier, began = self.diverted(), os.fstat(messages.fileno()).st_size
        if self._screen is None:
            self._screen = os.dup(2)
        os.dup2(messages.fileno(), 2)
        os.write(2, earlier)
        if self._messages is not None:
            self._messages.close()
        self._messages, self._messages_path, self._began = messages, path, began
        return self._screen

    def diverted(self, size: int = 100_000) -> bytes:
        """Return the last bytes that were diverted."""
        if self._messages is None:
            return b""
        number = self._messages.fileno()
        return os.pread(number, size, max(os.fstat(number).st_size - size, self._began))

    def show(self, line: str) -> None:
        """Write a line to the screen and into the file, without Python's streams."""
        self.line(line)
        with contextlib.suppress(OSError):  # a closed terminal
            os.write(2 if self._screen is None else self._screen, f"{line}\n".encode(errors="replace"))

    def restore(self) -> None:
        """End a diversion; remove a file without messages."""
        if self._screen is not None:
            os.dup2(self._screen, 2)
            os.close(self._screen)
            self._screen = None
        if self._messages is not None:
            if self._messages_path is not None and not os.fstat(self._messages.fileno()).st_size:
                self._messages_path.unlink(missing_ok=True)
            self._messages.close()
            self._messages = None


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

    def write_to(self, number: int) -> None:
        """Write to another descriptor of the same file from now on."""
        if self._stream is not None and self._stream.fileno() != number:
            self.flush()
            encoding = self._stream.encoding
            self._stream = open(number, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115

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
        output.restore()
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


def divert(path: Path | None) -> None:
    """Append to a file what C++ writes to stderr, None for one without a name; Python's lines stay on the screen.

    A second call takes along what the first has gathered. A caller from Python keeps its stderr. Raises OSError.
    """
    if isinstance(sys.stderr, _Stream):
        sys.stderr.write_to(sys.stderr.output.divert(path))


def diverted() -> str:
    """Return the last messages that were diverted."""
    return sys.stderr.output.diverted().decode(errors="replace") if isinstance(sys.stderr, _Stream) else ""


def screen(line: str) -> None:
    """Write a line to the real stderr, and into the run's file, from any thread."""
    (sys.stderr.output if isinstance(sys.stderr, _Stream) else Output()).show(line)


def _open(path: Path) -> int:
    """Open a regular file to append to. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise OSError(errno.EINVAL, "it is no regular file", str(path))
