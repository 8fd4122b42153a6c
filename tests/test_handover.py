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
from test_live import ACCUMULATED, COMPATS, Bench, Flags, drawn, records_of, same_log, same_run, spelled, train_ours
from tiny import drawn_cases, run, write_json, write_model

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

    def __init__(self, bench: Bench, compat: str, folder: Path, flags: Flags, count: int, masked: tuple[int, ...] = ()):
        self.bench, self.compat, self.folder, self.flags = bench, compat, folder, flags
        data, eval_data = write_json(folder / "data.json", records_of(count, masked)), folder / "eval.json"
        write_json(eval_data, records_of(7, ()))
        self._spec: dict[str, Any] = {"model": str(bench.model), "data": str(data)}
        if flags.get("eval_strategy", "no") != "no":
            self._spec["eval_data"] = str(eval_data)
        self.whole = self.theirs("hf", {**flags, **SAVED})
        self.updates = len(self.whole["losses"])

    def theirs(self, name: str, flags: Flags, **more: Any) -> dict[str, Any]:
        argv = spelled(self.compat, flags)
        spec = {**self._spec, "argv": argv, "output_dir": str(self.folder / name), **more}
        hf = self.bench.servers[self.compat].train(spec)
        assert "error" not in hf, hf
        return hf

    def argv(self, name: str, flags: Flags) -> list[str]:
        files = {"data": "--data_path", "eval_data": "--eval_data_path"}
        data = [x for key, flag in files.items() if key in self._spec for x in (flag, self._spec[key])]
        out = ["--output_dir", str(self.folder / name), "--use_cpu", "True", "--hf_compat", self.compat]
        return ["--model_name_or_path", str(self.bench.model), *data, *out, *spelled(self.compat, flags)]

    def checkpoint(self, done: int) -> Path:
        return self.folder / "hf" / f"checkpoint-{done}"

    def compare(self, done: int, flags: Flags | None = None) -> dict[str, Any]:
        """Resume after so many updates in both; assert that they do the same, and return what the Trainer did."""
        flags = {**self.flags, **(flags or {}), **SAVED}
        print(self.compat, "after", done, "of", self.updates, "with", *spelled(self.compat, flags))
        hf = self.theirs(f"hf-{done}", flags, resume=str(self.checkpoint(done)))
        assert len(hf["losses"]) == hf["state"]["max_steps"] - done
        out = self.folder / f"ours-{done}"
        argv = [*self.argv(out.name, flags), "--resume_from_checkpoint", str(self.checkpoint(done))]
        ours = train_ours(argv, out, first=done)
        same_run(ours, hf, load_file(hf["weights"]))
        same_log(ours, hf, self.compat)
        return hf


# -- From the Trainer -------------------------------------------------------------------------------------------------


@st.composite
def handed_over(draw: st.DrawFn, compat: str) -> tuple[Flags, int, tuple[int, ...], int]:
    """A run of test_live.py, and after which share of its updates it is handed over."""
    flags, count, masked = draw(drawn(compat))
    flags.pop("load_best_model_at_end", None)  # the best checkpoint is then in the Trainer's folder
    flags |= {"optim": "adamw_torch", "learning_rate": 1e-3}
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
