#!/usr/bin/env python3
"""Prints bench_adapter results as Markdown: means over layers, KV heads and texts, a line per partitions and choice."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

from input_files import reports_of

FIGURES = ("selectivity", "mass_recall", "output_error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("json", type=Path, nargs="+", help="results of bench_adapter")
    parser.add_argument("--budget", type=float, default=0.05, help="default: 0.05")
    options = parser.parse_args()
    values = defaultdict(list)
    quarters = {}
    reports = reports_of(options.json, ("partitions", "choice", "budget", "tokens", *FIGURES))
    for report in reports:
        longest = max((row["tokens"] for row in report["rows"]), default=0)
        for row in report["rows"]:
            if row["budget"] != options.budget:
                continue
            quarter = round(4 * row["tokens"] / longest)
            quarters[quarter] = row["tokens"]
            for figure in FIGURES:
                if row[figure] is not None:  # a text without far keys has no recall
                    values[row["partitions"], row["choice"], quarter, figure].append(row[figure])
    if not quarters:
        budgets = sorted({row["budget"] for report in reports for row in report["rows"]})
        parser.error(f"no rows of budget {options.budget:g}; there are {', '.join(f'{b:g}' for b in budgets)}")
    lines = list(dict.fromkeys((partitions, choice) for partitions, choice, _, _ in values))
    print("| partitions | choice per |", " | ".join(f"{quarters[q]:,} tokens" for q in sorted(quarters)), "|")
    print("|---" * (len(quarters) + 2) + "|")
    for partitions, choice in lines:
        cells = [
            " / ".join(
                f"{mean(found):.3f}" if (found := values[partitions, choice, q, figure]) else "–" for figure in FIGURES
            )
            for q in sorted(quarters)
        ]
        print(f"| {partitions} | {choice} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
