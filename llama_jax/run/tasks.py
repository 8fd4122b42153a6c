"""Load lm-eval's tasks and judge a model by them: for a command, and at each evaluation of a training run.

lm-eval is imported in functions alone: it is an extra.
"""

import contextlib
import difflib
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from llama_jax.base.errors import InputError
from llama_jax.data.tokenizer import open_tokenizer
from llama_jax.hf.source import Source
from llama_jax.model.roles import Params
from llama_jax.plan.planner import Planner
from llama_jax.reporting.metrics import EVALUATION_METRICS
from llama_jax.reporting.progress import say, waiting
from llama_jax.run.scoring import Scorer, Stopped
from llama_jax.setup.arguments import Arguments

if TYPE_CHECKING:
    from llama_jax.run.judging import Judge

PACKAGE = "'lm-eval>=0.4.13,<0.5'"
SEED = 1234  # of few-shot examples: lm-eval's own default
Evaluate = Callable[[Params, Callable[[], bool]], dict[str, float] | None]


def check_installed(flag: str) -> None:
    """Raise InputError where lm-eval is not installed; make it log errors alone, unless LMEVAL_LOG_LEVEL is set."""
    if find_spec("lm_eval") is None:
        raise InputError(f"{flag}: lm-eval is not installed; pip install {PACKAGE}")
    if "LMEVAL_LOG_LEVEL" in os.environ:
        from lm_eval.utils import setup_logging

        setup_logging()
    else:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)


def split_names(words: Sequence[str]) -> list[str]:
    """Return the names in the words of a flag; commas and spaces separate names."""
    return [name for word in words for name in word.replace(",", " ").split()]


def load_tasks(names: Sequence[str], flag: str, include_path: str | None = None) -> tuple[Any, list[Any]]:
    """Return lm-eval's manager, and its tasks and groups of these names, patterns (mmlu_*) and YAML files, data read.

    Raises InputError for an unknown task, and for data that cannot be read.
    """
    if include_path and not os.path.isdir(include_path):
        raise InputError(f"--include_path {include_path}: is no folder; give one with YAML files of tasks")
    if not names:
        raise InputError(f"{flag}: name a task, as arc_easy")
    if include_path or all(map(os.path.isfile, names)):
        with contextlib.suppress(InputError):  # then names of lm-eval's own tasks are among them
            manager = _manager(include_path, False)
            return manager, _load(manager, names, flag)
    manager = _manager(include_path, True)
    return manager, _load(manager, names, flag)


@cache
def _manager(include_path: str | None, own: bool) -> Any:
    """Return lm-eval's index of tasks; its `own` are some ten thousand files, which take seconds."""
    from lm_eval.tasks import TaskManager

    with waiting("looking for tasks"):
        return TaskManager(include_path=include_path, include_defaults=own)


def _load(manager: Any, names: Sequence[str], flag: str) -> list[Any]:
    """Return the tasks and groups of the names, with their data read. Raises InputError."""
    found: dict[str, None] = {}
    for name in names:
        matching = [name] if os.path.isfile(name) else manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            advice = f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists them; a file is given by its path"
            raise InputError(f"{flag} {name}: lm-eval has no task of this name; {advice}")
        found |= dict.fromkeys(matching)
    items: list[Any] = []
    for name in found:
        try:
            loaded = manager.load([name])
            for task in loaded["tasks"].values():
                _check(task, f"{flag} {name}")
        except InputError:
            raise
        except Exception as e:  # of datasets, of the hub's client, of a task's own code
            raise InputError(f"{flag} {name}: {_problem(e)}") from None
        inner = {child for children in loaded.get("group_map", {}).values() for child in children}
        groups = [group for key, group in loaded.get("groups", {}).items() if key not in inner]
        held = {task.task_name for group in groups for task in group.get_all_tasks()}
        items += [*groups, *(task for key, task in loaded["tasks"].items() if key not in held)]
    try:
        manager.load(items)
    except ValueError as e:
        raise InputError(f"{flag}: {e}; name it once") from None
    return items


