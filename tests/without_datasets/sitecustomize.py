"""Hide `datasets` and `peft` from transformers 4.37, whose huggingface_hub and accelerate are too old for them.

Python runs this file at its start where the folder is in PYTHONPATH; see `reference.environment`.
"""

import sys

for name in ("datasets", "peft"):
    sys.modules[name] = None  # type: ignore[assignment]
