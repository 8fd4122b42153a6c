"""Report a run: to the trackers of `--report_to`, on its page, and beside the log of `--compare_with`."""

from collections.abc import Callable
from typing import Any

from llama_jax.distributed import processes
from llama_jax.distributed.platform import memory_use
from llama_jax.distributed.storage import tree_bytes
from llama_jax.reporting.comparison import as_lines, differences, read_other
from llama_jax.reporting.progress import say
from llama_jax.reporting.run_log import UpdateMetrics
from llama_jax.reporting.run_report import RunReport
from llama_jax.reporting.trackers import AT_A_STOP, PATIENCE, Model, Trackers, open_trackers
from llama_jax.run.facts import found_facts, known_facts
from llama_jax.run.prepare import Prepared
from llama_jax.run.start import Run
from llama_jax.setup.arguments import Arguments

# How a run ends, beside an error.
FINISHED, STOPPED_EARLY = "finished", "stopped"


class Reports:
    """Pass the events of a run on to its trackers and its page. `compared` is the log of `--compare_with`, if any.

    The page is the first process' alone.
    """

    def __init__(self, trackers: Trackers, compared: dict[str, Any] | None = None):
        self.trackers, self._compared = trackers, compared
        self._page: RunReport | None = None
        self._grad_norm: float | None = None

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, kind: Any, problem: BaseException | None, trace: Any) -> None:
        """End the reports where a run fails before `end`."""
        if self._page is not None and problem is not None:
            said = f"failed: {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
            self._page.end(said, AT_A_STOP)
        self.trackers.__exit__(kind, problem, trace)

    def begin(self, run: Run) -> None:
        """Begin the reports of a run, and pass on the entries of its log."""
        self._run, prepared = run, run.prepared
        run.log.on_log = self._log
        self.trackers.begin(run.log.values, lambda: _model(prepared))
        if processes.is_first():
            compared = {"compare": self._compared} if self._compared else {}
            job, samples = prepared.job, prepared.samples
            asked = {"prompts": samples.shown} if samples else {}
            self._page = RunReport(prepared.output_dir, known_facts(run) | compared | asked, lambda: found_facts(job))
            if prepared.goes_on:
                self._page.resume(prepared.resume_step)
            self._page.begin()

    def update(self, metrics: UpdateMetrics, epoch: float) -> None:
        """Report that an update is made, before its line."""
        self._grad_norm = metrics.grad_norm
        self.trackers.update(metrics.step, epoch)

    def saved(self, step: int, seconds: float, wait: Callable[[], None]) -> None:
        """Report a checkpoint that took the run so long; `wait` returns when it is written."""
        if self._page is not None:
            size = tree_bytes(self._run.prepared.planner.saved)
            self._page.add("checkpoints", step, bytes=size, seconds=seconds)
        self.trackers.save(wait)

    def answered(self, step: int, texts: list[str]) -> None:
        """Report the answers to `--sample_prompts` after an update."""
        if self._page is not None:
            self._page.add("answers", step, texts=texts)

    def profiled(self, updates: str, rows: list[tuple[str, float, float]]) -> None:
        """Report the ms an update, and the share, of each kind of work in the profiled updates."""
        if self._page is not None:
            self._page.add_facts(profile={"updates": updates, "rows": rows})

    def end(self, status: str) -> None:
        """End the reports of a run, and wait for them."""
        if self._page is not None:
            meter, plan = self._run.speedometer, self._run.plan
            speed = meter.whole()
            summary = {
                "seconds": self._run.prepared.watch.all(),
                "compiled_in": plan.compiled_in,
                "tokens_per_second": speed and speed.tokens_per_second,
                "mfu": meter.mfu(speed and speed.tokens_per_second),
            }
            self._page.end(status, PATIENCE if status == FINISHED else AT_A_STOP, summary=summary)
            if self._compared:
                log = self._run.log.values["log_history"]
                for line in as_lines(differences(log, self._compared["log_history"]), self._compared["name"]):
                    say(line)
        self.trackers.end(finished=status == FINISHED)

    def _log(self, entry: dict[str, Any]) -> None:
        """Report an entry of the log, with the speed since the last one that has a loss."""
        self.trackers.log(entry)
        if self._page is not None and "loss" in entry:
            rate = self._run.speedometer.line()
            self._page.line(
                step=self._run.log.values["global_step"],
                grad_norm=self._grad_norm,
                tokens_per_second=rate,
                mfu=self._run.speedometer.mfu(rate),
                memory=memory_use()[0],
            )


def open_reports(args: Arguments) -> Reports:
    """Make the reports of the first process, with the log to compare with; other processes report nothing. All raise
    the same InputError."""
    with processes.agreed():
        if not processes.is_first():
            return Reports(Trackers({}, {}))
        compared = read_other(args.compare_with) if args.compare_with else None
        return Reports(open_trackers(args.report_to, args.hf_compat, args.of_trainer), compared)


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
