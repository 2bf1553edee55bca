#!/usr/bin/env python3
"""What other partitions of the keys could give: mass recall of their ceiling, and of the query's product with the
means of their cells, against the bytes that choosing reads. A sketch in numpy, apart from the library.

For the table in docs/classifier.md: partitions are learnt from the traces of --train and measured on those of --test.
Cells are taken by descending score while they fit into the budget, as the library does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Callable

import numpy as np
from arguments import positive
from safetensors import SafetensorError, safe_open

SINK, WINDOW, BUDGET = 16, 256, 0.05
NUMBER_BYTES, COUNT_BYTES = 2, 4


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Interleaved RoPE of x (heads, n, d) at positions 0 .. n - 1."""
    n, d = x.shape[1:]
    angles = np.multiply.outer(np.arange(n, dtype=np.float64), theta ** (-np.arange(0, d, 2) / d))
    pairs = np.ascontiguousarray(x, dtype=np.float32).view(np.complex64)
    return (pairs * np.exp(1j * angles).astype(np.complex64)).view(np.float32)


class Head:
    """One KV head of a text."""

    def __init__(self, path: Path, layer: int):
        try:
            with safe_open(path, "numpy") as file:
                self.q = file.get_tensor(f"layer.{layer}.q")[:3].astype(np.float32)  # pre-RoPE (group, n, d)
                self.k = file.get_tensor(f"layer.{layer}.k")[:1].astype(np.float32)
                theta = float((file.metadata() or {})["rope_theta"])
        except (OSError, KeyError, SafetensorError) as error:
            raise SystemExit(f"error: {path} is no trace with layer {layer}: {error}")
        self.q_post, self.k_post = rotate(self.q, theta), rotate(self.k, theta)[0]
        self.k = self.k[0]
        self.n, self.d = self.k.shape
        step = max(1, self.n // 2 // options.queries)
        self.asking = range(self.n // 2, self.n, step)


def nearest(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    half = (centroids**2).sum(1) / 2
    return np.concatenate(
        [(x[i : i + 4096] @ centroids.T - half).argmax(1) for i in range(0, len(x), 4096)]
    )


def means_of(x: np.ndarray, cells: np.ndarray, ncell: int) -> tuple[np.ndarray, np.ndarray]:
    """Means (ncell, d), zero for an empty cell, and counts (ncell,)."""
    order = np.argsort(cells, kind="stable")
    count = np.bincount(cells, minlength=ncell)
    begin = np.concatenate([[0], np.cumsum(count)[:-1]])
    sums = np.zeros((ncell, x.shape[1]), np.float64)
    some = count > 0
    sums[some] = np.add.reduceat(x[order].astype(np.float64), begin[some])
    return (sums / np.maximum(count, 1)[:, None]).astype(np.float32), count


def kmeans(x: np.ndarray, ncell: int, iterations: int = 8) -> np.ndarray:
    centroids = x[np.random.default_rng(0).choice(len(x), ncell, replace=False)].copy()
    for _ in range(iterations):
        mean, count = means_of(x, nearest(x, centroids), ncell)
        centroids[count > 0] = mean[count > 0]
    return centroids


def take(score: np.ndarray, count: np.ndarray, limit: int) -> np.ndarray:
    """Cells by descending score while they fit; one that does not is passed over."""
    order = np.argsort(-score, kind="stable")
    order = order[(count[order] > 0) & (score[order] > -np.inf)]
    taken, left = [], limit
    while len(order) and left > 0:
        fits = np.cumsum(count[order]) <= left
        stop = len(order) if fits.all() else int(fits.argmin())
        taken.append(order[:stop])
        left -= int(count[order[:stop]].sum())
        order = order[stop:]
        order = order[count[order] <= left]
    return np.concatenate(taken) if taken else np.empty(0, int)


class Partition:
    """cells (n,) of a text's keys; `vectors` that choosing reads; parent (ncell,) of a cell in a coarser level, of
    which `opened` are looked into."""

    def __init__(self, cells, ncell, vectors=None, parent=None, opened=0):
        self.cells, self.ncell, self.parent, self.opened = cells, ncell, parent, opened
        self.vectors = ncell if vectors is None else vectors


def measure(head: Head, partition: Partition) -> np.ndarray:
    """(read by the ceiling, by query times mean, far mass) per query head, summed over the queries."""
    result = np.zeros((3, len(head.q)))
    for i in head.asking:
        end = i - WINDOW + 1
        cells = partition.cells[SINK:end]
        mean, count = means_of(head.k_post[SINK:end], cells, partition.ncell)
        limit = int(BUDGET * (end - SINK))
        logits = head.q_post[:, i] @ head.k_post[: i + 1].T / np.sqrt(head.d)
        mass = np.exp(logits - logits.max(1, keepdims=True))
        mass /= mass.sum(1, keepdims=True)
        for g in range(len(head.q)):
            of_cell = np.bincount(cells, mass[g, SINK:end], partition.ncell)
            by_mass = of_cell / np.maximum(count, 1)
            by_mean = mean @ head.q_post[g, i]
            for row, score in enumerate((by_mass, by_mean)):
                score = np.where(count > 0, score, -np.inf)
                if partition.parent is not None:
                    # a coarse cell is as good as its keys' mass, or as their mean
                    up = partition.parent
                    n_up = np.maximum(np.bincount(up, count), 1)
                    coarse = np.bincount(up, (of_cell if row == 0 else by_mean * count)) / n_up
                    best = np.argsort(-coarse)[: partition.opened]
                    score = np.where(np.isin(up, best), score, -np.inf)
                result[row, g] += of_cell[take(score, count, limit)].sum()
            result[2, g] += of_cell.sum()
    return result


def root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 1e-6 * values.max()))) @ vectors.T


