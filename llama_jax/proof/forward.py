"""Compare the forward pass layer by layer: each layer alone on equal input, and the states carried from layer to layer.

Letters: B examples, T tokens of the longest, R rows of this program, N tokens of all examples, D model, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from llama_jax.proof.bounds import bound_of, rotation_bound
from llama_jax.proof.our_layers import OurLayers
from llama_jax.proof.parts import differing_part
from llama_jax.proof.sample import Sample
from llama_jax.proof.torch_layers import BF16_WEIGHTS, EXACT, Reference
from llama_jax.proof.verdict import Row, bounded
from llama_jax.proof.walk import Walk, as_state, numpy_of, worst_token

CARRIED = ", carried"


def compare_forward(
    reference: Reference, ours: OurLayers, sample: Sample, precision: str, section: str
) -> tuple[list[Row], Walk]:
    """Return the rows of embedding, layers, norm and logits, and the states for `gradients`."""
    torch = reference.torch
    walk, rows, parted = Walk(precision), [], False

    def add(name: str, depth: int, o: np.ndarray, t: np.ndarray, y: np.ndarray) -> None:
        rows.append(compared(section, name, precision, depth, sample, o, t, y))

    with torch.no_grad():
        rows.append(compare_rotation(reference, ours, sample, section))
        x, given = {}, walk.arguments
        for kind in (EXACT, precision):
            embedding = reference.embedding(kind)
            x[kind], given[kind] = reference.inputs(sample.ids, sample.mask, kind, embedding)
        reference.drop(embedding)
        walk.shared.append(rounded(torch, sample.of_padded(numpy_of(x[EXACT])), precision))
        walk.theirs.append(x[precision])
        walk.ours.append(ours.embed(ours.read("embed_tokens")))
        y, t = (sample.of_padded(numpy_of(x[kind])) for kind in (EXACT, precision))
        add("embedding", 0, sample.of_rows(walk.ours[0]), t, y)

        def step(name: str, depth: int, their: Callable[[Any, str], Any], our: Callable[[np.ndarray], np.ndarray]):
            """Compare a part of the model, alone and carried, and return its carried outputs and the exact one."""
            same = walk.shared[-1]
            padded = sample.to_padded(same)
            exact = sample.of_padded(numpy_of(their(torch.tensor(padded, dtype=torch.float64), EXACT)))
            alone = sample.of_padded(numpy_of(their(torch.tensor(padded).to(x[precision].dtype), precision)))
            carried = their(walk.theirs[-1], precision)
            add(name, 0, sample.of_rows(our(as_state(sample.to_rows(same), walk))), alone, exact)
            own = our(walk.ours[-1])
            add(name + CARRIED, depth, sample.of_rows(own), sample.of_padded(numpy_of(carried)), exact)
            return exact, carried, own

        for i in range(reference.layers):
            params = ours.read(i)

            def their_layer(state: Any, kind: str, i: int = i) -> Any:
                with reference.layer(i, kind) as layer:
                    return reference.call(layer, state, given[kind][i], kind)

            exact, carried, own = step(f"block {i}", i + 1, their_layer, lambda s: ours.layer(i, params, s))  # noqa: B023
            if rows[-2].holds is False and not parted:
                parted = True  # the first alone: a later one mostly has the same cause
                rows[-2] = replace(
                    rows[-2], note=f"in {differing_part(reference, ours, sample, walk, i)}; {rows[-2].note}"
                )
            walk.shared.append(rounded(torch, exact, precision))
            walk.theirs.append(carried)
            walk.ours.append(own)

        depth, kept = reference.layers + 1, (walk.shared[-1], walk.theirs[-1], walk.ours[-1])
        params = ours.read("norm")

        def their_norm(state: Any, kind: str) -> Any:
            norm = reference.norm(kind)
            with reference.computing(kind):
                return norm(state)

        exact, carried, own = step("final norm", depth, their_norm, lambda s: ours.norm(params, s))
        walk.shared[-1], walk.theirs[-1], walk.ours[-1] = rounded(torch, exact, precision), carried, own
        params = ours.read(ours.head)

        def their_logits(state: Any, kind: str) -> Any:
            return reference.logits(state, kind, reference.head(kind))

        step("logits", depth, their_logits, lambda s: ours.logits(params, s))
        walk.shared[-1], walk.theirs[-1], walk.ours[-1] = kept
    return rows, walk


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


def compared(
    section: str, name: str, precision: str, depth: int, sample: Sample, o: np.ndarray, t: np.ndarray, y: np.ndarray
) -> Row:
    """Return the row of tokens' vectors [N, ...] of this program, of torch, and exact ones. The error is that of the
    worst token, relative in its norm; the note tells the largest difference, and where a row fails its token."""
    error, own, worst = worst_token(o, t, y)
    row = bounded(
        section, name, error, bound_of(precision, own, depth), f"largest difference {np.abs(o - t).max():.2e}"
    )
    if row.holds:
        return row
    record, token = (int(at[worst]) for at in np.nonzero(sample.mask))
    return replace(row, note=f"{row.note}, at example {record + 1} of the batch, token {token}")


def rounded(torch: Any, states: np.ndarray, precision: str) -> np.ndarray:
    """Return exact states in float32, rounded to the type that a state has in a precision."""
    kind = torch.bfloat16 if precision == BF16_WEIGHTS else torch.float32
    return torch.tensor(states).to(kind).float().numpy()
