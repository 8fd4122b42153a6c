"""Compare the forward pass layer by layer: each layer alone on equal input, and the states carried from layer to layer.

Letters: B examples, T tokens of the longest, R rows of this program, N tokens of all examples, D model, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llama_jax.proof.bounds import bound_of, rotation_bound
from llama_jax.proof.our_layers import OurLayers
from llama_jax.proof.parts import differing_part
from llama_jax.proof.sample import Sample
from llama_jax.proof.torch_layers import Reference
from llama_jax.proof.verdict import Row, bounded
from llama_jax.proof.walk import Walk, as_state, numpy_of, worst_token

CARRIED = ", carried"


def compare_forward(
    reference: Reference, ours: OurLayers, sample: Sample, precision: str, section: str
) -> tuple[list[Row], Walk]:
    """Return the rows of rotation, embedding, layers, norm and logits, and the states for `gradients`."""
    forward = _Forward(reference, ours, sample, Walk(precision), section)
    with reference.torch.no_grad():
        forward.rows.append(compare_rotation(reference, ours, sample, section))
        forward.embedding()
        for i in range(reference.layers):
            forward.layer(i)
        forward.norm_and_logits()
    return forward.rows, forward.walk


@dataclass
class _Forward:
    reference: Reference
    ours: OurLayers
    sample: Sample
    walk: Walk
    section: str
    rows: list[Row] = field(default_factory=list)

    def embedding(self) -> None:
        """Compare the input of the first layer, and begin the walk."""
        reference, walk, found = self.reference, self.walk, {}
        for kind in (walk.exact, walk.precision):
            embedding = reference.embedding(kind)
            found[kind], walk.arguments[kind] = reference.inputs(self.sample.ids, self.sample.mask, kind, embedding)
        reference.drop(embedding)
        exact, theirs = (self.sample.of_padded(numpy_of(found[kind])) for kind in (walk.exact, walk.precision))
        own = self.ours.embed(self.ours.read("embed_tokens"))
        self._add("embedding", 0, own, theirs, exact)
        self._carry(exact, found[walk.precision], own)

    def layer(self, i: int) -> None:
        """Compare layer i; of the first that differs, its parts."""
        reference, params = self.reference, self.ours.read(i)

        def theirs(state: Any, kind: str) -> Any:
            with reference.layer(i, kind) as layer:
                return reference.call(layer, state, self.walk.arguments[kind][i], kind)

        first = all(row.holds for row in self.rows if row.name.startswith("block"))
        outputs = self._step(f"block {i}", i + 1, theirs, lambda x: self.ours.layer(i, params, x))
        row = self.rows[-2]
        if first and not row.holds:  # a later one mostly has the same cause
            part = differing_part(reference, self.ours, self.sample, self.walk, i)
            self.rows[-2] = replace(row, note=f"in {part}; {row.note}")
        self._carry(*outputs)

    def norm_and_logits(self) -> None:
        """Compare final norm and logits. The walk ends with the last layer's output, as `gradients` needs it."""
        reference, walk, depth = self.reference, self.walk, self.reference.layers + 1
        params = self.ours.read("norm")

        def normed(state: Any, kind: str) -> Any:
            norm = reference.norm(kind)
            with reference.computing(kind):
                return norm(state)

        self._carry(*self._step("final norm", depth, normed, lambda x: self.ours.norm(params, x)))
        params = self.ours.read(self.ours.head)

        def logits(state: Any, kind: str) -> Any:
            return reference.logits(state, kind, reference.head(kind))

        self._step("logits", depth, logits, lambda x: self.ours.logits(params, x))
        for states in (walk.shared, walk.theirs, walk.ours):
            states.pop()

    def _step(
        self, name: str, depth: int, theirs: Callable[[Any, str], Any], ours: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, Any, np.ndarray]:
        """Compare a part, alone and carried. Return its exact output, torch's and this program's carried ones."""
        walk, sample = self.walk, self.sample
        shared = walk.shared[-1]
        exact, alone = (
            sample.of_padded(numpy_of(theirs(self.reference.state(sample.to_padded(shared), kind), kind)))
            for kind in (walk.exact, walk.precision)
        )
        self._add(name, 0, ours(as_state(sample.to_rows(shared), walk)), alone, exact)
        carried, own = theirs(walk.theirs[-1], walk.precision), ours(walk.ours[-1])
        self._add(name + CARRIED, depth, own, sample.of_padded(numpy_of(carried)), exact)
        return exact, carried, own

    def _add(self, name: str, depth: int, own: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> None:
        """Add the row of values [R, T, ...] of this program, and [N, ...] of torch and exact ones. The error is that of
        the worst token, relative in its norm; the note tells the largest difference, and where a row fails its
        token."""
        own = self.sample.of_rows(own)
        error, rounding, worst = worst_token(own, theirs, exact)
        note = f"largest difference {np.abs(own - theirs).max():.2e}"
        row = bounded(self.section, name, error, bound_of(self.walk.precision, rounding, depth), note)
        if not row.holds:
            example, token = (int(at[worst]) for at in np.nonzero(self.sample.mask))
            row = replace(row, note=f"{note}, at example {example + 1} of the batch, token {token}")
        self.rows.append(row)

    def _carry(self, exact: np.ndarray, theirs: Any, own: np.ndarray) -> None:
        walk = self.walk
        walk.shared.append(self.reference.state(exact, walk.precision).float().numpy())
        walk.theirs.append(theirs)
        walk.ours.append(own)


def compare_rotation(reference: Reference, ours: OurLayers, sample: Sample, section: str) -> Row:
    """Return the row of the rotation's cosines and sines, for as many positions as the run's longest example has."""
    *theirs, frequency = reference.rotation(sample.positions)
    factor = max(1.0, float(np.hypot(*theirs).max()))
    off = np.maximum(*(np.abs(o - t) for o, t in zip(ours.rotation(sample.positions), theirs, strict=True)))
    bound = rotation_bound(sample.positions, frequency, factor)
    row = bounded(section, "rotation", float(off.max()), bound, f"of {sample.positions:,} positions")
    if row.holds:
        return row
    place, pair = np.unravel_index(off.argmax(), off.shape)
    return replace(row, note=f"{row.note}, worst at position {place}, frequency {pair}: rope_theta, or its scaling")
