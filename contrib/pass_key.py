"""Texts with a pass key hidden in them, and the question for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smollm2 import SmolLM2

DIGITS = 5


@dataclass
class PassKey:
    tokens: np.ndarray  #: (n,) int32: haystack, needle within, question, and the key's digits at the end
    key: str  #: its digits, one token each
    needle: int  #: token where the needle begins
    question: int  #: token where the question begins

    @property
    def prompt(self) -> np.ndarray:
        """All but the digits that the model is to find."""
        return self.tokens[:-DIGITS]


def hide_pass_key(model: SmolLM2, haystack: np.ndarray, tokens: int, depth: float, seed: int) -> PassKey:
    """A text of `tokens` tokens: haystack (n,) with a key at a depth from 0, the beginning, to 1, the end."""
    key = "".join(str(x) for x in np.random.default_rng(seed).integers(0, 10, DIGITS))
    needle = model.encode(f"\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n")
    question = model.encode(f"\n\nWhat is the pass key? The pass key is {key}")
    room = tokens - len(needle) - len(question)
    if room <= 0:
        raise ValueError(f"{tokens:,} tokens are too few for a pass key and the question for it")
    if room > len(haystack):
        raise ValueError(f"a text of {tokens:,} tokens needs {room:,} tokens of haystack, there are {len(haystack):,}")
    at = round(depth * room)
    text = np.concatenate([haystack[:at], needle, haystack[at:room], question]).astype(np.int32)
    return PassKey(text, key, at, tokens - len(question))
