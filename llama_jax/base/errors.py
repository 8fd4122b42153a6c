"""Define the exception for a user's mistake, and run a command: mistakes, full disks and Ctrl-C become one line."""

import argparse
import errno
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from llama_jax.base.launcher import rank_of
from llama_jax.base.output import kept_output

LONGEST = 1500  # characters of a line; a file's names and values may be of any length
FIRST_PRINTS = 5  # seconds: once one process has ended, its launcher ends all, the first too
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


class InputError(Exception):
    """Report bad input or usage in one line: error, place and fix. Commands print the line and exit with 2.

    Of several processes the first prints; each does where the mistake may be that of one process, `everywhere`.
    """

    code = 2

    def __init__(self, message: str, everywhere: bool = False):
        message = re.sub(r"\s*[\r\n]\s*", " ", message)
        message = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", message)  # a file's text could steer the terminal
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        super().__init__(message)
        self.everywhere = everywhere


class RunError(InputError):
    """Report a run that cannot go on, or an export that is refused, in one line. Commands exit with 1."""

    code = 1


class FailedAlone(Exception):
    """Mark an exception, its cause, of one among several processes: `run_command` reports it and ends at once.

    Python's own end waits for the threads of a checkpoint, and jax's 300 s, for the other processes, which wait for
    this one.
    """


class Parser(argparse.ArgumentParser):
    """Parse a command line; a mistake raises InputError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.replace("argument ", "", 1))


def run_command(main: Callable[[list[str]], int]) -> int:
    """Run `main` on the command line and return the exit code.

    An InputError becomes one line and exit code 2, a RunError, a full or failing disk one line and 1, Ctrl-C one line
    and 130. Any other exception is a bug and is raised.
    """
    with kept_output():
        return _run_command(main)


def _run_command(main: Callable[[list[str]], int]) -> int:
    try:
        return main(sys.argv[1:])
    except InputError as e:
        if e.everywhere or _is_first_process(sys.argv):
            print(f"error: {e}", file=sys.stderr)
        elif rank_of():
            time.sleep(FIRST_PRINTS)
        if isinstance(e, RunError):
            warnings.simplefilter("ignore")  # orbax warns of the writes that did not begin
        return e.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except FailedAlone as e:
        cause: BaseException = e
        while isinstance(cause, FailedAlone):
            assert cause.__cause__ is not None
            cause = cause.__cause__
        problem = str(cause) if isinstance(cause, InputError) else disk_problem(cause)
        print(f"error: {problem}" if problem else "".join(traceback.format_exception(cause)), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    except Exception as e:
        if not (problem := disk_problem(e)):
            raise
        print(f"error: {problem}", file=sys.stderr)
        warnings.simplefilter("ignore")  # as above
        return 1


def one_line(e: BaseException) -> str:
    """Return the text of another library's exception in one line of at most 300 characters, or its class' name."""
    return " ".join(str(e).split())[:300] or type(e).__name__


def plain(text: str) -> str:
    """Return a text without control characters: that of a file could steer the terminal."""
    return text if text.isprintable() else repr(text)


def disk_problem(e: BaseException) -> str | None:
    """Return a line for an error of the disk, else None. safetensors and tensorstore give its number in their text."""
    number, file = (e.errno, e.filename) if isinstance(e, OSError) else (None, None)
    if found := re.search(r"\(os error (\d+)\)|os_error_code='(\d+)'", str(e)):
        number = int(found[1] or found[2])
        if named := re.search(r'Failed writing: "([^"]+)"', str(e)):
            file = named[1]
    if number not in _DISK:
        return None
    return f"writing failed: {os.strerror(number)}" + (f": {file}" if file else "")


def _is_first_process(argv: list[str]) -> bool:
    """Return whether this process is the first, by its flags or launcher: a mistake is the same in all processes."""
    given = dict(re.findall(r"--(process_id|num_processes)[= ](\d+)", " ".join(argv)))
    rank = int(given["process_id"]) if "process_id" in given else rank_of()
    return rank == 0 or rank >= int(given.get("num_processes", rank + 1))
