"""Types of arguments for argparse."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


positive.__name__ = "integer"  # argparse names a type so in its messages
