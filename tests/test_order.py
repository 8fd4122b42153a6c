"""The order of examples against torch, accelerate and the HF Trainer themselves, and against a walk over micro-batches.

`hypothesis` draws small runs; the real Trainers, of transformers 5 in this process and of 4.37.2 in one that runs this
file, train a handful of them on a model of one number.
"""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama_jax.base.errors import InputError
from llama_jax.data import order as order_module
from llama_jax.data.order import Order, group_by_length, randperm

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler  # noqa: E402
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler  # noqa: E402
from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
COMPATS = ("4.37", "5")
GOLDEN = ["4.37-gqa-wd", "4.37-mha-accum8", "5.x-bf16", "5.x-gqa-wd", "5.x-mha-accum8"]
SEEDS = [0, 1, 42, 2**31 - 1]
BY_LENGTH = [(21, 0), (21, 42), (21, 2**31 - 1), (52002, 42)]  # examples and seed


def torch_randperm(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def epochs_of(order: Order, epochs: int) -> list[list[int]]:
    """The examples of each epoch of an order on one rank, in order."""
    batches = order.batches_per_epoch
    return [
        [int(i) for m in range(e * batches, (e + 1) * batches) for rank in order.micro_batch(m) for i in rank]
        for e in range(epochs)
    ]


# --- permutations ---


@pytest.mark.parametrize("seed", [*SEEDS, 2**32 - 1, 2**32 + 7, 2**63 - 1])
@pytest.mark.parametrize("n", [1, 2, 5, 21, 1000, 52002, 70000])
def test_randperm_is_torchs(n, seed):
    got = randperm(n, seed)
    assert got.dtype == np.int64
    assert got.tolist() == torch_randperm(n, seed)


@given(n=st.integers(0, 400), seed=st.integers(0, 2**63 - 1), draws=st.sampled_from([1, 7, order_module.DRAWS]))
def test_randperm_is_torchs_for_any_seed(monkeypatch, n, seed, draws):
    """However many of its swaps are made at a time."""
    monkeypatch.setattr(order_module, "DRAWS", draws)
    assert randperm(n, seed).tolist() == torch_randperm(n, seed)


def test_a_permutation_takes_no_python_number_an_example():
    """8 bytes each, twice while it begins; a list of numbers would be 40."""
    n = 300_000
    tracemalloc.start()
    try:
        randperm(n, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * n + 8_000_000, f"{peak / n:.0f} bytes an example"


def test_the_first_examples_of_the_seeds_command():
    """Observed in the Trainer: 52,002 examples, seed 42."""
    assert randperm(52002, 42)[:5].tolist() == [7674, 32279, 38878, 9568, 38952]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("data_seed", [None, 0, 7])
def test_5_permutes_by_seed_and_epoch(seed, data_seed):
    order = Order(21, 1, 1, 4, "5", seed, data_seed)
    first = seed if data_seed is None else data_seed
    assert epochs_of(order, 4) == [torch_randperm(21, first + e) for e in range(4)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("data_seed", [None, 0, 7])
def test_5_permutes_as_accelerates_sampler(seed, data_seed):
    """Made after the Trainer has seeded torch, as the Trainer makes it."""
    torch.manual_seed(seed)
    sampler = SeedableRandomSampler(data_source=range(21), data_seed=data_seed, generator=None)
    expected = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert epochs_of(Order(21, 1, 1, 4, "5", seed, data_seed), 4) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [5, 21, 1000])
def test_437_draws_twice_an_epoch_from_one_generator(n, seed):
    """The loader's base seed, which nothing uses, then the sampler's."""
    generator = torch.Generator().manual_seed(seed)
    expected = []
    for _ in range(5):
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        drawn = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        expected.append(torch_randperm(n, drawn))
    assert epochs_of(Order(n, 1, 1, 5, "4.37", seed, data_seed=9), 5) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_437_permutes_as_torchs_loader(seed):
    """The loader that Trainer 4.37 iterates once an epoch, after seeding torch: no generator is passed."""
    torch.manual_seed(seed)
    loader = DataLoader(range(21), batch_size=4, sampler=RandomSampler(range(21)))
    expected = [[batch.tolist() for batch in loader] for _ in range(4)]
    order = Order(21, 4, 1, 4, "4.37", seed)
    got = [[order.micro_batch(6 * e + b)[0].tolist() for b in range(6)] for e in range(4)]
    assert got == expected


def test_the_first_examples_of_437():
    """Observed in Trainer 4.37: 21 examples, seed 42."""
    first, second = epochs_of(Order(21, 1, 8, 2, "4.37"), 2)
    assert first[:8] == [1, 10, 15, 4, 18, 17, 3, 14]
    assert second[:8] == [4, 20, 6, 14, 1, 16, 5, 3]


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize(("n", "seed"), BY_LENGTH)
def test_by_length_as_the_sampler_itself(n, seed, compat, of_437):
    """Of both versions; N = 21 makes mega-batches of one batch, 52,002 of fifty."""
    expected = real_epochs(n, seed) if compat == "5" else of_437["epochs"][str([n, seed])]
    order = Order(n, 1, 8, 2, compat, seed, data_seed=5, sampling="group_by_length", lengths=lengths_of(n))
    assert epochs_of(dataclasses.replace(order, evaluated=(1,)), 2) == expected


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=120), batch=st.integers(1, 20), seed=st.integers(0, 9))
def test_grouping_is_the_samplers(lengths, batch, seed):
    """With many ties, whose order counts."""
    sampler = LengthGroupedSampler(batch, lengths=lengths, generator=torch.Generator().manual_seed(seed))
    got = group_by_length(randperm(len(lengths), seed), np.asarray(lengths, np.uint16), batch)
    assert got.tolist() == list(sampler)


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("seed", SEEDS)
def test_in_order(compat, seed):
    assert epochs_of(Order(21, 2, 3, 3, compat, seed, sampling="sequential", evaluated=(1, 2)), 3) == [[*range(21)]] * 3


