"""Read and write PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, as PEFT 0.21 does.

A module's name is its path in transformers' model, "model.layers.0.self_attn.q_proj"; a projection's name is the part
after the layer, "self_attn.q_proj". All shapes are HF's, without padding for a mesh.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors.numpy import save_file

from llama_jax.base.bucket import is_remote, local_file
from llama_jax.base.errors import InputError
from llama_jax.base.files import read_json_object, refuse_foreign_link, write_text
from llama_jax.hf import checkpoint, names
from llama_jax.hf.digests import Entry, describe
from llama_jax.hf.finite import checked
from llama_jax.hf.load import equal, place_arrays
from llama_jax.hf.manifest import remove_manifest
from llama_jax.hf.names import Path as Place
from llama_jax.hf.readers import open_safetensors
from llama_jax.hf.tensor import Tensor
from llama_jax.hf.torch_random import TorchRandom
from llama_jax.model.config import LlamaConfig
from llama_jax.model.lora import PROJECTIONS, Lora, Rank
from llama_jax.model.roles import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SAVED = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
SAVED = tuple(_SAVED)
_LONG = 20  # names: PEFT replaces a list of so many target modules by the shortest suffixes

# The keys of PEFT 0.21.2's LoraConfig with their defaults, but for target_modules and task_type.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# The target modules of a config without any, by model type: PEFT's own choice. It has none for granite and smollm3.
_DEFAULT_TARGETS = {family: ["q_proj", "v_proj"] for family in ("llama", "mistral", "qwen2", "qwen3")}

# Keys of other versions of PEFT that have no effect on the mathematics. `merge_weights` merges only for inference.
_OTHER_VERSIONS = ("merge_weights", "runtime_config")
_WITHOUT_EFFECT = (
    "auto_mapping base_model_name_or_path inference_mode megatron_core peft_version qalora_group_size revision".split()
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_layers(value: Any) -> bool:
    return all(isinstance(layer, int) and not isinstance(layer, bool) for layer in _as_list(value))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _maps_to(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


# The keys that decide the mathematics here: how a value is checked, and the description of a good value.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda v: v == "LORA", "LORA: other kinds of adapters are not supported"),
    "task_type": (lambda v: v == "CAUSAL_LM", "CAUSAL_LM: models with other heads are not supported"),
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "target_modules": (lambda v: _is_names(v) or isinstance(v, str), "a list of names, or a regular expression"),
    "exclude_modules": (lambda v: _is_names(v) or isinstance(v, str), "a list of names, or a regular expression"),
    "layers_to_transform": (_is_layers, "a layer's number, or a list of layers' numbers"),
    "layers_pattern": (lambda v: _is_names(v) or isinstance(v, str), "a name, or a list of names"),
    "rank_pattern": (_maps_to(_is_rank), "an object that maps patterns to whole numbers above 0"),
    "alpha_pattern": (_maps_to(_is_number), "an object that maps patterns to numbers"),
    "modules_to_save": (_is_names, "a list of names"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_rslora": (_is_bool, "true or false"),
    "use_dora": (_is_bool, "true or false"),
    "fan_in_fan_out": (_is_bool, "true or false"),
    "ensure_weight_tying": (_is_bool, "true or false"),
    "init_lora_weights": (
        lambda v: isinstance(v, bool) or (isinstance(v, str) and v.lower() == "gaussian"),
        "true, false or gaussian: other initialisations are not supported",
    ),
}


# Keys whose null PEFT does not take for the default: it ends in an error.
_NEVER_NULL = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias")


@dataclass(frozen=True)
class Adapter:
    """Hold an adapter's `adapter_config.json` to write, and its meaning for a model.

    `vocab_size` is the number of rows of the embedding and the head in the folder, where it is not the model's: the
    vocabulary was resized. None otherwise.
    """

    values: dict[str, Any]
    lora: Lora
    vocab_size: int | None = None

    def resized(self, config: LlamaConfig) -> LlamaConfig:
        """Return the model's architecture with the rows of the folder's embedding and head."""
        return dataclasses.replace(config, vocab_size=self.vocab_size or config.vocab_size)

    def size(self, config: LlamaConfig) -> int:
        """Return the number of the adapter's own parameters, without modules that are trained whole."""
        table = name_table(dataclasses.replace(self.lora, saved=()), config)
        return sum(math.prod(shape) for _, shape in table.values())

    def parameters_beside(self, config: LlamaConfig) -> int:
        """Return the number of parameters that PEFT adds to a model, without embeddings: a head trained whole is a
        copy."""
        return self.size(config) + ("lm_head" in self.lora.saved) * config.vocab_size * config.hidden_size


