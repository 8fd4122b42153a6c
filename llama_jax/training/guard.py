"""Decide on the device whether an update is made, from its loss and gradient norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from llama_jax.distributed import sharding
from llama_jax.training.state import LossWindow, TrainState

LENGTH = 100  # updates: the weight of a loss falls by the factor 1 - 1 / LENGTH with each later one
LEAST = 20  # losses in the window before a loss can be a spike


class Decision(NamedTuple):
    """Hold a guard's verdict: whether the update is made, None where every update is, and the state to go on with.

    `skipped` is false before the last block of an update.
    """

    made: jax.Array | None
    skipped: jax.Array
    opt_state: Any
    losses: LossWindow | None


class Guard(NamedTuple):
    """Skip updates: with `nonfinite` where loss or gradient norm is NaN or Inf, with `sigma` at spikes of the loss.

    A spike is a loss above mean + `sigma` * standard deviation of the losses of earlier good updates.
    """

    nonfinite: bool = True
    sigma: float | None = None

    def __call__(self, opt_state: Any, before: TrainState, loss: jax.Array, norm: jax.Array) -> Decision:
        """Decide on an update after which the optimizer's state would be `opt_state`.

        A skipped update counts as done and leaves every other bit of the state as before. `loss` is the sum over the
        blocks so far; before the last block of `optax.MultiSteps`, only the sum of gradients changes. Selections are
        part of the optimizer's own pass over the state; a branch would wait for the host on a GPU.
        """
        multi_steps = isinstance(opt_state, optax.MultiStepsState)
        last = opt_state.mini_step == 0 if multi_steps else jnp.ones((), bool)
        made, skipped, losses = self.decide(before.losses, loss, norm, last)
        if made is None:
            return Decision(None, skipped, opt_state, losses)
        if multi_steps:  # optax multiplies by 0, which keeps a NaN
            zeros = jax.tree.map(jnp.zeros_like, opt_state.acc_grads)
            inner = select(made, opt_state.inner_opt_state, before.opt_state.inner_opt_state)
            sums = select(last, zeros, opt_state.acc_grads)
            opt_state = opt_state._replace(inner_opt_state=inner, acc_grads=sums)
        else:
            opt_state = select(made, opt_state, before.opt_state)
        return Decision(made, skipped, opt_state, losses)

    def decide(
        self, losses: LossWindow | None, loss: jax.Array, norm: jax.Array, last: jax.Array
    ) -> tuple[jax.Array | None, jax.Array, LossWindow | None]:
        """Return whether the update is made (None where every update is), whether it is skipped, and the losses that
        follow. `last` is whether the update has no further block."""
        if not self.nonfinite and self.sigma is None:
            return None, jnp.zeros((), bool), losses
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        bad = ~finite if self.nonfinite else jnp.zeros((), bool)
        if self.sigma is not None:
            assert losses is not None
            bad |= _is_spike(losses, loss, self.sigma)
            losses = select(last & finite & ~bad, _followed_by(losses, loss), losses)
        return last & ~bad, last & bad, losses


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Return one of two trees of arrays."""
    return jax.tree.map(lambda a, b: jax.lax.select(condition, a, b), yes, no)


def _is_spike(losses: LossWindow, loss: jax.Array, sigma: float) -> jax.Array:
    return (losses.count >= LEAST) & (loss > losses.mean + sigma * jnp.sqrt(losses.variance))


def _followed_by(losses: LossWindow, loss: jax.Array) -> LossWindow:
    """Return the window with one more loss: the plain mean and variance of the first LENGTH, then exponential."""
    count = losses.count + 1
    share = jnp.maximum(1 / count, 1 / LENGTH)
    apart = loss - losses.mean
    variance = (1 - share) * (losses.variance + share * apart * apart)
    return LossWindow(losses.mean + share * apart, variance, count)


def place_losses(mesh: Mesh, values: list[float] | None) -> LossWindow:
    """Place a window on the devices, from the values of its fields in a checkpoint; None for a new run."""
    return LossWindow(*(sharding.put_scalar(mesh, np.float32(x)) for x in values or [0.0] * 3))


def abstract_losses(mesh: Mesh) -> LossWindow:
    """Return the types and placements of `place_losses`."""
    return LossWindow(*[jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))] * 3)
