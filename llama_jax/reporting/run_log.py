"""Log a training run: compute the HF Trainer's lines, print them when due, and drive the bar."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llama_jax.data.batches import Batches
from llama_jax.distributed.platform import memory_use
from llama_jax.reporting.progress import say, show
from llama_jax.reporting.speed import Speedometer
from llama_jax.reporting.trainer_state import TrainerState

SAID_EVERY = 10.0  # seconds between two lines of progress


class UpdateMetrics(NamedTuple):
    """Hold the metrics of one update.

    `step` counts from 1, `grad_norm` is taken before clipping, `made_in` is the host's seconds to make the blocks.
    `micro_losses()` reads from the devices the part of each micro-batch and rank in the loss, float64
    [micro-batches, ranks]. `skipped` is whether the update changed nothing.
    """

    step: int
    loss: float
    grad_norm: float
    tokens: int
    made_in: float
    micro_losses: Callable[[], np.ndarray]
    skipped: bool = False

    @property
    def finite(self) -> bool:
        """Return whether loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class RunLog:
    """Write the HF Trainer's log lines to stdout and drive the bar, from each update's metrics.

    `rate` maps updates done to the learning rate; `due` is whether a line is due after an update. `speedometer` counts
    the updates. `nan_filter` is `logging_nan_inf_filter`. `tokens_seen` is `include_num_input_tokens_seen`: "no", "all"
    (with the Trainer's padding) or "non_padding". `window` is the property's value in the run to resume.
    """

    def __init__(
        self,
        state: TrainerState,
        batches: Batches,
        *,
        rate: Callable[[int], float],
        due: Callable[[int], bool],
        flops_per_token: float,
        bar: Any,
        speedometer: Speedometer,
        nan_filter: bool = True,
        tokens_seen: str = "no",
        window: dict[str, Any] | None = None,
    ):
        self.state, self.batches, self.rate, self.due, self.bar = state, batches, rate, due, bar
        self.speedometer = speedometer
        self.flops_per_token, self.nan_filter, self.tokens_seen = flops_per_token, nan_filter, tokens_seen
        self.started = time.monotonic()
        self._first_done: float | None = None
        self._said = -math.inf  # when the last line of progress was printed
        self._grad_norm = math.nan
        self.first_step = state.values["global_step"]
        self._first_tokens = self._tokens = int(state.values["num_input_tokens_seen"])
        self._flos = float(state.values["total_flos"])
        window = window or {"loss": 0.0, "updates": 0, "now": {}, "logged_ahead": 0, "tokens_ahead": 0}
        self._window_loss, self._window = window["loss"], window["updates"]
        self.skipped, self._window_skipped = window.get("skipped", 0), window.get("window_skipped", 0)
        self._skipped_before = self.skipped
        self._total_loss = -self._window_loss  # the summary covers the updates of this process alone
        self._now: dict[str, float] = window["now"]  # the last update's entries of a line beside the loss
        # Micro-batches and tokens of the next update that an epoch's end has counted already.
        self._logged_ahead, self._tokens_ahead = window["logged_ahead"], window["tokens_ahead"]

    @property
    def window(self) -> dict[str, Any]:
        """Return the sums since the last line as JSON values: resumed with them, a run writes the same next line."""
        ahead = {"logged_ahead": self._logged_ahead, "tokens_ahead": self._tokens_ahead}
        skipped = {"skipped": self.skipped, "window_skipped": self._window_skipped}
        return {"loss": self._window_loss, "updates": self._window, "now": dict(self._now), **ahead, **skipped}

    def on_update(self, metrics: UpdateMetrics) -> None:
        """Count an update that is done, show it on the bar, and write a line if due."""
        step, order = metrics.step, self.batches.order
        padded = self.batches.padded_tokens(step - 1)
        self._flos += self.flops_per_token * padded
        if self.tokens_seen != "no":
            self._tokens += padded if self.tokens_seen == "all" else metrics.tokens
        if metrics.skipped:  # a loss of no update: the Trainer's filter would count 0
            self._logged_ahead = self._tokens_ahead = 0
            self.skipped += 1
            self._window_skipped += 1
        else:
            self._window_loss = self._filtered(metrics)
            self._window += 1
        self.state.at(step, order.epoch_at(step), flos=self._flos, tokens_seen=self._tokens)
        self.speedometer.count(metrics.tokens, metrics.made_in)
        self._first_done = self._first_done or time.monotonic()
        modern = order.compat == "5"
        lr = float(self.rate(step - 1 if modern else step))
        self.bar.set_postfix_str(self._postfix(metrics, lr), refresh=False)
        self.bar.update(1)
        self._grad_norm = metrics.grad_norm
        self._now = {"grad_norm": metrics.grad_norm} if modern else {}
        self._now["learning_rate"] = lr
        if self.due(step):
            self._write()

    def _postfix(self, metrics: UpdateMetrics, lr: float) -> str:
        """Return the bar's figures after an update."""
        figures = [f"loss {metrics.loss:.4f}", f"lr {lr:.2e}", f"grad norm {metrics.grad_norm:.3g}"]
        return ", ".join(figures + self._figures())

    def _figures(self) -> list[str]:
        """Return the speed of the latest updates and the memory of a device, where known."""
        figures = []
        if speed := self.speedometer.recent():
            figures.append(f"{speed:,.0f} tok/s")
        if mfu := self.speedometer.mfu(speed):
            figures.append(f"MFU {mfu:.1%}")
        used, has = memory_use()
        return [*figures, f"{used / 2**30:.1f}/{has / 2**30:.0f} GiB"]

    def _progress(self) -> str:
        """Return the line that stands for the bar where there is none."""
        step, total = self.state.values["global_step"], self.batches.order.updates
        made, passed = step - self.first_step, time.monotonic() - (self._first_done or 0.0)
        left = [passed / (made - 1) * (total - step)] if made > 1 else []
        times = [f"{tqdm.format_interval(seconds)} left" for seconds in left]
        return ", ".join(
            [f"update {step:,} of {total:,}", f"grad norm {self._grad_norm:.3g}", *self._figures(), *times]
        )

    def on_epoch_end(self, tail: int, micro_losses: np.ndarray | None) -> None:
        """Count the end of an epoch; `tail` is the number of its micro-batches that belong to the next update.

        4.37 has computed the tail by then, so tokens seen include it. A line is due where `micro_losses`, the tail's
        as in `UpdateMetrics.micro_losses`, is given.
        """
        step = self.state.values["global_step"]
        if tail and self.tokens_seen == "all":
            self._tokens_ahead = self.batches.padded_tokens(step, tail)
        elif tail:
            self._tokens_ahead = self.batches.tokens(step, tail)
        if micro_losses is not None and self._window + self._window_skipped:
            nan = self.batches.is_nan(step)[:tail] if tail else np.zeros_like(micro_losses, bool)
            self._window_loss = self._running(np.where(nan, np.nan, micro_losses))
            self._write()
            self._logged_ahead = tail

    def _write(self) -> None:
        """Write a line with the mean loss of the window's updates, skipped ones left out; start a new window."""
        more = self._seen()
        if more and self.state.compat == "5":
            seconds = time.monotonic() - self.started
            speed = (self._tokens - self._first_tokens) / seconds
            more |= {"train_runtime": round(seconds, 4), "train_tokens_per_second": round(speed, 3)}
        mean = self._window_loss / self._window if self._window else math.nan  # all updates were skipped
        show(str(self.state.log({"loss": mean, **self._now}, more)))
        if self.bar.disable and time.monotonic() - self._said > SAID_EVERY:
            self._said = time.monotonic()
            say(self._progress())
        self._total_loss += self._window_loss
        self._window_loss -= self._window_loss  # as the Trainer resets it: NaN stays NaN
        self._window = self._window_skipped = 0

    def _filtered(self, metrics: UpdateMetrics) -> float:
        """Return the window's loss plus this update's, without micro-batches that an earlier line counted."""
        nan, ahead = self.batches.is_nan(metrics.step - 1), self._logged_ahead
        self._logged_ahead = self._tokens_ahead = 0
        if math.isfinite(metrics.loss) and not nan.any() and not ahead:
            return self._window_loss + metrics.loss
        return self._running(np.where(nan, np.nan, metrics.micro_losses())[ahead:])

    def _running(self, parts: np.ndarray) -> float:
        """Return the window's loss plus `parts`, [micro-batches, ranks], under the HF Trainer's filter.

        The Trainer replaces a NaN (a mean over no tokens) or infinity by running sum / (1 + updates since the last
        line). With several ranks, each starts from the mean over ranks instead of its own sum.
        """
        running = np.full(parts.shape[1], self._window_loss / parts.shape[1])
        for part in parts:
            replaced = running / (1 + self._window) if self.nan_filter else np.nan
            running = running + np.where(np.isfinite(part), part, replaced)
        return float(running.sum())

    def on_skipped(self, records: list[int]) -> None:
        """Log that the last update was skipped: the count so far, and the numbers of its examples' records."""
        self.state.log({"skipped_updates": self.skipped}, {"skipped_records": records})

    def on_evaluation(self, metrics: dict[str, float]) -> None:
        """Log and print the metrics of an evaluation after the last update."""
        show(str(self.state.log(metrics, self._seen())))

    def _seen(self) -> dict[str, float]:
        return {} if self.tokens_seen == "no" else {"num_input_tokens_seen": self._tokens + self._tokens_ahead}

    def finish(self) -> None:
        """Log and print the final entry as the HF Trainer computes it.

        Examples and updates are those of the whole run in 4.37, of this process in 5. The loss sums this process'
        updates, divided by all updates in 4.37 and by this process' in 5, skipped ones left out.
        """
        order, seconds = self.batches.order, time.monotonic() - self.started
        if order.max_steps > 0:
            samples = float(order.updates * order.per_device_batch * order.accumulation * order.ranks)
        else:
            samples = order.examples * order.epochs
        step = self.state.values["global_step"]
        updates = step - self.first_step if order.compat == "5" else order.updates
        made = updates - self.skipped + self._skipped_before if order.compat == "5" else step - self.skipped
        values = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(samples * updates / order.updates / seconds, 3),
            "train_steps_per_second": round(updates / seconds, 3),
            "total_flos": self._flos,
            "train_loss": (self._total_loss + self._window_loss) / max(made, 1),
        }
        entry = self.state.log(values, self._seen())
        show(str({k: v for k, v in entry.items() if k != "total_flos"}))
