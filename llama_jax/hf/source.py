"""Open a folder that holds a model: HF's, GGUF, the Flax folder of the converter, or a checkpoint of a run."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from llama_jax.base.bucket import as_path, is_remote, reaching
from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object
from llama_jax.distributed import storage
from llama_jax.hf import checkpoint, generation
from llama_jax.hf.digests import Entry, describe, digest_of_all
from llama_jax.hf.finite import check_read
from llama_jax.hf.hub import find_folder
from llama_jax.hf.load import check_tensors, load_params
from llama_jax.hf.names import name_table
from llama_jax.hf.readers import Checkpoint, check_small_files, open_checkpoint
from llama_jax.hf.remote import FLAX_JSON, copy_model
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, pick
from llama_jax.model.generate import Sampling
from llama_jax.model.llama import RunOptions, stack_layers, unstack_layers
from llama_jax.model.roles import Params, is_stacked
from llama_jax.reporting.progress import say

_Kind = tuple[str, tuple[str, ...]]
_WHOLE: _Kind = ("an HF model", ("model*.safetensors*", "pytorch_model*.bin*"))
_FLAX: _Kind = ("a Flax model", (FLAX_JSON,))
_ADAPTER: _Kind = ("an adapter", ("adapter_config.json", "adapter_model.*"))
_OTHERS = {"Flax": [_WHOLE], "HF": [_FLAX], "adapter": [_WHOLE, _FLAX], "converted": [_FLAX, _ADAPTER]}


def refuse_other_kind(folder: Path, kind: str) -> None:
    """Refuse to write a kind of model, a key of `_OTHERS`, over another kind. Readers of such a mixed folder could load
    the wrong weights. An HF model of a run may replace an adapter, by `--overwrite_output_dir`. Raises InputError."""
    for held, patterns in _OTHERS[kind]:
        with reaching(folder, f"output_dir {folder} cannot be read"):
            found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.suffix != ".tmp"]
        if found:
            advice = "choose another --output_dir, or remove it"
            raise InputError(f"output_dir {folder} holds {held} ({found[0].name}): {advice}")


class Source:
    """Open a model: `raw` is its config.json, `config` the architecture. Weights are read by `load`; without `weights`
    the folder may have none. `tokenizer` is a folder that replaces the model's own. Both may be names of the hub.
    Reading a NaN or Inf raises InputError with the tensor's name, unless `allow_nonfinite`. `is_flax` is whether the
    weights are in this program's own format, of a Flax folder or a run's checkpoint."""

    def __init__(
        self,
        name: str | Path,
        allow_pickle: bool = False,
        weights: bool = True,
        tokenizer: str | Path | None = None,
        allow_nonfinite: bool = False,
    ):
        path, self._params = self._find(name, weights, allow_pickle)
        self._tokenizer, self._allow_nonfinite = tokenizer, allow_nonfinite
        self.is_flax = all((path / file).is_file() for file in (FLAX_JSON, "config.json"))
        self._is_saved = self.is_flax and checkpoint.is_checkpoint(self._params)
        if self.is_flax or (not weights and (path / "config.json").is_file()):
            check_small_files(path)
            if self._is_saved:
                checkpoint.check_files(self._params, path)
            self._checkpoint = Checkpoint(path, read_json_object(path / "config.json"), {})
        else:
            self._checkpoint = open_checkpoint(path, allow_pickle)
        self.folder, self.raw = self._checkpoint.folder, self._checkpoint.config
        self.config = LlamaConfig.from_hf(self.raw, str(self._checkpoint.gguf or self.folder / "config.json"))
        self.tensors = {}
        if self._checkpoint.tensors or (weights and not self.is_flax):
            tensors = self._checkpoint.tensors
            self.tensors = check_tensors(tensors, self.config, str(self.folder), allow_nonfinite)
        self._opened = self._state_of_files()

    @staticmethod
    def _find(name: str | Path, weights: bool, allow_pickle: bool = False) -> tuple[Path, Path]:
        """Return the local folder of a model's files, and the folder of a Flax folder's arrays. Raises InputError."""
        path = as_path(name)
        if is_remote(path):
            return copy_model(path, weights, allow_pickle), path
        path = find_folder(path, weights, allow_pickle)
        return path, path

    def _state_of_files(self) -> dict[Path, tuple[int, int] | None]:
        """Return size and time of the weights' files, None for a file that is gone; of a Flax folder of its JSON."""
        names = {FLAX_JSON} if self.is_flax else {tensor.file for tensor in self.tensors.values()}
        found: dict[Path, tuple[int, int] | None] = {}
        for path in [self.gguf] if self.gguf else sorted(self.folder / name for name in names):
            try:
                status = path.stat()
                found[path] = status.st_size, status.st_mtime_ns
            except OSError:
                found[path] = None
        return found

    def check_unchanged(self) -> None:
        """Refuse to take the files for the weights that were read, where one was written since. Raises InputError."""
        now = self._state_of_files()
        if changed := [path for path, state in self._opened.items() if now[path] != state]:
            problem = "was written" if now[changed[0]] else "was removed"
            raise InputError(f"{changed[0]}: {problem} after this run opened it")

    @property
    def gguf(self) -> Path | None:
        """Return the .gguf file that holds the model, None where an HF or a Flax folder does."""
        return self._checkpoint.gguf

    @property
    def notes(self) -> list[str]:
        """Return the notes for the user on how the weights are read."""
        wide = any(t.dtype == np.float64 for t in self.tensors.values())
        return [f"{self.folder}: its float64 tensors are read as float32"] if wide else []

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Return the type of each tensor in HF's files, by name; float32 for float64, which is read as float32."""
        if not self.is_flax:
            return {name: jax.dtypes.canonicalize_dtype(t.dtype) for name, t in self.tensors.items()}
        common, others = self._saved("dtype", str), self._saved("dtypes", dict)
        return {name: numpy_dtype(others.get(name, common)) for name in name_table(self.config)}

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Return the folder with the tokenizer's files; a GGUF's tokenizer is written to a temporary folder.

        Raises InputError.
        """
        if self._tokenizer:
            folder, _ = self._find(self._tokenizer, weights=False)
            check_small_files(folder)
            return folder
        if self._checkpoint.gguf is None:
            return self.folder
        from llama_jax.hf.gguf_tokenizer import write_gguf_tokenizer

        self._temporary = tempfile.TemporaryDirectory(prefix="llama_jax-")
        write_gguf_tokenizer(self._checkpoint.gguf, Path(self._temporary.name))
        return Path(self._temporary.name)

    def tokenizer_to_copy(self) -> Path | None:
        """Return `tokenizer_folder`, or None with a warning where a GGUF's tokenizer is missing or refused."""
        try:
            return self.tokenizer_folder
        except InputError as e:
            say(f"warning: {e}; no tokenizer is written")
            return None

    @property
    def stored_dtype(self) -> np.dtype:
        """Return the type of a Flax folder's parameters."""
        return numpy_dtype(self._saved("stored_dtype", str))

    def _saved(self, key: str, kind: type) -> Any:
        """Return a value of a Flax folder's `llama_jax.json`. Raises InputError."""
        value = read_json_object(self.folder / FLAX_JSON).get(key)
        if not isinstance(value, kind):
            raise InputError(f"{self.folder / FLAX_JSON}: {key} is {value!r}; convert the model again")
        return value

    @property
    def bytes(self) -> int:
        """Return the size of all tensors in their files."""
        return sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in self.tensors.values())

    def load(
        self,
        run: RunOptions,
        mesh: Mesh,
        progress: Callable[[int], None] = lambda n: None,
        like: Params | None = None,
    ) -> Params:
        """Return the parameters on the mesh, in the layout and type of `run`; with `like` only its parameters."""
        abstract = define(self.config, run, mesh).base
        wanted = abstract if like is None else pick(abstract, like)
        if not self.is_flax:
            return load_params(self.tensors, self.config, run, wanted, mesh, progress)
        if run.quantization:
            kind, fix = "a Flax folder", "give the HF folder that it was converted from"
            if self._is_saved:
                kind, fix = "a checkpoint", "make an HF folder of it by convert_torch_to_flax.py --to_hf"
            raise InputError(f"{self.folder}: is {kind}; projections are quantized while an HF folder is read: {fix}")
        if self._is_saved:
            params = checkpoint.load_params(self._params, self.config, self.stored_dtype, mesh)
        else:
            self._check_shapes()
            unstacked = define(self.config, RunOptions(param_dtype=run.param_dtype), mesh).params
            params = storage.load_params(self._params, unstacked)
        if not self._allow_nonfinite:
            check_read(params, name_table(self.config), str(self.folder))
        with jax.set_mesh(mesh):
            if run.scan_layers != is_stacked(params):
                params = stack_layers(params) if run.scan_layers else unstack_layers(params)
            return jax.tree.map(lambda x, target: x.astype(target.dtype), pick(params, wanted), wanted)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """Return `generation_config.json`; without the file, its part of `config.json`. Raises InputError."""
        path = self.folder / "generation_config.json"
        if path.exists():
            return read_json_object(path)
        return {"_from_model_config": True} | {k: self.raw[k] for k in generation.KEYS if self.raw.get(k) is not None}

    def eos_token_ids(self) -> list[int]:
        """Return the end tokens of `generation_config.json`, or without that file of config.json. Raises InputError."""
        configured = self.generation.get("eos_token_id")
        ids = [i for i in (configured if isinstance(configured, list) else [configured]) if i is not None]
        if not all(type(i) is int for i in ids):
            raise InputError(
                f"{self._generation_file}: eos_token_id {configured!r} should be a token's id or a list of ids"
            )
        return sorted(set(ids))

    def end_ids(self, eos: int | None) -> tuple[int, ...]:
        """Return the tokens that end an answer: `eos_token_ids`, and the tokenizer's `eos`, None for none."""
        return tuple(sorted({*self.eos_token_ids(), *([] if eos is None else [eos])}))

    def sampling(
        self, temperature: float | None = None, obeyed: Sequence[str] = (), **given: float | None
    ) -> tuple[Sampling, list[str]]:
        """Return how an answer's tokens are chosen, by values given, then by the file, and the lines about it.

        `obeyed` are keys of the file beside a `Sampling` that the caller obeys. Raises InputError.
        """
        file = self._generation_file
        sampling = generation.read_sampling(self.generation, file, temperature=temperature, **given)
        return sampling, generation.describe(self.generation, sampling, file, obeyed)

    def stops(self) -> list[str]:
        """Return the texts that end an answer. Raises InputError."""
        return generation.read_stops(self.generation, self._generation_file)

    def new_tokens(self) -> int | None:
        """Return the greatest number of new tokens of an answer, None where the file has none. Raises InputError."""
        count = self.generation.get("max_new_tokens")
        if count is not None:
            generation.check_new_tokens(count, f"{self._generation_file}: max_new_tokens")
        return count

    @property
    def _generation_file(self) -> str:
        own = self._checkpoint.gguf or self.folder / "config.json"
        return str(own if "_from_model_config" in self.generation else self.folder / "generation_config.json")

    def _check_shapes(self) -> None:
        """Check a Flax folder's shapes by config.json; only the vocabulary may have more rows. Raises InputError."""
        saved = storage.saved_shapes(self._params)
        for name, (path, shape) in name_table(self.config).items():
            found: Any = saved
            for key in path:
                found = found.get(str(key), {})
            in_vocabulary = path[0] in ("embed_tokens", "lm_head")
            more = found and in_vocabulary and found[0] > shape[0]
            if found != shape and not (more and found[1:] == shape[1:]):
                raise InputError(
                    f"{self.folder}: {name!r} has shape {list(found) or 'none'}, config.json means {list(shape)}"
                )


