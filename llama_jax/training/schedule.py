"""Compute the learning rate of every update on the host, by the Trainer's schedules, names and keywords.

The formulas are those of transformers' `optimization.py` (4.37.2 and 5.23) and torch's `ReduceLROnPlateau`, in float64.
An update takes its rate as an argument, so that no schedule is part of the compiled program. Jax is not imported: the
flags read SCHEDULES and LISTENING.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from llama_jax.base.errors import InputError

Factor = Callable[[int], float]
Shape = Literal["linear", "cosine", "1-sqrt"]


class Schedule:
    """Give every update a rate that is fixed from the start."""

    def __init__(self, rate: Factor):
        self._rate, self._given = rate, dict[int, float]()

    def rate(self, done: int) -> float:
        """Return the learning rate of the update that follows `done` updates."""
        return self._given[done] if done in self._given else self._rate(done)

    def give(self, done: int, rate: float) -> None:
        """Fix the rate of the update that follows `done` updates."""
        self._given[done] = rate

    def observe(self, metric: float) -> None:
        """Take the metric of an evaluation during training (not the metric of `--eval_on_start`)."""

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint must hold, ready for JSON."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the `state()` of a schedule that was made with the same arguments."""


@dataclass
class _Listening(Schedule):
    """Keep one rate until an evaluation changes it. `HEARD` names the attributes of its state."""

    peak: float
    _: KW_ONLY
    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8

    HEARD: ClassVar[tuple[str, ...]] = ("now", "best", "bad", "cooling")

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise InputError(f"--lr_scheduler_kwargs: factor {self.factor} is not between 0 and 1")
        self.now = self.peak
        self._forget()

    def _forget(self) -> None:
        self.best = math.inf if self.mode == "min" else -math.inf
        self.bad = self.cooling = 0

    def rate(self, done: int) -> float:
        return self.now

    def give(self, done: int, rate: float) -> None:
        """Nothing: `load` sets the rate of the moment."""

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.HEARD}

    def load(self, state: dict[str, Any]) -> None:
        for name in self.HEARD:
            setattr(self, name, state[name])

    def _is_better(self, metric: float) -> bool:
        sign = -1.0 if self.mode == "min" else 1.0
        margin = 1 + sign * self.threshold
        bar = self.best * margin if self.threshold_mode == "rel" else self.best + sign * self.threshold
        return metric < bar if self.mode == "min" else metric > bar

    def _lower(self) -> None:
        lower = max(self.now * self.factor, self.min_lr)
        if self.now - lower > self.eps:
            self.now = lower


@dataclass
class Plateau(_Listening):
    """Lower the rate after more than `patience` evaluations in a row without progress (torch's ReduceLROnPlateau)."""

    def observe(self, metric: float) -> None:
        if self._is_better(metric):
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad > self.patience:
            self._lower()
            self.cooling, self.bad = self.cooldown, 0


@dataclass(kw_only=True)
class Greedy(_Listening):
    """Lower the rate as Plateau, and raise it after more than `patience` better evaluations (transformers' GreedyLR).

    `smooth` compares the mean of the last `window_size` metrics. After `reset_start` decisions to lower a rate that is
    already at `min_lr`, rate and state start anew.
    """

    factor: float = 0.95
    threshold: float = 1e-6
    threshold_mode: Literal["rel", "abs"] = "abs"
    warmup: int = 0
    min_lr: float = 1e-3
    max_lr: float = 1.0
    smooth: bool = False
    window_size: int = 50
    reset_start: int = 500

    HEARD: ClassVar[tuple[str, ...]] = (*_Listening.HEARD, "good", "warming", "until_reset", "window", "sum")
    window: list[float] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_size < 1:
            raise InputError(f"--lr_scheduler_kwargs: window_size {self.window_size} is below 1")

    def _forget(self) -> None:
        super()._forget()
        self.good = self.warming = 0
        self.until_reset = self.reset_start
        self.window, self.sum = [], 0.0

    def observe(self, metric: float) -> None:
        if self.smooth:
            # A running sum rounds as the Trainer's does.
            self.window = [*self.window, metric]
            self.sum += metric
            if len(self.window) > self.window_size:
                self.sum -= self.window[0]
                self.window = self.window[1:]
            metric = self.sum / len(self.window)
        if self.cooling > 0 or self.warming > 0:
            if self.cooling > 0:
                self.cooling -= 1
            else:
                self.warming -= 1
            self.good = self.bad = 0
            return
        if self._is_better(metric):
            self.best, self.good, self.bad = metric, self.good + 1, 0
        else:
            self.good, self.bad = 0, self.bad + 1
        if self.good > self.patience:
            higher = min(self.now / self.factor, self.max_lr)
            if higher - self.now > self.eps:
                self.now = higher
            self.until_reset = self.reset_start
            self.warming, self.good = self.warmup, 0
        elif self.bad > self.patience:
            self._lower()
            if self.now <= self.min_lr:
                self.until_reset -= 1
                if self.until_reset <= 0:
                    self.now = self.peak
                    self._forget()
            self.cooling, self.bad = self.cooldown, 0


