"""Run `llama_jax.command.evaluate` as `python -m llama_jax.evaluate`."""

import sys

from llama_jax.base.errors import run_command
from llama_jax.command.evaluate import main

if __name__ == "__main__":
    sys.exit(run_command(main))
