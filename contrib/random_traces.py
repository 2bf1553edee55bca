"""Traces of any shape whose numbers mean nothing, to time training with: SmolLM2-135M's shape by default.

    python contrib/random_traces.py --out FOLDER [--texts 13] [--tokens 8192] [--layers 30]
"""

import argparse
from pathlib import Path

import numpy as np
from arguments import positive
from safetensors.numpy import save_file


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the traces")
    parser.add_argument("--texts", type=positive, default=13, help="traces")
    parser.add_argument("--tokens", type=positive, default=8192, help="of each trace")
    parser.add_argument("--layers", type=positive, default=30, help="of each trace")
    parser.add_argument("--heads-q", type=positive, default=9, help="query heads, a multiple of the KV heads")
    parser.add_argument("--heads-kv", type=positive, default=3, help="KV heads")
    parser.add_argument("--dim", type=positive, default=64, help="components of a head")
    args = parser.parse_args()
    if args.heads_q % args.heads_kv:
        parser.error(f"--heads-q {args.heads_q} is not a multiple of --heads-kv {args.heads_kv}")
    args.out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    heads = args.heads_q + args.heads_kv
    # One draw for all, moved along: a shuffle of gigabytes would take longer than the training.
    numbers = random.standard_normal((2 * heads * args.tokens, args.dim), dtype=np.float32).astype(np.float16)
    numbers[:, 0] *= 4  # some keys get more attention than others
    for text in range(args.texts):
        tensors = {"tokens": np.arange(args.tokens, dtype=np.int32)}
        for layer in range(args.layers):
            first = (7919 * (text * args.layers + layer)) % (len(numbers) // 2)
            q = numbers[first : first + args.heads_q * args.tokens].reshape(args.heads_q, args.tokens, args.dim)
            k = numbers[first + args.heads_q * args.tokens :][: args.heads_kv * args.tokens]
            tensors[f"layer.{layer}.q"] = q
            tensors[f"layer.{layer}.k"] = tensors[f"layer.{layer}.v"] = k.reshape(
                args.heads_kv, args.tokens, args.dim
            )
        metadata = {
            "model": "random",
            "text": f"random {text}",
            "layers": ",".join(map(str, range(args.layers))),
            "rope_theta": "100000",
            "rope_layout": "half",
            "rope_applied": "no",
        }
        save_file(tensors, args.out / f"{text:02}.safetensors", metadata)


if __name__ == "__main__":
    main()
