"""Runs handed over between the real HF Trainer, of transformers 4.37.2 and of 5, and `train_jax.py`, both ways.

The Trainer makes a run with checkpoints, then resumes one of them; `train_jax.py` resumes the same one. `same_run` and
`same_log` of test_live.py compare the two: losses, norms, rates, weights, log.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import getstate as random_state
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from forks import on_devices
from hf_trainer import Server
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_adapters import settings_of, words
from test_live import (
    ACCUMULATED,
    COMPATS,
    Bench,
    Flags,
    Ours,
    drawn,
    records_of,
    same_log,
    same_run,
    spelled,
    train_ours,
)
from test_processes import free_port
from tiny import CONFIG, SISTERS, drawn_cases, make_arrays, run, write_json, write_model

import convert_torch_to_flax
import train_jax
from llama_jax.base.errors import InputError
from llama_jax.data.order import Order, Resumed, generator_after
from llama_jax.hf.trainer_checkpoint import read_generator, read_trainer_checkpoint
from llama_jax.hf.trainer_writer import write_generators
from llama_jax.reporting.comparison import read_log
from llama_jax.reporting.page import as_page
from llama_jax.reporting.trainer_state import TrainerState


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("handover")
    servers = {compat: Server(compat) for compat in COMPATS}
    yield Bench(servers, folder, write_model(folder / "model"))
    for server in servers.values():
        server.close()


SAVED: Flags = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


class Began:
    """A run of the Trainer with a checkpoint after each update. `flags` are by 5's names."""

    def __init__(
        self,
        bench: Bench,
        compat: str,
        folder: Path,
        flags: Flags,
        count: int,
        masked: tuple[int, ...] = (),
        adapter: Flags | None = None,
        more: dict[str, Any] | None = None,
    ):
        self.bench, self.compat, self.folder, self.flags = bench, compat, folder, flags
        self.adapter, self._more = (
            adapter,
            (more or {}) | ({"peft": settings_of(adapter), "attn": "eager"} if adapter else {}),
        )
        data, eval_data = write_json(folder / "data.json", records_of(count, masked)), folder / "eval.json"
        write_json(eval_data, records_of(7, ()))
        self._spec: dict[str, Any] = {"model": str(bench.model), "data": str(data)}
        if flags.get("eval_strategy", "no") != "no":
            self._spec["eval_data"] = str(eval_data)
        self.whole = self.theirs("hf", {**flags, **SAVED})
        self.updates = len(self.whole["losses"])

    def theirs(self, name: str, flags: Flags, **more: Any) -> dict[str, Any]:
        argv = spelled(self.compat, flags)
        spec = {**self._spec, "argv": argv, "output_dir": str(self.folder / name), **self._more, **more}
        hf = self.bench.servers[self.compat].train(spec)
        assert "error" not in hf, hf
        return hf

    def argv(self, name: str, flags: Flags) -> list[str]:
        files = {"data": "--data_path", "eval_data": "--eval_data_path"}
        data = [x for key, flag in files.items() if key in self._spec for x in (flag, self._spec[key])]
        out = ["--output_dir", str(self.folder / name), "--use_cpu", "True", "--hf_compat", self.compat]
        adapter = words({"use_peft": True, **self.adapter}) if self.adapter else []
        return ["--model_name_or_path", str(self.bench.model), *data, *out, *adapter, *spelled(self.compat, flags)]

    def checkpoint(self, done: int) -> Path:
        return self.folder / "hf" / f"checkpoint-{done}"

    def compare(
        self, done: int, flags: Flags | None = None, apart: tuple[str, ...] = (), checkpoint: Path | None = None
    ) -> dict[str, Any]:
        """Resume after so many updates in both, perhaps by other flags, or from a checkpoint that is not the run's own;
        assert that they do the same, but for the keys `apart` of trainer_state.json, and return what the Trainer did.
        """
        hf, ours, weights = self.resumed(done, flags, checkpoint)
        (same_8_bits if "8bit" in {**self.flags, **(flags or {})}.get("optim", "") else same_run)(ours, hf, weights)
        for key in apart:
            del ours.state[key], hf["state"][key]
        same_log(ours, hf, self.compat)
        return hf

    def resumed(
        self, done: int, flags: Flags | None = None, checkpoint: Path | None = None
    ) -> tuple[dict[str, Any], Ours, dict[str, np.ndarray]]:
        """What both do after so many updates, and the Trainer's last weights."""
        checkpoint = checkpoint or self.checkpoint(done)
        flags = {**self.flags, **(flags or {}), **SAVED}
        print(self.compat, "after", done, "of", self.updates, "with", *spelled(self.compat, flags))
        hf = self.theirs(f"hf-{done}", flags, resume=str(checkpoint))
        assert len(hf["losses"]) == hf["state"]["max_steps"] - done
        out = self.folder / f"ours-{done}"
        argv = [*self.argv(out.name, flags), "--resume_from_checkpoint", str(checkpoint)]
        ours = train_ours(argv, out, first=done)
        weights = f"hf-{done}/adapter/adapter_model.safetensors" if self.adapter else f"hf-{done}/final.safetensors"
        return hf, ours, load_file(self.folder / weights)


