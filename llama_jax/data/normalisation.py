"""Compute the weight of each trained token: the only difference in loss between the HF Trainer's versions.

A `Normalise` maps an update's number, and the trained tokens of its micro-batches by rank, to the weight of a token of
each. In every version the loss is then the weighted sum over tokens. The weight is NaN where the Trainer takes a mean
over no tokens.
"""

import math
from collections.abc import Callable

from llama_jax.data.order import Order

Trained = list[list[int]]
Normalise = Callable[[int, Trained], list[list[float]]]


def training_loss(order: Order, average_tokens_across_devices: bool = True) -> Normalise:
    """Return the weights of the HF Trainer's training loss.

    4.37: the mean of a micro-batch on each rank, averaged over ranks and accumulation steps. 5: the sum over the update
    divided by its trained tokens. Without `average_tokens_across_devices`, 5 divides each rank's sum by the rank's
    tokens and averages over ranks.
    """

    def means(update: int, trained: Trained) -> list[list[float]]:
        return [[_over(n * order.accumulation * order.ranks) for n in ranks] for ranks in trained]

    def sums(update: int, trained: Trained) -> list[list[float]]:
        of_ranks = [sum(column) for column in zip(*trained, strict=True)]
        if average_tokens_across_devices:
            weights = [_over(sum(of_ranks))] * order.ranks
        else:
            weights = [_over(n * order.ranks) for n in of_ranks]
        return [weights for _ in trained]

    return means if order.compat == "4.37" else sums


def evaluation_shares(order: Order, update: int) -> list[list[int]]:
    """Count the examples of each micro-batch and rank, without the repeated ones that fill the last micro-batch."""
    size, ranks = order.per_device_batch, order.ranks
    return [
        [min(size, max(0, order.examples - (m * ranks + r) * size)) for r in range(ranks)]
        for m in range(order.bounds[update], order.bounds[update + 1])
    ]


def evaluation_loss(order: Order, compat: str) -> Normalise:
    """Return the weights of the evaluation loss: the sum, over examples, of the mean over their batch's tokens.

    The mean is each rank's in 4.37, over all ranks in 5. Repeated examples that fill the last batch count in its mean.
    """

    def shares(update: int, trained: Trained) -> list[list[float]]:
        weights = []
        for counted, of_ranks in zip(evaluation_shares(order, update), trained, strict=True):
            means = [sum(of_ranks) / order.ranks] * order.ranks if compat == "5" else of_ranks
            weights.append([n * _over(t) if n else 0.0 for n, t in zip(counted, means, strict=True)])
        return weights

    return shares


def _over(count: float) -> float:
    return 1.0 / count if count else math.nan
