"""Run `llama_jax.command.parity` as `python -m llama_jax.parity`."""

import os
import sys

from llama_jax.base.errors import run_command
from llama_jax.command.parity import main

if __name__ == "__main__":
    # Before torch: its waiting threads sleep. Spinning, they took twice the CPU time where other work had the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run_command(main))
