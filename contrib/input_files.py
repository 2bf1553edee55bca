"""Files that a program reads: what is wrong with one is said in a sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Sequence


def read_text(path: Path) -> str:
    """Raises OSError, and ValueError unless the text is UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The text {path} is not UTF-8: byte {error.start} is wrong.") from error


def read_report(path: Path, fields: Sequence[str], settings: Sequence[str] = ()) -> dict:
    """What a program has written with --json. Raises OSError, and ValueError unless its rows have these fields, and its
    config these settings."""
    try:
        report = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} has no rows: it is not a report.")
    parts = [("config", report.get("config"), settings), *((f"row {i}", row, fields) for i, row in enumerate(rows))]
    for name, part, expected in parts:
        for field in expected:
            if not isinstance(part, dict) or field not in part:
                raise ValueError(f"{path}: {name} has no {field}, it is another program's report.")
    return report


def reports_of(paths: Sequence[Path], fields: Sequence[str], settings: Sequence[str] = ()) -> list[dict]:
    """`read_report` of each file, for programs that have nothing to do without: ends them with its sentence."""
    try:
        reports = [read_report(path, fields, settings) for path in paths]
        for path, report in zip(paths, reports):
            if not report["rows"]:
                raise ValueError(f"{path} has no rows.")
        return reports
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}")
