"""Run `llama_jax.command.parity` as `python -m llama_jax.parity`."""

import sys

from llama_jax.base.errors import run_command
from llama_jax.command.parity import main

if __name__ == "__main__":
    sys.exit(run_command(main))
