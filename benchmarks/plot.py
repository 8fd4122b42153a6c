#!/usr/bin/env python3
"""What `speed.py --json` wrote of 7B on one device, as curves: tokens a second and memory over the tokens of an update
(sequences of 2,048) and over the length of sequences (of 8,192 tokens an update, longer ones alone). matplotlib draws.

    python benchmarks/plot.py benchmarks/results/h200.json docs/h200.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    rows = [r for path in args.results for r in json.loads(path.read_text())]
    curves: dict[str, dict[int, dict]] = {"tokens an update": {}, "length of sequences": {}}
    for r in rows:
        if (r["run"], r["shape"], r["devices"]) == ("ours", "llama-7b", 1) and r["work"][0].isdigit():
            count, length = map(int, r["work"].split("x"))
            if length == 2048 or count * length == 1024:
                curves["tokens an update"][count * length] = r
            if count * length == max(8192, length):
                curves["length of sequences"][length] = r
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for ax, (what, points) in zip(axes, curves.items(), strict=True):
        x = sorted(points)
        ax.plot(x, [points[n]["tokens_s"] for n in x], "o-", color="tab:blue")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [f"{n:,}" for n in x], rotation=45, ha="right")
        ax.set_xlabel(what)
        ax.set_ylim(0, 16000)
        ax.grid(alpha=0.3)
        memory = ax.twinx()
        memory.plot(x, [points[n]["memory_gib"] for n in x], "s--", color="tab:orange")
        memory.set_ylim(0, 288)
        for n in x:
            remat = points[n]["detail"].split("--remat ")[1].split(",")[0]
            ax.annotate(remat, (n, points[n]["tokens_s"]), (0, -14), textcoords="offset points", ha="center", size=7)
    axes[0].set_ylabel("tokens/s", color="tab:blue")
    memory.set_ylabel("GiB at the peak", color="tab:orange")
    figure.suptitle(f"LLaMA-7B on one {rows[0]['device']}, float32 parameters and Adam, bf16 matmuls, by --remat")
    figure.tight_layout()
    figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    main()
