"""The HF Trainer's ranks are the run's, not the devices': a run goes on with another number of devices, and every
update stays the same. What the devices are given, bit by bit, and the losses and norms that they return."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import on_devices
from hf_trainer import Server
from safetensors.numpy import load_file
from test_live import same_log, same_run, train_ours
from test_meshes import laid_out
from test_processes import free_port
from test_training import GOLDEN, golden_flags
from tiny import CONFIG, make_records, run, write_json, write_model

import llama_jax.distributed.sharding
import llama_jax.run.trainer
import llama_jax.training.fit
import train_jax
from llama_jax.data.batches import Batch
from llama_jax.distributed.digest import digest
from llama_jax.distributed.sharding import make_mesh
from llama_jax.model.config import LlamaConfig
from llama_jax.plan.chips import Named
from llama_jax.plan.planner import Planner
from llama_jax.run.checkpoint import Checkpoints, read_run
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import make_job

Examples = Counter[tuple[bytes, ...]]


def examples_of(blocks: list[Batch]) -> Examples:
    """The examples in blocks, wherever they lie: ids, positions, targets, weights and padded length of each."""
    found: Examples = Counter()
    for block in blocks:
        for row, segments in enumerate(np.asarray(block.segment_ids)):
            for segment in set(segments.tolist()) - {0}:
                parts = (a[row][segments == segment] for a in block if a is not block.segment_ids)
                found[tuple(part.tobytes() for part in parts)] += 1
    return found


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Commands note the digests of states saved and restored, and the examples given to the devices for an update, by
    the number of updates before, with their micro-batches by rank; those of all evaluations by how often each was
    given."""
    noted: dict[str, Any] = {"saved": {}, "restored": {}, "examples": {}, "order": {}, "evaluated": Counter()}
    save, restore = Checkpoints.save, llama_jax.run.trainer.restore
    make_update = llama_jax.training.fit.make_update

    def saving(self: Checkpoints, step: int, state: Any, *rest: Any, **options: Any) -> None:
        noted["saved"][step] = digest(state, noted["mesh"])
        save(self, step, state, *rest, **options)

    def restoring(prepared: Any, limit: int | None) -> Any:
        run, checkpoints, state = restore(prepared, limit)
        noted["restored"][prepared.resume_step] = digest(state.saved, prepared.mesh)
        return run, checkpoints, state

    def making(mesh: Any, batches: Any, k: int) -> list[Batch]:
        blocks = make_update(mesh, batches, k)
        if batches.order.sampling == "sequential":
            noted["evaluated"] += examples_of(blocks)
        else:
            noted["examples"][k], noted["order"][k] = examples_of(blocks), batches.order.update(k)
        return blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", saving)
        patch.setattr(llama_jax.run.trainer, "restore", restoring)
        patch.setattr(llama_jax.training.fit, "make_update", making)
        yield noted


def trained(argv: list[str], out: Path, devices: int, *more: Any) -> tuple[dict[str, Any], np.ndarray, str]:
    """Train on so many devices. Returns what `watched` notes, losses and norms, and what was said."""
    with laid_out(f"fsdp={devices}") as seen, watched() as noted:
        noted["mesh"] = llama_jax.distributed.sharding.make_mesh(spec="auto")
        outcome = run(train_jax.main, *argv, "--output_dir", out, *more)
    assert outcome.code == 0, outcome.err
    return noted, np.asarray(seen), outcome.err


