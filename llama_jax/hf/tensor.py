"""A tensor that is still in its file."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """A named tensor of a checkpoint: what it is, where it lies, and how a part of it is read.

    `read(index)` takes one slice (with non-negative bounds, step 1) a dimension, `()` for the whole, and returns a new
    NumPy array (bfloat16 by `ml_dtypes`). It reads from disk each time: nothing is kept.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    read: Callable[[Index], np.ndarray]
