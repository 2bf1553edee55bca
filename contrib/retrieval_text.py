#!/usr/bin/env python3
"""Hides pass keys in a text and asks for all of them at its end: a text to choose plans by, for heads that retrieve.

Prints how many tokens it has and how many of them ask, as `export_trace.py --tokens` and
`choose_partitions --asked` want them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn, Optional, Sequence

import numpy as np

from input_files import read_text
from output_files import check_output
from smollm2 import SmolLM2

DIGITS = 10  #: of each key, one token each
PLACES = ("river", "tower", "garden", "harbour", "market", "bridge", "forest", "castle", "mill", "school", "well", "road")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def hide_pass_keys(model: SmolLM2, haystack: str, tokens: int, keys: int, seed: int) -> tuple[str, str]:
    """The text of at most `tokens` tokens up to the answer, and the answer: nearly every token of it is a digit that
    stands far back."""
    random = np.random.default_rng(seed)
    digits = ["".join(str(x) for x in random.integers(0, 10, DIGITS)) for _ in range(keys)]
    hidden = [f"\n\nRemember this pass key: the {place} is {key}.\n\n" for place, key in zip(PLACES, digits)]
    question = "\n\nWhat are the pass keys? The"
    asked = ", the".join(f" {PLACES[i]} is {digits[i]}" for i in random.permutation(keys)) + "."
    # a few tokens to spare, as what stands side by side may be cut into other tokens
    room = tokens - len(model.encode("".join(hidden) + question + asked)) - 4 * keys
    hay = model.encode(haystack)
    if room <= 0:
        raise ValueError(f"{tokens} tokens are too few for {keys} pass keys and the question for them")
    if room > len(hay):
        raise ValueError(f"{tokens} tokens need {room} tokens of haystack, there are {len(hay)}")
    cuts = np.linspace(0, room, keys + 2).astype(int)
    pieces = [model.decode(hay[a:b]) for a, b in zip(cuts, cuts[1:])]
    text = pieces[0] + "".join(needle + piece for needle, piece in zip(hidden, pieces[1:]))
    return text + question, asked


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = Parser(prog="retrieval_text.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--haystack", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="at most (default: 4096)")
    parser.add_argument("--keys", type=int, default=8, choices=range(1, len(PLACES) + 1), metavar="N",
                        help=f"pass keys, 1 to {len(PLACES)} (default: 8)")
    parser.add_argument("--seed", type=int, default=1, help="of the keys (default: 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file for the text")
    options = parser.parse_args(arguments)
    try:
        check_output("--out", options.out, [options.haystack])
        model = SmolLM2()
        text, asked = hide_pass_keys(
            model, read_text(options.haystack), options.tokens, options.keys, options.seed
        )
        options.out.write_text(text + asked, encoding="utf-8")
        total = len(model.encode(text + asked))
        print(f"{total} {total - len(model.encode(text))}")
    except (ValueError, OSError) as error:
        print(f"retrieval_text.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