def read_settings(values: dict[str, Any], config: LlamaConfig, where: str) -> Adapter:
    """Resolve the keys of an `adapter_config.json` for a model. Missing keys have PEFT's defaults; so have nulls, but
    for those of _NEVER_NULL.

    `where` names the source in errors. Raises InputError for unknown keys, for PEFT's options that are not supported,
    and for targets that match no projection.
    """
    settings = {**_DEFAULTS, **{k: v for k, v in values.items() if v is not None and k not in _OTHER_VERSIONS}}
    for key, value in settings.items():
        if key not in _DEFAULTS:
            raise InputError(
                f"{where}: unknown key {key!r} ({repr(value)[:60]}) could change the mathematics; remove it if it does "
                "not"
            )
        if key in _CHECKS:
            good, wanted = _CHECKS[key]
            if key in _NEVER_NULL and values.get(key, value) is None:
                raise InputError(f"{where}: {key} is null; should be {wanted}")
            if value is not None and not good(value):
                raise InputError(f"{where}: {key} is {repr(value)[:60]}; should be {wanted}")
        elif key not in _WITHOUT_EFFECT:
            if value != _DEFAULTS[key] and value:
                raise InputError(
                    f"{where}: {key} ({repr(value)[:60]}) is an option of PEFT that is not supported; remove it"
                )
            settings[key] = _DEFAULTS[key]
    settings |= {"fan_in_fan_out": False, "inference_mode": True}  # as PEFT writes for nn.Linear, and for all adapters
    _check_saved(settings, where)
    _tie(settings, config, where)
    saved = tuple(last for last, name in _SAVED.items() if {last, name} & {*(settings["modules_to_save"] or [])})
    adapted = _adapted(settings, config, where)
    ranks = _ranks(settings, adapted, where)
    # PEFT writes the patterns sorted, and the first match counts.
    in_file = {**settings, **{k: dict(sorted(settings[k].items())) for k in ("rank_pattern", "alpha_pattern")}}
    if _ranks(in_file, adapted, where) != ranks:
        _refuse(where, "rank_pattern and alpha_pattern", "depend on their order, which is lost when PEFT writes them; "
                "make each module match one pattern alone")  # fmt: skip
    _check_bias(settings, config, adapted, where)
    lora = Lora(
        tuple((_layer_and_projection(name), rank) for name, rank in zip(adapted, ranks, strict=True)),
        saved=saved,
        dropout=float(settings["lora_dropout"]),
        use_dora=settings["use_dora"],
    )
    return Adapter(settings, lora)


def _refuse(where: str, key: str, problem: str) -> NoReturn:
    raise InputError(f"{where}: {key} {problem}")


def _tie(settings: dict[str, Any], config: LlamaConfig, where: str) -> None:
    """Name the tied embedding in `modules_to_save` as PEFT does under `ensure_weight_tying`.

    Without this option PEFT unties the weights: each saved module becomes a copy, and the other stays as it was.
    """
    saved = settings["modules_to_save"]
    if not config.tie_word_embeddings or not saved:
        return
    if not settings["ensure_weight_tying"]:
        _refuse(
            where,
            "modules_to_save",
            f"names {', '.join(saved)}, and this model's embedding and head are tied: PEFT would untie them, which is "
            "not supported; add ensure_weight_tying true (--ensure_weight_tying True) to train both as one matrix",
        )
    saved = [*saved, *({_SAVED["embed_tokens"]} - {*saved})]
    if "lm_head" in saved:
        saved.remove("lm_head")
    settings["modules_to_save"] = saved


