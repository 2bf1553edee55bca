#!/usr/bin/env python3
"""Rows that end_to_end.py measured: kept in a JSON file, and as a table and a picture of one or several such files.

A row is one case (a text; or a haystack, a depth and a pass key) decoded by one method with one budget. Methods are
compared with dense attention on the same case: mean difference, and the half width of its 95 % interval over the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Optional, Sequence

import numpy as np

from input_files import read_report
from output_files import check_picture

#: that read all far keys, none, or what their plans allow
WITHOUT_BUDGET = ("dense", "window", "planned")
#: what tells a row from all others, as far as rows have it
IDENTITY = ("text", "tokens", "sparse", "depth", "key", "layers", "method", "budget")
CASE = ("text", "tokens", "sparse", "depth", "key")
#: that rows have, besides what was measured
FIELDS = ("tokens", "method", "budget", "selectivity", "index_bytes_fraction")


def identity(row: dict) -> tuple:
    return tuple(row.get(name) for name in IDENTITY)


class Results:
    """Rows of one run, written to a file (if there is one) as they come."""

    def __init__(self, path: Optional[Path], config: dict, environment: dict, resume: bool):
        """resume: begin with the rows of the file, which a run with the same config has left there."""
        self.path, self.config, self.environment = path, config, environment
        self.rows: list[dict] = []
        if resume and path and path.exists():
            settings = ("command", "partitions", "rope_scale", "keys_per_cell", "trained_share", "refine")
            before = read_report(path, FIELDS, settings)
            for name in settings:
                if before["config"][name] != config.get(name):
                    raise ValueError(f"{path} was made with {name} = {before['config'][name]}, "
                                     f"not {config.get(name)}: --resume cannot go on with it")  # fmt: skip
            self.rows = before["rows"]
        self._known = {identity(row) for row in self.rows}

    def has(self, row: dict) -> bool:
        return identity(row) in self._known

    def add(self, row: dict) -> None:
        """Unless it is there: of texts that are measured together, some may lack a row and others not."""
        if not self.has(row):
            self.rows.append(row)
            self._known.add(identity(row))

    def write(self) -> None:
        """The file, whole or not at all; one line for each row."""
        if not self.path:
            return
        head = json.dumps({"config": self.config, "environment": self.environment}, indent=1)
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(head[: head.rindex("}")].rstrip() + f',\n "rows": [\n{rows}\n]}}\n')
        os.replace(temporary, self.path)


def environment(version: str, on_cuda: bool) -> dict:
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if on_cuda:
        import torch

        machine |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return {**machine, "python": platform.python_version(), "numpy": np.__version__, "faiss_saap": version}


def half_width(x: Sequence[float]) -> float:
    """Of the 95 % interval of the mean of x, by Student's t; infinite for fewer than 4 values, which say little."""
    n = len(x)
    if n < 4:
        return float("inf")
    # the quantile of Student's t from the normal's (Abramowitz and Stegun 26.7.5)
    z, v = 1.959964, n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return float(t * np.std(x, ddof=1) / np.sqrt(n))


def measured_of(rows: Sequence[dict]) -> str:
    return "loss" if "loss" in rows[0] else "digits_found"


def table_of(rows: Sequence[dict]) -> list[dict]:
    """One row for each length, layers, method and budget: means over cases, and the difference from dense."""
    measured = measured_of(rows)
    case = lambda row: tuple(row.get(name) for name in CASE)
    dense = {case(row): row[measured] for row in rows if row["method"] == "dense"}
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["tokens"], row.get("layers", "all"), row["method"], row["budget"]), []).append(row)
    table = []
    for (tokens, layers, method, budget), group in groups.items():
        mean = lambda name: float(np.mean([row[name] for row in group]))
        entry = {"tokens": tokens, "layers": layers, "method": method, "budget": budget, "cases": len(group),
                 **{name: mean(name) for name in (measured, "selectivity", "index_bytes_fraction")}}  # fmt: skip
        pairs = [(row[measured], dense[case(row)]) for row in group if case(row) in dense]
        if method != "dense" and pairs:
            # a loss by its ratio: texts differ in theirs
            differences = [a / b - 1 if measured == "loss" else a - b for a, b in pairs]
            entry |= {"difference": float(np.mean(differences)), "half_width": half_width(differences)}
        table.append(entry)
    return table


