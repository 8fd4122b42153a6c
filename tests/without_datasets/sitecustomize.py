"""Hide `datasets` from transformers 4.37, whose huggingface_hub is too old for the installed one.

Python runs this file at its start where the folder is in PYTHONPATH; see `reference.environment`.
"""

import sys

sys.modules["datasets"] = None  # type: ignore[assignment]
