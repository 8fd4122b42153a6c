"""What is due after an update, in the HF Trainer's order: the line of an epoch, evaluations, checkpoints."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from llama_jax.distributed import processes, sharding
from llama_jax.reporting.run_log import RunLog
from llama_jax.run.checkpoint import Checkpoints
from llama_jax.run.evaluation import Evaluation
from llama_jax.setup.job import Job
from llama_jax.training.fit import token_losses
from llama_jax.training.state import TrainState
from llama_jax.training.step import LossStep

# First what is due by steps, then what is due at an epoch's end.
ORDER = [(phase, action) for phase in ("steps", "epoch") for action in ("log", "evaluate", "save")]


class Evaluated(NamedTuple):
    """The metric that decides what is best, and whether it is the best so far."""

    metric: float | None
    best: bool


class Milestones:
    """`due` and `reach` are what `fit` asks for. `begin` goes before it, and does what the checkpoint of `first`, that
    the run goes on from, tells in `saved` to be left of what was due there.

    A stop does not wait for an evaluation: the state is saved, and the resumed run makes it. `unfinished` tells whether
    one was left so.
    """

    def __init__(
        self,
        job: Job,
        loss_step: LossStep,
        evaluation: Evaluation | None,
        mesh: Mesh,
        run_log: RunLog,
        checkpoints: Checkpoints,
        facts: dict[str, Any],
        output_dir: Path,
        stop: Callable[[], bool],
        first: int,
        saved: dict[str, Any],
    ):
        self._job, self._loss_step, self._evaluation, self._mesh = job, loss_step, evaluation, mesh
        self._run_log, self._log, self._checkpoints, self._facts = run_log, run_log.state, checkpoints, facts
        self._output_dir, self._stop, self._first = output_dir, stop, first
        self._left_from = saved.get("done", len(ORDER))
        self._saved_steps = {first}
        self._epoch_ends = job.order.epoch_ends()
        self.unfinished = False

    def due(self, step: int) -> bool:
        return self._job.eval_at(step) or self._job.save_at(step) or step in self._epoch_ends

    def begin(self, state: TrainState) -> bool:
        """Returns whether to stop before any update."""
        if self._first:
            return self.reach(self._first, state, False, self._left_from)
        if self._evaluation is not None and self._job.args.eval_on_start:
            metrics = self._evaluation(state.params, self._stop)
            if metrics is None:
                return True
            self._run_log.on_evaluation(metrics)
        return False

    def reach(self, step: int, state: TrainState, stopping: bool, done: int = 0) -> bool:
        """Do what is due after an update, but for the first `done` things. Returns whether to stop."""
        args, job, order, found = self._job.args, self._job, self._job.order, None
        for place in range(done, len(ORDER)):
            phase, action = ORDER[place]
            if action == "log" and phase == "epoch" and step in self._epoch_ends:
                logged = args.logging_strategy == "epoch"
                self._run_log.on_epoch_end(order.tail(step), self._tail_losses(step, state) if logged else None)
            elif action == "evaluate" and args.eval_strategy == phase and job.eval_at(step):
                found = None if stopping else self._evaluate(state)
                if found is None:
                    self.unfinished = True
                    self._save(step, state, None, place)
                    return True
            elif action == "save":
                best = args.save_strategy == "best" and found is not None and found.best
                if best or (args.save_strategy == phase and job.save_at(step)):
                    self._save(step, state, found and found.metric, place + 1)
                found = None
        if stopping:
            self._save(step, state, None, len(ORDER))
        return stopping

    def _evaluate(self, state: TrainState) -> Evaluated | None:
        """None where it was stopped."""
        assert self._evaluation is not None
        args, metrics = self._job.args, self._evaluation(state.params, self._stop)
        if metrics is None:
            return None
        self._run_log.on_evaluation(metrics)
        if not args.metric_for_best_model:
            return Evaluated(None, False)
        # Times differ from process to process; that of the first decides for all.
        metric = float(processes.exchange(repr(metrics[args.best_metric_key]))[0])
        self._job.schedule.observe(metric)
        return Evaluated(metric, self._log.evaluated(metric, args.save_strategy != "no"))

    def _save(self, step: int, state: TrainState, metric: float | None, done: int) -> None:
        """A checkpoint that tells how many of the things due are done, unless this step has one."""
        self._log.saved(self._output_dir, metric)
        if step not in self._saved_steps:
            self._saved_steps.add(step)
            kept = {**self._facts, "trainer_state": copy.deepcopy(self._log.values), "done": done}
            kept |= {"schedule": self._job.schedule.state(), "log_window": self._run_log.window}
            self._checkpoints.save(step, state.saved, kept, self._log.best_step)

    def _tail_losses(self, step: int, state: TrainState) -> np.ndarray:
        """The parts in the loss of the next update's micro-batches that lie before the epoch's end."""
        order, batches = self._job.order, self._run_log.batches
        if not (tail := order.tail(step)):
            return np.zeros((0, order.ranks))
        losses = token_losses(state.params, self._loss_step, batches, self._mesh, step)
        return batches.micro_losses(step, sharding.read(losses))[:tail]
