"""Run `llama_jax.command.report` as `python -m llama_jax.report`."""

import sys

from llama_jax.base.errors import run_command
from llama_jax.command.report import main

if __name__ == "__main__":
    sys.exit(run_command(main))
