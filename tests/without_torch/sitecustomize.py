"""Hide torch, which `pip install llama_jax` does not install: transformers would import it, for 3 s of each process.

Python runs this file at its start where the folder is in PYTHONPATH; see `tiny.environment`.
"""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
