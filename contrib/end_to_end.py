#!/usr/bin/env python3
"""SmolLM2-135M decodes through the library in all 30 layers: its loss, pass keys it finds, or answers as they come."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NoReturn, Optional, Sequence

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from pass_key import DIGITS, hide_pass_key
from smollm2 import SmolLM2
from sparse_decoding import METHODS, SINK, WINDOW, KvCache, Method, cached_prefill, decode, make_methods, prefill

import faiss_saap as fs  # after sparse_decoding, which says how its threads wait

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_BUDGET = ("dense", "window")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def list_of(convert):
    def parse_list(text: str) -> list:
        return [convert(part) for part in text.split(",")]

    parse_list.__name__ = f"list of {convert.__name__}s, comma-separated"
    return parse_list


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} must be from 0 to 1")
    return value


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    common = Parser(add_help=False)
    common.add_argument("--partitions", type=Path, default=ROOT / "data" / "smollm2_135m.saap", metavar="P.saap",
                        help="trained partitions of all layers (default: data/smollm2_135m.saap)")
    common.add_argument("--cache", type=Path, default=ROOT / "build" / "prefill", metavar="FOLDER",
                        help="where prefills are kept (default: build/prefill)")
    common.add_argument("--rope-scale", type=float, metavar="S",
                        help="NTK-aware stretch of the context (default: 1 up to 8,192 tokens, 2 beyond)")
    measure = Parser(add_help=False)
    measure.add_argument("--methods", type=list_of(str), default=list(METHODS), metavar="A,B",
                         help=f"default: {','.join(METHODS)}")
    measure.add_argument("--budgets", type=list_of(fraction), default=[0.01, 0.02, 0.05, 0.1], metavar="X,Y",
                         help="far keys read at most, per KV head (default: 0.01,0.02,0.05,0.1)")
    measure.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    measure.add_argument("--plot", type=Path, metavar="FILE", help="file for a picture of them")

    parser = Parser(prog="end_to_end.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="loss|needle|stream", parser_class=Parser)
    loss = commands.add_parser("loss", parents=[common, measure], allow_abbrev=False,
                               help="mean loss of the last tokens of texts")
    loss.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 texts")
    loss.add_argument("--tokens", type=int, default=8192, metavar="N", help="of each text (default: 8192)")
    loss.add_argument("--sparse", type=int, default=256, metavar="N",
                      help="last tokens, which attend sparsely and count (default: 256)")

    needle = commands.add_parser("needle", parents=[common, measure], allow_abbrev=False,
                                 help="pass keys hidden at several depths")
    needle.add_argument("--lengths", type=list_of(int), default=[4096, 8192, 16384], metavar="N,M",
                        help="tokens of the texts (default: 4096,8192,16384)")
    needle.add_argument("--depths", type=int, default=10, metavar="N", help="keys of each length (default: 10)")
    needle.add_argument("--seed", type=int, default=1, help="of the keys (default: 1)")

    stream = commands.add_parser("stream", parents=[common], allow_abbrev=False,
                                 help="answers with the share of keys read for each token")
    stream.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the text (default: 4096)")
    stream.add_argument("--methods", type=list_of(str), default=["dense", "window", "saap", "union"], metavar="A,B",
                        help=f"each gives an answer, of {','.join(METHODS)} (default: dense,window,saap,union)")
    stream.add_argument("--budget", type=fraction, default=0.05, help="default: 0.05")
    stream.add_argument("--prompt", metavar="TEXT",
                        help="what follows the text (default: the question for a pass key hidden in it)")
    stream.add_argument("--seed", type=int, help="of the key (default: the time)")
    stream.add_argument("--answer", type=int, default=24, metavar="N", help="tokens after --prompt at most (default: 24)")
    for command in (needle, stream):
        command.add_argument("--haystack", type=Path, metavar="FILE",
                             help="UTF-8 text (default: the 8,192 tokens of data/kjv_8k.safetensors)")

    options = parser.parse_args(arguments)
    if options.command == "loss" and not WINDOW + SINK < options.tokens - options.sparse:
        parser.error(f"--tokens {options.tokens} leaves no far keys before --sparse {options.sparse}")
    for name in getattr(options, "methods", []):
        if name not in METHODS:
            parser.error(f"--methods: '{name}' must be one of {', '.join(METHODS)}")
    return options


def haystack_of(model: SmolLM2, file: Optional[Path]) -> np.ndarray:
    if file:
        return model.encode(file.read_text())
    with safe_open(ROOT / "data" / "kjv_8k.safetensors", "np") as trace:
        return trace.get_tensor("tokens")


def model_for(tokens: int, options: argparse.Namespace) -> SmolLM2:
    return SmolLM2(rope_scale=options.rope_scale or (1 if tokens <= 8192 else 2))


def trained_of(options: argparse.Namespace, methods: Sequence[str]) -> Optional[fs.PartitionSet]:
    if {"saap", "saap_blend", "union"} & set(methods):
        return fs.read_partitions(str(options.partitions))
    return None


@contextmanager
def layers_bar(model: SmolLM2, what: str) -> Iterator[tqdm]:
    with tqdm(total=model.num_layers, desc=what, unit="layer", leave=False, disable=None) as bar:
        yield bar


def budgets_of(name: str, budgets: list[float]) -> list[float]:
    """Of methods that read all far keys, or none, there is one row."""
    return [{"dense": 1.0, "window": 0.0}[name]] if name in WITHOUT_BUDGET else budgets


def row_of(method: Method, started: float) -> dict:
    cache = method.cache
    far_bytes = 2 * (cache.length - SINK - WINDOW) * cache.k[:, :, 0].nbytes
    return {
        "method": method.name,
        "budget": method.budget,
        "selectivity": method.selectivity,
        "index_bytes_fraction": method.index_bytes() / far_bytes,
        "seconds": time.perf_counter() - started,
    }


def measure_loss(options: argparse.Namespace) -> list[dict]:
    model = model_for(options.tokens, options)
    trained = trained_of(options, options.methods)
    rows = []
    for file in options.text:
        tokens = model.encode(file.read_text())[: options.tokens]
        if len(tokens) < options.tokens:
            raise ValueError(f"{file} has only {len(tokens):,} tokens, --tokens asks for {options.tokens:,}")
        first = options.tokens - options.sparse - 1
        with layers_bar(model, f"{file.name}: prefill") as bar:
            cache = cached_prefill(model, tokens[:first], options.tokens, options.cache, bar.update)
        with tqdm(total=len(options.methods), desc=file.name, unit="method", leave=False, disable=None) as bar:
            for method in make_methods(options.methods, cache, model, trained):
                for budget in budgets_of(method.name, options.budgets):
                    started = time.perf_counter()
                    method.begin(budget)
                    hidden = decode(model, method, tokens[first:-1], first)
                    # nll wants the hidden state of every token; that of the last one predicts nothing
                    loss = model.nll(np.vstack([hidden, hidden[-1:]]), tokens[first:]).mean()
                    rows.append({"text": file.name, "tokens": options.tokens, "loss": float(loss),
                                 **row_of(method, started)})
                bar.update()
    return rows


def measure_needles(options: argparse.Namespace) -> list[dict]:
    trained = trained_of(options, options.methods)
    rows = []
    for length in options.lengths:
        model = model_for(length, options)
        haystack = haystack_of(model, options.haystack)
        if len(haystack) < length:
            raise ValueError(f"the haystack has only {len(haystack):,} tokens, --lengths asks for {length:,}")
        with layers_bar(model, f"{length:,} tokens: haystack") as bar:
            plain = cached_prefill(model, haystack[:length], length, options.cache, bar.update)
        for i in range(options.depths):
            depth = (i + 0.5) / options.depths
            hidden_key = hide_pass_key(model, haystack, length, depth, options.seed * 1000 + i)
            # up to the needle the text is the haystack, whose cache serves every depth
            cache = KvCache(model, length)
            cache.copy_of(plain, hidden_key.needle)
            with layers_bar(model, f"{length:,} tokens, depth {depth:.2f}: prefill") as bar:
                prefill(model, hidden_key.tokens[: hidden_key.question], cache, bar.update)
            for method in tqdm(make_methods(options.methods, cache, model, trained), total=len(options.methods),
                               desc=f"{length:,} tokens, depth {depth:.2f}", leave=False, disable=None):
                for budget in budgets_of(method.name, options.budgets):
                    started = time.perf_counter()
                    method.begin(budget)
                    hidden = decode(model, method, hidden_key.tokens[hidden_key.question : -1], hidden_key.question)
                    found = model.logits(hidden[-DIGITS:]).argmax(1) == hidden_key.tokens[-DIGITS:]
                    rows.append({"tokens": length, "depth": depth, "key": hidden_key.key,
                                 "digits_found": float(found.mean()), **row_of(method, started)})
    return rows


def stream(options: argparse.Namespace) -> None:
    model = model_for(options.tokens, options)
    haystack = haystack_of(model, options.haystack)
    trained = trained_of(options, options.methods)
    hidden_key, most = None, options.answer
    if options.prompt is None:
        seed = int(time.time()) if options.seed is None else options.seed
        hidden_key, most = hide_pass_key(model, haystack, options.tokens, 0.5, seed), DIGITS
        text, question = np.split(hidden_key.prompt, [hidden_key.question])
        print(f"A pass key, {hidden_key.key}, is hidden {hidden_key.needle:,} tokens into {options.tokens:,}.")
    else:
        question = model.encode(options.prompt)
        if len(haystack) + len(question) < options.tokens:
            raise ValueError(f"the haystack has only {len(haystack):,} tokens, --tokens asks for {options.tokens:,}")
        text = haystack[: options.tokens - len(question)]
    capacity = options.tokens + most
    with layers_bar(model, f"reading {len(text):,} tokens (dense prefill)") as bar:
        if hidden_key:  # a key of its own for each run: nothing to keep
            cache = KvCache(model, capacity)
            prefill(model, text, cache, bar.update)
        else:
            cache = cached_prefill(model, text, capacity, options.cache, bar.update)

    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"Asked: {model.decode(question).strip()}")
    print(f"Answers, and the share of the far keys that each token read in {model.num_layers} layers:\n")
    for method in make_methods(options.methods, cache, model, trained):
        print(f"{method.name:12} ", end="", flush=True)
        method.begin(options.budget)
        answer: list[int] = []
        for token, share in greedy(model, method, question, most):
            answer.append(token)
            print(f"{model.decode([token])}{dim}[{share:.1%}]{plain}", end="", flush=True)
        if hidden_key:
            print("  found" if model.decode(answer) == hidden_key.key else "  not found", end="")
        print(flush=True)


def greedy(model: SmolLM2, method: Method, prompt: np.ndarray, most: int) -> Iterator[tuple[int, float]]:
    """The likeliest tokens after the prompt (n,), each with the share of the far keys that was read for it."""
    ends = {model.tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    waiting, first = prompt, method.cache.length
    for _ in range(most):
        read, far = method.keys_read, method.far_keys
        hidden = decode(model, method, waiting, first)
        first += len(waiting)
        token = int(model.logits(hidden[-1:])[0].argmax())
        if token in ends:
            return
        yield token, (method.keys_read - read) / max(1, method.far_keys - far)
        waiting = np.array([token], np.int32)


def table_of(rows: list[dict]) -> list[dict]:
    """Means over texts, or over depths: one row for each length, method and budget."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["tokens"], row["method"], row["budget"]), []).append(row)
    mean = lambda group, key: float(np.mean([r[key] for r in group]))
    return [
        {"tokens": tokens, "method": method, "budget": budget, "cases": len(group),
         **{key: mean(group, key) for key in ("loss", "digits_found", "selectivity", "index_bytes_fraction")
            if key in group[0]}}
        for (tokens, method, budget), group in groups.items()
    ]  # fmt: skip


