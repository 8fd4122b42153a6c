"""Report a run to the platforms of `--report_to`, through the callbacks of transformers and beside the training.

The callbacks choose metric names, run names and artefacts and read each platform's environment variables. They are
called in a thread of their own: a slow or silent server delays no update. Only the first process of a run reports.
"""

import contextlib
import copy
import os
import queue
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.base.errors import InputError
from llama_jax.base.output import FILE
from llama_jax.reporting.platforms import PLATFORMS, choose
from llama_jax.reporting.progress import say
from llama_jax.reporting.run_report import PAGE, VALUES
from llama_jax.reporting.trainer_arguments import trainer_arguments

PATIENCE = 600.0  # seconds at the end of a run, or at an upload, in which no callback returns; clearml's own is 300
AT_A_STOP = 10.0  # seconds; a machine that is taken away gives some 30
_SAVES_MODEL = ("wandb", "dvclive")  # their callbacks save the final model through a Trainer
_NO_MODEL = ("trainer_state.json", FILE, VALUES, PAGE, "emissions.csv")  # beside the exported files


class Model:
    """Provide what callbacks read of a model: its config, its size, and PEFT's configuration of an adapter, if any."""

    def __init__(self, raw: Mapping[str, Any], parameters: int, trainable: int, adapter: Mapping[str, Any] | None):
        from transformers import AutoConfig

        self.config: Any = None
        try:
            self.config = AutoConfig.for_model(**raw)
        except Exception as e:
            say(f"--report_to: the model's config is left out: {_first_line(e)}")
        self._parameters, self._trainable = parameters, trainable
        self.peft_config = {"default": dict(adapter)} if adapter is not None else None

    def num_parameters(self) -> int:
        """Return the number of parameters, those of an adapter too."""
        return self._parameters

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trained parameters and of all."""
        return self._trainable, self._parameters


class Trackers:
    """Pass the events of a run to callbacks by name; a callback that raises is reported in one line and left out."""

    def __init__(self, callbacks: Mapping[str, Any], arguments: Mapping[str, Any]):
        self._callbacks, self._arguments = dict(callbacks), arguments
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any], dict[str, Any]]] = queue.SimpleQueue()
        self._waiting = threading.Event()  # set when the callbacks have done all that was asked
        self._state: Any = None
        self._stdin: Any = None
        self._thread: threading.Thread | None = None
        self._calling, self._returned = "", time.monotonic()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: Any) -> None:
        """Pass on what is left, where a run fails before `end`."""
        self._finish(AT_A_STOP)

    @property
    def active(self) -> bool:
        """Return whether any callback is left."""
        return bool(self._callbacks)

    def begin(self, values: dict[str, Any], model: Callable[[], Model]) -> None:
        """Begin to report; `values` are those of the run's `TrainerState`, which later events read again."""
        if not self._callbacks:
            return
        from transformers import TrainerState

        self._values, self._model = values, model()
        known = {key: value for key, value in values.items() if hasattr(TrainerState, key)}
        self._state = TrainerState(**known | {"is_world_process_zero": True, "is_local_process_zero": True})
        # No client finds a terminal to ask for a login at: it would wait for an answer beside a run that goes on.
        self._stdin, sys.stdin = sys.stdin, open(os.devnull)  # noqa: SIM115 - `_finish` closes it
        self._thread = threading.Thread(target=self._work, daemon=True, name="trackers")
        self._thread.start()
        self._put("on_init_end")
        self._put("on_train_begin")

    def log(self, entry: Mapping[str, Any]) -> None:
        """Report an entry of the log, without its step."""
        self._put("on_log", logs={key: v for key, v in entry.items() if isinstance(v, (int, float))})

    def update(self, step: int, epoch: float) -> None:
        """Report that an update is made, before its line; Kubeflow alone reads it."""
        if "kubeflow" in self._callbacks and self._thread is not None:
            self._events.put(("on_step_end", {"global_step": step, "epoch": epoch}, {}))

    def save(self, wait: Callable[[], None]) -> None:
        """Report a checkpoint. Where a callback uploads it, `wait` until it is written, and for the upload."""
        uploads = any(PLATFORMS[name].uploads() for name in self._callbacks)
        if uploads:
            wait()
        self._put("on_save")
        if uploads:
            self._drain(PATIENCE)

    def end(self, finished: bool) -> None:
        """End the reports of a run, `finished` or stopped, and wait for them."""
        if not finished:
            self._callbacks.pop("kubeflow", None)  # whose end means that all updates are made
        self._put("on_train_end")
        self._finish(PATIENCE if finished else AT_A_STOP)

    def _put(self, event: str, **more: Any) -> None:
        if self._thread is not None and self._callbacks:
            self._events.put((event, {k: v for k, v in self._values.items() if hasattr(self._state, k)}, more))

    def _finish(self, patience: float) -> None:
        if self._thread is None:
            return
        self._events.put(("end", {}, {}))
        self._drain(patience)
        self._callbacks.clear()  # where the thread still waits for one, no other is called
        self._thread = None
        sys.stdin.close()
        sys.stdin = self._stdin

    def _drain(self, patience: float) -> None:
        """Wait until all events are passed on, or no callback has returned for `patience` seconds."""
        self._waiting.clear()
        self._events.put(("", {}, {}))
        told, self._returned = False, time.monotonic()
        while not self._waiting.wait(0.2 if told else min(5.0, patience)):
            if told and time.monotonic() - self._returned > patience:
                say(f"--report_to {self._calling}: no answer for {patience:.0f} s; its last reports may be missing")
                return
            if not told:
                say(f"waiting for {self._calling} to take the reports")
            told = True

    def _work(self) -> None:
        from transformers import TrainerControl

        control = TrainerControl()
        ended = False
        while True:
            event, values, more = self._events.get()
            if not event:
                self._waiting.set()
                if ended:
                    return
            ended = ended or event == "end"
            for key, value in values.items():
                setattr(self._state, key, value)
            for name in list(self._callbacks) if event else ():
                self._call(name, event, control, more)

    def _call(self, name: str, event: str, control: Any, more: dict[str, Any]) -> None:
        self._calling = name
        try:
            if event == "end":
                _end(name, self._callbacks[name])
                return
            call, fixed = getattr(self._callbacks[name], event), {"model": self._model, "processing_class": None}
            with (
                _trainer_of_exports() if name in _SAVES_MODEL and event == "on_train_end" else contextlib.nullcontext()
            ):
                call(self._arguments[name], self._state, control, **fixed, **more)
        except BaseException as e:  # a client may exit, too
            self._callbacks.pop(name, None)
            say(f"--report_to {name}: {_first_line(e)}; nothing more is reported there, and training goes on")
        self._returned = time.monotonic()


