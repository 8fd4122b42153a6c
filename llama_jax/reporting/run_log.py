"""The running log of a training run: when a line is due, what it says, and the bar."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from llama_jax.data.batches import Batches
from llama_jax.reporting.trainer_state import TrainerState


class RunLog:
    """Takes each update's metrics; writes the HF Trainer's log lines to the standard output and drives the bar."""

    def __init__(
        self,
        state: TrainerState,
        batches: Batches,
        schedule: np.ndarray,
        due: Callable[[int], bool],
        flops_per_token: float,
        bar: Any,
    ):
        self.state, self.batches, self.schedule, self.due, self.bar = state, batches, schedule, due, bar
        self.flops_per_token = flops_per_token
        self.started = time.monotonic()
        self.first_step = state.values["global_step"]
        self._flos = float(state.values["total_flos"])
        self._total_loss = self._window_loss = 0.0
        self._window = 0
        self._done_at: list[tuple[float, int]] = []  # when each update was done, and its tokens

    def on_update(self, step: int, loss: float, grad_norm: float, tokens: int) -> None:
        """Update number `step` (from 1) is done."""
        order = self.batches.order
        self._flos += self.flops_per_token * self.batches.padded_tokens(step - 1)
        self._total_loss += loss
        self._window_loss += loss
        self._window += 1
        epoch = order.epoch_at(step)
        self.state.at(step, epoch, self._flos)
        self._done_at.append((time.monotonic(), tokens))
        modern = order.compat == "5"
        lr = float(self.schedule[step - 1 if modern else step])
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {self._recent_speed():,.0f} tok/s", refresh=False)
        self.bar.update(1)
        if self.due(step):
            values = {"loss": self._window_loss / self._window}
            if modern:
                values["grad_norm"] = grad_norm
            values["learning_rate"] = lr
            tqdm.write(str(self.state.log(values, epoch, step)))
            self._window_loss, self._window = 0.0, 0

    def speed(self) -> tuple[float, float]:
        """Real tokens a second since the first update (which compiled) was done, and the median seconds an update."""
        if len(self._done_at) < 2:
            return 0.0, 0.0
        times = np.asarray([t for t, _ in self._done_at])
        tokens = sum(n for _, n in self._done_at[1:])
        return tokens / max(times[-1] - times[0], 1e-9), float(np.median(np.diff(times)))

    def _recent_speed(self, updates: int = 50) -> float:
        recent = self._done_at[-updates:]
        return sum(n for _, n in recent[1:]) / max(recent[-1][0] - recent[0][0], 1e-9)

    def finish(self) -> None:
        """The last entry, as the HF Trainer computes it: examples by the flags, the loss by this process alone."""
        order, seconds = self.batches.order, time.monotonic() - self.started
        if order.max_steps > 0:
            samples = float(order.updates * order.per_device_batch * order.accumulation * order.ranks)
        else:
            samples = order.examples * order.epochs
        step = self.state.values["global_step"]
        values = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(samples / seconds, 3),
            "train_steps_per_second": round(order.updates / seconds, 3),
            "total_flos": self._flos,
            "train_loss": self._total_loss / max(step, 1),
        }
        entry = self.state.log(values, order.epoch_at(step), step)
        tqdm.write(str({k: v for k, v in entry.items() if k != "total_flos"}))
