"""Fine-tune any LLaMA checkpoint on TPU and GPU with JAX/Flax, and compute with it: `llama_jax.load(folder)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.api import Model as Model
    from llama_jax.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names on their first use: `import llama_jax` alone must not import jax."""
    if name not in ("Model", "load"):
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    from llama_jax import api

    return getattr(api, name)