def open_trackers(report_to: Sequence[str] | None, compat: str, flags: Mapping[str, Any]) -> Trackers:
    """Make the callbacks of `--report_to`; `flags` are the Trainer's, by name, and `logging_dir`.

    A platform that is named must be installed and need no login. Of `all`, the others are left out. Raises InputError.
    """
    names, named = choose(report_to, compat)
    callbacks, left_out = {}, []
    streams = sys.stdout, sys.stderr
    for name in names:
        try:
            callbacks[name] = _make_callback(name)
        except InputError as e:
            if named:
                raise
            left_out.append(str(e))
        finally:
            sys.stdout, sys.stderr = streams  # the import of dvclive replaces those that write run.log
    if names and not named:
        default = "all, the default of transformers 4.37" if report_to is None else "all"
        say(f"--report_to {default}: {', '.join(callbacks) or 'none'}; --report_to none turns this off")
        for line in left_out:
            say(f"{line}; left out")
    if not callbacks:
        return Trackers({}, {})
    arguments = trainer_arguments({**flags, "report_to": names})
    each = dict.fromkeys(callbacks, arguments)
    if compat == "4.37" and arguments.run_name is None:  # there the name of MLflow's run; wandb's and comet's are free
        named_so = copy.copy(arguments)
        named_so.run_name = arguments.output_dir
        each |= dict.fromkeys({"mlflow", "dagshub"} & callbacks.keys(), named_so)
    if (folder := flags.get("logging_dir")) and "tensorboard" in callbacks:
        callbacks["tensorboard"].logging_dir = os.path.expanduser(folder)
    return Trackers(callbacks, each)


def _make_callback(name: str) -> Any:
    """Return transformers' callback for a platform. Raises InputError where it cannot report."""
    platform = PLATFORMS[name]
    if not platform.installed:
        raise InputError(f"--report_to {name}: its client is not installed; pip install {platform.package}")
    try:
        if advice := platform.missing():
            raise InputError(f"--report_to {name}: {advice}")
        from transformers.integrations import integration_utils

        if not hasattr(integration_utils, "torch"):
            # Without torch, CodeCarbonCallback still asks for ROCm, and MLflowCallback whether a value is a tensor.
            torch: Any = types.SimpleNamespace(version=types.SimpleNamespace(hip=None), Tensor=type(None))
            integration_utils.torch = torch
        return integration_utils.INTEGRATION_TO_CALLBACK[name]()
    except InputError:
        raise
    except Exception as e:
        package = f"; try pip install -U {platform.package}" if isinstance(e, ImportError) else ""
        raise InputError(f"--report_to {name}: {_first_line(e)}{package}") from None


def _end(name: str, callback: Any) -> None:
    """End what a client would end at the process' end, where it finds nothing that another thread began."""
    if name == "comet_ml" and callback._experiment is not None:
        callback._experiment.end()
    if name in ("mlflow", "dagshub") and callback._ml_flow.active_run() is not None:
        callback._ml_flow.end_run()


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip(" -")]
    return f"{type(e).__name__}: {lines[0][:300]}" if lines else type(e).__name__


class _Exported:
    """Stand in for the Trainer through which two callbacks save the final model: copy the exported one."""

    def __init__(self, args: Any, **_: Any):
        self._folder = Path(args.output_dir)

    def save_model(self, folder: str) -> None:
        """Copy the files of the exported model."""
        os.makedirs(folder, exist_ok=True)
        for path in self._folder.iterdir():
            if path.is_file() and path.name not in _NO_MODEL and not path.name.startswith("."):
                shutil.copy(path, folder)


@contextlib.contextmanager
def _trainer_of_exports() -> Iterator[None]:
    """Let `transformers.trainer` be a module of `_Exported` alone; the real one needs torch."""
    module, name = types.ModuleType("transformers.trainer"), "transformers.trainer"
    module.Trainer = _Exported  # type: ignore[attr-defined]
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
