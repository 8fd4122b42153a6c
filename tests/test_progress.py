"""Read the bar of a training run, and the figures printed after it, under a fake clock."""

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
from llama_jax.reporting.progress import update_bar
from llama_jax.reporting.run_log import RunLog, Speed, UpdateMetrics
from llama_jax.reporting.trainer_state import TrainerState

COMPILE, UPDATE = 600.0, 2.0  # seconds
UPDATES, TOKENS = 5, 100


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("llama_jax.reporting.run_log.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def make_log(bar: Any) -> RunLog:
    examples = Examples(np.zeros(4 * UPDATES, np.int32), np.zeros(4 * UPDATES, np.int32), 4 * np.arange(UPDATES + 1))
    order = Order(UPDATES, 1, 1, 1.0, "5")
    state = TrainerState(
        "5", max_steps=UPDATES, num_train_epochs=1, train_batch_size=1, logging_steps=1, eval_steps=1, save_steps=1
    )
    batches = Batches(examples, order, training_loss(order), max_tokens=128, row_limit=128)
    return RunLog(state, batches, rate=lambda k: 1e-3, due=lambda step: False, flops_per_token=1.0, bar=bar)


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
        speeds.append(log.speed())

    run(clock, initial, on_update)
    first, second, last = texts[0], texts[1], texts[-1]
    assert f"{initial + 1}/{UPDATES} [00:00<?, ?update/s, loss 1.5000, lr 1.00e-03]" in first, first
    left = int(UPDATE) * (UPDATES - initial - 2)
    assert f"{initial + 2}/{UPDATES} [00:02<00:{left:02}, " in second, second
    assert "2.00s/update, loss 1.5000, lr 1.00e-03, 50 tok/s]" in second, second
    assert f"{UPDATES}/{UPDATES} [00:{int(UPDATE) * (UPDATES - initial - 1):02}<00:00,  2.00s/update" in last, last
    printed = capsys.readouterr().err
    assert "?update/s, loss" in printed and "50 tok/s" in printed
    assert " 0 tok/s" not in printed and not re.search(r"\d{3}\.\d*s/update", printed)
    assert speeds[0] is None, "one update has compiled: nothing is known of the speed"
    assert speeds[1:] == [Speed(TOKENS / UPDATE, UPDATE, 0.25)] * (UPDATES - initial - 1)


def test_disabled_bar_counts_nothing() -> None:
    with update_bar(2, 0, disable=True) as bar:
        assert not bar.update(1) and not bar.update(1)
