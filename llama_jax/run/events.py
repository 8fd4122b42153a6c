"""Perform the actions due after an update, in the HF Trainer's order: epoch line, evaluation, checkpoint."""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from llama_jax.base.errors import RunError
from llama_jax.distributed import processes, sharding
from llama_jax.hf.finite import all_finite
from llama_jax.reporting.run_log import RunLog
from llama_jax.reporting.stopwatch import Stopwatch
from llama_jax.run.bad_updates import BadUpdates
from llama_jax.run.checkpoint import Checkpoints
from llama_jax.run.reports import Reports
from llama_jax.run.resume import ACTIONS, Facts, SavedRun
from llama_jax.run.samples import Samples
from llama_jax.run.tasks import Evaluate
from llama_jax.setup.job import Job
from llama_jax.training.fit import token_losses
from llama_jax.training.state import TrainState
from llama_jax.training.step import LossStep


class Evaluated(NamedTuple):
    """Hold the metric that decides the best model, and whether it is the best so far."""

    metric: float | None
    best: bool


@dataclass
class Milestones:
    """Provide `due` and `reach` to `fit`, and `begin` for the actions before the first update.

    `first` is the step of the checkpoint that the run resumes, 0 for none; `left` names the actions still due there.
    `goes_on` is whether that checkpoint lies in `output_dir`. A stop does not wait for an evaluation: the state is
    saved, the resumed run makes the evaluation, and `unfinished` is true. `bad` watches the updates; `finite` is the
    step of the last checkpoint without NaN and Inf, None for none. `handover` is that of `SavedRun`.
    """

    _: KW_ONLY
    job: Job
    loss_step: LossStep
    evaluation: Evaluate | None
    mesh: Mesh
    run_log: RunLog
    checkpoints: Checkpoints
    facts: Facts
    output_dir: Path
    stop: Callable[[], bool]
    first: int
    left: Sequence[str]
    goes_on: bool
    bad: BadUpdates
    finite: int | None
    reports: Reports
    samples: Samples | None
    watch: Stopwatch
    handover: dict[str, Any] | None = None
    unfinished: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._log, self._saved_steps = self.run_log.state, {self.first} if self.goes_on else set()
        self._epoch_ends = self.job.order.epoch_ends()

    def due(self, step: int) -> bool:
        """Return whether an action may be due after an update, by its number from 1."""
        answers = self.samples is not None and step == self.job.order.updates  # which may have no checkpoint
        return self.job.eval_at(step) or self.job.save_at(step) or step in self._epoch_ends or answers

    def begin(self, state: TrainState) -> bool:
        """Perform the actions due before the first update; return whether to stop."""
        if self.first:
            return self.reach(self.first, state, False, self.left)
        self._answer(0, state)
        if self.evaluation is not None and self.job.args.eval_on_start:
            with self.watch.phase("evaluation"):
                metrics = self.evaluation(state.params, self.stop)
            if metrics is None:
                return True
            self.run_log.on_evaluation(metrics)
        return False

    def reach(self, step: int, state: TrainState, stopping: bool, actions: Sequence[str] = ACTIONS) -> bool:
        """Perform those of the actions that are due after an update; return whether to stop."""
        args, job, found = self.job.args, self.job, None
        for place, name in enumerate(actions):
            phase, action = name.split("/")
            if action == "log" and phase == "epoch" and step in self._epoch_ends:
                logged = args.logging_strategy == "epoch"
                self.run_log.on_epoch_end(job.order.tail(step), self._tail_losses(step, state) if logged else None)
            elif action == "evaluate" and self._evaluates(phase, step):
                found = None if stopping else self._evaluate(state)
                if found is None:
                    self.unfinished = True
                    self._save(step, state, metric=None, left=actions[place:])
                    return True
            elif action == "save":
                best = args.save_strategy == "best" and found is not None and found.best
                if best or (args.save_strategy == phase and job.save_at(step)):
                    left = [
                        name
                        for name in actions[place + 1 :]
                        if name != "epoch/evaluate" or self._evaluates("epoch", step)
                    ]
                    self._save(step, state, metric=found and found.metric, left=left)
                found = None
        if stopping:
            self._save(step, state, metric=None, left=())
        elif step in self._saved_steps or step == self.job.order.updates:
            self._answer(step, state)
        return stopping

    def _evaluates(self, phase: str, step: int) -> bool:
        """Return whether an evaluation is due after an update, by `steps` or at the end of an `epoch`."""
        return self.job.args.eval_strategy == phase and self.job.eval_at(step)

    def _answer(self, step: int, state: TrainState) -> None:
        """Report the answers to the questions of `--sample_prompts`."""
        if self.samples is not None:
            with self.watch.phase("answers"):
                texts = self.samples(state.params)
            if texts is not None:
                self.reports.answered(step, texts)

    def _evaluate(self, state: TrainState) -> Evaluated | None:
        """Evaluate the state; return None where a stop came first."""
        assert self.evaluation is not None
        args = self.job.args
        with self.watch.phase("evaluation"):
            metrics = self.evaluation(state.params, self.stop)
        if metrics is None:
            return None
        self.run_log.on_evaluation(metrics)
        if not args.metric_for_best_model:
            return Evaluated(None, False)
        # Times differ from process to process; the first process' metric decides for all.
        metric = float(processes.exchange(repr(metrics[args.best_metric_key]))[0])
        self.job.schedule.observe(metric)
        if not math.isfinite(metric) and args.on_nonfinite == "skip":  # 4.37 would take a first NaN for the best
            return Evaluated(None, False)
        return Evaluated(metric, self._log.evaluated(metric, args.save_strategy != "no"))

    def save_last(self, state: TrainState | None) -> None:
        """Write a checkpoint of the last state, None where the run has given it up. Raises RunError."""
        if state is not None:
            self._save(self._log.values["global_step"], state, metric=None, left=())
            self.checkpoints.wait()

    def _save(self, step: int, state: TrainState, *, metric: float | None, left: Sequence[str]) -> None:
        """Write a checkpoint with the names of the actions still due, unless the step has one."""
        self._log.saved(self.output_dir, metric)
        if step in self._saved_steps:
            return
        before = self.watch.seconds("saving")
        with self.watch.phase("saving"):
            self._saved_steps.add(step)
            finite = self._is_finite(step, state)
            saved = SavedRun(
                facts=self.facts,
                trainer_state=self._log.values,
                left=tuple(left),
                schedule=self.job.schedule.state(),
                log_window=self.run_log.window,
                guard=self.guard_values(state),
                handover=self.handover,
            )
            best, kept = self._log.best_step, None if finite else self.finite
            self.checkpoints.save(step, state.saved, saved.to_json(), best=best, finite=kept)
        self.reports.saved(step, self.watch.seconds("saving") - before, self.checkpoints.wait)

    def guard_values(self, state: TrainState) -> dict[str, Any]:
        """Return what a resumed run needs of bad updates beside the log, as JSON values."""
        losses = state.losses and [float(x) for x in sharding.read(state.losses)]
        return {"in_a_row": self.bad.in_a_row, "finite": self.finite, "losses": losses}

    def _is_finite(self, step: int, state: TrainState) -> bool:
        """Return whether the trained parameters are finite or need not be, and note the step. Raises RunError where an
        update of finite loss and gradient made NaN or Inf, which `training.guard` does not see."""
        if self.job.args.allow_nonfinite or all_finite(state.trainable):
            self.finite = step
            return True
        if self.job.args.on_nonfinite == "skip":
            last = self.bad.last_checkpoint()
            raise RunError(
                f"after update {step} the parameters hold NaN or Inf, though every loss and gradient norm was finite; "
                "not saved. Lower --learning_rate, and "
                + (f"go on from {last} with --resume_from_checkpoint True" if last else "start anew")
            )
        return False

    def _tail_losses(self, step: int, state: TrainState) -> np.ndarray:
        """Return the next update's losses by micro-batch, [micro-batches, ranks], up to the epoch's end."""
        order, batches = self.job.order, self.run_log.batches
        if not (tail := order.tail(step)):
            return np.zeros((0, order.ranks))
        losses = token_losses(state.params, self.loss_step, batches, self.mesh, step)
        return batches.micro_losses(step, sharding.read(losses))[:tail]
