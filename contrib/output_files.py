"""Files that a program writes, checked before it computes what goes into them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Iterable

PICTURES = (".png", ".pdf", ".svg")


def check_picture(name: str, path: Path) -> None:
    """Raises ValueError unless `path` is the name of a file that matplotlib can write."""
    if path.is_dir():
        raise ValueError(f"{name} {path} is a folder, not a file.")
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"{name} {path} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}.")


def picture(text: str) -> Path:
    """The same as a type of arguments."""
    path = Path(text)
    try:
        check_picture("picture", path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def check_output(option: str, path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises ValueError unless `path` can be a new file, or take the place of one that is not read, too."""
    if not path.parent.is_dir():
        raise ValueError(f"The folder {path.parent} of {option} does not exist.")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder, not a file.")
    for other in inputs:
        if path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other)):
            raise ValueError(f"{option} {path} is read, too, and would lose what is in it.")
