#!/usr/bin/env python3
"""Draw the two pictures of the docs with matplotlib (the `benchmarks` extra).

    python benchmarks/plot.py trainer benchmarks/results/trainer.json docs/trainer.png
    python benchmarks/plot.py speed benchmarks/results/h200.json docs/h200.png

`trainer`: the losses of `side_by_side.py`, and milliseconds an update beside the peers. `speed`: tokens a second and
memory of LLaMA-7B, from `speed.py --json`, over the tokens of an update (sequences of 2,048) and over the length of
sequences (8,192 tokens an update; longer sequences alone).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"llama_jax": "tab:blue", "HF Trainer": "tab:orange", "FSDP2": "tab:grey"}


def draw_trainer(results: dict[str, Any]) -> pyplot.Figure:
    """Draw the loss curves of the Trainer and of llama_jax, and bars of milliseconds an update."""
    figure, (curve, bars) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.15))
    theirs, ours = results["losses"]["trainer"], results["losses"]["llama_jax"]
    updates = range(1, len(theirs) + 1)
    curve.plot(updates, theirs, color=COLOURS["HF Trainer"], linewidth=5, alpha=0.5, label="HF Trainer")
    curve.plot(updates, ours, color=COLOURS["llama_jax"], linewidth=1.2, marker=".", label="llama_jax")
    curve.set_title(f"The same loss: at most {results['losses']['apart']:.1e} apart, relative", fontsize=10)
    curve.set_xlabel(results["losses"]["what"], fontsize=8)
    curve.set_ylabel("loss")
    curve.grid(alpha=0.3)
    curve.legend(frameon=False)

    place, middles = 0.0, []
    for group in results["times"]:
        first = place
        for name, ms in group["ms"].items():
            colour = next(colour for start, colour in COLOURS.items() if name.startswith(start))
            bars.barh(place, ms, color=colour, height=0.85)
            bars.text(ms + 15, place, f"{ms:,.0f} ms  {name}", va="center", fontsize=8)
            place += 1
        middles.append((first + place - 1) / 2)
        place += 0.6
    bars.set_yticks(middles, [group["what"] for group in results["times"]], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlim(0, 2400)
    bars.set_title("LLaMA-7B, bf16: milliseconds an update", fontsize=10)
    bars.spines[["top", "right"]].set_visible(False)
    return figure


def draw_speed(rows: list[dict[str, Any]]) -> pyplot.Figure:
    """Draw tokens a second and memory of LLaMA-7B on one device."""
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
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=("trainer", "speed"))
    parser.add_argument("results", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    draw = draw_trainer if args.picture == "trainer" else draw_speed
    figure = draw(json.loads(args.results.read_text()))
    figure.tight_layout()
    figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    main()