def partitions_of(layer: int, train: list[Head]) -> dict[str, Callable[[Head], Partition]]:
    keys = np.concatenate([h.k[SINK:] for h in train])
    queries = np.concatenate([h.q.reshape(-1, h.d)[::8] for h in train])
    metric = root(queries.T @ queries / len(queries)).astype(np.float32)
    offline = {c: kmeans(keys, c, 8 if c < 4096 else 4) for c in (256, 1024, 4096)}
    shaped = {c: kmeans(keys @ metric, c) for c in (256, 1024)}
    groups = nearest(offline[4096], kmeans(offline[4096], 1024))  # of fine means
    coarse = nearest(offline[4096], kmeans(offline[4096], 64))

    def segments(c: int, length: int) -> Callable[[Head], Partition]:
        def make(h: Head) -> Partition:
            cells = nearest(h.k, offline[c]) + c * (np.arange(h.n) // length)
            return Partition(cells, c * -(-h.n // length), len(np.unique(cells)))
        return make

    def own(per_cell: int, shape: bool) -> Callable[[Head], Partition]:
        def make(h: Head) -> Partition:
            first = slice(SINK, h.n // 2)
            ncell = (h.n // 2 - SINK) // per_cell
            m = np.eye(h.d, dtype=np.float32)
            if shape:
                seen = h.q_post[:, first].reshape(-1, h.d)
                m = root(seen.T @ seen / len(seen)).astype(np.float32)
            return Partition(nearest(h.k_post @ m, kmeans(h.k_post[first] @ m, ncell)), ncell)
        return make

    made: dict[str, Callable[[Head], Partition]] = {}
    for c in offline:
        made[f"offline, {c:,} cells"] = lambda h, c=c: Partition(nearest(h.k, offline[c]), c)
    for c in shaped:
        made[f"offline, {c:,} cells, metric of the queries"] = (
            lambda h, c=c: Partition(nearest(h.k @ metric, shaped[c]), c))
    made["offline, 1,024 cells of four means each"] = (
        lambda h: Partition(groups[nearest(h.k, offline[4096])], 1024, 4096))
    for opened in (8, 16):
        made[f"offline, two levels: {opened} of 64, then 4,096"] = lambda h, o=opened: Partition(
            nearest(h.k, offline[4096]), 4096, 64 + int(4096 * o / 64), coarse, o)
    for c, length in ((256, 2048), (256, 1024), (1024, 2048)):
        made[f"offline, {c:,} cells × segments of {length:,} tokens"] = segments(c, length)
    for per_cell in (64, 32, 16):
        made[f"own, {per_cell} keys a cell"] = own(per_cell, False)
        made[f"own, {per_cell} keys a cell, metric of the queries"] = own(per_cell, True)
    return made


def main() -> None:
    rows = []
    for layer in options.layers:
        train = [Head(p, layer) for p in options.train]
        made = partitions_of(layer, train)
        del train
        tests = [Head(p, layer) for p in options.test]
        for name, make in made.items():
            ratios, vectors = [], []
            for head in tests:
                partition = make(head)
                ceiling, recall, far = measure(head, partition)
                ratios.append([(ceiling / far).mean(), (recall / far).mean()])
                vectors.append(partition.vectors * (head.d * NUMBER_BYTES + COUNT_BYTES)
                               / (2 * NUMBER_BYTES * head.n * head.d))
            ceiling, recall = np.mean(ratios, 0)
            rows.append({"layer": layer, "partition": name, "index_bytes_fraction": float(np.mean(vectors)),
                         "ceiling": float(ceiling), "recall_by_means": float(recall)})
            print(f"{layer:3d} {name:55} {rows[-1]['index_bytes_fraction']:.3f} {ceiling:.3f} {recall:.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="T.safetensors")
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="T.safetensors")
    parser.add_argument("--layers", type=lambda s: [int(x) for x in s.split(",")], default=[9, 15, 21],
                        help="default: 9,15,21")
    parser.add_argument("--queries", type=positive, default=64, help="of each text (default: 64)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    main()
