"""Assert in a test that this program computes what torch and transformers compute: `assert_matches_torch(hf_dir)`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.hf.source import Source
from llama_jax.proof.model import compare_model
from llama_jax.proof.our_layers import shrunk
from llama_jax.proof.sample import Sample
from llama_jax.proof.torch_layers import BF16, FLOAT32, Reference
from llama_jax.proof.verdict import Row, table

LENGTHS = (24, 64, 7)  # tokens of the examples that are drawn

Example = tuple[Sequence[int], Sequence[int]]


def assert_matches_torch(
    hf_dir: str | Path,
    examples: Sequence[Example] | None = None,
    *,
    torch_dir: str | Path | None = None,
    bf16: bool = False,
    layers: int | None = None,
    gradients: bool = True,
    packed: bool = True,
) -> list[Row]:
    """Compare an HF folder's forward pass, loss and gradients with transformers', and return the rows.

    `examples` are pairs of ids and labels, unshifted, -100 for labels that take no part; by default drawn ids. Torch
    reads `torch_dir`, by default the same folder. `bf16` compares matmuls in bfloat16, as `--bf16 True` computes them;
    `layers` keeps the first layers; `packed` lays this program's examples side by side in one row. Raises
    AssertionError with the rows that fail, and InputError for a folder or for ids that the model does not take.
    """
    source = Source(hf_dir)
    config = shrunk(source.config, layers)
    if examples is None:
        rng = np.random.default_rng(0)
        drawn = [rng.integers(0, config.vocab_size, length) for length in LENGTHS]
        examples = [(ids.tolist(), ids.tolist()) for ids in drawn]
    arrays = [(np.asarray(ids, np.int32), np.asarray(labels, np.int32)) for ids, labels in examples]
    if not arrays or any(len(ids) != len(labels) or not len(ids) for ids, labels in arrays):
        raise InputError("examples: give pairs of ids and labels of equal lengths, at least one token each")
    if not 0 <= min(ids.min() for ids, _ in arrays) <= max(ids.max() for ids, _ in arrays) < config.vocab_size:
        raise InputError(f"examples: ids should be from 0 to {config.vocab_size - 1}")
    if not any((labels[1:] != -100).any() for _, labels in arrays):
        raise InputError("examples: no label takes part in the loss; give labels other than -100")
    reference = Reference(source.folder if torch_dir is None else Path(torch_dir), layers)
    mesh = sharding.make_mesh(jax.devices()[:1])
    with jax.default_matmul_precision("highest"):
        rows = compare_model(
            reference, source, config, Sample(arrays, packed), BF16 if bf16 else FLOAT32, mesh, gradients=gradients
        )
    failed = [row for row in rows if row.holds is False]
    if failed:
        shown = "\n".join(f"{name}\n{table(found)}" for name, found in _by_section(failed).items())
        raise AssertionError(f"{len(failed)} of {len(rows)} rows fail\n{shown}")
    return rows


def _by_section(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.section, []).append(row)
    return found
