#!/usr/bin/env python3
"""Prints bench_recall results as Markdown: mean mass recall per method and budget over heads, layers and texts."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

from input_files import reports_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("json", type=Path, nargs="+", help="results of bench_recall or demo")
    options = parser.parse_args()
    recall, ceiling = defaultdict(list), defaultdict(list)
    for report in reports_of(options.json, ("method", "budget", "mass_recall", "ceiling")):
        for row in report["rows"]:
            key = row["method"], row["budget"]
            recall[key].append(row["mass_recall"])
            if row["ceiling"] is not None:
                ceiling[key].append(row["ceiling"])
    methods = list(dict.fromkeys(method for method, _ in recall))
    budgets = sorted({budget for _, budget in recall})
    print("| method |", " | ".join(f"{100 * b:g} %" for b in budgets), "| ceiling at 5 % | of its ceiling |")
    print("|---" * (len(budgets) + 3) + "|")
    for method in methods:
        cells = [f"{mean(recall[method, b]):.3f}" if (method, b) in recall else "–" for b in budgets]
        top = ceiling.get((method, 0.05))
        cells += [f"{mean(top):.3f}", f"{mean(recall[method, 0.05]) / mean(top):.3f}"] if top else ["–", "–"]
        print(f"| {method} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
