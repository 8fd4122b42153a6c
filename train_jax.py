#!/usr/bin/env python3
"""Fine-tune a LLaMA: the HF Trainer's command line in, an HF folder out. `--help` lists the flags."""

import sys

from llama_jax.base.errors import run_command
from llama_jax.command.train import main

if __name__ == "__main__":
    sys.exit(run_command(main))
