"""Runs handed over between the real HF Trainer, of transformers 4.37.2 and of 5, and `train_jax.py`, both ways.

The Trainer makes a run with checkpoints, then resumes one of them; `train_jax.py` resumes the same one. `same_run` and
`same_log` of test_live.py compare the two: losses, norms, rates, weights, log.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_trainer import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
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
from tiny import CONFIG, SISTERS, drawn_cases, run, write_json, write_model

import train_jax


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
        self.adapter, self._more = adapter, (more or {}) | ({"peft": settings_of(adapter), "attn": "eager"} if adapter else {})
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

    def compare(self, done: int, flags: Flags | None = None, apart: tuple[str, ...] = ()) -> dict[str, Any]:
        """Resume after so many updates in both, perhaps by other flags; assert that they do the same, but for the keys
        `apart` of trainer_state.json, and return what the Trainer did."""
        flags = {**self.flags, **(flags or {}), **SAVED}
        print(self.compat, "after", done, "of", self.updates, "with", *spelled(self.compat, flags))
        hf = self.theirs(f"hf-{done}", flags, resume=str(self.checkpoint(done)))
        assert len(hf["losses"]) == hf["state"]["max_steps"] - done
        out = self.folder / f"ours-{done}"
        argv = [*self.argv(out.name, flags), "--resume_from_checkpoint", str(self.checkpoint(done))]
        ours = train_ours(argv, out, first=done)
        weights = f"hf-{done}/adapter/adapter_model.safetensors" if self.adapter else f"hf-{done}/final.safetensors"
        (same_8_bits if "8bit" in flags.get("optim", "") else same_run)(ours, hf, load_file(self.folder / weights))
        for key in apart:
            del ours.state[key], hf["state"][key]
        same_log(ours, hf, self.compat)
        return hf


def same_8_bits(ours: Ours, hf: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """As in test_live.py: where a last bit turns a code, a weight moves by a share of a step."""
    np.testing.assert_allclose(ours.losses, hf["losses"], rtol=1e-5)
    for name, expected in weights.items():
        apart = np.abs(ours.weights[name] - expected)
        assert apart.max() <= 1e-4 and (apart > 1e-6).mean() <= 0.01, (name, apart.max(), (apart > 1e-6).mean())


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
    hf = began.compare(5, apart=("best_model_checkpoint",))  # evaluations differ by less than a rounding at a rate of 1e-6
    assert hf["rates"][-1] != hf["rates"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("compat", "name"), [("4.37", "qwen2"), ("5", "qwen2"), ("5", "qwen3")])
def test_sister_models(bench: Bench, compat: str, name: str, tmp_path: Path) -> None:
    """Groups with biases, with norms of heads, and of 4.37 with decayed norms."""
    model = write_model(tmp_path / "model", {**CONFIG, **SISTERS[name], "architectures": None})
    Began(bench._replace(model=model), compat, tmp_path, {**ACCUMULATED, "weight_decay": 0.5}, 9).compare(3)


CHANGED: dict[str, Flags] = {
    "optimizer": {"learning_rate": 5e-4, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-3},
    "longer": {"max_steps": 9, "lr_scheduler_type": "cosine"},
    "lines": {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 1},
    "batch": {"per_device_train_batch_size": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("name", CHANGED)
def test_other_flags_than_then(bench: Bench, compat: str, name: str, tmp_path: Path) -> None:
    """The Trainer takes the optimizer's settings and the peak from the checkpoint, and the intervals; 4.37 also the
    batch size. The first update has the checkpoint's rate, the next ones the new schedule's."""
    flags = {**ACCUMULATED, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
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
            [*began.argv(f"from-{done}", flags), "--resume_from_checkpoint", "True"], tmp_path / f"from-{done}", first=done
        )
        assert again.losses == whole.losses[done - 4 :] and again.rates == whole.rates[done - 4 :]
        assert all(np.array_equal(again.weights[name], array) for name, array in whole.weights.items())
