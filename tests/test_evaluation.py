"""What an evaluation and the log are made of, against brute-force loops over accelerate's own batches."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler
from transformers.trainer_utils import rotate_checkpoints

from llama_jax.data.batches import Batches
from llama_jax.data.examples import IGNORE_INDEX, Examples
from llama_jax.data.normalisation import evaluation_loss, evaluation_shares, training_loss
from llama_jax.data.order import Order
from llama_jax.reporting.run_log import RunLog, UpdateMetrics
from llama_jax.reporting.speed import Speedometer
from llama_jax.reporting.trainer_state import TrainerState
from llama_jax.setup.job import kept_steps

examples_drawn = st.lists(
    st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=14
)


def make_examples(shapes: list[tuple[int, int]]) -> Examples:
    """Examples of (length, masked labels at the front); every token id is unlike the others."""
    offsets = np.cumsum([0, *(n for n, _ in shapes)])
    ids = np.arange(offsets[-1], dtype=np.int32)
    labels = ids.copy()
    for start, (_, masked) in zip(offsets, shapes, strict=False):
        labels[start : start + masked] = IGNORE_INDEX
    return Examples(ids, labels, offsets)


def token_losses(examples: Examples, i: int) -> np.ndarray:
    """A made-up loss of each trained token of an example, by the token that it predicts."""
    ids, labels = examples[i]
    return np.sqrt(1.0 + ids[1:][labels[1:] != IGNORE_INDEX])


def weighted(batches: Batches, k: int) -> list[np.ndarray]:
    """The blocks' weights times the losses of their targets, [B, T] each: what the devices would return."""
    return [b.weights.astype(np.float64) * np.sqrt(1.0 + b.targets) for b in batches.update(k)]


@given(
    shapes=examples_drawn,
    size=st.integers(1, 4),
    ranks=st.integers(1, 3),
    together=st.integers(1, 4),
    compat=st.sampled_from(["4.37", "5"]),
)
def test_eval_loss_is_the_trainers(
    shapes: list[tuple[int, int]], size: int, ranks: int, together: int, compat: str
) -> None:
    """Each rank repeats its batch's loss `size` times; the gathered losses are cut to the number of examples."""
    examples = make_examples(shapes)
    sampler = BatchSampler(SequentialSampler(range(len(shapes))), size, False)
    # Accelerate shards, and tops up, only where there is more than one rank.
    shards = [list(BatchSamplerShard(sampler, ranks, r)) if ranks > 1 else list(sampler) for r in range(ranks)]
    gathered: list[float] = []
    for of_ranks in zip(*shards, strict=True):
        losses = [[token_losses(examples, i) for i in batch] for batch in of_ranks]
        counts = [sum(map(len, rank)) for rank in losses]
        for rank, count in zip(losses, counts, strict=True):
            total = float(sum(x.sum() for x in rank))
            if compat == "4.37":
                mean = total / count if count else math.nan
            else:  # the count is gathered over ranks, and the loss scaled by their number
                mean = total / sum(counts) * ranks if sum(counts) else math.nan
            gathered += [mean] * size
    gathered = gathered[: len(shapes)]

    order = Order(len(shapes), size, together, 1.0, "5", ranks=ranks, sampling="sequential")
    batches = Batches(examples, order, evaluation_loss(order, compat), ranks, 128, 128)
    assert sum(n for k in range(order.updates) for of in evaluation_shares(order, k) for n in of) == len(shapes)
    nan = any(batches.is_nan(k).any() for k in range(order.updates))
    assert nan == any(map(math.isnan, gathered))
    got = sum(float(block.sum()) for k in range(order.updates) for block in weighted(batches, k))
    # Weights are float32, one rounding each; the rest is float64.
    np.testing.assert_allclose(got, np.nansum(gathered), rtol=1e-6, atol=1e-12)


@given(
    shapes=examples_drawn,
    size=st.integers(1, 3),
    ranks=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    rule=st.sampled_from([("4.37", True), ("5", True), ("5", False)]),
)
def test_micro_losses_are_the_trainers(
    shapes: list[tuple[int, int]], size: int, ranks: int, accumulation: int, rule: tuple[str, bool]
) -> None:
    """Each micro-batch's and rank's part in the loss, NaN where the Trainer's is, by a loop over examples."""
    compat, average = rule
    examples = make_examples(shapes)
    order = Order(len(shapes), size, accumulation, 2.0, compat, ranks=ranks)
    batches = Batches(examples, order, training_loss(order, average), ranks, 128, 128)
    for k in range(order.updates):
        micro = order.update(k)
        losses = [[np.concatenate([token_losses(examples, int(i)) for i in rank]) for rank in m] for m in micro]
        of_ranks = [sum(len(m[r]) for m in losses) for r in range(ranks)]
        expected = np.zeros((len(micro), ranks))
        for m in range(len(micro)):
            for r in range(ranks):
                if compat == "4.37":
                    count = len(losses[m][r]) * accumulation * ranks
                else:
                    count = sum(of_ranks) if average else of_ranks[r] * ranks
                expected[m, r] = losses[m][r].sum() / count if count else math.nan
        got = np.where(batches.is_nan(k), np.nan, batches.micro_losses(k, weighted(batches, k)))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)


