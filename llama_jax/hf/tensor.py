"""Describe tensors that are still in their files."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """Describe a tensor of a checkpoint, its file, and how to read a part.

    `read(index)` takes one slice (non-negative bounds, step 1) a dimension, or `()` for the whole tensor. The result is
    a new NumPy array (bfloat16 by `ml_dtypes`), read from disk on each call.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    read: Callable[[Index], np.ndarray]
