#!/usr/bin/env python3
"""Train one model by train_jax.py with several sets of flags, on the same records in the same order, and compare the
losses of all updates.

    python benchmarks/curves.py --model MODEL --data_path alpaca_data.json --updates 500 \\
        --common "--bf16 True --per_device_train_batch_size 8 --learning_rate 2e-5" \\
        --flags "" "--fp8 True" "--optim adamw_8bit" "--adam_moments_dtype bfloat16" --png curves.png

MODEL is anything that train_jax.py takes. The first set is the one that the others are compared with. Each run is a
process of its own. Printed are the mean loss of all updates and of the last 100, with their difference from the first
set's, and the median of the differences of single updates, in absolute value.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LAST = 100


def losses(model: str, data: Path, updates: int, flags: list[str]) -> np.ndarray:
    """Return the loss of each update of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train_jax.py"), "--model_name_or_path", model, "--data_path", str(data)]
        command += [
            "--output_dir",
            folder,
            "--max_steps",
            str(updates),
            "--save_strategy",
            "no",
            "--logging_steps",
            "1",
        ]
        command += flags
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            sys.exit(f"{' '.join(command)}:\n{made.stderr[-3000:]}")
        log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    found = np.array([entry["loss"] for entry in log if "loss" in entry])
    return found if len(found) == updates else sys.exit(f"{' '.join(command)}: {len(found)} losses")


def draw(curves: dict[str, np.ndarray], png: Path) -> None:
    """Draw the curves, means of 20 updates, and their relative differences from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    window = np.ones(20) / 20
    first, *_ = curves.values()
    for name, curve in curves.items():
        smooth = np.convolve(curve, window, "valid")
        left.plot(smooth, label=name, linewidth=1)
        right.plot(100 * (smooth / np.convolve(first, window, "valid") - 1), label=name, linewidth=1)
    left.set_ylabel("loss, mean of 20 updates")
    right.set_ylabel(f"difference from {next(iter(curves))!r}, %")
    for axis in (left, right):
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(png, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--common", default="", help="flags of all runs, as one word")
    parser.add_argument("--flags", nargs="+", default=[""], help="further flags of each run, as one word each")
    parser.add_argument("--json", type=Path, help="write all losses there")
    parser.add_argument("--png", type=Path, help="draw the curves there; needs matplotlib")
    args = parser.parse_args()
    if len({*args.flags}) < len(args.flags):
        parser.error("--flags: two sets are equal")
    curves: dict[str, np.ndarray] = {}
    print(f"| flags | mean loss | of the last {LAST} | median difference of an update |")
    print("|---|--:|--:|--:|")
    for flags in args.flags:
        name = flags or "none"
        of_run = [*shlex.split(args.common), *shlex.split(flags)]
        curves[name] = curve = losses(args.model, args.data_path, args.updates, of_run)
        if args.json:  # at once: a later run may be killed
            args.json.write_text(json.dumps({name: curve.tolist() for name, curve in curves.items()}))
        first, *_ = curves.values()
        cells = []
        for part in (slice(None), slice(-LAST, None)):
            mean, other = curve[part].mean(), first[part].mean()
            cells.append(f"{mean:.4f} ({mean / other - 1:+.3%})")
        print(f"| {name} | {' | '.join(cells)} | {np.median(np.abs(curve / first - 1)):.3%} |", flush=True)
    if args.png:
        draw(curves, args.png)


if __name__ == "__main__":
    main()
