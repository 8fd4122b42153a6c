"""Write and read `manifest.json`, by which the receiver of an exported folder proves that it is whole and right.

It holds the digest of each tensor and of each other file that decides results, the facts of the run, and the logits of
three prompts that this program computed from the exported weights (`python -m llama_jax.parity --verify`).
"""

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.base.errors import InputError, one_line
from llama_jax.base.files import read_json_object, write_text
from llama_jax.base.secrets import without_query
from llama_jax.base.versions import PACKAGES, versions
from llama_jax.data.tokenizer import FILES, TEMPLATES, Tokenizer
from llama_jax.distributed import processes
from llama_jax.hf.digests import Entry, describe, digest_of_all
from llama_jax.hf.hub import SMALL
from llama_jax.hf.names import name_table
from llama_jax.hf.tensor import Tensor
from llama_jax.model.config import LlamaConfig
from llama_jax.model.prompt_logits import PromptLogits, Read
from llama_jax.model.roles import Params, is_stacked
from llama_jax.reporting.progress import say

MANIFEST, FORMAT = "manifest.json", 1
ADAPTER_CONFIG = "adapter_config.json"  # transformers loads the adapter beside it, also on top of a whole model
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*")
COLUMNS = 64  # of the vocabulary: with three prompts some 20 kB
READERS = 4  # threads: SHA-256 of one takes 0.5 to 2 GB/s
# Without line ends, after which transformers 4.37 and 5 read a tokenizer.model differently.
TEXTS = ("The sea is deep, and", "Grüße aus Köln: 你好!", "def double(x): return 2 *")


class Prompt(NamedTuple):
    """Hold a prompt: its text, None where no tokenizer is exported, and its ids."""

    text: str | None
    ids: list[int]


@dataclass(frozen=True)
class Manifest:
    """Hold a manifest. `tensors` are by name, `files` digests by name, `base` an adapter's base model, `data` and
    `flags` those of the run. `logits` are of `prompts`, at `columns` of the vocabulary."""

    tensors: dict[str, Entry]
    files: dict[str, str]
    base: dict[str, Any] | None
    data: dict[str, Any] | None
    flags: dict[str, Any]
    versions: dict[str, str]
    prompts: list[Prompt]
    columns: list[int]
    logits: list[PromptLogits]


@contextlib.contextmanager
def warning_without(folder: Path, remedy: str) -> Iterator[None]:
    """Turn a problem with the manifest of a folder that is complete into a warning, which names the `remedy`.

    Problems are bad input, such as the files of an adapter's base, the disk, and a device's memory.
    """
    try:
        yield
    except (InputError, OSError, jax.errors.JaxRuntimeError) as e:
        if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        say(f"warning: {folder}: the export is complete, and only {MANIFEST} is missing: {one_line(e)}; {remedy}")


def remove_manifest(folder: Path) -> None:
    """Remove the manifest of an earlier export, before any file of it is replaced."""
    (folder / MANIFEST).unlink(missing_ok=True)


def choose_prompts(tokenizer: Tokenizer | None, vocab_size: int) -> list[Prompt]:
    """Return three prompts for a model, the same on all processes, which must all call this.

    Without a tokenizer, or with one of more tokens than the model has rows, they are ids spread over the vocabulary.
    """
    ids = tokenizer.encode_batch(TEXTS) if tokenizer else []
    prompts = [Prompt(text, row) for text, row in zip(TEXTS, ids, strict=False)]
    if not prompts or any(not row or max(row) >= vocab_size for row in ids):
        spread = np.linspace(0, vocab_size - 1, 8 * len(TEXTS)).astype(int).reshape(len(TEXTS), -1)
        prompts = [Prompt(None, row) for row in spread.tolist()]
    return [Prompt(*prompt) for prompt in json.loads(processes.exchange(json.dumps(prompts))[0])]


def choose_columns(vocab_size: int) -> list[int]:
    """Return the columns of the vocabulary whose logits are written, spread over it."""
    return sorted({*np.linspace(0, vocab_size - 1, COLUMNS).astype(int).tolist()})


def reader(params: Params, config: LlamaConfig, dtypes: Mapping[str, np.dtype]) -> Read:
    """Return how to read parts of a model's parameters, stacked or not, rounded to the types of the exported files."""
    names = {path: name for name, (path, _) in name_table(config).items()}
    stacked = is_stacked(params)

    def rounded(keys: Any, value: jax.Array) -> jax.Array:
        dtype = dtypes[names[tuple(key.key for key in keys)]]
        return value if value.dtype == dtype else value.astype(dtype)

    def read(part: str | int) -> Params:
        if isinstance(part, str):
            tree: Params = {part: params[part]}
        else:
            tree = {"layers": {part: layer_of(params, part) if stacked else params["layers"][part]}}
        return jax.tree_util.tree_map_with_path(rounded, tree)

    return read


def layer_of(params: Params, number: int) -> Params:
    """Return the parameters of a layer out of a stack."""
    return jax.tree.map(lambda stack: stack[number], params["layers"])