@pytest.mark.parametrize("seed", [0, 42, 2**31 - 1])
@pytest.mark.parametrize("n", [21, 52002])
def test_evaluations_move_the_later_epochs_of_437(n, seed):
    """Before the first epoch, in its midst, and twice in the second's."""
    torch.manual_seed(seed)
    expected = []
    for evaluations in (1, 1, 2):
        for _ in range(evaluations):
            next(iter(DataLoader([0])))
        expected.append(next(iter(DataLoader(range(n), n, sampler=RandomSampler(range(n)), collate_fn=list))))
    order = Order(n, 1, n // 3, 3, "4.37", seed)
    assert epochs_of(dataclasses.replace(order, evaluated=(0, 1, 4, 5)), 3) == expected
    assert epochs_of(order, 3) != expected


@pytest.mark.parametrize("case", GOLDEN)
def test_the_golden_runs_consumed_these_examples(shared, case):
    """Every index of every micro-batch of runs of the real Trainers, and where their updates ended."""
    folder = shared / "golden" / case
    arguments = json.loads((folder / "arguments.json").read_text())
    flags, golden = arguments["flags"], json.loads((folder / "order.json").read_text())
    order = Order(
        len(json.loads((folder / "data.json").read_text())),
        int(flags["per_device_train_batch_size"]),
        int(flags["gradient_accumulation_steps"]),
        float(flags["num_train_epochs"]),
        "4.37" if arguments["hf_version"].startswith("4.37") else "5",
        int(flags["seed"]),
    )
    updates = [[micro[0].tolist() for micro in order.update(k)] for k in range(order.updates)]
    assert [len(update) for update in updates] == golden["micro_batches_per_update"]
    assert [micro for update in updates for micro in update] == golden["micro_batches"]


# --- bounds of updates ---


class Walk(NamedTuple):
    """What a loop over micro-batches sees: the ends of updates in the running count, and how many updates were done at
    the end of each epoch, the one that the run stops in included."""

    ends: list[int]
    epoch_ends: list[int]


def walk(batches: int, accumulation: int, epochs: float, max_steps: int, compat: str) -> Walk:
    """Section 3 of the facts, one micro-batch at a time."""
    per_epoch = max(1, batches // accumulation if compat == "4.37" else math.ceil(batches / accumulation))
    total = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    looped = math.ceil(total / per_epoch) if max_steps > 0 else math.ceil(epochs)
    ends, epoch_ends, running = [], [], 0
    for _ in range(looped):
        for batch in range(1, batches + 1):
            running += 1
            if compat == "4.37":
                boundary = running % accumulation == 0 or (batches <= accumulation and batch == batches)
            else:
                boundary = batch % accumulation == 0 or batch == batches
            if boundary:
                ends.append(running)
                if len(ends) == total:
                    return Walk(ends, [*epoch_ends, total])
        epoch_ends.append(len(ends))
    raise AssertionError(f"the epochs are over before {total} updates")


runs = st.fixed_dictionaries(
    {
        "examples": st.integers(1, 60),
        "per_device_batch": st.integers(1, 5),
        "accumulation": st.integers(1, 12) | st.integers(13, 100),
        "epochs": st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 2.7, 3.0, 7.0]),
        "compat": st.sampled_from(COMPATS),
        "max_steps": st.just(-1) | st.integers(1, 40),
        "ranks": st.integers(1, 4),
        "drop_last": st.booleans(),
    }
)


