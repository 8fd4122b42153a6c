"""Hold the states of a forward pass by both programs, and measure their errors.

Letters: B examples, T tokens of the longest, R rows of this program, N tokens of all examples, D model.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_jax.proof.torch_layers import EXACT, FLOAT32


@dataclass
class Walk:
    """Hold the inputs of each layer, and the last one's output, of a forward pass in a precision.

    `shared` are the exact states [N, D], rounded to the precision of a state at each layer. `theirs` [B, T, D] and
    `ours` [R, T, D] are carried by each program itself. `arguments` are those of torch's layers by precision.
    """

    precision: str
    shared: list[np.ndarray] = field(default_factory=list)
    theirs: list[Any] = field(default_factory=list)
    ours: list[np.ndarray] = field(default_factory=list)
    arguments: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def exact(self) -> str:
        """Return the precision that counts as exact: float64 for float32. For bfloat16 float32 does, whose rounding is
        2^-15 of bfloat16's, in half the time."""
        return EXACT if self.precision == FLOAT32 else FLOAT32


def as_state(states: np.ndarray, walk: Walk) -> np.ndarray:
    """Return states in the type of this program's own."""
    return states.astype(walk.ours[0].dtype)


def numpy_of(value: Any) -> np.ndarray:
    """Return a tensor's values as an array: float64 stays, other types become float32."""
    return (value if value.dtype.itemsize == 8 else value.float()).detach().numpy()


def worst_token(o: np.ndarray, t: np.ndarray, y: np.ndarray) -> tuple[float, float, int]:
    """Return the largest error |o - t| / |y| of a token's vector, the largest |t - y| / |y|, and the worst token.

    `o` [N, ...] is of this program, `t` of torch, `y` exact.
    """
    scale = np.maximum(np.linalg.norm(y, axis=-1), np.finfo(np.float32).tiny)
    off = np.linalg.norm(o - t.astype(np.float64), axis=-1) / scale
    own = np.linalg.norm(t - y, axis=-1) / scale
    worst = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
    return float(off[worst]), float(own.max()), worst
