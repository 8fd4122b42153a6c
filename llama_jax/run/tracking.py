"""Give the trackers of `--report_to` the flags and the model of a run."""

from typing import Any

from llama_jax.distributed import processes
from llama_jax.reporting.trackers import Model, Trackers, open_trackers
from llama_jax.reporting.trainer_state import TrainerState
from llama_jax.run.prepare import Prepared
from llama_jax.setup.arguments import Arguments


def open_reports(args: Arguments) -> Trackers:
    """Make the trackers of the first process; those of the others report nothing. All raise the same InputError."""
    with processes.agreed():
        if not processes.is_first():
            return Trackers({}, {})
        return open_trackers(args.report_to, args.hf_compat, args.of_trainer)


def begin_reports(trackers: Trackers, prepared: Prepared, log: TrainerState) -> None:
    """Begin the reports of a run with its model, and pass on the entries of its log."""
    log.on_log = trackers.log
    trackers.begin(log.values, lambda: _model(prepared))


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