def _warmed(warmup: int, after: Factor) -> Factor:
    return lambda t: t / max(1, warmup) if t < warmup else after(t)


def _constant(peak: float, warmup: int, total: int) -> Factor:
    return lambda t: 1.0


def _constant_with_warmup(peak: float, warmup: int, total: int) -> Factor:
    return _warmed(warmup, lambda t: 1.0)


def _linear(peak: float, warmup: int, total: int) -> Factor:
    return _warmed(warmup, lambda t: max(0.0, (total - t) / max(1, total - warmup)))


def _cosine(peak: float, warmup: int, total: int, *, num_cycles: float = 0.5) -> Factor:
    return _warmed(warmup, lambda t: _wave(num_cycles, (t - warmup) / max(1, total - warmup), 0.0))


def _wave(cycles: float, progress: float, floor: float) -> float:
    """Return a cosine that falls from 1 to `floor` in half a cycle."""
    return max(0.0, floor + (1 - floor) * 0.5 * (1 + math.cos(2 * math.pi * cycles * progress)))


def _cosine_with_restarts(peak: float, warmup: int, total: int, *, num_cycles: float = 1) -> Factor:
    def falling(t: int) -> float:
        progress = (t - warmup) / max(1, total - warmup)
        return 0.0 if progress >= 1 else _wave(0.5, num_cycles * progress % 1.0, 0.0)

    return _warmed(warmup, falling)


def _polynomial(peak: float, warmup: int, total: int, *, lr_end: float = 1e-7, power: float = 1.0) -> Factor:
    if lr_end >= peak:
        raise InputError(f"--lr_scheduler_kwargs: lr_end {lr_end} is not below --learning_rate {peak}")
    if power < 0:
        raise InputError(f"--lr_scheduler_kwargs: power {power} is below 0")

    def falling(t: int) -> float:
        # The Trainer divides by 0 where t = warmup = total.
        left = max(0.0, 1 - (t - warmup) / max(1, total - warmup)) ** power if t <= total else 0.0
        return ((peak - lr_end) * left + lr_end) / peak

    return _warmed(warmup, falling)


def _inverse_sqrt(peak: float, warmup: int, total: int, *, timescale: int | None = None) -> Factor:
    scale = (warmup or 10_000) if timescale is None else timescale
    if scale <= 0:
        raise InputError(f"--lr_scheduler_kwargs: timescale {scale} is not above 0")
    return _warmed(warmup, lambda t: 1 / math.sqrt((t + scale - warmup) / scale))


def _inverse_sqrt_4_37(peak: float, warmup: int, total: int) -> Factor:
    if warmup == 0:
        raise InputError("--lr_scheduler_type inverse_sqrt needs --warmup_steps (or --hf_compat 5, which does without)")
    return _inverse_sqrt(peak, warmup, total)


