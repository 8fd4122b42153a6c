"""Run `llama_jax.command.generate` as `python -m llama_jax.generate`."""

import sys

from llama_jax.base.errors import run_command
from llama_jax.command.generate import main

if __name__ == "__main__":
    sys.exit(run_command(main))