def same_8_bits(ours: Ours, hf: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """As in test_live.py: where a last bit turns a code, a weight moves by a share of a step."""
    np.testing.assert_allclose(ours.losses, hf["losses"], rtol=1e-5)
    for name, expected in weights.items():
        apart = np.abs(ours.weights[name] - expected)
        assert apart.max() <= 1e-4 and (apart > 1e-6).mean() <= 0.01, (name, apart.max(), (apart > 1e-6).mean())


# -- Of files ---------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, done: int = 7) -> tuple[Path, Any, Any]:
    """A model, its records, and a checkpoint of it as the Trainer of transformers 5 writes one, its moments drawn.
    Returns the checkpoint, and torch's model and optimizer as the Trainer makes them of it."""
    import torch
    import transformers

    write_model(folder / "model")
    write_json(folder / "data.json", records_of(6, ()))
    checkpoint = write_model(folder / f"checkpoint-{done}", arrays=make_arrays(CONFIG, seed=1))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    random = torch.Generator().manual_seed(3)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.5}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups["norm" in name]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-4)
    for group in groups:
        for parameter in group["params"]:
            first, second = (torch.randn(parameter.shape, generator=random) * 1e-2 for _ in range(2))
            state = {"step": torch.tensor(float(done)), "exp_avg": first, "exp_avg_sq": second**2}
            optimizer.state[parameter] = state
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    torch.save({**schedule.state_dict(), "last_epoch": done}, checkpoint / "scheduler.pt")
    rng = {"python": random_state(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(rng, checkpoint / "rng_state.pth")
    state = {"global_step": done, "epoch": 1.0 * done, "max_steps": done + 1, "total_flos": 0.0}
    state["log_history"] = [{"step": 3, "by_hand": ["NaN", None, {}]}]
    state |= {"stateful_callbacks": {}}
    write_json(checkpoint / "trainer_state.json", state)
    return checkpoint, model, optimizer


def resume(folder: Path, checkpoint: Path, **flags: Any) -> Any:
    """Resume the checkpoint of `write_checkpoint` for one more update, of all records."""
    paths = {"model_name_or_path": folder / "model", "data_path": folder / "data.json", "output_dir": folder / "out"}
    flags = {"use_cpu": True, "hf_compat": 5, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **paths, **flags}
    flags = {"per_device_train_batch_size": 6, "max_steps": 8, "save_strategy": "no", "max_grad_norm": 0.0, **flags}
    flags["logging_steps"] = 1
    return run(train_jax.main, *words(flags), "--resume_from_checkpoint", checkpoint)


def test_the_next_update_is_torchs(tmp_path: Path) -> None:
    """Weights as in test_live.py's `same_run`: a gradient's error of 1.5e-8 is divided by epsilon, 1e-4 at the least,
    and multiplied by the rate 1e-2: 1.5e-6."""
    import torch

    checkpoint, model, optimizer = write_checkpoint(tmp_path)
    records = json.loads((tmp_path / "data.json").read_text())
    width, trained = max(len(r["input_ids"]) for r in records), sum(x != -100 for r in records for x in r["labels"][1:])
    ids = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in records])
    labels = torch.tensor([r["labels"] + [-100] * (width - len(r["labels"])) for r in records])
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=trained).loss
    loss.backward()
    optimizer.step()
    outcome = resume(tmp_path, checkpoint)
    assert outcome.code == 0, outcome.err
    for flag in ("--weight_decay 0.5", "--adam_beta1 0.8", "--adam_beta2 0.9", "--adam_epsilon 0.0001"):
        assert flag in outcome.err
    first, line, *_ = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert first == {"step": 3, "by_hand": ["NaN", None, {}]}
    np.testing.assert_allclose(line["loss"], loss.item(), rtol=1e-5)
    ours, expected = load_file(tmp_path / "out/model.safetensors"), model.state_dict()
    for name, array in ours.items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


FORMS: dict[str, Flags] = {
    "stacked": {"scan_layers": True},
    "moments on the host": {"offload_optimizer": True},
    "one example a row": {"packing": False},
}


def weights_of(folder: Path, out: str, **flags: Any) -> dict[str, np.ndarray]:
    outcome = resume(folder, folder / "checkpoint-7", output_dir=folder / out, **flags)
    assert outcome.code == 0, outcome.err
    return load_file(folder / out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_state(name: str, trainers: Path, tmp_path: Path) -> None:
    """Equal but for the order of sums, as in the test above."""
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    plain, found = weights_of(tmp_path, "plain"), weights_of(tmp_path, "form", **FORMS[name])
    for key, array in plain.items():
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-5, err_msg=key)


def on_a_mesh(folder: str, optim: str) -> None:
    """The checkpoint of two updates of ours that has been handed back, on eight devices with padded vocabularies."""
    flags = {"optim": optim, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    given = {"model_name_or_path": f"{folder}/model", "data_path": f"{folder}/data.json", "use_cpu": True}
    given |= {"hf_compat": 5, "per_device_train_batch_size": 3, "world_size": 1, "mesh": "fsdp=4,tensor=2", **flags}
    assert run(train_jax.main, *words({**given, "output_dir": f"{folder}/whole"})).code == 0
    argv = ["--model_name_or_path", f"{folder}/whole/checkpoint-2", "--output_dir", f"{folder}/back", "--to_hf_trainer"]
    assert run(convert_torch_to_flax.main, *argv).code == 0
    outcome = run(
        train_jax.main, *words({**given, "output_dir": f"{folder}/again", "resume_from_checkpoint": f"{folder}/back"})
    )
    assert outcome.code == 0, outcome.err
    whole, again = (load_file(f"{folder}/{name}/model.safetensors") for name in ("whole", "again"))
    for name, array in whole.items():
        np.testing.assert_allclose(again[name], array, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_on_a_mesh(optim: str, trainers: Path, tmp_path: Path) -> None:
    """There and back on eight devices, whose mesh pads the vocabulary: the same bits, but for Adafactor's means, which
    are divided by the padding and multiplied again."""
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    on_devices(8, f"test_handover.on_a_mesh({str(tmp_path)!r}, {optim!r})")


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _with(name: str) -> Any:
    return lambda folder: (folder / name).mkdir()


def _saved(change: Any, name: str = "optimizer.pt") -> Any:
    """Change what a file of torch holds."""

    def write(folder: Path) -> None:
        import torch

        value = torch.load(folder / name)
        change(value)
        torch.save(value, folder / name)

    return write


def _each(change: Any) -> Any:
    """Change the state of each parameter."""
    return _saved(lambda value: [change(state) for state in value["state"].values()])


def _set(number: int = 0, **settings: Any) -> Any:
    """Change the settings of a group of parameters."""
    return _saved(lambda value: value["param_groups"][number].update(settings))


def _only(state: Any, **values: Any) -> None:
    """Leave the step and these tensors."""
    for key in state.keys() - {"step"}:
        del state[key]
    state.update(values)


def _sgd(value: Any, **settings: Any) -> None:
    value["state"] = {}
    for group in value["param_groups"]:
        del group["betas"], group["eps"]
        group.update({"momentum": 0, "dampening": 0, "nesterov": False, **settings})


def _json(name: str = "trainer_state.json", **values: Any) -> Any:
    return lambda folder: write_json(folder / name, {**json.loads((folder / name).read_text()), **values})


def _generators(*ends: str) -> Any:
    def write(folder: Path) -> None:
        data = (folder / "rng_state.pth").read_bytes()
        (folder / "rng_state.pth").unlink()
        for end in ends:
            (folder / f"rng_state{end}.pth").write_bytes(data)

    return write


def _weights_in(dtype: str) -> Any:
    def write(folder: Path) -> None:
        arrays = load_file(folder / "model.safetensors")
        arrays = {name: array.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))) for name, array in arrays.items()}
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def _rewritten(name: str, change: Any) -> Any:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


