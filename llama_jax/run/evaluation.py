"""Compute `eval_loss` as the HF Trainer does: the mean over tokens of each batch, weighted by the batch's examples."""

import math
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.base.errors import InputError
from llama_jax.data.batches import Batches
from llama_jax.data.examples import Examples
from llama_jax.data.normalisation import evaluation_loss, evaluation_shares
from llama_jax.data.order import Order
from llama_jax.distributed import sharding
from llama_jax.model.roles import Params
from llama_jax.reporting.metrics import EVALUATION_METRICS
from llama_jax.reporting.progress import count_bar
from llama_jax.training.fit import token_losses
from llama_jax.training.step import LossStep

FILL = 0.9  # planned share of the tokens that a device takes at once, for a group of batches


class Evaluation:
    """Evaluate parameters: a call returns the metrics by the Trainer's names.

    A batch is `batch_size` examples on each of `ranks`, the HF Trainer's. A group of batches with at most `max_tokens`
    tokens a device is dispatched together. A batch without trained tokens makes the loss NaN; 5 with `nan_filter`
    leaves it out.
    """

    def __init__(
        self,
        examples: Examples,
        loss_step: LossStep,
        mesh: Mesh,
        *,
        compat: str,
        ranks: int,
        batch_size: int,
        drop_last: bool,
        nan_filter: bool,
        max_tokens: int,
        disable_bar: bool | None = None,
    ):
        self._step, self._mesh, self._disable_bar = loss_step, mesh, disable_bar
        ways, max_tokens = sharding.batch_ways(mesh), max_tokens * sharding.row_ways(mesh)
        tokens_of_a_batch = float(examples.lengths.mean()) * batch_size * ranks
        together = max(1, int(FILL * max_tokens * ways / tokens_of_a_batch))
        if drop_last and len(examples) < batch_size * ranks:
            raise InputError(
                f"{len(examples)} examples of the evaluation do not fill one batch of {batch_size * ranks}, and "
                "--dataloader_drop_last True drops what is left; lower --per_device_eval_batch_size"
            )
        order = Order(
            len(examples),
            batch_size,
            accumulation=together,
            epochs=1.0,
            compat="5",  # as 5 accumulates: the last group is a short one
            ranks=ranks,
            drop_last=drop_last,
            sampling="sequential",
        )
        self.batches = Batches(examples, order, evaluation_loss(order, compat), ways, max_tokens)
        nan = [self.batches.is_nan(k) for k in range(order.updates)]
        shares = [np.asarray(evaluation_shares(order, k)) for k in range(order.updates)]
        counted = sum(int(s[~n].sum()) for s, n in zip(shares, nan, strict=True))
        filtered = compat == "5" and nan_filter and counted > 0
        self.has_nan = any(n.any() for n in nan)
        self._examples = math.nan if self.has_nan and not filtered else counted
        self._num_batches = math.ceil(len(examples) / (batch_size * ranks))

    def __call__(self, params: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return the metrics, or None where `stop`, called before each group, returned true."""
        started = time.monotonic()
        losses: list[jax.Array] = []
        groups = self.batches.order.updates
        with count_bar("evaluating", groups, "group", self._disable_bar) as bar:
            for k in range(groups):
                if stop():
                    return None
                losses += [x.sum() for x in token_losses(params, self._step, self.batches, self._mesh, k)]
                sharding.keep_pace(losses)
                bar.update(1)
            loss = sum(float(x) for x in sharding.read(losses)) / self._examples
        seconds = time.monotonic() - started
        rates = (len(self.batches.examples) / seconds, self._num_batches / seconds)
        values = (loss, round(seconds, 4), *(round(rate, 3) for rate in rates))
        return dict(zip(EVALUATION_METRICS, values, strict=True))
