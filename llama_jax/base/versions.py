"""Read the versions of installed packages."""

import contextlib
import importlib.metadata

PACKAGES = ("llama_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "safetensors", "numpy")


def versions(*names: str) -> dict[str, str]:
    """Return the versions by name, without packages that are not installed, as this one where it runs from a folder."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