def print_table(table: Sequence[dict]) -> None:
    measured = measured_of(table)
    ablated = any(r["layers"] != "all" for r in table)
    print(f"{'tokens':>7}  {'layers  ' if ablated else ''}{'method':12} {'budget':>7}  {'read':>7}  {'index':>7}  "
          f"{measured:>12}  {'cases':>5}  {'from dense (95 % interval)':>28}")  # fmt: skip
    for r in table:
        budget = "" if r["method"] in WITHOUT_BUDGET else f"{r['budget']:.1%}"
        difference = ""
        if "difference" in r:
            sign = "+.2%" if measured == "loss" else "+.3f"
            width = f"{r['half_width']:{sign[1:]}}" if np.isfinite(r["half_width"]) else "?"
            difference = f"{r['difference']:{sign}} ± {width}"
        print(f"{r['tokens']:7,}  {r['layers'] + '  ' if ablated else '':>{8 if ablated else 0}}{r['method']:12} "
              f"{budget:>7}  {r['selectivity']:7.2%}  {r['index_bytes_fraction']:7.2%}  {r[measured]:12.4f}  "
              f"{r['cases']:5}  {difference:>28}")  # fmt: skip


def plot(table: Sequence[dict], path: Path) -> None:
    """Difference from dense against the share of far keys read, one panel for each length; or, where layers were
    sparse a group at a time, the groups side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = measured_of(table)
    percent = 100 if measured == "loss" else 1
    label = "loss above dense, %" if measured == "loss" else "digits found, difference from dense"
    compared = [r for r in table if "difference" in r]
    groups = [g for g in dict.fromkeys(r["layers"] for r in compared) if g != "all"]
    if groups:
        compared = [r for r in compared if r["layers"] != "all"]
        series_of = lambda r: f"{r['method']}, {r['budget']:.0%}"
    else:
        compared = [r for r in compared if r["method"] not in WITHOUT_BUDGET]
        series_of = lambda r: r["method"]
    series = list(dict.fromkeys(map(series_of, compared)))
    lengths = sorted({r["tokens"] for r in compared})
    figure, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False, sharex=True, sharey=True)
    for axis, length in zip(axes[0], lengths):
        for i, name in enumerate(series):
            own = sorted((r for r in compared if r["tokens"] == length and series_of(r) == name),
                         key=lambda r: r["selectivity"])  # fmt: skip
            beside = i - (len(series) - 1) / 2  # points that would hide each other lie side by side
            x = [groups.index(r["layers"]) + 0.12 * beside if groups else 100 * r["selectivity"] * 1.02**beside
                 for r in own]  # fmt: skip
            axis.errorbar(x, [percent * r["difference"] for r in own], [percent * r["half_width"] for r in own],
                          color=f"C{i}", fmt="o" if groups else "o-", label=name, capsize=2, linewidth=1)  # fmt: skip
        if groups:
            axis.set_xticks(range(len(groups)), groups)
            axis.set_xlabel("layers that attend sparsely, all others densely")
        else:
            axis.set_xscale("log")
            axis.set_xlabel("far keys read per KV head, %")
            ticks = sorted({r["budget"] * 100 for r in compared})
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
            axis.minorticks_off()
        axis.axhline(0, color="black", linewidth=1)
        axis.set_title(f"{length:,} tokens")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
    plt.close(figure)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="end_to_end_results.py", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON", help="files of end_to_end.py, of one command")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="file for a picture")
    options = parser.parse_args(arguments)
    try:
        if options.plot:
            check_picture("--plot", options.plot)
        rows: dict[tuple, dict] = {}
        for file in options.files:
            rows.update((identity(row), row) for row in read_report(file, FIELDS)["rows"])
        if len({measured_of([row]) for row in rows.values()}) != 1:
            raise ValueError("the files hold no rows, or losses and pass keys together")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = table_of(list(rows.values()))
    print_table(table)
    if options.plot:
        plot(table, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
