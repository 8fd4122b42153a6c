#!/usr/bin/env python3
"""Train a model in torch with projections whose inputs, weights and gradients are rounded to fp8, and compare losses by
what is rounded.

    python benchmarks/fp8_rounding.py --model HF_DIR --data_path alpaca_data.json --updates 150

All else is in float32: embedding, norms, attention, head, products of the rounded values, AdamW. A run's loss is that
of the second half of the updates; "as trained" and "unrounded" are the loss of 192 other records after the last one,
with the rounding of the run and without any. Differences are from the run without rounding. Records of at most 512
tokens, 8 an update, are drawn by a fixed seed. On an H200 a run of SmolLM2-135M takes 20 to 50 s.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama_jax.data.examples import alpaca_prompt

ROWS, LENGTH, PEAK, WARMUP, PLANNED = 8, 512, 2e-5, 15, 500
HELD_OUT = range(1700, 1892)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Rounding = Callable[[torch.Tensor], torch.Tensor] | None


def rounded(dtype: torch.dtype, by_row: bool = False) -> Rounding:
    """Return the rounding to fp8 by a power of two for the tensor, or for each of its rows."""
    most = torch.finfo(dtype).max

    def f(x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()
        unit = torch.exp2(torch.ceil(torch.log2(largest.clamp_min(1e-30) / most)))
        return (x / unit).to(dtype).to(x.dtype) * unit

    return f


E4M3, E5M2 = rounded(torch.float8_e4m3fn), rounded(torch.float8_e5m2)
ROW = rounded(torch.float8_e4m3fn, by_row=True)
FP8 = (E4M3, E4M3, E5M2)  # of inputs, weights, gradients
Rule = Callable[[int, int, str], tuple[Rounding, Rounding, Rounding]]  # by a layer, their number, and a projection
NONE: Rule = lambda layer, layers, name: (None, None, None)  # noqa: E731
RULES: dict[str, Rule] = {
    "nothing": NONE,
    "fp8": lambda layer, layers, name: FP8,
    "exact gradients": lambda layer, layers, name: (E4M3, E4M3, None),
    "gradients in e4m3": lambda layer, layers, name: (E4M3, E4M3, E4M3),
    "inputs": lambda layer, layers, name: (E4M3, None, None),
    "weights": lambda layer, layers, name: (None, E4M3, None),
    "gradients": lambda layer, layers, name: (None, None, E5M2),
    "rows": lambda layer, layers, name: (ROW, ROW, E5M2),
    "but the first and last layer": lambda layer, layers, name: (None, None, None) if layer in (0, layers - 1) else FP8,
    "but down_proj": lambda layer, layers, name: (None, None, None) if name == "down_proj" else FP8,
}


class Product(torch.autograd.Function):
    """Compute x @ weight.T of rounded operands; backward, products of the rounded operands and the rounded gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, how: Any) -> torch.Tensor:
        x, weight = (f(a) if f else a for f, a in zip(how[:2], (x, weight), strict=True))
        ctx.save_for_backward(x, weight)
        ctx.of_gradient = how[2]
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x, weight), (dy,) = ctx.saved_tensors, gradients
        dy = ctx.of_gradient(dy) if ctx.of_gradient else dy
        return dy @ weight, dy.flatten(0, -2).T @ x.flatten(0, -2), None


class Projection(torch.nn.Module):
    """A linear layer that rounds by `rule`, which the run sets for all."""

    rule: Rule = NONE

    def __init__(self, weight: torch.nn.Parameter, layer: int, layers: int, name: str):
        super().__init__()
        self.weight, self.place = weight, (layer, layers, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Product.apply(x, self.weight, Projection.rule(*self.place))


def read(model: str, data: Path) -> list[tuple[list[int], int]]:
    """Return 2,000 records of the file as token ids and the length of the prompt."""
    from transformers import AutoTokenizer

    tokenizer, records = AutoTokenizer.from_pretrained(model), json.loads(data.read_text())
    random.seed(7)
    random.shuffle(records)
    examples = []
    for record in records[:2000]:
        prompt = tokenizer(alpaca_prompt(record))["input_ids"]
        ids = [*prompt, *tokenizer(record["output"])["input_ids"], tokenizer.eos_token_id][:LENGTH]
        examples.append((ids, min(len(prompt), len(ids) - 1)))
    return examples


def loss_of(model: Any, examples: list[tuple[list[int], int]]) -> torch.Tensor:
    """Return the mean loss of the answers' tokens of one padded batch."""
    longest = max(len(ids) for ids, _ in examples)
    ids, mask = np.zeros((2, len(examples), longest), np.int64)
    labels = np.full_like(ids, -100)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, start : len(tokens)] = tokens[start:]
    on_device = [torch.tensor(a, device=DEVICE) for a in (ids, mask, labels)]
    logits = model(on_device[0], attention_mask=on_device[1]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), on_device[2][:, 1:].flatten(), ignore_index=-100)


def train(folder: str, examples: list, rule: Rule, updates: int) -> tuple[np.ndarray, float, float]:
    """Return the loss of each update, and the loss of the held-out records as trained and without rounding."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(DEVICE)
    layers = model.model.layers
    for i, layer in enumerate(layers):
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if name.endswith("_proj"):
                    setattr(parent, name, Projection(child.weight, i, len(layers), name))
    optimizer, losses = torch.optim.AdamW(model.parameters(), weight_decay=0.0), []
    Projection.rule = rule
    for k in range(updates):
        rate = k / WARMUP if k < WARMUP else 0.5 * (1 + math.cos(math.pi * (k - WARMUP) / (PLANNED - WARMUP)))
        optimizer.param_groups[0]["lr"] = PEAK * rate
        loss = loss_of(model, examples[ROWS * k : ROWS * (k + 1)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    def evaluated(rule: Rule) -> float:
        Projection.rule = rule
        batches = [examples[i : i + ROWS] for i in HELD_OUT[::ROWS]]
        with torch.no_grad():
            return float(np.mean([loss_of(model, batch).item() for batch in batches]))

    return torch.stack(losses).cpu().numpy(), evaluated(rule), evaluated(NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HF folder of a LLaMA")
    parser.add_argument("--data_path", type=Path, required=True, help="alpaca_data.json")
    parser.add_argument("--updates", type=int, default=150, help="at most 212")
    parser.add_argument("--runs", nargs="+", choices=RULES, default=list(RULES))
    args = parser.parse_args()
    examples, first = read(args.model, args.data_path), None
    print("| rounded | loss | as trained | unrounded | seconds |")
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(["nothing", *args.runs]):
        started = time.monotonic()
        losses, *after = train(args.model, examples, RULES[name], args.updates)
        means = [float(losses[args.updates // 2 :].mean()), *after]
        first = first or means
        cells = [f"{mean:.4f} ({mean / of - 1:+.2%})" for mean, of in zip(means, first, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {time.monotonic() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
