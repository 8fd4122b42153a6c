"""The one exception that is the user's to mend, and what a command does with it, a full disk and Ctrl-C."""

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


class InputError(Exception):
    """Bad input or usage: one line that says what, where, and how to mend it. The commands print it and exit with 2."""

    def __init__(self, message: str):
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message))


class Parser(argparse.ArgumentParser):
    """argparse, with the user's mistake as an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.replace("argument ", "", 1))


def run_command(main: Callable[[list[str]], int]) -> int:
    """Run a command on the command line's arguments; a user's mistake becomes one line and exit code 2.

    So does a disk that takes no more, with exit code 1, and Ctrl-C, with 130. Any other exception is a bug: raised.
    """
    try:
        return main(sys.argv[1:])
    except InputError as e:
        if _speaks(sys.argv):
            print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        if not (problem := _disk_problem(e)):
            raise
        print(f"error: {problem}", file=sys.stderr)
        warnings.simplefilter("ignore")  # orbax's, of the writes that did not begin
        return 1


def _disk_problem(e: Exception) -> str | None:
    """What the disk could not do, where it is to blame; safetensors and tensorstore tell its number in their text."""
    number, file = (e.errno, e.filename) if isinstance(e, OSError) else (None, None)
    if found := re.search(r"\(os error (\d+)\)|os_error_code='(\d+)'", str(e)):
        number = int(found[1] or found[2])
        if named := re.search(r'Failed writing: "([^"]+)"', str(e)):
            file = named[1]
    if number not in _DISK:
        return None
    return f"writing failed: {os.strerror(number)}" + (f": {file}" if file else "")


def _speaks(argv: list[str]) -> bool:
    """Whether this is the first of several processes, by what launched it. All of them make the same mistake."""
    given = dict(re.findall(r"--(process_id|num_processes)[= ](\d+)", " ".join(argv)))
    ranks = (given.get("process_id"), os.environ.get("SLURM_PROCID"), os.environ.get("OMPI_COMM_WORLD_RANK"), "0")
    rank = next(int(rank) for rank in ranks if rank)
    return rank == 0 or rank >= int(given.get("num_processes", rank + 1))
