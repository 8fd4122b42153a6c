"""List the choices of `--remat`. Jax is not imported, so that the flags can read the table."""

from typing import NamedTuple


class Remat(NamedTuple):
    """Describe one choice of the activations that stay in memory between the forward and the backward pass.

    `kept` names the checkpoints (`checkpoint_name` in `llama.py`) that stay beside each layer's input; q and k are
    rotated. None keeps all. `time` is a token's relative time, `again` the share of the layers'
    forward pass that is computed a second time.
    """

    kept: tuple[str, ...] | None
    time: float
    again: float
    text: str


REMAT = {
    "none": Remat(None, 1.0, 0.0, "nothing"),
    "matmuls": Remat(
        ("q", "k", "v", "attention", "o_proj", "gate_proj", "up_proj"), 1.015, 0.0, "all but matmuls and attention"
    ),
    "attention": Remat(("attention",), 1.25, 1.0, "all but attention"),
    "full": Remat((), 1.32, 1.0, "all but each layer's input"),
}