def _check_saved(settings: dict[str, Any], where: str) -> None:
    """Raise InputError for a module that cannot be trained whole."""
    for name in settings["modules_to_save"] or []:
        if name not in (*_SAVED, *_SAVED.values()):
            _refuse(where, "modules_to_save", f"names {name!r}; only embed_tokens and lm_head can be trained whole")


def _adapted(settings: dict[str, Any], config: LlamaConfig, where: str) -> list[str]:
    """Return the names of the modules that get an adapter, in the model's order; complete `target_modules`.

    PEFT's rules: names match whole or after a dot, a regular expression matches the whole name, `layers_to_transform`
    narrows matches after a dot alone, and excluded and saved modules get no adapter.
    """
    modules = names.module_names(config)
    targets = settings["target_modules"]
    if isinstance(targets, str) and settings["layers_to_transform"] is not None:
        _refuse(where, "layers_to_transform", "has no meaning where target_modules is a string; give a list of names")
    if settings["layers_pattern"] and (isinstance(targets, str) or settings["layers_to_transform"] is None):
        _refuse(where, "layers_pattern", "has no meaning without layers_to_transform and a list of target_modules")
    if targets is None:
        targets = _DEFAULT_TARGETS.get(config.model_type)
        if targets is None:
            _refuse(where, "target_modules", f"is missing, and PEFT has no default for {config.model_type}; {_FIX}")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = [name for name in modules if name.endswith(PROJECTIONS)]
    if isinstance(targets, list):
        targets = sorted(set(targets))
        for target in targets:
            if target == "all-linear":
                _refuse(where, "target_modules", "names all-linear beside others; give all-linear alone")
            if not any(_ends(name, [target]) for name in modules):
                _refuse(where, "target_modules", f"names {target!r}, which is no module of this model; {_FIX}")
        if len(targets) >= _LONG:
            targets = _shorten(targets, modules)
    settings["target_modules"] = targets
    excluded = [name for name in modules if _matches(settings, "exclude_modules", name, where)]
    if settings["exclude_modules"] and not excluded:
        _refuse(where, "exclude_modules", f"({settings['exclude_modules']}) matches no module of this model; remove it")
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in settings["modules_to_save"] or []]
    adapted = [
        name
        for name in modules
        if name not in excluded
        and not any(pattern.match(name) for pattern in saved)
        and _matches(settings, "target_modules", name, where)
        and (isinstance(targets, str) or name in targets or _in_layers(settings, name, where))
    ]
    for name in adapted:
        if not name.endswith(PROJECTIONS):
            fix = "name it in modules_to_save to train it whole" if name in _SAVED.values() else _FIX
            _refuse(where, "target_modules", f"matches {name}, which cannot have an adapter here; {fix}")
    if not adapted:
        _refuse(where, "target_modules", f"({repr(targets)[:60]}) matches no projection of this model; {_FIX}")
    return adapted


_FIX = (
    f"give a list of {', '.join(name.split('.')[1] for name in PROJECTIONS)}, all-linear, or a regular expression that "
    "matches whole names like model.layers.0.self_attn.q_proj"
)


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _matches(settings: Mapping[str, Any], key: str, name: str, where: str) -> bool:
    """Return whether a list of names or a regular expression matches a module's name."""
    given = settings[key]
    if isinstance(given, str):
        return bool(given) and _regex(re.fullmatch, given, name, key, where)
    return _ends(name, given or [])


