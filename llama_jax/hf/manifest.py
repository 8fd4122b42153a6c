"""Write and read `manifest.json`, by which the receiver of an exported folder proves that it is whole and right.

It holds the digest of each tensor and of each other file that decides results, the facts of the run, and the logits of
three prompts that this program computed from the exported weights (`python -m llama_jax.parity --verify`).
"""

import contextlib
import hashlib
import json
import math
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
WEIGHTS = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model*", "*.gguf", "consolidated*.pth", "tf_model*.h5"),
    "flax_model*.msgpack",
)
COLUMNS = 64  # of the vocabulary: with three prompts some 20 kB
LARGEST = float(np.finfo(np.float32).max)
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
    if type(values.get("format")) is not int or values["format"] != FORMAT:
        raise InputError(
            f"{path}: is of format {values.get('format')!r}, and this version reads {FORMAT}; verify it with the "
            "llama_jax that wrote it, or a newer one"
        )
    try:
        return _checked(values)
    except ValueError as e:
        raise InputError(f"{path}: is no manifest of this program: {e}; copy it again") from None


_KEYS = {*"format versions flags data base files tensors columns prompts".split()}


def _checked(values: dict[str, Any]) -> Manifest:
    """Return the manifest of a file's values. Raises ValueError for every type and range that `write_manifest` does not
    write, so that no reader of the manifest checks any."""
    _check_keys(values, _KEYS, "the file")
    columns = _check_ids(values["columns"], "columns")
    for key in ("tensors", "files"):
        _check(values[key] != {}, key, "should not be empty")
    _check(columns == sorted({*columns}), "columns", "are not sorted")
    for name, entry in _check_object(values["tensors"], "tensors").items():
        what = f"tensor {name!r}"
        _check_keys(entry, {"file", "dtype", "shape", "sha256"}, what)
        texts, shape = [entry[key] for key in ("file", "dtype", "sha256")], entry["shape"]
        _check(all(isinstance(text, str) for text in texts), what, "has values that are no text")
        _check(isinstance(shape, list) and all(type(size) is int for size in shape), what, "has a shape without sizes")
        file = entry["file"]
        _check(file not in ("", "..") and Path(file).name == file, what, f"has a file {file!r}, no plain file name")
    for name, digest in _check_object(values["files"], "files").items():
        _check(isinstance(digest, str), f"file {name!r}", "has a digest that is no text")
    if (base := values["base"]) is not None:
        _check_keys(base, {"name", "sha256"}, "base")
        _check(isinstance(base["name"], str) and base["name"] != "", "base", "has no name")
        _check(isinstance(base["sha256"], str | None), "base", "has a digest that is no text")
    for key in ("flags", "versions", *(["data"] if values["data"] is not None else [])):
        _check_object(values[key], key)
    _check(isinstance(values["prompts"], list) and values["prompts"] != [], "prompts", "should be a list, not empty")
    prompts, logits = [], []
    for number, prompt in enumerate(values["prompts"], start=1):
        what = f"prompt {number}"
        _check_keys(prompt, {"text", "ids", "likeliest", "largest", "logits"}, what)
        _check(isinstance(prompt["text"], str | None), what, "has a text that is none")
        prompts.append(Prompt(prompt["text"], _check_ids(prompt["ids"], f"{what}: ids")))
        count = len(prompts[-1].ids)
        likeliest = _check_ids(prompt["likeliest"], f"{what}: likeliest")
        _check(len(likeliest) == count, what, f"of {count} tokens has {len(likeliest)} likeliest ids")
        rows = prompt["logits"]
        _check(isinstance(rows, list) and len(rows) == count, what, f"should have logits after {count} tokens")
        found = [_check_numbers(row, len(columns), f"{what}: logits") for row in rows]
        largest = _check_numbers(prompt["largest"], count, f"{what}: largest")
        logits.append(PromptLogits(np.asarray(found), np.asarray(likeliest), np.asarray(largest)))
    _check(len({prompt.text is None for prompt in prompts}) == 1, "prompts", "have texts in part")
    read = {key: values[key] for key in ("tensors", "files", "base", "data", "flags", "versions")}
    return Manifest(**read, columns=columns, prompts=prompts, logits=logits)


def _check(holds: bool, what: str, problem: str) -> None:
    if not holds:
        raise ValueError(f"{what} {problem}")


def _check_object(value: Any, what: str) -> dict[str, Any]:
    _check(isinstance(value, dict), what, "should be an object")
    return value


def _check_keys(value: Any, keys: set[str], what: str) -> None:
    """Check an object of exactly these keys."""
    found = _check_object(value, what).keys()
    for key in sorted(keys - found):
        raise ValueError(f"{what} lacks {key!r}")
    for key in sorted(found - keys):
        raise ValueError(f"{what} has {key!r}, which has no meaning")


def _check_ids(value: Any, what: str) -> list[int]:
    """Return ids of a vocabulary, which some id of a model may be above."""
    good = isinstance(value, list) and value != [] and all(type(id) is int and 0 <= id < 2**31 for id in value)
    _check(good, what, "should be a list of ids from 0 to 2^31 - 1, not empty")
    return value


def _check_numbers(value: Any, count: int, what: str) -> list[float]:
    """Return numbers of float32 as they are, and NaN for null. JSON's NaN is none: `write_manifest` writes null."""
    _check(isinstance(value, list) and len(value) == count, what, f"should be a list of {count} numbers")
    for number in value:
        good = number is None or (type(number) in (int, float) and abs(number) <= LARGEST)
        _check(good, what, f"have {repr(number)[:40]}, no number of float32")
    return [math.nan if number is None else float(number) for number in value]
