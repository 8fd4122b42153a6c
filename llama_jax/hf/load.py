"""Load a checkpoint's tensors into the model's parameters on their devices, one tensor at a time."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.hf.finite import checked
from llama_jax.hf.names import Path, name_table, without_layer
from llama_jax.hf.tensor import Index, Tensor
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, only, without
from llama_jax.model.llama import RunOptions
from llama_jax.model.quantized import INT8, NF4, is_quantized
from llama_jax.model.quantizing import quantize
from llama_jax.model.roles import Params, is_stacked

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
READERS = 4  # threads: copying out of the page cache takes several to keep up with a device's bus


def check_tensors(
    tensors: dict[str, Tensor], config: LlamaConfig, source: str, allow_nonfinite: bool = False
) -> dict[str, Tensor]:
    """Return the model's tensors, by the names of `name_table`. Raises InputError for unknown, missing and wrongly
    shaped tensors, by name. Reading a NaN or Inf raises InputError too, unless `allow_nonfinite`.

    As in transformers, names may lack the prefix `model.` (of a saved LlamaModel), and a tied model may hold
    lm_head.weight alone.
    """
    table = name_table(config)
    tensors = tensors if allow_nonfinite else checked(tensors, source)
    bare = {name for name in tensors if name not in table and f"model.{name}" in table.keys() - tensors.keys()}
    tensors = {f"model.{name}" if name in bare else name: t for name, t in tensors.items()}
    if config.tie_word_embeddings and _HEAD in tensors:
        head = tensors.pop(_HEAD)
        if not equal(head, tensors.setdefault(_EMBEDDING, head)):
            raise InputError(
                f"{source}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}; set "
                f"tie_word_embeddings to false in config.json to keep both, or remove {_HEAD} from the weights"
            )
    missing, unknown = table.keys() - tensors.keys(), tensors.keys() - table.keys()
    if missing == {_HEAD} and not unknown:
        raise InputError(
            f"{source}: {_HEAD} is missing: these are the weights of a model without its head (LlamaModel); save the "
            "whole LlamaForCausalLM, or set tie_word_embeddings to true in config.json if the embedding is its head"
        )
    for what, names, fix in (
        ("unknown", unknown, "give the config.json of these weights, or remove the tensors that LLaMA lacks"),
        (
            "missing",
            missing,
            "download or copy the folder again, or give the config.json of these weights",
        ),
    ):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise InputError(f"{source}: {len(names)} {what} tensor(s) for this config.json: {shown}; {fix}")
    for name, (_, shape) in table.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{source}/{tensors[name].file}: tensor {name!r} has shape {list(tensors[name].shape)}, "
                f"config.json means {list(shape)}"
            )
    return tensors


def equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
    """Return whether two matrices hold the same values, read a few rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    parts = ((slice(i, min(i + rows, a.shape[0])), slice(0, a.shape[1])) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read(part), b.read(part)) for part in parts)


def load_params(
    tensors: dict[str, Tensor],
    config: LlamaConfig,
    run: RunOptions,
    abstract: Params,
    mesh: Mesh,
    progress: Callable[[int], None] = lambda bytes_read: None,
) -> Params:
    """Read checked tensors (of `check_tensors`) into a tree of parameters of `run` like `abstract`, perhaps a part.

    Each device's part goes from the file to the device in the file's type and is cast there. A quantized matrix is
    whole on the host while it is quantized. Besides the parameters, host and devices hold READERS tensors at a time.
    Raises InputError for a matrix that cannot be quantized.
    """
    placed = define(config, RunOptions(), mesh).params
    names = {path: name for name, (path, _) in name_table(config).items()}
    stacked = is_stacked(abstract)

    def stacks(path: tuple) -> bool:
        return stacked and path[0] == "layers"

    def load_one(path: tuple, like: Any) -> Any:
        name = names[path]
        tensor, target = tensors[name], _at(placed, path)
        array = _quantized(tensor, name, run, like, mesh) if is_quantized(like) else _place(tensor, target)
        progress(int(np.prod(tensor.shape)) * tensor.dtype.itemsize)
        return array

    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_quantized)
    parts: list[list[tuple]] = []  # the tensors of each leaf
    for keys, like in leaves:
        path = tuple(k.key for k in keys)
        layers = range(config.num_hidden_layers)
        paths = [(path[0], i, *path[1:]) for i in layers] if stacks(path) else [path]
        parts.append([(path, like) for path in paths])
    result = []
    with ThreadPoolExecutor(READERS) as pool, jax.set_mesh(mesh):
        arrays = _ahead(pool, load_one, itertools.chain.from_iterable(parts))
        # Programs are dispatched here, not in the threads: several processes must dispatch them in the same order.
        for tensors_of_leaf, (_, target) in zip(parts, leaves, strict=True):
            if not stacks(tensors_of_leaf[0][0]):
                result.append(jax.tree.map(lambda array, like: _cast(array, like.dtype), next(arrays), target))
                continue
            leaf = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype, device=like.sharding), target)
            for number in range(len(tensors_of_leaf)):
                # Block: otherwise the source arrays pile up.
                leaf = jax.block_until_ready(_put(leaf, next(arrays), np.int32(number)))
            result.append(leaf)
    return jax.tree.unflatten(treedef, result)