def _regex(match: Callable[..., Any], pattern: str, name: str, key: str, where: str) -> Any:
    try:
        return match(pattern, name)
    except re.error as e:
        _refuse(where, key, f"{pattern!r} is no regular expression: {e}")


def _in_layers(settings: Mapping[str, Any], name: str, where: str) -> bool:
    """Return whether `layers_to_transform` has the first layer number in a module's name."""
    layers = settings["layers_to_transform"]
    if layers is None or layers == []:
        return True
    patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in _as_list(settings["layers_pattern"] or [])]
    found = (
        _regex(re.match, pattern, name, "layers_pattern", where) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]
    )
    match = next((match for match in found if match), None)
    return match is not None and int(match[1]) in _as_list(layers)


def _shorten(targets: list[str], modules: list[str]) -> list[str]:
    """Return the shortest suffixes that tell the targets from all other modules, sorted, as PEFT saves a long list."""

    def suffixes(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

    taken = {suffix for name in modules if not _ends(name, targets) for suffix in suffixes(name)}
    chosen: set[str] = set()
    for ends in sorted(map(suffixes, targets)):
        free = [end for end in ends if end not in taken | chosen]
        if free and not any(ends[-1].endswith(f".{end}") for end in chosen):
            chosen.add(free[0])
    return sorted(chosen) if chosen and len(chosen) < len(targets) else targets


def _ranks(settings: Mapping[str, Any], adapted: list[str], where: str) -> list[Rank]:
    """Return the rank and scaling of each adapted module, by the first pattern that matches the end of its name."""

    def chosen(patterns: str, default: str) -> list[Any]:
        regexes = {key: rf"(.*\.)?({key})$" for key in settings[patterns]}
        found = [
            next((key for key, regex in regexes.items() if _regex(re.match, regex, name, patterns, where)), None)
            for name in adapted
        ]
        for key in regexes:
            if not any(_regex(re.match, regexes[key], name, patterns, where) for name in adapted):
                _refuse(where, patterns, f"has the pattern {key!r}, which matches no adapted module; remove it")
        return [settings[default] if key is None else settings[patterns][key] for key in found]

    pairs = zip(chosen("rank_pattern", "r"), chosen("alpha_pattern", "lora_alpha"), strict=True)
    return [Rank(r, alpha / (math.sqrt(r) if settings["use_rslora"] else r)) for r, alpha in pairs]


def _check_bias(settings: Mapping[str, Any], config: LlamaConfig, adapted: list[str], where: str) -> None:
    """Refuse to train biases: of all modules, or of the adapted modules, where there is any."""
    biases = {name.removesuffix(".bias") for name in names.name_table(config) if name.endswith(".bias")}
    trained = {"none": set(), "all": biases, "lora_only": biases & {*adapted}}[settings["bias"]]
    if trained:
        _refuse(where, "bias", f"is {settings['bias']}, and training biases beside adapters is not supported; set none")


def _layer_and_projection(name: str) -> tuple[int, str]:
    _, _, layer, projection = name.split(".", 3)
    return int(layer), projection


def first_values(
    lora: Lora, config: LlamaConfig, seed: int, init: bool | str = True, base: np.dtype = np.dtype(np.float32)
) -> dict[Place, np.ndarray]:
    """Return the first A [r, in] and B [out, r] of all adapters, float32, by their paths in the unstacked tree.

    The values are those of PEFT under `torch.manual_seed(seed)` on the CPU. Each `nn.Linear` draws its own values; then
    PEFT draws A again and sets B to zero, unless `init` is false. A of "gaussian" differs by rounding (`TorchRandom`).
    `base` is the type of the base's weights: PEFT rounds the draws to it, unless it is a type of integers.
    """
    random, shapes = TorchRandom(seed), names.projection_shapes(config)
    first: dict[Place, np.ndarray] = {}
    for (layer, projection), (r, _) in lora.ranks:
        out, in_ = shapes[projection]
        path: Place = ("layers", layer, *projection.split("."), "adapter")
        if init is False:
            a, b = random.kaiming_uniform(r, in_), random.kaiming_uniform(out, r)
        else:
            random.skip(r * in_ + out * r)
            a = random.kaiming_uniform(r, in_) if init is True else random.normal(r, in_, 1 / r)
            b = np.zeros((out, r), np.float32)
        if base.itemsize == 2:
            a, b = (values.astype(base).astype(np.float32) for values in (a, b))
        first |= {(*path, "lora_A", "weight"): a, (*path, "lora_B", "weight"): b}
    return first


def name_table(lora: Lora, config: LlamaConfig) -> dict[str, tuple[Place, tuple[int, ...]]]:
    """Return {name in `adapter_model.safetensors`: (path in the unstacked parameter tree, shape)}.

    A tied model's saved embedding has two names with one path.
    """
    shapes = names.projection_shapes(config)
    table: dict[str, tuple[Place, tuple[int, ...]]] = {}
    for (layer, projection), (r, _) in lora.ranks:
        out, in_ = shapes[projection]
        path: Place = ("layers", layer, *projection.split("."), "adapter")
        at = f"{_PREFIX}model.layers.{layer}.{projection}"
        table[f"{at}.lora_A.weight"] = ((*path, "lora_A", "weight"), (r, in_))
        table[f"{at}.lora_B.weight"] = ((*path, "lora_B", "weight"), (out, r))
        if lora.use_dora:
            table[f"{at}.lora_magnitude_vector"] = ((*path, "lora_magnitude", "weight"), (out,))
    for last, name in _SAVED.items():
        tied = config.tie_word_embeddings and "embed_tokens" in lora.saved
        if last in lora.saved or tied:
            path = ("embed_tokens" if tied else last, "weight")
            table[f"{_PREFIX}{name}.weight"] = (path, (config.vocab_size, config.hidden_size))
    return table


def read_adapter(folder: Path, config: LlamaConfig, allow_nonfinite: bool = False) -> tuple[Adapter, dict[str, Tensor]]:
    """Read a PEFT folder for a model: its settings, and its tensors by the names of `name_table`.

    An embedding and a head may be there beside these names: PEFT adds them, frozen, to an adapter of a resized
    vocabulary. Raises InputError for missing, unexpected and wrongly shaped tensors, by name. Reading a NaN or Inf
    raises InputError too, unless `allow_nonfinite`. A run's checkpoint of an adapter is read too.
    """
    if is_remote(folder):
        raise InputError(f"{folder}: an adapter is read from a local folder; copy it here")
    is_saved = checkpoint.is_checkpoint(folder)
    if is_saved and not (folder / CONFIG).exists():
        raise InputError(
            f"{folder}: is a run's checkpoint without {CONFIG}: of all parameters, of a run that resized the "
            "vocabulary, or of before 2026-11-29; make a folder of it with the run's flags and --export_only True"
        )
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder}: no {CONFIG} in this folder; give a folder that PEFT's save_pretrained wrote")
    refuse_foreign_link(folder, folder / CONFIG)
    values = read_json_object(folder / CONFIG)
    if "peft_type" not in values:
        raise InputError(f"{folder / CONFIG}: key 'peft_type' is missing, so this is not PEFT's; LORA is supported")
    adapter = read_settings(values, config, str(folder / CONFIG))
    if not is_saved and not (folder / WEIGHTS).exists():
        if (folder / "adapter_model.bin").exists():
            raise InputError(
                f"{folder}: holds only pickled weights, adapter_model.bin; load the adapter with "
                f"PeftModel.from_pretrained and save it with save_pretrained, which writes {WEIGHTS}"
            )
        raise InputError(f"{folder}: no {WEIGHTS} in this folder; copy or download it again")
    tensors = _saved_tensors(folder, adapter, config) if is_saved else open_safetensors(folder / WEIGHTS)
    tensors = tensors if allow_nonfinite else checked(tensors, str(folder))
    adapter = dataclasses.replace(adapter, vocab_size=_resized(tensors, config, folder))
    config = dataclasses.replace(config, vocab_size=adapter.vocab_size or config.vocab_size)
    everything = dataclasses.replace(adapter.lora, saved=SAVED)
    table, allowed = name_table(adapter.lora, config), name_table(everything, config)
    both = sorted(tensors.keys() & allowed.keys())
    shapes = {name: (tensors[name].shape, allowed[name][1]) for name in both}
    for problem, wrong in (
        ("missing", sorted(table.keys() - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - allowed.keys())),
        ("wrongly shaped", [f"{n} {[*is_]}, not {[*wanted]}" for n, (is_, wanted) in shapes.items() if is_ != wanted]),
    ):
        if wrong:
            shown = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
            raise InputError(
                f"{folder / WEIGHTS}: {len(wrong)} {problem} tensor(s) for {CONFIG} and this model: {shown}; give the "
                "model that the adapter was trained on, or save the adapter again"
            )
    embedding, head = (tensors.get(f"{_PREFIX}{name}.weight") for name in _SAVED.values())
    if config.tie_word_embeddings and embedding and head and not equal(embedding, head):
        raise InputError(
            f"{folder / WEIGHTS}: the embedding and the head differ, but this model ties them; save the adapter with "
            "ensure_weight_tying true"
        )
    return adapter, tensors