class NoBar:
    disable = False

    def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

    def update(self, n: int) -> None: ...


@pytest.mark.parametrize("nan_filter", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_nan_filter(nan_filter: bool, ranks: int, every: int) -> None:
    """Against the Trainer's loop over micro-batches of each rank (section 7 of the facts), under 4.37's rule.

    Of two ranks, both have nothing to learn at the same time: else the mean that each starts from differs from its own
    sum.
    """
    shapes = [(9, 2), (7, 7), (12, 4), (5, 5), (6, 6), (8, 1), (4, 2), (3, 3), (10, 9), (11, 11)]
    shapes = [(n + r, masked + r) for n, masked in shapes for r in range(ranks)]
    examples = make_examples(shapes)
    sampling = "random" if ranks == 1 else "sequential"
    order = Order(len(shapes), 1, 3, 3.0, "4.37", seed=3, ranks=ranks, sampling=sampling)
    batches = Batches(examples, order, training_loss(order), ranks, 128, 128)
    state = TrainerState(
        "4.37", max_steps=9, num_train_epochs=3, train_batch_size=1, logging_steps=1, eval_steps=1, save_steps=1
    )
    log = RunLog(
        state,
        batches,
        rate=lambda k: 0.0,
        due=lambda step: step % every == 0,
        flops_per_token=0.0,
        bar=NoBar(),
        speedometer=Speedometer(lambda: 0.0),
        nan_filter=nan_filter,
    )
    expected, running, last_logged = [], np.zeros(ranks), 0
    for k in range(order.updates):
        parts = weighted(batches, k)
        log.on_update(
            UpdateMetrics(
                k + 1, float(sum(p.sum() for p in parts)), 0.0, 1, 0.0, lambda k=k, p=parts: batches.micro_losses(k, p)
            )
        )
        for micro in order.update(k):
            for rank, indices in enumerate(micro):
                tokens = np.concatenate([token_losses(examples, int(i)) for i in indices])
                loss = tokens.mean() / 3 if len(tokens) else math.nan
                if nan_filter and math.isnan(loss):
                    running[rank] += running[rank] / (1 + k - last_logged)
                else:
                    running[rank] += loss
        if (k + 1) % every == 0:
            expected.append(round(running.mean() / (k + 1 - last_logged), 4))
            running -= running  # NaN stays
            last_logged = k + 1
    got = [entry["loss"] for entry in state.values["log_history"]]
    assert any(map(math.isnan, expected)) != nan_filter, "the data should have updates with masked examples"
    # Rounded to four decimals, of values that differ by a rounding of float32 weights.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1.01e-4)


@given(
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=8, unique=True).map(sorted),
    limit=st.none() | st.integers(0, 5),
    best=st.none() | st.integers(0, 7),
)
def test_rotation_is_the_trainers(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], limit: int | None, best: int | None
) -> None:
    folder = tmp_path_factory.mktemp("run")
    best_step = None if best is None else steps[best % len(steps)]
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
    path = None if best_step is None else str(folder / f"checkpoint-{best_step}")
    rotate_checkpoints(str(folder), limit, path)
    left = sorted(int(p.name.removeprefix("checkpoint-")) for p in Path(folder).iterdir())
    assert kept_steps(steps, limit, best_step) == left


@given(
    metrics=st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf]), min_size=1, max_size=6),
    greater=st.booleans(),
    strategy=st.sampled_from(["no", "steps"]),
)
def test_the_best_is_the_trainers(metrics: list[float], greater: bool, strategy: str) -> None:
    """Version 5's own comparison: a metric that is only as good as the best is no better."""
    real = transformers.TrainerState()
    arguments = SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater, save_strategy=strategy)
    trainer: Any = SimpleNamespace(args=arguments, state=real)
    sizes = {"num_train_epochs": 1, "train_batch_size": 1, "logging_steps": 1, "eval_steps": 1, "save_steps": 1}
    ours = TrainerState("5", max_steps=9, greater_is_better=greater, **sizes)
    for step, metric in enumerate(metrics, start=1):
        real.global_step = step
        ours.at(step, 0.0, 0.0, 0)
        best = transformers.Trainer._determine_best_metric(trainer, {"eval_loss": metric}, None)
        assert ours.evaluated(metric, strategy != "no") == best
        assert ours.values["best_metric"] == real.best_metric
        assert ours.values["best_global_step"] == real.best_global_step
