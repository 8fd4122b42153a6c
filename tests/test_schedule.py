"""The rate of every update is the real Trainer's scheduler's: fixed tables, and the two that listen to evaluations."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT, slow_unless

from llama_jax.base.errors import InputError
from llama_jax.training.schedule import make_schedule

EPS64 = 2.0**-52
ALWAYS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
ONLY_5 = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy")


def torch_rates(kind: str, peak: float, warmup: int, total: int, kwargs: dict[str, Any]) -> list[float]:
    """What the scheduler of the transformers at hand gives by the number of updates done, [total + 1]."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(total):
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    return rates


def check_table(kind: str, peak: float, warmup: int, total: int, compat: str, kwargs: Any, expected: Any) -> None:
    # Both are float64. A factor comes from a handful of roundings on either side, each of at most half an EPS64 of
    # numbers up to 1 (up to 4 pi in the argument of a cosine): 1 - fraction near 0, 1 + cos near -1 and roots near 1
    # cancel, which is why a part of the bound is absolute.
    schedule = make_schedule(kind, peak, warmup, total, compat, kwargs)
    actual = [schedule.rate(done) for done in range(total + 1)]
    assert all(type(rate) is float for rate in actual)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=16 * EPS64 * peak)
    schedule.observe(1.0)
    assert schedule.state() == {}
    assert [schedule.rate(done) for done in range(total + 1)] == actual


fractions = st.floats(0.0, 1.0)
floors = st.one_of(
    st.fixed_dictionaries({"min_lr": st.floats(0, 1e-3)}), st.fixed_dictionaries({"min_lr_rate": fractions})
)


