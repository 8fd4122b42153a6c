"""Report a run to the trackers of `--report_to`."""

from collections.abc import Callable
from typing import Any

from llama_jax.distributed import processes
from llama_jax.reporting.trackers import Model, Trackers, open_trackers
from llama_jax.run.prepare import Prepared
from llama_jax.run.start import Run
from llama_jax.setup.arguments import Arguments

# How a run ends, beside an error.
FINISHED, STOPPED_EARLY = "finished", "stopped"


class Reports:
    """Pass the events of a run on to its trackers."""

    def __init__(self, trackers: Trackers):
        self.trackers = trackers

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *problem: Any) -> None:
        """End the reports where a run fails before `end`."""
        self.trackers.__exit__(*problem)

    def begin(self, run: Run) -> None:
        """Begin the reports of a run, and pass on the entries of its log."""
        run.log.on_log = self.trackers.log
        self.trackers.begin(run.log.values, lambda: _model(run.prepared))

    def update(self, step: int, epoch: float) -> None:
        """Report that an update is made, before its line."""
        self.trackers.update(step, epoch)

    def saved(self, step: int, wait: Callable[[], None]) -> None:
        """Report a checkpoint; `wait` returns when it is written."""
        self.trackers.save(wait)

    def end(self, status: str) -> None:
        """End the reports of a run, and wait for them."""
        self.trackers.end(finished=status == FINISHED)


def open_reports(args: Arguments) -> Reports:
    """Make the trackers of the first process; those of the others report nothing. All raise the same InputError."""
    with processes.agreed():
        if not processes.is_first():
            return Reports(Trackers({}, {}))
        return Reports(open_trackers(args.report_to, args.hf_compat, args.of_trainer))


def _model(prepared: Prepared) -> Model:
    """Return the model as the Trainer would hold it."""
    job, args = prepared.job, prepared.args
    adapter = job.adapter.size(job.config) if job.adapter else 0
    raw: dict[str, Any] = {
        **prepared.source.raw,
        "vocab_size": job.config.vocab_size,
        "_name_or_path": args.model_name_or_path,
        "dtype": prepared.facts.dtype,
    }
    if args.hf_compat == "5":  # whose Trainer sets it by its flag
        raw["use_cache"] = args.without_meaning.get("use_cache", False)
    parameters = job.config.num_parameters + adapter
    return Model(raw, parameters, adapter or parameters, job.adapter.values if job.adapter else None)