def _floor(peak: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise InputError("--lr_scheduler_kwargs must have one of min_lr and min_lr_rate")
    if min_lr_rate is not None:
        return min_lr_rate
    assert min_lr is not None
    if peak == 0:
        raise InputError("--lr_scheduler_kwargs: min_lr needs a --learning_rate above 0")
    return min_lr / peak


def _cosine_with_min_lr(
    peak: float,
    warmup: int,
    total: int,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Factor:
    floor = _floor(peak, min_lr, min_lr_rate)
    return _warmed(warmup, lambda t: _wave(num_cycles, (t - warmup) / max(1, total - warmup), floor))


def _cosine_warmup_with_min_lr(
    peak: float,
    warmup: int,
    total: int,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Factor:
    floor = _floor(peak, min_lr, min_lr_rate)

    def factor(t: int) -> float:
        if t >= warmup:
            return _wave(num_cycles, (t + 1 - warmup) / max(1, total - warmup), floor)
        if warmup_lr_rate is None:
            return (t + 1) / warmup
        return warmup_lr_rate + (1 - warmup_lr_rate) * t / max(1, warmup - 1)

    return factor


def _warmup_stable_decay(
    peak: float,
    warmup: int,
    total: int,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: Shape = "linear",
    decay_type: Shape = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Factor:
    stable_end = total - num_decay_steps if num_stable_steps is None else warmup + num_stable_steps

    def shape(kind: Shape, up: float, cycles: float) -> float:
        """Return a curve that falls from 1 at `up` = 0."""
        if kind == "linear":
            part = 1 - up
        elif kind == "cosine":
            part = 0.5 * (1 + math.cos(2 * math.pi * cycles * up))
        else:
            part = 1 - math.sqrt(up)
        return max(0.0, part * (1 - min_lr_ratio) + min_lr_ratio)

    def factor(t: int) -> float:
        if t < warmup:
            return shape(warmup_type, 1 - t / warmup, 0.5)
        if t < stable_end:
            return 1.0
        if t < stable_end + num_decay_steps:
            return shape(decay_type, (t - stable_end) / num_decay_steps, num_cycles)
        return min_lr_ratio

    return factor


_FIXED: dict[str, Callable[..., Factor]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
}
LISTENING: dict[str, type[_Listening]] = {"reduce_lr_on_plateau": Plateau, "greedy": Greedy}
SCHEDULES = (*_FIXED, *LISTENING)
_NOT_IN_4_37 = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy")


def warmup_updates(steps: float, ratio: float, updates: int) -> int:
    """Return the number of updates that warm up, of all, by `--warmup_steps` and `--warmup_ratio`."""
    return int(steps) if steps >= 1 else math.ceil(updates * (steps or ratio))


def make_schedule(kind: str, peak: float, warmup: int, total: int, compat: str, kwargs: dict[str, Any]) -> Schedule:
    """Make the schedule `--lr_scheduler_type kind --lr_scheduler_kwargs kwargs` as the Trainer of `compat` makes it.

    `peak` is --learning_rate, `warmup` and `total` are numbers of updates. The kinds in LISTENING take no warm-up, and
    their direction is the keyword `mode` alone: the Trainer does not pass `greater_is_better` on. Raises InputError for
    a kind or a keyword that the Trainer lacks or would ignore (4.37's `inverse_sqrt` and both constants ignore all).
    """
    if kind not in SCHEDULES:
        raise InputError(f"--lr_scheduler_type {kind!r} is not one of {', '.join(SCHEDULES)}")
    if compat == "4.37" and kind in _NOT_IN_4_37:
        raise InputError(f"--lr_scheduler_type {kind} is not in transformers 4.37: give --hf_compat 5")
    if kind in LISTENING:
        _check(kind, LISTENING[kind], kwargs)
        return LISTENING[kind](peak, **kwargs)
    maker = _inverse_sqrt_4_37 if compat == "4.37" and kind == "inverse_sqrt" else _FIXED[kind]
    _check(kind, maker, kwargs)
    factor = maker(peak, warmup, total, **kwargs)
    return Schedule(lambda done: peak * factor(done))


def _check(kind: str, maker: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Raise InputError unless `kwargs` fit the keyword-only parameters of `maker`."""
    takes = {p.name: p for p in inspect.signature(maker).parameters.values() if p.kind is p.KEYWORD_ONLY}
    known = f"--lr_scheduler_type {kind} takes {', '.join(takes) or 'none'}"
    if unknown := [name for name in kwargs if name not in takes]:
        raise InputError(f"--lr_scheduler_kwargs: unknown keyword {unknown[0]!r}: {known}")
    if missing := [name for name, p in takes.items() if p.default is p.empty and name not in kwargs]:
        raise InputError(f"--lr_scheduler_kwargs: {missing[0]} is missing: {known}")
    for name, value in kwargs.items():
        options = get_args(takes[name].annotation) or (takes[name].annotation,)
        if value not in options and type(value) not in (options if float not in options else (*options, int)):
            wanted = " or ".join(getattr(option, "__name__", repr(option)) for option in options)
            raise InputError(f"--lr_scheduler_kwargs: {name} is {value!r}, not {wanted}")