def batches_an_epoch(run: dict[str, Any]) -> int:
    batch = run["per_device_batch"] * run["ranks"]
    return run["examples"] // batch if run["drop_last"] else math.ceil(run["examples"] / batch)


@settings(max_examples=400)
@given(run=runs)
def test_updates_end_where_a_walk_ends_them(run):
    batches = batches_an_epoch(run)
    assume(batches > 0)
    expected = walk(batches, run["accumulation"], run["epochs"], run["max_steps"], run["compat"])
    order = Order(**run)
    assert order.batches_per_epoch == batches
    assert order.updates == len(expected.ends)
    assert order.bounds.tolist() == [0, *expected.ends]
    for k, end in enumerate(expected.ends, start=1):
        assert len(order.update(k - 1)) == end - [0, *expected.ends][k - 1]
        assert order.epoch_at(k) == pytest.approx(end / batches, rel=1e-12)


@settings(max_examples=150)
@given(run=runs)
def test_an_epoch_ends_after_its_last_micro_batch_and_where_the_run_stops(run):
    """`on_epoch_end` of the Trainer, which saves and logs by the epoch, comes after the last update too."""
    batches = batches_an_epoch(run)
    assume(batches > 0)
    expected = walk(batches, run["accumulation"], run["epochs"], run["max_steps"], run["compat"])
    assert Order(**run).epoch_ends() == set(expected.epoch_ends)


def simulate(run: dict[str, Any], evaluated: set[int]) -> list[list[int]]:
    """The micro-batches of a run on one rank: torch's own loaders, which share its global generator."""
    n, batch, accumulation = run["examples"], run["per_device_batch"], run["accumulation"]
    batches = batches_an_epoch(run)
    ends = walk(batches, accumulation, run["epochs"], run["max_steps"], run["compat"]).ends
    make: Callable[[], Any] = {
        "sequential": lambda: SequentialSampler(range(n)),
        "group_by_length": lambda: LengthGroupedSampler(batch * accumulation, lengths=lengths_of(n).tolist()),
        "random": lambda: (
            RandomSampler(range(n)) if run["compat"] == "4.37" else SeedableRandomSampler(data_source=range(n))
        ),
    }[run["sampling"]]
    torch.manual_seed(run["seed"])
    loader = DataLoader(range(n), batch, sampler=make(), drop_last=run["drop_last"], collate_fn=list)

    def evaluate(done: int) -> None:
        if done in evaluated:
            next(iter(DataLoader([0, 1, 2], batch_size=2)))

    def micro_batches() -> Iterator[list[int]]:
        epoch = 0
        while True:
            if isinstance(loader.sampler, SeedableRandomSampler):
                loader.sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    seen = []
    source = micro_batches()
    evaluate(0)
    for m in range(1, ends[-1] + 1):
        seen.append(next(source))
        if m in ends:
            evaluate(ends.index(m) + 1)
    return seen


