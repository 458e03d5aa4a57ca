#!/usr/bin/env python3
"""Prefill time of the Llama-3.1-8B shape over tokens, of every strategy, from what `pool.py summary` wrote; beside it, as prefill.svg.

    tests/bench/plot.py tests/bench/results/h200x2/summary.json

Of each strategy the fastest of its settings is drawn. Needs matplotlib.
"""
import collections
import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

SHAPE = "llama-3.1-8b"
PEERS = {"FLASH_ATTENTION": "transformers, flash", "CUDNN_ATTENTION": "transformers, cuDNN"}


def name_of(row):
    strategy = PEERS.get(row["attention"], f"apbd, {row['attention'].replace('apb', 'APB')}")
    gpus = row.get("gpus") or 1
    return f"{strategy}, {gpus} GPU{'s' if gpus > 1 else ''}"


def fastest(rows):
    """Seconds by tokens by line."""
    lines = collections.defaultdict(dict)
    for row in rows:
        if row.get("what") == "prefill" and row.get("seconds") and row.get("shape", SHAPE) == SHAPE:
            line, tokens = lines[name_of(row)], row["tokens"]
            line[tokens] = min(row["seconds"], line.get(tokens, float("inf")))
    return lines


def draw(lines, to):
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "apbd", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(8, 4.5))
    # As they lie above each other at the longest context that all of them have.
    common = max(set.intersection(*(set(line) for line in lines.values())))
    for name, line in sorted(lines.items(), key=lambda item: -item[1][common]):
        tokens = sorted(line)
        axes.plot(tokens, [line[n] for n in tokens], marker="o", label=name, linestyle="--" if "transformers" in name else "-")
    ticks = sorted({1 << (n.bit_length() - 1) for line in lines.values() for n in line})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{n >> 20}M" if n >> 20 else f"{n >> 10}K" for n in ticks])
    seconds = [0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    axes.set_yticks(seconds, [f"{n:g}" for n in seconds])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds of prefill")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(to, bbox_inches="tight", metadata={"Date": None})


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    summary = pathlib.Path(sys.argv[1])
    lines = fastest(json.loads(summary.read_text()))
    if not lines:
        sys.exit(f"plot.py: no prefill in {summary}")
    draw(lines, summary.with_name("prefill.svg"))


if __name__ == "__main__":
    main()
