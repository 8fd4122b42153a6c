"""The reference for the flags: the real TrainingArguments, HfArgumentParser and DefaultFlowCallback.

Of whichever transformers stands first on sys.path, 4.37 or 5. Run as a script, this file is a server of its functions;
`Server` starts one.
"""

import contextlib
import dataclasses
import enum
import io
import math
import typing
import warnings
from collections.abc import Callable
from typing import Any

from reference import Process, environment, serve


class Server:
    """The functions below in a process of transformers 4.37."""

    def __init__(self) -> None:
        self._process = Process(__file__, environment("4.37"))
        self.close = self._process.close

    def ask(self, function: str, argument: Any) -> Any:
        return self._process.ask([function, argument])


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.value if isinstance(value, enum.Enum) else value


def version(_: Any = None) -> str:
    import transformers

    return transformers.__version__


def live_fields(_: Any = None) -> dict[str, dict[str, Any]]:
    """By flag: its `default` ("required" for none), its `type` and `choices` on the command line, `many` words."""
    from transformers import TrainingArguments

    actions = {a.option_strings[0][2:]: a for a in _parser()._actions}
    found = {}
    for f in dataclasses.fields(TrainingArguments):
        if not f.init:
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        default = "required" if default is dataclasses.MISSING else plain(default)
        hint = typing.get_type_hints(TrainingArguments)[f.name]
        is_bool = hint is bool or set(typing.get_args(hint)) == {bool, type(None)}
        kind = "bool" if is_bool else getattr(actions[f.name].type, "__name__", "str")
        choices = actions[f.name].choices
        many = actions[f.name].nargs == "+"
        found[f.name] = {
            **{"default": default, "type": kind if kind in ("bool", "int", "float") else "str", "many": many},
            "choices": None if choices is None else [plain(c) for c in choices],
        }
    found["debug"]["choices"] = ["underflow_overflow", "tpu_metrics_debug"]
    return found


def parse(argv: list[str]) -> dict[str, Any] | None:
    """The values by flag, None where the command line is refused."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            values, unknown = _parser().parse_known_args(argv)
        except SystemExit:
            return None
    return None if unknown else {name: plain(value) for name, value in vars(values).items()}


_parsers: list[Any] = []


def _parser() -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    if not _parsers:
        _parsers.append(HfArgumentParser(TrainingArguments))
        for action in _parsers[0]._actions:
            action.required = False
    return _parsers[0]


def _arguments(values: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    # 4.37 warns of its own deprecations.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TrainingArguments(output_dir="nowhere", use_cpu=True, report_to="none", **values)


def settle(values: dict[str, Any]) -> dict[str, Any] | str:
    """What TrainingArguments makes of values, or the message of its ValueError."""
    try:
        made = _arguments(values)
    except ValueError as e:
        return str(e)
    return {name: plain(getattr(made, name)) for name in ("eval_steps", "metric_for_best_model", "greater_is_better")}


def due(case: dict[str, Any]) -> dict[str, list[int]]:
    """The updates after which the real callback logs, evaluates and saves: `values` of TrainingArguments, `epoch`
    after each update (from 1), and `ends`, those that end an epoch."""
    from transformers import TrainerControl, TrainerState
    from transformers.trainer_callback import DefaultFlowCallback

    made, callback = _arguments(case["values"]), DefaultFlowCallback()
    state = TrainerState(max_steps=len(case["epoch"]))
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value = getattr(made, name)
        if value is not None:
            setattr(state, name, math.ceil(state.max_steps * value) if value < 1 else value)
    found: dict[str, set[int]] = {"logging": set(), "eval": set(), "save": set()}
    for step, epoch in enumerate(case["epoch"], 1):
        state.global_step, state.epoch = step, epoch
        calls: list[Callable[..., Any]] = [callback.on_step_end]
        if step in case["ends"]:
            calls.append(callback.on_epoch_end)
        for call in calls:
            control = call(made, state, TrainerControl())
            told = {"logging": control.should_log, "eval": control.should_evaluate, "save": control.should_save}
            for name in found:
                if told[name]:
                    found[name].add(step)
    return {name: sorted(steps) for name, steps in found.items()}


def optimizers(_: Any = None) -> list[str]:
    from transformers.training_args import OptimizerNames

    return [o.value for o in OptimizerNames]


def schedules(_: Any = None) -> list[str]:
    from transformers.trainer_utils import SchedulerType

    return [s.value for s in SchedulerType]


if __name__ == "__main__":
    serve(version, live_fields, parse, settle, due, optimizers, schedules)
