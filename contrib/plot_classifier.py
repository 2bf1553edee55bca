#!/usr/bin/env python3
"""Draws oracle, ceiling, classifier and symmetric k-means, mass recall against selectivity, one panel a query head.

Texts are averaged. The JSON comes from `bench_recall --methods oracle_topk,offline_ip,saap --partitions FILE`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402

from input_files import reports_of  # noqa: E402
from output_files import picture  # noqa: E402

LINES = [
    ("oracle_topk", "mass_recall", "oracle: best keys one by one", "-"),
    ("saap", "ceiling", "ceiling of the partition", ":"),
    ("saap", "mass_recall", "classifier", "-"),
    ("offline_ip", "mass_recall", "symmetric k-means, inner product", "--"),
]


def head(text: str) -> tuple[int, int]:
    layer, query_head = map(int, text.split(":"))
    return layer, query_head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("json", type=Path, nargs="+", help="results of bench_recall, one or more a text")
    parser.add_argument("--heads", type=head, nargs="+", required=True, metavar="LAYER:HEAD", help="the panels")
    parser.add_argument("--out", type=picture, required=True, metavar="PNG", help="picture to write")
    options = parser.parse_args()
    fields = ("layer", "query_head", "method", "budget", "head_selectivity", "mass_recall", "ceiling")
    rows = defaultdict(list)
    for report in reports_of(options.json, fields):
        for row in report["rows"]:
            rows[row["layer"], row["query_head"], row["method"], row["budget"]].append(row)
    budgets = sorted({key[3] for key in rows})

    figure, panels = plt.subplots(
        1, len(options.heads), figsize=(4.5 * len(options.heads), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (layer, query_head) in zip(panels[0], options.heads):
        for method, figure_name, label, style in LINES:
            groups = [rows[layer, query_head, method, budget] for budget in budgets]
            if not all(groups):
                parser.error(f"no rows of {method} for layer {layer}, query head {query_head}")
            selectivity = [100 * mean(row["head_selectivity"] for row in group) for group in groups]
            recall = [mean(row[figure_name] for row in group) for group in groups]
            axes.plot(selectivity, recall, linestyle=style, marker="o", markersize=3, label=label)
        axes.set_xscale("log")
        ticks = [100 * budget for budget in budgets]
        axes.set_xticks(ticks, [f"{t:g} %" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("far keys read")
        axes.set_title(f"layer {layer}, query head {query_head}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("mass recall of far keys")
    panels[0][0].legend(fontsize=8, loc="center")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()
