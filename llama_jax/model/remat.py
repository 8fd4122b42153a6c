"""List the choices of `--remat`. Jax is not imported, so that the flags can read the table."""

from typing import NamedTuple


class Remat(NamedTuple):
    """Describe one choice of the activations that stay in memory between the forward and the backward pass.

    `kept` names the checkpoints (`checkpoint_name` in `llama.py` and `attention.py`) that stay beside each layer's
    input; q and k are rotated. None keeps all. `time` is a token's relative time on an H200, None where it was not
    measured, `on_tpu` the mean of two estimates, the program in order and the compiler's schedule, of LLaMA-7B on v6e-8
    and v5e-16 (BENCHMARKS.md): there the backward pass reads what `none` keeps more slowly than it computes it. `auto`
    takes no choice without a time.
    """

    kept: tuple[str, ...] | None
    time: float | None
    on_tpu: float
    text: str

    def time_on(self, platform: str) -> float | None:
        """Return a token's relative time on a platform."""
        return self.on_tpu if platform == "tpu" else self.time

    def keeps(self, projection: str) -> bool:
        """Return whether the output of a projection stays, by the end of its name, as "q_proj"."""
        return self.kept is None or projection in self.kept or projection.removesuffix("_proj") in self.kept


REMAT = {
    "none": Remat(None, 1.0, 1.09, "nothing"),
    "matmuls": Remat(
        ("q", "k", "v", "attention", "o_proj", "gate_proj", "up_proj"), 1.015, 1.0, "all but matmuls and attention"
    ),
    "qkv": Remat(("q", "k", "v", "attention"), None, 1.04, "all but q, k, v and attention"),
    "attention": Remat(("attention",), 1.25, 1.065, "all but attention"),
    "full": Remat((), 1.32, 1.075, "all but each layer's input"),
}
