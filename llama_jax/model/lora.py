"""Hold low-rank adapters: which projections have one, of which rank and scaling."""

from dataclasses import dataclass
from typing import NamedTuple


class Rank(NamedTuple):
    """Hold the rank of a projection's adapter, and the factor of its product: alpha / r, or alpha / sqrt(r)."""

    r: int
    scaling: float


@dataclass(frozen=True)
class Lora:
    """Hold the adapters of a run, resolved for a model.

    `ranks` is ((layer, projection), rank) for each adapted projection, as (0, "self_attn.q_proj"), in the model's
    order. `saved` names the modules that are trained whole: "embed_tokens", "lm_head". `dropout` is the probability
    with which an element of an adapter's input is zeroed in training.
    """

    ranks: tuple[tuple[tuple[int, str], Rank], ...]
    saved: tuple[str, ...] = ()
    dropout: float = 0.0
    use_dora: bool = False

    def of(self, layer: int, projection: str) -> Rank | None:
        """Return the rank of a projection's adapter, None where it has none."""
        return dict(self.ranks).get((layer, projection))