def _whole_adapter(folder: Path) -> None:
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()


class Evil:
    """A pickle that would write a file."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {EVIL}",)


EVIL = Path(tempfile.gettempdir()) / f"llama_jax-evil-{os.getpid()}"
REFUSED: dict[str, tuple[Any, str]] = {
    "no optimizer": (_without("optimizer.pt"), "holds no optimizer.pt (of a run with save_only_model?)"),
    "no scheduler": (_without("scheduler.pt"), "holds no scheduler.pt"),
    "deepspeed": (_with("global_step7"), "/checkpoint-7 OUT --safe_serialization` (a script without this flag"),
    "fsdp's optimizer": (_with("optimizer_0"), "checkpoint-7/optimizer_0: is of FSDP's shards; merge the weights by"),
    "fsdp's ranks": (
        _with("pytorch_model_fsdp_0_rank0.bin"),
        "is of FSDP's shards of each rank, which only FSDP reads",
    ),
    "fsdp on xla": (_with("rank0-of-8-optimizer.pt"), "consolidate_sharded_ckpts; copy config.json"),
    "fsdp's whole adapter": (_whole_adapter, "with a new optimizer: --adapter_name_or_path"),
    "cut": (_rewritten("optimizer.pt", lambda data: data[: len(data) // 2]), "optimizer.pt: is damaged"),
    "no zip": (_rewritten("optimizer.pt", lambda data: b"x" * 99), "optimizer.pt: is damaged"),
    "evil": (_saved(lambda value: value.update(evil=Evil())), "it names posix.system"),
    "a parameter less": (_saved(lambda v: v["param_groups"][1]["params"].pop()), "groups hold 16 and 4 parameters"),
    "no moment": (_saved(lambda v: v["state"][3].pop("exp_avg")), "exp_avg of model.layers.0.self_attn.v_proj.weight"),
    "another shape": (
        _saved(lambda v: v["state"][0].update(exp_avg_sq=v["state"][0]["exp_avg_sq"][:258])),
        "exp_avg_sq of model.embed_tokens.weight is [258, 32], should be [259, 32]",
    ),
    "two steps": (_saved(lambda v: v["state"][0]["step"].add_(1)), "'step' differs among the parameters: [7, 8]"),
    "a momentum": (
        _saved(lambda v: v.update(state={i: {"momentum_buffer": s["exp_avg"]} for i, s in v["state"].items()})),
        "holds the state of sgd with momentum, which this program does not have",
    ),
    "moments in int8": (_each(lambda s: s.update(exp_avg=s["exp_avg"].char())), "holds exp_avg in int8"),
    "moments in two types": (
        _each(lambda s: s.update(exp_avg=s["exp_avg"].bfloat16())),
        "holds moments in bfloat16 and float32",
    ),
    "moments in bfloat16": (
        _each(lambda s: s.update(exp_avg=s["exp_avg"].bfloat16(), exp_avg_sq=s["exp_avg_sq"].bfloat16())),
        "holds moments in bfloat16: resume it with --adam_moments_dtype bfloat16",
    ),
    "weights in bfloat16": (_weights_in("bfloat16"), "holds parameters in bfloat16: resume it with --dtype bfloat16"),
    "weights in float16": (_weights_in("float16"), "its weights are in float16, in which no run goes on"),
    "lion in 8 bits": (
        _each(lambda s: _only(s, state1=s["exp_avg"].byte(), qmap1=s["step"], absmax1=s["step"])),
        "holds the state of lion_8bit or rmsprop_bnb_8bit, which this program does not have; start from the weights",
    ),
    "rmsprop": (_each(lambda s: _only(s, state1=s["exp_avg"])), "holds the state of rmsprop_bnb, which"),
    "amsgrad": (_each(lambda s: s.update(max_exp_avg_sq=s["exp_avg_sq"])), "holds the state of AdamW with amsgrad"),
    "maximize": (_set(maximize=True), "holds the state of an optimizer with maximize"),
    "momentum without state": (_saved(lambda v: _sgd(v, momentum=0.9)), "holds the state of sgd with momentum"),
    "beta1": (
        _each(lambda s: s.update(exp_avg_sq_row=s["step"], exp_avg_sq_col=s["step"], RMS=0.1)),
        "holds the state of Adafactor with beta1",
    ),
    "another optimizer": (_each(lambda s: _only(s, square_avg=s["exp_avg"])), "an optimizer with square_avg"),
    "empty": (_saved(lambda v: v.update(state={})), "has an empty state"),
    "other updates": (_each(lambda s: s["step"].fill_(9)), "counts 9 updates, and trainer_state.json 7"),
    "step inf": (_each(lambda s: s["step"].fill_(float("inf"))), "optimizer.pt: step is inf; should be a number"),
    "no groups": (_saved(lambda v: v.update(param_groups=[])), "its values are not those of the HF Trainer"),
    "text for numbers": (_set(betas=("a", "b")), "optimizer.pt: betas is 'a'; should be a number from 0 to below 1"),
    "a rate of NaN": (_set(lr=float("nan")), "optimizer.pt: lr is nan; should be a number 0 or more"),
    "no rate": (_set(lr=None), "optimizer.pt: lr is None; should be a number"),
    "a large beta": (_set(betas=(0.9, 3.0)), "optimizer.pt: betas is 3.0; should be a number from 0 to below 1"),
    "a negative decay": (_set(weight_decay=-5.0), "optimizer.pt: weight_decay is -5.0; should be a number 0 or more"),
    "no epsilon": (_set(eps="x"), "optimizer.pt: eps is 'x'; should be a number"),
    "a peak of NaN": (_saved(lambda v: v.update(base_lrs=[float("nan")]), "scheduler.pt"), "base_lrs is nan"),
    "peaks of text": (_saved(lambda v: v.update(base_lrs="x"), "scheduler.pt"), "base_lrs is 'x'; should be a list"),
    "two peaks": (_saved(lambda v: v.update(base_lrs=[1.0, 2.0]), "scheduler.pt"), "base_lrs differ among the groups"),
    "two rates": (_set(1, lr=5e-2), "lr differs among the groups of parameters, 0.01 and 0.05"),
    "two betas": (_set(1, betas=(0.1, 0.2)), "betas differs among the groups of parameters, [0.8, 0.9] and [0.1, 0.2]"),
    "two epsilons": (_set(1, eps=1e-8), "eps differs among the groups of parameters"),
    "decayed norms": (_set(1, weight_decay=0.3), "weight_decay of the second group is 0.3, and the Trainer's is 0"),
    "no quantization": (_each(lambda s: s.update(__bnb_optimizer_quant_state__=5)), "__ is no dictionary; copy"),
    "flops of text": (_json(total_flos="a"), "trainer_state.json: total_flos is 'a'; should be a number"),
    "no epoch": (_json(epoch=None), "trainer_state.json: epoch is None; should be a number"),
    "a negative batch": (_json(train_batch_size=-3), "trainer_state.json: train_batch_size is -3; should be a number"),
    "a log of numbers": (_json(log_history=[{"step": 1}, 5]), "log_history[1] is 5; should be an object with a step"),
    "another model": (_json("config.json", rms_norm_eps=1e-2), "holds another model: it has rms_norm_eps 0.01, this"),
    "a rank missing": (_generators("_1"), "holds rng_state_1.pth, which are not of one run"),
    "a gap of ranks": (_generators("_0", "_2"), "holds rng_state_0.pth, rng_state_2.pth, which are not of one run"),
    "ranks and none": (_generators("", "_0"), "holds rng_state.pth, rng_state_0.pth, which are not of one run"),
    "no progress": (_rewritten("trainer_state.json", lambda data: b"{}"), "global_step is None"),
    "no weights": (_without("model.safetensors"), "no model.safetensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, trainers: Path) -> None:
    change, said = REFUSED[name]
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "checkpoint-7")
    outcome = resume(tmp_path, tmp_path / "checkpoint-7")
    assert (outcome.code, outcome.compiled) == (2, 0), outcome.err
    assert said in outcome.err.splitlines()[-1] and outcome.err.splitlines()[-1].startswith("error: ")
    assert not EVIL.exists()


def _fsdp_shards(folder: Path, weights: Any) -> None:
    """Of SHARDED_STATE_DICT, as accelerate writes them, on one rank. The Trainer's `save_model` writes nothing then."""
    from torch.distributed import checkpoint

    with warnings.catch_warnings(action="ignore"):
        checkpoint.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    (folder / "optimizer_0").mkdir()
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()


