"""PEFT's adapter folders, held against PEFT: settings, first values, files, and its loader."""

import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import CONFIG, SISTERS

from llama_jax.base.errors import InputError
from llama_jax.hf.peft import Adapter, first_values, name_table, read_adapter, read_settings, write_adapter
from llama_jax.hf.torch_random import TorchRandom
from llama_jax.model.config import LlamaConfig
from llama_jax.model.lora import Lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

FAMILIES: dict[str, dict[str, Any]] = {name: {**CONFIG, **sister} for name, sister in SISTERS.items()}
FAMILIES |= {"llama": CONFIG, "llama, three layers": {**CONFIG, "num_hidden_layers": 3}}
TINY = LlamaConfig.from_hf(CONFIG)
NAMES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def base_model(raw: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))


def adapted_modules(model: Any) -> dict[str, Any]:
    """{name: PEFT's module}, in the order of its walk."""
    found = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    return {name: module for name, module in found.items() if "default" in module.lora_A}


def config_file(folder: Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json`; its sets are written in no order."""
    values = json.loads((folder / "adapter_config.json").read_text())
    return {k: sorted(v) if k in ("target_modules", "exclude_modules") and isinstance(v, list) else v
            for k, v in values.items()}  # fmt: skip


def in_order(values: dict[str, Any]) -> dict[str, Any]:
    excluded = values["exclude_modules"]
    return {**values, "exclude_modules": sorted({*excluded}) if isinstance(excluded, list) else excluded}


def save_by_peft(folder: Path, raw: dict[str, Any], seed: int = 0, **options: Any) -> Any:
    """A new PEFT model, saved to the folder as PEFT saves it."""
    model = base_model(raw)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(folder)
    return model


def shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def drawn_tensors(adapter: Adapter, config: LlamaConfig) -> dict[str, np.ndarray]:
    """A value for each tensor; names of one path have one value."""
    rng = np.random.default_rng(0)
    table = name_table(adapter.lora, config)
    by_path = {path: rng.normal(size=shape).astype(np.float32) for path, shape in table.values()}
    return {name: by_path[path] for name, (path, _) in table.items()}


PATTERNS = [
    *NAMES,
    "self_attn.v_proj",
    r"layers\.1\..*",
    r"layers.0.mlp.(up|down)_proj",
    "^model.layers.1.self_attn.q_proj",
]
LISTS = st.lists(
    st.sampled_from([*NAMES, "self_attn.q_proj", "0.mlp.up_proj", "model.layers.1.self_attn.k_proj"]),
    min_size=1,
    unique=True,
)
REGEXES = [r".*_proj", r".*\.(q|v)_proj", r"model\.layers\.1\.mlp\..*_proj", r".*self_attn\.[kvo]_proj$"]


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    targets = draw(st.one_of(LISTS, st.none(), st.sampled_from(["all-linear", "All-Linear", *REGEXES])))
    fitting = targets if isinstance(targets, list) else ["v_proj"] if targets is None else PATTERNS
    excluded = draw(st.sampled_from([None, None, None, ["o_proj", "lm_head"], r".*\.0\..*k_proj", ["model.layers"]]))
    drawn: dict[str, Any] = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "rank_pattern": draw(st.dictionaries(st.sampled_from(fitting), st.integers(1, 9), max_size=1)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(fitting), st.sampled_from([1, 7, 2.5]), max_size=2)),
        "r": draw(st.integers(1, 8)),
        "lora_alpha": draw(st.sampled_from([1, 8, 16, 0.3])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.05])),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "fan_in_fan_out": draw(st.booleans()),
        "init_lora_weights": draw(st.sampled_from([True, True, False, "gaussian"])),
        "modules_to_save": draw(
            st.sampled_from([None, ["lm_head"], ["model.embed_tokens"], ["lm_head", "embed_tokens"]])
        ),
        "ensure_weight_tying": True,
    }
    if not isinstance(drawn["target_modules"], str):
        drawn["layers_to_transform"] = draw(st.sampled_from([None, None, 1, 0, [0, 1], [], [5, 1]]))
        if drawn["layers_to_transform"] is not None:
            drawn["layers_pattern"] = draw(st.sampled_from([None, "layers", ["h", "layers"], []]))
    return drawn


# PEFT's own errors and warnings for the settings that are refused here.
PEFTS = (
    "Please specify|not found in the base model|No modules were targeted|did not match any|no modules were excluded|"
    "All modules were"
)


# Rules of PEFT that few draws reach: a whole name is adapted in whichever layer, a saved module is no target, a regular
# expression matches the whole name, and 20 names or more are shortened.
K_OF_1 = "model.layers.1.self_attn.k_proj"
LONG = [f"{i}.{block}" for i in range(3) for block in (*(f"self_attn.{name}" for name in NAMES[:4]), "mlp.up_proj")]
LONG += [f"layers.{i}.mlp.{name}" for i in (0, 2) for name in NAMES[4:]]


@example({"target_modules": ["q_proj", K_OF_1], "layers_to_transform": 0}, "llama", 1)
@example({"target_modules": ".*(q_proj|lm_head)", "modules_to_save": ["lm_head"]}, "llama", 1)
@example({"target_modules": ".*layers.0.self_attn.q"}, "llama", 1)
@example({"target_modules": "all-linear"}, "llama, three layers", 1)
@example({"target_modules": LONG}, "llama, three layers", 1)
@given(options(), st.sampled_from(sorted(FAMILIES)), st.integers(0, 2**40))
@settings(max_examples=25)
def test_peft(tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Any], family: str, seed: int) -> None:
    """Settings, ranks, scalings, first values, names and files are PEFT's, and each loads the other's folder."""
    raw, folder = FAMILIES[family], tmp_path_factory.mktemp("peft")
    config = LlamaConfig.from_hf(raw)
    try:
        adapter = read_settings(drawn, config, "here")
    except InputError as e:
        # PEFT refuses them too, or warns; it does not see that a file loses the order of patterns.
        if "depend on their order" not in str(e):
            with pytest.raises((ValueError, Warning), match=PEFTS), warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                warnings.filterwarnings("error", "You have passed exclude_modules")
                save_by_peft(folder, raw, **drawn)
        return
    model = save_by_peft(folder, raw, seed, **drawn)
    ranks = {f"model.layers.{i}.{name}": rank for (i, name), rank in adapter.lora.ranks}
    modules = adapted_modules(model)
    assert [*ranks] == [*modules]
    assert [*ranks.values()] == [(m.r["default"], m.scaling["default"]) for m in modules.values()]
    assert in_order(adapter.values) == config_file(folder)

    files = load_file(folder / "adapter_model.safetensors")
    table = name_table(adapter.lora, config)
    assert {name: shape for name, (_, shape) in table.items()} == shapes(files)
    init = drawn.get("init_lora_weights", True)
    first = first_values(adapter.lora, config, seed, init)
    assert {path for path, _ in table.values() if "lora_A" in path or "lora_B" in path} == first.keys()
    for name, (path, _) in table.items():
        if path in first and init == "gaussian" and "lora_A" in path:
            close_to_normal(first[path], files[name], 1 / len(files[name]))
        elif path in first:
            np.testing.assert_array_equal(first[path], files[name], strict=True)

    read, tensors = read_adapter(folder, config)
    assert (read.lora, in_order(read.values)) == (adapter.lora, in_order(adapter.values))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(()), files[name])
    loads_in_peft(folder, adapter, config, raw)


def close_to_normal(ours: np.ndarray, torchs: np.ndarray, std: float) -> None:
    """A radius is at most sqrt(2 ln 2^24); each of its roundings, and of the angle's, is at most 2^-24 of it."""
    np.testing.assert_allclose(ours, torchs, rtol=0, atol=4 * 2**-24 * math.sqrt(48 * math.log(2)) * std)


def loads_in_peft(folder: Path, adapter: Adapter, config: LlamaConfig, raw: dict[str, Any]) -> None:
    """PEFT loads a folder written here without a warning, and holds its values."""
    tensors = drawn_tensors(adapter, config)
    write_adapter(folder, iter(tensors.items()), adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = peft.PeftModel.from_pretrained(base_model(raw), folder)
        result = peft.set_peft_model_state_dict(
            model, safetensors.torch.load_file(folder / "adapter_model.safetensors")
        )
    assert result.unexpected_keys == []
    held = peft.get_peft_model_state_dict(model)
    assert held.keys() == tensors.keys()
    for name, tensor in held.items():
        np.testing.assert_array_equal(tensor.numpy(), tensors[name])


@given(st.integers(0, 2**40), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=40)
def test_matrices(seed: int, out: int, in_: int) -> None:
    """A sequence of torch's matrices: uniform, passed over, normal, uniform."""
    random = TorchRandom(seed)
    torch.manual_seed(seed)
    for step in range(4):
        if step == 2 and out * in_ >= 16:
            normal = torch.nn.init.normal_(torch.empty(out, in_), std=0.3).numpy()
            close_to_normal(random.normal(out, in_, 0.3), normal, 0.3)
        linear = torch.nn.Linear(in_, out, bias=False).weight.detach().numpy()
        if step == 1:
            random.skip(out * in_)
        else:
            np.testing.assert_array_equal(random.kaiming_uniform(out, in_), linear, strict=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("init", [True, False])
def test_a_base_of_two_bytes(dtype: str, init: bool) -> None:
    """PEFT rounds the first values to the base's type, and holds them in float32."""
    model = base_model(CONFIG).to(getattr(torch, dtype))
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=init))
    held = {name: p.detach().numpy() for name, p in peft.get_peft_model_state_dict(model).items()}
    lora = read_settings({"target_modules": "all-linear"}, TINY, "here").lora
    first = first_values(lora, TINY, 3, init, base=np.dtype(getattr(ml_dtypes, dtype, np.float16)))
    for name, (path, _) in name_table(lora, TINY).items():
        np.testing.assert_array_equal(first[path], held[name], strict=True)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["model.embed_tokens"]])
def test_a_tied_model_saves_its_embedding_under_two_names(saved: list[str], tmp_path: Path) -> None:
    raw = {**CONFIG, "tie_word_embeddings": True}
    config = LlamaConfig.from_hf(raw)
    values = {"modules_to_save": saved, "ensure_weight_tying": True}
    save_by_peft(tmp_path, raw, modules_to_save=[*saved], ensure_weight_tying=True)
    adapter, _ = read_adapter(tmp_path, config)
    given = read_settings(values, config, "here")
    assert given.values == config_file(tmp_path) and given.lora == adapter.lora
    assert adapter.lora.saved == ("embed_tokens",)
    table = name_table(adapter.lora, config)
    assert table["base_model.model.lm_head.weight"] == (("embed_tokens", "weight"), (259, 32))
    files = load_file(tmp_path / "adapter_model.safetensors")
    assert shapes(files) == {name: shape for name, (_, shape) in table.items()}
    loads_in_peft(tmp_path, adapter, config, raw)
    files["base_model.model.lm_head.weight"] = files["base_model.model.lm_head.weight"] + 1
    save_file(files, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="the embedding and the head differ, but this model ties them"):
        read_adapter(tmp_path, config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_a_resized_vocabulary(saved: list[str] | None, tied: bool, tmp_path: Path) -> None:
    """PEFT writes the frozen matrices of a resized vocabulary beside the adapter's tensors."""
    raw = {**CONFIG, "tie_word_embeddings": tied}
    model = base_model(raw)
    model.resize_token_embeddings(263)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=saved, ensure_weight_tying=bool(saved and tied))
    peft.get_peft_model(model, settings).save_pretrained(tmp_path, save_embedding_layers=saved is None)
    adapter, tensors = read_adapter(tmp_path, LlamaConfig.from_hf(raw))
    assert adapter.vocab_size == 263
    for name in ("model.embed_tokens", "lm_head"):
        assert tensors[f"base_model.model.{name}.weight"].shape == (263, 32)
    assert read_adapter(tmp_path, LlamaConfig.from_hf({**raw, "vocab_size": 263}))[0].vocab_size is None


# The keys that older versions of PEFT wrote: alpaca-lora's of 2023 (0.3), TRL's examples of 2023 (0.6), axolotl's of
# 2024 (0.10).
OLD: dict[str, dict[str, Any]] = {
    "alpaca-lora": {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "task_type": "CAUSAL_LM",
    },
    "trl": {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 64,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    },
    "axolotl": {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "NousResearch/Llama-2-7b-hf",
        "bias": "none",
        "fan_in_fan_out": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": ["embed_tokens", "lm_head"],
        "peft_type": "LORA",
        "r": 32,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["gate_proj", "down_proj", "q_proj", "k_proj", "up_proj", "o_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    },
}


@pytest.mark.parametrize("written", OLD.values(), ids=OLD)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments", "ignore:.*was renamed from")
def test_files_of_older_versions(written: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    model = peft.get_peft_model(base_model(CONFIG), peft.PeftConfig.from_pretrained(tmp_path))
    tensors = peft.get_peft_model_state_dict(model)
    save_file({name: t.numpy() for name, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    adapter, read = read_adapter(tmp_path, TINY)
    assert shapes(read) == shapes(tensors)
    assert [rank for _, rank in adapter.lora.ranks] == [
        (m.r["default"], m.scaling["default"]) for m in adapted_modules(model).values()
    ]
    assert adapter.lora.dropout == written["lora_dropout"]
    assert adapter.values["base_model_name_or_path"] == written["base_model_name_or_path"]
    assert adapter.values.keys() == {*peft.LoraConfig().to_dict()}


def test_the_files_are_those_of_peft(tmp_path: Path) -> None:
    """Byte by byte; PEFT writes lists of names in no order, and a regular expression as it is."""
    values: dict[str, Any] = {"target_modules": ".*[qv]_proj", "rank_pattern": {"v_proj": 3, "0.self_attn.q_proj": 2}}
    values |= {"modules_to_save": ["lm_head"], "use_dora": True}
    save_by_peft(tmp_path / "peft", CONFIG, **values)
    _, tensors = read_adapter(tmp_path / "peft", TINY)
    (tmp_path / "ours").mkdir()
    arrays = [(name, tensor.read(())) for name, tensor in tensors.items()]
    write_adapter(tmp_path / "ours", arrays, read_settings(values, TINY, "here"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def test_vllm_reads_the_folder(tmp_path: Path) -> None:
    """vLLM's loader asks for three keys, a plain config, and two matrices of one rank under each projection's name."""
    adapter = read_settings({"r": 4, "target_modules": "all-linear", "base_model_name_or_path": "org/m"}, TINY, "here")
    write_adapter(tmp_path, drawn_tensors(adapter, TINY).items(), adapter)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= {key for key, value in written.items() if value}
    assert not written["modules_to_save"] and not written["use_dora"] and written["bias"] == "none"
    files = load_file(tmp_path / "adapter_model.safetensors")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in files.items():
        found = re.fullmatch(r"base_model\.model\.(model\.layers\.\d+\.\w+\.(\w+))\.(lora_[AB])\.weight", name)
        assert found and found[2] in NAMES
        pairs.setdefault(found[1], {})[found[3]] = array
    assert len(pairs) == 14
    assert all(pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == written["r"] for pair in pairs.values())


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"target_modules": ["q_proj", "c_attn"]},
            "names 'c_attn', which is no module of this model; give a list of q_proj, k_proj",
        ),
        ({"target_modules": "q_proj"}, "target_modules ('q_proj') matches no projection of this model; give a list"),
        ({"target_modules": []}, "target_modules ([]) matches no projection"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
            "target_modules (['q_proj']) matches no",
        ),
        ({"target_modules": "(q_proj"}, "target_modules '(q_proj' is no regular expression"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "model.embed_tokens, which cannot have an adapter here; name it in modules_to_save",
        ),
        ({"target_modules": ".*(q_proj|lm_head)"}, "matches lm_head, which cannot have an adapter here"),
        ({"target_modules": ["self_attn"]}, "matches model.layers.0.self_attn, which cannot have"),
        (
            {"exclude_modules": ["vision_tower"]},
            "exclude_modules (['vision_tower']) matches no module of this model; remove it",
        ),
        (
            {"target_modules": "all-linear", "layers_to_transform": 1},
            "layers_to_transform has no meaning where target_modules is a string",
        ),
        ({"layers_pattern": "layers"}, "layers_pattern has no meaning without layers_to_transform"),
        ({"layers_to_transform": [7]}, "matches no projection"),
        ({"layers_to_transform": [True]}, "layers_to_transform is [True]; should be a layer's number"),
        ({"rank_pattern": {"k_proj": 4}}, "rank_pattern has the pattern 'k_proj', which matches no adapted module"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern '(.*\\\\.)?(()$' is no regular expression"),
        ({"rank_pattern": {"v": 4}}, "rank_pattern has the pattern 'v', which matches no adapted module"),
        ({"rank_pattern": {"v_proj": 2, "layers.0.self_attn.v_proj": 3}}, "depend on their order"),
        ({"rank_pattern": {"v_proj": 0}}, "should be an object that maps patterns to whole numbers above 0"),
        ({"r": 0}, "r is 0; should be a whole number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; should be a number"),
        ({"lora_alpha": None}, "lora_alpha is null; should be a number"),
        ({"rank_pattern": None}, "rank_pattern is null; should be an object"),
        ({"target_modules": ["all-linear", "q_proj"]}, "names all-linear beside others; give all-linear alone"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; should be a number from 0 to below 1"),
        (
            {"modules_to_save": ["norm"]},
            "modules_to_save names 'norm'; only embed_tokens and lm_head can be trained whole",
        ),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; should be a list of names"),
        ({"bias": "some"}, "bias is 'some'; should be none, all or lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; should be true, false or gaussian"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; should be LORA"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; should be CAUSAL_LM"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; should be true or false"),
        ({"lora_magic": 3}, "unknown key 'lora_magic' (3) could change the mathematics; remove it"),
    ],
)
def test_refused_settings(values: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as e:
        read_settings(values, TINY, "here.json")
    assert str(e.value).startswith("here.json: ") and line in str(e.value)


# Options of LoraConfig that this program lacks, each with a value that PEFT takes.
UNSUPPORTED = {
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "trainable_token_indices": [1],
    "target_parameters": ["weight"],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "loftq_config": {"loftq_bits": 4},
    "megatron_config": {"a": 1},
    **{f"{name}_config": {"a": 1} for name in ("eva", "corda", "lora_ga", "velora", "monteclora", "arrow", "kasa")},
    "use_bdlora": {"nblocks": 2},
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_options_are_refused_by_name(key: str) -> None:
    assert key in peft.LoraConfig().to_dict()
    with pytest.raises(InputError, match=rf"^here: {key} \(.*\) is an option of PEFT that is not supported; remove it"):
        read_settings({key: UNSUPPORTED[key]}, TINY, "here")


def test_every_option_of_peft_is_known() -> None:
    """A file of the installed PEFT with defaults is read, and written again as it is."""
    values = {k: getattr(v, "value", v) for k, v in peft.LoraConfig(task_type="CAUSAL_LM").to_dict().items()}
    assert read_settings(values, TINY, "here").values == {
        **values,
        "target_modules": ["q_proj", "v_proj"],
        "inference_mode": True,
    }


@pytest.mark.parametrize(
    ("family", "values", "line"),
    [
        ("granite", {}, "target_modules is missing, and PEFT has no default for granite; give a list of q_proj"),
        ("smollm3", {}, "PEFT has no default for smollm3"),
        ("qwen2", {"bias": "lora_only"}, "bias is lora_only, and training biases beside adapters is not supported"),
        ("qwen2", {"bias": "all", "target_modules": ["up_proj"]}, "bias is all"),
        (
            "qwen2",
            {"modules_to_save": ["lm_head"]},
            "PEFT would untie them, which is not supported; add ensure_weight_tying true (--ensure_weight_tying True)",
        ),
        ("qwen2", {"modules_to_save": ["norm"]}, "names 'norm'; only embed_tokens and lm_head can be trained whole"),
    ],
)
def test_refused_for_a_family(family: str, values: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as e:
        read_settings(values, LlamaConfig.from_hf(FAMILIES[family]), "here")
    assert line in str(e.value)


@pytest.mark.parametrize(("family", "bias"), [("llama", "all"), ("llama", "lora_only"), ("qwen2", "lora_only")])
def test_a_bias_option_without_biases_means_nothing(family: str, bias: str, tmp_path: Path) -> None:
    values = {"bias": bias, "target_modules": ["up_proj"]}
    model = save_by_peft(tmp_path, FAMILIES[family], **values)
    adapter = read_settings(values, LlamaConfig.from_hf(FAMILIES[family]), "here")
    assert adapter.values == config_file(tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(adapter.lora.ranks)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter = read_settings({"r": 2}, TINY, "here")
    write_adapter(tmp_path, drawn_tensors(adapter, TINY).items(), adapter)
    return tmp_path


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD, EMBEDDING = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"


def rows(count: int, columns: int = 32) -> np.ndarray:
    return np.zeros((count, columns), np.float32)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.pop(A), f"1 missing tensor(s) for adapter_config.json and this model: {A}; give the model"),
        (lambda t: t.update({"base_model.model.x.weight": t[A]}), "1 unexpected tensor(s)"),
        (
            lambda t: t.update({A: t[A][:1]}),
            f"1 wrongly shaped tensor(s) for adapter_config.json and this model: {A} [1, 32], not [2, 32]",
        ),
        (lambda t: t.update({HEAD: rows(3, 5)}), "lm_head.weight [3, 5], not [3, 32]"),
        (lambda t: t.update({HEAD: rows(3), EMBEDDING: rows(4)}), "tokens differ: model.embed_tokens 4, lm_head 3"),
        (lambda t: t.update({A: t[A].astype(np.int8)}), "is not of a floating type"),
    ],
)
def test_refused_tensors(change: Any, line: str, folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError) as e:
        read_adapter(folder, TINY)
    assert line in str(e.value)


def test_refused_folders(folder: Path) -> None:
    def refused() -> str:
        with pytest.raises(InputError) as e:
            read_adapter(folder, TINY)
        return str(e.value)

    (folder / "adapter_model.safetensors").rename(folder / "elsewhere")
    assert "no adapter_model.safetensors in this folder; copy or download it again" in refused()
    (folder / "adapter_model.bin").touch()
    assert "save it with save_pretrained, which writes adapter_model.safetensors" in refused()
    (folder / "adapter_config.json").write_text("{}")
    assert "key 'peft_type' is missing" in refused()
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json in this folder" in refused()


def test_a_write_that_fails_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = read_settings({"r": 3}, TINY, "here")

    def broken() -> Iterator[tuple[str, np.ndarray]]:
        yield from [*drawn_tensors(adapter, TINY).items()][:2]
        raise OSError("gone")

    def half(arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    for stop in ("tensors", "file"):
        if stop == "file":
            monkeypatch.setattr("llama_jax.hf.peft.save_file", half)
        with pytest.raises(OSError, match=r"gone|disk full"):
            write_adapter(folder, broken() if stop == "tensors" else drawn_tensors(adapter, TINY).items(), adapter)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_of() -> None:
    lora = read_settings({"rank_pattern": {"0.self_attn.q_proj": 4}, "r": 2}, TINY, "here").lora
    assert isinstance(lora, Lora)
    assert lora.of(0, "self_attn.q_proj") == (4, 2.0) and lora.of(1, "self_attn.q_proj") == (2, 4.0)
    assert lora.of(0, "mlp.up_proj") is None
