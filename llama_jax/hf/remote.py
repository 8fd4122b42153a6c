"""Copy a model from a bucket of Google Cloud Storage to this host."""

import hashlib
import os
from pathlib import Path, PurePosixPath

from llama_jax.base.bucket import reaching
from llama_jax.base.errors import InputError
from llama_jax.base.files import cache_folder
from llama_jax.hf.hub import choose_files
from llama_jax.reporting.progress import byte_bar, say

FLAX_JSON = "llama_jax.json"  # of a Flax folder: the types that the tensors had in HF's files


def copy_model(url: Path, weights: bool = True, allow_pickle: bool = False) -> Path:
    """Return a local copy of the model at `url`: the files that this program reads, and of a Flax folder all but its
    arrays, which each process reads from the bucket in part. Raises InputError.

    A copy is used again until the bucket's files change.
    """
    from filelock import FileLock
    from fsspec.core import url_to_fs

    with reaching(url, f"{url}: cannot be read"):
        system, place = url_to_fs(str(url))
        found = {name: info for name, info in system.find(place, detail=True).items() if info["type"] == "file"}
        if not found:
            raise InputError(f"{url}: no such folder in the bucket; give one with an HF model")
        is_file = [*found] == [place]
        names = [str(PurePosixPath(name).relative_to(place)) for name in found]
        if is_file:
            wanted = ["."]
        elif FLAX_JSON in names:
            wanted = [FLAX_JSON, *choose_files(str(url), names, weights=False)]
        else:
            wanted = choose_files(str(url), names, weights, allow_pickle)
        infos = {name: found[str(PurePosixPath(place) / name)] for name in wanted}
        versions = sorted((name, info["size"], str(info.get("generation"))) for name, info in infos.items())
        identity = hashlib.sha256(repr((str(url), versions)).encode()).hexdigest()[:16]
        folder = cache_folder("models") / identity / PurePosixPath(place).name
        copy = folder.parent if is_file else folder
        missing = {name: info for name, info in infos.items() if not (folder / name).exists()}
        if missing:
            say(f"{url}: its files are copied to {copy}")
        copy.mkdir(parents=True, exist_ok=True)
        # One process of a host copies; the others wait, and find the files.
        with FileLock(copy.parent / ".lock"), byte_bar("copying", sum(i["size"] for i in missing.values())) as bar:
            for name, info in missing.items():
                target, part = folder / name, (folder / name).with_name(f"{PurePosixPath(name).name}.part")
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    system.get_file(info["name"], str(part))
                    os.replace(part, target)
                bar.update(info["size"])
    return folder
