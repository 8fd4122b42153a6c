"""Derive the bound of each error of a certificate from the precision, the depth and the rounding of torch itself.

Notation: u is the unit roundoff, 2^-24 in float32 and 2^-8 in bfloat16. A number that is rounded once is off by at most
u of itself. t is torch's result in the precision, o this program's, and y the exact one: torch's in float64, or for
bfloat16 in float32.
Errors are relative, in the norm of a token's vector, or of a parameter's gradient.

Both programs round the same operations. They sum in other orders: of n products a running sum is off by about
u sqrt(n), and libraries sum in blocks of some lanes, so that o and t are off by amounts of the same size but
independent. Scores of attention, cancellation in the gradients of q and k, and depth, enlarge both alike; no bound from
widths alone knows by how much, since a model with large scores loses a hundred times more. Torch's own error is
therefore measured, e = |t - y| / |y|: it holds depth, widths, scores and cancellation as they are in this model. Then
|o - t| <= |o - y| + |t - y|, and SPREAD = 1 + 7 allows o seven times the error of t: sums in blocks of 8 to 64 lanes
are off by 3 to 8 times less than running sums. (Measured for right models: at most 4.7 e, and 1.4 e where libraries sum
alike.)

The exact frequencies of the rotation are moved by a unit in the last place (`torch_layers`), since correct programs
differ by that much; so e includes it.

Where torch happens to be exact, as in an embedding, o may still be rounded: FLOOR roundings to a layer, added over the
depth as independent errors are, in the root of their number.
"""

import math

ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "bfloat16 weights": 2.0**-8}
SPREAD, FLOOR = 8.0, 4.0


def bound_of(precision: str, torch_error: float, layers: int) -> float:
    """Return the bound of |o - t| / |y| after `layers` layers, by torch's own error |t - y| / |y|."""
    return SPREAD * torch_error + FLOOR * ROUNDOFF[precision] * math.sqrt(1 + layers)


def rotation_bound(positions: int, frequency: float, factor: float) -> float:
    """Return the bound of the difference of two cosines of `positions` angles, each multiplied by `factor`.

    An angle is position times frequency. The frequencies of both programs differ by a unit in the last place, 2^-23 of
    themselves, after scalings by two, and each product is rounded once more: by 3 * 2^-23 in all. A cosine moves by as
    much as its angle, and is rounded twice on each side.
    """
    return factor * (positions * frequency * 3 + 2) * 2.0**-23