def _fsdp_whole(folder: Path, weights: Any) -> None:
    """Of FULL_STATE_DICT."""
    import torch

    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        torch.save(weights, folder / name)


def _fsdp_whole_alone(folder: Path, weights: Any) -> None:
    """Of FULL_STATE_DICT under accelerate 0.24: the Trainer's `save_model` wrote nothing."""
    import torch

    torch.save(weights, folder / "pytorch_model_fsdp.bin")
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("write", [_fsdp_shards, _fsdp_whole, _fsdp_whole_alone])
def test_the_line_for_fsdp_leads_to_the_weights(write: Any, trainers: Path, tmp_path: Path) -> None:
    """The commands, the copies and the flags of the line start a run; a rate of 0 keeps its weights."""
    from accelerate.commands import merge
    from safetensors.torch import load_file as load_torch

    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / "checkpoint-7"
    expected = load_file(checkpoint / "model.safetensors")
    (checkpoint / "optimizer.pt").unlink()
    write(checkpoint, load_torch(checkpoint / "model.safetensors"))
    outcome = resume(tmp_path, checkpoint)
    line = outcome.err.splitlines()[-1].replace("OUT", str(tmp_path / "merged"))
    assert (outcome.code, outcome.compiled) == (2, 0) and line.startswith("error: ")
    for command in re.findall("`(.*?)`", line):
        if command.startswith("accelerate merge-weights "):
            merge.merge_command(merge.merge_command_parser().parse_args(command.split()[2:]))
        else:
            subprocess.run(command, shell=True, check=True)
    if "copy config.json and the tokenizer's files to" in line:  # these records are tokenised
        shutil.copy(tmp_path / "model/config.json", tmp_path / "merged")
    flags = line.partition("with a new optimizer: ")[2].split()
    files = ["--data_path", tmp_path / "data.json", "--output_dir", tmp_path / "out", "--use_cpu", "True"]
    outcome = run(train_jax.main, *flags, *files, "--max_steps", "1", "--learning_rate", "0")
    assert outcome.code == 0, outcome.err
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainers")
    write_checkpoint(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"optim": "adafactor"}, "holds the state of adamw_torch: resume it with --optim adamw_torch"),
        ({"optim": "sgd"}, "holds the state of adamw_torch: resume it with --optim adamw_torch"),
        ({"dtype": "bfloat16"}, "holds parameters in float32: resume it with --dtype float32"),
        ({"adam_moments_dtype": "bfloat16"}, "holds moments in float32: resume it without --adam_moments_dtype"),
        ({"use_peft": True}, "trains all parameters, this run trains an adapter"),
        ({"max_steps": 6}, "is past the 6 updates of this run"),
        ({"export_only": True}, "--export_only True"),
        (
            {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_data_path": "data.json"},
            "scheduler.pt: is of",
        ),
        ({"output_dir": "."}, "holds the HF Trainer's checkpoint-7; choose another --output_dir"),
    ],
)
def test_flags_of_another_run(flags: Flags, said: str, trainers: Path, tmp_path: Path) -> None:
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    flags = {
        key: tmp_path / value if key in ("eval_data_path", "output_dir") else value for key, value in flags.items()
    }
    outcome = resume(tmp_path, tmp_path / "checkpoint-7", **flags)
    assert (outcome.code, outcome.compiled) == (2, 0), outcome.err
    assert said in outcome.err


