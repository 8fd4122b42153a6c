#!/usr/bin/env python3
"""Measure how full the device's rows are on Alpaca: real tokens over computed ones, the mean of all epochs.

"any shapes" is the bound by the sums of the updates: each sum rounded up to the next size that a device may get, or to
the next multiple of 128 tokens a device where the update takes several blocks. The bound limits neither the number of
compiled shapes nor the fit in rows. "six" is the least of the bounds with six shapes, exact; only where every update is
one block.

    .venv/bin/python benchmarks/fill.py --tokenizer ../shared/data/llama-tokenizer --data_path alpaca_data.json
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_jax.data.batches import MAX_SHAPES, ROW_MULTIPLE, Batches
from llama_jax.data.examples import Examples
from llama_jax.data.normalisation import training_loss
from llama_jax.data.order import Order
from llama_jax.data.packing import allowed_shapes, ladder
from llama_jax.model.config import LlamaConfig
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import make_job

CONFIG = {"vocab_size": 32000, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}


def alpaca(tokenizer: Path, data: Path, limit: int) -> Examples:
    """Return the examples, tokenised as in training or mapped from the cache."""
    config = LlamaConfig.from_hf({"model_type": "llama", "num_hidden_layers": 1, **CONFIG}, "config.json")
    flags = {"model_name_or_path": tokenizer, "data_path": data, "model_max_length": limit}
    args = parse_arguments([str(x) for name, value in flags.items() for x in (f"--{name}", value)])
    return make_job(args, config, lambda: tokenizer, 1).examples


def fill(batches: Batches) -> float:
    """Return real tokens over computed ones, of the whole run."""
    return int(_sums(batches).sum()) / sum(r * t for k in range(batches.order.updates) for r, t in batches.shapes_of(k))


def bounds(batches: Batches, max_tokens: int) -> tuple[float, float | None]:
    """Return the bound of the fill for any shapes, and for six (None where some updates are several blocks)."""
    sums, share = _sums(batches), batches.ways * ROW_MULTIPLE
    sizes = np.asarray([*allowed_shapes(max_tokens, 2048, int(batches.examples.lengths.max()), ROW_MULTIPLE)])
    needed = -(-sums // share) * ROW_MULTIPLE
    one = needed <= sizes[-1]
    needed[one] = sizes[np.searchsorted(sizes, needed[one])]
    six = None
    if one.all():
        levels = np.asarray(ladder(needed, MAX_SHAPES, 1))
        six = sums.sum() / levels[np.searchsorted(levels, needed)].sum() / batches.ways
    return sums.sum() / needed.sum() / batches.ways, six


def _sums(batches: Batches) -> np.ndarray:
    order, lengths = batches.order, batches.examples.lengths
    return np.asarray([sum(lengths[r].sum() for m in order.update(k) for r in m) for k in range(order.updates)])


def row(examples: Examples, per_update: int, ways: int, max_tokens: int, batch: int, packed: bool) -> str:
    order = Order(len(examples), batch, per_update // (ways * batch), 3, "4.37", ranks=ways)
    started = time.perf_counter()
    batches = Batches(examples, order, training_loss(order), ways, max_tokens, packed=packed)
    seconds = time.perf_counter() - started
    any_shapes, six = bounds(batches, max_tokens) if packed else (None, None)
    blocks = np.mean([batches.blocks(k) for k in range(order.updates)])
    bound = " | ".join(f"{x:.1%}" if x else "-" for x in (any_shapes, six))
    shapes = ", ".join(f"{r}x{t}" for r, t in batches.shapes)
    form = "packed" if packed else f"padded, micro-batches of {batch}"
    return (
        f"| {per_update} | {ways} | {form} | {max_tokens if packed else '-'} | {fill(batches):.1%} | {bound} | "
        f"{blocks:.2f} | {shapes} | {seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a LLaMA tokenizer")
    parser.add_argument("--data_path", type=Path, required=True, help="alpaca_data.json")
    parser.add_argument("--model_max_length", type=int, default=512)
    parser.add_argument("--max_tokens", type=int, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument("--ways", type=int, nargs="*", default=[1, 4, 8])
    args = parser.parse_args()
    examples = alpaca(args.tokenizer, args.data_path, args.model_max_length)
    print(f"{len(examples):,} examples, 3 epochs, {examples.lengths.mean():.1f} tokens each\n")
    print("| examples an update | devices | form | max tokens | fill | any shapes | six | blocks | shapes | plan s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for ways in args.ways:
        for per_update in (8, 32, 64, 128):
            for max_tokens in args.max_tokens:
                print(row(examples, per_update, ways, max_tokens, 1, True), flush=True)
            for batch in sorted({1, min(4, per_update // ways)}):
                print(row(examples, per_update, ways, 0, batch, False), flush=True)


if __name__ == "__main__":
    main()
