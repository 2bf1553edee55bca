#!/usr/bin/env python3
"""SmolLM2-135M decodes through the library in all 30 layers: its loss, pass keys it finds, or answers as they come."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NoReturn, Optional, Sequence

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from end_to_end_results import Results, WITHOUT_BUDGET, environment, plot, print_table, table_of
from pass_key import DIGITS, hide_pass_key
from smollm2 import SmolLM2
from sparse_decoding import METHODS, SINK, WINDOW, KvCache, Method, cached_prefill, decode, make_methods, prefill

import faiss_saap as fs  # after sparse_decoding, which says how its threads wait

ROOT = Path(__file__).resolve().parents[1]


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
    common.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where prefills attend; cuda needs torch, auto takes it if it works (default: auto)")
    measure = Parser(add_help=False)
    measure.add_argument("--methods", type=list_of(str), default=list(METHODS), metavar="A,B",
                         help=f"default: {','.join(METHODS)}")
    measure.add_argument("--budgets", type=list_of(fraction), default=[0.01, 0.02, 0.05, 0.1], metavar="X,Y",
                         help="far keys read at most, per KV head (default: 0.01,0.02,0.05,0.1)")
    measure.add_argument("--json", type=Path, metavar="FILE", help="file for the results, written after each case")
    measure.add_argument("--resume", action="store_true", help="keep what --json holds already, measure the rest")
    measure.add_argument("--plot", type=Path, metavar="FILE", help="file for a picture of them")

    parser = Parser(prog="end_to_end.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="loss|needle|stream", parser_class=Parser)
    loss = commands.add_parser("loss", parents=[common, measure], allow_abbrev=False,
                               help="mean loss of the last tokens of texts")
    loss.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 texts")
    loss.add_argument("--tokens", type=int, default=8192, metavar="N", help="of each text (default: 8192)")
    loss.add_argument("--sparse", type=int, default=256, metavar="N",
                      help="last tokens, which attend sparsely and count (default: 256)")
    loss.add_argument("--layer-groups", type=int, default=1, metavar="N",
                      help="N groups of layers, of which one at a time attends sparsely, the others densely "
                           "(default: 1)")

    needle = commands.add_parser("needle", parents=[common, measure], allow_abbrev=False,
                                 help="pass keys hidden at several depths")
    needle.add_argument("--lengths", type=list_of(int), default=[4096, 8192, 16384], metavar="N,M",
                        help="tokens of the texts (default: 4096,8192,16384)")
    needle.add_argument("--depths", type=int, default=10, metavar="N", help="depths of each length (default: 10)")
    needle.add_argument("--rounds", type=int, default=1, metavar="N",
                        help="keys of each depth; with several haystacks each round takes the next (default: 1)")
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
    stream.add_argument("--answer", type=int, default=24, metavar="N", help="tokens after --prompt at most (24)")
    for command, several in ((needle, "+"), (stream, None)):
        command.add_argument("--haystack", type=Path, nargs=several, metavar="FILE",
                             help="UTF-8 text (default: the 8,192 tokens of data/kjv_8k.safetensors)")

    options = parser.parse_args(arguments)
    if options.command == "loss" and not WINDOW + SINK < options.tokens - options.sparse:
        parser.error(f"--tokens {options.tokens} leaves no far keys before --sparse {options.sparse}")
    for name in ("sparse", "layer_groups", "depths", "rounds"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be positive")
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
    return SmolLM2(rope_scale=options.rope_scale or (1 if tokens <= 8192 else 2), device=options.device)


def trained_of(options: argparse.Namespace, methods: Sequence[str]) -> Optional[fs.PartitionSet]:
    if {"saap", "saap_blend", "union", "union_blend"} & set(methods):
        return fs.read_partitions(str(options.partitions))
    return None


@contextmanager
def layers_bar(model: SmolLM2, what: str) -> Iterator[tqdm]:
    with tqdm(total=model.num_layers, desc=what, unit="layer", leave=False, disable=None) as bar:
        yield bar


def budgets_of(name: str, budgets: list[float]) -> list[float]:
    """Of methods that read all far keys, or none, there is one row."""
    return [{"dense": 1.0, "window": 0.0}[name]] if name in WITHOUT_BUDGET else budgets


def cost_of(method: Method, started: float) -> dict:
    cache = method.cache
    far_bytes = 2 * (cache.length - SINK - WINDOW) * cache.k[:, :, 0].nbytes
    return {
        "selectivity": round(method.selectivity, 6),
        "index_bytes_fraction": round(method.index_bytes() / far_bytes, 6),
        "seconds": round(time.perf_counter() - started, 3),
    }


def measure_loss(options: argparse.Namespace, results: Results) -> None:
    model = model_for(options.tokens, options)
    trained = trained_of(options, options.methods)
    if options.layer_groups > model.num_layers:
        raise ValueError(f"--layer-groups {options.layer_groups}: the model has {model.num_layers} layers")
    everywhere = range(model.num_layers)
    groups = [range(g[0], g[-1] + 1) for g in np.array_split(everywhere, options.layer_groups)]
    name_of = lambda layers: "all" if layers == everywhere else f"{layers[0]}-{layers[-1]}"
    for file in options.text:
        tokens = model.encode(file.read_text())[: options.tokens]
        if len(tokens) < options.tokens:
            raise ValueError(f"{file} has only {len(tokens):,} tokens, --tokens asks for {options.tokens:,}")
        case = {"text": file.name, "tokens": options.tokens, "sparse": options.sparse}
        missing: dict[str, list[tuple[range, dict]]] = {}
        for method in options.methods:
            for layers in [everywhere] if method == "dense" else groups:
                for budget in budgets_of(method, options.budgets):
                    row = {**case, "layers": name_of(layers), "method": method, "budget": budget}
                    if not results.has(row):
                        missing.setdefault(method, []).append((layers, row))
        if not missing:
            continue
        first = options.tokens - options.sparse - 1
        with layers_bar(model, f"{file.name}: prefill") as bar:
            cache = cached_prefill(model, tokens[:first], options.tokens, options.cache, bar.update)
        with tqdm(total=sum(map(len, missing.values())), desc=file.name, leave=False, disable=None) as bar:
            for method in make_methods(missing, cache, model, trained):
                for layers, row in missing[method.name]:
                    started = time.perf_counter()
                    method.begin(row["budget"])
                    hidden = decode(model, method, tokens[first:-1], first, layers)
                    # nll wants the hidden state of every token; that of the last one predicts nothing
                    loss = model.nll(np.vstack([hidden, hidden[-1:]]), tokens[first:]).mean()
                    results.add({**row, "loss": float(loss), **cost_of(method, started)})
                    bar.update()
                results.write()


def measure_needles(options: argparse.Namespace, results: Results) -> None:
    trained = trained_of(options, options.methods)
    files = options.haystack or [None]
    for length in options.lengths:
        model = model_for(length, options)
        for round in range(options.rounds):
            file = files[round % len(files)]
            measure_needles_of(model, length, round, file, trained, options, results)


def measure_needles_of(
    model: SmolLM2,
    length: int,
    round: int,
    file: Optional[Path],
    trained: Optional[fs.PartitionSet],
    options: argparse.Namespace,
    results: Results,
) -> None:
    """One key at each depth of one haystack."""
    haystack = haystack_of(model, file)
    if len(haystack) < length:
        raise ValueError(f"the haystack has only {len(haystack):,} tokens, --lengths asks for {length:,}")
    plain: Optional[KvCache] = None
    for i in range(options.depths):
        depth = (i + 0.5) / options.depths
        seed = options.seed * 1000 + round * options.depths + i
        hidden_key = hide_pass_key(model, haystack, length, depth, seed)
        case = {"text": file.name if file else "kjv_8k", "tokens": length, "depth": depth, "key": hidden_key.key}
        missing: dict[str, list[dict]] = {}
        for method in options.methods:
            for budget in budgets_of(method, options.budgets):
                row = {**case, "method": method, "budget": budget}
                if not results.has(row):
                    missing.setdefault(method, []).append(row)
        if not missing:
            continue
        what = f"{length:,} tokens, round {round + 1}, depth {depth:.2f}"
        if plain is None:
            with layers_bar(model, f"{length:,} tokens: haystack") as bar:
                plain = cached_prefill(model, haystack[:length], length, options.cache, bar.update)
        # up to the needle the text is the haystack, whose cache serves every depth
        cache = KvCache(model, length)
        cache.copy_of(plain, hidden_key.needle)
        with layers_bar(model, f"{what}: prefill") as bar:
            prefill(model, hidden_key.tokens[: hidden_key.question], cache, bar.update)
        methods = make_methods(missing, cache, model, trained)
        for method in tqdm(methods, total=len(missing), desc=what, leave=False, disable=None):
            for row in missing[method.name]:
                started = time.perf_counter()
                method.begin(row["budget"])
                hidden = decode(model, method, hidden_key.tokens[hidden_key.question : -1], hidden_key.question)
                found = model.logits(hidden[-DIGITS:]).argmax(1) == hidden_key.tokens[-DIGITS:]
                results.add({**row, "digits_found": float(found.mean()), **cost_of(method, started)})
        results.write()


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


def config_of(options: argparse.Namespace) -> dict:
    """The options as JSON; of files the names, as where they lie says nothing."""
    plain = lambda x: x.name if isinstance(x, Path) else [plain(y) for y in x] if isinstance(x, list) else x
    skipped = ("json", "plot", "resume", "cache")
    return {name: plain(value) for name, value in vars(options).items() if name not in skipped}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse(arguments)
    try:
        if options.command == "stream":
            stream(options)
            return 0
        results = Results(options.json, config_of(options), environment(fs.__version__), options.resume)
        (measure_loss if options.command == "loss" else measure_needles)(options, results)
    except (OSError, ValueError, fs.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results.write()
    table = table_of(results.rows)
    print_table(table)
    if options.plot:
        plot(table, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
