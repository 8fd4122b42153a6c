"""Report updates that are skipped or not finite, with the records of their examples, and stop after too many."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np

from llama_jax.base.errors import RunError
from llama_jax.reporting.progress import say
from llama_jax.reporting.run_log import RunLog, UpdateMetrics
from llama_jax.setup.job import Job

SHOWN = 64  # records in a line; trainer_state.json names all


@dataclass
class BadUpdates:
    """Watch the metrics of each update, after the run's log. `in_a_row` is the last bad updates' number.

    `last_checkpoint` returns the newest checkpoint as a path, None for none, once all are written.
    """

    _: KW_ONLY
    job: Job
    run_log: RunLog
    last_checkpoint: Callable[[], str | None]
    in_a_row: int = 0

    def on_update(self, metrics: UpdateMetrics) -> None:
        """Report a bad update. Raises RunError after `--max_bad_updates` skipped ones in a row."""
        if metrics.finite and not metrics.skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if not metrics.skipped:
            if self.in_a_row == 1:  # of all that follow, as every later update may be
                say(f"warning: {self._describe(metrics)}; trained on, as --on_nonfinite continue asks")
            return
        records = self._records(metrics.step)
        self.run_log.on_skipped(records)
        shown = ", ".join(map(str, records[:SHOWN]))
        more = f" and {len(records) - SHOWN} more" if len(records) > SHOWN else ""
        say(
            f"warning: {self._describe(metrics)}; skipped, as {self.run_log.skipped} so far: nothing is changed by its "
            f"examples, records {shown}{more} of the data"
        )
        if self.in_a_row == self.job.args.max_bad_updates:
            raise RunError(self._why_stopped(metrics.step))

    def _records(self, step: int) -> list[int]:
        """Return the numbers, from 1, of the records of an update; records that were left out are not counted."""
        examples = np.unique(self.job.order.examples_of(step - 1))
        return (examples + self.job.held_out + 1).tolist()

    def _describe(self, metrics: UpdateMetrics) -> str:
        both = f"loss {metrics.loss:.6g} and gradient norm {metrics.grad_norm:.6g}"
        if not metrics.finite:
            return f"update {metrics.step} is not finite, with {both}"
        return f"update {metrics.step} has {both}, a spike by --skip_loss_spikes {self.job.args.skip_loss_spikes:g}"

    def _why_stopped(self, step: int) -> str:
        """Return the line that ends the run, with the way to go on."""
        last = self.last_checkpoint()
        on = f"go on from {last}, the last good checkpoint, with --resume_from_checkpoint True"
        return (
            f"{self.in_a_row} updates in a row, up to update {step}, were skipped (--max_bad_updates "
            f"{self.job.args.max_bad_updates}): repair the records named above, or lower --learning_rate, and "
            + (on if last else "start anew: no checkpoint was saved")
        )
