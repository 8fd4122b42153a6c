"""Compare the loss and the gradient of every parameter, layer by layer backward.

Each layer is compared alone, on equal input and equal gradient of its output, and with the gradients that each program
carries from the loss downward, as a run computes them.

Letters: B examples, T tokens of the longest, R rows of this program, N tokens of all examples, D model.
"""

from typing import Any

import numpy as np

from llama_jax.proof.bounds import bound_of
from llama_jax.proof.our_layers import Gradients, OurLayers
from llama_jax.proof.sample import Sample
from llama_jax.proof.torch_layers import EMBEDDING, HEAD, Reference
from llama_jax.proof.verdict import Row, bounded
from llama_jax.proof.walk import Walk, as_state, numpy_of

INPUT = "gradient of the input"


def compare_gradients(
    reference: Reference, ours: OurLayers, sample: Sample, walk: Walk, alone: str, carried: str
) -> list[Row]:
    """Return the rows of each layer alone, in the section `alone`, then of the loss and of each parameter, in the
    section `carried`. `walk` is of `compare_forward`."""
    comparison = _Comparison(reference, ours, sample, walk, alone, carried)
    comparison.of_loss()
    for i in reversed(range(reference.layers)):
        comparison.of_layer(i)
    comparison.of_embedding()
    return [*comparison.alone_rows, *comparison.carried_rows]