def _check(task: Any, where: str) -> None:
    """Read the data of a task. Raises InputError for a task that is not judged here."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"{where}: runs code that the model writes; use lm-eval's own command in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"{where}: shows pictures; a text model is judged here")
    if not len(task.eval_docs):
        raise InputError(f"{where}: has no questions")


def _problem(e: Exception) -> str:
    """Return the line for an exception of a task that is loaded."""
    text = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    while (cause := e.__cause__ or e.__context__) and isinstance(cause, Exception):
        e = cause
    away = any(word in f"{text} {type(e).__name__} {e}".lower() for word in ("hub", "offline", "connect", "resolve"))
    fix = "its data is on the hub, which is not reached from here, nor is it in the cache of datasets" if away else ""
    return f"cannot be loaded: {fix or text}" + (f" ({text})" if away else "")


def run_tasks(
    judge: "Judge", manager: Any, items: list[Any], *, model: str, output_path: str | None, **options: Any
) -> dict[str, Any]:
    """Judge a model and return lm-eval's results; they are written to `output_path` as lm-eval writes them.

    `options` are `simple_evaluate`'s. Raises InputError.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tracker, started = EvaluationTracker(output_path=output_path), time.time()
    results = simple_evaluate(
        model=judge,
        model_args={"pretrained": model},
        tasks=items,
        task_manager=manager,
        evaluation_tracker=tracker,
        log_samples=False,
        **options,
    )
    tracker.save_results_aggregated(results=results)
    if output_path is not None:  # lm-eval logs an error and goes on
        folder = Path(output_path).parent if output_path.endswith(".json") else Path(output_path)
        if not any(path.stat().st_mtime >= started - 2 for path in folder.rglob("*.json")):
            say(f"warning: --output_path {output_path}: lm-eval could not write its results there")
    return results


class TrainingTasks:
    """Judge parameters by tasks: a call returns their metrics, as `eval_arc_easy_acc`.

    Requests are built once, so that each evaluation has the same ones, few-shot examples included. They are answered
    by zeros before the run, which finds problems before anything compiles, and the `names` of the metrics.
    """

    def __init__(self, judge: "Judge", words: Sequence[str], limit: float | None = None):
        from lm_eval.evaluator_utils import get_sample_size

        self._judge, self._limit = judge, limit
        manager, items = load_tasks(split_names(words), "--eval_tasks")
        self._loaded = manager.load(items)
        for name, task in self._loaded["tasks"].items():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
            try:
                task.build_all_requests(limit=get_sample_size(task, limit))
            except Exception as e:  # of a task's own code
                raise InputError(f"--eval_tasks {name}: {_problem(e)}") from None
            task.build_all_requests = _Again(task)
        self.names = [*self._metrics()]

    def __call__(self, params: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return the metrics, or None where `stop`, called before each block, returned true."""
        started = time.monotonic()
        self._judge.params, self._judge.stop = lambda: params, stop
        try:
            metrics = self._metrics()
        except Stopped:
            return None
        finally:
            self._judge.params = None
        return {**metrics, "eval_tasks_runtime": round(time.monotonic() - started, 4)}

    def _metrics(self) -> dict[str, float]:
        from lm_eval.evaluator import evaluate

        results = evaluate(
            lm=self._judge, task_dict=self._loaded, limit=self._limit, bootstrap_iters=0, log_samples=False
        )
        return {
            f"eval_{task}_{metric}" + (f"_{filtered}" if filtered != "none" else ""): float(value)
            for task, values in results["results"].items()
            for key, value in values.items()
            for metric, comma, filtered in [key.partition(",")]
            if comma and isinstance(value, int | float)  # a standard error is "N/A" without bootstrapping
        }


class _Again:
    """Stand in the place of a task's `build_all_requests`: remove the answers of the last evaluation instead."""

    def __init__(self, task: Any):
        self._task = task

    def __call__(self, **_: Any) -> None:
        for request in self._task.instances:
            request.resps, request.filtered_resps = [], {}


def open_tasks(args: Arguments, source: Source, planner: Planner) -> TrainingTasks:
    """Load the tasks of `--eval_tasks`, and check their requests and the metric of the best model. Raises InputError.

    The programs that judge differ from the training's in the kernel's bound of segments alone.
    """
    check_installed("--eval_tasks")
    if jax.process_count() > 1:
        raise InputError("--eval_tasks: needs a single process; judge the checkpoints by python -m llama_jax.evaluate")
    from llama_jax.run.judging import Judge  # needs lm-eval

    job, mesh, quiet = planner.job, planner.mesh, args.disable_tqdm or None
    tokenizer = job.tokenizer or open_tokenizer(source.tokenizer_folder, args.hf_compat)
    scorer = Scorer(job.config, planner.answering, mesh, planner.kernel, disable_bar=quiet)
    judge = Judge(tokenizer, source, scorer, planner.answering, mesh, disable_bar=quiet)
    tasks = TrainingTasks(judge, args.eval_tasks or (), args.eval_tasks_limit)
    args.check_metric([*(EVALUATION_METRICS if job.eval_examples else ()), *tasks.names])
    return tasks


def with_tasks(evaluation: Evaluate | None, tasks: TrainingTasks | None) -> Evaluate | None:
    """Return an evaluation that has the metrics of both; a call returns None where a stop came first."""
    if evaluation is None or tasks is None:
        return evaluation or tasks

    def evaluate(params: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
        metrics = evaluation(params, stop)
        more = None if metrics is None else tasks(params, stop)
        return None if metrics is None or more is None else {**metrics, **more}

    return evaluate
