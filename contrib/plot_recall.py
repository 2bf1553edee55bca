#!/usr/bin/env python3
"""Draws mass recall against selectivity, one line a method, from the JSON of `demo` or `bench_recall`."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402

from input_files import reports_of  # noqa: E402
from output_files import picture  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("json", type=Path, help="results of demo or bench_recall")
    parser.add_argument("png", type=picture, help="picture to write")
    options = parser.parse_args()
    fields = ("method", "budget", "selectivity", "mass_recall", "ceiling")
    (report,) = reports_of([options.json], fields, ("model", "tokens", "trace"))

    # Heads and layers are averaged at equal budget.
    points: dict[str, dict[float, list]] = defaultdict(lambda: defaultdict(list))
    for row in report["rows"]:
        if row["method"] != "dense attention":
            points[row["method"]][row["budget"]].append(row)

    def mean(rows: list, key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, by_budget in points.items():
        groups = [by_budget[budget] for budget in sorted(by_budget)]
        selectivity = [100 * mean(rows, "selectivity") for rows in groups]
        (line,) = axes.plot(selectivity, [mean(rows, "mass_recall") for rows in groups], marker="o", label=method)
        if all(row["ceiling"] is not None for rows in groups for row in rows):
            ceiling = [mean(rows, "ceiling") for rows in groups]
            axes.plot(selectivity, ceiling, linestyle=":", color=line.get_color(), linewidth=1)
    axes.plot([], [], linestyle=":", color="grey", label="ceiling of the partition")
    axes.set_xscale("log")
    ticks = [1, 2, 5, 10, 20]
    axes.set_xticks(ticks, [f"{t} %" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("selectivity: far keys read per KV head")
    axes.set_ylabel("mass recall of far keys")
    config = report["config"]
    axes.set_title(f"{config['model']}, {config['tokens']:,} tokens of {config['trace']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    options.png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.png, dpi=150)


if __name__ == "__main__":
    main()