def logged(out: Path, after: int, key: str) -> list[float]:
    """The values of a key in the log, of updates after a number."""
    state = json.loads((out / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry and entry["step"] > after]


def flags_of(folder: Path, compat: str, packing: bool) -> list[str]:
    """The flags of a run of six updates, with evaluations and checkpoints after each two."""
    flags = {
        **{"model_name_or_path": folder / "model", "data_path": folder / "data.json", "use_cpu": True},
        **{"eval_data_path": folder / "eval.json", "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        **{"max_steps": 6, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": packing},
        **{"per_device_eval_batch_size": 3, "logging_steps": 1, "hf_compat": compat, "learning_rate": 1e-3},
        **{"adam_epsilon": 1e-4, "lr_scheduler_type": "cosine"},
    }
    return [str(part) for key, value in flags.items() for part in (f"--{key}", value)]


def resumed_on(folder: str, compat: str, packing: bool, others: tuple[int, ...] = (1, 2, 8)) -> None:
    """Begun on four devices. From update 2 on each other number, and of 1 again from update 4 on eight."""
    home = Path(folder)
    argv = flags_of(home, compat, packing)
    whole, values, _ = trained(argv, home / "whole", 4)
    assert len(values) == 6 and sorted(whole["saved"]) == [2, 4, 6]
    starts = [("whole", 2, devices, f"on-{devices}") for devices in others]
    for start, step, devices, name in [*starts, ("on-1", 4, 8, "on-1-then-8")]:
        out, checkpoint = home / name, home / start / f"checkpoint-{step}"
        now, later, said = trained(argv, out, devices, "--resume_from_checkpoint", checkpoint)
        assert f"--world_size 4: the updates of 4 device(s) of the HF Trainer; {devices} here divide the rows" in said
        assert "was made with" not in said
        if start == "whole":  # another device count rounds otherwise
            assert now["restored"] == {step: whole["saved"][step]}
        assert now["examples"] == {k: whole["examples"][k] for k in range(step, 6)}
        times = (6 - step) // 2
        assert now["evaluated"] == Counter({e: n // 3 * times for e, n in whole["evaluated"].items()})
        loss, norm = np.abs(later / values[step:] - 1).max(axis=0)
        print(f"{compat}, packing {packing}, {name}: loss {loss:.1e}, norm {norm:.1e}")
        assert loss <= 1e-6
        assert norm <= 1e-5  # the root of a sum of squares of gradients, whose own noise is some ten times a loss'
        rounding = 1e-4 * (1 + 1e-9) if compat == "4.37" else 0.0  # 4.37 logs four decimals
        for key, atol in (("loss", rounding), ("eval_loss", 0.0)):
            theirs = logged(home / "whole", step, key)
            assert len(theirs) == {"loss": 6 - step, "eval_loss": (6 - step) // 2}[key]
            np.testing.assert_allclose(logged(out, step, key), theirs, rtol=1e-6, atol=atol, err_msg=f"{name} {key}")
        assert read_run(out / "checkpoint-6")["order"]["ranks"] == 4


def write_case(folder: Path) -> None:
    """A model and records; of one in training and one in evaluation, nothing is trained, so that a rank has no mean."""
    write_model(folder / "model")
    records = make_records(19)
    records[5]["labels"] = [-100] * len(records[5]["labels"])
    write_json(folder / "data.json", records)
    write_json(folder / "eval.json", make_records(17, seed=1))


@pytest.mark.parametrize(
    ("compat", "packing", "others"),
    [
        pytest.param("4.37", True, (1, 2, 8), marks=pytest.mark.slow),
        pytest.param("5", False, (1,), marks=pytest.mark.slow),
        pytest.param("5", False, (1, 2, 8), marks=pytest.mark.proof),
        pytest.param("4.37", False, (1, 2, 8), marks=pytest.mark.proof),
        pytest.param("5", True, (1, 2, 8), marks=pytest.mark.proof),
    ],
)
def test_another_number_of_devices(compat: str, packing: bool, others: tuple[int, ...], tmp_path: Path) -> None:
    write_case(tmp_path)
    on_devices(8, f"test_elastic.resumed_on({str(tmp_path)!r}, {compat!r}, {packing}, {others})")


def test_ranks_are_the_runs(tmp_path: Path) -> None:
    """On one device: the flag decides, else the checkpoint, else the devices; another one than then is told."""
    write_case(tmp_path)
    argv = [*flags_of(tmp_path, "5", True), "--save_steps", "1", "--max_steps"]
    two = [*argv, "1", "--world_size", "2"]
    noted, _, said = trained(two, tmp_path / "out", 1)
    assert "--world_size 2: the updates of 2 device(s) of the HF Trainer; 1 here divide the rows" in said
    assert sum(noted["examples"][0].values()) == 4  # one on each rank, two micro-batches
    more = ("--resume_from_checkpoint", "True")
    noted, _, said = trained([*argv, "2"], tmp_path / "out", 1, *more)
    assert "--world_size 2" in said and sum(noted["examples"][1].values()) == 4
    noted, _, said = trained([*argv, "3"], tmp_path / "out", 1, *more, "--world_size", "1")
    assert "checkpoint-2 was made with --world_size 2, this run has 1" in said
    assert sum(noted["examples"][2].values()) == 2
    outcome = run(train_jax.main, *argv, "1", "--world_size", "2", "--explain", "json")
    assert outcome.code == 0 and json.loads(outcome.out)["ranks"] == 2
    outcome = run(train_jax.main, *argv, "1", "--world_size", "0", "--output_dir", tmp_path / "none")
    assert outcome.code == 2 and "--world_size 0: should be above 0, or left out" in outcome.err


def test_a_dry_run_of_other_ranks(tmp_path: Path) -> None:
    write_case(tmp_path)
    for flags, count in (((), 16), (("--world_size", "2"), 4)):
        outcome = run(train_jax.main, *flags_of(tmp_path, "5", True), "--dry_run", "h200:8", *flags)
        assert outcome.code == 0, outcome.err
        assert re.search(rf"^update: {count} examples in at most 1 block", outcome.out, re.M), outcome.out


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("packing", [True, False])
def test_planned_for_the_devices(devices: int, packing: bool, tmp_path: Path) -> None:
    """A device has room for its own share of the largest update, not for that of a rank."""
    write_case(tmp_path)
    args = parse_arguments(flags_of(tmp_path, "5", packing))
    mesh = make_mesh([Named(i, "cpu", "cpu") for i in range(devices)])
    job = make_job(args, LlamaConfig.from_hf(CONFIG), lambda: tmp_path, 4, True)
    planner = Planner(job, mesh, "cpu", dtype="float32", scan_layers=False)
    option = planner.options(2**40)[0]
    lengths, order = job.examples.lengths, job.order
    longest, update = max(lengths), max(sum(lengths[order.examples_of(k)]) for k in range(order.updates))
    share = max(update / devices, longest) * 9 // 8 if packing else math.ceil(4 / devices) * longest
    assert share <= option.max_tokens <= share + 1
    plan = planner.make(option)
    assert all(rows % devices == 0 for rows, _ in plan.batches.shapes)
    np.testing.assert_array_equal(plan.batches.block_counts, 1 if packing else np.diff(order.bounds))


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["4.37", "5"])
def test_two_ranks_of_the_real_trainer(compat: str, tmp_path: Path) -> None:
    """Two processes of the real Trainer, with DDP; ours on one device. A rank's micro-batch has nothing to learn."""
    write_case(tmp_path)
    argv = flags_of(tmp_path, compat, True)
    theirs = "max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate adam_epsilon save_steps "
    theirs += "lr_scheduler_type logging_steps eval_strategy eval_steps per_device_eval_batch_size"
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    spelled = [word for name in theirs.split() for word in (f"--{name}", given[f"--{name}"])]
    if compat == "4.37":
        spelled[spelled.index("--eval_strategy")] = "--evaluation_strategy"
    spec = {"argv": [*spelled, "--save_strategy", "no"], "model": str(tmp_path / "model")}
    spec |= {"data": str(tmp_path / "data.json"), "eval_data": str(tmp_path / "eval.json")}
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Server(compat, place | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    with ThreadPoolExecutor(2) as pool:  # they wait for one another
        asked = [pool.submit(s.train, spec | {"output_dir": str(tmp_path / f"hf{r}")}) for r, s in enumerate(ranks)]
        answers = [answer.result() for answer in asked]
    for server in ranks:
        server.close()
    assert not [a for a in answers if "error" in a], answers
    more = ("--world_size", "2", "--save_strategy", "no")
    with watched() as noted:
        ours = train_ours([*argv, "--output_dir", str(tmp_path / "ours"), *more], tmp_path / "ours")
    updates = zip(*(a["order"] for a in answers), strict=True)
    order = [[[rank.tolist() for rank in micro] for micro in noted["order"][k]] for k in range(6)]
    assert order == [[[*micro] for micro in zip(*update, strict=True)] for update in updates]
    assert any(not np.isfinite(a["micro_losses"]).all() for a in answers) == (compat == "4.37")
    hf = answers[0] | {"losses": np.mean([a["losses"] for a in answers], axis=0)}
    same_run(ours, hf, load_file(hf["weights"]))
    same_log(ours, hf, compat)


def golden_on(folder: str, out: str) -> None:
    """The golden runs are of one rank."""
    case = Path(folder)
    _, values, said = trained(golden_flags(case, Path(out)), Path(out) / "two", 2, "--world_size", "1")
    assert "--world_size 1: the updates of 1 device(s) of the HF Trainer; 2 here divide the rows" in said
    gold = json.loads((case / "log.json").read_text())
    np.testing.assert_allclose(values[:, 0], gold["update_losses"], rtol=1e-5)  # as derived in test_training.py
    np.testing.assert_allclose(values[:, 1], gold["update_grad_norms"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN[:1])
def test_a_golden_run_on_two_devices(name: str, shared: Path, tmp_path: Path) -> None:
    on_devices(8, f"test_elastic.golden_on({str(shared / 'golden' / name)!r}, {str(tmp_path)!r})")
