#!/usr/bin/env python3
"""Where the keys and queries of traces lie, before RoPE, in a few numbers for each KV head and their means."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from trace_file import read_trace

COLUMNS = ("cos of means", "keys: mean/spread", "queries: mean/spread", "keys: dimensions", "queries: dimensions", "keys: lag 1")


def moments(x: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean of x (n, d), squared length of the mean over the variance, and the dimensions that the variance fills
    (participation ratio of the covariance's eigenvalues)."""
    mean = x.mean(axis=0)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
    return mean, mean @ mean / eigenvalues.sum(), eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def geometry(keys: np.ndarray, queries: np.ndarray) -> list[float]:
    """keys (tokens, d); queries (heads, tokens, d); the first tokens, where attention sinks, are left out."""
    k, q = keys[16:].astype(np.float64), queries[:, 16:].reshape(-1, keys.shape[1]).astype(np.float64)
    (mean_k, far_k, dimensions_k), (mean_q, far_q, dimensions_q) = moments(k), moments(q)
    cosine = mean_k @ mean_q / np.linalg.norm(mean_k) / np.linalg.norm(mean_q)
    centred = k - mean_k
    lag = (centred[1:] * centred[:-1]).sum() / (centred**2).sum()
    return [cosine, far_k, far_q, dimensions_k, dimensions_q, lag]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("trace", type=Path, nargs="+")
    parser.add_argument("--heads", help="LAYER.KV_HEAD, comma-separated (default: all that a trace holds)")
    options = parser.parse_args()
    wanted = options.heads.split(",") if options.heads is not None else None
    held: set[str] = set()
    rows = []
    for path in options.trace:
        try:
            trace = read_trace(path)
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: {error}")
        for layer in sorted(trace.k):
            group = len(trace.q[layer]) // len(trace.k[layer])
            for i, head in enumerate(trace.kv_heads or range(len(trace.k[layer]))):
                name = f"{layer}.{head}"
                held.add(name)
                if wanted is None or name in wanted:
                    queries = trace.q[layer][i * group : (i + 1) * group]
                    rows.append((f"{path.stem} {name}", geometry(trace.k[layer][i], queries)))
    for name in wanted or ():
        if name not in held:
            parser.error(f"--heads {name}: no trace holds that head; they hold {', '.join(sorted(held))}")
    rows.append(("mean", np.mean([numbers for _, numbers in rows], axis=0)))
    print("| head | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, numbers in rows:
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in numbers) + " |")


if __name__ == "__main__":
    main()
