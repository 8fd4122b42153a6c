"""Find a model by its name on the Hugging Face hub: in the hub's local cache, else by a download."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object
from llama_jax.data.tokenizer import FILES, TEMPLATES
from llama_jax.reporting.progress import say

SMALL = ("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_OF_FILES = (".gguf", ".safetensors", ".bin", ".json")


def find_folder(path: Path, weights: bool = True, allow_pickle: bool = False) -> Path:
    """Return `path` where it exists or is no name of the hub, else the snapshot of the hub's model `org/model`.

    A cached model is taken as it is, without asking the hub for a newer one. With `weights` False, config.json and the
    tokenizer suffice. Raises InputError.
    """
    name = path.as_posix()
    if path.exists() or path.suffix in _OF_FILES:
        return path
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return path
    cached = None
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model"):
        found = try_to_load_from_cache(name, file)
        cached = cached or (Path(found).parent if isinstance(found, str) else None)
    held = [str(p.relative_to(cached)) for p in cached.rglob("*") if p.exists()] if cached else []
    usable = bool(cached and (not weights or _has_weights(cached, held, allow_pickle)))
    if usable and "config.json" in held and {"tokenizer.json", "tokenizer.model"}.intersection(held):
        assert cached
        return cached
    problem = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            wanted = choose_files(name, HfApi().list_repo_files(name), weights, allow_pickle)
            say(f"{name}: taken from the Hugging Face hub; its files are kept in {constants.HF_HUB_CACHE}")
            return Path(snapshot_download(name, allow_patterns=wanted))
        except InputError:
            raise
        except Exception as e:  # of several libraries: the hub's answers, connections, the disk
            problem = f"the hub cannot give it ({type(e).__name__}: {' '.join(str(e).split())[:200]})"
    if usable:
        assert cached
        return cached
    where = f"only in part in its cache ({cached})" if cached else f"not in its cache ({constants.HF_HUB_CACHE})"
    raise InputError(
        f"{name}: no such folder here; as a name of the Hugging Face hub it is {where}, and {problem}; give a folder "
        f"with an HF model, or download this one with: hf download {name}"
    )


def _has_weights(folder: Path, held: Iterable[str], allow_pickle: bool) -> bool:
    """Return whether a snapshot holds all files of the weights."""
    for file in _weight_files(held, allow_pickle):
        if not file.endswith(".index.json"):
            return True
        shards = read_json_object(folder / file).get("weight_map")
        return isinstance(shards, dict) and {*map(str, shards.values())}.issubset({*held})
    return False


def _weight_files(files: Iterable[str], allow_pickle: bool) -> list[str]:
    """Return the file that the weights are read from, or their index: the same choice as `readers` makes."""
    found = ["model.safetensors", "model.safetensors.index.json"]
    found += ["pytorch_model.bin", "pytorch_model.bin.index.json"] if allow_pickle else []
    return [name for name in found if name in {*files}]


def choose_files(name: str, files: list[str], weights: bool, allow_pickle: bool = False) -> list[str]:
    """Return those `files` of a model that this program reads. Raises InputError where there are no weights."""
    small = [f for f in files if f in (*SMALL, *FILES) or (PurePosixPath(f).parent.name == TEMPLATES and "/" in f)]
    if not weights:
        return small
    first = next(iter(_weight_files(files, allow_pickle)), None)
    if first is None:
        others = sorted(f for f in files if f.endswith((".gguf", ".bin")))
        held = f"it holds {', '.join(others[:3])}" if others else "it holds no weights"
        raise InputError(
            f"{name}: the hub's repository has no model.safetensors: {held}; download a .gguf file with hf download "
            f"{name} FILE and give its path, or read pytorch_model.bin by --allow_pickle True"
        )
    if not first.endswith(".index.json"):
        return [*small, first]
    stem, suffix = first.split(".")[:2]
    return [*small, *(f for f in files if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", f))]