def _ahead(pool: ThreadPoolExecutor, load: Callable[..., Any], tensors: Iterable[tuple]) -> Iterator[Any]:
    """Yield the loaded tensors in order, with at most READERS of them loaded in advance."""
    pending: collections.deque[Future[Any]] = collections.deque()
    for path, like in tensors:
        pending.append(pool.submit(load, path, like))
        if len(pending) > READERS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def place_arrays(arrays: Mapping[Path, np.ndarray], like: Params) -> tuple[Params, Params]:
    """Place host arrays, by their path in the unstacked tree, as parameters of the tree `like`.

    Return these parameters, and the part of `like` that has no array.
    """
    stacked = is_stacked(like)
    held = only(like, {without_layer(path) if stacked else path for path in arrays})

    def place(keys: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
        path = tuple(k.key for k in keys)
        if path in arrays:
            array = arrays[path]
        else:  # stacked layers
            array = np.stack([arrays[(path[0], i, *path[1:])] for i in range(target.shape[0])])
        padded = np.zeros(target.shape, target.dtype)
        padded[tuple(map(slice, array.shape))] = array
        return jax.make_array_from_callback(target.shape, target.sharding, lambda index: padded[index])

    return jax.tree_util.tree_map_with_path(place, held), without(like, held)


@jax.jit(static_argnums=1, donate_argnums=0)
def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype)


@jax.jit(donate_argnums=0)
def _put(stacked: Any, layer: Any, number: np.int32) -> Any:
    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), number, 0)

    return jax.tree.map(put, stacked, layer)


def _quantized(tensor: Tensor, name: str, run: RunOptions, like: NF4 | INT8, mesh: Mesh) -> NF4 | INT8:
    """Return the tensor quantized on the devices; `like` has the placements, perhaps of stacked layers.

    Nested statistics depend on the whole matrix, so each process quantizes all of it.
    """
    assert run.quantization is not None
    matrix = quantize(tensor.read(()).astype(run.param_dtype), run.quantization, name)

    def place(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
        spec = P(*target.sharding.spec[target.ndim - array.ndim :])
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    return jax.tree.map(place, matrix, like)


def _place(tensor: Tensor, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Return the tensor in its own type on the target's devices, padded with zeros."""

    def read(index: Index | None) -> np.ndarray:
        assert index is not None
        bounds = [s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True)]
        inside = tuple(slice(min(a, n), min(b, n)) for (a, b), n in zip(bounds, tensor.shape, strict=True))
        empty = any(s.start == s.stop for s in inside)
        part = np.zeros([s.stop - s.start for s in inside], dtype) if empty else tensor.read(inside)
        missing = [(0, b - a - n) for (a, b), n in zip(bounds, part.shape, strict=True)]
        return (np.pad(part, missing) if any(m for _, m in missing) else part).astype(dtype, copy=False)

    dtype = jax.dtypes.canonicalize_dtype(tensor.dtype)  # float64 becomes float32
    return jax.make_array_from_callback(target.shape, target.sharding, read, dtype=dtype)


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def resize_vocabulary(params: Params, old: LlamaConfig, new: LlamaConfig, new_ids: Sequence[int], mesh: Mesh) -> Params:
    """Resize each vocabulary matrix of `old` to `new` as stanford_alpaca does.

    Rows of new tokens, and rows that the checkpoint lacks, become the mean of the rows that stay. (HF draws a row that
    the checkpoint lacks and that is no new token's.) A checkpoint with more rows than tokens has a row for a new token.
    """
    fresh = np.arange(sharding.vocab_rows(new.vocab_size)) >= old.vocab_size
    fresh[list(new_ids)] = True
    kept = ~fresh[: min(old.vocab_size, new.vocab_size)]

    def resize(weight: jax.Array, spec: sharding.P) -> jax.Array:
        weight = jax.sharding.reshard(weight, sharding.P(None, sharding.SHARDS))  # whole columns: no full copy
        (V,), D = fresh.shape, weight.shape[1]
        weight = weight[: len(kept)]
        mean = jnp.mean(weight.astype(jnp.float32), axis=0, where=kept[:, None]).astype(weight.dtype)
        body = jnp.pad(weight, ((0, V - len(kept)), (0, 0)))
        filled = jnp.where(fresh[:, None], jnp.broadcast_to(mean, (V, D)), body)
        return jax.sharding.reshard(jnp.where(jnp.arange(V)[:, None] < new.vocab_size, filled, 0), spec)

    result = dict(params)
    with jax.set_mesh(mesh):
        head = sharding.column(sharding.vocab_rows(new.vocab_size))
        for name, spec in (("embed_tokens", sharding.EMBED_VD), ("lm_head", head)):
            if name in params:
                result[name] = {"weight": jax.jit(resize, static_argnums=1)(params[name]["weight"], spec)}
    return result