def _saved_tensors(folder: Path, adapter: Adapter, config: LlamaConfig) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of a run that trains an adapter. Raises InputError."""
    checkpoint.check_files(folder, folder)
    return checkpoint.host_tensors(folder, name_table(adapter.lora, config))


def _resized(tensors: Mapping[str, Tensor], config: LlamaConfig, folder: Path) -> int | None:
    """Return the rows of the folder's embedding and head where they are not the model's, else None."""
    found = {
        name: t.shape[0]
        for name in _SAVED.values()
        if (t := tensors.get(f"{_PREFIX}{name}.weight")) and len(t.shape) == 2
    }
    if len({*found.values()}) > 1:
        counts = ", ".join(f"{name} {rows}" for name, rows in found.items())
        raise InputError(f"{folder / WEIGHTS}: the numbers of tokens differ: {counts}; save the adapter again")
    return next((rows for rows in found.values() if rows != config.vocab_size), None)


def load_adapter(tensors: Mapping[str, Tensor], lora: Lora, config: LlamaConfig, like: Params) -> tuple[Params, Params]:
    """Return those parameters of `like` that a folder holds, an embedding and a head of a resized vocabulary among
    them, and the part of `like` that is left to the model's files."""
    everything = name_table(dataclasses.replace(lora, saved=SAVED), config)
    return place_arrays({everything[n][0]: t.read(()).astype(np.float32) for n, t in tensors.items()}, like)


def write_adapter(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], adapter: Adapter) -> dict[str, Entry]:
    """Write a folder that `PeftModel.from_pretrained` loads; `tensors` are host arrays by the names of `name_table`.
    Return the digest and the file of each tensor.

    Each file gets its name when it is complete; the config is the last. The manifest of an earlier export goes first.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors}
    temporary = folder / f"{WEIGHTS}.tmp"
    try:
        with local_file(temporary) as path:
            save_file(arrays, path, metadata={"format": "pt"})
            path.chmod(0o644)  # safetensors writes for the owner only
        remove_manifest(folder)
        temporary.replace(folder / WEIGHTS)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    write_config(folder, adapter)
    return {name: {"file": WEIGHTS, **describe(array)} for name, array in arrays.items()}


def write_config(folder: Path, adapter: Adapter) -> None:
    """Write `adapter_config.json`."""
    write_text(folder / CONFIG, json.dumps(adapter.values, indent=2, sort_keys=True))