def test_torch_is_not_needed(trainers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = resume(tmp_path, tmp_path / "checkpoint-7")
    assert outcome.code == 0, outcome.err


def test_adamw_of_bitsandbytes_in_32_bits(trainers: Path, tmp_path: Path) -> None:
    """The moments are those of adamw_torch: the same bits; a warning tells of the decay."""
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    plain = weights_of(tmp_path, "plain")

    def of_bitsandbytes(state: Any) -> None:
        kept = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
        _only(state, step=7, __bnb_optimizer_quant_state__=kept)

    _each(of_bitsandbytes)(tmp_path / "checkpoint-7")
    outcome = resume(tmp_path, tmp_path / "checkpoint-7")
    assert outcome.code == 0 and "by bitsandbytes' AdamW in 32 bits; this run's adamw_torch" in outcome.err
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(np.array_equal(found[name], array) for name, array in plain.items())
    for optim in ("lion_32bit", "adamw_8bit"):
        outcome = resume(tmp_path, tmp_path / "checkpoint-7", output_dir=tmp_path / "other", optim=optim)
        assert (outcome.code, outcome.compiled) == (2, 0) and "holds the state of adamw_torch" in outcome.err


WARNED: dict[str, tuple[Any, str, str]] = {
    "skipped updates": (
        _each(lambda s: s["step"].fill_(6)),
        "5",
        "optimizer.pt counts 6 of 7 updates: some were skipped",
    ),
    "another epoch": (_json(epoch=3.5), "5", "is at epoch 3.5 after 7 updates, this run would be at 7: other data"),
    "no generator": (_generators(), "4.37", "holds no rng_state.pth, so that later epochs have another order"),
}


@pytest.mark.parametrize("name", WARNED)
def test_warned(name: str, trainers: Path, tmp_path: Path) -> None:
    """--dtype bfloat16 ends the run after the warnings, before it compiles."""
    change, compat, said = WARNED[name]
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    for expected in (False, True):
        if expected:
            change(tmp_path / "checkpoint-7")
        outcome = resume(tmp_path, tmp_path / "checkpoint-7", hf_compat=compat, dtype="bfloat16")
        assert outcome.code == 2 and (said in outcome.err) == expected, outcome.err


def test_an_adapter_of_another_base(trainers: Path, tmp_path: Path) -> None:
    shutil.copytree(trainers / "model", tmp_path / "model")
    shutil.copytree(trainers / "model", tmp_path / "other")
    shutil.copy(trainers / "data.json", tmp_path)
    flags: Flags = {
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": ["q_proj"],
        "data_path": tmp_path / "data.json",
    }
    flags |= {"use_cpu": True, "hf_compat": 5, "max_steps": 1, "per_device_train_batch_size": 6}
    flags |= {"model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "ours"}
    assert run(train_jax.main, *words(flags)).code == 0
    argv = ["--model_name_or_path", tmp_path / "ours/checkpoint-1", "--output_dir", tmp_path / "back/checkpoint-1"]
    assert run(convert_torch_to_flax.main, *argv, "--to_hf_trainer").code == 0
    for model in ("model", "other"):
        flags |= {"model_name_or_path": tmp_path / model, "output_dir": tmp_path / "out", "dtype": "bfloat16"}
        outcome = run(train_jax.main, *words(flags), "--resume_from_checkpoint", tmp_path / "back/checkpoint-1")
        assert outcome.code == 2 and "holds parameters in float32" in outcome.err
        assert ("is an adapter of " in outcome.err) == (model == "other"), outcome.err


def test_a_flipped_bit_is_no_moment(trainers: Path, tmp_path: Path) -> None:
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-7/optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    outcome = resume(tmp_path, tmp_path / "checkpoint-7")
    assert outcome.code == 2 and "optimizer.pt: is damaged: a tensor" in outcome.err


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
LOGS = JSON | st.lists(
    st.fixed_dictionaries(
        {"step": st.integers() | st.integers(1, 7)},
        optional=dict.fromkeys(("loss", "eval_loss", "skipped_records"), JSON),
    )
    | JSON,
    max_size=4,
)


@given(
    log=LOGS,
    best=st.sampled_from([None, "out/checkpoint-5", "out/best", "checkpoint-²", "", "x" * 300, "a\0", 5, []])
    | st.from_regex(r"(out|o\x1b\[2J)/checkpoint-[0-9]{1,300}(\x1b\[2J)?", fullmatch=True),
    metric=st.sampled_from([None, 1, 10**400, float("nan"), True, "1.0"]),
    best_step=st.none() | st.integers(-1, 8) | st.sampled_from([10**400, -(10**400), True, "5"]),
)
@example(log=[{"step": 1, "loss": 10**400}], best=None, metric=None, best_step=None)
@example(log=[], best="out/best", metric=1.0, best_step=None)
@example(log=[], best="out/checkpoint-" + "9" * 300, metric=1.0, best_step=7)
@example(log=[], best="out/checkpoint-5\x1b[2J", metric=1.0, best_step=None)
@example(log=[], best=None, metric=1.0, best_step=10**400)
@example(log=[], best=None, metric=1.0, best_step=-1)
@settings(max_examples=drawn_cases(150), deadline=None)
def test_any_state_ends_in_a_line_or_is_carried(
    log: Any, best: Any, metric: Any, best_step: Any, trainers: Path
) -> None:
    """The log is carried through resume, save and the page as it is, values of any kind within its entries too."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = shutil.copytree(trainers / "checkpoint-7", Path(folder) / "checkpoint-7")
        best_values = {"best_model_checkpoint": best, "best_metric": metric, "best_global_step": best_step}
        _json(log_history=log, **best_values)(checkpoint)
        good = isinstance(log, list) and all(isinstance(e, dict) and type(e.get("step")) is int for e in log)
        good &= isinstance(best, str | None) and (metric is None or type(metric) in (int, float))
        good &= best_step is None or (type(best_step) is int and 0 <= best_step <= 7)
        try:
            saved = read_trainer_checkpoint(checkpoint).state
        except InputError as e:
            assert not good and str(e).startswith(f"{checkpoint}/trainer_state.json: ") and "\n" not in str(e)
            return
        assert good
        state = TrainerState(
            "5", max_steps=9, num_train_epochs=1, train_batch_size=1, logging_steps=1, eval_steps=1, save_steps=1
        )
        with contextlib.redirect_stderr(io.StringIO()) as said:
            state.resume(saved, Path(folder) / "out", True)
            state.at(8, 1.0, 0.0, 0)
            state.saved(Path(folder) / "out", None)
        assert "\x1b" not in said.getvalue() and said.getvalue().count("\n") <= 1
        state.log({"loss": 1.0, "eval_loss": 2.0})
        state.evaluated(2.0, saves=True)
        assert state.best_step is None
        state.save(Path(folder))
        found = read_log(Path(folder) / "trainer_state.json")
        assert json.dumps(found[:-1], sort_keys=True) == json.dumps(log, sort_keys=True)
        as_page([{"name": "a", "log_history": found, "compare": {"name": "b", "log_history": log}}])


def test_the_step_of_a_best_checkpoint_with_a_slash(tmp_path: Path) -> None:
    state = TrainerState(
        "5", max_steps=9, num_train_epochs=1, train_batch_size=1, logging_steps=1, eval_steps=1, save_steps=1
    )
    (tmp_path / "checkpoint-5").mkdir()
    state.resume({"best_model_checkpoint": "out/checkpoint-5/"}, tmp_path, True)
    assert state.best_step == 5


@pytest.mark.parametrize("wants_best", [True, False])
def test_a_best_checkpoint_elsewhere(wants_best: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named as its run named it, and only to a run that exports the best."""
    state = TrainerState(
        "5", max_steps=9, num_train_epochs=1, train_batch_size=1, logging_steps=1, eval_steps=1, save_steps=1
    )
    state.resume({"best_model_checkpoint": "there/checkpoint-5"}, tmp_path, wants_best)
    assert state.best_step is None
    assert ("there/checkpoint-5, the best checkpoint so far, is not in" in capsys.readouterr().err) == wants_best


def test_a_long_log(trainers: Path, tmp_path: Path) -> None:
    """That of some 100,000 lines is over the 16 MiB of other JSON files."""
    checkpoint = shutil.copytree(trainers / "checkpoint-7", tmp_path / "checkpoint-7")
    log = [{"step": 1, "note": "x" * (17 << 20)}]
    _json(log_history=log)(checkpoint)
    assert read_trainer_checkpoint(checkpoint).state["log_history"] == log


@given(st.integers(0, 2**63 - 1), st.integers(0, 1300))
@settings(max_examples=drawn_cases(30))
def test_the_generator_of_a_file(seed: int, drawn: int) -> None:
    """The next numbers are torch's, wherever in a block of 624 the state lies, and of a state written back too."""
    import torch

    torch.manual_seed(seed)
    torch.randint(0, 2, (drawn,), dtype=torch.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rng_state.pth"
        torch.save({"cpu": torch.get_rng_state(), "numpy": np.random.get_state()}, path)
        state = read_generator(path)
        twister = np.random.MT19937()
        twister.state = {"bit_generator": "MT19937", "state": {**state, "key": np.asarray(state["key"], np.uint32)}}
        expected = torch.randint(0, 9973, (700,), dtype=torch.int32)  # an output each, modulo
        write_generators(Path(folder), twister, 1, ["back.pth"])
        back = torch.load(Path(folder) / "back.pth", weights_only=False)
    torch.set_rng_state(back["cpu"])
    assert torch.equal(torch.randint(0, 9973, (700,), dtype=torch.int32), expected)
    assert np.array_equal(twister.random_raw(700) % 9973, expected.numpy())


# -- From the Trainer -------------------------------------------------------------------------------------------------


@st.composite
def handed_over(draw: st.DrawFn, compat: str) -> tuple[Flags, int, tuple[int, ...], int]:
    """A run of test_live.py, and after which share of its updates it is handed over."""
    flags, count, masked = draw(drawn(compat))
    flags.pop("load_best_model_at_end", None)  # the best checkpoint is then in the Trainer's folder
    return flags, count, masked, draw(st.integers(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("compat", COMPATS)
def test_drawn_runs_of_the_trainer_go_on(bench: Bench, compat: str) -> None:
    @settings(max_examples=drawn_cases(15))
    @given(handed_over(compat))
    def both(case: tuple[Flags, int, tuple[int, ...], int]) -> None:
        flags, count, masked, done = case
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            began = Began(bench, compat, Path(folder), flags, count, masked)
            began.compare(min(done, began.updates - 1))

    both()


# Two epochs and more of 11 records: resumed in the first, at its end, and in the second.
OPTIMIZERS = [("5", "adamw_torch_fused"), ("5", "sgd"), ("4.37", "adafactor"), ("5", "adafactor")]
OPTIMIZERS += [("4.37", "adamw_bnb_8bit"), ("5", "paged_adamw_8bit"), ("5", "lion_32bit")]


@pytest.mark.slow
@pytest.mark.parametrize(("compat", "optim"), OPTIMIZERS)
def test_optimizers(bench: Bench, compat: str, optim: str, tmp_path: Path) -> None:
    flags = {**ACCUMULATED, "optim": optim, "weight_decay": 0.1, "max_steps": 7}
    flags |= {"learning_rate": 0.05} if optim == "sgd" else {}
    raw = {**CONFIG, "hidden_size": 64, "intermediate_size": 192} if "8bit" in optim else CONFIG
    wide = bench._replace(model=write_model(tmp_path / "model", raw))
    began = Began(wide, compat, tmp_path, flags, 11, more={"nearest": "8bit" in optim})
    began.compare(4)


ADAPTERS: dict[str, Flags] = {
    "lora": {"lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"]},
    "dora": {"lora_r": 4, "lora_alpha": 16, "use_dora": True, "lora_target_modules": "all-linear"},
    "saved": {"lora_r": 2, "lora_target_modules": ["v_proj"], "lora_modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(bench: Bench, name: str, tmp_path: Path) -> None:
    adapter = {"lora_dropout": 0.0, **ADAPTERS[name]}
    began = Began(bench, "5", tmp_path, {**ACCUMULATED, "weight_decay": 0.1}, 11, adapter=adapter)
    began.compare(2)


SCHEDULED: dict[str, Flags] = {
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1,
                "max_steps": 16, "learning_rate": 1e-6, "optim": "sgd"},
    "greedy": {"lr_scheduler_type": "greedy", "warmup_steps": 0, "max_steps": 8, "eval_strategy": "steps",
               "eval_steps": 1, "lr_scheduler_kwargs": '{"patience": 1, "min_lr": 1e-5}'},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("compat", "name"), [("4.37", "plateau"), ("5", "plateau"), ("5", "greedy")])
def test_schedules_that_listen(bench: Bench, compat: str, name: str, tmp_path: Path) -> None:
    began = Began(bench, compat, tmp_path, {**ACCUMULATED, **SCHEDULED[name]}, 9)
    # At a rate of 1e-6 evaluations differ by less than a rounding, which decides what is the best.
    best = ("best_model_checkpoint", "best_global_step") if compat == "5" else ("best_model_checkpoint",)
    hf = began.compare(5, apart=best if name == "plateau" else ())
    assert hf["rates"][-1] != hf["rates"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("compat", "name"), [("4.37", "qwen2"), ("5", "qwen2"), ("5", "qwen3")])
def test_sister_models(bench: Bench, compat: str, name: str, tmp_path: Path) -> None:
    """Groups with biases, with norms of heads, and of 4.37 with decayed norms."""
    model = write_model(tmp_path / "model", {**CONFIG, **SISTERS[name], "architectures": None})
    Began(bench._replace(model=model), compat, tmp_path, {**ACCUMULATED, "weight_decay": 0.5}, 9).compare(3)


@pytest.mark.proof
def test_a_version_between_both(tmp_path: Path) -> None:
    """transformers 4.57, in the folder that TRANSFORMERS_457 names, goes on under --hf_compat 5. In the middle of a
    later epoch its Trainer takes the rest of the first one; this program, that of the run that was not stopped.

    pip install --no-deps --target DIR transformers==4.57.6 accelerate==1.11.0 huggingface_hub==0.36.2 \\
        tokenizers==0.22.2
    TRANSFORMERS_457=DIR python -m pytest -m proof tests/test_handover.py -k between
    """
    if not (folder := os.environ.get("TRANSFORMERS_457")):
        pytest.skip("TRANSFORMERS_457 names no folder with transformers 4.57: see this test's docstring")
    server = Server("5", {"PYTHONPATH": os.pathsep.join([folder, str(Path(__file__).parent / "without_datasets")])})
    assert server.versions["transformers"].startswith("4.57.")
    bench = Bench({"5": server}, tmp_path, write_model(tmp_path / "model"))
    began = Began(bench, "5", tmp_path, {**ACCUMULATED, "weight_decay": 0.1, "max_steps": 8}, 11)
    for done in (1, 3):  # in the first epoch, of three updates, and at its end
        hf, ours, weights = began.resumed(done)
        same_run(ours, hf, weights)
    hf, ours, _ = began.resumed(4)
    order = began.whole["order"]
    assert hf["order"] == [*order[1:3], *order[6:]] != order[4:]
    np.testing.assert_allclose(ours.losses, began.whole["losses"][4:], rtol=1e-5)
    server.close()


class Case(NamedTuple):
    """A run of the Trainer, resumed after `done` updates."""

    examples: int
    batch: int
    accumulation: int
    updates: int
    done: int
    sampling: str
    seed: int
    every: int  # updates from evaluation to evaluation, 0 for none


@st.composite
def cases(draw: st.DrawFn) -> Case:
    updates = draw(st.integers(4, 14))
    return Case(
        examples=draw(st.integers(3, 9)),
        batch=draw(st.integers(1, 2)),
        accumulation=draw(st.integers(1, 3)),
        updates=updates,
        done=draw(st.integers(1, updates - 1)),
        sampling=draw(st.sampled_from(["random", "random", "group_by_length", "sequential"])),
        seed=draw(st.integers(0, 2**31 - 1)),
        every=draw(st.sampled_from([0, 0, 1, 2, 3])),
    )


@pytest.mark.slow
@pytest.mark.parametrize("compat", COMPATS)
def test_orders_of_resumed_trainers(bench: Bench, compat: str) -> None:
    """The examples of each update after a resume: runs of many short epochs, resumed anywhere."""
    tried = 0

    @settings(max_examples=drawn_cases(120, in_ci=15))
    @given(cases())
    def both(case: Case) -> None:
        nonlocal tried
        assume(compat == "5" or case.sampling != "sequential")
        flags = {"per_device_train_batch_size": case.batch, "gradient_accumulation_steps": case.accumulation}
        flags |= {"max_steps": case.updates, "seed": case.seed, "train_sampling_strategy": case.sampling}
        flags |= {"eval_strategy": "steps", "eval_steps": case.every} if case.every else {}
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            began = Began(bench, compat, Path(folder), flags, case.examples)
            checkpoint = began.checkpoint(case.done)
            hf = began.theirs("resumed", {**flags, **SAVED}, resume=str(checkpoint))
            generator = read_generator(checkpoint / "rng_state.pth")
        lengths = np.asarray([len(r["input_ids"]) for r in records_of(case.examples, ())])
        evaluated = tuple(range(case.every, case.updates + 1, case.every)) if case.every else ()
        if case.every and compat == "5":
            evaluated = tuple(sorted({*evaluated, case.updates}))
        order = Order(case.examples, case.batch, case.accumulation, 1, compat, case.seed, max_steps=case.updates,
                      sampling=case.sampling, lengths=lengths, evaluated=evaluated,
                      resumed=Resumed(case.done, generator))  # fmt: skip
        found = [[m.tolist() for (m,) in order.update(k)] for k in range(case.done, case.updates)]
        assert found == hf["order"], case
        whole = dataclasses.replace(order, resumed=None)
        state: Any = generator_after(whole, case.done).state["state"]
        # 5's sampler draws from a generator of its own, and the loader's base seed from it too.
        assert (state["key"].tolist(), state["pos"]) == (generator["key"], generator["pos"]), case
        tried += 1

    both()
    assert tried


CHANGED: dict[str, Flags] = {
    "optimizer": {
        "learning_rate": 5e-4,
        "weight_decay": 0.3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-3,
    },
    "longer": {"max_steps": 9, "lr_scheduler_type": "cosine"},
    "lines": {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 1},
    "batch": {"per_device_train_batch_size": 1},
    "longer, intervals as shares": {"max_steps": 12},
}


@pytest.mark.slow
@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("name", CHANGED)
def test_other_flags_than_then(bench: Bench, compat: str, name: str, tmp_path: Path) -> None:
    """The Trainer takes the optimizer's settings and the peak from the checkpoint, and the intervals; 4.37 also the
    batch size. The first update has the checkpoint's rate, the next ones the new schedule's."""
    interval = 0.3 if "shares" in name else 2
    flags = {**ACCUMULATED, "eval_strategy": "steps", "eval_steps": interval, "logging_steps": interval}
    began = Began(bench, compat, tmp_path, flags, 11)
    began.compare(3, CHANGED[name], apart=("train_batch_size",) if name == "batch" else ())


@pytest.mark.slow
def test_a_second_resume_goes_on_as_the_first(bench: Bench, tmp_path: Path) -> None:
    """Our own checkpoint of a run that 4.37 began, in its second epoch, with a rate that the first update alone has."""
    began = Began(bench, "4.37", tmp_path, {**ACCUMULATED, "max_steps": 8}, 11)
    flags = {**began.flags, **SAVED, "max_steps": 10}
    argv = [*began.argv("ours", flags), "--resume_from_checkpoint"]
    whole = train_ours([*argv, str(began.checkpoint(4))], tmp_path / "ours", first=4)
    for done in (5, 7):
        shutil.copytree(tmp_path / "ours" / f"checkpoint-{done}", tmp_path / f"from-{done}" / f"checkpoint-{done}")
        again = train_ours(
            [*began.argv(f"from-{done}", flags), "--resume_from_checkpoint", "True"],
            tmp_path / f"from-{done}",
            first=done,
        )
        assert again.losses == whole.losses[done - 4 :] and again.rates == whole.rates[done - 4 :]
        assert all(np.array_equal(again.weights[name], array) for name, array in whole.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("compat", COMPATS)
def test_two_ranks(compat: str, tmp_path: Path) -> None:
    """Two processes of the Trainer, each with its rng_state_k.pth; resumed in the second epoch and at its start."""
    model, data = write_model(tmp_path / "model"), write_json(tmp_path / "data.json", records_of(13, ()))
    flags = {**ACCUMULATED, **SAVED, "per_device_train_batch_size": 1, "max_steps": 11}
    spec = {"model": str(model), "data": str(data), "argv": spelled(compat, flags)}
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Server(compat, place | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]

    def both(name: str, **more: Any) -> dict[str, Any]:
        with ThreadPoolExecutor(2) as pool:  # they wait for one another
            asked = [pool.submit(s.train, {**spec, **more, "output_dir": str(tmp_path / name)}) for s in ranks]
            answers = [answer.result() for answer in asked]
        assert not [a for a in answers if "error" in a], answers
        return {**answers[0], "losses": np.mean([a["losses"] for a in answers], axis=0)}

    try:
        both("hf")
        for done in (5, 3 if compat == "4.37" else 4):
            checkpoint = tmp_path / "hf" / f"checkpoint-{done}"
            assert (checkpoint / "rng_state_1.pth").exists()
            hf, out = both(f"hf-{done}", resume=str(checkpoint)), tmp_path / f"ours-{done}"
            given = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(out)]
            given += ["--use_cpu", "True", "--hf_compat", compat, *spelled(compat, flags)]
            ours = train_ours([*given, "--resume_from_checkpoint", str(checkpoint)], out, first=done)
            same_run(ours, hf, load_file(hf["weights"]))
            same_log(ours, hf, compat)
    finally:
        for server in ranks:
            server.close()


# -- And back ---------------------------------------------------------------------------------------------------------

RETURNED: dict[str, tuple[str, Flags]] = {
    "adamw 5": ("5", {"weight_decay": 0.1}),
    "adamw 4.37": ("4.37", {"weight_decay": 0.1, "lr_scheduler_type": "cosine"}),
    "sgd": ("5", {"optim": "sgd", "learning_rate": 0.05}),
    "adafactor": ("4.37", {"optim": "adafactor"}),
    "evaluated": ("4.37", {"eval_strategy": "steps", "eval_steps": 2}),
    "by length": ("5", {"train_sampling_strategy": "group_by_length"}),
    "greedy": ("5", SCHEDULED["greedy"]),
}


def returned(began: Began, name: str, flags: Flags, done: int) -> dict[str, Any]:
    """Make a Trainer's checkpoint of one of ours, and resume it in both."""
    folder = began.folder / "back" / f"checkpoint-{done}"
    argv = ["--model_name_or_path", began.folder / name / folder.name, "--output_dir", folder, "--to_hf_trainer"]
    outcome = run(convert_torch_to_flax.main, *argv)
    assert outcome.code == 0, outcome.err
    return began.compare(done, flags, checkpoint=folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", RETURNED)
def test_the_trainer_goes_on(bench: Bench, name: str, tmp_path: Path) -> None:
    """One of our checkpoints goes back: the Trainer's updates are those of our run that goes on from the same folder,
    and in the first epoch those of our run that was never interrupted."""
    compat, flags = RETURNED[name]
    began = Began(bench, compat, tmp_path, {**ACCUMULATED, "max_steps": 8, **flags}, 11)
    whole = train_ours(began.argv("whole", {**began.flags, **SAVED}), tmp_path / "whole")
    for done in (2, 5):
        hf = returned(began, "whole", began.flags, done)
        if done == 2:
            np.testing.assert_allclose(hf["losses"], whole.losses[done:], rtol=1e-5)
            np.testing.assert_allclose(hf["rates"], whole.rates[done:], rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_go_back(bench: Bench, name: str, tmp_path: Path) -> None:
    adapter = {"lora_dropout": 0.0, **ADAPTERS[name]}
    began = Began(bench, "5", tmp_path, {**ACCUMULATED, "weight_decay": 0.1}, 11, adapter=adapter)
    train_ours(began.argv("whole", {**began.flags, **SAVED}), tmp_path / "whole")
    returned(began, "whole", began.flags, 3)


@pytest.mark.slow
@pytest.mark.parametrize("compat", COMPATS)
def test_drawn_runs_go_back(bench: Bench, compat: str) -> None:
    """Some of them are runs that the Trainer began and ours went on with."""

    @settings(max_examples=drawn_cases(15))
    @given(handed_over(compat), st.booleans())
    def both(case: tuple[Flags, int, tuple[int, ...], int], theirs: bool) -> None:
        flags, count, masked, done = case
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            began = Began(bench, compat, Path(folder), flags, count, masked)
            done = min(done, began.updates - 1)
            first = done // 2 if theirs else 0
            argv = began.argv("whole", {**flags, **SAVED})
            if first:
                argv += ["--resume_from_checkpoint", str(began.checkpoint(first))]
            train_ours(argv, Path(folder) / "whole", first=first)
            returned(began, "whole", flags, done)

    both()


def test_refused_to_go_back(trainers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*argv: Any) -> str:
        outcome = run(convert_torch_to_flax.main, "--output_dir", tmp_path / "back", "--to_hf_trainer", *argv)
        assert outcome.code == 2 and not (tmp_path / "back").exists(), outcome.err
        return outcome.err

    assert "takes a run's checkpoint-N" in said("--model_name_or_path", trainers / "checkpoint-7")
    assert "--verify: does not go with" in said("--model_name_or_path", trainers, "--verify")
    flags = {
        "model_name_or_path": trainers / "model",
        "data_path": trainers / "data.json",
        "output_dir": tmp_path / "o",
    }
    flags |= {"use_cpu": True, "hf_compat": 5, "max_steps": 1, "optim": "lion_32bit"}
    assert run(train_jax.main, *words(flags)).code == 0
    assert "was made by --optim lion_32bit" in said("--model_name_or_path", tmp_path / "o/checkpoint-1")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch is not installed" in said("--model_name_or_path", tmp_path / "o/checkpoint-1")