@settings(max_examples=100)
@given(
    run=runs,
    sampling=st.sampled_from(["random", "sequential", "group_by_length"]),
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_a_run_consumes_what_torchs_generator_gives(run, sampling, seed, data):
    """Evaluations anywhere: they move the epochs that are drawn from the global generator, and no others."""
    run = {**run, "ranks": 1, "sampling": sampling, "seed": seed}
    assume(batches_an_epoch(run) > 0)
    order = Order(**run, lengths=lengths_of(run["examples"]))
    evaluated = data.draw(st.sets(st.integers(0, order.updates)))
    order = dataclasses.replace(order, evaluated=tuple(evaluated))
    assert [m[0].tolist() for k in range(order.updates) for m in order.update(k)] == simulate(run, evaluated)


def test_the_facts_tell_of_evaluations_where_they_move_the_order():
    """16 micro-batches an epoch, four updates: 4 of them done when the second epoch begins, 8 when the third."""
    chain = Order(16, 1, 4, 3, "4.37", evaluated=(0, 4, 6, 12))
    by_length = dataclasses.replace(chain, sampling="group_by_length", compat="5", lengths=lengths_of(16))
    for order in (chain, by_length):
        facts = json.loads(json.dumps(order.facts()))
        assert (facts["sampling"], facts["evaluations_before_epoch"]) == (order.sampling, [1, 2, 3])
        for harmless in ((), (12,), (9, 12)):
            assert dataclasses.replace(order, evaluated=harmless).facts()["evaluations_before_epoch"] == []
    for still in ({"compat": "5"}, {"sampling": "sequential"}):
        order = dataclasses.replace(chain, **still)
        assert order.facts() == dataclasses.replace(order, evaluated=()).facts()
    assert {"bounds", "lengths", "evaluated"}.isdisjoint(chain.facts())


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("max_steps", [-1, 3])
def test_an_epoch_without_a_micro_batch_is_refused(compat, max_steps):
    with pytest.raises(InputError, match="3 examples do not fill one micro-batch of 4"):
        Order(3, 4, 2, 1, compat, max_steps=max_steps, drop_last=True)


@pytest.mark.parametrize(
    ("compat", "ranks", "updates", "micro_batches"),
    [
        ("4.37", 1, 6500, 52000),
        ("5", 1, 6501, 52002),
        ("4.37", 2, 3250, 26000),
        ("5", 2, 3251, 26001),
        ("4.37", 4, 1625, 13000),
        ("5", 4, 1626, 13001),
        ("4.37", 8, 812, 6496),
        ("5", 8, 813, 6501),
    ],
)
def test_the_numbers_of_the_seeds_command(compat, ranks, updates, micro_batches):
    order = Order(52002, 1, 8, 1, compat, ranks=ranks)
    assert (order.updates, order.updates_per_epoch, order.bounds[-1]) == (updates, updates, micro_batches)
    last = order.update(updates - 1)
    assert len(last) == (8 if compat == "4.37" else micro_batches % 8)
    if ranks == 1:
        seen = np.concatenate([m[0] for k in range(updates) for m in order.update(k)])
        assert seen.tolist() == (torch_randperm(52002, 42)[:micro_batches] if compat == "5" else seen.tolist())
        assert len(set(seen.tolist())) == micro_batches


class OneNumber(torch.nn.Module):
    """A model that notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[bool, list[list[int]]] = {True: [], False: []}  # in training, in evaluation

    def forward(self, x: Any, labels: Any) -> dict[str, Any]:
        self.seen[self.training].append(x.tolist())
        return {"loss": (self.weight * x).sum(), "logits": x}


class Notes(transformers.TrainerCallback):
    def __init__(self, model: OneNumber) -> None:
        self.model = model
        self.ends: list[int] = []
        self.epochs: list[float] = []
        self.epoch_ends: list[int] = []
        self.evaluated: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(len(self.model.seen[True]))
        self.epochs.append(state.epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_ends.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.global_step)


# Examples, flags (5's names), examples to evaluate on.
RUNS: list[tuple[int, dict[str, Any], int]] = [
    (10, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}, 0),
    (21, {"gradient_accumulation_steps": 8, "num_train_epochs": 1.5, "seed": 7}, 0),
    (13, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 11, "data_seed": 0}, 0),
    (7, {"gradient_accumulation_steps": 20, "num_train_epochs": 3}, 0),
    (11, {"per_device_train_batch_size": 4, "dataloader_drop_last": True, "num_train_epochs": 2.2, "data_seed": 5}, 0),
    (9, {"per_device_train_batch_size": 50, "max_steps": 2, "seed": 3}, 0),
    (16, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 0.4}, 0),
    # Evaluations at ends of epochs, with a tail that carries over; in the midst of epochs; at updates that are both.
    (21, {"gradient_accumulation_steps": 8, "num_train_epochs": 4, "eval_strategy": "epoch"}, 5),
    (21, {"gradient_accumulation_steps": 4, "num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 1}, 5),
    (16, {"gradient_accumulation_steps": 4, "num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 4}, 3),
    (7, {"gradient_accumulation_steps": 20, "eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 5}, 2),
    (12, {"num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 5, "eval_delay": 7, "data_seed": 1}, 4),
    (  # saving and the best model's return draw nothing
        21,
        {
            **{"gradient_accumulation_steps": 8, "num_train_epochs": 4, "eval_strategy": "steps", "eval_steps": 1},
            **{"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True},
        },
        3,
    ),
    # By length: fewer than four batches, more; evaluated, too.
    (21, {"gradient_accumulation_steps": 8, "train_sampling_strategy": "group_by_length", "data_seed": 3}, 0),
    (61, {"per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length", "seed": 2**31 - 1}, 0),
    (
        45,
        {
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 4, "seed": 0},
            **{"train_sampling_strategy": "group_by_length", "eval_strategy": "epoch", "data_seed": 8},
        },
        25,
    ),
]
ONLY_5: list[tuple[int, dict[str, Any], int]] = [
    (21, {"gradient_accumulation_steps": 4, "train_sampling_strategy": "sequential"}, 0),
    (21, {"train_sampling_strategy": "group_by_length", "eval_strategy": "epoch", "eval_on_start": True}, 9),
]


def lengths_of(n: int) -> np.ndarray:
    """Lengths in tokens, many of them equal."""
    return np.random.default_rng(n).integers(1, 9 if n < 100 else 512, n)


def real_run(examples: int, changed: dict[str, Any], evaluation: int) -> dict[str, Any]:
    """What a run of the transformers at hand trained and evaluated on, and where its updates and epochs ended."""
    flags = {
        **{"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "save_strategy": "no"},
        **{"logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False},
        **changed,
    }
    if transformers.__version__.startswith("4.37"):
        flags["evaluation_strategy"] = flags.pop("eval_strategy", "no")
        flags["group_by_length"] = flags.pop("train_sampling_strategy", "random") == "group_by_length"

    def data(n: int) -> list[dict[str, Any]]:
        return [{"x": i, "input_ids": [0] * int(length)} for i, length in enumerate(lengths_of(n))]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        x = torch.tensor([example["x"] for example in batch])
        return {"x": x, "labels": x}

    model = OneNumber()
    notes = Notes(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(folder, use_cpu=True, **flags)
        trainer = transformers.Trainer(
            model, arguments, collate, data(examples), data(evaluation) if evaluation else None, callbacks=[notes]
        )
        trainer.train()
    fields = {name: getattr(notes, name) for name in ("ends", "epochs", "epoch_ends", "evaluated")}
    return {"trained_on": model.seen[True], "evaluated_on": model.seen[False], **fields}


def real_epochs(n: int, seed: int) -> list[list[int]]:
    """Two epochs of n examples by length, in batches of 8, after an evaluation before the second."""
    torch.manual_seed(seed)
    sampler = LengthGroupedSampler(8, lengths=lengths_of(n).tolist())
    loader = DataLoader(range(n), batch_size=n, sampler=sampler, collate_fn=list)
    first = next(iter(loader))
    next(iter(DataLoader([0])))
    return [first, next(iter(loader))]


@pytest.fixture(scope="module")
def of_437() -> dict[str, Any]:
    """All the runs of the real Trainer 4.37, in one process of this file."""
    done = subprocess.run(
        [sys.executable, __file__], env=reference.environment("4.37", ROOT), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Real(NamedTuple):
    """A run of a real Trainer, and our order of it."""

    order: Order
    run: dict[str, Any]
    flags: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[("5", run) for run in RUNS + ONLY_5] + [("4.37", run) for run in RUNS],
    ids=lambda param: f"{param[0]}: {' '.join(map(str, param[1][1].values()))}",
)
def real(request) -> Real:
    compat, (examples, flags, evaluation) = request.param
    if compat == "5":
        run = real_run(examples, flags, evaluation)
    else:
        run = request.getfixturevalue("of_437")["runs"][RUNS.index(request.param[1])]
    order = Order(
        examples,
        flags.get("per_device_train_batch_size", 1),
        flags.get("gradient_accumulation_steps", 1),
        flags.get("num_train_epochs", 3.0),
        compat,
        flags.get("seed", 42),
        flags.get("data_seed"),
        flags.get("max_steps", -1),
        drop_last=flags.get("dataloader_drop_last", False),
        sampling=flags.get("train_sampling_strategy", "random"),
        lengths=lengths_of(examples),
    )
    return Real(dataclasses.replace(order, evaluated=tuple(run["evaluated"])), run, flags)


def test_the_trainer_itself_trains_on_the_same_examples(real):
    order, run, flags = real
    assert [m[0].tolist() for k in range(order.updates) for m in order.update(k)] == run["trained_on"]
    assert order.bounds.tolist() == [0, *run["ends"]]
    assert bool(run["evaluated"]) == ("eval_strategy" in flags)


def test_the_trainer_itself_counts_the_same_epochs(real):
    order, run, _ = real
    assert [order.epoch_at(k) for k in range(1, order.updates + 1)] == pytest.approx(run["epochs"], rel=1e-12)


def test_the_trainer_itself_ends_epochs_at_the_same_updates(real):
    order, run, _ = real
    assert order.epoch_ends() == set(run["epoch_ends"])


def test_the_trainer_itself_evaluates_in_this_order(real):
    """In order; 5 by length where it trains by length, each time from a generator seeded with the data's seed."""
    order, run, _ = real
    if not run["evaluated"]:
        assert run["evaluated_on"] == []
        return
    n = len({i for batch in run["evaluated_on"] for i in batch})
    each = np.arange(n)
    if (order.compat, order.sampling) == ("5", "group_by_length"):
        seed = order.seed if order.data_seed is None else order.data_seed
        each = group_by_length(randperm(n, seed), lengths_of(n), 2)
    batches = [each[i : i + 2].tolist() for i in range(0, n, 2)]
    assert run["evaluated_on"] == batches * len(run["evaluated"])


# --- ranks ---


@settings(max_examples=150)
@given(
    examples=st.integers(1, 60),
    batch=st.integers(1, 6),
    ranks=st.integers(1, 6),
    drop_last=st.booleans(),
    compat=st.sampled_from(COMPATS),
    seed=st.integers(0, 5),
    sampling=st.sampled_from(["random", "sequential", "group_by_length"]),
)
def test_ranks_get_what_accelerate_deals_them(examples, batch, ranks, drop_last, compat, seed, sampling):
    """Batches in turn; the tail is topped up from the start of the epoch (`even_batches`). One rank alone is not topped
    up: accelerate does not wrap its sampler."""
    assume(not drop_last or examples >= batch * ranks)
    lengths = lengths_of(examples)
    dealing = {"ranks": ranks, "drop_last": drop_last, "sampling": sampling, "lengths": lengths}
    order = Order(examples, batch, 2, 2, compat, seed, **dealing)
    torch.manual_seed(seed)
    by_length = DataLoader(range(examples), sampler=LengthGroupedSampler(2 * batch, lengths=lengths.tolist()))
    for epoch in range(2):
        if sampling == "random":
            drawn = torch.Generator().manual_seed(seed)
            numbers = [torch.empty((), dtype=torch.int64).random_(generator=drawn) for _ in range(2 * epoch + 2)]
            permuted = torch_randperm(examples, seed + epoch if compat == "5" else int(numbers[-1]))
        else:  # mega-batches are of one rank's update
            permuted = list(range(examples)) if sampling == "sequential" else [int(i) for i in by_length]
        whole = BatchSampler(permuted, batch, drop_last)
        for rank in range(ranks):
            dealt = BatchSamplerShard(whole, ranks, rank, even_batches=True) if ranks > 1 else whole
            first = epoch * order.batches_per_epoch
            got = [order.micro_batch(first + b)[rank].tolist() for b in range(order.batches_per_epoch)]
            assert got == list(dealt)
            assert len(dealt) == order.batches_per_epoch


@settings(max_examples=100)
@given(run=runs)
def test_every_rank_trains_on_as_many_examples(run):
    assume(batches_an_epoch(run) > 0)
    order = Order(**run)
    for k in range(order.updates):
        for micro in order.update(k):
            assert len(micro) == run["ranks"]
            assert len({len(rank) for rank in micro}) == 1
            assert all(0 <= i < run["examples"] for rank in micro for i in rank)


@pytest.mark.slow
@settings(max_examples=500)
@given(run=runs, seed=st.integers(0, 9))
def test_what_is_asked_of_all_updates_at_once_is_what_each_one_says(run, seed):
    """Sums over updates, over all their micro-batches and the largest of each, over any groups of them."""
    assume(batches_an_epoch(run) > 0)
    order, rng = Order(**run), np.random.default_rng(seed)
    values = rng.integers(1, 99, run["examples"])
    micro_batches = [[int(i) for rank in order.micro_batch(m) for i in rank] for m in range(order.bounds[-1])]
    for k in range(order.updates):
        assert order.examples_of(k).tolist() == [int(i) for micro in order.update(k) for rank in micro for i in rank]
    cuts = rng.choice(np.arange(1, order.bounds[-1] + 1), rng.integers(0, order.bounds[-1]), replace=False)
    groups = np.asarray([0, *np.unique([*cuts, order.bounds[-1]])])
    for bounds in (order.bounds, np.arange(order.bounds[-1] + 1), groups):
        for ufunc, plain in ((np.add, sum), (np.maximum, max)):
            expected = [
                plain(values[i] for m in micro_batches[start:end] for i in m)
                for start, end in itertools.pairwise(bounds)
            ]
            assert order.reduce(ufunc, values, bounds).tolist() == expected


@given(run=runs, data=st.data())
def test_an_update_is_a_function_of_its_number(run, data):
    """Asked for in any order, by another object: the same."""
    assume(batches_an_epoch(run) > 0)
    first, second = Order(**run), Order(**run)
    expected = [[[rank.tolist() for rank in micro] for micro in first.update(k)] for k in range(first.updates)]
    for k in data.draw(st.permutations(range(first.updates))):
        assert [[rank.tolist() for rank in micro] for micro in second.update(k)] == expected[k]


if __name__ == "__main__":  # as `of_437` runs it
    epochs = {str([n, seed]): real_epochs(n, seed) for n, seed in BY_LENGTH}
    print(json.dumps({"runs": [real_run(*run) for run in RUNS], "epochs": epochs}))