def training_dtype(source: Source, compat: str) -> str:
    """Return the parameters' type that transformers takes by default: float32 in 4.37, in 5 the checkpoint's.

    Raises InputError for float16, in which no update is safe.
    """
    if compat == "4.37":
        return "float32"
    dtype = source.raw.get("dtype") or source.raw.get("torch_dtype")
    if not dtype and not source.dtypes:
        raise InputError(f"{source.folder}/config.json: names no dtype, and there are no weights: give --dtype")
    dtype = dtype or dtype_summary(source.dtypes)["dtype"]
    if dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"{source.folder}: transformers 5 would train its {dtype} parameters as they are, losing small updates; "
            "give --dtype float32 (as transformers 4.37 does) or --dtype bfloat16"
        )
    return dtype


def dtype_summary(dtypes: dict[str, np.dtype]) -> dict[str, Any]:
    """Return the most frequent type ("dtype"), and by name the types that differ from it ("dtypes")."""
    names = [d.name for d in dtypes.values()]
    common = max(sorted(set(names)), key=names.count)
    return {"dtype": common, "dtypes": {n: d.name for n, d in dtypes.items() if d.name != common}}


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy type of a name in `llama_jax.json` or on the command line. Raises InputError."""
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    if name not in kinds:
        raise InputError(f"dtype {name!r} is not one of {', '.join(kinds)}")
    return np.dtype(kinds[name])


def compare_digests(
    expected: Iterable[tuple[str, np.ndarray]], actual: Iterable[tuple[str, np.ndarray]]
) -> tuple[int, str, list[str]]:
    """Return (tensors compared, the digest of all expected ones, names that differ), comparing tensor by tensor."""
    entries, different = dict[str, Entry](), []
    for (name, a), (other, b) in zip(expected, actual, strict=True):
        entries[name] = describe(a)
        if (name, entries[name]) != (other, describe(b)):
            different.append(name)
    return len(entries), digest_of_all(entries), different
