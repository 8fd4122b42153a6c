"""Run the commands of docs/parity.md and docs/handover.md as written, with small folders under the names in them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import test_readme
from test_cli import shown_commands
from test_handover import write_checkpoint
from test_manifest import to_hf, trained
from tiny import ALPACA, CONFIG, ROOT, make_arrays, write_json, write_model, write_tokenizer


def of_parity(here: Path) -> None:
    """`my_model` is an exported model, `my_adapter` an adapter of `path/to/base`."""
    to_hf(here / "whole").rename(here / "my_model")
    (here / "path/to").mkdir(parents=True)
    (here / "whole/model").rename(here / "path/to/model")
    write_json(here / "data.json", ALPACA)
    write_tokenizer(write_model(here / "adapted/model", arrays=make_arrays(CONFIG, seed=1)))
    trained(here / "adapted").rename(here / "my_adapter")
    (here / "adapted/model").rename(here / "path/to/base")


def of_handover(here: Path) -> None:
    """`hf_run` is a run of the Trainer; this program's checkpoint-1000 is of the first command."""
    write_checkpoint(here, done=500)
    (here / "model").rename(here / "BASE")
    (here / "hf_run").mkdir()
    shutil.move(here / "checkpoint-500", here / "hf_run/checkpoint-500")


PAGES = {"parity.md": of_parity, "handover.md": of_handover}
# Values of the files that the commands write.
WRITTEN = {
    "parity.md": {"my_model/parity.json": ("holds", True)},
    "handover.md": {
        "out/trainer_state.json": ("global_step", 2000),
        "hf_run/checkpoint-1000/trainer_state.json": ("global_step", 1000),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_each_command_succeeds(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command whose folders are not prepared fails."""
    lines = shown_commands((ROOT / "docs" / page).read_text(encoding="utf-8"))
    commands = [line for line in lines if re.search(r"\bpython|\.py\b", line)]
    assert commands
    PAGES[page](tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        outcome = test_readme.run(command)
        assert outcome.code == 0, f"{command}\n{outcome.out}{outcome.err}"
    for name, (key, value) in WRITTEN[page].items():
        assert json.loads((tmp_path / name).read_text())[key] == value
