"""Run the README's commands as written, with small folders in the places that the commands name; check its tables."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
from test_floors import FLOORS

import convert_torch_to_flax
import train_jax
from llama_jax.command import generate, parity
from llama_jax.data.records import FORMS, read_records

BENCHMARKS = (tiny.ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
README = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
MAINS = {
    "train_jax.py": train_jax.main,
    "convert_torch_to_flax.py": convert_torch_to_flax.main,
    "-m llama_jax.generate": generate.main,
    "-m llama_jax.parity": parity.main,
}


def commands() -> list[str]:
    """Return the `python ...` lines of the README's bash blocks, continued lines joined."""
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


def table(heading: str) -> list[list[str]]:
    """Return the rows of the first table after a heading, without its header."""
    lines = README.split(f"## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|--") or line.startswith("|---"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 1 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_all_commands_are_known():
    assert len(commands()) == 8  # each is run below, or by `make demo` in test_demo.py
    assert all(any(c.startswith(f"python {name}") for name in MAINS) for c in commands())


def test_the_trainers_command(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_your_own_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "demo" / "output").mkdir(parents=True)
    model.rename(tmp_path / "demo" / "output" / "flax")
    (tmp_path / "my_data.jsonl").write_text("\n".join(map(json.dumps, tiny.ALPACA)))
    monkeypatch.chdir(tmp_path)
    train, ask = (c for c in commands() if "my_model" in c)
    for command in (train, ask):
        outcome = run(command)
        assert outcome.code == 0, outcome.err
    assert {"config.json", "model.safetensors", "trainer_state.json"} <= {p.name for p in Path("my_model").iterdir()}
    (again,) = (c for c in commands() if "demo/output/pirate" in c)
    Path("my_model").rename("demo/output/pirate")
    assert run(again).code == 0


def test_converting_and_asking(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    model.rename(tmp_path / "HF_DIR")
    monkeypatch.chdir(tmp_path)
    to_flax, to_hf = (c for c in commands() if "convert_torch_to_flax" in c)
    for command in (to_flax, to_hf):
        outcome = run(command)
        assert outcome.code == 0, outcome.err
        assert "verified: 21 tensors" in outcome.err
    (ask,) = (c for c in commands() if "llama_jax.generate" in c and "FLAX_DIR" in c)
    answers = [run(ask.replace("FLAX_DIR", folder)) for folder in ("HF_DIR", "FLAX_DIR", "HF_DIR2")]
    assert [a.code for a in answers] == [0, 0, 0]
    assert len({a.out for a in answers}) == 1


def test_the_forms_of_records_are_read(tmp_path: Path):
    forms = set()
    for number, (_, shown, _) in enumerate(table("Your own file")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(re.findall(r"`(\{.*?\})`", shown)[0])
        form, (record,) = read_records(path)
        assert record
        forms.add(form)
    assert forms == FORMS.keys()


def test_each_figure_is_in_benchmarks():
    results = BENCHMARKS.split("## Results")[1].split("\n## ")[0].splitlines()
    rows = table("Figures")
    assert len(rows) >= 12
    for what, ours, peer, source in rows:
        (number,) = re.findall(r"\[(\d+)\]\(BENCHMARKS\.md#results\)", source)
        start = next(i for i, line in enumerate(results) if line.startswith(f"| {number} |"))
        cells = " ".join(
            [results[start], *itertools.takewhile(lambda line: line.startswith("| |"), results[start + 1 :])]
        )
        known = [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-\d+)?", cells)]
        for text in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?", f"{ours} {peer}"):
            shown = float(text.replace(",", ""))  # rounded to its last digit
            half = 0.5 * 10.0 ** -len(text.partition(".")[2]) if "e" not in text else 0.0
            assert any(abs(n - shown) <= half + 1e-9 * n or abs(n / 1000 - shown) <= half for n in known), (what, text)


def test_the_layout_is_true():
    listed = [name for row in table("Layout") for name in re.findall(r"`([^`]+)`", row[0])]
    assert all((tiny.ROOT / name).exists() for name in listed)
    folders = [name.split("/")[1] for name in listed if name.startswith("llama_jax/")]
    assert sorted(folders) == sorted(FLOORS)
    assert [FLOORS[f] for f in folders] == sorted(FLOORS.values(), reverse=True)  # the highest floor first


def test_the_design_names_files_that_exist():
    named = re.findall(r"`(\w+/\w+\.py)`", (tiny.ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    assert named
    assert all((tiny.ROOT / name).exists() or (tiny.ROOT / "llama_jax" / name).exists() for name in named), named


@pytest.mark.parametrize(
    "path", [tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if not name.startswith("http"):
            there = path.parent / name if name else path
            assert there.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
                assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target
