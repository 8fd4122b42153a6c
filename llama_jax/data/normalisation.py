"""The weight of each trained token: all that the HF Trainer's versions do differently about a loss.

A `Normalise` gets an update's number and the trained tokens of its micro-batches, one number a rank, and returns the
weight of one token of each: the loss is then the weighted sum over tokens, whatever the version. The weight is NaN
where the Trainer takes a mean over no tokens.
"""

import math
from collections.abc import Callable

from llama_jax.data.order import Order

Trained = list[list[int]]
Normalise = Callable[[int, Trained], list[list[float]]]


def training_loss(order: Order, average_tokens_across_devices: bool = True) -> Normalise:
    """4.37: a micro-batch's mean on each rank, averaged over ranks and accumulation steps. 5: one sum over the update,
    divided by its trained tokens (or, not averaged across devices, each rank's sum by its own, averaged over ranks).
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
    """The examples of each micro-batch and rank that count: not those that only top up the last one."""
    size, ranks = order.per_device_batch, order.ranks
    return [
        [min(size, max(0, order.examples - (m * ranks + r) * size)) for r in range(ranks)]
        for m in range(order.bounds[update], order.bounds[update + 1])
    ]


def evaluation_loss(order: Order, compat: str) -> Normalise:
    """The sum over examples of their evaluation batch's mean over tokens: on each rank (4.37), or over all ranks (5).

    Examples that top up the last batch count in its mean.
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
