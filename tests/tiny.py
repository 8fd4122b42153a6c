"""A tiny LLaMA on disk, tiny data for it, and the commands run on them.

The folders are written here without the code under test: names and shapes are HF's own.
"""

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax.base.errors import run_command
from llama_jax.base.output import FILE
from llama_jax.hf.manifest import MANIFEST
from llama_jax.reporting.run_report import PAGE, VALUES
from llama_jax.run.ownership import LEDGER

ROOT = Path(__file__).resolve().parent.parent
CACHE = tempfile.TemporaryDirectory(prefix="llama_jax-tests-")  # tokenised data, for as long as the tests run
Arrays = dict[str, np.ndarray]
# Files of an output folder that two equal runs write differently: logs have times, the ledger names its run, and the
# manifest has the flags, the output folder among them.
CHANGING = {"trainer_state.json", MANIFEST, LEDGER, FILE, VALUES, PAGE}
# Compilation is most of the suite's time. Each option of XLA's compiler: its value here, which halves that time, and
# XLA's own. XLA aborts on an option that it does not know.
COMPILATION: dict[str, tuple[Any, Any]] = {
    "xla_backend_optimization_level": (0, 3),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
    "xla_llvm_disable_expensive_passes": (True, False),
}
if jax.__version_info__ < (0, 11):
    COMPILATION["xla_cpu_use_fusion_emitters"] = (False, True)

# As large as the byte tokenizer of `write_tokenizer`. Weights six times HF's: gradients that stand clear of rounding.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}


# Of each sister model, the features that LLaMA lacks, at sizes that a few tokens tell apart.
SISTERS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": 5, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "attention_bias": False, "rope_theta": 1e6},
    "qwen3, biases": {"model_type": "qwen3", "attention_bias": True, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "granite": {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.4}
    | {"attention_multiplier": 0.7, "logits_scaling": 3.0},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 1], "num_hidden_layers": 3}
    | {"pad_token_id": None, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
}


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of transformers' LlamaForCausalLM; of a sister model, from its class."""
    if config["model_type"] != "llama":
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        return {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is none of its own
    D, F, V = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    N = config["num_attention_heads"]
    H = config.get("head_dim") or D // N
    K = config.get("num_key_value_heads") or N
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (D,), f"{at}post_attention_layernorm.weight": (D,)}
        for name, out, in_ in (("q", N * H, D), ("k", K * H, D), ("v", K * H, D), ("o", D, N * H)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (out, in_)
            if config.get("attention_bias"):
                shapes[f"{at}self_attn.{name}_proj.bias"] = (out,)
        for name, out, in_ in (("gate", F, D), ("up", F, D), ("down", D, F)):
            shapes[f"{at}mlp.{name}_proj.weight"] = (out, in_)
            if config.get("mlp_bias"):
                shapes[f"{at}mlp.{name}_proj.bias"] = (out,)
    shapes["model.norm.weight"] = (D,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, D)
    return shapes


def make_arrays(config: dict[str, Any], seed: int = 0) -> Arrays:
    """Random float32 weights; the norms' weights lie around 1."""
    rng = np.random.default_rng(seed)
    scale = config.get("initializer_range", 0.02)
    arrays = {}
    for name, shape in hf_shapes(config).items():
        array = rng.normal(0, scale, shape).astype(np.float32)
        arrays[name] = 1 + array if "norm" in name else array
    return arrays


def write_model(folder: Path, config: dict[str, Any] = CONFIG, arrays: Arrays | None = None, shards: int = 1) -> Path:
    """An HF folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = make_arrays(config) if arrays is None else arrays
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name] for name in list(arrays)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: Path, pad_token: str | None = "<unk>") -> Path:
    """A tokenizer of 259 tokens: the bytes, then <s>, </s>, <unk>."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*alphabet, *special])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": pad_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_records(count: int, seed: int = 0, longest: int = 24, vocab_size: int = 259) -> list[dict[str, list[int]]]:
    """Tokenised records of 3 to `longest` tokens, about half of each masked, the first token always."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        ids = rng.integers(0, vocab_size, rng.integers(3, longest + 1)).tolist()
        masked = int(rng.integers(1, len(ids)))
        records.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return records


ALPACA = [
    {"instruction": "Name three fish.", "input": "", "output": "Cod, eel and pike."},
    {"instruction": "Translate into French.", "input": "Good morning", "output": "Bonjour"},
    {"instruction": "What is 2 + 2?", "output": "4"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Write naïve in capitals.", "input": "naïve", "output": "NAÏVE ☃"},
]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


class Outcome(NamedTuple):
    """What a command did: its exit code, what it printed, and how many programs XLA compiled for it."""

    code: int
    out: str
    err: str
    compiled: int


_compiled: list[str] = []


def _on_event(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


def compiled() -> int:
    """How many programs XLA has compiled, or taken out of its cache, so far."""
    return len(_compiled)


jax.monitoring.register_event_duration_secs_listener(_on_event)


@contextlib.contextmanager
def _own_process() -> Iterator[None]:
    """What a command changes for its whole process is put back: signals, settings of jax, the environment."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    settings = {name: jax.config.values[name] for name in ("jax_platforms", "jax_default_matmul_precision")}
    environment, argv, hook = dict(os.environ), sys.argv, sys.unraisablehook
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")  # the suite's, not the user's
    os.environ["XDG_CACHE_HOME"] = CACHE.name
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for name, value in settings.items():
            jax.config.update(name, value)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.unraisablehook = argv, hook


def run(main: Callable[[list[str]], int], *argv: Any) -> Outcome:
    """Run a command's `main` as its file does, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = len(_compiled)
    with _own_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["command", *map(str, argv)]
        try:
            code = run_command(main)
        except SystemExit as e:  # argparse's own way out
            code = e.code if isinstance(e.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue(), len(_compiled) - before)


def slow_unless(quick: bool, *values: Any) -> Any:
    """Parameters of a test that are a slow proof, unless."""
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


def drawn_cases(count: int, in_ci: int = 0) -> int:
    """Return how many cases a test draws: `count` under `make proofs`, `in_ci` in CI, by default a third."""
    return count if "PROOFS" in os.environ else in_ci or -(-count // 3)


def of_devices(count: int, *flags: str) -> dict[str, str]:
    """Return the environment's XLA flags for a process of so many CPU devices.

    XLA aborts where the threads of all devices do not meet within 40 s, as happened on two busy cores.
    """
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=250"
    words = (os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={count}", patience, *flags)
    return {"XLA_FLAGS": " ".join(words)}


def environment(torch: bool = True) -> dict[str, str]:
    """For real processes: the suite's caches, lines as they are printed. Without `torch` as a user's, who has none."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    cache["XDG_CACHE_HOME"] = CACHE.name
    return {**os.environ, **cache, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(
        p for p in ("" if torch else str(ROOT / "tests/without_torch"), str(ROOT), os.environ.get("PYTHONPATH")) if p
    )}  # fmt: skip


def log_entries(folder: Path) -> list[dict[str, Any]]:
    """The updates in `trainer_state.json`, the summary at the end left out."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]