class _Comparison:
    """Hold the gradients on their way downward: `shared` [N, D] the exact ones, rounded to the type of a state, and
    each program's own."""

    def __init__(self, reference: Reference, ours: OurLayers, sample: Sample, walk: Walk, alone: str, carried: str):
        self.torch, self.reference, self.ours, self.sample, self.walk = reference.torch, reference, ours, sample, walk
        self.alone, self.carried = alone, carried
        self.alone_rows: list[Row] = []
        self.carried_rows: list[Row] = []
        self.head: list[np.ndarray] = []  # of a tied head, by this program, torch and exact
        self.shared = np.zeros(0)
        self.theirs: Any = None
        self.own = np.zeros(0)

    def of_loss(self) -> None:
        """Compare the loss, and the gradients of head, norm and last state."""
        walk, same = self.walk, self.walk.shared[-1]
        params = self.ours.read("norm", self.ours.head)
        state = as_state(self.sample.to_rows(same), walk)
        exact_loss, dx, exact = self._their_loss(self._padded(same, walk.exact), walk.exact)
        self.shared = self._down(dx)
        their_loss, dx_alone, theirs = self._their_loss(self._padded(same, walk.precision), walk.precision)
        our_loss, dx_ours, ours = self.ours.loss_gradient(params, state)
        self._alone("head and loss", dx_ours, dx_alone, dx, ours, theirs, exact)
        self._loss_row(self.alone, our_loss, their_loss, exact_loss, 0)
        their_loss, self.theirs, theirs = self._their_loss(walk.theirs[-1].detach(), walk.precision)
        our_loss, self.own, ours = self.ours.loss_gradient(params, walk.ours[-1])
        self._loss_row(self.carried, our_loss, their_loss, exact_loss, self.reference.layers)
        if EMBEDDING in exact and EMBEDDING in ours:  # tied on both sides: the embedding's part is to come
            self.head = [part.pop(EMBEDDING) for part in (ours, theirs, exact)]
        self._carried(ours, theirs, exact, 1)

    def of_layer(self, i: int) -> None:
        """Compare the gradients of layer i."""
        walk, same, params = self.walk, self.walk.shared[i], self.ours.read(i)
        state, gradient = (as_state(self.sample.to_rows(tokens), walk) for tokens in (same, self.shared))
        x, dy = (self._padded(tokens, walk.exact) for tokens in (same, self.shared))
        dx, exact = self._their_layer(i, x, dy, walk.exact)
        x, dy = (self._padded(tokens, walk.precision) for tokens in (same, self.shared))
        dx_alone, theirs = self._their_layer(i, x, dy, walk.precision)
        dx_ours, ours = self.ours.layer_gradient(i, params, state, gradient)
        self._alone(f"block {i}", dx_ours, dx_alone, dx, ours, theirs, exact)
        self.shared = self._down(dx)
        del theirs, ours
        self.theirs, theirs = self._their_layer(i, walk.theirs[i].detach(), self.theirs, walk.precision)
        self.own, ours = self.ours.layer_gradient(i, params, walk.ours[i], self.own)
        self._carried(ours, theirs, exact, self.reference.layers - i + 1)

    def of_embedding(self) -> None:
        """Compare the gradient of the embedding, with a tied head's part."""
        walk, params = self.walk, self.ours.read("embed_tokens")
        exact = self._their_embedding(self._padded(self.shared, walk.exact), walk.exact)
        theirs = self._their_embedding(self._padded(self.shared, walk.precision), walk.precision)
        ours = self.ours.embed_gradient(params, as_state(self.sample.to_rows(self.shared), walk))
        self._alone("embedding", None, None, None, ours, theirs, exact)
        theirs = self._their_embedding(self.theirs, walk.precision)
        ours = self.ours.embed_gradient(params, self.own)
        for found, head in zip((ours, theirs, exact), self.head, strict=bool(self.head)):
            found[EMBEDDING] = found[EMBEDDING] + head
        self.head = []
        self._carried(ours, theirs, exact, self.reference.layers + 1)

    def _their_loss(self, x: Any, precision: str) -> tuple[float, Any, Gradients]:
        reference = self.reference
        norm, head = reference.norm(precision), reference.head(precision)
        x.requires_grad_(True)
        with reference.computing(precision):
            hidden = norm(x)
        loss = reference.loss(reference.logits(hidden, precision, head), self.sample.labels)
        dx, d_norm, d_head = self.torch.autograd.grad(loss, [x, norm.weight, head.weight])
        name = EMBEDDING if reference.tied else HEAD
        return float(loss.detach()), dx, {"model.norm.weight": numpy_of(d_norm), name: numpy_of(d_head)}

    def _their_layer(self, i: int, x: Any, dy: Any, precision: str) -> tuple[Any, Gradients]:
        reference = self.reference
        x.requires_grad_(True)
        with reference.layer(i, precision) as layer:
            names, parameters = zip(*layer.named_parameters(), strict=True)
            y = reference.call(layer, x, self.walk.arguments[precision][i], precision)
            dx, *grads = self.torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))
        found = {f"model.layers.{i}.{name}": numpy_of(grad) for name, grad in zip(names, grads, strict=True)}
        return dx, found

    def _their_embedding(self, dy: Any, precision: str) -> Gradients:
        embedding = self.reference.embedding(precision)
        x, _ = self.reference.inputs(self.sample.ids, self.sample.mask, precision, embedding)
        (grad,) = self.torch.autograd.grad(x, [embedding.weight], dy.to(x.dtype))
        return {EMBEDDING: numpy_of(grad)}

    def _padded(self, tokens: np.ndarray, precision: str) -> Any:
        return self.reference.state(self.sample.to_padded(tokens), precision)

    def _down(self, dx: Any) -> np.ndarray:
        """Return an exact gradient [B, T, D] as tokens, rounded to the type of a state."""
        return self.sample.of_padded(dx.to(self.walk.theirs[0].dtype).float().numpy())

    def _alone(
        self, name: str, o_dx: Any, t_dx: Any, y_dx: Any, ours: Gradients, theirs: Gradients, exact: Gradients
    ) -> None:
        """Add the row of a part alone: that of its gradient which is nearest to its bound, or farthest outside."""
        rows = self._rows(self.alone, ours, theirs, exact, 0)
        if o_dx is not None:
            of_padded = self.sample.of_padded
            t, y = of_padded(numpy_of(t_dx)), of_padded(numpy_of(y_dx))
            rows.append(self._row(self.alone, INPUT, self.sample.of_rows(o_dx), t, y, 0))
        worst = max(rows, key=lambda row: (row.holds is False, row.share))
        self.alone_rows.append(Row(self.alone, name, worst.error, worst.bound, worst.holds, f"worst: {worst.name}"))

    def _carried(self, ours: Gradients, theirs: Gradients, exact: Gradients, depth: int) -> None:
        self.carried_rows += self._rows(self.carried, ours, theirs, exact, depth)

    def _rows(self, section: str, ours: Gradients, theirs: Gradients, exact: Gradients, depth: int) -> list[Row]:
        """Return a row for each parameter of either program."""
        rows = []
        for name in exact | ours:
            if name in exact and name in ours:
                rows.append(self._row(section, name, ours[name], theirs[name], exact[name], depth))
            else:
                side = "torch's model" if name in exact else "this program"
                rows.append(Row(section, name, None, None, False, f"is a parameter of {side} alone"))
        return rows

    def _row(self, section: str, name: str, o: np.ndarray, t: np.ndarray, y: np.ndarray, depth: int) -> Row:
        """Return the row of a gradient of this program, of torch, and the exact one: relative in its norm."""
        scale = max(float(np.linalg.norm(y)), float(np.finfo(np.float32).tiny))
        own = float(np.linalg.norm(t - y)) / scale
        error = float(np.linalg.norm(o - t.astype(np.float64))) / scale
        return bounded(section, name, error, bound_of(self.walk.precision, own, depth))

    def _loss_row(self, section: str, ours: float, theirs: float, exact: float, depth: int) -> None:
        own, error = abs(theirs - exact) / abs(exact), abs(ours - theirs) / abs(exact)
        rows = self.alone_rows if section == self.alone else self.carried_rows
        bound = bound_of(self.walk.precision, own, depth)
        rows.append(bounded(section, "loss", error, bound, f"{ours:.7g} here, {theirs:.7g} by torch"))