def write_manifest(
    folder: Path,
    tensors: dict[str, Entry],
    prompts: Sequence[Prompt],
    columns: Sequence[int],
    logits: Sequence[PromptLogits],
    flags: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write the manifest of a folder whose other files are complete."""
    computed = [
        {
            **prompt._asdict(),
            "likeliest": found.likeliest.tolist(),
            "largest": _numbers(found.largest),
            "logits": _numbers(found.chosen),
        }
        for prompt, found in zip(prompts, logits, strict=True)
    ]
    machine = f"{platform.machine()}, {jax.devices()[0].device_kind}"
    values = {
        "format": FORMAT,
        "versions": {"python": platform.python_version(), "machine": machine, **versions(*PACKAGES)},
        "flags": dict(flags),
        "data": data and dict(data),
        "base": base and dict(base),
        "files": {path.relative_to(folder).as_posix(): file_digest(path) for path in deciding_files(folder)},
        "tensors": tensors,
        "columns": [*columns],
        "prompts": computed,
    }
    write_text(folder / MANIFEST, _dump(values))


def deciding_files(folder: Path) -> list[Path]:
    """Return the files beside the weights that decide results: configs, tokenizer, chat templates."""
    paths = [folder / name for name in (*SMALL, *FILES, ADAPTER_CONFIG) if (folder / name).exists()]
    return paths + (sorted((folder / TEMPLATES).glob("*.jinja")) if (folder / TEMPLATES).exists() else [])


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Read tensors from their files and return their digests and files."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda tensor: {"file": tensor.file, **describe(tensor.read(()))}, tensors.values())
        return dict(zip(tensors, found, strict=True))


def base_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return an adapter's base model for its manifest: its name without secrets, and the digest of all its tensors by
    HF's names, None for a Flax folder, whose tensors have no files."""
    return {"name": without_query(name), "sha256": digest_of_all(digest_tensors(tensors)) if tensors else None}


def _numbers(values: np.ndarray) -> list[Any]:
    """Return float32 values as JSON's numbers of nine digits, which name a float32 exactly; None for NaN and Inf."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.9g}") if np.isfinite(value) else None for value in values]


def _dump(values: Mapping[str, Any]) -> str:
    """Return JSON with a line for each tensor, each file and each token's logits."""
    parts = []
    for key, value in values.items():
        if key == "prompts":
            body = "[\n" + ",\n".join(_of_prompt(prompt) for prompt in value) + "\n  ]"
        elif isinstance(value, dict) and value:
            body = "{\n" + ",\n".join(f"    {json.dumps(k)}: {_line(v)}" for k, v in value.items()) + "\n  }"
        else:
            body = _line(value)
        parts.append(f"  {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _of_prompt(prompt: Mapping[str, Any]) -> str:
    rows = ",\n".join(f"        {_line(row)}" for row in prompt["logits"])
    others = "".join(f"      {json.dumps(key)}: {_line(value)},\n" for key, value in prompt.items() if key != "logits")
    return f'    {{\n{others}      "logits": [\n{rows}\n      ]\n    }}'


def _line(value: Any) -> str:
    return json.dumps(value)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a local folder. Raises InputError."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that a run exported")
    if not path.exists():
        raise InputError(
            f"{path}: no such file: this folder was not exported by train_jax.py or convert_torch_to_flax.py, or not "
            "to the end; copy it again with all its files, or export it anew"
        )
    values = read_json_object(path)
    if values.get("format") != FORMAT:
        raise InputError(
            f"{path}: is of format {values.get('format')!r}, and this version reads {FORMAT}; verify it with the "
            "llama_jax that wrote it, or a newer one"
        )
    return _checked(values, str(path))


def _checked(values: dict[str, Any], where: str) -> Manifest:
    """Return the manifest of a file's values. Raises InputError for missing and wrong ones."""
    try:
        prompts, columns = values["prompts"], values["columns"]
        logits = [PromptLogits(*map(_array, (p["logits"], p["likeliest"], p["largest"]))) for p in prompts]
        for prompt, found in zip(prompts, logits, strict=True):
            count = len(prompt["ids"])
            shapes = [array.shape for array in found]
            if shapes != [(count, len(columns)), (count,), (count,)]:
                raise ValueError(f"the logits of a prompt of {count} tokens have the shapes {shapes}")
        for name, entry in values["tensors"].items():
            if not {"file", "dtype", "shape", "sha256"} <= entry.keys():
                raise ValueError(f"tensor {name!r} lacks its file, dtype, shape or sha256")
            if Path(entry["file"]).name != entry["file"]:
                raise ValueError(f"tensor {name!r}: file {entry['file']!r} is not a plain file name")
        return Manifest(
            **{key: values[key] for key in ("tensors", "base", "data", "flags", "versions", "columns")},
            files=dict(values["files"]),
            prompts=[Prompt(p["text"], p["ids"]) for p in prompts],
            logits=logits,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        problem = f"lacks {e}" if isinstance(e, KeyError) else str(e)
        raise InputError(f"{where}: is no manifest of this program: {problem}; copy it again") from None


def _array(values: Any) -> np.ndarray:
    """Return numbers as float64, which holds ids and float32 exactly, None as NaN."""
    return np.asarray(values, np.float64)