def print_table(table: list[dict]) -> None:
    measured = "loss" if "loss" in table[0] else "digits_found"
    print(f"{'tokens':>7}  {'method':12} {'budget':>7}  {'read':>7}  {'index':>7}  {measured:>12}  {'cases':>5}")
    for r in table:
        budget = "" if r["method"] in WITHOUT_BUDGET else f"{r['budget']:.1%}"
        print(f"{r['tokens']:7,}  {r['method']:12} {budget:>7}  {r['selectivity']:7.2%}  "
              f"{r['index_bytes_fraction']:7.2%}  {r[measured]:12.4f}  {r['cases']:5}")


def plot(table: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured, label = ("loss", "mean loss, nats") if "loss" in table[0] else ("digits_found", "digits found")
    lengths = sorted({r["tokens"] for r in table})
    figure, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False, sharey=True)
    for axis, length in zip(axes[0], lengths):
        of_length = [r for r in table if r["tokens"] == length]
        for name in [m for m in METHODS if any(r["method"] == m for r in of_length)]:
            own = sorted((r for r in of_length if r["method"] == name), key=lambda r: r["selectivity"])
            if name in WITHOUT_BUDGET:
                axis.axhline(own[0][measured], color="black", linestyle="-" if name == "dense" else ":", label=name)
            else:
                axis.plot([100 * r["selectivity"] for r in own], [r[measured] for r in own], marker="o", label=name)
        axis.set(title=f"{length:,} tokens", xlabel="far keys read per KV head, %", xscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(label)
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


def write_json(path: Path, options: argparse.Namespace, rows: list[dict]) -> None:
    config = {k: [str(x) for x in v] if isinstance(v, list) and v and isinstance(v[0], Path)
              else str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    environment = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                   "python": platform.python_version(), "numpy": np.__version__, "faiss_saap": fs.__version__}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"config": config, "environment": environment, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse(arguments)
    try:
        if options.command == "stream":
            stream(options)
            return 0
        rows = measure_loss(options) if options.command == "loss" else measure_needles(options)
    except (OSError, ValueError, fs.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = table_of(rows)
    print_table(table)
    if options.json:
        write_json(options.json, options, rows)
    if options.plot:
        plot(table, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
