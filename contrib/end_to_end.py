#!/usr/bin/env python3
"""SmolLM2-135M decodes through the library in all 30 layers: its loss, pass keys it finds, or answers as they come."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, NoReturn, Optional, Sequence

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from end_to_end_results import Results, WITHOUT_BUDGET, environment, plot, print_table, table_of
from input_files import read_text
from output_files import check_output, check_picture
from pass_key import DIGITS, PassKey, hide_pass_key
from smollm2 import SmolLM2, has_cuda

try:
    from sparse_decoding import METHODS, METHODS_OF_CELLS, SINK, WINDOW, CpuDecoding, Method

    import faiss_saap as fs  # after sparse_decoding, which says how its threads wait
except ModuleNotFoundError as error:
    sys.exit(f"end_to_end.py: {error}: `pip install .`, or `./run.sh needle` once and PYTHONPATH=build/python")

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
                        help="where all is computed; cuda needs torch, and faiss_saap built with CUDA; auto takes "
                             "it if it works (default: auto)")
    common.add_argument("--texts-at-once", type=int, default=8, metavar="N",
                        help="of those of equal length, on a CUDA device (default: 8)")
    common.add_argument("--keys-per-cell", type=int, default=32, metavar="N",
                        help="of the cells learnt from the text itself (default: 32)")
    common.add_argument("--trained-share", type=fraction, default=0.5, metavar="X",
                        help="of the budget, for the trained cells of union and union_blend (default: 0.5)")
    common.add_argument("--refine", type=float, default=6, metavar="X",
                        help="candidates that the methods with codes rank for each key that is read (default: 6)")
    measure = Parser(add_help=False)
    measure.add_argument("--methods", type=list_of(str), default=[m for m in METHODS if m != "planned"], metavar="A,B",
                         help=f"of {','.join(METHODS)} (default: all but planned, which needs a file with plans)")
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
    loss.add_argument("--kv-heads", action="store_true",
                      help="of each group of layers one KV head at a time attends sparsely")

    needle = commands.add_parser("needle", parents=[common, measure], allow_abbrev=False,
                                 help="pass keys hidden at several depths")
    needle.add_argument("--lengths", type=list_of(int), default=[4096, 8192], metavar="N,M",
                        help="tokens of the texts (default: 4096,8192)")
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
    for name in ("tokens", "sparse", "layer_groups", "depths", "rounds", "texts_at_once", "keys_per_cell"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be positive")
    for length in getattr(options, "lengths", []):
        if length < 1:
            parser.error(f"--lengths {length} must be positive")
    if getattr(options, "prompt", None) == "":
        parser.error("--prompt '' asks nothing")
    if options.rope_scale is not None and not 0 < options.rope_scale <= 1e6:
        parser.error(f"--rope-scale {options.rope_scale:g} must be positive and at most 1e6")
    for name in getattr(options, "methods", []):
        if name not in METHODS:
            parser.error(f"--methods: '{name}' must be one of {', '.join(METHODS)}")
    return options


def haystack_of(model: SmolLM2, file: Optional[Path]) -> np.ndarray:
    if file:
        return model.encode(read_text(file))
    with safe_open(ROOT / "data" / "kjv_8k.safetensors", "np") as trace:
        return trace.get_tensor("tokens")


def on_cuda(options: argparse.Namespace) -> bool:
    works = fs.has_cuda and has_cuda()
    if options.device == "cuda" and not works:
        raise ValueError("--device cuda: no torch with a CUDA device is here, or faiss_saap was built without CUDA")
    return works and options.device != "cpu"


def decoding_for(tokens: int, options: argparse.Namespace):
    by_length = 1 if tokens <= 8192 else 2
    model = SmolLM2(rope_scale=by_length if options.rope_scale is None else options.rope_scale)
    if on_cuda(options):
        from gpu_decoding import GpuDecoding

        return GpuDecoding(model, options.texts_at_once)
    return CpuDecoding(model, options.cache)


def trained_of(options: argparse.Namespace, methods: Sequence[str]) -> Optional[fs.PartitionSet]:
    planned = "planned" in methods
    if not planned and not any(METHODS_OF_CELLS.get(name, [False])[0] for name in methods):
        return None
    if planned and on_cuda(options):
        raise ValueError("the method planned needs --device cpu: on the device, KV heads have no shares of their own")
    trained = fs.read_partitions(str(options.partitions))
    if planned and not trained.plans:
        raise ValueError(f"{options.partitions} has no plans for the method planned: choose_partitions makes them")
    return trained


@contextmanager
def layers_bar(model: SmolLM2, texts: int, what: str) -> Iterator[tqdm]:
    with tqdm(total=texts * model.num_layers, desc=what, unit="layer", leave=False, disable=None) as bar:
        yield bar


def budgets_of(name: str, budgets: list[float]) -> list[float]:
    """Of methods that read all far keys, none, or what their plans allow, there is one row."""
    return [{"dense": 1.0, "window": 0.0, "planned": 1.0}[name]] if name in WITHOUT_BUDGET else budgets


def costs_of(method: Method, texts: int, started: float) -> list[dict]:
    """Of each text that the method has decoded."""
    cache = method.cache
    far_bytes = (cache.length - SINK - WINDOW) * cache.token_bytes
    seconds = round((time.perf_counter() - started) / texts, 3)
    fraction = round(method.index_bytes() / far_bytes, 6)
    return [
        {"selectivity": round(float(share), 6), "index_bytes_fraction": fraction, "seconds": seconds}
        for share in np.broadcast_to(method.selectivity, texts)
    ]


def missing_rows(
    cases: Sequence[dict], ways: Sequence[dict], results: Results
) -> tuple[list[int], dict[str, list[dict]]]:
    """Of the ways to decode, those by method that some case lacks, and the cases that lack any."""
    lacking = [i for i, case in enumerate(cases) if not all(results.has({**case, **way}) for way in ways)]
    wanted: dict[str, list[dict]] = {}
    for way in ways:
        if not all(results.has({**cases[i], **way}) for i in lacking):
            wanted.setdefault(way["method"], []).append(way)
    return lacking, wanted


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def measure_loss(options: argparse.Namespace, results: Results) -> None:
    trained = trained_of(options, options.methods)
    decoding = decoding_for(options.tokens, options)
    model = decoding.model
    if options.layer_groups > model.num_layers:
        raise ValueError(f"--layer-groups {options.layer_groups}: the model has {model.num_layers} layers")
    everywhere = range(model.num_layers)
    sparse_in: dict[str, tuple[range, Optional[list[int]]]] = {"all": (everywhere, None)}  #: layers, KV heads
    for group in np.array_split(everywhere, options.layer_groups):
        layers = range(group[0], group[-1] + 1)
        name = "all" if layers == everywhere else f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        if options.kv_heads:
            sparse_in |= {f"{name}/{head}": (layers, [head]) for head in range(model.num_kv_heads)}
        else:
            sparse_in[name] = layers, None
    parts = list(sparse_in)[1:] or ["all"]
    ways = [
        {"layers": layers, "method": method, "budget": budget}
        for method in options.methods
        for layers in (["all"] if method == "dense" else parts)
        for budget in budgets_of(method, options.budgets)
    ]
    first = options.tokens - options.sparse - 1
    for files in chunks(options.text, decoding.texts_at_once):
        cases = [{"text": file.name, "tokens": options.tokens, "sparse": options.sparse} for file in files]
        lacking, wanted = missing_rows(cases, ways, results)
        if not lacking:
            continue
        files, cases = [files[i] for i in lacking], [cases[i] for i in lacking]
        tokens = np.stack([tokens_of(model, file, options.tokens) for file in files])
        what = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} others"
        with layers_bar(model, len(files), f"{what}: prefill") as bar:
            cache = decoding.prefill(tokens[:, :first], options.tokens, each_layer=bar.update)
        with tqdm(total=sum(map(len, wanted.values())), desc=what, leave=False, disable=None) as bar:
            for method in methods_of(decoding, wanted, cache, trained, options):
                for way in wanted[method.name]:
                    started = time.perf_counter()
                    method.begin(way["budget"])
                    hidden = decoding.decode(method, tokens[:, first:-1], first, *sparse_in[way["layers"]])
                    losses = decoding.nll(hidden, tokens[:, first + 1 :]).mean(1)
                    for case, loss, cost in zip(cases, losses, costs_of(method, len(cases), started)):
                        results.add({**case, **way, "loss": float(loss), **cost})
                    bar.update()
                results.write()


def tokens_of(model: SmolLM2, file: Path, n: int) -> np.ndarray:
    tokens = model.encode(read_text(file))[:n]
    if len(tokens) < n:
        raise ValueError(f"{file} has only {len(tokens):,} tokens, --tokens asks for {n:,}")
    return tokens


def methods_of(
    decoding: CpuDecoding, names: Iterable[str], cache, trained: Optional[fs.PartitionSet], options: argparse.Namespace
) -> Iterable[Method]:
    return decoding.methods(names, cache, trained, options.keys_per_cell, options.trained_share, options.refine)


def haystacks_for(model: SmolLM2, files: Sequence[Optional[Path]], tokens: int) -> list[np.ndarray]:
    """All of them before anything is measured, long enough for the longest text."""
    haystacks = [haystack_of(model, file) for file in files]
    for haystack in haystacks:
        if len(haystack) < tokens:
            raise ValueError(f"the haystack has only {len(haystack):,} tokens, --lengths asks for {tokens:,}")
    return haystacks


def measure_needles(options: argparse.Namespace, results: Results) -> None:
    trained = trained_of(options, options.methods)
    files = options.haystack or [None]
    ways = [{"method": m, "budget": b} for m in options.methods for b in budgets_of(m, options.budgets)]
    haystacks: list[np.ndarray] = []
    for length in options.lengths:
        decoding = decoding_for(length, options)
        haystacks = haystacks or haystacks_for(decoding.model, files[: options.rounds], max(options.lengths))
        for round in range(options.rounds):
            file, haystack = files[round % len(files)], haystacks[round % len(files)]
            first_seed = options.seed * 1000 + round * options.depths
            for depths in chunks(range(options.depths), decoding.texts_at_once):
                keys = [
                    hide_pass_key(decoding.model, haystack, length, (i + 0.5) / options.depths, first_seed + i)
                    for i in depths
                ]
                case = {"text": file.name if file else "kjv_8k", "tokens": length}
                cases = [{**case, "depth": (i + 0.5) / options.depths, "key": k.key} for i, k in zip(depths, keys)]
                lacking, wanted = missing_rows(cases, ways, results)
                if lacking:
                    what = f"{length:,} tokens, round {round + 1}, depths from {cases[0]['depth']:.2f}"
                    find_keys(decoding, what, haystack[:length], [keys[i] for i in lacking],
                              [cases[i] for i in lacking], wanted, trained, options, results)  # fmt: skip


def find_keys(
    decoding: CpuDecoding,
    what: str,
    haystack: np.ndarray,
    keys: Sequence[PassKey],
    cases: Sequence[dict],
    wanted: dict[str, list[dict]],
    trained: Optional[fs.PartitionSet],
    options: argparse.Namespace,
    results: Results,
) -> None:
    """Pass keys of one haystack and length: their questions begin at the same token."""
    tokens, first = np.stack([key.tokens for key in keys]), keys[0].question
    with layers_bar(decoding.model, len(keys), f"{what}: prefill") as bar:
        cache = decoding.prefill(tokens[:, :first], tokens.shape[1], haystack, bar.update)
    methods = methods_of(decoding, wanted, cache, trained, options)
    for method in tqdm(methods, total=len(wanted), desc=what, leave=False, disable=None):
        for way in wanted[method.name]:
            started = time.perf_counter()
            method.begin(way["budget"])
            hidden = decoding.decode(method, tokens[:, first:-1], first)
            found = (decoding.likeliest(hidden[:, -DIGITS:]) == tokens[:, -DIGITS:]).mean(1)
            for case, share, cost in zip(cases, found, costs_of(method, len(cases), started)):
                results.add({**case, **way, "digits_found": float(share), **cost})
        results.write()


def stream(options: argparse.Namespace) -> None:
    decoding = decoding_for(options.tokens, options)
    model = decoding.model
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
    # a key of its own for each run is nothing to keep, the text before it is
    with layers_bar(model, 1, f"reading {len(text):,} tokens (dense prefill)") as bar:
        like = text[: hidden_key.needle] if hidden_key else None
        cache = decoding.prefill(text[None], capacity, like, bar.update)

    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"Asked: {model.decode(question).strip()}")
    print(f"Answers, and the share of the far keys that each token read in {model.num_layers} layers:\n")
    for method in methods_of(decoding, options.methods, cache, trained, options):
        print(f"{method.name:12} ", end="", flush=True)
        method.begin(options.budget)
        answer: list[int] = []
        for token, share in greedy(decoding, method, question, most):
            answer.append(token)
            print(f"{model.decode([token])}{dim}[{share:.1%}]{plain}", end="", flush=True)
        if hidden_key:
            print("  found" if model.decode(answer) == hidden_key.key else "  not found", end="")
        print(flush=True)


def greedy(decoding: CpuDecoding, method: Method, prompt: np.ndarray, most: int) -> Iterator[tuple[int, float]]:
    """The likeliest tokens after the prompt (n,), each with the share of the far keys that was read for it."""
    ends = {decoding.model.tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    waiting, first = prompt, method.cache.length
    read = far = 0
    for _ in range(most):
        hidden = decoding.decode(method, waiting[None], first)
        first += len(waiting)
        token = int(decoding.likeliest(hidden[:, -1:])[0, 0])
        if token in ends:
            return
        before, (read, far) = (read, far), method.counts()
        yield token, (read - before[0]) / max(1, far - before[1])
        waiting = np.array([token], np.int32)


def config_of(options: argparse.Namespace) -> dict:
    """The options as JSON; of files the names, as where they lie says nothing."""
    plain = lambda x: x.name if isinstance(x, Path) else [plain(y) for y in x] if isinstance(x, list) else x
    skipped = ("json", "plot", "resume", "cache", "texts_at_once")
    return {name: plain(value) for name, value in vars(options).items() if name not in skipped}


def check_outputs(options: argparse.Namespace) -> None:
    read = [options.partitions, *(getattr(options, "text", None) or ()), *(getattr(options, "haystack", None) or ())]
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path:
            check_output(option, path, read)
    if options.plot:
        check_picture("--plot", options.plot)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse(arguments)
    try:
        if options.command == "stream":
            stream(options)
            return 0
        check_outputs(options)
        where = environment(fs.__version__, on_cuda(options))
        results = Results(options.json, config_of(options), where, options.resume)
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
