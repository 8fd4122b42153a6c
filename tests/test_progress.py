"""Read the bar of a training run, and the figures printed after it, under a fake clock."""

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llama_jax.data.batches import Batches
from llama_jax.data.examples import Examples
from llama_jax.data.normalisation import training_loss
from llama_jax.data.order import Order
from llama_jax.reporting import progress
from llama_jax.reporting.progress import update_bar
from llama_jax.reporting.run_log import RunLog, UpdateMetrics
from llama_jax.reporting.speed import Speed, Speedometer
from llama_jax.reporting.stopwatch import Stopwatch
from llama_jax.reporting.trainer_state import TrainerState

COMPILE, UPDATE = 600.0, 2.0  # seconds
UPDATES, TOKENS = 5, 100
FLOPS, PEAK = 30.0, 10_000.0  # of a token, and a second: 50 tokens a second are 15% of the peak
GIB = 2**30
NOW = [0.0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = NOW
    now[0] = 1000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("llama_jax.reporting.run_log.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("llama_jax.reporting.run_log.memory_use", lambda: (3 * GIB // 2, 80 * GIB))
    return now


def make_log(bar: Any) -> RunLog:
    examples = Examples(np.zeros(4 * UPDATES, np.int32), np.zeros(4 * UPDATES, np.int32), 4 * np.arange(UPDATES + 1))
    order = Order(UPDATES, 1, 1, 1.0, "5")
    state = TrainerState(
        "5", max_steps=UPDATES, num_train_epochs=1, train_batch_size=1, logging_steps=1, eval_steps=1, save_steps=1
    )
    batches = Batches(examples, order, training_loss(order), max_tokens=128, row_limit=128)
    meter = Speedometer(lambda: NOW[0], flops_per_token=FLOPS, peak=PEAK)
    rate, due = (lambda k: 1e-3), (lambda step: step % 2 == 0)
    return RunLog(state, batches, rate=rate, due=due, flops_per_token=1.0, bar=bar, speedometer=meter)


def run(clock: list[float], initial: int, on_update: Callable[[Any, RunLog], None]) -> RunLog:
    with update_bar(UPDATES, initial, disable=False) as bar:
        log = make_log(bar)
        for step in range(initial + 1, UPDATES + 1):
            clock[0] += UPDATE if step > initial + 1 else COMPILE
            log.on_update(UpdateMetrics(step, 1.5, 1.0, TOKENS, 0.25, lambda: np.zeros((1, 1))))
            on_update(bar, log)
    return log


@pytest.mark.parametrize("initial", [0, 2])
def test_bar_leaves_the_compile_out(clock: list[float], initial: int, capsys: pytest.CaptureFixture) -> None:
    texts, speeds = [], []

    def on_update(bar: Any, log: RunLog) -> None:
        texts.append(str(bar))
        speeds.append(log.speedometer.whole())

    run(clock, initial, on_update)
    first, second, last = texts[0], texts[1], texts[-1]
    shown = "loss 1.5000, lr 1.00e-03, grad norm 1"
    assert f"{initial + 1}/{UPDATES} [00:00<?, ?update/s, {shown}, 1.5/80 GiB]" in first, first
    left = int(UPDATE) * (UPDATES - initial - 2)
    assert f"{initial + 2}/{UPDATES} [00:02<00:{left:02}, " in second, second
    assert f"2.00s/update, {shown}, 50 tok/s, MFU 15.0%, 1.5/80 GiB]" in second, second
    assert f"{UPDATES}/{UPDATES} [00:{int(UPDATE) * (UPDATES - initial - 1):02}<00:00,  2.00s/update" in last, last
    printed = capsys.readouterr().err
    assert "?update/s, loss" in printed and "50 tok/s" in printed and "tok/s, 00:" not in printed
    assert " 0 tok/s" not in printed and not re.search(r"\d{3}\.\d*s/update", printed)
    assert speeds[0] is None, "one update has compiled: nothing is known of the speed"
    assert speeds[1:] == [Speed(TOKENS / UPDATE, UPDATE, 0.25)] * (UPDATES - initial - 1)


def test_lines_without_a_terminal(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    """A line of progress with a log line, but not more often than every ten seconds."""
    with update_bar(UPDATES, 0, disable=True) as bar:
        log = make_log(bar)
        for step in range(1, UPDATES + 1):
            clock[0] += 6.0 if step > 1 else COMPILE
            log.on_update(UpdateMetrics(step, 1.5, 0.25, TOKENS, 0.25, lambda: np.zeros((1, 1))))
    assert capsys.readouterr().err.splitlines() == [
        "update 2 of 5, grad norm 0.25, 17 tok/s, MFU 5.0%, 1.5/80 GiB, 00:18 left",
        "update 4 of 5, grad norm 0.25, 17 tok/s, MFU 5.0%, 1.5/80 GiB, 00:06 left",
    ]


def test_levels(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for level, expected in (("info", ["a", "warning: b"]), ("warning", ["warning: b"]), ("error", [])):
        monkeypatch.setattr(progress, "_level", getattr(logging, level.upper()))
        progress.say("a")
        progress.say("warning: b")
        assert capsys.readouterr().err.splitlines() == expected


def test_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each moment one phase runs: the sum is the time since the start, whatever nests."""
    now = [5.0]
    monkeypatch.setattr("llama_jax.reporting.stopwatch.time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = Stopwatch("start", 3.0)
    with watch.phase("training"):
        now[0] += 1
        for _ in range(2):
            with pytest.raises(KeyError), watch.phase("saving"):
                now[0] += 10
                assert watch.seconds("training") == 1, "the outer phase stands still"
                raise KeyError
        now[0] += 100
        assert watch.seconds("training") == 101 and watch.seconds("saving") == 20
    now[0] += 1000
    assert watch.all() == {"start": 1002, "training": 101, "saving": 20}


def test_speed_leaves_out_pauses() -> None:
    """By a clock that stands still, as that of a phase does beside evaluations. Lines divide the run."""
    now, meter = [0.0], Speedometer(lambda: now[0], flops_per_token=FLOPS, peak=PEAK)
    assert meter.line() is meter.whole() is meter.mfu(None) is None
    for tokens in (1, 2, 4, 8):
        now[0] += 2.0
        meter.count(tokens, 0.5)
        if tokens == 2:
            assert meter.line() == 2 / 2
    assert meter.line() == (4 + 8) / 4
    assert meter.whole() == Speed(14 / 6, 2.0, 0.5) and meter.mfu(100.0) == 0.3
    assert Speedometer(lambda: 0.0).mfu(100.0) is None, "of an unknown device"


def test_disabled_bar_counts_nothing() -> None:
    with update_bar(2, 0, disable=True) as bar:
        assert not bar.update(1) and not bar.update(1)
