"""The commands of the README, run as they stand; only the folders that they name are put in place."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tiny

import convert_torch_to_flax
import train_jax
from llama_jax.command import generate

README = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
MAINS = {
    "train_jax.py": train_jax.main,
    "convert_torch_to_flax.py": convert_torch_to_flax.main,
    "-m llama_jax.generate": generate.main,
}


def commands() -> list[str]:
    """Each `python ...` line of the README's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("python ")]


def run(command: str) -> tiny.Outcome:
    rest = command.removeprefix("python ")
    program = next(name for name in MAINS if rest.startswith(name))
    return tiny.run(MAINS[program], *shlex.split(rest.removeprefix(program)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_tokenizer(tiny.write_model(tmp_path / "model"))


def test_all_commands_are_known():
    assert len(commands()) == 5  # each is run below, or by `make demo` in test_demo.py
    assert all(any(c.startswith(f"python {name}") for name in MAINS) for c in commands())


def test_the_seeds_command(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    (command,) = (c for c in commands() if "--loggingdir" in c)
    here = tmp_path / "a" / "b" / "c"
    (here / "alpaca").mkdir(parents=True)
    (tmp_path / "llama-7b-hf").mkdir()
    model.rename(tmp_path / "llama-7b-hf" / "llama_7b_hf_weight")
    tiny.write_json(here / "alpaca" / "alpaca_data.json", tiny.ALPACA * 4)
    monkeypatch.chdir(here)
    outcome = run(command)
    assert outcome.code == 0, outcome.err
    state = json.loads((here / "output" / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # 20 records, 8 an update, the tail dropped as in 4.37
    assert (here / "output" / "model.safetensors").exists()


def test_converting_and_asking(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    model.rename(tmp_path / "HF_DIR")
    monkeypatch.chdir(tmp_path)
    to_flax, to_hf = (c for c in commands() if "convert_torch_to_flax" in c)
    for command in (to_flax, to_hf):
        outcome = run(command)
        assert outcome.code == 0, outcome.err
        assert "verified: 21 tensors" in outcome.err
    (ask,) = (c for c in commands() if "llama_jax.generate" in c)
    answers = [run(ask.replace("HF_DIR", folder)) for folder in ("HF_DIR", "FLAX_DIR", "HF_DIR2")]
    assert [a.code for a in answers] == [0, 0, 0]
    assert len({a.out for a in answers}) == 1


def test_the_file_tree_is_true():
    block = re.search(r"## The house\n\n```\n(.*?)```", README, re.S)
    assert block
    listed, folders = set(), []
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        if not name.endswith("/"):
            listed.add("".join(folders[:depth]) + name)
    there = {str(p.relative_to(tiny.ROOT)) for p in (tiny.ROOT / "llama_jax").rglob("*.py") if p.name != "__init__.py"}
    assert there <= listed, f"not in the README's tree: {there - listed}"
    assert all((tiny.ROOT / name).exists() for name in listed), [n for n in listed if not (tiny.ROOT / n).exists()]
