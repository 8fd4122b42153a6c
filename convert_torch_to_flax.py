#!/usr/bin/env python3
"""Convert an HF folder (or a .gguf file) to a Flax checkpoint, and back with --to_hf."""

import sys

from llama_jax.base.errors import run_command
from llama_jax.command.convert import main

if __name__ == "__main__":
    sys.exit(run_command(main))
