"""A room stands above all that it imports: no arrow runs up, and beside only where it is allowed below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "train_jax": 6,
    "convert_torch_to_flax": 5,
    "llama_jax.generate": 5,
    "llama_jax.milestones": 5,
    "llama_jax.evaluation": 5,
    "llama_jax.explain": 5,
    "llama_jax.plan": 5,
    "llama_jax.dry_run": 5,
    "llama_jax.train": 4,
    "llama_jax.hf": 4,
    "llama_jax.model": 3,
    "llama_jax.job": 2,
    "llama_jax.flags_page": 2,
    "llama_jax.attention": 2,
    "llama_jax.rope": 2,
    "llama_jax.loss": 2,
    "llama_jax.optimizer": 2,
    "llama_jax.checkpoint": 2,
    "llama_jax.data": 1,
    "llama_jax.reporting": 1,
    "llama_jax.config": 1,
    "llama_jax.arguments": 1,
    "llama_jax.sharding": 1,
    "llama_jax.processes": 1,
    "llama_jax.schedule": 1,
    "llama_jax.topology": 1,
    "llama_jax.hlo": 1,
    "llama_jax.platform": 1,
    "llama_jax.files": 0,
    "llama_jax.flags": 0,
    "llama_jax.errors": 0,
}
# Rooms of one floor that may look at each other, in this direction only: the log reads what a batch counts, a dry run
# tells what a plan needs, evaluations are among what is due, and reading a file or a flag fails as the user's mistake.
BESIDE = {
    ("llama_jax.reporting", "llama_jax.data"),
    ("llama_jax.dry_run", "llama_jax.plan"),
    ("llama_jax.milestones", "llama_jax.evaluation"),
    ("llama_jax.files", "llama_jax.errors"),
    ("llama_jax.flags", "llama_jax.errors"),
}
# Inside the data room the arrows run one way.
DATA = "records tokenizer chat examples cache doctor order normalisation packing batches".split()

FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "llama_jax").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    fitting = [r for r in FLOORS if module == r or module.startswith(r + ".")]
    return max(fitting, key=len, default=None)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("llama_jax", "train_jax", "convert_torch_to_flax")}


def test_every_file_has_a_floor():
    for path in FILES:
        name = module_name(path)
        assert name == "llama_jax" or room(name), f"{path} stands on no floor"
    for name in FLOORS:
        assert any(room(module_name(p)) == name for p in FILES), f"{name} is on a floor but not in the house"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_arrow_runs_up(path: Path):
    here = room(module_name(path))
    if here is None:
        return
    for name in imports(path):
        there = room(name)
        if there is None or there == here:
            continue
        below = FLOORS[there] < FLOORS[here]
        assert below or (here, there) in BESIDE, f"{module_name(path)} (floor {FLOORS[here]}) imports {name}"


def test_data_runs_one_way():
    for i, name in enumerate(DATA):
        used = {
            n.split(".")[2]
            for n in imports(ROOT / "llama_jax" / "data" / f"{name}.py")
            if n.startswith("llama_jax.data.")
        }
        assert used <= set(DATA[:i]), f"data/{name}.py imports {used - set(DATA[:i])}"


def test_no_circle_inside_a_room():
    graph = {module_name(p): imports(p) for p in FILES}
    names = set(graph)
    edges = {
        m: {max((x for x in names if n == x or n.startswith(x + ".")), key=len, default=m) for n in ns} - {m}
        for m, ns in graph.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in edges[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in names:
        visit(module, ())
