"""Let llama-cpp-python load the library of xllamacpp, a build of llama.cpp without three functions that it declares.

Python runs this file at its start where the folder is in PYTHONPATH; see `test_servers.llama_cpp`.
"""

import ctypes
from typing import Any

MISSING = ("llama_model_quantize", "llama_model_quantize_default_params", "llama_max_parallel_sequences")


class Library(ctypes.CDLL):
    def __getattr__(self, name: str) -> Any:
        if name in MISSING and not self._has(name):
            return lambda *_: None
        return super().__getattr__(name)

    def _has(self, name: str) -> bool:
        try:
            super().__getattr__(name)
        except AttributeError:
            return False
        return True


ctypes.CDLL = Library  # type: ignore[misc]
