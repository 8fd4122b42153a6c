"""Folders are floors: a folder imports only from folders on lower floors, and no files form a circle."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The table of the design: folder -> floor.
FLOORS = {
    "command": 8,
    "proof": 7,
    "run": 6,
    "plan": 5,
    "setup": 4,
    "training": 3,
    "hf": 3,
    "model": 2,
    "reporting": 2,
    "data": 1,
    "distributed": 1,
    "base": 0,
}
TOP = 9  # train_jax.py, convert_torch_to_flax.py, and the files of llama_jax/ itself
HOUSE = sorted([*ROOT.glob("*.py"), *(ROOT / "llama_jax").rglob("*.py")])
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in HOUSE} | {path.stem: path for path in BENCHMARKS}


def floor(module: str) -> int:
    parts = module.split(".")
    if module == "llama_jax":
        return TOP + 1  # the public names, of llama_jax/api.py
    is_folder = len(parts) > 1 and (ROOT / "llama_jax" / parts[1]).is_dir()
    return FLOORS[parts[1]] if is_folder else TOP


def imports(path: Path) -> set[str]:
    """Return the modules of this project that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


def test_folders_are_those_of_the_table():
    folders = {p.name for p in (ROOT / "llama_jax").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == FLOORS.keys()


@pytest.mark.parametrize("path", HOUSE, ids=module_name)
def test_no_arrow_runs_up(path: Path):
    here = module_name(path)
    for there in imports(path):
        same_folder = here.split(".")[:2] == there.split(".")[:2]
        assert same_folder or floor(there) < floor(here), f"{here} (floor {floor(here)}) imports {there}"


def test_no_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in imports(MODULES[module]) - {module}:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


PRIVATE = re.compile(r"(^|\.)(_(?!_)\w*|experimental)\b")


@pytest.mark.parametrize("path", HOUSE, ids=module_name)
def test_private_and_experimental_names_have_one_file(path: Path):
    """Only `distributed/compat.py` imports or names them, so that a new jax or orbax breaks a single file."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("llama_jax"):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"(jax|jnp|np|nnx|ocp|optax)(\.\w+)+", ast.unparse(node)):
            names.append(ast.unparse(node))
    private = [name for name in names if PRIVATE.search(name)]
    assert bool(private) == (module_name(path) == "llama_jax.distributed.compat"), private
