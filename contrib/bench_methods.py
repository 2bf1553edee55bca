#!/usr/bin/env python3
"""The benchmark of methods: runs bench_recall over sampled layers and heads of several texts, and keeps what it says.

Each run is a file in the cache folder and is not made again, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

BUDGETS = "0.005,0.01,0.02,0.03,0.04,0.06,0.1,0.2"
# Texts that no method was chosen or tuned on; kjv and python were what methods were developed on.
TEXTS = {length: ["handbook", "kernel", "jargon", "headers"] for length in ("8k", "32k")}
# Longer texts are generated: of this length, by its name, from these traces.
GENERATED = {"32k": (32768, ["kjv_8k", "python_8k"]), "128k": (131072, [f"{text}_8k" for text in TEXTS["8k"]])}
WINDOW = {"8k": 256, "32k": 2048, "128k": 2048}
CELLS = {"8k": 512, "32k": 2048, "128k": 4096}  # 16 keys a cell, 32 where they are many
QUERIES = {"8k": 24, "32k": 16, "128k": 8}
# Cells of 32 and 64 keys: a smaller index leaves more of the bytes for keys.
COARSE = "ivf_rope_ip,ivf_rope_ip_group,ivf_codes_group,ivf_rope_spherical_group"
MORE = "hnsw,oracle_cells_group"  # slow to build or to probe: on the whole text only
SEARCHED = {"8k": [("handbook", 9, 2), ("headers", 21, 2)]}  # heads shown as a search problem (bench_ann)
# The best of each family, so that all of it takes minutes; `bench_recall --methods all` knows more.
FAMILIES = (
    "oracle_topk,oracle_topk_group,ivf_rope_l2_group,ivf_rope_ip,ivf_rope_ip_group,ivf_norope_mean_group,"
    "retroinfer_group,quest_64_group,pq_scan_group,pq_scan_4bit_group,pqcache_group,magicpig,streaming_llm,"
    "metric_cells_group,metric_codes,metric_codes_group"
)
TRAINED = "saap,saap_group,saap_codes_group,offline_segments_group"
FAMILIES_LONG = (
    "oracle_topk_group,ivf_rope_l2_group,ivf_rope_ip_group,retroinfer_group,quest_64_group,pq_scan_4bit_group,"
    "pqcache_group,streaming_llm,metric_codes_group"
)


@dataclass
class Run:
    """One call of bench_recall."""

    name: str
    length: str
    trace: Path
    layer: int
    kv_head: int
    methods: str
    keys_per_cell: int = 16
    cluster_on: str = "all"
    partitions: Path | None = None
    again: bool = False  # even where its result is there
    sources: list[Path] = field(default_factory=list)

    def generate(self, program: Path) -> list[str]:
        """What makes the trace out of others."""
        return [str(x) for x in (
            program, "--trace", *self.sources, "--layer", self.layer, "--kv-head", self.kv_head,
            "--tokens", GENERATED[self.length][0], "--out", self.trace,
        )]  # fmt: skip

    def command(self, program: Path, out: Path) -> list[str]:
        command = [
            program, "--trace", self.trace, "--layer", self.layer, "--kv-head", self.kv_head, "--methods", self.methods,
            "--ncell", CELLS[self.length] * 16 // self.keys_per_cell, "--budget", BUDGETS,
            "--queries", QUERIES[self.length], "--window", WINDOW[self.length], "--cluster-on", self.cluster_on,
            "--json", out,
        ]  # fmt: skip
        if self.partitions:
            command += ["--partitions", self.partitions]
        return [str(x) for x in command]


class SearchRun(Run):
    """One call of bench_ann."""

    def command(self, program: Path, out: Path) -> list[str]:
        return [str(x) for x in (
            program.with_name("bench_ann"), "--trace", self.trace, "--layer", self.layer, "--kv-head", self.kv_head,
            "--ncell", CELLS[self.length], "--json", out,
        )]  # fmt: skip


def recorded(traces: Path, name: str) -> Path:
    trace = traces / "heads" / f"{name}.safetensors"
    if not trace.exists():
        raise SystemExit(f"error: {trace} is not there: make it with contrib/make_traces.sh {traces}")
    return trace


def trained(traces: Path, data: Path, length: str) -> Path:
    """Partitions for texts of a length: those of another RoPE scaling do not fit."""
    return data / "smollm2_135m.saap" if length == "8k" else traces / f"smollm2_135m_{length}.saap"


def header(file: Path) -> dict:
    """Of a safetensors file."""
    with file.open("rb") as opened:
        return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))


def heads(traces: Path, length: str) -> list[tuple[str, Path, int, int]]:
    """Text, trace, layer and KV head. Of 8,192 tokens every other layer, the others in the next text, so that many heads
    are seen in little time; of 32,768 the same head of each layer in all texts, so that texts can be compared."""
    sampled = []
    for t, text in enumerate(TEXTS[length]):
        trace = recorded(traces, f"{text}_{length}")
        about = header(trace)["__metadata__"]
        layers = [int(x) for x in about["layers"].split(",")]
        kv_heads = [int(x) for x in about.get("kv_heads", "0,1,2").split(",")]
        first, step, shift = (t % 2, 2, t // 2 * 2) if length == "8k" else (0, 1, 0)
        for n, layer in list(enumerate(layers))[first::step]:
            sampled.append((text, trace, layer, kv_heads[(n + n % 2 + shift) % len(kv_heads)]))
    return sampled


def plan(traces: Path, data: Path, lengths: list[str], more_methods: tuple[str, ...] = ()) -> list[Run]:
    """What is asked first comes first: methods by name, the whole text clustered, the decode-like listing, coarser cells."""
    asked_for, everything, coarse, decoding = [], [], [], []
    for length in lengths:
        partitions = trained(traces, data, length)
        holds = header(partitions) if partitions.exists() else {}
        for text, trace, layer, kv_head in heads(traces, length):
            name = f"{length}-{text}-{layer}-{kv_head}"
            common = dict(length=length, trace=trace, layer=layer, kv_head=kv_head)
            everything.append(Run(name, **common, methods=FAMILIES))
            decoding.append(Run(f"{name}-prefix", **common, methods=FAMILIES, cluster_on="prefix"))
            coarse.append(Run(f"{name}-more", **common, methods=MORE))
            for clustering, runs, suffix in (("all", everything, ""), ("prefix", decoding, "-prefix")):
                own = partitions if f"layer.{layer}.kv.{kv_head}.centroids" in holds else None
                for method in more_methods:
                    more = dict(methods=method, cluster_on=clustering, again=True, partitions=own)
                    asked_for.append(Run(f"{name}{suffix}-with_{method}", **common, **more))
                if own:
                    methods = TRAINED + (",saap_blend_group" if clustering == "prefix" else "")
                    more = dict(methods=methods, cluster_on=clustering, partitions=own)
                    runs.append(Run(f"{name}{suffix}-trained", **common, **more))
                for keys in (32, 64):
                    more = dict(methods=COARSE, cluster_on=clustering, keys_per_cell=keys)
                    coarse.append(Run(f"{name}{suffix}-cells{keys}", **common, **more))
        for text, layer, kv_head in SEARCHED.get(length, []):
            name, trace = f"ann-{length}-{text}-{layer}-{kv_head}", recorded(traces, f"{text}_{length}")
            coarse.append(SearchRun(name, length, trace, layer, kv_head, ""))
    generated = []
    if "32k" in lengths:
        # of the heads that are measured on recorded texts, so that both can be compared
        sampled = sorted({(layer, kv_head) for *_, layer, kv_head in heads(traces, "32k")})
        for length, (_, sources) in GENERATED.items():
            for layer, kv_head in sampled:
                generated.append(Run(
                    f"{length}-generated-{layer}-{kv_head}", length,
                    traces / "generated" / f"{layer}.{kv_head}_{length}.safetensors", layer, kv_head,
                    FAMILIES if length in TEXTS else FAMILIES_LONG,
                    sources=[recorded(traces, name) for name in sources],
                ))  # fmt: skip
    return asked_for + everything + decoding + generated + coarse


def measure(run: Run, options: argparse.Namespace, threads: int) -> None:
    commands = [run.command(options.bin / "bench_recall", options.cache / f"{run.name}.json")]
    if run.sources and not run.trace.exists():
        run.trace.parent.mkdir(exist_ok=True)
        commands.insert(0, run.generate(options.bin / "generate_trace"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        if done.returncode != 0:
            raise SystemExit(f"error: {run.name}: {done.stderr.strip()}")


def left_out(runs: list[Run], full: bool) -> list[str]:
    """What a reader of the results might miss, in sentences."""
    sentences = []
    if not full:
        sentences.append("texts of 32,768 tokens and generated ones; --full measures them")
    for length in TEXTS:
        of_length = [run for run in runs if run.length == length and not run.sources]
        if of_length and not any(run.partitions for run in of_length):
            sentences.append(f"saap at {length} tokens: its partitions are not there (benchs/README.md makes them)")
    return sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--traces", type=Path, required=True, help="folder of contrib/make_traces.sh")
    parser.add_argument("--bin", type=Path, default=Path("build/bin"), help="folder of bench_recall")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the trained partitions")
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="folder for the results of single runs")
    parser.add_argument("--full", action="store_true", help="32,768 tokens too, and 131,072 generated ones")
    parser.add_argument("--with", dest="methods", default="", metavar="NAME,...",
                        help="methods of bench_recall that are not among the usual ones, measured anew each time")
    options = parser.parse_args()
    methods = tuple(filter(None, options.methods.split(",")))
    runs = plan(options.traces, options.data, ["8k", "32k"] if options.full else ["8k"], methods)
    options.cache.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if run.again or not (options.cache / f"{run.name}.json").exists()]
    start, made = time.monotonic(), 0

    def count() -> None:
        nonlocal made
        made += 1
        spent = time.monotonic() - start
        left = spent / made * (len(todo) - made)
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{made} of {len(todo)} runs, {spent:.0f} s, about {left:.0f} s left   ", file=sys.stderr, end=end)

    # A run is mostly serial and counts the time of its own threads: one for each core. Searches are timed by the clock:
    # alone, on all cores.
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        futures = [pool.submit(measure, run, options, 1) for run in todo if not isinstance(run, SearchRun)]
        try:
            for future in as_completed(futures):
                future.result()
                count()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for run in todo:
        if isinstance(run, SearchRun):
            measure(run, options, cores)
            count()
    for sentence in left_out(runs, options.full):
        print(f"left out: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    main()
