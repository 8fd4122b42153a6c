"""Loop over updates: put blocks onto the devices, make updates, read metrics back."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.data.batches import Batch, Batches
from llama_jax.distributed import sharding
from llama_jax.reporting.run_log import UpdateMetrics
from llama_jax.training.state import TrainState
from llama_jax.training.step import LossStep, Steps


def token_losses(params: Any, loss_step: LossStep, batches: Batches, mesh: Mesh, k: int) -> list[jax.Array]:
    """Return the weighted losses of the blocks of update k, [B, T] each, without training on them."""
    losses: list[jax.Array] = []
    with jax.set_mesh(mesh):
        for block in put_update(mesh, batches, k, make_update(mesh, batches, k)):
            losses.append(loss_step(params, block))
            sharding.keep_pace(losses)
    return losses


def put_batch(mesh: Mesh, block: Batch, rows: int | None = None) -> Batch:
    """Put a block of the host on the devices; with `rows`, the block is this process' share of so many rows."""
    return Batch(*(sharding.put(mesh, a, rows) for a in block))


def make_update(mesh: Mesh, batches: Batches, k: int) -> list[Batch]:
    """Return the rows of update k that this process' devices hold, as blocks of the host."""
    return batches.update(k, partial(sharding.local_rows, mesh))


def put_update(mesh: Mesh, batches: Batches, k: int, blocks: list[Batch]) -> list[Batch]:
    """Put the blocks of `make_update` on the devices."""
    return [put_batch(mesh, block, rows) for block, (rows, _) in zip(blocks, batches.shapes_of(k), strict=True)]


def fit(
    state: TrainState,
    steps: Steps,
    batches: Batches,
    mesh: Mesh,
    updates: range,
    *,
    learning_rate: Callable[[int], float],
    on_update: Callable[[UpdateMetrics], None],
    due: Callable[[int], bool],
    on_due: Callable[[int, TrainState, bool], bool],
    stop: Callable[[], bool],
) -> TrainState:
    """Make the updates of the range (numbered from 0) and return the last state.

    `learning_rate` is called one update ahead, and again just before the update. Metrics are read one update late, so
    that the device never waits for the host. `on_due` is called after an update whose number (from 1) is `due`, and
    when `stop` becomes true. It gets the state and whether to stop, all metrics read; it returns whether to stop.
    """

    def prepare(k: int) -> tuple[list[Batch], np.float32, jax.Array, float]:
        """Return blocks and rate of update k on the devices, and the seconds that the host took to make the blocks."""
        started = time.monotonic()
        blocks = make_update(mesh, batches, k)
        made_in, rate = time.monotonic() - started, np.float32(learning_rate(k))
        return put_update(mesh, batches, k, blocks), rate, sharding.put_scalar(mesh, rate), made_in

    pending: Callable[[], UpdateMetrics] | None = None
    ahead = prepare(updates[0]) if updates else None
    for k in updates:
        assert ahead is not None
        blocks, rate, placed_rate, made_in = ahead
        # A transfer waits for all programs dispatched before it. Started here, it waits for the last update only.
        ahead = prepare(k + 1) if k + 1 in updates else None
        if (now := np.float32(learning_rate(k))) != rate:  # an evaluation changed the schedule meanwhile
            placed_rate = sharding.put_scalar(mesh, now)
        state, outputs = steps.update(state, blocks, placed_rate, mesh)
        if pending is not None:
            on_update(pending())
        pending = partial(_read, batches, k, outputs, made_in)
        stopping = stop()
        if stopping or due(k + 1):
            on_update(pending())
            pending = None
            stopping = on_due(k + 1, state, stopping)
        if stopping:
            break
    if pending is not None:
        on_update(pending())
    return state


def _read(batches: Batches, k: int, outputs: list[dict[str, jax.Array]], made_in: float) -> UpdateMetrics:
    last = outputs[-1]
    of_blocks, norm, skipped = sharding.read(([o["loss"] for o in outputs], last["grad_norm"], last["skipped"]))
    loss, norm = sum(map(float, of_blocks)), float(norm)
    losses = [o["losses"] for o in outputs]
    return UpdateMetrics(
        step=k + 1,
        loss=loss,
        grad_norm=norm,
        tokens=batches.tokens(k),
        made_in=made_in,
        micro_losses=lambda: batches.micro_losses(k, sharding.read(losses)),
        skipped=bool(skipped),
    )