def optional(**keywords: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


def merged(*parts: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda ds: {k: v for d in ds for k, v in d.items()})


KEYWORDS: dict[str, Any] = {
    "linear": st.just({}),
    "constant": st.just({}),
    "constant_with_warmup": st.just({}),
    "cosine": optional(num_cycles=st.floats(0.1, 2.0)),
    "cosine_with_restarts": optional(num_cycles=st.integers(1, 4)),
    "polynomial": optional(lr_end=st.floats(0, 1e-7), power=st.floats(0.5, 3.0)),
    "inverse_sqrt": optional(timescale=st.one_of(st.none(), st.integers(1, 500))),
    "cosine_with_min_lr": merged(floors, optional(num_cycles=st.floats(0.1, 2.0))),
    "cosine_warmup_with_min_lr": merged(
        floors, optional(num_cycles=st.floats(0.1, 2.0), warmup_lr_rate=st.one_of(st.none(), fractions))
    ),
    "warmup_stable_decay": merged(
        st.fixed_dictionaries({"num_decay_steps": st.integers(0, 100)}),
        optional(
            num_stable_steps=st.one_of(st.none(), st.integers(0, 100)),
            warmup_type=st.sampled_from(["linear", "cosine", "1-sqrt"]),
            decay_type=st.sampled_from(["linear", "cosine", "1-sqrt"]),
            min_lr_ratio=fractions,
            num_cycles=st.floats(0.1, 2.0),
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize("kind", KEYWORDS)
def test_tables_of_5(kind: str) -> None:
    @settings(max_examples=40)
    @given(peak=st.floats(1e-6, 1.0), total=st.integers(1, 200), warmup=st.integers(0, 210), kwargs=KEYWORDS[kind])
    def check(peak: float, total: int, warmup: int, kwargs: dict[str, Any]) -> None:
        if kind == "polynomial" and warmup == total:
            warmup -= 1  # the real one divides by 0 after the last update
        check_table(kind, peak, warmup, total, "5", kwargs, torch_rates(kind, peak, warmup, total, kwargs))

    check()


EDGES = [(195, 6500), (0, 1), (1, 1), (7, 7), (9, 7), (0, 500)]
GRID: list[tuple[str, int, int, dict[str, Any]]] = [
    *((kind, *edge, {}) for kind in ALWAYS for edge in EDGES),
    *((kind, 3, 50, {"num_cycles": 3}) for kind in ("cosine", "cosine_with_restarts")),
    ("polynomial", 3, 50, {"lr_end": 1e-6, "power": 2.0}),
]
PEAK = 2e-5


def crashes(version: str, kind: str, warmup: int, total: int) -> bool:
    """Where the real scheduler divides by 0."""
    if kind == "polynomial":
        return warmup == total
    return version == "4.37" and kind == "inverse_sqrt" and warmup == 0


def grid_of(version: str) -> list[tuple[str, int, int, dict[str, Any]]]:
    return [row for row in GRID if not crashes(version, *row[:3])]


def tables_of(version: str) -> list[list[float]]:
    """Return the grid's tables; 4.37's are from a process of its own."""
    if version == "5":
        return [torch_rates(kind, PEAK, warmup, total, kwargs) for kind, warmup, total, kwargs in grid_of("5")]
    code = (
        "import json, transformers; assert transformers.__version__ == '4.37.2'; import test_schedule as t;"
        "print(json.dumps([t.torch_rates(k, t.PEAK, w, n, kw) for k, w, n, kw in t.grid_of('4.37')]))"
    )
    env = reference.environment("4.37", Path(__file__).parent, ROOT)
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("version", [slow_unless(False, "4.37"), "5"])
def test_tables_at_their_edges(version: str) -> None:
    for (kind, warmup, total, kwargs), expected in zip(grid_of(version), tables_of(version), strict=True):
        check_table(kind, PEAK, warmup, total, version, kwargs, expected)


def test_polynomial_where_the_trainer_divides_by_zero() -> None:
    schedule = make_schedule("polynomial", 1.0, 4, 4, "5", {"lr_end": 0.25})
    assert [schedule.rate(done) for done in range(6)] == [0, 0.25, 0.5, 0.75, 1.0, 0.25]


# --- schedules that listen --------------------------------------------------------------------------------------------

HEARING: dict[str, Any] = {
    "mode": st.sampled_from(["min", "max"]),
    "factor": st.floats(0.1, 0.99),
    "patience": st.integers(0, 3),
    "threshold": st.floats(0, 0.3),
    "threshold_mode": st.sampled_from(["rel", "abs"]),
    "cooldown": st.integers(0, 3),
    "min_lr": st.floats(0, 0.5),
    "eps": st.sampled_from([0.0, 1e-8, 0.05]),
}
GREEDY: dict[str, Any] = HEARING | {
    "warmup": st.integers(0, 3),
    "max_lr": st.floats(0.5, 2.0),
    "smooth": st.booleans(),
    "window_size": st.integers(1, 5),
    "reset_start": st.integers(0, 4),
}


def real(kind: str, peak: float, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    return optimizer, get_scheduler(kind, optimizer, 3, 10, scheduler_specific_kwargs=kwargs)


@st.composite
def metrics(draw: Any) -> list[float]:
    """A walk with flat and steady stretches: long enough to be patient, cool down, reach a bound and start anew."""
    values, value = [], 1.0
    for _ in range(draw(st.integers(1, 8))):
        step = draw(st.sampled_from([0.0, 0.25, -0.25, 1e-7, -1e-7]))
        for _ in range(draw(st.integers(1, 8))):
            value += step
            values.append(value)
    if draw(st.booleans()):
        values.insert(draw(st.integers(0, len(values))), float("nan"))
    return values


@pytest.mark.parametrize(("kind", "keywords"), [("reduce_lr_on_plateau", HEARING), ("greedy", GREEDY)])
def test_listening(kind: str, keywords: dict[str, Any]) -> None:
    """The rate after every evaluation, to the bit; and from any point on after its state went through JSON."""
    changed = set()

    @settings(max_examples=400)
    @given(peak=st.sampled_from([1.0, 0.3]), kwargs=optional(**keywords), values=metrics(), cut=st.integers(0, 64))
    def check(peak: float, kwargs: dict[str, Any], values: list[float], cut: int) -> None:
        optimizer, scheduler = real(kind, peak, kwargs)
        schedule = make_schedule(kind, peak, 3, 10, "5", kwargs)
        assert schedule.rate(0) == schedule.rate(7) == peak  # the warm-up is not for these
        for i, metric in enumerate(values):
            if i == cut:
                state = json.loads(json.dumps(schedule.state()))
                schedule = make_schedule(kind, peak, 3, 10, "5", kwargs)
                schedule.load(state)
            before = schedule.rate(i)
            scheduler.step(metric)
            schedule.observe(metric)
            assert schedule.rate(i + 1) == optimizer.param_groups[0]["lr"]
            if schedule.rate(i + 1) != before:
                changed.add("up" if schedule.rate(i + 1) > before else "down")

    check()
    assert changed == ({"down"} if kind == "reduce_lr_on_plateau" else {"up", "down"})


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_listening_with_defaults(kind: str) -> None:
    """Evaluations enough for patience 10 and a window of 50."""
    kwargs = {"smooth": True, "patience": 0, "reset_start": 20} if kind == "greedy" else {}
    optimizer, scheduler = real(kind, 2e-3, kwargs)
    schedule = make_schedule(kind, 2e-3, 0, 1, "5", kwargs)
    rng, seen = np.random.default_rng(0), set()
    for i, metric in enumerate([*np.linspace(3, 2, 30), *rng.normal(2.5, 0.1, 120)]):
        scheduler.step(metric)
        schedule.observe(float(metric))
        assert schedule.rate(i) == optimizer.param_groups[0]["lr"]
        seen.add(schedule.rate(i))
    assert len(seen) > 3


def test_greedy_waits_anew_after_a_rise() -> None:
    """Two decisions to lower at `min_lr` start all anew, but not with a rise between them."""
    kwargs = {"patience": 0, "factor": 0.5, "min_lr": 0.5, "max_lr": 2.0, "reset_start": 2}
    optimizer, scheduler = real("greedy", 1.0, kwargs)
    schedule = make_schedule("greedy", 1.0, 0, 1, "5", kwargs)
    rates = []
    for i, metric in enumerate([5.0, 6.0, 6.0, 4.0, 5.0, 5.0, 5.0]):
        scheduler.step(metric)
        schedule.observe(metric)
        rates.append(schedule.rate(i))
        assert rates[-1] == optimizer.param_groups[0]["lr"]
    assert rates == [2.0, 1.0, 0.5, 1.0, 0.5, 1.0, 2.0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "compat", "kwargs", "words"),
    [
        ("wavy", "5", {}, r"wavy.*not one of linear, .*greedy"),
        *((kind, "4.37", {}, rf"{kind}.*4\.37.*--hf_compat 5") for kind in ONLY_5),
        ("linear", "5", {"num_cycles": 1}, r"--lr_scheduler_kwargs.*'num_cycles'.*linear takes none"),
        ("polynomial", "5", {"end": 1}, r"--lr_scheduler_kwargs.*'end'.*polynomial takes lr_end, power"),
        ("inverse_sqrt", "4.37", {"timescale": 3}, r"--lr_scheduler_kwargs.*'timescale'.*takes none"),
        ("inverse_sqrt", "4.37", {}, r"inverse_sqrt.*--warmup_steps"),
        ("inverse_sqrt", "5", {"timescale": 0}, r"timescale 0"),
        ("warmup_stable_decay", "5", {}, r"num_decay_steps is missing.*num_stable_steps, warmup_type"),
        ("warmup_stable_decay", "5", {"num_decay_steps": 2, "decay_type": "up"}, r"decay_type.*'up'.*'1-sqrt'"),
        ("cosine_with_min_lr", "5", {}, r"one of min_lr and min_lr_rate"),
        ("cosine_warmup_with_min_lr", "5", {"min_lr": 0.1, "min_lr_rate": 0.1}, r"one of min_lr and min_lr_rate"),
        ("polynomial", "5", {"lr_end": 0.5}, r"lr_end 0\.5 .*--learning_rate 0\.5"),
        ("polynomial", "5", {"power": -1}, r"power -1"),
        ("polynomial", "5", {"power": True}, r"power is True, not float"),
        ("cosine", "5", {"num_cycles": "2"}, r"num_cycles is '2', not float"),
        ("reduce_lr_on_plateau", "5", {"patience": 0.5}, r"patience is 0\.5, not int"),
        ("reduce_lr_on_plateau", "4.37", {"min_lr": [0, 0]}, r"min_lr is \[0, 0\], not float"),
        ("reduce_lr_on_plateau", "4.37", {"factor": 1.0}, r"factor 1\.0"),
        ("reduce_lr_on_plateau", "4.37", {"warmup": 1}, r"'warmup'.*takes mode, factor, .*eps$"),
        ("greedy", "5", {"mode": "up"}, r"mode is 'up', not 'min' or 'max'"),
        ("greedy", "5", {"smooth": 1}, r"smooth is 1, not bool"),
        ("greedy", "5", {"window_size": 0}, r"window_size 0"),
    ],
)
def test_refusals(kind: str, compat: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make_schedule(kind, 0.5, 0, 10, compat, kwargs)
    assert "\n" not in str(caught.value)
