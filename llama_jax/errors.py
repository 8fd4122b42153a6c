"""The one exception that is the user's to mend, and what a command does with it."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(Exception):
    """Bad input or usage: one line that says what, where, and how to mend it. The commands print it and exit with 2."""

    def __init__(self, message: str):
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message))


class Parser(argparse.ArgumentParser):
    """argparse, with the user's mistake as an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.replace("argument ", "", 1))


def run_command(main: Callable[[list[str]], int]) -> int:
    """Run a command on the command line's arguments; a user's mistake becomes one line and exit code 2."""
    try:
        return main(sys.argv[1:])
    except InputError as e:
        if _speaks(sys.argv):
            print(f"error: {e}", file=sys.stderr)
        return 2


def _speaks(argv: list[str]) -> bool:
    """Whether this is the first of several processes, by what launched it. All of them make the same mistake."""
    given = dict(re.findall(r"--(process_id|num_processes)[= ](\d+)", " ".join(argv)))
    ranks = (given.get("process_id"), os.environ.get("SLURM_PROCID"), os.environ.get("OMPI_COMM_WORLD_RANK"), "0")
    rank = next(int(rank) for rank in ranks if rank)
    return rank == 0 or rank >= int(given.get("num_processes", rank + 1))
